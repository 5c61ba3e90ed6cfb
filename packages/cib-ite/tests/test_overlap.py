"""Propensities and support against scikit-learn, brute force over leaves, and data of which the answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.model_selection import StratifiedKFold

from cib_ite.data import overlap_failure
from cib_ite.overlap import ForestArrays, Overlap, auc, fit_overlap
from shared_core.runs import load_tree, save_tree

SEEDS = (0, 1, 2)


def ihdp_like(seed: int):
    """747 rows of 6 numbers and 19 flags, a fifth treated, by a logit as strong as that of the IHDP trial's data."""
    random = np.random.default_rng(seed)
    numbers = random.normal(size=(747, 6))
    flags = (random.random((747, 19)) < random.uniform(0.1, 0.6, 19)).astype(float)
    x = np.hstack([numbers, flags])
    logit = -1.6 + x @ random.normal(0, 0.25, 25)
    return x, (random.random(747) < 1 / (1 + np.exp(-logit))).astype(np.int64)


@pytest.fixture(scope="module")
def found() -> dict[int, tuple[Overlap, np.ndarray, np.ndarray, np.ndarray]]:
    made = {}
    for seed in SEEDS:
        table, region = overlap_failure(seed=seed)
        made[seed] = (fit_overlap(table.x, table.treatment, seed=seed), table.x, table.treatment, region)
    return made


@pytest.fixture(scope="module")
def forest():
    random = np.random.default_rng(0)
    x = random.normal(size=(300, 4))
    # Round values sit on thresholds, where single and double precision part.
    x[:, 3] = np.round(x[:, 3], 1)
    t = (random.random(300) < np.where(x[:, 0] > 0.8, 0.0, 0.5)).astype(np.int64)
    made = RandomForestClassifier(12, min_samples_leaf=8, max_features=0.5, random_state=3).fit(x, t)
    return made, x, t


# ---- the forest


def test_a_forest_of_arrays_predicts_what_scikit_learn_does(forest):
    made, x, _ = forest
    new = np.vstack([x, np.random.default_rng(1).normal(0, 3, (500, 4)), np.zeros((1, 4)), np.full((1, 4), 1e6)])
    share, _ = ForestArrays.of(made).predict(new)
    np.testing.assert_allclose(share, made.predict_proba(new)[:, 1], rtol=0, atol=1e-12)


def test_purity_is_the_share_of_leaves_with_one_arm_only(forest):
    made, x, t = forest
    new = np.random.default_rng(2).normal(size=(40, 4))
    pure = np.zeros(40)
    for tree, sampled in zip(made.estimators_, made.estimators_samples_, strict=True):
        trained, reached = tree.apply(x[sampled]), tree.apply(new)
        for row, leaf in enumerate(reached):
            pure[row] += len(set(t[sampled][trained == leaf].tolist())) == 1
    np.testing.assert_allclose(ForestArrays.of(made).predict(new)[1], pure / 12)
    assert 0 < pure.mean() < 12


def test_a_tree_of_one_leaf_is_its_root():
    x, t = np.zeros((40, 2)), np.arange(40) % 2
    arrays = ForestArrays.of(RandomForestClassifier(3, random_state=0, bootstrap=False).fit(x, t))
    share, pure = arrays.predict(np.ones((5, 2)))
    assert share.tolist() == [0.5] * 5
    assert pure.tolist() == [0.0] * 5


# ---- the propensity


@pytest.mark.parametrize("levels", [3, 1000])
def test_auc_equals_scikit_learns(levels):
    random = np.random.default_rng(levels)
    score, positive = random.integers(0, levels, 200) / levels, random.integers(0, 2, 200)
    assert auc(score, positive) == pytest.approx(roc_auc_score(positive, score), abs=1e-12)
    assert auc(-score, positive) == pytest.approx(1 - auc(score, positive))


def test_auc_of_one_class_is_a_half():
    assert auc(np.arange(4.0), np.ones(4, dtype=np.int64)) == 0.5
    assert auc(np.arange(4.0), np.zeros(4, dtype=np.int64)) == 0.5


def test_parts_and_their_weight_are_those_of_a_search_with_scikit_learn(found):
    """Fit both again, and choose C and the weight by trying all of them on out-of-fold log loss."""
    made, x, t, _ = found[0]
    folds = list(StratifiedKFold(5, shuffle=True, random_state=0).split(x, t))
    held: dict[float, np.ndarray] = {}
    for c in (0.01, 0.1, 1.0, 10.0):
        held[c] = np.zeros(len(x))
        for train, test in folds:
            fitted = LogisticRegression(C=c, max_iter=500).fit(x[train], t[train])
            held[c][test] = fitted.predict_proba(x[test])[:, 1]
    best = min(held, key=lambda c: log_loss(t, held[c]))
    logistic = LogisticRegression(C=best, max_iter=500).fit(x, t)
    np.testing.assert_allclose(made.coefficients, [*logistic.coef_[0], logistic.intercept_[0]])
    smallest = min(t.mean(), 1 - t.mean())
    leaf = int(np.ceil(np.log(4e-3) / np.log(1 - smallest)))
    assert (1 - smallest) ** leaf <= 4e-3 < (1 - smallest) ** (leaf - 1)
    leaf = max(10, leaf)
    forest = RandomForestClassifier(100, min_samples_leaf=leaf, max_features=0.5, oob_score=True, random_state=0)
    bagged = forest.fit(x, t).oob_decision_function_[:, 1]
    blends = {w: (1 - w) * held[best] + w * bagged for w in np.linspace(0, 1, 11)}
    losses = {w: log_loss(t, np.clip(p, 1e-6, 1 - 1e-6)) for w, p in blends.items()}
    assert made.weight == min(losses, key=losses.__getitem__)
    np.testing.assert_allclose(made.training, blends[made.weight], atol=1e-12)
    assert made.auc == pytest.approx(roc_auc_score(t, made.training))
    expected = (1 - made.weight) * logistic.predict_proba(x)[:, 1] + made.weight * forest.predict_proba(x)[:, 1]
    np.testing.assert_allclose(made.propensity(x), expected, atol=1e-9)


def test_the_training_propensity_does_not_see_its_own_row():
    """Where treatment is a coin, an out-of-fold propensity cannot tell it, and an in-sample one can."""
    random = np.random.default_rng(5)
    x, t = random.normal(size=(200, 20)), random.integers(0, 2, 200)
    made = fit_overlap(x, t)
    assert made.auc == auc(made.training, t) < 0.6
    assert auc(made.propensity(x), t) > made.auc + 0.1
    assert made.share == t.mean()


def test_a_smooth_propensity_is_recovered():
    random = np.random.default_rng(6)
    x = random.normal(size=(1500, 3))
    true = 1 / (1 + np.exp(-(0.5 + x[:, 0] - x[:, 1])))
    made = fit_overlap(x, (random.random(1500) < true).astype(np.int64))
    new = random.normal(size=(400, 3))
    expected = 1 / (1 + np.exp(-(0.5 + new[:, 0] - new[:, 1])))
    assert np.abs(made.propensity(new) - expected).mean() < 0.05


# ---- who is flagged


@pytest.mark.parametrize("seed", SEEDS)
def test_a_corner_that_nobody_is_treated_in_is_flagged_and_little_else(found, seed):
    made, x, _, region = found[seed]
    for rows, inside in ((x, region), fresh(seed)):
        _, support, alone = made.look(rows)
        assert alone[inside].mean() > 0.6
        assert alone[~inside].mean() < 0.08
        assert support[inside].mean() < 0.5 < support[~inside].mean()
    assert made.flagged == made.look(x)[2].mean()


def fresh(seed: int):
    table, region = overlap_failure(seed=seed + 1000)
    return table.x, region


def test_a_regression_alone_would_have_missed_the_corner(found):
    made, x, _, region = found[0]
    smooth = 1 / (1 + np.exp(-(x @ made.coefficients[:-1] + made.coefficients[-1])))
    assert (smooth[region] < 0.05).mean() < 0.1


@pytest.mark.parametrize("seed", SEEDS[:2])
def test_data_with_overlap_are_hardly_flagged(seed):
    x, t = ihdp_like(seed)
    assert 0.12 < t.mean() < 0.3
    assert fit_overlap(x, t, seed=seed).flagged < 0.05


def test_bounds_flag_what_is_outside_of_them(found):
    made, x, t, _ = found[0]
    loose = fit_overlap(x[:500], t[:500], bounds=(0.3, 0.6))
    propensity, support, alone = loose.look(x)
    np.testing.assert_array_equal(alone, (propensity < 0.3) | (propensity > 0.6) | (support < 0.5))
    assert alone.mean() > 2 * made.flagged


# ---- keeping


def test_saved_and_read_again_it_says_the_same(found, tmp_path):
    made, x, _, _ = found[1]
    save_tree(tmp_path / "o.safetensors", made.to_tree())
    for again in (Overlap.from_tree(made.to_tree()), Overlap.from_tree(load_tree(tmp_path / "o.safetensors"))):
        for one, other in zip(made.look(x), again.look(x), strict=True):
            np.testing.assert_array_equal(one, other)
        assert (again.bounds, again.weight, again.share) == (made.bounds, made.weight, made.share)
        assert (again.auc, again.flagged) == (made.auc, made.flagged)
        np.testing.assert_array_equal(again.training, made.training)


def test_it_is_reproducible_by_its_seed(found):
    _, x, t, _ = found[0]
    small, arm = x[:200], t[:200]
    first, second, third = (fit_overlap(small, arm, seed=seed) for seed in (4, 4, 5))
    np.testing.assert_array_equal(first.propensity(x), second.propensity(x))
    assert not np.array_equal(first.propensity(x), third.propensity(x))


def test_few_rows_of_an_arm_and_a_row_alone_are_no_trouble():
    random = np.random.default_rng(8)
    x = random.normal(size=(60, 2))
    t = np.zeros(60, dtype=np.int64)
    t[:3] = 1
    made = fit_overlap(x, t)
    propensity = made.propensity(x)
    assert ((propensity >= 0) & (propensity <= 1)).all()
    np.testing.assert_allclose(made.propensity(x[:1]), propensity[:1])
