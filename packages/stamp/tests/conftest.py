from __future__ import annotations

import sys
from pathlib import Path

import stamp

# The two that are asked most are imported before the hook: what is imported from inside a module with the hook comes
# from the hook's own cache, which may hold the module as another list of names once made it.
import stamp.axes
import stamp.structure
from shared_core.testing import check_shapes
from shared_core.testing import data_folder as data_folder
from shared_core.testing import unchecked as unchecked

sys.path.insert(0, str(Path(__file__).parent))  # for zoo.py
# Not networks, whose forward passes run on the proxies of torch.fx.
check_shapes(stamp, leave_out=["axes", "networks", "structure"])
