"""Exact log partition functions, for the models that allow one, and what each would cost.

Four ways, all batched over models and differentiable: over all states (few spins), along a narrow grid, over one side
of a bipartite graph (a restricted Boltzmann machine), and by eliminating variables (small induced width). `structure`
looks at a model's graph and predicts the cost of each, so that a caller can choose before anything is allocated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from scipy import sparse
from scipy.sparse import csgraph
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from shared_core.errors import InputError
from spectral_mf._inputs import Problem, as_problem
from spectral_mf.baselines._tables import Ordering, Table, bucket, least_width, log_add, min_fill, spin_states, sum_out
from spectral_mf.result import LogPartition, Scalar, rounding_slack

__all__ = [
    "Cost",
    "Structure",
    "exact_elimination",
    "exact_enumeration",
    "exact_rbm",
    "exact_sample",
    "exact_transfer",
    "max_energy",
    "structure",
]

# Entries of the largest temporary: 8 MB in float64, about the size of a cache.
_BLOCK = 1 << 20
# Entries of the tables of one group of models.
_GROUP = 1 << 22
# exp underflows at -745; what a scaled sum of 2^33 terms loses below e^-600 is under one rounding error.
_UNDERFLOW = -600.0
_TINY = 1e-300
_LINEAR = 40.0
_WIDTH_CAP = 30


def _certain(problem: Problem, method: str, value: Tensor, started: float, **diagnostics: Any) -> LogPartition:
    slack = rounding_slack(problem, value)
    return LogPartition.of(
        problem,
        method,
        value,
        lower=value.detach() - slack,
        upper=value.detach() + slack,
        diagnostics=diagnostics,
        seconds=perf_counter() - started,
    )


def _by_groups(models: int, entries: int, compute: Callable[[slice], Tensor]) -> Tensor:
    """Apply `compute` to as many models at once as keep a table of `entries` a model within bounds."""
    step = max(1, _GROUP // max(entries, 1))
    if step >= models:
        return compute(slice(None))
    return torch.cat([compute(slice(k, k + step)) for k in range(0, models, step)])


def _blockwise(states: int, step: int, compute: Callable[[int, int], Tensor], *, tracked: bool) -> list[Tensor]:
    """Apply `compute(start, stop)` to blocks of states; under autograd, each is computed again on the way back."""
    blocks = [(start, min(start + step, states)) for start in range(0, states, step)]
    if tracked and len(blocks) > 1:
        return [
            cast("Tensor", checkpoint(compute, *block, use_reentrant=False, preserve_rng_state=False))
            for block in blocks
        ]
    return [compute(*block) for block in blocks]


def _size(exponent: int) -> str:
    return f"2^{exponent}" if exponent > 1000 else f"2^{exponent} = {2.0**exponent:.3g}"


def _gigabytes(entries_log2: int, models: int = 1) -> str:
    return f"2^{entries_log2 - 27} GB" if entries_log2 > 1000 else f"{8e-9 * models * 2.0**entries_log2:.3g} GB"


# Enumeration


class _Thirds(NamedTuple):
    """Energies of all states, as a sum over pairs of thirds of the spins.

    Energy of (x, y, z) = first[x, y] + second[x, z] + third[y, z], each (models, states, states).
    """

    first: Tensor
    second: Tensor
    third: Tensor


def _thirds(A: Tensor, b: Tensor) -> _Thirds:
    n = b.shape[-1]
    p, q = (n + 2) // 3, (n + 2) // 3 + (n + 1) // 3
    parts = [slice(0, p), slice(p, q), slice(q, n)]
    states = [spin_states(part.stop - part.start, b.device) for part in parts]

    def own(k: int) -> Tensor:
        S, part = states[k], parts[k]
        return 0.5 * ((S @ A[:, part, part]) * S).sum(-1) + b[:, part] @ S.T

    def across(k: int, m: int) -> Tensor:
        return states[k] @ A[:, parts[k], parts[m]] @ states[m].T

    return _Thirds(
        across(0, 1) + own(0)[:, :, None], across(0, 2), across(1, 2) + own(1)[:, :, None] + own(2)[:, None, :]
    )


def _rows_by_products(energies: _Thirds) -> tuple[Tensor, Tensor]:
    """Log of the sum over (y, z) for each x, (models, states of x), and which models it holds for."""
    first, second, third = energies
    w = third.detach().amax(2)
    first, third = first + w[:, None, :], third - w[:, :, None]
    p, q = first.detach().amax(2), second.detach().amax(2)
    # Sum over z, then over y: the first as a matrix product, so that exp is taken of pairs of thirds only.
    inner = torch.exp(second - q[:, :, None]) @ torch.exp(third).transpose(1, 2)
    total = (inner * torch.exp(first - p[:, :, None])).sum(-1)
    scale = p + q
    rows = scale + total.clamp_min(_TINY).log()
    return rows, rows.detach().amax(1) - scale.amax(1) > _UNDERFLOW


def _rows_by_blocks(energies: _Thirds) -> Tensor:
    """Log of the sum over (y, z) for each x, (models, states of x), one exponential a state."""
    first, second, third = energies
    models, states, _ = first.shape
    step = max(1, _BLOCK // (models * third[0].numel()))

    def block(start: int, stop: int) -> Tensor:
        rows = slice(start, stop)
        return (first[:, rows, :, None] + second[:, rows, None, :] + third[:, None]).logsumexp((2, 3))

    return torch.cat(_blockwise(states, step, block, tracked=first.requires_grad), dim=1)


def _rows(energies: _Thirds) -> Tensor:
    rows, held = _rows_by_products(energies)
    if bool(held.all()):
        return rows
    lost = (~held).nonzero()[:, 0]
    exact = torch.cat([_rows_by_blocks(_Thirds(*(part[k : k + 1] for part in energies))) for k in lost.tolist()])
    return rows.index_put((lost,), exact)


def _refuse_many_spins(name: str, n: int, max_spins: int) -> None:
    if n > max_spins:
        raise InputError(
            f"{name}: n = {n} spins have {_size(n)} states, above max_spins = {max_spins}; use exact_elimination,"
            " exact_transfer or exact_rbm where the graph allows it, else an estimate such as 'ais' or 'modes'"
        )


def _pair_entries(n: int) -> int:
    return 1 << ((n + 2) // 3 + (n + 1) // 3)


def exact_enumeration(A: Any, b: Any = None, *, max_spins: int = 25) -> LogPartition:
    """Log partition function over all 2^n states.

    The spins are split in three. An energy is then a sum over pairs of thirds, and the sum over states a matrix
    product of exponentials, 2^n multiply-adds but only about 3·2^(2n/3) exponentials; models whose scaled sums would
    underflow (couplings in the hundreds) are added up state by state in log space, in bounded blocks.

    Parameters
    ----------
    A : (n, n) or (models, n, n) couplings, NumPy, torch, SciPy sparse, or an object with ``problem``
    b : (n,) or (models, n) fields; None means zero
    max_spins : refuse more spins than this; 25 take tens of milliseconds, each further one twice as long

    Returns
    -------
    LogPartition
        `value` in nats; `lower` and `upper` differ from it by rounding only. Differentiable in A and b: the gradient
        with respect to b is the marginals E[x_i].

    Raises
    ------
    InputError
        Where n exceeds `max_spins`, or the model is malformed (see :func:`spectral_mf._inputs.as_problem`).

    Notes
    -----
    Split-and-list: R. Williams, "A new algorithm for optimal 2-constraint satisfaction and its implications",
    Theoretical Computer Science 348 (2005). Spec section 3, ``exact_enumeration``.

    Examples
    --------
    >>> result = exact_enumeration([[0.0, 0.7], [0.7, 0.0]], [0.3, -0.4])
    >>> round(result.value, 9)
    1.66662259
    """
    started = perf_counter()
    problem = as_problem(A, b)
    _refuse_many_spins("exact_enumeration", problem.n, max_spins)
    couplings, fields = problem.dense, problem.b
    value = _by_groups(
        problem.models,
        _pair_entries(problem.n),
        lambda chosen: _rows(_thirds(couplings[chosen], fields[chosen])).logsumexp(-1),
    )
    return _certain(problem, "exact_enumeration", value, started, states=2.0**problem.n)


def max_energy(A: Any, b: Any = None, *, max_spins: int = 25) -> tuple[Scalar, Any]:
    """Most probable state by enumeration, and its energy.

    Parameters
    ----------
    A : (n, n) or (models, n, n) couplings, as in :func:`exact_enumeration`
    b : (n,) or (models, n) fields; None means zero
    max_spins : refuse more spins than this

    Returns
    -------
    energy : ½ xᵀAx + bᵀx (plus the model's constant) at its maximum, () or (models,)
    spins : (n,) or (models, n) of ±1, a state that attains it; NumPy or torch, as the model was

    Raises
    ------
    InputError
        Where n exceeds `max_spins`, or the model is malformed.

    Examples
    --------
    >>> energy, spins = max_energy([[0.0, -1.0], [-1.0, 0.0]], [0.5, 0.0])
    >>> energy, spins.tolist()
    (1.5, [1.0, -1.0])
    """
    problem = as_problem(A, b)
    n = problem.n
    _refuse_many_spins("max_energy", n, max_spins)
    best: list[Tensor] = []
    for k in range(problem.models):
        first, second, third = _thirds(problem.dense[k : k + 1].detach(), problem.b[k : k + 1].detach())
        step = max(1, _BLOCK // third.numel())
        tops: list[Tensor] = []
        indices: list[Tensor] = []
        for start in range(0, first.shape[1], step):
            rows = slice(start, start + step)
            block = first[0, rows, :, None] + second[0, rows, None, :] + third[0]
            top, index = block.flatten().max(0)
            tops.append(top)
            indices.append(index + start * third.numel())
        best.append(torch.stack(indices)[torch.stack(tops).argmax()])
    shifts = torch.arange(n - 1, -1, -1, device=problem.b.device)
    spins = (2 * ((torch.stack(best)[:, None] >> shifts) & 1) - 1).to(torch.float64)
    pairs = 0.5 * ((problem.dense @ spins[:, :, None])[..., 0] * spins).sum(-1)
    energy = pairs + (problem.b * spins).sum(-1) + problem.const
    return problem.give_back(energy), problem.give_back(spins)


def exact_sample(A: Any, b: Any = None, k: int = 1, *, generator: torch.Generator, max_spins: int = 25) -> Any:
    """Independent exact samples, by enumeration.

    Parameters
    ----------
    A : (n, n) or (models, n, n) couplings, as in :func:`exact_enumeration`
    b : (n,) or (models, n) fields; None means zero
    k : number of samples a model
    generator : source of the randomness, on the model's device
    max_spins : refuse more spins than this

    Returns
    -------
    (k, n) or (models, k, n) of ±1, NumPy or torch, as the model was

    Raises
    ------
    InputError
        Where n exceeds `max_spins`, `k` is not positive, or the model is malformed.

    Examples
    --------
    >>> samples = exact_sample([[0.0, 9.0], [9.0, 0.0]], k=4, generator=torch.Generator().manual_seed(0))
    >>> (samples[:, 0] == samples[:, 1]).all().item()
    True
    """
    problem = as_problem(A, b)
    n, device = problem.n, problem.b.device
    _refuse_many_spins("exact_sample", n, max_spins)
    if k < 1:
        raise InputError(f"exact_sample: k = {k}; ask for at least one sample")
    shifts = torch.arange(n - 1, -1, -1, device=device)
    drawn: list[Tensor] = []
    with torch.no_grad():
        for model in range(problem.models):
            energies = _thirds(problem.dense[model : model + 1], problem.b[model : model + 1])
            first, second, third = (part[0] for part in energies)
            rows = torch.multinomial(_rows(energies)[0].softmax(-1), k, replacement=True, generator=generator)
            uniform = torch.rand(k, dtype=torch.float64, device=device, generator=generator)
            states = torch.empty_like(rows)
            for row in rows.unique().tolist():
                mine = rows == row
                rest = (first[row][:, None] + second[row][None, :] + third).flatten()
                steps = torch.exp(rest - rest.max()).cumsum(0)
                # The last step at most: u·total may round up to the total itself.
                column = torch.searchsorted(steps, uniform[mine] * steps[-1], right=True).clamp_max(len(steps) - 1)
                states[mine] = row * third.numel() + column
            drawn.append((2 * ((states[:, None] >> shifts) & 1) - 1).to(torch.float64))
    return problem.give_back(torch.stack(drawn))


# Grids


def _grid_misfit(problem: Problem, rows: int, cols: int) -> tuple[int, int] | None:
    """First edge that does not join neighbours of a rows x cols grid, row-major; None where all do."""
    i, j = problem.edges.i, problem.edges.j
    down = j - i == cols
    right = (j - i == 1) & ((i + 1) % cols != 0)
    wrong = ~(down | right)
    if rows * cols != problem.n or not bool(wrong.any()):
        return None
    at = int(wrong.int().argmax())
    return int(i[at]), int(j[at])


def _grid_shape(problem: Problem) -> tuple[int, int, tuple[int, int] | None]:
    """Rows and columns read from the couplings, and the first edge that does not fit them."""
    n, edges = problem.n, problem.edges
    offsets = edges.j - edges.i
    far = offsets[offsets > 1]
    if len(far) == 0:
        return n, 1, None
    cols = int(far.min())
    if n % cols:
        at = int((offsets == cols).int().argmax())
        return n, 1, (int(edges.i[at]), int(edges.j[at]))
    return n // cols, cols, _grid_misfit(problem, n // cols, cols)


def _grid_couplings(problem: Problem, rows: int, cols: int) -> tuple[Tensor, Tensor, Tensor]:
    """Couplings to the right, couplings downwards and fields, each (models, rows, cols), columns the narrower side."""
    edges = problem.edges
    down = edges.j - edges.i == cols
    zero = problem.b.new_zeros(problem.b.shape)
    right_of = zero.index_copy(1, edges.i[~down], edges.weight[:, ~down])
    below = zero.index_copy(1, edges.i[down], edges.weight[:, down])
    right_of, below, fields = (part.unflatten(1, (rows, cols)) for part in (right_of, below, problem.b))
    if cols > rows:
        return below.transpose(1, 2), right_of.transpose(1, 2), fields.transpose(1, 2)
    return right_of, below, fields


def _fold_grid(right_of: Tensor, below: Tensor, fields: Tensor) -> Tensor:
    models, rows, width = fields.shape
    # Axis 2 of a site's view is its own spin in the frontier, the row of spins just passed.
    frontier = fields.new_zeros(models, 1)
    for row in range(rows):
        for col in range(width):
            field = fields[:, row, col, None, None]
            if row == 0:
                before = frontier.reshape(models, 1 << col, 1)
                low, high = before - field, before + field
            else:
                view = frontier.reshape(models, 1 << col, 2, -1)
                step = below[:, row - 1, col, None, None]
                minus, plus = view.unbind(2)
                low, high = log_add(minus + step, plus - step) - field, log_add(minus - step, plus + step) + field
            if col:
                link = right_of[:, row, col - 1, None, None, None]
                left = torch.cat([-link, link], dim=2)
                low = (low.reshape(models, -1, 2, low.shape[-1]) - left).reshape(low.shape)
                high = (high.reshape(models, -1, 2, high.shape[-1]) + left).reshape(high.shape)
            frontier = torch.stack([low, high], dim=2).reshape(models, -1)
    return frontier.logsumexp(-1)


def exact_transfer(A: Any, b: Any = None, *, shape: tuple[int, int] | None = None, max_width: int = 20) -> LogPartition:
    """Log partition function of a rectangular grid with open boundaries, by folding it site by site.

    Parameters
    ----------
    A : (n, n) or (models, n, n) couplings, NumPy, torch, SciPy sparse, or an object with ``problem``; spins are
        numbered row by row, and only horizontal and vertical neighbours interact, with any strengths
    b : (n,) or (models, n) fields; None means zero
    shape : (rows, columns) of the grid; None reads it from the couplings
    max_width : refuse grids whose narrower side is longer; time and memory double with each unit (2^width entries)

    Returns
    -------
    LogPartition
        `value` in nats; `lower` and `upper` differ from it by rounding only. Differentiable in b and in every
        coupling that is not zero in all models of the batch.

    Raises
    ------
    InputError
        Where `shape` does not hold n spins, an edge does not join neighbours (the first one is named), the grid is too
        wide, or the model is malformed.

    Notes
    -----
    Spec section 3, ``exact_transfer``: row-to-row transfer as a fold over sites, in log space.

    Examples
    --------
    >>> import numpy as np
    >>> chain = 0.8 * (np.eye(10, k=1) + np.eye(10, k=-1))
    >>> round(exact_transfer(chain).value, 9)
    9.548253849
    """
    started = perf_counter()
    problem = as_problem(A, b)
    if shape is None:
        rows, cols, wrong = _grid_shape(problem)
        if wrong is not None and cols == 1:
            raise InputError(
                f"exact_transfer: A[{wrong[0]},{wrong[1]}] would make rows of {wrong[1] - wrong[0]} spins, which do not"
                f" divide n = {problem.n}; pass shape=(rows, columns), or use exact_elimination"
            )
    else:
        rows, cols = shape
        if rows < 1 or cols < 1 or rows * cols != problem.n:
            raise InputError(f"exact_transfer: a {rows} x {cols} grid has {rows * cols} spins but n = {problem.n}")
        wrong = _grid_misfit(problem, rows, cols)
    if wrong is not None:
        raise InputError(
            f"exact_transfer: A[{wrong[0]},{wrong[1]}] joins two spins that are not neighbours on a {rows} x {cols}"
            " grid; number the spins row by row, pass another shape, or use exact_elimination"
        )
    width = min(rows, cols)
    if width > max_width:
        raise InputError(
            f"exact_transfer: the narrower side of the {rows} x {cols} grid is {width}, above max_width = {max_width}:"
            f" a table of {_size(width)} entries, {_gigabytes(width, problem.models)}; use an estimate, 'ais' say"
        )
    parts = _grid_couplings(problem, rows, cols)
    value = _by_groups(problem.models, 1 << width, lambda chosen: _fold_grid(*(part[chosen] for part in parts)))
    return _certain(problem, "exact_transfer", value, started, shape=(rows, cols), width=width)


# Bipartite graphs


class _Sides(NamedTuple):
    """A connected bipartite component: the spins to enumerate (the smaller side) and those to sum out."""

    enumerated: list[int]
    summed: list[int]


def _graph(i: np.ndarray, j: np.ndarray, n: int) -> sparse.csr_array:
    return sparse.csr_array((np.ones(len(i)), (i, j)), shape=(n, n))


def _two_colouring(problem: Problem) -> list[_Sides] | tuple[int, int]:
    """Sides of each connected component, or an edge within a side where the graph is not bipartite."""
    n, edges = problem.n, problem.edges
    i, j = edges.i.cpu().numpy(), edges.j.cpu().numpy()
    component = csgraph.connected_components(_graph(i, j, n), directed=False)[1]
    # A root joined to one spin of each component makes the search one call.
    roots = np.unique(component, return_index=True)[1]
    joined = _graph(np.concatenate([i, roots]), np.concatenate([j, np.full_like(roots, n)]), n + 1)
    order, parent = csgraph.breadth_first_order(joined, n, directed=False)
    sign = [0] * (n + 1)
    for v, before in zip(order[1:].tolist(), parent[order[1:]].tolist(), strict=True):
        sign[v] = 1 - sign[before]
    colour = np.array(sign[:n])
    clash = np.flatnonzero(colour[i] == colour[j])
    if len(clash):
        return int(i[clash[0]]), int(j[clash[0]])
    order = np.argsort(component, kind="stable")
    sides: list[_Sides] = []
    for members in np.split(order, np.flatnonzero(np.diff(component[order])) + 1):
        even, odd = members[colour[members] == 0].tolist(), members[colour[members] == 1].tolist()
        sides.append(_Sides(even, odd) if len(even) <= len(odd) else _Sides(odd, even))
    return sides


def _sum_out_side(W: Tensor, enumerated: Tensor, summed: Tensor) -> Tensor:
    """Log of Σ_s exp(s·enumerated) Π_j 2cosh(summed_j + Σ_i s_i W_ij): W (models, k, m), fields (models, k or m)."""
    models, k, m = W.shape
    states = 1 << k
    step = max(1, _BLOCK // (models * max(m, 1)))
    shifts = torch.arange(k - 1, -1, -1, device=W.device)
    # Σ_j log 2cosh f_j = Σ_j log(1 + exp 2f_j) - Σ_j f_j, and the last sum is linear in s.
    doubled, linear = 2 * W, enumerated - W.sum(-1)

    def block(start: int, stop: int) -> Tensor:
        codes = torch.arange(start, stop, device=W.device)[:, None]
        S = (2 * ((codes >> shifts) & 1) - 1).to(torch.float64)
        inner = torch.baddbmm(2 * summed[:, None, :], S.expand(models, -1, -1), doubled)
        free = functional.softplus(inner, threshold=_LINEAR).sum(-1)
        return (free + linear @ S.T).logsumexp(-1)

    tracked = W.requires_grad or enumerated.requires_grad or summed.requires_grad
    parts = _blockwise(states, step, block, tracked=tracked)
    return torch.stack(parts).logsumexp(0) - summed.sum(-1)


def exact_rbm(A: Any, b: Any = None, *, max_side: int = 20) -> LogPartition:
    """Log partition function of a bipartite model, such as a restricted Boltzmann machine.

    The two sides are found by colouring the graph. In each connected component the states of the smaller side are
    enumerated, and the other side is summed out in closed form, Π 2cosh.

    Parameters
    ----------
    A : (n, n) or (models, n, n) couplings, NumPy, torch, SciPy sparse, or an object with ``problem``
    b : (n,) or (models, n) fields; None means zero
    max_side : refuse components whose smaller side holds more spins; time doubles with each

    Returns
    -------
    LogPartition
        `value` in nats; `lower` and `upper` differ from it by rounding only. Differentiable in b and in the couplings
        between the two sides of a component.

    Raises
    ------
    InputError
        Where the graph has an odd cycle (an edge of it is named), a side is too large, or the model is malformed.

    Notes
    -----
    Spec section 3, ``exact_rbm``.

    Examples
    --------
    >>> import numpy as np
    >>> A = np.zeros((5, 5))
    >>> A[:2, 2:] = 0.4
    >>> A = A + A.T
    >>> round(exact_rbm(A).value - exact_enumeration(A).value, 12)
    0.0
    """
    started = perf_counter()
    problem = as_problem(A, b)
    sides = _two_colouring(problem)
    if isinstance(sides, tuple):
        raise InputError(
            f"exact_rbm: the graph is not bipartite, A[{sides[0]},{sides[1]}] closes an odd cycle; use"
            " exact_elimination or exact_enumeration"
        )
    largest = max(len(side.enumerated) for side in sides)
    if largest > max_side:
        raise InputError(
            f"exact_rbm: the smaller side has {largest} spins, {_size(largest)} states, above max_side = {max_side};"
            " use an estimate such as 'ais' or 'modes'"
        )
    fields = problem.b
    alone = [v for side in sides if not side.enumerated for v in side.summed]
    # log 2cosh f, as above.
    value = (functional.softplus(2 * fields[:, alone], threshold=_LINEAR) - fields[:, alone]).sum(-1)
    for side in sides:
        if side.enumerated:
            W = _between(problem, side)
            value = value + _sum_out_side(W, fields[:, side.enumerated], fields[:, side.summed])
    return _certain(problem, "exact_rbm", value, started, enumerated=largest, components=len(sides))


def _between(problem: Problem, side: _Sides) -> Tensor:
    """Couplings between the two sides, (models, enumerated, summed)."""
    if problem.A is None:
        block: Any = cast("Any", problem.sparse)[side.enumerated][:, side.summed]
        return torch.from_numpy(np.asarray(block.toarray(), dtype=np.float64))[None]
    rows = torch.tensor(side.enumerated, device=problem.b.device)
    return problem.A[:, rows[:, None], torch.tensor(side.summed, device=problem.b.device)]


# Elimination


def _eliminate(problem: Problem, order: Sequence[int], chosen: slice) -> Tensor:
    fields, edges = problem.b[chosen], problem.edges
    weights = edges.weight[chosen].unbind(1)
    fields_of = fields.unbind(1)
    rank = [0] * problem.n
    for position, v in enumerate(order):
        rank[v] = position
    pairs: list[list[tuple[int, Tensor]]] = [[] for _ in range(problem.n)]
    for i, j, weight in zip(edges.i.tolist(), edges.j.tolist(), weights, strict=True):
        early, late = (i, j) if rank[i] < rank[j] else (j, i)
        pairs[early].append((late, weight))
    messages: list[list[Table]] = [[] for _ in range(problem.n)]
    done: list[Tensor] = []
    for v in order:
        scope, low, high = bucket(v, fields_of[v], pairs[v], messages[v], rank)
        table = sum_out(low, high)
        messages[v].clear()
        if scope:
            messages[scope[0]].append(Table(scope, table))
        else:
            done.append(table)
    return torch.stack(done).sum(0)


def exact_elimination(A: Any, b: Any = None, *, max_width: int = 22) -> LogPartition:
    """Log partition function by summing out one variable after the other, in a min-fill order.

    Takes chains, trees and narrow structures with thousands of spins, and sparse matrices without making them dense.

    Parameters
    ----------
    A : (n, n) or (models, n, n) couplings, NumPy, torch, SciPy sparse, or an object with ``problem``
    b : (n,) or (models, n) fields; None means zero
    max_width : refuse graphs with a larger induced width under the min-fill order; the largest table a model has
        2^(width + 1) entries, 67 MB at 22

    Returns
    -------
    LogPartition
        `value` in nats; `lower` and `upper` differ from it by rounding only. Differentiable in b and in every
        coupling that is not zero in all models of the batch.

    Raises
    ------
    InputError
        Where the predicted induced width exceeds `max_width` (before anything is allocated), or the model is
        malformed.

    Notes
    -----
    Bucket elimination, R. Dechter, Artificial Intelligence 113 (1999); spec section 3, ``exact_elimination``.

    Examples
    --------
    >>> from scipy import sparse
    >>> chain = sparse.diags_array([[0.8] * 999, [0.8] * 999], offsets=[1, -1])
    >>> round(exact_elimination(chain).value, 6)
    983.609987
    """
    started = perf_counter()
    problem = as_problem(A, b)
    ordering = _ordering(problem, max_width)
    if not ordering.complete:
        least = ordering.width
        raise InputError(
            f"exact_elimination: the induced width (min-fill) is at least {least}, above max_width = {max_width}: a"
            f" table of {_size(least + 1)} entries, {_gigabytes(least + 1, problem.models)}; use an estimate such as"
            " 'ais', 'belief_propagation' or 'modes'"
        )
    value = _by_groups(problem.models, 2 << ordering.width, lambda chosen: _eliminate(problem, ordering.order, chosen))
    return _certain(problem, "exact_elimination", value, started, width=ordering.width)


def _ordering(problem: Problem, limit: int) -> Ordering:
    # Before the lists of neighbours are made, which for a dense graph take longer than all the rest.
    width = least_width(problem.n, len(problem.edges.i))
    return Ordering([], width, False) if width > limit else min_fill(problem.neighbours, limit)


# Which of them


@dataclass(frozen=True)
class Cost:
    """What an exact method would take.

    Attributes
    ----------
    size : the number in the exponent: spins to enumerate, width of the grid, side of the RBM, induced width
    operations : elementary steps a model, about a nanosecond to five each; infinity beyond a float
    bytes : largest tables a model, at 8 bytes an entry; infinity beyond a float
    """

    size: int
    operations: float
    bytes: float


@dataclass(frozen=True)
class Structure:
    """A model's graph, as far as it decides which methods are exact and affordable.

    Attributes
    ----------
    n : number of spins
    edges : number of pairs that interact in any model of the batch
    is_forest : whether the graph has no cycle (belief propagation is then exact)
    sides : (enumerated, summed) spins where the graph is bipartite, the smaller side of every component first; or None
    grid : (rows, columns) where the couplings are those of a grid numbered row by row; or None
    induced_width : under the min-fill order; None above 30
    enumeration, transfer, rbm, elimination : predicted cost of each exact method, None where it does not apply
    """

    n: int
    edges: int
    is_forest: bool
    sides: tuple[int, int] | None
    grid: tuple[int, int] | None
    induced_width: int | None
    enumeration: Cost
    transfer: Cost | None
    rbm: Cost | None
    elimination: Cost | None


def _power(exponent: int | float) -> float:
    return 2.0**exponent if exponent < 1000 else math.inf


def structure(problem: Problem) -> Structure:
    """Look at a model's graph and predict what each exact method would cost.

    Parameters
    ----------
    problem : a checked model, or a batch of them (its graph is then the union of theirs)

    Returns
    -------
    Structure
        Found in milliseconds, also for a complete graph: nothing of exponential size is touched.

    Examples
    --------
    >>> import numpy as np
    >>> found = structure(as_problem(np.eye(6, k=1) + np.eye(6, k=-1)))
    >>> found.is_forest, found.sides, found.grid, found.induced_width
    (True, (3, 3), (6, 1), 1)
    """
    n, count = problem.n, len(problem.edges.i)
    i, j = problem.edges.i.cpu().numpy(), problem.edges.j.cpu().numpy()
    components = csgraph.connected_components(_graph(i, j, n), directed=False)[0]
    sides: tuple[int, int] | None = None
    rbm: Cost | None = None
    # A bipartite graph has at most n²/4 edges.
    coloured = _two_colouring(problem) if 4 * count <= n * n else (0, 0)
    if isinstance(coloured, list):
        small = sum(len(side.enumerated) for side in coloured)
        sides = small, n - small
        work = sum(_power(len(side.enumerated)) * len(side.summed) for side in coloured)
        largest = max(len(side.enumerated) for side in coloured)
        rbm = Cost(largest, work, 8.0 * _BLOCK)
    rows, cols, wrong = _grid_shape(problem)
    grid = None if wrong else (rows, cols)
    transfer = None if wrong else Cost(min(rows, cols), n * _power(min(rows, cols)), 32 * _power(min(rows, cols)))
    ordering = _ordering(problem, _WIDTH_CAP)
    width = ordering.width if ordering.complete else None
    return Structure(
        n=n,
        edges=count,
        is_forest=count == n - components,
        sides=sides,
        grid=grid,
        induced_width=width,
        enumeration=Cost(n, _power(n), 24 * _power(2 * n / 3)),
        transfer=transfer,
        rbm=rbm,
        elimination=None if width is None else Cost(width, n * _power(width + 1), 32 * _power(width + 1)),
    )
