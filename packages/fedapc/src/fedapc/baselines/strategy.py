"""What a method adds to training by stochastic gradients, as an object beside the client."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

__all__ = ["Fisher", "Strategy"]

Fisher = Callable[[], dict[str, Tensor]]


class Strategy:
    """What a method adds to training by stochastic gradients; here, nothing.

    A strategy holds what it has to remember, and hands it out as flat tensors, so that a client can be taken up after
    any round. `extras` are the names of further tensors, in the shapes of the body, that go up and down beside it.
    """

    name: ClassVar[str] = "plain"
    extras: ClassVar[tuple[str, ...]] = ()

    def begin_round(self, body: Mapping[str, Tensor], extras: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take what the server sent: the body is loaded, `extras` are by their names."""

    def penalty(self, body: Mapping[str, Tensor]) -> Float[Tensor, ""] | None:
        """Return what is added to the loss of a batch, if anything."""
        del body
        return None

    def correct(self, body: Mapping[str, Tensor], lr: float) -> None:
        """Change the gradients of the body before a step of this learning rate."""

    def end_round(self, body: Mapping[str, Tensor], fisher: Fisher) -> None:
        """See the body after the round, and the curvature on the task that runs, if it is asked for."""

    def end_task(self, body: Mapping[str, Tensor], fisher: Fisher) -> None:
        """See the body before the next task's is loaded, and the curvature on the task that is over."""

    def upload(self) -> dict[str, dict[str, Tensor]]:
        """Return the extras of the round."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """Return copies of all that has to be remembered between rounds."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state` returned."""
