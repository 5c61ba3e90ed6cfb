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

from typing import Any, Literal, NamedTuple, TypeVar, cast, overload

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from shared_core.errors import InputError
from sparsity_norm._checks import (
    check_finite,
    check_floating,
    check_groups,
    check_mask_values,
    count_dtype,
    is_concrete,
)
from sparsity_norm._csr import (
    SampledProduct,
    SparseCSR,
    SparseMatmul,
    check_csr_values,
    check_pattern,
    csr_count,
    csr_parts,
    csr_rows,
    csr_tensor,
    same_index_dtype,
    scipy_parts,
)

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
Constant = Anything | float | int
"""A number, or a tensor that broadcasts (a learned power, a fitted K, a centre a feature)."""


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


def _check_scale(K: Constant | None, min_count: Number, tau: Number, validate: bool) -> None:
    if K is None:
        raise InputError(
            "K is missing; give the mean observed count of the training instances, as SparsityNorm().fit(x).K does"
        )
    if not isinstance(K, Tensor) or (validate and is_concrete(K)):
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
            raise InputError(f"{name}: expected {features} features, got {vector.shape[0]}")
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
    check_floating(x, "x")
    look = validate and is_concrete(x)
    confidence: Tensor | None = None
    if mask is None:
        observed = x == x
        values = torch.nan_to_num(x, nan=0.0, posinf=float("inf"), neginf=float("-inf"))
        if look:
            check_finite(x, None, values)
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
                check_mask_values(mask, weighted)
            observed = (mask != 0).expand_as(x)
            confidence = mask.to(count_dtype(x)).expand_as(x) if weighted else None
        # Anything that is not finite goes before the first arithmetic, or 0 * NaN would reach values and gradients.
        if look:
            check_finite(x, observed, x)
            # With the product below the same as torch.where, and several times faster on a CPU for scattered masks;
            # where nobody has looked it would hide a NaN that is observed.
            values = torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)
        else:
            values = torch.where(observed, x, 0.0)

    if center is not None:
        offset = torch.as_tensor(center, device=x.device).to(x.dtype)
        values = values - _per_feature(offset, x, dim, "center")
    if (look and mask is not None) or center is not None or confidence is not None:
        values = values * (observed if confidence is None else confidence).to(x.dtype)

    if confidence is None and importance is None and groups is None:
        count = observed.sum(dim, keepdim=True, dtype=count_dtype(x))
    else:
        weights = observed.to(count_dtype(x)) if confidence is None else confidence
        if importance is not None:
            weights = weights * _per_feature(importance.to(weights.dtype), x, dim, "importance")
        if groups is None:
            count = weights.sum(dim, keepdim=True)
        else:
            if not isinstance(dim, int):
                raise InputError(f"groups needs one counted dimension; dim is {dim}")
            check_groups(groups, x.shape[dim])
            count = _group_count(weights, groups, dim, keepdim=True)
    return Observed(values, observed, count)


def sparsity_scale(
    count: Float[Tensor, "*shape"],
    K: Constant | None,
    *,
    power: Constant = 1.0,
    min_count: Number = 1.0,
    tau: Number = 0.0,
    validate: bool = True,
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
    validate : bool, default True
        Look at the value of a tensor ``K`` (a synchronisation on a GPU).

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
    _check_scale(K, min_count, tau, validate)
    assert K is not None
    divisor = (count + tau).clamp(min=min_count)
    ratio = K.to(divisor.dtype) / divisor if isinstance(K, Tensor) else float(K) / divisor
    if not isinstance(power, Tensor) and power == 1:
        return ratio
    return ratio**power


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
    check_floating(values, "x")
    if validate and is_concrete(values):
        check_csr_values(crow, cols, values)
    if center is not None:
        offset = torch.as_tensor(center, device=values.device).to(values.dtype)
        if offset.numel() == 1:
            values = values - offset
        elif offset.shape == (features,):
            values = values - offset[cols]
        else:
            raise InputError(f"center: expected {features} features, got shape {tuple(offset.shape)}")
    count = csr_count(crow, cols, count_dtype(values), features, groups, importance)
    scale = sparsity_scale(count, K, power=power, min_count=min_count, tau=tau, validate=validate)
    return (values * scale[csr_rows(crow, cols.shape[0])]).to(values.dtype)


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
        crow, cols, values = scipy_parts(x)
        return csr_count(crow, cols, count_dtype(values), x.shape[1], groups, importance)
    if x.layout != torch.strided:
        crow, cols, values = csr_parts(x)
        return csr_count(crow, cols, count_dtype(values), x.shape[1], groups, importance)
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
        return (values * sparsity_scale(counts, K, power=power, min_count=min_count, tau=tau, validate=validate)).to(
            x.dtype
        )
    if mask is not None:
        raise InputError("mask is not for a sparse x: its stored pattern is the mask; leave mask out")
    crow, cols, values = csr_parts(x) if isinstance(x, Tensor) else scipy_parts(x)
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
        return csr_tensor(crow, cols, scaled, tuple(x.shape))
    build: Any = type(x)
    return build((scaled.detach().numpy(), x.indices.copy(), x.indptr.copy()), shape=x.shape)


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
    crow, cols = same_index_dtype(crow, cols)
    if validate and is_concrete(crow, cols):
        check_pattern(crow, cols, weight.shape[0])
    dtype = torch.promote_types(values.dtype, weight.dtype)
    values, weight = values.to(dtype), weight.to(dtype)
    if is_concrete(crow, cols, values, weight):
        product = cast("Tensor", SparseMatmul.apply(crow, cols, values, weight))
    else:
        rows = csr_rows(crow, cols.shape[0])
        product = weight.new_zeros(crow.shape[0] - 1, weight.shape[1]).index_add(
            0, rows, values[:, None] * weight[cols]
        )
    if not _is_zero(power):
        stored = crow.diff().to(count_dtype(product)) if count is None else count
        scale = sparsity_scale(stored, K, power=power, min_count=min_count, tau=tau, validate=validate)
        product = (product * scale[:, None]).to(dtype)
    return product if bias is None else product + bias


def _sampled_pairs(hidden: Tensor, weight: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    order = None if bool((rows.diff() >= 0).all()) else torch.argsort(rows, stable=True)
    sorted_cols = cols if order is None else cols[order]
    crow = torch.zeros(hidden.shape[0] + 1, dtype=cols.dtype, device=cols.device)
    crow[1:] = torch.bincount(rows, minlength=hidden.shape[0]).cumsum(0)
    product = cast("Tensor", SampledProduct.apply(crow, sorted_cols, hidden, weight))
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
    rows, cols = same_index_dtype(rows, cols)
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
    check_floating(x, "x")
    if x.shape[-1] != weight.shape[1]:
        raise InputError(f"x: expected {weight.shape[1]} features, got {x.shape[-1]}")
    if x.layout != torch.strided:
        if mask is not None:
            raise InputError("mask is not for a sparse x: its stored pattern is the mask; leave mask out")
        crow, cols, values = csr_parts(x)
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
        count = csr_count(crow, cols, count_dtype(values), x.shape[1], groups, importance)
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
    product = (product * sparsity_scale(counts, K, power=power, min_count=min_count, tau=tau, validate=validate)).to(
        product.dtype
    )
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
        raise InputError(f"x: expected {weight.shape[1] * groups} channels, got {x.shape[1]}")
    if mask is not None and mask.ndim == spatial + 1:
        mask = mask.unsqueeze(1)
    one_channel = mask is not None and mask.ndim == spatial + 2 and mask.shape[1] == 1
    values, observed, _ = observe(x, mask, dim=1, validate=validate)

    # Counts do not go through autocast: bfloat16 is exact only up to 256 entries a window.
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        if one_channel:
            seen = observed[:, :1].to(count_dtype(x))
            per_window = weight[0, 0].numel()
        else:
            seen = observed.unflatten(1, (groups, -1)).sum(2, dtype=count_dtype(x))
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
                seen.sum(tuple(range(1, seen.ndim)), keepdim=True),
                K,
                power=power,
                min_count=min_count,
                validate=validate,
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
