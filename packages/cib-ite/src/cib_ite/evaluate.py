"""Judge a fitted estimator on a table: by true effects where they are known, by a trial, or by outcomes alone.

What can be measured depends on the table, and what cannot is left out rather than guessed:

* with `mu0` and `mu1`: errors of the effects, what its uncertainty says about them, coverage of the intervals, and how
  many decisions were wrong;
* with `y_counterfactual`: intervals of the individual difference and, if outcomes are binary, the AUC of both outcomes;
* with `randomised`: the policy risk, with bootstrap intervals and beside the policies that treat everybody or nobody;
* with nothing but treatment and outcome: the factual error, R-loss and DR-loss, the doubly robust average effect, and
  whether the factual error falls when uncertain rows are withheld.

On the very rows that a :class:`~cib_ite.estimator.CIB` was fitted to, everything factual is measured with the
predictions of members that had not seen the row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cib_ite import metrics as measure
from cib_ite.calibration import check_alpha, normal_quantile
from cib_ite.data import EffectTable
from cib_ite.metrics import DeferralCurve, Nuisances, Sparsification, WithholdingCurve
from cib_ite.overlap import auc
from shared_core.errors import InputError

if TYPE_CHECKING:
    import pandas as pd


__all__ = ["CalibrationCurve", "Evaluation", "as_rows", "evaluate_model", "in_words", "is_training_table"]

Vector = NDArray[np.float64]
_LEVELS = (0.5, 0.8, 0.9, 0.95)
_FINE_LEVELS = tuple(np.round(np.linspace(0.05, 0.95, 19), 2).tolist())
_BOOTSTRAPS = 500
_CLIP = 0.02
_ABBREVIATIONS = {"aipw", "ate", "att", "auc", "auroc", "ause", "cate", "crps", "dr", "ite", "nll", "pehe", "r", "rmse"}
_SPELLED = {
    "auroc_rate": "AUROC of the rate",
    "decide_wrong": "wrong decisions as decided",
    "jobs_att_error": "ATT error",
    "sqrt_pehe_normalised": "sqrt PEHE / sd",
    "wrong_decisions_20": "wrong decisions, 20 % deferred",
}
_PHRASES = {
    "threshold_20_ratio": "withholding_by_threshold_20",
    "withhold_20_ratio": "withholding_20",
    "_seen": ",_seen",
    "_unseen": ",_unseen",
}


def in_words(metric: str) -> str:
    """Write a metric's name as tables have it: words in lower case, abbreviations in upper case, levels in percent.

    Parameters
    ----------
    metric : a key of :attr:`Evaluation.metrics`, or of :class:`~cib_ite.experiments.Shift`

    Examples
    --------
    >>> [in_words(name) for name in ("sqrt_pehe_seen", "cate_coverage_90", "factual_withhold_20_ratio", "r_loss")]
    ['sqrt PEHE, seen', 'CATE coverage 90 %', 'factual withholding 20 %', 'R loss']
    """
    if metric in _SPELLED:
        return _SPELLED[metric]
    for phrase, spelled in _PHRASES.items():
        metric = metric.replace(phrase, spelled)
    words = [word.upper() if word.rstrip(",") in _ABBREVIATIONS else word for word in metric.split("_")]
    return " ".join(f"{word} %" if word.isdigit() else word for word in words)


@dataclass(frozen=True, eq=False)
class CalibrationCurve:
    """How often intervals of the effect hold it, against how often they say they do.

    Parameters
    ----------
    nominal : (k,) shares that the intervals claim to cover, rising
    measured : (k,) shares that they cover
    width : (k,) their mean widths, in units of the outcome
    """

    nominal: Vector
    measured: Vector
    width: Vector


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a table says about a fitted estimator.

    Parameters
    ----------
    data : name of the table
    n : its rows
    alpha : share of misses that intervals allow
    cost : of treating, in units of the outcome
    in_sample : the table is the one the model was fitted to
    metrics : name -> finite number; what the table cannot tell is left out
    withholding : errors of the rows kept as the most uncertain are withheld, between chance and an oracle:
        ``effect`` (root PEHE), ``factual`` (root mean squared error of the outcome seen), ``r_loss`` (root R-loss)
    calibration : of the intervals of the conditional effect
    deferral : share of wrong decisions as more and more rows are deferred, the most doubtful first
    policy : policy risk of the rows kept
    pseudo_effect : (n,) doubly robust effect of each row, NaN where no member had held it out
    """

    data: str
    n: int
    alpha: float
    cost: float
    in_sample: bool
    metrics: dict[str, float]
    withholding: Mapping[str, Sparsification]
    calibration: CalibrationCurve | None = None
    deferral: DeferralCurve | None = None
    policy: WithholdingCurve | None = None
    pseudo_effect: Vector | None = None

    def to_frame(self) -> pd.DataFrame:
        """Return every curve as one long table with the columns ``curve, x, y``."""
        import pandas as pd

        lines: list[tuple[str, Vector, Vector]] = []
        for name, found in self.withholding.items():
            lines += [(f"withholding/{name}", found.fractions, found.curve)]
            lines += [(f"withholding/{name}/random", found.fractions, found.random)]
            lines += [(f"withholding/{name}/oracle", found.fractions, found.oracle)]
        if self.calibration is not None:
            lines += [("calibration/coverage", self.calibration.nominal, self.calibration.measured)]
            lines += [("calibration/width", self.calibration.nominal, self.calibration.width)]
        if self.deferral is not None:
            lines += [("deferral", self.deferral.fractions, self.deferral.wrong_rate)]
        if self.policy is not None:
            lines += [("policy_risk", self.policy.fractions, self.policy.curve)]
        columns = {
            "curve": np.concatenate([np.repeat(name, len(x)) for name, x, _ in lines] or [np.zeros(0, dtype=str)]),
            "x": np.concatenate([x for _, x, _ in lines] or [np.zeros(0)]),
            "y": np.concatenate([y for _, _, y in lines] or [np.zeros(0)]),
        }
        return pd.DataFrame(columns)


@dataclass(frozen=True, eq=False)
class _Predicted:
    """What an estimator says about the rows of a table; None where it does not say it."""

    effect: Vector
    outcome: Vector
    std: Vector | None
    uncertainty: Vector | None
    ite: tuple[Vector, Vector] | None
    propensity: Vector | None
    flags: tuple[NDArray[np.bool_], NDArray[np.bool_]] | None


@dataclass(frozen=True, eq=False)
class _Factual:
    """Predictions of rows by what has not seen them: positions, both outcomes (k, 2) and effect (k,)."""

    rows: NDArray[np.int64]
    outcome: Vector
    effect: Vector


def evaluate_model(
    model: Any,
    table: EffectTable,
    *,
    alpha: float = 0.1,
    cost: float = 0.0,
    reference: ArrayLike | None = None,
    nuisances: Nuisances | None = None,
) -> Evaluation:
    """Measure all that a table allows to be measured.

    Parameters
    ----------
    model : fitted, with ``effect(X)`` and ``predict_outcomes(X)``; what it has of ``effect_inference``,
        ``uncertainty``, ``effect_std``, ``effect_interval``, ``decide`` and ``ate_interval`` is judged too
    table : n units; for other models than :class:`~cib_ite.estimator.CIB` they should be new to the model
    alpha : share of misses allowed to intervals of individual differences and of averages
    cost : of treating, in units of the outcome; an effect above it is worth treating
    reference : (m,) uncertainties of the rows the model was fitted to, from which thresholds for withholding come;
        by default what the model remembers of them
    nuisances : from :func:`~cib_ite.metrics.cross_fit_nuisances` on this table, to be shared between models. By
        default they are fitted where the true effects are not known

    Returns
    -------
    Evaluation

    Notes
    -----
    The metrics, L being a level in percent:

    * of effects: ``sqrt_pehe``, ``sqrt_pehe_normalised`` (by the true effects' standard deviation), ``ate``,
      ``ate_error``, ``att_error``;
    * of the uncertainty: ``spearman`` with the size of the error, ``withhold_20_ratio`` (root PEHE without the fifth
      that is most uncertain, by that with it), ``threshold_20_ratio`` and ``threshold_20_withheld`` (the same by the
      threshold that withholds a fifth of the reference), ``ause`` and ``ause_random``;
    * of intervals: ``cate_coverage_L`` and ``cate_width_L`` for 50, 80, 90 and 95 %, ``crps``, ``nll``;
      ``ite_coverage_L``, ``ite_width_L`` (mean of the finite ones), ``ite_infinite`` (share of the others);
    * of decisions: ``wrong_decisions`` with no row deferred, ``wrong_decisions_20`` with a fifth, ``decide_wrong`` as
      the model decides; ``treat_share``, ``control_share``, ``deferred_share``, ``no_overlap_share`` and
      ``unusual_share``;
    * of binary outcomes both known: ``auc_both``, ``auc_factual``, ``auc_counterfactual``;
    * of a trial: ``policy_risk``, ``policy_risk_treat_all``, ``policy_risk_treat_none``, ``policy_gain`` over the
      better of those two, each with ``_low`` and ``_high`` (95 %), and ``jobs_att_error``;
    * without truth: ``factual_rmse``, or ``factual_log_loss`` and ``factual_auc``; ``r_loss``, ``dr_loss``;
      ``aipw_ate`` with ``_low`` and ``_high``; ``outcome_coverage_L``, ``outcome_width_L``; ``propensity_auc``; and
      ``spearman``, ``withhold_20_ratio``, ``ause``, ``ause_random`` with the prefixes ``factual_`` and ``r_loss_``. The
      outcome's noise, which no uncertainty of an effect foretells, keeps these two near 0 and 1 at best.

    Examples
    --------
    >>> from cib_ite.baselines.classical import OLS2
    >>> from cib_ite.data import confounded
    >>> train, test = confounded(500, kappa=1.0, seed=0), confounded(500, kappa=1.0, seed=1)
    >>> found = evaluate_model(OLS2().fit(train.x, train.treatment, train.y), test)
    >>> found.metrics["sqrt_pehe"] < 1, sorted(found.withholding)
    (True, ['effect', 'factual'])
    """
    check_alpha(alpha)
    X = as_rows(model, table)
    predicted = _predict(model, X, alpha)
    in_sample = is_training_table(model, predicted.uncertainty)
    if in_sample and int(model.calibration_.rows.max()) >= table.n:
        in_sample = False
    factual = _factual(model, predicted, table.n, in_sample=in_sample)
    values: dict[str, float] = {"ate": float(predicted.effect.mean())}
    withholding: dict[str, Sparsification] = {}
    calibration = deferral = policy = None
    true_effect = table.effect
    if true_effect is not None:
        assert table.mu0 is not None
        assert table.mu1 is not None
        values |= _accuracy(predicted.effect, table.mu0, table.mu1, table.treatment)
        known = reference if reference is not None else _remembered(model)
        values |= _uncertainty(withholding, "effect", "", predicted.uncertainty, predicted.effect - true_effect, known)
        # Where only outcomes of both arms are known (Twins), an interval of their expectations cannot be judged.
        if not (table.outcome == "binary" and bool(np.isin(np.stack([table.mu0, table.mu1]), (0, 1)).all())):
            calibration = _calibrate(model, X, predicted, true_effect, bounded=table.outcome == "binary")
            values |= _intervals(calibration, predicted, true_effect)
        deferral = _deferral(predicted, true_effect, cost)
        values["wrong_decisions"] = measure.decision_error(
            np.where(predicted.effect > cost, "treat", "control"), true_effect, cost
        ).wrong_rate
        if deferral is not None:
            values["wrong_decisions_20"] = float(np.interp(0.2, deferral.fractions, deferral.wrong_rate))
    values |= _individual(predicted, table, alpha)
    values |= _decisions(model, X, predicted, true_effect, cost=cost, alpha=alpha)
    if table.randomised is not None:
        values |= _trial(predicted.effect, table, table.randomised)
        policy = _policy_curve(predicted, table, table.randomised)
    values |= _outcomes(withholding, predicted, factual, table)
    if not in_sample and hasattr(model, "calibration_"):
        values |= _outcome_coverage(model, X, table, alpha)
    if nuisances is None and true_effect is None:
        nuisances = measure.cross_fit_nuisances(
            _filled(model, table.x), table.treatment, table.y, outcome=table.outcome, seed=0
        )
    if nuisances is not None:
        values |= _truth_free(withholding, predicted, factual, table, nuisances)
    values["propensity_auc"] = _propensity_auc(model, predicted, table, nuisances, in_sample=in_sample)
    pseudo = _pseudo_effects(model, predicted, factual, table, nuisances, in_sample=in_sample)
    if pseudo is not None:
        values |= _average(pseudo[np.isfinite(pseudo)], alpha)
    if hasattr(model, "ate_interval"):
        values["ate_low"], values["ate_high"] = model.ate_interval(None if in_sample else X, alpha)
    return Evaluation(
        data=table.name,
        n=table.n,
        alpha=alpha,
        cost=cost,
        in_sample=in_sample,
        metrics={name: float(value) for name, value in values.items() if np.isfinite(value)},
        withholding=withholding,
        calibration=calibration,
        deferral=deferral,
        policy=policy,
        pseudo_effect=pseudo,
    )


def as_rows(model: Any, table: EffectTable) -> Any:
    """Return a table's covariates as the model knows them: with column names, if it was fitted with names."""
    if getattr(model, "feature_names_in_", None) is None:
        return table.x
    import pandas as pd

    return pd.DataFrame(table.x, columns=list(table.feature_names))


def is_training_table(model: Any, uncertainty: Vector | None) -> bool:
    """Whether these are the uncertainties of the very rows a model was fitted to.

    Parameters
    ----------
    model : fitted; only a :class:`~cib_ite.estimator.CIB` remembers percentiles to compare with
    uncertainty : (n,) of the rows in question
    """
    known = _remembered(model)
    if known is None or uncertainty is None:
        return False
    found = np.percentile(uncertainty, np.linspace(0, 100, len(known)))
    return bool(np.allclose(found, known, rtol=1e-5, atol=1e-12))


def _remembered(model: Any) -> Vector | None:
    return getattr(getattr(model, "calibration_", None), "uncertainty", None)


def _predict(model: Any, X: Any, alpha: float) -> _Predicted:
    outcome = np.asarray(model.predict_outcomes(X), dtype=np.float64)
    if hasattr(model, "effect_inference"):
        found = model.effect_inference(X, alpha)
        return _Predicted(
            effect=found.effect,
            outcome=outcome,
            std=found.std,
            uncertainty=found.uncertainty,
            ite=(found.ite_lower, found.ite_upper),
            propensity=found.propensity,
            flags=(found.no_overlap, found.unusual),
        )
    std = np.asarray(model.effect_std(X), dtype=np.float64) if hasattr(model, "effect_std") else None
    score = np.asarray(model.uncertainty(X), dtype=np.float64) if hasattr(model, "uncertainty") else std
    effect = np.asarray(model.effect(X), dtype=np.float64)
    if effect.shape != (len(outcome),):
        raise InputError(f"{type(model).__name__}.effect gave shape {effect.shape}; expected ({len(outcome)},)")
    return _Predicted(effect, outcome, std, score, None, None, None)


def _factual(model: Any, predicted: _Predicted, n: int, *, in_sample: bool) -> _Factual:
    if in_sample:
        held_out = model.calibration_
        return _Factual(held_out.rows, held_out.outcome.T, held_out.effect)
    return _Factual(np.arange(n), predicted.outcome, predicted.effect)


def _accuracy(effect: Vector, mu0: Vector, mu1: Vector, treatment: NDArray[np.int64]) -> dict[str, float]:
    error = measure.sqrt_pehe(effect, mu0, mu1)
    spread = float((mu1 - mu0).std())
    values = {"sqrt_pehe": error, "ate_error": measure.ate_error(effect, mu0, mu1)}
    # Rounding makes a constant effect vary a little.
    if spread > 1e-9 * max(1.0, float(np.abs(mu1 - mu0).max())):
        values["sqrt_pehe_normalised"] = error / spread
    if treatment.any():
        values["att_error"] = measure.att_error(effect, mu0, mu1, treatment)
    return values


def _uncertainty(
    withholding: dict[str, Sparsification],
    name: str,
    prefix: str,
    uncertainty: Vector | None,
    error: Vector,
    reference: ArrayLike | None = None,
) -> dict[str, float]:
    """Add a withholding curve, and return what sums it up."""
    if uncertainty is None:
        return {}
    fractions = np.arange(100) / 100 if len(error) > 100 else None
    found = withholding[name] = measure.sparsification(uncertainty, error, fractions)
    whole = float(found.curve[0])
    values = {
        f"{prefix}spearman": measure.spearman(uncertainty, error),
        f"{prefix}ause": found.ause,
        f"{prefix}ause_random": found.ause_random,
    }
    if whole > 0:
        values[f"{prefix}withhold_20_ratio"] = float(np.interp(0.2, found.fractions, found.curve)) / whole
        if reference is not None:
            kept = measure.withholding_curve(uncertainty, error**2, [0.2], reference)
            values[f"{prefix}threshold_20_ratio"] = float(kept.curve[0]) / whole
            values[f"{prefix}threshold_20_withheld"] = float(kept.withheld[0])
    return values


def _calibrate(
    model: Any, X: Any, predicted: _Predicted, true_effect: Vector, *, bounded: bool
) -> CalibrationCurve | None:
    own = hasattr(model, "effect_interval") and not hasattr(model, "effect_inference")
    if not own and predicted.std is None:
        return None
    nominal = np.array(_LEVELS if own else _FINE_LEVELS)
    measured, width = np.empty(len(nominal)), np.empty(len(nominal))
    for place, level in enumerate(nominal.tolist()):
        if own:
            lower, upper = model.effect_interval(X, alpha=1 - level)
        else:
            assert predicted.std is not None
            half = normal_quantile(1 - level) * predicted.std
            lower, upper = predicted.effect - half, predicted.effect + half
            if bounded:
                lower, upper = np.maximum(lower, -1.0), np.minimum(upper, 1.0)
        measured[place] = measure.interval_coverage(lower, upper, true_effect)
        width[place] = measure.interval_width(lower, upper)
    return CalibrationCurve(nominal, measured, width)


def _intervals(curve: CalibrationCurve | None, predicted: _Predicted, true_effect: Vector) -> dict[str, float]:
    if curve is None:
        return {}
    values: dict[str, float] = {}
    for level in _LEVELS:
        place = int(np.argmin(np.abs(curve.nominal - level)))
        values[f"cate_coverage_{round(100 * level)}"] = float(curve.measured[place])
        values[f"cate_width_{round(100 * level)}"] = float(curve.width[place])
    if predicted.std is not None:
        values["crps"] = measure.gaussian_crps(predicted.effect, predicted.std, true_effect)
        if predicted.std.min() > 0:
            values["nll"] = measure.gaussian_nll(predicted.effect, predicted.std, true_effect)
    return values


def _deferral(predicted: _Predicted, true_effect: Vector, cost: float) -> DeferralCurve | None:
    if predicted.uncertainty is None:
        return None
    score = predicted.uncertainty
    if predicted.std is not None:
        score = predicted.std / np.maximum(np.abs(predicted.effect - cost), 1e-12)
    fractions = np.arange(91) / 100
    return measure.deferral_curve(predicted.effect, score, true_effect, cost, fractions)


def _individual(predicted: _Predicted, table: EffectTable, alpha: float) -> dict[str, float]:
    """Judge intervals of ``Y(1) - Y(0)``, and both predicted outcomes, where both are known."""
    both = table.potential_outcomes()
    values: dict[str, float] = {}
    if predicted.ite is not None:
        lower, upper = predicted.ite
        infinite = ~np.isfinite(lower) | ~np.isfinite(upper)
        values["ite_infinite"] = float(infinite.mean())
        level = round(100 * (1 - alpha))
        if not infinite.all():
            values[f"ite_width_{level}"] = measure.interval_width(lower[~infinite], upper[~infinite])
        if both is not None:
            values[f"ite_coverage_{level}"] = measure.interval_coverage(lower, upper, both[:, 1] - both[:, 0])
    if both is not None and table.outcome == "binary":
        arm = table.treatment
        seen = [both, np.take_along_axis(both, arm[:, None], 1), np.take_along_axis(both, 1 - arm[:, None], 1)]
        if all(0 < part.mean() < 1 for part in seen):
            mu0, mu1 = predicted.outcome.T
            found = measure.twins_auc(mu0, mu1, both[:, 0], both[:, 1], arm)
            values |= {f"auc_{name}": value for name, value in found.items()}
    return values


def _decisions(
    model: Any, X: Any, predicted: _Predicted, true_effect: Vector | None, *, cost: float, alpha: float
) -> dict[str, float]:
    values: dict[str, float] = {}
    if predicted.flags is not None:
        values["no_overlap_share"], values["unusual_share"] = (float(flag.mean()) for flag in predicted.flags)
    if hasattr(model, "decide"):
        decision = model.decide(X, cost, alpha=alpha)
        values |= {f"{name}_share": float(np.mean(decision == name)) for name in ("treat", "control")}
        values["deferred_share"] = float(np.mean(decision == "defer"))
        if true_effect is not None:
            values["decide_wrong"] = measure.decision_error(decision, true_effect, cost).wrong_rate
    return values


def _trial(effect: Vector, table: EffectTable, randomised: NDArray[np.bool_]) -> dict[str, float]:
    """Policy risks on the randomised rows, with percentile intervals of paired bootstrap samples."""
    treated, control = randomised & (table.treatment == 1), randomised & (table.treatment == 0)
    if not treated.any() or not control.any():
        return {}
    effect, arm, y = effect[randomised], table.treatment[randomised], table.y[randomised]
    policies = {"policy_risk": effect, "policy_risk_treat_all": np.ones_like(effect)}
    policies["policy_risk_treat_none"] = np.zeros_like(effect)

    def risks(rows: NDArray[np.int64]) -> dict[str, float]:
        found = {name: measure.policy_risk(score[rows], arm[rows], y[rows]) for name, score in policies.items()}
        best = min(found["policy_risk_treat_all"], found["policy_risk_treat_none"])
        return found | {"policy_gain": best - found["policy_risk"]}

    generator = np.random.default_rng(0)
    values = risks(np.arange(len(effect)))
    again = [risks(generator.integers(len(effect), size=len(effect))) for _ in range(_BOOTSTRAPS)]
    for name in list(values):
        low, high = np.quantile([found[name] for found in again], (0.025, 0.975))
        values[f"{name}_low"], values[f"{name}_high"] = float(low), float(high)
    whole = np.zeros(table.n)
    whole[randomised] = effect
    values["jobs_att_error"] = measure.jobs_att_error(whole, table.treatment, table.y, randomised)
    return values


def _policy_curve(predicted: _Predicted, table: EffectTable, randomised: NDArray[np.bool_]) -> WithholdingCurve | None:
    if predicted.uncertainty is None or not randomised.any():
        return None
    return measure.policy_risk_curve(
        predicted.effect, predicted.uncertainty, table.treatment, table.y, np.arange(81) / 100, randomised
    )


def _outcomes(
    withholding: dict[str, Sparsification], predicted: _Predicted, factual: _Factual, table: EffectTable
) -> dict[str, float]:
    """Errors of the outcome that was seen."""
    rows = factual.rows
    y = table.y[rows]
    mean = factual.outcome[np.arange(len(rows)), table.treatment[rows]]
    values: dict[str, float] = {}
    if table.outcome == "binary":
        p = mean.clip(1e-6, 1 - 1e-6)
        values["factual_log_loss"] = float(-np.mean(np.where(y == 1, np.log(p), np.log(1 - p))))
        values["factual_auc"] = auc(mean, y.astype(np.int64))
    else:
        values["factual_rmse"] = float(np.sqrt(np.mean((y - mean) ** 2)))
    score = None if predicted.uncertainty is None else predicted.uncertainty[rows]
    return values | _uncertainty(withholding, "factual", "factual_", score, y - mean)


def _outcome_coverage(model: Any, X: Any, table: EffectTable, alpha: float) -> dict[str, float]:
    arms = [model.outcome_interval(X, arm, alpha) for arm in (0, 1)]
    lower, upper = (np.where(table.treatment == 1, arms[1][end], arms[0][end]) for end in (0, 1))
    finite = np.isfinite(lower) & np.isfinite(upper)
    level = round(100 * (1 - alpha))
    values = {f"outcome_coverage_{level}": measure.interval_coverage(lower, upper, table.y)}
    if finite.any():
        values[f"outcome_width_{level}"] = measure.interval_width(lower[finite], upper[finite])
    return values


def _filled(model: Any, x: Vector) -> Vector:
    """Put means in place of missing values."""
    known = getattr(getattr(model, "preprocessor_", None), "fill", None)
    missing = np.isnan(x)
    if not missing.any():
        return x
    fill = np.where(missing, 0, x).sum(0) / np.maximum((~missing).sum(0), 1) if known is None else known
    return np.where(missing, fill, x)


def _truth_free(
    withholding: dict[str, Sparsification],
    predicted: _Predicted,
    factual: _Factual,
    table: EffectTable,
    nuisances: Nuisances,
) -> dict[str, float]:
    rows = factual.rows
    arm, y, m, e = table.treatment[rows], table.y[rows], nuisances.outcome_mean[rows], nuisances.propensity[rows]
    pseudo = measure.dr_pseudo_outcome(arm, y, nuisances.mu0[rows], nuisances.mu1[rows], e)
    values = {
        "r_loss": measure.tau_risk_r(factual.effect, arm, y, m, e),
        "dr_loss": measure.tau_risk_dr(factual.effect, pseudo),
    }
    residual = y - m - (arm - e) * factual.effect
    score = None if predicted.uncertainty is None else predicted.uncertainty[rows]
    return values | _uncertainty(withholding, "r_loss", "r_loss_", score, residual)


def _propensity_auc(
    model: Any, predicted: _Predicted, table: EffectTable, nuisances: Nuisances | None, *, in_sample: bool
) -> float:
    if in_sample:
        return float(model.overlap_.auc)
    if predicted.propensity is not None:
        return auc(predicted.propensity, table.treatment)
    return float("nan") if nuisances is None else auc(nuisances.propensity, table.treatment)


def _pseudo_effects(
    model: Any,
    predicted: _Predicted,
    factual: _Factual,
    table: EffectTable,
    nuisances: Nuisances | None,
    *,
    in_sample: bool,
) -> Vector | None:
    """Doubly robust effects, from nuisances that have not seen the row they are used for."""
    if in_sample:
        whole = np.full(table.n, np.nan)
        whole[factual.rows] = model.calibration_.pseudo_effect
        return whole
    if nuisances is not None:
        e = nuisances.propensity.clip(_CLIP, 1 - _CLIP)
        return measure.dr_pseudo_outcome(table.treatment, table.y, nuisances.mu0, nuisances.mu1, e)
    if predicted.propensity is None:
        return None
    e = predicted.propensity.clip(_CLIP, 1 - _CLIP)
    mu0, mu1 = predicted.outcome.T
    return measure.dr_pseudo_outcome(table.treatment, table.y, mu0, mu1, e)


def _average(pseudo: Vector, alpha: float) -> dict[str, float]:
    if len(pseudo) < 2:
        return {}
    half = normal_quantile(alpha) * float(pseudo.std(ddof=1) / np.sqrt(len(pseudo)))
    mean = float(pseudo.mean())
    return {"aipw_ate": mean, "aipw_ate_low": mean - half, "aipw_ate_high": mean + half}
