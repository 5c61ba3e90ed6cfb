"""Naive mean field: the best product distribution, and the fixed points of its coordinate ascent.

Park, Yang, Yun and Shin, "Spectral Approximate Inference" (ICML 2019) compare to it, started from m = 0.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse, special
from torch import Tensor

from shared_core.errors import InputError
from spectral_mf._inputs import Problem, as_problem
from spectral_mf._threads import one_blas_thread
from spectral_mf.result import LogPartition, rounding_slack

__all__ = ["fixed_points", "free_energy", "mean_field"]

Array = NDArray[np.float64]

# Doubles a chunk of models may hold: its magnetizations then stay in a core's cache from one spin to the next.
_CHUNK = 100_000
# Newton is tried where a sweep moves a start by less than this; what it may move it by in turn; its steps, and theirs.
_NEARLY = 0.02
_FIRST_TRY = 48
_REACH = 0.2
_NEWTON_STEPS = 6
_CG_STEPS = 80


def fixed_points(
    problem: Problem, start: Tensor, *, tol: float = 1e-10, max_sweeps: int = 3000
) -> tuple[Tensor, Tensor, Tensor]:
    """Run coordinate ascent on the mean-field free energy, from many starts of many models at once.

    A sweep sets m_i = tanh(b_i + Σ_j A_ij m_j) for one spin after the other, so F never falls. Spins that do not
    interact are set together: dense couplings keep the result of the order 0, 1, ..., n-1; sparse ones are swept colour
    by colour. Where a start has nearly come to rest in a concave region of F, Newton steps finish it; they are kept
    only if the residual falls by a factor each step and F does not fall, else the sweeps go on as if nothing had been.

    Parameters
    ----------
    problem : models as :func:`spectral_mf._inputs.as_problem` returns them
    start : (models, starts, n) magnetizations in [-1, 1]
    tol : a start has converged when no magnetization moves by more in a sweep
    max_sweeps : sweeps after which a start is given up, at least 1

    Returns
    -------
    m : (models, starts, n) magnetizations, detached; CPU work, returned on the device of `problem`
    converged : (models, starts) bool
    sweeps : (models, starts) int64, the sweeps each start took

    Raises
    ------
    InputError
        Where `start` has another shape, is not within [-1, 1], or `max_sweeps` or `tol` is not positive.

    Notes
    -----
    Spec of the ``modes`` estimator, step 1; the authors' baseline is the one start m = 0.

    Examples
    --------
    >>> problem = as_problem([[0.0, 2.0], [2.0, 0.0]])
    >>> m, converged, _ = fixed_points(problem, torch.tensor([[[0.1, 0.1], [-0.1, -0.1]]]))
    >>> m[0, :, 0].round(decimals=4).tolist(), converged.tolist()
    ([0.9575, -0.9575], [[True, True]])
    """
    shape = (problem.models, problem.n)
    if start.ndim != 3 or (start.shape[0], start.shape[2]) != shape or start.shape[1] == 0:
        raise InputError(
            f"start must be (models, starts, n) = ({shape[0]}, starts, {shape[1]}), got {tuple(start.shape)}"
        )
    if max_sweeps < 1 or not tol > 0:
        raise InputError(f"max_sweeps must be at least 1 and tol positive, got {max_sweeps} and {tol}")
    initial = start.detach().to("cpu", torch.float64).numpy()
    if not (np.abs(initial) <= 1).all():
        raise InputError("start must lie within [-1, 1]; NaN is not a magnetization")
    n, starts = problem.n, start.shape[1]
    m = np.empty_like(initial)
    converged = np.zeros((problem.models, starts), dtype=bool)
    sweeps = np.zeros((problem.models, starts), dtype=np.int64)
    fields = problem.b.detach().cpu().numpy()
    blocks = _colours(problem) if problem.A is None else _levels(problem)
    couplings = None if problem.A is None else problem.A.detach().cpu().numpy()
    chunk = max(1, _CHUNK // (n * starts))
    for first in range(0, problem.models, chunk):
        part = slice(first, first + chunk)
        model = (
            _Dense(couplings[part], fields[part], blocks)
            if couplings is not None
            else _Sparse(cast("sparse.csr_array", problem.sparse), fields, blocks)
        )
        with one_blas_thread():
            m[part], converged[part], sweeps[part] = _ascend(model, initial[part], tol, max_sweeps)
    device = problem.b.device
    return torch.from_numpy(m).to(device), torch.from_numpy(converged).to(device), torch.from_numpy(sweeps).to(device)


def _levels(problem: Problem) -> list[list[int]]:
    # A spin goes one level above the highest of its neighbours that come before it: no two of a level interact, and
    # taking level after level gives what taking spin after spin gives.
    level = [0] * problem.n
    for i, near in enumerate(problem.neighbours):
        level[i] = max((level[j] + 1 for j in near if j < i), default=0)
    return _grouped(level)


def _colours(problem: Problem) -> list[list[int]]:
    # A long chain has as many levels as spins, but two colours.
    colour = [-1] * problem.n
    for i, near in enumerate(problem.neighbours):
        taken = {colour[j] for j in near}
        colour[i] = next(c for c in range(len(near) + 1) if c not in taken)
    return _grouped(colour)


def _grouped(labels: Sequence[int]) -> list[list[int]]:
    groups: list[list[int]] = [[] for _ in range(max(labels) + 1)]
    for i, label in enumerate(labels):
        groups[label].append(i)
    return groups


class _Dense:
    """Couplings of several models, laid out so that a block of spins is one product over all starts."""

    def __init__(self, A: Array, b: Array, blocks: list[list[int]]) -> None:
        self.couplings, self.b = A, b
        self.blocks: list[Any] = [
            slice(block[0], block[-1] + 1) if block[-1] - block[0] + 1 == len(block) else np.array(block)
            for block in blocks
        ]
        # The field rides along as the coupling to a last spin that is always 1.
        joined = np.concatenate([A, b[:, :, None]], 2)
        self.rows = [np.ascontiguousarray(joined[:, block]) for block in self.blocks]

    def take(self, keep: NDArray[np.int64]) -> _Dense:
        kept = object.__new__(_Dense)
        kept.couplings, kept.b, kept.blocks = self.couplings[keep], self.b[keep], self.blocks
        kept.rows = [rows[keep] for rows in self.rows]
        return kept

    def couple(self, m: Array) -> Array:
        """Multiply: A m for m (models, n, starts)."""
        return self.couplings @ m

    def padded(self, m: Array) -> Array:
        models, _, starts = m.shape
        return np.concatenate([m, np.ones((models, 1, starts))], 1)

    def sweep(self, m: Array) -> None:
        """Set every spin in turn, in place; m (models, n + 1, starts)."""
        if len(m) == 1:
            # Plain vectors cost half of what stacks of one matrix do.
            inner = m[0]
            buffer = np.empty(inner.shape[1])
            for block, rows in zip(self.blocks, self.rows, strict=True):
                if rows.shape[1] == 1:
                    np.tanh(np.dot(rows[0, 0], inner, buffer), inner[block][0])
                else:
                    inner[block] = np.tanh(np.dot(rows[0], inner))
            return
        for block, rows in zip(self.blocks, self.rows, strict=True):
            m[:, block] = np.tanh(rows @ m)


class _Sparse:
    """Couplings of one model in SciPy's sparse rows."""

    def __init__(self, A: sparse.csr_array, b: Array, blocks: list[list[int]]) -> None:
        self.couplings, self.b = A, b
        self.blocks = [np.array(block) for block in blocks]
        self.rows: list[Any] = [A[block] for block in self.blocks]

    def take(self, _keep: NDArray[np.int64]) -> _Sparse:
        return self

    def couple(self, m: Array) -> Array:
        return cast("Array", self.couplings @ m[0])[None]

    def padded(self, m: Array) -> Array:
        return m.copy()

    def sweep(self, m: Array) -> None:
        inner, fields = m[0], self.b[0][:, None]
        for block, rows in zip(self.blocks, self.rows, strict=True):
            inner[block] = np.tanh(rows @ inner + fields[block])


def _ascend(
    model: _Dense | _Sparse, initial: Array, tol: float, max_sweeps: int
) -> tuple[Array, NDArray[np.bool_], NDArray[np.int64]]:
    models, starts, n = initial.shape
    out = initial.copy()
    converged = np.zeros((models, starts), dtype=bool)
    sweeps = np.full((models, starts), max_sweeps, dtype=np.int64)
    # Slot (r, s) of m holds start `slot[r, s]` of model `row[r]`; slots that are done may linger until compaction.
    m = model.padded(np.ascontiguousarray(initial.transpose(0, 2, 1)))
    row, slot = np.arange(models), np.tile(np.arange(starts), (models, 1))
    active = np.ones((models, starts), dtype=bool)
    # A try costs tens of sweeps of a small model, so tries come in proportion to the sweeps done.
    next_try = _FIRST_TRY

    def finish(at: NDArray[np.bool_], magnetizations: Array, count: int) -> None:
        r, s = at.nonzero()
        out[row[r], slot[r, s]] = magnetizations[r, :n, s]
        converged[row[r], slot[r, s]] = True
        sweeps[row[r], slot[r, s]] = count
        active[r, s] = False

    for count in range(1, max_sweeps + 1):
        before = m.copy()
        model.sweep(m)
        np.subtract(m, before, out=before)
        change = np.abs(before, out=before).max(1)
        resting = active & (change < tol)
        if resting.any():
            finish(resting, m, count)
        if count == next_try:
            next_try *= 2
            nearly = active & (change < _NEARLY)
            if nearly.any():
                r, s = _packed(nearly)
                close, sure = _newton(model if len(r) == len(m) else model.take(r), m[r[:, None], :n, s], tol)
                # Packed rows are padded with slots that are not to be touched.
                of_row, of_column = np.nonzero(sure & nearly[r[:, None], s])
                if len(of_row):
                    rows, columns = r[of_row], s[of_row, of_column]
                    at, there = np.zeros_like(active), m.copy()
                    at[rows, columns] = True
                    there[rows, :n, columns] = close[of_row, of_column]
                    finish(at, there, count)
        left = int(active.sum())
        if left == 0:
            return out, converged, sweeps
        if left <= 0.75 * active.size:
            r, s = _packed(active)
            if s.size < active.size:
                model = model.take(r) if len(r) < len(row) else model
                m = np.ascontiguousarray(m[r[:, None], :, s].transpose(0, 2, 1))
                row, slot, active = row[r], slot[r[:, None], s], active[r[:, None], s]
    r, s = active.nonzero()
    out[row[r], slot[r, s]] = m[r, :n, s]
    return out, converged, sweeps


def _packed(wanted: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    # Rows that want anything, and as many columns of each, the wanted ones first, as the neediest row wants.
    rows = np.flatnonzero(wanted.any(1))
    chosen = wanted[rows]
    order = np.argsort(~chosen, axis=1, kind="stable")[:, : int(chosen.sum(1).max())]
    return rows, order


def _newton(model: _Dense | _Sparse, start: Array, tol: float) -> tuple[Array, NDArray[np.bool_]]:
    """Newton steps for h = b + A tanh(h), from start (models, starts, n); also which starts they may be trusted for.

    With s = 1/cosh h the step is r + A s z, where (I - s A s) z = s r and r is the residual: no division by a spin's
    variance, which may be zero. The matrix is minus the Hessian of F in its natural scale, so a direction of negative
    curvature that conjugate gradients meet says that sweeps would not stay here.
    """
    m = np.ascontiguousarray(start.transpose(0, 2, 1))
    b = model.b[:, :, None]
    h = model.couple(m) + b
    begin = np.tanh(h)
    m = begin
    r = model.couple(m) + b - h
    s2 = 1 - m**2
    size = np.abs(s2 * r).max(1)
    sure = np.ones(size.shape, dtype=bool)
    for _ in range(_NEWTON_STEPS):
        s = np.sqrt(s2)
        z, curved = _conjugate_gradients(model, s, s * r)
        sure &= curved
        # A start that is not to be trusted must not send the others NaN warnings.
        h = h + np.where(sure[:, None], r + model.couple(s * z), 0.0)
        m = np.tanh(h)
        r = model.couple(m) + b - h
        s2 = 1 - m**2
        previous, size = size, np.abs(s2 * r).max(1)
        done = size <= 1e-3 * tol
        sure &= done | (size <= 0.25 * previous)
        sure &= np.abs(m - begin).max(1) <= _REACH
        if (done | ~sure).all():
            break
    # tanh is flat where a spin is nearly sure, so the residual counts as what the next sweep would move.
    final = np.tanh(model.couple(m) + b)
    sure &= np.abs(final - m).max(1) <= 0.1 * tol
    gain = _free(model, m) - _free(model, begin)
    sure &= gain >= -1e-12 * (1 + np.abs(model.b).sum(1)[:, None])
    return m.transpose(0, 2, 1), sure


def _conjugate_gradients(model: _Dense | _Sparse, s: Array, right: Array) -> tuple[Array, NDArray[np.bool_]]:
    z = np.zeros_like(right)
    r, p = right.copy(), right.copy()
    rr = np.einsum("mns,mns->ms", r, r)
    goal = 1e-8 * rr + 1e-300
    curved = np.ones(rr.shape, dtype=bool)
    for _ in range(min(_CG_STEPS, 2 * right.shape[1])):
        going = curved & (rr > goal)
        if not going.any():
            break
        q = p - s * model.couple(s * p)
        pq = np.einsum("mns,mns->ms", p, q)
        curved &= ~going | (pq > 1e-8 * np.einsum("mns,mns->ms", p, p))
        going &= curved
        step = np.where(going, rr / np.where(going, pq, 1.0), 0.0)[:, None]
        z += step * p
        r -= step * q
        before, rr = rr, np.einsum("mns,mns->ms", r, r)
        p = r + np.where(going, rr / np.where(going, before, 1.0), 0.0)[:, None] * p
    return z, curved


def _free(model: _Dense | _Sparse, m: Array) -> Array:
    entropy = special.entr(0.5 * (1 + m)) + special.entr(0.5 * (1 - m))
    return (m * (model.b[:, :, None] + 0.5 * model.couple(m)) + entropy).sum(1)


def free_energy(problem: Problem, m: Tensor) -> Tensor:
    """Mean-field free energy F(m) = bᵀm + ½ mᵀAm + Σ_i H((1 + m_i)/2): a lower bound of log Z for every m.

    Differentiable in A, b and m; the slope in m is infinite where m_i = ±1, as that of the entropy is.

    Parameters
    ----------
    problem : models as :func:`spectral_mf._inputs.as_problem` returns them
    m : (models, starts, n) magnetizations in [-1, 1]

    Returns
    -------
    (models, starts) nats, without the problem's constant

    Raises
    ------
    InputError
        Where m has another shape or is not within [-1, 1].

    Notes
    -----
    Gibbs' inequality for the product distribution with means m.

    Examples
    --------
    >>> problem = as_problem([[0.0, 2.0], [2.0, 0.0]])
    >>> free_energy(problem, torch.tensor([[[0.0, 0.0], [1.0, 1.0]]], dtype=torch.float64))
    tensor([[1.3863, 2.0000]], dtype=torch.float64)
    """
    if m.ndim != 3 or (m.shape[0], m.shape[2]) != (problem.models, problem.n):
        raise InputError(
            f"m must be (models, starts, n) = ({problem.models}, starts, {problem.n}), got {tuple(m.shape)}"
        )
    if not bool((m.detach().abs() <= 1).all()):
        raise InputError("m must lie within [-1, 1]; NaN is not a magnetization")
    if problem.A is None:
        edges = problem.edges
        pairs = (m[..., edges.i] * m[..., edges.j] * edges.weight[:, None]).sum(-1)
    else:
        pairs = 0.5 * ((m @ problem.A) * m).sum(-1)
    entropy = torch.special.entr(0.5 * (1 + m)) + torch.special.entr(0.5 * (1 - m))
    return (m * problem.b[:, None]).sum(-1) + pairs + entropy.sum(-1)


def mean_field(
    A: Any,
    b: Any = None,
    *,
    starts: int = 1,
    generator: torch.Generator | None = None,
    max_sweeps: int = 1000,
    tol: float = 1e-10,
) -> LogPartition:
    """Estimate log Z from below by the best product distribution that coordinate ascent finds.

    One start, m = 0, is the paper's baseline. Without fields m = 0 is a fixed point, and the value is n log 2 exactly
    whatever the couplings: more starts are the fair comparison.

    Parameters
    ----------
    A, b : couplings and fields in any form :func:`spectral_mf._inputs.as_problem` takes; sparse A stays sparse
    starts : number of starts, the first at m = 0, the others uniform in (-1, 1)
    generator : CPU source of the random starts; a new one seeded with 0 where None
    max_sweeps : sweeps after which a start is given up
    tol : a start has converged when no magnetization moves by more in a sweep

    Returns
    -------
    LogPartition
        `value` is the largest F(m), `lower` the same less a slack for rounding, certified whether or not the sweeps
        converged; `marginals` are the m behind it. Diagnostics: `sweeps` and `converged`, (models, starts) tensors.
        The value has the gradients of F at m held fixed, which are those of the value itself at a fixed point.

    Raises
    ------
    InputError
        Where A or b is malformed, or `starts`, `max_sweeps` or `tol` is not positive.

    Notes
    -----
    Park et al. (ICML 2019), baseline "MF": 1000 sequential sweeps from m = 0.

    Examples
    --------
    >>> result = mean_field([[0.0, 0.7], [0.7, 0.0]], [0.3, -0.4])
    >>> round(result.value, 4), result.lower <= result.value
    (1.4653, True)
    """
    began = time.perf_counter()
    problem = as_problem(A, b)
    if starts < 1:
        raise InputError(f"starts must be at least 1, got {starts}")
    random = torch.Generator().manual_seed(0) if generator is None else generator
    start = torch.zeros(problem.models, starts, problem.n, dtype=torch.float64)
    if starts > 1:
        shape = (problem.models, starts - 1, problem.n)
        start[:, 1:] = 2 * torch.rand(shape, generator=random, dtype=torch.float64) - 1
    m, converged, sweeps = fixed_points(problem, start, tol=tol, max_sweeps=max_sweeps)
    every = free_energy(problem, m)
    best = every.detach().argmax(1)
    models = torch.arange(problem.models, device=best.device)
    value = every[models, best]
    stopped = int((~converged[models, best]).sum())
    return LogPartition.of(
        problem,
        "mean_field",
        value,
        lower=value.detach() - rounding_slack(problem, value),
        marginals=m[models, best],
        diagnostics={"sweeps": sweeps, "converged": converged},
        warnings=(
            ()
            if not stopped
            else (f"mean field did not converge for {stopped} of {problem.models} models: raise max_sweeps",)
        ),
        seconds=time.perf_counter() - began,
    )
