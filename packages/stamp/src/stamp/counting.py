"""Multiply-adds and parameters, of a network and, in closed form, of all that its keep probabilities could make of it.

One multiply-add counts once, and only convolutions and linear layers count: half of what
`torch.utils.flop_counter.FlopCounterMode` says of a convolutional network. Attention's own products of activations,
norms, biases and pooling do not count.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor, nn

from stamp.attention import NarrowAttention
from stamp.axes import CONVS, TRANSPOSED, axis_length, axis_places
from stamp.structure import ChannelGroups, GroupsError, Slot

__all__ = ["CostModel", "macs", "parameters"]


def parameters(model: nn.Module) -> int:
    """Count the numbers in a network's parameters; a parameter that is used twice counts once.

    Parameters
    ----------
    model : any network

    Examples
    --------
    >>> parameters(nn.Linear(3, 4))
    16
    """
    return sum(parameter.numel() for parameter in model.parameters())


def macs(model: nn.Module, example_input: Tensor | Sequence[Tensor]) -> int:
    """Count the multiply-adds of a forward pass of the example.

    Parameters
    ----------
    model : run once, in eval mode; its modes and statistics stay
    example_input : a batch ``(n, channels, height, width)``, all of whose rows count, or the tensors of several inputs

    Returns
    -------
    Multiply-adds of convolutions, linear layers and the projections of attentions.
    """
    return sum(_layer_macs(module, uses) for module, uses in _uses(model, example_input).values())


@dataclass(frozen=True)
class CostModel:
    """A cost of a network as a function of what is kept of each group, exact and differentiable.

    For independent channels kept with probabilities `pi`, a layer from entries `n` to entries `m` (how many each
    channel owns) costs in expectation ``scale * ((n . pi)(m . pi) + sum n m pi (1 - pi))`` (spec 2.6): the last term is
    for channels on both of its sides. A depthwise convolution, of one side only, costs ``scale * n . pi``.

    Parameters
    ----------
    names, widths : of the groups that are not frozen
    scale : ``(layers,)`` cost of a pair of entries
    inputs, outputs : ``(layers, channels)`` entries of each side that each channel owns
    fixed_inputs, fixed_outputs : ``(layers,)`` entries that no channel owns

    Examples
    --------
    >>> from stamp.structure import Group
    >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> places = Slot("0", "out", 0, 1, 0, 4), Slot("2", "in", 0, 1, 0, 4)
    >>> groups = ChannelGroups((Group("0", 4, places[:1], places[1:]),))
    >>> float(CostModel.macs(net, groups, torch.rand(1, 3)).expected({"0": torch.full((4,), 0.5)}))
    10.0
    """

    names: tuple[str, ...]
    widths: tuple[int, ...]
    scale: Float64[Tensor, " layers"]
    inputs: Float64[Tensor, "layers channels"]
    outputs: Float64[Tensor, "layers channels"]
    fixed_inputs: Float64[Tensor, " layers"]
    fixed_outputs: Float64[Tensor, " layers"]

    @classmethod
    def macs(cls, model: nn.Module, groups: ChannelGroups, example_input: Tensor | Sequence[Tensor]) -> CostModel:
        """Build the cost in multiply-adds; the model runs once to show the positions of each layer.

        Parameters
        ----------
        model : from which the groups were traced
        groups : its channel groups
        example_input : as for the function `macs`
        """
        owned = _Owned(groups)
        rows: list[_Row] = []
        for name, (module, uses) in _uses(model, example_input).items():
            single = next((axis for owner, axis in owned.slots if owner == name and axis.startswith("rows")), None)
            if single is not None:
                length = uses[0][0][int(single.removeprefix("rows"))]
            elif _is_tied(module):
                single, length = "in" if isinstance(module, TRANSPOSED) else "out", len(_weight(module))
            else:
                rows.extend(
                    (float(scale), *owned.side((name, *entering)), *owned.side((name, *leaving)))
                    for scale, entering, leaving in _dense_layers(module, uses)
                )
                continue
            rows.append((_layer_macs(module, uses) / length, *owned.side((name, single, length)), *owned.side()))
        return cls._of(groups, rows)

    @classmethod
    def parameters(cls, model: nn.Module, groups: ChannelGroups) -> CostModel:
        """Build the cost in parameters.

        Parameters
        ----------
        model : from which the groups were traced
        groups : its channel groups
        """
        owned = _Owned(groups)
        sides: dict[str, dict[int, tuple[Tensor, float]]] = {}
        for module, axis in owned.slots:
            if axis.startswith("dim"):
                dim = int(axis.removeprefix("dim"))
                length = model.get_parameter(module).shape[dim]
                sides.setdefault(module, {})[dim] = owned.side((module, axis, length))
            elif not axis.startswith("rows"):
                target = model.get_submodule(module)
                length = axis_length(target, axis)
                for tensor, dim, repeats in axis_places(target, axis):
                    counts, rest = owned.side((module, axis, length))
                    name = f"{module}.{tensor}" if module else tensor
                    sides.setdefault(name, {})[dim] = (repeats * counts, repeats * rest)
        rows: list[_Row] = []
        for name, parameter in model.named_parameters():
            found = sides.get(name, {})
            rest = parameter.numel() // math.prod(parameter.shape[dim] for dim in found)
            first, second = (*found.values(), owned.side(), owned.side())[:2]
            rows.append((float(rest), *first, *second))
        return cls._of(groups, rows)

    @classmethod
    def _of(cls, groups: ChannelGroups, rows: list[_Row]) -> CostModel:
        total = sum(groups.widths().values())
        scales, n, n0, m, m0 = zip(*rows, strict=True) if rows else ((), (), (), (), ())
        empty = torch.zeros(0, total, dtype=torch.float64)
        return cls(
            tuple(groups.widths()),
            tuple(groups.widths().values()),
            torch.tensor(scales, dtype=torch.float64),
            torch.stack(n) if n else empty,
            torch.stack(m) if m else empty,
            torch.tensor(n0, dtype=torch.float64),
            torch.tensor(m0, dtype=torch.float64),
        )

    def expected(self, keep_prob: Mapping[str, Float[Tensor, " width"]]) -> Float64[Tensor, ""]:
        """Return the expected cost.

        Parameters
        ----------
        keep_prob : probability of each channel of each group; a group left out is kept whole

        Raises
        ------
        GroupsError
            For a group that does not exist or is frozen, or probabilities of a wrong width.
        """
        pi = self._concatenated(keep_prob)
        entering = self.inputs @ pi + self.fixed_inputs
        leaving = self.outputs @ pi + self.fixed_outputs
        both = (self.inputs * self.outputs) @ (pi * (1 - pi))
        return self.scale @ (entering * leaving + both)

    def exact(self, keep: Mapping[str, Bool[Tensor, " width"]]) -> int:
        """Return the cost of the network that `surgery.cut` makes.

        Parameters
        ----------
        keep : which channels of each group stay; a group left out stays whole

        Raises
        ------
        GroupsError
            As for `expected`.
        """
        return round(float(self.expected({name: mask.to(torch.float64) for name, mask in keep.items()})))

    def _concatenated(self, values: Mapping[str, Tensor]) -> Tensor:
        unknown = sorted(set(values) - set(self.names))
        if unknown:
            raise GroupsError(f"{unknown} are frozen, or no groups; those that are not are {list(self.names)}")
        pieces = [torch.zeros(0, dtype=torch.float64)]
        for name, width in zip(self.names, self.widths, strict=True):
            own = values.get(name, torch.ones(width))
            if own.shape != (width,):
                raise GroupsError(f"group {name!r} got values of shape {tuple(own.shape)}; it has {width} channels")
            pieces.append(own.to(self.scale))
        return torch.cat(pieces)


_Row = tuple[float, Tensor, float, Tensor, float]


class _Owned:
    """How many entries of an axis each channel of the network owns, all groups in a row."""

    def __init__(self, groups: ChannelGroups) -> None:
        self.total = 0
        self.slots: dict[tuple[str, str], list[tuple[int, Slot]]] = {}
        for group in groups.prunable:
            for slot in dict.fromkeys(group.slots):
                self.slots.setdefault((slot.module, slot.axis), []).append((self.total, slot))
            self.total += group.width

    def side(self, axis: tuple[str, str, int] | None = None) -> tuple[Tensor, float]:
        """Return the entries that each channel, and none, owns of an axis given with its length, or of one entry."""
        counts = torch.zeros(self.total, dtype=torch.float64)
        if axis is None:
            return counts, 1.0
        module, name, length = axis
        for first, slot in self.slots.get((module, name), []):
            counts[first + slot.start : first + slot.start + slot.count] += slot.block
        return counts, length - float(counts.sum())


Uses = list[tuple[tuple[int, ...], ...]]
LAYERS = (*CONVS, nn.Linear, nn.MultiheadAttention, NarrowAttention)


def _uses(model: nn.Module, example_input: Tensor | Sequence[Tensor]) -> dict[str, tuple[nn.Module, Uses]]:
    """Note the shapes that enter and leave each layer, once for each of its calls, in eval mode and on a copy."""
    inputs = (example_input,) if isinstance(example_input, Tensor) else tuple(example_input)
    copied = copy.deepcopy(model).eval()
    found: dict[str, tuple[nn.Module, Uses]] = {}
    inner = {
        f"{name}.out_proj".removeprefix(".")
        for name, m in copied.named_modules()
        if isinstance(m, nn.MultiheadAttention | NarrowAttention)
    }

    for name, module in copied.named_modules():
        if isinstance(module, LAYERS) and name not in inner:
            module.register_forward_hook(partial(_note, found, name), with_kwargs=True)
    with torch.no_grad():
        copied(*inputs)
    return found


def _note(
    found: dict[str, tuple[nn.Module, Uses]], name: str, module: nn.Module, args: Any, kwargs: Any, output: Any
) -> None:
    shapes = [tuple(x.shape) for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    out = output[0] if isinstance(output, tuple) else output
    found.setdefault(name, (module, []))[1].append((*shapes[:3], tuple(out.shape)))


def _weight(module: nn.Module) -> Tensor:
    return module.get_parameter("weight")


def _is_tied(module: nn.Module) -> bool:
    return isinstance(module, CONVS) and module.groups > 1


def _layer_macs(module: nn.Module, uses: Uses) -> int:
    if _is_tied(module):
        return sum(_positions(module, use) for use in uses) * _weight(module).numel()
    return sum(scale * n * m for scale, (_, n), (_, m) in _dense_layers(module, uses))


def _positions(module: nn.Module, use: tuple[tuple[int, ...], ...]) -> int:
    """How often each weight is used in a call."""
    shape = use[0] if isinstance(module, TRANSPOSED) else use[-1]
    if isinstance(module, nn.Linear):
        return math.prod(shape[:-1])
    axis = len(shape) - 1 - len(module.kernel_size) if isinstance(module, CONVS) else 0
    return math.prod(shape[:axis] + shape[axis + 1 :])


def _dense_layers(module: nn.Module, uses: Uses) -> list[tuple[int, tuple[str, int], tuple[str, int]]]:
    """Positions times kernel, and the axes with their lengths, of each matrix product of a module."""
    match module:
        case nn.Linear():
            scale = sum(_positions(module, use) for use in uses)
            return [(scale, ("in", module.in_features), ("out", module.out_features))]
        case nn.Module() if isinstance(module, CONVS) and module.groups == 1:
            kernel = math.prod(module.kernel_size)
            scale = sum(_positions(module, use) for use in uses) * kernel
            return [(scale, ("in", module.in_channels), ("out", module.out_channels))]
        case nn.MultiheadAttention() | NarrowAttention():
            inner = module.num_heads * int(module.head_dim)
            whole = getattr(module, "in_proj_weight", None) is not None
            layers: list[tuple[int, tuple[str, int], tuple[str, int]]] = []
            for use in uses:
                for shape, axis in zip(use[:3], ("in", "in", "in") if whole else ("in", "key", "value"), strict=True):
                    layers.append((math.prod(shape[:-1]), (axis, shape[-1]), ("inner", inner)))
                layers.append((math.prod(use[-1][:-1]), ("inner", inner), ("out", use[-1][-1])))
            return layers
        case _:
            return []
