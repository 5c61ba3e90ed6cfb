"""Clients whose tasks come from different sets: the paper's two benchmarks, and a small one from what is at hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.nn import functional

from fedapc._dealing import Benchmark, Images, Pooled, Wanted, deal, divided, evenly, first_of_each, standardised
from fedapc.seeds import generator
from shared_core.classes import read_unlabelled
from shared_core.data import ImageData, MissingFilesError, data_root, find
from shared_core.data import load as load_shared
from shared_core.errors import InputError

__all__ = ["noniid50", "noniid_mini", "overlapped_cifar100", "read_class_folders"]

_SIDE = 16
_HALVES = (("0-4", (0, 1, 2, 3, 4)), ("5-9", (5, 6, 7, 8, 9)))
# Luma of ITU-R BT.601, as Pillow has it.
_LUMA = (0.299, 0.587, 0.114)
_TEN_CLASSES = ("mnist", "fashion-mnist", "kmnist", "cifar10", "svhn")
_SLANTED = ("", "-Bold", "-Oblique", "-BoldOblique")
# The faces of each family, as the data set `glyphs` names them.
_FAMILIES = {
    "DejaVuSans": _SLANTED,
    "DejaVuSansMono": _SLANTED,
    "DejaVuSerif": ("", "-Bold", "-Italic", "-BoldItalic"),
    "STIXGeneral": ("", "Bol", "Italic", "BolIta"),
}


def noniid_mini(
    wanted: Wanted, *, pool_per_class: int = 500, test_per_class: int = 40, ragged: bool = True
) -> Benchmark:
    """Make five-way tasks of whatever small sets there are, as grey images ``(1, 16, 16)``.

    Parameters
    ----------
    wanted : its arguments
    pool_per_class : instances of a class of a large set that may be trained on, the first ones
    test_per_class : instances of a class to test on
    ragged : clients have up to two tasks fewer than asked for, at least one
    """
    if min(pool_per_class, test_per_class) < 1:
        raise InputError("pool_per_class and test_per_class: expected at least 1")
    pool: list[Pooled] = []
    notes: list[str] = []

    def add(name: str, make: Callable[[], Sequence[Pooled]]) -> None:
        try:
            pool.extend(make())
        except MissingFilesError:
            notes.append(f"left out {name}: not in {data_root() if wanted.root is None else wanted.root}")

    for name in _TEN_CLASSES:
        add(name, lambda name=name: _ten_classes(wanted, name, pool_per_class, test_per_class))
    add("digits", lambda: _digits(wanted, test_per_class))
    add("omniglot", lambda: _alphabets(wanted))
    pool.extend(_glyphs(wanted, test_per_class))
    counts = dict.fromkeys(wanted.names, wanted.tasks)
    if ragged:
        order = torch.randperm(wanted.clients, generator=generator(wanted.seed, "benchmark", "ragged")).tolist()
        for place, client in zip(order, wanted.names, strict=True):
            counts[client] = max(1, wanted.tasks - place % min(3, wanted.tasks))
    assigned = evenly(pool, counts, wanted.seed)
    return deal("noniid-mini", wanted, assigned, "mlp", notes, fewer=True)


def _small(images: UInt8[np.ndarray, "n height width *channels"]) -> Tensor:
    """Return images as one grey channel of 16 x 16 in [0, 255], by averaging areas."""
    grey = torch.from_numpy(np.ascontiguousarray(images)).float()
    grey = grey if grey.ndim == 3 else grey @ torch.tensor(_LUMA)
    return functional.interpolate(grey[:, None], (_SIDE, _SIDE), mode="area")


def _ten_classes(wanted: Wanted, name: str, most: int, tested: int) -> list[Pooled]:
    parts: list[tuple[Tensor, Tensor]] = []
    for split, count in (("train", most), ("test", tested)):
        found = load_shared(name, split=split, expect=ImageData, root=wanted.root)
        rows = first_of_each(found.labels, count)
        parts.append((_small(found.images[rows]), torch.from_numpy(found.labels[rows])))
    images = standardised(name, parts[0], parts[1])
    return [Pooled(f"{name} {half}", images, labels) for half, labels in _HALVES]


def _held_out(name: str, x: Tensor, y: Tensor, share: float, tested: int | None) -> Images:
    """Hold out for testing what has no official split."""
    train, test = divided(y, share, name)
    test = test[torch.from_numpy(first_of_each(y[test].numpy(), tested))]
    return standardised(name, (x[train], y[train]), (x[test], y[test]))


def _digits(wanted: Wanted, tested: int) -> list[Pooled]:
    found = load_shared("digits", expect=ImageData, root=wanted.root)
    images = _held_out("digits", _small(found.images), torch.from_numpy(found.labels), 0.2, tested)
    return [Pooled(f"digits {half}", images, labels) for half, labels in _HALVES]


def _alphabets(wanted: Wanted) -> list[Pooled]:
    """Return a task of the first five characters of every alphabet of Omniglot, of 20 drawings each."""
    try:
        # A few alphabets are enough, and what is larger takes long to decode.
        found = load_shared("omniglot", split="small1", expect=ImageData, root=wanted.root, size=_SIDE)
    except MissingFilesError:
        found = load_shared("omniglot", expect=ImageData, root=wanted.root, size=_SIDE)
    assert found.groups is not None
    pool: list[Pooled] = []
    for group, alphabet in enumerate(found.group_names):
        labels = np.unique(found.labels[found.groups == group])[:5]
        if len(labels) < 5:
            continue
        rows = np.isin(found.labels, labels)
        name = f"omniglot {alphabet}"
        images = _held_out(name, _small(found.images[rows]), torch.from_numpy(found.labels[rows]), 0.3, None)
        pool.append(Pooled(name, images, tuple(labels.tolist())))
    return pool


def _glyphs(wanted: Wanted, tested: int) -> list[Pooled]:
    """Return two tasks for each family of typefaces, of ten characters of its own: as many drawings as are needed."""
    needed = 2 * (20 if wanted.per_class is None else wanted.per_class) + 4
    pool: list[Pooled] = []
    for number, (family, styles) in enumerate(_FAMILIES.items()):
        # Another seed a family: other characters.
        found = load_shared(
            "glyphs", split="all", expect=ImageData, size=_SIDE, classes=10,
            faces=[f"{family}{style}" for style in styles], instances=needed + tested, seed=number,
        )  # fmt: skip
        share = tested / (needed + tested)
        name = f"glyphs {family}"
        images = _held_out(name, _small(found.images), torch.from_numpy(found.labels), share, tested)
        pool += [Pooled(f"{name} {half}", images, labels) for half, labels in _HALVES]
    return pool


_CIFAR = ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7))


def overlapped_cifar100(wanted: Wanted, *, test_per_class: int | None = None) -> Benchmark:
    """Make the paper's Overlapped-CIFAR-100: each client learns some of the 20 superclasses, of five classes each.

    Parameters
    ----------
    wanted : its arguments
    test_per_class : at most so many of the 100 official test images of a class
    """
    parts: list[tuple[Tensor, Tensor]] = []
    groups: dict[str, tuple[int, ...]] = {}
    notes: list[str] = []
    for split in ("train", "test"):
        found = load_shared("cifar100", split=split, expect=ImageData, root=wanted.root)
        assert found.groups is not None
        notes += [found.provenance.notes] if found.provenance.notes else []
        if split == "train":
            for number, group in enumerate(found.group_names):
                groups[group] = tuple(np.unique(found.labels[found.groups == number]).tolist())
        rows = first_of_each(found.labels, test_per_class if split == "test" else None)
        parts.append((torch.from_numpy(found.images[rows]).movedim(3, 1), torch.from_numpy(found.labels[rows])))
    images = Images("cifar100", *parts[0], *parts[1], *map(_by_channel, _CIFAR))
    pool = {name: Pooled(name, images, labels) for name, labels in groups.items() if len(labels) > 1}
    assigned = {client: [pool[name] for name in wanted.drawn(list(pool), client)] for client in wanted.names}
    return deal("overlapped-cifar100", wanted, assigned, "lenet", notes)


def _by_channel(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1)


@dataclass(frozen=True)
class _Set:
    """A set of NonIID-50.

    Parameters
    ----------
    key : as the sequences have it
    groups : tasks of five classes
    mean, sd : in [0, 255], of the three channels or of all
    core : its name in `shared_core.data`
    folders : where a folder for each class is, the first that is there
    classes : the most to take
    grey : one channel, 28 pixels a side
    address : where to get it
    """

    key: str
    groups: int
    mean: tuple[float, ...]
    sd: tuple[float, ...]
    core: str = ""
    folders: tuple[str, ...] = ()
    classes: int = 10
    grey: bool = False
    address: str = ""


def _bytes(*values: float) -> tuple[float, ...]:
    return tuple(255 * value for value in values)


# Means and deviations as in the authors' code, of images that are padded already.
_SETS = {
    of.key: of
    for of in (
        _Set("mnist", 2, _bytes(0.1), _bytes(0.2752), core="mnist", grey=True),
        _Set("fmnist", 2, _bytes(0.2190), _bytes(0.3318), core="fashion-mnist", grey=True),
        _Set("cifar10", 2, *_CIFAR, core="cifar10"),
        _Set("cifar100", 16, *_CIFAR, core="cifar100", classes=100),
        _Set("svhn", 2, _bytes(0.4377, 0.4438, 0.4728), _bytes(0.198, 0.201, 0.197), core="svhn"),
        _Set(
            "notmnist",
            2,
            _bytes(0.4254),
            _bytes(0.4501),
            folders=("notMNIST_small", "notmnist", "notMNIST"),
            grey=True,
            address="http://yaroslavvb.blogspot.com/2011/09/notmnist-dataset.html",
        ),
        _Set(
            "face",
            16,
            _bytes(0.5163, 0.5569, 0.4695),
            _bytes(0.2307, 0.2272, 0.2479),
            folders=("facescrub", "FaceScrub"),
            classes=100,
            address="http://vintage.winklerbros.net/facescrub.html",
        ),
        _Set(
            "sign",
            8,
            _bytes(0.3398, 0.3117, 0.3210),
            _bytes(0.2755, 0.2647, 0.2712),
            folders=(
                *("GTSRB/Train", "GTSRB/Final_Training/Images", "GTSRB/Training", "gtsrb/Train"),
                *("traffic_signs/Train", "traffic_signs"),
            ),
            classes=43,
            address="https://benchmark.ini.rub.de/gtsrb_dataset.html",
        ),
    )
}
_SEQUENCES = (
    "cifar100_5 cifar100_13 face_0 cifar100_14 svhn_1 sign_0 notmnist_1 cifar100_8 face_13 cifar100_4",
    "cifar100_2 sign_5 face_14 sign_4 notmnist_0 mnist_0 face_2 face_15 cifar100_1 fmnist_1",
    "face_11 svhn_0 face_10 face_6 face_7 cifar100_3 cifar100_10 mnist_1 face_1 sign_1",
    "fmnist_0 cifar100_15 face_3 cifar10_1 cifar100_7 face_8 cifar10_0 face_9 cifar100_0 cifar100_6",
    "sign_7 face_5 sign_6 sign_3 sign_2 cifar100_12 cifar100_11 cifar100_9 face_12 face_4",
)


def noniid50(
    wanted: Wanted, *, test_per_class: int | None = None, absent: Literal["refuse", "leave out"] = "refuse"
) -> Benchmark:
    """Make the paper's NonIID-50: eight sets, 50 tasks of five classes, five clients of ten tasks in a fixed order.

    Of every class 70 % are for training, 20 % to test on and 10 % for validation, all official parts taken together;
    grey images are padded to 32 pixels and repeated to three channels. Which five classes of a set are a task is drawn
    by the seed, as in the authors' code, by another generator. With all instances this takes about 5 GB.

    Parameters
    ----------
    wanted : its arguments, at most five clients of ten tasks
    test_per_class : at most so many of a class to test on
    absent : ``refuse`` to go on without a set, or ``leave out`` its tasks
    """
    if absent not in ("refuse", "leave out"):
        raise InputError(f"absent: '{absent}'; choose 'refuse' or 'leave out'")
    if wanted.clients > len(_SEQUENCES) or wanted.tasks > 10:
        raise InputError(
            f"noniid50: {wanted.clients} clients of {wanted.tasks} tasks; its sequences are of 5 clients of 10 tasks"
        )
    sequences = [sequence.split() for sequence in _SEQUENCES[: wanted.clients]]
    pool: dict[str, Pooled] = {}
    notes: list[str] = []
    missing: list[str] = []
    needed = sorted({name.rpartition("_")[0] for sequence in sequences for name in sequence})
    # Before any is read: the large ones take minutes.
    found = {key: folder for key in needed if (folder := _where(_SETS[key], wanted, missing)) is not None}
    if missing and (absent == "refuse" or not found):
        more = f" (and {len(missing) - 1} more sets are missing)" if len(missing) > 1 else ""
        raise MissingFilesError(f"{missing[0]}{more}; or go on without them by absent='leave out'")
    notes += [f"left out: {what}" for what in missing]
    for key, folder in found.items():
        pool |= {pooled.name: pooled for pooled in _fives(_SETS[key], folder, wanted, test_per_class, notes)}
    assigned: dict[str, list[Pooled]] = {}
    for client, sequence in zip(wanted.names, sequences, strict=True):
        assigned[client] = [pool[name] for name in sequence if name in pool][: wanted.tasks]
        if not assigned[client]:
            del assigned[client]
            notes.append(f"left out '{client}': no set of its tasks is there")
    return deal("noniid50", wanted, assigned, "lenet", notes, held_share=0.125)


def _where(of: _Set, wanted: Wanted, missing: list[str]) -> Path | None:
    """Find the folder of a set, or write down what to do about it."""
    if of.core:
        try:
            return find(of.core, wanted.root)
        except MissingFilesError as error:
            missing.append(str(error))
            return None
    root = data_root() if wanted.root is None else Path(wanted.root)
    folder = next((root / name for name in of.folders if (root / name).is_dir()), None)
    if folder is None:
        missing.append(
            f"{of.key}: not found in {root}; expected a folder {' or '.join(of.folders)} with a folder of pictures for"
            f" each class; get it from {of.address}"
        )
    return folder


def _fives(of: _Set, folder: Path, wanted: Wanted, tested: int | None, notes: list[str]) -> list[Pooled]:
    """Cut the classes of a set, in an order drawn by the seed, into tasks of five."""
    pixels, labels = _whole_set(of, folder, wanted, notes)
    if of.grey:
        pixels = functional.pad(pixels, (2, 2, 2, 2)).expand(-1, 3, -1, -1)
    train, test = divided(labels, 0.2, of.key)
    test = test[torch.from_numpy(first_of_each(labels[test].numpy(), tested))]
    scale = map(_by_channel, (of.mean, of.sd))
    images = Images(of.key, pixels[train], labels[train], pixels[test], labels[test], *scale)
    classes = labels.unique()
    shuffled = classes[torch.randperm(len(classes), generator=generator(wanted.seed, "benchmark", "fives", of.key))]
    if len(shuffled) < 5 * of.groups:
        raise InputError(f"{of.key}: has {len(shuffled)} classes, and {of.groups} tasks need {5 * of.groups}")
    return [
        Pooled(f"{of.key}_{group}", images, tuple(shuffled[5 * group : 5 * group + 5].tolist()))
        for group in range(of.groups)
    ]


def _whole_set(
    of: _Set, folder: Path, wanted: Wanted, notes: list[str]
) -> tuple[UInt8[Tensor, "n channels side side"], Int64[Tensor, " n"]]:
    """Return the images of all parts of a set, and their classes."""
    if of.core:
        parts = [load_shared(of.core, split=split, expect=ImageData, root=wanted.root) for split in ("train", "test")]
        notes += [f"{of.core}: {part.provenance.notes}" for part in parts if part.provenance.notes]
        images = torch.from_numpy(np.concatenate([part.images for part in parts]))
        labels = torch.from_numpy(np.concatenate([part.labels for part in parts]))
        return (images[:, None] if images.ndim == 3 else images.movedim(3, 1)), labels
    images, labels, skipped = read_class_folders(folder, 28 if of.grey else 32, 1 if of.grey else 3, of.classes)
    notes += [f"{of.key}: {skipped} pictures in {folder} cannot be read and were left out"] if skipped else []
    return images, labels


def read_class_folders(
    folder: Path, side: int, channels: Literal[1, 3], most: int | None = None
) -> tuple[UInt8[Tensor, "n channels side side"], Int64[Tensor, " n"], int]:
    """Read a folder of pictures for each class, and pass over those that cannot be read, as notMNIST has them.

    Parameters
    ----------
    folder : with ``<class>/*.png`` (or jpg, ppm, bmp, gif, webp, tif)
    side : of the result in pixels; pictures are padded to squares and resized
    channels : of the result
    most : classes to read, those of the most files. Default: all

    Returns
    -------
    Images as bytes, their classes in the order of the folders' names, and how many files could not be read.

    Raises
    ------
    InputError
        For a folder in which fewer than two classes have a picture that can be read.
    """
    kinds = (".png", ".jpg", ".jpeg", ".ppm", ".bmp", ".gif", ".webp", ".tif", ".tiff")
    files = {
        inner.name: [file for file in sorted(inner.iterdir()) if file.suffix.lower() in kinds and file.name[0] != "."]
        for inner in sorted(folder.iterdir())
        if inner.is_dir() and inner.name[0] != "."
    }
    largest = sorted((name for name in files if files[name]), key=lambda name: (-len(files[name]), name))[:most]
    images: list[Tensor] = []
    labels: list[int] = []
    skipped = read = 0
    for name in sorted(largest):
        before = len(images)
        for file in files[name]:
            try:
                picture = read_unlabelled(file, side, channels, invert=False).images[0]
            except InputError:
                skipped += 1
                continue
            images.append((picture * 255).round().to(torch.uint8))
            labels.append(read)
        read += len(images) > before
    if read < 2:
        raise InputError(f"{folder}: {read} classes with pictures that can be read; expected at least 2, <class>/*.png")
    return torch.stack(images), torch.tensor(labels), skipped
