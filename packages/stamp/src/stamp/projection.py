"""Keep probabilities that meet a budget in expectation: all logits moved by one number (spec 2.6).

The specification weighs an expected cost against the loss, and its weight has to be tuned or raised until the budget
holds. Here the budget holds in every step, whatever it is, and one generator serves all budgets.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from scipy.optimize import root_scalar
from torch import Tensor

__all__ = ["ExpectedCost", "project"]

_RANGE = 60.0


@runtime_checkable
class ExpectedCost(Protocol):
    """A cost that is known in expectation: `counting.CostModel`."""

    def expected(self, keep_prob: Mapping[str, Float[Tensor, " width"]]) -> Float[Tensor, ""]:
        """Return the expected cost for keep probabilities; a group left out is kept whole."""
        ...

    def exact(self, keep: Mapping[str, Bool[Tensor, " width"]]) -> float:
        """Return the cost for what is kept."""
        ...


def project(
    logits: Mapping[str, Float[Tensor, " width"]], cost: ExpectedCost, budget: float, *, temperature: float = 1.0
) -> tuple[dict[str, Float[Tensor, " width"]], float]:
    """Return ``sigmoid((logits - shift) / temperature)`` for the shift at which the expected cost meets the budget.

    Parameters
    ----------
    logits : of each channel of each group
    cost : whose expectation is meant, taking the results for probabilities
    budget : share of the whole network's cost
    temperature : near 0, the results are near 0 and 1

    Returns
    -------
    The probabilities, and the shift. Gradients know that the shift follows from the logits (by implicit
    differentiation), so that no step along them changes the expected cost. Where the budget is out of reach, the
    nearest that can be reached.

    Examples
    --------
    >>> from stamp.counting import CostModel
    >>> from stamp.groups import trace
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> cost = CostModel.macs(net, trace(net, torch.rand(1, 3)), torch.rand(1, 3))
    >>> pi, shift = project({"0": torch.tensor([2.0, 1.0, 0.0, -1.0])}, cost, 0.5)
    >>> [round(float(cost.expected(pi)), 3), cost.exact({})]
    [10.0, 20]
    """
    still = {name: value.detach() for name, value in logits.items()}
    shift = _root(still, cost, budget, temperature)
    if not torch.is_grad_enabled() or not any(value.requires_grad for value in logits.values()):
        return _moved(logits, shift, temperature), shift
    at = torch.tensor(shift, dtype=torch.float64, requires_grad=True)
    moved = _moved({name: value.double() for name, value in still.items()}, at, temperature)
    slope = torch.autograd.grad(cost.expected(moved), at)[0]
    value = cost.expected(_moved(logits, shift, temperature))
    if not float(slope) < 0:
        return _moved(logits, shift, temperature), shift
    follows = shift - (value - value.detach()) / slope
    return _moved(logits, follows.to(next(iter(still.values()))), temperature), shift


def _moved(
    logits: Mapping[str, Float[Tensor, " _width"]], shift: float | Float[Tensor, ""], temperature: float
) -> dict[str, Float[Tensor, " _width"]]:
    return {name: torch.sigmoid((value - shift) / temperature) for name, value in logits.items()}


def _root(
    logits: Mapping[str, Float[Tensor, " _width"]], cost: ExpectedCost, budget: float, temperature: float
) -> float:
    """Return the shift that meets the budget; the expected cost falls with it."""
    flat = torch.cat(list(logits.values()))
    low, high = float(flat.min()) - _RANGE * temperature, float(flat.max()) + _RANGE * temperature
    aim = budget * float(cost.exact({}))
    with torch.no_grad():
        excess = [float(cost.expected(_moved(logits, shift, temperature))) - aim for shift in (low, high)]
        if excess[0] <= 0:
            return low
        if excess[1] >= 0:
            return high
        found = root_scalar(
            lambda shift: float(cost.expected(_moved(logits, shift, temperature))) - aim,
            bracket=(low, high), method="brentq", xtol=1e-10, maxiter=200,
        )  # fmt: skip
    return float(found.root)
