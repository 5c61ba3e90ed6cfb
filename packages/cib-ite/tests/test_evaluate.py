from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm, spearmanr
from sklearn.metrics import log_loss, roc_auc_score

from cib_ite.baselines.classical import OLS1, OLS2, KNNMatching
from cib_ite.data import EffectTable, confounded
from cib_ite.estimator import CIB
from cib_ite.evaluate import as_rows, evaluate_model, is_training_table
from cib_ite.metrics import Nuisances, cross_fit_nuisances
from shared_core.errors import InputError


@pytest.fixture(scope="module")
def train() -> EffectTable:
    return confounded(300, kappa=1.0, seed=0)


@pytest.fixture(scope="module")
def new() -> EffectTable:
    return confounded(200, kappa=1.0, seed=1)


@pytest.fixture(scope="module")
def model(train) -> CIB:
    made = CIB(n_members=2, steps=150, predict_samples=50, trunk=(32,), heads=(32,), latent=8, random_state=0)
    return made.fit(train.x, train.treatment, train.y)


def without_truth(table: EffectTable) -> EffectTable:
    return replace(table, mu0=None, mu1=None, y_counterfactual=None, propensity=None)


def guesses(table: EffectTable) -> Nuisances:
    """Nuisances that cost nothing to fit."""
    mean = np.full(table.n, table.y.mean())
    return Nuisances(mean, np.full(table.n, 0.5), mean, mean, chosen={}, loss={})


def as_binary(table: EffectTable, seed: int = 0) -> EffectTable:
    """Both outcomes of each unit drawn by probabilities, as in Twins: the surfaces are outcomes themselves."""
    random = np.random.default_rng(seed)
    both = [(random.random(table.n) < 1 / (1 + np.exp(-mu))).astype(float) for mu in (table.mu0, table.mu1)]
    seen, other = (np.where(table.treatment == arm, both[1], both[0]) for arm in (1, 0))
    return replace(table, y=seen, y_counterfactual=other, mu0=both[0], mu1=both[1], outcome="binary")


class Fixed:
    """Says what it is told to say."""

    def __init__(self, effect, outcome=None, std=None):
        self.said, self.means = np.asarray(effect), outcome
        if std is not None:
            self.effect_std = lambda X: np.asarray(std)

    def effect(self, X):
        return self.said

    def predict_outcomes(self, X):
        return np.column_stack([np.zeros_like(self.said), self.said]) if self.means is None else self.means


def test_errors_against_the_truth_are_those_of_their_definitions(model, new):
    found = evaluate_model(model, new).metrics
    effect, truth = model.effect(new.x), new.mu1 - new.mu0
    assert found["sqrt_pehe"] == pytest.approx(np.sqrt(np.mean((effect - truth) ** 2)))
    assert found["sqrt_pehe_normalised"] == pytest.approx(found["sqrt_pehe"] / truth.std())
    assert found["ate_error"] == pytest.approx(abs(effect.mean() - truth.mean()))
    treated = new.treatment == 1
    assert found["att_error"] == pytest.approx(abs((effect - truth)[treated].mean()))
    assert found["spearman"] == pytest.approx(spearmanr(model.uncertainty(new.x), np.abs(effect - truth)).statistic)
    kept = np.argsort(model.uncertainty(new.x))[: int(0.8 * new.n)]
    ratio = np.sqrt(np.mean((effect - truth)[kept] ** 2)) / found["sqrt_pehe"]
    assert found["withhold_20_ratio"] == pytest.approx(ratio)


def test_coverage_is_of_the_models_own_intervals(model, new):
    found = evaluate_model(model, new, alpha=0.2)
    truth = new.mu1 - new.mu0
    for level in (50, 80, 90, 95):
        low, high = model.effect_interval(new.x, 1 - level / 100)
        assert found.metrics[f"cate_coverage_{level}"] == pytest.approx(np.mean((low <= truth) & (truth <= high)))
        assert found.metrics[f"cate_width_{level}"] == pytest.approx(np.mean(high - low))
    low, high = model.effect_interval(new.x, 0.2, target="ite")
    both = new.potential_outcomes()
    difference = both[:, 1] - both[:, 0]
    assert found.metrics["ite_coverage_80"] == pytest.approx(np.mean((low <= difference) & (difference <= high)))
    assert found.metrics["ite_infinite"] == pytest.approx(np.mean(np.isinf(high - low)))


def test_an_exact_normal_uncertainty_is_calibrated_and_scores_best():
    random = np.random.default_rng(0)
    table = confounded(4000, kappa=0.0, seed=2)
    std = random.uniform(0.2, 2, table.n)
    effect = table.effect + std * random.standard_normal(table.n)
    exact = evaluate_model(Fixed(effect, std=std), table)
    np.testing.assert_allclose(exact.calibration.measured, exact.calibration.nominal, atol=0.03)
    assert exact.metrics["cate_width_95"] == pytest.approx(2 * norm.ppf(0.975) * std.mean())
    for factor in (0.5, 2.0):
        other = evaluate_model(Fixed(effect, std=factor * std), table).metrics
        assert other["crps"] > exact.metrics["crps"]
        assert other["nll"] > exact.metrics["nll"]
        assert other["spearman"] == pytest.approx(exact.metrics["spearman"])
    assert exact.metrics["ause"] < exact.metrics["ause_random"]
    assert exact.metrics["withhold_20_ratio"] < 0.95


def test_the_training_table_is_recognised_and_no_other(model, train, new):
    assert evaluate_model(model, train).in_sample
    assert not evaluate_model(model, new).in_sample
    assert not is_training_table(model, None)
    assert not evaluate_model(model, train.rows(np.arange(0, train.n, 2))).in_sample
    assert not evaluate_model(OLS2().fit(train.x, train.treatment, train.y), train).in_sample


def test_on_training_rows_the_factual_error_is_that_of_members_that_had_not_seen_them(model, train):
    found = evaluate_model(model, without_truth(train), nuisances=guesses(train))
    held = model.calibration_
    own = train.y[held.rows] - held.outcome[train.treatment[held.rows], np.arange(len(held.rows))]
    assert found.metrics["factual_rmse"] == pytest.approx(np.sqrt(np.mean(own**2)))
    seen = train.y - model.predict_outcomes(train.x)[np.arange(train.n), train.treatment]
    assert found.metrics["factual_rmse"] > np.sqrt(np.mean(seen**2))
    assert "outcome_coverage_90" not in found.metrics
    low, high = model.ate_interval(alpha=0.1)
    assert (found.metrics["aipw_ate_low"], found.metrics["aipw_ate_high"]) == pytest.approx((low, high))
    np.testing.assert_allclose(found.pseudo_effect[held.rows], held.pseudo_effect)


def test_outcome_intervals_are_what_the_individual_interval_is_made_of(model, new):
    low, high = model.effect_interval(new.x, 0.1, target="ite")
    (low0, high0), (low1, high1) = (model.outcome_interval(new.x, arm, 0.05) for arm in (0, 1))
    np.testing.assert_allclose(low1 - high0, low, rtol=1e-6)
    np.testing.assert_allclose(high1 - low0, high, rtol=1e-6)
    with pytest.raises(InputError, match="arm: must be 0"):
        model.outcome_interval(new.x, 2)


def test_without_truth_only_what_the_data_tell_is_reported(model, new):
    table = without_truth(new)
    found = evaluate_model(model, table)
    nuisances = cross_fit_nuisances(table.x, table.treatment, table.y)
    assert not {"sqrt_pehe", "spearman", "cate_coverage_90", "wrong_decisions"} & set(found.metrics)
    assert found.calibration is None
    assert found.deferral is None
    assert set(found.withholding) == {"factual", "r_loss"}
    arm = table.treatment
    inside = np.zeros(table.n, dtype=bool)
    for a in (0, 1):
        lower, upper = model.outcome_interval(table.x[arm == a], a, 0.1)
        inside[arm == a] = (lower <= table.y[arm == a]) & (table.y[arm == a] <= upper)
    assert found.metrics["outcome_coverage_90"] == pytest.approx(inside.mean())
    assert found.metrics["propensity_auc"] == pytest.approx(
        roc_auc_score(arm, model.effect_inference(table.x).propensity)
    )
    effect = model.effect(table.x)
    loss = np.mean((table.y - nuisances.outcome_mean - (arm - nuisances.propensity) * effect) ** 2)
    assert found.metrics["r_loss"] == pytest.approx(loss)
    assert found.withholding["r_loss"].curve[0] == pytest.approx(np.sqrt(loss))
    assert found.metrics["aipw_ate_low"] < new.effect.mean() < found.metrics["aipw_ate_high"]


def test_decisions_are_the_models_own(model, new):
    found = evaluate_model(model, new, cost=1.0).metrics
    decision = model.decide(new.x, 1.0)
    for name, key in (("treat", "treat_share"), ("control", "control_share"), ("defer", "deferred_share")):
        assert found[key] == np.mean(decision == name)
    truth, made = new.effect, decision != "defer"
    wrong = ((decision == "treat") & (truth < 1)) | ((decision == "control") & (truth > 1))
    assert found["decide_wrong"] == pytest.approx(wrong[made].mean())
    assert found["wrong_decisions"] == pytest.approx(np.mean((model.effect(new.x) > 1) != (truth > 1)))


def test_binary_outcomes_are_judged_by_probabilities(new):
    table = as_binary(new)
    random = np.random.default_rng(0)
    p = np.clip(random.beta(2, 2, (table.n, 2)), 0.01, 0.99)
    found = evaluate_model(Fixed(p[:, 1] - p[:, 0], p, std=np.full(table.n, 0.1)), table)
    both = table.potential_outcomes()
    seen = p[np.arange(table.n), table.treatment]
    assert found.metrics["auc_both"] == pytest.approx(roc_auc_score(both.T.ravel(), p.T.ravel()))
    assert found.metrics["auc_factual"] == pytest.approx(roc_auc_score(table.y, seen))
    assert found.metrics["factual_auc"] == pytest.approx(roc_auc_score(table.y, seen))
    assert found.metrics["factual_log_loss"] == pytest.approx(log_loss(table.y, seen))
    # Both surfaces are outcomes: nobody knows the effect that an interval should hold.
    assert found.calibration is None
    assert "crps" not in found.metrics


def test_a_trial_gives_policy_risks_with_intervals():
    random = np.random.default_rng(0)
    n = 2000
    arm, x = random.integers(0, 2, n), random.standard_normal((n, 1))
    effect = np.where(x[:, 0] > 0, 0.4, -0.4)
    y = (random.random(n) < 0.5 + effect * (arm - 0.5)).astype(float)
    trial = random.random(n) < 0.8
    table = EffectTable("trial", x, arm, y, ("x",), "binary", randomised=trial)
    found = evaluate_model(Fixed(effect, std=np.ones(n)), table, nuisances=guesses(table)).metrics
    policy = effect[trial] > 0
    a, b = y[trial][policy & (arm[trial] == 1)], y[trial][~policy & (arm[trial] == 0)]
    assert found["policy_risk"] == pytest.approx(1 - (policy.mean() * a.mean() + (~policy).mean() * b.mean()))
    assert found["policy_risk_treat_all"] == pytest.approx(1 - y[trial & (arm == 1)].mean())
    assert found["policy_risk_treat_none"] == pytest.approx(1 - y[trial & (arm == 0)].mean())
    assert found["policy_risk_low"] < found["policy_risk"] < found["policy_risk_high"]
    share = policy.mean()
    error = np.sqrt(share**2 * a.var() / len(a) + (1 - share) ** 2 * b.var() / len(b))
    assert found["policy_risk_high"] - found["policy_risk_low"] == pytest.approx(2 * 1.96 * error, rel=0.15)
    assert found["policy_gain_low"] > 0.1
    assert abs(found["jobs_att_error"]) < 0.1


def test_a_trial_without_one_arm_is_left_out(new):
    table = replace(without_truth(new), randomised=new.treatment == 1)
    found = evaluate_model(Fixed(np.zeros(new.n)), table, nuisances=guesses(table))
    assert "policy_risk" not in found.metrics


def test_estimators_without_uncertainty_get_errors_only(train, new):
    fitted = KNNMatching().fit(train.x, train.treatment, train.y)
    found = evaluate_model(fitted, new)
    assert {"sqrt_pehe", "factual_rmse"} <= set(found.metrics)
    assert not found.withholding
    assert found.to_frame().empty
    assert found.pseudo_effect is None


def test_a_constant_uncertainty_ranks_nothing(train, new):
    found = evaluate_model(OLS1().fit(train.x, train.treatment, train.y), new).metrics
    assert found["spearman"] == 0
    assert found["ause"] == pytest.approx(found["ause_random"])
    assert found["withhold_20_ratio"] == pytest.approx(1)


def test_thresholds_come_from_the_reference(new):
    error = np.linspace(0, 2, new.n)
    said = Fixed(new.effect + error, std=error + 1)
    half = evaluate_model(said, new, reference=np.linspace(1, 2, 101)).metrics
    # The threshold is 1.8: error .8 of 2.
    assert half["threshold_20_withheld"] == pytest.approx(0.6, abs=0.01)
    assert half["threshold_20_ratio"] == pytest.approx(0.4, abs=0.01)
    assert "threshold_20_ratio" not in evaluate_model(said, new).metrics


def test_columns_are_named_for_a_model_that_knows_names(train):
    frame = pd.DataFrame(train.x, columns=list(train.feature_names))
    fitted = OLS2().fit(frame, train.treatment, train.y)
    assert list(as_rows(fitted, train).columns) == list(train.feature_names)
    assert evaluate_model(fitted, train).metrics["sqrt_pehe"] < 1
    assert as_rows(OLS2().fit(train.x, train.treatment, train.y), train) is train.x


def test_the_frame_holds_every_curve_and_all_metrics_are_finite(model, new):
    found = evaluate_model(model, new)
    frame = found.to_frame()
    assert list(frame.columns) == ["curve", "x", "y"]
    withheld = frame[frame.curve == "withholding/effect"]
    np.testing.assert_array_equal(withheld.y, found.withholding["effect"].curve)
    assert set(frame.curve) >= {"withholding/factual/oracle", "calibration/coverage", "deferral"}
    assert np.isfinite(list(found.metrics.values())).all()
    assert all(type(value) is float for value in found.metrics.values())


def test_bad_arguments_are_refused(model, new):
    with pytest.raises(InputError, match="alpha"):
        evaluate_model(model, new, alpha=1.5)
    with pytest.raises(InputError, match="shape"):
        evaluate_model(Fixed(np.zeros((new.n, 1)), np.zeros((new.n, 2))), new)
