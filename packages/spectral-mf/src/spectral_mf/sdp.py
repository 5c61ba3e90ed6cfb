"""The one optimisation of the method: min Σ d subject to diag(d) - C ⪰ 0, with a certificate for every d returned.

It is the dual of the max-cut relaxation of Goemans and Williamson, so ½ Σ d also bounds the largest energy. Up to about
a thousand variables a primal-dual interior-point method solves it (Helmberg, Rendl, Vanderbei, Wolkowicz, SIAM J.
Optim. 1996); beyond, coordinate ascent on a low-rank factor (the mixing method) does, followed by a shift that makes d
feasible.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from scipy import sparse
from scipy.sparse.linalg import ArpackNoConvergence, eigsh, splu
from torch import Tensor

from shared_core.errors import InputError

__all__ = ["DiagonalSDP", "augmented", "solve_diagonal"]

_INTERIOR_LIMIT = 1000
_TOGETHER = 100
_DENSE_CHECK_LIMIT = 4000
_EPS = float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class DiagonalSDP:
    """Solution of min Σ d subject to diag(d) - C ⪰ 0.

    Attributes
    ----------
    d : (models, n) feasible diagonal
    factor : (models, n, rank) with unit rows; factor factorᵀ is the primal matrix X (unit diagonal, ⪰ 0)
    gap : (models,) Σ d minus the best primal value: how far Σ d can be from its minimum
    shift : (models,) what was added to every entry of d to make it feasible; 0 after the interior-point method
    iterations : steps or sweeps of the slowest model
    method : ``interior`` or ``mixing``
    """

    d: Tensor
    factor: Tensor
    gap: Tensor
    shift: Tensor
    iterations: int
    method: str


def augmented(A: Tensor, b: Tensor) -> Tensor:
    """Couplings [[A, b], [bᵀ, 0]] of the field-free model with one more spin: its Z is twice that of (A, b).

    Parameters
    ----------
    A : (models, n, n) couplings
    b : (models, n) fields

    Examples
    --------
    >>> augmented(torch.zeros(1, 1, 1), torch.ones(1, 1))
    tensor([[[0., 1.],
             [1., 0.]]])
    """
    models, n = b.shape
    B = A.new_zeros(models, n + 1, n + 1)
    B[:, :n, :n] = A
    B[:, :n, n] = b
    B[:, n, :n] = b
    return B


def solve_diagonal(
    C: Tensor | sparse.csr_array,
    *,
    tol: float = 1e-8,
    method: Literal["auto", "interior", "mixing"] = "auto",
    max_iterations: int | None = None,
    seed: int = 0,
) -> DiagonalSDP:
    """Minimise Σ d subject to diag(d) - C ⪰ 0, for a batch of symmetric matrices with zero diagonal.

    Parameters
    ----------
    C : (models, n, n) float64 tensor, or one (n, n) SciPy sparse matrix (then the mixing method keeps it sparse)
    tol : relative duality gap to stop at (interior), or relative progress of a sweep (mixing)
    method : ``auto`` takes the interior-point method up to 1,000 variables
    max_iterations : most steps (default 100) or sweeps (default 1,000)
    seed : of the mixing method's start

    Returns
    -------
    A `d` that is feasible in every case, converged or not, so that ½ Σ d is always an upper bound; ``gap`` tells how
    good it is.

    Examples
    --------
    >>> triangle = 1.0 * (torch.eye(3, dtype=torch.float64) - 1)[None]
    >>> solve_diagonal(triangle).d.sum().round(decimals=6)
    tensor(3., dtype=torch.float64)
    """
    if isinstance(C, Tensor):
        if C.ndim != 3 or C.shape[-1] != C.shape[-2]:
            raise InputError(f"C must be (models, n, n), got {tuple(C.shape)}")
        if method == "auto":
            method = "interior" if C.shape[-1] <= _INTERIOR_LIMIT else "mixing"
        if method == "interior":
            # A hundred at a time stay in the cache.
            parts = [_interior(part, tol, max_iterations or 100) for part in C.detach().split(_TOGETHER)]
            return parts[0] if len(parts) == 1 else _joined(parts)
        matrices: list[Any] = [C[k].detach().cpu().numpy() for k in range(len(C))]
        device = C.device
    else:
        if method == "interior" or (method == "auto" and C.shape[0] <= _INTERIOR_LIMIT):
            return _interior(torch.from_numpy(C.toarray())[None], tol, max_iterations or 100)
        matrices, device = [C], torch.device("cpu")
    solved = [_mixing(matrix, tol, max_iterations or 1000, seed) for matrix in matrices]
    stack = [torch.from_numpy(np.stack([getattr(s, name) for s in solved])).to(device) for name in ("d", "V")]
    gap, shift = (
        torch.tensor([getattr(s, name) for s in solved], dtype=torch.float64, device=device)
        for name in ("gap", "shift")
    )
    return DiagonalSDP(stack[0], stack[1], gap, shift, max(s.sweeps for s in solved), "mixing")


def _joined(parts: list[DiagonalSDP]) -> DiagonalSDP:
    d, factor, gap, shift = (torch.cat([getattr(p, name) for p in parts]) for name in ("d", "factor", "gap", "shift"))
    return DiagonalSDP(d, factor, gap, shift, max(p.iterations for p in parts), parts[0].method)


def _interior(C: Tensor, tol: float, max_iterations: int) -> DiagonalSDP:
    models, n, _ = C.shape
    # Scale-free: the start and the tolerance do not know the user's units.
    scale = C.abs().amax((-1, -2)).clamp_min(torch.finfo(C.dtype).tiny)
    C = C / scale[:, None, None]
    eye = torch.eye(n, dtype=C.dtype, device=C.device)
    d_all = 1.1 * C.abs().sum(-1) + 1e-6
    X_all = eye.expand(models, n, n).clone()
    gap_all = d_all.sum(-1)
    active = torch.arange(models, device=C.device)
    y, X, c = d_all.clone(), X_all.clone(), C
    Z = torch.diag_embed(y) - c
    mu = (Z * X).sum((-1, -2)) / (2 * n)
    done = 0
    for step in range(max_iterations + 1):
        gap = y.sum(-1) - (c * X).sum((-1, -2))
        finished = gap <= tol * y.sum(-1).abs().clamp_min(1.0)
        if step == max_iterations:
            finished = torch.ones_like(finished)
        if bool(finished.any()):
            ended = active[finished]
            d_all[ended], X_all[ended], gap_all[ended] = y[finished], X[finished], gap[finished]
            keep = ~finished
            active, y, X, c, Z, mu = active[keep], y[keep], X[keep], c[keep], Z[keep], mu[keep]
            done = step
        if not len(active):
            break
        inverse = torch.linalg.inv(Z)
        inverse = 0.5 * (inverse + inverse.mT)
        right = mu[:, None] * inverse.diagonal(dim1=-2, dim2=-1) - 1
        dy = torch.linalg.solve(inverse * X, right)
        dX = mu[:, None, None] * inverse - X - inverse @ (dy[:, :, None] * X)
        dX = 0.5 * (dX + dX.mT)
        primal = _step(X, dX)
        dual = _step(Z, torch.diag_embed(dy))
        X = X + primal[:, None, None] * dX
        y = y + dual[:, None] * dy
        Z = torch.diag_embed(y) - c
        mu = (Z * X).sum((-1, -2)) / (2 * n)
        both = primal + dual
        mu = torch.where(both > 1.6, 0.5 * mu, mu)
        mu = torch.where(both > 1.9, 0.2 * mu, mu)
    return DiagonalSDP(
        d_all * scale[:, None],
        _unit_factor(X_all),
        (gap_all * scale).clamp_min(0.0),
        torch.zeros_like(gap_all),
        done,
        "interior",
    )


def _step(M: Tensor, direction: Tensor) -> Tensor:
    """Largest step in {1, .8, .64, ...} that keeps M + step * direction positive definite; 5 % short of it if < 1."""
    step = M.new_ones(len(M))
    pending = torch.arange(len(M), device=M.device)
    for _ in range(80):
        trial = M[pending] + step[pending, None, None] * direction[pending]
        failed = torch.linalg.cholesky_ex(trial).info != 0
        pending = pending[failed]
        if not len(pending):
            break
        step[pending] *= 0.8
    step[pending] = 0.0
    return torch.where(step < 1, 0.95 * step, step)


def _unit_factor(X: Tensor) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(X)
    for k in info.nonzero().flatten().tolist():
        value, vector = torch.linalg.eigh(X[k])
        factor[k] = vector * value.clamp_min(0).sqrt()
    return factor / factor.norm(dim=-1, keepdim=True).clamp_min(1e-300)


@dataclass(frozen=True)
class _Mixed:
    d: np.ndarray
    V: np.ndarray
    gap: float
    shift: float
    sweeps: int


def _mixing(C: Any, tol: float, max_sweeps: int, seed: int) -> _Mixed:
    n = C.shape[0]
    # Scale-free, as the interior-point method is: the stop rule does not know the user's units.
    scale = max(float(abs(C).max()), float(np.finfo(np.float64).tiny))
    C = C / scale
    rank = math.ceil(math.sqrt(2 * n)) + 1
    V = np.random.default_rng(seed).standard_normal((n, rank))
    V /= np.linalg.norm(V, axis=1, keepdims=True)
    dense: Any = C
    rows: Any = C if sparse.issparse(C) else None
    sweeps = 0
    value = float((V * (C @ V)).sum())
    while sweeps < max_sweeps:
        sweeps += 1
        for i in range(n):
            if rows is not None:
                part = slice(rows.indptr[i], rows.indptr[i + 1])
                g = rows.data[part] @ V[rows.indices[part]]
            else:
                g = dense[i] @ V
            length = math.sqrt(float(g @ g))
            if length > 0:
                V[i] = g / length
        before, value = value, float((V * (C @ V)).sum())
        if value - before <= tol * max(1.0, abs(value)) / n:
            break
    d = np.asarray(np.linalg.norm(C @ V, axis=1))
    shift = _repair(C, d)
    d = d + shift
    return _Mixed(scale * d, V, scale * max(float(d.sum()) - value, 0.0), scale * shift, sweeps)


def _repair(C: Any, d: np.ndarray) -> float:
    """Smallest shift known to make diag(d + shift) - C ⪰ 0."""
    n = len(d)
    scale = float(np.abs(d).max(initial=0.0)) + 1e-300
    if n <= _DENSE_CHECK_LIMIT:
        held: Any = C
        full: np.ndarray = held.toarray() if sparse.issparse(C) else held
        top = float(np.linalg.eigvalsh(full - np.diag(d))[-1])
        return max(0.0, top) + 4 * n * _EPS * scale
    gap: Any = sparse.csc_array(C) - sparse.diags_array(d)
    start = np.random.default_rng(0).standard_normal(n)
    try:
        largest = float(eigsh(gap, k=1, which="LA", tol=1e-6, v0=start, return_eigenvectors=False)[0])
    except ArpackNoConvergence:
        # The trials below certify whatever shift they end with.
        largest = 0.0
    estimate = max(0.0, largest)
    for factor in (1e-6, 1e-4, 1e-2, 1.0):
        shift = estimate + factor * scale
        # Elimination without pivoting: positive pivots prove that the matrix is positive definite.
        try:
            lu = splu(
                sparse.csc_array(sparse.diags_array(d + shift) - sparse.csc_array(C)),
                permc_spec="MMD_AT_PLUS_A",
                diag_pivot_thresh=0.0,
                options={"SymmetricMode": True},
            )
        except RuntimeError:
            continue
        if (lu.perm_r == lu.perm_c).all() and (lu.U.diagonal() > 0).all():
            return shift
    # Diagonal dominance needs no check.
    radius = np.asarray(abs(C).sum(axis=1)).ravel()
    return float((radius - d).max())
