"""Audit whether predictions depend on how much was known of an instance, more than the truth does.

The *variable sparsity problem* of Yi et al. (ICLR 2020, arXiv:1906.00150, introduction and Figure 1): true values
hardly depend on the number of known entries, those predicted from zero-imputed input do. Works on the predictions of
any model; needs neither this package's layers nor torch.

Real counts can carry information (popular films are rated higher), so with the truth at hand the comparison is
always with the *truth's* dependence on the count, never with zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray

from shared_core.errors import InputError

__all__ = ["CountBin", "CountCalibrator", "Dependence", "Interval", "VSPReport", "vsp_curve", "vsp_report"]

Number = float | int
Vector = NDArray[np.float64]
Covariances = dict[tuple[str, str], Vector]
Statistic = Callable[[Covariances], Vector]
Verdict = Literal["biased", "unbiased", "dependent", "independent", "inconclusive", "undetermined"]
_BLOCK_ELEMENTS = 1 << 22
_FEWEST = 10


@dataclass(frozen=True)
class Interval:
    """A value with its bootstrap interval; NaN where it is undefined.

    Attributes
    ----------
    value, low, high : float
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.low > 0 or self.high < 0

    def within(self, tolerance: Number) -> bool:
        """Whether the interval lies inside ``[-tolerance, tolerance]``."""
        return -tolerance <= self.low and self.high <= tolerance


@dataclass(frozen=True)
class Dependence:
    """How something depends on the observed count.

    Attributes
    ----------
    pearson : Interval
        Correlation with the count, or with its logarithm (``scale`` of the report). 0 for a constant.
    spearman : Interval
        Rank correlation with the count. Its interval resamples the ranks of the whole sample.
    slope_per_count : Interval
        Least-squares change for one more observed entry, in units of the prediction.
    slope_per_doubling : Interval
        Least-squares change for twice as many observed entries, in units of the prediction.
    """

    pearson: Interval
    spearman: Interval
    slope_per_count: Interval
    slope_per_doubling: Interval


@dataclass(frozen=True)
class CountBin:
    """Instances of similar observed count.

    Attributes
    ----------
    count_low, count_high, count_mean : float
        Of the observed counts in the bin.
    n : int
        Instances.
    prediction, prediction_low, prediction_high : float
        Mean prediction and its normal-theory interval (NaN for a single instance).
    truth, truth_low, truth_high, rmse : float or None
        The same for the truth, and the root mean squared error, where the truth is known.
    """

    count_low: float
    count_high: float
    count_mean: float
    n: int
    prediction: float
    prediction_low: float
    prediction_high: float
    truth: float | None = None
    truth_low: float | None = None
    truth_high: float | None = None
    rmse: float | None = None


@dataclass(frozen=True)
class VSPReport:
    """What `vsp_report` finds.

    Attributes
    ----------
    n : int
        Instances.
    scale : {"count", "log"}
        What ``pearson``, ``difference`` and ``excess`` correlate with.
    confidence, tolerance : float
        Level of the intervals; the size below which a correlation is taken to be of no account.
    prediction : Dependence
    truth : Dependence or None
    difference : Interval or None
        Pearson correlation of the prediction less that of the truth.
    excess : Interval or None
        ``cov(prediction - truth, count) / (sd(count) sd(truth))``: the drift on the scale of the truth's own
        correlation. 0 for the truth itself, and for its conditional mean however little of the truth that explains.
    deciles : tuple of CountBin
    verdict : str
        With the truth: "biased" (the interval of ``excess`` excludes 0, and ``excess`` or ``difference`` reaches the
        tolerance), "unbiased" (``excess`` is negligible) or "inconclusive". Without: "dependent", "independent" or
        "inconclusive". "undetermined" where the counts are all equal or fewer than 10 instances are given.
    message : str
        The verdict in a sentence.
    """

    n: int
    scale: Literal["count", "log"]
    confidence: float
    tolerance: float
    prediction: Dependence
    truth: Dependence | None
    difference: Interval | None
    excess: Interval | None
    deciles: tuple[CountBin, ...]
    verdict: Verdict
    message: str

    @property
    def pearson(self) -> Interval:
        """Pearson correlation of the prediction with the count."""
        return self.prediction.pearson

    @property
    def spearman(self) -> Interval:
        """Spearman correlation of the prediction with the count."""
        return self.prediction.spearman

    @property
    def slope_per_count(self) -> Interval:
        """Change of the prediction for one more observed entry."""
        return self.prediction.slope_per_count

    @property
    def slope_per_doubling(self) -> Interval:
        """Change of the prediction for twice as many observed entries."""
        return self.prediction.slope_per_doubling

    def to_dict(self) -> dict[str, Any]:
        """Return the report in types that JSON has; what is undefined is None.

        Returns
        -------
        dict
        """
        return _without_nan(asdict(self))

    def __str__(self) -> str:
        lines = [self.message]
        for name, found in (("prediction", self.prediction), ("truth", self.truth)):
            if found is not None:
                lines.append(
                    f"{name}: pearson {found.pearson}, spearman {found.spearman}, "
                    f"per doubling {found.slope_per_doubling}"
                )
        return "\n".join(lines)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _vectors(
    y_pred: ArrayLike, observed_count: ArrayLike, y_true: ArrayLike | None
) -> tuple[Vector, Vector, Vector | None]:
    given = {"y_pred": y_pred, "observed_count": observed_count, "y_true": y_true}
    vectors: dict[str, Vector] = {}
    for name, values in given.items():
        if values is None:
            continue
        vector = np.asarray(values, dtype=np.float64)
        if vector.ndim == 2 and vector.shape[1] == 1:
            vector = vector[:, 0]
        if vector.ndim != 1:
            raise InputError(f"{name} has shape {vector.shape}; give one number an instance")
        if len(vector) != len(vectors.get("y_pred", vector)):
            raise InputError(f"{name} has {len(vector)} entries but y_pred has {len(vectors['y_pred'])}")
        if not np.isfinite(vector).all():
            place = int(np.flatnonzero(~np.isfinite(vector))[0])
            raise InputError(f"{name} is {vector[place]} at row {place}; leave such rows out")
        vectors[name] = vector
    if not len(vectors["y_pred"]):
        raise InputError("y_pred is empty; give at least one prediction")
    counts = vectors["observed_count"]
    if (counts < 0).any():
        place = int(np.flatnonzero(counts < 0)[0])
        raise InputError(f"observed_count is {counts[place]:g} at row {place}; counts are not negative")
    return vectors["y_pred"], counts, vectors.get("y_true")


def _ranks(values: Vector) -> Vector:
    """Ranks from 1, ties at their mean."""
    _, inverse, sizes = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(sizes) - (sizes - 1) / 2)[inverse]


class _Moments:
    """Means, variances and covariances of a few variables, for the sample and for resamples of it at once.

    Every statistic here is a function of sums over instances, so a resample is a row of weights and all resamples
    together one matrix product. Instances of one group are summed first: groups are then what is resampled.
    """

    def __init__(self, variables: Mapping[str, Vector], groups: NDArray[np.intp] | None) -> None:
        self.names = list(variables)
        table = np.column_stack([variables[name] for name in self.names])
        # Centred and scaled, or the variance of a large offset would drown.
        self.spread = table.std(axis=0)
        # A spread at the level of rounding is that of a constant.
        self.spread[self.spread <= 1e-12 * np.abs(table).max(axis=0, initial=1e-300)] = 0.0
        table = (table - table.mean(axis=0)) / np.where(self.spread > 0, self.spread, 1.0)
        table[:, self.spread == 0] = 0.0
        self.pairs = [(i, j) for i in range(len(self.names)) for j in range(i, len(self.names))]
        sums = np.column_stack([np.ones(len(table)), table, *(table[:, i] * table[:, j] for i, j in self.pairs)])
        if groups is not None:
            grouped = np.zeros((int(groups.max()) + 1, sums.shape[1]))
            np.add.at(grouped, groups, sums)
            sums = grouped
        self.sums = sums

    def resample(self, times: int, rng: np.random.Generator) -> list[Covariances]:
        """Return covariances (scaled units) of the sample, then of ``times`` resamples of it."""
        units = len(self.sums)
        blocks = [self.sums.sum(axis=0, keepdims=True)]
        step = max(1, _BLOCK_ELEMENTS // units)
        for start in range(0, times, step):
            weights = [
                np.bincount(rng.integers(units, size=units), minlength=units) for _ in range(min(step, times - start))
            ]
            blocks.append(np.array(weights, dtype=np.float64) @ self.sums)
        return [self._covariances(part) for part in (blocks[0], np.concatenate(blocks[1:] or [blocks[0][:0]]))]

    def _covariances(self, totals: NDArray[np.float64]) -> Covariances:
        means = totals[:, 1 : 1 + len(self.names)] / totals[:, :1]
        products = totals[:, 1 + len(self.names) :] / totals[:, :1]
        found: Covariances = {}
        for place, (i, j) in enumerate(self.pairs):
            covariance = products[:, place] - means[:, i] * means[:, j]
            # A resample of equal values has variance zero, but for rounding.
            covariance = covariance.clip(min=0) if i == j else covariance
            found[self.names[i], self.names[j]] = found[self.names[j], self.names[i]] = covariance
        return found


def _ratio(above: Vector, below: Vector) -> Vector:
    """Divide, with 0 for what does not vary: a constant depends on nothing."""
    varies = below > 1e-12
    return np.where(varies, above / np.where(varies, below, 1.0), 0.0)


def vsp_report(
    y_pred: ArrayLike,
    observed_count: ArrayLike,
    y_true: ArrayLike | None = None,
    *,
    scale: Literal["count", "log"] = "count",
    groups: ArrayLike | None = None,
    confidence: Number = 0.95,
    n_resamples: int = 1000,
    tolerance: Number = 0.1,
    bins: int = 10,
    seed: int = 0,
) -> VSPReport:
    """Measure how predictions depend on the observed count, and whether more than the truth does.

    Parameters
    ----------
    y_pred : array of shape (n,)
        Predictions: numbers, or probabilities of one class.
    observed_count : array of shape (n,)
        How many entries were known of each instance.
    y_true : array of shape (n,), optional
        What was predicted. Without it dependence can be measured, bias cannot.
    scale : {"count", "log"}, default "count"
        Correlate with the count or with its logarithm (``log2(max(count, 1))``).
    groups : array of shape (n,), optional
        What an instance belongs to (its user, say); the bootstrap then resamples groups instead of instances.
    confidence : float, default 0.95
        Level of the percentile intervals.
    n_resamples : int, default 1000
        Bootstrap resamples.
    tolerance : float, default 0.1
        Correlations smaller than this are of no account to the verdict.
    bins : int, default 10
        Rows of the table by count.
    seed : int, default 0
        Of the bootstrap.

    Returns
    -------
    VSPReport

    Raises
    ------
    InputError
        Lengths that differ, entries that are not finite, negative counts, nothing at all.

    Notes
    -----
    The variable sparsity problem is that of Yi et al. (ICLR 2020); this audit of it is ours.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> count, truth = rng.integers(1, 100, 500), rng.normal(size=500)
    >>> vsp_report(truth + 0.02 * count, count, truth).verdict
    'biased'
    >>> vsp_report(0.5 * truth, count, truth).verdict
    'unbiased'
    """
    prediction, counts, truth = _vectors(y_pred, observed_count, y_true)
    if scale not in ("count", "log"):
        raise InputError(f"scale is {scale!r}; choose 'count' or 'log'")
    if not 0 < confidence < 1:
        raise InputError(f"confidence is {confidence:g}; it must lie in (0, 1)")
    units = None
    if groups is not None:
        labels = np.asarray(groups)
        if labels.shape != counts.shape:
            raise InputError(f"groups has shape {labels.shape} but y_pred has {counts.shape}")
        units = np.unique(labels, return_inverse=True)[1]
    logs = np.log2(np.maximum(counts, 1.0))
    variables = {"count": counts, "log": logs, "rank": _ranks(counts), "y": prediction, "y_rank": _ranks(prediction)}
    if truth is not None:
        variables |= {"t": truth, "t_rank": _ranks(truth)}
    moments = _Moments(variables, units)
    spread = dict(zip(moments.names, moments.spread.tolist(), strict=True))
    varies = {name: found > 0 for name, found in spread.items()}
    samples = moments.resample(n_resamples, np.random.default_rng(seed))
    undetermined = not varies["count"] or len(counts) < _FEWEST
    tails = (1 - confidence) / 2

    def interval(statistic: Statistic, defined: bool = True) -> Interval:
        if not defined:
            return Interval(np.nan, np.nan, np.nan)
        value, resampled = (np.asarray(statistic(sample)) for sample in samples)
        low, high = np.quantile(resampled, [tails, 1 - tails]) if len(resampled) else (np.nan, np.nan)
        return Interval(float(value[0]), float(low), float(high))

    def correlation(first: str, second: str) -> Statistic:
        def statistic(cov: Covariances) -> Vector:
            return _ratio(cov[first, second], np.sqrt(cov[first, first] * cov[second, second]))

        return statistic

    def dependence(name: str) -> Dependence:
        def slope(x: str) -> Statistic:
            unit = spread[name] / spread[x] if spread[x] else np.nan

            def statistic(cov: Covariances) -> Vector:
                return _ratio(cov[name, x], cov[x, x]) * unit

            return statistic

        return Dependence(
            interval(correlation(name, scale), varies[scale]),
            interval(correlation(f"{name}_rank", "rank"), varies["count"]),
            interval(slope("count"), varies["count"]),
            interval(slope("log"), varies["log"]),
        )

    found = dependence("y")
    found_truth = difference = excess = None
    if truth is not None:
        found_truth = dependence("t")

        def correlation_difference(cov: Covariances) -> Vector:
            return correlation("y", scale)(cov) - correlation("t", scale)(cov)

        difference = interval(correlation_difference, varies[scale])
        # Where the truth does not vary there is no scale of its own; the prediction's serves.
        unit = spread["t"] or spread["y"] or 1.0
        reference = "t" if spread["t"] else "y"

        def drift(cov: Covariances) -> Vector:
            covariance = (spread["y"] * cov["y", scale] - spread["t"] * cov["t", scale]) / unit
            return _ratio(covariance, np.sqrt(cov[scale, scale] * cov[reference, reference]))

        excess = interval(drift, varies[scale])
    verdict, message = _judge(found.pearson, found_truth, difference, excess, tolerance, undetermined)
    return VSPReport(
        n=len(counts),
        scale=scale,
        confidence=float(confidence),
        tolerance=float(tolerance),
        prediction=found,
        truth=found_truth,
        difference=difference,
        excess=excess,
        deciles=vsp_curve(prediction, counts, truth, bins=bins, confidence=confidence),
        verdict=verdict,
        message=message,
    )


def _judge(
    pearson: Interval,
    truth: Dependence | None,
    difference: Interval | None,
    excess: Interval | None,
    tolerance: Number,
    undetermined: bool,
) -> tuple[Verdict, str]:
    if undetermined or np.isnan([pearson.value, pearson.low]).any():
        return "undetermined", "Undetermined: it takes 10 instances, of different counts, to say anything."
    if truth is None or difference is None or excess is None:
        known = f"the prediction's correlation with the count is {pearson}"
        if pearson.excludes_zero and abs(pearson.value) >= tolerance:
            return "dependent", f"Dependent: {known}; whether that is bias, only the truth can tell."
        if pearson.within(tolerance):
            return "independent", f"Independent: {known}."
        return "inconclusive", f"Inconclusive: {known}; more instances would tell."
    known = (
        f"the prediction's correlation with the count is {pearson}, the truth's {truth.pearson}; "
        f"excess drift {excess} in units of the truth's spread"
    )
    if excess.excludes_zero and max(abs(excess.value), abs(difference.value)) >= tolerance:
        return "biased", f"Biased: {known}."
    if excess.within(tolerance):
        return "unbiased", f"Not biased: {known}."
    return "inconclusive", f"Inconclusive: {known}; more instances would tell."


def _mean_interval(values: Vector, confidence: Number) -> tuple[float, float, float]:
    mean = float(values.mean())
    if len(values) < 2:
        return mean, float("nan"), float("nan")
    half = NormalDist().inv_cdf((1 + confidence) / 2) * float(values.std(ddof=1)) / len(values) ** 0.5
    return mean, mean - half, mean + half


def vsp_curve(
    y_pred: ArrayLike,
    observed_count: ArrayLike,
    y_true: ArrayLike | None = None,
    *,
    bins: int = 10,
    confidence: Number = 0.95,
) -> tuple[CountBin, ...]:
    """Average predictions (and truth) over bins of the observed count: the data of a Figure-1 style plot.

    Parameters
    ----------
    y_pred, observed_count, y_true : arrays of shape (n,)
        As in `vsp_report`.
    bins : int, default 10
        At most so many; equal counts always share a bin, so ties can make them fewer and uneven.
    confidence : float, default 0.95
        Level of the intervals of the means.

    Returns
    -------
    tuple of CountBin
        By rising count.

    Raises
    ------
    InputError
        As in `vsp_report`; ``bins`` smaller than 1.

    Examples
    --------
    >>> [(b.count_low, b.n, b.prediction) for b in vsp_curve([1.0, 3.0, 5.0], [2, 2, 9], bins=2)]
    [(2.0, 2, 2.0), (9.0, 1, 5.0)]
    """
    prediction, counts, truth = _vectors(y_pred, observed_count, y_true)
    if bins < 1:
        raise InputError(f"bins is {bins}; it must be at least 1")
    # In integers: a fraction such as 0.3 would put its edge one instance off.
    edges = np.sort(counts)[-(-np.arange(1, bins) * len(counts) // bins) - 1]
    members = np.searchsorted(np.unique(edges), counts, side="left")
    curve: list[CountBin] = []
    for member in np.unique(members):
        rows = members == member
        bin_truth: dict[str, float] = {}
        if truth is not None:
            mean, low, high = _mean_interval(truth[rows], confidence)
            rmse = float(np.sqrt(np.mean((prediction[rows] - truth[rows]) ** 2)))
            bin_truth = {"truth": mean, "truth_low": low, "truth_high": high, "rmse": rmse}
        inside = counts[rows]
        curve.append(
            CountBin(
                float(inside.min()),
                float(inside.max()),
                float(inside.mean()),
                int(rows.sum()),
                *_mean_interval(prediction[rows], confidence),
                **bin_truth,
            )
        )
    return tuple(curve)


class CountCalibrator:
    """Take the part of a prediction's error that the count explains out of it, after the fact.

    Adds ``g(count)`` to predictions, where ``g`` is the isotonic (monotone, rising or falling, whichever fits)
    regression of ``y_true - y_pred`` on the count over held-out instances. Repairs the *mean* at each count of a model
    that cannot be trained again; it cannot undo what the drift did to single predictions.

    Parameters
    ----------
    bounds : pair of float, optional
        Clip calibrated predictions to this range.

    Attributes
    ----------
    counts_, shifts_ : Float[ndarray, "knots"]
        ``g`` is linear between these points and constant beyond them.

    Notes
    -----
    Our extension. A drift that first rises and then falls with the count is only flattened in part.

    Examples
    --------
    >>> count = np.arange(1.0, 101.0)
    >>> calibrator = CountCalibrator().fit(3 + 0.02 * count, count, np.full(100, 3.0))
    >>> calibrator.transform(3 + 0.02 * count, count)[[0, 50, 99]].round(6)
    array([3., 3., 3.])
    """

    counts_: Float[np.ndarray, " knots"]
    shifts_: Float[np.ndarray, " knots"]

    def __init__(self, bounds: tuple[Number, Number] | None = None) -> None:
        if bounds is not None and not bounds[0] < bounds[1]:
            raise InputError(f"bounds is {bounds}; give (low, high) with low < high")
        self.bounds = bounds

    def fit(self, y_pred: ArrayLike, observed_count: ArrayLike, y_true: ArrayLike | None = None) -> CountCalibrator:
        """Learn the shift on held-out instances.

        Parameters
        ----------
        y_pred, observed_count : arrays of shape (n,)
            As in `vsp_report`.
        y_true : array of shape (n,), optional
            Without it the truth is *assumed* to have the same mean at every count.

        Returns
        -------
        CountCalibrator
            Itself.

        Raises
        ------
        InputError
            As in `vsp_report`.
        """
        # Here, so that an audit does without scikit-learn's start-up.
        from sklearn.isotonic import IsotonicRegression

        prediction, counts, truth = _vectors(y_pred, observed_count, y_true)
        target = np.full_like(prediction, prediction.mean()) if truth is None else truth
        # Averaged over equal counts first: "auto" decides the direction by a rank test that ties would blur.
        levels, inverse, sizes = np.unique(counts, return_inverse=True, return_counts=True)
        residual = np.bincount(inverse, weights=target - prediction) / sizes
        rising = bool(np.average((levels - counts.mean()) * residual, weights=sizes) >= 0)
        isotonic = IsotonicRegression(increasing=rising, out_of_bounds="clip").fit(levels, residual, sizes)
        self.counts_ = np.asarray(isotonic.X_thresholds_, dtype=np.float64)
        self.shifts_ = np.asarray(isotonic.y_thresholds_, dtype=np.float64)
        return self

    def transform(self, y_pred: ArrayLike, observed_count: ArrayLike) -> Vector:
        """Shift predictions.

        Parameters
        ----------
        y_pred, observed_count : arrays of shape (n,)
            As in `vsp_report`.

        Returns
        -------
        ndarray of shape (n,)

        Raises
        ------
        InputError
            As in `vsp_report`, and before `fit`.
        """
        if not hasattr(self, "counts_"):
            raise InputError("this CountCalibrator is not fitted; call fit(y_pred, observed_count, y_true) first")
        prediction, counts, _ = _vectors(y_pred, observed_count, None)
        shifted = prediction + np.interp(counts, self.counts_, self.shifts_)
        return shifted if self.bounds is None else shifted.clip(*self.bounds)
