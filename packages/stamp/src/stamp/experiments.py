"""What is compared: networks trained on one set, cut for another by every method, tuned and measured alike (spec 8)."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Literal, TypedDict

import numpy as np
import torch
from torch import Tensor, nn

from shared_core.device import World, one_thread
from shared_core.errors import InputError, UnknownKeyError, no_such
from shared_core.runs import Claim, Result, Run, interval, summarize
from stamp.baselines import SCORERS, edge_popup
from stamp.encoders import EncoderName
from stamp.examples import Examples
from stamp.generator import MaskGenerator
from stamp.groups import trace
from stamp.heads import HeadName
from stamp.meta import MetaConfig, MetaHistory, MetaStep, MetaTrainer
from stamp.models import open_model
from stamp.plan import PrunePlan
from stamp.pruning import prune
from stamp.selection import Budget, overlap, widths_like
from stamp.sources import Split, read_examples
from stamp.structure import ChannelGroups
from stamp.surgery import cut
from stamp.tasks import jittered
from stamp.timing import Measure, call_ms, time_together
from stamp.training import EpochEnd, History, accuracy, finetune, recalibrate_bn

__all__ = [
    "DENSE",
    "FREE",
    "METHODS",
    "OTHER",
    "STAMP",
    "Backbone",
    "Cell",
    "Comparison",
    "Protocol",
    "Target",
    "TotalTime",
    "Varied",
    "ablate",
    "check_methods",
    "compare",
    "fit_generator",
    "latencies",
    "load_target",
    "make_backbone",
    "paired",
    "pretrain",
    "rapid",
    "table_of",
    "total_time",
    "variants",
]

DENSE, STAMP = "dense", "stamp"
OTHER = "other-set"
"""The generator's masks of other data sets, at the widths that it gives the new one."""
FREE = "meta-free"
"""Gates meta-fitted like the generator, but without looking at data: one mask for all."""

METHODS = (DENSE, STAMP, OTHER, FREE, *SCORERS, "metapruning", "edge-popup")
"""What can be compared; ``<scorer>@stamp`` ranks channels by the scorer at the widths that the generator chose."""

_RANDOM = "random"
_POPUP = "edge-popup"
_AT = "@stamp"


@dataclass(frozen=True)
class Protocol:
    """What methods that are compared have in common.

    Parameters
    ----------
    model, width : network and factor on its channels, see `stamp.networks.factory`
    size, channels : of the images; None leaves a source as it is
    pretrain_steps, pretrain_lr : of the network on the reference
    pretrain_jitter : show half of the batches turned, scaled or in other contrast, as meta-tasks are
    meta : of the generator's training
    encoder, head, pseudo, labels : of the generator
    sets, set_size : that the generator reads of the new data
    lr, lrs : of fine-tuning; the rates to choose from where it is tuned
    batch_size : of fine-tuning
    draws, tuned_draws : of random masks, and how many of them are fine-tuned
    test_limit : most examples for validation, and for tests
    latency_batch, repeats : examples of a batch that is timed, and how often
    """

    model: str = "smallconv"
    width: float = 1.0
    size: int | None = 16
    channels: Literal[1, 3] | None = 1
    pretrain_steps: int = 400
    pretrain_lr: float = 0.1
    pretrain_jitter: bool = True
    meta: MetaConfig = field(default_factory=MetaConfig)
    encoder: EncoderName = "instances"
    head: HeadName = "channel"
    pseudo: int = 32
    labels: bool = False
    sets: int = 10
    set_size: int = 64
    lr: float = 0.01
    lrs: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1)
    batch_size: int = 64
    draws: int = 10
    tuned_draws: int = 3
    test_limit: int | None = 2000
    latency_batch: int = 64
    repeats: int = 20

    def alone(self, device: torch.device | str) -> AbstractContextManager[None]:
        """Keep small networks to one thread: a second would only wait.

        Parameters
        ----------
        device : where
        """
        return one_thread(self.model == "smallconv" and str(device) == "cpu")


@dataclass(frozen=True, eq=False)
class Target:
    """A data set in three parts: to train on, to choose by, and to report.

    Parameters
    ----------
    train, validation, test : of the same classes, without a common example
    """

    train: Examples
    validation: Examples
    test: Examples

    @property
    def name(self) -> str:
        """What to call it."""
        return self.train.name


def load_target(
    source: str,
    protocol: Protocol,
    *,
    seed: int = 0,
    classes: int | Sequence[str] | None = None,
    limit: int | None = None,
    instances: int | None = None,
) -> Target:
    """Read the three parts of a source.

    Parameters
    ----------
    source : see `stamp.sources.read_examples`
    protocol : size and channels, and how many examples to test on at most
    seed : of splits that are drawn, and of what is limited
    classes, instances : see `stamp.sources.read_examples`
    limit : most training examples
    """

    def part(split: Split, most: int | None) -> Examples:
        return read_examples(
            source, split=split, size=protocol.size, channels=protocol.channels, seed=seed, classes=classes,
            instances=instances, limit=most,
        )  # fmt: skip

    return Target(part("train", limit), part("validation", protocol.test_limit), part("test", protocol.test_limit))


# ---- a backbone and its generators


def pretrain(
    model: nn.Module,
    data: Examples,
    *,
    steps: int,
    lr: float = 0.1,
    batch_size: int = 64,
    jitter: bool = False,
    validation: Examples | None = None,
    seed: int = 0,
    state: Mapping[str, Any] | None = None,
    on_epoch: Callable[[EpochEnd], None] | None = None,
    world: World | None = None,
) -> History:
    """Train a network on a reference set, in place.

    Parameters
    ----------
    model : with an output for each class
    data : the reference's training part
    steps, lr, batch_size, seed, state, on_epoch, world : see `stamp.training.finetune`
    jitter : show half of the batches through a random transform, see `stamp.tasks.jittered`
    validation : to judge by after each epoch
    """
    shown = replace(data, transform=_seen_differently(data)) if jitter else data
    return finetune(
        model, shown, validation, steps=steps, lr=lr, batch_size=batch_size, seed=seed, state=state, on_epoch=on_epoch,
        world=world,
    )  # fmt: skip


def _seen_differently(data: Examples) -> Callable[[Tensor], Tensor]:
    own = data.transform

    def transform(x: Tensor) -> Tensor:
        x = x if own is None else own(x)
        # `finetune` seeds torch's own generator for each epoch, and gives it back.
        random = torch.default_generator
        return jittered(x, random) if float(torch.rand((), generator=random)) < 0.5 else x

    return transform


def fit_generator(
    model: nn.Module,
    groups: ChannelGroups,
    reference: Examples | Sequence[Examples],
    protocol: Protocol,
    *,
    seed: int = 0,
    head: HeadName | None = None,
    state: Mapping[str, Any] | None = None,
    on_step: Callable[[MetaStep], None] | None = None,
) -> tuple[MaskGenerator, MetaHistory]:
    """Make a generator for a network and meta-train it.

    Parameters
    ----------
    model, groups : the network and its groups; it stays as it is
    reference : what tasks are drawn from
    protocol : of the generator and its training
    seed : of both
    head : instead of the protocol's
    state, on_step : see `stamp.meta.MetaTrainer.fit`
    """
    head = protocol.head if head is None else head
    first = reference if isinstance(reference, Examples) else reference[0]
    # What reads nothing needs nothing to be encoded.
    encoder: EncoderName = "instances" if head == "free" else protocol.encoder
    generator = MaskGenerator(
        groups, encoder=encoder, head=head, pseudo=protocol.pseudo, labels=protocol.labels and head == "channel",
        input_shape=first.shape, seed=seed,
    )  # fmt: skip
    generator.to(next(model.parameters()).device)
    config = protocol.meta.model_copy(update={"seed": seed})
    if head == "free":
        # One mask for all tasks has no rivals.
        config = config.model_copy(update={"swap": 0.0})
    history = MetaTrainer(model, generator, reference, config=config).fit(state=state, on_step=on_step)
    return generator.eval(), history


@dataclass(frozen=True, eq=False)
class Backbone:
    """A trained network and what was meta-fitted for it.

    Parameters
    ----------
    model, groups : the network in evaluation mode, and its groups
    generators : by name of the method, `STAMP` and `FREE`
    accuracy : on the reference's test part, in [0, 1]; None where that is unknown
    seconds : of ``pretrain`` and of each generator
    """

    model: nn.Module
    groups: ChannelGroups
    generators: Mapping[str, MaskGenerator] = field(default_factory=dict[str, MaskGenerator])
    accuracy: float | None = None
    seconds: Mapping[str, float] = field(default_factory=dict[str, float])


def make_backbone(
    reference: Target,
    protocol: Protocol,
    *,
    seed: int = 0,
    methods: Sequence[str] = (STAMP,),
    model: nn.Module | None = None,
    generator: Callable[[ChannelGroups], MaskGenerator] | None = None,
    device: torch.device | str = "cpu",
) -> Backbone:
    """Train a network on the reference, and the generators that methods need.

    Parameters
    ----------
    reference : of both trainings
    protocol : of both
    seed : of all
    methods : that are to be compared
    model : trained already
    generator : loads one that is fitted already
    device : where
    """
    seconds: dict[str, float] = {}
    found: float | None = None
    start = time.perf_counter()
    if model is None:
        model = open_model(
            protocol.model, num_classes=reference.train.num_classes, in_channels=reference.train.shape[0],
            width=protocol.width, seed=seed,
        ).to(device)  # fmt: skip
        pretrain(
            model, reference.train, steps=protocol.pretrain_steps, lr=protocol.pretrain_lr,
            jitter=protocol.pretrain_jitter, seed=seed,
        )  # fmt: skip
        seconds["pretrain"] = time.perf_counter() - start
        found = accuracy(model, reference.test)
    model = model.to(device).eval()
    groups = trace(model, reference.train.inputs(slice(0, 2)))
    generators: dict[str, MaskGenerator] = {}
    for name in _needed(methods):
        start = time.perf_counter()
        if name == STAMP and generator is not None:
            generators[name] = generator(groups).to(device)
        else:
            head = "free" if name == FREE else None
            generators[name], _ = fit_generator(model, groups, reference.train, protocol, seed=seed, head=head)
        seconds[name] = time.perf_counter() - start
    return Backbone(model, groups, generators, found, seconds)


def _needed(methods: Sequence[str]) -> list[str]:
    own = any(name in (STAMP, OTHER) or name.endswith(_AT) for name in methods)
    return [STAMP] * own + [FREE] * (FREE in methods)


def check_methods(methods: Sequence[str]) -> tuple[str, ...]:
    """Return each method once.

    Parameters
    ----------
    methods : of `METHODS`, or ``<scorer>@stamp``

    Raises
    ------
    UnknownKeyError
        For one that does not exist.
    """
    for name in methods:
        base = name.removesuffix(_AT)
        if base not in METHODS or (base != name and base not in SCORERS):
            wrong = no_such("method", name, METHODS, where="methods")
            raise UnknownKeyError(f"{wrong}, and scorers at the generator's widths, such as l1{_AT}")
    if not methods:
        raise InputError("methods: need at least one")
    return tuple(dict.fromkeys(methods))


# ---- one network, cut and tuned


class Cell(TypedDict):
    """What one method did for one data set, at one budget and under one seed; plain JSON.

    ``accuracy`` in [0, 1] by the number of steps of fine-tuning, ``ratios`` to the dense network, ``widths`` of each
    group: kept and whole. ``ms`` is filled in later, when networks are timed together.
    """

    accuracy: dict[str, float]
    ratios: dict[str, float]
    widths: dict[str, list[int]]
    mask_seconds: float
    tune_seconds: float
    lr: float


class _Bench:
    """One data set at one budget under one seed: what the methods share."""

    def __init__(
        self,
        backbone: Backbone,
        target: Target,
        others: Sequence[Examples],
        budget: Budget,
        protocol: Protocol,
        seed: int,
    ) -> None:
        self.backbone, self.target, self.others = backbone, target, others
        self.budget, self.protocol, self.seed = budget, protocol, seed

    @cached_property
    def own(self) -> PrunePlan:
        """The generator's plan for the data set."""
        return self._plan(self.backbone.generators[STAMP], self.target.train)

    def plans(self, method: str) -> Iterator[PrunePlan]:
        """Make a method's plans; several where it is random, or where there are several other sets."""
        if method == STAMP:
            yield self._plan(self.backbone.generators[STAMP], self.target.train)
        elif method == OTHER:
            for data in self.others:
                yield self._at_own_widths(self._plan(self.backbone.generators[STAMP], data))
        else:
            base = method.removesuffix(_AT)
            by = self.backbone.generators[FREE] if base == FREE else base
            for number in range(self.protocol.draws if base == _RANDOM else 1):
                plan = self._plan(by, self.target.train, self.seed + 1000 * number)
                yield plan if base == method else self._at_own_widths(plan)

    def plan_by(self, generator: str, data: Examples) -> PrunePlan:
        """Make a generator's plan for other data."""
        return self._plan(self.backbone.generators[generator], data)

    def _plan(self, method: str | MaskGenerator, data: Examples, seed: int | None = None) -> PrunePlan:
        # Gates that are trained here must know what they are trained for.
        options = {"keep": self.budget.value} if method == "free" and self.budget.kind != "latency_ms" else None
        return prune(
            self.backbone.model, self.backbone.groups, method=method, data=data, budget=self.budget, options=options,
            sets=self.protocol.sets, set_size=self.protocol.set_size, seed=self.seed if seed is None else seed,
        )  # fmt: skip

    def _at_own_widths(self, plan: PrunePlan) -> PrunePlan:
        keep = widths_like(plan.scores, self.own.widths())
        return replace(plan, keep=keep, ratios=self.own.ratios, seconds=plan.seconds)

    def cut(self, plan: PrunePlan) -> nn.Module:
        """Cut the network, with statistics of the new data and a head of its class means."""
        return plan.apply(self.backbone.model, data=self.target.train, recalibrate=True)

    def tuned(self, small: nn.Module, steps: int, lr: float) -> tuple[nn.Module, float]:
        """Fine-tune a copy, and return it with the seconds that took."""
        small = copy.deepcopy(small)
        if not steps:
            return small, 0.0
        history = finetune(
            small, self.target.train, steps=steps, lr=lr, batch_size=self.protocol.batch_size, seed=self.seed
        )
        return small, history.seconds


def _measured(bench: _Bench, method: str, steps: Sequence[int], lr: float) -> Cell:
    """Cut by a method, fine-tune, and test."""
    if method == _POPUP:
        return _popup(bench, steps)
    right: dict[int, list[float]] = {count: [] for count in steps}
    plans: list[PrunePlan] = []
    seconds = 0.0
    for number, plan in enumerate(bench.plans(method)):
        plans.append(plan)
        small = bench.cut(plan)
        for count in steps:
            if count and number >= bench.protocol.tuned_draws:
                continue
            network, taken = bench.tuned(small, count, lr)
            right[count].append(accuracy(network, bench.target.test))
            seconds = max(seconds, taken)
    widths = bench.backbone.groups.widths()
    return {
        "accuracy": {str(count): float(np.mean(values)) for count, values in right.items()},
        "ratios": {name: float(np.mean([plan.ratios[name] for plan in plans])) for name in plans[0].ratios},
        "widths": {name: [kept, widths[name]] for name, kept in plans[0].widths().items()},
        "mask_seconds": float(np.mean([plan.seconds for plan in plans])),
        "tune_seconds": seconds,
        "lr": lr,
    }


def _popup(bench: _Bench, steps: Sequence[int]) -> Cell:
    """Train scores of single weights instead of weights, for as many steps; nothing becomes faster."""
    dense = bench.cut(next(bench.plans(DENSE)))
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(bench.seed)
    right: dict[str, float] = {}
    kept = 1.0
    for count in steps:
        found = edge_popup(
            dense, bench.target.train, bench.budget.value, generator=generator, steps=count,
            batch_size=bench.protocol.batch_size,
        )  # fmt: skip
        right[str(count)] = accuracy(found.model, bench.target.test)
        kept = found.kept / found.total
    return {
        "accuracy": right,
        "ratios": {"macs": 1.0, "params": kept},
        "widths": {name: [width, width] for name, width in bench.backbone.groups.widths().items()},
        "mask_seconds": 0.0,
        "tune_seconds": time.perf_counter() - start,
        "lr": 0.1,
    }


def _best_lr(bench: _Bench, method: str, steps: int) -> float:
    """Choose a rate by the accuracy on validation examples."""
    small = bench.cut(next(bench.plans(method)))
    found = [accuracy(bench.tuned(small, steps, lr)[0], bench.target.validation) for lr in bench.protocol.lrs]
    return bench.protocol.lrs[int(np.argmax(found))]


def latencies(
    model: nn.Module,
    groups: ChannelGroups,
    widths: Mapping[str, Mapping[str, int]],
    shape: Sequence[int],
    *,
    batch_size: int = 64,
    repeats: int = 20,
    measure: Measure = call_ms,
) -> dict[str, float]:
    """Time networks of given widths together.

    Parameters
    ----------
    model, groups : the dense network, which is timed as `DENSE`
    widths : of each network, by name: channels of each group
    shape : of one input
    batch_size : inputs of a batch
    repeats : passes of each network that count
    measure : see `stamp.timing.time_together`

    Returns
    -------
    Median milliseconds of a batch. Networks of the same widths are one network.
    """
    wide = groups.widths()
    kinds: dict[str, tuple[int, ...]] = {DENSE: tuple(wide.values())}
    kinds |= {name: tuple(own[group] for group in wide) for name, own in widths.items()}
    networks: dict[str, nn.Module] = {}
    for kind in dict.fromkeys(kinds.values()):
        keep = {name: torch.arange(width) < kept for (name, width), kept in zip(wide.items(), kind, strict=True)}
        networks[str(kind)] = cut(model, groups, keep)
    like = next(model.parameters())
    example = torch.rand(batch_size, *shape, generator=torch.Generator().manual_seed(0)).to(like)
    timings = time_together(networks, example, warmup=min(5, repeats), repeats=repeats, measure=measure)
    return {name: timings.p50(str(kind)) for name, kind in kinds.items()}


# ---- comparisons

Cells = dict[str, dict[str, dict[int, Cell]]]
"""By data set (with the budget), method and seed."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """What a comparison found.

    Parameters
    ----------
    results : rows of the table
    claims : the generator held against each other method
    cells : by data set with its budget, method and seed
    ms : milliseconds of a batch, by data set and method
    backbones : accuracy on the reference and seconds of each training, by seed
    """

    results: list[Result]
    claims: list[Claim]
    cells: Cells
    ms: dict[str, dict[str, float]]
    backbones: dict[int, dict[str, Any]]


def _silent(note: str, steps: int) -> None:
    del note, steps


def compare(
    run: Run,
    prepare: Callable[[int], Backbone],
    targets: Mapping[str, Callable[[int], Target]],
    *,
    methods: Sequence[str],
    budgets: Sequence[Budget],
    seeds: Sequence[int],
    protocol: Protocol,
    steps: Sequence[int] = (0, 100),
    others: Callable[[int], Sequence[Examples]] | None = None,
    tuned: bool = False,
    on_seed: Callable[[Run, int, Callable[[], Backbone]], str] | None = None,
    device: torch.device | str = "cpu",
    advance: Callable[[str, int], None] = _silent,
) -> Comparison:
    """Cut a network for new data by every method, at every budget and under every seed, and test all alike.

    Parameters
    ----------
    run : keeps what is done, so that an interrupted comparison repeats only the piece it was in; its workers take a
        seed each
    prepare : makes the backbone of a seed
    targets : makes each data set of a seed, by name
    methods : see `METHODS`
    budgets : of the small networks
    seeds : of backbones, generators, splits, masks and fine-tuning
    protocol : what is common to all
    steps : numbers of fine-tuning steps, each a training of its own; 0 tests right after cutting
    others : data sets of a seed whose masks `OTHER` takes
    tuned : choose each method's rate of fine-tuning on validation examples under the first seed, of the same few rates
    on_seed : called after each seed with the run, the seed, and what gives its backbone; returns a note
    device : where
    advance : called with a note and the number of cells done
    """
    methods = check_methods(methods)
    steps = sorted(set(steps))
    if not seeds or not budgets or not steps or not targets:
        raise InputError("seeds, budgets, steps, targets: need at least one of each")
    cells: Cells = {}
    ms: dict[str, dict[str, float]] = {}
    backbones: dict[int, dict[str, Any]] = {}
    backbone_of, target_of = _latest(prepare), {name: _latest(make) for name, make in targets.items()}
    others_of = _latest(others or (lambda _: ()))

    def of_seed(run: Run, seed: int, advance: Callable[[str, int], None] = _silent) -> None:
        def facts() -> dict[str, Any]:
            with protocol.alone(device):
                found = backbone_of(seed)
            return {"accuracy": found.accuracy, "seconds": dict(found.seconds)}

        backbones[seed] = run.once(f"backbone/{seed}", facts)
        for name in targets:
            for budget in budgets:
                label = _label(name, budget, many=len(budgets) > 1)

                def bench(name: str = name, budget: Budget = budget) -> _Bench:
                    target = target_of[name](seed)
                    return _Bench(backbone_of(seed), target, others_of(seed), budget, protocol, seed)

                for method in methods:

                    def rate(method: str = method, bench: Callable[[], _Bench] = bench) -> float:
                        with protocol.alone(device):
                            return _best_lr(bench(), method, steps[-1])

                    def compute(
                        method: str = method, label: str = label, bench: Callable[[], _Bench] = bench, rate: Any = rate
                    ) -> Cell:
                        choose = tuned and method != _POPUP and steps[-1] > 0
                        lr = run.once(f"lr/{label}/{method}", rate) if choose else protocol.lr
                        with protocol.alone(device):
                            return _measured(bench(), method, steps, lr)

                    # The dense network is the same whatever the budget.
                    key = f"{name if method == DENSE else label}/{method}/{seed}"
                    cell = run.once(key, compute)
                    cells.setdefault(label, {}).setdefault(method, {})[seed] = cell
                    advance(f"{label}, {method}: {100 * cell['accuracy'][str(steps[-1])]:.1f} %", 1)
                if seed == seeds[0]:

                    def times(label: str = label, bench: Callable[[], _Bench] = bench) -> dict[str, float]:
                        with protocol.alone(device):
                            return _times(bench(), {method: own[seeds[0]] for method, own in cells[label].items()})

                    ms[label] = run.once(f"ms/{label}", times)
        if on_seed is not None:
            advance(on_seed(run, seed, lambda: backbone_of(seed)), 1)

    ahead: set[str] = set()

    def told(name: str) -> None:
        ahead.add(name)
        advance(f"seed {name}", len(targets) * len(budgets) * len(methods) + (on_seed is not None))

    # A seed's cells share its backbone, which takes longer than they do. Rates that are chosen under the first seed
    # are those of all others.
    parts = {str(seed): partial(of_seed, seed=seed) for seed in seeds}
    first = {str(seeds[0]): parts.pop(str(seeds[0]))} if tuned else {}
    run.spread_parts(first, told)
    run.spread_parts(parts, told)
    for seed in seeds:
        of_seed(run, seed, _silent if str(seed) in ahead else advance)
    results = _rows(cells, ms, backbones, steps, protocol)
    claims = paired(cells, steps[-1])
    return Comparison(results, claims, cells, ms, backbones)


def _latest(make: Callable[[int], Any]) -> Callable[[int], Any]:
    """Make what belongs to a seed when it is first asked for, and keep it until another seed is."""
    kept: dict[int, Any] = {}

    def get(seed: int) -> Any:
        if seed not in kept:
            kept.clear()
            kept[seed] = make(seed)
        return kept[seed]

    return get


_COSTS = {"macs": "multiply-adds", "params": "parameters", "latency": "time"}


def _label(name: str, budget: Budget, *, many: bool = True) -> str:
    if not many:
        return name
    if budget.kind == "latency_ms":
        return f"{name}, {budget.value:g} ms"
    return f"{name}, {100 * budget.value:g} % of {_COSTS[budget.kind]}"


def _times(bench: _Bench, cells: Mapping[str, Cell]) -> dict[str, float]:
    widths = {method: {name: kept for name, (kept, _) in cell["widths"].items()} for method, cell in cells.items()}
    return latencies(
        bench.backbone.model, bench.backbone.groups, widths, bench.target.train.shape,
        batch_size=bench.protocol.latency_batch, repeats=bench.protocol.repeats,
    )  # fmt: skip


def _said(steps: int) -> str:
    return f"accuracy after {steps} steps" if steps else "accuracy after cutting"


def _rows(
    cells: Cells,
    ms: Mapping[str, Mapping[str, float]],
    backbones: Mapping[int, Mapping[str, Any]],
    steps: Sequence[int],
    protocol: Protocol,
) -> list[Result]:
    found: list[Result] = []
    for label, methods in cells.items():

        def row(
            method: str,
            metric: str,
            values: Sequence[float],
            unit: str,
            better: Literal["lower", "higher"],
            label: str = label,
            methods: Mapping[str, Mapping[int, Cell]] = methods,
        ) -> None:
            seconds = sum(cell["mask_seconds"] + cell["tune_seconds"] for cell in methods[method].values())
            found.append(
                summarize(
                    values, dataset=label, method=method, metric=metric, unit=unit, better=better, seconds=seconds
                )
            )

        def each(
            metric: str,
            unit: str,
            value: Callable[[Cell], float],
            *,
            better: Literal["lower", "higher"],
            methods: Mapping[str, Mapping[int, Cell]] = methods,
            row: Callable[[str, str, Sequence[float], str, Literal["lower", "higher"]], None] = row,
        ) -> None:
            for method, by_seed in methods.items():
                row(method, metric, [value(cell) for cell in by_seed.values()], unit, better)

        for count in steps:
            each(_said(count), "%", lambda cell, n=str(count): 100 * cell["accuracy"][n], better="higher")
        each("multiply-adds", "% of dense", lambda cell: 100 * cell["ratios"]["macs"], better="lower")
        for method in methods:
            row(method, f"batch of {protocol.latency_batch}", [ms[label][method]], "ms", "lower")
        each("mask", "s", lambda cell: cell["mask_seconds"], better="lower")
        if steps[-1]:
            each("fine-tuning", "s", lambda cell: cell["tune_seconds"], better="lower")
    first = next(iter(cells))
    for name in dict.fromkeys(name for facts in backbones.values() for name in facts["seconds"]):
        values = [facts["seconds"][name] for facts in backbones.values()]
        metric = "pretraining, once a backbone" if name == "pretrain" else "meta-fitting, once a backbone"
        method = "backbone" if name == "pretrain" else name
        found.append(
            summarize(
                values, dataset=first, method=method, metric=metric, unit="s", better="lower", seconds=sum(values)
            )
        )
    return found


def paired(cells: Cells, steps: int, ours: str = STAMP, others: Sequence[str] | None = None) -> list[Claim]:
    """Hold our method against others under the same seeds, with 95 % intervals where there are several.

    Parameters
    ----------
    cells : of a comparison
    steps : of fine-tuning
    ours : method to hold against the others
    others : methods. Default: all, but the dense network
    """
    claims: list[Claim] = []
    for label, methods in cells.items():
        for other in methods if others is None else others:
            shared = [seed for seed in methods.get(other, {}) if seed in methods.get(ours, {})]
            if other in (ours, DENSE, _POPUP) or not shared:
                continue
            apart = [_points(methods[ours][seed], steps) - _points(methods[other][seed], steps) for seed in shared]
            claims.append(_claim(f"{ours} is more accurate than {other} {_when(steps)} ({label})", apart))
    return claims


def _points(cell: Cell, steps: int) -> float:
    return 100 * cell["accuracy"][str(steps)]


def _when(steps: int) -> str:
    return f"after {steps} steps" if steps else "right after cutting"


def _claim(text: str, apart: Sequence[float], source: str = "this project") -> Claim:
    mean, low, high = interval(apart)
    spread = "one seed" if low is None or high is None else f"{low:+.1f} to {high:+.1f} over {len(apart)} seeds"
    holds = mean > 0 if low is None else low > 0
    return Claim(text=f"{text}: {mean:+.1f} points, {spread}", source=source, holds=holds, value=mean, threshold=0.0)


def table_of(comparison: Comparison, steps: Sequence[int], label: str, *, batch: int = 64) -> list[str]:
    """Write one data set's results as lines, a method a line.

    Parameters
    ----------
    comparison : what was found
    steps : of fine-tuning
    label : the data set, with its budget
    batch : examples that were timed
    """
    head = ["method", *(f"{n} steps" if n else "cut" for n in steps), f"ms / {batch}", "MACs", "mask s", "tuning s"]
    lines = [head]
    for method, by_seed in comparison.cells[label].items():
        cells = list(by_seed.values())

        def mean(value: Callable[[Cell], float], cells: Sequence[Cell] = cells) -> float:
            return float(np.mean([value(cell) for cell in cells]))

        lines.append(
            [
                method,
                *(f"{mean(lambda cell, n=n: _points(cell, n)):.1f} %" for n in steps),
                f"{comparison.ms[label][method]:.2f}",
                f"{100 * mean(lambda cell: cell['ratios']['macs']):.0f} %",
                f"{mean(lambda cell: cell['mask_seconds']):.2f}",
                f"{mean(lambda cell: cell['tune_seconds']):.2f}",
            ]
        )
    sizes = [max(len(line[k]) for line in lines) for k in range(len(head))]
    return [
        "  ".join(cell.rjust(n) if k else cell.ljust(n) for k, (cell, n) in enumerate(zip(line, sizes, strict=True)))
        for line in lines
    ]


# ---- experiments 7 and 8


class TotalTime(TypedDict):
    """Seconds of two ways to a small network, and what they lead to; plain JSON.

    ``stamp``: mask, surgery, fine-tuning until the validation accuracy is within a point of the dense network's.
    ``usual``: the dense network fine-tuned, cut by ``l1``, and fine-tuned until then, too. A course holds the seconds
    and validation accuracies of each epoch; the usual one is that of a small network from ``cut_at`` on.
    """

    stamp: float
    mask: float
    usual: float
    usual_stopped: float
    reached: dict[str, bool]
    accuracy: dict[str, float]
    goal: float
    courses: dict[str, tuple[list[float], list[float]]]
    dense_seconds: float
    cut_at: float


def total_time(
    backbone: Backbone,
    target: Target,
    budget: Budget,
    protocol: Protocol,
    *,
    seed: int = 0,
    epochs: int = 20,
    within: float = 0.01,
) -> TotalTime:
    """Measure what it takes to get a small network: by the generator, and by training the dense one first (spec 8.8).

    Parameters
    ----------
    backbone : with a generator
    target : whose validation part says when to stop
    budget : of the small network
    protocol : of masks and fine-tuning
    seed : of both
    epochs : of the dense network, and the most of the small ones
    within : of the dense network's accuracy, counts as reached

    Returns
    -------
    Seconds without those of validation. ``usual_stopped`` counts the dense network's training only until the first
    epoch within a point of its last accuracy, for who would have stopped there.
    """
    bench = _Bench(backbone, target, (), budget, protocol, seed)
    # The first call of anything pays for what later ones find ready.
    bench.tuned(bench.cut(next(bench.plans(DENSE))), 2, protocol.lr)
    next(bench.plans("l1"))
    next(bench.plans(STAMP))

    def train(network: nn.Module, goal: float | None) -> History:
        return finetune(
            network, target.train, target.validation, epochs=epochs, lr=protocol.lr,
            batch_size=protocol.batch_size, seed=seed, target=goal,
        )  # fmt: skip

    def course(history: History, before: float) -> tuple[list[float], list[float]]:
        return [before + r.seconds for r in history.records], [float(r.accuracy or 0.0) for r in history.records]

    start = time.perf_counter()
    dense = bench.cut(next(bench.plans(DENSE)))
    dense_ready = time.perf_counter() - start
    dense_history = train(dense, None)
    last = accuracy(dense, target.validation)
    goal = last - within
    dense_seconds = dense_ready + dense_history.seconds
    stopped = next(r.seconds for r in dense_history.records if (r.accuracy or 0.0) >= goal - 1e-9)

    start = time.perf_counter()
    own = replace(backbone, model=dense)
    plan = next(_Bench(own, target, (), budget, protocol, seed).plans("l1"))
    usual = recalibrate_bn(plan.apply(dense), target.train)
    usual_ready = time.perf_counter() - start
    usual_history = train(usual, goal)

    start = time.perf_counter()
    plan = next(bench.plans(STAMP))
    mask = time.perf_counter() - start
    small = bench.cut(plan)
    small_ready = time.perf_counter() - start
    first = accuracy(small, target.validation)
    small_history = History(reached=True) if first >= goal else train(small, goal)
    after = usual_ready + usual_history.seconds
    own_course = course(small_history, small_ready)
    dense_course, usual_course = course(dense_history, dense_ready), course(usual_history, dense_seconds + usual_ready)
    return {
        "stamp": small_ready + small_history.seconds,
        "mask": mask,
        "usual": dense_seconds + after,
        "usual_stopped": dense_ready + stopped + after,
        "reached": {STAMP: small_history.reached, "usual": usual_history.reached},
        "accuracy": {
            DENSE: accuracy(dense, target.test),
            STAMP: accuracy(small, target.test),
            "usual": accuracy(usual, target.test),
        },
        "goal": goal,
        "courses": {
            STAMP: ([small_ready, *own_course[0]], [first, *own_course[1]]),
            "dense, then l1": (dense_course[0] + usual_course[0], dense_course[1] + usual_course[1]),
        },
        "dense_seconds": dense_seconds,
        "cut_at": dense_seconds + usual_ready,
    }


def rapid(
    run: Run,
    prepare: Callable[[int], Backbone],
    target: Callable[[int, int | None], Target],
    *,
    examples: Sequence[int],
    methods: Sequence[str],
    budget: Budget,
    seeds: Sequence[int],
    protocol: Protocol,
    steps: Sequence[int] = (0, 20, 100),
    epochs: int = 20,
    others: Callable[[int], Sequence[Examples]] | None = None,
    device: torch.device | str = "cpu",
    advance: Callable[[str, int], None] = _silent,
) -> tuple[Comparison, dict[int, TotalTime]]:
    """Cut a network for data that nothing has seen, with few examples and steps, and measure the total time.

    Parameters
    ----------
    run : keeps what is done
    prepare : makes the backbone of a seed, with the generator
    target : makes the new data of a seed with at most so many training examples, or with all
    examples : numbers of training examples
    methods, budget, seeds, protocol, steps, others, device, advance : see `compare`
    epochs : of the dense network where total time is measured

    Returns
    -------
    The comparison, its claims those of the specification; and both ways' times by seed.
    """
    ways: dict[int, TotalTime] = {}
    name = target(seeds[0], None).name if seeds else ""

    def both_ways(run: Run, seed: int, backbone: Callable[[], Backbone]) -> str:
        def compute() -> TotalTime:
            with protocol.alone(device):
                return total_time(backbone(), target(seed, None), budget, protocol, seed=seed, epochs=epochs)

        ways[seed] = run.once(f"total/{seed}", compute)
        return f"total time {ways[seed]['stamp']:.1f} s, the usual way {ways[seed]['usual']:.1f} s"

    found = compare(
        run, prepare, {f"{name}, {n} examples": lambda seed, n=n: target(seed, n) for n in dict.fromkeys(examples)},
        methods=methods, budgets=(budget,), seeds=seeds, protocol=protocol, steps=steps, others=others,
        on_seed=both_ways, device=device, advance=advance,
    )  # fmt: skip
    at = 20 if 20 in steps else max(steps)
    rows, claims = _time_results(name, ways)
    return replace(found, results=[*found.results, *rows], claims=[*_rapid_claims(found.cells, at), *claims]), ways


def _time_results(name: str, ways: Mapping[int, TotalTime]) -> tuple[list[Result], list[Claim]]:
    every = list(ways.values())
    dataset = f"{name}, all examples"
    found: list[Result] = []

    def row(method: str, metric: str, values: Sequence[float], unit: str, better: Literal["lower", "higher"]) -> Result:
        return summarize(values, dataset=dataset, method=method, metric=metric, unit=unit, better=better)

    found.append(row(STAMP, "total time", [way["stamp"] for way in every], "s", "lower"))
    found.append(row("dense, then l1", "total time", [way["usual"] for way in every], "s", "lower"))
    label = "dense until a point below its last, then l1"
    found.append(row(label, "total time", [way["usual_stopped"] for way in every], "s", "lower"))
    found.append(row(STAMP, "mask in that", [way["mask"] for way in every], "s", "lower"))
    for method, key in ((STAMP, STAMP), ("dense, then l1", "usual"), (DENSE, DENSE)):
        found.append(row(method, "accuracy then", [100 * way["accuracy"][key] for way in every], "%", "higher"))
        if key != DENSE:
            reached = [100.0 * way["reached"][key] for way in every]
            found.append(row(method, "within a point of dense, validated", reached, "% of seeds", "higher"))
    source = "specification, experiment 8"
    missed = sum(not way["reached"][STAMP] for way in every)
    said = f"; {missed} of {len(every)} did not come within a point of the dense network" if missed else ""

    def ratio(text: str, values: Sequence[float], below: float) -> Claim:
        mean = float(np.mean(values))
        return Claim(text=text, source=source, holds=mean < below and not missed, value=mean, threshold=below)

    parts = [way["stamp"] / way["usual"] for way in every]
    stopped = [way["stamp"] / way["usual_stopped"] for way in every]
    claims = [
        ratio(f"{STAMP} takes less than 0.6 of the time of training the dense network, cutting by l1, tuning{said}",
              parts, 0.6),
        ratio(f"so it does where the dense training stops at the first epoch within a point of its last{said}", stopped,
              0.6),
        ratio("making the mask takes less than 1 s", [way["mask"] for way in every], 1.0),
    ]  # fmt: skip
    return found, claims


def _rapid_claims(cells: Cells, steps: int, *, rivals: Sequence[str] = (_RANDOM, "l1")) -> list[Claim]:
    """Hold the generator against the better of simple methods, and other controls, on average over data sets."""
    methods = next(iter(cells.values()))
    seeds = list(next(iter(methods.values())))

    def mean(method: str, seed: int) -> float:
        return float(np.mean([_points(by_method[method][seed], steps) for by_method in cells.values()]))

    def apart(other: str) -> list[float]:
        return [mean(STAMP, seed) - mean(other, seed) for seed in seeds]

    if STAMP not in methods:
        return []
    claims: list[Claim] = []
    known = [name for name in rivals if name in methods]
    if known:
        best = max(known, key=lambda name: np.mean([mean(name, seed) for seed in seeds]))
        text = f"{STAMP} is at least as good as the better of {' and '.join(known)} ({best}) {_when(steps)}"
        claims.append(_claim(text, apart(best), "specification, experiment 7"))
    for other in methods:
        if other not in (*known, STAMP, DENSE, _POPUP):
            text = f"{STAMP} is more accurate than {other} {_when(steps)}"
            claims.append(_claim(text, apart(other), "specification, experiment 7"))
    return claims


# ---- experiment 10


def variants(protocol: Protocol, names: Sequence[str] = ("encoder", "head", "pseudo", "inner")) -> dict[str, Protocol]:
    """Return protocols that differ from one in a single choice about the generator.

    Parameters
    ----------
    protocol : the one
    names : choices to vary: ``encoder``, ``head``, ``pseudo`` (of attention) and ``inner``

    Raises
    ------
    UnknownKeyError
        For another choice.
    """
    found = {"as it is": protocol}
    for name in names:
        match name:
            case "encoder":
                kinds: tuple[EncoderName, ...] = ("attention", "pma", "subsample")
                found |= {f"encoder {kind}": replace(protocol, encoder=kind) for kind in kinds}
            case "head":
                heads: tuple[HeadName, ...] = ("mlp", "clamp", "free")
                found |= {f"head {kind}": replace(protocol, head=kind) for kind in heads}
            case "pseudo":
                for number in (1, 8, 32):
                    changed = replace(protocol, encoder="attention", pseudo=number)
                    if changed not in found.values():
                        found[f"attention, {number} pseudo-instance{'s' * (number > 1)}"] = changed
            case "inner":
                for label, changes in (
                    ("no inner steps, class means", {"inner": "class-mean", "inner_steps": 0}),
                    ("3 inner steps from class means", {"inner": "class-mean", "inner_steps": 3}),
                    ("ridge, in closed form", {"inner": "ridge", "inner_steps": 0}),
                ):
                    changed = replace(protocol, meta=protocol.meta.model_copy(update=changes))
                    if changed not in found.values():
                        found[label] = changed
            case _:
                raise no_such("choice", name, ("encoder", "head", "pseudo", "inner"), where="vary")
    return found


class Varied(TypedDict):
    """What one variant of the generator did under one seed; plain JSON.

    ``accuracy`` as in `Cell`; ``overlap`` of its masks with those for other data sets, the mean over groups and sets.
    """

    accuracy: dict[str, float]
    overlap: float
    fit_seconds: float
    mask_seconds: float


def ablate(
    run: Run,
    prepare: Callable[[int], Backbone],
    target: Callable[[int], Target],
    reference: Callable[[int], Target],
    others: Callable[[int], Sequence[Examples]],
    *,
    variants: Mapping[str, Protocol],
    budget: Budget,
    seeds: Sequence[int],
    steps: Sequence[int] = (0, 20),
    device: torch.device | str = "cpu",
    advance: Callable[[str, int], None] = _silent,
) -> tuple[list[Result], dict[str, dict[int, Varied]]]:
    """Meta-fit variants of the generator for the same networks, and see how their masks do and whether they differ.

    Parameters
    ----------
    run : keeps what is done
    prepare : makes the network of a seed; its generators are not used
    target : the new data of a seed
    reference : what the generators are fitted on
    others : data sets whose masks the target's are compared with
    variants : see `variants`
    budget : of the small networks
    seeds : of everything
    steps : of fine-tuning
    device : where
    advance : called with a note and the number of variants done
    """
    steps = sorted(set(steps))
    backbone_of, target_of, reference_of = _latest(prepare), _latest(target), _latest(reference)
    others_of = _latest(others)

    def compute(name: str, seed: int) -> Varied:
        protocol = variants[name]
        with protocol.alone(device):
            return _varied(
                backbone_of(seed), target_of(seed), reference_of(seed), others_of(seed), protocol, budget, steps, seed
            )

    def told(key: str, cell: Varied) -> None:
        advance(f"{key}: {100 * cell['accuracy'][str(steps[-1])]:.1f} %", 1)

    work = {f"{name}/{seed}": partial(compute, name, seed) for seed in seeds for name in variants}
    found = run.each(work, told)
    cells = {name: {seed: found[f"{name}/{seed}"] for seed in seeds} for name in variants}
    dataset = target_of(seeds[0]).name

    def rows(
        metric: str, unit: str, better: Literal["lower", "higher"], value: Callable[[Varied], float]
    ) -> list[Result]:
        return [
            summarize(
                [value(cell) for cell in by_seed.values()], dataset=dataset, method=name, metric=metric, unit=unit,
                better=better, seconds=sum(cell["fit_seconds"] for cell in by_seed.values()),
            )
            for name, by_seed in cells.items()
        ]  # fmt: skip

    results = [row for n in steps for row in rows(_said(n), "%", "higher", _right_after(n))]
    results += rows("overlap with masks for other data", "1", "lower", lambda cell: cell["overlap"])
    results += rows("mask", "s", "lower", lambda cell: cell["mask_seconds"])
    results += rows("meta-fitting", "s", "lower", lambda cell: cell["fit_seconds"])
    return results, cells


def _right_after(steps: int) -> Callable[[Varied], float]:
    return lambda cell: 100 * cell["accuracy"][str(steps)]


def _varied(
    backbone: Backbone,
    target: Target,
    reference: Target,
    others: Sequence[Examples],
    protocol: Protocol,
    budget: Budget,
    steps: Sequence[int],
    seed: int,
) -> Varied:
    generator, history = fit_generator(backbone.model, backbone.groups, reference.train, protocol, seed=seed)
    own = replace(backbone, generators={STAMP: generator})
    bench = _Bench(own, target, others, budget, protocol, seed)
    cell = _measured(bench, STAMP, steps, protocol.lr)
    alike: list[float] = []
    for data in others:
        other = bench.plan_by(STAMP, data)
        alike += overlap(bench.own.keep, other.keep).values()
    return {
        "accuracy": cell["accuracy"],
        "overlap": float(np.mean(alike)) if alike else 1.0,
        "fit_seconds": history.seconds,
        "mask_seconds": cell["mask_seconds"],
    }
