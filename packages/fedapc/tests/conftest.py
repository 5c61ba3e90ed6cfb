from __future__ import annotations

import os
import sys
from pathlib import Path

import jaxtyping
import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
source = Path(__file__).parent.parent / "src"
sys.path[:0] = [str(source), str(Path(__file__).parent)]

modules = [path.stem for path in (source / "fedapc").glob("*.py") if path.stem not in {"__init__", "cli"}]
modules.append("baselines")
jaxtyping.install_import_hook([f"fedapc.{name}" for name in modules], typechecker="beartype.beartype")


@pytest.fixture
def unchecked():
    """Switch run-time checks of annotations off: bad input must meet the function's own message."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real data sets, or a skip that says how to get it."""
    folder = os.environ.get("SHARED_CORE_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("needs real data: set SHARED_CORE_DATA to a folder that holds the official files")
    return Path(folder)
