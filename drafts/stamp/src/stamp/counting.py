"""Multiply-adds and parameters, of a network and, in closed form, of all that its keep probabilities could make of it.

One multiply-add counts once, and only convolutions and linear layers count: half of what
`torch.utils.flop_counter.FlopCounterMode` says of a convolutional network. Attention's own products of activations, norms,
biases and pooling do not count.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from stamp.attention import NarrowAttention
from stamp.axes import CONVS, TRANSPOSED
from stamp.structure import ChannelGroups, GroupsError, Slot

__all__ = ["MacsModel", "expected_macs", "macs", "parameters"]


def parameters(model: nn.Module) -> int:
    """Count the numbers in a network's parameters; a parameter that is used twice counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def macs(model: nn.Module, example_input: Tensor | Sequence[Tensor]) -> int:
    """Count the multiply-adds of a forward pass of the example.

    Parameters
    ----------
    model : run once, in eval mode; its modes and statistics stay
    example_input : a batch, all of whose rows count, or the tensors of several inputs

    Returns
    -------
    Multiply-adds of convolutions, linear layers and the projections of attentions.
    """
    return sum(_layer_macs(module, uses) for module, uses in _uses(model, example_input).values())


@dataclass(frozen=True)
class MacsModel:
    """The multiply-adds of a network as a function of what is kept of each group, exact and differentiable.

    For independent channels kept with probabilities `pi`, a layer from entries `n` to entries `m` (how many each channel
    owns) costs in expectation ``positions * kernel * ((n . pi)(m . pi) + sum n m pi (1 - pi))`` (spec 2.6): the last term
    is for channels on both of its sides. A depthwise convolution costs ``positions * kernel * n . pi``.

    Parameters
    ----------
    names, widths : of the groups that are not frozen
    scale : ``(layers,)`` positions times kernel size
    inputs, outputs : ``(layers, channels)`` entries of each side that each channel owns
    fixed_inputs, fixed_outputs : ``(layers,)`` entries that no channel owns
    linear : ``(channels,)`` multiply-adds of tied convolutions
    constant : multiply-adds of tied convolutions that stay
    """

    names: tuple[str, ...]
    widths: tuple[int, ...]
    scale: Float64[Tensor, " layers"]
    inputs: Float64[Tensor, "layers channels"]
    outputs: Float64[Tensor, "layers channels"]
    fixed_inputs: Float64[Tensor, " layers"]
    fixed_outputs: Float64[Tensor, " layers"]
    linear: Float64[Tensor, " channels"]
    constant: float

    @classmethod
    def build(cls, model: nn.Module, groups: ChannelGroups, example_input: Tensor | Sequence[Tensor]) -> MacsModel:
        """Run the model once to see the positions of each layer.

        Parameters
        ----------
        model : from which the groups were traced
        groups : its channel groups
        example_input : as for `macs`
        """
        prunable = groups.prunable
        start: dict[str, int] = {}
        total = 0
        for group in prunable:
            start[group.name] = total
            total += group.width
        owned: dict[tuple[str, str], list[tuple[int, Slot]]] = {}
        for group in prunable:
            for slot in dict.fromkeys(group.slots):
                owned.setdefault((slot.module, slot.axis), []).append((start[group.name], slot))

        def side(name: str, axis: str, length: int) -> tuple[Tensor, float]:
            counts = torch.zeros(total, dtype=torch.float64)
            for first, slot in owned.get((name, axis), []):
                counts[first + slot.start : first + slot.start + slot.count] += slot.block
            return counts, length - float(counts.sum())

        rows: list[tuple[float, Tensor, float, Tensor, float]] = []
        linear, constant = torch.zeros(total, dtype=torch.float64), 0.0
        for name, (module, uses) in _uses(model, example_input).items():
            rowed = [axis for owner, axis in owned if owner == name and axis.startswith("rows")]
            if rowed:
                rows_here = uses[0][0][int(rowed[0][4:])]
                counts, rest = side(name, rowed[0], rows_here)
                linear += _layer_macs(module, uses) / rows_here * counts
                constant += _layer_macs(module, uses) / rows_here * rest
                continue
            for scale, (in_axis, in_length), (out_axis, out_length) in _dense_layers(module, uses):
                rows.append((scale, *side(name, in_axis, in_length), *side(name, out_axis, out_length)))
            if _is_tied(module):
                axis = "in" if isinstance(module, TRANSPOSED) else "out"
                counts, rest = side(name, axis, int(_weight(module).shape[0]))
                per_entry = _layer_macs(module, uses) / _weight(module).shape[0]
                linear += per_entry * counts
                constant += per_entry * rest
        scales, n, n0, m, m0 = zip(*rows, strict=True) if rows else ((), (), (), (), ())
        empty = torch.zeros(0, total, dtype=torch.float64)
        return cls(
            tuple(group.name for group in prunable),
            tuple(group.width for group in prunable),
            torch.tensor(scales, dtype=torch.float64),
            torch.stack(n) if n else empty,
            torch.stack(m) if m else empty,
            torch.tensor(n0, dtype=torch.float64),
            torch.tensor(m0, dtype=torch.float64),
            linear,
            constant,
        )

    def expected(self, keep_prob: Mapping[str, Float[Tensor, " width"]]) -> Float64[Tensor, ""]:
        """Return the expected multiply-adds, or, for zeros and ones, the exact ones.

        Parameters
        ----------
        keep_prob : probability of each channel of each group; a group left out is kept whole

        Raises
        ------
        GroupsError
            For a group that does not exist or is frozen, or probabilities of a wrong width.
        """
        unknown = sorted(set(keep_prob) - set(self.names))
        if unknown:
            raise GroupsError(f"{unknown} are frozen, or no groups; those are {list(self.names)}")
        pieces: list[Tensor] = []
        for name, width in zip(self.names, self.widths, strict=True):
            pi = keep_prob.get(name, torch.ones(width))
            if pi.shape != (width,):
                raise GroupsError(f"probabilities of group {name!r} have shape {tuple(pi.shape)}, expected ({width},)")
            pieces.append(pi.to(torch.float64))
        pi = torch.cat([*pieces, torch.zeros(0, dtype=torch.float64)])
        entering = self.inputs @ pi + self.fixed_inputs
        leaving = self.outputs @ pi + self.fixed_outputs
        both = (self.inputs * self.outputs) @ (pi * (1 - pi))
        return self.scale @ (entering * leaving + both) + self.linear @ pi + self.constant


def expected_macs(
    model: nn.Module,
    groups: ChannelGroups,
    example_input: Tensor | Sequence[Tensor],
    keep_prob: Mapping[str, Float[Tensor, " width"]],
) -> Float64[Tensor, ""]:
    """Return the expected multiply-adds for channels kept independently; build a `MacsModel` to ask more than once.

    Parameters
    ----------
    model, groups, example_input : as for `MacsModel.build`
    keep_prob : as for `MacsModel.expected`
    """
    return MacsModel.build(model, groups, example_input).expected(keep_prob)


Uses = list[tuple[tuple[int, ...], ...]]
LAYERS = (*CONVS, nn.Linear, nn.MultiheadAttention, NarrowAttention)


def _uses(model: nn.Module, example_input: Tensor | Sequence[Tensor]) -> dict[str, tuple[nn.Module, Uses]]:
    """Note the shapes that enter and leave each layer, once for each of its calls, in eval mode and on a copy."""
    inputs = (example_input,) if isinstance(example_input, Tensor) else tuple(example_input)
    copied = copy.deepcopy(model).eval()
    found: dict[str, tuple[nn.Module, Uses]] = {}
    inner = {
        f"{name}.out_proj"
        for name, m in copied.named_modules()
        if isinstance(m, nn.MultiheadAttention | NarrowAttention)
    }

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = [*args, *kwargs.values()]
            shapes = [tuple(x.shape) for x in given if isinstance(x, Tensor)]
            out = output[0] if isinstance(output, tuple) else output
            found.setdefault(name, (module, []))[1].append((*shapes[:3], tuple(out.shape)))

        return hook

    for name, module in copied.named_modules():
        if isinstance(module, LAYERS) and name.removeprefix(".") not in inner:
            module.register_forward_hook(note(name), with_kwargs=True)
    with torch.no_grad():
        copied(*inputs)
    return found


def _weight(module: nn.Module) -> Tensor:
    return module.get_parameter("weight")


def _is_tied(module: nn.Module) -> bool:
    return isinstance(module, CONVS) and module.groups > 1


def _layer_macs(module: nn.Module, uses: Uses) -> int:
    if _is_tied(module):
        return sum(_positions(module, use) for use in uses) * _weight(module).numel()
    return sum(round(scale) * n * m for scale, (_, n), (_, m) in _dense_layers(module, uses))


def _positions(module: nn.Module, use: tuple[tuple[int, ...], ...]) -> int:
    """How often each weight is used in a call."""
    shape = use[0] if isinstance(module, TRANSPOSED) else use[-1]
    if isinstance(module, nn.Linear):
        return _product(shape[:-1])
    axis = len(shape) - 1 - len(module.kernel_size) if isinstance(module, CONVS) else 0
    return _product(shape[:axis] + shape[axis + 1 :])


def _dense_layers(module: nn.Module, uses: Uses) -> list[tuple[float, tuple[str, int], tuple[str, int]]]:
    """Positions times kernel, and the axes with their lengths, of each matrix product of a module."""
    match module:
        case nn.Linear():
            scale = sum(_positions(module, use) for use in uses)
            return [(scale, ("in", module.in_features), ("out", module.out_features))]
        case nn.Module() if isinstance(module, CONVS) and module.groups == 1:
            kernel = _product(module.kernel_size)
            scale = sum(_positions(module, use) for use in uses) * kernel
            return [(scale, ("in", module.in_channels), ("out", module.out_channels))]
        case nn.MultiheadAttention() | NarrowAttention():
            inner = module.num_heads * int(module.head_dim)
            whole = module.in_proj_weight is not None
            layers: list[tuple[float, tuple[str, int], tuple[str, int]]] = []
            for use in uses:
                for shape, axis in zip(use[:3], ("in", "in", "in") if whole else ("in", "key", "value"), strict=True):
                    layers.append((_product(shape[:-1]), (axis, shape[-1]), ("inner", inner)))
                layers.append((_product(use[-1][:-1]), ("inner", inner), ("out", use[-1][-1])))
            return layers
        case _:
            return []


def _product(numbers: Sequence[int]) -> int:
    total = 1
    for number in numbers:
        total *= number
    return total
