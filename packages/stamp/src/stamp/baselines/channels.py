"""What scorers share: sums over the weights that compute a channel, and batches as a network takes them (spec 3)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from stamp.axes import CONVS, axis_length, axis_places
from stamp.examples import Examples
from stamp.structure import ChannelGroups

__all__ = ["channel_sums", "endless_batches", "layer_weights", "sampled_batches"]

Scores = dict[str, Tensor]


def layer_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weight matrices and kernels of convolutions, linear layers, embeddings and attentions.

    Parameters
    ----------
    model : its biases, norms and bare parameters are left out

    Examples
    --------
    >>> list(layer_weights(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))))
    ['0.weight']
    """
    layers = (*CONVS, nn.Linear, nn.Embedding, nn.MultiheadAttention)
    owners = {name for name, module in model.named_modules() if isinstance(module, layers)}
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and name.rpartition(".")[0] in owners
    }


def channel_sums(model: nn.Module, groups: ChannelGroups, values: Mapping[str, Tensor]) -> Scores:
    """Sum values of weights over all the rows that compute each channel, those of every producer of its group.

    Parameters
    ----------
    model : from which the groups were traced
    groups : its channel groups
    values : shaped like the weights of `layer_weights`, by their names; weights left out count nothing

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


def sampled_batches(
    model: nn.Module, data: Examples, generator: torch.Generator, batches: int, batch_size: int
) -> Iterator[tuple[Float[Tensor, "b ..."], Int64[Tensor, " b"]]]:
    """Iterate over examples at random, each at most once, in the model's type and on its device.

    Parameters
    ----------
    model : to be given the inputs
    data : the examples
    generator : draws their order
    batches : at most so many; fewer when the examples end
    batch_size : examples of each
    """
    like = next(model.parameters())
    for x, y in islice(data.batches(batch_size, generator=generator), batches):
        yield x.to(like), y.to(like.device)


def endless_batches(
    model: nn.Module, data: Examples, generator: torch.Generator, batch_size: int
) -> Iterator[tuple[Float[Tensor, "b ..."], Int64[Tensor, " b"]]]:
    """Iterate over shuffled epochs without end, in batches that are all of one size.

    Parameters
    ----------
    model, data, generator : as for `sampled_batches`
    batch_size : all examples if there are fewer
    """
    like = next(model.parameters())
    while True:
        for x, y in data.batches(min(batch_size, len(data)), generator=generator, drop_last=True):
            yield x.to(like), y.to(like.device)
