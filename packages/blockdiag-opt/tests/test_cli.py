"""The command line on users' own files: what goes in, what comes out, what is said when it is wrong."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_breast_cancer, load_diabetes

from blockdiag_opt.cli import CompareConfig, line
from blockdiag_opt.training import load_trained
from shared_core.runs import Summary, load_tree, read_summary
from shared_core.testing import Caller, figures, in_two_processes


@pytest.fixture
def call(tmp_path):
    return Caller(line, tmp_path)


@pytest.fixture
def done(call):
    return call.done


@pytest.fixture
def wrong(call):
    return call.wrong


def write_csv(path, x, y, header=None) -> None:
    names = header or [*(f"f{k}" for k in range(x.shape[1])), "y"]
    np.savetxt(path, np.column_stack([x, y]), delimiter=",", header=",".join(names), comments="")


@pytest.fixture
def cancer(tmp_path):
    x, y = load_breast_cancer(return_X_y=True)
    write_csv(tmp_path / "cancer.csv", x, y)
    return x, y


def value(summary: Summary, metric: str) -> float:
    return next(row.mean for row in summary.results if row.metric == metric)


def test_train_evaluate_predict_export_and_plot_of_a_users_table(done, call, cancer, tmp_path):
    _, y = cancer
    summary = done("train", "cancer.csv", "--target", "y", "--epochs", 12, "--out", "run")
    assert value(summary, "test accuracy") > 93
    assert {row.metric: row.unit for row in summary.results} == {"test accuracy": "%", "test loss": "nats"}
    assert {"model.safetensors", "optimizer.safetensors", "history.png", "monitor.png"} <= set(summary.artifacts)
    assert value(done("evaluate", "run", "cancer.csv", "--out", "e"), "accuracy") > 95
    done("predict", "run", "cancer.csv", "--out", "p")
    rows = np.genfromtxt(tmp_path / "p" / "predictions.csv", delimiter=",", names=True)
    assert (rows["prediction"] == y).mean() > 0.95
    assert np.allclose(rows["probability_of_0"] + rows["probability_of_1"], 1)

    done("export", "run", "--out", "x1")
    weights = load_file(tmp_path / "x1" / "model.safetensors")
    assert weights["0.weight"].shape == (64, 30)
    done("export", "run", "--format", "optimizer", "--out", "x2")
    state = load_file(tmp_path / "x2" / "optimizer.safetensors")
    assert state["0.weight.exp_avg_sq"].shape == (64 * 3, 55)
    done("export", "run", "--format", "pt2", "--out", "x3")
    program = torch.export.load(tmp_path / "x3" / "model.pt2").module()
    assert program(torch.zeros(5, 30)).shape == (5, 2)
    spectrum = done("spectrum", "run", "--out", "s")
    assert {row.dataset for row in spectrum.results} >= {"0.weight", "2.weight"}
    assert all(0 <= row.mean <= 1 for row in spectrum.results if row.metric == "off-diagonal energy")
    assert call("plot", "run", "--kind", "svg", "--out", "pl").returncode == 0


def test_train_regression_and_reconstruction(done, tmp_path):
    x, y = load_diabetes(return_X_y=True)
    write_csv(tmp_path / "d.csv", x, y)
    summary = done("train", "d.csv", "--target", "y", "--epochs", 10, "--lr", 0.003, "--out", "r")
    assert value(summary, "test rmse") < 0.9 * y.std()
    done("predict", "r", "d.csv", "--out", "p")
    predicted = np.genfromtxt(tmp_path / "p" / "predictions.csv", delimiter=",", names=True)["prediction"]
    assert np.corrcoef(predicted, y)[0, 1] > 0.6
    summary = done("train", "d.csv", "--exclude", "y", "--model", "ae:8,4", "--epochs", 10, "--out", "a")
    assert 0 < value(summary, "test squared error") < 10


def test_train_images_and_a_users_own_model(done, tmp_path):
    random = np.random.default_rng(0)
    y = random.integers(0, 2, 200)
    x = random.normal(size=(200, 8, 8)) + y[:, None, None]
    np.savez(tmp_path / "images.npz", x=x, y=y)
    assert value(done("train", "images.npz", "--target", "y", "--model", "cnn:4", "--epochs", 5), "test accuracy") > 90
    (tmp_path / "mine_for_blockdiag.py").write_text(
        "import torch\ndef make(outputs, shape):\n    assert shape == (8, 8)\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, outputs))\n"
    )
    summary = done(
        "train",
        "images.npz",
        "--target",
        "y",
        "--model",
        "mine_for_blockdiag:make",
        "--optimizer",
        "adam",
        "--epochs",
        5,
    )
    assert value(summary, "test accuracy") > 90


def test_training_discovers_groups_in_the_users_table(done, cancer, tmp_path):
    done("train", "cancer.csv", "--target", "y", "--epochs", 1, "--optimizer", "block-adam:discover=true", "--out", "d")
    groups = load_tree(tmp_path / "d/optimizer.safetensors")["param_groups"]
    assert any(group.get("blocks") is not None for group in groups)


def test_two_processes_share_every_batch_and_learn_the_same(done, cancer, tmp_path):
    """``torchrun --nproc-per-node=2``: each takes its rows of a batch, the last of which has only one."""
    arguments = ["train", "cancer.csv", "--target", "y", "--epochs", "2", "--batch-size", "227", "--device", "cpu"]
    done(*arguments, "--out", "one")
    in_two_processes(tmp_path, "from blockdiag_opt.cli import main\n\nmain()\n", *arguments, "--out", "two")
    one, two = (load_trained(tmp_path / run / "model.safetensors")[0].state_dict() for run in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4)


def test_an_interrupted_training_ends_as_if_nothing_had_happened(done, call, cancer, tmp_path, monkeypatch):
    from blockdiag_opt import training

    options = ("cancer.csv", "--target", "y", "--epochs", 6, "--optimizer", "block-adam:K=7")
    whole = done("train", *options, "--out", "whole")

    original, calls = training.Trained.state, []

    def stop_in_the_third(self):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(training.Trained, "state", stop_in_the_third)
    assert call("train", *options, "--out", "torn").returncode == 130
    monkeypatch.setattr(training.Trained, "state", original)
    resumed = done("train", *options, "--out", "torn", "--resume")
    assert value(resumed, "test loss") == value(whole, "test loss")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "torn"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    lines = (tmp_path / "torn" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(each)["epoch"] for each in lines] == list(range(1, 7))


@pytest.mark.parametrize(
    ("given", "methods"),
    [
        ("adam,block-adam:b=25,K=5,soap", ("adam", "block-adam:b=25,K=5", "soap")),
        ("adam block-adam:b=25,K=5 soap", ("adam", "block-adam:b=25,K=5", "soap")),
        ("sgd:momentum=0, block-adam:b=25, K=5, adam", ("sgd:momentum=0", "block-adam:b=25,K=5", "adam")),
        ("adam:betas=0.9/0.99,sgd:nesterov=true", ("adam:betas=0.9/0.99", "sgd:nesterov=true")),
        (["block-adam:b=25,K=5", "adam"], ("block-adam:b=25,K=5", "adam")),
    ],
)
def test_methods_are_told_apart_from_their_options(given, methods):
    assert CompareConfig(task="digits", methods=given).methods == methods


def test_compare_on_a_users_table(done, cancer, tmp_path):
    summary = done(
        "compare", "cancer.csv", "--target", "y", "--methods", "adam,block-adam", "--seeds", 2, "--tuning-seeds", 1,
        "--points", 3, "--extend", 2, "--steps", 30, "--block-sizes", "1,10", "--out", "c",
    )  # fmt: skip
    methods = {row.method for row in summary.results}
    assert methods == {"adam", "block-adam", "block-adam:b=1,K=1", "block-adam:b=10,K=1"}
    right = [row for row in summary.results if row.metric in {"test accuracy", "validation accuracy"}]
    assert len(right) == 8
    assert all(row.unit == "%" and 30 < row.mean <= 100 for row in right)
    assert {"curves.png", "grids.png", "grids.json", "pareto.png", "comparison.png"} <= set(summary.artifacts)
    grids = json.loads((tmp_path / "c" / "grids.json").read_text())
    assert len(grids["cancer"]["adam"]["tried"]) >= 3
    # Blocks of one weight are Adam, whatever the learning rate grid starts from.
    one = {row.metric: row.mean for row in summary.results if row.method == "block-adam:b=1,K=1"}
    adam = {row.metric: row.mean for row in summary.results if row.method == "adam"}
    if one["best learning rate"] == adam["best learning rate"]:
        assert one["train loss"] == pytest.approx(adam["train loss"], rel=1e-3)


def test_workers_do_not_change_a_comparison(done, cancer, tmp_path):
    """From the first grid over its extension to the fresh seeds; only what is measured in time differs."""
    options = (
        "cancer.csv", "--target", "y", "--methods", "adam sgd:momentum=0", "--seeds", 2, "--tuning-seeds", 1,
        "--points", 1, "--extend", 2, "--steps", 5,
    )  # fmt: skip
    one = done("compare", *options, "--out", "one")
    # In a process of its own: functions whose shapes are checked cannot travel.
    command = [
        sys.executable,
        "-m",
        "blockdiag_opt.cli",
        "compare",
        *map(str, options),
        "--workers",
        "2",
        "--out",
        "two",
    ]
    subprocess.run([*command, "--quiet"], cwd=tmp_path, check=True)
    assert untimed(read_summary(tmp_path / "two")) == untimed(one)
    grids = json.loads((tmp_path / "two" / "grids.json").read_text())
    assert [len(grid["tried"]) for grid in grids["cancer"].values()] == [3, 3]


def untimed(summary):
    return [row for row in figures(summary) if row.unit not in {"ms", "s"}]


def test_plan_of_a_file_and_of_a_function(done, tmp_path):
    save_file({"fc.weight": torch.zeros(40, 30), "fc.bias": torch.zeros(40)}, tmp_path / "m.safetensors")
    summary = done("plan", "m.safetensors", "--out", "a")
    told = json.loads((tmp_path / "a" / "plan.json").read_text())
    row = next(row for row in told["rows"] if row["name"] == "fc.weight")
    assert (row["block_size"], row["blocks"]) == (10, 120)
    assert value(summary, "state") > 0
    (tmp_path / "planned_by_blockdiag.py").write_text("import torch\ndef net():\n    return torch.nn.LSTM(8, 16)\n")
    assert value(done("plan", "planned_by_blockdiag:net", "--out", "b"), "predicted step") > 0


def test_bench_recommends_what_fits_the_budget(call):
    result = call("bench", "--weights", 2000, "--block-sizes", "1,4", "--intervals", "1,3", "--max-overhead", 1000)
    assert result.returncode == 0, result.stderr
    assert "block_size=4" in result.stdout


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "empty"),
        ("a,y\n", "no rows"),
        ("a,a,y\n1,2,0\n", "twice"),
        ("a,y\n1,0\n2\n", "line 3"),
        ("a,y\n1,0\nred,1\n", "line 3, column 'a': 'red'"),
        ("a,y\n1,0\n,1\n", "missing"),
        ("a,y\n1,0\ninf,1\n", "not a finite number"),
        ("a,b\n1,0\n2,1\n", "no column 'y'"),
        ("a,y\n1,3\n2,3\n3,3\n4,3\n5,3\n6,3\n", "single value"),
        ("y\n1\n2\n3\n", "no column is left"),
    ],
)
def test_wrong_tables(wrong, tmp_path, content, said):
    (tmp_path / "t.csv").write_text(content)
    assert said in wrong("train", "t.csv", "--target", "y")


def test_wrong_arrays(wrong, tmp_path):
    np.savez(tmp_path / "a.npz", z=np.zeros(3))
    assert "'x'" in wrong("train", "a.npz", "--target", "y")
    np.savez(tmp_path / "b.npz", x=np.full((5, 2), np.nan), y=np.zeros(5))
    assert "row 0, column 'x0'" in wrong("train", "b.npz", "--target", "y")
    np.savez(tmp_path / "c.npz", x=np.zeros((5, 2)), y=np.zeros(4))
    assert "shape (5,)" in wrong("train", "c.npz", "--target", "y")
    (tmp_path / "d.npz").write_bytes(b"PK\x03\x04 torn")
    assert "d.npz" in wrong("train", "d.npz", "--target", "y")
    np.savez(tmp_path / "e.npz", x=np.array([["a"]]), y=np.zeros(1))
    assert "numeric" in wrong("train", "e.npz", "--target", "y")


def test_wrong_models_and_optimizers(wrong, cancer, tmp_path):
    base = ("train", "cancer.csv", "--target", "y", "--epochs", 1)
    assert "nothing_here" in wrong(*base, "--model", "nothing_here:make")
    assert "package.module:function" in wrong(*base, "--model", "mlpp")
    assert "whole numbers" in wrong(*base, "--model", "mlp:a")
    assert "cnn" in wrong(*base, "--model", "cnn")
    assert "block-adam" in wrong(*base, "--optimizer", "blok-adam")
    assert "block_size" in wrong(*base, "--optimizer", "block-adam:b=0")
    (tmp_path / "wrong_for_blockdiag.py").write_text(
        "import torch\ndef number():\n    return 3\ndef narrow():\n    return torch.nn.Linear(5, 2)\nvalue = 1\n"
    )
    assert "returned a int" in wrong(*base, "--model", "wrong_for_blockdiag:number")
    assert "narrow" in wrong(*base, "--model", "wrong_for_blockdiag:narrow")
    assert "not a function" in wrong(*base, "--model", "wrong_for_blockdiag:value")
    assert "no 'absent'" in wrong(*base, "--model", "wrong_for_blockdiag:absent")
    diverging = ("--kind", "regression", "--model", "linear", "--lr", 1e4, "--optimizer", "sgd")
    assert "smaller --lr" in wrong(*base, *diverging)


def test_wrong_runs(wrong, call, cancer, tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "plain.safetensors")
    for command in (("evaluate", "plain.safetensors", "cancer.csv"), ("spectrum", "plain.safetensors")):
        assert "plain.safetensors" in wrong(*command)
    assert "give the run folder of 'blockdiag-opt train'" in wrong("export", "plain.safetensors")
    (tmp_path / "empty").mkdir()
    for command, name in (("predict", "model"), ("spectrum", "optimizer"), ("export", "model")):
        arguments = ("empty", "cancer.csv") if command == "predict" else ("empty",)
        assert f"empty: has no {name}.safetensors; give the run folder" in wrong(command, *arguments)
    assert (
        call("train", "cancer.csv", "--target", "y", "--epochs", 1, "--optimizer", "sgd", "--out", "s").returncode == 0
    )
    assert "another optimizer" in wrong("spectrum", "s")
    assert "would be overwritten" in wrong("export", "s", "--out", "s")
    load_trained(tmp_path / "s" / "model.safetensors")
    write_csv(tmp_path / "less.csv", cancer[0][:, :5], cancer[1])
    assert "no column 'f5'" in wrong("predict", "s", "less.csv")
    write_csv(tmp_path / "other.csv", cancer[0], cancer[1] + 7)
    assert "was not in the training data" in wrong("evaluate", "s", "other.csv")
    assert "no task 'nonsense'" in wrong("compare", "nonsense")


def test_help_needs_no_torch():
    code = "import sys; from blockdiag_opt.cli import line; assert 'torch' not in sys.modules, 'torch'"
    subprocess.run([sys.executable, "-c", code], check=True)
