"""What a user may pass as a model (NumPy, torch, SciPy sparse, an ``Ising``), checked and brought to one form."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol, TypeAlias, cast, runtime_checkable

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from shared_core.errors import InputError

__all__ = ["Convention", "Edges", "Given", "HasCouplings", "Problem", "Scalar", "as_problem", "is_a", "to_numpy"]

# Floats for one NumPy model, arrays (models,) for a NumPy batch, tensors for torch.
Scalar: TypeAlias = float | np.ndarray | Tensor

Convention = Literal["half", "full"]
_SYMMETRY = 1e-8
# What sums in another order leave in single precision.
_SYMMETRY_SINGLE = 1e-5
_HUGE = 1e6
_BEYOND = 1e100
_DENSE_WARNING = 2000


@runtime_checkable
class HasCouplings(Protocol):
    """A model object, such as :class:`spectral_mf.Ising`."""

    @property
    def problem(self) -> Problem:
        """The couplings and fields in the package's own form."""
        ...


@dataclass(frozen=True)
class Edges:
    """The pairs i < j with a non-zero coupling in any model.

    Attributes
    ----------
    i, j : (edges,) int64, i < j, sorted by (i, j)
    weight : (models, edges) couplings A_ij
    """

    i: Tensor
    j: Tensor
    weight: Tensor


@dataclass(frozen=True, eq=False)
class Problem:
    """Models ``exp(½ xᵀAx + bᵀx + const)`` over x in {-1, 1}^n, as the methods take them.

    Attributes
    ----------
    A : (models, n, n) float64, symmetric, zero diagonal; None for a model that is held sparse
    b : (models, n) float64 fields
    const : (models,) added to every log partition function (half the trace of the user's A, for one)
    sparse : (n, n) CSR matrix of the one model, when A is None
    batched : whether the user passed a batch, and so gets one back
    kind : what the user passed, and so gets back
    """

    A: Tensor | None
    b: Tensor
    const: Tensor
    sparse: sparse.csr_array | None
    batched: bool
    kind: Literal["numpy", "torch"]

    @property
    def models(self) -> int:
        """Number of models in the batch."""
        return self.b.shape[0]

    @property
    def n(self) -> int:
        """Number of spins."""
        return self.b.shape[1]

    @cached_property
    def dense(self) -> Tensor:
        """Couplings as (models, n, n), made dense if they were not."""
        if self.A is not None:
            return self.A
        if self.n > _DENSE_WARNING:
            warnings.warn(
                f"this method makes the couplings dense: {self.n} x {self.n}, {8e-9 * self.n**2:.1f} GB;"
                " 'ais', 'belief_propagation' and 'mean_field' keep them sparse",
                stacklevel=3,
            )
        return torch.from_numpy(cast("sparse.csr_array", self.sparse).toarray())[None]

    @cached_property
    def edges(self) -> Edges:
        """The pairs that interact."""
        if self.A is None:
            upper = sparse.coo_array(sparse.triu(cast("sparse.csr_array", self.sparse), k=1))
            order = np.lexsort((upper.coords[1], upper.coords[0]))
            i, j = (torch.from_numpy(c[order].astype(np.int64)) for c in upper.coords)
            return Edges(i, j, torch.from_numpy(np.asarray(upper.data, dtype=np.float64)[order])[None])
        used = (self.A.detach() != 0).any(0).triu(1)
        i, j = used.nonzero(as_tuple=True)
        return Edges(i, j, self.A[:, i, j])

    @cached_property
    def neighbours(self) -> list[list[int]]:
        """For each spin, the spins it interacts with, ascending."""
        found: list[list[int]] = [[] for _ in range(self.n)]
        for i, j in zip(self.edges.i.tolist(), self.edges.j.tolist(), strict=True):
            found[i].append(j)
            found[j].append(i)
        return [sorted(row) for row in found]

    def give_back(self, values: Tensor) -> Scalar:
        """Turn a (models, ...) tensor into what the user expects: float, NumPy array or tensor, batch or not."""
        if not self.batched:
            values = values[0]
        if self.kind == "torch":
            return values
        return float(values) if values.ndim == 0 else cast("Any", values.detach().cpu().numpy())

    def select(self, chosen: Tensor | slice) -> Problem:
        """Take some of the models, as a batch."""
        if self.A is None:
            return self
        return Problem(self.A[chosen], self.b[chosen], self.const[chosen], None, True, self.kind)


def as_problem(
    A: Any,
    b: Any = None,
    *,
    convention: Convention = "half",
    symmetrize: bool = False,
) -> Problem:
    """Check a model and bring it to one form.

    Parameters
    ----------
    A : (n, n) or (models, n, n) NumPy array or tensor, (n, n) SciPy sparse matrix, or an object with ``problem``.
        Symmetric. Its diagonal adds half its trace to log Z, because x_i² = 1.
    b : (n,) or (models, n) fields; None means zero
    convention : ``half``: energy ½ xᵀAx + bᵀx, each pair counts A_ij once. ``full``: energy xᵀAx + bᵀx.
    symmetrize : average A with its transpose in place of refusing an asymmetric one

    Raises
    ------
    InputError
        Where A is not square, not symmetric to 1e-8 (relative; 1e-5 in single precision), empty, or anything is NaN
        or infinite.
    """
    if isinstance(A, HasCouplings):
        if b is not None:
            raise InputError("the model has its fields already: pass no b with it")
        return A.problem
    if convention not in ("half", "full"):
        raise InputError(f"unknown convention '{convention}': choose 'half' (½ xᵀAx) or 'full' (xᵀAx)")
    if sparse.issparse(A):
        return _sparse_problem(A, b, convention, symmetrize)
    kind = "torch" if isinstance(A, Tensor) or isinstance(b, Tensor) else "numpy"
    couplings = _tensor(A, "A", b.device if isinstance(b, Tensor) else None)
    if couplings.ndim not in (2, 3) or couplings.shape[-1] != couplings.shape[-2]:
        raise InputError(f"A must be (n, n) or (models, n, n), got {tuple(couplings.shape)}")
    batched = couplings.ndim == 3
    n = couplings.shape[-1]
    if n == 0:
        raise InputError("A is empty: a model has at least one spin")
    fields = couplings.new_zeros(couplings.shape[:-1]) if b is None else _tensor(b, "b", couplings.device)
    if fields.shape[-1:] != (n,) or fields.ndim > 2:
        raise InputError(f"b must have length n = {n} (or be (models, {n})), got shape {tuple(fields.shape)}")
    if fields.ndim == 2 and not batched:
        couplings, batched = couplings.expand(len(fields), n, n), True
    couplings = couplings if batched else couplings[None]
    fields = (fields if fields.ndim == 2 else fields[None]).expand(-1, n)
    if len(fields) == 1 and len(couplings) != 1:
        fields = fields.expand(len(couplings), n)
    if len(fields) != len(couplings):
        raise InputError(f"A holds {len(couplings)} models, b holds {len(fields)}")
    if len(couplings) == 0:
        raise InputError("the batch is empty: A holds no model")
    _refuse_not_finite(couplings, "A", batched)
    _refuse_not_finite(fields, "b", batched)
    couplings = _symmetric(couplings, symmetrize, batched, _symmetry_of(A))
    if convention == "full":
        couplings = 2 * couplings
    diagonal = couplings.diagonal(dim1=-2, dim2=-1)
    const = 0.5 * diagonal.sum(-1)
    # Also where it is zero but carries a gradient, which `const` has already.
    if diagonal.requires_grad or bool((diagonal != 0).any()):
        couplings = couplings - torch.diag_embed(diagonal)
    _warn_huge(float(couplings.detach().abs().max()))
    return Problem(couplings, fields, const, None, batched, kind)


def _tensor(values: Any, name: str, device: torch.device | None) -> Tensor:
    if isinstance(values, Tensor):
        if values.is_complex() or values.dtype == torch.bool:
            raise InputError(f"{name} must be real numbers, got {values.dtype}")
        # Apple's GPUs have no float64, and log Z needs it.
        values = values.cpu() if values.device.type == "mps" else values
        return values.to(torch.float64)
    try:
        if np.iscomplexobj(values):
            raise InputError(f"{name} must be real numbers, got {np.asarray(values).dtype}")
        array = np.asarray(values, dtype=np.float64)
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} must be numbers in a regular array: {error}") from error
    return torch.tensor(array, device=device)


def _place(index: list[int], batched: bool) -> str:
    head, rest = (f" of model {index[0]}", index[1:]) if batched else ("", index[1:])
    return f"[{','.join(map(str, rest))}]{head}"


def _refuse_not_finite(values: Tensor, name: str, batched: bool) -> None:
    finite = values.detach().isfinite()
    if not bool(finite.all()):
        index = (~finite).nonzero()[0].tolist()
        raise InputError(
            f"{name}{_place(index, batched)} is {float(values[tuple(index)].detach())}; every entry must be finite"
        )


def _symmetry_of(A: Any) -> float:
    """How far an entry may be from its mirror image, relative to the largest: by the precision A was given in."""
    single = str(getattr(A, "dtype", "")).removeprefix("torch.") in {"float32", "float16", "bfloat16"}
    return _SYMMETRY_SINGLE if single else _SYMMETRY


def _symmetric(couplings: Tensor, symmetrize: bool, batched: bool, tolerance: float) -> Tensor:
    transposed = couplings.transpose(-1, -2)
    gap = (couplings - transposed).detach().abs()
    scale = couplings.detach().abs().amax((-1, -2), keepdim=True)
    if not symmetrize and bool((gap > tolerance * scale).any()):
        index = (gap > tolerance * scale).nonzero()[0].tolist()
        model, i, j = index
        raise InputError(
            f"A{_place([model, i, j], batched)}={float(couplings[model, i, j].detach()):g} but"
            f" A{_place([model, j, i], batched)}={float(couplings[model, j, i].detach()):g};"
            " pass symmetrize=True to average"
        )
    return 0.5 * (couplings + transposed)


def _warn_huge(largest: float) -> None:
    if largest > _BEYOND:
        raise InputError(f"a coupling of {largest:g} is beyond what sums of energies hold; rescale the model")
    if largest > _HUGE:
        warnings.warn(
            f"a coupling of {largest:g}: is A in the units you think? exp of it is far beyond a float", stacklevel=4
        )


def _sparse_problem(A: Any, b: Any, convention: Convention, symmetrize: bool) -> Problem:
    if np.issubdtype(A.dtype, np.complexfloating):
        raise InputError(f"A must be real numbers, got {A.dtype}")
    matrix: Any = sparse.csr_array(A, dtype=np.float64, copy=True)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise InputError(f"A must be (n, n), got {matrix.shape}")
    n = matrix.shape[0]
    if n == 0:
        raise InputError("A is empty: a model has at least one spin")
    matrix.sum_duplicates()
    if not np.isfinite(matrix.data).all():
        entries = matrix.tocoo()
        at = int(np.argmin(np.isfinite(entries.data)))
        i, j = (int(c[at]) for c in entries.coords)
        raise InputError(f"A[{i},{j}] is {entries.data[at]}; every entry must be finite")
    gap = (matrix - matrix.T).tocoo()
    scale = float(np.abs(matrix.data).max(initial=0.0))
    wrong = np.abs(gap.data) > _symmetry_of(A) * scale
    if not symmetrize and wrong.any():
        at = int(np.argmax(wrong))
        i, j = (int(c[at]) for c in gap.coords)
        raise InputError(
            f"A[{i},{j}]={matrix[i, j]:g} but A[{j},{i}]={matrix[j, i]:g}; pass symmetrize=True to average"
        )
    matrix = (0.5 if convention == "half" else 1.0) * (matrix + matrix.T)
    diagonal = np.asarray(matrix.diagonal(), dtype=np.float64)
    matrix = sparse.csr_array(matrix - sparse.diags_array(diagonal))
    matrix.eliminate_zeros()
    matrix.sort_indices()
    fields = torch.zeros(n, dtype=torch.float64) if b is None else _tensor(b, "b", None).cpu()
    if fields.shape != (n,):
        raise InputError(f"b must have length n = {n} (one model a sparse A), got shape {tuple(fields.shape)}")
    _refuse_not_finite(fields[None], "b", False)
    _warn_huge(scale)
    const = torch.tensor([0.5 * diagonal.sum()], dtype=torch.float64)
    return Problem(None, fields[None], const, matrix, False, "torch" if isinstance(b, Tensor) else "numpy")


@dataclass(frozen=True)
class Given:
    """Hands a checked problem on to a function of (A, b).

    Attributes
    ----------
    problem : what :func:`as_problem` returned
    """

    problem: Problem


def to_numpy(value: Any) -> np.ndarray:
    """Bring a float, array or tensor of any device to NumPy.

    Parameters
    ----------
    value : float, NumPy array or tensor

    Examples
    --------
    >>> to_numpy(torch.ones(2)).tolist()
    [1.0, 1.0]
    """
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def is_a(value: object, *kinds: type) -> bool:
    """Tell whether what a caller passed is of the kind its annotation asks for; callers need not heed annotations.

    Parameters
    ----------
    value : anything
    kinds : classes it may be of

    Examples
    --------
    >>> is_a(2.5, int)
    False
    """
    return isinstance(value, kinds)
