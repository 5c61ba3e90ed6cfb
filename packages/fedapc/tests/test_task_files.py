"""Users' tasks: what files become, that nothing leaks between parts, and one helpful line for every wrong file."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from fedapc.client import Client, Learning
from fedapc.data import read_tasks, write_example
from fedapc.decomposition import Layout, initial_base
from fedapc.engine import simulate
from fedapc.networks import network
from fedapc.server import Server
from shared_core.errors import InputError, UnknownKeyError

RANDOM = np.random.default_rng(0)


def listing(folder, text):
    path = folder / "tasks.toml"
    path.write_text(text)
    return path


def npz(folder, name="a.npz", **arrays):
    given = {"x": RANDOM.normal(size=(20, 3)), "y": np.arange(20) % 2}
    np.savez(folder / name, **{**given, **arrays})
    return name


def csv(folder, name="a.csv", rows=20, **columns):
    given = {"age": RANDOM.normal(40, 9, rows), "dose": RANDOM.normal(0, 1, rows), "label": ["yes", "no"] * (rows // 2)}
    pd.DataFrame({**given, **columns}).to_csv(folder / name, index=False)
    return name


def one(folder, name, more=""):
    return listing(folder, f'[[clients.a.tasks]]\nfile = "{name}"\n{more}')


def told(path, *says):
    with pytest.raises(InputError) as caught:
        read_tasks(path)
    assert "\n" not in str(caught.value)
    for text in says:
        assert text in str(caught.value)


def test_the_example_runs(tmp_path):
    found = read_tasks(write_example(tmp_path / "mine"))
    assert found.network == "mlp"
    assert [task.name for task in found.tasks["siteA"]] == ["low", "high"]
    assert found.labels["siteA"][1] == ("5", "6", "7", "8", "9")
    assert found.labels["siteB"] == [("even", "odd"), ("0", "1", "2", "3", "4")]
    assert len(found.tasks["siteB"][1].test[1]) == 100
    first = found.tasks["siteA"][0]
    net = network(found.network, first.x, first.classes)
    clients = [Client(name, net, tasks, Learning(epochs=1, lr=5e-4)) for name, tasks in found.tasks.items()]
    counts = {name: len(tasks) for name, tasks in found.tasks.items()}
    server = Server(initial_base(net, Layout.of(net)), counts, rounds=1)
    simulate(clients, server)
    assert server.done
    assert all(0 <= accuracy <= 1 for client in clients for accuracy in client.evaluate())
    with pytest.raises(InputError, match="is there already"):
        write_example(tmp_path / "mine")


def test_arrays_are_standardised_by_their_training_part_and_nothing_is_in_two_parts(tmp_path):
    x, y = RANDOM.normal(3, 5, size=(100, 4)), np.repeat([7, -1, 30, 4], 25)
    npz(tmp_path, x=x, y=y)
    found = read_tasks(one(tmp_path, "a.npz"))
    task = found.tasks["a"][0]
    assert found.labels["a"] == [("-1", "4", "7", "30")]
    assert [len(task.y), len(task.test[1]), len(task.validation[1])] == [72, 20, 8]
    torch.testing.assert_close(task.x.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(task.x.std(0, correction=0), torch.ones(4))
    # Every row of the file is in one part, and its label is the one that it had.
    plain = read_tasks(one(tmp_path, "a.npz", 'scale = "none"')).tasks["a"][0]
    label = {row.tobytes(): str(value) for row, value in zip(x.astype(np.float32), y, strict=True)}
    seen = [
        (row.numpy().tobytes(), found.labels["a"][0][number])
        for rows, numbers in ((plain.x, plain.y), plain.test, plain.validation)
        for row, number in zip(rows, numbers.tolist(), strict=True)
    ]
    assert len(seen) == len(set(seen)) == 100
    assert all(label[row] == name for row, name in seen)
    assert plain.y.bincount().tolist() == [18] * 4
    assert plain.test[1].bincount().tolist() == [5] * 4


def test_the_seed_fixes_the_split(tmp_path):
    npz(tmp_path)
    one_, two, other = (
        read_tasks(listing(tmp_path, f'seed = {seed}\n[clients.a]\ntasks = ["a.npz"]')).tasks["a"][0]
        for seed in (1, 1, 2)
    )
    assert torch.equal(one_.x, two.x)
    assert not torch.equal(one_.x, other.x)


def test_tables_share_their_columns_and_texts_become_inputs(tmp_path):
    csv(tmp_path, "a.csv", ward=["north", "south"] * 10)
    frame = pd.DataFrame({"ward": ["east", None] * 8, "dose": 1.0, "age": [None, 3.0] * 8, "sick": ["n", "y"] * 8})
    frame.to_csv(tmp_path / "b.csv", index=False)
    path = listing(
        tmp_path,
        'test_share = 0.25\n[clients.a]\ntasks = ["a.csv"]\n[clients.b]\nlabel = "sick"\ntasks = ["b.csv"]',
    )
    found = read_tasks(path)
    assert found.labels == {"a": [("no", "yes")], "b": [("n", "y")]}
    # age, dose, and three wards.
    assert found.tasks["a"][0].x.shape[1:] == found.tasks["b"][0].x.shape[1:] == (5,)
    assert len(found.tasks["a"][0].test[1]) == 4
    assert bool(torch.isfinite(found.tasks["b"][0].x).all())
    (note,) = found.notes
    assert "b.csv" in note
    assert "missing inputs became the mean" in note
    read = found.inputs("b", 0, tmp_path / "b.csv")
    assert read.shape == (16, 5)
    assert {row.numpy().tobytes() for row in found.tasks["b"][0].x} <= {row.numpy().tobytes() for row in read}
    frame.drop(columns=["sick"]).to_csv(tmp_path / "unlabelled.csv", index=False)
    assert torch.equal(found.inputs("b", 0, tmp_path / "unlabelled.csv"), read)


def test_test_and_validation_files_are_used_as_they_are(tmp_path):
    csv(tmp_path, "a.csv")
    csv(tmp_path, "test.csv", rows=6)
    csv(tmp_path, "held.csv", rows=4)
    found = read_tasks(one(tmp_path, "a.csv", 'test = "test.csv"\nvalidation = "held.csv"\nname = "flu"'))
    task = found.tasks["a"][0]
    assert [len(task.y), len(task.test[1]), len(task.validation[1])] == [20, 6, 4]
    assert task.name == "flu"
    assert task.y.tolist() == [1, 0] * 10
    assert torch.equal(found.inputs("a", 0, tmp_path / "test.csv"), task.test[0])


def test_shares_of_zero_hold_nothing_out(tmp_path):
    npz(tmp_path)
    task = read_tasks(one(tmp_path, "a.npz", "test_share = 0\nvalidation_share = 0.0")).tasks["a"][0]
    assert (len(task.y), task.test, task.validation) == (20, None, None)


def test_one_example_of_a_class_stays_for_training(tmp_path):
    npz(tmp_path, x=np.eye(3), y=np.array(["a", "b", "c"]))
    found = read_tasks(one(tmp_path, "a.npz"))
    assert (len(found.tasks["a"][0].y), found.tasks["a"][0].test) == (3, None)
    assert any("too few examples to hold any out for test" in note for note in found.notes)


@pytest.mark.parametrize(
    ("shape", "expected"), [((20, 9, 7), (1, 9, 7)), ((20, 9, 7, 3), (3, 9, 7)), ((20, 2, 9, 7), (2, 9, 7))]
)
def test_arrays_of_bytes_are_images(tmp_path, shape, expected):
    x = RANDOM.integers(0, 256, shape).astype(np.uint8)
    npz(tmp_path, x=x)
    task = read_tasks(one(tmp_path, "a.npz", "test_share = 0\nvalidation_share = 0")).tasks["a"][0]
    assert task.x.shape[1:] == expected
    whole = x[:, None] if x.ndim == 3 else x.transpose(0, 3, 1, 2) if shape[3] == 3 else x
    torch.testing.assert_close(task.x, torch.from_numpy(whole.astype(np.float32) / 255))


def test_other_arrays_stay_as_they_are(tmp_path):
    x = RANDOM.normal(size=(20, 4, 5)).astype(np.float32)
    npz(tmp_path, x=x)
    task = read_tasks(one(tmp_path, "a.npz", "test_share = 0\nvalidation_share = 0")).tasks["a"][0]
    assert torch.equal(task.x, torch.from_numpy(x))


def pictures(folder, classes=("cat", "dog"), count=6):
    for shade, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (20, 12), (60 * shade + number, 0, 99)).save(folder / name / f"{number}.png")


def test_folders_of_pictures(tmp_path):
    pictures(tmp_path / "photos")
    found = read_tasks(one(tmp_path, "photos", "size = 16\nchannels = 1"))
    task = found.tasks["a"][0]
    assert found.labels["a"] == [("cat", "dog")]
    assert task.x.shape == (8, 1, 16, 16)
    assert 0 <= float(task.x.min()) <= float(task.x.max()) <= 1
    assert found.inputs("a", 0, tmp_path / "photos" / "dog").shape == (6, 1, 16, 16)
    assert found.inputs("a", 0, tmp_path / "photos" / "dog" / "1.png").shape == (1, 1, 16, 16)
    assert read_tasks(one(tmp_path, "photos")).tasks["a"][0].x.shape[1:] == (3, 32, 32)


def test_networks_beside_the_file_are_found_from_anywhere(tmp_path):
    npz(tmp_path)
    (tmp_path / "mine.py").write_text(
        "from torch import nn\ndef net(classes):\n    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, classes))\n"
    )
    found = read_tasks(listing(tmp_path, 'network = "mine.py:net"\n[clients.a]\ntasks = ["a.npz"]'))
    assert network(found.network, found.tasks["a"][0].x, 2)[0].in_features == 3
    assert read_tasks(listing(tmp_path, 'network = "p.q:f"\n[clients.a]\ntasks = ["a.npz"]')).network == "p.q:f"


def test_inputs_to_predict_are_checked(tmp_path):
    npz(tmp_path)
    npz(tmp_path, "wide.npz", x=np.zeros((2, 5)))
    np.savez(tmp_path / "new.npz", x=np.zeros((2, 3)))
    found = read_tasks(one(tmp_path, "a.npz"))
    assert found.inputs("a", 0, tmp_path / "new.npz").shape == (2, 3)
    with pytest.raises(InputError, match=r"wide.npz: inputs have the shape \(5,\), expected \(3,\)"):
        found.inputs("a", 0, tmp_path / "wide.npz")
    with pytest.raises(UnknownKeyError, match="no client 'b'; there are a"):
        found.inputs("b", 0, tmp_path / "new.npz")
    with pytest.raises(UnknownKeyError, match="has 1 tasks, not task 3"):
        found.inputs("a", 3, tmp_path / "new.npz")
    csv(tmp_path)
    with pytest.raises(InputError, match="give the same kind"):
        found.inputs("a", 0, tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "clients: is missing; add [clients.NAME]"),
        ("clients = 3", "clients: input should be a valid dictionary, got '3'"),
        ("[clients]", "clients: dictionary should have at least 1 item"),
        ("[clients.a]", "clients.a.tasks: is missing; add it"),
        ("[clients.a]\ntasks = []", "clients.a.tasks: list should have at least 1 item"),
        ("[clients.a]\ntasks = 'a.npz'", "clients.a.tasks: input should be a valid list"),
        ("[clients.a]\ntasks = [3]", "clients.a.tasks[0]: "),
        ("[clients.a]\ntasks = ['']", "clients.a.tasks[0].file: string should have at least 1 character"),
        ("[[clients.a.tasks]]\nname = 'x'", "clients.a.tasks[0].file: is missing"),
        (
            "[[clients.a.tasks]]\nfile = 'a'\nlable = 'x'",
            "clients.a.tasks[0]: no key 'lable'; did you mean 'label'?",
        ),
        ("[clients.a]\ntask = ['a.npz']", "clients.a: no key 'task'; did you mean 'tasks'?"),
        ("netwrk = 'mlp'\n[clients.a]\ntasks = ['a']", "no key 'netwrk'; did you mean 'network'?"),
        ("test_share = 1.0\n[clients.a]\ntasks = ['a']", "test_share: input should be less than 1, got '1.0'"),
        ("scale = 'minmax'\n[clients.a]\ntasks = ['a']", "scale: input should be 'standard' or 'none'"),
        ("[clients.a\n", "not valid TOML"),
        (f"[clients.{'n' * 65}]\ntasks = ['a']", "a client's name has 1 to 64 bytes"),
        ("[clients.a]\ntasks = ['gone.npz']", "gone.npz: "),
        ("[clients.a]\ntasks = ['gone']", "gone: no such file or folder"),
        ("[clients.a]\ntasks = ['tasks.toml']", "cannot tell what '.toml' is; give .npz, .csv"),
    ],
)
def test_wrong_listings_are_told_in_one_line(tmp_path, text, says):
    told(listing(tmp_path, text), "tasks.toml" if "gone" not in text else str(tmp_path), says)


def test_unreadable_listings_are_told(tmp_path):
    told(tmp_path / "none.toml", "none.toml: No such file or directory")
    told(tmp_path, str(tmp_path))
    (tmp_path / "bad.toml").write_bytes(b"\xff\xfe")
    told(tmp_path / "bad.toml", "byte 0 is not UTF-8")


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"x": np.zeros(20)}, "x is float64 (20,), expected numbers (examples, ...)"),
        ({"x": np.zeros((0, 3)), "y": np.zeros(0)}, "x is float64 (0, 3)"),
        ({"x": np.full((20, 3), "a")}, "x is <U1 (20, 3), expected numbers"),
        ({"x": np.full((20, 3), np.inf)}, "row 1: x is inf at (0,); expected finite"),
        ({"x": np.full((20, 3, 2), np.nan)}, "row 1: x is nan at (0, 0)"),
        ({"y": np.arange(19)}, "y has the shape (19,), expected (20,)"),
        ({"y": np.zeros((20, 2))}, "y has the shape (20, 2)"),
        ({"y": np.zeros(20)}, "has the single class '0'; a task needs at least two"),
        ({"y": np.linspace(0, 1, 20)}, "row 2: y is 0.0526316, expected whole numbers or text"),
        ({"y": np.where(np.arange(20) == 4, np.nan, 1.0)}, "row 5: y is nan"),
        ({"y": np.array([{}] * 20)}, "holds Python objects, which are never unpickled"),
        ({"y": np.arange(20).astype("complex")}, "y is complex128"),
    ],
)
def test_wrong_arrays_are_told_in_one_line(tmp_path, arrays, says):
    npz(tmp_path, **arrays)
    told(one(tmp_path, "a.npz"), "a.npz: ", says)


def test_wrong_arrays_by_other_rules(tmp_path):
    np.savez(tmp_path / "only.npz", z=np.zeros(3))
    told(one(tmp_path, "only.npz"), "has no array 'x'", "found z (3,)")
    np.savez(tmp_path / "only.npz", x=np.zeros((3, 3)))
    told(one(tmp_path, "only.npz"), "has no array 'y'")
    (tmp_path / "text.npz").write_text("hello")
    told(one(tmp_path, "text.npz"), "text.npz: is not an NPZ file")
    npz(tmp_path)
    cut = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(cut[: len(cut) // 2])
    told(one(tmp_path, "cut.npz"), "cut.npz: not a whole NPZ file")
    npz(tmp_path, x=np.where(np.arange(60).reshape(20, 3) == 31, np.nan, 1.0))
    told(one(tmp_path, "a.npz", 'scale = "none"'), "row 11, input 2 is missing", "leave out scale")


def test_hostile_arrays_are_refused_before_they_are_read(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (2**45,)})
    with zipfile.ZipFile(tmp_path / "huge.npz", "w") as archive:
        archive.writestr("x.npy", header.getvalue() + b"0" * 64)
        archive.writestr("y.npy", header.getvalue() + b"0" * 64)
    told(one(tmp_path, "huge.npz"), "huge.npz: not a whole NPZ file")


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"label": ["yes"] * 20}, "single class, 'yes'"),
        ({"label": ["yes", "no"] * 9 + ["yes", None]}, "row 20: has no label in column 'label'"),
        ({"age": [1.0] * 19 + ["old"]}, "row 20, column 'age': 'old' is not a number"),
        ({"age": [1.0] * 19 + [np.inf]}, "row 20, column 'age' is infinite"),
        ({"dose": [f"text {number}" for number in range(20)] * 1, "age": list("abcdefghijklmnopqrst")}, ""),
    ],
)
def test_wrong_tables_are_told_in_one_line(tmp_path, columns, says):
    csv(tmp_path, **columns)
    if says:
        told(one(tmp_path, "a.csv"), "a.csv: ", says)
    else:
        assert read_tasks(one(tmp_path, "a.csv")).tasks["a"][0].x.shape[1:] == (40,)


def test_tables_that_do_not_go_together_are_told(tmp_path):
    csv(tmp_path, "a.csv")
    csv(tmp_path, "b.csv", extra=1.0)
    both = '[clients.a]\ntasks = ["{}"]\n[clients.b]\ntasks = ["{}"]'
    told(listing(tmp_path, both.format("a.csv", "b.csv")), "a.csv: no column 'extra', which ", "b.csv has")
    told(listing(tmp_path, both.format("b.csv", "a.csv")), "a.csv: no column 'extra', which ", "b.csv has")
    csv(tmp_path, "c.csv", dose=["low", "high"] * 10)
    told(listing(tmp_path, both.format("a.csv", "c.csv")), "c.csv: column 'dose' holds text, and in ", "a.csv numbers")
    told(listing(tmp_path, both.format("c.csv", "a.csv")), "c.csv: column 'dose' holds text, and in ", "a.csv numbers")
    told(
        one(tmp_path, "a.csv", 'label = "sick"'), "a.csv: no column 'sick' for the labels", "there are age, dose, label"
    )
    npz(tmp_path, "wide.npz", x=np.zeros((20, 5)))
    told(
        listing(tmp_path, both.format("a.csv", "wide.npz")),
        "wide.npz: inputs have the shape (5,), and those of",
        "(2,); all clients share one network",
    )


def test_wrong_test_files_are_told(tmp_path):
    csv(tmp_path, "a.csv")
    csv(tmp_path, "t.csv", rows=4, label=["yes", "no", "perhaps", "no"])
    told(
        one(tmp_path, "a.csv", 'test = "t.csv"'),
        "t.csv: row 3: the label 'perhaps' never occurs in",
        "known are no, yes",
    )
    npz(tmp_path, "t.npz", x=np.zeros((20, 9)), y=np.array(["yes", "no"] * 10))
    told(one(tmp_path, "a.csv", 'test = "t.npz"'), "t.npz: inputs have the shape (9,), and those of")
    npz(tmp_path, "a.npz")
    told(one(tmp_path, "a.npz", 'test = "t.csv"'), "t.csv: is a table", "give the same kind")


def test_damaged_pictures_are_told(tmp_path):
    pictures(tmp_path / "photos")
    (tmp_path / "photos" / "cat" / "bad.png").write_bytes(b"no picture")
    told(one(tmp_path, "photos"), "bad.png: not a readable image")
    pictures(tmp_path / "single", classes=("cat",))
    told(one(tmp_path, "single"), "single: has 1 classes of images")


def test_an_unwritable_folder_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        write_example(tmp_path / "file" / "inner")
