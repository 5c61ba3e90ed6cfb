"""The server's side of a federation on Flower: bytes out, bytes in, and rounds that go on whatever nodes do."""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedapc.errors import ProtocolError, WireError
from fedapc.flower._flwr import (
    ArrayRecord,
    ConfigRecord,
    ErrorCode,
    Grid,
    Message,
    MessageType,
    Metadata,
    MetricRecord,
    RecordDict,
    Result,
    Strategy,
)
from fedapc.flower._kept import locked, read_state, write_state
from fedapc.flower._records import about_of, blob_of, holding, numbers_of, wire_bytes
from fedapc.ledger import Direction, Entry, Event
from fedapc.messages import MOST_NAME
from fedapc.server import Server
from fedapc.states import bytes_of, tensor_of
from shared_core.errors import InputError

__all__ = ["Evaluate", "FedAPCStrategy"]

Evaluate = Literal["task", "round", "never"]
_What = Literal["query", "train", "evaluate"]

_FILE, _BESIDE = "server.safetensors", "flower.json"
_CHEAP = 16 * 2**20
_MOST_LOST = 5
_MOST_NOTE = 300
_log = logging.getLogger("flwr")


@dataclass(frozen=True)
class _Asked:
    """A message that is on its way."""

    what: _What
    client: str
    node: int
    start: str
    round: int
    at: float


@dataclass(frozen=True)
class _Client:
    """What a client says of itself before there is a server."""

    tasks: int
    layout: int
    size: int


class FedAPCStrategy(Strategy):
    """Drive a server of fedapc over Flower (spec 6.2).

    The strategy first asks the nodes who they are. In a round each client that the server has selected gets its
    request, and what it answers is given to the server, which judges it by the bytes alone. A client whose node is
    gone, or started anew, is asked again when a node says it is this client. Errors, nodes that are not known, late,
    corrupt and missing answers become events in ``server.ledger``, and the round goes on.

    With a folder, the server's state is on disk after every round, and after every message too while it is small. A
    strategy begun anew with the same folder goes on in the same round, in a new run of Flower as well; one that had
    ended returns its result again.

    ``wire_bytes`` in the ledger are bytes of records as Flower counts them, both directions; queries and evaluations
    have entries of their own with nothing else in them. Compression, HTTP and TLS come on top.

    Parameters
    ----------
    server : at its beginning; or what makes it of the clients' numbers of tasks, by name, when `clients` have come
    clients : how many to wait for before a server is made
    folder : to keep the state in. Default: none is kept
    evaluate : when clients are asked for the accuracy on their tests: at the end of every ``task`` or ``round``
    absence : seconds that a round waits for clients no connected node answers for. While nobody is connected it waits
    resend : seconds after which an unanswered request is sent again: clients answer it once, with the same bytes
    poll : seconds between two looks
    clock, sleep : of time

    Examples
    --------
    >>> strategy = FedAPCStrategy(server, folder="/srv/federation")  # doctest: +SKIP
    >>> result = strategy.start(grid)  # doctest: +SKIP
    >>> server.ledger.total("wire_bytes", direction="up")  # doctest: +SKIP
    """

    def __init__(
        self,
        server: Server | Callable[[Mapping[str, int]], Server],
        *,
        clients: int = 1,
        folder: str | Path | None = None,
        evaluate: Evaluate = "task",
        absence: float = 300.0,
        resend: float = 600.0,
        poll: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if evaluate not in ("task", "round", "never"):
            raise InputError(f"evaluate: '{evaluate}'; choose task, round or never")
        self.accuracy: dict[int, dict[str, list[float]]] = {}
        """Accuracies of all tasks by client, by the number of rounds that were over."""
        self.federation = secrets.token_hex(8)
        """What clients keep their state under; it stays with the folder."""
        self._given = server
        self._server = server if isinstance(server, Server) else None
        self._clients = clients
        self._file = None if folder is None else Path(folder) / _FILE
        self._every, self._absence, self._resend, self._poll = evaluate, absence, resend, poll
        self._clock, self._sleep = clock, sleep
        self._timeout = 3600.0
        self._come: dict[str, _Client] = {}
        self._online: dict[int, str] = {}
        self._met: dict[tuple[int, str], str] = {}
        self._nodes: dict[str, int] = {}
        self._asked: dict[str, _Asked] = {}
        self._handed: list[tuple[_Asked, Metadata]] = []
        self._given_up: set[str] = set()
        self._lost: dict[str, int] = {}
        self._saved = 0

    @property
    def server(self) -> Server:
        """The server.

        Raises
        ------
        ProtocolError
            Before there is one.
        """
        if self._server is None:
            raise ProtocolError("there is no server yet: clients have to come first")
        return self._server

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int | None = None,
        timeout: float = 3600.0,
        *,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run the federation to its end.

        Parameters
        ----------
        grid : the way to the nodes
        initial_arrays : not used: the server has its base
        num_rounds : to stop after. Default: at the end
        timeout : seconds that a round waits for answers
        evaluate_fn : of the round, from 1 on, and the base; what it returns is put into the result

        Returns
        -------
        The base by layer, by round the number of updates used and the bytes so far, and the accuracies of each client.

        Raises
        ------
        InputError
            When the state in the folder cannot be read, or is of another federation.
        """
        del initial_arrays
        self._timeout = timeout
        if self._file is None:
            return self._run(grid, num_rounds, evaluate_fn)
        folder = self._file.parent
        with locked(
            folder / "server.lock", lambda: _log.warning("fedapc: another run uses %s; it is waited for", folder)
        ):
            return self._run(grid, num_rounds, evaluate_fn)

    def summary(self) -> None:
        """Log what is about to run."""
        if self._server is None:
            _log.info("fedapc: waiting for %d clients to say who they are", self._clients)
            return
        server = self._server
        _log.info(
            "fedapc: %d clients, %d tasks at most, %d rounds a task; round %d of %d is next%s",
            len(server.tasks),
            max(server.tasks.values()),
            server.rounds,
            server.round + 1,
            server.rounds * max(server.tasks.values()),
            f"; state in {self._file}" if self._file else "",
        )
        if server.done:
            _log.info("fedapc: all rounds are over; give another folder to begin anew")

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Make the requests that are due.

        Parameters
        ----------
        server_round : not used, the server counts
        arrays, config : not used, requests are bytes of the server's
        grid : the way to the nodes

        Returns
        -------
        A message a selected client whose node is connected and has no request of this round.
        """
        del server_round, arrays, config
        return self._handed_out(grid, "train")

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Give the server the last answers, and close its round.

        Parameters
        ----------
        server_round : from 1 on
        replies : to messages of this strategy

        Returns
        -------
        The new base by layer; how many updates were used, and bytes so far as Flower counts them.
        """
        self._take_back(replies)
        server = self.server
        server.open()
        used = server.close()
        self._given_up, self._lost = set(), {}
        self._save()
        up, down = (server.ledger.total("wire_bytes", direction=way) for way in ("up", "down"))
        _log.info("fedapc: round %d: %d updates; %d bytes up and %d down so far", server_round, len(used), up, down)
        return self._arrays(), MetricRecord({"updates": len(used), "up-bytes": up, "down-bytes": down})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Make the messages that ask for accuracies, if this is due.

        Parameters
        ----------
        server_round, arrays, config : not used: clients evaluate what they have
        grid : the way to the nodes

        Returns
        -------
        A message a client whose node is connected.
        """
        del server_round, arrays, config
        return self._handed_out(grid, "evaluate")

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Take accuracies.

        Parameters
        ----------
        server_round : not used, the server counts
        replies : to messages of this strategy

        Returns
        -------
        Those of every client that has answered, a number a task, NaN for tasks not begun; None if none has.
        """
        del server_round
        self._take_back(replies)
        found = self.accuracy.get(self.server.round)
        return MetricRecord(dict(found)) if found else None

    def _run(
        self,
        grid: Grid,
        num_rounds: int | None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None,
    ) -> Result:
        self._take_up()
        self.summary()
        if self._server is None:
            self._exchange(grid, "query")
            self._make()
        self._save()
        result = Result()
        self._measure(grid, result)
        left = num_rounds
        while not self.server.done and left != 0:
            now = self.server.round + 1
            self._exchange(grid, "train")
            arrays, metrics = self.aggregate_train(now, ())
            assert metrics is not None
            result.train_metrics_clientapp[now] = metrics
            self._measure(grid, result)
            centrally = evaluate_fn(now, arrays) if evaluate_fn is not None and arrays is not None else None
            if centrally is not None:
                result.evaluate_metrics_serverapp[now] = centrally
            left = None if left is None else left - 1
        result.arrays = self._arrays()
        for now, found in self.accuracy.items():
            result.evaluate_metrics_clientapp[now] = MetricRecord(dict(found))
        return result

    def _handed_out(self, grid: Grid, what: _What) -> list[Message]:
        """Make messages that somebody else sends."""
        self._exchange(grid, "query")
        found = list(self._due(what))
        self._handed = [(order, message.metadata) for order, message in found]
        return [message for _, message in found]

    def _take_back(self, replies: Iterable[Message]) -> None:
        """Take the answers to messages that somebody else has sent: they have their numbers since."""
        self._asked.update({about.message_id: order for order, about in self._handed})
        for reply in replies:
            self._take(reply)
        for _, about in self._handed:
            self._asked.pop(about.message_id, None)
        self._handed = []

    def _measure(self, grid: Grid, result: Result) -> None:
        """Ask for accuracies where they are due; a restart between a round and this makes up for it."""
        if not self._left("evaluate"):
            return
        self._exchange(grid, "evaluate")
        self._given_up = set()
        self._save()
        metrics = self.aggregate_evaluate(self.server.round, ())
        if metrics is not None:
            result.evaluate_metrics_clientapp[self.server.round] = metrics

    def _exchange(self, grid: Grid, what: _What) -> None:
        """Send and collect until there is nothing left to wait for, or it has taken too long."""
        begun = self._clock()
        while True:
            moved = self._look(grid)
            moved = self._push(grid, self._strangers()) or moved
            if what != "query":
                moved = self._push(grid, self._due(what)) or moved
            moved = self._collect(grid) or moved
            left = self._left(what)
            if not left:
                return
            if self._server is None or (what == "train" and not self._online):
                # Without anybody, no time is too long: there is nothing to go on with.
                begun = self._clock()
            waited = self._clock() - begun
            absent = not any(self._node(client) for client in left)
            if waited >= self._timeout or (absent and waited >= self._absence):
                return
            if not moved:
                self._sleep(self._poll)

    def _left(self, what: _What) -> list[str]:
        """Clients that something is still to come from."""
        if self._server is None:
            return [f"client {number + 1}" for number in range(len(self._come), self._clients)]
        server = self._server
        if what == "train":
            return [client for client in server.missing() if client not in self._given_up]
        if what == "evaluate":
            each = server.rounds if self._every == "task" else 1
            if self._every == "never" or not server.round or server.round % each:
                return []
            known = self.accuracy.get(server.round, {})
            return [client for client in server.tasks if client not in known and client not in self._given_up]
        return [client for client in server.tasks if client not in self._nodes]

    def _look(self, grid: Grid) -> bool:
        """See which nodes are connected, and since when."""
        online = {node.node_id: node.last_activated_at for node in grid.get_nodes()}
        changed = online != self._online
        for node in self._online.keys() - {node for node, start in online.items() if self._online.get(node) == start}:
            self._met.pop((node, self._online[node]), None)
            self._nodes = {client: at for client, at in self._nodes.items() if at != node}
        self._online = online
        return changed

    def _node(self, client: str) -> int | None:
        """Return the connected node that answers for a client."""
        return self._nodes.get(client)

    def _strangers(self) -> Iterator[tuple[_Asked, Message]]:
        """Make the messages to nodes that have not said who they are since they started."""
        soonest = self._clock() - self._resend
        asked = {
            (order.node, order.start) for order in self._asked.values() if order.what == "query" and order.at > soonest
        }
        for node, start in self._online.items():
            if (node, start) not in self._met and (node, start) not in asked:
                yield self._message("query", "", node, self._question(), MessageType.QUERY)

    def _due(self, what: _What) -> Iterator[tuple[_Asked, Message]]:
        """Make the messages that clients with a connected node have not been sent, or not lately."""
        now = self.server.round
        for client in self._left(what):
            node = self._node(client)
            if node is None or self._awaited(what, client, node, now):
                continue
            if what == "evaluate":
                content = self._question()
                self._note(now - 1, client, "down", wire_bytes(content), note="evaluation")
                yield self._message(what, client, node, content, MessageType.EVALUATE)
                continue
            before = len(self.server.ledger)
            blob = self.server.request(client)
            content = holding(blob, {"federation": self.federation, "known": self.server.known(client)})
            self._carried(before, wire_bytes(content) - len(blob))
            yield self._message(what, client, node, content, MessageType.TRAIN)

    def _question(self) -> RecordDict:
        return holding(about={"federation": self.federation})

    def _awaited(self, what: _What, client: str, node: int, now: int) -> bool:
        start, soonest = self._online[node], self._clock() - self._resend
        return any(
            (order.what, order.client, order.node, order.start, order.round) == (what, client, node, start, now)
            and order.at > soonest
            for order in self._asked.values()
        )

    def _message(self, what: _What, client: str, node: int, content: RecordDict, kind: str) -> tuple[_Asked, Message]:
        number = 0 if self._server is None else self._server.round
        # Longer than a round: an answer that comes in the next one is written down as late.
        lifetime = 2 * self._timeout + 60
        message = Message(content, node, kind, ttl=lifetime, group_id=str(number + 1))
        return _Asked(what, client, node, self._online[node], number, self._clock()), message

    def _push(self, grid: Grid, orders: Iterable[tuple[_Asked, Message]]) -> bool:
        """Send messages one by one, so that one of them is in memory at a time."""
        sent = False
        for order, message in orders:
            for number in grid.push_messages([message]):
                if number:
                    self._asked[number] = order
                    sent = True
        if sent and 0 < self._saved < _CHEAP:
            self._save()
        return sent

    def _collect(self, grid: Grid) -> bool:
        """Take the answers that have come."""
        if not self._asked:
            return False
        replies = list(grid.pull_messages(list(self._asked)))
        for reply in replies:
            self._take(reply)
        if replies and 0 < self._saved < _CHEAP:
            self._save()
        return bool(replies)

    def _take(self, reply: Message) -> None:
        """Do what an answer asks for."""
        order = self._asked.pop(reply.metadata.reply_to_message_id, None)
        if order is None:
            _log.warning("fedapc: an answer that nobody asked for, from node %s", reply.metadata.src_node_id)
            return
        if reply.has_error():
            self._broken(order, reply.error.code, reply.error.reason or "")
            return
        if reply.metadata.src_node_id != order.node:
            self._event("misplaced", order.client, f"an answer of node {reply.metadata.src_node_id}")
            return
        if order.what == "query":
            self._introduce(order, reply.content)
        elif order.what == "evaluate":
            self._judge(order, reply.content)
        else:
            self._update(order, reply.content)

    def _broken(self, order: _Asked, code: int, reason: str) -> None:
        """Ask again what was lost on the way, as often as makes sense; give up what a client cannot do."""
        gone = code == ErrorCode.NODE_UNAVAILABLE
        lost = code in (
            ErrorCode.MESSAGE_UNAVAILABLE,
            ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
            ErrorCode.CLIENT_APP_CRASHED,
        )
        who = order.client or f"node {order.node}"
        self._event("failed", who, f"{order.what} of round {order.round}: error {code}, {reason}")
        if order.what != "query" and order.round != self.server.round:
            return
        if lost:
            self._lost[who] = self._lost.get(who, 0) + 1
        if gone or (lost and self._lost[who] < _MOST_LOST):
            return
        if order.what == "query":
            self._met[order.node, order.start] = ""
        else:
            self._given_up.add(order.client)

    def _introduce(self, order: _Asked, content: RecordDict) -> None:
        """Learn which client a node has."""
        key = (order.node, order.start)
        if self._online.get(order.node) != order.start:
            return
        self._met[key] = ""
        try:
            about = about_of(content)
            if "error" in about:
                self._event("failed", f"node {order.node}", str(about["error"]))
                return
            about = about_of(content, name=str, tasks=int, layout=int)
        except WireError as error:
            self._event("corrupt", f"node {order.node}", f"does not say who it is: {error}")
            return
        name = about["name"]
        if self._nodes.get(name, order.node) != order.node:
            other = self._nodes[name]
            self._event("misplaced", name, f"node {order.node} says it is this client, which node {other} is")
            return
        found = _Client(about["tasks"], about["layout"], wire_bytes(content))
        if self._server is None:
            self._come[name] = found
            _log.info("fedapc: node %d is client '%s' with %d tasks", order.node, name, found.tasks)
        elif not self._fits(name, order.node, found):
            return
        self._met[key] = name
        self._nodes[name] = order.node

    def _fits(self, name: str, node: int, found: _Client) -> bool:
        """Tell whether a client belongs to this federation, and write down what it sent."""
        server = self.server
        if name not in server.tasks:
            self._event("unknown_client", name, f"node {node}: there are {', '.join(server.tasks)}", found.size)
            return False
        if found.tasks != server.tasks[name]:
            why = f"has {found.tasks} tasks, expected {server.tasks[name]}"
        elif found.layout not in (0, server.fingerprint):
            why = "its network has other layers than the server's"
        else:
            self._note(server.round, name, "down", wire_bytes(self._question()), "query")
            self._note(server.round, name, "up", found.size, "query")
            return True
        self._event("mismatch", name, f"node {node}: {why}", found.size)
        return False

    def _judge(self, order: _Asked, content: RecordDict) -> None:
        """Take the accuracies of a client."""
        now = self.server.round
        self._note(now - 1, order.client, "up", wire_bytes(content), "evaluation")
        if order.round != now:
            return
        try:
            about = about_of(content)
            if "error" in about:
                self._event("failed", order.client, f"evaluation: {about['error']}")
                self._given_up.add(order.client)
                return
            found = numbers_of(content, "accuracy")
            if len(found) != self.server.tasks[order.client] or any(value < 0 or value > 1 for value in found):
                raise WireError(f"accuracies {found[:10]}, expected {self.server.tasks[order.client]} from 0 to 1")
        except WireError as error:
            self._event("corrupt", order.client, f"evaluation: {error}")
            self._given_up.add(order.client)
            return
        self.accuracy.setdefault(now, {})[order.client] = found
        self.accuracy[now] = dict(sorted(self.accuracy[now].items()))

    def _update(self, order: _Asked, content: RecordDict) -> None:
        """Give the server what a client has sent."""
        server, client = self.server, order.client
        about: dict[str, Any] = dict(content.config_records.get("about", {}))
        current = order.round == server.round
        size = wire_bytes(content)
        if about.get("lost") is True:
            self._event("failed", client, f"node {order.node} has no state of it, which begins anew", size)
            if current:
                server.forget(client)
            return
        if "error" in about:
            self._event("failed", client, str(about["error"]), size)
            if current:
                self._given_up.add(client)
            return
        try:
            blob = blob_of(content)
        except WireError as error:
            self._event("corrupt", client, str(error), size)
            if current:
                self._given_up.add(client)
            return
        before = len(server.ledger)
        used = server.receive(client, blob)
        self._carried(before, size - len(blob))
        if current and not used and client in server.missing():
            # The same request would get the same answer.
            self._given_up.add(client)

    def _carried(self, before: int, extra: int) -> None:
        """Write down what Flower adds to a message; servers of local methods write no messages down."""
        if len(self.server.ledger) > before:
            self.server.ledger.carried(extra)

    def _event(self, event: Event, client: str, note: str, size: int = 0) -> None:
        _log.warning("fedapc: %s: %s: %s", event, client, note)
        client, note = client[:MOST_NAME], note[:_MOST_NOTE]
        if self._server is not None:
            self._note(self._server.round, client, "up", size, note, event)

    def _note(self, number: int, client: str, way: Direction, size: int, note: str = "", event: Event = "") -> None:
        server = self.server
        task = number // server.rounds if client in server.tasks else -1
        server.ledger.add(
            Entry(number, client, task, way, "control", encoded_bytes=0, wire_bytes=size, event=event, note=note)
        )

    def _arrays(self) -> ArrayRecord:
        return ArrayRecord.from_torch_state_dict(self.server.base)

    def _make(self) -> None:
        assert not isinstance(self._given, Server)
        self._server = self._given({name: found.tasks for name, found in sorted(self._come.items())})
        for name, found in sorted(self._come.items()):
            node = self._nodes.get(name, 0)
            if not self._fits(name, node, found):
                self._nodes.pop(name, None)
        self.summary()

    def _save(self) -> None:
        if self._file is None:
            return
        beside = {
            "federation": self.federation,
            "tasks": dict(self.server.tasks),
            "accuracy": {str(now): found for now, found in self.accuracy.items()},
        }
        state = self.server.state()
        state[_BESIDE] = tensor_of(json.dumps(beside).encode())
        self._saved = write_state(self._file, state)

    def _take_up(self) -> None:
        state = None if self._file is None else read_state(self._file)
        if state is None:
            return
        if _BESIDE not in state:
            raise InputError(f"{self._file}: not written by fedapc.flower; move it away to begin anew")
        beside: dict[str, Any] = json.loads(bytes_of(state.pop(_BESIDE)))
        if self._server is None:
            assert not isinstance(self._given, Server)
            self._server = self._given(beside["tasks"])
        try:
            self._server.load_state(state)
        except InputError as error:
            raise InputError(f"{self._file}: {error}; move it away, or give another folder, to begin anew") from error
        self.federation = beside["federation"]
        self.accuracy = {int(now): found for now, found in beside["accuracy"].items()}
