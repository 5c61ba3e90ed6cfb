"""All methods as federations: bytes, restarts, orders, faults; what they learn and forget."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from networks import Convolutional, mlp, same
from torch import nn

from fedapc import messages, wire
from fedapc.baselines import METHODS, CurvatureServer, NetworkClient, ScaffoldServer, Training, build, initial_body
from fedapc.client import Learning
from fedapc.decomposition import Layout
from fedapc.engine import simulate
from fedapc.errors import ModelMismatchError, ProtocolError
from fedapc.ledger import Ledger
from fedapc.roles import Coordinator, Participant
from fedapc.tasks import Task
from shared_core.errors import InputError, UnknownKeyError

LOCAL = [method for method, info in METHODS.items() if info.kind == "local"]
PLAIN = ["fedavg", "fedprox", "fedavg-ewc", "fedprox-ewc", "fedprox-stable-sgd"]
# Shapes are checked at run time by test_baselines.py and test_fit.py; here it would take half of the time.
pytestmark = pytest.mark.usefixtures("unchecked")

TIMES = {**dict.fromkeys(PLAIN, 1), "scaffold": 2, "fedcurv": 3}
LEARNING = Learning(epochs=1, batch_size=3, lr=5e-4, upload_fraction=0.5, patience=1)
TRAINING = Training(epochs=1, batch_size=3, lr=2e-3, sgd_factor=20.0, patience=1, learning=LEARNING)


def task(seed, examples=6, spread=0.3, classes=3):
    """Well separated clusters, with examples to validate and to test on."""
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(classes, 6, generator=generator)

    def draw(count):
        y = torch.arange(count) % classes
        return centres[y] + spread * torch.randn(count, 6, generator=generator), y

    x, y = draw(examples)
    return Task(x, y, classes, validation=draw(6), test=draw(60))


@functools.cache
def tasks_of(clients, tasks, examples=6):
    return {name: tuple(task(10 * k + number, examples) for number in range(tasks)) for k, name in enumerate(clients)}


def federation(method, clients="ab", tasks=2, training=TRAINING, reverse=False, **options):
    own = tasks_of(clients, tasks)
    own = dict(reversed(own.items())) if reverse else own
    return build(method, mlp(), own, training=training, **{"rounds": 2, **options})


def stored(state):
    """What a file gives back: tensors in the order of their names."""
    return dict(sorted(state.items()))


def taken_up(method, clients, server):
    """Another federation in the same state."""
    others, coordinator = federation(method)
    for other, client in zip(others, clients, strict=True):
        other.load_state(stored(client.state()))
    coordinator.load_state(stored(server.state()))
    return others, coordinator


@pytest.mark.parametrize("method", METHODS)
def test_a_run_taken_up_after_every_round_and_within_it_ends_with_the_same_bits(method):
    expected_clients, expected = federation(method)
    clients, server = federation(method)
    assert isinstance(server, Coordinator)
    assert all(isinstance(client, Participant) for client in clients)
    while not server.done:
        simulate(expected_clients, expected, rounds=1)
        assert server.receive("a", clients[0].answer(server.request("a")))
        clients, server = taken_up(method, clients, server)
        assert server.missing() == ["b"]
        assert server.receive("b", clients[1].answer(server.request("b")))
        server.close()
        clients, server = taken_up(method, clients, server)
        assert same(server.state(), expected.state())
    assert all(same(*(c.state() for c in pair)) for pair in zip(clients, expected_clients, strict=True))
    assert all(a.evaluate() == b.evaluate() for a, b in zip(clients, expected_clients, strict=True))


@pytest.mark.parametrize("method", ["stl", "fedavg-ewc", "scaffold", "fedcurv", "fedavg-apd", "fedapc"])
def test_the_order_of_clients_and_of_what_arrives_changes_nothing(method):
    one, first = federation(method, "abc", rounds=1)
    other, second = federation(method, "abc", reverse=True, rounds=1)
    simulate(one, first)
    while not second.done:
        answers = {client.name: client.answer(second.request(client.name)) for client in other}
        for name in "cab":
            assert second.receive(name, answers[name])
        second.close()
    assert same(first.state(), second.state())
    assert all(same(*(c.state() for c in pair)) for pair in zip(one, reversed(other), strict=True))


# Bytes


@pytest.mark.parametrize("method", LOCAL)
def test_local_methods_send_nothing(method):
    clients, server = federation(method)
    sizes = []

    def channel(name, round_, blob):
        sizes.append(sum(wire.contents(section.tensors)[0] for section in messages.unpack(blob).sections))
        return [blob]

    assert simulate(clients, server, channel=channel) == Ledger()
    assert set(sizes) == {0}


def test_a_local_client_keeps_its_body_whatever_its_server_has():
    for method in ("finetune", "apd"):
        clients, server = federation(method)
        simulate(clients, server, rounds=1)
        for value in server.base.values():
            value.zero_()
        undisturbed, other = federation(method)
        simulate(clients, server)
        simulate(undisturbed, other)
        assert all(same(*(c.state() for c in pair)) for pair in zip(clients, undisturbed, strict=True))


@pytest.mark.parametrize(("method", "times"), TIMES.items())
def test_every_byte_of_dense_methods(method, times):
    clients, server = federation(method)
    real = {"up": 0, "down": 0}

    def channel(name, round_, blob):
        real["up"] += len(blob)
        return [blob]

    asked = server.request
    server.request = lambda name: real.update(down=real["down"] + len(blob := asked(name))) or blob
    ledger = simulate(clients, server, channel=channel)
    shapes = [(10, 6), (10,), (7, 10), (7,)]
    numbers = sum(functools.reduce(int.__mul__, shape) for shape in shapes)
    messages_sent = 2 * 2 * 2
    for direction in ("up", "down"):
        assert ledger.total("values", direction=direction) == messages_sent * times * numbers
        assert ledger.total("payload_bytes", direction=direction) == messages_sent * times * 4 * numbers
        dense = sum(20 + 4 * len(shape) for shape in shapes) + 4 * numbers
        assert ledger.total("encoded_bytes", direction=direction, kind="base") == messages_sent * times * dense
        assert ledger.total("encoded_bytes", direction=direction) == real[direction]
        assert ledger.total("messages", direction=direction) == messages_sent


@pytest.mark.parametrize("method", ["fedavg-apd", "fedprox-apd", "fedapc-dense"])
def test_decomposed_bases_are_sent_in_full(method):
    clients, server = federation(method)
    ledger = simulate(clients, server)
    sent = ledger.total("values", direction="up", kind="base")
    assert sent == ledger.total("values", direction="down", kind="base") == 2 * 2 * 2 * (60 + 70)
    others = ledger.total("values", direction="up", kind="adaptive")
    assert bool(others) == (method == "fedapc-dense")


def test_parts_of_others_are_sent_to_whom_they_are_for():
    sent = {}
    for method in ("fedapc", "fedapc-mean", "fedapc-no-kb"):
        clients, server = federation(method)
        ledger = simulate(clients, server)
        sent[method] = [ledger.total("values", kind=kind) for kind in ("adaptive", "knowledge")]
    assert sent["fedapc-no-kb"] == [0, 0]
    assert min(sent["fedapc"] + sent["fedapc-mean"]) > 0


# Learning


@functools.cache
def learnt(method):
    """Accuracy on each task when it ends, and on the first at the end."""
    learning = Learning(epochs=6, batch_size=9, lr=8e-3, threshold=1e-2, upload_fraction=0.5)
    training = Training(
        epochs=6, batch_size=9, lr=8e-3, sgd_factor=16.0, dropout=0.1, ewc_strength=10.0, learning=learning
    )
    clients, server = build(method, mlp(), {"a": [task(70, 18), task(71, 18)]}, training=training, rounds=2)
    found = []
    simulate(clients, server, after_round=lambda _: found.append(clients[0].evaluate()))
    return found[1][0], found[3][1], found[3][0]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_two_easy_tasks(method):
    first, second, _ = learnt(method)
    assert min(first, second) >= 0.9


def test_fine_tuning_forgets_and_what_is_made_against_it_does_not():
    forgotten = {method: learnt(method)[0] - learnt(method)[2] for method in ("stl", "finetune", "apd", "fedapc")}
    assert forgotten["stl"] == 0
    assert forgotten["finetune"] >= 0.3
    assert max(forgotten["apd"], forgotten["fedapc"]) <= 0.05


# Faults


def update(server, sender, tensors, **options):
    sections = (messages.Section("base", sender, 0, tuple(tensors)),)
    layout = messages.unpack(server.request(sender)).layout
    given = {"examples": 5, "sections": sections, **options}
    return messages.pack(messages.Message("update", sender, server.round, server.task, layout, **given))


@pytest.mark.parametrize("method", ["fedavg", "scaffold", "fedcurv", "finetune"])
def test_updates_that_cannot_be_averaged_are_refused(method):
    _, server = federation(method)
    whole = [wire.encode(value) for value in server.base.values()]
    nan = [wire.encode(torch.full_like(value, float("nan"))) for value in server.base.values()]
    part = torch.arange(10) < 4
    some = [wire.encode(server.base["0.weight"], rows=part), *whole[1:]]
    other = [wire.encode(value.new_zeros(3)) for value in server.base.values()]
    assert not server.receive("a", update(server, "a", some))
    assert not server.receive("a", update(server, "a", nan))
    assert not server.receive("a", update(server, "a", other))
    assert not server.receive("a", update(server, "a", whole[1:]))
    assert not server.receive("a", b"FAPM")
    assert not server.receive("z", b"FAPM")
    events = ["misplaced", "non_finite", "mismatch", "mismatch", "corrupt", "unknown_client"]
    assert [entry.event for entry in server.ledger.events()] == events
    if method == "finetune":
        assert not server.receive("a", update(server, "a", whole))
        assert "send none" in server.ledger.events()[-1].note
        return
    assert "this method sends all" in server.ledger.events()[0].note
    assert not server.receive("a", update(server, "a", whole, examples=0))
    assert "no weight" in server.ledger.events()[-1].note
    assert server.receive("a", update(server, "a", whole))
    assert not server.receive("a", update(server, "a", whole))
    assert server.ledger.events()[-1].event == "duplicate"


def test_curvature_is_a_mean_of_squares():
    _, server = federation("fedcurv")
    negative = [
        wire.encode(-torch.ones_like(value) if name == "fisher/2.bias" else value)
        for name, value in server.base.items()
    ]
    assert not server.receive("a", update(server, "a", negative))
    assert "negative curvature of 2.bias" in server.ledger.events()[-1].note


@pytest.mark.parametrize(("method", "kind"), [("fedcurv", CurvatureServer), ("scaffold", ScaffoldServer)])
def test_absurd_updates_do_not_end_a_run(method, kind):
    _, server = federation(method, training=dataclasses.replace(TRAINING, server_lr=2.0))
    assert isinstance(server, kind)
    huge = [wire.encode(torch.full_like(value, 3e38)) for value in server.base.values()]
    for name in "ab":
        assert server.receive(name, update(server, name, huge))
    server.close()
    assert all(bool(torch.isfinite(value).all()) for value in server.base.values())
    messages_sent = [messages.unpack(server.request(name)) for name in "ab"]
    for message in messages_sent:
        for blob in message.sections[0].tensors:
            wire.decode(blob, finite=True)


def test_methods_do_not_mix():
    for method, other in (("fedavg", "fedcurv"), ("scaffold", "fedavg"), ("fedavg-apd", "fedavg")):
        clients, server = federation(method)
        with pytest.raises(ModelMismatchError, match="client 'a': the server's network has other layers"):
            clients[0].answer(federation(other)[1].request("a"))
        simulate(clients, server, rounds=1)
        with pytest.raises(InputError, match="other layers or clients"):
            federation(other)[1].load_state(server.state())
    plain, elastic = federation("fedavg"), federation("fedavg-ewc")
    with pytest.raises(InputError, match="a state of the strategy 'plain', expected 'ewc'; take up a run with the"):
        elastic[0][0].load_state(plain[0][0].state())
    with pytest.raises(InputError, match="strategy 'none'"):
        elastic[0][0].load_state(federation("fedapc")[0][0].state())


def test_a_request_of_a_part_of_the_extras_is_refused():
    clients, server = federation("scaffold")
    message = messages.unpack(server.request("a"))
    blobs = list(message.sections[0].tensors)
    blobs[-1] = wire.encode(server.base["control/2.bias"], rows=torch.arange(7) < 3)
    sections = (dataclasses.replace(message.sections[0], tensors=tuple(blobs)),)
    before = clients[0].state()
    with pytest.raises(ProtocolError, match=r"a part of control/2\.bias was sent, expected all of it"):
        clients[0].answer(messages.pack(dataclasses.replace(message, sections=sections)))
    assert same(clients[0].state(), before)


@pytest.mark.parametrize("method", ["ewc", "scaffold"])
def test_a_client_that_diverges_is_as_it_was_and_the_run_goes_on(method):
    own = {"a": [task(1), task(2)], "b": [task(3), task(4)]}
    own["a"][1].x[3] = float("nan")
    clients, server = build(method, mlp(), own, training=TRAINING, rounds=1)
    simulate(clients, server, rounds=1)
    before = clients[0].state()
    simulate(clients, server)
    assert same(clients[0].state(), before)
    events = [(entry.client, entry.event) for entry in server.ledger.events()]
    assert events == [("a", "failed"), ("a", "no_answer")]
    assert server.done


def test_clients_that_are_drawn_later_and_have_fewer_tasks():
    own = {"a": [task(1)], "b": [task(2), task(3)], "c": [task(4), task(5), task(6)]}
    for method in ("stl", "scaffold", "fedcurv", "fedprox-ewc"):
        clients, server = build(method, mlp(), own, training=TRAINING, rounds=2, fraction=0.4, seed=3)
        simulate(clients, server)
        assert not server.ledger.events()
        assert server.round == 6


def test_clients_share_a_network_that_nobody_changes():
    net = mlp()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    for method in ("finetune", "stable-sgd"):
        clients, server = build(method, net, tasks_of("ab", 2), training=TRAINING, rounds=1)
        simulate(clients, server)
        assert same(net.state_dict(), before)
        export = clients[0].export(1)
        assert type(export) is nn.Sequential
        x = torch.randn(4, 6)
        assert torch.equal(export(x), clients[0].predict(x, 1))


def test_a_method_there_is_none_of():
    with pytest.raises(UnknownKeyError, match=r"no method 'fedsgd'; .*there are stl, finetune, ewc, apd, stable-sg"):
        federation("fedsgd")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("proximal", -1.0),
        ("ewc_strength", float("nan")),
        ("curvature_strength", float("inf")),
        ("server_lr", 0.0),
        ("sgd_factor", -2.0),
        ("ewc_decay", 1.5),
        ("lr_decay_per_task", 0.0),
        ("dropout", 1.0),
        ("ewc_mode", "both"),
        ("optimizer", "rmsprop"),
        ("lr", 0.0),
        ("epochs", 0),
        ("weight_decay", -1e-4),
    ],
)
def test_numbers_out_of_range(field, value, unchecked):
    with pytest.raises(InputError, match=f"^{field}: "):
        Training(**{field: value})


def test_what_a_federation_needs():
    with pytest.raises(InputError, match="at least one task a client"):
        build("fedavg", mlp(), {"a": []})
    with pytest.raises(InputError, match=r"server_lr: 0\.0"):
        ScaffoldServer({"w": torch.zeros(2)}, {"a": 1}, server_lr=0.0)
    with pytest.raises(InputError, match="choose norm='per-task'"):
        build("fedavg", Convolutional(norm=True), {"a": [task(1)]})


@pytest.mark.parametrize("method", ["fedavg", "apd"])
def test_predictions_need_no_tasks(method):
    clients, server = federation(method)
    simulate(clients, server)
    counts = {client.name: 2 for client in clients}
    again, coordinator = build(method, mlp(), dict.fromkeys(counts, ()), training=TRAINING, rounds=2, counts=counts)
    coordinator.load_state(server.state())
    again[0].load_state(clients[0].state())
    x = torch.randn(5, 6)
    assert torch.equal(again[0].predict(x, 1), clients[0].predict(x, 1))


def test_what_is_known_of_methods():
    fields = {field.name for field in dataclasses.fields(Training)}
    for info in METHODS.values():
        assert info.title
        assert info.description
        assert (info.strength is None) == (not info.grid)
        if info.strength is not None:
            assert info.strength in fields
            assert getattr(Training(), info.strength) in info.grid
            for value in info.grid:
                dataclasses.replace(Training(), **{info.strength: value})


def test_numbers_without_an_axis_stay_a_tasks_own():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.5))
            self.body, self.head = nn.Linear(6, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.head((self.scale * self.body(x)).relu())

    net = Scaled()
    clients, server = build("fedavg", net, tasks_of("ab", 2), training=TRAINING, rounds=1)
    simulate(clients, server)
    assert list(server.base) == ["body.weight", "body.bias"] == list(initial_body(net, Layout.of(net)))
    scales = [float(client.export(number).scale.detach()) for client in clients for number in (0, 1)]
    assert len(set(scales)) == 4
    assert isinstance(clients[0], NetworkClient)
