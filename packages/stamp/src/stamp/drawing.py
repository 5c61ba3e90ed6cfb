"""Draw at random: batches in a network's type and on its device, some of them or without end; layers' weights."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.utils import skip_init

from stamp.examples import Examples

__all__ = ["drawn_linear", "endless_batches", "sampled_batches"]


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


def drawn_linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """Make a linear layer of uniform weights, as torch's own are distributed, without touching the global generator.

    Parameters
    ----------
    inputs, outputs : features
    generator : of the weights, then of the bias
    """
    layer = cast("nn.Linear", skip_init(nn.Linear, inputs, outputs))
    bound = inputs**-0.5
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-bound, bound, generator=generator)
    return layer
