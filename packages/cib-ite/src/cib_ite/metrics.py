"""How good effects are, and how well an uncertainty tells the good ones from the bad.

Three families. *With the true surfaces* (simulated data): `sqrt_pehe`, `ate_error`, `att_error`, `twins_auc`.
*With a randomised subset or nothing at all*: `policy_risk`, `jobs_att_error`, and what may choose hyper-parameters,
`pehe_nn`, `tau_risk_r`, `tau_risk_dr`. *Of the uncertainty*: `spearman`, `withholding_curve`, `policy_risk_curve`,
`sparsification`, `interval_coverage`, `interval_width`, `gaussian_crps`, `gaussian_nll`, `decision_error`,
`deferral_curve`.

Effects are ``mu1 - mu0``, in units of the outcome, or differences of probabilities when the outcome is binary. Sources:
Hill (2011) for PEHE; Shalit, Johansson & Sontag (2017, arXiv:1606.03976) and their evaluation code for the policy risk,
the ATT of Jobs and the nearest-neighbour PEHE; Nie & Wager (2021, arXiv:1712.04912) for the R-loss; Kennedy (2023,
arXiv:2004.14497) for the doubly robust pseudo-outcome; Jesson et al. (2020, arXiv:2007.00163) for withholding by
thresholds found in-sample; Ilg et al. (2018, arXiv:1802.07095) for sparsification. No function depends on the order of
rows that are tied in uncertainty.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shared_core.errors import InputError

__all__ = [
    "DecisionError",
    "DeferralCurve",
    "Nuisances",
    "Sparsification",
    "WithholdingCurve",
    "ate_error",
    "att_error",
    "cross_fit_nuisances",
    "decision_error",
    "deferral_curve",
    "dr_pseudo_outcome",
    "gaussian_crps",
    "gaussian_nll",
    "interval_coverage",
    "interval_width",
    "jobs_att_error",
    "pehe_nn",
    "policy_risk",
    "policy_risk_curve",
    "sparsification",
    "spearman",
    "sqrt_pehe",
    "tau_risk_dr",
    "tau_risk_r",
    "twins_auc",
    "withholding_curve",
]

Vector = NDArray[np.float64]
Outcome = Literal["auto", "continuous", "binary"]
_BLOCK_ELEMENTS = 1 << 22
_DECISIONS = ("treat", "control", "defer")


def _vectors(*, may_be_infinite: tuple[str, ...] = (), **given: ArrayLike) -> list[Vector]:
    """Return what is given as float vectors of one length, without NaN and, unless allowed, infinity."""
    vectors: list[Vector] = []
    first = next(iter(given))
    for name, values in given.items():
        try:
            vector = np.asarray(values, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise InputError(f"{name} holds something that is no number; give one number a row") from error
        if vector.ndim == 2 and vector.shape[1] == 1:
            vector = vector[:, 0]
        if vector.ndim != 1:
            raise InputError(f"{name} has shape {vector.shape}; give one number a row")
        if vectors and len(vector) != len(vectors[0]):
            raise InputError(f"{name} has {len(vector)} rows but {first} has {len(vectors[0])}; give the same rows")
        bad = np.isnan(vector) if name in may_be_infinite else ~np.isfinite(vector)
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            raise InputError(f"{name} is {vector[row]} at row {row}; leave such rows out")
        vectors.append(vector)
    if not len(vectors[0]):
        raise InputError(f"{first} is empty; give at least one row")
    return vectors


def _flags(name: str, values: Vector) -> NDArray[np.bool_]:
    bad = (values != 0) & (values != 1)
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise InputError(f"{name} is {values[row]:g} at row {row}; it must be 0 or 1")
    return values == 1


def _probabilities(name: str, values: Vector) -> Vector:
    bad = (values <= 0) | (values >= 1)
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise InputError(f"{name} is {values[row]:g} at row {row}; clip it into (0, 1), for example to [0.01, 0.99]")
    return values


def _nonnegative(name: str, values: Vector) -> Vector:
    if (values < 0).any():
        row = int(np.flatnonzero(values < 0)[0])
        raise InputError(f"{name} is {values[row]:g} at row {row}; it must not be negative")
    return values


def _fractions(fractions: ArrayLike) -> Vector:
    (shares,) = _vectors(fractions=fractions)
    if (shares < 0).any() or (shares >= 1).any():
        raise InputError(f"fractions run from {shares.min():g} to {shares.max():g}; they must lie in [0, 1)")
    return shares


def _table(X: ArrayLike, rows: int) -> Vector:
    try:
        table = np.asarray(X, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError("X holds something that is no number; encode text and categories as numbers") from error
    if table.ndim != 2 or len(table) != rows:
        raise InputError(f"X has shape {table.shape}; expected ({rows}, columns)")
    if not np.isfinite(table).all():
        row, column = (int(place) for place in np.argwhere(~np.isfinite(table))[0])
        raise InputError(f"X is {table[row, column]} at row {row}, column {column}; fill or leave out such rows")
    return table


def sqrt_pehe(effect: ArrayLike, mu0: ArrayLike, mu1: ArrayLike) -> float:
    """Root of the precision in estimating heterogeneous effects, against the noiseless surfaces.

    ``sqrt(mean((effect - (mu1 - mu0))**2))`` (Hill 2011).

    Parameters
    ----------
    effect : array of shape (n,)
        Estimated effects, both arms predicted.
    mu0, mu1 : arrays of shape (n,)
        True mean outcomes of control and treatment.

    Returns
    -------
    float
        In units of the outcome; 0 is best.

    Examples
    --------
    >>> sqrt_pehe([1.0, 1.0], [0.0, 0.0], [4.0, 1.0]).__round__(4)
    2.1213
    """
    estimate, control, treated = _vectors(effect=effect, mu0=mu0, mu1=mu1)
    return float(np.sqrt(np.mean((estimate - (treated - control)) ** 2)))


def ate_error(effect: ArrayLike, mu0: ArrayLike, mu1: ArrayLike) -> float:
    """Absolute error of the average effect, ``|mean(effect) - mean(mu1 - mu0)|``.

    Parameters
    ----------
    effect, mu0, mu1 : arrays of shape (n,)
        As in `sqrt_pehe`.

    Returns
    -------
    float
        In units of the outcome; 0 is best.

    Examples
    --------
    >>> ate_error([1.0, 1.0], [0.0, 0.0], [4.0, 1.0])
    1.5
    """
    estimate, control, treated = _vectors(effect=effect, mu0=mu0, mu1=mu1)
    return float(abs(estimate.mean() - (treated - control).mean()))


def att_error(effect: ArrayLike, mu0: ArrayLike, mu1: ArrayLike, treatment: ArrayLike) -> float:
    """Absolute error of the average effect among the treated.

    Parameters
    ----------
    effect, mu0, mu1 : arrays of shape (n,)
        As in `sqrt_pehe`.
    treatment : array of shape (n,)
        0 or 1.

    Returns
    -------
    float
        In units of the outcome; 0 is best.

    Examples
    --------
    >>> att_error([1.0, 1.0], [0.0, 0.0], [4.0, 1.0], [1, 0])
    3.0
    """
    estimate, control, treated, arm = _vectors(effect=effect, mu0=mu0, mu1=mu1, treatment=treatment)
    chosen = _flags("treatment", arm)
    if not chosen.any():
        raise InputError("treatment is 0 in every row; the effect on the treated needs treated rows")
    return ate_error(estimate[chosen], control[chosen], treated[chosen])


def _policy_value(policy: NDArray[np.bool_], arm: NDArray[np.bool_], outcome: Vector) -> float:
    treat, control = outcome[policy & arm], outcome[~policy & ~arm]
    share = float(policy.mean())
    value_treat = float(treat.mean()) if len(treat) else 0.0
    value_control = float(control.mean()) if len(control) else 0.0
    return share * value_treat + (1 - share) * value_control


def _randomised(
    effect: ArrayLike, treatment: ArrayLike, y: ArrayLike, randomised: ArrayLike | None
) -> tuple[Vector, NDArray[np.bool_], Vector, NDArray[np.bool_]]:
    estimate, arm, outcome = _vectors(effect=effect, treatment=treatment, y=y)
    inside = np.ones(len(estimate), dtype=np.bool_)
    if randomised is not None:
        inside = _flags("randomised", _vectors(effect=effect, randomised=randomised)[1])
        if not inside.any():
            raise InputError("randomised is 0 in every row; the policy risk needs rows whose treatment was randomised")
    return estimate, _flags("treatment", arm), outcome, inside


def policy_risk(effect: ArrayLike, treatment: ArrayLike, y: ArrayLike, randomised: ArrayLike | None = None) -> float:
    """One less the value of the policy that treats whoever has a positive estimated effect.

    ``1 - [p mean(y | policy=1, t=1) + (1-p) mean(y | policy=0, t=0)]`` on the randomised rows, where the policy is
    ``effect > 0``, ``p`` its mean, and a cell without rows counts 0 (Shalit et al. 2017, section 5, and their code).

    Parameters
    ----------
    effect : array of shape (n,)
        Estimated effects.
    treatment : array of shape (n,)
        0 or 1.
    y : array of shape (n,)
        Observed outcomes, larger is better. The risk lies in [0, 1] when they do.
    randomised : array of shape (n,), optional
        1 where the treatment was randomised; by default everywhere.

    Returns
    -------
    float
        Lower is better.

    Notes
    -----
    An empty cell counting 0 makes a policy look worse than it need be: with few rows, read it with a bootstrap
    interval, beside the risks of treating all (``effect`` of ones) and none (zeros).

    Examples
    --------
    >>> policy_risk([1.0, 1.0, -1.0, -1.0], [1, 0, 1, 0], [1.0, 0.0, 0.0, 1.0])
    0.0
    >>> policy_risk([0.0, 0.0, 0.0, 0.0], [1, 0, 1, 0], [1.0, 0.0, 0.0, 1.0])
    0.5
    """
    estimate, arm, outcome, inside = _randomised(effect, treatment, y, randomised)
    return 1 - _policy_value(estimate[inside] > 0, arm[inside], outcome[inside])


def jobs_att_error(effect: ArrayLike, treatment: ArrayLike, y: ArrayLike, randomised: ArrayLike) -> float:
    """Absolute error of the effect on the treated against an experiment's difference of means.

    Truth: ``mean(y | t=1) - mean(y | t=0, randomised)``; estimate: the mean effect over ``t=1, randomised`` (Shalit et
    al. 2017, section 5, and their code).

    Parameters
    ----------
    effect, treatment, y : arrays of shape (n,)
        As in `policy_risk`.
    randomised : array of shape (n,)
        1 in the rows of the experiment; needs treated and control rows there.

    Returns
    -------
    float
        In units of the outcome; 0 is best.

    Examples
    --------
    >>> jobs_att_error([0.5, 0.0, 0.0], [1, 0, 0], [1.0, 0.25, 0.0], [1, 1, 0])
    0.25
    """
    estimate, arm, outcome, inside = _randomised(effect, treatment, y, randomised)
    treated, control = arm & inside, ~arm & inside
    if not treated.any() or not control.any():
        raise InputError(
            f"randomised holds {int(treated.sum())} treated and {int(control.sum())} control rows; "
            "the experimental effect needs both"
        )
    return float(abs(estimate[treated].mean() - (outcome[arm].mean() - outcome[control].mean())))


def pehe_nn(effect: ArrayLike, X: ArrayLike, treatment: ArrayLike, y: ArrayLike) -> float:
    """Root PEHE of the treated rows, the nearest control's outcome standing in for the counterfactual.

    ``sqrt(mean_{t=1}((effect_i - (y_i - y_{j(i)}))**2))``, ``j(i)`` the control row nearest to i in Euclidean distance,
    the first of equally near ones (Shalit et al. 2017, and their code). Needs no truth: usable for tuning.

    Parameters
    ----------
    effect : array of shape (n,)
        Estimated effects.
    X : array of shape (n, p)
        Covariates, on the scale in which distance is meant (standardise them).
    treatment, y : arrays of shape (n,)
        As in `policy_risk`; both arms must be present.

    Returns
    -------
    float
        In units of the outcome. Holds the noise of two outcomes, so its minimum is not 0.

    Examples
    --------
    >>> pehe_nn([1.0, 0.0, 0.0], [[0.0], [0.1], [5.0]], [1, 0, 0], [3.0, 1.0, 9.0])
    1.0
    """
    estimate, arm, outcome = _vectors(effect=effect, treatment=treatment, y=y)
    table = _table(X, len(estimate))
    treated = _flags("treatment", arm)
    if treated.all() or not treated.any():
        raise InputError(f"treatment is {int(treated[0])} in every row; neighbours across arms need both")
    rows, controls = np.flatnonzero(treated), np.flatnonzero(~treated)
    nearest = np.empty(len(rows), dtype=np.intp)
    block = max(1, _BLOCK_ELEMENTS // max(1, len(controls)))
    for start in range(0, len(rows), block):
        part = table[rows[start : start + block]]
        distance = np.zeros((len(part), len(controls)))
        # A column at a time: the expanded form x² - 2xy + y² would break ties by rounding.
        for column in range(table.shape[1]):
            distance += np.subtract.outer(part[:, column], table[controls, column]) ** 2
        nearest[start : start + block] = controls[distance.argmin(axis=1)]
    return float(np.sqrt(np.mean((estimate[rows] - (outcome[rows] - outcome[nearest])) ** 2)))


def tau_risk_r(
    effect: ArrayLike, treatment: ArrayLike, y: ArrayLike, outcome_mean: ArrayLike, propensity: ArrayLike
) -> float:
    """R-loss of an effect, given cross-fitted nuisances.

    ``mean((y - m(x) - (t - e(x)) effect)**2)`` (Nie & Wager 2021, equation 4). Its minimiser is the true effect, whose
    value is the variance of the noise.

    Parameters
    ----------
    effect, treatment, y : arrays of shape (n,)
        As in `policy_risk`.
    outcome_mean : array of shape (n,)
        ``m(x) = E[y | x]``, not fitted on the row itself.
    propensity : array of shape (n,)
        ``e(x) = P(t=1 | x)``, in [0, 1], not fitted on the row itself.

    Returns
    -------
    float
        In squared units of the outcome; lower is better, differences between methods matter only.

    Examples
    --------
    >>> tau_risk_r([2.0, 2.0], [1, 0], [2.0, 0.0], [1.0, 1.0], [0.5, 0.5])
    0.0
    """
    estimate, arm, outcome, mean, score = _vectors(
        effect=effect, treatment=treatment, y=y, outcome_mean=outcome_mean, propensity=propensity
    )
    _flags("treatment", arm)
    if (score < 0).any() or (score > 1).any():
        raise InputError(f"propensity runs from {score.min():g} to {score.max():g}; it must lie in [0, 1]")
    return float(np.mean((outcome - mean - (arm - score) * estimate) ** 2))


def dr_pseudo_outcome(
    treatment: ArrayLike, y: ArrayLike, mu0: ArrayLike, mu1: ArrayLike, propensity: ArrayLike
) -> Vector:
    """Doubly robust pseudo-outcome: its mean given x is the effect if either nuisance is right.

    ``mu1 - mu0 + (t - e) / (e (1 - e)) (y - mu_t)`` (Kennedy 2023, equation 2).

    Parameters
    ----------
    treatment, y : arrays of shape (n,)
        0 or 1, and observed outcomes.
    mu0, mu1 : arrays of shape (n,)
        Estimated mean outcomes of the arms, not fitted on the row itself.
    propensity : array of shape (n,)
        ``P(t=1 | x)``, strictly between 0 and 1, not fitted on the row itself.

    Returns
    -------
    ndarray of shape (n,)
        In units of the outcome.

    Examples
    --------
    >>> dr_pseudo_outcome([1, 0], [3.0, 1.0], [0.0, 1.0], [1.0, 2.0], [0.5, 0.5])
    array([5., 1.])
    """
    arm, outcome, control, treated, score = _vectors(treatment=treatment, y=y, mu0=mu0, mu1=mu1, propensity=propensity)
    factual = np.where(_flags("treatment", arm), treated, control)
    _probabilities("propensity", score)
    return treated - control + (arm - score) / (score * (1 - score)) * (outcome - factual)


def tau_risk_dr(effect: ArrayLike, pseudo_outcome: ArrayLike) -> float:
    """Mean squared distance of an effect to the doubly robust pseudo-outcome.

    Parameters
    ----------
    effect : array of shape (n,)
        Estimated effects.
    pseudo_outcome : array of shape (n,)
        From `dr_pseudo_outcome`, with cross-fitted nuisances.

    Returns
    -------
    float
        In squared units of the outcome; lower is better, differences between methods matter only.

    Examples
    --------
    >>> tau_risk_dr([1.0, 2.0], [1.0, 4.0])
    2.0
    """
    estimate, target = _vectors(effect=effect, pseudo_outcome=pseudo_outcome)
    return float(np.mean((estimate - target) ** 2))


@dataclass(frozen=True)
class Nuisances:
    """What `cross_fit_nuisances` predicts for every row from models that have not seen it.

    Attributes
    ----------
    outcome_mean : ndarray of shape (n,)
        ``m(x) = E[y | x]``.
    propensity : ndarray of shape (n,)
        ``e(x) = P(t=1 | x)``, clipped.
    mu0, mu1 : ndarrays of shape (n,)
        ``E[y | x, t]``; for a row's own arm, too, from folds without it.
    chosen : mapping of str to str
        "linear" or "boosting", for each of the four.
    loss : mapping of str to float
        Out-of-fold loss of the chosen one: squared error, or log loss in nats for probabilities.
    """

    outcome_mean: Vector
    propensity: Vector
    mu0: Vector
    mu1: Vector
    chosen: Mapping[str, str]
    loss: Mapping[str, float]


def _candidates(binary: bool, seed: int) -> dict[str, Callable[[], Any]]:
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
    from sklearn.linear_model import LogisticRegression, RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    # Small on purpose: folds hold a few hundred rows, and nuisances that overfit make a noisy judge.
    boosting: dict[str, Any] = {"max_iter": 60, "max_leaf_nodes": 8, "min_samples_leaf": 10, "early_stopping": False}
    if binary:
        return {
            "linear": lambda: make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
            "boosting": lambda: HistGradientBoostingClassifier(**boosting, random_state=seed),
        }
    return {
        "linear": lambda: make_pipeline(StandardScaler(), RidgeCV(np.logspace(-1, 3, 9))),
        "boosting": lambda: HistGradientBoostingRegressor(**boosting, random_state=seed),
    }


def _predict(make: Callable[[], Any], X: Vector, target: Vector, X_new: Vector, binary: bool) -> Vector:
    # A fold may hold one class only; what it says then is that class.
    if binary and target.min() == target.max():
        return np.full(len(X_new), target[0])
    model = make().fit(X, target)
    predicted = model.predict_proba(X_new)[:, 1] if binary else model.predict(X_new)
    return np.asarray(predicted, dtype=np.float64)


def _loss(target: Vector, predicted: Vector, binary: bool) -> float:
    if not binary:
        return float(np.mean((target - predicted) ** 2))
    share = predicted.clip(1e-6, 1 - 1e-6)
    return float(-np.mean(np.where(target == 1, np.log(share), np.log(1 - share))))


def cross_fit_nuisances(
    X: ArrayLike,
    treatment: ArrayLike,
    y: ArrayLike,
    *,
    outcome: Outcome = "auto",
    folds: int = 5,
    seed: int = 0,
    clip: float = 0.01,
) -> Nuisances:
    """Predict outcome mean, propensity and both arms' outcomes of each row from models fitted on the other folds.

    Each nuisance is made by a linear model (ridge or logistic regression) and by gradient boosting; the one with the
    smaller out-of-fold loss is taken, for that nuisance.

    Parameters
    ----------
    X : array of shape (n, p)
        Covariates, finite.
    treatment, y : arrays of shape (n,)
        0 or 1, and observed outcomes.
    outcome : {"auto", "continuous", "binary"}, default "auto"
        "auto" takes an outcome of only 0 and 1 as binary.
    folds : int, default 5
        At least 2; stratified by treatment, and by a binary outcome where each cell has enough rows.
    seed : int, default 0
        Same seed, same nuisances.
    clip : float, default 0.01
        The propensity is clipped to ``[clip, 1 - clip]``.

    Returns
    -------
    Nuisances

    Raises
    ------
    InputError
        Shapes that differ, NaN, an arm with fewer rows than folds, a "binary" outcome that is not.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> x, t = rng.normal(size=(200, 1)), rng.integers(0, 2, 200)
    >>> found = cross_fit_nuisances(x, t, 3 * x[:, 0] + t, folds=2)
    >>> found.chosen["mu1"], float((found.mu1 - found.mu0).mean().round(1))
    ('linear', 1.0)
    """
    from sklearn.model_selection import StratifiedKFold

    arm, target = _vectors(treatment=treatment, y=y)
    table = _table(X, len(arm))
    treated = _flags("treatment", arm)
    if outcome not in ("auto", "continuous", "binary"):
        raise InputError(f"outcome is {outcome!r}; choose auto, continuous or binary")
    binary = bool(np.isin(target, (0, 1)).all()) if outcome == "auto" else outcome == "binary"
    if binary:
        _flags("y", target)
    if folds < 2:
        raise InputError(f"folds is {folds}; cross-fitting needs at least 2")
    if not 0 < clip < 0.5:
        raise InputError(f"clip is {clip:g}; it must lie in (0, 0.5)")
    smaller = int(min(treated.sum(), (~treated).sum()))
    if smaller < folds:
        raise InputError(f"treatment has an arm of {smaller} rows; {folds} folds need {folds} rows in each arm")
    strata = arm + 2 * target if binary else arm
    if np.unique(strata, return_counts=True)[1].min() < folds:
        strata = arm
    splits = list(StratifiedKFold(folds, shuffle=True, random_state=seed).split(table, strata))
    everyone = np.ones(len(arm), dtype=np.bool_)
    tasks: dict[str, tuple[Vector, NDArray[np.bool_], bool]] = {
        "outcome_mean": (target, everyone, binary),
        "propensity": (arm, everyone, True),
        "mu0": (target, ~treated, binary),
        "mu1": (target, treated, binary),
    }
    best: dict[str, Vector] = {}
    chosen: dict[str, str] = {}
    loss: dict[str, float] = {}
    for name, (values, rows, is_probability) in tasks.items():
        for kind, make in _candidates(is_probability, seed).items():
            predicted = np.empty(len(arm))
            for fit, held_out in splits:
                used = fit[rows[fit]]
                predicted[held_out] = _predict(make, table[used], values[used], table[held_out], is_probability)
            found = _loss(values[rows], predicted[rows], is_probability)
            if name not in loss or found < loss[name]:
                best[name], chosen[name], loss[name] = predicted, kind, found
    best["propensity"] = best["propensity"].clip(clip, 1 - clip)
    return Nuisances(**best, chosen=chosen, loss=loss)


def _ranks(values: Vector) -> Vector:
    """Ranks from 1, ties at their mean."""
    _, inverse, sizes = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(sizes) - (sizes - 1) / 2)[inverse]


def _auc(score: Vector, positive: NDArray[np.bool_], where: str) -> float:
    n_positive = int(positive.sum())
    n_negative = len(positive) - n_positive
    if not n_positive or not n_negative:
        raise InputError(f"the {where} outcomes are all {int(positive[0])}; an AUC needs both classes")
    above = _ranks(score)[positive].sum() - n_positive * (n_positive + 1) / 2
    return float(above / (n_positive * n_negative))


def twins_auc(
    mu0_hat: ArrayLike, mu1_hat: ArrayLike, y0: ArrayLike, y1: ArrayLike, treatment: ArrayLike
) -> dict[str, float]:
    """Areas under the ROC curve of predicted potential outcomes, where both outcomes of a pair are known.

    Parameters
    ----------
    mu0_hat, mu1_hat : arrays of shape (n,)
        Predicted probabilities (or scores) of the outcome under control and treatment.
    y0, y1 : arrays of shape (n,)
        Both outcomes, 0 or 1.
    treatment : array of shape (n,)
        0 or 1; tells the factual outcome from the counterfactual.

    Returns
    -------
    dict
        ``"both"``: over all 2n predictions; ``"factual"`` and ``"counterfactual"``: over n each. 1 is best, 0.5 is
        chance.

    Notes
    -----
    Papers that report Twins by AUC do not say which of the three they mean; say it when you compare.

    Examples
    --------
    >>> twins_auc([0.1, 0.8], [0.2, 0.9], [0, 1], [0, 1], [1, 0])["both"]
    1.0
    """
    hat0, hat1, out0, out1, arm = _vectors(mu0_hat=mu0_hat, mu1_hat=mu1_hat, y0=y0, y1=y1, treatment=treatment)
    hit0, hit1, treated = _flags("y0", out0), _flags("y1", out1), _flags("treatment", arm)
    return {
        "both": _auc(np.concatenate([hat0, hat1]), np.concatenate([hit0, hit1]), "potential"),
        "factual": _auc(np.where(treated, hat1, hat0), np.where(treated, hit1, hit0), "factual"),
        "counterfactual": _auc(np.where(treated, hat0, hat1), np.where(treated, hit0, hit1), "counterfactual"),
    }


def spearman(uncertainty: ArrayLike, error: ArrayLike) -> float:
    """Rank correlation of an uncertainty with the size of the error it should foretell.

    Parameters
    ----------
    uncertainty : array of shape (n,)
        Any score, larger is less certain.
    error : array of shape (n,)
        Errors of the effect; their sign is ignored.

    Returns
    -------
    float
        In [-1, 1]; 1 is best. 0 where either is constant: it then ranks nothing.

    Examples
    --------
    >>> spearman([0.1, 0.2, 0.3], [1.0, -2.0, 3.0])
    1.0
    """
    score, signed = _vectors(uncertainty=uncertainty, error=error)
    a, b = _ranks(score), _ranks(np.abs(signed))
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale > 0 else 0.0


@dataclass(frozen=True)
class WithholdingCurve:
    """Quality of the rows that are kept when the most uncertain are withheld.

    Attributes
    ----------
    fractions : ndarray of shape (f,)
        Share of the reference rows that each threshold withholds.
    withheld : ndarray of shape (f,)
        Share of the rows at hand that it withheld: less under ties, other than ``fractions`` under a shift.
    curve : ndarray of shape (f,)
        Root PEHE (`withholding_curve`) or policy risk (`policy_risk_curve`) of the rows kept; NaN where none is.
    """

    fractions: Vector
    withheld: Vector
    curve: Vector


def _withhold(
    score: Vector, fractions: ArrayLike, reference: ArrayLike | None, measure: Callable[[NDArray[np.bool_]], float]
) -> WithholdingCurve:
    shares = _fractions(fractions)
    known = score if reference is None else _vectors(reference=reference)[0]
    thresholds = np.quantile(known, 1 - shares)
    # Nobody is withheld at 0, not even a row beyond all that was seen in-sample.
    thresholds[shares == 0] = np.inf
    kept = [score <= threshold for threshold in thresholds]
    return WithholdingCurve(
        shares,
        np.array([1 - rows.mean() for rows in kept]),
        np.array([measure(rows) if rows.any() else np.nan for rows in kept]),
    )


def withholding_curve(
    uncertainty: ArrayLike, error_squared: ArrayLike, fractions: ArrayLike, reference: ArrayLike | None = None
) -> WithholdingCurve:
    """Root PEHE of the rows kept by thresholds on the uncertainty.

    A row is kept when its uncertainty does not exceed the quantile ``1 - fraction`` of the reference (Jesson et al.
    2020): found in-sample, the thresholds can be used on one new row, where a ranking cannot.

    Parameters
    ----------
    uncertainty : array of shape (n,)
        Any score, larger is less certain.
    error_squared : array of shape (n,)
        Squared errors of the effect.
    fractions : array of shape (f,)
        Shares to withhold, in [0, 1).
    reference : array of shape (m,), optional
        Uncertainties of the in-sample rows; by default ``uncertainty`` itself.

    Returns
    -------
    WithholdingCurve

    Examples
    --------
    >>> withholding_curve([1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 9.0], [0.0, 0.25]).curve.round(4)
    array([1.7321, 1.    ])
    """
    score, squares = _vectors(uncertainty=uncertainty, error_squared=error_squared)
    _nonnegative("error_squared", squares)
    return _withhold(score, fractions, reference, lambda kept: float(np.sqrt(squares[kept].mean())))


def policy_risk_curve(
    effect: ArrayLike,
    uncertainty: ArrayLike,
    treatment: ArrayLike,
    y: ArrayLike,
    fractions: ArrayLike,
    randomised: ArrayLike | None = None,
    reference: ArrayLike | None = None,
) -> WithholdingCurve:
    """Policy risk of the rows kept by thresholds on the uncertainty.

    Parameters
    ----------
    effect, treatment, y, randomised : arrays of shape (n,)
        As in `policy_risk`; only randomised rows count.
    uncertainty, fractions, reference : arrays
        As in `withholding_curve`.

    Returns
    -------
    WithholdingCurve

    Examples
    --------
    >>> policy_risk_curve([1.0, -1.0, 1.0], [0.1, 0.2, 0.9], [1, 0, 1], [1.0, 1.0, 0.0], [0.0, 0.3]).curve.round(4)
    array([0.3333, 0.    ])
    """
    estimate, arm, outcome, inside = _randomised(effect, treatment, y, randomised)
    score = _vectors(effect=effect, uncertainty=uncertainty)[1][inside]
    estimate, arm, outcome = estimate[inside], arm[inside], outcome[inside]
    return _withhold(
        score, fractions, reference, lambda kept: 1 - _policy_value(estimate[kept] > 0, arm[kept], outcome[kept])
    )


def _mean_of_kept(score: Vector, values: Vector, kept: Vector) -> Vector:
    """Mean of ``values`` over the ``kept`` rows of smallest ``score``, in expectation over the order of tied rows."""
    _, inverse, sizes = np.unique(score, return_inverse=True, return_counts=True)
    count = np.concatenate([[0.0], np.cumsum(sizes)])
    total = np.concatenate([[0.0], np.cumsum(np.bincount(inverse, weights=values))])
    return np.interp(kept, count, total) / kept


def _area(heights: Vector, places: Vector) -> float:
    return float(np.sum(np.diff(places) * (heights[1:] + heights[:-1]) / 2))


@dataclass(frozen=True)
class Sparsification:
    """Root PEHE as more and more of the most uncertain rows are withheld, between two reference curves.

    Attributes
    ----------
    fractions : ndarray of shape (f,)
        Shares withheld, rising from 0.
    curve : ndarray of shape (f,)
        Root PEHE of the rows kept, in units of the outcome.
    random : ndarray of shape (f,)
        The same when rows are withheld at random (flat: the expected mean square does not change).
    oracle : ndarray of shape (f,)
        The same when the rows of largest error are withheld.
    ause : float
        Area between ``curve`` and ``oracle``; 0 is best.
    ause_random : float
        Area between ``random`` and ``oracle``: an uncertainty of use has an ``ause`` below it.
    """

    fractions: Vector
    curve: Vector
    random: Vector
    oracle: Vector
    ause: float
    ause_random: float


def sparsification(uncertainty: ArrayLike, error: ArrayLike, fractions: ArrayLike | None = None) -> Sparsification:
    """Withhold rows from the most to the least uncertain, and compare with an oracle and with chance.

    The area under the sparsification error (AUSE) of Ilg et al. (2018), not normalised: areas are in units of the
    outcome, by the trapezoid rule over ``fractions``.

    Parameters
    ----------
    uncertainty : array of shape (n,)
        Any score, larger is less certain.
    error : array of shape (n,)
        Errors of the effect; their sign is ignored.
    fractions : array of shape (f,), optional
        Rising shares to withhold, in [0, 1); by default ``0, 1/n, ..., (n-1)/n``.

    Returns
    -------
    Sparsification

    Examples
    --------
    >>> result = sparsification([1.0, 2.0, 3.0], [0.0, 0.0, -3.0])
    >>> result.ause, round(result.ause_random, 4)
    (0.0, 0.866)
    """
    score, signed = _vectors(uncertainty=uncertainty, error=error)
    n = len(score)
    shares = np.arange(n) / n if fractions is None else _fractions(fractions)
    if (np.diff(shares) <= 0).any():
        raise InputError("fractions must rise; sort them and leave out repeated ones")
    squares = signed**2
    kept = n * (1 - shares)
    curve = np.sqrt(_mean_of_kept(score, squares, kept))
    oracle = np.sqrt(_mean_of_kept(squares, squares, kept))
    random = np.full_like(curve, np.sqrt(squares.mean()))
    return Sparsification(
        shares,
        curve,
        random,
        oracle,
        _area(curve - oracle, shares),
        _area(random - oracle, shares),
    )


def _intervals(**given: ArrayLike) -> list[Vector]:
    vectors = _vectors(may_be_infinite=("lower", "upper"), **given)
    low, high = vectors[:2]
    if (low > high).any():
        row = int(np.flatnonzero(low > high)[0])
        raise InputError(f"lower is {low[row]:g} above upper {high[row]:g} at row {row}; were they swapped?")
    return vectors


def interval_coverage(lower: ArrayLike, upper: ArrayLike, truth: ArrayLike) -> float:
    """Share of rows whose truth lies in the closed interval.

    Parameters
    ----------
    lower, upper : arrays of shape (n,)
        Ends of the intervals; infinity is allowed.
    truth : array of shape (n,)
        True effects, ``mu1 - mu0`` for an interval of the CATE, ``y1 - y0`` for one of the individual difference.

    Returns
    -------
    float
        In [0, 1]; best near the nominal level. Read it with `interval_width`: infinite intervals cover everything.

    Examples
    --------
    >>> interval_coverage([0.0, 0.0], [1.0, 1.0], [1.0, 2.0])
    0.5
    """
    low, high, target = _intervals(lower=lower, upper=upper, truth=truth)
    return float(np.mean((low <= target) & (target <= high)))


def interval_width(lower: ArrayLike, upper: ArrayLike) -> float:
    """Mean width of intervals.

    Parameters
    ----------
    lower, upper : arrays of shape (n,)
        Ends of the intervals; infinity is allowed.

    Returns
    -------
    float
        In units of the outcome; infinite if one interval is.

    Examples
    --------
    >>> interval_width([0.0, 0.0], [1.0, 3.0])
    2.0
    """
    low, high = _intervals(lower=lower, upper=upper)
    if (np.isinf(low) & (low == high)).any():
        raise InputError("an interval runs from infinity to the same infinity; it holds no number")
    return float(np.mean(high - low))


def gaussian_crps(mean: ArrayLike, std: ArrayLike, truth: ArrayLike) -> float:
    """Average continuous ranked probability score of normal predictions.

    ``std (z (2 Phi(z) - 1) + 2 phi(z) - 1/sqrt(pi))`` with ``z = (truth - mean)/std`` (Gneiting & Raftery 2007,
    equation 21); the absolute error where ``std`` is 0.

    Parameters
    ----------
    mean, std : arrays of shape (n,)
        Of the predicted normal distributions; ``std`` not negative.
    truth : array of shape (n,)
        True effects.

    Returns
    -------
    float
        In units of the outcome; lower is better.

    Examples
    --------
    >>> gaussian_crps([0.0, 0.0], [0.0, 1.0], [2.0, 0.0]).__round__(4)
    1.1168
    """
    from scipy.special import ndtr

    center, spread, target = _vectors(mean=mean, std=std, truth=truth)
    _nonnegative("std", spread)
    safe = np.where(spread > 0, spread, 1.0)
    z = (target - center) / safe
    density = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
    score = safe * (z * (2 * ndtr(z) - 1) + 2 * density - 1 / np.sqrt(np.pi))
    return float(np.mean(np.where(spread > 0, score, np.abs(target - center))))


def gaussian_nll(mean: ArrayLike, std: ArrayLike, truth: ArrayLike) -> float:
    """Average negative log-density of the truth under normal predictions.

    Parameters
    ----------
    mean, std : arrays of shape (n,)
        Of the predicted normal distributions; ``std`` positive.
    truth : array of shape (n,)
        True effects.

    Returns
    -------
    float
        In nats, with the constant ``log(2 pi)/2``; lower is better.

    Examples
    --------
    >>> gaussian_nll([0.0], [1.0], [0.0]).__round__(4)
    0.9189
    """
    center, spread, target = _vectors(mean=mean, std=std, truth=truth)
    if (spread <= 0).any():
        row = int(np.flatnonzero(spread <= 0)[0])
        raise InputError(f"std is {spread[row]:g} at row {row}; a density needs a positive one")
    return float(np.mean(((target - center) / spread) ** 2 / 2 + np.log(spread) + np.log(2 * np.pi) / 2))


@dataclass(frozen=True)
class DecisionError:
    """How often decisions were wrong, and how often none was made.

    Attributes
    ----------
    wrong_rate : float
        Among the rows decided; NaN if every row was deferred.
    deferral_rate : float
        Share of all rows.
    """

    wrong_rate: float
    deferral_rate: float


def _wrong(treat: NDArray[np.bool_], true_effect: Vector, cost: float) -> NDArray[np.bool_]:
    # Where the effect is exactly the cost, either decision is right.
    return np.where(treat, true_effect < cost, true_effect > cost)


def decision_error(decision: ArrayLike, true_effect: ArrayLike, cost: float = 0.0) -> DecisionError:
    """Judge decisions by the true effects.

    To treat is wrong where the true effect is below the cost of treating, not to treat where it is above.

    Parameters
    ----------
    decision : array of str of shape (n,)
        "treat", "control" or "defer".
    true_effect : array of shape (n,)
        True effects, larger is better.
    cost : float, default 0.0
        Of treating, in units of the outcome.

    Returns
    -------
    DecisionError

    Examples
    --------
    >>> decision_error(["treat", "control", "defer", "treat"], [1.0, 1.0, 1.0, 1.0])
    DecisionError(wrong_rate=0.3333333333333333, deferral_rate=0.25)
    """
    (target,) = _vectors(true_effect=true_effect)
    made = np.asarray(decision)
    if made.shape != target.shape:
        raise InputError(f"decision has shape {made.shape} but true_effect has {len(target)} rows; give one for each")
    unknown = ~np.isin(made, _DECISIONS)
    if unknown.any():
        row = int(np.flatnonzero(unknown)[0])
        raise InputError(f"decision is {made[row]!r} at row {row}; it must be treat, control or defer")
    deferred = made == "defer"
    wrong = _wrong(made == "treat", target, cost)[~deferred]
    return DecisionError(float(wrong.mean()) if len(wrong) else float("nan"), float(deferred.mean()))


@dataclass(frozen=True)
class DeferralCurve:
    """Share of wrong decisions as more and more rows are deferred.

    Attributes
    ----------
    fractions : ndarray of shape (f,)
        Shares deferred.
    wrong_rate : ndarray of shape (f,)
        Among the rows decided.
    """

    fractions: Vector
    wrong_rate: Vector


def deferral_curve(
    effect: ArrayLike, uncertainty: ArrayLike, true_effect: ArrayLike, cost: float, fractions: ArrayLike
) -> DeferralCurve:
    """Treat where the estimated effect exceeds the cost, defer the most uncertain rows, and count what is wrong.

    Parameters
    ----------
    effect, true_effect : arrays of shape (n,)
        Estimated and true effects, larger is better.
    uncertainty : array of shape (n,)
        Larger is deferred first. For decisions ``std / |effect - cost|`` is the natural score.
    cost : float
        Of treating, in units of the outcome.
    fractions : array of shape (f,)
        Shares to defer, in [0, 1).

    Returns
    -------
    DeferralCurve

    Examples
    --------
    >>> deferral_curve([1.0, 1.0, -1.0, 2.0], [1.0, 9.0, 1.0, 1.0], [1.0, -1.0, -1.0, 1.0], 0.0, [0.0, 0.25]).wrong_rate
    array([0.25, 0.  ])
    """
    estimate, score, target = _vectors(effect=effect, uncertainty=uncertainty, true_effect=true_effect)
    shares = _fractions(fractions)
    wrong = _wrong(estimate > cost, target, cost).astype(np.float64)
    return DeferralCurve(shares, _mean_of_kept(score, wrong, len(score) * (1 - shares)))
