"""Remove channels physically, and the reference that only switches them off (spec 2.2, 2.11).

A gate acts on the input axis of the weights that consume its channels, never on activations: a removed channel then
contributes exactly nothing, whatever its norm would have made of a zero, and cutting it changes no output.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.func import functional_call

from shared_core.errors import no_such
from stamp.attention import NarrowAttention
from stamp.axes import axis_length, axis_places, gate_places, resize
from stamp.structure import ChannelGroups, Group, Slot

__all__ = ["KeepError", "Masked", "cut", "entry_gates", "gated_parameters", "masked", "restrict"]

Keep = Mapping[str, Bool[Tensor, " width"]]
Gates = Mapping[str, Float[Tensor, " width"]]


class KeepError(ValueError):
    """A choice of channels, or gates, that do not fit the groups."""


def cut(model: nn.Module, groups: ChannelGroups, keep: Keep, *, inplace: bool = False) -> nn.Module:
    """Remove channels: slice weights, biases, norms and running statistics, and update the modules' sizes.

    Parameters
    ----------
    model : from which the groups were traced
    groups : its channel groups
    keep : for each group to be cut, which of its channels stay; groups left out stay whole
    inplace : change the model itself; optimizers made before keep the old parameters

    Returns
    -------
    The small network: the same class, of fewer channels, whose outputs are those of `masked`. An attention that lost
    heads is a `NarrowAttention` in it.

    Raises
    ------
    KeepError
        For a group that does not exist or is frozen, masks of a wrong width or type, or a group left without a channel.

    Examples
    --------
    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    >>> at = Slot("0", "out", 0, 1, 0, 4), Slot("2", "in", 0, 1, 0, 4)
    >>> groups = ChannelGroups((Group("0", 4, (at[0],), (at[1],)),))
    >>> cut(net, groups, {"0": torch.tensor([True, False, True, False])})[0]
    Conv2d(3, 2, kernel_size=(3, 3), stride=(1, 1))
    """
    _check(groups, keep)
    kept = _kept_entries(model, groups, keep)
    with torch.no_grad():
        sliced = {name: _sliced(_find(model, name), indices) for name, indices in _tensor_indices(model, kept).items()}
    if inplace:
        for name, tensor in sliced.items():
            _replace(model, name, tensor)
    else:
        # What is cut is not copied first.
        model = copy.deepcopy(model, {id(_find(model, name)): tensor for name, tensor in sliced.items()})
    _count(model, groups, keep)
    for (module, axis), index in kept.items():
        if axis.startswith("dim"):
            continue
        target = model.get_submodule(module)
        if isinstance(target, nn.MultiheadAttention):
            target = NarrowAttention(target, target.num_heads)
            _replace(model, module, target)
        if isinstance(target, NarrowAttention):
            if axis == "inner":
                target.num_heads = len(index) // target.head_dim
        else:
            resize(target, axis, len(index))
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(isinstance(m, NarrowAttention) for m in module.modules()):
            module.use_nested_tensor = False
    return model


def gated_parameters(model: nn.Module, groups: ChannelGroups, gates: Gates) -> dict[str, Tensor]:
    """Multiply gates into the weights that consume their channels.

    Parameters
    ----------
    model : from which the groups were traced
    groups : its channel groups
    gates : one number a channel; a group left out is not gated

    Returns
    -------
    The consumers' weights by qualified name, differentiable in weights and gates, for `torch.func.functional_call`.

    Raises
    ------
    KeepError
        For a group that does not exist or is frozen, or gates of a wrong width.

    Notes
    -----
    ``conv(x * z, W) == conv(x, W * z[None, :, None, None])`` for a `z` that the whole batch shares: the price does not
    depend on the batch. Convolutions that tie their input to their output (depthwise ones) are not gated, so that each
    path passes its gate once.
    """
    for name, gate in gates.items():
        group = _group(groups, name)
        if gate.shape != (group.width,):
            raise KeepError(f"gates of group {name!r} have shape {tuple(gate.shape)}; it has {group.width} channels")
        if group.frozen is not None:
            raise KeepError(f"group {name!r} is frozen ({group.frozen}); leave it out of the gates")
    gated: dict[str, Tensor] = {}
    for (module, axis), slots in _axes(groups, gates, consumers=True).items():
        target = model.get_submodule(module)
        for place in gate_places(target, axis):
            name = f"{module}.{place.tensor}" if module else place.tensor
            weight = gated[name] if name in gated else model.get_parameter(name)
            vector = _spread(slots, gates, weight, weight.shape[place.dim])
            gated[name] = weight * vector.view([-1 if k == place.dim else 1 for k in range(weight.dim())])
    return gated


def entry_gates(model: nn.Module, groups: ChannelGroups, gates: Gates, module: str) -> Float[Tensor, " entries"]:
    """Lay gates out along the input of one layer, as its features meet them.

    Parameters
    ----------
    model : from which the groups were traced
    groups : its channel groups
    gates : one number a channel; a group left out is not gated
    module : qualified name of a linear layer or a convolution

    Returns
    -------
    A number for each entry that the layer takes; one where no gate acts.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
    >>> at = Slot("0", "out", 0, 1, 0, 2), Slot("2", "in", 0, 1, 0, 2)
    >>> groups = ChannelGroups((Group("0", 2, (at[0],), (at[1],)),))
    >>> entry_gates(net, groups, {"0": torch.tensor([0.0, 1.0])}, "2")
    tensor([0., 1.])
    """
    target = model.get_submodule(module)
    like = next(iter(gates.values())) if gates else torch.ones(())
    slots = _axes(groups, gates, consumers=True).get((module, "in"), [])
    return _spread(slots, gates, like, axis_length(target, "in"))


class Masked(nn.Module):
    """A network with gates on its channels, sharing its parameters.

    Parameters
    ----------
    model : from which the groups were traced
    groups : its channel groups
    gates : see `gated_parameters`; booleans count as 0 and 1
    """

    def __init__(self, model: nn.Module, groups: ChannelGroups, gates: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.model = model
        self.groups = groups
        self.gates = {name: _as_gate(gate, model) for name, gate in gates.items()}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network with its consumers' weights gated."""
        return functional_call(self.model, gated_parameters(self.model, self.groups, self.gates), args, kwargs)


def masked(model: nn.Module, groups: ChannelGroups, keep: Keep) -> Masked:
    """Switch channels off without removing them: the reference for `cut`.

    Parameters
    ----------
    model, groups, keep : as for `cut`

    Returns
    -------
    A module over the model's own parameters, of the same price as the model.

    Raises
    ------
    KeepError
        As `cut` does.
    """
    _check(groups, keep)
    return Masked(model, groups, keep)


def restrict(model: nn.Module, groups: ChannelGroups, keep: Keep, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Slice tensors that are named and shaped like the model's parameters or buffers, e.g. gradients, as `cut` would.

    Parameters
    ----------
    model, groups, keep : as for `cut`
    tensors : by qualified name

    Returns
    -------
    What survives, by the same names.

    Raises
    ------
    KeepError
        As `cut` does.
    """
    _check(groups, keep)
    sliced = dict(tensors)
    for name, indices in _tensor_indices(model, _kept_entries(model, groups, keep)).items():
        if name in sliced:
            for dim, index in indices:
                sliced[name] = sliced[name].index_select(dim, index.to(sliced[name].device))
    return sliced


def _group(groups: ChannelGroups, name: str) -> Group:
    if name not in groups:
        raise KeepError(str(no_such("group", name, [group.name for group in groups.prunable])))
    return groups[name]


def _check(groups: ChannelGroups, keep: Keep) -> None:
    for name, mask in keep.items():
        group = _group(groups, name)
        if mask.dtype != torch.bool or mask.shape != (group.width,):
            raise KeepError(
                f"keep[{name!r}] is a {str(mask.dtype).removeprefix('torch.')} tensor of shape {tuple(mask.shape)};"
                f" group {name!r} needs a bool tensor of its width, ({group.width},)"
            )
        if group.frozen is not None and not bool(mask.all()):
            raise KeepError(f"group {name!r} is frozen ({group.frozen}): keep all its channels, or leave it out")
        if not bool(mask.any()):
            least = max((slot.block for slot in group.producers), default=1)
            what = "a channel" if least == 1 else f"a channel ({least} entries of {group.producers[0].module!r})"
            raise KeepError(f"keep[{name!r}] keeps none of {group.width} channels; keep at least {what}")


def _axes(
    groups: ChannelGroups, names: Mapping[str, Tensor], *, consumers: bool = False
) -> dict[tuple[str, str], list[tuple[str, Slot]]]:
    """List the slots of the named groups by module and axis."""
    axes: dict[tuple[str, str], list[tuple[str, Slot]]] = {}
    for name in names:
        for slot in groups[name].consumers if consumers else dict.fromkeys(groups[name].slots):
            axes.setdefault((slot.module, slot.axis), []).append((name, slot))
    return axes


def _spread(slots: list[tuple[str, Slot]], values: Mapping[str, Tensor], like: Tensor, length: int) -> Tensor:
    """Lay the values of channels out along an axis; one where no group owns an entry."""
    pieces: list[Tensor] = []
    at = 0
    for name, slot in sorted(slots, key=lambda found: found[1].offset):
        pieces.append(like.new_ones(slot.offset - at))
        own = values[name][slot.start : slot.start + slot.count].to(like)
        pieces.append(own if slot.block == 1 else own.repeat_interleave(slot.block))
        at = slot.offset + slot.block * slot.count
    return torch.cat([*pieces, like.new_ones(length - at)])


def _kept_entries(model: nn.Module, groups: ChannelGroups, keep: Keep) -> dict[tuple[str, str], Int64[Tensor, " kept"]]:
    """List the entries of each axis that stay."""
    kept: dict[tuple[str, str], Tensor] = {}
    for (module, axis), slots in _axes(groups, keep).items():
        if axis.startswith("rows"):
            continue
        if axis.startswith("dim"):
            length = _find(model, module).shape[int(axis[3:])]
        else:
            length = axis_length(model.get_submodule(module), axis)
        kept[module, axis] = _spread(slots, keep, torch.ones(()), length).nonzero().flatten()
    return kept


def _tensor_indices(
    model: nn.Module, kept: Mapping[tuple[str, str], Tensor]
) -> dict[str, list[tuple[int, Int64[Tensor, " kept"]]]]:
    """List the slices of each tensor, by its qualified name."""
    indices: dict[str, list[tuple[int, Tensor]]] = {}
    for (module, axis), index in kept.items():
        if axis.startswith("dim"):
            indices.setdefault(module, []).append((int(axis[3:]), index))
            continue
        target = model.get_submodule(module)
        for tensor, dim, repeats in axis_places(target, axis):
            name = f"{module}.{tensor}" if module else tensor
            length = axis_length(target, axis)
            whole = torch.cat([index + k * length for k in range(repeats)])
            indices.setdefault(name, []).append((dim, whole))
    return indices


def _find(model: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(owner), leaf)


def _sliced(old: Tensor, indices: list[tuple[int, Tensor]]) -> Tensor:
    new = old.detach()
    for dim, index in indices:
        new = new.index_select(dim, index.to(new.device))
    return nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new


def _replace(model: nn.Module, name: str, value: nn.Module | Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, value)


def _count(model: nn.Module, groups: ChannelGroups, keep: Keep) -> None:
    for name, module, attribute, unit in _attributes(groups, keep):
        setattr(model.get_submodule(module), attribute, unit * int(keep[name].sum()))


def _attributes(groups: ChannelGroups, keep: Keep) -> Iterator[tuple[str, str, str, int]]:
    for name in keep:
        for attribute in groups[name].attributes:
            yield name, attribute.module, attribute.name, attribute.unit


def _as_gate(gate: Tensor, model: nn.Module) -> Tensor:
    if gate.dtype != torch.bool:
        return gate
    like = next((tensor for tensor in model.parameters() if tensor.is_floating_point()), torch.ones(()))
    return gate.to(like)
