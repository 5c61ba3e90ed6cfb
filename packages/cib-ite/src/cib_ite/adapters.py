"""The estimator behind the call shapes of EconML and of causalml, for code that was written for those.

Three argument orders are in use: here and in causalml ``fit(X, treatment, y)``, in EconML ``fit(Y, T, X=X)``. The
adapters need neither package.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, clone
from sklearn.exceptions import NotFittedError

from cib_ite.calibration import check_alpha, normal_quantile
from cib_ite.estimator import CIB
from shared_core.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["CausalMLLearner", "EconMLEstimator", "NormalEffects", "as_causalml", "as_econml"]

Values = Float[np.ndarray, "..."]
Matrix = Float[np.ndarray, "n 1"]


def as_econml(est: CIB) -> EconMLEstimator:
    """Give an estimator the methods of EconML's.

    Parameters
    ----------
    est : it is copied and stays as it is; if it is fitted, so is what comes back

    Raises
    ------
    InputError
        When it is something else.

    Examples
    --------
    >>> random = np.random.default_rng(0)
    >>> X, T = random.normal(size=(300, 3)), random.integers(0, 2, 300)
    >>> Y = X[:, 0] + T * (1 + X[:, 1]) + 0.1 * random.normal(size=300)
    >>> model = as_econml(CIB(n_members=2, steps=100)).fit(Y, T, X=X)
    >>> model.effect(X, T0=0, T1=1).shape, [bound.shape for bound in model.effect_interval(X, alpha=0.1)]
    ((300,), [(300,), (300,)])
    """
    return _adopt(EconMLEstimator(_copied(est, "as_econml")), est)


def as_causalml(est: CIB, *, control_name: object = None, ate_alpha: float = 0.05) -> CausalMLLearner:
    """Give an estimator the methods of causalml's learners.

    Parameters
    ----------
    est : it is copied and stays as it is; if it is fitted, so is what comes back
    control_name : which value of the treatment is the control; None keeps what `est` says (0, unless it says otherwise)
    ate_alpha : share of misses that every interval allows, as causalml's learners have it

    Raises
    ------
    InputError
        When it is something else, `ate_alpha` is outside (0, 1), or a fitted `est` has another control.

    Examples
    --------
    >>> random = np.random.default_rng(0)
    >>> X, arm = random.normal(size=(300, 3)), random.choice(["placebo", "drug"], 300)
    >>> y = X[:, 0] + (arm == "drug") + 0.1 * random.normal(size=300)
    >>> learner = as_causalml(CIB(n_members=2, steps=100), control_name="placebo")
    >>> learner.fit_predict(X, arm, y).shape
    (300, 1)
    """
    copied = _copied(est, "as_causalml")
    if control_name is not None:
        if hasattr(est, "stack_") and str(est.treatment_values_[0]) != str(control_name):
            raise InputError(
                f"control_name: the estimator was fitted with {est.treatment_values_[0]!r} as control, not"
                f" {control_name!r}; give as_causalml an unfitted one, or leave control_name out"
            )
        copied.set_params(control_name=control_name)
    return _adopt(CausalMLLearner(copied, ate_alpha=check_alpha(ate_alpha)), est)


def _copied(est: Any, name: str) -> CIB:
    if not isinstance(est, CIB):
        raise InputError(f"{name}: wraps a cib_ite.CIB, got {type(est).__name__}; give e.g. CIB(random_state=0)")
    return _unfitted(est)


def _unfitted(est: CIB) -> CIB:
    return cast("CIB", clone(est))


class _Adapter(BaseEstimator):
    """An estimator, and the fitted copy of it."""

    estimator: CIB
    model_: CIB

    def _fitted(self) -> CIB:
        if not hasattr(self, "model_"):
            raise NotFittedError(f"this {type(self).__name__} is not fitted yet; call fit first")
        return self.model_


_Made = TypeVar("_Made", bound=_Adapter)
_Value = TypeVar("_Value")


def _adopt(adapter: _Made, est: CIB) -> _Made:
    if hasattr(est, "stack_"):
        # A copy: fitting `est` anew must not change what the adapter says.
        adapter.model_ = copy.deepcopy(est)
    return adapter


# ---- EconML


@dataclass(frozen=True, eq=False)
class NormalEffects:
    """Effects with normal errors, under the names of ``econml.inference.NormalInferenceResults``.

    Parameters
    ----------
    point_estimate : (n,), or (n, 1) where Y was a column
    stderr : calibrated standard deviations, of the same shape; 0 where ``T0 == T1``
    bounded : effects are differences of probabilities, so intervals end at -1 and 1

    Examples
    --------
    >>> found = NormalEffects(np.array([1.0, 0.0]), np.array([0.5, 0.5]))
    >>> found.summary_frame()[["zstat", "ci_lower"]].to_numpy().tolist()
    [[2.0, 0.02], [0.0, -0.98]]
    """

    point_estimate: Values
    stderr: Values
    bounded: bool = False

    @property
    def var(self) -> Values:
        """Squares of `stderr`."""
        return self.stderr**2

    def conf_int(self, alpha: float = 0.05) -> tuple[Values, Values]:
        """Lower and upper bounds, of the shape of `point_estimate`.

        Parameters
        ----------
        alpha : share of misses allowed, in (0, 1)
        """
        half = normal_quantile(check_alpha(alpha)) * self.stderr
        lower, upper = self.point_estimate - half, self.point_estimate + half
        return (np.maximum(lower, -1.0), np.minimum(upper, 1.0)) if self.bounded else (lower, upper)

    def zstat(self, value: float = 0.0) -> Values:
        """Return how many standard errors each estimate lies above `value`; NaN where ``T0 == T1``.

        Parameters
        ----------
        value : what is tested
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            return (self.point_estimate - value) / self.stderr

    def pvalue(self, value: float = 0.0) -> Values:
        """Two-sided p-value of the effect being `value`; approximate, as the standard errors are.

        Parameters
        ----------
        value : what is tested
        """
        from scipy.stats import norm

        return 2 * norm.sf(np.abs(self.zstat(value)))

    def summary_frame(self, alpha: float = 0.05, value: float = 0.0, decimals: int = 3) -> pd.DataFrame:
        """One row a unit, with EconML's columns: point_estimate, stderr, zstat, pvalue, ci_lower, ci_upper.

        Parameters
        ----------
        alpha : share of misses that the interval allows
        value : what `zstat` and `pvalue` test
        decimals : figures are rounded to so many, as EconML does
        """
        import pandas as pd

        lower, upper = self.conf_int(alpha)
        columns = {
            "point_estimate": self.point_estimate,
            "stderr": self.stderr,
            "zstat": self.zstat(value),
            "pvalue": self.pvalue(value),
            "ci_lower": lower,
            "ci_upper": upper,
        }
        index = pd.RangeIndex(len(self.stderr), name="X")
        return pd.DataFrame({name: np.ravel(values) for name, values in columns.items()}, index=index).round(decimals)


class EconMLEstimator(_Adapter):
    """A :class:`cib_ite.CIB` with the methods of an EconML estimator; made by :func:`as_econml`.

    Results have EconML's shapes: of a `Y` of shape (n,) effects are (n,), of one of shape (n, 1) they are (n, 1).
    ``econml.score.RScorer`` (`score`, `best_model`) and ``econml.validate.DRTester`` accept it;
    ``econml.score.EnsembleCateEstimator`` asks for EconML's own classes.

    Parameters
    ----------
    estimator : unfitted; `fit` fits a copy

    Attributes
    ----------
    model_ : the fitted estimator
    """

    def __init__(self, estimator: CIB) -> None:
        self.estimator = estimator

    def fit(
        self,
        Y: ArrayLike,
        T: ArrayLike,
        *,
        X: ArrayLike | None = None,
        W: object = None,
        sample_weight: ArrayLike | None = None,
        inference: object = None,
    ) -> EconMLEstimator:
        """Learn from observed treatments and outcomes.

        Parameters
        ----------
        Y : (n,) or (n, 1) outcomes
        T : (n,) or (n, 1) treatment, 0/1, or two values with the estimator's ``control_name``
        X : (n, p) covariates, controls among them
        W : must be None: here every covariate may change the effect
        sample_weight : (n,) weights >= 0
        inference : None or "auto": intervals come with the fitted networks

        Raises
        ------
        InputError
            With one line that says what is wrong with which argument.
        """
        _no_controls(W)
        if X is None:
            raise InputError("X: is missing; an effect for each individual needs covariates: fit(Y, T, X=X)")
        if not (inference is None or (isinstance(inference, str) and inference == "auto")):
            raise InputError(
                f"inference: must be None or 'auto', got {inference!r}; intervals come from the fitted networks"
            )
        outcome = np.asarray(Y)
        model = _unfitted(self.estimator)
        _in_econml_order(lambda: model.fit(X, T, outcome, sample_weight=sample_weight))
        self.model_, self._column = model, outcome.ndim == 2
        return self

    def _shaped(self, values: Float[np.ndarray, " n"]) -> Values:
        return values[:, None] if getattr(self, "_column", False) else values

    def _averaged(self, value: float) -> Any:
        """Return a scalar of numpy, or (1,) where Y was a column."""
        return np.full(1, value) if getattr(self, "_column", False) else np.float64(value)

    def _signs(self, T0: object, T1: object, rows: int) -> Float[np.ndarray, " n"]:
        """+1 where the step from T0 to T1 is from control to treated, -1 where it is back, 0 where there is none."""
        values = self._fitted().treatment_values_
        arms = [_arms(given, name, values, rows) for given, name in ((T0, "T0"), (T1, "T1"))]
        return arms[1] - arms[0]

    def effect(self, X: ArrayLike, *, T0: object = 0, T1: object = 1) -> Values:
        """Effect of going from `T0` to `T1`: (n,), or (n, 1) where Y was a column.

        Parameters
        ----------
        X : (n, p) with the columns of ``fit``
        T0, T1 : values of the treatment, one or (n,) each; 0 and 1 also name the arms of a treatment with other values
        """
        effect = self._fitted().effect(X)
        return self._shaped(_times(self._signs(T0, T1, len(effect)), effect))

    def effect_interval(
        self, X: ArrayLike, *, T0: object = 0, T1: object = 1, alpha: float = 0.05
    ) -> tuple[Values, Values]:
        """Lower and upper bounds of the effect, of the shape of `effect`.

        Parameters
        ----------
        X : (n, p) with the columns of ``fit``
        T0, T1 : see `effect`
        alpha : share of misses allowed, in (0, 1)
        """
        return self.effect_inference(X, T0=T0, T1=T1).conf_int(alpha)

    def effect_inference(self, X: ArrayLike, *, T0: object = 0, T1: object = 1) -> NormalEffects:
        """Effects with standard errors, tests and a table.

        Parameters
        ----------
        X : (n, p) with the columns of ``fit``
        T0, T1 : see `effect`
        """
        model = self._fitted()
        found = model.effect_inference(X)
        sign = self._signs(T0, T1, len(found.effect))
        point, stderr = self._shaped(_times(sign, found.effect)), self._shaped(np.abs(sign) * found.std)
        return NormalEffects(point, stderr, bounded=model.outcome_ == "binary")

    def const_marginal_effect(self, X: ArrayLike) -> Values:
        """Effect of the treatment against the control: (n, 1), or (n, 1, 1) where Y was a column.

        Parameters
        ----------
        X : (n, p) with the columns of ``fit``
        """
        return self._shaped(self._fitted().effect(X))[..., None]

    def ate(self, X: ArrayLike, *, T0: object = 0, T1: object = 1) -> Any:
        """Average effect over these rows: a number, or (1,) where Y was a column.

        Parameters
        ----------
        X : (n, p) with the columns of ``fit``
        T0, T1 : see `effect`
        """
        return self._averaged(float(self.effect(X, T0=T0, T1=T1).mean()))

    def ate_interval(self, X: ArrayLike, *, T0: object = 0, T1: object = 1, alpha: float = 0.05) -> tuple[Any, Any]:
        """Interval of the average effect: two numbers, or two arrays (1,) where Y was a column.

        Parameters
        ----------
        X : (n, p) with the columns of ``fit``
        T0, T1 : values of the treatment, one each
        alpha : share of misses allowed, in (0, 1)
        """
        sign = self._signs(T0, T1, 1)[0]
        lower, upper = self._fitted().ate_interval(X, alpha)
        if sign < 0:
            lower, upper = -upper, -lower
        return self._averaged(abs(sign) * lower + 0.0), self._averaged(abs(sign) * upper + 0.0)

    def score(self, Y: ArrayLike, T: ArrayLike, X: ArrayLike, W: object = None) -> float:
        """R-loss on these rows: lower is better, as in EconML (and unlike scikit-learn, and ``CIB.score``).

        EconML predicts outcome and treatment by the models of its own first stage; here they are cross-fitted on the
        rows given. So compare scores of one kind only.

        Parameters
        ----------
        Y : (n,) or (n, 1) outcomes
        T : (n,) or (n, 1) treatment
        X : (n, p) with the columns of ``fit``
        W : must be None
        """
        _no_controls(W)
        outcome = np.asarray(Y)
        outcome = outcome[:, 0] if outcome.ndim == 2 and outcome.shape[1] == 1 else outcome
        return -_in_econml_order(lambda: self._fitted().score(X, T, outcome))


def _no_controls(W: object) -> None:
    if W is not None:
        raise InputError(
            "W: controls belong into X here, as every covariate may change the effect; give X=np.hstack([X, W]), at"
            " predictions too"
        )


def _in_econml_order(call: Callable[[], _Value]) -> _Value:
    """Let messages about the order of arguments name the order of this interface."""
    try:
        return call()
    except InputError as error:
        message = str(error)
        named = message.replace("fit(X, treatment, y)", "fit(Y, T, X=X)").replace("y binary", "Y binary")
        if named == message:
            raise
        raise InputError(named) from error


def _times(sign: Float[np.ndarray, " n"], effect: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    # Without a minus before zeros.
    return sign * effect + 0.0


def _arms(given: Any, name: str, values: tuple[Any, Any], rows: int) -> Float[np.ndarray, " n"]:
    """Turn values of the treatment, one or one a row, into 0 and 1."""
    array = np.asarray(given)
    if array.size not in (1, rows) or array.ndim > 2:
        more = f", or one for each of {rows} rows" if rows > 1 else ""
        raise InputError(f"{name}: give one value of the treatment{more}; got an array of shape {array.shape}")
    texts = [str(value) for value in values]
    # Plain 0 and 1, which are the defaults, name the arms where they are not values themselves.
    names: tuple[int, ...] = (0, 1) if not {0, 1} & set(values) else ()
    found: list[float] = []
    for value in array.ravel().tolist():
        places = [place for place in (0, 1) if value == values[place] or str(value) == texts[place]]
        if places:
            found.append(float(places[0]))
        elif isinstance(value, int | float) and value in names:
            found.append(float(value))
        else:
            raise InputError(f"{name}: {value!r} is not a value of the treatment; it has {values[0]!r}, {values[1]!r}")
    return np.broadcast_to(np.array(found), rows)


# ---- causalml


class CausalMLLearner(_Adapter):
    """A :class:`cib_ite.CIB` with the methods of a causalml learner; made by :func:`as_causalml`.

    Effects are (n, 1), one column for the one treatment. Intervals need no bootstrap. Positions are those of causalml
    before 1.0, which announces ``fit(X, y, treatment)``: keywords are safe with both.

    Parameters
    ----------
    estimator : unfitted; `fit` fits a copy
    ate_alpha : share of misses that every interval allows

    Attributes
    ----------
    model_ : the fitted estimator
    t_groups : (1,) the value that means treated
    """

    def __init__(self, estimator: CIB, ate_alpha: float = 0.05) -> None:
        self.estimator = estimator
        self.ate_alpha = ate_alpha

    @property
    def t_groups(self) -> np.ndarray:
        """The value that means treated, ``(1,)``."""
        return np.array([self._fitted().treatment_values_[1]])

    def fit(self, X: ArrayLike, treatment: ArrayLike, y: ArrayLike, p: object = None) -> CausalMLLearner:  # noqa: ARG002
        """Learn from observed treatments and outcomes.

        Parameters
        ----------
        X : (n, d) covariates
        treatment : (n,) 0/1, or two values and a ``control_name``
        y : (n,) outcomes
        p : not used, as in causalml's T-learner: the estimator fits its own propensity

        Raises
        ------
        InputError
            With one line that says what is wrong with which argument.
        """
        self.model_ = _unfitted(self.estimator).fit(X, treatment, y)
        return self

    def predict(
        self,
        X: ArrayLike,
        treatment: object = None,  # noqa: ARG002
        y: object = None,  # noqa: ARG002
        p: object = None,  # noqa: ARG002
        return_components: bool = False,
        verbose: bool = True,  # noqa: ARG002
        return_ci: bool = False,
    ) -> Any:
        """Effect of the treatment on each row.

        Parameters
        ----------
        X : (n, d) with the columns of ``fit``
        treatment, y, p, verbose : not used; causalml logs errors of the outcomes if it is given these
        return_components : also return the outcomes without and with treatment
        return_ci : also return bounds that miss with probability `ate_alpha`

        Returns
        -------
        Effects ``(n, 1)``; with `return_components` also two dictionaries treated value -> ``(n,)``, outcomes without
        treatment and with it; with `return_ci` instead effects, lower and upper bounds, ``(n, 1)`` each.
        """
        if return_components and return_ci:
            raise InputError("return_components, return_ci: ask for one of them at a time")
        model = self._fitted()
        if return_ci:
            found = model.effect_inference(X, check_alpha(self.ate_alpha))
            return found.effect[:, None], found.lower[:, None], found.upper[:, None]
        if return_components:
            outcomes, group = model.predict_outcomes(X), self.t_groups.tolist()[0]
            return (outcomes[:, 1] - outcomes[:, 0])[:, None], {group: outcomes[:, 0]}, {group: outcomes[:, 1]}
        return model.effect(X)[:, None]

    def fit_predict(
        self,
        X: ArrayLike,
        treatment: ArrayLike,
        y: ArrayLike,
        p: object = None,
        return_ci: bool = False,
        *,
        return_components: bool = False,
        verbose: bool = True,  # noqa: ARG002
    ) -> Any:
        """Fit, and predict the same rows.

        Parameters
        ----------
        X, treatment, y, p : see `fit`
        return_ci, return_components, verbose : see `predict`
        """
        return self.fit(X, treatment, y, p).predict(X, return_ci=return_ci, return_components=return_components)

    def estimate_ate(
        self, X: ArrayLike, treatment: ArrayLike, y: ArrayLike, p: object = None, *, pretrain: bool = False
    ) -> tuple[Float[np.ndarray, " 1"], Float[np.ndarray, " 1"], Float[np.ndarray, " 1"]]:
        """Average effect over these rows, and its interval.

        Parameters
        ----------
        X, treatment, y, p : see `fit`
        pretrain : take the learner as it is fitted, instead of fitting it to these rows

        Returns
        -------
        Average, lower and upper bound, ``(1,)`` each; the standard error is that of doubly robust effects of the rows
        that `fit` saw, see ``CIB.ate_interval``.
        """
        if not pretrain:
            self.fit(X, treatment, y, p)
        model = self._fitted()
        lower, upper = model.ate_interval(X, check_alpha(self.ate_alpha))
        return np.array([model.ate(X)]), np.array([lower]), np.array([upper])
