"""Time single layers at all widths that cutting could leave them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stamp.attention import NarrowAttention
from stamp.axes import CONVS, axis_length, axis_places, resize
from stamp.structure import ChannelGroups, Slot

__all__ = ["Call", "LayerTable", "Row", "Sides", "calls_of", "measured"]


@dataclass(frozen=True)
class LayerTable:
    """Milliseconds of one kind of layer on a grid of widths.

    Parameters
    ----------
    entering, leaving : increasing numbers of entries on its two sides; a side that goes along with the other is one
        number
    ms : for each number entering, for each leaving
    """

    entering: tuple[int, ...]
    leaving: tuple[int, ...]
    ms: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Call:
    """A call of a layer: the shapes it was given, and how many numbers left it."""

    name: str
    module: nn.Module
    inputs: tuple[Tensor, ...]
    size: int


@dataclass(frozen=True, eq=False)
class Row:
    """Which channels own the entries of a call's two sides, and what of it has to be measured.

    The axes that can be cut are those named; a side of the table that they do not reach is one number.
    """

    kind: tuple[object, ...]
    entering: str
    leaving: str
    inputs: Tensor
    fixed_input: float
    outputs: Tensor
    fixed_output: float


class Sides:
    """Who owns the entries of each axis, all channels in a row."""

    def __init__(self, groups: ChannelGroups) -> None:
        self.total = 0
        self.slots: dict[tuple[str, str], list[tuple[int, Slot]]] = {}
        for group in groups.prunable:
            for slot in dict.fromkeys(group.slots):
                self.slots.setdefault((slot.module, slot.axis), []).append((self.total, slot))
            self.total += group.width

    def of(self, call: Call) -> Row:
        """Return who owns the two sides of a call."""
        module, name = call.module, call.name
        rows = next((axis for owner, axis in self.slots if owner == name and axis.startswith("rows")), "")
        entering, leaving = "in", "out"
        if rows or isinstance(module, nn.MultiheadAttention) or _is_tied(module):
            entering, leaving = "", rows or ("out" if isinstance(module, CONVS) else "inner")
        inputs, fixed_input = self._side(call, entering)
        outputs, fixed_output = self._side(call, leaving)
        entering, leaving = (entering if inputs.any() else ""), (leaving if outputs.any() else "")
        shapes = tuple((tuple(x.shape), x.dtype) for x in call.inputs)
        # An attention does not say how many heads it has.
        kind = (repr(module), getattr(module, "num_heads", None), shapes, entering, leaving)
        return Row(kind, entering, leaving, inputs, fixed_input, outputs, fixed_output)

    def _side(self, call: Call, axis: str) -> tuple[Tensor, float]:
        counts = torch.zeros(self.total, dtype=torch.float64)
        if not axis:
            return counts, 1.0
        for first, slot in self.slots.get((call.name, axis), []):
            counts[first + slot.start : first + slot.start + slot.count] += slot.block
        return counts, _length(call, axis) - float(counts.sum())


def _length(call: Call, axis: str) -> int:
    if axis.startswith("rows"):
        return call.inputs[0].shape[int(axis.removeprefix("rows"))]
    return axis_length(call.module, axis)


def _is_tied(module: nn.Module) -> bool:
    return isinstance(module, CONVS) and module.groups > 1


def calls_of(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Call]:
    """List the calls of layers in a forward pass."""
    calls: list[Call] = []

    def noting(name: str) -> Any:
        def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            # The values are of no interest, and an attention is always given three.
            given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)][:3]
            out = output[0] if isinstance(output, tuple) else output
            calls.append(Call(name, module, tuple(x.to("meta") for x in given), out.numel()))

        return note

    layers = (*CONVS, nn.Linear, nn.MultiheadAttention)
    hooks = [
        module.register_forward_hook(noting(name), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, layers)
    ]
    with torch.inference_mode():
        model(*inputs)
    for hook in hooks:
        hook.remove()
    return calls


def measured(call: Call, row: Row, grid: int, ms: Callable[[nn.Module, tuple[Tensor, ...]], float]) -> LayerTable:
    """Time a layer at all widths of a grid."""
    unit = 1
    if isinstance(call.module, nn.MultiheadAttention):
        unit = call.module.head_dim
    elif isinstance(call.module, CONVS):
        unit = call.module.out_channels // call.module.groups if call.module.groups > 1 else 1
    entering = _steps(_length(call, row.entering), 1, grid) if row.entering else (1,)
    leaving = _steps(_length(call, row.leaving), unit, grid) if row.leaving else (1,)
    times = np.zeros((len(entering), len(leaving)))
    for i, n in enumerate(entering):
        for j, m in enumerate(leaving):
            times[i, j] = ms(*_narrowed(call, {row.entering: n, row.leaving: m}))
    return LayerTable(entering, leaving, tuple(map(tuple, _monotone(times).tolist())))


def _steps(length: int, unit: int, grid: int) -> tuple[int, ...]:
    """Return a channel, and multiples of it near each step."""
    steps = {max(1, round(length * k / grid / unit)) * unit for k in range(1, grid + 1)}
    return tuple(sorted({unit, *steps, length}))


def _narrowed(call: Call, widths: Mapping[str, int]) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Return the layer with fewer entries on its axes, and inputs for it."""
    module = call.module
    shapes = [list(x.shape) for x in call.inputs]
    cut_to = {axis: n for axis, n in widths.items() if axis and not axis.startswith("rows")}
    if _is_tied(module) and "out" in cut_to:
        cut_to["in"] = cut_to["out"] * axis_length(module, "in") // axis_length(module, "out")
    places = {
        (place.tensor, place.dim): torch.cat(
            [torch.arange(n) + k * axis_length(module, axis) for k in range(place.repeats)]
        )
        for axis, n in cut_to.items()
        for place in axis_places(module, axis)
    }
    tensors: dict[str, Tensor] = {name: parameter.detach() for name, parameter in module.named_parameters()}
    for (name, dim), index in places.items():
        tensors[name] = tensors[name].index_select(dim, index.to(tensors[name].device))
    small = copy.deepcopy(module, {id(p): nn.Parameter(tensors[name]) for name, p in module.named_parameters()})
    for axis, n in cut_to.items():
        if axis != "inner":
            resize(small, axis, n)
        elif isinstance(small, nn.MultiheadAttention) and n < axis_length(module, "inner"):
            small = NarrowAttention(small, n // small.head_dim)
    for axis, n in {**widths, **cut_to}.items():
        if axis.startswith("rows"):
            shapes[0][int(axis.removeprefix("rows"))] = n
        elif axis == "in":
            channel = len(shapes[0]) - 1 - len(module.kernel_size) if isinstance(module, CONVS) else -1
            shapes[0][channel] = n
    device = next(module.parameters()).device
    inputs = tuple(
        torch.ones(shape, dtype=x.dtype, device=device) for shape, x in zip(shapes, call.inputs, strict=True)
    )
    return small, inputs


def _monotone(times: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean of the least monotone table above and the greatest one below."""
    above, below = times, times
    for axis in (0, 1):
        above = np.maximum.accumulate(above, axis)
        below = np.flip(np.minimum.accumulate(np.flip(below, axis), axis), axis)
    return (above + below) / 2
