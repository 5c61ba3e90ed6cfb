"""DropBits: grid points removed at random by bit level, and bit-widths learned from how often they may be.

Lee et al., arXiv:1911.12990 and arXiv:2109.02100; the gates are hard-concrete (Louizos et al., "Learning Sparse Neural
Networks through L0 Regularization", arXiv:1712.01312). Level k of a grid is the points of magnitude 2^(k-1) .. 2^k - 1.
Every level above a fixed base has a gate Z_k; the mask of a level is the product of the gates up to it, so that a level
never vanishes alone. The masked distribution is ``M_level(i) pi_i / sum_j M_level(j) pi_j``; its mode is quantized to,
and the multi-class straight-through estimator differentiates it. Masses of levels are differences of one CDF, so the
cost grows with the bits and not with the number of grid points.

Our reconstruction: the full text could not be read (see the README).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from srq_dropbits.functional import Baseline, grid_round, interval_log_mass, near_grid
from srq_dropbits.grid import Grid, levels_of
from srq_dropbits.pieces import Plan, applies, plan_of, quantize

__all__ = [
    "GAMMA",
    "SHARPNESS",
    "ZETA",
    "counter_uniform",
    "gate_count",
    "hard_concrete",
    "hard_concrete_mean",
    "keep_logit",
    "masked_log_probs",
    "masked_quantize",
    "nested_masks",
    "plan_levels",
    "probability_nonzero",
    "residual_quantize",
]

SHARPNESS = 2 / 3
"""Temperature of the hard-concrete distribution (L0, section 4)."""
GAMMA = -0.1
"""Lower end of the stretched interval."""
ZETA = 1.1
"""Upper end of the stretched interval."""
# exp of it is finite in float32, and no mass that matters is smaller.
_EXPONENT = 60.0


def hard_concrete(phi: Float[Tensor, "*gates"], uniform: Float[Tensor, "*gates"]) -> Float[Tensor, "*gates"]:
    """Draw gates in [0, 1] that are 0 or 1 with positive probability, differentiable in `phi`.

    Parameters
    ----------
    phi : log-odds of each gate, shape (gates,) or any other
    uniform : draws from (0, 1), of the same shape

    Examples
    --------
    >>> hard_concrete(torch.zeros(3), torch.tensor([0.01, 0.5, 0.99]))
    tensor([0.0000, 0.5000, 1.0000])
    """
    uniform = uniform.clamp(1e-6, 1 - 1e-6)
    s = torch.sigmoid((uniform.log() - torch.log1p(-uniform) + phi) / SHARPNESS)
    return (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def hard_concrete_mean(phi: Float[Tensor, "*gates"]) -> Float[Tensor, "*gates"]:
    """Give the gates used at test time (L0, Eq 13).

    Parameters
    ----------
    phi : log-odds of each gate, shape (gates,) or any other

    Examples
    --------
    >>> hard_concrete_mean(torch.tensor([-5.0, 0.0, 5.0]))
    tensor([0.0000, 0.5000, 1.0000])
    """
    return (torch.sigmoid(phi) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


_SHIFT = SHARPNESS * float(torch.log(torch.tensor(-GAMMA / ZETA)))


def probability_nonzero(phi: Float[Tensor, "*gates"]) -> Float[Tensor, "*gates"]:
    """Give the probability that a gate is not 0 (L0, Eq 12).

    Parameters
    ----------
    phi : log-odds of each gate, shape (gates,) or any other

    Examples
    --------
    >>> probability_nonzero(torch.tensor([0.0]))
    tensor([0.8318])
    """
    return torch.sigmoid(phi - _SHIFT)


def keep_logit(probability: float) -> float:
    """Give the log-odds at which a gate is not 0 with this probability.

    Parameters
    ----------
    probability : between 0 and 1, both excluded

    Examples
    --------
    >>> round(float(probability_nonzero(torch.tensor(keep_logit(0.9)))), 6)
    0.9
    """
    return float(torch.logit(torch.tensor(probability, dtype=torch.float64))) + _SHIFT


def nested_masks(gates: Float[Tensor, "*gates"]) -> Float[Tensor, "*gates"]:
    """Multiply every gate with those below it: a level is only there if all lower ones are.

    Parameters
    ----------
    gates : lowest level first, shape (gates,)

    Examples
    --------
    >>> nested_masks(torch.tensor([1.0, 0.5, 0.0, 1.0]))
    tensor([1.0000, 0.5000, 0.0000, 0.0000])
    """
    return gates.cumprod(-1)


_MIX = (-0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)


def counter_uniform(counter: Tensor, seed: int, count: int) -> Tensor:
    """Draw uniform numbers that depend on a counter and a seed alone, on any device, in graphs and in every process.

    The counter goes through splitmix64 (Steele et al. 2014). Processes that train together thereby draw the same masks
    without a message, and a resumed training the same as an uninterrupted one.

    Parameters
    ----------
    counter : int64 scalar, as () tensor
    seed : of the stream
    count : how many numbers

    Returns
    -------
    float32 in (0, 1), shape (count,).

    Examples
    --------
    >>> counter_uniform(torch.tensor(3), 0, 2)
    tensor([0.6007, 0.9091])
    """
    offset = seed * 0x2545F491 % 2**62
    z = (counter * 65_536 + torch.arange(count, device=counter.device) + 1 + offset) * _MIX[0]
    for shift, factor in ((30, _MIX[1]), (27, _MIX[2]), (31, 1)):
        # int64 shifts keep the sign; the mask makes them logical.
        z = (z ^ ((z >> shift) & (2 ** (64 - shift) - 1))) * factor
    return (((z >> 40) & 0xFFFFFF).float() + 0.5) / 2**24


# ---- masked quantization


def _sides(grid: Grid, base: int, sharing: str) -> tuple[tuple[int, int], list[list[tuple[int, int]]]]:
    """Give the base interval that is always there, and for each gate the intervals of points that it removes."""
    top = 2**base - 1
    core = (max(grid.n_lo, -top), min(grid.n_hi, top))
    groups: list[list[tuple[int, int]]] = []
    if sharing == "bit":
        for low, below, above in levels_of(grid)[base:]:
            groups.append([(-below, -low)] * (below > 0) + [(low, above)] * (above > 0))
        if base == grid.levels:
            core = (grid.n_lo, grid.n_hi)
        return core, groups
    outer = range(top + 1, max(-grid.n_lo, grid.n_hi) + 1)
    groups = [[(-n, -n)] * (-n >= grid.n_lo) + [(n, n)] * (n <= grid.n_hi) for n in outer]
    return core, groups


def gate_count(grid: Grid, base: int, sharing: str = "bit") -> int:
    """Count the gates of a grid whose first `base` levels are always there.

    Parameters
    ----------
    grid : with stride 1
    base : levels without a gate, 0 or more
    sharing : ``bit`` or ``endpoint``

    Examples
    --------
    >>> gate_count(Grid.signed(4), 1), gate_count(Grid.signed(4), 1, "endpoint")
    (2, 6)
    """
    return len(_sides(grid, base, sharing)[1])


def masked_log_probs(
    x: Float[Tensor, "*shape"],
    alpha: Float[Tensor, "..."],
    sigma: Float[Tensor, "..."],
    grid: Grid,
    masks: Float[Tensor, " gates"],
    *,
    base: int = 1,
    sharing: str = "bit",
) -> tuple[Tensor, Tensor]:
    """Find the mode of the masked distribution, and its log probability (specification 2.5).

    Parameters
    ----------
    x : tensor of any shape, such as (n, m)
    alpha : step > 0, (1,) or anything that broadcasts against `x`
    sigma : scale of the logistic noise > 0
    grid : with stride 1
    masks : in [0, 1], one a gate, lowest level first, already nested; shape (gates,)
    base : lowest levels that have no gate
    sharing : ``bit``: a gate removes a whole level; ``endpoint``: a pair of points -n and n

    Returns
    -------
    The mode, integers as floating-point numbers, and the log of its masked probability; both of the shape of `x`.
    """
    core, groups = _sides(grid, base, sharing)
    x = near_grid(x, alpha, sigma, grid.n_lo, grid.n_hi)
    nearest = grid_round(x.detach(), alpha.detach(), grid.n_lo, grid.n_hi)
    log_masses = [interval_log_mass(x, alpha, sigma, float(core[0]), float(core[1]))]
    candidates = [nearest.clamp(*core)]
    for intervals in groups:
        parts = [interval_log_mass(x, alpha, sigma, float(low), float(high)) for low, high in intervals]
        log_masses.append(parts[0] if len(parts) == 1 else torch.logaddexp(*parts))
        candidates.append(_nearest_in(nearest, intervals))
    # Within a level the nearest point has the most mass, so that the mode is among one candidate a level.
    weights = torch.cat([masks.new_ones(1), masks])
    with torch.no_grad():
        scores = torch.stack(
            [
                interval_log_mass(x, alpha, sigma, n, n) + weight.log()
                for n, weight in zip(candidates, weights, strict=True)
            ]
        )
        chosen = scores.argmax(0)
        mode = torch.stack(candidates).gather(0, chosen.unsqueeze(0)).squeeze(0)
        present = torch.stack([mass.detach() + weight.log() for mass, weight in zip(log_masses, weights, strict=True)])
        shift = present.max(0).values
    # Masks enter by value and not by logarithm: one that is 0 has a gradient, too.
    total = sum(
        (weight * (mass - shift).clamp(max=_EXPONENT).exp() for mass, weight in zip(log_masses, weights, strict=True)),
        torch.zeros((), dtype=x.dtype, device=x.device),
    )
    own = interval_log_mass(x, alpha, sigma, mode, mode) + weights[chosen].clamp(min=1e-12).log()
    return mode, own - shift - total.log()


def _nearest_in(nearest: Tensor, intervals: Sequence[tuple[int, int]]) -> Tensor:
    if len(intervals) == 1:
        return nearest.clamp(*intervals[0])
    (low, below), (above, high) = intervals
    return torch.where(nearest < 0, nearest.clamp(low, below), nearest.clamp(above, high))


def masked_quantize(
    x: Float[Tensor, "*shape"],
    alpha: Float[Tensor, "..."],
    sigma: Float[Tensor, "..."],
    grid: Grid,
    masks: Float[Tensor, " gates"],
    *,
    base: int = 1,
    sharing: str = "bit",
    baseline: Baseline = "input",
) -> Float[Tensor, "*shape"]:
    """Quantize to the mode of the masked distribution; gradients reach x, alpha, sigma and the masks through it.

    With masks of 0 and 1 the result is the nearest point that is left; with all 1 it is
    :func:`srq_dropbits.functional.mode_quantize`.

    Parameters
    ----------
    x : tensor of any shape, such as (n, m)
    alpha : step > 0, (1,) or anything that broadcasts against `x`
    sigma : scale of the logistic noise > 0
    grid : with stride 1
    masks : as :func:`masked_log_probs` takes them, shape (gates,)
    base : lowest levels that have no gate
    sharing : ``bit`` or ``endpoint``
    baseline : as in :func:`srq_dropbits.functional.mode_quantize`

    Examples
    --------
    >>> x = torch.tensor([0.4, 2.6, -3.0])
    >>> masked_quantize(x, torch.tensor(1.0), torch.tensor(1 / 3), Grid.signed(3), torch.tensor([0.0]))
    tensor([ 0.,  1., -1.])
    """
    u = alpha / sigma
    if sharing == "bit" and applies(x, alpha, u):
        plan = plan_levels(u.item(), grid, base, masks)
        if plan is not None:
            return quantize(x, alpha, u, masks, plan, baseline)
    mode, log_probability = masked_log_probs(x, alpha, sigma, grid, masks, base=base, sharing=sharing)
    probability = log_probability.exp()
    with torch.no_grad():
        v = x / alpha
        half = 0.0 if baseline == "clipped" else 0.5
        lever = mode if baseline == "zero" else mode - v.clamp(grid.n_lo - half, grid.n_hi + half)
        # Saturated entries of the whole grid take no gradient; those whose own level is dropped do.
        lever = lever * alpha * ((v >= grid.n_lo - 0.5) & (v <= grid.n_hi + 0.5))
    return alpha * mode + lever * (probability - probability.detach())


def plan_levels(u: float, grid: Grid, base: int, masks: Tensor) -> Plan | None:
    """Plan the computation in pieces of a grid whose levels have masks; None where it does not serve.

    Parameters
    ----------
    u : step / noise scale
    grid : with stride 1
    base : lowest levels that have no gate
    masks : nested, one a level above the base, shape (gates,)
    """
    left = [grid.upto(level) for level in range(base, grid.levels + 1)]
    bounds = [(each.n_lo, each.n_hi) for each in left]
    return plan_of(u, (grid.n_lo, grid.n_hi), bounds, [1.0, *masks.tolist()])


def residual_quantize(
    x: Float[Tensor, "*shape"],
    grid: Grid,
    masks: Float[Tensor, " gates"],
    quantize: Callable[[Tensor, Grid], Tensor],
    *,
    base: int = 1,
) -> Float[Tensor, "*shape"]:
    """Add up the levels' contributions, each times its mask: gates act on the value and not on the probability.

    ``x_hat = x_base + sum_k M_k (x_k - x_(k-1))``, where ``x_k`` is ``x`` quantized to the grid of the first k levels.

    Parameters
    ----------
    x : tensor of any shape, such as (n, m)
    grid : with stride 1
    masks : in [0, 1], one a level above the base, already nested; shape (gates,)
    quantize : called with x and the smaller grid; its gradients are kept
    base : lowest levels that have no gate

    Examples
    --------
    >>> x = torch.tensor([0.4, 2.6])
    >>> alpha = torch.tensor(1.0)
    >>> plain = lambda x, grid: alpha * grid_round(x, alpha, grid.n_lo, grid.n_hi)
    >>> residual_quantize(x, Grid.signed(3), torch.tensor([0.5]), plain)
    tensor([0., 2.])
    """
    result = below = quantize(x, grid.upto(base))
    for place, level in enumerate(range(base + 1, grid.levels + 1)):
        whole = quantize(x, grid.upto(level))
        result = result + masks[place] * (whole - below)
        below = whole
    return result
