"""Attention begins at the part that helps: the closed form against leaving out one by one, and whom it chooses."""

from __future__ import annotations

import pytest
import torch
from networks import mlp
from torch.nn import functional

from fedapc.decomposition import DecomposedModel, Layout, initial_base
from fedapc.probing import leave_one_out_error, probe
from fedapc.sparse import SparseTensor


def one_by_one(features, y, classes, ridge):
    """Ridge regression with a constant feature, solved anew without each example."""
    x = features.double() - features.double().mean(0)
    scale = x.square().sum(1).mean()
    x = torch.cat([x / scale.sqrt(), torch.ones(len(x), 1, dtype=torch.float64)], 1)
    wanted = functional.one_hot(y, classes).double() - 1 / classes
    total = 0.0
    for left in range(len(x)):
        kept = [i for i in range(len(x)) if i != left]
        a, b = x[kept], wanted[kept]
        weights = torch.linalg.solve(a.T @ a + ridge * torch.eye(x.shape[1], dtype=torch.float64), a.T @ b)
        total += float((x[left] @ weights - wanted[left]).square().sum())
    return total / len(x)


@pytest.mark.parametrize(("features", "ridge"), [(3, 0.1), (40, 0.1), (5, 2.0)])
def test_leave_one_out_in_closed_form(features, ridge):
    generator = torch.Generator().manual_seed(features)
    y = torch.arange(15) % 3
    x = torch.randn(15, features, generator=generator) + y[:, None]
    assert leave_one_out_error(x, y, 3, ridge) == pytest.approx(one_by_one(x, y, 3, ridge), rel=1e-9)


def test_features_that_are_constant_are_no_help():
    y = torch.arange(12) % 3
    assert leave_one_out_error(torch.ones(12, 4), y, 3) > 0.6


def received(good):
    """A model whose running task has got three parts; number `good` makes features that show the class, none if -1."""
    net = mlp()
    layout = Layout.of(net)
    base = {name: 1e-3 * value for name, value in initial_base(net, layout).items()}
    model = DecomposedModel(net, layout, base, attention_init="probe")
    generator = torch.Generator().manual_seed(1)
    parts = []
    for slot in range(3):
        dense = {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in layout.layers.items()}
        if slot == good:
            dense = {"0.weight": torch.zeros(10, 6), "2.weight": torch.zeros(7, 10)}
            for row in range(3):
                dense["0.weight"][row, row] = dense["2.weight"][row, row] = 2.0
        parts.append({name: SparseTensor.of(value) for name, value in dense.items()})
    model.begin(0, 3, parts, [("a", 0), ("b", 0), ("c", 0)])
    y = torch.arange(60) % 3
    # The first three inputs show the class, beside inputs that vary far more.
    x = torch.cat([functional.one_hot(y, 3).float(), 6 * torch.randn(60, 3, generator=generator)], 1)
    return model, x, y


@pytest.mark.parametrize("good", [0, 1, 2])
def test_finds_the_part_that_helps(good):
    model, x, y = received(good)
    assert probe(model, x, y).tolist() == [float(slot == good) for slot in range(3)]


def test_listens_to_nobody_if_nobody_helps():
    model, x, _ = received(-1)
    y = torch.randint(0, 3, (60,), generator=torch.Generator().manual_seed(2))
    assert probe(model, x, y).tolist() == [0.0, 0.0, 0.0]


def test_leaves_the_attention_as_it_was_and_looks_at_few():
    model, x, y = received(1)
    weights = model.running[1].attention
    with torch.no_grad():
        for value in weights.values():
            value.copy_(torch.tensor([0.1, 0.2, 0.3]))
    again = probe(model, x, y, most=30, seed=3)
    assert again.tolist() == probe(model, x, y, most=30, seed=3).tolist() == [0.0, 1.0, 0.0]
    for value in weights.values():
        assert torch.equal(value.detach(), torch.tensor([0.1, 0.2, 0.3]))
        assert value.requires_grad


def test_features_are_what_enters_the_head():
    model, x, _ = received(1)
    head = model.running[1].own
    logits = functional.linear(model.features(x, 0), head["4.weight"], head["4.bias"])
    torch.testing.assert_close(logits, model(x, task=0))
