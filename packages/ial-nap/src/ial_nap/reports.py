"""What can be shown of a fitted estimator, each with numbers that can be checked.

That explanations are faithful and stable, that what verdicts exclude is out, whom a verdict moved, which verdict would
be worth the most, and what being correctable costs.

Attention is no explanation by itself (Jain and Wallace, arXiv:1902.10186): deletion and insertion curves (Petsiuk et
al., arXiv:1806.07421) and the agreement of seeds say how far contributions are (spec 10 and 11).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.integrate import trapezoid
from scipy.stats import rankdata
from torch import Tensor

from ial_nap.attention import Retain
from ial_nap.estimator import NAPClassifier, NAPRegressor
from ial_nap.nap import probabilities
from ial_nap.resampling import Difference, compare
from ial_nap.series import ArrayLike, Series
from ial_nap.training import Plain, Training, losses
from shared_core.device import one_thread
from shared_core.errors import InputError

__all__ = [
    "Certificate",
    "Faithfulness",
    "Moved",
    "Stability",
    "Worth",
    "certificate",
    "certify",
    "curves",
    "faithfulness",
    "stability",
    "tax",
    "value_of_information",
    "who_moved",
]

Estimator: TypeAlias = "NAPClassifier | NAPRegressor"

_ROWS = 8192


# ---- are explanations faithful?


@dataclass(frozen=True, eq=False)
class Faithfulness:
    """What becomes of a prediction as cells are taken away, and as they are given, in an order and in random ones.

    Predictions are logits of the predicted outcome (in the direction in which it was predicted), mean over instances.

    Parameters
    ----------
    shares : of cells taken or given, from 0 to 1, ``(s,)``
    deletion, insertion : in the order that an explanation gives, ``(s,)``
    random_deletion, random_insertion : mean over random orders, ``(s,)``
    """

    shares: Float[np.ndarray, " s"]
    deletion: Float[np.ndarray, " s"]
    insertion: Float[np.ndarray, " s"]
    random_deletion: Float[np.ndarray, " s"]
    random_insertion: Float[np.ndarray, " s"]

    @property
    def deletion_gain(self) -> float:
        """Area by which the prediction falls faster than in random order; above 0 for a faithful explanation."""
        return float(trapezoid(self.random_deletion - self.deletion, self.shares))

    @property
    def insertion_gain(self) -> float:
        """Area by which the prediction rises faster than in random order; above 0 for a faithful explanation."""
        return float(trapezoid(self.insertion - self.random_insertion, self.shares))


@torch.no_grad()
def curves(
    score: Callable[[Tensor, Tensor], Tensor],
    x: Float[Tensor, "n t r"],
    inside: Bool[Tensor, "n t r"],
    worth: Float[Tensor, "n t r"],
    shares: Sequence[float],
) -> tuple[Float[np.ndarray, " s"], Float[np.ndarray, " s"]]:
    """Return mean scores as the cells of most worth are set to 0, and as they are put back into nothing.

    Parameters
    ----------
    score : maps values ``(b, t, r)`` and the instance of each ``(b,)`` to a score ``(b,)``
    x : standardised values
    inside : cells that are real; no other is touched
    worth : by which cells are ordered, the most first
    shares : of each instance's real cells

    Returns
    -------
    The deletion curve and the insertion curve, at these shares.

    Examples
    --------
    >>> x = torch.tensor([[[1.0, 2.0]]])
    >>> curves(lambda x, at: x.sum((1, 2)), x, torch.ones(1, 1, 2, dtype=torch.bool), x, [0.0, 0.5, 1.0])
    (array([3., 1., 0.]), array([0., 2., 3.]))
    """
    n = len(x)
    flat = worth.flatten(1).masked_fill(~inside.flatten(1), -torch.inf)
    place = flat.argsort(dim=1, descending=True, stable=True).argsort(1).view_as(x)
    cells = inside.flatten(1).sum(1).view(-1, 1, 1)
    at = torch.arange(n, device=x.device)
    found: list[list[float]] = [[], []]
    for share in shares:
        first = place < (share * cells).round()
        for column, kept in zip(found, (~first, first), strict=True):
            shown = torch.where(kept, x, x.new_zeros(()))
            parts = [score(shown[k : k + _ROWS], at[k : k + _ROWS]) for k in range(0, n, _ROWS)]
            column.append(float(torch.cat(parts).double().mean()))
    return np.array(found[0]), np.array(found[1])


def faithfulness(
    estimator: Estimator,
    x: ArrayLike | Series,
    *,
    lengths: ArrayLike | None = None,
    worth: Float[Tensor, "n t r"] | None = None,
    points: int = 11,
    draws: int = 5,
    seed: int = 0,
) -> Faithfulness:
    """Take cells away in the order of what they contribute, and put them back, beside random orders.

    Parameters
    ----------
    estimator : fitted
    x, lengths : instances, as of :meth:`ial_nap.estimator.NAPClassifier.series`
    worth : order to look into instead of that of contributions, ``(n, t, r)``, the most first
    points : shares of cells, evenly from 0 to 1
    draws : random orders
    seed : of them

    Raises
    ------
    InputError
        For fewer than 2 points or 1 draw.

    Examples
    --------
    >>> values = np.random.default_rng(0).normal(size=(60, 3, 2))
    >>> model = NAPClassifier(hidden=4, latent=2, epochs=2, device="cpu").fit(values, values[:, -1, 0] > 0)
    >>> found = faithfulness(model, values)
    >>> bool(found.deletion[-1] == found.insertion[0]), bool(found.deletion[0] == found.insertion[-1])
    (True, True)
    """
    if points < 2 or draws < 1:
        raise InputError(f"points must be 2 or more and draws 1 or more, got {points} and {draws}")
    model, series = estimator.model_, estimator.series(x, lengths=lengths).to(estimator.device_)
    with torch.no_grad():
        parts = model.contributions(series.x, series.lengths)
    total = parts.cells.sum((1, 2))
    # What is explained: the class predicted, or the output that cells moved most, in the direction they moved it.
    which = (total + parts.intercept if model.kind == "multiclass" else total.abs()).argmax(1, keepdim=True)
    sign = torch.ones_like(total[:, 0]) if model.kind == "multiclass" else total.gather(1, which)[:, 0].sign()

    def score(values: Tensor, at: Tensor) -> Tensor:
        return sign[at] * model(values, series.lengths[at]).logits.gather(1, which[at])[:, 0]

    n, t, r = series.x.shape
    own = parts.cells.gather(3, which.view(n, 1, 1, 1).expand(n, t, r, 1))[..., 0] * sign.view(-1, 1, 1)
    shares = np.linspace(0, 1, points)
    order = own if worth is None else worth.to(series.x)
    deletion, insertion = curves(score, series.x, series.observed, order, shares.tolist())
    generator = torch.Generator().manual_seed(seed)
    random = [
        curves(score, series.x, series.observed, torch.rand(n, t, r, generator=generator).to(series.x), shares.tolist())
        for _ in range(draws)
    ]
    return Faithfulness(
        shares,
        deletion,
        insertion,
        np.mean([pair[0] for pair in random], axis=0),
        np.mean([pair[1] for pair in random], axis=0),
    )


# ---- do seeds agree?


@dataclass(frozen=True, eq=False)
class Stability:
    """How far models agree on what matters.

    Parameters
    ----------
    agreement : mean over instances of the rank correlation of sizes of contributions, of each pair, ``(m, m)``
    mean, low : over pairs, and of the pair that agrees least; 1 is agreement in everything, 0 none
    """

    agreement: Float[np.ndarray, "m m"]
    mean: float
    low: float


def stability(estimators: Sequence[Estimator], x: ArrayLike | Series, *, lengths: ArrayLike | None = None) -> Stability:
    """Compare what several estimators, trained alike from other seeds, say of the same instances.

    Parameters
    ----------
    estimators : two or more, of the same features, steps and outputs
    x, lengths : instances, in the users' units unless all have one scaling

    Raises
    ------
    InputError
        For fewer than two, or estimators of other sizes.

    Examples
    --------
    >>> values = np.random.default_rng(0).normal(size=(60, 3, 2))
    >>> models = [
    ...     NAPClassifier(hidden=4, latent=2, epochs=2, device="cpu", seed=seed).fit(values, values[:, -1, 0] > 0)
    ...     for seed in (0, 1)
    ... ]
    >>> found = stability(models, values)
    >>> found.agreement.diagonal().tolist(), -1 <= found.low <= 1
    ([1.0, 1.0], True)
    """
    if len(estimators) < 2:
        raise InputError(f"stability compares two estimators or more, got {len(estimators)}")
    sizes = [estimator.contributions(x, lengths).cells.abs().sum(3).numpy() for estimator in estimators]
    if len({size.shape for size in sizes}) > 1:
        raise InputError(f"the estimators are of other sizes: {', '.join(str(size.shape[1:]) for size in sizes)}")
    inside = estimators[0].series(x, lengths=lengths).observed.numpy()
    found = np.eye(len(sizes))
    ranks = [[rankdata(size[k][inside[k]]) for k in range(len(inside))] for size in sizes]
    for i in range(len(sizes)):
        for j in range(i):
            each = [_correlation(a, b) for a, b in zip(ranks[i], ranks[j], strict=True)]
            known = [value for value in each if np.isfinite(value)]
            found[i, j] = found[j, i] = float(np.mean(known)) if known else np.nan
    pairs = found[np.tril_indices(len(sizes), -1)]
    return Stability(found, float(pairs.mean()), float(pairs.min()))


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if size > 0 else float("nan")


# ---- what is excluded


@dataclass(frozen=True, eq=False)
class Certificate:
    """What was checked of the cells that are said to have no effect.

    Parameters
    ----------
    excluded : cells, ``(t, r)``
    features, steps : names
    gradient : largest slope of any logit in an excluded cell; 0 where the exclusion holds
    garbage : largest change of any logit as excluded cells take values up to 1e30; 0 where it holds
    instances : that it was checked on
    context : hash of the verdicts
    network : hash of the parameters
    """

    excluded: Bool[np.ndarray, "t r"]
    features: tuple[str, ...]
    steps: tuple[str, ...]
    gradient: float
    garbage: float
    instances: int
    context: str
    network: str

    @property
    def holds(self) -> bool:
        """Neither check found an effect, however small."""
        return self.gradient == 0 and self.garbage == 0

    def to_json(self) -> dict[str, object]:
        """Return it as plain values, with the excluded cells by name."""
        return {
            "holds": self.holds,
            "excluded": [
                {"step": self.steps[t], "feature": self.features[d]} for t, d in np.argwhere(self.excluded).tolist()
            ],
            "gradient": self.gradient,
            "garbage": self.garbage,
            "instances": self.instances,
            "context": self.context,
            "network": self.network,
        }


def certify(
    logits: Callable[[Tensor], Tensor],
    x: Float[Tensor, "n t r"],
    excluded: Bool[Tensor, "t r"],
    *,
    seed: int = 0,
) -> tuple[float, float]:
    """Look for an effect of cells that should have none, in two ways.

    Parameters
    ----------
    logits : maps values to outputs ``(n, c)``, through which gradients flow
    x : values to look at
    excluded : cells
    seed : of the garbage

    Returns
    -------
    The largest slope in an excluded cell, and the largest change of an output as these cells take random values of
    sizes 1, 1e6 and 1e30; an output that is no number counts as infinite.

    Examples
    --------
    >>> off = torch.tensor([[False, True]])
    >>> certify(lambda x: x[:, :, 0], torch.ones(3, 1, 2), off)
    (0.0, 0.0)
    >>> certify(lambda x: x.sum(2), torch.ones(3, 1, 2), off)[0]
    1.0
    """
    leaf = x.detach().clone().requires_grad_()
    with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):
        found = logits(leaf)
        slopes = [
            torch.autograd.grad(column.sum(), leaf, retain_graph=True, materialize_grads=True)[0]
            for column in found.unbind(1)
        ]
    slope = max((_largest(one[:, excluded]) for one in slopes), default=0.0)
    generator = torch.Generator().manual_seed(seed)
    change = 0.0
    with torch.no_grad():
        before = logits(x)
        for size in (1.0, 1e6, 1e30):
            noise = size * torch.randn(x.shape, generator=generator).to(x)
            change = max(change, _largest(logits(torch.where(excluded, noise, x)) - before))
    return slope, change


def _largest(values: Tensor) -> float:
    return float(values.abs().nan_to_num(nan=torch.inf).amax()) if values.numel() else 0.0


def certificate(
    estimator: Estimator, x: ArrayLike | Series | None = None, *, lengths: ArrayLike | None = None, seed: int = 0
) -> Certificate:
    """Check that the cells whose gate is closed have no effect, by gradients and by garbage in their place (spec 11).

    Parameters
    ----------
    estimator : fitted, under the verdicts to be certified
    x, lengths : instances to check on; None draws 64 of standard normal values
    seed : of what is drawn

    Returns
    -------
    The certificate; see its ``holds``.

    Examples
    --------
    >>> values = np.random.default_rng(0).normal(size=(60, 3, 2))
    >>> model = NAPClassifier(hidden=4, latent=2, epochs=1, device="cpu").fit(values, values[:, -1, 0] > 0)
    >>> mask = np.full((1, 3, 2), -1)
    >>> mask[0, 1, 0] = 0
    >>> shift = model.update(mask)
    >>> found = certificate(model)
    >>> found.holds, found.to_json()["excluded"]
    (True, [{'step': '1', 'feature': 'f0'}])
    """
    model = estimator.model_
    if x is None:
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(64, model.steps, model.features, generator=generator).to(estimator.device_)
        real = torch.full((64,), model.steps, device=estimator.device_)
    else:
        series = estimator.series(x, lengths=lengths).to(estimator.device_)
        values, real = series.x, series.lengths
    excluded = model.excluded()
    slope, change = certify(lambda shown: model(shown, real).logits, values, excluded, seed=seed)
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        found.update(name.encode() + parameter.detach().cpu().contiguous().numpy().tobytes())
    return Certificate(
        excluded.cpu().numpy(),
        estimator.series_.features,
        estimator.series_.steps,
        slope,
        change,
        len(values),
        estimator.context_hash,
        found.hexdigest()[:16],
    )


# ---- what verdicts do


@dataclass(frozen=True, eq=False)
class Moved:
    """What a verdict, or several of one kind, did to predictions.

    Parameters
    ----------
    instance, annotator : whose; "" where the group is not by it
    step, feature : of the cell; -1 and "" where the group is not by it
    verdicts : that are in the group
    change : of each instance's prediction through them: with them, less without; probabilities, or the target's unit,
        ``(n, c)``
    """

    instance: str
    annotator: str
    step: int
    feature: str
    verdicts: int
    change: Float[np.ndarray, "n c"]

    @property
    def size(self) -> float:
        """Mean absolute change."""
        return float(np.abs(self.change).mean())


def who_moved(
    estimator: Estimator,
    x: ArrayLike | Series,
    *,
    lengths: ArrayLike | None = None,
    by: Literal["verdict", "mask", "annotator", "cell"] = "verdict",
) -> list[Moved]:
    """Leave verdicts out, a group at a time, and say what each group did to predictions (spec 11).

    It is exact: without training, the model without a verdict is an update away. Groups overlap in what they do, so
    that changes need not add up.

    Parameters
    ----------
    estimator : fitted, with verdicts; they stand afterwards as before
    x, lengths : instances whose predictions are looked at
    by : groups: each "verdict" by itself, those of an instance and annotator ("mask"), of an "annotator", or on a
        "cell"

    Returns
    -------
    The group that moved most first.

    Raises
    ------
    InputError
        For another kind of group.
    """
    if by not in {"verdict", "mask", "annotator", "cell"}:
        raise InputError(f"by '{by}' is unknown: choose verdict, mask, annotator or cell")
    context, names = estimator.context_, estimator.series_.features
    series = estimator.series(x, lengths=lengths)
    groups: dict[tuple[str, str, int, int], list[tuple[str, str, int, int, int]]] = {}
    masks = context.masks[: len(context)]
    for k, (instance, annotator) in enumerate(context.keys):
        for t, d in (masks[k] >= 0).nonzero().tolist():
            key = {
                "verdict": (instance, annotator, t, d),
                "mask": (instance, annotator, -1, -1),
                "annotator": ("", annotator, -1, -1),
                "cell": ("", "", t, d),
            }[by]
            groups.setdefault(key, []).append((instance, annotator, t, d, -1))
    now = _predicted(estimator, series)
    found: list[Moved] = []
    for (instance, annotator, t, d), cells in groups.items():
        without = context.copy()
        without.give(cells, allow_empty=True)
        with estimator.trial(without):
            change = now - _predicted(estimator, series)
        found.append(Moved(instance, annotator, t, names[d] if d >= 0 else "", len(cells), change))
    return sorted(found, key=lambda one: -one.size)


def _predicted(estimator: Estimator, series: Series) -> Float[np.ndarray, "n c"]:
    """Predict at the mean of the latent, without draws."""
    found = estimator.logits(series)
    return probabilities(torch.from_numpy(found), series.kind).numpy()


@dataclass(frozen=True)
class Worth:
    """What a verdict would be worth.

    Parameters
    ----------
    instance, step, feature : the cell
    gain : expected fall of the validation loss; below 0 the verdict would do harm
    if_off, if_on : fall of the validation loss if the verdict is 0, and if it is 1
    per_second : gain for each second it is expected to take
    """

    instance: str
    step: int
    feature: str
    gain: float
    if_off: float
    if_on: float
    per_second: float


def value_of_information(
    estimator: Estimator,
    cells: Sequence[tuple[str, int, str]],
    validation: Series | None = None,
    *,
    off: float | Mapping[str, float] = 1.0,
    seconds: float | Mapping[str, float] = 1.0,
    annotator: str = "",
) -> list[Worth]:
    """Say which cell is most worth a question, by obeying each possible answer and looking at the validation loss.

    One step ahead and exact: an answer needs no training (spec 11). Gains are of a single verdict; asking again after
    each answer takes those before into account.

    Parameters
    ----------
    estimator : fitted; its verdicts stand afterwards as before
    cells : instance, step and feature of each
    validation : instances with labels; None is what was held out in training. The test split has no place here
    off : probability that the verdict will be 0 (1 otherwise), of all or by feature
    seconds : that a verdict takes, of all or by feature
    annotator : who would be asked

    Returns
    -------
    The most gain per second first.

    Raises
    ------
    InputError
        For an unknown feature or a step that is not there, for probabilities and seconds that are none, and without
        labelled validation series.

    Examples
    --------
    >>> values = np.random.default_rng(0).normal(size=(60, 3, 2))
    >>> model = NAPClassifier(hidden=4, latent=2, epochs=1, device="cpu").fit(values, values[:, -1, 0] > 0)
    >>> found = value_of_information(model, [("0", 2, "f0"), ("0", 2, "f1")])
    >>> len(found), found[0].per_second >= found[1].per_second
    (2, True)
    """
    held_out = estimator.validation_ if validation is None else estimator.series(validation)
    if held_out is None:
        raise InputError("the gain is on a validation loss: give validation series with labels")
    names = estimator.series_.features

    def loss() -> float:
        return _loss(estimator, held_out)

    now, found = loss(), list[Worth]()
    for instance, step, feature in cells:
        if feature not in names:
            raise InputError(f"unknown feature '{feature}': choose among {', '.join(names[:8])}")
        chance = _of(off, feature, "off")
        cost = _of(seconds, feature, "seconds")
        if not 0 <= chance <= 1 or cost <= 0:
            raise InputError(f"off must be within 0 and 1 and seconds above 0, got {chance} and {cost} of '{feature}'")
        falls: list[float] = []
        for verdict in (0, 1):
            answered = estimator.context_.copy()
            answered.give([(instance, annotator, step, names.index(feature), verdict)], allow_empty=True)
            with estimator.trial(answered):
                falls.append(now - loss())
        gain = chance * falls[0] + (1 - chance) * falls[1]
        found.append(Worth(instance, step, feature, gain, falls[0], falls[1], gain / cost))
    return sorted(found, key=lambda one: -one.per_second)


def _of(given: float | Mapping[str, float], feature: str, what: str) -> float:
    if not isinstance(given, Mapping):
        return float(given)
    if feature not in given:
        raise InputError(f"{what} has nothing of feature '{feature}': give a number for each")
    return float(given[feature])


@torch.no_grad()
def _loss(estimator: Estimator, series: Series) -> float:
    """Mean loss at the mean of the latent, without draws."""
    model, total = estimator.model_, 0.0
    for first in range(0, len(series), _ROWS):
        at = torch.arange(first, min(first + _ROWS, len(series)))
        part = series.part(at).to(estimator.device_)
        value = losses(model(part.x, part.lengths).logits, part.targets, part.kind)
        total += float(value.double().sum())
    return total / len(series)


# ---- what it costs


def tax(
    estimator: Estimator,
    x: ArrayLike | Series,
    y: ArrayLike | None = None,
    *,
    lengths: ArrayLike | None = None,
    metric: str | None = None,
    draws: int = 1000,
) -> Difference:
    """Compare the estimator without any verdict to a plain RETAIN of the same size and training (spec 10, pitfall 12).

    Parameters
    ----------
    estimator : fitted here, so that its training series are there; its verdicts stand afterwards as before
    x, y, lengths : labelled instances to score on
    metric : one that fits the task; None is its main one
    draws : of the bootstrap of instances

    Returns
    -------
    RETAIN before, the estimator after: what being correctable costs, with its interval.

    Raises
    ------
    InputError
        For an estimator that was loaded.
    """
    train = estimator.train_
    if train is None:
        raise InputError("a loaded estimator holds no training series, and RETAIN needs them: fit it again")
    series, device = estimator.series(x, y, lengths=lengths), estimator.device_
    plain = Retain(
        len(train.features),
        train.outputs,
        hidden=int(estimator.hidden),
        keep=float(estimator.keep),
        rnn=estimator.rnn,
        seed=int(estimator.seed),
    ).to(device)
    held_out = estimator.validation_
    training = Training(
        plain,
        Plain(plain, l2=float(estimator.l2)),
        train.to(device),
        None if held_out is None else held_out.to(device),
        lr=estimator.lr,
        batch_size=estimator.batch_size,
        epochs=estimator.epochs,
        patience=estimator.patience,
        seed=estimator.seed,
    )
    with one_thread(device.type == "cpu" and estimator.hidden <= 256):
        training.run()
    moved = series.to(device)
    with torch.no_grad():
        before = probabilities(plain(moved.x, moved.lengths).logits, series.kind).cpu().numpy()
    nothing = estimator.context_.copy()
    nothing.give([], exactly=True)
    with estimator.trial(nothing):
        after = estimator.sampled(series).mean.numpy()
    return compare(series, before, after, metric=metric, draws=draws)
