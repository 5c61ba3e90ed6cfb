"""What the method claims, measured with every learning rate tuned by the same rule and bracketed.

Experiments A to F of the specification. Losses are those of fresh seeds at the learning rate that tuning seeds chose.
The full-size runs, with more seeds and rivals, are `make reproduce PACKAGE=blockdiag-opt`.
"""

from __future__ import annotations

import functools
import math
import tempfile

import numpy as np
import pytest
import torch

from blockdiag_opt import BlockAdam, SpectrumClip, discover_groups
from blockdiag_opt.experiments import Grid, schedule_factor, train_once, tune
from blockdiag_opt.tasks import Task, make_task
from shared_core.runs import Run

pytestmark = pytest.mark.claims

SEEDS = (0, 1, 2)


@functools.cache
def scratch() -> Run:
    return Run(
        tempfile.mkdtemp() + "/run",
        package="blockdiag-opt",
        version="0",
        command="claims",
        config={},
        seed=0,
        device="cpu",
    )


@functools.cache
def task_of(name: str, steps: int | None = None) -> Task:
    return make_task(name, steps=steps)


@functools.cache
def tuned(name: str, spec: str, steps: int | None = None, points: int = 3) -> Grid:
    found = tune(scratch(), task_of(name, steps), spec, (1000,), points=points)
    assert not found.edge, f"the best learning rate of {spec} on {name} is at an edge: {dict(found.losses)}"
    return found


@functools.cache
def reached(name: str, spec: str, metric: str = "final_loss", steps: int | None = None) -> np.ndarray:
    """The metric on fresh seeds; training loss unless another one is named."""
    lr = tuned(name, spec, steps).best
    traces = [train_once(task_of(name, steps), spec, lr, seed) for seed in SEEDS]
    assert not any(trace["diverged"] for trace in traces)
    return np.array([trace["final_loss"] if metric == "final_loss" else trace["metrics"][metric] for trace in traces])


# ---- A: where groups are real, and the negative control


RISK = "relative excess risk"


def test_a_aligned_blocks_beat_adam_five_times():
    assert reached("correlated", "block-adam", RISK).mean() <= 0.2 * reached("correlated", "adam", RISK).mean()


def test_a_blocks_across_groups_are_no_better_than_adam():
    adam = reached("correlated-permuted", "adam", RISK).mean()
    assert 0.5 * adam <= reached("correlated-permuted", "block-adam", RISK).mean() <= 2 * adam


def test_a_blocks_along_the_wrong_axis_are_no_better_than_adam():
    adam = reached("correlated", "adam", RISK).mean()
    assert 0.5 * adam <= reached("correlated", "block-adam:grouping=input", RISK).mean() <= 2 * adam


def test_a_discovered_groups_are_within_twice_of_aligned():
    task, lr = task_of("correlated-permuted"), tuned("correlated", "block-adam").best
    risks = []
    for seed in SEEDS:
        groups = discover_groups(task.build(seed), task.batches(seed + 500, 50), task.loss, block_size=10, steps=50)
        model = task.build(seed)
        by_name = dict(model.named_parameters())
        own = [
            group | {"params": [(name, by_name[name]) for name in names]}
            for group, names in ((dict(g), [n for n, _ in g["params"]]) for g in groups)
        ]
        optimizer = BlockAdam(own, lr=lr)
        for step, batch in enumerate(task.batches(seed, task.steps)):
            for group in optimizer.param_groups:
                group["lr"] = lr * schedule_factor(step, task.steps, warmup=task.warmup)
            optimizer.zero_grad()
            task.loss(model, batch).backward()
            optimizer.step()
        risks.append(task.evaluate(model)[RISK])
    assert np.mean(risks) <= 2 * reached("correlated", "block-adam", RISK).mean()


# ---- B: a deep autoencoder


def test_b_larger_blocks_are_better_on_the_autoencoder(data_folder):
    adam, ten, more = (reached("autoencoder", spec) for spec in ("adam", "block-adam", "block-adam:b=25"))
    assert ten.max() < adam.min()
    assert more.max() < ten.min()
    assert ten.mean() < 0.8 * adam.mean()


def test_b_output_wise_beats_input_wise_on_the_autoencoder(data_folder):
    assert (
        reached("autoencoder", "block-adam").mean() < 0.95 * reached("autoencoder", "block-adam:grouping=input").mean()
    )


def test_b_tracked_eigenvalues_reach_the_loss_of_exact_ones(data_folder):
    adam, exact, tracked = (reached("autoencoder", spec).mean() for spec in ("adam", "block-adam", "block-adam:K=20"))
    assert abs(tracked - exact) < 0.1 * (adam - exact)


# ---- C and D: classifiers


def test_c_filter_wise_blocks_train_a_cnn_further(data_folder):
    assert reached("cnn", "block-adam").mean() <= 0.9 * reached("cnn", "adam").mean()


def test_d_a_small_mlp_is_no_worse(data_folder):
    assert reached("mlp", "block-adam").mean() <= 1.05 * reached("mlp", "adam").mean()


def test_correlated_measurements_train_further_than_with_adam():
    ours = reached("breast-cancer", "block-adam:b=30")
    assert ours.mean() < 0.9 * reached("breast-cancer", "adam").mean()


# ---- E: spectrum clipping


STEPS, GAMMA = 300, 0.02


def train_clipped(seed: int, final_lr: float | None, check: bool = False) -> tuple[float, float]:
    """Train the CNN on 500 digits; return its mean loss over the last tenth and its accuracy in percent."""
    task = task_of("digits-clip")
    clip = None if final_lr is None else SpectrumClip(final_lr, GAMMA)
    model, losses = task.build(seed), []
    optimizer = BlockAdam(model.parameters(), lr=0.02, clip=clip)
    for step, batch in enumerate(task.batches(seed, STEPS), start=1):
        before = [param.detach().clone() for param in model.parameters()]
        optimizer.zero_grad()
        loss = task.loss(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if clip is None or not check:
            continue
        low, high = clip.bounds(step)
        for param, old in zip(model.parameters(), before, strict=True):
            # The effective matrix has its eigenvalues in the bounds, so the step has its length in them.
            mean, moved = optimizer.state[param]["exp_avg"], old - param.detach()
            size = float(mean.double().norm())
            slack = 1e-5 * size * high + 1e-6 * float(old.norm())
            assert low * size - slack <= float(moved.double().norm()) <= high * size + slack
            if step == STEPS:
                assert float(torch.cosine_similarity(moved.flatten(), mean.flatten(), dim=0)) > 0.98
    return float(np.mean(losses[-STEPS // 10 :])), task.evaluate(model)["test accuracy"]


def test_e_clipped_training_ends_as_sgd_and_is_as_accurate():
    rates = (0.1, 0.3, 1.0, 3.0, 10.0)
    losses = [train_clipped(1000, rate)[0] for rate in rates]
    best = rates[int(np.nanargmin(losses))]
    assert best not in {rates[0], rates[-1]}, losses
    clipped = [train_clipped(seed, best, check=True)[1] for seed in SEEDS]
    free = [train_clipped(seed, None)[1] for seed in SEEDS]
    # The paper's authors clip for better generalisation. Here it neither helps nor hurts beyond noise.
    assert np.mean(clipped) >= np.mean(free) - 1
    print(losses, clipped, free)


# ---- F: a recurrent network


def test_f_a_character_lstm_needs_fewer_bits():
    name = "char-lstm"
    steps = 150
    ours, adam = (reached(name, spec, steps=steps) for spec in ("block-adam", "adam"))
    assert ours.mean() < adam.mean()
    assert math.isfinite(float(ours.mean()))
