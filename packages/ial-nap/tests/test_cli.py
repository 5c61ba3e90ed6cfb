"""The command line on a user's own table and verdicts: what goes in, what comes out, what is said when it is wrong."""

from __future__ import annotations

import csv
import json
import sqlite3
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from ial_nap import choices, ranking, simulation
from ial_nap.annotations import Annotation, read_jsonl, to_jsonl
from ial_nap.cli import line
from ial_nap.saving import load
from ial_nap.store import AnnotationStore
from shared_core.runs import Summary
from shared_core.testing import Caller, figures, in_two_processes

FEATURES = ("LDL", "HDL", "age", "ward")
SMALL = ("--hidden", 6, "--latent", 3, "--epochs", 8, "--samples", 4, "--device", "cpu")
QUICK = ("--hidden", 4, "--latent", 2, "--epochs", 2, "--samples", 2, "--rounds", 2, "--k", 3, "--f", 2, "--steps", 2,
         "--device", "cpu")  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Leave drawing to tests of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, path, **options: Path(path).write_bytes(b"a picture"))
        yield


def patients(count: int = 120, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values (n, 3, 4), lengths and labels; the ward gives the label away."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(count, 3, 4))
    y = (x[:, 0, 0] - x[:, 0, 1] + 0.5 * random.normal(size=count) > 0).astype(int)
    x[:, :, 3] += 1.5 * (2 * y[:, None] - 1)
    return x, random.integers(1, 4, count), y


def table(path: Path, rows: tuple[np.ndarray, np.ndarray, np.ndarray], *, label: bool = True, names=("well", "ill")):
    x, lengths, y = rows
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["pid", "year", *FEATURES, *(["outcome"] if label else [])])
        for k in range(len(x)):
            for t in range(lengths[k]):
                cells = ["" if (k, t) == (0, 0) else f"{x[k, t, 0]:.4f}", *(f"{v:.4f}" for v in x[k, t, 1:])]
                writer.writerow([f"pid-{k}", 2010 + t, *cells, *([names[y[k]]] if label else [])])


COLUMNS = ("--id", "pid", "--time", "year", "--label", "outcome")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """The folder that everything happens in; tests write under names of their own."""
    made = tmp_path_factory.mktemp("cli")
    table(made / "own.csv", patients())
    x, lengths, y = patients(8, 5)
    table(made / "new.csv", (x, np.minimum(lengths, 2), y), label=False)
    table(made / "one.csv", (x, lengths, np.r_[1 - y[:1], y[1:]]))
    np.savez(made / "prices.npz", X=x.repeat(8, 0), y=100 + 10 * x[:, 0, 0].repeat(8) + np.arange(64) / 7)
    np.savez(made / "classes.npz", X=x.repeat(8, 0), y=np.arange(64) % 3)
    np.savez(made / "labels.npz", X=x.repeat(8, 0), y=np.stack([np.arange(64) % 2, np.arange(64) // 2 % 2], 1))
    np.savez(made / "mask.npz", mask=np.array([[1, 1, 1, 0]] * 3))
    return made


@pytest.fixture(scope="module")
def call(home) -> Caller:
    return Caller(line, home)


@pytest.fixture(scope="module")
def fitted(call) -> Summary:
    return call.done("fit", "own.csv", *COLUMNS, *SMALL, "--out", "m")


@pytest.fixture(scope="module")
def said(fitted, call, home) -> list[Annotation]:
    """Verdicts of two people on what rank found, in a file."""
    call.done("rank", "m", "--k", 3, "--f", 2, "--samples", 4, "--out", "q")
    queue = json.loads((home / "q/queue.json").read_text())
    model = load(home / "m/model.safetensors", device="cpu")
    steps = {row["instance"]: model.instances_.get(row["instance"], 3) for row in queue}
    found = [
        Annotation(row["instance"], 0, feature, 0 if feature == "ward" else 1, seconds=2.0, annotator=who, round=1,
                   note="an ward is no disease")
        for row in queue
        for feature in ("ward", "LDL")
        for who in ("ada", "bob")
        if steps
    ]  # fmt: skip
    found.append(replace(found[-1], verdict=0))
    (home / "said.jsonl").write_text(to_jsonl(found))
    return found


@pytest.fixture(scope="module")
def updated(said, call) -> Summary:
    return call.done("update", "m", "said.jsonl", "--out", "u")


def test_names_that_need_no_torch_are_those_of_the_method():
    assert set(choices.METHODS) == set(get_args(simulation.Method)) == set(simulation._ARMS)
    assert set(get_args(choices.InstanceRanker)) == set(get_args(ranking.InstanceRanker))
    assert set(get_args(choices.FeatureRanker)) == set(get_args(ranking.FeatureRanker))


# ---- one model, from a table to predictions


def test_training_on_a_table_leaves_a_model_and_what_it_was_trained_on(fitted, home):
    assert set(fitted.artifacts) == {"model.safetensors", "fit.json", "history.png"}
    assert {row.metric for row in fitted.results} == {"AUROC", "AUPRC", "accuracy", "Brier score", "ECE"}
    assert {(row.dataset, row.method) for row in fitted.results} == {("own", "ial-nap")}
    lines = [json.loads(text) for text in (home / "m/metrics.jsonl").read_text().splitlines()]
    assert [entry["epoch"] for entry in lines] == list(range(1, 9))
    assert all(set(entry) == {"epoch", "loss", "validation"} for entry in lines)
    model = load(home / "m/model.safetensors", device="cpu")
    assert (model.hidden, model.latent, model.samples, model.missing) == (6, 3, 4, "mask")
    assert model.series_.features == FEATURES
    facts = json.loads((home / "m/fit.json").read_text())
    assert facts["data"] == str(home / "own.csv")
    assert facts["classes"] == ["ill", "well"]
    assert (facts["id"], facts["label"], facts["seed"], facts["plant"]) == ("pid", "outcome", 0, 0)


def test_two_processes_share_every_batch_and_learn_the_same(fitted, home):
    """``torchrun --nproc-per-node=2``: each takes its part of the instances of a batch."""
    program = "from ial_nap.cli import main\n\nmain()\n"
    in_two_processes(home, program, "fit", "own.csv", *COLUMNS, *SMALL, "--out", "two")
    one, two = (load(home / run / "model.safetensors", device="cpu").model_.state_dict() for run in ("m", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4)


def test_workers_do_not_change_a_comparison(call):
    args = ("compare", "cells", *QUICK, "--seeds", 2, "--trials", 0, "--methods", "random-nap,drop")
    one, two = (figures(call.done(*args, "--workers", n, "--out", f"w{n}")) for n in (1, 2))
    assert [row for row in one if row.unit == "1"] == [row for row in two if row.unit == "1"]


@pytest.mark.parametrize("at", [1, 5])
def test_an_interrupted_training_resumes_to_the_same_bytes(fitted, call, home, monkeypatch, at):
    import ial_nap.estimator as module

    original = module.NAPClassifier.fit

    def stop(self, *arguments, **options):
        def after(epoch):
            if epoch.epoch == at:
                raise KeyboardInterrupt
            on_epoch(epoch)

        on_epoch = options.pop("on_epoch")
        return original(self, *arguments, on_epoch=after, **options)

    out = f"again-{at}"
    with monkeypatch.context() as patch:
        patch.setattr(module.NAPClassifier, "fit", stop)
        stopped = call("fit", "own.csv", *COLUMNS, *SMALL, "--out", out)
    assert stopped.returncode == 130
    assert f"ial-nap fit --resume --out {out}" in stopped.stderr
    assert (home / out / "checkpoint.safetensors").exists()
    again = call.done("fit", "--resume", "--out", out)
    assert not (home / out / "checkpoint.safetensors").exists()
    assert (home / out / "model.safetensors").read_bytes() == (home / "m/model.safetensors").read_bytes()
    assert (home / out / "metrics.jsonl").read_bytes() == (home / "m/metrics.jsonl").read_bytes()
    assert again.results == fitted.results


def test_ranking_says_what_to_look_at_and_why(said, call, home):
    queue = json.loads((home / "q/queue.json").read_text())
    assert len(queue) == 3
    for row in queue:
        assert len(row["features"]) == len(row["feature_scores"]) == 2
        assert set(row["features"]) <= set(FEATURES)
    assert [row["score"] for row in queue] == sorted((row["score"] for row in queue), reverse=True)
    result = call("rank", "m", "--instance", "influence", "--feature", "influence", "--k", 2, "--out", "q2")
    assert result.returncode == 0, result.stderr
    assert "the validation loss would be lower without it" in result.stdout
    new = call("rank", "m", "new.csv", "--id", "pid", "--time", "year", "--k", 99, "--out", "q3")
    assert new.returncode == 0, new.stderr
    assert len(json.loads((home / "q3/queue.json").read_text())) == 8
    assert "k = 99 is more than the 8 instances there are" in new.stdout


def test_ranking_leaves_out_what_is_annotated(updated, said, call, home):
    call.done("rank", "u", "--k", 200, "--out", "q4")
    rest = {row["instance"] for row in json.loads((home / "q4/queue.json").read_text())}
    assert rest.isdisjoint(one.instance for one in said)
    call.done("rank", "u", "--k", 200, "--seen", "--out", "q5")
    every = {row["instance"] for row in json.loads((home / "q5/queue.json").read_text())}
    assert every - rest == {one.instance for one in said}


def test_an_update_trains_nothing_and_says_who_moved_what(updated, said, call, home):
    assert set(updated.artifacts) == {"model.safetensors", "fit.json", "gates.png", "diff.json"}
    old, new = (load(home / run / "model.safetensors", device="cpu") for run in ("m", "u"))
    for name, parameter in old.model_.named_parameters():
        assert torch.equal(parameter, new.model_.get_parameter(name)), name
    record = json.loads((home / "u/diff.json").read_text())
    assert record["context"] == {"before": old.context_hash, "after": new.context_hash}
    assert old.context_hash != new.context_hash
    assert record["instances"] == sorted({one.instance for one in said})
    asked = {(row["feature"], row["step"]): row for row in record["gates"]}
    ward = asked["ward", new.series_.steps[0]]
    assert ward["excluded"]
    assert (ward["after"], ward["not attend"], ward["attend"]) == (0, ["ada", "bob"], [])
    assert asked["LDL", new.series_.steps[0]]["attend"] == ["ada", "bob"]
    assert {row.method for row in updated.results} == {"before", "after"}
    cells = new.contributions(torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0)).numpy()).cells
    assert not cells[:, 0, 3].any()
    shown = call("update", "m", "said.jsonl", "--out", "u1")
    assert "not attend: ada, bob (excluded)" in shown.stdout
    assert "95 % interval" in shown.stdout


def test_an_update_can_replace_finetune_and_leave_bad_lines_out(updated, said, call, home):
    (home / "few.jsonl").write_text(to_jsonl(said[:1]))
    call.done("update", "u", "few.jsonl", "--replace", "--out", "u2")
    call.done("update", "u", "few.jsonl", "--out", "u3")
    models = {run: load(home / run / "model.safetensors", device="cpu") for run in ("u", "u2", "u3")}
    assert len(models["u2"].context_) == 1
    assert models["u3"].context_hash == models["u"].context_hash
    call.done("update", "m", "said.jsonl", "--finetune", 3, "--out", "u4")
    tuned = load(home / "u4/model.safetensors", device="cpu")
    assert any(
        not torch.equal(parameter, tuned.model_.get_parameter(name))
        for name, parameter in models["u"].model_.named_parameters()
    )
    lines = to_jsonl(said).splitlines()
    (home / "bad.jsonl").write_text("\n".join([lines[0], "{oops", *lines[1:]]))
    assert "bad.jsonl:2: not JSON" in call.wrong("update", "m", "bad.jsonl", "--out", "u5")
    kept = call("update", "m", "bad.jsonl", "--skip-bad", "--out", "u6")
    assert kept.returncode == 0, kept.stderr
    assert "left out: bad.jsonl:2: not JSON" in kept.stdout
    assert load(home / "u6/model.safetensors", device="cpu").context_hash == models["u"].context_hash


def test_evaluation_has_intervals_and_compares_on_the_same_instances(updated, call, home):
    found = call.done("evaluate", "u", "--against", "m", "--draws", 40, "--out", "e")
    rows = {(row.method, row.metric): row for row in found.results}
    for row in found.results:
        assert row.low <= row.mean <= row.high or row.metric == "ECE"
        assert row.n == 30
    difference = rows["model - against", "AUROC, difference"]
    assert difference.mean == pytest.approx(rows["model", "AUROC"].mean - rows["against", "AUROC"].mean)
    assert difference.better == "higher"
    assert found.artifacts == ["reliability.png"]
    brier = call.done("evaluate", "m", "--against", "m", "--metric", "brier", "--part", "validation", "--draws", 9,
                      "--out", "e2")  # fmt: skip
    (same,) = [row for row in brier.results if row.method == "model - against"]
    assert (same.mean, same.low, same.high, same.metric, same.better) == (0, 0, 0, "Brier score, difference", "lower")
    assert {row.dataset for row in brier.results} == {"own, validation"}
    right = call.done("evaluate", "u", "--against", "m", "--metric", "accuracy", "--draws", 9, "--out", "e4")
    shares = {row.method: row for row in right.results if row.metric.startswith("accuracy")}
    assert {row.unit for row in shares.values()} == {"%", "points"}
    assert shares["model - against"].mean == pytest.approx(shares["model"].mean - shares["against"].mean)
    assert shares["model"].low <= shares["model"].mean <= shares["model"].high
    again = call.done("evaluate", "m", "own.csv", *COLUMNS, "--draws", 0, "--out", "e3")
    assert {row.low for row in again.results} == {None}


def test_predictions_have_ids_classes_and_intervals(fitted, call, home):
    assert call.done("predict", "m", "new.csv", "--id", "pid", "--time", "year", "--out", "p").results == []
    rows = list(csv.DictReader((home / "p/predictions.csv").open()))
    assert [row["id"] for row in rows] == [f"pid-{k}" for k in range(8)]
    model = load(home / "m/model.safetensors", device="cpu")
    for row in rows:
        p = {name: float(row[f"p({name})"]) for name in ("ill", "well")}
        assert sum(p.values()) == pytest.approx(1, abs=2e-4)
        assert row["class"] == max(p, key=p.__getitem__)
        assert float(row["low"]) <= float(row["probability"]) <= float(row["high"])
    x, lengths, _ = patients(8, 5)
    # The first value is missing in the table.
    x[0, 0, 0] = np.nan
    expected = model.predict_proba(np.round(x, 4), lengths=np.minimum(lengths, 2))
    np.testing.assert_allclose([float(row["p(well)"]) for row in rows], expected[:, 1], atol=1e-3)
    scored = call.done("predict", "m", "--output", "mine.csv", "--out", "p2")
    assert {row.metric for row in scored.results} >= {"AUROC", "Brier score"}
    assert len(list(csv.DictReader((home / "mine.csv").open()))) == 30


def test_labels_of_another_table_are_matched_by_name(fitted, call, home):
    """In it 'well' may well come first, and one class may be alone or unknown."""
    found = call.done("predict", "m", "one.csv", *COLUMNS, "--out", "l")
    (accuracy,) = [row for row in found.results if row.metric == "accuracy"]
    rows = list(csv.DictReader((home / "l/predictions.csv").open()))
    truth = {row["pid"]: row["outcome"] for row in csv.DictReader((home / "one.csv").open())}
    assert accuracy.unit == "%"
    assert accuracy.mean == pytest.approx(100 * np.mean([row["class"] == truth[row["id"]] for row in rows]))
    table(home / "odd.csv", patients(8, 5), names=("well", "cured"))
    assert "label 'cured' is no class of the training: ill, well" in call.wrong(
        "evaluate", "m", "odd.csv", *COLUMNS, "--out", "wrong", "--overwrite"
    )


@pytest.mark.parametrize(
    ("file", "header", "metric"),
    [
        ("prices.npz", ["id", "prediction", "low", "high", "std"], "RMSE"),
        ("classes.npz", ["id", "class", "probability", "low", "high", "p(0)", "p(1)", "p(2)"], "log loss"),
        ("labels.npz", ["id", *(f"{w}({k})" for k in (0, 1) for w in ("p", "low", "high"))], "AUROC"),
    ],
)
def test_numbers_classes_and_several_labels_are_predicted(call, home, file, header, metric):
    out = file.partition(".")[0]
    found = call.done("fit", file, *SMALL, "--epochs", 2, "--plant", 1, "--out", f"m-{out}")
    assert metric in {row.metric for row in found.results}
    call.done("predict", f"m-{out}", "--out", f"p-{out}")
    rows = list(csv.reader((home / f"p-{out}/predictions.csv").open()))
    assert rows[0] == header
    assert all(len(row) == len(header) for row in rows)
    if out == "prices":
        assert 50 < float(rows[1][1]) < 150
    call.done("evaluate", f"m-{out}", "--draws", 3, "--out", f"e-{out}")
    drawn = call.done("plot", "contributions", f"m-{out}", "--out", f"pc-{out}")
    assert drawn.artifacts == ["contributions.png"]


# ---- pictures, verdicts and reports


@pytest.mark.parametrize("picture", ["attention", "contributions", "reliability", "history"])
@pytest.mark.parametrize("run", ["m", "u"])
def test_pictures_of_a_model(updated, call, picture, run):
    assert call.done("plot", picture, run, "--out", f"pic-{picture}-{run}").artifacts == [f"{picture}.png"]


def test_pictures_of_one_instance_and_of_other_data(updated, said, call, home):
    call.done("plot", "contributions", "u", "--instance", said[0].instance, "--output", "mine.svg", "--out", "pi")
    assert (home / "mine.svg").exists()
    call.done(
        "plot", "attention", "u", "new.csv", "--id", "pid", "--time", "year", "--instance", "pid-3", "--out", "pj"
    )
    assert "no instance 'pid-x'; did you mean" in call.wrong(
        "plot", "attention", "u", "new.csv", "--id", "pid", "--time", "year", "--instance", "pid-x", "--out", "pk"
    )


def test_agreement_beyond_chance_and_where_there_is_none(said, call, home):
    found = call.done("agreement", "said.jsonl", "--out", "a")
    rows = {(row.method, row.metric): row.mean for row in found.results}
    cells = len({one.cell for one in said})
    split = (cells - 1) / cells
    # One of the cells that both have judged is split; kappa by its definition.
    ward, ldl = cells // 2, cells - cells // 2
    ada = np.array([ward, ldl]) / cells
    bob = np.array([ward + 1, ldl - 1]) / cells
    assert rows["ada, bob", "Cohen's kappa"] == pytest.approx((split - ada @ bob) / (1 - ada @ bob))
    assert set(rows) == {("all", "Fleiss' kappa"), ("ada, bob", "Cohen's kappa")}
    (odd,) = csv.DictReader((home / "a/disagreements.csv").open())
    assert (odd["instance"], odd["feature"], odd["attend"], odd["not attend"]) == (
        said[-1].instance, "LDL", "ada", "bob"
    )  # fmt: skip
    assert set(found.artifacts) == {"disagreements.csv", "agreement.png"}
    assert call.done("plot", "agreement", "said.jsonl", "--out", "pa").artifacts == ["agreement.png"]


def test_verdicts_go_out_as_a_table_as_lines_and_as_tasks(said, call, home):
    standing = len({one.key for one in said})
    call.done("export", "said.jsonl", "--out", "x1")
    assert len(list(csv.DictReader((home / "x1/annotations.csv").open(newline="")))) == standing
    call.done("export", "said.jsonl", "--format", "jsonl", "--no-standing", "--out", "x2")
    assert read_jsonl(home / "x2/annotations.jsonl")[0] == said
    call.done("export", "said.jsonl", "--format", "label-studio", "--output", "tasks.json", "--out", "x3")
    tasks = json.loads((home / "tasks.json").read_text())
    assert {task["data"]["instance"] for task in tasks} == {one.instance for one in said}


def test_a_report_of_verdicts_stands_alone(said, call, home):
    call.done("export", "said.jsonl", "--format", "html", "--model", "m", "--out", "x4")
    page = (home / "x4/annotations.html").read_text()
    assert "<script" not in page
    assert all(one.instance in page for one in said)
    assert "Held-out scores" in page
    assert "Cohen" in page
    assert "an ward is no disease" in page


def test_a_report_says_what_is_certain_stable_and_true_to_the_model(updated, said, call, home, monkeypatch):
    import ial_nap.estimator as module

    original, seeds = module.NAPClassifier.fit, []

    def stop(self, *arguments, **options):
        seeds.append(self.seed)
        if len(seeds) == 2:
            raise KeyboardInterrupt
        return original(self, *arguments, **options)

    args = ("report", "u", "--seeds", 2, "--points", 3, "--orders", 2, "--no-tax", "--out", "r")
    with monkeypatch.context() as patch:
        patch.setattr(module.NAPClassifier, "fit", stop)
        assert call(*args).returncode == 130
        found = call.done("report", "--resume", "--out", "r")
    # The first of the other seeds was trained, and is not trained again.
    assert seeds == [1, 2, 2]
    assert {row.metric for row in found.results} == {
        "deletion, area below random orders", "insertion, area above random orders",
        "stability, rank correlation of seeds",
    }  # fmt: skip
    excluded, faithful = found.claims
    assert (excluded.holds, excluded.value) == (True, 0)
    assert faithful.holds == (min(row.mean for row in found.results if row.unit == "logits") > 0)
    assert set(found.artifacts) == {
        "seed-1.safetensors", "seed-2.safetensors", "faithfulness.png", "certificate.json", "moved.csv", "report.html"
    }  # fmt: skip
    certificate = json.loads((home / "r/certificate.json").read_text())
    assert certificate["holds"]
    assert [cell["feature"] for cell in certificate["excluded"]] == ["ward"]
    moved = list(csv.DictReader((home / "r/moved.csv").open()))
    assert {row["feature"] for row in moved} == {"ward", "LDL"}
    page = (home / "r/report.html").read_text()
    assert "nothing in them can reach the prediction" in page
    assert "Are the shares true to the model?" in page
    plain = call("report", "m", "new.csv", "--id", "pid", "--time", "year", "--out", "r2")
    assert plain.returncode == 0, plain.stderr
    assert "0 cells are excluded; checked on 8 instances" in plain.stdout
    priced = call("report", "m", "--seeds", 0, "--points", 2, "--orders", 1, "--out", "r3")
    assert "a plain RETAIN" in priced.stdout


def test_verdicts_are_read_from_the_store_of_the_page(said, call, home):
    with AnnotationStore(home / "kept.db", FEATURES, 3) as store:
        for one in said[:3]:
            store.add([one])
        store.undo("ada")
    call.done("export", "kept.db", "--format", "jsonl", "--no-standing", "--out", "s1")
    assert [one.undo for one in read_jsonl(home / "s1/annotations.jsonl")[0]] == [False, False, False, True]
    call.done("update", "m", "kept.db", "--out", "s2")
    assert len(load(home / "s2/model.safetensors", device="cpu").context_) == 2
    with sqlite3.connect(home / "other.db") as file:
        file.execute("CREATE TABLE t (a)")
    assert "other.db: is not a store of verdicts" in call.wrong("agreement", "other.db", "--out", "s3")


def test_the_page_is_served_until_it_ends_and_the_model_obeys(fitted, said, call, home, monkeypatch):
    pytest.importorskip("fastapi", reason="needs fastapi: pip install 'ial-nap[web]'")
    import ial_nap.web.app as app

    opened: list[str] = []

    def stand_in(bench, store, annotators, *, port, count, announce, **others):
        announce({name: f"http://127.0.0.1:{port}/?token={store.token(name)}" for name in annotators})
        opened.extend(item.instance for item in bench.queue(count))
        one = Annotation(opened[0], 0, "ward", 0, seconds=1.0, annotator="ada")
        store.add([one])
        bench.update(store.standing())
        raise KeyboardInterrupt

    monkeypatch.setattr(app, "serve", stand_in)
    args = ("annotate", "m", "--queue", "q/queue.json", "--annotators", "ada,bob", "--no-browser", "--samples", 4,
            "--store", "page.db")  # fmt: skip
    result = call(*args, "--out", "w")
    assert result.returncode == 0, result.stderr
    assert "ada: http://127.0.0.1:8765/?token=" in result.stderr
    assert "bob: http" in result.stderr
    assert "verdicts are in page.db" in result.stderr
    assert set(opened) == {one.instance for one in said}
    assert [one.feature for one in read_jsonl(home / "w/annotations.jsonl")[0]] == ["ward"]
    assert len(load(home / "w/model.safetensors", device="cpu").context_) == 1
    # What was said is still there when the page opens again.
    assert call(*args, "--out", "w2").returncode == 0
    assert len(read_jsonl(home / "w2/annotations.jsonl")[0]) == 2


def test_without_the_extra_the_page_says_what_to_install(fitted, call, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.delitem(sys.modules, "ial_nap.web.app", raising=False)
    assert "pip install 'ial-nap[web]'" in call.wrong("annotate", "m", "--no-browser", "--out", "w3")


# ---- simulation, comparison, demo


def test_a_simulation_keeps_rounds_and_resumes_where_it_was(call, home, monkeypatch):
    args = ("simulate", "own.csv", *COLUMNS, "--oracle", "mask.npz", *QUICK, "--seeds", 2, "--methods",
            "retain,random-nap,ial-nap")  # fmt: skip
    whole = call.done(*args, "--out", "sim")
    assert {row.metric for row in whole.results} == {
        "AUROC before", "AUROC after", "AUROC over verdicts", "learning"
    }  # fmt: skip
    assert {row.n for row in whole.results} == {2}
    assert set(whole.artifacts) == {"rounds.json", "curve.png", "comparison.png"}
    rounds = json.loads((home / "sim/rounds.json").read_text())
    assert set(rounds["rounds"]) == {"retain", "random-nap", "ial-nap"}
    assert [one["round"] for one in rounds["rounds"]["ial-nap"][0]] == [0, 1, 2]
    assert rounds["metric"] == "auroc"

    original, calls = simulation.simulate, []

    def stop(method, *arguments, **options):
        calls.append(method)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(method, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(simulation, "simulate", stop)
        stopped = call(*args, "--out", "part")
        assert stopped.returncode == 130
        assert "ial-nap simulate --resume --out part" in stopped.stderr
        again = call.done("simulate", "--resume", "--out", "part")
    # Three were done, and are not done again.
    assert calls == ["retain", "random-nap", "ial-nap", "retain", "retain", "random-nap", "ial-nap"]
    timeless = [
        [row.model_dump(exclude={"seconds"}) for row in found.results if row.unit == "1"] for found in (whole, again)
    ]
    assert timeless[0] == timeless[1]
    assert call.done("plot", "curve", "sim", "--methods", "ial-nap", "--out", "pcu").artifacts == ["curve.png"]
    assert call.done("plot", "comparison", "sim", "--out", "pco").artifacts == ["comparison.png"]
    assert "sim: no method 'drop'" in call.wrong("plot", "curve", "sim", "--methods", "drop", "--out", "pcw")


def test_simulated_annotators_know_masks_of_instances_or_what_is_planted(call, home):
    masks = np.ones((120, 3, 4), int)
    masks[:, :, 3] = 0
    np.savez(home / "each.npz", masks=masks)
    args = ("simulate", "own.csv", *COLUMNS, *QUICK, "--seeds", 1, "--methods", "ial-nap")
    one, each = (
        call.done(*args, "--oracle", file, "--out", file.partition(".")[0]) for file in ("mask.npz", "each.npz")
    )
    assert [r.mean for r in one.results if r.unit == "1"] == [r.mean for r in each.results if r.unit == "1"]
    planted = call.done(*args, "--plant", 1, "--flip", 0.1, "--unsure", 0.1, "--out", "planted")
    assert len(planted.results) == 4
    tuned = call.done(*args, "--plant", 1, "--methods", "aila", "--tune", "--trials", 2, "--out", "tuned")
    assert {row.method for row in tuned.results} == {"aila"}
    assert "nobody knows what is right; give --oracle, or --plant 2" in call.wrong(*args, "--out", "nobody")


def test_a_comparison_of_methods(call, home):
    found = call.done("compare", "own.csv", *COLUMNS, *QUICK, "--seeds", 2, "--methods", "retain,drop,ial-nap",
                      "--out", "c")  # fmt: skip
    assert {row.method for row in found.results} == {"retain", "drop", "ial-nap"}
    assert found.claims
    assert set(found.artifacts) == {"rounds.json", "curve.png", "comparison.png"}
    assert call.done("plot", "curve", "c", "--out", "pcc").artifacts == ["curve.png"]


def test_an_experiment(call, home):
    found = call.done("experiment", "own.csv", *COLUMNS, *QUICK, "--name", "correction", "--seeds", 1, "--out", "x")
    assert found.claims
    assert set(found.artifacts) == {"cells.json", "comparison.png"}


def test_the_demo_shows_a_model_obey(call, home):
    result = call("demo", *QUICK, "--methods", "retain,ial-nap", "--out", "d")
    assert result.returncode == 0, result.stderr
    assert "site 1 and site 2 give the label away in training only" in result.stdout
    assert "AUROC, without a gradient step" in result.stdout
    summary = Summary.model_validate_json((home / "d/summary.json").read_text())
    assert set(summary.artifacts) == {"rounds.json", "curve.png", "contributions.png", "comparison.png"}


def test_data_says_what_there_is(call):
    shown = call("data", "own.csv", *COLUMNS)
    assert shown.returncode == 0, shown.stderr
    assert "120 instances of up to 3 steps and 4 features; binary" in shown.stdout
    assert "classes: ill, well" in shown.stdout
    assert "train 72; validation 18; test 30" in shown.stdout
    missing = [text.split() for text in shown.stdout.splitlines() if text.startswith("LDL")]
    assert missing[0][1] == "0.4%"
    assert "no labels" in call("data", "new.csv", "--id", "pid", "--time", "year").stdout
    assert "a shortcut that does not hold in the test: f8, f9" in call("data", "shift").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fit", "nothing"), "no set 'nothing' and no such file"),
        (("fit", "nothing.csv"), "nothing.csv"),
        (("fit", "own.csv"), "no column 'id'"),
        (("fit", "new.csv", "--id", "pid", "--time", "year"), "there are no labels to train on"),
        (("fit", "own.csv", *COLUMNS, "--features", "LDL,iron"), "no feature 'iron'"),
        (("fit", "own.csv", *COLUMNS, "--protocol", "paper", "--latent", "0"), "latent must be 1 or more"),
        (("fit", "own.csv", *COLUMNS, "--keep", "0"), "--keep: "),
        (("rank", "nothing"), "nothing"),
        (("rank", "own.csv"), "own.csv"),
        (("rank", "q"), "q: has no model.safetensors; give the run folder of 'ial-nap fit'"),
        (("rank", "m", "prices.npz"), "no feature 'LDL'"),
        (("rank", "alone/model.safetensors"), "there is no fit.json beside it that says what it was trained on"),
        (("rank", "hurt"), "fit.json: is damaged"),
        (("update", "m", "nothing.jsonl"), "nothing.jsonl: cannot be read (No such file or directory)"),
        (("update", "m", "empty.jsonl"), "empty.jsonl: has no verdict"),
        (("update", "m", "unknown.jsonl"), "no feature 'LDX'; did you mean 'LDL'?"),
        (("update", "m", "who.jsonl"), "no instance 'pid-x'"),
        (("update", "m", "late.jsonl"), "there are 3 steps, counted from 0"),
        (
            ("update", "alone/model.safetensors", "said.jsonl", "--finetune", "2"),
            "needs the series that were annotated",
        ),
        (("evaluate", "m", "new.csv", "--id", "pid", "--time", "year"), "labels"),
        (("evaluate", "m", "--part", "audit"), "has no part 'audit'"),
        (("evaluate", "m", "--against", "m-prices"), "--against m-prices: these series have other features"),
        (("evaluate", "m", "--against", "m", "--metric", "rmse"), "a binary task: no metric 'rmse'"),
        (("annotate", "m", "--queue", "own.csv"), "own.csv: is not what 'ial-nap rank' writes"),
        (("annotate", "m", "--queue", "strange.json"), "strange.json: instance 'x' is not among those of the data"),
        (("annotate", "alone/model.safetensors", "own.csv", *COLUMNS), "there is nothing to score on"),
        (("plot", "curve", "m"), "give the run folder of 'ial-nap simulate'"),
        (("plot", "curve", "strange.json"), "is not what 'ial-nap simulate' writes"),
        (("plot", "comparison", "own.csv"), "is not a run summary"),
        (("plot", "flowers", "m"), "PICTURE: "),
        (("agreement", "lone.jsonl"), "verdicts of 1 annotator; agreement is between two or more"),
        (("export", "said.jsonl", "--format", "html"), "give --model"),
        (("export", "own.csv"), "own.csv:1: not JSON"),
        (
            ("simulate", "own.csv", *COLUMNS, "--methods", "noise"),
            "--methods: no method 'noise'; there are all, retain",
        ),
        (("simulate", "own.csv", *COLUMNS, "--oracle", "own.csv"), "own.csv"),
        (("simulate", "own.csv", *COLUMNS, "--oracle", "prices.npz"), "prices.npz: no array 'mask'; there is X, y"),
        (("simulate", "own.csv", *COLUMNS, "--oracle", "wide.npz"), "mask has shape (3, 5): expected (3, 4)"),
        (("simulate", "own.csv", *COLUMNS, "--oracle", "two.npz"), "'mask' must hold 1 (attend) and 0 (do not)"),
        (("simulate", "own.csv", *COLUMNS, "--oracle", "one.npy"), "is a single array; save it with np.savez"),
        (("compare", "own.csv", *COLUMNS, "--methods", ","), "--methods: name one at least"),
        (("demo", "--methods", "noise"), "no method 'noise'"),
        (("data", "own.csv", "--label", "nothing"), "no column"),
    ],
)
def test_wrong_input_is_one_line(fitted, said, home, call, arguments, message):
    (home / "empty.jsonl").touch()
    (home / "unknown.jsonl").write_text(to_jsonl([replace(said[0], feature="LDX")]))
    (home / "who.jsonl").write_text(to_jsonl([replace(said[0], instance="pid-x")]))
    (home / "late.jsonl").write_text(to_jsonl([replace(said[0], step=7)]))
    (home / "lone.jsonl").write_text(to_jsonl([one for one in said if one.annotator == "ada"]))
    (home / "strange.json").write_text('[{"instance": "x"}]')
    for folder in ("alone", "hurt"):
        (home / folder).mkdir(exist_ok=True)
        (home / folder / "model.safetensors").write_bytes((home / "m/model.safetensors").read_bytes())
    (home / "hurt/fit.json").write_text('{"data": 3')
    np.savez(home / "wide.npz", mask=np.ones((3, 5), int))
    np.savez(home / "two.npz", mask=2 * np.ones((3, 4), int))
    np.save(home / "one.npy", np.ones((3, 4), int))
    if "m-prices" in arguments and not (home / "m-prices").exists():
        call.done("fit", "prices.npz", *SMALL, "--epochs", 1, "--out", "m-prices")
    assert message in call.wrong(*arguments, "--device", "cpu", "--out", "wrong", "--overwrite")
