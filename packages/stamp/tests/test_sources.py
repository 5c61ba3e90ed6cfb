from __future__ import annotations

import gzip
import pickle
import warnings

import numpy as np
import pytest
import torch
from scipy.io import savemat

from shared_core.data import MissingFilesError
from shared_core.errors import InputError
from stamp.examples import DataError
from stamp.sources import SPLITS, read_examples

PARTS = ("train", "validation", "test")


def splits(source, **options):
    return {part: read_examples(source, split=part, **options) for part in SPLITS}


def rows(examples):
    return [tuple(row) for row in torch.cat([examples.x.flatten(1).double(), examples.y[:, None]], 1).tolist()]


def check_disjoint(parts, shares=(0.64, 0.16, 0.2)):
    """Together the three are all, none is in two, and each has its share of each class."""
    found = [row for part in PARTS for row in rows(parts[part])]
    assert sorted(found) == sorted(rows(parts["all"]))
    if len(set(rows(parts["all"]))) == len(parts["all"]):
        assert len(set(found)) == len(found)
    for part, share in zip(PARTS, shares, strict=True):
        assert (parts[part].counts - share * parts["all"].counts).abs().max() <= 1.5
        assert parts[part].class_names == parts["all"].class_names


def marked(n=30, classes=3, shape=(3, 8, 8), seed=0):
    x = np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)
    return x, np.arange(n) % classes


def save_picture(path, pixels):
    image = pytest.importorskip("PIL.Image", reason="needs pillow: pip install 'shared-core[glyphs]'")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.fromarray(pixels).save(path)


@pytest.mark.parametrize("layout", ["channels first", "channels last", "grey", "flat", "two channels"])
def test_arrays_of_every_layout_are_divided_by_images(layout, tmp_path):
    shape = {"grey": (1, 8, 8), "two channels": (2, 8, 8), "flat": (7,)}.get(layout, (3, 8, 8))
    x, y = marked(shape=shape)
    stored = {"channels last": x.transpose(0, 2, 3, 1), "grey": x[:, 0]}.get(layout, x) if x.ndim == 4 else x
    np.savez(tmp_path / "mine.npz", X=stored, y=y.astype(np.int32))
    parts = splits(tmp_path / "mine.npz")
    assert np.array_equal(parts["all"].x.numpy(), x)
    assert parts["all"].y.tolist() == y.tolist()
    assert parts["all"].class_names == ("0", "1", "2")
    assert parts["all"].name == "mine"
    check_disjoint(parts)
    again = read_examples(tmp_path / "mine.npz", split="test", seed=1)
    assert sorted(rows(again)) != sorted(rows(parts["test"]))


def test_arrays_with_official_parts_names_and_text_labels(tmp_path):
    x, _ = marked(40)
    y = np.array(["cat", "dog"])[np.arange(40) % 2]
    np.savez(tmp_path / "a.npz", x_train=x[:30], y_train=y[:30], x_test=x[30:], y_test=y[30:])
    parts = splits(tmp_path / "a.npz")
    assert np.array_equal(parts["test"].x, x[30:])
    assert parts["train"].class_names == ("cat", "dog")
    assert [parts["test"].class_names[k] for k in parts["test"].y] == y[30:].tolist()
    assert (len(parts["train"]), len(parts["validation"]), len(parts["all"])) == (24, 6, 40)
    np.savez(tmp_path / "b.npz", x=x[:6], y=np.array([0, 2, 2, 0, 2, 0]), class_names=np.array(["a", "b", "c"]))
    named = read_examples(tmp_path / "b.npz", split="all")
    assert named.class_names == ("a", "b", "c")
    assert named.y.tolist() == [0, 2, 2, 0, 2, 0]
    np.savez(tmp_path / "c.npz", x=x[:6], y=np.array([-1, 1, -1, 1, 1, -1]))
    numbered = read_examples(tmp_path / "c.npz", split="all")
    assert (numbered.class_names, numbered.y.tolist()) == (("-1", "1"), [0, 1, 0, 1, 1, 0])


def test_floats_stay_and_integers_become_bytes(tmp_path):
    x, y = marked()
    np.savez(tmp_path / "f.npz", x=x / 255, y=y)
    np.savez(tmp_path / "i.npz", x=x.astype(np.int64), y=y)
    floats, integers = read_examples(tmp_path / "f.npz"), read_examples(tmp_path / "i.npz")
    assert floats.x.dtype == torch.float32
    assert integers.x.dtype == torch.uint8
    assert torch.allclose(floats.inputs(), integers.inputs())


def write_table(path, x, labels, header=None, delimiter=","):
    lines = [delimiter.join([*map(str, row.tolist()), str(label)]) for row, label in zip(x, labels, strict=True)]
    text = "\n".join([*([delimiter.join(header)] if header else []), *lines]) + "\n"
    (gzip.open if path.suffix == ".gz" else open)(path, "wt").write(text)


@pytest.mark.parametrize(("name", "delimiter"), [("t.csv", ","), ("t.tsv", "\t"), ("t.dat", " "), ("t.csv.gz", ";")])
@pytest.mark.parametrize("header", [None, ("a", "b", "c", "class")])
def test_tables_are_standardised_by_their_training_part(name, delimiter, header, tmp_path):
    x = np.random.default_rng(0).normal(5, 3, (50, 3)).round(3)
    x[:, 2] = 7
    write_table(tmp_path / name, x, np.arange(50) % 2 + 1, header, delimiter)
    parts = splits(tmp_path / name)
    assert parts["all"].class_names == ("1", "2")
    check_disjoint(parts)
    train = parts["train"].x.double()
    assert train.mean(0).abs().max() < 1e-5
    assert (train[:, :2].std(0, correction=0) - 1).abs().max() < 1e-4
    raw = x[:, :2]
    back = parts["all"].x[:, :2].double().numpy()
    slope = (raw[0] - raw[1]) / (back[0] - back[1])
    assert np.allclose(raw, raw[0] + (back - back[0]) * slope, atol=1e-3)
    assert not parts["all"].x[:, 2].any()


def test_tables_of_pixels_become_images(tmp_path):
    x = np.random.default_rng(0).integers(0, 17, (30, 64))
    write_table(tmp_path / "optdigits.dat", x, np.arange(30) % 10)
    found = read_examples(tmp_path / "optdigits.dat", split="all", size=8)
    assert found.shape == (1, 8, 8)
    assert np.array_equal(found.x.numpy(), np.rint(x * 255 / 16).reshape(-1, 1, 8, 8))
    assert found.class_names == tuple(map(str, range(10)))
    assert read_examples(tmp_path / "optdigits.dat", size=16, channels=3).shape == (3, 16, 16)
    half = read_examples(tmp_path / "optdigits.dat", split="all", size=4)
    blocks = found.x.double().unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5))
    assert (half.x - blocks).abs().max() <= 0.5
    write_table(tmp_path / "odd.csv", x[:, :63], np.arange(30) % 10)
    with pytest.raises(InputError, match="no square images"):
        read_examples(tmp_path / "odd.csv", size=8)


def test_class_folders_are_divided_by_files(tmp_path):
    x, y = marked(40, shape=(9, 9, 3))
    for k in range(40):
        save_picture(tmp_path / "mine" / "abc"[y[k]] / f"{k:02}.png", x[k])
    parts = splits(tmp_path / "mine")
    assert parts["all"].class_names == ("a", "b", "c")
    stored = np.concatenate([x[y == k] for k in range(3)]).transpose(0, 3, 1, 2)
    assert np.array_equal(parts["all"].x, stored)
    check_disjoint(parts)
    assert read_examples(tmp_path / "mine", size=5, channels=1).shape == (1, 5, 5)


def test_folders_of_splits_are_kept(tmp_path):
    x, _ = marked(30, shape=(9, 9))
    for k in range(30):
        save_picture(tmp_path / ("train" if k < 20 else "val") / "ab"[k % 2] / f"{k:02}.png", x[k])
    parts = splits(tmp_path)
    assert (len(parts["train"]), len(parts["validation"]), len(parts["test"])) == (16, 4, 10)
    assert sorted(rows(parts["test"])) == sorted((*x[k].flatten().tolist(), k % 2) for k in range(20, 30))
    for k in range(4):
        save_picture(tmp_path / "test" / "ab"[k % 2] / f"{k}.png", x[k])
    parts = splits(tmp_path)
    assert (len(parts["train"]), len(parts["validation"]), len(parts["test"]), len(parts["all"])) == (20, 10, 4, 34)
    save_picture(tmp_path / "test" / "c" / "1.png", x[0])
    with pytest.raises(InputError, match="test has a class 'c', and train has not"):
        read_examples(tmp_path, split="test")


def records(x, *labels):
    return np.concatenate([*(label.astype(np.uint8)[:, None] for label in labels), x.reshape(len(x), -1)], 1).tobytes()


@pytest.mark.parametrize("kind", ["binary", "python"])
def test_cifar_folders(kind, tmp_path):
    x, y = marked(60, 10, (3, 32, 32))
    test, y_test = marked(20, 10, (3, 32, 32), seed=1)
    ten, hundred = tmp_path / "ten", tmp_path / "hundred"
    ten.mkdir()
    hundred.mkdir()
    if kind == "binary":
        (ten / "data_batch_1.bin").write_bytes(records(x, y))
        (ten / "test_batch.bin").write_bytes(records(test, y_test))
        (hundred / "train.bin").write_bytes(records(x, y // 5, y))
        (hundred / "test.bin").write_bytes(records(test, y_test // 5, y_test))
    else:
        for folder, file, (a, b) in (
            (ten, "data_batch_1", (x, y)), (ten, "test_batch", (test, y_test)),
            (hundred, "train", (x, y)), (hundred, "test", (test, y_test)),
        ):  # fmt: skip
            labels = {b"labels": b.tolist(), b"fine_labels": b.tolist(), b"coarse_labels": (b // 5).tolist()}
            (folder / file).write_bytes(pickle.dumps({b"data": a.reshape(len(a), -1), **labels}, protocol=2))
        names = {b"fine_label_names": [b"f%d" % k for k in range(100)], b"coarse_label_names": [b"c"] * 20}
        (hundred / "meta").write_bytes(pickle.dumps(names))
    for folder, classes in ((ten, 10), (hundred, 100)):
        parts = splits(folder)
        assert np.array_equal(parts["test"].x, test)
        assert parts["test"].y.tolist() == y_test.tolist()
        assert np.array_equal(parts["all"].x, np.concatenate([x, test]))
        assert parts["train"].num_classes == classes
        assert (len(parts["train"]), len(parts["validation"])) == (50, 10)
        assert not set(rows(parts["train"])) & set(rows(parts["validation"]))
    assert read_examples(ten).class_names[0] == "airplane"


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_a_hostile_pickle_is_refused_and_not_run(tmp_path, capsys):
    for file in ("data_batch_1", "test_batch"):
        (tmp_path / file).write_bytes(pickle.dumps({b"data": Evil(), b"labels": [0]}))
    with pytest.raises(InputError, match="data_batch_1"):
        read_examples(tmp_path)
    assert capsys.readouterr().out == ""


def test_svhn_counts_zero_as_ten(tmp_path):
    x, y = marked(20, 10, (3, 32, 32))
    for part in ("train", "test"):
        stored = {"X": x.transpose(2, 3, 1, 0), "y": np.where(y == 0, 10, y)[:, None].astype(np.uint8)}
        savemat(tmp_path / f"{part}_32x32.mat", stored)
    for source in (tmp_path, tmp_path / "test_32x32.mat"):
        test = read_examples(source, split="test")
        assert test.y.tolist() == y.tolist()
        assert np.array_equal(test.x, x)
        assert test.class_names == tuple("0123456789")


def test_stl10_is_stored_by_columns(tmp_path):
    x, y = marked(6, 3, (3, 96, 96))
    for part in ("train", "test"):
        (tmp_path / f"{part}_X.bin").write_bytes(x.transpose(0, 1, 3, 2).tobytes())
        (tmp_path / f"{part}_y.bin").write_bytes((y + 1).astype(np.uint8).tobytes())
    (tmp_path / "class_names.txt").write_text("airplane\nbird\ncar\n")
    test = read_examples(tmp_path, split="test")
    assert np.array_equal(test.x, x)
    assert test.y.tolist() == y.tolist()
    assert test.class_names == ("airplane", "bird", "car")
    assert len(read_examples(tmp_path)) == 3
    (tmp_path / "test_X.bin").write_bytes(bytes(100))
    with pytest.raises(InputError, match=r"test_X\.bin: 100 bytes for the 6 labels of test_y\.bin"):
        read_examples(tmp_path, split="test")
    (tmp_path / "train_y.bin").write_bytes(bytes([1, 2, 3, 1, 2, 4]))
    with pytest.raises(InputError, match=r"train_y\.bin: byte 5 is 4"):
        read_examples(tmp_path)


def test_tiny_imagenet_tests_on_its_validation_set(tmp_path):
    x, y = marked(24, 2, (12, 12, 3))
    names = ("n02", "n01")
    (tmp_path / "wnids.txt").write_text("n02\nn01\n")
    annotations = ""
    for k in range(24):
        grey = k % 8 == 0
        pixels = x[k, :, :, 0] if grey else x[k]
        if k < 16:
            save_picture(tmp_path / "train" / names[y[k]] / "images" / f"{names[y[k]]}_{k:02}.png", pixels)
        else:
            save_picture(tmp_path / "val" / "images" / f"val_{k}.png", pixels)
            annotations += f"val_{k}.png\t{names[y[k]]}\t0\t0\t9\t9\n"
    (tmp_path / "val" / "val_annotations.txt").write_text(annotations)
    parts = splits(tmp_path)
    expected = [np.repeat(x[k, :, :, :1], 3, 2) if k % 8 == 0 else x[k] for k in range(16, 24)]
    assert np.array_equal(parts["test"].x, np.stack(expected).transpose(0, 3, 1, 2))
    assert parts["test"].y.tolist() == y[16:].tolist()
    assert parts["train"].class_names == names
    assert (len(parts["train"]), len(parts["validation"])) == (12, 4)
    (tmp_path / "val" / "val_annotations.txt").write_text("val_16.png\tn02\t0\t0\t9\t9\nval_17.png\tn99\n")
    with pytest.raises(InputError, match=r"val_annotations\.txt:2: expected one of the 2 classes"):
        read_examples(tmp_path, split="test")


def test_the_banner_of_aircraft_is_cut_off(tmp_path):
    names = ("707-320", "DC 3")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "variants.txt").write_text("\n".join(names))
    for number, part in enumerate(("train", "val", "test")):
        lines = []
        for k in range(4):
            pixels = np.full((60, 60, 3), 10 * (number + 1) + 40 * (k % 2), dtype=np.uint8)
            pixels[40:] = 255
            image = number * 10 + k
            save_picture(tmp_path / "data" / "images" / f"{image:07}.jpg", pixels)
            lines.append(f"{image:07} {names[k % 2]}")
        (tmp_path / "data" / f"images_variant_{part}.txt").write_text("\n".join(lines))
    parts = splits(tmp_path, size=20)
    assert [len(parts[part]) for part in SPLITS] == [4, 4, 4, 12]
    for number, part in enumerate(PARTS):
        middle = parts[part].x[:, :, 8:12, :].double().mean((1, 2, 3))
        assert (middle - torch.tensor([10.0, 50.0, 10.0, 50.0]) - 10 * number).abs().max() < 3
        assert parts[part].x.max() < 120
        assert [parts[part].class_names[k] for k in parts[part].y] == [*names, *names]
    (tmp_path / "data" / "images_variant_train.txt").write_text("0000000 707-320\nbroken\n")
    with pytest.raises(InputError, match=r"images_variant_train\.txt:2: expected"):
        read_examples(tmp_path)


def test_named_sets_that_need_no_files():
    parts = splits("digits")
    assert len(parts["all"]) == 1797
    check_disjoint(parts, (0.6, 0.2, 0.2))
    wine = splits("wine")
    check_disjoint(wine)
    assert wine["train"].x.mean(0).abs().max() < 1e-5
    with pytest.raises(InputError, match="no images; leave it out"):
        read_examples("wine", size=8)
    with pytest.raises(InputError, match="regression"):
        read_examples("diabetes")


def test_reference_sets_are_divided_by_images_and_not_by_classes():
    pytest.importorskip("fontTools", reason="needs fonttools: pip install 'shared-core[glyphs]'")
    parts = splits("glyphs", classes=6, instances=20, size=12)
    check_disjoint(parts, (0.65, 0.15, 0.2))
    assert parts["train"].counts.tolist() == [13] * 6
    assert parts["all"].shape == (1, 12, 12)


def test_mnist_and_cifar_from_the_data_folder(data_folder):
    for name in ("mnist", "cifar-10"):
        test = read_examples(name, split="test", limit=50)
        train = read_examples(name, limit=50)
        for part in (test, train):
            assert len(part) == 50
            assert (part.counts - 5).abs().max() <= 1
        assert not set(rows(test)) & set(rows(train))


def test_classes_and_limits(tmp_path):
    x, _ = marked(60)
    y = np.repeat(np.arange(4), [30, 15, 12, 3])
    np.savez(tmp_path / "m.npz", x=x, y=y, class_names=np.array(["a", "b", "c", "d"]))
    path = tmp_path / "m.npz"
    chosen = read_examples(path, split="all", classes=["c", "a"])
    assert chosen.class_names == ("c", "a")
    assert chosen.counts.tolist() == [12, 30]
    assert np.array_equal(chosen.x[chosen.y == 0], x[y == 2])
    drawn = read_examples(path, split="all", classes=2)
    assert drawn.num_classes == 2
    assert drawn.class_names == read_examples(path, split="test", classes=2).class_names
    limited = read_examples(path, split="all", limit=20)
    assert len(limited) == 20
    assert (limited.counts - torch.tensor([30, 15, 12, 3]) / 3).abs().max() <= 1
    assert set(rows(limited)) <= set(rows(read_examples(path, split="all")))
    assert read_examples(path, split="all", limit=4).counts.tolist() == [1] * 4
    for options, words in (
        ({"limit": 3, "split": "all"}, "cannot hold 4 classes"), ({"limit": 0}, "limit"), ({"classes": 5}, "has 4"),
        ({"classes": ["x"]}, "no class 'x'"), ({"classes": ["a", "a"]}, "different"), ({"size": 0}, "size"),
        ({"instances": 3}, "take a limit"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            read_examples(path, **options)


def test_channels_and_sizes_are_converted(tmp_path):
    x, y = marked()
    np.savez(tmp_path / "m.npz", x=x, y=y)
    grey = read_examples(tmp_path / "m.npz", split="all", channels=1)
    luma = np.rint(np.einsum("nchw,c->nhw", x.astype(np.float64), [0.299, 0.587, 0.114]))
    assert np.abs(grey.x[:, 0].numpy() - luma).max() <= 1
    large = read_examples(tmp_path / "m.npz", split="all", size=16)
    expected = torch.nn.functional.interpolate(torch.from_numpy(x).double(), (16, 16), mode="bilinear")
    assert (large.x.double() - expected).abs().max() <= 0.51
    np.savez(tmp_path / "two.npz", x=x[:, :2], y=y)
    with pytest.raises(InputError, match="only images of 1 or 3"):
        read_examples(tmp_path / "two.npz", channels=3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no rows"), ("1\n2\n", r":1: one column"), ("1,2,a\n3,4,b\n5,b\n", r":3: 2 columns, and there are 3"),
        ("1,2,a\n3,x,b\n", r":2: column 2 is 'x', expected a number"), ("1,2,a\n\n3,,b\n", r":3: column 2 is ''"),
        ("1,2,a\n3,nan,b\n", r":2: column 2 is 'nan'"), ("1,2,a\n3,4,\n", r":2: the last column is empty"),
        ("a,b,c\n", "0 rows"), ("1,2,0.5\n3,4,1\n", r":1: the last column is 0.5"),
        ("".join(f"1,2,{k}\n" for k in range(20)), "20 different values in 20 rows"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_table(text, words, tmp_path):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(InputError, match=words) as caught:
        read_examples(tmp_path / "t.csv")
    assert str(caught.value).startswith(str(tmp_path / "t.csv"))
    assert "\n" not in str(caught.value)


X, Y = np.zeros((4, 3, 8, 8), np.uint8), np.array([0, 1, 0, 1])
ARRAYS = {
    "no x": ({"z": X}, "needs arrays 'x' and 'y'"),
    "no y": ({"x": X}, "no 'y'"),
    "float labels": ({"x": X, "y": Y / 2}, "'y' is float64"),
    "lengths": ({"x": X, "y": Y[:3]}, r"shape \(3,\)"),
    "text": ({"x": X.astype(str), "y": Y}, "expected uint8 or floats"),
    "one dimension": ({"x": X[:, 0, 0, 0], "y": Y}, r"shape \(4,\)"),
    "integers above 255": ({"x": X.astype(np.int64) + 256, "y": Y}, r"values 256\.\.256"),
    "names twice": ({"x": X, "y": Y, "class_names": np.array(["a", "a"])}, "different names"),
    "a label without a name": ({"x": X, "y": Y + 1, "class_names": np.array(["a", "b"])}, r"y\[1\] is 2"),
    "other shapes": ({"x_train": X, "y_train": Y, "x_test": X[:, :1], "y_test": Y}, "another shape"),
    "NaN": ({"x": X.astype(np.float32) + np.float32("nan"), "y": Y}, "NaN"),
    "nothing": ({"x": X[:0], "y": Y[:0]}, "shape"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_what_is_wrong_in_arrays(name, tmp_path):
    arrays, words = ARRAYS[name]
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(InputError, match=words) as caught:
        read_examples(tmp_path / "a.npz")
    assert "\n" not in str(caught.value)


def test_what_is_wrong_with_files(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 damaged")
    (tmp_path / "a.exe").write_text("")
    np.save(tmp_path / "a.npy", X)
    np.savez(tmp_path / "p.npz", x=np.array([{}], dtype=object), y=Y)
    (tmp_path / "empty").mkdir()
    for name, words in (
        ("a.npz", "not a whole NPZ"), ("a.exe", "cannot tell"), ("a.npy", "one array"),
        ("p.npz", "holds Python objects"), ("empty", "no classes of images"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words) as caught:
            read_examples(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
    with pytest.raises(InputError, match="did you mean 'mnist'"):
        read_examples("mnsit")
    with pytest.raises(InputError, match="RatingData"):
        read_examples("ml-100k")
    save_picture(tmp_path / "one" / "a" / "1.png", np.zeros((8, 8), np.uint8))
    with pytest.raises(DataError, match="no examples in the split 'test'"):
        read_examples(tmp_path / "one", split="test")


def test_absent_sets_say_where_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setenv("SHARED_CORE_DATA", str(tmp_path))
    for name, words in (("stl-10", "stl10_binary"), ("aircraft", "fgvc"), ("svhn", "svhn"), ("cifar-100", "cifar-100")):
        with pytest.raises(MissingFilesError, match=words) as caught:
            read_examples(name)
        assert "http" in str(caught.value)
    x, y = marked(6, 3, (3, 96, 96))
    (tmp_path / "stl10_binary").mkdir()
    (tmp_path / "stl10_binary" / "train_X.bin").write_bytes(x.transpose(0, 1, 3, 2).tobytes())
    (tmp_path / "stl10_binary" / "train_y.bin").write_bytes((y + 1).astype(np.uint8).tobytes())
    assert read_examples("stl10").name == "stl-10"
    with pytest.raises(InputError, match="no such file"):
        read_examples("stl10", split="test")


def test_reading_warns_of_nothing(tmp_path):
    x, y = marked()
    np.savez(tmp_path / "m.npz", x=x, y=y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_examples(tmp_path / "m.npz")
        read_examples("digits")
