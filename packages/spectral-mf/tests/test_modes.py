from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.special import logsumexp

from shared_core.errors import InputError
from spectral_mf import log_partition
from spectral_mf._inputs import as_problem
from spectral_mf.bounds import states_bound
from spectral_mf.mode_sum import find_modes


def modes(A, b=None, **options):
    return log_partition(A, b, method="modes", **options)


def states(n):
    return np.array(list(itertools.product([-1.0, 1.0], repeat=n)))


def brute(A, b):
    X = states(len(b))
    return logsumexp(0.5 * np.einsum("si,ij,sj->s", X, A, X) + X @ b)


def complete(seed, n, strength, field=0.1):
    """Couplings U(-strength, strength) on every pair, fields U(-field, field)."""
    rng = np.random.default_rng(seed)
    A = np.triu(rng.uniform(-strength, strength, (n, n)), 1)
    return A + A.T, rng.uniform(-field, field, n)


def free_energy(A, b, m):
    p = (1 + m) / 2
    entropy = -sum(np.where(q > 0, q * np.log(np.where(q > 0, q, 1)), 0) for q in (p, 1 - p))
    return b @ m + 0.5 * m @ A @ m + entropy.sum()


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("strength", "allowed"), [(0.05, 0.1), (0.25, 0.6), (1.0, 0.2), (3.0, 0.1)])
def test_frustrated_complete_graphs(strength, allowed):
    many = [complete(seed, 12, strength) for seed in range(8)]
    found = modes(np.stack([A for A, _ in many]), np.stack([b for _, b in many]))
    truth = np.array([brute(A, b) for A, b in many])
    assert np.abs(found.value - truth).mean() < allowed
    assert (found.lower <= truth).all()
    if strength >= 1:
        spectral = log_partition(
            np.stack([A for A, _ in many]), np.stack([b for _, b in many]), method="spectral"
        ).value
        assert np.abs(found.value - truth).mean() < 0.25 * np.abs(spectral - truth).mean()


def test_one_mode_is_its_formula():
    A, b = complete(0, 6, 0.2, 0.5)
    m = np.zeros(6)
    for _ in range(500):
        for i in range(6):
            m[i] = math.tanh(b[i] + A[i] @ m)
    root = np.sqrt(1 - m**2)
    by_hand = free_energy(A, b, m) - 0.5 * np.linalg.slogdet(np.eye(6) - root[:, None] * A * root)[1]
    found = modes(A, b)
    assert found.value == pytest.approx(by_hand, abs=1e-9)
    assert found.lower == pytest.approx(free_energy(A, b, m), abs=1e-9)
    assert found.marginals == pytest.approx(m, abs=1e-8)
    assert found.diagnostics["modes"] == 1


def test_both_wells_of_a_symmetric_model():
    A = np.ones((8, 8)) - np.eye(8)
    found = modes(A)
    assert found.diagnostics["modes"] == 2
    assert found.value == pytest.approx(brute(A, np.zeros(8)), abs=1e-4)
    assert found.marginals == pytest.approx(np.zeros(8), abs=1e-9)
    # A field that leaves one well halves what it counts.
    tilted = modes(A, np.full(8, 3.0))
    assert tilted.value == pytest.approx(brute(A, np.full(8, 3.0)), abs=1e-4)
    # A single start finds its mirror image too.
    assert modes(A, starts=1, max_starts=1, roundings=False).diagnostics["modes"] == 2


def test_the_saddle_between_two_wells_does_not_count():
    A = np.array([[0.0, 3.0], [3.0, 0.0]])
    found = modes(A)
    assert found.diagnostics["modes"] == 2
    assert found.value == pytest.approx(brute(A, np.zeros(2)), abs=0.05)


def test_at_a_transition_the_bound_remains():
    """J (n - 1) = 1: the one fixed point m = 0 has an eigenvalue of exactly one and is no stable mode."""
    n = 6
    A = (np.ones((n, n)) - np.eye(n)) / (n - 1)
    found = modes(A)
    assert math.isfinite(found.value)
    assert found.lower <= found.value
    assert found.lower <= brute(A, np.zeros(n))


def test_starts_are_added_until_nothing_new_is_found():
    rng = np.random.default_rng(4)
    A = np.triu(3 * rng.choice([-1.0, 1.0], (24, 24)) * (rng.random((24, 24)) < 0.15), 1)
    A = A + A.T
    options = {"starts": 2, "roundings": False}
    more = modes(A, max_starts=256, generator=seeded(0), **options)
    once = modes(A, max_starts=2, generator=seeded(0), **options)
    # Without fields a start's mirror image is a start as well.
    assert once.diagnostics["starts"] == 4
    assert more.diagnostics["starts"] > 4
    assert more.diagnostics["modes"] > once.diagnostics["modes"]
    assert more.value > once.value
    easy = modes(np.zeros((5, 5)), np.full(5, 0.3), starts=2, max_starts=256)
    assert easy.diagnostics["starts"] == 2
    assert easy.diagnostics["unseen"] <= 0.01


def test_a_seed_gives_one_answer():
    A, b = complete(3, 15, 1.0)
    first, again = (modes(A, b, generator=seeded(4)) for _ in range(2))
    assert first.value == again.value
    assert (first.marginals == again.marginals).all()


def test_batch_is_the_union_of_its_models():
    many = [complete(seed, 10, strength, 0.5) for seed, strength in enumerate((0.1, 1.0, 4.0, 0.0))]
    together = modes(np.stack([A for A, _ in many]), np.stack([b for _, b in many]))
    for k, (A, b) in enumerate(many):
        alone = modes(A, b)
        assert together.value[k] == pytest.approx(alone.value, abs=1e-6)
        assert together.lower[k] == pytest.approx(alone.lower, abs=1e-6)
        assert together.marginals[k] == pytest.approx(alone.marginals, abs=1e-5)


@pytest.mark.parametrize("strength", [0.3, 1.5])
def test_implicit_gradients(strength):
    A, b = (torch.from_numpy(x) for x in complete(5, 4, strength, 0.5))

    def value(couplings, fields):
        symmetric = 0.5 * (couplings + couplings.T)
        return modes(
            symmetric - torch.diag(symmetric.diagonal()), fields, starts=6, max_starts=6, roundings=False
        ).value

    assert torch.autograd.gradcheck(value, (A.requires_grad_(), b.requires_grad_()), eps=1e-5, atol=1e-5, rtol=1e-4)


def test_gradients_in_a_batch_are_each_models_own():
    many = [complete(seed, 5, 1.0, 0.5) for seed in range(3)]
    A, b = (torch.from_numpy(np.stack(x)).requires_grad_() for x in zip(*many, strict=True))
    by_batch = torch.autograd.grad(modes(A, b).value.sum(), (A, b))
    for k in range(3):
        one = (A[k].detach().requires_grad_(), b[k].detach().requires_grad_())
        alone = torch.autograd.grad(modes(*one).value, one)
        for ours, other in zip(by_batch, alone, strict=True):
            assert torch.allclose(ours[k], other, atol=1e-6)


def test_gradients_approach_the_exact_moments_at_strong_coupling():
    A, b = complete(6, 8, 4.0, 0.5)
    couplings, fields = torch.from_numpy(A).requires_grad_(), torch.from_numpy(b).requires_grad_()
    by_couplings, by_fields = torch.autograd.grad(modes(couplings, fields).value, (couplings, fields))
    X = states(8)
    p = np.exp(0.5 * np.einsum("si,ij,sj->s", X, A, X) + X @ b - brute(A, b))
    assert by_fields.numpy() == pytest.approx(p @ X, abs=0.02)
    assert 2 * by_couplings.numpy() == pytest.approx((X * p[:, None]).T @ X, abs=0.02)


@pytest.mark.parametrize("n", [1, 2])
def test_one_and_two_spins(n):
    for scale in (1e-6, 0.3, 20.0):
        A, b = scale * (np.ones((n, n)) - np.eye(n)), np.full(n, 0.4 * scale)
        found = modes(A, b)
        assert found.value == pytest.approx(brute(A, b), abs=0.3)
        assert found.lower <= brute(A, b)


def test_strong_models_do_not_overflow():
    A, b = complete(7, 10, 300.0)
    found = modes(A, b)
    assert found.value == pytest.approx(brute(A, b), abs=1e-6)
    pinned = modes(np.zeros((3, 3)), np.full(3, 900.0))
    assert pinned.value == pytest.approx(2700, abs=1e-9)


def test_found_modes_are_distinct_fixed_points():
    A, b = complete(8, 10, 1.5)
    problem = as_problem(A, b)
    start = 2 * torch.rand(1, 200, 10, generator=seeded(0), dtype=torch.float64) - 1
    found = find_modes(problem, start)
    m = found.m.numpy()
    assert np.tanh(b + m @ A) == pytest.approx(m, abs=1e-8)
    assert int(found.hits.sum()) == 200 == int(found.starts)
    gaps = np.abs(m[:, None] - m[None]).max(-1) + 10 * np.eye(len(m))
    assert gaps.min() >= 1e-3
    assert found.free_energy.numpy() == pytest.approx([free_energy(A, b, x) for x in m], abs=1e-10)
    again = find_modes(problem, start, known=found)
    assert len(again.m) == len(m)
    assert int(again.hits.sum()) == 400
    # The lower bound of their sign patterns, each once.
    signs = np.unique(np.where(m >= 0, 1.0, -1.0), axis=0)
    by_hand = logsumexp(0.5 * np.einsum("si,ij,sj->s", signs, A, signs) + signs @ b)
    assert float(states_bound(problem, found)) == pytest.approx(by_hand, abs=1e-10)


def test_the_constant_and_refusals():
    A, b = complete(9, 5, 0.3)
    assert modes(A + np.eye(5), b).value == pytest.approx(modes(A, b).value + 2.5, abs=1e-9)
    for options in ({"starts": 0}, {"starts": 5, "max_starts": 2}):
        with pytest.raises(InputError, match="at least 1"):
            modes(A, b, **options)
