"""The tests' own tools: they must be able to fail."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import Field

from shared_core.cli import CommandConfig, CommandLine, Outcome
from shared_core.errors import InputError
from shared_core.testing import Caller

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
