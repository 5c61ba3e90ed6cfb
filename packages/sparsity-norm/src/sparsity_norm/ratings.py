"""A rating matrix in memory: compressed by user and by item, with the ids of both and the rating scale.

Everything a recommender of this package is fitted on becomes a :class:`RatingMatrix` first, so that what can be wrong
with ratings (a pair given twice, a value off the scale, a missing value) is found in one place. A stored entry is an
observed rating whatever its value: a rating of 0 is a rating.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Integer

from shared_core.errors import InputError, UnknownKeyError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import scipy.sparse

__all__ = ["Compressed", "Duplicates", "RatingMatrix", "hold_out_users", "split_ratings"]

Number = float | int
Scale = tuple[Number, Number]
Duplicates = Literal["error", "mean", "last"]
"""What to do with a (user, item) pair that is rated more than once."""


class Compressed(NamedTuple):
    """Rows of a sparse matrix one after the other: row ``r`` is the slice ``indptr[r]:indptr[r + 1]`` of the other two.

    Attributes
    ----------
    indptr
        Shape ``(rows + 1,)``: where each row begins; ``numpy.diff`` of it is the observed count of each row.
    indices
        Shape ``(ratings,)``: the column of each stored entry, ascending within a row.
    values
        Shape ``(ratings,)``: the stored entries.
    """

    indptr: Integer[np.ndarray, " rows_plus_one"]
    indices: Integer[np.ndarray, " ratings"]
    values: Float[np.ndarray, " ratings"]


@dataclass(frozen=True, eq=False)
class RatingMatrix:
    """Observed ratings, sorted by user and then item, each pair at most once.

    Make one with :meth:`of` (anything), :meth:`from_triplets`, :meth:`from_frame` or :meth:`from_scipy`; the plain
    constructor checks nothing.

    Attributes
    ----------
    users, items
        Shape ``(ratings,)``: integer codes, positions in ``user_ids`` and ``item_ids``.
    values
        Shape ``(ratings,)``: the ratings, ``float32`` or ``float64``.
    user_ids, item_ids
        The ids the codes stand for, as strings. A user or an item may have no rating.
    scale
        Lowest and highest rating there can be.

    Examples
    --------
    >>> ratings = RatingMatrix.from_triplets(["ann", "bob", "ann"], ["x", "x", "y"], [4, 2, 5], scale=(1, 5))
    >>> ratings.shape, ratings.mean
    ((2, 2), 3.6666666666666665)
    >>> ratings.by_item.indices
    array([0, 1, 0], dtype=int32)
    """

    users: Integer[np.ndarray, " ratings"]
    items: Integer[np.ndarray, " ratings"]
    values: Float[np.ndarray, " ratings"]
    user_ids: tuple[str, ...] = field(repr=False)
    item_ids: tuple[str, ...] = field(repr=False)
    scale: tuple[float, float]

    @classmethod
    def of(cls, ratings: Any, *, scale: Scale | None = None, duplicates: Duplicates = "error") -> RatingMatrix:
        """Make a rating matrix of whatever holds ratings.

        Parameters
        ----------
        ratings
            A :class:`RatingMatrix` (returned as it is); a ``shared_core.data.RatingData``; a data frame with columns
            ``user``, ``item``, ``rating``; a SciPy sparse matrix (users x items, every *stored* entry is a rating,
            zeros included); or a triple ``(users, items, values)`` of equally long sequences.
        scale
            Lowest and highest rating there can be; taken from the object, or else from the data, when not given.
        duplicates
            What to do with a pair that is rated more than once: refuse, take the mean, or take the last one given.

        Raises
        ------
        InputError
            For no ratings, a rating that is not finite or off the scale, a pair given twice, sequences of different
            lengths, a missing column, or an object of another kind.
        """
        if isinstance(ratings, RatingMatrix):
            return ratings
        if hasattr(ratings, "user_ids") and hasattr(ratings, "item_ids"):
            return cls.from_codes(
                ratings.users,
                ratings.items,
                ratings.values,
                user_ids=ratings.user_ids,
                item_ids=ratings.item_ids,
                scale=ratings.scale if scale is None else scale,
                duplicates=duplicates,
            )
        if hasattr(ratings, "tocoo"):
            return cls.from_scipy(ratings, scale=scale, duplicates=duplicates)
        if hasattr(ratings, "columns"):
            return cls.from_frame(ratings, scale=scale, duplicates=duplicates)
        if isinstance(ratings, tuple | list) and len(ratings) == 3:
            return cls.from_triplets(*ratings, scale=scale, duplicates=duplicates)
        raise InputError(
            f"ratings: got {type(ratings).__name__}; give a data frame with columns user, item, rating, "
            "a SciPy sparse matrix (users x items), or a triple (users, items, values)"
        )

    @classmethod
    def from_triplets(
        cls,
        users: Sequence[Any] | np.ndarray,
        items: Sequence[Any] | np.ndarray,
        values: Sequence[float] | np.ndarray,
        *,
        scale: Scale | None = None,
        duplicates: Duplicates = "error",
    ) -> RatingMatrix:
        """Make a rating matrix of three equally long sequences; ids are strings or integers, kept as strings.

        Ids are coded in sorted order (integers by value, anything else as text). Raises as :meth:`of`.
        """
        user_ids, user_codes = _code_ids(users, "users")
        item_ids, item_codes = _code_ids(items, "items")
        return cls.from_codes(
            user_codes, item_codes, values, user_ids=user_ids, item_ids=item_ids, scale=scale, duplicates=duplicates
        )

    @classmethod
    def from_frame(
        cls,
        frame: Any,
        *,
        user: str = "user",
        item: str = "item",
        rating: str = "rating",
        scale: Scale | None = None,
        duplicates: Duplicates = "error",
    ) -> RatingMatrix:
        """Make a rating matrix of a data frame with one rating a row; the three columns are found by name.

        Raises as :meth:`of`.
        """
        names = [str(name) for name in frame.columns]
        for wanted in (user, item, rating):
            if wanted not in names:
                raise InputError(f"ratings: no column {wanted!r} among {names}; rename it or say which column it is")
        return cls.from_triplets(
            np.asarray(frame[user]),
            np.asarray(frame[item]),
            np.asarray(frame[rating]),
            scale=scale,
            duplicates=duplicates,
        )

    @classmethod
    def from_scipy(cls, matrix: Any, *, scale: Scale | None = None, duplicates: Duplicates = "error") -> RatingMatrix:
        """Make a rating matrix of a SciPy sparse matrix, users in rows; row and column numbers become the ids.

        Every stored entry is a rating, a stored zero too. Raises as :meth:`of`.
        """
        entries = matrix.tocoo(copy=False)
        n_users, n_items = entries.shape
        return cls.from_codes(
            entries.row,
            entries.col,
            entries.data,
            user_ids=tuple(map(str, range(n_users))),
            item_ids=tuple(map(str, range(n_items))),
            scale=scale,
            duplicates=duplicates,
        )

    @classmethod
    def from_codes(
        cls,
        users: Any,
        items: Any,
        values: Any,
        *,
        user_ids: Sequence[Any] | np.ndarray,
        item_ids: Sequence[Any] | np.ndarray,
        scale: Scale | None = None,
        duplicates: Duplicates = "error",
    ) -> RatingMatrix:
        """Make a rating matrix of integer codes into given ids; ids without a rating are kept. Raises as :meth:`of`."""
        if duplicates not in ("error", "mean", "last"):
            raise InputError(f"duplicates: {duplicates!r} is none of 'error', 'mean', 'last'")
        user_names, item_names = tuple(map(str, user_ids)), tuple(map(str, item_ids))
        for name, ids in (("user_ids", user_names), ("item_ids", item_names)):
            if len(set(ids)) != len(ids):
                repeated = Counter(ids).most_common(1)[0][0]
                raise InputError(f"{name}: id {repeated!r} stands for more than one code; make the ids unique")
        users, items, values = np.asarray(users), np.asarray(items), _as_floats(values)
        if not users.shape == items.shape == values.shape or values.ndim != 1:
            raise InputError(
                f"ratings: users {users.shape}, items {items.shape} and values {values.shape} must be "
                "one-dimensional and equally long"
            )
        if values.size == 0:
            raise InputError("ratings: there is none; give at least one (user, item, rating)")
        for name, codes, ids in (("users", users, user_names), ("items", items, item_names)):
            if codes.dtype.kind not in "iu":
                raise InputError(f"{name}: codes must be integers, got {codes.dtype}")
            outside = (codes < 0) | (codes >= len(ids))
            if outside.any():
                place = int(outside.argmax())
                raise InputError(f"{name}[{place}]: code {codes[place]} has no id; there are {len(ids)} ids")

        def where(place: int) -> str:
            return f"ratings[{place}] (user {user_names[users[place]]!r}, item {item_names[items[place]]!r})"

        bad = ~np.isfinite(values)
        if bad.any():
            place = int(bad.argmax())
            raise InputError(f"{where(place)}: rating {values[place]} is not finite; leave unrated pairs out")
        low, high = (float(values.min()), float(values.max())) if scale is None else map(float, scale)
        if not (np.isfinite(low) and np.isfinite(high) and low <= high):
            raise InputError(f"scale: ({low}, {high}) must be finite and ordered (lowest, highest)")
        outside = (values < low) | (values > high)
        if outside.any():
            place = int(outside.argmax())
            raise InputError(
                f"{where(place)}: rating {values[place]:g} is outside the scale {low:g}..{high:g}; "
                "correct it or declare another scale"
            )

        key = users.astype(np.int64) * len(item_names) + items
        order = np.argsort(key, kind="stable")
        key, values = key[order], values[order]
        first = np.ones(len(key), dtype=bool)
        first[1:] = key[1:] != key[:-1]
        if not first.all():
            if duplicates == "error":
                user, item = divmod(int(key[~first][0]), len(item_names))
                raise InputError(
                    f"ratings: user {user_names[user]!r} rated item {item_names[item]!r} more than once "
                    f"({int((~first).sum())} repeats in all); remove repeats, or set duplicates='mean' or 'last'"
                )
            starts = np.flatnonzero(first)
            if duplicates == "mean":
                lengths = np.diff(starts, append=len(key))
                values = (np.add.reduceat(values, starts) / lengths).astype(values.dtype)
            else:
                values = values[np.append(starts[1:], len(key)) - 1]
            key = key[first]
        codes = np.divmod(key, len(item_names))
        return cls(codes[0].astype(np.int32), codes[1].astype(np.int32), values, user_names, item_names, (low, high))

    def __len__(self) -> int:
        """Return the number of ratings."""
        return len(self.values)

    @property
    def shape(self) -> tuple[int, int]:
        """Number of users and of items, those without a rating included."""
        return len(self.user_ids), len(self.item_ids)

    @property
    def density(self) -> float:
        """Share of all user-item pairs that is rated, 0 to 1."""
        return len(self) / max(self.shape[0] * self.shape[1], 1)

    @property
    def mean(self) -> float:
        """Mean rating; NaN for a matrix without ratings."""
        return float(self.values.mean(dtype=np.float64)) if len(self) else float("nan")

    @cached_property
    def by_user(self) -> Compressed:
        """The ratings of each user: rows are users, columns are items."""
        return Compressed(_starts(self.users, self.shape[0]), self.items, self.values)

    @cached_property
    def by_item(self) -> Compressed:
        """The ratings of each item: rows are items, columns are users."""
        order = np.argsort(self.items, kind="stable")
        return Compressed(_starts(self.items, self.shape[1]), self.users[order], self.values[order])

    @property
    def user_counts(self) -> Integer[np.ndarray, " users"]:
        """Number of ratings of each user."""
        return np.diff(self.by_user.indptr)

    @property
    def item_counts(self) -> Integer[np.ndarray, " items"]:
        """Number of ratings of each item."""
        return np.bincount(self.items, minlength=self.shape[1])

    def subset(self, keep: np.ndarray) -> RatingMatrix:
        """Return the ratings where ``keep``, a boolean of shape ``(ratings,)``, is true; ids and scale stay."""
        return RatingMatrix(
            self.users[keep], self.items[keep], self.values[keep], self.user_ids, self.item_ids, self.scale
        )

    def to_scipy(self) -> scipy.sparse.csr_array:
        """Return the ratings as a SciPy CSR array, users in rows; a rating of 0 stays a stored entry."""
        import scipy.sparse

        indptr, indices, values = self.by_user
        return scipy.sparse.csr_array((values, indices, indptr), shape=self.shape)

    def user_codes(self, ids: Any) -> Integer[np.ndarray, " ids"]:
        """Return the codes of user ids, -1 for an id that is not known; see :meth:`item_codes`."""
        return find_codes(ids, self._user_index)

    def item_codes(self, ids: Any) -> Integer[np.ndarray, " ids"]:
        """Return the codes of item ids (one id or a sequence; compared as text), -1 for an id that is not known."""
        return find_codes(ids, self._item_index)

    def user_code(self, user: Any) -> int:
        """Return the code of one user id; raises :class:`shared_core.errors.UnknownKeyError` if it is not known."""
        try:
            return self._user_index[str(user)]
        except KeyError:
            raise unknown_id("user", user, self.user_ids) from None

    def item_code(self, item: Any) -> int:
        """Return the code of one item id; raises :class:`shared_core.errors.UnknownKeyError` if it is not known."""
        try:
            return self._item_index[str(item)]
        except KeyError:
            raise unknown_id("item", item, self.item_ids) from None

    @cached_property
    def _user_index(self) -> dict[str, int]:
        return {name: code for code, name in enumerate(self.user_ids)}

    @cached_property
    def _item_index(self) -> dict[str, int]:
        return {name: code for code, name in enumerate(self.item_ids)}


def split_ratings(
    ratings: RatingMatrix, *, test_fraction: Number = 0.1, seed: int | np.random.Generator = 0
) -> tuple[RatingMatrix, RatingMatrix]:
    """Split the ratings at random into a training and a test part; both keep all ids.

    Parameters
    ----------
    ratings
        What to split.
    test_fraction
        Share of the ratings that goes to the test part, in (0, 1); rounded to a whole number of ratings.
    seed
        A seed, or the generator to draw from.

    Raises
    ------
    InputError
        If either part would be empty.

    Examples
    --------
    >>> train, test = split_ratings(RatingMatrix.from_triplets(range(10), range(10), range(10)), test_fraction=0.2)
    >>> len(train), len(test), train.shape
    (8, 2, (10, 10))
    """
    n_test = round(len(ratings) * test_fraction)
    if not 0 < n_test < len(ratings):
        raise InputError(f"test_fraction: {test_fraction} of {len(ratings)} ratings leaves a part empty")
    test = np.zeros(len(ratings), dtype=bool)
    test[np.random.default_rng(seed).permutation(len(ratings))[:n_test]] = True
    return ratings.subset(~test), ratings.subset(test)


def hold_out_users(
    ratings: RatingMatrix, *, n_users: int, min_ratings: int = 1, seed: int | np.random.Generator = 0
) -> tuple[RatingMatrix, RatingMatrix]:
    """Move all ratings of some users into a second matrix, to play new users with; both keep all ids.

    Parameters
    ----------
    ratings
        What to split.
    n_users
        How many users to move.
    min_ratings
        Only users with at least this many ratings are drawn from.
    seed
        A seed, or the generator to draw from.

    Raises
    ------
    InputError
        If fewer than ``n_users`` users have that many ratings, or none would be left to train on.
    """
    eligible = np.flatnonzero(ratings.user_counts >= max(min_ratings, 1))
    if not 0 < n_users <= len(eligible):
        raise InputError(f"n_users: {n_users} asked for, {len(eligible)} users have at least {min_ratings} ratings")
    held = np.zeros(ratings.shape[0], dtype=bool)
    held[np.random.default_rng(seed).choice(eligible, size=n_users, replace=False)] = True
    moved = held[ratings.users]
    if moved.all():
        raise InputError(f"n_users: holding out {n_users} users leaves no rating to train on")
    return ratings.subset(~moved), ratings.subset(moved)


def _as_floats(values: Any) -> np.ndarray:
    """Return ``values`` as float32 if they are that already, else as float64."""
    array = np.asarray(values)
    if array.dtype == np.float32:
        return array
    try:
        return array.astype(np.float64)
    except (TypeError, ValueError):
        for place, value in enumerate(array.ravel().tolist()):
            try:
                float(value)
            except (TypeError, ValueError):
                raise InputError(f"ratings[{place}]: {value!r} is not a number") from None
        raise InputError(f"ratings: values of type {array.dtype} are not numbers") from None


def _code_ids(ids: Any, name: str) -> tuple[tuple[str, ...], np.ndarray]:
    array = np.asarray(ids)
    if array.ndim != 1:
        raise InputError(f"{name}: expected a one-dimensional sequence of ids, got shape {array.shape}")
    if array.dtype.kind == "f":
        if not (np.isfinite(array) & (array == np.floor(array))).all():
            place = int((~(np.isfinite(array) & (array == np.floor(array)))).argmax())
            raise InputError(f"{name}[{place}]: id {array[place]} is not a whole number; ids are integers or text")
        array = array.astype(np.int64)
    elif array.dtype.kind not in "iu":
        for place, value in enumerate(array.tolist()):
            # NaN is how data frames mark a missing cell; it is the only value that differs from itself.
            if value is None or value != value:
                raise InputError(f"{name}[{place}]: the id is missing; remove the row or fill it in")
        array = np.asarray([str(value) for value in array.tolist()])
    unique, codes = np.unique(array, return_inverse=True)
    return tuple(map(str, unique.tolist())), codes


def _starts(rows: np.ndarray, n_rows: int) -> np.ndarray:
    indptr = np.zeros(n_rows + 1, dtype=np.int64)
    np.cumsum(np.bincount(rows, minlength=n_rows), out=indptr[1:])
    return indptr


def find_codes(ids: Any, index: dict[str, int]) -> np.ndarray:
    """Return the code of each id (one, or a sequence), -1 where ``index`` does not have it."""
    sequence = [ids] if isinstance(ids, str) or np.ndim(ids) == 0 else np.asarray(ids).tolist()
    return np.fromiter((index.get(str(entry), -1) for entry in sequence), dtype=np.int64, count=len(sequence))


def unknown_id(kind: Literal["user", "item"], asked: Any, known: Sequence[str]) -> UnknownKeyError:
    """Return the error that says that a user or an item is not known."""
    examples = ", ".join(map(repr, known[:3]))
    return UnknownKeyError(
        f"{kind} {str(asked)!r} is not among the {len(known)} {kind}s known (for example {examples})"
    )
