"""A federation in one program: the same clients and server as over a network, with nothing between them but bytes."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch

from fedapc.errors import TrainingDivergedError
from fedapc.ledger import Ledger
from fedapc.roles import Coordinator, Participant
from shared_core.errors import InputError

__all__ = ["Channel", "Fleet", "LocalFleet", "ProcessFleet", "simulate"]

Request = Callable[[str], bytes]
# What of a client's answer arrives, of (client, round, answer): nothing, something else, several things.
Channel = Callable[[str, int, bytes], Iterable[bytes]]
_FAULTS = (InputError, TrainingDivergedError)
_Coordinator = TypeVar("_Coordinator", bound=Coordinator)


@runtime_checkable
class Fleet(Protocol):
    """Clients, wherever they are."""

    def answers(self, names: Sequence[str], request: Request) -> Iterator[tuple[str, bytes | Exception]]:
        """Answers of the clients named to the requests made for them, or why there is none, in their order."""
        ...


class LocalFleet:
    """Clients in this process.

    Parameters
    ----------
    clients : of different names
    workers : threads. More than one pays when the network is large enough for torch to compute without Python; a
        network that draws random numbers of its own, as dropout does, gets the same ones with one only

    Raises
    ------
    InputError
        For two clients of one name.
    """

    def __init__(self, clients: Iterable[Participant], workers: int = 1) -> None:
        self.clients: dict[str, Participant] = {}
        for client in clients:
            if client.name in self.clients:
                raise InputError(f"two clients are named '{client.name}'")
            self.clients[client.name] = client
        self._workers = workers

    def answers(self, names: Sequence[str], request: Request) -> Iterator[tuple[str, bytes | Exception]]:
        """Answers of the clients named to the requests made for them, or why there is none, in their order."""
        if self._workers <= 1:
            for name in names:
                yield name, _answer(self.clients[name], request(name))
            return
        with ThreadPoolExecutor(self._workers) as pool:
            running: deque[tuple[str, Future[bytes | Exception]]] = deque()
            for name in names:
                running.append((name, pool.submit(_answer, self.clients[name], request(name))))
                if len(running) > 2 * self._workers:
                    first, answer = running.popleft()
                    yield first, answer.result()
            for first, answer in running:
                yield first, answer.result()


class ProcessFleet:
    """Clients spread over worker processes, which build them: nothing but bytes and what is asked for comes back.

    Parameters
    ----------
    build : makes a client of its name; a function at the top level of a module, or a ``functools.partial`` of one
    names : of the clients
    workers : processes, of one torch thread each

    Examples
    --------
    >>> with ProcessFleet(build_site, ["a", "b"], workers=2) as fleet:  # doctest: +SKIP
    ...     simulate(fleet, server)
    ...     fleet.call("a", "accuracy", x, y, task=0)
    """

    def __init__(self, build: Callable[[str], Participant], names: Sequence[str], workers: int = 2) -> None:
        if workers < 1:
            raise InputError(f"workers: {workers}, expected at least 1")
        context = multiprocessing.get_context("spawn")
        self._home: dict[str, int] = {name: place % workers for place, name in enumerate(sorted(names))}
        self._pipes: list[Connection] = []
        self._workers: list[SpawnProcess] = []
        for worker in range(min(workers, len(self._home))):
            here, there = context.Pipe()
            mine = [name for name, home in self._home.items() if home == worker]
            process = context.Process(target=_serve, args=(there, build, mine), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._workers.append(process)

    def __enter__(self) -> ProcessFleet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the processes; what clients hold is lost, take their states before."""
        for pipe in self._pipes:
            pipe.close()
        for worker in self._workers:
            worker.join()
        self._pipes, self._workers = [], []

    def answers(self, names: Sequence[str], request: Request) -> Iterator[tuple[str, bytes | Exception]]:
        """Answers of the clients named to the requests made for them, or why there is none, in their order."""
        queues: dict[int, list[str]] = {}
        for name in names:
            queues.setdefault(self._home[name], []).append(name)
        # One request a process at a time: a pipe holds little, and two ends that both write wait for ever.
        for queue in queues.values():
            self._send(queue[0], "answer", request(queue[0]))
        early: dict[str, bytes | Exception] = {}
        for name in names:
            queue = queues[self._home[name]]
            while name not in early:
                first = queue.pop(0)
                early[first] = self._receive(first)
                if queue:
                    self._send(queue[0], "answer", request(queue[0]))
            yield name, early.pop(name)

    def call(self, name: str, method: str, *args: object, **options: object) -> Any:
        """Call a method of a client, such as ``accuracy``, ``state`` or ``load_state``, and return what it returns."""
        self._send(name, method, *args, **options)
        found = self._receive(name)
        if isinstance(found, Exception):
            raise found
        return found

    def _send(self, name: str, method: str, *args: object, **options: object) -> None:
        self._pipes[self._home[name]].send((name, method, args, options))

    def _receive(self, name: str) -> Any:
        try:
            failed, found = self._pipes[self._home[name]].recv()
        except EOFError as error:
            raise RuntimeError(f"the process of client '{name}' has ended") from error
        if failed and not isinstance(found, _FAULTS):
            raise found
        return found


def simulate(
    clients: Fleet | Iterable[Participant],
    server: _Coordinator,
    *,
    rounds: int | None = None,
    channel: Channel | None = None,
    after_round: Callable[[_Coordinator], None] | None = None,
) -> Ledger:
    """Run a federation to its end; the same seeds give the same bits.

    A request and an answer a worker are held at a time, and what the server keeps of a round: updates as they came.

    Parameters
    ----------
    clients : or a fleet of them
    server : at the beginning, or in the state of an earlier run
    rounds : to stop after. Default: at the end
    channel : that answers go through, to try faults; what comes late comes into the next round
    after_round : called when a round is closed, e.g. to evaluate or to save states

    Returns
    -------
    The server's ledger.
    """
    fleet = clients if isinstance(clients, Fleet) else LocalFleet(clients)
    left = rounds
    while not server.done and left != 0:
        now = server.round
        for name, answer in fleet.answers(server.missing(), server.request):
            if isinstance(answer, Exception):
                server.failed(name, str(answer))
                continue
            for blob in (answer,) if channel is None else channel(name, now, answer):
                server.receive(name, blob)
        server.close()
        if after_round is not None:
            after_round(server)
        left = None if left is None else left - 1
    return server.ledger


def _answer(client: Participant, request: bytes) -> bytes | Exception:
    try:
        return client.answer(request)
    except _FAULTS as error:
        return error


def _serve(pipe: Connection, build: Callable[[str], Participant], names: Sequence[str]) -> None:
    torch.set_num_threads(1)
    clients = {name: build(name) for name in names}
    while True:
        try:
            name, method, args, options = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((False, getattr(clients[name], method)(*args, **options)))
        except Exception as error:
            pipe.send((True, error))
