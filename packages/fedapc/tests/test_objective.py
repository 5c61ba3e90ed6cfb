"""The retroactive penalty against loops over past tasks, and the steps that make parts sparse against their minima."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedapc.objective import RetroactivePenalty, l1_norm, proximal_step, soft_threshold
from fedapc.sparse import SparseTensor

SHAPES = ((3, 4), (3, 2, 2, 2))


def case(shape, past=4, seed=0, open_gates=False):
    random = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=random, dtype=torch.float64)

    gates = [None if open_gates else draw(shape[0]).sigmoid() for _ in range(past)]
    parts = [SparseTensor.of(draw(*shape), 0.5) for _ in range(past)]
    return draw(*shape), draw(*shape), gates, parts


def literal(anchor, base, gates, parts, moved):
    """Equation of the specification, one past task after the other, on whole tensors."""
    total = torch.zeros((), dtype=torch.float64)
    for gate, before, after in zip(gates, parts, moved, strict=True):
        shaped = 1.0 if gate is None else gate.view(-1, *[1] * (anchor.ndim - 1))
        r, r_anchor = base * shaped + after.dense(), anchor * shaped + before.dense()
        total = total + 0.5 * (r - r_anchor).square().sum()
    return total


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("open_gates", [False, True])
def test_penalties_are_those_of_the_loop(shape, open_gates):
    anchor, base, gates, parts = case(shape, open_gates=open_gates)
    penalty = RetroactivePenalty.of(anchor, gates, parts)
    torch.testing.assert_close(penalty.frozen(base), literal(anchor, base, gates, parts, parts))
    values = penalty.values + torch.randn(len(penalty.values), dtype=torch.float64)
    torch.testing.assert_close(penalty.joint(base, values), literal(anchor, base, gates, parts, penalty.split(values)))
    moved = torch.randn(shape, dtype=torch.float64)
    shifted = [
        SparseTensor(
            part.index,
            part.values - (1.0 if gate is None else gate[part.rows()]) * moved.reshape(-1)[part.index],
            part.shape,
        )
        for gate, part in zip(gates, parts, strict=True)
    ]
    torch.testing.assert_close(penalty.shared(base, moved), literal(anchor, base, gates, parts, shifted))


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_exact_and_zero_at_the_anchor(shape):
    anchor, base, gates, parts = case(shape)
    penalty = RetroactivePenalty.of(anchor, gates, parts)
    leaves = [base.requires_grad_(), penalty.values.clone().requires_grad_()]
    assert torch.autograd.gradcheck(penalty.joint, leaves)
    assert torch.autograd.gradcheck(penalty.shared, [base, torch.randn(shape, dtype=torch.float64, requires_grad=True)])
    start = [anchor.clone().requires_grad_(), penalty.values.clone().requires_grad_()]
    found = penalty.joint(*start)
    assert found == 0
    assert all(bool((grad == 0).all()) for grad in torch.autograd.grad(found, start))
    start[1] = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    found = penalty.shared(*start)
    assert found == 0
    assert all(bool((grad == 0).all()) for grad in torch.autograd.grad(found, start))


def test_gradient_descent_on_the_entries_is_gradient_descent_on_one_compensation():
    """The claim of the module's docstring, for 30 steps with a base that moves."""
    shape, step = (3, 4), 0.3
    anchor, base, gates, parts = case(shape)
    penalty = RetroactivePenalty.of(anchor, gates, parts)
    values, shared = penalty.values.clone().requires_grad_(), torch.zeros(shape, dtype=torch.float64)
    for number in range(30):
        now = base + 0.1 * number
        (slope,) = torch.autograd.grad(penalty.joint(now, values), values)
        values = (values - step * slope).detach().requires_grad_()
        shared = (1 - step) * shared + step * (now - anchor)
        expected = penalty.values - penalty.gates * shared.reshape(-1)[penalty.index]
        torch.testing.assert_close(values.detach(), expected)
        torch.testing.assert_close(penalty.shared(now, shared), penalty.joint(now, expected))


def test_the_best_compensation_is_the_change_of_the_base():
    anchor, base, gates, parts = case((3, 4))
    penalty = RetroactivePenalty.of(anchor, gates, parts)
    best = (base - anchor).requires_grad_()
    (slope,) = torch.autograd.grad(penalty.shared(base, best), best)
    torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-12, rtol=0)
    full = [SparseTensor.of(torch.ones(3, 4, dtype=torch.float64)) for _ in gates]
    assert RetroactivePenalty.of(anchor, gates, full).shared(base, base - anchor).item() == pytest.approx(0, abs=1e-12)


def test_the_slope_is_that_of_the_norm_of_all_past_parts():
    anchor, _, gates, parts = case((3, 4))
    penalty = RetroactivePenalty.of(anchor, gates, parts)
    moved = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    norm = (penalty.values - penalty.gates * moved.reshape(-1)[penalty.index]).abs().sum()
    torch.testing.assert_close(penalty.shared_l1_slope(moved), torch.autograd.grad(norm, moved)[0])


def test_the_size_of_what_a_step_touches_does_not_depend_on_past_tasks():
    for past in (1, 50):
        anchor, base, gates, parts = case((3, 4), past=past)
        penalty = RetroactivePenalty.of(anchor, gates, parts)
        assert penalty.row_weight.shape == (3,)
        assert penalty.shared_weight.shape == (3, 4)
        graph = penalty.shared(base.clone().requires_grad_(), base).grad_fn
        seen, queue = set(), [graph]
        while queue:
            node = queue.pop()
            if node is not None and node not in seen:
                seen.add(node)
                queue += [parent for parent, _ in node.next_functions]
        assert len(seen) < 20


def test_without_past_tasks_nothing_is_penalised():
    penalty = RetroactivePenalty.of(torch.ones(2, 3), [], [])
    assert penalty.frozen(torch.zeros(2, 3)) == 0
    assert penalty.shared(torch.zeros(2, 3), torch.ones(2, 3)) == 0
    assert penalty.split(torch.zeros(0)) == []


def test_the_subgradient_at_zero_is_zero():
    value = torch.tensor([-2.0, 0.0, 3.0], requires_grad=True)
    found = l1_norm([value, value])
    found.backward()
    assert found == 10
    assert value.grad.tolist() == [-2.0, 0.0, 2.0]


def test_proximal_steps_of_gradient_descent_reach_the_closed_form():
    """Least squares with an orthogonal design: the minimum is the soft-thresholded solution."""
    target = torch.tensor([-2.0, -0.3, 0.05, 0.7])
    value = nn.Parameter(torch.ones(4))
    for kind, steps in ((torch.optim.SGD, 200), (torch.optim.Adam, 1000)):
        optimizer = kind([value], lr=0.1 if kind is torch.optim.SGD else 0.01)
        for _ in range(steps):
            optimizer.zero_grad()
            (0.5 * (value - target).square().sum()).backward()
            optimizer.step()
            proximal_step(optimizer, [value], 0.4)
        expected = soft_threshold(target, 0.4)
        torch.testing.assert_close(value.detach(), expected, atol=2e-3, rtol=0)
        assert value[1] == 0
        assert value[2] == 0


def test_only_what_is_named_is_made_sparse():
    kept, cut = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([kept, cut], lr=1.0)
    proximal_step(optimizer, [cut], 2.0)
    assert kept.tolist() == [1.0, 1.0]
    assert cut.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("open_gates", [False, True])
def test_slopes_by_hand_are_those_of_the_graph(shape, open_gates):
    anchor, base, gates, parts = case(shape, open_gates=open_gates)
    penalty = RetroactivePenalty.of(anchor, gates, parts)
    values = penalty.values + torch.randn(len(penalty.values), dtype=torch.float64)
    moved = torch.randn(shape, dtype=torch.float64)
    for leaf in (base, values, moved):
        leaf.requires_grad_()
    with torch.no_grad():
        found = [penalty.frozen_slope(base), *penalty.joint_slopes(base, values), *penalty.shared_slopes(base, moved)]
    expected = [
        *torch.autograd.grad(penalty.frozen(base), base),
        *torch.autograd.grad(penalty.joint(base, values), (base, values)),
        *torch.autograd.grad(penalty.shared(base, moved), (base, moved)),
    ]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
