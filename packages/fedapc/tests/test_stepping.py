"""A client's step against torch's: the optimizer bit for bit, gradients against a graph of the whole objective."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from networks import LEARNING, Convolutional, federation, mlp
from torch import nn
from torch.nn import functional

from fedapc.client import Client
from fedapc.decomposition import DecomposedModel, Layout, initial_base
from fedapc.engine import simulate
from fedapc.objective import l1_norm
from fedapc.sparse import SparseTensor
from fedapc.stepping import Steps

OPTIMIZERS = {
    "fused": lambda groups: torch.optim.Adam(groups, lr=0.01, fused=True),
    "plain": lambda groups: torch.optim.Adam(groups, lr=0.01),
    "amsgrad": lambda groups: torch.optim.Adam(groups, lr=0.01, fused=True, amsgrad=True),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, fused=True),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.01, fused=True),
}


@pytest.mark.parametrize("partly", [False, True])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_steps_have_the_bits_of_the_optimizer(kind, partly):
    random = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=random) for shape in ((7, 5), (33,), (3, 2, 4))]

    def made():
        parameters = [value.clone().requires_grad_() for value in start]
        groups = [
            {"params": parameters[:2], "weight_decay": 0.1},
            {"params": []},
            {"params": parameters[2:], "weight_decay": 0.0, "lr": 0.3},
        ]
        return parameters, OPTIMIZERS[kind](groups)

    (ours, mine), (theirs, other) = made(), made()
    steps = Steps(mine)
    for number in range(6):
        steps.clear()
        other.zero_grad()
        if number == 3:
            mine.param_groups[0]["lr"] = other.param_groups[0]["lr"] = 0.02
        for k, (one, two) in enumerate(zip(ours, theirs, strict=True)):
            if partly and k == 1 and number % 2:
                continue
            slope = torch.randn(one.shape, generator=random)
            one.grad, two.grad = slope, slope.clone()
        steps.take()
        other.step()
        assert all(torch.equal(one, two) for one, two in zip(ours, theirs, strict=True))
    for one, two in zip(ours, theirs, strict=True):
        for name, value in mine.state[one].items():
            assert value is None or torch.equal(value, other.state[two][name])


def running_model(convolutional, mask, transfer, dtype=torch.float64):
    net = copy.deepcopy(Convolutional() if convolutional else mlp()).to(dtype)
    layout = Layout.of(net)
    model = DecomposedModel(
        net, layout, initial_base(net, layout), mask=mask, transfer=transfer, attention_init="scaled"
    )
    random = torch.Generator().manual_seed(3)
    received = [
        {
            name: SparseTensor.of(
                torch.randn(shape, generator=random).to(dtype) * (torch.rand(shape, generator=random) < 0.4)
            )
            for name, shape in layout.layers.items()
        }
        for _ in range(3)
    ]
    model.begin(0, 3, received)
    for base in model.base.values():
        base.requires_grad_()
    return model


def leaves_of(model):
    running = model.running[1]
    found = {f"base {name}": value for name, value in model.base.items()}
    for kind in ("own", "mask", "adaptive", "attention"):
        found |= {f"{kind} {name}": value for name, value in getattr(running, kind).items() if value.requires_grad}
    return found


@pytest.mark.parametrize("transfer", ["learned", "mean"])
@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("convolutional", [True, False])
def test_gradients_by_hand_are_those_of_the_graph(convolutional, mask, transfer):
    model = running_model(convolutional, mask, transfer)
    if mask:
        with torch.no_grad():
            next(iter(model.running[1].mask.values()))[0] = 31.0
    random = torch.Generator().manual_seed(1)
    shape = (9, 2, 8, 8) if convolutional else (9, 6)
    x, y = torch.randn(shape, generator=random, dtype=torch.float64), torch.arange(9) % 3
    loss = functional.cross_entropy(model.run(model.training_weights(), 0, x, training=True), y)
    named = leaves_of(model)
    expected = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    weights, gates = model.leaves()
    functional.cross_entropy(model.run(weights, 0, x, training=True), y).backward()
    model.pull_back(weights, gates)
    for name, leaf in named.items():
        torch.testing.assert_close(leaf.grad, expected[name], msg=lambda text, name=name: f"{name}: {text}")


def objective(client, task, x, y, anchors, slopes, begun):
    """The whole of equation 2.3 as one graph, past tasks one after the other; their L1 norm as at the round's start."""
    learning, model, running = client.learning, client.model, client.model.running[1]
    loss = functional.cross_entropy(model.run(model.training_weights(), task, x, training=True), y)
    loss = loss + learning.sparsity * l1_norm(running.adaptive.values())
    loss = loss + learning.mask_sparsity * l1_norm(running.mask.values())
    for name, base in model.base.items():
        loss = loss + learning.proximal / 2 * (base - begun[name]).square().sum()
        if name in model.compensation:
            loss = loss + learning.sparsity * (slopes[name] * model.compensation[name]).sum()
        for done in model.finished.values():
            opened = done.gates[name].view(-1, 1)
            part = done.adaptive[name].dense()
            moved = part
            if name in model.compensation:
                moved = part - (part != 0) * opened * model.compensation[name]
            change = (base - anchors[name]) * opened + moved - part
            loss = loss + learning.retention / 2 * change.square().sum()
    return loss


@pytest.mark.parametrize("retroactive", ["shared", "none"])
def test_all_that_is_added_by_hand_is_the_objective(retroactive, monkeypatch):
    """Gradients of every step of a third task, as they reach the optimizer."""
    learning = dataclasses.replace(
        LEARNING, retroactive=retroactive, mask_sparsity=0.01, proximal=0.3, epochs=1, attention_init="scaled"
    )
    clients, server = federation(clients=2, tasks=3, rounds=2, learning=learning)
    seen = []
    simulate(clients, server, rounds=5)
    client = clients[0]
    anchors = {name: penalty.base.clone() for name, penalty in client._retention.penalties.items()}
    regularise = Client._regularise

    def checked(self, running, slopes, begun):
        regularise(self, running, slopes, begun)
        if self is not client:
            return
        named = leaves_of(self.model)
        named |= {f"moved {name}": value for name, value in self.model.compensation.items()}
        loss = objective(self, 2, batches[-1][0], batches[-1][1], anchors, slopes, begun)
        expected = torch.autograd.grad(loss, list(named.values()))
        for (name, leaf), slope in zip(named.items(), expected, strict=True):
            torch.testing.assert_close(
                leaf.grad, slope, atol=2e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
            )
        seen.append(len(named))

    batches = []
    loss_of = Client._loss

    def kept(self, running, weights, x, y, task):
        batches.append((x, y))
        return loss_of(self, running, weights, x, y, task)

    monkeypatch.setattr(Client, "_regularise", checked)
    monkeypatch.setattr(Client, "_loss", kept)
    simulate(clients, server, rounds=1)
    # Per layer a base, mask, part, bias and attention; a head of two; with "shared" what past parts moved by.
    assert seen
    assert set(seen) == {12 + 2 * (retroactive == "shared")}


def test_networks_keep_nothing_of_a_run():
    model = running_model(convolutional=False, mask=True, transfer="learned")
    model.run(model.training_weights(), 0, torch.randn(4, 6, dtype=torch.float64), training=True)
    assert all(value.device.type == "meta" for value in model._skeleton.parameters())


def test_a_network_with_tied_weights_runs():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(6, 6)
            self.two = nn.Linear(6, 6)
            self.two.weight = self.one.weight
            self.head = nn.Linear(6, 3)

        def forward(self, x):
            return self.head(self.two(self.one(x)))

    net = Tied()
    layout = Layout.of(net)
    model = DecomposedModel(net, layout, initial_base(net, layout))
    model.begin(0, 3)
    x = torch.randn(4, 6)
    weight = model.weights(0)["one.weight"]
    own = model.running[1].own
    inner = functional.linear(functional.linear(x, weight, own["one.bias"]), weight, own["two.bias"])
    expected = functional.linear(inner, own["head.weight"], own["head.bias"])
    torch.testing.assert_close(model(x, task=0), expected.detach())


def test_a_network_with_a_module_under_two_names_runs():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
            self.two = self.one
            self.head = nn.Linear(6, 3)

        def forward(self, x):
            return self.head(self.two(self.one(x)))

    net = Shared()
    layout = Layout.of(net, norm="per-task")
    model = DecomposedModel(net, layout, initial_base(net, layout))
    model.begin(0, 3)
    model.run(model.training_weights(), 0, torch.randn(4, 6), training=True)
    assert model.running[1].buffers["one.1.num_batches_tracked"] == 2
    x = torch.randn(4, 6)
    torch.testing.assert_close(model(x, task=0), model.export(0)(x))
