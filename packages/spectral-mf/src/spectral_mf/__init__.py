"""Partition functions and marginals of Ising models and pairwise binary graphical models, with certified bounds.

Park, Yang, Yun and Shin, "Spectral Approximate Inference", ICML 2019, arXiv:1905.05348: diagonalise the couplings,
treat the spectral coordinates as independent, and low-rank models exactly. Beside it the estimators and bounds that are
better where it is not: ``log_partition(A, b)`` chooses among all of them and says how sure it is.

The model is p(x) ∝ exp(½ xᵀAx + bᵀx), x in {-1, 1}^n, every pair counted once.
"""

from typing import TYPE_CHECKING

from shared_core.lazy import attach

if TYPE_CHECKING:
    from spectral_mf.baselines.ais import ais as ais
    from spectral_mf.baselines.belief_propagation import belief_propagation as belief_propagation
    from spectral_mf.baselines.belief_propagation import trw as trw
    from spectral_mf.baselines.exact import exact_elimination as exact_elimination
    from spectral_mf.baselines.exact import exact_enumeration as exact_enumeration
    from spectral_mf.baselines.exact import exact_rbm as exact_rbm
    from spectral_mf.baselines.exact import exact_transfer as exact_transfer
    from spectral_mf.baselines.mini_bucket import mini_bucket as mini_bucket
    from spectral_mf.baselines.mini_bucket import weighted_mini_bucket as weighted_mini_bucket
    from spectral_mf.baselines.sdp_rounding import sdp_rounding as sdp_rounding
    from spectral_mf.bounds import Bounds as Bounds
    from spectral_mf.bounds import log_partition_bounds as log_partition_bounds
    from spectral_mf.bounds import map_bound as map_bound
    from spectral_mf.estimate import METHODS as METHODS
    from spectral_mf.estimate import Plan as Plan
    from spectral_mf.estimate import compare as compare
    from spectral_mf.estimate import log_partition as log_partition
    from spectral_mf.estimate import plan as plan
    from spectral_mf.formats import read_model as read_model
    from spectral_mf.formats import write_model as write_model
    from spectral_mf.generators import generate as generate
    from spectral_mf.learn import IsingModel as IsingModel
    from spectral_mf.low_rank import low_rank_log_partition as low_rank_log_partition
    from spectral_mf.mode_sum import modes as modes
    from spectral_mf.model import Ising as Ising
    from spectral_mf.moments import marginals as marginals
    from spectral_mf.moments import pair_moments as pair_moments
    from spectral_mf.moments import sample as sample
    from spectral_mf.rbm import RBM as RBM
    from spectral_mf.rbm import rbm_log_likelihood as rbm_log_likelihood
    from spectral_mf.result import LogPartition as LogPartition
    from spectral_mf.sdp import solve_diagonal as solve_diagonal
    from spectral_mf.spectral import gaussian as gaussian
    from spectral_mf.spectral import spectral_mean_field as spectral_mean_field
    from spectral_mf.variational import mean_field as mean_field

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "baselines": [],
        "baselines.ais": ["ais"],
        "baselines.belief_propagation": ["belief_propagation", "trw"],
        "baselines.exact": ["exact_elimination", "exact_enumeration", "exact_rbm", "exact_transfer"],
        "baselines.mini_bucket": ["mini_bucket", "weighted_mini_bucket"],
        "baselines.sdp_rounding": ["sdp_rounding"],
        "bounds": ["Bounds", "log_partition_bounds", "map_bound"],
        "estimate": ["METHODS", "Plan", "compare", "log_partition", "plan"],
        "formats": ["read_model", "write_model"],
        "generators": ["generate"],
        "learn": ["IsingModel"],
        "low_rank": ["low_rank_log_partition"],
        "mode_sum": ["modes"],
        "model": ["Ising"],
        "moments": ["marginals", "pair_moments", "sample"],
        "rbm": ["RBM", "rbm_log_likelihood"],
        "result": ["LogPartition"],
        "sdp": ["solve_diagonal"],
        "spectral": ["gaussian", "spectral_mean_field"],
        "variational": ["mean_field"],
    },
)
