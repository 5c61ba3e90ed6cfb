from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer, KNNImputer, SimpleImputer
from sklearn.linear_model import BayesianRidge, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

from shared_core.errors import InputError, UnknownKeyError
from sparsity_norm.impute import (
    METHODS,
    BatchNormInput,
    CompleteImputer,
    InputTransformer,
    PartialLinear,
    PromissingInput,
    PromissingLinear,
    SoftImpute,
    make_input,
    make_transformer,
)
from sparsity_norm.nn import SparsityNorm

FIXED = [name for name in METHODS if name != "sn-learn"]


def table(seed, rows=60, features=5, rate=0.6):
    rng = np.random.default_rng(seed)
    x = 2 + rng.normal(size=(rows, 2)) @ rng.normal(size=(2, features)) + 0.1 * rng.normal(size=(rows, features))
    x[rng.random(x.shape) > rate] = np.nan
    return x


# ---- every method by its definition, in NumPy


def by_definition(name, train, test):
    mask, seen = ~np.isnan(test), ~np.isnan(train)
    zero, n0 = np.where(mask, test, 0), test.shape[1]
    count = mask.sum(1, keepdims=True)
    K = seen.sum(1)[seen.any(1)].mean()
    scale = K / np.maximum(count, 1)
    mean, median = np.nanmean(train, axis=0), np.nanmedian(train, axis=0)
    base = {
        "sn": zero * scale,
        "sqrt": zero * np.sqrt(scale),
        "sn-center": np.where(mask, test - mean, 0) * scale,
        "zero": zero,
        "mean": np.where(mask, test, mean),
        "median": np.where(mask, test, median),
        "partial": zero * n0 / np.maximum(count, 1),
        "promissing": np.hstack([zero, count / n0]),
    }
    train_zero = np.where(seen, train, 0)
    norms = np.linalg.norm(train_zero, axis=1)
    base["l2norm"] = zero / np.maximum(np.linalg.norm(zero, axis=1, keepdims=True), 1e-12) * norms[norms > 0].mean()
    base["batchnorm"] = (zero - train_zero.mean(0)) / np.sqrt(train_zero.var(0) + 1e-5)
    base["layernorm"] = (zero - zero.mean(1, keepdims=True)) / np.sqrt(zero.var(1, keepdims=True) + 1e-5)
    method, _, appended = name.partition("+")
    return np.hstack([base[method], mask]) if appended else base[method]


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.layer and name != "sn-learn"])
def test_layer_and_transformer_are_the_definition(name):
    train, test = table(0), table(1, rows=20)
    test[3] = np.nan
    expected = by_definition(name, train, test)
    transformer = make_transformer(name).fit(train)
    np.testing.assert_allclose(transformer.transform(test), expected, rtol=1e-10, atol=1e-12)
    assert len(transformer.get_feature_names_out()) == expected.shape[1]
    layer = make_input(name).fit(torch.from_numpy(train)).double().eval()
    np.testing.assert_allclose(layer(torch.from_numpy(test)).numpy(), expected, rtol=1e-10, atol=1e-12)
    assert layer.out_features(train.shape[1]) == expected.shape[1]
    masked = layer(torch.from_numpy(np.nan_to_num(test, nan=7.0)), torch.from_numpy(~np.isnan(test)))
    np.testing.assert_allclose(masked.numpy(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.layer])
def test_layer_state_round_trip(name):
    x = torch.from_numpy(table(0)).float()
    fitted, empty = make_input(name).fit(x).eval(), make_input(name).eval()
    empty.load_state_dict(fitted.state_dict())
    assert torch.equal(empty(x), fitted(x))


@pytest.mark.parametrize("name", FIXED)
def test_every_method_feeds_a_linear_model_and_survives_what_training_never_showed(name):
    train, y = table(0), np.arange(60.0)
    train[:, 4] = np.nan
    test = table(1, rows=10)
    test[0] = np.nan
    model = make_pipeline(clone(make_transformer(name)), Ridge()).fit(train, y)
    assert np.isfinite(model.predict(test)).all()
    transformed = model[0].transform(test)
    alone = np.vstack([model[0].transform(row[None]) for row in test])
    # scikit-learn's IterativeImputer treats a batch of nothing but empty rows as a case of its own.
    rows = slice(1, None) if name == "iterative" else slice(None)
    np.testing.assert_allclose(alone[rows], transformed[rows], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["mean", "median", "knn", "iterative", "softimpute"])
def test_a_column_never_observed_gets_the_global_statistic(name):
    train = table(0)
    train[:, 4] = np.nan
    statistic = np.nanmedian if name == "median" else np.nanmean
    filled = make_transformer(name).fit_transform(train)
    np.testing.assert_allclose(filled[:, 4], statistic(train))
    observed = ~np.isnan(train)
    np.testing.assert_allclose(filled[observed], train[observed])


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("mean", SimpleImputer()),
        ("median", SimpleImputer(strategy="median")),
        ("knn", KNNImputer(n_neighbors=5)),
        ("iterative", IterativeImputer(BayesianRidge(), max_iter=10, random_state=0)),
    ],
)
@pytest.mark.filterwarnings("ignore:.*Early stopping criterion not reached")
def test_imputers_are_those_of_scikit_learn_where_every_column_was_seen(name, reference):
    train, test = table(0), table(1, rows=10)
    expected = reference.fit(train).transform(test)
    np.testing.assert_allclose(make_transformer(name).fit(train).transform(test), expected, rtol=1e-9)


class TestSoftImpute:
    def final(self, x, **options):
        """The completed table, and the low-rank part of it that the last lambda allows."""
        model = SoftImpute(tol=1e-9, max_iter=2000, **options)
        completed = model.fit_transform(x)
        return model, completed, completed @ model.shrinkage_

    def test_optimality_conditions_of_the_nuclear_norm_problem(self):
        """At the minimum of 1/2 |P_O(X - Z)|^2 + lambda |Z|_*: the residual has spectral norm lambda, and meets Z."""
        x = table(0)
        ratio = 20.0
        _, _, low_rank = self.final(x, ratio=ratio)
        observed = ~np.isnan(x)
        shrink_by = np.linalg.norm(np.where(observed, x, 0), 2) / ratio
        residual = np.where(observed, x - low_rank, 0)
        assert np.linalg.norm(residual, 2) == pytest.approx(shrink_by, rel=1e-4)
        nuclear = np.linalg.norm(low_rank, "nuc")
        assert (residual * low_rank).sum() == pytest.approx(shrink_by * nuclear, rel=1e-4)

    def test_recovers_a_low_rank_table(self):
        rng = np.random.default_rng(0)
        truth = rng.normal(size=(80, 2)) @ rng.normal(size=(2, 10))
        holes = np.where(rng.random(truth.shape) < 0.3, np.nan, truth)
        completed = SoftImpute(ratio=500, max_iter=500).fit_transform(holes)
        missing = np.isnan(holes)
        error = np.sqrt(np.mean((completed - truth)[missing] ** 2))
        assert error < 0.1 * truth[missing].std()

    def test_new_rows_are_completed_as_training_rows_are(self):
        x = table(0)
        model, completed, _ = self.final(x)
        np.testing.assert_allclose(model.transform(x[7:9]), completed[7:9], rtol=1e-6)
        # The fixed point, solved directly: z_M = (I - S_MM)^-1 S_MO x_O.
        row = int(np.flatnonzero(np.isnan(x).sum(1) == 2)[0])
        missing = np.isnan(x[row])
        S = model.shrinkage_
        solved = np.linalg.solve(
            np.eye(2) - S[np.ix_(missing, missing)], S[np.ix_(missing, ~missing)] @ x[row][~missing]
        )
        np.testing.assert_allclose(completed[row][missing], solved, rtol=1e-6)

    def test_a_table_of_zeros_and_a_wide_one(self):
        assert np.array_equal(SoftImpute().fit_transform([[0.0, np.nan], [0.0, 0.0]]), np.zeros((2, 2)))
        wide = table(0, rows=4, features=30)
        assert np.isfinite(SoftImpute().fit_transform(wide)).all()


class TestFirstLayers:
    def test_batchnorm_is_torchs_own_in_training(self):
        x = torch.from_numpy(table(0)).float()
        layer = BatchNormInput().fit(x)
        own = nn.BatchNorm1d(5, affine=False)
        own.running_mean.copy_(layer.running_mean)
        own.running_var.copy_(layer.running_var)
        torch.testing.assert_close(layer(x[:16]), own(x[:16].nan_to_num()))
        torch.testing.assert_close(layer.eval()(x), own.eval()(x.nan_to_num()))
        assert not layer.static

    def test_promissing_input_and_a_linear_layer_without_bias_are_the_promissing_layer(self):
        x = torch.from_numpy(table(0))
        layer = PromissingLinear(5, 3).double()
        joined = torch.cat([layer.weight, layer.bias[:, None]], dim=1)
        torch.testing.assert_close(nn.functional.linear(PromissingInput()(x), joined), layer(x))
        assert not METHODS["promissing"].first_bias

    def test_partial_linear_is_normalization_with_all_features_as_k(self):
        x = torch.from_numpy(table(0))
        layer = PartialLinear(5, 3).double()
        torch.testing.assert_close(layer(x), nn.functional.linear(SparsityNorm(K=5.0)(x), layer.weight, layer.bias))

    def test_options_override_the_method(self):
        assert make_input("sn", power=0.3).power == 0.3
        assert make_transformer("knn", n_neighbors=2).imputer.n_neighbors == 2
        assert make_transformer("sn", tau=2.0).fit(table(0)).layer_.tau == 2


@parametrize_with_checks(
    [InputTransformer("sn-center"), InputTransformer("mean+mask"), SoftImpute(), CompleteImputer(KNNImputer())]
)
def test_scikit_learn_checks(unchecked, estimator, check):
    check(estimator)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_input("nope"), "no method 'nope'; there are sn, "),
        (lambda: make_input("knn"), r"use make_transformer\('knn'\)"),
        (lambda: make_transformer("sn-learn").fit(table(0)), "'sn-learn' learns together with a network"),
        (lambda: make_transformer("mean").fit(np.full((3, 2), np.nan)), "no entry is observed"),
        (lambda: make_transformer("sn").fit(np.full((3, 2), np.nan)), "no entry is observed in any of the 3"),
        (lambda: make_transformer("knn").fit(np.full((3, 2), np.nan)), "no entry of the table is observed"),
        (lambda: make_transformer("l2norm").fit(np.full((3, 2), np.nan)), "every training instance is zero"),
        (lambda: SoftImpute(ratio=0.5).fit(table(0)), "ratio is 0.5"),
    ],
)
def test_bad_input(unchecked, call, message):
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, KeyError) == isinstance(caught.value, UnknownKeyError)
