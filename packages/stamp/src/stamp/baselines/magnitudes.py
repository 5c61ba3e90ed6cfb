"""Scores that ask nothing of the data: random ones, weights, norms' scales (spec 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stamp.axes import NORMS
from stamp.baselines.channels import Scores, channel_sums
from stamp.examples import Examples
from stamp.parameter_masks import layer_weights
from stamp.structure import ChannelGroups, Group

__all__ = ["bn_scale", "l1_norm", "l2_norm", "random_scores"]


def random_scores(model: nn.Module, groups: ChannelGroups, data: Examples, generator: torch.Generator) -> Scores:  # noqa: ARG001
    """Draw a uniform number for each channel.

    Parameters
    ----------
    model, data : not used
    groups : channel groups
    generator : of the numbers
    """
    return {
        group.name: torch.rand(group.width, generator=generator, device=generator.device) for group in groups.prunable
    }


def l1_norm(model: nn.Module, groups: ChannelGroups, data: Examples, generator: torch.Generator) -> Scores:  # noqa: ARG001
    """Sum the absolute weights that compute each channel, without biases.

    Parameters
    ----------
    model : from which the groups were traced
    groups : its channel groups
    data, generator : not used

    References
    ----------
    Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017.

    Examples
    --------
    >>> from stamp.groups import trace
    >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2))
    >>> with torch.no_grad():
    ...     _ = net[0].weight.copy_(torch.tensor([[1.0, -2.0], [0.5, 0.0]]))
    >>> data = Examples(torch.rand(4, 2), torch.tensor([0, 1, 0, 1]), ("a", "b"))
    >>> l1_norm(net, trace(net, data.inputs()), data, torch.Generator())["0"]
    tensor([3.0000, 0.5000])
    """
    return channel_sums(model, groups, {name: w.detach().abs() for name, w in layer_weights(model).items()})


def l2_norm(model: nn.Module, groups: ChannelGroups, data: Examples, generator: torch.Generator) -> Scores:  # noqa: ARG001
    """Return the Euclidean norm of the weights that compute each channel, without biases.

    Parameters
    ----------
    model : from which the groups were traced
    groups : its channel groups
    data, generator : not used
    """
    squares = channel_sums(model, groups, {name: w.detach().square() for name, w in layer_weights(model).items()})
    return {name: total.sqrt() for name, total in squares.items()}


def bn_scale(model: nn.Module, groups: ChannelGroups, data: Examples, generator: torch.Generator) -> Scores:
    """Sum the absolute scales by which the norms of a group multiply each channel ("network slimming").

    Parameters
    ----------
    model : from which the groups were traced
    groups : its channel groups
    data, generator : not used

    Returns
    -------
    Scores; those of a group without a norm are its `l1_norm`.

    References
    ----------
    Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017.
    """
    scores = l1_norm(model, groups, data, generator)
    return {group.name: _scales(model, group, scores[group.name]) for group in groups.prunable}


def _scales(model: nn.Module, group: Group, otherwise: Tensor) -> Tensor:
    total = torch.zeros_like(otherwise)
    found = False
    for slot in group.followers:
        module = model.get_submodule(slot.module) if slot.axis == "norm" else None
        # A PReLU sits on the norms' axis, and its weight is a slope.
        if not isinstance(module, NORMS) or isinstance(module, nn.PReLU):
            continue
        weight: Any = module.weight
        if weight is not None:
            found = True
            own = weight.detach().abs()[slot.offset : slot.offset + slot.count * slot.block]
            total[slot.start : slot.start + slot.count] += own.unflatten(0, (slot.count, slot.block)).sum(1)
    return total if found else otherwise
