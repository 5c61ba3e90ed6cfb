"""Comparisons: the same episodes and as many trials for everybody, nothing repeated after an interruption."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from meta_dropout import experiments
from meta_dropout.data import ClassImages
from meta_dropout.experiments import (
    PIXELS,
    Protocol,
    Splits,
    compare,
    load_splits,
    make_learner,
    noise_use,
    paired,
    pixel_prototypes,
    robustness,
    settings_of,
    source_of,
)
from meta_dropout.methods import METHODS
from shared_core.errors import InputError, UnknownKeyError
from shared_core.runs import Run

PROTOCOL = Protocol(
    ways=3, queries=3, test_queries=4, size=16, filters=4, blocks=2, inner_steps=1, samples=2, steps=3, meta_batch=2,
    episodes=6, init="kaiming",
)  # fmt: skip


def some(classes: int, seed: int) -> ClassImages:
    random = np.random.default_rng(seed)
    shapes = random.random((classes, 1, 1, 16, 16)) > 0.6
    images = np.clip(shapes * 0.8 + 0.2 * random.random((classes, 9, 1, 16, 16)), 0, 1)
    names = tuple(f"{seed}-{k}" for k in range(classes))
    return ClassImages(
        f"set {seed}", (255 * images).astype(np.uint8).reshape(-1, 1, 16, 16), np.repeat(np.arange(classes), 9), names
    )


@pytest.fixture(scope="module")
def splits() -> Splits:
    return Splits(some(8, 1), some(5, 2), some(5, 3))


def run(folder, **options) -> Run:
    return Run(folder, package="meta-dropout", version="0", command="compare", config={}, **options)


def test_all_methods_are_tested_on_the_same_episodes(splits, tmp_path, monkeypatch):
    seen: dict[str, list[torch.Tensor]] = {}
    original = experiments.MetaLearner.evaluate

    def spy(self, source, **options):
        seen.setdefault(self.method_name, []).append(source.batch(0, 2).query)
        return original(self, source, **options)

    monkeypatch.setattr(experiments.MetaLearner, "evaluate", spy)
    results, claims, cells = compare(
        run(tmp_path), splits, methods=(PIXELS, "maml", "meta-dropout"), seeds=(0, 1), protocol=PROTOCOL
    )
    assert all(torch.equal(a, b) for a, b in zip(seen["maml"], seen["meta-dropout"], strict=True))
    assert not torch.equal(*seen["maml"])
    assert {r.method for r in results if r.metric == "accuracy"} == {PIXELS, "maml", "meta-dropout"}
    assert all(len(cell["accuracy"]) == 6 for by_seed in cells.values() for cell in by_seed.values())
    row = next(r for r in results if r.metric == "accuracy" and r.method == "maml")
    assert row.mean == pytest.approx(100 * np.mean([c["accuracy"] for c in cells["maml"].values()]))
    assert row.n == 2
    assert [c.text.split(" is more accurate than ")[1].split(" on")[0] for c in claims] == [PIXELS, "maml"]


def test_paired_differences_are_over_episodes():
    def cell(accuracy):
        return {"accuracy": accuracy}

    cells = {
        "meta-dropout": {0: cell([0.9, 0.8]), 1: cell([0.7, 0.6])},
        "maml": {0: cell([0.8, 0.8]), 1: cell([0.6, 0.4])},
    }
    (claim,) = paired(cells)
    gap = 100 * np.array([0.1, 0.0, 0.1, 0.2])
    assert claim.value == pytest.approx(gap.mean())
    assert claim.holds == (gap.mean() - 1.96 * gap.std() / 2 > 0)
    assert f"± {1.96 * gap.std() / 2:.2f} points" in claim.text


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
        run(tmp_path, resume=True), splits, on_learner=lambda run, name, seed, *_: seen.append(seed), **arguments
    )
    assert seen == [1]
    assert found[2]["maml"].keys() == {0, 1}


def test_every_method_is_tuned_with_as_many_trials():
    for name in METHODS:
        assert len(settings_of(name, PROTOCOL)) == PROTOCOL.trials, name
        assert len({tuple(s.items()) for s in settings_of(name, PROTOCOL)}) == PROTOCOL.trials


def test_tuning_looks_at_validation_classes_only(splits, monkeypatch):
    asked: list[ClassImages] = []
    original = experiments.source_of
    monkeypatch.setattr(
        experiments, "source_of", lambda images, *a, **o: asked.append(images) or original(images, *a, **o)
    )
    chosen = experiments.tune("dropout", splits, PROTOCOL, seed=0)
    assert set(map(id, asked)) == {id(splits.train), id(splits.validation)}
    assert chosen in settings_of("dropout", PROTOCOL)


def test_options_of_a_setting_reach_the_method():
    learner = make_learner("vib", PROTOCOL, 1, setting={"penalty": 0.5, "inner_lr": 0.3, "outer_lr": 1.0})
    assert (learner.method.penalty, learner.plan.penalty, learner.plan.lr) == (0.5, 0.5, 0.3)
    assert learner.method_name == "vib"


def test_pixels_are_compared_to_class_means(splits):
    tasks = source_of(splits.test, PROTOCOL, seed=0, test=True).batch(0, 2)
    found = pixel_prototypes(tasks)
    x, asked = tasks.support[1].flatten(1), tasks.query[1].flatten(1)
    expected = torch.stack([-(asked - x[tasks.support_labels[1] == k].mean(0)).square().sum(1) for k in range(3)], 1)
    assert torch.allclose(found[1], expected, rtol=1e-3)


@pytest.mark.parametrize("method", ["meta-dropout", "protonet"])
def test_attacked_accuracy_never_rises_with_the_radius(splits, method):
    learner = make_learner(method, PROTOCOL, 1)
    found = robustness(
        learner, source_of(splits.test, PROTOCOL, seed=0, test=True), "linf", (0.05, 0.3), episodes=3, batch=2, steps=3
    )
    assert found.shape == (3, 3)
    assert (np.diff(found, axis=0) <= 0).all()


def test_names_and_seeds_are_checked(splits, tmp_path):
    with pytest.raises(UnknownKeyError, match="no method 'noise'; there are pixels, meta-dropout"):
        compare(run(tmp_path), splits, methods=("noise",), seeds=(0,), protocol=PROTOCOL)
    with pytest.raises(InputError, match="need at least one"):
        compare(run(tmp_path), splits, methods=("maml",), seeds=(), protocol=PROTOCOL)


@pytest.mark.parametrize("source", ["mnist", "digits", "CIFAR_10"])
def test_a_source_whose_classes_are_in_every_split_is_no_source_of_training_tasks(source):
    with pytest.raises(InputError, match=f"{source}: its classes are the same in every split.*; train on glyphs, "):
        load_splits(source, 16)


def test_settings_are_chosen_once_and_used_under_every_seed(splits, tmp_path, monkeypatch):
    chosen: list[tuple[str, int]] = []

    def tune(name, splits, protocol, *, seed, device):
        chosen.append((name, seed))
        return {"outer_lr": 0.002}

    monkeypatch.setattr(experiments, "tune", tune)
    _, _, cells = compare(run(tmp_path), splits, methods=(PIXELS, "maml"), seeds=(3, 4), protocol=PROTOCOL, tuned=True)
    assert chosen == [("maml", 3)]
    assert [cell["setting"] for cell in cells["maml"].values()] == [{"outer_lr": 0.002}] * 2


def test_what_noise_does_is_measured_on_the_same_episodes_and_changes_nothing(splits):
    learner = make_learner("meta-dropout", PROTOCOL, 1, seed=0)
    with torch.no_grad():
        for parameter in learner.model.role("phi").values():
            parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    before = {name: p.detach().clone() for name, p in learner.parameters().items()}
    source = source_of(splits.test, PROTOCOL, seed=1, test=True)
    done: list[int] = []
    found = noise_use(learner, source, samples=(1, 3), draws=2, episodes=6, batch=4, on_batch=done.append)
    assert {name: rows.shape for name, rows in found.items()} == {
        "no noise": (1, 6), "S = 1": (2, 6), "S = 3": (2, 6), "generators shuffled": (1, 6)
    }  # fmt: skip
    assert done == sorted(done)
    assert done[-1] == 36
    assert all(torch.equal(p, before[name]) for name, p in learner.parameters().items())
    np.testing.assert_array_equal(found["no noise"][0], learner.evaluate(source, episodes=6, sample=False).accuracy)
    np.testing.assert_array_equal(found["S = 3"][0], learner.evaluate(source, episodes=6, samples=3).accuracy)
    assert not np.array_equal(*found["S = 1"])
    assert not np.array_equal(found["generators shuffled"], found["S = 3"][:1])
