from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from scipy.special import logsumexp

from shared_core.errors import InputError
from spectral_mf.baselines.exact import exact_enumeration
from spectral_mf.baselines.mini_bucket import mini_bucket, weighted_mini_bucket

METHODS = (mini_bucket, weighted_mini_bucket)


def brute(A, b):
    X = np.array(list(itertools.product([-1.0, 1.0], repeat=len(b))))
    return logsumexp(0.5 * np.einsum("si,ij,sj->s", X, A, X) + X @ b)


def model(seed, n, scale=1.0, density=1.0):
    rng = np.random.default_rng(seed)
    A = np.triu(scale * rng.normal(size=(n, n)) * (rng.random((n, n)) < density), 1)
    return A + A.T, rng.uniform(-1, 1, size=n)


def by_hand(A, b, max_variables, weighted):
    """Mini-bucket elimination factor by factor, on dictionaries from states to log values."""
    n = len(b)
    factors = [((i, j), {s: A[i, j] * s[0] * s[1] for s in itertools.product((-1, 1), repeat=2)}, 1)
               for i, j in itertools.combinations(range(n), 2) if A[i, j]]  # fmt: skip

    def partition(v):
        mine = [factor for factor in factors if v in factor[0]]
        messages = sorted((f for f in mine if f[2] == 0), key=lambda f: -len(f[0]))
        minis = []
        for factor in [*messages, *(f for f in mine if f[2] == 1)]:
            for mini in minis:
                if len({u for f in [*mini, factor] for u in f[0]} - {v}) <= max_variables:
                    mini.append(factor)
                    break
            else:
                minis.append([factor])
        return minis or [[]]

    total, left = 0.0, list(range(n))
    while left:
        v = min(left, key=lambda u: (len(partition(u)), u))
        left.remove(v)
        minis = partition(v)
        factors = [factor for factor in factors if v not in factor[0]]
        for position, mini in enumerate(minis):
            last = position == len(minis) - 1
            scope = tuple(sorted({u for factor in mini for u in factor[0]} - {v}))
            values = {}
            for state in itertools.product((-1, 1), repeat=len(scope)):
                at = dict(zip(scope, state, strict=True))
                terms = []
                for x in (-1, 1):
                    at[v] = x
                    known = sum(table[tuple(at[u] for u in variables)] for variables, table, _ in mini)
                    terms.append(known + (b[v] * x if last else 0.0))
                if weighted:
                    values[state] = logsumexp(np.array(terms) * len(minis)) / len(minis)
                else:
                    values[state] = logsumexp(terms) if last else max(terms)
            if scope:
                factors.append((scope, values, 0))
            else:
                total += values[()]
    return total


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("max_variables", [1, 2, 3])
@pytest.mark.parametrize("density", [0.5, 1.0])
def test_against_elimination_by_hand(method, max_variables, density):
    for seed in range(3):
        A, b = model(seed, 7, density=density)
        expected = by_hand(A, b, max_variables, method is weighted_mini_bucket)
        assert method(A, b, max_variables=max_variables).value == pytest.approx(expected, abs=1e-11)


@given(
    n=st.integers(1, 9),
    scale=st.sampled_from([0.0, 0.05, 1.0, 10.0, 500.0]),
    density=st.floats(0, 1),
    max_variables=st.integers(1, 9),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=100, deadline=None)
def test_both_are_upper_bounds_and_exact_with_room(n, scale, density, max_variables, seed):
    A, b = model(seed, n, scale, density)
    exact = brute(A, b)
    for method in METHODS:
        result = method(A, b, max_variables=max_variables)
        assert result.upper >= exact
        assert result.upper > result.value
        assert result.lower == -math.inf
        if result.diagnostics["exact"]:
            assert result.value == pytest.approx(exact, rel=1e-12, abs=1e-12)
        assert method(A, b, max_variables=n).value == pytest.approx(exact, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_batches_sparse_and_torch(method):
    A, b = model(0, 12)
    single = method(A, b, max_variables=4).value
    batch = method(np.stack([A, 2 * A]), np.stack([b, -b]), max_variables=4)
    assert batch.value.shape == (2,)
    assert batch.value[0] == pytest.approx(single, abs=1e-12)
    assert batch.value[1] == pytest.approx(method(2 * A, -b, max_variables=4).value, abs=1e-12)
    assert method(sparse.csr_array(A), b, max_variables=4).value == pytest.approx(single, abs=1e-12)
    assert method(A + 2 * np.eye(12), b, max_variables=4).value == pytest.approx(single + 12, abs=1e-12)
    fields = torch.tensor(b, requires_grad=True)
    value = method(torch.tensor(A), fields, max_variables=4).value
    value.backward()
    assert value.item() == pytest.approx(single, abs=1e-12)
    step = 1e-6 * np.eye(12)[3]
    slope = (method(A, b + step, max_variables=4).value - method(A, b - step, max_variables=4).value) / 2e-6
    assert fields.grad[3].item() == pytest.approx(slope, abs=1e-6)


def test_tables_stay_within_the_bound_and_splitting_is_reported():
    A, b = model(1, 20)
    result = mini_bucket(A, b)
    assert result.diagnostics == {"width": 10, "mini_buckets": 2, "exact": False}
    assert mini_bucket(A, b, max_variables=19).diagnostics["exact"]


def test_size_of_the_error_on_complete_graphs():
    # The authors' protocol at coupling strengths where their code, run again, is off by 1.66, 11.4 and 56.9 nats.
    rng = np.random.default_rng(0)
    for strength, published in ((0.05, 1.66), (1.0, 11.4), (5.0, 56.9)):
        upper = np.triu(rng.uniform(-2 * strength, 2 * strength, size=(8, 20, 20)), 1)
        A, b = upper + upper.transpose(0, 2, 1), rng.uniform(-1, 1, size=(8, 20))
        error = (mini_bucket(A, b).value - exact_enumeration(A, b).value).mean()
        assert 0.6 * published < error < 1.6 * published


def test_a_long_chain_is_exact_without_being_made_dense():
    n = 2000
    line = sparse.diags_array([[0.8] * (n - 1), [0.8] * (n - 1)], offsets=[1, -1])
    expected = n * math.log(2) + (n - 1) * math.log(math.cosh(0.8))
    for method in METHODS:
        assert method(line, max_variables=1).value == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_bad_sizes_are_refused(method):
    A, b = model(0, 60)
    with pytest.raises(InputError, match="max_variables = 0; a mini-bucket holds at least 1 other variable"):
        method(A, b, max_variables=0)
    with pytest.raises(InputError, match=r"max_variables = 40 makes tables of 2\^41 entries, 1.76e\+04 GB each"):
        method(A, b, max_variables=40)
