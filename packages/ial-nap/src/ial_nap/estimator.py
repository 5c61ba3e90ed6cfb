"""The method as scikit-learn estimators: fit, predict, be told what not to look at, and obey without a gradient step.

An estimator holds a :class:`ial_nap.FeatureNAP`, the names, units and scaling of what it was trained on, and the
:class:`ial_nap.Context` of all that annotators have said (spec 2.6 and 6).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias, TypeVar, cast, get_args

import numpy as np
import torch
from jaxtyping import Float, Shaped
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.exceptions import NotFittedError
from torch import Tensor

from ial_nap.annotations import Annotation, latest
from ial_nap.attention import Contributions
from ial_nap.context import Context, Shift, check_masks
from ial_nap.episodes import Episodes, Imagined
from ial_nap.instances import Reads
from ial_nap.metrics import measure
from ial_nap.nap import FeatureNAP, Predicted
from ial_nap.ranking import CER, Ranked
from ial_nap.resampling import Difference, compare
from ial_nap.series import ArrayLike, Kind, Series, find_name, make_series
from ial_nap.training import Episodic, Epoch, Training, finetune
from shared_core.device import World, one_thread, resolve_device
from shared_core.errors import InputError

__all__ = ["Annotations", "Attention", "NAPClassifier", "NAPRegressor", "ScoreReport", "aligned"]

_ROWS = 8192

# Run-time checkers of annotations do not take typing.Self in methods.
_Self = TypeVar("_Self", bound="_NAP")

Said: TypeAlias = "Iterable[Annotation] | Context | Tensor | np.ndarray"
"""Verdicts: records, a context, or masks ``(k, t, r)``."""


@dataclass(frozen=True, eq=False)
class Attention:
    """How far steps and cells are attended to, with what is not known of it.

    Parameters
    ----------
    alpha : weight of each step, ``(n, t)``, which adds up to 1; 0 beyond an instance's length
    alpha_std : its standard deviation over draws
    beta : weight of each cell times its gate, ``(n, t, r)``; exactly 0 where verdicts exclude the cell
    beta_std : its standard deviation over draws
    """

    alpha: Float[Tensor, "n t"]
    alpha_std: Float[Tensor, "n t"]
    beta: Float[Tensor, "n t r"]
    beta_std: Float[Tensor, "n t r"]


@dataclass(frozen=True, eq=False)
class ScoreReport:
    """Predictions of labelled instances, and how good they are.

    Parameters
    ----------
    metrics : scores by name, those of a regression in the target's unit
    predictions : probabilities, or standardised predictions, ``(n, c)``
    series : what was predicted, with labels
    context : hash of the context that the predictions were made under
    """

    metrics: dict[str, float]
    predictions: Float[np.ndarray, "n c"]
    series: Series
    context: str


class Annotations:
    """Verdicts as they are collected, with every name checked when it comes in.

    Parameters
    ----------
    names : of the features
    steps : names of the steps, or how many there are; None takes any number
    instances : ids that may be annotated; None takes any
    who : annotator of verdicts that name none
    round : of annotation
    model : hash of the context that they were decided under

    Examples
    --------
    >>> said = Annotations(["LDL", "HDL"], steps=["2010", "2011"], who="dr_a")
    >>> said.add(17, "2011", "LDL", 0, seconds=3.1, note="taken after a meal").cell
    ('17', 1, 'LDL')
    >>> [one.verdict for one in said]
    [0]
    >>> said.add("17", 0, "LDX", 1)
    Traceback (most recent call last):
    ...
    shared_core.errors.UnknownKeyError: no feature 'LDX'; did you mean 'LDL'? there are LDL, HDL
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        steps: Sequence[str] | int | None = None,
        instances: Iterable[str] | None = None,
        who: str = "",
        round: int = 0,  # noqa: A002  (the name the record has)
        model: str = "",
    ) -> None:
        self.names = tuple(names)
        self.steps = tuple(str(k) for k in range(steps)) if isinstance(steps, int) else steps and tuple(steps)
        self.instances = None if instances is None else tuple(instances)
        self.who, self.round, self.model = who, round, model
        self._known = None if self.instances is None else frozenset(self.instances)
        self._given: list[Annotation] = []

    def add(
        self,
        instance: str | int,
        step: str | int,
        feature: str | int,
        verdict: int,
        seconds: float = 0.0,
        who: str | None = None,
        note: str = "",
    ) -> Annotation:
        """Add one verdict on one cell.

        Parameters
        ----------
        instance : its id; a whole number stands for its text
        step : its number, counted from 0, or its name
        feature : its name, or its number
        verdict : 1 attend, 0 do not attend, -1 don't know
        seconds : it took
        who : annotator; None is the one of all
        note : free text

        Returns
        -------
        The record that was added.

        Raises
        ------
        InputError
            For an unknown instance, step, feature or verdict; the message names the closest known one.
        """
        name = str(instance)
        if self._known is not None and name not in self._known:
            find_name(name, self.instances or (), "instance")
        if isinstance(step, str):
            step = find_name(step, self.steps or (step,), "step") if self.steps else _number(step)
        if self.steps is not None and not 0 <= step < len(self.steps):
            raise InputError(f"step {step} of '{name}': there are {len(self.steps)} steps, counted from 0")
        if isinstance(feature, int):
            if not 0 <= feature < len(self.names):
                raise InputError(f"feature {feature}: there are {len(self.names)} features, counted from 0")
            feature = self.names[feature]
        find_name(feature, self.names, "feature")
        one = Annotation(
            name,
            step,
            feature,
            int(verdict),
            seconds=float(seconds),
            annotator=self.who if who is None else who,
            round=self.round,
            model=self.model,
            note=note,
        )
        self._given.append(one)
        return one

    def extend(self, annotations: Iterable[Annotation]) -> None:
        """Add records that are there already, as read from a file; each is checked.

        Parameters
        ----------
        annotations : records

        Raises
        ------
        InputError
            As :meth:`add`; nothing is added then.
        """
        given = list(annotations)
        for one in given:
            find_name(one.feature, self.names, "feature")
            if self._known is not None and one.instance not in self._known:
                find_name(one.instance, self.instances or (), "instance")
            if self.steps is not None and one.step >= len(self.steps):
                raise InputError(f"step {one.step} of '{one.instance}': there are {len(self.steps)} steps")
        self._given += given

    def __iter__(self) -> Iterator[Annotation]:
        """Return an iterator over the records, oldest first."""
        return iter(self._given)

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self._given)


def _number(step: str) -> int:
    if not step.isdigit():
        raise InputError(f"step '{step}': steps have no names here, give a number from 0")
    return int(step)


@dataclass(frozen=True)
class _Unannotated(Episodes):
    """What the release trains with: one context, in which nothing is known (spec 2.6)."""

    def draw(self, count: int, generator: torch.Generator) -> Imagined:  # noqa: ARG002  (nothing is drawn)
        shape = (count, self.steps, self.features)
        return Imagined(torch.zeros(shape, dtype=torch.bool), torch.full((count, 1, *shape[1:]), -1, dtype=torch.int8))


def aligned(series: Series, like: Series) -> Series:
    """Return series in the scaling of others, after a look at their names.

    Parameters
    ----------
    series : to be read by a model
    like : series the model was trained on

    Raises
    ------
    InputError
        For other features, steps or another kind of task.
    """
    for what, here, there in (
        ("features", series.features, like.features),
        ("steps", series.steps, like.steps),
    ):
        if here != there:
            odd = next((pair for pair in zip(here, there, strict=False) if pair[0] != pair[1]), None)
            told = f"'{odd[0]}' where the training has '{odd[1]}'" if odd else f"{len(here)} for {len(there)}"
            raise InputError(f"these series have other {what} than the training: {told}")
    if series.kind != like.kind and series.y is not None:
        raise InputError(f"these series are of a {series.kind} task, the model of a {like.kind} one")
    if series.y is not None and series.outputs > like.outputs:
        raise InputError(f"these series have {series.outputs} classes, the model {like.outputs}")
    old, new = series.scaling, like.scaling
    same = torch.equal(old.mean.cpu(), new.mean.cpu()) and torch.equal(old.deviation.cpu(), new.deviation.cpu())
    same &= (old.target_mean, old.target_deviation) == (new.target_mean, new.target_deviation)
    if same:
        return replace(series, kind=like.kind, outputs=like.outputs, units=like.units)
    x = (old.raw(series.x) - new.mean.to(series.x)) / new.deviation.to(series.x)
    y = series.y
    if y is not None and series.kind == "regression":
        y = (old.raw_target(y) - new.target_mean) / new.target_deviation
    x = torch.where(series.observed, x, x.new_zeros(()))
    return replace(series, x=x, y=y, kind=like.kind, outputs=like.outputs, units=like.units, scaling=new)


class _NAP(BaseEstimator):
    """What both estimators have in common."""

    _kinds: ClassVar[tuple[Kind, ...]]

    rnn: Literal["gru", "lstm"]
    protocol: Literal["episodic", "paper"]
    context: Reads
    missing: Literal["error", "mask"]
    model_: FeatureNAP
    series_: Series
    context_: Context
    history_: list[Epoch]
    train_: Series | None
    validation_: Series | None
    instances_: dict[str, int]
    pools_: list[Series]
    n_features_in_: int

    def __init__(
        self,
        *,
        hidden: int = 32,
        latent: int = 16,
        keep: float = 0.8,
        rnn: Literal["gru", "lstm"] = "gru",
        epochs: int = 150,
        batch_size: int = 200,
        lr: float = 3e-3,
        l2: float = 0.004,
        patience: int = 20,
        samples: int = 30,
        hard: bool = True,
        kappa: float = 1.0,
        limit: int = 512,
        protocol: Literal["episodic", "paper"] = "episodic",
        context: Reads = "masks",
        missing: Literal["error", "mask"] = "error",
        device: str = "auto",
        seed: int = 0,
    ) -> None:
        self.hidden = hidden
        self.latent = latent
        self.keep = keep
        self.rnn = rnn
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.l2 = l2
        self.patience = patience
        self.samples = samples
        self.hard = hard
        self.kappa = kappa
        self.limit = limit
        self.protocol = protocol
        self.context = context
        self.missing = missing
        self.device = device
        self.seed = seed

    def __sklearn_tags__(self) -> Any:
        """Say that x has three axes."""
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array, tags.input_tags.two_d_array = True, False
        tags.input_tags.allow_nan = self.missing == "mask"
        return tags

    # ---- training

    def fit(
        self: _Self,
        x: ArrayLike | Series,
        y: ArrayLike | None = None,
        *,
        lengths: ArrayLike | None = None,
        validation: tuple[ArrayLike, ArrayLike] | tuple[ArrayLike, ArrayLike, ArrayLike] | Series | None = None,
        feature_names: Sequence[str] | None = None,
        units: Sequence[str] | None = None,
        step_names: Sequence[str] | None = None,
        ids: Sequence[str] | None = None,
        on_epoch: Callable[[Epoch], None] | None = None,
        checkpoint: str | Path | None = None,
        world: World | None = None,
    ) -> _Self:
        """Train on series and labels, with imagined annotators, so that real ones are obeyed at once later.

        Parameters
        ----------
        x : values in the user's units, ``(n, t, r)``, float or whole; or a ready :class:`ial_nap.Series`, labels inside
        y : labels, ``(n,)``: classes of any type, or numbers of a regression; ``(n, c)`` of 0 and 1 for several labels
        lengths : real steps of each instance, ``(n,)``, where series are ragged; what is beyond is never read
        validation : to stop by, as ``(x, y)``, ``(x, y, lengths)`` or a Series; None takes a fifth of the instances,
            drawn by the seed within each class (within neighbours in y for a regression)
        feature_names, step_names, ids : names; None numbers them
        units : of features, "" where there is none
        on_epoch : called after each epoch
        checkpoint : file written after each epoch and removed at the end. If it is there already, the training that
            was interrupted goes on, and ends where it would have ended, to the bit (on one kind of machine)
        world : processes that share each batch, from :func:`shared_core.device.process_group`; the first writes

        Returns
        -------
        The estimator itself. Afterwards ``model_`` is the network, ``series_`` holds names and scaling without any
        instance, ``context_`` the verdicts (none yet), ``history_`` what each epoch came to, ``train_`` and
        ``validation_`` the series used (they are not saved).

        Raises
        ------
        InputError
            For arrays of other shapes, NaN without ``missing="mask"``, infinite values, lengths outside 1..t, repeated
            names, a single class, parameters that cannot be, and a checkpoint of another training; the message names
            the value and the way out.
        """
        self.check_parameters()
        device = resolve_device(self.device)
        train, held_out = self._split(x, y, lengths, validation, feature_names, units, step_names, ids)
        model = self._make_model(train).to(device)
        episodes = _Unannotated(model.steps, model.features) if self.protocol == "paper" else None
        objective = Episodic(
            model, episodes=episodes, gate=0.0 if self.protocol == "paper" else 0.5, l2=self.l2, seed=self.seed
        )
        training = Training(
            model,
            objective,
            train.to(device),
            None if held_out is None else held_out.to(device),
            lr=self.lr,
            batch_size=self.batch_size,
            epochs=self.epochs,
            patience=self.patience,
            seed=self.seed,
            world=world,
        )
        # A second thread gains nothing on layers this small, and loses much where cores are busy.
        with one_thread(device.type == "cpu" and self.hidden <= 256):
            history = self._run(training, on_epoch, checkpoint, train, held_out)
        self.model_, self.history_ = model.requires_grad_(), list(history)
        self.train_, self.validation_ = train, held_out
        self._take_names(train)
        self.instances_, self.pools_ = {}, []
        if held_out is not None:
            self.know(held_out)
        self.know(train)
        self.context_ = self._new_context()
        return self

    def check_parameters(self) -> None:
        """Refuse parameters that cannot be; :meth:`fit` does it first.

        Raises
        ------
        InputError
            Naming the parameter, its value, and what it may be.
        """
        for name in ("hidden", "epochs", "batch_size", "patience", "samples", "limit"):
            _check_whole(name, getattr(self, name), 1)
        _check_whole("latent", self.latent, 0)
        for name, value, known in (
            ("protocol", self.protocol, ("episodic", "paper")),
            ("context", self.context, get_args(Reads)),
            ("missing", self.missing, ("error", "mask")),
        ):
            if value not in known:
                raise InputError(f"{name} '{value}' is unknown: choose {' or '.join(known)}")
        if not (self.l2 >= 0 and math.isfinite(self.l2)):
            raise InputError(f"l2 must be 0 or more, got {self.l2}")
        if not self.kappa > 0:
            raise InputError(f"kappa must be above 0, got {self.kappa}")
        if not self.latent and (self.protocol == "paper" or self.context != "masks"):
            raise InputError("protocol='paper' and contexts other than 'masks' need a latent: latent must be 1 or more")

    def _make_model(self, train: Series) -> FeatureNAP:
        return FeatureNAP(
            len(train.steps),
            len(train.features),
            train.outputs,
            train.kind,
            hidden=int(self.hidden),
            latent=int(self.latent),
            keep=float(self.keep),
            rnn=self.rnn,
            kappa=float(self.kappa),
            hard=bool(self.hard),
            limit=int(self.limit),
            gated=self.protocol == "episodic",
            schema=train.schema,
            seed=int(self.seed),
            context=self.context,
        )

    def _run(
        self,
        training: Training,
        on_epoch: Callable[[Epoch], None] | None,
        checkpoint: str | Path | None,
        train: Series,
        held_out: Series | None,
    ) -> list[Epoch]:
        if checkpoint is None:
            return training.run(on_epoch=on_epoch)
        from shared_core.runs import load_tree, save_tree

        path, mark = Path(checkpoint), self._fingerprint(train, held_out)
        if path.exists():
            tree = load_tree(path)
            if not isinstance(tree, dict) or cast("dict[str, Any]", tree).get("ial_nap_fit") != mark:
                raise InputError(
                    f"{path}: is the checkpoint of another training (other data or parameters): delete it, or give"
                    " another file"
                )
            try:
                training.load_state_dict(tree["state"])
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                raise InputError(f"{path}: is damaged ({error}): delete it to start anew") from None

        def keep(epoch: Epoch) -> None:
            if training.world.is_main:
                save_tree(path, {"ial_nap_fit": mark, "state": training.state_dict()})
            if on_epoch is not None:
                on_epoch(epoch)

        history = training.run(on_epoch=keep)
        if training.world.is_main:
            path.unlink(missing_ok=True)
        return history

    def _fingerprint(self, *parts: Series | None) -> str:
        """Hash all that a training depends on."""
        found = hashlib.sha256()
        options = {**self.get_params(deep=False), "device": "", "samples": 0, "missing": ""}
        found.update(json.dumps([type(self).__name__, options], default=str, sort_keys=True).encode())
        for series in parts:
            if series is None:
                continue
            found.update(json.dumps([series.features, series.steps, series.kind, series.outputs]).encode())
            for tensor in (series.x, series.lengths, series.observed, series.targets):
                found.update(str(tuple(tensor.shape)).encode() + tensor.contiguous().numpy().tobytes())
        return found.hexdigest()[:32]

    def _split(
        self,
        x: ArrayLike | Series,
        y: ArrayLike | None,
        lengths: ArrayLike | None,
        validation: Any,
        feature_names: Sequence[str] | None,
        units: Sequence[str] | None,
        step_names: Sequence[str] | None,
        ids: Sequence[str] | None,
    ) -> tuple[Series, Series | None]:
        """Return what to train on and what to stop by, in the scaling of the former."""
        if isinstance(x, Series):
            if y is not None or lengths is not None or feature_names or units or step_names or ids:
                raise InputError("x is a Series: labels, lengths and names are in it, give nothing else")
            self._check_kind(x.kind)
            _ = x.targets
            self._take_classes(x)
            train = x.to("cpu")
            if validation is not None:
                return train, self._validation(validation, train)
            chosen = _held_out(train.targets.numpy().reshape(len(train), -1), self.seed, train.kind)
            return train.part(~chosen), train.part(chosen) if chosen.any() else None
        if y is None:
            raise InputError("y is missing: training needs labels, one for each instance of x")
        labels, kind = self._encode_first(y)
        whole = make_series(
            x,
            labels,
            kind=kind,
            lengths=lengths,
            missing=self.missing,
            features=feature_names,
            steps=step_names,
            ids=ids,
            units=units,
        )
        if validation is not None:
            return whole, self._validation(validation, whole)
        chosen = _held_out(labels.reshape(len(labels), -1), self.seed, kind)
        if not chosen.any():
            return whole, None
        # Scaling is measured on what is trained on, and nothing else.
        values = x if isinstance(x, Tensor) else np.asarray(x)
        given = None if lengths is None else np.asarray(lengths).reshape(-1)

        def part(index: np.ndarray, like: Series | None) -> Series:
            return make_series(
                values[index],
                labels[index],
                kind=kind,
                lengths=None if given is None else given[index],
                missing=self.missing,
                features=whole.features,
                steps=whole.steps,
                ids=[whole.ids[k] for k in index.tolist()],
                units=units,
                like=like,
            )

        mask = chosen.numpy()
        train = part(np.flatnonzero(~mask), None)
        return train, part(np.flatnonzero(mask), train)

    def _validation(self, given: Any, train: Series) -> Series:
        if isinstance(given, Series):
            _ = given.targets
            return aligned(given.to("cpu"), train)
        if not isinstance(given, tuple) or len(cast("tuple[Any, ...]", given)) not in {2, 3}:
            raise InputError("validation must be (x, y), (x, y, lengths) or a Series")
        parts = cast("tuple[Any, ...]", given)
        labels = self._encode(parts[1])
        lengths = parts[2] if len(parts) == 3 else None
        try:
            # Numbers would be those of training instances.
            ids = [f"validation-{k}" for k in range(len(labels))]
            return make_series(parts[0], labels, lengths=lengths, missing=self.missing, ids=ids, like=train)
        except InputError as error:
            raise InputError(f"validation: {error}") from None

    def _take_names(self, train: Series) -> None:
        """Keep names, kind and scaling, and no instance."""
        self.series_ = train.part([])
        self.n_features_in_ = len(train.features)
        if all(name != f"f{k}" for k, name in enumerate(train.features)):
            self.feature_names_in_ = np.array(train.features, dtype=object)

    def _new_context(self) -> Context:
        series = self.series_
        return Context(
            len(series.steps),
            len(series.features),
            kappa=self.model_.kappa,
            schema=series.schema,
            lengths=self.instances_,
        )

    def _check_kind(self, kind: Kind) -> None:
        if kind not in self._kinds:
            other = "NAPRegressor" if kind == "regression" else "NAPClassifier"
            raise InputError(f"{type(self).__name__} cannot learn a {kind} task: use {other}")

    def _take_classes(self, train: Series) -> None:
        """Remember what classes are called."""

    def _encode_first(self, y: ArrayLike) -> tuple[np.ndarray, Kind]:
        """Turn the user's labels into numbers, and remember how."""
        raise NotImplementedError

    def _encode(self, y: ArrayLike) -> np.ndarray:
        """Turn the user's labels into numbers, as in training."""
        raise NotImplementedError

    # ---- reading

    def _fitted(self) -> FeatureNAP:
        if not hasattr(self, "model_"):
            raise NotFittedError(f"this {type(self).__name__} is not fitted yet: call fit, or load a saved one")
        return self.model_

    @property
    def device_(self) -> torch.device:
        """Where the network is."""
        return self._fitted().preference.device

    @property
    def kind_(self) -> Kind:
        """What is predicted: "binary", "multiclass", "multilabel" or "regression"."""
        return self._fitted().kind

    @property
    def units_(self) -> tuple[str, ...]:
        """Unit of each feature, "" where there is none."""
        self._fitted()
        return self.series_.units or ("",) * len(self.series_.features)

    def series(
        self,
        x: ArrayLike | Series,
        y: ArrayLike | None = None,
        *,
        lengths: ArrayLike | None = None,
        ids: Sequence[str] | None = None,
    ) -> Series:
        """Check arrays and standardise them as in training.

        Parameters
        ----------
        x : values in the user's units, ``(n, t, r)``; a Series is brought into the training's scaling
        y : labels as of :meth:`fit`
        lengths : real steps, ``(n,)``
        ids : of instances; None numbers them

        Raises
        ------
        InputError
            For another number of steps or features, labels that the training did not have, and all that :meth:`fit`
            refuses.
        """
        self._fitted()
        if isinstance(x, Series):
            if y is not None or lengths is not None or ids is not None:
                raise InputError("x is a Series: labels, lengths and ids are in it, give nothing else")
            return aligned(x.to("cpu"), self.series_)
        labels = None if y is None else self._encode(y)
        return make_series(x, labels, lengths=lengths, missing=self.missing, ids=ids, like=self.series_)

    def _read(self, x: ArrayLike | Series, lengths: ArrayLike | None) -> Series:
        return self.series(x, lengths=lengths).to(self.device_)

    def sampled(self, x: ArrayLike | Series, lengths: ArrayLike | None = None, *, samples: int = 0) -> Predicted:
        """Predict by draws of the latent and of dropout, the same draws for every context.

        Parameters
        ----------
        x, lengths : as of :meth:`series`
        samples : draws; 0 is the estimator's number

        Returns
        -------
        Samples on the CPU, of probabilities or of standardised targets.
        """
        model, series = self._fitted(), self._read(x, lengths)
        found = model.predict(series.x, series.lengths, samples=samples or int(self.samples), seed=int(self.seed))
        return Predicted(found.samples.cpu(), found.kind)

    @torch.no_grad()
    def logits(self, x: ArrayLike | Series, lengths: ArrayLike | None = None) -> Float[np.ndarray, "n c"]:
        """Return what contributions add up to: without draws, at the mean of the latent and without dropout.

        Parameters
        ----------
        x, lengths : as of :meth:`series`

        Returns
        -------
        Logits ``(n, c)``; of a regression, the prediction in the target's unit.
        """
        model, series = self._fitted(), self._read(x, lengths)
        parts = [model(series.x[at], series.lengths[at]).logits.cpu() for at in _slices(len(series))]
        found = torch.cat(parts)
        return (self.series_.scaling.raw_target(found) if self.kind_ == "regression" else found).numpy()

    @torch.no_grad()
    def contributions(self, x: ArrayLike | Series, lengths: ArrayLike | None = None) -> Contributions:
        """Divide predictions among cells: what each adds to the logit, exactly.

        Parameters
        ----------
        x, lengths : as of :meth:`series`

        Returns
        -------
        ``cells`` ``(n, t, r, c)`` and ``intercept`` ``(n, c)``, on the CPU, with ``cells.sum((1, 2)) + intercept``
        equal to :meth:`logits`; of a regression in the target's unit.
        """
        model, series = self._fitted(), self._read(x, lengths)
        found = [model.contributions(series.x[at], series.lengths[at]) for at in _slices(len(series))]
        cells = torch.cat([part.cells.cpu() for part in found])
        intercept = torch.cat([part.intercept.cpu() for part in found])
        if self.kind_ == "regression":
            scaling = self.series_.scaling
            cells, intercept = cells * scaling.target_deviation, scaling.raw_target(intercept)
        return Contributions(cells, intercept)

    def attention(self, x: ArrayLike | Series, lengths: ArrayLike | None = None) -> Attention:
        """Return how far steps and cells are attended to. What a cell does to the prediction is its contribution.

        Parameters
        ----------
        x, lengths : as of :meth:`series`
        """
        model, series = self._fitted(), self._read(x, lengths)
        parts = model.attend(series.x, series.lengths, samples=int(self.samples), seed=int(self.seed))
        return Attention(*(part.cpu() for part in parts))

    def rank(
        self,
        x: ArrayLike | Series | None = None,
        y: ArrayLike | None = None,
        *,
        lengths: ArrayLike | None = None,
        ids: Sequence[str] | None = None,
        cer: CER | None = None,
        among: Sequence[int] | None = None,
        seed: int | None = None,
    ) -> list[Ranked]:
        """Choose which instances, and which of their features, are worth a person's seconds.

        Parameters
        ----------
        x : instances to choose from; None is what was trained on
        y, lengths, ids : as of :meth:`series`; labels are needed to rank by influence or error
        cer : how to rank; None is by uncertainty, and features by counterfactual
        among : places of those that may be chosen; None is all
        seed : of draws; None is the estimator's

        Returns
        -------
        The most telling first. Their ids are known to :meth:`update` from now on.

        Raises
        ------
        InputError
            Without x after loading, for influence without validation series, or none to choose from.
        """
        model = self._fitted()
        pool = self._trained_on("give x, the instances to choose from") if x is None else None
        if pool is None:
            assert x is not None
            pool = self.series(x, y, lengths=lengths, ids=ids)
        self.know(pool)
        device = self.device_
        held_out = None if self.validation_ is None else self.validation_.to(device)
        return (cer or CER()).rank(
            model, pool.to(device), held_out, among=among, seed=int(self.seed if seed is None else seed)
        )

    def _trained_on(self, hint: str) -> Series:
        if self.train_ is None:
            raise InputError(f"a loaded estimator holds no training series: {hint}")
        return self.train_

    # ---- verdicts

    @property
    def context_hash(self) -> str:
        """Hash of all verdicts that stand, whatever their order, and of the features they are about."""
        self._fitted()
        return self.context_.digest

    def know(self, series: Series) -> None:
        """Let instances be annotated: their ids become known, and their lengths say which cells they have.

        Parameters
        ----------
        series : instances; those of the training, and those that were ranked, are known already
        """
        self._fitted()
        known = dict(zip(series.ids, series.lengths.tolist(), strict=True))
        self.instances_.update(known)
        if self.model_.context != "masks":
            self.pools_.insert(0, aligned(series.to("cpu"), self.series_))
        if hasattr(self, "context_"):
            self.context_.lengths.update(known)

    def annotated(self) -> Series | None:
        """Return the instances that verdicts are on, for models that read more of a context than its masks.

        Raises
        ------
        InputError
            For an instance whose series is not known.
        """
        context = self.context_
        if self._fitted().context == "masks" or not len(context):
            return None
        parts: list[Series] = []
        wanted = dict.fromkeys(instance for instance, _ in context.keys)
        for pool in self.pools_:
            at = [k for k, name in enumerate(pool.ids) if name in wanted]
            parts += [pool.part(at)] if at else []
            for k in at:
                del wanted[pool.ids[k]]
        if wanted:
            raise InputError(
                f"instance '{next(iter(wanted))}' is annotated, and context='{self.context}' reads its series: call"
                " know(series) with it first"
            )
        return Series.joined(parts)

    def _obey(self) -> None:
        people = self.annotated()
        self.model_.update(self.context_, None if people is None else people.to(self.device_))

    def annotations(self, *, who: str = "", round: int = 0) -> Annotations:  # noqa: A002
        """Return an empty list of verdicts that knows the names of features, steps and instances.

        Parameters
        ----------
        who : annotator of verdicts that name none
        round : of annotation
        """
        self._fitted()
        return Annotations(
            self.series_.features,
            steps=self.series_.steps,
            instances=tuple(self.instances_) or None,
            who=who,
            round=round,
            model=self.context_hash,
        )

    def update(self, annotations: Said, *, allow_empty: bool = False) -> Shift:
        """Obey further verdicts from now on. No parameter changes and no gradient is taken: milliseconds.

        Parameters
        ----------
        annotations : records (the last one of an instance, cell and annotator counts; records that undo take back what
            came before them in this list), a :class:`ial_nap.Context` made for the same features, or masks ``(k, t,
            r)`` of 1, 0 and -1
        allow_empty : accept an instance of which every cell is marked 0

        Returns
        -------
        What changed; :meth:`undo` takes all of it back.

        Raises
        ------
        InputError
            For an unknown instance, step or feature (the closest one is named), another verdict, masks of another
            shape, annotations made for another set of features, and an instance of which nothing would be left; the
            context is as it was then.

        Examples
        --------
        >>> import numpy as np
        >>> x = np.random.default_rng(0).normal(size=(60, 3, 2))
        >>> model = NAPClassifier(hidden=4, latent=2, epochs=1).fit(x, x[:, 0, 0] > 0, feature_names=["LDL", "ward"])
        >>> said = model.annotations(who="dr_a")
        >>> for step in range(3):
        ...     _ = said.add(17, step, "ward", 0)
        >>> model.update(said).cells
        ((0, 1), (1, 1), (2, 1))
        >>> bool((model.contributions(x).cells[:, :, 1] == 0).all())
        True
        >>> model.undo().verdicts
        3
        """
        return self._give(annotations, exactly=False, allow_empty=allow_empty)

    def replace(self, annotations: Said, *, allow_empty: bool = False) -> Shift:
        """Obey exactly these verdicts from now on, and none that came before.

        Parameters
        ----------
        annotations, allow_empty : as of :meth:`update`; none at all takes everything back

        Returns
        -------
        What changed; :meth:`undo` takes all of it back.

        Raises
        ------
        InputError
            As :meth:`update`.
        """
        return self._give(annotations, exactly=True, allow_empty=allow_empty)

    def _give(self, said: Said, *, exactly: bool, allow_empty: bool) -> Shift:
        self._fitted()
        context = self.context_
        if isinstance(said, Context):
            if said.schema and said.schema != context.schema:
                raise InputError(
                    f"the context was made for another set of features (schema {said.schema}, the model's is"
                    f" {context.schema}): annotate with the features the model was trained on, in their order"
                )
            keys, masks = said.keys, said.masks if len(said) else said.masks[:0]
        elif isinstance(said, Tensor | np.ndarray):
            keys, masks = (), torch.as_tensor(said)
        else:
            keys, masks = (), None
        if masks is None:
            shift = context.give(self._cells(said), exactly=exactly, allow_empty=allow_empty)  # pyright: ignore[reportArgumentType]
        else:
            masks = check_masks(masks, context.steps, context.features)
            fresh = [f"#{k}" for k in range(len(masks))] if exactly else context.new_names(len(masks))
            names = list(keys) or [(name, "") for name in fresh]
            k, t, d = (masks >= 0).nonzero().unbind(1)
            rows = zip(k.tolist(), t.tolist(), d.tolist(), masks[k, t, d].tolist(), strict=True)
            cells = [(*names[k], t, d, v) for k, t, d, v in rows]
            shift = context.give(cells, exactly=exactly, allow_empty=allow_empty)
        try:
            self._obey()
        except InputError:
            context.undo()
            raise
        return shift

    def _cells(self, annotations: Iterable[Annotation]) -> list[tuple[str, str, int, int, int]]:
        """Check names, and return instance, annotator, step, feature and verdict of what stands."""
        given = list(annotations)
        if any(one.undo for one in given):
            given = latest(given)
        steps, known = len(self.series_.steps), self.instances_
        columns = {name: d for d, name in enumerate(self.series_.features)}
        try:
            found = [(one.instance, one.annotator, one.step, columns[one.feature], one.verdict) for one in given]
        except KeyError:
            name = next(one.feature for one in given if one.feature not in columns)
            raise InputError(
                f"{_unknown('feature', name, self.series_.features)}; the annotations may have been made for another"
                " set of features"
            ) from None
        if given and max(one.step for one in given) >= steps:
            late = next(one for one in given if one.step >= steps)
            raise InputError(f"step {late.step} of '{late.instance}': there are {steps} steps, counted from 0")
        if known and (named := {one.instance for one in given} - known.keys()):
            # What is annotated already may be so again.
            named -= {instance for instance, _ in self.context_.keys}
        else:
            named = set[str]()
        if named:
            name = min(named)
            raise InputError(f"{_unknown('instance', name, tuple(known))}; know(series) lets others be annotated")
        return found

    def undo(self) -> Shift:
        """Take the last :meth:`update` or :meth:`replace` back: predictions are what they were, to the bit.

        Returns
        -------
        What changed.

        Raises
        ------
        InputError
            When there is nothing to undo.
        """
        self._fitted()
        shift = self.context_.undo()
        self._obey()
        return shift

    @contextmanager
    def trial(self, context: Context) -> Generator[None]:
        """Obey another context for a while, as to see what a verdict would do; then the present one again.

        Parameters
        ----------
        context : instead of the present one, which stays as it is with all its past

        Raises
        ------
        InputError
            For a context of other sizes, or made for another set of features.
        """
        self._fitted()
        kept, self.context_ = self.context_, context
        try:
            self._obey()
            yield
        finally:
            self.context_ = kept
            self._obey()

    def finetune(self, steps: int = 50, *, lr: float = 1e-3, series: Series | None = None) -> list[float]:
        """Take gradient steps on what makes attention, on what was annotated, as the paper's rounds do (spec 2.6).

        With ``protocol="paper"`` this is what makes verdicts count; otherwise it is rarely needed. It changes
        parameters, which :meth:`undo` does not bring back.

        Parameters
        ----------
        steps, lr : of Adam
        series : among which the annotated instances are, with labels; None is what was trained on

        Returns
        -------
        The loss at each step.

        Raises
        ------
        InputError
            When nothing is annotated, when none of what is annotated is among the series, or after loading without
            series.
        """
        model = self._fitted()
        if not len(self.context_):
            raise InputError("nothing is annotated yet: update first")
        pool = self._trained_on("give series") if series is None else aligned(series.to("cpu"), self.series_)
        annotated = {instance for instance, _ in self.context_.keys}
        places = [k for k, name in enumerate(pool.ids) if name in annotated]
        if not places:
            raise InputError("no annotated instance is among these series: give those that were annotated")
        with one_thread(self.device_.type == "cpu" and self.hidden <= 256):
            return finetune(
                model,
                pool.part(places).to(self.device_),
                self.context_,
                steps=steps,
                lr=lr,
                l2=float(self.l2),
                seed=int(self.seed),
            )

    # ---- scores

    def score_report(
        self, x: ArrayLike | Series, y: ArrayLike | None = None, *, lengths: ArrayLike | None = None
    ) -> ScoreReport:
        """Predict labelled instances and score them by all that fits the task.

        Parameters
        ----------
        x, y, lengths : as of :meth:`series`

        Raises
        ------
        InputError
            Without labels.
        """
        series = self.series(x, y, lengths=lengths)
        _ = series.targets
        predicted = self.sampled(series).mean.numpy()
        return ScoreReport(measure(series, predicted), predicted, series, self.context_hash)

    @staticmethod
    def compare(
        before: ScoreReport,
        after: ScoreReport,
        *,
        metric: str | None = None,
        draws: int = 1000,
        level: float = 0.95,
        seed: int = 0,
    ) -> Difference:
        """Compare two reports on the same instances, by a bootstrap that draws instances with both.

        Predictions of both use the same draws of latent and dropout, so that no noise of theirs is in the difference.

        Parameters
        ----------
        before, after : of :meth:`score_report`
        metric : one that fits the task; None is its main one
        draws, level, seed : of the bootstrap

        Raises
        ------
        InputError
            For reports on other instances, or a metric that does not fit.
        """
        one, two = before.series, after.series
        if one.ids != two.ids or not torch.equal(one.targets, two.targets):
            raise InputError("the two reports are on other instances: score the same ones before and after")
        return compare(one, before.predictions, after.predictions, metric=metric, draws=draws, level=level, seed=seed)

    # ---- saving

    def restore(
        self: _Self,
        model: FeatureNAP,
        series: Series,
        context: Context,
        history: Sequence[Epoch],
        annotated: Series | None = None,
    ) -> _Self:
        """Take a trained network over, as if it had been fitted here; training series are not known then.

        Parameters
        ----------
        model : trained
        series : names, kind, units and scaling of what it was trained on; instances in it are let go of
        context : what it obeys
        history : of its training
        annotated : instances that verdicts are on, for a model that reads more of a context than its masks

        Returns
        -------
        The estimator itself; of a classifier, ``classes_`` count from 0.

        Raises
        ------
        InputError
            For a network of other sizes or another kind of task.
        """
        self._check_kind(series.kind)
        if (model.steps, model.features, model.outputs) != (len(series.steps), len(series.features), series.outputs):
            raise InputError(
                f"the network is of {model.steps} steps, {model.features} features and {model.outputs} outputs, the"
                f" series of {len(series.steps)}, {len(series.features)} and {series.outputs}"
            )
        self._take_classes(series)
        self.model_, self.history_ = model, list(history)
        self.train_ = self.validation_ = None
        self._take_names(series)
        self.instances_, self.pools_ = {}, [] if annotated is None else [annotated]
        self.context_ = context
        self._obey()
        return self

    def save(self, path: str | Path) -> None:
        """Write the network, names, scaling and all verdicts to one safetensors file, atomically and without pickle.

        Parameters
        ----------
        path : file to write, e.g. ``model.safetensors``. Of the training series only names and scaling go into it; the
            ids of annotated instances are there with their verdicts.

        Raises
        ------
        InputError
            When the file cannot be written.
        """
        from ial_nap.saving import save

        save(cast("Any", self), path)

    @classmethod
    def load(cls: type[_Self], path: str | Path, *, device: str = "auto") -> _Self:
        """Read what :meth:`save` wrote.

        Parameters
        ----------
        path : the file
        device : where to, "auto", "cpu", "cuda" or "mps"

        Raises
        ------
        InputError
            For a file that is missing, damaged, of something else, or of the other kind of estimator.
        """
        from ial_nap.saving import load

        found = load(path, device=device)
        if not isinstance(found, cls):
            raise InputError(f"{path}: holds a {type(found).__name__}: load it with {type(found).__name__}.load")
        return found


def _unknown(what: str, name: str, known: Sequence[str]) -> str:
    try:
        find_name(name, known, what)
    except InputError as error:
        return str(error)
    raise AssertionError(name)


def _slices(count: int) -> list[slice]:
    return [slice(first, min(first + _ROWS, count)) for first in range(0, count, _ROWS)]


def _held_out(y: Shaped[np.ndarray, "n c"], seed: int, kind: Kind) -> Tensor:
    """Choose one of every five neighbours in y: a fifth of each class, or of each part of the range of a target."""
    n = len(y)
    random = np.random.default_rng(seed)
    order = np.lexsort((random.random(n), *y.T[::-1]))
    chosen = torch.zeros(n, dtype=torch.bool)
    blocks = n // 5
    chosen[torch.from_numpy(order[5 * np.arange(blocks) + random.integers(0, 5, blocks)])] = True
    if kind in {"binary", "multiclass"}:
        # A class must not be in the validation only.
        for value in np.unique(y):
            members = torch.from_numpy(np.flatnonzero(y[:, 0] == value))
            if chosen[members].all():
                chosen[members] = False
    elif kind == "multilabel":
        for column in y.T:
            left = column[~chosen.numpy()]
            if len(left) and (left == left[0]).all():
                chosen[torch.from_numpy(np.flatnonzero(column != left[0]))] = False
    return chosen


class NAPClassifier(ClassifierMixin, _NAP):
    """Classify multivariate time series with attention that people can correct (spec 2.6 and 6).

    Labels may be of two classes, of several, or several labels of 0 and 1 at once; what they are is read from y.

    Parameters
    ----------
    hidden : units of each recurrent layer
    latent : entries of the latent of a step; 0 obeys through the gate alone
    keep : probability of keeping what dropout may drop
    rnn : "gru" or "lstm"
    epochs : at most
    batch_size : instances of a gradient step
    lr : of Adam
    l2 : weight of half the squared weights
    patience : epochs without a better validation loss after which training stops
    samples : draws of a prediction
    hard : exclude a cell entirely where the preference is -0.5 or less: one verdict 0 that nobody contradicts, at
        kappa 1
    kappa : prior count of verdicts, above 0
    limit : most different masks that the latent path reads
    protocol : "episodic" trains with imagined annotators and obeys at once; "paper" trains as the release does, with
        one context in which nothing is known, and without a gate: it needs :meth:`finetune` to react
    context : what the latent path reads: "masks" alone; "full", values and labels of annotated instances too;
        "attentive", in which besides each instance weighs the masks of those like it
    missing : NaN is an "error", or a cell that is not observed ("mask") and reads as the mean
    device : "auto", "cpu", "cuda", "cuda:N" or "mps"
    seed : of all that is drawn

    Examples
    --------
    >>> import numpy as np
    >>> x = np.random.default_rng(0).normal(size=(80, 4, 3))
    >>> y = np.where(x[:, -1, 0] > 0, "ill", "well")
    >>> model = NAPClassifier(hidden=8, latent=2, epochs=3, seed=1).fit(x, y)
    >>> model.classes_.tolist(), model.predict_proba(x).shape
    (['ill', 'well'], (80, 2))
    >>> parts = model.contributions(x)
    >>> bool(np.allclose(parts.cells.sum((1, 2))[:, 0] + parts.intercept[:, 0], model.decision_function(x), atol=1e-5))
    True
    """

    _kinds = ("binary", "multiclass", "multilabel")

    classes_: Shaped[np.ndarray, " c"]

    def _take_classes(self, train: Series) -> None:
        self.classes_ = np.arange(2 if train.kind == "binary" else train.outputs)

    def _encode_first(self, y: ArrayLike) -> tuple[np.ndarray, Kind]:
        found = _labels(y)
        if found.ndim == 2:
            self.classes_ = np.arange(found.shape[1])
            return self._encode(found), "multilabel"
        classes = np.unique(found)
        if len(classes) < 2:
            raise InputError(f"every label is {classes.tolist()[0]!r}: there is nothing to learn from one class")
        if found.dtype.kind == "f" and (classes != np.round(classes)).any():
            raise InputError(f"y holds numbers such as {classes[0]:g} that are no classes: use NAPRegressor")
        self.classes_ = classes
        return self._encode(found), "binary" if len(classes) == 2 else "multiclass"

    def _encode(self, y: ArrayLike) -> np.ndarray:
        found = _labels(y)
        if found.ndim == 2:
            if found.shape[1] != len(self.classes_):
                raise InputError(f"y has {found.shape[1]} labels, the model was trained on {len(self.classes_)}")
            if found.dtype.kind not in "biuf" or not np.isin(found, (0, 1)).all():
                raise InputError("y of several labels must be 0 or 1")
            return found.astype(np.float64)
        known = {value: k for k, value in enumerate(self.classes_.tolist())}
        codes = [known.get(value, -1) for value in found.tolist()]
        if -1 in codes:
            value, hint = found.tolist()[codes.index(-1)], ", ".join(map(repr, self.classes_.tolist()[:8]))
            raise InputError(f"y[{codes.index(-1)}] = {value!r} is not a class of the training: {hint}")
        return np.array(codes, np.int64)

    def predict_proba(self, x: ArrayLike | Series, lengths: ArrayLike | None = None) -> Float[np.ndarray, "n c"]:
        """Return the probability of each class, the mean over draws.

        Parameters
        ----------
        x, lengths : as of :meth:`series`

        Returns
        -------
        ``(n, classes)`` in the order of ``classes_``, rows of which add up to 1; of several labels, of each label.
        """
        return self.predict_dist(x, lengths)[0]

    def predict_dist(
        self, x: ArrayLike | Series, lengths: ArrayLike | None = None
    ) -> tuple[Float[np.ndarray, "n c"], Float[np.ndarray, "n c"]]:
        """Return mean and standard deviation, over draws, of the probability of each class.

        Parameters
        ----------
        x, lengths : as of :meth:`series`

        Returns
        -------
        Both of the shape of :meth:`predict_proba`.
        """
        found = self.sampled(x, lengths)
        mean, spread = found.mean.numpy(), found.spread.numpy()
        if found.kind == "binary":
            return np.concatenate([1 - mean, mean], 1), np.concatenate([spread, spread], 1)
        return mean, spread

    def interval(
        self, x: ArrayLike | Series, level: float = 0.9, *, lengths: ArrayLike | None = None
    ) -> tuple[Float[np.ndarray, "n c"], Float[np.ndarray, "n c"]]:
        """Return bounds of the probability of each class, which hold a share of the draws.

        Parameters
        ----------
        x, lengths : as of :meth:`series`
        level : share, within 0 and 1

        Returns
        -------
        Low and high, both of the shape of :meth:`predict_proba`.

        Raises
        ------
        InputError
            For a level that is no share.
        """
        _check_level(level)
        found = self.sampled(x, lengths)
        low, high = (bound.numpy() for bound in found.interval(level))
        if found.kind == "binary":
            return np.concatenate([1 - high, low], 1), np.concatenate([1 - low, high], 1)
        return low, high

    def decision_function(self, x: ArrayLike | Series, lengths: ArrayLike | None = None) -> Float[np.ndarray, "n ..."]:
        """Return the logits without draws, to which contributions add up.

        Parameters
        ----------
        x, lengths : as of :meth:`series`

        Returns
        -------
        ``(n,)`` of two classes, else ``(n, c)``.
        """
        found = self.logits(x, lengths)
        return found[:, 0] if self.kind_ == "binary" else found

    def predict(self, x: ArrayLike | Series, lengths: ArrayLike | None = None) -> Shaped[np.ndarray, "n ..."]:
        """Return the likeliest class of each instance, or 0 and 1 of each label.

        Parameters
        ----------
        x, lengths : as of :meth:`series`

        Returns
        -------
        ``(n,)`` of ``classes_``; of several labels ``(n, c)``.
        """
        found = self.predict_proba(x, lengths)
        return (found > 0.5).astype(np.int64) if self.kind_ == "multilabel" else self.classes_[found.argmax(1)]

    def score(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, X: ArrayLike | Series, y: ArrayLike | None = None, *, lengths: ArrayLike | None = None
    ) -> float:
        """Return the accuracy; of several labels, the mean over labels.

        Parameters
        ----------
        X, y, lengths : as of :meth:`series`
        """
        return self.score_report(X, y, lengths=lengths).metrics["accuracy"]


class NAPRegressor(RegressorMixin, _NAP):
    """Predict a number from a multivariate time series, with attention that people can correct (spec 2.6 and 6).

    Targets are standardised for training; all that is returned is in the target's unit.

    Parameters
    ----------
    hidden, latent, keep, rnn, epochs, batch_size, lr, l2, patience, samples, hard, kappa, limit, protocol, context,
        missing, device, seed : as of :class:`NAPClassifier`

    Examples
    --------
    >>> import numpy as np
    >>> x = np.random.default_rng(0).normal(size=(80, 4, 3))
    >>> model = NAPRegressor(hidden=8, latent=2, epochs=2, samples=5).fit(x, 50 + 10 * x[:, -1, 0])
    >>> mean, std = model.predict_dist(x)
    >>> mean.shape, bool(40 < mean.mean() < 60), bool((std > 0).all())
    ((80,), True, True)
    """

    _kinds = ("regression",)

    def _encode_first(self, y: ArrayLike) -> tuple[np.ndarray, Kind]:
        return self._encode(y), "regression"

    def _encode(self, y: ArrayLike) -> np.ndarray:
        found = _labels(y)
        if found.ndim != 1 or found.dtype.kind not in "biuf":
            raise InputError(
                f"y of a regression must be numbers (n,), got shape {found.shape} of {found.dtype}: classes are for"
                " NAPClassifier"
            )
        return found.astype(np.float64)

    def predict_dist(
        self, x: ArrayLike | Series, lengths: ArrayLike | None = None
    ) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """Return mean and standard deviation, over draws, of the prediction, in the target's unit.

        The deviation is of what the model does not know; that of the target itself is not modelled.

        Parameters
        ----------
        x, lengths : as of :meth:`series`

        Returns
        -------
        Both ``(n,)``.
        """
        found, scaling = self.sampled(x, lengths), self.series_.scaling
        mean = scaling.raw_target(found.mean[:, 0].double())
        return mean.numpy(), (found.spread[:, 0].double() * scaling.target_deviation).numpy()

    def predict(self, x: ArrayLike | Series, lengths: ArrayLike | None = None) -> Float[np.ndarray, " n"]:
        """Return the mean prediction of each instance, in the target's unit.

        Parameters
        ----------
        x, lengths : as of :meth:`series`
        """
        return self.predict_dist(x, lengths)[0]

    def interval(
        self, x: ArrayLike | Series, level: float = 0.9, *, lengths: ArrayLike | None = None
    ) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """Return bounds that hold a share of the draws, in the target's unit.

        Parameters
        ----------
        x, lengths : as of :meth:`series`
        level : share, within 0 and 1

        Raises
        ------
        InputError
            For a level that is no share.
        """
        _check_level(level)
        low, high = (bound[:, 0].double() for bound in self.sampled(x, lengths).interval(level))
        scaling = self.series_.scaling
        return scaling.raw_target(low).numpy(), scaling.raw_target(high).numpy()

    def score(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, X: ArrayLike | Series, y: ArrayLike | None = None, *, lengths: ArrayLike | None = None
    ) -> float:
        """Return the share of variance explained, R squared.

        Parameters
        ----------
        X, y, lengths : as of :meth:`series`
        """
        from sklearn.metrics import r2_score

        report = self.score_report(X, y, lengths=lengths)
        return float(r2_score(report.series.targets.numpy(), report.predictions[:, 0]))


def _labels(y: ArrayLike) -> np.ndarray:
    """Return labels as an array ``(n,)`` or ``(n, c)`` of one type."""
    found = y.detach().cpu().numpy() if isinstance(y, Tensor) else np.asarray(y)
    if found.ndim == 2 and found.shape[1] == 1:
        found = found[:, 0]
    if found.ndim not in {1, 2} or not len(found):
        raise InputError(f"y has shape {found.shape}: give (n,) or (n, labels)")
    if found.dtype.kind == "f" and not np.isfinite(found).all():
        raise InputError(f"y[{int(np.argwhere(~np.isfinite(found))[0, 0])}] is not finite: leave unlabelled ones out")
    if found.dtype.kind == "O":
        values = found.ravel().tolist()
        if all(isinstance(value, str) for value in values):
            return found.astype(str)
        odd = next((k for k, value in enumerate(values) if not isinstance(value, int | float | bool)), None)
        if odd is not None:
            raise InputError(f"y[{odd}] = {values[odd]!r}: labels must be all text, or all numbers")
        return _labels(found.astype(np.float64))
    return found


def _check_whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise InputError(f"{name} must be a whole number of {least} or more, got {value!r}")


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise InputError(f"level must be within 0 and 1, got {level}")
