"""Splits, tuning and summaries of the comparison: nothing leaks, everyone is treated alike, results can be resumed."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from shared_core.errors import UnknownKeyError
from shared_core.runs import Run
from sparsity_norm.data import Table, latent_level, load_table, photograph
from sparsity_norm.experiments import (
    RATING_METHODS,
    OutOfFold,
    compare_ratings,
    compare_tables,
    diagnose_predictions,
    drift_curve,
    out_of_fold,
    table_cell,
    table_metrics,
)
from sparsity_norm.plots import plot_comparison
from sparsity_norm.ratings import RatingMatrix


@pytest.fixture
def run(tmp_path):
    head = {"package": "sparsity-norm", "version": "0", "command": "compare", "config": {}}
    return lambda resume=False, name="run": Run(tmp_path / name, **head, resume=resume)


@pytest.fixture(scope="module")
def ratings() -> RatingMatrix:
    random = np.random.default_rng(0)
    users, items = np.nonzero(random.random((30, 20)) < 0.5)
    return RatingMatrix.from_triplets(users, items, random.integers(1, 6, len(users)).astype(float))


SMALL = latent_level(n=120, features=8)


def test_every_row_is_predicted_once_and_groups_stay_together():
    groups = np.arange(120) // 6
    table = Table("t", SMALL.x, SMALL.y, "regression", groups)
    found = out_of_fold(table, "mean", seed=0, model="linear", folds=5)
    assert sorted(found.rows) == list(range(120))
    one = out_of_fold(table, "mean", seed=0, model="linear", folds=1)
    assert 20 <= len(one.rows) <= 28
    assert all(np.isin(np.flatnonzero(groups == group), one.rows).all() for group in np.unique(groups[one.rows]))


@pytest.mark.parametrize(
    ("method", "model"), [("sn", "linear"), ("sn", "network"), ("mean", "network"), ("tree", "network")]
)
def test_test_targets_do_not_reach_the_model(method, model):
    """Change the targets of the test rows: predictions stay, errors move."""
    before = out_of_fold(SMALL, method, seed=0, model=model)
    spoiled = SMALL.y.copy()
    spoiled[before.rows] += 100
    after = out_of_fold(Table("t", SMALL.x, spoiled, "regression"), method, seed=0, model=model)
    np.testing.assert_array_equal(after.scores, before.scores)
    assert np.abs(after.truth - before.truth).min() > 99


@pytest.mark.parametrize("method", ["sn", "sn-center", "mean", "knn", "softimpute"])
def test_test_inputs_do_not_reach_what_is_fitted(method):
    before = out_of_fold(SMALL, method, seed=0, model="linear")
    row = before.rows[0]
    spoiled = SMALL.x.copy()
    spoiled[before.rows[1:]] *= 1000
    after = out_of_fold(Table("t", spoiled, SMALL.y, "regression"), method, seed=0, model="linear")
    assert after.rows[0] == row
    np.testing.assert_allclose(after.scores[0], before.scores[0], rtol=1e-9)


def test_all_methods_see_the_same_removals_and_splits():
    table = load_table("breast-cancer")
    cells = [table_cell(table, method, seed=1, model="linear", rates=(0.1, 0.9)) for method in ("zero", "mean")]
    assert cells[0]["true_correlation"] == cells[1]["true_correlation"]
    assert cells[0]["drift"][0] == cells[1]["drift"][0]


def test_metrics_are_scikit_learns():
    random = np.random.default_rng(0)
    truth = random.integers(0, 2, 50).astype(float)
    score = random.random(50)
    scores = np.column_stack([1 - score, score])
    found = OutOfFold(np.arange(50), np.ones(50), scores, truth, {}, 0.0)
    metrics = table_metrics(found, "classification")
    assert metrics["log loss"] == pytest.approx(log_loss(truth, score))
    assert metrics["AUROC"] == pytest.approx(roc_auc_score(truth, score))
    assert metrics["accuracy"] == 100 * np.mean((score > 0.5) == truth)
    np.testing.assert_array_equal(found.prediction, score)
    np.testing.assert_array_equal(found.target, truth)


def test_same_budget_for_every_tuned_method():
    assert {len(method.settings) for name, method in RATING_METHODS.items() if name != "global-mean"} == {5}


def test_comparison_of_tables_resumes_to_the_same_results(run):
    def compare(resume: bool, stop_after: int | None = None, name: str = "run"):
        seen: list[str] = []

        def advance(note: str) -> None:
            seen.append(note)
            if len(seen) == stop_after:
                raise KeyboardInterrupt

        found = compare_tables(
            run(resume, name), SMALL, methods=["zero", "sn"], seeds=[0, 1], model="linear", advance=advance
        )
        return [row.model_dump(exclude={"seconds"}) for row in found[0]], found[1]

    whole = compare(False, name="whole")
    with pytest.raises(KeyboardInterrupt):
        compare(False, stop_after=3)
    assert compare(True) == whole


def test_comparison_of_ratings_has_rows_and_claims(run, ratings, tmp_path):
    methods = ["autorec-sn", "autorec-zero", "baseline-only", "global-mean", "item-knn", "biased-mf"]
    options = {"hidden": 3, "epochs": 2, "device": "cpu"}
    results, claims = compare_ratings(run(), ratings, name="toy", methods=methods, seeds=[0, 1], options=options)
    assert {(row.metric, row.method) for row in results} == {
        (metric, method) for metric in ("RMSE", "MAE", "count correlation gap") for method in methods
    }
    assert len(claims) == 5
    plot_comparison(tmp_path / "c.png", results)
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_unknown_methods_are_named(run, ratings):
    with pytest.raises(UnknownKeyError, match="no method for tables 'x'; there are sn,"):
        out_of_fold(SMALL, "x", seed=0)
    with pytest.raises(UnknownKeyError, match="no method for ratings 'x'; there are autorec-sn"):
        compare_ratings(run(), ratings, name="toy", methods=["x"], seeds=[0])
    with pytest.raises(UnknownKeyError, match="no table 'x'"):
        load_table("x")


def test_drift_is_the_mean_of_prediction_minus_truth():
    count = np.repeat([1.0, 5.0], 10)
    truth = np.arange(20.0)
    curve = drift_curve(truth + count, count, truth)
    np.testing.assert_allclose(curve.count, [1, 5])
    np.testing.assert_allclose(curve.mean, [1, 5])
    np.testing.assert_allclose(curve.half_width, 0, atol=1e-12)


def test_diagnosis_of_foreign_predictions_tells_bias_from_none():
    random = np.random.default_rng(0)
    count, truth = random.integers(1, 50, 500).astype(float), random.normal(size=500)
    assert diagnose_predictions("a", truth + 0.1 * count, count, truth).claims[0].holds
    assert not diagnose_predictions("a", 0.7 * truth, count, truth).claims[0].holds


def test_the_photograph_is_complete_and_its_tiles_do_not_overlap():
    table = photograph(size=7)
    assert table.x.shape == (61 * 91, 48)
    assert not np.isnan(table.x).any()
    assert 0 <= table.x.min() < table.x.max() <= 1
    assert np.corrcoef(table.x.mean(axis=1), table.y)[0, 1] > 0.9
