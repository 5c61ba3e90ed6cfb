"""Intervals that have been held against rows the model was not trained on.

Two targets that must not be confused. The conditional average effect ``mu_1(x) - mu_0(x)`` gets the model's standard
deviation, widened by what the gap between training and held-out residuals tells of its error: approximate, without a
guarantee. The individual difference ``Y(1) - Y(0)`` gets conformal intervals, weighted by the propensity (Lei and
Candes, 2021): marginally valid, if there is no unmeasured confounding and the propensity is right.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int64

from shared_core.errors import InputError

__all__ = ["Conformal", "WeightedScores", "check_alpha", "effect_inflation", "normal_quantile"]


def check_alpha(alpha: float) -> float:
    """Return `alpha`, the share of misses allowed, if it is in (0, 1)."""
    if not 0 < alpha < 1:
        raise InputError(f"alpha: must be in (0, 1), e.g. 0.1 for a 90 % interval, got {alpha}")
    return float(alpha)


def normal_quantile(alpha: float) -> float:
    """Half width, in standard deviations, of a central normal interval that misses with probability `alpha`.

    Examples
    --------
    >>> round(normal_quantile(0.05), 3)
    1.96
    """
    from scipy.stats import norm

    return float(norm.ppf(1 - alpha / 2))


@dataclass(frozen=True, eq=False)
class WeightedScores:
    """Held-out scores of one arm with the weights that make its rows represent everybody.

    Parameters
    ----------
    score : (k,) ascending
    weight : (k,) in the same order

    Examples
    --------
    >>> scores = WeightedScores.of(np.arange(1.0, 20.0), np.ones(19))
    >>> scores.quantile(np.array([1.0, 3.0]), alpha=0.1)
    array([18., inf])
    """

    score: Float[np.ndarray, " k"]
    weight: Float[np.ndarray, " k"]

    @classmethod
    def of(cls, score: Float[np.ndarray, " k"], weight: Float[np.ndarray, " k"]) -> WeightedScores:
        """Sort scores and weights together."""
        order = np.argsort(score, kind="stable")
        return cls(score[order], weight[order])

    def quantile(self, weight: Float[np.ndarray, " n"], alpha: float) -> Float[np.ndarray, " n"]:
        """Smallest score that reaches the share ``1 - alpha`` of all weight, a new row's own being at infinity.

        Parameters
        ----------
        weight : ``(n,)`` of the new rows
        alpha : allowed share of misses

        Returns
        -------
        ``(n,)``; infinite where the new row weighs more than `alpha` of everything.
        """
        cumulative = np.cumsum(self.weight)
        total = cumulative[-1] if len(cumulative) else 0.0
        # A relative tolerance: sums of equal weights must not miss by rounding.
        position = np.searchsorted(cumulative, (1 - alpha) * (total + weight) * (1 - 1e-12), side="left")
        reached = position < len(self.score)
        return np.where(
            reached, self.score[np.minimum(position, len(self.score) - 1)] if len(self.score) else 0, np.inf
        )


@dataclass(frozen=True, eq=False)
class Conformal:
    """Conformal intervals for both potential outcomes, and for their difference.

    Parameters
    ----------
    arms : scores of the control rows and of the treated rows
    clip : propensities are held in ``[clip, 1 - clip]``
    """

    arms: tuple[WeightedScores, WeightedScores]
    clip: float = 0.02

    @classmethod
    def fit(
        cls,
        y: Float[np.ndarray, " k"],
        treatment: Int64[np.ndarray, " k"],
        outcome: Float[np.ndarray, "2 k"],
        scale: Float[np.ndarray, "2 k"],
        propensity: Float[np.ndarray, " k"],
        clip: float = 0.02,
    ) -> Conformal:
        """Score held-out rows by ``|y - f_t(x)| / scale_t(x)``.

        Parameters
        ----------
        y, treatment : ``(k,)`` of rows that did not train what predicts them
        outcome, scale : ``(2, k)`` prediction and its standard deviation in each arm
        propensity : ``(k,)``
        clip : propensities are held in ``[clip, 1 - clip]``
        """
        e = np.clip(propensity, clip, 1 - clip)
        arms: list[WeightedScores] = []
        for arm in (0, 1):
            rows = treatment == arm
            score = np.abs(y[rows] - outcome[arm, rows]) / scale[arm, rows]
            arms.append(WeightedScores.of(score, 1 / (e[rows] if arm else 1 - e[rows])))
        return cls((arms[0], arms[1]), clip)

    def outcome_interval(
        self,
        arm: int,
        outcome: Float[np.ndarray, " n"],
        scale: Float[np.ndarray, " n"],
        propensity: Float[np.ndarray, " n"],
        alpha: float,
    ) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """Interval of ``Y(arm)`` at level ``1 - alpha``, ``(n,)`` each."""
        e = np.clip(propensity, self.clip, 1 - self.clip)
        half = self.arms[arm].quantile(1 / (e if arm else 1 - e), alpha) * scale
        return outcome - half, outcome + half

    def effect_interval(
        self,
        outcome: Float[np.ndarray, "2 n"],
        scale: Float[np.ndarray, "2 n"],
        propensity: Float[np.ndarray, " n"],
        alpha: float,
    ) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """Interval of ``Y(1) - Y(0)`` from both arms' at ``1 - alpha / 2``; conservative."""
        low0, high0 = self.outcome_interval(0, outcome[0], scale[0], propensity, alpha / 2)
        low1, high1 = self.outcome_interval(1, outcome[1], scale[1], propensity, alpha / 2)
        return low1 - high0, high1 - low0

    def to_tree(self) -> dict[str, Any]:
        """Everything as arrays and plain values."""
        return {"arms": [[arm.score, arm.weight] for arm in self.arms], "clip": self.clip}

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> Conformal:
        """Rebuild what :meth:`to_tree` gave."""
        control, treated = (WeightedScores(score, weight) for score, weight in tree["arms"])
        return cls((control, treated), float(tree["clip"]))


def effect_inflation(
    trained: tuple[Float[np.ndarray, " a"], Float[np.ndarray, " b"]],
    held: tuple[Float[np.ndarray, " c"], Float[np.ndarray, " d"]],
    variance: float,
    largest: float = 100.0,
) -> float:
    """Factor on the model's standard deviation of effects that the optimism of its fit asks for, at least 1.

    Nobody sees the error of an effect, and a model that is sure of itself beyond its error (large lam, small beta)
    takes its own misfit for noise. What can be seen is how much smaller residuals are on rows that were trained on.
    That gap, Efron's optimism, is twice the mean squared error of a least-squares fit, and of a ridge fit whose
    penalty suits the surface: ``E(y - f)^2`` is ``s^2 (1 - p/n)`` on training rows and ``s^2 (1 + p/n)`` on new noise,
    with squared error ``s^2 p/n`` in f. Half the gap, summed over both arms, is held against the claimed variance.

    Parameters
    ----------
    trained, held : for each arm the squared residuals of rows that trained the predicting member, and of rows that
        did not
    variance : mean claimed variance of effects, in squared units of the outcome
    largest : result is cut off here

    Examples
    --------
    >>> effect_inflation((np.array([1.0, 1.0]), np.array([2.0])), (np.array([3.0]), np.array([4.0])), variance=0.5)
    2.0
    """
    if variance <= 0:
        return 1.0
    error = sum(
        (float(h.mean()) - float(t.mean())) / 2 for t, h in zip(trained, held, strict=True) if len(t) and len(h)
    )
    return float(np.clip(np.sqrt(max(error, 0.0) / variance), 1.0, largest))
