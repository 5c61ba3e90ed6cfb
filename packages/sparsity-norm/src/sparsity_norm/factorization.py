"""Recommenders to compare with: the mean, offsets, matrix factorisation and item neighbourhoods.

All are fitted, asked and evaluated as :class:`sparsity_norm.recommend.AutoRecRecommender` is. The formulas are those of
Koren, "Factor in the Neighbors" (TKDD 2010), which scikit-surprise implements too; nothing here is from
arXiv:1906.00150.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor

from shared_core.errors import InputError
from sparsity_norm.autorec import SparseRows, sum_embeddings
from sparsity_norm.ratings import Number, RatingMatrix
from sparsity_norm.serving import Cold, Recommender, Unknown

if TYPE_CHECKING:
    from sparsity_norm.ratings import Compressed

__all__ = ["BaselineOnly", "BiasedMF", "GlobalMean", "ItemKNN", "rating_offsets"]


def rating_offsets(
    ratings: RatingMatrix, *, reg_user: Number = 15.0, reg_item: Number = 10.0, sweeps: int = 10
) -> tuple[float, Float[np.ndarray, " users"], Float[np.ndarray, " items"]]:
    """Return the mean and the offsets ``b_u``, ``b_i`` of the model ``r = mean + b_u + b_i``.

    Alternating least squares of ``sum (r - mean - b_u - b_i)^2 + reg_user sum b_u^2 + reg_item sum b_i^2`` with the
    mean held at the mean rating, item offsets first.

    Parameters
    ----------
    ratings
        Training ratings; a user or an item without one gets offset 0.
    reg_user, reg_item
        Penalties: as many ratings of 0 offset are added to each user and item. Positive, or 0.
    sweeps
        Alternations.

    Examples
    --------
    >>> ratings = RatingMatrix.from_triplets([0, 0, 1, 1], [0, 1, 0, 1], [4.0, 2.0, 5.0, 3.0])
    >>> mean, users, items = rating_offsets(ratings, reg_user=0, reg_item=0)
    >>> mean, users.tolist(), items.tolist()
    (3.5, [-0.5, 0.5], [1.0, -1.0])
    """
    if not (reg_user >= 0 and reg_item >= 0):
        raise InputError(f"reg_user, reg_item: ({reg_user}, {reg_item}) must both be at least 0")
    mean = ratings.mean
    above = ratings.values.astype(np.float64) - mean
    n_users, n_items = ratings.shape
    user_weight = np.maximum(reg_user + ratings.user_counts, 1e-300)
    item_weight = np.maximum(reg_item + ratings.item_counts, 1e-300)
    user_offsets, item_offsets = np.zeros(n_users), np.zeros(n_items)
    for _ in range(sweeps):
        item_offsets = np.bincount(ratings.items, above - user_offsets[ratings.users], n_items) / item_weight
        user_offsets = np.bincount(ratings.users, above - item_offsets[ratings.items], n_users) / user_weight
    return mean, user_offsets, item_offsets


class _OffsetRecommender(Recommender):
    """A recommender that knows ``mean + b_u + b_i``."""

    mean_: float
    user_offsets_: Float[np.ndarray, " users"]
    item_offsets_: Float[np.ndarray, " items"]

    def offsets(self) -> tuple[float, Float[np.ndarray, " users"], Float[np.ndarray, " items"]]:
        """Return mean, user offsets and item offsets."""
        return self.mean_, self.user_offsets_, self.item_offsets_

    def score_cells(
        self, users: Integer[np.ndarray, " cells"], items: Integer[np.ndarray, " cells"]
    ) -> Float[np.ndarray, " cells"]:
        """Return ``mean + b_u + b_i`` for each cell."""
        return self.mean_ + self.user_offsets_[users] + self.item_offsets_[items]

    def score_users(self, users: Integer[np.ndarray, " users"]) -> Float[np.ndarray, "users items"]:
        """Return ``mean + b_u + b_i`` for all items of each user."""
        return self.mean_ + self.user_offsets_[users, None] + self.item_offsets_


class GlobalMean(_OffsetRecommender):
    """Predicts the mean training rating everywhere.

    Parameters
    ----------
    cold, unknown
        As in :class:`sparsity_norm.recommend.AutoRecRecommender`; here they change nothing but errors.

    Examples
    --------
    >>> float(GlobalMean().fit((["a", "b"], ["x", "x"], [1, 4])).predict("a", "x")[0])
    2.5
    """

    def __init__(self, *, cold: Cold = "mean", unknown: Unknown = "error") -> None:
        self.cold: Cold = cold
        self.unknown: Unknown = unknown

    def fit(self, ratings: Any) -> GlobalMean:
        """Fit on anything that :meth:`RatingMatrix.of` takes."""
        self._check_serving_options()
        self.ratings_ = RatingMatrix.of(ratings)
        self.mean_ = self.ratings_.mean
        self.user_offsets_, self.item_offsets_ = (np.zeros(size) for size in self.ratings_.shape)
        return self


class BaselineOnly(_OffsetRecommender):
    """Predicts ``mean + b_u + b_i``, the offsets fitted by :func:`rating_offsets`.

    Parameters
    ----------
    reg_user, reg_item, sweeps
        As in :func:`rating_offsets`.
    cold, unknown
        As in :class:`sparsity_norm.recommend.AutoRecRecommender`.

    Examples
    --------
    >>> ratings = (["a", "a", "b"], ["x", "y", "y"], [1, 3, 5])
    >>> BaselineOnly(reg_user=1, reg_item=1).fit(ratings).predict("b", "x").round(1)
    array([3.])
    """

    def __init__(
        self,
        *,
        reg_user: Number = 15.0,
        reg_item: Number = 10.0,
        sweeps: int = 10,
        cold: Cold = "bias",
        unknown: Unknown = "error",
    ) -> None:
        self.reg_user = reg_user
        self.reg_item = reg_item
        self.sweeps = sweeps
        self.cold: Cold = cold
        self.unknown: Unknown = unknown

    def fit(self, ratings: Any) -> BaselineOnly:
        """Fit on anything that :meth:`RatingMatrix.of` takes."""
        self._check_serving_options()
        ratings = RatingMatrix.of(ratings)
        self.mean_, self.user_offsets_, self.item_offsets_ = rating_offsets(
            ratings, reg_user=self.reg_user, reg_item=self.reg_item, sweeps=self.sweeps
        )
        self.ratings_ = ratings
        return self


class BiasedMF(_OffsetRecommender):
    """Matrix factorisation with offsets, ``mean + b_u + b_i + p_u . q_i``, by alternating least squares.

    Minimises ``sum over ratings of (r - prediction)^2 + reg (b_u^2 + b_i^2 + |p_u|^2 + |q_i|^2)``: the penalty counts
    once a rating, as in stochastic gradient implementations, so ``reg`` compares with theirs. All users, then all
    items, are solved at once as a batch of small linear systems.

    Parameters
    ----------
    rank
        Length of ``p_u`` and ``q_i``.
    reg
        Penalty a rating, positive.
    sweeps
        Alternations.
    cold, unknown
        As in :class:`sparsity_norm.recommend.AutoRecRecommender`.
    random_state
        Seed of the initial item factors.

    Examples
    --------
    >>> ratings = (["a", "a", "b", "b"], ["x", "y", "x", "y"], [1, 5, 5, 1])
    >>> BiasedMF(rank=1, reg=0.001).fit(ratings).predict(["a", "b"], ["x", "x"]).round(1)
    array([1., 5.])
    """

    user_factors_: Float[np.ndarray, "users rank"]
    item_factors_: Float[np.ndarray, "items rank"]

    def __init__(
        self,
        *,
        rank: int = 20,
        reg: Number = 0.1,
        sweeps: int = 20,
        cold: Cold = "bias",
        unknown: Unknown = "error",
        random_state: int = 0,
    ) -> None:
        self.rank = rank
        self.reg = reg
        self.sweeps = sweeps
        self.cold: Cold = cold
        self.unknown: Unknown = unknown
        self.random_state = random_state

    def fit(self, ratings: Any) -> BiasedMF:
        """Fit on anything that :meth:`RatingMatrix.of` takes."""
        self._check_serving_options()
        if self.rank < 1 or self.sweeps < 1:
            raise InputError(f"rank, sweeps: ({self.rank}, {self.sweeps}) must both be at least 1")
        if not (math.isfinite(self.reg) and self.reg > 0):
            raise InputError(f"reg: {self.reg} must be a positive number")
        ratings = RatingMatrix.of(ratings)
        mean, user_offsets, item_offsets = rating_offsets(ratings)
        generator = torch.Generator().manual_seed(self.random_state)
        # The offset is kept as one more coordinate, solved along with the factors.
        users = torch.zeros(ratings.shape[0], self.rank + 1, dtype=torch.float64)
        items = torch.randn(ratings.shape[1], self.rank + 1, dtype=torch.float64, generator=generator)
        items *= 0.3 / math.sqrt(self.rank)
        users[:, -1], items[:, -1] = torch.from_numpy(user_offsets), torch.from_numpy(item_offsets)
        by_user, by_item = _centred_rows(ratings.by_user, mean), _centred_rows(ratings.by_item, mean)
        for _ in range(self.sweeps):
            users = _solve_side(by_user, items, self.reg)
            items = _solve_side(by_item, users, self.reg)
        self.ratings_ = ratings
        self.mean_ = mean
        self.user_offsets_, self.item_offsets_ = users[:, -1].numpy(), items[:, -1].numpy()
        self.user_factors_, self.item_factors_ = users[:, :-1].numpy(), items[:, :-1].numpy()
        return self

    def score_cells(
        self, users: Integer[np.ndarray, " cells"], items: Integer[np.ndarray, " cells"]
    ) -> Float[np.ndarray, " cells"]:
        """Return ``mean + b_u + b_i + p_u . q_i`` for each cell."""
        interaction = np.vecdot(self.user_factors_[users], self.item_factors_[items])
        return super().score_cells(users, items) + interaction

    def score_users(self, users: Integer[np.ndarray, " users"]) -> Float[np.ndarray, "users items"]:
        """Return the same for all items of each user."""
        return super().score_users(users) + self.user_factors_[users] @ self.item_factors_.T


def _centred_rows(rows: Compressed, mean: float) -> SparseRows:
    return SparseRows.of(rows.indptr, rows.indices, rows.values.astype(np.float64) - mean, dtype=torch.float64)


def _solve_side(rows: SparseRows, other: Tensor, reg: float) -> Tensor:
    """Solve each row's ridge problem given the other side's factors; the last coordinate of each is its offset."""
    # A row's own offset meets a constant 1, and the other side's offsets are part of the target.
    design = torch.cat([other[:, :-1], torch.ones_like(other[:, -1:])], dim=1)
    width = design.shape[1]
    outer = (design[:, :, None] * design[:, None, :]).flatten(1)
    gram = sum_embeddings(rows, torch.ones_like(rows.values), outer).unflatten(1, (width, width))
    # A row without ratings has nothing to solve; a penalty of 1 makes its solution 0.
    gram.diagonal(dim1=1, dim2=2).add_((reg * rows.counts.double()).clamp(min=reg)[:, None])
    moment = sum_embeddings(rows, rows.values - other[:, -1][rows.columns], design)
    return torch.cholesky_solve(moment[:, :, None], torch.linalg.cholesky(gram))[:, :, 0]


class ItemKNN(_OffsetRecommender):
    """Item neighbourhoods over offsets: ``mean + b_u + b_i + sum s_ij (r_uj - b_uj) / sum s_ij``.

    The sum goes over the ``neighbours`` items most similar to ``i`` among those that ``u`` rated; ``s_ij`` is the
    correlation of the two items' deviations from their offsets over common users, times ``(n - 1) / (n - 1 + shrink)``
    for ``n`` common users (Koren 2010, section 2.2, as ``KNNBaseline`` of scikit-surprise has it). Memory is
    ``items^2``.

    Parameters
    ----------
    neighbours
        Most neighbours used.
    shrink
        Doubt about similarities from few common users.
    cold, unknown
        As in :class:`sparsity_norm.recommend.AutoRecRecommender`.

    Examples
    --------
    >>> ratings = (list("aabbcc"), list("xyxyxy"), [1, 1, 5, 5, 1, 2])
    >>> ItemKNN(neighbours=1).fit(ratings).predict("c", "y").round(1)
    array([1.1])
    """

    similarity_: Float[np.ndarray, "items items"]

    def __init__(
        self, *, neighbours: int = 40, shrink: Number = 100.0, cold: Cold = "bias", unknown: Unknown = "error"
    ) -> None:
        self.neighbours = neighbours
        self.shrink = shrink
        self.cold: Cold = cold
        self.unknown: Unknown = unknown

    def fit(self, ratings: Any) -> ItemKNN:
        """Fit on anything that :meth:`RatingMatrix.of` takes."""
        self._check_serving_options()
        if self.neighbours < 1 or self.shrink < 0:
            raise InputError(f"neighbours, shrink: ({self.neighbours}, {self.shrink}) must be at least 1 and 0")
        ratings = RatingMatrix.of(ratings)
        self.mean_, self.user_offsets_, self.item_offsets_ = rating_offsets(ratings)
        deviation = np.zeros(ratings.shape)
        rated = np.zeros(ratings.shape)
        place = (ratings.users, ratings.items)
        deviation[place] = ratings.values - super().score_cells(*place)
        rated[place] = 1
        power = (deviation**2).T @ rated
        common = rated.T @ rated
        similarity = (deviation.T @ deviation) / np.sqrt(np.maximum(power * power.T, 1e-300))
        similarity *= np.maximum(common - 1, 0) / np.maximum(common - 1 + self.shrink, 1)
        np.fill_diagonal(similarity, 0)
        self.ratings_ = ratings
        # Unlike tastes are no neighbours.
        self.similarity_ = np.maximum(similarity, 0)
        return self

    def score_cells(
        self, users: Integer[np.ndarray, " cells"], items: Integer[np.ndarray, " cells"]
    ) -> Float[np.ndarray, " cells"]:
        """Return the neighbourhood prediction for each cell."""
        scores = super().score_cells(users, items)
        order = np.argsort(users, kind="stable")
        for cells in np.split(order, np.flatnonzero(np.diff(users[order])) + 1) if len(users) else []:
            scores[cells] += self._adjustment(int(users[cells[0]]), items[cells])
        return scores

    def score_users(self, users: Integer[np.ndarray, " users"]) -> Float[np.ndarray, "users items"]:
        """Return the neighbourhood predictions of all items for each user."""
        every_item = np.arange(self.ratings_.shape[1])
        return super().score_users(users) + np.stack([self._adjustment(int(user), every_item) for user in users])

    def _adjustment(self, user: int, items: np.ndarray) -> np.ndarray:
        indptr, indices, values = self.ratings_.by_user
        own = slice(indptr[user], indptr[user + 1])
        rated = indices[own]
        deviation = values[own] - (self.mean_ + self.user_offsets_[user] + self.item_offsets_[rated])
        weight = self.similarity_[items[:, None], rated]
        if self.neighbours < len(rated):
            near = np.argpartition(-weight, self.neighbours - 1, axis=1)[:, : self.neighbours]
            weight, deviation = np.take_along_axis(weight, near, axis=1), deviation[near]
        return (weight * deviation).sum(axis=1) / np.maximum(weight.sum(axis=1), 1e-300)
