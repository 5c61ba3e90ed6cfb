"""Benchmarks: nobody shares an instance, nothing tested on is trained on, seeds fix all, labels are 0..n-1."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from fedapc import data
from fedapc._noniid import _SEQUENCES, _SETS, read_class_folders
from fedapc.data import BENCHMARKS, benchmark
from fedapc.networks import network
from shared_core.data import ImageData, MissingFilesError, load
from shared_core.errors import InputError, UnknownKeyError


@cache
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
    ("overlapped-mnist", {}),
    ("noniid-mini", {"root": Path("nothing here")}),
    ("noniid-mini", {"clients": 8}),
    ("gaussian", {}),
]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_nobody_shares_an_instance_and_tests_are_unseen(name, options):
    found = made(name, **options)
    permuted = name in ("digits", "overlapped-mnist")
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
    mini = name == "noniid-mini"
    assert list(found.tasks) == sorted(found.tasks)
    assert len(found.tasks) == options.get("clients", 4)
    counts = {len(tasks) for tasks in found.tasks.values()}
    assert counts == ({2, 3, 4} if mini else {options.get("tasks", 4)})
    assert set(found.related) == {
        (client, place) for client, tasks in found.tasks.items() for place in range(len(tasks))
    }
    for client, tasks in found.tasks.items():
        assert len({task.name for task in tasks}) == len(tasks)
        for place, task in enumerate(tasks):
            assert found.related[client, place] == task.name
            each = task.y.bincount().unique().tolist()
            assert each == [options.get("per_class", 20)] or (mini and len(each) == 1 and 5 <= each[0] <= 20)
            for x, y in ((task.x, task.y), task.validation, task.test):
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
    found = made("overlapped-mnist")
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
        ("digit", {}, "no benchmark 'digit'; did you mean 'digits'"),
        ("digits", {"clients": 0}, "clients: 0, expected at least 1"),
        ("digits", {"tasks": 9}, "tasks: 9, and there are 8"),
        ("digits", {"per_class": 60}, "per_class: digits has 3. training instances of a class for 'client0', and 66"),
        ("digits", {"clients": 1000, "per_class": 1}, "0 training instances"),
        ("digits", {"permutations": 0}, "permutations: 0"),
        ("digits", {"test_share": 1.0}, "test_share: 1.0, expected"),
        ("noniid50", {"clients": 6}, "6 clients of 10 tasks; its sequences are of 5 clients of 10"),
        ("noniid-mini", {"test_per_class": 0}, "expected at least 1"),
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
        benchmark("overlapped-mnist", root=tmp_path)


def test_unknown_ways_to_go_on_are_told(unchecked):
    with pytest.raises(InputError, match="absent: 'ignore'; choose 'refuse' or 'leave out'"):
        benchmark("noniid50", absent="ignore")


def test_every_benchmark_is_described():
    assert set(BENCHMARKS) == set(data._BUILDERS)


def test_mini_is_from_sets_that_differ_and_ragged():
    found = made("noniid-mini", root=Path("nothing here"), clients=5, seed=2)
    sets = {name.split()[0] for name in found.related.values()}
    assert sets == {"digits", "glyphs"}
    assert sum("left out" in note for note in found.notes) == 6
    # Ten tasks in the pool: nobody gets one a second time before all are given.
    names = list(found.related.values())
    assert all(names.count(name) - 1 <= len(names) // 10 for name in names)
    level = benchmark("noniid-mini", root="nothing here", ragged=False, clients=2, tasks=3)
    assert {len(tasks) for tasks in level.tasks.values()} == {3}
    with pytest.raises(InputError, match="tasks: 11, and there are 10"):
        benchmark("noniid-mini", root="nothing here", tasks=11)


def test_mini_takes_what_is_there():
    found = made("noniid-mini", clients=8)
    sets = {name.split()[0] for name in found.related.values()}
    for name, key in (("mnist", "mnist"), ("cifar10", "cifar10"), ("omniglot", "omniglot")):
        if not any(note.startswith(f"left out {name}:") for note in found.notes):
            assert key in sets
    if "omniglot" in sets:
        assert any(note.startswith("omniglot: down to") for note in found.notes)


def cifar100(root, per_class):
    """A CIFAR-100 in its binary layout, whose first pixels say which image it is."""
    folder = root / "cifar-100-binary"
    folder.mkdir(parents=True)
    number = 0
    for name, count in (("train", per_class), ("test", 2)):
        records = []
        for label in range(100):
            for _ in range(count):
                pixels = np.full(3072, label, dtype=np.uint8)
                pixels[:4] = np.frombuffer(np.uint32(number).tobytes(), dtype=np.uint8)
                number += 1
                records.append(np.concatenate([[label % 20, label], pixels]).astype(np.uint8))
        (folder / f"{name}.bin").write_bytes(np.stack(records).tobytes())


def test_overlapped_cifar100_deals_the_instances_of_a_superclass_to_those_that_have_it(tmp_path):
    cifar100(tmp_path, per_class=30)
    found = benchmark("overlapped-cifar100", root=tmp_path)
    assert found.network == "lenet"
    assert {len(tasks) for tasks in found.tasks.values()} == {10}
    assert any("partial" in note for note in found.notes)
    holders = {name: sum(of == name for of in found.related.values()) for name in set(found.related.values())}
    seen = {}
    for client, tasks in found.tasks.items():
        for place, task in enumerate(tasks):
            assert task.classes == 5
            share = 30 // holders[found.related[client, place]]
            assert len(task.y) + len(task.validation[1]) == 5 * share
            assert len(task.validation[1]) == 5 * max(1, round(0.1 * share))
            assert len(task.test[1]) == 10
            for row in rows(torch.cat([task.x, task.validation[0]]), sort=False):
                assert seen.setdefault(row, client) == client
            assert not rows(task.test[0], sort=False) & set(seen)
            # Undo the standardisation: the classes of a task are those of one superclass.
            red = (task.x[:, 0, 16, 16] * 63.0 + 125.3).round().long()
            assert len((red % 20).unique()) == 1
            assert [len(red[task.y == label].unique()) for label in range(5)] == [1] * 5


def test_noniid50_has_the_papers_sequences():
    names = [name for sequence in _SEQUENCES for name in sequence.split()]
    assert len(names) == len(set(names)) == 50
    assert set(names) == {f"{of.key}_{group}" for of in _SETS.values() for group in range(of.groups)}
    assert _SEQUENCES[3].split()[3] == "cifar10_1"


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    """Tiny sets in folders of classes, as users download them; three pictures of each class."""
    root = tmp_path_factory.mktemp("downloads")
    folders(root, "notMNIST_small", 10, 3, "L", side=28)
    (root / "notMNIST_small" / "00000" / "broken.png").write_bytes(b"")
    folders(root, "GTSRB/Final_Training/Images", 43, 3, ending="ppm")
    folders(root, "facescrub", 81, 3)
    return root


def folders(root, name, classes, count, mode="RGB", ending="png", side=32):
    for label in range(classes):
        folder = root / name / f"{label:05d}"
        folder.mkdir(parents=True)
        for number in range(count):
            colour = (label, number, 7) if mode == "RGB" else label
            Image.new(mode, (side, side), colour).save(folder / f"{number}.{ending}")


def test_noniid50_from_folders(downloads):
    with pytest.raises(
        MissingFilesError, match=r"^cifar10: not found.* \(and 4 more sets are missing\); or go on without"
    ):
        benchmark("noniid50", root=downloads)
    found = benchmark("noniid50", root=downloads, absent="leave out")
    assert [found.related["client4", place] for place in range(7)] == [
        *("sign_7", "face_5", "sign_6", "sign_3", "sign_2", "face_12", "face_4")
    ]
    assert sum(len(tasks) for tasks in found.tasks.values()) == 2 + 16 + 8
    assert any("1 pictures" in note and "left out" in note for note in found.notes)
    pairs = [
        (name, task)
        for client, tasks in found.tasks.items()
        for name, task in zip(
            (found.related[client, k] for k in range(10) if (client, k) in found.related), tasks, strict=True
        )
    ]
    owners = {}
    for name, task in pairs:
        assert task.x.shape == (5, 3, 32, 32)
        assert len(task.validation[1]) == 5
        assert len(task.test[1]) == 5
        of = _SETS[name.rpartition("_")[0]]
        mean, sd = (torch.tensor(values).view(-1, 1, 1) for values in (of.mean, of.sd))
        pixels = (task.x * sd + mean).round()
        if of.grey:
            assert bool((pixels[:, :, :2] == 0).all())
            assert bool((pixels[:, 0] == pixels[:, 2]).all())
        for label in pixels[:, 0, 16, 16].unique().tolist():
            # A class is in one task of its set.
            assert owners.setdefault((of.key, label), name) == name


def test_noniid50_of_fewer_tasks(tmp_path):
    folders(tmp_path / "ten", "notMNIST", 10, 6, "L", side=28)
    options = {"root": tmp_path / "ten", "absent": "leave out", "clients": 2, "test_per_class": 1}
    found = benchmark("noniid50", tasks=1, per_class=2, **options)
    assert list(found.related.values()) == ["notmnist_1", "notmnist_0"]
    task = found.tasks["client1"][0]
    assert (len(task.y), len(task.validation[1]), len(task.test[1])) == (10, 5, 5)
    with pytest.raises(
        InputError, match="notmnist has 5 training instances of a class for 'client0', and 6 are needed"
    ):
        benchmark("noniid50", per_class=5, **options)
    folders(tmp_path, "notmnist", 4, 2)
    with pytest.raises(InputError, match="notmnist: has 4 classes, and 2 tasks need 10"):
        benchmark("noniid50", root=tmp_path, absent="leave out")
    with pytest.raises(MissingFilesError, match="not found"):
        benchmark("noniid50", root=tmp_path / "nothing", absent="leave out")


def test_folders_of_classes_are_read_past_what_is_broken(tmp_path):
    folders(tmp_path, "set", 3, 4)
    (tmp_path / "set" / "00001" / "text.txt").write_text("no picture")
    (tmp_path / "set" / "00001" / "bad.jpg").write_text("no picture")
    (tmp_path / "set" / "00002" / "5.png").write_bytes((tmp_path / "set" / "00002" / "1.png").read_bytes())
    images, labels, skipped = read_class_folders(tmp_path / "set", 16, 3)
    assert images.shape == (13, 3, 16, 16)
    assert labels.tolist() == [0] * 4 + [1] * 4 + [2] * 5
    assert images[:, 0, 0, 0].tolist() == labels.tolist()
    assert skipped == 1
    assert read_class_folders(tmp_path / "set", 16, 1, most=2)[1].tolist() == [0] * 4 + [1] * 5
    for file in (tmp_path / "set" / "00000").iterdir():
        file.write_bytes(b"")
    assert read_class_folders(tmp_path / "set", 16, 3)[1].tolist() == [0] * 4 + [1] * 5
    with pytest.raises(InputError, match="0 classes with pictures"):
        read_class_folders(tmp_path / "set" / "00001", 16, 3)
