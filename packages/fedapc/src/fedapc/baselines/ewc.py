"""Elastic weight consolidation: what past tasks depend on moves less.

Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017; the fading single penalty is
that of Schwarz et al., "Progress & Compress", ICML 2018.

The penalties of separate tasks are kept as one. With ``w_i`` the Fisher information of task i and ``a_i`` where its
training ended,

    sum_i w_i (theta - a_i)^2 = W (theta - m)^2 + sum_i w_i (a_i - m)^2,   W = sum_i w_i,   m = sum_i w_i a_i / W

exactly, and W, m and the last sum follow from those before and the new task, as a running variance does. So a step
costs the same after any number of tasks, and no difference of large numbers is formed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fedapc.baselines.strategy import Fisher, Strategy

__all__ = ["ElasticWeights"]

_KEPT = ("importance", "anchor", "spread")


class ElasticWeights(Strategy):
    """``strength / 2`` times the sum over past tasks of the Fisher information times squared distances (spec 3).

    Parameters
    ----------
    strength : lambda
    mode : ``separate``, a penalty a past task; ``online``, one whose Fisher information is `decay` times the old one
        plus that of the task that has ended, around where this one ended
    decay : gamma

    Examples
    --------
    >>> elastic = ElasticWeights(strength=2.0)
    >>> for end, fisher in ((0.0, 1.0), (3.0, 2.0)):
    ...     elastic.end_task({"w": torch.tensor([end])}, lambda f=fisher: {"w": torch.tensor([f])})
    >>> float(elastic.penalty({"w": torch.tensor([1.0])}))
    9.0
    """

    name = "ewc"

    def __init__(self, strength: float, mode: Literal["separate", "online"] = "separate", decay: float = 0.95) -> None:
        self.strength = strength
        self.mode = mode
        self.decay = decay
        # By what it is and the name of the weight: W and m of the docstring above, and the sum that moves nothing.
        self._kept: dict[str, dict[str, Tensor]] = {kind: {} for kind in _KEPT}

    def begin_round(self, body: Mapping[str, Tensor], extras: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Follow the body to where it is."""
        del extras
        self._follow(body)

    def penalty(self, body: Mapping[str, Tensor]) -> Float[Tensor, ""] | None:
        """Return what is added to the loss; nothing in the first task."""
        importance, anchor, spread = (self._kept[kind] for kind in _KEPT)
        if not importance or not self.strength:
            return None
        # In the order of the body, not that of a file: sums depend on their order.
        parts = [
            (importance[name] * (value - anchor[name]).square()).sum() + spread[name] for name, value in body.items()
        ]
        return 0.5 * self.strength * torch.stack(parts).sum()

    def end_task(self, body: Mapping[str, Tensor], fisher: Fisher) -> None:
        """Anchor the weights where they are, by how much the task that is over depends on them."""
        importance, anchor, spread = (self._kept[kind] for kind in _KEPT)
        self._follow(body)
        for name, new in fisher().items():
            end = body[name].detach().clone()
            old = importance.get(name)
            if old is None:
                importance[name], anchor[name], spread[name] = new, end, new.new_zeros(())
            elif self.mode == "online":
                importance[name], anchor[name] = self.decay * old + new, end
            else:
                total = old + new
                share = torch.where(total > 0, new / total, 0.0)
                away = end - anchor[name]
                importance[name], anchor[name] = total, anchor[name] + share * away
                spread[name] = spread[name] + (old * share * away.square()).sum()

    def state(self) -> dict[str, Tensor]:
        """Return copies of all that is remembered of past tasks."""
        return {f"{kind}/{name}": value.clone() for kind, kept in self._kept.items() for name, value in kept.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state` returned."""
        self._kept = {kind: {} for kind in _KEPT}
        for key, value in state.items():
            kind, _, name = key.partition("/")
            self._kept[kind][name] = value.clone()

    def _follow(self, body: Mapping[str, Tensor]) -> None:
        """Bring what was loaded from a file to the device of the body."""
        for kept in self._kept.values():
            kept.update({name: value.to(body[name]) for name, value in kept.items()})
