"""ONNX graphs in the quantize-dequantize form, with weights in the smallest integer type that can be run.

Weights are integer initializers with a ``DequantizeLinear`` (spec, section 6); inputs are clipped to their grid where
the type is wider than it, then go through ``QuantizeLinear`` and ``DequantizeLinear``. Types below 8 bits save disk and
memory traffic; onnxruntime's CPU kernels compute with them in float32.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import logging
import warnings
from collections.abc import Generator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn

from shared_core.errors import not_installed
from shared_core.runs import atomic_path
from srq_dropbits.deploy import IntegerConv, IntegerLayer, convolve, integer_layers, run_model, swap_modules
from srq_dropbits.errors import ExportError, NothingToQuantizeError
from srq_dropbits.grid import Grid
from srq_dropbits.packing import pack_bits

__all__ = ["Container", "OnnxReport", "OnnxRow", "export_onnx", "runnable_containers"]

_NO_BIAS = "no_bias"
WeightType = Literal["auto", "int2", "int4", "int8", "int16"]


@dataclass(frozen=True)
class Container:
    """An integer type of ONNX.

    Parameters
    ----------
    name : as in ``onnx.TensorProto``, lower case
    bits : width
    opset : first opset whose DequantizeLinear takes it
    """

    name: str
    bits: int
    opset: int

    def holds(self, low: int, high: int) -> bool:
        """Tell whether all integers low..high fit.

        Parameters
        ----------
        low : smallest integer
        high : largest integer
        """
        return -(2 ** (self.bits - 1)) <= low and high < 2 ** (self.bits - 1)


_CONTAINERS = (Container("int2", 2, 25), Container("int4", 4, 21), Container("int8", 8, 13), Container("int16", 16, 21))


@dataclass(frozen=True)
class OnnxRow:
    """One quantized weight of the file.

    Parameters
    ----------
    name : of the layer
    bits : of its grid
    container : integer type that holds it
    bytes : of its integers in the file
    float_bytes : of the same weight as float32
    """

    name: str
    bits: int
    container: str
    bytes: int
    float_bytes: int


@dataclass(frozen=True)
class OnnxReport:
    """What an ONNX file holds, and how it compares with the model.

    Parameters
    ----------
    path : the file
    rows : its quantized weights
    file_bytes : of the file
    opset : version of the operators
    max_difference : largest absolute difference of onnxruntime's outputs from the model's on the example
    output_scale : largest absolute output of the model on the example
    argmax_agreement : share of the example's rows whose largest output is the same one
    notes : what to know about types and speed
    """

    path: str
    rows: tuple[OnnxRow, ...]
    file_bytes: int
    opset: int
    max_difference: float
    output_scale: float
    argmax_agreement: float
    notes: tuple[str, ...]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all integer weights."""
        return sum(row.bytes for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return asdict(self)

    def __str__(self) -> str:
        """Return a table with one line a weight."""
        width = max([len(row.name) for row in self.rows] + [len("weight")])
        lines = [f"{'weight':<{width}}  {'bits':>4}  {'type':<6}  {'bytes':>10}  {'float32':>10}"]
        lines += [
            f"{row.name:<{width}}  {row.bits:>4}  {row.container:<6}  {row.bytes:>10}  {row.float_bytes:>10}"
            for row in self.rows
        ]
        lines.append(f"file: {self.file_bytes} bytes, opset {self.opset}")
        lines.append(
            f"onnxruntime: largest difference {self.max_difference:.2g} of {self.output_scale:.3g}, the same largest"
            f" output in {self.argmax_agreement:.1%} of the rows"
        )
        return "\n".join([*lines, *self.notes])


def export_onnx(
    imodel: nn.Module,
    path: str | Path,
    example_input: Any,
    *,
    weight_type: WeightType = "auto",
    act_type: Literal["uint8", "auto"] = "uint8",
) -> OnnxReport:
    """Write a converted model as an ONNX graph with integer weights, for any batch size.

    Parameters
    ----------
    imodel : what :func:`srq_dropbits.convert` returned
    path : file to write
    example_input : a batch: a tensor, a tuple of positional or a dict of keyword arguments; the first dimension of
        each tensor is the batch
    weight_type : integer type of the weights; "auto" takes for each the smallest that holds its grid and that the
        installed onnxruntime can run. A weight whose grid does not fit takes the next wider type
    act_type : "uint8" or "auto", which is the same today: unsigned grids are stored as uint8, others as int8

    Returns
    -------
    Types, bytes, and how onnxruntime's outputs compare with the model's on the example.

    Raises
    ------
    InputError
        If onnx, onnxscript or onnxruntime is not installed, or the file cannot be written.
    ExportError
        If an operation has no ONNX form, or a grid fits no type.
    """
    _require_onnx()
    if act_type not in {"uint8", "auto"}:
        raise ExportError(f"act_type is '{act_type}'; choose uint8 or auto: runtimes run no smaller type")
    layers = dict(integer_layers(imodel))
    if not layers:
        raise NothingToQuantizeError(f"{type(imodel).__name__} has no integer layer; give what convert returned")
    exported = _quantized_form(imodel)
    runs = runnable_containers()
    while True:
        containers, notes = _choose(layers, weight_type, runs)
        opset = max([21, *(container.opset for container in containers.values())])
        proto = _translate(exported, example_input, opset)
        rows = _store_integers(proto, layers, containers)
        _strip(proto)
        data = proto.SerializeToString()
        refusal = _refusal(data)
        if refusal is None:
            break
        narrowest = min(containers.values(), key=lambda container: container.bits, default=_CONTAINERS[-1])
        if narrowest.bits >= 8:
            raise ExportError(f"the exported graph does not load: {refusal}")
        # A runtime may know a type, and yet fuse it into kernels that do not.
        runs = {**runs, narrowest.name: f"refused in this graph: {refusal}"}
    path = Path(path)
    difference, scale, agreement = _compare(imodel, data, example_input)
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
    return OnnxReport(str(path), tuple(rows), len(data), opset, difference, scale, agreement, tuple(notes))


def _require_onnx() -> None:
    for name in ("onnx", "onnxruntime", "onnxscript"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise not_installed("ONNX export", name, "srq-dropbits[onnx]") from error


@lru_cache(maxsize=1)
def runnable_containers() -> dict[str, str | None]:
    """Try which integer types the installed onnx and onnxruntime can dequantize.

    Returns
    -------
    For each type, None where it runs, else the reason why not.
    """
    return {container.name: _trial(container) for container in _CONTAINERS}


def _trial(container: Container) -> str | None:
    import onnx
    import onnxruntime
    from onnx import helper

    kind = getattr(onnx.TensorProto, container.name.upper(), None)
    if kind is None:
        return f"onnx {onnx.__version__} has no {container.name}"
    if onnx.defs.onnx_opset_version() < container.opset:
        return f"onnx {onnx.__version__} ends before opset {container.opset}"
    values = torch.tensor([[1, -1, 0], [0, -2, 1]])
    weight = onnx.TensorProto(name="w", data_type=kind, dims=[2, 3], raw_data=_raw(values, container))
    scale = helper.make_tensor("s", onnx.TensorProto.FLOAT, [2], [1.0, 2.0])
    graph = helper.make_graph(
        [helper.make_node("DequantizeLinear", ["w", "s"], ["y"], axis=0)],
        "trial",
        [],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2, 3])],
        [weight, scale],
    )
    model = helper.make_model_gen_version(graph, opset_imports=[helper.make_opsetid("", container.opset)])
    try:
        (found,) = _session(model.SerializeToString()).run(None, {})
    except Exception as error:
        return f"onnxruntime {onnxruntime.__version__} refuses {container.name}: {str(error).splitlines()[0][:120]}"
    expected = values * torch.tensor([[1.0], [2.0]])
    if not torch.equal(torch.as_tensor(found), expected):
        return f"onnxruntime {onnxruntime.__version__} reads {container.name} wrongly"
    return None


def _session(data: bytes) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def _choose(
    layers: Mapping[str, IntegerLayer], weight_type: str, runs: Mapping[str, str | None]
) -> tuple[dict[str, Container], list[str]]:
    names = [container.name for container in _CONTAINERS]
    if weight_type not in {"auto", *names}:
        raise ExportError(f"weight_type is '{weight_type}'; choose auto, {', '.join(names)}")
    notes = [f"{name} is not used: {reason}" for name, reason in runs.items() if reason is not None]
    widest = [c for c in _CONTAINERS if runs[c.name] is None]
    if weight_type == "auto":
        allowed = widest
        notes.insert(0, "types: the smallest that holds each grid and that the installed onnxruntime runs")
    else:
        least = _CONTAINERS[names.index(weight_type)].bits
        allowed = [container for container in widest if container.bits >= least]
    chosen: dict[str, Container] = {}
    for name, layer in layers.items():
        grid = layer.weight_grid
        if grid is None:
            continue
        fitting = [container for container in allowed if container.holds(grid.n_lo, grid.n_hi)]
        if not fitting:
            raise ExportError(f"layer '{name}': no ONNX type that runs here holds {grid.n_lo}..{grid.n_hi}")
        chosen[name] = fitting[0]
        if weight_type != "auto" and fitting[0].name != weight_type:
            notes.append(f"layer '{name}' is stored as {fitting[0].name}: {_misfit(grid, weight_type, runs)}")
    if any(container.bits < 8 for container in chosen.values()):
        notes.append("speed: weights below 8 bits save disk and memory, not time; runtimes compute with float32")
    return chosen, notes


def _misfit(grid: Grid, weight_type: str, runs: Mapping[str, str | None]) -> str:
    return runs[weight_type] or f"its integers {grid.n_lo}..{grid.n_hi} do not fit {weight_type}"


class _QuantizedForm(nn.Module):
    """A layer as float arithmetic around its grids: what the exporter sees, and the graph computes.

    Parameters
    ----------
    layer : the integer layer it stands for
    """

    weight: Tensor
    no_bias: Tensor
    offset: Tensor | None
    out_scale: Tensor | None
    step: Tensor
    zero_point: Tensor
    lowest: Tensor | None
    highest: Tensor | None

    def __init__(self, layer: IntegerLayer) -> None:
        super().__init__()
        self.kind = layer.kind
        self.options = layer.options if isinstance(layer, IntegerConv) else {}
        if layer.weight_grid is not None:
            weight = layer.weight_codes().float() if _scaled_after(layer) else layer.dequantized_weight()
            self.register_buffer("weight", weight)
            # A bias that is part of the layer is rounded by onnxruntime to the step of the integer sums; and without
            # one, the exporter computes one of zeros. This one is taken out of the graph again.
            self.register_buffer(_NO_BIAS, torch.zeros(layer.channels))
            ones = (1,) * layer.dimensions if isinstance(layer, IntegerConv) else ()
            self.register_buffer("offset", None if layer.bias is None else layer.bias.reshape(-1, *ones))
            factor = layer.scale.reshape(-1, *ones) if _scaled_after(layer) else None
            self.register_buffer("out_scale", factor)
        grid = layer.input_grid
        self.has_grid = grid is not None
        if grid is not None:
            low, high, zero = _input_container(layer.name, grid)
            self.register_buffer("step", layer.input_scale)
            self.register_buffer("zero_point", zero)
            # Quantizing saturates at the type's limits, not at the grid's.
            clipped = (grid.n_lo, grid.n_hi) != (low, high)
            self.register_buffer("lowest", layer.input_scale * grid.n_lo if clipped else None)
            self.register_buffer("highest", layer.input_scale * grid.n_hi if clipped else None)

    def _on_grid(self, x: Tensor) -> Tensor:
        if not self.has_grid:
            return x
        return torch.ops.srq_dropbits.on_grid(x, self.step, self.zero_point, self.lowest, self.highest)

    def forward(self, x: Any, other: Any = None) -> Any:
        """Apply the layer.

        Parameters
        ----------
        x : its input
        other : the second summand, or the size of a transposed convolution's output
        """
        if self.kind == "embedding":
            return nn.functional.embedding(x, self.weight)
        if self.kind == "add":
            return self._on_grid(x) + self._on_grid(other)
        if self.kind == "linear":
            # A MatMul of dequantized weights becomes, in onnxruntime, one that rounds its inputs to 8 bits; a Gemm does
            # not.
            rows = x.reshape(-1, x.shape[-1]) if x.ndim != 2 else x
            out = nn.functional.linear(self._on_grid(rows), self.weight, self.no_bias)
            out = out.reshape(*x.shape[:-1], -1) if x.ndim != 2 else out
        else:
            size = None if other is None else [int(length) for length in other]
            out = convolve(self.kind, self._on_grid(x), self.weight, self.no_bias, self.options, size)
        out = out if self.out_scale is None else out * self.out_scale
        return out if self.offset is None else out + self.offset


def _scaled_after(layer: IntegerLayer) -> bool:
    """Tell whether the weight's scale runs along no single axis: grouped transposed convolutions."""
    return isinstance(layer, IntegerConv) and layer.transposed and layer.scale.ndim > 0 and layer.options["groups"] > 1


def _input_container(name: str, grid: Grid) -> tuple[int, int, Tensor]:
    if grid.stride != 1:
        raise ExportError(f"layer '{name}': no ONNX form of inputs on odd integers; quantize its inputs otherwise")
    if grid.n_lo >= 0 and grid.n_hi <= 255:
        return 0, 255, torch.tensor(0, dtype=torch.uint8)
    if grid.n_lo >= -128 and grid.n_hi <= 127:
        return -128, 127, torch.tensor(0, dtype=torch.int8)
    if grid.n_lo <= 0 and -grid.n_lo <= 255 and grid.n_hi - grid.n_lo <= 255:
        return grid.n_lo, grid.n_lo + 255, torch.tensor(-grid.n_lo, dtype=torch.uint8)
    raise ExportError(f"layer '{name}': inputs on {grid.n_lo}..{grid.n_hi} fit neither int8 nor uint8")


def _quantized_form(imodel: nn.Module) -> nn.Module:
    model = copy.deepcopy(imodel).eval().cpu()
    made: dict[int, nn.Module] = {}
    swaps: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, IntegerLayer):
            swaps[name] = made.setdefault(id(module), _QuantizedForm(module))
    return swap_modules(model, swaps).requires_grad_(False)


def _on_grid(x: Tensor, step: Tensor, zero_point: Tensor, lowest: Tensor | None, highest: Tensor | None) -> Tensor:
    clipped = x.clone() if lowest is None else x.clamp(lowest, highest)
    limits = torch.iinfo(zero_point.dtype)
    zero = zero_point.to(torch.int32)
    return ((clipped / step).round() + zero).clamp(limits.min, limits.max).sub(zero) * step


@lru_cache(maxsize=1)
def _grid_operation() -> Any:
    """Register the operation that marks where inputs are put on their grid; only an export needs it."""
    schema = "(Tensor x, Tensor step, Tensor zero_point, Tensor? lowest, Tensor? highest) -> Tensor"
    operation = torch.library.custom_op("srq_dropbits::on_grid", _on_grid, mutates_args=(), schema=schema)
    operation.register_fake(_like_first)
    return torch.ops.srq_dropbits.on_grid.default


def _like_first(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def _on_grid_nodes(x: Any, step: Any, zero_point: Any, lowest: Any = None, highest: Any = None) -> Any:
    import onnxscript

    op: Any = onnxscript.opset18
    clipped = x if lowest is None else op.Clip(x, lowest, highest)
    return op.DequantizeLinear(op.QuantizeLinear(clipped, step, zero_point), step, zero_point)


def _translate(model: nn.Module, example_input: Any, opset: int) -> Any:
    operation = _grid_operation()
    keywords = dict(example_input) if isinstance(example_input, Mapping) else None
    positional = () if keywords is not None else example_input if isinstance(example_input, tuple) else (example_input,)
    shapes: Any = {name: _batch_axis(value) for name, value in keywords.items()} if keywords else None
    if keywords is None:
        shapes = tuple(_batch_axis(value) for value in positional)
    try:
        with _quiet():
            program = torch.onnx.export(
                model,
                positional,
                kwargs=keywords,
                dynamo=True,
                optimize=False,
                verbose=False,
                opset_version=opset,
                dynamic_shapes=shapes,
                custom_translation_table={operation: _on_grid_nodes},
            )
    except Exception as error:
        raise ExportError(f"cannot write the model as ONNX: {_cause(error)}") from error
    if program is None:
        raise ExportError("torch.onnx.export returned nothing; update torch")
    return program.model_proto


def _batch_axis(value: Any) -> dict[int, str] | None:
    # A batch of one example would be taken for a constant.
    return {0: "batch"} if isinstance(value, Tensor) and value.ndim else None


def _cause(error: BaseException) -> str:
    """Name the operation that has no ONNX form, from the exporter's chain of errors."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300] or type(error).__name__


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _store_integers(
    proto: Any, layers: Mapping[str, IntegerLayer], containers: Mapping[str, Container]
) -> list[OnnxRow]:
    """Put integer initializers and a DequantizeLinear each in the place of float weights."""
    import onnx
    from onnx import helper, numpy_helper

    initializers = {tensor.name: tensor for tensor in proto.graph.initializer}
    rows: list[OnnxRow] = []
    nodes: list[Any] = []
    for name, container in containers.items():
        layer = layers[name]
        weight = f"{name}.weight" if name else "weight"
        if weight not in initializers:
            raise ExportError(f"layer '{name}': its weight is not in the graph; is it used in the forward pass?")
        codes = layer.weight_codes().cpu()
        initializer = initializers[weight]
        initializer.Clear()
        initializer.name = f"{weight}_integer"
        initializer.data_type = getattr(onnx.TensorProto, container.name.upper())
        initializer.dims.extend(codes.shape)
        initializer.raw_data = _raw(codes, container)
        scale = torch.ones(()) if _scaled_after(layer) else layer.scale.cpu()
        proto.graph.initializer.append(numpy_helper.from_array(scale.numpy(), f"{weight}_scale"))
        axis: dict[str, Any] = {"axis": _axis(layer)} if scale.ndim else {}
        inputs = [f"{weight}_integer", f"{weight}_scale"]
        if container.name == "int8" and _fits_int16_pairs(layer):
            # onnxruntime computes a layer with integers only where the zero point is spelled out.
            zero = torch.zeros(scale.shape, dtype=torch.int8)
            proto.graph.initializer.append(numpy_helper.from_array(zero.numpy(), f"{weight}_zero_point"))
            inputs.append(f"{weight}_zero_point")
        nodes.append(helper.make_node("DequantizeLinear", inputs, [weight], name=f"{weight}_dequantize", **axis))
        rows.append(OnnxRow(name, _bits(layer), container.name, len(initializer.raw_data), 4 * codes.numel()))
    rest = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend([*nodes, *rest])
    return rows


def _fits_int16_pairs(layer: IntegerLayer) -> bool:
    """Tell whether two products fit 16 bits: processors without a dot product of bytes add pairs up in these."""
    if layer.input_grid is None or layer.weight_grid is None:
        return False
    # Kernels move signed inputs to 0 .. 255 first.
    inputs = layer.input_grid.n_hi if layer.input_grid.n_lo >= 0 else 255
    return 2 * inputs * max(-layer.weight_grid.n_lo, layer.weight_grid.n_hi) <= 2**15 - 1


def _bits(layer: IntegerLayer) -> int:
    return layer.weight_grid.bits if layer.weight_grid else 0


def _axis(layer: IntegerLayer) -> int:
    return 1 if layer.kind.startswith("conv_transpose") else 0


def _raw(values: Int[Tensor, "..."], container: Container) -> bytes:
    """Lay integers out as ONNX does: two's complement, the first element in the low bits of a byte."""
    if container.bits > 8:
        return values.to(torch.int16).contiguous().numpy().astype("<i2").tobytes()
    stored = values.to(torch.int64) & (2**container.bits - 1)
    return pack_bits(stored, container.bits).numpy().tobytes()


def _strip(proto: Any) -> None:
    """Take out what tells about the machine that made the file, and what no node uses."""
    from onnx import helper

    for node in proto.graph.node:
        if node.op_type in {"Conv", "ConvTranspose", "Gemm"} and node.input[-1].rpartition(".")[2] == _NO_BIAS:
            del node.input[-1]
    used = {name for node in proto.graph.node for name in node.input} | {out.name for out in proto.graph.output}
    kept = [tensor for tensor in proto.graph.initializer if tensor.name in used]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    del proto.graph.value_info[:]
    graph = proto.graph
    for item in [proto, graph, *graph.node, *graph.input, *graph.output, *graph.initializer]:
        del item.metadata_props[:]
        item.doc_string = ""
    proto.ir_version = helper.find_min_ir_version_for(list(proto.opset_import))


def _refusal(data: bytes) -> str | None:
    import onnx

    try:
        onnx.checker.check_model(data, full_check=True)
        _session(data)
    except Exception as error:
        return " ".join(str(error).split())[:300]
    return None


def _compare(imodel: nn.Module, data: bytes, example_input: Any) -> tuple[float, float, float]:
    session = _session(data)
    with torch.no_grad():
        expected = _first_tensor(run_model(imodel, example_input)).float().cpu()
    values = list(example_input.values()) if isinstance(example_input, Mapping) else example_input
    tensors = [v for v in (values if isinstance(values, list | tuple) else [values]) if isinstance(v, Tensor)]
    feed = {node.name: v.cpu().numpy() for node, v in zip(session.get_inputs(), tensors, strict=False)}
    found = torch.as_tensor(session.run(None, feed)[0]).float()
    difference = float((found - expected).abs().max()) if found.numel() else 0.0
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    same = (found.argmax(-1) == expected.argmax(-1)).float() if found.ndim else torch.ones(1)
    agreement = float(same.mean()) if same.numel() else 1.0
    return difference, scale, agreement


def _first_tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    items = list(value.values()) if isinstance(value, Mapping) else list(value)
    return _first_tensor(items[0])
