from __future__ import annotations

import sparsity_norm
from shared_core.testing import check_shapes
from shared_core.testing import data_folder as data_folder
from shared_core.testing import unchecked as unchecked

check_shapes(sparsity_norm)
