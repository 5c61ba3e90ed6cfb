from __future__ import annotations

import numpy as np
import pytest

from shared_core.data import RatingData, load
from shared_core.errors import InputError
from sparsity_norm.factorization import BaselineOnly, BiasedMF, GlobalMean, ItemKNN, rating_offsets
from sparsity_norm.ratings import RatingMatrix


@pytest.fixture
def ratings():
    generator = np.random.default_rng(0)
    place = generator.permutation(12 * 9)[:70]
    return RatingMatrix.from_triplets(place // 9, place % 9, generator.integers(1, 6, 70), scale=(1, 5))


@pytest.fixture(scope="module")
def movielens(data_folder):
    """The 90/10 split on which the figures of other implementations were measured."""
    data = load("movielens-100k", expect=RatingData)
    test = np.zeros(len(data), dtype=bool)
    test[np.random.default_rng(0).permutation(len(data))[:10_000]] = True
    ids = {"user_ids": data.user_ids, "item_ids": data.item_ids, "scale": data.scale}
    return tuple(
        RatingMatrix.from_codes(data.users[part], data.items[part], data.values[part], **ids) for part in (~test, test)
    )


def test_offsets_solve_their_normal_equations(ratings):
    mean, users, items = rating_offsets(ratings, reg_user=3, reg_item=2, sweeps=500)
    n_users, n_items = ratings.shape
    design = np.zeros((len(ratings), n_users + n_items))
    design[np.arange(len(ratings)), ratings.users] = 1
    design[np.arange(len(ratings)), n_users + ratings.items] = 1
    penalty = np.diag([3.0] * n_users + [2.0] * n_items)
    expected = np.linalg.solve(design.T @ design + penalty, design.T @ (ratings.values - ratings.values.mean()))
    assert mean == pytest.approx(ratings.values.mean())
    np.testing.assert_allclose(np.concatenate([users, items]), expected, atol=1e-10)


def test_users_and_items_without_ratings_have_no_offset():
    ratings = RatingMatrix.from_codes([0], [0], [4.0], user_ids=("a", "b"), item_ids=("x", "y"), scale=(1, 5))
    _, users, items = rating_offsets(ratings, reg_user=0, reg_item=0)
    assert (users[1], items[1]) == (0, 0)
    fitted = BiasedMF(rank=2).fit(ratings)
    assert fitted.user_factors_[1].tolist() == [0, 0]
    assert fitted.predict(["b", "a"], ["y", "y"]) == pytest.approx([4.0, 4.0])


def factorization_gradient(fitted, ratings, reg):
    error = fitted.score_cells(ratings.users, ratings.items) - ratings.values
    gradient = np.zeros((ratings.shape[1], fitted.rank + 1))
    with_one = np.column_stack([fitted.user_factors_, np.ones(ratings.shape[0])])
    np.add.at(gradient, ratings.items, error[:, None] * with_one[ratings.users])
    own = np.column_stack([fitted.item_factors_, fitted.item_offsets_])
    return gradient + reg * ratings.item_counts[:, None] * own


def factorization_objective(fitted, ratings, reg):
    error = fitted.score_cells(ratings.users, ratings.items) - ratings.values
    users = (fitted.user_factors_**2).sum(1) + fitted.user_offsets_**2
    items = (fitted.item_factors_**2).sum(1) + fitted.item_offsets_**2
    return (error**2).sum() + reg * (ratings.user_counts @ users + ratings.item_counts @ items)


def test_alternating_least_squares_solves_each_side(ratings):
    fitted = BiasedMF(rank=3, reg=0.2, sweeps=4).fit(ratings)
    assert np.abs(factorization_gradient(fitted, ratings, 0.2)).max() < 1e-9


def test_the_objective_of_factorization_only_falls(ratings):
    costs = [
        factorization_objective(BiasedMF(rank=3, reg=0.2, sweeps=sweeps).fit(ratings), ratings, 0.2)
        for sweeps in range(1, 8)
    ]
    assert (np.diff(costs) < 0).all()


def test_factorization_recovers_a_matrix_of_its_own_rank():
    generator = np.random.default_rng(1)
    table = generator.normal(size=(40, 2)) @ generator.normal(size=(2, 30)) + 3
    observed = generator.random(table.shape) < 0.5
    users, items = observed.nonzero()
    scale = (float(table.min()), float(table.max()))
    fitted = BiasedMF(rank=2, reg=1e-4, sweeps=200).fit((users, items, table[observed]))
    hidden_users, hidden_items = (~observed).nonzero()
    fitted.ratings_ = RatingMatrix.from_triplets(users, items, table[observed], scale=scale)
    error = fitted.predict(hidden_users, hidden_items) - table[~observed]
    assert np.sqrt((error**2).mean()) < 0.05


def test_neighbourhoods_are_those_of_the_formula(ratings):
    fitted = ItemKNN(neighbours=3, shrink=5).fit(ratings)
    mean, of_user, of_item = rating_offsets(ratings)
    rated = {
        (int(user), int(item)): value - mean - of_user[user] - of_item[item]
        for user, item, value in zip(ratings.users, ratings.items, ratings.values, strict=True)
    }
    n_users, n_items = ratings.shape

    def similarity(one, other):
        common = [u for u in range(n_users) if (u, one) in rated and (u, other) in rated]
        if one == other or len(common) < 2:
            return 0.0
        a, b = (np.array([rated[u, item] for u in common]) for item in (one, other))
        shrunk = (len(common) - 1) / (len(common) - 1 + 5)
        return max(shrunk * (a @ b) / np.sqrt((a @ a) * (b @ b)), 0.0)

    for user in range(n_users):
        for item in range(n_items):
            near = sorted(
                ((similarity(item, other), deviation) for (u, other), deviation in rated.items() if u == user),
                key=lambda pair: -pair[0],
            )[:3]
            total = sum(weight for weight, _ in near)
            expected = mean + of_user[user] + of_item[item]
            expected += sum(weight * deviation for weight, deviation in near) / total if total > 0 else 0
            assert fitted.score_cells(np.array([user]), np.array([item]))[0] == pytest.approx(expected)


@pytest.mark.parametrize(
    "model", [GlobalMean(), BaselineOnly(), BiasedMF(rank=2), ItemKNN(neighbours=2)], ids=lambda m: type(m).__name__
)
def test_scores_of_cells_and_of_users_are_the_same(model, ratings):
    model.fit(ratings)
    users = np.array([3, 0, 7])
    table = model.score_users(users)
    assert table.shape == (3, ratings.shape[1])
    for row, user in zip(table, users, strict=True):
        items = np.arange(ratings.shape[1])
        np.testing.assert_allclose(row, model.score_cells(np.full_like(items, user), items))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (BiasedMF, {"rank": 0}, "rank, sweeps: .0, 20."),
        (BiasedMF, {"reg": 0}, "reg: 0 must be a positive"),
        (BiasedMF, {"reg": float("inf")}, "reg: inf"),
        (BaselineOnly, {"reg_user": -1}, "reg_user, reg_item"),
        (BaselineOnly, {"cold": "none"}, "cold: 'none' is none of"),
        (BaselineOnly, {"unknown": "skip"}, "unknown: 'skip' is none of"),
        (ItemKNN, {"neighbours": 0}, "neighbours, shrink"),
    ],
)
def test_options_out_of_range_are_refused(unchecked, method, options, message, ratings):
    with pytest.raises(InputError, match=message):
        method(**options).fit(ratings)


# Figures of scikit-surprise 1.1.5 (BaselineOnly, KNNBaseline by items with pearson_baseline) on the same split.
@pytest.mark.parametrize(("model", "rmse"), [(BaselineOnly(), 0.9266), (ItemKNN(), 0.8928)])
def test_errors_on_movielens_are_those_of_surprise(model, rmse, movielens):
    train, test = movielens
    assert model.fit(train).evaluate(test).rmse == pytest.approx(rmse, abs=1e-4)


def test_factorization_is_as_good_as_that_of_surprise(movielens):
    train, test = movielens
    assert BiasedMF(rank=10, reg=0.12, sweeps=10).fit(train).evaluate(test).rmse < 0.913
