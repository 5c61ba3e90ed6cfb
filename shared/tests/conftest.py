from __future__ import annotations

import os

import jaxtyping
import pytest
import torch

# Inherited by child processes: with threads that only wait for each other, networks as small as the tests' train many
# times slower on busy cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

jaxtyping.install_import_hook(
    [
        *("shared_core.episodes", "shared_core.device", "shared_core.data", "shared_core.tables"),
        *("shared_core.classes", "shared_core._pictures", "shared_core._hershey", "shared_core.plots"),
    ],
    typechecker="beartype.beartype",
)


@pytest.fixture
def unchecked():
    """Switch run-time checks of annotations off: bad input must meet the function's own message."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
