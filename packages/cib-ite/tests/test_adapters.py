"""The shapes of EconML and causalml: as recorded here, and beside the packages themselves where they are installed."""

from __future__ import annotations

import inspect
import warnings

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LinearRegression, LogisticRegression

from cib_ite import metrics, overlap
from cib_ite.adapters import CausalMLLearner, EconMLEstimator, NormalEffects, as_causalml, as_econml
from cib_ite.estimator import CIB
from shared_core.errors import InputError

N = 160
SMALL = {"n_members": 2, "steps": 75, "trunk": (16,), "heads": (8,), "latent": 4, "predict_samples": 20}
SMALL |= {"independence": "none", "gamma": 0.0, "lam": 0.0, "samples": 1}
EFFECTS = {**SMALL, "interval": "none", "steps": 25}
ECONML = "needs econml, for comparison with the real one: pip install 'cib-ite[forests]'"
CAUSALML = "needs causalml, for comparison with the real one: pip install causalml"

# What econml 0.17 gives, where Y is (n,) and where it is (n, 1).
ECONML_SHAPES = {
    "effect": (N,),
    "effect swapped": (N,),
    "effect a row": (N,),
    "effect_interval": [(N,), (N,)],
    "const_marginal_effect": (N, 1),
    "ate": (),
    "ate_interval": [(), ()],
    "point_estimate": (N,),
    "stderr": (N,),
    "var": (N,),
    "zstat": (N,),
    "pvalue": (N,),
    "conf_int": [(N,), (N,)],
    "score": (),
    "summary_frame": (N, 6),
}
ECONML_COLUMN_SHAPES = {
    **dict.fromkeys(ECONML_SHAPES, (N, 1)),
    "const_marginal_effect": (N, 1, 1),
    "ate": (1,),
    "score": (),
    "summary_frame": (N, 6),
    "effect_interval": [(N, 1), (N, 1)],
    "conf_int": [(N, 1), (N, 1)],
    "ate_interval": [(1,), (1,)],
}
COLUMNS = ["point_estimate", "stderr", "zstat", "pvalue", "ci_lower", "ci_upper"]
CAUSALML_SHAPES = {
    "predict": (N, 1),
    "fit_predict": (N, 1),
    "return_ci": [(N, 1), (N, 1), (N, 1)],
    "estimate_ate": [(1,), (1,), (1,)],
    "components": (N, 1),
    "component keys": ["drug"],
    "component": [(N,), (N,)],
    "t_groups": ["drug"],
}


@pytest.fixture(scope="module", autouse=True)
def light():
    """Do with little what is not looked at here: the propensity's forest, and the nuisances of the R-loss."""

    def nuisances(x, t, y, **_):
        arms = [LinearRegression().fit(x[t == a], y[t == a]).predict(x) for a in (0, 1)]
        share = np.full(len(y), t.mean())
        return metrics.Nuisances(np.mean(arms, axis=0), share, *arms, chosen={}, loss={})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlap, "_TREES", 40)
        patch.setattr(metrics, "cross_fit_nuisances", nuisances)
        yield


def data(binary: bool = False):
    random = np.random.default_rng(0)
    X = random.normal(size=(N, 3))
    T = random.integers(0, 2, N)
    Y = X[:, 0] + T * (1 + X[:, 1]) + 0.1 * random.normal(size=N)
    return X, T, (Y > 0).astype(float) if binary else Y


def frame(X):
    return pd.DataFrame(X, columns=["age", "dose", "weight"])


@pytest.fixture(scope="module")
def plain():
    """The estimator itself, fitted."""
    X, T, Y = data()
    return CIB(**SMALL).fit(X, T, Y)


@pytest.fixture(scope="module")
def adapted():
    X, T, Y = data()
    return as_econml(CIB(**SMALL)).fit(Y, T, X=X)


@pytest.fixture(scope="module")
def learner(plain):
    return as_causalml(plain)


@pytest.fixture(scope="module")
def column():
    X, T, Y = data()
    return as_econml(CIB(**SMALL)).fit(Y[:, None], T[:, None], X=X)


def shape(value):
    return [np.shape(v) for v in value] if isinstance(value, tuple) else np.shape(value)


def econml_calls(est, Y, T, X):
    """Every call of the interface; made alike on ours and on theirs."""
    found = est.effect_inference(X, T0=0, T1=1)
    return {
        "effect": est.effect(X),
        "effect swapped": est.effect(X=X, T0=1, T1=0),
        "effect a row": est.effect(X, T0=0, T1=T),
        "effect_interval": est.effect_interval(X, T0=0, T1=1, alpha=0.1),
        "const_marginal_effect": est.const_marginal_effect(X),
        "ate": est.ate(X, T0=0, T1=1),
        "ate_interval": est.ate_interval(X, T0=0, T1=1, alpha=0.1),
        "point_estimate": found.point_estimate,
        "stderr": found.stderr,
        "var": found.var,
        "zstat": found.zstat(),
        "pvalue": found.pvalue(),
        "conf_int": found.conf_int(alpha=0.1),
        "score": est.score(Y, T, X),
        "summary_frame": found.summary_frame(alpha=0.1),
    }


def causalml_calls(learner, X, arm, y, ci):
    te, control, treated = learner.predict(X, return_components=True)
    return {
        "predict": learner.predict(X),
        "fit_predict": learner.fit_predict(X, treatment=arm, y=y),
        "return_ci": ci,
        "estimate_ate": learner.estimate_ate(X, treatment=arm, y=y),
        "components": te,
        "component keys": list(control),
        "component": (control["drug"], treated["drug"]),
        "t_groups": list(learner.t_groups),
    }


def arms(T):
    return np.where(T == 1, "drug", "placebo")


def shapes(calls):
    return {name: value if isinstance(value, list) else shape(value) for name, value in calls.items()}


# ---- EconML's interface


def test_econml_shapes(adapted, column):
    X, T, Y = data()
    assert shapes(econml_calls(adapted, Y, T, X)) == ECONML_SHAPES
    assert shapes(econml_calls(column, Y[:, None], T[:, None], X)) == ECONML_COLUMN_SHAPES
    assert adapted.effect_inference(X).summary_frame().columns.tolist() == COLUMNS


def test_econml_calls_say_what_the_estimator_says(adapted, column, plain):
    X, T, Y = data()
    assert np.array_equal(adapted.effect(X), plain.effect(X))
    assert np.array_equal(column.effect(X)[:, 0], plain.effect(X))
    assert np.allclose(adapted.effect_interval(X), plain.effect_interval(X, 0.05))
    assert np.array_equal(adapted.effect_inference(X).stderr, plain.effect_std(X))
    assert adapted.ate(X) == plain.ate(X)
    assert adapted.ate_interval(X) == plain.ate_interval(X, 0.05)
    assert adapted.score(Y, T, X) == column.score(Y[:, None], T, X) == -plain.score(X, T, Y)
    # What tells lower from higher is better.
    assert adapted.score(Y, T, X) < adapted.score(Y - 4 * T * X[:, 1], T, X)


def test_swapped_arms_negate(adapted):
    X, _, _ = data()
    assert np.array_equal(adapted.effect(X, T0=1, T1=0), -adapted.effect(X))
    assert adapted.ate(X, T0=1, T1=0) == -adapted.ate(X)
    low, high = adapted.effect_interval(X)
    back = adapted.effect_interval(X, T0=1, T1=0)
    assert np.array_equal(back[0], -high)
    assert np.array_equal(back[1], -low)
    low, high = adapted.ate_interval(X)
    assert adapted.ate_interval(X, T0=1, T1=0) == (-high, -low)
    assert np.array_equal(adapted.effect_inference(X, T0=1, T1=0).stderr, adapted.effect_inference(X).stderr)


@pytest.mark.parametrize("value", [0, 1, 1.0, np.int64(1), [1], [[0]]])
def test_equal_arms_have_no_effect(adapted, value):
    X, _, _ = data()
    effect = adapted.effect(X, T0=value, T1=value)
    assert np.array_equal(effect, np.zeros(N))
    assert not np.signbit(effect).any()
    assert np.array_equal(adapted.effect_interval(X, T0=value, T1=value), np.zeros((2, N)))
    assert adapted.ate_interval(X, T0=value, T1=value) == (0, 0)
    assert adapted.effect_inference(X, T0=value, T1=value).summary_frame().zstat.isna().all()


def test_arms_row_by_row(adapted):
    X, T, _ = data()
    effect = adapted.effect(X)
    assert np.array_equal(adapted.effect(X, T0=0, T1=T), T * effect)
    assert np.array_equal(adapted.effect(X, T0=T[:, None], T1=1 - T), np.where(T == 1, -effect, effect))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"T1": 2}, "T1: 2 is not a value of the treatment; it has 0, 1"),
        ({"T0": "placebo"}, "T0: 'placebo' is not a value of the treatment; it has 0, 1"),
        ({"T0": 0.5}, "T0: 0.5 is not a value"),
        ({"T1": [0, 1, 1]}, f"T1: give one value of the treatment, or one for each of {N} rows; got .* shape .3,."),
    ],
)
def test_other_arms_are_refused(adapted, arguments, message):
    X, _, _ = data()
    for call in (adapted.effect, adapted.effect_interval, adapted.effect_inference, adapted.ate):
        with pytest.raises(InputError, match=message):
            call(X, **arguments)


def test_the_interval_of_an_average_is_of_one_step(adapted):
    X, T, _ = data()
    with pytest.raises(InputError, match="T1: give one value of the treatment; got an array"):
        adapted.ate_interval(X, T1=T)


def test_arms_with_names():
    X, T, Y = data()
    made = as_econml(CIB(**{**EFFECTS, "steps": 75}, control_name="placebo")).fit(Y, arms(T), X=X)
    effect = made.effect(X, T0="placebo", T1="drug")
    assert np.array_equal(made.effect(X, T0="drug", T1="placebo"), -effect)
    assert np.array_equal(made.effect(X), effect)
    assert effect.mean() > 0
    with pytest.raises(InputError, match="T1: 'pill' is not a value of the treatment; it has 'placebo', 'drug'"):
        made.effect(X, T0="placebo", T1="pill")


def test_zero_and_one_are_values_before_they_are_names():
    X, T, Y = data()
    made = as_econml(CIB(**EFFECTS, control_name=1)).fit(Y, 1 - T, X=X)
    assert np.array_equal(made.effect(X, T0=0, T1=1), -made.effect(X, T0=1, T1=0))
    assert np.array_equal(made.effect(X, T0=1, T1=0), made.const_marginal_effect(X)[:, 0])
    other = as_econml(CIB(**EFFECTS, control_name=1)).fit(Y, 1 + T, X=X)
    assert np.array_equal(other.effect(X, T0=1, T1=2), other.const_marginal_effect(X)[:, 0])
    with pytest.raises(InputError, match="T0: 0 is not a value of the treatment; it has 1, 2"):
        other.effect(X)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda est, Y, T, X: est.fit(Y, T, X=X, W=X), "W: controls belong into X here"),
        (lambda est, Y, T, X: est.score(Y, T, X, W=X), "W: controls belong into X here"),
        (lambda est, Y, T, X: est.fit(Y, T), "X: is missing"),
        (lambda est, Y, T, X: est.fit(Y, T, X=X, inference="bootstrap"), "inference: must be None or 'auto'"),
        (lambda est, Y, T, X: est.fit(T, Y, X=X), r"looks continuous and Y binary: .* expected fit\(Y, T, X=X\)"),
        (lambda est, Y, T, X: est.fit(np.c_[Y, Y], T, X=X), "y: must be one column"),
        (lambda est, Y, T, X: est.effect_interval(X, alpha=1.5), "alpha"),
        (lambda est, Y, T, X: est.ate_interval(X, alpha=0.0), "alpha"),
    ],
)
def test_wrong_econml_calls_are_named_in_one_line(adapted, call, message):
    X, T, Y = data()
    before = adapted.effect(X)
    with pytest.raises(InputError, match=message) as caught:
        call(adapted, Y, T, X)
    assert "\n" not in str(caught.value)
    # A refused fit leaves the fitted one.
    assert np.array_equal(adapted.effect(X), before)


def test_unknown_keywords_are_not_swallowed(adapted):
    X, T, Y = data()
    with pytest.raises(TypeError, match="cache_values"):
        adapted.fit(Y, T, X=X, cache_values=True)


def test_sample_weights_reach_the_estimator():
    X, T, Y = data()
    weight = np.where(X[:, 0] > 0, 2.0, 0.5)
    ours = as_econml(CIB(**EFFECTS)).fit(Y, T, X=X, sample_weight=weight, inference="auto")
    assert np.array_equal(ours.effect(X), CIB(**EFFECTS).fit(X, T, Y, sample_weight=weight).effect(X))
    assert not np.array_equal(ours.effect(X), CIB(**EFFECTS).fit(X, T, Y).effect(X))


def test_summary_frame_is_the_normal_arithmetic():
    random = np.random.default_rng(1)
    point, stderr = random.normal(size=9), random.uniform(0.5, 1, 9)
    found = NormalEffects(point, stderr)
    table = found.summary_frame(alpha=0.2, value=0.3, decimals=8)
    assert table.columns.tolist() == COLUMNS
    assert table.index.name == "X"
    low, high = norm.interval(0.8, point, stderr)
    z = (point - 0.3) / stderr
    by_hand = [point, stderr, z, 2 * (1 - norm.cdf(np.abs(z))), low, high]
    assert np.allclose(table.to_numpy().T, by_hand, atol=1e-8)
    assert np.allclose(found.conf_int(0.2), (low, high))
    assert np.array_equal(table.round(3), found.summary_frame(alpha=0.2, value=0.3))
    assert np.allclose(NormalEffects(point[:, None], stderr[:, None]).summary_frame(0.2, 0.3, 8), table)


def test_differences_of_probabilities_stay_within_one():
    X, T, Y = data(binary=True)
    made = as_econml(CIB(**SMALL)).fit(Y, T, X=X)
    assert np.allclose(made.effect_interval(X, alpha=1e-9), made.model_.effect_interval(X, 1e-9))
    assert made.effect_interval(X, alpha=1e-9)[1].max() == 1
    assert made.effect_interval(X, T0=1, T1=0, alpha=1e-9)[0].min() == -1


def test_effects_only_where_no_interval_was_fitted():
    X, T, Y = data()
    ours = as_econml(CIB(**EFFECTS)).fit(Y, T, X=X)
    assert ours.effect(X).shape == (N,)
    with pytest.raises(InputError, match="interval='none'"):
        ours.effect_interval(X)


# ---- causalml's interface


def test_causalml_shapes():
    X, T, y = data()
    learner = as_causalml(CIB(**{**SMALL, "steps": 25}), control_name="placebo").fit(X, arms(T), y)
    found = causalml_calls(learner, X, arms(T), y, learner.predict(X, return_ci=True))
    assert shapes(found) == CAUSALML_SHAPES
    assert all(isinstance(value, np.ndarray) for value in found["return_ci"] + found["estimate_ate"])


def test_causalml_calls_say_what_the_estimator_says(learner, plain):
    X, T, y = data()
    te, low, high = learner.predict(X, T, y, return_ci=True)
    assert np.array_equal(te[:, 0], plain.effect(X))
    assert np.array_equal(learner.predict(X), te)
    assert np.allclose((low[:, 0], high[:, 0]), plain.effect_interval(X, 0.05))
    te, control, treated = learner.predict(X, return_components=True)
    assert np.array_equal(np.c_[control[1], treated[1]], plain.predict_outcomes(X))
    assert te[:, 0] == pytest.approx(plain.effect(X), abs=1e-6)
    ate = learner.estimate_ate(X[:50], T[:50], y[:50], pretrain=True)
    assert [value.item() for value in ate] == [plain.ate(X[:50]), *plain.ate_interval(X[:50], 0.05)]


def test_estimate_ate_fits_anew_unless_told_otherwise(learner):
    X, T, y = data()
    other = clone(learner)
    fitted = other.estimate_ate(X, T, -y)
    assert np.array_equal(other.estimate_ate(X, T, -y, pretrain=True), fitted)
    assert fitted[0] < 0 < learner.predict(X).mean()
    assert fitted[1] < fitted[0] < fitted[2]


def test_ate_alpha_is_the_level_of_every_interval(plain):
    X, T, y = data()
    learner = as_causalml(plain, ate_alpha=0.3)
    _, low, high = learner.predict(X, return_ci=True)
    assert np.allclose((low[:, 0], high[:, 0]), plain.effect_interval(X, 0.3))
    _, low, high = learner.estimate_ate(X, T, y, pretrain=True)
    assert (low[0], high[0]) == plain.ate_interval(X, 0.3)
    with pytest.raises(InputError, match="alpha: must be in"):
        as_causalml(plain, ate_alpha=5.0)


def test_fit_predict_is_fit_and_predict(learner):
    X, T, y = data()
    again = clone(learner)
    assert np.array_equal(again.fit_predict(X, T, y, np.full(N, 0.3), True), learner.predict(X, return_ci=True))
    again = as_causalml(CIB(**EFFECTS))
    parts = again.fit_predict(X, T, y, return_components=True, verbose=False)
    assert np.array_equal(parts[2][1], again.predict(X, return_components=True)[2][1])
    with pytest.raises(InputError, match="one of them at a time"):
        again.fit_predict(X, T, y, return_ci=True, return_components=True)


def test_names_of_arms_are_those_of_the_learner_or_of_the_estimator():
    X, T, y = data()
    one = as_causalml(CIB(**EFFECTS), control_name="placebo").fit_predict(X, arms(T), pd.Series(y))
    two = as_causalml(CIB(**EFFECTS, control_name="placebo")).fit_predict(X, pd.Series(arms(T)), y)
    assert np.array_equal(one, two)
    assert np.array_equal(one[:, 0], CIB(**EFFECTS).fit(X, T, y).effect(X))
    with pytest.raises(InputError, match="control_name"):
        as_causalml(CIB(**SMALL)).fit(X, arms(T), y)
    with pytest.raises(InputError, match=r"looks continuous and y binary: .* expected fit\(X, treatment, y\)"):
        as_causalml(CIB(**SMALL)).fit(X, y, T)


# ---- both


@pytest.mark.parametrize("adapt", [as_econml, as_causalml])
class TestBoth:
    def fit(self, adapter, X, T, Y):
        return adapter.fit(Y, T, X=X) if isinstance(adapter, EconMLEstimator) else adapter.fit(X, T, Y)

    def effect(self, adapter, X):
        return adapter.effect(X) if isinstance(adapter, EconMLEstimator) else adapter.predict(X)[:, 0]

    def test_the_estimator_is_left_alone(self, adapt):
        X, T, Y = data()
        est = CIB(**EFFECTS)
        parameters, attributes = est.get_params(), set(vars(est))
        adapter = self.fit(adapt(est), X, T, Y)
        assert est.get_params() == parameters
        assert set(vars(est)) == attributes
        est.set_params(beta=7.0)
        assert adapter.estimator.beta == parameters["beta"]

    def test_a_fitted_estimator_needs_no_fit_and_may_be_fitted_again(self, adapt):
        X, T, Y = data()
        est = CIB(**EFFECTS).fit(X, T, Y)
        adapter, before = adapt(est), est.effect(X)
        assert np.array_equal(self.effect(adapter, X), before)
        self.fit(adapter, X, T, 5 * Y)
        assert np.array_equal(est.effect(X), before)
        other = adapt(est)
        est.fit(X, T, 3 * Y)
        assert np.array_equal(self.effect(other, X), before)

    def test_data_frames_are_read_by_name(self, adapt):
        X, T, Y = data()
        adapter = self.fit(adapt(CIB(**EFFECTS)), frame(X), pd.Series(T), pd.Series(Y))
        effect = self.effect(adapter, frame(X))
        assert np.array_equal(effect, CIB(**EFFECTS).fit(X, T, Y).effect(X))
        assert np.array_equal(self.effect(adapter, frame(X)[["weight", "age", "dose"]]), effect)
        with pytest.raises(InputError, match="column 'dose' is missing"):
            self.effect(adapter, frame(X)[["weight", "age"]])

    def test_before_fit_there_is_nothing(self, adapt):
        adapter = adapt(CIB(**SMALL))
        with pytest.raises(NotFittedError, match="call fit first"):
            self.effect(adapter, data()[0])

    def test_scikit_learns_clone_and_parameters(self, adapt, plain):
        adapter = adapt(plain)
        copied = clone(adapter).set_params(estimator__beta=0.5)
        assert copied.estimator.beta == 0.5
        assert adapter.estimator.beta == 0.1
        assert not hasattr(copied, "model_")

    def test_something_else_is_refused(self, adapt, unchecked):
        with pytest.raises(InputError, match=f"{adapt.__name__}: wraps a cib_ite.CIB, got LinearRegression"):
            adapt(LinearRegression())


def test_a_fitted_estimator_keeps_its_control():
    X, T, y = data()
    est = CIB(**EFFECTS, control_name="placebo").fit(X, arms(T), y)
    assert as_causalml(est, control_name="placebo").t_groups.tolist() == ["drug"]
    with pytest.raises(
        InputError, match="control_name: the estimator was fitted with 'placebo' as control, not 'drug'"
    ):
        as_causalml(est, control_name="drug")


# ---- beside the packages themselves


def same_names(ours, theirs, methods, other_defaults=()):
    """Each parameter of ours is one of theirs, passed the same way, with the same default."""
    for name in methods:
        mine, real = (inspect.signature(getattr(cls, name)).parameters for cls in (ours, theirs))
        for parameter in mine.values():
            assert parameter.name in real, (name, parameter.name)
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
                assert list(mine).index(parameter.name) == list(real).index(parameter.name), (name, parameter.name)
            else:
                assert real[parameter.name].kind in (parameter.kind, parameter.POSITIONAL_OR_KEYWORD)
            if parameter.default is not parameter.empty and (name, parameter.name) not in other_defaults:
                assert parameter.default == real[parameter.name].default, (name, parameter.name)


def kinds(value):
    """Type of a result, numbers (and texts) of Python and numpy counting as one kind."""
    if isinstance(value, tuple | list):
        return type(value), [kinds(v) for v in value]
    return next((kind for kind in (float, str) if isinstance(value, kind)), type(value))


@pytest.fixture(params=["LinearDML", "CausalForestDML"])
def dml(request):
    module = pytest.importorskip("econml.dml", reason=ECONML)
    options = {"n_estimators": 8, "cv": 2} if request.param == "CausalForestDML" else {"cv": 2}
    nuisances = {"model_y": LinearRegression(), "model_t": LogisticRegression()}
    return getattr(module, request.param)(discrete_treatment=True, random_state=0, **nuisances, **options)


def test_econml_itself_gives_the_same_types_shapes_and_columns(dml, adapted, column):
    X, T, Y = data()
    for ours, wanted, outcome in (
        (adapted, ECONML_SHAPES, Y),
        (column, ECONML_COLUMN_SHAPES, Y[:, None]),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = econml_calls(dml.fit(outcome, T, X=X), outcome, T, X)
        mine = econml_calls(ours, outcome, T, X)
        assert shapes(theirs) == wanted
        assert {name: kinds(value) for name, value in mine.items()} == {k: kinds(v) for k, v in theirs.items()}
        left, right = mine["summary_frame"], theirs["summary_frame"]
        assert left.columns.tolist() == right.columns.tolist() == COLUMNS
        assert left.index.equals(right.index)
        assert left.index.name == right.index.name
        assert left.dtypes.tolist() == right.dtypes.tolist()
        assert np.corrcoef(np.ravel(mine["effect"]), np.ravel(theirs["effect"]))[0, 1] > 0.5


def test_econml_itself_has_the_same_parameters(dml):
    methods = ["fit", "effect", "effect_interval", "effect_inference", "const_marginal_effect"]
    methods += ["ate", "ate_interval", "score"]
    same_names(EconMLEstimator, type(dml), methods, other_defaults=[("fit", "inference")])
    from econml.inference import NormalInferenceResults

    same_names(NormalEffects, NormalInferenceResults, ["conf_int", "zstat", "pvalue", "summary_frame"])


def test_econml_itself_computes_the_same_table_from_the_same_numbers():
    module = pytest.importorskip("econml.inference", reason=ECONML)
    random = np.random.default_rng(1)
    point, stderr = random.normal(size=9), random.uniform(0.5, 1, 9)
    theirs = module.NormalInferenceResults(1, 1, point, stderr, None, "effect", fname_transformer=None)
    for options in ({}, {"alpha": 0.3, "value": 0.2, "decimals": 5}):
        ours = NormalEffects(point, stderr).summary_frame(**options)
        pd.testing.assert_frame_equal(ours, theirs.summary_frame(**options))


@pytest.mark.filterwarnings("ignore")
def test_econmls_scorer_takes_the_adapter(adapted):
    module = pytest.importorskip("econml.score", reason=ECONML)
    X, T, Y = data()
    scorer = module.RScorer(
        model_y=LinearRegression(), model_t=LogisticRegression(), discrete_treatment=True, cv=2, random_state=0
    )
    scorer.fit(Y, T, X=X)
    good = scorer.score(adapted)
    wrong = as_econml(adapted.model_).fit(-Y, T, X=X)
    assert good > 0 > scorer.score(wrong)
    best, best_score = scorer.best_model([wrong, adapted])
    assert best is adapted
    assert best_score == good


@pytest.mark.filterwarnings("ignore")
def test_econmls_tester_takes_the_adapter(adapted):
    module = pytest.importorskip("econml.validate", reason=ECONML)
    X, T, Y = data()
    tester = module.DRTester(
        model_regression=LinearRegression(), model_propensity=LogisticRegression(), cate=adapted, cv=2
    )
    # The same rows twice: quantiles of the effect on others may leave none above, and NaN.
    tester.fit_nuisance(X, T, Y, X, T, Y)
    found = tester.evaluate_all(X, X)
    assert found.blp.params[0] > 0.5
    assert found.blp.pvals[0] < 0.05
    assert found.qini.params[0] > 0
    assert found.toc.params[0] > 0
    assert np.isfinite(found.summary()[["blp_est", "cal_r_squared"]].to_numpy(dtype=float)).all()


@pytest.fixture(scope="module")
def t_learner():
    module = pytest.importorskip("causalml.inference.meta", reason=CAUSALML)
    return module.BaseTRegressor(LinearRegression(), control_name="placebo")


def test_causalml_itself_gives_the_same_types_and_shapes(t_learner):
    X, T, y = data()
    learner = as_causalml(CIB(**SMALL), control_name="placebo").fit(X, arms(T), y)
    mine = causalml_calls(learner, X, arms(T), y, learner.predict(X, return_ci=True))
    t_learner.fit(X, treatment=arms(T), y=y, store_bootstraps=True, n_bootstraps=3, bootstrap_size=100, random_state=0)
    theirs = causalml_calls(t_learner, X, arms(T), y, t_learner.predict(X, return_ci=True))
    assert shapes(theirs) == CAUSALML_SHAPES == shapes(mine)
    assert {k: kinds(v) for k, v in mine.items()} == {k: kinds(v) for k, v in theirs.items()}
    assert np.corrcoef(mine["predict"][:, 0], theirs["predict"][:, 0])[0, 1] > 0.5


def test_causalml_itself_has_the_same_parameters(t_learner):
    same_names(CausalMLLearner, type(t_learner), ["fit", "predict", "fit_predict", "estimate_ate"])
    real = inspect.signature(type(t_learner).__init__).parameters["ate_alpha"]
    assert inspect.signature(as_causalml).parameters["ate_alpha"].default == real.default


def test_causalmls_gains_from_our_predictions(learner):
    module = pytest.importorskip("causalml.metrics", reason=CAUSALML)
    X, T, y = data()
    table = pd.DataFrame({"y": y, "w": T, "ours": learner.predict(X)[:, 0], "against": -learner.predict(X)[:, 0]})
    area = module.auuc_score(table, outcome_col="y", treatment_col="w")
    assert area["ours"] > area["against"]
    gain = module.get_cumgain(table, outcome_col="y", treatment_col="w")
    assert {"ours", "against"} <= set(gain.columns)
    assert gain["ours"].iloc[N // 4] > gain["against"].iloc[N // 4]
