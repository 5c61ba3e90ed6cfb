"""The grammar, tried on a tiny package of this test's own, in a process of its own."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from shared_core.cli import CommandConfig, CommandLine, Outcome, argument
from shared_core.runs import Run, Summary
from shared_core.testing import Caller, in_two_processes

TOY = textwrap.dedent('''
    import os, signal, time
    from pathlib import Path
    from typing import Literal
    from pydantic import Field
    from shared_core.cli import CommandConfig, CommandLine, Outcome, argument
    from shared_core.errors import InputError
    from shared_core.runs import Claim, summarize

    line = CommandLine("shared-core", help="A toy.")

    class FitConfig(CommandConfig):
        table: Path = argument("the table")
        epochs: int = Field(3, ge=1, description="passes")
        rate: float = Field(0.5, gt=0, description="step size")
        arms: tuple[str, ...] = Field(("a", "b"), description="methods")
        mode: Literal["user", "item"] = Field("user", description="who is an instance")
        fast: bool = Field(False, description="hurry")
        interrupt_at: int | None = Field(None, description="send SIGINT after this epoch")

    @line.command(FitConfig)
    def fit(config, session):
        """Fit a toy."""
        if config.table.name == "bad.csv":
            raise InputError("bad.csv:3: expected a number,\\n got 'x'; correct the row")
        if config.table.name == "ours.csv":
            raise RuntimeError("a fault of ours")
        config.table.read_text()
        state = session.run.load_checkpoint() or {"epoch": 0, "total": 0.0}
        with session.progress("fit", config.epochs, state["epoch"]) as advance:
            for epoch in range(state["epoch"], config.epochs):
                state = {"epoch": epoch + 1, "total": state["total"] + config.rate * (epoch + 1)}
                session.run.log(epoch=epoch, total=state["total"])
                session.run.save_checkpoint(state)
                advance(note="x")
                if config.interrupt_at == epoch and not session.resumed:
                    os.kill(os.getpid(), signal.SIGINT)
                    time.sleep(10)
        print("a library that prints")
        session.run.artifact("model.txt").write_text("m")
        total = {"dataset": "toy", "metric": "total", "better": "lower", "unit": "[odd] rating"}
        rows = [summarize([state["total"]], method=arm, **total) for arm in config.arms]
        return Outcome(rows, [Claim(text="it adds", source="here", holds=True, value=1.0, threshold=0.5)], ["a note"])

    if __name__ == "__main__":
        line.main()
''')


@pytest.fixture
def toy(tmp_path, monkeypatch, capsys):
    (tmp_path / "toy.py").write_text(TOY)
    (tmp_path / "t.csv").write_text("1\n")
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path("toy.py")

    def run(*args: object) -> subprocess.CompletedProcess[str]:
        command = [str(arg) for arg in args]
        with pytest.raises(SystemExit) as stop:
            names["line"].main(command)
        printed = capsys.readouterr()
        return subprocess.CompletedProcess(command, stop.value.code, printed.out, printed.err)

    return run


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, done
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_help_and_version_and_bare_call(toy):
    assert "Fit a toy" in toy("--help").stdout
    assert "shared-core 0.1.0" in toy("--version").stdout
    assert "shared-core 0.1.0" in toy("fit", "--version").stdout
    bare = toy()
    assert bare.returncode == 0
    assert "Fit a toy" in bare.stdout
    shown = toy("fit", "--help").stdout
    for text in ("--epochs", "--fast", "--no-fast", "user|item", "[default: 0.5]", "--resume", "TABLE"):
        assert text in shown


def test_help_names_a_default_only_where_there_is_one(tmp_path):
    line = CommandLine("shared-core", help="Two commands.")

    class Config(CommandConfig):
        source: str | None = argument("a file", None)
        kind: str = argument("its kind", "table")

    line.command(Config, name="first")(lambda config, session: Outcome())
    line.command(CommandConfig, name="second")(lambda config, session: Outcome())
    shown = Caller(line, tmp_path)("first", "--help").stdout
    assert "[default: table]" in shown
    assert "None" not in shown


def test_json_is_one_document_of_the_schema_and_the_file_is_the_same(toy, tmp_path):
    done = toy("fit", "t.csv", "--json", "--out", "r", "--epochs", 2)
    assert done.returncode == 0, done.stderr
    summary = Summary.model_validate_json(done.stdout)
    assert summary == Summary.model_validate_json((tmp_path / "r/summary.json").read_text())
    assert [row.mean for row in summary.results] == [1.5, 1.5]
    assert summary.artifacts == ["model.txt"]
    assert summary.config["epochs"] == 2
    assert "a library that prints" in done.stderr
    assert {"config.json", "environment.json", "metrics.jsonl", "model.txt", "summary.json"} == {
        path.name for path in (tmp_path / "r").iterdir()
    }


def test_quiet_prints_nothing_and_the_table_prints_something(toy):
    assert toy("fit", "t.csv", "--out", "q", "--quiet").stderr == ""
    shown = toy("fit", "t.csv", "--out", "q2").stdout
    for text in ("total [[odd] rating] (lower is better)", "it adds", "a note", "run folder: q2", "model.txt"):
        assert text in shown


def test_print_config_goes_back_in_as_a_config_file(toy, tmp_path):
    text = toy("fit", "t.csv", "--print-config", "--rate", 0.25, "--arms", "x, y").stdout
    (tmp_path / "c.toml").write_text(text)
    assert toy("fit", "--config", "c.toml", "--print-config").stdout == text
    summary = json.loads(toy("fit", "--config", "c.toml", "--json", "--out", "o", "--epochs", 1).stdout)
    assert summary["config"]["rate"] == 0.25
    assert summary["config"]["arms"] == ["x", "y"]
    assert summary["config"]["epochs"] == 1
    everything = toy("--print-config").stdout
    (tmp_path / "all.toml").write_text(everything.replace("# table =", 'table = "t.csv"'))
    assert toy("fit", "--config", "all.toml", "--out", "p").returncode == 0


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["fit"], "TABLE is missing"),
        (["fit", "t.csv", "--epochs", "many"], "--epochs: Input should be a valid integer"),
        (["fit", "t.csv", "--epochs", "0"], "greater than or equal to 1, got '0'"),
        (["fit", "t.csv", "--rate", "nan"], "--rate"),
        (["fit", "t.csv", "--mode", "cat"], "'user' or 'item', got 'cat'"),
        (["fit", "t.csv", "--device", "abacus"], "unknown device 'abacus'"),
        (["fit", "t.csv", "--device", "cuda:99"], "is not on this machine"),
        (["fit", "t.csv", "--nonsense"], "--nonsense"),
        (["fi", "t.csv"], "fi"),
        (["fit", "none.csv"], "none.csv: No such file"),
        (["fit", "."], "directory"),
        (["fit", "bad.csv"], "bad.csv:3: expected a number, got 'x'; correct the row"),
        (["fit", "t.csv", "--out", "toy.py"], "choose another folder with --out"),
        (["fit", "t.csv", "--out", "/dev/null/x"], "cannot write"),
        (["fit", "t.csv", "--config", "none.toml"], "none.toml"),
        (["fit", "t.csv", "--config", "."], "--config"),
        (["fit", "--resume"], "no interrupted run"),
        (["fit", "--resume", "--out", "nowhere"], "nothing to resume in nowhere"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(toy, args, expected):
    assert expected in one_line(toy(*args))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"epoch = 3\n", "unknown key 'epoch'; did you mean 'epochs'?"),
        (b"epochs = 'many'\n", "bad.toml: key 'epochs'"),
        (b"epochs = \n", "not valid TOML"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"[fit]\nzzz = 1\n", "unknown key 'zzz'"),
    ],
)
def test_wrong_config_files(toy, tmp_path, content, expected):
    (tmp_path / "bad.toml").write_bytes(content)
    assert expected in one_line(toy("fit", "t.csv", "--config", "bad.toml"))


def test_our_own_fault_is_status_1_with_the_traceback(toy, tmp_path):
    command = [sys.executable, "toy.py", "fit", "ours.csv"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "a fault of ours" in done.stderr


def test_interrupted_run_resumes_to_the_same_result(toy, tmp_path):
    whole = json.loads(toy("fit", "t.csv", "--epochs", 5, "--out", "whole", "--json").stdout)
    args = ("fit", "t.csv", "--epochs", 5, "--interrupt-at", 2, "--out", "part")
    stopped = toy(*args)
    assert stopped.returncode == 130
    assert "shared-core fit --resume --out part" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert Run.interrupted(tmp_path / "part")
    assert "--resume" in one_line(toy(*args))
    assert "it was started with epochs = 5, now it is 6" in one_line(
        toy("fit", "--resume", "--out", "part", "--epochs", 6)
    )
    resumed = toy("fit", "--resume", "--out", "part", "--json")
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout)["results"] == whole["results"]
    assert (tmp_path / "part/metrics.jsonl").read_text() == (tmp_path / "whole/metrics.jsonl").read_text()
    assert not (tmp_path / "part/checkpoint.safetensors").exists()
    assert toy(*args[:-1], "again", "--overwrite").returncode == 130


def test_sigint_from_outside_before_anything_was_written(tmp_path):
    (tmp_path / "toy.py").write_text(TOY.replace("import os, signal, time", "import os, signal, time\nopen('up','w')"))
    os.mkfifo(tmp_path / "pipe.csv")
    process = subprocess.Popen(
        [sys.executable, "toy.py", "fit", "pipe.csv"], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    while not (tmp_path / "runs").exists():
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors


def test_two_processes_share_one_run_folder(tmp_path):
    (tmp_path / "t.csv").write_text("1\n")
    done = in_two_processes(tmp_path, TOY, "fit", "t.csv", "--out", "r", "--json", "--device", "cpu", torchrun=True)
    summary = Summary.model_validate_json(done.stdout)
    assert summary.results[0].mean == 3.0
    assert len((tmp_path / "r/metrics.jsonl").read_text().splitlines()) == 3
    assert Path(tmp_path / "r/summary.json").exists()
