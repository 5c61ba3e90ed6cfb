"""Readers of the official layouts of image sets: IDX, CIFAR, SVHN, Omniglot and mini-ImageNet."""

from __future__ import annotations

import csv
import importlib
import io
import math
from collections.abc import Sequence
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from shared_core.data._datasets import ImageData
from shared_core.data._files import Source, reading
from shared_core.errors import InputError
from shared_core.pickles import read_pickle

_Pixels = NDArray[np.uint8]
_IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def optional(module: str) -> Any:
    """Import a module of the ``glyphs`` extra, or say how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(f"{module} is needed here and not installed: pip install 'shared-core[glyphs]'") from None


def parse_idx(data: bytes, place: str) -> NDArray[Any]:
    """Parse an IDX file (the format of MNIST), checking type code, dimensions and the exact number of bytes."""
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in _IDX_TYPES or not 1 <= data[3] <= 8:
        raise InputError(f"{place}: is not an IDX file (it starts with {data[:4].hex() or 'nothing'})")
    dtype, start = np.dtype(_IDX_TYPES[data[2]]), 4 + 4 * data[3]
    shape = tuple(int.from_bytes(data[i : i + 4], "big") for i in range(4, min(start, len(data) - 3), 4))
    expected = start + math.prod(shape) * dtype.itemsize
    if len(data) != expected or len(shape) != data[3]:
        raise InputError(f"{place}: its header asks for {expected:,} bytes and it has {len(data):,}; is it truncated?")
    with reading(place):
        return np.frombuffer(data, dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("="))


def _checked(
    source: Source, images: _Pixels, labels: NDArray[Any], names: Sequence[str], notes: str = "", **groups: Any
) -> ImageData:
    """Return the data set once there is a label in range for every image."""
    if len(images) != len(labels) or not len(images):
        raise InputError(f"{source.where}: {len(images):,} images, {len(labels):,} labels; expected as many, and some")
    labels = labels.astype(np.int64)
    if labels.min() < 0 or labels.max() >= len(names):
        raise InputError(f"{source.where}: labels {labels.min()}..{labels.max()}, where 0..{len(names) - 1} are known")
    return ImageData(*source.origin(images, labels, notes=notes), images, labels, tuple(names), **groups)


def mnist(source: Source) -> ImageData:
    """MNIST, Fashion-MNIST and KMNIST: IDX files, gzipped or not; images (n, 28, 28), 0 = background."""
    stem = "train" if source.split == "train" else "t10k"
    arrays: list[NDArray[Any]] = []
    for kind, sides in (("images", 3), ("labels", 1)):
        place, data = source.read(rf"{stem}-{kind}[-.]idx{sides}-ubyte", f"{stem}-{kind}-idx{sides}-ubyte[.gz]")
        arrays.append(parse_idx(data, place))
        if arrays[-1].dtype != np.uint8 or arrays[-1].ndim != sides:
            raise InputError(f"{place}: {arrays[-1].dtype} {arrays[-1].shape}, expected bytes in {sides} dimensions")
    return _checked(source, arrays[0], arrays[1], source.entry.names)


def unpickle(data: bytes, place: str) -> dict[str, Any]:
    """Read a pickled dictionary of byte arrays, lists and numbers; anything else in it is refused, never run."""
    loaded = read_pickle(data, place)
    arrays = [value for value in loaded.values() if isinstance(value, np.ndarray)] if isinstance(loaded, dict) else None
    if arrays is None or any(array.dtype != np.uint8 for array in arrays):
        found = type(loaded).__name__ if arrays is None else f"dictionary with arrays of {arrays[0].dtype}"
        raise InputError(f"{place}: is not a pickle of plain arrays of bytes by name, but a {found}")
    return {k.decode("latin-1") if isinstance(k, bytes) else str(k): v for k, v in loaded.items()}


def _names(source: Source, stem: str, count: int) -> tuple[str, ...]:
    """Return class names from their text file or the pickled ``meta``; else the registry's; else numbers."""
    for match, place, data in source.members(rf"(?:{stem}s|batches\.meta)\.txt|(?:batches\.)?meta", 1 << 20):
        if match.group().endswith(".txt"):
            return tuple(data.decode("utf-8", "replace").split())
        found = unpickle(data, place)
        with reading(place):
            names = found.get(f"{stem}s") or found["label_names"]
            return tuple(name.decode() if isinstance(name, bytes) else str(name) for name in names)
    return source.entry.names or tuple(map(str, range(count)))


def cifar(source: Source, *, labels: Literal["fine", "coarse"] = "fine") -> ImageData:
    """CIFAR-10 and CIFAR-100, binary or Python layout; images (n, 32, 32, 3).

    A partial set loads too, and the notes say how many images were found. CIFAR-100 has ``labels="coarse"``; its
    ``groups`` are the 20 superclasses.
    """
    hundred, train = source.entry.name == "cifar100", source.split == "train"
    stem = source.split if hundred else r"data_batch_\d" if train else "test_batch"
    keys = ("coarse_labels", "fine_labels") if hundred else ("labels",)
    blocks: list[tuple[_Pixels, NDArray[np.int64]]] = []
    files: list[str] = []
    for match, place, data in source.members(rf"({stem})(?:\.bin)?"):
        if match.group().endswith(".bin"):
            size = 3072 + len(keys)
            if len(data) % size or not data:
                raise InputError(f"{place}: {len(data):,} bytes, not a multiple of the {size:,} bytes of a record")
            records = np.frombuffer(data, dtype=np.uint8).reshape(-1, size)
            blocks.append((records[:, len(keys) :], records[:, : len(keys)].astype(np.int64)))
        else:
            batch = unpickle(data, place)
            with reading(place):
                columns = np.array([batch[key] for key in keys], dtype=np.int64).T
                blocks.append((np.asarray(batch["data"], dtype=np.uint8).reshape(len(columns), 3072), columns))
        files.append(match.group(1))
    if not blocks:
        raise source.missing(f"{stem}[.bin]".replace(r"\d", "1..5"))
    pixels, columns = (np.concatenate(part) for part in zip(*blocks, strict=True))
    images = np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    expected = source.entry.counts[source.split]
    partial = f"partial: {len(images):,} of {expected:,} images, from {', '.join(files)}"
    notes = partial if len(images) != expected else ""
    fine = _names(source, "fine_label_name", 100)
    if not hundred:
        return _checked(source, images, columns[:, 0], fine, notes)
    coarse = _names(source, "coarse_label_name", 20)
    target, names = (columns[:, 0], coarse) if labels == "coarse" else (columns[:, 1], fine)
    groups = {"groups": columns[:, 0].copy(), "group_names": coarse, "group_kind": "superclass"}
    return _checked(source, images, target, names, notes, **groups)


def svhn(source: Source) -> ImageData:
    """SVHN cropped digits (MATLAB files); images (n, 32, 32, 3); the digit 0, stored as 10, is label 0."""
    from scipy.io import loadmat

    place, data = source.read(rf"{source.split}_32x32\.mat", f"{source.split}_32x32.mat")
    with reading(place):
        content = loadmat(cast("Any", io.BytesIO(data)), variable_names=["X", "y"])
        images, labels = content["X"], content["y"].reshape(-1).astype(np.int64)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[:3] != (32, 32, 3):
        raise InputError(f"{place}: X is {images.dtype} {images.shape}, expected uint8 (32, 32, 3, n)")
    return _checked(source, np.ascontiguousarray(images.transpose(3, 0, 1, 2)), labels % 10, source.entry.names)


def resize_area(images: _Pixels, size: int) -> _Pixels:
    """Resize (n, height, width[, channels]) to ``size`` x ``size``, each new pixel the mean of the area it covers."""
    if size < 1:
        raise InputError(f"size: must be at least 1 pixel, got {size}")

    def weights(old: int) -> NDArray[np.float32]:
        edges = np.linspace(0, old, size + 1)
        pixel = np.arange(old)
        overlap = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
        return (np.maximum(overlap, 0) * size / old).astype(np.float32)

    rows, columns = weights(images.shape[1]), weights(images.shape[2])
    out = np.empty((len(images), size, size, *images.shape[3:]), dtype=np.uint8)
    for start in range(0, len(images), 512):
        block = images[start : start + 512].astype(np.float32)
        block = np.einsum("ah,nhw...,bw->nab...", rows, block, columns, optimize=True)
        out[start : start + 512] = np.rint(block).astype(np.uint8)
    return out


def _decode(data: bytes, place: str, mode: str, size: int) -> _Pixels:
    """Decode one PNG or JPEG of at most 16 megapixels to ``size`` x ``size``."""
    image_module = optional("PIL.Image")
    with reading(place), image_module.open(io.BytesIO(data)) as image:
        if image.width * image.height > 1 << 24:
            raise InputError(f"{place}: {image.width} x {image.height} pixels is more than such an image can have")
        picture = image.convert(mode)
        same = picture.size == (size, size)
        return np.asarray(picture if same else picture.resize((size, size), image_module.Resampling.LANCZOS))


def _class_major(source: Source, pattern: str, size: int | None) -> ImageData | None:
    """Read ``train.npy`` and the like: an array (classes, per class, height, width[, 3]), as some authors ship."""
    for _, place, data in source.members(pattern):
        with reading(place):
            array = np.load(io.BytesIO(data), allow_pickle=False)
        if array.ndim not in (4, 5) or array.dtype.kind not in "uf" or not array.size:
            raise InputError(f"{place}: {array.dtype} {array.shape}, expected (classes, per class, height, width[, 3])")
        if array.dtype != np.uint8:
            if not (array.min() >= 0 and array.max() <= 1):
                raise InputError(f"{place}: values {array.min():g}..{array.max():g}; expected bytes, or floats in 0..1")
            array = np.rint(array * 255).astype(np.uint8)
        images = array.reshape(-1, *array.shape[2:])
        images = images if size in (None, images.shape[1]) else resize_area(images, size)
        return _checked(
            source, images, np.repeat(np.arange(len(array)), array.shape[1]), [*map(str, range(len(array)))]
        )
    return None


def omniglot(
    source: Source,
    *,
    size: int | None = None,
    ink: Literal[0, 1] = 1,
    groups: Literal["alphabet", "drawer"] = "alphabet",
) -> ImageData:
    """Omniglot from its zips or their folders; images (n, 105, 105), or (n, size, size) by area averaging.

    ``ink=1`` makes strokes 255 on 0, ``ink=0`` keeps the files' 0 on 255. A character that is in several archives
    counts once. ``groups`` are the alphabets or the 20 drawers. The splits "train" and "test" are the authors' arrays
    ``train.npy`` and ``test.npy`` (classes, 20, 28, 28) of some few-shot papers, taken as they are.
    """
    if source.split in ("train", "test"):
        found = _class_major(source, rf"{source.split}\.npy", size)
        if found is None:
            raise source.missing(f"{source.split}.npy")
        return found
    part = source.split.replace("small", "background_small")
    part = "(?:background|evaluation)(?:_small[12])?" if part == "all" else part
    rows: list[tuple[str, str, str, _Pixels]] = []
    for match, place, data in source.members(rf"images_{part}/([^/]+)/(character\d+)/\d+_(\d+)\.png", 1 << 20):
        alphabet, character, drawer = match.groups()
        rows.append((f"{alphabet}/{character}", drawer, alphabet, _decode(data, place, "L", 105)))
    if not rows:
        raise source.missing(f"images_{'*' if source.split == 'all' else part}[.zip]")
    rows.sort(key=lambda row: row[:2])
    images = np.stack([row[3] for row in rows])
    images = 255 - images if ink else images
    images = images if size in (None, 105) else resize_area(images, size)
    names, labels = np.unique([row[0] for row in rows], return_inverse=True)
    drawn = [row[2] if groups == "alphabet" else row[1] for row in rows]
    group_names, group = np.unique(drawn, return_inverse=True)
    grouping = {"groups": group.astype(np.int64), "group_names": tuple(group_names.tolist()), "group_kind": groups}
    return _checked(source, images, labels, names.tolist(), f"{len(names):,} characters", **grouping)


def mini_imagenet(source: Source, *, size: int = 84) -> ImageData:
    """mini-ImageNet; images (n, size, size, 3); classes in file order (npy) or sorted (csv).

    Layouts: ``train.npy`` (classes, 600, 84, 84, 3), or ``train.csv`` (filename,label) beside a folder of images;
    "validation" may be called "val".
    """
    split = "val(?:idation)?" if source.split == "validation" else source.split
    found = _class_major(source, rf"{split}\.npy", size)
    if found is not None:
        return found
    place, data = source.read(rf"{split}\.csv", f"{source.split}.npy or {source.split}.csv", 1 << 26)
    with reading(place):
        label_of = dict(row[:2] for row in csv.reader(io.StringIO(data.decode("utf-8"))) if row)
    label_of.pop("filename", None)
    pictures = {
        match.group(1): _decode(data, label, "RGB", size)
        for match, label, data in source.members(r"([^/]+\.(?i:jpe?g|png))", 1 << 26)
        if match.group(1) in label_of
    }
    absent = next((name for name in label_of if name not in pictures), None)
    if absent is not None or not pictures:
        raise source.missing(f"image {absent}, which {place} names")
    names, labels = np.unique(list(label_of.values()), return_inverse=True)
    return _checked(source, np.stack([pictures[name] for name in label_of]), labels, names.tolist())
