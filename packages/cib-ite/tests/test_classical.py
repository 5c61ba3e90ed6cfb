from __future__ import annotations

import doctest

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.ensemble import (
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsRegressor
from sklearn.preprocessing import StandardScaler

from cib_ite.baselines import classical
from cib_ite.baselines.classical import (
    CLASSICAL,
    GRIDS,
    OLS1,
    OLS2,
    KNNMatching,
    PropensityMatching,
    SLearner,
    TLearner,
    XLearner,
)
from cib_ite.metrics import ate_error, sqrt_pehe
from shared_core.errors import InputError

EXACT = ["ols1", "ols2", "knn", "psm"]
TREES = ["rf-t", "rf-s", "rf-x", "gbm-t", "gbm-s", "gbm-x"]


def data(seed=0, n=120, binary=False):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 3)) * [1.0, 20.0, 0.1] + [0.0, 5.0, 1.0]
    z = (x - [0.0, 5.0, 1.0]) / [1.0, 20.0, 0.1]
    t = (rng.random(n) < 1 / (1 + np.exp(-z[:, 0]))).astype(np.int64)
    mean = z[:, 0] - z[:, 2] + t * (1 + z[:, 1])
    y = (rng.random(n) < 1 / (1 + np.exp(-mean))).astype(float) if binary else mean + 0.3 * rng.normal(size=n)
    return x, t, y


def small(name, seed=0):
    """By name, with few trees: what these tests ask does not depend on their number."""
    learner = CLASSICAL[name](seed)
    return learner.set_params(n_estimators=5) if name in TREES else learner


def ones(*columns):
    return np.column_stack([np.ones(len(columns[0])), *columns])


def test_docstring_examples_run():
    assert doctest.testmod(classical).failed == 0


class TestRegression:
    def test_ols1_is_least_squares_on_covariates_and_treatment(self):
        x, t, y = data()
        b = np.linalg.lstsq(ones(t, x), y)[0]
        learner = OLS1().fit(x, t, y)
        new = data(1)[0]
        assert learner.effect(new) == pytest.approx(np.full(120, b[1]))
        expected = np.column_stack([ones(np.full(120, a), new) @ b for a in (0, 1)])
        assert learner.predict_outcomes(new) == pytest.approx(expected)

    def test_ols2_is_least_squares_in_each_arm(self):
        x, t, y = data()
        b0, b1 = (np.linalg.lstsq(ones(x[t == a]), y[t == a])[0] for a in (0, 1))
        learner = OLS2().fit(x, t, y)
        new = data(1)[0]
        assert learner.effect(new) == pytest.approx(ones(new) @ (b1 - b0))
        assert learner.predict_outcomes(new) == pytest.approx(np.column_stack([ones(new) @ b0, ones(new) @ b1]))

    @pytest.mark.parametrize("alpha", [1.0, 50.0])
    def test_alpha_is_that_of_scikit_learns_ridge(self, alpha):
        x, t, y = data()
        z = StandardScaler().fit_transform(x)
        expected = np.subtract(*(Ridge(alpha=alpha).fit(z[t == a], y[t == a]).predict(z) for a in (1, 0)))
        assert OLS2(alpha).fit(x, t, y).effect(x) == pytest.approx(expected)

    def test_alpha_leaves_the_treatment_alone(self):
        x, t, y = data()
        # All other coefficients forced to 0: what is left is the difference of means.
        assert OLS1(1e12).fit(x, t, y).effect(x) == pytest.approx(y[t == 1].mean() - y[t == 0].mean())

    @pytest.mark.parametrize("alpha", [0.5, 20.0])
    def test_binary_outcomes_get_scikit_learns_logistic_regressions(self, alpha):
        x, t, y = data(n=400, binary=True)
        z = StandardScaler().fit_transform(x)
        fits = [LogisticRegression(C=1 / alpha, tol=1e-10, max_iter=5000).fit(z[t == a], y[t == a]) for a in (0, 1)]
        expected = np.column_stack([fit.predict_proba(z)[:, 1] for fit in fits])
        learner = OLS2(alpha).fit(x, t, y)
        assert learner.outcome_ == "binary"
        assert learner.predict_outcomes(x) == pytest.approx(expected, abs=1e-5)
        single = LogisticRegression(C=np.inf, tol=1e-10, max_iter=5000).fit(np.column_stack([z, t]), y)
        both = [single.predict_proba(np.column_stack([z, np.full(400, a)]))[:, 1] for a in (0, 1)]
        assert OLS1().fit(x, t, y).effect(x) == pytest.approx(both[1] - both[0], abs=1e-5)

    def test_standard_errors_are_the_textbooks(self):
        x, t, y = data()
        new = data(1)[0]

        def covariance(design, target):
            b = np.linalg.lstsq(design, target)[0]
            noise = np.sum((target - design @ b) ** 2) / (len(target) - design.shape[1])
            return noise * np.linalg.inv(design.T @ design)

        variance = 0.0
        for a in (0, 1):
            variance = variance + np.diag(ones(new) @ covariance(ones(x[t == a]), y[t == a]) @ ones(new).T)
        assert OLS2().fit(x, t, y).effect_std(new) == pytest.approx(np.sqrt(variance))
        single = np.sqrt(covariance(ones(t, x), y)[1, 1])
        assert OLS1().fit(x, t, y).effect_std(new) == pytest.approx(np.full(120, single))

    @pytest.mark.parametrize("learner", [OLS1(), OLS2()], ids=["ols1", "ols2"])
    def test_binary_standard_errors_are_the_spread_over_samples(self, learner):
        rng = np.random.default_rng(0)
        x, t, y = data(2, 800, binary=True)
        learner = learner.fit(x, t, y)
        mean = learner.predict_outcomes(x)[np.arange(800), t]
        outcomes = [(rng.random(800) < mean).astype(float) for _ in range(100)]
        effects = [clone(learner).fit(x, t, drawn).effect(x[:20]) for drawn in outcomes]
        assert learner.effect_std(x[:20]) == pytest.approx(np.std(effects, axis=0), rel=0.25)

    def test_separable_classes_and_constant_columns_stay_finite(self):
        x, t, _ = data()
        y = (x[:, 0] > 0).astype(float)
        x = np.column_stack([x, np.ones(120), x[:, 0]])
        for learner in (OLS1(), OLS2()):
            factual = learner.fit(x, t, y).predict_outcomes(x)[np.arange(120), t]
            assert np.abs(factual - y).max() < 0.2
            assert np.isfinite(learner.effect_std(x)).all()
        assert np.isfinite(OLS2().fit(x, t, data()[2]).effect(x)).all()

    def test_std_without_degrees_of_freedom_is_refused(self):
        _, t, y = data(n=12)
        wide = np.random.default_rng(0).normal(size=(12, 14))
        learner = OLS2().fit(wide, t, y)
        with pytest.raises(InputError, match="more rows than columns"):
            learner.effect_std(wide)


class TestMatching:
    @pytest.mark.parametrize("k", [1, 5])
    def test_knn_by_brute_force_and_by_scikit_learn(self, k):
        x, t, y = data()
        new = data(1, 30)[0]
        z = (x - x.mean(0)) / x.std(0)
        at = (new - x.mean(0)) / x.std(0)
        expected = []
        for row in at:
            means = []
            for a in (0, 1):
                distance = [(np.linalg.norm(row - z[i]), y[i]) for i in np.flatnonzero(t == a)]
                means.append(np.mean([outcome for _, outcome in sorted(distance)[:k]]))
            expected.append(means)
        found = KNNMatching(k).fit(x, t, y).predict_outcomes(new)
        assert found == pytest.approx(np.array(expected))
        theirs = [KNeighborsRegressor(k).fit(z[t == a], y[t == a]).predict(at) for a in (0, 1)]
        assert found == pytest.approx(np.column_stack(theirs))

    def test_psm_takes_the_row_of_nearest_propensity(self):
        x, t, y = data()
        new = data(1, 30)[0]
        scaler = StandardScaler().fit(x)
        model = LogisticRegression(C=1.0, tol=1e-10, max_iter=5000).fit(scaler.transform(x), t)
        logit, at = model.decision_function(scaler.transform(x)), model.decision_function(scaler.transform(new))
        expected = np.empty((30, 2))
        for row in range(30):
            for a in (0, 1):
                rows = np.flatnonzero(t == a)
                expected[row, a] = y[rows[np.abs(logit[rows] - at[row]).argmin()]]
        assert PropensityMatching().fit(x, t, y).predict_outcomes(new) == pytest.approx(expected)

    def test_a_row_seen_at_fit_matches_itself(self):
        x, t, y = data()
        for learner in (KNNMatching(1), PropensityMatching()):
            assert learner.fit(x, t, y).predict_outcomes(x)[np.arange(120), t] == pytest.approx(y)

    def test_k_beyond_an_arm_is_refused(self):
        x, t, y = data()
        for learner in (KNNMatching(k=119), PropensityMatching(k=119)):
            with pytest.raises(InputError, match=r"k is 119 but there are \d+ control rows"):
                learner.fit(x, t, y)
        with pytest.raises(InputError, match="k is 0; it must be at least 1"):
            KNNMatching(k=0).fit(x, t, y)


class TestMetaLearners:
    @staticmethod
    def models(base, binary, seed):
        if base == "forest":
            kind = RandomForestClassifier if binary else RandomForestRegressor
            model = kind(5, min_samples_leaf=3, max_features=1.0, random_state=seed)
        else:
            kind = HistGradientBoostingClassifier if binary else HistGradientBoostingRegressor
            model = kind(max_iter=5, random_state=seed, early_stopping=False)
        return model

    @pytest.mark.parametrize("base", ["forest", "boosting"])
    @pytest.mark.parametrize("binary", [False, True])
    def test_they_are_their_definitions(self, base, binary):
        x, t, y = data(binary=binary)
        settings = {"base": base, "n_estimators": 5, "random_state": 3}

        def fitted(seed, table, target, probability=binary):
            model = self.models(base, probability, seed).fit(table, target)
            return (lambda new: model.predict_proba(new)[:, 1]) if probability else model.predict

        s0, s1 = TLearner(**settings)._seeds(2)
        mu0, mu1 = fitted(s0, x[t == 0], y[t == 0]), fitted(s1, x[t == 1], y[t == 1])
        assert TLearner(**settings).fit(x, t, y).effect(x) == pytest.approx(mu1(x) - mu0(x))

        (s,) = SLearner(**settings)._seeds(1)
        mu = fitted(s, np.column_stack([x, t]), y)
        expected = mu(np.column_stack([x, 0 * t + 1])) - mu(np.column_stack([x, 0 * t]))
        assert SLearner(**settings).fit(x, t, y).effect(x) == pytest.approx(expected)

        a, b, c, d = XLearner(**settings)._seeds(4)
        mu0, mu1 = fitted(a, x[t == 0], y[t == 0]), fitted(b, x[t == 1], y[t == 1])
        tau0 = fitted(c, x[t == 0], mu1(x[t == 0]) - y[t == 0], probability=False)
        tau1 = fitted(d, x[t == 1], y[t == 1] - mu0(x[t == 1]), probability=False)
        z = StandardScaler().fit_transform(x)
        e = LogisticRegression(tol=1e-10, max_iter=5000).fit(z, t).predict_proba(z)[:, 1]
        learner = XLearner(**settings).fit(x, t, y)
        assert learner.effect(x) == pytest.approx(e * tau0(x) + (1 - e) * tau1(x), abs=1e-5)
        assert learner.predict_outcomes(x) == pytest.approx(np.column_stack([mu0(x), mu1(x)]))

    def test_the_spread_is_over_trees(self):
        x, t, y = data()
        learner = TLearner(n_estimators=5, random_state=0).fit(x, t, y)
        spread = [np.var([tree.predict(x) for tree in m.model.estimators_], axis=0) for m in learner._models]
        assert learner.effect_std(x) == pytest.approx(np.sqrt(spread[0] + spread[1]))
        # A tree's two predictions vary together, and only their difference counts.
        single = SLearner(n_estimators=5, random_state=0).fit(x, t, y)
        trees = single._model.model.estimators_
        switched = [np.column_stack([x, np.full(120, a)]) for a in (0, 1)]
        differences = [tree.predict(switched[1]) - tree.predict(switched[0]) for tree in trees]
        assert single.effect_std(x) == pytest.approx(np.std(differences, axis=0))
        assert (XLearner(n_estimators=5, random_state=0).fit(x, t, y).effect_std(x) > 0).mean() > 0.9

    def test_the_spread_of_one_tree_is_nothing(self):
        x, t, y = data()
        for kind in (TLearner, SLearner, XLearner):
            assert kind(n_estimators=1).fit(x, t, y).effect_std(x) == pytest.approx(0)

    def test_boosting_has_no_effect_std(self):
        x, t, y = data()
        assert hasattr(TLearner("forest"), "effect_std")
        assert not hasattr(TLearner("boosting"), "effect_std")
        with pytest.raises(AttributeError, match="effect_std"):
            TLearner("boosting").fit(x, t, y).effect_std(x)

    def test_unknown_base(self):
        with pytest.raises(InputError, match="base is 'stump'; choose forest or boosting"):
            TLearner("stump").fit(*data())


@pytest.mark.parametrize("name", CLASSICAL)
class TestEveryOne:
    def test_effect_is_the_difference_of_outcomes(self, name):
        x, t, y = data()
        learner = small(name).fit(x, t, y)
        outcomes = learner.predict_outcomes(x)
        assert learner.effect(x).shape == (120,)
        assert outcomes.shape == (120, 2)
        if not name.endswith("-x"):
            assert learner.effect(x) == pytest.approx(outcomes[:, 1] - outcomes[:, 0])

    def test_binary_outcomes_are_probabilities(self, name):
        x, t, y = data(binary=True)
        learner = small(name).fit(x, t, y)
        assert learner.outcome_ == "binary"
        outcomes = learner.predict_outcomes(x)
        assert outcomes.min() >= 0
        assert outcomes.max() <= 1
        assert np.abs(learner.effect(x)).max() <= 1
        assert clone(learner).set_params(outcome="continuous").fit(x, t, y).outcome_ == "continuous"

    def test_same_seed_same_effects(self, name):
        x, t, y = data()
        first, second = (small(name, seed=5).fit(x, t, y).effect(x) for _ in range(2))
        assert np.array_equal(first, second)
        other = small(name, seed=6).fit(x, t, y).effect(x)
        assert np.array_equal(first, other) != name.startswith("rf")

    def test_parameters_are_kept_and_cloned(self, name):
        x, t, y = data()
        learner = small(name, seed=2)
        before = learner.get_params()
        learner.fit(x, t, y)
        assert learner.get_params() == before
        assert not hasattr(clone(learner), "n_features_in_")
        assert clone(learner).fit(x, t, y).effect(x) == pytest.approx(learner.effect(x))

    def test_effects_scale_with_the_outcome(self, name):
        x, t, y = data()
        # A shift would round sums in a forest's ties another way; a power of 2 does not.
        shift = 0 if name.startswith("rf") else 32
        plain, scaled = small(name).fit(x, t, y), small(name).fit(x, t, 8 * y + shift)
        assert scaled.effect(x) == pytest.approx(8 * plain.effect(x), abs=1e-6)
        if hasattr(plain, "effect_std"):
            assert scaled.effect_std(x) == pytest.approx(8 * plain.effect_std(x), abs=1e-6)

    def test_finds_an_effect_that_is_there(self, name):
        x, t, y = data(3, 600)
        tau = 1 + (x[:, 1] - 5) / 20
        learner = CLASSICAL[name](0)
        if name in TREES:
            learner.set_params(n_estimators=40)
        learner.fit(x, t, y)
        # Neither one coefficient nor matching on the propensity tells rows apart; averages they do find.
        if name in ("ols1", "psm"):
            assert ate_error(learner.effect(x), 0 * tau, tau) < 0.2
        else:
            assert sqrt_pehe(learner.effect(x), 0 * tau, tau) < 0.7 * tau.std()

    def test_grid_has_six_valid_settings_the_defaults_first(self, name):
        grid = GRIDS[name]
        assert len(grid) == len({str(setting) for setting in grid}) == 6
        x, t, y = data(n=160)
        default = small(name, seed=1).fit(x, t, y).effect(x)
        effects = [small(name, seed=1).set_params(**setting).fit(x, t, y).effect(x) for setting in grid]
        assert effects[0] == pytest.approx(default)
        # The predictions of all differ, if not OLS-1's effect by much.
        assert all(np.abs(effects[0] - found).max() > 1e-6 for found in effects[1:])


@pytest.mark.parametrize("name", EXACT)
def test_swapped_arms_negate_effects_and_row_order_is_nothing(name):
    x, t, y = data()
    new = data(1)[0]
    effect = small(name).fit(x, t, y).effect(new)
    assert small(name).fit(x, 1 - t, y).effect(new) == pytest.approx(-effect)
    order = np.random.default_rng(0).permutation(120)
    assert small(name).fit(x[order], t[order], y[order]).effect(new) == pytest.approx(effect)
    assert small(name).fit(x * [2.0, 0.1, 5.0] + 1, t, y).effect(new * [2.0, 0.1, 5.0] + 1) == pytest.approx(effect)


def test_registries_agree():
    assert list(CLASSICAL) == [*EXACT, *TREES]
    assert set(GRIDS) == set(CLASSICAL)


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda x, t, y: (x[:, 0], t, y), r"X has shape \(120,\)"),
            (lambda x, t, y: (x[:0], t[:0], y[:0]), r"X has shape \(0, 3\)"),
            (lambda x, t, y: (x.astype(str).astype(object) + "a", t, y), "encode text and categories"),
            (lambda x, t, y: (np.where(x == x[4, 1], np.nan, x), t, y), "X is nan at row 4, column 1"),
            (lambda x, t, y: (x, t[1:], y), r"treatment has shape \(119,\) but X has 120 rows"),
            (lambda x, t, y: (x, t, np.where(y == y[3], np.inf, y)), "y is inf at row 3"),
            (lambda x, t, y: (x, np.arange(120) % 3, y), r"treatment must be 0 or 1, found \{0, 1, 2\}$"),
            (lambda x, t, y: (x, y, t), r"\.\.\.\}; was y given in its place\? expected fit\(X, treatment, y\)"),
            (lambda x, t, y: (x, 0 * t, y), "treatment has 0 treated rows; both arms need"),
            (lambda x, t, y: (x, t, np.where(t == 1, 3.0, y)), "y is 3 in every treated row"),
            (lambda x, t, y: (x, t.astype(str), np.where(y > 0, "yes", "no")), "y holds something that is no number"),
        ],
    )
    def test_is_named_in_one_line(self, change, message):
        with pytest.raises(InputError, match=message) as caught:
            OLS2().fit(*change(*data()))
        assert "\n" not in str(caught.value)

    def test_outcome(self):
        x, t, y = data()
        with pytest.raises(InputError, match="outcome is 'binary' but y holds other values"):
            OLS2(outcome="binary").fit(x, t, y)
        with pytest.raises(InputError, match="outcome is 'count'; choose auto"):
            OLS2(outcome="count").fit(x, t, y)
        with pytest.raises(InputError, match="alpha is -1; it must be at least 0"):
            OLS2(alpha=-1.0).fit(x, t, y)

    def test_other_columns_than_at_fit(self):
        x, t, y = data()
        frame = pd.DataFrame(x, columns=["age", "weight", "dose"])
        learner = OLS2().fit(frame, pd.Series(t), pd.Series(y))
        assert list(learner.feature_names_in_) == ["age", "weight", "dose"]
        assert learner.effect(frame) == pytest.approx(learner.effect(x))
        with pytest.raises(InputError, match=r"'weight' in place 0 where the model was fitted to 'age'"):
            learner.effect(frame[["weight", "age", "dose"]])
        with pytest.raises(InputError, match="X has 2 columns; the model was fitted to 3"):
            learner.effect(frame[["age", "weight"]])
        frame.iloc[7, 2] = np.nan
        with pytest.raises(InputError, match="row 7, column 'dose'"):
            learner.effect(frame)
        assert not hasattr(learner.fit(x, t, y), "feature_names_in_")

    def test_before_fit(self):
        with pytest.raises(ValueError, match="not fitted"):
            OLS2().effect(data()[0])
