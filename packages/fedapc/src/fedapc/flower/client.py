"""A client on a Flower node."""

from __future__ import annotations

from collections.abc import Callable

from fedapc.client import Client
from fedapc.errors import TrainingDivergedError
from fedapc.flower._flwr import ClientApp, Context, Message, RecordDict
from fedapc.flower._kept import STATE_LIMIT, ClientStore
from fedapc.flower._records import about_of, blob_of, holding, reply_to
from fedapc.roles import Participant
from shared_core.errors import InputError

__all__ = ["client_app"]

_MOST_NOTE = 1000


def client_app(build: Callable[[Context], Participant], *, state_limit: int = STATE_LIMIT) -> ClientApp:
    """Make the app that runs a client on a Flower node (spec 6.2).

    It answers three messages. ``query``: who it is, a name, its number of tasks, how many examples they have, and the
    fingerprint of its network. ``train``: the bytes of a request are answered with those of an update by
    `fedapc.Client.answer`. ``evaluate``: the accuracy on the test examples of every task, NaN for tasks not begun.
    Data, masks, attention, heads and the parts of a task that runs never leave the node.

    Between messages the client is a state, kept in Flower's context of the node, or in a file in the folder
    ``state-dir`` of the node's configuration. Give that folder wherever the SuperNode or the server may be restarted:
    a context ends with either. A client that is killed while it trains is as it was before the round, and a request
    that comes again is answered with the same bytes.

    Parameters
    ----------
    build : makes the client from ``context.node_config`` (such as ``partition-id``) and ``context.run_config``, before
        its first task; called for every message
    state_limit : bytes from which on a state is put into a file below the Flower home, if the node names no folder

    Returns
    -------
    The app, for ``clientapp = "package.module:app"``.

    Examples
    --------
    >>> from fedapc import Client
    >>> def build(context):
    ...     name = f"site{context.node_config['partition-id']}"
    ...     return Client(name, network, tasks_of(name))
    >>> app = client_app(build)  # doctest: +SKIP
    """
    app = ClientApp()

    def query(message: Message, context: Context) -> Message:
        return _guarded(message, lambda: _introduced(build(context)))

    def train(message: Message, context: Context) -> Message:
        return _guarded(message, lambda: _trained(message, context, build, state_limit))

    def evaluate(message: Message, context: Context) -> Message:
        return _guarded(message, lambda: _evaluated(message, context, build, state_limit))

    app.query()(query)
    app.train()(train)
    app.evaluate()(evaluate)
    return app


def _introduced(client: Participant) -> RecordDict:
    return holding(
        about={
            "name": client.name,
            "tasks": len(client.tasks),
            "examples": [len(task.y) for task in client.tasks],
            "layout": client.fingerprint if isinstance(client, Client) else 0,
        }
    )


def _trained(message: Message, context: Context, build: Callable[[Context], Participant], limit: int) -> RecordDict:
    about = about_of(message.content, federation=str, known=bool)
    request = blob_of(message.content)
    client = build(context)
    store = ClientStore(context, about["federation"], client.name, limit)
    with store.locked():
        state = store.read()
        if state is None and about["known"]:
            return holding(about={"lost": True})
        if state is not None:
            client.load_state(state)
        update = client.answer(request)
        store.write(client.state())
    return holding(update)


def _evaluated(message: Message, context: Context, build: Callable[[Context], Participant], limit: int) -> RecordDict:
    about = about_of(message.content, federation=str)
    client = build(context)
    state = ClientStore(context, about["federation"], client.name, limit).read()
    if state is not None:
        client.load_state(state)
    return holding(numbers={"accuracy": client.evaluate()})


def _guarded(message: Message, answer: Callable[[], RecordDict]) -> Message:
    """Answer with what is wrong where that is known; Flower reports all other exceptions."""
    try:
        content = answer()
    except (InputError, TrainingDivergedError) as error:
        content = holding(about={"error": f"{type(error).__name__}: {error}"[:_MOST_NOTE]})
    return reply_to(message, content)
