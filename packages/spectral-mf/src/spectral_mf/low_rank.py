"""Log partition functions of low-rank couplings to a requested, certified accuracy, in time polynomial in n.

For A' = Σ_j λ_j v_j v_jᵀ the couplings are r squares of linear forms. Two engines: the paper's, which quantises the r
forms and convolves the laws of the spins on an r-dimensional grid, and Gaussian quadrature in r dimensions, which is
exact to rounding where nothing cancels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, eigsh
from torch import Tensor

from shared_core.errors import InputError
from spectral_mf._inputs import Problem, as_problem
from spectral_mf.rank_one import log_cosh, quantisation_step
from spectral_mf.result import LogPartition, rounding_slack

__all__ = ["low_rank", "low_rank_factors", "low_rank_log_partition", "low_rank_work"]

Engine = Literal["auto", "quadrature", "dp"]
_REACH, _STEP = 9.0, 0.7
_CHUNK = 2**22
_MAX_WORK = 5e9
# Below this share of the terms' absolute sum, what is left of it has lost half its digits.
_CANCELLED = 1e-8


def low_rank_log_partition(
    V: Any,
    lam: Any,
    b: Any = None,
    *,
    tol: float = 1e-3,
    engine: Engine = "auto",
    zero_diagonal: bool = False,
    max_states: float = 5e7,
) -> LogPartition:
    """Compute log Σ_x exp(½ Σ_j λ_j (v_jᵀx)² + bᵀx) to a certified accuracy.

    Parameters
    ----------
    V : (n, rank) array or tensor, a column a vector
    lam : (rank,) eigenvalues of either sign
    b : (n,) fields
    tol : accuracy in nats asked of the dynamic programme, > 0
    engine : ``quadrature`` (accurate to rounding unless negative eigenvalues cancel), ``dp`` (the paper's, error ≤
        `tol`), or ``auto``: quadrature, and dp where that cancels
    zero_diagonal : leave out the diagonal of A' (a Hopfield network's couplings), which is a constant: ½ tr A'
    max_states : largest grid of ``dp``

    Returns
    -------
    Value and certified bounds; ``diagnostics["error_bound"]`` is half their distance. Differentiable in V, lam and b
    with quadrature.

    Raises
    ------
    InputError
        Where the shapes do not fit, or the predicted work or memory is beyond the limits.

    Notes
    -----
    Spins with equal rows of V and equal fields are counted, not repeated, so n may be 10⁵ where few rows differ.
    Source: part (a) of the paper's abstract, reconstructed (spec 2.5); quadrature: spec 2.6.

    Examples
    --------
    >>> V = np.ones((200, 1)) / np.sqrt(200)  # Curie-Weiss, J = 0.01, field 0.05
    >>> r = low_rank_log_partition(V, [200 * 0.01], np.full(200, 0.05), zero_diagonal=True)
    >>> round(r.value, 6)
    212.614666
    """
    started = time.perf_counter()
    v, eigenvalues, fields, kind = _checked(V, lam, b)
    n = len(v)
    constant = -0.5 * (eigenvalues * (v**2).sum(0)).sum() if zero_diagonal else v.new_zeros(())
    value, error, engine_used, details = _solve(v, eigenvalues, fields, tol, engine, max_states)
    size = float((eigenvalues.detach().abs() * v.detach().abs().sum(0) ** 2).sum() + fields.detach().abs().sum()) + n
    error += 1e-14 * (8 + math.sqrt(n)) * size
    # A result without couplings of its own: all that `of` needs is the constant and the kind.
    shell = Problem(None, fields[None], constant[None], None, False, kind)
    return LogPartition.of(
        shell,
        "low_rank",
        value[None],
        lower=value.detach()[None] - error,
        upper=value.detach()[None] + error,
        diagnostics={"engine": engine_used, "error_bound": error, "rank": v.shape[1], **details},
        seconds=time.perf_counter() - started,
    )


def low_rank(
    A: Any, b: Any = None, *, rank: int = 2, tol: float = 1e-3, engine: Engine = "auto", max_states: float = 5e7
) -> LogPartition:
    """Estimate log Z with the best rank-`rank` couplings found, the diagonal being free; certified for any couplings.

    What is left of the couplings, E = A - A', moves log Z by at most Σ_{i<j} |E_ij|, so the bounds hold also where A is
    not of low rank; they are then as wide as that sum.

    Parameters
    ----------
    A : (n, n) or (models, n, n) symmetric couplings
    b : (n,) or (models, n) fields
    rank : rank of the approximation, 1 to 3
    tol, engine, max_states : as in :func:`low_rank_log_partition`

    Returns
    -------
    Value and bounds. Differentiable in A and b: the gradients are the exact pair moments and means of the couplings
    found.

    Raises
    ------
    InputError
        When `rank` is below 1, the predicted work or memory is beyond the limits, or a gradient is wanted where the
        quadrature cancels.

    Examples
    --------
    >>> A = 0.1 * (np.ones((10, 10)) - np.eye(10))
    >>> round(low_rank(A, np.full(10, 0.2), rank=1).value, 9)
    7.994567142
    """
    started = time.perf_counter()
    if rank < 1:
        raise InputError(f"rank must be at least 1, got {rank}")
    problem = as_problem(A, b)
    values: list[Tensor] = []
    errors: list[float] = []
    details: list[dict[str, Any]] = []
    for k in range(problem.models):
        couplings, fields = problem.dense[k], problem.b[k]
        lam, v, residual = low_rank_factors(couplings, rank)
        diagonal = 0.5 * float((lam * (v**2).sum(0)).sum())
        value, error, used, more = _solve(v, lam, fields.detach(), tol, engine, max_states)
        if (couplings.requires_grad or fields.requires_grad) and torch.is_grad_enabled():
            mean, pairs = _moments(v, lam, fields.detach())
            # Carries the exact first derivative; its own value is zero.
            value = value + 0.5 * (pairs * (couplings - couplings.detach())).sum()
            value = value + (mean * (fields - fields.detach())).sum()
        values.append(value - diagonal)
        errors.append(error + residual)
        details.append({"engine": used, "residual": residual, **more})
    value = torch.stack(values)
    spread = value.new_tensor(errors) + rounding_slack(problem, value)
    return LogPartition.of(
        problem,
        "low_rank",
        value,
        lower=value.detach() - spread,
        upper=value.detach() + spread,
        diagnostics={"rank": rank, "error_bound": problem.give_back(spread), "models": details},
        seconds=time.perf_counter() - started,
    )


def low_rank_factors(A: Tensor, rank: int, *, iterations: int = 500) -> tuple[Tensor, Tensor, float]:
    """Fit A + diagonal by rank `rank`, the diagonal being free (principal-axis factoring).

    Parameters
    ----------
    A : (n, n) symmetric, zero diagonal
    rank : number of eigenpairs to keep
    iterations : most refinements of the diagonal

    Returns
    -------
    (rank,) eigenvalues, (n, rank) vectors, and Σ_{i<j} of the absolute couplings left over.

    Examples
    --------
    >>> lam, v, left = low_rank_factors(torch.ones(4, 4, dtype=torch.float64) - torch.eye(4), 1)
    >>> round(float(lam), 6), left < 1e-9
    (4.0, True)
    """
    A = A.detach()
    n = len(A)
    rank = min(rank, n)
    scale = float(A.abs().max()) if n > 1 else 0.0
    lam, v, left = A.new_zeros(rank), A.new_zeros(n, rank), math.inf
    completed = _completed_diagonal(A, rank)
    if completed is not None:
        lam, v = _leading(A + torch.diag_embed(completed), rank)
        left = 0.5 * float((A - (v * lam) @ v.T).fill_diagonal_(0.0).abs().sum())
        if left <= 1e-11 * n * n * scale:
            return lam, v, left
    diagonal = A.new_zeros(n)
    checked = math.inf
    for step in range(iterations):
        lam, v = _leading(A + torch.diag_embed(diagonal), rank)
        fitted = (v * lam) @ v.T
        rest = (A - fitted).fill_diagonal_(0.0)
        left = 0.5 * float(rest.abs().sum())
        if left <= 1e-13 * n * n * scale:
            break
        if step % 20 == 19:
            if left > 0.5 * checked:
                break
            checked = left
        # Over-relaxed: the plain fixed point closes the gap slowly.
        diagonal = diagonal + 1.5 * (fitted.diagonal() - diagonal)
    return lam, v, left


def _leading(M: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Eigenpairs of the largest absolute eigenvalues."""
    if len(M) > 300:
        try:
            start = np.random.default_rng(0).standard_normal(len(M))
            values, vectors = eigsh(M.cpu().numpy(), k=rank, which="LM", v0=start)
            return torch.from_numpy(values).to(M), torch.from_numpy(vectors).to(M)
        except ArpackNoConvergence:
            pass
    values, vectors = torch.linalg.eigh(M)
    keep = values.abs().argsort(descending=True)[:rank]
    return values[keep], vectors[:, keep]


def _completed_diagonal(A: Tensor, rank: int) -> Tensor | None:
    """Return the diagonal that off-diagonal couplings of exactly this rank imply; None for too few spins.

    With spins in three groups, the diagonal of each follows from blocks between the other two: a_iS A_TS⁺ a_Ti.
    """
    n = len(A)
    if n < 3 * max(rank, 1) + 3:
        return None
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).to(A.device)
    groups = order.tensor_split(3)
    diagonal = A.new_zeros(n)
    for k in range(3):
        mine, S, T = groups[k], groups[(k + 1) % 3][:40], groups[(k + 2) % 3][:40]
        u, s, vh = torch.linalg.svd(A[T][:, S], full_matrices=False)
        u, s, vh = u[:, :rank], s[:rank], vh[:rank]
        inverse = torch.where(s > 1e-12 * s[0].clamp_min(1e-300), 1 / s.clamp_min(1e-300), torch.zeros_like(s))
        diagonal[mine] = ((A[mine][:, S] @ vh.T * inverse) * (A[T][:, mine].T @ u)).sum(1)
    return diagonal if bool(diagonal.isfinite().all()) else None


def low_rank_work(v: Tensor, lam: Tensor) -> float:
    """Predict the evaluations that quadrature takes: nodes times spins.

    Parameters
    ----------
    v : (n, rank) vectors
    lam : (rank,) eigenvalues

    Examples
    --------
    >>> low_rank_work(torch.ones(4, 1) / 2, torch.ones(1)) < 1000
    True
    """
    reach = lam.abs().sqrt() * v.abs().sum(0)
    counts = torch.where(lam > 0, (reach + _REACH) / _STEP, _REACH * (reach + _REACH) / (2 * math.pi))
    return float((2 * counts + 3).prod()) * len(v)


def _checked(V: Any, lam: Any, b: Any) -> tuple[Tensor, Tensor, Tensor, Literal["numpy", "torch"]]:
    kind = "torch" if any(isinstance(x, Tensor) for x in (V, lam, b)) else "numpy"
    v, eigenvalues = (torch.as_tensor(x, dtype=torch.float64) for x in (V, lam))
    if v.ndim != 2 or eigenvalues.shape != (v.shape[1],) or not len(v):
        raise InputError(
            f"V must be (n, rank) and lam (rank,), got {tuple(v.shape)} and {tuple(eigenvalues.shape)};"
            " V has a column a vector"
        )
    fields = v.new_zeros(len(v)) if b is None else torch.as_tensor(b, dtype=torch.float64)
    if fields.shape != (len(v),):
        raise InputError(f"b must have length n = {len(v)}, got shape {tuple(fields.shape)}")
    for name, x in (("V", v), ("lam", eigenvalues), ("b", fields)):
        if not bool(x.detach().isfinite().all()):
            raise InputError(f"{name}{(~x.detach().isfinite()).nonzero()[0].tolist()} is not finite")
    return v, eigenvalues, fields, kind


def _solve(
    v: Tensor, lam: Tensor, b: Tensor, tol: float, engine: Engine, max_states: float
) -> tuple[Tensor, float, str, dict[str, Any]]:
    if not tol > 0:
        raise InputError(f"tol must be positive, got {tol}")
    if engine not in ("auto", "quadrature", "dp"):
        raise InputError(f"unknown engine '{engine}': choose auto, quadrature or dp")
    used = lam.detach() != 0
    v, lam = v[:, used], lam[used]
    free = log_cosh(b).sum() + len(v) * math.log(2)
    if not len(lam):
        return free, 0.0, "independent", {}
    refused: InputError | None = None
    if engine != "dp":
        try:
            value, error, nodes = _quadrature(v, lam, b)
            if engine == "quadrature" or error <= max(1e-9, 1e-3 * tol):
                return free + value, error, "quadrature", {"nodes": nodes}
        except InputError as too_much:
            if engine == "quadrature":
                raise
            refused = too_much
    try:
        value, error, states = _dynamic_programme(v.detach(), lam.detach(), b.detach(), tol, max_states)
    except InputError as error:
        raise (error if refused is None else InputError(f"{refused}; and {error}")) from None
    return free.detach() + value, error, "dp", {"states": states}


def _grid(v: Tensor, lam: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Nodes and log-weights of each dimension. The last one is halved where symmetry allows: the caller decides."""
    nodes: list[Tensor] = []
    weights: list[Tensor] = []
    for j in range(len(lam)):
        reach = float(lam[j].detach().abs().sqrt() * v[:, j].detach().abs().sum())
        positive = bool(lam[j] > 0)
        step = _STEP if positive else 2 * math.pi / (reach + _REACH)
        limit = reach + _REACH if positive else _REACH
        count = math.ceil(limit / step)
        t = step * torch.arange(-count, count + 1, dtype=v.dtype, device=v.device)
        nodes.append(t)
        weights.append(math.log(step) - 0.5 * t**2 - 0.5 * math.log(2 * math.pi))
    return nodes, weights


def _quadrature(v: Tensor, lam: Tensor, b: Tensor) -> tuple[Tensor, float, int]:
    """Return log E_p exp(½ Σ λ y²) under the product measure with fields b, its error, and the number of nodes."""
    nodes, weights = _grid(v, lam)
    total = math.prod(len(t) for t in nodes)
    rows, counts = torch.cat([v, b[:, None]], 1), v.new_ones(len(v))
    if not rows.requires_grad:
        rows, multiplicity = torch.unique(rows, dim=0, return_counts=True)
        counts = multiplicity.to(v)
    v, b = rows[:, :-1], rows[:, -1]
    if total * len(v) > _MAX_WORK:
        raise InputError(
            f"quadrature of rank {len(lam)} would take {total:.2g} nodes x {len(v)} spins = {total * len(v):.2g}"
            f" evaluations (limit {_MAX_WORK:.0g}); choose a lower rank"
        )
    scaled = v * lam.abs().sqrt()
    positive = lam.detach() > 0
    base = log_cosh(b)
    blocks = _blocks(nodes, weights, max(1, _CHUNK // len(v)))
    if bool(positive.all()):
        parts = [torch.logsumexp(w + (log_cosh(b + t @ scaled.T) - base) @ counts, 0) for t, w in blocks]
        value = torch.logsumexp(torch.stack(parts), 0)
        return value, 1e-14 * (1 + abs(float(value.detach()))), total
    tops: list[Tensor] = []
    sums: list[Tensor] = []
    sizes: list[Tensor] = []
    for t, w in blocks:
        real = b + (t * positive) @ scaled.T
        angle = (t * ~positive) @ scaled.T
        # log cosh(r + ia) - log cosh(b) = log[cosh r cos a + i sinh r sin a], with the growth |r| taken out.
        growth = log_cosh(real) - base
        modulus = torch.cos(angle) ** 2 + (torch.tanh(real) * torch.sin(angle)) ** 2
        log_size = w + (growth + 0.5 * modulus.clamp_min(1e-300).log()) @ counts
        phase = torch.atan2(torch.tanh(real) * torch.sin(angle), torch.cos(angle)) @ counts
        top = log_size.detach().max()
        tops.append(top)
        sums.append((torch.exp(log_size - top) * torch.cos(phase)).sum())
        sizes.append(torch.exp(log_size.detach() - top).sum())
    top = torch.stack(tops).max()
    share = torch.exp(torch.stack(tops) - top)
    signed, size = (share * torch.stack(sums)).sum(), float((share * torch.stack(sizes)).sum())
    if float(signed.detach()) <= 0:
        return top + signed.clamp_min(1e-300).log(), math.inf, total
    # The phases carry rounding errors of about n · 1e-16 each.
    error = 4e-16 * (4 + math.sqrt(float(counts.sum()))) * size / float(signed.detach())
    return top + signed.log(), error + 1e-14 * (1 + abs(float(top))), total


def _blocks(nodes: list[Tensor], weights: list[Tensor], per_block: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Points (block, rank) and log-weights (block,) of the tensor grid, block by block: it may not fit into memory."""
    total = math.prod(len(t) for t in nodes)
    for first in range(0, total, per_block):
        index = torch.arange(first, min(total, first + per_block), device=nodes[0].device)
        points: list[Tensor] = []
        log_weight = nodes[0].new_zeros(len(index))
        for t, w in zip(nodes, weights, strict=True):
            at = index % len(t)
            index = index // len(t)
            points.append(t[at])
            log_weight = log_weight + w[at]
        yield torch.stack(points, 1), log_weight


def _moments(v: Tensor, lam: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Means (n,) and off-diagonal pair moments (n, n) by quadrature: given the nodes, spins are independent."""
    n = len(v)
    mean, pairs, total, size, top = v.new_zeros(n), v.new_zeros(n, n), 0.0, 0.0, -math.inf
    scaled, positive = v * lam.abs().sqrt(), lam > 0
    for t, w in _blocks(*_grid(v, lam), max(1, _CHUNK // n)):
        z = torch.complex(b + (t * positive) @ scaled.T, (t * ~positive) @ scaled.T)
        # log cosh z for complex z, Re z's growth taken out.
        turned = torch.where(z.real < 0, -z, z)
        log_terms = w + (turned + torch.log1p(torch.exp(-2 * turned))).sum(1)
        higher = max(top, float(log_terms.real.max()))
        shrunk, top = math.exp(top - higher), higher
        weight = torch.exp(log_terms - top)
        local = torch.tanh(z)
        mean = shrunk * mean + (weight @ local).real
        pairs = shrunk * pairs + ((local * weight[:, None]).mT @ local).real
        total = shrunk * total + float(weight.sum().real)
        size = shrunk * size + float(weight.abs().sum())
    if not total > _CANCELLED * size:
        raise InputError(
            "the gradients of a low-rank log Z come by quadrature, which cancels for eigenvalues this negative;"
            " detach A and b, or choose an exact method"
        )
    return mean / total, (pairs / total).fill_diagonal_(0.0)


def _dynamic_programme(v: Tensor, lam: Tensor, b: Tensor, tol: float, max_states: float) -> tuple[Tensor, float, int]:
    """Quantise the r linear forms and convolve the spins' laws on an r-dimensional grid (spec 2.5)."""
    vectors, fields = v.cpu().numpy(), b.cpu().numpy()
    n, rank = vectors.shape
    reach = np.abs(vectors).sum(0)
    used = np.maximum(1, (vectors != 0).sum(0))
    steps = np.array([quantisation_step(float(lam[j]), int(used[j]), float(reach[j]), tol / rank) for j in range(rank)])
    predicted = float(np.prod(2 * reach / steps + used + 1))
    if predicted > max_states:
        raise InputError(
            f"the dynamic programme of rank {rank} would need a table of {predicted:.2g} states "
            f" ({8 * predicted / 1e9:.2g} GB), more than max_states = {max_states:.2g};"
            " raise tol or max_states, or lower the rank"
        )
    w = np.rint(2 * vectors / steps).astype(np.int64)
    up, down = -np.logaddexp(0.0, -2 * fields), -np.logaddexp(0.0, 2 * fields)
    in_logs = n > 900 or float(np.abs(fields).max()) > 15
    empty = -math.inf if in_logs else 0.0
    law = np.full((1,) * rank, 0.0 if in_logs else 1.0)
    # Short steps first: the table stays small for longest.
    for i in np.argsort(np.abs(w).sum(1)):
        stay, move = np.maximum(0, -w[i]), np.maximum(0, w[i])
        new = np.full(np.array(law.shape) + np.abs(w[i]), empty)
        kept = tuple(slice(s, s + size) for s, size in zip(stay, law.shape, strict=True))
        moved = tuple(slice(s, s + size) for s, size in zip(move, law.shape, strict=True))
        if in_logs:
            new[kept] = law + down[i]
            new[moved] = np.logaddexp(new[moved], law + up[i])
        else:
            new[kept] = math.exp(down[i]) * law
            new[moved] += math.exp(up[i]) * law
        law = new
    with np.errstate(divide="ignore"):
        exponent = law if in_logs else np.log(law)
    for j in range(rank):
        y = (np.arange(law.shape[j]) - 0.5 * float(np.abs(w[:, j]).sum())) * steps[j]
        exponent = exponent + (0.5 * float(lam[j]) * y**2).reshape([-1 if k == j else 1 for k in range(rank)])
    off = np.abs(vectors - 0.5 * steps * w).sum(0)
    error = float((0.5 * np.abs(lam.cpu().numpy()) * off * (2 * reach + off)).sum())
    top = float(exponent.max())
    value = top + math.log(float(np.exp(exponent - top).sum()))
    return v.new_tensor(value), error + 1e-12, law.size
