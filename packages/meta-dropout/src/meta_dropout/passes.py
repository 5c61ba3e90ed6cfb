"""What one forward pass is told besides its input: noise, values computed before, and statistics to use or to keep.

Layers read it from a context variable, so that a user's own module needs no extra arguments, and so that everything
that is batched over tasks comes in from outside of ``torch.func.vmap``.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from torch import Tensor

__all__ = ["Pass", "current", "running"]


@dataclass(frozen=True, eq=False)
class Pass:
    """One forward pass.

    Parameters
    ----------
    noise : standard normal draws by the name of the site; a site without one is not sampled
    means : generator outputs by the name of the site, where they are known already
    statistics : mean and variance by the name of the normalisation, to use instead of the batch's own
    record : where normalisations leave the batch's mean and variance; None to keep nothing
    shapes : where sites leave the shape of the noise that they would take; None to keep nothing
    inputs : where sites leave their input; None to keep nothing
    mix : by the name of the site, weights ``()`` and partners ``(n,)``: its input becomes ``w h + (1 - w) h[partner]``
    penalties : where sites leave what the inner loss is to pay for; None to keep nothing
    """

    noise: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    means: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    statistics: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict[str, tuple[Tensor, Tensor]])
    record: dict[str, tuple[Tensor, Tensor]] | None = None
    shapes: dict[str, tuple[int, ...]] | None = None
    inputs: dict[str, Tensor] | None = None
    mix: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict[str, tuple[Tensor, Tensor]])
    penalties: list[Tensor] | None = None


_NOTHING = Pass()
_CURRENT: ContextVar[Pass] = ContextVar("meta_dropout_pass", default=_NOTHING)


def current() -> Pass:
    """Return what the running forward pass was told."""
    return _CURRENT.get()


@contextmanager
def running(told: Pass) -> Generator[None]:
    """Tell every layer inside.

    Examples
    --------
    >>> with running(Pass(record={})):
    ...     current().record
    {}
    """
    token = _CURRENT.set(told)
    try:
        yield
    finally:
        _CURRENT.reset(token)
