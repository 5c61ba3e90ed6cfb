"""FedCurv: clients stay close to where others' tasks are learnt, by how much these depend on each weight.

Shoham et al., "Overcoming Forgetting in Federated Learning on Non-IID Data", 2019 (arXiv:1910.07796). With F_j the
diagonal Fisher information of client j where its last round ended, at theta_j, client i adds

    lambda sum_p (u_p theta_p^2 - 2 v_p theta_p),    u = sum_{j != i} F_j,    v = sum_{j != i} F_j theta_j

which is ``lambda sum_{j != i} sum_p F_j,p (theta_p - theta_j,p)^2`` less what does not depend on theta.

Messages are three bodies each way, in the first round too. The paper's server sends everyone the sums over all
clients, from which each subtracts its own; here the server subtracts, at the same traffic, as only it knows whether a
client's last update came.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fedapc import wire
from fedapc.baselines.coordinators import DenseServer, as_finite
from fedapc.baselines.strategy import Fisher, Strategy
from fedapc.messages import Message

__all__ = ["Curvature", "CurvatureServer"]

_EXTRAS = ("fisher", "weighted")


class Curvature(Strategy):
    """The client's side.

    Parameters
    ----------
    strength : lambda

    Examples
    --------
    >>> side = Curvature(strength=2.0)
    >>> side.begin_round({}, {"fisher": {"w": torch.tensor([3.0])}, "weighted": {"w": torch.tensor([6.0])}})
    >>> float(side.penalty({"w": torch.tensor([1.0])}))
    -18.0
    """

    name = "fedcurv"
    extras = _EXTRAS

    def __init__(self, strength: float) -> None:
        self.strength = strength
        self._others: Mapping[str, Mapping[str, Tensor]] = {extra: {} for extra in _EXTRAS}
        self._own: dict[str, dict[str, Tensor]] = {}

    def begin_round(self, body: Mapping[str, Tensor], extras: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take the sums over other clients."""
        del body
        self._others = extras

    def penalty(self, body: Mapping[str, Tensor]) -> Float[Tensor, ""] | None:
        """Return what is added to the loss; it may be negative, as a constant is left out."""
        if not self.strength:
            return None
        pairs = zip(self._others["fisher"].items(), self._others["weighted"].values(), strict=True)
        return (
            self.strength * torch.stack([(body[name] * (u * body[name] - 2 * v)).sum() for (name, u), v in pairs]).sum()
        )

    def end_round(self, body: Mapping[str, Tensor], fisher: Fisher) -> None:
        """Take the client's own curvature, on the task that runs."""
        found = fisher()
        self._own = {"fisher": found, "weighted": {name: value * body[name].detach() for name, value in found.items()}}

    def upload(self) -> dict[str, dict[str, Tensor]]:
        """Return the client's own curvature, and this times the body."""
        return self._own


class CurvatureServer(DenseServer):
    """The server's side: FedAvg, and sums of curvatures.

    Parameters
    ----------
    body, tasks, options : see `DenseServer`

    Examples
    --------
    >>> server = CurvatureServer({"w": torch.zeros(2)}, {"a": 1}, rounds=1)
    >>> list(server.base)
    ['w', 'fisher/w', 'weighted/w']
    """

    extras = _EXTRAS

    def __init__(self, body: Mapping[str, Tensor], tasks: Mapping[str, int], **options: Any) -> None:
        super().__init__(body, tasks, **options)
        self._totals: dict[str, Tensor] = {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state` returned.

        Raises
        ------
        InputError
            For the state of something else, or of a server of another method, other clients or layers.
        """
        super().load_state(state)
        self._sum()

    def _objection(self, message: Message) -> str:
        if why := super()._objection(message):
            return why
        negative = [name for name in self._body if bool((self._upload(message, f"fisher/{name}") < 0).any())]
        return f"negative curvature of {negative[0]}, which is a mean of squares" if negative else ""

    def _merge(self, updates: list[Message]) -> None:
        super()._merge(updates)
        self._sum()
        for name, total in self._totals.items():
            self.base[name] = as_finite(total, self.base[name])

    def _sum(self) -> None:
        self._totals = {
            name: torch.zeros_like(value, dtype=torch.float64)
            for name, value in self.base.items()
            if name not in self._body
        }
        for client in sorted(self._remembered):
            for name, value in self._remembered[client].items():
                self._totals[name] += value.double()

    def _outgoing(self, client: str) -> Mapping[str, bytes]:
        sent = dict(super()._outgoing(client))
        for name, own in self._remembered.get(client, {}).items():
            others = self._totals[name] - own.double()
            # What rounding leaves of a difference must not become a reward for moving away.
            others = others.clamp_min(0) if name.startswith("fisher/") else others
            sent[name] = wire.encode(as_finite(others, own))
        return sent
