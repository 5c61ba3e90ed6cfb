"""Two data sets, and a network of which it is known which channels are for which of them."""

from __future__ import annotations

import copy
import functools
import itertools
import warnings

import torch
from torch import nn
from torch.nn import functional

from stamp.examples import Examples
from stamp.generator import MaskGenerator
from stamp.groups import trace
from stamp.meta import MetaConfig, MetaTrainer

WAYS = (2, 4)


@functools.cache
def two_worlds(width=8, seed=0):
    """Half of the channels of each layer, in a random order, are for the first half of the inputs, the others for the
    others, and each data set has one half of the inputs; its classes come after those of the other in the head."""
    generator = torch.Generator().manual_seed(seed)
    owners = [torch.randperm(2 * width, generator=generator) // width for _ in range(2)]
    sources = [torch.arange(12) // 6, *owners]
    with torch.random.fork_rng():
        net = nn.Sequential(nn.Linear(12, 2 * width), nn.ReLU(), nn.Linear(2 * width, 2 * width), nn.ReLU(),
                            nn.Linear(2 * width, 8)).requires_grad_(requires_grad=False)  # fmt: skip
    for layer, (before, after) in zip((net[0], net[2]), itertools.pairwise(sources), strict=True):
        layer.weight.normal_(0.0, (4 / len(before)) ** 0.5, generator=generator)
        layer.weight.mul_(after[:, None] == before[None, :])
        layer.bias.normal_(0.0, 0.1, generator=generator)
    data = []
    for world in range(2):
        centres = 1.5 * torch.randn(4, 6, generator=generator)
        y = torch.arange(240) % 4
        x = torch.zeros(240, 12)
        x[:, 6 * world : 6 * world + 6] = centres[y] + 0.6 * torch.randn(240, 6, generator=generator)
        data.append(Examples(x, y, tuple("abcd"), f"world {world}"))
    features = torch.cat([net[:4](d.x) for d in data])
    target = functional.one_hot(torch.cat([data[0].y, data[1].y + 4])).float()
    gram = features.T @ features + 0.5 * torch.eye(2 * width)
    net[4].weight.copy_(10 * torch.linalg.solve(gram, features.T @ target).T)
    net[4].bias.zero_()
    net = net.requires_grad_().eval()
    return net, trace(net, data[0].x[:2]), data, owners


@functools.cache
def _trained(head="channel", seed=0):
    net, groups, data, _ = two_worlds(seed=seed)
    generator = MaskGenerator(groups, head=head, seed=seed)
    config = MetaConfig(iters=40, tasks=2, ways=WAYS, inner="slice", seed=seed)
    trainer = MetaTrainer(net, generator, data, config=config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        history = trainer.fit()
    return generator, history, [str(warning.message) for warning in caught]


def trained(head="channel", seed=0):
    """A generator trained for the network on both data sets, its history, and what was warned of."""
    generator, history, caught = _trained(head, seed)
    return copy.deepcopy(generator), history, caught


def dead(groups):
    """A generator whose network says nothing, and never will: only the channels' own logits can learn."""
    generator = MaskGenerator(groups)
    with torch.no_grad():
        for layer in (generator.head.first, generator.head.second):
            for parameter in layer.parameters():
                parameter.zero_().requires_grad_(requires_grad=False)
    return generator
