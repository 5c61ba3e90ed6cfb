"""What STAMP is held against: scores of channels, and two procedures of their own (spec 3).

A scorer takes a network, its channel groups, the new data and a generator, and returns a number a channel of every
group that is not frozen; channels of a higher one are kept. The network has a head for the data's classes, and stays as
it is. Scores are raw: who ranks them across groups normalises them, see `selection.normalised`. `meta_pruning` chooses
channels, and `edge_popup` single weights, by a search of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from stamp.baselines.activations import mean_activation, nonzero_fraction
from stamp.baselines.channels import Scores, channel_sums
from stamp.baselines.gates import bbdropout, free_gates
from stamp.baselines.magnitudes import bn_scale, l1_norm, l2_norm, random_scores
from stamp.baselines.peers import PeerError, torch_pruning_magnitude, torch_pruning_taylor
from stamp.baselines.sensitivity import grasp, snip, synflow, taylor
from stamp.examples import Examples
from stamp.metapruning import meta_pruning
from stamp.parameter_masks import edge_popup
from stamp.structure import ChannelGroups

__all__ = [
    "SCORERS",
    "PeerError",
    "Scorer",
    "Scores",
    "bbdropout",
    "bn_scale",
    "channel_sums",
    "edge_popup",
    "free_gates",
    "grasp",
    "l1_norm",
    "l2_norm",
    "mean_activation",
    "meta_pruning",
    "nonzero_fraction",
    "random_scores",
    "snip",
    "synflow",
    "taylor",
    "torch_pruning_magnitude",
    "torch_pruning_taylor",
]

Scorer = Callable[[nn.Module, ChannelGroups, Examples, torch.Generator], Scores]

SCORERS: dict[str, Scorer] = {
    "random": random_scores,
    "l1": l1_norm,
    "l2": l2_norm,
    "bn": bn_scale,
    "act": mean_activation,
    "apoz": nonzero_fraction,
    "snip": snip,
    "taylor": taylor,
    "grasp": grasp,
    "synflow": synflow,
    "bbdropout": bbdropout,
    "free": free_gates,
    "torch-pruning-magnitude": torch_pruning_magnitude,
    "torch-pruning-taylor": torch_pruning_taylor,
}
