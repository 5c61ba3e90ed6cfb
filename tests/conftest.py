"""Runs every test with a `package` argument for each package; `--package NAME` narrows that to one."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from contract import ALL, Package

# Inherited by child processes: with threads that only wait for each other, networks as small as the tests' train many
# times slower on busy cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--package", help="put only this package through the cross-package tests")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    only = metafunc.config.getoption("--package")
    packages = [package for package in ALL if only in (None, package.name)]
    if "bad_input" in metafunc.fixturenames:
        commands = [(package, command) for package in packages for command in package.contract["inputs"]]
        metafunc.parametrize(
            ("package", "bad_input"), commands, ids=[f"{package.name}: {command}" for package, command in commands]
        )
    elif "reading" in metafunc.fixturenames:
        commands = [(package, command) for package in packages for command in package.contract["damage"]["read"]]
        metafunc.parametrize(
            ("package", "reading"), commands, ids=[f"{package.name}: {command}" for package, command in commands]
        )
    elif "package" in metafunc.fixturenames:
        metafunc.parametrize("package", packages, ids=lambda package: package.name)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Call a package's command line in this process, from an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(package: Package, *args: object) -> subprocess.CompletedProcess[str]:
        command: Sequence[str] = [str(arg) for arg in args]
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            package.line().main(command)
        printed = capsys.readouterr()
        return subprocess.CompletedProcess(command, stop.value.code, printed.out, printed.err)

    return run
