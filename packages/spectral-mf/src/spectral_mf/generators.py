"""Families of random models, the paper's among them, and the instances the tests know the answers of.

Sources: the recipe of the paper's experiment (complete graphs) and of Pabbaraju, Wang and Kolter, NeurIPS 2020
(Erdős-Rényi graphs); the others are the usual ones of the spin-glass and neural-network literature.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from shared_core.errors import InputError, no_such

__all__ = ["FAMILIES", "generate", "oracle_instance"]

_Model = tuple[np.ndarray, np.ndarray]


def generate(
    family: str, n: int, strength: float | int, seed: int | np.random.Generator, **options: Any
) -> tuple[Float[np.ndarray, "n n"], Float[np.ndarray, " n"]]:
    """Draw a model ``p(x) ∝ exp(½ xᵀAx + bᵀx)`` from a family.

    ==============  ================================================================  =================================
    Family          Couplings A_ij                                                    Fields b_i
    ==============  ================================================================  =================================
    complete        U(-2 strength, 2 strength) on every pair                          U(-field, field), field=1
    er              U(-2 strength/p, 2 strength/p) on pairs taken with p=0.5          U(-field, field), field=1
    grid            ±strength (couplings="pm"), U(-strength, strength) ("uniform")    ±field with random sign, field=0.1
                    or strength ("ferro") between neighbours on rows x cols
    sk              N(0, strength²/n) on every pair                                   field=0
    hopfield        strength/n Σ_p ξ_i ξ_j, patterns=max(1, n // 10) random ±1        field=0
    rbm             W/4, W ~ N(0, strength²), between n - hidden visible and hidden   those of 0/1 units without biases,
                    (n // 2) units, visible first                                     W1/4 and Wᵀ1/4
    ferromagnet     U(0, strength) on every pair                                      U(-field, field), field=1
    chain           strength between neighbours on a line                             field=0
    ==============  ================================================================  =================================

    Parameters
    ----------
    family : one of ``FAMILIES``
    n : number of spins, at least 1
    strength : size of the couplings, as in the table; the paper's cw, the inverse temperature of `sk` and `hopfield`
    seed : seed, or a generator to draw from
    **options : what the table names for the family: field, p, rows, cols, couplings, patterns, hidden. Without rows
        and cols a grid is as square as n allows.

    Returns
    -------
    A : (n, n) symmetric, zero diagonal
    b : (n,)

    Raises
    ------
    InputError
        An unknown family or option, or a value out of range.

    Notes
    -----
    The paper writes exp(θᵀx + xᵀA'x), A' = A/2, with entries U(-cw, cw): hence the 2 here. An RBM of 0/1 units also
    has a constant ΣW/4, which these two arrays do not carry.

    Examples
    --------
    >>> A, b = generate("chain", 3, 0.8, seed=0)
    >>> A.tolist(), b.tolist()
    ([[0.0, 0.8, 0.0], [0.8, 0.0, 0.8], [0.0, 0.8, 0.0]], [0.0, 0.0, 0.0])
    """
    if family not in _FAMILIES:
        raise no_such("family", family, FAMILIES)
    draw = _FAMILIES[family]
    allowed = [name for name, p in inspect.signature(draw).parameters.items() if p.kind is p.KEYWORD_ONLY]
    if unknown := sorted(options.keys() - set(allowed)):
        raise no_such("option", unknown[0], allowed, where=f"family '{family}'")
    if n < 1:
        raise InputError(f"n is {n}; a model has at least one spin")
    for name, value in {"strength": strength, "field": options.get("field", 0.0)}.items():
        if not math.isfinite(value):
            raise InputError(f"{name} is {value}; it must be finite")
    try:
        rng = np.random.default_rng(seed)
    except (TypeError, ValueError) as error:
        raise InputError(f"seed is {seed}; it must be a whole number from 0") from error
    return draw(n, float(strength), rng, **options)


def oracle_instance(n: int, c: float | int, f: float | int) -> tuple[Float[np.ndarray, "n n"], Float[np.ndarray, " n"]]:
    """Make a dense frustrated model without randomness.

    A_ij = c sin(1 + i + 2j + ij) for i < j, b_i = f cos(1 + 3i).

    Parameters
    ----------
    n : number of spins, at least 1
    c : size of the couplings
    f : size of the fields

    Returns
    -------
    A : (n, n) symmetric, zero diagonal
    b : (n,)

    Raises
    ------
    InputError
        n below 1.

    Examples
    --------
    >>> A, b = oracle_instance(2, 1.0, 0.5)
    >>> A.round(4).tolist(), b.round(4).tolist()
    ([[0.0, 0.1411], [0.1411, 0.0]], [0.2702, -0.3268])
    """
    if n < 1:
        raise InputError(f"n is {n}; a model has at least one spin")
    i, j = np.triu_indices(n, 1)
    return _symmetric(n, i, j, c * np.sin(1.0 + i + 2 * j + i * j)), f * np.cos(1.0 + 3 * np.arange(n))


def _symmetric(n: int, i: np.ndarray, j: np.ndarray, weight: np.ndarray) -> np.ndarray:
    A = np.zeros((n, n))
    A[i, j] = weight
    A[j, i] = weight
    return A


def _complete(n: int, strength: float, rng: np.random.Generator, *, field: float | int = 1.0) -> _Model:
    i, j = np.triu_indices(n, 1)
    A = _symmetric(n, i, j, 2 * strength * rng.uniform(-1, 1, len(i)))
    return A, field * rng.uniform(-1, 1, n)


def _er(n: int, strength: float, rng: np.random.Generator, *, p: float | int = 0.5, field: float | int = 1.0) -> _Model:
    if not 0 < p <= 1:
        raise InputError(f"p is {p}; the probability of an edge lies above 0 and up to 1")
    i, j = np.triu_indices(n, 1)
    present = rng.random(len(i)) < p
    A = _symmetric(n, i, j, present * (2 * strength / p) * rng.uniform(-1, 1, len(i)))
    return A, field * rng.uniform(-1, 1, n)


def _grid(
    n: int,
    strength: float,
    rng: np.random.Generator,
    *,
    rows: int | None = None,
    cols: int | None = None,
    couplings: Literal["pm", "uniform", "ferro"] = "pm",
    field: float | int = 0.1,
) -> _Model:
    if rows is None:
        side = math.isqrt(n) if cols is None else max(1, n // max(1, cols))
        rows = next(k for k in range(side, 0, -1) if n % k == 0) if cols is None else side
    cols = n // max(1, rows) if cols is None else cols
    if rows < 1 or cols < 1 or rows * cols != n:
        raise InputError(f"a grid of {rows} x {cols} has {rows * cols} spins, n is {n}; rows times cols must be n")
    spin = np.arange(n).reshape(rows, cols)
    i = np.concatenate([spin[:, :-1].ravel(), spin[:-1].ravel()])
    j = np.concatenate([spin[:, 1:].ravel(), spin[1:].ravel()])
    match couplings:
        case "pm":
            weight = strength * rng.choice([-1.0, 1.0], len(i))
        case "uniform":
            weight = strength * rng.uniform(-1, 1, len(i))
        case "ferro":
            weight = np.full(len(i), strength)
        case _:
            raise InputError(f"unknown couplings '{couplings}' of a grid; choose 'pm', 'uniform' or 'ferro'")
    return _symmetric(n, i, j, weight), field * rng.choice([-1.0, 1.0], n)


def _sk(n: int, strength: float, rng: np.random.Generator, *, field: float | int = 0.0) -> _Model:
    i, j = np.triu_indices(n, 1)
    A = _symmetric(n, i, j, strength / math.sqrt(n) * rng.standard_normal(len(i)))
    return A, np.full(n, float(field))


def _hopfield(
    n: int, strength: float, rng: np.random.Generator, *, patterns: int | None = None, field: float | int = 0.0
) -> _Model:
    count = max(1, n // 10) if patterns is None else patterns
    if count < 1:
        raise InputError(f"patterns is {count}; a Hopfield network stores at least one")
    P = rng.choice([-1.0, 1.0], (count, n))
    A = strength / n * P.T @ P
    np.fill_diagonal(A, 0.0)
    return A, np.full(n, float(field))


def _rbm(n: int, strength: float, rng: np.random.Generator, *, hidden: int | None = None) -> _Model:
    hidden = n // 2 if hidden is None else hidden
    if not 0 < hidden < n:
        raise InputError(f"{hidden} of {n} units are hidden; an RBM has at least one hidden and one visible unit")
    W = strength * rng.standard_normal((n - hidden, hidden))
    A = np.zeros((n, n))
    A[: n - hidden, n - hidden :] = W / 4
    A[n - hidden :, : n - hidden] = W.T / 4
    return A, A.sum(1)


def _ferromagnet(n: int, strength: float, rng: np.random.Generator, *, field: float | int = 1.0) -> _Model:
    if strength < 0:
        raise InputError(f"strength is {strength:g}; a ferromagnet's couplings are not negative")
    i, j = np.triu_indices(n, 1)
    return _symmetric(n, i, j, rng.uniform(0, strength, len(i))), field * rng.uniform(-1, 1, n)


def _chain(n: int, strength: float, rng: np.random.Generator, *, field: float | int = 0.0) -> _Model:
    del rng
    i = np.arange(n - 1)
    return _symmetric(n, i, i + 1, np.full(n - 1, strength)), np.full(n, float(field))


_FAMILIES: dict[str, Callable[..., _Model]] = {
    "complete": _complete,
    "er": _er,
    "grid": _grid,
    "sk": _sk,
    "hopfield": _hopfield,
    "rbm": _rbm,
    "ferromagnet": _ferromagnet,
    "chain": _chain,
}
FAMILIES = tuple(_FAMILIES)
