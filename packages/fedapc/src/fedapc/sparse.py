"""Tensors of few non-zeros: adaptive parts that are done, and those received from other clients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

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
    index : places in C order, ascending
    values : at these places
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


@dataclass(frozen=True, eq=False)
class SparseStack:
    """Sparse tensors of one shape, one a slot, as the entries of all of them in the order of their places.

    A weighted sum over the slots touches each entry once, and so does its gradient.
    """

    index: Int64[Tensor, " entries"]
    slot: Int64[Tensor, " entries"]
    values: Float[Tensor, " entries"]
    slots: int
    shape: tuple[int, ...]

    @classmethod
    def of(cls, parts: Sequence[SparseTensor], shape: Sequence[int], like: Float[Tensor, "..."]) -> SparseStack:
        """Stack `parts`, of which there may be none; `like` gives the type and the device.

        Raises
        ------
        ModelMismatchError
            For a part of another shape.
        """
        shape = tuple(shape)
        for part in parts:
            if part.shape != shape:
                raise ModelMismatchError(f"received a part of shape {part.shape} for a layer of {shape}")
        if not parts:
            none = torch.zeros(0, dtype=torch.int64, device=like.device)
            return cls(none, none, like.new_zeros(0), 0, shape)
        index = torch.cat([part.index for part in parts]).to(like.device)
        slot = torch.repeat_interleave(torch.arange(len(parts)), torch.tensor([len(part.index) for part in parts]))
        order = index.argsort(stable=True)
        values = torch.cat([part.values for part in parts]).to(like)
        return cls(index[order], slot.to(like.device)[order], values[order], len(parts), shape)

    def weighted_sum(self, weights: Float[Tensor, " slots"]) -> Float[Tensor, "..."]:
        """Sum the slots with `weights`; differentiable in these."""
        terms = weights.index_select(0, self.slot) * self.values
        return terms.new_zeros(math.prod(self.shape)).index_add(0, self.index, terms).view(self.shape)

    def fold(self, weights: Float[Tensor, " slots"]) -> SparseTensor:
        """Return the weighted sum as one sparse tensor."""
        terms = weights.detach().index_select(0, self.slot) * self.values
        index, place = torch.unique_consecutive(self.index, return_inverse=True)
        return SparseTensor(index, terms.new_zeros(len(index)).index_add(0, place, terms), self.shape)
