"""How right, how sure, and for which classes: measures of answers over episodes.

Everything takes plain arrays. Calibration and proper scores are of rows pooled over episodes; intervals are over
episodes, which are independent, whereas the rows of one episode are not. Sources: Guo et al. (2017, arXiv:1706.04599)
for the calibration error, Brier (1950) for his score, the authors' code (github.com/haebeom-lee/l2b) for
:func:`interval`, Lee et al. (2020, arXiv:1905.12917), Figure 4, for accuracy by class size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from scipy import stats

from shared_core.errors import InputError

__all__ = [
    "Reliability",
    "SizeBin",
    "accuracy_by_size",
    "brier",
    "calibration_error",
    "interval",
    "negative_log_likelihood",
    "paired_interval",
    "reliability",
    "spearman",
]

_FLOOR = float(np.finfo(np.float64).tiny)


@dataclass(frozen=True)
class SizeBin:
    """Accuracy on queries whose class has ``low`` to ``high`` support examples.

    Parameters
    ----------
    low, high : support examples of the class, both ends included
    mean : accuracy in 0..1
    half : half of its 95 % interval; NaN when n is 1
    n : values averaged: episodes if these are known, else query rows
    """

    low: int
    high: int
    mean: float
    half: float
    n: int


@dataclass(frozen=True, eq=False)
class Reliability:
    """Confidence beside accuracy, for those bins of confidence that hold a row.

    Parameters
    ----------
    confidence : (bins,) mean probability of the top answer
    accuracy : (bins,) share of top answers that are right
    n : (bins,) rows
    """

    confidence: Float[np.ndarray, " bins"]
    accuracy: Float[np.ndarray, " bins"]
    n: Int[np.ndarray, " bins"]


def reliability(probability: Float[np.ndarray, "n ways"], labels: Int[np.ndarray, " n"], bins: int = 15) -> Reliability:
    """Compare confidence in the top answer to its accuracy, in bins of equal width.

    Parameters
    ----------
    probability : (n, ways) of each class; the first of equal classes is the top answer
    labels : (n,) index of the right class
    bins : of equal width in 0..1, each with its upper edge and without its lower

    Raises
    ------
    InputError
        if there is no row, a label has no column, a probability is outside 0..1, or there is no bin
    """
    probability, _ = _answers(probability, labels)
    if bins < 1:
        raise InputError(f"bins: must be at least 1, got {bins}")
    confidence, right = probability.max(1), probability.argmax(1) == labels
    place = np.searchsorted(np.arange(1, bins) / bins, confidence, side="left")
    n = np.bincount(place, minlength=bins)
    held = n > 0
    mean_confidence = np.bincount(place, weights=confidence, minlength=bins)[held] / n[held]
    accuracy = np.bincount(place, weights=right, minlength=bins)[held] / n[held]
    return Reliability(mean_confidence, accuracy, n[held])


def calibration_error(probability: Float[np.ndarray, "n ways"], labels: Int[np.ndarray, " n"], bins: int = 15) -> float:
    """Compute the expected calibration error of the top answer: how far confidence is from accuracy, mean over rows.

    Parameters
    ----------
    probability : (n, ways) of each class
    labels : (n,) index of the right class
    bins : of equal width in 0..1, each with its upper edge and without its lower

    Returns
    -------
    in 0..1. 0 is calibrated, which need not be useful: on balanced queries 1 / ways everywhere is calibrated too

    Examples
    --------
    >>> round(calibration_error(np.array([[0.9, 0.1], [0.9, 0.1]]), np.array([0, 1])), 3)
    0.4
    """
    found = reliability(probability, labels, bins)
    return float((found.n * np.abs(found.confidence - found.accuracy)).sum() / found.n.sum())


def negative_log_likelihood(probability: Float[np.ndarray, "n ways"], labels: Int[np.ndarray, " n"]) -> float:
    """Compute the mean of -log probability of the right class, in nats.

    Parameters
    ----------
    probability : (n, ways) of each class; below the smallest normal number it counts as that, so that one impossible
        row costs 708 nats and not infinitely many
    labels : (n,) index of the right class
    """
    _, right = _answers(probability, labels)
    return float(-np.log(np.maximum(right, _FLOOR)).mean())


def brier(probability: Float[np.ndarray, "n ways"], labels: Int[np.ndarray, " n"]) -> float:
    """Compute Brier's score: squared distance of the probabilities from the right class's corner, mean over rows.

    Parameters
    ----------
    probability : (n, ways) of each class
    labels : (n,) index of the right class

    Returns
    -------
    in 0..2, as Brier defined it: for two classes twice what is usual for one probability
    """
    probability, right = _answers(probability, labels)
    return float(((probability**2).sum(1) - 2 * right + 1).mean())


def interval(values: Float[np.ndarray, " episodes"]) -> tuple[float, float]:
    """Compute mean and half of its 95 % interval over episodes: 1.96 sd / sqrt(episodes), as the authors' code does.

    Parameters
    ----------
    values : (episodes,) one number an episode

    Returns
    -------
    (mean, half); sd is that of a population; half is NaN for one episode, which says nothing of the spread

    Examples
    --------
    >>> mean, half = interval(np.array([0.5, 0.7]))
    >>> round(mean, 3), round(half, 3)
    (0.6, 0.139)
    """
    values = _finite(values=values)[0]
    half = 1.96 * float(values.std()) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return float(values.mean()), half


def paired_interval(a: Float[np.ndarray, " episodes"], b: Float[np.ndarray, " episodes"]) -> tuple[float, float, float]:
    """Compute the mean of a - b over the same episodes, with its 95 % Student-t interval.

    Parameters
    ----------
    a, b : (episodes,) one number an episode, of two methods on the same episodes

    Returns
    -------
    (mean, low, high); low and high are NaN for one episode

    Examples
    --------
    >>> tuple(round(v, 3) for v in paired_interval(np.array([0.8, 0.7, 0.9]), np.array([0.7, 0.7, 0.7])))
    (0.1, -0.148, 0.348)
    """
    a, b = _finite(a=a, b=b)
    difference = a - b
    mean, n = float(difference.mean()), len(difference)
    if n == 1:
        return mean, float("nan"), float("nan")
    half = float(stats.t.ppf(0.975, n - 1)) * float(difference.std(ddof=1)) / n**0.5
    return mean, mean - half, mean + half


def accuracy_by_size(
    right: Bool[np.ndarray, " q"],
    size: Int[np.ndarray, " q"],
    edges: Sequence[int] = (1, 3, 5, 10, 20, 50),
    episode: Int[np.ndarray, " q"] | None = None,
) -> list[SizeBin]:
    """Split accuracy by how many support examples the query's class has.

    Parameters
    ----------
    right : (q,) whether the query row was answered rightly
    size : (q,) support examples of its class
    edges : 1, 3, 5, 10 means 1 to 3, 4 to 5, and 6 to 10; queries of classes beyond the ends are left out
    episode : (q,) which episode the row is of, any integers. If given, the mean and its interval are over episodes'
        means, because rows of an episode share one adapted network; if not, over rows, which makes it too narrow

    Returns
    -------
    one bin for each pair of edges, in their order; those without a row are left out

    Examples
    --------
    >>> accuracy_by_size(np.array([True, False, True]), np.array([1, 2, 5]), (1, 3, 5))[1]
    SizeBin(low=4, high=5, mean=1.0, half=nan, n=1)
    """
    if len(edges) < 2 or edges[0] > edges[1] or any(a >= b for a, b in pairwise(edges[1:])):
        raise InputError(f"edges: needs two or more sizes in rising order, such as 1, 3, 5, 10; got {list(edges)}")
    bins: list[SizeBin] = []
    for low, high in zip([edges[0], *(edge + 1 for edge in edges[1:-1])], edges[1:], strict=True):
        rows = (size >= low) & (size <= high)
        if not rows.any():
            continue
        values = right[rows].astype(np.float64)
        if episode is not None:
            _, place = np.unique(episode[rows], return_inverse=True)
            values = np.bincount(place, weights=values) / np.bincount(place)
        mean, half = interval(values)
        bins.append(SizeBin(int(low), int(high), mean, half, len(values)))
    return bins


def spearman(
    a: Float[np.ndarray, " n"] | Int[np.ndarray, " n"], b: Float[np.ndarray, " n"] | Int[np.ndarray, " n"]
) -> float:
    """Compute Spearman's rank correlation.

    Parameters
    ----------
    a, b : (n,)

    Returns
    -------
    in -1..1; NaN when either is constant, and so for n = 1
    """
    a, b = _finite(a=a, b=b)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(stats.spearmanr(a, b).statistic)


def _answers(probability: NDArray[np.floating], labels: NDArray[np.integer]) -> tuple[NDArray[np.float64], ...]:
    """Return probabilities in double precision, and those of the right classes."""
    n, ways = probability.shape
    if not n:
        raise InputError("probability: needs at least one row, got none")
    if labels.min() < 0 or labels.max() >= ways:
        raise InputError(f"labels: must be columns of probability, 0..{ways - 1}, got {labels.min()}..{labels.max()}")
    probability = probability.astype(np.float64)
    # Averages of what a softmax gave in single precision may exceed 1 by its rounding.
    bad = ~((probability >= 0) & (probability <= 1 + 1e-5))
    if bad.any():
        row, column = (int(place) for place in np.argwhere(bad)[0])
        raise InputError(f"probability: must be in 0..1, got {probability[row, column]} in row {row}, column {column}")
    return probability, probability[np.arange(n), labels]


def _finite(**given: NDArray[np.floating] | NDArray[np.integer]) -> list[NDArray[np.float64]]:
    """Return what is given in double precision, refusing what has no mean."""
    for name, values in given.items():
        if not len(values):
            raise InputError(f"{name}: needs at least one value, got none")
        if not np.isfinite(values).all():
            place = int(np.flatnonzero(~np.isfinite(values))[0])
            raise InputError(f"{name}: must be finite, got {values[place]} at {place}")
    return [values.astype(np.float64) for values in given.values()]
