"""Means, pair moments and samples of a model: exactly where that is affordable, else by the method asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared_core.errors import InputError, no_such
from spectral_mf._inputs import Given, Problem, as_problem, is_a
from spectral_mf.baselines.ais import anneal, gibbs
from spectral_mf.baselines.exact import exact_sample, structure
from spectral_mf.estimate import METHODS, log_partition, pair_curvature, plan
from spectral_mf.spectral import spectral_mean_field

__all__ = ["marginals", "pair_moments", "sample"]

_BY_GRADIENT = ("exact_enumeration", "exact_transfer", "exact_rbm", "exact_elimination", "low_rank", "modes", "tap")
_BY_BELIEF = ("ais", "mean_field", "belief_propagation", "trw")


def marginals(
    A: Any, b: Any = None, *, method: str = "auto", generator: torch.Generator | None = None, **options: Any
) -> Any:
    """Means E[x_i].

    Parameters
    ----------
    A : (n, n) or (models, n, n) symmetric couplings, or anything :func:`spectral_mf.log_partition` takes
    b : (n,) or (models, n) fields
    method : ``auto`` (exact where affordable, else annealed importance sampling), ``exact``, ``clamp`` (the spectral
        estimate of each spin up against down: 2 n models of n - 1 spins), or any of exact_*, low_rank, modes, tap
        (these by differentiating log Z), ais, mean_field, belief_propagation, trw (these by their own beliefs)
    generator : source of randomness; None means one seeded with 0
    options : passed on to the method

    Returns
    -------
    (n,) or (models, n), as the model was given

    Raises
    ------
    InputError
        Where the method gives no marginals, or ``exact`` is not affordable.

    Notes
    -----
    The paper gives no marginals; spec 2.10.

    Examples
    --------
    >>> marginals([[0.0, 0.7], [0.7, 0.0]], [0.3, -0.4]).round(6)
    array([ 0.066106, -0.218506])
    """
    problem = as_problem(A, b)
    if method == "clamp":
        return problem.give_back(_clamped(problem, options))
    name = _resolve(problem, method)
    if name in _BY_GRADIENT:
        _, db = _gradients(problem, name, generator, options, pairs=False)
        return problem.give_back(db)
    result = log_partition(Given(problem), method=name, generator=generator, bounds=False, **options)
    if result.marginals is None:
        raise InputError(
            f"'{method}' gives no marginals; choose auto, exact, clamp, {', '.join(_BY_GRADIENT + _BY_BELIEF)}"
        )
    return result.marginals


def pair_moments(
    A: Any, b: Any = None, *, method: str = "auto", generator: torch.Generator | None = None, **options: Any
) -> Any:
    """Second moments E[x_i x_j], of all pairs; the diagonal is 1.

    Parameters
    ----------
    A : (n, n) or (models, n, n) symmetric couplings
    b : (n,) or (models, n) fields
    method : ``auto``, ``exact``, one of exact_*, low_rank, modes, tap (∂ log Z / ∂A_ij), or ais
    generator : source of randomness; None means one seeded with 0
    options : passed on to the method

    Returns
    -------
    (n, n) or (models, n, n), as the model was given

    Examples
    --------
    >>> float(pair_moments([[0.0, 0.7], [0.7, 0.0]])[0, 1].round(6)) == round(float(np.tanh(0.7)), 6)
    True
    """
    problem = as_problem(A, b)
    name = _resolve(problem, method)
    if name == "auto":
        name = "ais"
    if name in ("exact_transfer", "exact_rbm", "exact_elimination"):
        # Their gradient knows only pairs that interact; the curvature in the fields knows all.
        _, moments = pair_curvature(problem.dense, problem.b, name)
    elif name in _BY_GRADIENT:
        dA, _ = _gradients(problem, name, generator, options, pairs=True)
        moments = dA + dA.mT
    elif name == "ais":
        found = anneal(problem, generator=generator, **options)
        moments = torch.einsum("mic,mc,mjc->mij", found.states, found.weight, found.states)
    else:
        raise InputError(f"'{method}' gives no pair moments; choose auto, exact, ais, {', '.join(_BY_GRADIENT)}")
    eye = torch.eye(problem.n, dtype=torch.bool, device=moments.device)
    return problem.give_back(torch.where(eye, torch.ones_like(moments), moments))


def sample(
    A: Any, b: Any = None, k: int = 1, *, generator: torch.Generator | None = None, levels: int = 200, sweeps: int = 50
) -> Any:
    """Draw states.

    Parameters
    ----------
    A : (n, n) or (models, n, n) symmetric couplings
    b : (n,) or (models, n) fields
    k : number of states
    generator : source of randomness; None means one seeded with 0
    levels, sweeps : of annealing and of Gibbs sampling after it, where exact sampling is not affordable

    Returns
    -------
    (k, n) or (models, k, n) of -1 and 1. Independent and exact up to 25 spins, and for bipartite models with up to 20
    spins on one side; else annealed chains, resampled by their weights and swept on: approximate.

    Examples
    --------
    >>> sample([[0.0, 9.0], [9.0, 0.0]], k=3).prod(axis=1)
    array([1., 1., 1.])
    """
    problem = as_problem(A, b)
    if not is_a(k, int) or k < 1:
        raise InputError(f"k must be an integer of at least 1, got {k}")
    random = generator or torch.Generator().manual_seed(0)
    if problem.n <= 25:
        return exact_sample(Given(problem), k=k, generator=random)
    found = structure(problem)
    if found.sides is not None and found.sides[0] <= 20 and problem.models == 1:
        return problem.give_back(_bipartite(problem, k, random)[None])
    chains = max(k, 500)
    run = anneal(problem, levels=levels, chains=chains, generator=random)
    states: list[Tensor] = []
    for model in range(problem.models):
        # Systematic resampling: a state of weight w comes ⌊k w⌋ or ⌈k w⌉ times.
        start = torch.rand((), generator=random, dtype=torch.float64, device=random.device).to(run.weight)
        at = (torch.arange(k, device=run.weight.device) + start) / k
        chosen = torch.searchsorted(run.weight[model].cumsum(0), at).clamp_max(chains - 1)
        states.append(run.states[model][:, chosen])
    X = gibbs(problem, torch.stack(states), sweeps, random)
    return problem.give_back(X.mT)


def _resolve(problem: Problem, method: str) -> str:
    if method not in ("auto", "exact"):
        if method not in METHODS:
            raise no_such("method", method, ("auto", "exact", "clamp", *METHODS))
        return method
    chosen = plan(Given(problem))
    if chosen.exact:
        return chosen.method
    if method == "exact":
        raise InputError("exact moments are not affordable for this model; choose ais, modes or belief_propagation")
    return "auto"


def _gradients(
    problem: Problem, name: str, generator: torch.Generator | None, options: Any, *, pairs: bool
) -> tuple[Tensor, Tensor]:
    A = problem.dense.detach().clone().requires_grad_(pairs)
    b = problem.b.detach().clone().requires_grad_()
    more = {"generator": generator} if name == "modes" and generator is not None else {}
    with torch.enable_grad():
        value = METHODS[name](A, b, **more, **options).value
        wanted = [A, b] if pairs else [b]
        given = torch.autograd.grad(torch.as_tensor(value).sum(), wanted, allow_unused=True, materialize_grads=True)
    return given[0], given[-1]


def _clamped(problem: Problem, options: Any) -> Tensor:
    """Return tanh of half the difference of the spectral estimates with a spin up and down."""
    A, b, n = problem.dense.detach(), problem.b.detach(), problem.n
    if n == 1:
        return torch.tanh(b)
    rest = torch.tensor([[j for j in range(n) if j != i] for i in range(n)], device=b.device)
    couplings = A[:, rest[:, :, None], rest[:, None, :]]
    pull = torch.stack([A[:, i, rest[i]] for i in range(n)], 1)
    fields = b[:, rest]
    both = torch.stack([fields + pull, fields - pull], 1)
    given = couplings.unsqueeze(1).expand(-1, 2, -1, -1, -1)
    value = torch.as_tensor(
        spectral_mean_field(given.reshape(-1, n - 1, n - 1), both.reshape(-1, n - 1), **options).value
    ).reshape(problem.models, 2, n)
    return torch.tanh(b + 0.5 * (value[:, 0] - value[:, 1]))


def _bipartite(problem: Problem, k: int, random: torch.Generator) -> Tensor:
    """Exact: the small side by enumeration of its own law, then the other side given it."""
    colour = _two_colours(problem)
    A, b = problem.dense[0].detach(), problem.b[0].detach()
    small, large = colour.nonzero().flatten(), (~colour).nonzero().flatten()
    s = len(small)
    places = torch.arange(s, device=b.device)
    block = 2 ** min(s, 12)
    log_weight: list[Tensor] = []
    for first in range(0, 2**s, block):
        x = 2.0 * ((torch.arange(first, first + block, device=b.device)[:, None] >> places) & 1) - 1
        h = b[large] + x.to(b) @ A[small][:, large]
        log_weight.append(x.to(b) @ b[small] + (h.abs() + torch.log1p(torch.exp(-2 * h.abs()))).sum(1))
    law = torch.cat(log_weight)
    edges = torch.softmax(law, 0).cumsum(0)
    u = torch.rand(k, generator=random, dtype=torch.float64, device=random.device).to(b)
    state = torch.searchsorted(edges, u).clamp_max(2**s - 1)
    X = b.new_zeros(k, problem.n)
    X[:, small] = (2.0 * ((state[:, None] >> places) & 1) - 1).to(b)
    h = b[large] + X[:, small] @ A[small][:, large]
    coin = torch.rand(h.shape, generator=random, dtype=torch.float64, device=random.device).to(b)
    X[:, large] = torch.where(coin < torch.sigmoid(2 * h), 1.0, -1.0).to(b)
    return X


def _two_colours(problem: Problem) -> Tensor:
    colour = np.full(problem.n, -1)
    for root in range(problem.n):
        if colour[root] >= 0:
            continue
        colour[root] = 0
        queue = [root]
        for i in queue:
            for j in problem.neighbours[i]:
                if colour[j] < 0:
                    colour[j] = 1 - colour[i]
                    queue.append(j)
        # The smaller side of each part is the one enumerated.
        ones = [i for i in queue if colour[i] == 1]
        if 2 * len(ones) > len(queue):
            colour[queue] = 1 - colour[queue]
    return torch.from_numpy(colour == 1).to(problem.b.device)
