"""The command line on one's own files: what goes in, what comes out, what is said when it is wrong."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from fedapc.cli import line
from fedapc.federation import Federation
from fedapc.ledger import Ledger
from fedapc.messages import Message, Section, pack
from fedapc.networks import mlp
from fedapc.report import Report
from fedapc.sparse import SparseTensor
from fedapc.wire import encode, encode_sparse
from shared_core.runs import Summary
from shared_core.testing import Caller, Program

FAST = ("--rounds", 2, "--epochs", 1, "--batch-size", 20, "--lr", 9e-4, "--device", "cpu")
SMALL = ("--clients", 2, "--tasks", 2, "--rounds", 1, "--epochs", 1, "--per-class", 5, "--device", "cpu")


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Leave drawing to tests of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, path, **options: Path(path).write_bytes(b"a picture"))
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """The folder that everything happens in; tests write under names of their own."""
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def call(home) -> Caller:
    return Caller(line, home)


@pytest.fixture(scope="module")
def done(call):
    return call.done


@pytest.fixture(scope="module")
def fitted(done) -> Summary:
    done("example", "data", "--out", "e")
    return done("fit", "data/tasks.toml", *FAST, "--out", "run")


def test_fit_leaves_all_that_the_others_need(fitted, home):
    assert set(fitted.artifacts) == {
        "federation.safetensors", "federation.json", "report.json", "ledger.jsonl", "ledger.csv", "accuracy.npz",
        "matrix.png", "memory.png", "attention.png", "ledger.png",
    }  # fmt: skip
    report = Report.load(home / "run")
    found = {(row.dataset, row.metric): row.mean for row in fitted.results}
    assert found["tasks", "accuracy"] == pytest.approx(100 * report.accuracy)
    assert found["tasks, siteB", "accuracy on low"] == pytest.approx(100 * report.matrix[1, 1, 1])
    assert found["tasks", "sent up"] == pytest.approx(report.ledger.total(direction="up") / 1e6)
    with np.load(home / "run/accuracy.npz") as arrays:
        np.testing.assert_array_equal(arrays["accuracy"], report.matrix)
        assert arrays["clients"].tolist() == ["siteA", "siteB"]
    rows = list(csv.DictReader((home / "run/ledger.csv").open()))
    assert sum(int(row["encoded_bytes"]) for row in rows) == report.ledger.total()
    logged = [json.loads(text) for text in (home / "run/metrics.jsonl").read_text().splitlines()]
    assert [entry["round"] for entry in logged] == [1, 2, 3, 4]
    assert [entry["accuracy"] is None for entry in logged] == [True, False, True, False]


FRESH = """
import sys, fedapc, fedapc.flower
fedapc.flower.write_project
assert "flwr" not in sys.modules
sys.modules["flwr"] = None
uses = {
    "client_app": [print], "server_app": [print], "FedAPCStrategy": [None], "LocalGrid": [None, []],
    "make_certificates": ["nowhere"],
}
for name, arguments in uses.items():
    try:
        getattr(fedapc.flower, name)(*arguments)
    except ValueError as error:
        assert str(error).endswith("pip install 'fedapc[flower]'"), error
    else:
        raise AssertionError(name)
from fedapc.cli import main
main()
"""


def test_a_fresh_process_evaluates_and_flower_is_missed_only_when_it_is_used(fitted, home):
    result = Program(FRESH, "evaluate", "run", "--out", "ev", "--json", folder=home).finish()
    assert result.returncode == 0, result.stderr
    found = {(r["dataset"], r["metric"]): r["mean"] for r in json.loads(result.stdout)["results"]}
    report = Report.load(home / "run")
    for place, client in enumerate(report.clients):
        for number, task in enumerate(report.tasks[client]):
            expected = 100 * report.matrix[place, -1, number]
            assert found[client, f"accuracy on {task}"] == pytest.approx(expected)


@pytest.mark.usefixtures("unchecked")
def test_predict_in_the_users_labels(fitted, call, home):
    header, *rows = (home / "data/parity.csv").read_text().splitlines()
    columns = header.split(",")[:-1]
    (home / "asked.csv").write_text("\n".join([",".join(columns), *(row.rpartition(",")[0] for row in rows[:7])]))
    result = call("predict", "run", "--client", "siteB", "--task", 1, "--input", "asked.csv", "--out", "p")
    assert result.returncode == 0, result.stderr
    answers = list(csv.DictReader((home / "p/predictions.csv").open()))
    assert len(answers) == 7
    for answer in answers:
        shares = {label: float(answer[f"p({label})"]) for label in ("even", "odd")}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
        assert answer["label"] == max(shares, key=shares.__getitem__)
    assert call(
        "predict", "run", "--client", "siteB", "--task", 1, "--input", "asked.csv", "--output", "mine.csv", "--out", "q"
    ).returncode == 0  # fmt: skip
    assert (home / "mine.csv").read_text() == (home / "p/predictions.csv").read_text()
    for client, task, file, word in (
        ("nobody", 1, "asked.csv", "siteA, siteB"),
        ("siteB", 3, "asked.csv", "2 tasks"),
        ("siteA", 1, "asked.csv", "asked.csv"),
        ("siteA", 1, "none.npz", "none.npz"),
    ):
        assert word in call.wrong("predict", "run", "--client", client, "--task", task, "--input", file, "--out", "r")


def test_export_loads_without_the_package(fitted, call, home):
    from safetensors.torch import load_file

    assert call("export", "run", "--client", "siteA", "--task", 2, "--out", "x").returncode == 0
    weights = load_file(home / "x/model.safetensors")
    net = mlp(64, classes=5)
    net.load_state_dict(weights)
    federation = Federation.open(home / "run/federation.safetensors", mlp(64))
    x = torch.randn(6, 64)
    torch.testing.assert_close(net(x), federation.predict("siteA", x, 1))
    assert ".safetensors" in call.wrong(
        "export", "run", "--client", "siteA", "--task", 1, "--output", "m.pt", "--out", "y"
    )


def test_export_to_onnx(fitted, call, home):
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra: pip install 'fedapc[onnx]'")
    pytest.importorskip("onnxscript")
    assert call(
        "export", "run", "--client", "siteA", "--task", 1, "--output", "m.onnx", "--out", "z"
    ).returncode == 0  # fmt: skip
    federation = Federation.open(home / "run/federation.safetensors", mlp(64))
    x = torch.randn(3, 64)
    found = runtime.InferenceSession(str(home / "m.onnx")).run(None, {"inputs": x.numpy()})[0]
    np.testing.assert_allclose(found, federation.predict("siteA", x, 0).numpy(), atol=1e-5)


def test_ledger_sums(fitted, done, call, home):
    report = Report.load(home / "run")
    summary = done("ledger", "run", "--by", "client,direction", "--amount", "payload-bytes", "--out", "l")
    found = {row.dataset: row.mean for row in summary.results}
    sums = report.ledger.sums("client", "direction", amount="payload_bytes")
    assert found == {", ".join(key): value for key, value in sums.items()}
    said = call.wrong("ledger", "run", "--by", "weather", "--out", "m")
    assert "weather" in said
    assert "direction" in said


def test_plot_again(fitted, done):
    assert set(done("plot", "run", "--out", "again").artifacts) == {
        "matrix.png", "memory.png", "attention.png", "ledger.png"
    }  # fmt: skip


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("method", ["fedapc", "fedcurv"])
def test_an_interrupted_fit_resumes_to_the_same_bytes(method, done, call, home, fitted, monkeypatch):
    from shared_core.runs import Run

    whole = "run"
    if method != "fedapc":
        whole = f"whole-{method}"
        done("fit", "data/tasks.toml", *FAST, "--method", method, "--out", whole)
    original = Run.log

    def stop(self, **metrics):
        original(self, **metrics)
        if metrics.get("round") == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", stop)
        stopped = call("fit", "data/tasks.toml", *FAST, "--method", method, "--out", f"again-{method}")
    assert stopped.returncode == 130
    assert "--resume" in stopped.stderr
    assert call("fit", "--resume", "--out", f"again-{method}").returncode == 0
    for name in ("federation.safetensors", "ledger.jsonl", "accuracy.npz"):
        assert (home / f"again-{method}" / name).read_bytes() == (home / whole / name).read_bytes(), name
    logged = [json.loads(text) for text in (home / f"again-{method}/metrics.jsonl").read_text().splitlines()]
    assert [entry["round"] for entry in logged] == [1, 2, 3, 4]


@pytest.mark.usefixtures("unchecked")
def test_presets_and_settings_reach_the_federation(fitted, done, home):
    done("fit", "data/tasks.toml", *FAST, "--preset", "reference", "--sparsity", 2e-3, "--out", "ref")
    settings = json.loads((home / "ref/federation.json").read_text())["settings"]
    assert (settings["upload_fraction"], settings["kb_policy"], settings["sparsity"]) == (0.7, "last+self", 2e-3)
    assert json.loads((home / "run/federation.json").read_text())["settings"]["kb_policy"] == "last"


def test_wrong_settings_of_fit(fitted, call, home):
    said = call.wrong("fit", "data/tasks.toml", "--method", "magic", "--out", "w1")
    assert "magic" in said
    assert "fedavg" in said
    assert "sample:K" in call.wrong("fit", "data/tasks.toml", "--kb-policy", "most", "--out", "w2")
    assert "nothing" in call.wrong("fit", "data/tasks.toml", "--network", "nothing", "--out", "w3")
    assert "--upload-fraction" in call.wrong("fit", "data/tasks.toml", "--upload-fraction", "0", "--out", "w4")
    (home / "bad.toml").write_text('network = "mlp"\n[clients.a]\ntasks = ["nowhere.npz"]\n')
    assert "nowhere.npz" in call.wrong("fit", "bad.toml", "--out", "w5")
    assert "federation.safetensors" in call.wrong("evaluate", "data", "--out", "w6")


@pytest.mark.usefixtures("unchecked")
def test_fit_takes_the_users_own_network(fitted, call, home):
    (home / "mine.py").write_text(
        "from torch import nn\n\n\ndef make(input_shape, classes):\n"
        "    return nn.Sequential(nn.Linear(input_shape[0], 9), nn.Tanh(), nn.Linear(9, classes))\n"
    )
    assert call("fit", "data/tasks.toml", *FAST, "--network", "mine.py:make", "--out", "own").returncode == 0
    found = call("evaluate", "own", "--out", "own2", "--json")
    assert found.returncode == 0, found.stderr


def test_demo_and_compare(done, home):
    shown = done("demo", *SMALL, "--methods", "fedavg,fedapc", "--out", "demo")
    assert {"comparison.png", "bytes.png", "memory.png", "cells.json"} == set(shown.artifacts)
    assert {row.method for row in shown.results} == {"fedavg", "fedapc"}
    assert any("FedAvg's bytes" in claim.text for claim in shown.claims)
    tuned = done("compare", "gaussian", *SMALL, "--methods", "fedprox,finetune", "--seeds", 2, "--tune", "--trials", 2,
                 "--out", "tuned")  # fmt: skip
    cells = json.loads((home / "tuned/cells.json").read_text())
    assert set(cells) == {"fedprox", "finetune"}
    assert all(set(cell["setting"]) >= {"lr", "accuracy"} for cell in cells["fedprox"].values())
    rows = {(row.method, row.metric): row for row in tuned.results}
    assert rows["finetune", "sent up"].mean == 0
    assert rows["fedprox", "accuracy"].n == 2
    assert rows["fedprox", "accuracy"].low is not None


@pytest.mark.usefixtures("unchecked")
def test_workers_find_what_one_process_finds(done):
    command = ("compare", "gaussian", *SMALL, "--methods", "fedprox,fedapc", "--seeds", 2, "--tune", "--trials", 2)
    one, two = done(*command, "--out", "one"), done(*command, "--workers", 2, "--out", "two")
    rows = [[row.model_dump(exclude={"seconds"}) for row in found.results] for found in (one, two)]
    assert rows[0] == rows[1]
    assert one.claims == two.claims


@pytest.mark.usefixtures("unchecked")
def test_an_interrupted_comparison_repeats_nothing(done, call, home, monkeypatch):
    import fedapc.experiments as module

    arguments = ("compare", "gaussian", *SMALL, "--methods", "finetune,fedavg", "--seeds", 2)
    whole = done(*arguments, "--out", "c1")
    original, ran = module.run, []

    def stop(method, *args, **options):
        ran.append(method)
        if len(ran) == 3:
            raise KeyboardInterrupt
        return original(method, *args, **options)

    monkeypatch.setattr(module, "run", stop)
    assert call(*arguments, "--out", "c2").returncode == 130
    again = done("compare", "--resume", "--out", "c2")
    assert len(ran) == 2 + 1 + 2
    assert [(r.method, r.metric, r.mean) for r in again.results] == [
        (r.method, r.metric, r.mean) for r in whole.results
    ]


@pytest.mark.usefixtures("unchecked")
def test_ablate(done):
    shown = done("ablate", "gaussian", *SMALL, "--seeds", 1, "--out", "a")
    assert {row.method for row in shown.results} >= {"fedapc", "fedapc-mean", "fedapc-no-kb", "fedweit"}


def test_transfer(done):
    found = done("transfer", "digits", "--donor", 8, "--receiver", 2, "--distractors", 1, "--seeds", 1, "--rounds", 1,
                 "--epochs", 1, "--out", "t")  # fmt: skip
    methods = {row.method for row in found.results if row.metric == "accuracy of the receiver"}
    assert methods == {f"{kind}, {how}" for kind in ("related", "unrelated") for how in ("none", "mean", "learned")}
    assert len(found.claims) == 3


def test_transfer_wants_enough_examples(call):
    assert "digits" in call.wrong("transfer", "digits", "--donor", 5000, "--seeds", 1, "--out", "t2")


def test_inspect_wire(call, home):
    part = torch.zeros(4, 5)
    part[1, 2] = 3.0
    (home / "tensor.fapc").write_bytes(encode_sparse(SparseTensor.of(part)))
    message = Message(
        "update", "siteA", 3, 1, 0xABC, examples=17, sections=(Section("base", "siteA", 1, (encode(part),)),)
    )
    (home / "message.fapc").write_bytes(pack(message))
    shown = call("inspect-wire", "tensor.fapc", "--out", "i1").stdout
    assert "(4, 5) of float32, codec gaps, 1 of 20 numbers" in shown
    shown = call("inspect-wire", "message.fapc", "--out", "i2").stdout
    for word in ("update", "'siteA'", "round 3", "17 examples", "00000abc", "base of client 'siteA'", "(4, 5)"):
        assert word in shown
    blob = bytearray(pack(message))
    blob[-1] ^= 1
    (home / "broken.fapc").write_bytes(blob)
    said = call.wrong("inspect-wire", "broken.fapc", "--out", "i3")
    assert "broken.fapc" in said
    assert "checksum" in said


def test_flower_app_is_written(call, home):
    assert call("flower-app", "project", "--clients", 2, "--tasks", 2, "--out", "f").returncode == 0
    assert (home / "project/pyproject.toml").exists()
    assert "project" in call.wrong("flower-app", "project", "--out", "f2")
    assert "nothing" in call.wrong("flower-app", "other", "--data", "nothing", "--out", "f3")


def test_example_is_not_written_twice(fitted, call):
    assert "tasks.toml" in call.wrong("example", "data", "--out", "e2")


def test_the_ledger_is_what_was_sent(fitted, home):
    text = (home / "run/ledger.jsonl").read_text()
    assert Ledger.from_jsonl(text).to_jsonl() == text
