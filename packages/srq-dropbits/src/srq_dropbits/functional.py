"""Relaxed and semi-relaxed quantization as functions of a tensor, a step and a scale.

Louizos et al., "Relaxed Quantization for Discretized Neural Networks", arXiv:1810.01875 (RQ): a value is blurred by
logistic noise, and the mass that falls into each cell of the grid makes a categorical distribution ``pi``. Lee et al.,
"Semi-Relaxed Quantization with DropBits", arXiv:1911.12990, and "Cluster-Promoting Quantization", arXiv:2109.02100
(SRQ): the forward pass takes the mode of ``pi``, which is plain rounding, and the backward pass differentiates ``pi``
at the mode. The closed forms are in ``v = x / alpha`` and ``u = alpha / sigma``, on which alone ``pi`` depends; a
quantized value costs the same whatever the number of grid points.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid, one_hot

from srq_dropbits.pieces import PIECE, Baseline, applies, plan_of, quantize
from srq_dropbits.soft import SlopeTable, mean_slopes

__all__ = [
    "Baseline",
    "cell_log_mass",
    "concrete_quantize",
    "grid_round",
    "interval_log_mass",
    "log_probs",
    "lsq_quantize",
    "mode_quantize",
    "soft_gradients",
    "stochastic_round",
]


def grid_round(x: Tensor, alpha: Tensor, n_lo: int, n_hi: int) -> Tensor:
    """Round to the nearest grid point: ``clip(round(x / alpha), n_lo, n_hi)``, halves to even (RQ, Algorithm 2).

    Parameters
    ----------
    x : tensor of any shape, such as (n, m)
    alpha : step > 0, broadcast against `x`
    n_lo : lowest integer of the grid
    n_hi : highest integer of the grid

    Returns
    -------
    The integers, as floating-point numbers of the type of `x`.

    Examples
    --------
    >>> grid_round(torch.tensor([-9.0, 0.24, 0.25, 0.8]), torch.tensor(0.5), -3, 3)
    tensor([-3.,  0.,  0.,  2.])
    """
    return (x / alpha).round_().clamp_(n_lo, n_hi)


# ---- the categorical distribution


def _log_one_minus_exp(width: Tensor) -> Tensor:
    """Give log(1 - exp(-width)) for width > 0."""
    return torch.log(-torch.expm1(-width))


def interval_log_mass(x: Tensor, alpha: Tensor, sigma: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """Give the log of the mass that logistic noise around `x` puts on cells `low` .. `high` of the grid, both included.

    ``sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - exp(a - b))``: nothing cancels, however far `x` is.

    Parameters
    ----------
    x : tensor of any shape, such as (n, m)
    alpha : step > 0
    sigma : scale of the logistic noise > 0
    low : first grid point, a number or a tensor that broadcasts against `x`
    high : last grid point

    Examples
    --------
    >>> interval_log_mass(torch.tensor(0.0), torch.tensor(1.0), torch.tensor(1 / 3), -1.0, 1.0).exp()
    tensor(0.9780)
    """
    a = (alpha * (low - 0.5) - x) / sigma
    b = (alpha * (high + 0.5) - x) / sigma
    # The width from the cells, not from b - a, which rounds when x is far away.
    width = alpha / sigma * (torch.as_tensor(high - low, dtype=x.dtype, device=x.device) + 1.0)
    return logsigmoid(b) + logsigmoid(-a) + _log_one_minus_exp(width)


def near_grid(x: Tensor, alpha: Tensor, sigma: Tensor, n_lo: int, n_hi: int) -> Tensor:
    """Move far entries to 40 noise scales beyond the grid, where ``pi`` has reached its limit.

    Farther out, log masses are so large that their differences, and with them ``pi``, drown in rounding.

    Parameters
    ----------
    x : tensor of any shape, such as (n, m)
    alpha : step > 0
    sigma : scale of the logistic noise > 0
    n_lo : lowest integer of the grid
    n_hi : highest integer of the grid
    """
    alpha, margin = alpha.detach(), 40.0 * sigma.detach()
    return torch.minimum(torch.maximum(x, alpha * (n_lo - 0.5) - margin), alpha * (n_hi + 0.5) + margin)


def cell_log_mass(x: Tensor, alpha: Tensor, sigma: Tensor, n: Tensor, n_lo: int, n_hi: int) -> Tensor:
    """Give log pi of one grid point for every entry of `x` (specification 2.3, from RQ Eq 2-4).

    Parameters
    ----------
    x : tensor of any shape, such as (n, m)
    alpha : step > 0
    sigma : scale of the logistic noise > 0
    n : the grid point, broadcast against `x`
    n_lo : lowest integer of the grid
    n_hi : highest integer of the grid
    """
    return interval_log_mass(x, alpha, sigma, n, n) - interval_log_mass(x, alpha, sigma, float(n_lo), float(n_hi))


def log_probs(x: Tensor, alpha: Tensor, sigma: Tensor, n_lo: int, n_hi: int, *, fuzz: float = 0.0) -> Tensor:
    """Give the log of the categorical distribution over the grid (RQ, Eq 2-4), finite for any finite `x`.

    Parameters
    ----------
    x : tensor of any shape, such as (n, m)
    alpha : step > 0
    sigma : scale of the logistic noise > 0; its standard deviation is sigma * pi / sqrt(3)
    n_lo : lowest integer of the grid
    n_hi : highest integer of the grid
    fuzz : what RQ's Algorithm 1 adds to every numerator, and K times to the denominator

    Returns
    -------
    Tensor of shape (n, m, K), K grid points last.

    Examples
    --------
    >>> log_probs(torch.tensor([0.3]), torch.tensor(1.0), torch.tensor(1 / 3), -1, 1).exp()
    tensor([[0.0812, 0.5805, 0.3383]])
    """
    x = near_grid(x, alpha, sigma, n_lo, n_hi)
    x, alpha, sigma = (torch.as_tensor(value).unsqueeze(-1) for value in (x, alpha, sigma))
    n = torch.arange(n_lo, n_hi + 1, dtype=x.dtype, device=x.device)
    if fuzz:
        masses = interval_log_mass(x, alpha, sigma, n, n).exp() + fuzz
        total = interval_log_mass(x, alpha, sigma, float(n_lo), float(n_hi)).exp() + len(n) * fuzz
        return (masses / total).log()
    return cell_log_mass(x, alpha, sigma, n, n_lo, n_hi)


# ---- SRQ: the mode forward, the distribution backward


def mode_quantize(
    x: Float[Tensor, "*shape"],
    alpha: Float[Tensor, "..."],
    sigma: Float[Tensor, "..."],
    n_lo: int,
    n_hi: int,
    *,
    baseline: Baseline = "input",
    soft: bool = False,
) -> Float[Tensor, "*shape"]:
    """Quantize to the mode of ``pi`` and differentiate ``pi`` at it: the multi-class straight-through estimator.

    With the mode ``m``, ``g_m = alpha n_m`` and ``G`` the gradient with respect to the result (specification 2.4)::

        dx     = G (g_m - c) dpi_m/dx
        dalpha = sum G (n_m + (g_m - c) dpi_m/dalpha)
        dsigma = sum G (g_m - c) dpi_m/dsigma

    Outside the grid's cells, where the mode is saturated, ``x`` gets no gradient and ``alpha`` gets ``n_m`` (ours).

    Parameters
    ----------
    x : tensor of any shape, such as (n, m)
    alpha : step > 0, (1,) or anything that broadcasts against `x`, such as (channels, 1)
    sigma : scale of the logistic noise > 0, of the shape of `alpha` or (1,)
    n_lo : lowest integer of the grid
    n_hi : highest integer of the grid
    baseline : the control variate ``c``: ``zero`` is the paper's text read literally; ``input`` is ``x``, within the
        grid's outer cell edges, with which gradients oppose descent in the outer halves of the outermost cells;
        ``clipped`` is ``x`` within the outermost grid points, with which they do not there. In inner cells both oppose
        it in a sliver beside the middle, where the grid's ends have moved the top of ``pi_m`` to: at most 0.013 alpha
        wide where sigma is alpha / 3, with a gain of at worst -7e-5 beside others up to 0.36; 0.07 alpha and -8e-4 at
        alpha / 2
    soft : all coordinates of ``pi`` instead of the mode's alone, ``dx = G d(sum_i pi_i g_i)/dx``, the multi-class form
        of the binary straight-through estimator; needs no baseline, and costs a sigmoid for each grid point that the
        noise reaches

    Examples
    --------
    >>> x = torch.tensor([0.3, 0.45], requires_grad=True)
    >>> mode_quantize(x, torch.tensor(1.0), torch.tensor(1 / 3), -1, 1).sum().backward()
    >>> x.grad
    tensor([0.1301, 0.2520])
    """
    if soft:
        return _Soft.apply(x, alpha, alpha / sigma, n_lo, n_hi)
    u = alpha / sigma
    if applies(x, alpha, u):
        plan = plan_of(u.item(), (n_lo, n_hi), [(n_lo, n_hi)], [1.0])
        if plan is not None:
            return quantize(x, alpha, u, None, plan, baseline)
    return _Mode.apply(x, alpha, u, n_lo, n_hi, baseline)


class _Soft(torch.autograd.Function):
    """Rounding whose backward is the gradient of the mean of ``pi``; the grid itself is differentiated at the mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, u: Tensor, n_lo: int, n_hi: int) -> Tensor:
        ctx.save_for_backward(x, alpha, u)
        ctx.grid = (n_lo, n_hi)
        return grid_round(x, alpha, n_lo, n_hi).mul_(alpha)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, alpha, u = ctx.saved_tensors
        n_lo, n_hi = ctx.grid
        wanted = ctx.needs_input_grad[1], ctx.needs_input_grad[2]
        if not applies(x, alpha, u):
            v, n, weight, inside = _soft_places(x, gradient, alpha, n_lo, n_hi)
            by_v, by_u = mean_slopes(inside, u, n_lo, n_hi, by_u=wanted[1])
            d_x = by_v.mul_(weight)
            d_alpha = _sum_to(n.mul_(gradient).sub_(v * d_x), alpha) if wanted[0] else None
            return d_x, d_alpha, None if by_u is None else _sum_to(by_u.mul_(weight).mul_(alpha), u), None, None
        d_x, by_alpha, by_u = soft_gradients(x, gradient, alpha, u, n_lo, n_hi, by_u=wanted[1])
        d_u = None if by_u is None else (by_u * alpha.reshape(())).reshape(u.shape)
        return d_x, by_alpha.reshape(alpha.shape) if wanted[0] else None, d_u, None, None


def soft_gradients(
    x: Tensor, gradient: Tensor, alpha: Tensor, u: Tensor, n_lo: int, n_hi: int, *, by_u: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Give the soft estimator's gradients for one step on the CPU.

    Parameters
    ----------
    x : tensor of any shape, such as (n, m)
    gradient : of the quantized values, of the shape of `x`
    alpha : step > 0, one number
    u : step / noise scale, one number
    n_lo : lowest integer of the grid
    n_hi : highest integer of the grid
    by_u : whether the gradient of `u` is wanted

    Returns
    -------
    The gradients of x, of the step at fixed `u`, (), and of `u` / `alpha`, () or None.
    """
    step, ratio = alpha.reshape(1), u.reshape(1)
    table = None
    if x.dtype == torch.float32 and SlopeTable.pays(x.numel(), float(u)):
        table = SlopeTable(float(u), n_lo, n_hi, by_u=by_u)
    flat_x, flat_gradient = x.reshape(-1), gradient.reshape(-1)
    d_x = torch.empty_like(flat_x)
    of_alpha, of_u = x.new_zeros(()), x.new_zeros(())
    # Pieces that stay in the cache.
    for start in range(0, len(flat_x), PIECE):
        piece = slice(start, start + PIECE)
        upstream = flat_gradient[piece]
        v, n, weight, inside = _soft_places(flat_x[piece], upstream, step, n_lo, n_hi)
        slopes = table(inside) if table else mean_slopes(inside, ratio, n_lo, n_hi, by_u=by_u)
        found = torch.mul(slopes[0], weight, out=d_x[piece])
        of_alpha += n.dot(upstream) - v.dot(found)
        if slopes[1] is not None:
            of_u += slopes[1].dot(weight)
    return d_x.view_as(x), of_alpha, of_u if by_u else None


def _soft_places(
    x: Tensor, gradient: Tensor, alpha: Tensor, n_lo: int, n_hi: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Give x / alpha, the mode, the gradient where x is not saturated, and x / alpha within the grid's cells."""
    v = (x / alpha).clamp_(n_lo - 1, n_hi + 1)
    n = v.round().clamp_(n_lo, n_hi)
    # The gradient of clipping: zero where the mode is saturated.
    weight = torch.ops.aten.hardtanh_backward(gradient, v, n_lo - 0.5, n_hi + 0.5)
    return v, n, weight, v.clamp(n_lo - 0.5, n_hi + 0.5)


def _sum_to(value: Tensor, like: Tensor) -> Tensor:
    return value.sum().reshape(like.shape) if like.numel() == 1 else value.sum_to_size(like.shape)


class _Mode(torch.autograd.Function):
    """Rounding whose backward is the gradient of the mode's probability in x, alpha and u = alpha / sigma.

    For steps a channel, other devices and compiled graphs; else see :mod:`srq_dropbits.pieces`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, u: Tensor, n_lo: int, n_hi: int, baseline: Baseline) -> Tensor:
        ctx.save_for_backward(x, alpha, u)
        ctx.grid, ctx.baseline = (n_lo, n_hi), baseline
        return grid_round(x, alpha, n_lo, n_hi).mul_(alpha)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, alpha, u = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1], ctx.needs_input_grad[2]
        n_lo, n_hi = ctx.grid
        d_x, d_alpha, d_u = _mode_backward(x, gradient, alpha, u, n_lo, n_hi, ctx.baseline, wanted)
        d_alpha = None if d_alpha is None else _sum_to(d_alpha, alpha)
        return d_x, d_alpha, None if d_u is None else _sum_to(d_u, u), None, None, None


def _mode_backward(
    x: Tensor,
    gradient: Tensor,
    alpha: Tensor,
    u: Tensor,
    n_lo: int,
    n_hi: int,
    baseline: Baseline,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Give the gradient of x, and, entry by entry, those of alpha and u where they are wanted."""
    v, n, weight, *others = gradient.new_empty((12, *gradient.shape)).unbind(0)
    torch.div(x, alpha, out=v)
    # Saturated entries need their side alone; what overflows in x / alpha would make NaN below.
    torch.round(v.clamp_(n_lo - 1, n_hi + 1), out=n).clamp_(n_lo, n_hi)
    # Zero where saturated: those entries reach alpha through n alone.
    torch.le(torch.sub(v, n, out=weight).abs_(), 0.5, out=weight).mul_(gradient)
    weight.mul_(_lever(v, n, n_lo, n_hi, baseline, others[0]))
    slope, tilt = _mode_derivatives(v, n, u, n_lo, n_hi, others, tilt=wanted[1])
    # The lever lacks a factor alpha, which d/dx = d/dv / alpha takes back.
    d_x = slope.mul_(weight)
    d_alpha = n.mul_(gradient).sub_(v.mul_(d_x)) if wanted[0] else None
    return d_x, d_alpha, None if tilt is None else tilt.mul_(weight.mul_(alpha))


def _lever(v: Tensor, n: Tensor, n_lo: int, n_hi: int, baseline: Baseline, out: Tensor) -> Tensor:
    """Give (g_m - c) / alpha."""
    if baseline == "zero":
        return n
    half = 0.0 if baseline == "clipped" else 0.5
    return torch.sub(n, torch.clamp(v, n_lo - half, n_hi + half, out=out), out=out)


def _mode_derivatives(
    v: Tensor, n: Tensor, u: Tensor, n_lo: int, n_hi: int, scratch: list[Tensor], *, tilt: bool
) -> tuple[Tensor, Tensor | None]:
    """Differentiate the mode's probability with respect to ``v = x / alpha`` and ``u = alpha / sigma``.

    The noise's tails beyond the cell are ``p = sigmoid(-u (r + 1/2))`` and ``q = sigmoid(u (r - 1/2))``, where
    ``r = v - n``; with the tails beyond the grid the mode's probability is ``(1 - p - q) / (1 - below - above)``.
    Entries outside the grid are moved to its edge, where nothing vanishes or overflows.
    """
    r, p, q, below, above, total, pi, inside, spread = scratch
    torch.clamp(v, n_lo - 0.5, n_hi + 0.5, out=inside)
    torch.sub(inside, n, out=r)
    torch.add(r, 0.5, out=p).mul_(-u).sigmoid_()
    torch.sub(r, 0.5, out=q).mul_(u).sigmoid_()
    torch.sub(inside, n_lo - 0.5, out=below).mul_(-u).sigmoid_()
    torch.sub(inside, n_hi + 0.5, out=above).mul_(u).sigmoid_()
    torch.add(below, above, out=total).neg_().add_(1.0)
    torch.add(p, q, out=pi).neg_().add_(1.0).div_(total)
    for tail in (p, q, below, above):
        tail.addcmul_(tail, tail, value=-1.0)
    if tilt:
        torch.sub(below, above, out=spread).mul_(inside).add_(below, alpha=0.5 - n_lo).add_(above, alpha=n_hi + 0.5)
        spread.mul_(pi).neg_().addcmul_(p, r).addcmul_(q, r, value=-1.0)
        spread.add_(p, alpha=0.5).add_(q, alpha=0.5).div_(total)
    by_v = p.sub_(q).addcmul_(below.sub_(above), pi, value=-1.0).mul_(u).div_(total)
    return by_v, spread if tilt else None


# ---- LSQ


def lsq_quantize(
    x: Float[Tensor, "*shape"], alpha: Float[Tensor, "..."], n_lo: int, n_hi: int
) -> Float[Tensor, "*shape"]:
    """Round, with the identity as gradient inside the range and LSQ's rule for the step (Esser et al. 2020).

    ``dx = G`` where ``n_lo <= x / alpha <= n_hi``, else 0; ``dalpha = sum G (n - x / alpha)`` inside and ``sum G n``
    outside.

    Parameters
    ----------
    x : tensor of any shape, such as (n, m)
    alpha : step > 0, (1,) or anything that broadcasts against `x`
    n_lo : lowest integer of the grid
    n_hi : highest integer of the grid

    Examples
    --------
    >>> x = torch.tensor([0.3, 9.0], requires_grad=True)
    >>> lsq_quantize(x, torch.tensor(1.0), -3, 3).sum().backward()
    >>> x.grad
    tensor([1., 0.])
    """
    return _LSQ.apply(x, alpha, n_lo, n_hi)


class _LSQ(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, n_lo: int, n_hi: int) -> Tensor:
        ctx.save_for_backward(x, alpha)
        ctx.grid = (n_lo, n_hi)
        return grid_round(x, alpha, n_lo, n_hi).mul_(alpha)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, alpha = ctx.saved_tensors
        n_lo, n_hi = ctx.grid
        v = x / alpha
        clipped = v.clamp(n_lo, n_hi)
        d_x = gradient * clipped.eq(v)
        d_alpha = None
        if ctx.needs_input_grad[1]:
            # Where d_x is not 0, clipped is v; elsewhere v may have overflowed.
            d_alpha = _sum_to(clipped.round().mul_(gradient).sub_(clipped.mul_(d_x)), alpha)
        return d_x, d_alpha, None, None


# ---- RQ: concrete samples, and stochastic rounding


def concrete_quantize(
    x: Float[Tensor, "*shape"],
    alpha: Float[Tensor, "..."],
    sigma: Float[Tensor, "..."],
    n_lo: int,
    n_hi: int,
    *,
    temperature: float | int = 1.0,
    hard: bool = False,
    forward_mode: bool = False,
    delta: float | int | None = None,
    fuzz: float | int = 0.0,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "*shape"]:
    """Quantize by a concrete (Gumbel-softmax) sample of the grid point: RQ (RQ, Eq 5).

    Parameters
    ----------
    x : tensor of any shape, such as (n, m)
    alpha : step > 0, (1,) or anything that broadcasts against `x`
    sigma : scale of the logistic noise > 0
    n_lo : lowest integer of the grid
    n_hi : highest integer of the grid
    temperature : of the concrete distribution > 0
    hard : forward with the sampled grid point, backward through the relaxed sample: RQ-ST (RQ, section 2.1)
    forward_mode : forward with the mode of ``pi``, backward through the relaxed sample: what a third party's code that
        cites the SRQ paper does
    delta : grid points farther than delta * sigma from the nearest one are left out (RQ, Eq 6-7); None keeps all
    fuzz : as in :func:`log_probs`
    generator : source of the noise; None takes torch's own

    Returns
    -------
    Tensor of the shape of `x`; off the grid unless `hard` or `forward_mode`.

    Examples
    --------
    >>> draw = torch.Generator().manual_seed(0)
    >>> concrete_quantize(torch.tensor([0.3]), torch.tensor(1.0), torch.tensor(0.3), -1, 1, hard=True, generator=draw)
    tensor([1.])
    """
    if delta is None:
        logits = log_probs(x, alpha, sigma, n_lo, n_hi, fuzz=float(fuzz))
        n = torch.arange(n_lo, n_hi + 1, dtype=x.dtype, device=x.device)
        support = n.expand(logits.shape)
    else:
        logits, support = _local_log_probs(x, alpha, sigma, n_lo, n_hi, float(delta))
    noise = _gumbel(logits, generator)
    relaxed = ((logits + noise) / temperature).softmax(-1)
    step = alpha.unsqueeze(-1)
    if not (hard or forward_mode):
        return (relaxed * (step * support)).sum(-1)
    if forward_mode:
        chosen = grid_round(x.detach(), alpha.detach(), n_lo, n_hi).unsqueeze(-1).eq(support)
    else:
        chosen = one_hot(relaxed.argmax(-1), relaxed.shape[-1]).bool()
    picked = chosen.to(x.dtype) + relaxed - relaxed.detach()
    # The grid's own gradient is that of the point that was taken, as the forward value is.
    value = (picked * (step * support).detach()).sum(-1)
    n_taken = (chosen * support).sum(-1)
    return alpha * n_taken + (value - value.detach())


def _local_log_probs(
    x: Tensor, alpha: Tensor, sigma: Tensor, n_lo: int, n_hi: int, delta: float
) -> tuple[Tensor, Tensor]:
    x = near_grid(x, alpha, sigma, n_lo, n_hi)
    nearest = grid_round(x.detach(), alpha.detach(), n_lo, n_hi)
    # One window size for the whole tensor, the largest that is needed, so that the result is rectangular.
    reach = max(1, int((delta * (sigma / alpha).detach().max()).floor()))
    offsets = torch.arange(-reach, reach + 1, dtype=x.dtype, device=x.device)
    support = nearest.unsqueeze(-1) + offsets
    inside = (support >= n_lo) & (support <= n_hi)
    low = (nearest - reach).clamp(min=n_lo)
    high = (nearest + reach).clamp(max=n_hi)
    wide = (x.unsqueeze(-1), alpha.unsqueeze(-1), sigma.unsqueeze(-1))
    logits = interval_log_mass(*wide, support, support) - interval_log_mass(x, alpha, sigma, low, high).unsqueeze(-1)
    return logits.masked_fill(~inside, -torch.inf), support.clamp(n_lo, n_hi)


def _gumbel(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return -torch.empty_like(like).exponential_(generator=generator).log()


def stochastic_round(
    x: Float[Tensor, "*shape"],
    alpha: Float[Tensor, "..."],
    n_lo: int,
    n_hi: int,
    *,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "*shape"]:
    """Round up with the probability that is the distance from below: RQ with uniform noise of one cell (RQ, Eq 8).

    Gradients are those of :func:`lsq_quantize`, with the sampled integer in place of the nearest.

    Parameters
    ----------
    x : tensor of any shape, such as (n, m)
    alpha : step > 0, (1,) or anything that broadcasts against `x`
    n_lo : lowest integer of the grid
    n_hi : highest integer of the grid
    generator : source of the noise; None takes torch's own

    Examples
    --------
    >>> stochastic_round(torch.tensor([1.0, -7.0]), torch.tensor(0.5), -3, 3)
    tensor([ 1.0000, -1.5000])
    """
    # Beyond the grid only the side counts; x / alpha may overflow there.
    step = alpha.detach()
    v = torch.minimum(torch.maximum(x, step * (n_lo - 1)), step * (n_hi + 1)) / alpha
    inside = (v >= n_lo) & (v <= n_hi)
    with torch.no_grad():
        noise = torch.empty_like(v).uniform_(generator=generator)
        n = (v.detach() + noise).floor_().clamp_(n_lo, n_hi)
    passed = torch.where(inside, v, n)
    return alpha * (n + (passed - passed.detach()))
