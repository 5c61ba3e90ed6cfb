"""Few-shot learners for imbalanced and out-of-distribution tasks: Bayesian task-adaptive meta-learning.

After Lee et al., "Learning to Balance: Bayesian Meta-Learning for Imbalanced and Out-of-distribution Tasks", ICLR 2020.
"""

from typing import TYPE_CHECKING

from shared_core.lazy import attach

if TYPE_CHECKING:
    from bayes_taml.data import AnyShotSource as AnyShotSource
    from bayes_taml.data import ClassImages as ClassImages
    from bayes_taml.data import load as load
    from bayes_taml.encoder import InferenceNetwork as InferenceNetwork
    from bayes_taml.engine import Compat as Compat
    from bayes_taml.explanation import Explanation as Explanation
    from bayes_taml.explanation import balance_table as balance_table
    from bayes_taml.explanation import counterfactual as counterfactual
    from bayes_taml.explanation import explain as explain
    from bayes_taml.learner import Evaluation as Evaluation
    from bayes_taml.learner import MetaLearner as MetaLearner
    from bayes_taml.learner import TaskClassifier as TaskClassifier
    from bayes_taml.methods import METHODS as METHODS
    from bayes_taml.methods import Method as Method
    from bayes_taml.networks import BatchStatistics as BatchStatistics
    from bayes_taml.networks import conv_features as conv_features
    from bayes_taml.networks import mlp_features as mlp_features
    from bayes_taml.posterior import Latents as Latents
    from bayes_taml.posterior import Posterior as Posterior
    from bayes_taml.ragged import Tasks as Tasks

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "data": ["AnyShotSource", "ClassImages", "load"],
        "encoder": ["InferenceNetwork"],
        "engine": ["Compat"],
        "explanation": ["Explanation", "balance_table", "counterfactual", "explain"],
        "learner": ["Evaluation", "MetaLearner", "TaskClassifier"],
        "methods": ["METHODS", "Method"],
        "networks": ["BatchStatistics", "conv_features", "mlp_features"],
        "posterior": ["Latents", "Posterior"],
        "ragged": ["Tasks"],
    },
)
