from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import gammaln, logsumexp

from shared_core.errors import InputError
from spectral_mf import low_rank_log_partition
from spectral_mf.low_rank import low_rank, low_rank_factors


def states(n):
    return np.array(list(itertools.product([-1.0, 1.0], repeat=n)))


def brute(V, lam, b):
    X = states(len(b))
    return logsumexp(0.5 * ((X @ V) ** 2) @ np.asarray(lam) + X @ b)


def curie_weiss(n, J, h):
    """log Z for every pair coupled by J and every spin in the field h, by counting the spins that are up."""
    k = np.arange(n + 1)
    log_count = gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)
    return logsumexp(log_count + J / 2 * ((2.0 * k - n) ** 2 - n) + h * (2 * k - n))


def complete(n, J):
    return J * (np.ones((n, n)) - np.eye(n))


def hopfield():
    i = np.arange(12)
    P = np.stack([np.sign(np.sin(1.3 * i + 0.7)), np.sign(np.cos(2.1 * i + 0.2))])
    return P, 0.1 * np.cos(i)


@pytest.mark.parametrize(
    ("n", "J", "h", "value"),
    [
        (10, 0.1, 0.2, 7.994567142),
        (50, 0.02, 0.1, 37.072120239),
        (200, 0.006, 0.0, 144.157880506),
        (200, 0.01, 0.05, 212.614666),
    ],
)
def test_curie_weiss(n, J, h, value):
    truth = curie_weiss(n, J, h)
    assert truth == pytest.approx(value, abs=1e-6)
    found = low_rank_log_partition(np.ones((n, 1)), [J], np.full(n, h), zero_diagonal=True)
    assert found.value == pytest.approx(truth, abs=1e-10)
    assert found.lower <= truth <= found.upper
    from_couplings = low_rank(complete(n, J), np.full(n, h), rank=1)
    assert from_couplings.value == pytest.approx(truth, abs=1e-10)
    assert from_couplings.lower <= truth <= from_couplings.upper


def test_hopfield_of_two_patterns():
    P, b = hopfield()
    beta = 1.2
    truth = brute(P.T, [beta / 12] * 2, b) - 0.5 * beta * 2
    assert truth == pytest.approx(9.407687198, abs=1e-9)
    found = low_rank_log_partition(P.T, [beta / 12] * 2, b, zero_diagonal=True)
    assert found.value == pytest.approx(truth, abs=1e-10)
    W = beta / 12 * P.T @ P
    A = W - np.diag(np.diag(W))
    again = low_rank(A, b, rank=2)
    assert again.value == pytest.approx(truth, abs=1e-10)
    assert again.diagnostics["error_bound"] < 1e-8


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 9), rank=st.integers(1, 2), field=st.sampled_from([0.0, 1.0, 40.0]))
def test_mixed_signs_against_enumeration(seed, n, rank, field):
    rng = np.random.default_rng(seed)
    V, b = rng.normal(size=(n, rank)), field * rng.normal(size=n)
    lam = rng.choice([-1, 1], size=rank) * rng.uniform(0.01, 3, size=rank)
    truth = brute(V, lam, b)
    found = low_rank_log_partition(V, lam, b)
    assert found.lower <= truth <= found.upper
    assert found.value == pytest.approx(truth, abs=1e-8 if found.diagnostics["engine"] == "quadrature" else 1e-3)
    without = low_rank_log_partition(V, lam, b, zero_diagonal=True)
    assert without.value == pytest.approx(found.value - 0.5 * float((lam * (V**2).sum(0)).sum()), abs=1e-9)


@pytest.mark.parametrize("rank", [1, 2])
def test_dynamic_programme_within_its_bound(rank):
    tol = 10.0 ** (-3 + rank)
    for seed in range(6):
        rng = np.random.default_rng(seed)
        V, b = rng.normal(size=(7, rank)), rng.normal(size=7) * (20 if seed == 0 else 1)
        lam = np.array([0.4, -0.5])[:rank] * (1 if seed % 2 else -1)
        truth = brute(V, lam, b)
        found = low_rank_log_partition(V, lam, b, engine="dp", tol=tol)
        assert found.diagnostics["engine"] == "dp"
        assert abs(found.value - truth) <= found.diagnostics["error_bound"] <= tol + 1e-9
        assert found.lower <= truth <= found.upper


def test_where_quadrature_cancels_the_dynamic_programme_takes_over():
    V, lam, b = np.array([[1.0], [0.02], [0.01]]), [-120.0], np.array([0.1, -0.2, 0.3])
    truth = brute(V, lam, b)
    assert truth < -50
    found = low_rank_log_partition(V, lam, b)
    assert found.diagnostics["engine"] == "dp"
    assert found.value == pytest.approx(truth, abs=1e-3)
    assert found.lower <= truth <= found.upper
    forced = low_rank_log_partition(V, lam, b, engine="quadrature")
    assert not abs(forced.value - truth) < 1e-3
    assert forced.lower <= truth <= forced.upper


@pytest.mark.parametrize("strength", [0.8, 1.0, 1.5, -0.5, -50.0])
@pytest.mark.parametrize("field", [0.0, 0.01])
def test_a_hundred_thousand_spins(strength, field):
    n = 10**5
    truth = curie_weiss(n, strength / n, field)
    V = np.ones((n, 1)) / math.sqrt(n)
    found = low_rank_log_partition(V, [strength], np.full(n, field), zero_diagonal=True)
    assert found.value == pytest.approx(truth, abs=1e-8)
    assert found.lower <= truth <= found.upper
    assert found.diagnostics["error_bound"] < 1e-4


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 8), rank=st.integers(1, 2), scale=st.sampled_from([1e-3, 0.3, 2.0]))
def test_couplings_that_are_not_of_low_rank(seed, n, rank, scale):
    rng = np.random.default_rng(seed)
    A = np.triu(scale * rng.normal(size=(n, n)), 1)
    A, b = A + A.T, rng.normal(size=n)
    X = states(n)
    truth = logsumexp(0.5 * np.einsum("si,ij,sj->s", X, A, X) + X @ b)
    found = low_rank(A, b, rank=rank, tol=0.1)
    assert found.lower <= truth <= found.upper


def test_residual_is_what_is_left_of_the_couplings():
    rng = np.random.default_rng(0)
    A = torch.from_numpy(np.triu(rng.normal(size=(6, 6)), 1))
    A = A + A.T
    lam, v, left = low_rank_factors(A, 2)
    rest = (A - (v * lam) @ v.T).triu(1)
    assert left == pytest.approx(float(rest.abs().sum()), rel=1e-12)
    assert torch.allclose(v.T @ v, torch.eye(2, dtype=torch.float64), atol=1e-12)
    P, _ = hopfield()
    W = torch.from_numpy(0.1 * P.T @ P)
    assert low_rank_factors(W - torch.diag(W.diagonal()), 2)[2] < 1e-10
    assert low_rank_factors(torch.zeros(3, 3, dtype=torch.float64), 2)[2] == 0


def test_rank_three_and_more():
    rng = np.random.default_rng(1)
    V, b = rng.normal(size=(6, 3)), rng.normal(size=6)
    for lam in ([0.3, 0.2, 0.1], [0.3, -0.2, 0.1]):
        assert low_rank_log_partition(V, lam, b).value == pytest.approx(brute(V, lam, b), abs=1e-9)
    # A zero eigenvalue costs no dimension.
    V4 = np.concatenate([V, rng.normal(size=(6, 2))], 1)
    found = low_rank_log_partition(V4, [0.3, -0.2, 0.1, 0.0, 0.0], b)
    assert found.value == pytest.approx(brute(V, [0.3, -0.2, 0.1], b), abs=1e-9)
    independent = low_rank_log_partition(V, [0.0] * 3, b)
    assert independent.value == pytest.approx(np.log(2 * np.cosh(b)).sum(), abs=1e-12)


@pytest.mark.parametrize("signs", [[1.0, 1.0], [1.0, -1.0]])
def test_gradients_in_vectors_eigenvalues_and_fields(signs):
    generator = torch.Generator().manual_seed(0)
    V = torch.randn(4, 2, generator=generator, dtype=torch.float64).requires_grad_()
    lam = (torch.tensor(signs, dtype=torch.float64) * torch.tensor([0.4, 0.2])).requires_grad_()
    b = torch.randn(4, generator=generator, dtype=torch.float64).requires_grad_()

    def value(V, lam, b):
        return low_rank_log_partition(V, lam, b, engine="quadrature", zero_diagonal=True).value

    assert torch.autograd.gradcheck(value, (V, lam, b))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_gradients_of_couplings_are_the_exact_moments(sign):
    P, b = hopfield()
    W = torch.from_numpy(sign * 0.1 * P.T @ P)
    A = (W - torch.diag(W.diagonal())).requires_grad_()
    fields = torch.from_numpy(b).requires_grad_()
    found = low_rank(A, fields, rank=2)
    by_couplings, by_fields = torch.autograd.grad(found.value, (A, fields))
    X = states(12)
    p = np.exp(0.5 * np.einsum("si,ij,sj->s", X, A.detach().numpy(), X) + X @ b - float(found.value.detach()))
    assert by_fields.numpy() == pytest.approx(p @ X, abs=1e-9)
    pairs = (X * p[:, None]).T @ X
    # The diagonal moves half of itself, as every spin squared is one.
    assert (2 * by_couplings).numpy() == pytest.approx(pairs, abs=1e-9)


def test_no_gradient_out_of_noise():
    """With the mass 1e-26 of its terms, the quadrature's moments would be noise."""
    v = np.array([1.0, 0.02, 0.02, 0.02, 0.01])
    A = torch.from_numpy(-2e4 * np.outer(v, v))
    A = A - torch.diag(A.diagonal())
    assert abs(low_rank(A, rank=1, tol=1e-2).value) < 1e4
    with pytest.raises(InputError, match="gradients"):
        low_rank(A.requires_grad_(), rank=1, tol=1e-2)


def test_batch_is_its_models():
    A, b = np.stack([complete(6, J) for J in (0.1, -0.3, 0.0)]), np.array([[0.1] * 6, [0.2] * 6, [0.0] * 6])
    together = low_rank(A, b, rank=1)
    for k, J in enumerate((0.1, -0.3, 0.0)):
        assert together.value[k] == pytest.approx(curie_weiss(6, J, b[k, 0]), abs=1e-9)
        assert together.lower[k] <= curie_weiss(6, J, b[k, 0]) <= together.upper[k]


def test_refusals_name_the_size():
    rng = np.random.default_rng(0)
    V, lam = rng.normal(size=(30, 3)), [-1.0, -1.0, -1.0]
    with pytest.raises(InputError, match=r"table of \S+ states .*max_states = 5e\+07"):
        low_rank_log_partition(V, lam, engine="dp", tol=1e-6)
    with pytest.raises(InputError, match=r"nodes x 2000 spins"):
        low_rank_log_partition(rng.normal(size=(2000, 3)), lam, engine="quadrature")
    with pytest.raises(InputError, match="rank must be at least 1"):
        low_rank(complete(3, 0.1), rank=0)
    for tol in (0.0, -1.0):
        with pytest.raises(InputError, match="tol must be positive"):
            low_rank_log_partition(V, lam, tol=tol)
    with pytest.raises(InputError, match=r"V must be \(n, rank\)"):
        low_rank_log_partition(V.T, lam)
    with pytest.raises(InputError, match="length n = 30"):
        low_rank_log_partition(V, lam, np.zeros(3))
    with pytest.raises(InputError, match="not finite"):
        low_rank_log_partition(V, [1.0, math.nan, 1.0])


def test_unknown_engine(unchecked):
    with pytest.raises(InputError, match="choose auto, quadrature or dp"):
        low_rank_log_partition(np.ones((3, 1)), [1.0], engine="fast")
