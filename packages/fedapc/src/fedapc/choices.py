"""What settings can be, by name; of no cost to import."""

from __future__ import annotations

import re
from typing import Literal

from shared_core.errors import InputError

__all__ = ["AdaptiveInit", "AttentionInit", "Norm", "Retroactive", "Score", "Start", "Transfer", "sampled_parts"]

Transfer = Literal["learned", "mean", "none"]
AdaptiveInit = Literal["scaled", "zeros"]
AttentionInit = Literal["probe", "scaled", "zeros"]
Norm = Literal["refuse", "per-task", "frozen"]
# Where weights begin: drawn, or those of the network given.
Start = Literal["fan-in", "module"]
Retroactive = Literal["shared", "joint", "none"]
Score = Literal["gated-norm", "abs-raw-mask"]


def sampled_parts(policy: str) -> int | None:
    """Return K of a knowledge policy ``sample:K``, none of the others.

    Raises
    ------
    InputError
        For another policy than ``last``, ``last+self``, ``all``, ``none`` and ``sample:K``.

    Examples
    --------
    >>> sampled_parts("sample:5"), sampled_parts("all")
    (5, None)
    """
    sample = re.fullmatch(r"sample:([1-9]\d{0,8})", policy)
    if policy not in {"last", "last+self", "all", "none"} and not sample:
        raise InputError(f"kb_policy: '{policy}'; choose last, last+self, all, none or sample:K, e.g. sample:5")
    return int(sample[1]) if sample else None
