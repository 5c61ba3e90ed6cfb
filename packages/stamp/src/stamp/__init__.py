"""Structural pruning that reads the new task's data: channel groups, exact surgery, budgets, a meta-learned generator.

After the idea of Song et al., "Rapid Structural Pruning of Neural Networks with Set-based Task-Adaptive Meta-Pruning",
2020, reconstructed from its public description.
"""

from typing import TYPE_CHECKING

from shared_core.lazy import attach

if TYPE_CHECKING:
    from stamp.baselines import SCORERS as SCORERS
    from stamp.counting import CostModel as CostModel
    from stamp.counting import macs as macs
    from stamp.counting import parameters as parameters
    from stamp.examples import Examples as Examples
    from stamp.examples import as_examples as as_examples
    from stamp.export import to_onnx as to_onnx
    from stamp.export import to_torchscript as to_torchscript
    from stamp.generator import MaskGenerator as MaskGenerator
    from stamp.groups import trace as trace
    from stamp.latency import LatencyTable as LatencyTable
    from stamp.latency import fit_latency as fit_latency
    from stamp.meta import MetaConfig as MetaConfig
    from stamp.meta import MetaTrainer as MetaTrainer
    from stamp.plan import PrunePlan as PrunePlan
    from stamp.plan import load as load
    from stamp.plan import save_weights as save_weights
    from stamp.pruning import adaptivity as adaptivity
    from stamp.pruning import prune as prune
    from stamp.report import fold_bn as fold_bn
    from stamp.report import report as report
    from stamp.report import suggest_round_to as suggest_round_to
    from stamp.selection import Budget as Budget
    from stamp.selection import BudgetError as BudgetError
    from stamp.selection import overlap as overlap
    from stamp.selection import select as select
    from stamp.sources import read_examples as read_examples
    from stamp.structure import ChannelGroups as ChannelGroups
    from stamp.surgery import cut as cut
    from stamp.surgery import masked as masked
    from stamp.training import accuracy as accuracy
    from stamp.training import finetune as finetune
    from stamp.training import recalibrate_bn as recalibrate_bn
    from stamp.training import with_head as with_head

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "baselines": ["SCORERS"],
        "counting": ["CostModel", "macs", "parameters"],
        "examples": ["Examples", "as_examples"],
        "export": ["to_onnx", "to_torchscript"],
        "generator": ["MaskGenerator"],
        "groups": ["trace"],
        "latency": ["LatencyTable", "fit_latency"],
        "meta": ["MetaConfig", "MetaTrainer"],
        "plan": ["PrunePlan", "load", "save_weights"],
        "pruning": ["adaptivity", "prune"],
        "report": ["fold_bn", "report", "suggest_round_to"],
        "selection": ["Budget", "BudgetError", "overlap", "select"],
        "sources": ["read_examples"],
        "structure": ["ChannelGroups"],
        "surgery": ["cut", "masked"],
        "training": ["accuracy", "finetune", "recalibrate_bn", "with_head"],
    },
)
