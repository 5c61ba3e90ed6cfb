from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from shared_core import _hershey, classes
from shared_core.classes import NAMES, OTHER_DOMAINS, ClassImages, load_classes, read_labelled, read_unlabelled
from shared_core.data import ImageData, MissingFilesError, Provenance
from shared_core.errors import InputError, UnknownKeyError

SPLITS = ("train", "validation", "test")

needs_hershey = pytest.mark.skipif(
    importlib.util.find_spec("HersheyFonts") is None, reason="needs the strokes: pip install Hershey-Fonts"
)


@pytest.fixture
def real_omniglot():
    folder = os.environ.get("SHARED_CORE_DATA")
    if not folder or not Path(folder, "omniglot").is_dir():
        pytest.skip("needs Omniglot: set SHARED_CORE_DATA to a folder that holds omniglot/ with the official zips")


def one_line(caught, *words):
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert str(word) in text, text


def numbered(classes=6, each=8, side=16, channels=1):
    """Images whose every pixel says which image it is."""
    n = classes * each
    pixels = np.broadcast_to(np.arange(n, dtype=np.uint8)[:, None, None, None], (n, channels, side, side)).copy()
    return ClassImages("numbered", pixels, np.repeat(np.arange(classes), each), tuple("abcdefghij"[:classes]))


def picture_folder(root, classes, each=3, side=20, mode="L"):
    """A picture for each class and number, all of one grey that says which."""
    for place, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(each):
            grey = 10 * place + number
            Image.new(mode, (side, side), grey if mode == "L" else (grey, 0, 200)).save(root / name / f"{number}.png")
    return root


class TestClassImages:
    def test_selects_classes_in_the_order_asked_for(self):
        chosen = numbered().select(["c", "a"])
        assert chosen.class_names == ("c", "a")
        assert chosen.images[chosen.labels == 0].ravel()[0] == 16
        assert chosen.images[chosen.labels == 1].ravel()[0] == 0
        assert chosen.counts.tolist() == [8, 8]
        with pytest.raises(UnknownKeyError, match="no class 'z'"):
            numbered().select(["z"])

    def test_keeps_bytes_and_scales_when_asked(self):
        found = numbered()
        assert found.images.dtype == np.uint8
        assert found.mean == pytest.approx(np.arange(48).mean() / 255)
        np.testing.assert_array_equal(
            found.float_images(np.array([3, 47])), found.images[[3, 47]] / np.float32(255), strict=True
        )

    @pytest.mark.parametrize(
        ("images", "labels", "names", "words"),
        [
            (np.zeros((2, 16, 16), np.uint8), np.arange(2), "ab", ["(2, 16, 16)"]),
            (np.zeros((2, 1, 16, 16)), np.arange(2), "ab", ["float64"]),
            (np.zeros((2, 1, 16, 16), np.uint8), np.arange(3), "abc", ["(2,)", "(3,)"]),
            (np.zeros((2, 1, 16, 16), np.uint8), np.arange(2.0), "ab", ["float64"]),
            (np.zeros((2, 1, 16, 16), np.uint8), np.array([0, 2]), "ab", ["0..2", "2 class names"]),
            (np.zeros((2, 1, 16, 16), np.uint8), np.arange(2), "aa", ["different names"]),
            (np.full((2, 1, 16, 16), np.nan, np.float32), np.arange(2), "ab", ["finite"]),
            (np.full((2, 1, 16, 16), 1.5, np.float32), np.arange(2), "ab", ["[0, 1]"]),
        ],
    )
    def test_refuses_what_does_not_go_together(self, unchecked, images, labels, names, words):
        with pytest.raises(InputError) as caught:
            ClassImages("mine", images, labels, tuple(names))
        one_line(caught, "mine", *words)


STYLES = ("", "-Bold", "-Oblique", "-BoldOblique", "-Italic", "-BoldItalic")


class TestNamedSets:
    def test_glyphs_have_the_splits_of_the_core(self):
        found = [load_classes("glyphs", split=split, classes=8, instances=3, size=20) for split in SPLITS]
        assert [part.images.shape for part in found] == [(24, 1, 20, 20)] * 3
        assert len({name for part in found for name in part.class_names}) == 24
        assert found[0].group_kind == "face"
        assert found[0].mean < 0.5
        again = load_classes("glyphs", split="test", classes=8, instances=3, size=20)
        np.testing.assert_array_equal(again.images, found[2].images)

    def test_glyphs_of_other_scripts_are_for_tests(self):
        found = load_classes("glyphs", split="test", split_by="script", classes=8, instances=2, size=20)
        scripts = {unicodedata.name(name).split()[0] for name in found.class_names}
        assert scripts <= {"GREEK", "ARMENIAN", "GEORGIAN"}

    def test_typefaces_of_glyphs_are_super_classes(self):
        found = {
            split: load_classes("glyphs", split=split, split_by="group", classes=12, instances=2, size=8)
            for split in SPLITS
        }
        faces = {split: {name.split("/")[0] for name in part.class_names} for split, part in found.items()}
        assert faces["train"] <= {n + s for n in ("DejaVuSans", "DejaVuSerif") for s in STYLES}
        assert faces["validation"] <= {f"DejaVuSansMono{style}" for style in STYLES}
        assert all(face.startswith("STIXGeneral") for face in faces["test"])
        letters = [{name.split("/", 1)[1] for name in part.class_names} for part in found.values()]
        assert not letters[0] & letters[2]
        for part in found.values():
            assert part.counts.tolist() == [2] * 12
            assert part.groups is not None
            for number, name in enumerate(part.class_names):
                own = {part.group_names[k] for k in part.groups[part.labels == number]}
                assert own == {name.split("/")[0]}

    def test_script_validation_takes_letters_out_of_the_training_scripts(self, monkeypatch):
        names = {"script-train": "abcdef", "validation": "bxd"}

        def fake(name, *, split, expect, **options):
            kinds = tuple(names[split])
            pixels = np.zeros((len(kinds), 16, 16), np.uint8)
            origin = Provenance("made up", "none", "here", "0")
            return ImageData("glyphs", split, origin, pixels, np.arange(len(kinds)), kinds)

        monkeypatch.setattr(classes, "load_shared", fake)
        found = {split: load_classes("glyphs", split=split, split_by="script") for split in ("train", "validation")}
        assert found["train"].class_names == tuple("acef")
        assert found["validation"].class_names == tuple("bd")

    def test_omniglot_is_divided_by_alphabet(self, real_omniglot):
        whole = load_classes("omniglot", split="all")
        parts = {split: load_classes("omniglot", split=split, seed=3) for split in SPLITS}
        assert whole.shape == (1, 28, 28)
        names = [set(part.class_names) for part in parts.values()]
        alphabets = [{name.split("/")[0] for name in part} for part in names]
        assert [len(some) for some in alphabets] == [5, 1, 2]
        assert len(set.union(*alphabets)) == 8
        assert set.union(*names) == set(whole.class_names)
        assert sum(map(len, names)) == whole.ways == 242
        assert set(parts["test"].counts) == {20}
        again = load_classes("omniglot", split="test", seed=3)
        np.testing.assert_array_equal(again.images, parts["test"].images)
        assert {load_classes("omniglot", split="test", seed=seed).class_names for seed in range(4)} != {
            again.class_names
        }
        place = whole.class_names.index(again.class_names[5])
        np.testing.assert_array_equal(again.images[again.labels == 5], whole.images[whole.labels == place])

    def test_omniglot_by_character_and_turned(self, real_omniglot):
        parts = [load_classes("omniglot", split=split, split_by="class") for split in SPLITS]
        assert [part.ways for part in parts] == [155, 38, 49]
        plain = load_classes("omniglot", split="train", classes=3, instances=4)
        turned = load_classes("omniglot", split="train", classes=3, instances=4, rotations=True)
        assert plain.images.shape == (12, 1, 28, 28)
        assert turned.ways == 12
        np.testing.assert_array_equal(turned.images[:12], plain.images)
        np.testing.assert_array_equal(turned.images[12, 0], np.rot90(plain.images[0, 0]))
        assert turned.class_names[3] == f"{plain.class_names[0]}@90"
        assert "rotations" in turned.notes
        assert load_classes("omniglot", split="test", classes=3, rotations=True).ways == 3

    def test_official_omniglot_keeps_the_evaluation_set_for_tests(self, tmp_path, monkeypatch):
        for part, alphabets in (("background", "ABCDE"), ("evaluation", "FG")):
            for alphabet in alphabets:
                for character in ("character01", "character02"):
                    folder = tmp_path / "omniglot" / f"images_{part}" / alphabet / character
                    folder.mkdir(parents=True)
                    for drawer in ("01", "02"):
                        Image.new("1", (105, 105), 1).save(folder / f"0001_{drawer}.png")
        monkeypatch.setenv("SHARED_CORE_DATA", str(tmp_path))
        found = {split: load_classes("omniglot", split=split, split_by="official") for split in SPLITS}
        assert {name[0] for name in found["test"].class_names} == set("FG")
        trained, held_out = ({name[0] for name in found[split].class_names} for split in ("train", "validation"))
        assert len(trained) == 4
        assert trained | held_out == set("ABCDE")
        assert not trained & held_out

    def test_cifar_fs_is_the_published_split_of_all_600(self, tmp_path, monkeypatch):
        held_out = [*classes._CIFAR_FS["validation"], *classes._CIFAR_FS["test"]]
        names = sorted([*held_out, *(f"other_{number:02d}" for number in range(64))])
        folder = tmp_path / "cifar-100-binary"
        folder.mkdir()
        record = np.zeros((100, 3074), np.uint8)
        record[:, 1] = record[:, 2] = np.arange(100)
        for name in ("train.bin", "test.bin"):
            record.tofile(folder / name)
        (folder / "fine_label_names.txt").write_text("\n".join(names))
        monkeypatch.setenv("SHARED_CORE_DATA", str(tmp_path))
        found = {split: load_classes("cifar-fs", split=split) for split in (*SPLITS, "all")}
        assert [part.ways for part in found.values()] == [64, 16, 20, 100]
        assert found["test"].shape == (3, 32, 32)
        assert set(found["test"].class_names) == set(classes._CIFAR_FS["test"])
        assert all(name.startswith("other") for name in found["train"].class_names)
        assert set(found["validation"].counts) == {2}
        whale = found["test"].class_names.index("whale")
        first = found["test"].images[found["test"].labels == whale][0]
        assert first[0, 0, 0] == names.index("whale")
        assert load_classes("cifar-fs", split="test", size=16, channels=1).shape == (1, 16, 16)
        (folder / "test.bin").unlink()
        assert "500 images a class" in load_classes("cifar-fs", split="test").notes

    def test_mini_imagenet_names_its_classes_by_split(self, tmp_path, monkeypatch):
        (tmp_path / "mini-imagenet").mkdir()
        for split, ways in (("train", 4), ("val", 2), ("test", 3)):
            np.save(tmp_path / "mini-imagenet" / f"{split}.npy", np.zeros((ways, 2, 16, 16, 3), np.uint8))
        monkeypatch.setenv("SHARED_CORE_DATA", str(tmp_path))
        assert [load_classes("mini-imagenet", split=split, size=16).ways for split in (*SPLITS, "all")] == [4, 2, 3, 9]
        assert load_classes("mini-imagenet", split="validation").class_names == ("validation/0", "validation/1")

    def test_says_what_is_missing_or_unknown(self, tmp_path, monkeypatch, unchecked):
        monkeypatch.setenv("SHARED_CORE_DATA", str(tmp_path))
        with pytest.raises(MissingFilesError) as caught:
            load_classes("omniglot", split="train")
        one_line(caught, tmp_path, "omniglot")
        with pytest.raises(UnknownKeyError) as caught:
            load_classes("omniglott", split="train")
        one_line(caught, "omniglott", "mini-imagenet")
        (tmp_path / "table.csv").write_text("a,b\n")
        for arguments, words in (
            ({"source": "glyphs", "split": "tset"}, ["split", "tset"]),
            ({"source": "glyphs", "split": "test", "split_by": "official"}, ["split_by", "glyphs", "script"]),
            ({"source": "cifar-fs", "split": "test", "split_by": "class"}, ["split_by", "cifar-fs"]),
            ({"source": "glyphs", "split": "test", "classes": 0}, ["classes", "0"]),
            ({"source": "glyphs", "split": "test", "channels": 2}, ["channels", "2"]),
            ({"source": tmp_path / "table.csv", "split": "test"}, ["table.csv", "npz"]),
        ):
            with pytest.raises(InputError) as caught:
                load_classes(**arguments)
            one_line(caught, *words)


class TestFolder:
    names = tuple(f"class{number:02d}" for number in range(12))

    def test_round_trip(self, tmp_path):
        found = load_classes(picture_folder(tmp_path / "mine", self.names), split="all")
        assert found.name == "mine"
        assert found.images.shape == (36, 1, 20, 20)
        assert found.images.dtype == np.uint8
        assert found.class_names == self.names
        expected = [10 * place + number for place in range(12) for number in range(3)]
        assert found.images[:, 0, 0, 0].tolist() == expected
        assert found.notes == ""

    def test_classes_are_divided_by_their_names(self, tmp_path):
        folder = picture_folder(tmp_path / "mine", self.names)
        found = [load_classes(folder, split=split) for split in SPLITS]
        assert [part.ways for part in found] == [8, 2, 2]
        assert {name for part in found for name in part.class_names} == set(self.names)
        for name in self.names[:5]:
            Image.new("L", (20, 20)).save(folder / name / "more.png")
        assert [load_classes(folder, split=split).class_names for split in SPLITS] == [
            part.class_names for part in found
        ]
        assert len({load_classes(folder, split="test", seed=seed).class_names for seed in range(5)}) > 1

    def test_a_new_class_moves_few_others(self):
        names = [f"c{number}" for number in range(40)]
        before, after = (classes._divided(some, (0.64, 0.16), 2, 0) for some in (names, [*names, "new"]))
        assert [len(before[split]) for split in SPLITS] == [26, 6, 8]
        moved = sum(len(set(before[split]) - set(after[split])) for split in SPLITS)
        assert moved <= 2

    def test_folders_for_splits_are_used(self, tmp_path):
        picture_folder(tmp_path / "train", ["a", "b"])
        picture_folder(tmp_path / "val", ["c", "d"])
        picture_folder(tmp_path / "test", ["e", "f", "g"])
        found = {split: load_classes(tmp_path, split=split).class_names for split in (*SPLITS, "all")}
        assert found == {
            "train": ("a", "b"),
            "validation": ("c", "d"),
            "test": ("e", "f", "g"),
            "all": tuple("abcdefg"),
        }
        with pytest.raises(InputError, match="split_by"):
            load_classes(tmp_path, split="train", split_by="class")

    def test_validation_comes_out_of_train_where_it_has_no_folder(self, tmp_path):
        picture_folder(tmp_path / "train", self.names)
        found = {split: load_classes(tmp_path, split=split) for split in ("train", "validation")}
        assert found["validation"].ways == 2
        assert {*found["train"].class_names, *found["validation"].class_names} == set(self.names)
        assert "no folder for validation" in found["train"].notes
        with pytest.raises(InputError) as caught:
            load_classes(tmp_path, split="test")
        one_line(caught, tmp_path, "test")

    def test_a_class_in_two_splits_is_refused(self, tmp_path):
        picture_folder(tmp_path / "train", ["a", "b"])
        picture_folder(tmp_path / "test", ["b", "c"])
        with pytest.raises(InputError) as caught:
            load_classes(tmp_path, split="train")
        one_line(caught, "class 'b'", "train and test")

    def test_a_class_may_be_called_train(self, tmp_path):
        picture_folder(tmp_path, ["train", "bus", "car"])
        assert load_classes(tmp_path, split="all").class_names == ("bus", "car", "train")

    def test_groups_are_outer_folders(self, tmp_path):
        for group in "PQRST":
            picture_folder(tmp_path / group, ["one", "two"])
        found = {split: load_classes(tmp_path, split=split, split_by="group") for split in SPLITS}
        groups = [{name.split("/")[0] for name in part.class_names} for part in found.values()]
        assert [len(some) for some in groups] == [3, 1, 1]
        assert set.union(*groups) == set("PQRST")
        assert found["train"].group_kind == "folder"
        assert len(found["train"].group_names) == 3
        with pytest.raises(InputError) as caught:
            load_classes(picture_folder(tmp_path / "P" / "flat", self.names), split="train", split_by="group")
        one_line(caught, "0 groups")

    def test_size_colour_and_limits(self, tmp_path):
        picture_folder(tmp_path, self.names, side=40)
        (tmp_path / "class00" / "0.png").unlink()
        Image.new("RGB", (60, 40), (255, 0, 0)).save(tmp_path / "class00" / "0.png")
        with pytest.raises(InputError) as caught:
            load_classes(tmp_path, split="all")
        one_line(caught, "40", "60", "give a size")
        found = load_classes(tmp_path, split="all", size=20)
        assert found.images.shape == (36, 3, 20, 20)
        assert found.images[0, :, 10, 10].tolist() == [255, 0, 0]
        assert "padded 1" in found.notes
        assert load_classes(tmp_path, split="all", size=20, channels=1).shape == (1, 20, 20)
        few = load_classes(tmp_path, split="train", size=20, classes=4, instances=2)
        assert few.counts.tolist() == [2] * 4
        with pytest.raises(InputError) as caught:
            load_classes(tmp_path, split="train", size=20, classes=9)
        one_line(caught, "9 asked for", "has 8")

    def test_averages_areas(self, tmp_path):
        random = np.random.default_rng(0)
        pixels = random.integers(0, 256, (40, 40)).astype(np.uint8)
        for name in "ab":
            (tmp_path / name).mkdir()
            Image.fromarray(pixels).save(tmp_path / name / "0.png")
        found = load_classes(tmp_path, split="all", size=20).images[0, 0]
        expected = pixels.reshape(20, 2, 20, 2).astype(np.float64).mean((1, 3))
        assert np.abs(found - expected).max() <= 1

    def test_passes_over_what_is_no_image_and_says_so(self, tmp_path):
        folder = picture_folder(tmp_path / "mine", self.names)
        (folder / "notes.txt").write_text("x")
        (folder / "class01" / ".DS_Store").write_text("x")
        (folder / "class01" / "._0.png").write_text("x")
        (folder / "bare").mkdir()
        Image.new("L", (20, 20)).save(folder / "loose.png")
        found = load_classes(folder, split="all")
        assert len(found) == 36
        for words in (
            "2 hidden",
            "1 files that are no images, such as notes.txt",
            "1 folders without",
            "1 images that",
        ):
            assert words in found.notes

    def test_refuses_bad_folders(self, tmp_path):
        (tmp_path / "empty").mkdir()
        with pytest.raises(InputError) as caught:
            load_classes(tmp_path / "empty", split="all")
        one_line(caught, "empty", "no classes")
        with pytest.raises(InputError) as caught:
            load_classes(picture_folder(tmp_path / "few", self.names[:5]), split="train")
        one_line(caught, "few", "5 classes", "at least 6")
        for options in ({}, {"size": 28}):
            with pytest.raises(InputError) as caught:
                load_classes(
                    picture_folder(tmp_path / f"tiny{len(options)}", self.names, side=7), split="all", **options
                )
            one_line(caught, "0.png", "7 x 7", "8")
        with pytest.raises(InputError, match="7 pixels"):
            load_classes(picture_folder(tmp_path / "small", self.names, side=40), split="all", size=7)
        folder = picture_folder(tmp_path / "broken", self.names)
        whole = (folder / "class03" / "1.png").read_bytes()
        (folder / "class03" / "1.png").write_bytes(whole[:40])
        with pytest.raises(InputError) as caught:
            load_classes(folder, split="all")
        one_line(caught, "class03/1.png", "not a readable image")


class TestArrays:
    x = np.random.default_rng(0).integers(0, 256, (12, 4, 16, 16)).astype(np.uint8)

    def save(self, folder, **arrays):
        np.savez(folder / "mine.npz", **arrays)
        return folder / "mine.npz"

    def test_classes_by_instances_round_trip(self, tmp_path):
        found = load_classes(self.save(tmp_path, x=self.x), split="all")
        np.testing.assert_array_equal(found.images[:, 0], self.x.reshape(48, 16, 16))
        assert found.class_names == tuple(map(str, range(12)))
        assert found.counts.tolist() == [4] * 12
        np.save(tmp_path / "mine.npy", self.x)
        np.testing.assert_array_equal(load_classes(tmp_path / "mine.npy", split="all").images, found.images)

    def test_labelled_round_trip(self, tmp_path):
        flat, labels = self.x.reshape(48, 16, 16), np.tile(np.arange(12) + 5, 4)
        found = load_classes(self.save(tmp_path, x=flat, y=labels), split="all")
        for row in (0, 17, 47):
            place = found.class_names.index(str(labels[row]))
            assert any((image == flat[row]).all() for image in found.images[found.labels == place])
        parts = [load_classes(tmp_path / "mine.npz", split=split) for split in SPLITS]
        assert [part.ways for part in parts] == [8, 2, 2]
        assert len({name for part in parts for name in part.class_names}) == 12

    def test_text_labels_and_class_names(self, tmp_path):
        flat, words = self.x.reshape(48, 16, 16), np.array([f"w{number:02d}" for number in range(12)])
        by_text = load_classes(self.save(tmp_path, x=flat, y=np.repeat(words, 4)), split="test")
        by_name = load_classes(
            self.save(tmp_path, x=flat, y=np.repeat(np.arange(12), 4), class_names=words), split="test"
        )
        assert by_text.class_names == by_name.class_names
        np.testing.assert_array_equal(by_text.images, by_name.images)

    def test_colour_first_or_last(self, tmp_path):
        colour = np.random.default_rng(1).integers(0, 256, (12, 20, 20, 3)).astype(np.uint8)
        last = load_classes(self.save(tmp_path, x=colour, y=np.arange(12)), split="all")
        first = load_classes(self.save(tmp_path, x=colour.transpose(0, 3, 1, 2), y=np.arange(12)), split="all")
        assert last.shape == (3, 20, 20)
        np.testing.assert_array_equal(last.images, first.images)
        grey = load_classes(tmp_path / "mine.npz", split="all", channels=1).images[0, 0]
        expected = np.asarray(Image.fromarray(last.images[0].transpose(1, 2, 0)).convert("L"))
        assert np.abs(grey.astype(int) - expected.astype(int)).max() <= 1
        assert load_classes(self.save(tmp_path, x=self.x), split="all", channels=3).shape == (3, 16, 16)

    @pytest.mark.parametrize(
        ("change", "noted"),
        [
            (lambda x: x / np.float32(255), False),
            (lambda x: x.astype(np.float64), True),
            (lambda x: x.astype(np.int32), False),
        ],
    )
    def test_bytes_in_other_guise_are_bytes(self, tmp_path, change, noted):
        found = load_classes(self.save(tmp_path, x=change(self.x)), split="all")
        assert found.images.dtype == np.uint8
        np.testing.assert_array_equal(found.images, load_classes(self.save(tmp_path, x=self.x), split="all").images)
        assert ("divided by 255" in found.notes) == noted

    def test_bits_are_black_and_white(self, tmp_path):
        bits = self.x > 127
        plain = load_classes(self.save(tmp_path, x=bits), split="all")
        assert set(np.unique(plain.images)) == {0, 255}
        found = load_classes(self.save(tmp_path, x=bits.astype(np.uint8)), split="all")
        np.testing.assert_array_equal(found.images, plain.images)
        assert "scaled by 255" in found.notes

    def test_other_floats_stay_floats(self, tmp_path):
        floats = np.random.default_rng(2).random((6, 2, 32, 32))
        found = load_classes(self.save(tmp_path, x=floats), split="all")
        assert found.images.dtype == np.float32
        np.testing.assert_allclose(found.images[:, 0], floats.reshape(12, 32, 32), atol=1e-6)
        halved = load_classes(tmp_path / "mine.npz", split="all", size=16).images[:, 0]
        np.testing.assert_allclose(halved, floats.reshape(12, 16, 2, 16, 2).mean((2, 4)), atol=1e-6)

    @pytest.mark.parametrize(
        ("arrays", "words"),
        [
            ({"x": x[0]}, ["'x' has shape (4, 16, 16)", "classes"]),
            ({"x": x[:, 0], "y": np.arange(3)}, ["'y' has shape (3,)", "12 images"]),
            ({"x": x[:, 0], "y": np.arange(12.0)}, ["'y' is float64", "integers"]),
            ({"x": x[:, 0], "y": np.arange(12) > 3}, ["'y' is bool"]),
            ({"x": x[:, 0], "y": np.arange(12), "class_names": np.array(["a", "b"])}, ["2 names", "0..11"]),
            ({"images": x}, ["needs an array 'x'", "images"]),
            ({"x": x[:, :, :6, :6]}, ["6 x 6", "8"]),
            ({"x": np.zeros((6, 2, 16, 20), np.uint8)}, ["16 x 20", "squares"]),
            ({"x": np.zeros((6, 2, 16, 16, 2), np.uint8)}, ["2 channels"]),
            ({"x": np.zeros((0, 2, 16, 16), np.uint8)}, ["(0, 2, 16, 16)"]),
            ({"x": np.where(np.arange(12)[:, None, None, None] == 5, np.nan, x / 255)}, ["class '5'", "NaN"]),
            ({"x": np.where(np.arange(12)[:, None, None, None] == 5, np.inf, x / 255)}, ["class '5'", "infinity"]),
            ({"x": (x - 127.5) / 70}, ["-1.8", "standardised"]),
            ({"x": x * 300.0}, ["76500"]),
            ({"x": x.astype(np.int64) * 257}, ["int64", "65535"]),
            ({"x": x.astype(np.complex64)}, ["complex64"]),
            ({"x": x[:5]}, ["5 classes", "at least 6"]),
        ],
    )
    def test_refuses_bad_arrays(self, tmp_path, arrays, words):
        path = self.save(tmp_path, **arrays)
        with pytest.raises(InputError) as caught:
            load_classes(path, split="train")
        one_line(caught, "mine.npz", *words)

    def test_refuses_damaged_files_and_never_unpickles(self, tmp_path):
        path = self.save(tmp_path, x=self.x)
        whole = path.read_bytes()
        for cut in (0, 10, 1000, len(whole) - 30):
            path.write_bytes(whole[:cut])
            with pytest.raises(InputError) as caught:
                load_classes(path, split="all")
            one_line(caught, "mine.npz")

        class Trap:
            def __reduce__(self):
                return (Path.touch, (tmp_path / "ran",))

        trap = np.array([Trap(), 2], dtype=object)
        np.savez(path, x=trap, allow_pickle=True)
        np.save(tmp_path / "mine.npy", trap, allow_pickle=True)
        for bad in (path, tmp_path / "mine.npy", tmp_path / "absent.npz"):
            with pytest.raises(InputError) as caught:
                load_classes(bad, split="all")
            one_line(caught, bad.name)
        assert not (tmp_path / "ran").exists()


class TestPictures:
    def ink(self, paper=255, stroke=0, side=40):
        pixels = np.full((side, side), paper, np.uint8)
        pixels[10:30, 18:22] = stroke
        return Image.fromarray(pixels)

    def two(self, folder, **images):
        for name, picture in images.items():
            (folder / name).mkdir(parents=True)
            picture.save(folder / name / "1.png")
        return folder

    def test_labelled_in_order(self, tmp_path):
        picture_folder(tmp_path, ["b", "a"], each=2)
        found = read_labelled(tmp_path, 28, 1)
        assert found.class_names == ("a", "b")
        assert found.labels.tolist() == [0, 0, 1, 1]
        assert found.files == ("a/0.png", "a/1.png", "b/0.png", "b/1.png")
        assert torch.round(found.images[:, 0, 5, 5] * 255).tolist() == [10, 11, 0, 1]
        assert found.images.dtype == torch.float32
        assert not found.inverted

    def test_unlabelled_in_the_order_of_names(self, tmp_path):
        for name, grey in (("b.png", 2), ("a.jpg", 100), (".c.png", 3), ("d.txt", None)):
            if grey is None:
                (tmp_path / name).write_text("x")
            else:
                Image.new("L", (30, 30), grey).save(tmp_path / name)
        (tmp_path / "inner").mkdir()
        found = read_unlabelled(tmp_path, 28, 3)
        assert found.files == ("a.jpg", "b.png")
        assert found.images.shape == (2, 3, 28, 28)
        notes = "\n".join(found.notes)
        for words in ("1 hidden", "d.txt", "inner"):
            assert words in notes
        single = read_unlabelled(tmp_path / "b.png", 28, 3)
        assert single.files == ("b.png",)
        assert torch.equal(single.images[0], found.images[1])

    def test_dark_ink_is_inverted_for_a_network_of_light_ink(self, tmp_path):
        folder = self.two(tmp_path, a=self.ink(), b=self.ink(paper=220, stroke=30))
        found = read_labelled(folder, 40, 1, training_mean=0.1)
        assert found.inverted
        assert "bright" in " ".join(found.notes)
        expected = 1 - torch.from_numpy(np.asarray(self.ink()) / np.float32(255))
        assert torch.equal(found.images[0, 0], expected)
        assert torch.equal(found.images, read_labelled(folder, 40, 1, invert=True).images)
        for options in ({}, {"training_mean": 0.8}, {"training_mean": 0.1, "invert": False}):
            assert not read_labelled(folder, 40, 1, **options).inverted
        assert not read_labelled(folder, 40, 3, training_mean=0.1).inverted
        light = self.two(tmp_path / "light", a=self.ink(0, 255), b=self.ink(0, 200), c=self.ink())
        mixed = read_labelled(light, 40, 1, training_mean=0.1)
        assert not mixed.inverted
        assert "1 of 3 images have a bright border" in " ".join(mixed.notes)

    @pytest.mark.parametrize("kind", ["RGBA", "LA", "palette"])
    def test_transparent_ink_is_put_on_paper(self, tmp_path, kind):
        shape = np.asarray(self.ink()) == 0
        for stroke in (0, 255):
            pixels = np.zeros((40, 40, 4), np.uint8)
            pixels[shape] = (stroke, stroke, stroke, 255)
            picture = Image.fromarray(pixels)
            if kind == "palette":
                flat = Image.fromarray(shape.astype(np.uint8)).convert("P")
                flat.putpalette([7, 7, 7, stroke, stroke, stroke])
                flat.save(tmp_path / "p.png", transparency=0)
            else:
                picture.convert(kind).save(tmp_path / "p.png")
            found = read_unlabelled(tmp_path / "p.png", 40, 1).images[0, 0]
            assert torch.equal(found, torch.from_numpy(np.where(shape, stroke, 255 - stroke) / np.float32(255)))

    def test_sixteen_bits_floats_and_other_modes(self, tmp_path):
        pixels = np.asarray(self.ink(200, 50))
        Image.fromarray(pixels.astype(np.uint16) * 257).save(tmp_path / "a.png")
        Image.fromarray(pixels.astype(np.float32) / 255).save(tmp_path / "b.tif")
        Image.fromarray(pixels).convert("RGB").convert("CMYK").save(tmp_path / "c.tif")
        Image.fromarray(pixels).convert("P").save(tmp_path / "d.gif")
        Image.fromarray(pixels.astype(np.int32)).save(tmp_path / "e.tif")
        found = read_unlabelled(tmp_path, 40, 1).images[:, 0]
        for image in found:
            torch.testing.assert_close(image, torch.from_numpy(pixels / np.float32(255)), atol=2 / 255, rtol=0)
        assert read_unlabelled(tmp_path, 40, 3).images.shape == (5, 3, 40, 40)

    def test_exif_rotation_is_undone(self, tmp_path):
        pixels = np.zeros((40, 40), np.uint8)
        pixels[:20] = 255
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=95)
        found = read_unlabelled(tmp_path, 40, 1).images[0, 0]
        assert found[:, 25:].mean() > 0.95
        assert found[:, :15].mean() < 0.05

    def test_padded_in_the_colour_of_the_border_and_tiny_ones_enlarged(self, tmp_path):
        Image.new("RGB", (60, 30), (200, 100, 0)).save(tmp_path / "wide.png")
        Image.new("RGB", (3, 2), (200, 100, 0)).save(tmp_path / "tiny.png")
        found = read_unlabelled(tmp_path, 28, 3)
        expected = torch.tensor([200, 100, 0])[:, None, None] / 255
        assert torch.equal(found.images, expected.expand(2, 3, 28, 28))
        notes = " ".join(found.notes)
        assert "padded 2" in notes
        assert "enlarged 1 images to 28 pixels, such as tiny.png" in notes

    def test_refuses_bad_folders(self, tmp_path):
        def refused(read, path, *words):
            with pytest.raises(InputError) as caught:
                read(path, 28, 1)
            one_line(caught, *words)

        (tmp_path / "empty").mkdir()
        for read in (read_labelled, read_unlabelled):
            refused(read, tmp_path / "absent", "absent", "no such folder")
        refused(read_unlabelled, tmp_path / "empty", "empty", "no images")
        refused(read_labelled, tmp_path / "empty", "empty", "0 classes")
        flat = tmp_path / "flat"
        flat.mkdir()
        self.ink().save(flat / "a.png")
        refused(read_labelled, flat, "0 classes", "1 images in no class")
        refused(read_labelled, flat / "a.png", "is a file")
        refused(read_unlabelled, tmp_path, "its folders, such as empty, are not read")
        bare = picture_folder(tmp_path / "bare", ["a", "b"])
        (bare / "c").mkdir()
        refused(read_labelled, bare, "class 'c' has no images")
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40)).astype(np.uint8)).save(flat / "bad.png")
        whole = (flat / "bad.png").read_bytes()
        for content in (b"", b"no picture", whole[:45], whole[: len(whole) // 2]):
            (flat / "bad.png").write_bytes(content)
            refused(read_unlabelled, flat, "bad.png", "not a readable image")
        (flat / "bad.png").unlink()
        nan = np.full((20, 20), np.nan, np.float32)
        Image.fromarray(nan).save(flat / "nan.tif")
        refused(read_unlabelled, flat, "nan.tif", "NaN")


# ---- one array file a split, as the authors keep Omniglot


@pytest.fixture
def arrays(tmp_path):
    """Ten classes to train on and four to test on, three images each; the first pixel tells the class."""
    for name, ways, first in (("train", 10, 0), ("test", 4, 10)):
        x = np.zeros((ways, 3, 16, 16), np.uint8)
        x[:, :, 0, 0] = first + np.arange(ways)[:, None]
        np.save(tmp_path / f"{name}.npy", x)
    return tmp_path


def test_array_files_are_splits(arrays):
    parts = {split: load_classes(arrays, split=split) for split in ("train", "validation", "test", "all")}
    classes = {split: set(part.images[:, 0, 0, 0].tolist()) for split, part in parts.items()}
    assert len(classes["train"]) == 8
    assert classes["train"] | classes["validation"] == set(range(10))
    assert not classes["train"] & classes["validation"]
    assert classes["test"] == {10, 11, 12, 13}
    assert classes["all"] == set(range(14))
    assert "2 of the classes in train.npy are for it" in parts["train"].notes


def test_array_files_replace_omniglots_images_where_those_are_absent(arrays, monkeypatch, tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    shutil.copytree(arrays, root / "omniglot")
    monkeypatch.setenv("SHARED_CORE_DATA", str(root))
    found = load_classes("omniglot", split="test", size=16)
    assert (found.name, found.ways, found.shape) == ("omniglot", 4, (1, 16, 16))


def test_array_files_cannot_be_split_otherwise(arrays):
    with pytest.raises(InputError, match=r"is divided by its files test\.npy, train\.npy"):
        load_classes(arrays, split="train", split_by="class")
    np.savez(arrays / "val.npz", x=np.zeros((3, 3, 16, 16), np.uint8))
    assert load_classes(arrays, split="validation").ways == 3
    np.save(arrays / "validation.npy", np.zeros((3, 3, 16, 16), np.uint8))
    with pytest.raises(InputError, match="are both for the split validation"):
        load_classes(arrays, split="train")


# ---- other domains


def idx(array):
    return b"\0\0\x08" + bytes([array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


@pytest.fixture
def other_domains(tmp_path, monkeypatch):
    """MNIST, CIFAR-10 and SVHN of 50 training and 20 test images; the first pixel numbers the image."""
    for folder in ("mnist", "cifar-10-batches-bin", "svhn"):
        (tmp_path / folder).mkdir()
    for split, stem, count, first in (("train", "train", 50, 0), ("test", "t10k", 20, 100)):
        labels = np.arange(count, dtype=np.uint8) % 10
        number = first + np.arange(count, dtype=np.uint8)
        grey = np.zeros((count, 28, 28), np.uint8)
        grey[:, 0, 0] = number
        (tmp_path / "mnist" / f"{stem}-images-idx3-ubyte").write_bytes(idx(grey))
        (tmp_path / "mnist" / f"{stem}-labels-idx1-ubyte").write_bytes(idx(labels))
        record = np.zeros((count, 3073), np.uint8)
        record[:, 0], record[:, 1] = labels, number
        record.tofile(
            tmp_path / "cifar-10-batches-bin" / ("data_batch_1.bin" if split == "train" else "test_batch.bin")
        )
        x = np.zeros((32, 32, 3, count), np.uint8)
        x[0, 0, 0] = number
        savemat(tmp_path / "svhn" / f"{split}_32x32.mat", {"X": x, "y": np.where(labels, labels, 10)[:, None]})
    monkeypatch.setenv("SHARED_CORE_DATA", str(tmp_path))
    return tmp_path


class TestOtherDomains:
    @pytest.mark.parametrize(
        ("name", "shape"), [("mnist", (1, 28, 28)), ("cifar-10", (3, 32, 32)), ("svhn", (3, 32, 32))]
    )
    def test_splits_divide_images_and_not_classes(self, other_domains, name, shape):
        found = {split: load_classes(name, split=split) for split in (*SPLITS, "all")}
        numbers = {split: part.images[:, 0, 0, 0].tolist() for split, part in found.items()}
        assert numbers["train"] == list(range(40))
        assert numbers["validation"] == list(range(40, 50))
        assert numbers["test"] == list(range(100, 120))
        assert numbers["all"] == [*range(50), *range(100, 120)]
        for part in found.values():
            assert part.shape == shape
            assert part.class_names == found["all"].class_names
            assert (part.labels == part.images[:, 0, 0, 0] % 10).all()
            assert part.notes.count("all ten classes are in every split") == 1
        assert found["all"].class_names[0] == ("airplane" if name == "cifar-10" else "0")

    @pytest.mark.parametrize("name", ["mnist", "cifar-10", "svhn", "digits"])
    def test_size_channels_classes_and_instances(self, other_domains, name):
        whole = load_classes(name, split="all", size=14)
        for channels in (1, 3):
            options = {"size": 14, "channels": channels, "classes": 4, "instances": 2}
            found = {split: load_classes(name, split=split, **options) for split in ("train", "test")}
            assert found["train"].class_names == found["test"].class_names
            for part in found.values():
                assert part.counts.max() <= 2
                assert part.shape == (channels, 14, 14)
                assert {*part.class_names} < {*whole.class_names}
        with pytest.raises(InputError) as caught:
            load_classes(name, split="test", classes=11)
        one_line(caught, "classes: 11 asked for", name, "has 10")

    def test_digits_are_divided_within_classes(self):
        found = {split: load_classes("digits", split=split, seed=3) for split in (*SPLITS, "all")}
        assert [len(found[split]) for split in found] == [1078, 360, 359, 1797]
        for split, share in zip(SPLITS, (0.6, 0.2, 0.2), strict=True):
            assert np.abs(found[split].counts - share * found["all"].counts).max() < 1
        parts = np.concatenate([found[split].images for split in SPLITS])
        together, whole = (
            np.sort(images.reshape(1797, -1).view("V64").ravel()) for images in (parts, found["all"].images)
        )
        assert (together == whole).all()
        assert found["all"].images.max() == 255
        again = load_classes("digits", split="test", seed=3)
        np.testing.assert_array_equal(again.images, found["test"].images)
        assert not np.array_equal(load_classes("digits", split="test").images[:50], again.images[:50])

    def test_grey_to_colour_and_back(self, other_domains):
        grey = load_classes("digits", split="validation")
        colour = load_classes("digits", split="validation", channels=3)
        assert colour.shape == (3, 8, 8)
        np.testing.assert_array_equal(classes._with_channels(colour, 1).images, grey.images)

    def test_cannot_be_split_otherwise(self, other_domains):
        for name, way in (("mnist", "class"), ("digits", "official"), ("svhn", "script")):
            with pytest.raises(InputError) as caught:
                load_classes(name, split="test", split_by=way)
            one_line(caught, "split_by", way, name)

    @pytest.mark.parametrize("name", ["mnist", "cifar-10", "svhn"])
    def test_says_what_is_missing(self, tmp_path, monkeypatch, name):
        monkeypatch.setenv("SHARED_CORE_DATA", str(tmp_path))
        official = {
            "mnist": "lecun.com",
            "cifar-10": "cs.toronto.edu",
            "svhn": "http://ufldl.stanford.edu/housenumbers/",
        }
        with pytest.raises(MissingFilesError) as caught:
            load_classes(name, split="train")
        one_line(caught, tmp_path, name.replace("-", ""), official[name])

    def test_names_are_apart(self, unchecked):
        assert not {*NAMES} & {*OTHER_DOMAINS}
        with pytest.raises(UnknownKeyError) as caught:
            load_classes("mnsit", split="test")
        one_line(caught, *NAMES, *OTHER_DOMAINS)


class TestHershey:
    def test_says_how_to_get_it(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "HersheyFonts", None)
        _hershey._glyphs.cache_clear()
        with pytest.raises(InputError) as caught:
            load_classes("hershey", split="test", classes=3)
        one_line(caught, "hershey", "pip install Hershey-Fonts")

    @needs_hershey
    def test_splits_are_of_different_faces(self):
        found = {split: load_classes("hershey", split=split, instances=1, size=8) for split in (*SPLITS, "all")}
        far = load_classes("hershey", split="test", split_by="script", instances=1, size=8)
        assert [part.ways for part in (*found.values(), far)] == [619, 104, 140, 1103, 240]
        assert set(far.group_names) == {"japanese", "astrology", "music"}
        parts = [*(found[split] for split in SPLITS), far]
        for kind in ("class_names", "group_names"):
            names = [name for part in parts for name in getattr(part, kind)]
            assert len(names) == len(set(names))
            assert set(names) == set(getattr(found["all"], kind))
        for part in parts:
            assert part.group_kind == "face"
            of_class = dict(zip(part.labels.tolist(), part.groups.tolist(), strict=True))
            for label, group in of_class.items():
                assert part.class_names[label].startswith(f"{part.group_names[group]}/")
        trained = load_classes("hershey", split="train", split_by="script", instances=1, size=8)
        np.testing.assert_array_equal(trained.images, found["train"].images)

    @needs_hershey
    def test_no_glyph_is_another_one_moved(self):
        outlines = set()
        for strokes in _hershey._glyphs().values():
            assert sum(map(len, strokes)) >= 4
            points = np.concatenate(strokes)
            np.testing.assert_allclose(points.min(0) + points.max(0), 0, atol=1e-9)
            np.testing.assert_allclose(np.ptp(points, axis=0).max(), 20)
            outlines.add(tuple(tuple(map(tuple, np.round(stroke, 6).tolist())) for stroke in strokes))
        # Three are others in another size.
        assert len(outlines) == 1100

    @needs_hershey
    def test_a_class_does_not_depend_on_the_others_nor_on_how_many_are_drawn(self):
        few = load_classes("hershey", split="validation", classes=5, instances=3, seed=4)
        whole = load_classes("hershey", split="validation", instances=6, seed=4)
        for number, name in enumerate(few.class_names):
            other = whole.images[whole.labels == whole.class_names.index(name)]
            np.testing.assert_array_equal(few.images[few.labels == number], other[:3])
        other_seed = load_classes("hershey", split="validation", instances=6, seed=5)
        assert not np.array_equal(other_seed.images, whole.images)

    @needs_hershey
    def test_draws_white_on_black_at_any_size(self):
        for size in (14, 28, 40):
            found = load_classes("hershey", split="test", classes=30, instances=4, size=size)
            assert found.images.shape == (120, 1, size, size)
            assert found.images.dtype == np.uint8
            assert 0.03 < found.mean < 0.25
            # The thinnest pen is a third of a pixel wide at the smallest size.
            assert (found.images.reshape(120, -1).max(1) >= 85).all()
        default = load_classes("hershey", split="test", classes=2, channels=3)
        assert default.images.shape == (40, 3, 28, 28)
        assert len(np.unique(default.images.reshape(40, -1), axis=0)) == 40
        with pytest.raises(InputError, match="8 to 128"):
            load_classes("hershey", split="test", classes=2, size=4)


def test_importing_loads_no_optional_library():
    code = "import sys, shared_core.classes; print(*{'matplotlib', 'PIL', 'HersheyFonts', 'sklearn'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
