"""SDP rounding with importance sampling (Pabbaraju, Wang, Kolter, NeurIPS 2020), the binary case."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor

from shared_core.errors import InputError
from spectral_mf._inputs import as_problem
from spectral_mf.result import LogPartition, rounding_slack
from spectral_mf.sdp import augmented, solve_diagonal

__all__ = ["sdp_rounding"]


def sdp_rounding(
    A: Any, b: Any = None, *, roundings: int = 500, generator: torch.Generator | None = None
) -> LogPartition:
    """Estimate Z by the exact weights of states rounded from the SDP, plus uniform draws for all other states.

    Parameters
    ----------
    A : (n, n) or (models, n, n) symmetric couplings
    b : (n,) or (models, n) fields
    roundings : hyperplanes drawn, and as many uniform states
    generator : source of randomness; None means one seeded with 0

    Returns
    -------
    The estimate with, as certified lower bound, the sum over the distinct rounded states, and the best energy among
    them in ``diagnostics``. The upper bound is the SDP's, n log 2 + ½ Σ d. The mean of exp(value) is Z.

    Examples
    --------
    >>> r = sdp_rounding([[0.0, 3.0], [3.0, 0.0]])
    >>> round(r.diagnostics["best_energy"], 6)
    3.0
    """
    started = time.perf_counter()
    if roundings < 2:
        raise InputError(f"roundings must be at least 2, got {roundings}")
    problem = as_problem(A, b)
    random = generator or torch.Generator().manual_seed(0)
    couplings, fields = problem.dense.detach(), problem.b.detach()
    sdp = solve_diagonal(augmented(couplings, fields), tol=1e-6)
    n, models = problem.n, problem.models
    size = (models, sdp.factor.shape[-1], roundings)
    normal = torch.randn(size, generator=random, dtype=torch.float64, device=random.device).to(couplings)
    side = torch.where(sdp.factor @ normal >= 0, 1.0, -1.0)
    states = (side[:, :-1] * side[:, -1:]).mT.to(couplings)
    coin = torch.rand((models, roundings, n), generator=random, dtype=torch.float64, device=random.device)
    others = torch.where(coin < 0.5, -1.0, 1.0).to(couplings)

    def energy(x: Tensor) -> Tensor:
        return 0.5 * ((x @ couplings) * x).sum(-1) + (x @ fields[:, :, None])[..., 0]

    values: list[Tensor] = []
    lowers: list[Tensor] = []
    distinct: list[int] = []
    energies = energy(states)
    other_energies = energy(others)
    for k in range(models):
        rows, first = _first_of_equal(states[k])
        seen = energies[k][first]
        known = torch.logsumexp(seen, 0)
        # A uniform draw that was rounded too counts nothing: the complement alone is sampled.
        both = torch.cat([rows, others[k]])
        _, where = torch.unique(both, dim=0, return_inverse=True)
        repeated = torch.isin(where[len(rows) :], where[: len(rows)])
        rest = torch.where(repeated, -math.inf, other_energies[k])
        rest_log = n * math.log(2) - math.log(roundings) + torch.logsumexp(rest, 0)
        values.append(torch.logaddexp(known, rest_log))
        lowers.append(known)
        distinct.append(len(rows))
    value, lower = torch.stack(values), torch.stack(lowers)
    upper = n * math.log(2) + 0.5 * sdp.d.sum(-1)
    return LogPartition.of(
        problem,
        "sdp_rounding",
        value,
        lower=lower - rounding_slack(problem, lower),
        upper=upper + rounding_slack(problem, upper),
        diagnostics={
            "distinct": distinct if problem.batched else distinct[0],
            "best_energy": problem.give_back(energies.amax(-1) + problem.const.detach()),
        },
        seconds=time.perf_counter() - started,
    )


def _first_of_equal(states: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct rows, and the index of the first of each."""
    rows, where = torch.unique(states, dim=0, return_inverse=True)
    first = torch.full((len(rows),), len(states), device=states.device)
    first.scatter_reduce_(0, where, torch.arange(len(states), device=states.device), "amin")
    return rows, first
