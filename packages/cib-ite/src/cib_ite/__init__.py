"""Individual treatment effects from observational data, with uncertainty one can act on.

An implementation of the causal information bottleneck (Kim, Baek, Hwang and Yang, "Reliable Estimation of Individual
Treatment Effect with Causal Information Bottleneck", arXiv:1906.03118); the exact losses of the paper were
reconstructed. Not ours to check, and needed: no unmeasured confounding, and no interference between units.

``cib_ite.CIB`` is the estimator, ``cib_ite.metrics`` what to measure, ``cib_ite.losses`` and ``cib_ite.nn`` the
objective for networks of your own, ``cib_ite.adapters`` the call shapes of EconML and causalml.
"""

from typing import TYPE_CHECKING

from shared_core.lazy import attach

if TYPE_CHECKING:
    from cib_ite.adapters import as_causalml as as_causalml
    from cib_ite.adapters import as_econml as as_econml
    from cib_ite.data import EffectTable as EffectTable
    from cib_ite.data import load as load
    from cib_ite.estimator import CIB as CIB
    from cib_ite.estimator import EffectInference as EffectInference
    from cib_ite.estimator import Problem as Problem
    from cib_ite.estimator import fit_many as fit_many
    from cib_ite.evaluate import evaluate_model as evaluate_model
    from cib_ite.export import export_model as export_model
    from cib_ite.inputs import OverlapWarning as OverlapWarning
    from cib_ite.inputs import SmallArmWarning as SmallArmWarning
    from cib_ite.inputs import pack as pack
    from cib_ite.nn import CIBModule as CIBModule
    from cib_ite.training import TrainingDiverged as TrainingDiverged

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "adapters": ["as_causalml", "as_econml"],
        "data": ["EffectTable", "load"],
        "estimator": ["CIB", "EffectInference", "Problem", "fit_many"],
        "evaluate": ["evaluate_model"],
        "export": ["export_model"],
        "inputs": ["OverlapWarning", "SmallArmWarning", "pack"],
        "losses": [],
        "metrics": [],
        "nn": ["CIBModule"],
        "training": ["TrainingDiverged"],
    },
)
