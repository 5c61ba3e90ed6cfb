"""Torch-Pruning's importance scores for our channel groups: its formulas over our dependencies (spec 3).

Only its scores are taken. Groups, budget, surgery and fine-tuning are ours, so that a comparison is about scores.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from shared_core.errors import InputError, not_installed
from stamp.axes import BATCH, CONVS
from stamp.baselines.channels import Scores
from stamp.drawing import sampled_batches
from stamp.examples import Examples
from stamp.observing import evaluating
from stamp.structure import ChannelGroups, Group, Slot

__all__ = ["PeerError", "torch_pruning_magnitude", "torch_pruning_taylor"]


class PeerError(InputError):
    """A package that is compared to is not installed."""


def torch_pruning_magnitude(
    model: nn.Module,
    groups: ChannelGroups,
    data: Examples,  # noqa: ARG001
    generator: torch.Generator,  # noqa: ARG001
) -> Scores:
    """Return Torch-Pruning's `GroupMagnitudeImportance`, p = 2: squares, also of consumers' weights and norms' scales.

    Parameters
    ----------
    model : from which the groups were traced
    groups : its channel groups
    data, generator : not used

    Raises
    ------
    PeerError
        When Torch-Pruning is not installed.

    References
    ----------
    Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023; package torch-pruning 1.6.1.
    """
    peer = _peer()
    importance = peer.importance.GroupMagnitudeImportance(p=2, normalizer=None)
    return _scored(peer, importance, model, groups)


def torch_pruning_taylor(
    model: nn.Module,
    groups: ChannelGroups,
    data: Examples,
    generator: torch.Generator,
    *,
    batches: int = 10,
    batch_size: int = 64,
) -> Scores:
    """Return Torch-Pruning's `GroupTaylorImportance`: sums of ``|theta dL/dtheta|``, also of consumers' weights.

    Parameters
    ----------
    model : from which the groups were traced, with a head for the data's classes; it stays as it is
    groups : its channel groups
    data : labelled
    generator : draws the batches
    batches, batch_size : how much of the data the gradients are averaged over

    Raises
    ------
    PeerError
        When Torch-Pruning is not installed.
    """
    peer = _peer()
    importance = peer.importance.GroupTaylorImportance(normalizer=None)
    net = copy.deepcopy(model).requires_grad_()
    net.zero_grad()
    drawn = list(sampled_batches(net, data, generator, batches, batch_size))
    examples = sum(len(x) for x, _ in drawn)
    with torch.enable_grad(), evaluating(net):
        for x, y in drawn:
            (functional.cross_entropy(net(x), y, reduction="sum") / examples).backward()
    for parameter in net.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return _scored(peer, importance, net, groups)


def _peer() -> Any:
    try:
        return importlib.import_module("torch_pruning")
    except ImportError as error:
        missing = not_installed("method torch-pruning-...", "torch-pruning", "stamp[torch-pruning]")
        raise PeerError(str(missing)) from error


def _scored(peer: Any, importance: Any, model: nn.Module, groups: ChannelGroups) -> Scores:
    scores: Scores = {}
    for group in groups.prunable:
        found: Tensor | None = importance(_as_peer_group(peer, model, group))
        # One value an entry of the first place, of which the channels' come first.
        scores[group.name] = torch.zeros(group.width) if found is None else found.detach()[: group.width].cpu()
    return scores


def _as_peer_group(peer: Any, model: nn.Module, group: Group) -> Any:
    """Write a group as Torch-Pruning does: layers, which of their entries, and the channel of each entry."""
    made = peer.dependency.Group()
    places: dict[tuple[str, str, bool], list[Slot]] = {}
    for slots, consumes in ((group.producers, False), (group.consumers, True), (group.followers, False)):
        for slot in slots:
            places.setdefault((slot.module, slot.axis, consumes), []).append(slot)
    for (name, axis, consumes), slots in places.items():
        if axis.startswith(("dim", "rows")):
            continue
        owners = sorted(
            (slot.offset + k, slot.start + k // slot.block) for slot in slots for k in range(slot.count * slot.block)
        )
        for layer, function, starts in _layers(peer, model.get_submodule(name), axis, consumes):
            node = peer.dependency.Node(layer, None)
            entries = [start + at for start in starts for at, _ in owners]
            made.add_dep(peer.dependency.Dependency(function, function, node, node), entries)
            made[len(made) - 1].root_idxs = [channel for _, channel in owners] * len(starts)
    return made


def _layers(
    peer: Any, module: nn.Module, axis: str, consumes: bool
) -> Iterator[tuple[nn.Module, Any, tuple[int, ...]]]:
    """List the layers that an axis is to Torch-Pruning, its names for pruning it, and where the axis starts there."""
    once = (0,)
    linear = peer.prune_linear_out_channels if axis == "out" else peer.prune_linear_in_channels
    match module:
        case nn.Linear():
            yield module, linear, once
        case nn.Module() if isinstance(module, CONVS):
            if module.groups == 1:
                yield module, peer.prune_conv_out_channels if axis == "out" else peer.prune_conv_in_channels, once
        case nn.Module() if isinstance(module, BATCH):
            yield module, peer.prune_batchnorm_out_channels, once
        # An attention, of which Torch-Pruning scores nothing, is shown as the linear layers that it consists of.
        case nn.MultiheadAttention() if axis == "out" or (axis == "inner" and consumes):
            yield module.out_proj, linear, once
        case nn.MultiheadAttention():
            whole: Any = module.in_proj_weight
            inner = axis == "inner"
            function = peer.prune_linear_out_channels if inner else linear
            if whole is not None:
                yield _linear(whole), function, tuple(part * module.embed_dim for part in range(3)) if inner else once
            else:
                for part in "qkv" if inner else {"in": "q", "key": "k", "value": "v"}[axis]:
                    yield _linear(module.get_parameter(f"{part}_proj_weight")), function, once
        case _:
            pass


def _linear(weight: nn.Parameter) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = weight
    return layer
