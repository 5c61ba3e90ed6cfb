"""The command line on users' own files: what goes in, what comes out, what is said when it is wrong."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits, load_wine

from shared_core.runs import Summary
from shared_core.testing import Caller
from srq_dropbits.cli import CompareConfig, line
from srq_dropbits.models import build
from srq_dropbits.packing import inspect_packed


@pytest.fixture
def call(tmp_path):
    return Caller(line, tmp_path)


@pytest.fixture
def done(call):
    return call.done


@pytest.fixture
def wrong(call):
    return call.wrong


def value(summary: Summary, metric: str, method: str | None = None) -> float:
    return next(r.mean for r in summary.results if r.metric == metric and method in {None, r.method})


@pytest.fixture
def wine(tmp_path):
    x, y = load_wine(return_X_y=True)
    header = ",".join([*(f"f{k}" for k in range(x.shape[1])), "grape"])
    np.savetxt(tmp_path / "wine.csv", np.column_stack([x, y]), delimiter=",", header=header, comments="")
    return x, y


def test_a_users_table_from_training_to_every_export(done, wine, tmp_path):
    _, y = wine
    summary = done(
        "train",
        "wine.csv",
        "--arch",
        "mlp:16",
        "--weight-bits",
        3,
        "--float-epochs",
        30,
        "--epochs",
        10,
        "--out",
        "run",
    )
    assert value(summary, "test accuracy") > 85
    assert {row.metric: row.unit for row in summary.results} == {
        "validation accuracy": "%",
        "validation loss": "nats",
        "test accuracy": "%",
        "test loss": "nats",
        "average bits": "bits",
        "bytes": "bytes",
    }
    assert {"model.safetensors", "weights.png", "bits.png", "history.png", "report.json"} <= set(summary.artifacts)
    assert value(summary, "average bits") == 3

    measured = done("evaluate", "run", "--out", "e")
    assert value(measured, "accuracy", "as trained") == value(summary, "test accuracy")
    assert value(measured, "accuracy", "integer") == value(measured, "accuracy", "as trained")
    everything = done("evaluate", "run", "--data", "wine.csv", "--part", "all", "--out", "e2")
    assert value(everything, "accuracy", "integer") > 85

    done("predict", "run", "wine.csv", "--integer", "--out", "p")
    rows = np.genfromtxt(tmp_path / "p" / "predictions.csv", delimiter=",", skip_header=1)
    assert 100 * (rows[:, 0] == y).mean() == pytest.approx(value(everything, "accuracy", "integer"))
    assert np.allclose(rows[:, 1:].sum(1), 1, atol=1e-4)

    packed = done("export", "run", "--out", "x1")
    path = tmp_path / "x1" / "model.srq.safetensors"
    assert value(packed, "file") == path.stat().st_size
    assert value(packed, "read back: largest difference") == 0
    assert value(packed, "integer network: same class") == 1
    table = done("inspect", path, "--out", "i1")
    assert value(table, "file") == path.stat().st_size
    shown = done("inspect", "run", "--out", "i2")
    assert {"weights.png", "bits.png", "history.png"} <= set(shown.artifacts)
    done("export", "run", "--format", "weights", "--out", "x3")
    weights = load_file(tmp_path / "x3" / "model.safetensors")
    assert all(value.dtype == torch.float32 for value in weights.values())
    assert done("plot", "run", "--kind", "svg", "--out", "pl").artifacts == ["comparison.svg"]


def test_onnx_agrees_with_the_network(done, wine, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    done("train", "wine.csv", "--arch", "mlp:16", "--float-epochs", 5, "--epochs", 2, "--out", "run")
    found = done("export", "run", "--format", "onnx", "--weight-type", "int8", "--out", "x")
    assert value(found, "onnxruntime: same class") == 1
    assert value(found, "file") == (tmp_path / "x" / "model.onnx").stat().st_size


def test_a_users_own_model_and_weights(done, wrong, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self, classes):\n"
        "        super().__init__()\n"
        "        self.conv = torch.nn.Conv2d(1, 6, 3)\n"
        "        self.head = torch.nn.Linear(6 * 36, classes)\n"
        "    def forward(self, x):\n"
        "        return self.head(self.conv(x).relu().flatten(1))\n"
        "def net(classes):\n"
        "    return Net(classes)\n"
    )
    digits = load_digits()
    np.savez(tmp_path / "d.npz", x=digits.images[:400, None].astype(np.float32), y=digits.target[:400])
    options = ("--arch", "mine:net", "--epochs", 2, "--act-bits", 8)
    done("train", "d.npz", *options, "--float-epochs", 4, "--out", "a")
    summary = done(
        "train", "d.npz", *options, "--weights", "a/float.safetensors", "--layer-bits", "head=2", "--out", "b"
    )
    rows = json.loads((tmp_path / "b" / "report.json").read_text())["layers"]
    assert {row["name"]: row["weight_bits"] for row in rows} == {"conv": 4, "head": 2}
    assert value(summary, "test accuracy", "float32") > 50
    save_file({"conv.weight": torch.zeros(6, 1, 3, 3)}, tmp_path / "part.safetensors")
    message = wrong("train", "d.npz", *options, "--weights", "part.safetensors", "--out", "c")
    assert "part.safetensors" in message
    assert "head.weight" in message


def test_bits_are_learned_within_a_budget(done, tmp_path):
    options = ("--arch", "mlp:16,16", "--limit", 400, "--float-epochs", 5, "--epochs", 5)
    summary = done("train", "digits", *options, "--target-bytes", 450, "--out", "r")
    layers = json.loads((tmp_path / "r" / "report.json").read_text())["layers"]
    assert sum(row["bytes"] for row in layers) <= 450
    assert 2 <= value(summary, "average bits") < 4
    # The run is read again as it was left, with its bits frozen.
    measured = done("evaluate", "r", "--out", "e")
    assert value(measured, "accuracy", "as trained") == value(summary, "test accuracy", "srq")
    done("export", "r", "--truncate", 2, "--out", "x")
    sizes = inspect_packed(tmp_path / "x" / "model.srq.safetensors")
    codes = {row.name: row.bytes for row in sizes.rows if row.name.endswith(".codes")}
    assert sorted(codes.values()) == sorted([-(-64 * 16 // 4), -(-16 * 16 // 4), -(-160 // 4)])


def test_an_interrupted_training_goes_on_where_it_was(done, call, tmp_path, monkeypatch):
    options = ("train", "digits", "--arch", "mlp:8", "--limit", 200, "--float-epochs", 3, "--epochs", 4, "--seed", 5)
    whole = done(*options, "--out", "whole")
    from srq_dropbits import pipeline

    for stop_at in (2, 5):
        seen: list[str] = []
        note = pipeline._note

        def stopping(phase: str, record, *, seen=seen, stop_at=stop_at, note=note) -> str:
            seen.append(phase)
            if len(seen) == stop_at:
                raise KeyboardInterrupt
            return note(phase, record)

        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "_note", stopping)
            stopped = call(*options, "--out", f"part{stop_at}")
        assert stopped.returncode == 130
        assert f"--resume --out part{stop_at}" in stopped.stderr
        again = done("train", "--resume", "--out", f"part{stop_at}")
        assert [(r.metric, r.method, r.mean) for r in again.results] == [
            (r.metric, r.method, r.mean) for r in whole.results
        ]
        assert torch.equal(
            load_file(tmp_path / "whole" / "float.safetensors")["1.weight"],
            load_file(tmp_path / f"part{stop_at}" / "float.safetensors")["1.weight"],
        )


@pytest.mark.parametrize(
    ("given", "methods"),
    [
        ("ptq,lsq,srq", ("ptq", "lsq", "srq")),
        ("ptq lsq srq", ("ptq", "lsq", "srq")),
        (
            "lsq, srq+dropbits:p_keep=0.8,per_channel=true, sr",
            ("lsq", "srq+dropbits:p_keep=0.8,per_channel=true", "sr"),
        ),
        ("srq:p_keep=0.8,mcste-input:p_keep=0.9", ("srq:p_keep=0.8", "mcste-input:p_keep=0.9")),
        (["srq:p_keep=0.8,sharing=endpoint", "ptq"], ("srq:p_keep=0.8,sharing=endpoint", "ptq")),
    ],
)
def test_methods_are_told_apart_from_their_settings(given, methods):
    assert CompareConfig(task="digits", methods=given).methods == methods


def test_compare_on_a_users_table_and_pictures_of_it(done, wine):
    summary = done(
        "compare", "wine.csv", "--methods", "ptq,srq", "--bits", "2/2,4/32", "--seeds", 2, "--rates", "0.001",
        "--epochs", 1, "--float-epochs", 2, "--out", "c",
    )  # fmt: skip
    assert {row.dataset for row in summary.results} == {"wine 2/2", "wine 4/32"}
    right = [row for row in summary.results if row.metric.endswith("accuracy")]
    assert {row.unit for row in right} == {"%"}
    assert all(20 < row.mean <= 100 for row in right)
    assert "ladder.png" in summary.artifacts
    swept = done(
        "sweep", "digits-mlp", "--uniform", "2", "--targets", "3", "--weighting", "layer", "--seeds", 1,
        "--epochs", 2, "--float-epochs", 2, "--rows", 200, "--out", "s",
    )  # fmt: skip
    assert {"pareto.png", "points.json"} <= set(swept.artifacts)


def test_workers_find_what_one_process_finds(done, wine, tmp_path):
    command = (
        "compare", "wine.csv", "--methods", "ptq srq", "--bits", "3/3", "--seeds", 2, "--rates", "0.001,0.003",
        "--epochs", 1, "--float-epochs", 2,
    )  # fmt: skip
    one, two = done(*command, "--out", "one"), done(*command, "--workers", 2, "--out", "two")
    rows = [[row.model_dump(exclude={"seconds"}) for row in found.results if row.unit != "s"] for found in (one, two)]
    assert rows[0] == rows[1]
    assert one.claims == two.claims
    assert (tmp_path / "one/grids.json").read_bytes() == (tmp_path / "two/grids.json").read_bytes()


def test_wrong_input_gets_one_line(wrong, wine, tmp_path):
    assert "weight_bits is 9" in wrong("train", "wine.csv", "--weight-bits", 9, "--out", "r")
    assert "2 to 8" in wrong("train", "wine.csv", "--weight-bits", 1, "--out", "r")
    assert "act_bits" in wrong("train", "wine.csv", "--act-bits", 12, "--out", "r")
    assert "did you mean 'lsq'" in wrong("train", "wine.csv", "--method", "lsqq", "--out", "r")
    assert "matches no layer" in wrong("train", "wine.csv", "--exclude", "nothing*", "--out", "r")
    message = wrong("train", "wine.csv", "--target-bytes", 10, "--out", "r")
    assert "target_bytes 10" in message
    assert "bytes" in message
    assert "--layer-bits" in wrong("train", "wine.csv", "--layer-bits", "1:3", "--out", "r")
    assert "--bits" in wrong("compare", "wine.csv", "--bits", "two", "--out", "r")
    assert "mlpp" in wrong("train", "wine.csv", "--arch", "mlpp:3", "--out", "r")
    assert "no_such_module" in wrong("train", "wine.csv", "--arch", "no_such_module:net", "--out", "r")
    (tmp_path / "text.csv").write_text("a,b,label\n1,2,0\n1,x,1\n")
    message = wrong("train", "text.csv", "--out", "r")
    assert "text.csv" in message
    assert "'x'" in message
    assert "digitz" in wrong("compare", "digitz", "--out", "r")
    assert "run folder" in wrong("evaluate", tmp_path, "--out", "r")
    save_file({"w": torch.zeros(2)}, tmp_path / "other.safetensors")
    assert "other.safetensors" in wrong("inspect", "other.safetensors", "--out", "r")


def test_estimators_are_diagnosed_alone_and_on_a_users_network(done, wrong, wine, tmp_path):
    options = ("--estimators", "lsq,mcste-zero,mode-soft", "--layers", 4)
    alone = done("diagnose", *options, "--bits", 2, "--out", "d1")
    assert alone.artifacts == ["estimators.png", "diagnosis.json"]
    # The zero cell is a third of a ternary grid.
    assert value(alone, "share without gradient", "mcste-zero") == pytest.approx(1 / 3, abs=0.01)
    assert value(alone, "cosine to the true gradient", "mode-soft") > value(
        alone, "cosine to the true gradient", "mcste-zero"
    )
    done("train", "wine.csv", "--arch", "mlp:8", "--weight-bits", 3, "--float-epochs", 5, "--epochs", 1, "--out", "run")
    found = done("diagnose", "run", *options, "--out", "d2")
    assert {row.dataset for row in found.results} == {
        "cells of 3 bits",
        "enumerated layers, 3 bits",
        "weights of wine.csv",
    }
    assert value(found, "cosine to the identity's gradient", "lsq") > value(
        found, "cosine to the identity's gradient", "mcste-zero"
    )
    assert "mode_sofd" in wrong("diagnose", "--estimators", "mode_sofd", "--out", "d3")


def test_damaged_runs_say_so(done, wrong, wine, tmp_path):
    done("train", "wine.csv", "--arch", "mlp:4", "--float-epochs", 1, "--epochs", 1, "--out", "run")
    path = tmp_path / "run" / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "model.safetensors" in wrong("evaluate", "run", "--out", "e")
    path.write_bytes(whole)
    assert "would be overwritten" in wrong("export", "run", "--format", "weights", "--out", "run")
    assert path.read_bytes() == whole
    (tmp_path / "run" / "model.json").write_text("{}")
    assert "model.json" in wrong("predict", "run", "wine.csv", "--out", "p")


def test_the_command_starts_without_torch():
    code = "import sys; import srq_dropbits.cli; print('torch' in sys.modules, 'matplotlib' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "False"]


def test_factories_of_models_are_what_the_command_line_names():
    assert build("digits-cnn", (1, 8, 8), 10)(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
