"""The command line on users' own files: what goes in, what comes out, what is said when it is wrong."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from shared_core.runs import Run
from shared_core.testing import Caller, figures
from sparsity_norm.cli import line
from sparsity_norm.models import RatingGraph, TableModel, graph_of, load_model
from sparsity_norm.recommend import AutoRecRecommender


@pytest.fixture
def call(tmp_path):
    return Caller(line, tmp_path)


@pytest.fixture
def done(call):
    return call.done


@pytest.fixture
def wrong(call):
    return call.wrong


@pytest.fixture
def table(tmp_path) -> Path:
    """200 patients whose columns share a level that decides the outcome; 0 to 90 % missing a row; one text column."""
    random = np.random.default_rng(0)
    level = random.normal(size=200)
    x = 3 + level[:, None] + random.normal(size=(200, 6))
    x[random.random(x.shape) < random.uniform(0, 0.9, (200, 1))] = np.nan
    frame = pd.DataFrame(x, columns=[f"test{i}" for i in range(6)])
    frame["ward"] = np.where(random.random(200) < 0.2, None, random.choice(["a", "b"], 200))
    frame["died"] = np.where(level > 0, "yes", "no")
    frame["level"] = level
    frame.to_csv(tmp_path / "patients.csv", index=False)
    return tmp_path / "patients.csv"


@pytest.fixture
def ratings(tmp_path) -> Path:
    random = np.random.default_rng(1)
    taste = random.normal(size=(40, 2)) @ random.normal(size=(2, 30)) + 3
    users, items = np.nonzero(random.random((40, 30)) < 0.4)
    values = np.clip(np.round(taste[users, items]), 1, 5).astype(int)
    pd.DataFrame({"user": users + 100, "item": items, "rating": values}).to_csv(tmp_path / "ratings.csv", index=False)
    return tmp_path / "ratings.csv"


FAST_TABLE = ("--epochs", 5, "--layers", "8", "--device", "cpu")
FAST_RATINGS = ("--epochs", 4, "--hidden", 6, "--device", "cpu")


# ---- tables


@pytest.mark.parametrize(("target", "exclude"), [("died", "level"), ("level", "died")])
def test_fit_evaluate_predict_export_a_table(done, call, table, tmp_path, target, exclude):
    fitted = done("fit", table, "--target", target, "--exclude", exclude, "--out", "m", *FAST_TABLE)
    metrics = {row.metric: row.mean for row in fitted.results}
    assert ({"accuracy", "AUROC"} if target == "died" else {"RMSE"}) <= set(metrics)
    assert {"model", "history.png", "drift.png"} <= set(fitted.artifacts)
    model = load_model(tmp_path / "m")
    assert isinstance(model, TableModel)
    assert model.schema.feature_names[-2:] == ("ward=a", "ward=b")

    evaluated = done("evaluate", "m", table, "--out", "e")
    assert {row.metric for row in evaluated.results} == set(metrics)

    frame = pd.read_csv(table)
    frame.drop(columns=target).to_csv(tmp_path / "new.csv", index=False)
    assert done("predict", "m", "new.csv", "--out", "p").artifacts == ["predictions.csv"]
    predicted = pd.read_csv(tmp_path / "p/predictions.csv")
    assert len(predicted) == 200
    np.testing.assert_array_equal(predicted["known"], frame.drop(columns=["died", "level"]).notna().sum(axis=1))
    if target == "died":
        np.testing.assert_allclose(predicted[["p(no)", "p(yes)"]].sum(axis=1), 1, rtol=1e-5)
        assert set(predicted["prediction"]) <= {"yes", "no"}

    shown = call("export", "m", "--format", "pt2", "--out", "x")
    assert shown.returncode == 0, shown.stderr
    assert "largest difference" in shown.stdout
    graph, features = graph_of(model)
    program = torch.export.load(tmp_path / "x/model.pt2").module()
    x = torch.rand(5, features)
    mask = torch.rand(5, features) < 0.5
    torch.testing.assert_close(program(x, mask), graph(x, mask))


def test_one_missing_category_counts_as_one_missing_column(done, table, tmp_path):
    done("fit", table, "--target", "level", "--exclude", "died", "--scale", "none", "--out", "m", *FAST_TABLE)
    model = load_model(tmp_path / "m")
    frame = pd.read_csv(table)
    assert model.schema.groups.tolist() == [0, 1, 2, 3, 4, 5, 6, 6]
    columns = frame[[f"test{i}" for i in range(6)] + ["ward"]].notna()
    # K is a mean over the rows trained on; counting the ward twice would add about 0.8.
    assert float(model.estimator.network_.input.K) == pytest.approx(columns.sum(axis=1).mean(), abs=0.3)


def test_same_seed_same_predictions_and_another_seed_others(done, table, tmp_path):
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        done("fit", table, "--target", "level", "--exclude", "died", "--out", out, "--seed", seed, *FAST_TABLE)
    first, second, third = ((tmp_path / out / "model/model.safetensors").read_bytes() for out in "abc")
    assert first == second != third


def test_compare_on_ones_own_table(done, table):
    args = ("--target", "died", "--exclude", "level", "--methods", "zero,sn,mean", "--model", "linear", "--seeds", 2)
    found = done("compare", table, *args, "--out", "c")
    rows = {(row.metric, row.method): row for row in found.results}
    assert rows["accuracy", "sn"].n == 2
    assert rows["accuracy", "sn"].unit == "%"
    assert 1 < rows["accuracy", "sn"].mean <= 100
    assert rows["accuracy", "sn"].low <= rows["accuracy", "sn"].mean <= rows["accuracy", "sn"].high
    assert {"comparison.png", "drift.png"} <= set(found.artifacts)
    assert {claim.text.split(":")[0] for claim in found.claims} == {"patients"}


def test_workers_do_not_change_a_comparison(done, table):
    args = ("--target", "died", "--exclude", "level", "--methods", "zero,sn", "--model", "linear", "--seeds", 2)
    one, two = (done("compare", table, *args, "--workers", n, "--out", f"w{n}") for n in (1, 2))
    assert figures(one) == figures(two)


def test_compare_keeps_groups_together_and_removes_entries(done, table):
    frame = pd.read_csv(table).assign(hospital=np.arange(200) // 20)
    frame.to_csv(table, index=False)
    args = ("--target", "level", "--exclude", "died", "--group", "hospital", "--methods", "sn", "--model", "linear")
    assert done("compare", table, *args, "--rates", "0.2,0.8", "--seeds", 1, "--folds", 5, "--out", "c").results


def test_diagnose_finds_the_problem_where_it_is(done, table, tmp_path):
    found = done("diagnose", table, "--target", "level", "--exclude", "died", "--out", "d", "--folds", 2)
    assert {row.method for row in found.results} == {"zero", "sn", "sn-center"}
    assert {"audit.json", "audit.png"} <= set(found.artifacts)
    random = np.random.default_rng(0)
    count = random.integers(1, 60, 400)
    truth = random.normal(size=400)
    frame = pd.DataFrame({"risk": truth + 0.05 * count, "fair": 0.5 * truth, "n": count, "t": truth})
    frame.to_csv(tmp_path / "scores.csv", index=False)
    for column, problem in (("risk", True), ("fair", False)):
        args = ("--prediction", column, "--count", "n", "--truth", "t")
        assert done("diagnose", "scores.csv", *args, "--out", column).claims[0].holds is problem
    without = done("diagnose", "scores.csv", "--prediction", "risk", "--count", "n", "--out", "w")
    assert without.results[0].metric == "count correlation"


def test_ampute_removes_entries_row_by_row(done, table, tmp_path):
    pd.DataFrame(np.ones((300, 40))).assign(y=1.0).to_csv(tmp_path / "full.csv", index=False)
    args = ("--exclude", "y", "--rate-low", 0.2, "--rate-high", 0.6)
    done("ampute", "full.csv", *args, "--out", "a")
    frame = pd.read_csv(tmp_path / "a/amputed.csv")
    assert frame["y"].notna().all()
    rate = frame.drop(columns="y").notna().mean(axis=1)
    assert 0.35 < rate.mean() < 0.45
    assert rate.std() > 0.08


# ---- ratings


@pytest.mark.parametrize("mode", ["item", "user"])
def test_fit_evaluate_predict_recommend_on_ratings(done, ratings, tmp_path, mode):
    fitted = done("fit", ratings, "--mode", mode, "--out", "m", *FAST_RATINGS)
    assert {row.metric for row in fitted.results} == {"RMSE", "MAE"}
    done("evaluate", "m", ratings, "--out", "e")
    report = json.loads((tmp_path / "e/evaluation.json").read_text())
    assert report["n"] == len(pd.read_csv(ratings))
    assert sum(group["n"] for group in report["groups"]) == report["n"]

    pairs = pd.read_csv(ratings)[["user", "item"]].head(7)
    pairs.to_csv(tmp_path / "pairs.csv", index=False)
    done("predict", "m", "pairs.csv", "--out", "p")
    predicted = pd.read_csv(tmp_path / "p/predictions.csv")
    model = AutoRecRecommender.load(tmp_path / "m/model")
    expected = model.predict(pairs["user"].astype(str).tolist(), pairs["item"].astype(str).tolist())
    np.testing.assert_allclose(predicted["prediction"], expected, rtol=1e-6)

    done("recommend", "m", "--users", "100,101", "--k", 3, "--out", "r")
    rows = pd.read_csv(tmp_path / "r/recommendations.csv")
    assert rows.groupby("user").size().to_dict() == {100: 3, 101: 3}
    assert [(str(i), pytest.approx(p)) for i, p in model.recommend("100", k=3)] == [
        (str(i), p) for i, p in rows.loc[rows["user"] == 100, ["item", "prediction"]].itertuples(index=False)
    ]
    (tmp_path / "mine.csv").write_text("item,rating\n3,5\n7,1\n")
    done("recommend", "m", "--ratings", "mine.csv", "--k", 2, "--out", "n")
    fresh = pd.read_csv(tmp_path / "n/recommendations.csv")
    assert len(fresh) == 2
    assert not set(fresh["item"]) & {3, 7}


def test_ratings_in_every_form_give_the_same_matrix(done, ratings, tmp_path):
    frame = pd.read_csv(ratings)
    frame.to_csv(tmp_path / "u.data", sep="\t", header=False, index=False)
    names = ["ratings.csv", "u.data", "r.npz"]
    if importlib.util.find_spec("pyarrow"):
        frame.to_parquet(tmp_path / "r.parquet")
        names.append("r.parquet")
    codes = frame["user"] - 100
    matrix = sparse.csr_array((frame["rating"].astype(float), (codes, frame["item"])))
    sparse.save_npz(tmp_path / "r.npz", matrix)
    errors = [done("fit", name, "--out", f"m-{name}", *FAST_RATINGS).results[0].mean for name in names]
    assert max(errors) - min(errors) < 1e-6


def test_compare_and_diagnose_ratings(done, ratings):
    args = ("--methods", "autorec-sn,autorec-zero,baseline-only", "--seeds", 1, "--epochs", 3, "--hidden", 4)
    found = done("compare", ratings, *args, "--out", "c")
    assert {row.metric for row in found.results} == {"RMSE", "MAE", "count correlation gap"}
    assert len(found.claims) == 3
    diagnosed = done("diagnose", ratings, "--out", "d")
    assert {row.method for row in diagnosed.results} == {"autorec-zero", "autorec-sn"}


def test_exported_recommender_predicts_what_the_model_does(done, ratings, tmp_path):
    done("fit", ratings, "--mode", "user", "--out", "m", *FAST_RATINGS)
    done("export", "m", "--format", "pt2", "--out", "x")
    model = load_model(tmp_path / "m")
    program = torch.export.load(tmp_path / "x/model.pt2").module()
    x = torch.zeros(1, model.model_.features)
    mask = torch.zeros(1, model.model_.features, dtype=torch.bool)
    x[0, [3, 7]], mask[0, [3, 7]] = torch.tensor([5.0, 1.0]), True
    expected = model.fold_in({"3": 5, "7": 1}).predict([str(i) for i in range(30)])
    names = [model.ratings_.item_ids.index(str(i)) for i in range(30)]
    np.testing.assert_allclose(program(x, mask).numpy()[0, names], expected, atol=1e-5)
    assert isinstance(graph_of(model)[0], RatingGraph)


def test_plot_draws_a_finished_run_again(done, ratings):
    done("fit", ratings, "--out", "m", *FAST_RATINGS)
    for kind in ("png", "svg", "pdf"):
        assert done("plot", "m", "--kind", kind, "--out", f"p{kind}").artifacts == [f"comparison.{kind}"]


# ---- interruption


@pytest.mark.parametrize("kind", ["table", "ratings"])
def test_an_interrupted_fit_resumes_to_the_same_weights(call, table, ratings, tmp_path, monkeypatch, kind):
    """Ctrl-C after the fourth epoch; that a real signal ends in the same way is in the cross-package tests."""
    if kind == "table":
        args = ("fit", table, "--target", "level", "--exclude", "died", "--epochs", 12, "--layers", "8")
    else:
        args = ("fit", ratings, "--epochs", 12, "--hidden", 6)
    args = (*args, "--device", "cpu")
    assert call(*args, "--out", "whole").returncode == 0
    with monkeypatch.context() as patch:
        save, calls = Run.save_checkpoint, []

        def interrupted(self: Run, state: object) -> None:
            save(self, state)
            calls.append(state)
            if len(calls) == 4:
                raise KeyboardInterrupt

        patch.setattr(Run, "save_checkpoint", interrupted)
        stopped = call(*args, "--out", "part")
    assert stopped.returncode == 130, stopped.stderr
    assert "sparsity-norm fit --resume --out part" in stopped.stderr
    assert len((tmp_path / "part/metrics.jsonl").read_text().splitlines()) == 4
    assert call("fit", "--resume", "--out", "part").returncode == 0
    for name in ("model/model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "part" / name).read_bytes()


# ---- wrong input


def test_wrong_ratings_say_where(wrong, tmp_path):
    def write(text: str) -> str:
        (tmp_path / "r.csv").write_text(text)
        return "r.csv"

    assert "r.csv:3: expected 3 fields, got 2" in wrong("fit", write("user,item,rating\n1,2,3\n1,2\n"))
    assert "r.csv:2" in wrong("fit", write("user,item,rating\n1,2,good\n"))
    message = wrong("fit", write("user,item,rating\n1,2,3\n1,2,4\n"))
    assert "1" in message
    assert "2" in message
    assert "duplicates" in message
    assert "r.csv:3" in wrong("fit", write("user,item,rating\n1,2,3\n1,3,9\n"), "--rating-scale", "1,5")
    assert "--rating-scale" in wrong("fit", write("user,item,rating\n1,2,3\n"), "--rating-scale", "5,1")


def test_wrong_models_and_ids(wrong, done, ratings, table, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "has no model.json; give the run folder of 'sparsity-norm fit'" in wrong("predict", "empty", table)
    assert "none: No such file" in wrong("evaluate", "none", table)
    done("fit", ratings, "--out", "m", *FAST_RATINGS)
    (tmp_path / "ids.csv").write_text("user,item\n100,3\n9999,3\n")
    assert "9999" in wrong("predict", "m", "ids.csv")
    done("predict", "m", "ids.csv", "--unknown", "mean", "--out", "u")
    assert "9999" in wrong("recommend", "m", "--users", "9999")
    (tmp_path / "cols.csv").write_text("a,b\n1,2\n")
    assert "no column 'user'" in wrong("predict", "m", "cols.csv")
    (tmp_path / "mine.csv").write_text("item,rating\n3,many\n")
    assert "row 1: the rating 'many'" in wrong("recommend", "m", "--ratings", "mine.csv")
    (tmp_path / "mine.csv").write_text("item,rating\n3,5\n3,4\n")
    assert "rates '3' twice" in wrong("recommend", "m", "--ratings", "mine.csv")
    (tmp_path / "mine.csv").write_text("item,rating\n3,50\n")
    assert "50" in wrong("recommend", "m", "--ratings", "mine.csv")
    done("fit", table, "--target", "died", "--exclude", "level", "--out", "t", *FAST_TABLE)
    assert "is a model of a table" in wrong("recommend", "t")
    weights = tmp_path / "t/model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    assert "damaged" in wrong("predict", "t", table)
    (tmp_path / "m/model/model.json").write_text("{")
    assert "m" in wrong("predict", "m", "ids.csv")


def test_wrong_tables_and_options(wrong, table, tmp_path):
    assert "no column 'dead'" in wrong("fit", table, "--target", "dead")
    assert "no method for tables 'nonsense'" in wrong("compare", table, "--target", "died", "--methods", "nonsense")
    assert "named table" in wrong("compare", "digits", "--target", "y")
    assert "--rates" in wrong("compare", table, "--target", "died", "--rates", "0.9,0.1")
    assert "--count" in wrong("diagnose", table, "--prediction", "level")
    assert "row" in wrong("diagnose", table, "--prediction", "level", "--count", "test0")
    (tmp_path / "one.csv").write_text("a,y\n1,2\n1,2\n")
    assert "a single class, '2'" in wrong("fit", "one.csv", "--target", "y")
    (tmp_path / "gone.csv").write_text("a,b,y\n,,1.5\n,,2.5\n,,3.5\n")
    assert "gone.csv" in wrong("fit", "gone.csv", "--target", "y")
    assert "no method 'nonsense'" in wrong(
        "fit", table, "--target", "level", "--exclude", "died", "--input", "nonsense"
    )


def test_a_data_set_that_is_not_there_says_where_it_should_be(wrong, monkeypatch, tmp_path):
    monkeypatch.setenv("SHARED_CORE_DATA", str(tmp_path))
    message = wrong("compare", "movielens-100k")
    assert str(tmp_path) in message
    assert "u.data" in message
