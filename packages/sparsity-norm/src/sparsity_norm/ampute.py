"""Make complete tables incomplete, with a rate of observation that differs from row to row.

That every instance has a rate of its own is what makes the variable sparsity problem visible; one common rate, as
imputation studies mostly use, hides it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import ArrayLike, NDArray

from shared_core.errors import InputError

__all__ = ["Amputed", "ampute"]

Mechanism = Literal["mcar", "mar", "mnar"]
Number = float | int


class Amputed(NamedTuple):
    """A table with holes.

    Attributes
    ----------
    x : Float[ndarray, "rows features"]
        NaN where missing.
    mask : Bool[ndarray, "rows features"]
        True where observed.
    """

    x: Float[np.ndarray, "rows features"]
    mask: Bool[np.ndarray, "rows features"]


def ampute(
    x: ArrayLike,
    low: Number = 0.05,
    high: Number = 1.0,
    *,
    mechanism: Mechanism = "mcar",
    random_state: int | np.random.Generator = 0,
    strength: Number = 1.0,
    drivers: Sequence[int] | None = None,
    min_observed: int = 0,
) -> Amputed:
    """Remove entries of a table; row ``i`` keeps each with a probability of its own, ``rate_i ~ U(low, high)``.

    Parameters
    ----------
    x : array of shape (rows, features)
        NaN stays missing, whatever is drawn.
    low, high : float
        Range of the rate of *observation*, ``0 <= low <= high <= 1``.
    mechanism : {"mcar", "mar", "mnar"}, default "mcar"
        "mcar": rates and entries are drawn independently of everything.
        "mar": some columns, the drivers, stay whole; rows with a larger driver score (mean of their standardised
        values) get a smaller rate for the other columns, so missingness depends on what is still seen.
        "mnar": within a row, entries that are large for their column go missing more often, so missingness depends on
        what is no longer seen; each row still keeps ``rate_i`` of its entries on average.
    random_state : int or Generator, default 0
        Source of randomness.
    strength : float, default 1.0
        How strongly missingness depends on values, non-negative; 0 turns "mar" and "mnar" into "mcar" (of the columns
        that are not drivers). For "mar" the rank of a row's rate follows ``strength * score + noise`` (standard
        normal); for "mnar" it is the change in log-odds of being missing for one standard deviation.
    drivers : sequence of int, optional
        Columns for "mar"; by default the first fifth, at least one.
    min_observed : int, default 0
        Give entries back, at random, to rows left with fewer. With 0 a row may lose everything, as in real data; such
        a row is all NaN, and Sparsity Normalization maps it to zeros.

    Returns
    -------
    Amputed
        ``(x, mask)``, float64 and bool.

    Raises
    ------
    InputError
        A table that is not 2-D or holds infinity, rates out of range, an unknown mechanism or driver column.

    Notes
    -----
    Our design. Rows whose count differs are the setting of Yi et al. (ICLR 2020, arXiv:1906.00150).

    Examples
    --------
    >>> x, mask = ampute(np.ones((1000, 50)), 0.2, 0.8, random_state=1)
    >>> bool((np.isnan(x) == ~mask).all()), round(float(mask.mean()), 1)
    (True, 0.5)
    """
    table = np.array(x, dtype=np.float64)
    if table.ndim != 2 or table.shape[1] == 0:
        raise InputError(f"x has shape {table.shape}; give (rows, features) with at least one feature")
    if np.isinf(table).any():
        row, column = np.argwhere(np.isinf(table))[0]
        raise InputError(f"x is infinite at row {row}, column {column}; use NaN for a missing entry")
    if not 0 <= low <= high <= 1:
        raise InputError(f"low is {low:g} and high {high:g}; rates of observation need 0 <= low <= high <= 1")
    if strength < 0:
        raise InputError(f"strength is {strength:g}; it must be zero or positive")
    if not 0 <= min_observed <= table.shape[1]:
        raise InputError(f"min_observed is {min_observed}; it must lie in 0..{table.shape[1]}, the number of columns")
    rng = np.random.default_rng(random_state)
    rates = rng.uniform(low, high, len(table))
    match mechanism:
        case "mcar":
            keep = np.broadcast_to(rates[:, None], table.shape)
        case "mar":
            keep = _mar_rates(table, rates, _driver_columns(drivers, table.shape[1]), strength, rng)
        case "mnar":
            keep = _mnar_rates(table, rates, strength)
        case _:
            raise InputError(f"mechanism is {mechanism!r}; choose 'mcar', 'mar' or 'mnar'")
    present = ~np.isnan(table)
    draws = rng.random(table.shape)
    mask = (draws < keep) & present
    if min_observed:
        # The entries that came closest to being kept, or a row that starts out with fewer keeps all that it has.
        order = np.where(present, draws - keep, np.inf).argsort(axis=1)[:, :min_observed]
        restored = np.zeros_like(mask)
        np.put_along_axis(restored, order, True, axis=1)
        mask |= restored & present & (mask.sum(axis=1, keepdims=True) < min_observed)
    return Amputed(np.where(mask, table, np.nan), mask)


def _standardised(table: NDArray[np.float64]) -> NDArray[np.float64]:
    """Columns at mean 0 and variance 1; 0 where missing, constant or empty."""
    known = ~np.isnan(table)
    n = np.maximum(known.sum(axis=0), 1)
    centred = np.where(known, table, 0.0)
    centred = np.where(known, centred - centred.sum(axis=0) / n, 0.0)
    spread = np.sqrt((centred**2).sum(axis=0) / n)
    return centred / np.where(spread > 0, spread, 1.0)


def _driver_columns(drivers: Sequence[int] | None, features: int) -> NDArray[np.intp]:
    columns = np.arange(max(1, features // 5)) if drivers is None else np.asarray(drivers, dtype=np.intp)
    if columns.size == 0 or columns.min() < 0 or columns.max() >= features:
        raise InputError(f"drivers is {list(columns)}; give column numbers in 0..{features - 1}")
    return columns


def _mar_rates(
    table: NDArray[np.float64],
    rates: NDArray[np.float64],
    drivers: NDArray[np.intp],
    strength: Number,
    rng: np.random.Generator,
) -> NDArray[np.float64]:
    """Hand the drawn rates out by rank, the smallest to the largest score, so that they stay U(low, high)."""
    score = _standardised(table[:, drivers]).mean(axis=1)
    score = score / (score.std() or 1.0)
    propensity = strength * score + rng.standard_normal(len(table))
    handed_out = np.empty_like(rates)
    handed_out[propensity.argsort()] = np.sort(rates)[::-1]
    keep = np.repeat(handed_out[:, None], table.shape[1], axis=1)
    keep[:, drivers] = 1.0
    return keep


def _mnar_rates(table: NDArray[np.float64], rates: NDArray[np.float64], strength: Number) -> NDArray[np.float64]:
    """Keep ``sigmoid(offset_i - strength * z_ij)``, the offset such that row i keeps ``rate_i`` on average."""
    z = strength * _standardised(table)
    reach = np.abs(z).max(axis=1, initial=0.0) + 40.0
    low, high = -reach, reach
    # Bisection: the mean is monotone in the offset, and 60 halvings exhaust float64.
    for _ in range(60):
        middle = (low + high) / 2
        too_many = _sigmoid(middle[:, None] - z).mean(axis=1) > rates
        low, high = np.where(too_many, low, middle), np.where(too_many, middle, high)
    return _sigmoid(((low + high) / 2)[:, None] - z)


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return (1 + np.tanh(x / 2)) / 2
