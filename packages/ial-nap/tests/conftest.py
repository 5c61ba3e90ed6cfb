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

modules = [path.stem for path in (source / "ial_nap").glob("*.py") if path.stem not in {"__init__", "cli"}]
jaxtyping.install_import_hook([f"ial_nap.{name}" for name in modules], typechecker="beartype.beartype")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "claims: what the paper claims, measured over several seeds (minutes)")


@pytest.fixture
def unchecked():
    """Switch run-time checks of annotations off: bad input must meet the function's own message."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
