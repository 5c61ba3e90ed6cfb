"""Independent pieces of work, such as one method with one seed, spread over processes here or over a Ray cluster."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from shared_core.errors import InputError

__all__ = ["Workers"]

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Workers:
    """Who works: processes of this machine, or of a Ray cluster.

    Parameters
    ----------
    count : pieces of work at a time, 1 or more; 0 is as many as there are cores, on Ray as many as the cluster takes
    ray : address of a cluster, such as ``ray://head:10001`` or ``auto``; ``local`` starts one here; None uses processes

    Raises
    ------
    InputError
        When ``count`` is below 0.

    Examples
    --------
    >>> sorted(Workers(2).each({"a": lambda: 1, "b": lambda: 2}))
    [('a', 1), ('b', 2)]
    """

    count: int = 1
    ray: str | None = None

    def __post_init__(self) -> None:
        """Check the count."""
        if self.count < 0:
            raise InputError(f"--workers must be 0 (all cores) or more, got {self.count}")

    @property
    def spreads(self) -> bool:
        """Whether work leaves this process at all."""
        return self.count != 1 or self.ray is not None

    def each(self, work: Mapping[str, Callable[[], _Value]]) -> Iterator[tuple[str, _Value]]:
        """Do pieces of work, and give each result as it comes, in no order.

        Functions travel by value, with what they refer to, so closures will do; what they change elsewhere than in
        their result is lost. An exception of one ends all.

        Parameters
        ----------
        work : functions without arguments, by key

        Raises
        ------
        InputError
            When Ray is asked for and not installed, or the cluster cannot be reached.
        """
        if not self.spreads:
            for key, function in work.items():
                yield key, function()
        elif self.ray is None:
            yield from self._processes(work)
        else:
            yield from self._cluster(self.ray, work)

    def _processes(self, work: Mapping[str, Callable[[], _Value]]) -> Iterator[tuple[str, _Value]]:
        from joblib import Parallel, delayed

        count = min(self.count or os.cpu_count() or 1, len(work))
        options: dict[str, Any] = {"backend": "loky", "return_as": "generator_unordered", "batch_size": 1}
        here = _Here(os.getpid(), str(Path.cwd()))
        with _starting():
            found: Any = Parallel(n_jobs=count, **options)(delayed(here.do)(*each) for each in work.items())
        try:
            yield from cast("Iterator[tuple[str, _Value]]", found)
        finally:
            # Left early, it ends the workers.
            found.close()

    def _cluster(self, address: str, work: Mapping[str, Callable[[], _Value]]) -> Iterator[tuple[str, _Value]]:
        with _connected(address, self.count) as ray:
            remote = ray.remote(num_cpus=1, max_retries=2)(_do)
            left = list(work.items())
            running: list[Any] = []
            while left or running:
                while left and (not self.count or len(running) < self.count):
                    running.append(remote.remote(*left.pop(0)))
                done, running = ray.wait(running)
                try:
                    found = ray.get(done)
                except Exception as error:
                    # What was raised there, without Ray's wrapping.
                    cause = getattr(error, "cause", None)
                    raise cause if isinstance(cause, Exception) else error from None
                yield from found


@dataclass(frozen=True)
class _Here:
    """Where work comes from: a worker may have been started long ago, from another folder."""

    process: int
    folder: str

    def do(self, key: str, function: Callable[[], _Value]) -> tuple[str, _Value]:
        if os.getpid() != self.process:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            with suppress(OSError):
                os.chdir(self.folder)
        return _do(key, function)


@contextmanager
def _starting() -> Generator[None]:
    """Let processes that start meanwhile not hear Ctrl-C, which a terminal sends to all: they are ended from here."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if heard is None else heard)


def _do(key: str, function: Callable[[], _Value]) -> tuple[str, _Value]:
    return key, function()


def _look(address: str) -> None:
    """See whether anybody listens there: Ray itself would try for minutes, and print each time."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"--ray {address}: cannot be reached ({error}); is the cluster up?") from error


@contextmanager
def _connected(address: str, count: int) -> Generator[Any]:
    try:
        import ray as library  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError("--ray needs Ray: pip install 'shared-core[ray]'") from error
    ray: Any = library
    if ray.is_initialized():
        yield ray
        return
    # Without this, Ray would make every worker an environment of its own where a tool such as uv started the program.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    _look(address)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "include_dashboard": False}
    if address == "local":
        options["num_cpus"] = count or os.cpu_count()
    else:
        options.pop("include_dashboard")
    try:
        ray.init(address=address, **options)
    except Exception as error:  # Ray has many ways to say that nobody is there
        said = " ".join(str(error).split())[:200]
        raise InputError(f"--ray {address}: cannot be reached ({said}); is the cluster up?") from error
    try:
        yield ray
    finally:
        ray.shutdown()
