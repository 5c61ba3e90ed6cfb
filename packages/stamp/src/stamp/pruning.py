"""Prune a network for new data: scores, a choice under a budget, a plan; and do masks follow the data? (spec 2.8)."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from shared_core.errors import InputError, UnknownKeyError, no_such
from stamp.baselines import SCORERS, Scorer, meta_pruning
from stamp.counting import CostModel
from stamp.examples import Examples, as_examples, check_fits
from stamp.generator import MaskGenerator
from stamp.latency import LatencyTable, fit_latency, measured_ms
from stamp.meta import SAME, MetaConfig, MetaTrainer
from stamp.metapruning import MetaPruned
from stamp.plan import PrunePlan
from stamp.projection import project
from stamp.selection import Budget, BudgetError, Cost, Mode, normalised, overlap, select, widths_like
from stamp.structure import ChannelGroups
from stamp.surgery import cut
from stamp.training import accuracy, head_name, recalibrate_bn, with_head

__all__ = ["METHODS", "Adaptivity", "Method", "adapt", "adaptivity", "prune"]

Method = str | MaskGenerator | Scorer | Mapping[str, Tensor]
Keep = dict[str, Bool[Tensor, " width"]]

METHODS = ("dense", *SCORERS, "metapruning")
"""Methods that `prune` knows by name; a generator is given as it is."""

_SCORED_AT = 0.25
_MEASURED = 8


def prune(
    model: nn.Module,
    groups: ChannelGroups,
    *,
    method: Method,
    data: object,
    budget: Budget,
    mode: Mode = "budget",
    threshold: float = 0.5,
    round_to: int = 1,
    min_channels: int | float = 0.05,
    sets: int | Literal["auto"] = 10,
    set_size: int = 64,
    adapt_steps: int = 0,
    seed: int = 0,
    head: str | None = None,
    options: Mapping[str, Any] | None = None,
    table: LatencyTable | None = None,
) -> PrunePlan:
    """Decide which channels a network keeps for a data set; the network itself stays as it is.

    Parameters
    ----------
    model : pretrained
    groups : traced from it
    method : a mask generator; a name in `METHODS`; a function ``(model, groups, data, generator)`` that returns scores;
        or scores, by group, higher for what is to stay
    data : of the new task, its training part; whatever `as_examples` takes
    budget : see `Budget`; with ``latency`` or ``latency_ms`` the small network is measured until it holds
    mode, threshold, round_to, min_channels : see `selection.select`
    sets, set_size : that a generator reads; see `MaskGenerator.pi`
    adapt_steps : steps in which a copy of the generator is adapted to the data first (labels are used)
    seed : of sets and of methods that draw
    head : qualified name of the classifier's last layer. Default: the last linear layer
    options : of a named method, e.g. ``{"steps": 100}`` for ``bbdropout``
    table : measured times, for a budget in time. Default: one is built, which takes seconds to minutes

    Returns
    -------
    A plan, to be applied, saved, and checked.

    Raises
    ------
    BudgetError
        For a budget that cannot be reached, with the smallest that can.
    InputError
        For data that do not fit the network, unknown names, or a generator for another network.

    Notes
    -----
    Methods by gradients see the network with a class-mean head for the data's classes. Scores of named methods are
    divided by their group's mean before they are ranked across groups; those of a generator and given ones are not.

    Examples
    --------
    >>> from stamp.groups import trace
    >>> net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> x, y = torch.rand(30, 6), torch.arange(3).repeat(10)
    >>> plan = prune(net, trace(net, x), method="l1", data=(x, y), budget=Budget(macs=0.5))
    >>> plan.widths(), round(plan.ratios["macs"], 3)
    ({'0': 4}, 0.5)
    """
    start = time.perf_counter()
    examples = as_examples(data)
    check_fits(model, examples)
    if isinstance(method, MaskGenerator):
        method.check(groups)
    name = _name(method)
    like = next(iter(model.parameters()), torch.zeros(()))
    example = examples.inputs(slice(0, 1)).to(like)
    head = head_name(model) if head is None else head
    macs = CostModel.macs(model, groups, example)
    params = CostModel.parameters(model, groups)
    if name == "dense":
        return PrunePlan({}, groups, method=name, budget={}, ratios={"macs": 1.0, "params": 1.0}, head=head)
    timed = budget.kind.startswith("latency")
    if timed and table is None:
        batch = examples.inputs(slice(0, 64)).to(like)
        table = LatencyTable.build(model, groups, batch, device=str(like.device))
    cost: Cost = table if timed and table is not None else params if budget.kind == "params" else macs
    share = budget.fraction(table.dense_ms if table is not None else 1.0) if timed else budget.value
    random = torch.Generator().manual_seed(seed)
    notes: list[str] = []
    scores: dict[str, Tensor] = {}
    keep: Keep
    if name == "metapruning":
        tuned, held = examples.split(0.8, seed)
        extra = dict(options or {})
        found = meta_pruning(
            with_head(model, tuned, head=head), groups, tuned, held, cost, share, generator=random, **extra
        )
        keep = {group: mask.cpu() for group, mask in found.keep.items()}
        if timed and table is not None:
            batch = examples.inputs(slice(0, 64)).to(like)
            keep, said = _fast_enough(model, groups, found, extra, share * table.dense_ms, batch)
            notes.append(said)
    else:
        if isinstance(method, MaskGenerator):
            aim = share if budget.kind != "latency_ms" else _SCORED_AT
            expected = params if budget.kind == "params" else macs
            if adapt_steps:
                at = aim if table is None or not timed else _macs_at(method, model, examples, macs, table, share, seed)
                method = adapt(
                    model, method, examples, budget=at, cost=expected, steps=adapt_steps, seed=seed, head=head
                )
            scores = method.pi(
                model, examples, sets=sets, set_size=set_size, cost=expected, budget=aim, generator=random
            )
            spread = _undecided(scores, expected, aim, float(method.settings["temperature"]))
            if spread > 0.1:
                notes.append(f"keep probabilities are not sharp: mean pi (1 - pi) is {spread:.2f}, above 0.1")
        else:
            scores = _scored(model, groups, method, examples, random, head, options)
        scores = {group: value.detach().cpu() for group, value in scores.items()}
        if timed and mode != "threshold":
            target = share * table.dense_ms if table is not None else 0.0
            batch = examples.inputs(slice(0, 64)).to(like)
            fit = fit_latency(
                model, groups, scores, target, batch, cost=table, mode=mode, min_channels=min_channels,
                round_to=round_to, device=str(like.device),
            )  # fmt: skip
            keep = dict(fit.keep)
        else:
            keep = select(
                scores, cost, share, mode=mode, threshold=threshold, min_channels=min_channels, round_to=round_to
            )
    ratios = {"macs": macs.exact(keep) / macs.exact({}), "params": params.exact(keep) / params.exact({})}
    if table is not None:
        ratios["latency"] = table.exact(keep) / table.dense_ms
    return PrunePlan(
        keep,
        groups,
        method=name,
        budget=dict(budget.as_dict()) if mode != "threshold" else {"threshold": threshold},
        ratios=ratios,
        scores=scores,
        head=head,
        gates=scores if name == "stamp" else None,
        seconds=time.perf_counter() - start,
        notes=tuple(notes),
    )


def adapt(
    model: nn.Module,
    generator: MaskGenerator,
    data: Examples,
    *,
    budget: float,
    cost: CostModel | None = None,
    steps: int = 20,
    lr: float = 1e-3,
    seed: int = 0,
    head: str | None = None,
) -> MaskGenerator:
    """Adapt a copy of a generator to a data set in a few gradient steps (spec 2.8, step 2).

    Parameters
    ----------
    model : the network
    generator : meta-trained; stays as it is
    data : of the new task, whose labels are used
    budget : share of the cost
    cost : as `counting.CostModel` makes it. Default: multiply-adds
    steps : of Adam
    lr : its learning rate
    seed : of the examples drawn
    head : qualified name of the network's last layer

    Returns
    -------
    The adapted copy.
    """
    adapted = copy.deepcopy(generator)
    final = float(generator.settings["temperature"])
    config = MetaConfig(
        iters=steps,
        tasks=1,
        ways=(data.num_classes, data.num_classes) if data.num_classes > 1 else (2, 2),
        lr=lr,
        own_lr=lr,
        # Gates as it was trained with, near the end of that training.
        gates="concrete" if final == 1 else "annealed",
        temperature=(0.3, 0.1) if final == 1 else (3 * final, final),
        budgets=(budget, budget),
        jitter=False,
        seed=seed,
    )
    MetaTrainer(model, adapted, data, head=head, cost=cost, config=config).fit()
    return adapted


def _fast_enough(
    model: nn.Module,
    groups: ChannelGroups,
    found: MetaPruned,
    options: Mapping[str, Any],
    target: float,
    batch: Tensor,
) -> tuple[Keep, str]:
    """Return the most accurate of a search's candidates that is measured to take no longer than asked, and its time."""
    names = groups.widths()
    ranked: Mapping[str, Tensor] = options.get("scores") or {
        name: -torch.arange(width) for name, width in names.items()
    }
    fastest = float("inf")
    for widths in sorted(found.tried, key=lambda widths: -found.tried[widths])[:_MEASURED]:
        keep = widths_like(ranked, dict(zip(names, widths, strict=True)))
        took = measured_ms(cut(model, groups, keep), batch, device=str(batch.device))
        if took <= target:
            return keep, f"{took:.3g} ms measured for {target:.3g} asked"
        fastest = min(fastest, took)
    raise BudgetError(
        f"metapruning: of its {min(_MEASURED, len(found.tried))} best candidates the fastest was measured to take"
        f" {fastest:.3g} ms, and {target:.3g} were asked for; ask for less than that, its widths are searched by"
        " predicted times"
    )


def _macs_at(
    generator: MaskGenerator,
    model: nn.Module,
    data: Examples,
    macs: CostModel,
    table: LatencyTable,
    share: float,
    seed: int,
) -> float:
    """Return the share of the multiply-adds that goes with a share of the time, in what the generator would cut."""
    random = torch.Generator().manual_seed(seed)
    scores = generator.pi(model, data, sets=1, cost=macs, budget=_SCORED_AT, generator=random)
    try:
        keep = select(scores, table, share)
    except BudgetError as error:
        keep = select(scores, table, error.smallest or 1.0)
    return macs.exact(keep) / macs.exact({})


def _undecided(pi: Mapping[str, Tensor], cost: CostModel, budget: float, temperature: float) -> float:
    """Return the mean of ``pi (1 - pi)`` at the temperature with which the generator's training ended."""
    if temperature != 1:
        # What is averaged over sets is not the sigmoid of logits any more, but nearly so where sets agree.
        logits = {name: torch.logit(value.double(), eps=1e-9) for name, value in pi.items()}
        pi = project(logits, cost, budget, temperature=temperature)[0]
    return float(torch.cat([value * (1 - value) for value in pi.values()]).mean())


def _name(method: Method) -> str:
    if isinstance(method, MaskGenerator):
        return "stamp" if method.settings["head"] != "free" else "free-transferred"
    if isinstance(method, str):
        if method not in METHODS:
            raise UnknownKeyError(f"{no_such('method', method, METHODS, where='method')}, and generators")
        return method
    return "scores" if isinstance(method, Mapping) else getattr(method, "__name__", "callable")


def _scored(
    model: nn.Module,
    groups: ChannelGroups,
    method: str | Scorer | Mapping[str, Tensor],
    data: Examples,
    random: torch.Generator,
    head: str,
    options: Mapping[str, Any] | None,
) -> dict[str, Tensor]:
    if isinstance(method, Mapping):
        return dict(method)
    scorer = cast("Callable[..., dict[str, Tensor]]", SCORERS[method] if isinstance(method, str) else method)
    scores = scorer(with_head(model, data, head=head), groups, data, random, **dict(options or {}))
    return normalised(scores) if isinstance(method, str) and method not in ("random", "bbdropout", "free") else scores


@dataclass(frozen=True)
class Adaptivity:
    """Whether the masks made for data sets are theirs.

    Parameters
    ----------
    accuracy : by data set, by mask, in [0, 1]: ``own``, the mean over ``other`` data sets' masks, ``dense``, and the
        baselines, all at the widths of the own mask
    swapped : by data set, by the data set whose mask was used
    overlaps : of two data sets, the intersection over union of what their masks keep, by group
    keep : the masks
    """

    accuracy: dict[str, dict[str, float]]
    swapped: dict[str, dict[str, float]]
    overlaps: dict[tuple[str, str], dict[str, float]]
    keep: dict[str, Keep] = field(repr=False)

    @property
    def mean_overlap(self) -> float:
        """Mean over pairs and groups; nan for a single data set."""
        values = [value for found in self.overlaps.values() for value in found.values()]
        return sum(values) / len(values) if values else float("nan")

    @property
    def ignored(self) -> bool:
        """Whether the generator ignores its input: masks of different data sets overlap by more than 0.95."""
        return self.mean_overlap > SAME

    def table(self) -> str:
        """Write the accuracies in percent, a line a data set."""
        masks = list(next(iter(self.accuracy.values())))
        width = max(map(len, self.accuracy))
        lines = [" ".join([" " * width, *(f"{mask:>8}" for mask in masks)])]
        for name, row in self.accuracy.items():
            lines.append(" ".join([name.ljust(width), *(f"{100 * row[mask]:8.1f}" for mask in masks)]))
        return "\n".join(lines)


def adaptivity(
    model: nn.Module,
    groups: ChannelGroups,
    generator: MaskGenerator | Mapping[str, Mapping[str, Tensor]],
    sets: Mapping[str, tuple[Examples, Examples]],
    budget: float = 0.25,
    *,
    baselines: Sequence[str] = ("random", "l1", "bn", "act", "snip"),
    draws: int = 10,
    recalibrate: bool = True,
    keep_head: bool = False,
    classes: Mapping[str, Sequence[int]] | None = None,
    masks: int = 10,
    min_channels: int | float = 0.05,
    only: Sequence[str] | None = None,
    seed: int = 0,
) -> Adaptivity:
    """Measure each data set with its own mask, with the masks of the others, and with baselines at equal widths.

    Nothing is fine-tuned. Other masks keep what their scores rank highest at the own mask's widths, so that only the
    choice of channels differs.

    Parameters
    ----------
    model : pretrained
    groups : traced from it
    generator : meta-trained; or scores ``(width,)`` by data set and group
    sets : by name, training and test examples
    budget : share of the multiply-adds
    baselines : named methods
    draws : of random masks
    recalibrate : batch norms' statistics, on the data's training part, for every mask alike
    keep_head : classify by the network's own head (its classes are then the labels); else by class means
    classes : with `keep_head`, the only classes that compete, by data set
    masks : sets that the generator reads
    min_channels : the least to keep of each group, see `selection.select`
    only : data sets to measure; those left out lend their masks to ``other``. Default: all
    seed : of everything drawn

    Raises
    ------
    InputError
        For no data sets, or data that do not fit.
    """
    if not sets:
        raise InputError("sets: give at least one data set, as {name: (train, test)}")
    for pair in sets.values():
        for data in pair:
            check_fits(model, data)
    random = torch.Generator().manual_seed(seed)
    first = next(iter(sets.values()))[0]
    like = next(iter(model.parameters()), torch.zeros(()))
    cost = CostModel.macs(model, groups, first.inputs(slice(0, 1)).to(like))
    scores: dict[str, dict[str, Tensor]] = {}
    for name, (train, _) in sets.items():
        if isinstance(generator, MaskGenerator):
            found = generator.pi(model, train, sets=masks, cost=cost, budget=budget, generator=random)
        else:
            found = generator[name]
        scores[name] = {group: value.detach().cpu() for group, value in found.items()}
    keeps = {name: select(found, cost, budget, min_channels=min_channels) for name, found in scores.items()}
    head = head_name(model)
    table: dict[str, dict[str, float]] = {}
    swapped: dict[str, dict[str, float]] = {}

    for name, (train, test) in sets.items():
        if only is not None and name not in only:
            continue
        widths = {group: int(mask.sum()) for group, mask in keeps[name].items()}
        rivals = None if classes is None else classes[name]

        def judged(
            keep: Mapping[str, Tensor], train: Examples = train, test: Examples = test, rivals: Any = rivals
        ) -> float:
            small = cut(model, groups, keep)
            if recalibrate:
                recalibrate_bn(small, train, seed=seed)
            if not keep_head:
                small = with_head(small, train, head=head, inplace=True)
            return accuracy(small, test, classes=rivals)

        row = {"dense": judged({}), "own": judged(keeps[name])}
        swapped[name] = {
            other: row["own"] if other == name else judged(widths_like(found, widths))
            for other, found in scores.items()
        }
        others = [value for other, value in swapped[name].items() if other != name]
        row["other"] = sum(others) / len(others) if others else float("nan")
        scored = model if keep_head or not baselines else with_head(model, train, head=head)
        for baseline in baselines:
            times = draws if baseline == "random" else 1
            values = [
                judged(widths_like(SCORERS[baseline](scored, groups, train, random), widths)) for _ in range(times)
            ]
            row[baseline] = sum(values) / times
        table[name] = row
    names = list(sets)
    overlaps = {(a, b): overlap(keeps[a], keeps[b]) for k, a in enumerate(names) for b in names[k + 1 :]}
    return Adaptivity(table, swapped, overlaps, keeps)
