"""Small models whose weights are all at work, and contexts to show them."""

from __future__ import annotations

import hashlib

import torch

from ial_nap.nap import FeatureNAP

T, R = 4, 5
LENGTHS = torch.tensor([4, 2, 1, 3, 4, 4])


def shaken(model, seed=0, size=0.4):
    """A model whose every parameter differs from what it starts with, as after training."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=random).to(parameter))
    if hasattr(model, "refresh"):
        model.refresh()
    return model


def nap(outputs=1, kind="binary", seed=0, **options):
    options = {"hidden": 7, "latent": 3, **options}
    return shaken(FeatureNAP(T, R, outputs, kind, **options), seed)


def batch(seed=0, n=6):
    return torch.randn(n, T, R, generator=torch.Generator().manual_seed(seed))


def masks(k=3, seed=0):
    return torch.randint(-1, 2, (k, T, R), generator=torch.Generator().manual_seed(seed)).to(torch.int8)


def hash_of(model):
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        found.update(name.encode() + parameter.detach().numpy().tobytes())
    return found.hexdigest()
