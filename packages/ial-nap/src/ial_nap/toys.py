"""A task whose shortcut is known: features that give the label away in training, and not afterwards (spec 8, E2)."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float64, Int8, Int64
from torch import Tensor

from ial_nap.series import Series, make_series
from shared_core.errors import InputError

__all__ = ["CAUSAL", "SHORTCUT", "shift_arrays", "shift_mask", "shift_task"]

CAUSAL = (0, 1, 2)
"""Features the label is made of."""

SHORTCUT = (8, 9)
"""Features that are shifted by the label in training."""


def shift_arrays(
    count: int, *, shift: float, seed: int, features: int = 12, steps: int = 4, walk: float = 0.6
) -> tuple[Float64[np.ndarray, "n t r"], Int64[np.ndarray, " n"]]:
    """Draw random walks, the label of a few of them, and a shortcut to it.

    The label is 1 where ``x[T-1, 0] - 0.8 mean_t x[t, 1] + 0.6 x[T-2, 2] + 0.7 e > 0`` with e logistic; then features 8
    and 9 move by ``shift * (2 y - 1)``.

    Parameters
    ----------
    count : instances
    shift : of the shortcut; 0 where there is none
    seed : of all that is drawn
    features, steps : at least 10 and 2
    walk : standard deviation of a step of the walks; at 0.6 the score itself has an AUROC of 0.87

    Raises
    ------
    InputError
        For fewer features or steps.

    Examples
    --------
    >>> x, y = shift_arrays(100, shift=1.2, seed=0)
    >>> x.shape, y.shape
    ((100, 4, 12), (100,))
    """
    if features <= max(SHORTCUT) or steps < 2:
        raise InputError(f"the task needs {max(SHORTCUT) + 1} features and 2 steps, got {features} and {steps}")
    random = np.random.default_rng(seed)
    x = walk * random.normal(size=(count, steps, features)).cumsum(1)
    score = x[:, -1, 0] - 0.8 * x[:, :, 1].mean(1) + 0.6 * x[:, -2, 2] + 0.7 * random.logistic(size=count)
    y = (score > 0).astype(np.int64)
    x[:, :, SHORTCUT] += shift * (2 * y[:, None, None] - 1)
    return x, y


def shift_task(
    count: int,
    *,
    shift: float,
    seed: int,
    like: Series | None = None,
    features: int = 12,
    steps: int = 4,
    walk: float = 0.6,
) -> Series:
    """Draw the arrays of :func:`shift_arrays` and make series of them.

    Parameters
    ----------
    count, shift, seed, features, steps, walk : as of :func:`shift_arrays`
    like : training series, with whose scaling to standardise

    Raises
    ------
    InputError
        As :func:`shift_arrays`.

    Examples
    --------
    >>> train = shift_task(100, shift=1.2, seed=0)
    >>> len(train.features), len(train.steps), len(shift_task(50, shift=0.0, seed=1, like=train))
    (12, 4, 50)
    """
    x, y = shift_arrays(count, shift=shift, seed=seed, features=features, steps=steps, walk=walk)
    return make_series(x, y, kind="binary", like=like)


def shift_mask(features: int = 12, steps: int = 4, off: tuple[int, ...] = SHORTCUT) -> Int8[Tensor, "t r"]:
    """Return what one who knows the task says: 0 on some features, 1 on all others.

    Parameters
    ----------
    features, steps : sizes
    off : features marked 0

    Examples
    --------
    >>> shift_mask(steps=1).tolist()
    [[1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1]]
    """
    mask = torch.ones(steps, features, dtype=torch.int8)
    mask[:, list(off)] = 0
    return mask
