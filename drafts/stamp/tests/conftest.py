from __future__ import annotations

import os
import sys
from pathlib import Path

import jaxtyping
import pytest
import torch

here = Path(__file__).resolve().parent
sys.path[:0] = [str(here.parent / "src"), str(here)]

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

modules = [path.stem for path in (here.parent / "src" / "stamp").glob("*.py") if path.stem != "__init__"]
jaxtyping.install_import_hook([f"stamp.{name}" for name in modules], typechecker="beartype.beartype")


@pytest.fixture
def unchecked():
    """Switch run-time checks of annotations off: bad input must meet the function's own message."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
