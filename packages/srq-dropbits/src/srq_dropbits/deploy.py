"""From a trained quantized model to one with integer weights: packed buffers, exact integer sums, one multiplication.

A layer computes ``out = (alpha_a alpha_w) sum(n_a n_w) + bias`` with integer codes n (spec, section 9). The sum is
exact: it does not depend on the order of summation, the batch size, or the machine. Batch norms that follow a layer go
into its per-channel scale and bias (spec, 2.7 item 7), which leaves the integer codes as they are.

The fake quantization of training adds rounded products in float32 instead. Outputs agree to float rounding, except
where an activation lies that close to the boundary of two grid points: it may then fall to the other one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields, is_dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from srq_dropbits.errors import CalibrationError, ExportError, NonFiniteError, NothingToQuantizeError, PackedFormatError
from srq_dropbits.grid import Grid
from srq_dropbits.layers import ResidualAdd, SplitAttention
from srq_dropbits.packing import pack_bits, packed_bytes, unpack_at, unpack_bits
from srq_dropbits.qat import QuantizedModel, with_add_modules  # pyright: ignore[reportPrivateUsage]
from srq_dropbits.structure import float_weight, input_quantizer, quantized_layers, weight_quantizer

__all__ = [
    "FoldedNorm",
    "IntegerAdd",
    "IntegerConv",
    "IntegerEmbedding",
    "IntegerLayer",
    "IntegerLinear",
    "SizeTable",
    "SizeTableRow",
    "convert",
    "integer_accumulators",
    "integer_layers",
    "size_table",
]

_CONVOLUTIONS: dict[str, Callable[..., Tensor]] = {
    "conv1d": functional.conv1d,
    "conv2d": functional.conv2d,
    "conv3d": functional.conv3d,
    "conv_transpose1d": functional.conv_transpose1d,
    "conv_transpose2d": functional.conv_transpose2d,
    "conv_transpose3d": functional.conv_transpose3d,
}
_KINDS: dict[type[nn.Module], str] = {
    nn.Linear: "linear",
    nn.Embedding: "embedding",
    ResidualAdd: "add",
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
    nn.ConvTranspose1d: "conv_transpose1d",
    nn.ConvTranspose2d: "conv_transpose2d",
    nn.ConvTranspose3d: "conv_transpose3d",
}
_BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class FoldedNorm:
    """The batch norm that went into a layer.

    Parameters
    ----------
    name : of the batch norm in the model
    features : its channels
    eps : its epsilon
    affine : whether it had a scale and an offset of its own
    layer_has_bias : whether the layer before it had a bias of its own
    """

    name: str
    features: int
    eps: float
    affine: bool
    layer_has_bias: bool

    def identity_tensors(self, offset: Tensor | None) -> dict[str, Tensor]:
        """Give the state of a batch norm of this shape that adds `offset` and does nothing else.

        Parameters
        ----------
        offset : (features,), or None for 0
        """
        state = {
            "running_mean": torch.zeros(self.features) if offset is None else -offset,
            # A batch norm divides by sqrt(var + eps).
            "running_var": torch.full((self.features,), 1 - self.eps),
            "num_batches_tracked": torch.tensor(0),
        }
        if self.affine:
            state |= {"weight": torch.ones(self.features), "bias": torch.zeros(self.features)}
        return {f"{self.name}.{key}": value for key, value in state.items()}


class IntegerLayer(nn.Module):
    """A layer with packed integer weights; what :func:`convert` puts in the place of a quantized layer.

    Parameters
    ----------
    kind : which layer it stands for, e.g. "linear" or "conv_transpose2d"
    weight_grid : grid of its weights, or None for a layer without weights
    weight_shape : shape of the weight
    codes : bit stream of the weights' codes (bytes,)
    scale : step of the weights, () or one per output channel (row of an embedding) (channels,)
    bias : float offset (channels,), or None
    input_grid : grid of its inputs, or None where they stay float
    input_scale : step of the inputs (), or None
    name : of the layer, for messages
    low_memory : unpack the weights at each call instead of keeping them unpacked
    """

    codes: Tensor
    scale: Tensor
    bias: Tensor | None
    input_scale: Tensor

    def __init__(
        self,
        kind: str,
        *,
        weight_grid: Grid | None = None,
        weight_shape: tuple[int, ...] = (),
        codes: UInt8[Tensor, "bytes"] | None = None,
        scale: Float[Tensor, "..."] | None = None,
        bias: Float[Tensor, "channels"] | None = None,
        input_grid: Grid | None = None,
        input_scale: Float[Tensor, ""] | None = None,
        name: str = "",
        low_memory: bool = False,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.name = name
        self.weight_grid = weight_grid
        self.weight_shape = weight_shape
        self.input_grid = input_grid
        self.low_memory = low_memory
        self.folded: FoldedNorm | None = None
        empty = torch.zeros(0, dtype=torch.uint8)
        self.register_buffer("codes", empty if codes is None else codes)
        self.register_buffer("scale", torch.ones(()) if scale is None else scale)
        self.register_buffer("bias", bias)
        self.register_buffer("input_scale", input_scale)
        self._cache: dict[str, Tensor] = {}
        bits = weight_grid.bits if weight_grid else 0
        expected = packed_bytes(math.prod(weight_shape), bits)
        if self.codes.numel() != expected:
            raise PackedFormatError(f"layer '{name}': expected {expected} bytes of codes, found {self.codes.numel()}")

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_cache": {}}

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> IntegerLayer:
        self._cache = {}
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._cache = {}
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        """Describe the grids."""
        shape = " x ".join(map(str, self.weight_shape))
        weights = f"{shape}, {self.weight_grid.bits}-bit weights" if self.weight_grid else "no weights"
        inputs = f"{self.input_grid.bits}-bit inputs" if self.input_grid else "float inputs"
        return f"{self.kind}, {weights}, {inputs}"

    @property
    def channels(self) -> int:
        """Number of output channels."""
        return self.weight_shape[0]

    def weight_codes(self) -> Int[Tensor, "..."]:
        """Unpack the weight's integers n, in the weight's shape (...)."""
        grid = self.weight_grid
        if grid is None or not grid.bits:
            return torch.zeros(self.weight_shape, dtype=torch.int32, device=self.codes.device)
        stored = unpack_bits(self.codes, grid.bits, math.prod(self.weight_shape)).to(torch.int32)
        return (stored * grid.stride + grid.n_lo).reshape(self.weight_shape)

    def dequantized_weight(self) -> Float[Tensor, "..."]:
        """Give scale times integer, with the scale of a folded batch norm, in the weight's shape (...)."""
        return self.weight_codes() * spread(self.scale, self.weight_shape, self.kind)

    def input_codes(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Round inputs to the integers of the input grid, kept in floating point.

        Parameters
        ----------
        x : inputs, of any shape (...)
        """
        grid = self.input_grid
        if grid is None:
            return x
        # The same division, and the same rounding to even, as in training.
        return (x / self.input_scale).round_().clamp_(grid.n_lo, grid.n_hi)

    def _kept(self, key: str, make: Callable[[], Tensor]) -> Tensor:
        if self.low_memory:
            return make()
        found = self._cache.get(key)
        if found is None:
            found = self._cache[key] = make()
        return found


class _Multiplying(IntegerLayer):
    def __init__(self, kind: str, *, terms: int, **state: Any) -> None:
        super().__init__(kind, **state)
        self.accumulator = torch.float32
        if self.input_grid is not None and self.weight_grid is not None:
            self.bound = _reach(self.input_grid) * _reach(self.weight_grid) * terms
            # Whole numbers below 2^24 are exact in float32, and so is any order of adding them.
            if self.bound >= 2**24:
                self.accumulator = torch.float64

    def accumulate(self, n: Tensor) -> Tensor:
        """Sum products of inputs and integer weights; exact where the inputs are integers.

        Parameters
        ----------
        n : inputs or their codes, in the layer's input shape (...)
        """
        raise NotImplementedError

    def _finish(self, total: Tensor, like: Tensor, trailing: int) -> Tensor:
        factor = self.scale if self.input_grid is None else self.scale * self.input_scale
        ones = (1,) * trailing
        out = (total * factor.reshape(-1, *ones).to(_at_least_float(total))).to(torch.float32)
        if self.bias is not None:
            out += self.bias.reshape(-1, *ones)
        return out.to(like.dtype) if like.is_floating_point() else out

    def _weights(self) -> Tensor:
        return self._kept("weights", lambda: self.weight_codes().to(self.accumulator))


class IntegerLinear(_Multiplying):
    """A linear layer on integers.

    Sums go through int8 arithmetic where this machine's is exact, else through float32 or, above 2^24, float64.
    """

    def __init__(self, **state: Any) -> None:
        super().__init__("linear", terms=state["weight_shape"][1], **state)
        self._shift = 0
        self._fits_int8 = False
        if self.input_grid is not None and self.weight_grid is not None:
            # Unsigned 8-bit inputs are moved into int8; what that takes off the sums is put back.
            self._shift = max(0, self.input_grid.n_hi - 127)
            fits = self.input_grid.n_lo - self._shift >= -128 and _reach(self.weight_grid) <= 127
            self._fits_int8 = fits and 128 * 127 * self.weight_shape[1] + self.bound < 2**31

    @torch.no_grad()
    def forward(self, x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch channels"]:
        """Apply the layer.

        Parameters
        ----------
        x : inputs (*batch, features)
        """
        with torch.autocast(x.device.type, enabled=False):
            return self._finish(self.accumulate(self.input_codes(x.float())), x, 0)

    def accumulate(self, n: Float[Tensor, "*batch features"]) -> Tensor:
        """Sum products of inputs and integer weights; exact where the inputs are integers.

        Parameters
        ----------
        n : inputs or their codes (*batch, features)
        """
        if not (self._fits_int8 and n.numel() and n.device.type == "cpu" and int8_is_exact()):
            return functional.linear(n.to(self.accumulator), self._weights())
        if bool(n.sum().isnan()):
            raise NonFiniteError(f"layer '{self.name}': NaN among its inputs; look at the layers before it")
        rows = (n.reshape(-1, n.shape[-1]) - self._shift).to(torch.int8)
        weights = self._kept("int8", lambda: self.weight_codes().to(torch.int8))
        total = _int8_product(rows, weights)
        if self._shift:
            total += self._kept("sums", lambda: self._shift * self.weight_codes().sum(1, dtype=torch.int32))
        return total.reshape(*n.shape[:-1], -1)


class IntegerConv(_Multiplying):
    """A convolution on integers, 1 to 3 spatial dimensions, transposed or not.

    Parameters
    ----------
    kind : "conv1d" to "conv_transpose3d"
    options : stride, padding, dilation, groups, padding_mode and output_padding of the layer it stands for
    """

    def __init__(self, kind: str, options: Mapping[str, Any], **state: Any) -> None:
        shape = state["weight_shape"]
        self.transposed = kind.startswith("conv_transpose")
        groups = int(options["groups"])
        terms = math.prod(shape) // shape[1] // groups if self.transposed else math.prod(shape[1:])
        super().__init__(kind, terms=terms, **state)
        self.options = dict(options)

    @property
    def channels(self) -> int:
        """Number of output channels."""
        return self.weight_shape[1] * self.options["groups"] if self.transposed else self.weight_shape[0]

    @property
    def dimensions(self) -> int:
        """Number of spatial dimensions."""
        return len(self.weight_shape) - 2

    @torch.no_grad()
    def forward(self, x: Float[Tensor, "..."], output_size: Iterable[int] | None = None) -> Float[Tensor, "..."]:
        """Apply the layer.

        Parameters
        ----------
        x : inputs (batch, channels, *space) or without batch, as (...)
        output_size : of a transposed convolution, as in ``torch.nn.ConvTranspose2d.forward``
        """
        size = None if output_size is None else [int(length) for length in output_size]
        with torch.autocast(x.device.type, enabled=False):
            return self._finish(self.accumulate(self.input_codes(x.float()), size), x, self.dimensions)

    def accumulate(self, n: Float[Tensor, "..."], output_size: list[int] | None = None) -> Tensor:
        """Sum products of inputs and integer weights; exact where the inputs are integers.

        Parameters
        ----------
        n : inputs or their codes (batch, channels, *space) or without batch, as (...)
        output_size : of a transposed convolution
        """
        with ExitStack() as stack:
            # NNPACK's and cuDNN's fast algorithms transform the inputs: their sums of integers are not exact.
            stack.enter_context(torch.backends.nnpack.flags(enabled=False))
            if n.device.type == "cuda":
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            return convolve(self.kind, n.to(self.accumulator), self._weights(), None, self.options, output_size)


class IntegerEmbedding(IntegerLayer):
    """An embedding with packed rows."""

    def __init__(self, **state: Any) -> None:
        super().__init__("embedding", **state)

    @torch.no_grad()
    def forward(self, index: Int[Tensor, "..."]) -> Float[Tensor, "... features"]:
        """Look rows up.

        Parameters
        ----------
        index : rows, of any shape (...)

        Returns
        -------
        Their dequantized values (..., features).
        """
        rows = self._rows(index) if self.low_memory else functional.embedding(index, self._weights())
        return rows * (self.scale[index].unsqueeze(-1) if self.scale.ndim else self.scale)

    def _weights(self) -> Tensor:
        return self._kept("weights", lambda: self.weight_codes().to(torch.float32))

    def _rows(self, index: Tensor) -> Tensor:
        grid, width = self.weight_grid, self.weight_shape[1]
        if grid is None or not grid.bits:
            return torch.zeros(*index.shape, width, device=self.codes.device)
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < self.weight_shape[0]:
            raise IndexError(f"layer '{self.name}': index out of range 0..{self.weight_shape[0] - 1}")
        places = index.unsqueeze(-1) * width + torch.arange(width, device=index.device)
        return unpack_at(self.codes, grid.bits, places).to(torch.float32) * grid.stride + grid.n_lo


class IntegerAdd(IntegerLayer):
    """The sum of two tensors on one integer grid: integers are added, then scaled once."""

    def __init__(self, **state: Any) -> None:
        super().__init__("add", **state)

    @torch.no_grad()
    def forward(self, a: Float[Tensor, "..."], b: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Add.

        Parameters
        ----------
        a : one summand, of any shape (...)
        b : the other one (...)
        """
        total = self.input_codes(a.float()) + self.input_codes(b.float())
        return (total if self.input_grid is None else total * self.input_scale).to(a.dtype)


def _reach(grid: Grid) -> int:
    return max(abs(grid.n_lo), abs(grid.n_hi))


def _at_least_float(total: Tensor) -> torch.dtype:
    return total.dtype if total.is_floating_point() else torch.float32


def convolve(
    kind: str,
    x: Float[Tensor, "..."],
    weight: Float[Tensor, "..."],
    bias: Float[Tensor, " channels"] | None,
    options: Mapping[str, Any],
    output_size: list[int] | None = None,
) -> Float[Tensor, "..."]:
    """Convolve as the layer that `options` come from does.

    Parameters
    ----------
    kind : "conv1d" to "conv_transpose3d"
    x : inputs (batch, channels, *space) or without batch, as (...)
    weight : of the layer (...)
    bias : of the layer (channels,), or None
    options : stride, padding, dilation, groups, padding_mode and output_padding of the layer
    output_size : of a transposed convolution, its last dimensions
    """
    apply = _CONVOLUTIONS[kind]
    stride, padding, dilation, groups = (options[key] for key in ("stride", "padding", "dilation", "groups"))
    if kind.startswith("conv_transpose"):
        extra = options["output_padding"]
        if output_size is not None:
            extra = _output_padding(x, weight, options, output_size)
        return apply(x, weight, bias, stride, padding, extra, groups, dilation)
    if options["padding_mode"] != "zeros":
        # `functional.pad` counts from the last dimension.
        sides = [side for pair in reversed(_both_sides(weight, options)) for side in pair]
        x, padding = functional.pad(x, sides, mode=options["padding_mode"]), 0
    return apply(x, weight, bias, stride, padding, dilation, groups)


def _both_sides(weight: Tensor, options: Mapping[str, Any]) -> list[tuple[int, int]]:
    kernel, padding = weight.shape[2:], options["padding"]
    if padding == "valid":
        return [(0, 0)] * len(kernel)
    if padding == "same":
        spans = [d * (size - 1) for d, size in zip(options["dilation"], kernel, strict=True)]
        return [(span // 2, span - span // 2) for span in spans]
    return [(side, side) for side in padding]


def _output_padding(x: Tensor, weight: Tensor, options: Mapping[str, Any], wanted: list[int]) -> list[int]:
    kernel = weight.shape[2:]
    space = x.shape[-len(kernel) :]
    extra: list[int] = []
    for axis, (size, length) in enumerate(zip(wanted[-len(kernel) :], space, strict=True)):
        stride, padding, dilation = (options[key][axis] for key in ("stride", "padding", "dilation"))
        least = (length - 1) * stride - 2 * padding + dilation * (kernel[axis] - 1) + 1
        if not 0 <= size - least < stride:
            raise ExportError(f"output_size {wanted}: expected {least} to {least + stride - 1} along axis {axis}")
        extra.append(size - least)
    return extra


def _int8_product(rows: Tensor, weights: Tensor) -> Tensor:
    return cast("Any", torch)._int_mm(rows, weights.t())


@lru_cache(maxsize=1)
def int8_is_exact() -> bool:
    """Tell whether this machine's int8 matrix product can be trusted.

    Processors without 8-bit dot products add pairs of products in 16 bits, and saturate.
    """
    try:
        for rows in (1, 4, 64):
            for high, low in ((127, 127), (-128, 127), (127, -127), (-128, -127)):
                a = torch.full((rows, 96), high, dtype=torch.int8)
                b = torch.full((48, 96), low, dtype=torch.int8)
                if not bool((_int8_product(a, b) == 96 * high * low).all()):
                    return False
    except (AttributeError, RuntimeError):
        return False
    return True


def spread(scale: Float[Tensor, "..."], shape: tuple[int, ...], kind: str) -> Float[Tensor, "..."]:
    """Shape a scale so that it multiplies the weight of its layer.

    Parameters
    ----------
    scale : () or one per output channel (channels,)
    shape : of the weight
    kind : of the layer; weights of transposed convolutions have their output channels second, group by group

    Returns
    -------
    The scale, of a shape (...) that broadcasts.
    """
    if not scale.ndim:
        return scale
    ones = (1,) * (len(shape) - 2)
    if not kind.startswith("conv_transpose"):
        return scale.reshape(-1, 1, *ones)
    groups = scale.numel() // shape[1]
    return scale.reshape(groups, shape[1]).repeat_interleave(shape[0] // groups, 0).reshape(shape[0], shape[1], *ones)


def dequantize(
    codes: UInt8[Tensor, "bytes"], scale: Float[Tensor, "..."], grid: Grid, shape: tuple[int, ...], kind: str
) -> Float[Tensor, "..."]:
    """Turn a bit stream into float weights.

    Parameters
    ----------
    codes : the bit stream (bytes,)
    scale : () or one per output channel (channels,)
    grid : of the weights
    shape : of the weight
    kind : of the layer

    Returns
    -------
    Scale times integer, in the weight's shape (...).
    """
    stored = unpack_bits(codes, grid.bits, math.prod(shape)).reshape(shape).to(torch.int32)
    return (stored * grid.stride + grid.n_lo) * spread(scale, shape, kind)


def kind_of(module: nn.Module) -> str | None:
    """Name the kind of layer that `module` is, or None for one that is never quantized.

    Parameters
    ----------
    module : a float layer, parametrized or not
    """
    # A subclass may compute something else; parametrized layers and attention's projections do not.
    return next(
        (kind for cls, kind in _KINDS.items() if isinstance(module, cls) and type(module).forward is cls.forward), None
    )


def build_layer(module: nn.Module, kind: str, *, name: str = "", **state: Any) -> IntegerLayer:
    """Make the integer layer that stands for a float one.

    Parameters
    ----------
    module : the float layer, whose strides, paddings and so on it takes over
    kind : the kind it must be of
    name : of the layer, for messages
    state : codes, scales and grids, as :class:`IntegerLayer` takes them

    Raises
    ------
    PackedFormatError
        If `module` is another kind of layer, or has another shape.
    """
    found = kind_of(module)
    if found != kind:
        raise PackedFormatError(f"layer '{name}': expected {found or type(module).__name__}, found {kind}")
    if kind == "add":
        return IntegerAdd(name=name, **state)
    shape = tuple(cast("Tensor", module.weight).shape)
    if tuple(state["weight_shape"]) != shape:
        raise PackedFormatError(f"layer '{name}': expected a weight of {shape}, found {tuple(state['weight_shape'])}")
    channels = shape[1] * cast("int", module.groups) if kind.startswith("conv_transpose") else shape[0]
    for part in ("scale", "bias"):
        tensor = state.get(part)
        if tensor is not None and tuple(tensor.shape) not in {(channels,), () if part == "scale" else (channels,)}:
            raise PackedFormatError(
                f"layer '{name}': expected a {part} for {channels} channels, found {tuple(tensor.shape)}"
            )
    if kind == "linear":
        return IntegerLinear(name=name, **state)
    if kind == "embedding":
        if isinstance(module.max_norm, float | int):
            raise ExportError(f"layer '{name}': max_norm rescales rows at each look-up; set it to None first")
        return IntegerEmbedding(name=name, **state)
    keys = ("stride", "padding", "dilation", "groups", "padding_mode", "output_padding")
    options = {key: getattr(module, key) for key in keys if hasattr(module, key)}
    return IntegerConv(kind, options, name=name, **state)


def integer_layers(model: nn.Module) -> Iterator[tuple[str, IntegerLayer]]:
    """Iterate over the integer layers of a converted model, each once, with their names.

    Parameters
    ----------
    model : what :func:`convert` returned
    """
    for name, module in model.named_modules():
        if isinstance(module, IntegerLayer):
            yield name, module


def integer_accumulators(layer: IntegerLayer, x: Float[Tensor, "..."]) -> Int[Tensor, "..."]:
    """Give the integer sums a layer makes for some inputs, before any scale.

    Parameters
    ----------
    layer : a linear layer or convolution of a converted model, with quantized inputs
    x : its float inputs (...)

    Returns
    -------
    Sums of n_a n_w as int64 (...).

    Raises
    ------
    ExportError
        If the layer makes no integer sums.
    """
    if not isinstance(layer, _Multiplying) or layer.input_grid is None:
        raise ExportError(f"layer '{layer.name}': {layer.kind} with float inputs, or without weights, has no such sums")
    with torch.no_grad():
        return layer.accumulate(layer.input_codes(x.float())).to(torch.int64)


def convert(qmodel: nn.Module, example_input: Any = None, *, low_memory: bool = False) -> nn.Module:
    """Turn a trained quantized model into one that holds packed integers and computes with them.

    Parameters
    ----------
    qmodel : what :func:`srq_dropbits.prepare` returned, calibrated; it is copied, not changed
    example_input : a batch for one forward pass, which shows the batch norms that can be folded into the layer before
        them: a tensor, a tuple of positional or a dict of keyword arguments. Without it only convolutions of models
        that ``torch.fx`` can trace take up their batch norms
    low_memory : unpack weights at each call, instead of keeping them unpacked from the first call on

    Returns
    -------
    A copy in eval mode, without gradients, whose quantized layers are :class:`IntegerLayer`; where `qmodel` is a layer
    itself, that layer.

    Raises
    ------
    NothingToQuantizeError
        If no layer of `qmodel` is quantized.
    CalibrationError
        If an input quantizer has seen no data.
    """
    model = _plain_class(copy.deepcopy(qmodel)).eval()
    layers = dict(quantized_layers(model))
    swaps: dict[str, nn.Module] = {}
    made: dict[int, IntegerLayer] = {}
    for name, module in layers.items():
        made[id(module)] = _convert_layer(name, module, low_memory)
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in made:
            swaps[name] = made[id(module)]
    if not swaps:
        raise NothingToQuantizeError(f"{type(qmodel).__name__} has no quantized layer; give what prepare returned")
    model = swap_modules(model, swaps)
    model.requires_grad_(False)
    _fold_norms(model, example_input)
    return model


def _plain_class(model: nn.Module) -> nn.Module:
    """Take off what ``prepare`` put on the whole model."""
    if isinstance(model, QuantizedModel):
        hooks = model._forward_pre_hooks  # pyright: ignore[reportPrivateUsage]
        for key in [key for key, hook in hooks.items() if hook.__module__ == QuantizedModel.__module__]:
            del hooks[key]
        model.__dict__.pop("quant_config", None)
        model.__class__ = next(base for base in type(model).__bases__ if base is not QuantizedModel)
    return model


@torch.no_grad()
def _convert_layer(name: str, module: nn.Module, low_memory: bool) -> IntegerLayer:
    kind = kind_of(module)
    if kind is None:
        raise ExportError(f"layer '{name}': {type(module).__name__} has a forward pass of its own; exclude the layer")
    state: dict[str, Any] = {"name": name, "low_memory": low_memory}
    inputs = input_quantizer(module)
    if inputs is not None:
        if not inputs.ready:
            raise CalibrationError(f"layer '{name}': its input quantizer has seen no data; run calibrate first")
        state |= {"input_grid": inputs.grid, "input_scale": _finite(name, "input step", inputs.alpha).reshape(())}
    if kind == "add":
        return build_layer(module, kind, **state)
    weights = weight_quantizer(module)
    if weights is None:
        raise ExportError(f"layer '{name}': its inputs are quantized, but its weights are not; exclude the layer")
    # Behind a weight norm or the like: what is stored is what the quantizer gets.
    original = float_weight(module)
    grid = weights.grid
    state |= {"weight_grid": grid, "weight_shape": tuple(original.shape)}
    bias = getattr(module, "bias", None)
    if isinstance(bias, Tensor):
        state["bias"] = _finite(name, "bias", bias).clone()
    if grid.bits:
        stored = (weights.codes(original) - grid.n_lo).div(grid.stride, rounding_mode="floor")
        state |= {
            "codes": pack_bits(stored, grid.bits),
            "scale": _channel_scale(name, kind, module, _finite(name, "weight step", weights.alpha)),
        }
    else:
        state |= {"codes": torch.zeros(0, dtype=torch.uint8, device=original.device)}
        state |= {"scale": torch.ones((), device=original.device)}
    return build_layer(module, kind, **state)


def _finite(name: str, what: str, tensor: Tensor) -> Tensor:
    if not bool(tensor.isfinite().all()):
        raise NonFiniteError(f"layer '{name}': NaN or infinity in its {what}; train it with a smaller learning rate")
    return tensor.detach().to(torch.float32)


def _channel_scale(name: str, kind: str, module: nn.Module, alpha: Tensor) -> Tensor:
    if alpha.numel() == 1:
        return alpha.reshape(()).clone()
    if not kind.startswith("conv_transpose"):
        return alpha.reshape(-1).clone()
    if alpha.shape[0] != 1:
        raise ExportError(f"layer '{name}': one step per input channel; integers need one per output channel")
    return alpha.reshape(-1).repeat(cast("int", module.groups))


def swap_modules(model: nn.Module, swaps: Mapping[str, nn.Module]) -> nn.Module:
    """Put modules in the place of others.

    Parameters
    ----------
    model : changed in place
    swaps : new modules by name; the name "" stands for the model itself

    Returns
    -------
    The model, or what took its place.
    """
    for name, module in swaps.items():
        if not name:
            return module
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
    return model


def as_prepared(model: nn.Module, layers: Mapping[str, str], attentions: Iterable[str]) -> nn.Module:
    """Change the modules of a float model as :func:`srq_dropbits.prepare` does, with nothing quantized.

    Parameters
    ----------
    model : a float model, changed in place
    layers : kinds of the quantized layers by name; sums that are no modules yet are made such
    attentions : names of attention modules whose projections become linear layers
    """
    modules = dict(model.named_modules())
    if any(kind == "add" and name not in modules for name, kind in layers.items()):
        model = with_add_modules(model)
    found = {name: modules[name] for name in attentions if isinstance(modules.get(name), nn.MultiheadAttention)}
    return swap_modules(model, {name: SplitAttention(cast("Any", module), name) for name, module in found.items()})


def _fold_norms(model: nn.Module, example_input: Any) -> None:
    pairs = _pairs_by_graph(model) if example_input is None else _pairs_by_run(model, example_input)
    for name, norm_name in pairs:
        layer, norm = model.get_submodule(name), cast("_BatchNorm", model.get_submodule(norm_name))
        _fold(cast("_Multiplying", layer), norm, norm_name)
        for alias, module in list(model.named_modules(remove_duplicate=False)):
            if module is norm:
                swap_modules(model, {alias: nn.Identity()})


def _fold(layer: _Multiplying, norm: _BatchNorm, name: str) -> None:
    mean, variance = cast("Tensor", norm.running_mean).double(), cast("Tensor", norm.running_var).double()
    factor = (variance + norm.eps).rsqrt()
    if norm.affine:
        factor = factor * norm.weight.double()
    bias = -mean if layer.bias is None else layer.bias.double() - mean
    offset = bias * factor + (norm.bias.double() if norm.affine else 0)
    layer.folded = FoldedNorm(name, norm.num_features, norm.eps, norm.affine, layer.bias is not None)
    layer.scale = (layer.scale.double() * factor).float()
    layer.bias = offset.float()


def _foldable(layer: nn.Module, norm: nn.Module) -> bool:
    return (
        isinstance(layer, _Multiplying)
        and type(norm) in _NORMS
        and not norm.training
        and isinstance(norm.running_mean, Tensor)
        and int(cast("int", norm.num_features)) == layer.channels
        and _unhooked(norm)
    )


class _LeafTracer(torch.fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, IntegerLayer | ResidualAdd | SplitAttention) or super().is_leaf_module(
            m, module_qualified_name
        )


def _pairs_by_graph(model: nn.Module) -> list[tuple[str, str]]:
    try:
        graph = _LeafTracer().trace(model)
    except Exception:
        # A model may fail to trace in any way; it is then left as it is.
        return []
    modules = dict(model.named_modules(remove_duplicate=False))
    calls: dict[int, list[torch.fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(id(modules[str(node.target)]), []).append(node)
    pairs: list[tuple[str, str]] = []
    for nodes in calls.values():
        node = nodes[0]
        layer, users = modules[str(node.target)], list(node.users)
        # Without shapes, only these norms are sure to normalise the layer's channels and not a position.
        if len(nodes) != 1 or len(users) != 1 or users[0].op != "call_module" or not isinstance(layer, IntegerConv):
            continue
        norm = modules[str(users[0].target)]
        once = len(calls[id(norm)]) == 1
        if once and type(norm) in {nn.BatchNorm2d, nn.BatchNorm3d} and _foldable(layer, norm):
            pairs.append((str(node.target), str(users[0].target)))
    return pairs


# What only asks for a property of a tensor does not use its values.
_PROPERTIES = {
    Tensor.dim, Tensor.size, Tensor.numel, Tensor.nelement, Tensor.stride, Tensor.is_contiguous,
    Tensor.is_floating_point, Tensor.is_complex, Tensor.get_device, torch.is_floating_point, torch.is_complex,
    torch.numel,
}  # fmt: skip
_PROPERTY_NAMES = ("shape", "ndim", "dtype", "device", "layout", "requires_grad", "is_cuda", "is_sparse", "is_mps")
_PROPERTIES |= {getattr(Tensor, name).__get__ for name in _PROPERTY_NAMES}


class _Consumers(TorchFunctionMode):
    """Count, for each tensor that is watched, the calls of torch functions that take it."""

    def __init__(self) -> None:
        super().__init__()
        self.watched: dict[int, Tensor] = {}
        self.uses: dict[int, int] = {}

    def watch(self, tensor: Tensor) -> None:
        self.watched[id(tensor)] = tensor
        self.uses.setdefault(id(tensor), 0)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in _PROPERTIES:
            for tensor in _tensors_in((args, kwargs or {})):
                if id(tensor) in self.watched:
                    self.uses[id(tensor)] += 1
        return func(*args, **(kwargs or {}))


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors_in(list(value.values()))
    elif isinstance(value, list | tuple | set | frozenset):
        for item in cast("Iterable[Any]", value):
            yield from _tensors_in(item)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from _tensors_in([getattr(value, field.name) for field in fields(value)])


def run_model(model: nn.Module, example_input: Any) -> Any:
    """Call a model with an example: a tensor, a tuple of positional or a dict of keyword arguments.

    Parameters
    ----------
    model : what to call
    example_input : its arguments
    """
    if isinstance(example_input, Mapping):
        return model(**cast("Mapping[str, Any]", example_input))
    return model(*cast("tuple[Any, ...]", example_input)) if isinstance(example_input, tuple) else model(example_input)


def _pairs_by_run(model: nn.Module, example_input: Any) -> list[tuple[str, str]]:
    consumers = _Consumers()
    outputs: dict[str, list[Tensor]] = {}
    inputs: dict[str, list[Any]] = {}
    handles: list[Any] = []

    def watch_output(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            consumers.watch(output)
            outputs.setdefault(name, []).append(output)

        return hook

    def watch_input(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any) -> None:
            inputs.setdefault(name, []).append(args[0] if args else None)

        return hook

    candidates = {
        name: module for name, module in model.named_modules() if type(module) in _NORMS and _unhooked(module)
    }
    for name, module in model.named_modules():
        if isinstance(module, _Multiplying) and name and _unhooked(module):
            handles.append(module.register_forward_hook(watch_output(name)))
    handles += [module.register_forward_pre_hook(watch_input(name)) for name, module in candidates.items()]
    try:
        with torch.no_grad(), consumers:
            result = run_model(model, example_input)
    finally:
        for handle in handles:
            handle.remove()
    results = {id(tensor) for tensor in _tensors_in(result)}
    makers = {id(tensor): name for name, made in outputs.items() for tensor in made}
    pairs: list[tuple[str, str]] = []
    for norm_name, taken in inputs.items():
        names = {makers.get(id(tensor)) for tensor in taken}
        name = names.pop() if len(names) == 1 else None
        if name is None or not _foldable(model.get_submodule(name), candidates[norm_name]):
            continue
        made = outputs[name]
        sole = all(consumers.uses[id(tensor)] == 1 and id(tensor) not in results for tensor in made)
        same = [id(tensor) for tensor in made] == [id(tensor) for tensor in taken]
        # A batch norm normalises dimension 1.
        dimensions = len(cast("_Multiplying", model.get_submodule(name)).weight_shape)
        if sole and same and all(tensor.ndim == dimensions for tensor in made):
            pairs.append((name, norm_name))
    return pairs


def _unhooked(module: nn.Module) -> bool:
    return not (module._forward_hooks or module._forward_pre_hooks)  # pyright: ignore[reportPrivateUsage]


@dataclass(frozen=True)
class SizeTableRow:
    """One layer before and after.

    Parameters
    ----------
    name : of the layer, or "everything else"
    bits : of its weights; None where it has none
    dtype_before : of its weights before
    dtype_after : of its weights after
    bytes_before : of its weights and bias before
    bytes_after : of its codes, scales and bias after
    """

    name: str
    bits: int | None
    dtype_before: str
    dtype_after: str
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class SizeTable:
    """Bytes of a model's tensors before and after conversion.

    Parameters
    ----------
    rows : a row per integer layer, and one for everything else
    """

    rows: tuple[SizeTableRow, ...]

    @property
    def bytes_before(self) -> int:
        """Bytes of all tensors before."""
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        """Bytes of all tensors after."""
        return sum(row.bytes_after for row in self.rows)

    def __str__(self) -> str:
        """Return a table with one line a layer."""
        width = max(len(row.name) for row in self.rows)
        lines = [f"{'layer':<{width}}  bits  {'before':<16}  {'bytes':>10}  {'after':<16}  {'bytes':>10}"]
        for row in self.rows:
            bits = "" if row.bits is None else str(row.bits)
            lines.append(
                f"{row.name:<{width}}  {bits:>4}  {row.dtype_before:<16}  {row.bytes_before:>10}"
                f"  {row.dtype_after:<16}  {row.bytes_after:>10}"
            )
        share = self.bytes_after / max(self.bytes_before, 1)
        lines.append(
            f"{'total':<{width}}  {'':>4}  {'':<16}  {self.bytes_before:>10}  {'':<16}  {self.bytes_after:>10}"
            f"  ({share:.3f})"
        )
        return "\n".join(lines)


def size_table(before: nn.Module, after: nn.Module) -> SizeTable:
    """Compare the bytes of a model's tensors before and after conversion.

    Parameters
    ----------
    before : the float model, or the prepared one; the quantizers' own few numbers are not counted
    after : what :func:`convert` made of it

    Returns
    -------
    A row per integer layer, and one for everything else.
    """
    sizes_before = _layer_tensors(before)
    sizes_after = _layer_tensors(after)
    rows: list[SizeTableRow] = []
    for name, layer in integer_layers(after):
        prefix = f"{name}." if name else ""
        # weight0 and weight1 are the two parts of a weight norm.
        owned = [f"{prefix}{part}" for part in ("weight", "weight0", "weight1", "bias")]
        old = {key: sizes_before.pop(key) for key in owned if key in sizes_before}
        new = {key: sizes_after.pop(key) for key in list(sizes_after) if key.rpartition(".")[0] == name}
        weight = next((tensor for key, tensor in old.items() if key != owned[-1]), None)
        bits = layer.weight_grid.bits if layer.weight_grid else None
        rows.append(
            SizeTableRow(
                name or type(layer).__name__,
                bits,
                _short(weight.dtype) if weight is not None else "",
                _short(layer.codes.dtype) + (f" ({bits}-bit codes)" if bits is not None else ""),
                sum(map(_bytes, old.values())),
                sum(map(_bytes, new.values())),
            )
        )
    rest = [sum(map(_bytes, left.values())) for left in (sizes_before, sizes_after)]
    rows.append(SizeTableRow("everything else", None, "", "", rest[0], rest[1]))
    return SizeTable(tuple(rows))


def _layer_tensors(model: nn.Module) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        plain = name.replace("parametrizations.weight.original", "weight")
        if ".parametrizations." not in f".{plain}" and ".input_quantizer." not in f".{plain}":
            found[plain] = tensor
    return found


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
