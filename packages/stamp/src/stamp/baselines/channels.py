"""What scorers share: the scores themselves, and sums over the weights that compute a channel (spec 3)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stamp.axes import axis_length, axis_places
from stamp.structure import ChannelGroups

__all__ = ["Scores", "channel_sums"]

Scores = dict[str, Tensor]


def channel_sums(model: nn.Module, groups: ChannelGroups, values: Mapping[str, Tensor]) -> Scores:
    """Sum values of weights over all the rows that compute each channel, those of every producer of its group.

    Parameters
    ----------
    model : from which the groups were traced
    groups : its channel groups
    values : shaped like the weights of `parameter_masks.layer_weights`, by their names; weights left out count nothing

    Returns
    -------
    ``(width,)`` sums of each group that is not frozen. The rows of an attention head are those of its queries, keys
    and values.
    """
    sums: Scores = {}
    for group in groups.prunable:
        total = next(iter(values.values()), torch.zeros(())).new_zeros(group.width)
        for slot in group.producers:
            module = model.get_submodule(slot.module)
            length = axis_length(module, slot.axis)
            for tensor, dim, repeats in axis_places(module, slot.axis):
                name = f"{slot.module}.{tensor}" if slot.module else tensor
                # An attention's heads are its inner axis, which its output projection reads.
                if name not in values or (slot.axis == "inner" and tensor == "out_proj.weight"):
                    continue
                entries = values[name].movedim(dim, 0).flatten(1).sum(1).unflatten(0, (repeats, length)).sum(0)
                own = entries[slot.offset : slot.offset + slot.count * slot.block].unflatten(
                    0, (slot.count, slot.block)
                )
                total[slot.start : slot.start + slot.count] += own.sum(1)
        sums[group.name] = total
    return sums
