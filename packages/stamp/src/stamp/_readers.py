"""Readers of files and folders: arrays, tables, class folders, STL-10, Tiny-ImageNet and FGVC-Aircraft."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from shared_core._pictures import PICTURES, Scan, decoded, has_colour
from shared_core.arrays import open_bytes
from shared_core.arrays import read_arrays as load_arrays
from shared_core.data import MissingFilesError
from shared_core.data._files import reading
from shared_core.data._images import optional
from shared_core.errors import InputError
from stamp._rows import Found, Rows, Values, Wanted, in_memory, official, standardised

TABLES = frozenset((".csv", ".tsv", ".txt", ".data", ".dat"))
_FOLDERS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_BANNER = 20
_AIRCRAFT_SIDE = 64


def read_pictures(path: Path, wanted: Wanted) -> Found:
    """Read a folder of images in class folders, perhaps in folders of splits."""
    # Folders of classes at any depth: what is above the last level is part of the class's name.
    classes = {name: files for name, files in Scan.of(path).pictures.items() if name}
    if not classes:
        raise InputError(f"{path}: no classes of images; expected <class>/*.png, or train/<class>/*.png")
    everything = [file for files in classes.values() for file in files]
    channels = wanted.channels or (3 if any(map(has_colour, everything)) else 1)
    parts: dict[str, dict[str, list[Path]]] = {}
    for name, files in classes.items():
        outer, _, inner = name.partition("/")
        if inner and outer not in classes and outer.lower() in _FOLDERS:
            parts.setdefault(_FOLDERS[outer.lower()], {})[inner] = files
    names = sorted(parts.get("train", classes))

    def of(files: Mapping[str, list[Path]]) -> Found:
        listed = [file for name in names for file in files.get(name, [])]
        labels = np.repeat(np.arange(len(names)), [len(files.get(name, [])) for name in names])

        def read(rows: Rows) -> Values:
            return decoded([listed[row] for row in rows.tolist()], wanted.size, channels, strict=False)[0]

        return Found(path.name, labels.astype(np.int64), tuple(names), read)

    if "train" not in parts:
        return of(classes).divided(wanted.split, wanted.seed)
    if "test" not in parts and "validation" in parts:
        # Without a test folder results are reported on val, and rows to choose by come out of train.
        parts["test"] = parts.pop("validation")
    for part, found in parts.items():
        if unknown := next((name for name in found if name not in names), None):
            raise InputError(f"{path}: {part} has a class '{unknown}', and train has not; rename one of them")
    if "test" not in parts:
        return of(parts["train"]).divided(wanted.split, wanted.seed)
    return official(lambda part: of(parts[part]), wanted, validation="validation" in parts)


def read_tiny_imagenet(path: Path, wanted: Wanted) -> Found:
    """Read ``train/<wnid>/images`` and ``val/images`` with ``val/val_annotations.txt``."""
    listing = path / "wnids.txt"
    if listing.is_file():
        names = _lines(listing)
    else:
        names = sorted(folder.name for folder in (path / "train").iterdir() if folder.is_dir())
    number = {name: place for place, name in enumerate(names)}

    def rows(part: str) -> Found:
        files: list[Path] = []
        labels: list[int] = []
        if part == "train":
            for name in names:
                inside = sorted(f for f in (path / "train" / name).rglob("*") if f.suffix.lower() in PICTURES)
                if not inside:
                    raise MissingFilesError(f"{path / 'train' / name}: no images; expected images/*.JPEG")
                files += inside
                labels += [number[name]] * len(inside)
        else:
            table = path / "val" / "val_annotations.txt"
            for place, line in enumerate(_lines(table), start=1):
                file, *rest = line.split("\t")
                if not rest or rest[0] not in number:
                    known = "name<tab>wnid<tab>box" if not rest else f"one of the {len(names)} classes"
                    raise InputError(f"{table}:{place}: expected {known}, got '{line[:60]}'")
                files.append(path / "val" / "images" / file)
                labels.append(number[rest[0]])

        def read(index: Rows) -> Values:
            # Some of the images are grey.
            return decoded([files[row] for row in index.tolist()], wanted.size, wanted.channels or 3, strict=False)[0]

        return Found(path.name, np.array(labels, dtype=np.int64), tuple(names), read)

    return official(rows, wanted)


def read_aircraft(path: Path, wanted: Wanted) -> Found:
    """Read ``images`` by ``images_variant_<split>.txt``, without the line of text at the bottom of each."""
    side = wanted.size or _AIRCRAFT_SIDE
    listing = path / "variants.txt"
    listed = {part: _variants(path / f"images_variant_{part}.txt") for part in ("train", "val", "test")}
    names = _lines(listing) if listing.is_file() else sorted({name for _, name in listed["train"]})
    number = {name: place for place, name in enumerate(names)}

    def rows(part: str) -> Found:
        table = "val" if part == "validation" else part
        for place, (_, name) in enumerate(listed[table], start=1):
            if name not in number:
                raise InputError(f"{path / f'images_variant_{table}.txt'}:{place}: '{name}' is not in variants.txt")

        def read(index: Rows) -> Values:
            files = [path / "images" / f"{listed[table][row][0]}.jpg" for row in index.tolist()]
            return np.stack([_without_banner(file, side, wanted.channels or 3) for file in files])

        labels = np.array([number[name] for _, name in listed[table]], dtype=np.int64)
        return Found("fgvc-aircraft", labels, tuple(names), read)

    return official(rows, wanted, validation=True)


def _variants(table: Path) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for place, line in enumerate(_lines(table), start=1):
        image, _, name = line.partition(" ")
        if not re.fullmatch(r"\d+", image) or not name:
            raise InputError(f"{table}:{place}: expected '<image number> <variant>', got '{line[:60]}'")
        found.append((image, name))
    return found


def _without_banner(file: Path, side: int, channels: int) -> Values:
    library, operations = optional("PIL.Image"), optional("PIL.ImageOps")
    with reading(file), library.open(file) as image:
        if image.height <= _BANNER:
            raise InputError(f"{file}: {image.height} rows, of which the lowest {_BANNER} are the banner")
        picture = image.convert("L" if channels == 1 else "RGB").crop((0, 0, image.width, image.height - _BANNER))
        square = np.asarray(operations.pad(picture, (side, side), library.Resampling.LANCZOS), dtype=np.uint8)
    return square.reshape(side, side, channels).transpose(2, 0, 1)


def read_stl10(path: Path, part: str) -> Found:
    """Read images that are stored column by column, and labels that count from 1."""
    side, pixels, numbers = 96, path / f"{part}_X.bin", path / f"{part}_y.bin"
    with reading(pixels):
        images = np.fromfile(pixels, dtype=np.uint8)
    with reading(numbers):
        labels = np.fromfile(numbers, dtype=np.uint8).astype(np.int64) - 1
    if not len(labels) or len(images) != len(labels) * 3 * side * side:
        raise InputError(
            f"{pixels}: {len(images):,} bytes for the {len(labels):,} labels of {numbers.name}; expected"
            f" {3 * side * side:,} an image"
        )
    listing = path / "class_names.txt"
    names = _lines(listing) if listing.is_file() else [str(k) for k in range(1, 11)]
    if labels.min() < 0 or labels.max() >= len(names):
        row = int(np.flatnonzero((labels < 0) | (labels >= len(names)))[0])
        raise InputError(f"{numbers}: byte {row} is {labels[row] + 1}, expected 1..{len(names)}")
    return in_memory(path.name, images.reshape(-1, 3, side, side).transpose(0, 1, 3, 2), labels, names)


def _lines(path: Path) -> list[str]:
    with reading(path):
        text = path.read_text(encoding="utf-8")
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if line]


def read_arrays(path: Path, wanted: Wanted) -> Found:
    """Read an NPZ of one pair of arrays, or of a pair a split."""
    arrays: dict[str, Values] = {name.lower(): array for name, array in load_arrays(path).items()}
    names = _class_names(arrays, path)

    def pair(suffix: str) -> Found | None:
        if f"x{suffix}" not in arrays:
            return None
        if f"y{suffix}" not in arrays:
            raise InputError(f"{path}: has 'x{suffix}' and no 'y{suffix}'; add the class of each")
        x = _channels_first(arrays[f"x{suffix}"], f"{path}: x{suffix}")
        x = _as_images(x, f"{path}: x{suffix}") if x.ndim == 2 and wanted.size is not None else x
        y = _class_numbers(arrays[f"y{suffix}"], names, len(x), f"{path}: y{suffix}", positions="class_names" in arrays)
        return in_memory(path.stem, x, y, names)

    suffixes = {"train": ("_train",), "validation": ("_val", "_valid", "_validation"), "test": ("_test",)}
    found = {part: next(filter(None, map(pair, endings)), None) for part, endings in suffixes.items()}
    whole, train, test = pair(""), found["train"], found["test"]
    if train is None and whole is None:
        held = ", ".join(arrays) or "nothing"
        raise InputError(f"{path}: needs arrays 'x' and 'y' (or x_train, y_train), found {held}")
    if train is None or test is None:
        return cast("Found", train or whole).divided(wanted.split, wanted.seed)
    parts = {part: value for part, value in found.items() if value is not None}
    for part, value in parts.items():
        if value.read(np.arange(0)).shape[1:] != train.read(np.arange(0)).shape[1:]:
            raise InputError(f"{path}: the inputs of {part} have another shape than those of train")
    return official(lambda part: parts[part], wanted, validation="validation" in parts)


def _class_names(arrays: Mapping[str, Values], path: Path) -> list[str]:
    """Return the names of all classes: those given, or the labels of all parts."""
    if "class_names" in arrays:
        names = [str(name) for name in arrays["class_names"].reshape(-1).tolist()]
        if len(set(names)) != len(names) or not names:
            raise InputError(f"{path}: 'class_names' must be different names")
        return names
    labels = [value.reshape(-1) for name, value in arrays.items() if name == "y" or name.startswith("y_")]
    for value in labels:
        if value.dtype.kind not in "iuU":
            raise InputError(f"{path}: 'y' is {value.dtype}, expected integers or text; convert it")
    if not labels or not sum(map(len, labels)):
        return []
    return [str(name) for name in np.unique(np.concatenate(labels)).tolist()]


def _class_numbers(y: Values, names: Sequence[str], count: int, place: str, *, positions: bool) -> NDArray[np.int64]:
    """Return positions in the names of labels that are names, or positions already."""
    if y.shape not in ((count,), (count, 1)):
        raise InputError(f"{place} has shape {y.shape}, and there are {count} inputs; it must be ({count},)")
    flat = y.reshape(-1)
    if y.dtype.kind in "iu" and positions:
        known = (flat >= 0) & (flat < len(names))
        numbers = np.where(known, flat, 0).astype(np.int64)
    else:
        number = {name: position for position, name in enumerate(names)}
        kinds, inverse = np.unique(flat, return_inverse=True)
        found = np.array([number.get(str(kind), -1) for kind in kinds.tolist()], dtype=np.int64)
        numbers = found[inverse.reshape(-1)]
        known = numbers >= 0
    if not known.all():
        row = int(np.flatnonzero(~known)[0])
        raise InputError(f"{place}[{row}] is {flat[row]}, which is none of the {len(names)} class_names")
    return numbers


def _channels_first(x: Values, place: str) -> Values:
    """Return ``(n, channels, height, width)`` or ``(n, features)``, bytes or float32, whatever the layout."""
    if x.ndim not in (2, 3, 4) or not x.size:
        raise InputError(f"{place} has shape {x.shape}, expected (n, features), (n, height, width) or with channels")
    if x.dtype.kind not in "biuf":
        raise InputError(f"{place} is {x.dtype}, expected uint8 or floats")
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and x.shape[3] < min(x.shape[1:3]) and x.shape[1] not in (1, 3):
        x = x.transpose(0, 3, 1, 2)
    if x.dtype.kind == "b":
        return x.astype(np.uint8) * np.uint8(255)
    if x.dtype.kind in "iu" and x.dtype != np.uint8 and x.ndim == 4:
        if x.min() < 0 or x.max() > 255:
            raise InputError(f"{place} is {x.dtype} with values {x.min()}..{x.max()}; scale it to uint8 0..255")
        return x.astype(np.uint8)
    return x if x.dtype == np.uint8 else x.astype(np.float32)


def read_table(path: Path, wanted: Wanted) -> Found:
    """Read a table of numbers whose last column is the class."""
    with reading(path), open_bytes(path) as stream:
        text = stream.read().decode("utf-8-sig")
    lines = [(place, line) for place, line in enumerate(text.splitlines(), start=1) if line.strip()]
    # Lines of KEEL's files that say what the columns are.
    lines = [(place, line) for place, line in lines if not line.startswith("@")]
    if not lines:
        raise InputError(f"{path}: no rows; expected numbers and, in the last column, the class")
    delimiter = next((mark for mark in ",;\t" if mark in lines[0][1]), None)
    rows = list(_cells((line for _, line in lines), delimiter))
    places = [place for place, _ in lines]
    if len(rows[0]) < 2:
        raise InputError(f"{path}:{places[0]}: one column; expected numbers and, in the last column, the class")
    if not any(_is_number(cell) for cell in rows[0][:-1]):
        rows, places = rows[1:], places[1:]
    if len(rows) < 2:
        raise InputError(f"{path}: {len(rows)} rows of numbers; give at least 2")
    if wrong := next((k for k, row in enumerate(rows) if len(row) != len(rows[0])), None):
        raise InputError(f"{path}:{places[wrong]}: {len(rows[wrong])} columns, and there are {len(rows[0])} before")
    try:
        x = np.array([row[:-1] for row in rows], dtype=np.float32)
    except ValueError:
        x = None
    if x is None or not np.isfinite(x).all():
        row, column = next(
            (k, c)
            for k, cells in enumerate(rows)
            for c, cell in enumerate(cells[:-1])
            if not _is_number(cell) or not math.isfinite(float(cell))
        )
        raise InputError(f"{path}:{places[row]}: column {column + 1} is '{rows[row][column]}', expected a number")
    names, labels = _classes_of_table([row[-1] for row in rows], places, path)
    name = path.name.split(".")[0]
    if wanted.size is not None:
        return in_memory(name, _as_images(x, str(path)), labels, names).divided(wanted.split, wanted.seed)
    return standardised(in_memory(name, x, labels, names), wanted)


def _cells(lines: Iterable[str], delimiter: str | None) -> Iterable[list[str]]:
    if delimiter is None:
        return (line.split() for line in lines)
    return ([cell.strip() for cell in row] for row in csv.reader(lines, delimiter=delimiter))


def _is_whole(cell: str) -> bool:
    return re.fullmatch(r"[+-]?\d+", cell) is not None


def _in_order(kind: str) -> tuple[int, int, str]:
    """Sort numbers by their size, before any text."""
    return (0, int(kind), kind) if _is_whole(kind) else (1, 0, kind)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _classes_of_table(cells: Sequence[str], places: Sequence[int], path: Path) -> tuple[list[str], NDArray[np.int64]]:
    if "" in cells:
        raise InputError(f"{path}:{places[cells.index('')]}: the last column is empty; expected the class")
    whole = [cell.removesuffix(".0") for cell in cells]
    kinds = sorted(set(whole), key=_in_order)
    if all(map(_is_number, kinds)) and (fraction := next((kind for kind in kinds if not _is_whole(kind)), None)):
        place = places[whole.index(fraction)]
        raise InputError(f"{path}:{place}: the last column is {fraction}, expected the class: an integer or text")
    if len(kinds) > max(2, len(cells) // 2):
        raise InputError(
            f"{path}: the last column has {len(kinds)} different values in {len(cells)} rows; it must be the class"
        )
    number = {kind: position for position, kind in enumerate(kinds)}
    return kinds, np.array([number[kind] for kind in whole], dtype=np.int64)


def _as_images(x: Values, place: str) -> Values:
    """Take the columns of a table for the pixels of square images."""
    for channels in (1, 3):
        side = math.isqrt(x.shape[1] // channels)
        if channels * side * side == x.shape[1]:
            break
    else:
        raise InputError(f"{place}: rows of {x.shape[1]} numbers are no square images; leave size out")
    images = x.reshape(-1, channels, side, side)
    low, high = float(images.min()), float(images.max())
    if low < 0 or high > 255:
        raise InputError(f"{place}: values {low:g}..{high:g} are no pixels; expected 0..255, 0..16 or [0, 1]")
    # Bytes, the sixteen greys of optdigits, or shares.
    peak = 255 if high > 16 else 16 if high > 1 else 1
    return np.rint(images * (255 / peak)).astype(np.uint8)
