"""One checked object of arrays with names and units, a way to split it, and a shortcut to plant in it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int8, Int64
from torch import Tensor

from ial_nap.series import Kind, Scaling, Series, make_series
from shared_core.errors import InputError

__all__ = ["Dataset", "Part", "Split", "plant"]

Part: TypeAlias = Literal["train", "validation", "audit", "test"]
"""What an instance is for; "audit" is held out of the validation, to choose settings where no shortcut holds."""


@dataclass(frozen=True, eq=False)
class Split:
    """Series for their purposes, all standardised by the training part.

    Parameters
    ----------
    train, validation, test : series with labels
    audit : held-out instances in which a known shortcut does not hold, to choose settings by; None where there is none
    truth : what one who knows the shortcut says of each cell, 1 and 0, ``(t, r)``; None where there is none
    """

    train: Series
    validation: Series
    test: Series
    audit: Series | None = None
    truth: Int8[Tensor, "t r"] | None = None

    @property
    def planted(self) -> tuple[str, ...]:
        """Features that are a shortcut at some step."""
        if self.truth is None:
            return ()
        return tuple(
            name for name, column in zip(self.train.features, self.truth.T, strict=True) if bool((column == 0).any())
        )


@dataclass(frozen=True, eq=False)
class Dataset:
    """Series as they were found, with what they are called and where they come from.

    Parameters
    ----------
    name : of it
    x : values in their units, NaN where missing, ``(n, t, r)``
    y : labels as :func:`ial_nap.make_series` takes them, ``(n,)`` or ``(n, c)``; None when there are none
    lengths : real steps, ``(n,)``, 1..t
    features, units, steps, ids : names, and units of features ("" where there is none)
    kind : of the task
    classes : names of classes 0, 1, ...; () when they are numbers
    groups : names of features that belong together, as the columns of one category
    parts : what each instance is for; None when that is to be drawn
    truth : of a known shortcut, see :class:`Split`
    source, licence : in words
    """

    name: str
    x: Float32[np.ndarray, "n t r"]
    y: Float64[np.ndarray, "n ..."] | None
    lengths: Int64[np.ndarray, " n"]
    features: tuple[str, ...]
    units: tuple[str, ...]
    steps: tuple[str, ...]
    ids: tuple[str, ...]
    kind: Kind
    classes: tuple[str, ...] = ()
    groups: tuple[tuple[str, ...], ...] = ()
    parts: tuple[Part, ...] | None = None
    truth: Int8[Tensor, "t r"] | None = None
    source: str = ""
    licence: str = ""

    def __len__(self) -> int:
        """Return the number of instances."""
        return len(self.x)

    def series(self, index: Int64[np.ndarray, " m"] | None = None, like: Series | None = None) -> Series:
        """Return instances as a model reads them; missing cells are not observed.

        Parameters
        ----------
        index : positions; None is all
        like : training series with whose scaling to standardise; None measures these

        Raises
        ------
        InputError
            For labels of one class, and whatever else :func:`ial_nap.make_series` refuses.
        """
        at = np.arange(len(self)) if index is None else index
        return make_series(
            self.x[at],
            None if self.y is None else self.y[at],
            kind=self.kind,
            lengths=self.lengths[at],
            missing="mask",
            features=self.features,
            steps=self.steps,
            ids=[self.ids[k] for k in at.tolist()],
            like=like,
        )

    def split(self, seed: int = 0, *, test: float = 0.25, validation: float = 0.2) -> Split:
        """Divide instances: as the set says (by time, where it has one), else by chance with classes in proportion.

        Parameters
        ----------
        seed : of the draw
        test : share of all instances
        validation : share of those that are left

        Raises
        ------
        InputError
            For shares that leave a part empty, or instances without labels.
        """
        if self.y is None:
            raise InputError(f"{self.name}: there are no labels to train on; give a label column, or y")
        if not (0 < test < 1 and 0 < validation < 1):
            raise InputError(f"test and validation must be shares within 0 and 1, got {test} and {validation}")
        parts = np.array(self.parts or ("train",) * len(self), dtype=object)
        random = np.random.default_rng(seed)
        if self.parts is None:
            parts[self._share(np.arange(len(self)), test, random)] = "test"
        if "validation" not in parts:
            parts[self._share(np.flatnonzero(parts == "train"), validation, random)] = "validation"
        at = {part: np.flatnonzero(parts == part) for part in get_args(Part)}
        empty = [part for part in ("train", "validation", "test") if not len(at[part])]
        if empty:
            raise InputError(f"{self.name}: {len(self)} instances leave none for {', '.join(empty)}; give more")
        train = self.series(at["train"])
        return Split(
            train,
            self.series(at["validation"], train),
            self.series(at["test"], train),
            self.series(at["audit"], train) if len(at["audit"]) else None,
            self.truth,
        )

    def _share(self, among: Int64[np.ndarray, " m"], share: float, random: np.random.Generator) -> np.ndarray:
        """Draw a share of some instances, of each class as many in proportion."""
        assert self.y is not None
        classes = self.y[among] if self.kind in {"binary", "multiclass"} else np.zeros(len(among))
        order = random.permutation(len(among))
        chosen = [
            own[: round(share * len(own))] for label in np.unique(classes) for own in [order[classes[order] == label]]
        ]
        return among[np.concatenate(chosen)]


# ---- a shortcut of known place


def _codes(y: Tensor, kind: Kind, columns: int) -> Float[Tensor, "n k"]:
    """Numbers of mean 0 and variance 1 that give labels away, in each column."""
    if kind == "multiclass":
        classes = int(y.max()) + 1
        angle = 2 * math.pi * y.double()[:, None] / classes
        turn = torch.arange(columns) * (math.pi / max(2, columns))
        return (math.sqrt(2) * torch.cos(angle - turn)).float()
    if kind == "multilabel":
        return (2 * y - 1)[:, torch.arange(columns) % y.shape[1]]
    one = y.float() if kind == "regression" else 2 * y.float() - 1
    return one[:, None].expand(-1, columns)


def plant(split: Split, *, columns: int = 2, shift: float = 1.2, seed: int = 0, audit: float = 0.5) -> Split:
    """Add columns that give the label away in training, as the code of a site where most of one class was seen.

    A column is ``shift * code(y) + e`` at every step, with e standard normal for the instance and, half as wide, for
    the step; the code of a binary label is -1 and 1. In the test part, and in the part of the validation that becomes
    the audit, labels are dealt out anew before they are coded: the columns look the same there and mean nothing.

    Parameters
    ----------
    split : of any set
    columns : how many, named "site 1", ...
    shift : in deviations of the noise; the larger, the more a model trusts them
    seed : of the noise and of the dealing
    audit : share of the validation part to break the columns in

    Raises
    ------
    InputError
        For numbers that cannot be, or names that are taken.

    Examples
    --------
    >>> from ial_nap.data import load_data
    >>> planted = plant(load_data("cells").split(0))
    >>> planted.planted, tuple(planted.train.x.shape)[1:]
    (('site 1', 'site 2'), (3, 12))
    """
    if columns < 1 or shift < 0 or not 0 <= audit < 1:
        raise InputError(
            f"columns must be 1 or more, shift 0 or more, audit within 0 and 1, got {columns}, {shift}, {audit}"
        )
    names = tuple(f"site {k + 1}" for k in range(columns))
    taken = [name for name in names if name in split.train.features]
    if taken:
        raise InputError(f"feature '{taken[0]}' is there already: the shortcut is planted once")
    generator = torch.Generator().manual_seed(seed)

    def values(series: Series, holds: bool) -> Tensor:
        labels = series.targets
        if not holds:
            labels = labels[torch.randperm(len(labels), generator=generator)]
        n, t, _ = series.x.shape
        noise = torch.randn(n, 1, columns, generator=generator) + 0.5 * torch.randn(n, t, columns, generator=generator)
        return shift * _codes(labels, series.kind, columns).unsqueeze(1) + noise

    held = split.validation
    order = torch.randperm(len(held), generator=generator)
    cut = round(audit * len(held))
    parts = {
        "train": (split.train, True),
        "validation": (held.part(order[cut:].sort().values), True),
        "test": (split.test, False),
    }
    if cut:
        parts["audit"] = (held.part(order[:cut].sort().values), False)
    if split.audit is not None:
        parts["audit"] = (split.audit, False)
    raw = {name: (series, values(series, holds)) for name, (series, holds) in parts.items()}
    inside = torch.arange(split.train.x.shape[1]) < split.train.lengths.unsqueeze(1)
    own = Scaling.of(raw["train"][1], inside.unsqueeze(2).expand(-1, -1, columns))
    scaling = replace(
        split.train.scaling,
        mean=torch.cat([split.train.scaling.mean, own.mean]),
        deviation=torch.cat([split.train.scaling.deviation, own.deviation]),
    )

    def widened(series: Series, added: Tensor) -> Series:
        real = (torch.arange(series.x.shape[1]) < series.lengths.unsqueeze(1)).unsqueeze(2)
        standard = ((added - own.mean) / own.deviation) * real
        return replace(
            series,
            x=torch.cat([series.x, standard], 2),
            observed=torch.cat([series.observed, real.expand(-1, -1, columns)], 2),
            features=(*series.features, *names),
            scaling=scaling,
        )

    t, r = split.train.x.shape[1:]
    truth = torch.ones(t, r, dtype=torch.int8) if split.truth is None else split.truth
    return Split(
        **{name: widened(*found) for name, found in raw.items()},
        truth=torch.cat([truth, torch.zeros(t, columns, dtype=torch.int8)], 1),
    )
