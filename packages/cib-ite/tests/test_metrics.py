from __future__ import annotations

import doctest
import itertools

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from cib_ite import metrics
from shared_core.errors import InputError


def draw(seed=0, n=60):
    rng = np.random.default_rng(seed)
    return rng, rng.normal(size=n), rng.normal(size=n), rng.normal(size=n), rng.integers(0, 2, n)


def test_docstring_examples_run():
    assert doctest.testmod(metrics).failed == 0


class TestAgainstTheTruth:
    def test_errors_are_sums_over_rows(self):
        _, effect, mu0, mu1, t = draw()
        squares = [(e - (b - a)) ** 2 for e, a, b in zip(effect, mu0, mu1, strict=True)]
        assert metrics.sqrt_pehe(effect, mu0, mu1) == pytest.approx((sum(squares) / len(squares)) ** 0.5)
        gaps = effect - (mu1 - mu0)
        assert metrics.ate_error(effect, mu0, mu1) == pytest.approx(abs(gaps.sum()) / len(gaps))
        assert metrics.att_error(effect, mu0, mu1, t) == pytest.approx(abs(gaps[t == 1].sum()) / t.sum())

    def test_a_constant_shift_is_all_of_every_error(self):
        _, _, mu0, mu1, t = draw()
        shifted = mu1 - mu0 + 0.7
        for found in (
            metrics.sqrt_pehe(shifted, mu0, mu1),
            metrics.ate_error(shifted, mu0, mu1),
            metrics.att_error(shifted, mu0, mu1, t),
        ):
            assert found == pytest.approx(0.7)

    @pytest.mark.parametrize("ties", [False, True])
    def test_twins_auc_is_that_of_scikit_learn(self, ties):
        rng, p0, p1, _, t = draw(3, 200)
        if ties:
            p0, p1 = p0.round(0), p1.round(0)
        y0, y1 = (rng.random(200) < 0.3).astype(int), (rng.random(200) < 0.2).astype(int)
        found = metrics.twins_auc(p0, p1, y0, y1, t)
        assert found["both"] == pytest.approx(roc_auc_score(np.r_[y0, y1], np.r_[p0, p1]))
        factual = np.where(t == 1, y1, y0), np.where(t == 1, p1, p0)
        other = np.where(t == 1, y0, y1), np.where(t == 1, p0, p1)
        assert found["factual"] == pytest.approx(roc_auc_score(*factual))
        assert found["counterfactual"] == pytest.approx(roc_auc_score(*other))

    def test_auc_without_both_classes_is_refused(self):
        with pytest.raises(InputError, match="potential outcomes are all 0"):
            metrics.twins_auc([0.1, 0.2], [0.1, 0.2], [0, 0], [0, 0], [0, 1])


def brute_force_risk(effect, t, y):
    """One less the sum, over what the policy says, of its share times the mean outcome of those who got just that."""
    value = 0.0
    for arm in (0, 1):
        said = [i for i in range(len(effect)) if (effect[i] > 0) == bool(arm)]
        got = [y[i] for i in said if t[i] == arm]
        if got:
            value += len(said) / len(effect) * sum(got) / len(got)
    return 1 - value


class TestPolicyRisk:
    t = np.array([1, 1, 1, 0, 0, 0])
    y = np.array([1.0, 0.0, 1.0, 0.0, 1.0, 0.0])

    def test_every_policy_on_six_rows(self):
        risks = set()
        for signs in map(list, itertools.product([-1.0, 1.0], repeat=6)):
            risk = metrics.policy_risk(signs, self.t, self.y)
            assert risk == pytest.approx(brute_force_risk(signs, self.t, self.y))
            risks.add(round(risk, 6))
        assert len(risks) > 10

    def test_treat_all_and_none_are_arm_means(self):
        assert metrics.policy_risk(np.ones(6), self.t, self.y) == pytest.approx(1 - 2 / 3)
        assert metrics.policy_risk(np.zeros(6), self.t, self.y) == pytest.approx(1 - 1 / 3)

    def test_an_empty_cell_counts_nothing(self):
        # Whoever is to be treated was not, and the other way round: both cells are empty.
        assert metrics.policy_risk([-1.0, -1, -1, 1, 1, 1], self.t, self.y) == 1.0
        # Two are to be treated, neither was; four are not to be, of whom one was a control with outcome 1.
        assert metrics.policy_risk([-1.0, -1, -1, 1, -1, 1], self.t, self.y) == pytest.approx(1 - 4 / 6 * 1.0)

    def test_only_randomised_rows_count(self):
        _, effect, y, _, t = draw(1)
        e = np.arange(60) % 3 == 0
        assert metrics.policy_risk(effect, t, y, e.astype(int)) == metrics.policy_risk(effect[e], t[e], y[e])
        with pytest.raises(InputError, match="randomised is 0 in every row"):
            metrics.policy_risk(effect, t, y, np.zeros(60))

    def test_curve_restricts_to_the_certain_rows(self):
        _, effect, y, score, t = draw(2)
        e = np.arange(60) % 4 != 0
        curve = metrics.policy_risk_curve(effect, score, t, y, [0.0, 0.2, 0.4], e)
        for share, found in zip(curve.fractions, curve.curve, strict=True):
            keep = e & (score <= np.sort(score[e])[round(45 * (1 - share)) - 1])
            assert found == pytest.approx(brute_force_risk(effect[keep], t[keep], y[keep]))

    def test_jobs_att(self):
        effect, t, y, e = [0.3, 0.5, 9.0, 9.0], [1, 1, 0, 0], [1.0, 0.0, 0.25, 7.0], [1, 1, 1, 0]
        assert metrics.jobs_att_error(effect, t, y, e) == pytest.approx(abs(0.4 - (0.5 - 0.25)))
        with pytest.raises(InputError, match="2 treated and 0 control"):
            metrics.jobs_att_error(effect, t, y, [1, 1, 0, 0])


class TestWithoutTruth:
    def test_pehe_nn_by_brute_force(self):
        rng, effect, y, _, t = draw(5)
        x = rng.normal(size=(60, 3))
        total = []
        for i in np.flatnonzero(t == 1):
            nearest = min(np.flatnonzero(t == 0), key=lambda j: np.linalg.norm(x[i] - x[j]))
            total.append((effect[i] - (y[i] - y[nearest])) ** 2)
        expected = np.mean(total) ** 0.5
        assert metrics.pehe_nn(effect, x, t, y) == pytest.approx(expected)
        changed = np.where(t == 1, effect, 99.0)
        assert metrics.pehe_nn(changed, x, t, y) == pytest.approx(expected)

    def test_pehe_nn_in_blocks_is_the_same(self, monkeypatch):
        rng, effect, y, _, t = draw(5)
        x = rng.normal(size=(60, 3))
        whole = metrics.pehe_nn(effect, x, t, y)
        monkeypatch.setattr(metrics, "_BLOCK_ELEMENTS", 70)
        assert metrics.pehe_nn(effect, x, t, y) == whole

    def test_the_true_effect_minimises_both_risks(self):
        rng = np.random.default_rng(0)
        n = 40_000
        x = rng.normal(size=n)
        e = 1 / (1 + np.exp(-x))
        t = (rng.random(n) < e).astype(float)
        mu0, tau = np.sin(x), 1 + 0.5 * x
        y = mu0 + t * tau + rng.normal(size=n)
        risk = lambda effect: metrics.tau_risk_r(effect, t, y, mu0 + e * tau, e)  # noqa: E731
        pseudo = metrics.dr_pseudo_outcome(t, y, mu0, mu0 + tau, e)
        assert risk(tau) == pytest.approx(1, abs=0.03)
        for wrong in (tau + 0.3, tau * 0.7, np.full(n, tau.mean())):
            assert risk(wrong) > risk(tau) + 0.005
            assert metrics.tau_risk_dr(wrong, pseudo) > metrics.tau_risk_dr(tau, pseudo) + 0.01

    @pytest.mark.parametrize("right", ["both", "outcomes", "propensity"])
    def test_pseudo_outcome_is_unbiased_if_either_nuisance_is_right(self, right):
        rng = np.random.default_rng(1)
        n = 200_000
        x = rng.normal(size=n)
        e = 1 / (1 + np.exp(-x))
        t = (rng.random(n) < e).astype(float)
        mu0, mu1 = x, 2 + 2 * x
        y = np.where(t == 1, mu1, mu0) + rng.normal(size=n)
        guess = np.zeros(n), np.zeros(n)
        outcomes = (mu0, mu1) if right != "propensity" else guess
        score = e if right != "outcomes" else np.full(n, 0.5)
        excess = metrics.dr_pseudo_outcome(t, y, *outcomes, score) - (mu1 - mu0)
        # Unbiased given x, not on average only: uncorrelated with x too.
        for values in (excess, excess * x):
            assert abs(values.mean()) < 4 * values.std() / n**0.5
        if right == "both":
            biased = metrics.dr_pseudo_outcome(t, y, *guess, np.full(n, 0.5)) - (mu1 - mu0)
            assert abs(biased.mean()) > 0.5

    def test_propensities_at_the_ends_are_refused(self):
        with pytest.raises(InputError, match=r"propensity is 1 at row 1.*clip"):
            metrics.dr_pseudo_outcome([0, 1], [0.0, 1], [0.0, 0], [0.0, 0], [0.5, 1.0])


class TestCrossFit:
    @staticmethod
    def data(binary=False, n=240):
        rng = np.random.default_rng(4)
        x = rng.normal(size=(n, 3))
        t = (rng.random(n) < 1 / (1 + np.exp(-x[:, 0]))).astype(int)
        mean = x[:, 0] + t * (2 - x[:, 1])
        y = (rng.random(n) < 1 / (1 + np.exp(-mean))).astype(float) if binary else mean + 0.1 * rng.normal(size=n)
        return x, t, y

    def test_linear_surfaces_are_found(self):
        x, t, y = self.data()
        found = metrics.cross_fit_nuisances(x, t, y)
        assert found.chosen["mu0"] == found.chosen["mu1"] == found.chosen["propensity"] == "linear"
        assert np.abs(found.mu1 - found.mu0 - (2 - x[:, 1])).mean() < 0.05
        assert np.corrcoef(found.propensity, x[:, 0])[0, 1] > 0.9
        assert found.loss["mu0"] == pytest.approx(0.01, abs=0.004)

    def test_boosting_is_chosen_where_the_surface_is_no_plane(self):
        x, t, _ = self.data(n=500)
        y = np.where(x[:, 0] * x[:, 1] > 0, 3.0, 0.0) + 0.1 * t
        assert metrics.cross_fit_nuisances(x, t, y, folds=2).chosen["outcome_mean"] == "boosting"

    def test_no_row_has_seen_its_own_outcome(self):
        x, t, y = self.data()
        before = metrics.cross_fit_nuisances(x, t, y, folds=2)
        y[7] += 0.5
        after = metrics.cross_fit_nuisances(x, t, y, folds=2)
        for name in ("outcome_mean", "mu0", "mu1"):
            # A change of model would change every row.
            assert before.chosen[name] == after.chosen[name]
            assert getattr(after, name)[7] == pytest.approx(getattr(before, name)[7], abs=1e-9)
            changed = np.abs(getattr(after, name) - getattr(before, name)).max()
            assert changed == 0 if name == f"mu{1 - t[7]}" else changed > 1e-4

    def test_binary_outcomes_give_probabilities(self):
        x, t, y = self.data(binary=True)
        found = metrics.cross_fit_nuisances(x, t, y, folds=2)
        for values in (found.outcome_mean, found.mu0, found.mu1):
            assert ((values >= 0) & (values <= 1)).all()
        assert found.loss["outcome_mean"] < np.log(2)
        continuous = metrics.cross_fit_nuisances(x, t, y, outcome="continuous", folds=2)
        assert not np.array_equal(continuous.mu0, found.mu0)

    def test_same_seed_same_nuisances_and_propensities_clipped(self):
        x, t, y = self.data()
        a, b, c = (metrics.cross_fit_nuisances(x, t, y, seed=seed, clip=0.2, folds=2) for seed in (0, 0, 1))
        assert np.array_equal(a.mu1, b.mu1)
        assert np.array_equal(a.propensity, b.propensity)
        assert not np.array_equal(a.mu1, c.mu1)
        assert a.propensity.min() == 0.2
        assert a.propensity.max() == 0.8

    def test_bad_input(self):
        x, t, y = self.data()
        few = np.r_[np.ones(3, dtype=int), np.zeros(237, dtype=int)]
        with pytest.raises(InputError, match="an arm of 3 rows; 5 folds"):
            metrics.cross_fit_nuisances(x, few, y)
        with pytest.raises(InputError, match=r"y is .* at row 0; it must be 0 or 1"):
            metrics.cross_fit_nuisances(x, t, y, outcome="binary")
        with pytest.raises(InputError, match=r"X has shape \(239, 3\)"):
            metrics.cross_fit_nuisances(x[1:], t, y)
        x[5, 1] = np.nan
        with pytest.raises(InputError, match="X is nan at row 5, column 1"):
            metrics.cross_fit_nuisances(x, t, y)


class TestReliability:
    @settings(max_examples=25, deadline=None)
    @given(st.integers(0, 10_000), st.booleans())
    def test_spearman_is_that_of_scipy(self, seed, ties):
        _, score, error, _, _ = draw(seed, 30)
        if ties:
            score, error = score.round(0), error.round(0)
        expected = scipy.stats.spearmanr(score, np.abs(error)).statistic
        assert metrics.spearman(score, error) == pytest.approx(expected)

    def test_a_constant_uncertainty_ranks_nothing(self):
        assert metrics.spearman(np.ones(4), [1.0, 2.0, 3.0, 4.0]) == 0

    def test_withholding_drops_the_largest(self):
        _, score, error, _, _ = draw(8, 50)
        found = metrics.withholding_curve(score, error**2, [0.0, 0.1, 0.5, 0.98])
        order = np.argsort(score)
        for share, withheld, value in zip(found.fractions, found.withheld, found.curve, strict=True):
            keep = order[: round(50 * (1 - share))]
            assert value == pytest.approx(np.mean(error[keep] ** 2) ** 0.5)
            assert withheld == pytest.approx(share)

    def test_thresholds_come_from_the_reference(self):
        reference = np.arange(1.0, 11.0)
        found = metrics.withholding_curve([2.0, 20.0, 30.0], [1.0, 4.0, 9.0], [0.0, 0.2, 0.95], reference)
        assert found.withheld == pytest.approx([0, 2 / 3, 1])
        assert found.curve[:2] == pytest.approx([(14 / 3) ** 0.5, 1.0])
        assert np.isnan(found.curve[2])

    def test_perfect_order_leaves_nothing_to_the_oracle(self):
        _, _, error, _, _ = draw(9)
        found = metrics.sparsification(np.abs(error) ** 3, error)
        assert found.ause == pytest.approx(0, abs=1e-12)
        assert found.curve == pytest.approx(found.oracle)
        assert found.ause_random > 0.2
        assert metrics.sparsification(-np.abs(error), error).ause > found.ause_random

    def test_sparsification_by_brute_force(self):
        _, score, error, _, _ = draw(10, 20)
        found = metrics.sparsification(score, error)
        by_score, by_error = np.argsort(score), np.argsort(np.abs(error))
        curve = [np.mean(error[by_score[: 20 - k]] ** 2) ** 0.5 for k in range(20)]
        oracle = [np.mean(error[by_error[: 20 - k]] ** 2) ** 0.5 for k in range(20)]
        assert found.fractions == pytest.approx(np.arange(20) / 20)
        assert found.curve == pytest.approx(curve)
        assert found.oracle == pytest.approx(oracle)
        assert found.random == pytest.approx(np.full(20, curve[0]))
        gap = np.subtract(curve, oracle)
        assert found.ause == pytest.approx(scipy.integrate.trapezoid(gap, dx=1 / 20))
        assert found.ause_random == pytest.approx(scipy.integrate.trapezoid(curve[0] - np.array(oracle), dx=1 / 20))

    def test_chance_is_the_mean_over_orders(self):
        rng, _, error, _, _ = draw(11, 12)
        squares = [metrics.sparsification(rng.permutation(12), error).curve ** 2 for _ in range(1500)]
        assert np.mean(squares, axis=0) == pytest.approx(metrics.sparsification(error, error).random ** 2, rel=0.08)

    def test_ties_are_the_mean_over_their_orders(self):
        score, error = np.array([1.0, 2, 2, 2, 3]), np.array([1.0, 5, 0, 2, 1])
        squares = []
        for order in itertools.permutations([1, 2, 3]):
            broken = np.array([0.0, *order, 9.0])
            squares.append(metrics.sparsification(broken, error).curve ** 2)
        assert metrics.sparsification(score, error).curve ** 2 == pytest.approx(np.mean(squares, axis=0))

    @pytest.mark.parametrize("levels", [1, 3])
    def test_the_order_of_tied_rows_does_not_matter(self, levels):
        rng, effect, error, truth, t = draw(12)
        y = (truth > 0).astype(float)
        score = rng.integers(0, levels, 60).astype(float)
        shares = [0.0, 0.13, 0.5, 0.77]

        def everything(rows):
            u, e, s, z = score[rows], effect[rows], error[rows], truth[rows]
            sparse = metrics.sparsification(u, s)
            return np.r_[
                sparse.curve,
                sparse.ause,
                metrics.spearman(u, s),
                metrics.withholding_curve(u, s**2, shares).curve,
                metrics.policy_risk_curve(e, u, t[rows], y[rows], shares).curve,
                metrics.deferral_curve(e, u, z, 0.1, shares).wrong_rate,
            ]

        expected = everything(np.arange(60))
        for _ in range(5):
            assert everything(rng.permutation(60)) == pytest.approx(expected)
        # Sorted by error within ties: what an unstable or a stable sort would be led astray by.
        assert everything(np.argsort(np.abs(error))) == pytest.approx(expected)

    def test_a_constant_uncertainty_is_chance(self):
        _, _, error, _, _ = draw(13)
        found = metrics.sparsification(np.zeros(60), error)
        assert found.curve == pytest.approx(found.random)
        assert found.ause == pytest.approx(found.ause_random)


class TestDistributions:
    def test_coverage_and_width(self):
        low, high = np.array([0.0, 0.0, -np.inf, 1.0]), np.array([1.0, 1.0, np.inf, 2.0])
        assert metrics.interval_coverage(low, high, [1.0, 1.5, 99.0, 1.0]) == 0.75
        assert metrics.interval_width(low[[0, 3]], high[[0, 3]]) == 1.0
        assert metrics.interval_width(low, high) == np.inf
        with pytest.raises(InputError, match="lower is 2 above upper 1 at row 1"):
            metrics.interval_coverage([0.0, 2.0], [1.0, 1.0], [0.0, 0.0])

    @pytest.mark.parametrize(("mean", "std", "truth"), [(0.0, 1.0, 0.0), (1.0, 0.3, -2.0), (-1.0, 4.0, 2.0)])
    def test_crps_is_the_integral_of_its_definition(self, mean, std, truth):
        normal = scipy.stats.norm(mean, std)
        below, _ = scipy.integrate.quad(lambda x: normal.cdf(x) ** 2, mean - 12 * std - 5, truth)
        above, _ = scipy.integrate.quad(lambda x: normal.sf(x) ** 2, truth, mean + 12 * std + 5)
        assert metrics.gaussian_crps([mean], [std], [truth]) == pytest.approx(below + above, abs=1e-6)

    def test_crps_of_certainty_is_the_absolute_error(self):
        assert metrics.gaussian_crps([0.0, 1.0], [0.0, 0.0], [2.0, 0.0]) == 1.5
        assert metrics.gaussian_crps([0.0], [1e-9], [2.0]) == pytest.approx(2.0)

    def test_nll_is_that_of_scipy(self):
        _, mean, truth, scale, _ = draw(14)
        std = np.exp(scale)
        expected = -scipy.stats.norm.logpdf(truth, mean, std).mean()
        assert metrics.gaussian_nll(mean, std, truth) == pytest.approx(expected)
        with pytest.raises(InputError, match="std is 0 at row 1"):
            metrics.gaussian_nll([0.0, 0.0], [1.0, 0.0], [0.0, 0.0])


class TestDecisions:
    def test_rates(self):
        found = metrics.decision_error(
            ["treat", "treat", "control", "control", "defer"], [1.0, -1.0, 1.0, -1.0, 3.0], cost=0.5
        )
        assert (found.wrong_rate, found.deferral_rate) == (0.5, 0.2)

    def test_an_effect_equal_to_its_cost_is_never_wrong(self):
        assert metrics.decision_error(["treat", "control"], [0.5, 0.5], cost=0.5).wrong_rate == 0

    def test_all_deferred_has_no_rate(self):
        found = metrics.decision_error(["defer", "defer"], [1.0, 2.0])
        assert np.isnan(found.wrong_rate)
        assert found.deferral_rate == 1

    def test_unknown_decision(self):
        with pytest.raises(InputError, match=r"decision is .*maybe.* at row 1"):
            metrics.decision_error(["treat", "maybe"], [1.0, 2.0])

    def test_the_curve_is_decision_error_at_each_share(self):
        _, effect, truth, score, _ = draw(15, 40)
        curve = metrics.deferral_curve(effect, score, truth, 0.2, [0.0, 0.25, 0.5])
        for share, found in zip(curve.fractions, curve.wrong_rate, strict=True):
            made = np.where(effect > 0.2, "treat", "control").astype(object)
            made[np.argsort(score)[round(40 * (1 - share)) :]] = "defer"
            expected = metrics.decision_error(made.astype(str), truth, cost=0.2)
            assert found == pytest.approx(expected.wrong_rate)
            assert expected.deferral_rate == share


class TestBadInput:
    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: metrics.sqrt_pehe([1.0, 2.0], [1.0], [1.0, 2.0]), "mu0 has 1 rows but effect has 2"),
            (lambda: metrics.sqrt_pehe([1.0, np.nan], [1.0, 2.0], [1.0, 2.0]), "effect is nan at row 1"),
            (lambda: metrics.sqrt_pehe([1.0, 2.0], [1.0, 2.0], [np.inf, 2.0]), "mu1 is inf at row 0"),
            (lambda: metrics.sqrt_pehe([], [], []), "effect is empty"),
            (lambda: metrics.sqrt_pehe(np.ones((2, 2)), [1.0, 2.0], [1.0, 2.0]), r"effect has shape \(2, 2\)"),
            (lambda: metrics.sqrt_pehe(["a"], [1.0], [1.0]), "effect holds something that is no number"),
            (lambda: metrics.att_error([1.0], [0.0], [0.0], [2]), "treatment is 2 at row 0; it must be 0 or 1"),
            (lambda: metrics.att_error([1.0], [0.0], [0.0], [0]), "treatment is 0 in every row"),
            (lambda: metrics.policy_risk([1.0], [1], [np.nan]), "y is nan at row 0"),
            (lambda: metrics.pehe_nn([1.0, 1.0], [[1.0], [2.0]], [1, 1], [1.0, 2.0]), "need both"),
            (lambda: metrics.pehe_nn([1.0, 1.0], [["a"], ["b"]], [1, 0], [1.0, 2.0]), "encode text"),
            (lambda: metrics.tau_risk_r([1.0], [1], [1.0], [1.0], [1.5]), r"must lie in \[0, 1\]"),
            (lambda: metrics.sparsification([1.0], [1.0], [0.5, 0.2]), "fractions must rise"),
            (lambda: metrics.withholding_curve([1.0], [1.0], [0.0, 1.0]), r"must lie in \[0, 1\)"),
            (lambda: metrics.withholding_curve([1.0], [-1.0], [0.0]), "error_squared is -1 at row 0"),
            (lambda: metrics.interval_width([np.inf], [np.inf]), "it holds no number"),
            (lambda: metrics.gaussian_crps([0.0], [-1.0], [0.0]), "std is -1 at row 0"),
            (lambda: metrics.decision_error(["treat"], [1.0, 2.0]), "true_effect has 2 rows"),
        ],
    )
    def test_is_named_in_one_line(self, call, message):
        with pytest.raises(InputError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)

    def test_a_column_is_a_vector(self):
        assert metrics.sqrt_pehe(np.ones((3, 1)), np.zeros(3), np.ones(3)) == 0
