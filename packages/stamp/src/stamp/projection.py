"""Keep probabilities that meet a budget in expectation: all logits moved by one number (spec 2.6).

The specification weighs an expected cost against the loss, and its weight has to be tuned or raised until the budget
holds. Here the budget holds in every step, whatever it is, and one generator serves all budgets.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
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
    full = float(cost.exact({}))
    flat = torch.cat([value.detach() for value in logits.values()])
    low, high = float(flat.min()) - _RANGE * temperature, float(flat.max()) + _RANGE * temperature

    def moved(shift: float | Tensor, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.sigmoid((value - shift) / temperature) for name, value in values.items()}

    still = {name: value.detach() for name, value in logits.items()}
    with torch.no_grad():
        for _ in range(40):
            middle = (low + high) / 2
            if float(cost.expected(moved(middle, still))) > budget * full:
                low = middle
            else:
                high = middle
    shift = (low + high) / 2
    if not torch.is_grad_enabled() or not any(value.requires_grad for value in logits.values()):
        return moved(shift, logits), shift
    at = torch.tensor(shift, dtype=torch.float64, requires_grad=True)
    slope = torch.autograd.grad(cost.expected(moved(at, {n: v.double() for n, v in still.items()})), at)[0]
    value = cost.expected(moved(shift, logits))
    if not float(slope) < 0:
        return moved(shift, logits), shift
    follows = shift - (value - value.detach()) / slope
    return moved(follows.to(flat), logits), shift
