"""The model as an object: built from couplings, an RBM, a QUBO, a file or an edge list, and asked for anything."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from shared_core.errors import InputError
from spectral_mf._inputs import Convention, Problem, as_problem, is_a
from spectral_mf.bounds import Bounds, log_partition_bounds, map_bound
from spectral_mf.estimate import Plan, log_partition, plan
from spectral_mf.formats import ising_to_qubo, qubo_to_ising, rbm_to_ising, read_model, write_model
from spectral_mf.moments import marginals, pair_moments, sample
from spectral_mf.result import LogPartition, Scalar

__all__ = ["Ising"]


class Ising:
    """An Ising model p(x) ∝ exp(½ xᵀAx + bᵀx + const) over x in {-1, 1}^n, or a batch of them. Immutable.

    Parameters
    ----------
    A : (n, n) or (models, n, n) symmetric couplings (NumPy, torch), or (n, n) SciPy sparse; each pair counts once
    b : (n,) or (models, n) fields; None means zero
    const : added to log Z
    convention : ``half`` (energy ½ xᵀAx + bᵀx) or ``full`` (xᵀAx + bᵀx)
    symmetrize : average A with its transpose in place of refusing an asymmetric one

    Examples
    --------
    >>> m = Ising([[0.0, 0.7], [0.7, 0.0]], [0.3, -0.4])
    >>> m
    Ising(n=2, edges=1)
    >>> round(m.log_partition().value, 9)
    1.66662259
    """

    __slots__ = ("_problem",)
    _problem: Problem

    def __init__(
        self,
        A: Any,
        b: Any = None,
        const: float = 0.0,
        *,
        convention: Convention = "half",
        symmetrize: bool = False,
    ) -> None:
        problem = as_problem(A, b, convention=convention, symmetrize=symmetrize)
        total = problem.const + torch.as_tensor(const, dtype=torch.float64, device=problem.const.device)
        if not bool(total.detach().isfinite().all()):
            raise InputError(f"const must be finite, got {const}")
        object.__setattr__(
            self,
            "_problem",
            Problem(problem.A, problem.b, total, problem.sparse, problem.batched, problem.kind),
        )

    def __setattr__(self, name: str, value: object) -> None:
        """Refuse: a model does not change."""
        raise AttributeError(f"an Ising model is immutable; make a new one in place of setting {name!r}")

    def __delattr__(self, name: str) -> None:
        """Refuse: a model does not change."""
        raise AttributeError(f"an Ising model is immutable; {name!r} stays")

    def __reduce__(self) -> tuple[Any, tuple[Problem]]:
        """Pickle what it was checked to be."""
        return _restored, (self._problem,)

    def __copy__(self) -> Ising:
        """Return itself: it does not change."""
        return self

    def __deepcopy__(self, memo: object) -> Ising:
        """Return itself: it does not change."""
        del memo
        return self

    def __repr__(self) -> str:
        """Say how large it is."""
        batch = f"models={self._problem.models}, " if self._problem.batched else ""
        return f"Ising({batch}n={self.n}, edges={len(self._problem.edges.i)})"

    @property
    def problem(self) -> Problem:
        """The form the package's functions take it in; they all take the model itself too."""
        return self._problem

    @property
    def n(self) -> int:
        """Number of spins."""
        return self._problem.n

    @property
    def A(self) -> Any:  # noqa: N802
        """Couplings with zero diagonal, in the kind they were given: NumPy array, tensor or SciPy sparse matrix."""
        if self._problem.A is None:
            return self._problem.sparse
        return self._problem.give_back(self._problem.A)

    @property
    def b(self) -> Any:
        """Fields, in the kind they were given."""
        return self._problem.give_back(self._problem.b)

    @property
    def const(self) -> Scalar:
        """What is added to log Z, half the trace of the couplings included."""
        return self._problem.give_back(self._problem.const)

    @classmethod
    def from_rbm(cls, W: Any, bv: Any, bh: Any) -> Ising:
        """Turn a restricted Boltzmann machine over 0/1 units, exp(vᵀWh + bvᵀv + bhᵀh), into spins: visible first.

        Parameters
        ----------
        W : (visible, hidden) weights (scikit-learn's ``components_`` is its transpose)
        bv, bh : (visible,) and (hidden,) biases
        """
        return cls(*rbm_to_ising(*(_array(x) for x in (W, bv, bh))))

    @classmethod
    def from_01(cls, Q: Any, c: Any = None) -> Ising:
        """Turn a QUBO, exp(xᵀQx + cᵀx) over x in {0, 1}^n, into spins.

        Parameters
        ----------
        Q : (n, n) symmetric or triangular; its diagonal counts as linear
        c : (n,) linear terms
        """
        return cls(*qubo_to_ising(_dense(_array(Q)), None if c is None else _array(c)))

    @classmethod
    def from_edges(cls, i: Any, j: Any, weight: Any, b: Any = None, *, n: int | None = None) -> Ising:
        """Build a sparse model from a list of pairs.

        Parameters
        ----------
        i, j : (edges,) spins of each pair, from 0; each pair once
        weight : (edges,) couplings
        b : (n,) fields
        n : number of spins; None: the length of b, or the largest spin named plus one

        Examples
        --------
        >>> Ising.from_edges([0, 1], [1, 2], [0.5, -0.5])
        Ising(n=3, edges=2)
        """
        rows, columns, values = np.asarray(i), np.asarray(j), np.asarray(_array(weight), dtype=np.float64)
        if rows.shape != columns.shape or rows.shape != values.shape or rows.ndim != 1:
            raise InputError(f"i, j and weight must have one length, got {rows.shape}, {columns.shape}, {values.shape}")
        if len(rows) and not (np.issubdtype(rows.dtype, np.integer) and np.issubdtype(columns.dtype, np.integer)):
            raise InputError("i and j must be integers: the numbers of the spins, from 0")
        rows, columns = rows.astype(np.int64), columns.astype(np.int64)
        if not len(rows) and n is None and b is None:
            raise InputError("there are no edges: say how many spins there are with n")
        size = n if n is not None else len(_array(b)) if b is not None else int(max(rows.max(), columns.max())) + 1
        if len(rows) and (min(rows.min(), columns.min()) < 0 or max(rows.max(), columns.max()) >= size):
            at = int(np.argmax((rows < 0) | (columns < 0) | (rows >= size) | (columns >= size)))
            raise InputError(f"edge {at} joins {rows[at]} and {columns[at]}; spins are 0 to {size - 1}")
        if (rows == columns).any():
            at = int(np.argmax(rows == columns))
            raise InputError(f"edge {at} joins spin {rows[at]} to itself; fields go into b")
        low, high = np.minimum(rows, columns), np.maximum(rows, columns)
        _, first, counts = np.unique(low * size + high, return_index=True, return_counts=True)
        if (counts > 1).any():
            at = int(first[np.argmax(counts > 1)])
            raise InputError(f"the pair ({low[at]}, {high[at]}) is there twice; give each pair once")
        upper = sparse.coo_array((values, (low, high)), shape=(size, size))
        return cls(sparse.csr_array(upper + upper.T), b)

    @classmethod
    def from_file(cls, path: str | Path, **options: Any) -> Ising:
        """Read a model: .npz, .csv (edges), .uai, .mat (the authors' keys), .safetensors.

        Parameters
        ----------
        path : file; its suffix says what it is
        options : ``evidence``, ``floor``, ``index``, ``fields``, see :func:`spectral_mf.formats.read_model`
        """
        arrays = read_model(path, **options)
        return cls(arrays.A, arrays.b, arrays.const)

    @classmethod
    def from_uai(cls, path: str | Path, *, evidence: Any = None, floor: float | None = None) -> Ising:
        """Read a UAI file (MARKOV or BAYES) of binary variables and factors of at most two of them.

        Parameters
        ----------
        path : the .uai file; state 0 becomes -1, state 1 becomes +1
        evidence : .evid file, ``auto`` for the one beside it, or a mapping variable -> state
        floor : takes the place of zero table entries, which are refused otherwise
        """
        return cls.from_file(path, evidence=evidence, floor=floor)

    def to(self, device: torch.device | str) -> Ising:
        """Return the model as tensors on a device; a sparse one stays where it is, on the CPU.

        Parameters
        ----------
        device : such as ``cuda``
        """
        problem = self._problem
        if problem.A is None:
            return self
        moved = [x.to(device) for x in (problem.A, problem.b, problem.const)]
        return _restored(Problem(moved[0], moved[1], moved[2], None, problem.batched, "torch"))

    def save(self, path: str | Path) -> None:
        """Write the model; .npz, .csv, .uai and .safetensors are read back by :meth:`from_file`.

        Parameters
        ----------
        path : file to write, atomically
        """
        self._refuse_batch("save")
        write_model(path, _host(self.A), _host(self.b), float(self._problem.const[0]))

    def to_01(self) -> tuple[Any, Any, float]:
        """Return (Q, c, const) with exp(xᵀQx + cᵀx + const) over x in {0, 1}^n the same model."""
        self._refuse_batch("to_01")
        A: Any = _host(self.A)
        dense = _dense(A)
        return ising_to_qubo(dense, _host(self.b), float(self._problem.const[0]))

    def condition(self, evidence: Mapping[int, int]) -> Ising:
        """Fix spins; the others remain, in their order. log Z of what is returned is that of the fixed part's share.

        Parameters
        ----------
        evidence : spin -> -1 or 1

        Examples
        --------
        >>> m = Ising([[0.0, 0.7], [0.7, 0.0]])
        >>> bool(abs(m.condition({0: 1}).marginals()[0] - np.tanh(0.7)) < 1e-12)
        True
        """
        self._refuse_batch("condition")
        if not is_a(evidence, Mapping):
            raise InputError("evidence must be a mapping of spins to -1 or 1, such as {0: 1}")
        for spin, value in evidence.items():
            if not 0 <= spin < self.n or value not in (-1, 1):
                raise InputError(f"evidence {spin}: {value}: spins are 0 to {self.n - 1}, values -1 or 1")
        if len(evidence) == self.n:
            raise InputError("every spin is fixed: nothing remains; energy(x) gives its log weight")
        fixed = np.array(sorted(evidence), dtype=np.int64)
        free = np.setdiff1d(np.arange(self.n), fixed)
        x = np.array([float(evidence[int(i)]) for i in fixed])
        A, b = _host(self.A), _host(self.b)
        const = float(self._problem.const[0]) + 0.5 * float(x @ (A[fixed][:, fixed] @ x)) + float(b[fixed] @ x)
        return Ising(A[free][:, free], b[free] + A[free][:, fixed] @ x, const)

    def energy(self, x: Any) -> Any:
        """½ xᵀAx + bᵀx + const: the log weight of states (higher is likelier).

        Parameters
        ----------
        x : (n,) or (states, n) of -1 and 1; for a batch of models (models, states, n)
        """
        problem = self._problem
        held = x if isinstance(x, Tensor) else np.array(x, dtype=np.float64)
        states = torch.as_tensor(held, dtype=torch.float64, device=problem.b.device)
        if states.shape[-1] != self.n:
            raise InputError(f"a state has n = {self.n} spins, got {states.shape[-1]}")
        if not bool((states.detach().abs() == 1).all()):
            raise InputError("states are -1 or 1; turn 0/1 into 2 * x - 1")
        if problem.batched:
            value = 0.5 * ((states @ problem.dense) * states).sum(-1) + (states @ problem.b[:, :, None])[..., 0]
            value = value + problem.const[:, None]
            return value if problem.kind == "torch" else value.detach().cpu().numpy()
        flat = states.reshape(-1, self.n)
        if problem.A is None:
            matrix: Any = problem.sparse
            pull = torch.from_numpy(np.ascontiguousarray((matrix @ flat.numpy().T).T))
        else:
            pull = flat @ problem.A[0]
        value = 0.5 * (pull * flat).sum(-1) + flat @ problem.b[0] + problem.const[0]
        value = value[0] if states.ndim == 1 else value
        if problem.kind == "torch":
            return value
        return float(value) if value.ndim == 0 else value.detach().cpu().numpy()

    def log_prob(self, x: Any, *, method: str = "auto", **options: Any) -> Any:
        """Log probabilities of states, log Z by `method`.

        Parameters
        ----------
        x : (n,) or (states, n) of -1 and 1
        method : as in :func:`spectral_mf.log_partition`
        options : passed on to it
        """
        self._refuse_batch("log_prob")
        return self.energy(x) - self.log_partition(method=method, **options).value

    def plan(self, *, method: str = "auto", budget_s: float = 30.0) -> Plan:
        """Say what :meth:`log_partition` would do and cost, without doing it.

        Parameters
        ----------
        method, budget_s : as in :func:`spectral_mf.log_partition`
        """
        return plan(self, method=method, budget_s=budget_s)

    def log_partition(self, *, method: str = "auto", **options: Any) -> LogPartition:
        """Compute log Z with bounds, see :func:`spectral_mf.log_partition`.

        Parameters
        ----------
        method : ``auto`` or any other name there
        options : ``bounds``, ``budget_s``, ``generator``, and the method's own
        """
        return log_partition(self, method=method, **options)

    def bounds(self, *, clamp: int = 0, generator: torch.Generator | None = None) -> Bounds:
        """Certified bounds of log Z, see :func:`spectral_mf.log_partition_bounds`.

        Parameters
        ----------
        clamp : spins to fix in all ways
        generator : source of mean field's starts
        """
        return log_partition_bounds(self, clamp=clamp, generator=generator)

    def map_bound(self) -> tuple[Scalar, Scalar]:
        """Bound the largest energy from both sides, see :func:`spectral_mf.map_bound`."""
        return map_bound(self)

    def marginals(self, *, method: str = "auto", **options: Any) -> Any:
        """Means E[x_i], (n,), see :func:`spectral_mf.marginals`.

        Parameters
        ----------
        method, options : as there
        """
        return marginals(self, method=method, **options)

    def pair_moments(self, *, method: str = "auto", **options: Any) -> Any:
        """E[x_i x_j], (n, n), see :func:`spectral_mf.pair_moments`.

        Parameters
        ----------
        method, options : as there
        """
        return pair_moments(self, method=method, **options)

    def sample(self, k: int = 1, generator: torch.Generator | None = None) -> Any:
        """Draw `k` states, see :func:`spectral_mf.sample`.

        Parameters
        ----------
        k : number of states
        generator : source of randomness; None means one seeded with 0
        """
        return sample(self, k=k, generator=generator)

    def _refuse_batch(self, what: str) -> None:
        if self._problem.batched:
            raise InputError(f"{what} takes one model, this is a batch of {self._problem.models}; take them one by one")


def _restored(problem: Problem) -> Ising:
    model = object.__new__(Ising)
    object.__setattr__(model, "_problem", problem)
    return model


def _array(values: Any) -> Any:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else values


def _dense(values: Any) -> Any:
    matrix: Any = values
    return matrix.toarray() if sparse.issparse(values) else values


def _host(values: Any) -> Any:
    return values if sparse.issparse(values) else _array(values)
