"""Race: quantization-aware training against brevitas, a step and as a whole; and the files that both export.

    python benchmarks/race_brevitas.py [--tasks mnist-small digits] [--bits 2 3 4] [--seeds 0 1] [--json FILE]

All start from the same float network and see the same batches of the same rows through the same training loop, AdamW
and schedule; both quantize weights and inputs of all layers on the same grids with learned steps (``brevitas_copy`` in
peers.py says with which settings). Each takes the learning rate of ``--rates`` with the best mean accuracy on
validation rows; test accuracies are means over ``--seeds``, each with a data split, float network and order of its own.
``ms/step`` is forward, backward and optimizer on a batch, ``training s`` the median of whole trainings; contestants
take turns in one process at both. MNIST is read from the data folder; a task whose data are missing is left out, and
without brevitas ours run alone. The default takes about three minutes.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from peers import brevitas_copy, brevitas_groups, brevitas_onnx, clock, installed, options_of, print_table, write_json
from torch import Tensor, nn

from shared_core.errors import InputError
from srq_dropbits.config import QuantConfig
from srq_dropbits.deploy import convert
from srq_dropbits.experiments import TASKS, Task
from srq_dropbits.models import build
from srq_dropbits.onnx_export import export_onnx
from srq_dropbits.packing import save_packed
from srq_dropbits.qat import calibrate, param_groups, prepare, reestimate_bn
from srq_dropbits.training import batches_of, evaluate, fit
from srq_dropbits.userdata import DataSplit

FLOAT, PEER = "float32", "brevitas"
CALIBRATION_BATCHES = 8
WEIGHT_DECAY = 1e-4


@dataclass
class Field:
    """A task's rows and float network for one seed."""

    task: Task
    data: DataSplit
    network: nn.Module
    seed: int

    def quantize(self, label: str, bits: int) -> nn.Module:
        """Quantize a copy of the float network and set its steps from the same batches."""
        batches = batches_of(self.data.x_train, self.task.batch_size, self.seed)
        if label == FLOAT:
            return build_like(self.network, self.task, self.data)
        if label == PEER:
            return brevitas_copy(self.network, bits, bits, islice(batches, CALIBRATION_BATCHES))
        model: nn.Module = prepare(self.network, QuantConfig.method(label, bits, bits))
        calibrate(model, batches, max_batches=CALIBRATION_BATCHES)
        return model


def build_like(network: nn.Module, task: Task, data: DataSplit) -> nn.Module:
    """Copy a float network."""
    model = build(task.arch, data.shape, data.classes)
    model.load_state_dict(network.state_dict())
    return model


def enter(task: Task, seed: int) -> Field:
    """Read a task's rows and train the float network that all start from."""
    data = task.load(seed).split(seed)
    network = build(task.arch, data.shape, data.classes, seed)
    fit(network, data, epochs=task.float_epochs, lr=task.float_lr, batch_size=task.batch_size, seed=seed)
    return Field(task, data, network.eval(), seed)


# ---- one step


class Step:
    """Forward, backward and optimizer on one batch after another."""

    def __init__(self, label: str, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        self.model = model.train()
        make = brevitas_groups if label in {PEER, FLOAT} else param_groups
        self.optimizer = torch.optim.AdamW(make(model, lr=1e-4, weight_decay=WEIGHT_DECAY))
        self.batches = cycle(batches)

    def __call__(self) -> None:
        x, y = next(self.batches)
        self.optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(self.model(x), y).backward()
        self.optimizer.step()


def step_times(field_of: Field, labels: list[str], bits: int, repeats: int) -> dict[str, float]:
    """Time steps of all contestants in turns, milliseconds."""
    size = field_of.task.batch_size
    x, y = field_of.data.x_train, field_of.data.y_train
    batches = [pair for pair in zip(x.split(size), y.split(size), strict=True) if len(pair[1]) == size][:8]
    steps = {label: Step(label, field_of.quantize(label, bits), batches) for label in labels}
    return clock(steps, repeats, warm_up=5, least_ms=20)


# ---- whole trainings


@dataclass
class Outcome:
    """One training."""

    validation: float
    test: float
    seconds: float
    model: nn.Module = field(repr=False)


def train(field_of: Field, label: str, bits: int, lr: float) -> Outcome:
    """Quantize, train with one learning rate, and estimate batch norms anew; the clock is on all of it."""
    task, data = field_of.task, field_of.data
    started = time.perf_counter()
    model = field_of.quantize(label, bits)
    fit(
        model,
        data,
        epochs=task.epochs,
        lr=lr,
        batch_size=task.batch_size,
        weight_decay=WEIGHT_DECAY,
        augment=task.augment,
        seed=field_of.seed,
    )
    reestimate_bn(model, batches_of(data.x_train, task.batch_size, field_of.seed))
    model.eval()
    seconds = time.perf_counter() - started
    scores = [
        evaluate(model, x, y)["accuracy"]
        for x, y in ((data.x_validation, data.y_validation), (data.x_test, data.y_test))
    ]
    return Outcome(*scores, seconds, model)


def exported(label: str, model: nn.Module, example: Tensor) -> dict[str, int | None]:
    """Write every file a contestant offers; give bytes by form."""
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        if label == PEER:
            found: dict[str, int | None] = {}
            for form, integers in (("onnx", False), ("onnx, 8-bit integers", True)):
                try:
                    found[form] = brevitas_onnx(model, at / f"{integers}.onnx", example, integers=integers)
                except ImportError as error:
                    print(f"brevitas exports no {form}: {error}")
                    found[form] = None
            return found
        integer = convert(model, example)
        return {
            "packed": save_packed(integer, at / "packed.safetensors").total,
            "onnx": export_onnx(integer, at / "ours.onnx", example).file_bytes,
            "onnx, 8-bit integers": export_onnx(integer, at / "int8.onnx", example, weight_type="int8").file_bytes,
        }


def race(task: Task, options: argparse.Namespace, labels: list[str]) -> dict[str, Any]:
    """Run one task, print its tables."""
    started = time.perf_counter()
    fields = [enter(task, seed) for seed in options.seeds]
    first = fields[0]
    baseline = statistics.mean(evaluate(f.network, f.data.x_test, f.data.y_test)["accuracy"] for f in fields)
    rows = f"{len(first.data.y_train)} rows, batches of {task.batch_size}, {task.epochs} epochs"
    print(f"\n{task.name}: {task.arch}, {rows}, {len(fields)} seed(s), {options.threads} thread(s)")
    print(f"float32: test accuracy {100 * baseline:.2f} %", flush=True)
    result: dict[str, Any] = {"task": task.name, "float_test_accuracy": baseline, "bits": {}}
    for bits in options.bits:
        times = step_times(first, [FLOAT, *labels], bits, options.repeats)
        # Contestants take turns here too: their times are compared.
        tried = {
            (lr, f.seed, label): train(f, label, bits, lr) for lr in options.rates for f in fields for label in labels
        }
        found: dict[str, dict[str, Any]] = {}
        for label in labels:
            runs = {lr: [tried[lr, f.seed, label] for f in fields] for lr in options.rates}
            best = max(runs, key=lambda lr: statistics.mean(run.validation for run in runs[lr]))
            found[label] = {
                "ms_per_step": times[label],
                "lr": best,
                "test_accuracy": [run.test for run in runs[best]],
                "validation_accuracy": {f"{lr:g}": [run.validation for run in runs[lr]] for lr in runs},
                "training_s": statistics.median(run.seconds for some in runs.values() for run in some),
                "bytes": exported(label, runs[best][0].model, first.data.x_test[:2]),
            }
        result["bits"][bits] = {"float_ms_per_step": times[FLOAT], **found}
        report(f"{bits} bits", times, found)
    print(f"({task.name}: {time.perf_counter() - started:.0f} s)", flush=True)
    return result


def report(title: str, times: dict[str, float], found: dict[str, dict[str, Any]]) -> None:
    header = ("", "ms/step", "/ brevitas", "training s", "lr", "test accuracy, %", "packed", "onnx", "onnx int8")
    peer = times.get(PEER)
    lines: list[tuple[Any, ...]] = [(FLOAT, f"{times[FLOAT]:.2f}", against(times[FLOAT], peer), *[None] * 6)]
    for label, one in found.items():
        scores = [100 * score for score in one["test_accuracy"]]
        size = one["bytes"]
        lines.append(
            (
                label,
                f"{one['ms_per_step']:.2f}",
                against(one["ms_per_step"], peer),
                f"{one['training_s']:.2f}",
                f"{one['lr']:g}",
                f"{statistics.mean(scores):.2f} (range {max(scores) - min(scores):.2f})",
                *(size.get(form) for form in ("packed", "onnx", "onnx, 8-bit integers")),
            )
        )
    print_table(title, header, lines)


def against(value: float, peer: float | None) -> str | None:
    """Give a ratio, if there is something to divide by."""
    return None if peer is None else f"{value / peer:.2f}"


def print_ratios(results: list[dict[str, Any]]) -> None:
    print("\nratios to brevitas (time: target <= 1; accuracy: difference in points)")
    for result in results:
        for bits, found in result["bits"].items():
            peer = found.get(PEER)
            for label, one in found.items():
                if peer is None or label in {PEER, "float_ms_per_step"}:
                    continue
                gain = 100 * (statistics.mean(one["test_accuracy"]) - statistics.mean(peer["test_accuracy"]))
                sizes = [
                    f"packed / its {form} {one['bytes']['packed'] / size:.3f}"
                    for form, size in peer["bytes"].items()
                    if size
                ]
                print(
                    f"{result['task']}, {bits} bits, {label}: step {one['ms_per_step'] / peer['ms_per_step']:.2f},"
                    f" training {one['training_s'] / peer['training_s']:.2f}, accuracy {gain:+.2f}, {', '.join(sizes)}"
                )


def main() -> None:
    parser = options_of(__doc__.splitlines()[0], bits=[2, 3, 4], repeats=25)
    parser.add_argument("--tasks", nargs="*", default=["mnist-small"], choices=sorted(TASKS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--rates", type=float, nargs="*", default=[1e-3, 3e-3, 1e-2], help="learning rates to try")
    parser.add_argument("--methods", nargs="*", default=["srq", "lsq"], help="ours, as QuantConfig.method names them")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    labels = [*options.methods, PEER] if installed("brevitas") else list(options.methods)
    results: list[dict[str, Any]] = []
    for name in options.tasks:
        try:
            results.append(race(TASKS[name], options, labels))
        except InputError as error:
            print(f"{name} is left out: {error}")
    if PEER in labels and results:
        print_ratios(results)
    write_json(options, results)


if __name__ == "__main__":
    main()
