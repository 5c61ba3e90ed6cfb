"""What the races share: the clock, tables, and brevitas as its documentation has it used.

The peer comes from ``pip install brevitas==0.13.4 onnxoptimizer``; the latter is for its export to ONNX. A race that
lacks a peer says so in a line and goes on without it.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import importlib
import io
import json
import logging
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def clock(
    calls: Mapping[str, Callable[[], Any]],
    repeats: int,
    *,
    warm_up: int = 3,
    least_ms: float = 0.0,
    most_s: float = math.inf,
) -> dict[str, float]:
    """Time calls that take turns; return the median milliseconds of each.

    Parameters
    ----------
    calls : what to time, by label
    repeats : turns that count
    warm_up : turns that do not
    least_ms : short calls are repeated within a turn until it takes this long
    most_s : a call that would take longer in all sits out some turns, evenly spread, but takes three at least
    """
    inner: dict[str, int] = {}
    turns: dict[str, int] = {}
    for label, call in calls.items():
        seconds = _seconds(call)
        if seconds < 0.2 * most_s:
            # The first call may load and allocate what later ones find ready.
            seconds = _seconds(call)
        inner[label] = max(1, round(least_ms / 1e3 / seconds))
        turns[label] = int(min(repeats, max(3.0, most_s / (inner[label] * seconds))))
    took: dict[str, list[float]] = {label: [] for label in calls}
    gc.collect()
    gc.disable()
    try:
        for turn in range(warm_up + repeats):
            for label, call in calls.items():
                sits_out = (turn - warm_up + 1) * turns[label] // repeats == (turn - warm_up) * turns[label] // repeats
                if turns[label] < repeats and (turn < warm_up or sits_out):
                    continue
                seconds = _seconds(call, inner[label])
                if turn >= warm_up:
                    took[label].append(1e3 * seconds / inner[label])
            gc.collect(0)
    finally:
        gc.enable()
    return {label: statistics.median(values) for label, values in took.items()}


def _seconds(call: Callable[[], Any], times: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(times):
        call()
    return max(time.perf_counter() - start, 1e-7)


def print_table(title: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print cells under a header, the first column to the left, numbers to the right."""
    cells = [list(header), *[["-" if cell is None else str(cell) for cell in row] for row in rows]]
    widths = [max(len(row[place]) for row in cells) for place in range(len(header))]
    print(f"\n{title}")
    for row in cells:
        texts = [
            f"{cell:<{w}}" if not i else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(texts).rstrip(), flush=True)


def options_of(description: str, **defaults: Any) -> argparse.ArgumentParser:
    """Make the parser with what all races have in common."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--bits", type=int, nargs="*", default=defaults["bits"], help="bit-widths")
    parser.add_argument("--repeats", type=int, default=defaults["repeats"], help="turns that are timed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to a file, too")
    return parser


def write_json(options: argparse.Namespace, results: Any) -> None:
    """Write results with what they were measured on, if the caller named a file."""
    if options.json is None:
        return
    document = {
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
        "torch": torch.__version__,
        "results": results,
    }
    options.json.write_text(json.dumps(document, indent=2) + "\n")


def installed(name: str) -> bool:
    """Tell whether a peer can be imported; say so in a line if not."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(name)
    except ImportError as error:
        print(f"{name} takes no part: {error}")
        return False
    return True


# ---- brevitas


def brevitas_copy(model: nn.Sequential, weight_bits: int, act_bits: int, batches: Iterable[Tensor]) -> nn.Sequential:
    """Quantize a float model with brevitas: the same layers, grids and bit-widths as ours, learned steps throughout.

    Weights: ``Int8WeightPerTensorFloatMSE``, a narrow symmetric grid whose step is a parameter that starts at the least
    squared error, as ours does. Inputs of layers: ``Uint8ActPerTensorFloatMSE``, a learned step that starts from the
    same statistic of a calibration; the network's own input: 8 bits, signed. These are the settings with which
    brevitas is best here at 2 bits; its default, a step that is the weights' maximum, is worse. Its ``BREVITAS_JIT=1``
    cannot compile the search for the least squared error (0.13.4), so it runs as its default does, uncompiled.

    Parameters
    ----------
    model : of plain layers one after another
    weight_bits, act_bits : of all layers, the first one's input apart
    batches : of inputs, to calibrate with
    """
    with quiet():
        import brevitas.nn as qnn
        from brevitas.graph.calibrate import calibration_mode
        from brevitas.quant import scaled_int

    layers: list[nn.Module] = []
    first = True
    for layer in model:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            keywords: dict[str, Any] = {
                "bias": layer.bias is not None,
                "weight_quant": scaled_int.Int8WeightPerTensorFloatMSE,
                "weight_bit_width": weight_bits,
                "input_quant": scaled_int.Int8ActPerTensorFloat if first else scaled_int.Uint8ActPerTensorFloatMSE,
                "input_bit_width": 8 if first else act_bits,
            }
            if isinstance(layer, nn.Linear):
                made = qnn.QuantLinear(layer.in_features, layer.out_features, **keywords)
            else:
                shape = (layer.in_channels, layer.out_channels, layer.kernel_size)
                made = qnn.QuantConv2d(*shape, stride=layer.stride, padding=layer.padding, **keywords)
            with torch.no_grad():
                # Before the first forward pass, which is when the weights' steps are set.
                made.weight.copy_(layer.weight)
                if layer.bias is not None:
                    made.bias.copy_(layer.bias)
            layers.append(made)
            first = False
        else:
            layers.append(copy.deepcopy(layer))
    found = nn.Sequential(*layers).eval()
    with torch.no_grad():
        with calibration_mode(found):
            for batch in batches:
                found(batch)
        # Sets the weights' steps.
        found(batch)
    return found


def brevitas_groups(model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Sort parameters as ``srq_dropbits.param_groups`` does: steps, biases and norms have no decay."""
    named = list(model.named_parameters())
    steps = [p for name, p in named if "scaling_impl" in name]
    rest = [p for name, p in named if "scaling_impl" not in name]
    return [
        {"params": [p for p in rest if p.ndim > 1], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in rest if p.ndim <= 1], "lr": lr, "weight_decay": 0.0},
        {"params": steps, "lr": lr, "weight_decay": 0.0},
    ]


def brevitas_onnx(model: nn.Module, path: Path, example: Tensor, *, integers: bool) -> int:
    """Write brevitas' quantize-clip-dequantize graph; return its bytes, external data included.

    Parameters
    ----------
    model : what `brevitas_copy` returned
    path : file to write
    example : an input
    integers : by the TorchScript exporter, which stores 8-bit integers; else by brevitas' default, which stores float32
    """
    from brevitas.export import export_onnx_qcdq

    keywords: dict[str, Any] = {"dynamo": False} if integers else {"optimize": True, "opset_version": 18}
    with quiet():
        export_onnx_qcdq(model.eval(), args=example, export_path=str(path), **keywords)
    return sum(file.stat().st_size for file in path.parent.glob(path.name + "*"))


@contextlib.contextmanager
def quiet() -> Any:
    """Swallow what exporters print."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def onnx_outputs(path: Path, x: Tensor, threads: int = 1) -> Tensor:
    """Run an ONNX file on a batch."""
    session = onnx_session(path, threads)
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def onnx_session(path: Path, threads: int = 1) -> Any:
    """Open an ONNX file with all optimizations and so many threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
