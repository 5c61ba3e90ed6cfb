"""What Sparsity Normalization is compared to: imputers, rival input layers, and the registry that names them all.

Every *method* of a comparison is one entry of `METHODS`. `make_input` builds it as the first layer of a torch network,
`make_transformer` as a scikit-learn transformer for any other model, from one definition: the transformer of a method
that has a layer applies that layer. Imputers that work on the whole table (``knn``, ``iterative``, ``softimpute``)
exist as transformers only.

Sources are named where the methods are defined. The paper compares to zero imputation throughout and to several
imputers on tables; which imputers exactly could not be checked against its text, so this list is ours.
"""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin, clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import Tags
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from shared_core.errors import InputError, no_such
from sparsity_norm._csr import tensor_of
from sparsity_norm.functional import Anything, Number, Observed, observe
from sparsity_norm.nn import InputLayer, MaskedLinear, MaskMode, NaNInput, SparsityNorm

__all__ = [
    "METHODS",
    "BatchNormInput",
    "CompleteImputer",
    "InputTransformer",
    "L2NormInput",
    "LayerNormInput",
    "Method",
    "PartialLinear",
    "PromissingInput",
    "PromissingLinear",
    "SoftImpute",
    "make_input",
    "make_transformer",
]


class _ZeroFilled(InputLayer):
    """What the layers that start from the zero-imputed input share."""

    def __init__(self, *, mask: MaskMode = "nan", concat_mask: bool = False, validate: bool = True) -> None:
        super().__init__(mask=mask, concat_mask=concat_mask, validate=validate)
        self._known = True

    def _fit(self, batches: Iterable[tuple[Any, Tensor | None]]) -> None:
        parts = [observe(x, self.resolve_mask(x, mask), validate=self.validate).values for x, mask in batches]
        if not parts:
            raise InputError("the loader gave no batch; give at least one")
        values = torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])
        self._fit_values(values)
        self._set_known(values.shape[1])

    def _fit_values(self, values: Tensor) -> None:
        """Find what the layer needs from zero-imputed training input."""

    def forward(self, x: Anything, mask: Anything | None = None) -> Anything:
        """Map input with missing entries to complete input.

        Parameters
        ----------
        x : Float[Tensor, "*batch features"]
            Input.
        mask : Tensor, optional
            1 = observed.

        Returns
        -------
        Float[Tensor, "*batch out_features"]
        """
        self.check_features(x)
        self.require_fitted()
        known = observe(x, self.resolve_mask(x, mask), validate=self.validate)
        return self._emit(self._transform(known), known.mask)

    @abstractmethod
    def _transform(self, known: Observed) -> Tensor:
        """Make the output from zero-imputed values and counts."""


class BatchNormInput(_ZeroFilled):
    """Batch normalization of the zero-imputed input, the method ``batchnorm``.

    Training batches are standardised by their own mean and variance, everything else by the running ones, which `fit`
    starts at those of the training set. Without scale and shift: the linear layer that follows has both.

    Examples
    --------
    >>> x = torch.tensor([[1.0, float("nan")], [3.0, 2.0]])
    >>> BatchNormInput().fit(x).eval()(x).round()
    tensor([[-1., -1.],
            [ 1.,  1.]])
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        *,
        momentum: Number = 0.1,
        eps: Number = 1e-5,
        mask: MaskMode = "nan",
        concat_mask: bool = False,
        validate: bool = True,
    ) -> None:
        super().__init__(mask=mask, concat_mask=concat_mask, validate=validate)
        self.momentum, self.eps = momentum, eps
        self.register_buffer("running_mean", torch.zeros(0))
        self.register_buffer("running_var", torch.zeros(0))
        self._known = False

    def _is_known(self) -> bool:
        return self.running_mean.numel() > 0

    @property
    def static(self) -> bool:
        """False: in training the output depends on the batch."""
        return False

    def _fit_values(self, values: Tensor) -> None:
        variance, mean = torch.var_mean(values, dim=0, correction=0)
        self.running_mean, self.running_var = (found.to(self.running_mean.device) for found in (mean, variance))

    def _transform(self, known: Observed) -> Tensor:
        return nn.functional.batch_norm(
            known.values,
            self.running_mean,
            self.running_var,
            training=self.training and len(known.values) > 1,
            momentum=self.momentum,
            eps=self.eps,
        )


class LayerNormInput(_ZeroFilled):
    """Layer normalization of the zero-imputed input, the method ``layernorm``; without scale and shift.

    Examples
    --------
    >>> LayerNormInput()(torch.tensor([[1.0, float("nan"), -1.0]])).round(decimals=2)
    tensor([[ 1.2200,  0.0000, -1.2200]])
    """

    def _transform(self, known: Observed) -> Tensor:
        return nn.functional.layer_norm(known.values, known.values.shape[-1:])


class L2NormInput(_ZeroFilled):
    """Divide the zero-imputed input by its L2 norm, times the mean norm on train: the method ``l2norm``.

    The closest lookalike of Sparsity Normalization; it removes the magnitude of an instance together with its count.

    Examples
    --------
    >>> L2NormInput().fit(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))(torch.tensor([[0.0, 2.0]]))
    tensor([[0., 3.]])
    """

    mean_norm: Tensor

    def __init__(self, *, mask: MaskMode = "nan", concat_mask: bool = False, validate: bool = True) -> None:
        super().__init__(mask=mask, concat_mask=concat_mask, validate=validate)
        self.register_buffer("mean_norm", torch.tensor(math.nan))
        self._known = False

    def _is_known(self) -> bool:
        return not bool(torch.isnan(self.mean_norm))

    def _fit_values(self, values: Tensor) -> None:
        norms = values.norm(dim=-1)
        if not bool((norms > 0).any()):
            raise InputError("every training instance is zero or wholly missing; l2norm needs one that is not")
        self.mean_norm = norms[norms > 0].mean().to(self.mean_norm.device)

    def _transform(self, known: Observed) -> Tensor:
        return nn.functional.normalize(known.values, dim=-1) * self.mean_norm.to(known.values.dtype)


class PromissingInput(_ZeroFilled):
    """Zero-imputed input and the share of observed entries ``s / n0`` as a last feature: the method ``promissing``.

    A linear layer *without bias* on it computes ``W h0 + (s / n0) b``, the first layer of PROMISSING
    (arXiv:2206.01640, equation 3 as a public reimplementation gives it): the bias is scaled down, not the data up.

    Examples
    --------
    >>> PromissingInput()(torch.tensor([[1.0, float("nan")]]))
    tensor([[1.0000, 0.0000, 0.5000]])
    """

    def out_features(self, in_features: int) -> int:
        """Return the size of the output for input of size ``in_features``: one more."""
        return super().out_features(in_features) + 1

    def _transform(self, known: Observed) -> Tensor:
        share = known.counts / known.values.shape[-1]
        return torch.cat([known.values, share.to(known.values.dtype)], dim=-1)


class PartialLinear(MaskedLinear):
    """Linear layer with the constant of partial convolutions: the number of inputs ``n0`` in place of K.

    ``n0 / s * (W (m * x)) + b``: Sparsity Normalization up to the constant factor ``n0 / K`` (arXiv:1804.07723,
    arXiv:1811.11718 for convolutions). The method ``partial``.

    Parameters
    ----------
    in_features, out_features : int
        Sizes.
    bias : bool, default True
        Add a bias, outside the scale.

    Examples
    --------
    >>> PartialLinear(4, 1).norm
    SparsityNorm(K=4, power=1)
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias, K=in_features)


class PromissingLinear(nn.Module):
    """The first layer of PROMISSING (arXiv:2206.01640): ``W h0 + (s / n0) b``.

    Parameters
    ----------
    in_features, out_features : int
        Sizes.

    Examples
    --------
    >>> layer = PromissingLinear(2, 3)
    >>> bool((layer(torch.full((1, 2), float("nan"))) == 0).all())
    True
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        linear = nn.Linear(in_features, out_features)
        self.weight, self.bias = linear.weight, linear.bias

    def forward(
        self, x: Float[Tensor, "*batch features"], mask: Anything | None = None
    ) -> Float[Tensor, "*batch outputs"]:
        """Apply the layer.

        Parameters
        ----------
        x : Float[Tensor, "*batch features"]
            Input; NaN is missing unless ``mask`` (1 = observed) is given.
        mask : Tensor, optional
            1 = observed.

        Returns
        -------
        Float[Tensor, "*batch outputs"]
        """
        values, _, counts = observe(x, mask)
        share = (counts / x.shape[-1]).to(values.dtype)
        return nn.functional.linear(values, self.weight) + share * self.bias


class _NaNTransformer(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):
    """A scikit-learn transformer that takes NaN."""

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        return tags

    def _table(self, X: Any, *, reset: bool) -> NDArray[np.float64]:
        table = validate_data(self, X, reset=reset, dtype=np.float64, ensure_all_finite="allow-nan")
        return cast("NDArray[np.float64]", table)


class SoftImpute(_NaNTransformer):
    """Matrix completion by soft-thresholded singular values, the method ``softimpute``.

    Iterates ``Z <- D_lambda(P_O(X) + P_notO(Z))`` down a path of lambdas, each warm-started from the last, where
    ``D_lambda`` shrinks every singular value by lambda and drops what becomes negative (Mazumder, Hastie and
    Tibshirani, JMLR 2010).

    Parameters
    ----------
    ratio : float, default 50
        The path runs from the largest singular value of the zero-imputed table down to that divided by ``ratio``.
    n_lambdas : int, default 20
        Points on the path, geometric.
    tol : float, default 1e-5
        A point is done when the relative change of Z (Frobenius) falls below it.
    max_iter : int, default 200
        Most iterations at each point of the path, and for new rows.

    Attributes
    ----------
    shrinkage_ : ndarray of shape (features, features)
        ``V diag((sigma - lambda)_+ / sigma) V^T`` at the end of the path.
    fallback_ : ndarray of shape (features,)
        The mean of all observed entries, for columns with none.
    n_iter_ : int
        Iterations over the whole path.

    Notes
    -----
    New rows are completed with the learned V: their missing part is the fixed point of ``z = P_O(x) + P_notO(z S)``
    with ``S = shrinkage_``, which is what the iteration does to a training row at convergence. A row does not depend
    on the rows transformed with it. A row with nothing observed becomes zeros.

    Examples
    --------
    >>> rank_one = np.outer(np.arange(1.0, 9), [1.0, 2.0, 3.0])
    >>> holes = rank_one.copy()
    >>> holes[3, 2] = np.nan
    >>> SoftImpute(ratio=1000).fit_transform(holes)[3].round(1)
    array([ 4.,  8., 12.])
    """

    def __init__(self, ratio: Number = 50.0, n_lambdas: int = 20, tol: Number = 1e-5, max_iter: int = 200) -> None:
        self.ratio = ratio
        self.n_lambdas = n_lambdas
        self.tol = tol
        self.max_iter = max_iter

    def fit(self, X: Any, y: Any = None) -> SoftImpute:  # noqa: ARG002
        """Learn the shrinkage from a table with NaN.

        Parameters
        ----------
        X : array of shape (rows, features)
            NaN marks what is missing.
        y : ignored

        Returns
        -------
        SoftImpute
        """
        if self.ratio < 1 or self.n_lambdas < 1:
            raise InputError(f"ratio is {self.ratio:g} and n_lambdas {self.n_lambdas}; both must be at least 1")
        table = self._table(X, reset=True)
        observed = ~np.isnan(table)
        known = np.where(observed, table, 0.0)
        self.fallback_ = _fallback(table)
        largest = float(np.sqrt(max(np.linalg.eigvalsh(known.T @ known)[-1], 0.0)))
        filled = known
        self.n_iter_ = 0
        self.shrinkage_ = np.zeros((table.shape[1],) * 2)
        for shrink_by in np.geomspace(largest, largest / self.ratio, self.n_lambdas) if largest else ():
            for _ in range(self.max_iter):
                # Through the smaller Gram matrix: only the singular values above lambda matter, and those are far
                # from the ones that squaring would blur.
                squares, V = np.linalg.eigh(filled.T @ filled)
                sigma = np.sqrt(np.clip(squares, 0.0, None))
                factor = 1 - shrink_by / np.maximum(sigma, shrink_by)
                self.shrinkage_ = (V * factor) @ V.T
                completed = np.where(observed, known, filled @ self.shrinkage_)
                change = np.linalg.norm(completed - filled)
                size = np.linalg.norm(filled)
                filled = completed
                self.n_iter_ += 1
                if change <= self.tol * size:
                    break
        # scikit-learn's convention is at least 1; a table of zeros needs no iteration.
        self.n_iter_ = max(self.n_iter_, 1)
        return self

    def transform(self, X: Any) -> NDArray[np.float64]:
        """Complete rows.

        Parameters
        ----------
        X : array of shape (rows, features)
            NaN marks what is missing.

        Returns
        -------
        ndarray of shape (rows, features)
            Observed entries unchanged.
        """
        check_is_fitted(self)
        table = self._table(X, reset=False)
        observed = ~np.isnan(table)
        known = np.where(observed, table, 0.0)
        filled = known.copy()
        active = np.arange(len(table))
        for _ in range(10 * self.max_iter):
            completed = np.where(observed[active], known[active], filled[active] @ self.shrinkage_)
            change = np.linalg.norm(completed - filled[active], axis=1)
            done = change <= self.tol * 1e-2 * np.linalg.norm(completed, axis=1)
            filled[active] = completed
            # Row by row, so that a row's result is the same in whatever company it comes.
            active = active[~done]
            if not len(active):
                break
        never = np.isfinite(self.fallback_)
        filled[:, never] = np.where(observed[:, never], filled[:, never], self.fallback_[never])
        return filled


def _fallback(table: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean of all observed entries for columns that have none, NaN for the others."""
    observed = ~np.isnan(table)
    if not observed.any():
        raise InputError(f"no entry of the table is observed in any of its {len(table)} rows; nothing can be imputed")
    return np.where(observed.any(axis=0), np.nan, np.nanmean(table))


class CompleteImputer(_NaNTransformer):
    """Any scikit-learn imputer, made to keep columns that have no training entry by giving them the overall mean.

    Parameters
    ----------
    imputer : estimator
        For example ``KNNImputer()``; it is cloned.

    Attributes
    ----------
    imputer_ : estimator
        Fitted.

    Examples
    --------
    >>> from sklearn.impute import KNNImputer
    >>> CompleteImputer(KNNImputer(n_neighbors=1)).fit_transform([[1.0, np.nan], [3.0, np.nan]])
    array([[1., 2.],
           [3., 2.]])
    """

    def __init__(self, imputer: Any) -> None:
        self.imputer = imputer

    def fit(self, X: Any, y: Any = None) -> CompleteImputer:  # noqa: ARG002
        """Fit the imputer.

        Parameters
        ----------
        X : array of shape (rows, features)
            NaN marks what is missing.
        y : ignored

        Returns
        -------
        CompleteImputer
        """
        table = self._table(X, reset=True)
        self.fallback_ = _fallback(table)
        with warnings.catch_warnings():
            # A fixed number of rounds is the definition of this method.
            warnings.simplefilter("ignore", ConvergenceWarning)
            self.imputer_: Any = cast("Any", clone(self.imputer)).fit(table[:, np.isnan(self.fallback_)])
        return self

    def transform(self, X: Any) -> NDArray[np.float64]:
        """Complete rows.

        Parameters
        ----------
        X : array of shape (rows, features)
            NaN marks what is missing.

        Returns
        -------
        ndarray of shape (rows, features)
        """
        check_is_fitted(self)
        table = self._table(X, reset=False)
        # The imputer never meets a column without training entries: filled by a constant, it would join in distances.
        seen = np.isnan(self.fallback_)
        completed = np.where(np.isnan(table), self.fallback_, table)
        completed[:, seen] = self.imputer_.transform(table[:, seen])
        return completed


class InputTransformer(_NaNTransformer):
    """A method's layer as a scikit-learn transformer: what goes into a network goes into any other model.

    Parameters
    ----------
    method : str
        A name in `METHODS` that has a layer.
    options : dict, optional
        For the layer.

    Attributes
    ----------
    layer_ : InputLayer
        Fitted, in float64.

    Examples
    --------
    >>> InputTransformer("mean").fit_transform([[1.0, np.nan], [3.0, 4.0]])
    array([[1., 4.],
           [3., 4.]])
    """

    def __init__(self, method: str, options: dict[str, Any] | None = None) -> None:
        self.method = method
        self.options = options

    def fit(self, X: Any, y: Any = None) -> InputTransformer:  # noqa: ARG002
        """Fit the layer.

        Parameters
        ----------
        X : array of shape (rows, features)
            NaN marks what is missing.
        y : ignored

        Returns
        -------
        InputTransformer
        """
        layer = make_input(self.method, **(self.options or {}))
        if any(True for _ in layer.parameters()):
            raise InputError(f"the method {self.method!r} learns together with a network; it has no fixed transform")
        table = self._table(X, reset=True)
        self.layer_ = layer.double().fit(tensor_of(table)).eval()
        return self

    def transform(self, X: Any) -> NDArray[np.float64]:
        """Apply the layer.

        Parameters
        ----------
        X : array of shape (rows, features)
            NaN marks what is missing.

        Returns
        -------
        ndarray of shape (rows, out_features)
        """
        check_is_fitted(self)
        with torch.no_grad():
            return self.layer_(tensor_of(self._table(X, reset=False))).numpy()

    def get_feature_names_out(self, input_features: Any = None) -> NDArray[Any]:
        """Return a name for each output: those of the columns, then of what the method appends.

        Parameters
        ----------
        input_features : array of str, optional
            Names of the columns.

        Returns
        -------
        ndarray of str
        """
        check_is_fitted(self)
        names = cast("NDArray[Any]", super().get_feature_names_out(input_features))
        extra = self.layer_.out_features(len(names)) - len(names)
        if extra == 1:
            return np.append(names, "observed_share")
        return np.concatenate([names, [f"{name}_observed" for name in names[:extra]]]).astype(object)


@dataclass(frozen=True)
class Method:
    """One way to feed input with missing entries to a model.

    Attributes
    ----------
    name : str
        What command lines and tables call it.
    summary : str
        One line.
    origin : {"method", "extension", "baseline"}
        The paper's method, ours on top of it, or what it is compared to.
    layer : callable or None
        Makes the torch layer.
    imputer : callable or None
        Makes the scikit-learn imputer, for methods that have no layer.
    first_bias : bool
        Whether the linear layer after it has a bias of its own.
    """

    name: str
    summary: str
    origin: Literal["method", "extension", "baseline"]
    layer: Callable[..., InputLayer] | None = None
    imputer: Callable[..., Any] | None = None
    first_bias: bool = True


def _knn(n_neighbors: int = 5, **options: Any) -> CompleteImputer:
    from sklearn.impute import KNNImputer

    return CompleteImputer(KNNImputer(n_neighbors=n_neighbors, **options))


def _iterative(max_iter: int = 10, random_state: int = 0, **options: Any) -> CompleteImputer:
    # scikit-learn asks for this import before it lets the next one through.
    from sklearn.experimental import enable_iterative_imputer  # noqa: F401  # pyright: ignore[reportUnusedImport]
    from sklearn.impute import IterativeImputer
    from sklearn.linear_model import BayesianRidge

    return CompleteImputer(IterativeImputer(BayesianRidge(), max_iter=max_iter, random_state=random_state, **options))


class _FeatureCount(SparsityNorm):
    """`SparsityNorm` with the number of features as K, whatever was observed in training."""

    def _fit(self, batches: Iterable[tuple[Any, Tensor | None]]) -> None:
        super()._fit(batches)
        self.K.fill_(self.n_features)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("sn", "Sparsity Normalization: zero-impute, times K / s", "method", SparsityNorm),
        Method("sn+mask", "Sparsity Normalization, mask appended", "method", partial(SparsityNorm, concat_mask=True)),
        Method("sqrt", "times (K / s) ** 0.5: second moment preserved", "extension", partial(SparsityNorm, power=0.5)),
        Method(
            "sn-center",
            "column means subtracted, then times K / s",
            "extension",
            partial(SparsityNorm, center="column"),
        ),
        Method(
            "sn-center+mask",
            "centred Sparsity Normalization, mask appended",
            "extension",
            partial(SparsityNorm, center="column", concat_mask=True),
        ),
        Method("sn-learn", "times (K / s) ** power, power learned", "extension", partial(SparsityNorm, power="learn")),
        Method("zero", "zero imputation", "baseline", partial(NaNInput, fill="zero")),
        Method(
            "zero+mask", "zero imputation, mask appended", "baseline", partial(NaNInput, fill="zero", concat_mask=True)
        ),
        Method("mean", "column mean of observed training entries", "baseline", partial(NaNInput, fill="mean")),
        Method("mean+mask", "column mean, mask appended", "baseline", partial(NaNInput, fill="mean", concat_mask=True)),
        Method("median", "column median of observed training entries", "baseline", partial(NaNInput, fill="median")),
        Method(
            "median+mask",
            "column median, mask appended",
            "baseline",
            partial(NaNInput, fill="median", concat_mask=True),
        ),
        Method("knn", "scikit-learn KNNImputer, 5 neighbours", "baseline", imputer=_knn),
        Method("iterative", "scikit-learn IterativeImputer, BayesianRidge, 10 rounds", "baseline", imputer=_iterative),
        Method("softimpute", "soft-thresholded SVD, warm-started path", "baseline", imputer=SoftImpute),
        Method("batchnorm", "batch norm of the zero-imputed input", "baseline", BatchNormInput),
        Method("layernorm", "layer norm of the zero-imputed input", "baseline", LayerNormInput),
        Method("l2norm", "zero-imputed input at the mean training norm", "baseline", L2NormInput),
        Method("partial", "times n0 / s, the constant of partial convolutions", "baseline", _FeatureCount),
        Method(
            "promissing",
            "first-layer bias times s / n0 (arXiv:2206.01640)",
            "baseline",
            PromissingInput,
            first_bias=False,
        ),
    )
}
"""Every method by name."""


def _method(name: str) -> Method:
    if name not in METHODS:
        raise no_such("method", name, METHODS)
    return METHODS[name]


def make_input(name: str, **options: Any) -> InputLayer:
    """Build a method as the first layer of a network.

    Parameters
    ----------
    name : str
        A name in `METHODS`.
    **options
        For the layer; they override the method's own.

    Returns
    -------
    InputLayer
        To be fitted on training input.

    Raises
    ------
    UnknownKeyError
        No such method.
    InputError
        The method imputes whole tables and is a transformer only.

    Examples
    --------
    >>> make_input("sqrt").fit(torch.tensor([[1.0, float("nan"), 2.0]]))
    SparsityNorm(K=2, power=0.5)
    """
    method = _method(name)
    if method.layer is None:
        raise InputError(f"the method {name!r} imputes whole tables before any network; use make_transformer({name!r})")
    return method.layer(**options)


def make_transformer(name: str, **options: Any) -> InputTransformer | CompleteImputer | SoftImpute:
    """Build a method as a scikit-learn transformer.

    Parameters
    ----------
    name : str
        A name in `METHODS`, except "sn-learn", which learns together with a network.
    **options
        For the layer or imputer.

    Returns
    -------
    transformer
        Table with NaN in, complete table out.

    Raises
    ------
    UnknownKeyError
        No such method.

    Examples
    --------
    >>> make_transformer("zero+mask").fit_transform([[2.0, np.nan]])
    array([[2., 0., 1., 0.]])
    """
    method = _method(name)
    if method.imputer is not None:
        return method.imputer(**options)
    return InputTransformer(name, options or None)
