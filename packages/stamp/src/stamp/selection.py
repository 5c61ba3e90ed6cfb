"""Choose which channels to keep: the best by score whose network fits a budget, with every group's guards (spec 2.9).

All modes rank channels first and cut the ranking second. A budget takes the longest head of the ranking whose network,
once each group has its least channels and its rounding, costs no more than asked: smaller budgets keep subsets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Num
from numpy.typing import NDArray
from torch import Tensor

from shared_core.errors import InputError
from stamp.counting import CostModel

__all__ = [
    "Budget",
    "BudgetError",
    "Cost",
    "LayerCost",
    "ScoresError",
    "normalised",
    "overlap",
    "select",
    "widths_like",
]

Keep = dict[str, Bool[Tensor, " _width"]]
Mode = Literal["budget", "threshold", "efficiency"]


class BudgetError(InputError):
    """A budget that is none, or that no choice of channels meets.

    Parameters
    ----------
    message : one line
    smallest : the ratio to the dense network that can be reached, or None where the budget itself is wrong
    """

    def __init__(self, message: str, smallest: float | None = None) -> None:
        super().__init__(message)
        self.smallest = smallest


class ScoresError(InputError):
    """Scores, widths or guards that no channels can be chosen by."""


@dataclass(frozen=True)
class Budget:
    """What the small network may cost: exactly one of four.

    Parameters
    ----------
    macs, params, latency : fraction in (0, 1] of the dense network's multiply-adds, parameters or time
    latency_ms : milliseconds of a forward pass

    Raises
    ------
    BudgetError
        For none or several, or a number out of range.

    Examples
    --------
    >>> Budget(macs=0.25).kind, Budget(latency_ms=2.0).fraction(8.0)
    ('macs', 0.25)
    """

    macs: float | None = None
    params: float | None = None
    latency: float | None = None
    latency_ms: float | None = None

    def __post_init__(self) -> None:
        """Refuse what is no budget."""
        given = self.as_dict()
        if len(given) != 1:
            what = " and ".join(f"{name}={value}" for name, value in given.items()) or "nothing"
            raise BudgetError(f"a budget is one of macs, params, latency and latency_ms; it was given {what}")
        if self.kind == "latency_ms":
            if not 0 < self.value < math.inf:
                raise BudgetError(f"latency_ms={self.value} is no time; give milliseconds above 0")
        else:
            _check_fraction(self.kind, self.value)

    @property
    def kind(self) -> str:
        """Which of the four it is."""
        return next(iter(self.as_dict()))

    @property
    def value(self) -> float:
        """The number given."""
        return next(iter(self.as_dict().values()))

    def as_dict(self) -> dict[str, float]:
        """Return the number under its name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def fraction(self, dense: float) -> float:
        """Return it as a fraction of the dense network's cost, at most 1.

        Parameters
        ----------
        dense : milliseconds of the dense network; only `latency_ms` asks for it
        """
        return min(1.0, self.value / dense) if self.kind == "latency_ms" else self.value


@runtime_checkable
class Cost(Protocol):
    """What a network costs, in any unit, as a function of what is kept; more channels cost no less."""

    def exact(self, keep: Mapping[str, Tensor]) -> float:
        """Return the cost when only these channels of these groups are kept, and all of the others."""
        ...


@runtime_checkable
class LayerCost(Cost, Protocol):
    """A cost that is a sum over layers, of how many entries enter and leave each: `select` then ranks fast.

    Its matrices are those of `counting.CostModel`.
    """

    @property
    def names(self) -> tuple[str, ...]:
        """Groups that are not frozen."""
        ...

    @property
    def widths(self) -> tuple[int, ...]:
        """Their channels."""
        ...

    @property
    def inputs(self) -> Float64[Tensor, "layers channels"]:
        """Entries that each channel owns of what enters a layer."""
        ...

    @property
    def outputs(self) -> Float64[Tensor, "layers channels"]:
        """Entries that each channel owns of what leaves a layer."""
        ...

    @property
    def fixed_inputs(self) -> Float64[Tensor, " layers"]:
        """Entries that nobody owns of what enters a layer."""
        ...

    @property
    def fixed_outputs(self) -> Float64[Tensor, " layers"]:
        """Entries that nobody owns of what leaves a layer."""
        ...

    def of_layers(self, entering: NDArray[np.float64], leaving: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the cost of each layer (row), for several networks (columns)."""
        ...


def select(
    scores: Mapping[str, Num[Tensor, " _width"]],
    cost: Cost,
    budget: float,
    *,
    mode: Mode = "budget",
    threshold: float = 0.5,
    min_channels: int | float = 0.05,
    round_to: int = 1,
    multiples: Mapping[str, int] | None = None,
) -> Keep:
    """Choose the channels to keep.

    Parameters
    ----------
    scores : ``(width,)`` of each group that may lose some, higher for what is to stay; comparable across groups
        (see `normalised`). Groups of the cost that are left out stay whole
    cost : of a choice, e.g. `counting.CostModel` or `latency.LatencyTable`
    budget : fraction in (0, 1] of the dense network's cost; not looked at in mode ``"threshold"``
    mode : ``"budget"``: as many as fit of the channels ranked by score; ``"threshold"``: all above the threshold;
        ``"efficiency"``: remove one by one what has the least score for the cost that goes with it, until it fits
    threshold : of mode ``"threshold"``
    min_channels : the least to keep of each group, an integer, or a fraction of the group's width, rounded up; the
        group's best
    round_to : keep a multiple of it in each group, rounding down, except where that leaves less than `min_channels`:
        there no rounding takes place. The budget holds after rounding
    multiples : `round_to` of single groups

    Returns
    -------
    For each group with scores, in their order, which channels stay; on the CPU.

    Raises
    ------
    BudgetError
        For a budget out of range, or below what `min_channels` everywhere costs; then with the ratio that would do.
    ScoresError
        For NaN, groups that are frozen or do not exist, scores of a wrong width, guards out of range, or negative
        scores in mode ``"efficiency"``.

    Notes
    -----
    Equal scores enter one by one, earlier groups and lower channels first: nothing is left to chance and the budget is
    as full as one channel allows. A bisection over the ranking asks for about ``log2(channels)`` costs. The greedy
    ranking knows the marginal of every channel where the cost is a `CostModel` or a `LayerCost`; of any other cost it
    asks for the marginal of each group's worst channel at every step, which is slow, and supposes that the channels of
    a group cost alike.

    Examples
    --------
    >>> class Channels:
    ...     def exact(self, keep):
    ...         return float(sum(int(mask.sum()) for mask in keep.values())) if keep else 5.0
    >>> scores = {"a": torch.tensor([0.9, 0.2, 0.4]), "b": torch.tensor([0.1, 0.8])}
    >>> {name: mask.tolist() for name, mask in select(scores, Channels(), 0.6).items()}
    {'a': [True, False, True], 'b': [False, True]}
    """
    ranked = _Ranked.of(scores, cost, min_channels, round_to, multiples or {})
    if mode == "threshold":
        return ranked.keep(np.bincount(ranked.group[ranked.scores > threshold], minlength=len(ranked.names)))
    _check_fraction("budget", budget)
    dense = float(cost.exact({}))
    if mode == "efficiency":
        least = ranked.rank_by_efficiency(cost, budget * dense)
    elif mode == "budget":
        least = 0
    else:
        raise ScoresError(f"mode={mode!r} is none of 'budget', 'threshold' and 'efficiency'")
    most = len(ranked.order)
    if float(cost.exact(ranked.head(most))) / dense <= budget:
        return ranked.head(most)
    smallest = float(cost.exact(ranked.head(least))) / dense
    if smallest > budget:
        raise BudgetError(
            f"budget={budget:.6g} cannot be reached: with min_channels={min_channels} in every group the network still"
            f" costs {smallest:.6g} of the dense one; ask for that or more, or lower min_channels",
            smallest,
        )
    while most - least > 1:
        middle = (least + most) // 2
        fits = float(cost.exact(ranked.head(middle))) / dense <= budget
        least, most = (middle, most) if fits else (least, middle)
    return ranked.head(least)


def normalised(scores: Mapping[str, Num[Tensor, " _width"]]) -> dict[str, Float[Tensor, " _width"]]:
    """Divide scores by the mean magnitude of their group, so that those of all groups can be ranked together.

    Parameters
    ----------
    scores : of each channel; sums of weights grow with a layer's fan-in, which says nothing about its channels

    Returns
    -------
    Scores of mean magnitude 1 in each group; zeros stay zeros, and signs stay.

    Raises
    ------
    ScoresError
        For NaN.

    Examples
    --------
    >>> normalised({"a": torch.tensor([10.0, 30.0])})["a"].tolist()
    [0.5, 1.5]
    """
    _check_numbers(scores)
    means = {name: own.abs().double().mean() for name, own in scores.items()}
    return {name: own / means[name].to(own) if means[name] > 0 else own.clone() for name, own in scores.items()}


def widths_like(scores: Mapping[str, Num[Tensor, " _width"]], widths: Mapping[str, int]) -> Keep:
    """Keep the best of each group at given widths, e.g. those that another method chose.

    Parameters
    ----------
    scores : of each channel
    widths : how many to keep of each group; of groups left out, nothing is said

    Returns
    -------
    Which channels stay; of equal scores the first.

    Raises
    ------
    ScoresError
        For a group without scores, a width out of range, or NaN.

    Examples
    --------
    >>> widths_like({"a": torch.tensor([0.3, 0.9, 0.3])}, {"a": 2})["a"].tolist()
    [True, True, False]
    """
    _check_numbers(scores)
    keep: Keep = {}
    for name, width in widths.items():
        if name not in scores:
            raise ScoresError(f"widths[{name!r}] has no scores; there are scores of {list(scores)}")
        own = scores[name]
        if not 1 <= width <= len(own):
            raise ScoresError(f"widths[{name!r}] is {width}; the group has {len(own)} channels: keep 1 to {len(own)}")
        best = own.sort(descending=True, stable=True).indices[:width].cpu()
        keep[name] = torch.zeros(len(own), dtype=torch.bool).index_fill(0, best, True)
    return keep


def overlap(a: Mapping[str, Bool[Tensor, " _width"]], b: Mapping[str, Bool[Tensor, " _width"]]) -> dict[str, float]:
    """Compare two choices: channels that both keep over channels that either keeps, in each group.

    Parameters
    ----------
    a, b : ``(width,)`` of each group, choices of the same network; a group that one leaves out is whole in it

    Returns
    -------
    Intersection over union in [0, 1] of each group that either names.

    Raises
    ------
    ScoresError
        For groups of unlike widths.

    Examples
    --------
    >>> overlap({"a": torch.tensor([True, True, False])}, {"a": torch.tensor([False, True, True])})
    {'a': 0.3333333333333333}
    """
    found: dict[str, float] = {}
    for name in dict.fromkeys((*a, *b)):
        given = a[name] if name in a else b[name]
        first, second = (keep.get(name, torch.ones_like(given)).cpu() for keep in (a, b))
        if first.shape != second.shape:
            raise ScoresError(f"group {name!r} has {len(first)} channels in one choice and {len(second)} in the other")
        either = int((first | second).sum())
        found[name] = int((first & second).sum()) / either if either else 1.0
    return found


@dataclass
class _Ranked:
    """Channels of all groups in a row, the order in which they enter, and each group's guards."""

    names: tuple[str, ...]
    scores: NDArray[np.float64]
    group: NDArray[np.int64]
    order: NDArray[np.int64]
    floor: NDArray[np.int64]
    multiple: NDArray[np.int64]
    written: tuple[str, ...]

    @classmethod
    def of(
        cls,
        scores: Mapping[str, Tensor],
        cost: Cost,
        min_channels: int | float,
        round_to: int,
        multiples: Mapping[str, int],
    ) -> _Ranked:
        _check_numbers(scores)
        names = tuple(scores)
        if isinstance(cost, CostModel | LayerCost):
            known = dict(zip(cost.names, cost.widths, strict=True))
            _check_known(scores, known)
            names = tuple(name for name in known if name in scores)
        unknown = sorted(set(multiples) - set(names))
        if unknown:
            raise ScoresError(f"multiples names {unknown}, which have no scores; those that have are {list(names)}")
        if not names:
            raise ScoresError("scores are of no group; give those of at least one")
        for name, value in (("round_to", round_to), *((f"multiples[{name!r}]", m) for name, m in multiples.items())):
            if value < 1:
                raise ScoresError(f"{name}={value} is no multiple; give 1 or more")
        widths = np.array([len(scores[name]) for name in names])
        flat = np.concatenate([scores[name].detach().cpu().to(torch.float64).numpy() for name in names])
        return cls(
            names,
            flat,
            np.repeat(np.arange(len(names)), widths),
            np.argsort(-flat, kind="stable"),
            np.array([_least(min_channels, int(width)) for width in widths]),
            np.array([multiples.get(name, round_to) for name in names]),
            tuple(scores),
        )

    def head(self, length: int) -> Keep:
        """Return what is kept when the first of the ranking enter."""
        return self.keep(np.bincount(self.group[self.order[:length]], minlength=len(self.names)))

    def keep(self, counts: NDArray[np.int64]) -> Keep:
        """Return the best of each group, as many as guards make of the counts."""
        counts = np.maximum(counts, self.floor)
        rounded = counts // self.multiple * self.multiple
        counts = np.where(rounded < self.floor, counts, rounded)
        by_group = self.order[np.argsort(self.group[self.order], kind="stable")]
        widths = np.bincount(self.group)
        rank = np.arange(len(by_group)) - np.repeat(np.cumsum(widths) - widths, widths)
        mask = np.zeros(len(by_group), np.bool_)
        mask[by_group] = rank < np.repeat(counts, widths)
        pieces = torch.from_numpy(mask).split(widths.tolist())
        found = dict(zip(self.names, pieces, strict=True))
        return {name: found[name].clone() for name in self.written}

    def rank_by_efficiency(self, cost: Cost, enough: float) -> int:
        """Order channels by when the greedy removal would take them, and return how many are left where it stops."""
        if (self.scores < 0).any():
            name = self.names[self.group[np.flatnonzero(self.scores < 0)[0]]]
            raise ScoresError(
                f"scores[{name!r}] has negative values, which mode='efficiency' cannot divide by a cost; shift them, or"
                " use mode='budget'"
            )
        removed = _greedy(self, _marginals(self, cost), enough)
        left = np.setdiff1d(self.order, removed)
        left = left[np.argsort(-self.scores[left], kind="stable")]
        self.order = np.concatenate([left, np.array(removed[::-1], np.int64)])
        return len(left)


@runtime_checkable
class _Marginals(Protocol):
    """What single channels add to the cost of the network that is left."""

    kinds: NDArray[np.int64]
    """The kind of each channel; those of one kind cost alike."""

    total: float
    """Cost of what is left."""

    def of_each(self, kinds: NDArray[np.int64], channels: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return what some channels, given with their kinds, cost."""
        ...

    def remove(self, channel: int) -> None:
        """Take a channel away."""
        ...


class _OfLayers:
    """Marginals of a sum over layers: those of all kinds of channels at once."""

    def __init__(self, ranked: _Ranked, cost: CostModel | LayerCost) -> None:
        starts = dict(zip(cost.names, np.cumsum([0, *cost.widths]), strict=False))
        widths = dict(zip(cost.names, cost.widths, strict=True))
        own = np.concatenate([np.arange(starts[name], starts[name] + widths[name]) for name in ranked.names])
        inputs, outputs = cost.inputs.numpy(), cost.outputs.numpy()
        self.entering = inputs.sum(1) + cost.fixed_inputs.numpy()
        self.leaving = outputs.sum(1) + cost.fixed_outputs.numpy()
        inputs, outputs = inputs[:, own], outputs[:, own]
        differs = (inputs[:, 1:] != inputs[:, :-1]).any(0) | (outputs[:, 1:] != outputs[:, :-1]).any(0)
        first = np.concatenate([[True], differs | (ranked.group[1:] != ranked.group[:-1])])
        self.kinds = np.cumsum(first) - 1
        self.inputs, self.outputs = inputs[:, first], outputs[:, first]
        self.cost = cost
        self.total = self._total()

    def of_each(self, kinds: NDArray[np.int64], channels: NDArray[np.int64]) -> NDArray[np.float64]:  # noqa: ARG002
        entering = self.entering[:, None] - self.inputs[:, kinds]
        leaving = self.leaving[:, None] - self.outputs[:, kinds]
        return self.total - self._of_layers(entering, leaving).sum(0)

    def remove(self, channel: int) -> None:
        kind = self.kinds[channel]
        self.entering = self.entering - self.inputs[:, kind]
        self.leaving = self.leaving - self.outputs[:, kind]
        self.total = self._total()

    def _total(self) -> float:
        return float(self._of_layers(self.entering[:, None], self.leaving[:, None]).sum())

    def _of_layers(self, entering: NDArray[np.float64], leaving: NDArray[np.float64]) -> NDArray[np.float64]:
        if isinstance(self.cost, CostModel):
            return self.cost.scale.numpy()[:, None] * entering * leaving
        return self.cost.of_layers(entering, leaving)


class _OfAny:
    """Marginals of a cost of which nothing is known: the worst channel speaks for its group."""

    def __init__(self, ranked: _Ranked, cost: Cost) -> None:
        self.cost = cost
        self.kinds = ranked.group
        self.names = ranked.names
        widths = np.bincount(ranked.group).tolist()
        self.left = {name: torch.ones(width, dtype=torch.bool) for name, width in zip(self.names, widths, strict=True)}
        self.starts = np.cumsum([0, *widths])
        self.total = float(cost.exact(self.left))

    def of_each(self, kinds: NDArray[np.int64], channels: NDArray[np.int64]) -> NDArray[np.float64]:  # noqa: ARG002
        return np.array([self.total - float(self.cost.exact(self._without(channel))) for channel in channels.tolist()])

    def remove(self, channel: int) -> None:
        self.left = self._without(channel)
        self.total = float(self.cost.exact(self.left))

    def _without(self, channel: int) -> dict[str, Tensor]:
        group = int(self.kinds[channel])
        mask = self.left[self.names[group]].clone()
        mask[channel - int(self.starts[group])] = False
        return self.left | {self.names[group]: mask}


def _marginals(ranked: _Ranked, cost: Cost) -> _Marginals:
    return _OfLayers(ranked, cost) if isinstance(cost, CostModel | LayerCost) else _OfAny(ranked, cost)


def _greedy(ranked: _Ranked, marginals: _Marginals, enough: float) -> list[int]:
    """Remove the channel of least score per cost, again and again, until the cost is low enough or the guards hold."""
    worst_first = np.lexsort((-np.arange(len(ranked.scores)), ranked.scores))
    queues = [worst_first[marginals.kinds[worst_first] == kind].tolist() for kind in range(marginals.kinds[-1] + 1)]
    group = np.array([ranked.group[queue[0]] for queue in queues])
    heads = np.array([queue[0] for queue in queues])
    at = [0] * len(queues)
    left = np.bincount(ranked.group)
    open_ = left[group] > ranked.floor[group]
    # A channel that costs nothing goes last.
    tiny = np.finfo(np.float64).tiny + 1e-12 * abs(marginals.total)
    removed: list[int] = []
    while marginals.total > enough and open_.any():
        kinds = np.flatnonzero(open_)
        with np.errstate(over="ignore"):
            value = ranked.scores[heads[kinds]] / np.maximum(marginals.of_each(kinds, heads[kinds]), tiny)
        least = kinds[value == value.min()]
        kind = int(least[np.argmax(heads[least])])
        channel = int(heads[kind])
        marginals.remove(channel)
        removed.append(channel)
        at[kind] += 1
        left[group[kind]] -= 1
        if left[group[kind]] <= ranked.floor[group[kind]]:
            open_[group == group[kind]] = False
        if at[kind] == len(queues[kind]):
            open_[kind] = False
        else:
            heads[kind] = queues[kind][at[kind]]
    return removed


def _least(min_channels: int | float, width: int) -> int:
    if isinstance(min_channels, int):
        if min_channels < 1:
            raise ScoresError(f"min_channels={min_channels} would leave a group without a channel; give 1 or more")
        return min(min_channels, width)
    if not 0 <= min_channels <= 1:
        raise ScoresError(f"min_channels={min_channels} is no fraction of a group; give one in [0, 1], or an integer")
    return max(1, math.ceil(min_channels * width))


def _check_fraction(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise BudgetError(f"{name}={value} is no fraction of the dense network's cost; give a number in (0, 1]")


def _check_known(scores: Mapping[str, Tensor], widths: Mapping[str, int]) -> None:
    unknown = sorted(set(scores) - set(widths))
    if unknown:
        raise ScoresError(f"scores of {unknown}: frozen, or no groups; those that may be cut are {list(widths)}")
    for name, own in scores.items():
        if len(own) != widths[name]:
            raise ScoresError(f"scores[{name!r}] are of {len(own)} channels; the group has {widths[name]}")


def _check_numbers(scores: Mapping[str, Tensor]) -> None:
    for name, own in scores.items():
        if own.dim() != 1 or not len(own):
            raise ScoresError(f"scores[{name!r}] have shape {tuple(own.shape)}; give one number for each channel")
        wrong = own.isnan().nonzero().flatten().tolist()
        if wrong:
            raise ScoresError(f"scores[{name!r}] is NaN at channel {wrong[0]} (of {len(wrong)}); find out why first")
