"""Scores of what channels carry when the network sees the new data, labels unseen (spec 3)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from stamp.baselines.channels import Scores
from stamp.drawing import sampled_batches
from stamp.examples import Examples
from stamp.observing import Features, observe
from stamp.structure import ChannelGroups

__all__ = ["mean_activation", "nonzero_fraction"]


def mean_activation(
    model: nn.Module,
    groups: ChannelGroups,
    data: Examples,
    generator: torch.Generator,
    *,
    batches: int = 20,
    batch_size: int = 64,
) -> Scores:
    """Average over examples the pooled activation that enters each group's first consumer.

    Parameters
    ----------
    model : from which the groups were traced
    groups : its channel groups
    data : to observe
    generator : draws the batches
    batches, batch_size : how much of the data to observe

    Returns
    -------
    Scores; an activation that may be negative counts by its absolute value, after pooling.
    """
    return _averaged(
        model, groups, data, generator, lambda features: features.mean.abs(), batches=batches, batch_size=batch_size
    )


def nonzero_fraction(
    model: nn.Module,
    groups: ChannelGroups,
    data: Examples,
    generator: torch.Generator,
    *,
    batches: int = 20,
    batch_size: int = 64,
) -> Scores:
    """Return how often what enters each group's first consumer is not zero: one minus the APoZ.

    Parameters
    ----------
    model, groups, data, generator, batches, batch_size : as for `mean_activation`

    Returns
    -------
    Scores in [0, 1]; all 1 after an activation that is never exactly zero, such as GELU.

    References
    ----------
    Hu et al., "Network Trimming: A Data-Driven Neuron Pruning Approach towards Efficient Deep Architectures", 2016.
    """
    return _averaged(
        model, groups, data, generator, lambda features: features.nonzero, batches=batches, batch_size=batch_size
    )


def _averaged(
    model: nn.Module,
    groups: ChannelGroups,
    data: Examples,
    generator: torch.Generator,
    statistic: Callable[[Features], Tensor],
    *,
    batches: int,
    batch_size: int,
) -> Scores:
    totals: Scores = {}
    examples = 0
    with torch.no_grad():
        for x, _ in sampled_batches(model, data, generator, batches, batch_size):
            examples += len(x)
            for name, features in observe(model, groups, x).items():
                totals[name] = totals.get(name, torch.zeros(())) + statistic(features).sum(0).cpu()
    return {group.name: totals[group.name] / examples for group in groups.prunable}
