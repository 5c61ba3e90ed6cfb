"""Which instances and which of their features are worth a person's seconds (cost-effective reranking, spec 2.5)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from ial_nap.choices import FeatureRanker, InstanceRanker
from ial_nap.influence import Influence, influence_on
from ial_nap.nap import FeatureNAP, Predicted, probabilities
from ial_nap.series import Kind, Series
from shared_core.errors import InputError

__all__ = [
    "CER",
    "FeatureRanker",
    "InstanceRanker",
    "Ranked",
    "counterfactual",
    "entropy",
    "feature_influence",
    "feature_uncertainty",
    "margin",
    "prediction_error",
    "uncertainty",
]

_ROWS = 16384


# ---- instances


def uncertainty(predicted: Predicted) -> Float[Tensor, " n"]:
    """Variance over draws of each instance's prediction, summed over outputs.

    Parameters
    ----------
    predicted : by draws

    Examples
    --------
    >>> uncertainty(Predicted(torch.tensor([[[0.2]], [[0.4]]]), "binary")).item() - 0.01 < 1e-8
    True
    """
    return predicted.samples.var(0, correction=0).sum(1)


def prediction_error(predicted: Predicted, y: Shaped[Tensor, "n ..."]) -> Float[Tensor, " n"]:
    """Distance of the mean prediction from the label, summed over outputs.

    Parameters
    ----------
    predicted : by draws
    y : labels as :class:`ial_nap.Series` holds them
    """
    mean = predicted.mean
    if predicted.kind == "multiclass":
        target = torch.nn.functional.one_hot(y, mean.shape[1]).to(mean)
        return 0.5 * (mean - target).abs().sum(1)
    return (mean - y.view(len(y), -1).to(mean)).abs().sum(1)


def _choices(predicted: Predicted) -> Tensor:
    """Probabilities of exclusive outcomes, ``(n, outputs, outcomes)``."""
    if predicted.kind == "regression":
        raise InputError("entropy and margin are of classes: a regression has none, rank by uncertainty or error")
    mean = predicted.mean
    return mean.unsqueeze(1) if predicted.kind == "multiclass" else torch.stack([1 - mean, mean], 2)


def entropy(predicted: Predicted) -> Float[Tensor, " n"]:
    """Entropy of the mean prediction, in nats, summed over labels.

    Parameters
    ----------
    predicted : by draws

    Raises
    ------
    InputError
        For a regression.
    """
    return torch.special.entr(_choices(predicted)).sum((1, 2))


def margin(predicted: Predicted) -> Float[Tensor, " n"]:
    """One minus the lead of the likeliest outcome over the next, averaged over labels: the larger, the closer a call.

    Parameters
    ----------
    predicted : by draws

    Raises
    ------
    InputError
        For a regression.
    """
    top = _choices(predicted).topk(2, 2).values
    return (1 - (top[..., 0] - top[..., 1])).mean(1)


# ---- features


def counterfactual(
    predict: Callable[[Tensor, Tensor], Tensor],
    x: Float[Tensor, "n t r"],
    lengths: Int64[Tensor, " n"],
    *,
    groups: Sequence[Collection[int]] = (),
    cells: bool = False,
    baseline: Float[Tensor, " r"] | None = None,
) -> Float[Tensor, "n t r"]:
    """How far a prediction moves when a feature takes its baseline, each by itself and the others as they are.

    Parameters
    ----------
    predict : maps series and lengths to predictions ``(n, c)``
    x : standardised values
    lengths : real steps
    groups : features that take their baselines together, as the columns of one category; each other is by itself
    cells : one cell at a time, rather than a feature at all steps (then scores are the same at every step)
    baseline : of each feature; None is 0, the training mean

    Returns
    -------
    Absolute differences, summed over outputs; 0 beyond an instance's length.

    Raises
    ------
    InputError
        For groups that overlap, or a feature that is not there.

    Examples
    --------
    >>> x = torch.tensor([[[1.0, 2.0]]])
    >>> counterfactual(lambda x, n: x.sum((1, 2))[:, None], x, torch.tensor([1])).tolist()
    [[[1.0, 2.0]]]
    """
    n, t, r = x.shape
    together = [sorted(set(group)) for group in groups]
    named = [d for group in together for d in group]
    if len(set(named)) < len(named) or any(not 0 <= d < r for d in named):
        raise InputError(f"groups must be of different features within 0..{r - 1}, got {[list(g) for g in together]}")
    together += [[d] for d in range(r) if d not in named]
    changes = [
        (steps, group) for group in together for steps in ([[s] for s in range(t)] if cells else [list(range(t))])
    ]
    masks = torch.zeros(len(changes), t, r, dtype=torch.bool, device=x.device)
    for mask, (steps, group) in zip(masks, changes, strict=True):
        mask[torch.tensor(steps).unsqueeze(1), torch.tensor(group)] = True
    to = x.new_zeros(r) if baseline is None else baseline.to(x)
    before = predict(x, lengths)
    moved: list[Tensor] = []
    for part in masks.split(max(1, _ROWS // n)):
        altered = torch.where(part.unsqueeze(1), to, x).flatten(0, 1)
        after = predict(altered, lengths.repeat(len(part))).unflatten(0, (len(part), n))
        moved.append((after - before).abs().sum(2))
    found = torch.einsum("gn,gtr->ntr", torch.cat(moved), masks.to(x))
    inside = torch.arange(t, device=x.device) < lengths.unsqueeze(1)
    return found * inside.unsqueeze(2)


def feature_uncertainty(
    model: FeatureNAP, series: Series, *, samples: int = 30, seed: int = 0
) -> Float[Tensor, "n t r"]:
    """Variance over draws of what each cell contributes, summed over outputs.

    Parameters
    ----------
    model : trained
    series : instances
    samples : draws
    seed : of them
    """
    return model.spread_of_contributions(series.x, series.lengths, samples=samples, seed=seed)[1].sum(3)


def feature_influence(
    influence: Influence, series: Series, *, draws: int = 10, width: float = 2.0, seed: int = 0
) -> Float[Tensor, "n t r"]:
    """How far an instance's influence moves when a feature takes a random value at all its steps.

    Parameters
    ----------
    influence : prepared by :func:`ial_nap.influence.influence_on`
    series : instances with labels, standardised
    draws : random values, for each instance and feature its own
    width : values are uniform within as many deviations of the mean
    seed : of the draws

    Returns
    -------
    Mean absolute change; the same at every real step, 0 beyond.
    """
    n, t, r = series.x.shape
    generator = torch.Generator().manual_seed(seed)
    values = (2 * torch.rand(draws, n, r, generator=generator) - 1).to(series.x) * width
    before = influence.of(series)
    inside = (torch.arange(t, device=series.x.device) < series.lengths.unsqueeze(1)).unsqueeze(2)
    rows = torch.arange(n).repeat(draws)
    copies = series.part(rows)
    found = before.new_zeros(n, r)
    for d in range(r):
        altered = copies.x.clone()
        altered[:, :, d] = (values[:, :, d].unsqueeze(2) * inside.squeeze(2)).flatten(0, 1)
        found[:, d] = (influence.of(replace(copies, x=altered)).view(draws, n) - before).abs().mean(0)
    return found.to(series.x).unsqueeze(1) * inside


# ---- both


@dataclass(frozen=True)
class Ranked:
    """An instance to look at.

    Parameters
    ----------
    index : its place in the series
    instance : its id
    score : what it was ranked by
    reason : in words
    features : names of those to look at, the most telling first
    feature_scores : of these
    """

    index: int
    instance: str
    score: float
    reason: str
    features: tuple[str, ...]
    feature_scores: tuple[float, ...]


_REASONS = {
    "uncertainty": "the prediction varies most",
    "influence": "it moves the validation loss most",
    "error": "the prediction is far off",
    "entropy": "the prediction is open",
    "margin": "two outcomes are close",
    "random": "drawn at random",
}


@dataclass(frozen=True)
class CER:
    """Cost-effective reranking: some instances, and some features of each.

    Parameters
    ----------
    instance, feature : rankers; the paper's best are "uncertainty" and "counterfactual"
    k : instances
    f : features of each
    order : by influence, the "harmful" first (removing them lowers the validation loss), or by "abs" (release)
    samples : draws of the latent and of dropout
    scope : of influence
    worst : validation instances that influence is on
    groups : names of features that belong together

    Raises
    ------
    InputError
        For an unknown ranker, order or scope, or nothing to choose.
    """

    instance: InstanceRanker = "uncertainty"
    feature: FeatureRanker = "counterfactual"
    k: int = 10
    f: int = 8
    order: Literal["harmful", "abs"] = "harmful"
    samples: int = 30
    scope: Literal["head", "attention"] = "head"
    worst: int = 400
    groups: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        """Refuse what is no ranker."""
        for name, value, known in (
            ("instance", self.instance, get_args(InstanceRanker)),
            ("feature", self.feature, get_args(FeatureRanker)),
            ("order", self.order, ("harmful", "abs")),
            ("scope", self.scope, ("head", "attention")),
        ):
            if value not in known:
                raise InputError(f"{name} '{value}' is unknown: choose {', '.join(known)}")
        if min(self.k, self.f, self.samples) < 1:
            raise InputError(f"k, f and samples must be 1 or more, got {self.k}, {self.f}, {self.samples}")

    def rank(
        self,
        model: FeatureNAP,
        train: Series,
        validation: Series | None = None,
        *,
        among: Sequence[int] | None = None,
        seed: int = 0,
    ) -> list[Ranked]:
        """Choose what to look at, under the model's present context.

        Parameters
        ----------
        model : trained
        train : instances to choose from
        validation : with labels; for influence only. The test split has no place here: choosing by it leaks
        among : places of those that may be chosen; None is all
        seed : of draws

        Raises
        ------
        InputError
            For influence without validation series, or none to choose from.

        Warns
        -----
        UserWarning
            When there are fewer than k.
        """
        pool = torch.arange(len(train)) if among is None else torch.as_tensor(list(among), dtype=torch.int64)
        if not len(pool):
            raise InputError("there is no instance left to choose from")
        if self.k > len(pool):
            warnings.warn(f"k = {self.k} is more than the {len(pool)} instances there are: all of them", stacklevel=2)
        influence = None
        if "influence" in {self.instance, self.feature}:
            if validation is None:
                raise InputError("influence is on a validation loss: give validation series, or rank by uncertainty")
            influence = influence_on(model, train, validation, scope=self.scope, worst=self.worst)
        scores = self.instance_scores(model, train.part(pool), influence, seed).cpu()
        top = scores.argsort(descending=True, stable=True)[: self.k]
        chosen = pool[top]
        by_cell = self.feature_scores(model, train.part(chosen), influence, seed)
        by_feature = by_cell.amax(1).cpu()
        names = train.features
        found: list[Ranked] = []
        for place, score, row in zip(chosen.tolist(), scores[top].tolist(), by_feature, strict=True):
            best = row.argsort(descending=True, stable=True)[: self.f]
            is_harmful = self.instance == "influence" and self.order == "harmful"
            found.append(
                Ranked(
                    place,
                    train.ids[place],
                    score,
                    "the validation loss would be lower without it" if is_harmful else _REASONS[self.instance],
                    tuple(names[d] for d in best.tolist()),
                    tuple(row[best].tolist()),
                )
            )
        return found

    def instance_scores(
        self, model: FeatureNAP, series: Series, influence: Influence | None = None, seed: int = 0
    ) -> Float[Tensor, " n"]:
        """Score instances, the more worth a look the higher.

        Parameters
        ----------
        model : trained
        series : instances
        influence : prepared; for that ranker
        seed : of draws
        """
        if self.instance == "random":
            return torch.rand(len(series), generator=torch.Generator().manual_seed(seed))
        if self.instance == "influence":
            assert influence is not None
            found = influence.of(series)
            return (found.abs() if self.order == "abs" else -found).to(series.x)
        predicted = model.predict(series.x, series.lengths, samples=self.samples, seed=seed)
        if self.instance == "uncertainty":
            return uncertainty(predicted)
        if self.instance == "error":
            return prediction_error(predicted, series.targets)
        return entropy(predicted) if self.instance == "entropy" else margin(predicted)

    def feature_scores(
        self, model: FeatureNAP, series: Series, influence: Influence | None = None, seed: int = 0
    ) -> Float[Tensor, "n t r"]:
        """Score cells, the more worth a look the higher.

        Parameters
        ----------
        model : trained
        series : instances
        influence : prepared; for that ranker
        seed : of draws
        """
        if self.feature == "random":
            drawn = torch.rand(len(series), 1, len(series.features), generator=torch.Generator().manual_seed(seed))
            return drawn.to(series.x).expand_as(series.x)
        if self.feature == "influence":
            assert influence is not None
            return feature_influence(influence, series, seed=seed)
        if self.feature == "uncertainty":
            return feature_uncertainty(model, series, samples=self.samples, seed=seed)
        groups = [[series.features.index(name) for name in group] for group in self.groups]
        with torch.no_grad():
            return counterfactual(
                lambda x, lengths: _predictions(model, x, lengths, series.kind), series.x, series.lengths, groups=groups
            )


def _predictions(model: FeatureNAP, x: Tensor, lengths: Tensor, kind: Kind) -> Tensor:
    return probabilities(model(x, lengths).logits, kind)
