"""Certified two-sided bounds of log Z: the best of several, tightened by clamping spins.

Every candidate holds whatever the model: mean field at any point and the sum over any set of states from below; the SDP
with Hölder's inequality, the log-determinant relaxation, weighted mini-buckets and tree-reweighted belief propagation
from above. Summing such bounds over all settings of a few spins bounds log Z again, and tighter.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared_core.errors import InputError
from spectral_mf._inputs import Given, Problem, as_problem, is_a
from spectral_mf.baselines.belief_propagation import trw
from spectral_mf.baselines.mini_bucket import weighted_mini_bucket
from spectral_mf.mode_sum import FoundModes, find_modes
from spectral_mf.rank_one import log_cosh
from spectral_mf.result import Scalar, rounding_slack
from spectral_mf.sdp import augmented, solve_diagonal
from spectral_mf.spectral import log_det_bound, sdp_bounds

__all__ = ["Bounds", "log_partition_bounds", "map_bound", "states_bound"]

_DENSE_LIMIT = 1500
# A model held sparse is made dense for its bounds up to here.
_SPARSE_LIMIT = 400
_MINI_BUCKET_LIMIT = 100
_TRW_LIMIT = 60


@dataclass(frozen=True)
class Bounds:
    """Certified bounds of log Z.

    Attributes
    ----------
    lower, upper : the best ones, floats, arrays (models,) or tensors as the model was
    candidates : every bound by name; those whose name ends in ``(upper)`` are upper bounds
    lower_from, upper_from : names of the best ones (of the first model, for a batch)
    clamped : spins whose settings were summed over
    seconds : wall time
    """

    lower: Scalar
    upper: Scalar
    candidates: dict[str, Scalar]
    lower_from: str
    upper_from: str
    clamped: tuple[int, ...]
    seconds: float


def log_partition_bounds(
    A: Any,
    b: Any = None,
    *,
    clamp: int = 0,
    starts: int = 20,
    generator: torch.Generator | None = None,
) -> Bounds:
    """Bound log Z from both sides; the bounds are certain, not estimates.

    Parameters
    ----------
    A : (n, n) or (models, n, n) symmetric couplings, or (n, n) SciPy sparse
    b : (n,) or (models, n) fields
    clamp : number of spins to fix in all 2^clamp ways (those with the strongest couplings), 0 to 12; each one more
        doubles the work and tightens both bounds
    starts : starts of mean field
    generator : source of the starts; None means one seeded with 0

    Raises
    ------
    InputError
        When `clamp` is out of range.

    Examples
    --------
    >>> import numpy as np
    >>> r = log_partition_bounds(np.array([[0, 1.0], [1.0, 0]]), [0.2, -0.1])
    >>> exact = np.log(sum(np.exp(x * y + 0.2 * x - 0.1 * y) for x in (-1, 1) for y in (-1, 1)))
    >>> bool(r.lower <= exact <= r.upper)
    True
    """
    started = time.perf_counter()
    problem = as_problem(A, b)
    if not is_a(clamp, int) or not 0 <= clamp <= 12:
        raise InputError(f"clamp must be 0 to 12, got {clamp}: 2^clamp models are bounded one by one")
    random = generator or torch.Generator().manual_seed(0)
    spins: tuple[int, ...] = ()
    candidates: dict[str, Tensor] = {}
    if clamp and problem.n > 1:
        spins = _strongest(problem, min(clamp, problem.n - 1))
        for k in range(problem.models):
            part, energy = _clamped(problem.dense[k].detach(), problem.b[k].detach(), spins)
            found = _candidates(part, starts, random)
            # The best of each setting: bounds of different kinds may be mixed.
            low, high = _best(found)
            one = {
                "clamped": torch.logsumexp(energy + low, 0)[None],
                "clamped (upper)": torch.logsumexp(energy + high, 0)[None],
            }
            for name, value in one.items():
                candidates[name] = value if k == 0 else torch.cat([candidates[name], value])
        slack = rounding_slack(problem, candidates["clamped"])
        candidates["clamped"] = candidates["clamped"] - slack
        candidates["clamped (upper)"] = candidates["clamped (upper)"] + slack
    candidates |= _candidates(problem, starts, random)
    const = problem.const.detach()
    low, high = _best(candidates)
    names_low = [name for name in candidates if not name.endswith("(upper)")]
    names_high = [name for name in candidates if name.endswith("(upper)")]
    return Bounds(
        lower=problem.give_back(low + const),
        upper=problem.give_back(high + const),
        candidates={name: problem.give_back(value + const) for name, value in candidates.items()},
        lower_from=max(names_low, key=lambda name: float(candidates[name][0])),
        upper_from=min(names_high, key=lambda name: float(candidates[name][0])),
        clamped=spins,
        seconds=time.perf_counter() - started,
    )


def states_bound(problem: Problem, found: FoundModes) -> Tensor:
    """Lower bound log Σ exp(energy) over the distinct sign patterns of the modes, without the constant.

    Parameters
    ----------
    problem : models as :func:`spectral_mf._inputs.as_problem` returns them
    found : modes of those models

    Returns
    -------
    (models,) tensor
    """
    total = problem.b.new_full((problem.models,), -math.inf)
    for k in range(problem.models):
        x = torch.unique(torch.where(found.m[found.model == k] >= 0, 1.0, -1.0), dim=0).to(problem.b)
        if len(x):
            total[k] = torch.logsumexp(_energies(problem, k, x), 0)
    return total


def map_bound(A: Any, b: Any = None) -> tuple[Scalar, Scalar]:
    """Bound the largest energy max_x ½ xᵀAx + bᵀx from both sides: (energy of a state found, ½ Σ d of the SDP).

    Parameters
    ----------
    A : (n, n) or (models, n, n) symmetric couplings
    b : (n,) or (models, n) fields

    Notes
    -----
    ½ Σ d is the dual of Goemans and Williamson's relaxation (spec 2.4); the state is the best of 200 roundings of its
    solution, improved by single flips.

    Examples
    --------
    >>> low, high = map_bound([[0.0, -1.0, -1.0], [-1.0, 0.0, -1.0], [-1.0, -1.0, 0.0]])
    >>> round(low, 6), round(high, 6)
    (1.0, 1.5)
    """
    problem = as_problem(A, b)
    sdp = solve_diagonal(augmented(problem.dense, problem.b).detach())
    upper = 0.5 * sdp.d.sum(-1)
    random = torch.Generator().manual_seed(0)
    normal = torch.randn((problem.models, sdp.factor.shape[-1], 200), generator=random, dtype=torch.float64)
    side = torch.where(sdp.factor @ normal.to(sdp.factor) >= 0, 1.0, -1.0)
    x = (side[:, :-1] * side[:, -1:]).mT.to(problem.b)
    climbed = [_climb(problem.dense[k].detach(), problem.b[k].detach(), x[k]) for k in range(problem.models)]
    lower = torch.stack([_energies(problem, k, states).max() for k, states in enumerate(climbed)])
    const = problem.const.detach()
    return problem.give_back(lower + const), problem.give_back(upper + rounding_slack(problem, upper) + const)


def _climb(A: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """Flip the spin that gains most, in every state at once, until none gains."""
    for _ in range(10 * len(b)):
        gain = -2 * x * (x @ A + b)
        best = gain.max(1)
        if float(best.values.max()) <= 1e-12:
            break
        rows = (best.values > 1e-12).nonzero().flatten()
        x[rows, best.indices[rows]] *= -1
    return x


def _energies(problem: Problem, k: int, x: Tensor) -> Tensor:
    """Energies of states (states, n) under model k."""
    if problem.A is None:
        matrix: Any = problem.sparse
        pull = torch.from_numpy(np.ascontiguousarray((matrix @ x.numpy().T).T))
    else:
        pull = x @ problem.A[k].detach()
    return 0.5 * (pull * x).sum(1) + x @ problem.b[k].detach()


def _candidates(problem: Problem, starts: int, random: torch.Generator) -> dict[str, Tensor]:
    """Bounds by name, (models,) each, without the models' constants, rounding taken care of."""
    n, device = problem.n, problem.b.device
    begin = 2 * torch.rand((problem.models, max(1, starts - 1), n), generator=random, dtype=torch.float64) - 1
    begin = torch.cat([torch.zeros(problem.models, 1, n, dtype=torch.float64), begin], 1).to(device)
    found = find_modes(problem, begin)
    field = torch.full((problem.models,), -math.inf, dtype=torch.float64, device=device)
    field = field.scatter_reduce(0, found.model, found.free_energy, "amax")
    states = states_bound(problem, found)
    result = {
        "mean field": field - rounding_slack(problem, field),
        "states": states - rounding_slack(problem, states),
    }
    const = problem.const.detach()
    if n <= (_SPARSE_LIMIT if problem.A is None else _DENSE_LIMIT):
        result["log-determinant (upper)"] = log_det_bound(Given(problem)) - const
        for name, tilt in (("sdp", False), ("sdp with fields apart", True)):
            low, high = sdp_bounds(Given(problem), tilt=tilt)
            if tilt:
                result["jensen"] = low - const
            result[f"{name} (upper)"] = high - const
    else:
        matrix: Any = problem.sparse if problem.A is None else None
        # Feasible, and so a bound, after any number of sweeps; twenty leave less than 1 %.
        held = matrix if matrix is not None else problem.dense.detach()
        diagonal = solve_diagonal(held, method="mixing", max_iterations=20)
        crude = n * math.log(2) + log_cosh(problem.b.detach()).sum(-1) + 0.5 * diagonal.d.sum(-1)
        result["sdp (upper)"] = crude + rounding_slack(problem, crude)
    edges = len(problem.edges.i)
    if n <= _MINI_BUCKET_LIMIT or edges <= 4 * n <= 40_000:
        result["mini-buckets (upper)"] = _as_tensor(weighted_mini_bucket(Given(problem)).upper, problem) - const
    if n <= _TRW_LIMIT or edges <= 4 * n <= 8_000:
        result["trees (upper)"] = _as_tensor(trw(Given(problem), iterations=300, tol=1e-6).upper, problem) - const
    return result


def _as_tensor(value: Scalar, problem: Problem) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64, device=problem.b.device).reshape(problem.models)


def _best(candidates: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    lows = [value for name, value in candidates.items() if not name.endswith("(upper)")]
    highs = [value for name, value in candidates.items() if name.endswith("(upper)")]
    return torch.stack(lows).amax(0), torch.stack(highs).amin(0)


def _strongest(problem: Problem, count: int) -> tuple[int, ...]:
    edges = problem.edges
    pull = problem.b.new_zeros(problem.n)
    size = edges.weight.detach().abs().sum(0)
    pull.index_add_(0, edges.i, size).index_add_(0, edges.j, size)
    return tuple(sorted(pull.argsort(descending=True)[:count].tolist()))


def _clamped(A: Tensor, b: Tensor, spins: tuple[int, ...]) -> tuple[Problem, Tensor]:
    """Return the 2^k models that remain when the spins are fixed, and the energy among the fixed ones."""
    n, k = len(b), len(spins)
    fixed = torch.tensor(spins, device=b.device)
    free = torch.tensor([i for i in range(n) if i not in set(spins)], device=b.device)
    x = (2 * ((torch.arange(2**k, device=b.device)[:, None] >> torch.arange(k, device=b.device)) & 1) - 1).to(b)
    energy = 0.5 * ((x @ A[fixed][:, fixed]) * x).sum(1) + x @ b[fixed]
    rest = A[free][:, free].expand(2**k, n - k, n - k).contiguous()
    fields = b[free] + x @ A[fixed][:, free]
    return Problem(rest, fields, torch.zeros_like(energy), None, True, "torch"), energy
