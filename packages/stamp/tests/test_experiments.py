"""Comparisons: what methods share, what is kept of an interrupted one, and what its tables and claims say."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from shared_core.errors import InputError, UnknownKeyError
from shared_core.runs import Run
from stamp import experiments
from stamp.counting import macs
from stamp.examples import Examples
from stamp.experiments import (
    DENSE,
    FREE,
    OTHER,
    STAMP,
    Backbone,
    Protocol,
    Target,
    ablate,
    check_methods,
    compare,
    fit_generator,
    latencies,
    load_target,
    make_backbone,
    paired,
    pretrain,
    rapid,
    table_of,
    total_time,
    variants,
)
from stamp.groups import trace
from stamp.meta import MetaConfig
from stamp.networks import smallconv
from stamp.selection import Budget
from stamp.training import accuracy, finetune

PROTOCOL = Protocol(
    width=0.25, size=8, pretrain_steps=15, pretrain_jitter=False, sets=1, set_size=16, draws=3, tuned_draws=2,
    repeats=1,
    meta=MetaConfig(iters=2, tasks=2, ways=(2, 3), jitter=False), lrs=(1e-6, 0.1),
)  # fmt: skip
QUARTER = Budget(macs=0.25)


def blobs(name: str, seed: int, ways: int = 4, each: int = 10) -> Examples:
    """Images with a bright spot whose place is the class."""
    random = np.random.default_rng(seed)
    y = np.repeat(np.arange(ways), each)
    x = random.integers(0, 60, (len(y), 1, 8, 8))
    for k, label in enumerate(y):
        row, column = 4 * (label // 2) + random.integers(0, 3), 4 * (label % 2) + random.integers(0, 3)
        x[k, 0, row : row + 2, column : column + 2] = 230
    return Examples(torch.from_numpy(x.astype(np.uint8)), torch.from_numpy(y), tuple("abcdef"[:ways]), name)


def target(name: str = "blobs", seed: int = 0, ways: int = 4) -> Target:
    return Target(*(blobs(name, 10 * seed + part, ways) for part in range(3)))


def run_in(folder, **more) -> Run:
    return Run(folder, package="stamp", version="0", command="compare", config={}, **more)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return make_backbone(target("reference", 7, ways=3), PROTOCOL, methods=(STAMP, FREE))


def prepared(backbone: Backbone):
    return lambda seed: backbone


def compared(run: Run, backbone: Backbone, methods, *, budgets=(QUARTER,), seeds=(0,), steps=(0, 3), **more):
    return compare(
        run, prepared(backbone), {"blobs": lambda seed: target(seed=seed)}, methods=methods, budgets=budgets,
        seeds=seeds, protocol=more.pop("protocol", PROTOCOL), steps=steps,
        others=lambda seed: (target("other", 3 + seed).train,), **more,
    )  # fmt: skip


ALL = (DENSE, STAMP, OTHER, FREE, "random", "l1", "l1@stamp", "random@stamp", "edge-popup")


@pytest.fixture(scope="module")
def found(backbone, tmp_path_factory):
    return compared(run_in(tmp_path_factory.mktemp("compare")), backbone, ALL, seeds=(0, 1))


@pytest.mark.usefixtures("unchecked")  # for speed: shapes are checked by the others
def test_every_method_keeps_the_budget_and_is_measured_alike(found):
    cells = found.cells["blobs"]
    assert tuple(cells) == ALL
    for method, by_seed in cells.items():
        for cell in by_seed.values():
            assert set(cell["accuracy"]) == {"0", "3"}
            assert all(0 <= value <= 1 for value in cell["accuracy"].values())
            whole = method in (DENSE, "edge-popup")
            assert (cell["ratios"]["macs"] == 1) if whole else (0 < cell["ratios"]["macs"] <= 0.25)
    assert all(kept == width for kept, width in cells[DENSE][0]["widths"].values())


@pytest.mark.parametrize("method", [OTHER, "l1@stamp", "random@stamp"])
def test_methods_at_the_generators_widths_have_them(found, method):
    cells = found.cells["blobs"]
    for seed in (0, 1):
        assert cells[method][seed]["widths"] == cells[STAMP][seed]["widths"]
        assert cells[method][seed]["ratios"] == pytest.approx(cells[STAMP][seed]["ratios"])


def test_the_table_is_the_mean_of_the_cells(found):
    (row,) = [r for r in found.results if (r.method, r.metric) == ("l1", "accuracy after 3 steps")]
    values = [100 * cell["accuracy"]["3"] for cell in found.cells["blobs"]["l1"].values()]
    assert (row.mean, row.n, row.unit, row.better) == (pytest.approx(np.mean(values)), 2, "%", "higher")
    metrics = {r.metric for r in found.results}
    assert metrics == {
        "accuracy after cutting", "accuracy after 3 steps", "multiply-adds", "batch of 64", "mask", "fine-tuning",
        "pretraining, once a backbone", "meta-fitting, once a backbone",
    }  # fmt: skip
    lines = table_of(found, (0, 3), "blobs")
    assert len(lines) == 1 + len(ALL)
    assert len(set(map(len, lines))) == 1
    assert f"{np.mean(values):.1f} %" in lines[1 + ALL.index("l1")]


def test_claims_are_paired_tests(found):
    (claim,) = [c for c in found.claims if "more accurate than l1 after" in c.text]
    cells = found.cells["blobs"]
    ours, theirs = ([100 * cells[m][s]["accuracy"]["3"] for s in (0, 1)] for m in (STAMP, "l1"))
    expected = stats.ttest_rel(ours, theirs).confidence_interval()
    assert claim.value == pytest.approx(np.mean(ours) - np.mean(theirs))
    assert claim.holds == bool(expected.low > 0)
    assert {DENSE, "edge-popup"}.isdisjoint(c.text.split(" than ")[1].split()[0] for c in found.claims)
    (single,) = paired({"blobs": {m: {0: cells[m][0]} for m in (STAMP, "l1")}}, 0)
    assert single.text.endswith("one seed")


def test_what_a_method_does_is_what_its_parts_do_one_by_one(found, backbone):
    """l1 by hand: the same channels, statistics, head and training."""
    from stamp.pruning import prune

    data = target()
    plan = prune(backbone.model, backbone.groups, method="l1", data=data.train, budget=QUARTER)
    small = plan.apply(backbone.model, data=data.train, recalibrate=True)
    cell = found.cells["blobs"]["l1"][0]
    assert cell["accuracy"]["0"] == accuracy(small, data.test)
    finetune(small, data.train, steps=3, lr=PROTOCOL.lr, batch_size=PROTOCOL.batch_size)
    assert cell["accuracy"]["3"] == accuracy(small, data.test)


def test_an_interrupted_comparison_repeats_only_the_piece_it_was_in(backbone, tmp_path, monkeypatch):
    asked: list[str] = []
    original = experiments._measured

    def measured(bench, method, steps, lr):
        asked.append(method)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return original(bench, method, steps, lr)

    monkeypatch.setattr(experiments, "_measured", measured)
    methods = (DENSE, "l1", "bn")
    with pytest.raises(KeyboardInterrupt):
        compared(run_in(tmp_path / "part"), backbone, methods)
    again = compared(run_in(tmp_path / "part", resume=True), backbone, methods)
    assert asked == [DENSE, "l1", "l1", "bn"]
    whole = compared(run_in(tmp_path / "whole"), backbone, methods)
    for method in methods:
        assert again.cells["blobs"][method][0]["accuracy"] == whole.cells["blobs"][method][0]["accuracy"]


@pytest.mark.usefixtures("unchecked")  # for speed: shapes are checked by the others
def test_rates_are_chosen_on_validation_examples_for_every_method(backbone, tmp_path):
    found = compared(run_in(tmp_path), backbone, (DENSE, "l1"), tuned=True, steps=(4,))
    rates = {method: by_seed[0]["lr"] for method, by_seed in found.cells["blobs"].items()}
    data = target()
    for method, rate in rates.items():
        from stamp.pruning import prune

        plan = prune(backbone.model, backbone.groups, method=method, data=data.train, budget=QUARTER)
        small = plan.apply(backbone.model, data=data.train, recalibrate=True)
        right = {}
        for lr in PROTOCOL.lrs:
            tuned = copy.deepcopy(small)
            finetune(tuned, data.train, steps=4, lr=lr)
            right[lr] = accuracy(tuned, data.validation)
        assert right[rate] == max(right.values())


def test_the_dense_network_is_measured_once_for_all_budgets(backbone, tmp_path, monkeypatch):
    asked: list[str] = []
    original = experiments._measured
    monkeypatch.setattr(
        experiments, "_measured", lambda bench, method, *rest: asked.append(method) or original(bench, method, *rest)
    )
    budgets = (Budget(macs=0.5), QUARTER)
    found = compared(run_in(tmp_path), backbone, (DENSE, "l1"), budgets=budgets, steps=(0,))
    assert asked == [DENSE, "l1", "l1"]
    assert list(found.cells) == ["blobs, 50 % of multiply-adds", "blobs, 25 % of multiply-adds"]


def test_methods_are_checked():
    assert check_methods(("l1", "dense", "l1")) == ("l1", "dense")
    for wrong in ("noise", "dense@stamp", "stamp@stamp", "l1@l1"):
        with pytest.raises(UnknownKeyError, match=f"no method '{wrong}'"):
            check_methods((wrong,))
    with pytest.raises(InputError, match="at least one"):
        check_methods(())


def test_latencies_are_of_networks_of_the_widths():
    model = smallconv(3, 1, channels=(4, 6, 8)).eval()
    groups = trace(model, torch.rand(1, 1, 8, 8))
    widths = {"half": {"0": 2, "4": 3, "8": 4}, "same": {"0": 2, "4": 3, "8": 4}, "whole": groups.widths()}
    calls: list[float] = []

    def measure(network, inputs):
        calls.append(float(macs(network, inputs)))
        return calls[-1]

    found = latencies(model, groups, widths, (1, 8, 8), batch_size=2, repeats=1, measure=measure)
    assert found[DENSE] == found["whole"] == macs(model, torch.rand(2, 1, 8, 8))
    assert found["half"] == found["same"] == 2 * (64 * 9 * 2 + 16 * 9 * 2 * 3 + 4 * 9 * 3 * 4 + 4 * 3)
    assert len(set(calls)) == 2


def test_pretraining_with_jitter_is_repeatable_and_leaves_the_global_state_alone():
    data = blobs("reference", 0)
    state = torch.get_rng_state()
    models = [smallconv(4, 1, channels=(4, 4, 4)) for _ in range(3)]
    for model, jitter in zip(models, (True, True, False), strict=True):
        pretrain(model, data, steps=4, jitter=jitter, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    same, other = ([torch.equal(a, b) for a, b in zip(models[0].parameters(), m.parameters(), strict=True)]
                   for m in models[1:])  # fmt: skip
    assert all(same)
    assert not all(other)


def test_gates_that_read_nothing_need_no_encoder(backbone):
    protocol = replace(PROTOCOL, encoder="attention", labels=False)
    reference = target("reference", 7, ways=3).train
    free, _ = fit_generator(backbone.model, backbone.groups, reference, protocol, head="free")
    assert free.settings["head"] == "free"
    first, second = (free.pi(backbone.model, target(seed=seed).train, sets=1) for seed in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_total_time_counts_what_each_way_does(backbone):
    found = total_time(backbone, target(), QUARTER, PROTOCOL, epochs=3)
    assert 0 < found["mask"] < found["stamp"]
    assert 0 < found["dense_seconds"] < found["cut_at"] < found["usual"]
    assert found["cut_at"] - found["dense_seconds"] < found["usual_stopped"] <= found["usual"] + 1e-9
    for way in (STAMP, "dense, then l1"):
        at, right = found["courses"][way]
        assert at == sorted(at)
        assert len(at) == len(right)
    at, right = found["courses"][STAMP]
    assert found["stamp"] == pytest.approx(at[-1], abs=1e-6)
    assert found["reached"][STAMP] == (max(right) >= found["goal"] - 1e-9)
    at, right = found["courses"]["dense, then l1"]
    small = [value for when, value in zip(at, right, strict=True) if when >= found["cut_at"]]
    assert 1 <= len(small) <= 3
    assert right[2] - 0.01 == pytest.approx(found["goal"])
    assert found["usual"] == pytest.approx(at[-1], abs=1e-6)


@pytest.mark.usefixtures("unchecked")  # for speed: shapes are checked by the others
def test_the_rapid_experiment(backbone, tmp_path):
    def small(seed: int, limit: int | None) -> Target:
        data = target(seed=seed)
        return data if limit is None else replace(data, train=data.train.rows(torch.arange(0, 40, 40 // limit)))

    found, ways = rapid(
        run_in(tmp_path), prepared(backbone), small, examples=(8, 20), methods=(STAMP, FREE, "random", "l1"),
        budget=QUARTER, seeds=(0, 1), protocol=PROTOCOL, steps=(2,), epochs=1,
    )  # fmt: skip
    assert list(found.cells) == ["blobs, 8 examples", "blobs, 20 examples"]
    assert set(ways) == {0, 1}
    texts = [claim.text for claim in found.claims]
    assert texts[0].startswith("stamp is at least as good as the better of random and l1")
    assert texts[1].startswith("stamp is more accurate than meta-free after 2 steps")

    def mean(method: str, seed: int) -> float:
        return 100 * float(np.mean([by[method][seed]["accuracy"]["2"] for by in found.cells.values()]))

    best = max(("random", "l1"), key=lambda method: mean(method, 0) + mean(method, 1))
    ahead = np.mean([mean(STAMP, seed) - mean(best, seed) for seed in (0, 1)])
    assert found.claims[0].value == pytest.approx(ahead)
    (ratio,) = [c for c in found.claims if c.text.startswith("stamp takes less than 0.6")]
    assert ratio.value == pytest.approx(np.mean([way["stamp"] / way["usual"] for way in ways.values()]))


def test_variants_differ_in_one_choice():
    found = variants(PROTOCOL)
    assert len(set(found.values())) == len(found) == 11
    for name, protocol in found.items():
        changed = [f for f in ("encoder", "head", "pseudo", "meta") if getattr(protocol, f) != getattr(PROTOCOL, f)]
        assert len(changed) == (0 if name == "as it is" else 2 if "pseudo" in name else 1), name
    with pytest.raises(UnknownKeyError, match="no choice 'colour'"):
        variants(PROTOCOL, ("colour",))


def test_ablations_fit_each_variant_for_the_same_network(backbone, tmp_path):
    kinds = variants(PROTOCOL, ("head",))
    kinds = {name: kinds[name] for name in ("as it is", "head free")}
    results, cells = ablate(
        run_in(tmp_path), prepared(backbone), lambda seed: target(seed=seed),
        lambda seed: target("reference", 7, ways=3), lambda seed: (target("other", 3).train,), variants=kinds,
        budget=QUARTER, seeds=(0,), steps=(0, 2),
    )  # fmt: skip
    assert cells["head free"][0]["overlap"] == 1
    assert 0 <= cells["as it is"][0]["overlap"] <= 1
    rows = {(row.method, row.metric) for row in results}
    assert ("head free", "accuracy after 2 steps") in rows
    assert ("as it is", "overlap with masks for other data") in rows


def test_a_source_is_read_in_three_parts():
    data = load_target("digits", replace(PROTOCOL, test_limit=50), limit=100)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [100, 50, 50]
    assert data.name == "digits"
    assert data.train.shape == (1, 8, 8)


def test_a_comparison_needs_something_to_compare(backbone, tmp_path):
    with pytest.raises(InputError, match="at least one of each"):
        compared(run_in(tmp_path), backbone, ("l1",), seeds=())
