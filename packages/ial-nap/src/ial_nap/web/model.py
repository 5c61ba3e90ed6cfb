"""A trained attention model on the annotation page: what to look at, what the model makes of it, what verdicts do."""

from __future__ import annotations

import copy
import sys
import threading
import webbrowser
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ial_nap.annotations import Annotation, latest
from ial_nap.choices import METRIC_WORDS
from ial_nap.context import Context
from ial_nap.influence import Influence, influence_on
from ial_nap.metrics import METRICS
from ial_nap.nap import FeatureNAP, Predicted, probabilities
from ial_nap.ranking import CER
from ial_nap.series import Kind, Series, find_name
from ial_nap.store import AnnotationStore
from ial_nap.web.workbench import QueueItem, Score, View
from shared_core.errors import InputError

if TYPE_CHECKING:
    from ial_nap.series import ArrayLike

__all__ = ["ModelWorkbench", "serve"]

# Draws times steps times instances that a ranking reads, about a tenth of a second on short series.
_BUDGET = 60_000


class _Fitted(Protocol):
    """What has a trained model: an estimator of this package."""

    @property
    def model_(self) -> FeatureNAP: ...


class _Estimator(_Fitted, Protocol):
    """What :func:`serve` asks of an estimator besides."""

    @property
    def context_(self) -> Context: ...

    def know(self, series: Series) -> None: ...

    def replace(self, annotations: Context, *, allow_empty: bool = False) -> object: ...

    def series(
        self,
        x: ArrayLike,
        y: ArrayLike | None = None,
        *,
        lengths: ArrayLike | None = None,
        ids: Sequence[str] | None = None,
    ) -> Series: ...


class Resampled:
    """A score on resampled instances, always the same resamples, all of them at once.

    Parameters
    ----------
    series : with labels
    draws : resamples
    seed : of them

    Raises
    ------
    InputError
        For series without labels.

    Examples
    --------
    >>> from ial_nap.toys import shift_task
    >>> series = shift_task(50, shift=0.0, seed=0)
    >>> best = series.targets.numpy().reshape(-1, 1)
    >>> Resampled(series, draws=3)(best)
    (1.0, array([1., 1., 1.]))
    """

    def __init__(self, series: Series, *, draws: int = 300, seed: int = 0) -> None:
        self.kind: Kind = series.kind
        self.metric = next(metric for metric in METRICS.values() if series.kind in metric.kinds)
        scaling = series.scaling
        self._y = series.targets.double().cpu().numpy().reshape(len(series), -1)
        self._scale = scaling.target_deviation if series.kind == "regression" else 1.0
        n = len(series)
        random = np.random.default_rng(seed)
        found = [np.bincount(random.integers(0, n, n), minlength=n) for _ in range(draws)]
        # The first row is all instances once: the score itself.
        self._counts = np.asfortranarray(np.stack([np.ones(n, np.int64), *found]), np.float64)

    def __call__(self, predicted: Float[np.ndarray, "n c"]) -> tuple[float, Float[np.ndarray, " draws"]]:
        """Return the score of predictions, and that of each resample; not a number where it has none.

        Parameters
        ----------
        predicted : probabilities, or standardised predictions of a regression
        """
        y, p = self._y, np.asarray(predicted, np.float64)
        if self.kind == "multiclass":
            found = self._mean((p.argmax(1) == y[:, 0]).astype(np.float64))
        elif self.kind == "regression":
            found = self._mean(self._scale * np.abs(p - y).mean(1))
        else:
            with np.errstate(invalid="ignore"):
                areas = np.stack([self._area(a, b) for a, b in zip(y.T, p.T, strict=True)])
            there = np.isfinite(areas)
            found = np.where(there, areas, 0.0).sum(0) / np.where(there.any(0), there.sum(0), np.nan)
        return float(found[0]), found[1:]

    def _mean(self, values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " draws1"]:
        return self._counts @ values / self._counts.sum(1)

    def _area(self, y: Float[np.ndarray, " n"], p: Float[np.ndarray, " n"]) -> Float[np.ndarray, " draws1"]:
        """Return the area under the ROC curve as the share of pairs in order, ties by half."""
        up, down = np.flatnonzero(y == 1), np.flatnonzero(y != 1)
        down = down[np.argsort(p[down], kind="stable")]
        above, below = self._counts.T[up], self._counts.T[down]
        # How many of the lower label have a prediction below the k-th lowest of them, in each resample.
        fewer = np.vstack([np.zeros(len(self._counts)), below.cumsum(0)])
        left, right = (np.searchsorted(p[down], p[up], side) for side in ("left", "right"))
        wins = 0.5 * np.einsum("nd,nd->d", above, fewer[left] + fewer[right])
        return wins / (above.sum(0) * fewer[-1])


class ModelWorkbench:
    """A workbench over a trained :class:`ial_nap.FeatureNAP`: every number is a forward pass of the model.

    Draws of the latent and of dropout are the same before and after a verdict, so that predictions differ by verdicts
    alone. The score is that of the mean latent without dropout, which draws nothing. The model itself is told what
    stands: predictions of the estimator move with the page.

    Parameters
    ----------
    estimator : fitted, with its ``model_``, or such a model
    pool : instances to annotate, standardised as in training
    validation : instances with labels, to score on
    cer : how the queue is ranked
    train : instances that influence is measured against; None is the pool, which must then have labels
    samples : draws for the prediction of an instance
    output : class or label that a view is about unless it asks for another; None is the likeliest class
    outputs : names of classes or labels; None numbers them
    units : one per feature; None is the estimator's, or none
    base : verdicts that stand under all others and that the page does not know, as of instances not in the pool
    candidates : instances of the pool that are ranked, drawn anew for every state of the model; None is as many as a
        person waits for
    draws : resamples of the score's interval

    Raises
    ------
    InputError
        For series or verdicts of other sizes than the model's, and validation instances without labels.

    Examples
    --------
    >>> from ial_nap.toys import shift_task
    >>> pool = shift_task(40, shift=1.2, seed=0)
    >>> bench = ModelWorkbench(FeatureNAP.of(pool), pool, shift_task(60, shift=0.0, seed=1, like=pool))
    >>> item = bench.queue(3)[0]
    >>> cells = [(step, 8) for step in range(4)]
    >>> bench.update([Annotation(item.instance, step, "f8", 0) for step, _ in cells])
    >>> bool(bench.view(item.instance).contributions[:, 8].any())
    False
    """

    def __init__(
        self,
        estimator: _Fitted | FeatureNAP,
        pool: Series,
        validation: Series,
        *,
        cer: CER | None = None,
        train: Series | None = None,
        samples: int = 30,
        output: int | None = None,
        outputs: Sequence[str] | None = None,
        units: Sequence[str] | None = None,
        base: Context | None = None,
        candidates: int | None = None,
        draws: int = 300,
    ) -> None:
        self.model = estimator if isinstance(estimator, FeatureNAP) else estimator.model_
        for name, series in (("pool", pool), ("validation", validation), ("train", train or pool)):
            t, r = len(series.steps), len(series.features)
            if (t, r) != (self.model.steps, self.model.features):
                raise InputError(
                    f"{name}: of {t} steps and {r} features, the model of {self.model.steps} and"
                    f" {self.model.features}; make it like the training series"
                )
        if samples < 2:
            raise InputError(f"samples: an interval needs 2 or more, got {samples}")
        self.pool, self.validation, self.train = pool, validation, pool if train is None else train
        self.cer = cer or CER()
        self.samples = samples
        named = tuple(units or getattr(estimator, "units_", None) or pool.units or ("",) * self.model.features)
        if len(named) != self.model.features:
            raise InputError(f"units: {len(named)} for {self.model.features} features; give one each, empty for none")
        self._units = named
        self._outputs = self._named(outputs, getattr(estimator, "classes_", None))
        if output is not None and not 0 <= output < len(self._outputs):
            raise InputError(f"output {output}: there are {len(self._outputs)}, counted from 0")
        self._output = output
        self._places = {name: place for place, name in enumerate(pool.ids)}
        self._columns = {name: place for place, name in enumerate(pool.features)}
        self._candidates = candidates or max(100, _BUDGET // (self.cer.samples * len(pool.steps)))
        self._measure = Resampled(validation, draws=draws)
        self._lock = threading.Lock()
        self._base = {} if base is None else dict(zip(base.keys, base.masks.numpy(), strict=False))
        self._said: dict[tuple[str, int, str, str], int] = {}
        self._masks: dict[tuple[str, str], np.ndarray] = {}
        self._views: dict[tuple[str, int | None], View] = {}
        self._scores: dict[str, tuple[float, float, float, tuple[float, ...]]] = {}
        self._ranked: tuple[str, Tensor, Tensor] | None = None
        self.context = Context(self.model.steps, self.model.features, kappa=self.model.kappa, schema=pool.schema)
        self._before: float | None = None
        self._obey()
        self._before = self.score().value

    def _named(self, outputs: Sequence[str] | None, classes: np.ndarray | None) -> tuple[str, ...]:
        count = self.pool.outputs
        if outputs is None:
            known = [str(one) for one in (range(count) if classes is None else classes.tolist())]
            if count > 1:
                what = "label" if self.kind == "multilabel" else "class"
                return tuple(one if not one.replace(".", "").isdigit() else f"{what} {one}" for one in known)
            # A class that has a name of its own; 1 and True have none.
            named = known[-1] not in {"0", "1", "1.0", "True"} and self.kind == "binary"
            return (f"Probability of {known[-1]}",) if named else ("Prediction",)
        if len(outputs) != count:
            raise InputError(f"outputs: {len(outputs)} names for {count}; give one each")
        return tuple(outputs)

    # ---- names

    @property
    def kind(self) -> Kind:
        """What is predicted."""
        return self.pool.kind

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of classes or labels, or of what is predicted."""
        return self._outputs

    @property
    def features(self) -> tuple[str, ...]:
        """Names, r of them."""
        return self.pool.features

    @property
    def units(self) -> tuple[str, ...]:
        """One per feature."""
        return self._units

    @property
    def steps(self) -> tuple[str, ...]:
        """Names of the time steps."""
        return self.pool.steps

    def _place(self, instance: str) -> int:
        place = self._places.get(instance)
        return find_name(instance, self.pool.ids, "instance") if place is None else place

    # ---- verdicts

    def update(self, annotations: Sequence[Annotation]) -> None:
        """Obey exactly these verdicts, and none of earlier calls; only masks that change are made anew.

        Parameters
        ----------
        annotations : all that stand, in any order; one per instance, step, feature and annotator counts, the last

        Raises
        ------
        InputError
            For an instance of which one annotator rules out every cell that has a value, and steps that are not there.
            Nothing is obeyed then that was not before.
        UnknownKeyError
            For an instance or a feature that is not there.
        """
        standing = latest(annotations) if any(one.undo for one in annotations) else annotations
        said = {one.key: one.verdict for one in standing if one.verdict >= 0}
        moved = dict(said.items() ^ self._said.items())
        masks: dict[tuple[str, str], np.ndarray] = {}
        for instance, step, feature, annotator in moved:
            pair = instance, annotator
            if pair not in masks:
                self._place(instance)
                kept = self._masks.get(pair)
                masks[pair] = np.full(self._shape, -1, np.int8) if kept is None else kept.copy()
            if feature not in self._columns:
                find_name(feature, self.features, "feature")
            if step >= len(self.steps):
                raise InputError(f"step {step} of '{instance}': there are {len(self.steps)} steps, counted from 0")
            masks[pair][step, self._columns[feature]] = said.get((instance, step, feature, annotator), -1)
        for pair, mask in masks.items():
            self._check(pair, mask)
        before = self.score().value
        with self._lock:
            self._said = said
            for pair, mask in masks.items():
                if (mask >= 0).any():
                    self._masks[pair] = mask
                else:
                    self._masks.pop(pair, None)
            self._obey()
            self._before = before

    @property
    def _shape(self) -> tuple[int, int]:
        return len(self.steps), len(self.features)

    def _check(self, pair: tuple[str, str], mask: np.ndarray) -> None:
        place = self._place(pair[0])
        cells = self.pool.observed[place].cpu().numpy()
        if not cells.any():
            cells = np.broadcast_to(np.arange(len(self.steps))[:, None] < int(self.pool.lengths[place]), mask.shape)
        if (mask[cells] == 0).all():
            who = f" by '{pair[1]}'" if pair[1] else ""
            raise InputError(
                f"instance '{pair[0]}': all its {int(cells.sum())} cells are ruled out{who}, nothing would be left to"
                " attend to; leave one"
            )

    def _obey(self) -> None:
        """Tell the model what stands, in an order of its own: that in which things were said must not matter."""
        together = {**self._base, **self._masks}
        pairs = sorted(together)
        context = Context(self.model.steps, self.model.features, kappa=self.model.kappa, schema=self.pool.schema)
        if pairs:
            context.add(
                torch.from_numpy(np.stack([together[pair] for pair in pairs])),
                ids=[instance for instance, _ in pairs],
                annotators=[annotator for _, annotator in pairs],
                allow_empty=True,
            )
            context.forget_past()
        self.context = context
        self._digest = context.digest
        self.model.update(context, self.pool)
        self._views.clear()

    # ---- what the model makes of it

    def _likeliest(self, output: int | None, mean: Float[Tensor, " c"]) -> int:
        chosen = self._output if output is None else output
        return int(mean.argmax()) if chosen is None else chosen

    def _predicted(self, predicted: Predicted, output: int) -> tuple[float, float, float]:
        low, high = predicted.interval(0.95)
        found = torch.stack([predicted.mean[0, output], low[0, output], high[0, output]])
        if self.kind == "regression":
            found = self.pool.scaling.raw_target(found)
        middle, least, most = found.tolist()
        return middle, least, most

    @torch.no_grad()
    def view(self, instance: str, output: int | None = None) -> View:
        """Return what the model makes of an instance now.

        Contributions are in logits, or in the target's unit, at the mean of the latent, where they add up exactly;
        their uncertainty is over draws. Attention is ``alpha_t |beta_td| g_td``, g being how far a cell's gate is open.

        Parameters
        ----------
        instance : its id
        output : class or label; None is the one given to the workbench, or the likeliest

        Raises
        ------
        UnknownKeyError
            For an instance that is not there.
        """
        key = instance, output
        if key in self._views:
            return self._views[key]
        place = self._place(instance)
        model, one = self.model, self.pool.part([place]).to(self.model.preference.device)
        predicted = model.predict(one.x, one.lengths, samples=self.samples)
        chosen = self._likeliest(output, predicted.mean[0])
        read = model.read(one.x, one.lengths, model.condition(), hard=model.hard)
        parts = model.contributions(one.x, one.lengths).cells[0, :, :, chosen]
        _, variance = model.spread_of_contributions(one.x, one.lengths, samples=self.samples)
        scale = self.pool.scaling.target_deviation if self.kind == "regression" else 1.0
        observed = one.observed[0].cpu().numpy()
        raw, scaling = one.scaling.raw(one.x[0]), one.scaling
        # Standardised and back, a 0 is no longer quite one.
        noise = raw.abs() < 1e-6 * (scaling.mean.abs() + scaling.deviation)
        values = torch.where(one.observed[0], raw.masked_fill(noise, 0.0), torch.nan)
        found = View(
            values.cpu().numpy(),
            observed,
            (scale * parts).cpu().numpy(),
            (read.alpha[0].unsqueeze(1) * read.beta[0].abs() * read.gate[0]).cpu().numpy(),
            (scale * variance[0, :, :, chosen].sqrt()).cpu().numpy(),
            *self._predicted(predicted, chosen),
            label=self._label(place, chosen),
            output=chosen,
            chances=tuple(predicted.mean[0].tolist()) if self.pool.outputs > 1 else (),
            length=int(one.lengths[0]),
        )
        self._views[key] = self._views[instance, chosen] = found
        return found

    def _label(self, place: int, output: int) -> float | None:
        if self.pool.y is None:
            return None
        y = self.pool.y[place]
        if self.kind == "regression":
            y = self.pool.scaling.raw_target(y)
        return float(y[output] if y.ndim else y)

    @torch.no_grad()
    def what_if(
        self, instance: str, cells: Sequence[tuple[int, int]], output: int | None = None
    ) -> tuple[float, float, float]:
        """Return prediction, low and high with the gates of some cells shut for this instance alone.

        Parameters
        ----------
        instance : its id
        cells : step and feature of each
        output : class or label; see `view`

        Raises
        ------
        UnknownKeyError
            For an instance that is not there.
        """
        one = self.pool.part([self._place(instance)]).to(self.model.preference.device)
        # Of several classes, the one that is likeliest as it is.
        chosen = self.view(instance, output).output
        x = one.x.clone()
        for step, feature in cells:
            x[0, step, feature] = 0.0
        return self._predicted(self.model.predict(x, one.lengths, samples=self.samples), chosen)

    @torch.no_grad()
    def score(self) -> Score:
        """Return how good the model is on the validation instances, with an interval over resamples of them."""
        found = self._scores.get(self._digest)
        if found is None:
            held = self.validation.to(self.model.preference.device)
            predicted = probabilities(self.model(held.x, held.lengths).logits, held.kind).cpu().numpy()
            value, draws = self._measure(predicted)
            there = draws[np.isfinite(draws)]
            low, high = np.quantile(there, [0.025, 0.975]).tolist() if len(there) else (np.nan, np.nan)
            found = value, low, high, tuple(draws.tolist())
            while len(self._scores) >= 64:
                del self._scores[next(iter(self._scores))]
            self._scores[self._digest] = found
        value, low, high, draws = found
        metric = self._measure.metric
        before = value if self._before is None else self._before
        return Score(METRIC_WORDS.get(metric.name, metric.name), metric.better, value, low, high, before, draws)

    # ---- the queue

    def queue(self, count: int, skip: Collection[str] = ()) -> list[QueueItem]:
        """Rank instances and their features under the model as it is, by the workbench's `CER`.

        Parameters
        ----------
        count : how many at most
        skip : ids of instances that come last, as those judged before
        """
        with self._lock:
            # Others go on telling the model things; what is ranked is the model of now.
            model, digest, ranked = copy.deepcopy(self.model), self._digest, self._ranked
        device = model.preference.device
        if ranked is None or ranked[0] != digest:
            among = torch.arange(len(self.pool))
            if len(among) > self._candidates:
                drawn = torch.randperm(len(among), generator=torch.Generator().manual_seed(int(digest, 16) % 2**62))
                among = drawn[: self._candidates].sort().values
            influence = self._influence(model)
            scores = self.cer.instance_scores(model, self.pool.part(among).to(device), influence).cpu()
            ranked = digest, among, scores
            with self._lock:
                self._ranked = ranked
        else:
            influence = self._influence(model) if self.cer.feature == "influence" else None
        _, among, scores = ranked
        late = torch.tensor([self.pool.ids[place] in skip for place in among.tolist()])
        order = scores.argsort(descending=True, stable=True)
        order = torch.cat([order[~late[order]], order[late[order]]])[:count]
        chosen = self.pool.part(among[order]).to(device)
        rows = self.cer.feature_scores(model, chosen, influence).amax(1).cpu()
        predicted = model.predict(chosen.x, chosen.lengths, samples=self.samples)
        found: list[QueueItem] = []
        for k, (instance, score) in enumerate(zip(chosen.ids, scores[order].tolist(), strict=True)):
            best = rows[k].argsort(descending=True, stable=True)[: self.cer.f].tolist()
            names = tuple(self.features[d] for d in best)
            found.append(QueueItem(instance, self._reason(predicted, k, names[0]), score, names))
        return found

    def _influence(self, model: FeatureNAP) -> Influence | None:
        if "influence" not in {self.cer.instance, self.cer.feature}:
            return None
        return influence_on(model, self.train, self.validation, scope=self.cer.scope, worst=self.cer.worst)

    def _reason(self, predicted: Predicted, k: int, first: str) -> str:
        mean, spread = predicted.mean[k].cpu(), predicted.spread[k].cpu()
        output = int(mean.argmax()) if self.kind == "multiclass" else int(spread.argmax())
        value, doubt = mean[output], 1.96 * spread[output]
        if self.kind == "regression":
            value, doubt = self.pool.scaling.raw_target(value), doubt * self.pool.scaling.target_deviation
        shown = f"{float(value):.3g}" if self.kind == "regression" else f"{float(value):.2f}"
        name = f"{self._outputs[output]} " if len(self._outputs) > 1 else ""
        around = f"{float(doubt):.2g}" if self.kind == "regression" else f"{float(doubt):.2f}"
        harmful = "validation would be better without it" if self.cer.order == "harmful" else "it moves validation most"
        second = ""
        if self.kind == "multiclass":
            runner = mean.argsort(descending=True)[1]
            second = f" or {self._outputs[int(runner)]} {float(mean[runner]):.2f}"
        why = {
            "uncertainty": f"uncertain: {name}{shown} ± {around}",
            "influence": harmful,
            "error": "the prediction is far off",
            "entropy": f"undecided: {name}{shown}{second}",
            "margin": f"a close call: {name}{shown}{second}",
            "random": "drawn at random",
        }[self.cer.instance]
        by = {
            "counterfactual": f"{first} moves it most",
            "uncertainty": f"{first} varies most",
            "influence": f"{first} matters most to validation",
            "random": "",
        }[self.cer.feature]
        return f"{why}; {by}" if by else why


def _say(links: dict[str, str]) -> None:
    sys.stdout.write("".join(f"{name}: {link}\n" for name, link in links.items()))
    sys.stdout.flush()


def serve(
    estimator: _Estimator,
    x: ArrayLike | Series,
    y: ArrayLike | None = None,
    *,
    lengths: ArrayLike | None = None,
    ids: Sequence[str] | None = None,
    validation: Series | tuple[ArrayLike, ...] | None = None,
    outputs: Sequence[str] | None = None,
    units: Sequence[str] | None = None,
    store: str | Path = "verdicts.db",
    annotators: Sequence[str] = ("you",),
    cer: CER | None = None,
    samples: int = 30,
    port: int = 8765,
    host: str = "127.0.0.1",
    hosts: Iterable[str] = (),
    open_browser: bool = True,
    announce: Callable[[dict[str, str]], None] = _say,
) -> list[Annotation]:
    """Open the annotation page for an estimator, and obey what people say on it, until interrupted.

    Verdicts the estimator holds already, and that are not from this store, stay under those of the page.

    Parameters
    ----------
    estimator : fitted; afterwards it obeys what was said, and its ``undo`` takes all of that back
    x, y, lengths, ids : instances to annotate, as for its ``fit``: arrays ``(n, t, r)``, ``(n,)``, ``(n,)``, and
        names; or a ready ``Series``. The test split has no place here: choosing by it leaks
    validation : arrays ``(x, y)`` or ``(x, y, lengths)``, or ``Series``, to score on; None is what was held out in
        ``fit``
    outputs, units : names of classes, units of features; see `ModelWorkbench`
    store : file of verdicts, made where there is none; one that is there is gone on with
    annotators : who may come in, each by a link of their own
    cer : how the queue is ranked, and of how many instances
    samples : draws for the prediction of an instance
    port, host, hosts : see :func:`ial_nap.web.app.serve`
    open_browser : show the page of the first annotator
    announce : called with each annotator's link once the page is there; by default it writes them out

    Returns
    -------
    The verdicts that stand.

    Raises
    ------
    InputError
        Without validation instances, for a store of other features, and see :func:`ial_nap.web.app.serve`.
    """
    from ial_nap.web.app import serve as serve_page

    pool = x if isinstance(x, Series) else estimator.series(x, y, lengths=lengths, ids=ids)
    held = getattr(estimator, "validation_", None) if validation is None else validation
    if held is None:
        raise InputError("validation: this estimator has no instances held out any more; give validation=(x, y)")
    if not isinstance(held, Series):
        held = estimator.series(held[0], held[1], lengths=held[2] if len(held) > 2 else None)
    cer = cer or CER()

    def opened(links: dict[str, str]) -> None:
        announce(links)
        if open_browser:
            # Some browsers only return when they are closed.
            threading.Thread(target=webbrowser.open, args=(next(iter(links.values())),), daemon=True).start()

    named = tuple(units or getattr(estimator, "units_", None) or pool.units or ("",) * len(pool.features))
    with AnnotationStore(store, pool.features, len(pool.steps), units=named) as kept:
        from_here = {(one.instance, one.annotator) for one in kept.log()}
        told = estimator.context_
        other = [k for k, key in enumerate(told.keys) if key not in from_here]
        base = Context(told.steps, told.features, kappa=told.kappa, schema=told.schema)
        if other:
            keys = [told.keys[k] for k in other]
            base.add(
                told.masks[other],
                ids=[one for one, _ in keys],
                annotators=[who for _, who in keys],
                allow_empty=True,
            )
        bench = ModelWorkbench(estimator, pool, held, cer=cer, samples=samples, outputs=outputs, units=named, base=base)
        try:
            serve_page(bench, kept, annotators, host=host, port=port, hosts=hosts, count=cer.k, announce=opened)
        except KeyboardInterrupt:
            pass
        finally:
            estimator.know(pool)
            estimator.replace(bench.context, allow_empty=True)
        return kept.standing()
