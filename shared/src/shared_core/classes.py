"""Classes of images: named sets, users' folders and arrays, and pictures to adapt to.

:func:`load_classes` gives the classes of one split. No class is in two splits, so that validation and test tasks are
about classes never seen; only the sets in :data:`OTHER_DOMAINS` with ten classes have all of them in every split.
:func:`read_labelled` and :func:`read_unlabelled` read pictures from anywhere in the form that a trained network takes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float32, Int64, Shaped, UInt8
from numpy.typing import NDArray

from shared_core import _hershey
from shared_core._pictures import (
    SMALLEST_SIDE,
    LabelledPictures,
    Pictures,
    Scan,
    decoded,
    has_colour,
    read_labelled,
    read_unlabelled,
)
from shared_core.arrays import read_arrays
from shared_core.data import ImageData, MissingFilesError, data_root
from shared_core.data import load as load_shared
from shared_core.data._glyphs import FACES
from shared_core.data._images import resize_area
from shared_core.errors import InputError, UnknownKeyError

__all__ = [
    "NAMES",
    "OTHER_DOMAINS",
    "ClassImages",
    "LabelledPictures",
    "Pictures",
    "Split",
    "SplitBy",
    "load_classes",
    "read_labelled",
    "read_unlabelled",
]

NAMES = ("glyphs", "omniglot", "mini-imagenet", "cifar-fs")
"""Few-shot sets that :func:`load_classes` knows by name: no class is in two splits."""

OTHER_DOMAINS = ("mnist", "cifar-10", "digits", "svhn", "hershey")
"""Further sources by name, to test on what a network was not trained for. Of the first four, the ten classes are in
every split and the images are not; of ``hershey`` no class is in two splits."""

Split = Literal["train", "validation", "test", "all"]
SplitBy = Literal["class", "group", "script", "official"]

_SPLITS = ("train", "validation", "test", "all")
_SPLIT_FOLDERS = {
    **dict.fromkeys(("train", "training", "background"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "validation"),
    **dict.fromkeys(("test", "testing", "evaluation"), "test"),
}
_Pixels = NDArray[np.uint8] | NDArray[np.float32]

# The split of Bertinetto et al. (ICLR 2019); the other 64 classes are for training.
_CIFAR_FS = {
    "validation": (
        *("beaver", "beetle", "butterfly", "camel", "cattle", "crab", "crocodile", "flatfish", "lamp", "maple_tree"),
        *("motorcycle", "otter", "sea", "shark", "television", "tractor"),
    ),
    "test": (
        *("baby", "bed", "bicycle", "chimpanzee", "fox", "leopard", "man", "pickup_truck", "plain", "poppy", "rocket"),
        *("rose", "snail", "sweet_pepper", "table", "telephone", "wardrobe", "whale", "woman", "worm"),
    ),
}


@dataclass(frozen=True, eq=False)
class ClassImages:
    """Images with the class of each; bytes where the source allows, since a class-indexed set is read at random.

    Parameters
    ----------
    name : what to call it in results
    images : ``(n, channels, height, width)``, bytes 0..255 or floats in [0, 1]
    labels : ``(n,)`` positions in `class_names`
    class_names : different ones
    groups : ``(n,)`` positions in `group_names`, or None
    group_names : of the alphabets, font faces or outer folders
    group_kind : what a group is: ``alphabet``, ``face``, ``superclass``, ``folder``
    provenance : where the images are from
    notes : what a reader should know, in one line; empty where there is nothing

    Raises
    ------
    InputError
        When the shapes do not go together, or images are neither bytes nor floats in [0, 1].

    Examples
    --------
    >>> data = ClassImages("toy", np.full((4, 1, 16, 16), 51, np.uint8), np.array([0, 0, 1, 1]), ("a", "b"))
    >>> data.ways, data.shape, data.counts.tolist(), round(float(data.float_images(np.array([2])).mean()), 6)
    (2, (1, 16, 16), [2, 2], 0.2)
    """

    name: str
    images: UInt8[np.ndarray, "n channels height width"] | Float32[np.ndarray, "n channels height width"]
    labels: Int64[np.ndarray, " n"]
    class_names: tuple[str, ...]
    groups: Int64[np.ndarray, " n"] | None = None
    group_names: tuple[str, ...] = ()
    group_kind: str = ""
    provenance: str = ""
    notes: str = ""

    def __post_init__(self) -> None:
        images, labels, classes = self.images, self.labels, len(self.class_names)
        if images.ndim != 4 or not images.size or str(images.dtype) not in ("uint8", "float32"):
            raise InputError(
                f"{self.name}: images must be uint8 or float32 (n, channels, height, width), got {images.dtype}"
                f" {images.shape}"
            )
        if labels.shape != (len(images),) or labels.dtype != np.int64:
            raise InputError(
                f"{self.name}: labels must be int64 ({len(images)},), one an image, got {labels.dtype} {labels.shape}"
            )
        if labels.min() < 0 or labels.max() >= classes or len(set(self.class_names)) != classes:
            raise InputError(
                f"{self.name}: labels {labels.min()}..{labels.max()} for {classes} class names; they must be positions"
                " in different names"
            )
        if self.groups is not None and self.groups.shape != labels.shape:
            raise InputError(f"{self.name}: groups have shape {self.groups.shape}, and labels {labels.shape}")
        # Two passes instead of an array of booleans as large as the images.
        if images.dtype == np.float32 and not (images.min() >= 0 and images.max() <= 1):
            raise InputError(f"{self.name}: floats must be finite and in [0, 1]; scale the images")

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    @property
    def ways(self) -> int:
        """Number of classes: the most ways that a task from here can have."""
        return len(self.class_names)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(channels, height, width)``."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    @property
    def counts(self) -> Int64[np.ndarray, " ways"]:
        """Images of each class."""
        return np.bincount(self.labels, minlength=self.ways).astype(np.int64)

    @property
    def mean(self) -> float:
        """Mean pixel in [0, 1]: below 0.5 where light ink is on a dark ground."""
        return float(self.images.mean(dtype=np.float64)) / (255 if self.images.dtype == np.uint8 else 1)

    def float_images(self, index: Shaped[np.ndarray, " k"] | slice) -> Float32[np.ndarray, "k channels height width"]:
        """Return some of the images, in [0, 1].

        Parameters
        ----------
        index : positions, True for those to take, or a slice
        """
        chosen = self.images[index]
        return chosen.astype(np.float32) / np.float32(255 if chosen.dtype == np.uint8 else 1)

    def select(self, names: Sequence[str]) -> ClassImages:
        """Return only some classes, in the order given.

        Parameters
        ----------
        names : of the classes to keep

        Raises
        ------
        UnknownKeyError
            For a name that no class has.
        """
        place = {name: number for number, name in enumerate(self.class_names)}
        if unknown := next((name for name in names if name not in place), None):
            raise UnknownKeyError(f"{self.name}: has no class '{unknown}'")
        number = np.full(self.ways, -1, dtype=np.int64)
        number[[place[name] for name in names]] = np.arange(len(names))
        rows = np.flatnonzero(number[self.labels] >= 0)
        return replace(self.rows(rows), labels=number[self.labels[rows]], class_names=tuple(names))

    def rows(self, index: Int64[np.ndarray, " k"]) -> ClassImages:
        """Return only some of the images, with all the class names.

        Parameters
        ----------
        index : positions
        """
        groups = None if self.groups is None else self.groups[index]
        return replace(self, images=self.images[index], labels=self.labels[index], groups=groups)


def load_classes(
    source: str | Path,
    *,
    split: Split,
    size: int | None = None,
    seed: int = 0,
    split_by: SplitBy | None = None,
    classes: int | None = None,
    instances: int | None = None,
    rotations: bool = False,
    channels: Literal[1, 3] | None = None,
) -> ClassImages:
    """Load the classes of one split; the splits of a source with one seed have no class in common.

    There is one exception: of ``mnist``, ``cifar-10``, ``digits`` and ``svhn`` all ten classes are in every split, and
    no image is in two. ``train`` and ``test`` are the official images, but for the last fifth of those for training,
    which is ``validation``; of ``digits``, which has no official split, 60/20/20 % of each class, divided by `seed`.

    Parameters
    ----------
    source : one of :data:`NAMES` or :data:`OTHER_DOMAINS`; a folder of images, ``<class>/*.png`` or
        ``<group>/<class>/*.png``, perhaps inside ``train``, ``val`` and ``test``; an NPZ with ``x``
        ``(n, height, width[, channels])`` and ``y`` ``(n,)`` of integers or text (and perhaps ``class_names``); an NPZ
        or NPY with ``x`` ``(classes, instances, height, width[, channels])``. A folder that is called like a set is
        meant by ``./name``
    split : ``train``, ``validation``, ``test`` or ``all``
    size : side in pixels; images are resized to it by averaging areas. Default: 28 for glyphs, Omniglot and Hershey,
        84 for mini-ImageNet, else as they are
    seed : of the split, of the choice of `classes` and `instances`, and of the drawing of glyphs and Hershey's
    split_by : ``class``: classes are divided at random, 64/16/20 (the default for folders and arrays); ``group``: whole
        groups are, about 60/20/20 (alphabets, the default for Omniglot; outer folders; typefaces of glyphs, where a
        class is then a character in one face: DejaVu Sans and Serif, the monospaced faces, STIX); ``official``:
        Omniglot's evaluation set is for tests, and the alphabets of its background set for training and validation;
        ``script``: glyphs of Greek, Armenian and Georgian are for tests, and those of other scripts for training and
        validation, or Hershey's Japanese, astrology and music. Default for glyphs: the base letter decides, so that A,
        A with an accent and a are together; for Hershey the typeface; for CIFAR-FS and mini-ImageNet the published
        split
    classes : keep only so many classes, drawn by `seed`
    instances : keep at most so many images of a class (of glyphs and Hershey: draw so many, default 20)
    rotations : add the classes turned by 90, 180 and 270 degrees as classes of their own, to ``train`` only
    channels : 1 or 3; converts. Default: as they are; of a folder 3 as soon as any of its pictures has colour

    Returns
    -------
    ClassImages, white at 255 (of Omniglot, glyphs and Hershey: ink). A user's split depends on the names of the
    classes and on the seed, and not on the files in them. Where a folder has ``train`` and no ``val``, a fifth of the
    classes in ``train`` are for validation.

    Raises
    ------
    InputError
        One line that says what is wrong: an unknown name, an absent set, a damaged file, too few classes to divide.

    Examples
    --------
    >>> data = load_classes("glyphs", split="test", classes=5, instances=4, size=20)
    >>> data.images.shape, data.ways
    ((20, 1, 20, 20), 5)
    """
    if split not in _SPLITS:
        raise InputError(f"split: must be one of {', '.join(_SPLITS)}, got '{split}'")
    for option, value in (("size", size), ("classes", classes), ("instances", instances)):
        if value is not None and value < 1:
            raise InputError(f"{option}: must be at least 1, got {value}")
    if channels not in (None, 1, 3):
        raise InputError(f"channels: must be 1 or 3, got {channels}")
    name = str(source).lower().replace("_", "-")
    path = Path(source)
    wanted = _Wanted(split, size, seed, split_by, classes, instances, channels)
    if isinstance(source, str) and name in (*NAMES, *OTHER_DOMAINS):
        found = _named(name, wanted)
    elif path.is_dir():
        arrays = _split_arrays(path)
        found = _array_folder(path, arrays, wanted) if arrays else _folder(path, wanted)
    elif path.suffix.lower() in (".npz", ".npy"):
        found = _array_file(path, wanted)
    elif path.exists():
        raise InputError(f"{path}: cannot tell what '{path.suffix}' is; give a folder of images, .npz or .npy")
    else:
        raise UnknownKeyError(
            f"'{source}' is no file, no folder and no set; sets are {', '.join((*NAMES, *OTHER_DOMAINS))}"
        )
    found = _with_channels(found, channels)
    return _rotated(found) if rotations and split == "train" else found


@dataclass(frozen=True)
class _Wanted:
    """The options of :func:`load_classes`, by name."""

    split: Split
    size: int | None
    seed: int
    split_by: SplitBy | None
    classes: int | None
    instances: int | None
    channels: Literal[1, 3] | None

    def allow(self, name: str, *ways: SplitBy) -> None:
        """Refuse a way to split that the source does not have."""
        if self.split_by is not None and self.split_by not in ways:
            known = ", ".join(ways) or "none: its split is fixed"
            raise InputError(f"split_by: '{self.split_by}' is not for {name}, which takes {known}")

    def limited(self, names: Sequence[str], where: str) -> list[str]:
        """Return the classes to keep of those in the split."""
        if self.classes is None:
            return list(names)
        if self.classes > len(names):
            raise InputError(
                f"classes: {self.classes} asked for, and the split '{self.split}' of {where} has {len(names)}"
            )
        drawn = set(_shuffled(names, f"{self.seed}/draw")[: self.classes])
        return [name for name in names if name in drawn]

    def thinned(self, count: int, name: str) -> NDArray[np.int64]:
        """Return which of a class's images to keep."""
        if self.instances is None or count <= self.instances:
            return np.arange(count)
        digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
        return np.sort(np.random.default_rng([self.seed, digest]).choice(count, self.instances, replace=False))

    def part_of(self, found: ClassImages, names: Sequence[str]) -> ClassImages:
        """Return what to keep of the named classes."""
        chosen = found.select(self.limited(names, found.name))
        if self.instances is None:
            return chosen
        members = [np.flatnonzero(chosen.labels == number) for number in range(chosen.ways)]
        kept = [rows[self.thinned(len(rows), name)] for rows, name in zip(members, chosen.class_names, strict=True)]
        return chosen.rows(np.sort(np.concatenate(kept)))


def _shuffled(names: Sequence[str], salt: str) -> list[str]:
    """Return the names in an order that depends on each name by itself: a new one moves no two others."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{salt}:{name}".encode()).digest())


def _fifth(names: Sequence[str], seed: int) -> list[str]:
    """Return the training classes that are for validation, where a source divides only training from test."""
    return _shuffled(names, str(seed))[: max(2, round(0.2 * len(names)))]


def _group(name: str) -> str:
    return name.rpartition("/")[0]


def _divided(names: Sequence[str], shares: tuple[float, float], least: int, seed: int) -> dict[str, list[str]]:
    """Divide names into train, validation (by their shares) and test (the rest), none smaller than `least`."""
    order, n = _shuffled(names, str(seed)), len(names)
    train = min(max(round(shares[0] * n), least), n - 2 * least)
    validation = min(max(math.floor(shares[1] * n + 1e-9), least), n - train - least)
    return {
        "train": order[:train],
        "validation": order[train : train + validation],
        "test": order[train + validation :],
    }


def _in_split(names: Sequence[str], split: Split, seed: int, where: str, *, by_group: bool = False) -> list[str]:
    """Return the names of the classes in a split: 64/16/20 of all classes, or about 60/20/20 of all groups."""
    if split == "all":
        return list(names)
    if not by_group:
        if len(names) < 6:
            raise InputError(
                f"{where}: {len(names)} classes cannot be divided into train, validation and test; give at least 6 (and"
                " 2 a split), or split 'all'"
            )
        part = set(_divided(names, (0.64, 0.16), 2, seed)[split])
        return [name for name in names if name in part]
    groups = sorted({_group(name) for name in names})
    if groups == [""] or len(groups) < 3:
        raise InputError(
            f"{where}: {len(groups) - (groups[0] == '')} groups cannot be divided into train, validation and test; give"
            " at least 3, each with its classes, <group>/<class>, or split by class"
        )
    chosen = set(_divided(groups, (0.6, 0.2), 1, seed)[split])
    return [name for name in names if _group(name) in chosen]


def _from_shared(found: ImageData, name: str, notes: str = "") -> ClassImages:
    images = found.images[:, None] if found.images.ndim == 3 else found.images.transpose(0, 3, 1, 2)
    if found.peak != 255:
        images = np.rint(images * (255 / found.peak)).astype(np.uint8)
    origin = found.provenance
    return ClassImages(
        name,
        np.ascontiguousarray(images),
        found.labels.astype(np.int64),
        found.class_names,
        found.groups,
        found.group_names,
        found.group_kind,
        f"{origin.source}; {origin.licence}; {origin.url}",
        "; ".join(note for note in (origin.notes, notes) if note),
    )


def _joined(parts: Sequence[ClassImages], notes: str = "") -> ClassImages:
    """Return sets of the same shape as one; classes of the same name are one class."""
    names = dict.fromkeys(name for part in parts for name in part.class_names)
    number = {name: place for place, name in enumerate(names)}
    labels = [np.array([number[name] for name in part.class_names], np.int64)[part.labels] for part in parts]
    groups = [part.groups for part in parts if part.groups is not None]
    return replace(
        parts[0],
        images=np.concatenate([part.images for part in parts]),
        labels=np.concatenate(labels),
        class_names=tuple(names),
        groups=np.concatenate(groups) if len(groups) == len(parts) else None,
        notes="; ".join(dict.fromkeys(note for note in (*(part.notes for part in parts), notes) if note)),
    )


def _resized(found: ClassImages, size: int | None) -> ClassImages:
    if size is None or found.shape[1:] == (size, size):
        return found
    if found.images.dtype == np.uint8:
        images = resize_area(found.images.transpose(0, 2, 3, 1), size).transpose(0, 3, 1, 2)
    else:
        smaller = torch.nn.functional.interpolate(torch.from_numpy(found.images), (size, size), mode="area")
        images = smaller.clamp_(0, 1).numpy()
    return replace(found, images=np.ascontiguousarray(images))


def _with_channels(found: ClassImages, channels: int | None) -> ClassImages:
    if channels is None or found.shape[0] == channels:
        return found
    if channels == 3:
        return replace(found, images=np.repeat(found.images, 3, axis=1))
    # Luma of ITU-R BT.601, as Pillow has it.
    weights = np.array([0.299, 0.587, 0.114], dtype=np.float32)
    grey = np.einsum("nchw,c->nhw", found.images.astype(np.float32), weights)[:, None]
    images = np.rint(grey).astype(np.uint8) if found.images.dtype == np.uint8 else np.clip(grey, 0, 1)
    return replace(found, images=images)


def _rotated(found: ClassImages) -> ClassImages:
    """Add every class turned by 90, 180 and 270 degrees."""
    if found.shape[1] != found.shape[2]:
        raise InputError(f"rotations: need square images, and {found.name} has {found.shape[1]} x {found.shape[2]}")
    names = [f"{name}@{90 * turn}" if turn else name for turn in range(4) for name in found.class_names]
    return replace(
        found,
        images=np.concatenate([np.rot90(found.images, turn, axes=(2, 3)) for turn in range(4)]),
        labels=np.concatenate([found.labels + turn * found.ways for turn in range(4)]),
        class_names=tuple(names),
        groups=None if found.groups is None else np.tile(found.groups, 4),
        notes="; ".join(note for note in (found.notes, "with rotations by 90, 180 and 270 degrees as classes") if note),
    )


def _named(name: str, wanted: _Wanted) -> ClassImages:
    match name:
        case "glyphs":
            wanted.allow(name, "group", "script")
            return _glyphs_by_face(wanted) if wanted.split_by == "group" else _glyphs(wanted)
        case "omniglot":
            wanted.allow(name, "class", "group", "official")
            return _omniglot(wanted)
        case "mini-imagenet":
            wanted.allow(name, "official")
            return _mini_imagenet(wanted)
        case "cifar-fs":
            wanted.allow(name, "official")
            return _cifar_fs(wanted)
        case "digits":
            wanted.allow(name)
            return _digits(wanted)
        case "hershey":
            wanted.allow(name, "script")
            return _stroke_glyphs(wanted)
        case _:
            wanted.allow(name, "official")
            return _ten_classes(name, wanted)


def _glyphs(wanted: _Wanted) -> ClassImages:
    def drawn(split: str, classes: int | None = None) -> ClassImages:
        size = 28 if wanted.size is None else wanted.size
        instances = 20 if wanted.instances is None else wanted.instances
        found = load_shared(
            "glyphs", split=split, expect=ImageData, size=size, instances=instances, seed=wanted.seed, classes=classes
        )
        return _from_shared(found, "glyphs")

    if wanted.split_by is None or wanted.split == "all":
        return drawn(wanted.split, wanted.classes)
    if wanted.split == "test":
        return drawn("script-test", wanted.classes)
    # Held out of the training scripts: the letters that are for validation in the other split too.
    held_out = set(
        load_shared("glyphs", split="validation", expect=ImageData, size=8, instances=1, seed=wanted.seed).class_names
    )
    found = drawn("script-train")
    names = [name for name in found.class_names if (name in held_out) == (wanted.split == "validation")]
    return wanted.part_of(found, names)


_MONOSPACED, _OTHER_MAKER = (tuple(f for f in FACES if f.startswith(name)) for name in ("DejaVuSansMono", "STIX"))
_FACES_OF = {
    "train": tuple(face for face in FACES if face not in (*_MONOSPACED, *_OTHER_MAKER)),
    "validation": _MONOSPACED,
    "test": _OTHER_MAKER,
    "all": FACES,
}
_CHARACTERS_OF_A_FACE = 60


def _glyphs_by_face(wanted: _Wanted) -> ClassImages:
    """Make typefaces the super-classes: a class is a character in one face, as Omniglot's are of one alphabet."""
    size = 28 if wanted.size is None else wanted.size
    instances = 20 if wanted.instances is None else wanted.instances
    parts: list[ClassImages] = []
    for face in _FACES_OF[wanted.split]:
        # Another seed a face: other characters, and other affine maps of those that two faces share.
        drawn = load_shared(
            "glyphs", split=wanted.split, expect=ImageData, size=size, instances=instances, faces=(face,),
            seed=wanted.seed * len(FACES) + FACES.index(face), classes=_CHARACTERS_OF_A_FACE,
        )  # fmt: skip
        part = _from_shared(drawn, "glyphs")
        names = tuple(f"{face}/{name}" for name in part.class_names)
        parts.append(replace(part, class_names=names, notes=part.notes.rsplit(", seed", 1)[0]))
    found = _joined(parts)
    return wanted.part_of(found, found.class_names)


# Every split needs all of the files, and 32,460 of them take seconds.
@lru_cache(maxsize=2)
def _read_omniglot(part: str, size: int, root: Path) -> ClassImages:
    return _from_shared(load_shared("omniglot", split=part, expect=ImageData, root=root, size=size), "omniglot")


def _omniglot(wanted: _Wanted) -> ClassImages:
    size, root = 28 if wanted.size is None else wanted.size, data_root()
    folder = root / "omniglot"
    # The authors' arrays, with rotated characters as classes of their own; used where the images are absent.
    arrays = _split_arrays(folder) if folder.is_dir() and not (folder / "images_background").is_dir() else {}
    if arrays:
        return replace(_array_folder(folder, arrays, replace(wanted, size=size)), name="omniglot")
    if wanted.split_by == "official" and wanted.split != "all":
        found = _read_omniglot("evaluation" if wanted.split == "test" else "background", size, root)
        if wanted.split == "test":
            return wanted.part_of(found, found.class_names)
        alphabets = _shuffled(sorted({_group(name) for name in found.class_names}), str(wanted.seed))
        held_out = set(alphabets[: max(1, round(0.2 * len(alphabets)))])
        names = [name for name in found.class_names if (_group(name) in held_out) == (wanted.split == "validation")]
        return wanted.part_of(found, names)
    found = _read_omniglot("all", size, root)
    by_group = wanted.split_by != "class"
    names = _in_split(found.class_names, wanted.split, wanted.seed, "omniglot", by_group=by_group)
    return wanted.part_of(found, names)


def _mini_imagenet(wanted: _Wanted) -> ClassImages:
    size = 84 if wanted.size is None else wanted.size
    splits = ("train", "validation", "test") if wanted.split == "all" else (wanted.split,)
    parts: list[ClassImages] = []
    for split in splits:
        found = load_shared("mini-imagenet", split=split, expect=ImageData, size=size)
        part = _from_shared(found, "mini-imagenet")
        # Where the authors' arrays have no names, every split counts its classes from 0.
        parts.append(replace(part, class_names=tuple(f"{split}/{name}" for name in part.class_names)))
    found = _joined(parts) if len(parts) > 1 else parts[0]
    return wanted.part_of(found, found.class_names)


def _cifar_fs(wanted: _Wanted) -> ClassImages:
    parts = [_from_shared(load_shared("cifar100", split="train", expect=ImageData), "cifar-fs")]
    notes = ""
    try:
        parts.append(_from_shared(load_shared("cifar100", split="test", expect=ImageData), "cifar-fs"))
    except MissingFilesError:
        notes = "CIFAR-100's test file is absent: 500 images a class instead of 600"
    found = _joined(parts, notes)
    held_out = {name for names in _CIFAR_FS.values() for name in names}
    if not held_out <= set(found.class_names):
        raise InputError(
            "cifar-fs: its split goes by the names of CIFAR-100's classes; put fine_label_names.txt (or meta) beside"
            " the data files"
        )
    train = tuple(name for name in found.class_names if name not in held_out)
    names = {**_CIFAR_FS, "train": train, "all": found.class_names}[wanted.split]
    return _resized(wanted.part_of(found, names), wanted.size)


def _ten_classes(name: str, wanted: _Wanted) -> ClassImages:
    """Return the official images of a set whose classes are all in every split."""

    def part(split: str) -> ClassImages:
        return _from_shared(load_shared(name, split=split, expect=ImageData), name)

    note = "all ten classes are in every split; the last fifth of the training images is for validation"
    if wanted.split == "all":
        found = _joined([part("train"), part("test")])
    elif wanted.split == "test":
        found = part("test")
    else:
        found = part("train")
        cut = len(found) - len(found) // 5
        found = found.rows(np.arange(cut) if wanted.split == "train" else np.arange(cut, len(found)))
    found = replace(found, notes="; ".join(filter(None, (found.notes, note))))
    return _resized(wanted.part_of(found, found.class_names), wanted.size)


def _digits(wanted: _Wanted) -> ClassImages:
    note = "all ten classes are in every split: 60 % of the images of each are for training, 20 % for validation"
    found = _from_shared(load_shared("digits", expect=ImageData), "digits", note)
    if wanted.split != "all":
        place = ("train", "validation", "test").index(wanted.split)
        rows: list[NDArray[np.int64]] = []
        for label in range(found.ways):
            members = np.random.default_rng([wanted.seed, label]).permutation(np.flatnonzero(found.labels == label))
            rows.append(np.split(members, [round(0.6 * len(members)), round(0.8 * len(members))])[place])
        found = found.rows(np.sort(np.concatenate(rows)))
    return _resized(wanted.part_of(found, found.class_names), wanted.size)


def _stroke_glyphs(wanted: _Wanted) -> ClassImages:
    size = 28 if wanted.size is None else wanted.size
    instances = 20 if wanted.instances is None else wanted.instances
    far = wanted.split_by == "script"
    names = wanted.limited(_hershey.names_of("far" if far and wanted.split == "test" else wanted.split), "hershey")
    faces = tuple(dict.fromkeys(_hershey.face_of(name) for name in names))
    return ClassImages(
        "hershey",
        np.concatenate([_hershey.draw(name, size, instances, wanted.seed) for name in names])[:, None],
        np.repeat(np.arange(len(names)), instances),
        tuple(names),
        np.repeat([faces.index(_hershey.face_of(name)) for name in names], instances),
        faces,
        "face",
        _hershey.PROVENANCE,
        _hershey.versions(),
    )


def _folder(path: Path, wanted: _Wanted) -> ClassImages:
    wanted.allow("a folder", "class", "group")
    scan = Scan.of(path)
    notes = scan.notes
    classes = {name: files for name, files in scan.pictures.items() if name}
    if not classes:
        loose = f"; it holds {len(scan.pictures[''])} images in no class" if scan.pictures else ""
        raise InputError(f"{path}: no classes of images; expected <class>/*.png, or train/<class>/*.png{loose}")
    if "" in scan.pictures:
        notes.append(f"left out {len(scan.pictures[''])} images that are in no class folder")
    if scan.empty:
        notes.append(f"left out {len(scan.empty)} folders without images, such as {scan.empty[0]}")
    channels = wanted.channels or (3 if any(has_colour(file) for files in classes.values() for file in files) else 1)
    parts, left_out = _split_folders(classes)
    if parts:
        if wanted.split_by is not None:
            raise InputError(f"split_by: {path} is divided by its folders {', '.join(parts)}; leave it out")
        notes += [f"left out the folder {name}, which is beside train" for name in left_out]
        classes = _divided_by_folders(path, parts, wanted, notes)
        chosen = list(classes)
    else:
        by_group = wanted.split_by == "group"
        chosen = _in_split(list(classes), wanted.split, wanted.seed, str(path), by_group=by_group)
    names = wanted.limited(chosen, str(path))
    files = [[classes[name][row] for row in wanted.thinned(len(classes[name]), name)] for name in names]
    images, more = decoded([file for part in files for file in part], wanted.size, channels, strict=True)
    labels = np.repeat(np.arange(len(names)), [len(part) for part in files]).astype(np.int64)
    groups = sorted({_group(name) for name in names})
    number = np.array([groups.index(_group(name)) for name in names], dtype=np.int64)
    grouping = (number[labels], tuple(groups), "folder") if groups != [""] else (None, (), "")
    return ClassImages(path.name, images, labels, tuple(names), *grouping, str(path), "; ".join([*notes, *more]))


def _split_folders(
    classes: Mapping[str, list[Path]],
) -> tuple[dict[str, dict[str, list[Path]]], list[str]]:
    """Return the classes by split where there are such folders, and the names of folders beside them."""
    # A class may be called "train"; it is one when pictures are right in it.
    inner = {name.partition("/")[0] for name in classes if "/" in name} - set(classes)
    if not any(_SPLIT_FOLDERS.get(name.lower()) == "train" for name in inner):
        return {}, []
    parts: dict[str, dict[str, list[Path]]] = {}
    left_out: list[str] = []
    for name, files in classes.items():
        outer, _, rest = name.partition("/")
        split = _SPLIT_FOLDERS.get(outer.lower())
        if split is None or outer not in inner:
            left_out.append(outer)
        else:
            parts.setdefault(split, {}).setdefault(rest, []).extend(files)
    return {split: parts[split] for split in _SPLITS if split in parts}, sorted(set(left_out))


def _divided_by_folders(
    path: Path, parts: dict[str, dict[str, list[Path]]], wanted: _Wanted, notes: list[str]
) -> dict[str, list[Path]]:
    seen: dict[str, str] = {}
    for split, classes in parts.items():
        for name in classes:
            if name in seen:
                raise InputError(
                    f"{path}: class '{name}' is in both {seen[name]} and {split}; tasks must be about new classes: put"
                    " all classes into one folder, to have them divided, or rename one"
                )
            seen[name] = split
    if "validation" not in parts and len(parts["train"]) >= 4:
        held_out = _fifth(list(parts["train"]), wanted.seed)
        parts = {**parts, "validation": {name: parts["train"][name] for name in held_out}}
        parts["train"] = {name: files for name, files in parts["train"].items() if name not in held_out}
        notes.append(f"no folder for validation: {len(held_out)} of the classes in train are for it")
    if wanted.split == "all":
        return {name: files for classes in parts.values() for name, files in classes.items()}
    if wanted.split not in parts:
        raise InputError(f"{path}: has the folders {', '.join(parts)}, and none for the split '{wanted.split}'; add it")
    return parts[wanted.split]


def _array_file(path: Path, wanted: _Wanted) -> ClassImages:
    wanted.allow("an array", "class")
    found = _read_arrays(path)
    chosen = _in_split(found.class_names, wanted.split, wanted.seed, str(path))
    return _resized(wanted.part_of(found, chosen), wanted.size)


def _read_arrays(path: Path) -> ClassImages:
    arrays = read_arrays(path, single=True)
    if "" in arrays:
        arrays = {"x": arrays[""]}
    if "x" not in arrays:
        raise InputError(f"{path}: needs an array 'x' (and 'y'), found {', '.join(arrays) or 'nothing'}")
    images = _images_last(arrays["x"], path, labelled="y" in arrays)
    labels, names = _array_labels(arrays, len(images), path)
    pixels, notes = _checked_pixels(images, path, lambda row: f"image {row} (class '{names[labels[row]]}')")
    channel_first = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
    return ClassImages(path.stem, channel_first, labels, names, provenance=str(path), notes="; ".join(notes))


def _split_arrays(folder: Path) -> dict[str, Path]:
    """Return the files ``train.npy``, ``val.npz`` and so on of a folder, by split; none without one for training."""
    found: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        split = _SPLIT_FOLDERS.get(file.stem.lower())
        if split is not None and file.suffix.lower() in (".npy", ".npz"):
            if split in found:
                raise InputError(f"{folder}: {found[split].name} and {file.name} are both for the split {split}")
            found[split] = file
    return found if "train" in found else {}


def _array_folder(folder: Path, files: Mapping[str, Path], wanted: _Wanted) -> ClassImages:
    """Read a folder whose split is one array file a part, as the authors' code keeps Omniglot."""
    if wanted.split_by is not None:
        raise InputError(f"split_by: {folder} is divided by its files {', '.join(f.name for f in files.values())}")

    def part(split: str) -> ClassImages:
        found = _read_arrays(files[split])
        # Without names, every file counts its classes from 0.
        return replace(found, name=folder.name, class_names=tuple(f"{split}/{name}" for name in found.class_names))

    if wanted.split == "all":
        found = _joined([part(split) for split in files])
        return _resized(wanted.part_of(found, found.class_names), wanted.size)
    held_out_of_train = "validation" not in files and wanted.split != "test"
    source = "train" if held_out_of_train else wanted.split
    if source not in files:
        raise InputError(f"{folder}: has no array for the split '{wanted.split}'; add {wanted.split}.npy")
    found = part(source)
    names = list(found.class_names)
    if held_out_of_train and len(names) >= 4:
        held_out = set(_fifth(names, wanted.seed))
        names = [name for name in names if (name in held_out) == (wanted.split == "validation")]
        note = f"no array for validation: {len(held_out)} of the classes in {files['train'].name} are for it"
        found = replace(found, notes="; ".join(filter(None, (found.notes, note))))
    return _resized(wanted.part_of(found, names), wanted.size)


def _images_last(x: NDArray[Any], path: Path, *, labelled: bool) -> NDArray[Any]:
    """Return ``(n, height, width, channels)``, whatever the layout of the array."""
    axes = "(n, height, width[, channels])" if labelled else "(classes, instances, height, width[, channels])"
    other = "" if labelled else ", or (n, height, width) with labels 'y' (n,)"
    extra = x.ndim - (3 if labelled else 4)
    if extra not in (0, 1) or not x.size:
        raise InputError(f"{path}: 'x' has shape {x.shape}, expected {axes}{other}")
    images = x if labelled else x.reshape(-1, *x.shape[2:])
    if not extra:
        images = images[..., None]
    elif images.shape[3] not in (1, 3) and images.shape[1] in (1, 3):
        images = images.transpose(0, 2, 3, 1)
    _, height, width, channels = images.shape
    if channels not in (1, 3):
        raise InputError(f"{path}: 'x' has shape {x.shape}: {channels} channels, expected 1 or 3")
    if height != width or height < SMALLEST_SIDE:
        raise InputError(
            f"{path}: images are {height} x {width} pixels, expected squares of at least {SMALLEST_SIDE} a side; pad"
            " or resize them"
        )
    return images


def _array_labels(
    arrays: Mapping[str, NDArray[Any]], count: int, path: Path
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    x, y, given = arrays["x"], arrays.get("y"), arrays.get("class_names")
    values: NDArray[Any] = np.repeat(np.arange(len(x)), x.shape[1]) if y is None else y
    if values.shape not in ((count,), (count, 1)):
        raise InputError(f"{path}: 'y' has shape {values.shape}, and 'x' has {count} images; it must be ({count},)")
    if values.dtype.kind not in "iuU":
        raise InputError(f"{path}: 'y' is {values.dtype}, expected integers or text; convert it")
    kinds, labels = np.unique(values.reshape(-1), return_inverse=True)
    names = [str(kind) for kind in kinds.tolist()]
    if given is not None:
        texts: list[str] = [str(text) for text in given.reshape(-1).tolist()]
        if values.dtype.kind == "U" or not (kinds[0] >= 0 and kinds[-1] < len(texts) == len(set(texts))):
            raise InputError(
                f"{path}: 'class_names' has {len(texts)} names for labels {names[0]}..{names[-1]}; it must be the"
                " different names of classes 0, 1, ..."
            )
        names = [texts[int(kind)] for kind in kinds]
    return labels.reshape(-1).astype(np.int64), tuple(names)


def _checked_pixels(x: NDArray[Any], path: Path, place: Callable[[int], str]) -> tuple[_Pixels, list[str]]:
    """Return bytes where that loses nothing, else float32 in [0, 1]; and what was done to get there."""
    if x.dtype == np.bool_:
        return x.astype(np.uint8) * np.uint8(255), []
    if x.dtype.kind not in "iuf":
        raise InputError(f"{path}: 'x' is {x.dtype}, expected uint8 0..255 or floats in [0, 1]")
    if x.dtype.kind == "f" and not np.isfinite(x).all():
        row = int(np.argwhere(~np.isfinite(x))[0][0])
        raise InputError(f"{path}: {place(row)} holds NaN or infinity; mend it or leave it out")
    low, high = x.min(), x.max()
    if x.dtype.kind in "iu":
        if low < 0 or high > 255:
            raise InputError(f"{path}: 'x' is {x.dtype} with values {low}..{high}; scale it to uint8 0..255")
        if high == 1:
            return x.astype(np.uint8) * np.uint8(255), ["values 0 and 1 were scaled by 255"]
        return x.astype(np.uint8), []
    # Interpolation may leave a whit more than 1. Far above it, values are bytes; in between, who knows.
    if low < -1e-3 or 1 + 1e-3 < high < 16 or high > 255:
        row = int(np.argwhere((x < -1e-3) | (x > 1 + 1e-3))[0][0])
        raise InputError(
            f"{path}: {place(row)}: values of 'x' are {low:g}..{high:g}; expected [0, 1] or 0..255, not standardised"
        )
    notes = [f"floats 0..{high:g} were divided by 255"] if high >= 16 else []
    scaled = np.clip(x if high >= 16 else x * np.float32(255), 0, 255)
    rounded = np.rint(scaled)
    if float(np.abs(scaled - rounded).max()) < 1e-2:
        return rounded.astype(np.uint8), notes
    return (scaled / 255).astype(np.float32), notes
