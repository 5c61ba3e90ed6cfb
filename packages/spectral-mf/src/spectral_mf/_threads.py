"""Loops of many small NumPy steps keep to one thread: more would wait for each other, up to a hundred times as long."""

from __future__ import annotations

import functools
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from threadpoolctl import ThreadpoolController

from shared_core.device import one_thread as one_torch_thread

__all__ = ["one_blas_thread", "one_thread"]


@functools.cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()


def one_blas_thread() -> AbstractContextManager[object]:
    """Limit NumPy's linear algebra to one thread inside the context.

    Examples
    --------
    >>> with one_blas_thread():
    ...     pass
    """
    return _controller().limit(limits=1, user_api="blas")


@contextmanager
def one_thread(enabled: bool = True) -> Generator[None]:
    """Limit torch and NumPy to one thread inside the context, for models too small to share.

    Parameters
    ----------
    enabled : False changes nothing

    Examples
    --------
    >>> import torch
    >>> with one_thread():
    ...     torch.get_num_threads()
    1
    """
    with one_torch_thread(enabled), one_blas_thread() if enabled else nullcontext():
        yield
