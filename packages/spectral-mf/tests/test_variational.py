from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, sparse
from torch.autograd import gradcheck

from shared_core.errors import InputError
from spectral_mf._inputs import as_problem
from spectral_mf.variational import fixed_points, free_energy, mean_field


def oracle_instance(n, c, f):
    i, j = np.indices((n, n))
    upper = np.triu(c * np.sin(1 + i + 2 * j + i * j), 1)
    return upper + upper.T, f * np.cos(1 + 3 * np.arange(n))


def draw(seed, models, n, strength, density=1.0, field=1.0):
    rng = np.random.default_rng(seed)
    upper = np.triu(rng.uniform(-strength, strength, (models, n, n)) * (rng.random((models, n, n)) < density), 1)
    return upper + upper.transpose(0, 2, 1), rng.uniform(-field, field, (models, n))


def draw_starts(seed, models, starts, n):
    return torch.from_numpy(np.random.default_rng(seed).uniform(-1, 1, (models, starts, n)))


def brute_force(A, b):
    x = np.array(list(itertools.product([-1.0, 1.0], repeat=len(b))))
    energy = 0.5 * ((x @ A) * x).sum(1) + x @ b
    return energy.max() + math.log(np.exp(energy - energy.max()).sum())


def spin_by_spin(A, b, m, sweeps):
    m = m.copy()
    for count in range(1, sweeps + 1):
        before = m.copy()
        for i in range(len(m)):
            m[i] = math.tanh(b[i] + A[i] @ m)
        if np.abs(m - before).max() < 1e-13:
            return m, count
    return m, sweeps


@pytest.mark.parametrize(
    ("instance", "value"),
    [
        ((5, 0.5, 0.3), 3.685050),
        ((6, 1, 0.5), 7.313091),
        ((8, 0.2, 0.2), 5.675352),
        ((8, 2, 0.5), 19.428021),
        ((10, 1, 0), 6.931472),
        ((10, 3, 1), 33.469735),
    ],
)
def test_from_zero_as_in_the_table(instance, value):
    result = mean_field(*oracle_instance(*instance))
    assert result.value == pytest.approx(value, abs=2e-6)
    assert result.lower <= result.value
    assert result.lower == pytest.approx(result.value, abs=1e-9)


def test_without_fields_one_start_is_n_log_2():
    A, _ = draw(0, 1, 9, 4.0)
    result = mean_field(A[0])
    assert result.value == pytest.approx(9 * math.log(2), abs=1e-14)
    assert bool(result.diagnostics["converged"].all())
    assert (result.marginals == 0).all()


def test_independent_spins_are_exact():
    b = np.array([0.3, -2.0, 40.0, 800.0])
    expected = float(np.logaddexp(b, -b).sum())
    assert mean_field(np.zeros((4, 4)), b).value == pytest.approx(expected, rel=1e-14)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 8),
    strength=st.sampled_from([0.05, 0.5, 2.0, 5.0, 300.0]),
    density=st.sampled_from([0.3, 1.0]),
    starts=st.sampled_from([1, 5]),
    sweeps=st.sampled_from([1, 2, 1000]),
)
def test_lower_bound(seed, n, strength, density, starts, sweeps):
    A, b = draw(seed, 3, n, strength, density)
    result = mean_field(A, b, starts=starts, max_sweeps=sweeps)
    for k in range(3):
        exact = brute_force(A[k], b[k])
        assert result.lower[k] <= exact + 1e-13 * abs(exact)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), strength=st.sampled_from([0.3, 3.0]), corner=st.booleans())
def test_free_energy_is_a_lower_bound_anywhere(seed, strength, corner):
    A, b = draw(seed, 2, 6, strength)
    m = draw_starts(seed, 2, 7, 6)
    m = m.sign() if corner else m
    value = free_energy(as_problem(A, b), m)
    exact = np.array([brute_force(A[k], b[k]) for k in range(2)])
    assert (value.numpy() <= exact[:, None] + 1e-12).all()
    if corner:
        x = m.numpy()
        energy = 0.5 * np.einsum("ksi,kij,ksj->ks", x, A, x) + np.einsum("ki,ksi->ks", b, x)
        np.testing.assert_allclose(value.numpy(), energy, atol=1e-12)


def test_free_energy_gradients():
    A, b = draw(3, 2, 4, 1.0)
    m = 0.9 * draw_starts(1, 2, 3, 4)
    inputs = [torch.from_numpy(v).requires_grad_() for v in (A, b)] + [m.requires_grad_()]
    assert gradcheck(lambda A, b, m: free_energy(as_problem(0.5 * (A + A.mT), b), m), inputs)


def test_value_gradient_is_that_of_the_solved_problem():
    A, b = (torch.from_numpy(v[0]).requires_grad_() for v in draw(4, 1, 5, 0.3))
    assert gradcheck(lambda A, b: mean_field(0.5 * (A + A.mT), b, tol=1e-14).value, [A, b], atol=1e-6)


@pytest.mark.parametrize("density", [0.4, 1.0])
@pytest.mark.parametrize("strength", [0.5, 2.0, 10.0])
def test_fixed_points_are_those_of_plain_sweeps(strength, density):
    A, b = draw(7, 4, 12, strength, density)
    start = draw_starts(8, 4, 10, 12)
    m, converged, sweeps = fixed_points(as_problem(A, b), start, max_sweeps=20000)
    assert bool(converged.all())
    assert bool((sweeps >= 1).all())
    for k, s in itertools.product(range(4), range(10)):
        expected, _ = spin_by_spin(A[k], b[k], start[k, s].numpy(), 20000)
        np.testing.assert_allclose(m[k, s].numpy(), expected, atol=1e-9)


def ferromagnets(strengths, field, n=12):
    A = np.stack([j * (np.ones((n, n)) - np.eye(n)) / (n - 1) for j in strengths])
    return A, np.full((len(strengths), n), field)


# Near the transition plain sweeps need many hundreds; at 1 with a field, starts below zero first have to pass a
# bottleneck without a fixed point, which must not be taken for one.
@pytest.mark.parametrize(
    ("strengths", "field", "saved"), [((0.97, 0.99, 1.03, 1.2), 1e-5, True), ((1.0, 1.01), 1e-5, False)]
)
def test_newton_ends_where_hundreds_of_sweeps_do(strengths, field, saved):
    A, b = ferromagnets(strengths, field)
    models = len(strengths)
    start = draw_starts(2, models, 6, 12)
    m, converged, sweeps = fixed_points(as_problem(A, b), start, max_sweeps=20000)
    assert bool(converged.all())
    # Without Newton: one sweep a call gives it no chance.
    plain, _, _ = fixed_points(as_problem(A, b), start, max_sweeps=1)
    rounds = 1
    while rounds < 20000:
        fresh = plain.numpy().transpose(0, 2, 1).copy()
        for i in range(12):
            fresh[:, i] = np.tanh(b[:, i, None] + np.einsum("kj,kjs->ks", A[:, i], fresh))
        moved = np.abs(fresh.transpose(0, 2, 1) - plain.numpy()).max()
        plain, rounds = torch.from_numpy(fresh.transpose(0, 2, 1).copy()), rounds + 1
        if moved < 1e-13:
            break
    torch.testing.assert_close(m, plain, atol=1e-9, rtol=0)
    assert rounds > 500
    assert not saved or int(sweeps.max()) < 500


def test_sweeps_never_lower_the_free_energy():
    A, b = draw(9, 2, 10, 3.0)
    problem, m = as_problem(A, b), draw_starts(10, 2, 20, 10)
    value = free_energy(problem, m)
    for _ in range(60):
        m = fixed_points(problem, m, max_sweeps=1)[0]
        fresh = free_energy(problem, m)
        assert bool((fresh >= value - 1e-12).all())
        value = fresh


def test_stationary_by_another_optimizer():
    A, b = draw(11, 1, 6, 0.4)
    problem = as_problem(A[0], b[0])

    def negative(h):
        return -float(free_energy(problem, torch.tanh(torch.from_numpy(h))[None, None])[0, 0])

    best = optimize.minimize(negative, np.zeros(6), method="BFGS", options={"gtol": 1e-9})
    assert mean_field(A[0], b[0]).value == pytest.approx(-best.fun, abs=1e-8)


def test_batch_equals_one_by_one():
    A, b = draw(12, 300, 20, 1.0, 0.7)
    start = draw_starts(13, 300, 3, 20)
    problem = as_problem(A, b)
    m, converged, _ = fixed_points(problem, start)
    for k in range(0, 300, 29):
        alone, ended, _ = fixed_points(problem.select(slice(k, k + 1)), start[k : k + 1])
        assert torch.equal(ended[0], converged[k])
        torch.testing.assert_close(alone[0], m[k], atol=1e-8, rtol=0)


def test_sparse_equals_dense_in_the_order_of_the_colours():
    # On a grid the two colours are those of a chess board: dense spins put in that order are swept alike.
    w = 6
    line = sparse.diags_array([np.ones(w - 1)], offsets=[1])
    grid = sparse.coo_array(sparse.kron(sparse.eye_array(w), line) + sparse.kron(line, sparse.eye_array(w)))
    rng = np.random.default_rng(14)
    grid = sparse.coo_array((rng.normal(size=grid.nnz), grid.coords), shape=grid.shape)
    grid = sparse.csr_array(grid + grid.T)
    b = rng.uniform(-0.2, 0.2, w * w)
    start = draw_starts(15, 1, 8, w * w)
    row, column = np.divmod(np.arange(w * w), w)
    order = np.lexsort((np.arange(w * w), (row + column) % 2))
    thin, ended, sweeps = fixed_points(as_problem(grid, b), start)
    dense = as_problem(grid.toarray()[np.ix_(order, order)], b[order])
    full, converged, also = fixed_points(dense, start[:, :, order])
    assert bool(ended.all())
    assert bool(converged.all())
    torch.testing.assert_close(thin[:, :, order], full, atol=1e-8, rtol=0)
    assert torch.equal(sweeps, also)
    torch.testing.assert_close(free_energy(as_problem(grid, b), thin), free_energy(dense, full))


def test_large_sparse_model_stays_sparse():
    n = 20000
    A = sparse.diags_array([np.full(n - 1, 0.4), np.full(n - 1, 0.4)], offsets=[-1, 1])
    result = mean_field(A, np.full(n, 0.1))
    # Far from the ends every spin solves m = tanh(h + 2 J m).
    m = optimize.brentq(lambda m: m - math.tanh(0.1 + 0.8 * m), 0, 1, xtol=1e-14)
    assert result.marginals[n // 2] == pytest.approx(m, abs=1e-8)


def test_gauge_and_permutation():
    A, b = draw(16, 1, 8, 0.3)
    A, b = A[0], b[0]
    rng = np.random.default_rng(17)
    sign, order = rng.choice([-1.0, 1.0], 8), rng.permutation(8)
    plain = mean_field(A, b)
    gauged = mean_field(A * np.outer(sign, sign), b * sign)
    moved = mean_field(A[np.ix_(order, order)], b[order])
    assert gauged.value == pytest.approx(plain.value, abs=1e-12)
    np.testing.assert_allclose(gauged.marginals, sign * plain.marginals, atol=1e-12)
    assert moved.value == pytest.approx(plain.value, abs=1e-9)
    np.testing.assert_allclose(moved.marginals, plain.marginals[order], atol=1e-8)


def test_more_starts_never_lose_and_are_reproducible():
    A, b = draw(18, 5, 12, 4.0)
    one = mean_field(A, b)
    many = mean_field(A, b, starts=20, generator=torch.Generator().manual_seed(3))
    again = mean_field(A, b, starts=20, generator=torch.Generator().manual_seed(3))
    assert (many.value >= one.value - 1e-9).all()
    assert many.value.max() > one.value.max()
    np.testing.assert_array_equal(many.value, again.value)
    assert many.diagnostics["converged"].shape == (5, 20)


def test_constant_is_added():
    A, b = draw(19, 1, 4, 0.5)
    shifted = mean_field(A[0] + np.diag([1.0, 2.0, 3.0, 4.0]), b[0])
    plain = mean_field(A[0], b[0])
    assert shifted.value == pytest.approx(plain.value + 5)
    assert shifted.lower == pytest.approx(plain.lower + 5)


def test_no_convergence_is_said():
    A, b = draw(20, 1, 10, 2.0)
    result = mean_field(A[0], b[0], max_sweeps=1)
    assert not bool(result.diagnostics["converged"].any())
    assert "did not converge" in result.warnings[0]
    assert mean_field(A[0], b[0]).warnings == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"starts": 0}, "starts"), ({"max_sweeps": 0}, "max_sweeps"), ({"tol": 0.0}, "tol"), ({"tol": math.nan}, "tol")],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        mean_field(np.zeros((3, 3)), **options)


@pytest.mark.parametrize("shape", [(1, 4), (2, 1, 4), (1, 1, 3), (1, 0, 4)])
def test_bad_start_shape(shape):
    with pytest.raises(InputError, match="start must be"):
        fixed_points(as_problem(np.zeros((4, 4))), torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("value", [1.1, math.nan])
def test_magnetizations_out_of_range(value):
    m = torch.full((1, 1, 4), value, dtype=torch.float64)
    problem = as_problem(np.zeros((4, 4)))
    with pytest.raises(InputError, match="within"):
        fixed_points(problem, m)
    with pytest.raises(InputError, match="within"):
        free_energy(problem, m)
    with pytest.raises(InputError, match="m must be"):
        free_energy(problem, m[0])
