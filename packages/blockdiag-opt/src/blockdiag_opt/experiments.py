"""The fair comparison of optimizers that ``demo`` and ``compare`` run.

Every optimizer gets the same initial weights, batches, number of gradients and schedule shape, and a learning-rate grid
of the same size. A grid whose best is at its edge is extended until the best lies inside. Learning rates are chosen on
tuning seeds, never by test data; what is reported comes from other seeds. Each training run goes through ``run.once``,
so that an interrupted comparison repeats only the one it was in.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, Literal, NamedTuple, TypeAlias, TypedDict

import numpy as np
import torch

from blockdiag_opt.plots import Curve
from blockdiag_opt.registry import lr_centre, make_optimizer, parse_spec
from blockdiag_opt.tasks import Metric, Task, make_task
from shared_core.device import one_thread
from shared_core.errors import InputError
from shared_core.runs import Claim, Result, Run, interval, summarize

__all__ = [
    "Comparison",
    "DemoSettings",
    "Grid",
    "Trace",
    "block_specs",
    "compare",
    "demo_settings",
    "lr_ladder",
    "pareto_points",
    "schedule_factor",
    "time_steps",
    "train_once",
    "tune",
]

Schedule: TypeAlias = Literal["linear", "constant"]
Density: TypeAlias = Literal[1, 2, 3]

TRAIN_LOSS = "train loss"
PAPER = "arXiv:1905.10757, abstract (in words; no figure of the paper is quoted)"
PROJECT = "this project"
_POINTS = 100
_EXPLODED = 1e4
# A probe sees other batches than the training.
_PROBE = 500_000


def _silent(note: str) -> None:
    del note


class Trace(TypedDict):
    """What one training run did; plain JSON.

    ``steps``, ``loss``, ``seconds`` and ``optimizer_seconds`` are a curve of at most a hundred points: the steps done,
    the mean loss since the point before, the wall time so far, and the part of it spent in ``optimizer.step()``.
    ``final_loss`` is the mean loss of the last tenth of the steps; None, as ``metrics`` is empty, if training diverged.
    """

    steps: list[int]
    loss: list[float]
    seconds: list[float]
    optimizer_seconds: list[float]
    final_loss: float | None
    metrics: dict[str, float]
    step_ms: float
    diverged: bool


def schedule_factor(step: int, steps: int, *, schedule: Schedule = "linear", warmup: int = 20) -> float:
    """Give the share of the learning rate that a step uses: a linear rise, then a linear fall to 0 or none.

    Parameters
    ----------
    step : 0 .. steps - 1
    steps : training steps in all
    schedule : ``linear`` falls to 0 after the last step, ``constant`` stays
    warmup : steps of the rise, at most a fifth of all

    Examples
    --------
    >>> [schedule_factor(step, 10, warmup=2) for step in (0, 1, 2, 9)]
    [0.5, 1.0, 1.0, 0.125]
    """
    warmup = min(warmup, steps // 5)
    if step < warmup:
        return (step + 1) / warmup
    return 1.0 if schedule == "constant" else (steps - step) / (steps - warmup)


def train_once(
    task: Task,
    spec: str,
    lr: float,
    seed: int,
    *,
    steps: int | None = None,
    schedule: Schedule = "linear",
    device: str = "cpu",
) -> Trace:
    """Train a task's model once.

    A loss, gradient or metric that is not finite, or a loss ten thousand times the first, ends the run: it counts as
    diverged, which is a result and not an error.

    Parameters
    ----------
    task : what to train
    spec : optimizer, as :func:`blockdiag_opt.registry.make_optimizer` takes it
    lr : learning rate at the top of the schedule
    seed : of the initial weights and the batches
    steps : training steps; None takes the task's
    schedule : as in :func:`schedule_factor`
    device : where the model is trained; it is evaluated on the CPU

    Returns
    -------
    Trace of the run.
    """
    steps = task.steps if steps is None else steps
    with one_thread():
        model = task.build(seed).to(device)
        started = time.perf_counter()
        optimizer = make_optimizer(spec, model, lr, (task.batches(seed + _PROBE, 50), task.loss))
        # Groups may have learning rates of their own; all follow the same shape.
        tops = [float(group["lr"]) for group in optimizer.param_groups]
        losses: list[float] = []
        seconds: list[float] = []
        spent: list[float] = []
        diverged = False
        in_step = 0.0
        for step, batch in enumerate(task.batches(seed, steps)):
            factor = schedule_factor(step, steps, schedule=schedule, warmup=task.warmup)
            for group, top in zip(optimizer.param_groups, tops, strict=True):
                group["lr"] = top * factor
            loss = task.loss(model, tuple(part.to(device) for part in batch))
            value = float(loss.detach())
            diverged = not math.isfinite(value) or (bool(losses) and abs(value) > _EXPLODED * max(abs(losses[0]), 1e-3))
            if diverged:
                break
            optimizer.zero_grad()
            loss.backward()
            before = time.perf_counter()
            try:
                optimizer.step()
            except (ArithmeticError, RuntimeError, ValueError):
                if _all_finite(p.grad for p in model.parameters()) and _all_finite(model.parameters()):
                    raise
                diverged = True
                break
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            after = time.perf_counter()
            in_step += after - before
            losses.append(value)
            seconds.append(after - started)
            spent.append(in_step)
        metrics = {} if diverged else task.evaluate(model.cpu())
    diverged = diverged or not all(math.isfinite(value) for value in metrics.values())
    return _trace(losses, seconds, spent, {} if diverged else metrics, diverged)


def _all_finite(tensors: Iterable[torch.Tensor | None]) -> bool:
    return all(tensor is None or bool(torch.isfinite(tensor).all()) for tensor in tensors)


def _trace(
    losses: Sequence[float], seconds: Sequence[float], spent: Sequence[float], metrics: dict[str, float], diverged: bool
) -> Trace:
    n = len(losses)
    edges = np.unique(np.linspace(0, n, min(n, _POINTS) + 1).round().astype(int)).tolist() if n else [0]
    pairs = list(pairwise(edges))
    single = np.diff(np.asarray([0.0, *spent]))
    return {
        "steps": [end for _, end in pairs],
        "loss": [float(np.mean(losses[start:end])) for start, end in pairs],
        "seconds": [seconds[end - 1] for _, end in pairs],
        "optimizer_seconds": [spent[end - 1] for _, end in pairs],
        "final_loss": None if diverged else float(np.mean(losses[-max(n // 10, 1) :])),
        "metrics": metrics,
        "step_ms": float(np.median(single)) * 1e3 if n else 0.0,
        "diverged": diverged,
    }


# ---- learning rates


_MANTISSAS: Mapping[int, tuple[float, ...]] = {1: (1.0,), 2: (1.0, 3.0), 3: (1.0, 2.0, 5.0)}


def lr_ladder(place: int, density: Density = 3) -> float:
    """Give a learning rate on the ladder 1, 2, 5, 10 (or 1, 3, 10, or the powers of ten); place 0 is 1.

    Parameters
    ----------
    place : steps up (or down) from 1
    density : rungs a decade

    Examples
    --------
    >>> [lr_ladder(place) for place in (-4, -3, -2, -1, 0)], lr_ladder(-1, 2)
    ([0.05, 0.1, 0.2, 0.5, 1.0], 0.3)
    """
    decade, rung = divmod(place, density)
    # Through text: 0.05 and not 0.05000000000000001.
    return float(f"{_MANTISSAS[density][rung]:g}e{decade}")


def _nearest_place(lr: float, density: Density) -> int:
    guess = round(math.log10(lr) * density)
    return min(range(guess - 2, guess + 3), key=lambda place: abs(math.log(lr_ladder(place, density) / lr)))


@dataclass(frozen=True)
class Grid:
    """The learning rates that were tried for one optimizer on one task.

    Parameters
    ----------
    spec : the optimizer
    losses : learning rate -> mean of what tuning looks at over the tuning seeds; None where a seed diverged
    best : the learning rate chosen
    edge : whether the best is still at an edge of the grid, so that a better one may lie outside
    seconds : wall time of tuning
    """

    spec: str
    losses: Mapping[float, float | None]
    best: float
    edge: bool
    seconds: float


_Trainings: TypeAlias = dict[str, Callable[[], Trace]]


def _trainings(
    task: Task, spec: str, lr: float, seeds: Sequence[int], *, steps: int | None, schedule: Schedule, device: str
) -> _Trainings:
    """Return the training runs of some seeds by key, as ``run.once`` takes them."""
    whole = task.steps if steps is None else steps
    how: dict[str, Any] = {"steps": whole, "schedule": schedule, "device": device}
    return {
        f"{task.name}/{task.description}/{whole}/{schedule}/{device}/{spec}/{lr:g}/{seed}": partial(
            train_once, task, spec, lr, seed, **how
        )
        for seed in seeds
    }


def _score(task: Task, trace: Trace) -> float | None:
    if trace["diverged"]:
        return None
    return trace["final_loss"] if task.tuned_by == TRAIN_LOSS else trace["metrics"][task.tuned_by]


def tune(
    run: Run,
    task: Task,
    spec: str,
    seeds: Sequence[int],
    *,
    points: int = 5,
    density: Density = 3,
    extend: int = 12,
    steps: int | None = None,
    schedule: Schedule = "linear",
    device: str = "cpu",
    advance: Callable[[str], None] = _silent,
) -> Grid:
    """Choose an optimizer's learning rate on tuning seeds.

    Parameters
    ----------
    run : where finished training runs are kept
    task, spec, steps, schedule, device : as in :func:`train_once`
    seeds : tuning seeds
    points : learning rates in the first grid, around :func:`blockdiag_opt.registry.lr_centre`
    density : learning rates a decade
    extend : most further learning rates, tried one by one as long as the best is at an edge
    advance : called with a short note after each training run

    Raises
    ------
    InputError
        When training diverged at every learning rate.
    """
    if points < 1 or not seeds:
        raise InputError(f"tuning needs a learning rate and a seed at least, got {points} and {len(seeds)}")
    seconds = 0.0

    def score(place: int) -> float | None:
        nonlocal seconds
        lr = lr_ladder(place, density)
        scores: list[float] = []
        for key, train in _trainings(task, spec, lr, seeds, steps=steps, schedule=schedule, device=device).items():
            trace = run.once(key, train)
            seconds += trace["seconds"][-1] if trace["seconds"] else 0.0
            found = _score(task, trace)
            advance(f"{task.name}, {spec}, lr {lr:g}: " + ("diverged" if found is None else f"{found:.4g}"))
            if found is None:
                return None
            scores.append(found)
        return math.fsum(scores) / len(scores)

    grid = {place: score(place) for place in _first_places(spec, points, density)}
    for _ in range(extend):
        further = _beyond(grid)
        if further is None:
            break
        grid[further] = score(further)
    finite = {place: value for place, value in grid.items() if value is not None}
    if not finite:
        tried = ", ".join(f"{lr_ladder(place, density):g}" for place in sorted(grid))
        raise InputError(f"task '{task.name}': {spec} diverged at every learning rate tried ({tried}); leave it out")
    best = min(finite, key=lambda place: finite[place])
    losses = {lr_ladder(place, density): grid[place] for place in sorted(grid)}
    return Grid(spec, losses, lr_ladder(best, density), _beyond(grid) is not None, seconds)


def _first_places(spec: str, points: int, density: Density) -> range:
    first = _nearest_place(lr_centre(spec), density) - (points - 1) // 2
    return range(first, first + points)


def _first_trainings(
    task: Task, spec: str, *, seeds: Sequence[int], points: int, density: Density, **how: Any
) -> _Trainings:
    rates = [lr_ladder(place, density) for place in _first_places(spec, points, density)]
    return {key: train for lr in rates for key, train in _trainings(task, spec, lr, seeds, **how).items()}


def _beyond(grid: Mapping[int, float | None]) -> int | None:
    """Place next to the best if the best is at an edge of the grid; None if the best lies inside."""
    finite = {place: value for place, value in grid.items() if value is not None}
    if not finite:
        return min(grid) - 1
    best = min(finite, key=lambda place: finite[place])
    return next((place for place in (best - 1, best + 1) if place not in grid), None)


# ---- comparison


class Comparison(NamedTuple):
    """What :func:`compare` returns.

    ``curves`` and ``grids`` map a task to optimizers; they are what the pictures are drawn from.
    """

    results: list[Result]
    claims: list[Claim]
    curves: dict[str, dict[str, Curve]]
    grids: dict[str, dict[str, Grid]]


def compare(
    run: Run,
    tasks: Sequence[Task],
    specs: Sequence[str],
    seeds: Sequence[int],
    *,
    tuning_seeds: Sequence[int] = (1000,),
    points: int = 5,
    density: Density = 3,
    extend: int = 12,
    steps: int | None = None,
    schedule: Schedule = "linear",
    lrs: Mapping[str, float] | None = None,
    device: str = "cpu",
    advance: Callable[[str], None] = _silent,
) -> Comparison:
    """Tune every optimizer on every task, train it on fresh seeds, and hold it against the others.

    Parameters
    ----------
    run : where finished training runs are kept
    tasks : what to train
    specs : optimizers
    seeds : one training run each; all optimizers see the same weights and batches
    tuning_seeds : seeds that learning rates are chosen on; none of them may be in `seeds`
    points, density, extend : as in :func:`tune`
    steps, schedule, device : as in :func:`train_once`
    lrs : spec -> learning rate to take instead of tuning
    advance : called with a short note after each training run

    Returns
    -------
    Results, claims, curves and grids. A seed that diverges is left out of a method's mean, and counted in a row of its
    own.

    Raises
    ------
    InputError
        For no task, optimizer or seed, one given twice, or a seed that is used for tuning too.
    """
    for what, given in (("task", [task.name for task in tasks]), ("method", specs), ("seed", seeds)):
        if not given:
            raise InputError(f"nothing to compare: give one {what} at least")
        if len(set(given)) < len(given):
            twice = next(value for place, value in enumerate(given) if value in given[:place])
            raise InputError(f"{what} '{twice}' is given twice; name it once")
    if shared := set(seeds) & set(tuning_seeds):
        raise InputError(f"seed {min(shared)} is used for tuning and for the results; keep the two apart")
    for spec in specs:
        parse_spec(spec)
    rates = lrs or {}
    how: dict[str, Any] = {"steps": steps, "schedule": schedule, "device": device}
    grid_of = partial(tune, seeds=tuning_seeds, points=points, density=density, extend=extend, **how)
    if run.spreads:
        first = partial(_first_trainings, seeds=tuning_seeds, points=points, density=density, **how)
        fresh = partial(_trainings, seeds=seeds, **how)
        _spread(run, [(task, spec) for task in tasks for spec in specs], rates, first, grid_of, fresh, advance)
        # All is stored, and told.
        advance = _silent
    results: list[Result] = []
    claims: list[Claim] = []
    curves: dict[str, dict[str, Curve]] = {}
    grids: dict[str, dict[str, Grid]] = {}
    for task in tasks:
        traces: dict[str, list[Trace]] = {}
        found = grids.setdefault(task.name, {})
        chosen: dict[str, float] = {}
        for spec in specs:
            if spec not in rates:
                found[spec] = grid_of(run, task, spec, advance=advance)
            chosen[spec] = rates[spec] if spec in rates else found[spec].best
            traces[spec] = []
            for key, train in _trainings(task, spec, chosen[spec], seeds, **how).items():
                trace = run.once(key, train)
                traces[spec].append(trace)
                ended = "diverged" if trace["final_loss"] is None else f"loss {trace['final_loss']:.4g}"
                advance(f"{task.name}, {spec}, run {len(traces[spec])} of {len(seeds)}: {ended}")
        whole = task.steps if steps is None else steps
        results += _rows(task, traces, chosen)
        claims += _claims(task, traces, found)
        curves[task.name] = {spec: curve for spec, each in traces.items() if (curve := _curve(each, whole)) is not None}
    return Comparison(results, claims, curves, grids)


def _spread(
    run: Run,
    pairs: Sequence[tuple[Task, str]],
    rates: Mapping[str, float],
    first: Callable[[Task, str], _Trainings],
    grid_of: Callable[[Run, Task, str], Grid],
    fresh: Callable[[Task, str, float], _Trainings],
    advance: Callable[[str], None],
) -> None:
    """Do with the run's workers what a comparison asks for: first grids, what extends each of them, fresh seeds."""

    def told(key: str) -> None:
        # The end of the key: optimizer, learning rate and seed.
        advance(", ".join(key.rsplit("/", 3)[1:]))

    def extend(copy: Run, task: Task, spec: str) -> None:
        grid_of(copy, task, spec)

    tuned = [(task, spec) for task, spec in pairs if spec not in rates]
    run.spread({key: train for pair in tuned for key, train in first(*pair).items()}, told)
    run.spread_parts({f"{task.name}/{spec}": partial(extend, task=task, spec=spec) for task, spec in tuned})
    work: dict[str, Callable[[], Trace]] = {}
    for task, spec in pairs:
        work |= fresh(task, spec, rates[spec] if spec in rates else grid_of(run, task, spec).best)
    run.spread(work, told)


def _curve(traces: Sequence[Trace], steps: int) -> Curve | None:
    kept = [trace for trace in traces if not trace["diverged"] and trace["steps"][-1] == steps]
    if not kept:
        return None
    return Curve(
        steps=np.asarray(kept[0]["steps"], dtype=np.float64),
        loss=np.asarray([trace["loss"] for trace in kept]),
        seconds=np.asarray([trace["seconds"] for trace in kept]),
    )


def _values(traces: Sequence[Trace], metric: str) -> list[float | None]:
    if metric == TRAIN_LOSS:
        return [trace["final_loss"] for trace in traces]
    return [trace["metrics"].get(metric) for trace in traces]


def _first_below(trace: Trace, target: float) -> tuple[float, float] | None:
    """Find the steps and seconds after which the training loss first was at or below `target`."""
    for step, loss, seconds in zip(trace["steps"], trace["loss"], trace["seconds"], strict=True):
        if loss <= target:
            return float(step), seconds
    return None


def _reference(specs: Iterable[str]) -> str | None:
    """Find the Adam of a comparison, to which the others are held: the first spec of that name."""
    return next((spec for spec in specs if spec.partition(":")[0].strip().lower() == "adam"), None)


def _rows(task: Task, traces: Mapping[str, Sequence[Trace]], rates: Mapping[str, float]) -> list[Result]:
    rows: list[Result] = []

    def add(spec: str, metric: Metric, values: Sequence[float | None]) -> None:
        kept = [value for value in values if value is not None]
        if not kept:
            return
        seconds = math.fsum(trace["seconds"][-1] for trace in traces[spec] if trace["seconds"])
        rows.append(
            summarize(
                kept,
                dataset=task.name,
                method=spec,
                metric=metric.name,
                unit=metric.unit,
                better=metric.better,
                seconds=seconds,
            )
        )

    for metric in (Metric(TRAIN_LOSS, task.loss_unit), *task.metrics):
        for spec, each in traces.items():
            add(spec, metric, _values(each, metric.name))
    for spec, each in traces.items():
        add(spec, Metric("ms per step", "ms"), [trace["step_ms"] for trace in each])
    reference = _reference(traces)
    target = None if reference is None else _mean(trace["final_loss"] for trace in traces[reference])
    if target is not None:
        reached = {spec: [_first_below(trace, target) for trace in each] for spec, each in traces.items()}
        for place, metric in enumerate(
            (Metric("steps to Adam's final loss"), Metric("seconds to Adam's final loss", "s"))
        ):
            for spec, each in reached.items():
                # A mean over the seeds that got there would flatter those that mostly do not.
                if all(pair is not None for pair in each):
                    add(spec, metric, [pair[place] for pair in each if pair is not None])
    for spec, lr in rates.items():
        add(spec, Metric("best learning rate"), [lr])
    if any(trace["diverged"] for each in traces.values() for trace in each):
        for spec, each in traces.items():
            add(spec, Metric("diverged runs", "runs"), [float(sum(trace["diverged"] for trace in each))])
    return rows


def _mean(values: Iterable[float | None]) -> float | None:
    kept = [value for value in values if value is not None]
    return math.fsum(kept) / len(kept) if kept else None


def _claims(task: Task, traces: Mapping[str, Sequence[Trace]], grids: Mapping[str, Grid]) -> list[Claim]:
    claims: list[Claim] = []
    ours = [spec for spec in traces if parse_spec(spec).name in _BLOCK_NAMES]
    metrics = [Metric(TRAIN_LOSS, task.loss_unit)]
    if task.tuned_by != TRAIN_LOSS:
        metrics = [task.headline]
    elif task.headline.name != TRAIN_LOSS:
        metrics.append(task.headline)
    rivals = [spec for spec in traces if parse_spec(spec).name in _RIVALS]
    for spec in ours:
        for rival in rivals:
            source = PAPER if parse_spec(rival).origin == "torch" else PROJECT
            # Against Adam, the paper's main rival, what the trained model is good for is claimed as well.
            held = metrics if rival == _reference(traces) else metrics[:1]
            claims += [_paired(task, traces, spec, rival, metric, source) for metric in held]
    for spec in ours:
        # Where the same optimizer appears with both groupings, say which one is better.
        options = parse_spec(spec).options
        for other in ours:
            rest = parse_spec(other).options
            if (
                parse_spec(other).name == parse_spec(spec).name
                and rest.get("grouping") == "input"
                and options.get("grouping", "auto") in {"auto", "output"}
                and _without_grouping(options) == _without_grouping(rest)
            ):
                claims.append(_paired(task, traces, spec, other, metrics[0], PROJECT))
    if grids:
        open_ends = [spec for spec, grid in grids.items() if grid.edge]
        claims.append(
            Claim(
                text=f"{task.name}: the best learning rate of every optimizer lies inside its grid"
                + (f" (not so: {', '.join(open_ends)})" if open_ends else ""),
                source="specification 3, fair comparison",
                holds=not open_ends,
                value=float(len(open_ends)),
                threshold=0.0,
            )
        )
    return claims


_BLOCK_NAMES = frozenset(
    {
        "block-adam",
        "block-adamw",
        "block-adagrad",
        "block-rmsprop",
        "block-amsgrad",
        "block-adafom",
        "adablock",
        "radablock",
    }
)
_RIVALS = ("adam", "sgd", "soap", "shampoo")


def _without_grouping(options: Mapping[str, object]) -> dict[str, str]:
    return {key: repr(value) for key, value in options.items() if key != "grouping"}


def _paired(
    task: Task,
    traces: Mapping[str, Sequence[Trace]],
    ours: str,
    rival: str,
    metric: Metric,
    source: str,
) -> Claim:
    """Hold the seed-by-seed advantage of `ours` against 0: the 95 % interval of its mean must lie above it."""
    sign = 1.0 if metric.better == "higher" else -1.0
    pairs = zip(_values(traces[ours], metric.name), _values(traces[rival], metric.name), strict=True)
    gains = [sign * (a - b) for a, b in pairs if a is not None and b is not None]
    text = f"{task.name}: {ours} is better than {rival} in {metric.name}"
    if len(gains) < len(traces[ours]):
        return Claim(text=f"{text} (a seed diverged)", source=source, holds=False, value=None, threshold=0.0)
    mean, low, high = interval(gains)
    unit = " points" if metric.unit == "%" else ""
    spread = "" if low is None or high is None else f" (95 % interval of the gain: {low:.3g} to {high:.3g}{unit})"
    return Claim(text=text + spread, source=source, holds=(mean if low is None else low) > 0, value=mean, threshold=0.0)


# ---- quality against price


def block_specs(block_sizes: Sequence[int], intervals: Sequence[int], name: str = "block-adam") -> list[str]:
    """Write the specs of every block size with every refresh interval.

    Examples
    --------
    >>> block_specs([4, 10], [1, 5])
    ['block-adam:b=4,K=1', 'block-adam:b=4,K=5', 'block-adam:b=10,K=1', 'block-adam:b=10,K=5']
    """
    return [f"{name}:b={b},K={K}" for b in block_sizes for K in intervals]


def pareto_points(results: Sequence[Result], dataset: str, metric: str = TRAIN_LOSS) -> dict[str, tuple[float, float]]:
    """Collect (milliseconds of an optimizer step, metric) of every method of a comparison.

    Parameters
    ----------
    results : rows of :func:`compare`
    dataset : a task's name
    metric : the other axis
    """
    rows = [row for row in results if row.dataset == dataset]
    price = {row.method: row.mean for row in rows if row.metric == "ms per step"}
    value = {row.method: row.mean for row in rows if row.metric == metric}
    return {method: (price[method], value[method]) for method in price if method in value}


# ---- the demo


@dataclass(frozen=True)
class DemoSettings:
    """What ``demo`` compares: embedded data only, within a minute on two cores."""

    tasks: tuple[Task, ...]
    specs: tuple[str, ...]
    seeds: tuple[int, ...]
    tuning_seeds: tuple[int, ...]
    points: int
    density: Density
    extend: int


def demo_settings(seeds: int = 3, steps: int | None = None) -> DemoSettings:
    """Choose the demo's tasks and optimizers: Adam and SGD against blocks by output, by input, and clipped.

    Parameters
    ----------
    seeds : training runs of each optimizer
    steps : training steps; None takes 200
    """
    lengths = {"breast-cancer": 200, "autoencoder-digits": 200}
    return DemoSettings(
        tasks=tuple(replace(make_task(name), steps=steps or length) for name, length in lengths.items()),
        specs=("adam", "sgd", "block-adam", "block-adam:grouping=input", "block-adam:clip=0.1"),
        seeds=tuple(range(seeds)),
        tuning_seeds=(1000, 1001),
        points=5,
        density=3,
        extend=4,
    )


# ---- price alone


def time_steps(
    run: Run,
    weights: int,
    pairs: Sequence[tuple[int, int]],
    *,
    device: str = "cpu",
    advance: Callable[[str], None] = _silent,
) -> dict[str, float]:
    """Time the steps of Adam and of block-adam on a two-layer network's weights.

    Parameters
    ----------
    run : where finished timings are kept
    weights : about how many weights
    pairs : (block size, update interval)
    device : where the weights are
    advance : called with a short note after each timing

    Returns
    -------
    ``"adam"`` and ``"b=...,K=..."`` -> median seconds of a step. Every interval is timed over whole cycles.
    """
    side = max(10, round(math.sqrt(weights / 2)))
    random = torch.Generator().manual_seed(0)

    def measure(spec: str, cycle: int) -> float:
        params = [torch.nn.Parameter(torch.randn(side, side, generator=random).to(device)) for _ in range(2)]
        for param in params:
            mixed = torch.randn(side, side, generator=random) @ torch.randn(side, side, generator=random)
            param.grad = (mixed / side).to(device)
        optimizer = make_optimizer(spec, params, 1e-4)
        for _ in range(cycle + 2):
            optimizer.step()
        times: list[float] = []
        for _ in range(5):
            started = time.perf_counter()
            for _ in range(cycle):
                optimizer.step()
            if device != "cpu":
                torch.cuda.synchronize()
            times.append((time.perf_counter() - started) / cycle)
        return float(np.median(times))

    found: dict[str, float] = {}
    for name, spec, cycle in [("adam", "adam", 5)] + [
        (f"b={b},K={K}", f"block-adam:b={b},K={K}", max(K, 3)) for b, K in pairs
    ]:
        found[name] = run.once(f"time/{weights}/{name}/{device}", lambda spec=spec, cycle=cycle: measure(spec, cycle))
        advance(name)
    return found
