"""Measures of answers, against loops, scikit-learn and scipy."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import log_loss

from bayes_taml.metrics import (
    SizeBin,
    accuracy_by_size,
    brier,
    calibration_error,
    interval,
    negative_log_likelihood,
    paired_interval,
    reliability,
    spearman,
)
from shared_core.errors import InputError


def answers(seed: int, n: int = 200, ways: int = 5) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.dirichlet(np.full(ways, 0.4), n), random.integers(ways, size=n)


def slow_calibration_error(probability, labels, bins) -> float:
    total = 0.0
    for k in range(bins):
        inside = [
            (max(row), row.argmax() == label)
            for row, label in zip(probability, labels, strict=True)
            if k / bins < max(row) <= (k + 1) / bins
        ]
        if inside:
            confidence, right = np.mean(inside, axis=0)
            total += len(inside) / len(labels) * abs(confidence - right)
    return total


@given(st.integers(0, 1000), st.integers(1, 40), st.integers(1, 60))
def test_calibration_error_is_that_of_a_loop_over_bins(seed, bins, n):
    probability, labels = answers(seed, n)
    assert calibration_error(probability, labels, bins) == pytest.approx(
        slow_calibration_error(probability, labels, bins)
    )


@pytest.mark.parametrize(("confidence", "neighbour"), [(0.6, 0.55), (0.8, 0.75), (1.0, 0.95)])
def test_a_bin_has_its_upper_edge(confidence, neighbour):
    """Two rows in one bin cancel: one is right and one is wrong, so their mean gap is smaller than each gap."""
    probability = np.array([[confidence, 1 - confidence], [neighbour, 1 - neighbour]])
    assert len(reliability(probability, np.array([0, 1]), 5).n) == 1
    above = np.nextafter(confidence, 2)
    if confidence < 1:
        probability[0] = above, 1 - above
        assert len(reliability(probability, np.array([0, 1]), 5).n) == 2


def test_calibration_of_extremes():
    right, wrong = np.array([0, 1]), np.array([1, 0])
    assert calibration_error(np.eye(2), right) == 0
    assert calibration_error(np.eye(2), wrong) == 1
    flat = np.full((10, 5), 0.2)
    assert calibration_error(flat, np.arange(10) % 5) == pytest.approx(0)
    assert calibration_error(np.array([[0.9, 0.1], [0.9, 0.1]]), right, 1) == pytest.approx(0.4)


def test_reliability_holds_every_row_once():
    found = reliability(*answers(0, 500), bins=15)
    assert found.n.sum() == 500
    assert (np.diff(found.confidence) > 0).all()
    assert ((found.accuracy >= 0) & (found.accuracy <= 1)).all()


@given(st.integers(0, 1000))
def test_the_likelihood_is_that_of_scikit_learn(seed):
    probability, labels = answers(seed, 50)
    assert negative_log_likelihood(probability, labels) == pytest.approx(log_loss(labels, probability, labels=range(5)))


def test_an_impossible_row_costs_a_lot_and_not_infinitely_much():
    found = negative_log_likelihood(np.eye(2), np.array([1, 1]))
    assert found == pytest.approx(-math.log(np.finfo(np.float64).tiny) / 2)
    assert negative_log_likelihood(np.eye(2), np.array([0, 1])) == 0


@given(st.integers(0, 1000))
def test_brier_is_the_squared_distance_from_one_hot_rows(seed):
    probability, labels = answers(seed, 30)
    slow = np.mean([sum((p[k] - (k == y)) ** 2 for k in range(5)) for p, y in zip(probability, labels, strict=True)])
    assert brier(probability, labels) == pytest.approx(slow)
    assert 0 <= brier(probability, labels) <= 2


def test_brier_of_extremes():
    assert brier(np.eye(3), np.arange(3)) == 0
    assert brier(np.eye(3), np.array([1, 2, 0])) == 2
    assert brier(np.full((4, 4), 0.25), np.arange(4)) == pytest.approx(0.75)


def test_single_precision_gives_nearly_the_same_numbers():
    probability, labels = answers(1)
    for measure in (calibration_error, negative_log_likelihood, brier):
        assert measure(probability.astype(np.float32), labels) == pytest.approx(measure(probability, labels), rel=1e-4)
    rounded_up = np.array([[1 + 1e-7, 0]], dtype=np.float32)
    assert calibration_error(rounded_up, np.array([0])) < 1e-6


def test_an_interval_is_the_authors():
    values = np.array([0.2, 0.4, 0.9, 0.7])
    mean = sum(values) / 4
    half = 1.96 * math.sqrt(sum((v - mean) ** 2 for v in values) / 4) / math.sqrt(4)
    assert interval(values) == pytest.approx((mean, half))
    assert interval(np.ones(3)) == (1, 0)
    mean, half = interval(np.array([0.3]))
    assert mean == 0.3
    assert math.isnan(half)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=40))
def test_a_paired_interval_is_scipys(pairs):
    a, b = np.array(pairs).T
    mean, low, high = paired_interval(a, b)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert mean == pytest.approx(np.mean(a - b), abs=1e-12)
    if np.std(a - b) > 1e-6:
        assert (low, high) == pytest.approx((expected.low, expected.high))
    assert paired_interval(b, a) == pytest.approx((-mean, -high, -low))


def test_a_paired_interval_needs_two_episodes():
    mean, low, high = paired_interval(np.array([0.5]), np.array([0.25]))
    assert mean == 0.25
    assert math.isnan(low)
    assert math.isnan(high)
    same = np.array([0.1, 0.5, 0.3])
    assert paired_interval(same, same) == (0, 0, 0)


def test_bins_of_size_have_their_ends_and_leave_out_what_is_empty_or_beyond():
    size = np.array([1, 3, 4, 5, 11, 20, 21, 51, 0])
    right = np.array([1, 0, 1, 1, 0, 1, 1, 0, 0], dtype=bool)
    found = accuracy_by_size(right, size)
    assert [(b.low, b.high, b.mean, b.n) for b in found] == [
        (1, 3, 0.5, 2),
        (4, 5, 1, 2),
        (11, 20, 0.5, 2),
        (21, 50, 1, 1),
    ]
    assert found[1].half == 0
    assert math.isnan(found[3].half)
    assert [(b.low, b.high) for b in accuracy_by_size(right, size, (1, 1, 3))] == [(1, 1), (2, 3)]
    assert accuracy_by_size(right, size, (60, 70)) == []


def test_rows_of_an_episode_count_as_one():
    """Two episodes of very unequal numbers of rows: the mean is over episodes, and so is the interval."""
    right = np.array([True] * 8 + [False] * 2)
    episode = np.array([7] * 8 + [-3] * 2)
    (found,) = accuracy_by_size(right, np.full(10, 2), (1, 3), episode)
    assert found == SizeBin(1, 3, 0.5, found.half, 2)
    assert found.half == pytest.approx(1.96 * 0.5 / math.sqrt(2))


@given(st.integers(0, 1000))
def test_clustered_bins_are_those_of_a_loop(seed):
    random = np.random.default_rng(seed)
    right, size, episode = random.random(80) < 0.7, random.integers(1, 30, 80), random.integers(6, size=80)
    for found in accuracy_by_size(right, size, (1, 2, 9, 30), episode):
        means = []
        for one in sorted(set(episode)):
            rows = [
                r for r, s, e in zip(right, size, episode, strict=True) if e == one and found.low <= s <= found.high
            ]
            if rows:
                means.append(sum(rows) / len(rows))
        assert found.n == len(means)
        assert found.mean == pytest.approx(np.mean(means))
        if len(means) > 1:
            assert found.half == pytest.approx(1.96 * np.std(means) / math.sqrt(len(means)))


def test_spearman_is_the_correlation_of_ranks_and_unknown_of_a_constant():
    random = np.random.default_rng(0)
    a, b = random.integers(5, size=40), random.normal(size=40)
    assert spearman(a, b) == pytest.approx(np.corrcoef(stats.rankdata(a), stats.rankdata(b))[0, 1])
    assert spearman(b, -np.exp(b)) == pytest.approx(-1)
    assert math.isnan(spearman(np.ones(4), np.arange(4)))
    assert math.isnan(spearman(np.array([1.0]), np.array([2.0])))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: brier(np.zeros((0, 3)), np.zeros(0, dtype=int)), "at least one row"),
        (lambda: brier(np.eye(2), np.array([0, 2])), r"columns of probability, 0\.\.1"),
        (lambda: negative_log_likelihood(np.eye(2), np.array([-1, 0])), r"labels: .* got -1\.\.0"),
        (lambda: calibration_error(np.array([[0.5, np.nan]]), np.array([0])), "row 0, column 1"),
        (lambda: calibration_error(np.array([[-2.0, 3.0]]), np.array([0])), "row 0, column 0"),
        (lambda: calibration_error(np.eye(2), np.array([0, 1]), 0), "bins: must be at least 1"),
        (lambda: interval(np.zeros(0)), "values: needs at least one"),
        (lambda: interval(np.array([1.0, np.inf])), "values: must be finite, got inf at 1"),
        (lambda: paired_interval(np.array([1.0]), np.array([np.nan])), "b: must be finite"),
        (lambda: spearman(np.array([np.nan, 1.0]), np.array([0.0, 1.0])), "a: must be finite"),
        (lambda: accuracy_by_size(np.array([True]), np.array([1]), (1,)), "edges: needs two"),
        (lambda: accuracy_by_size(np.array([True]), np.array([1]), (1, 5, 5)), "rising order"),
        (lambda: accuracy_by_size(np.array([True]), np.array([1]), (5, 1)), "rising order"),
    ],
)
def test_bad_input_is_said_in_a_line(call, words):
    with pytest.raises(InputError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
