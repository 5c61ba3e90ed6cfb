"""Resamples by counts give what drawing instances one by one gives, for every score of every task."""

from __future__ import annotations

import numpy as np
import pytest

from ial_nap import resampling
from ial_nap.metrics import METRICS, measure
from ial_nap.resampling import compare, resampled
from ial_nap.series import make_series
from shared_core.errors import InputError

N = 60


def task(kind: str, seed: int = 0):
    """Series with labels, and predictions that tie now and then."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(N, 2, 2))
    y = {
        "binary": (random.random(N) < 0.3).astype(int),
        "multiclass": random.integers(0, 3, N),
        "multilabel": (random.random((N, 3)) < [0.3, 0.6, 0.02]).astype(int),
        "regression": np.where(random.random(N) < 0.02, 0.0, 50 + 10 * random.normal(size=N)),
    }[kind]
    series = make_series(x, y, kind=kind)
    p = np.round(random.random((N, series.outputs)), 1)
    if kind == "multiclass":
        p = (p + 0.1) / (p + 0.1).sum(1, keepdims=True)
    return series, p


@pytest.mark.parametrize("kind", ["binary", "multiclass", "multilabel", "regression"])
def test_counts_are_as_good_as_instances(kind):
    series, p = task(kind)
    found = resampled(series, p, draws=25, seed=3)
    assert set(found) == {name for name, metric in METRICS.items() if kind in metric.kinds}
    whole = measure(series, p)
    random = np.random.default_rng(3)
    drawn = [random.integers(0, N, N) for _ in range(25)]
    for name, one in found.items():
        np.testing.assert_allclose(one.value, whole[name], rtol=1e-12)
        expected = [measure(series.part(at.tolist()), p[at])[name] for at in drawn]
        np.testing.assert_allclose(one.draws, expected, rtol=1e-10)
        assert one.better == METRICS[name].better


def test_differences_are_of_the_same_instances():
    series, p = task("binary")
    better = 0.5 * p + 0.5 * series.targets.numpy()[:, None]
    low, high = resampled(series, better, draws=400)["auroc"].gain_over(resampled(series, p, draws=400)["auroc"])
    paired = compare(series, p, better, draws=400)
    assert (low, high) == pytest.approx((paired.low, paired.high), abs=1e-9)
    # The same by instances, drawn one resample after the other.
    random = np.random.default_rng(0)
    drawn = [random.integers(0, N, N).tolist() for _ in range(50)]
    gains = [np.subtract(*(measure(series.part(at), q[at])["auroc"] for q in (better, p))) for at in drawn]
    fewer = compare(series, p, better, draws=50, level=0.9)
    assert (fewer.low, fewer.high) == pytest.approx(np.nanquantile(gains, [0.05, 0.95]).tolist(), abs=1e-9)
    same = resampled(series, p, draws=50)["brier"]
    assert same.gain_over(same) == (0, 0)


def test_draws_in_parts_are_the_same(monkeypatch):
    series, p = task("binary")
    whole = resampled(series, p, draws=30)
    monkeypatch.setattr(resampling, "_MOST", 7 * N)
    for name, one in resampled(series, p, draws=30).items():
        np.testing.assert_allclose(one.draws, whole[name].draws, rtol=1e-12)


def test_no_resample_has_no_interval():
    series, p = task("binary")
    assert resampled(series, p, draws=0)["auroc"].interval() is None
    with pytest.raises(InputError, match="draws must be 0 or more, got -1"):
        resampled(series, p, draws=-1)
    with pytest.raises(InputError, match=r"shape \(60, 2\): expected \(60, 1\)"):
        resampled(series, p.repeat(2, 1))
