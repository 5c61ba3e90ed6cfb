"""The account of an adaptation, against sums over its parts and the posterior itself."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from bayes_taml.explanation import balance_table, counterfactual, explain
from bayes_taml.learner import MetaLearner
from bayes_taml.methods import METHODS
from bayes_taml.networks import BatchStatistics, conv_features
from bayes_taml.ragged import Tasks
from shared_core.errors import InputError

NAMES = ["ant", "bee", "cat"]
MAML = [name for name, method in METHODS.items() if method.algorithm == "maml"]


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def data(counts=(1, 4, 2), seed=0):
    random = torch.Generator().manual_seed(seed)
    y = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    y = y[torch.randperm(len(y), generator=random)]
    return torch.randn(len(y), 4, generator=random) + y.unsqueeze(1), y


def smooth() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), BatchStatistics(5), nn.Tanh(), nn.Linear(5, 3))


def learner(method="bayesian-taml", net=None, **options) -> MetaLearner:
    plain = {"input_shape": (4,), "inner_lr": 0.2, "test_steps": 3, "max_shot": 5}
    made = MetaLearner(smooth() if net is None else net, method, **{**plain, **options})
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in made.parameters().items():
            if name.startswith("inference"):
                p.add_(0.7 * torch.randn(p.shape, generator=random) / max(1, p[:1].numel()) ** 0.5)
    return made


@pytest.mark.parametrize("method", MAML)
def test_an_account_adds_up(method):
    made, (x, y) = learner(method), data()
    found = explain(made, x, [NAMES[k] for k in y], draws=50)
    assert found.class_names == tuple(NAMES)
    assert found.counts.tolist() == [1, 4, 2]
    assert found.omega.sum() == pytest.approx(1)
    assert found.pull.sum() == pytest.approx(1)
    assert (found.pull > 0).all()
    assert found.layers == ("0", "3", "head")
    assert found.class_loss.shape == (4, 3)
    assert np.isfinite(found.moved[:2]).all()
    assert (found.moved[:2] > 0).all()
    if METHODS[method].head == "zero":
        assert np.isnan(found.moved[2])
        np.testing.assert_allclose(found.class_loss[0], np.log(3))
    else:
        assert found.moved[2] > 0
    points = not (METHODS[method].balance and METHODS[method].bayes)
    for name in ("omega", "gamma"):
        low, value, high = (getattr(found, name + end) for end in ("_low", "", "_high"))
        sampled = not points and name in METHODS[method].balance
        assert ((low < value) & (value < high)).all() == sampled
        assert sampled or (np.array_equal(low, value) and np.array_equal(high, value))
    assert set(found.kl) == (set(METHODS[method].balance) if METHODS[method].bayes else set())
    assert (found.z_size > 0).all() == ("z" in METHODS[method].balance)
    told = json.loads(json.dumps(found.record()))
    assert told["classes"] == NAMES
    assert told["moved"][2] is None or METHODS[method].head == "proto"
    text = found.text()
    assert all(name in text for name in (*NAMES, "head", "examples"))
    assert ("from zero" in text) == (METHODS[method].head == "zero")


def test_values_are_those_of_the_posterior():
    made, (x, y) = learner(), data()
    found = explain(made, x, y, draws=4000)
    task, _ = made.task_of(x, y)
    posterior = made.posterior(task)
    mean = {name: v[0].detach() for name, v in posterior.mean.items()}
    deviation = {name: v[0].detach() for name, v in posterior.deviation.items()}
    np.testing.assert_allclose(found.omega, torch.softmax(mean["omega"], 0))
    np.testing.assert_allclose(found.gamma, mean["gamma"].exp())
    # Quantiles of a log-normal, which a growing function has from those of the normal.
    np.testing.assert_allclose(np.log(found.gamma_low), mean["gamma"] - 1.96 * deviation["gamma"], atol=0.12)
    np.testing.assert_allclose(np.log(found.gamma_high), mean["gamma"] + 1.96 * deviation["gamma"], atol=0.12)
    for name, value in found.kl.items():
        assert value == pytest.approx(posterior.kl_by_variable()[name].item())
    sizes = {name: mean["z"][at].square() for name, at in made.model.slices().items()}
    for k, layer in enumerate(("0", "3")):
        whole = torch.cat([sizes[f"{layer}.weight"], sizes[f"{layer}.bias"]])
        assert found.z_size[k] == pytest.approx(whole.mean().sqrt().item())


def test_the_way_is_that_of_gradient_steps():
    """Meta-SGD at one step size, in a loop: losses by class, shares of the gradient, distances."""
    made, (x, y) = learner("maml"), data()
    found = explain(made, x, y)
    net = smooth()
    weight, bias = torch.zeros(3, 3, requires_grad=True), torch.zeros(3, requires_grad=True)
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    moving = {name: p for name, p in net.named_parameters() if not name.startswith("1.")}
    pull, losses = torch.zeros(3), []
    for step in range(4):
        each = functional.cross_entropy(functional.linear(net(x), weight, bias), y, reduction="none")
        losses.append(torch.stack([each[y == c].mean() for c in range(3)]).detach())
        if step == 3:
            break
        leaves = [*moving.values(), weight, bias]
        for c in range(3):
            parts = torch.autograd.grad(each[y == c].sum() / len(y), leaves, retain_graph=True)
            pull[c] += torch.cat([g.flatten() for g in parts]).norm()
        for leaf, gradient in zip(leaves, torch.autograd.grad(each.mean(), leaves), strict=True):
            with torch.no_grad():
                leaf -= 0.2 * gradient
    np.testing.assert_allclose(found.class_loss, torch.stack(losses), rtol=1e-8)
    np.testing.assert_allclose(found.pull, pull / pull.sum(), rtol=1e-8)
    for k, layer in enumerate(("0", "3")):
        names = [name for name in moving if name.startswith(layer)]
        moved = torch.cat([(moving[n].detach() - start[n]).flatten() for n in names]).norm()
        size = torch.cat([start[n].flatten() for n in names]).norm()
        assert found.moved[k] == pytest.approx((moved / size).item(), rel=1e-8)


def test_the_pull_is_weighted():
    """In the first step from a zero head a class's pull is in proportion to its weight in the loss."""
    x, y = data()
    even, inverse = explain(learner("maml"), x, y, steps=1), explain(learner("metasgd-inverse"), x, y, steps=1)
    ratio = inverse.pull / even.pull * [1, 4, 2]
    np.testing.assert_allclose(ratio, ratio[0])
    np.testing.assert_allclose(inverse.omega, np.array([1, 1 / 4, 1 / 2]) / 1.75)
    assert explain(learner("maml"), x, y, steps=0).pull.tolist() == [1 / 3] * 3


def test_the_rule_for_steps_is_told():
    made, (x, y) = learner("gamma-rule"), data()
    with torch.no_grad():
        made.log_kappa.fill_(np.log(3.0))
    np.testing.assert_allclose(explain(made, x, y).gamma, 7 / 10)


def test_modulation_of_normalisations_counts_for_their_layer():
    made = learner(net=conv_features(size=8, filters=3, blocks=2, norm="film", init="kaiming"), input_shape=(1, 8, 8))
    x, y = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(1)), [0, 0, 1, 1, 1]
    found = explain(made, x, y, draws=5)
    z = made.posterior(made.task_of(x, y)[0]).mean["z"][0].detach()
    for k in range(2):
        own = torch.cat([z[made.model.slices()[f"conv{k + 1}.norm.{part}"]] for part in ("weight", "bias")])
        assert found.z_size[k] == pytest.approx(own.square().mean().sqrt().item())


def test_explaining_changes_nothing():
    made, (x, y) = learner(), data()
    before = {name: p.detach().clone() for name, p in made.parameters().items()}
    one, two = explain(made, x, y, draws=20), explain(made, x, y, draws=20)
    assert all(torch.equal(before[name], p) for name, p in made.parameters().items())
    assert all(p.grad is None for p in made.parameters().values())
    assert one.record() == two.record()


def test_a_counterfactual_at_the_true_number_is_what_is():
    made, (x, y) = learner(), data()
    names = [NAMES[k] for k in y]
    plain = explain(made, x, names, draws=5)
    found = counterfactual(made, x, names, "bee", [1, 4, 9])
    assert [f.count for f in found] == [1, 4, 9]
    np.testing.assert_allclose(found[1].omega, plain.omega)
    np.testing.assert_allclose(found[1].gamma, plain.gamma)
    for k in (0, 2):
        assert found[k].omega.sum() == pytest.approx(1)
        assert not np.allclose(found[k].omega, plain.omega)
        assert not np.allclose(found[k].gamma, plain.gamma)


def test_a_counterfactual_of_another_number_is_an_encoder_told_so():
    made, (x, y) = learner(), data()
    task, _ = made.task_of(x, y)
    told = made.posterior(task, lambda counts: torch.tensor([[1, 4, 5]]))
    (found,) = counterfactual(made, x, y, 2, [5])
    np.testing.assert_allclose(found.omega, torch.softmax(told.mean["omega"][0], 0).detach())
    np.testing.assert_allclose(found.gamma, told.mean["gamma"][0].exp().detach())


class Three:
    """Tasks of three classes."""

    def batch(self, number, count):
        made = []
        for k in range(number * count, (number + 1) * count):
            x, y = data((1 + k % 3, 2, 1 + k % 4), seed=k)
            made.append((x, y, x, y))
        return Tasks.collate(made, 3)


@pytest.mark.parametrize("method", ["bayesian-taml", "metasgd", "omega-taml", "gamma-rule"])
def test_a_table_has_an_entry_for_each_class_of_each_task(method):
    made = learner(method)
    table = balance_table(made, Three(), tasks=7, batch=3)
    assert {name: v.shape for name, v in table.items()} == {
        "count": (21,), "omega": (21,), "size": (7,), "gamma": (7, 3)}  # fmt: skip
    np.testing.assert_array_equal(table["count"].reshape(7, 3).sum(1), table["size"])
    np.testing.assert_allclose(table["omega"].reshape(7, 3).sum(1), 1)
    for k in (0, 6):
        x, y = data((1 + k % 3, 2, 1 + k % 4), seed=k)
        own = explain(made, x, y, draws=2)
        np.testing.assert_allclose(table["omega"].reshape(7, 3)[k], own.omega)
        np.testing.assert_allclose(table["gamma"][k], own.gamma)
        assert table["count"].reshape(7, 3)[k].tolist() == own.counts.tolist()


def test_what_cannot_be_explained_is_refused():
    x, y = data()
    for method in ("protonet", "scratch"):
        with pytest.raises(InputError, match=f"'{method}' takes no weighted steps"):
            explain(learner(method), x, y)
    with pytest.raises(InputError, match="label: no class 7 in the support"):
        counterfactual(learner(), x, y, 7, [1])
    with pytest.raises(InputError, match="'metasgd' infers nothing"):
        counterfactual(learner("metasgd"), x, y, 1, [1])
