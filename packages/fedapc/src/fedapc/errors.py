"""What can be wrong with a module, a task, a message or a run."""

from __future__ import annotations

from shared_core.errors import InputError

__all__ = [
    "ModelMismatchError",
    "NonFiniteError",
    "ProtocolError",
    "SparsityWarning",
    "TaskError",
    "TrainingDivergedError",
    "WireError",
]


class WireError(InputError):
    """Bytes that are no message of this format; nothing of them may be used."""


class NonFiniteError(WireError):
    """A well-formed message whose numbers are NaN or infinite."""


class ModelMismatchError(InputError):
    """Tensors that belong to another architecture."""


class TaskError(InputError):
    """A task that cannot be learnt: empty, one class, labels out of range."""


class ProtocolError(InputError):
    """A well-formed message that does not belong here: another client's, another round's, a second one."""


class TrainingDivergedError(RuntimeError):
    """The loss of a client is not finite; its state is what it was before the round."""


class SparsityWarning(UserWarning):
    """Settings under which adaptive parts do not become sparse."""
