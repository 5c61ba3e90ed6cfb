"""Benchmarks: nobody shares an instance, nothing tested on is trained on, seeds fix all, labels are 0..n-1."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from fedapc import data
from fedapc.data import BENCHMARKS, benchmark
from fedapc.networks import network
from shared_core.data import ImageData, MissingFilesError, load
from shared_core.errors import InputError, UnknownKeyError


def made(name, **options):
    """A benchmark, or a skipped test where its files are not here."""
    try:
        return benchmark(name, **options)
    except MissingFilesError as error:
        pytest.skip(f"the files of {name} are not here: {error}")


def rows(x, sort):
    """What identifies an example: its numbers, in any order where pixels are permuted."""
    flat = x.flatten(1)
    return {row.numpy().tobytes() for row in (flat.sort(1).values if sort else flat)}


CASES = [
    ("digits", {}),
    ("digits", {"clients": 6, "per_class": 8, "tasks": 8}),
    ("overlapped_mnist", {}),
    ("gaussian", {}),
]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_nobody_shares_an_instance_and_tests_are_unseen(name, options):
    found = made(name, **options)
    permuted = name in ("digits", "overlapped_mnist")
    seen, tested = {}, set()
    for client, tasks in found.tasks.items():
        seen[client] = set()
        for task in tasks:
            assert task.validation is not None
            assert task.test is not None
            train, held = rows(task.x, permuted), rows(task.validation[0], permuted)
            assert not train & held
            assert len(train) == len(task.x)
            seen[client] |= train | held
            tested |= rows(task.test[0], permuted)
    clients = list(seen)
    assert not any(seen[one] & seen[two] for one in clients for two in clients if one < two)
    assert not tested & set().union(*seen.values())


@pytest.mark.parametrize(("name", "options"), CASES)
def test_shapes_and_labels(name, options):
    found = made(name, **options)
    assert list(found.tasks) == sorted(found.tasks)
    assert len(found.tasks) == options.get("clients", 4)
    for client, tasks in found.tasks.items():
        assert len(tasks) == options.get("tasks", 4)
        assert len({task.name for task in tasks}) == len(tasks)
        for place, task in enumerate(tasks):
            assert found.related[client, place] == task.name
            assert torch.equal(task.y.bincount(), torch.full((task.classes,), options.get("per_class", 20)))
            for x, y in (task.validation, task.test):
                assert x.dtype == torch.float32
                assert y.dtype == torch.int64
                assert y.unique().tolist() == list(range(task.classes))
                assert bool(torch.isfinite(x).all())
    first = found.tasks[next(iter(found.tasks))][0]
    assert network(found.network, first.x, first.classes)(first.x[:3]).shape == (3, first.classes)


@pytest.mark.parametrize("name", ["digits", "gaussian"])
def test_a_seed_fixes_all_and_tests_do_not_depend_on_it(name):
    one, two, other = (benchmark(name, clients=3, seed=seed) for seed in (4, 4, 5))
    assert one.related == two.related
    assert one.related != other.related
    tests = {task.name: task.test for tasks in other.tasks.values() for task in tasks}
    for client, tasks in one.tasks.items():
        for task, again in zip(tasks, two.tasks[client], strict=True):
            assert torch.equal(task.x, again.x)
            assert torch.equal(task.y, again.y)
            if task.name in tests:
                assert torch.equal(task.test[0], tests[task.name][0])


def test_inputs_of_the_training_part_are_standardised():
    found = made("digits", clients=4, tasks=8, per_class=20)
    pixels = torch.cat([task.x for tasks in found.tasks.values() for task in tasks])
    assert abs(float(pixels.mean())) < 0.05
    assert abs(float(pixels.std()) - 1) < 0.05


def test_digits_are_those_of_scikit_learn_with_fixed_orders_of_pixels():
    found = made("digits", tasks=8)
    original = load("digits", expect=ImageData)
    known = {row.sort().values.numpy().tobytes() for row in torch.from_numpy(original.images).flatten(1).float()}
    by_name = {task.name: task for task in found.tasks["client0"]}
    assert sorted(by_name) == sorted(f"{half}, pixels {number}" for half in ("0-4", "5-9") for number in range(4))
    plain = by_name["0-4, pixels 0"].test[0]
    # Undo the scaling: zero pixels are the lowest, and white is 16.
    levels = plain.unique()
    counts = ((plain - levels[0]) / (levels[-1] - levels[0]) * 16).round()
    assert {row.sort().values.numpy().tobytes() for row in counts} <= known
    for number in range(1, 4):
        order = data._permutation(number, 64)
        assert order.sort().values.tolist() == list(range(64))
        assert torch.equal(by_name[f"0-4, pixels {number}"].test[0], plain[:, order])
    # Fixed for good: a run can be compared with one of another version.
    assert data._permutation(1, 6).tolist() == [5, 4, 2, 3, 1, 0]


def test_mnist_is_pooled_from_the_first_of_each_digit():
    found = made("overlapped_mnist")
    train = load("mnist", split="train", expect=ImageData)
    allowed = set()
    for label in range(10):
        images = torch.from_numpy(train.images[train.labels == label][:500]).float()[:, None]
        allowed |= rows(functional.avg_pool2d(images, 2).flatten(1), sort=True)
    pixels = torch.cat([task.x for tasks in found.tasks.values() for task in tasks])
    low, high = float(pixels.min()), float(pixels.max())
    quarters = ((pixels - low) / (high - low) * 255 * 4).round() / 4
    assert rows(quarters, sort=True) <= allowed
    assert found.tasks["client0"][0].test[0].shape == (500, 196)


def test_repeated_instances_are_told():
    assert benchmark("digits", clients=2, tasks=1).notes == ()
    (note,) = benchmark("digits", clients=4, tasks=8).notes
    assert "recur" in note


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("digit", {}, "there is no 'digit'; choose digits"),
        ("digits", {"clients": 0}, "clients: 0, expected at least 1"),
        ("digits", {"tasks": 9}, "tasks: 9, and there are 8"),
        ("digits", {"per_class": 60}, "per_class: digits has 3. training instances of a class for each client, and 66"),
        ("digits", {"clients": 1000}, "0 training instances"),
        ("digits", {"colour": 3}, "colour: not an option of 'digits', which takes permutations, test_share"),
        ("gaussian", {"classes": 1}, "1 classes"),
        ("gaussian", {"noise": 0.0}, "a positive noise"),
    ],
)
def test_wrong_arguments_are_told(name, options, says):
    with pytest.raises(InputError, match=says):
        benchmark(name, **options)


def test_unknown_names_are_key_errors_and_missing_sets_are_named(tmp_path):
    with pytest.raises(UnknownKeyError):
        benchmark("nothing")
    with pytest.raises(MissingFilesError, match="mnist: not found"):
        benchmark("overlapped_mnist", root=tmp_path)


def test_every_benchmark_is_described():
    assert set(BENCHMARKS) == set(data._BUILDERS)
