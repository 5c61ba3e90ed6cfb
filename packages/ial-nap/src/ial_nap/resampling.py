"""Every score of a task on resampled instances, all resamples at once: a resample is how often each instance is drawn.

The bootstrap draws instances with replacement. Scores are means, areas or sums over instances, so that they can be
computed from counts by matrix products, thousands of times faster than instance by instance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from ial_nap.metrics import METRICS, fitting, in_unit
from ial_nap.series import Series
from shared_core.errors import InputError

__all__ = ["Difference", "Resampled", "compare", "resampled"]

# Counts of this many instances are held at once.
_MOST = 4_000_000


@dataclass(frozen=True, eq=False)
class Resampled:
    """A score, and what it would have been on other instances of the same kind.

    Parameters
    ----------
    metric : its name
    better : whether "higher" or "lower" is
    value : on all instances
    draws : on each resample; not a number where it has none
    """

    metric: str
    better: Literal["higher", "lower"]
    value: float
    draws: Float[np.ndarray, " draws"]

    def interval(self, level: float = 0.95) -> tuple[float, float] | None:
        """Return bounds that hold this share of the resamples; None where no resample has a score.

        Parameters
        ----------
        level : share
        """
        return _bounds(self.draws, level)

    def gain_over(self, other: Resampled, level: float = 0.95) -> tuple[float, float] | None:
        """Return bounds of the difference to the same score of other predictions, resample by resample.

        Parameters
        ----------
        other : of the same instances, by the same seed
        level : share
        """
        return _bounds(self.draws - other.draws, level)


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


def _bounds(values: Float[np.ndarray, " draws"], level: float) -> tuple[float, float] | None:
    finite = values[np.isfinite(values)]
    if not len(finite):
        return None
    low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2]).tolist()
    return low, high


def resampled(
    series: Series, predicted: Float[np.ndarray, "n c"], *, draws: int = 500, seed: int = 0
) -> dict[str, Resampled]:
    """Score predictions by all that fits the task, and on resamples; those of a regression in the target's unit.

    Parameters
    ----------
    series : with labels
    predicted : probabilities, or standardised predictions
    draws : resamples; 0 for the scores alone
    seed : of the resamples: the same ones for every prediction of as many instances

    Returns
    -------
    By name, as :func:`ial_nap.metrics.measure` names them.

    Raises
    ------
    InputError
        For predictions of another shape, and fewer draws than none.

    Examples
    --------
    >>> from ial_nap.toys import shift_task
    >>> series = shift_task(50, shift=0.0, seed=0)
    >>> found = resampled(series, series.targets.numpy().reshape(-1, 1), draws=20)
    >>> found["auroc"].value, found["auroc"].interval(), found["brier"].value
    (1.0, (1.0, 1.0), 0.0)
    """
    if draws < 0:
        raise InputError(f"draws must be 0 or more, got {draws}")
    y, p = in_unit(series, predicted)
    n, random = len(y), np.random.default_rng(seed)
    parts = [_scores(series.kind, y, p, np.ones((1, n)))]
    for first in range(0, draws, size := max(1, _MOST // n)):
        counts = [np.bincount(random.integers(0, n, n), minlength=n) for _ in range(min(size, draws - first))]
        parts.append(_scores(series.kind, y, p, np.stack(counts).astype(np.float64)))
    together = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return {
        name: Resampled(name, METRICS[name].better, float(values[0]), values[1:]) for name, values in together.items()
    }


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
    chosen = fitting(series.kind, metric).name
    old, new = (resampled(series, each, draws=draws, seed=seed)[chosen] for each in (before, after))
    bounds = new.gain_over(old, level)
    if bounds is None:
        raise InputError(f"{chosen} has no value on these {len(series)} instances: give more, or both outcomes")
    return Difference(chosen, old.value, new.value, *bounds, level)


def _scores(kind: str, y: np.ndarray, p: np.ndarray, counts: Float[np.ndarray, "b n"]) -> dict[str, np.ndarray]:
    """Return each score under each row of counts."""
    total = counts.sum(1)

    def mean(values: np.ndarray) -> np.ndarray:
        return counts @ values / total

    if kind == "regression":
        off = np.abs(p - y)[:, 0]
        zero = y[:, 0] == 0
        relative = mean(np.where(zero, 0.0, off / np.where(zero, 1.0, np.abs(y[:, 0]))))
        return {
            "mae": mean(off),
            "rmse": np.sqrt(mean(off**2)),
            "mpe": np.where(counts @ zero.astype(np.float64) > 0, np.nan, relative),
        }
    if kind == "multiclass":
        chosen = p[np.arange(len(p)), y[:, 0].astype(np.int64)]
        right = (p.argmax(1) == y[:, 0]).astype(np.float64)
        return {"accuracy": mean(right), "log_loss": mean(-np.log(np.clip(chosen, 1e-12, None)))}
    ranked = [_areas(a, b, counts) for a, b in zip(y.T, p.T, strict=True)]
    return {
        "auroc": _over_labels([area for area, _ in ranked]),
        "auprc": _over_labels([precision for _, precision in ranked]),
        "accuracy": mean(((p > 0.5) == (y > 0.5)).astype(np.float64).mean(1)),
        "brier": mean(np.square(p - y).mean(1)),
        "ece": _calibration(y, p, counts) / (total * y.shape[1]),
    }


def _over_labels(scores: list[np.ndarray]) -> np.ndarray:
    """Mean over labels that have a score."""
    found = np.stack(scores)
    there = np.isfinite(found)
    return np.where(there, found, 0.0).sum(0) / np.where(there.any(0), there.sum(0), np.nan)


def _areas(y: np.ndarray, p: np.ndarray, counts: Float[np.ndarray, "b n"]) -> tuple[np.ndarray, np.ndarray]:
    """Return areas under the ROC curve and average precisions; not a number where one outcome was not drawn."""
    order = np.argsort(-p, kind="stable")
    first = np.flatnonzero(np.r_[True, np.diff(p[order]) < 0])
    drawn, up = counts[:, order], y[order] == 1
    # Instances with one probability come together: no threshold is between them.
    hits = np.add.reduceat(drawn * up, first, axis=1)
    misses = np.add.reduceat(drawn * ~up, first, axis=1)
    positive, negative = hits.sum(1), misses.sum(1)
    below = negative[:, None] - misses.cumsum(1)
    both = (positive > 0) & (negative > 0)
    found, seen = hits.cumsum(1), (hits + misses).cumsum(1)
    precision = found / np.where(seen > 0, seen, 1.0)
    area = (hits * (below + 0.5 * misses)).sum(1) / np.where(both, positive * negative, np.nan)
    return area, (hits * precision).sum(1) / np.where(both, positive, np.nan)


def _calibration(y: np.ndarray, p: np.ndarray, counts: Float[np.ndarray, "b n"], bins: int = 10) -> np.ndarray:
    """Return the sum, over bins of the probability, of how far predictions and outcomes are apart."""
    place = np.minimum((p * bins).astype(np.int64), bins - 1)
    gaps = np.stack([((p - y) * (place == k)).sum(1) for k in range(bins)], 1)
    return np.abs(counts @ gaps).sum(1)
