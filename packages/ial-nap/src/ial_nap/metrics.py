"""How good predictions are, and whether they got better: every score with its interval, differences in pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Float
from sklearn.metrics import average_precision_score, roc_auc_score

from ial_nap.series import Kind, Series
from shared_core.errors import InputError, no_such

__all__ = ["METRICS", "Metric", "expected_calibration_error", "fitting", "in_unit", "measure"]

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


def in_unit(series: Series, predicted: np.ndarray) -> tuple[Float[np.ndarray, "n l"], Float[np.ndarray, "n c"]]:
    """Return labels and predictions as scores read them; those of a regression in the target's unit.

    Parameters
    ----------
    series : with labels
    predicted : probabilities, or standardised predictions, ``(n, c)``

    Raises
    ------
    InputError
        For predictions of another shape.
    """
    y = series.targets.double().cpu().numpy().reshape(len(series), -1)
    p = np.asarray(predicted, dtype=np.float64)
    if p.shape != (len(series), series.outputs):
        raise InputError(f"predictions have shape {p.shape}: expected ({len(series)}, {series.outputs})")
    if series.kind == "regression":
        scaling = series.scaling
        y, p = (v * scaling.target_deviation + scaling.target_mean for v in (y, p))
    return y, p


def fitting(kind: Kind, name: str | None) -> Metric:
    """Return the metric of a name, or the main one.

    Parameters
    ----------
    kind : of the task
    name : of a metric; None is the main one

    Raises
    ------
    InputError
        When it does not fit the task.
    """
    known = [metric for metric in METRICS.values() if kind in metric.kinds]
    for metric in known:
        if name in {None, metric.name}:
            return metric
    raise no_such("metric", name, [metric.name for metric in known], where=f"a {kind} task")


def measure(series: Series, predicted: Float[np.ndarray, "n c"]) -> dict[str, float]:
    """Score predictions by all that fits the task; those of a regression in the target's unit.

    Parameters
    ----------
    series : with labels
    predicted : probabilities, or standardised predictions, ``(n, c)``
    """
    y, p = in_unit(series, predicted)
    return {metric.name: metric.of(y, p) for metric in METRICS.values() if series.kind in metric.kinds}
