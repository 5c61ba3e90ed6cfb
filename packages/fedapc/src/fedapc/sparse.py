"""Tensors of few non-zeros: adaptive parts that are done, and those received from other clients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from fedapc.errors import ModelMismatchError

__all__ = ["SparseStack", "SparseTensor"]


@dataclass(frozen=True, eq=False)
class SparseTensor:
    """The entries of a tensor that are not zero.

    Parameters
    ----------
    index : places in C order, ascending, ``(kept,)``
    values : at these places, ``(kept,)``
    shape : of the whole tensor

    Examples
    --------
    >>> part = SparseTensor.of(torch.tensor([[0.0, 2.0], [0.5, 0.0]]), threshold=1.0)
    >>> part.index.tolist(), part.values.tolist(), part.density
    ([1], [2.0], 0.25)
    """

    index: Int64[Tensor, " kept"]
    values: Float[Tensor, " kept"]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, dense: Float[Tensor, "..."], threshold: float = 0.0) -> SparseTensor:
        """Keep what is greater than `threshold` in absolute value."""
        flat = dense.detach().reshape(-1)
        index = (flat.abs() > threshold).nonzero().squeeze(1)
        return cls(index, flat[index], tuple(dense.shape))

    @classmethod
    def packed(cls, dense: Float[Tensor, "..."]) -> SparseTensor:
        """Keep what is not zero; or, where that takes fewer bytes, all, with places that all such tensors share."""
        part = cls.of(dense)
        if part.density < _ALL_FROM:
            return part
        return cls(_all_places(dense.numel(), dense.device), dense.detach().reshape(-1), part.shape)

    @property
    def density(self) -> float:
        """Share of the places that are kept."""
        return len(self.index) / max(1, math.prod(self.shape))

    def dense(self) -> Float[Tensor, "..."]:
        """Return the whole tensor."""
        whole = self.values.new_zeros(math.prod(self.shape))
        whole[self.index] = self.values
        return whole.view(self.shape)

    def pruned(self, threshold: float) -> SparseTensor:
        """Keep what is greater than `threshold` in absolute value."""
        keep = self.values.abs() > threshold
        return SparseTensor(self.index[keep], self.values[keep], self.shape)

    def rows(self) -> Int64[Tensor, " kept"]:
        """Place of every entry along the first axis."""
        return self.index // max(1, math.prod(self.shape[1:]))


# Above it a dense matrix times a vector is faster than entries one by one, which need a place and a slot each.
_DENSE_FROM = 0.1
# Above it the values of all places take fewer bytes than entries with their places.
_ALL_FROM = 1 / 3


class SparseStack:
    """Sparse tensors of one shape, one a slot, to be summed with weights.

    The parts are what is kept. What makes many sums fast is made of them by the first `weighted_sum` and lasts until
    `release`: a matrix ``(slots, places)`` where the parts are dense, else the entries of all of them in the order of
    their places, with 32-bit places and slots.

    Parameters
    ----------
    parts : of one shape; there may be none
    shape : of these
    like : gives the type and the device

    Raises
    ------
    ModelMismatchError
        For a part of another shape.

    Examples
    --------
    >>> one, two = (SparseTensor.of(torch.tensor(row)) for row in ([0.0, 2.0], [1.0, 0.0]))
    >>> stack = SparseStack([one, two], (2,), torch.zeros(2))
    >>> stack.weighted_sum(torch.tensor([0.5, 3.0])), stack.fold(torch.tensor([2.0, 0.0])).dense()
    (tensor([3., 1.]), tensor([0., 4.]))
    """

    def __init__(self, parts: Sequence[SparseTensor], shape: Sequence[int], like: Float[Tensor, "..."]) -> None:
        self.parts = tuple(parts)
        self.shape = tuple(shape)
        for part in self.parts:
            if part.shape != self.shape:
                raise ModelMismatchError(f"received a part of shape {part.shape} for a layer of {self.shape}")
        self._like = like.detach().new_zeros(0)
        self._places = math.prod(self.shape)
        self._held: _Dense | _Entries | None = None

    @property
    def density(self) -> float:
        """Share of the places that are kept, over all slots."""
        return sum(len(part.index) for part in self.parts) / max(1, self._places * len(self.parts))

    def weighted_sum(self, weights: Float[Tensor, " slots"]) -> Float[Tensor, "..."]:
        """Sum the slots with `weights`, ``(slots,)``; differentiable in these."""
        return self._hold().weighted_sum(weights).view(self.shape)

    def slopes(self, slope: Float[Tensor, "..."]) -> Float[Tensor, " slots"]:
        """Return the gradient of the weights, ``(slots,)``, for that of their sum."""
        return self._hold().slopes(slope.reshape(-1))

    def total(self, weights: Float[Tensor, " slots"]) -> Float[Tensor, "..."]:
        """Sum the slots with `weights` once, without anything that lasts; slots of weight 0 cost nothing."""
        whole = self._like.new_zeros(self._places)
        for part, weight in zip(self.parts, weights.tolist(), strict=True):
            if weight:
                whole.index_add_(0, part.index.to(whole.device), part.values.to(whole), alpha=weight)
        return whole.view(self.shape)

    def fold(self, weights: Float[Tensor, " slots"]) -> SparseTensor:
        """Return the weighted sum as one sparse tensor."""
        return SparseTensor.packed(self.total(weights.detach()))

    def release(self) -> None:
        """Keep the parts only."""
        self._held = None

    def _hold(self) -> _Dense | _Entries:
        if self._held is None:
            kind = _Dense if self.density >= _DENSE_FROM else _Entries
            self._held = kind(self.parts, self._places, self._like)
        return self._held


class _Dense:
    """A matrix with a row for each slot."""

    def __init__(self, parts: Sequence[SparseTensor], places: int, like: Float[Tensor, "..."]) -> None:
        self._rows = like.new_zeros(len(parts), places)
        for row, part in zip(self._rows, parts, strict=True):
            row[part.index.to(row.device)] = part.values.to(row)

    def weighted_sum(self, weights: Float[Tensor, " slots"]) -> Float[Tensor, " places"]:
        return weights @ self._rows

    def slopes(self, slope: Float[Tensor, " places"]) -> Float[Tensor, " slots"]:
        return self._rows @ slope


class _Entries:
    """The entries of all slots, in the order of their places."""

    def __init__(self, parts: Sequence[SparseTensor], places: int, like: Float[Tensor, "..."]) -> None:
        none = torch.zeros(0, dtype=torch.int64)
        index = torch.cat([none, *(part.index.cpu() for part in parts)])
        lengths = torch.tensor([len(part.index) for part in parts], dtype=torch.int64)
        slot = torch.repeat_interleave(torch.arange(len(parts), dtype=torch.int32), lengths)
        values = torch.cat([like, *(part.values.to(like) for part in parts)])
        order = index.argsort(stable=True)
        # Enough: a message has no more elements than that.
        self._index = index[order].to(torch.int32).to(like.device)
        self._slot = slot[order].to(like.device)
        self._values = values[order.to(like.device)]
        self._places = places
        self._slots = len(parts)

    def weighted_sum(self, weights: Float[Tensor, " slots"]) -> Float[Tensor, " places"]:
        terms = weights.index_select(0, self._slot) * self._values
        return terms.new_zeros(self._places).index_add(0, self._index, terms)

    def slopes(self, slope: Float[Tensor, " places"]) -> Float[Tensor, " slots"]:
        terms = slope.index_select(0, self._index) * self._values
        return terms.new_zeros(self._slots).index_add_(0, self._slot, terms)


@lru_cache(maxsize=64)
def _all_places(count: int, device: torch.device) -> Int64[Tensor, " count"]:
    return torch.arange(count, device=device)
