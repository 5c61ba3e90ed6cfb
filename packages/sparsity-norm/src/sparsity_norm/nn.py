"""Layers for input with missing entries: Sparsity Normalization in front of, or inside, any network.

Sparsity Normalization is from Yi et al., "Why Not to Use Zero Imputation? Correcting Sparsity Bias in Training Neural
Networks", ICLR 2020, arXiv:1906.00150. Every layer here takes input in which NaN marks what is missing, or an
explicit ``mask`` (1 = observed). What a layer learns from training data (``K``, centres, fills) is found once by
``fit``, kept in buffers that are saved with the state, and never recomputed at evaluation.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeVar, cast, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from shared_core.errors import InputError
from sparsity_norm._checks import check_floating, count_dtype
from sparsity_norm._csr import SparseCSR, check_csr_values, csr_count, csr_parts, scipy_parts
from sparsity_norm.functional import (
    Anything,
    Constant,
    Dim,
    Number,
    Observed,
    masked_conv1d,
    masked_conv2d,
    masked_linear,
    observe,
    sparsity_normalize,
    sparsity_scale,
)

__all__ = [
    "HiddenSparsityNorm",
    "InputLayer",
    "MaskedConv1d",
    "MaskedConv2d",
    "MaskedLinear",
    "NaNInput",
    "Normalized",
    "SparsityNorm",
    "drop_observed",
    "input_importance",
    "recalibrate",
    "wrap",
]

MaskMode = Literal["nan", "nonzero", "given"]
CenterMode = Literal["column", "global"]
_Layer = TypeVar("_Layer", bound="InputLayer")
_HALF = (torch.float16, torch.bfloat16)


def drop_observed(
    mask: Bool[Tensor, "*shape"], p: Number, generator: torch.Generator | None = None
) -> Bool[Tensor, "*shape"]:
    """Drop observed entries at random, as augmentation that Sparsity Normalization can account for.

    The count is taken again from the new mask, so nothing is divided by ``1 - p``: that division, inverted dropout, is
    the special case in which all instances share one known rate.

    Parameters
    ----------
    mask : Bool[Tensor, "*shape"]
        True = observed.
    p : float
        Probability of dropping an observed entry, in [0, 1).
    generator : torch.Generator, optional
        Source of randomness on the mask's device; torch's own by default.

    Returns
    -------
    Bool[Tensor, "*shape"]
        A new mask, a subset of ``mask``. A row may end up empty.

    Raises
    ------
    InputError
        ``p`` outside [0, 1).

    Examples
    --------
    >>> kept = drop_observed(torch.ones(4, 1000, dtype=torch.bool), 0.25, torch.Generator().manual_seed(0))
    >>> round(kept.float().mean().item(), 2)
    0.75
    """
    if not 0 <= p < 1:
        raise InputError(f"p is {p:g}; the probability of dropping an entry must lie in [0, 1)")
    return mask & (torch.rand(mask.shape, device=mask.device, generator=generator) >= p)


class InputLayer(nn.Module, ABC):
    """A layer that turns input with missing entries into input without; the base of `SparsityNorm` and its rivals.

    Parameters
    ----------
    dim : int or tuple of int, default -1
        The dimension or dimensions that hold one instance's entries.
    mask : {"nan", "nonzero", "given"}, default "nan"
        Where the mask comes from when `forward` is not given one: NaN marks what is missing; entries that are not zero
        are observed (the L0 form of the first version of the paper, for data whose zeros really mean absent); or
        nowhere, so that it must be given.
    concat_mask : bool, default False
        Append the mask to the output along ``dim``, as ones and zeros.
    validate : bool, default True
        Check values of input and mask at every call (shapes are always checked).
    """

    n_features: Tensor

    def __init__(
        self, *, dim: Dim = -1, mask: MaskMode = "nan", concat_mask: bool = False, validate: bool = True
    ) -> None:
        super().__init__()
        _check_choice("mask", mask, get_args(MaskMode))
        if concat_mask and not isinstance(dim, int):
            raise InputError(f"concat_mask needs one counted dimension; dim is {dim}")
        self.dim = dim
        self.mask_mode = mask
        self.concat_mask = concat_mask
        self.validate = validate
        self.register_buffer("n_features", torch.tensor(0))
        # What the buffers say, where reading it costs no synchronisation and breaks no compiled graph.
        self._known = False
        self._expected_features = 0

    @property
    def fitted(self) -> bool:
        """Whether everything that `forward` needs at evaluation is known."""
        return self._known

    @property
    def static(self) -> bool:
        """Whether the output depends on nothing but the instance, so that it may be computed once and kept."""
        return not any(True for _ in self.parameters())

    def out_features(self, in_features: int) -> int:
        """Return the size of the output along ``dim`` for input of size ``in_features``."""
        return in_features * (2 if self.concat_mask else 1)

    def fit(self: _Layer, x: Anything | SparseCSR, mask: Anything | None = None) -> _Layer:
        """Find the constants on training data, in one exact pass.

        Parameters
        ----------
        x : Float[Tensor, "*shape"] or CSR
            Training instances.
        mask : Tensor, optional
            1 = observed; by default the layer's mask mode decides.

        Returns
        -------
        InputLayer
            The layer itself.

        Raises
        ------
        InputError
            Nothing observed at all, or bad values in ``x`` or ``mask``.
        """
        self._fit([_where_float64_is(x, mask)])
        return self

    def fit_loader(self: _Layer, loader: Iterable[Any]) -> _Layer:
        """Find the constants over batches, as exactly as `fit` would on all of them at once.

        Where `torch.distributed` is initialised every process gives its own share, and all end with the same result.

        Parameters
        ----------
        loader : iterable
            Of tensors ``x``, or of tuples ``(x, ...)``; with mask="given" of tuples ``(x, mask, ...)``.

        Returns
        -------
        InputLayer
            The layer itself.

        Raises
        ------
        InputError
            As in `fit`.
        """
        self._fit(_where_float64_is(*self._split(batch)) for batch in loader)
        return self

    @abstractmethod
    def _fit(self, batches: Iterable[tuple[Any, Tensor | None]]) -> None:
        """Find the constants over pairs of input and mask."""

    @abstractmethod
    def forward(self, x: Anything, mask: Anything | None = None) -> Anything:
        """Map input with missing entries to complete input."""

    def resolve_mask(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        """Return the mask to use for dense ``x``: the given one, or what the mode says (None: NaN is missing)."""
        if mask is not None or self.mask_mode == "nan":
            return mask
        if self.mask_mode == "nonzero":
            return x != 0
        raise InputError("mask is missing; this layer was made with mask='given': call it as layer(x, mask)")

    def check_features(self, x: Tensor) -> None:
        """Refuse input of another number of features than at fit."""
        if self._expected_features and isinstance(self.dim, int) and x.shape[self.dim] != self._expected_features:
            raise InputError(f"x: expected {self._expected_features} features, got {x.shape[self.dim]}")

    def require_fitted(self) -> None:
        """Raise scikit-learn's ``NotFittedError`` where `fit` is still to come."""
        if not self.fitted:
            # Imported here: it costs as much as torch, and most programs never raise it.
            from sklearn.exceptions import NotFittedError

            raise NotFittedError(
                f"this {type(self).__name__} is not fitted; call fit(x_train) or fit_loader(loader) first, "
                "or load a state that was"
            )

    def _split(self, batch: Any) -> tuple[Any, Tensor | None]:
        if isinstance(batch, Tensor | SparseCSR):
            return batch, None
        if not isinstance(batch, tuple | list):
            raise InputError(
                f"a batch of the loader is a {type(batch).__name__}; give tensors, or tuples that start with x"
            )
        parts = cast("Sequence[Any]", batch)
        if len(parts) < (2 if self.mask_mode == "given" else 1):
            raise InputError(f"a batch of the loader has {len(parts)} elements; mask='given' needs (x, mask, ...)")
        return parts[0], parts[1] if self.mask_mode == "given" else None

    def _set_known(self, features: int) -> None:
        self._known = True
        self._expected_features = features
        self.n_features.fill_(features)

    def _emit(self, output: Tensor, observed: Tensor) -> Tensor:
        if not self.concat_mask:
            return output
        assert isinstance(self.dim, int)
        return torch.cat([output, observed.to(output.dtype)], dim=self.dim)

    def _is_known(self) -> bool:
        """Whether the buffers, as just loaded, are those of a fitted layer."""
        return True

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # Buffers get their shape and precision at fit, which the layer that loads them has not seen.
        for name, buffer in list(self._buffers.items()):
            stored = state_dict.get(prefix + name)
            if buffer is not None and isinstance(stored, Tensor):
                self._buffers[name] = torch.empty_like(stored, device=buffer.device)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._expected_features = int(self.n_features)
        self._known = self._is_known()

    def extra_repr(self) -> str:
        """Return what distinguishes the layer, for ``print(model)``."""
        return "" if self.mask_mode == "nan" else f"mask={self.mask_mode!r}"


def _where_float64_is(x: Any, mask: Tensor | None) -> tuple[Any, Tensor | None]:
    """Move a batch off a device that has no float64, in which sums over the training set are taken."""
    if isinstance(x, Tensor) and x.device.type == "mps":
        return x.cpu(), None if mask is None else mask.cpu()
    return x, mask


def _check_choice(name: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        raise InputError(f"{name} is {value!r}; choose one of {', '.join(map(repr, allowed))}")


class _Tally:
    """Sums over training batches from which K and the centre follow; sums of processes add up."""

    def __init__(self) -> None:
        # Sum of counts, instances with something observed, instances.
        self.totals = torch.zeros(3, dtype=torch.float64)
        self.sums: Tensor | None = None
        self.weights: Tensor | None = None
        self.features = 0
        self.dtype = torch.float32

    def add_counts(self, counts: Tensor) -> None:
        self.dtype = torch.promote_types(self.dtype, counts.dtype)
        found = torch.stack([counts.sum(dtype=torch.float64), torch.count_nonzero(counts).double()])
        self.totals = self.totals.to(counts.device)
        self.totals += torch.cat([found, found.new_tensor([float(counts.numel())])])

    def add_columns(self, sums: Tensor, weights: Tensor) -> None:
        if self.sums is None or self.weights is None:
            self.sums, self.weights = sums, weights
        else:
            self.sums, self.weights = self.sums + sums, self.weights + weights

    def all_reduce(self, device: torch.device) -> None:
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()):
            return
        # Every process learns of it, so that all raise and none waits for the others.
        started = torch.tensor([float(self.totals[2])], device=device)
        distributed.all_reduce(started, distributed.ReduceOp.MIN)
        if not started.item():
            raise InputError("a process got no training batch; give every process at least one")
        for name in ("totals", "sums", "weights"):
            tensor = getattr(self, name)
            if tensor is not None:
                moved = tensor.to(device)
                distributed.all_reduce(moved)
                setattr(self, name, moved)

    def mean_count(self, count_empty: bool) -> Tensor:
        total, nonempty, instances = self.totals
        if not float(total) > 0:
            raise InputError(
                f"no entry is observed in any of the {int(instances)} training instances; K needs at least one"
            )
        return (total / (instances if count_empty else nonempty)).to(self.dtype)

    def column_means(self) -> Tensor:
        assert self.sums is not None
        assert self.weights is not None
        overall = self.sums.sum() / self.weights.sum()
        # A column never observed in training gets the mean over all columns.
        return torch.where(self.weights > 0, self.sums / self.weights.clamp(min=1e-300), overall).to(self.dtype)


class SparsityNorm(InputLayer):
    """Sparsity Normalization: zero-impute, then multiply each instance by ``(K / max(s + tau, min_count)) ** power``.

    Parameters
    ----------
    K : float, optional
        The constant; by default the mean observed count of the instances that `fit` is given. One given here stays.
    power : float or "learn", default 1.0
        1 is the paper's; 0.5 preserves the second moment of the first pre-activation, 0 is plain zero imputation;
        "learn" makes it a positive parameter (softplus of a scalar) that starts at 1.
    center : {"column", "global"}, optional
        Subtract the mean of each column, or the overall mean, of the observed training entries first. An extension:
        with column centres this is mean imputation with the deviations rescaled.
    min_count : float, default 1
        Smallest divisor.
    dim : int or tuple of int, default -1
        The dimension or dimensions that hold one instance's entries.
    mask : {"nan", "nonzero", "given"}, default "nan"
        Where the mask comes from when `forward` is not given one; see `InputLayer`. For CSR input the stored pattern
        is the mask.
    momentum : float, optional
        Keep a running mean of the count in training mode, bias-corrected, from the first batch on, and freeze it in
        evaluation mode. An extension; a K that moves also moves the effective step size. `fit` is exact.
    tau : float, default 0.0
        Added to the count: shrinks instances with few observed entries. An extension.
    groups : sequence of int, optional
        Group of each feature, any integers; a group (a one-hot block) counts as one feature.
    count_empty : bool, default False
        Let training instances with nothing observed count in K.
    concat_mask : bool, default False
        Append the mask to the output: for missingness that is itself informative.
    weighted : bool, default False
        Allow confidences in [0, 1] as mask.
    importance : Float[Tensor, "features"], optional
        Weight of each feature in the count, as from `input_importance`. An extension.
    validate : bool, default True
        Check values of input and mask at every call (a synchronisation on a GPU).

    Attributes
    ----------
    K : Float[Tensor, ""]
        Buffer; NaN until known. float64 where fitted on float64 input, else float32, and never less.
    center : Float[Tensor, "features"] or None
        Buffer.
    n_seen : Int[Tensor, ""]
        Buffer: training instances seen.

    Raises
    ------
    InputError
        An option out of range.
    sklearn.exceptions.NotFittedError
        From `forward`, before K is known.

    Notes
    -----
    Yi et al. (ICLR 2020, arXiv:1906.00150).

    Examples
    --------
    >>> nan = float("nan")
    >>> model = nn.Sequential(SparsityNorm(), nn.Linear(3, 1))
    >>> _ = model[0].fit(torch.tensor([[1.0, nan, nan], [1.0, 2.0, 3.0]]))
    >>> model[0](torch.tensor([[nan, 2.0, nan]]))
    tensor([[0., 4., 0.]])
    """

    K: Tensor
    center: Tensor | None
    n_seen: Tensor
    groups: Tensor | None
    importance: Tensor | None

    def __init__(
        self,
        K: Number | None = None,
        power: Number | Literal["learn"] = 1.0,
        center: CenterMode | None = None,
        min_count: Number = 1,
        dim: Dim = -1,
        mask: MaskMode = "nan",
        momentum: Number | None = None,
        *,
        tau: Number = 0.0,
        groups: Sequence[int] | Anything | None = None,
        count_empty: bool = False,
        concat_mask: bool = False,
        weighted: bool = False,
        importance: Anything | None = None,
        validate: bool = True,
    ) -> None:
        super().__init__(dim=dim, mask=mask, concat_mask=concat_mask, validate=validate)
        _check_choice("center", center, (None, *get_args(CenterMode)))
        if isinstance(power, str) and power != "learn":
            raise InputError(f"power is {power!r}; give a number or 'learn'")
        if not isinstance(power, str) and not math.isfinite(power):
            raise InputError(f"power is {power:g}; it must be finite")
        if momentum is not None and not 0 < momentum <= 1:
            raise InputError(f"momentum is {momentum:g}; it must lie in (0, 1]")
        # Refuses what would make the scale meaningless, at construction and not at the first batch.
        sparsity_scale(torch.ones(1), 1.0 if K is None else K, min_count=min_count, tau=tau)
        self.center_mode: CenterMode | None = center
        self.min_count = min_count
        self.momentum = momentum
        self.tau = tau
        self.count_empty = count_empty
        self.weighted = weighted
        self.fixed_power = None if isinstance(power, str) else power
        # softplus(log(e - 1)) = 1
        self.raw_power = nn.Parameter(torch.tensor(math.log(math.e - 1))) if isinstance(power, str) else None
        self.register_buffer("K", torch.tensor(math.nan if K is None else float(K)))
        self.register_buffer("center", None if center is None else torch.zeros(()))
        self.register_buffer("n_seen", torch.tensor(0))
        self.register_buffer("n_batches", None if momentum is None else torch.tensor(0))
        self.register_buffer("groups", None if groups is None else _consecutive(groups), persistent=False)
        self.register_buffer("importance", None if importance is None else importance.detach().clone())
        self.given_K = K is not None
        self._known = self.given_K and center is None

    @property
    def power(self) -> Constant:
        """The exponent: the number given, or the learned parameter's value."""
        if self.raw_power is not None:
            return nn.functional.softplus(self.raw_power)
        assert self.fixed_power is not None
        return self.fixed_power

    @property
    def static(self) -> bool:
        """Whether the output depends on nothing but the instance: not with a learned power or a moving K."""
        return super().static and self.momentum is None

    def _is_known(self) -> bool:
        return not bool(torch.isnan(self.K)) and (self.center is None or int(self.n_seen) > 0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparsityNorm:
        exact = self.K
        super()._apply(fn, recurse)
        if self.K.dtype in _HALF:
            # K is a mean of counts: bfloat16 would round 59.45 to 59.5.
            self.register_buffer("K", exact.to(self.K.device))
        return self

    def _fit(self, batches: Iterable[tuple[Any, Tensor | None]]) -> None:
        tally = _Tally()
        for x, mask in batches:
            if isinstance(x, SparseCSR) or (isinstance(x, Tensor) and x.layout != torch.strided):
                self._tally_csr(tally, x)
            else:
                self._tally_dense(tally, x, mask)
        tally.all_reduce(self.K.device)
        mean_count = tally.mean_count(self.count_empty)
        if not self.given_K:
            self.register_buffer("K", mean_count.to(self.K.device))
        if self.center_mode is not None:
            self.center = tally.column_means().to(self.K.device)
        self.n_seen.fill_(int(tally.totals[2]))
        self._set_known(tally.features)

    def _observe(self, x: Tensor, mask: Tensor | None, center: Tensor | None) -> Observed:
        return observe(
            x,
            self.resolve_mask(x, mask),
            dim=self.dim,
            center=center,
            groups=self.groups,
            weighted=self.weighted,
            importance=self.importance,
            validate=self.validate,
        )

    def _tally_dense(self, tally: _Tally, x: Tensor, mask: Tensor | None) -> None:
        check_floating(x, "x")
        if isinstance(self.dim, int):
            if tally.features and x.shape[self.dim] != tally.features:
                raise InputError(f"x: expected {tally.features} features, got {x.shape[self.dim]}")
            tally.features = x.shape[self.dim]
        values, observed, counts = self._observe(x, mask, None)
        tally.add_counts(counts)
        if self.center_mode is None:
            return
        weights = observed.to(values.dtype)
        if self.weighted and mask is not None:
            weights = mask.to(values.dtype).expand_as(values)
        if self.center_mode == "global":
            tally.add_columns(values.sum(dtype=torch.float64), weights.sum(dtype=torch.float64))
            return
        own = {axis % x.ndim for axis in ((self.dim,) if isinstance(self.dim, int) else self.dim)}
        others = [axis for axis in range(x.ndim) if axis not in own]
        sums, totals = (
            part.sum(others, keepdim=True, dtype=torch.float64) if others else part.double()
            for part in (values, weights)
        )
        if isinstance(self.dim, int):
            sums, totals = sums.reshape(-1), totals.reshape(-1)
        tally.add_columns(sums, totals)

    def _tally_csr(self, tally: _Tally, x: Tensor | SparseCSR) -> None:
        crow, cols, values = csr_parts(x) if isinstance(x, Tensor) else scipy_parts(x)
        if self.validate:
            check_csr_values(crow, cols, values)
        tally.features = int(x.shape[1])
        tally.add_counts(csr_count(crow, cols, count_dtype(values), tally.features, self.groups, self.importance))
        if self.center_mode == "global":
            tally.add_columns(values.sum(dtype=torch.float64), torch.tensor(float(cols.numel()), dtype=torch.float64))
        elif self.center_mode == "column":
            sums = torch.zeros(tally.features, dtype=torch.float64, device=values.device)
            tally.add_columns(
                sums.index_add(0, cols, values.double()), torch.bincount(cols, minlength=tally.features).double()
            )

    def _track(self, counts: Tensor) -> None:
        """Move K towards the batch's mean count; without branches on values, so that it compiles."""
        assert self.momentum is not None
        nonempty = torch.count_nonzero(counts)
        instances = counts.new_tensor(float(counts.numel())) if self.count_empty else nonempty.to(counts.dtype)
        batch_mean = (counts.sum() / instances.clamp(min=1)).to(self.K.dtype)
        seen = (nonempty > 0).to(self.n_seen.dtype)
        batches = cast("Tensor", self.n_batches) + seen
        # Adam's bias correction as a step size: equal to the running mean divided by 1 - (1 - momentum) ** batches.
        step = self.momentum / (1 - (1 - self.momentum) ** batches.clamp(min=1).to(self.K.dtype))
        before = torch.nan_to_num(self.K)
        with torch.no_grad():
            self.K.copy_(torch.where(seen > 0, before + step * (batch_mean - before), self.K))
            cast("Tensor", self.n_batches).copy_(batches)
            self.n_seen.add_(counts.numel())
        if self.center is None:
            self._known = True

    def forward(self, x: Anything, mask: Anything | None = None) -> Anything:
        """Normalize a batch.

        Parameters
        ----------
        x : Float[Tensor, "*shape"] or torch CSR
            Input; NaN under a zero of the mask is never touched.
        mask : Tensor, optional
            1 = observed.

        Returns
        -------
        Float[Tensor, "*shape"] or torch CSR
            The shape, dtype and layout of ``x``; twice as long along ``dim`` with ``concat_mask``.

        Raises
        ------
        sklearn.exceptions.NotFittedError
            K is not known yet.
        InputError
            Another number of features than at fit; bad values in ``x`` or ``mask``.
        """
        check_floating(x, "x")
        self.check_features(x)
        if x.layout != torch.strided:
            if self.concat_mask:
                raise InputError("concat_mask needs a dense x; give a dense tensor and the mask")
            self.require_fitted()
            return sparsity_normalize(
                x,
                mask,
                self.K,
                power=self.power,
                center=self.center,
                min_count=self.min_count,
                tau=self.tau,
                groups=self.groups,
                importance=self.importance,
                validate=self.validate,
            )
        values, observed, counts = self._observe(x, mask, self.center if self._known else None)
        if self.training and self.momentum is not None:
            self._track(counts)
        self.require_fitted()
        scale = sparsity_scale(counts, self.K, power=self.power, min_count=self.min_count, tau=self.tau, validate=False)
        return self._emit((values * scale).to(x.dtype), observed)

    def extra_repr(self) -> str:
        """Return what distinguishes the layer, for ``print(model)``."""
        parts = [f"K={float(self.K):.6g}" if self._known else "K=?"]
        parts.append("power='learn'" if self.fixed_power is None else f"power={self.fixed_power:g}")
        parts += [f"center={self.center_mode!r}"] if self.center_mode else []
        parts += [f"tau={self.tau:g}"] if self.tau else []
        parts += ["concat_mask=True"] if self.concat_mask else []
        return ", ".join([*parts, *filter(None, [super().extra_repr()])])


def _consecutive(groups: Sequence[int] | Tensor) -> Tensor:
    numbers = groups if isinstance(groups, Tensor) else torch.tensor(list(groups))
    if numbers.ndim != 1 or numbers.is_floating_point():
        raise InputError(
            f"groups has shape {tuple(numbers.shape)} and dtype {numbers.dtype}; give one integer a feature"
        )
    return torch.unique(numbers, return_inverse=True)[1]


class NaNInput(InputLayer):
    """Fill what is missing by a constant: the baselines ``zero``, ``mean`` and ``median``, with or without the mask.

    Parameters
    ----------
    fill : {"zero", "mean", "median"} or float, default "zero"
        "mean" and "median" are those of each column over observed training entries; a column never observed in
        training gets the statistic over all columns.
    mask, concat_mask, validate
        As in `InputLayer`. The instance's entries are the last dimension.

    Attributes
    ----------
    fill : Float[Tensor, "features"]
        Buffer: what each column is filled with; a scalar 0 or the number given until fitted.

    Examples
    --------
    >>> x = torch.tensor([[1.0, float("nan")], [3.0, 5.0]])
    >>> NaNInput("mean", concat_mask=True).fit(x)(x)
    tensor([[1., 5., 1., 0.],
            [3., 5., 1., 1.]])
    """

    fill: Tensor

    def __init__(
        self,
        fill: Literal["zero", "mean", "median"] | Number = "zero",
        *,
        mask: MaskMode = "nan",
        concat_mask: bool = False,
        validate: bool = True,
    ) -> None:
        super().__init__(mask=mask, concat_mask=concat_mask, validate=validate)
        if isinstance(fill, str):
            _check_choice("fill", fill, ("zero", "mean", "median"))
        self.statistic = fill if fill in ("mean", "median") else None
        self.register_buffer("fill", torch.tensor(0.0 if isinstance(fill, str) else float(fill)))
        self._known = self.statistic is None

    def _is_known(self) -> bool:
        return self.statistic is None or self.fill.ndim > 0

    def _fit(self, batches: Iterable[tuple[Any, Tensor | None]]) -> None:
        parts: list[Tensor] = []
        for x, mask in batches:
            values, observed, _ = observe(x, self.resolve_mask(x, mask), validate=self.validate)
            parts.append(values.masked_fill(~observed, math.nan).reshape(-1, x.shape[-1]))
        table = torch.cat(parts) if parts else torch.zeros(0, 0)
        if self.statistic is not None:
            if bool(torch.isnan(table).all()):
                raise InputError(f"no entry is observed in any of the {len(table)} training instances")
            by_column = _nanmean if self.statistic == "mean" else _nanmedian
            found, overall = by_column(table), by_column(table.reshape(-1, 1))
            self.fill = torch.where(torch.isnan(found), overall, found).to(device=self.fill.device)
        self._set_known(table.shape[1])

    def forward(self, x: Anything, mask: Anything | None = None) -> Anything:
        """Fill a batch.

        Parameters
        ----------
        x : Float[Tensor, "*batch features"]
            Input.
        mask : Tensor, optional
            1 = observed.

        Returns
        -------
        Float[Tensor, "*batch features"]
            Complete; twice as many features with ``concat_mask``.

        Raises
        ------
        sklearn.exceptions.NotFittedError
            "mean" or "median" before `fit`.
        """
        self.check_features(x)
        self.require_fitted()
        values, observed, _ = observe(x, self.resolve_mask(x, mask), validate=self.validate)
        if self.statistic is not None or float(self.fill) != 0:
            values = torch.where(observed, values, self.fill.to(values.dtype))
        return self._emit(values, observed)

    def extra_repr(self) -> str:
        """Return what distinguishes the layer, for ``print(model)``."""
        parts = [f"fill={self.statistic or float(self.fill)!r}"]
        parts += ["concat_mask=True"] if self.concat_mask else []
        return ", ".join([*parts, *filter(None, [super().extra_repr()])])


def _nanmean(table: Tensor) -> Tensor:
    known = ~torch.isnan(table)
    return (torch.nan_to_num(table).sum(0, dtype=torch.float64) / known.sum(0)).to(table.dtype)


def _nanmedian(table: Tensor) -> Tensor:
    """Median over observed entries of each column, the mean of the two middle ones where their number is even."""
    ordered = table.sort(dim=0).values  # NaN sorts last
    known = (~torch.isnan(table)).sum(0)
    middle = torch.stack([(known - 1).clamp(min=0) // 2, known // 2])
    return ordered.gather(0, middle.clamp(max=len(table) - 1)).mean(0)


class MaskedLinear(nn.Module):
    """A linear layer on sparsity-normalized input: ``scale(s) * (W (m * x)) + b``, in one step.

    Parameters
    ----------
    in_features, out_features : int
        Sizes.
    bias : bool, default True
        Add a bias, outside the scale.
    K, power, **options
        As in `SparsityNorm`, which is the submodule ``norm``; ``concat_mask`` and ``dim`` are not for this layer.

    Attributes
    ----------
    weight : Float[Tensor, "outputs features"]
    bias : Float[Tensor, "outputs"] or None
    norm : SparsityNorm
        Holds K; fit it through `fit`.

    Examples
    --------
    >>> layer = MaskedLinear(3, 2, K=2.0)
    >>> x = torch.tensor([[1.0, float("nan"), 5.0]])
    >>> torch.allclose(layer(x), nn.functional.linear(layer.norm(x), layer.weight, layer.bias))
    True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        K: Number | None = None,
        power: Number | Literal["learn"] = 1.0,
        **options: Any,
    ) -> None:
        super().__init__()
        if not {"dim", "concat_mask"}.isdisjoint(options):
            raise InputError("dim and concat_mask are not for MaskedLinear; put SparsityNorm before nn.Linear")
        linear = nn.Linear(in_features, out_features, bias)
        self.in_features, self.out_features = in_features, out_features
        self.weight = linear.weight
        self.bias: nn.Parameter | None = linear.bias if bias else None
        self.norm = SparsityNorm(K, power, **options)

    def fit(self, x: Anything | SparseCSR, mask: Anything | None = None) -> MaskedLinear:
        """Find K on training data; see `SparsityNorm.fit`."""
        self.norm.fit(x, mask)
        return self

    def forward(self, x: Anything, mask: Anything | None = None) -> Anything:
        """Apply the layer.

        Parameters
        ----------
        x : Float[Tensor, "*batch features"] or torch CSR
            Input with missing entries.
        mask : Tensor, optional
            1 = observed.

        Returns
        -------
        Float[Tensor, "*batch outputs"]

        Raises
        ------
        sklearn.exceptions.NotFittedError
            K is not known yet.
        InputError
            Another number of features; bad values in ``x`` or ``mask``.
        """
        norm = self.norm
        if self.training and norm.momentum is not None:
            return nn.functional.linear(norm(x, mask), self.weight, self.bias)
        norm.require_fitted()
        return masked_linear(
            x,
            norm.resolve_mask(x, mask) if x.layout == torch.strided else mask,
            self.weight,
            self.bias,
            norm.K,
            power=norm.power,
            center=norm.center,
            min_count=norm.min_count,
            tau=norm.tau,
            groups=norm.groups,
            weighted=norm.weighted,
            importance=norm.importance,
            validate=norm.validate,
        )

    def extra_repr(self) -> str:
        """Return what distinguishes the layer, for ``print(model)``."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class _MaskedConv(nn.Module):
    """What `MaskedConv1d` and `MaskedConv2d` share."""

    spatial: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        form: Literal["window", "instance"] = "window",
        K: Number | None = None,
        power: Number = 1.0,
        return_mask: bool = False,
        validate: bool = True,
    ) -> None:
        super().__init__()
        _check_choice("form", form, ("window", "instance"))
        build: Any = nn.Conv1d if self.spatial == 1 else nn.Conv2d
        plain = build(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self.weight: nn.Parameter = plain.weight
        self.bias: nn.Parameter | None = plain.bias
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.form: Literal["window", "instance"] = form
        self.return_mask = return_mask
        self.norm = SparsityNorm(K, power, dim=tuple(range(1, self.spatial + 2)), validate=validate)

    def _entry_mask(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        """Give a mask of positions one entry a channel, so that K and counts mean the same for every kind of mask."""
        if mask is None:
            return None
        mask = mask.unsqueeze(1) if mask.ndim == x.ndim - 1 else mask
        return mask.expand_as(x) if mask.shape[1:2] == (1,) and mask.shape[2:] == x.shape[2:] else mask

    def fit(self: _Conv, x: Anything, mask: Anything | None = None) -> _Conv:
        """Find K for form="instance" on training data; the window form has nothing to fit."""
        self.norm.fit(x, self._entry_mask(x, mask))
        return self

    def forward(
        self, x: Float[Tensor, "*shape"], mask: Anything | None = None
    ) -> Float[Tensor, "*out"] | tuple[Float[Tensor, "*out"], Bool[Tensor, "*out_mask"]]:
        """Apply the layer; see the class and the function of the same name."""
        if self.form == "instance":
            self.norm.require_fitted()
            mask = self._entry_mask(x, mask)
        convolve = masked_conv1d if self.spatial == 1 else masked_conv2d
        power = self.norm.power
        assert not isinstance(power, Tensor)
        out, mask_out = convolve(
            x,
            mask,
            self.weight,
            self.bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            form=self.form,
            K=self.norm.K if self.form == "instance" else None,
            power=power,
            validate=self.norm.validate,
        )
        return (out, mask_out) if self.return_mask else out

    def extra_repr(self) -> str:
        """Return what distinguishes the layer, for ``print(model)``."""
        return f"{tuple(self.weight.shape)}, stride={self.stride}, padding={self.padding!r}, form={self.form!r}"


_Conv = TypeVar("_Conv", bound=_MaskedConv)


class MaskedConv1d(_MaskedConv):
    """A 1-D convolution over sequences with missing entries; options as in `MaskedConv2d`.

    Examples
    --------
    >>> MaskedConv1d(1, 4, 3, padding=1)(torch.full((2, 1, 10), float("nan"))).abs().max().item()
    0.0
    """

    spatial = 1


class MaskedConv2d(_MaskedConv):
    """A 2-D convolution over images with missing pixels, corrected for how many were observed.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias
        As in `torch.nn.Conv2d`.
    form : {"window", "instance"}, default "window"
        Partial convolution, or one count an instance; see `sparsity_norm.functional.masked_conv2d`.
    K, power
        As in `SparsityNorm`; K is for form="instance" only.
    return_mask : bool, default False
        Return ``(out, mask_out)``, to hand the mask to a next masked layer.
    validate : bool, default True
        Check values of input and mask at every call.

    Examples
    --------
    >>> layer = MaskedConv2d(3, 8, 3, padding=1, return_mask=True)
    >>> out, mask = layer(torch.randn(2, 3, 5, 5), torch.ones(2, 1, 5, 5))
    >>> out.shape, mask.shape
    (torch.Size([2, 8, 5, 5]), torch.Size([2, 1, 5, 5]))
    """

    spatial = 2


class HiddenSparsityNorm(nn.Module):
    """Sparsity Normalization of hidden units: dropout that scales by how many units each instance really kept.

    In training each unit is dropped with probability ``p``; units still there are multiplied by
    ``(K / kept) ** power``, per instance. Inverted dropout is the special case that multiplies all by ``1 / (1 - p)``,
    the factor's value for an average instance. In evaluation all units are there and the layer is the identity,
    unless a mask says otherwise (as that of a masked convolution does).

    Parameters
    ----------
    p : float, default 0.0
        Probability of dropping a unit in training, in [0, 1).
    K : float, optional
        The constant; by default the number of units, so that a full mask changes nothing.
    power : float, default 1.0
        As in `SparsityNorm`.
    dim : int, default -1
        Dimension of the units.

    Notes
    -----
    Our extension: in the paper missingness exists only at the input and hidden layers are left alone.

    Examples
    --------
    >>> h = HiddenSparsityNorm(0.5)(torch.ones(3, 8), generator=torch.Generator().manual_seed(0))
    >>> h.sum(dim=1)
    tensor([8., 8., 8.])
    """

    def __init__(self, p: Number = 0.0, *, K: Number | None = None, power: Number = 1.0, dim: int = -1) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise InputError(f"p is {p:g}; the probability of dropping a unit must lie in [0, 1)")
        self.p, self.K, self.power, self.dim = p, K, power, dim

    def forward(
        self,
        hidden: Float[Tensor, "*shape"],
        mask: Anything | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "*shape"]:
        """Drop, recount, rescale.

        Parameters
        ----------
        hidden : Float[Tensor, "*shape"]
            Hidden units.
        mask : Tensor, optional
            1 = the unit holds something; all by default.
        generator : torch.Generator, optional
            Source of randomness for dropping.

        Returns
        -------
        Float[Tensor, "*shape"]
        """
        drops = self.training and self.p > 0
        if mask is None and not drops and self.K is None:
            return hidden
        present = torch.ones_like(hidden, dtype=torch.bool) if mask is None else (mask != 0).expand_as(hidden)
        if drops:
            present = drop_observed(present, self.p, generator)
        units = float(hidden.shape[self.dim]) if self.K is None else self.K
        # Unchecked: a look at hidden values would synchronise at every call, and a NaN in them is not to be hidden.
        return sparsity_normalize(hidden, present, units, power=self.power, dim=self.dim, validate=False)

    def extra_repr(self) -> str:
        """Return what distinguishes the layer, for ``print(model)``."""
        return f"p={self.p}, power={self.power}"


class Normalized(nn.Module):
    """A module with an `InputLayer` in front: the same call, plus ``mask=``. Made by `wrap`.

    Attributes
    ----------
    norm : InputLayer
    module : nn.Module
    """

    def __init__(self, module: nn.Module, norm: InputLayer) -> None:
        super().__init__()
        self.norm = norm
        self.module = module

    def forward(self, x: Anything, *args: Any, mask: Anything | None = None, **kwargs: Any) -> Any:
        """Normalize ``x`` and hand it, with all other arguments, to the module.

        Parameters
        ----------
        x : Float[Tensor, "*shape"]
            Input with missing entries.
        mask : Tensor, optional
            1 = observed.

        Returns
        -------
        Any
            What the module returns.
        """
        return self.module(self.norm(x, mask), *args, **kwargs)


def wrap(
    module: nn.Module, *, K: Number | None = None, fit_on: Anything | SparseCSR | None = None, **options: Any
) -> Normalized:
    """Put Sparsity Normalization in front of any module.

    Parameters
    ----------
    module : nn.Module
        Takes the input as its first argument. It is used, not copied.
    K : float, optional
        The constant, if known.
    fit_on : Float[Tensor, "*shape"] or CSR, optional
        Training input to fit K (and centres) on; without either call ``.norm.fit(x)``.
    **options
        Of `SparsityNorm`.

    Returns
    -------
    Normalized
        Called like ``module``, plus ``mask=``.

    Raises
    ------
    InputError
        Both ``K`` and ``fit_on``.

    Examples
    --------
    >>> model = wrap(nn.Linear(3, 1), fit_on=torch.tensor([[1.0, 2.0, float("nan")]]))
    >>> model.norm.K
    tensor(2.)
    """
    if K is not None and fit_on is not None:
        raise InputError("both K and fit_on are given; fit_on would replace K: give one")
    norm = SparsityNorm(K, **options)
    if fit_on is not None:
        norm.fit(fit_on)
    return Normalized(module, norm)


def recalibrate(
    model: nn.Module,
    x: Float[Tensor, "*shape"],
    target: Anything,
    *,
    mask: Anything | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.mse_loss,
    steps: int = 20,
) -> list[float]:
    """Fit K, and nothing else, of every `SparsityNorm` in a trained model to held-out data.

    For a network that was trained on zero-imputed input and got `wrap` put around it afterwards: the weights are left
    alone, only the one scale that they now expect is found, by L-BFGS on ``log K``.

    Parameters
    ----------
    model : nn.Module
        Called as ``model(x)``, or ``model(x, mask=mask)``.
    x : Float[Tensor, "batch *shape"]
        Input with missing entries.
    target : Tensor
        What ``loss`` compares the output to.
    mask : Tensor, optional
        1 = observed.
    loss : callable
        ``loss(output, target)``, a scalar.
    steps : int, default 20
        At most so many L-BFGS iterations.

    Returns
    -------
    list of float
        The new K of each layer, in the order of ``model.modules()``. K stays as it was where nothing better is found.

    Raises
    ------
    InputError
        The model holds no `SparsityNorm`.
    sklearn.exceptions.NotFittedError
        A layer has no K to start from.

    Examples
    --------
    >>> model = wrap(nn.Linear(2, 1, bias=False), K=1.0)
    >>> _ = nn.init.ones_(model.module.weight)
    >>> [round(K, 3) for K in recalibrate(model, torch.tensor([[1.0, 1.0], [2.0, 4.0]]), torch.tensor([[3.0], [9.0]]))]
    [3.0]
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SparsityNorm)}
    if not layers:
        raise InputError("the model holds no SparsityNorm layer; put one in front with wrap(model, K=...)")
    for layer in layers.values():
        layer.require_fitted()
    keyword = {} if mask is None else {"mask": mask}
    was_training = {module: module.training for module in model.modules()}
    log_k = torch.stack([layer.K.detach().cpu().double().log() for layer in layers.values()]).requires_grad_()

    def evaluate() -> Tensor:
        constants = {
            f"{name}.K" if name else "K": value.exp().to(layer.K)
            for (name, layer), value in zip(layers.items(), log_k, strict=True)
        }
        return loss(torch.func.functional_call(model, constants, (x,), keyword), target)

    optimizer = torch.optim.LBFGS([log_k], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = evaluate()
        log_k.grad = torch.autograd.grad(value, log_k)[0]
        return value

    model.eval()
    try:
        start = log_k.detach().clone()
        with torch.no_grad():
            before = float(evaluate())
        optimizer.step(cast("Callable[[], float]", closure))
        with torch.no_grad():
            after = float(evaluate())
        # "not <": a loss that became NaN is no improvement either.
        found = log_k.detach() if after < before else start
    finally:
        for module, training in was_training.items():
            module.training = training
    for layer, value in zip(layers.values(), found, strict=True):
        layer.K.copy_(value.exp())
    return [float(layer.K) for layer in layers.values()]


def input_importance(
    x: Float[Tensor, "batch features"], weight: Float[Tensor, "outputs features"], mask: Anything | None = None
) -> Float[Tensor, " features"]:
    """Return ``a_j``, proportional to ``E|w_j x_j|`` over observed entries, for ``SparsityNorm(importance=...)``.

    With it, losing a column that matters rescales an instance more than losing noise does; K is to be fitted again
    afterwards. Our extension; equal columns give ones, which is plain Sparsity Normalization.

    Parameters
    ----------
    x : Float[Tensor, "batch features"]
        Training input.
    weight : Float[Tensor, "outputs features"]
        First-layer weight of a trained network.
    mask : Tensor, optional
        1 = observed; NaN is missing by default.

    Returns
    -------
    Float[Tensor, "features"]
        Non-negative, with mean 1, so that counts stay comparable with ``min_count``.

    Raises
    ------
    InputError
        All importances are zero.

    Examples
    --------
    >>> input_importance(torch.tensor([[1.0, 3.0], [float("nan"), 3.0]]), torch.ones(1, 2))
    tensor([0.5000, 1.5000])
    """
    values, observed, _ = observe(x, mask)
    size = values.abs().sum(0) / observed.sum(0).clamp(min=1) * weight.detach().abs().mean(0)
    if not float(size.sum()) > 0:
        raise InputError("every column has importance 0; give a trained weight and input that is not all zero")
    return size / size.mean()
