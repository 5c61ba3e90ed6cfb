"""What the method claims, with effect sizes, at a size that a CPU affords: a hundredth of the paper's training.

At this size there is no gain in clean accuracy (the README has the tables); what is asserted is what holds.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from meta_dropout.backbones import mlp
from meta_dropout.experiments import (
    Protocol,
    Splits,
    load_splits,
    make_learner,
    noise_use,
    pixel_prototypes,
    robustness,
    source_of,
    train,
)
from meta_dropout.learner import MetaLearner
from meta_dropout.toys import GaussianTasks, SineTasks, oracle_accuracy

pytestmark = pytest.mark.claims


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- E2: clutter in most dimensions


def test_tasks_full_of_clutter_are_learned_by_both_and_neither_reaches_the_oracle():
    """The specification expects meta-dropout above MAML here; measured: a point or two below, at any step size."""
    toy = GaussianTasks(ways=5, shots=1, queries=15, signal=4, nuisance=16)
    test = dataclasses.replace(toy, seed=1000)
    found: dict[str, np.ndarray] = {}
    for method in ("maml", "meta-dropout"):
        net = mlp(inputs=20, outputs=5, hidden=(40,))
        learner = MetaLearner(net, method, inner_lr=0.3, inner_steps=3, test_samples=10)
        learner.fit(toy, steps=300, meta_batch=16, outer_lr=3e-3)
        found[method] = learner.evaluate(test, episodes=200, batch=100).accuracy
    oracle = oracle_accuracy(test, 200)
    for accuracy in found.values():
        assert 0.65 < accuracy.mean() < oracle - 0.05
    assert abs((found["meta-dropout"] - found["maml"]).mean()) < 0.05


# ---- E3 to E5: characters


PROTOCOL = Protocol(
    size=14, blocks=3, queries=5, test_queries=15, init="kaiming", inner_steps=2, steps=300, outer_lr=3e-3
)


@pytest.fixture(scope="module")
def splits() -> Splits:
    return load_splits("glyphs", PROTOCOL.size, seed=0)


@pytest.fixture(scope="module")
def learners(splits) -> dict[str, MetaLearner]:
    made = {name: make_learner(name, PROTOCOL, splits.channels) for name in ("maml", "meta-dropout")}
    for learner in made.values():
        train(learner, splits.train, PROTOCOL, seed=0)
    return made


def test_characters_never_seen_are_told_apart(splits, learners):
    """E3: both learn far more than pixels say, and meta-dropout keeps up with MAML."""
    test = source_of(splits.test, PROTOCOL, seed=1, test=True)
    accuracy = {name: learner.evaluate(test, episodes=200).accuracy for name, learner in learners.items()}
    tasks = test.batch(0, 200)
    pixels = (pixel_prototypes(tasks).argmax(-1) == tasks.query_labels).double().mean().item()
    for name, found in accuracy.items():
        assert found.mean() > pixels + 0.08, name
    assert (accuracy["meta-dropout"] - accuracy["maml"]).mean() > -0.04


def test_the_noise_is_used_when_adapting_to_a_new_task(splits, learners):
    """E5: more samples are no worse and steadier, and generators that know nothing are ruinous."""
    test = source_of(splits.test, PROTOCOL, seed=1, test=True)
    found = noise_use(learners["meta-dropout"], test, samples=(1, 10, 30), draws=2, episodes=40)
    mean = {name: rows.mean() for name, rows in found.items()}
    assert mean["S = 10"] > mean["S = 1"] - 0.005
    assert mean["S = 30"] > mean["S = 1"]
    apart = [np.abs(np.diff(found[f"S = {count}"], axis=0)).mean() for count in (1, 10, 30)]
    assert apart == sorted(apart, reverse=True)
    assert mean["generators shuffled"] < mean["S = 30"] - 0.1


def test_attacks_of_queries_are_real(splits, learners):
    """E4: they bring accuracy down steadily, and three times as many steps find little that the attack did not."""
    test = source_of(splits.test, PROTOCOL, seed=1, test=True)
    for learner in learners.values():
        short = robustness(learner, test, "linf", (0.05, 0.1), episodes=10, steps=10).mean(1)
        long = robustness(learner, test, "linf", (0.05, 0.1), episodes=10, steps=30).mean(1)
        assert short[0] > short[1] > short[2]
        assert short[2] < short[0] - 0.2
        assert (short - long).max() < 0.05


# ---- E6: regression


def test_sine_waves_are_learned_faster_by_a_learner_than_from_scratch():
    """MAML's error after one step is less than half of that of an untrained network's best fine-tuning.

    The specification wants a third after 3,000 steps, which takes three times as long as this.
    """
    test = SineTasks(seed=77)

    def error(method: str, lr: float, steps: int, meta_steps: int) -> float:
        learner = MetaLearner(mlp(inputs=1, outputs=1), method, inner_lr=lr, inner_steps=steps, task="regression")
        learner.fit(SineTasks(), steps=meta_steps, meta_batch=10, outer_lr=3e-3)
        assert learner.skipped == 0
        return learner.evaluate(test, episodes=200, batch=100).mean

    scratch = min(error("scratch", lr, steps, 0) for lr, steps in ((0.003, 10), (0.001, 10), (0.001, 20)))
    assert error("maml", 0.01, 1, 1000) < scratch / 2
    assert error("meta-dropout", 0.01, 1, 300) < scratch
