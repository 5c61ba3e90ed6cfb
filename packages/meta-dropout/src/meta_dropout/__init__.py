"""Few-shot learners that learn how to perturb features so that they generalise (after Lee et al., ICLR 2020)."""

from typing import TYPE_CHECKING

from shared_core.lazy import attach

if TYPE_CHECKING:
    from meta_dropout.attacks import Attack as Attack
    from meta_dropout.attacks import robustness_curve as robustness_curve
    from meta_dropout.backbones import conv4 as conv4
    from meta_dropout.backbones import mlp as mlp
    from meta_dropout.data import ClassImages as ClassImages
    from meta_dropout.data import TaskSource as TaskSource
    from meta_dropout.data import load as load
    from meta_dropout.engine import Plan as Plan
    from meta_dropout.engine import Tasks as Tasks
    from meta_dropout.layers import BatchShift as BatchShift
    from meta_dropout.layers import PerturbedHead as PerturbedHead
    from meta_dropout.layers import PerturbedLayer as PerturbedLayer
    from meta_dropout.learner import MetaLearner as MetaLearner
    from meta_dropout.learner import TaskModel as TaskModel
    from meta_dropout.methods import METHODS as METHODS
    from meta_dropout.methods import Method as Method
    from meta_dropout.perturb import Perturbed as Perturbed

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "attacks": ["Attack", "robustness_curve"],
        "backbones": ["conv4", "mlp"],
        "data": ["ClassImages", "TaskSource", "load"],
        "engine": ["Plan", "Tasks"],
        "layers": ["BatchShift", "PerturbedHead", "PerturbedLayer"],
        "learner": ["MetaLearner", "TaskModel"],
        "methods": ["METHODS", "Method"],
        "perturb": ["Perturbed"],
    },
)
