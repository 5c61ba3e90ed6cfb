"""Look at what a user gives, before anything is learned from it; every refusal is one line that says what to do."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int64
from numpy.typing import ArrayLike

from shared_core.errors import InputError

__all__ = ["OverlapWarning", "Preprocessor", "SmallArmWarning", "as_outcome", "as_treatment", "pack", "unpack"]

_FEWEST, _FEW = 20, 50


class OverlapWarning(UserWarning):
    """The treatment can nearly be told from the covariates: for many rows there is nobody to compare with."""


class SmallArmWarning(UserWarning):
    """An arm has so few rows that its outcome can hardly be learned."""


def pack(treatment: ArrayLike, y: ArrayLike) -> Float[np.ndarray, "n 2"]:
    """Put treatment and outcome side by side, ``(n, 2)``: what ``GridSearchCV`` and ``Pipeline`` pass on as `y`.

    Parameters
    ----------
    treatment : (n,) 0 or 1
    y : (n,) outcomes

    Examples
    --------
    >>> pack([0, 1], [2.5, 3.0])
    array([[0. , 2.5],
           [1. , 3. ]])
    """
    left, right = np.ravel(np.asarray(treatment)), np.ravel(np.asarray(y))
    if len(left) != len(right):
        raise InputError(f"pack: treatment has {len(left)} rows and y has {len(right)}; they must match row by row")
    return np.column_stack([left, right]).astype(np.float64)


def unpack(treatment: Any, y: Any) -> tuple[np.ndarray, np.ndarray]:
    """Take treatment and outcome apart again, where they came packed."""
    if y is None:
        if treatment is None:
            raise InputError("fit needs a treatment and an outcome: fit(X, treatment, y)")
        both = np.asarray(treatment)
        if both.ndim != 2 or both.shape[1] != 2:
            raise InputError(
                f"y is missing and the treatment has shape {both.shape}: give fit(X, treatment, y), or fit(X, ty) with"
                " ty = pack(treatment, y) of shape (n, 2)"
            )
        return both[:, 0], both[:, 1]
    return np.asarray(treatment), np.asarray(y)


def _column(values: np.ndarray, name: str, rows: int) -> np.ndarray:
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1:
        raise InputError(f"{name}: must be one column, got shape {values.shape}")
    if len(values) != rows:
        raise InputError(f"{name}: has {len(values)} rows and X has {rows}; they must match row by row")
    return values


def _numbers(values: np.ndarray, name: str) -> Float[np.ndarray, " n"]:
    try:
        numbers = values.astype(np.float64)
    except (TypeError, ValueError):
        first = next(value for value in values.tolist() if isinstance(value, str) or not isinstance(value, int | float))
        raise InputError(
            f"{name}: holds {first!r}, which is no number; encode it (0 and 1 for a binary outcome)"
        ) from None
    if (bad := np.flatnonzero(~np.isfinite(numbers))).size:
        what = "NaN" if np.isnan(numbers[bad[0]]) else "infinite"
        raise InputError(
            f"{name}: row {bad[0]} is {what} ({bad.size} such rows); drop them, or give them as X_unlabeled"
        )
    return numbers


def as_treatment(
    treatment: np.ndarray, rows: int, *, control: object = None, y: np.ndarray | None = None
) -> tuple[Int64[np.ndarray, " n"], tuple[Any, Any]]:
    """Check a treatment column and turn it into 0 and 1.

    Parameters
    ----------
    treatment : ``(n,)`` two values: 0/1, False/True, or anything if `control` says which one is the control
    rows : length of X
    control : the value that means "not treated"; None expects 0/1
    y : the outcome as given, to recognise swapped arguments

    Returns
    -------
    ``(n,)`` of 0 and 1, and the values that stand for control and treated.
    """
    column = _column(treatment, "treatment", rows)
    if column.dtype.kind in "OUS":
        values: list[Any] = sorted({str(value) for value in column.tolist()})
        column = np.array([str(value) for value in column.tolist()])
        if values and all(_is_number(value) for value in values):
            column = column.astype(np.float64)
            values = sorted(set(column.tolist()))
    else:
        column = _numbers(column, "treatment") if column.dtype.kind == "f" else column
        values = sorted(set(column.tolist()))
    if len(values) == 1:
        raise InputError(f"treatment: every row is {values[0]!r}; an effect needs rows of both arms")
    if len(values) > 2:
        outcomes = {str(value) for value in y.ravel().tolist()} if y is not None else set[str]()
        if len(outcomes) == 2:
            raise InputError(
                "treatment looks continuous and y binary: did you swap them? expected fit(X, treatment, y)"
            )
        shown = ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values[:6])
        more = ", ..." if len(values) > 6 else ""
        raise InputError(f"treatment: must have two values, found {{{shown}{more}}}; keep two arms at a time")
    if control is None:
        if set(values) != {0, 1}:
            raise InputError(
                f"treatment: found {{{values[0]}, {values[1]}}} instead of {{0, 1}}; say which one is the control with"
                f" control_name={values[0]!r}"
            )
        return column.astype(np.int64), (0, 1)
    match = [value for value in values if value == control or str(value) == str(control)]
    if not match:
        raise InputError(f"control_name: {control!r} is not a value of the treatment {{{values[0]}, {values[1]}}}")
    treated = values[1] if match[0] == values[0] else values[0]
    return (column == treated).astype(np.int64), (match[0], treated)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def as_outcome(
    y: np.ndarray, treatment: Int64[np.ndarray, " n"], outcome: Literal["auto", "continuous", "binary"]
) -> tuple[Float[np.ndarray, " n"], bool]:
    """Check an outcome column; return it as numbers, and whether it is binary.

    Parameters
    ----------
    y : ``(n,)`` numbers; 0/1 for a binary outcome
    treatment : ``(n,)`` 0 or 1
    outcome : what it is; ``auto`` takes two values 0 and 1 for binary
    """
    if outcome not in ("auto", "continuous", "binary"):
        raise InputError(f"outcome: must be auto, continuous or binary, got {outcome!r}")
    values = _numbers(_column(y, "y", len(treatment)), "y")
    different = np.unique(values)
    binary = outcome == "binary" or (outcome == "auto" and set(different.tolist()) == {0.0, 1.0})
    if outcome == "binary" and not set(different.tolist()) <= {0.0, 1.0}:
        raise InputError(f"y: a binary outcome must be 0 or 1, found {different[:4].tolist()}")
    counts = np.bincount(treatment, minlength=2)
    for arm, word in ((0, "control"), (1, "treated")):
        if counts[arm] < _FEWEST:
            raise InputError(
                f"treatment: only {counts[arm]} {word} rows; at least {_FEWEST} are needed in each arm"
                f" ({counts[1 - arm]} in the other)"
            )
        if np.ptp(values[treatment == arm]) == 0:
            raise InputError(
                f"y: the outcome of every {word} row is {values[treatment == arm][0]:g}; nothing can be learned there"
            )
    if (fewest := int(counts.min())) < _FEW:
        word = "treated" if counts[1] < counts[0] else "control"
        warnings.warn(
            f"only {fewest} {word} rows: expect wide intervals and little heterogeneity", SmallArmWarning, stacklevel=3
        )
    return values, binary


@dataclass(frozen=True, eq=False)
class Preprocessor:
    """Turn covariates into the inputs of the networks: numbers standardised, 0/1 columns as they are.

    Parameters
    ----------
    offset, factor : (p,) ``(x - offset) * factor``
    fill : (p,) mean of the known training values, for missing ones
    indicators : (p,) columns that get an input "is missing"
    allow_missing : NaN is allowed

    Examples
    --------
    >>> made = Preprocessor.fit(np.array([[1.0, 0.0], [3.0, 1.0], [np.nan, 1.0]]), allow_missing=True)
    >>> made.transform(np.array([[np.nan, 1.0]]))
    array([[0., 1., 1.]])
    """

    offset: Float[np.ndarray, " p"]
    factor: Float[np.ndarray, " p"]
    fill: Float[np.ndarray, " p"]
    indicators: Bool[np.ndarray, " p"]
    allow_missing: bool

    @classmethod
    def fit(cls, x: Float[np.ndarray, "n p"], *, allow_missing: bool) -> Preprocessor:
        """Learn means, scales and which columns have gaps from ``(n, p)`` training rows."""
        known = ~np.isnan(x)
        count = np.maximum(known.sum(0), 1)
        mean = np.where(known, x, 0).sum(0) / count
        sd = np.sqrt(np.where(known, (x - mean) ** 2, 0).sum(0) / count)
        zero_one = np.array([set(np.unique(column[~np.isnan(column)]).tolist()) <= {0.0, 1.0} for column in x.T])
        usable = sd > 1e-12 * np.maximum(np.abs(mean), 1e-300)
        factor = np.where(zero_one | ~usable, 1.0, 1 / np.where(usable, sd, 1.0))
        gaps = np.logical_not(known.all(axis=0))
        return cls(np.where(zero_one, 0.0, mean), factor, mean, np.asarray(gaps, dtype=bool), allow_missing)

    def transform(self, x: Float[np.ndarray, "n p"]) -> Float[np.ndarray, "n q"]:
        """Return ``(n, q)`` inputs; q is p plus one for each column that had gaps in training."""
        missing = np.isnan(x)
        scaled = (np.where(missing, self.fill, x) - self.offset) * self.factor
        return np.hstack([scaled, missing[:, self.indicators].astype(np.float64)])

    def check(self, x: Float[np.ndarray, "n p"], names: Sequence[str]) -> None:
        """Refuse NaN where it is not allowed, and infinite values anywhere, naming row and column."""
        bad = ~np.isfinite(x) if not self.allow_missing else np.isinf(x)
        if bad.any():
            row, column = np.argwhere(bad)[0]
            if np.isnan(x[row, column]):
                columns = int(bad.any(0).sum())
                raise InputError(
                    f"X: row {row}, column '{names[column]}' is NaN ({int(bad.sum())} cells in {columns} columns); fill"
                    " them in, or set allow_missing=True"
                )
            raise InputError(f"X: row {row}, column '{names[column]}' is infinite; correct it or drop the row")
