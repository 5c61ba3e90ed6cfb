from __future__ import annotations

import jaxtyping
import pytest

jaxtyping.install_import_hook(
    ["shared_core.episodes", "shared_core.device", "shared_core.data"], typechecker="beartype.beartype"
)


@pytest.fixture
def unchecked():
    """Switch run-time checks of annotations off: bad input must meet the function's own message."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
