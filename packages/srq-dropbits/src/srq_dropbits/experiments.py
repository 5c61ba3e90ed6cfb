"""The comparisons that ``demo``, ``compare``, ``sweep`` and ``lottery`` run.

All methods start from the same float network and see the same batches for the same number of epochs. Each gets the same
grid of learning rates, chosen by accuracy on validation rows of tuning seeds (one whose best lies at the grid's edge
tries further rates there); what is reported comes from other seeds and from test rows. Every training goes through
``run.once``: an interrupted comparison repeats only the one it was in.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, TypeVar

import torch
from torch import nn

from shared_core.device import one_thread
from shared_core.errors import InputError, no_such
from shared_core.runs import Claim, Result, Run, interval, summarize
from srq_dropbits.config import DropBits, LearnBits, QuantConfig, Weighting
from srq_dropbits.models import build
from srq_dropbits.structure import float_weight, quantized_layers, weight_quantizer
from srq_dropbits.training import Augment, evaluate, fit, quantize_and_train
from srq_dropbits.userdata import DataSplit, LabelledData, load_images_or_table

if TYPE_CHECKING:
    from srq_dropbits.diagnose import EstimatorBias, GainCurve, WeightDiagnosis

__all__ = [
    "SRQ_VARIANTS",
    "TASKS",
    "Cell",
    "Comparison",
    "Task",
    "compare",
    "diagnosis_rows",
    "export_example",
    "lottery",
    "parse_method",
    "quantization_error",
    "sweep",
    "task_named",
]

PAPER = "arXiv:1911.12990 and arXiv:2109.02100, abstracts (in words)"
SPEC = "this project's acceptance section"
RATES = (3e-4, 1e-3, 3e-3)
_FURTHER = 3
"""Most rates that a method may try beyond the grid."""
_HELD = 4
"""Splits kept in memory."""
SRQ_VARIANTS = (
    "mcste-input",
    "mcste-clipped",
    "mode-soft",
    "mode-gumbel",
    "srq",
    "srq+dropbits",
)
"""Methods that forward the mode of the distribution and differentiate the distribution."""
_FLOAT = "float32"


_Advance = Callable[[str], None]
_Found = TypeVar("_Found")


def _silent(note: str) -> None:
    del note


@dataclass(frozen=True)
class Task:
    """A data set, a network, and how long both trainings last.

    Parameters
    ----------
    name : of the task
    data : as :func:`srq_dropbits.userdata.load_images_or_table` takes it
    arch : as :func:`srq_dropbits.models.build` takes it
    rows : most rows used of the training part, or None
    test_rows : most rows used of an official test part, or None
    float_epochs : epochs of the float network
    float_lr : its learning rate
    epochs : epochs after quantization
    batch_size : rows in a step
    augment : as :func:`srq_dropbits.training.fit` takes it
    target : label column of a table
    """

    name: str
    data: str
    arch: str
    rows: int | None = None
    test_rows: int | None = None
    float_epochs: int = 15
    float_lr: float = 3e-3
    epochs: int = 6
    batch_size: int = 64
    augment: Augment = "none"
    target: str | None = None

    @property
    def key(self) -> str:
        """What a stored result depends on."""
        return json.dumps([getattr(self, name) for name in self.__dataclass_fields__], sort_keys=True)

    def load(self, seed: int) -> LabelledData:
        """Read the rows; which ones are used depends on the seed where there are more than asked for."""
        data = load_images_or_table(self.data, target=self.target)
        return data.limit(self.rows, seed, test_rows=self.test_rows)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("digits", "digits", "digits-cnn"),
        Task("digits-mlp", "digits", "mlp:32,32", float_epochs=30),
        Task("mnist-small", "mnist", "lenet5:0.25", rows=3000, test_rows=5000, float_epochs=8, epochs=4),
        Task("mnist", "mnist", "lenet5", rows=12_000, float_epochs=6, float_lr=1e-3, epochs=3, batch_size=128),
        Task(
            "cifar10",
            "cifar10",
            "vgg7:0.125",
            rows=5000,
            test_rows=5000,
            float_epochs=15,
            float_lr=2e-3,
            epochs=4,
            batch_size=128,
            augment="crop+flip",
        ),
    )
}
"""Tasks by name. ``mnist`` and ``cifar10`` are read from the data folder."""


def task_named(name: str, **changes: Any) -> Task:
    """Return a task, with some of its fields changed.

    Parameters
    ----------
    name : one of ``TASKS``
    **changes : fields; those that are None stay
    """
    if name not in TASKS:
        raise no_such("task", name, TASKS)
    return replace(TASKS[name], **{key: value for key, value in changes.items() if value is not None})


def parse_method(spec: str, weight_bits: int, act_bits: int | None, seed: int = 0) -> QuantConfig:
    """Turn ``name`` or ``name:key=value,key=value`` into a configuration.

    Parameters
    ----------
    spec : a method's name, with settings of ``QuantConfig``, ``DropBits`` or ``LearnBits`` after a colon
    weight_bits : 2..8
    act_bits : 1..8 or None
    seed : of the masks

    Examples
    --------
    >>> parse_method("srq+dropbits:p_keep=0.8,per_channel=true", 3, 3).dropbits.p_keep
    0.8
    """
    name, _, text = spec.partition(":")
    config = QuantConfig.method(name.strip(), weight_bits, act_bits, seed=seed)
    values: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {"dropbits": {}, "learn_bits": {}}
    for pair in filter(None, (part.strip() for part in text.split(","))):
        key, found, value = pair.partition("=")
        if not found:
            raise InputError(f"method '{spec}': '{pair}' is not key=value")
        parsed: object = {"true": True, "false": False, "none": None}.get(value.lower(), value)
        if key in QuantConfig.model_fields and key not in nested:
            values[key] = parsed
        elif key in DropBits.model_fields and (config.dropbits is not None or key not in LearnBits.model_fields):
            nested["dropbits"][key] = parsed
            if key in LearnBits.model_fields and config.learn_bits is not None:
                nested["learn_bits"][key] = parsed
        elif key in LearnBits.model_fields:
            nested["learn_bits"][key] = parsed
        else:
            known = sorted({*QuantConfig.model_fields, *DropBits.model_fields, *LearnBits.model_fields} - {*nested})
            raise no_such("setting", key, known, where=f"method '{spec}'")
    settings = config.model_dump() | values
    for part, changes in nested.items():
        if changes:
            settings[part] = (settings[part] or {}) | changes
            if part == "learn_bits":
                settings[part].setdefault("max_bits", weight_bits)
    return QuantConfig(**settings)


class Cell(TypedDict):
    """What one training gave; plain JSON."""

    test_accuracy: float
    validation_accuracy: float
    validation_loss: float
    float_accuracy: float
    error: float
    avg_bits: float
    layer_bits: float
    bits: dict[str, int]
    bytes: int
    float_bytes: int
    seconds: float
    history: list[dict[str, Any]]


@torch.no_grad()
def quantization_error(model: nn.Module) -> float:
    """Give ``|w - Q(w)|^2 / |w|^2`` over all quantized weights: how near they lie to their grid points.

    Parameters
    ----------
    model : a prepared model
    """
    wrong = total = 0.0
    for _, module in quantized_layers(model):
        part = weight_quantizer(module)
        if part is not None:
            weight = float_weight(module)
            value = part.alpha * part.codes(weight)
            wrong += float((weight - value).square().sum())
            total += float(weight.square().sum())
    return wrong / max(total, 1e-30)


class _Bench:
    """Data and float networks of one task, made once each."""

    def __init__(self, run: Run, task: Task, device: str) -> None:
        self.run, self.task, self.device = run, task, device
        self._splits: dict[int, DataSplit] = {}
        self._networks: dict[tuple[int, bool], nn.Module] = {}

    def data(self, seed: int) -> DataSplit:
        if seed not in self._splits:
            while len(self._splits) >= _HELD:
                self._splits.pop(next(iter(self._splits)))
            self._splits[seed] = self.task.load(seed).split(seed).to(self.device)
        return self._splits[seed]

    def network(self, seed: int, *, fresh: bool = False) -> nn.Module:
        if (seed, fresh) not in self._networks:
            data = self.data(seed)
            model = build(self.task.arch, data.shape, data.classes, seed).to(self.device)
            if not fresh:
                fit(
                    model,
                    data,
                    epochs=self.task.float_epochs,
                    lr=self.task.float_lr,
                    batch_size=self.task.batch_size,
                    augment=self.task.augment,
                    seed=seed,
                )
            self._networks[seed, fresh] = model.eval()
        return self._networks[seed, fresh]

    def cell(
        self, label: str, config: QuantConfig, lr: float, seed: int, *, fresh: bool = False, epochs: int | None = None
    ) -> Cell:
        epochs = self.task.epochs if epochs is None else epochs
        key = f"{self.task.key}/{self.device}/{label}/{config.model_dump_json()}/{lr:g}/{seed}/{fresh}/{epochs}"

        def compute() -> Cell:
            with one_thread():
                return self._train(config, lr, seed, fresh, epochs)

        return self.run.once(key, compute)

    def _train(self, config: QuantConfig, lr: float, seed: int, fresh: bool, epochs: int) -> Cell:
        data, network = self.data(seed), self.network(seed, fresh=fresh)
        started = time.perf_counter()
        # A network that was not trained has nothing to end the training with its own statistics for.
        found = quantize_and_train(
            network,
            data,
            config,
            epochs=epochs,
            lr=lr,
            batch_size=self.task.batch_size,
            augment=self.task.augment,
            seed=seed,
        )
        seconds = time.perf_counter() - started
        weights = {row.name: row.weight_bits for row in found.report.rows if row.weight_bits is not None}
        return {
            "test_accuracy": found.metrics["test accuracy"],
            "validation_accuracy": found.metrics["validation accuracy"],
            "validation_loss": found.metrics["validation loss"],
            "float_accuracy": found.metrics["float test accuracy"],
            "error": quantization_error(found.model),
            "avg_bits": found.report.avg_bits,
            "layer_bits": found.report.layer_bits,
            "bits": weights,
            "bytes": found.report.bytes,
            "float_bytes": found.report.float_bytes,
            "seconds": seconds,
            "history": [
                {key: record[key] for key in ("epoch", "loss", "avg_bits", "validation_accuracy") if key in record}
                for record in found.history
            ],
        }

    def float_cell(self, seed: int) -> dict[str, float]:
        def compute() -> dict[str, float]:
            with one_thread():
                started = time.perf_counter()
                data, network = self.data(seed), self.network(seed)
                seconds = time.perf_counter() - started
                test = evaluate(network, data.x_test, data.y_test)
                validation = evaluate(network, data.x_validation, data.y_validation)
            size = 4 * sum(value.numel() for value in network.state_dict().values() if value.is_floating_point())
            return {
                "test_accuracy": test["accuracy"],
                "validation_accuracy": validation["accuracy"],
                "bytes": float(size),
                "seconds": seconds,
            }

        return self.run.once(f"{self.task.key}/{self.device}/float/{seed}", compute)

    def each(self, parts: Sequence[Callable[[_Bench, _Advance], _Found]], advance: _Advance) -> list[_Found]:
        """Do parts, each of trainings that share float networks, by the run's workers; return what each found.

        Parameters
        ----------
        parts : functions of a bench and of what is told after each training
        advance : called after each training; where workers train, when its part is done
        """
        found: dict[str, _Found] = {}

        def told(name: str) -> None:
            # All that it asks for is stored now.
            found[name] = parts[int(name)](self, advance)

        work = {str(place): partial(_elsewhere, self.task, self.device, part) for place, part in enumerate(parts)}
        self.run.spread_parts(work, told)
        return [found[str(place)] if str(place) in found else part(self, advance) for place, part in enumerate(parts)]


def _elsewhere(task: Task, device: str, part: Callable[[_Bench, _Advance], object], run: Run) -> None:
    """Do a part in another process."""
    part(_Bench(run, task, device), _silent)


class Comparison(NamedTuple):
    """What a comparison found: rows, claims, the learning rates tried and chosen, and lines for a person."""

    results: list[Result]
    claims: list[Claim]
    grids: dict[str, dict[str, dict[str, float]]]
    notes: list[str]


def compare(
    run: Run,
    tasks: Sequence[Task],
    methods: Sequence[str],
    bits: Sequence[tuple[int, int | None]],
    seeds: Sequence[int],
    *,
    tuning_seeds: Sequence[int] = (1000,),
    rates: Sequence[float] = RATES,
    device: str = "cpu",
    advance: Callable[[str], None] = _silent,
) -> Comparison:
    """Train every method at every bit-width from the same float networks, each at its best learning rate.

    Parameters
    ----------
    run : where finished trainings are kept
    tasks : what to train
    methods : as :func:`parse_method` takes them
    bits : pairs of weight and activation bits
    seeds : one training each
    tuning_seeds : seeds that the learning rates are chosen on; none of them may be in `seeds`
    rates : learning rates to choose from, with up to three more where the best is at an edge; with one there is no
        tuning
    device : where to train
    advance : called with a short note after each training

    Returns
    -------
    Results, claims, grids and notes.
    """
    _check(tasks, methods, bits, seeds, tuning_seeds, rates)
    found = Comparison([], [], {}, [])
    for task in tasks:
        bench = _Bench(run, task, device)
        chosen = _tune(bench, methods, bits, tuning_seeds, rates, found, advance)
        # Seed by seed, so that one float network is in memory at a time.
        by_seed = bench.each([partial(_of_seed, chosen=chosen, seed=seed) for seed in seeds], advance)
        floats = [own for own, _ in by_seed]
        cells = {(method, *pair): [own[method, pair] for _, own in by_seed] for pair in bits for method in methods}
        found.results.extend(_rows(task, methods, bits, cells, floats, chosen))
        found.claims.extend(_claims(task, methods, bits, cells, floats))
    found.notes.append(
        "bits are weights/activations; first and last layers are quantized too, the network's own input has 8 bits;"
        " biases and batch norms stay float32"
    )
    if any(width == 2 and parse_method(method, 2, None).dropbits for width, _ in bits for method in methods):
        found.notes.append("at 2 bits DropBits has no level to drop, so that it changes nothing")
    return found


def _of_seed(
    bench: _Bench, advance: _Advance, *, chosen: Mapping[tuple[str, tuple[int, int | None]], float], seed: int
) -> tuple[dict[str, float], dict[tuple[str, tuple[int, int | None]], Cell]]:
    """Train the float network of a seed, and every method from it at every bit-width."""
    name = bench.task.name
    network = bench.float_cell(seed)
    advance(f"{name}, float32, seed {seed}: {100 * network['test_accuracy']:.1f} %")
    cells: dict[tuple[str, tuple[int, int | None]], Cell] = {}
    for (method, pair), lr in chosen.items():
        cells[method, pair] = cell = bench.cell(method, parse_method(method, *pair, seed), lr, seed)
        advance(f"{name} {_label(pair)}, {method}, seed {seed}: {100 * cell['test_accuracy']:.1f} %")
    return network, cells


def _check(
    tasks: Sequence[Task],
    methods: Sequence[str],
    bits: Sequence[tuple[int, int | None]],
    seeds: Sequence[int],
    tuning_seeds: Sequence[int],
    rates: Sequence[float],
) -> None:
    named: list[tuple[str, Sequence[object]]] = [
        ("task", [task.name for task in tasks]),
        ("method", methods),
        ("pair of bits", bits),
        ("seed", seeds),
        ("learning rate", rates),
    ]
    for what, given in named:
        if not given:
            raise InputError(f"nothing to compare: give one {what} at least")
        if len(set(given)) < len(given):
            twice = next(value for place, value in enumerate(given) if value in given[:place])
            raise InputError(f"{what} '{twice}' is given twice; name it once")
    if shared := set(seeds) & set(tuning_seeds):
        raise InputError(f"seed {min(shared)} is used for tuning and for the results; keep the two apart")
    for method in methods:
        for pair in bits:
            parse_method(method, *pair)


def _label(pair: tuple[int, int | None]) -> str:
    return f"{pair[0]}/{32 if pair[1] is None else pair[1]}"


def _tune(
    bench: _Bench,
    methods: Sequence[str],
    bits: Sequence[tuple[int, int | None]],
    seeds: Sequence[int],
    rates: Sequence[float],
    found: Comparison,
    advance: Callable[[str], None],
) -> dict[tuple[str, tuple[int, int | None]], float]:
    """Choose each method's learning rate at each bit-width by validation accuracy, ties by validation loss.

    A method whose best rate is the grid's lowest or highest may try further ones on that side.
    """
    if len(rates) == 1:
        return {(method, pair): rates[0] for pair in bits for method in methods}
    parts = [partial(_tried, method=method, bits=bits, seeds=seeds, rates=rates) for method in methods]
    by_method = dict(zip(methods, bench.each(parts, advance), strict=True))
    chosen: dict[tuple[str, tuple[int, int | None]], float] = {}
    for pair in bits:
        grid = found.grids.setdefault(f"{bench.task.name} {_label(pair)}", {})
        for method in methods:
            scores, best = by_method[method][pair]
            chosen[method, pair] = best
            grid[method] = {f"{lr:g}": scores[lr] for lr in sorted(scores)} | {"chosen": best}
    return chosen


def _tried(
    bench: _Bench,
    advance: _Advance,
    *,
    method: str,
    bits: Sequence[tuple[int, int | None]],
    seeds: Sequence[int],
    rates: Sequence[float],
) -> dict[tuple[int, int | None], tuple[dict[float, float], float]]:
    """Try a method's learning rates at each bit-width; return validation accuracies by rate, and the best rate."""
    found: dict[tuple[int, int | None], tuple[dict[float, float], float]] = {}
    for pair in bits:
        tried: dict[float, tuple[float, float]] = {}
        # Rounding trains nothing: there is no rate to choose.
        waiting = sorted(rates)[: 1 if parse_method(method, *pair).estimator == "ptq" else None]
        best, most = waiting[0], len(waiting) + _FURTHER
        while waiting:
            for lr in waiting:
                each = [bench.cell(method, parse_method(method, *pair, seed), lr, seed) for seed in seeds]
                tried[lr] = _mean(each, "validation_accuracy"), -_mean(each, "validation_loss")
                advance(f"{bench.task.name} {_label(pair)}, {method}, lr {lr:g}: {100 * tried[lr][0]:.1f} %")
            best = max(tried, key=lambda lr: tried[lr])
            waiting = _beyond(best, sorted(tried)) if len(tried) < most else []
        found[pair] = {lr: accuracy for lr, (accuracy, _) in tried.items()}, best
    return found


def _beyond(best: float, tried: Sequence[float]) -> list[float]:
    """Return the next rate on the side where the best one is the last."""
    if len(tried) == 1 or best not in {tried[0], tried[-1]}:
        return []
    near = tried[1] if best == tried[0] else tried[-2]
    lr = float(f"{best * best / near:.1g}")
    return [] if lr in tried or lr > 1 else [lr]


_METRICS: tuple[tuple[str, str, str], ...] = (
    ("test accuracy", "test_accuracy", "higher"),
    ("validation accuracy", "validation_accuracy", "higher"),
    ("quantization error", "error", "lower"),
    ("average bits", "avg_bits", "lower"),
    ("bytes", "bytes", "lower"),
)


def _unit(key: str) -> str:
    ends = {"accuracy": "%", "bytes": "bytes", "bits": "bits"}
    return next((unit for end, unit in ends.items() if key.endswith(end)), "1")


def _values(cells: Iterable[Mapping[str, Any]], key: str) -> list[float]:
    """Return what trainings measured in the unit of its rows: accuracies in percent."""
    factor = 100.0 if _unit(key) == "%" else 1.0
    return [factor * float(cell[key]) for cell in cells]


def _summary(values: Iterable[float], **options: Any) -> Result:
    return summarize([float(value) for value in values], **options)


def _rows(
    task: Task,
    methods: Sequence[str],
    bits: Sequence[tuple[int, int | None]],
    cells: Mapping[tuple[str, int, int | None], Sequence[Cell]],
    floats: Sequence[Mapping[str, float]],
    chosen: Mapping[tuple[str, tuple[int, int | None]], float],
) -> list[Result]:
    rows: list[Result] = []
    for pair in bits:
        dataset = f"{task.name} {_label(pair)}"
        for metric, key, better in _METRICS:
            if key in floats[0]:
                values = _values(floats, key)
                seconds = math.fsum(cell["seconds"] for cell in floats)
                options: dict[str, Any] = {
                    "metric": metric,
                    "better": better,
                    "unit": _unit(key),
                }
                rows.append(_summary(values, dataset=dataset, method=_FLOAT, seconds=seconds, **options))
            for method in methods:
                each = cells[method, *pair]
                seconds = math.fsum(cell["seconds"] for cell in each)
                options = {"metric": metric, "better": better, "unit": _unit(key)}
                values = _values(each, key)
                rows.append(_summary(values, dataset=dataset, method=method, seconds=seconds, **options))
        for method in methods:
            seconds = math.fsum(cell["seconds"] for cell in cells[method, *pair])
            mean = seconds / len(cells[method, *pair])
            options = {"metric": "seconds a training", "better": "lower", "unit": "s"}
            rows.append(_summary([mean], dataset=dataset, method=method, **options))
            options = {"metric": "best learning rate", "better": "lower"}
            rows.append(_summary([chosen[method, pair]], dataset=dataset, method=method, **options))
    return rows


def _ahead(first: Sequence[Cell], second: Sequence[Cell]) -> list[float]:
    """Return by how many points the first are ahead in test accuracy, seed by seed."""
    return [100 * (a["test_accuracy"] - b["test_accuracy"]) for a, b in zip(first, second, strict=True)]


def _paired(first: Sequence[Cell], second: Sequence[Cell]) -> tuple[float, float | None]:
    """Give by how many points the first are ahead on average, and the lower end of the paired 95 % interval."""
    mean, low, _ = interval(_ahead(first, second))
    return mean, low


def _mean(cells: Iterable[Mapping[str, Any]], key: str) -> float:
    values = [float(cell[key]) for cell in cells]
    return math.fsum(values) / len(values)


def _claims(
    task: Task,
    methods: Sequence[str],
    bits: Sequence[tuple[int, int | None]],
    cells: Mapping[tuple[str, int, int | None], Sequence[Cell]],
    floats: Sequence[Mapping[str, float]],
) -> list[Claim]:
    """Hold the run against the claims of section 8 of the specification; the best variant is chosen by validation."""
    claims: list[Claim] = []
    variants = [method for method in methods if method.partition(":")[0] in SRQ_VARIANTS]
    for pair in bits:
        name = f"{task.name} {_label(pair)}"
        if not variants:
            break
        best = max(variants, key=lambda method: _mean(cells[method, *pair], "validation_accuracy"))
        ours = cells[best, *pair]

        def against(rival: str, margin: float, text: str, *, ours: Sequence[Cell] = ours, pair: Any = pair) -> None:
            value, _ = _paired(ours, cells[rival, *pair])
            claims.append(Claim(text=text, source=SPEC, holds=value >= margin, value=value, threshold=margin))

        if "ptq" in methods and pair[0] == 2:
            against("ptq", 5.0, f"{name}: {best}, the best SRQ variant by validation, is 5 points above rounding (E1)")
        if "lsq" in methods:
            against("lsq", -1.0, f"{name}: {best} is not more than 1 point below LSQ (E1)")
            against("lsq", 0.0, f"{name}: {best} is at or above LSQ")
        if pair[0] >= 4:
            value = 100 * (_mean(ours, "test_accuracy") - _mean(floats, "test_accuracy"))
            text = f"{name}: {best} is within 1.5 points of float32 (E1)"
            claims.append(Claim(text=text, source=SPEC, holds=value >= -1.5, value=value, threshold=-1.5))
        plain = next((method for method in ("srq", "mode-soft") if method in methods), None)
        if plain is not None and "srq+dropbits" in methods:
            value, low = _paired(cells["srq+dropbits", *pair], cells[plain, *pair])
            holds = value >= 0 if low is None else low > 0
            text = f"{name}: DropBits raises the accuracy of SRQ, paired 95 % interval above 0"
            claims.append(Claim(text=text, source=PAPER, holds=holds, value=value, threshold=0.0))
        if "mcste-input" in methods and "lsq" in methods:
            ratio = _mean(cells["mcste-input", *pair], "error") / max(_mean(cells["lsq", *pair], "error"), 1e-30)
            text = f"{name}: weights cluster: mcste-input's quantization error is at most 0.8 of LSQ's (E2)"
            claims.append(Claim(text=text, source=PAPER, holds=ratio <= 0.8, value=ratio, threshold=0.8))
        for rival in ("rq", "rq-st"):
            if rival in methods:
                value, low = _paired(ours, cells[rival, *pair])
                holds = value >= 0 if low is None else low > 0
                text = f"{name}: {best} is above {rival}, paired 95 % interval above 0"
                claims.append(Claim(text=text, source=PAPER, holds=holds, value=value, threshold=0.0))
    return claims


# ---- learned bits


class Sweep(NamedTuple):
    """What :func:`sweep` and :func:`lottery` found.

    ``points``: method -> a triple a seed: average bits, test accuracy 0..1, bits of layers.
    """

    results: list[Result]
    claims: list[Claim]
    points: dict[str, list[tuple[float, float, dict[str, int]]]]


def sweep(
    run: Run,
    task: Task,
    seeds: Sequence[int],
    *,
    uniform: Sequence[int] = (2, 3, 4),
    targets: Sequence[float] = (2.5, 3.0, 3.5),
    penalties: Sequence[float] = (),
    max_bits: int = 4,
    act_bits: int | None = 4,
    weighting: Weighting = "size",
    method: str = "srq",
    lr: float = 1e-3,
    epochs: int | None = None,
    device: str = "cpu",
    advance: Callable[[str], None] = _silent,
) -> Sweep:
    """Hold learned bit-widths against uniform ones: accuracy against average bits.

    Parameters
    ----------
    run : where finished trainings are kept
    task : what to train
    seeds : one training each
    uniform : bit-widths that all layers share
    targets : average bits that the controller steers to
    penalties : fixed strengths of the penalty, without a target
    max_bits : width that learned layers start from
    act_bits : of activations
    weighting : what bits are averaged over: ``size``, ``macs`` or ``layer``
    method : of the uniform networks and of the learned ones
    lr : learning rate
    epochs : after quantization; None takes the task's
    device : where to train
    advance : called with a short note after each training
    """
    bench = _Bench(run, task, device)
    key = "layer_bits" if weighting == "layer" else "avg_bits"
    configs: dict[str, QuantConfig] = {}
    for bits in uniform:
        configs[f"uniform {bits} bits"] = parse_method(method, bits, act_bits)
    for target in targets:
        learn = LearnBits(max_bits=max_bits, target_bits=target, weighting=weighting)
        configs[f"learned, target {target:g}"] = _learning(method, max_bits, act_bits, learn)
    for penalty in penalties:
        learn = LearnBits(max_bits=max_bits, penalty=penalty, weighting=weighting)
        configs[f"learned, penalty {penalty:g}"] = _learning(method, max_bits, act_bits, learn)

    def of_seed(bench: _Bench, advance: _Advance, seed: int) -> tuple[dict[str, float], dict[str, Cell]]:
        network = bench.float_cell(seed)
        found: dict[str, Cell] = {}
        for name, config in configs.items():
            found[name] = cell = bench.cell(name, config.model_copy(update={"seed": seed}), lr, seed, epochs=epochs)
            advance(f"{task.name}, {name}, seed {seed}: {cell[key]:.2f} bits, {100 * cell['test_accuracy']:.1f} %")
        return network, found

    by_seed = bench.each([partial(of_seed, seed=seed) for seed in seeds], advance)
    floats = [network for network, _ in by_seed]
    cells = {name: [found[name] for _, found in by_seed] for name in configs}
    results: list[Result] = [
        _summary(
            _values(floats, "test_accuracy"),
            dataset=task.name,
            method=_FLOAT,
            metric="test accuracy",
            better="higher",
            unit="%",
        )
    ]
    for metric, field, better in (
        ("test accuracy", "test_accuracy", "higher"),
        ("average bits", key, "lower"),
        ("bytes", "bytes", "lower"),
    ):
        for name, each in cells.items():
            results.append(
                _summary(
                    _values(each, field),
                    dataset=task.name,
                    method=name,
                    metric=metric,
                    better=better,
                    unit=_unit(field),
                    seconds=math.fsum(cell["seconds"] for cell in each),
                )
            )
    points = {
        name: [(float(cell[key]), cell["test_accuracy"], cell["bits"]) for cell in each]  # pyright: ignore[reportTypedDictNotRequiredAccess, reportGeneralTypeIssues]
        for name, each in cells.items()
    }
    return Sweep(results, _sweep_claims(task, cells, targets, penalties, key), points)


def _learning(method: str, max_bits: int, act_bits: int | None, learn: LearnBits) -> QuantConfig:
    config = parse_method(method, max_bits, act_bits)
    return QuantConfig(**(config.model_dump() | {"learn_bits": learn.model_dump()}))


def _sweep_claims(
    task: Task, cells: Mapping[str, Sequence[Cell]], targets: Sequence[float], penalties: Sequence[float], key: str
) -> list[Claim]:
    claims: list[Claim] = []
    for target in targets:
        each = cells[f"learned, target {target:g}"]
        value = max(abs(float(cell[key]) - target) for cell in each)  # pyright: ignore[reportTypedDictNotRequiredAccess, reportGeneralTypeIssues]
        text = f"{task.name}: at a target of {target:g} bits the learned average is within 0.15 of it, every seed (E4)"
        claims.append(Claim(text=text, source=SPEC, holds=value <= 0.15, value=value, threshold=0.15))
        below = cells.get(f"uniform {math.floor(target)} bits")
        if below is not None:
            gain, _ = _paired(each, below)
            text = f"{task.name}: learned, target {target:g}, is within 0.5 points of uniform {math.floor(target)} (E4)"
            claims.append(Claim(text=text, source=SPEC, holds=gain >= -0.5, value=gain, threshold=-0.5))
    if len(penalties) > 1:
        bits = [_mean(cells[f"learned, penalty {penalty:g}"], key) for penalty in sorted(penalties)]
        rise = max(later - earlier for earlier, later in pairwise(bits))
        text = f"{task.name}: average bits fall with the penalty, by no step up of more than 0.1 (E4)"
        claims.append(Claim(text=text, source=SPEC, holds=rise <= 0.1, value=rise, threshold=0.1))
        text = f"{task.name}: bits change in training: from {bits[0]:.2f} to {bits[-1]:.2f} over the penalties"
        claims.append(
            Claim(text=text, source=SPEC, holds=bits[0] - bits[-1] > 0.5, value=bits[0] - bits[-1], threshold=0.5)
        )
    return claims


def lottery(
    run: Run,
    task: Task,
    seeds: Sequence[int],
    *,
    target: float | None = 2.5,
    penalty: float = 0.03,
    max_bits: int = 4,
    act_bits: int | None = 4,
    weighting: Weighting = "layer",
    method: str = "srq",
    lr: float = 1e-3,
    epochs: int | None = None,
    scratch_epochs: int | None = None,
    device: str = "cpu",
    advance: Callable[[str], None] = _silent,
) -> Sweep:
    """Test the quantized lottery ticket: weights and bits learned together against the same bits from the start.

    Parameters
    ----------
    run : where finished trainings are kept
    task : what to train
    seeds : one pair of trainings each, from the float network and from random weights
    target : average bits; None takes a fixed `penalty`
    penalty : strength where there is no target
    max_bits : width that learned layers start from
    act_bits : of activations
    weighting : what bits are averaged over
    method : of both trainings
    lr : learning rate from the float network; from random weights it is the task's own
    epochs : after quantization; None takes the task's
    scratch_epochs : from random weights; None takes as many as the float network got
    device : where to train
    advance : called with a short note after each training
    """
    bench = _Bench(run, task, device)
    learn = LearnBits(max_bits=max_bits, penalty=penalty, target_bits=target, weighting=weighting)
    joint = _learning(method, max_bits, act_bits, learn)
    key = "layer_bits" if weighting == "layer" else "avg_bits"

    def of_seed(bench: _Bench, advance: _Advance, seed: int) -> dict[str, Cell]:
        found: dict[str, Cell] = {}
        for start, fresh in (("float network", False), ("random weights", True)):
            rate = task.float_lr if fresh else lr
            count = (scratch_epochs or task.float_epochs) if fresh else epochs
            together = bench.cell(
                "joint", joint.model_copy(update={"seed": seed}), rate, seed, fresh=fresh, epochs=count
            )
            fixed = parse_method(method, max_bits, act_bits, seed)
            bits: dict[str, Any] = {name: {"weight_bits": width} for name, width in together["bits"].items() if width}
            fixed = QuantConfig(**(fixed.model_dump() | {"overrides": bits}))
            again = bench.cell("retrained", fixed, rate, seed, fresh=fresh, epochs=count)
            for how, cell in (("joint", together), ("retrained", again)):
                found[f"{how}, from {start}"] = cell
                advance(f"{task.name}, {how} from {start}, seed {seed}: {100 * cell['test_accuracy']:.1f} %")
        return found

    by_seed = bench.each([partial(of_seed, seed=seed) for seed in seeds], advance)
    cells = {name: [found[name] for found in by_seed] for name in by_seed[0]}
    results: list[Result] = []
    for metric, field, better in (("test accuracy", "test_accuracy", "higher"), ("average bits", key, "lower")):
        for name, each in cells.items():
            seconds = math.fsum(cell["seconds"] for cell in each)
            options: dict[str, Any] = {"metric": metric, "better": better, "unit": _unit(field), "seconds": seconds}
            results.append(_summary(_values(each, field), dataset=task.name, method=name, **options))
    claims: list[Claim] = []
    for start in ("float network", "random weights"):
        first, second = cells[f"joint, from {start}"], cells[f"retrained, from {start}"]
        value, low = _paired(first, second)
        results.append(
            _summary(
                _ahead(first, second),
                dataset=task.name,
                method=f"from {start}",
                metric="joint - retrained",
                better="higher",
                unit="points",
            )
        )
        text = f"{task.name}: from {start}, learning bits with weights is at least as good as retraining (E5)"
        holds = value >= 0 if low is None else low >= 0
        claims.append(Claim(text=text, source=PAPER, holds=holds, value=value, threshold=0.0))
    points = {
        name: [(float(cell[key]), cell["test_accuracy"], cell["bits"]) for cell in each]  # pyright: ignore[reportTypedDictNotRequiredAccess, reportGeneralTypeIssues]
        for name, each in cells.items()
    }
    return Sweep(results, claims, points)


def diagnosis_rows(
    bits: int,
    curves: Sequence[GainCurve],
    study: Sequence[EstimatorBias],
    dataset: str | None = None,
    found: WeightDiagnosis | None = None,
) -> list[Result]:
    """Put a diagnosis of estimators into rows of a table.

    Parameters
    ----------
    bits : of the grid
    curves : what estimators pass on across the grid
    study : their bias on layers that can be enumerated
    dataset : what a network was trained on
    found : what they do to its weights
    """
    rows: list[Result] = []

    def add(dataset: str, method: str, metric: str, value: float, better: Literal["higher", "lower"]) -> None:
        rows.append(_summary([value], dataset=dataset, method=method, metric=metric, better=better))

    name = f"cells of {bits} bits"
    for curve in curves:
        add(name, curve.estimator, "share without gradient", curve.dead, "lower")
        add(name, curve.estimator, "share against descent", curve.opposed, "lower")
        add(name, curve.estimator, "mean gain", curve.mean_gain, "higher")
    name = f"enumerated layers, {bits} bits"
    for row in study:
        add(name, row.estimator, "cosine to the true gradient", row.expected.cosine, "higher")
        add(name, row.estimator, "relative bias", row.expected.error, "lower")
        add(name, row.estimator, "spread of a draw", row.spread, "lower")
    if found is not None:
        for total in found.total:
            name = f"weights of {dataset}"
            add(name, total.estimator, "share without gradient", total.zero, "lower")
            add(name, total.estimator, "share against the identity's", total.opposed, "lower")
            add(name, total.estimator, "cosine to the identity's gradient", total.cosine, "higher")
    return rows


def export_example(run: Run, task: Task, seed: int, path: Path, method: str = "srq", bits: int = 3) -> list[str]:
    """Quantize a task's network, write it as packed weights, read it back and say what it weighs.

    Parameters
    ----------
    run : of the command
    task : what to train
    seed : of the network
    path : file to write
    method : as :func:`parse_method` takes it
    bits : of weights and activations

    Returns
    -------
    Lines for a person.
    """
    from srq_dropbits.deploy import convert
    from srq_dropbits.packing import load_packed, save_packed

    with one_thread():
        bench = _Bench(run, task, "cpu")
        data = bench.data(seed)
        config = parse_method(method, bits, bits, seed)
        options: dict[str, Any] = {"epochs": task.epochs, "batch_size": task.batch_size, "seed": seed}
        found = quantize_and_train(bench.network(seed), data, config, **options)
        sizes = save_packed(convert(found.model, data.x_train[:2]), path)
        integer = load_packed(path, build(task.arch, data.shape, data.classes, seed))
        score = 100 * evaluate(integer, data.x_test, data.y_test)["accuracy"]
        trained = 100 * found.metrics["test accuracy"]
    return [
        f"{path.name}: {sizes.total:,} bytes, {sizes.total / sizes.float_bytes:.3f} of float32; read back and run in"
        f" integers: accuracy {score:.2f} %, as trained {trained:.2f} %"
    ]
