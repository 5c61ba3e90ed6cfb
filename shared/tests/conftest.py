from __future__ import annotations

import os

import jaxtyping
import torch
from hypothesis import settings

from shared_core.testing import unchecked as unchecked

# Inherited by child processes: with threads that only wait for each other, networks as small as the tests' train many
# times slower on busy cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
# A busy machine is no fault of what is tested.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

jaxtyping.install_import_hook(
    [
        *("shared_core.episodes", "shared_core.device", "shared_core.data", "shared_core.tables"),
        *("shared_core.classes", "shared_core._pictures", "shared_core._hershey", "shared_core.plots"),
    ],
    typechecker="beartype.beartype",
)
