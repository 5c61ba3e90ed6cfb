"""Sparsity Normalization: networks that do not suffer when the number of missing inputs varies.

Yi, Lee, Kim, Hwang and Yang, "Why Not to Use Zero Imputation? Correcting Sparsity Bias in Training Neural Networks",
ICLR 2020, arXiv:1906.00150. Zero-imputed inputs are scaled by ``K / observed count``, so that outputs stop drifting
with how much of an instance is known.

``sparsity_norm.functional`` has the functions, ``sparsity_norm.nn`` the torch layers, ``sparsity_norm.sklearn`` the
estimators, ``sparsity_norm.recommend`` the recommender, ``sparsity_norm.audit`` the audit of any model's predictions.
"""

from typing import TYPE_CHECKING

from shared_core.lazy import attach

if TYPE_CHECKING:
    from sparsity_norm.audit import CountCalibrator as CountCalibrator
    from sparsity_norm.audit import vsp_curve as vsp_curve
    from sparsity_norm.audit import vsp_report as vsp_report
    from sparsity_norm.autorec import AutoRec as AutoRec
    from sparsity_norm.factorization import BaselineOnly as BaselineOnly
    from sparsity_norm.factorization import BiasedMF as BiasedMF
    from sparsity_norm.factorization import GlobalMean as GlobalMean
    from sparsity_norm.factorization import ItemKNN as ItemKNN
    from sparsity_norm.functional import masked_conv1d as masked_conv1d
    from sparsity_norm.functional import masked_conv2d as masked_conv2d
    from sparsity_norm.functional import masked_linear as masked_linear
    from sparsity_norm.functional import masked_mse as masked_mse
    from sparsity_norm.functional import observed_count as observed_count
    from sparsity_norm.functional import sampled_decode as sampled_decode
    from sparsity_norm.functional import sparse_linear as sparse_linear
    from sparsity_norm.functional import sparsity_normalize as sparsity_normalize
    from sparsity_norm.impute import make_input as make_input
    from sparsity_norm.impute import make_transformer as make_transformer
    from sparsity_norm.nn import HiddenSparsityNorm as HiddenSparsityNorm
    from sparsity_norm.nn import MaskedConv1d as MaskedConv1d
    from sparsity_norm.nn import MaskedConv2d as MaskedConv2d
    from sparsity_norm.nn import MaskedLinear as MaskedLinear
    from sparsity_norm.nn import NaNInput as NaNInput
    from sparsity_norm.nn import SparsityNorm as SparsityNorm
    from sparsity_norm.nn import recalibrate as recalibrate
    from sparsity_norm.nn import wrap as wrap
    from sparsity_norm.ratings import RatingMatrix as RatingMatrix
    from sparsity_norm.recommend import AutoRecRecommender as AutoRecRecommender
    from sparsity_norm.sklearn import SNClassifier as SNClassifier
    from sparsity_norm.sklearn import SNRegressor as SNRegressor
    from sparsity_norm.sklearn import SparsityNormalizer as SparsityNormalizer

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "ampute": [],
        "audit": ["CountCalibrator", "vsp_curve", "vsp_report"],
        "autorec": ["AutoRec"],
        "factorization": ["BaselineOnly", "BiasedMF", "GlobalMean", "ItemKNN"],
        "functional": [
            "masked_conv1d",
            "masked_conv2d",
            "masked_linear",
            "masked_mse",
            "observed_count",
            "sampled_decode",
            "sparse_linear",
            "sparsity_normalize",
        ],
        "impute": ["make_input", "make_transformer"],
        "nn": [
            "HiddenSparsityNorm",
            "MaskedConv1d",
            "MaskedConv2d",
            "MaskedLinear",
            "NaNInput",
            "SparsityNorm",
            "recalibrate",
            "wrap",
        ],
        "ratings": ["RatingMatrix"],
        "recommend": ["AutoRecRecommender"],
        "sklearn": ["SNClassifier", "SNRegressor", "SparsityNormalizer"],
    },
)
