"""Interactive attention learning: verdicts on what a time-series model attends to, obeyed without a gradient step.

After Heo et al., "Cost-effective Interactive Attention Learning with Neural Attention Processes", ICML 2020.
"""

from typing import TYPE_CHECKING

from shared_core.lazy import attach

if TYPE_CHECKING:
    from ial_nap.context import Context as Context
    from ial_nap.context import Shift as Shift
    from ial_nap.series import Scaling as Scaling
    from ial_nap.series import Series as Series
    from ial_nap.series import make_series as make_series

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "context": ["Context", "Shift"],
        "series": ["Scaling", "Series", "make_series"],
    },
)
