"""Sparsity Normalization as pure functions: dense, masked, sparse and convolutional.

The method is that of Yi et al., "Why Not to Use Zero Imputation? Correcting Sparsity Bias in Training Neural
Networks", ICLR 2020, arXiv:1906.00150. An instance ``x`` with mask ``m`` (1 = observed) and observed count
``s = sum_j m_j`` is turned into

    z = (m * x) * scale(s),        scale(s) = (K / max(s + tau, min_count)) ** power

where ``K`` is a constant, the mean of ``s`` over the *training* instances. ``power = 1`` is the paper's;
``power``, ``tau``, ``center``, ``groups``, ``importance`` and confidence masks are extensions of this package.

Everything here is differentiable, works batched, and neither the value nor the gradient of anything depends on what
lies under a zero of the mask, NaN and infinity included.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, cast, overload, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from numpy.typing import NDArray
from torch import Tensor, nn

from shared_core.errors import InputError

__all__ = [
    "Observed",
    "SparseCSR",
    "masked_conv1d",
    "masked_conv2d",
    "masked_linear",
    "masked_mse",
    "mean_observed_count",
    "observe",
    "observed_count",
    "sampled_decode",
    "sparse_linear",
    "sparsity_normalize",
    "sparsity_scale",
]

Number = float | int
Dim = int | tuple[int, ...]
Anything = Shaped[Tensor, "..."]
"""A tensor whose shape is checked by hand, with a message of its own (a mask, say)."""
Constant = Float[Tensor, "..."] | float | int
"""A number, or a tensor that broadcasts (a learned power, a fitted K, a centre a feature)."""


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


class Observed(NamedTuple):
    """An input split into what is known and how well it is known; made by `observe`.

    Attributes
    ----------
    values : Float[Tensor, "*shape"]
        The input with 0 in place of every entry that is not observed (centred and confidence-weighted where asked).
    mask : Bool[Tensor, "*shape"]
        True where an entry is observed; the shape of ``values``.
    counts : Float[Tensor, "*kept"]
        The observed count ``s`` of each instance, float32 or float64, size 1 along the counted dimensions.
    """

    values: Float[Tensor, "*shape"]
    mask: Bool[Tensor, "*shape"]
    counts: Float[Tensor, "*kept"]


def is_concrete(*tensors: Tensor) -> bool:
    """Whether values of the tensors may be looked at: not while compiling, exporting, tracing, vmapping or capturing.

    Shapes are always checked; checks of *values* need a concrete tensor, and on a GPU a synchronisation.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return False
    # The only way torch has to say "inside vmap"; asking a batched tensor for its value raises.
    if torch._C._functorch.maybe_current_level() is not None:  # pyright: ignore[reportAttributeAccessIssue, reportPrivateUsage]
        return False
    if any(tensor.is_meta for tensor in tensors):
        return False
    return not (any(tensor.is_cuda for tensor in tensors) and torch.cuda.is_current_stream_capturing())


def _place(index: list[int]) -> str:
    if len(index) == 1:
        return f"position {index[0]}"
    if len(index) == 2:
        return f"row {index[0]}, column {index[1]}"
    return f"index {tuple(index)}"


def _check_floating(x: Tensor, name: str) -> None:
    if not x.is_floating_point():
        raise InputError(f"{name} has dtype {x.dtype}; give a floating-point tensor, for example {name}.float()")


def _check_finite(x: Tensor, observed: Tensor | None) -> None:
    """Refuse NaN and infinity among observed entries; ``observed=None`` means that NaN marks missing entries."""
    # One reduction without a temporary: a finite sum of the absolute kind proves every term finite.
    probe = x.detach().sum(dtype=torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else None)
    if bool(torch.isfinite(probe)):
        return
    bad = torch.isinf(x) if observed is None else observed & ~torch.isfinite(x)
    if not bool(bad.any()):
        return
    index = [int(i) for i in bad.nonzero()[0]]
    if bool(torch.isnan(x[tuple(index)])):
        raise InputError(
            f"x is NaN at {_place(index)} although mask says observed; set the mask to 0 there or fill the value"
        )
    raise InputError(f"x is infinite at {_place(index)}; observed entries must be finite, use NaN for a missing one")


def _check_mask_values(mask: Tensor, weighted: bool) -> None:
    bad = ~((mask >= 0) & (mask <= 1)) if weighted else (mask != 0) & (mask != 1)
    if bool(bad.any()):
        index = [int(i) for i in bad.nonzero()[0]]
        allowed = "in [0, 1]" if weighted else "0 or 1 (weighted=True allows confidences between them)"
        raise InputError(f"mask is {mask[tuple(index)].item():g} at {_place(index)}; it must be {allowed}")


def _check_scale(K: Constant | None, min_count: Number, tau: Number) -> None:
    if K is None:
        raise InputError(
            "K is missing; give the mean observed count of the training instances, as SparsityNorm().fit(x).K does"
        )
    if not isinstance(K, Tensor) or is_concrete(K):
        smallest = float(K.detach().min()) if isinstance(K, Tensor) else float(K)
        if not 0 < smallest < float("inf"):
            raise InputError(f"K is {smallest:g}; it must be positive and finite (the mean observed count on train)")
    if not min_count > 0:
        raise InputError(f"min_count is {min_count:g}; it must be positive, or an empty instance would divide by zero")
    if not tau >= 0:
        raise InputError(f"tau is {tau:g}; it must be zero or positive")


def _is_zero(power: Constant) -> bool:
    return not isinstance(power, Tensor) and power == 0


def _per_feature(vector: Tensor, x: Tensor, dim: Dim, name: str) -> Tensor:
    """Shape a per-feature vector so that it broadcasts against ``x`` along the counted dimension."""
    if vector.ndim == 1 and isinstance(dim, int) and vector.numel() != 1:
        features = x.shape[dim]
        if vector.shape[0] != features:
            raise InputError(f"{name} has {vector.shape[0]} entries; expected {features} features")
        shape = [1] * x.ndim
        shape[dim] = features
        return vector.reshape(shape)
    try:
        fits = torch.broadcast_shapes(vector.shape, x.shape) == x.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise InputError(f"{name} has shape {tuple(vector.shape)} but x has {tuple(x.shape)}; give one value a feature")
    return vector


def _group_count(weights: Tensor, groups: Tensor, dim: int, keepdim: bool) -> Tensor:
    """Sum over groups of the largest weight within each: a one-hot block counts as the one feature that it is."""
    weights = weights.movedim(dim, -1)
    # As many slots as features: the number of groups is a value, which a compiled or vmapped call cannot look at.
    slots = torch.zeros_like(weights)
    index = groups.to(device=weights.device, dtype=torch.int64).expand_as(weights)
    count = slots.scatter_reduce(-1, index, weights, reduce="amax").sum(-1, keepdim=keepdim)
    return count.movedim(-1, dim) if keepdim else count


def _check_groups(groups: Tensor, features: int) -> None:
    if groups.ndim != 1 or groups.shape[0] != features:
        raise InputError(f"groups has shape {tuple(groups.shape)}; expected ({features},), one group number a feature")
    if groups.is_floating_point():
        raise InputError(f"groups has dtype {groups.dtype}; give integer group numbers")
    if is_concrete(groups) and features:
        low, high = (int(bound) for bound in torch.aminmax(groups))
        if low < 0 or high >= features:
            bad = low if low < 0 else high
            raise InputError(f"groups holds {bad}; group numbers must lie in 0..{features - 1}")


def _count_dtype(x: Tensor) -> torch.dtype:
    # bfloat16 counts above 256 and float16 counts above 2048 are not exact.
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def observe(
    x: Float[Tensor, "*shape"],
    mask: Anything | None = None,
    *,
    dim: Dim = -1,
    center: Constant | None = None,
    groups: Anything | None = None,
    weighted: bool = False,
    importance: Anything | None = None,
    validate: bool = True,
) -> Observed:
    """Split an input into zero-imputed values, mask and observed counts.

    Parameters
    ----------
    x : Float[Tensor, "*shape"]
        The input, usually (batch, features). What lies under a zero of the mask is never used.
    mask : Tensor, optional
        Broadcastable to ``x``; bool, integer or floating, 1 = observed. By default NaN marks missing entries.
    dim : int or tuple of int, default -1
        The dimension or dimensions that hold one instance's entries.
    center : Tensor or float, optional
        Subtracted from observed entries; a vector of one value a feature, or anything broadcastable to ``x``.
    groups : Int[Tensor, "features"], optional
        Group number of each feature, in 0..features-1. A group counts as one feature, observed as soon as one of its
        columns is (a one-hot block).
    weighted : bool, default False
        Allow confidences in [0, 1] in ``mask``: values are multiplied by them and the count is their sum.
    importance : Float[Tensor, "features"], optional
        Non-negative weight ``a_j`` of each feature in the count: ``s_i = sum_j m_ij a_j``.
    validate : bool, default True
        Check the values of ``x`` and ``mask``. Skipped by itself while compiling, exporting or under `torch.vmap`.

    Returns
    -------
    Observed
        ``values``, ``mask`` and ``counts`` (kept dimensions of size 1).

    Raises
    ------
    InputError
        Shape or values of ``mask``, NaN or infinity among observed entries, or a vector of the wrong length.

    Examples
    --------
    >>> observe(torch.tensor([[1.0, float("nan"), 3.0]])).counts
    tensor([[2.]])
    """
    _check_floating(x, "x")
    look = validate and is_concrete(x)
    confidence: Tensor | None = None
    if mask is None:
        observed = x == x
        if look:
            _check_finite(x, None)
        values = torch.nan_to_num(x, nan=0.0, posinf=float("inf"), neginf=float("-inf"))
    else:
        try:
            fits = torch.broadcast_shapes(mask.shape, x.shape) == x.shape
        except RuntimeError:
            fits = False
        if not fits:
            raise InputError(f"mask has shape {tuple(mask.shape)} but x has {tuple(x.shape)}; give one entry for each")
        if mask.dtype == torch.bool:
            observed = mask.expand_as(x)
        else:
            if look:
                _check_mask_values(mask, weighted)
            observed = (mask != 0).expand_as(x)
            confidence = mask.to(_count_dtype(x)).expand_as(x) if weighted else None
        if look:
            _check_finite(x, observed)
        # Anything that is not finite goes before the first arithmetic, or 0 * NaN would reach values and gradients.
        values = torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)

    if center is not None:
        offset = torch.as_tensor(center, device=x.device).to(x.dtype)
        values = values - _per_feature(offset, x, dim, "center")
    if mask is not None or center is not None:
        # A product, not torch.where: the same result here, and several times faster on a CPU for scattered masks.
        values = values * (observed if confidence is None else confidence).to(x.dtype)

    if confidence is None and importance is None and groups is None:
        count = observed.sum(dim, keepdim=True, dtype=_count_dtype(x))
    else:
        weights = observed.to(_count_dtype(x)) if confidence is None else confidence
        if importance is not None:
            weights = weights * _per_feature(importance.to(weights.dtype), x, dim, "importance")
        if groups is None:
            count = weights.sum(dim, keepdim=True)
        else:
            if not isinstance(dim, int):
                raise InputError(f"groups needs one counted dimension; dim is {dim}")
            _check_groups(groups, x.shape[dim])
            count = _group_count(weights, groups, dim, keepdim=True)
    return Observed(values, observed, count)


def sparsity_scale(
    count: Float[Tensor, "*shape"],
    K: Constant | None,
    *,
    power: Constant = 1.0,
    min_count: Number = 1.0,
    tau: Number = 0.0,
) -> Float[Tensor, "*shape"]:
    """Return ``(K / max(count + tau, min_count)) ** power``, the factor that each instance is multiplied by.

    Parameters
    ----------
    count : Float[Tensor, "*shape"]
        Observed counts ``s``.
    K : float or Tensor
        Positive constant, the mean observed count of the training instances.
    power : float or Tensor, default 1.0
        1 is the paper's; 0.5 preserves the second moment of the first pre-activation, 0 is plain zero imputation.
    min_count : float, default 1.0
        Smallest divisor, positive.
    tau : float, default 0.0
        Added to the count: shrinks instances with few observed entries.

    Returns
    -------
    Float[Tensor, "*shape"]
        The shape of ``count``.

    Raises
    ------
    InputError
        ``K`` or ``min_count`` not positive, ``tau`` negative.

    Examples
    --------
    >>> sparsity_scale(torch.tensor([0.0, 1.0, 4.0]), 2.0)
    tensor([2.0000, 2.0000, 0.5000])
    """
    if _is_zero(power):
        return torch.ones_like(count)
    _check_scale(K, min_count, tau)
    assert K is not None
    divisor = (count + tau).clamp(min=min_count)
    ratio = K.to(divisor.dtype) / divisor if isinstance(K, Tensor) else K / divisor
    if not isinstance(power, Tensor) and power == 1:
        return ratio
    return ratio**power


@functools.cache
def _acknowledge_beta_warning() -> None:
    """Let torch give its once-a-process remark that CSR tensors are in beta where nobody has to read it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 0], [], [], (1, 1), check_invariants=False)


def _csr_tensor(crow: Tensor, cols: Tensor, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    _acknowledge_beta_warning()
    return torch.sparse_csr_tensor(crow, cols, values, shape, check_invariants=False)


def _csr_parts(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if x.layout != torch.sparse_csr or x.ndim != 2:
        raise InputError(
            f"x has layout {x.layout} and shape {tuple(x.shape)}; give a dense tensor or a 2-D CSR one, "
            "for example x.to_sparse_csr()"
        )
    return x.crow_indices(), x.col_indices(), x.values()


def _csr_rows(crow: Tensor, entries: int) -> Tensor:
    lengths = crow.diff()
    return torch.repeat_interleave(torch.arange(lengths.shape[0], device=crow.device), lengths, output_size=entries)


def _check_csr_values(crow: Tensor, cols: Tensor, values: Tensor) -> None:
    if bool(torch.isfinite(values.detach().sum())) or bool(torch.isfinite(values).all()):
        return
    entry = int((~torch.isfinite(values)).nonzero()[0])
    row = int(torch.searchsorted(crow, torch.tensor(entry, device=crow.device, dtype=crow.dtype), right=True)) - 1
    what = "NaN" if bool(torch.isnan(values[entry])) else "infinite"
    raise InputError(
        f"x is {what} at row {row}, column {int(cols[entry])} although it is stored, and stored means observed; "
        "remove the entry or fill the value"
    )


def _csr_count(
    crow: Tensor,
    cols: Tensor,
    dtype: torch.dtype,
    features: int,
    groups: Tensor | None = None,
    importance: Tensor | None = None,
) -> Float[Tensor, " rows"]:
    if groups is None and importance is None:
        return crow.diff().to(dtype)
    rows = _csr_rows(crow, cols.shape[0])
    weights = torch.ones(cols.shape, dtype=dtype, device=cols.device)
    if importance is not None:
        if importance.shape != (features,):
            raise InputError(f"importance has shape {tuple(importance.shape)}; expected {features} features")
        weights = importance.to(dtype)[cols]
    slots = rows
    if groups is not None:
        _check_groups(groups, features)
        keys, slot = torch.unique(rows * features + groups.to(rows.dtype)[cols], return_inverse=True)
        weights = torch.zeros(keys.shape, dtype=dtype, device=cols.device).scatter_reduce(
            0, slot, weights, reduce="amax"
        )
        slots = torch.div(keys, features, rounding_mode="floor")
    return torch.zeros(crow.shape[0] - 1, dtype=dtype, device=cols.device).index_add(0, slots, weights)


def _normalize_csr_values(
    crow: Tensor,
    cols: Tensor,
    values: Tensor,
    features: int,
    K: Constant | None,
    *,
    power: Constant,
    center: Constant | None,
    min_count: Number,
    tau: Number,
    groups: Tensor | None,
    importance: Tensor | None,
    validate: bool,
) -> Tensor:
    _check_floating(values, "x")
    if validate and is_concrete(values):
        _check_csr_values(crow, cols, values)
    if center is not None:
        offset = torch.as_tensor(center, device=values.device).to(values.dtype)
        if offset.numel() == 1:
            values = values - offset
        elif offset.shape == (features,):
            values = values - offset[cols]
        else:
            raise InputError(f"center has shape {tuple(offset.shape)}; expected {features} features")
    count = _csr_count(crow, cols, _count_dtype(values), features, groups, importance)
    scale = sparsity_scale(count, K, power=power, min_count=min_count, tau=tau)
    return (values * scale[_csr_rows(crow, cols.shape[0])]).to(values.dtype)


def _writable(array: NDArray[Any]) -> Tensor:
    # torch has no read-only tensors and warns about an array that is (a memory map, say).
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _scipy_parts(x: SparseCSR) -> tuple[Tensor, Tensor, Tensor]:
    if len(x.shape) != 2 or getattr(x, "format", "csr") != "csr":
        raise InputError(f"x is a sparse matrix of format {getattr(x, 'format', '?')}; give CSR, for example x.tocsr()")
    data = x.data if np.issubdtype(x.data.dtype, np.floating) else x.data.astype(np.float64)
    return _writable(x.indptr.astype(np.int64)), _writable(x.indices.astype(np.int64)), _writable(data)


def observed_count(
    x: Float[Tensor, "*shape"] | SparseCSR,
    mask: Anything | None = None,
    *,
    dim: Dim = -1,
    groups: Anything | None = None,
    weighted: bool = False,
    importance: Anything | None = None,
    validate: bool = True,
) -> Float[Tensor, "*instances"]:
    """Count the observed entries of each instance: ``s = sum_j m_j``.

    Parameters
    ----------
    x : Float[Tensor, "*shape"] or CSR
        Dense (NaN or ``mask`` says what is missing), torch CSR, or SciPy CSR (every *stored* entry is observed,
        stored zeros included).
    mask, dim, groups, weighted, importance, validate
        As in `observe`. A sparse ``x`` takes no mask and no ``dim``.

    Returns
    -------
    Float[Tensor, "*instances"]
        Counts in float32 (float64 for a float64 ``x``), without the counted dimensions.

    Raises
    ------
    InputError
        As in `observe`.

    Examples
    --------
    >>> observed_count(torch.tensor([[1.0, float("nan"), 3.0], [0.0, 0.0, 0.0]]))
    tensor([2., 3.])
    """
    if not isinstance(x, Tensor):
        crow, cols, values = _scipy_parts(x)
        return _csr_count(crow, cols, _count_dtype(values), x.shape[1], groups, importance)
    if x.layout != torch.strided:
        crow, cols, values = _csr_parts(x)
        return _csr_count(crow, cols, _count_dtype(values), x.shape[1], groups, importance)
    count = observe(x, mask, dim=dim, groups=groups, weighted=weighted, importance=importance, validate=validate).counts
    return count.squeeze(dim)


def mean_observed_count(count: Float[Tensor, "*shape"], *, count_empty: bool = False) -> Float[Tensor, ""]:
    """Return K, the mean observed count over instances.

    Parameters
    ----------
    count : Float[Tensor, "*shape"]
        Observed counts of the training instances.
    count_empty : bool, default False
        Let instances with nothing observed count in the mean. Leaving them out is a pure rescale.

    Returns
    -------
    Float[Tensor, ""]
        A positive scalar of the dtype of ``count``.

    Raises
    ------
    InputError
        No instance has an observed entry.

    Examples
    --------
    >>> mean_observed_count(torch.tensor([2.0, 4.0, 0.0]))
    tensor(3.)
    """
    total = count.sum(dtype=torch.float64)
    instances = count.numel() if count_empty else int(torch.count_nonzero(count))
    if not float(total) > 0:
        raise InputError(f"no entry is observed in any of the {count.numel()} instances; K needs at least one")
    return (total / instances).to(count.dtype)


_CSR = TypeVar("_CSR", bound=SparseCSR)


@overload
def sparsity_normalize(
    x: Float[Tensor, "*shape"],
    mask: Anything | None = None,
    K: Constant | None = None,
    *,
    power: Constant = 1.0,
    center: Constant | None = None,
    min_count: Number = 1.0,
    tau: Number = 0.0,
    groups: Anything | None = None,
    weighted: bool = False,
    importance: Anything | None = None,
    dim: Dim = -1,
    validate: bool = True,
) -> Float[Tensor, "*shape"]: ...


@overload
def sparsity_normalize(
    x: _CSR,
    mask: None = None,
    K: Constant | None = None,
    *,
    power: Constant = 1.0,
    center: Constant | None = None,
    min_count: Number = 1.0,
    tau: Number = 0.0,
    groups: Anything | None = None,
    weighted: bool = False,
    importance: Anything | None = None,
    dim: Dim = -1,
    validate: bool = True,
) -> _CSR: ...


def sparsity_normalize(
    x: Float[Tensor, "*shape"] | SparseCSR,
    mask: Anything | None = None,
    K: Constant | None = None,
    *,
    power: Constant = 1.0,
    center: Constant | None = None,
    min_count: Number = 1.0,
    tau: Number = 0.0,
    groups: Anything | None = None,
    weighted: bool = False,
    importance: Anything | None = None,
    dim: Dim = -1,
    validate: bool = True,
) -> Float[Tensor, "*shape"] | SparseCSR:
    """Apply Sparsity Normalization: zero-impute and multiply each instance by ``(K / max(s + tau, min_count))**power``.

    Parameters
    ----------
    x : Float[Tensor, "*shape"] or CSR
        Dense, usually (batch, features); or a 2-D torch or SciPy CSR matrix, whose *stored pattern* is the mask
        (an explicitly stored zero is observed) and which comes back with the same pattern.
    mask : Tensor, optional
        Broadcastable to ``x``, 1 = observed; by default NaN marks missing entries. Not for a sparse ``x``.
    K : float or Tensor
        Positive constant: the mean observed count of the *training* instances. Needed unless ``power`` is 0.
    power : float or scalar Tensor, default 1.0
        1 is the paper's; 0.5 preserves the second moment of the first pre-activation; 0 is plain zero imputation. A
        tensor may require a gradient.
    center : Tensor or float, optional
        Subtracted from observed entries first: one value a feature, or one for all.
    min_count : float, default 1.0
        Smallest divisor, positive. An instance with nothing observed becomes all zeros.
    tau : float, default 0.0
        Added to the count: shrinks instances with few observed entries.
    groups, weighted, importance, validate
        As in `observe`.
    dim : int or tuple of int, default -1
        The dimension or dimensions that hold one instance's entries.

    Returns
    -------
    Float[Tensor, "*shape"] or CSR
        The shape, dtype and layout of ``x``.

    Raises
    ------
    InputError
        ``K`` not positive; shape or values of ``mask``; NaN or infinity among observed entries.

    Notes
    -----
    Yi et al. (ICLR 2020, arXiv:1906.00150), Sparsity Normalization. Counts are taken in float32 at least, also under
    autocast and for bfloat16. ``dz/dx = mask * scale``: the gradient at a missing entry is exactly 0.

    Examples
    --------
    >>> nan = float("nan")
    >>> sparsity_normalize(torch.tensor([[1.0, nan, 3.0, nan], [1.0, 2.0, 3.0, 4.0]]), K=3.0)
    tensor([[1.5000, 0.0000, 4.5000, 0.0000],
            [0.7500, 1.5000, 2.2500, 3.0000]])
    """
    if isinstance(x, Tensor) and x.layout == torch.strided:
        values, _, counts = observe(
            x,
            mask,
            dim=dim,
            center=center,
            groups=groups,
            weighted=weighted,
            importance=importance,
            validate=validate,
        )
        if _is_zero(power):
            return values
        return (values * sparsity_scale(counts, K, power=power, min_count=min_count, tau=tau)).to(x.dtype)
    if mask is not None:
        raise InputError("mask is not for a sparse x: its stored pattern is the mask; leave mask out")
    crow, cols, values = _csr_parts(x) if isinstance(x, Tensor) else _scipy_parts(x)
    features = int(x.shape[1])
    scaled = _normalize_csr_values(
        crow,
        cols,
        values,
        features,
        K,
        power=power,
        center=center,
        min_count=min_count,
        tau=tau,
        groups=groups,
        importance=importance,
        validate=validate,
    )
    if isinstance(x, Tensor):
        return _csr_tensor(crow, cols, scaled, tuple(x.shape))
    build: Any = type(x)
    return build((scaled.detach().numpy(), x.indices.copy(), x.indptr.copy()), shape=x.shape)


def _transposed(crow: Tensor, cols: Tensor, features: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the CSC view of a CSR pattern: column offsets, row numbers, and the order that sorts entries by column."""
    order = torch.argsort(cols, stable=True)
    offsets = torch.zeros(features + 1, dtype=crow.dtype, device=crow.device)
    offsets[1:] = torch.bincount(cols, minlength=features).cumsum(0)
    return offsets, _csr_rows(crow, cols.shape[0]).to(cols.dtype)[order], order


def _bag(crow: Tensor, cols: Tensor, values: Tensor, table: Tensor) -> Tensor:
    return nn.functional.embedding_bag(
        cols, table.detach(), crow, mode="sum", per_sample_weights=values.detach(), include_last_offset=True
    )


class _SparseMatmul(torch.autograd.Function):
    """``A @ table`` for a CSR ``A``: differentiable to any order, because its backward is made of its own kind."""

    @staticmethod
    def forward(ctx: Any, crow: Tensor, cols: Tensor, values: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(crow, cols, values, table)
        return _bag(crow, cols, values, table)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, None, Tensor | None, Tensor | None]:
        crow, cols, values, table = ctx.saved_tensors
        (grad,) = grad_outputs
        grad_values = _SampledProduct.apply(crow, cols, grad, table) if ctx.needs_input_grad[2] else None
        grad_table = None
        if ctx.needs_input_grad[3]:
            offsets, rows, order = _transposed(crow, cols, table.shape[0])
            grad_table = _SparseMatmul.apply(offsets, rows, values[order], grad)
        return None, None, grad_values, grad_table


class _SampledProduct(torch.autograd.Function):
    """``left[row] . right[col]`` at the entries of a CSR pattern: the counterpart of `_SparseMatmul`."""

    @staticmethod
    def forward(ctx: Any, crow: Tensor, cols: Tensor, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(crow, cols, left, right)
        return _sampled_product(crow, cols, left.detach(), right.detach())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, None, Tensor | None, Tensor | None]:
        crow, cols, left, right = ctx.saved_tensors
        (grad,) = grad_outputs
        grad_left = _SparseMatmul.apply(crow, cols, grad, right) if ctx.needs_input_grad[2] else None
        grad_right = None
        if ctx.needs_input_grad[3]:
            offsets, rows, order = _transposed(crow, cols, right.shape[0])
            grad_right = _SparseMatmul.apply(offsets, rows, grad[order], left)
        return None, None, grad_left, grad_right


# Entries of the two gathered blocks that are alive at once where torch has no fused kernel (float16, bfloat16).
_GATHERED_ELEMENTS = 1 << 20


def _sampled_product(crow: Tensor, cols: Tensor, left: Tensor, right: Tensor) -> Tensor:
    if left.dtype in (torch.float32, torch.float64):
        pattern = _csr_tensor(crow, cols, left.new_zeros(cols.shape), (left.shape[0], right.shape[0]))
        return torch.sparse.sampled_addmm(pattern, left, right.t(), beta=0.0).values()
    rows = _csr_rows(crow, cols.shape[0])
    step = max(1, _GATHERED_ELEMENTS // max(1, left.shape[1]))
    parts = [
        torch.linalg.vecdot(left[rows[at : at + step]], right[cols[at : at + step]])
        for at in range(0, cols.shape[0], step)
    ]
    return torch.cat(parts) if parts else left.new_zeros(cols.shape)


def _same_index_dtype(crow: Tensor, cols: Tensor) -> tuple[Tensor, Tensor]:
    if crow.dtype == cols.dtype:
        return crow, cols
    return crow.to(torch.int64), cols.to(torch.int64)


def sparse_linear(
    crow: Int[Tensor, " rows_and_one"],
    cols: Int[Tensor, " entries"],
    values: Float[Tensor, " entries"],
    weight: Float[Tensor, "features outputs"],
    bias: Float[Tensor, " outputs"] | None = None,
    K: Constant | None = None,
    *,
    power: Constant = 1.0,
    min_count: Number = 1.0,
    tau: Number = 0.0,
    count: Float[Tensor, " rows"] | None = None,
    validate: bool = True,
) -> Float[Tensor, "rows outputs"]:
    """Apply a linear layer to sparsity-normalized CSR rows in ``O(entries * outputs)``; nothing dense is formed.

    ``out_i = scale(s_i) * sum_j values_ij weight_j + bias`` with ``s_i`` the number of *stored* entries of row i.

    Parameters
    ----------
    crow : Int[Tensor, "rows + 1"]
        Row offsets, from 0 to the number of entries (CSR ``indptr``).
    cols : Int[Tensor, "entries"]
        Column of each entry, in 0..features-1; the order within a row does not matter.
    values : Float[Tensor, "entries"]
        Stored values.
    weight : Float[Tensor, "features outputs"]
        One row a feature, like an embedding table: the transpose of `torch.nn.Linear`'s.
    bias : Float[Tensor, "outputs"], optional
        Added outside the scale.
    K, power, min_count, tau
        As in `sparsity_normalize`.
    count : Float[Tensor, "rows"], optional
        Counts to use in place of the stored ones (grouped, weighted, or those of a larger row).
    validate : bool, default True
        Check offsets and columns, which index memory.

    Returns
    -------
    Float[Tensor, "rows outputs"]
        Differentiable to any order in ``values``, ``weight`` and ``bias``; gradients are dense.

    Raises
    ------
    InputError
        Offsets that do not fit the entries, a column out of range, ``K`` not positive.

    Notes
    -----
    Yi et al. (ICLR 2020), Sparsity Normalization, with the scale applied after the product:
    ``W (x * scale) = scale * (W x)``.

    Examples
    --------
    >>> crow, cols = torch.tensor([0, 2, 3]), torch.tensor([0, 2, 1])
    >>> sparse_linear(crow, cols, torch.ones(3), torch.ones(4, 1), K=1.5)
    tensor([[1.5000],
            [1.5000]])
    """
    crow, cols = _same_index_dtype(crow, cols)
    if validate and is_concrete(crow, cols):
        _check_pattern(crow, cols, weight.shape[0])
    dtype = torch.promote_types(values.dtype, weight.dtype)
    values, weight = values.to(dtype), weight.to(dtype)
    if is_concrete(crow, cols, values, weight):
        product = cast("Tensor", _SparseMatmul.apply(crow, cols, values, weight))
    else:
        rows = _csr_rows(crow, cols.shape[0])
        product = weight.new_zeros(crow.shape[0] - 1, weight.shape[1]).index_add(
            0, rows, values[:, None] * weight[cols]
        )
    if not _is_zero(power):
        stored = crow.diff().to(_count_dtype(product)) if count is None else count
        scale = sparsity_scale(stored, K, power=power, min_count=min_count, tau=tau)
        product = (product * scale[:, None]).to(dtype)
    return product if bias is None else product + bias


def _check_pattern(crow: Tensor, cols: Tensor, features: int) -> None:
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


def _sampled_pairs(hidden: Tensor, weight: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    order = None if bool((rows.diff() >= 0).all()) else torch.argsort(rows, stable=True)
    sorted_cols = cols if order is None else cols[order]
    crow = torch.zeros(hidden.shape[0] + 1, dtype=cols.dtype, device=cols.device)
    crow[1:] = torch.bincount(rows, minlength=hidden.shape[0]).cumsum(0)
    product = cast("Tensor", _SampledProduct.apply(crow, sorted_cols, hidden, weight))
    return product if order is None else product[torch.argsort(order)]


def sampled_decode(
    hidden: Float[Tensor, "batch hidden"],
    weight: Float[Tensor, "outputs hidden"],
    bias: Float[Tensor, " outputs"] | None,
    rows: Int[Tensor, " entries"],
    cols: Int[Tensor, " _entries"],
    *,
    validate: bool = True,
) -> Float[Tensor, " entries"]:
    """Compute ``hidden @ weight.T + bias`` only at the given (row, column) pairs.

    Parameters
    ----------
    hidden : Float[Tensor, "batch hidden"]
        Codes.
    weight : Float[Tensor, "outputs hidden"]
        Decoder weight, laid out like `torch.nn.Linear`'s.
    bias : Float[Tensor, "outputs"] or None
        Decoder bias.
    rows, cols : Int[Tensor, "entries"]
        Pairs to compute, in any order, repeats allowed. Rows in rising order (a CSR pattern) save a sort.
    validate : bool, default True
        Check that rows and columns are in range.

    Returns
    -------
    Float[Tensor, "entries"]
        Outputs in the order of the pairs, differentiable to any order. No (batch, outputs) tensor is formed.

    Raises
    ------
    InputError
        A row or column out of range, or ``rows`` and ``cols`` of different lengths.

    Examples
    --------
    >>> weight, rows, cols = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([0, 1]), torch.tensor([1, 0])
    >>> sampled_decode(torch.eye(2), weight, None, rows, cols)
    tensor([3., 2.])
    """
    rows, cols = _same_index_dtype(rows, cols)
    if rows.shape != cols.shape:
        raise InputError(f"rows has {rows.shape[0]} entries but cols has {cols.shape[0]}; give pairs")
    if validate and is_concrete(rows, cols) and rows.numel():
        for name, index, bound in (("rows", rows, hidden.shape[0]), ("cols", cols, weight.shape[0])):
            low, high = (int(value) for value in torch.aminmax(index))
            if low < 0 or high >= bound:
                raise InputError(f"{name} holds {low if low < 0 else high}; it must lie in 0..{bound - 1}")
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    if is_concrete(hidden, weight, rows, cols):
        product = _sampled_pairs(hidden, weight, rows, cols)
    else:
        # A compiler fuses the gathers into the product; a vmap has no rule for the functions above.
        product = (hidden[rows] * weight[cols]).sum(-1)
    return product if bias is None else product + bias[cols]


def masked_linear(
    x: Float[Tensor, "*batch _features"],
    mask: Anything | None,
    weight: Float[Tensor, "outputs features"],
    bias: Float[Tensor, " outputs"] | None = None,
    K: Constant | None = None,
    *,
    power: Constant = 1.0,
    center: Constant | None = None,
    min_count: Number = 1.0,
    tau: Number = 0.0,
    groups: Anything | None = None,
    weighted: bool = False,
    importance: Anything | None = None,
    validate: bool = True,
) -> Float[Tensor, "*batch outputs"]:
    """Apply a linear layer to sparsity-normalized input: ``scale(s) * (W (m * x)) + b``.

    Equal to ``linear(sparsity_normalize(x, mask, K), weight, bias)``, with the scale applied to the outputs: they are
    usually fewer than the inputs, and no scaled copy of ``x`` is made.

    Parameters
    ----------
    x : Float[Tensor, "*batch features"] or CSR
        Dense input of any number of leading dimensions, or a 2-D torch CSR matrix (stored = observed).
    mask : Tensor or None
        1 = observed; None takes NaN as missing.
    weight : Float[Tensor, "outputs features"]
        Laid out like `torch.nn.Linear`'s.
    bias : Float[Tensor, "outputs"], optional
        Added outside the scale, so an instance with nothing observed gives the bias alone.
    K, power, center, min_count, tau, groups, weighted, importance, validate
        As in `sparsity_normalize`.

    Returns
    -------
    Float[Tensor, "*batch outputs"]

    Raises
    ------
    InputError
        As in `sparsity_normalize`; also a feature count that is not that of ``weight``.

    Notes
    -----
    Yi et al. (ICLR 2020), Sparsity Normalization, with the scale moved past the product, which is an identity.

    Examples
    --------
    >>> x = torch.tensor([[2.0, float("nan"), 2.0], [2.0, 2.0, 2.0]])
    >>> masked_linear(x, None, torch.ones(1, 3), torch.tensor([10.0]), K=2.5)
    tensor([[15.],
            [15.]])
    """
    if x.shape[-1] != weight.shape[1]:
        raise InputError(f"x has {x.shape[-1]} features; expected {weight.shape[1]} features")
    if x.layout != torch.strided:
        if mask is not None:
            raise InputError("mask is not for a sparse x: its stored pattern is the mask; leave mask out")
        crow, cols, values = _csr_parts(x)
        values = _normalize_csr_values(
            crow,
            cols,
            values,
            x.shape[1],
            None,
            power=0,
            center=center,
            min_count=min_count,
            tau=tau,
            groups=None,
            importance=None,
            validate=validate,
        )
        count = _csr_count(crow, cols, _count_dtype(values), x.shape[1], groups, importance)
        return sparse_linear(
            crow,
            cols,
            values,
            weight.t(),
            bias,
            K,
            power=power,
            min_count=min_count,
            tau=tau,
            count=count,
            validate=False,
        )
    values, _, counts = observe(
        x, mask, center=center, groups=groups, weighted=weighted, importance=importance, validate=validate
    )
    if _is_zero(power):
        return nn.functional.linear(values, weight, bias)
    product = nn.functional.linear(values, weight)
    product = (product * sparsity_scale(counts, K, power=power, min_count=min_count, tau=tau)).to(product.dtype)
    return product if bias is None else product + bias.to(product.dtype)


Form = Literal["window", "instance"]
Stride = int | tuple[int, ...]
Padding = str | int | tuple[int, ...]


def _masked_conv(
    spatial: int,
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *,
    stride: Stride,
    padding: Padding,
    dilation: Stride,
    groups: int,
    form: Form,
    K: Constant | None,
    power: Constant,
    min_count: Number,
    validate: bool,
) -> tuple[Tensor, Tensor]:

    def convolve(signal: Tensor, kernel: Tensor, groups: int) -> Tensor:
        function = nn.functional.conv1d if spatial == 1 else nn.functional.conv2d
        return function(signal, kernel, None, stride, padding, dilation, groups)  # pyright: ignore[reportArgumentType, reportCallIssue]

    if x.ndim != spatial + 2:
        raise InputError(
            f"x has shape {tuple(x.shape)}; give (batch, channels, {'length' if spatial == 1 else 'height, width'})"
        )
    if x.shape[1] != weight.shape[1] * groups:
        raise InputError(f"x has {x.shape[1]} channels; expected {weight.shape[1] * groups} channels")
    if mask is not None and mask.ndim == spatial + 1:
        mask = mask.unsqueeze(1)
    one_channel = mask is not None and mask.ndim == spatial + 2 and mask.shape[1] == 1
    values, observed, _ = observe(x, mask, dim=1, validate=validate)

    # Counts do not go through autocast: bfloat16 is exact only up to 256 entries a window.
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        if one_channel:
            seen = observed[:, :1].to(_count_dtype(x))
            per_window = weight[0, 0].numel()
        else:
            seen = observed.unflatten(1, (groups, -1)).sum(2, dtype=_count_dtype(x))
            per_window = weight[0].numel()
        kernel = torch.ones(seen.shape[1], 1, *weight.shape[2:], dtype=seen.dtype, device=x.device)
        window_count = convolve(seen, kernel, seen.shape[1])
        # Sums of zeros and ones: rounding only undoes what a fast convolution algorithm may have blurred.
        window_count = window_count.round()
        mask_out = window_count > 0
        if form == "window":
            scale = (per_window / window_count.clamp(min=1)) ** (power.detach() if isinstance(power, Tensor) else power)
            scale = scale * mask_out
        else:
            scale = sparsity_scale(
                seen.sum(tuple(range(1, seen.ndim)), keepdim=True), K, power=power, min_count=min_count
            )
    if mask_out.shape[1] not in (1,):
        repeat = weight.shape[0] // mask_out.shape[1]
        mask_out = mask_out.repeat_interleave(repeat, 1)
        scale = scale.repeat_interleave(repeat, 1) if scale.shape[1] != 1 else scale
    out = convolve(values, weight, groups)
    out = (out * scale).to(out.dtype)
    if bias is not None:
        shift = bias.to(out.dtype).reshape(1, -1, *([1] * spatial))
        out = out + (shift * mask_out if form == "window" else shift)
    return out, mask_out


def masked_conv1d(
    x: Float[Tensor, "*shape"],
    mask: Anything | None,
    weight: Float[Tensor, "out_channels in_channels_per_group width"],
    bias: Float[Tensor, " out_channels"] | None = None,
    *,
    stride: int | tuple[int, ...] = 1,
    padding: str | int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    form: Literal["window", "instance"] = "window",
    K: Constant | None = None,
    power: float | int = 1.0,
    min_count: Number = 1.0,
    validate: bool = True,
) -> tuple[Float[Tensor, "*out"], Bool[Tensor, "*out_mask"]]:
    """Convolve sequences with missing entries; see `masked_conv2d`, of which this is the one-dimensional form.

    Examples
    --------
    >>> x = torch.tensor([[[1.0, float("nan"), 1.0, 1.0]]])
    >>> masked_conv1d(x, None, torch.ones(1, 1, 2))[0]
    tensor([[[2., 2., 2.]]])
    """
    return _masked_conv(
        1,
        x,
        mask,
        weight,
        bias,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        form=form,
        K=K,
        power=power,
        min_count=min_count,
        validate=validate,
    )


def masked_conv2d(
    x: Float[Tensor, "*shape"],
    mask: Anything | None,
    weight: Float[Tensor, "out_channels in_channels_per_group height width"],
    bias: Float[Tensor, " out_channels"] | None = None,
    *,
    stride: int | tuple[int, ...] = 1,
    padding: str | int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    form: Literal["window", "instance"] = "window",
    K: Constant | None = None,
    power: float | int = 1.0,
    min_count: Number = 1.0,
    validate: bool = True,
) -> tuple[Float[Tensor, "*out"], Bool[Tensor, "*out_mask"]]:
    """Convolve images with missing pixels, correcting for how many were observed.

    Parameters
    ----------
    x : Float[Tensor, "batch channels height width"]
        Input; what lies under a zero of the mask is never used.
    mask : Tensor or None
        1 = observed. (batch, height, width) or (batch, 1, height, width): the channels of a pixel are observed
        together, and pixels are counted. (batch, channels, height, width): entries are counted. None: NaN is missing.
    weight, bias, stride, padding, dilation, groups
        As in `torch.nn.functional.conv2d`. Padding counts as not observed.
    form : {"window", "instance"}, default "window"
        "window": partial convolution (arXiv:1804.07723, arXiv:1811.11718), at each output position
        ``out = conv(x * m) * (window size / observed in window) ** power + bias``, and 0 where nothing was observed.
        "instance": Sparsity Normalization with one count over all positions of an instance (and channels, if the mask
        has them), ``out = conv(x * m) * (K / s) ** power + bias``; our reading of how the paper carries over.
    K : float or Tensor
        For ``form="instance"`` only: the mean observed count of the training instances.
    power, min_count, validate
        As in `sparsity_normalize`.

    Returns
    -------
    out : Float[Tensor, "batch out_channels out_height out_width"]
    mask_out : Bool[Tensor, "batch channels out_height out_width"]
        True where the window held an observed entry; one channel unless ``groups > 1`` and the mask has channels.

    Raises
    ------
    InputError
        Wrong number of dimensions or channels; mask or value errors as in `sparsity_normalize`.

    Examples
    --------
    >>> x = torch.ones(1, 1, 3, 3)
    >>> masked_conv2d(x, torch.eye(3)[None], torch.ones(1, 1, 2, 2))[0]
    tensor([[[[4., 4.],
              [4., 4.]]]])
    """
    return _masked_conv(
        2,
        x,
        mask,
        weight,
        bias,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        form=form,
        K=K,
        power=power,
        min_count=min_count,
        validate=validate,
    )


def masked_mse(
    prediction: Float[Tensor, "*shape"],
    target: Float[Tensor, "*other"],
    mask: Anything | None = None,
    *,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Float[Tensor, "*out"]:
    """Squared error over observed targets only.

    Parameters
    ----------
    prediction, target : Float[Tensor, "*shape"]
        The same shape. NaN in ``target`` is missing unless ``mask`` says otherwise.
    mask : Tensor, optional
        1 = observed, broadcastable to ``target``.
    reduction : {"mean", "sum", "none"}, default "mean"
        The mean is over *observed* entries, 0 where there are none.

    Returns
    -------
    Float[Tensor, "*out"]
        A scalar, or the shape of ``target`` for "none". No gradient reaches ``prediction`` where nothing was observed.

    Raises
    ------
    InputError
        Shapes that differ, or a mask that does not broadcast.

    Examples
    --------
    >>> masked_mse(torch.tensor([1.0, 2.0]), torch.tensor([3.0, float("nan")]))
    tensor(4.)
    """
    if prediction.shape != target.shape:
        raise InputError(f"prediction has shape {tuple(prediction.shape)} but target has {tuple(target.shape)}")
    known, observed, _ = observe(target, mask)
    error = (torch.where(observed, prediction, 0.0) - known) ** 2
    if reduction == "none":
        return error
    total = error.sum()
    return total if reduction == "sum" else total / observed.sum().clamp(min=1)
