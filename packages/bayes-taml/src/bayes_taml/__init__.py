"""Few-shot learners for imbalanced and out-of-distribution tasks: Bayesian task-adaptive meta-learning.

After Lee et al., "Learning to Balance: Bayesian Meta-Learning for Imbalanced and Out-of-distribution Tasks", ICLR 2020.
"""

from bayes_taml.data import AnyShotSource, ClassImages
from bayes_taml.data import load_classes as load
from bayes_taml.encoder import InferenceNetwork
from bayes_taml.engine import Compat
from bayes_taml.explain import Explanation, balance_table, counterfactual, explain
from bayes_taml.learner import Evaluation, MetaLearner, TaskClassifier
from bayes_taml.methods import METHODS, Method
from bayes_taml.networks import BatchStatistics, conv_features, mlp_features
from bayes_taml.posterior import Latents, Posterior
from bayes_taml.ragged import Tasks

__all__ = [
    "METHODS",
    "AnyShotSource",
    "BatchStatistics",
    "ClassImages",
    "Compat",
    "Evaluation",
    "Explanation",
    "InferenceNetwork",
    "Latents",
    "MetaLearner",
    "Method",
    "Posterior",
    "TaskClassifier",
    "Tasks",
    "balance_table",
    "conv_features",
    "counterfactual",
    "explain",
    "load",
    "mlp_features",
]
