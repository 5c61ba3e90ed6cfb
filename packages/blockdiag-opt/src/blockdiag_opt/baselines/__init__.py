"""What the paper compares to and torch does not have: full-matrix GGT, and the elementwise bounds of AdaBound.

SGD, Adam, AdamW, RMSprop and Adagrad are torch's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shared_core.lazy import attach

if TYPE_CHECKING:
    from blockdiag_opt.baselines.adabound import AdaBound as AdaBound
    from blockdiag_opt.baselines.adabound import AMSBound as AMSBound
    from blockdiag_opt.baselines.ggt import GGT as GGT

__getattr__, __dir__, __all__ = attach(__name__, {"adabound": ["AMSBound", "AdaBound"], "ggt": ["GGT"]})
