"""How good predictions are, and whether they got better: every score with its interval, differences in pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Float, Int64
from sklearn.metrics import average_precision_score, roc_auc_score

from ial_nap.series import Kind, Series
from shared_core.errors import InputError

__all__ = ["METRICS", "Difference", "Metric", "compare", "expected_calibration_error", "measure"]

Array: TypeAlias = "Float[np.ndarray, 'n c']"


@dataclass(frozen=True)
class Metric:
    """A way to score predictions.

    Parameters
    ----------
    name : of it
    better : whether "higher" or "lower" scores are
    kinds : of tasks it is for
    of : maps labels and predictions, both ``(n, c)`` (classes as ``(n, 1)``), to the score; NaN where it has none
    """

    name: str
    better: Literal["higher", "lower"]
    kinds: tuple[Kind, ...]
    of: Callable[[np.ndarray, np.ndarray], float]


def _over_labels(found: Callable[[np.ndarray, np.ndarray], float]) -> Callable[[np.ndarray, np.ndarray], float]:
    """Mean over labels of which both outcomes are there."""

    def of(y: np.ndarray, p: np.ndarray) -> float:
        scores = [float(found(a, b)) for a, b in zip(y.T, p.T, strict=True) if a.min() != a.max()]
        return float(np.mean(scores)) if scores else float("nan")

    return of


def expected_calibration_error(y: Float[np.ndarray, "n c"], p: Float[np.ndarray, "n c"], bins: int = 10) -> float:
    """Mean distance between predicted and observed frequency, over equally wide bins weighed by their numbers.

    Parameters
    ----------
    y : 0 or 1
    p : probabilities
    bins : equal parts of 0 to 1

    Examples
    --------
    >>> expected_calibration_error(np.array([[0.0], [1.0]]), np.array([[0.5], [0.5]]))
    0.0
    """
    place = np.minimum((p.ravel() * bins).astype(np.int64), bins - 1)
    gap = np.bincount(place, weights=p.ravel() - y.ravel(), minlength=bins)
    return float(np.abs(gap).sum() / p.size)


def _accuracy(y: np.ndarray, p: np.ndarray) -> float:
    if p.shape[1] > y.shape[1]:
        return float((p.argmax(1) == y[:, 0]).mean())
    return float(((p > 0.5) == (y > 0.5)).mean())


def _log_loss(y: np.ndarray, p: np.ndarray) -> float:
    chosen = p[np.arange(len(p)), y[:, 0].astype(np.int64)]
    return float(-np.log(np.clip(chosen, 1e-12, None)).mean())


def _relative(y: np.ndarray, p: np.ndarray) -> float:
    return float((np.abs(p - y) / np.abs(y)).mean()) if (y != 0).all() else float("nan")


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("auroc", "higher", ("binary", "multilabel"), _over_labels(roc_auc_score)),
        Metric("auprc", "higher", ("binary", "multilabel"), _over_labels(average_precision_score)),
        Metric("accuracy", "higher", ("binary", "multilabel", "multiclass"), _accuracy),
        Metric("brier", "lower", ("binary", "multilabel"), lambda y, p: float(np.square(p - y).mean())),
        Metric("ece", "lower", ("binary", "multilabel"), expected_calibration_error),
        Metric("log_loss", "lower", ("multiclass",), _log_loss),
        Metric("mae", "lower", ("regression",), lambda y, p: float(np.abs(p - y).mean())),
        Metric("rmse", "lower", ("regression",), lambda y, p: float(np.sqrt(np.square(p - y).mean()))),
        Metric("mpe", "lower", ("regression",), _relative),
    )
}
"""Scores by name; the first that fits a kind of task is its main one."""


@dataclass(frozen=True)
class Difference:
    """A score before and after, and what is known of their difference.

    Parameters
    ----------
    metric : its name
    before, after : scores
    low, high : interval of ``after - before``
    level : of the interval
    """

    metric: str
    before: float
    after: float
    low: float
    high: float
    level: float

    @property
    def is_clear(self) -> bool:
        """The interval leaves 0 out."""
        return self.low > 0 or self.high < 0


def _pair(series: Series, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    y = series.targets.double().numpy().reshape(len(series), -1)
    p = np.asarray(predicted, dtype=np.float64)
    if p.shape != (len(series), series.outputs):
        raise InputError(f"predictions have shape {p.shape}: expected ({len(series)}, {series.outputs})")
    if series.kind == "regression":
        scaling = series.scaling
        y, p = (v * scaling.target_deviation + scaling.target_mean for v in (y, p))
    return y, p


def _fitting(kind: Kind, name: str | None) -> Metric:
    fitting = [metric for metric in METRICS.values() if kind in metric.kinds]
    for metric in fitting:
        if name in {None, metric.name}:
            return metric
    raise InputError(f"no metric '{name}' for a {kind} task: choose {', '.join(m.name for m in fitting)}")


def measure(series: Series, predicted: Float[np.ndarray, "n c"]) -> dict[str, float]:
    """Score predictions by all that fits the task; those of a regression in the target's unit.

    Parameters
    ----------
    series : with labels
    predicted : probabilities, or standardised predictions, ``(n, c)``
    """
    y, p = _pair(series, predicted)
    return {metric.name: metric.of(y, p) for metric in METRICS.values() if series.kind in metric.kinds}


def compare(
    series: Series,
    before: Float[np.ndarray, "n c"],
    after: Float[np.ndarray, "n c"],
    *,
    metric: str | None = None,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Difference:
    """Compare two predictions of the same instances, by a bootstrap that draws instances with both.

    Parameters
    ----------
    series : with labels
    before, after : probabilities, or standardised predictions, ``(n, c)``
    metric : one of :data:`METRICS` that fits the task; None is its main one
    draws : of the bootstrap
    level : of the interval
    seed : of the draws

    Raises
    ------
    InputError
        For a metric that does not fit, or predictions of another shape.
    """
    chosen = _fitting(series.kind, metric)
    y, old = _pair(series, before)
    _, new = _pair(series, after)
    random = np.random.default_rng(seed)

    def gain(at: Int64[np.ndarray, " n"]) -> float:
        return chosen.of(y[at], new[at]) - chosen.of(y[at], old[at])

    gains = np.array([gain(random.integers(0, len(y), len(y))) for _ in range(draws)])
    gains = gains[np.isfinite(gains)]
    if not len(gains):
        raise InputError(f"{chosen.name} has no value on these {len(y)} instances: give more, or both outcomes")
    low, high = np.quantile(gains, [(1 - level) / 2, (1 + level) / 2])
    return Difference(chosen.name, chosen.of(y, old), chosen.of(y, new), float(low), float(high), level)
