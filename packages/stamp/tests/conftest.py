from __future__ import annotations

import os
import sys
from pathlib import Path

import jaxtyping
import pytest
import torch

import stamp
import stamp.axes
import stamp.structure

sys.path.insert(0, str(Path(__file__).parent))  # for zoo.py
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

# Modules that have shapes in their signatures; the types of others, which pyright checks, are checked no better for the
# price of a call. Not networks.py, whose forward passes run on the proxies of torch.fx. The two that are asked most are
# imported above, before the hook: what is imported from inside a module with the hook comes from the hook's own cache,
# which may hold the module as another list of names once made it.
source = Path(next(iter(stamp.__path__)))
modules = [
    ".".join(path.relative_to(source).with_suffix("").parts)
    for path in source.rglob("*.py")
    if "from jaxtyping import" in path.read_text(encoding="utf-8") and path.stem != "networks"
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
