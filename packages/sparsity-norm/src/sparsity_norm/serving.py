"""What every recommender here shares once it can score cells: ids, cold cells, top-k lists, evaluation, parameters.

A method derives from :class:`Recommender` and says how to fit and how to score; clipping to the scale, unknown ids,
users or items without a training rating, and leaving out what a user has rated already are dealt with here, the same
way for each method.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from jaxtyping import Float, Integer

from shared_core.errors import InputError
from sparsity_norm.ratings import RatingMatrix

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Cold", "CountGroup", "Evaluation", "Recommender", "TopK", "Unknown", "count_groups", "pooled_errors"]

_R = TypeVar("_R", bound="Recommender")

Cold = Literal["mean", "default", "bias"]
"""Prediction where the user or the item has no training rating: the training mean, the middle of the scale, or the
training mean with the offset of whichever of the two is known."""

Unknown = Literal["error", "mean"]
"""What to do with an id that was not there in training: refuse, or predict as for a cold cell."""


@dataclass(frozen=True)
class TopK:
    """Best items for each of several users.

    Attributes
    ----------
    users
        User ids, one a row.
    item_codes
        Shape ``(users, k)``: codes of the items, best first; -1 where a user has fewer than ``k`` candidates.
    scores
        Shape ``(users, k)``: predicted ratings; NaN where there is no item.
    item_ids
        What the codes stand for.
    """

    users: tuple[str, ...]
    item_codes: Integer[np.ndarray, "users k"]
    scores: Float[np.ndarray, "users k"]
    item_ids: tuple[str, ...]

    def as_lists(self) -> dict[str, list[tuple[str, float]]]:
        """Return for each user id the list of (item id, predicted rating), best first."""
        return {
            user: [
                (self.item_ids[code], float(score))
                for code, score in zip(codes.tolist(), scores.tolist(), strict=True)
                if code >= 0
            ]
            for user, codes, scores in zip(self.users, self.item_codes, self.scores, strict=True)
        }


@dataclass(frozen=True)
class CountGroup:
    """Errors among test cells whose user (or item) has about as many training ratings.

    Attributes
    ----------
    lowest, highest
        Smallest and largest training count in the group.
    n
        Test cells in the group.
    rmse
        Root mean squared error.
    mean_prediction, mean_rating
        Averages over the group; predictions that drift with the count show here.
    """

    lowest: int
    highest: int
    n: int
    rmse: float
    mean_prediction: float
    mean_rating: float


@dataclass(frozen=True)
class Evaluation:
    """Errors over all test cells together, in rating units.

    Attributes
    ----------
    rmse, mae
        Root mean squared and mean absolute error, pooled over cells.
    n
        Test cells.
    n_cold
        Test cells of which the user or the item has no training rating.
    groups
        The same errors by training count, from few to many.
    """

    rmse: float
    mae: float
    n: int
    n_cold: int
    groups: tuple[CountGroup, ...]


def pooled_errors(predicted: Float[np.ndarray, " cells"], ratings: Float[np.ndarray, " cells"]) -> tuple[float, float]:
    """Return RMSE and MAE over all cells together (not averaged over batches or users).

    Parameters
    ----------
    predicted, ratings
        Predicted and true ratings, of shape (cells,).

    Examples
    --------
    >>> pooled_errors(np.array([1.0, 4.0]), np.array([1.0, 2.0]))
    (1.4142135623730951, 1.0)
    """
    error = predicted.astype(np.float64) - ratings
    return math.sqrt(float(np.mean(error * error))), float(np.mean(np.abs(error)))


def count_groups(
    counts: Integer[np.ndarray, " cells"],
    predicted: Float[np.ndarray, " cells"],
    ratings: Float[np.ndarray, " cells"],
    *,
    n_groups: int = 10,
) -> tuple[CountGroup, ...]:
    """Return errors by observed count, in groups of about equally many cells; equal counts stay together.

    Parameters
    ----------
    counts
        Training ratings of each cell's user or item, of shape (cells,).
    predicted, ratings
        Predicted and true ratings, of shape (cells,).
    n_groups
        Groups to make, deciles by default; fewer where counts repeat a lot.
    """
    edges = np.quantile(counts, np.linspace(0, 1, n_groups + 1)[1:-1], method="lower")
    group = np.searchsorted(np.unique(edges), counts, side="left")
    made: list[CountGroup] = []
    for number in np.unique(group):
        inside = group == number
        made.append(
            CountGroup(
                lowest=int(counts[inside].min()),
                highest=int(counts[inside].max()),
                n=int(inside.sum()),
                rmse=pooled_errors(predicted[inside], ratings[inside])[0],
                mean_prediction=float(predicted[inside].mean(dtype=np.float64)),
                mean_rating=float(ratings[inside].mean(dtype=np.float64)),
            )
        )
    return tuple(made)


class Recommender(ABC):
    """A predictor of explicit ratings, in the manner of scikit-learn's estimators.

    A subclass takes its parameters as keyword arguments of its constructor, ``cold`` and ``unknown`` among them, and
    stores them unchanged under their names, so that ``get_params``, ``set_params`` and ``sklearn.base.clone`` work.
    Its ``fit`` sets ``ratings_`` (the training ratings) and returns ``self``.

    Attributes
    ----------
    ratings_
        The ratings it was fitted on.
    n_cold_
        Cells of the last ``predict`` or ``evaluate`` that got the cold prediction.
    """

    cold: Cold
    unknown: Unknown
    ratings_: RatingMatrix
    n_cold_: int

    @abstractmethod
    def fit(self, ratings: Any) -> Recommender:
        """Fit on anything that :meth:`RatingMatrix.of` takes."""

    @abstractmethod
    def score_cells(
        self, users: Integer[np.ndarray, " cells"], items: Integer[np.ndarray, " cells"]
    ) -> Float[np.ndarray, " cells"]:
        """Return predictions of cells given by codes, neither clipped nor corrected for cold users and items."""

    @abstractmethod
    def score_users(self, users: Integer[np.ndarray, " users"]) -> Float[np.ndarray, "users items"]:
        """Return predictions of all items for users given by codes, as :meth:`score_cells` does."""

    def predict(self, users: Any, items: Any) -> Float[np.ndarray, " cells"]:
        """Predict ratings of (user, item) pairs, clipped to the scale.

        Parameters
        ----------
        users, items
            Ids: two equally long sequences, or a single id against a sequence.

        Returns
        -------
        Float[np.ndarray, " cells"]
            One prediction a pair; those of cold users and items follow ``cold`` and are counted in ``n_cold_``.

        Raises
        ------
        UnknownKeyError
            For an id that was not there in training, unless ``unknown="mean"``.
        InputError
            For sequences of different lengths, or before ``fit``.
        """
        ratings = self._fitted()
        user_codes, item_codes = ratings.user_codes(users), ratings.item_codes(items)
        if len(user_codes) != len(item_codes) and 1 not in (len(user_codes), len(item_codes)):
            raise InputError(f"users, items: {len(user_codes)} users but {len(item_codes)} items; give pairs")
        if self.unknown == "error":
            for codes, ids, name in ((user_codes, users, ratings.user_code), (item_codes, items, ratings.item_code)):
                if (codes < 0).any():
                    # Looks the first unknown id up once more, for the message that this raises.
                    name(np.atleast_1d(np.asarray(ids, dtype=object))[int((codes < 0).argmax())])
        return self._predict_codes(*np.broadcast_arrays(user_codes, item_codes))

    def _predict_codes(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        ratings = self.ratings_
        cold = (users < 0) | (items < 0)
        cold |= (ratings.user_counts[users] == 0) | (ratings.item_counts[items] == 0)
        predicted = np.empty(len(users), dtype=np.float64)
        warm = ~cold
        predicted[warm] = self.score_cells(users[warm], items[warm])
        predicted[cold] = self.cold_scores(users[cold], items[cold])
        self.n_cold_ = int(cold.sum())
        return np.clip(predicted, *ratings.scale)

    def cold_scores(
        self, users: Integer[np.ndarray, " cells"], items: Integer[np.ndarray, " cells"]
    ) -> Float[np.ndarray, " cells"]:
        """Return what ``cold`` says for cells given by codes; -1 stands for an unknown id."""
        if self.cold == "default":
            return np.full(len(users), sum(self.ratings_.scale) / 2)
        if self.cold == "mean":
            return np.full(len(users), self.ratings_.mean)
        mean, user_offsets, item_offsets = self.offsets()
        # Position -1, of unknown ids, reads the appended 0.
        return mean + np.append(user_offsets, 0.0)[users] + np.append(item_offsets, 0.0)[items]

    def offsets(self) -> tuple[float, Float[np.ndarray, " users"], Float[np.ndarray, " items"]]:
        """Return mean, user offsets and item offsets for ``cold="bias"``; 0 where there is no rating."""
        raise InputError(f"cold: {type(self).__name__} has no offsets; choose 'mean' or 'default'")

    def recommend(self, user: Any, k: int = 10, *, exclude_seen: bool = True) -> list[tuple[str, float]]:
        """Return the ``k`` items with the highest predictions for one user, best first.

        Parameters
        ----------
        user
            User id.
        k
            Length of the list, at least 1; it is shorter where there are fewer candidates.
        exclude_seen
            Leave out what the user rated in training.

        Raises
        ------
        UnknownKeyError
            For a user that was not there in training; :meth:`AutoRecRecommender.fold_in` takes new users.
        """
        top = self.recommend_all(k, users=[self._fitted().user_code(user)], exclude_seen=exclude_seen)
        return next(iter(top.as_lists().values()))

    def recommend_all(
        self,
        k: int = 10,
        *,
        users: Sequence[int] | np.ndarray | None = None,
        exclude_seen: bool = True,
        block_size: int = 1024,
    ) -> TopK:
        """Return the ``k`` best items of many users, scored and ranked block by block.

        Items without a training rating are left out: there is nothing to rank them by.

        Parameters
        ----------
        k, exclude_seen
            As in :meth:`recommend`.
        users
            User codes; all users when ``None``.
        block_size
            Users scored at a time; memory is ``block_size x items``.
        """
        ratings = self._fitted()
        if k < 1:
            raise InputError(f"k: {k} must be at least 1")
        codes = np.arange(ratings.shape[0]) if users is None else np.asarray(users, dtype=np.int64)
        width = min(k, ratings.shape[1])
        best = np.full((len(codes), width), -1, dtype=np.int64)
        scores = np.full((len(codes), width), np.nan)
        never_rated = ratings.item_counts == 0
        indptr, indices, _ = ratings.by_user
        for start in range(0, len(codes), block_size):
            block = codes[start : start + block_size]
            table = self.score_users(block)
            cold = np.flatnonzero(ratings.user_counts[block] == 0)
            if len(cold):
                every_item = np.arange(ratings.shape[1])
                for row in cold:
                    table[row] = self.cold_scores(np.full_like(every_item, block[row]), every_item)
            table[:, never_rated] = -np.inf
            if exclude_seen:
                lengths = indptr[block + 1] - indptr[block]
                rows = np.repeat(np.arange(len(block)), lengths)
                places = np.repeat(indptr[block] - np.cumsum(lengths) + lengths, lengths) + np.arange(len(rows))
                table[rows, indices[places]] = -np.inf
            chosen, value = rank_rows(table, width)
            found = value > -np.inf
            best[start : start + len(block)] = np.where(found, chosen, -1)
            scores[start : start + len(block)] = np.where(found, np.clip(value, *ratings.scale), np.nan)
        return TopK(tuple(ratings.user_ids[code] for code in codes), best, scores, ratings.item_ids)

    def evaluate(self, test: Any, *, by: Literal["user", "item"] = "user", n_groups: int = 10) -> Evaluation:
        """Return errors on held-out ratings.

        Parameters
        ----------
        test
            Anything that :meth:`RatingMatrix.of` takes; its ids may be others than those of training only where
            ``unknown="mean"``.
        by
            Whose training count the groups go by.
        n_groups
            Groups by training count.

        Raises
        ------
        UnknownKeyError
            For an id that was not there in training, unless ``unknown="mean"``.
        """
        ratings = self._fitted()
        test = RatingMatrix.of(test)
        if test.user_ids == ratings.user_ids and test.item_ids == ratings.item_ids:
            users, items = test.users.astype(np.int64), test.items.astype(np.int64)
            predicted = self._predict_codes(users, items)
        else:
            user_names = np.asarray(test.user_ids, dtype=object)[test.users]
            item_names = np.asarray(test.item_ids, dtype=object)[test.items]
            predicted = self.predict(user_names, item_names)
            users, items = ratings.user_codes(user_names), ratings.item_codes(item_names)
        all_counts, codes = (ratings.user_counts, users) if by == "user" else (ratings.item_counts, items)
        counts = np.where(codes < 0, 0, all_counts[codes])
        rmse, mae = pooled_errors(predicted, test.values)
        return Evaluation(
            rmse, mae, len(test), self.n_cold_, count_groups(counts, predicted, test.values, n_groups=n_groups)
        )

    def get_params(self, deep: bool = True) -> dict[str, Any]:  # noqa: ARG002
        """Return the constructor's parameters by name (scikit-learn's protocol)."""
        return {name: getattr(self, name) for name in self._parameter_names()}

    def set_params(self: _R, **params: Any) -> _R:
        """Set constructor parameters by name; raises :class:`InputError` for a name that is none."""
        names = self._parameter_names()
        for name, value in params.items():
            if name not in names:
                raise InputError(f"{name}: {type(self).__name__} has no such parameter; it has {', '.join(names)}")
            setattr(self, name, value)
        return self

    @classmethod
    def _parameter_names(cls) -> list[str]:
        return [name for name in inspect.signature(cls.__init__).parameters if name != "self"]

    def __repr__(self) -> str:
        """Show the parameters that differ from their defaults."""
        defaults = inspect.signature(type(self).__init__).parameters
        changed = {name: value for name, value in self.get_params().items() if value != defaults[name].default}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in changed.items())})"

    def _check_serving_options(self) -> None:
        check_choice("cold", self.cold, ("mean", "default", "bias"))
        check_choice("unknown", self.unknown, ("error", "mean"))

    def _fitted(self) -> RatingMatrix:
        if not hasattr(self, "ratings_"):
            raise not_fitted(self)
        return self.ratings_


def not_fitted(estimator: object) -> Exception:
    """Return the exception to raise where ``fit`` has not been called: scikit-learn's, which is a ``ValueError``."""
    from sklearn.exceptions import NotFittedError

    return NotFittedError(f"{type(estimator).__name__}: not fitted yet; call fit with ratings first")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise :class:`InputError` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise InputError(f"{name}: {value!r} is none of {', '.join(map(repr, choices))}")


def rank_rows(
    table: Float[np.ndarray, "rows columns"], k: int
) -> tuple[Integer[np.ndarray, "rows k"], Float[np.ndarray, "rows k"]]:
    """Return columns and values of the ``k`` largest entries of each row, largest first; ties by column number."""
    if k < table.shape[1]:
        kept = np.sort(np.argpartition(-table, k - 1, axis=1)[:, :k], axis=1)
    else:
        kept = np.broadcast_to(np.arange(table.shape[1]), table.shape)
    values = np.take_along_axis(table, kept, axis=1)
    order = np.argsort(-values, axis=1, kind="stable")
    return np.take_along_axis(kept, order, axis=1), np.take_along_axis(values, order, axis=1)
