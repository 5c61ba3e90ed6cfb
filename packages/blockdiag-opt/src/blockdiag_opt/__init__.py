"""Drop-in torch optimizers that see correlations inside a group of weights.

Yun, Lozano and Yang, "Stochastic Gradient Methods with Block Diagonal Matrix Adaptation", arXiv:1905.10757 (AdaBlock,
AISTATS 2022): a dense second-moment matrix for every small block of weights, its inverse root in place of Adam's
division, and spectrum clipping, which lets training end as SGD. ``BlockAdam(model.parameters(), lr=1e-2)`` replaces
``torch.optim.Adam``.
"""

from typing import TYPE_CHECKING

from shared_core.lazy import attach

if TYPE_CHECKING:
    from blockdiag_opt.baselines.adabound import AdaBound as AdaBound
    from blockdiag_opt.baselines.adabound import AMSBound as AMSBound
    from blockdiag_opt.baselines.ggt import GGT as GGT
    from blockdiag_opt.clip import SpectrumClip as SpectrumClip
    from blockdiag_opt.family import AdaBlock as AdaBlock
    from blockdiag_opt.family import BlockAdaFom as BlockAdaFom
    from blockdiag_opt.family import BlockAdagrad as BlockAdagrad
    from blockdiag_opt.family import BlockAdam as BlockAdam
    from blockdiag_opt.family import BlockAdamW as BlockAdamW
    from blockdiag_opt.family import BlockAMSGrad as BlockAMSGrad
    from blockdiag_opt.family import BlockRMSprop as BlockRMSprop
    from blockdiag_opt.family import RandomizedBlockAdam as RandomizedBlockAdam
    from blockdiag_opt.groups import Plan as Plan
    from blockdiag_opt.groups import block_groups as block_groups
    from blockdiag_opt.groups import discover_groups as discover_groups
    from blockdiag_opt.groups import plan as plan
    from blockdiag_opt.layout import Layout as Layout
    from blockdiag_opt.layout import lay_out as lay_out
    from blockdiag_opt.layout import merge as merge
    from blockdiag_opt.layout import partition as partition
    from blockdiag_opt.monitor import LayerSpectrum as LayerSpectrum
    from blockdiag_opt.monitor import Monitor as Monitor
    from blockdiag_opt.monitor import spectrum as spectrum
    from blockdiag_opt.monitor import spectrum_of_state as spectrum_of_state
    from blockdiag_opt.optimizer import BlockDiagonal as BlockDiagonal
    from blockdiag_opt.roots import inverse_root as inverse_root
    from blockdiag_opt.roots import positive_part as positive_part

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "baselines": [],
        "baselines.adabound": ["AMSBound", "AdaBound"],
        "baselines.ggt": ["GGT"],
        "clip": ["SpectrumClip"],
        "family": [
            "AdaBlock",
            "BlockAMSGrad",
            "BlockAdaFom",
            "BlockAdagrad",
            "BlockAdam",
            "BlockAdamW",
            "BlockRMSprop",
            "RandomizedBlockAdam",
        ],
        "groups": ["Plan", "block_groups", "discover_groups", "plan"],
        "layout": ["Layout", "lay_out", "merge", "partition"],
        "monitor": ["LayerSpectrum", "Monitor", "spectrum", "spectrum_of_state"],
        "optimizer": ["BlockDiagonal"],
        "roots": ["inverse_root", "positive_part"],
    },
)
