"""Clients and a server: limit cases in which the method is another one, restarts, faults, and every byte."""

from __future__ import annotations

import dataclasses
import functools
import warnings

import pytest
import torch
from networks import LEARNING, Convolutional, federation, mlp, run, same, task
from torch import nn
from torch.nn import functional

from fedapc import messages, wire
from fedapc.client import Client, Learning
from fedapc.decomposition import Layout, initial_base
from fedapc.engine import LocalFleet, simulate
from fedapc.errors import (
    ModelMismatchError,
    ProtocolError,
    SparsityWarning,
    TaskError,
    TrainingDivergedError,
    WireError,
)
from fedapc.ledger import Ledger
from fedapc.seeds import derive, generator
from fedapc.server import Server
from fedapc.tasks import Task
from shared_core.errors import InputError

PLAIN = dataclasses.replace(
    LEARNING, mask=False, adaptive=False, transfer="none", retention=0.0, weight_decay=0.0, upload_fraction=1.0
)
RETROACTIVE = ["shared", "joint", "none"]

# Shapes are checked at run time by test_fit.py, test_cli.py and the tests of every function; here, where federations
# run to their ends, it would take half of the time.
pytestmark = pytest.mark.usefixtures("unchecked")


def plain_training(net, data, name, round_, learning):
    """Adam on the cross-entropy, of a plain network, in the order of a client."""
    optimizer = torch.optim.Adam(net.parameters(), lr=learning.lr, fused=True)
    for epoch in range(learning.epochs):
        order = torch.randperm(len(data.y), generator=generator(0, name, "shuffle", round_, epoch))
        for chosen in order.split(learning.batch_size):
            optimizer.zero_grad()
            functional.cross_entropy(net(data.x[chosen]), data.y[chosen]).backward()
            optimizer.step()


def begun(client, number, base):
    """A plain network with what a client begins a task with."""
    twin = Client(client.name, mlp(), client.tasks, client.learning)
    twin.model.base = base
    twin.model.begin(number, 3, seed=derive(0, client.name))
    return twin.export(number).train()


def test_open_masks_no_parts_and_all_rows_are_fedavg_bit_for_bit():
    clients, server = federation(clients=3, tasks=2, rounds=3, learning=PLAIN)
    base = {name: value.clone() for name, value in server.base.items()}
    simulate(clients, server)
    nets = {}
    for round_ in range(6):
        number = round_ // 3
        for client in clients:
            if round_ % 3 == 0:
                nets[client.name] = begun(client, number, base)
            with torch.no_grad():
                for name, value in base.items():
                    nets[client.name].get_parameter(name).copy_(value)
            plain_training(nets[client.name], client.tasks[number], client.name, round_, PLAIN)
        base = {
            name: torch.stack([net.get_parameter(name).detach().double() for net in nets.values()])
            .sum(0)
            .div(3)
            .float()
            for name in base
        }
    assert same(base, server.base)
    x = torch.randn(20, 6)
    for client in clients:
        assert torch.equal(client.predict(x, 1), nets[client.name].eval()(x))


@pytest.mark.parametrize("fraction", [1.0, 0.3])
def test_one_client_is_local_learning_bit_for_bit(fraction):
    learning = dataclasses.replace(PLAIN, upload_fraction=fraction)
    (client,), server = federation(clients=1, tasks=1, rounds=4, learning=learning)
    net = begun(client, 0, {name: value.clone() for name, value in server.base.items()})
    simulate([client], server, rounds=1)
    first = {name: value.clone() for name, value in server.base.items()}
    for round_ in range(4):
        plain_training(net, client.tasks[0], "a", round_, learning)
        if round_ == 0 and fraction == 1.0:
            assert all(torch.equal(net.get_parameter(name), value) for name, value in first.items())
    if fraction == 1.0:
        simulate([client], server)
        assert torch.equal(client.predict(client.tasks[0].x, 0), net.eval()(client.tasks[0].x))
    else:
        sent = {name: (value != 0).flatten(1).any(1) for name, value in first.items()}
        assert all(rows.any() for rows in sent.values())


@pytest.mark.parametrize("policy", ["last", "sample:2"])
def test_the_order_of_clients_changes_nothing(policy):
    one, first = run(kb_policy=policy, rounds=1)
    other, second = run(kb_policy=policy, rounds=1, reverse=True)
    assert same(first.state(), second.state())
    assert all(same(one[name].state(), other[name].state()) for name in one)


@pytest.mark.parametrize("retroactive", RETROACTIVE)
def test_a_run_taken_up_after_any_round_ends_with_the_same_bits(retroactive):
    learning = dataclasses.replace(LEARNING, retroactive=retroactive, patience=1, lr=4e-4)
    options = {"learning": learning, "clients": 2, "tasks": 2}
    expected_clients, expected = federation(**options)
    clients, server = federation(**options)
    while not server.done:
        simulate(expected_clients, expected, rounds=1)
        simulate(clients, server, rounds=1)
        states, at_rest = [client.state() for client in clients], server.state()
        clients, server = federation(**options)
        for client, state in zip(clients, states, strict=True):
            client.load_state(state)
        server.load_state(at_rest)
        assert same(server.state(), expected.state())
        assert all(same(*(c.state() for c in pair)) for pair in zip(clients, expected_clients, strict=True))


def test_a_server_taken_up_in_the_middle_of_a_round_loses_no_update():
    _, expected = run(tasks=2)
    clients, server = federation(tasks=2)
    requests = server.requests()
    assert server.receive("b", clients[1].answer(requests["b"]))
    state = server.state()
    other = federation(tasks=2)[1]
    other.load_state(state)
    assert other.missing() == ["a", "c"]
    again = other.requests()
    assert {name: again[name] for name in ("a", "c")} == {name: requests[name] for name in ("a", "c")}
    for client in (clients[2], clients[0]):
        assert other.receive(client.name, client.answer(again[client.name]))
    other.close()
    simulate(clients, other)
    assert same(other.base, expected.base)


def test_the_same_request_gets_the_same_answer_and_trains_once():
    clients, server = federation()
    request = server.requests()["a"]
    answer = clients[0].answer(request)
    state = clients[0].state()
    assert clients[0].answer(request) == answer
    assert same(clients[0].state(), state)
    restarted = federation()[0][0]
    restarted.load_state(state)
    assert restarted.answer(request) == answer


def test_threads_give_the_same_bits():
    expected_clients, expected = run(clients=4, tasks=2, rounds=1)
    clients, server = federation(clients=4, tasks=2, rounds=1)
    simulate(LocalFleet(clients, workers=3), server)
    assert same(server.state(), expected.state())
    assert all(same(client.state(), expected_clients[client.name].state()) for client in clients)


def parsed(clients, server):
    """A run, with every blob that went either way."""
    blobs = []
    while not server.done:
        for name, request in server.requests().items():
            answer = next(client for client in clients if client.name == name).answer(request)
            server.receive(name, answer)
            blobs += [("down", name, request), ("up", name, answer)]
        server.close()
    return blobs


@functools.cache
def told(keep_unsent):
    """A federation that has ended, to be read only, and every blob of it."""
    clients, server = federation(keep_unsent=keep_unsent)
    return clients, server, parsed(clients, server)


@pytest.mark.parametrize("keep_unsent", [True, False])
def test_the_ledger_is_the_sum_of_what_was_sent(keep_unsent):
    _, server, blobs = told(keep_unsent)
    for direction in ("up", "down"):
        expected = sum(len(blob) for way, _, blob in blobs if way == direction)
        assert server.ledger.total("encoded_bytes", direction=direction) == expected
        assert server.ledger.total("messages", direction=direction) == len(blobs) / 2
        for kind in ("base", "adaptive", "knowledge"):
            sections = [s for way, _, b in blobs if way == direction for s in messages.unpack(b).of_kind(kind)]
            assert server.ledger.total(direction=direction, kind=kind) == sum(section.size for section in sections)
            decoded = [wire.decode(blob) for section in sections for blob in section.tensors]
            assert server.ledger.total("values", direction=direction, kind=kind) == sum(len(d.values) for d in decoded)
            payload = server.ledger.total("payload_bytes", direction=direction, kind=kind)
            assert payload == sum(4 * len(d.values) for d in decoded)
    by_client = server.ledger.sums("client", direction="up")
    assert by_client == {
        (name,): sum(len(b) for way, who, b in blobs if (way, who) == ("up", name)) for name in ("a", "b", "c")
    }
    assert not server.ledger.events()
    assert Ledger.from_jsonl(server.ledger.to_jsonl()) == server.ledger


def test_rows_sent_take_the_bytes_of_the_formula():
    clients, server = federation(clients=1, tasks=1, rounds=1)
    ((_, _, _), (_, _, answer)) = parsed(clients, server)
    for blob, (rows, width) in zip(messages.unpack(answer).of_kind("base")[0].tensors, ((10, 6), (7, 10)), strict=True):
        sent = max(1, round(0.5 * rows))
        assert len(blob) == 28 + -(-rows // 8) + sent * width * 4


def test_parts_are_sent_once_and_reach_the_others_at_their_next_task():
    clients, _, blobs = told(True)
    up = [
        (m.round, s.client, s.task)
        for way, _, b in blobs
        if way == "up"
        for m in [messages.unpack(b)]
        for s in m.of_kind("adaptive")
    ]
    assert sorted(up) == [(2 * t + 1, c, t) for t in range(3) for c in "abc"]
    down = [
        (m.round, m.client, s.client, s.task)
        for way, _, b in blobs
        if way == "down"
        for m in [messages.unpack(b)]
        for s in m.of_kind("knowledge")
    ]
    assert sorted(down) == sorted((2 * t, c, o, t - 1) for t in (1, 2) for c in "abc" for o in "abc" if o != c)
    assert clients[0].model.finished[1].slots == (("b", 0), ("c", 0))
    weights = clients[0].model.finished[1].attention
    assert all(value.shape == (2,) and value.abs().max() > 0 for value in weights.values())


def test_nothing_private_leaves_a_client():
    clients, server = federation(tasks=2, learning=dataclasses.replace(LEARNING, share_adaptive=False))
    up = b"".join(blob for way, _, blob in parsed(clients, server) if way == "up")
    for client in clients:
        about = client.model.running[1]
        secrets = [*about.mask.values(), *about.own.values(), *about.adaptive.values(), client.tasks[0].x]
        for secret in secrets:
            flat = secret.detach().reshape(-1)
            place = int(flat[:-1].abs().argmax())
            assert flat[place : place + 2].numpy().tobytes() not in up
    assert not len(server.knowledge)


@pytest.mark.parametrize("retroactive", RETROACTIVE)
def test_past_tasks_are_kept_and_without_the_penalty_they_are_not(retroactive):
    found = {}
    for retention in (100.0, 0.0):
        learning = dataclasses.replace(LEARNING, epochs=5, retroactive=retroactive, retention=retention, lr=9e-4)
        clients, server = federation(clients=2, tasks=2, rounds=2, learning=learning)
        x = {client.name: client.tasks[0].x for client in clients}
        simulate(clients, server, rounds=2)
        before = {client.name: client.predict(x[client.name], 0) for client in clients}
        simulate(clients, server)
        changes = [(client.predict(x[client.name], 0) - before[client.name]).abs().mean() for client in clients]
        found[retention] = float(torch.stack(changes).mean())
    assert found[100.0] < 0.2 * found[0.0]


def test_anchors_are_taken_before_the_first_base_of_the_task():
    clients, server = federation(clients=2, tasks=2, rounds=1)
    simulate(clients, server, rounds=1)
    local = {name: value.clone() for name, value in clients[0].model.base.items()}
    server.base = {name: value + 1 for name, value in server.base.items()}
    clients[0].answer(server.requests()["a"])
    for name, penalty in clients[0]._retention.penalties.items():
        assert torch.equal(penalty.base, local[name])


def test_rows_that_nobody_sent():
    for keep in (True, False):
        clients, server = federation(clients=1, tasks=1, rounds=2, keep_unsent=keep)
        simulate(clients, server, rounds=1)
        local = {name: value.clone() for name, value in clients[0].model.base.items()}
        request = messages.unpack(server.requests()["a"])
        for name, blob in zip(local, request.of_kind("base")[0].tensors, strict=True):
            rows, values = wire.decode(blob).by_rows()
            assert bool(rows.all()) == keep
            assert torch.equal(values, server.base[name][rows])
            if not keep:
                assert torch.equal(values, local[name][rows])


def test_clients_with_fewer_tasks_and_rounds_with_fewer_clients():
    net = mlp()
    counts = {"a": 1, "b": 3, "c": 2, "d": 3}
    clients = [Client(name, net, [task(k) for k in range(count)], LEARNING) for name, count in counts.items()]
    server = Server(initial_base(net, Layout.of(net)), counts, rounds=2, fraction=0.5, seed=1)
    asked = []
    simulate(clients, server, channel=lambda name, number, blob: [asked.append((number, name)), blob][1:])
    assert server.round == 6
    for number in range(6):
        names = [name for n, name in asked if n == number]
        active = [name for name, count in counts.items() if count > number // 2]
        assert len(names) == max(1, round(0.5 * len(active)))
        assert set(names) <= set(active)
    assert not server.ledger.events()


def faulty(kind):
    def channel(name, number, blob):
        if name != "b" or number != 1:
            return [blob]
        message = messages.unpack(blob)
        base = message.sections[0]
        first = wire.decode(base.tensors[0])

        def with_first(tensor):
            made = dataclasses.replace(base, tensors=(tensor, *base.tensors[1:]))
            return messages.pack(dataclasses.replace(message, sections=(made, *message.sections[1:])))

        nan = torch.full(first.shape, float("nan"))
        return {
            "no_answer": [],
            "non_finite": [with_first(wire.encode(nan))],
            "overflow": [with_first(wire.encode(torch.full(first.shape, 1e300, dtype=torch.float64)))],
            "scale": [with_first(wire.encode(torch.full(first.shape, 127, dtype=torch.int8), scale=3e38))],
            "mismatch": [with_first(wire.encode(torch.zeros(3, 3)))],
            "part of a row": [with_first(wire.encode(torch.zeros(10, 6), torch.arange(60).view(10, 6) == 1))],
            "bomb": [with_first(wire.encode(torch.zeros(2**20, 2), rows=torch.arange(2**20) == 1))],
            "layers": [messages.pack(dataclasses.replace(message, sections=(dataclasses.replace(base, tensors=()),)))],
            "architecture": [messages.pack(dataclasses.replace(message, layout=1))],
            "corrupt": [blob[:-1] + bytes([blob[-1] ^ 1])],
            "cut": [blob[:50]],
            "empty": [b""],
            "long": [b"\0" * 10**6],
            "late": [messages.pack(dataclasses.replace(message, round=0))],
            "early": [messages.pack(dataclasses.replace(message, round=2))],
            "task": [messages.pack(dataclasses.replace(message, task=1))],
            "other": [messages.pack(dataclasses.replace(message, client="a"))],
            "request": [messages.pack(dataclasses.replace(message, kind="request"))],
            "section": [messages.pack(dataclasses.replace(message, sections=(*message.sections, base)))],
            "unasked": [
                messages.pack(
                    dataclasses.replace(message, sections=(base, dataclasses.replace(base, kind="adaptive", task=7)))
                )
            ],
            "of another": [
                messages.pack(
                    dataclasses.replace(
                        message, sections=(dataclasses.replace(base, client="a"), *message.sections[1:])
                    )
                )
            ],
            "duplicate": [blob, blob],
        }[kind]

    return channel


FAULTS = {
    "no_answer": "no_answer",
    "non_finite": "non_finite",
    "overflow": "non_finite",
    "scale": "non_finite",
    "mismatch": "mismatch",
    "part of a row": "corrupt",
    "bomb": "mismatch",
    "layers": "mismatch",
    "architecture": "mismatch",
    "corrupt": "corrupt",
    "cut": "corrupt",
    "empty": "corrupt",
    "long": "corrupt",
    "late": "late",
    "early": "misplaced",
    "task": "misplaced",
    "other": "misplaced",
    "request": "misplaced",
    "section": "misplaced",
    "unasked": "misplaced",
    "of another": "misplaced",
    "duplicate": "duplicate",
}


SHORT = {"clients": 2, "tasks": 2, "learning": dataclasses.replace(LEARNING, epochs=1)}


@functools.cache
def base_after(kind):
    """The base at the end of a federation whose channel has a fault; ``None``, a channel that has none."""
    clients, server = federation(**SHORT)
    simulate(clients, server, channel=kind and faulty(kind))
    return server.base


@pytest.mark.parametrize("kind", FAULTS)
def test_rounds_go_on_with_faults_and_the_ledger_tells(kind):
    clients, server = federation(**SHORT)
    used = []
    simulate(clients, server, channel=faulty(kind), after_round=lambda server: used.append(server.round))
    events = [(entry.round, entry.client, entry.event) for entry in server.ledger.events()]
    expected = [(1, "b", FAULTS[kind])]
    if kind not in {"duplicate", "no_answer"}:
        expected.append((1, "b", "no_answer"))
    assert events == expected
    assert used == [1, 2, 3, 4]
    assert all(bool(torch.isfinite(value).all()) for value in server.base.values())
    # What was lost with the last round of a task is asked for again.
    assert list(server.knowledge) == [(name, number) for name in "ab" for number in range(2)]
    assert same(server.base, base_after(None if kind == "duplicate" else "no_answer"))


def test_strangers_and_updates_after_the_end():
    clients, server = federation(tasks=1, rounds=1)
    answer = clients[0].answer(server.requests()["a"])
    assert not server.receive("x", answer)
    assert not server.receive("b", answer)
    assert server.receive("a", answer)
    server.close()
    assert not server.receive("a", answer)
    assert [entry.event for entry in server.ledger.events()] == [
        "unknown_client",
        "misplaced",
        "no_answer",
        "no_answer",
        "late",
    ]
    with pytest.raises(ProtocolError, match="rounds are over"):
        server.requests()
    with pytest.raises(ProtocolError, match="no round is open"):
        server.close()


def test_a_client_that_diverges_is_as_it_was_and_the_round_goes_on():
    clients, server = federation(tasks=2)
    simulate(clients, server, rounds=1)
    state = clients[1].state()
    good = clients[1].tasks[0]
    clients[1].tasks[0] = Task(good.x * float("inf"), good.y, 3)
    with pytest.raises(TrainingDivergedError, match="client 'b', task 0, round 1"):
        clients[1].answer(server.requests()["b"])
    assert same(clients[1].state(), state)
    simulate(clients, server, rounds=1)
    assert [(entry.event, entry.client) for entry in server.ledger.events()] == [("failed", "b"), ("no_answer", "b")]
    clients[1].tasks[0] = good
    simulate(clients, server)
    assert server.done


def test_clients_refuse_what_is_not_for_them():
    clients, server = federation()
    requests = server.requests()
    state = clients[0].state()
    message = messages.unpack(requests["a"])
    base = message.sections[0]

    def changed(**changes):
        return messages.pack(dataclasses.replace(message, **changes))

    bad = dataclasses.replace(base, tensors=(wire.encode(torch.zeros(2, 2)), *base.tensors[1:]))
    nan = dataclasses.replace(base, tensors=(wire.encode(torch.full((10, 6), float("nan"))), *base.tensors[1:]))
    for blob, error in (
        (requests["b"], ProtocolError),
        (requests["a"][:-1], WireError),
        (b"", WireError),
        (changed(kind="update"), ProtocolError),
        (changed(task=9), ProtocolError),
        (changed(layout=0), ModelMismatchError),
        (changed(sections=()), ProtocolError),
        (changed(sections=(base, base)), ProtocolError),
        (changed(sections=(bad,)), WireError),
        (changed(sections=(nan,)), WireError),
    ):
        with pytest.raises(error):
            clients[0].answer(blob)
        assert same(clients[0].state(), state)
    clients[0].answer(requests["a"])
    with pytest.raises(ProtocolError, match="round 0 is over"):
        clients[0].answer(changed(examples=1))


def test_the_learning_rate_falls_when_validation_stops_getting_better():
    data = task(0)
    held = Task(data.x, data.y, 3, validation=(data.x, (data.y + 1) % 3))
    net = mlp()
    client = Client("a", net, [held], dataclasses.replace(LEARNING, epochs=12, patience=2))
    server = Server(initial_base(net, client.layout), {"a": 1}, rounds=1)
    client.answer(server.requests()["a"])
    assert client._pace.lr < LEARNING.lr / 8


@pytest.mark.parametrize("solver", ["subgradient", "prox"])
def test_parts_become_sparse(solver):
    learning = dataclasses.replace(
        LEARNING,
        l1_solver=solver,
        sparsity=0.3,
        epochs=60,
        adaptive_init="zeros",
        optimizer="sgd",
        lr=0.01,
        threshold=5e-3,
    )
    clients, _ = run(clients=1, tasks=1, rounds=1, learning=learning)
    parts = clients["a"].model.part(0)
    assert max(part.density for part in parts.values()) < 0.2


def test_networks_with_convolutions_and_dropout_run_deterministically():
    net = nn.Sequential(Convolutional(), nn.Dropout(0.5), nn.Linear(3, 2))
    x = torch.randn(24, 2, 8, 8)
    data = Task(x, torch.arange(24) % 2, 2)
    states = []
    for _ in range(2):
        torch.rand(1)
        client = Client("a", net, [data], LEARNING)
        server = Server(initial_base(net, client.layout), {"a": 1}, rounds=2)
        simulate([client], server)
        states.append(client.state())
    assert same(*states)
    exported = client.export(0)
    torch.testing.assert_close(exported(x), client.predict(x, 0))
    assert client.accuracy(x, data.y, 0) == pytest.approx(float((exported(x).argmax(1) == data.y).float().mean()))


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ((torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), 2), "at least one"),
        ((torch.zeros(2, 2), torch.zeros(3, dtype=torch.int64), 2), "2 inputs and 3 labels"),
        ((torch.zeros(3, 2), torch.tensor([0, 1, 2]), 2), r"labels \[2\] are not among 0..1"),
        ((torch.zeros(3, 2), torch.tensor([0, -1, 1]), 2), r"labels \[-1\]"),
        ((torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), 2), "1 of 2 classes"),
        ((torch.zeros(2, 2), torch.tensor([0, 1]), 2, (torch.zeros(1, 2), torch.tensor([5]))), "validation"),
    ],
)
def test_tasks_that_cannot_be_learnt_are_refused(given, match, unchecked):
    with pytest.raises(TaskError, match=match):
        Task(*given)


def test_settings_out_of_range_are_refused():
    for change in (
        {"epochs": 0},
        {"batch_size": 0},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"retention": -1.0},
        {"upload_fraction": 0.0},
        {"upload_fraction": 1.1},
        {"lr_factor": 1.0},
        {"sparsity": float("inf")},
    ):
        with pytest.raises(InputError, match=next(iter(change))):
            dataclasses.replace(LEARNING, **change)
    with pytest.warns(SparsityWarning, match="lower lr"):
        Learning(lr=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Learning()
        Learning(lr=1e-2, optimizer="sgd")


def test_servers_and_fleets_refuse_what_cannot_be():
    base = {"w": torch.zeros(2, 2)}
    for options in ({"tasks": {}}, {"tasks": {"a": 0}}, {"rounds": 0}, {"fraction": 0.0}, {"tasks": {"x" * 65: 1}}):
        with pytest.raises(InputError):
            Server(**{"base": base, "tasks": {"a": 1}, **options})
    clients, server = federation()
    with pytest.raises(InputError, match="two clients are named 'a'"):
        LocalFleet([clients[0], clients[0]])
    with pytest.raises(InputError, match="state of client 'a'"):
        clients[1].load_state(clients[0].state())
    with pytest.raises(InputError, match="expected one of a server"):
        server.load_state(clients[0].state())
    with pytest.raises(InputError, match="other layers or clients"):
        federation(clients=2)[1].load_state(server.state())
    with pytest.raises(InputError, match="this is no state"):
        server.load_state({})


def test_a_network_that_does_not_return_logits_is_named():
    net = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3), nn.Flatten(0))
    client = Client("a", net, [task(0)], LEARNING)
    server = Server(initial_base(net, client.layout), {"a": 1}, rounds=1)
    with pytest.raises(ModelMismatchError, match=r"returns \(24,\), expected \(8, 3\): its head '1' has to come last"):
        client.answer(server.requests()["a"])


def test_a_frozen_base_stays_what_the_server_drew():
    learning = dataclasses.replace(LEARNING, train_base=False)
    made, server = federation(clients=2, tasks=2, learning=learning)
    before = {name: value.clone() for name, value in server.base.items()}
    simulate(made, server)
    for name, value in before.items():
        assert torch.equal(server.base[name], value)
        assert all(torch.equal(client.model.base[name], value) for client in made)
    assert made[0].model.running is not None


def test_without_the_parts_of_others():
    clients, _ = run(clients=2, tasks=2)
    model, x = clients["a"].model, torch.randn(5, 6)
    about = clients["a"].about(1)
    assert set(about["attention"]) == set(model.layout.layers)
    assert all(list(slots) == [("b", 0)] for slots in about["attention"].values())
    own, whole = model.weights(1, foreign=False), model.weights(1)
    running = model.running[1]
    for name in own:
        foreign = running.received[name].weighted_sum(running.attention[name]).detach()
        torch.testing.assert_close(own[name] + foreign, whole[name])
    assert not torch.equal(clients["a"].predict(x, 1), clients["a"].predict(x, 1, foreign=False))
    assert torch.equal(clients["a"].predict(x, 0), clients["a"].predict(x, 0, foreign=False))
    assert clients["a"].about(0)["attention"] == {}
