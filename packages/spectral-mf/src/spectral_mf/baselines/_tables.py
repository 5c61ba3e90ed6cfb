"""Factor tables in log space and the order to eliminate variables in; what bucket and mini-bucket elimination share.

A table over the variables ``scope`` is a tensor (models, 2, ..., 2): index 0 stands for x = -1, index 1 for x = +1.
The structure is shared by all models of a batch, so that a whole bucket is one vectorised expression.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "Ordering",
    "Table",
    "add_tables",
    "bucket",
    "least_width",
    "log_add",
    "max_out",
    "min_fill",
    "spin_states",
    "sum_out",
]

# log(1 + e^x) equals x in float64 from here on.
_LINEAR = 40.0


class Table(NamedTuple):
    """Log values over the states of some variables.

    Attributes
    ----------
    scope : the variables, in the order of the dimensions of `values`
    values : (models, 2, ..., 2), a dimension a variable
    """

    scope: tuple[int, ...]
    values: Tensor


class Ordering(NamedTuple):
    """An order to eliminate variables in.

    Attributes
    ----------
    order : all variables, first eliminated first; short where `complete` is False
    width : the most neighbours a variable has when it goes (its table has 2^(width + 1) entries);
        where `complete` is False, what the order needs at least
    complete : whether the order goes through within the limit
    """

    order: list[int]
    width: int
    complete: bool


def spin_states(k: int, device: torch.device | None = None) -> Tensor:
    """All states of `k` spins, (2^k, k) of ±1 in float64; the first spin changes slowest."""
    bits = torch.arange(1 << k, device=device)[:, None] >> torch.arange(k - 1, -1, -1, device=device)
    return (2 * (bits & 1) - 1).to(torch.float64)


def log_add(low: Tensor, high: Tensor) -> Tensor:
    """Log of e^low + e^high for finite arguments of any size; twice differentiable where ``torch.logaddexp`` is not."""
    return low + functional.softplus(high - low, threshold=_LINEAR)


def sum_out(low: Tensor, high: Tensor, weight: float = 1.0) -> Tensor:
    """Sum a variable out of its two halves; `weight` w in (0, 1] gives Hölder's power sum w·log Σ e^{t/w}."""
    return low + weight * functional.softplus((high - low) / weight, threshold=_LINEAR)


def max_out(low: Tensor, high: Tensor) -> Tensor:
    """Maximise a variable out of its two halves."""
    return torch.maximum(low, high)


def _aligned(table: Table, scope: Sequence[int]) -> Tensor:
    """View a table so that it broadcasts over `scope`, which holds its variables in the same order."""
    held = set(table.scope)
    sizes = [2 if variable in held else 1 for variable in scope]
    return table.values.reshape(table.values.shape[0], *sizes)


def _union(scopes: Sequence[tuple[int, ...]], rank: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted({variable for scope in scopes for variable in scope}, key=rank.__getitem__))


def add_tables(tables: Sequence[Table], rank: Sequence[int]) -> Table:
    """Multiply factors (add their logs) over the union of their scopes.

    Parameters
    ----------
    tables : at least one, scopes sorted by `rank`
    rank : position of each variable in every scope
    """
    # Small ones first: only the last additions are then of full size.
    total, *rest = sorted(tables, key=lambda table: len(table.scope))
    for table in rest:
        scope = _union([total.scope, table.scope], rank)
        total = Table(scope, _aligned(total, scope) + _aligned(table, scope))
    return total


def _field(base: Tensor, couplings: Sequence[tuple[int, Tensor]]) -> Table:
    """Table of base + Σ_j A_j x_j, each of `base` and A_j (models,)."""
    values = base[:, None]
    for _, weight in couplings:
        step = weight[:, None]
        values = torch.stack([values - step, values + step], dim=-1).reshape(len(base), -1)
    shape = (len(base), *(2 for _ in couplings))
    return Table(tuple(variable for variable, _ in couplings), values.reshape(shape))


def bucket(
    variable: int,
    base: Tensor,
    couplings: Sequence[tuple[int, Tensor]],
    messages: Sequence[Table],
    rank: Sequence[int],
) -> tuple[tuple[int, ...], Tensor, Tensor]:
    """Multiply all factors that mention a variable, split at its two states.

    Parameters
    ----------
    variable : the one to eliminate
    base : (models,) its field in this bucket
    couplings : (other variable, (models,) coupling) of its pair factors
    messages : tables that mention it, scopes sorted by `rank`
    rank : position of each variable in every scope

    Returns
    -------
    scope : the other variables, sorted by `rank`
    low, high : (models, 2, ..., 2) log values over `scope` where the variable is -1 and +1
    """
    field = _field(base, sorted(couplings, key=lambda pair: rank[pair[0]]))
    if not messages:
        return field.scope, -field.values, field.values
    lows: list[Table] = []
    highs: list[Table] = []
    for scope, values in messages:
        at = scope.index(variable)
        low, high = values.unbind(at + 1)
        rest = scope[:at] + scope[at + 1 :]
        lows.append(Table(rest, low))
        highs.append(Table(rest, high))
    low = add_tables([*lows, Table(field.scope, -field.values)], rank)
    high = add_tables([*highs, field], rank)
    return low.scope, low.values, high.values


def least_width(n: int, edges: int) -> int:
    """Width that any order needs at least: a graph of treewidth w has at most w·n - w(w+1)/2 edges."""
    width = 0
    while edges > width * n - width * (width + 1) // 2:
        width += 1
    return width


def min_fill(neighbours: Sequence[Sequence[int]], limit: int) -> Ordering:
    """Order the variables so that each elimination joins as few new pairs as possible.

    Parameters
    ----------
    neighbours : for each variable, those it shares a factor with
    limit : stop as soon as no variable with at most `limit` neighbours is left

    Returns
    -------
    Ordering
        Ties go to the variable with fewer neighbours, then to the smaller index.
    """
    n = len(neighbours)
    least = least_width(n, sum(map(len, neighbours)) // 2)
    if least > limit:
        return Ordering([], least, False)
    around = [set(row) for row in neighbours]
    heap: list[tuple[int, int, int, int]] = []
    version = [0] * n
    gone = [False] * n

    def push(v: int) -> None:
        version[v] += 1
        mine = around[v]
        degree = len(mine)
        # Such a one cannot go yet, and counting the pairs around a hub would cost more than all the rest.
        if degree <= limit:
            fill = 0 if degree < 2 else (sum(len(mine - around[u]) for u in mine) - degree) // 2
            heapq.heappush(heap, (fill, degree, v, version[v]))

    for v in range(n):
        push(v)
    order: list[int] = []
    width = 0
    while heap:
        _, degree, v, stamp = heapq.heappop(heap)
        if gone[v] or stamp != version[v]:
            continue
        gone[v] = True
        order.append(v)
        width = max(width, degree)
        mine = around[v]
        touched = set(mine)
        for u in mine:
            around[u].discard(v)
        for u in mine:
            for w in mine - around[u]:
                if u < w:
                    # Who saw both ends apart now sees them joined.
                    touched |= around[u] & around[w]
                    around[u].add(w)
                    around[w].add(u)
        for u in touched:
            push(u)
    if len(order) < n:
        return Ordering(order, min(len(around[v]) for v in range(n) if not gone[v]), False)
    return Ordering(order, width, True)
