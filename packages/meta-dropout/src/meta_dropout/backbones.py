"""The networks of the paper's experiments: four convolutional blocks, and a multilayer perceptron for regression."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from meta_dropout.layers import BatchShift
from shared_core.errors import InputError

__all__ = ["conv4", "initialise", "mlp"]

Norm = Literal["batch", "group", "none"]


def _norm(kind: Norm, channels: int) -> nn.Module:
    match kind:
        case "batch":
            return BatchShift(channels)
        case "group":
            return nn.GroupNorm(min(8, channels), channels)
        case _:
            return nn.Identity()


def conv4(
    *,
    ways: int,
    channels: int = 1,
    size: int = 28,
    filters: int = 64,
    blocks: int = 4,
    norm: Norm = "batch",
    seed: int = 0,
    init: Literal["tf", "kaiming"] = "tf",
) -> nn.Sequential:
    """Build ``blocks`` of 3x3 convolution, batch norm, ReLU and 2x2 pooling, and a linear head.

    Parameters
    ----------
    ways : classes of a task
    channels, size : of the images
    filters : of each block; 64 for Omniglot and 32 for mini-ImageNet in the paper's code
    blocks : how many; each halves the size, rounding down
    norm : ``batch`` by the batch's own statistics, ``group``, ``none``
    seed : of the initial weights
    init : ``tf``, truncated normal of standard deviation 0.02 as in the authors' code; ``kaiming``

    Raises
    ------
    InputError
        When the images are too small for so many blocks; the block is named.

    Examples
    --------
    >>> sum(p.numel() for p in conv4(ways=20).parameters())
    112980
    """
    layers: list[nn.Module] = []
    at, inputs = size, channels
    for block in range(blocks):
        if at < 2:
            raise InputError(
                f"size: images of {size} pixels are {at} before block {block + 1} of {blocks}, which halves them again;"
                f" use at least {1 << blocks} pixels or fewer blocks"
            )
        layers += [nn.Conv2d(inputs, filters, 3, padding=1), _norm(norm, filters), nn.ReLU(), nn.MaxPool2d(2)]
        at, inputs = at // 2, filters
    layers += [nn.Flatten(), nn.Linear(filters * at * at, ways)]
    net = nn.Sequential(*layers)
    initialise(net, seed=seed, init=init)
    return net


def mlp(
    *,
    inputs: int,
    outputs: int,
    hidden: Sequence[int] = (40, 40),
    seed: int = 0,
    init: Literal["tf", "kaiming"] = "kaiming",
) -> nn.Sequential:
    """Build linear layers with ReLU between them.

    Parameters
    ----------
    inputs, outputs : features in and out
    hidden : widths
    seed : of the initial weights
    init : see :func:`conv4`

    Examples
    --------
    >>> mlp(inputs=1, outputs=1)(torch.zeros(5, 1)).shape
    torch.Size([5, 1])
    """
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [nn.Linear(inputs, width), nn.ReLU()]
        inputs = width
    net = nn.Sequential(*layers, nn.Linear(inputs, outputs))
    initialise(net, seed=seed, init=init)
    return net


@torch.no_grad()
def initialise(net: nn.Module, *, seed: int, init: Literal["tf", "kaiming"] = "tf", std: float = 0.02) -> None:
    """Draw the weights of all convolutions and linear layers anew; biases become 0.

    Parameters
    ----------
    net : changed in place
    seed : of the draws
    init : ``tf``, normal of standard deviation `std`, truncated at two of them in convolutions; ``kaiming``, for ReLU
    std : see `init`
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in net.modules():
        if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Linear):
            continue
        fresh: Tensor = torch.empty(layer.weight.shape)
        if init == "kaiming":
            nn.init.kaiming_normal_(fresh, nonlinearity="relu", generator=generator)
        elif isinstance(layer, nn.Linear):
            nn.init.normal_(fresh, std=std, generator=generator)
        else:
            nn.init.trunc_normal_(fresh, std=std, a=-2 * std, b=2 * std, generator=generator)
        layer.weight.copy_(fresh)
        if layer.bias is not None:
            layer.bias.zero_()
