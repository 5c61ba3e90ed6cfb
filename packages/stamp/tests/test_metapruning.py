from __future__ import annotations

import copy
import itertools

import pytest
import torch
import zoo
from torch import nn
from torch.func import functional_call

from stamp.counting import CostModel
from stamp.examples import Examples
from stamp.groups import trace
from stamp.metapruning import SCALES, WeightMaker, meta_pruning
from stamp.parameter_masks import layer_weights
from stamp.selection import BudgetError
from stamp.training import accuracy


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def problem(seed=0):
    """A task for a network whose second hidden layer may be narrow."""
    x = torch.randn(600, 6, generator=generator(seed))
    data = Examples(x, (x[:, 0] * x[:, 1] > 0).long(), ("no", "yes"))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Linear(6, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 20), nn.BatchNorm1d(20), nn.ReLU()]
        model = nn.Sequential(*layers, nn.Linear(20, 2))
    groups = trace(model, x[:2])
    return model, groups, data.rows(slice(0, 400)), data.rows(slice(400, 600)), CostModel.macs(model, groups, x[:1])


QUICK = {"steps": 2, "population": 3, "generations": 2, "parents": 2, "batch_size": 8, "hidden": 4}


def test_scales_are_the_authors():
    assert len(SCALES) == 31
    assert (SCALES[0], SCALES[1], SCALES[-1]) == (0.1, 0.13, 1.0)


@pytest.mark.parametrize("name", ["vgg-gap", "preact", "mobilenet", "vit-torch"])
def test_any_network_with_groups(name):
    model, x = zoo.build(name)
    model = model.train()
    groups = trace(model, x)
    classes = model(x).shape[1]
    data = Examples(
        torch.randn(12, *x.shape[1:], generator=generator()), torch.arange(12) % classes, tuple("abcde"[:classes])
    )
    cost = CostModel.macs(model, groups, x[:1])
    before = copy.deepcopy(model.state_dict())
    state = torch.random.get_rng_state()
    found = meta_pruning(model, groups, data, data, cost, 0.6, generator=generator(), **QUICK)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert {key: len(mask) for key, mask in found.keep.items()} == groups.widths()
    assert cost.exact(found.keep) / cost.exact({}) == pytest.approx(found.cost)
    assert found.cost <= 0.6
    assert accuracy(found.network, data) == found.accuracy == max(found.tried.values())
    assert found.network.training
    for width in found.tried:
        keep = {key: torch.arange(n) < w for (key, n), w in zip(groups.widths().items(), width, strict=True)}
        assert cost.exact(keep) <= 0.6 * cost.exact({})
    again = meta_pruning(model, groups, data, data, cost, 0.6, generator=generator(), **QUICK)
    assert again.tried == found.tried
    assert all(torch.equal(again.keep[key], mask) for key, mask in found.keep.items())


@pytest.mark.usefixtures("unchecked")  # for speed: shapes are checked by the others
def test_the_search_finds_what_exhaustion_finds():
    model, groups, train, validation, cost = problem()
    scales = tuple(k / 10 for k in range(1, 11))
    options = {"steps": 30, "scales": scales, "lr": 3e-3, "recalibration": 2}
    everything = meta_pruning(
        model, groups, train, validation, cost, 0.5, generator=generator(), population=60, generations=1, **options
    )

    def fits(pair):
        keep = {name: torch.arange(20) < width for name, width in zip(groups.widths(), pair, strict=True)}
        return cost.exact(keep) <= 0.5 * cost.exact({})

    pairs = [pair for pair in itertools.product(range(2, 21, 2), repeat=2) if fits(pair)]
    # Candidates are shifted up to the budget, so that both widths cannot grow.
    assert set(everything.tried) == {pair for pair in pairs if not fits(tuple(min(width + 2, 20) for width in pair))}
    few = meta_pruning(
        model, groups, train, validation, cost, 0.5, generator=generator(), population=3, generations=8, **options
    )
    assert few.tried.items() <= everything.tried.items()
    assert few.accuracy == everything.accuracy


@pytest.mark.usefixtures("unchecked")  # for speed: shapes are checked by the others
def test_evolution_comes_closer_to_the_best_widths_than_as_many_random_candidates(monkeypatch):
    """Judged by how far widths are from hidden ones of the same cost, in a network of eight layers."""
    layers = [part for _ in range(8) for part in (nn.Linear(30, 30), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(30, 2))
    x = torch.rand(4, 30)
    groups = trace(model, x)
    data = Examples(x, torch.tensor([0, 1, 0, 1]), ("no", "yes"))
    cost = CostModel.macs(model, groups, x[:1])
    target = [6, 24, 9, 27, 6, 24, 9, 27]

    def closeness(network, _):
        found = [layer.out_features for layer in network if isinstance(layer, nn.Linear)][:-1]
        return 1 - sum(abs(a - b) for a, b in zip(found, target, strict=True)) / 240

    monkeypatch.setattr("stamp.metapruning.accuracy", closeness)
    keep = {name: torch.arange(30) < width for name, width in zip(groups.widths(), target, strict=True)}
    budget = cost.exact(keep) / cost.exact({}) + 0.02
    given = model, groups, data, data, cost, budget
    options = {"steps": 0, "hidden": 2, "scales": tuple(k / 10 for k in range(1, 11)), "parents": 4}
    gains = []
    for seed in range(3):
        random, evolved = (
            meta_pruning(*given, generator=generator(seed), population=population, generations=generations, **options)
            for population, generations in ((60, 1), (15, 4))
        )
        assert len(evolved.tried) <= len(random.tried) == 60
        gains.append(evolved.accuracy - random.accuracy)
    assert sum(gains) / 3 > 0.04


@pytest.mark.usefixtures("unchecked")  # for speed: shapes are checked by the others
def test_training_makes_weights_that_work_at_any_width():
    model, groups, train, validation, cost = problem()
    options = {"population": 8, "generations": 2, "recalibration": 2}
    untrained = meta_pruning(model, groups, train, validation, cost, 0.4, generator=generator(), steps=0, **options)
    trained = meta_pruning(
        model, groups, train, validation, cost, 0.4, generator=generator(), steps=200, lr=5e-3, **options
    )
    middle = sorted(trained.tried.values())[len(trained.tried) // 2]
    assert trained.accuracy >= untrained.accuracy + 0.15
    assert middle >= max(untrained.tried.values())
    chosen = {name: int(mask.sum()) for name, mask in trained.keep.items()}
    assert trained.tried[tuple(chosen.values())] == trained.accuracy
    assert trained.network[0].out_features == chosen["0"]


def test_weights_start_near_the_network_and_follow_the_widths():
    model, x, groups = zoo.traced("resnet")
    maker = WeightMaker(model, groups, 8, generator())
    full = dict.fromkeys(groups.widths(), 1.0)
    made = maker(full)
    names = dict(model.named_parameters())
    assert {name: value.shape for name, value in made.items()} == {name: p.shape for name, p in names.items()}
    for name, parameter in names.items():
        off = (made[name] - parameter).detach().abs().max() / parameter.detach().std()
        assert 0 < off < 1 if name in layer_weights(model) else off == 0
    half = maker(full | {"layers.0.conv1": 0.5})
    changed = {name for name in names if not torch.equal(half[name], made[name])}
    assert changed == {"layers.0.conv1.weight", "layers.0.conv2.weight"}
    assert functional_call(model, made, x).isfinite().all()
    slopes = torch.autograd.grad(sum(value.square().sum() for value in made.values()), list(maker.parameters()))
    assert all(bool(slope.any()) for slope in slopes)


def test_channels_are_the_first_or_the_best():
    model, groups, train, validation, cost = problem()
    first = meta_pruning(model, groups, train, validation, cost, 0.5, generator=generator(), **QUICK)
    assert all(torch.equal(mask, torch.arange(20) < mask.sum()) for mask in first.keep.values())
    scores = {name: torch.arange(20.0) for name in groups.widths()}
    last = meta_pruning(model, groups, train, validation, cost, 0.5, generator=generator(), scores=scores, **QUICK)
    assert all(torch.equal(mask, torch.arange(20) >= 20 - mask.sum()) for mask in last.keep.values())


def test_a_budget_that_no_scale_meets():
    model, groups, train, validation, cost = problem()
    with pytest.raises(BudgetError, match=r"budget=0.001 is out of reach: 0.1 of every group's channels") as raised:
        meta_pruning(model, groups, train, validation, cost, 0.001, generator=generator(), **QUICK)
    keep = {name: torch.arange(20) < 2 for name in groups.widths()}
    assert raised.value.smallest == pytest.approx(cost.exact(keep) / cost.exact({}))
