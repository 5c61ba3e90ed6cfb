"""Scores against scikit-learn, and a bootstrap against what is known of means."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score

from ial_nap.metrics import expected_calibration_error, measure
from ial_nap.resampling import compare
from ial_nap.series import make_series
from shared_core.errors import InputError


def series(y, **options):
    return make_series(np.zeros((len(y), 1, 1)), y, **options)


def test_scores_are_scikit_learns():
    random = np.random.default_rng(0)
    y, p = random.integers(0, 2, 50), random.random((50, 1))
    found = measure(series(y), p)
    assert found["auroc"] == pytest.approx(roc_auc_score(y, p))
    assert found["brier"] == pytest.approx(brier_score_loss(y, p[:, 0]))
    assert found["accuracy"] == pytest.approx(np.mean((p[:, 0] > 0.5) == y))
    labels, many = random.integers(0, 2, (50, 3)), random.random((50, 3))
    assert measure(series(labels), many)["auroc"] == pytest.approx(roc_auc_score(labels, many))
    classes, shares = random.integers(0, 3, 50), random.dirichlet(np.ones(3), 50)
    found = measure(series(classes), shares)
    assert found["log_loss"] == pytest.approx(log_loss(classes, shares))
    assert found["accuracy"] == pytest.approx(np.mean(shares.argmax(1) == classes))


def test_a_regression_is_scored_in_its_unit():
    y = np.array([10.5, 20, 30, 40])
    data = series(y, kind="regression")
    predicted = ((y + np.array([1, -1, 2, -2])) - data.scaling.target_mean) / data.scaling.target_deviation
    found = measure(data, predicted[:, None])
    assert found["mae"] == pytest.approx(1.5, abs=1e-5)
    assert found["rmse"] == pytest.approx(np.sqrt(2.5), abs=1e-5)
    assert found["mpe"] == pytest.approx(np.mean([1, 1, 2, 2] / y), abs=1e-6)


def test_calibration():
    y = np.array([[1.0]] * 7 + [[0.0]] * 3)
    assert expected_calibration_error(y, np.full((10, 1), 0.7)) == pytest.approx(0)
    assert expected_calibration_error(y, np.full((10, 1), 1.0)) == pytest.approx(0.3)


def test_the_interval_is_that_of_paired_differences():
    random = np.random.default_rng(1)
    y = random.normal(size=400)
    data = series(y, kind="regression", standardise=False)
    old, new = y + 1 + 0.5 * random.normal(size=400), y + 0.9 + 0.5 * random.normal(size=400)
    found = compare(data, old[:, None], new[:, None], metric="mae", draws=2000)
    change = np.abs(new - y) - np.abs(old - y)
    half = 1.96 * change.std() / 20
    assert found.low == pytest.approx(change.mean() - half, abs=0.15 * half)
    assert found.high == pytest.approx(change.mean() + half, abs=0.15 * half)
    assert found.is_clear == (change.mean() + half < 0)
    same = compare(data, old[:, None], old[:, None])
    assert (same.low, same.high, same.is_clear) == (0, 0, False)


def test_wrong_arguments(unchecked):
    data = series([0, 1, 0, 1])
    with pytest.raises(InputError, match="a binary task: no metric 'rmse'; there are auroc"):
        compare(data, np.zeros((4, 1)), np.zeros((4, 1)), metric="rmse")
    with pytest.raises(InputError, match=r"expected \(4, 1\)"):
        measure(data, np.zeros((4, 2)))
    one = make_series(torch.zeros(3, 1, 1), [1, 1, 1], like=data)
    assert np.isnan(measure(one, np.ones((3, 1)))["auroc"])
    with pytest.raises(InputError, match="no value"):
        compare(one, np.ones((3, 1)), np.ones((3, 1)))
