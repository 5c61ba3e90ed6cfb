"""Federations on Flower, without a network: the same bits as in one program, faults, restarts, and every byte."""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import sys
import tomllib
from functools import partial

import pytest
import torch
from networks import LEARNING, mlp, same, task

pytest.importorskip("flwr", reason="Flower asks for an environment of its own: pip install 'fedapc[flower]'")

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from fedapc import baselines, messages, wire
from fedapc.baselines import Training
from fedapc.client import Client
from fedapc.config import FedAPCConfig
from fedapc.data import benchmark, read_tasks, write_example
from fedapc.decomposition import Layout, initial_base
from fedapc.engine import simulate
from fedapc.errors import WireError
from fedapc.flower import FedAPCStrategy, LocalGrid, client_app, make_certificates, server_app, write_project
from fedapc.flower._kept import ClientStore, read_state, write_state
from fedapc.flower._records import about_of, blob_of, holding, numbers_of, wire_bytes
from fedapc.networks import network
from fedapc.server import Server
from fedapc.tasks import Task
from shared_core.errors import InputError

TWO = [{"partition-id": 0}, {"partition-id": 1}]


@pytest.fixture(autouse=True)
def _quiet(tmp_path, monkeypatch):
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flower-home"))
    logging.getLogger("flwr").setLevel(logging.ERROR)


def judged_task(seed):
    """A task with test examples of the same clusters."""
    made, held = task(seed, examples=24), task(seed, examples=48)
    return Task(made.x, made.y, 3, test=(held.x[24:], held.y[24:]))


def client(number, tasks=2, **changes):
    learning = dataclasses.replace(LEARNING, **{"epochs": 1, "batch_size": 12, **changes})
    return Client("ab"[number], mlp(), [judged_task(10 * number + k) for k in range(tasks)], learning)


def server(tasks=2, **options):
    net = mlp()
    return Server(initial_base(net, Layout.of(net)), {"a": tasks, "b": tasks}, rounds=2, **options)


def build(context, **changes):
    return client(int(context.node_config["partition-id"]), **changes)


@pytest.fixture(scope="module")
def expected():
    """The same federation in one program: its server, its clients, and what they measured at the ends of tasks."""
    clients, at, accuracy = [client(0), client(1)], server(), {}

    def after_round(_):
        if at.round % 2 == 0:
            accuracy[at.round] = {one.name: one.evaluate() for one in clients}

    simulate(clients, at, after_round=after_round)
    return at, clients, accuracy


def plain(ledger, wire=False):
    """Entries without what only a transport knows."""
    entries = [entry for entry in ledger.ordered() if entry.encoded_bytes or entry.event]
    return entries if wire else [dataclasses.replace(entry, wire_bytes=0) for entry in entries]


def equal(one, other):
    """Accuracies, where NaN is NaN."""
    return repr(one) == repr(other)


class Time:
    """Time that passes when one sleeps, and what happens meanwhile."""

    def __init__(self, *events):
        self.now, self.events = 0.0, list(events)

    def clock(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        if self.events:
            self.events.pop(0)()


def strategy(at=None, time=None, **options):
    time = time or Time()
    return FedAPCStrategy(server() if at is None else at, clock=time.clock, sleep=time.sleep, **options)


def grid(nodes=TWO, channel=None, app=None, **changes):
    return LocalGrid(app or client_app(partial(build, **changes)), nodes, channel=channel)


def on_disk(tmp_path):
    return [{"partition-id": number, "state-dir": str(tmp_path / f"node{number}")} for number in (0, 1)]


def events(found):
    return {(entry.event, entry.client) for entry in found.server.ledger.events()}


def test_the_same_bits_and_the_same_ledger_as_in_one_program(expected):
    at, clients, accuracy = expected
    over = grid()
    found = strategy()
    result = found.start(over)
    assert same(found.server.base, at.base)
    assert all(torch.equal(torch.from_numpy(result.arrays[name].numpy()), value) for name, value in at.base.items())
    assert equal(found.accuracy, accuracy)
    assert [list(metrics) for metrics in result.evaluate_metrics_clientapp.values()] == [["a", "b"], ["a", "b"]]
    assert plain(found.server.ledger) == plain(at.ledger)
    for number, context in over.contexts().items():
        state = ClientStore(context, found.federation, "ab"[number - 1]).read()
        assert same(state, clients[number - 1].state())


@pytest.mark.parametrize("method", ["apd", "fedavg-ewc", "scaffold", "fedcurv"])
def test_other_methods_run_on_flower_as_well(method):
    tasks = {name: [judged_task(10 * number + k) for k in range(2)] for number, name in enumerate("ab")}

    def make():
        return baselines.build(method, mlp(), tasks, training=Training(epochs=1, batch_size=12), rounds=2)

    clients, at = make()
    simulate(clients, at)
    found = strategy(make()[1])
    found.start(grid(app=client_app(lambda context: make()[0][context.node_config["partition-id"]])))
    assert same(found.server.base, at.base)
    assert equal(found.accuracy[4], {one.name: one.evaluate() for one in clients})
    assert plain(found.server.ledger) == plain(at.ledger)


def test_wire_bytes_are_all_records_of_all_messages():
    passed = {"up": 0, "down": 0}

    def channel(message, reply):
        passed["down"] += sum(record.count_bytes() for record in message.content.values())
        passed["up"] += sum(record.count_bytes() for record in reply.content.values())
        return reply

    found = strategy()
    found.start(grid(channel=channel))
    ledger = found.server.ledger
    assert {way: ledger.total("wire_bytes", direction=way) for way in passed} == passed
    # Words about a blob, and nothing else, come on top.
    extra = ledger.total("wire_bytes") - ledger.total("encoded_bytes")
    assert 0 < extra < 100 * (ledger.total("messages") + 8)
    result_up = ledger.total("wire_bytes", direction="up")
    assert result_up == passed["up"]


def test_a_federation_of_whoever_comes(expected):
    asked = []

    def make(tasks):
        asked.append(tasks)
        return server()

    over = grid()
    over.disconnect(2)
    found = strategy(make, Time(lambda: None, lambda: over.connect(2)), clients=2)
    found.start(over)
    assert asked == [{"a": 2, "b": 2}]
    assert same(found.server.base, expected[0].base)
    assert plain(found.server.ledger) == plain(expected[0].ledger)


def message_of(reply):
    return messages.unpack(blob_of(reply.content))


def altered(reply, blob):
    return Message(holding(blob), reply_to=ASKED[reply.metadata.reply_to_message_id])


ASKED = {}


def once(change, number="b", round_=1):
    """A channel that changes what one client answers in one round."""

    def channel(message, reply):
        ASKED[message.metadata.message_id] = message
        if message.metadata.message_type != "train" or not reply.content.array_records:
            return reply
        update = message_of(reply)
        return change(message, reply) if (update.client, update.round) == (number, round_) else reply

    return channel


def not_finite(message, reply):
    update = message_of(reply)
    section = update.of_kind("base")[0]
    bad = [wire.encode(torch.full(tuple(wire.decode(blob).shape), float("nan"))) for blob in section.tensors]
    return altered(
        reply, messages.pack(dataclasses.replace(update, sections=(dataclasses.replace(section, tensors=tuple(bad)),)))
    )


FAULTS = {
    "corrupt": lambda message, reply: altered(reply, blob_of(reply.content)[:-3] + b"abc"),
    "non_finite": not_finite,
    "misplaced": lambda message, reply: altered(reply, messages.pack(dataclasses.replace(message_of(reply), round=7))),
    "late": lambda message, reply: altered(reply, messages.pack(dataclasses.replace(message_of(reply), round=0))),
    "failed": lambda message, reply: Message(Error(2, "out of memory"), reply_to=message),
}


@pytest.mark.parametrize("event", FAULTS)
def test_what_a_client_sends_wrong_costs_its_update_and_nothing_else(event):
    found = strategy()
    found.start(grid(channel=once(FAULTS[event])))
    assert events(found) == {(event, "b"), ("no_answer", "b")}
    assert found.server.done
    used = {
        entry.round
        for entry in found.server.ledger
        if entry.client == "b" and entry.kind == "base" and entry.direction == "up"
    }
    assert used == {0, 2, 3}


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"a": ArrayRecord({"x": Array("uint8", (1,), "numpy.ndarray", b"x")})}),
        RecordDict({"a": MetricRecord({"loss": 1.0})}),
        holding(b"", {"lost": 1}),
    ],
)
def test_records_that_are_no_update_are_corrupt(content):
    found = strategy()
    found.start(grid(channel=once(lambda message, reply: Message(content, reply_to=message))))
    assert events(found) == {("corrupt", "b"), ("no_answer", "b")}


def test_a_client_that_raises_or_diverges_is_left_out():
    def raising(context):
        made = build(context)
        if made.name == "b":
            made.answer = lambda request: 1 / 0
        return made

    found = strategy()
    found.start(grid(app=client_app(raising)))
    assert {entry.note for entry in found.server.ledger.events() if entry.event == "failed"} == {
        f"train of round {number}: error 2, <class 'ZeroDivisionError'>:<'division by zero'>" for number in range(4)
    }
    diverging = strategy()
    diverging.start(
        grid(app=client_app(lambda context: build(context, lr=1e30 if context.node_id == 2 else 5e-4, threshold=1e31)))
    )
    notes = [entry.note for entry in diverging.server.ledger.events() if entry.event == "failed"]
    assert all("TrainingDivergedError: client 'b'" in note for note in notes)
    assert {entry.client for entry in diverging.server.ledger if entry.kind == "base" and entry.direction == "up"} == {
        "a"
    }


def test_an_answer_that_is_late_is_written_down_as_late():
    """It arrives when the next round runs."""
    held = []

    def channel(message, reply):
        if reply.content.array_records and (update := message_of(reply)).client == "b" and update.round == 0:
            held.append(1)
            return reply if len(held) > 12 else None
        return reply

    found = strategy()
    found.start(grid(channel=channel), timeout=10.0)
    assert events(found) == {("late", "b"), ("no_answer", "b")}
    late = next(entry for entry in found.server.ledger.events() if entry.event == "late")
    assert late.round == 1
    assert late.wire_bytes > late.encoded_bytes > 0


def test_a_request_without_an_answer_is_sent_again_and_answered_once(expected):
    """What is sent twice is paid twice, and trained once."""
    seen = []

    def channel(message, reply):
        if reply.content.array_records and (update := message_of(reply)).client == "b" and update.round == 1:
            seen.append(blob_of(reply.content))
            return None if message.metadata.message_id == first.setdefault("id", message.metadata.message_id) else reply
        return reply

    first = {}
    found = strategy(resend=5.0)
    found.start(grid(channel=channel), timeout=100.0)
    assert len(set(seen)) == 1
    assert same(found.server.base, expected[0].base)
    assert (
        found.server.ledger.total("messages", direction="down")
        == expected[0].ledger.total("messages", direction="down") + 1
    )


def test_a_node_that_is_gone_is_waited_for_and_then_left_out():
    over = grid()
    time = Time()

    def channel(message, reply):
        if reply.content.array_records and message_of(reply).round == 1:
            over.disconnect(2)
        return reply

    over.channel = channel
    found = strategy(time=time, absence=30.0)
    found.start(over)
    assert found.server.done
    assert {(e.event, e.client, e.round) for e in found.server.ledger.events() if e.event == "no_answer"} >= {
        ("no_answer", "b", 2), ("no_answer", "b", 3),
    }  # fmt: skip
    assert 60 <= time.now < 200
    assert list(found.accuracy[4]) == ["a"]


@pytest.mark.parametrize("kept", [True, False])
def test_a_node_killed_in_a_round_comes_back(expected, tmp_path, kept):
    """With its state in a file to the same bits; without it, it begins anew, and the server knows."""
    over = grid(on_disk(tmp_path) if kept else TWO)
    killed = []

    def channel(message, reply):
        if message.metadata.message_type == "train" and reply.content.array_records:
            update = message_of(reply)
            if (update.client, update.round) == ("b", 1) and not killed:
                killed.append(1)
                over.disconnect(2)
                over.connect(2)
                return None
        return reply

    over.channel = channel
    found = strategy()
    found.start(over)
    assert found.server.done
    if kept:
        assert same(found.server.base, expected[0].base)
        assert equal(found.accuracy, expected[2])
        assert events(found) == set()
    else:
        assert events(found) == {("failed", "b")}
        assert "no state of it" in found.server.ledger.events()[0].note
        assert not any(value != value for value in found.accuracy[4]["b"])


def test_a_node_that_is_gone_for_a_while_is_asked_again_on_its_return(expected, tmp_path):
    over = grid(on_disk(tmp_path))
    gone = []

    def channel(message, reply):
        if reply.content.array_records and message_of(reply).round == 1 and not gone:
            gone.append(1)
            over.disconnect(1)
        return reply

    over.channel = channel
    found = strategy(time=Time(lambda: None, lambda: None, lambda: over.connect(1)))
    found.start(over)
    assert same(found.server.base, expected[0].base)
    assert equal(found.accuracy, expected[2])
    assert {event for event, _ in events(found)} <= {"failed"}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("stop", [0, 1, 2, 3])
@pytest.mark.parametrize("middle", [False, True])
def test_a_server_killed_in_any_round_goes_on_to_the_same_bits(expected, tmp_path, stop, middle):
    """In a new run, too: nothing of Flower's has to survive."""
    folder, nodes = tmp_path / "server", on_disk(tmp_path)

    def channel(message, reply):
        if (
            message.metadata.message_type == "train"
            and message_of(reply).round == stop
            and message_of(reply).client == "b"
        ):
            raise Killed
        return reply

    first = strategy(folder=folder)
    if middle:
        with pytest.raises(Killed):
            first.start(grid(nodes, channel=channel))
    else:
        first.start(grid(nodes), num_rounds=stop)
    second = strategy(lambda tasks: server(), folder=folder)
    result = second.start(LocalGrid(client_app(build), nodes, run_id=2))
    assert second.federation == first.federation
    assert same(second.server.base, expected[0].base)
    assert equal(second.accuracy, expected[2])
    assert len(result.evaluate_metrics_clientapp) == 2
    if not middle:
        assert plain(second.server.ledger) == plain(expected[0].ledger)
    again = strategy(folder=folder)
    assert same(
        {name: torch.from_numpy(array.numpy()) for name, array in again.start(grid(nodes)).arrays.items()},
        expected[0].base,
    )


def test_accuracies_that_a_server_was_killed_before_are_asked_for_again(expected, tmp_path):
    def channel(message, reply):
        if message.metadata.message_type == "evaluate":
            raise Killed
        return reply

    nodes = on_disk(tmp_path)
    with pytest.raises(Killed):
        strategy(folder=tmp_path).start(grid(nodes, channel=channel))
    second = strategy(folder=tmp_path)
    second.start(grid(nodes))
    assert equal(second.accuracy, expected[2])


def test_a_state_of_another_federation_is_refused(tmp_path):
    strategy(folder=tmp_path).start(grid(), num_rounds=1)
    with pytest.raises(InputError, match=r"server\.safetensors: this is the state of a server with other layers"):
        strategy(Server({"w": torch.zeros(2, 3)}, {"a": 1}), folder=tmp_path).start(grid())
    (tmp_path / "server.safetensors").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="no state of fedapc"):
        strategy(folder=tmp_path).start(grid())
    write_state(tmp_path / "server.safetensors", server().state())
    with pytest.raises(InputError, match=r"not written by fedapc\.flower"):
        strategy(folder=tmp_path).start(grid())


@pytest.mark.parametrize(
    ("made", "event", "name"),
    [
        (lambda: Client("x", mlp(), [judged_task(1)], LEARNING), "unknown_client", "x"),
        (lambda: client(0), "misplaced", "a"),
        (lambda: 1 / 0, "failed", "node 3"),
        (lambda: InputError("no such file")(), "failed", "node 3"),
    ],
)
def test_nodes_that_do_not_belong_here_are_not_asked(expected, made, event, name):
    def any_of(context):
        return made() if context.node_id == 3 else build(context)

    found = strategy()
    found.start(grid([*TWO, {}], app=client_app(any_of)))
    assert events(found) == {(event, name)}
    assert same(found.server.base, expected[0].base)


@pytest.mark.parametrize(
    "made",
    [
        lambda: Client("b", mlp(), [judged_task(1)], LEARNING),
        lambda: Client("b", torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 3)), [judged_task(1)] * 2),
    ],
)
def test_a_client_that_does_not_fit_is_not_asked(made):
    found = strategy()
    found.start(grid(app=client_app(lambda context: made() if context.node_id == 2 else build(context))), num_rounds=1)
    assert events(found) == {("mismatch", "b"), ("no_answer", "b")}
    assert found.server.ledger.total("messages", client="b") == 0


def test_a_node_that_cannot_say_who_it_is_says_why():
    def wrong(context):
        raise InputError("there is no folder /data")

    found = strategy(absence=3.0)
    found.start(grid(TWO[:1], app=client_app(wrong)), num_rounds=1)
    assert ("failed", "node 1") in events(found)
    assert any("there is no folder /data" in entry.note for entry in found.server.ledger.events())


def test_what_crashes_again_and_again_is_given_up():
    """A program that is killed for its memory may be lucky the next time, and not for ever."""
    kinds = {1: "query", 2: "train"}

    def channel(message, reply):
        node, kind = message.metadata.dst_node_id, message.metadata.message_type
        return Message(Error(8, "killed"), reply_to=message) if kinds[node] == kind else reply

    found = strategy(absence=2.0)
    found.start(grid(channel=channel), num_rounds=1)
    crashed = [(e.client, e.note.split()[0]) for e in found.server.ledger.events() if e.event == "failed"]
    assert sorted(crashed) == [("b", "train")] * 5 + [("node 1", "query")] * 5


def test_evaluations_that_are_wrong_are_events():
    def channel(message, reply):
        if message.metadata.message_type == "evaluate":
            kind = {1: {"accuracy": [2.0, 0.5]}, 2: {"accuracy": [0.5]}}[message.metadata.dst_node_id]
            return Message(holding(numbers=kind), reply_to=message)
        return reply

    found = strategy()
    found.start(grid(channel=channel))
    assert events(found) == {("corrupt", "a"), ("corrupt", "b")}
    assert found.accuracy == {}


@pytest.mark.parametrize(("when", "rounds"), [("round", [1, 2, 3, 4]), ("task", [2, 4]), ("never", [])])
def test_accuracies_are_asked_for_when_wanted(when, rounds):
    found = strategy(evaluate=when)
    found.start(grid(), evaluate_fn=lambda number, arrays: MetricRecord({"layers": len(arrays)}))
    assert list(found.accuracy) == rounds
    with pytest.raises(InputError, match="choose task, round or never"):
        strategy(evaluate="always")


def test_what_a_strategy_configures_can_be_driven_round_by_round(expected):
    """Without its own loop, as Flower's own strategies are driven."""
    found, over = strategy(), grid()
    found.start(over, num_rounds=1)
    for number in (2, 3, 4):
        requests = list(found.configure_train(number, ArrayRecord(), ConfigRecord(), over))
        arrays, metrics = found.aggregate_train(number, over.send_and_receive(requests))
        assert metrics["updates"] == 2
        asked = list(found.configure_evaluate(number, arrays, ConfigRecord(), over))
        measured = found.aggregate_evaluate(number, over.send_and_receive(asked))
        assert (measured is None) == (number == 3)
    assert same({name: torch.from_numpy(array.numpy()) for name, array in arrays.items()}, expected[0].base)
    assert equal(found.accuracy, expected[2])


def test_large_states_are_in_a_file(tmp_path):
    over = LocalGrid(client_app(build, state_limit=100), TWO)
    found = strategy()
    found.start(over)
    home = tmp_path / "flower-home" / "fedapc" / f"{found.federation}-state"
    assert sorted(path.name for path in home.iterdir()) == ["a-state.safetensors", "b-state.safetensors"]
    assert not over.contexts()[1].state.array_records
    assert list(found.accuracy[4]) == ["a", "b"]


def test_states_are_kept_by_federation_and_client(tmp_path):
    context = grid().contexts()[1]
    store = ClientStore(context, "one", "a")
    store.write({"x": torch.ones(2)})
    assert same(store.read(), {"x": torch.ones(2)})
    assert ClientStore(context, "two", "a").read() is None
    assert ClientStore(context, "one", "b").read() is None
    context.node_config = {"state-dir": str(tmp_path / "kept")}
    hostile = ClientStore(context, "../../..", "/etc/x")
    with hostile.locked():
        hostile.write({"x": torch.ones(2)})
    assert [path.relative_to(tmp_path).parts[:2] for path in tmp_path.rglob("*.safetensors")] == [
        ("kept", "..%2F..%2F..-state")
    ]
    assert same(hostile.read(), {"x": torch.ones(2)})
    for wrong in (3, ""):
        context.node_config = {"state-dir": wrong}
        with pytest.raises(InputError, match="expected a folder"):
            ClientStore(context, "one", "a")
    (tmp_path / "file").write_text("")
    context.node_config = {"state-dir": str(tmp_path / "file" / "below")}
    with pytest.raises(InputError, match="choose another folder"), ClientStore(context, "one", "a").locked():
        pass
    assert read_state(tmp_path / "nothing") is None


def test_records_are_read_with_care():
    with pytest.raises(WireError, match=r"expected one 'fedapc\.message\.v1'"):
        blob_of(holding(b"x", kind="other"))
    for about in ({}, {"round": "1"}, {"round": True}):
        with pytest.raises(WireError, match="'round' is"):
            about_of(RecordDict({"about": ConfigRecord(about)}), round=int)
    with pytest.raises(WireError, match="expected a list"):
        numbers_of(RecordDict({"numbers": MetricRecord({"accuracy": 1.0})}), "accuracy")
    assert wire_bytes(holding(b"12345", {"known": True}, {"accuracy": [1.0]})) == 5 + 4 + 5 + 1 + 8 + 8


def test_an_app_of_the_server(expected, tmp_path):
    ended = []
    app = server_app(lambda context, tasks: server(), after=lambda found, result: ended.append((found, result)))
    over = grid()
    context = over.contexts()[1]
    context.run_config = {"clients": 2, "state-folder": str(tmp_path), "poll": 0, "timeout": 60}
    app(over, context)
    ((found, result),) = ended
    assert same(found.server.base, expected[0].base)
    assert len(result.arrays) == len(expected[0].base)
    assert same(read_state(tmp_path / "base.safetensors"), expected[0].base)
    accuracy = json.loads((tmp_path / "accuracy.json").read_text())
    assert equal(accuracy["4"], expected[2][4])
    assert accuracy["2"]["a"][1] is None
    assert len((tmp_path / "ledger.jsonl").read_text().splitlines()) == len(found.server.ledger)
    context.run_config = {"timeout": "long"}
    with pytest.raises(InputError, match="run config timeout: 'long', expected float"):
        app(over, context)


@pytest.fixture
def apps(tmp_path, monkeypatch):
    """Write a project, and give its two apps and its settings."""

    def write(**options):
        config = FedAPCConfig.preset("fedweit", rounds=2, epochs=1, batch_size=20, lr=9e-4)
        write_project(tmp_path / "app", config=config, **options)
        monkeypatch.syspath_prepend(str(tmp_path / "app"))
        found = [importlib.import_module(f"fedapc_app.{name}").app for name in ("client_app", "server_app")]
        settings = tomllib.loads((tmp_path / "app" / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
        return config, settings, *found

    yield write
    for name in [name for name in sys.modules if name.split(".")[0] == "fedapc_app"]:
        del sys.modules[name]


def in_one_program(config, tasks, name):
    net = network(name, next(iter(tasks.values()))[0].x, classes=2)
    clients = [Client(name, net, own, config.learning()) for name, own in tasks.items()]
    counts = {name: len(own) for name, own in tasks.items()}
    at = Server(initial_base(net, Layout.of(net)), counts, **config.serving())
    simulate(clients, at)
    return at, {one.name: one.evaluate() for one in clients}


GAUSSIAN = {"benchmark": "gaussian", "clients": 2, "tasks": 2, "per_class": 6}


@pytest.mark.parametrize("own_files", [False, True])
def test_a_written_project_runs_as_it_is(apps, tmp_path, own_files):
    if own_files:
        file = write_example(tmp_path / "data")
        config, settings, on_node, at_server = apps(tasks_file=file)
        read = read_tasks(file)
        tasks, name = read.tasks, read.network
        nodes = [{"client": client, "tasks": str(file)} for client in tasks]
    else:
        config, settings, on_node, at_server = apps(**GAUSSIAN)
        made = benchmark("gaussian", clients=2, tasks=2, per_class=6)
        tasks, name, nodes = made.tasks, made.network, TWO
    assert settings["components"] == {
        "serverapp": "fedapc_app.server_app:app", "clientapp": "fedapc_app.client_app:app",
    }  # fmt: skip
    run_config = {**settings["config"], "state-folder": str(tmp_path / "out"), "poll": 0.0}
    over = LocalGrid(on_node, nodes, run_config)
    at_server(over, over.contexts()[1])
    at, accuracy = in_one_program(config, tasks, name)
    assert same(read_state(tmp_path / "out" / "base.safetensors"), at.base)
    found = json.loads((tmp_path / "out" / "accuracy.json").read_text())
    assert found[str(at.round)] == accuracy


def test_a_project_is_not_written_over(tmp_path):
    write_project(tmp_path, **GAUSSIAN)
    with pytest.raises(InputError, match="has a project already"):
        write_project(tmp_path, **GAUSSIAN)


def test_nodes_are_told_which_clients_there_are(apps):
    _, settings, on_node, _ = apps(**GAUSSIAN)
    for node, why in (
        ({"partition-id": 2}, "there are 2 clients"),
        ({}, "there are 2 clients"),
        ({"client": "z"}, "the node's client: no client 'z'; there are "),
        ({"tasks": "/nowhere/tasks.toml", "client": "z"}, "/nowhere/tasks.toml"),
    ):
        found = strategy(absence=2.0)
        found.start(LocalGrid(on_node, [node], settings["config"]), num_rounds=1)
        assert any(why in entry.note for entry in found.server.ledger.events())


def test_certificates_are_those_that_flower_takes(tmp_path):
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

    make_certificates(tmp_path, ["server.example.org", "10.0.0.7"], nodes=["siteA"])
    authority, own = (
        x509.load_pem_x509_certificate((tmp_path / name).read_bytes()) for name in ("ca.crt", "server.pem")
    )
    own.verify_directly_issued_by(authority)
    names = own.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["server.example.org"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.7"]
    private = load_ssh_private_key((tmp_path / "siteA").read_bytes(), None)
    public = load_ssh_public_key((tmp_path / "siteA.pub").read_bytes())
    assert private.public_key().public_numbers() == public.public_numbers()
    assert [(tmp_path / name).stat().st_mode & 0o077 for name in ("server.key", "siteA")] == [0, 0]
    with pytest.raises(InputError, match="is there already"):
        make_certificates(tmp_path)
    with pytest.raises(InputError, match="a name that can be a file's"):
        make_certificates(tmp_path / "other", nodes=["../x"])
