"""Compare methods on the same clients and tasks: as many rounds for each, tuned with the same number of trials."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Float64

from fedapc.baselines import Training
from fedapc.baselines.methods import find_method
from fedapc.config import FedAPCConfig
from fedapc.data import Benchmark, benchmark
from fedapc.errors import SparsityWarning, TrainingDivergedError
from fedapc.federation import Federation, training_of
from fedapc.networks import network
from fedapc.report import Report, plain_numbers
from fedapc.seeds import derive, generator
from fedapc.tasks import Task
from shared_core.errors import InputError
from shared_core.runs import Claim, Result, Run, summarize

__all__ = [
    "ABLATIONS",
    "DEMO_METHODS",
    "Protocol",
    "claims_of",
    "compare",
    "mean_known",
    "measure",
    "results_of",
    "run",
    "transfer",
    "transfer_claims",
    "transfer_tasks",
    "tune",
]

ABLATIONS = (
    "fedapc",
    "fedweit",
    "fedapc-no-kb",
    "fedapc-mean",
    "fedapc-dense",
    "fedapc-no-mask",
    "fedapc-frozen",
    "fedapc-no-retention",
)
"""FedAPC, and FedAPC without one of its parts each."""

DEMO_METHODS = ("finetune", "fedavg", "ewc", "apd", "fedapc")

_LEARNING_RATES = (1e-4, 1e-3 / 3, 1e-3, 3e-3)
_TUNING_SEED = 7919
_METRICS: dict[str, tuple[str, float, str, Literal["lower", "higher"]]] = {
    # Of a cell's number: what it is called, by what it is multiplied, its unit, what is better.
    "accuracy": ("accuracy", 100.0, "%", "higher"),
    "forgetting": ("forgetting", 100.0, "points", "lower"),
    "learning": ("accuracy when learnt", 100.0, "%", "higher"),
    "up": ("sent up", 1e-6, "MB", "lower"),
    "down": ("sent down", 1e-6, "MB", "lower"),
    "up_payload": ("sent up, numbers alone", 1e-6, "MB", "lower"),
    "down_payload": ("sent down, numbers alone", 1e-6, "MB", "lower"),
    "gain": ("gain by parts of others", 100.0, "points", "higher"),
    "density": ("density of parts", 100.0, "%", "lower"),
    "capacity": ("weights held, in networks", 1.0, "1", "lower"),
}
Cell = dict[str, Any]
_Made = TypeVar("_Made")


def _silent(note: str, done: float) -> None:
    del note, done


@dataclass(frozen=True)
class Protocol:
    """What methods that are compared have in common.

    Parameters
    ----------
    clients, tasks, per_class : of the benchmark; training examples of a class
    network : see `fedapc.networks.network`; none for the benchmark's own
    rounds, epochs, batch_size : of every task; passes over its examples a round
    lr : learning rate of methods that are not tuned
    config : further settings of FedAPC and its relatives
    strengths : of methods that have one further number, by method, where they are not tuned
    trials : settings tried for every method, if it is tuned
    """

    clients: int = 4
    tasks: int = 4
    per_class: int = 20
    network: str | None = None
    rounds: int = 5
    epochs: int = 3
    batch_size: int = 50
    lr: float = 1e-3
    config: Mapping[str, Any] | None = None
    strengths: Mapping[str, float] | None = None
    trials: int = 6

    def federation_config(self, lr: float) -> FedAPCConfig:
        """Return the settings of FedAPC at a learning rate."""
        common = {"rounds": self.rounds, "epochs": self.epochs, "batch_size": self.batch_size, "lr": lr}
        return FedAPCConfig.preset("probed", **{**common, **(self.config or {})})


def run(
    method: str,
    data: Benchmark,
    protocol: Protocol,
    *,
    seed: int = 0,
    lr: float | None = None,
    strength: float | None = None,
    device: str = "cpu",
    **options: Any,
) -> Report:
    """Run one method on a benchmark.

    Parameters
    ----------
    method : of `fedapc.baselines.METHODS`
    data : the clients' tasks
    protocol : what is common to all methods
    seed : of all draws of the run; not of the benchmark
    lr, strength : in place of the protocol's
    device : where clients compute
    options : of `Federation.fit`
    """
    info = find_method(method)
    config = protocol.federation_config(lr or protocol.lr)
    first = next(iter(data.tasks.values()))[0]
    body = network(protocol.network or data.network, first.x[:1], first.classes)
    with warnings.catch_warnings():
        # Whether parts are sparse is in the results.
        warnings.simplefilter("ignore", SparsityWarning)
        training = training_of(config)
        strength = (protocol.strengths or {}).get(method) if strength is None else strength
        if strength is not None and info.strength is not None:
            training = replace(training, **{info.strength: strength})
        federation = Federation(body, method, config=config, training=training, seed=seed, device=device)
        return federation.fit(data.tasks, **options)


def measure(report: Report) -> Cell:
    """Return the numbers of a run that are compared."""

    def sent(direction: str, amount: Any) -> int:
        return report.ledger.total(amount, direction=direction)

    found: Cell = {
        "accuracy": report.accuracy,
        "forgetting": report.forgetting,
        "learning": report.learning_accuracy,
        "gain": report.transfer_gain,
        "density": report.density,
        "capacity": report.capacity,
        "up": sent("up", "encoded_bytes"),
        "down": sent("down", "encoded_bytes"),
        "up_payload": sent("up", "payload_bytes"),
        "down_payload": sent("down", "payload_bytes"),
        "seconds": report.seconds,
        "matrix": plain_numbers(report.matrix),
    }
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in found.items()}


def tune(
    once: Callable[[str, Callable[[], Any]], Any],
    method: str,
    data: Benchmark,
    protocol: Protocol,
    *,
    seed: int,
    device: str = "cpu",
) -> dict[str, float]:
    """Choose a method's learning rate, and its further number if it has one, by accuracy on validation examples.

    Every method gets `Protocol.trials` runs: four learning rates first; then two more values of its further number,
    or two more learning rates beside the best.

    Parameters
    ----------
    once : stores a piece of work, such as `shared_core.runs.Run.once`
    method : to tune
    data : a draw of the benchmark that is not tested on; its tasks have validation examples
    protocol : what is common to all methods
    seed : of the runs
    device : where clients compute

    Returns
    -------
    ``lr``, ``strength`` if there is one, and ``accuracy`` on validation examples.
    """
    judged = replace(data, tasks={name: [_judged_early(task) for task in own] for name, own in data.tasks.items()})
    info = find_method(method)

    def trial(lr: float, strength: float | None) -> float:
        def compute() -> float:
            try:
                found = run(method, judged, protocol, seed=seed, lr=lr, strength=strength, device=device)
            except TrainingDivergedError:
                return 0.0
            return found.accuracy if math.isfinite(found.accuracy) else 0.0

        return float(once(f"tune {method} {lr:.6g} {strength}", compute))

    rates = _LEARNING_RATES[: protocol.trials]
    tried: list[tuple[float, float, float | None]] = [(trial(lr, None), lr, None) for lr in rates]
    left = protocol.trials - len(rates)
    best = max(tried, key=lambda row: row[0])[1]
    if info.strength is not None:
        default = float(getattr(Training(), info.strength))
        others = [value for value in info.grid if not math.isclose(value, default)]
        # The nearest to the default first.
        others.sort(key=lambda value: abs(math.log(value / default)) if value > 0 < default else math.inf)
        tried += [(trial(best, value), best, value) for value in others[:left]]
    else:
        tried += [(trial(lr, None), lr, None) for lr in (best / 1.8, best * 1.8)[:left]]
    score, lr, strength = max(tried, key=lambda row: row[0])
    chosen = {"lr": lr, "accuracy": score}
    return chosen if strength is None else {**chosen, "strength": strength}


def _judged_early(task: Task) -> Task:
    """Put validation examples in the place of those of the test, which tuning must not see."""
    if task.validation is None:
        raise InputError(f"task '{task.name}' has no validation examples; methods cannot be tuned on it")
    return replace(task, test=task.validation)


def compare(
    store: Run,
    name: str,
    *,
    methods: Sequence[str],
    seeds: Sequence[int],
    protocol: Protocol,
    tuned: bool = False,
    device: str = "cpu",
    options: Mapping[str, Any] | None = None,
    advance: Callable[[str, float], None] = _silent,
) -> dict[str, dict[int, Cell]]:
    """Run methods on the same draws of a benchmark.

    Parameters
    ----------
    store : keeps what is done, so that an interrupted comparison repeats only the run it was in; its workers take a
        run each, or the tuning of a method
    name : of the benchmark
    methods : to compare
    seeds : each a draw of the benchmark, and of everything else
    protocol : what is common to all methods
    tuned : choose settings of every method on another draw of the benchmark first
    device : where clients compute
    options : of the benchmark
    advance : called with a note and how many runs are done since

    Returns
    -------
    A cell of numbers for every method and seed; ``setting`` is what was tuned.
    """
    for method in methods:
        find_method(method)

    drawn = _Last(partial(_drawn, name, protocol, options or {}))
    settings: dict[str, dict[str, float]] = {method: {} for method in methods}
    if tuned:
        settings = _tuned(store, methods, drawn, protocol, seeds[0] + _TUNING_SEED, device, advance)
    work = {
        f"{method} {seed}": partial(_cell, drawn, method, seed, protocol, settings[method], device)
        for seed in seeds
        for method in methods
    }
    found = store.each(work, lambda key, _: advance(key, 1))
    return {method: {seed: found[f"{method} {seed}"] for seed in seeds} for method in methods}


def _drawn(name: str, protocol: Protocol, options: Mapping[str, Any], seed: int) -> Benchmark:
    return benchmark(
        name, clients=protocol.clients, tasks=protocol.tasks, per_class=protocol.per_class, seed=seed, **options
    )


class _Last(Generic[_Made]):
    """Makes what belongs to a seed, and keeps it until another is asked for; other processes make their own."""

    def __init__(self, make: Callable[[int], _Made]) -> None:
        self._make = make
        self._kept: dict[int, _Made] = {}

    def __call__(self, seed: int) -> _Made:
        if seed not in self._kept:
            self._kept = {seed: self._make(seed)}
        return self._kept[seed]

    def __reduce__(self) -> tuple[type[_Last[_Made]], tuple[Callable[[int], _Made]]]:
        return type(self), (self._make,)


def _cell(
    drawn: Callable[[int], Benchmark],
    method: str,
    seed: int,
    protocol: Protocol,
    chosen: Mapping[str, float],
    device: str,
) -> Cell:
    begun = time.perf_counter()
    found = run(
        method, drawn(seed), protocol, seed=seed, lr=chosen.get("lr"), strength=chosen.get("strength"), device=device
    )
    return {**measure(found), "seconds": time.perf_counter() - begun, "setting": dict(chosen)}


def _tuned(
    store: Run,
    methods: Sequence[str],
    drawn: Callable[[int], Benchmark],
    protocol: Protocol,
    seed: int,
    device: str,
    advance: Callable[[str, float], None],
) -> dict[str, dict[str, float]]:
    """Tune each method, one a worker: which settings it tries depends on what the first ones gave."""
    done: set[str] = set()

    def told(method: str) -> None:
        done.add(method)
        advance(f"{method} tuned", protocol.trials)

    options: dict[str, Any] = {"drawn": drawn, "protocol": protocol, "seed": seed, "device": device}
    store.spread_parts({method: partial(_tuned_in, method=method, **options) for method in methods}, told)
    settings: dict[str, dict[str, float]] = {}
    for method in methods:
        settings[method] = _tuned_in(store, method=method, **options)
        if method not in done:
            told(method)
    return settings


def _tuned_in(
    store: Run, *, method: str, drawn: Callable[[int], Benchmark], protocol: Protocol, seed: int, device: str
) -> dict[str, float]:
    return tune(store.once, method, drawn(seed), protocol, seed=seed, device=device)


def results_of(name: str, cells: Mapping[str, Mapping[int, Cell]]) -> list[Result]:
    """Summarise cells: a row for every method and number that it has."""
    rows: list[Result] = []
    for method, by_seed in cells.items():
        seconds = sum(cell["seconds"] for cell in by_seed.values())
        for key, (metric, scale, unit, better) in _METRICS.items():
            values = [cell[key] for cell in by_seed.values() if cell.get(key) is not None]
            if not values:
                continue
            rows.append(
                summarize(
                    # Differences of floats that are equal are not 1e-16 points.
                    [round(scale * value, 9) for value in values],
                    dataset=name,
                    method=method,
                    metric=metric,
                    unit=unit,
                    better=better,
                    seconds=seconds,
                )
            )
    return rows


def mean_known(arrays: Sequence[Float64[np.ndarray, "..."]]) -> Float64[np.ndarray, "..."]:
    """Average arrays entry by entry over those that have it, NaN where none has.

    Parameters
    ----------
    arrays : of one shape, with NaN where there is nothing

    Examples
    --------
    >>> mean_known([np.array([1.0, np.nan]), np.array([3.0, np.nan])])
    array([ 2., nan])
    """
    stacked = np.stack(arrays)
    there = (~np.isnan(stacked)).sum(0)
    return np.where(there > 0, np.nansum(stacked, 0) / np.maximum(there, 1), np.nan)


def claims_of(cells: Mapping[str, Mapping[int, Cell]], ours: str = "fedapc") -> list[Claim]:
    """Hold the paper's claims against cells: by seed, so that one that holds in the mean only does not.

    Parameters
    ----------
    cells : by method and seed
    ours : the method the claims are about
    """
    if ours not in cells:
        return []
    mine = cells[ours]
    claims = [
        _claim(
            "past tasks are not forgotten: at most 2 points, for every seed",
            max(cell["forgetting"] for cell in mine.values()),
            0.02,
            below=True,
        )
    ]
    for other, by_seed in cells.items():
        if other == ours or other in ABLATIONS:
            continue
        margin = min(mine[seed]["accuracy"] - by_seed[seed]["accuracy"] for seed in mine)
        if other == "stl":
            text, least = "at most 5 points behind a network of its own for every task, for every seed", -0.05
        else:
            text, least = f"more accurate than {other}, for every seed", 0.0
        claims.append(_claim(text, margin, least))
    if "fedavg" in cells:
        share = max(mine[seed]["up"] / cells["fedavg"][seed]["up"] for seed in mine)
        claims.append(_claim("sends up at most half of FedAvg's bytes", share, 0.5, below=True))
    if "fedapc-no-retention" in cells:
        least = min(cell["forgetting"] for cell in cells["fedapc-no-retention"].values())
        claims.append(_claim("without the retroactive penalty at least 10 points are forgotten", least, 0.1))
    gains = [cell["gain"] for cell in mine.values() if cell["gain"] is not None]
    if gains:
        claims.append(_claim("parts of others help the task that attends to them, for every seed", min(gains), 0.0))
    return claims


def _claim(text: str, value: float, threshold: float, *, below: bool = False) -> Claim:
    holds = value <= threshold if below else value > threshold
    return Claim(text=text, source="Yoon et al. 2021", holds=holds, value=value, threshold=threshold)


def transfer_claims(cells: Mapping[str, Mapping[int, Cell]]) -> list[Claim]:
    """Hold what `transfer` found against the claim that related clients gain and others are not hurt."""
    mean = {label: float(np.mean([cell["accuracy"] for cell in by.values()])) for label, by in cells.items()}
    gained = mean["related, learned"] - mean["related, none"]
    lost = mean["unrelated, none"] - mean["unrelated, learned"]
    ahead = mean["related, learned"] - mean["related, mean"]
    return [
        _claim("the part of a client that learnt the same helps, in the mean over draws", gained, 0.0),
        _claim("and helps more when it is attended to than in a mean of all", ahead, 0.0),
        _claim("parts of strangers cost at most a point, in the mean over draws", lost, 0.01, below=True),
    ]


def transfer_tasks(
    source: Benchmark, *, donor: int, receiver: int, distractors: int, seed: int
) -> tuple[dict[str, list[Task]], dict[str, list[Task]]]:
    """Make clients of which one needs what another one knows.

    Client ``donor`` learns a problem from many examples as its first task; client ``receiver`` meets the same problem
    as its second task with few; the others, and everybody's other tasks, are of permuted pixels.

    Parameters
    ----------
    source : one client with one task, whose training examples are plenty
    donor, receiver : examples of a class that these have
    distractors : further clients
    seed : of the draws

    Returns
    -------
    Tasks by client; and the same with a problem that nobody else has for the receiver.
    """
    whole = next(iter(source.tasks.values()))[0]
    random = generator(seed, "transfer")
    order = torch.randperm(len(whole.y), generator=random)
    x, y = whole.x[order].flatten(1), whole.y[order]
    assert whole.test is not None
    test_x, test_y = whole.test[0].flatten(1), whole.test[1]

    def part(count: int, start: int, permutation: torch.Tensor | None, name: str) -> Task:
        rows = torch.cat([(y == label).nonzero().squeeze(1)[start : start + count] for label in range(whole.classes)])
        if len(rows) < count * whole.classes:
            raise InputError(f"{source.name}: has no {start + count} training examples of every class; ask for fewer")
        pixels = slice(None) if permutation is None else permutation
        return Task(x[rows][:, pixels], y[rows], whole.classes, test=(test_x[:, pixels], test_y), name=name)

    def permuted() -> torch.Tensor:
        return torch.randperm(x.shape[1], generator=random)

    def clients(wanted: torch.Tensor | None) -> dict[str, list[Task]]:
        made = {
            "donor": [part(donor, 0, None, "the problem"), part(receiver, donor, others[0], "another")],
            "receiver": [
                part(receiver, donor, others[1], "another"),
                part(receiver, donor + receiver, wanted, "the problem" if wanted is None else "nobody's"),
            ],
        }
        for number in range(distractors):
            made[f"other{number}"] = [
                part(donor, 0, others[2 + 2 * number], "another"),
                part(receiver, donor, others[3 + 2 * number], "another"),
            ]
        return made

    others = [permuted() for _ in range(2 + 2 * distractors)]
    return clients(None), clients(permuted())


def transfer(
    store: Run,
    name: str,
    *,
    seeds: Sequence[int],
    protocol: Protocol,
    donor: int = 100,
    receiver: int = 5,
    distractors: int = 2,
    train_base: bool = False,
    device: str = "cpu",
    options: Mapping[str, Any] | None = None,
    advance: Callable[[str, float], None] = _silent,
) -> dict[str, dict[int, Cell]]:
    """Measure what a client gains from the adaptive part of another that has learnt the same, and of strangers.

    Parameters
    ----------
    store, name, seeds, protocol, device, options, advance : as for `compare`
    donor, receiver, distractors : see `transfer_tasks`
    train_base : else the base stays random, so that parts alone can carry what is known

    Returns
    -------
    Cells of ``related none``, ``related mean``, ``related learned``, and the same ``unrelated``: ``accuracy`` of the
    receiver's second task, and what it attends to: ``donor`` and ``strangers``, mean absolute weights.
    """
    drawn = _Last(partial(_transfers, name, donor, receiver, distractors, options or {}))
    labels = {f"{kind}, {how}": (kind, how) for kind in ("related", "unrelated") for how in ("none", "mean", "learned")}
    work = {
        f"{label} {seed}": partial(
            _transfer_cell, drawn, *labels[label], seed, protocol, train_base=train_base, device=device
        )
        for seed in seeds
        for label in labels
    }
    found = store.each(work, lambda key, _: advance(key, 1))
    return {label: {seed: found[f"{label} {seed}"] for seed in seeds} for label in labels}


_Transfers = tuple[Benchmark, dict[str, dict[str, list[Task]]]]


def _transfers(
    name: str, donor: int, receiver: int, distractors: int, options: Mapping[str, Any], seed: int
) -> _Transfers:
    source = benchmark(
        name, clients=1, tasks=1, per_class=donor + 2 * receiver + 1, seed=derive(seed, "source") % 2**31, **options
    )
    related, unrelated = transfer_tasks(source, donor=donor, receiver=receiver, distractors=distractors, seed=seed)
    return source, {"related": related, "unrelated": unrelated}


def _transfer_cell(
    drawn: Callable[[int], _Transfers],
    kind: str,
    how: str,
    seed: int,
    protocol: Protocol,
    *,
    train_base: bool,
    device: str,
) -> Cell:
    source, tasks = drawn(seed)
    settings = {**(protocol.config or {}), "transfer": how, "train_base": train_base}
    found = run(
        "fedapc", replace(source, tasks=tasks[kind]), replace(protocol, config=settings), seed=seed, device=device
    )
    place = found.clients.index("receiver")
    slots = found.attention("receiver", 1).values()
    strangers = [abs(weight) for layer in slots for (of, _), weight in layer.items() if of != "donor"]
    return {
        "accuracy": float(found.matrix[place, 1, 1]),
        "donor": _mean([layer["donor", 0] for layer in slots if ("donor", 0) in layer]),
        "strangers": _mean(strangers),
        "seconds": found.seconds,
    }


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
