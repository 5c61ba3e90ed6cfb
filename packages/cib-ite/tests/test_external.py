from __future__ import annotations

import copy
import importlib.util
import sys

import numpy as np
import pytest
from sklearn.base import clone

from cib_ite.baselines import external
from cib_ite.baselines.external import BCF, EXTERNAL, CausalForest
from cib_ite.metrics import sqrt_pehe
from shared_core.errors import InputError

PACKAGE = {"bcf": "stochtree", "causal-forest": "econml", "cevae": "pyro"}
EXTRA = {"bcf": "bcf", "causal-forest": "forests", "cevae": "cevae"}
SMALL = {
    "bcf": {"num_gfr": 4, "num_mcmc": 20, "num_trees_prognostic": 30, "num_trees_effect": 20},
    "causal-forest": {"n_estimators": 40, "cv": 2},
    "cevae": {
        "latent_dim": 2,
        "hidden_dim": 40,
        "num_layers": 2,
        "num_epochs": 60,
        "learning_rate": 1e-2,
        "num_samples": 100,
        "outcome_dist": "normal",
    },
}


def needs(name):
    if importlib.util.find_spec(PACKAGE[name]) is None:
        pytest.skip(f"needs {PACKAGE[name]}: pip install 'cib-ite[{EXTRA[name]}]'")


def data(seed=0, n=200, binary=False):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 3))
    t = (rng.random(n) < 1 / (1 + np.exp(-x[:, 0]))).astype(np.int64)
    mean = x[:, 0] + t * (1 + x[:, 1])
    y = (rng.random(n) < 1 / (1 + np.exp(-2 * mean))).astype(float) if binary else mean + 0.3 * rng.normal(size=n)
    return x, t, y


@pytest.fixture(scope="module")
def fitted():
    made = {}

    def of(name, binary=False):
        needs(name)
        if (name, binary) not in made:
            learner = EXTERNAL[name](7).set_params(**SMALL[name])
            made[name, binary] = learner.fit(*data(binary=binary))
        return made[name, binary]

    return of


@pytest.mark.parametrize("name", EXTERNAL)
class TestEveryOne:
    def test_the_message_names_the_extra_where_the_package_is_absent(self, name, monkeypatch):
        for module in [module for module in sys.modules if module.partition(".")[0] == PACKAGE[name]]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, PACKAGE[name], None)
        with pytest.raises(InputError, match=rf"pip install 'cib-ite\[{EXTRA[name]}\]'") as caught:
            EXTERNAL[name](0).fit(*data())
        assert f"{name} needs {PACKAGE[name]}, which is not installed" in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_a_package_that_lacks_one_of_its_own_is_not_called_absent(self, name, monkeypatch):
        def broken(module):
            raise ModuleNotFoundError("No module named 'other'", name="other")

        monkeypatch.setattr(external.importlib, "import_module", broken)
        with pytest.raises(ModuleNotFoundError, match="other"):
            EXTERNAL[name](0).fit(*data())

    def test_bad_input_is_named_before_the_package_is_asked_for(self, name):
        x, t, y = data()
        with pytest.raises(InputError, match="treatment must be 0 or 1"):
            EXTERNAL[name](0).fit(x, t + 1, y)

    def test_parameters_are_kept_and_cloned(self, name):
        learner = EXTERNAL[name](3)
        assert learner.random_state == 3
        assert clone(learner).get_params() == learner.get_params()

    def test_finds_an_effect_that_varies(self, name, fitted):
        x, _, _ = data(1)
        effect = fitted(name).effect(x)
        assert effect.shape == (200,)
        tau = 1 + x[:, 1]
        assert sqrt_pehe(effect, 0 * tau, tau) < 0.7
        assert np.corrcoef(effect, tau)[0, 1] > 0.4

    def test_outcomes_agree_with_effects(self, name, fitted):
        x, _, _ = data(1)
        outcomes = fitted(name).predict_outcomes(x)
        assert outcomes.shape == (200, 2)
        assert outcomes[:, 1] - outcomes[:, 0] == pytest.approx(fitted(name).effect(x))
        assert np.corrcoef(outcomes[:, 0], x[:, 0])[0, 1] > 0.6
        assert fitted(name).effect(x[:1]) == pytest.approx(fitted(name).effect(x)[:1], abs=0.5)

    def test_binary_outcomes_are_probabilities(self, name, fitted):
        learner = fitted(name, binary=True)
        x, _, _ = data(1, binary=True)
        assert learner.outcome_ == "binary"
        outcomes = learner.predict_outcomes(x)
        assert outcomes.min() >= 0
        assert outcomes.max() <= 1
        assert learner.effect(x).shape == (200,)
        assert np.corrcoef(outcomes[:, 0], x[:, 0])[0, 1] > 0.5
        assert np.corrcoef(outcomes[:, 1], x[:, 0] + x[:, 1])[0, 1] > 0.5

    def test_same_seed_same_effects_and_no_global_state(self, name, fitted):
        import torch

        x, t, y = data()
        learner = fitted(name)
        torch.manual_seed(1)
        before, state = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
        again = clone(learner).fit(x, t, y).effect(x)
        assert again == pytest.approx(learner.effect(x), abs=1e-9)
        assert torch.equal(torch.random.get_rng_state(), before)
        assert np.array_equal(np.random.get_state()[1], state)  # noqa: NPY002
        fewer = {"cevae": {"num_epochs": 1}}.get(name, {})
        other = [clone(learner).set_params(random_state=seed, **fewer).fit(x, t, y).effect(x) for seed in (7, 8)]
        assert np.abs(other[0] - other[1]).max() > 1e-4


@pytest.mark.parametrize("name", ["bcf", "causal-forest"])
class TestIntervals:
    def test_wider_at_a_higher_level_and_about_the_effect(self, name, fitted):
        x, _, _ = data(1)
        learner = fitted(name)
        effect, std = learner.effect(x), learner.effect_std(x)
        (low90, high90), (low50, high50) = learner.effect_interval(x, alpha=0.1), learner.effect_interval(x, alpha=0.5)
        assert low90.shape == high90.shape == std.shape == (200,)
        assert (low90 <= low50).all()
        assert (high50 <= high90).all()
        assert ((low90 <= effect) & (effect <= high90)).all()
        assert np.median((high90 - low90) / (2 * 1.645 * std)) == pytest.approx(1, abs=0.25)

    def test_alpha_outside_its_range(self, name, fitted):
        with pytest.raises(InputError, match=r"alpha is 5; it must lie in \(0, 1\)"):
            fitted(name).effect_interval(data()[0], alpha=5.0)


def test_bcf_draws_are_the_packages_own(fitted):
    x, _, _ = data()
    learner = fitted("bcf")
    draws = learner.effect_draws(x)
    assert draws.shape == (200, 20)
    # The effect forest does not see the propensity, so its draws at the rows of fit are the same however it is made.
    assert draws == pytest.approx(learner.model_.tau_hat_train.reshape(200, -1))


def test_bcf_folds_are_checked():
    needs("bcf")
    with pytest.raises(InputError, match="propensity_folds is 1; choose from 2 to"):
        BCF(propensity_folds=1).fit(*data())


def test_causal_forest_trees_come_in_fours():
    needs("causal-forest")
    with pytest.raises(InputError, match="n_estimators is 10; it must be a multiple of 4"):
        CausalForest(n_estimators=10).fit(*data())


def test_cevae_outcomes_are_those_of_pyros_own_method(fitted):
    import torch

    x, _, _ = data(1, 40)
    learner = copy.copy(fitted("cevae")).set_params(num_samples=4000)
    table = torch.as_tensor(x, dtype=torch.float32)
    torch.manual_seed(0)
    # It draws t and y once for all its samples of z: only many calls average over them.
    calls = np.stack([learner.model_.ite(table, num_samples=2).numpy() for _ in range(400)]) * learner._scale
    noise = calls.std(axis=0) / 400**0.5
    assert (np.abs(learner.effect(x) - calls.mean(axis=0)) < 5 * noise).all()
    assert np.corrcoef(learner.effect(x), calls.mean(axis=0))[0, 1] > 0.98


def test_cevae_fits_do_not_share_parameters(fitted):
    x, t, y = data()
    first = fitted("cevae")
    before = first.effect(x)
    clone(first).set_params(random_state=99, num_epochs=2).fit(x, t, -y)
    assert np.array_equal(first.effect(x), before)


def test_cevae_says_nothing(capfd):
    needs("cevae")
    EXTERNAL["cevae"](0).set_params(**SMALL["cevae"]).set_params(num_epochs=1).fit(*data())
    assert capfd.readouterr() == ("", "")


def test_cevae_predicts_in_blocks(fitted, monkeypatch):
    x, _, _ = data(1)
    learner = copy.copy(fitted("cevae")).set_params(num_samples=1001)
    whole = learner.effect(x)
    monkeypatch.setattr(external, "_PREDICT_ELEMENTS", 200 * learner.hidden_dim * 10)
    in_blocks = learner.effect(x)
    assert not np.array_equal(in_blocks, whole)
    assert in_blocks == pytest.approx(whole, abs=0.25)
