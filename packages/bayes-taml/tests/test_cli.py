"""The command line on a folder of one's own pictures: what goes in, what comes out, what is said when it is wrong."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from bayes_taml.cli import line
from bayes_taml.learner import MetaLearner
from shared_core.classes import load_classes
from shared_core.runs import Summary
from shared_core.testing import Caller, figures, in_two_processes

TASK = ("--size", 16, "--ways", 3, "--high", 4, "--queries", 2, "--test-queries", 3, "--filters", 4, "--blocks", 2,
        "--inner-steps", 2, "--test-steps", 2, "--samples", 2, "--steps", 4, "--meta-batch", 2, "--episodes", 6,
        "--device", "cpu")  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Leave drawing to tests of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, path, **options: Path(path).write_bytes(b"a picture"))
        yield


def drawn(folder: Path, counts: list[int], seed: int, size: int = 24) -> Path:
    random = np.random.default_rng(seed)
    for k, each in enumerate(counts):
        (folder / f"class{k:02d}").mkdir(parents=True)
        shape = random.random((size, size)) > 0.7
        for i in range(each):
            pixels = np.where(shape, 220, 10) + random.integers(0, 30, shape.shape)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"class{k:02d}" / f"{i}.png")
    return folder


def arrays(folder: Path, name: str, *, labelled: bool = True, seed: int = 5, **more: object) -> Path:
    random = np.random.default_rng(seed)
    y = np.repeat(["cat", "dog", "eel"], (1, 4, 2))
    x = (random.random((3, 1, 20, 20)) > 0.5)[[0, 1, 1, 1, 1, 2, 2], 0] * 200
    found: dict[str, object] = {"x": (x + random.integers(0, 40, x.shape)).astype(np.uint8)}
    if labelled:
        found["y"] = y
    np.savez(folder / name, **{**found, **more})
    return folder / name


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """The folder that everything happens in; tests write under names of their own."""
    made = tmp_path_factory.mktemp("cli")
    drawn(made / "own", [8] * 20, 0)
    drawn(made / "other", [7] * 16, 3)
    drawn(made / "new", [2, 6, 3, 4], 1)
    (made / "asked").mkdir()
    for k, file in enumerate(sorted((made / "new").glob("*/1.png"))):
        file.rename(made / "asked" / f"{k}.png")
    arrays(made, "support.npz")
    arrays(made, "query.npz", labelled=False, seed=5)
    arrays(made, "answers.npz")
    return made


@pytest.fixture(scope="module")
def call(home) -> Caller:
    return Caller(line, home)


@pytest.fixture(scope="module")
def done(call):
    return call.done


@pytest.fixture(scope="module")
def trained(done) -> Summary:
    return done("train", "own", *TASK, "--out", "m")


@pytest.fixture(scope="module")
def plain(done) -> Summary:
    """A learner that infers nothing, and one that adapts nothing."""
    done("train", "own", *TASK, "--method", "protonet", "--out", "proto")
    return done("train", "own", *TASK, "--method", "metasgd", "--norm", "support", "--out", "sgd")


def test_training_on_a_folder_leaves_a_learner(trained, home):
    assert set(trained.artifacts) == {"model.safetensors", "learner.json", "history.png"}
    (row,) = trained.results
    assert (row.method, row.metric, row.unit, row.dataset) == (
        "bayesian-taml", "accuracy", "%", "own, validation classes"
    )  # fmt: skip
    lines = [json.loads(text) for text in (home / "m/metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in lines] == [1, 2, 3, 4]
    assert all(set(entry) == {"step", "loss", "accuracy", "kl"} for entry in lines)
    learner = MetaLearner.load(home / "m/model.safetensors")
    assert (learner.plan.steps, learner.samples, learner.max_shot) == (2, 2, 4)
    facts = json.loads((home / "m/learner.json").read_text())
    assert facts["data"] == str(home / "own")
    assert (facts["low"], facts["high"], facts["channels"], facts["mode"]) == (1, 4, 1, "mixed")
    assert 0 < facts["mean"] < 1


def test_an_interrupted_training_resumes_to_the_same_bytes(done, call, home, monkeypatch):
    import bayes_taml.learner as module

    original = module.MetaLearner.fit
    watched = ("--validate-every", 2)
    whole = done("train", "own", *TASK, *watched, "--out", "whole")
    logged = [json.loads(text) for text in (home / "whole/metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in logged if "validation" in entry] == [2, 4]

    def stop(self, *arguments, **options):
        def after(state):
            on_state(state)
            if state["step"] == 2:
                raise KeyboardInterrupt

        on_state = options.pop("on_state")
        return original(self, *arguments, on_state=after, state_every=2, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module.MetaLearner, "fit", stop)
        stopped = call("train", "own", *TASK, *watched, "--out", "again")
    assert stopped.returncode == 130
    assert "--resume" in stopped.stderr
    assert call("train", "--resume", "--out", "again").returncode == 0
    assert (home / "again/model.safetensors").read_bytes() == (home / "whole/model.safetensors").read_bytes()
    assert (home / "again/metrics.jsonl").read_bytes() == (home / "whole/metrics.jsonl").read_bytes()
    again = Summary.model_validate_json((home / "again/summary.json").read_text())
    assert again.results == whole.results


def test_too_few_classes_for_validation_do_not_lose_a_training(done, call, home):
    drawn(home / "few", [5] * 12, 7)
    task = ("few", *TASK, "--ways", 4, "--steps", 1, "--high", 2)
    found = done("train", *task, "--out", "w")
    assert found.results[0].dataset == "few, training classes"
    assert (home / "w/model.safetensors").exists()
    assert "tasks of 4 need 4" in call.wrong("train", *task, "--validate-every", 1, "--out", "w2")


def test_two_processes_share_the_tasks_and_learn_the_same(trained, home):
    """``torchrun --nproc-per-node=2``: each takes its part of every batch of tasks."""
    program = "from bayes_taml.cli import main\n\nmain()\n"
    in_two_processes(home, program, "train", "own", *TASK, "--device", "cpu", "--out", "two")
    one, two = (MetaLearner.load(home / run / "model.safetensors").parameters() for run in ("m", "two"))
    for name, value in one.items():
        # A convolution's bias is without effect before a normalisation: what Adam makes of its gradient is rounding.
        if not name.endswith("conv.bias") and not name.startswith("inference.z.mean"):
            torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-4)
    assert len((home / "two/metrics.jsonl").read_text().splitlines()) == 4


def test_evaluation_says_how_right_how_sure_and_for_which_sizes(trained, done, home):
    found = done("evaluate", "m", "--episodes", 12, "--counts", "1,5", "--out", "e")
    mine = {row.metric: row for row in found.results if row.dataset == "own (mixed 1-4 shots)"}
    assert set(mine) == {
        "accuracy", "negative log-likelihood", "calibration error", "accuracy at 1-3 shots", "accuracy at 4 shots",
        "accuracy in tasks of 3-9 images", "accuracy in tasks of 10-12 images",
    }  # fmt: skip
    assert mine["accuracy"].n == 12
    assert mine["accuracy"].low < mine["accuracy"].mean < mine["accuracy"].high
    assert {row.dataset for row in found.results} - {mine["accuracy"].dataset} == {
        "own (1 shots of every class)", "own (5 shots of every class)"
    }  # fmt: skip
    assert set(found.artifacts) == {
        "sizes.png", "reliability.png", "balance-omega.png", "balance-gamma.png", "protocol.json"
    }  # fmt: skip
    protocol = json.loads((home / "e/protocol.json").read_text())
    assert (protocol["statistics"], protocol["samples"], protocol["inner_steps"]) == ("batch", 2, 2)


def test_evaluation_of_other_data_modes_and_shots(trained, plain, done):
    options = ("--data", "other", "--split", "all", "--mode", "step", "--low", 2, "--high", 3, "--samples", 0)
    found = done("evaluate", "m", *options, "--ways", 4, "--episodes", 5, "--test-steps", 1, "--out", "e2")
    assert {row.dataset for row in found.results} == {"other (step 2-3 shots)"}
    found = done("evaluate", "sgd", "--data", "digits", "--episodes", 2, "--out", "e3")
    assert {row.dataset for row in found.results} == {"digits (mixed 1-4 shots)"}
    assert set(found.artifacts) == {"sizes.png", "reliability.png", "protocol.json"}


def test_adapting_names_the_class_of_each_picture(trained, done, home):
    found = done("adapt", "m", "new", "asked", "--samples", 3, "--out", "a")
    assert set(found.artifacts) == {"predictions.csv", "explanation.json"}
    rows = list(csv.DictReader((home / "a/predictions.csv").open()))
    assert [row["file"] for row in rows] == ["0.png", "1.png", "2.png", "3.png"]
    for row in rows:
        p = {name: float(row[f"p({name})"]) for name in ("class00", "class01", "class02", "class03")}
        assert sum(p.values()) == pytest.approx(1, abs=1e-3)
        assert row["class"] == max(p, key=p.__getitem__)
        assert float(row["spread"]) > 0
    explanation = json.loads((home / "a/explanation.json").read_text())
    assert explanation["counts"] == [1, 5, 2, 3]


def test_adapting_to_arrays(trained, plain, done, home):
    assert done("adapt", "m", "support.npz", "query.npz", "--out", "n1").results == []
    found = done("adapt", "m", "support.npz", "answers.npz", "--out", "n2")
    rows, answered = (list(csv.DictReader((home / run / "predictions.csv").open())) for run in ("n1", "n2"))
    assert [row["file"] for row in rows] == [str(k) for k in range(7)]
    assert set(rows[0]) == {"file", "class", "probability", "spread", "p(cat)", "p(dog)", "p(eel)"}
    for one, other in zip(rows, answered, strict=True):
        for key in ("p(cat)", "p(dog)", "p(eel)"):
            assert float(one[key]) == pytest.approx(float(other[key]), abs=2e-4)
    (row,) = found.results
    truth = ["cat", *["dog"] * 4, *["eel"] * 2]
    assert row.mean == pytest.approx(100 * np.mean([r["class"] == t for r, t in zip(answered, truth, strict=True)]))
    assert done("adapt", "proto", "support.npz", "query.npz", "--out", "n3").artifacts == ["predictions.csv"]


def test_colour_and_floats_and_inverted_arrays_are_read(trained, done, home):
    x = np.load(home / "query.npz")["x"]
    colour = np.repeat(x[:, None], 3, axis=1).astype(np.float32) / 255
    np.savez(home / "colour.npz", x=colour)
    np.savez(home / "dark.npz", x=255 - x)
    np.savez(
        home / "dark-support.npz", x=255 - np.load(home / "support.npz")["x"], y=np.load(home / "support.npz")["y"]
    )
    done("adapt", "m", "support.npz", "query.npz", "--out", "f0")
    done("adapt", "m", "support.npz", "colour.npz", "--out", "f1")
    done("adapt", "m", "dark-support.npz", "dark.npz", "--invert", "yes", "--out", "f2")
    tables = [list(csv.DictReader((home / run / "predictions.csv").open())) for run in ("f0", "f1", "f2")]
    for table in tables[1:]:
        for one, other in zip(tables[0], table, strict=True):
            assert float(one["p(dog)"]) == pytest.approx(float(other["p(dog)"]), abs=0.02)


def test_explanations_are_said_written_and_drawn(trained, call, home):
    result = call("explain", "m", "new", "--label", "class00", "--counts", "1,4", "--out", "x")
    assert result.returncode == 0, result.stderr
    assert "class weights (even: 0.250)" in result.stdout
    assert "head: " in result.stdout
    assert "with 4 examples of class00: its weight " in result.stdout
    record = json.loads((home / "x/explanation.json").read_text())
    assert [c["count"] for c in record["counterfactual"]] == [1, 4]
    assert len(record["counterfactual"][0]["gamma"]) == 3
    assert (home / "x/explanation.png").exists()


def test_support_that_is_far_larger_than_in_training_is_noted(trained, call, home):
    drawn(home / "large", [1, 10], 8)
    result = call("adapt", "m", "large", "asked", "--out", "l")
    assert result.returncode == 0, result.stderr
    assert "a class has 10 examples, training had at most 4" in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("kind", "drawn_files"),
    [("auto", ["history.png"]), ("balance", ["balance-omega.png", "balance-gamma.png"])],
)
def test_plots_of_a_learner(trained, done, kind, drawn_files):
    assert done("plot", "m", "--kind", kind, "--out", f"p-{kind}").artifacts == drawn_files


def test_two_pictures_are_named_by_the_output(trained, done, home):
    done("plot", "m", "--kind", "balance", "--output", "mine.svg", "--out", "p-mine")
    assert (home / "mine-omega.svg").exists()
    assert (home / "mine-gamma.svg").exists()


def test_workers_do_not_change_a_comparison(done):
    small = ("--methods", "pixels,metasgd", "--seeds", 1, "--tune", "--trials", 2, "--steps", 3, "--episodes", 3)
    one, two = (done("compare", "own", *TASK, *small, "--workers", n, "--out", f"w{n}") for n in (1, 2))
    assert [row for row in figures(two) if row.unit != "ms"] == [row for row in figures(one) if row.unit != "ms"]


def test_comparisons_with_trials_modes_and_other_domains(done, home):
    options = ("--methods", "pixels,metasgd,naive-taml,bayesian-taml", "--modes", "class,task", "--others", "other")
    found = done("compare", "own", *TASK, *options, "--seeds", 2, "--tune", "--trials", 2, "--out", "c")
    assert {row.dataset for row in found.results} == {
        "own (class 1-4 shots)", "own (task 1-4 shots)", "other (out of distribution)"
    }  # fmt: skip
    assert len(found.claims) == 9
    assert set(found.artifacts) == {"comparison.png", "sizes.png", "reliability.png", "cells.json"}
    cells = json.loads((home / "c/cells.json").read_text())
    assert set(cells) == {"pixels", "metasgd", "naive-taml", "bayesian-taml"}
    assert cells["naive-taml"]["0"]["setting"] == cells["bayesian-taml"]["0"]["setting"] != {}
    assert done("plot", "c", "--out", "pc").artifacts == ["comparison.png"]
    some = ("--kind", "sizes", "--methods", "metasgd")
    assert done("plot", "c", *some, "--out", "ps").artifacts == ["sizes.png"]


def test_exporting_an_adapted_model(plain, done, home):
    runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install 'bayes-taml[onnx]'")
    pytest.importorskip("onnxscript", reason="needs onnxscript: pip install 'bayes-taml[onnx]'")
    assert done("export", "sgd", "support.npz", "--out", "o").artifacts == ["model.onnx"]
    done("adapt", "sgd", "support.npz", "query.npz", "--out", "o2")
    session = runtime.InferenceSession(str(home / "o/model.onnx"))
    x = load_classes(home / "answers.npz", split="all", size=16).float_images(slice(None))
    (found,) = session.run(None, {"images": x})
    rows = list(csv.DictReader((home / "o2/predictions.csv").open()))
    np.testing.assert_allclose(np.exp(found)[:, 1], [float(row["p(dog)"]) for row in rows], atol=2e-4)


def test_data_says_which_tasks_a_source_allows(call):
    result = call("data", "own", "--size", 16, "--queries", 3)
    assert result.returncode == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["train", "13", "104", "8-8", "13,", "13,", "13,", "0,", "0,", "0"] in lines
    result = call("data", "digits", "--size", 8)
    assert result.returncode == 0
    assert "digits has the same classes in every split" in result.stdout
    assert "train" not in result.stdout.split("digits has", 1)[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "own", *TASK, "--method", "noise"), "no method 'noise'"),
        (("train", "own", *TASK, "--queries", 8), "has 8 images; 8 queries and at least one of support need 9"),
        (("train", "own", *TASK, "--ways", 15), "classes, and tasks of 15 need 15"),
        (("train", "own", *TASK, "--low", 5), "--low: must not be above --high"),
        (("train", "own", *TASK, "--blocks", 5), "5 blocks halve images 5 times"),
        (("train", "own", *TASK, "--pooling", "mean,mean"), "each once"),
        (("train", "nothing"), "is no file, no folder and no set"),
        (("train", "mnist"), "its classes are the same in every split"),
        (("evaluate", "nothing"), "has no model.safetensors; give the run folder of 'bayes-taml train'"),
        (("evaluate", "m", "--ways", 9), "has 4 classes, and tasks of 9 need 9"),
        (("evaluate", "m", "--counts", "6"), "has 8 images; 6 shots and 3 queries need 9"),
        (("adapt", "m", "asked", "asked"), "0 classes"),
        (("adapt", "m", "new", "nothing"), "nothing"),
        (("adapt", "m", "support.npz", "nothing.npz"), "nothing.npz: No such file"),
        (("adapt", "m", "one.npz", "query.npz"), "all labels are 'cat'; a task needs at least two classes"),
        (("adapt", "m", "support.npz", "unknown.npz"), "row 0 is of class 'fox', and the support has cat, dog, eel"),
        (("adapt", "m", "support.npz", "nan.npz"), "row 2 of 'x' holds NaN or infinity"),
        (("adapt", "m", "support.npz", "wide.npz"), "values of 'x' are 0..200; expected"),
        (("adapt", "m", "support.npz", "text.npz"), "expected (n, height, width[, channels])"),
        (("adapt", "m", "support.npz", "support.npz", "--favour", "fox=2"), "--favour: no class 'fox' in the support"),
        (("adapt", "m", "support.npz", "support.npz", "--favour", "fox"), "'fox' is no CLASS=FACTOR"),
        (("explain", "m", "new", "--label", "fox"), "no class 'fox' in the support"),
        (("explain", "m", "new", "--counts", "0"), "--counts: must be 1 or more"),
        (("explain", "proto", "new"), "takes no weighted steps"),
        (("explain", "sgd", "new", "--label", "class00"), "infers nothing about a task"),
        (("plot", "own"), "own"),
        (("plot", "sgd", "--kind", "balance"), "infers nothing"),
        (("plot", "sgd", "--kind", "sizes"), "has no cells.json"),
        (("compare", "own", *TASK, "--methods", "noise"), "no method 'noise'"),
        (("compare", "own", *TASK, "--others", "other,other"), "two of them are called 'other'"),
    ],
)
def test_wrong_input_is_one_line(trained, plain, home, call, arguments, message):
    x = np.zeros((3, 16, 16), np.float32)
    np.savez(home / "one.npz", x=x, y=["cat"] * 3)
    np.savez(home / "unknown.npz", x=x, y=["fox"] * 3)
    np.savez(home / "wide.npz", x=200 * np.eye(16)[None])
    np.savez(home / "text.npz", x=np.array(["a", "b"]))
    x[2, 3, 3] = np.nan
    np.savez(home / "nan.npz", x=x)
    assert message in call.wrong(*arguments, "--out", "wrong", "--overwrite")
