"""What engines ask of the two sides of a federation, whatever method they follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn

from fedapc.ledger import Ledger
from fedapc.states import State
from fedapc.tasks import Task

__all__ = ["Coordinator", "Participant"]


@runtime_checkable
class Participant(Protocol):
    """A client, see `fedapc.Client` for what its members do.

    Examples
    --------
    >>> from fedapc.client import Client
    >>> net = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> isinstance(Client("a", net, []), Participant)
    True
    """

    @property
    def name(self) -> str:
        """That the server knows it by."""
        ...

    @property
    def tasks(self) -> Sequence[Task]:
        """Its own tasks, in their order."""
        ...

    def answer(self, request: bytes) -> bytes:
        """Do a round of training; the same request again gets the same answer again."""
        ...

    def predict(
        self, x: Shaped[Tensor, "batch ..."], task: int, batch_size: int = 1000
    ) -> Float[Tensor, "batch classes"]:
        """Return logits of a task that was begun."""
        ...

    def accuracy(self, x: Shaped[Tensor, "batch ..."], y: Int64[Tensor, " batch"], task: int) -> float:
        """Share of examples whose class has the greatest logit."""
        ...

    def evaluate(self) -> list[float]:
        """Return the accuracy on the test examples of every task, NaN where there is none."""
        ...

    def about(self, task: int) -> dict[str, Any]:
        """Tell what there is to know of a task that was begun."""
        ...

    def export(self, task: int) -> nn.Module:
        """Return a plain network with the weights of a task."""
        ...

    def state(self) -> State:
        """Return all that a restart needs but the tasks."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state` returned."""
        ...


@runtime_checkable
class Coordinator(Protocol):
    """A server, see `fedapc.Server` for what its members do.

    Examples
    --------
    >>> import torch
    >>> from fedapc.server import Server
    >>> isinstance(Server({"0.weight": torch.zeros(4, 8)}, {"a": 1}), Coordinator)
    True
    """

    @property
    def tasks(self) -> Mapping[str, int]:
        """How many tasks each client has."""
        ...

    @property
    def rounds(self) -> int:
        """Rounds of every task."""
        ...

    @property
    def round(self) -> int:
        """Rounds that are over."""
        ...

    @property
    def task(self) -> int:
        """Index of the task that runs."""
        ...

    @property
    def done(self) -> bool:
        """Tell whether all rounds are over."""
        ...

    @property
    def ledger(self) -> Ledger:
        """All that was sent, and all that went wrong."""
        ...

    def selected(self) -> list[str]:
        """Clients of this round, in their order."""
        ...

    def missing(self) -> list[str]:
        """Clients of this round whose update has not come."""
        ...

    def request(self, client: str) -> bytes:
        """Open the round, or go on with it: the request to one of its clients."""
        ...

    def receive(self, sender: str, blob: bytes) -> bool:
        """Take what came from a client, and tell whether it will be used."""
        ...

    def failed(self, client: str, note: str) -> None:
        """Write down that a client could not do its round."""
        ...

    def close(self) -> list[str]:
        """End the round; return the clients whose updates were used."""
        ...

    def state(self) -> State:
        """Return all that a restart needs, in the middle of a round too."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state` returned."""
        ...
