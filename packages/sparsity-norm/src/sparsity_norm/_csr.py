"""CSR matrices without formality: counting, multiplying and sampling products at the stored pattern."""

from __future__ import annotations

import functools
import warnings
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from shared_core.errors import InputError
from sparsity_norm._checks import check_groups


@runtime_checkable
class SparseCSR(Protocol):
    """What this module needs of a SciPy CSR matrix or array, so that SciPy need not be imported for it."""

    @property
    def data(self) -> NDArray[Any]:
        """Stored values."""
        ...

    @property
    def indices(self) -> NDArray[Any]:
        """Column of each stored value."""
        ...

    @property
    def indptr(self) -> NDArray[Any]:
        """Where each row starts in ``data``; one more than there are rows."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns."""
        ...


@functools.cache
def _acknowledge_beta_warning() -> None:
    """Let torch give its once-a-process remark that CSR tensors are in beta where nobody has to read it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 0], [], [], (1, 1), check_invariants=False)


def csr_tensor(crow: Tensor, cols: Tensor, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    _acknowledge_beta_warning()
    return torch.sparse_csr_tensor(crow, cols, values, shape, check_invariants=False)


def csr_parts(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if x.layout != torch.sparse_csr or x.ndim != 2:
        raise InputError(
            f"x has layout {x.layout} and shape {tuple(x.shape)}; give a dense tensor or a 2-D CSR one, "
            "for example x.to_sparse_csr()"
        )
    return x.crow_indices(), x.col_indices(), x.values()


def csr_rows(crow: Tensor, entries: int) -> Tensor:
    lengths = crow.diff()
    return torch.repeat_interleave(torch.arange(lengths.shape[0], device=crow.device), lengths, output_size=entries)


def check_csr_values(crow: Tensor, cols: Tensor, values: Tensor) -> None:
    if bool(torch.isfinite(values.detach().sum())) or bool(torch.isfinite(values).all()):
        return
    entry = int((~torch.isfinite(values)).nonzero()[0])
    row = int(torch.searchsorted(crow, torch.tensor(entry, device=crow.device, dtype=crow.dtype), right=True)) - 1
    what = "NaN" if bool(torch.isnan(values[entry])) else "infinite"
    raise InputError(
        f"x is {what} at row {row}, column {int(cols[entry])} although it is stored, and stored means observed; "
        "remove the entry or fill the value"
    )


def csr_count(
    crow: Tensor,
    cols: Tensor,
    dtype: torch.dtype,
    features: int,
    groups: Tensor | None = None,
    importance: Tensor | None = None,
) -> Float[Tensor, " rows"]:
    if groups is None and importance is None:
        return crow.diff().to(dtype)
    rows = csr_rows(crow, cols.shape[0])
    weights = torch.ones(cols.shape, dtype=dtype, device=cols.device)
    if importance is not None:
        if importance.shape != (features,):
            raise InputError(f"importance: expected {features} features, got shape {tuple(importance.shape)}")
        weights = importance.to(dtype)[cols]
    slots = rows
    if groups is not None:
        check_groups(groups, features)
        keys, slot = torch.unique(rows * features + groups.to(rows.dtype)[cols], return_inverse=True)
        weights = torch.zeros(keys.shape, dtype=dtype, device=cols.device).scatter_reduce(
            0, slot, weights, reduce="amax"
        )
        slots = torch.div(keys, features, rounding_mode="floor")
    return torch.zeros(crow.shape[0] - 1, dtype=dtype, device=cols.device).index_add(0, slots, weights)


def tensor_of(array: NDArray[Any]) -> Tensor:
    # torch has no read-only tensors and warns about an array that is (a memory map from joblib, say).
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def scipy_parts(x: SparseCSR) -> tuple[Tensor, Tensor, Tensor]:
    form = getattr(x, "format", None)
    if form is None:
        raise InputError(
            f"x is a {type(x).__name__}; give a torch tensor, for example torch.as_tensor(x), or a SciPy CSR matrix"
        )
    if form != "csr" or len(x.shape) != 2:
        raise InputError(f"x is a sparse matrix of format {form}, shape {x.shape}; give 2-D CSR, for example x.tocsr()")
    data = x.data if np.issubdtype(x.data.dtype, np.floating) else x.data.astype(np.float64)
    crow, cols = tensor_of(x.indptr.astype(np.int64)), tensor_of(x.indices.astype(np.int64))
    if not getattr(x, "has_canonical_format", True):
        _refuse_duplicates(crow, cols, x.shape[1])
    return crow, cols, tensor_of(data)


def _refuse_duplicates(crow: Tensor, cols: Tensor, features: int) -> None:
    """Refuse an entry stored twice, which would count twice; the order of columns does not matter."""
    keys = (csr_rows(crow, cols.shape[0]) * features + cols).sort().values
    repeated = keys[1:][keys.diff() == 0]
    if repeated.numel():
        row, column = divmod(int(repeated[0]), features)
        raise InputError(f"x stores row {row}, column {column} more than once; call x.sum_duplicates() first")


def _transposed(crow: Tensor, cols: Tensor, features: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the CSC view of a CSR pattern: column offsets, row numbers, and the order that sorts entries by column."""
    order = torch.argsort(cols, stable=True)
    offsets = torch.zeros(features + 1, dtype=crow.dtype, device=crow.device)
    offsets[1:] = torch.bincount(cols, minlength=features).cumsum(0)
    return offsets, csr_rows(crow, cols.shape[0]).to(cols.dtype)[order], order


def _bag(crow: Tensor, cols: Tensor, values: Tensor, table: Tensor) -> Tensor:
    return nn.functional.embedding_bag(
        cols, table.detach(), crow, mode="sum", per_sample_weights=values.detach(), include_last_offset=True
    )


class SparseMatmul(torch.autograd.Function):
    """``A @ table`` for a CSR ``A``: differentiable to any order, because its backward is made of its own kind."""

    @staticmethod
    def forward(ctx: Any, crow: Tensor, cols: Tensor, values: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(crow, cols, values, table)
        return _bag(crow, cols, values, table)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, None, Tensor | None, Tensor | None]:
        crow, cols, values, table = ctx.saved_tensors
        (grad,) = grad_outputs
        grad_values = SampledProduct.apply(crow, cols, grad, table) if ctx.needs_input_grad[2] else None
        grad_table = None
        if ctx.needs_input_grad[3]:
            offsets, rows, order = _transposed(crow, cols, table.shape[0])
            grad_table = SparseMatmul.apply(offsets, rows, values[order], grad)
        return None, None, grad_values, grad_table


class SampledProduct(torch.autograd.Function):
    """``left[row] . right[col]`` at the entries of a CSR pattern: the counterpart of `SparseMatmul`."""

    @staticmethod
    def forward(ctx: Any, crow: Tensor, cols: Tensor, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(crow, cols, left, right)
        return _sampled_product(crow, cols, left.detach(), right.detach())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, None, Tensor | None, Tensor | None]:
        crow, cols, left, right = ctx.saved_tensors
        (grad,) = grad_outputs
        grad_left = SparseMatmul.apply(crow, cols, grad, right) if ctx.needs_input_grad[2] else None
        grad_right = None
        if ctx.needs_input_grad[3]:
            offsets, rows, order = _transposed(crow, cols, right.shape[0])
            grad_right = SparseMatmul.apply(offsets, rows, grad[order], left)
        return None, None, grad_left, grad_right


# Entries of the two gathered blocks that are alive at once where torch has no fused kernel (float16, bfloat16).
_GATHERED_ELEMENTS = 1 << 20


def _sampled_product(crow: Tensor, cols: Tensor, left: Tensor, right: Tensor) -> Tensor:
    if left.dtype in (torch.float32, torch.float64):
        pattern = csr_tensor(crow, cols, left.new_zeros(cols.shape), (left.shape[0], right.shape[0]))
        return torch.sparse.sampled_addmm(pattern, left, right.t(), beta=0.0).values()
    rows = csr_rows(crow, cols.shape[0])
    step = max(1, _GATHERED_ELEMENTS // max(1, left.shape[1]))
    parts = [
        torch.linalg.vecdot(left[rows[at : at + step]], right[cols[at : at + step]])
        for at in range(0, cols.shape[0], step)
    ]
    return torch.cat(parts) if parts else left.new_zeros(cols.shape)


def same_index_dtype(crow: Tensor, cols: Tensor) -> tuple[Tensor, Tensor]:
    if crow.dtype == cols.dtype:
        return crow, cols
    return crow.to(torch.int64), cols.to(torch.int64)


def check_pattern(crow: Tensor, cols: Tensor, features: int) -> None:
    entries = cols.shape[0]
    if crow.shape[0] == 0 or int(crow[0]) != 0 or int(crow[-1]) != entries or bool((crow.diff() < 0).any()):
        raise InputError(
            f"crow does not fit cols: it must rise from 0 to {entries}, the number of entries, with rows + 1 offsets"
        )
    if entries:
        low, high = (int(bound) for bound in torch.aminmax(cols))
        if low < 0 or high >= features:
            bad = low if low < 0 else high
            raise InputError(f"cols holds {bad}; columns must lie in 0..{features - 1}, the rows of weight")
