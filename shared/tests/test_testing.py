"""The tests' own tools: they must be able to fail."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys

import pytest
from pydantic import Field

from shared_core.cli import CommandConfig, CommandLine, Outcome
from shared_core.errors import InputError
from shared_core.testing import Caller, Program, in_two_processes

line = CommandLine("shared-core", help="For tests.")


class Config(CommandConfig):
    """Settings."""

    fail: bool = Field(False, description="whether to refuse")


@line.command(Config)
def demo(config, session):
    """Do nothing."""
    if config.fail:
        raise InputError("a.csv: row 3: no")
    return Outcome()


@pytest.fixture
def call(tmp_path):
    return Caller(line, tmp_path)


def test_what_went_well_and_what_was_refused(call, tmp_path):
    assert call.done("demo", "--out", "run").command == "demo"
    assert (tmp_path / "run" / "summary.json").exists()
    assert "a.csv: row 3: no" in call.wrong("demo", "--fail")
    assert call("--help").returncode == 0


def test_the_wrong_end_is_seen(call):
    with pytest.raises(AssertionError, match=r"row 3"):
        call.done("demo", "--fail")
    with pytest.raises(AssertionError):
        call.wrong("demo")


PACKAGE = """
from jaxtyping import Float
from torch import Tensor
def first(x: Float[Tensor, "n 2"]) -> Float[Tensor, " n"]:
    return x[:, 0]
"""
CODE = """
import sys; sys.path.insert(0, ".")
import checked_package
from shared_core.testing import check_shapes
check_shapes(checked_package, leave_out=["left_out"])
import torch
from checked_package import left_out, shapes, plain
left_out.first(torch.ones(1, 3))
plain.first(torch.ones(1, 3))
try:
    shapes.first(torch.ones(1, 3))
except Exception as error:
    print(type(error).__name__)
"""


def test_shapes_are_checked_where_they_are_written(tmp_path):
    folder = tmp_path / "checked_package"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    for name in ("shapes", "left_out"):
        (folder / f"{name}.py").write_text(PACKAGE)
    (folder / "plain.py").write_text("def first(x: int): return x[:, 0]")
    done = subprocess.run([sys.executable, "-c", CODE], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "TypeCheckError", done.stderr


def test_a_program_is_a_process_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("HERE_AND_THERE", "yes")
    source = (
        "import os, sys; print(os.getcwd(), sys.argv[1:], os.environ['HERE_AND_THERE'], os.environ['MORE'], __name__)"
    )
    done = Program(source, 7, "a b", folder=tmp_path, environment={"MORE": "too"}).finish()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{tmp_path} ['7', 'a b'] yes too __main__\n"
    failed = Program(
        "import atexit, sys; atexit.register(print, 'bye'); print('no', file=sys.stderr); sys.exit(3)"
    ).finish()
    assert (failed.returncode, failed.stdout, failed.stderr) == (3, "bye\n", "no\n")
    wrong = Program("1 / 0").finish()
    assert wrong.returncode == 1
    assert "ZeroDivisionError" in wrong.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent otherwise there")
def test_a_program_may_be_interrupted_and_is_killed_when_it_takes_too_long():
    source = "import time; print('ready', flush=True); time.sleep(600)"
    program = Program(source)
    while program.said != "ready\n":
        assert program.status is None
    program.send(signal.SIGINT)
    done = program.finish()
    assert done.returncode == 1
    assert "KeyboardInterrupt" in done.stderr
    program.send(signal.SIGINT)
    with pytest.raises(TimeoutError, match=r"longer than 0\.5 s; it wrote .ready"):
        Program(source).finish(0.5)


def test_a_program_that_nobody_waits_for_is_killed():
    process = Program("import time; time.sleep(600)")._process
    gc.collect()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL


def test_where_one_of_two_processes_fails_the_other_does_not_wait_for_it(tmp_path):
    source = "import os, time\nif os.environ['RANK'] == '1': sys.exit('it was me')\ntime.sleep(600)"
    with pytest.raises(AssertionError, match="it was me"):
        in_two_processes(tmp_path, "import sys\n" + source)
    assert in_two_processes(tmp_path, "import os; print(os.environ['LOCAL_RANK'])").stdout == "0\n1\n"
