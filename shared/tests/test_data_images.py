from __future__ import annotations

import contextlib
import gzip
import io
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from scipy.io import savemat

from shared_core.data import ImageData, find, load
from shared_core.data._images import parse_idx, resize_area, unpickle
from shared_core.errors import InputError

CODES = {"u1": 8, "i1": 9, "i2": 11, "i4": 12, "f4": 13, "f8": 14}


def idx(array: np.ndarray) -> bytes:
    head = bytes([0, 0, CODES[array.dtype.str[1:]], array.ndim])
    return (
        head
        + b"".join(n.to_bytes(4, "big") for n in array.shape)
        + array.astype(array.dtype.newbyteorder(">")).tobytes()
    )


WHOLE = idx(np.zeros((3, 2, 2), np.uint8))


def real(name: str, **options) -> ImageData:
    if not os.environ.get("SHARED_CORE_DATA"):
        pytest.skip("SHARED_CORE_DATA is not set")
    return load(name, expect=ImageData, **options)


def fails(expected: str, name: str, root: Path, **options) -> None:
    with pytest.raises(InputError, match=expected) as caught:
        load(name, root=root, **options)
    assert "\n" not in str(caught.value)


@pytest.fixture
def pixels():
    return np.random.default_rng(0)


@given(st.sampled_from(sorted(CODES)).flatmap(lambda t: hnp.arrays(t, hnp.array_shapes(max_dims=4, max_side=5))))
def test_idx_round_trip(array):
    parsed = parse_idx(idx(array), "f")
    assert parsed.dtype == array.dtype
    np.testing.assert_array_equal(parsed, array)


@given(
    st.one_of(
        st.binary(max_size=60),
        st.binary(max_size=60).map(lambda rest: b"\0\0\x08\x03" + rest),
        st.binary(max_size=30).map(lambda rest: b"\0\0\x0d\x01\0\0\0" + rest),
    )
)
def test_any_bytes_are_an_array_or_one_line(content):
    with contextlib.suppress(InputError):
        array = parse_idx(content, "f")
        assert idx(array) == content


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (WHOLE[:-1], "f: its header asks for 28 bytes and it has 27; is it truncated"),
        (WHOLE + b"\0", "f: its header asks for 28 bytes and it has 29"),
        (WHOLE[:9], "is it truncated"),
        (b"", "f: is not an IDX file .it starts with nothing"),
        (b"GIF89a", "f: is not an IDX file .it starts with 47494638"),
        (b"\0\0\x08\x03" + b"\xff" * 12, "is it truncated"),
    ],
)
def test_idx_faults(content, expected):
    with pytest.raises(InputError, match=expected):
        parse_idx(content, "f")


def test_truncated_gz(tmp_path):
    (tmp_path / "kmnist").mkdir()
    (tmp_path / "kmnist/train-images-idx3-ubyte.gz").write_bytes(gzip.compress(WHOLE)[:-9])
    fails("train-images-idx3-ubyte.gz: cannot be read; it is damaged, truncated", "kmnist", tmp_path)


@pytest.mark.parametrize(
    ("name", "folder"), [("mnist", "MNIST/raw"), ("fashion-mnist", "fashion-mnist"), ("kmnist", "kmnist")]
)
@pytest.mark.parametrize("pack", [lambda content: content, gzip.compress])
def test_idx_sets(tmp_path, pixels, name, folder, pack):
    images, labels = pixels.integers(0, 256, (12, 28, 28), np.uint8), np.arange(12, dtype=np.uint8) % 10
    suffix = "" if pack(b"") == b"" else ".gz"
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / f"t10k-images-idx3-ubyte{suffix}").write_bytes(pack(idx(images)))
    (tmp_path / folder / f"t10k-labels-idx1-ubyte{suffix}").write_bytes(pack(idx(labels)))
    data = load(name, root=tmp_path, split="test", expect=ImageData)
    np.testing.assert_array_equal(data.images, images)
    np.testing.assert_array_equal(data.labels, labels)
    assert len(data.class_names) == 10
    fails("no train-images-idx3-ubyte", name, tmp_path)


def test_idx_sets_that_do_not_fit(tmp_path):
    images, labels = tmp_path / "mnist/train-images-idx3-ubyte", tmp_path / "mnist/train-labels-idx1-ubyte"
    images.parent.mkdir()
    images.write_bytes(idx(np.zeros((3, 28, 28), np.uint8)))
    for wrong, expected in [
        (np.zeros(4, np.uint8), "3 images, 4 labels"),
        (np.full(3, 10, np.uint8), "labels 10..10, where 0..9 are known"),
        (np.zeros((3, 1), np.uint8), "expected bytes in 1 dimensions"),
        (np.zeros(3, np.float32), "expected bytes in 1 dimensions"),
    ]:
        labels.write_bytes(idx(wrong))
        fails(expected, "mnist", tmp_path)


def test_mnist():
    data = real("mnist")
    assert data.images.shape == (60_000, 28, 28)
    assert data.images.mean() / 255 == pytest.approx(0.1307, abs=1e-4)
    assert data.images.std() / 255 == pytest.approx(0.3081, abs=1e-4)
    assert data.labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert len(real("mnist", split="test")) == 10_000


class Test_Cifar:
    @pytest.fixture
    def batch(self, pixels):
        return pixels.integers(0, 256, (20, 3072), np.uint8), np.arange(20) % 10

    @staticmethod
    def check(data, batch):
        flat, labels = batch
        np.testing.assert_array_equal(data.labels, labels)
        # Official layout: 1024 red, then green, then blue values, row by row.
        assert data.images[3, 5, 7].tolist() == [flat[3, 5 * 32 + 7], flat[3, 1024 + 167], flat[3, 2048 + 167]]

    @staticmethod
    def pickled(batch, protocol, **labels):
        flat, targets = batch
        content = {"batch_label": "one", "labels": targets.tolist(), "data": flat, "filenames": ["a.png"] * 20} | labels
        # The official files come from Python 2 and NumPy 1: byte strings as keys, numpy.core as the module.
        if protocol != 2:
            return pickle.dumps(content, protocol)
        old = pickle.dumps({key.encode(): value for key, value in content.items()}, 2)
        return old.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")

    def test_binary(self, tmp_path, batch):
        records = np.hstack([batch[1][:, None].astype(np.uint8), batch[0]])
        folder = tmp_path / "cifar-10-batches-bin"
        folder.mkdir()
        (folder / "data_batch_1.bin").write_bytes(records[:15].tobytes())
        (folder / "data_batch_2.bin").write_bytes(records[15:].tobytes())
        (folder / "batches.meta.txt").write_text("\n".join("abcdefghij") + "\n\n")
        data = load("cifar10", root=tmp_path, expect=ImageData)
        self.check(data, batch)
        assert data.class_names == tuple("abcdefghij")
        assert data.provenance.notes == "partial: 20 of 50,000 images, from data_batch_1, data_batch_2"
        fails("cifar10: no test_batch", "cifar10", tmp_path, split="test")
        (folder / "data_batch_2.bin").write_bytes(records[15:].tobytes()[:-5])
        fails("15,360 bytes, not a multiple of the 3,073 bytes of a record", "cifar10", tmp_path)

    @pytest.mark.parametrize("protocol", [2, 4])
    def test_python(self, tmp_path, batch, protocol):
        folder = tmp_path / "cifar-10-batches-py"
        folder.mkdir()
        (folder / "test_batch").write_bytes(self.pickled(batch, protocol))
        meta = {"label_names": [f"name{i}" for i in range(10)], "num_vis": 3072}
        (folder / "batches.meta").write_bytes(pickle.dumps(meta, protocol))
        data = load("cifar10", root=tmp_path, split="test", expect=ImageData)
        self.check(data, batch)
        assert data.class_names[9] == "name9"

    @pytest.mark.parametrize("name", ["cifar-10-python.tar.gz", "cifar10/cifar-10-python.tar.gz", "cifar10/any.zip"])
    def test_in_place_in_an_archive(self, tmp_path, batch, name):
        content, member = self.pickled(batch, 2), "cifar-10-batches-py/data_batch_4"
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if path.suffix == ".zip":
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr(member, content)
        else:
            with tarfile.open(path, "w:gz") as archive:
                info = tarfile.TarInfo(member)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        self.check(load("cifar10", root=tmp_path, expect=ImageData), batch)
        path.write_bytes(path.read_bytes()[:-3000])
        fails("cannot be read", "cifar10", tmp_path)

    @pytest.mark.parametrize("binary", [True, False])
    def test_hundred(self, tmp_path, batch, binary):
        flat, coarse = batch
        fine = coarse + 50
        folder = tmp_path / "cifar-100"
        folder.mkdir()
        if binary:
            (folder / "train.bin").write_bytes(np.hstack([np.c_[coarse, fine].astype(np.uint8), flat]).tobytes())
            (folder / "fine_label_names.txt").write_text("\n".join(f"f{i}" for i in range(100)))
            (folder / "coarse_label_names.txt").write_text("\n".join(f"c{i}" for i in range(20)))
        else:
            labels = {"fine_labels": fine.tolist(), "coarse_labels": coarse.tolist()}
            (folder / "train").write_bytes(self.pickled(batch, 2, **labels))
            names = {
                b"fine_label_names": [b"f%d" % i for i in range(100)],
                b"coarse_label_names": [b"c%d" % i for i in range(20)],
            }
            (folder / "meta").write_bytes(pickle.dumps(names, 2))
        data = load("cifar100", root=tmp_path, expect=ImageData)
        self.check(data, (flat, fine))
        assert (data.class_names[50], data.group_names[7], data.group_kind) == ("f50", "c7", "superclass")
        np.testing.assert_array_equal(data.groups, coarse)
        self.check(load("cifar100", root=tmp_path, labels="coarse", expect=ImageData), batch)

    @pytest.mark.parametrize(
        "change", [{"labels": [1, 2]}, {"data": np.zeros((20, 3071), np.uint8)}, {"data": "text"}, {"labels": "x"}]
    )
    def test_wrong_content(self, tmp_path, batch, change):
        (tmp_path / "cifar10").mkdir()
        (tmp_path / "cifar10/data_batch_1").write_bytes(self.pickled(batch, 2, **change))
        fails("data_batch_1: cannot be read", "cifar10", tmp_path)

    def test_real_partial_set(self):
        data = real("cifar10")
        assert len(data) in (10_000, 50_000)
        assert np.bincount(data.labels).tolist() == [len(data) // 10] * 10 or len(data) == 10_000
        assert data.class_names[0] == "airplane"
        assert ("partial: 10,000 of 50,000 images, from data_batch_1" in data.provenance.notes) == (len(data) == 10_000)
        assert np.bincount(real("cifar10", split="test").labels).tolist() == [1000] * 10


class Runs:
    """Pickles to a call of a function of this process."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "content",
    [
        Runs(os.system, "exit 1"),
        {"data": Runs(eval, "1")},
        {"data": Runs(getattr, "text", "upper")},
        {"data": np.zeros(3)},
        {"data": np.array([{}], dtype=object)},
        {"data": Path("x")},
        [1, 2],
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_pickles_run_nothing(content, protocol):
    with pytest.raises(InputError, match="is not a pickle of plain arrays"):
        unpickle(pickle.dumps(content, protocol), "f")


@given(st.integers(0, 200), st.binary(max_size=4), st.integers(0, 4))
def test_damaged_pickles_are_one_line(position, inserted, dropped):
    content = pickle.dumps({b"data": np.arange(6, dtype=np.uint8).reshape(2, 3), b"labels": [1, 2]}, 2)
    damaged = content[:position] + inserted + content[position + dropped :]
    with contextlib.suppress(InputError):
        assert isinstance(unpickle(damaged, "f"), dict)


def test_svhn(tmp_path, pixels):
    images = pixels.integers(0, 256, (32, 32, 3, 7), np.uint8)
    (tmp_path / "svhn").mkdir()
    savemat(
        tmp_path / "svhn/train_32x32.mat", {"X": images, "y": np.array([[1, 2, 3, 10, 5, 9, 10]]).T.astype(np.uint8)}
    )
    data = load("svhn", root=tmp_path, expect=ImageData)
    assert data.labels.tolist() == [1, 2, 3, 0, 5, 9, 0]
    np.testing.assert_array_equal(data.images[4], images[:, :, :, 4])
    (tmp_path / "svhn/test_32x32.mat").write_bytes(b"MATLAB 5.0" + bytes(300))
    fails("test_32x32.mat: cannot be read", "svhn", tmp_path, split="test")
    savemat(tmp_path / "svhn/test_32x32.mat", {"X": images[:16], "y": np.ones((7, 1))})
    fails("expected uint8 .32, 32, 3, n.", "svhn", tmp_path, split="test")


def test_resize_area():
    images = np.random.default_rng(1).integers(0, 256, (600, 12, 12), np.uint8)
    np.testing.assert_allclose(resize_area(images, 4), images.reshape(600, 4, 3, 4, 3).mean((2, 4)), atol=0.501)
    assert (resize_area(np.full((2, 105, 105, 3), 77, np.uint8), 28) == 77).all()
    # Through a common multiple of both sizes the area average is a plain mean of blocks.
    fine = images[:5].repeat(5, 1).repeat(5, 2).reshape(5, 5, 12, 5, 12).mean((2, 4))
    np.testing.assert_allclose(resize_area(images[:5], 5), fine, atol=0.51)
    with pytest.raises(InputError, match="size: must be at least 1 pixel"):
        resize_area(images, 0)


class Test_Omniglot:
    @staticmethod
    def png(seed: int) -> bytes:
        stream = io.BytesIO()
        bits = np.random.default_rng(seed).random((105, 105)) < 0.9
        Image.fromarray(bits.astype(np.uint8) * 255).convert("1").save(stream, "PNG")
        return stream.getvalue()

    def members(self, archive: str, alphabets: dict[str, int]) -> dict[str, bytes]:
        return {
            f"{archive}/{alphabet}/character{c:02}/{c:04}_{drawer:02}.png": self.png(100 * c + drawer)
            for alphabet, characters in alphabets.items()
            for c in range(1, characters + 1)
            for drawer in (1, 2, 3)
        }

    @pytest.fixture
    def root(self, tmp_path):
        folder = tmp_path / "omniglot"
        folder.mkdir()
        for name, alphabets in [("small1", {"Greek": 2, "Balinese": 1}), ("small2", {"Greek": 2, "Latin": 2})]:
            archive = f"images_background_{name}"
            with zipfile.ZipFile(folder / f"{archive}.zip", "w") as opened:
                for member, content in self.members(archive, alphabets).items():
                    opened.writestr(member, content)
        for member, content in self.members("images_evaluation", {"Tibetan": 1}).items():
            (folder / member).parent.mkdir(parents=True, exist_ok=True)
            (folder / member).write_bytes(content)
        return tmp_path

    def test_a_character_counts_once(self, root):
        data = load("omniglot", root=root, expect=ImageData)
        classes = {"Balinese": 1, "Greek": 2, "Latin": 2, "Tibetan": 1}
        assert data.class_names == tuple(f"{a}/character{c:02}" for a, n in classes.items() for c in range(1, n + 1))
        assert np.bincount(data.labels).tolist() == [3] * 6
        assert data.group_names == ("Balinese", "Greek", "Latin", "Tibetan")
        assert np.bincount(data.groups).tolist() == [3, 6, 6, 3]
        assert len(load("omniglot", root=root, split="small2")) == 12
        assert len(load("omniglot", root=root, split="evaluation")) == 3
        fails("no images_background.*zip. in", "omniglot", root, split="background")

    def test_ink_size_and_drawers(self, root):
        data = load("omniglot", root=root, split="small1", expect=ImageData, groups="drawer")
        assert data.group_names == ("01", "02", "03")
        assert data.groups.tolist() == [0, 1, 2] * 3
        paper = load("omniglot", root=root, split="small1", expect=ImageData, ink=0)
        np.testing.assert_array_equal(data.images, 255 - paper.images)
        expected = np.asarray(Image.open(io.BytesIO(self.png(102))).convert("L"))
        np.testing.assert_array_equal(paper.images[1], expected)
        small = load("omniglot", root=root, split="small1", expect=ImageData, size=35)
        blocks = data.images.reshape(-1, 35, 3, 35, 3).mean((2, 4))
        np.testing.assert_allclose(small.images, blocks, atol=0.51)

    def test_damaged_image(self, root):
        path = next((root / "omniglot/images_evaluation").rglob("*.png"))
        path.write_bytes(path.read_bytes()[:60])
        fails(f"{path.name}: cannot be read", "omniglot", root)

    def test_arrays_of_some_papers(self, root, pixels):
        images = pixels.integers(0, 2, (3, 4, 28, 28)).astype(np.float32)
        np.save(root / "omniglot/train.npy", images)
        data = load("omniglot", root=root, split="train", expect=ImageData)
        assert data.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
        np.testing.assert_array_equal(data.images, images.reshape(12, 28, 28) * 255)
        np.save(root / "omniglot/train.npy", images * 7)
        fails("values 0..7; expected bytes, or floats in 0..1", "omniglot", root, split="train")
        np.save(root / "omniglot/train.npy", np.array([{}], dtype=object), allow_pickle=True)
        fails("cannot be read", "omniglot", root, split="train")
        fails("no test.npy", "omniglot", root, split="test")

    def test_real(self):
        data = real("omniglot")
        assert len(data) == 20 * len(data.class_names)
        assert (np.bincount(data.labels) == 20).all()
        if not (find("omniglot") / "images_background.zip").exists():
            assert (len(data.class_names), len(data.group_names)) == (242, 8)
        assert set(np.unique(data.images)) == {0, 255}
        assert 0.02 < (data.images == 255).mean() < 0.15


class Test_MiniImagenet:
    def test_arrays(self, tmp_path, pixels):
        images = pixels.integers(0, 256, (2, 3, 84, 84, 3), np.uint8)
        (tmp_path / "miniImagenet").mkdir()
        np.save(tmp_path / "miniImagenet/val.npy", images)
        data = load("mini-imagenet", root=tmp_path, split="validation", expect=ImageData)
        np.testing.assert_array_equal(data.images.reshape(images.shape), images)
        assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert load("mini-imagenet", root=tmp_path, split="validation", expect=ImageData, size=42).images.shape[1:] == (
            42,
            42,
            3,
        )
        fails("no train.npy or train.csv", "mini-imagenet", tmp_path)

    def test_list_and_images(self, tmp_path, pixels):
        folder = tmp_path / "mini-imagenet"
        (folder / "images").mkdir(parents=True)
        rows = [("n02.jpg", "n2"), ("n01a.jpg", "n1"), ("n01b.jpg", "n1")]
        for number, (name, _) in enumerate(rows):
            Image.new("RGB", (84 + number, 90), (40 * number, 10, 200)).save(folder / "images" / name, quality=95)
        (folder / "train.csv").write_text("filename,label\n" + "".join(f"{name},{label}\n" for name, label in rows))
        data = load("mini-imagenet", root=tmp_path, expect=ImageData)
        assert data.images.shape == (3, 84, 84, 3)
        assert (data.class_names, data.labels.tolist()) == (("n1", "n2"), [1, 0, 0])
        np.testing.assert_allclose(data.images.mean((1, 2)), [[0, 10, 200], [40, 10, 200], [80, 10, 200]], atol=4)
        (folder / "images/n01b.jpg").unlink()
        fails("no image n01b.jpg, which .*train.csv names", "mini-imagenet", tmp_path)
