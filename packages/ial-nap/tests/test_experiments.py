from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from ial_nap import experiments
from ial_nap.data import load_data
from ial_nap.experiments import (
    EXPERIMENTS,
    Protocol,
    compare_methods,
    correction,
    demo_run,
    drawn,
    harmless,
    leak,
    loop,
    run_experiment,
    tax,
)
from ial_nap.simulation import Setting
from shared_core.errors import InputError, UnknownKeyError

QUICK = Protocol(
    setting=Setting(rounds=2, k=3, f=3, epochs=1, hidden=4, latent=2, samples=2, steps=2),
    trials=1,
    masks=(1, 5),
    most=60,
)


class Store:
    """Keeps what is computed, as JSON, and says how often."""

    def __init__(self):
        self.cells, self.computed = {}, 0

    def each(self, work, told=None):
        for key, compute in work.items():
            if key not in self.cells:
                self.computed += 1
                self.cells[key] = json.loads(json.dumps(compute(), allow_nan=False))
            if told is not None:
                told(key, self.cells[key])
        return {key: self.cells[key] for key in work}

    def spread_parts(self, parts, told=lambda _: None):
        pass


@pytest.fixture(scope="module")
def cells():
    data = load_data("cells")
    return replace(data, x=data.x[:160], y=data.y[:160], lengths=data.lengths[:160], ids=data.ids[:160])


def test_splits_are_drawn_by_seed_and_the_toy_anew(cells):
    one, other = (drawn(cells, seed, QUICK) for seed in (0, 1))
    assert one.train.ids != other.train.ids
    assert torch.equal(one.train.x, drawn(cells, 0, QUICK).train.x)
    assert len(one.test) == 40
    assert len(drawn(cells, 0, replace(QUICK, most=7)).test) == 7
    assert drawn(cells, 0, QUICK, planted=False).planted == ()
    toy = load_data("shift")
    assert not torch.equal(drawn(toy, 0, QUICK).train.x, drawn(toy, 1, QUICK).train.x)
    clean = drawn(toy, 0, QUICK, planted=False).train
    moved = clean.x[clean.targets == 1][:, :, 8].mean() - clean.x[clean.targets == 0][:, :, 8].mean()
    assert abs(float(moved)) < 0.3


@pytest.mark.parametrize("name", sorted(set(EXPERIMENTS) - {"leak", "loop", "harmless"}))
def test_experiments_measure_every_seed_once_and_go_on_where_they_stopped(name, cells):
    store, notes = Store(), []
    found = run_experiment(name, cells, (0, 1), QUICK, store=store, advance=lambda note, _: notes.append(note))
    assert all(set(by) == {0, 1} for by in found.cells.values())
    assert {row.n for row in found.results} == {2}
    assert all(np.isfinite(row.mean) for row in found.results)
    assert found.claims
    assert all(claim.holds == (claim.holds is True) for claim in found.claims)
    assert len(notes) == 2
    before = store.computed
    assert run_experiment(name, cells, (0, 1), QUICK, store=store) == found
    assert store.computed == before


def test_the_loop_gives_rounds_by_method_and_seed(cells):
    store = Store()
    methods = ("retain", "random-nap", "aila", "drop", "ial-nap", "ial-nap-finetuned")
    found = compare_methods(cells, methods, (0,), QUICK, store=store)
    assert tuple(found.cells) == methods
    for method in methods:
        cell = found.cells[method][0]
        assert [row[0] for row in cell["rounds"]] == [0, 1, 2]
        assert [row[1] for row in cell["rounds"]] == [0, 27, 54]
    # What needs no gradient begins with the same model.
    assert found.cells["random-nap"][0]["rounds"][0][2] == found.cells["ial-nap"][0]["rounds"][0][2]
    assert {row.metric for row in found.results} >= {"AUROC", "AUROC before", "time a round", "verdicts"}
    assert len(found.claims) == 5
    assert store.computed == len(methods)


def rounds(*scores, seconds=1.0):
    return {"rounds": [[k, 10 * k, score, seconds] for k, score in enumerate(scores)], "setting": {}}


def test_claims_of_the_loop_are_those_of_the_numbers(cells):
    found = {
        "ial-nap": {0: rounds(0.7, 0.8, 0.9, seconds=0.01), 1: rounds(0.7, 0.8, 0.9, seconds=0.01)},
        "drop": {0: rounds(0.7, 0.9, 0.92), 1: rounds(0.7, 0.9, 0.94)},
        "random-nap": {0: rounds(0.7, 0.85, 0.9), 1: rounds(0.7, 0.7, 0.9)},
        "aila": {0: rounds(0.7, 0.8, 0.95), 1: rounds(0.7, 0.8, 0.95)},
        "ial-nap-finetuned": {0: rounds(0.7, 0.8, 0.9), 1: rounds(0.7, 0.8, 0.9)},
    }
    claims = {claim.text: claim for claim in experiments._loop_claims(cells, found)}
    values = [claim.value for claim in claims.values()]
    assert values == pytest.approx([1.0, 0.03, 0.0, -0.05, 0.01])
    assert [claim.holds for claim in claims.values()] == [True, True, True, False, True]
    # Of accuracies, all is in percent.
    shares = {claim.text: claim for claim in experiments._loop_claims(replace(cells, kind="multiclass"), found)}
    ceiling = shares["ial-nap ends within 3 points of leaving features out and training anew"]
    assert (ceiling.value, ceiling.threshold) == pytest.approx((3.0, 3.0))
    assert [claim.holds for claim in shares.values()] == [claim.holds for claim in claims.values()]
    rows = experiments._loop_rows(replace(cells, kind="multiclass"), found)
    assert [(row.metric, row.unit, row.mean) for row in rows if row.method == "ial-nap"][:3] == [
        ("accuracy", "%", pytest.approx(90)),
        ("accuracy before", "%", pytest.approx(70)),
        ("accuracy, mean of rounds", "%", pytest.approx(85)),
    ]
    # Of errors, less is more.
    found = {"ial-nap": {0: rounds(3.0, 2.0)}, "aila": {0: rounds(3.0, 2.5)}}
    claims = experiments._loop_claims(replace(cells, kind="regression"), found)
    assert [claim.value for claim in claims] == [1.0, 0.5]


def test_the_chance_of_a_rank_is_that_of_random_orders():
    random = np.random.default_rng(0)
    ranks = [1 / (1 + min(random.permutation(7)[:2])) for _ in range(20000)]
    assert experiments._chance(7, 2) == pytest.approx(np.mean(ranks), abs=0.01)
    assert experiments._chance(5, 5) == 1
    assert experiments._chance(3, 1) == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)


def test_an_annotator_who_excludes_nothing_says_1_only(cells):
    found = harmless(cells, (0,), QUICK)
    assert list(found.cells) == ["ial-nap"]
    moved = [abs(row[2] - found.cells["ial-nap"][0]["rounds"][0][2]) for row in found.cells["ial-nap"][0]["rounds"]]
    assert found.claims[0].value == max(moved)


def test_a_leak_is_planted_in_a_regression_only(cells):
    data = load_data("diabetes")
    assert (data.x.shape, data.kind, data.y.max()) == ((442, 1, 10), "regression", 346)
    found = leak(data, (0,), replace(QUICK, columns=1, shift=5.0))
    assert set(found.cells) == {"clean", "ridge", "leak, none", "leak, 20 masks"}
    # The error of ridge regression is that of scikit-learn on raw values.
    from sklearn.linear_model import Ridge
    from sklearn.preprocessing import StandardScaler

    split = data.split(0, validation=0.4)
    place = {name: k for k, name in enumerate(data.ids)}
    train, test = ([place[name] for name in part.ids] for part in (split.train, split.test))
    test = test[: QUICK.most]
    x = data.x[:, 0].astype(np.float64)
    scaler = StandardScaler().fit(x[train])
    y = (data.y[train] - data.y[train].mean()) / data.y[train].std()
    raw = Ridge(1.0).fit(scaler.transform(x[train]), y).predict(scaler.transform(x[test]))
    p = raw * data.y[train].std() + data.y[train].mean()
    assert found.cells["ridge"][0] == pytest.approx((np.abs(p - data.y[test]) / data.y[test]).mean(), rel=1e-4)
    with pytest.raises(InputError, match="cells: a leak is planted in a regression"):
        leak(cells, (0,), QUICK)


def test_the_tax_is_of_what_is_not_planted(cells):
    found = tax(cells, (0, 1), QUICK)
    gap = np.mean([found.cells["retain"][seed] - found.cells["ial-nap"][seed] for seed in (0, 1)])
    assert found.claims[0].value == pytest.approx(gap)


def test_correction_knows_what_matters_in_the_toy_only(cells):
    assert "causal" not in correction(cells, (0,), QUICK).cells
    assert {"causal", "irrelevant", "release 5 finetuned"} <= set(correction("shift", (0,), QUICK).cells)


def test_a_demo_shows_the_instance_that_is_misled_before_and_after(cells):
    demo = demo_run(cells, methods=("retain", "ial-nap"), protocol=QUICK)
    assert demo.split.planted == ("site 1", "site 2")
    assert len(demo.queue) == demo.masks == 3
    assert demo.before.cells.shape == demo.after.cells.shape == (1, 3, 12, 1)
    assert {row.method for row in demo.found.results} == {"retain", "ial-nap"}
    assert not torch.equal(demo.before.cells, demo.after.cells)
    said = {name for item in demo.queue for name in item.features} & set(demo.split.planted)
    for name in said:
        assert demo.after.cells[0, :, demo.split.test.features.index(name)].abs().max() == 0


def test_an_unknown_experiment_says_which_there_are():
    with pytest.raises(UnknownKeyError, match="no experiment 'loops'; did you mean 'loop'"):
        run_experiment("loops", "cells", (0,))


def test_a_regression_runs_in_rounds():
    found = loop("diabetes", ("ial-nap",), (0,), replace(QUICK, columns=1))
    assert found.results[0].metric == "RMSE"
    assert found.results[0].better == "lower"
