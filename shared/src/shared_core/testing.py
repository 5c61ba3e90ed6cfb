"""What the tests of all packages begin with: checked shapes, real data, and calls of a command line.

Needs pytest; nothing else of the core imports it. A package's ``tests/conftest.py`` is

    import ial_nap
    from shared_core.testing import check_shapes, data_folder as data_folder, unchecked as unchecked

    check_shapes(ial_nap)
"""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
from collections.abc import Collection, Generator
from pathlib import Path
from types import ModuleType

import jaxtyping
import pytest
import torch

from shared_core.cli import CommandLine
from shared_core.runs import Result, Summary

__all__ = ["Caller", "check_shapes", "data_folder", "figures", "unchecked"]


def check_shapes(package: ModuleType, *, leave_out: Collection[str] = ()) -> None:
    """Check shapes and types in calls of a package's functions from here on, and keep torch to one thread.

    Call it before anything else of the package is imported. Only modules that have shapes in their signatures are
    checked: for the types of others, which the type checker sees, every call would pay.

    Parameters
    ----------
    package : imported, with a lazy ``__init__``
    leave_out : modules that cannot be checked, such as ``networks`` where torch.fx calls forward passes with proxies
    """
    # Inherited by child processes: threads that only wait for each other make small models many times slower.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    root = Path(next(iter(package.__path__)))
    files = {".".join(path.relative_to(root).with_suffix("").parts): path for path in sorted(root.rglob("*.py"))}
    names = [
        f"{package.__name__}.{name.removesuffix('.__init__')}"
        for name, path in files.items()
        if name not in {"__init__", "cli", *leave_out} and "from jaxtyping import" in path.read_text(encoding="utf-8")
    ]
    jaxtyping.install_import_hook(names, typechecker="beartype.beartype")


@pytest.fixture
def unchecked() -> Generator[None]:
    """Switch run-time checks of shapes off: bad input must meet the function's own message."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Return the folder of real data sets, or skip and say how to get it."""
    folder = os.environ.get("SHARED_CORE_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("needs real data: set SHARED_CORE_DATA to a folder that holds the official files")
    return Path(folder)


def figures(summary: Summary) -> list[Result]:
    """Return the results of a run without their times: equal where two runs found the same.

    Parameters
    ----------
    summary : of the run
    """
    return [row.model_copy(update={"seconds": 0.0}) for row in summary.results]


class Caller:
    """Calls of a command line in this process, from one folder.

    Parameters
    ----------
    line : of a package
    folder : to call it from
    """

    def __init__(self, line: CommandLine, folder: Path) -> None:
        self.line, self.folder = line, folder

    def __call__(self, *args: object) -> subprocess.CompletedProcess[str]:
        """Call, and return exit status and output.

        Parameters
        ----------
        args : of the command line
        """
        out, err = io.StringIO(), io.StringIO()
        with (
            contextlib.chdir(self.folder),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as stop,
        ):
            self.line.main([str(arg) for arg in args])
        code = stop.value.code
        status = code if isinstance(code, int) else int(code is not None)
        return subprocess.CompletedProcess([str(arg) for arg in args], status, out.getvalue(), err.getvalue())

    def done(self, *args: object) -> Summary:
        """Call with ``--json``, see that it went well, and return what it printed.

        Parameters
        ----------
        args : of the command line
        """
        result = self(*args, "--json")
        assert result.returncode == 0, result.stderr
        return Summary.model_validate_json(result.stdout)

    def wrong(self, *args: object) -> str:
        """Call, see that the input was refused with one line and nothing else, and return that line.

        Parameters
        ----------
        args : of the command line
        """
        result = self(*args)
        assert result.returncode == 2, (result.stdout, result.stderr)
        assert result.stdout == ""
        assert len(result.stderr.strip().splitlines()) == 1, result.stderr
        return result.stderr
