from __future__ import annotations

import sys
from pathlib import Path

import fedapc
from shared_core.testing import check_shapes
from shared_core.testing import data_folder as data_folder
from shared_core.testing import unchecked as unchecked

sys.path.insert(0, str(Path(__file__).parent))  # for networks.py
check_shapes(fedapc)
