from __future__ import annotations

import os
import sys
from pathlib import Path

import jaxtyping
import pytest
import torch

import stamp

sys.path.insert(0, str(Path(__file__).parent))  # for zoo.py
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

# All but cli.py, whose annotations name things that only its commands import, and networks.py, whose forward passes
# run on the proxies of torch.fx.
modules = [
    path.stem
    for path in Path(next(iter(stamp.__path__))).glob("[!_]*")
    if (path.suffix == ".py" or path.is_dir()) and path.stem not in {"cli", "networks"}
]
jaxtyping.install_import_hook([f"stamp.{name}" for name in modules], typechecker="beartype.beartype")


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
