"""Multivariate time series of several instances, checked once, standardised, with what they are called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from ial_nap.annotations import feature_set_hash
from shared_core.errors import InputError, no_such

__all__ = ["Kind", "Scaling", "Series", "find_name", "make_series"]

Kind: TypeAlias = Literal["binary", "multiclass", "multilabel", "regression"]
"""What is predicted for an instance: one of two, one of several, several of several, or a number."""

ArrayLike: TypeAlias = np.ndarray | Tensor | Sequence[object]


@dataclass(frozen=True, eq=False)
class Scaling:
    """Means and deviations that values were standardised with, so that 0 is the training mean.

    Parameters
    ----------
    mean, deviation : of each feature over observed cells, in the feature's unit, ``(r,)``
    target_mean, target_deviation : of the target of a regression; 0 and 1 otherwise
    """

    mean: Float[Tensor, " r"]
    deviation: Float[Tensor, " r"]
    target_mean: float = 0.0
    target_deviation: float = 1.0

    @classmethod
    def of(cls, x: Float[Tensor, "n t r"], observed: Bool[Tensor, "n t r"]) -> Scaling:
        """Measure features on observed cells; one that never varies keeps the deviation 1.

        Parameters
        ----------
        x : values, ``(n, t, r)``
        observed : cells that count
        """
        count = observed.sum((0, 1)).clamp(min=1)
        values = torch.where(observed, x, x.new_zeros(())).double()
        mean = values.sum((0, 1)) / count
        spread = torch.where(observed, values - mean, values.new_zeros(())).square().sum((0, 1)) / count
        deviation = torch.where(spread > 1e-12 * (1 + mean.square()), spread.sqrt(), torch.ones_like(spread))
        return cls(mean.to(x.dtype), deviation.to(x.dtype))

    def raw(self, x: Float[Tensor, "... r"]) -> Float[Tensor, "... r"]:
        """Return standardised values in their units.

        Parameters
        ----------
        x : standardised values
        """
        return x * self.deviation + self.mean

    def raw_target(self, y: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Return a standardised target, or a prediction of it, in its unit.

        Parameters
        ----------
        y : standardised values
        """
        return y * self.target_deviation + self.target_mean


@dataclass(frozen=True, eq=False)
class Series:
    """Instances as a model reads them; made by :func:`make_series`.

    Parameters
    ----------
    x : standardised values, 0 where padded or missing, ``(n, t, r)``
    lengths : real steps of each instance, ``(n,)``, 1..t
    observed : cells that are neither padded nor missing, ``(n, t, r)``
    y : float ``(n,)`` for binary (0, 1) and regression (standardised), int64 ``(n,)`` for multiclass, float ``(n, c)``
        for multilabel; None when unknown
    kind : of the task
    outputs : logits of a model of it: classes, labels or 1
    features, steps, ids : names
    scaling : what was standardised with
    units : of features, "" where there is none; () when not known
    """

    x: Float[Tensor, "n t r"]
    lengths: Int64[Tensor, " n"]
    observed: Bool[Tensor, "n t r"]
    y: Shaped[Tensor, "n ..."] | None
    kind: Kind
    outputs: int
    features: tuple[str, ...]
    steps: tuple[str, ...]
    ids: tuple[str, ...]
    scaling: Scaling
    units: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Return the number of instances."""
        return len(self.x)

    @property
    def schema(self) -> str:
        """Hash of what verdicts are about, see :func:`ial_nap.annotations.feature_set_hash`."""
        return feature_set_hash(self.features, len(self.steps), self.units)

    @property
    def targets(self) -> Shaped[Tensor, "n ..."]:
        """Labels, for what cannot do without.

        Raises
        ------
        InputError
            When there are none.
        """
        if self.y is None:
            raise InputError("these series have no labels: give y")
        return self.y

    def part(self, index: Int64[Tensor, " m"] | Bool[Tensor, " n"] | Sequence[int]) -> Series:
        """Return some instances.

        Parameters
        ----------
        index : positions, or a mask over instances
        """
        at = index if isinstance(index, Tensor) else torch.as_tensor(index, dtype=torch.int64)
        at = at.nonzero().flatten() if at.dtype == torch.bool else at
        return replace(
            self,
            x=self.x[at],
            lengths=self.lengths[at],
            observed=self.observed[at],
            y=None if self.y is None else self.y[at],
            ids=tuple(self.ids[k] for k in at.tolist()),
        )

    def without(self, features: Sequence[str]) -> Series:
        """Return the same instances with fewer features.

        Parameters
        ----------
        features : names of those to leave out

        Raises
        ------
        InputError
            For an unknown name, or when none would be left.
        """
        gone = {find_name(name, self.features, "feature") for name in features}
        kept = [k for k in range(len(self.features)) if k not in gone]
        if not kept:
            raise InputError(f"all {len(self.features)} features would be dropped: keep one at least")
        return replace(
            self,
            x=self.x[:, :, kept],
            observed=self.observed[:, :, kept],
            features=tuple(self.features[k] for k in kept),
            units=tuple(self.units[k] for k in kept) if self.units else (),
            scaling=replace(self.scaling, mean=self.scaling.mean[kept], deviation=self.scaling.deviation[kept]),
        )

    @staticmethod
    def joined(parts: Sequence[Series]) -> Series:
        """Return the instances of several series as one; without labels unless all have them.

        Parameters
        ----------
        parts : at least one; names, kind and scaling are those of the first
        """
        labels = [part.y for part in parts if part.y is not None]
        return replace(
            parts[0],
            x=torch.cat([part.x for part in parts]),
            lengths=torch.cat([part.lengths for part in parts]),
            observed=torch.cat([part.observed for part in parts]),
            y=torch.cat(labels) if len(labels) == len(parts) else None,
            ids=tuple(name for part in parts for name in part.ids),
        )

    def to(self, target: torch.device | torch.dtype | str) -> Series:
        """Move or convert values and floating labels; lengths and masks are moved only.

        Parameters
        ----------
        target : a device, or a floating dtype
        """
        if isinstance(target, torch.dtype):
            y = self.y.to(target) if self.y is not None and self.y.is_floating_point() else self.y
            scaling = replace(
                self.scaling, mean=self.scaling.mean.to(target), deviation=self.scaling.deviation.to(target)
            )
            return replace(self, x=self.x.to(target), y=y, scaling=scaling)
        return replace(
            self,
            x=self.x.to(target),
            lengths=self.lengths.to(target),
            observed=self.observed.to(target),
            y=None if self.y is None else self.y.to(target),
            scaling=replace(
                self.scaling, mean=self.scaling.mean.to(target), deviation=self.scaling.deviation.to(target)
            ),
        )


def find_name(name: str, known: Sequence[str], what: str) -> int:
    """Return the position of a name, or say which known name is closest.

    Parameters
    ----------
    name : looked for
    known : names there are
    what : they name, for the message

    Raises
    ------
    UnknownKeyError
        For an unknown name.

    Examples
    --------
    >>> find_name("HDL", ["LDL", "HDL"], "feature")
    1
    """
    try:
        return list(known).index(name)
    except ValueError:
        raise no_such(what, name, known) from None


def make_series(
    x: ArrayLike,
    y: ArrayLike | None = None,
    *,
    kind: Kind | None = None,
    lengths: ArrayLike | None = None,
    missing: Literal["error", "mask"] = "error",
    features: Sequence[str] | None = None,
    steps: Sequence[str] | None = None,
    ids: Sequence[str] | None = None,
    units: Sequence[str] | None = None,
    like: Series | None = None,
    standardise: bool = True,
) -> Series:
    """Check arrays and make a batch of series of them.

    Parameters
    ----------
    x : values, ``(n, t, r)``; what lies beyond an instance's length is never looked at
    y : labels: ``(n,)`` or ``(n, 1)`` of 0 and 1 (binary), of 0..c-1 (multiclass), of numbers (regression), or
        ``(n, c)`` of 0 and 1 (multilabel)
    kind : of the task; None guesses from `y`, as `like`'s if that is given
    lengths : real steps of each instance, ``(n,)``; None when all are full
    missing : NaN within an instance's length is an error, or a cell that is not observed and reads as the mean
    features, steps, ids : names; None numbers them
    units : of features; None when not known
    like : training series whose names, units, kind and scaling hold for these too
    standardise : False leaves values as they are, and 0 to mean whatever it means

    Raises
    ------
    InputError
        For anything that is not so: the message names the value and the way out.

    Examples
    --------
    >>> series = make_series(np.arange(12.0).reshape(2, 3, 2), [0, 1], features=["LDL", "HDL"])
    >>> series.kind, series.outputs, tuple(series.x.shape), series.scaling.mean.tolist()
    ('binary', 1, (2, 3, 2), [5.0, 6.0])
    """
    values = _values(x)
    n, t, r = values.shape
    if like is not None and r != len(like.features):
        raise InputError(
            f"x has {r} features, the model was trained on {len(like.features)}: {', '.join(like.features)}"
        )
    if like is not None and t != len(like.steps):
        raise InputError(f"x has {t} steps, the model was trained on {len(like.steps)}; pad x and give lengths")
    names = _names(features or (like.features if like is not None else None), r, "feature", "f")
    if like is not None and names != like.features:
        raise InputError(f"features {list(names)} are not those of the training, {list(like.features)}")
    step_names = _names(steps or (like.steps if like is not None else None), t, "step", "")
    id_names = _names(ids, n, "instance id", "")
    in_units = like.units if like is not None else tuple(str(unit) for unit in units or ())
    if in_units and len(in_units) != r:
        raise InputError(f"{len(in_units)} units for {r} features: give one each, '' where there is none")
    real = _lengths(lengths, n, t)
    inside = (torch.arange(t) < real.unsqueeze(1)).unsqueeze(2).expand(n, t, r)
    observed = inside & values.isfinite()
    _check_missing(values, inside & ~observed, missing, names, id_names)
    scaling = Scaling(torch.zeros(r), torch.ones(r))
    if like is not None:
        scaling = like.scaling
    elif standardise:
        scaling = Scaling.of(values, observed)
    values = torch.where(observed, (values - scaling.mean) / scaling.deviation, values.new_zeros(()))
    if y is None:
        if like is None and kind is None:
            raise InputError(
                "without y, say what is predicted: kind='binary', 'multiclass', 'multilabel', 'regression'"
            )
        found: Kind = like.kind if like is not None else kind or "binary"
        return Series(
            values,
            real,
            observed,
            None,
            found,
            like.outputs if like is not None else 1,
            names,
            step_names,
            id_names,
            scaling,
            in_units,
        )
    target, found, outputs = _labels(y, n, like.kind if like is not None else kind, like)
    if found == "regression":
        if like is None and standardise:
            deviation = float(target.double().std(correction=0))
            scaling = replace(scaling, target_mean=float(target.double().mean()), target_deviation=deviation or 1.0)
        target = (target - scaling.target_mean) / scaling.target_deviation
    return Series(values, real, observed, target, found, outputs, names, step_names, id_names, scaling, in_units)


def _values(x: ArrayLike) -> Tensor:
    try:
        values = torch.as_tensor(np.asarray(x) if not isinstance(x, Tensor) else x).to(torch.float32)
    except (TypeError, ValueError) as error:
        raise InputError(f"x must be numbers in an array (n, t, r): {error}") from None
    if values.ndim != 3:
        raise InputError(f"x must have three axes (instances, steps, features), got shape {tuple(values.shape)}")
    if not values.numel():
        raise InputError(f"x is empty: shape {tuple(values.shape)}")
    return values


def _names(given: Sequence[str] | None, count: int, what: str, prefix: str) -> tuple[str, ...]:
    if given is None:
        return tuple(f"{prefix}{k}" for k in range(count))
    names = tuple(str(name) for name in given)
    if len(names) != count:
        raise InputError(f"{len(names)} {what} names for {count}: give one each")
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise InputError(f"{what} '{name}' is there twice: make names unique")
        seen.add(name)
    return names


def _lengths(given: ArrayLike | None, n: int, t: int) -> Tensor:
    if given is None:
        return torch.full((n,), t)
    found = torch.as_tensor(np.asarray(given)).flatten()
    lengths = found.to(torch.int64)
    if len(lengths) != n or not torch.equal(lengths.to(found.dtype), found):
        raise InputError(f"lengths must be {n} whole numbers, one for each instance, got {len(lengths)}")
    wrong = ((lengths < 1) | (lengths > t)).nonzero().flatten()
    if len(wrong):
        raise InputError(f"lengths[{int(wrong[0])}] = {int(lengths[wrong[0]])} is not in 1..{t}, the steps of x")
    return lengths


def _check_missing(values: Tensor, gone: Tensor, missing: str, features: tuple[str, ...], ids: tuple[str, ...]) -> None:
    if not gone.any():
        return
    k, t, d = (int(v) for v in gone.nonzero()[0])
    place = f"x[{k}, {t}, {d}] (instance '{ids[k]}', feature '{features[d]}')"
    if values[k, t, d].isinf():
        raise InputError(f"{place} is infinite")
    if missing != "mask":
        raise InputError(f"{place} is NaN: fill it, or give missing='mask' to read it as the mean")


def _labels(y: ArrayLike, n: int, kind: Kind | None, like: Series | None) -> tuple[Tensor, Kind, int]:
    if kind is not None and kind not in get_args(Kind):
        raise no_such("kind", kind, get_args(Kind))
    try:
        found = torch.as_tensor(np.asarray(y) if not isinstance(y, Tensor) else y).to(torch.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"y must be numbers: {error}") from None
    if found.ndim == 2 and found.shape[1] == 1:
        found = found[:, 0]
    if found.ndim not in {1, 2} or len(found) != n:
        raise InputError(f"y has shape {tuple(found.shape)} for {n} instances: give (n,) or (n, labels)")
    if not found.isfinite().all():
        raise InputError(f"y[{int((~found.isfinite()).nonzero()[0, 0])}] is not finite")
    whole = bool((found == found.round()).all())
    zero_one = whole and bool(((found == 0) | (found == 1)).all())
    if kind is None:
        kind = (
            "multilabel" if found.ndim == 2 else "regression" if not whole else "binary" if zero_one else "multiclass"
        )
    if (found.ndim == 2) != (kind == "multilabel"):
        raise InputError(f"y of shape {tuple(found.shape)} is not that of a {kind} task")
    if kind in {"binary", "multilabel"} and not zero_one:
        raise InputError(f"y of a {kind} task must be 0 or 1, got {float(found[(found != 0) & (found != 1)][0]):g}")
    if kind == "multiclass" and (not whole or found.min() < 0):
        raise InputError("y of a multiclass task must be classes 0, 1, 2, ...")
    if kind != "regression" and like is None:
        for column in found.T if found.ndim == 2 else (found,):
            if (column == column[0]).all():
                raise InputError(f"every label is {float(column[0]):g}: there is nothing to learn from one class")
    if kind == "regression" and like is None and n > 1 and (found == found[0]).all():
        raise InputError(f"every target is {float(found[0]):g}: there is nothing to learn")
    outputs = {"multiclass": int(found.max()) + 1, "multilabel": found.shape[-1]}.get(kind, 1)
    if like is not None:
        if outputs > like.outputs or (kind == "multilabel" and outputs != like.outputs):
            raise InputError(f"y has {outputs} classes, the model was trained on {like.outputs}")
        outputs = like.outputs
    return found.to(torch.int64 if kind == "multiclass" else torch.float32), kind, outputs
