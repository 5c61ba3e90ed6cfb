"""Random numbers that depend on what they are for, not on what was drawn before: a restart has nothing to restore."""

from __future__ import annotations

import hashlib

import torch

__all__ = ["derive", "generator"]


def derive(seed: int, *purpose: str | int) -> int:
    """Return a seed of 63 bits for a purpose.

    Examples
    --------
    >>> derive(0, "shuffle", "siteA", 3) == derive(0, "shuffle", "siteA", 3) != derive(0, "shuffle", "siteB", 3)
    True
    """
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """Return a generator for a purpose."""
    return torch.Generator().manual_seed(derive(seed, *purpose))
