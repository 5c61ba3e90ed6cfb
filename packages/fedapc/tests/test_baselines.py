"""What methods compute, against their mathematics written a second time."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from networks import LEARNING, Convolutional, mlp, same
from networks import task as examples_of
from torch import nn
from torch.nn import functional

from fedapc import messages, wire
from fedapc.baselines import (
    METHODS,
    ControlVariates,
    CurvatureServer,
    DenseServer,
    ElasticWeights,
    LocalServer,
    NetworkClient,
    ScaffoldServer,
    Training,
    body_layout,
    build,
    diagonal_fisher,
    fisher,
    initial_body,
)
from fedapc.baselines.network import NetworkModel
from fedapc.client import Client
from fedapc.decomposition import Layout, fingerprint, initial_base
from fedapc.engine import simulate
from fedapc.seeds import derive, generator
from fedapc.server import Server
from fedapc.states import description
from fedapc.tasks import Task


def task(seed, examples=16):
    return examples_of(seed, examples=examples)


TRAINING = Training(epochs=2, batch_size=8, lr=2e-3, sgd_factor=20.0, ewc_strength=50.0)


def made(method, tasks=None, training=TRAINING, module=None, **options):
    tasks = {"a": [task(1), task(2)]} if tasks is None else tasks
    clients, server = build(method, module or mlp(), tasks, training=training, **{"rounds": 2, **options})
    return clients, server


def finished(method, tasks=None, training=TRAINING, **options):
    clients, server = made(method, tasks, training, **options)
    simulate(clients, server)
    assert not server.ledger.events()
    return clients, server


def bodies(client):
    return {name: value.clone() for name, value in client.model.base.items()}


def sent_up(server, clients):
    """Run a round and return what every client uploads, by tensor."""
    uploads = {}

    def channel(name, round_, blob):
        tensors = messages.unpack(blob).of_kind("base")[0].tensors
        uploads[name] = {key: wire.decode(part).dense() for key, part in zip(server.base, tensors, strict=True)}
        return [blob]

    simulate(clients, server, rounds=1, channel=channel)
    return uploads


def brought(server, client):
    """Return what the request to a client brings, by tensor."""
    tensors = messages.unpack(server.request(client)).of_kind("base")[0].tensors
    return {key: wire.decode(part).dense() for key, part in zip(server.base, tensors, strict=True)}


def plain_sgd(client, net, data, round_, learning, change=None):
    """Batches in the order of a client, steps written out."""
    body = [name for name, _ in net.named_parameters() if name in client.layout.layers]
    begun = {name: net.get_parameter(name).detach().clone() for name in body}
    for epoch in range(learning.epochs):
        order = torch.randperm(len(data.y), generator=generator(0, client.name, "shuffle", round_, epoch))
        for chosen in order.split(learning.batch_size):
            net.zero_grad()
            functional.cross_entropy(net(data.x[chosen]), data.y[chosen]).backward()
            with torch.no_grad():
                for name, value in net.named_parameters():
                    slope = value.grad
                    if change is not None and name in begun:
                        slope = slope + change(value, begun[name])
                    value -= learning.lr * slope


# Fisher information


def loop_fisher(net, x, y, names):
    total = dict.fromkeys(names, 0.0)
    for one, label in zip(x, y, strict=True):
        net.zero_grad()
        torch.log_softmax(net(one[None]), 1)[0, label].backward()
        total = {name: value + net.get_parameter(name).grad ** 2 for name, value in total.items()}
    return {name: value / len(y) for name, value in total.items()}


@pytest.mark.parametrize("at_once", [700, 2**25])
def test_fisher_information_is_the_mean_of_squares_of_single_gradients(at_once, monkeypatch):
    monkeypatch.setattr(fisher, "_AT_ONCE", at_once)
    torch.manual_seed(0)
    net, x, y = Convolutional(), torch.randn(9, 2, 5, 5), torch.arange(9) % 3
    weights = {name: net.get_parameter(name) for name in ("conv.weight", "conv.bias", "grouped.weight")}
    found = diagonal_fisher(lambda w, x: torch.func.functional_call(net, w, (x,)), weights, x, y)
    for name, expected in loop_fisher(net, x, y, weights).items():
        torch.testing.assert_close(found[name], expected)
        assert not found[name].requires_grad


class Forked(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        features = self.body(x)
        return self.head(features.relu() if float(x.detach().sum()) > 0 else features.tanh())


def test_networks_that_look_at_values_have_fisher_information_too():
    torch.manual_seed(0)
    net, x, y = Forked(), torch.randn(6, 3), torch.arange(6) % 2
    weights = {"body.weight": net.body.weight}
    found = diagonal_fisher(lambda w, x: torch.func.functional_call(net, w, (x,)), weights, x, y)
    torch.testing.assert_close(found, loop_fisher(net, x, y, weights))


# Elastic weight consolidation


@pytest.mark.parametrize("mode", ["separate", "online"])
def test_elastic_penalty_is_the_sum_over_past_tasks(mode):
    torch.manual_seed(1)
    elastic = ElasticWeights(7.0, mode, 0.5)
    importances = [{"w": torch.rand(3, 4, dtype=torch.float64).round(decimals=1)} for _ in range(3)]
    importances[0]["w"][0] = importances[1]["w"][0] = importances[2]["w"][0, :2] = 0
    ends = [{"w": torch.randn(3, 4, dtype=torch.float64)} for _ in range(3)]
    for importance, end in zip(importances, ends, strict=True):
        elastic.end_task(end, lambda found=importance: found)
    at = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    expected = 0.0
    for i in range(3):
        for row in range(3):
            for column in range(4):
                if mode == "separate":
                    weight, anchor = importances[i]["w"][row, column], ends[i]["w"][row, column]
                else:
                    weight, anchor = 0.5 ** (2 - i) * importances[i]["w"][row, column], ends[2]["w"][row, column]
                expected = expected + 7.0 / 2 * weight * (at[row, column] - anchor) ** 2
    penalty = elastic.penalty({"w": at})
    torch.testing.assert_close(penalty, expected)
    torch.testing.assert_close(torch.autograd.grad(penalty, at), torch.autograd.grad(expected, at))
    again = ElasticWeights(7.0, mode, 0.5)
    again.load_state(elastic.state())
    assert torch.equal(again.penalty({"w": at}), penalty)


def test_one_past_task_is_the_same_to_both_kinds_of_elastic_weights():
    online = dataclasses.replace(TRAINING, ewc_mode="online")
    (one,), _ = finished("ewc")
    (other,), _ = finished("ewc", training=online)
    assert same(one.state(), other.state())


def test_a_clients_anchor_is_where_its_task_ended_and_its_fisher_that_of_the_task():
    (client,), server = made("ewc")
    simulate([client], server, rounds=2)
    end, net = bodies(client), client.export(0)
    expected = loop_fisher(net, client.tasks[0].x, client.tasks[0].y, end)
    simulate([client], server, rounds=1)
    state = client.strategy.state()
    for name, value in expected.items():
        assert torch.equal(state[f"anchor/{name}"], end[name])
        torch.testing.assert_close(state[f"importance/{name}"], value, rtol=1e-4, atol=1e-7)


def test_elastic_weights_stay_nearer_and_change_nothing_in_the_first_task():
    (free,), plain = made("finetune")
    (held,), elastic = made("ewc", training=dataclasses.replace(TRAINING, ewc_strength=5000.0))
    simulate([free], plain, rounds=2)
    simulate([held], elastic, rounds=2)
    assert same(bodies(free), bodies(held))
    begun = bodies(free)
    simulate([free], plain)
    simulate([held], elastic)
    moved = [sum(float((bodies(c)[k] - begun[k]).square().sum()) for k in begun) for c in (free, held)]
    assert moved[1] < 0.5 * moved[0]


# Federated averaging


def test_averages_are_weighted_by_examples():
    tasks = {"a": [task(1, examples=9)], "b": [task(2, examples=30)], "c": [task(3, examples=15)]}
    clients, server = made("fedavg", tasks)
    uploads = sent_up(server, clients)
    for name, value in server.base.items():
        parts = [len(own[0].y) * uploads[client][name].numpy().astype(np.float64) for client, own in tasks.items()]
        np.testing.assert_allclose(value.numpy(), sum(parts) / (9 + 30 + 15), rtol=1e-6)
        assert torch.equal(uploads["b"][name], clients[1].model.base[name])


def test_the_body_is_all_but_the_head_in_the_order_of_the_network():
    net = Convolutional(norm=True)
    layout = Layout.of(net, norm="per-task")
    names = ["conv.weight", "conv.bias", "norm.weight", "norm.bias", "grouped.weight"]
    assert list(body_layout(net, layout).layers) == names == list(initial_body(net, layout))
    body, base = initial_body(net, layout, seed=3), initial_base(net, layout, seed=3)
    assert all(torch.equal(body[name], value) for name, value in base.items())
    assert not body["conv.bias"].any()
    assert torch.equal(body["norm.weight"], torch.ones(4))
    pretrained = initial_body(net, layout, how="module")
    assert all(torch.equal(pretrained[name], net.get_parameter(name)) for name in names)


def test_statistics_of_norms_belong_to_a_task_and_what_norms_learn_to_the_body():
    net = Convolutional(norm=True)
    torch.manual_seed(0)
    data = [Task(torch.randn(12, 2, 5, 5) + shift, torch.arange(12) % 3, 3) for shift in (0.0, 4.0)]
    clients, server = finished(
        "fedavg", {"a": data, "b": data}, module=net, layout=Layout.of(net, norm="per-task"), rounds=1
    )
    means = [clients[0].export(number).norm.running_mean for number in (0, 1)]
    assert (means[0] - means[1]).abs().max() > 0.1
    assert not net.norm.running_mean.any()
    assert "norm.running_mean" not in server.base
    assert (server.base["norm.weight"] - 1).abs().max() > 0


@pytest.mark.filterwarnings("ignore::fedapc.errors.SparsityWarning")
def test_fedprox_without_its_term_is_fedavg_bit_for_bit():
    tasks = {"a": [task(1), task(2)], "b": [task(3)]}
    for method, other in (("fedprox", "fedavg"), ("fedprox-ewc", "fedavg-ewc"), ("fedprox-apd", "fedavg-apd")):
        one, first = finished(method, tasks, dataclasses.replace(TRAINING, proximal=0.0))
        two, second = finished(other, tasks)
        assert same(first.state(), second.state())
        assert all(same(a.state(), b.state()) for a, b in zip(one, two, strict=True))


def test_fedprox_holds_clients_near_what_the_round_began_with():
    for method in ("fedprox", "fedprox-ewc", "fedprox-stable-sgd"):
        moved = []
        for proximal in (0.0, 30.0):
            (client,), server = made(method, training=dataclasses.replace(TRAINING, proximal=proximal), rounds=1)
            begun = {name: value.clone() for name, value in server.base.items()}
            simulate([client], server, rounds=1)
            moved.append(sum(float((value - begun[name]).square().sum()) for name, value in bodies(client).items()))
        assert moved[1] < 0.5 * moved[0]


@pytest.mark.parametrize(
    ("method", "other"),
    [("fedavg", "finetune"), ("fedavg-ewc", "ewc"), ("scaffold", "finetune"), ("fedcurv", "finetune")],
)
def test_one_client_of_a_federation_learns_alone_bit_for_bit(method, other):
    training = dataclasses.replace(TRAINING, optimizer="sgd", lr=0.05) if method == "scaffold" else TRAINING
    (one,), _ = finished(method, training=training)
    (two,), _ = finished(other, training=training)
    assert same(bodies(one), bodies(two))
    assert all(torch.equal(one.predict(t.x, k), two.predict(t.x, k)) for k, t in enumerate(one.tasks))


def no_biases():
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Linear(6, 10, bias=False), nn.ReLU(), nn.Linear(10, 7, bias=False), nn.ReLU(), nn.Linear(7, 3)
    )


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_fine_tuning_and_fedapc_with_nothing_of_its_own_are_plain_training_bit_for_bit(optimizer):
    training = dataclasses.replace(TRAINING, weight_decay=0.0, optimizer=optimizer)
    learning = training.plain()
    net, data = no_biases(), [task(1), task(2)]
    (tuned,), _ = finished("finetune", {"a": data}, training, module=net)
    same_client = Client("a", net, data, learning)
    server = Server(initial_base(net, Layout.of(net)), {"a": 2}, rounds=2)
    simulate([same_client], server)
    base = initial_base(net, Layout.of(net))
    for number, examples in enumerate(data):
        twin = Client("a", net, data, learning)
        twin.model.base = base
        twin.model.begin(number, 3, seed=derive(0, "a"))
        plain = twin.export(number).train()
        for round_ in (2 * number, 2 * number + 1):
            kind = torch.optim.Adam if optimizer == "adam" else torch.optim.SGD
            step = kind(plain.parameters(), lr=learning.lr, fused=True)
            for epoch in range(learning.epochs):
                order = torch.randperm(16, generator=generator(0, "a", "shuffle", round_, epoch))
                for chosen in order.split(learning.batch_size):
                    step.zero_grad()
                    functional.cross_entropy(plain(examples.x[chosen]), examples.y[chosen]).backward()
                    step.step()
        base = {name: plain.get_parameter(name).detach().clone() for name in base}
    x = torch.randn(20, 6)
    assert torch.equal(plain.eval()(x), tuned.predict(x, 1))
    assert torch.equal(plain(x), same_client.predict(x, 1))


def test_weights_decay_and_biases_and_heads_do_not():
    training = dataclasses.replace(TRAINING, weight_decay=0.3, optimizer="sgd", lr=0.1, epochs=1, batch_size=16)
    (client,), server = made("finetune", {"a": [task(1)]}, training, rounds=1)
    twin = made("finetune", {"a": [task(1)]}, dataclasses.replace(training, weight_decay=0.0), rounds=1)
    begun = {name: value.clone() for name, value in server.base.items()}
    simulate([client], server)
    simulate(*twin)
    for name, value in twin[0][0].model.base.items():
        decay = 0.3 if name.endswith("weight") else 0.0
        torch.testing.assert_close(client.model.base[name], value - 0.1 * decay * begun[name])
    head = [c.export(0)[4].weight for c in (client, twin[0][0])]
    assert torch.equal(*head)


def test_the_proximal_term_has_the_gradient_mu_times_the_distance():
    learning = dataclasses.replace(
        LEARNING,
        optimizer="sgd",
        lr=0.05,
        proximal=3.0,
        mask=False,
        adaptive=False,
        transfer="none",
        retention=0.0,
        retroactive="none",
        weight_decay=0.0,
        upload_fraction=1.0,
    )
    net, data = mlp(), task(1)
    client = Client("a", net, [data], learning)
    base = initial_base(net, Layout.of(net))
    server = Server(base, {"a": 1}, rounds=2)
    twin = Client("a", net, [data], learning)
    twin.model.base = base
    twin.model.begin(0, 3, seed=derive(0, "a"))
    plain, free = twin.export(0).train(), twin.export(0).train()
    for round_ in range(2):
        plain_sgd(client, plain, data, round_, learning, lambda value, begun: 3.0 * (value - begun))
        plain_sgd(client, free, data, round_, learning)
    simulate([client], server)
    x = torch.randn(20, 6)
    torch.testing.assert_close(client.predict(x, 0), plain.eval()(x))
    assert (client.predict(x, 0) - free.eval()(x)).abs().max() > 1e-3


# SCAFFOLD


def scaffold_on_quadratics(curvature, goals, rounds, lr, server_lr, steps):
    """Algorithm 1 of the paper, option II, as it is printed there."""
    x, c, own = 0.0, 0.0, dict.fromkeys(goals, 0.0)
    for chosen in rounds:
        moves, changes = [], []
        for client in chosen:
            y = x
            for _ in range(steps):
                y = y - lr * (curvature[client] * (y - goals[client]) - own[client] + c)
            new = own[client] - c + (x - y) / (steps * lr)
            moves.append(y - x)
            changes.append(new - own[client])
            own[client] = new
        x = x + server_lr * sum(moves) / len(moves)
        c = c + len(chosen) / len(goals) * sum(changes) / len(changes)
    return x, c, own


def test_scaffold_is_its_algorithm():
    curvature, goals = {"a": 1.0, "b": 3.0, "c": 0.5}, {"a": 2.0, "b": -1.0, "c": 4.0}
    rounds = [("a", "c"), ("a", "b", "c"), ("b", "c"), ("a", "b")]
    x, c, own = scaffold_on_quadratics(curvature, goals, rounds, lr=0.1, server_lr=0.7, steps=4)
    begun = {"w": torch.zeros(1, dtype=torch.float64)}
    server = ScaffoldServer(begun, dict.fromkeys("abc", 1), server_lr=0.7, rounds=4)
    sides = {client: ControlVariates() for client in "abc"}
    layout = fingerprint({"w": (1,), "control/w": (1,)})
    for round_, chosen in enumerate(rounds):
        for client in chosen:
            found = brought(server, client)
            weight = found["w"].clone().requires_grad_()
            sides[client].begin_round({"w": weight}, {"control": {"w": found["control/w"]}})
            for _ in range(4):
                weight.grad = curvature[client] * (weight.detach() - goals[client])
                sides[client].correct({"w": weight}, 0.1)
                with torch.no_grad():
                    weight -= 0.1 * weight.grad
            sides[client].end_round({"w": weight}, dict)
            up = (wire.encode(weight.detach()), wire.encode(sides[client].upload()["control"]["w"]))
            sections = (messages.Section("base", client, 0, up),)
            update = messages.Message("update", client, round_, 0, layout, examples=ord(client), sections=sections)
            assert server.receive(client, messages.pack(update))
        server.close()
    assert float(server.base["w"]) == pytest.approx(x, rel=1e-12)
    assert float(server.base["control/w"]) == pytest.approx(c, rel=1e-12)
    assert {client: float(side.state()["w"]) for client, side in sides.items()} == pytest.approx(own, rel=1e-12)


def test_a_control_variate_is_the_mean_gradient_of_a_round_and_moves_the_next():
    tasks = {"a": [task(1)], "b": [task(2)]}
    training = dataclasses.replace(TRAINING, weight_decay=0.0)
    clients, server = made("scaffold", tasks, training, rounds=3)
    begun = {name: value.clone() for name, value in server.base.items()}
    uploads = sent_up(server, clients)
    way = 4 * training.sgd_factor * training.lr
    body = [name for name in begun if not name.startswith("control/")]
    for name in body:
        for client in "ab":
            met = (begun[name] - uploads[client][name]) / way
            torch.testing.assert_close(uploads[client][f"control/{name}"], met)
        mean = (uploads["a"][f"control/{name}"] + uploads["b"][f"control/{name}"]) / 2
        torch.testing.assert_close(server.base[f"control/{name}"], mean)
    second = {name: value.clone() for name, value in server.base.items()}
    net = clients[0].export(0).train()
    with torch.no_grad():
        for name in body:
            net.get_parameter(name).copy_(second[name])
    shift = {name: second[f"control/{name}"] - uploads["a"][f"control/{name}"] for name in body}
    for epoch in range(training.epochs):
        order = torch.randperm(16, generator=generator(0, "a", "shuffle", 1, epoch))
        for chosen in order.split(8):
            net.zero_grad()
            functional.cross_entropy(net(tasks["a"][0].x[chosen]), tasks["a"][0].y[chosen]).backward()
            with torch.no_grad():
                for name, value in net.named_parameters():
                    value -= training.sgd_factor * training.lr * (value.grad + shift.get(name, 0.0))
    again = sent_up(server, clients)
    for name in body:
        torch.testing.assert_close(again["a"][name], net.get_parameter(name).detach(), rtol=1e-4, atol=1e-6)


# FedCurv


def test_curvature_of_others_is_their_quadratic_penalties_but_for_a_constant():
    tasks = {client: [task(k)] for k, client in enumerate("abc")}
    clients, server = made("fedcurv", tasks, rounds=3)
    uploads = sent_up(server, clients)
    body = [name for name in server.base if "/" not in name]
    net = clients[1].export(0)
    for name, expected in loop_fisher(net, tasks["b"][0].x, tasks["b"][0].y, body).items():
        torch.testing.assert_close(uploads["b"][f"fisher/{name}"], expected, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(uploads["b"][f"weighted/{name}"], expected * net.get_parameter(name).detach())
    found = brought(server, "a")
    clients[0].strategy.begin_round(
        {}, {extra: {name: found[f"{extra}/{name}"] for name in body} for extra in ("fisher", "weighted")}
    )
    differences = []
    for seed in range(3):
        random = torch.Generator().manual_seed(seed)
        at = {name: torch.randn(server.base[name].shape, generator=random).requires_grad_() for name in body}
        penalty = clients[0].strategy.penalty(at)
        expected = sum(
            (uploads[other][f"fisher/{name}"] * (at[name] - uploads[other][name]) ** 2).sum()
            for other in "bc"
            for name in body
        )
        slopes = torch.autograd.grad(penalty, at.values()), torch.autograd.grad(expected, at.values())
        torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-6)
        differences.append(float((expected - penalty).detach()))
    assert differences == pytest.approx([differences[0]] * 3, rel=1e-3)


def test_an_update_that_did_not_come_is_in_no_sum():
    tasks = {client: [task(k)] for k, client in enumerate("abc")}
    clients, server = made("fedcurv", tasks, rounds=2)
    simulate(clients, server, rounds=1, channel=lambda name, round_, blob: [] if name == "b" else [blob])
    found = {client: brought(server, client) for client in "abc"}
    for name in (name for name in server.base if name.startswith("fisher/")):
        # What a sees is that of c, and the other way round; b sees both.
        torch.testing.assert_close(found["b"][name], found["a"][name] + found["c"][name])
        assert all((found[client][name] >= 0).all() for client in "abc")


# Single-task learning and Stable-SGD


def test_tasks_of_single_task_learning_begin_afresh_and_stay_as_they_ended():
    (one,), _ = finished("stl", {"a": [task(1), task(2)]})
    (other,), _ = finished("stl", {"a": [task(5), task(2)]})
    assert same(bodies(one), bodies(other))
    (client,), server = made("stl", {"a": [task(1), task(2)]})
    simulate([client], server, rounds=2)
    x = torch.randn(20, 6)
    before = client.predict(x, 0)
    simulate([client], server)
    assert torch.equal(client.predict(x, 0), before)
    assert torch.equal(client.export(0)(x), before)
    assert torch.equal(one.predict(x, 0), before)
    tuned, _ = finished("finetune", {"a": [task(1), task(2)]})
    assert not torch.equal(tuned[0].predict(x, 0), before)


def test_the_rate_of_stable_sgd_falls_from_task_to_task():
    (client,), server = made("stable-sgd", {"a": [task(k) for k in range(3)]}, rounds=1)
    rates = []
    simulate([client], server, after_round=lambda _: rates.append(description(client.state(), "client")["pace"][0]))
    assert rates == pytest.approx([0.04, 0.04 * 0.8, 0.04 * 0.8**2])
    assert client.learning.optimizer == "sgd"
    big = made("stable-sgd", training=dataclasses.replace(TRAINING, batch_size=100))[0][0]
    assert (big.learning.batch_size, client.learning.batch_size) == (32, 8)


def test_stable_sgd_without_what_makes_it_is_sgd_bit_for_bit():
    training = dataclasses.replace(TRAINING, dropout=0.0, lr_decay_per_task=1.0)
    (one,), _ = finished("stable-sgd", training=training)
    (two,), _ = finished("finetune", training=dataclasses.replace(TRAINING, optimizer="sgd", lr=0.04))
    assert same(bodies(one), bodies(two))


def test_dropout_is_of_hidden_activations_in_training_only_and_never_in_the_users_network():
    net = nn.Sequential(nn.Linear(50, 50, bias=False), nn.Linear(50, 50, bias=False), nn.Linear(50, 50, bias=False))
    layout = Layout.of(net)
    eye = {name: torch.eye(50) for name in body_layout(net, layout).layers}
    x = torch.rand(400, 50) + 1
    for hidden, kept in (((), 0.75), (("1",), 0.75**2)):
        model = NetworkModel(net, body_layout(net, layout), hidden, dropout=0.25)
        model.base = eye
        model.begin(0, 50)
        own = model.running[1].own
        own["2.weight"] = torch.eye(50)
        torch.manual_seed(0)
        found = model.run(eye, 0, x, training=True) / x
        scale = 0.75 ** -(1 + len(hidden))
        assert bool(((found - scale).abs().lt(1e-4) | (found == 0)).all())
        assert float((found != 0).double().mean()) == pytest.approx(kept, abs=0.02)
        torch.testing.assert_close(model.run(eye, 0, x, training=False), x)
        exported = model.export(0).train()
        torch.testing.assert_close(exported(x), x)
    assert all(not part._forward_pre_hooks for part in net.modules())


def test_dropout_of_a_client_enters_at_every_layer_but_the_first():
    net, data = mlp(), task(1)
    clients = [NetworkClient("a", net, [data], TRAINING.plain(), dropout=p, shares=False) for p in (0.0, 0.25)]
    for client in clients:
        simulate([client], LocalServer(initial_body(net, Layout.of(net)), {"a": 1}, rounds=1))
    weights = clients[1].model.weights(0)
    torch.manual_seed(0)
    drawn = clients[1].model.run(weights, 0, data.x, training=True)
    assert not torch.equal(drawn, clients[1].predict(data.x, 0))
    torch.manual_seed(0)
    hidden = functional.dropout(functional.linear(data.x, weights["0.weight"], weights["0.bias"]).relu(), 0.25)
    features = functional.dropout(functional.linear(hidden, weights["2.weight"], weights["2.bias"]).relu(), 0.25)
    head = clients[1].export(0)[4]
    assert torch.equal(drawn, head(features))
    assert not same(bodies(clients[0]), bodies(clients[1]))
    still = clients[0].model.run(clients[0].model.weights(0), 0, data.x, training=True)
    assert torch.equal(still, clients[0].predict(data.x, 0))


# What decomposes weights


@pytest.mark.filterwarnings("ignore::fedapc.errors.SparsityWarning")
@pytest.mark.parametrize(
    ("method", "field", "value"),
    [
        ("fedapc-no-kb", "transfer", "none"),
        ("fedapc-dense", "upload_fraction", 1.0),
        ("fedapc-mean", "transfer", "mean"),
        ("fedapc-no-mask", "mask", False),
        ("fedapc-frozen", "retroactive", "none"),
        ("fedapc-no-retention", "retention", 0.0),
        ("fedavg-apd", "share_adaptive", False),
        ("fedprox-apd", "proximal", 0.25),
        ("apd", "transfer", "none"),
    ],
)
def test_ablations_change_what_they_say_of_the_settings_given(method, field, value):
    learning = dataclasses.replace(LEARNING, sparsity=3e-4)
    training = dataclasses.replace(TRAINING, learning=learning, proximal=0.25)
    (client,), server = made(method, training=training)
    assert getattr(client.learning, field) == value
    assert client.learning.sparsity == 3e-4
    assert server.knowledge.policy == ("none" if "apd" in method or method == "fedapc-no-kb" else "last")
    plain = made("fedapc", training=training)[0][0]
    assert plain.learning == learning


def test_apd_has_no_server_to_speak_of():
    learning = dataclasses.replace(LEARNING, transfer="none", share_adaptive=False)
    (client,), server = made("apd", training=dataclasses.replace(TRAINING, learning=learning))
    simulate([client], server)
    alone = Client("a", mlp(), client.tasks, dataclasses.replace(learning, upload_fraction=1.0))
    simulate([alone], Server(initial_base(mlp(), Layout.of(mlp())), {"a": 2}, rounds=2, kb_policy="none"))
    x = torch.randn(20, 6)
    # One client whose base comes back in full is the same as one that keeps its own.
    assert all(torch.equal(client.predict(x, k), alone.predict(x, k)) for k in (0, 1))


def test_kinds_of_servers():
    kinds = {"local": LocalServer, "federated": Server}
    for method, info in METHODS.items():
        server = made(method, training=dataclasses.replace(TRAINING, lr=5e-4))[1]
        assert isinstance(server, kinds[info.kind])
        assert isinstance(server, LocalServer) == (info.kind == "local")
    assert type(made("fedprox-ewc")[1]) is DenseServer
    assert type(made("fedcurv")[1]) is CurvatureServer
