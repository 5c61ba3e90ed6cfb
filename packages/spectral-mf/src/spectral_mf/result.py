"""What every estimator returns: a value, what is certain about it, and how it came about."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spectral_mf._inputs import Problem, Scalar, to_numpy

__all__ = ["LogPartition", "Scalar", "rounding_slack"]


@dataclass(frozen=True)
class LogPartition:
    """An estimate of log Z.

    NumPy models give floats, batches of them arrays (models,); torch models give float64 tensors, () or (models,).

    Attributes
    ----------
    value : the estimate, in nats
    lower, upper : bounds that hold whatever the value is worth; minus and plus infinity where the method has none
    method : name of the method behind `value`
    std_error : standard error of `value` where it is a random estimate, else None
    marginals : (..., n) means E[x_i], where the method gives them along with log Z
    diagnostics : what the method has to say: iterations, convergence, eigenvalues, seconds a stage
    warnings : sentences a reader of the value should know
    seconds : wall time
    """

    value: Scalar
    lower: Scalar
    upper: Scalar
    method: str
    std_error: Scalar | None = None
    marginals: Any = None
    diagnostics: dict[str, Any] = field(default_factory=dict[str, Any])
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0

    @classmethod
    def of(
        cls,
        problem: Problem,
        method: str,
        value: Tensor,
        *,
        lower: Tensor | None = None,
        upper: Tensor | None = None,
        std_error: Tensor | None = None,
        marginals: Tensor | None = None,
        diagnostics: dict[str, Any] | None = None,
        warnings: tuple[str, ...] = (),
        seconds: float = 0.0,
    ) -> LogPartition:
        """Make a result out of (models,) tensors that lack the problem's constant, which is added here.

        `lower` and `upper` must have their rounding errors in them already (see :func:`rounding_slack`).
        """
        infinite = torch.full_like(value.detach(), math.inf)
        give = problem.give_back
        # A value that no gradient flows through shall not seem to have one by way of the trace.
        const = problem.const if value.requires_grad else problem.const.detach()
        return cls(
            value=give(value + const),
            lower=give((-infinite if lower is None else lower.detach()) + const.detach()),
            upper=give((infinite if upper is None else upper.detach()) + const.detach()),
            method=method,
            std_error=None if std_error is None else give(std_error),
            marginals=None if marginals is None else give(marginals),
            diagnostics=diagnostics or {},
            warnings=warnings,
            seconds=seconds,
        )

    def __str__(self) -> str:
        """One line: the value, how sure it is, and by which method."""
        values = np.atleast_1d(to_numpy(self.value))
        error = "" if self.std_error is None else f" ± {float(np.max(to_numpy(self.std_error))):.2g}"
        if len(values) > 1:
            return f"log Z of {len(values)} models by {self.method}: {values.min():.6g} to {values.max():.6g}{error}"
        low, high = float(to_numpy(self.lower).item()), float(to_numpy(self.upper).item())
        certain = f", certain: {low:.6g} to {high:.6g}" if math.isfinite(low) or math.isfinite(high) else ""
        doubt = f"; {len(self.warnings)} warning(s), see .warnings" if self.warnings else ""
        return f"log Z = {values[0]:.8g}{error} by {self.method}{certain}{doubt}"

    def with_(self, **changes: Any) -> LogPartition:
        """Return a copy with some attributes replaced."""
        return replace(self, **changes)


def rounding_slack(problem: Problem, *values: Tensor) -> Tensor:
    """How far float64 rounding may move a bound: (models,), about 1e-12 of the size of the energies involved."""
    edges = problem.edges
    size = edges.weight.detach().abs().sum(-1) + problem.b.detach().abs().sum(-1) + problem.n * math.log(2)
    for value in values:
        size = size + torch.nan_to_num(value.detach(), posinf=0.0, neginf=0.0).abs()
    return 1e-13 * (8 + math.sqrt(problem.n)) * (1 + size)
