"""Comparisons: what is chosen without the truth, what is measured, what is claimed, and what a resumed run repeats."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import log_loss, roc_auc_score

from cib_ite import experiments, overlap
from cib_ite.baselines.classical import GRIDS, OLS2
from cib_ite.data import EffectTable, Split, confounded, split
from cib_ite.estimator import CIB
from cib_ite.experiments import (
    METHODS,
    NEURAL,
    NEURAL_GRIDS,
    choose_setting,
    compare,
    fit_method,
    make_method,
    measure,
    paired,
    population_shift,
    probe_auc,
    sweep,
)
from cib_ite.inference import draw_posterior
from cib_ite.metrics import Nuisances
from shared_core.errors import InputError, UnknownKeyError
from shared_core.runs import Run

TINY = {"steps": 50, "trunk": (8,), "heads": (8,), "discriminator": (4,), "latent": 2, "device": "cpu"}
# Learns something in as few steps.
BRISK = TINY | {"steps": 150, "lr": 0.02}


@pytest.fixture(scope="module", autouse=True)
def small_forests():
    """Leave large forests to the tests of overlap: they would take most of the time here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlap, "_TREES", 25)
        yield


@pytest.fixture(scope="module")
def table() -> EffectTable:
    return confounded(200, kappa=1.0, seed=0)


def with_garbage(table: EffectTable) -> EffectTable:
    wild = np.random.default_rng(9).normal(0, 1e6, (2, table.n))
    return replace(table, mu0=wild[0], mu1=wild[1], y_counterfactual=np.full(table.n, -1e9))


# ---- methods


def test_unknown_methods_are_refused_with_all_that_are_known():
    with pytest.raises(UnknownKeyError, match="no method 'oracle'") as refused:
        make_method("oracle", 0)
    assert all(name in str(refused.value) for name in METHODS)


def test_methods_take_their_seed_and_settings():
    assert make_method("rf-t", 3, min_samples_leaf=7).get_params()["min_samples_leaf"] == 7
    for name in NEURAL:
        model = make_method(name, 4, steps=60)
        assert (model.random_state, model.steps) == (4, 60)
        assert model._settings().steps == 60
    none = make_method("cib-none", 0)
    assert (none.beta, none.gamma, none.lam, none.deterministic) == (0.0, 0.0, 0.0, False)
    assert (make_method("cib", 0).n_members, make_method("cib-one", 0).n_members) == (5, 1)


def test_every_method_that_is_tuned_has_six_different_settings():
    for name, grid in {**NEURAL_GRIDS, **GRIDS}.items():
        assert name in METHODS
        assert len({repr(sorted(setting.items())) for setting in grid}) == 6, name
        defaults = make_method(name, 0).get_params()
        assert all(defaults.keys() >= setting.keys() for setting in grid)
        # Tuning may leave everything as it is; None is a method's own choice, which is in its grid.
        assert any(all(defaults[key] in (value, None) for key, value in setting.items()) for setting in grid), name


def test_members_trained_by_least_squares_get_the_noise_of_their_own_training_rows(table, monkeypatch):
    """The likeliest scale, given the fit: the root mean square of the residuals of each arm that the member saw."""
    seen = []
    finish = CIB._set_noise
    monkeypatch.setattr(CIB, "_set_noise", lambda self, members: seen.append(members) or finish(self, members))
    model = CIB.from_preset("tarnet", **TINY, n_members=2).fit(table.x, table.treatment, table.y)
    x, y = model.preprocessor_.transform(table.x), (table.y - model.y_mean_) / model.y_scale_
    outcome = draw_posterior(model.stack_, x, binary=False).outcome
    for member, own in enumerate(seen[0]):
        for arm in (0, 1):
            rows = own.train[table.treatment[own.train] == arm]
            residual = y[rows] - outcome[member, arm, rows]
            expected = np.log(np.sqrt(np.mean(residual**2)))
            assert float(model.stack_.noise_log_scale[member, arm]) == pytest.approx(expected, abs=5e-3)
    assert len({round(float(v), 4) for v in model.stack_.noise_log_scale.ravel()}) == 4


# ---- choosing


def loss_by_hand(model, table: EffectTable) -> float:
    """Mean over the arms of an arm's mean squared error, on the outcomes that were seen."""
    outcome = model.predict_outcomes(table.x)
    errors = [np.mean((table.y - outcome[:, arm])[table.treatment == arm] ** 2) for arm in (0, 1)]
    return (errors[0] + errors[1]) / 2


def test_the_setting_with_the_least_factual_loss_on_held_out_rows_is_chosen():
    settings = [{"alpha": alpha} for alpha in (0.0, 1.0, 10.0, 30.0, 100.0, 1e4)]
    tables = [confounded(n, kappa=0.5, seed=n) for n in (60, 90, 400)]
    chosen = choose_setting("ols2", tables, [5, 6, 7], settings)
    for table, seed, found in zip(tables, (5, 6, 7), chosen, strict=True):
        parts = split(table, seed=seed + 77, fractions=(0.7, 0.2, 0.1))
        held = table.rows(np.concatenate([parts.validation, parts.test]))
        train = table.rows(parts.train)
        losses = [loss_by_hand(OLS2(**s).fit(train.x, train.treatment, train.y), held) for s in settings]
        assert found == settings[int(np.argmin(losses))]
    assert len({found["alpha"] for found in chosen}) > 1


def test_the_truth_plays_no_part_in_the_choice(table):
    grid = [{"alpha": alpha} for alpha in (0.0, 3.0, 30.0, 300.0)]
    assert choose_setting("ols2", [table], [0], grid) == choose_setting("ols2", [with_garbage(table)], [0], grid)
    nets = [BRISK | {"beta": beta} for beta in (20.0, 0.01)]
    first, second = choose_setting("cib", [table, with_garbage(table)], [0, 0], nets)
    # At 20 a nat nothing is kept of the covariates, which the outcomes tell without any truth.
    assert first == second == nets[1]


def test_binary_outcomes_are_chosen_by_log_loss(table):
    class Says:
        def predict_outcomes(self, x):
            p = 1 / (1 + np.exp(-x[:, 0]))
            return np.column_stack([p, 1 - p])

    binary = replace(table, y=(table.y > 0).astype(float), outcome="binary")
    p = Says().predict_outcomes(table.x)[np.arange(table.n), table.treatment]
    rows = [table.treatment == arm for arm in (0, 1)]
    expected = np.mean([log_loss(binary.y[arm], p[arm]) for arm in rows])
    assert experiments.factual_loss(Says(), binary) == pytest.approx(expected)


def test_one_setting_or_none_needs_no_fit(table, monkeypatch):
    monkeypatch.setattr(experiments, "_fit_all", None)
    assert choose_setting("ols2", [table] * 2, [0, 1], [{"alpha": 2.0}]) == [{"alpha": 2.0}] * 2
    assert choose_setting("ols2", [table], [0], []) == [{}]


def test_fitting_a_method_uses_what_was_chosen(table, monkeypatch):
    offered = []

    def choose(name, tables, seeds, settings):
        offered.extend(settings)
        return [settings[3] for _ in tables]

    monkeypatch.setattr(experiments, "choose_setting", choose)
    (settled,) = fit_method("cib", [table], [2], changes=TINY | {"n_members": 1})
    assert len(offered) == 6
    assert settled.setting == TINY | {"n_members": 1, "beta": 0.3}
    assert (settled.model.beta, settled.model.steps, settled.model.random_state) == (0.3, 50, 2)
    assert settled.seconds > 0
    # Changes are for networks; a regression has none of these.
    (plain,) = fit_method("ols2", [table], [2], tune=False, changes=TINY)
    assert plain.setting == {}
    np.testing.assert_allclose(
        plain.model.effect(table.x), OLS2().fit(table.x, table.treatment, table.y).effect(table.x)
    )


# ---- measuring


class Guess:
    """An estimator that says what it is given, and how sure it is."""

    def __init__(self, outcome: np.ndarray, std: np.ndarray) -> None:
        self.outcome, self.std = outcome, std

    def effect(self, x):
        return self.outcome[:, 1] - self.outcome[:, 0]

    def predict_outcomes(self, x):
        return self.outcome[np.round(x[:, 0]).astype(int)]

    def effect_std(self, x):
        return self.std


def numbered(n: int, **more) -> EffectTable:
    """Rows that say their number in the first column."""
    random = np.random.default_rng(1)
    x = np.column_stack([np.arange(n), random.normal(size=n)]).astype(float)
    t = (np.arange(n) % 3 == 0).astype(np.int64)
    mu = random.normal(0, 2, (2, n))
    y, other = np.where(t == 1, mu[1], mu[0]), np.where(t == 1, mu[0], mu[1])
    made = EffectTable("numbered", x, t, y, ("number", "x"), "continuous", mu[0], mu[1], other)
    return replace(made, **more)


PARTS = Split(np.arange(0, 40), np.arange(40, 50), np.arange(50, 60))


def test_measures_equal_hand_computations():
    table = numbered(60)
    random = np.random.default_rng(2)
    outcome = np.column_stack([table.mu0, table.mu1]) + random.normal(0, 0.7, (60, 2))
    std = random.uniform(0.1, 1.5, 60)
    found = measure(Guess(outcome, std), table, PARTS)
    effect, true = outcome[:, 1] - outcome[:, 0], table.mu1 - table.mu0
    error = np.abs(effect - true)
    assert found["sqrt PEHE out"] == pytest.approx(np.sqrt(np.mean(error[50:] ** 2)))
    assert found["sqrt PEHE in"] == pytest.approx(np.sqrt(np.mean(error[:50] ** 2)))
    assert found["sqrt PEHE out / sd"] == pytest.approx(found["sqrt PEHE out"] / np.std(true))
    assert found["ATE error out"] == pytest.approx(abs(effect[50:].mean() - true[50:].mean()))
    assert found["spearman"] == pytest.approx(stats.spearmanr(std, error).statistic)
    kept = np.argsort(std)[:48]
    ratio = np.sqrt(np.mean(error[kept] ** 2) / np.mean(error**2))
    assert found["withholding 20 %"] == pytest.approx(ratio)
    for level, z in ((90, 1.645), (95, 1.96)):
        assert found[f"CATE coverage {level} %"] == np.mean((effect - z * std <= true) & (true <= effect + z * std))
    assert found["CATE width 90 %"] == pytest.approx(2 * 1.645 * std.mean())
    grid = np.linspace(-30, 30, 40_001)
    step = grid[1] - grid[0]
    crps = [
        np.sum((stats.norm.cdf(grid, m, s) - (grid >= v)) ** 2) * step
        for m, s, v in zip(effect, std, true, strict=True)
    ]
    assert found["CRPS"] == pytest.approx(np.mean(crps), rel=1e-2)
    assert found["factual loss out"] == pytest.approx(loss_by_hand(Guess(outcome, std), table.rows(PARTS.test)))
    assert found["AUSE / random"] > 0
    perfect = measure(Guess(outcome, error), table, PARTS)
    assert perfect["spearman"] == pytest.approx(1)
    assert perfect["AUSE / random"] == pytest.approx(0, abs=1e-9)
    # Nothing is said of the ranking where all rows are as uncertain.
    assert "spearman" not in measure(Guess(outcome, np.ones(60)), table, PARTS)


def test_a_trial_is_measured_by_the_policys_value():
    random = np.random.default_rng(3)
    trial = random.random(60) < 0.7
    y = random.integers(0, 2, 60).astype(float)
    table = numbered(60, mu0=None, mu1=None, y_counterfactual=None, randomised=trial, y=y, outcome="binary")
    outcome = random.uniform(0.1, 0.9, (60, 2))
    found = measure(Guess(outcome, np.ones(60)), table, PARTS)
    treats = outcome[:, 1] > outcome[:, 0]
    inside = trial & (np.arange(60) >= 50)
    chosen, left = inside & treats & (table.treatment == 1), inside & ~treats & (table.treatment == 0)
    share = treats[inside].mean()
    value = share * (y[chosen].mean() if chosen.any() else 0) + (1 - share) * (y[left].mean() if left.any() else 0)
    assert found["policy risk out"] == pytest.approx(1 - value)
    treated = (table.treatment == 1) & trial
    truth = y[table.treatment == 1].mean() - y[(table.treatment == 0) & trial].mean()
    assert found["ATT error"] == pytest.approx(abs((outcome[:, 1] - outcome[:, 0])[treated].mean() - truth))
    assert not {"sqrt PEHE out", "spearman"} & found.keys()


def test_twins_are_measured_by_the_area_under_the_curve():
    random = np.random.default_rng(4)
    both = random.integers(0, 2, (2, 60)).astype(float)
    t = (np.arange(60) % 2).astype(np.int64)
    table = numbered(60, treatment=t, mu0=both[0], mu1=both[1], y=both[t, np.arange(60)], outcome="binary")
    outcome = random.uniform(0.1, 0.9, (60, 2))
    found = measure(
        Guess(outcome, random.random(60)), table, Split(np.arange(10), np.arange(10, 20), np.arange(20, 60))
    )
    seen = outcome[np.arange(20, 60), t[20:]]
    assert found["AUC factual out"] == pytest.approx(roc_auc_score(table.y[20:], seen))
    assert "sqrt PEHE out" not in found


def test_networks_are_measured_with_their_rate_intervals_and_a_probe(table):
    model = CIB(**TINY, n_members=2).fit(table.x, table.treatment, table.y)
    parts = split(table, seed=0)
    found = measure(model, table, parts)
    assert found["rate"] == pytest.approx(model.calibration_.rate.mean())
    low, high = model.effect_interval(table.x, 0.1, target="ite")
    both = table.potential_outcomes()
    gap, finite = both[:, 1] - both[:, 0], np.isfinite(low) & np.isfinite(high)
    assert found["ITE coverage 90 %"] == np.mean((low <= gap) & (gap <= high))
    assert found["ITE infinite"] == pytest.approx(np.mean(~finite))
    assert found["ITE width 90 %"] == pytest.approx(np.mean((high - low)[finite]))
    assert found["spearman"] == pytest.approx(
        stats.spearmanr(model.uncertainty(table.x), np.abs(model.effect(table.x) - table.effect)).statistic
    )
    assert "probe AUC" not in found


def test_probes_tell_a_leak_and_no_noise():
    random = np.random.default_rng(5)
    z, t = random.normal(size=(400, 2)), random.integers(0, 2, 400)
    assert 0.4 < probe_auc(z, t) < 0.6
    assert probe_auc(np.column_stack([z, t + 0.1 * random.normal(size=400)]), t) > 0.99
    # Which side of a ring: no line does it.
    ring = (np.square(z).sum(1) > 1.4).astype(np.int64)
    assert probe_auc(z, ring) > 0.85


# ---- comparing


def cells_of(**methods: list[float]):
    return {
        method: {d: {"metrics": {"sqrt PEHE out": v}, "setting": {}, "seconds": 0.5} for d, v in enumerate(values)}
        for method, values in methods.items()
    }


def test_claims_equal_a_bootstrap_by_hand():
    ours, theirs = [1.0, 0.9, 1.2, 0.7], [1.5, 1.1, 1.1, 2.0]
    (claim,) = paired("set", cells_of(tarnet=theirs, cib=ours), seed=3)
    gap = np.subtract(ours, theirs)
    random = np.random.default_rng(3)
    means = [gap[random.integers(0, 4, 4)].mean() for _ in range(20_000)]
    low, high = np.quantile(means, [0.025, 0.975])
    assert claim.value == pytest.approx(gap.mean())
    assert claim.holds == (high < 0)
    words = claim.text.split("bootstrap interval ")[1].split(",")[0].split(" to ")
    assert [float(word) for word in words] == pytest.approx([low, high], abs=0.04)
    assert "better on 3 of 4" in claim.text
    assert "cib is better than tarnet's" in claim.text


def test_claims_know_losing_and_metrics_that_are_better_when_higher():
    (lost,) = paired("set", cells_of(cib=[2.0, 2.1, 2.2], ols2=[1.0, 1.1, 1.0]))
    assert not lost.holds
    assert "better on 0 of 3" in lost.text
    areas = {
        method: {d: {"metrics": {"AUC both out": v}, "setting": {}, "seconds": 0.0} for d, v in enumerate(values)}
        for method, values in {"cib": [0.8, 0.9, 0.85], "ols2": [0.6, 0.7, 0.6]}.items()
    }
    (won,) = paired("twins", areas)
    assert won.holds
    assert "better on 3 of 3" in won.text


def test_there_is_no_claim_without_a_bottleneck_or_without_pairs():
    assert paired("set", cells_of(ols2=[1.0, 1.0], tarnet=[2.0, 2.0])) == []
    assert paired("set", cells_of(cib=[1.0], ols2=[2.0])) == []
    (claim,) = paired("set", cells_of(vib=[1.0, 1.0], ols2=[2.0, 2.0]))
    assert "of vib" in claim.text


@pytest.fixture
def new_run(tmp_path):
    def make(resume: bool = False) -> Run:
        return Run(tmp_path / "run", package="cib-ite", version="0", command="compare", config={}, resume=resume)

    return make


def test_a_resumed_comparison_fits_nothing_twice(new_run, monkeypatch):
    tables = {d: confounded(120, kappa=1.0, seed=d) for d in range(3)}
    monkeypatch.setattr(experiments, "_CHUNK", 2)
    fit_all, fits = experiments._fit_all, []

    def counting(estimators, given):
        fits.extend((type(e).__name__, e.random_state) for e in estimators)
        if len(fits) == limit:
            raise KeyboardInterrupt
        fit_all(estimators, given)

    monkeypatch.setattr(experiments, "_fit_all", counting)
    options = {"methods": ("ols2", "cib"), "seed": 10, "tune": False, "changes": TINY | {"n_members": 1}}
    # Draws 0 and 1 of both methods come first, then draw 2 of both: the sixth fit is the last.
    limit = 6
    with pytest.raises(KeyboardInterrupt):
        compare(new_run(), "set", tables, **options)
    assert fits == [("OLS2", 10), ("OLS2", 11), ("CIB", 10), ("CIB", 11), ("OLS2", 12), ("CIB", 12)]
    fits.clear()
    limit = -1
    notes, models = [], []
    results, claims, cells = compare(
        new_run(resume=True),
        "set",
        tables,
        **options,
        advance=lambda note, draws: notes.append((note.split(":")[0], draws)),
        on_model=lambda method, draw, model: models.append((method, draw)),
    )
    assert fits == [("CIB", 12)]
    assert models == [("cib", 2)]
    assert notes == [("ols2", 2), ("cib", 2), ("ols2", 1), ("cib", 1)]
    assert {m: sorted(by) for m, by in cells.items()} == {"ols2": [0, 1, 2], "cib": [0, 1, 2]}

    row = next(r for r in results if (r.method, r.metric) == ("ols2", "sqrt PEHE out"))
    errors = []
    for draw, table in tables.items():
        parts = split(table, seed=10 + draw)
        train = table.rows(np.concatenate([parts.train, parts.validation]))
        model = OLS2().fit(train.x, train.treatment, train.y)
        errors.append(np.sqrt(np.mean((model.effect(table.x) - table.effect)[parts.test] ** 2)))
    assert row.mean == pytest.approx(np.mean(errors))
    assert row.n == 3
    median = next(r for r in results if (r.method, r.metric) == ("ols2", "median sqrt PEHE out"))
    assert median.mean == pytest.approx(np.median(errors))
    assert [claim.value for claim in claims] == [pytest.approx(np.mean(
        [cells["cib"][d]["metrics"]["sqrt PEHE out"] - errors[d] for d in range(3)]
    ))]  # fmt: skip


def test_unknown_methods_stop_a_comparison_before_it_starts(new_run, table, monkeypatch):
    monkeypatch.setattr(experiments, "_fit_all", None)
    with pytest.raises(UnknownKeyError, match="no method 'oracle'"):
        compare(new_run(), "set", {0: table}, methods=("ols2", "oracle"))


# ---- shift and sweep


@pytest.fixture(scope="module")
def shifted() -> EffectTable:
    """Units of which those with ``near`` = 0 lie far from all others in every covariate."""
    table = confounded(300, kappa=0.5, seed=1)
    near = (np.random.default_rng(7).random(300) < 0.6).astype(float)
    x = np.column_stack([table.x[:, :4] + 4 * (1 - near)[:, None], near])
    return replace(table, x=x, feature_names=("a", "b", "c", "d", "near"))


def test_a_group_far_from_all_that_was_seen_is_told_apart(shifted, monkeypatch):
    fit, given = CIB.fit, []

    def recording(self, X, treatment, y):
        given.append(X)
        return fit(self, X, treatment, y)

    monkeypatch.setattr(CIB, "fit", recording)
    found = population_shift(shifted, "near", **BRISK, n_members=2)
    assert found["auroc_rate"] > 0.9
    assert found["auroc"] > 0.6
    assert found["uncertainty_unseen"] > found["uncertainty_seen"]
    assert found["deferred_unseen"] > found["deferred_seen"] + 0.2
    assert found["sqrt_pehe_unseen"] > found["sqrt_pehe_seen"] > 0
    # Only rows of the seen group, without the column that says so, and some of them kept back.
    (X,) = given
    group = shifted.x[:, -1] == 1
    assert X.shape[1] == 4
    assert {row.tobytes() for row in X} < {row.tobytes() for row in np.ascontiguousarray(shifted.x[group, :4])}


def test_shift_needs_a_flag_among_the_covariates(shifted):
    with pytest.raises(InputError, match="no covariate 'far'; there are a, b, c, d, near"):
        population_shift(shifted, "far")
    with pytest.raises(InputError, match="'a' is not a 0/1 covariate"):
        population_shift(shifted, "a")


def test_a_sweep_shows_how_beta_lowers_the_rate_and_sees_no_truth(table, monkeypatch):
    tiny = BRISK | {"steps": 75, "n_members": 1}
    grid = [(0.003, 0.1), (0.1, 0.1), (3.0, 0.1)]
    monkeypatch.setattr(experiments, "probe_auc", lambda z, t, seed: float(z.shape[1]))
    # A moment instead of seconds; that nuisances are right is tested with the metrics.
    monkeypatch.setattr(
        experiments.metrics,
        "cross_fit_nuisances",
        lambda x, t, y, outcome, seed: Nuisances(x[:, 0], np.full(len(x), 0.4), x[:, 0], x[:, 0], {}, {}),
    )
    points = sweep(table, grid, **tiny)
    assert [(point["beta"], point["gamma"]) for point in points] == grid
    rates = [point["rate"] for point in points]
    assert rates[0] > rates[1] > rates[2] >= 0
    assert rates[0] > 3 * rates[2]
    # The probe gets one member's z.
    assert {point["probe AUC"] for point in points} == {2.0}
    assert sweep(with_garbage(table), grid, **tiny) == points
    parts = split(table, seed=0, fractions=(0.7, 0.2, 0.1))
    train, held = table.rows(parts.train), table.rows(np.concatenate([parts.validation, parts.test]))
    alone = CIB(**tiny, beta=0.1, gamma=0.1, interval="none").fit(train.x, train.treatment, train.y)
    assert points[1]["factual loss"] == pytest.approx(loss_by_hand(alone, held), rel=1e-3)
    residual = held.y - alone.preprocessor_.transform(held.x)[:, 0] - (held.treatment - 0.4) * alone.effect(held.x)
    assert points[1]["R loss"] == pytest.approx(np.mean(residual**2), rel=1e-3)
