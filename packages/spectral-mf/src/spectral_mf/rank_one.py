"""Expectations of exp(½ λ (vᵀx)²) over independent spins: the engines under the spectral scheme.

The quadrature rests on exp(½ λ y²) = E exp(√λ g y) for Gaussian g: averaged over the spins it is a one-dimensional
integral of a product, on which the trapezoid rule is spectrally accurate. For λ < 0 the product oscillates, so values
far below one cannot be had from it in floating point; those go to enumeration or to the paper's quantised dynamic
programme, here in logarithms and with the error bound of its grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from shared_core.errors import InputError

__all__ = ["Engine", "Expectation", "log_cosh", "log_expectation", "quadrature_rounding", "quantisation_step"]

Engine = Literal["auto", "quadrature", "dp", "gaussian", "exact"]

# Gaussian nodes beyond 9 weigh less than 1e-17; a step of 0.7 aliases by exp(-2 π² / 0.49) = 3e-18.
_REACH = 9.0
_STEP = 0.7
_EPS = 2.3e-16
# Where rounding may move the logarithm of a sum of cosines by more, it is computed in another way.
_ACCEPT = 1e-8
_EXACT_SUPPORT = 20
# Doubles of one block: what a core's cache holds, as blocks in memory take four times as long.
_CHUNK = 2**18
# What a fallback may cost where the requested tolerance would need more.
_FALLBACK_STATES = 4e5


@dataclass(frozen=True)
class Expectation:
    """log E exp(½ λ (vᵀx)²) for each pair.

    Attributes
    ----------
    value : (pairs,) the logarithms
    error : (pairs,) bound on |value - truth|; infinite for the Gaussian engine, which is an approximation
    engine : (pairs,) codes: 0 quadrature, 1 dp, 2 gaussian, 3 exact, 4 nothing to do (λ = 0)
    """

    value: Tensor
    error: Tensor
    engine: Tensor


def quantisation_step(lam: float, length: int, reach: float, tol: float) -> float:
    """Grid step q for which the dynamic programme is certain to be within `tol` nats.

    Each of the `length` spins moves y by at most q/4, so |ŷ - y| ≤ δ = length q / 4, and with |y| ≤ reach the
    exponent moves by at most ½ |λ| δ (2 reach + δ).

    Parameters
    ----------
    lam : eigenvalue λ, not 0
    length : number of non-zero entries of v
    reach : Σ |v_i|
    tol : error allowed, in nats, > 0

    Examples
    --------
    >>> q = quantisation_step(-50.0, 20, 4.0, 1e-3)
    >>> delta = 20 * q / 4
    >>> round(0.5 * 50 * delta * (2 * 4 + delta), 6)
    0.001
    """
    # -s + √(s² + 2ε/|λ|), written so that nothing cancels.
    excess = 2 * tol / abs(lam)
    delta = excess / (reach + math.sqrt(reach**2 + excess))
    return 4 * delta / length


def log_expectation(
    v: Tensor,
    lam: Tensor,
    b: Tensor | None = None,
    *,
    engine: Engine = "auto",
    tol: float = 1e-9,
    q: float | None = None,
    max_states: float = 5e7,
) -> Expectation:
    """Compute log E exp(½ λ (vᵀx)²) for many (v, λ) at once, x_i independent with P(x_i = 1) = sigmoid(2 b_i).

    Parameters
    ----------
    v : (pairs, n) vectors
    lam : (pairs,) eigenvalues of either sign
    b : (pairs, n) fields of the product measure; None means uniform spins
    engine : ``quadrature`` (for λ < 0 not accurate below about 1e-11), ``dp`` (the paper's quantised dynamic
        programme), ``gaussian`` (-½ log(1 - λ): replaces y by a Gaussian), ``exact`` (enumeration), or ``auto``:
        quadrature, and where that cancels enumeration of up to 20 entries, else dp
    tol : certified error asked of ``dp``, in nats; ``auto`` takes less accuracy where it would need over 400,000 states
    q : grid step of ``dp``, in place of the one that `tol` asks for; the paper's code has 0.001
    max_states : largest grid that ``dp`` may use

    Raises
    ------
    InputError
        When ``dp`` would need more than `max_states` grid points, or ``exact`` more than 25 spins.

    Examples
    --------
    >>> v = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    >>> log_expectation(v, torch.tensor([-200.0], dtype=torch.float64)).value
    tensor([-100.], dtype=torch.float64)
    """
    value = torch.zeros_like(lam)
    error = torch.zeros_like(lam.detach())
    used = torch.full(lam.shape, 4, device=lam.device)
    if engine == "gaussian":
        if bool((lam >= 1).any()):
            raise InputError("engine 'gaussian' needs every eigenvalue below 1: E exp(½ λ g²) is infinite beyond")
        return Expectation(_gaussian(v, lam, b), torch.full_like(error, math.inf), torch.full_like(used, 2))
    left = lam.detach().nonzero().flatten()
    if engine in ("auto", "quadrature"):
        for chosen, positive in ((left[lam[left] > 0], True), (left[lam[left] < 0], False)):
            if not len(chosen):
                continue
            found, err = _quadrature(v[chosen], lam[chosen], None if b is None else b[chosen], positive)
            # Rounding of the sum, plus that of λ times y².
            size = 0.5 * lam[chosen].detach().abs() * v[chosen].detach().abs().sum(-1) ** 2
            value = value.index_put((chosen,), found)
            error[chosen] = err + 1e-15 * (1 + size.sqrt())
            used[chosen] = 0
        if engine == "quadrature":
            return Expectation(value, error, used)
        left = left[(lam[left] < 0) & ~(error[left] < _ACCEPT)]
    for pair in left.tolist():
        field = None if b is None else b[pair].detach().cpu().numpy()
        vector, eigenvalue = v[pair].detach().cpu().numpy(), float(lam[pair].detach())
        support = _support(vector, eigenvalue, tol)
        small = engine == "exact" or (engine == "auto" and len(support) <= _EXACT_SUPPORT)
        if small:
            support = np.arange(len(vector)) if engine == "exact" else support
            got = _enumerate(vector[support], eigenvalue, None if field is None else field[support])
            size = abs(eigenvalue) * float(np.abs(vector).sum()) ** 2
            err = 1e-13 + _EPS * len(vector) * size + (tol if len(support) < len(vector) else 0.0)
        else:
            states = _FALLBACK_STATES if engine == "auto" else max_states
            got, err = _dynamic_programme(vector, eigenvalue, field, tol, q, states, engine == "auto")
        value = value.index_put((torch.tensor([pair], device=lam.device),), lam.new_tensor([got]))
        error[pair], used[pair] = err, 3 if small else 1
    return Expectation(value, error, used)


def _gaussian(v: Tensor, lam: Tensor, b: Tensor | None) -> Tensor:
    if b is None:
        return -0.5 * torch.log1p(-lam * (v**2).sum(-1))
    mean = (v * torch.tanh(b)).sum(-1)
    variance = (v**2 / torch.cosh(b) ** 2).sum(-1)
    return 0.5 * lam * mean**2 / (1 - lam * variance) - 0.5 * torch.log1p(-lam * variance)


def _quadrature(v: Tensor, lam: Tensor, b: Tensor | None, positive: bool) -> tuple[Tensor, Tensor]:
    scale = lam.abs().sqrt()
    reach = (scale * v.abs().sum(-1)).detach()
    step = torch.full_like(reach, _STEP) if positive else 2 * math.pi / (reach + _REACH)
    limit = reach + _REACH if positive else torch.full_like(reach, _REACH)
    nodes = (limit / step).ceil().long() + 1
    # Pairs that need about as many nodes go together.
    order = nodes.argsort()
    counts = nodes[order].tolist()
    parts: list[Tensor] = []
    errors: list[Tensor] = []
    start = 0
    while start < len(counts):
        stop = start + 1
        while stop < len(counts) and counts[stop] * v.shape[1] * (stop - start + 1) <= _CHUNK:
            stop += 1
        chosen = order[start:stop]
        field = None if b is None else b[chosen]
        one = _positive if positive else _negative
        found, err = one(v[chosen] * scale[chosen, None], field, step[chosen], counts[stop - 1])
        parts.append(found)
        errors.append(err)
        start = stop
    back = order.argsort()
    value = torch.cat(parts)[back]
    return value, torch.cat(errors)[back]


def _negative(w: Tensor, b: Tensor | None, step: Tensor, count: int) -> tuple[Tensor, Tensor]:
    k = torch.arange(count, dtype=w.dtype, device=w.device)
    t = step[:, None] * k
    weight = step[:, None] * torch.exp(-0.5 * t**2) / math.sqrt(2 * math.pi)
    weight = torch.where(k > 0, 2 * weight, weight)
    if b is None:
        product = _cosines(step, w, count).prod(-1)
    else:
        angle = t[:, :, None] * w[:, None, :]
        product = torch.complex(torch.cos(angle), torch.tanh(b)[:, None, :] * torch.sin(angle)).prod(-1).real
    total = (weight * product).sum(-1)
    # Keeps the logarithm and its gradient finite where the answer is refused anyway.
    safe = total.clamp_min(1e-300)
    error = torch.where(total.detach() > 0, _rounding(w) / total.detach().clamp_min(1e-300), math.inf)
    return safe.log(), error


def _rounding(w: Tensor) -> Tensor:
    """Bound the absolute rounding error of a sum of cosines' products: n factors, angles up to 9 times the reach."""
    return _EPS * (10 + 3 * w.shape[1] + _REACH * w.detach().abs().sum(-1))


def quadrature_rounding(v: Tensor, lam: Tensor) -> Tensor:
    """Bound the absolute error that rounding leaves in E exp(½ λ (vᵀx)²) by quadrature, λ ≤ 0.

    Parameters
    ----------
    v : (pairs, n) vectors
    lam : (pairs,) eigenvalues ≤ 0

    Examples
    --------
    >>> v, lam = torch.full((1, 4), 0.5, dtype=torch.float64), torch.tensor([-1.0], dtype=torch.float64)
    >>> bool(quadrature_rounding(v, lam) < 1e-13)
    True
    """
    return _rounding(v * lam.abs().sqrt()[:, None])


def _cosines(step: Tensor, w: Tensor, count: int) -> Tensor:
    """cos(k step w) for k < count, (pairs, count, n), by the addition theorem: a sine or cosine costs six products."""
    pairs, n = w.shape
    few = math.isqrt(count - 1) + 1
    small = (step[:, None] * torch.arange(few, dtype=w.dtype, device=w.device))[:, :, None] * w[:, None]
    blocks = -(-count // few)
    large = (step[:, None] * torch.arange(0, few * blocks, few, dtype=w.dtype, device=w.device))[:, :, None] * w[
        :, None
    ]
    both = torch.cos(large)[:, :, None] * torch.cos(small)[:, None]
    both = torch.addcmul(both, torch.sin(large)[:, :, None], torch.sin(small)[:, None], value=-1)
    return both.reshape(pairs, few * blocks, n)[:, :count]


def _positive(w: Tensor, b: Tensor | None, step: Tensor, count: int) -> tuple[Tensor, Tensor]:
    k = torch.arange(count, dtype=w.dtype, device=w.device)
    if b is not None:
        k = torch.cat([-k[1:].flip(0), k])
    t = step[:, None] * k
    log_weight = step[:, None].log() - 0.5 * t**2 - 0.5 * math.log(2 * math.pi)
    argument = t[:, :, None] * w[:, None, :]
    if b is None:
        log_weight = log_weight + math.log(2) * (k > 0).to(w)
        exponent = log_cosh(argument).sum(-1)
    else:
        exponent = (log_cosh(b[:, None, :] + argument) - log_cosh(b)[:, None, :]).sum(-1)
    value = torch.logsumexp(log_weight + exponent, -1)
    return value, 1e-15 * (1 + value.detach().abs())


def log_cosh(x: Tensor) -> Tensor:
    """Return log cosh(x), safe for large |x|."""
    size = x.abs()
    return size + torch.log1p(torch.exp(-2 * size)) - math.log(2)


def _support(v: np.ndarray, lam: float, tol: float) -> np.ndarray:
    """Entries of v that matter: the others together move the exponent by less than `tol`."""
    order = np.argsort(np.abs(v))
    dropped = np.cumsum(np.abs(v)[order])
    reach = dropped[-1]
    harmless = 0.5 * abs(lam) * dropped * (2 * reach + dropped) <= tol
    return np.sort(order[~harmless])


def _enumerate(v: np.ndarray, lam: float, b: np.ndarray | None) -> float:
    n = len(v)
    if n > 25:
        raise InputError(f"engine 'exact' would add up 2^{n} terms; choose 'auto', 'quadrature' or 'dp'")
    half = n // 2

    def sums(values: np.ndarray, fields: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        y, log_p = np.zeros(1), np.zeros(1)
        for i, x in enumerate(values):
            up = -math.log(2) if fields is None else -np.logaddexp(0.0, -2 * fields[i])
            down = -math.log(2) if fields is None else -np.logaddexp(0.0, 2 * fields[i])
            y = np.concatenate([y - x, y + x])
            log_p = np.concatenate([log_p + down, log_p + up])
        return y, log_p

    y1, p1 = sums(v[:half], None if b is None else b[:half])
    y2, p2 = sums(v[half:], None if b is None else b[half:])
    total = -math.inf
    for y, p in zip(np.array_split(y1, max(1, len(y1) // 64)), np.array_split(p1, max(1, len(p1) // 64)), strict=True):
        exponent = 0.5 * lam * (y[:, None] + y2) ** 2 + p[:, None] + p2
        top = float(exponent.max())
        total = float(np.logaddexp(total, top + math.log(float(np.exp(exponent - top).sum()))))
    return total


def _dynamic_programme(
    v: np.ndarray, lam: float, b: np.ndarray | None, tol: float, q: float | None, max_states: float, coarsen: bool
) -> tuple[float, float]:
    """Quantise 2 v_i to multiples of q and convolve the two-point laws of the spins; returns (value, error bound)."""
    n, reach = max(1, int(np.count_nonzero(v))), float(np.abs(v).sum())
    step = q or quantisation_step(lam, n, reach, tol)
    if coarsen:
        step = max(step, 2 * reach / max_states)
    predicted = 2 * reach / step + n + 1
    if predicted > max_states and not coarsen:
        raise InputError(
            f"engine 'dp' would need {predicted:.2g} grid points (q = {step:.2g}), more than max_states ="
            f" {max_states:.2g};"
            " raise tol, q or max_states, or choose engine 'auto'"
        )
    w = np.rint(2 * v / step).astype(np.int64)
    up = np.full(len(v), -math.log(2)) if b is None else -np.logaddexp(0.0, -2 * b)
    down = np.full(len(v), -math.log(2)) if b is None else -np.logaddexp(0.0, 2 * b)
    # Plain probabilities underflow with many spins or strong fields.
    in_logs = len(v) > 900 or (b is not None and float(np.abs(b).max()) > 15)
    law = np.zeros(1) if in_logs else np.ones(1)
    for i in np.argsort(np.abs(w)):
        stay, move = max(0, -int(w[i])), max(0, int(w[i]))
        new = np.full(len(law) + stay + move, -math.inf if in_logs else 0.0)
        moved = new[move : move + len(law)]
        if in_logs:
            new[stay : stay + len(law)] = law + down[i]
            np.logaddexp(moved, law + up[i], out=moved)
        else:
            new[stay : stay + len(law)] = math.exp(down[i]) * law
            # A step of zero adds both branches to the same place: the mass stays one.
            moved += math.exp(up[i]) * law
        law = new
    y = np.arange(len(law)) * step - 0.5 * step * float(np.abs(w).sum())
    with np.errstate(divide="ignore"):
        log_mass = law if in_logs else np.log(law)
    exponent = log_mass + 0.5 * lam * y**2
    top = float(exponent.max())
    # Each entry is off by at most q/4, so is each spin's share of y.
    off = float(np.abs(v - 0.5 * step * w).sum())
    error = 0.5 * abs(lam) * off * (2 * reach + off)
    return top + math.log(float(np.exp(exponent - top).sum())), error + 1e-13 + _EPS * len(v) * abs(lam) * reach**2
