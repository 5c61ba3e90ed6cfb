from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from shared_core.errors import InputError
from spectral_mf._inputs import as_problem
from spectral_mf.baselines.belief_propagation import belief_propagation, effective_resistance, trw


def oracle_instance(n, c, f):
    i, j = np.indices((n, n))
    upper = np.triu(c * np.sin(1 + i + 2 * j + i * j), 1)
    return upper + upper.T, f * np.cos(1 + 3 * np.arange(n))


def draw(seed, models, n, strength, density=1.0, field=1.0):
    rng = np.random.default_rng(seed)
    upper = np.triu(rng.normal(size=(models, n, n)) * strength * (rng.random((models, n, n)) < density), 1)
    return upper + upper.transpose(0, 2, 1), rng.uniform(-field, field, (models, n))


def draw_forest(seed, n, strength, trees=1):
    rng = np.random.default_rng(seed)
    A = np.zeros((n, n))
    for i in range(trees, n):
        j = rng.integers(0, i)
        A[i, j] = A[j, i] = strength * rng.normal()
    return A, strength * rng.uniform(-1, 1, n)


def brute_force(A, b):
    x = np.array(list(itertools.product([-1.0, 1.0], repeat=len(b))))
    energy = 0.5 * ((x @ A) * x).sum(1) + x @ b
    weight = np.exp(energy - energy.max())
    p = weight / weight.sum()
    return energy.max() + math.log(weight.sum()), p @ x, (x * p[:, None]).T @ x


def as_sparse(A):
    return sparse.csr_array(A)


@pytest.mark.parametrize(
    ("instance", "bethe", "reweighted"),
    [((5, 0.5, 0.3), 4.243504, 5.020196), ((8, 0.2, 0.2), 5.954672, 6.740048)],
)
def test_values_of_the_table(instance, bethe, reweighted):
    model = oracle_instance(*instance)
    assert belief_propagation(*model).value == pytest.approx(bethe, abs=2e-6)
    assert trw(*model).value == pytest.approx(reweighted, abs=2e-6)


@pytest.mark.parametrize("instance", [(6, 1, 0.5), (8, 2, 0.5), (10, 1, 0), (10, 3, 1)])
def test_strong_couplings_bound(instance):
    A, b = oracle_instance(*instance)
    exact = brute_force(A, b)[0]
    result = trw(A, b)
    assert exact <= result.upper
    assert exact <= result.value
    bethe = belief_propagation(A, b)
    assert math.isinf(bethe.upper)
    assert math.isinf(bethe.lower)


def test_closed_forms():
    chain = 0.8 * (np.eye(10, k=1) + np.eye(10, k=-1))
    for method in (belief_propagation, trw):
        assert method(chain).value == pytest.approx(9.548253849, abs=1e-9)
        assert method([[0, 0.7], [0.7, 0]], [0.3, -0.4]).value == pytest.approx(1.666622590, abs=1e-9)
        assert method([[0.0]], [0.4]).value == pytest.approx(math.log(2 * math.cosh(0.4)))
    # Bethe on a ring of ferromagnetic spins without fields, at the messages' fixed point zero.
    ring = 0.3 * np.roll(np.eye(8), 1, 1)
    assert belief_propagation(ring + ring.T).value == pytest.approx(8 * math.log(2 * math.cosh(0.3)), abs=1e-9)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 9),
    strength=st.sampled_from([0.1, 1.0, 5.0, 300.0]),
    trees=st.integers(1, 3),
    held_sparse=st.booleans(),
)
def test_exact_on_forests(seed, n, strength, trees, held_sparse):
    A, b = draw_forest(seed, n, strength, min(trees, n))
    exact, mean, _ = brute_force(A, b)
    for method in (belief_propagation, trw):
        result = method(as_sparse(A) if held_sparse else A, b)
        assert bool(result.diagnostics["converged"].all())
        assert result.value == pytest.approx(exact, abs=1e-8, rel=1e-10)
        np.testing.assert_allclose(result.marginals, mean, atol=1e-8)
        assert exact <= result.upper + 1e-13 * abs(exact)


@pytest.mark.parametrize("method", [belief_propagation, trw])
def test_gradients_are_moments_on_trees(method):
    A, b = (torch.from_numpy(v).requires_grad_() for v in draw_forest(1, 7, 1.0))
    method(A, b).value.backward()
    _, mean, pair = brute_force(A.detach().numpy(), b.detach().numpy())
    np.testing.assert_allclose(b.grad.numpy(), mean, atol=1e-8)
    edge = A.detach().numpy() != 0
    np.testing.assert_allclose(2 * A.grad.numpy()[edge], pair[edge], atol=1e-8)


@pytest.mark.parametrize("method", [belief_propagation, trw])
def test_gradient_of_the_value_on_loops(method):
    A, b = draw(2, 1, 6, 0.3)
    A, b = torch.from_numpy(A[0]), torch.from_numpy(b[0]).requires_grad_()
    assert torch.autograd.gradcheck(lambda b: method(A, b, tol=1e-13).value, [b], atol=1e-6)


@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.parametrize("iterations", [1, 5, 200])
@pytest.mark.parametrize("n", [3, 5, 7])
def test_upper_bound_at_any_messages(n, iterations, density):
    strengths = np.geomspace(0.05, 5, 60)[:, None, None]
    A, b = draw(100 * n + iterations, 60, n, strengths, density)
    b = b * np.random.default_rng(n).choice([0.0, 1.0, 5.0], (60, 1))
    result = trw(A, b, iterations=iterations)
    for k in range(60):
        assert brute_force(A[k], b[k])[0] <= result.upper[k]
    assert (result.value <= result.upper).all()


def test_upper_is_tight_at_convergence_only():
    A, b = draw(3, 1, 6, 0.5)
    early, late = trw(A[0], b[0], iterations=2), trw(A[0], b[0])
    assert late.upper == pytest.approx(late.value, abs=1e-7)
    assert early.upper > early.value + 1e-4


def spanning_trees(n, pairs):
    for tree in itertools.combinations(range(len(pairs)), n - 1):
        root = list(range(n))

        def find(v, root=root):
            while root[v] != v:
                v = root[v]
            return v

        for e in tree:
            root[find(pairs[e][0])] = find(pairs[e][1])
        if len({find(v) for v in range(n)}) == 1:
            yield tree


@pytest.mark.parametrize("seed", range(4))
def test_resistances_count_spanning_trees(seed):
    A = draw(seed, 1, 6, 1.0, 0.7)[0][0] + np.diag(np.ones(5), 1) + np.diag(np.ones(5), -1)
    problem = as_problem(A)
    pairs = list(zip(problem.edges.i.tolist(), problem.edges.j.tolist(), strict=True))
    trees = list(spanning_trees(6, pairs))
    share = [sum(e in tree for tree in trees) / len(trees) for e in range(len(pairs))]
    np.testing.assert_allclose(effective_resistance(problem)[0].numpy(), share, atol=1e-10)


def test_resistances_of_each_model_and_of_large_graphs():
    A, _ = draw(5, 3, 7, 1.0, 0.5)
    A[0] = np.ones((7, 7)) - np.eye(7)
    problem = as_problem(A)
    together = effective_resistance(problem)
    np.testing.assert_allclose(together[0].numpy(), 6 / 21, atol=1e-10)
    for k in range(3):
        alone = effective_resistance(as_problem(A[k]))[0]
        present = problem.edges.weight[k] != 0
        np.testing.assert_allclose(together[k][present].numpy(), alone.numpy(), atol=1e-12)
    # A ring of k edges: each is missing from one of the k trees. Past a thousand spins sparse solves take over.
    k = 1500
    rings = sparse.block_diag(
        [np.roll(np.eye(3), 1, 1), sparse.coo_array((np.ones(k), (np.arange(k), (np.arange(k) + 1) % k)))]
    )
    found = effective_resistance(as_problem(sparse.csr_array(rings + rings.T)))[0].numpy()
    np.testing.assert_allclose(found[:3], 2 / 3, atol=1e-9)
    np.testing.assert_allclose(found[3:], 1 - 1 / k, atol=1e-9)


def test_rho():
    A, b = draw(6, 1, 6, 0.7)
    A, b = A[0], b[0]
    default = trw(A, b)
    assert trw(A, b, rho=5 / 15).value == pytest.approx(default.value, abs=1e-9)
    assert math.isfinite(trw(A, b, rho=5 / 15).upper)
    assert trw(A, b, rho=np.full((6, 6), 0.2)).upper >= brute_force(A, b)[0]
    ones = trw(A, b, rho=1.0)
    assert ones.value == pytest.approx(belief_propagation(A, b).value, abs=1e-7)
    assert math.isinf(ones.upper)
    assert "no upper bound" in ones.warnings[-1]


@pytest.mark.parametrize("method", [belief_propagation, trw])
@pytest.mark.parametrize("density", [0.15, 1.0])
def test_sparse_equals_dense_and_batch_equals_one_by_one(method, density):
    A, b = draw(7, 12, 9, 0.4, density)
    together = method(A, b)
    for k in range(12):
        for form in (A[k], as_sparse(A[k])):
            alone = method(form, b[k])
            assert alone.value == pytest.approx(together.value[k], abs=1e-8)
            assert alone.upper == pytest.approx(together.upper[k], abs=1e-6)
            np.testing.assert_allclose(alone.marginals, together.marginals[k], atol=1e-8)


@pytest.mark.parametrize("method", [belief_propagation, trw])
def test_gauge_and_permutation(method):
    A, b = draw(8, 1, 8, 0.3)
    A, b = A[0], b[0]
    rng = np.random.default_rng(9)
    sign, order = rng.choice([-1.0, 1.0], 8), rng.permutation(8)
    plain, gauged = method(A, b), method(A * np.outer(sign, sign), b * sign)
    moved = method(A[np.ix_(order, order)], b[order])
    assert gauged.value == pytest.approx(plain.value, abs=1e-9)
    assert moved.value == pytest.approx(plain.value, abs=1e-9)
    np.testing.assert_allclose(gauged.marginals, sign * plain.marginals, atol=1e-9)
    np.testing.assert_allclose(moved.marginals, plain.marginals[order], atol=1e-9)


def test_messages_are_the_formula():
    # One undamped update from zero messages: u_ij = atanh(tanh A_ij tanh b_i); the next adds what came in.
    A, b = draw(10, 1, 4, 0.8)
    A, b = A[0], b[0]
    u = np.zeros((4, 4))
    for _ in range(6):
        cavity = (b + u.sum(0))[:, None] - u.T
        u = np.arctanh(np.tanh(A) * np.tanh(cavity))
    result = belief_propagation(A, b, damping=0.0, iterations=7, tol=1e-30)
    np.testing.assert_allclose(result.marginals, np.tanh(b + u.sum(0)), atol=1e-12)


def test_the_value_is_the_bethe_formula_even_before_convergence():
    A, b = draw(11, 1, 4, 0.8)
    A, b = A[0], b[0]
    result = belief_propagation(A, b, damping=0.0, iterations=1)
    # Zero messages: nodes and pairs see the fields only.
    m = np.tanh(b)
    expected = b @ m + sum(-p * math.log(p) for x in m for p in ((1 + x) / 2, (1 - x) / 2))
    for i, j in itertools.combinations(range(4), 2):
        x, y = np.array([[1, 1], [-1, -1]]), np.array([[1, -1], [1, -1]])
        p = np.exp(A[i, j] * x * y + b[i] * x + b[j] * y)
        p /= p.sum()
        expected += A[i, j] * (p * x * y).sum() - (p * np.log(p / np.outer(p.sum(1), p.sum(0)))).sum()
    assert result.value == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("method", [belief_propagation, trw])
def test_no_convergence_is_said(method):
    A, b = draw(12, 2, 6, 0.4)
    A[1] = 0
    result = method(A, b, iterations=3)
    assert result.diagnostics["converged"].tolist() == [False, True]
    assert result.diagnostics["residual"][0] > 1e-3
    assert "1 of 2 models" in result.warnings[0]
    assert method(A, b).warnings == ()


@pytest.mark.parametrize("method", [belief_propagation, trw])
def test_huge_couplings_stay_finite(method):
    A, b = draw(13, 5, 6, 400.0)
    result = method(A, b)
    assert np.isfinite(result.value).all()
    assert (np.abs(result.marginals) <= 1).all()


def test_large_grid_stays_sparse():
    w = 100
    line = sparse.diags_array([np.full(w - 1, 0.2)], offsets=[1])
    grid = sparse.kron(sparse.eye_array(w), line) + sparse.kron(line, sparse.eye_array(w))
    result = belief_propagation(sparse.csr_array(grid + grid.T))
    # Without fields and below the transition the messages are zero.
    expected = w * w * math.log(2) + 2 * w * (w - 1) * math.log(math.cosh(0.2))
    assert result.value == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("method", [belief_propagation, trw])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": 1.0}, "damping"),
        ({"damping": -0.1}, "damping"),
        ({"iterations": 0}, "iterations"),
        ({"tol": 0.0}, "tol"),
    ],
)
def test_bad_options(method, options, message):
    with pytest.raises(InputError, match=message):
        method(np.ones((3, 3)), **options)


@pytest.mark.parametrize(
    ("rho", "message"),
    [
        (0.0, r"rho\[0,1\] is 0"),
        (1.5, r"\(0, 1\]"),
        (math.nan, r"\(0, 1\]"),
        (np.ones(3), "shape"),
        (np.array([[0, 0.5, 0.5], [0.4, 0, 0.5], [0.5, 0.5, 0]]), "symmetric"),
    ],
)
def test_bad_rho(rho, message):
    with pytest.raises(InputError, match=message):
        trw(np.ones((3, 3)) - np.eye(3), rho=rho)
