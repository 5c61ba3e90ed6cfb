"""The mode quantizers for one step per tensor on the CPU, in pieces that stay in the cache.

Values and gradients are those of :func:`srq_dropbits.functional.mode_quantize` and
:func:`srq_dropbits.gates.masked_quantize`, which come here where :func:`applies` says so. With ``v = x / alpha``,
``u = alpha / sigma`` and ``w`` the distance of ``v`` from their centre, the mass of ``K`` cells in a row is, by
``sigmoid(a) - sigmoid(b) = sinh((a - b) / 2) / (cosh((a + b) / 2) + cosh((a - b) / 2))``::

    mass       = S / (cosh(u w) + C)        S, C = sinh(u K / 2), cosh(u K / 2)
    dmass / dv = -u b mass                  b = sinh(u w) / (cosh(u w) + C)
    dmass / du = mass (K / 2) (C / S - mass) - w b mass

One exponential and its reciprocal give all three, and levels with the same centre share them. The mode's probability is
the mass of its cell (``K = 1``) divided by ``D``, that of the grid. Under masks it is ``M_m mass / D`` with
``D = sum_k M_k (C_k - C_(k-1))``, where ``C_k`` is the mass of the points up to level k, and so
``D = sum_k (M_k - M_(k+1)) C_k``: no term is negative, as masks are nested.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["PIECE", "Baseline", "Interval", "Plan", "Sums", "applies", "backward", "forward", "plan_of", "quantize"]

Baseline = Literal["input", "zero", "clipped"]
Interval = tuple[int, int]

PIECE = 2**16
"""Entries of a piece: fresh pages for a dozen intermediate results cost more than the arithmetic."""
# Enough for the caches of several cores to take part in.
_THREADS = 8
# Smaller masks, which hardly ever occur, would bring products near the ends of float32.
_LEAST_MASK = 1e-12
# Noise scales beyond the grid after which no mode changes; also those of functional.near_grid.
_FARTHEST = 40.0


def applies(x: Tensor, *scales: Tensor) -> bool:
    """Tell whether the pieces can be used: one step and scale, on the CPU, outside a compiled graph.

    Parameters
    ----------
    x : tensor of any shape, such as (n, m)
    scales : step and noise scale, or what they are made of, (1,) or (channels, 1)
    """
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype in {torch.float32, torch.float64}
        and all(scale.numel() == 1 and scale.dtype == x.dtype for scale in scales)
    )


@dataclass(frozen=True)
class Plan:
    """Which points there are, with what masks.

    Parameters
    ----------
    u : step / noise scale
    bounds : first and last point of the whole grid
    levels : the points up to each level, innermost first
    masks : of each level
    kept : levels whose mask is not 0, those of the same mask merged
    switches : beyond the k-th pair of values the mode is among the points of ``kept[k + 1]``
    reach : farther out no mode changes
    """

    u: float
    bounds: Interval
    levels: Sequence[Interval]
    masks: Sequence[float]
    kept: Sequence[tuple[Interval, float]]
    switches: Sequence[tuple[float, float]]
    reach: tuple[float, float]

    def round(self, v: Tensor, out: Tensor, scratch: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
        """Give the mode of every ``v``, within reach, and write its mask, if asked.

        Parameters
        ----------
        v : x / step, shape (n,); what is out of reach is moved there
        out : place for the modes, (n,)
        scratch : three tensors of shape (n,)
        mask : place for the masks, (n,)
        """
        near, other, inner = scratch
        (core, first), *outer = self.kept
        if mask is not None:
            mask.fill_(first)
        if not outer:
            return torch.round(v, out=out).clamp_(*core)
        torch.round(v.clamp_(*self.reach), out=near)
        torch.clamp(near, *core, out=out)
        # Arithmetic with 0 and 1 is several times as fast as where() with a mask of bool.
        for (interval, weight), (below, above) in zip(outer, self.switches, strict=True):
            torch.sub(v, (below + above) / 2, out=other).abs_()
            torch.le(other, (above - below) / 2, out=inner)
            torch.lerp(torch.clamp(near, *interval, out=other), out, inner, out=out)
            if mask is not None:
                # Masks fall outwards, from 1 at most.
                torch.minimum(mask, inner.mul_(2.0).add_(weight), out=mask)
        return out


def plan_of(u: float, bounds: Interval, levels: Sequence[Interval], masks: Sequence[float]) -> Plan | None:
    """Make the plan, or give None where the pieces do not serve: masks that are not nested, extreme noise.

    Parameters
    ----------
    u : step / noise scale
    bounds : of the whole grid
    levels : the points up to each level, innermost first
    masks : of each level, the first one 1
    """
    # Bounds of the noise scale leave 2 .. 8.
    if not 0.1 < u < 30 or not all(inner >= outer >= _LEAST_MASK or outer == 0 for inner, outer in pairwise(masks)):
        return None
    kept: list[tuple[Interval, float]] = []
    for interval, mask in zip(levels, masks, strict=True):
        if kept and kept[-1][1] == mask:
            kept.pop()
        if mask > 0:
            kept.append((interval, mask))
    reach = (bounds[0] - 0.5 - _FARTHEST / u, bounds[1] + 0.5 + _FARTHEST / u)
    return Plan(u, bounds, levels, masks, kept, _switches(u, reach, kept), reach)


def _switches(
    u: float, reach: tuple[float, float], kept: Sequence[tuple[Interval, float]]
) -> list[tuple[float, float]]:
    """Find where the mode leaves each kept interval, below and above.

    The ratio of the best masked masses of two levels grows with the distance from zero, so that each pair of levels has
    one crossing a side.
    """
    sides: list[list[float]] = []
    for sign, end in ((-1, -reach[0]), (1, reach[1])):
        ends = [sign * interval[sign > 0] for interval, _ in kept]
        cross = {
            (inner, outer): _crossing(u, kept[inner][1], kept[outer][1], ends[inner], ends[outer])
            for outer in range(len(kept))
            for inner in range(outer)
        }
        sides.append(
            [
                # No v is farther out.
                sign * min(end + 1.0, *(max(cross[j, i] for j in range(k)) for i in range(k, len(kept))))
                for k in range(1, len(kept))
            ]
        )
    return list(zip(*sides, strict=True))


def _crossing(u: float, inner: float, outer: float, inner_end: int, outer_end: int) -> float:
    """Find v > 0 beyond which an outer level's nearest point has more masked mass than an inner level's last one."""
    if outer_end <= inner_end:
        return math.inf
    c = math.cosh(u / 2)
    # At its cell's far edge a point has mass S / 2 C: the first one that wins there is the one that takes over.
    edge = inner_end + math.acosh(c * (2 * inner / outer - 1)) / u
    n = min(max(math.ceil(edge - 0.5), inner_end + 1), outer_end)
    # outer (cosh(u (v - inner_end)) + c) = inner (cosh(u (v - n)) + c), a quadratic equation in y = exp(u (v - n)).
    gap = math.exp(u * (n - inner_end))
    square, linear, constant = outer * gap - inner, c * (outer - inner), outer / gap - inner
    if square <= 0:
        return math.inf
    return n + math.log((math.sqrt(linear * linear - square * constant) - linear) / square) / u


@dataclass
class Sums:
    """Gradients of step, u and the masks above the first, summed over the entries."""

    step: float
    u: float
    masks: list[float]

    def of_masks(self, like: Tensor, wanted: bool) -> Tensor | None:
        """Give the masks' gradients, of the type of another tensor, if wanted."""
        return like.new_tensor(self.masks) if wanted else None


def _piece(count: int) -> int:
    return min(PIECE * min(torch.get_num_threads(), _THREADS), max(count, 1))


def forward(x: Tensor, alpha: Tensor, plan: Plan) -> Tensor:
    """Quantize to the mode.

    Parameters
    ----------
    x : tensor of any shape, such as (n, m)
    alpha : step, (1,)
    plan : the points
    """
    if len(plan.kept) == 1:
        return torch.div(x, alpha).round_().clamp_(*plan.kept[0][0]).mul_(alpha)
    flat = x.reshape(-1)
    found = torch.empty_like(flat)
    size = _piece(len(flat))
    scratch = x.new_empty((4, size))
    for start in range(0, len(flat), size):
        out = found[start : start + size]
        v, *rest = scratch[:, : len(out)].unbind(0)
        torch.div(flat[start : start + size], alpha.reshape(1), out=v)
        plan.round(v, out, rest)
    return found.mul_(alpha.reshape(1)).view(torch.broadcast_shapes(x.shape, alpha.shape))


def backward(
    x: Tensor, gradient: Tensor, step: float, plan: Plan, baseline: Baseline, *, u: bool, masks: bool
) -> tuple[Tensor, Sums]:
    """Give the gradient of x, and the sums of those of step, u and the masks.

    Parameters
    ----------
    x : tensor of any shape, such as (n, m)
    gradient : with respect to the result, of the same shape
    step : alpha
    plan : the points
    baseline : control variate
    u : whether the gradient of u is wanted
    masks : whether those of the masks are
    """
    flat_x, flat_gradient = x.reshape(-1), gradient.reshape(-1)
    d_x = torch.empty_like(flat_x)
    size = _piece(len(flat_x))
    piece = _Piece(plan, step, baseline, u=u, masks=masks, dtype=x.dtype)
    scratch = x.new_empty((piece.rows, size))
    for start in range(0, len(flat_x), size):
        part = slice(start, start + size)
        out = d_x[part]
        piece(flat_x[part], flat_gradient[part], out, list(scratch[:, : len(out)].unbind(0)))
    return d_x.view_as(x), piece.sums


class _Window:
    """An interval of cells as the noise sees it."""

    def __init__(self, interval: Interval, seen: tuple[float, float], u: float, depth: float, limit: float) -> None:
        low, high = interval
        middle, half = (low + high) / 2, (high - low + 1) / 2
        # Farther inside than this the ends have no influence: wide intervals are shortened, lest exponentials overflow.
        flat = max(half - depth / u, 0.0)
        farthest = max(seen[1] - middle, middle - seen[0]) - flat
        self.view = (u, middle, flat, limit if u * farthest > limit else 0.0)
        self.half = half - flat
        self.s, self.c = math.sinh(u * self.half), math.cosh(u * self.half)
        self.tilt = self.half * self.c / self.s

    def look(self, v: Tensor, w: Tensor, cosh: Tensor, sinh: Tensor, scratch: Tensor) -> Tensor:
        """Give w, and write 2 cosh(u w) and 2 sinh(u w)."""
        u, middle, flat, limit = self.view
        found = torch.sub(v, middle, out=w) if middle else v
        if flat:
            found = torch.sub(found, torch.clamp(found, -flat, flat, out=scratch), out=w)
        torch.mul(found, u, out=cosh)
        if limit:
            cosh.clamp_(-limit, limit)
        _hyperbolic(cosh, sinh, scratch)
        return found


def _hyperbolic(t: Tensor, sinh: Tensor, scratch: Tensor) -> None:
    """Turn t into 2 cosh(t), and write 2 sinh(t)."""
    t.exp_()
    torch.reciprocal(t, out=scratch)
    torch.sub(t, scratch, out=sinh)
    t.add_(scratch)


class _Piece:
    """The backward pass of a piece; its sums grow with every call."""

    def __init__(
        self, plan: Plan, step: float, baseline: Baseline, *, u: bool, masks: bool, dtype: torch.dtype
    ) -> None:
        self.plan, self.step, self.baseline, self.want_u, self.want_masks = plan, step, baseline, u, masks
        # exp(-depth) is below the type's precision, exp(limit) within its range, exp(-margin) far above its end.
        depth, margin, limit = (40.0, 60.0, 600.0) if dtype == torch.float64 else (20.0, 45.0, 86.0)
        self.s, self.c = math.sinh(plan.u / 2), math.cosh(plan.u / 2)
        (low, high), bounds = plan.kept[-1][0], (plan.bounds[0] - 0.5, plan.bounds[1] + 0.5)
        # Farther from the kept points probabilities have reached their limits.
        self.seen = (max(low - 0.5 - margin / plan.u, bounds[0]), min(high + 0.5 + margin / plan.u, bounds[1]))
        self.moves = self.seen != bounds
        levels = list(zip(plan.levels, plan.masks, strict=True)) if masks else plan.kept
        self.windows = [_Window(interval, self.seen, plan.u, depth, limit) for interval, _ in levels]
        self.shares = [inner - outer for inner, outer in pairwise([*(mask for _, mask in levels), 0.0])]
        self.single = len(levels) == 1
        self.rows = 17 + len(levels) * masks
        self.sums = Sums(0.0, 0.0, [0.0] * (len(plan.masks) - 1) * masks)

    def __call__(self, x: Tensor, g: Tensor, out: Tensor, scratch: list[Tensor]) -> None:
        """Write the gradient of x to `out`."""
        v, inside, n, weight, moved, mask, mass, slope, *rest = scratch
        plan, (lo, hi) = self.plan, self.plan.bounds
        torch.div(x, self.step, out=v)
        torch.clamp(v, lo - 0.5, hi + 0.5, out=inside)
        # Zero where saturated: those entries reach the step through n alone.
        torch.eq(v, inside, out=weight).mul_(g)
        plan.round(v, n, rest[:3], None if self.single else mask)
        near = torch.clamp(inside, *self.seen, out=moved) if self.moves else inside
        r = torch.sub(n, near, out=v)
        # (g_m - c) / step; d/dx = d/dv / step takes the step back.
        if self.baseline == "zero":
            weight.mul_(n)
        elif self.baseline == "clipped":
            weight.mul_(torch.clamp(inside, lo, hi, out=mass).neg_().add_(n))
        else:
            weight.mul_(torch.sub(n, inside, out=mass) if self.moves else r)
        # Derivatives of -log mass by u and v, the latter without a factor u; r is n - v and w would be v - n.
        _hyperbolic(torch.mul(r, plan.u, out=mass), slope, rest[0])
        slope.mul_(mass.add_(2 * self.c).reciprocal_())
        tilt = r.mul_(slope).add_(mass, alpha=self.s).sub_(self.c / (2 * self.s)) if self.want_u else r
        weight.mul_(mass)
        if self.single:
            factor = self._divide_by_one(near, weight, slope, tilt, rest)
        else:
            factor = self._divide(near, n, weight.mul_(mask), slope, tilt, rest)
        torch.mul(slope, weight, out=out).mul_(plan.u * factor)
        self.sums.step += (torch.dot(n, g) - torch.dot(inside, out)).item()
        if self.want_u:
            self.sums.u -= self.step * factor * torch.dot(tilt, weight).item()

    def _divide_by_one(
        self, v: Tensor, weight: Tensor, slope: Tensor, tilt: Tensor, scratch: Sequence[Tensor]
    ) -> float:
        """Divide by the mass of one interval; give the factor that is still due."""
        mass, b, h, w = scratch[:4]
        (window,) = self.windows
        w = window.look(v, w, mass, b, h)
        weight.mul_(mass.add_(2 * window.c))
        b.mul_(mass.reciprocal_())
        slope.add_(b)
        if self.want_u:
            tilt.addcmul_(w, b, value=-1.0).add_(mass, alpha=-2 * window.half * window.s).add_(window.tilt)
        return self.s / window.s

    def _divide(
        self, v: Tensor, n: Tensor, weight: Tensor, slope: Tensor, tilt: Tensor, scratch: Sequence[Tensor]
    ) -> float:
        """Divide by the masked mass of all levels; give the factor that is still due."""
        cosh, sinh, mass, b, w, h, total, by_v, by_u, *rows = scratch
        for part in (total, by_v, by_u):
            part.zero_()
        found, view = w, None
        for place, (window, share) in enumerate(zip(self.windows, self.shares, strict=True)):
            if window.view != view:
                found, view = window.look(v, w, cosh, sinh, h), window.view
            c = rows[place] if self.want_masks else mass
            torch.add(cosh, 2 * window.c, out=c).reciprocal_()
            torch.mul(sinh, c, out=b)
            c.mul_(2 * window.s)
            if share:
                total.add_(c, alpha=share)
                by_v.addcmul_(c, b, value=share)
            if share and self.want_u:
                b.mul_(found).add_(c, alpha=window.half).sub_(window.tilt)
                by_u.addcmul_(c, b, value=share)
        weight.div_(total)
        slope.addcdiv_(by_v, total)
        if self.want_u:
            tilt.addcdiv_(by_u, total, value=-1.0)
        if self.want_masks:
            self._add_masks(n, weight, torch.div(weight, total, out=h), rows, b, w)
        return 2 * self.s

    def _add_masks(
        self, n: Tensor, weight: Tensor, share: Tensor, c: Sequence[Tensor], outside: Tensor, scratch: Tensor
    ) -> None:
        """Add dlog pi_m / dM_j = [level(m) = j] / M_j - (C_j - C_(j-1)) / D, summed with its weights."""
        upto = [torch.dot(share, part).item() for part in c]
        beyond: list[float] = []
        for low, high in self.plan.levels[:-1]:
            torch.gt(torch.sub(n, (low + high) / 2, out=scratch).abs_(), (high - low) / 2, out=outside)
            beyond.append(torch.dot(weight, outside).item())
        for place, (own, next_) in enumerate(pairwise([*beyond, 0.0])):
            mask = self.plan.masks[place + 1]
            found = ((own - next_) / mask if mask else 0.0) - (upto[place + 1] - upto[place])
            self.sums.masks[place] += 2 * self.s * self.step * found


class _Quantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, alpha: Tensor, u: Tensor, _: Tensor | None, plan: Plan, baseline: Baseline
    ) -> Tensor:
        ctx.save_for_backward(x, alpha, u)
        ctx.rest = plan, baseline
        return forward(x, alpha, plan)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, alpha, u = ctx.saved_tensors
        plan, baseline = ctx.rest
        _, by_alpha, by_u, by_masks, *_ = ctx.needs_input_grad
        d_x, sums = backward(x, gradients[0], alpha.item(), plan, baseline, u=by_u, masks=by_masks)
        d_alpha = torch.full_like(alpha, sums.step) if by_alpha else None
        return d_x, d_alpha, torch.full_like(u, sums.u) if by_u else None, sums.of_masks(x, by_masks), None, None


def quantize(x: Tensor, alpha: Tensor, u: Tensor, masks: Tensor | None, plan: Plan, baseline: Baseline) -> Tensor:
    """Quantize to the mode, with gradients for x, alpha, u and the masks.

    Parameters
    ----------
    x : tensor of any shape, such as (n, m)
    alpha : step, (1,)
    u : step / noise scale, (1,), of which the plan holds the value
    masks : those above the first level's, of which the plan holds the values, shape (levels,); None for none
    plan : the points
    baseline : control variate
    """
    return _Quantize.apply(x, alpha, u, masks, plan, baseline)
