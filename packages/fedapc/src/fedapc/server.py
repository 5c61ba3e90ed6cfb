"""The server: a base, a store of adaptive parts, and rounds that go on whatever clients send (spec 2.5)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fedapc import messages, wire
from fedapc.decomposition import fingerprint
from fedapc.errors import ModelMismatchError, NonFiniteError, ProtocolError, WireError
from fedapc.ledger import Direction, Entry, Event, Ledger
from fedapc.messages import Message, Section
from fedapc.seeds import generator
from fedapc.selection import KnowledgeBase, aggregate
from fedapc.states import State, bytes_of, described, description, tensor_of
from shared_core.errors import InputError

__all__ = ["Server"]


class Server:
    """A round is `requests`, any number of `receive`, and `close`.

    Parameters
    ----------
    base : by layer, what clients begin with
    tasks : how many tasks each client has; clients that have no more are not asked
    rounds : of every task
    fraction : share of the clients asked a round, drawn by the seed
    kb_policy : see `KnowledgeBase`
    keep_unsent : rows that nobody sent keep their value and are sent again; else they are not sent, and clients keep
        their own, as in the authors' code
    seed : of the draws
    ledger : to write to. Default: a new one

    Raises
    ------
    InputError
        For no clients, no tasks, names that are too long, a fraction outside ``(0, 1]``.

    Examples
    --------
    >>> server = Server({"0.weight": torch.zeros(4, 8)}, {"a": 1, "b": 1}, rounds=1)
    >>> list(server.requests()), server.close(), [entry.event for entry in server.ledger.events()], server.done
    (['a', 'b'], [], ['no_answer', 'no_answer'], True)
    """

    def __init__(
        self,
        base: Mapping[str, Float[Tensor, "rows ..."]],
        tasks: Mapping[str, int],
        *,
        rounds: int = 20,
        fraction: float = 1.0,
        kb_policy: str = "last",
        keep_unsent: bool = True,
        seed: int = 0,
        ledger: Ledger | None = None,
    ) -> None:
        if not base or not tasks or rounds < 1 or any(count < 1 for count in tasks.values()):
            raise InputError("a server needs layers, clients, and at least one task a client and one round a task")
        if not 0 < fraction <= 1:
            raise InputError(f"fraction: {fraction}, expected more than 0 and at most 1")
        for client in tasks:
            if not 0 < len(client.encode()) <= messages.MOST_NAME:
                raise InputError(f"client '{client}': a name has 1 to {messages.MOST_NAME} bytes")
        self.base = {name: value.detach().clone() for name, value in base.items()}
        self.tasks = dict(sorted(tasks.items()))
        self.rounds = rounds
        self.round = 0
        self.knowledge = KnowledgeBase(kb_policy, seed)
        self.ledger = Ledger() if ledger is None else ledger
        self._fraction = fraction
        self._keep_unsent = keep_unsent
        self._seed = seed
        self._layout = fingerprint({name: tuple(value.shape) for name, value in base.items()})
        self._sent = {name: torch.ones(len(value), dtype=torch.bool) for name, value in base.items()}
        self._heard: dict[str, set[int]] = {client: set() for client in self.tasks}
        self._open = False
        self._answers: dict[str, bytes] = {}
        self._encoded: dict[bool, dict[str, bytes]] = {}

    @property
    def task(self) -> int:
        """Index of the task that runs."""
        return self.round // self.rounds

    @property
    def fingerprint(self) -> int:
        """Number of the architecture, see `Layout.fingerprint`; clients of another one do not belong here."""
        return self._layout

    @property
    def done(self) -> bool:
        """Tell whether all rounds are over."""
        return self.task >= max(self.tasks.values())

    def selected(self) -> list[str]:
        """Clients of this round, in their order."""
        active = [client for client, count in self.tasks.items() if count > self.task]
        if not active:
            return []
        count = max(1, round(self._fraction * len(active)))
        drawn = torch.randperm(len(active), generator=generator(self._seed, "clients", self.round))[:count]
        return [active[i] for i in sorted(drawn.tolist())]

    def missing(self) -> list[str]:
        """Clients of this round whose update has not come."""
        return [client for client in self.selected() if client not in self._answers]

    def requests(self) -> dict[str, bytes]:
        """Make the requests to all clients of this round whose update has not come, by client.

        Raises
        ------
        ProtocolError
            When all rounds are over.
        """
        if self.done:
            raise ProtocolError(f"all {self.round} rounds are over")
        return {client: self.request(client) for client in self.missing()}

    def request(self, client: str) -> bytes:
        """Open the round, or go on with it: the request to one of its clients.

        Raises
        ------
        ProtocolError
            When all rounds are over, or the client is not of this one.
        """
        if self.done:
            raise ProtocolError(f"all {self.round} rounds are over")
        if client not in self.selected():
            raise ProtocolError(f"client '{client}' is not of round {self.round}")
        self._open = True
        return self._request(client, self._outgoing(client))

    def open(self) -> None:
        """Open the round without a request, for one that nobody can be asked in.

        Raises
        ------
        ProtocolError
            When all rounds are over.
        """
        if self.done:
            raise ProtocolError(f"all {self.round} rounds are over")
        self._open = True

    def known(self, client: str) -> bool:
        """Tell whether an update of a client was ever used, so that it has a state to go on from."""
        return bool(self._heard[client])

    def forget(self, client: str) -> None:
        """Take a client that has lost its state for one that begins: it is sent all, and asked for no past parts."""
        self._heard[client] = set()

    def receive(self, sender: str, blob: bytes) -> bool:
        """Take what came from a client; what cannot be used is written into the ledger, and refused as a whole.

        Parameters
        ----------
        sender : as the transport knows it, whatever the message says
        blob : what it sent

        Returns
        -------
        Whether the update will be used.
        """
        try:
            message = self._accepted(sender, blob)
        except _RefusedError as refused:
            task = self.task if sender in self.tasks else -1
            self.ledger.add(
                Entry(
                    self.round,
                    sender,
                    task,
                    "up",
                    "control",
                    encoded_bytes=len(blob),
                    messages=1,
                    event=refused.event,
                    note=str(refused),
                )
            )
            return False
        self._answers[sender] = blob
        self._write_down(message, len(blob), "up")
        return True

    def failed(self, client: str, note: str) -> None:
        """Write down that a client could not do its round."""
        self.ledger.add(Entry(self.round, client, self.task, "up", "control", event="failed", note=note))

    def close(self) -> list[str]:
        """End the round: average what has come, store adaptive parts, go on to the next.

        Returns
        -------
        The clients whose updates were used.

        Raises
        ------
        ProtocolError
            When no round is open.
        """
        if not self._open:
            raise ProtocolError("no round is open; ask for requests first")
        for client in self.missing():
            self.ledger.add(Entry(self.round, client, self.task, "up", "control", event="no_answer"))
        used = sorted(self._answers)
        updates = [messages.unpack(self._answers[client]) for client in used]
        self._merge(updates)
        for message in updates:
            self._heard[message.client].add(message.task)
            for section in message.of_kind("adaptive"):
                self.knowledge.add(message.client, section.task, section.tensors)
        self._answers, self._encoded = {}, {}
        self._open = False
        self.round += 1
        return used

    def state(self) -> State:
        """Return all that a restart needs, in the middle of a round too."""
        found = {f"base/{name}": value.clone() for name, value in self.base.items()}
        found.update({f"sent/{name}": rows.clone() for name, rows in self._sent.items()})
        found.update({f"answer/{client}": tensor_of(blob) for client, blob in self._answers.items()})
        stored = list(self.knowledge)
        for number, key in enumerate(stored):
            found.update({f"part/{number}/{k}": tensor_of(blob) for k, blob in enumerate(self.knowledge[key])})
        found["ledger"] = tensor_of(self.ledger.ordered().to_jsonl().encode())
        return described(
            found,
            {
                "kind": "server",
                "layout": self._layout,
                "round": self.round,
                "open": self._open,
                "heard": {client: sorted(tasks) for client, tasks in self._heard.items()},
                "answers": list(self._answers),
                "parts": stored,
            },
        )

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state` returned.

        Raises
        ------
        InputError
            For the state of something else, or of a server of other clients or layers.
        """
        about: dict[str, Any] = description(state, "server")
        if about["layout"] != self._layout or about["heard"].keys() != self.tasks.keys():
            raise InputError("this is the state of a server with other layers or clients")
        self.base = {name: state[f"base/{name}"].clone() for name in self.base}
        self._sent = {name: state[f"sent/{name}"].clone() for name in self.base}
        self._encoded = {}
        self.round, self._open = about["round"], about["open"]
        self._heard = {client: set(about["heard"][client]) for client in self.tasks}
        self._answers = {client: bytes_of(state[f"answer/{client}"]) for client in about["answers"]}
        self.knowledge = KnowledgeBase(self.knowledge.policy, self._seed)
        for number, (client, task) in enumerate(about["parts"]):
            blobs = (bytes_of(state[f"part/{number}/{k}"]) for k in range(len(self.base)))
            self.knowledge.add(client, task, tuple(blobs))
        self.ledger = Ledger.from_jsonl(bytes_of(state["ledger"]).decode())

    def _outgoing(self, client: str) -> Mapping[str, bytes]:
        """Write the base as it is sent to a client."""
        new = not self._heard[client]
        if new not in self._encoded:
            self._encoded[new] = {
                name: wire.encode(value) if new or self._keep_unsent else wire.encode(value, rows=self._sent[name])
                for name, value in self.base.items()
            }
        return self._encoded[new]

    def _merge(self, updates: list[Message]) -> None:
        """Make a new base of the updates, which are in the order of their clients."""
        for place, (name, previous) in enumerate(self.base.items()):
            self.base[name], self._sent[name] = aggregate(previous, _rows_of(updates, place))

    def _objection(self, message: Message) -> str:
        """Tell what else is wrong with a well-formed update, for servers that ask for more; here nothing is."""
        del message
        return ""

    def _wanted(self, client: str) -> tuple[int, ...]:
        if self.knowledge.policy == "none":
            return ()
        asked = {task for task in self._heard[client] if task < self.task}
        if (self.round + 1) % self.rounds == 0:
            asked.add(self.task)
        return tuple(sorted(task for task in asked if (client, task) not in self.knowledge))

    def _request(self, client: str, base: Mapping[str, bytes]) -> bytes:
        sections = [Section("base", client, self.task, tuple(base.values()))]
        if self.task not in self._heard[client]:
            sections += [
                Section("knowledge", owner, task, self.knowledge[owner, task])
                for owner, task in self.knowledge.choose(client, self.task)
            ]
        message = Message(
            "request",
            client,
            self.round,
            self.task,
            self._layout,
            wanted=self._wanted(client),
            sections=tuple(sections),
        )
        blob = messages.pack(message)
        self._write_down(message, len(blob), "down")
        return blob

    def _accepted(self, sender: str, blob: bytes) -> Message:
        if sender not in self.tasks:
            raise _RefusedError("unknown_client", f"there is no client '{sender}'")
        wanted = self._wanted(sender)
        most = 2**16 + 16 * sum(value.numel() for value in self.base.values()) * (1 + len(wanted))
        try:
            message = messages.unpack(blob, most)
        except WireError as error:
            raise _RefusedError("corrupt", str(error)) from error
        self._check_place(sender, message)
        sections = [*message.of_kind("base"), *message.of_kind("adaptive")]
        if len(message.of_kind("base")) != 1 or len(sections) != len(message.sections):
            raise _RefusedError("misplaced", "an update is one base and the adaptive parts that were asked for")
        tasks = [section.task for section in sections[1:]]
        if len(set(tasks)) < len(tasks) or not set(tasks) <= set(wanted) or sections[0].task != self.task:
            raise _RefusedError("misplaced", f"parts of the tasks {tasks}, asked for were {list(wanted)}")
        for section in sections:
            if section.client != sender:
                raise _RefusedError("misplaced", f"a part of client '{section.client}'")
            self._check_tensors(section)
        if why := self._objection(message):
            raise _RefusedError("misplaced", why)
        return message

    def _check_place(self, sender: str, message: Message) -> None:
        if message.kind != "update" or message.client != sender:
            raise _RefusedError("misplaced", f"a message '{message.kind}' of client '{message.client}'")
        if message.layout != self._layout:
            raise _RefusedError("mismatch", "the client's network has other layers")
        if message.round < self.round or (message.round == self.round and not self._open):
            raise _RefusedError("late", f"the update of round {message.round}, this is round {self.round}")
        if message.round > self.round or message.task != self.task or sender not in self.selected():
            raise _RefusedError("misplaced", f"round {message.round} and task {message.task} were not asked for")
        if sender in self._answers:
            raise _RefusedError("duplicate", "there is an update of this round")

    def _check_tensors(self, section: Section) -> None:
        if len(section.tensors) != len(self.base):
            raise _RefusedError("mismatch", f"{len(section.tensors)} layers, expected {len(self.base)}")
        for (name, expected), blob in zip(self.base.items(), section.tensors, strict=True):
            try:
                found = wire.decode(blob, limit=wire.MOST_ELEMENTS, finite=True)
                if found.shape != tuple(expected.shape):
                    raise ModelMismatchError(f"{name}: has the shape {found.shape}, expected {tuple(expected.shape)}")
                if not bool(torch.isfinite(found.floats().to(expected.dtype)).all()):
                    raise NonFiniteError(f"values that {expected.dtype} cannot hold")
                if section.kind == "base":
                    found.by_rows()
            except NonFiniteError as error:
                raise _RefusedError("non_finite", f"{name}: {error}") from error
            except WireError as error:
                raise _RefusedError("corrupt", f"{name}: {error}") from error
            except ModelMismatchError as error:
                raise _RefusedError("mismatch", str(error)) from error

    def _write_down(self, message: Message, length: int, direction: Direction) -> None:
        for section in message.sections:
            values, payload = wire.contents(section.tensors)
            self.ledger.add(
                Entry(
                    message.round,
                    message.client,
                    message.task,
                    direction,
                    section.kind,
                    values=values,
                    payload_bytes=payload,
                    encoded_bytes=section.size,
                )
            )
        rest = length - sum(section.size for section in message.sections)
        self.ledger.add(
            Entry(message.round, message.client, message.task, direction, "control", encoded_bytes=rest, messages=1)
        )


class _RefusedError(Exception):
    """Why a message is not used."""

    def __init__(self, event: Event, why: str) -> None:
        super().__init__(why)
        self.event: Event = event


def _rows_of(updates: list[Message], place: int) -> Iterator[tuple[Bool[Tensor, " rows"], Tensor]]:
    for message in updates:
        yield wire.decode(message.of_kind("base")[0].tensors[place], limit=wire.MOST_ELEMENTS).by_rows()
