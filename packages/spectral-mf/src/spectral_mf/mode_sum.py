"""log Z as a sum over the modes of mean field, each with the Gaussian fluctuations in its own spectral basis.

An extension of ours, not in the paper: where many spins are frustrated the mass of a model sits around a few mean-field
solutions, and adding them up beats every single one. It finds modes by coordinate ascent from many starts, and goes on
starting until the starts have little new to find.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shared_core.errors import InputError
from spectral_mf._inputs import Problem, as_problem
from spectral_mf.result import LogPartition, rounding_slack
from spectral_mf.sdp import augmented, solve_diagonal
from spectral_mf.variational import fixed_points, free_energy

__all__ = ["FoundModes", "find_modes", "modes", "search_modes"]

_CHUNK = 2**22


@dataclass(frozen=True)
class FoundModes:
    """Distinct mean-field fixed points of a batch of models.

    Attributes
    ----------
    m : (found, n) magnetizations
    model : (found,) which model each belongs to
    hits : (found,) starts that came to it
    free_energy : (found,) F(m), a lower bound of log Z each
    starts : (models,) starts used
    converged : (models,) share of starts that converged
    log_weight : (found,) what each adds to Z, once :func:`search_modes` has worked it out
    """

    m: Tensor
    model: Tensor
    hits: Tensor
    free_energy: Tensor
    starts: Tensor
    converged: Tensor
    log_weight: Tensor | None = None


def modes(
    A: Any,
    b: Any = None,
    *,
    starts: int = 40,
    max_starts: int | None = None,
    tol: float = 0.01,
    merge: float = 1e-3,
    stability: float = 1e-6,
    roundings: bool | None = None,
    generator: torch.Generator | None = None,
    known: FoundModes | None = None,
) -> LogPartition:
    """Estimate log Z by Σ over distinct stable mean-field modes m of exp(F(m) - ½ log det(I - W^½ A W^½)).

    Parameters
    ----------
    A : (n, n) or (models, n, n) symmetric couplings
    b : (n,) or (models, n) fields
    starts : starts of a round; the next round begins where the last left too much to find
    max_starts : most starts in all; ``starts`` for one round; None: 640, and fewer beyond 100 spins, down to 80
    tol : another round follows while modes seen just once carry a share above this of the sum and starts keep finding
        new ones
    merge : fixed points closer than this (largest difference of a magnetization) are one
    stability : a mode counts where the largest eigenvalue of W^½ A W^½ is below 1 minus this, W = diag(1 - m²)
    roundings : also start at signs drawn from the SDP's solution, which lie near the deepest modes; None: up to n = 400
    generator : source of the starts; None means one seeded with 0
    known : modes that :func:`search_modes` found; nothing is searched then

    Returns
    -------
    The estimate with the best F as certified lower bound. Not a bound itself. Differentiable in A and b: each fixed
    point moves with them by the implicit function theorem.

    Notes
    -----
    Spec 2.9. Off by 0.3 to 0.8 nats near a phase transition; under-counts where there are more modes than starts, which
    ``diagnostics["unseen"]`` estimates: the share of the sum in modes that one start alone found.

    Examples
    --------
    >>> import numpy as np
    >>> A = 5 * (np.ones((6, 6)) - np.eye(6))  # two deep wells
    >>> abs(float(modes(A).value - (0.5 * A.sum() + np.log(2)))) < 1e-9
    True
    """
    started = time.perf_counter()
    problem = as_problem(A, b)
    most = _most(problem.n, starts) if max_starts is None else max_starts
    if starts < 1 or most < starts:
        raise InputError(f"starts must be at least 1 and at most max_starts, got {starts} and {most}")
    random = generator or torch.Generator().manual_seed(0)
    if known is None:
        with torch.no_grad():
            known = _search(problem, starts, most, tol, merge, stability, roundings, random)
    found = known
    tracked = torch.is_grad_enabled() and (problem.dense.requires_grad or problem.b.requires_grad)
    if tracked:
        log_weight = _corrected(problem, found, _attached(problem, found), stability)
    else:
        log_weight = found.log_weight
        if log_weight is None:
            log_weight = _corrected(problem, found, found.m, stability)
    value = _sum_over_modes(problem, found, log_weight)
    best = _best(problem, found)
    details: dict[str, Any] = {
        "modes": problem.give_back(_counts(problem, found, log_weight)),
        "starts": problem.give_back(found.starts),
        "converged": problem.give_back(found.converged),
        "unseen": problem.give_back(_unseen(problem, found, log_weight.detach(), value.detach())[0]),
    }
    share = torch.exp(log_weight.detach() - value.detach()[found.model])
    means = problem.b.new_zeros(problem.models, problem.n).index_add_(0, found.model, share[:, None] * found.m)
    return LogPartition.of(
        problem,
        "modes",
        value,
        lower=best - rounding_slack(problem, best),
        marginals=means,
        diagnostics=details,
        seconds=time.perf_counter() - started,
    )


def search_modes(problem: Problem, generator: torch.Generator, *, starts: int = 40, tol: float = 0.01) -> FoundModes:
    """Look for modes as :func:`modes` does: from random starts and roundings of the SDP, until little is left to find.

    Parameters
    ----------
    problem : models as :func:`spectral_mf._inputs.as_problem` returns them
    generator : source of the starts
    starts : starts of the first round
    tol : as in :func:`modes`
    """
    with torch.no_grad():
        return _search(problem, starts, _most(problem.n, starts), tol, 1e-3, 1e-6, None, generator)


def _most(n: int, starts: int) -> int:
    return max(starts, 80, min(640, 64_000 // n))


def find_modes(problem: Problem, start: Tensor, *, merge: float = 1e-3, known: FoundModes | None = None) -> FoundModes:
    """Ascend from every start and keep the distinct fixed points, together with those known already.

    Parameters
    ----------
    problem : models as :func:`spectral_mf._inputs.as_problem` returns them
    start : (models, starts, n) magnetizations in [-1, 1]
    merge : fixed points closer than this are one
    known : modes of the same models from earlier starts
    """
    end, converged, _ = fixed_points(problem, start)
    models, k, n = end.shape
    m = end.reshape(models * k, n)
    model = torch.arange(models, device=m.device).repeat_interleave(k)
    hits = torch.ones(models * k, dtype=torch.long, device=m.device)
    energy = free_energy(problem, end).detach().reshape(-1)
    starts = torch.full((models,), k, device=m.device)
    share = converged.to(m).mean(1)
    if known is not None:
        m, model, hits = torch.cat([known.m, m]), torch.cat([known.model, model]), torch.cat([known.hits, hits])
        energy = torch.cat([known.free_energy, energy])
        share = (share * k + known.converged * known.starts) / (k + known.starts)
        starts = starts + known.starts
    keep, hits = _distinct(m, model, hits, merge)
    return FoundModes(m[keep], model[keep], hits[keep], energy[keep], starts, share)


def _search(
    problem: Problem,
    starts: int,
    max_starts: int,
    tol: float,
    merge: float,
    stability: float,
    roundings: bool | None,
    generator: torch.Generator,
) -> FoundModes:
    n, device = problem.n, problem.b.device
    factor: Tensor | None = None
    if roundings or (roundings is None and n <= 400):
        factor = solve_diagonal(augmented(problem.dense, problem.b).detach(), tol=1e-2).factor
    symmetric = (problem.b.detach() == 0).all(1)
    active = torch.arange(problem.models, device=device)
    ended: list[FoundModes] = []
    weights: list[Tensor] = []
    starts_used, converged = (problem.b.new_zeros(problem.models) for _ in range(2))
    known: FoundModes | None = None
    rounds, used = 0, 0
    while len(active):
        part = problem if len(active) == problem.models else problem.select(active)
        k = min(starts * 2**rounds, max_starts - used)
        begin = _starts(part, k, None if factor is None else factor[active], generator)
        if bool(symmetric[active].any()):
            # Without fields every mode has its mirror image; a batch's other models get as many starts of their own.
            more = _starts(part, k, None if factor is None else factor[active], generator)
            begin = torch.cat([begin, torch.where(symmetric[active][:, None, None], -begin, more)], 1)
        known = find_modes(part, begin, merge=merge, known=known)
        rounds, used = rounds + 1, used + k
        log_weight = _corrected(part, known, known.m, stability)
        total = _sum_over_modes(part, known, log_weight)
        unseen, singles = _unseen(part, known, log_weight, total)
        # Good and Turing: the chance that one more start finds something new is singles / starts.
        finished = (unseen <= tol) | (singles <= 0.02 * known.starts)
        if used >= max_starts:
            finished = torch.ones_like(finished)
        starts_used[active], converged[active] = known.starts.to(total), known.converged
        ended.append(_of_models(known, finished, active))
        weights.append(log_weight[finished[known.model]].detach())
        known = _of_models(known, ~finished, (~finished).long().cumsum(0) - 1)
        active = active[~finished]
    return FoundModes(
        torch.cat([part.m for part in ended]),
        torch.cat([part.model for part in ended]),
        torch.cat([part.hits for part in ended]),
        torch.cat([part.free_energy for part in ended]),
        starts_used,
        converged,
        torch.cat(weights),
    )


def _of_models(found: FoundModes, chosen: Tensor, names: Tensor) -> FoundModes:
    """Modes of the chosen models, whose indices become `names`."""
    mine = chosen[found.model]
    return FoundModes(
        found.m[mine],
        names[found.model[mine]],
        found.hits[mine],
        found.free_energy[mine],
        found.starts[chosen],
        found.converged[chosen],
    )


def _starts(problem: Problem, count: int, factor: Tensor | None, generator: torch.Generator) -> Tensor:
    shape = (problem.models, count, problem.n)
    begin = (2 * torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device) - 1).to(problem.b)
    if factor is None or count < 2:
        return begin
    # Every other start is a hyperplane rounding of the SDP, read relative to the spin that carries the fields.
    half = count // 2
    normal = torch.randn(
        (problem.models, factor.shape[-1], half), generator=generator, dtype=torch.float64, device=generator.device
    )
    side = torch.sign(factor @ normal.to(factor))
    rounded = (side[:, :-1] * side[:, -1:]).transpose(1, 2)
    begin[:, :half] = 0.9 * rounded
    return begin


def _distinct(m: Tensor, model: Tensor, hits: Tensor, merge: float) -> tuple[Tensor, Tensor]:
    """Return indices of the first of each group of equal modes of one model, and hits added up on them."""
    order = torch.argsort(model, stable=True)
    models = int(model.max()) + 1
    counts = torch.bincount(model, minlength=models)
    most = int(counts.max())
    place = torch.arange(len(model), device=m.device) - (counts.cumsum(0) - counts)[model[order]]
    padded = m.new_full((models, most, m.shape[1]), math.nan)
    padded[model[order], place] = m[order]
    rows = torch.full((models, most), -1, dtype=torch.long, device=m.device)
    rows[model[order], place] = order
    keep = torch.ones(len(m), dtype=torch.bool, device=m.device)
    total = hits.clone()
    per_chunk = max(1, _CHUNK // (most * most))
    for first in range(0, models, per_chunk):
        block = padded[first : first + per_chunk]
        # Two equal modes agree in every sign pattern that matters; the largest difference decides.
        near = torch.cdist(block, block, p=math.inf) < merge
        earliest = near.to(torch.uint8).argmax(-1)
        names = rows[first : first + per_chunk]
        valid = names >= 0
        target = names.gather(1, earliest)
        duplicate = valid & (target != names) & near.any(-1)
        keep[names[duplicate]] = False
        total.index_add_(0, target[duplicate], hits[names[duplicate]])
    return keep.nonzero().flatten(), total


def _attached(problem: Problem, found: FoundModes) -> Tensor:
    """Make the fixed points functions of A and b: one Newton step whose matrix is held constant."""
    A, b = problem.dense[found.model], problem.b[found.model]
    residual = torch.tanh(b + torch.einsum("fij,fj->fi", A, found.m)) - found.m
    w = 1 - found.m**2
    jacobian = torch.eye(problem.n, dtype=A.dtype, device=A.device) - w[:, :, None] * A.detach()
    return found.m + torch.linalg.solve(jacobian, residual)


def _corrected(problem: Problem, found: FoundModes, m: Tensor, stability: float) -> Tensor:
    """F(m) - ½ log det(I - W^½ A W^½) for each mode; minus infinity for unstable ones."""
    A, b = problem.dense, problem.b
    parts: list[Tensor] = []
    for block in torch.arange(len(m), device=m.device).split(max(1, _CHUNK // problem.n**2)):
        which, at = found.model[block], m[block]
        if m.requires_grad or A.requires_grad or b.requires_grad:
            one = Problem(A[which], b[which], problem.const[which], None, True, problem.kind)
            energy = free_energy(one, at[:, None, :])[:, 0]
        else:
            energy = found.free_energy[block]
        root = (1 - at**2).clamp_min(1e-300).sqrt()
        inner = root[:, :, None] * A[which] * root[:, None, :]
        eye = torch.eye(problem.n, dtype=A.dtype, device=A.device)
        factor, info = torch.linalg.cholesky_ex(eye - inner.detach())
        pivots = factor.diagonal(dim1=-2, dim2=-1)
        # The least pivot is no less than the least eigenvalue, which must be at least `stability`.
        stable = (info == 0) & (pivots.amin(-1) ** 2 >= stability)
        if inner.requires_grad:
            safe = torch.where(stable[:, None, None], eye - inner, eye)
            pivots = torch.linalg.cholesky_ex(safe).L.diagonal(dim1=-2, dim2=-1)
        log_det = 2 * torch.where(stable[:, None], pivots, torch.ones_like(pivots)).log().sum(-1)
        parts.append(torch.where(stable, energy - 0.5 * log_det, -math.inf))
    return torch.cat(parts)


def _sum_over_modes(problem: Problem, found: FoundModes, log_weight: Tensor) -> Tensor:
    top = log_weight.new_full((problem.models,), -math.inf)
    top = top.scatter_reduce(0, found.model, log_weight.detach(), "amax")
    # No stable mode (at a transition): the best free energy alone.
    none = top == -math.inf
    top = torch.where(none, _best(problem, found), top)
    share = torch.exp(log_weight - top[found.model])
    share = torch.where(log_weight.detach() == -math.inf, torch.zeros_like(share), share)
    total = torch.zeros_like(top).index_add(0, found.model, share)
    return top + torch.where(none, torch.ones_like(total), total).log()


def _unseen(problem: Problem, found: FoundModes, log_weight: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """For each model, the share of the sum in modes that one start alone found, and how many those are."""
    once = found.hits == 1
    share = torch.exp(log_weight - total[found.model])
    empty = problem.b.new_zeros(problem.models)
    return empty.index_add(0, found.model, share * once), empty.index_add(0, found.model, once.to(empty))


def _best(problem: Problem, found: FoundModes) -> Tensor:
    best = found.free_energy.new_full((problem.models,), -math.inf)
    return best.scatter_reduce(0, found.model, found.free_energy, "amax")


def _counts(problem: Problem, found: FoundModes, log_weight: Tensor) -> Tensor:
    counted = (log_weight.detach() > -math.inf).to(torch.float64)
    return torch.zeros(problem.models, dtype=torch.float64, device=counted.device).index_add_(0, found.model, counted)
