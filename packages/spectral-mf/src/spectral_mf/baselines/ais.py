"""Annealed importance sampling: an unbiased estimate of Z with a standard error (Neal, Stat. Comput. 2001)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from scipy import special
from torch import Tensor

from shared_core.errors import InputError
from spectral_mf._inputs import Problem, as_problem
from spectral_mf._threads import one_blas_thread
from spectral_mf.mode_sum import FoundModes, search_modes
from spectral_mf.rank_one import log_cosh
from spectral_mf.result import LogPartition

__all__ = ["Annealed", "Base", "ais", "anneal", "gibbs"]

Base = Literal["uniform", "fields", "modes"]
_BLOCK = 64
# Spins between renewals of the components' densities: 17 nats a spin at most stay within a float's 700.
_REFRESH = 32
# Of the mixture's mass: what keeps every state within reach of the first sweep.
_UNIFORM_SHARE = 0.2


@dataclass(frozen=True)
class Annealed:
    """Weighted states of a batch of models.

    Attributes
    ----------
    log_weight : (models, chains) each exp(log_weight) has mean Z (without the models' constants)
    states : (models, n, chains) spins in {-1, 1}
    levels : temperatures that were passed
    """

    log_weight: Tensor
    states: Tensor
    levels: int

    @property
    def log_z(self) -> Tensor:
        """(models,) logarithm of the mean weight."""
        return torch.logsumexp(self.log_weight, 1) - math.log(self.log_weight.shape[1])

    @property
    def weight(self) -> Tensor:
        """(models, chains) weights that sum to one."""
        return torch.softmax(self.log_weight, 1)

    @property
    def effective_size(self) -> Tensor:
        """(models,) effective number of chains, 1 / Σ weight²."""
        return 1 / (self.weight**2).sum(1)

    @property
    def std_error(self) -> Tensor:
        """(models,) standard error of ``log_z`` by the delta method."""
        chains = self.log_weight.shape[1]
        return ((chains / self.effective_size - 1).clamp_min(0) / max(1, chains - 1)).sqrt()

    @property
    def means(self) -> Tensor:
        """(models, n) weighted means of the spins."""
        return torch.einsum("mnc,mc->mn", self.states, self.weight)


def ais(
    A: Any,
    b: Any = None,
    *,
    levels: int = 100,
    chains: int = 500,
    base: Base = "uniform",
    generator: torch.Generator | None = None,
    advance: Callable[[int], None] | None = None,
) -> LogPartition:
    """Estimate log Z by annealed importance sampling with one Gibbs sweep at each of `levels` temperatures.

    Parameters
    ----------
    A : (n, n) or (models, n, n) symmetric couplings, or (n, n) SciPy sparse
    b : (n,) or (models, n) fields
    levels : temperatures between the base and the model, equally spaced
    chains : independent chains, at least 2
    base : where the chains begin. ``uniform``: the standard. ``fields``: independent spins under b. ``modes``: a
        mixture of the mean-field modes and the uniform law, which starts the chains where a frustrated model's mass is.
    generator : source of randomness; None means one seeded with 0
    advance : called with the number of levels done since the last call

    Returns
    -------
    The estimate with its standard error (delta method); the mean weight is unbiased for Z, its logarithm errs
    downwards. ``diagnostics``: effective number of chains, and a lower bound that holds with 95 % probability whatever
    the weights are (Markov's inequality). A standard error says nothing of modes that no chain has met.

    Examples
    --------
    >>> r = ais([[0.0, 0.5], [0.5, 0.0]], [0.3, -0.2], chains=2000)
    >>> exact = math.log(sum(math.exp(0.5 * x * y + 0.3 * x - 0.2 * y) for x in (-1, 1) for y in (-1, 1)))
    >>> abs(r.value - exact) < 5 * r.std_error
    True
    """
    started = time.perf_counter()
    problem = as_problem(A, b)
    found = anneal(problem, levels=levels, chains=chains, base=base, generator=generator, advance=advance)
    value = found.log_z
    size = found.effective_size
    warnings: tuple[str, ...] = ()
    if float(size.min()) < 10:
        warnings = (f"only {float(size.min()):.1f} of {chains} chains carry the estimate: raise levels",)
    return LogPartition.of(
        problem,
        "ais",
        value,
        std_error=found.std_error,
        marginals=found.means,
        diagnostics={
            "levels": levels,
            "chains": chains,
            "base": base,
            "effective_chains": problem.give_back(size),
            "lower_95": problem.give_back(value + math.log(0.05) + problem.const.detach()),
        },
        warnings=warnings,
        seconds=time.perf_counter() - started,
    )


def anneal(
    problem: Problem,
    *,
    levels: int = 100,
    chains: int = 500,
    base: Base = "uniform",
    generator: torch.Generator | None = None,
    found: FoundModes | None = None,
    advance: Callable[[int], None] | None = None,
) -> Annealed:
    """Run the chains of :func:`ais` and return states and weights.

    Parameters
    ----------
    problem : models as :func:`spectral_mf._inputs.as_problem` returns them
    levels, chains, base, generator, advance : as in :func:`ais`
    found : modes for ``base="modes"``; None looks for them
    """
    if levels < 1 or chains < 2:
        raise InputError(f"levels must be at least 1 and chains at least 2, got {levels} and {chains}")
    if base not in ("uniform", "fields", "modes"):
        raise InputError(f"unknown base '{base}': choose uniform, fields or modes")
    problem = _detached(problem)
    random = generator or torch.Generator().manual_seed(0)
    if base == "modes":
        return _from_modes(problem, levels, chains, random, found, advance)
    return _from_product(problem, levels, chains, base == "fields", random, advance)


def gibbs(problem: Problem, states: Tensor, sweeps: int, generator: torch.Generator) -> Tensor:
    """Sweep states (models, n, chains) on under the model itself.

    Parameters
    ----------
    problem : models as :func:`spectral_mf._inputs.as_problem` returns them
    states : (models, n, chains) of -1 and 1
    sweeps : number of sweeps over all spins
    generator : source of randomness
    """
    problem = _detached(problem)
    X, b = states.clone(), problem.b[:, :, None]
    sweep = _Sweeper(problem)
    for _ in range(sweeps):
        sweep(X, _logistic(tuple(X.shape), generator, b) + b, 1.0)
    return X


def _detached(problem: Problem) -> Problem:
    if problem.A is None:
        return problem
    return Problem(problem.A.detach(), problem.b.detach(), problem.const.detach(), None, problem.batched, problem.kind)


def _logistic(shape: tuple[int, ...], random: torch.Generator, like: Tensor) -> Tensor:
    """Half the logistic noise L for which sign(h + L) is +1 with probability sigmoid(2h)."""
    u = torch.rand(shape, generator=random, dtype=torch.float64, device=random.device).to(like)
    return 0.5 * torch.logit(u, eps=1e-16)


def _from_product(
    problem: Problem,
    levels: int,
    chains: int,
    fields: bool,
    random: torch.Generator,
    advance: Callable[[int], None] | None,
) -> Annealed:
    """From the uniform law or independent spins: f_β(x) ∝ exp(s bᵀx + β ½ xᵀAx), with s = 1 (fields) or s = β."""
    models, n, b = problem.models, problem.n, problem.b[:, :, None]
    shape = (models, n, chains)
    X = torch.sign((b if fields else torch.zeros_like(b)) + _logistic(shape, random, b))
    base = problem.b.new_full((models,), n * math.log(2))
    if fields:
        base = base + log_cosh(problem.b).sum(-1)
    log_weight = base[:, None].expand(models, chains).clone()
    sweep = _Sweeper(problem)
    energy = sweep.energy(X) if fields else sweep.energy(X) + (b * X).sum(1)
    for level in range(1, levels + 1):
        log_weight += energy / levels
        beta = level / levels
        if level == levels:
            break
        noise = _logistic(shape, random, b)
        noise += b if fields else beta * b
        change = sweep(X, noise, beta)
        # `change` is that of ½ xᵀAx.
        energy = energy + change[0] if fields else energy + change[0] + change[1]
        if advance is not None:
            advance(1)
    # The last sweep, at the model itself, moves the states but no weight.
    sweep(X, _logistic(shape, random, b) + b, 1.0)
    if advance is not None:
        advance(1)
    return Annealed(log_weight, X, levels)


class _Sweeper:
    """One Gibbs sweep over all chains: colour by colour where few colours do, else in blocks of spins."""

    def __init__(self, problem: Problem) -> None:
        self.b = problem.b[:, :, None]
        self.classes = _colours(problem.neighbours) if _is_thin(problem) else None
        self.sparse: list[Any] | None = None
        if self.classes is not None and problem.A is None:
            matrix: Any = problem.sparse
            self.full: Any = matrix
            self.sparse = [matrix[rows.numpy()] for rows in self.classes]
        else:
            self.A = problem.dense
        if self.classes is not None and self.sparse is None:
            self.rows = [self.A[:, rows] for rows in self.classes]

    def energy(self, X: Tensor) -> Tensor:
        """½ xᵀAx of each chain."""
        if self.sparse is not None:
            return 0.5 * (X[0] * torch.from_numpy(self.full @ X[0].numpy())).sum(0)[None]
        return 0.5 * (X * (self.A @ X)).sum(1)

    def __call__(self, X: Tensor, noise: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        """Set every spin to sign(noise + β A x) in turn, in place; return the changes of ½ xᵀAx and of bᵀx."""
        before = X.clone()
        if self.classes is not None:
            change = X.new_zeros(X.shape[0], X.shape[2])
            for k, rows in enumerate(self.classes):
                if self.sparse is not None:
                    pull = torch.from_numpy(self.sparse[k] @ X[0].numpy())[None]
                else:
                    pull = self.rows[k] @ X
                new = torch.sign(torch.add(noise[:, rows], pull, alpha=beta))
                change += ((new - X[:, rows]) * pull).sum(1)
                X[:, rows] = new
        else:
            change = self._blocks(X, noise, beta)
        return change, (self.b * (X - before)).sum(1)

    def _blocks(self, X: Tensor, noise: Tensor, beta: float) -> Tensor:
        models, n, chains = X.shape
        change = X.new_zeros(models, chains)
        single = models == 1
        for first in range(0, n, _BLOCK):
            last = min(n, first + _BLOCK)
            size = last - first
            inner = beta * self.A[:, first:last, first:last]
            start = torch.baddbmm(noise[:, first:last], self.A[:, first:last], X, alpha=beta)
            # Without the block's own part, which changes while the block is swept.
            own = X[:, first:last]
            start = torch.baddbmm(start, inner, own, alpha=-1.0)
            old = own.clone()
            total = torch.empty_like(start)
            if single:
                rows, flat, block, out = inner[0], start[0], own[0], total[0]
                for i in range(size):
                    torch.addmv(flat[i], block.T, rows[i], out=out[i])
                    torch.sign(out[i], out=block[i])
            else:
                for i in range(size):
                    torch.baddbmm(start[:, i : i + 1], inner[:, i : i + 1], own, out=total[:, i : i + 1])
                    own[:, i] = torch.sign(total[:, i])
            change += ((own - old) * (total - noise[:, first:last])).sum(1)
        return change / beta


def _is_thin(problem: Problem) -> bool:
    """Whether few colours are enough for sweeping by colour to pay."""
    if problem.A is None:
        return True
    pairs = problem.n * (problem.n - 1) // 2
    if not len(problem.edges.i):
        return True
    return len(problem.edges.i) <= 0.35 * pairs and len(_colours(problem.neighbours)) <= max(2, problem.n // 4)


def _colours(neighbours: list[list[int]]) -> list[Tensor]:
    """Greedy colouring: the spins of a colour do not interact."""
    n = len(neighbours)
    colour = [-1] * n
    # Largest degree first, but connected parts in a row, so that bipartite graphs get two colours.
    seen = [False] * n
    order: list[int] = []
    for root in sorted(range(n), key=lambda i: -len(neighbours[i])):
        if seen[root]:
            continue
        queue = [root]
        seen[root] = True
        for i in queue:
            order.append(i)
            for j in neighbours[i]:
                if not seen[j]:
                    seen[j] = True
                    queue.append(j)
    for i in order:
        taken = {colour[j] for j in neighbours[i]}
        colour[i] = next(c for c in range(len(taken) + 1) if c not in taken)
    names = np.array(colour)
    return [torch.from_numpy(np.flatnonzero(names == c)) for c in range(int(names.max()) + 1)]


def _from_modes(
    problem: Problem,
    levels: int,
    chains: int,
    random: torch.Generator,
    found: FoundModes | None,
    advance: Callable[[int], None] | None,
) -> Annealed:
    """From a mixture q of the uniform law and product laws around mean-field modes: f_β ∝ q^(1-β) p^β."""
    if found is None:
        found = search_modes(problem, random)
    weights: list[Tensor] = []
    states: list[Tensor] = []
    for k in range(problem.models):
        mine = found.model == k
        one = _one_from_modes(
            problem.dense[k], problem.b[k], found.m[mine], found.free_energy[mine], levels, chains, random
        )
        weights.append(one.log_weight)
        states.append(one.states)
        if advance is not None:
            advance(levels)
    return Annealed(torch.cat(weights), torch.cat(states), levels)


def _one_from_modes(
    A: Tensor, b: Tensor, m: Tensor, energy: Tensor, levels: int, chains: int, random: torch.Generator
) -> Annealed:
    n = len(b)
    # The deepest ones; a mixture of hundreds would cost more than it gives.
    keep = energy.argsort(descending=True)[:64]
    m, energy = m[keep].clamp(-1 + 1e-7, 1 - 1e-7), energy[keep]
    up = torch.cat([(0.5 * (1 + m)).log(), m.new_full((1, n), -math.log(2))])
    down = torch.cat([(0.5 * (1 - m)).log(), m.new_full((1, n), -math.log(2))])
    around = torch.log_softmax(energy, 0) + math.log(1 - _UNIFORM_SHARE)
    mixing = torch.cat([around, m.new_tensor([math.log(_UNIFORM_SHARE)])])

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=random, dtype=torch.float64, device=random.device).to(b)

    component = torch.multinomial(mixing.exp().to(random.device), chains, replacement=True, generator=random).to(
        b.device
    )
    X = torch.where(uniform(chains, n) < up.exp()[component], 1.0, -1.0).to(b).T.contiguous()
    with one_blas_thread():
        log_weight, states = _sweep_from_mixture(
            A.cpu().numpy(),
            b.cpu().numpy(),
            X.cpu().numpy(),
            (up.cpu().numpy(), down.cpu().numpy(), mixing.cpu().numpy()),
            levels,
            lambda: uniform(n, chains).cpu().numpy(),
        )
    return Annealed(torch.from_numpy(log_weight).to(b)[None], torch.from_numpy(states).to(b)[None], levels)


def _sweep_from_mixture(
    A: np.ndarray,
    b: np.ndarray,
    X: np.ndarray,
    mixture: tuple[np.ndarray, np.ndarray, np.ndarray],
    levels: int,
    uniform: Callable[[], np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """Anneal states (n, chains) from a mixture of product laws to the model, spin by spin.

    NumPy, because thousands of steps on a few hundred numbers each are all overhead in torch.
    """
    up, down, mixing = mixture
    n, chains = X.shape
    gap, bottom = up - down, (up + down).sum(1)
    # For each spin: what the densities add up to as they are, with it lifted, and with it lowered.
    totals = np.stack([np.ones_like(gap), np.exp(gap), np.exp(-gap)]).transpose(2, 1, 0).copy()
    energies = 0.5 * (X * (A @ X)).sum(0) + b @ X
    log_weight = np.zeros(chains)
    for level in range(1, levels + 1):
        # Log density of each component, (chains, components).
        parts = mixing + 0.5 * (bottom + X.T @ gap.T)
        top = parts.max(1, keepdims=True)
        share = np.exp(parts - top)
        log_weight += (energies - top[:, 0] - np.log(share.sum(1))) / levels
        beta = level / levels
        noise = 0.5 * special.logit(np.clip(uniform(), 1e-16, 1 - 1e-16))
        for i in range(n):
            pull = A[i] @ X
            pull += b[i]
            h = beta * pull
            h += noise[i]
            before = X[i] > 0
            if beta < 1:
                if i and i % _REFRESH == 0:
                    # Between two of these a density changes by less than what a float holds.
                    share = np.exp(parts - parts.max(1, keepdims=True))
                total, lifted, lowered = (share @ totals[i]).T
                ratio = np.where(before, total / lowered, lifted / total)
                h += 0.5 * (1 - beta) * np.log(ratio)
            flipped = np.flatnonzero((h > 0) != before)
            if not len(flipped):
                continue
            moved = np.where(before[flipped], -2.0, 2.0)
            energies[flipped] += moved * pull[flipped]
            X[i, flipped] += moved
            if beta < 1:
                share[flipped] *= np.where((moved > 0)[:, None], totals[i, :, 1], totals[i, :, 2])
                parts[flipped] += 0.5 * moved[:, None] * gap[:, i]
    return log_weight, X
