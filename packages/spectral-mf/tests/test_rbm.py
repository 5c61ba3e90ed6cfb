from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from sklearn.neural_network import BernoulliRBM

from shared_core.errors import InputError
from spectral_mf.data import load_spins
from spectral_mf.estimate import log_partition
from spectral_mf.rbm import RBM, rbm_ais, rbm_log_likelihood, train_rbm


def states(n):
    return np.array(list(itertools.product([0.0, 1.0], repeat=n)))


def draw(visible, hidden, seed=0, scale=1.0):
    random = np.random.default_rng(seed)
    W = scale * random.standard_normal((visible, hidden))
    return RBM(W, random.standard_normal(visible), random.standard_normal(hidden))


def joint_energies(rbm):
    """(visible states, hidden states), one pair at a time."""
    return np.array(
        [[v @ rbm.W @ h + rbm.bv @ v + rbm.bh @ h for h in states(rbm.hidden)] for v in states(rbm.visible)]
    )


@pytest.fixture(scope="module")
def digits():
    return (load_spins("digits64").X + 1) / 2


@pytest.mark.parametrize("method", ["auto", "exact", "exact_enumeration"])
def test_likelihood_is_brute_force(method):
    rbm = draw(5, 3)
    energies = joint_energies(rbm)
    found = rbm_log_likelihood(rbm, states(5), method=method)
    np.testing.assert_allclose(found.per_row, logsumexp(energies, axis=1) - logsumexp(energies), atol=1e-12)
    assert abs(np.exp(found.per_row).sum() - 1) < 1e-12
    assert abs(found.log_partition.value - logsumexp(energies)) < 1e-12
    assert found.low <= found.mean <= found.high
    assert found.high - found.low < 1e-9
    assert found.n == 32
    assert found.mean == pytest.approx(found.per_row.mean())
    within = 1.96 * found.per_row.std(ddof=1) / math.sqrt(32)
    assert (found.sampling_low, found.sampling_high) == pytest.approx((found.mean - within, found.mean + within))


def test_ising_form_has_the_same_energies():
    rbm = draw(3, 2, seed=4)
    A, b, const = rbm.to_ising()
    v, h = states(3), states(2)
    x = 2 * np.array([np.r_[a, c] for a in v for c in h]) - 1
    np.testing.assert_allclose(0.5 * ((x @ A) * x).sum(1) + x @ b + const, joint_energies(rbm).ravel(), atol=1e-12)


def test_wide_machines_are_exact_from_their_short_side():
    rbm = draw(40, 4, seed=1, scale=0.3)
    # Over the four hidden units by hand.
    h = states(4)
    expected = logsumexp(h @ rbm.bh + np.logaddexp(0, rbm.bv + h @ rbm.W.T).sum(1))
    turned = RBM(rbm.W.T, rbm.bh, rbm.bv)
    assert rbm_log_likelihood(rbm, np.zeros((1, 40))).log_partition.value == pytest.approx(expected, abs=1e-10)
    assert rbm_log_likelihood(turned, np.zeros((1, 4))).log_partition.value == pytest.approx(expected, abs=1e-10)


def test_one_row_leaves_sampling_open():
    found = rbm_log_likelihood(draw(3, 2), [[0, 1, 1]])
    assert found.sampling_low == -math.inf
    assert found.sampling_high == math.inf


def test_free_energy_agrees_with_sklearn(digits):
    other = BernoulliRBM(10, n_iter=3, random_state=0).fit(digits[:300])
    rbm = RBM.from_sklearn(other)
    np.testing.assert_allclose(rbm.free_energy(digits[:300]), other._free_energy(digits[:300]), atol=1e-10)
    # Its pseudo-likelihood of a row with bit i flipped: n log sigmoid(F(flipped) - F(v)), averaged over all bits here.
    v = digits[:1]
    flipped = np.repeat(v, 64, 0)
    flipped[np.arange(64), np.arange(64)] = 1 - flipped[np.arange(64), np.arange(64)]
    ours = -64 * np.logaddexp(0, rbm.free_energy(v) - rbm.free_energy(flipped))
    theirs = [other.set_params(random_state=seed).score_samples(v)[0] for seed in range(20)]
    assert all(np.abs(ours - value).min() < 1e-8 for value in theirs)


@pytest.mark.parametrize("epochs", [0, 5, 30])
def test_ais_is_within_its_error_of_exact(digits, epochs):
    rbm = train_rbm(digits, 16, epochs=epochs)
    exact = rbm_log_likelihood(rbm, digits)
    sampled = rbm_log_likelihood(rbm, digits, method="ais", budget_s=1.0)
    error = sampled.log_partition.std_error
    assert 0 < error < 0.05
    assert abs(sampled.log_partition.value - exact.log_partition.value) < 3 * error
    assert sampled.high - sampled.low == pytest.approx(2 * 1.96 * error)
    # The same through the package's own sampler of spins, which sweeps the two layers in turn.
    A, b, const = rbm.to_ising()
    for base in ("uniform", "fields"):
        spins = log_partition(A, b, method="ais", levels=200, chains=200, base=base)
        assert abs(spins.value + const - exact.log_partition.value) < 3 * spins.std_error + 1e-3


def test_trained_by_sklearn_and_by_us(digits):
    """Both are evaluated by the same yardstick, and both beat independent pixels."""
    independent = rbm_log_likelihood(train_rbm(digits, 12, epochs=0), digits).mean
    ours = rbm_log_likelihood(train_rbm(digits, 12, epochs=20, seed=1), digits).mean
    other = BernoulliRBM(12, learning_rate=0.05, n_iter=20, random_state=0).fit(digits)
    theirs = rbm_log_likelihood(RBM.from_sklearn(other), digits).mean
    persistent = rbm_log_likelihood(train_rbm(digits, 12, epochs=20, k=2, persistent=True), digits).mean
    assert min(ours, theirs, persistent) > independent + 3


def test_start_is_independent_pixels():
    X = np.random.default_rng(0).random((400, 6)) < 0.3
    rbm = train_rbm(X, 2, epochs=0)
    share = X.mean(0)
    independent = (X * np.log(share) + (1 - X) * np.log(1 - share)).sum(1).mean()
    assert rbm_log_likelihood(rbm, X).mean == pytest.approx(independent, abs=0.01)


def test_training_repeats_with_its_seed():
    X = np.random.default_rng(0).random((100, 5)) < 0.5
    first, again, other = (train_rbm(X, 3, epochs=2, seed=seed).W for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3


def test_base_rates_change_the_path_only():
    rbm = draw(6, 4, seed=2)
    exact = logsumexp(joint_energies(rbm))
    for rates in (None, np.full(6, 0.9), [0.0, 1.0, 0.5, 0.5, 0.5, 0.5]):
        found = rbm_ais(rbm, levels=300, chains=1000, base_rates=rates)
        assert abs(found.value - exact) < 4 * found.std_error


def test_starved_sampler_warns():
    found = rbm_ais(draw(30, 30, scale=3.0), levels=2, chains=50)
    assert "raise levels" in found.warnings[0]


NAMES = [("W", "v_bias", "h_bias"), ("rbm.W", "rbm.bv", "rbm.bh"), ("weight", "visible_bias", "hidden_bias")]


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("row", [False, True])
def test_state_dict(names, turned, row):
    rbm = draw(4, 3)
    W, bv, bh = (torch.tensor(part) for part in (rbm.W, rbm.bv, rbm.bh))
    if row:
        bv, bh = bv[None], bh[None]
    state = dict(zip(names, (W.T if turned else W, bv, bh), strict=True)) | {"steps": torch.tensor(7)}
    for order in (state, dict(reversed(state.items()))):
        found = RBM.from_state_dict(order)
        np.testing.assert_array_equal(found.W, rbm.W)
        np.testing.assert_array_equal(found.bv, rbm.bv)
        np.testing.assert_array_equal(found.bh, rbm.bh)


def test_state_dict_by_sizes():
    rbm = draw(4, 3)
    state = {"a": torch.tensor(rbm.bh), "b": torch.tensor(rbm.bv), "c": torch.tensor(rbm.W.T)}
    np.testing.assert_array_equal(RBM.from_state_dict(state, visible=4).W, rbm.W)
    assert RBM.from_state_dict(state, visible=3).visible == 3
    with pytest.raises(InputError, match=r"visible = 5 is not a size of a \(3,\), b \(4,\), c \(3, 4\)"):
        RBM.from_state_dict(state, visible=5)
    with pytest.raises(InputError, match=r"which bias is the visible one\? found a \(3,\), b \(4,\)"):
        RBM.from_state_dict(state)


@pytest.mark.parametrize(
    ("shapes", "told"),
    [
        ({}, "found nothing"),
        ({"W": (4, 3), "bv": (4,)}, r"one matrix and two vectors, found W \(4, 3\), bv \(4,\)"),
        ({"W": (4, 3), "bv": (4,), "bh": (3,), "V": (4, 3)}, r"found W .*, V \(4, 3\)"),
        ({"W": (4, 3), "bv": (4,), "bh": (3,), "momentum": (4,)}, r"momentum \(4,\)"),
        ({"W": (4, 3), "bv": (4,), "bh": (5,)}, "do not have the sizes"),
        ({"W": (3, 3), "bv": (3,), "bh": (3,)}, "square: pass transposed=True"),
        ({"conv": (2, 1, 3, 3), "W": (4, 3), "bv": (4,), "bh": (3,)}, "conv"),
    ],
)
def test_ambiguous_state_dict(shapes, told):
    with pytest.raises(InputError, match=told):
        RBM.from_state_dict({name: torch.zeros(shape) for name, shape in shapes.items()})


def test_square_state_dict_with_an_answer():
    W = np.arange(9.0).reshape(3, 3)
    state = {"W": W, "bv": np.zeros(3), "bh": np.ones(3)}
    np.testing.assert_array_equal(RBM.from_state_dict(state, transposed=True).W, W.T)
    np.testing.assert_array_equal(RBM.from_state_dict(state, transposed=False).W, W)


@pytest.mark.parametrize(
    ("act", "told"),
    [
        (lambda r: RBM(r.W.T, r.bv, r.bh), "W is transposed: pass W.T"),
        (lambda r: RBM(r.W, r.bv[:2], r.bh), r"W is \(4, 3\) but there are 2 visible and 3 hidden biases"),
        (lambda r: RBM(r.W[0], r.bv, r.bh), r"W must be \(visible, hidden\)"),
        (lambda r: RBM(np.where(r.W > 9, 0, math.nan), r.bv, r.bh), r"W\[0, 0\] is nan"),
        (lambda r: RBM([["a"]], r.bv, r.bh), "W must be numbers"),
        (lambda _: RBM.from_sklearn(BernoulliRBM()), "BernoulliRBM has no components_"),
        (lambda r: r.free_energy([[0, 1, 1]]), r"X must be \(rows, 4\), got \(1, 3\)"),
        (lambda r: r.free_energy([[0, 1, -1, 1]]), r"X\[0,2\] is -1; turn -1/\+1 into 0/1"),
        (lambda r: r.free_energy([[0, 1, math.nan, 1]]), r"X\[0,2\] is nan; units are 0 or 1"),
        (lambda r: rbm_log_likelihood(r, np.zeros((0, 4))), "X has no rows"),
        (lambda r: rbm_log_likelihood(r, np.zeros((1, 4)), method="guess"), "no method 'guess'"),
        (lambda r: rbm_log_likelihood(r, np.zeros((1, 4)), budget_s=0.0), "budget_s must be positive"),
        (lambda r: rbm_ais(r, levels=0), "levels must be at least 1"),
        (lambda r: rbm_ais(r, base_rates=[0.5]), "base_rates must be 4 numbers"),
        (lambda r: rbm_ais(r, base_rates=[0.5, 0.5, 0.5, 1.5]), "base_rates must be 4 numbers"),
        (lambda _: train_rbm(np.zeros((2, 3)), 0), "hidden must be at least 1, got 0"),
        (lambda _: train_rbm(np.zeros((0, 3)), 2), "X is empty"),
        (lambda _: train_rbm(np.zeros((2, 3)), 2, lr=-1.0), "lr positive"),
        (lambda _: train_rbm([[0.5]], 2), r"X\[0,0\] is 0.5"),
    ],
)
def test_bad_input(act, told):
    with pytest.raises(InputError, match=told) as caught:
        act(draw(4, 3))
    assert "\n" not in str(caught.value)


def test_exact_refuses_what_is_too_large():
    with pytest.raises(InputError, match="smaller side has 30 spins"):
        rbm_log_likelihood(draw(40, 30), np.zeros((1, 40)), method="exact")
