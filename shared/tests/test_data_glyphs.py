from __future__ import annotations

import unicodedata

import numpy as np
import pytest

from shared_core.data import ImageData, load
from shared_core.data import _glyphs as module
from shared_core.errors import InputError

SMALL = {"size": 14, "classes": 6, "instances": 5, "expect": ImageData}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr("sys.platform", "linux")


@pytest.fixture(scope="module")
def renderers():
    return [module._Renderer(face) for face in module.FACES]


@pytest.fixture(scope="module")
def alphabet(renderers):
    return module._alphabet(renderers)


def test_classes_look_different(alphabet, renderers):
    assert 1800 < len(alphabet.characters) < 2081
    assert {"A", "b", "Ж", "Ω", "±", "7"} <= set(alphabet.characters)
    assert not {"\u0391", "\u0410"} & set(alphabet.characters), "Greek and Cyrillic A are Latin A"
    drawn = {renderers[alphabet.faces[c][0]].ink(c).tobytes() for c in alphabet.characters}
    assert len(drawn) > 0.99 * len(alphabet.characters), "equal pixels of two shapes are rare"
    assert all(len(alphabet.faces[c]) >= 12 for c in alphabet.characters)


def test_splits_divide_letters_not_variants(alphabet):
    parts = {split: set(alphabet.in_split(split)) for split in ("train", "validation", "test")}
    assert set().union(*parts.values()) == set(alphabet.characters) == set(alphabet.in_split("all"))
    assert sum(map(len, parts.values())) == len(alphabet.characters)
    shares = [len(part) / len(alphabet.characters) for part in parts.values()]
    assert shares == pytest.approx([0.64, 0.16, 0.2], abs=0.06)
    home = {c: split for split, part in parts.items() for c in part}
    for character, split in home.items():
        base = unicodedata.normalize("NFD", character)[0]
        assert home.get(base, split) == split
        assert home.get(base.lower(), split) == split or not base.isascii()
    assert {home[c] for c in "TŤŢtť"} == {home["T"]}


def test_script_split(alphabet):
    train, test = alphabet.in_split("script-train"), alphabet.in_split("script-test")
    assert sorted(train + test) == sorted(alphabet.characters)
    assert {"A", "Ж", "±"} <= set(train)
    assert {unicodedata.name(c).split()[0] for c in test} == {"GREEK", "ARMENIAN", "GEORGIAN"}


def test_sampling_with_the_identity_is_block_averaging():
    canvases = np.random.default_rng(0).integers(0, 256, (3, 40, 40), np.uint8)
    identity = np.tile(np.eye(2, 3, dtype=np.float32), (4, 1, 1))
    images = module._instances(canvases, np.array([2, 0, 1, 2]), identity, 20)
    blocks = canvases[[2, 0, 1, 2]].reshape(4, 20, 2, 20, 2).mean((2, 4))
    np.testing.assert_allclose(images, blocks, atol=0.51)


def test_random_maps_stay_in_their_ranges():
    maps = module._random_maps([chr(code) for code in range(65, 165)], 20, seed=1)
    linear, shift = maps[:, :, :2].astype(float), maps[:, :, 2] * 20
    assert np.abs(shift).max() <= 2
    # A rotation and a shear have determinant 1, so the determinant is that of the scale alone.
    scale = np.linalg.det(linear) ** -0.5
    assert (scale.min(), scale.max()) == pytest.approx((0.8, 1.15), abs=0.01)
    angle = np.arctan2(linear[:, 1, 0], linear[:, 0, 0])
    assert np.abs(angle).max() == pytest.approx(0.25, abs=0.01)


def test_small_build():
    data = load("glyphs", split="test", cache=False, **SMALL)
    assert data.images.shape == (30, 14, 14)
    assert data.labels.tolist() == np.repeat(np.arange(6), 5).tolist()
    assert len(set(data.class_names)) == 6
    assert (data.group_kind, data.group_names) == ("face", module.FACES)
    assert data.images.reshape(30, -1).max(1).min() > 60, "every image shows something"
    again = load("glyphs", split="test", cache=False, **SMALL)
    assert data.provenance.checksum == again.provenance.checksum
    other = load("glyphs", split="test", cache=False, seed=1, **SMALL)
    assert data.provenance.checksum != other.provenance.checksum


def test_a_class_does_not_depend_on_the_others():
    few, many = (load("glyphs", cache=False, **{**SMALL, "classes": n}) for n in (6, 40))
    shared = sorted(set(few.class_names) & set(many.class_names))
    assert shared
    for name in shared:
        rows = [data.images[data.labels == data.class_names.index(name)] for data in (few, many)]
        np.testing.assert_array_equal(*rows)


def test_faces_can_be_kept_apart():
    halves = [load("glyphs", cache=False, faces=faces, **SMALL) for faces in (module.FACES[:8], module.FACES[8:])]
    used = [set(half.groups.tolist()) for half in halves]
    assert halves[0].class_names == halves[1].class_names
    assert used[0] <= set(range(8))
    assert used[1] <= set(range(8, 16))


def test_cache(monkeypatch):
    first = load("glyphs", **SMALL)
    monkeypatch.setattr(module, "_make", lambda *arguments: pytest.fail("made twice"))
    second = load("glyphs", **SMALL)
    np.testing.assert_array_equal(first.images, second.images)
    np.testing.assert_array_equal(first.groups, second.groups)
    assert first.class_names == second.class_names
    monkeypatch.undo()


def test_damaged_or_unwritable_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = load("glyphs", **SMALL)
    (file,) = (tmp_path / "shared-core/glyphs").iterdir()
    file.write_bytes(file.read_bytes()[:-100])
    np.testing.assert_array_equal(load("glyphs", **SMALL).images, first.images)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    np.testing.assert_array_equal(load("glyphs", **SMALL).images, first.images)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"classes": 5000}, "classes: 5000 asked for, the split 'train' has"),
        ({"faces": ["Arial"]}, "faces: 'Arial' is not one of DejaVuSans, "),
        ({"faces": []}, "faces: "),
        ({"size": 2}, "size 2 .8..128."),
        ({"instances": 0}, "instances 0"),
        ({"classes": 0}, "classes 0"),
    ],
)
def test_wrong_options(options, expected):
    with pytest.raises(InputError, match=expected):
        load("glyphs", cache=False, **{**SMALL, **options})


def test_missing_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"matplotlib is needed here .*pip install 'shared-core\[glyphs\]'"):
        load("glyphs", **SMALL)
