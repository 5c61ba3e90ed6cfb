"""Spectrum clipping: the eigenvalues of the effective step size slide into one number, so that training ends as SGD.

Yun, Lozano and Yang, arXiv:1905.10757; the bounds are AdaBound's (Luo et al., arXiv:1902.09843, section 4).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["SpectrumClip"]


@dataclass(frozen=True)
class SpectrumClip:
    """Bounds on the eigenvalues of alpha_t (V_t^{1/2} + eps I)^{-1}, learning rate and bias correction included.

    ``lower(t) = final_lr (1 - 1 / (gamma t + 1))`` and ``upper(t) = final_lr (1 + 1 / (gamma t))``: nearly free in the
    beginning, equal in the end, where the step is ``final_lr`` times the first moment: SGD with momentum. A schedule
    of the learning rate scales both bounds by ``lr / base_lr``.

    Parameters
    ----------
    final_lr : the SGD learning rate the steps end at, > 0; the authors' value is 0.5, AdaBound's 0.1. Tune it like
        that of SGD with momentum and dampening.
    gamma : speed of the transition, > 0; at step ``1 / gamma`` the bounds are half and twice `final_lr`

    Examples
    --------
    >>> SpectrumClip(final_lr=0.1, gamma=1e-3).bounds(1000)
    (0.05, 0.2)
    """

    final_lr: float | int = 0.1
    gamma: float | int = 1e-3

    def __post_init__(self) -> None:
        for name in ("final_lr", "gamma"):
            value = getattr(self, name)
            if not (isinstance(value, float | int) and math.isfinite(value) and value > 0):
                raise ValueError(f"SpectrumClip: {name} must be a positive number, got {value!r}")

    def bounds(self, step: float | int, scale: float | int = 1.0) -> tuple[float, float]:
        """Return the bounds at a step.

        Parameters
        ----------
        step : number of the step, from 1
        scale : current learning rate over the base learning rate

        Returns
        -------
        Lower and upper bound.
        """
        final = self.final_lr * scale
        return final * (1 - 1 / (self.gamma * step + 1)), final * (1 + 1 / (self.gamma * step))
