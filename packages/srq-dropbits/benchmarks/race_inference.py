"""Race: latency of a network's deployable forms on the CPU, ours and onnxruntime's, with the bytes of each file.

    python benchmarks/race_inference.py [--nets lenet5 mlp:512,512] [--bits 2 3 4] [--batches 1 64] [--json FILE]

``lenet5`` has 28 x 28 inputs, and so has the MLP once they are flattened to 784. Our packed form computes with exact
integers in torch and is a reference, not a fast kernel; for speed, our graph goes to onnxruntime with int8 weights.
Rivals are the float network in torch and in onnxruntime, and onnxruntime's own static quantization to 8 bits
(``quantize_static`` with quantize-dequantize nodes). Times do not depend on what weights have been learned, so nothing
is trained: steps come from a calibration on random inputs. All contestants take turns in one process; medians.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peers import clock, installed, onnx_session, options_of, print_table, quiet, write_json
from torch import Tensor, nn

from srq_dropbits.config import QuantConfig
from srq_dropbits.deploy import convert
from srq_dropbits.models import build
from srq_dropbits.onnx_export import export_onnx
from srq_dropbits.packing import load_packed, save_packed
from srq_dropbits.qat import calibrate, prepare
from srq_dropbits.saving import save

FLOAT_ORT, STATIC = "float32, onnxruntime", "onnxruntime static int8"
SHAPES = {"lenet5": (1, 28, 28)}
CALIBRATION_BATCHES = 8


class Reader:
    """Hands batches to onnxruntime's calibration."""

    def __init__(self, name: str, batches: list[Tensor]) -> None:
        self.rows = iter([{name: batch.numpy()} for batch in batches])

    def get_next(self) -> dict[str, Any] | None:
        return next(self.rows, None)


def in_torch(model: nn.Module) -> Callable[[Tensor], Any]:
    """Give a call without autograd."""

    def call(x: Tensor) -> Any:
        with torch.inference_mode():
            return model(x)

    return call


def in_onnxruntime(path: Path, threads: int) -> Callable[[Tensor], Any]:
    """Open a file and give a call."""
    session = onnx_session(path, threads)
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x.numpy()})[0]


def float_forms(network: nn.Module, batches: list[Tensor], folder: Path, threads: int) -> dict[str, tuple[Any, int]]:
    """Give what does not depend on our bit-width: calls and bytes by label."""
    weights = 4 * sum(value.numel() for value in network.state_dict().values())
    found: dict[str, tuple[Any, int]] = {"float32, torch": (in_torch(network), weights)}
    if not (installed("onnxruntime") and installed("onnxscript")):
        return found
    path = folder / "float.onnx"
    with quiet():
        program = torch.onnx.export(
            network, (batches[0],), dynamo=True, dynamic_shapes=({0: "batch"},), optimize=True, verbose=False
        )
        program.save(str(path))
    found[FLOAT_ORT] = (in_onnxruntime(path, threads), path.stat().st_size)
    try:
        static_path = folder / "static.onnx"
        quantize_statically(path, static_path, batches)
    except ImportError as error:
        print(f"{STATIC} takes no part: {error}")
        return found
    found[STATIC] = (in_onnxruntime(static_path, threads), static_path.stat().st_size)
    return found


def quantize_statically(source: Path, target: Path, batches: list[Tensor]) -> None:
    """Quantize as onnxruntime's documentation has it for a CPU: first its own clean-up, then signed weights in QDQ."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    clean = source.with_name("clean.onnx")
    with quiet():
        quant_pre_process(str(source), str(clean), skip_symbolic_shape=True)
        name = onnx_session(clean).get_inputs()[0].name
        quantize_static(
            str(clean),
            str(target),
            Reader(name, batches),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )


def our_forms(
    network: nn.Module, spec: str, bits: int, batches: list[Tensor], folder: Path, threads: int
) -> dict[str, tuple[Any, int]]:
    """Quantize to some bits; give calls and bytes by label."""
    model: nn.Module = prepare(network, QuantConfig.method("srq", bits, bits))
    calibrate(model, batches)
    model.eval()
    save(model, folder / "model.safetensors")
    found: dict[str, tuple[Any, int]] = {
        "ours, fake-quantized, torch": (in_torch(model), (folder / "model.safetensors").stat().st_size)
    }
    packed = folder / "packed.safetensors"
    size = save_packed(convert(model, batches[0]), packed).total
    found["ours, packed integers, torch"] = (in_torch(load_packed(packed, fresh(spec))), size)
    sparing = convert(model, batches[0], low_memory=True)
    found["ours, packed, unpacked at each call"] = (in_torch(sparing), size)
    if installed("onnxruntime") and installed("onnxscript"):
        integer = convert(model, batches[0])
        for weight_type, label in (("int8", "int8 weights"), ("auto", "smallest weights")):
            path = folder / f"{weight_type}.onnx"
            with quiet():
                written = export_onnx(integer, path, batches[0], weight_type=weight_type)  # type: ignore[arg-type]
            types = "/".join(sorted({row.container for row in written.rows}))
            name = f"ours, onnxruntime, {label}" + (f" ({types})" if weight_type == "auto" else "")
            found[name] = (in_onnxruntime(path, threads), written.file_bytes)
    check(found, batches[0])
    return found


def fresh(spec: str) -> nn.Module:
    """Build a network with untrained weights."""
    return build(spec, SHAPES.get(spec.partition(":")[0], (784,)), 10).eval()


def check(forms: dict[str, tuple[Any, int]], x: Tensor) -> None:
    """Complain if forms of the same network do not classify alike; a tie of two steps may fall either way."""
    classes = {label: torch.as_tensor(call(x)).argmax(1) for label, (call, _) in forms.items()}
    first = next(iter(classes.values()))
    for label, found in classes.items():
        agreement = float((found == first).double().mean())
        if agreement < 0.95:
            print(f"'{label}' agrees with the fake-quantized network on {agreement:.0%} of the rows only")


def main() -> None:
    parser = options_of(__doc__.splitlines()[0], bits=[2, 3, 4], repeats=30)
    parser.add_argument("--nets", nargs="*", default=["lenet5", "mlp:512,512"], help="as srq_dropbits.models.build")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 64])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    draw = torch.Generator().manual_seed(options.seed)
    results: list[dict[str, Any]] = []
    for spec in options.nets:
        network = fresh(spec)
        shape = SHAPES.get(spec.partition(":")[0], (784,))
        batches = [torch.randn(64, *shape, generator=draw) for _ in range(CALIBRATION_BATCHES)]
        with tempfile.TemporaryDirectory() as name:
            float_only = float_forms(network, batches, Path(name), options.threads)
        for bits in options.bits:
            with tempfile.TemporaryDirectory() as name:
                forms = float_only | our_forms(network, spec, bits, batches, Path(name), options.threads)
            result: dict[str, Any] = {"net": spec, "bits": bits, "bytes": {k: size for k, (_, size) in forms.items()}}
            for rows in options.batches:
                x = torch.randn(rows, *shape, generator=draw)
                calls = {label: (lambda call=call, x=x: call(x)) for label, (call, _) in forms.items()}
                result[f"ms at batch {rows}"] = clock(calls, options.repeats, least_ms=4)
            results.append(result)
            show(result, options.batches, options.threads)
    print_ratios(results, options.batches)
    write_json(options, results)


def show(result: dict[str, Any], batches: list[int], threads: int) -> None:
    header = [
        "",
        *[f"ms, batch {rows}" for rows in batches],
        *[f"/ static, {rows}" for rows in batches],
        "file bytes",
    ]
    lines: list[list[Any]] = []
    for label, size in result["bytes"].items():
        times = [result[f"ms at batch {rows}"] for rows in batches]
        ratios = [f"{ms[label] / ms[STATIC]:.2f}" if STATIC in ms else None for ms in times]
        lines.append([label, *[f"{ms[label]:.3f}" for ms in times], *ratios, size])
    print_table(f"{result['net']}, {result['bits']} bits, {threads} thread(s)", header, lines)


def print_ratios(results: list[dict[str, Any]], batches: list[int]) -> None:
    print("\nours in onnxruntime with int8 weights, and ours packed in torch, as multiples of rivals' time and bytes")
    for result in results:
        for rival in ("float32, torch", FLOAT_ORT, STATIC):
            texts: list[str] = []
            for label in ("ours, onnxruntime, int8 weights", "ours, packed integers, torch"):
                if rival not in result["bytes"] or label not in result["bytes"]:
                    continue
                times = [result[f"ms at batch {rows}"] for rows in batches]
                ratios = " ".join(f"{ms[label] / ms[rival]:.2f}" for ms in times)
                size = result["bytes"][label] / result["bytes"][rival]
                texts.append(f"{label.removeprefix('ours, ')} {ratios} (bytes {size:.3f})")
            if texts:
                print(f"{result['net']}, {result['bits']} bits / {rival}: {'; '.join(texts)}")


if __name__ == "__main__":
    main()
