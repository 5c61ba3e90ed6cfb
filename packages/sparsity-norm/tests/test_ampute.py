from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from shared_core.errors import InputError
from sparsity_norm.ampute import ampute

MECHANISMS = ["mcar", "mar", "mnar"]


def table(seed=0, rows=4000, features=40):
    return np.random.default_rng(seed).normal(size=(rows, features))


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(MECHANISMS),
    st.integers(0, 1000),
    st.integers(1, 8),
    st.integers(1, 6),
    st.integers(0, 6),
    st.data(),
)
def test_what_is_kept_is_unchanged_and_what_was_missing_stays_so(mechanism, seed, rows, features, at_least, data):
    x = table(seed, rows, features)
    x[np.random.default_rng(seed).random(x.shape) < 0.3] = np.nan
    before = x.copy()
    low = data.draw(st.floats(0, 1))
    at_least = min(at_least, features)
    out, mask = ampute(
        x, low, data.draw(st.floats(low, 1)), mechanism=mechanism, random_state=seed, min_observed=at_least
    )
    np.testing.assert_array_equal(x, before)
    assert np.array_equal(np.isnan(out), ~mask)
    assert np.array_equal(out[mask], x[mask])
    assert not (mask & np.isnan(x)).any()
    present = (~np.isnan(x)).sum(1)
    assert (mask.sum(1) >= np.minimum(at_least, present)).all()


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_same_seed_same_holes(mechanism):
    x = table(rows=50)
    one, other = (ampute(x, mechanism=mechanism, random_state=3).mask for _ in range(2))
    assert np.array_equal(one, other)
    assert not np.array_equal(one, ampute(x, mechanism=mechanism, random_state=4).mask)


@pytest.mark.parametrize("mechanism", ["mcar", "mnar"])
def test_a_rows_share_follows_a_uniform_rate_of_its_own(mechanism):
    share = ampute(table(features=400), 0.2, 0.9, mechanism=mechanism, strength=2.0, random_state=0).mask.mean(1)
    assert scipy.stats.kstest(share, scipy.stats.uniform(0.2, 0.7).cdf).statistic < 0.04


def test_mcar_depends_on_nothing():
    x = table()
    mask = ampute(x, 0.3, 0.7, random_state=0).mask
    correlation = [np.corrcoef(x[:, j], mask[:, j])[0, 1] for j in range(40)]
    assert np.abs(correlation).max() < 5 / 4000**0.5


def test_mar_depends_on_columns_that_stay_whole():
    x = table()
    mask = ampute(x, 0.1, 0.9, mechanism="mar", strength=3.0, drivers=[2, 5], random_state=0).mask
    assert mask[:, [2, 5]].all()
    rest = np.delete(mask, [2, 5], axis=1)
    score = x[:, [2, 5]].mean(1)
    assert np.corrcoef(score, rest.mean(1))[0, 1] < -0.8
    others = np.delete(x, [2, 5], axis=1)
    assert np.abs([np.corrcoef(others[:, j], rest[:, j])[0, 1] for j in range(38)]).max() < 5 / 4000**0.5
    assert scipy.stats.kstest(rest.mean(1), scipy.stats.uniform(0.1, 0.8).cdf).statistic < 0.06


def test_mnar_depends_on_the_value_itself():
    x = table()
    mask = ampute(x, 0.3, 0.7, mechanism="mnar", strength=2.0, random_state=0).mask
    correlation = [np.corrcoef(x[:, j], mask[:, j])[0, 1] for j in range(40)]
    assert max(correlation) < -0.4
    weak = ampute(x, 0.3, 0.7, mechanism="mnar", strength=0, random_state=0).mask
    assert np.array_equal(weak, ampute(x, 0.3, 0.7, random_state=0).mask)


def test_rates_of_zero_and_one():
    x = table(rows=20, features=5)
    assert ampute(x, 1, 1).mask.all()
    for mechanism in ("mcar", "mnar"):
        out, mask = ampute(x, 0, 0, mechanism=mechanism)
        assert not mask.any()
        assert np.isnan(out).all()
    assert (ampute(x, 0, 0, min_observed=2).mask.sum(1) == 2).all()


def test_constant_and_empty_columns_do_not_break_the_mechanisms():
    x = table(rows=30, features=5)
    x[:, 0], x[:, 1] = 4.0, np.nan
    for mechanism in MECHANISMS:
        out, _ = ampute(x, 0.5, 0.9, mechanism=mechanism)
        assert np.isnan(out[:, 1]).all()
        assert np.isfinite(out[:, 2:]).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ampute(np.ones(3)), r"x has shape \(3,\)"),
        (lambda: ampute([[1.0, np.inf]]), "x is infinite at row 0, column 1"),
        (lambda: ampute(np.ones((2, 2)), 0.9, 0.1), "low is 0.9 and high 0.1"),
        (lambda: ampute(np.ones((2, 2)), 0.5, 1.5), "low is 0.5 and high 1.5"),
        (lambda: ampute(np.ones((2, 2)), mechanism="mnr"), "mechanism is 'mnr'; choose 'mcar', 'mar' or 'mnar'"),
        (lambda: ampute(np.ones((2, 2)), strength=-1), "strength is -1"),
        (lambda: ampute(np.ones((2, 2)), min_observed=3), "min_observed is 3"),
        (lambda: ampute(np.ones((2, 2)), mechanism="mar", drivers=[2]), "drivers is"),
    ],
)
def test_bad_input(unchecked, call, message):
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
