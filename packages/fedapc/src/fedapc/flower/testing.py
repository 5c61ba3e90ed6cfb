"""Apps of Flower run in this process: without Ray, SuperLink and SuperNode, and with faults to order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedapc.flower._flwr import (
    ClientApp,
    Context,
    Error,
    ErrorCode,
    Grid,
    Message,
    RecordDict,
    Scalar,
    identify,
)

__all__ = ["LocalGrid"]

# What of a reply to a message arrives: it, another one, or nothing yet, in which case this is asked again.
Channel = Callable[[Message, Message], Message | None]


@dataclass
class _Node:
    node_id: int
    context: Context
    last_activated_at: str = "0"
    connected: bool = True


@dataclass
class _Sent:
    message: Message
    reply: Message | None = None
    delivered: bool = False


class LocalGrid(Grid):
    """Nodes in this process, for tests and for small federations.

    Messages are handed over, not encoded; an app runs when its answer is first asked for, one after the other.

    Parameters
    ----------
    app : of all nodes
    nodes : the configuration of each, such as ``{"partition-id": 0}``; they are numbered from 1 on
    run_config : of the run
    run_id : of the run
    channel : that replies go through, to try faults

    Raises
    ------
    InputError
        For a Flower that keeps the identity of its processes elsewhere.

    Examples
    --------
    >>> grid = LocalGrid(app, [{"partition-id": 0}, {"partition-id": 1}])  # doctest: +SKIP
    >>> FedAPCStrategy(server).start(grid).arrays  # doctest: +SKIP
    """

    def __init__(
        self,
        app: ClientApp,
        nodes: Sequence[Mapping[str, Scalar]],
        run_config: Mapping[str, Scalar] | None = None,
        *,
        run_id: int = 1,
        channel: Channel | None = None,
    ) -> None:
        self.app = app
        self.channel = channel
        self.run_id = run_id
        self._run_config = dict(run_config or {})
        self._nodes = {number: _Node(number, self._fresh(number, config)) for number, config in enumerate(nodes, 1)}
        self._sent: dict[str, _Sent] = {}
        self._run: Any = None
        identify(run_id)

    def contexts(self) -> dict[int, Context]:
        """Contexts by node."""
        return {number: node.context for number, node in self._nodes.items()}

    def disconnect(self, node: int) -> None:
        """End a SuperNode: its context is lost, and what it was asked will not be answered."""
        found = self._nodes[node]
        found.connected = False
        found.context = self._fresh(node, found.context.node_config)

    def connect(self, node: int) -> None:
        """Start a SuperNode again."""
        found = self._nodes[node]
        found.connected = True
        found.last_activated_at = str(int(found.last_activated_at) + 1)
        for sent in self._sent.values():
            if sent.message.metadata.dst_node_id == node:
                sent.delivered = True

    def set_run(self, run: Any) -> None:
        """Take a run of Flower's."""
        self._run = run

    @property
    def run(self) -> Any:
        """The run."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Make a message."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Numbers of the nodes that are connected."""
        return [node.node_id for node in self.get_nodes()]

    def get_nodes(self) -> list[_Node]:
        """Nodes that are connected."""
        return [node for node in self._nodes.values() if node.connected]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Take messages.

        Returns
        -------
        A number a message, to pull the replies by.
        """
        given: list[str] = []
        for message in messages:
            number = str(len(self._sent) + 1)
            vars(message.metadata)["_message_id"] = number
            self._sent[number] = _Sent(message)
            given.append(number)
        return given

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Run the apps of the messages named that are not answered yet.

        Returns
        -------
        The replies that have arrived.
        """
        found: list[Message] = []
        for number in message_ids:
            sent = self._sent[number]
            if sent.delivered:
                continue
            node = self._nodes[sent.message.metadata.dst_node_id]
            if not node.connected:
                error = Error(ErrorCode.NODE_UNAVAILABLE, "the node is not connected")
                found.append(Message(error, reply_to=sent.message))
                sent.delivered = True
                continue
            if sent.reply is None:
                sent.reply = self._answer(sent.message, node.context)
            arrived = sent.reply if self.channel is None else self.channel(sent.message, sent.reply)
            if arrived is not None:
                sent.delivered = True
                found.append(arrived)
        return found

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push messages and pull the replies that have arrived; nothing is waited for."""
        del timeout
        return self.pull_messages(self.push_messages(messages))

    def _fresh(self, node: int, config: Mapping[str, Scalar]) -> Context:
        return Context(self.run_id, node, dict(config), RecordDict(), dict(self._run_config))

    def _answer(self, message: Message, context: Context) -> Message:
        try:
            return self.app(message, context)
        except Exception as error:  # as a node does
            reason = f"{type(error)}:<'{error}'>"
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
