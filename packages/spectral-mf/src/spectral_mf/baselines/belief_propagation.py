"""Belief propagation (the Bethe approximation) and its convex relative, tree-reweighted belief propagation.

Park, Yang, Yun and Shin, "Spectral Approximate Inference" (ICML 2019) compare to the first; the second is Wainwright,
Jaakkola and Willsky, "A new class of upper bounds on the log partition function" (IEEE Trans. Inf. Theory, 2005).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import sparse
from scipy.sparse import csgraph, linalg
from torch import Tensor

from shared_core.errors import InputError
from spectral_mf._inputs import Problem, as_problem
from spectral_mf.result import LogPartition, rounding_slack

__all__ = ["belief_propagation", "effective_resistance", "trw"]

# Converged models leave the batch at these intervals, in iterations.
_COMPACT = 10
# Below this share of the pairs, a list of edges beats n x n messages.
_SPARSE = 0.25
# Right-hand sides a sparse solve takes at once.
_COLUMNS = 256
# Keeps computed edge probabilities inside the polytope, where smaller is always valid, against rounding.
_SHRINK = 1e-12


def belief_propagation(
    A: Any, b: Any = None, *, damping: float = 0.5, iterations: int = 1000, tol: float = 1e-10
) -> LogPartition:
    """Estimate log Z by the Bethe free energy at the messages of synchronous belief propagation.

    Messages start at zero: u_ij = atanh(tanh A_ij · tanh(b_i + Σ_{k≠j} u_ki)). Exact on forests. The Bethe value is
    not a bound, and where the iteration did not converge it means little: `warnings` then says so.

    Parameters
    ----------
    A, b : couplings and fields in any form :func:`spectral_mf._inputs.as_problem` takes; sparse A stays sparse
    damping : share of the old message in the new one, in [0, 1). The paper's baseline has 0 and 200 iterations
    iterations : synchronous updates at most, at least 1
    tol : a model has converged when no undamped update moves a message by more than tol · max(1, largest message)

    Returns
    -------
    LogPartition
        `value` bᵀm + Σ H(b_i) + Σ_{i<j} [A_ij E(x_i x_j) - I_ij] over the beliefs; `marginals` m. Diagnostics:
        `converged`, `iterations` and `residual`, (models,) tensors. At a fixed point the gradients of the value are the
        beliefs: ∂/∂b_i = m_i, ∂/∂A_ij = E(x_i x_j).

    Raises
    ------
    InputError
        Where A or b is malformed, or an option is out of range.

    Notes
    -----
    Park et al. (ICML 2019), baseline "BP". A pair's mutual information I_ij is that of the pair's own belief, whose
    marginals agree with the b_i at a fixed point.

    Examples
    --------
    >>> result = belief_propagation([[0.0, 0.7], [0.7, 0.0]], [0.3, -0.4])
    >>> round(result.value, 6)
    1.666623
    """
    began = time.perf_counter()
    problem = as_problem(A, b)
    _check_options(damping, iterations, tol)
    network = _network(problem)
    run = _iterate(network, torch.ones_like(network.weight.detach()), damping, iterations, tol)
    beliefs = _beliefs(problem, network, None, run.messages)
    value = beliefs.energy + beliefs.entropy - beliefs.information
    # Both forms agree at a fixed point; only the second is stationary in the messages, so that holding them is right.
    value = value.detach() + (beliefs.dual - beliefs.dual.detach())
    return LogPartition.of(
        problem,
        "belief_propagation",
        value,
        marginals=beliefs.m.detach(),
        diagnostics=run.diagnostics(),
        warnings=run.warnings("belief propagation", "the Bethe value is no estimate there"),
        seconds=time.perf_counter() - began,
    )


def trw(
    A: Any,
    b: Any = None,
    *,
    rho: Any = None,
    damping: float = 0.5,
    iterations: int = 1000,
    tol: float = 1e-10,
) -> LogPartition:
    """Bound log Z from above by tree-reweighted belief propagation.

    Messages start at zero: u_ij = atanh(tanh(A_ij/rho_ij) · tanh(b_i + Σ_k rho_ki u_ki - u_ji)). Exact on forests,
    loose on dense graphs with strong couplings.

    Parameters
    ----------
    A, b : couplings and fields in any form :func:`spectral_mf._inputs.as_problem` takes; sparse A stays sparse
    rho : (n, n) edge appearance probabilities, symmetric, in (0, 1] on every edge, or one number for all edges. None
        takes the effective resistances of each model's graph of non-zero couplings, with unit resistors: how often an
        edge is in a uniformly drawn spanning tree, (n-1)/|E| on a complete graph. A model's own graph is the right one:
        trees over the union of a batch are valid too, but spend probability on pairs that do not interact.
    damping : share of the old message in the new one, in [0, 1)
    iterations : synchronous updates at most, at least 1
    tol : a model has converged when no undamped update moves a message by more than tol · max(1, largest message)

    Returns
    -------
    LogPartition
        `value` is the tree-reweighted free energy in the messages; `upper` holds at ANY messages, converged or not (see
        Notes), and equals the value at a fixed point up to a slack for rounding. With a `rho` that exceeds an effective
        resistance somewhere, membership in the spanning tree polytope is not decided: `upper` is infinite, and
        `warnings` says so. `marginals` are the pseudo-marginals; diagnostics: `converged`, `iterations` and `residual`,
        (models,) tensors. At a fixed point the gradients of the value are the pseudo-marginals.

    Raises
    ------
    InputError
        Where A or b is malformed, `rho` has another shape or is not in (0, 1] on every edge, or an option is out of
        range.

    Notes
    -----
    Why `upper` needs no convergence: with t_i = b_i + Σ_k rho_ki u_ki, node beliefs p_i ∝ exp(t_i x_i) and pair beliefs
    p_ij ∝ exp(A_ij x_i x_j/rho_ij + (t_i - u_ji) x_i + (t_j - u_ij) x_j), the model is, for every set of messages,
    exp(C) Π_i p_i Π_ij [p_ij / (p_i p_j)]^rho_ij, with C the value above. By convexity log Z ≤ C + Σ_T P(T) log Z_T
    over spanning trees T, where Z_T = Σ_x Π_i p_i Π_{ij in T} p_ij / (p_i p_j). Summing a leaf i of T out leaves at its
    neighbour j the ratio of the pair's marginal and p_j, so log Z_T is at most the sum of the edges' largest log
    ratios, which are |δ| - log cosh(t_j + δ) + log cosh(t_j) for an update that would move u_ij by δ, and vanish at a
    fixed point. The sum over trees needs no trees: edge ij counts rho_ij.

    Examples
    --------
    >>> triangle = [[0.0, -1.0, -1.0], [-1.0, 0.0, -1.0], [-1.0, -1.0, 0.0]]
    >>> bool(trw(triangle).upper > 2.797846121)
    True
    """
    began = time.perf_counter()
    problem = as_problem(A, b)
    _check_options(damping, iterations, tol)
    network = _network(problem)
    edges = problem.edges
    resistance = effective_resistance(problem)
    chosen = resistance if rho is None else _given_rho(problem, rho)
    # The forest polytope holds whatever is below one of its points; the tolerance lets (n-1)/|E| typed in by hand pass.
    inside = chosen <= resistance * (1 + 1e-9)
    chosen = torch.where(inside, torch.minimum(chosen, resistance), chosen)
    certified = inside.all(1)
    run = _iterate(network, network.from_edges(chosen), damping, iterations, tol)
    beliefs = _beliefs(problem, network, chosen, run.messages)
    excess = torch.zeros_like(edges.weight.detach())
    for at, other, incoming, outgoing in (
        (edges.j, edges.i, beliefs.forward, beliefs.backward),
        (edges.i, edges.j, beliefs.backward, beliefs.forward),
    ):
        t, cavity = beliefs.total[:, at].detach(), (beliefs.total[:, other] - outgoing).detach()
        moved = _message(edges.weight.detach() / chosen, cavity) - incoming
        excess = torch.maximum(excess, moved.abs() - _log2cosh(t + moved) + _log2cosh(t))
    value = beliefs.dual
    upper = value.detach() + (chosen * excess).sum(1) + rounding_slack(problem, beliefs.size)
    unsure = int((~certified).sum())
    return LogPartition.of(
        problem,
        "trw",
        value,
        upper=torch.where(certified, upper, torch.inf),
        marginals=beliefs.m.detach(),
        diagnostics=run.diagnostics(),
        warnings=run.warnings("tree-reweighted belief propagation", "the upper bound holds, but is looser than need be")
        + (
            ()
            if not unsure
            else (f"rho exceeds the effective resistance of an edge in {unsure} models: no upper bound is claimed",)
        ),
        seconds=time.perf_counter() - began,
    )


def effective_resistance(problem: Problem) -> Tensor:
    """Edge appearance probabilities of uniform spanning forests: effective resistances with a unit resistor an edge.

    Parameters
    ----------
    problem : models as :func:`spectral_mf._inputs.as_problem` returns them; each model's graph is that of its own
        non-zero couplings

    Returns
    -------
    (models, edges) in (0, 1], in the order of ``problem.edges``; 1 for pairs that interact in other models only.
        Where all pairs of a model interact, (n-1)/|E|. Shrunk by 1e-12, relative, so as to be certain to lie within the
        spanning tree polytope.

    Notes
    -----
    Kirchhoff: an edge is in a uniform spanning tree of its component with probability (e_i - e_j)ᵀ L⁺ (e_i - e_j).

    Examples
    --------
    >>> effective_resistance(as_problem([[0.0, 2.0, 1.0], [2.0, 0.0, -3.0], [1.0, -3.0, 0.0]]))
    tensor([[0.6667, 0.6667, 0.6667]], dtype=torch.float64)
    """
    weight = problem.edges.weight.detach().cpu()
    present = weight != 0
    i, j = problem.edges.i.cpu().numpy(), problem.edges.j.cpu().numpy()
    out = torch.ones_like(weight)
    # A batch shares its graph more often than not.
    if present.shape[1] == 0:
        return out.to(problem.b.device)
    graphs, which = torch.unique(present, dim=0, return_inverse=True)
    for k, graph in enumerate(graphs):
        used = graph.numpy()
        found = torch.ones(len(graph), dtype=torch.float64)
        found[graph] = torch.from_numpy(_resistances(problem.n, i[used], j[used]))
        out[which == k] = found
    return ((1 - _SHRINK) * out).to(problem.b.device)


def _resistances(n: int, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    edges = len(i)
    if edges == 0:
        return np.ones(0)
    if edges == n * (n - 1) // 2:
        return np.full(edges, (n - 1) / edges)
    graph = sparse.coo_array((np.ones(edges), (i, j)), shape=(n, n))
    components, label = csgraph.connected_components(graph, directed=False)
    if edges == n - components:
        return np.ones(edges)
    # One spin of each component is grounded; what is left of the Laplacian can be inverted.
    free = np.ones(n, dtype=bool)
    free[np.unique(label, return_index=True)[1]] = False
    place = np.cumsum(free) - 1
    adjacency = graph + graph.T
    laplacian = sparse.csc_array(sparse.diags_array(np.asarray(adjacency.sum(1))) - adjacency)[free][:, free]
    size = laplacian.shape[0]
    if size <= 1000:
        inverse = np.zeros((n, n))
        inverse[np.ix_(free, free)] = np.linalg.inv(laplacian.toarray())
        found = inverse[i, i] + inverse[j, j] - 2 * inverse[i, j]
    else:
        solve = linalg.splu(sparse.csc_array(laplacian), permc_spec="MMD_AT_PLUS_A", options={"SymmetricMode": True})
        diagonal, cross = np.zeros(n), np.zeros(edges)
        spins = np.flatnonzero(free)
        by_column = np.argsort(place[j] * free[j], kind="stable")
        for first in range(0, size, _COLUMNS):
            here = np.arange(first, min(first + _COLUMNS, size))
            columns = solve.solve(np.eye(size, len(here), -first))
            diagonal[spins[here]] = columns[here, here - first]
            mine = by_column[np.isin(place[j[by_column]], here) & free[j[by_column]] & free[i[by_column]]]
            cross[mine] = columns[place[i[mine]], place[j[mine]] - first]
        found = diagonal[i] + diagonal[j] - 2 * cross
    # The probabilities of a component of k spins sum to k - 1; rounding must not have them sum to more.
    return np.minimum(found * min(1.0, (n - components) / found.sum()), 1.0)


def _given_rho(problem: Problem, rho: Any) -> Tensor:
    edges, n = problem.edges, problem.n
    values = torch.as_tensor(rho, dtype=torch.float64).detach().to(problem.b.device)
    if values.ndim == 0:
        chosen = values.expand(edges.weight.shape)
    elif values.shape == (n, n):
        chosen = values[edges.i, edges.j].expand(edges.weight.shape)
        if not torch.equal(values[edges.i, edges.j], values[edges.j, edges.i]):
            raise InputError("rho is not symmetric: give each edge one probability")
    else:
        raise InputError(f"rho must be one number or ({n}, {n}), got shape {tuple(values.shape)}")
    wrong = ~((chosen > 0) & (chosen <= 1))
    if bool(wrong.any()):
        at = int(wrong.any(0).nonzero()[0])
        i, j = int(edges.i[at]), int(edges.j[at])
        raise InputError(f"rho[{i},{j}] is {float(chosen[0, at]):g}; an edge's probability must be in (0, 1]")
    return chosen


def _check_options(damping: float, iterations: int, tol: float) -> None:
    if not 0 <= damping < 1:
        raise InputError(f"damping must be in [0, 1), got {damping}: it is the share of the old message")
    if iterations < 1:
        raise InputError(f"iterations must be at least 1, got {iterations}")
    if not tol > 0:
        raise InputError(f"tol must be positive, got {tol}")


def _log2cosh(x: Tensor) -> Tensor:
    return torch.logaddexp(x, -x)


def _message(coupling: Tensor, cavity: Tensor) -> Tensor:
    # atanh(tanh a · tanh h), to rounding of a + h, where tanh would be 1 already.
    return 0.5 * (_log2cosh(cavity + coupling) - _log2cosh(cavity - coupling))


@dataclass(frozen=True)
class _Dense:
    """Messages as (models, n, n), from row to column."""

    weight: Tensor
    b: Tensor
    i: Tensor
    j: Tensor

    def totals(self, messages: Tensor) -> Tensor:
        return self.b + messages.sum(1)

    def cavities(self, total: Tensor, messages: Tensor) -> Tensor:
        return total[:, :, None] - messages.transpose(1, 2)

    def select(self, keep: Tensor) -> _Dense:
        return _Dense(self.weight[keep], self.b[keep], self.i, self.j)

    def from_edges(self, values: Tensor) -> Tensor:
        # Where there is no edge any probability does: messages stay zero there.
        full = torch.ones_like(self.weight)
        full[:, self.i, self.j] = values
        full[:, self.j, self.i] = values
        return full

    def both_ways(self, messages: Tensor) -> tuple[Tensor, Tensor]:
        return messages[:, self.i, self.j], messages[:, self.j, self.i]


@dataclass(frozen=True)
class _Listed:
    """Messages as (models, 2 · edges): along the edges i -> j, then back."""

    weight: Tensor
    b: Tensor
    source: Tensor
    target: Tensor

    def totals(self, messages: Tensor) -> Tensor:
        return self.b.index_add(1, self.target, messages)

    def cavities(self, total: Tensor, messages: Tensor) -> Tensor:
        forward, backward = self.both_ways(messages)
        return total[:, self.source] - torch.cat([backward, forward], 1)

    def select(self, keep: Tensor) -> _Listed:
        return _Listed(self.weight[keep], self.b[keep], self.source, self.target)

    def from_edges(self, values: Tensor) -> Tensor:
        return torch.cat([values, values], 1)

    def both_ways(self, messages: Tensor) -> tuple[Tensor, Tensor]:
        half = messages.shape[1] // 2
        return messages[:, :half], messages[:, half:]


def _network(problem: Problem) -> _Dense | _Listed:
    edges, b = problem.edges, problem.b.detach()
    if problem.A is not None and len(edges.i) > _SPARSE * problem.n * (problem.n - 1) / 2:
        return _Dense(problem.A.detach(), b, edges.i, edges.j)
    weight = edges.weight.detach()
    return _Listed(torch.cat([weight, weight], 1), b, torch.cat([edges.i, edges.j]), torch.cat([edges.j, edges.i]))


@dataclass(frozen=True)
class _Run:
    messages: Tensor
    converged: Tensor
    iterations: Tensor
    residual: Tensor

    def diagnostics(self) -> dict[str, Tensor]:
        return {"converged": self.converged, "iterations": self.iterations, "residual": self.residual}

    def warnings(self, what: str, so: str) -> tuple[str, ...]:
        failed = int((~self.converged).sum())
        if not failed:
            return ()
        worst = float(self.residual.max())
        return (f"{what} did not converge for {failed} of {len(self.converged)} models (residual {worst:.1e}): {so}",)


@torch.no_grad()
def _iterate(network: _Dense | _Listed, rho: Tensor, damping: float, iterations: int, tol: float) -> _Run:
    coupling = network.weight / rho
    messages = torch.zeros_like(coupling)
    models = len(messages)
    left = torch.arange(models, device=messages.device)
    final = _Run(
        torch.zeros_like(messages),
        torch.zeros(models, dtype=torch.bool, device=left.device),
        torch.full_like(left, iterations),
        torch.full((models,), torch.inf, dtype=messages.dtype, device=left.device),
    )
    plain = bool((rho == 1).all())
    reduced = tuple(range(1, messages.ndim))
    for count in range(1, iterations + 1):
        total = network.totals(messages if plain else rho * messages)
        fresh = _message(coupling, network.cavities(total, messages))
        if count % _COMPACT == 0 or count == iterations or count < _COMPACT:
            if messages[0].numel():
                residual = (fresh - messages).abs().amax(reduced)
                still = residual > tol * fresh.abs().amax(reduced).clamp(min=1)
            else:
                residual, still = final.residual.new_zeros(len(left)), left < 0
            done = ~still if count < iterations else torch.ones_like(still)
            if bool(done.any()):
                # The messages the residual belongs to, so that what is reported is what is returned.
                ended = left[done]
                final.messages[ended] = messages[done]
                final.residual[ended] = residual[done]
                final.converged[ended] = ~still[done]
                final.iterations[ended] = count
                if bool(done.all()):
                    break
                left, network, rho = left[~done], network.select(~done), rho[~done]
                messages, fresh, coupling = messages[~done], fresh[~done], coupling[~done]
        messages = damping * messages + (1 - damping) * fresh if damping else fresh
    return final


@dataclass(frozen=True)
class _Beliefs:
    """What messages say; energies (models,), all differentiable in A and b at fixed messages."""

    total: Tensor
    m: Tensor
    forward: Tensor
    backward: Tensor
    energy: Tensor
    entropy: Tensor
    information: Tensor
    dual: Tensor
    size: Tensor


def _beliefs(problem: Problem, network: _Dense | _Listed, rho: Tensor | None, messages: Tensor) -> _Beliefs:
    edges = problem.edges
    i, j, weight = edges.i, edges.j, edges.weight
    forward, backward = network.both_ways(messages)
    share = torch.ones_like(weight.detach()) if rho is None else rho
    # Differentiable sums, unlike the network's.
    total = problem.b.index_add(1, j, share * forward).index_add(1, i, share * backward)
    ci, cj = total[:, i] - backward, total[:, j] - forward
    a = weight / share
    logits = torch.stack([a + ci + cj, -a + ci - cj, -a - ci + cj, a - ci - cj])
    log_z = logits.logsumexp(0)
    single = _log2cosh(total)
    dual = single.sum(1) + (share * (log_z - single[:, i] - single[:, j])).sum(1)
    m = torch.tanh(total)
    with torch.no_grad():
        logp = logits - log_z
        p = logp.exp()
        product = p[0] + p[3] - p[1] - p[2]
        up_i, down_i = torch.logaddexp(logp[0], logp[1]), torch.logaddexp(logp[2], logp[3])
        up_j, down_j = torch.logaddexp(logp[0], logp[2]), torch.logaddexp(logp[1], logp[3])
        apart = torch.stack([up_i + up_j, up_i + down_j, down_i + up_j, down_i + down_j])
        information = (share * (p * (logp - apart)).sum(0)).sum(1)
        energy = (problem.b * m).sum(1) + (weight * product).sum(1)
        entropy = (single - total * m).sum(1)
        size = single.sum(1) + (share * (log_z.abs() + single[:, i] + single[:, j])).sum(1)
    return _Beliefs(total, m, forward, backward, energy, entropy, information, dual, size)
