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

from meta_dropout.cli import line
from meta_dropout.learner import MetaLearner
from shared_core.runs import Summary
from shared_core.testing import Caller, figures, in_two_processes

TASK = ("--size", 16, "--ways", 3, "--queries", 2, "--filters", 4, "--blocks", 2, "--inner-steps", 1, "--samples", 2,
        "--steps", 4, "--meta-batch", 2, "--episodes", 6, "--device", "cpu")  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Leave drawing to tests of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, path, **options: Path(path).write_bytes(b"a picture"))
        yield


def drawn(folder: Path, classes: int, each: int, seed: int, size: int = 24) -> Path:
    random = np.random.default_rng(seed)
    for k in range(classes):
        (folder / f"class{k:02d}").mkdir(parents=True)
        shape = random.random((size, size)) > 0.7
        for i in range(each):
            pixels = np.where(shape, 220, 10) + random.integers(0, 30, shape.shape)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"class{k:02d}" / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """The folder that everything happens in; tests write under names of their own."""
    made = tmp_path_factory.mktemp("cli")
    drawn(made / "own", 20, 5, 0)
    drawn(made / "new", 4, 2, 1)
    (made / "asked").mkdir()
    for k, file in enumerate(sorted((made / "new").glob("*/1.png"))):
        file.rename(made / "asked" / f"{k}.png")
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


def test_training_on_a_folder_leaves_a_learner(trained, home):
    assert set(trained.artifacts) == {"model.safetensors", "learner.json", "history.png"}
    (row,) = trained.results
    assert (row.method, row.metric, row.unit) == ("meta-dropout", "accuracy", "%")
    lines = [json.loads(text) for text in (home / "m/metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in lines] == [1, 2, 3, 4]
    learner = MetaLearner.load(home / "m/model.safetensors")
    assert (learner.plan.steps, learner.test_samples, learner.method_name) == (1, 2, "meta-dropout")


def test_an_interrupted_training_resumes_to_the_same_bytes(trained, call, home, monkeypatch):
    import meta_dropout.learner as module

    original = module.MetaLearner.fit

    def stop(self, *arguments, **options):
        def after(state):
            options_on_state(state)
            if state["step"] == 2:
                raise KeyboardInterrupt

        options_on_state = options.pop("on_state")
        return original(self, *arguments, on_state=after, state_every=2, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module.MetaLearner, "fit", stop)
        stopped = call("train", "own", *TASK, "--out", "again")
    assert stopped.returncode == 130
    assert "--resume" in stopped.stderr
    assert call("train", "--resume", "--out", "again").returncode == 0
    assert (home / "again/model.safetensors").read_bytes() == (home / "m/model.safetensors").read_bytes()
    assert len((home / "again/metrics.jsonl").read_text().splitlines()) == 4


def test_too_few_classes_for_validation_do_not_lose_a_training(done, home):
    task = ("--size", 16, "--ways", 4, "--queries", 2, "--filters", 4, "--blocks", 2, "--steps", 1, "--episodes", 4)
    drawn(home / "few", 12, 5, 7)
    found = done("train", "few", *task, "--inner-steps", 1, "--samples", 2, "--device", "cpu", "--out", "w")
    assert found.results[0].dataset == "few, training classes"
    assert (home / "w/model.safetensors").exists()


def test_two_processes_share_the_tasks_and_learn_the_same(trained, home):
    """``torchrun --nproc-per-node=2``: each takes its part of every batch of tasks."""
    program = "from meta_dropout.cli import main\n\nmain()\n"
    in_two_processes(home, program, "train", "own", *TASK, "--device", "cpu", "--out", "two")
    one, two = (MetaLearner.load(home / run / "model.safetensors").parameters() for run in ("m", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)
    assert len((home / "two/metrics.jsonl").read_text().splitlines()) == 4


def test_evaluation_is_over_classes_that_were_not_trained_on(trained, done, home):
    found = done("evaluate", "m", "--episodes", 8, "--out", "e")
    metrics = {row.metric: row for row in found.results}
    assert set(metrics) == {"accuracy", "query loss", "calibration error"}
    assert metrics["accuracy"].n == 8
    assert metrics["accuracy"].low < metrics["accuracy"].mean < metrics["accuracy"].high
    protocol = json.loads((home / "e/protocol.json").read_text())
    assert protocol["statistics"] == "batch"
    assert protocol["samples"] == 2
    other = done("evaluate", "m", "--episodes", 8, "--split", "train", "--out", "e2")
    assert {row.metric: row.mean for row in other.results} != {row.metric: row.mean for row in found.results}


def test_adapting_names_the_class_of_each_picture(trained, done, home):
    found = done("adapt", "m", "new", "asked", "--models", 3, "--out", "a")
    assert found.artifacts == ["predictions.csv"]
    rows = list(csv.DictReader((home / "a/predictions.csv").open()))
    assert [row["file"] for row in rows] == ["0.png", "1.png", "2.png", "3.png"]
    for row in rows:
        p = {name: float(row[f"p({name})"]) for name in ("class00", "class01", "class02", "class03")}
        assert sum(p.values()) == pytest.approx(1, abs=1e-3)
        assert row["class"] == max(p, key=p.__getitem__)
        assert float(row["spread"]) > 0


def test_attacks_lower_accuracy(trained, done):
    found = done("attack", "m", "--episodes", 3, "--attack-steps", 2, "--radii", "0.1,0.4", "--out", "t")
    accuracy = [row.mean for row in found.results if row.metric.startswith("accuracy")]
    assert len(accuracy) == 3
    assert accuracy == sorted(accuracy, reverse=True)
    assert "robustness.png" in found.artifacts


def test_diagnosis_takes_the_noise_away(trained, done):
    found = done("diagnose", "m", "--episodes", 4, "--draws", 2, "--out", "d")
    accuracy = {row.method: row for row in found.results if row.metric == "accuracy"}
    assert set(accuracy) == {"no noise", "S = 1", "S = 10", "S = 30", "generators shuffled"}
    spread = {row.method: row.mean for row in found.results if row.metric == "spread over draws of noise"}
    assert set(spread) == {"S = 1", "S = 10", "S = 30"}


@pytest.mark.parametrize("kind", ["auto", "history", "gates", "boundary"])
def test_plots_of_a_learner(trained, done, kind):
    assert len(done("plot", "m", "--kind", kind, "--out", f"p-{kind}").artifacts) == 1


def test_workers_do_not_change_a_comparison(done):
    attack = ("--attack", "linf", "--radii", "0.2", "--attack-episodes", 2, "--attack-steps", 2)
    small = ("--methods", "pixels,maml", "--seeds", 1, "--tune", "--trials", 2, "--steps", 3, *attack)
    one, two = (done("compare", "own", *TASK, *small, "--workers", n, "--out", f"w{n}") for n in (1, 2))
    assert [row for row in figures(two) if row.unit != "ms"] == [row for row in figures(one) if row.unit != "ms"]
    assert "area under accuracy (Linf)" in {row.metric for row in two.results}


def test_comparisons_with_attacks_and_trials(done, home):
    attack = ("--attack", "linf", "--radii", "0.2", "--attack-episodes", 2, "--attack-steps", 2)
    methods = ("--methods", "pixels,maml,meta-dropout")
    found = done("compare", "own", *TASK, *methods, *attack, "--seeds", 2, "--tune", "--trials", 2, "--out", "c")
    assert {row.metric for row in found.results} >= {"accuracy", "meta-step", "area under accuracy (Linf)"}
    assert len(found.claims) == 2
    assert set(json.loads((home / "c/cells.json").read_text())) == {"pixels", "maml", "meta-dropout"}
    assert done("plot", "c", "--out", "pc").artifacts == ["comparison.png"]


def test_data_says_how_a_folder_is_divided(call):
    result = call("data", "own", "--size", 16)
    assert result.returncode == 0
    assert "train: 13 classes, 65 images of 1 x 16 x 16, 5 to 5 of each" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "own", *TASK, "--method", "noise"), "no method 'noise'"),
        (("train", "own", *TASK, "--queries", 9), "has 5 images, needs 10 (1 support + 9 query)"),
        (("train", "own", *TASK, "--ways", 15), "classes, and 15-way tasks need 15"),
        (("train", "own", *TASK, "--blocks", 5), "images of 16 pixels are 1 before block 5 of 5"),
        (("train", "nothing"), "is no file, no folder and no set"),
        (("evaluate", "nothing"), "has no model.safetensors; give the run folder of 'meta-dropout train'"),
        (("evaluate", "m", "--ways", 2), "the head was trained for 3 classes"),
        (("adapt", "m", "asked", "asked"), "0 classes"),
        (("adapt", "m", "new", "nothing"), "nothing"),
        (("plot", "own"), "own"),
        (("compare", "own", *TASK, "--attack", "linf,l2", "--radii", "0.1"), "radii: they are for one norm"),
        (("compare", "own", *TASK, "--methods", "noise"), "no method 'noise'"),
    ],
)
def test_wrong_input_is_one_line(trained, call, arguments, message):
    assert message in call.wrong(*arguments, "--out", "wrong", "--overwrite")
