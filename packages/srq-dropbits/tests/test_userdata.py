from __future__ import annotations

import gzip
import json
import pickle
import sys
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits, load_wine

from shared_core.errors import InputError
from srq_dropbits.userdata import InputFormat, LabelledData, load_images_or_table, read_rows


def write(path, text):
    path.write_text(text)
    return path


def one_line(caught, *words):
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text


def idx(array, code=0x08):
    return bytes([0, 0, code, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def mnist_folder(folder, rows=20, test=6, classes=4, zipped=False):
    folder.mkdir()
    random = np.random.default_rng(0)
    for stem, n in (("train", rows), ("t10k", test)):
        if not n:
            continue
        images = random.integers(0, 256, (n, 5, 5)).astype(np.uint8)
        labels = (np.arange(n) % classes).astype(np.uint8)
        for name, array in ((f"{stem}-images-idx3-ubyte", images), (f"{stem}-labels-idx1-ubyte", labels)):
            content = gzip.compress(idx(array)) if zipped else idx(array)
            (folder / f"{name}{'.gz' if zipped else ''}").write_bytes(content)
    return folder


class TestNamedSets:
    def test_digits_are_images_in_0_to_1(self):
        data = load_images_or_table("digits")
        expected = load_digits()
        np.testing.assert_allclose(data.x[:, 0], expected.images / 16, rtol=1e-6)
        assert (data.y == expected.target).all()
        assert data.class_names == tuple("0123456789")

    def test_wine_is_a_table_with_names(self):
        data = load_images_or_table("wine")
        np.testing.assert_allclose(data.x, load_wine().data, rtol=1e-6)
        assert data.feature_names[0] == "alcohol"
        assert data.classes == 3

    def test_mnist_has_its_official_test_part(self, data_folder):
        data = load_images_or_table("mnist", limit=200, test_limit=100)
        assert data.x.shape == (200, 1, 28, 28)
        assert data.x_test is not None
        assert data.x_test.shape == (100, 1, 28, 28)
        assert np.bincount(data.y).tolist() == pytest.approx([20] * 10, abs=3)

    def test_cifar10_is_channels_first(self, data_folder):
        data = load_images_or_table("cifar10", limit=100)
        assert data.x.shape == (100, 3, 32, 32)
        assert 0 <= data.x.min() < data.x.max() <= 1
        assert "airplane" in data.class_names

    def test_size_averages_areas(self):
        data = load_images_or_table("digits", size=4)
        expected = (load_digits().images / 16).reshape(-1, 4, 2, 4, 2).mean((2, 4))
        np.testing.assert_allclose(data.x[:, 0], expected, atol=1e-6)

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("digit", ["did you mean 'digits'"]),
            ("diabetes", ["regression table"]),
            ("movielens-100k", ["no images, and no table"]),
            ("absent.csv", ["absent.csv", "No such file"]),
            ("a/b", ["cannot tell"]),
        ],
    )
    def test_unknown_ones(self, name, words):
        with pytest.raises(InputError) as caught:
            load_images_or_table(name)
        one_line(caught, *words)


class TestTables:
    @pytest.mark.parametrize("suffix", ["csv", "csv.gz", "tsv"])
    def test_header_names_and_target(self, tmp_path, suffix):
        separator = "\t" if suffix == "tsv" else ","
        rows = [["width", "kind", "height"], ["1", "oak", "2"], ["3", "ash", "4.5"], ["5", "oak", "6"]]
        text = "".join(separator.join(row) + "\n" for row in rows)
        path = tmp_path / f"trees.{suffix}"
        path.write_bytes(gzip.compress(text.encode()) if suffix.endswith("gz") else text.encode())
        data = load_images_or_table(path, target="kind")
        assert data.feature_names == ("width", "height")
        assert data.class_names == ("ash", "oak")
        assert data.x.tolist() == [[1, 2], [3, 4.5], [5, 6]]
        assert data.y.tolist() == [1, 0, 1]
        assert (data.name, data.target) == ("trees", "kind")

    def test_without_a_header_the_label_is_last(self, tmp_path):
        data = load_images_or_table(write(tmp_path / "d.csv", "1;2;b\n3;4;a\n\n5;6;a\n"))
        assert data.class_names == ("a", "b")
        assert data.y.tolist() == [1, 0, 0]
        assert data.x.tolist() == [[1, 2], [3, 4], [5, 6]]
        assert data.feature_names == ()

    def test_without_a_header_the_label_may_be_in_any_column(self, tmp_path):
        data = load_images_or_table(write(tmp_path / "d.csv", "b,1\na,2\n"), target="1")
        assert data.class_names == ("a", "b")
        assert data.x.tolist() == [[1], [2]]

    def test_numbers_are_ordered_by_value(self, tmp_path):
        text = "".join(f"{i},{i % 11}\n" for i in range(44))
        assert load_images_or_table(write(tmp_path / "d.csv", text)).class_names == tuple(map(str, range(11)))

    def test_pixels_become_images(self, tmp_path):
        x = np.arange(8 * 4).reshape(8, 4)
        text = "".join(",".join(map(str, [*row, i % 2])) + "\n" for i, row in enumerate(x))
        data = load_images_or_table(write(tmp_path / "d.csv", text), size=2)
        assert data.x.tolist() == x.reshape(8, 1, 2, 2).tolist()

    @pytest.mark.parametrize(
        ("text", "options", "words"),
        [
            ("a,b,y\n1,2,0\n1,oops,1\n", {}, ["line 3", "column 2 ('b')", "'oops'"]),
            ("1,2,0\n\n1,oops,1\n", {}, ["line 3, column 2", "'oops'"]),
            ("a,b,y\n1,,0\n1,2,1\n", {}, ["line 2", "column 2 ('b')", "missing"]),
            ("a,b,y\n1,inf,0\n1,2,1\n", {}, ["line 2", "'inf'"]),
            ("a,b,y\n1,nan,0\n1,2,1\n", {}, ["line 2", "missing"]),
            ("a,b,y\n1,2,0\n1,2,\n", {}, ["line 3", "column 3 ('y')", "label is missing"]),
            ("a,b,y\n1,2\n", {}, ["line 2 has 2 values for 3 columns"]),
            ("a,a,y\n1,2,0\n", {}, ["column 'a' occurs twice"]),
            ("a,b,y\n", {}, ["no rows below"]),
            ("", {}, ["empty"]),
            ("a,b,y\n1,2,0\n1,2,0\n", {}, ["all rows are of class '0'"]),
            ("a,b,y\n1,2,0\n1,2,1\n1,2,3\n", {}, ["line 4", "class 3 follows 1"]),
            ("a,b,y\n1,2,0.5\n1,2,1\n", {}, ["line 2", "0.5 is a measurement"]),
            ("a,b,label\n1,2,0\n", {"target": "lable"}, ["no column 'lable'", "did you mean 'label'"]),
            ("1,2,0\n1,2,1\n", {"target": "y"}, ["no column 'y'", "no header", "1 to 3"]),
            ("y\n0\n1\n", {}, ["no column beside the labels"]),
            ("a,b,y\n1,2,0\n1,2,1\n", {"size": 3}, ["no images of 3 x 3"]),
            ("".join(f"1,{i}\n" for i in range(99)), {}, ["99 different values"]),
        ],
    )
    def test_faults_name_line_and_column(self, tmp_path, text, options, words):
        path = write(tmp_path / "table.csv", text)
        with pytest.raises(InputError) as caught:
            load_images_or_table(path, **options)
        one_line(caught, *words)

    def test_gaps_can_be_allowed(self, tmp_path):
        data = load_images_or_table(write(tmp_path / "d.csv", "1,7\n1,3\n1,7\n"), allow_gaps=True)
        assert data.class_names == ("3", "7")
        assert data.y.tolist() == [1, 0, 1]

    @pytest.mark.parametrize(
        ("name", "content"),
        [("d.csv", b"\xff\xfe\x00a,b"), ("d.csv.gz", b"\x1f\x8b\x08 broken"), ("d.npz", b"PK broken"), ("d.xls", b"")],
    )
    def test_damaged_and_unknown_files(self, tmp_path, name, content):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError) as caught:
            load_images_or_table(tmp_path / name)
        one_line(caught, name)


class TestArrays:
    @pytest.mark.parametrize(
        ("shape", "expected"),
        [
            ((6, 5), (6, 5)),
            ((6, 8, 8), (6, 1, 8, 8)),
            ((6, 8, 8, 3), (6, 3, 8, 8)),
            ((6, 3, 8, 8), (6, 3, 8, 8)),
            ((6, 1, 8, 8), (6, 1, 8, 8)),
        ],
    )
    def test_images_get_their_channels_first(self, tmp_path, shape, expected):
        x = np.random.default_rng(0).random(shape)
        np.savez(tmp_path / "d.npz", x=x, y=np.arange(6) % 2)
        data = load_images_or_table(tmp_path / "d.npz")
        assert data.x.shape == expected
        moved = x.transpose(0, 3, 1, 2) if shape[-1] == 3 and len(shape) == 4 else x.reshape(expected)
        np.testing.assert_allclose(data.x, moved.astype(np.float32))

    def test_bytes_of_images_are_scaled_to_1(self, tmp_path):
        np.savez(tmp_path / "d.npz", x=np.full((4, 2, 2), 255, np.uint8), y=np.array(["b", "a", "b", "a"]))
        data = load_images_or_table(tmp_path / "d.npz")
        assert (data.x == 1).all()
        assert data.class_names == ("a", "b")

    def test_official_test_part_under_the_usual_names(self, tmp_path):
        x, y = np.random.default_rng(0).random((12, 3)), np.arange(12) % 3
        np.savez(tmp_path / "d.npz", x_train=x, y_train=y, x_test=x[:4], y_test=y[:4])
        data = load_images_or_table(tmp_path / "d.npz")
        np.testing.assert_allclose(data.x_test, x[:4].astype(np.float32))
        parts = data.split(0, test=0.5, validation=0.25)
        assert (len(parts.y_test), len(parts.y_validation), len(parts.y_train)) == (4, 3, 9)

    @pytest.mark.parametrize(
        ("arrays", "words"),
        [
            ({"x": np.zeros((4, 2))}, ["needs arrays 'x' and 'y'", "x (4, 2)"]),
            ({"x": np.zeros((4, 2)), "y": np.zeros(3)}, ["'y' must be a label a row"]),
            ({"x": np.zeros(4), "y": np.zeros(4)}, ["'x' must be rows"]),
            ({"x": np.array([[1.0, np.nan], [1, 2]]), "y": [0, 1]}, ["row 1, column 2", "nan"]),
            ({"x": np.zeros((2, 2)), "y": [0.0, np.nan]}, ["row 2", "label is missing"]),
            ({"x": np.zeros((2, 2)), "y": ["a", ""]}, ["row 2", "label is missing"]),
            ({"x": np.zeros((3, 2)), "y": [0, 1, 4]}, ["row 3", "class 4 follows 1"]),
            ({"x": np.zeros((0, 2)), "y": np.zeros(0)}, ["no rows"]),
            ({"x": np.zeros((2, 2)), "y": [1, 1]}, ["all rows are of class '1'"]),
            ({"x": np.zeros((2, 2)), "y": [0, 1], "x_test": np.zeros((1, 2)), "y_test": [2]}, ["row 1: class '2'"]),
            ({"x": np.zeros((2, 2)), "y": [0, 1], "x_test": np.zeros((1, 3)), "y_test": [1]}, ["test part", "(2,)"]),
            ({"x": np.array([[{}]]), "y": [0]}, ["d.npz"]),
        ],
    )
    def test_faults(self, tmp_path, arrays, words):
        np.savez(tmp_path / "d.npz", **arrays)
        with pytest.raises(InputError) as caught:
            load_images_or_table(tmp_path / "d.npz")
        one_line(caught, *words)


class TestFolders:
    @pytest.mark.parametrize("zipped", [False, True])
    def test_idx_files_in_a_folder_of_any_name(self, tmp_path, zipped):
        data = load_images_or_table(mnist_folder(tmp_path / "mine", zipped=zipped))
        assert (data.name, data.classes, data.x.shape) == ("mine", 4, (20, 1, 5, 5))
        assert data.x_test is not None
        assert data.x_test.shape == (6, 1, 5, 5)

    def test_idx_without_a_test_part(self, tmp_path):
        assert load_images_or_table(mnist_folder(tmp_path / "mine", test=0)).x_test is None

    @pytest.mark.parametrize(
        ("damage", "words"), [(lambda b: b[:-3], ["asks for 516 bytes", "has 513"]), (lambda b: b"\1" + b[1:], ["IDX"])]
    )
    def test_damaged_idx(self, tmp_path, damage, words):
        folder = mnist_folder(tmp_path / "mine")
        path = folder / "train-images-idx3-ubyte"
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(InputError) as caught:
            load_images_or_table(folder)
        one_line(caught, "train-images-idx3-ubyte", *words)

    @pytest.mark.parametrize("kind", ["binary", "python"])
    def test_cifar_files_in_a_folder_of_any_name(self, tmp_path, kind):
        folder = tmp_path / "photos"
        folder.mkdir()
        random = np.random.default_rng(0)
        pixels, labels = random.integers(0, 256, (12, 3072)).astype(np.uint8), np.arange(12) % 10
        for name in ("data_batch_1", "test_batch"):
            if kind == "binary":
                records = np.concatenate([labels[:, None].astype(np.uint8), pixels], axis=1)
                (folder / f"{name}.bin").write_bytes(records.tobytes())
            else:
                (folder / name).write_bytes(pickle.dumps({b"data": pixels, b"labels": labels.tolist()}))
        data = load_images_or_table(folder)
        np.testing.assert_allclose(data.x, pixels.reshape(12, 3, 32, 32) / np.float32(255), rtol=1e-6)
        assert data.y.tolist() == labels.tolist()
        assert "partial: 12" in data.notes
        assert data.x_test is not None

    def test_a_hostile_pickle_is_refused(self, tmp_path):
        class Hostile:
            def __reduce__(self):
                return print, ("run",)

        (tmp_path / "data_batch_1").write_bytes(pickle.dumps(Hostile()))
        with pytest.raises(InputError, match="refused"):
            load_images_or_table(tmp_path)

    def test_a_folder_without_any(self, tmp_path):
        with pytest.raises(InputError, match=r"expected train/<class>/\*\.png"):
            load_images_or_table(tmp_path)


def picture_folder(root, parts=("train",), size=(6, 6), mode="RGB"):
    image = pytest.importorskip("PIL.Image")
    for part in parts:
        for number, name in enumerate(("cat", "dog")):
            folder = root / part / name
            folder.mkdir(parents=True)
            for copy in range(4):
                value = 40 * number + copy
                colour = (value, 10, 20) if mode == "RGB" else value
                image.new(mode, size, colour).save(folder / f"{copy}.png")
    return root


class TestPictures:
    @pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1)])
    def test_folders_are_classes(self, tmp_path, mode, channels):
        data = load_images_or_table(picture_folder(tmp_path / "pets", mode=mode))
        assert data.class_names == ("cat", "dog")
        assert data.x.shape == (8, channels, 6, 6)
        np.testing.assert_allclose(data.x[:, 0, 0, 0] * 255, [0, 1, 2, 3, 40, 41, 42, 43], atol=1e-4)
        assert data.y.tolist() == [0] * 4 + [1] * 4

    @pytest.mark.parametrize(
        ("parts", "validation", "test"),
        [
            (("train",), None, None),
            (("train", "val"), None, 8),
            (("train", "test"), None, 8),
            (("train", "val", "test"), 8, 8),
        ],
    )
    def test_parts(self, tmp_path, parts, validation, test):
        data = load_images_or_table(picture_folder(tmp_path / "pets", parts))
        assert (data.y_validation is None) == (validation is None)
        assert (data.y_test is None) == (test is None)

    def test_classes_at_the_top(self, tmp_path):
        folder = picture_folder(tmp_path, ("pets",)) / "pets"
        assert load_images_or_table(folder).class_names == ("cat", "dog")

    def test_size_and_limit(self, tmp_path):
        data = load_images_or_table(picture_folder(tmp_path / "pets"), size=3, limit=4)
        assert data.x.shape == (4, 3, 3, 3)
        assert sorted(data.y.tolist()) == [0, 0, 1, 1]

    def test_different_sizes_ask_for_one(self, tmp_path):
        folder = picture_folder(tmp_path / "pets")
        picture_folder(tmp_path / "other", size=(5, 6))
        (tmp_path / "other/train/dog/0.png").rename(folder / "train/dog/9.png")
        with pytest.raises(InputError) as caught:
            load_images_or_table(folder)
        one_line(caught, "9.png", "5 x 6", "--size")
        assert load_images_or_table(folder, size=6).x.shape == (9, 3, 6, 6)

    def test_damaged_file(self, tmp_path):
        folder = picture_folder(tmp_path / "pets")
        (folder / "train/cat/1.png").write_bytes(b"no image")
        with pytest.raises(InputError) as caught:
            load_images_or_table(folder)
        one_line(caught, "1.png", "not a readable image")

    def test_a_class_that_was_not_trained(self, tmp_path):
        folder = picture_folder(tmp_path / "pets", ("train", "test"))
        (folder / "test/dog").rename(folder / "test/wolf")
        with pytest.raises(InputError) as caught:
            load_images_or_table(folder)
        one_line(caught, "no class 'wolf'")

    def test_says_what_to_install(self, tmp_path, monkeypatch):
        folder = picture_folder(tmp_path / "pets")
        monkeypatch.setitem(sys.modules, "PIL.Image", None)
        with pytest.raises(InputError, match=r"pip install 'srq-dropbits\[images\]'"):
            load_images_or_table(folder)


def labelled(counts, features=2, seed=0):
    y = np.repeat(np.arange(len(counts)), counts)
    x = np.random.default_rng(seed).normal(3, 2, (len(y), features)).astype(np.float32)
    x[:, 0] = np.arange(len(y))
    return LabelledData("toy", x, y, tuple(map(str, range(len(counts)))))


class TestSplit:
    @settings(max_examples=40, deadline=None)
    @given(
        st.lists(st.integers(1, 40), min_size=2, max_size=6),
        st.integers(0, 99),
        st.floats(0, 0.4),
        st.floats(0, 0.4),
    )
    def test_parts_are_disjoint_and_have_the_classes_in_their_shares(self, counts, seed, validation, test):
        data = labelled(counts)
        parts = data.split(seed, validation=validation, test=test)
        rows = {}
        for part in ("train", "validation", "test"):
            x, y = getattr(parts, f"x_{part}"), getattr(parts, f"y_{part}")
            # The first feature is the number of the row.
            numbers = (x[:, 0] * parts.inputs.std[0] + parts.inputs.mean[0]).round().long()
            assert torch.equal(torch.from_numpy(data.y)[numbers], y)
            rows[part] = numbers.tolist()
        assert sorted(chain.from_iterable(rows.values())) == list(range(len(data.y)))
        assert set(parts.y_train.tolist()) == set(range(len(counts)))
        for part, share in (("validation", validation), ("test", test)):
            found = np.bincount(data.y[rows[part]], minlength=len(counts))
            assert (np.abs(found - np.array(counts) * share) <= 1.5).all()

    def test_depends_on_the_seed_alone(self):
        data = load_images_or_table("digits", limit=200)
        first, same, other = (data.split(seed) for seed in (1, 1, 2))
        assert torch.equal(first.x_train, same.x_train)
        assert not torch.equal(first.x_train, other.x_train)

    def test_scaling_is_learned_on_training_rows(self):
        parts = labelled([50, 50], 3).split(0)
        torch.testing.assert_close(parts.x_train.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
        torch.testing.assert_close(parts.x_train.std(0, correction=0), torch.ones(3))
        assert parts.x_test.mean(0).abs().max() > 1e-3

    def test_images_are_scaled_by_channel(self):
        x = np.random.default_rng(0).random((40, 3, 4, 4), dtype=np.float32) * np.array([1, 2, 3]).reshape(3, 1, 1)
        data = LabelledData("toy", x.astype(np.float32), np.arange(40) % 2, ("a", "b"))
        parts = data.split(0)
        assert len(parts.inputs.mean) == 3
        torch.testing.assert_close(parts.x_train.std((0, 2, 3), correction=0), torch.ones(3))

    def test_what_does_not_vary_is_only_moved(self):
        x = np.full((10, 2), 0.1, dtype=np.float32)
        parts = LabelledData("toy", x, np.arange(10) % 2, ("a", "b")).split(0)
        assert parts.x_train.abs().max() < 1e-6

    def test_bad_shares(self):
        with pytest.raises(InputError, match="validation: a share"):
            labelled([5, 5]).split(validation=1.0)

    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.integers(1, 60), min_size=2, max_size=6), st.integers(6, 100), st.integers(0, 9))
    def test_limit_keeps_every_class_in_its_share(self, counts, rows, seed):
        data = labelled(counts)
        part = data.limit(rows, seed)
        assert len(part.y) == min(rows, len(data.y))
        assert set(part.y.tolist()) == set(range(len(counts)))
        exact = np.array(counts) * len(part.y) / len(data.y)
        # A rare class that is kept anyway takes its row from the largest.
        assert (np.abs(np.bincount(part.y) - exact) <= len(counts)).all()

    def test_limit_below_the_number_of_classes(self):
        with pytest.raises(InputError, match="cannot hold 3 classes"):
            labelled([5, 5, 5]).limit(2)

    def test_input_format_survives_json(self):
        inputs = labelled([5, 5]).split(0).inputs
        assert InputFormat.from_dict(json.loads(json.dumps(inputs.to_dict()))) == inputs


class TestReadRows:
    inputs = InputFormat((2,), (1.0, 10.0), (2.0, 1.0), ("no", "yes"), ("a", "b"), "y")

    @pytest.mark.parametrize(
        "text", ["a,b\n3,11\n", "b,id,a\n11,7,3\n", "a,b,y\n3,11,yes\n", "3,11\n", "3,11,yes\n", "y,a,b\nno,3,11\n"]
    )
    def test_finds_columns(self, tmp_path, text):
        assert read_rows(write(tmp_path / "d.csv", text), self.inputs).tolist() == [[1, 1]]

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("a,bb\n1,2\n", ["no column 'b'", "there are a, bb"]),
            ("1,2,3,4\n", ["4 columns", "trained on 2"]),
            ("a,b\n1,x\n", ["line 2", "'x'"]),
        ],
    )
    def test_faults(self, tmp_path, text, words):
        with pytest.raises(InputError) as caught:
            read_rows(write(tmp_path / "d.csv", text), self.inputs)
        one_line(caught, *words)

    def test_round_trip_of_a_training_table(self, tmp_path):
        data = load_images_or_table("wine")
        names = ",".join([*(name.replace(",", " ") for name in data.feature_names), "kind"])
        lines = [",".join([*map(repr, map(float, row)), str(label)]) for row, label in zip(data.x, data.y, strict=True)]
        path = write(tmp_path / "wine.csv", "\n".join([names, *lines]))
        parts = load_images_or_table(path, target="kind").split(0)
        torch.testing.assert_close(read_rows(path, parts.inputs), parts.inputs.apply(data.x))

    def test_arrays(self, tmp_path):
        image = InputFormat((1, 4, 4), (0.5,), (0.25,), ("a", "b"))
        x = np.random.default_rng(0).random((3, 4, 4)).astype(np.float32)
        np.savez(tmp_path / "d.npz", x=x)
        torch.testing.assert_close(read_rows(tmp_path / "d.npz", image)[:, 0], torch.from_numpy((x - 0.5) / 0.25))
        np.savez(tmp_path / "d.npz", x=x.reshape(3, 16))
        torch.testing.assert_close(read_rows(tmp_path / "d.npz", image)[:, 0], torch.from_numpy((x - 0.5) / 0.25))

    @pytest.mark.parametrize("x", [np.zeros((0, 2)), np.zeros((3, 5)), np.full((2, 2), np.nan)])
    def test_arrays_that_do_not_fit(self, tmp_path, x):
        np.savez(tmp_path / "d.npz", x=x)
        with pytest.raises(InputError, match=r"d\.npz"):
            read_rows(tmp_path / "d.npz", self.inputs)

    def test_pictures_are_resized_and_made_grey(self, tmp_path):
        folder = picture_folder(tmp_path)
        grey = InputFormat((1, 3, 3), (0.0,), (1.0,), ("a", "b"))
        assert read_rows(folder, grey).shape == (8, 1, 3, 3)
        assert read_rows(folder / "train/cat/0.png", grey).shape == (1, 1, 3, 3)
        with pytest.raises(InputError, match="not on square images"):
            read_rows(folder, self.inputs)
