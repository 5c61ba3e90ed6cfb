"""Examples from files, folders and named sets; every class is in every split, and no example is in two.

Where a source has no split of its own, a fifth of each class is for tests, and a fifth of the rest for validation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch

from shared_core.classes import NAMES, OTHER_DOMAINS, load_classes
from shared_core.data import ImageData, MissingFilesError, TableData, available, data_root, load
from shared_core.data._files import Source
from shared_core.data._images import cifar, mnist, resize_area, svhn
from shared_core.data._registry import entry_of
from shared_core.errors import InputError, UnknownKeyError, no_such
from stamp._readers import TABLES, read_aircraft, read_arrays, read_pictures, read_stl10, read_table, read_tiny_imagenet
from stamp._rows import Found, Split, Values, Wanted, chosen, in_memory, limited, official, standardised
from stamp.examples import DataError, Examples, as_examples

__all__ = ["SPLITS", "Split", "is_drawn", "read_examples"]

SPLITS: tuple[Split, ...] = get_args(Split)

_DRAWN = ("glyphs", "hershey", "omniglot", "mini-imagenet", "cifar-fs")
_LOOKED_FOR = {
    "stl-10": (("stl10_binary", "stl10", "stl-10"), "train_X.bin", "https://cs.stanford.edu/~acoates/stl10/"),
    "tiny-imagenet": (
        ("tiny-imagenet-200", "tiny-imagenet", "tiny_imagenet"), "wnids.txt", "https://cs231n.stanford.edu",
    ),
    "fgvc-aircraft": (
        ("fgvc-aircraft-2013b", "fgvc-aircraft", "aircraft"), "images_variant_train.txt",
        "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/",
    ),
}  # fmt: skip
_OTHER_NAMES = {
    "cifar10": "cifar-10",
    "stl10": "stl-10",
    "aircraft": "fgvc-aircraft",
    "tiny-imagenet-200": "tiny-imagenet",
}


def is_drawn(source: str | Path) -> bool:
    """Tell whether a source's classes and instances are drawn, so that `read_examples` can be asked for a number.

    Parameters
    ----------
    source : as `read_examples` takes it
    """
    return _plain(source) in _DRAWN


def _plain(source: str | Path) -> str:
    return str(source).lower().replace("_", "-")


def read_examples(
    source: str | Path,
    *,
    split: Split = "train",
    size: int | None = None,
    channels: Literal[1, 3] | None = None,
    seed: int = 0,
    classes: int | Sequence[str] | None = None,
    limit: int | None = None,
    instances: int | None = None,
) -> Examples:
    """Read one split of a source.

    Official splits are kept: a test set is ``test``, a validation set ``validation``; without a validation set it is a
    fifth of each class of those for training, and of Tiny-ImageNet, whose test set has no labels, the validation set is
    ``test``.

    Parameters
    ----------
    source : a set's name (``mnist``, ``cifar-10``, ``cifar-100``, ``svhn``, ``digits``, ``glyphs``, ``hershey``,
        ``omniglot``, ``stl-10``, ``tiny-imagenet``, ``fgvc-aircraft``, ``wine`` ...); an NPZ with ``x`` or ``X``
        ``(n, height, width)``, channels first or last, or ``(n, features)``, and ``y`` ``(n,)``, perhaps as
        ``x_train``, ``y_train``, ``x_test`` ...; a table with the class in the last column, with or without a header,
        also gzipped; a folder of images, ``<class>/*.png``, perhaps in ``train``, ``val`` and ``test``; or the folder
        of one of these sets, whatever it is called. A folder that is called like a set is meant by ``./name``
    split : ``all`` is the three together
    size : side in pixels; images are made square of it, and the columns of a table are taken for the pixels of images.
        Default: as they are; 28 for glyphs, Hershey and Omniglot, 84 for mini-ImageNet, 64 for FGVC-Aircraft
    channels : 1 or 3; converts. Default: as they are
    seed : of splits that are drawn, of the choice of `classes`, of `limit`, and of the drawing of glyphs
    classes : the names of those to keep, in this order, or how many to draw
    limit : at most so many examples, drawn with the classes in the same shares
    instances : of each class of glyphs, Hershey and Omniglot draw or keep so many, in all splits together

    Returns
    -------
    Images as bytes where the source has bytes. The features of a table are standardised by those for training.

    Raises
    ------
    InputError
        One line that names the file and the place in it: an unknown name, an absent or damaged file, labels that are no
        classes, a class or a split without examples.

    Examples
    --------
    >>> train, test = (read_examples("digits", split=part) for part in ("train", "test"))
    >>> len(train), len(test), train.shape
    (1078, 359, (1, 8, 8))
    >>> read_examples("glyphs", classes=20, instances=10, size=16).counts.unique()
    tensor([6])
    """
    if split not in SPLITS:
        raise InputError(f"split: must be one of {', '.join(SPLITS)}, got '{split}'")
    for option, value in (("size", size), ("limit", limit), ("instances", instances)):
        if value is not None and value < 1:
            raise InputError(f"{option}: must be at least 1, got {value}")
    if channels not in (None, 1, 3):
        raise InputError(f"channels: must be 1 or 3, got {channels}")
    wanted = Wanted(split, size, channels, seed, classes, instances)
    found = limited(chosen(_found(source, wanted), wanted), limit, seed)
    if not len(found.labels):
        raise DataError(f"{found.name}: no examples in the split '{split}'")
    x = found.read(np.arange(len(found.labels)))
    x = _with_channels(x if size is None else _resized(x, size, found.name), channels, found.name)
    y = torch.from_numpy(found.labels)
    return as_examples((torch.from_numpy(np.ascontiguousarray(x)), y), name=found.name, class_names=found.class_names)


def _found(source: str | Path, wanted: Wanted) -> Found:
    name, path = _plain(source), Path(source)
    if wanted.instances is not None and name not in _DRAWN:
        raise InputError(f"instances: is for {', '.join(_DRAWN)}; of '{source}' take a limit")
    if isinstance(source, str) and (known := _named(name, wanted)) is not None:
        return known
    if path.is_dir():
        return _folder(path, wanted)
    if path.is_file():
        suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
        kind = suffixes[-1] if suffixes else ""
        if kind in (".npz", ".npy"):
            return read_arrays(path, wanted)
        if kind in TABLES:
            return read_table(path, wanted)
        if kind == ".mat":
            return official(lambda part: _shared(svhn, "svhn", part, path.parent), wanted)
        raise InputError(f"{path}: cannot tell what '{path.suffix}' is; give .npz, .csv, .mat or a folder")
    raise no_such("data set", name, _names(), where=f"'{source}' is no file and no folder")


def _names() -> list[str]:
    kinds = (ImageData, TableData)
    registered = {entry.name.replace("_", "-") for entry in available() if issubclass(entry.kind, kinds)}
    return sorted(
        {*NAMES, *OTHER_DOMAINS, *_LOOKED_FOR, "cifar-100", *registered} - {"cifar10", "cifar100", "diabetes"}
    )


def _named(name: str, wanted: Wanted) -> Found | None:
    name = _OTHER_NAMES.get(name, name)
    if name in _LOOKED_FOR:
        folders, file, address = _LOOKED_FOR[name]
        for folder in folders:
            if (data_root() / folder).is_dir():
                return replace(_folder(data_root() / folder, wanted), name=name)
        raise MissingFilesError(
            f"{name}: not found in {data_root()}; expected a folder {' or '.join(folders)} with {file}; get it from"
            f" {address}"
        )
    if name in _DRAWN:
        count = wanted.classes if isinstance(wanted.classes, int) else None
        size = wanted.size if name != "cifar-fs" else None
        data = load_classes(name, split="all", size=size, seed=wanted.seed, classes=count, instances=wanted.instances)
        return in_memory(name, data.images, data.labels, data.class_names).divided(wanted.split, wanted.seed)
    if name in OTHER_DOMAINS:
        data = load_classes(name, split=wanted.split, seed=wanted.seed)
        return in_memory(name, data.images, data.labels, data.class_names)
    try:
        entry = entry_of(name)
    except UnknownKeyError:
        return None
    if issubclass(entry.kind, ImageData):
        return official(lambda part: _from_shared(load(entry.name, split=part, expect=ImageData)), wanted)
    if not issubclass(entry.kind, TableData):
        raise InputError(f"{entry.name} is {entry.kind.__name__}: no images, and no table of classes")
    table = load(entry.name, expect=TableData)
    if table.task != "classification":
        raise InputError(f"{entry.name} is a regression table; give one with classes, such as wine")
    found = in_memory(entry.name, table.x.astype(np.float32), table.y.astype(np.int64), table.class_names)
    return standardised(found, wanted)


def _from_shared(found: ImageData) -> Found:
    images = found.images[:, None] if found.images.ndim == 3 else found.images.transpose(0, 3, 1, 2)
    return in_memory(found.name, images, found.labels.astype(np.int64), found.class_names)


def _shared(read: Callable[[Source], ImageData], name: str, part: str, where: Path) -> Found:
    """Read a folder of any name that has the layout of a named set."""
    entry = entry_of(name)
    # Other sets come in MNIST's files with more classes.
    entry = replace(entry, names=tuple(map(str, range(256)))) if name == "mnist" else entry
    found = _from_shared(read(Source(entry, part, where)))
    if name == "mnist":
        found = replace(found, class_names=found.class_names[: int(found.labels.max()) + 1])
    return replace(found, name=where.name)


def _folder(path: Path, wanted: Wanted) -> Found:
    names = {file.relative_to(path).as_posix() for depth in ("*", "*/*") for file in path.glob(depth)}
    lower = {name.lower() for name in names}

    def has(*parts: str) -> bool:
        return any(all(part in name for part in parts) for name in lower)

    for inner in (path, path / "data"):
        if (inner / "images_variant_train.txt").is_file():
            return read_aircraft(inner, wanted)
    if (path / "wnids.txt").is_file() or (path / "val" / "val_annotations.txt").is_file():
        return read_tiny_imagenet(path, wanted)
    if "train_X.bin" in names:
        return official(lambda part: read_stl10(path, part), wanted)
    if has("images", "idx3-ubyte"):
        return official(lambda part: _shared(mnist, "mnist", part, path), wanted)
    if has("data_batch_1"):
        return official(lambda part: _shared(cifar, "cifar10", part, path), wanted)
    if has("train.bin") or ("meta" in names and "train" in names and not (path / "train").is_dir()):
        return official(lambda part: _shared(cifar, "cifar100", part, path), wanted)
    if has("_32x32.mat"):
        return official(lambda part: _shared(svhn, "svhn", part, path), wanted)
    return read_pictures(path, wanted)


def _resized(x: Values, size: int, name: str) -> Values:
    if x.ndim != 4:
        raise InputError(f"size: inputs of {name} have shape {x.shape[1:]} and are no images; leave it out")
    if x.shape[2:] == (size, size):
        return x
    if x.dtype == np.uint8 and size < min(x.shape[2:]):
        return resize_area(x.transpose(0, 2, 3, 1), size).transpose(0, 3, 1, 2)
    images = torch.from_numpy(np.ascontiguousarray(x)).float()
    if size < min(x.shape[2:]):
        resized = torch.nn.functional.interpolate(images, (size, size), mode="area")
    else:
        resized = torch.nn.functional.interpolate(images, (size, size), mode="bilinear", align_corners=False)
    return resized.round().to(torch.uint8).numpy() if x.dtype == np.uint8 else resized.numpy()


def _with_channels(x: Values, channels: int | None, name: str) -> Values:
    if channels is None or (x.ndim == 4 and x.shape[1] == channels):
        return x
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise InputError(f"channels: inputs of {name} have shape {x.shape[1:]}; only images of 1 or 3 can be converted")
    if channels == 3:
        return np.repeat(x, 3, axis=1)
    # Luma of ITU-R BT.601.
    grey = np.einsum("nchw,c->nhw", x.astype(np.float32), np.array([0.299, 0.587, 0.114], dtype=np.float32))[:, None]
    return np.rint(grey).astype(np.uint8) if x.dtype == np.uint8 else grey
