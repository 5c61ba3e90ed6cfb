from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, sparse
from scipy.sparse.linalg import eigsh

from shared_core.errors import InputError
from spectral_mf.sdp import augmented, solve_diagonal

# n, c, f and the SDP's value for A_ij = c sin(1 + i + 2j + ij), b_i = f cos(1 + 3i).
ORACLE = [
    (5, 0.5, 0.3, 5.231681),
    (6, 1.0, 0.5, 14.034468),
    (8, 0.2, 0.2, 5.668937),
    (8, 2.0, 0.5, 46.323467),
    (10, 1.0, 0.0, 29.228902),
    (10, 3.0, 1.0, 96.730415),
]


def oracle(n, c, f):
    i, j = np.meshgrid(np.arange(n), np.arange(n), indexing="ij")
    A = np.triu(c * np.sin(1 + i + 2 * j + i * j), 1)
    return torch.from_numpy(A + A.T)[None], torch.from_numpy(f * np.cos(1 + 3 * np.arange(n)))[None]


def random_matrix(seed, n, scale=1.0, density=1.0):
    rng = np.random.default_rng(seed)
    C = np.triu(scale * rng.normal(size=(n, n)) * (rng.random((n, n)) < density), 1)
    return C + C.T


def grid(rows, columns, seed=0):
    index = np.arange(rows * columns).reshape(rows, columns)
    i = np.concatenate([index[:, :-1].ravel(), index[:-1].ravel()])
    j = np.concatenate([index[:, 1:].ravel(), index[1:].ravel()])
    weight = np.random.default_rng(seed).normal(size=len(i))
    upper = sparse.coo_array((weight, (i, j)), shape=(index.size, index.size))
    return sparse.csr_array(upper + upper.T)


def barrier(C):
    """Another solver: Newton's method on Σ d - μ log det(diag(d) - C) as μ falls; within n μ of the minimum."""
    n = len(C)
    d, mu = np.abs(C).sum(1) + 1.0, 1.0
    while mu > 1e-10 / n:
        for _ in range(60):
            inverse = np.linalg.inv(np.diag(d) - C)
            gradient = 1 - mu * np.diag(inverse)
            step = np.linalg.solve(mu * inverse**2, gradient)
            decrement = math.sqrt(max(gradient @ step, 0) / mu)
            d = d - step / (1 + decrement if decrement > 0.25 else 1.0)
            if decrement < 1e-5:
                break
        mu *= 0.3
    return float(d.sum())


def check_certificate(C, found, slack=1e-8):
    """d is feasible, X is feasible, and the gap is what lies between them."""
    for k in range(len(C)):
        scale = max(1e-300, float(C[k].abs().max()))
        assert float(torch.linalg.eigvalsh(torch.diag(found.d[k]) - C[k])[0]) > -slack * scale
        X = found.factor[k] @ found.factor[k].T
        assert torch.allclose(X.diagonal(), torch.ones(len(X), dtype=X.dtype), atol=1e-12)
        assert float(torch.linalg.eigvalsh(X)[0]) > -1e-10
        between = float(found.d[k].sum() - (C[k] * X).sum())
        assert between == pytest.approx(float(found.gap[k]), abs=1e-8 * scale * len(X))
        assert between > -1e-9 * scale * len(X)


@pytest.mark.parametrize(("n", "c", "f", "total"), ORACLE)
def test_oracle_values_and_certificate(n, c, f, total):
    B = augmented(*oracle(n, c, f))
    found = solve_diagonal(B)
    assert float(found.d.sum()) == pytest.approx(total, abs=1e-6)
    assert float(found.gap) < 1e-6
    check_certificate(B, found)


def test_augmented_puts_the_field_into_the_last_row():
    A, b = oracle(5, 0.5, 0.3)
    B = augmented(A, b)[0]
    assert torch.equal(B[:5, :5], A[0])
    assert torch.equal(B[5], torch.cat([b[0], torch.zeros(1, dtype=torch.float64)]))
    assert torch.equal(B, B.T)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 9), st.sampled_from([0.4, 1.0]))
def test_agrees_with_a_barrier_method(seed, n, density):
    C = random_matrix(seed, n, density=density)
    found = solve_diagonal(torch.from_numpy(C)[None])
    assert float(found.d.sum()) == pytest.approx(barrier(C), abs=1e-6)
    check_certificate(torch.from_numpy(C)[None], found)


def test_agrees_with_a_general_purpose_optimiser():
    """SLSQP on min Σ d with the smallest eigenvalue kept at zero or above."""
    C = random_matrix(3, 4)
    constraint = {"type": "ineq", "fun": lambda d: np.linalg.eigvalsh(np.diag(d) - C)}
    solved = optimize.minimize(
        lambda d: d.sum(), np.abs(C).sum(1) + 0.5, constraints=constraint, options={"ftol": 1e-12, "maxiter": 500}
    )
    assert float(solve_diagonal(torch.from_numpy(C)[None]).d.sum()) == pytest.approx(solved.fun, abs=1e-5)


@pytest.mark.parametrize("density", [1.0, 0.1])
def test_mixing_and_interior_agree_within_their_gaps(density):
    C = torch.from_numpy(random_matrix(1, 60, density=density))[None]
    interior, mixing = solve_diagonal(C, method="interior"), solve_diagonal(C, method="mixing", max_iterations=200)
    assert (interior.method, mixing.method) == ("interior", "mixing")
    check_certificate(C, mixing)
    difference = float(mixing.d.sum() - interior.d.sum())
    assert -float(interior.gap) - 1e-9 <= difference <= float(mixing.gap) + 1e-9
    assert float(mixing.gap) < 0.02 * float(interior.d.sum())


@pytest.mark.parametrize("scale", [1e-300, 1e-12, 1e-6, 1e6, 1e100])
@pytest.mark.parametrize("method", ["interior", "mixing"])
def test_scale_free(scale, method):
    C = torch.from_numpy(random_matrix(0, 8))[None]
    plain = solve_diagonal(C, method=method, max_iterations=100)
    scaled = solve_diagonal(scale * C, method=method, max_iterations=100)
    assert float(scaled.d.sum() / scale) == pytest.approx(float(plain.d.sum()), rel=1e-9)
    assert float(scaled.gap / scale) == pytest.approx(float(plain.gap), rel=1e-2, abs=1e-9)
    assert float(torch.linalg.eigvalsh(torch.diag(scaled.d[0] / scale) - C[0])[0]) > -1e-12


@pytest.mark.parametrize("method", ["interior", "mixing"])
def test_zero_matrix_and_zero_rows(method):
    nothing = solve_diagonal(torch.zeros(2, 3, 3, dtype=torch.float64), method=method)
    assert float(nothing.d.abs().max()) < 1e-300
    assert bool(nothing.factor.isfinite().all())
    C = random_matrix(0, 6)
    C[2], C[:, 2] = 0, 0
    with_zero = torch.from_numpy(C)[None]
    found = solve_diagonal(with_zero, method=method)
    check_certificate(with_zero, found)
    rest = np.delete(np.delete(C, 2, 0), 2, 1)
    assert float(found.d.sum()) == pytest.approx(barrier(rest), abs=1e-5)
    assert solve_diagonal(torch.zeros(1, 1, 1, dtype=torch.float64), method=method).d.shape == (1, 1)


def test_a_pair_needs_its_coupling_twice():
    for value in (0.7, -0.7):
        C = torch.tensor([[[0.0, value], [value, 0.0]]], dtype=torch.float64)
        assert float(solve_diagonal(C).d.sum()) == pytest.approx(1.4, abs=1e-8)


def test_batch_equals_one_by_one():
    C = torch.from_numpy(np.stack([random_matrix(k, 7, scale=10.0 ** (k - 2)) for k in range(5)] + [np.zeros((7, 7))]))
    together = solve_diagonal(C)
    for k in range(len(C)):
        alone = solve_diagonal(C[k : k + 1])
        assert torch.allclose(together.d[k], alone.d[0], rtol=1e-9, atol=1e-300)
        assert float(together.gap[k]) == pytest.approx(float(alone.gap[0]), rel=1e-3, abs=1e-300)
    mixing = solve_diagonal(C, method="mixing", max_iterations=20)
    assert torch.equal(mixing.d[2], solve_diagonal(C[2:3], method="mixing", max_iterations=20).d[0])


def test_gap_of_the_mixing_method_is_not_rounded():
    C = torch.from_numpy(random_matrix(0, 20))[None]
    found = solve_diagonal(C, method="mixing", max_iterations=3)
    exact = float(found.d.sum() - (C[0] * (found.factor[0] @ found.factor[0].T)).sum())
    assert float(found.gap) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("steps", [1, 3, 100])
def test_feasible_and_certified_when_stopped_early(steps):
    C = torch.from_numpy(random_matrix(2, 12))[None]
    for method in ("interior", "mixing"):
        check_certificate(C, solve_diagonal(C, method=method, max_iterations=steps))


def test_sparse_small_and_large():
    small = grid(5, 6)
    dense = torch.from_numpy(small.toarray())[None]
    assert float(solve_diagonal(small).d.sum()) == pytest.approx(float(solve_diagonal(dense).d.sum()), abs=1e-6)
    # Beyond what is made dense: the shift must be proven by elimination. Few sweeps leave much to repair.
    large = grid(50, 100)
    found = solve_diagonal(large, max_iterations=4)
    assert found.method == "mixing"
    d = found.d[0].numpy()
    slack = sparse.diags_array(d) - large
    lowest = eigsh(sparse.csc_array(slack), k=1, sigma=-1e-3, return_eigenvectors=False, v0=np.ones(len(d)))[0]
    assert lowest > -1e-9
    V = found.factor[0].numpy()
    primal = float((V * (large @ V)).sum())
    assert d.sum() - primal == pytest.approx(float(found.gap), rel=1e-9)
    assert 0 < float(found.gap) < 0.1 * d.sum()


def test_bounds_the_largest_energy():
    for n, c, f, _ in ORACLE:
        A, b = oracle(n, c, f)
        X = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * n)
        energies = 0.5 * ((X @ A[0]) * X).sum(1) + X @ b[0]
        assert float(energies.max()) <= 0.5 * float(solve_diagonal(augmented(A, b)).d.sum())


def test_refuses_other_shapes(unchecked):
    with pytest.raises(InputError, match=r"\(models, n, n\)"):
        solve_diagonal(torch.zeros(3, 3, dtype=torch.float64))
