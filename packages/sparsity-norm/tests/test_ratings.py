from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from shared_core.data import RatingData, load
from shared_core.errors import InputError, UnknownKeyError
from sparsity_norm.ratings import RatingMatrix, hold_out_users, split_ratings

TRIPLETS = st.lists(st.tuples(st.integers(0, 6), st.sampled_from("abcd"), st.integers(-3, 3)), min_size=1, max_size=40)


@pytest.fixture(scope="module")
def movielens(data_folder):
    return RatingMatrix.of(load("movielens-100k", expect=RatingData))


def as_dict(matrix):
    return {
        (matrix.user_ids[user], matrix.item_ids[item]): value
        for user, item, value in zip(matrix.users, matrix.items, matrix.values.tolist(), strict=True)
    }


@settings(max_examples=60, deadline=None)
@given(TRIPLETS, st.sampled_from(["mean", "last"]))
def test_holds_what_was_given_whatever_the_repeats(triplets, policy):
    collected = {}
    for user, item, value in triplets:
        collected.setdefault((str(user), item), []).append(value)
    expected = {pair: np.mean(values) if policy == "mean" else values[-1] for pair, values in collected.items()}
    matrix = RatingMatrix.from_triplets(*zip(*triplets, strict=True), duplicates=policy)
    held = as_dict(matrix)
    assert held.keys() == expected.keys()
    assert all(held[pair] == pytest.approx(expected[pair]) for pair in expected)


@settings(max_examples=60, deadline=None)
@given(TRIPLETS)
def test_both_compressed_forms_are_the_same_matrix(triplets):
    matrix = RatingMatrix.from_triplets(*zip(*triplets, strict=True), duplicates="last")
    indptr, indices, values = matrix.by_item
    turned = scipy.sparse.csr_array((values, indices, indptr), shape=matrix.shape[::-1])
    assert (turned.T.toarray() == matrix.to_scipy().toarray()).all()
    assert turned.nnz == matrix.to_scipy().nnz == len(matrix)
    assert (np.diff(matrix.by_user.indptr) == matrix.user_counts).all()
    assert (np.diff(indptr) == matrix.item_counts).all()
    assert all((np.diff(indices[low:high]) > 0).all() for low, high in itertools.pairwise(indptr))


def test_a_stored_zero_is_a_rating():
    stored = scipy.sparse.csr_array((np.array([0.0, 2.0]), [1, 2], [0, 1, 2, 2]), shape=(3, 3))
    matrix = RatingMatrix.of(stored)
    assert as_dict(matrix) == {("0", "1"): 0.0, ("1", "2"): 2.0}
    assert matrix.shape == (3, 3)
    assert matrix.scale == (0.0, 2.0)


def test_every_kind_of_input_gives_the_same_matrix():
    users, items, values = [3, 10, 3], ["b", "a", "a"], [1.0, 2.0, 3.0]
    frame = pd.DataFrame({"rating": values, "item": items, "user": users, "extra": 0})
    data = SimpleNamespace(
        users=np.array([0, 1, 0]),
        items=np.array([1, 0, 0]),
        values=np.array(values),
        user_ids=("3", "10"),
        item_ids=("a", "b"),
        scale=(1.0, 3.0),
    )
    expected = {("3", "b"): 1.0, ("10", "a"): 2.0, ("3", "a"): 3.0}
    for given_ratings in (frame, data, (users, items, values), [np.array(users), items, tuple(values)]):
        matrix = RatingMatrix.of(given_ratings)
        assert as_dict(matrix) == expected
        assert matrix.user_ids == ("3", "10")
    assert RatingMatrix.of(matrix) is matrix


def test_ids_are_looked_up_as_text():
    matrix = RatingMatrix.from_triplets([7.0, 12, 7], ["x", "x", "y"], [1, 2, 3])
    assert matrix.user_codes(["12", 7, 99]).tolist() == [1, 0, -1]
    assert matrix.item_codes("y").tolist() == [1]
    assert matrix.user_code(np.int64(12)) == 1
    with pytest.raises(UnknownKeyError, match=r"item 'z' is not among the 2 items known"):
        matrix.item_code("z")


def test_single_precision_is_kept():
    assert RatingMatrix.from_triplets([0], [0], np.array([1.5], dtype=np.float32)).values.dtype == np.float32
    assert RatingMatrix.from_triplets([0], [0], [3]).values.dtype == np.float64


@pytest.mark.parametrize(
    ("ratings", "options", "message"),
    [
        (([], [], []), {}, "there is none"),
        ((["a"], ["x"], [np.nan]), {}, r"ratings\[0\] \(user 'a', item 'x'\): rating nan is not finite"),
        ((["a"], ["x"], [np.inf]), {}, "not finite"),
        ((["a", "b"], ["x", "x"], [1, 9]), {"scale": (1, 5)}, r"ratings\[1\] .*rating 9 is outside the scale 1..5"),
        ((["a", "a"], ["x", "x"], [1, 2]), {}, "user 'a' rated item 'x' more than once"),
        ((["a", "b"], ["x"], [1, 2]), {}, "equally long"),
        ((["a"], ["x"], [[1]]), {}, "equally long"),
        ((["a"], ["x"], ["good"]), {}, "'good' is not a number"),
        ((["a", None], ["x", "y"], [1, 2]), {}, r"users\[1\]: the id is missing"),
        ((["a"], [1.5], [1]), {}, r"items\[0\]: id 1.5 is not a whole number"),
        (([[1]], ["x"], [1]), {}, "one-dimensional"),
        ((["a"], ["x"], [1]), {"scale": (5, 1)}, "must be finite and ordered"),
        ((["a"], ["x"], [1]), {"duplicates": "first"}, "is none of 'error', 'mean', 'last'"),
        (pd.DataFrame({"user": [1], "film": [2], "rating": [3]}), {}, "no column 'item' among"),
        ("ratings.csv", {}, "got str; give a data frame"),
        (None, {}, "got NoneType"),
    ],
)
def test_ratings_that_cannot_be_used_are_refused(unchecked, ratings, options, message):
    with pytest.raises(InputError, match=message) as error:
        RatingMatrix.of(ratings, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("users", "user_ids", "message"),
    [
        ([0, 2], ("a", "b"), r"users\[1\]: code 2 has no id"),
        ([0, -1], ("a", "b"), "code -1 has no id"),
        ([0.0, 1.0], ("a", "b"), "codes must be integers"),
        ([0, 1], ("a", "a"), "id 'a' stands for more than one code"),
    ],
)
def test_codes_that_do_not_fit_their_ids_are_refused(users, user_ids, message):
    with pytest.raises(InputError, match=message):
        RatingMatrix.from_codes(users, [0, 0], [1.0, 2.0], user_ids=user_ids, item_ids=("x",))


@pytest.fixture
def ratings():
    generator = np.random.default_rng(0)
    place = generator.permutation(30 * 20)[:200]
    return RatingMatrix.from_triplets(place // 20, place % 20, generator.integers(1, 6, 200), scale=(1, 5))


def test_a_split_shares_out_every_rating_once(ratings):
    train, test = split_ratings(ratings, test_fraction=0.25, seed=3)
    assert (len(train), len(test)) == (150, 50)
    assert as_dict(train) | as_dict(test) == as_dict(ratings)
    assert not as_dict(train).keys() & as_dict(test).keys()
    assert train.user_ids == test.user_ids == ratings.user_ids
    assert as_dict(split_ratings(ratings, test_fraction=0.25, seed=3)[1]) == as_dict(test)
    assert as_dict(split_ratings(ratings, test_fraction=0.25, seed=4)[1]) != as_dict(test)


def test_held_out_users_leave_nothing_behind(ratings):
    train, held = hold_out_users(ratings, n_users=5, min_ratings=4, seed=1)
    assert as_dict(train) | as_dict(held) == as_dict(ratings)
    moved = np.flatnonzero(held.user_counts)
    assert len(moved) == 5
    assert (held.user_counts[moved] >= 4).all()
    assert (train.user_counts[moved] == 0).all()


def test_splits_that_leave_nothing_are_refused(ratings):
    with pytest.raises(InputError, match="leaves a part empty"):
        split_ratings(ratings, test_fraction=0.001)
    with pytest.raises(InputError, match="leaves a part empty"):
        split_ratings(ratings, test_fraction=1.0)
    with pytest.raises(InputError, match="1000 asked for"):
        hold_out_users(ratings, n_users=1000)
    with pytest.raises(InputError, match="no rating to train on"):
        hold_out_users(ratings, n_users=int((ratings.user_counts > 0).sum()))


def test_movielens_100k_is_as_published(movielens):
    assert movielens.shape == (943, 1682)
    assert len(movielens) == 100_000
    assert movielens.scale == (1.0, 5.0)
    assert movielens.mean == pytest.approx(3.52986)
    assert (movielens.user_counts.min(), movielens.user_counts.max()) == (20, 737)
    assert (movielens.item_counts.min(), movielens.item_counts.max()) == (1, 583)
