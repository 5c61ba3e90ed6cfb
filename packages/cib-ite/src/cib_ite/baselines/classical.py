"""Effects without a neural network: regression, matching, and meta-learners over trees.

All are scikit-learn estimators with ``fit(X, treatment, y)``, ``effect(X)`` and ``predict_outcomes(X)``, and, where it
comes for free, ``effect_std(X)``. A binary outcome is modelled by probabilities, and the effect is their difference.

`OLS1`, `OLS2`, `KNNMatching` and `PropensityMatching` are the first rows of the tables of Shalit, Johansson & Sontag
(2017, arXiv:1606.03976); the T-, S- and X-learner are those of Künzel et al. (2019, arXiv:1706.03461).

`CLASSICAL` makes each by name from a seed, `GRIDS` holds six settings for each, the defaults first: the same budget for
all that a tuner without access to the truth may spend.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit
from sklearn.base import BaseEstimator
from sklearn.ensemble import (
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.neighbors import NearestNeighbors
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted

from shared_core.errors import InputError

__all__ = [
    "CLASSICAL",
    "GRIDS",
    "OLS1",
    "OLS2",
    "EffectEstimator",
    "KNNMatching",
    "LogisticPropensity",
    "PropensityMatching",
    "SLearner",
    "TLearner",
    "XLearner",
]

Vector = NDArray[np.float64]
Arm = NDArray[np.int64]
Outcome = Literal["auto", "continuous", "binary"]
Base = Literal["forest", "boosting"]
# Keeps logistic regressions finite where the classes can be separated.
_SMALLEST_RIDGE = 1e-6
_FEWEST = 2


def _names(X: object) -> list[str] | None:
    columns = getattr(X, "columns", None)
    return None if columns is None else [str(name) for name in columns]


def _table(X: ArrayLike) -> Vector:
    try:
        table = np.asarray(X, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError("X holds something that is no number; encode text and categories as numbers") from error
    if table.ndim != 2 or not table.size:
        raise InputError(f"X has shape {table.shape}; expected (rows, columns) with at least one of each")
    if not np.isfinite(table).all():
        row, column = (int(place) for place in np.argwhere(~np.isfinite(table))[0])
        named = _names(X)
        where = f"column {column}" if named is None else f"column {named[column]!r}"
        raise InputError(f"X is {table[row, column]} at row {row}, {where}; fill or leave out such rows")
    return table


def _column(name: str, values: ArrayLike, rows: int) -> Vector:
    try:
        vector = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} holds something that is no number; encode it as numbers") from error
    if vector.ndim == 2 and vector.shape[1] == 1:
        vector = vector[:, 0]
    if vector.shape != (rows,):
        raise InputError(f"{name} has shape {vector.shape} but X has {rows} rows; give one value a row")
    if not np.isfinite(vector).all():
        row = int(np.flatnonzero(~np.isfinite(vector))[0])
        raise InputError(f"{name} is {vector[row]} at row {row}; leave such rows out")
    return vector


class EffectEstimator(BaseEstimator):
    """What all estimators of effects here share: the checks of their input, and the order of the calls.

    Attributes
    ----------
    outcome_ : {"continuous", "binary"}
        How the outcome was taken.
    n_features_in_ : int
        Columns seen at fit.
    feature_names_in_ : ndarray of str
        Their names; only when X was a data frame.
    """

    outcome: Outcome
    outcome_: Literal["continuous", "binary"]
    n_features_in_: int

    def fit(self, X: ArrayLike, treatment: ArrayLike, y: ArrayLike) -> Self:
        """Fit to observed data.

        Parameters
        ----------
        X : array or data frame of shape (n, p)
            Covariates, finite.
        treatment : array of shape (n,)
            0 (control) or 1 (treated).
        y : array of shape (n,)
            Outcomes; only 0 and 1 when binary.

        Returns
        -------
        self

        Raises
        ------
        InputError
            NaN, shapes that differ, a treatment other than 0 and 1, fewer than 2 rows in an arm, an outcome that is
            constant in an arm.
        """
        table = _table(X)
        arm = _column("treatment", treatment, len(table))
        target = _column("y", y, len(table))
        levels = np.unique(arm)
        if not np.isin(levels, (0, 1)).all():
            swapped = (
                "; was y given in its place? expected fit(X, treatment, y)" if np.isin(target, (0, 1)).all() else ""
            )
            shown = ", ".join(f"{level:g}" for level in levels[:4]) + (", ..." if len(levels) > 4 else "")
            raise InputError(f"treatment must be 0 or 1, found {{{shown}}}{swapped}")
        if self.outcome not in ("auto", "continuous", "binary"):
            raise InputError(f"outcome is {self.outcome!r}; choose auto, continuous or binary")
        is_binary = bool(np.isin(target, (0, 1)).all())
        if self.outcome == "binary" and not is_binary:
            raise InputError(
                "outcome is 'binary' but y holds other values than 0 and 1; encode it or choose continuous"
            )
        for side, name in ((0, "control"), (1, "treated")):
            inside = target[arm == side]
            if len(inside) < _FEWEST:
                raise InputError(f"treatment has {len(inside)} {name} rows; both arms need at least {_FEWEST}")
            if (inside == inside[0]).all():
                raise InputError(f"y is {inside[0]:g} in every {name} row; an arm with a constant outcome has no model")
        self.outcome_ = "binary" if is_binary and self.outcome != "continuous" else "continuous"
        self.n_features_in_ = table.shape[1]
        named = _names(X)
        if named is not None:
            self.feature_names_in_ = np.array(named, dtype=object)
        elif hasattr(self, "feature_names_in_"):
            del self.feature_names_in_
        self._fit(table, arm.astype(np.int64), target)
        return self

    def effect(self, X: ArrayLike) -> Vector:
        """Return the estimated effect of each row.

        Parameters
        ----------
        X : array or data frame of shape (n, p)
            The columns seen at fit.

        Returns
        -------
        ndarray of shape (n,)
            In units of the outcome, or a difference of probabilities.
        """
        return self._effect(self._checked(X))

    def predict_outcomes(self, X: ArrayLike) -> Vector:
        """Return the estimated mean outcomes under control and treatment.

        Parameters
        ----------
        X : array or data frame of shape (n, p)
            The columns seen at fit.

        Returns
        -------
        ndarray of shape (n, 2)
            ``mu0, mu1``; probabilities when the outcome is binary.
        """
        return self._outcomes(self._checked(X))

    def _checked(self, X: ArrayLike) -> Vector:
        check_is_fitted(self, "n_features_in_")
        table = _table(X)
        if table.shape[1] != self.n_features_in_:
            raise InputError(f"X has {table.shape[1]} columns; the model was fitted to {self.n_features_in_}")
        named, known = _names(X), getattr(self, "feature_names_in_", None)
        if named is not None and known is not None and named != list(known):
            column = next(place for place, pair in enumerate(zip(named, known, strict=True)) if pair[0] != pair[1])
            raise InputError(
                f"X has column {named[column]!r} in place {column} where the model was fitted to {known[column]!r}; "
                "give the same columns in the same order"
            )
        return table

    @property
    def _binary(self) -> bool:
        return self.outcome_ == "binary"

    @abstractmethod
    def _fit(self, X: Vector, arm: Arm, y: Vector) -> None: ...

    @abstractmethod
    def _outcomes(self, X: Vector) -> Vector: ...

    def _effect(self, X: Vector) -> Vector:
        outcomes = self._outcomes(X)
        return outcomes[:, 1] - outcomes[:, 0]


class _Scaler:
    """Standardise columns by the rows at fit; columns constant there are only centred."""

    def __init__(self, X: Vector) -> None:
        self.mean = X.mean(axis=0)
        deviation = X.std(axis=0)
        self.scale = np.where(deviation > 0, deviation, 1.0)

    def __call__(self, X: Vector) -> Vector:
        return (X - self.mean) / self.scale


class _Regression:
    """Least squares, or a logistic model, of design columns of which some are penalised; with its covariance."""

    def __init__(self, design: Vector, y: Vector, penalty: Vector, binary: bool) -> None:
        self.binary = binary
        if binary:
            penalty = np.maximum(penalty, _SMALLEST_RIDGE)
            self.coefficients = self._newton(design, y, penalty)
            share = self.mean(design)
            information = (design.T * (share * (1 - share))) @ design
            noise = 1.0
        else:
            # The penalty as rows of data: lstsq then also takes designs of deficient rank.
            rows = np.concatenate([design, np.diag(np.sqrt(penalty))])
            target = np.concatenate([y, np.zeros(len(penalty))])
            self.coefficients = np.linalg.lstsq(rows, target)[0]
            information = design.T @ design
            noise = np.nan
        inverse = np.linalg.pinv(information + np.diag(penalty), hermitian=True)
        if not binary:
            free = len(y) - np.trace(inverse @ information)
            noise = float(np.sum((y - design @ self.coefficients) ** 2) / free) if free > 0.5 else np.nan
        self.covariance = noise * inverse @ information @ inverse

    @staticmethod
    def _newton(design: Vector, y: Vector, penalty: Vector) -> Vector:
        def loss(b: Vector) -> float:
            score = design @ b
            return float(np.sum(np.logaddexp(0, score) - y * score) + penalty @ b**2 / 2)

        b = np.zeros(design.shape[1])
        value = loss(b)
        for _ in range(100):
            share = expit(design @ b)
            gradient = design.T @ (share - y) + penalty * b
            curvature = (design.T * (share * (1 - share))) @ design + np.diag(penalty)
            step = np.linalg.lstsq(curvature, gradient)[0]
            size = 1.0
            while size > 1e-8 and loss(b - size * step) > value:
                size /= 2
            b = b - size * step
            previous, value = value, loss(b)
            if previous - value <= 1e-12 * (1 + abs(value)):
                break
        return b

    def mean(self, design: Vector) -> Vector:
        score = design @ self.coefficients
        return expit(score) if self.binary else score

    def gradient(self, design: Vector) -> Vector:
        if not self.binary:
            return design
        share = self.mean(design)
        return design * (share * (1 - share))[:, None]

    def variance(self, gradient: Vector) -> Vector:
        return np.einsum("ij,jk,ik->i", gradient, self.covariance, gradient).clip(0)


def _with_ones(*columns: NDArray[Any]) -> Vector:
    return np.column_stack([np.ones(len(columns[0])), *columns])


def _standard_error(variance: Vector) -> Vector:
    if np.isnan(variance).any():
        raise InputError("effect_std needs more rows than columns in each regression; give more rows or raise alpha")
    return np.sqrt(variance)


def _check_number(name: str, value: float, *, least: float) -> None:
    if not value >= least:
        raise InputError(f"{name} is {value:g}; it must be at least {least:g}")


class OLS1(EffectEstimator):
    """One regression on covariates and treatment: one coefficient is everybody's effect.

    Linear, or logistic for a binary outcome; then the effect is the difference of two probabilities and varies with x.

    Parameters
    ----------
    alpha : float, default 0.0
        Ridge penalty ``alpha ||b||²`` (added to the sum of squares, or to twice the negative log-likelihood) on the
        standardised covariates. Treatment and intercept are not penalised.
    outcome : {"auto", "continuous", "binary"}, default "auto"
        "auto" takes an outcome of only 0 and 1 as binary.
    random_state : int, optional
        Not used; all estimators take one.

    Examples
    --------
    >>> x, t = np.arange(8.0)[:, None], np.array([0, 1, 0, 1, 1, 0, 1, 0])
    >>> OLS1().fit(x, t, 2 * x[:, 0] + 3 * t).effect([[1.5]]).round(6)
    array([3.])
    """

    def __init__(self, alpha: float = 0.0, *, outcome: Outcome = "auto", random_state: int | None = None) -> None:
        self.alpha = alpha
        self.outcome = outcome
        self.random_state = random_state

    def _fit(self, X: Vector, arm: Arm, y: Vector) -> None:
        _check_number("alpha", self.alpha, least=0)
        self._scaler = _Scaler(X)
        penalty = np.r_[0.0, 0.0, np.full(X.shape[1], float(self.alpha))]
        self._regression = _Regression(_with_ones(arm, self._scaler(X)), y, penalty, self._binary)

    def _designs(self, X: Vector) -> tuple[Vector, Vector]:
        table = self._scaler(X)
        return _with_ones(np.zeros(len(X)), table), _with_ones(np.ones(len(X)), table)

    def _outcomes(self, X: Vector) -> Vector:
        return np.column_stack([self._regression.mean(design) for design in self._designs(X)])

    def effect_std(self, X: ArrayLike) -> Vector:
        """Return the standard error of the effect, by the delta method when the outcome is binary.

        Parameters
        ----------
        X : array or data frame of shape (n, p)
            The columns seen at fit.

        Returns
        -------
        ndarray of shape (n,)
            Right if the model is; the same for every row when the outcome is continuous.
        """
        control, treated = (self._regression.gradient(design) for design in self._designs(self._checked(X)))
        return _standard_error(self._regression.variance(treated - control))


class OLS2(EffectEstimator):
    """One regression per arm; the effect is the difference of their predictions.

    Parameters
    ----------
    alpha : float, default 0.0
        Ridge penalty on the covariates, standardised by all rows, as in `OLS1`.
    outcome : {"auto", "continuous", "binary"}, default "auto"
        "auto" takes an outcome of only 0 and 1 as binary; regressions are then logistic.
    random_state : int, optional
        Not used; all estimators take one.

    Examples
    --------
    >>> x, t = np.arange(8.0)[:, None], np.array([0, 1, 0, 1, 1, 0, 1, 0])
    >>> OLS2().fit(x, t, 2 * x[:, 0] + 3 * t * x[:, 0]).effect([[1.5]]).round(6)
    array([4.5])
    """

    def __init__(self, alpha: float = 0.0, *, outcome: Outcome = "auto", random_state: int | None = None) -> None:
        self.alpha = alpha
        self.outcome = outcome
        self.random_state = random_state

    def _fit(self, X: Vector, arm: Arm, y: Vector) -> None:
        _check_number("alpha", self.alpha, least=0)
        self._scaler = _Scaler(X)
        design = _with_ones(self._scaler(X))
        penalty = np.r_[0.0, np.full(X.shape[1], float(self.alpha))]
        self._regressions = [_Regression(design[arm == a], y[arm == a], penalty, self._binary) for a in (0, 1)]

    def _outcomes(self, X: Vector) -> Vector:
        design = _with_ones(self._scaler(X))
        return np.column_stack([regression.mean(design) for regression in self._regressions])

    def effect_std(self, X: ArrayLike) -> Vector:
        """Return the standard error of the predicted difference, by the delta method when the outcome is binary.

        Parameters
        ----------
        X : array or data frame of shape (n, p)
            The columns seen at fit.

        Returns
        -------
        ndarray of shape (n,)
            Right if the model is. Knows nothing of directions in which an arm's covariates do not vary.
        """
        design = _with_ones(self._scaler(self._checked(X)))
        return _standard_error(sum((r.variance(r.gradient(design)) for r in self._regressions), np.zeros(len(design))))


class _Matcher:
    """Mean outcome of the k nearest rows of each arm."""

    def __init__(self, table: Vector, arm: Arm, y: Vector, k: int) -> None:
        _check_number("k", k, least=1)
        for name, rows in (("control", arm == 0), ("treated", arm == 1)):
            if k > rows.sum():
                raise InputError(f"k is {k} but there are {rows.sum()} {name} rows; choose a smaller k")
        self.arms = [(NearestNeighbors(n_neighbors=k).fit(table[arm == a]), y[arm == a]) for a in (0, 1)]

    def __call__(self, table: Vector) -> Vector:
        return np.column_stack([y[near.kneighbors(table, return_distance=False)].mean(axis=1) for near, y in self.arms])


class KNNMatching(EffectEstimator):
    """Mean outcome of the k nearest rows of each arm.

    Distances are Euclidean between standardised covariates. A row seen at fit is its own nearest neighbour in its arm,
    as in the published tables (which is why matching looks so good in-sample).

    Parameters
    ----------
    k : int, default 5
        Neighbours in each arm.
    outcome : {"auto", "continuous", "binary"}, default "auto"
        Kept in ``outcome_``; a mean of zeros and ones is a probability anyway.
    random_state : int, optional
        Not used; all estimators take one.

    Examples
    --------
    >>> x, t = np.array([[0.0], [0.1], [1.0], [1.1]]), np.array([0, 1, 0, 1])
    >>> KNNMatching(k=1).fit(x, t, [1.0, 3.0, 2.0, 7.0]).effect([[0.0], [1.0]])
    array([2., 5.])
    """

    def __init__(self, k: int = 5, *, outcome: Outcome = "auto", random_state: int | None = None) -> None:
        self.k = k
        self.outcome = outcome
        self.random_state = random_state

    def _fit(self, X: Vector, arm: Arm, y: Vector) -> None:
        self._scaler = _Scaler(X)
        self._matcher = _Matcher(self._scaler(X), arm, y, self.k)

    def _outcomes(self, X: Vector) -> Vector:
        return self._matcher(self._scaler(X))


class LogisticPropensity:
    """Logistic regression of the treatment on standardised covariates.

    Parameters
    ----------
    X : ndarray of shape (n, p)
        Covariates.
    arm : ndarray of shape (n,)
        0 or 1.
    alpha : float, default 1.0
        Ridge penalty, as in `OLS1`.
    """

    def __init__(self, X: Vector, arm: Arm, alpha: float = 1.0) -> None:
        _check_number("alpha", alpha, least=0)
        self._scaler = _Scaler(X)
        penalty = np.r_[0.0, np.full(X.shape[1], float(alpha))]
        self._regression = _Regression(_with_ones(self._scaler(X)), arm.astype(np.float64), penalty, binary=True)

    def logit(self, X: Vector) -> Vector:
        """Return ``log(e / (1 - e))`` of each row, shape (n,)."""
        return _with_ones(self._scaler(X)) @ self._regression.coefficients

    def __call__(self, X: Vector) -> Vector:
        """Return ``e(x) = P(t=1 | x)`` of each row, shape (n,)."""
        return expit(self.logit(X))


class PropensityMatching(EffectEstimator):
    """Outcome of the rows of each arm whose propensity is nearest on the logit scale, with replacement.

    Parameters
    ----------
    k : int, default 1
        Neighbours in each arm; 1 is the textbook's.
    alpha : float, default 1.0
        Ridge penalty of the logistic propensity model, on standardised covariates.
    outcome : {"auto", "continuous", "binary"}, default "auto"
        Kept in ``outcome_``; a mean of zeros and ones is a probability anyway.
    random_state : int, optional
        Not used; all estimators take one.

    Notes
    -----
    Balances covariates on average: made for average effects. Rows of like propensity and unlike x get the same effect.

    Examples
    --------
    >>> x, t = np.array([[0.0], [0.1], [1.0], [1.1], [2.0]]), np.array([0, 0, 1, 0, 1])
    >>> PropensityMatching().fit(x, t, [1.0, 1.0, 3.0, 2.0, 4.0]).effect([[1.04], [2.0]])
    array([1., 2.])
    """

    def __init__(
        self, k: int = 1, *, alpha: float = 1.0, outcome: Outcome = "auto", random_state: int | None = None
    ) -> None:
        self.k = k
        self.alpha = alpha
        self.outcome = outcome
        self.random_state = random_state

    def _fit(self, X: Vector, arm: Arm, y: Vector) -> None:
        self._propensity = LogisticPropensity(X, arm, self.alpha)
        self._matcher = _Matcher(self._propensity.logit(X)[:, None], arm, y, self.k)

    def _outcomes(self, X: Vector) -> Vector:
        return self._matcher(self._propensity.logit(X)[:, None])


class _Trees:
    """One forest or boosted model of one target."""

    def __init__(self, settings: _TreeLearner, X: Vector, y: Vector, *, probability: bool, seed: int) -> None:
        self.probability = probability
        self.model: Any = settings._make(probability, seed).fit(X, y)  # pyright: ignore[reportPrivateUsage]

    def mean(self, X: Vector) -> Vector:
        return self._of(self.model, X)

    def each(self, X: Vector) -> Vector:
        """Predictions of the trees of a forest, shape (trees, n)."""
        return np.stack([self._of(tree, X) for tree in self.model.estimators_])

    def _of(self, model: Any, X: Vector) -> Vector:
        predicted = model.predict_proba(X)[:, 1] if self.probability else model.predict(X)
        return np.asarray(predicted, dtype=np.float64)


def _has_trees(learner: _TreeLearner) -> bool:
    if learner.base != "forest":
        raise AttributeError(f"effect_std needs base='forest'; base is {learner.base!r}")
    return True


class _TreeLearner(EffectEstimator):
    def __init__(
        self,
        base: Base = "forest",
        *,
        n_estimators: int = 100,
        min_samples_leaf: int | None = None,
        max_features: float = 1.0,
        learning_rate: float = 0.1,
        outcome: Outcome = "auto",
        n_jobs: int = 1,
        random_state: int | None = None,
    ) -> None:
        self.base: Base = base
        self.n_estimators = n_estimators
        self.min_samples_leaf = min_samples_leaf
        self.max_features = max_features
        self.learning_rate = learning_rate
        self.outcome = outcome
        self.n_jobs = n_jobs
        self.random_state = random_state

    def _make(self, probability: bool, seed: int) -> Any:
        if self.base not in ("forest", "boosting"):
            raise InputError(f"base is {self.base!r}; choose forest or boosting")
        settings: dict[str, Any] = {"max_features": self.max_features, "random_state": seed}
        if self.base == "forest":
            forest = RandomForestClassifier if probability else RandomForestRegressor
            leaf = 3 if self.min_samples_leaf is None else self.min_samples_leaf
            return forest(self.n_estimators, min_samples_leaf=leaf, n_jobs=self.n_jobs, **settings)
        settings |= {"learning_rate": self.learning_rate, "early_stopping": False}
        boosting = HistGradientBoostingClassifier if probability else HistGradientBoostingRegressor
        leaf = 20 if self.min_samples_leaf is None else self.min_samples_leaf
        return boosting(max_iter=self.n_estimators, min_samples_leaf=leaf, **settings)

    def _seeds(self, count: int) -> list[int]:
        return [int(seed) for seed in np.random.default_rng(self.random_state).integers(0, 2**31 - 1, count)]

    @available_if(_has_trees)
    def effect_std(self, X: ArrayLike) -> Vector:
        """Return the spread of the effect over the trees of the forest.

        Parameters
        ----------
        X : array or data frame of shape (n, p)
            The columns seen at fit.

        Returns
        -------
        ndarray of shape (n,)
            Standard deviation over trees, not a standard error: single trees vary more than their mean. Ranks rows by
            how much the trees disagree; scale it before you make intervals of it. Only for ``base="forest"``.
        """
        return np.sqrt(self._tree_variance(self._checked(X)))

    @abstractmethod
    def _tree_variance(self, X: Vector) -> Vector: ...


class TLearner(_TreeLearner):
    """Two models, one per arm; the effect is the difference of their predictions.

    Parameters
    ----------
    base : {"forest", "boosting"}, default "forest"
        Random forests, or histogram gradient boosting.
    n_estimators : int, default 100
        Trees of each forest, or rounds of boosting.
    min_samples_leaf : int, optional
        By default 3 for forests, 20 for boosting.
    max_features : float, default 1.0
        Share of the columns tried at each split.
    learning_rate : float, default 0.1
        Of boosting.
    outcome : {"auto", "continuous", "binary"}, default "auto"
        "auto" takes an outcome of only 0 and 1 as binary; models of it are then classifiers.
    n_jobs : int, default 1
        Threads for forests; boosting takes its own from OpenMP.
    random_state : int, optional
        Same seed, same model.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> x, t = rng.uniform(-1, 1, (100, 1)), rng.integers(0, 2, 100)
    >>> y = np.where(x[:, 0] > 0, 2.0, 0.0) * t + rng.normal(0, 0.1, 100)
    >>> TLearner(n_estimators=10, random_state=0).fit(x, t, y).effect([[-0.5], [0.5]]).round() + 0.0
    array([0., 2.])
    """

    def _fit(self, X: Vector, arm: Arm, y: Vector) -> None:
        self._models = [
            _Trees(self, X[arm == a], y[arm == a], probability=self._binary, seed=seed)
            for a, seed in enumerate(self._seeds(2))
        ]

    def _outcomes(self, X: Vector) -> Vector:
        return np.column_stack([model.mean(X) for model in self._models])

    def _tree_variance(self, X: Vector) -> Vector:
        return np.sum([model.each(X).var(axis=0) for model in self._models], axis=0)


class SLearner(_TreeLearner):
    """One model with the treatment among its columns; the effect is what switching it changes.

    Parameters
    ----------
    base : {"forest", "boosting"}, default "forest"
        Random forests, or histogram gradient boosting.
    n_estimators : int, default 100
        Trees of each forest, or rounds of boosting.
    min_samples_leaf : int, optional
        By default 3 for forests, 20 for boosting.
    max_features : float, default 1.0
        Share of the columns tried at each split.
    learning_rate : float, default 0.1
        Of boosting.
    outcome : {"auto", "continuous", "binary"}, default "auto"
        "auto" takes an outcome of only 0 and 1 as binary; models of it are then classifiers.
    n_jobs : int, default 1
        Threads for forests; boosting takes its own from OpenMP.
    random_state : int, optional
        Same seed, same model.

    Notes
    -----
    Trees may never split on the treatment: small effects are pulled to 0.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> x, t = rng.uniform(-1, 1, (100, 1)), rng.integers(0, 2, 100)
    >>> y = np.where(x[:, 0] > 0, 2.0, 0.0) * t + rng.normal(0, 0.1, 100)
    >>> SLearner(n_estimators=10, random_state=0).fit(x, t, y).effect([[-0.5], [0.5]]).round() + 0.0
    array([0., 2.])
    """

    def _fit(self, X: Vector, arm: Arm, y: Vector) -> None:
        (seed,) = self._seeds(1)
        self._model = _Trees(self, np.column_stack([X, arm.astype(np.float64)]), y, probability=self._binary, seed=seed)

    @staticmethod
    def _switched(X: Vector) -> tuple[Vector, Vector]:
        return np.column_stack([X, np.zeros(len(X))]), np.column_stack([X, np.ones(len(X))])

    def _outcomes(self, X: Vector) -> Vector:
        return np.column_stack([self._model.mean(table) for table in self._switched(X)])

    def _tree_variance(self, X: Vector) -> Vector:
        control, treated = (self._model.each(table) for table in self._switched(X))
        return (treated - control).var(axis=0)


class XLearner(_TreeLearner):
    """Models of the effects imputed in each arm, weighted by the propensity.

    A T-learner imputes ``y - mu0(x)`` for the treated and ``mu1(x) - y`` for controls; regressions of these on x give
    ``tau1`` and ``tau0``, and the effect is ``e(x) tau0 + (1 - e(x)) tau1`` with a logistic propensity e (Künzel et al.
    2019).

    Parameters
    ----------
    base : {"forest", "boosting"}, default "forest"
        Random forests, or histogram gradient boosting.
    n_estimators : int, default 100
        Trees of each forest, or rounds of boosting.
    min_samples_leaf : int, optional
        By default 3 for forests, 20 for boosting.
    max_features : float, default 1.0
        Share of the columns tried at each split.
    learning_rate : float, default 0.1
        Of boosting.
    outcome : {"auto", "continuous", "binary"}, default "auto"
        "auto" takes an outcome of only 0 and 1 as binary; models of it are then classifiers.
    n_jobs : int, default 1
        Threads for forests; boosting takes its own from OpenMP.
    random_state : int, optional
        Same seed, same model.

    Notes
    -----
    `predict_outcomes` are those of the T-learner within: their difference is not `effect`.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> x, t = rng.uniform(-1, 1, (100, 1)), rng.integers(0, 2, 100)
    >>> y = np.where(x[:, 0] > 0, 2.0, 0.0) * t + rng.normal(0, 0.1, 100)
    >>> XLearner(n_estimators=10, random_state=0).fit(x, t, y).effect([[-0.5], [0.5]]).round() + 0.0
    array([0., 2.])
    """

    def _fit(self, X: Vector, arm: Arm, y: Vector) -> None:
        seeds = self._seeds(4)
        self._models = [_Trees(self, X[arm == a], y[arm == a], probability=self._binary, seed=seeds[a]) for a in (0, 1)]
        imputed = np.where(arm == 1, y - self._models[0].mean(X), self._models[1].mean(X) - y)
        self._effects = [
            _Trees(self, X[arm == a], imputed[arm == a], probability=False, seed=seeds[2 + a]) for a in (0, 1)
        ]
        self._propensity = LogisticPropensity(X, arm)

    def _outcomes(self, X: Vector) -> Vector:
        return np.column_stack([model.mean(X) for model in self._models])

    def _effect(self, X: Vector) -> Vector:
        score = self._propensity(X)
        return score * self._effects[0].mean(X) + (1 - score) * self._effects[1].mean(X)

    def _tree_variance(self, X: Vector) -> Vector:
        score = self._propensity(X)
        control, treated = (model.each(X).var(axis=0) for model in self._effects)
        return score**2 * control + (1 - score) ** 2 * treated


CLASSICAL: Mapping[str, Callable[[int], EffectEstimator]] = {
    "ols1": lambda seed: OLS1(random_state=seed),
    "ols2": lambda seed: OLS2(random_state=seed),
    "knn": lambda seed: KNNMatching(random_state=seed),
    "psm": lambda seed: PropensityMatching(random_state=seed),
    "rf-t": lambda seed: TLearner("forest", random_state=seed),
    "rf-s": lambda seed: SLearner("forest", random_state=seed),
    "rf-x": lambda seed: XLearner("forest", random_state=seed),
    "gbm-t": lambda seed: TLearner("boosting", random_state=seed),
    "gbm-s": lambda seed: SLearner("boosting", random_state=seed),
    "gbm-x": lambda seed: XLearner("boosting", random_state=seed),
}

_RIDGE: list[dict[str, Any]] = [{"alpha": alpha} for alpha in (0.0, 1.0, 10.0, 30.0, 100.0, 300.0)]
_FOREST: list[dict[str, Any]] = [
    {"min_samples_leaf": leaf, "max_features": share} for leaf in (3, 10, 30) for share in (1.0, 0.33)
]
_BOOSTING: list[dict[str, Any]] = [
    {"min_samples_leaf": leaf, "learning_rate": rate} for leaf in (20, 5, 40) for rate in (0.1, 0.03)
]
GRIDS: Mapping[str, list[dict[str, Any]]] = {
    "ols1": _RIDGE,
    "ols2": _RIDGE,
    "knn": [{"k": k} for k in (5, 1, 3, 9, 15, 25)],
    "psm": [{"k": k, "alpha": alpha} for k in (1, 5, 15) for alpha in (1.0, 100.0)],
    **dict.fromkeys(("rf-t", "rf-s", "rf-x"), _FOREST),
    **dict.fromkeys(("gbm-t", "gbm-s", "gbm-x"), _BOOSTING),
}
