"""Calibration against brute force, and against the coverage that the theorems promise."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from cib_ite.calibration import Conformal, WeightedScores, check_alpha, effect_inflation, normal_quantile
from shared_core.errors import InputError
from shared_core.runs import load_tree, save_tree


def smallest_by_search(score: np.ndarray, weight: np.ndarray, own: float, alpha: float) -> float:
    """Smallest score whose lower neighbours and itself weigh at least ``1 - alpha`` of everything; else infinite."""
    total = weight.sum() + own
    return min((s for s in score if weight[score <= s].sum() >= (1 - alpha) * total), default=np.inf)


@pytest.mark.parametrize("alpha", [0.03, 0.1, 0.37, 0.8])
def test_weighted_quantiles_equal_a_search_over_all_scores(alpha):
    random = np.random.default_rng(0)
    for size in (1, 2, 7, 40):
        score, weight = random.normal(size=size), random.exponential(size=size)
        own = random.exponential(size=9) * np.array([0, 0.01, 0.1, 1, 1, 2, 5, 20, 1000.0])
        found = WeightedScores.of(score, weight).quantile(own, alpha)
        np.testing.assert_array_equal(found, [smallest_by_search(score, weight, w, alpha) for w in own])


def test_tied_scores_are_counted_together():
    random = np.random.default_rng(1)
    score, weight = random.integers(0, 4, 30).astype(float), random.exponential(size=30)
    found = WeightedScores.of(score, weight).quantile(np.full(1, 0.5), 0.4)
    assert found[0] == smallest_by_search(score, weight, 0.5, 0.4)


@pytest.mark.parametrize("weight", [1.0, 0.1, 3e5])
@pytest.mark.parametrize("size", [9, 10, 19, 99, 100])
def test_equal_weights_give_the_order_statistic_of_split_conformal(size, weight):
    """The ``ceil((1 - alpha)(k + 1))``-th smallest: numpy's quantile of the scores with one more at infinity."""
    score = np.random.default_rng(size).normal(size=size)
    arm = WeightedScores.of(score, np.full(size, weight))
    for alpha in (0.05, 0.1, 0.2, 0.5):
        expected = np.quantile(np.append(score, 1e300), 1 - alpha - 1e-12, method="inverted_cdf")
        expected = np.inf if expected == 1e300 else expected
        assert arm.quantile(np.array([weight]), alpha)[0] == expected
        rank = int(np.ceil((1 - alpha) * (size + 1) - 1e-9))
        assert expected == (np.inf if rank > size else np.sort(score)[rank - 1])


def test_a_weightless_new_row_gets_the_quantile_of_the_scores_themselves():
    random = np.random.default_rng(2)
    score = random.normal(size=57)
    arm = WeightedScores.of(score, np.ones(57))
    for alpha in (0.013, 0.123, 0.5, 0.777):
        assert arm.quantile(np.zeros(1), alpha)[0] == np.quantile(score, 1 - alpha, method="inverted_cdf")
    weight = random.exponential(size=57)
    expected = np.quantile(score, 0.8, method="inverted_cdf", weights=weight)
    assert WeightedScores.of(score, weight).quantile(np.zeros(1), 0.2)[0] == expected


def test_infinite_exactly_where_the_rows_own_weight_exceeds_alpha():
    arm = WeightedScores.of(np.arange(5.0), np.full(5, 2.0))
    own = np.array([0.0, 1.0, 10 / 9 - 1e-6, 10 / 9 + 1e-6, 2.0, 100.0])
    assert np.isinf(arm.quantile(own, 0.1)).tolist() == (own / (own + 10) > 0.1).tolist()
    assert np.isinf(WeightedScores.of(np.zeros(0), np.zeros(0)).quantile(np.ones(2), 0.3)).all()


def arms_of_normals(random: np.random.Generator, size: int, shift: float = 0.0):
    """Rows ``x ~ N(shift, 1)``, outcome of noise ``0.3 + |x|`` around 0 in both arms, everybody's propensity known."""
    x = random.normal(shift, 1, size)
    e = 1 / (1 + np.exp(-1.5 * x))
    t = (random.random(size) < e).astype(np.int64)
    y = (0.3 + np.abs(x + 1)) * random.normal(size=(2, size))
    return e, t, y


def test_split_conformal_covers_exchangeable_rows_as_often_as_promised():
    random = np.random.default_rng(3)
    repeats, size, alpha = 1500, 39, 0.1
    hits = 0
    for _ in range(repeats):
        score = random.standard_t(3, size + 1)
        held = Conformal.fit(
            score[:size], np.arange(size) % 2, np.zeros((2, size)), np.ones((2, size)), np.full(size, 0.5)
        )
        low, high = held.outcome_interval(0, np.zeros(1), np.ones(1), np.full(1, 0.5), alpha)
        hits += int(low[0] <= score[size] <= high[0])
    # 20 controls: the 19th smallest of 21 places, which covers with probability 19/21 exactly.
    assert stats.binomtest(hits, repeats, 19 / 21).pvalue > 1e-3


def test_weights_restore_the_coverage_that_confounding_takes_away():
    random = np.random.default_rng(4)
    alpha, weighted, plain, finite, repeats, new = 0.1, 0, 0, 0, 150, 200
    for _ in range(repeats):
        e, t, y = arms_of_normals(random, 400)
        seen, flat = y[t, np.arange(400)], np.zeros((2, 400))
        e_new, _, y_new = arms_of_normals(random, new)
        for given, given_new, which in ((e, e_new, "weighted"), (np.full(400, 0.5), np.full(new, 0.5), "plain")):
            held = Conformal.fit(seen, t, flat, flat + 1, given)
            low, high = held.outcome_interval(0, np.zeros(new), np.ones(new), given_new, alpha)
            inside = int(((low <= y_new[0]) & (y_new[0] <= high)).sum())
            if which == "weighted":
                weighted += inside
                finite += int(np.isfinite(high).sum())
            else:
                plain += inside
    total = repeats * new
    # Controls are rows of small x, where the noise is small; rows of one repetition share its scores.
    assert plain / total < 0.85
    assert 0.885 < weighted / total < 0.945
    assert finite / total > 0.95


def test_effect_intervals_join_both_arms_at_half_of_alpha():
    random = np.random.default_rng(5)
    e, t, y = arms_of_normals(random, 300)
    outcome, scale = random.normal(size=(2, 300)), random.uniform(0.5, 2, (2, 300))
    held = Conformal.fit(y[t, np.arange(300)], t, outcome, scale, e, clip=0.1)
    for arm in (0, 1):
        rows = np.flatnonzero(t == arm)
        clipped = np.clip(e[rows], 0.1, 0.9)
        weight = 1 / (clipped if arm else 1 - clipped)
        score = np.abs(y[arm, rows] - outcome[arm, rows]) / scale[arm, rows]
        low, high = held.outcome_interval(arm, outcome[arm], scale[arm], e, 0.05)
        own = 1 / (np.clip(e, 0.1, 0.9) if arm else 1 - np.clip(e, 0.1, 0.9))
        half = np.array([smallest_by_search(score, weight, w, 0.05) for w in own]) * scale[arm]
        np.testing.assert_allclose(high, outcome[arm] + half)
        np.testing.assert_allclose(low, outcome[arm] - half)
    low, high = held.effect_interval(outcome, scale, e, 0.1)
    low0, high0 = held.outcome_interval(0, outcome[0], scale[0], e, 0.05)
    low1, high1 = held.outcome_interval(1, outcome[1], scale[1], e, 0.05)
    np.testing.assert_array_equal(low, low1 - high0)
    np.testing.assert_array_equal(high, high1 - low0)


def test_conformal_survives_a_file(tmp_path):
    random = np.random.default_rng(6)
    e, t, y = arms_of_normals(random, 80)
    held = Conformal.fit(y[t, np.arange(80)], t, np.zeros((2, 80)), np.ones((2, 80)), e, clip=0.07)
    save_tree(tmp_path / "c.safetensors", held.to_tree())
    for again in (Conformal.from_tree(held.to_tree()), Conformal.from_tree(load_tree(tmp_path / "c.safetensors"))):
        assert again.clip == 0.07
        for one, other in zip(
            held.effect_interval(y, np.ones((2, 80)), e, 0.3),
            again.effect_interval(y, np.ones((2, 80)), e, 0.3),
            strict=True,
        ):
            np.testing.assert_array_equal(one, other)


# ---- inflation


def regression(random: np.random.Generator, n: int, p: int, ridge: float, repeats: int):
    """Squared residuals of trained rows and of the same rows' new outcomes, and squared errors of the fit."""
    x = random.normal(size=(n, p))
    fit = x @ np.linalg.solve(x.T @ x + ridge * np.eye(p), x.T)
    # With ridge s^2 / tau^2 the prior N(0, tau^2) is the one that the penalty stands for.
    tau = 1.0 if ridge == 0 else 1 / np.sqrt(ridge)
    mean = x @ (tau * random.normal(size=(p, repeats)))
    y, new = mean + random.normal(size=(2, n, repeats))
    return (y - fit @ y).ravel() ** 2, (new - fit @ y).ravel() ** 2, (mean - fit @ y).ravel() ** 2


@pytest.mark.parametrize("ridge", [0.0, 10.0, 60.0])
@pytest.mark.parametrize("claimed", [0.5, 0.02])
def test_inflation_recovers_the_error_of_regressions_whose_error_is_known(ridge, claimed):
    """Least squares, and ridge with the penalty of the prior that made the surface: half the optimism is the error."""
    random = np.random.default_rng(7)
    arms = [regression(random, n, p, ridge, 3000) for n, p in ((60, 20), (90, 10))]
    error = sum(arm[2].mean() for arm in arms)
    found = effect_inflation((arms[0][0], arms[1][0]), (arms[0][1], arms[1][1]), claimed)
    assert found == pytest.approx(max(1.0, np.sqrt(error / claimed)), rel=0.03)


def test_inflation_stays_between_one_and_its_bound():
    one = np.ones(50)
    assert effect_inflation((one, one), (one, one), 1.0) == 1.0
    assert effect_inflation((one, 5 * one), (one, one), 1.0) == 1.0
    assert effect_inflation((one, one), (5 * one, one), 0.0) == 1.0
    assert effect_inflation((one, one), (1e12 * one, one), 1.0) == 100.0
    assert effect_inflation((one, one), (1e12 * one, one), 1.0, largest=3.0) == 3.0
    # An arm without held-out rows says nothing.
    assert effect_inflation((one, one), (one[:0], 9 * one), 1.0) == 2.0


# ---- levels


def test_normal_quantiles_miss_with_probability_alpha():
    for alpha in (0.001, 0.1, 0.5, 0.99):
        assert 2 * stats.norm.cdf(-normal_quantile(alpha)) == pytest.approx(alpha)


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.2, 1.5, float("nan")])
def test_levels_outside_the_unit_interval_are_refused(alpha):
    with pytest.raises(InputError, match=r"alpha: must be in \(0, 1\)"):
        check_alpha(alpha)
