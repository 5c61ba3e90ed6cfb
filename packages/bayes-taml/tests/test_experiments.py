"""Comparisons: the same episodes and as many trials for everybody, nothing repeated after an interruption."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from bayes_taml import experiments
from bayes_taml.data import AnyShotSource, ClassImages
from bayes_taml.experiments import (
    PIXELS,
    Protocol,
    Splits,
    answers_of,
    compare,
    instances_for,
    load_splits,
    make_learner,
    paired,
    pooled_answers,
    pooled_bins,
    pooling_study,
    settings_of,
    shots_study,
    shuffled_counts,
    size_edges,
    source_of,
    sources_of,
)
from bayes_taml.learner import Evaluation
from bayes_taml.methods import METHODS
from bayes_taml.metrics import accuracy_by_size, calibration_error, reliability
from shared_core.episodes import TooFewItemsError
from shared_core.errors import InputError, UnknownKeyError
from shared_core.runs import Run

PROTOCOL = Protocol(
    ways=3, shots=(1, 5), queries=2, test_queries=3, size=16, filters=4, blocks=2, inner_steps=2, test_steps=2,
    samples=2, steps=3, meta_batch=2, episodes=6,
)  # fmt: skip


def some(classes: int, seed: int, each: int = 12, name: str | None = None) -> ClassImages:
    random = np.random.default_rng(seed)
    shapes = random.random((classes, 1, 1, 16, 16)) > 0.6
    images = np.clip(shapes * 0.8 + 0.2 * random.random((classes, each, 1, 16, 16)), 0, 1)
    names = tuple(f"{seed}-{k}" for k in range(classes))
    pixels = (255 * images).astype(np.uint8).reshape(-1, 1, 16, 16)
    return ClassImages(name or f"set {seed}", pixels, np.repeat(np.arange(classes), each), names)


@pytest.fixture(scope="module")
def splits() -> Splits:
    return Splits(some(8, 1), some(5, 2), some(5, 3), {"other": some(4, 4, name="other")})


def run(folder, **options) -> Run:
    return Run(folder, package="bayes-taml", version="0", command="compare", config={}, **options)


IN, OUT = "set 3 (mixed 1-5 shots)", "other (out of distribution)"


def test_all_methods_are_tested_on_the_same_episodes_of_every_test_set(splits, tmp_path, monkeypatch):
    seen: dict[str, list[torch.Tensor]] = {}
    original = experiments.MetaLearner.evaluate

    def spy(self, source, **options):
        seen.setdefault(self.method_name, []).append(source.batch(0, 2).query)
        return original(self, source, **options)

    monkeypatch.setattr(experiments.MetaLearner, "evaluate", spy)
    results, claims, cells = compare(
        run(tmp_path), splits, methods=(PIXELS, "metasgd", "bayesian-taml"), seeds=(0, 1), protocol=PROTOCOL
    )
    assert len(seen["metasgd"]) == 4
    assert all(torch.equal(a, b) for a, b in zip(seen["metasgd"], seen["bayesian-taml"], strict=True))
    assert not torch.equal(seen["metasgd"][0], seen["metasgd"][2])
    assert {r.dataset for r in results} == {IN, OUT}
    assert {r.method for r in results if r.metric == "accuracy"} == {PIXELS, "metasgd", "bayesian-taml"}
    assert {r.metric for r in results if r.method == PIXELS} == {
        "accuracy", "accuracy at 1-3 shots", "accuracy at 4-5 shots"
    }  # fmt: skip
    metrics = {r.metric: r for r in results if r.method == "metasgd" and r.dataset == IN}
    assert set(metrics) == {
        "accuracy", "negative log-likelihood", "calibration error", "accuracy at 1-3 shots", "accuracy at 4-5 shots",
        "meta-step",
    }  # fmt: skip
    mine = [cell["tests"][IN] for cell in cells["metasgd"].values()]
    assert all(len(a["accuracy"]) == len(a["nll"]) == 6 for a in mine)
    assert metrics["accuracy"].mean == pytest.approx(100 * np.mean([a["accuracy"] for a in mine]))
    assert metrics["negative log-likelihood"].mean == pytest.approx(np.mean([a["nll"] for a in mine]))
    assert metrics["accuracy"].n == 2
    assert len(claims) == 4
    assert [IN in c.text for c in claims] == [True, False, True, False]


def test_methods_that_differ_at_test_time_alone_share_a_training(splits, tmp_path, monkeypatch):
    trained: list[str] = []
    original = experiments.train

    def count(learner, *values, **options):
        trained.append(learner.method_name)
        return original(learner, *values, **options)

    monkeypatch.setattr(experiments, "train", count)
    both = ("naive-taml", "bayesian-taml")
    results, _, cells = compare(run(tmp_path / "a"), splits, methods=both, seeds=(0,), protocol=PROTOCOL)
    assert trained == ["bayesian-taml"]
    assert [r.method for r in results if r.metric == "accuracy" and r.dataset == IN] == list(both)
    naive, mine = (cells[name][0]["tests"][IN] for name in both)
    assert naive["nll"] != mine["nll"]
    _, _, alone = compare(run(tmp_path / "b"), splits, methods=("naive-taml",), seeds=(0,), protocol=PROTOCOL)
    assert alone["naive-taml"][0]["tests"] == cells["naive-taml"][0]["tests"]


def test_paired_differences_are_over_episodes_of_each_test_set():
    def cell(one, two):
        return {"tests": {"a": {"accuracy": one}, "b": {"accuracy": two}}}

    cells = {
        "bayesian-taml": {0: cell([0.9, 0.8], [0.5, 0.5]), 1: cell([0.7, 0.6], [0.4, 0.2])},
        "maml": {0: cell([0.8, 0.8], [0.4, 0.4]), 1: cell([0.6, 0.4], [0.3, 0.1])},
    }
    first, second = paired(cells)
    assert first.value == pytest.approx(10.0)
    assert not first.holds
    assert "4 episodes of a: +10.00 points" in first.text
    assert second.value == pytest.approx(10.0)
    assert second.holds
    assert paired({"maml": cells["maml"]}) == []


def test_a_resumed_comparison_trains_nothing_twice(splits, tmp_path, monkeypatch):
    arguments = {"methods": ("maml",), "seeds": (0, 1), "protocol": PROTOCOL}
    trained: list[int] = []
    original = experiments.train

    def count(*values, **options):
        if len(trained) == 1:
            raise KeyboardInterrupt
        trained.append(options["seed"])
        return original(*values, **options)

    monkeypatch.setattr(experiments, "train", count)
    with pytest.raises(KeyboardInterrupt):
        compare(run(tmp_path), splits, **arguments)
    monkeypatch.setattr(experiments, "train", original)
    seen: list[int] = []
    found = compare(
        run(tmp_path, resume=True), splits, on_learner=lambda name, seed, *_: seen.append(seed), **arguments
    )
    assert seen == [1]
    assert found[2]["maml"].keys() == {0, 1}


def test_every_method_is_tuned_with_as_many_trials():
    for trials in (1, 3, 5):
        protocol = replace(PROTOCOL, trials=trials)
        for name in METHODS:
            found = settings_of(name, protocol)
            assert len({tuple(s.items()) for s in found}) == trials, name
            assert found[0] == {"inner_lr": PROTOCOL.inner_lr, "outer_lr": PROTOCOL.outer_lr}
    assert len({s["inner_lr"] for s in settings_of("protonet", replace(PROTOCOL, trials=5))}) == 1


def test_tuning_looks_at_validation_classes_only(splits, monkeypatch):
    asked: list[ClassImages] = []
    original = experiments.source_of
    monkeypatch.setattr(
        experiments, "source_of", lambda images, *a, **o: asked.append(images) or original(images, *a, **o)
    )
    chosen = experiments.tune("metasgd", splits, PROTOCOL, seed=0)
    assert set(map(id, asked)) == {id(splits.train), id(splits.validation)}
    assert chosen in settings_of("metasgd", PROTOCOL)


def test_settings_are_chosen_once_and_used_under_every_seed(splits, tmp_path, monkeypatch):
    chosen: list[tuple[str, int]] = []

    def tune(name, splits, protocol, *, seed, device):
        chosen.append((name, seed))
        return {"outer_lr": 0.002}

    monkeypatch.setattr(experiments, "tune", tune)
    _, _, cells = compare(run(tmp_path), splits, methods=(PIXELS, "maml"), seeds=(3, 4), protocol=PROTOCOL, tuned=True)
    assert chosen == [("maml", 3)]
    assert [cell["setting"] for cell in cells["maml"].values()] == [{"outer_lr": 0.002}] * 2


def test_a_protocol_reaches_the_learner():
    protocol = replace(PROTOCOL, net_norm="film", norm="support", pooling=("mean", "n"))
    learner = make_learner("bayesian-taml", protocol, 1, setting={"inner_lr": 0.3, "outer_lr": 1.0})
    assert (learner.inner_lr, learner.plan.steps, learner.test_steps, learner.samples) == (0.3, 2, 2, 2)
    assert (learner.max_shot, learner.pooling, learner.plan.statistics) == (5, ("mean", "n"), "support")
    assert learner.model.gains == ("conv1.norm.weight", "conv2.norm.weight")
    with pytest.raises(UnknownKeyError, match="no method 'noise'"):
        make_learner("noise", PROTOCOL, 1)


def test_training_keeps_what_is_best_on_validation_classes(splits):
    protocol = replace(PROTOCOL, validate_every=1, inner_lr=0.5)
    learner = make_learner("metasgd", protocol, 1)
    judged: list[float] = []
    options = {"validation": splits.validation, "on_validation": lambda _, accuracy: judged.append(accuracy)}
    experiments.train(learner, splits.train, protocol, seed=0, **options)
    assert len(judged) == 3
    judge = source_of(splits.validation, protocol, seed=experiments._VALIDATION_SEED, test=True)
    assert learner.evaluate(judge, tasks=6, samples=0).mean == pytest.approx(max(judged))


def test_names_seeds_and_tasks_are_checked_before_anything_is_trained(splits, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "train", None)
    with pytest.raises(UnknownKeyError, match="no method 'noise'; there are pixels, bayesian-taml"):
        compare(run(tmp_path), splits, methods=("noise",), seeds=(0,), protocol=PROTOCOL)
    with pytest.raises(InputError, match="need at least one"):
        compare(run(tmp_path), splits, methods=("maml",), seeds=(), protocol=PROTOCOL)
    with pytest.raises(InputError, match="other: has 4 classes, and tasks of 5 need 5"):
        compare(run(tmp_path), splits, methods=("maml",), seeds=(0,), protocol=replace(PROTOCOL, ways=5))
    with pytest.raises(InputError, match="shots: the fewest must be 1 or more"):
        Protocol(shots=(3, 2))


def test_tests_are_in_each_mode_and_on_each_other_domain(splits):
    found = sources_of(splits, PROTOCOL, seed=4, modes=("step", "task"))
    assert list(found) == ["set 3 (step 1-5 shots)", "set 3 (task 1-5 shots)", OUT]
    assert [source.mode for source in found.values()] == ["step", "task", "step"]
    assert {source.seed for source in found.values()} == {5}
    assert {source.queries for source in found.values()} == {3}


@pytest.mark.parametrize(
    ("shots", "edges"),
    [
        ((1, 10), (1, 3, 5, 10)),
        ((1, 50), (1, 3, 5, 10, 30, 50)),
        ((4, 4), (4, 4)),
        ((3, 9), (3, 5, 9)),
        ((1, 3), (1, 3)),
    ],
)
def test_edges_are_those_that_a_bin_can_have(shots, edges):
    assert size_edges(shots) == edges
    right, size = np.ones(60, bool), np.arange(60) % 50 + 1
    bins = accuracy_by_size(right, size, edges)
    assert (bins[0].low, bins[-1].high) == shots


def evaluation(seed: int, tasks: int = 40) -> Evaluation:
    random = np.random.default_rng(seed)
    probability = random.dirichlet([1, 1, 1], (tasks, 6))
    return Evaluation(
        probability, random.integers(0, 3, (tasks, 6)), np.ones((tasks, 6), bool), random.integers(1, 6, (tasks, 3)),
        1, 2, {},
    )  # fmt: skip


def test_what_is_kept_of_seeds_gives_the_bins_and_the_reliability_of_all_episodes():
    found = [evaluation(0), evaluation(1)]
    kept = [answers_of(each, (1, 3, 5)) for each in found]
    assert (kept[0]["diverged"], kept[0]["held"]) == (1, 2)
    rows = [each.rows() for each in found]
    right, size = (np.concatenate([r[name] for r in rows]) for name in ("right", "class_size"))
    episode = np.concatenate([rows[0]["task"], rows[1]["task"] + 40])
    for mine, expected in zip(pooled_bins(kept), accuracy_by_size(right, size, (1, 3, 5), episode), strict=True):
        assert (mine.low, mine.high, mine.n) == (expected.low, expected.high, expected.n)
        assert (mine.mean, mine.half) == pytest.approx((expected.mean, expected.half))
    probability, labels = pooled_answers(kept, 3)
    every = np.concatenate([each.probability.reshape(-1, 3) for each in found])
    known = np.concatenate([each.labels.ravel() for each in found])
    assert calibration_error(probability, labels) == pytest.approx(calibration_error(every, known))
    assert reliability(probability, labels).n.tolist() == reliability(every, known).n.tolist()
    np.testing.assert_allclose(probability.sum(1), 1)


def test_balanced_tasks_reach_beyond_the_shots_of_training(splits):
    learners = {name: make_learner(name, PROTOCOL, 1) for name in ("metasgd", "gamma-taml")}
    done: list[int] = []
    found = shots_study(learners, splits.test, PROTOCOL, counts=(1, 9), episodes=4, on_batch=done.append)
    assert done[-1] == 16
    for by_count in found.values():
        assert {n: np.unique(each.counts).tolist() for n, each in by_count.items()} == {1: [1], 9: [9]}
    np.testing.assert_array_equal(found["metasgd"][9].labels, found["gamma-taml"][9].labels)
    with pytest.raises(TooFewItemsError, match="class '3-0' has 12 images; 10 shots and 3 queries need 13"):
        shots_study(learners, splits.test, PROTOCOL, counts=(10,))


def test_shuffled_counts_are_the_same_counts_elsewhere():
    counts = torch.arange(12).view(4, 3)
    found = shuffled_counts(1)(counts)
    assert sorted(found.flatten().tolist()) == list(range(12))
    assert not torch.equal(found, counts)
    assert torch.equal(found, shuffled_counts(1)(counts))


def test_inference_networks_that_see_less_are_held_against_each_other(splits, tmp_path):
    found = pooling_study(run(tmp_path), splits, PROTOCOL, seeds=(0,), variants=(("mean",), ("mean", "n")))
    assert set(found) == {"mean", "mean n", "mean n, shuffled"}
    assert all(len(by_seed[0]) == 6 for by_seed in found.values())
    again = pooling_study(run(tmp_path, resume=True), splits, PROTOCOL, seeds=(0,), variants=(("mean",), ("mean", "n")))
    assert again == found


class TestLoadSplits:
    def test_drawn_sources_have_as_many_images_as_the_largest_task_needs(self):
        found = load_splits("glyphs", 16, classes=6, least=25)
        assert set(found.train.counts) == set(found.test.counts) == {25}
        found = load_splits("glyphs", 16, classes=6, instances=2, others=("hershey", "far", "digits"), least=25)
        assert found.train.counts.max() == 2
        assert list(found.others) == ["hershey", "far", "digits"]
        assert not set(found.others["far"].class_names) & set(found.others["hershey"].class_names)
        assert found.others["digits"].ways == 10
        wanted = [instances_for(source, None, 25) for source in ("glyphs", "Hershey", "far", "omniglot", "x.npz")]
        assert wanted == [25, 25, 25, None, None]

    def test_other_domains_have_the_channels_of_the_training(self, tmp_path):
        x = np.random.default_rng(0).integers(0, 255, (8, 6, 16, 16, 3)).astype(np.uint8)
        np.savez(tmp_path / "colour.npz", x=x)
        found = load_splits("glyphs", 16, classes=6, others=(str(tmp_path / "colour.npz"),))
        assert found.others["colour"].shape == (1, 16, 16)
        assert load_splits(str(tmp_path / "colour.npz"), 16, others=("digits",)).others["digits"].shape == (3, 16, 16)

    def test_two_other_domains_of_one_name_are_refused(self, tmp_path):
        with pytest.raises(InputError, match="two of them are called 'digits'"):
            load_splits("glyphs", 16, classes=6, others=("digits", "digits"))

    @pytest.mark.parametrize("source", ["mnist", "digits", "CIFAR_10"])
    def test_a_source_whose_classes_are_in_every_split_is_refused(self, source):
        with pytest.raises(InputError, match=f"{source}: its classes are the same in every split.*; train on glyphs, "):
            load_splits(source, 16)


def test_sources_are_drawn_by_the_protocol(splits):
    source = source_of(splits.train, PROTOCOL, seed=3, mode="task", shots=(2, 2))
    assert isinstance(source, AnyShotSource)
    assert (source.ways, source.shots, source.queries, source.mode, source.seed) == (3, (2, 2), 2, "task", 3)
