"""Servers of the methods that FedAPC is held against: all that comes is checked and counted as FedAPC's server does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from fedapc import wire
from fedapc.ledger import Direction
from fedapc.messages import Message
from fedapc.server import Server
from fedapc.states import State

__all__ = ["DenseServer", "LocalServer", "as_finite", "weighted_mean"]


def weighted_mean(values: Iterable[Float[Tensor, "*shape"]], weights: Sequence[int]) -> Float64[Tensor, "*shape"]:
    """Average in float64, in the order given.

    Examples
    --------
    >>> weighted_mean([torch.tensor([0.0]), torch.tensor([4.0])], [3, 1])
    tensor([1.], dtype=torch.float64)
    """
    total: Tensor | float = 0.0
    for value, weight in zip(values, weights, strict=True):
        total = total + weight * value.double()
    return torch.as_tensor(total) / sum(weights)


def as_finite(value: Float64[Tensor, "*shape"], like: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Give a result the type it is sent in; what that cannot hold becomes the greatest number it can.

    Clients refuse infinities, so that a round with absurd updates would be the last one.
    """
    largest = torch.finfo(like.dtype).max
    return value.clamp(-largest, largest).to(like)


class DenseServer(Server):
    """Federated averaging: a body in full, both ways, averaged by the number of examples.

    McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017.

    Parameters
    ----------
    body : by name, what clients begin with
    tasks, rounds, fraction, seed, ledger : see `fedapc.Server`

    Examples
    --------
    >>> server = DenseServer({"0.weight": torch.zeros(4, 8)}, {"a": 1}, rounds=1)
    >>> len(server.request("a")), server.ledger.total("values", direction="down")
    (208, 32)
    """

    extras: ClassVar[tuple[str, ...]] = ()
    """Further tensors in the shapes of the body, which go both ways; what clients sent last of them is remembered."""

    def __init__(self, body: Mapping[str, Float[Tensor, "rows ..."]], tasks: Mapping[str, int], **options: Any) -> None:
        further = {f"{extra}/{name}": torch.zeros_like(value) for extra in self.extras for name, value in body.items()}
        super().__init__({**body, **further}, tasks, kb_policy="none", **options)
        self._body = tuple(body)
        self._places = {name: place for place, name in enumerate(self.base)}
        self._remembered: dict[str, dict[str, Tensor]] = {}

    def state(self) -> State:
        """Return all that a restart needs, in the middle of a round too."""
        found = super().state()
        for client, kept in self._remembered.items():
            found.update({f"remembered/{client}/{name}": value.clone() for name, value in kept.items()})
        return found

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state` returned.

        Raises
        ------
        InputError
            For the state of something else, or of a server of another method, other clients or layers.
        """
        super().load_state(state)
        names = [name for name in self.base if name not in self._body]
        self._remembered = {
            client: {name: state[f"remembered/{client}/{name}"].clone() for name in names}
            for client in self.tasks
            if names and f"remembered/{client}/{names[0]}" in state
        }

    def _objection(self, message: Message) -> str:
        sent, expected = _numbers(message), sum(value.numel() for value in self.base.values())
        if sent != expected:
            return f"{sent} numbers of {expected}; this method sends all"
        return "" if message.examples else "an update from no examples has no weight"

    def _merge(self, updates: list[Message]) -> None:
        self._remember(updates)
        if not updates:
            return
        for name in self._body:
            mean = weighted_mean(self._uploads(updates, name), [message.examples for message in updates])
            self.base[name] = as_finite(mean, self.base[name])

    def _uploads(self, updates: Iterable[Message], name: str) -> Iterable[Tensor]:
        for message in updates:
            yield self._upload(message, name)

    def _upload(self, message: Message, name: str) -> Tensor:
        blob = message.of_kind("base")[0].tensors[self._places[name]]
        return wire.decode(blob, limit=wire.MOST_ELEMENTS).by_rows()[1].to(self.base[name])

    def _remember(self, updates: Iterable[Message]) -> None:
        names = [name for name in self.base if name not in self._body]
        for message in updates if names else ():
            self._remembered[message.client] = {name: self._upload(message, name) for name in names}


class LocalServer(Server):
    """Rounds for clients that learn alone: a body to begin with, then nothing; nothing that is sent is written down.

    What does go wrong is written down, e.g. a loss that is not finite.

    Parameters
    ----------
    body : by name, what clients begin with
    tasks, rounds, fraction, seed, ledger : see `fedapc.Server`
    afresh : clients begin with it in every task

    Examples
    --------
    >>> server = LocalServer({"0.weight": torch.zeros(4, 8)}, {"a": 1}, rounds=1)
    >>> len(server.request("a")), len(server.ledger)
    (208, 0)
    """

    def __init__(
        self,
        body: Mapping[str, Float[Tensor, "rows ..."]],
        tasks: Mapping[str, int],
        *,
        afresh: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(body, tasks, kb_policy="none", **options)
        self._afresh = afresh

    def _outgoing(self, client: str) -> Mapping[str, bytes]:
        heard = self._heard[client]
        begins = self.task not in heard if self._afresh else not heard
        if begins not in self._encoded:
            self._encoded[begins] = {
                name: wire.encode(value, rows=torch.full((len(value),), begins)) for name, value in self.base.items()
            }
        return self._encoded[begins]

    def _objection(self, message: Message) -> str:
        sent = _numbers(message)
        return f"{sent} numbers, and clients of this method send none" if sent else ""

    def _merge(self, updates: list[Message]) -> None:
        """Leave the body as it is."""

    def _write_down(self, message: Message, length: int, direction: Direction) -> None:
        """Write nothing down: a message within a client is no traffic."""


def _numbers(message: Message) -> int:
    return sum(wire.contents(section.tensors)[0] for section in message.sections)
