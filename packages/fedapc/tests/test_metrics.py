"""Metrics against loops that say what the paper's sums say, and against examples worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from networks import LEARNING, federation

from fedapc.engine import simulate
from fedapc.metrics import (
    accuracy_matrix,
    average_accuracy,
    backward_transfer,
    capacity,
    forgetting,
    learning_accuracy,
    per_client,
)
from shared_core.errors import InputError

METRICS = (average_accuracy, forgetting, backward_transfer, learning_accuracy)


def draw(clients=5, tasks=4, ragged=True, seed=0, untested=0.0):
    random = np.random.default_rng(seed)
    counts = random.integers(1, tasks + 1, clients) if ragged else [tasks] * clients
    found = np.full((clients, tasks, tasks), np.nan)
    for client, count in enumerate(counts):
        for t in range(count):
            found[client, t, : t + 1] = random.random(t + 1)
        found[client, :, random.random(tasks) < untested] = np.nan
    return found


def mean(values):
    values = [value for value in values if not math.isnan(value)]
    return sum(values) / len(values) if values else math.nan


def loops(a):
    """The four metrics, one entry after the other."""
    found = [[], [], [], []]
    for rows in a:
        evaluated = [t for t in range(len(rows)) if any(not math.isnan(rows[t, i]) for i in range(t + 1))]
        if not evaluated:
            continue
        last = evaluated[-1]
        falls, transfers = [], []
        for i in range(last):
            seen = [rows[t, i] for t in range(i, last) if not math.isnan(rows[t, i])]
            falls.append(max(seen) - rows[last, i] if seen else math.nan)
            transfers.append(rows[last, i] - rows[i, i])
        found[0].append(mean([rows[last, i] for i in range(last + 1)]))
        found[1].append(mean(falls))
        found[2].append(mean(transfers))
        found[3].append(mean([rows[i, i] for i in range(last + 1)]))
    return [mean(values) for values in found]


@pytest.mark.parametrize("untested", [0.0, 0.3])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_metrics_are_those_of_the_loops(seed, ragged, untested):
    a = draw(seed=seed, ragged=ragged, untested=untested)
    np.testing.assert_allclose([metric(a) for metric in METRICS], loops(a), rtol=1e-12)


def test_for_equal_numbers_of_tasks_they_are_the_papers():
    a = draw(ragged=False)
    clients, tasks, _ = a.shape
    assert average_accuracy(a) == pytest.approx(sum(a[:, -1].flat) / (clients * tasks))
    total = 0.0
    for c in range(clients):
        for i in range(tasks - 1):
            total += max(a[c, t, i] - a[c, -1, i] for t in range(i, tasks - 1)) / (tasks - 1)
    assert forgetting(a) == pytest.approx(total / clients)
    pairs = [(c, i) for c in range(clients) for i in range(tasks - 1)]
    assert backward_transfer(a) == pytest.approx(sum(a[c, -1, i] - a[c, i, i] for c, i in pairs) / len(pairs))
    assert learning_accuracy(a) == pytest.approx(sum(a[c, i, i] for c in range(clients) for i in range(tasks)) / 20)


def test_by_hand():
    # Client 0 falls from 0.9 over 0.95 to 0.7 on its first task; client 1 has one task; client 2 has no test examples.
    nan = float("nan")
    a = accuracy_matrix([[[0.9], [0.95, 0.6], [0.7, 0.8, 0.5]], [[0.4]], [[nan], [nan, nan]]])
    assert a.shape == (3, 3, 3)
    assert a.dtype == np.float64
    assert average_accuracy(a) == pytest.approx(((0.7 + 0.8 + 0.5) / 3 + 0.4) / 2)
    assert forgetting(a) == pytest.approx(((0.95 - 0.7) + (0.6 - 0.8)) / 2)
    assert backward_transfer(a) == pytest.approx(((0.7 - 0.9) + (0.8 - 0.6)) / 2)
    assert learning_accuracy(a) == pytest.approx(((0.9 + 0.6 + 0.5) / 3 + 0.4) / 2)


def test_what_was_not_evaluated_counts_for_nothing():
    a = draw(clients=2, tasks=3, ragged=False)
    skipped = a.copy()
    skipped[0, 1] = np.nan
    assert average_accuracy(skipped) == average_accuracy(a)
    assert np.isnan(skipped[0, 1, 1])
    assert learning_accuracy(skipped[:1]) == pytest.approx((a[0, 0, 0] + a[0, 2, 2]) / 2)
    assert forgetting(skipped[:1]) == pytest.approx(a[0, 0, 0] - a[0, 2, 0])
    assert accuracy_matrix([[[0.5], [], [0.4, 0.3, 0.2]]])[0, 1].tolist() == pytest.approx([np.nan] * 3, nan_ok=True)


def test_numbers_of_tasks_before_they_begin_are_left_out():
    a = draw(ragged=False)
    ahead = a.copy()
    ahead[:, 0, 3] = 1.0
    assert [metric(ahead) for metric in METRICS] == [metric(a) for metric in METRICS]
    assert accuracy_matrix([[[0.5, 0.9], [0.4, 0.3]]])[0, 0].tolist() == pytest.approx([0.5, np.nan], nan_ok=True)


@pytest.mark.parametrize("metric", METRICS)
def test_clients_each_count_once(metric):
    a = draw(clients=6, seed=3)
    alone = per_client(a, metric)
    assert alone.shape == (6,)
    assert metric(a) == pytest.approx(np.nanmean(alone))
    order = np.random.default_rng(0).permutation(6)
    np.testing.assert_array_equal(per_client(a[order], metric), alone[order])


def test_one_task_has_nothing_to_forget():
    a = accuracy_matrix([[[0.5]], [[0.7]]])
    assert average_accuracy(a) == learning_accuracy(a) == pytest.approx(0.6)
    assert math.isnan(forgetting(a))
    assert math.isnan(backward_transfer(a))
    assert np.isnan(per_client(a, forgetting)).all()


def test_nothing_at_all_is_no_number():
    a = np.full((2, 3, 3), np.nan)
    assert all(math.isnan(metric(a)) for metric in METRICS)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (np.zeros((2, 3)), r"\(2, 3\), expected \(clients, tasks, tasks\)"),
        (np.zeros((2, 3, 4)), r"\(2, 3, 4\)"),
        (np.zeros((0, 3, 3)), r"\(0, 3, 3\)"),
        (np.full((1, 2, 2), 71.0), r"71 at \(0, 0, 0\), expected shares in \[0, 1\]"),
        (np.full((1, 1, 1), np.inf), "inf"),
        (np.full((1, 1, 1), -0.1), "-0.1"),
    ],
)
@pytest.mark.parametrize("metric", [*METRICS, lambda a: per_client(a, forgetting)])
def test_what_is_no_matrix_of_accuracies_is_refused(wrong, says, metric, unchecked):
    with pytest.raises(InputError, match=says):
        metric(wrong)


def test_no_evaluations_are_refused():
    for nothing in ([], [[]]):
        with pytest.raises(InputError, match="evaluate at least one client"):
            accuracy_matrix(nothing)
    with pytest.raises(InputError, match="in \\[0, 1\\]"):
        accuracy_matrix([[[90.0]]])


@pytest.mark.parametrize("rounds", [1, 3])
def test_capacity_counts_what_a_loop_counts(rounds):
    clients, server = federation(rounds=2, learning=LEARNING)
    simulate(clients, server, rounds=rounds)
    model = clients[0].model
    kept = sum(1 for base in model.base.values() for value in base.flatten().tolist() if value != 0)
    for task in model.tasks:
        for name in model.layout.layers:
            if model.running is not None and model.running[0] == task:
                values = model.running[1].adaptive[name].flatten().tolist()
                kept += sum(1 for value in values if abs(value) > model.threshold)
            else:
                kept += sum(1 for value in model.part(task)[name].dense().flatten().tolist() if value != 0)
    assert capacity(model) == kept / sum(math.prod(shape) for shape in model.layout.layers.values())
    assert capacity(model) > 1


def test_capacity_of_a_base_without_parts_is_its_density():
    clients, _ = federation()
    model = clients[0].model
    assert capacity(model) == 0.0
    model.base = {name: torch.ones_like(base) for name, base in model.base.items()}
    assert capacity(model) == 1.0
