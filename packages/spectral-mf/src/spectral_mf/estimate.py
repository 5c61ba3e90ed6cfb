"""One call for every method: :func:`log_partition` chooses, predicts the cost, and says when estimators disagree."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from shared_core.errors import InputError, no_such
from spectral_mf._inputs import Convention, Given, Problem, Scalar, as_problem, is_a, to_numpy
from spectral_mf.baselines.ais import Annealed, Base, anneal
from spectral_mf.baselines.ais import ais as _ais
from spectral_mf.baselines.belief_propagation import belief_propagation, trw
from spectral_mf.baselines.exact import (
    exact_elimination,
    exact_enumeration,
    exact_rbm,
    exact_transfer,
    structure,
)
from spectral_mf.baselines.mini_bucket import mini_bucket, weighted_mini_bucket
from spectral_mf.baselines.sdp_rounding import sdp_rounding
from spectral_mf.bounds import log_partition_bounds
from spectral_mf.low_rank import low_rank, low_rank_factors, low_rank_work
from spectral_mf.mode_sum import FoundModes, modes, search_modes
from spectral_mf.rank_one import log_cosh
from spectral_mf.result import LogPartition, rounding_slack
from spectral_mf.spectral import gaussian, spectral_mean_field
from spectral_mf.variational import mean_field

__all__ = ["METHODS", "Plan", "compare", "log_partition", "pair_curvature", "plan"]


def _tap(A: Any, b: Any = None) -> LogPartition:
    return gaussian(A, b, diagonal="tap")


def _tilted(A: Any, b: Any = None, **options: Any) -> LogPartition:
    return spectral_mean_field(A, b, tilt=True, **options)


METHODS: Mapping[str, Callable[..., LogPartition]] = MappingProxyType(
    {
        "exact_enumeration": exact_enumeration,
        "exact_transfer": exact_transfer,
        "exact_rbm": exact_rbm,
        "exact_elimination": exact_elimination,
        "low_rank": low_rank,
        "spectral": spectral_mean_field,
        "spectral-tilted": _tilted,
        "gaussian": gaussian,
        "tap": _tap,
        "modes": modes,
        "ais": _ais,
        "mean_field": mean_field,
        "belief_propagation": belief_propagation,
        "trw": trw,
        "mini_bucket": mini_bucket,
        "weighted_mini_bucket": weighted_mini_bucket,
        "sdp_rounding": sdp_rounding,
    }
)
"""Every method by name, each a function ``(A, b, **options) -> LogPartition``."""

_EXACT = ("exact_enumeration", "exact_transfer", "exact_rbm", "exact_elimination")
# Exact methods that follow the graph: their gradient stops at its edges.
_BY_EDGES = ("exact_transfer", "exact_rbm", "exact_elimination")
# Beside the grid of a full-size run, what a laptop gives without a thought.
_MAX_BYTES = 4e9
_OPERATIONS_A_SECOND = 3e8
_DISAGREEMENT = 1.0
# Evaluations that exact quadrature may take: seconds.
_LOW_RANK_WORK = 1e9


@dataclass(frozen=True)
class Plan:
    """What a call will do, before it does it.

    Attributes
    ----------
    method : name in :data:`METHODS`, or ``auto`` where estimators are combined
    reason : why, in a sentence
    seconds, bytes : predicted cost, right to a small factor
    exact : whether the value will be exact
    """

    method: str
    reason: str
    seconds: float
    bytes: float
    exact: bool


def plan(A: Any, b: Any = None, *, method: str = "auto", budget_s: float = 30.0) -> Plan:
    """Predict what :func:`log_partition` will do and cost, without doing it.

    Parameters
    ----------
    A : (n, n) or (models, n, n) symmetric couplings, or (n, n) SciPy sparse
    b : (n,) or (models, n) fields
    method : ``auto`` or a name in :data:`METHODS`
    budget_s : seconds ``auto`` may spend

    Examples
    --------
    >>> import numpy as np
    >>> plan(np.eye(40, k=1) + np.eye(40, k=-1)).method
    'exact_transfer'
    """
    return _plan(as_problem(A, b), method, budget_s)


def log_partition(
    A: Any,
    b: Any = None,
    *,
    method: str = "auto",
    bounds: bool | None = None,
    budget_s: float = 30.0,
    max_bytes: float = _MAX_BYTES,
    convention: Convention = "half",
    symmetrize: bool = False,
    generator: torch.Generator | None = None,
    **options: Any,
) -> LogPartition:
    """Compute or estimate log Z = log Σ_x exp(½ xᵀAx + bᵀx), with bounds that are certain.

    Parameters
    ----------
    A : (n, n) or (models, n, n) symmetric couplings: NumPy, torch (differentiable where the method is), (n, n) SciPy
        sparse, or an :class:`Ising`. Each pair counts once.
    b : (n,) or (models, n) fields
    method : ``auto``, or a name in :data:`METHODS`. ``auto`` is exact where that is cheap: up to 25 spins, a grid up to
        20 wide, a bipartite model with up to 20 spins on one side, induced width up to 22, couplings of rank up to 2
        (but for the diagonal). Else annealed importance sampling, from the uniform law and from the modes, as long as
        the budget lasts, beside ``modes``; where gradients are wanted, ``modes``.
    bounds : attach certified bounds and clip the value into them; None: with ``auto`` only. A method's own bounds are
        always there.
    budget_s : seconds ``auto`` may spend on sampling
    max_bytes : refuse a method predicted to need more memory
    convention : ``half`` or ``full`` (energy xᵀAx + bᵀx)
    symmetrize : average A with its transpose in place of refusing an asymmetric one
    generator : source of randomness; None means one seeded with 0
    options : passed on to the method

    Returns
    -------
    LogPartition with ``value``, ``lower``, ``upper``, ``std_error``, ``warnings`` and ``diagnostics``. float32 tensors
    are computed, and returned, in float64.

    Raises
    ------
    InputError
        For a model that is not one, an unknown method or option, or where memory would not do.

    Examples
    --------
    >>> import numpy as np
    >>> r = log_partition([[0.0, 0.7], [0.7, 0.0]], [0.3, -0.4])
    >>> round(r.value, 9), r.method
    (1.66662259, 'exact_enumeration')
    """
    started = time.perf_counter()
    problem = as_problem(A, b, convention=convention, symmetrize=symmetrize)
    if not is_a(budget_s, int, float) or not 0 < budget_s < math.inf:
        raise InputError(f"budget_s must be a positive number of seconds, got {budget_s!r}")
    if generator is not None and not is_a(generator, torch.Generator):
        raise InputError("generator must be a torch.Generator; pass torch.Generator().manual_seed(seed)")
    chosen = _plan(problem, method, budget_s)
    if chosen.bytes > max_bytes:
        raise InputError(
            f"{chosen.method} on {problem.models} model(s) of {problem.n} spins is predicted to need"
            f" {chosen.bytes / 1e9:.3g} GB, above max_bytes = {max_bytes / 1e9:.3g} GB;"
            " choose another method or raise it"
        )
    handed = Given(problem)
    # The gradient of a coupling between two parts that do not interact would be lost.
    whole = problem.A is not None and problem.A.requires_grad
    parts = _components(problem) if chosen.method == "auto" and not options and not whole else []
    if len(parts) > 1:
        result = _by_components(problem, parts, bounds, budget_s, max_bytes, generator)
        return result.with_(seconds=time.perf_counter() - started)
    if chosen.method == "auto":
        if options:
            raise InputError(f"options {sorted(options)} belong to a method: name it with method=")
        result = _combined(problem, handed, budget_s, generator)
    else:
        result = _call(chosen.method, handed, generator, options)
        if chosen.method in _BY_EDGES and problem.A is not None and problem.A.requires_grad and torch.is_grad_enabled():
            result = _with_all_pairs(problem, chosen.method, result)
    if (bounds or (bounds is None and method == "auto")) and not chosen.exact:
        result = _bounded(problem, result, generator)
    elif method == "auto" and chosen.exact:
        result = result.with_(diagnostics={"plan": chosen.reason, **result.diagnostics})
    return result.with_(seconds=time.perf_counter() - started)


def _components(problem: Problem) -> list[Tensor]:
    """Spins of each part of the graph that does not interact with the others."""
    edges = problem.edges
    i, j = edges.i.cpu().numpy(), edges.j.cpu().numpy()
    graph = sparse.coo_array((np.ones(len(i)), (i, j)), shape=(problem.n, problem.n))
    count, label = connected_components(graph, directed=False)
    if count == 1:
        return []
    order = np.argsort(label, kind="stable")
    return [torch.from_numpy(part) for part in np.split(order, np.cumsum(np.bincount(label))[:-1])]


def _by_components(
    problem: Problem,
    parts: list[Tensor],
    bounds: bool | None,
    budget_s: float,
    max_bytes: float,
    generator: torch.Generator | None,
) -> LogPartition:
    """Add up what the parts of a disconnected model give; spins alone go in closed form."""
    alone = torch.cat([part for part in parts if len(part) == 1] or [torch.zeros(0, dtype=torch.long)])
    joined = [part for part in parts if len(part) > 1]
    b = problem.b
    # One source for all parts: with the same seed each, equal parts would err alike.
    random = generator or torch.Generator().manual_seed(0)
    free = (log_cosh(b[:, alone]) + math.log(2)).sum(-1)
    value, lower, upper, variance = free, free.detach(), free.detach(), torch.zeros_like(free.detach())
    means = torch.tanh(b.detach())
    estimated = 0
    warnings: list[str] = []
    for part in joined:
        if problem.A is None:
            held: Any = problem.sparse
            rows = part.numpy()
            piece = Problem(None, b[:, part], torch.zeros_like(free), held[rows][:, rows], False, "torch")
        else:
            piece = Problem(problem.A[:, part][:, :, part], b[:, part], torch.zeros_like(free), None, True, "torch")
        found = log_partition(
            Given(piece), bounds=bounds, budget_s=budget_s / len(joined), max_bytes=max_bytes, generator=random
        )
        value = value + torch.as_tensor(found.value).reshape(-1)
        lower = lower + torch.as_tensor(found.lower).reshape(-1)
        upper = upper + torch.as_tensor(found.upper).reshape(-1)
        warnings += found.warnings
        if found.std_error is not None:
            estimated += 1
            variance = variance + torch.as_tensor(found.std_error).reshape(-1) ** 2
            means[:, part] = torch.as_tensor(found.marginals).reshape(problem.models, -1)
        else:
            means[:, part] = _exact_means(piece)
    slack = rounding_slack(problem, value)
    return LogPartition.of(
        problem,
        "auto" if estimated else "exact_by_parts",
        value,
        lower=lower - slack,
        upper=upper + slack,
        std_error=variance.sqrt() if estimated else None,
        marginals=means,
        diagnostics={
            "plan": f"{len(parts)} parts that do not interact, {len(joined) - estimated + len(alone)} of them exact"
        },
        warnings=tuple(dict.fromkeys(warnings)),
    )


def _exact_means(piece: Problem) -> Tensor:
    """Differentiate an exact log Z in the fields."""
    fields = piece.b.detach().clone().requires_grad_()
    couplings = None if piece.A is None else piece.A.detach()
    with torch.enable_grad():
        value = log_partition(Given(Problem(couplings, fields, piece.const, piece.sparse, True, "torch"))).value
        return torch.autograd.grad(torch.as_tensor(value).sum(), fields)[0]


def compare(
    A: Any,
    b: Any = None,
    *,
    methods: tuple[str, ...] | list[str] | None = None,
    generator: torch.Generator | None = None,
    max_bytes: float = _MAX_BYTES,
) -> dict[str, LogPartition | InputError]:
    """Run many methods on one model.

    Parameters
    ----------
    A : (n, n) symmetric couplings, or anything :func:`log_partition` takes
    b : (n,) fields
    methods : names in :data:`METHODS`; None: all
    generator : source of randomness; None means one seeded with 0
    max_bytes : methods predicted to need more are not run

    Returns
    -------
    Results by method, in the order asked; where a method does not apply, the error that says why.

    Examples
    --------
    >>> found = compare([[0.0, 0.7], [0.7, 0.0]], [0.3, -0.4], methods=["exact_enumeration", "belief_propagation"])
    >>> [round(r.value, 6) for r in found.values()]
    [1.666623, 1.666623]
    """
    problem = as_problem(A, b)
    found: dict[str, LogPartition | InputError] = {}
    for name in methods or METHODS:
        started = time.perf_counter()
        try:
            result = log_partition(Given(problem), method=name, generator=generator, max_bytes=max_bytes)
            found[name] = result.with_(seconds=time.perf_counter() - started)
        except InputError as error:
            if name not in METHODS:
                raise
            found[name] = error
    return found


def pair_curvature(A: Tensor, b: Tensor, method: str) -> tuple[Tensor, Tensor]:
    """Means and all second moments by differentiating log Z twice in the fields.

    Parameters
    ----------
    A : (models, n, n) couplings
    b : (models, n) fields
    method : an exact method, differentiable twice in b

    Returns
    -------
    (models, n) means and (models, n, n) moments E[x_i x_j]
    """
    couplings, fields = A.detach(), b.detach().clone().requires_grad_()
    with torch.enable_grad():
        value = torch.as_tensor(METHODS[method](couplings, fields).value).sum()
        (mean,) = torch.autograd.grad(value, fields, create_graph=True)
        rows = [torch.autograd.grad(mean[:, i].sum(), fields, retain_graph=True)[0] for i in range(b.shape[1])]
    mean = mean.detach()
    return mean, torch.stack(rows, 1) + mean[:, :, None] * mean[:, None, :]


def _with_all_pairs(problem: Problem, method: str, result: LogPartition) -> LogPartition:
    """Give the same value the whole gradient, that of pairs without a coupling included."""
    A, b = problem.dense, problem.b
    mean, pairs = pair_curvature(A, b, method)
    off = pairs - torch.diag_embed(pairs.diagonal(dim1=-2, dim2=-1))
    moves = 0.5 * (off * (A - A.detach())).sum((-1, -2)) + (mean * (b - b.detach())).sum(-1)
    moves = moves + problem.const - problem.const.detach()
    value = torch.as_tensor(result.value).detach()
    return result.with_(value=value + (moves if problem.batched else moves[0]))


def _call(name: str, given: Given, generator: torch.Generator | None, options: Mapping[str, Any]) -> LogPartition:
    function = METHODS[name]
    known = inspect.signature(function).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in known.values())
    if not open_ended and (unknown := sorted(set(options) - set(known))):
        raise no_such("option", unknown[0], list(known)[2:], where=name)
    more = {"generator": generator} if generator is not None and "generator" in known else {}
    return function(given, **more, **options)


def _plan(problem: Problem, method: str, budget_s: float) -> Plan:
    if method == "auto":
        return _choose(problem, budget_s)
    if method not in METHODS:
        raise no_such("method", method, ("auto", *METHODS))
    seconds, size = _cost(problem, method)
    return Plan(method, "asked for", seconds, size, method in _EXACT)


def _choose(problem: Problem, budget_s: float) -> Plan:
    found = structure(problem)
    names = {"exact_enumeration": found.enumeration if found.n <= 25 else None, "exact_transfer": None}
    if found.transfer is not None and found.grid is not None and min(found.grid) <= 20:
        names["exact_transfer"] = found.transfer
    names["exact_rbm"] = found.rbm if found.rbm is not None and found.rbm.size <= 20 else None
    small = found.elimination is not None and found.induced_width is not None and found.induced_width <= 22
    names["exact_elimination"] = found.elimination if small else None
    usable = {
        name: cost
        for name, cost in names.items()
        if cost is not None
        and cost.bytes <= _MAX_BYTES
        and problem.models * cost.operations / _OPERATIONS_A_SECOND <= max(10.0, 4 * budget_s)
    }
    if usable:
        # Enumeration knows the derivative for pairs that do not interact, too.
        small = found.n <= 20 or (found.n <= 25 and problem.A is not None and problem.A.requires_grad)
        few = "exact_enumeration" in usable and small
        name = "exact_enumeration" if few else min(usable, key=lambda key: usable[key].operations)
        cost = usable[name]
        why = {
            "exact_enumeration": f"{found.n} spins have few enough states to add up",
            "exact_transfer": f"a grid of {found.grid}",
            "exact_rbm": f"bipartite with {cost.size} spins to enumerate",
            "exact_elimination": f"induced width {found.induced_width}",
        }[name]
        return Plan(name, why, problem.models * cost.operations / _OPERATIONS_A_SECOND, cost.bytes, True)
    if problem.A is not None and problem.n <= 5000 and problem.models <= 1000:
        for rank in (1, 2):
            work = [_low_rank_work(problem.dense[k].detach(), rank) for k in range(problem.models)]
            if all(w is not None for w in work) and (total := float(sum(w or 0.0 for w in work))) <= _LOW_RANK_WORK:
                why = f"couplings of rank {rank} but for the diagonal"
                return Plan("low_rank", why, 1e-3 + 5e-9 * total, 1e8 + 24.0 * problem.n**2, True)
    return Plan(
        "auto", "no exact method is affordable: sampling beside modes", budget_s, _cost(problem, "ais")[1], False
    )


def _low_rank_work(A: Tensor, rank: int) -> float | None:
    """Predict the evaluations that quadrature would take; None where the couplings are not of this rank."""
    # A glance first, which nearly always says no.
    if _clearly_full(A, rank):
        return None
    lam, v, left = low_rank_factors(A, rank, iterations=20)
    return low_rank_work(v, lam) if left <= 1e-10 * float(A.abs().sum()) else None


def _clearly_full(A: Tensor, rank: int) -> bool:
    """Whether the couplings between two halves of the spins, which no diagonal touches, have a higher rank."""
    n = len(A)
    if n < 2 * (rank + 1):
        return False
    random = torch.Generator().manual_seed(0)
    order = torch.randperm(n, generator=random).to(A.device)
    block = A[order[: n // 2]][:, order[n // 2 :]]
    sketch = torch.randn(rank + 4, len(block), generator=random, dtype=torch.float64).to(A) @ block
    values = torch.linalg.svdvals(sketch)
    return len(values) > rank and bool(values[rank] > 1e-8 * values[0].clamp_min(1e-300))


def _cost(problem: Problem, method: str) -> tuple[float, float]:
    """Predicted (seconds, bytes) of a method, right to a small factor."""
    n, models, edges = float(problem.n), problem.models, len(problem.edges.i)
    dense = 8.0 * models * n * n
    if method in _EXACT:
        found = structure(problem)
        cost = {
            "exact_enumeration": found.enumeration,
            "exact_transfer": found.transfer,
            "exact_rbm": found.rbm,
            "exact_elimination": found.elimination,
        }[method]
        # Those that do not apply say so themselves.
        return (0.0, 0.0) if cost is None else (models * cost.operations / _OPERATIONS_A_SECOND, cost.bytes)
    match method:
        case "spectral" | "spectral-tilted" | "gaussian" | "tap" | "sdp_rounding" | "low_rank":
            return models * (2e-3 + 1.2e-8 * n**3), 12 * dense
        case "modes":
            return models * (5e-3 + 4e-7 * n**2 + 1e-8 * n**3), 6 * dense + 8 * models * 80 * n
        case "ais":
            held = 12.0 * edges if problem.A is None else dense
            return models * (2e-4 * n + 5e-5 * min(n * n, 2.0 * edges)), held + 32 * models * 500 * n
        case "mini_bucket" | "weighted_mini_bucket":
            return models * 1e-3 * n, 8.0 * models * 2**12 * n
        case "belief_propagation" | "trw":
            held = 100.0 * edges if problem.A is None else 8 * dense
            if method == "trw" and problem.A is None:
                held += 8 * n * n
            return models * 1e-5 * edges, held
        case _:
            return models * 1e-6 * edges, dense if problem.A is not None else 100.0 * edges


def _combined(problem: Problem, given: Given, budget_s: float, generator: torch.Generator | None) -> LogPartition:
    """AIS from two starting points as long as the budget lasts, and modes, as opinions of each other."""
    random = generator or torch.Generator().manual_seed(0)
    small = problem.A is not None and problem.n <= 1500
    warnings: list[str] = []
    opinions: dict[str, Scalar] = {}
    found: FoundModes | None = None
    if small:
        found = search_modes(problem, random)
        by_modes = modes(given, known=found)
        opinions["modes"] = by_modes.value
        if problem.dense.requires_grad or problem.b.requires_grad:
            return by_modes.with_(diagnostics={"plan": "gradients are wanted: modes", **by_modes.diagnostics})
    else:
        by_messages = belief_propagation(given, iterations=500, tol=1e-8)
        if bool(np.all(to_numpy(by_messages.diagnostics["converged"]))):
            opinions["belief propagation"] = by_messages.value
    runs: dict[str, Annealed] = {}
    bases: tuple[Base, ...] = ("uniform", "modes") if small and problem.models * problem.n <= 2000 else ("uniform",)
    for base in bases:
        runs[base] = _within_budget(problem, base, budget_s / len(bases), random, found)
        opinions[f"ais from {base}"] = problem.give_back(runs[base].log_z + problem.const)
    # Both are unbiased for Z, and so is their mean; weights by the errors would not be.
    log_z = torch.logsumexp(torch.stack([run.log_z for run in runs.values()]), 0) - math.log(len(runs))
    shares = torch.softmax(torch.stack([run.log_z for run in runs.values()]), 0)
    errors = torch.stack([run.std_error for run in runs.values()])
    error = (shares * errors).square().sum(0).sqrt()
    means = sum(
        (share[:, None] * run.means for share, run in zip(shares, runs.values(), strict=True)), start=0 * problem.b
    )
    spread = _spread([np.atleast_1d(to_numpy(value)) for value in opinions.values()])
    doubtful = spread > np.maximum(_DISAGREEMENT, 3 * to_numpy(error))
    if doubtful.any():
        told = ", ".join(
            f"{name} {float(np.atleast_1d(to_numpy(value))[doubtful.argmax()]):.2f}" for name, value in opinions.items()
        )
        which = f" for model {int(doubtful.argmax())}" if problem.batched else ""
        warnings.append(f"independent estimators disagree by {float(spread.max()):.2f} nats{which}: {told}")
    weak = float(torch.stack([run.effective_size for run in runs.values()]).amax(0).min())
    if weak < 10:
        warnings.append(f"the best sampler has only {weak:.1f} effective chains: raise budget_s")
    return LogPartition.of(
        problem,
        "auto",
        log_z.detach(),
        std_error=error,
        marginals=means,
        diagnostics={
            "plan": "no exact method is affordable: sampling beside modes",
            "opinions": opinions,
            "effective_chains": {name: problem.give_back(run.effective_size) for name, run in runs.items()},
            "levels": {name: run.levels for name, run in runs.items()},
        },
        warnings=tuple(warnings),
    )


def _within_budget(
    problem: Problem, base: Base, seconds: float, random: torch.Generator, found: FoundModes | None
) -> Annealed:
    """Double the levels until the error is small, or the next round would not fit into the time."""
    levels, spent = 50, 0.0
    while True:
        began = time.perf_counter()
        run = anneal(problem, levels=levels, chains=500, base=base, generator=random, found=found)
        took = time.perf_counter() - began
        spent += took
        if float(run.std_error.max()) < 0.02 or spent + 2.2 * took > seconds or levels >= 12_800:
            return run
        # Where there is time for much more, the rounds between would only be thrown away.
        factor = 2 if spent + 10 * took > seconds else 4
        levels *= factor


def _spread(values: list[np.ndarray]) -> np.ndarray:
    stacked = np.stack(values)
    return stacked.max(0) - stacked.min(0)


def _bounded(problem: Problem, result: LogPartition, generator: torch.Generator | None) -> LogPartition:
    found = log_partition_bounds(Given(problem), generator=generator)
    low, high = _larger(result.lower, found.lower), _smaller(result.upper, found.upper)
    clipped = _smaller(_larger(result.value, low), high)
    moved = bool(np.any(to_numpy(clipped) != to_numpy(result.value)))
    warnings = result.warnings
    if moved:
        warnings = (*warnings, "the estimate lay outside the certified bounds and was moved to the nearer one")
    return result.with_(
        value=clipped,
        lower=low,
        upper=high,
        warnings=warnings,
        diagnostics={**result.diagnostics, "bounds": {"lower": found.lower_from, "upper": found.upper_from}},
    )


def _larger(a: Any, b: Any) -> Any:
    return torch.maximum(a, b) if isinstance(a, Tensor) else np.maximum(a, b) if np.ndim(a) else max(a, b)


def _smaller(a: Any, b: Any) -> Any:
    return torch.minimum(a, b) if isinstance(a, Tensor) else np.minimum(a, b) if np.ndim(a) else min(a, b)
