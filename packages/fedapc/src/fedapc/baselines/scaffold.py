"""SCAFFOLD: control variates against the drift of clients.

Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020, Algorithm 1 with
option II. Gradients of a client become ``g + (c - c_i)``; after K steps of learning rate eta from x to y

    c_i <- c_i - c + (x - y) / (K eta),    x <- x + eta_g mean_S (y - x),    c <- mean of all c_i

The last is what ``c <- c + |S| / N mean_S (c_i_new - c_i)`` keeps true from zeros on. The server remembers every
``c_i``, so that it stays true when an update is lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedapc.baselines.coordinators import DenseServer, as_finite, weighted_mean
from fedapc.baselines.strategy import Fisher, Strategy
from fedapc.messages import Message
from shared_core.errors import InputError

__all__ = ["ControlVariates", "ScaffoldServer"]


class ControlVariates(Strategy):
    """The client's side; it needs plain SGD. A learning rate that changes within a round counts as it was.

    Examples
    --------
    >>> side = ControlVariates()
    >>> weight = torch.tensor([1.0], requires_grad=True)
    >>> side.begin_round({"w": weight}, {"control": {"w": torch.tensor([0.5])}})
    >>> weight.grad = torch.tensor([2.0])
    >>> side.correct({"w": weight}, lr=0.1)
    >>> weight.grad
    tensor([2.5000])
    """

    name = "scaffold"
    extras = ("control",)

    def __init__(self) -> None:
        self._own: dict[str, Tensor] = {}
        self._mean: Mapping[str, Tensor] = {}
        self._begun: dict[str, Tensor] = {}
        self._way = 0.0

    def begin_round(self, body: Mapping[str, Tensor], extras: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take the mean control variate."""
        self._mean = extras["control"]
        self._begun = {name: value.detach().clone() for name, value in body.items()}
        self._own = {
            name: self._own[name].to(value) if name in self._own else torch.zeros_like(value)
            for name, value in self._begun.items()
        }
        self._way = 0.0

    def correct(self, body: Mapping[str, Tensor], lr: float) -> None:
        """Add the difference of the mean control variate and the client's own to the gradients."""
        self._way += lr
        for name, value in body.items():
            if value.grad is not None:
                value.grad += self._mean[name] - self._own[name]

    def end_round(self, body: Mapping[str, Tensor], fisher: Fisher) -> None:
        """Make the client's control variate the mean of the gradients that it met."""
        del fisher
        if not self._way:
            return
        for name, begun in self._begun.items():
            met = (begun - body[name].detach()) / self._way
            self._own[name] = self._own[name] - self._mean[name] + met

    def upload(self) -> dict[str, dict[str, Tensor]]:
        """Return the client's control variate."""
        return {"control": self._own}

    def state(self) -> dict[str, Tensor]:
        """Return a copy of the client's control variate."""
        return {name: value.clone() for name, value in self._own.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state` returned."""
        self._own = {name: value.clone() for name, value in state.items()}


class ScaffoldServer(DenseServer):
    """The server's side.

    Parameters
    ----------
    body, tasks, options : see `DenseServer`
    server_lr : eta_g

    Raises
    ------
    InputError
        For a `server_lr` that is not positive.

    Examples
    --------
    >>> server = ScaffoldServer({"w": torch.zeros(2)}, {"a": 1}, rounds=1)
    >>> list(server.base)
    ['w', 'control/w']
    """

    extras = ("control",)

    def __init__(
        self, body: Mapping[str, Tensor], tasks: Mapping[str, int], *, server_lr: float = 1.0, **options: Any
    ) -> None:
        if not 0 < server_lr < float("inf"):
            raise InputError(f"server_lr: {server_lr}, expected a positive number")
        super().__init__(body, tasks, **options)
        self._server_lr = server_lr

    def _merge(self, updates: list[Message]) -> None:
        self._remember(updates)
        for name in self._body:
            if updates:
                before = self.base[name]
                mean = weighted_mean(self._uploads(updates, name), [1] * len(updates))
                step = (1 - self._server_lr) * before.double() + self._server_lr * mean
                self.base[name] = as_finite(step, before)
            control = f"control/{name}"
            total = torch.zeros_like(self.base[control], dtype=torch.float64)
            for client in sorted(self._remembered):
                total += self._remembered[client][control].double()
            self.base[control] = as_finite(total / len(self.tasks), self.base[control])
