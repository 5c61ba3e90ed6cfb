"""Model files, data tables and the conversions between the conventions they are written in.

A model is always ``p(x) ∝ exp(½ xᵀAx + bᵀx + const)`` over x in {-1, 1}^n, each pair counted once. What a file holds is
brought to that form, so that log Z of what was read is log Z of what was written. Positions in messages (variables,
factors, entries, rows and columns of arrays) count from 0, tokens and lines of a file from 1.
"""

from __future__ import annotations

import csv
import io
import math
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy import sparse

from shared_core.errors import InputError
from shared_core.objects import one_line
from shared_core.runs import atomic_path
from spectral_mf._mat import LARGEST, MatFile, checked_csr, real_array

__all__ = [
    "ModelArrays",
    "factors_to_ising",
    "ising_to_qubo",
    "qubo_to_ising",
    "rbm_to_ising",
    "read_mar",
    "read_model",
    "read_pr",
    "read_spins",
    "write_mar",
    "write_model",
    "write_pr",
]

Coding = Literal["auto", "01", "pm1"]
_SYMMETRY = 1e-8
_DENSE_BELOW = 64
_DENSE_FROM = 0.2
# exp beyond this is no float, and UAI tables hold exp.
_LARGEST_EXPONENT = 700.0
_MISSING = ("", "NA", "N/A", "NaN", "nan", "null", "NULL", "None", "?", ".")
# How other programs call an RBM's weights, visible and hidden biases.
_RBM_NAMES = {
    "W": ("w", "weight", "weights"),
    "bv": ("bv", "b_v", "v_bias", "vbias", "visible_bias", "bias_v"),
    "bh": ("bh", "b_h", "h_bias", "hbias", "hidden_bias", "bias_h"),
}
_OPTIONS = {"evidence": ".uai", "floor": ".uai", "index": ".mat", "fields": ".csv"}


@dataclass(frozen=True, eq=False)
class ModelArrays:
    """A model as a file held it: ``p(x) ∝ exp(½ xᵀAx + bᵀx + const)``, x in {-1, 1}^n.

    Attributes
    ----------
    A : (n, n) float64 symmetric couplings, a `scipy.sparse.csr_array` where the file was a list of edges or factors,
        n > 64 and less than a fifth of A is non-zero
    b : (n,) float64 fields
    const : added to the energy of every state, and so to log Z
    rbm : (W, bv, bh) in 0/1 units, W (visible, hidden), where the file was an RBM; spins are visible then hidden
    log_partition : the true log Z (nats) the file claims, if it does
    variables : (n,) the file's number of each spin, where evidence took variables out of a UAI model
    evidence : the observed state of each variable that was taken out
    """

    A: np.ndarray | sparse.csr_array
    b: np.ndarray
    const: float | int = 0.0
    rbm: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
    log_partition: float | None = None
    variables: np.ndarray | None = None
    evidence: dict[int, int] = field(default_factory=dict[int, int])

    @property
    def n(self) -> int:
        """Number of spins."""
        return len(self.b)


def rbm_to_ising(
    W: ArrayLike, bv: ArrayLike, bh: ArrayLike
) -> tuple[Float[np.ndarray, "n n"], Float[np.ndarray, " n"], float]:
    """Turn a restricted Boltzmann machine with 0/1 units into an Ising model with the same log Z.

    The machine is ``p(v, h) ∝ exp(vᵀWh + bvᵀv + bhᵀh)``.

    Parameters
    ----------
    W : (visible, hidden) weights
    bv : (visible,) biases of the visible units
    bh : (hidden,) biases of the hidden units

    Returns
    -------
    A : (visible + hidden,) squared couplings, visible spins first
    b : (visible + hidden,) fields
    const : what to add to log Z

    Raises
    ------
    InputError
        Shapes that do not fit together (W transposed, above all), or an entry that is not finite.

    Notes
    -----
    With v = (1 + x)/2: couplings W/4, fields bv/2 + W1/4 and bh/2 + Wᵀ1/4, constant Σbv/2 + Σbh/2 + ΣW/4.

    Examples
    --------
    >>> A, b, const = rbm_to_ising([[4.0], [0.0]], [1.0, 0.0], [0.0])
    >>> A[0].tolist(), b.tolist(), const
    ([0.0, 0.0, 1.0], [1.5, 0.0, 1.0], 1.5)
    """
    return _rbm_to_ising("", *_rbm_arrays("", W, bv, bh))


def _rbm_arrays(where: str, W: Any, bv: Any, bh: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    weights, visible, hidden = (real_array(where, name, value) for name, value in (("W", W), ("bv", bv), ("bh", bh)))
    # MATLAB and many a script keep biases as one row or one column.
    visible, hidden = (bias.ravel() if bias.ndim == 2 and 1 in bias.shape else bias for bias in (visible, hidden))
    if weights.ndim != 2 or 0 in weights.shape or visible.ndim != 1 or hidden.ndim != 1:
        raise InputError(
            f"{where}W must be (visible, hidden), bv (visible,) and bh (hidden,), got {weights.shape},"
            f" {visible.shape}, {hidden.shape}"
        )
    biases = (len(visible), len(hidden))
    if weights.shape != biases:
        advice = "W is transposed: pass W.T" if weights.shape == biases[::-1] else "W must be (visible, hidden)"
        raise InputError(
            f"{where}W is {weights.shape} but there are {biases[0]} visible and {biases[1]} hidden biases; {advice}"
        )
    return weights, visible, hidden


def _rbm_to_ising(where: str, W: np.ndarray, bv: np.ndarray, bh: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    visible, hidden = W.shape
    _refuse_too_large(where, (visible + hidden) ** 2)
    A = np.zeros((visible + hidden, visible + hidden))
    A[:visible, visible:] = W / 4
    A[visible:, :visible] = W.T / 4
    b = np.concatenate([bv / 2 + W.sum(1) / 4, bh / 2 + W.sum(0) / 4])
    return A, b, float(bv.sum() / 2 + bh.sum() / 2 + W.sum() / 4)


def qubo_to_ising(
    Q: ArrayLike, c: ArrayLike | None = None
) -> tuple[Float[np.ndarray, "n n"], Float[np.ndarray, " n"], float]:
    """Turn ``p(x) ∝ exp(xᵀQx + cᵀx)`` over x in {0, 1}^n into an Ising model with the same log Z.

    The sign is that of a log probability: a QUBO that is to be minimised goes in as -Q, -c.

    Parameters
    ----------
    Q : (n, n) symmetric or triangular. Its diagonal counts as linear, because x_i² = x_i.
    c : (n,) linear terms; None means zero

    Returns
    -------
    A : (n, n) couplings
    b : (n,) fields
    const : what to add to log Z

    Raises
    ------
    InputError
        Q that is not square, or neither symmetric nor triangular; c of another length; an entry that is not finite.

    Notes
    -----
    With Q symmetric and zero on its diagonal: A = Q/2, b = c/2 + Q1/2, constant Σc/2 + ΣQ/4.

    Examples
    --------
    >>> A, b, const = qubo_to_ising([[1.0, 4.0], [0.0, 0.0]])
    >>> A.tolist(), b.tolist(), const
    ([[0.0, 1.0], [1.0, 0.0]], [1.5, 1.0], 1.5)
    """
    quadratic = real_array("", "Q", Q)
    if quadratic.ndim != 2 or quadratic.shape[0] != quadratic.shape[1] or quadratic.size == 0:
        raise InputError(f"Q must be (n, n) with n at least 1, got {quadratic.shape}")
    linear = np.zeros(len(quadratic)) if c is None else real_array("", "c", c)
    if linear.shape != (len(quadratic),):
        raise InputError(f"c must have length n = {len(quadratic)}, got shape {linear.shape}")
    triangular = not np.tril(quadratic, -1).any() or not np.triu(quadratic, 1).any()
    if not triangular and (bad := _asymmetric(quadratic)) is not None:
        i, j = bad
        raise InputError(
            f"Q[{i},{j}]={quadratic[i, j]:g} but Q[{j},{i}]={quadratic[j, i]:g}; give Q symmetric or triangular"
            " (if xᵀQx is what you mean, pass (Q + Q.T) / 2)"
        )
    linear = linear + np.diag(quadratic)
    quadratic = (quadratic + quadratic.T) / 2
    np.fill_diagonal(quadratic, 0.0)
    const = linear.sum() / 2 + quadratic.sum() / 4
    return quadratic / 2, linear / 2 + quadratic.sum(1) / 2, float(const)


def ising_to_qubo(
    A: ArrayLike, b: ArrayLike | None = None, const: float | int = 0.0
) -> tuple[Float[np.ndarray, "n n"], Float[np.ndarray, " n"], float]:
    """Turn an Ising model into ``exp(xᵀQx + cᵀx + const)`` over x in {0, 1}^n with the same log Z.

    Parameters
    ----------
    A : (n, n) symmetric couplings; half the trace goes to the constant
    b : (n,) fields; None means zero
    const : constant of the Ising model

    Returns
    -------
    Q : (n, n) symmetric, zero diagonal
    c : (n,) linear terms
    const : constant of the 0/1 model

    Raises
    ------
    InputError
        As :func:`write_model` for A and b.

    Examples
    --------
    >>> Q, c, const = ising_to_qubo([[0.0, 1.0], [1.0, 0.0]], [1.5, 1.0], 1.5)
    >>> Q.tolist(), c.tolist(), const
    ([[0.0, 2.0], [2.0, 0.0]], [1.0, 0.0], 0.0)
    """
    couplings, fields, const = _off_diagonal(_couplings_checked("", A), b, const, "")
    dense = _dense(couplings)
    degree = dense.sum(1)
    return 2 * dense, 2 * (fields - degree), float(const - fields.sum() + degree.sum() / 2)


@dataclass(frozen=True, eq=False)
class _Factors:
    """Factors laid out flat: `scope` holds all scopes one after the other, `values` all tables."""

    cardinality: np.ndarray
    arity: np.ndarray
    scope: np.ndarray
    values: np.ndarray
    value_start: np.ndarray


def factors_to_ising(
    cardinalities: Sequence[int],
    scopes: Sequence[Sequence[int]],
    tables: Sequence[ArrayLike],
    *,
    evidence: Mapping[int, int] | None = None,
    floor: float | int | None = None,
) -> ModelArrays:
    """Turn a product of non-negative tables over binary variables into an Ising model with the same log Z.

    State 0 becomes spin -1, state 1 becomes +1. Evidence comes first, so that what it fixes may have any number of
    states, and a factor of three variables is fine when one of them is observed.

    Parameters
    ----------
    cardinalities : number of states of each variable
    scopes : the variables of each factor
    tables : for each factor its values, the last variable of the scope changing fastest
    evidence : observed variables and their states; they leave the model
    floor : raise table entries below this to it; None refuses a zero, whose logarithm is infinite

    Returns
    -------
    ModelArrays
        `variables` says which spin is which variable, where evidence took some out.

    Raises
    ------
    InputError
        A variable without two states, a factor of more than two variables (after evidence), a table of the wrong
        size, an entry that is negative, not finite, or zero without a floor.

    Notes
    -----
    With L = log table: coupling (L00 + L11 - L01 - L10)/4, fields (∓L00 ∓ L01 ± L10 ± L11)/4, constant ΣL/4; for one
    variable field (L1 - L0)/2 and constant (L0 + L1)/2.

    Examples
    --------
    >>> model = factors_to_ising([2, 2], [[0, 1], [0]], [[1.0, 1.0, 1.0, 3.0], [0.5, 0.5]])
    >>> round(float(model.A[0, 1]), 4), model.b.round(4).tolist()
    (0.2747, [0.2747, 0.2747])
    """
    if len(scopes) != len(tables):
        raise InputError(f"there are {len(scopes)} scopes but {len(tables)} tables; give one table a scope")
    flat = [real_array("", f"table {k}", table).ravel() for k, table in enumerate(tables)]
    cardinality = np.array(cardinalities, dtype=np.int64).reshape(-1)
    arity = np.array([len(scope) for scope in scopes], dtype=np.int64)
    scope = np.array([variable for scope in scopes for variable in scope], dtype=np.int64)
    _check_cardinalities("", cardinality)
    sizes = _table_sizes("", cardinality, arity, scope)
    for k, (table, size) in enumerate(zip(flat, sizes, strict=True)):
        if len(table) != size:
            raise InputError(f"factor {k} has {len(table)} table entries, its variables make {size:.0f}")
    values = np.concatenate([np.empty(0), *flat])
    start = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    return _condition(_Factors(cardinality, arity, scope, values, start), dict(evidence or {}), floor, "")


def _check_cardinalities(where: str, cardinality: np.ndarray) -> None:
    if len(cardinality) == 0:
        raise InputError(f"{where}there are no variables: a model has at least one")
    if (bad := np.flatnonzero(cardinality < 1)).size:
        raise InputError(f"{where}variable {bad[0]} has {cardinality[bad[0]]} states; it must have at least one")


def _table_sizes(where: str, cardinality: np.ndarray, arity: np.ndarray, scope: np.ndarray) -> np.ndarray:
    """Return how many entries each factor's table has, as floats, which a hostile file cannot overflow."""
    owner = np.repeat(np.arange(len(arity)), arity)
    outside = (scope < 0) | (scope >= len(cardinality))
    if outside.any():
        at = int(np.argmax(outside))
        raise InputError(
            f"{where}factor {owner[at]} names variable {scope[at]}; there are variables 0 to {len(cardinality) - 1}"
        )
    order = np.lexsort((scope, owner))
    twice = (np.diff(owner[order]) == 0) & (np.diff(scope[order]) == 0)
    if twice.any():
        at = order[int(np.argmax(twice))]
        raise InputError(f"{where}factor {owner[at]} names variable {scope[at]} twice; name each variable once")
    sizes = np.ones(len(arity))
    with np.errstate(over="ignore"):
        np.multiply.at(sizes, owner, cardinality[scope].astype(np.float64))
    return sizes


def _check_evidence(where: str, cardinality: np.ndarray, evidence: Mapping[int, int]) -> np.ndarray:
    states = np.full(len(cardinality), -1, dtype=np.int64)
    for variable, state in evidence.items():
        if not 0 <= variable < len(cardinality):
            raise InputError(
                f"{where}evidence names variable {variable}; there are variables 0 to {len(cardinality) - 1}"
            )
        if not 0 <= state < cardinality[variable]:
            raise InputError(
                f"{where}evidence puts variable {variable} in state {state}; its states are 0 to"
                f" {cardinality[variable] - 1}"
            )
        states[variable] = state
    return states


def _condition(factors: _Factors, evidence: dict[int, int], floor: float | int | None, where: str) -> ModelArrays:
    if floor is not None and not (0 < floor < math.inf):
        raise InputError(f"floor is {floor}; it must be positive and finite, 1e-12 for instance")
    bad = ~(np.isfinite(factors.values) & (factors.values >= 0))
    if bad.any():
        at = int(np.argmax(bad))
        factor, entry = _entry(factors, at)
        raise InputError(
            f"{where}factor {factor}, entry {entry} is {factors.values[at]:g}; table entries are finite and not"
            " negative (if these are logarithms, take exp)"
        )
    states = _check_evidence(where, factors.cardinality, evidence)
    free = states < 0
    if (wrong := np.flatnonzero(free & (factors.cardinality != 2))).size:
        owner = np.repeat(np.arange(len(factors.arity)), factors.arity)[factors.scope == wrong[0]]
        seen = f" (factor {owner[0]} has it)" if len(owner) else ""
        raise InputError(
            f"{where}variable {wrong[0]} has {factors.cardinality[wrong[0]]} states{seen}; only variables of two"
            " states can be left unobserved"
        )
    variables = np.flatnonzero(free)
    if len(variables) == 0:
        raise InputError(f"{where}evidence fixes all {len(states)} variables; leave at least one unobserved")
    spin = np.cumsum(free) - 1
    b, const = np.zeros(len(variables)), 0.0
    edges: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for scope, index in _free_entries(factors, states, where):
        L = _log_entries(factors, index, floor, where)
        spins = spin[scope]
        const += float(L.mean(1).sum())
        if scope.shape[1] == 1:
            b += np.bincount(spins[:, 0], (L[:, 1] - L[:, 0]) / 2, len(b))
        elif scope.shape[1] == 2:
            b += np.bincount(spins[:, 0], (L[:, 2] + L[:, 3] - L[:, 0] - L[:, 1]) / 4, len(b))
            b += np.bincount(spins[:, 1], (L[:, 1] + L[:, 3] - L[:, 0] - L[:, 2]) / 4, len(b))
            edges.append((spins[:, 0], spins[:, 1], (L[:, 0] + L[:, 3] - L[:, 1] - L[:, 2]) / 4))
    i, j, weight = (np.concatenate(part) for part in zip(*edges, strict=True)) if edges else (np.empty(0, int),) * 3
    A = _couplings(len(b), i, j, weight)
    return ModelArrays(A, b, const, variables=variables if evidence else None, evidence=evidence)


def _free_entries(factors: _Factors, states: np.ndarray, where: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """For factors with 0, 1 and 2 unobserved variables: those variables, and where the entries left to them are."""
    start = np.cumsum(factors.arity) - factors.arity
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for arity in np.unique(factors.arity):
        rows = np.flatnonzero(factors.arity == arity)
        scope = factors.scope[start[rows, None] + np.arange(arity)]
        state = states[scope]
        count = (state < 0).sum(1)
        if (count > 2).any():
            at = int(np.argmax(count > 2))
            names = ", ".join(map(str, scope[at][state[at] < 0][:10]))
            raise InputError(
                f"{where}factor {rows[at]} joins {count[at]} unobserved variables ({names}); an Ising model has"
                " factors of at most two"
            )
        stride = np.ones_like(scope)
        stride[:, :-1] = np.cumprod(factors.cardinality[scope][:, :0:-1], axis=1)[:, ::-1]
        base = factors.value_start[rows] + (np.maximum(state, 0) * stride).sum(1)
        order = np.argsort(state >= 0, axis=1, kind="stable")
        for free in range(3):
            chosen = np.flatnonzero(count == free)
            if len(chosen) == 0:
                continue
            columns = order[chosen, :free]
            steps = np.take_along_axis(stride[chosen], columns, axis=1)
            bits = np.array([[value >> (free - 1 - k) & 1 for k in range(free)] for value in range(2**free)])
            found.append(
                (
                    np.take_along_axis(scope[chosen], columns, axis=1),
                    base[chosen, None] + steps @ bits.reshape(2**free, free).T.astype(np.int64),
                )
            )
    return found


def _log_entries(factors: _Factors, index: np.ndarray, floor: float | int | None, where: str) -> np.ndarray:
    values = factors.values[index]
    if floor is not None:
        return np.log(np.maximum(values, floor))
    if not values.all():
        factor, entry = _entry(factors, int(index[values == 0].min()))
        raise InputError(
            f"{where}factor {factor}, entry {entry} is zero, which no finite coupling gives; pass a floor"
            " (--floor 1e-12) to replace zeros"
        )
    return np.log(values)


def _entry(factors: _Factors, at: int) -> tuple[int, int]:
    factor = int(np.searchsorted(factors.value_start, at, side="right")) - 1
    return factor, at - int(factors.value_start[factor])


def _couplings(n: int, i: np.ndarray, j: np.ndarray, weight: np.ndarray) -> np.ndarray | sparse.csr_array:
    rows, columns = np.concatenate([i, j]).astype(np.int64), np.concatenate([j, i]).astype(np.int64)
    entries = np.tile(weight, 2).astype(np.float64)
    matrix: Any = sparse.csr_array(sparse.coo_array((entries, (rows, columns)), shape=(n, n)))
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    return _thin(matrix)


def _thin(A: np.ndarray | sparse.csr_array) -> np.ndarray | sparse.csr_array:
    """Keep sparse only what gains by it."""
    if isinstance(A, np.ndarray):
        return A
    n = A.shape[0]
    return A.toarray() if n <= _DENSE_BELOW or A.nnz >= _DENSE_FROM * n * n else A


def _dense(A: np.ndarray | sparse.csr_array) -> np.ndarray:
    if isinstance(A, np.ndarray):
        return A
    _refuse_too_large("", A.shape[0] ** 2)
    return A.toarray()


def _refuse_too_large(where: str, entries: int) -> None:
    if entries * 8 > LARGEST:
        raise InputError(
            f"{where}this takes {entries * 8e-9:.3g} GB as a dense array, more than the {LARGEST * 1e-9:.3g} GB"
            " allowed; give the couplings as an edge list or a sparse matrix"
        )


def _asymmetric(A: np.ndarray) -> tuple[int, int] | None:
    gap = np.abs(A - A.T)
    at = int(np.argmax(gap))
    i, j = divmod(at, A.shape[1])
    return (i, j) if gap[i, j] > _SYMMETRY * np.abs(A).max(initial=0.0) else None


def _couplings_checked(where: str, A: Any) -> np.ndarray | sparse.csr_array:
    if sparse.issparse(A):
        matrix: Any = sparse.csr_array(cast("Any", A), dtype=np.float64, copy=True)
        matrix.sum_duplicates()
        shape: tuple[int, ...] = matrix.shape
    else:
        matrix = real_array(where, "A", A)
        shape = matrix.shape
    if len(shape) != 2 or shape[0] != shape[1]:
        raise InputError(f"{where}A must be (n, n), one model, got shape {shape}")
    if shape[0] == 0:
        raise InputError(f"{where}A is empty: a model has at least one spin")
    if isinstance(matrix, np.ndarray):
        place = _asymmetric(matrix)
    else:
        data = np.asarray(matrix.data, dtype=np.float64)
        if not np.isfinite(data).all():
            at = int(np.argmin(np.isfinite(data)))
            i, j = int(np.searchsorted(matrix.indptr, at, side="right")) - 1, int(matrix.indices[at])
            raise InputError(f"{where}A[{i},{j}] is {data[at]}; every entry must be finite")
        gap: Any = abs(matrix - matrix.T).tocoo()
        wrong = gap.data > _SYMMETRY * np.abs(data).max(initial=0.0)
        place = tuple(int(c[np.argmax(wrong)]) for c in gap.coords) if wrong.any() else None
    if place is not None:
        i, j = place
        raise InputError(
            f"{where}A[{i},{j}]={matrix[i, j]:g} but A[{j},{i}]={matrix[j, i]:g}; couplings are symmetric: average A"
            " with its transpose if that is what you mean"
        )
    return matrix


def _fields_checked(where: str, b: Any, n: int) -> np.ndarray:
    if b is None:
        return np.zeros(n)
    fields = real_array(where, "b", b)
    fields = fields.ravel() if fields.ndim == 2 and 1 in fields.shape else fields
    if fields.shape != (n,):
        raise InputError(f"{where}b must have length n = {n}, as A says, got shape {fields.shape}")
    return fields


def _scalar(where: str, name: str, value: Any) -> float:
    array = real_array(where, name, value)
    if array.size != 1:
        raise InputError(f"{where}{name} must be one number, got shape {array.shape}")
    return float(array.reshape(-1)[0])


def _off_diagonal(
    A: np.ndarray | sparse.csr_array, b: Any, const: float | int, where: str
) -> tuple[np.ndarray | sparse.csr_array, np.ndarray, float]:
    """Move the diagonal into the constant, because x_i² = 1, and average out rounding."""
    fields = _fields_checked(where, b, cast("tuple[int, int]", A.shape)[0])
    diagonal = np.asarray(A.diagonal(), dtype=np.float64)
    if isinstance(A, np.ndarray):
        matrix: Any = (A + A.T) / 2
        np.fill_diagonal(matrix, 0.0)
    else:
        matrix = sparse.csr_array((A + A.T) / 2 - sparse.diags_array(diagonal))
        matrix.eliminate_zeros()
    return matrix, fields, _scalar(where, "const", const) + float(diagonal.sum()) / 2


def read_model(
    path: str | Path,
    *,
    evidence: str | Path | Mapping[int, int] | None = None,
    floor: float | int | None = None,
    index: Sequence[int] | None = None,
    fields: str | Path | None = None,
) -> ModelArrays:
    r"""Read a model; the ending of the name says what the file is.

    ``.npz``
        ``A`` (n, n), ``b`` (n,) and perhaps ``const`` and ``log_partition``; or an RBM ``W``, ``bv``, ``bh``; or a
        matrix as ``scipy.sparse.save_npz`` writes it, with or without ``b`` and ``const``. No pickles.
    ``.csv``
        Rows ``i,j,weight``, nodes numbered from 0 without a gap, each pair once; ``i,i,field`` gives a field and
        ``const,,value`` the constant. A header is optional.
    ``.uai``
        MARKOV or BAYES networks of the UAI competitions, binary, at most two variables a factor after evidence.
    ``.mat``
        ``A`` and ``h`` (or ``b``), perhaps ``logZ``. The paper's data set has ``A`` (n, n, strengths, instances).
    ``.safetensors``
        ``W``, ``bv``, ``bh`` or ``A``, ``b`` and perhaps ``const``.

    Parameters
    ----------
    path : the file
    evidence : UAI only: a ``.evid`` file, a mapping from variable to state, or ``"auto"``: the file's own name with
        ``.evid`` added, if there is one. Observed variables leave the model.
    floor : UAI only: table entries below it become it; None refuses zeros
    index : MAT only: which model of an array of models, from 0: (strength, instance) in the paper's data set
    fields : CSV only: a second file with rows ``i,field``

    Returns
    -------
    ModelArrays

    Raises
    ------
    InputError
        One line that names the file, the place in it, what was found and what to do.
    FileNotFoundError, PermissionError
        As the operating system has it, with the path.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "pair.csv"
    >>> _ = path.write_text("i,j,weight\n0,1,0.5\n1,1,-2\n")
    >>> model = read_model(path)
    >>> model.A.tolist(), model.b.tolist()
    ([[0.0, 0.5], [0.5, 0.0]], [0.0, -2.0])
    """
    path = Path(path)
    readers: dict[str, Callable[[bytes], ModelArrays]] = {
        ".npz": lambda data: _read_npz_model(path, data),
        ".csv": lambda data: _read_edges(path, data, fields),
        ".uai": lambda data: _read_uai(path, data, evidence, floor),
        ".mat": lambda data: _read_mat(path, data, index),
        ".safetensors": lambda data: _read_safetensors(path, data),
    }
    ending = path.suffix.lower()
    if ending not in readers and not _is_directory(path):
        raise InputError(f"{path}: cannot tell what '{path.suffix}' is; give one of {', '.join(readers)}")
    # "auto" asks for evidence only if there is any, and only a UAI file can have some.
    given = {"evidence": evidence if evidence != "auto" else None, "floor": floor, "index": index, "fields": fields}
    for name, owner in _OPTIONS.items():
        if given[name] is not None and ending != owner:
            raise InputError(f"{path}: {name} is for {owner} files; leave it out")
    return readers.get(ending, readers[".npz"])(_read_bytes(path))


def _is_directory(path: Path) -> bool:
    # A name too long for the system is no directory either, but raises.
    try:
        return path.is_dir()
    except OSError:
        return False


def _read_bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except IsADirectoryError as error:
        raise InputError(f"{path} is a directory; give a file") from error
    except (FileNotFoundError, PermissionError, NotADirectoryError):
        raise
    except (OSError, MemoryError) as error:
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not data.strip():
        raise InputError(f"{path} is empty; give a file with content")
    return data


def _decode(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start + 1} is not UTF-8 text; save the file as UTF-8") from error


def _assemble(path: Path, arrays: Mapping[str, Any]) -> ModelArrays:
    """Make a model of named arrays: an RBM, or couplings with fields."""
    where = f"{path}: "
    arrays = _with_usual_names(arrays)
    log_partition = _scalar(where, "log_partition", arrays["log_partition"]) if "log_partition" in arrays else None
    if {"W", "bv", "bh"} <= arrays.keys():
        if "A" in arrays:
            raise InputError(f"{where}holds both A and an RBM (W, bv, bh); keep one of them")
        rbm = _rbm_arrays(where, arrays["W"], arrays["bv"], arrays["bh"])
        couplings, fields, shift = _rbm_to_ising(where, *rbm)
        const = shift + _scalar(where, "const", arrays.get("const", 0.0))
        return ModelArrays(couplings, fields, const, rbm=rbm, log_partition=log_partition)
    others = sorted(arrays.keys() - {"A", "const", "log_partition"})
    # A lone A is a model without fields; beside an array of another name, that one is probably the fields.
    if "A" not in arrays or ("b" not in arrays and others):
        found = ", ".join(f"{name} {np.shape(array)}" for name, array in sorted(arrays.items())[:10]) or "nothing"
        raise InputError(f"{where}needs arrays A and b, or W, bv and bh (an RBM); found {found}")
    A = _couplings_checked(where, arrays["A"])
    b = _fields_checked(where, arrays.get("b"), cast("tuple[int, int]", A.shape)[0])
    const = _scalar(where, "const", arrays.get("const", 0.0))
    return ModelArrays(_thin(A), b, const, log_partition=log_partition)


def _with_usual_names(arrays: Mapping[str, Any]) -> Mapping[str, Any]:
    """Call an RBM's arrays W, bv and bh under whatever common names they come, W turned if its shape says so."""
    if _RBM_NAMES.keys() <= arrays.keys():
        return arrays
    found: dict[str, Any] = {}
    for name, others in _RBM_NAMES.items():
        matches = [key for key in arrays if key.rsplit(".", 1)[-1].lower() in others]
        if len(matches) != 1:
            return arrays
        found[name] = arrays[matches[0]]
    shape, visible, hidden = np.shape(found["W"]), np.shape(found["bv"]), np.shape(found["bh"])
    if len(shape) == 2 and len(visible) == len(hidden) == 1 and shape == (*hidden, *visible) != (*visible, *hidden):
        found["W"] = np.asarray(found["W"]).T
    return {**{key: value for key, value in arrays.items() if key in ("A", "const", "log_partition")}, **found}


def _npz_arrays(path: Path, data: bytes) -> dict[str, np.ndarray]:
    # zipfile and its decompressors meet damaged bytes with a dozen kinds of exception.
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            if (total := sum(member.file_size for member in members)) > LARGEST:
                raise InputError(f"{path} unpacks to {total * 1e-9:.3g} GB; at most {LARGEST * 1e-9:.3g} are read")
            raw = {
                member.filename.removesuffix(".npy"): archive.read(member)
                for member in members
                if member.filename.endswith(".npy")
            }
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path} is not a readable NPZ file: {one_line(error)}") from error
    return {name: _npy_array(path, name, content) for name, content in raw.items()}


def _npy_array(path: Path, name: str, content: bytes) -> np.ndarray:
    stream = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise InputError(f"{path}: array '{name}' is in version {version} of the format; save plain numbers")
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = reader(stream)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path}: array '{name}' is damaged: {one_line(error)}") from error
    if dtype.hasobject:
        raise InputError(f"{path}: array '{name}' holds Python objects, which are never unpickled; save numbers")
    body = content[stream.tell() :]
    expected = math.prod(shape) * dtype.itemsize
    if expected != len(body) or any(length < 0 for length in shape) or dtype.itemsize == 0:
        raise InputError(
            f"{path}: array '{name}' declares {dtype} {shape}, {expected} bytes, but {len(body)} are there; the file"
            " is truncated or damaged"
        )
    return np.frombuffer(body, dtype).reshape(shape, order="F" if fortran else "C")


def _read_npz_model(path: Path, data: bytes) -> ModelArrays:
    arrays: dict[str, Any] = dict(_npz_arrays(path, data))
    if {"data", "indices", "indptr", "shape"} <= arrays.keys():
        form = np.asarray(arrays.get("format", "csr")).reshape(-1)[:1].tolist()
        # Of a symmetric matrix both compressed forms are the same, so one reader does.
        if form not in (["csr"], ["csc"], [b"csr"], [b"csc"]):
            raise InputError(f"{path}: the sparse matrix is not in CSR form; save it with A.tocsr()")
        kept = {name: arrays[name] for name in ("b", "const", "log_partition") if name in arrays}
        A = checked_csr(f"{path}: ", arrays["data"], arrays["indices"], arrays["indptr"], arrays["shape"])
        return _assemble(path, kept | {"A": A})
    return _assemble(path, arrays)


def _read_safetensors(path: Path, data: bytes) -> ModelArrays:
    from safetensors import numpy as safetensors

    # Anything from a bad header to a type NumPy does not know (bfloat16).
    try:
        arrays = safetensors.load(data)
    except Exception as error:
        raise InputError(
            f"{path} is not a readable safetensors file of float16, float32 or float64 arrays: {one_line(error)}"
        ) from error
    return _assemble(path, arrays)


def _read_mat(path: Path, data: bytes, index: Sequence[int] | None) -> ModelArrays:
    where = f"{path}: "
    if data.startswith(b"\x89HDF") or b"MATLAB 7.3" in data[:128]:
        raise InputError(f"{where}a MATLAB 7.3 (HDF5) file; save it with save(name, 'A', 'h', '-v7')")
    order = {b"IM": "<", b"MI": ">"}.get(data[126:128])
    if order is None:
        raise InputError(f"{where}not a MATLAB file of version 5 to 7.2; save it with save(name, 'A', 'h', '-v7')")
    wanted = ("A", "h", "b", "logZ")
    arrays = {name: value for name, value in MatFile(where, order).arrays(data[128:]) if name in wanted}
    if unusable := [name for name, value in arrays.items() if value is None]:
        raise InputError(f"{where}{unusable[0]} is no array of real numbers; save it as one")
    names = [name for name in ("h", "b") if name in arrays]
    if "A" not in arrays or len(names) != 1:
        found = ", ".join(f"{name} {np.shape(array)}" for name, array in sorted(arrays.items())) or "none of them"
        raise InputError(f"{where}needs arrays A and h (or b); found {found}")
    couplings, fields = arrays["A"], np.asarray(arrays[names[0]])
    dimensions: tuple[int, ...] = couplings.shape[2:]
    at = _mat_index(where, dimensions, index)
    if dimensions:
        expected = (couplings.shape[0], *dimensions)
        if fields.shape != expected:
            raise InputError(f"{where}A is {couplings.shape}, so {names[0]} must be {expected}, got {fields.shape}")
        couplings, fields = couplings[(slice(None), slice(None), *at)], fields[(slice(None), *at)]
    A = _thin(_couplings_checked(where, couplings))
    b = _fields_checked(where, fields, cast("tuple[int, int]", A.shape)[0])
    if "logZ" not in arrays:
        return ModelArrays(A, b)
    true = np.asarray(arrays["logZ"])
    if dimensions and true.shape != dimensions and true.size != math.prod(dimensions):
        raise InputError(f"{where}A holds {dimensions} models, logZ {true.shape}; they must agree")
    log_partition = true.reshape(dimensions)[at] if dimensions else true
    return ModelArrays(A, b, log_partition=_scalar(where, "logZ", log_partition))


def _mat_index(where: str, dimensions: tuple[int, ...], index: Sequence[int] | None) -> tuple[int, ...]:
    at = tuple(index or ())
    what = "strength, instance" if len(dimensions) == 2 else ", ".join(f"k{axis}" for axis in range(len(dimensions)))
    limits = " and ".join(map(str, dimensions))
    if len(at) != len(dimensions):
        if not dimensions:
            raise InputError(f"{where}holds one model; leave index out")
        raise InputError(f"{where}holds {limits} models; pass index=({what}), from 0 and below {limits}")
    if any(not 0 <= k < limit for k, limit in zip(at, dimensions, strict=True)):
        raise InputError(f"{where}index {at} is out of range; ({what}) run from 0 and stay below {limits}")
    return at


def _csv_rows(path: Path, data: bytes) -> list[tuple[int, list[str]]]:
    """Split a text table into (line number, cells), blank lines left out."""
    text = _decode(path, data)
    first = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = next((mark for mark in ",;\t" if mark in first), None)
    if delimiter is None:
        rows = [(number, line.split()) for number, line in enumerate(text.splitlines(), 1)]
    else:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        try:
            rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
        except csv.Error as error:
            raise InputError(f"{path}:{reader.line_num}: not a CSV line ({error})") from error
    rows = [(number, cells) for number, cells in rows if cells and cells != [""]]
    if not rows:
        raise InputError(f"{path} is empty; give a file with content")
    return rows


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return cell not in _MISSING


def _number(where: str, what: str, cell: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or "_" in cell:
        raise InputError(f"{where}: {what} is '{cell[:40]}'; it must be a finite number")
    return value


def _node(where: str, what: str, cell: str) -> int:
    if not (cell.isascii() and cell.isdigit()) or len(cell) > 18:
        raise InputError(f"{where}: {what} is '{cell[:40]}'; nodes are whole numbers from 0")
    return int(cell)


def _table(path: Path, data: bytes, columns: tuple[str, ...]) -> list[tuple[int, list[str]]]:
    rows = _csv_rows(path, data)
    for number, cells in rows:
        if len(cells) != len(columns):
            raise InputError(f"{path}:{number}: expected {len(columns)} fields ({','.join(columns)}), got {len(cells)}")
    first = rows[0][1]
    if not any(_is_number(cell) for cell in first) and first[0].lower() != "const":
        rows = rows[1:]
    return rows


def _read_edges(path: Path, data: bytes, fields: str | Path | None) -> ModelArrays:
    const: float | None = None
    edge: list[tuple[int, int, float, int]] = []
    field_of: dict[int, float] = {}
    for number, (first, second, value) in _table(path, data, ("i", "j", "weight")):
        where = f"{path}:{number}"
        if first.lower() == "const" and not second:
            if const is not None:
                raise InputError(f"{where}: the constant is given a second time; keep one")
            const = _number(where, "const", value)
            continue
        i, j, weight = _node(where, "i", first), _node(where, "j", second), _number(where, "weight", value)
        if i != j:
            edge.append((i, j, weight, number))
        elif i in field_of:
            raise InputError(f"{where}: the field of node {i} is given a second time; keep one")
        else:
            field_of[i] = weight
    if fields is not None:
        other = Path(fields)
        for number, (node, value) in _table(other, _read_bytes(other), ("i", "field")):
            i = _node(f"{other}:{number}", "i", node)
            if i in field_of:
                raise InputError(f"{other}:{number}: the field of node {i} is given a second time; keep one")
            field_of[i] = _number(f"{other}:{number}", "field", value)
    i, j = (np.array([row[k] for row in edge], dtype=np.int64) for k in (0, 1))
    seen = np.unique(np.concatenate([i, j, np.fromiter(field_of, np.int64, len(field_of))]))
    if len(seen) == 0:
        raise InputError(f"{path}: no edge and no field; a model has at least one spin")
    if (gap := np.flatnonzero(seen != np.arange(len(seen)))).size:
        raise InputError(
            f"{path}: node {gap[0]} does not occur but node {seen[-1]} does; number the nodes from 0 without a gap"
            f" (a node without edges needs a row such as {gap[0]},{gap[0]},0)"
        )
    low, high = np.minimum(i, j), np.maximum(i, j)
    order = np.lexsort((high, low))
    again = (np.diff(low[order]) == 0) & (np.diff(high[order]) == 0)
    if again.any():
        # The sort is stable, so of equal pairs the earlier row comes first.
        at = order[1:][again].min()
        k = min(np.flatnonzero((low == low[at]) & (high == high[at])))
        raise InputError(
            f"{path}:{edge[at][3]}: edge {i[at]},{j[at]} is in line {edge[k][3]} already; give each pair once (add the"
            " weights yourself if both are meant)"
        )
    b = np.zeros(len(seen))
    b[list(field_of)] = list(field_of.values())
    weights = np.array([row[2] for row in edge], dtype=np.float64)
    return ModelArrays(_couplings(len(seen), i, j, weights), b, const or 0.0)


@dataclass(frozen=True, eq=False)
class _Tokens:
    """The numbers of a file of whitespace-separated tokens, after its first `skipped` words."""

    path: Path
    numbers: np.ndarray
    skipped: int

    @classmethod
    def of(cls, path: Path, data: bytes, words: tuple[str, ...] = ()) -> tuple[str, _Tokens]:
        """Check that the file begins with one of `words` (if any are wanted) and read the rest as numbers."""
        tokens = data.removeprefix(b"\xef\xbb\xbf").split()
        word = ""
        if words:
            word = tokens[0][:40].decode("ascii", "replace").upper() if tokens else ""
            if word not in words:
                raise InputError(f"{path}: token 1 is '{word}'; the file must begin with {' or '.join(words)}")
            tokens = tokens[1:]
        try:
            if b"_" in data:
                raise ValueError("float() takes 1_000 for a number")
            numbers = np.fromiter(map(float, tokens), np.float64, len(tokens))
        except ValueError:
            at = next((k for k, token in enumerate(tokens) if b"_" in token or not _is_float(token)), 0)
            raise InputError(
                f"{path}: token {at + 1 + bool(word)} is '{tokens[at][:40].decode('ascii', 'replace')}'; expected a"
                " number"
            ) from None
        return word, cls(path, numbers, int(bool(words)))

    def token(self, at: int) -> int:
        """Return the number, from 1, of the token that holds number `at`."""
        return at + 1 + self.skipped

    def need(self, at: int, count: float | int, what: str) -> None:
        """Refuse a file that ends before `count` numbers from `at` on."""
        if at + count > len(self.numbers):
            raise InputError(
                f"{self.path}: truncated: {what}: {count:.0f} more tokens expected from token {self.token(at)} on, the"
                f" file has {len(self.numbers) + self.skipped} tokens"
            )

    def whole(self, start: int, stop: int, what: str) -> np.ndarray:
        """Take numbers `start` to `stop` as whole numbers from 0."""
        values = self.numbers[start:stop]
        # Beyond 2^53 floats no longer tell whole numbers apart.
        bad = ~((values >= 0) & (values <= 2**53) & (values == np.floor(values)))
        if bad.any():
            at = int(np.argmax(bad))
            raise InputError(
                f"{self.path}: token {self.token(start + at)}: {what} is {values[at]:g}; expected a whole number"
            )
        return values.astype(np.int64)

    def one(self, at: int, what: str) -> int:
        """Take number `at` as a whole number from 0."""
        self.need(at, 1, what)
        return int(self.whole(at, at + 1, what)[0])

    def end(self, at: int) -> None:
        """Refuse anything from number `at` on."""
        if at < len(self.numbers):
            raise InputError(
                f"{self.path}: {len(self.numbers) - at} tokens too many, from token {self.token(at)} on; the file"
                f" should have ended before"
            )


def _is_float(token: bytes) -> bool:
    try:
        float(token)
    except ValueError:
        return False
    return True


def _read_uai(
    path: Path, data: bytes, evidence: str | Path | Mapping[int, int] | None, floor: float | int | None
) -> ModelArrays:
    _, tokens = _Tokens.of(path, data, ("MARKOV", "BAYES"))
    factors = _uai_factors(path, tokens)
    if evidence == "auto":
        sibling = path.with_name(f"{path.name}.evid")
        evidence = sibling if sibling.exists() else None
    if evidence is None or isinstance(evidence, Mapping):
        return _condition(factors, {int(k): int(v) for k, v in (evidence or {}).items()}, floor, f"{path}: ")
    observed = _read_evidence(Path(evidence))
    _check_evidence(f"{evidence}: ", factors.cardinality, observed)
    return _condition(factors, observed, floor, f"{path}: ")


def _uai_factors(path: Path, tokens: _Tokens) -> _Factors:
    where = f"{path}: "
    variables = tokens.one(0, "number of variables")
    tokens.need(1, variables, f"{variables} cardinalities")
    cardinality = tokens.whole(1, 1 + variables, "a cardinality")
    _check_cardinalities(where, cardinality)
    at = 1 + variables
    count = tokens.one(at, "number of factors")
    at += 1
    tokens.need(at, count, f"scopes of {count} factors")
    arity, scope, at = _scopes(tokens, at, count)
    sizes = _table_sizes(where, cardinality, arity, scope)
    # Longer than the file is long enough to be refused, and cannot overflow.
    lengths = 1 + np.minimum(sizes, len(tokens.numbers) + 1.0).astype(np.int64)
    ends = at + np.cumsum(lengths)
    starts = ends - lengths
    declared = tokens.numbers[starts[starts < len(tokens.numbers)]]
    wrong, short = declared != sizes[: len(declared)], ends > len(tokens.numbers)
    if wrong.any() and (not short.any() or np.argmax(wrong) <= np.argmax(short)):
        factor = int(np.argmax(wrong))
        raise InputError(
            f"{where}token {tokens.token(int(starts[factor]))}: factor {factor} declares {declared[factor]:g} table"
            f" entries, its {arity[factor]} variables make {sizes[factor]:.0f}"
        )
    if short.any():
        factor = int(np.argmax(short))
        tokens.need(int(starts[factor]), 1 + sizes[factor], f"size and entries of the table of factor {factor}")
    end = int(ends[-1]) if count else at
    tokens.end(end)
    values = np.delete(tokens.numbers[at:end], starts - at)
    value_start = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    return _Factors(cardinality, arity, scope, values, value_start)


def _scopes(tokens: _Tokens, at: int, count: int) -> tuple[np.ndarray, np.ndarray, int]:
    # Where a scope begins depends on all before it; the walk is over Python floats, which are quicker one by one.
    begin, total = at, len(tokens.numbers)
    numbers: list[float] = tokens.numbers[at:].tolist()
    heads: list[int] = []
    for factor in range(count):
        head = at - begin
        if at >= total:
            tokens.need(at, 1, f"scope of factor {factor}")
        if not (0 <= (arity := numbers[head]) <= total - at - 1):
            tokens.whole(at, at + 1, f"number of variables of factor {factor}")
            tokens.need(at + 1, arity, f"scope of factor {factor}")
        heads.append(head)
        at += 1 + int(arity)
    section = tokens.whole(begin, at, "a variable or the number of variables of a factor")
    where = np.array(heads, dtype=np.int64)
    return section[where], np.delete(section, where), at


def _read_evidence(path: Path) -> dict[int, int]:
    _, tokens = _Tokens.of(path, _read_bytes(path))
    total = len(tokens.numbers)
    count, at = tokens.one(0, "number of observed variables"), 1
    if count == 1 and total == 2 * tokens.one(min(1, total - 1), "number of observed variables") + 2:
        # Some competitions put the number of samples first.
        count, at = (total - 2) // 2, 2
    if at + 2 * count != total:
        raise InputError(
            f"{path}: {count} observed variables take {2 * count + 1} tokens, the file has {total}; it is damaged, or"
            " holds several samples, of which keep one"
        )
    pairs = tokens.whole(at, total, "a variable or state").reshape(-1, 2)
    evidence: dict[int, int] = {}
    for k, (variable, state) in enumerate(pairs.tolist()):
        if variable in evidence:
            raise InputError(
                f"{path}: token {tokens.token(at + 2 * k)}: variable {variable} is observed twice; keep one of them"
            )
        evidence[variable] = state
    return evidence


def write_model(
    path: str | Path, A: ArrayLike | sparse.sparray | sparse.spmatrix, b: ArrayLike | None, const: float | int = 0.0
) -> None:
    """Write a model; the ending of the name says how. What comes back from :func:`read_model` has the same log Z.

    Parameters
    ----------
    path : ``.npz`` (a sparse A stays sparse and `scipy.sparse.load_npz` reads it), ``.csv``, ``.uai`` or
        ``.safetensors``. Written to another name and renamed, so that a file is never half there.
    A : (n, n) symmetric couplings, NumPy or SciPy sparse. CSV and UAI have no diagonal: half the trace goes to the
        constant.
    b : (n,) fields; None means zero
    const : what is added to log Z. UAI files know no constant: it is multiplied into the tables of single variables.

    Raises
    ------
    InputError
        A that is not square or symmetric, an entry that is not finite, an ending without a writer, a folder that
        cannot be written to, couplings too large for UAI tables (exp of them is no float).

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "pair.uai"
    >>> write_model(path, [[0.0, 0.5], [0.5, 0.0]], [1.0, 0.0], const=3.0)
    >>> round(read_model(path).const, 6)
    3.0
    """
    path = Path(path)
    matrix = _couplings_checked("", A)
    fields = _fields_checked("", b, cast("tuple[int, int]", matrix.shape)[0])
    const = _scalar("", "const", const)
    match path.suffix.lower():
        case ".npz":
            arrays: dict[str, Any] = {"b": fields, "const": np.array(const)}
            if isinstance(matrix, np.ndarray):
                arrays["A"] = matrix
            else:
                arrays |= {"data": matrix.data, "indices": matrix.indices, "indptr": matrix.indptr}
                arrays |= {"shape": np.array(matrix.shape), "format": np.array(b"csr"), "_is_array": np.array(True)}
            with atomic_path(path) as temporary:
                np.savez(temporary, **arrays)
        case ".safetensors":
            from safetensors import numpy as safetensors

            content = safetensors.save({"A": _dense(matrix), "b": fields, "const": np.array(const)})
            with atomic_path(path) as temporary:
                temporary.write_bytes(content)
        case ".csv":
            _write_text(path, _edges_text(*_off_diagonal(matrix, fields, const, "")))
        case ".uai":
            _write_text(path, _uai_text(path, *_off_diagonal(matrix, fields, const, "")))
        case _:
            raise InputError(f"{path}: cannot write '{path.suffix}'; choose .npz, .csv, .uai or .safetensors")


def _write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def _pairs(A: np.ndarray | sparse.csr_array) -> tuple[list[int], list[int], list[float]]:
    upper = sparse.coo_array(sparse.triu(sparse.coo_array(A), k=1))
    upper.eliminate_zeros()
    i, j = (np.asarray(c) for c in upper.coords)
    order = np.lexsort((j, i))
    return i[order].tolist(), j[order].tolist(), np.asarray(upper.data)[order].tolist()


def _edges_text(A: np.ndarray | sparse.csr_array, b: np.ndarray, const: float) -> str:
    # Every node gets its field, zero or not: a node without edges would be missing otherwise.
    lines = ["i,j,weight"]
    lines += [f"{i},{j},{weight!r}" for i, j, weight in zip(*_pairs(A), strict=True)]
    lines += [f"{i},{i},{value!r}" for i, value in enumerate(b.tolist())]
    lines += [f"const,,{const!r}"] if const else []
    return "\n".join(lines) + "\n"


def _uai_text(path: Path, A: np.ndarray | sparse.csr_array, b: np.ndarray, const: float) -> str:
    i, j, weights = _pairs(A)
    # Shared by all variables, the constant overflows no table.
    share = const / len(b)
    largest = max(float(np.abs(b).max()) + abs(share), max(map(abs, weights), default=0.0))
    if largest > _LARGEST_EXPONENT:
        raise InputError(f"{path}: UAI tables hold exp(energy), and exp({largest:g}) is no float; write .npz or .csv")
    head = ["MARKOV", str(len(b)), " ".join(["2"] * len(b)), str(len(b) + len(i))]
    head += [f"1 {k}" for k in range(len(b))]
    head += [f"2 {u} {v}" for u, v in zip(i, j, strict=True)]
    unary = [f"2 {math.exp(share - value)!r} {math.exp(share + value)!r}" for value in b.tolist()]
    same, other = np.exp(weights).tolist(), np.exp(np.negative(weights)).tolist()
    pairwise = [f"4 {s!r} {o!r} {o!r} {s!r}" for s, o in zip(same, other, strict=True)]
    return "\n".join([*head, *unary, *pairwise]) + "\n"


def write_pr(path: str | Path, log_z: float | int) -> None:
    """Write a partition function as a UAI ``.PR`` file, which holds log10 Z.

    Parameters
    ----------
    path : the file, written under another name and renamed
    log_z : log Z in nats

    Raises
    ------
    InputError
        A log Z that is not finite, a folder that cannot be written to.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "model.uai.PR"
    >>> write_pr(path, math.log(1000))
    >>> round(read_pr(path), 6)
    6.907755
    """
    value = _scalar("", "log_z", log_z)
    _write_text(Path(path), f"PR\n{value / math.log(10)!r}\n")


def read_pr(path: str | Path) -> float:
    """Read a UAI ``.PR`` file and return log Z in nats.

    Parameters
    ----------
    path : the file: ``PR``, perhaps the number of samples (1), and log10 Z

    Raises
    ------
    InputError
        A file that is anything else.
    """
    path = Path(path)
    _, tokens = _Tokens.of(path, _read_bytes(path), ("PR",))
    at = 1 if len(tokens.numbers) == 2 and tokens.numbers[0] == 1 else 0
    tokens.need(at, 1, "log10 Z")
    tokens.end(at + 1)
    value = float(tokens.numbers[at]) * math.log(10)
    if not math.isfinite(value):
        raise InputError(f"{path}: token {tokens.token(at)}: log10 Z is {tokens.numbers[at]}; it must be finite")
    return value


def write_mar(path: str | Path, probabilities: ArrayLike, *, evidence: Mapping[int, int] | None = None) -> None:
    r"""Write marginals of binary variables as a UAI ``.MAR`` file.

    Parameters
    ----------
    path : the file, written under another name and renamed
    probabilities : (n,) probability of state 1, that is of spin +1, each within [0, 1]
    evidence : variables that were observed and left the model, with their states (0 or 1): they get probabilities 0
        and 1 at their own places, so that the file numbers the variables as the UAI model did

    Raises
    ------
    InputError
        A probability outside [0, 1], evidence that names a place there is not, a folder that cannot be written to.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "model.uai.MAR"
    >>> write_mar(path, [0.25, 0.5], evidence={1: 1})
    >>> path.read_text()
    'MAR\n3 2 0.75 0.25 2 0.0 1.0 2 0.5 0.5\n'
    >>> read_mar(path).tolist()
    [0.25, 1.0, 0.5]
    """
    given = real_array("", "probabilities", probabilities)
    observed = dict(evidence or {})
    if given.ndim != 1 or len(given) + len(observed) == 0:
        raise InputError(f"probabilities must be (n,), one for each variable, got shape {given.shape}")
    # Sums of exponentials end a rounding error outside.
    if (bad := np.flatnonzero((given < -1e-9) | (given > 1 + 1e-9))).size:
        raise InputError(f"probabilities[{bad[0]}] is {given[bad[0]]:g}; give P(x = +1), (1 + E[x]) / 2, within [0, 1]")
    total = len(given) + len(observed)
    for variable, state in observed.items():
        if not 0 <= variable < total or state not in (0, 1):
            raise InputError(
                f"evidence {variable}: {state} does not fit {total} binary variables; variables run from 0 to"
                f" {total - 1}, states are 0 and 1"
            )
    full = np.empty(total)
    places = np.array(sorted(observed), dtype=np.int64)
    full[places] = [observed[k] for k in places.tolist()]
    full[np.setdiff1d(np.arange(total), places)] = np.clip(given, 0.0, 1.0)
    cells = " ".join(f"2 {1 - p!r} {p!r}" for p in full.tolist())
    _write_text(Path(path), f"MAR\n{total} {cells}\n")


def read_mar(path: str | Path) -> Float[np.ndarray, " variables"]:
    """Read a UAI ``.MAR`` file of binary variables.

    Parameters
    ----------
    path : the file: ``MAR``, perhaps the number of samples (1), the number of variables, and for each ``2 p0 p1``

    Returns
    -------
    (variables,) probability of state 1

    Raises
    ------
    InputError
        A variable without two states, probabilities that are none or do not add up to 1, a file of another form.
    """
    path = Path(path)
    _, tokens = _Tokens.of(path, _read_bytes(path), ("MAR",))
    # Some competitions put the number of samples first.
    at = int(len(tokens.numbers) > 1 and tokens.numbers[0] == 1 and len(tokens.numbers) == 3 * tokens.numbers[1] + 2)
    count = tokens.one(at, "number of variables")
    tokens.need(at + 1, 3 * count, f"marginals of {count} binary variables")
    tokens.end(at + 1 + 3 * count)
    table = tokens.numbers[at + 1 :].reshape(-1, 3)
    # Competition files carry six digits.
    bad = ~((table[:, 0] == 2) & (table[:, 1:] >= 0).all(1) & (np.abs(table[:, 1:].sum(1) - 1) < 1e-4))
    if bad.any():
        k = int(np.argmax(bad))
        raise InputError(
            f"{path}: token {tokens.token(at + 1 + 3 * k)}: variable {k} has '{table[k, 0]:g} {table[k, 1]:g}"
            f" {table[k, 2]:g}'; expected 2 and two probabilities that add up to 1"
        )
    return table[:, 2].copy()


def read_spins(path: str | Path, *, coding: Coding = "auto") -> Float[np.ndarray, "rows n"]:
    r"""Read a table of binary observations as spins.

    Parameters
    ----------
    path : CSV (comma, semicolon, tab or blanks; ``.csv``, ``.tsv``, ``.txt``) with or without a header, or NPZ with an
        array ``X`` or a single array, (rows, n). Empty cells, NA, NaN and ? are missing. A first column whose header
        is empty or ``rownames`` holds names of rows, as R writes them, and is left out.
    coding : ``01`` or ``pm1`` says what the two values are; ``auto`` finds out, and refuses a file that holds only 1

    Returns
    -------
    (rows, n) float64 in {-1, 1}, NaN where missing

    Raises
    ------
    InputError
        A value other than the two, with its row and column; rows of different lengths; 0 and -1 in one file.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "answers.csv"
    >>> _ = path.write_text("q1,q2\n0,1\nNA,0\n")
    >>> read_spins(path).tolist()
    [[-1.0, 1.0], [nan, -1.0]]
    """
    path = Path(path)
    if coding not in ("auto", "01", "pm1"):
        raise InputError(f"unknown coding '{coding}': choose 'auto', '01' or 'pm1'")
    match path.suffix.lower():
        case ".npz":
            values, place = _npz_table(path, _read_bytes(path))
        case ".csv" | ".tsv" | ".txt":
            values, place = _csv_table(path, _read_bytes(path))
        case _ if _is_directory(path):
            raise InputError(f"{path} is a directory; give a file")
        case _:
            raise InputError(f"{path}: cannot tell what '{path.suffix}' is; give a .csv, .tsv, .txt or .npz file")
    return _as_spins(path, values, place, coding)


_Place = Callable[[int, int], str]


def _npz_table(path: Path, data: bytes) -> tuple[np.ndarray, _Place]:
    arrays = _npz_arrays(path, data)
    name = "X" if "X" in arrays else next(iter(arrays), "")
    if "X" not in arrays and len(arrays) != 1:
        raise InputError(f"{path}: needs an array X, or one array only; found {', '.join(sorted(arrays)) or 'none'}")
    array = arrays[name]
    if array.ndim != 2 or 0 in array.shape or array.dtype.kind not in "fiub":
        raise InputError(f"{path}: {name} must be numbers, (rows, n), got {array.dtype} {array.shape}")
    values = array.astype(np.float64)
    bad = ~(np.isin(values, (-1, 0, 1)) | np.isnan(values))
    if bad.any():
        row, column = np.argwhere(bad)[0].tolist()
        raise InputError(f"{path}: {name}[{row},{column}] is {values[row, column]:g}; expected 0/1 or -1/1")
    return values, lambda row, column: f"{name}[{row},{column}]"


def _csv_table(path: Path, data: bytes) -> tuple[np.ndarray, _Place]:
    rows = _csv_rows(path, data)
    skip = 0
    if _is_header(rows[0][1]):
        skip = int(len(rows[0][1]) > 1 and rows[0][1][0].lower() in ("", "rownames"))
        width, rows = len(rows[0][1]), rows[1:]
    else:
        width = len(rows[0][1])
    if not rows:
        raise InputError(f"{path}: a header and no row; give at least one observation")
    known = {"0": 0.0, "1": 1.0, "-1": -1.0, "+1": 1.0} | dict.fromkeys(_MISSING, math.nan)
    table: list[list[float]] = []
    for number, cells in rows:
        if len(cells) != width:
            raise InputError(f"{path}:{number}: expected {width} columns, as in the first row, got {len(cells)}")
        try:
            table.append([known[cell] for cell in cells[skip:]])
        except KeyError:
            table.append(
                [
                    _binary(f"{path}:{number}, column {column}", cell)
                    for column, cell in enumerate(cells[skip:], skip + 1)
                ]
            )
    lines = [number for number, _ in rows]
    return np.array(table), lambda row, column: f"line {lines[row]}, column {column + skip + 1}"


def _is_header(cells: list[str]) -> bool:
    if all(_is_number(cell) for cell in cells) and len(cells) > 2:
        # pandas numbers columns without a name.
        return [float(cell) for cell in cells] in (list(range(len(cells))), list(range(1, len(cells) + 1)))
    return not any(_is_number(cell) for cell in cells) and any(cell not in _MISSING for cell in cells)


def _binary(where: str, cell: str) -> float:
    if cell in _MISSING:
        return math.nan
    if _is_number(cell) and (value := float(cell)) in (-1.0, 0.0, 1.0):
        return value
    raise InputError(f"{where} is '{cell[:40]}'; expected 0/1 or -1/1 (leave empty what is missing)")


def _as_spins(path: Path, values: np.ndarray, place: _Place, coding: Coding) -> np.ndarray:
    if values.shape[1] == 0 or np.isnan(values).all():
        raise InputError(f"{path}: not one observed value; give a table of 0/1 or -1/1")
    zero, minus = values == 0, values == -1
    if coding == "auto":
        if zero.any() and minus.any():
            raise InputError(f"{path}: {_at(place, zero)} is 0 but {_at(place, minus)} is -1; code all as 0/1 or -1/1")
        if not zero.any() and not minus.any():
            raise InputError(
                f"{path}: every value is 1, which is no coding; pass coding='01' or coding='pm1' (they agree on what 1"
                " is), or check the file"
            )
    elif (wrong := zero if coding == "pm1" else minus).any():
        found, wanted = ("0", "-1 and 1") if coding == "pm1" else ("-1", "0 and 1")
        raise InputError(f"{path}: {_at(place, wrong)} is {found}; coding '{coding}' means {wanted}")
    return np.where(zero, -1.0, values)


def _at(place: _Place, where: np.ndarray) -> str:
    row, column = np.argwhere(where)[0].tolist()
    return place(row, column)
