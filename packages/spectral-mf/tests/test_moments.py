"""Means, pair moments and samples against enumeration."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse

from shared_core.errors import InputError
from spectral_mf import Ising, generate, marginals, pair_moments, sample


def moments(A: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    n = len(b)
    X = 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1) - 1
    energy = 0.5 * ((X @ A) * X).sum(1) + X @ b
    weight = np.exp(energy - np.logaddexp.reduce(energy))
    return weight @ X, (X.T * weight) @ X


@pytest.mark.parametrize(("n", "c", "f"), [(5, 0.5, 0.3), (6, 1.0, 0.5), (8, 0.2, 0.2)])
def test_oracle_marginals(n, c, f):
    i, j = np.arange(n)[:, None], np.arange(n)[None]
    A = np.triu(c * np.sin(1 + i + 2 * j + i * j), 1)
    A, b = A + A.T, f * np.cos(1 + 3 * np.arange(n))
    expected = {
        5: [0.053086, 0.138242, 0.150369, -0.267982, 0.313715],
        6: [0.326994, 0.698282, 0.602897, -0.444526, 0.731594, -0.720558],
        8: [0.101300, 0.080990, 0.197879, -0.139775, 0.220962, -0.215408, 0.230756, -0.162650],
    }[n]
    np.testing.assert_allclose(marginals(A, b), expected, atol=1e-6)
    mean, pairs = moments(A, b)
    np.testing.assert_allclose(marginals(A, b), mean, atol=1e-10)
    np.testing.assert_allclose(pair_moments(A, b), pairs, atol=1e-10)


@pytest.mark.parametrize(
    ("method", "tolerance"),
    [("exact", 1e-9), ("exact_elimination", 1e-9), ("modes", 0.02), ("tap", 0.2), ("ais", 0.1), ("clamp", 0.05),
     ("mean_field", 0.05), ("belief_propagation", 0.005), ("trw", 0.05)],
)  # fmt: skip
def test_every_method_at_weak_coupling(method, tolerance):
    A, b = generate("complete", 9, 0.05, 0)
    mean, pairs = moments(A, b)
    found = marginals(A, b, method=method)
    assert found.shape == (9,)
    np.testing.assert_allclose(found, mean, atol=tolerance)
    if method in ("exact", "exact_elimination", "modes", "tap", "ais"):
        found = pair_moments(A, b, method=method)
        np.testing.assert_allclose(found, pairs, atol=max(tolerance, 1e-9))
        np.testing.assert_allclose(np.diag(found), 1.0)


def test_clamping_beats_mean_field_at_strong_coupling():
    off = {"clamp": 0.0, "mean_field": 0.0}
    for seed in range(5):
        A, b = generate("complete", 10, 0.5, seed)
        mean, _ = moments(A, b)
        for method in off:
            off[method] += float(np.abs(marginals(A, b, method=method) - mean).mean())
    assert off["clamp"] < off["mean_field"]


def test_pairs_without_a_coupling_have_their_moment_too():
    A = np.zeros((6, 6))
    for i in range(5):
        A[i, i + 1] = A[i + 1, i] = 0.8
    b = np.full(6, 0.1)
    _, pairs = moments(A, b)
    for method in ("exact_transfer", "exact_elimination", "exact_rbm", "exact_enumeration"):
        np.testing.assert_allclose(pair_moments(A, b, method=method), pairs, atol=1e-10, err_msg=method)


def test_batches_and_kinds():
    A, b = (np.stack(x) for x in zip(*(generate("complete", 6, 0.3, s) for s in range(3)), strict=True))
    found = marginals(A, b)
    assert found.shape == (3, 6)
    np.testing.assert_allclose(found[1], moments(A[1], b[1])[0], atol=1e-10)
    np.testing.assert_allclose(marginals(A, b, method="clamp")[2], marginals(A[2], b[2], method="clamp"), atol=1e-7)
    assert isinstance(marginals(torch.tensor(A[0]), torch.tensor(b[0])), torch.Tensor)
    assert pair_moments(A, b).shape == (3, 6, 6)
    chain = sparse.diags_array([np.full(99, 0.5), np.full(99, 0.5)], offsets=[-1, 1])
    np.testing.assert_allclose(marginals(chain), 0.0, atol=1e-9)


@pytest.mark.parametrize("size", [(10,), (40, 8), (30, 0)])
def test_samples_follow_the_law(size):
    if len(size) == 1:
        A, b = generate("complete", 10, 0.3, 0)
        tolerance = 0.05
    elif size[1]:
        W = 0.4 * np.random.default_rng(0).normal(size=size)
        n = sum(size)
        A = np.zeros((n, n))
        A[: size[0], size[0] :] = W
        A, b, tolerance = A + A.T, np.linspace(-0.5, 0.5, n), 0.06
    else:
        A, b = generate("complete", 30, 0.05, 0)
        tolerance = 0.08
    k = 5000
    states = sample(A, b, k=k, generator=torch.Generator().manual_seed(1))
    assert states.shape == (k, len(b))
    assert set(np.unique(states)) == {-1.0, 1.0}
    expected = marginals(A, b) if size != (30, 0) else marginals(A, b, method="belief_propagation")
    np.testing.assert_allclose(states.mean(0), expected, atol=tolerance)
    if size == (10,):
        np.testing.assert_allclose(states.T @ states / k, moments(A, b)[1], atol=0.07)


def test_sampling_an_isolated_and_disconnected_bipartite_model():
    A = np.zeros((32, 32))
    for i in range(0, 30, 3):
        A[i, i + 1] = A[i + 1, i] = A[i, i + 2] = A[i + 2, i] = 0.7
    b = np.zeros(32)
    b[31] = 1.0
    states = sample(A, b, k=4000)
    assert abs((states[:, 0] * states[:, 1]).mean() - np.tanh(0.7)) < 0.06
    assert abs(states[:, 31].mean() - np.tanh(1.0)) < 0.05
    assert abs(states[:, 30].mean()) < 0.06


def test_wrong_wishes():
    A, b = generate("complete", 30, 0.5, 0)
    with pytest.raises(InputError, match="gives no marginals"):
        marginals(A, b, method="spectral")
    with pytest.raises(InputError, match="gives no pair moments"):
        pair_moments(A, b, method="belief_propagation")
    with pytest.raises(InputError, match="not affordable"):
        marginals(A, b, method="exact")
    with pytest.raises(InputError, match="no method"):
        Ising(A, b).marginals(method="nothing")
    with pytest.raises(InputError, match="at least 1"):
        sample(A, b, k=0)
