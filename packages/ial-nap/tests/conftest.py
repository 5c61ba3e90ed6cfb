from __future__ import annotations

import sys
from pathlib import Path

import ial_nap
from shared_core.testing import check_shapes
from shared_core.testing import data_folder as data_folder
from shared_core.testing import unchecked as unchecked

sys.path.insert(0, str(Path(__file__).parent))  # for the helper modules

# web.model asks for estimators by protocols that cannot be checked at run time.
check_shapes(ial_nap, leave_out=["web.model"])
