from __future__ import annotations

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from shared_core.errors import InputError
from sparsity_norm.audit import CountCalibrator, vsp_curve, vsp_report


def sample(seed=0, n=600):
    rng = np.random.default_rng(seed)
    return rng.integers(1, 80, n).astype(float), rng.normal(size=n), rng


class TestStatistics:
    @settings(max_examples=25, deadline=None)
    @given(st.integers(0, 10_000), st.integers(3, 40), st.booleans())
    def test_point_values_are_those_of_scipy(self, seed, n, ties):
        rng = np.random.default_rng(seed)
        count = rng.integers(1, 6 if ties else 10_000, n).astype(float)
        count[:2] = 1, 5
        prediction = 1e6 + rng.normal(size=n).round(1 if ties else 9) + 0.1 * count
        report = vsp_report(prediction, count, n_resamples=2)
        assert report.pearson.value == pytest.approx(scipy.stats.pearsonr(prediction, count).statistic, abs=1e-9)
        assert report.spearman.value == pytest.approx(scipy.stats.spearmanr(prediction, count).statistic, abs=1e-9)
        assert report.slope_per_count.value == pytest.approx(scipy.stats.linregress(count, prediction).slope, abs=1e-6)
        doubling = scipy.stats.linregress(np.log2(count), prediction).slope
        assert report.slope_per_doubling.value == pytest.approx(doubling, abs=1e-6)
        logs = vsp_report(prediction, count, scale="log", n_resamples=2)
        expected = scipy.stats.pearsonr(prediction, np.log2(count)).statistic
        assert logs.pearson.value == pytest.approx(expected, abs=1e-9)

    def test_excess_is_the_covariance_of_the_drift_on_the_truths_scale(self):
        count, truth, rng = sample()
        prediction = 0.3 * truth + 0.01 * count + 0.1 * rng.normal(size=len(count))
        report = vsp_report(prediction, count, truth, n_resamples=2)
        drift = np.cov(prediction - truth, count, ddof=0)[0, 1] / (count.std() * truth.std())
        assert report.excess.value == pytest.approx(drift)
        assert report.truth.pearson.value == pytest.approx(np.corrcoef(truth, count)[0, 1])
        assert report.difference.value == pytest.approx(report.pearson.value - report.truth.pearson.value)
        assert vsp_report(truth, count, truth).excess.value == pytest.approx(0, abs=1e-12)

    def test_intervals_cover_at_their_level(self):
        hits = 0
        for seed in range(100):
            rng = np.random.default_rng(seed)
            count = rng.normal(50, 10, 100)
            prediction = 0.6 * (count - 50) / 10 + 0.8 * rng.normal(size=100)
            interval = vsp_report(prediction, count, n_resamples=200, confidence=0.9, seed=seed).pearson
            hits += interval.low <= 0.6 <= interval.high
        # 90 expected; the binomial's standard deviation is 3 and percentile intervals run a little narrow.
        assert 78 <= hits <= 99

    def test_grouped_resampling_widens_intervals_of_repeated_rows(self):
        count, truth, _ = sample(n=50)
        prediction = truth + 0.02 * count
        many = [np.repeat(values, 20) for values in (prediction, count)]
        groups = np.repeat([f"u{i}" for i in range(50)], 20)
        alone = vsp_report(prediction, count, seed=1).pearson
        naive, grouped = vsp_report(*many).pearson, vsp_report(*many, groups=groups).pearson
        assert naive.value == pytest.approx(alone.value)
        assert grouped.value == pytest.approx(alone.value)
        assert (naive.high - naive.low) < 0.5 * (alone.high - alone.low)
        assert (grouped.high - grouped.low) == pytest.approx(alone.high - alone.low, rel=0.15)

    def test_same_seed_same_report(self):
        count, truth, _ = sample()
        assert vsp_report(truth, count, truth) == vsp_report(truth, count, truth)
        assert vsp_report(truth, count).pearson != vsp_report(truth, count, seed=1).pearson


class TestVerdict:
    def test_drift_is_bias(self):
        count, truth, _ = sample()
        report = vsp_report(truth + 0.02 * count, count, truth)
        assert report.verdict == "biased"
        assert report.message.startswith("Biased")
        assert vsp_report(truth + 0.02 * count, count).verdict == "dependent"

    def test_following_a_truth_that_depends_on_the_count_is_no_bias(self):
        """Popular films are rated higher: correlation with the count is not in itself a fault."""
        count, noise, rng = sample()
        truth = 0.03 * count + noise
        report = vsp_report(truth + 0.1 * rng.normal(size=len(count)), count, truth)
        assert report.pearson.value > 0.4
        assert report.verdict == "unbiased"
        assert vsp_report(truth, count).verdict == "dependent"

    def test_ignoring_a_truth_that_depends_on_the_count_is_bias(self):
        count, noise, _ = sample()
        truth = 0.03 * count + noise
        report = vsp_report(noise, count, truth)
        assert abs(report.pearson.value) < 0.1
        assert report.verdict == "biased"

    def test_the_conditional_mean_of_a_noisy_truth_is_no_bias(self):
        """A calibrated probability correlates with the count more than 0/1 labels do, and rightly so."""
        count, _, rng = sample(n=4000)
        probability = 1 / (1 + np.exp(-(count - 40) / 20))
        labels = (rng.random(len(count)) < probability).astype(float)
        report = vsp_report(probability, count, labels)
        assert report.difference.value > 0.3
        assert report.verdict == "unbiased"

    def test_independence_and_doubt(self):
        count, truth, rng = sample(n=3000)
        assert vsp_report(truth, count).verdict == "independent"
        assert vsp_report(truth + rng.normal(size=3000), count, truth).verdict == "unbiased"
        few, noise, _ = sample(2, n=14)
        assert vsp_report(noise, few).verdict == "inconclusive"
        assert vsp_report(noise + np.random.default_rng(7).normal(size=14), few, noise).verdict == "inconclusive"

    def test_constants_depend_on_nothing(self):
        count, truth, _ = sample(n=2000)
        for constant in (3.7, 0.1 + 0.2, 1e17):
            report = vsp_report(np.full(2000, constant), count, truth)
            assert report.pearson.value == report.spearman.value == report.slope_per_count.value == 0
            assert report.verdict == "unbiased"
        assert vsp_report(np.zeros(2000), count).verdict == "independent"
        assert vsp_report(0.1 * count, count, np.ones(2000)).verdict == "biased"

    @pytest.mark.parametrize("n", [1, 2, 5])
    def test_a_handful_is_undetermined(self, n):
        report = vsp_report(np.arange(n), np.arange(n), np.arange(n))
        assert report.verdict == "undetermined"
        assert report.n == n

    def test_equal_counts_are_undetermined(self):
        report = vsp_report(np.arange(50.0), np.full(50, 7), np.arange(50.0))
        assert report.verdict == "undetermined"
        assert math.isnan(report.pearson.value)
        assert len(report.deciles) == 1

    def test_counts_of_zero_and_one_have_no_doublings_to_speak_of(self):
        report = vsp_report(np.arange(20.0), np.arange(20) % 2)
        assert math.isnan(report.slope_per_doubling.value)
        assert not math.isnan(report.slope_per_count.value)

    def test_reports_become_json_and_text(self):
        count, truth, _ = sample(n=30)
        for report in (vsp_report(truth, count, truth), vsp_report(truth, np.full(30, 2)), vsp_report([1.0], [2])):
            found = json.loads(json.dumps(report.to_dict(), allow_nan=False))
            assert found["verdict"] == report.verdict
            assert str(report).startswith(report.message)


class TestCurve:
    @settings(max_examples=25, deadline=None)
    @given(st.integers(0, 10_000), st.integers(1, 60), st.integers(1, 12), st.integers(1, 30))
    def test_bins_partition_the_instances_by_count(self, seed, n, bins, levels):
        rng = np.random.default_rng(seed)
        count, prediction, truth = rng.integers(0, levels, n), rng.normal(size=n), rng.normal(size=n)
        curve = vsp_curve(prediction, count, truth, bins=bins)
        assert len(curve) <= bins
        assert sum(part.n for part in curve) == n
        for earlier, later in pairwise(curve):
            assert earlier.count_high < later.count_low
        for part in curve:
            rows = (count >= part.count_low) & (count <= part.count_high)
            assert part.n == rows.sum()
            assert part.prediction == pytest.approx(prediction[rows].mean())
            assert part.truth == pytest.approx(truth[rows].mean())
            assert part.rmse == pytest.approx(np.sqrt(np.mean((prediction - truth)[rows] ** 2)))

    def test_bins_are_deciles_where_counts_differ(self):
        curve = vsp_curve(np.arange(1000.0), np.random.default_rng(0).permutation(1000))
        assert [part.n for part in curve] == [100] * 10
        assert curve[0].truth is None

    def test_interval_of_the_mean(self):
        values = np.random.default_rng(0).normal(size=100)
        part = vsp_curve(values, np.ones(100))[0]
        low, high = scipy.stats.norm.interval(0.95, values.mean(), scipy.stats.sem(values))
        assert (part.prediction_low, part.prediction_high) == pytest.approx((low, high))
        assert math.isnan(vsp_curve([1.0], [1])[0].prediction_low)


class TestCalibrator:
    @pytest.mark.parametrize("sign", [1, -1])
    def test_takes_a_monotone_drift_out(self, sign):
        count, truth, _ = sample(n=2000)
        drift = sign * np.sqrt(count)
        prediction = truth + drift
        fit, held = slice(1000), slice(1000, None)
        calibrator = CountCalibrator().fit(prediction[fit], count[fit], truth[fit])
        repaired = calibrator.transform(prediction[held], count[held])
        assert vsp_report(prediction[held], count[held], truth[held]).verdict == "biased"
        assert vsp_report(repaired, count[held], truth[held]).verdict == "unbiased"
        np.testing.assert_allclose(repaired, truth[held], atol=1e-6)
        shifts = np.diff(calibrator.shifts_) * -sign
        assert (shifts >= 0).all()

    def test_keeps_what_the_truth_has(self):
        count, noise, rng = sample(n=2000)
        truth = 0.03 * count + noise
        prediction = truth + 0.3 * rng.normal(size=2000)
        repaired = CountCalibrator().fit(prediction, count, truth).transform(prediction, count)
        assert np.corrcoef(repaired, count)[0, 1] == pytest.approx(np.corrcoef(truth, count)[0, 1], abs=0.03)

    def test_without_the_truth_it_flattens(self):
        count, noise, _ = sample(n=2000)
        prediction = noise + 0.05 * count
        repaired = CountCalibrator().fit(prediction, count).transform(prediction, count)
        assert abs(np.corrcoef(repaired, count)[0, 1]) < 0.05
        assert repaired.mean() == pytest.approx(prediction.mean())

    def test_is_constant_beyond_the_counts_seen_and_clips(self):
        calibrator = CountCalibrator(bounds=(0, 1)).fit([0.5, 0.9], [1, 2], [0.5, 0.5])
        assert calibrator.transform([0.5, 0.9, 0.9, 0.1], [0, 2, 50, 50]) == pytest.approx([0.5, 0.5, 0.5, 0.0])

    def test_one_instance_and_equal_counts(self):
        assert CountCalibrator().fit([1.0], [3], [2.0]).transform([5.0], [9]) == pytest.approx([6.0])
        calibrated = CountCalibrator().fit([1.0, 3.0], [3, 3], [2.0, 3.0]).transform([1.0], [3])
        assert calibrated == pytest.approx([1.5])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: vsp_report([], []), "y_pred is empty"),
        (lambda: vsp_report([1, 2], [1]), "observed_count has 1 entries but y_pred has 2"),
        (lambda: vsp_report([1, 2], [1, 2], [1]), "y_true has 1 entries"),
        (lambda: vsp_report([1, np.nan], [1, 2]), "y_pred is nan at row 1"),
        (lambda: vsp_report([1, 2], [1, -2]), "observed_count is -2 at row 1"),
        (lambda: vsp_report(np.ones((2, 2)), [1, 2]), r"y_pred has shape \(2, 2\)"),
        (lambda: vsp_report([1, 2], [1, 2], groups=[1]), r"groups has shape \(1,\)"),
        (lambda: vsp_report([1, 2], [1, 2], scale="sqrt"), "scale is 'sqrt'"),
        (lambda: vsp_report([1, 2], [1, 2], confidence=95), "confidence is 95"),
        (lambda: vsp_curve([1, 2], [1, 2], bins=0), "bins is 0"),
        (lambda: CountCalibrator().transform([1], [1]), "not fitted"),
        (lambda: CountCalibrator(bounds=(1, 0)), "bounds is"),
    ],
)
def test_bad_input(unchecked, call, message):
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
