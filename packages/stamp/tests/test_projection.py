from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from torch import nn

from stamp.counting import CostModel
from stamp.groups import trace
from stamp.projection import project

NETS = [name for name in zoo.ZOO if name not in ("shuffle",)]


@functools.cache
def priced(name):
    model, x, groups = zoo.traced(name)
    return groups, CostModel.macs(model, groups, x)


def drawn(groups, seed=0, scale=3.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: scale * torch.randn(width, generator=generator, dtype=dtype) for name, width in groups.widths().items()
    }


def least(groups, cost):
    """The share that is left when every channel goes."""
    nothing = {name: torch.zeros(width) for name, width in groups.widths().items()}
    return float(cost.expected(nothing)) / cost.exact({})


def chain(width=8, depth=3):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Linear(5, width), nn.ReLU()]
        for _ in range(depth - 1):
            layers += [nn.Linear(width, width), nn.ReLU()]
        net = nn.Sequential(*layers, nn.Linear(width, 3))
    groups = trace(net, torch.rand(2, 5))
    return groups, CostModel.macs(net, groups, torch.rand(1, 5))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", NETS)
def test_the_budget_holds(name):
    groups, cost = priced(name)
    bottom, full = least(groups, cost), cost.exact({})
    for seed, (budget, temperature) in enumerate(((0.05, 0.1), (0.6, 1.0))):
        for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-6)):
            pi, _ = project(drawn(groups, seed, dtype=dtype), cost, budget, temperature=temperature)
            assert abs(float(cost.expected(pi)) / full - max(budget, bottom)) <= tolerance
            assert all(value.dtype == dtype for value in pi.values())


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    budget=st.floats(0.01, 0.99),
    scale=st.floats(0.01, 100.0),
    temperature=st.floats(0.05, 5.0),
)
def test_the_shift_is_the_root_that_scipy_finds(seed, budget, scale, temperature):
    groups, cost = chain()
    logits = drawn(groups, seed, scale)
    pi, shift = project(logits, cost, budget, temperature=temperature)

    def over(s):
        pi = {k: torch.sigmoid((v - s) / temperature) for k, v in logits.items()}
        return float(cost.expected(pi)) / cost.exact({}) - budget

    flat = torch.cat(list(logits.values()))
    root = brentq(over, float(flat.min()) - 50 * temperature, float(flat.max()) + 50 * temperature, xtol=1e-13)
    assert abs(over(shift)) <= 1e-9
    assert abs(shift - root) <= 1e-6 * max(1.0, abs(root), temperature) or abs(over(root)) <= 1e-8
    for name, value in logits.items():
        assert torch.allclose(pi[name], torch.sigmoid((value - shift) / temperature), atol=1e-12)


def test_a_shift_of_all_logits_changes_nothing():
    groups, cost = priced("resnet")
    logits = drawn(groups)
    first, shift = project(logits, cost, 0.3)
    second, other = project({name: value + 7.5 for name, value in logits.items()}, cost, 0.3)
    assert abs(other - shift - 7.5) <= 1e-8
    assert all(torch.allclose(first[name], second[name], atol=1e-9) for name in first)


def test_more_budget_keeps_more_of_every_channel():
    for name in ("vgg", "mobilenet", "vit-hand"):
        groups, cost = priced(name)
        logits = drawn(groups)
        before = None
        for budget in np.linspace(0.1, 1.0, 5).tolist():
            pi, _ = project(logits, cost, budget)
            if before is not None:
                assert all(bool((pi[key] >= before[key] - 1e-12).all()) for key in pi)
            before = pi


@pytest.mark.parametrize("name", ["vgg", "densenet", "vit-torch"])
def test_out_of_reach_is_as_near_as_can_be(name):
    groups, cost = priced(name)
    logits = drawn(groups)
    for dtype in (torch.float32, torch.float64):
        given_logits = {key: value.to(dtype).requires_grad_() for key, value in logits.items()}
        pi, _ = project(given_logits, cost, 1e-9)
        assert abs(float(cost.expected(pi).detach()) / cost.exact({}) - least(groups, cost)) <= 2e-9
        assert all(bool((value < 1e-4).all()) for value in pi.values())
        torch.cat(list(pi.values())).sum().backward()
        assert all(bool(value.grad.isfinite().all()) for value in given_logits.values())
        given_logits = {key: value.to(dtype).requires_grad_() for key, value in logits.items()}
        pi, _ = project(given_logits, cost, 1.0)
        assert all(bool((value > 1 - 1e-6).all()) for value in pi.values())
        torch.cat(list(pi.values())).sum().backward()
        assert all(bool(value.grad.isfinite().all()) for value in given_logits.values())


@pytest.mark.parametrize("width", [8, 13])
def test_near_temperature_0_the_top_channels_stay(width):
    groups, cost = chain(width)
    logits = drawn(groups, 1)
    flat = torch.cat(list(logits.values()))
    ranked = flat.sort(descending=True).values
    for kept in range(3, len(flat) - 1):
        # A budget exactly at what the best channels cost, where the groups are all populated.
        top = {name: value >= ranked[kept - 1] for name, value in logits.items()}
        share = cost.exact(top) / cost.exact({})
        if not all(bool(mask.any()) for mask in top.values()):
            continue
        gap = float(ranked[kept - 1] - ranked[kept])
        pi, shift = project(logits, cost, share, temperature=gap / 100)
        assert ranked[kept] < shift < ranked[kept - 1]
        for name, mask in top.items():
            assert torch.equal(pi[name] > 0.5, mask)
            assert float((pi[name] - mask.double()).abs().max()) < 1e-6
    # In between, one channel is divided and all others are decided.
    pi, _ = project(logits, cost, 0.4, temperature=1e-4)
    values = torch.cat(list(pi.values()))
    assert int(((values > 1e-6) & (values < 1 - 1e-6)).sum()) <= 1


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ["vgg", "preact", "densenet", "mobilenet", "vit-torch"])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_gradients_are_those_of_the_whole_map(name, temperature):
    groups, cost = priced(name)
    logits = {key: value.requires_grad_() for key, value in drawn(groups, 2, 1.5).items()}
    generator = torch.Generator().manual_seed(5)
    weights = {key: torch.randn(value.shape, generator=generator, dtype=torch.float64) for key, value in logits.items()}

    def loss(values):
        pi, _ = project(values, cost, 0.4, temperature=temperature)
        return sum((weights[key] * pi[key].square()).sum() for key in pi)

    slopes = torch.autograd.grad(loss(logits), list(logits.values()))
    for _ in range(3):
        way = [torch.randn(s.shape, generator=generator, dtype=torch.float64) for s in slopes]
        step = 1e-4
        with torch.no_grad():
            up, down = (
                loss({key: value + sign * step * w for (key, value), w in zip(logits.items(), way, strict=True)})
                for sign in (1, -1)
            )
        wanted = float(up - down) / (2 * step)
        found = sum(float((s * w).sum()) for s, w in zip(slopes, way, strict=True))
        assert abs(found - wanted) <= 1e-4 * max(1.0, abs(wanted))


@pytest.mark.parametrize("name", ["vgg", "bottleneck", "vit-hand", "unet"])
def test_no_step_along_a_gradient_changes_the_expected_cost(name):
    groups, cost = priced(name)
    logits = {key: value.requires_grad_() for key, value in drawn(groups, 3).items()}
    pi, _ = project(logits, cost, 0.35)
    value = cost.expected(pi) / cost.exact({})
    assert abs(float(value.detach()) - 0.35) <= 1e-9
    # The expected cost itself has no gradient: it is the budget, whatever the logits are.
    slopes = torch.autograd.grad(value, list(logits.values()), retain_graph=True)
    assert max(float(s.abs().max()) for s in slopes) <= 1e-12
    # A shift of all logits alike has none either, in any loss.
    loss = sum((p * torch.arange(len(p))).sum() for p in pi.values())
    slopes = torch.autograd.grad(loss, list(logits.values()))
    assert abs(sum(float(s.sum()) for s in slopes)) <= 1e-9 * sum(float(s.abs().sum()) for s in slopes)


def test_gradients_or_none_the_values_are_the_same():
    groups, cost = priced("vgg")
    for dtype in (torch.float32, torch.float64):
        plain = drawn(groups, dtype=dtype)
        wanted, shift = project(plain, cost, 0.3, temperature=0.2)
        found, other = project({k: v.clone().requires_grad_() for k, v in plain.items()}, cost, 0.3, temperature=0.2)
        assert shift == other
        assert all(torch.allclose(found[key], wanted[key], atol=1e-6) for key in wanted)
        with torch.no_grad():
            still, _ = project({k: v.clone().requires_grad_() for k, v in plain.items()}, cost, 0.3, temperature=0.2)
        assert all(torch.equal(still[key], wanted[key]) and not still[key].requires_grad for key in wanted)


def test_some_groups_may_be_left_out():
    groups, cost = priced("vgg")
    logits = drawn(groups)
    name = next(iter(logits))
    rest = {key: value for key, value in logits.items() if key != name}
    pi, _ = project(rest, cost, 0.5)
    assert name not in pi
    whole = pi | {name: torch.ones(groups[name].width)}
    assert abs(float(cost.expected(whole)) / cost.exact({}) - 0.5) <= 1e-9


def test_parameters_are_a_cost_too():
    model, _, groups = zoo.traced("resnet")
    cost = CostModel.parameters(model, groups)
    pi, _ = project(drawn(groups), cost, 0.25)
    assert abs(float(cost.expected(pi)) / cost.exact({}) - 0.25) <= 1e-9
