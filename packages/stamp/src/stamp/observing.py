"""Observe what enters the consumers of each channel group, and gate it there, in one forward pass (spec 2.2, 2.4)."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from stamp.axes import CONVS, gate_places
from stamp.structure import ChannelGroups, Group, GroupsError, Slot
from stamp.surgery import KeepError

__all__ = ["Features", "Gate", "evaluating", "observe"]


@dataclass(frozen=True, eq=False)
class Features:
    """What enters the first consumer of a group, pooled over positions for each example and channel.

    Parameters
    ----------
    mean : of the activations
    std : their standard deviation over positions, 0 where there is one position
    nonzero : fraction of positions whose activation is not 0
    """

    mean: Float[Tensor, "n width"]
    std: Float[Tensor, "n width"]
    nonzero: Float[Tensor, "n width"]


Gate = Callable[[str, Features], Tensor | None]


def observe(
    model: nn.Module, groups: ChannelGroups, x: Tensor | Sequence[Tensor], *, gate: Gate | None = None
) -> dict[str, Features]:
    """Run the network once and pool what enters the consumers of every group that is not frozen.

    Parameters
    ----------
    model : run in eval mode, whatever its mode, which is restored; its parameters and statistics stay
    groups : its channel groups
    x : a batch whose first axis runs over examples, or the tensors of several inputs
    gate : called once for each group with its name and features, at the group's first consumer, in the order in which
        the network computes them; the gates ``(width,)`` that it returns multiply what enters every consumer of the
        group, so that the features of later groups show it; None leaves the group alone

    Returns
    -------
    The features of each group, in that same order; float32 at least, and differentiable where gradients are on.

    Raises
    ------
    KeepError
        For gates of a wrong width.
    GroupsError
        If no consumer of some group runs.

    Notes
    -----
    The channels of an attention are its heads: their activations are the values, which attention only averages. A
    consumer that takes part of a group's channels shows that part; the rest comes from the first consumer that takes it
    and is ungated where a gate is asked for before that consumer has run.

    Examples
    --------
    >>> from stamp.groups import trace
    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    >>> x = torch.rand(5, 3, 8, 8)
    >>> features = observe(net, trace(net, x), x)["0"]
    >>> torch.allclose(features.mean, net[:2](x).mean((2, 3)), atol=1e-6)
    True
    """
    inputs = (x,) if isinstance(x, Tensor) else tuple(x)
    divided = gate is not None and any(_is_divided(group) for group in groups.prunable)
    observer = _Observer(len(inputs[0]), gate, observe(model, groups, inputs) if divided else {})
    consumers: dict[str, dict[str, list[tuple[Group, Slot]]]] = {}
    for group in groups.prunable:
        for slot in group.consumers:
            if gate_places(model.get_submodule(slot.module), slot.axis):
                consumers.setdefault(slot.module, {}).setdefault(slot.axis, []).append((group, slot))
    with evaluating(model):
        hooks = [
            hook
            for name, axes in consumers.items()
            for hook in _attached(model.get_submodule(name), axes, observer.enter)
        ]
        try:
            model(*inputs)
        finally:
            for hook in hooks:
                hook.remove()
    missing = [group.name for group in groups.prunable if group.name not in observer.features]
    if missing:
        raise GroupsError(f"no consumer of the groups {missing} ran in a forward pass of the model")
    return observer.features


class _Observer:
    """The features and gates of the groups that have been met so far."""

    def __init__(self, examples: int, gate: Gate | None, ungated: Mapping[str, Features]) -> None:
        self.examples = examples
        self.gate = gate
        self.features: dict[str, Features] = dict(ungated)
        self.gates: dict[str, Tensor | None] = {}
        self._seen: dict[str, Tensor] = {}

    def enter(self, slots: list[tuple[Group, Slot]], x: Tensor, batch_axis: int) -> Tensor | None:
        """Note what enters a consumer, channels last, and return the gates of its entries, or None."""
        rows = _rows(x.movedim(batch_axis, 0) if x.dim() > 2 else x, self.examples)
        for group in dict.fromkeys(group for group, _ in slots):
            self._note(group, [(slot, _channels(rows, slot)) for owner, slot in slots if owner is group])
        vector: Tensor | None = None
        for group, slot in slots:
            gates = self.gates[group.name]
            if gates is not None:
                own = gates[slot.start : slot.start + slot.count].to(x).repeat_interleave(slot.block)
                place = torch.arange(slot.offset, slot.offset + len(own), device=x.device)
                vector = (x.new_ones(x.shape[-1]) if vector is None else vector).index_copy(0, place, own)
        return vector

    def _note(self, group: Group, pieces: list[tuple[Slot, Tensor]]) -> None:
        name = group.name
        seen = self._seen.get(name)
        if seen is None or not bool(seen.all()):
            found, shown = _pooled(pieces, group.width)
            known = self.features.get(name)
            old = shown.new_zeros(()) if seen is None else seen
            self.features[name] = found if known is None else _merged(known, found, shown & ~old)
            self._seen[name] = shown | old
        if name not in self.gates:
            gates = None if self.gate is None else self.gate(name, self.features[name])
            if gates is not None and gates.shape != (group.width,):
                raise KeepError(
                    f"gates of group {name!r} have shape {tuple(gates.shape)}; it has {group.width} channels"
                )
            self.gates[name] = gates


def _is_divided(group: Group) -> bool:
    """Whether some consumer takes a part of the group's channels only."""
    taken: dict[tuple[str, str], set[int]] = {}
    for slot in group.consumers:
        taken.setdefault((slot.module, slot.axis), set()).update(range(slot.start, slot.start + slot.count))
    return any(len(channels) < group.width for channels in taken.values())


def _rows(x: Float[Tensor, "..."], examples: int) -> Float[Tensor, "examples positions entries"]:
    """Give each example its row; windows of an example, which some networks move to the first axis, are positions."""
    if len(x) % examples:
        return x.reshape(1, -1, x.shape[-1]).expand(examples, -1, -1)
    return x.reshape(examples, -1, x.shape[-1])


def _channels(
    rows: Float[Tensor, "examples positions entries"], slot: Slot
) -> Float[Tensor, "examples channels values"]:
    own = rows[..., slot.offset : slot.offset + slot.count * slot.block].unflatten(-1, (slot.count, slot.block))
    return own.movedim(2, 1).flatten(2).to(torch.promote_types(rows.dtype, torch.float32))


def _pooled(pieces: list[tuple[Slot, Tensor]], width: int) -> tuple[Features, Bool[Tensor, " width"]]:
    """Pool over all that the slots hold of each channel, and say which channels they hold."""
    number = _summed(pieces, width, lambda values, _: torch.ones_like(values[0]))
    count = number.clamp_min(1)
    mean = _summed(pieces, width, lambda values, _: values) / count
    variance = _summed(pieces, width, lambda values, at: (values - mean[:, at, None]).square()) / count
    spread = variance > 0
    # The root of 0 has no finite gradient.
    std = torch.where(spread, variance, 1.0).sqrt() * spread
    nonzero = _summed(pieces, width, lambda values, _: (values != 0).to(values.dtype)) / count
    return Features(mean, std, nonzero), number > 0


def _summed(
    pieces: list[tuple[Slot, Tensor]], width: int, function: Callable[[Tensor, slice], Tensor]
) -> Float[Tensor, "*examples {width}"]:
    """Add up a function of the values of each channel over all slots that hold some of them."""
    parts = [
        functional.pad(
            function(values, slice(slot.start, slot.start + slot.count)).sum(-1),
            (slot.start, width - slot.start - slot.count),
        )
        for slot, values in pieces
    ]
    return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


def _merged(old: Features, new: Features, where: Bool[Tensor, " width"]) -> Features:
    return Features(
        torch.where(where, new.mean, old.mean),
        torch.where(where, new.std, old.std),
        torch.where(where, new.nonzero, old.nonzero),
    )


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """Put a network in eval mode for a while, and torch's attention on the path that calls every module.

    Parameters
    ----------
    model : whose modules get their own modes back at the end
    """
    modes = {module: module.training for module in model.modules()}
    shortcut = torch.backends.mha.get_fastpath_enabled()
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(shortcut)
        for module, training in modes.items():
            module.training = training


Enter = Callable[[list[tuple[Group, Slot]], Tensor, int], Tensor | None]
Slots = dict[str, list[tuple[Group, Slot]]]


def _attached(module: nn.Module, axes: Slots, enter: Enter) -> list[Any]:
    """Attach hooks to a consumer, and return the handles that remove them."""
    if isinstance(module, nn.MultiheadAttention):
        return _attached_to_attention(module, axes, enter)
    return [module.register_forward_pre_hook(partial(_entered, axes, enter), with_kwargs=True)]


def _entered(axes: Slots, enter: Enter, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Let a convolution or linear layer, about to run, meet its gates."""
    x: Tensor = args[0] if args else kwargs["input"]
    axis = x.dim() - 1 - (len(module.kernel_size) if isinstance(module, CONVS) else 0)
    gates = enter(axes["in"], x.movedim(axis, -1), 0)
    if gates is None:
        return None
    x = x * gates.view([-1 if k == axis else 1 for k in range(x.dim())])
    return ((x, *args[1:]), kwargs) if args else (args, kwargs | {"input": x})


def _attached_to_attention(module: nn.MultiheadAttention, axes: Slots, enter: Enter) -> list[Any]:
    whole: Any = module.in_proj_weight
    own = ("query",) if whole is None else ("query", "key", "value")
    parts = {"in": own, "key": ("key",), "value": ("value",)}

    def before(module: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given: dict[str, Any] = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        batch_axis = 0 if module.batch_first else 1
        for axis in ("in", "key", "value"):
            if axis in axes:
                gates = enter(axes[axis], given[parts[axis][0]], batch_axis)
                if gates is not None:
                    # One tensor for all the parts that were one: attention to itself is cheaper.
                    made = {id(given[part]): given[part] * gates for part in parts[axis]}
                    given |= {part: made[id(given[part])] for part in parts[axis]}
        if "inner" in axes:
            gates = enter(axes["inner"], _values(module, given["value"]), batch_axis)
            if gates is not None:
                # The functional form reads this weight past the module: an attribute shadows the parameter.
                vars(module.out_proj)["weight"] = module.out_proj.weight * gates
        return tuple(given[name] for name, _ in zip(("query", "key", "value"), args, strict=False)) + args[3:], {
            name: given[name] for name in kwargs
        }

    def after(module: nn.MultiheadAttention, *_: Any) -> None:
        vars(module.out_proj).pop("weight", None)

    return [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, always_call=True),
    ]


def _values(module: nn.MultiheadAttention, value: Tensor) -> Tensor:
    whole: Any = module.in_proj_weight
    biases: Any = module.in_proj_bias
    weight = module.v_proj_weight if whole is None else whole.chunk(3)[2]
    return functional.linear(value, weight, None if biases is None else biases.chunk(3)[2])
