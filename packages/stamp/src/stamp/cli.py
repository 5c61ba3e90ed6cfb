"""The command line ``stamp``. Everything that needs torch is imported when a command runs, so help is quick."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import Field

from shared_core.cli import CommandConfig, CommandLine, Outcome, Session, argument
from shared_core.errors import InputError, no_such
from shared_core.runs import Result, read_summary, summarize, write_json

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from torch import Tensor, nn

    from stamp.examples import Examples
    from stamp.experiments import Backbone, Cell, Comparison, Protocol, Target
    from stamp.generator import MaskGenerator
    from stamp.plan import PrunePlan
    from stamp.selection import Budget
    from stamp.structure import ChannelGroups

_Config = TypeVar("_Config", bound=CommandConfig)

line = CommandLine(
    "stamp",
    help="Cut a network to a small, faster one for a new task, with masks that a meta-learned generator makes of the"
    " task's data (after the idea of Song et al., 2020).",
)
main = line.main

_PLAN, _SMALL, _WEIGHTS, _GENERATOR = "plan.json", "small.safetensors", "model.safetensors", "generator.safetensors"
_FACTS, _CELLS = "model.json", "cells.json"
_SOURCE = "digits, mnist, glyphs, cifar-10, svhn ..., a folder <class>/*.png, an NPZ with x and y, or a table"
_MODEL = "smallconv, vgg19, resnet18, resnet20, resnet50, mobilenetv2, densenet, vit; your own package.module:function"
_Cost = Literal["macs", "params", "latency", "latency-ms"]
_Split = Literal["train", "validation", "test", "all"]
_EVERY = 10


class DataOptions(CommandConfig):
    """Which examples."""

    size: int | None = Field(None, ge=1, description="side of the images, pixels (default: as they are)")
    channels: int | None = Field(None, description="channels of the images, 1 or 3 (default: as they are)")
    classes: int | None = Field(None, ge=2, description="draw so many of the classes (default: all)")
    limit: int | None = Field(None, ge=2, description="at most so many training examples")


class ModelOptions(CommandConfig):
    """Which network."""

    model: str = argument(f"{_MODEL}; or a run folder of pretrain")
    weights: Path | None = Field(None, description="safetensors file with the network's weights (default: untrained)")
    num_classes: int | None = Field(None, ge=1, description="outputs of the network (default: those of the weights)")
    in_channels: int | None = Field(None, ge=1, description="channels of its inputs (default: those of the data)")
    width: float = Field(1.0, gt=0, description="factor on the channels of a built-in network")


class PlanOptions(CommandConfig):
    """Which small network."""

    plan: Path = argument("run folder of prune or finetune, or a plan.json")
    weights: Path | None = Field(
        None, description="weights of the small network (default: small.safetensors beside it)"
    )
    model: str | None = Field(None, description=f"network that was cut (default: model.json beside it): {_MODEL}")


def _budget(value: float, cost: _Cost) -> Budget:
    from stamp.selection import Budget

    return Budget(**{cost.replace("-", "_"): value})


@dataclass(frozen=True)
class _Facts:
    """What a run folder says of its network."""

    model: str
    num_classes: int | None
    in_channels: int | None
    width: float
    input_shape: tuple[int, ...]
    class_names: tuple[str, ...] = ()
    data: str = ""
    size: int | None = None
    channels: int | None = None
    seed: int = 0

    @staticmethod
    def read(folder: Path) -> _Facts | None:
        path = folder / _FACTS
        if not path.exists():
            return None
        try:
            found = dict(json.loads(path.read_text(encoding="utf-8")))
            shape, names = tuple(map(int, found.pop("input_shape"))), tuple(map(str, found.pop("class_names")))
            return _Facts(input_shape=shape, class_names=names, **found)
        except (ValueError, TypeError, KeyError, OSError, RecursionError) as error:
            raise InputError(
                f"{path}: is not what stamp writes ({_short(error)}); name the network by --model"
            ) from error

    def write(self, path: Path) -> None:
        write_json(path, {field.name: getattr(self, field.name) for field in fields(self)})

    def build(self) -> nn.Module:
        from stamp.models import open_model

        return open_model(
            self.model, num_classes=self.num_classes, in_channels=self.in_channels, width=self.width, seed=self.seed
        )


def _in(run: Path, name: str, command: str) -> Path:
    """Return a file of a run folder, which it must have."""
    if not (run / name).exists():
        raise InputError(f"{run}: has no {name}; give the run folder of 'stamp {command}'")
    return run / name


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _read(config: DataOptions, source: str, split: _Split) -> Examples:
    from stamp.sources import read_examples

    return read_examples(
        source, split=split, size=config.size, channels=_channels(config.channels), seed=config.seed,
        classes=config.classes, limit=config.limit if split == "train" else None,
    )  # fmt: skip


def _channels(value: int | None) -> Literal[1, 3] | None:
    if value not in (None, 1, 3):
        raise InputError(f"--channels: must be 1 or 3, got {value}")
    return 3 if value == 3 else 1 if value == 1 else None


def _is_network(name: str) -> bool:
    from stamp.networks import NETWORKS

    return name in NETWORKS or ":" in name


def _opened(config: ModelOptions, shape: Sequence[int] | None = None) -> tuple[nn.Module, _Facts]:
    """Return the network and what is known of it; `shape` of the inputs that it is to take."""
    from stamp.models import open_model

    folder, weights = Path(config.model), config.weights
    if not _is_network(config.model) and folder.is_dir():
        facts = _Facts.read(folder)
        if facts is None:
            raise InputError(f"{folder}: has no {_FACTS}; give the run folder of 'stamp pretrain', or a network")
        weights = weights or _in(folder, _WEIGHTS, "pretrain")
    else:
        entering = config.in_channels or (shape[0] if shape is not None and len(shape) > 1 else None)
        facts = _Facts(config.model, config.num_classes, entering, config.width, tuple(shape or ()), seed=config.seed)
    model = open_model(
        facts.model, weights, num_classes=facts.num_classes, in_channels=facts.in_channels, width=facts.width,
        seed=facts.seed,
    )  # fmt: skip
    return model, facts


def _traced(model: nn.Module, example: Tensor, opaque: Sequence[str] = ()) -> ChannelGroups:
    from stamp.groups import TraceError, trace

    try:
        return trace(model, example, opaque=opaque)
    except TraceError as error:
        raise InputError(_short(error)) from error


def _small(config: PlanOptions) -> tuple[nn.Module, PrunePlan, _Facts]:
    """Return the small network of a plan."""
    from stamp.plan import PrunePlan, load

    folder = config.plan if config.plan.is_dir() else config.plan.parent
    path = _in(config.plan, _PLAN, "prune") if config.plan.is_dir() else config.plan
    plan = PrunePlan.load(path)
    facts = _Facts.read(folder)
    if config.model is not None:
        facts = _Facts(config.model, None, None, 1.0, ()) if facts is None else facts
        facts = replace(facts, model=config.model)
    if facts is None:
        raise InputError(f"--model: {path} does not say of which network it is; name it")
    return load(facts.build, path, config.weights or folder / _SMALL).eval(), plan, facts


def _fitting(config: DataOptions, facts: _Facts) -> DataOptions:
    """Read data in the size that the network was made for, unless told otherwise."""
    given = config.model_fields_set
    changed = {name: getattr(facts, name) for name in ("size", "channels") if name not in given}
    return config.model_copy(update=changed)


def _command(
    config: type[_Config], *, name: str | None = None, spread: bool = False
) -> Callable[[Callable[[_Config, Session], Outcome]], Callable[[_Config, Session], Outcome]]:
    """Register a command whose warnings become notes; with ``spread``, one that gives its pieces to workers."""

    def register(function: Callable[[_Config, Session], Outcome]) -> Callable[[_Config, Session], Outcome]:
        @wraps(function)
        def run(config: _Config, session: Session) -> Outcome:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                outcome = function(config, session)
            said = dict.fromkeys(f"warning: {w.message}" for w in caught if issubclass(w.category, UserWarning))
            return Outcome(outcome.results, outcome.claims, [*outcome.notes, *said])

        return line.command(config, name=name, spread=spread)(run)

    return register


def _row(method: str, metric: str, value: float, unit: str, better: Literal["lower", "higher"], dataset: str) -> Result:
    return summarize([value], dataset=dataset, method=method, metric=metric, unit=unit, better=better)


# ---- demo and compare


class ProtocolOptions(CommandConfig):
    """What methods that are compared have in common."""

    network: str = Field("smallconv", description=_MODEL)
    width: float = Field(1.0, gt=0, description="factor on the channels of a built-in network")
    size: int = Field(16, ge=8, description="side of the images, pixels")
    channels: int = Field(1, description="channels of the images, 1 or 3")
    reference: str = Field("glyphs", description=f"set to train the network and the generator on: {_SOURCE}")
    reference_classes: int | None = Field(None, ge=2, description="classes of the reference (default: all)")
    reference_limit: int | None = Field(None, ge=2, description="at most so many training examples of the reference")
    pretrain_steps: int = Field(600, ge=1, description="steps of training the network on the reference")
    pretrain_lr: float = Field(0.1, gt=0, description="rate of that training, falling along a cosine")
    pretrain_jitter: bool = Field(
        False, description="show half of the batches of that training turned, scaled or in other contrast"
    )
    iters: int = Field(300, ge=0, description="meta-steps of the generator")
    tasks: int = Field(2, ge=1, description="tasks of a meta-step")
    ways: tuple[int, int] = Field((5, 10), description="fewest and most classes of a task")
    encoder: Literal["instances", "attention", "pma", "subsample"] = Field(
        "instances", description="what the generator shows the network: a set itself, or pseudo-instances of it"
    )
    head: Literal["channel", "mlp", "clamp"] = Field("channel", description="what makes logits of channels")
    pseudo: int = Field(32, ge=1, description="pseudo-instances of attention and pma")
    labels: bool = Field(False, description="let the generator see the classes of its set")
    sets: int = Field(10, ge=1, description="sets that the generator reads of the new data")
    lr: float = Field(0.01, gt=0, description="rate of fine-tuning, falling along a cosine")
    draws: int = Field(10, ge=1, description="random masks that are averaged over")
    tuned_draws: int = Field(3, ge=1, description="of which so many are fine-tuned")


def _protocol(config: ProtocolOptions, **more: Any) -> Protocol:
    from stamp.experiments import Protocol
    from stamp.meta import MetaConfig

    # On data unlike the reference, sharpening gates did better than sampled ones.
    meta = MetaConfig(
        iters=config.iters, tasks=config.tasks, ways=config.ways, gates="annealed", temperature=(0.67, 0.03)
    )
    names = ("width", "size", "pretrain_steps", "pretrain_lr", "pretrain_jitter", "encoder", "head", "pseudo", "labels")
    values: dict[str, Any] = {name: getattr(config, name) for name in (*names, "sets", "lr", "draws", "tuned_draws")}
    values |= {"model": config.network, "channels": _channels(config.channels), "meta": meta}
    return Protocol(**{**values, **more})


def _reference(config: ProtocolOptions, protocol: Protocol) -> Callable[[int], Target]:
    from stamp.experiments import load_target

    def load(seed: int) -> Target:
        return load_target(
            config.reference, protocol, seed=seed, classes=config.reference_classes, limit=config.reference_limit
        )

    return load


class DemoConfig(CommandConfig):
    """Settings of ``demo``."""

    classes: int = Field(20, ge=5, description="printed characters")
    instances: int = Field(40, ge=4, description="drawings of each")
    limit: int = Field(1000, ge=20, description="handwritten digits to train on, at most 1,078")
    pretrain_steps: int = Field(400, ge=1, description="steps of training the network")
    iters: int = Field(120, ge=0, description="meta-steps of the generator")
    budget: float = Field(0.25, gt=0, le=1, description="share of the dense network's multiply-adds")
    draws: int = Field(10, ge=1, description="random masks that are averaged over")
    repeats: int = Field(20, ge=1, description="passes of each network that are timed")


@_command(DemoConfig)
def demo(config: DemoConfig, session: Session) -> Outcome:
    """Train one network on digits and characters, cut it for each of them, and compare masks at equal widths."""
    import torch

    from shared_core.device import one_thread
    from stamp.experiments import Protocol, load_target
    from stamp.meta import MetaConfig
    from stamp.networks import smallconv
    from stamp.planted import study
    from stamp.plots import plot_adaptivity
    from stamp.timing import time_together

    meta = MetaConfig(
        iters=config.iters, tasks=2, ways=(5, 10), inner="slice", jitter=False,
        budgets=(config.budget, config.budget),
    )  # fmt: skip
    protocol = Protocol(pretrain_steps=config.pretrain_steps, draws=config.draws, meta=meta)

    def domains(seed: int) -> dict[str, Target]:
        return {
            "digits": load_target("digits", protocol, seed=seed, limit=config.limit),
            "characters": load_target(
                "glyphs", protocol, seed=seed, classes=config.classes, instances=config.instances
            ),
        }

    with session.progress("demo", 1) as advance:
        found = study(
            session.run,
            "plain",
            domains,
            seeds=(config.seed,),
            protocol=protocol,
            budget=config.budget,
            control=False,
            draws=config.draws,
            device=session.device,
            advance=lambda note, done: advance(done, note=note),
        )
    seen = found.seen[config.seed]
    table = seen["recalibrated"]
    plot_adaptivity(
        session.run.artifact("adaptivity.png"),
        table,
        title=f"one network, cut to {100 * config.budget:g} %, no fine-tuning",
    )
    networks: dict[str, nn.Module] = {"dense": smallconv(10, 1, channels=(32, 64, 64))}
    for name, widths in seen["widths"].items():
        networks[name] = smallconv(10, 1, channels=tuple(kept for kept, _ in widths.values()))
    with one_thread(str(session.device) == "cpu"):
        timed = time_together(
            {name: network.to(session.device).eval() for name, network in networks.items()},
            torch.rand(64, 1, 16, 16, device=session.device),
            repeats=config.repeats,
        )
    dense = timed.p50("dense")
    rows = [
        summarize(
            [timed.p50(name)],
            dataset="speed",
            method=name,
            metric="batch of 64",
            unit="ms",
            better="lower",
            seconds=0.0,
        )
        for name in networks
    ]
    notes = [
        f"One network, trained on handwritten digits and {config.classes} printed characters, cut to"
        f" {100 * config.budget:g} % of its multiply-adds for each.",
        f"own: the mask that a generator makes of ten unlabelled batches; it was meta-fitted once, in"
        f" {seen['seconds']:.0f} s. other: its mask for the other set.",
        "The rest choose the same numbers of channels. All get new batch statistics, and no fine-tuning.",
        "",
        "accuracy in % on held-out images",
        "".join([f"{'':12}", *(f"{mask:>8}" for mask in next(iter(table.values())))]),
        *("".join([f"{name:12}", *(f"{100 * value:8.1f}" for value in row.values())]) for name, row in table.items()),
        "",
        *(
            f"{name}: {timed.p50(name):.2f} ms for a batch of 64, {dense / timed.p50(name):.1f} times as fast as dense"
            f" ({dense:.2f} ms); widths " + ", ".join(f"{kept} of {all_}" for kept, all_ in widths.values())
            for name, widths in seen["widths"].items()
        ),
        "",
        "One seed; 'stamp adaptivity digits,glyphs --kind plain' takes several, and gives intervals.",
    ]
    shown = [row for row in found.results if "not recalibrated" not in row.metric]
    return Outcome([*shown, *rows], found.claims, notes)


_DRAWN = ("accuracy", "batch of", "overlap with")


def _draw_comparison(session: Session, results: Sequence[Result], name: str = "comparison.png") -> None:
    from stamp.plots import plot_comparison

    plot_comparison(session.run.artifact(name), [row for row in results if row.metric.startswith(_DRAWN)])


class CompareConfig(ProtocolOptions):
    """Settings of ``compare``."""

    target: str = argument(f"new data: {_SOURCE}", "digits")
    weights: Path | None = Field(None, description="safetensors weights of a trained network; none is trained then")
    generator: Path | None = Field(None, description="generator of meta-fit for it (default: one is fitted)")
    methods: tuple[str, ...] = Field(
        ("dense", "stamp", "other-set", "meta-free", "random", "l1", "bn", "act", "snip", "taylor"),
        description="methods; an unknown name lists them all; l1@stamp ranks by l1 at the widths of stamp",
    )
    budgets: tuple[float, ...] = Field((0.5, 0.25, 0.1), description="shares of the dense network's cost")
    cost: Literal["macs", "params", "latency"] = Field("macs", description="what a budget is a share of")
    seeds: int = Field(3, ge=1, description="repetitions: network, generator, split, masks and fine-tuning")
    steps: int = Field(100, ge=0, description="steps of fine-tuning")
    limit: int | None = Field(None, ge=2, description="at most so many training examples of the new data")
    others: tuple[str, ...] = Field((), description="sets whose masks other-set takes (default: the reference)")
    tune: bool = Field(False, description="choose each method's rate on validation examples, of the same few")
    rates: tuple[float, ...] = Field((0.003, 0.01, 0.03, 0.1), description="rates to choose from")


@_command(CompareConfig, spread=True)
def compare(config: CompareConfig, session: Session) -> Outcome:
    """Cut a network for new data by several methods, at several budgets, under several seeds; all else alike."""
    from stamp import experiments

    methods = experiments.check_methods(config.methods)
    device = session.device
    budgets = [_budget(value, config.cost) for value in dict.fromkeys(config.budgets)]
    protocol = _protocol(config, lrs=config.rates)
    reference = _reference(config, protocol)
    seeds = range(config.seed, config.seed + config.seeds)

    def target(seed: int) -> Target:
        return experiments.load_target(config.target, protocol, seed=seed, limit=config.limit)

    _check_shapes(reference(seeds[0]), target(seeds[0]))
    if config.generator is not None and config.weights is None:
        raise InputError("--generator: is for a network that it was fitted to; give its --weights, too")

    def prepare(seed: int) -> Backbone:
        return _prepared(config, protocol, reference(seed), methods, seed, device)

    def others(seed: int) -> list[Examples]:
        if not config.others:
            return [reference(seed).train]
        return [experiments.load_target(name, protocol, seed=seed).train for name in config.others]

    with session.progress("compare", len(seeds) * len(budgets) * len(methods)) as advance:
        found = experiments.compare(
            session.run,
            prepare,
            {Path(config.target).stem if Path(config.target).exists() else config.target: target},
            methods=methods,
            budgets=budgets,
            seeds=seeds,
            protocol=protocol,
            steps=(0, config.steps),
            others=others,
            tuned=config.tune,
            device=session.device,
            advance=lambda note, done: advance(done, note=note),
        )
    steps = sorted({0, config.steps})
    _keep_cells(session, found)
    _draw_tradeoff(found.cells, found.ms, steps[-1], session.run.artifact)
    _draw_widths(found.cells, session.run.artifact("widths.png"))
    notes: list[str] = []
    for label in found.cells:
        notes += ["", label, *experiments.table_of(found, steps, label)]
    if config.tune:
        rates = {m: by[seeds[0]]["lr"] for m, by in next(iter(found.cells.values())).items()}
        said = ", ".join(f"{m} {lr:g}" for m, lr in rates.items())
        notes.append(f"rates chosen on validation examples, first budget: {said}")
    return Outcome(found.results, found.claims, notes)


def _check_shapes(reference: Target, target: Target) -> None:
    if reference.train.shape != target.train.shape:
        raise InputError(
            f"{target.name}: inputs have shape {target.train.shape}, and those of the reference {reference.name}"
            f" {reference.train.shape}; give --size and --channels that both can have"
        )


def _prepared(
    config: CompareConfig,
    protocol: Protocol,
    reference: Target,
    methods: Sequence[str],
    seed: int,
    device: torch.device,
) -> Backbone:
    from stamp.experiments import make_backbone
    from stamp.models import open_model

    model: nn.Module | None = None
    generator: Callable[[ChannelGroups], MaskGenerator] | None = None
    if config.weights is not None:
        model = open_model(
            config.network, config.weights, in_channels=reference.train.shape[0], width=config.width, seed=seed
        )
    if (path := config.generator) is not None:
        generator = _generator_at(path)
    return make_backbone(
        reference, protocol, seed=seed, methods=methods, model=model, generator=generator, device=device
    )


def _generator_at(path: Path) -> Callable[[ChannelGroups], MaskGenerator]:
    from stamp.generator import MaskGenerator

    file = _in(path, _GENERATOR, "meta-fit") if path.is_dir() else path
    return lambda groups: MaskGenerator.load(file, groups)


def _keep_cells(session: Session, found: Comparison) -> None:
    write_json(session.run.artifact(_CELLS), {"cells": found.cells, "ms": found.ms, "backbones": found.backbones})


def _draw_tradeoff(
    cells: Mapping[str, Mapping[str, Mapping[Any, Cell]]],
    ms: Mapping[str, Mapping[str, float]],
    steps: int,
    place: Callable[[str], Path],
) -> list[Path]:
    import numpy as np

    from shared_core.runs import interval
    from stamp.plots import Point, plot_tradeoff

    points: list[Point] = []
    for label, methods in cells.items():
        for method, by_seed in methods.items():
            mean, low, high = interval([100 * cell["accuracy"][str(steps)] for cell in by_seed.values()])
            share = float(np.mean([cell["ratios"]["macs"] for cell in by_seed.values()]))
            points.append(Point(method, mean, low, high, macs=share, ms=ms[label][method]))
    # The dense network is in the table of every budget, and one point.
    dense = [point for point in points if point.method == "dense"]
    points = [*dense[:1], *(point for point in points if point.method != "dense")]
    title = f"after {steps} steps of fine-tuning" if steps else "right after cutting"
    return [
        plot_tradeoff(place("tradeoff.png"), points, title=title),
        plot_tradeoff(place("tradeoff-ms.png"), points, "ms", title=title),
    ]


def _draw_widths(cells: Mapping[str, Mapping[str, Mapping[Any, Cell]]], path: Path) -> Path:
    """Draw the widths of every method at the last budget that is not everything."""
    from stamp.plots import plot_widths

    label, methods = list(cells.items())[-1]
    first = {name: next(iter(by_seed.values()))["widths"] for name, by_seed in methods.items() if name != "dense"}
    shown = first or {name: next(iter(by.values()))["widths"] for name, by in methods.items()}
    return plot_widths(path, {name: _pairs(own) for name, own in shown.items()}, title=label)


def _pairs(widths: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, int]]:
    return {group: (kept, whole) for group, (kept, whole) in widths.items()}


# ---- experiments of the specification


class AdaptivityConfig(ProtocolOptions):
    """Settings of ``adaptivity``."""

    domains: tuple[str, ...] = argument("two or more sets of images of one channel", ("mnist", "digits"))
    kind: Literal["planted", "shared", "plain"] = Field(
        "planted",
        description="network: specialists merged, so that the right mask is known; one trained on all, each set in its"
        " channel; or all sets in one channel",
    )
    budget: float = Field(0.25, gt=0, le=1, description="share of the dense network's multiply-adds")
    seeds: int = Field(3, ge=1, description="repetitions: networks, generators and masks")
    limit: int = Field(1000, ge=20, description="training examples of each set")
    classes: int = Field(20, ge=2, description="classes of a set that draws them, e.g. glyphs or omniglot")
    instances: int = Field(40, ge=4, description="images of each of these")
    control: bool = Field(True, description="meta-fit gates that read nothing, too: one mask for all")
    unseen: tuple[str, ...] = Field(
        (), description="judge these sets, which nothing is trained on, by class means; for kind plain"
    )
    unseen_limit: int = Field(200, ge=20, description="training examples of each of these")
    min_channels: float = Field(0.05, ge=0, le=1, description="least share of each group to keep")
    pretrain_steps: int = Field(300, ge=1, description="steps of training each network")
    iters: int = Field(150, ge=0, description="meta-steps of the generator")
    ways: tuple[int, int] = Field((5, 5), description="fewest and most classes of a task")


@_command(AdaptivityConfig, spread=True)
def adaptivity(config: AdaptivityConfig, session: Session) -> Outcome:
    """Ask whether masks follow the data: each set with its own mask, with another's, and with baselines' masks."""
    from stamp.experiments import Target, load_target
    from stamp.meta import MetaConfig
    from stamp.planted import study
    from stamp.plots import plot_adaptivity, plot_widths
    from stamp.sources import is_drawn

    # Sets that have no place in the network's head are judged by class means, and so the generator is trained for them.
    meta = MetaConfig(
        iters=config.iters, tasks=config.tasks, ways=config.ways, inner="class-mean" if config.unseen else "slice",
        jitter=bool(config.unseen), budgets=(config.budget, config.budget),
    )  # fmt: skip
    protocol = _protocol(config, meta=meta)

    def targets(sources: Sequence[str], limit: int, seed: int) -> dict[str, Target]:
        found: dict[str, Target] = {}
        for source in sources:
            drawn = {"classes": config.classes, "instances": config.instances}
            target = load_target(source, protocol, seed=seed, **(drawn if is_drawn(source) else {"limit": limit}))
            name = Path(source).stem if Path(source).exists() else source
            if name in found:
                raise InputError(f"DOMAINS: two of them are called '{name}'; name different ones")
            parts = (replace(part, name=name) for part in (target.train, target.validation, target.test))
            found[name] = Target(*parts)
        return found

    channels = [max(1, round(width * config.width)) for width in (16, 32, 32)]
    notes: list[str] = []
    with session.progress("adaptivity", config.seeds) as advance:
        found = study(
            session.run,
            config.kind,
            lambda seed: targets(config.domains, config.limit, seed),
            unseen=(lambda seed: targets(config.unseen, config.unseen_limit, seed)) if config.unseen else None,
            seeds=range(config.seed, config.seed + config.seeds),
            protocol=protocol,
            budget=config.budget,
            channels=channels,
            control=config.control,
            draws=config.draws,
            min_channels=config.min_channels,
            device=session.device,
            advance=lambda note, done: advance(done, note=note),
        )
    write_json(session.run.artifact(_CELLS), {"seen": found.seen})
    first = found.seen[config.seed]
    table = {
        name: {mask: [each["recalibrated"][name][mask] for each in found.seen.values()] for mask in row}
        for name, row in first["recalibrated"].items()
    }
    title = f"{config.kind} network, no fine-tuning"
    plot_adaptivity(session.run.artifact("adaptivity.png"), table, title=title)
    head = [f"{mask:>10}" for mask in next(iter(table.values()))]
    notes += ["", f"accuracy in %: {title}, mean over seeds", "".join([f"{'':16}", *head])]
    for name, row in table.items():
        notes.append("".join([f"{name[:15]:16}", *(f"{100 * sum(v) / len(v):10.1f}" for v in row.values())]))
    if config.kind == "planted":
        notes.append("precision: share of the channels kept that are the data set's own specialist's")
    kept = {name: _pairs(own) for name, own in first["widths"].items()}
    plot_widths(session.run.artifact("widths.png"), kept, title=f"{config.kind} network, the first seed")
    return Outcome(found.results, found.claims, notes)


class RapidConfig(ProtocolOptions):
    """Settings of ``rapid``."""

    target: str = argument(f"new data: {_SOURCE}", "digits")
    reference: str = Field("mnist", description=f"set to train the network and the generator on: {_SOURCE}")
    reference_limit: int | None = Field(3000, ge=2, description="at most so many training examples of the reference")
    examples: tuple[int, ...] = Field((50, 200, 1000), description="numbers of training examples of the new data")
    tuning_steps: tuple[int, ...] = Field((0, 20, 100), description="steps of fine-tuning")
    methods: tuple[str, ...] = Field(
        ("dense", "stamp", "meta-free", "random", "l1", "act", "snip"),
        description="methods; an unknown name lists them all",
    )
    budget: float = Field(0.25, gt=0, le=1, description="share of the dense network's multiply-adds")
    seeds: int = Field(5, ge=1, description="repetitions: networks, generators, examples, masks and fine-tuning")
    epochs: int = Field(20, ge=1, description="epochs of the dense network where total time is measured")


@_command(RapidConfig, spread=True)
def rapid(config: RapidConfig, session: Session) -> Outcome:
    """Cut a network for a data set that nothing has seen, with few examples and steps; and measure total time."""
    from stamp import experiments
    from stamp.plots import Course, plot_rapid

    methods = experiments.check_methods(config.methods)
    protocol, budget, device = _protocol(config), _budget(config.budget, "macs"), session.device
    reference = _reference(config, protocol)
    seeds = range(config.seed, config.seed + config.seeds)
    if not config.examples or min(config.examples) < 2:
        raise InputError(f"--examples: need numbers of 2 or more, got {', '.join(map(str, config.examples)) or 'none'}")

    def target(seed: int, limit: int | None) -> Target:
        return experiments.load_target(config.target, protocol, seed=seed, limit=limit)

    def prepare(seed: int) -> Backbone:
        wanted = (*methods, experiments.STAMP)
        return experiments.make_backbone(reference(seed), protocol, seed=seed, methods=wanted, device=device)

    _check_shapes(reference(seeds[0]), target(seeds[0], None))
    with session.progress("rapid", len(seeds) * (len(config.examples) * len(methods) + 1)) as advance:
        found, ways = experiments.rapid(
            session.run,
            prepare,
            target,
            examples=config.examples,
            methods=methods,
            budget=budget,
            seeds=seeds,
            protocol=protocol,
            steps=config.tuning_steps,
            epochs=config.epochs,
            others=lambda seed: (reference(seed).train,),
            device=session.device,
            advance=lambda note, done: advance(done, note=note),
        )
    _keep_cells(session, found)
    write_json(session.run.artifact("total-time.json"), ways)
    _draw_comparison(session, found.results)
    first = ways[config.seed]
    courses = {
        label: Course(*course, small_from=0.0 if label == experiments.STAMP else first["cut_at"])
        for label, course in first["courses"].items()
    }
    plot_rapid(session.run.artifact("rapid.png"), courses, dense=first["goal"] + 0.01, title="the first seed")
    notes: list[str] = []
    for label in found.cells:
        notes += ["", label, *experiments.table_of(found, sorted(set(config.tuning_steps)), label)]
    return Outcome(found.results, found.claims, notes)


class AblateConfig(ProtocolOptions):
    """Settings of ``ablate``."""

    target: str = argument(f"new data: {_SOURCE}", "digits")
    vary: tuple[str, ...] = Field(
        ("encoder", "head", "pseudo", "inner"),
        description="choices to vary, one at a time: encoder, head, pseudo, inner",
    )
    budget: float = Field(0.25, gt=0, le=1, description="share of the dense network's multiply-adds")
    seeds: int = Field(2, ge=1, description="repetitions: networks, generators, masks and fine-tuning")
    tuning_steps: tuple[int, ...] = Field((0, 20), description="steps of fine-tuning")
    limit: int | None = Field(200, ge=2, description="at most so many training examples of the new data")
    others: tuple[str, ...] = Field((), description="sets whose masks are compared (default: the reference)")


@_command(AblateConfig, spread=True)
def ablate(config: AblateConfig, session: Session) -> Outcome:
    """Vary the generator, one choice at a time: how good its masks are, and whether they differ between data sets."""
    from stamp import experiments

    protocol, budget, device = _protocol(config), _budget(config.budget, "macs"), session.device
    kinds = experiments.variants(protocol, config.vary)
    reference = _reference(config, protocol)
    seeds = range(config.seed, config.seed + config.seeds)

    def target(seed: int) -> Target:
        return experiments.load_target(config.target, protocol, seed=seed, limit=config.limit)

    def prepare(seed: int) -> Backbone:
        return experiments.make_backbone(reference(seed), protocol, seed=seed, methods=(), device=device)

    def others(seed: int) -> list[Examples]:
        if not config.others:
            return [reference(seed).train]
        return [experiments.load_target(name, protocol, seed=seed).train for name in config.others]

    _check_shapes(reference(seeds[0]), target(seeds[0]))
    notes: list[str] = []
    with session.progress("ablate", len(seeds) * len(kinds)) as advance:
        results, cells = experiments.ablate(
            session.run,
            prepare,
            target,
            reference,
            others,
            variants=kinds,
            budget=budget,
            seeds=seeds,
            steps=config.tuning_steps,
            device=session.device,
            advance=lambda note, done: advance(done, note=note),
        )
    write_json(session.run.artifact(_CELLS), {"variants": cells})
    _draw_comparison(session, results)
    return Outcome(results, notes=notes)


# ---- one network


class TraceConfig(ModelOptions):
    """Settings of ``trace``."""

    input_shape: tuple[int, ...] = Field((), description="of one input, e.g. 3,32,32 (default: 3,32,32, or the run's)")
    opaque: tuple[str, ...] = Field((), description="modules not to look into; what touches them is frozen")


@_command(TraceConfig)
def trace(config: TraceConfig, session: Session) -> Outcome:
    """Say which channels of a network can be removed, each group in all its places, and which cannot and why."""
    import torch

    from stamp.counting import macs, parameters

    model, facts = _opened(config, config.input_shape or (3, 32, 32))
    shape = config.input_shape or facts.input_shape
    _check_shape(shape)
    example = torch.rand(2, *shape, generator=torch.Generator().manual_seed(config.seed))
    groups = _traced(model, example, config.opaque)
    write_json(session.run.artifact("groups.json"), [_group_record(group) for group in groups.groups])
    name = config.model
    results = [
        _row("network", "parameters", float(parameters(model)), "1", "lower", name),
        _row("network", "multiply-adds", float(macs(model, example[:1])), "1", "lower", name),
    ]
    for group in groups.groups:
        metric = "channels" if group.frozen is None else "channels, frozen"
        results.append(_row(group.name, metric, float(group.width), "1", "higher", name))
    free = sum(groups.widths().values())
    whole = sum(group.width for group in groups.groups)
    notes = [str(groups), f"{free:,} of {whole:,} channels can be removed, in {len(groups.prunable)} groups"]
    notes += [f"{group.name} is frozen: {group.frozen}" for group in groups.groups if group.frozen is not None]
    return Outcome(results, notes=notes)


def _check_shape(shape: Sequence[int]) -> None:
    if not shape or min(shape) < 1:
        raise InputError(
            f"--input-shape: must be whole numbers of 1 or more, e.g. 3,32,32, got {','.join(map(str, shape))}"
        )


def _group_record(group: Any) -> dict[str, Any]:
    return {
        "name": group.name,
        "width": group.width,
        "frozen": group.frozen,
        **{kind: [str(slot) for slot in getattr(group, kind)] for kind in ("producers", "consumers", "followers")},
    }


class PretrainConfig(ModelOptions, DataOptions):
    """Settings of ``pretrain``."""

    data: str = argument(f"set to train on: {_SOURCE}")
    epochs: int = Field(10, ge=1, description="passes over the training examples")
    lr: float = Field(0.1, gt=0, description="rate of SGD, falling along a cosine")
    batch_size: int = Field(64, ge=1, description="examples of a step")
    jitter: bool = Field(False, description="show half of the batches turned, scaled or in other contrast")


@_command(PretrainConfig)
def pretrain(config: PretrainConfig, session: Session) -> Outcome:
    """Train a network on a reference set; what it leaves is to be cut."""
    import math

    from stamp import experiments
    from stamp.examples import check_fits
    from stamp.plan import save_weights
    from stamp.training import accuracy, with_head

    train, validation, test = (_read(config, config.data, split) for split in ("train", "validation", "test"))
    chosen = config.model_copy(update={"num_classes": config.num_classes or train.num_classes})
    model, facts = _opened(chosen, train.shape)
    check_fits(model, train)
    model = (
        with_head(model, train.num_classes, kind="fresh", seed=config.seed)
        if _outputs(model) != train.num_classes
        else model
    )
    model = model.to(session.device)
    of_epoch = math.ceil(len(train) / config.batch_size)
    state = session.run.load_checkpoint()
    done = 0 if state is None else len(state["records"])
    with session.progress("pretrain", config.epochs, done) as advance:
        history = experiments.pretrain(
            model, train, steps=config.epochs * of_epoch, lr=config.lr, batch_size=config.batch_size,
            jitter=config.jitter, validation=validation, seed=config.seed, state=state,
            on_epoch=_kept(session, advance), world=session.world,
        )  # fmt: skip
    save_weights(model, session.run.artifact(_WEIGHTS))
    _facts_for(facts, train, config, config.data).write(session.run.artifact(_FACTS))
    right = _row(facts.model, "accuracy", 100 * accuracy(model, test), "%", "higher", f"{test.name}, test")
    notes = [
        f"best accuracy on validation examples {100 * (history.best or 0.0):.1f} %; the network is the last epoch's"
    ]
    return Outcome([right, _row(facts.model, "training", history.seconds, "s", "lower", train.name)], notes=notes)


def _outputs(model: nn.Module) -> int:
    from stamp.training import head_name

    head: Any = model.get_submodule(head_name(model))
    return int(head.out_features)


def _facts_for(facts: _Facts, data: Examples, config: DataOptions, source: str) -> _Facts:
    place = str(Path(source).resolve()) if Path(source).exists() else source
    return _Facts(
        facts.model, facts.num_classes, facts.in_channels, facts.width, data.shape, data.class_names, place,
        config.size, config.channels, facts.seed,
    )  # fmt: skip


def _kept(session: Session, advance: Any) -> Callable[[Any], None]:
    """Log each epoch, and keep what to go on from."""

    def after(end: Any) -> None:
        session.run.log(
            epoch=float(end.epoch), step=float(end.step), loss=end.train_loss, accuracy=end.accuracy, lr=end.lr
        )
        session.run.save_checkpoint(end.state())
        shown = "" if end.accuracy is None else f", accuracy {100 * end.accuracy:.1f} %"
        advance(1, note=f"loss {end.train_loss:.3f}{shown}")

    return after


class MetaFitConfig(ModelOptions, DataOptions):
    """Settings of ``meta-fit``."""

    data: tuple[str, ...] = argument(f"one or more reference sets: {_SOURCE}")
    validation: tuple[str, ...] = Field((), description="sets to judge by; the generator that does best is kept")
    iters: int = Field(400, ge=0, description="meta-steps")
    tasks: int = Field(4, ge=1, description="tasks of a meta-step")
    ways: tuple[int, int] = Field((5, 20), description="fewest and most classes of a task")
    shots: int = Field(4, ge=1, description="examples of a class to learn from")
    queries: int = Field(4, ge=1, description="other examples of a class to judge by")
    set_size: int = Field(64, ge=2, description="most examples of a task that the generator reads")
    lr: float = Field(1e-2, gt=0, description="rate of Adam")
    encoder: Literal["instances", "attention", "pma", "subsample"] = Field(
        "instances", description="what the generator shows the network: a set itself, or pseudo-instances of it"
    )
    head: Literal["channel", "mlp", "clamp", "free"] = Field(
        "channel", description="what makes logits of channels; free reads no data"
    )
    pseudo: int = Field(32, ge=1, description="pseudo-instances of attention and pma, examples of subsample")
    labels: bool = Field(False, description="let the generator see the classes of its set")
    inner: Literal["class-mean", "ridge", "slice"] = Field(
        "class-mean", description="classifier of a task: means of classes, closed form, or rows of the network's own"
    )
    gates: Literal["annealed", "concrete", "hard"] = Field(
        "concrete", description="samples; those, rounded forwards (hard); or deterministic and sharpening (annealed)"
    )
    penalty: Literal["projected", "dual", "squared", "kl"] = Field(
        "projected", description="how the budget is kept: exactly, by dual ascent, by a penalty, or by a prior"
    )
    budgets: tuple[float, float] = Field((0.1, 0.5), description="shares of the multiply-adds to draw budgets between")
    swap: float = Field(0.1, ge=0, description="weight of the reward for masks that only their own task likes")
    jitter: bool = Field(True, description="look at each task through a random transform")


_META = ("iters", "tasks", "ways", "shots", "queries", "set_size", "lr", "inner", "gates", "penalty", "budgets", "swap")


@_command(MetaFitConfig)
def meta_fit(config: MetaFitConfig, session: Session) -> Outcome:
    """Train a mask generator for a network, once; it then serves any new data and any budget."""
    import numpy as np

    from stamp.examples import check_fits
    from stamp.generator import MaskGenerator
    from stamp.meta import MetaConfig, MetaTrainer
    from stamp.plots import plot_history

    folder = Path(config.model)
    facts = _Facts.read(folder) if not _is_network(config.model) and folder.is_dir() else None
    options = _fitting(config, facts) if facts is not None else config
    if not config.data:
        raise InputError("DATA: name one reference set or more")
    references = [_read(options, source, "train") for source in config.data]
    held = [_read(options, source, "train") for source in config.validation]
    model, _ = _opened(config, references[0].shape)
    for reference in references:
        check_fits(model, reference)
    model = model.to(session.device)
    groups = _traced(model, references[0].inputs(slice(0, 2)))
    generator = MaskGenerator(
        groups, encoder=config.encoder, head=config.head, pseudo=config.pseudo, labels=config.labels,
        input_shape=references[0].shape, seed=config.seed,
    ).to(session.device)  # fmt: skip
    meta = MetaConfig(jitter=config.jitter, seed=config.seed, **{name: getattr(config, name) for name in _META})
    trainer = MetaTrainer(model, generator, references, validation=held or None, config=meta)
    state = session.run.load_checkpoint()
    done = 0 if state is None else len(state["records"])
    notes: list[str] = []
    with session.progress("meta-fit", config.iters, done) as advance:

        def after(step: Any) -> None:
            session.run.log(step=float(step.step), loss=step.loss, accuracy=step.accuracy, spread=step.spread,
                            overlap=step.overlap, validation=step.validation)  # fmt: skip
            if step.step % _EVERY == 0:
                session.run.save_checkpoint(step.state())
            advance(1, note=f"loss {step.loss:.3f}, overlap {step.overlap:.2f}")

        history = trainer.fit(state=state, on_step=after, world=session.world)
    generator.save(session.run.artifact(_GENERATOR))
    if not history.records:
        return Outcome(notes=[*notes, "no meta-step: the generator is as it was made"])
    plot_history(session.run.artifact("history.png"), history.records)
    last = history.records[-50:]
    name = ", ".join(data.name for data in references)

    def mean(key: str) -> float:
        values = [getattr(record, key) for record in last]
        known = [value for value in values if value == value]
        return float(np.mean(known)) if known else 1.0

    results = [
        _row("stamp", f"accuracy on queries, last {len(last)} steps", 100 * mean("accuracy"), "%", "higher", name),
        _row("stamp", "overlap of different tasks' masks", mean("overlap"), "1", "lower", name),
        _row("stamp", "undecided gates, mean pi (1 - pi)", mean("spread"), "1", "lower", name),
        _row("stamp", "meta-fitting", history.seconds, "s", "lower", name),
    ]
    if history.records[-1].validation is not None:
        best = max(record.validation for record in history.records if record.validation is not None)
        results.append(
            _row("stamp", "accuracy on validation tasks", 100 * best, "%", "higher", ", ".join(config.validation))
        )
    return Outcome(results, notes=notes)


class PruneConfig(ModelOptions, DataOptions):
    """Settings of ``prune``."""

    data: str = argument(f"new data: {_SOURCE}")
    method: str = Field("stamp", description="stamp, with a generator; or another: an unknown name lists them")
    generator: Path | None = Field(None, description="generator of meta-fit, for method stamp: file or run folder")
    budget: float = Field(0.25, gt=0, description="share of the dense network's cost in (0, 1]; or milliseconds")
    cost: _Cost = Field("macs", description="what the budget is of; latency is measured, latency-ms in milliseconds")
    mode: Literal["budget", "threshold", "efficiency"] = Field(
        "budget", description="keep the best that fit; all above the threshold; or remove what saves most a score first"
    )
    threshold: float = Field(0.5, description="of mode threshold")
    round_to: int = Field(1, ge=1, description="multiple of channels to keep of each group")
    min_channels: float = Field(0.05, ge=0, le=1, description="least share of each group to keep")
    sets: int = Field(10, ge=1, description="sets that the generator reads")
    set_size: int = Field(64, ge=2, description="examples of a set")
    adapt_steps: int = Field(0, ge=0, description="steps in which the generator is adapted first; labels are used")
    fold: Literal["hard", "soft"] = Field("hard", description="soft multiplies the gates into the weights")
    plan_out: Path | None = Field(None, description="where to write the plan, too (default: in the run folder only)")


@_command(PruneConfig)
def prune(config: PruneConfig, session: Session) -> Outcome:
    """Choose channels for new data and cut the network: a plan, and the small network's weights."""
    from stamp.examples import check_fits
    from stamp.plan import save_weights
    from stamp.plots import plot_widths
    from stamp.pruning import METHODS
    from stamp.pruning import prune as pruned
    from stamp.training import accuracy, recalibrate_bn, with_head

    budget = _budget(config.budget, config.cost)
    if config.method != "stamp" and config.method not in METHODS:
        raise no_such("method", config.method, ("stamp", *METHODS), where="--method")
    if config.method == "stamp" and config.generator is None:
        raise InputError("--generator: method stamp needs one, of 'stamp meta-fit'; or give a --method such as l1")
    folder = Path(config.model)
    known = _Facts.read(folder) if not _is_network(config.model) and folder.is_dir() else None
    options = _fitting(config, known) if known is not None else config
    train, test = _read(options, config.data, "train"), _read(options, config.data, "test")
    model, facts = _opened(config, train.shape)
    check_fits(model, train)
    model = model.to(session.device)
    groups = _traced(model, train.inputs(slice(0, 2)))
    method: str | MaskGenerator = config.method
    if config.method == "stamp" and config.generator is not None:
        method = _generator_at(config.generator)(groups).to(session.device).eval()
    plan = pruned(
        model, groups, method=method, data=train, budget=budget, mode=config.mode, threshold=config.threshold,
        round_to=config.round_to, min_channels=config.min_channels, sets=config.sets, set_size=config.set_size,
        adapt_steps=config.adapt_steps, seed=config.seed,
    )  # fmt: skip
    notes: list[str] = []
    small = plan.apply(model, fold=config.fold)
    difference = plan.check(model, small, train.inputs(slice(0, 8)).to(session.device), fold=config.fold)
    # Statistics first: the head is made of what they make.
    small = with_head(recalibrate_bn(small, train, seed=config.seed), train, head=plan.head)
    plan.save(session.run.artifact(_PLAN))
    if config.plan_out is not None:
        plan.save(config.plan_out)
        notes.append(f"wrote {config.plan_out}")
    save_weights(small, session.run.artifact(_SMALL))
    _facts_for(replace(facts, num_classes=_outputs(model)), train, options, config.data).write(
        session.run.artifact(_FACTS)
    )
    plot_widths(session.run.artifact("widths.png"), {plan.method: _widths(plan)})
    where = f"{test.name}, test"
    results = [_row(plan.method, "accuracy right after cutting", 100 * accuracy(small, test), "%", "higher", where)]
    results += [
        _row(plan.method, f"{name} of the dense network", 100 * ratio, "%", "lower", where)
        for name, ratio in plan.ratios.items()
    ]
    results.append(_row(plan.method, "mask", plan.seconds, "s", "lower", where))
    notes += [*plan.table().splitlines(), f"the small network differs from the masked one by at most {difference:.1e}"]
    return Outcome(results, notes=notes)


def _widths(plan: PrunePlan) -> dict[str, tuple[int, int]]:
    whole = plan.groups.widths()
    return {name: (kept, whole[name]) for name, kept in plan.widths().items()}


class FinetuneConfig(PlanOptions, DataOptions):
    """Settings of ``finetune``."""

    data: str = argument(f"new data: {_SOURCE}")
    epochs: int = Field(10, ge=1, description="passes over the training examples")
    steps: int | None = Field(None, ge=0, description="steps in all, instead of epochs")
    lr: float | None = Field(None, gt=0, description="first rate, falls to 0 (default: 0.05, 0.01 under 5000 examples)")
    batch_size: int = Field(64, ge=1, description="examples of a step")
    weight_decay: float = Field(5e-4, ge=0, description="of SGD with momentum 0.9")


@_command(FinetuneConfig)
def finetune(config: FinetuneConfig, session: Session) -> Outcome:
    """Train a small network on the new data."""
    from stamp.plan import save_weights
    from stamp.training import accuracy
    from stamp.training import finetune as tuned

    small, plan, facts = _small(config)
    options = _fitting(config, facts)
    train, validation, test = (_read(options, config.data, split) for split in ("train", "validation", "test"))
    notes: list[str] = []
    small = _for_classes(small, plan, train, notes).to(session.device)
    before = accuracy(small, test)
    state = session.run.load_checkpoint()
    done = 0 if state is None else len(state["records"])
    with session.progress("finetune", config.epochs, done) as advance:
        history = tuned(
            small, train, validation, epochs=config.epochs, steps=config.steps, lr=config.lr,
            batch_size=config.batch_size, weight_decay=config.weight_decay, seed=config.seed, state=state,
            on_epoch=_kept(session, advance), world=session.world,
        )  # fmt: skip
    plan.save(session.run.artifact(_PLAN))
    save_weights(small, session.run.artifact(_SMALL))
    _facts_for(facts, train, options, config.data).write(session.run.artifact(_FACTS))
    where = f"{test.name}, test"
    results = [
        _row("before", "accuracy", 100 * before, "%", "higher", where),
        _row("after", "accuracy", 100 * accuracy(small, test), "%", "higher", where),
        _row("after", "fine-tuning", history.seconds, "s", "lower", where),
    ]
    return Outcome(results, notes=[*notes, f"{history.steps} steps; the network is the last epoch's"])


def _for_classes(small: nn.Module, plan: PrunePlan, data: Examples, notes: list[str]) -> nn.Module:
    """Give the network a head for the data's classes where it has none."""
    from stamp.examples import check_fits
    from stamp.training import recalibrate_bn, with_head

    check_fits(small, data)
    if _outputs(small) == data.num_classes:
        return small
    notes.append(f"the head had {_outputs(small)} outputs and now has {data.num_classes}, of class means")
    return with_head(recalibrate_bn(small, data), data, head=plan.head)


class EvaluateConfig(PlanOptions, DataOptions):
    """Settings of ``evaluate``."""

    data: str = argument(f"data: {_SOURCE}")
    split: _Split = Field("test", description="which part of the data")


@_command(EvaluateConfig)
def evaluate(config: EvaluateConfig, session: Session) -> Outcome:
    """Say how many examples a small network classifies rightly."""
    from stamp.training import accuracy

    small, plan, facts = _small(config)
    data = _read(_fitting(config, facts), config.data, config.split)
    if (outputs := _outputs(small)) != data.num_classes:
        raise InputError(
            f"{config.data}: has {data.num_classes} classes, and the network {outputs} outputs; fine-tune it first"
        )
    if facts.class_names and facts.class_names != data.class_names:
        raise InputError(
            f"{config.data}: its classes are {', '.join(data.class_names[:5])} ..., and the network was made for"
            f" {', '.join(facts.class_names[:5])} ...; fine-tune it on them first"
        )
    right = accuracy(small.to(session.device), data)
    row = _row(plan.method or "plan", "accuracy", 100 * right, "%", "higher", f"{data.name}, {config.split}")
    return Outcome([row], notes=[f"{round(right * len(data)):,} of {len(data):,} right"])


class BenchConfig(PlanOptions):
    """Settings of ``bench``."""

    input_shape: tuple[int, ...] = Field((), description="of one input (default: that of the data it was cut for)")
    batch_size: int = Field(64, ge=1, description="inputs of a batch")
    repeats: int = Field(30, ge=1, description="passes that count, of each network in turn")
    fold_bn: bool = Field(False, description="fold batch norms into convolutions first, in both networks")
    suggest_round_to: bool = Field(False, description="measure which multiple of channels suits this machine")


@_command(BenchConfig)
def bench(config: BenchConfig, session: Session) -> Outcome:
    """Count and time a small network beside the dense one, in turns."""
    import torch

    from stamp.report import fold_bn, report, suggest_round_to

    small, plan, facts = _small(config)
    shape = config.input_shape or facts.input_shape
    _check_shape(shape)
    dense = facts.build()
    example = torch.rand(config.batch_size, *shape, generator=torch.Generator().manual_seed(config.seed))
    for network, what in ((dense, "the dense network"), (small, "the small network")):
        _check_runs(network, example[:1], what)
    if config.fold_bn:
        dense, small = fold_bn(dense), fold_bn(small)
    found = report(
        dense, small, shape, batch_size=config.batch_size, device=str(session.device), repeats=config.repeats
    )
    write_json(session.run.artifact("report.json"), found.as_dict())
    results: list[Result] = []
    for name, size in (("dense", found.dense), ("small", found.small)):
        for metric, unit, value in (
            ("parameters", "1", size.params),
            ("multiply-adds", "1", size.macs),
            ("size", "bytes", size.bytes),
            (f"batch of {config.batch_size}, median", "ms", size.p50_ms),
            (f"batch of {config.batch_size}, 9 in 10", "ms", size.p90_ms),
        ):
            results.append(_row(name, metric, float(value), unit, "lower", facts.model))
    notes = found.table().splitlines()
    if config.suggest_round_to:
        better = suggest_round_to(facts.build(), plan.groups, example, device=str(session.device))
        rates = ", ".join(f"{multiple}: {rate:.1f}" for multiple, rate in better.gmacs.items())
        notes.append(f"--round-to {better.value} suits this machine (GMAC/s by multiple: {rates})")
    return Outcome(results, notes=notes)


def _check_runs(network: nn.Module, example: Tensor, what: str) -> None:
    import torch

    try:
        with torch.inference_mode():
            network.eval()(example)
    except Exception as error:  # a forward pass can raise anything
        raise InputError(f"--input-shape: {what} does not take {tuple(example.shape[1:])} ({_short(error)})") from error


class ExportConfig(PlanOptions):
    """Settings of ``export``."""

    format: Literal["onnx", "torchscript", "safetensors"] = Field("onnx", description="what to write")
    output: Path | None = Field(None, description="file to write (default: in the run folder of export)")
    input_shape: tuple[int, ...] = Field((), description="of one input (default: that of the data it was cut for)")
    fold_bn: bool = Field(False, description="fold batch norms into convolutions first")


@_command(ExportConfig)
def export(config: ExportConfig, session: Session) -> Outcome:
    """Write a small network for other programs, and check that the file says the same."""
    import torch

    from stamp.export import to_onnx, to_safetensors, to_torchscript
    from stamp.report import fold_bn

    small, _, facts = _small(config)
    shape = config.input_shape or facts.input_shape
    _check_shape(shape)
    example = torch.rand(4, *shape, generator=torch.Generator().manual_seed(config.seed))
    _check_runs(small, example, "the network")
    small = fold_bn(small) if config.fold_bn else small
    suffix = {"onnx": "onnx", "torchscript": "pt", "safetensors": "safetensors"}[config.format]
    path = config.output or session.run.artifact(f"small.{suffix}")
    if config.format == "onnx":
        difference = to_onnx(small, example, path, class_names=facts.class_names)
    elif config.format == "torchscript":
        difference = to_torchscript(small, example, path)
    else:
        difference = to_safetensors(small, path)
    said = f"wrote {path}: inputs (n, {', '.join(map(str, shape))}) -> logits"
    names = f" of {', '.join(facts.class_names)}" if 0 < len(facts.class_names) <= 20 else ""
    return Outcome(notes=[f"{said}{names}; differs by at most {difference:.1e}"])


# ---- pictures and data


class PlotConfig(CommandConfig):
    """Settings of ``plot``."""

    runs: tuple[Path, ...] = argument("run folder, or several (of prune: to compare masks), separated by commas")
    kind: Literal["auto", "comparison", "tradeoff", "widths", "overlap", "adaptivity", "history"] = Field(
        "auto", description="what to draw (default: what the run is about)"
    )
    output: Path | None = Field(None, description="PNG, SVG or PDF to write (default: in the run folder of plot)")


@_command(PlotConfig)
def plot(config: PlotConfig, session: Session) -> Outcome:
    """Draw accuracy over cost, kept widths, the overlap of masks, adaptivity, or a meta-training's history."""
    if not config.runs:
        raise InputError("RUNS: name a run folder")
    run = config.runs[0]
    kind = config.kind if config.kind != "auto" else _kind_of(run)

    def place(name: str) -> Path:
        return config.output or session.run.artifact(name)

    if kind == "tradeoff":
        found, steps = _cells_at(run), 0
        first = next(iter(next(iter(found["cells"].values())).values()))
        steps = max(int(count) for count in next(iter(first.values()))["accuracy"])
        drawn = _draw_tradeoff(found["cells"], found["ms"], steps, _numbered(config.output, session))
        return Outcome(notes=[f"wrote {path}" for path in drawn])
    if kind == "widths" and not _has_plan(run):
        return Outcome(notes=[f"wrote {_draw_widths(_cells_at(run)['cells'], place('widths.png'))}"])
    from stamp import plots

    if kind in ("widths", "overlap"):
        plans = {_plan_name(path, config.runs): _plan_at(path) for path in config.runs}
        if kind == "widths":
            path = plots.plot_widths(place("widths.png"), {name: _widths(plan) for name, plan in plans.items()})
        else:
            path = plots.plot_overlap(place("overlap.png"), _overlaps(plans), list(plans))
    elif kind == "adaptivity":
        seen = _cells_at(run, "seen")["seen"]
        table: dict[str, dict[str, list[float]]] = {}
        for each in seen.values():
            for name, row in each["recalibrated"].items():
                for mask, value in row.items():
                    table.setdefault(name, {}).setdefault(mask, []).append(value)
        path = plots.plot_adaptivity(place("adaptivity.png"), table)
    elif kind == "history":
        path = plots.plot_history(place("history.png"), _history(run))
    else:
        rows = [row for row in read_summary(run).results if row.metric.startswith(_DRAWN)]
        path = plots.plot_comparison(place("comparison.png"), rows or read_summary(run).results)
    return Outcome(notes=[f"wrote {path}"])


def _numbered(output: Path | None, session: Session) -> Callable[[str], Path]:
    """Place two pictures under one name."""

    def place(name: str) -> Path:
        if output is None:
            return session.run.artifact(name)
        return output if name == "tradeoff.png" else output.with_name(f"{output.stem}-ms{output.suffix}")

    return place


def _kind_of(run: Path) -> str:
    if not run.exists():
        raise InputError(f"{run}: there is no such run folder")
    if _has_plan(run):
        return "widths"
    if (run / _GENERATOR).exists():
        return "history"
    if (run / _CELLS).exists():
        found = _read_json(run / _CELLS)
        return "adaptivity" if "seen" in found else "tradeoff" if "ms" in found else "comparison"
    return "comparison"


def _has_plan(run: Path) -> bool:
    return (run.is_dir() and (run / _PLAN).exists()) or run.name.endswith(_PLAN)


def _plan_at(path: Path) -> PrunePlan:
    from stamp.plan import PrunePlan

    return PrunePlan.load(_in(path, _PLAN, "prune") if path.is_dir() else path)


def _plan_name(path: Path, among: Sequence[Path]) -> str:
    name = path.name if path.is_dir() else path.stem
    return name if [p.name if p.is_dir() else p.stem for p in among].count(name) == 1 else str(path)


def _overlaps(plans: Mapping[str, PrunePlan]) -> list[list[float]]:
    """Return the mean over groups of what two plans keep in common."""
    from stamp.selection import overlap

    def alike(a: PrunePlan, b: PrunePlan) -> float:
        if a.groups.signature() != b.groups.signature():
            raise InputError("RUNS: the plans are of different networks; their masks cannot be compared")
        found = overlap(a.keep, b.keep)
        return sum(found.values()) / len(found) if found else 1.0

    return [[alike(a, b) for b in plans.values()] for a in plans.values()]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, OSError, RecursionError) as error:
        raise InputError(f"{path}: is not what stamp writes ({_short(error)})") from error


def _cells_at(run: Path, key: str = "ms") -> dict[str, Any]:
    command = "adaptivity" if key == "seen" else "compare"
    found = _read_json(_in(run, _CELLS, command))
    if key not in found:
        raise InputError(f"{run}: its {_CELLS} is of another command; give the run folder of 'stamp {command}'")
    return found


def _history(run: Path) -> list[Any]:
    import math
    from types import SimpleNamespace

    path = _in(run, "metrics.jsonl", "meta-fit")
    try:
        entries = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
        return [
            SimpleNamespace(
                step=int(e["step"]), loss=e["loss"], spread=e["spread"],
                overlap=math.nan if e["overlap"] is None else e["overlap"],
            )
            for e in entries
        ]  # fmt: skip
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: is not of a 'stamp meta-fit' ({_short(error)})") from error


class DataConfig(DataOptions):
    """Settings of ``data``."""

    source: str = argument(_SOURCE)


@_command(DataConfig)
def data(config: DataConfig, session: Session) -> Outcome:
    """Say how a source is divided into examples to train on, to choose by and to test on."""
    del session
    notes = [f"{'':12}{'examples':>10}{'classes':>9}{'of each':>12}   inputs"]
    results: list[Result] = []
    for split in ("train", "validation", "test"):
        part = _read(config, config.source, split)
        counts = part.counts
        each = f"{int(counts.min())}-{int(counts.max())}"
        kind = str(part.x.dtype).removeprefix("torch.")
        shape = " x ".join(map(str, part.shape))
        notes.append(f"{split:12}{len(part):>10,}{part.num_classes:>9,}{each:>12}   {shape} {kind}")
        results.append(_row(split, "examples", float(len(part)), "1", "higher", part.name))
    return Outcome(results, notes=notes)
