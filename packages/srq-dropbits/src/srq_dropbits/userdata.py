"""Labelled data from names, tables, arrays, IDX and CIFAR folders and folders of images, ready to train on.

Whatever the source, :func:`load_images_or_table` returns rows with class numbers; :meth:`LabelledData.split` divides
them, learns the scaling on the training rows alone and keeps it in an :class:`InputFormat`, which goes with a trained
model so that :func:`read_rows` can give it new rows later.
"""

from __future__ import annotations

import csv
import importlib
import io
import math
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float32, Int, Int64
from numpy.typing import NDArray
from torch import Tensor

from shared_core.arrays import open_bytes, read_arrays
from shared_core.data import ImageData, MissingFilesError, TableData, available, load
from shared_core.data._files import Source
from shared_core.data._images import cifar, mnist
from shared_core.data._registry import entry_of
from shared_core.errors import InputError, UnknownKeyError, no_such, not_installed

__all__ = ["DataSplit", "InputFormat", "LabelledData", "load_images_or_table", "read_rows"]

_MISSING = {"", "?", "na", "n/a", "nan", "null", "none"}
# "none" and "na" may well be names of classes.
_NO_LABEL = {"", "?", "nan"}
_PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}
_LARGEST_PICTURE = 1 << 26
_Place = Callable[[int], str]


@dataclass(frozen=True)
class InputFormat:
    """What a trained model expects of a row, learned from the training rows; plain values, to be stored with it.

    Parameters
    ----------
    shape : of a row: (channels, height, width), or (features,)
    mean : of each channel, or of each feature; a row enters as ``(x - mean) / std``
    std : as ``mean``; 1 where nothing varies
    class_names : names of the classes in the order of the outputs
    feature_names : columns of a table in order; empty where there are no names
    target : column of the labels in a table, which new rows need not have

    Examples
    --------
    >>> form = InputFormat((2,), (1.0, 0.0), (2.0, 1.0), ("no", "yes"))
    >>> form.apply(np.array([[3, 4]], dtype=np.float32))
    tensor([[1., 4.]])
    """

    shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]
    feature_names: tuple[str, ...] = ()
    target: str | None = None

    @classmethod
    def learn(
        cls,
        x: Float32[np.ndarray, "n ..."],
        class_names: Sequence[str],
        feature_names: Sequence[str] = (),
        target: str | None = None,
    ) -> InputFormat:
        """Learn the scaling of training rows.

        Parameters
        ----------
        x : (n, channels, height, width), (n, features), or other rows, whose first axis is then the channels
        class_names, feature_names, target : kept as they are
        """
        axes = (0, *range(2, x.ndim))
        mean, std = x.mean(axes, dtype=np.float64), x.std(axes, dtype=np.float64)
        return cls(
            tuple(int(size) for size in x.shape[1:]),
            tuple(mean.tolist()),
            tuple(np.where(std > 1e-6 * np.abs(mean), std, 1.0).tolist()),
            tuple(class_names),
            tuple(feature_names),
            target,
        )

    def apply(self, x: Float32[np.ndarray, "n ..."]) -> Float32[Tensor, "n ..."]:
        """Return rows as the model takes them.

        Parameters
        ----------
        x : (n, ...) rows of this shape, unscaled
        """
        if tuple(x.shape[1:]) != self.shape:
            raise InputError(f"a row has shape {tuple(x.shape[1:])}, and the model was trained on {self.shape}")
        if not len(self.shape):
            raise InputError("a row is one number; give rows of features")
        ones = (1,) * (len(self.shape) - 1)
        mean, std = (np.asarray(values, dtype=np.float32).reshape(-1, *ones) for values in (self.mean, self.std))
        return torch.from_numpy((x - mean) / std)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that JSON and ``shared_core.runs.save_tree`` take; :meth:`from_dict` undoes it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> InputFormat:
        """Return the format that :meth:`to_dict` described.

        Parameters
        ----------
        values : its fields; lists where JSON made lists of tuples
        """
        fields: dict[str, Any] = {
            key: tuple(cast("list[Any]", value)) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**fields)


@dataclass(frozen=True, eq=False)
class DataSplit:
    """Scaled rows to train on, to choose by, and to report on.

    Parameters
    ----------
    name : of the data
    x_train, y_train : (n, ...) rows and (n,) class numbers
    x_validation, y_validation : the same; may be empty
    x_test, y_test : the same; may be empty
    inputs : shape, scaling and class names
    """

    name: str
    x_train: Float32[Tensor, "n ..."]
    y_train: Int64[Tensor, " n"]
    x_validation: Float32[Tensor, "m ..."]
    y_validation: Int64[Tensor, " m"]
    x_test: Float32[Tensor, "k ..."]
    y_test: Int64[Tensor, " k"]
    inputs: InputFormat

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a row."""
        return self.inputs.shape

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes in the order of their numbers."""
        return self.inputs.class_names

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return len(self.inputs.class_names)

    def to(self, device: torch.device | str) -> DataSplit:
        """Return the split with its rows on a device.

        Parameters
        ----------
        device : where to
        """
        names = ("x_train", "y_train", "x_validation", "y_validation", "x_test", "y_test")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


@dataclass(frozen=True, eq=False)
class LabelledData:
    """Unscaled rows with class numbers.

    Parameters
    ----------
    name : the set's name, or the file's
    x : (n, ...) images (n, channels, height, width) in 0..1 where the source says what white is, or (n, features)
    y : (n,) class numbers 0..
    class_names : in the order of their numbers
    x_test, y_test : the official test part where the source has one
    x_validation, y_validation : the same of a validation part
    feature_names : columns of a table in order
    target : column of the labels in a table
    notes : what the reader should know, such as that a set was found in part
    """

    name: str
    x: Float32[np.ndarray, "n ..."]
    y: Int64[np.ndarray, " n"]
    class_names: tuple[str, ...]
    x_test: Float32[np.ndarray, "k ..."] | None = None
    y_test: Int64[np.ndarray, " k"] | None = None
    x_validation: Float32[np.ndarray, "m ..."] | None = None
    y_validation: Int64[np.ndarray, " m"] | None = None
    feature_names: tuple[str, ...] = ()
    target: str | None = None
    notes: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a row."""
        return tuple(int(size) for size in self.x.shape[1:])

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    def limit(self, rows: int | None, seed: int = 0, *, test_rows: int | None = None) -> LabelledData:
        """Return a random part that has the classes in the same shares.

        Parameters
        ----------
        rows : most rows to keep; None keeps all
        seed : of the choice
        test_rows : the same of the official test part
        """
        chosen = self
        if rows is not None and rows < len(self.y):
            kept = _subset(self.y, rows, seed)
            chosen = replace(chosen, x=self.x[kept], y=self.y[kept])
        if (
            test_rows is not None
            and self.x_test is not None
            and self.y_test is not None
            and test_rows < len(self.y_test)
        ):
            kept = _subset(self.y_test, test_rows, seed)
            chosen = replace(chosen, x_test=self.x_test[kept], y_test=self.y_test[kept])
        return chosen

    def split(self, seed: int = 0, *, validation: float | int = 0.1, test: float | int = 0.2) -> DataSplit:
        """Divide the rows, with the classes in the same shares in every part, and scale them.

        Official parts stay as they are. The scaling is learned on the training rows alone.

        Parameters
        ----------
        seed : of the division
        validation : share of all rows to choose by; 0 for none
        test : share of all rows to report on, where there is no official test part; 0 for none

        Raises
        ------
        InputError
            When no row of a class would be left to train on.

        Examples
        --------
        >>> data = LabelledData("toy", np.zeros((20, 3), np.float32), np.arange(20) % 2, ("a", "b"))
        >>> parts = data.split(seed=1)
        >>> len(parts.y_train), len(parts.y_validation), len(parts.y_test)
        (14, 2, 4)
        """
        for name, share in (("validation", validation), ("test", test)):
            if not 0 <= share < 1:
                raise InputError(f"{name}: a share of the rows is in [0, 1), got {share}")
        counts = {
            "test": 0 if self.x_test is not None else round(len(self.y) * test),
            "validation": 0 if self.x_validation is not None else round(len(self.y) * validation),
        }
        parts = _divide(self.y, counts, seed, self.name)
        train = parts["train"]
        inputs = InputFormat.learn(self.x[train], self.class_names, self.feature_names, self.target)
        pairs = {
            "train": (self.x[train], self.y[train]),
            "validation": (self.x_validation, self.y_validation),
            "test": (self.x_test, self.y_test),
        }
        tensors: dict[str, Tensor] = {}
        for part, (x, y) in pairs.items():
            if x is None or y is None:
                x, y = self.x[parts[part]], self.y[parts[part]]
            tensors[f"x_{part}"], tensors[f"y_{part}"] = inputs.apply(x), torch.from_numpy(y)
        return DataSplit(self.name, inputs=inputs, **tensors)


def _allot(counts: Int[np.ndarray, " classes"], rows: int) -> Int64[np.ndarray, " classes"]:
    """Share `rows` out over classes in proportion to their counts, by largest remainders."""
    exact = counts * (rows / max(int(counts.sum()), 1))
    whole = np.minimum(np.floor(exact).astype(np.int64), counts)
    rest = rows - int(whole.sum())
    order = np.argsort(whole - exact, kind="stable")
    whole[order[: max(rest, 0)]] += 1
    return np.minimum(whole, counts)


def _by_class(y: Int64[np.ndarray, " n"], seed: int) -> list[Int64[np.ndarray, " some"]]:
    random = np.random.default_rng(seed)
    return [random.permutation(np.flatnonzero(y == number)) for number in range(int(y.max()) + 1)]


def _subset(y: Int64[np.ndarray, " n"], rows: int, seed: int) -> Int64[np.ndarray, " some"]:
    members = _by_class(y, seed)
    if rows < sum(len(part) > 0 for part in members):
        raise InputError(f"limit: {rows} rows cannot hold {len(members)} classes; give at least {len(members)}")
    wanted = np.maximum(
        _allot(np.array([len(part) for part in members]), rows), [min(len(part), 1) for part in members]
    )
    while int(wanted.sum()) > rows:
        wanted[int(wanted.argmax())] -= 1
    return np.sort(np.concatenate([part[:number] for part, number in zip(members, wanted, strict=True)]))


def _divide(
    y: Int64[np.ndarray, " n"], counts: Mapping[str, int], seed: int, name: str
) -> dict[str, Int64[np.ndarray, " some"]]:
    """Divide rows into parts of about the given sizes, each class alike; what is left is for training."""
    members = _by_class(y, seed)
    parts: dict[str, NDArray[np.int64]] = {}
    for part, rows in counts.items():
        # A class keeps one row to train on, whatever the shares.
        left = np.array([max(len(rest) - 1, 0) for rest in members])
        wanted = np.minimum(_allot(np.array([len(rest) for rest in members]), rows), left)
        parts[part] = np.sort(np.concatenate([rest[:number] for rest, number in zip(members, wanted, strict=True)]))
        members = [rest[number:] for rest, number in zip(members, wanted, strict=True)]
    parts["train"] = np.sort(np.concatenate(members))
    if not len(parts["train"]):
        raise InputError(f"{name}: no row is left to train on; give more rows, or smaller shares")
    return parts


def load_images_or_table(
    source: str | Path,
    *,
    target: str | None = None,
    size: int | None = None,
    limit: int | None = None,
    test_limit: int | None = None,
    seed: int = 0,
    allow_gaps: bool = False,
) -> LabelledData:
    """Load labelled rows from wherever they are.

    Parameters
    ----------
    source : a set's name (``digits``, ``mnist``, ``fashion-mnist``, ``cifar10``, ``breast-cancer``, ``wine`` ...); a
        CSV or TSV file, also gzipped, with or without a header; an NPZ with ``x`` and ``y`` (or ``X``, ``x_train``) and
        perhaps ``x_test`` and ``y_test``; a folder with MNIST's or CIFAR's files; or a folder of images,
        ``train/<class>/*.png`` with perhaps ``val`` and ``test`` beside ``train``, or ``<class>/*.png``. A folder
        that is called like a set is meant by ``./name``
    target : column of the labels in a table: its name, or its number from 1 where there is no header; default: the last
    size : side of square images: images are resized to it, and a table of size * size (or 3 * size * size) columns is
        taken for images
    limit : most rows to train on, chosen with the classes in the same shares
    test_limit : the same of an official test part
    seed : of that choice
    allow_gaps : take class numbers with gaps (0, 1, 3) for what they are; else they are refused as a sign of a
        damaged file

    Returns
    -------
    Rows and class numbers, images as (n, channels, height, width).

    Raises
    ------
    InputError
        One line that names the file, and the row and the column where there are any.

    Examples
    --------
    >>> data = load_images_or_table("digits", limit=100)
    >>> data.x.shape, data.classes
    ((100, 1, 8, 8), 10)
    """
    if size is not None and size < 1:
        raise InputError(f"size: must be at least 1 pixel, got {size}")
    if limit is not None and limit < 2:
        raise InputError(f"limit: must be at least 2 rows, got {limit}")
    path = Path(source)
    if isinstance(source, str) and _is_set(source):
        data = _named(source)
    elif path.is_dir():
        data = _folder(path, size, limit, test_limit, seed)
    elif path.exists() or path.suffix or len(path.parts) > 1:
        data = _file(path, target, allow_gaps)
    else:
        names = [entry.name for entry in available() if issubclass(entry.kind, ImageData | TableData)]
        raise no_such("data set", source, names, where=f"'{source}' is no file and no folder")
    return _checked(data if size is None else _resized(data, size)).limit(limit, seed, test_rows=test_limit)


def _is_set(name: str) -> bool:
    try:
        entry_of(name)
    except UnknownKeyError:
        return False
    return True


def _checked(data: LabelledData) -> LabelledData:
    """Return the data once there are rows of two classes in every part, all finite."""
    parts = (("", data.x, data.y), ("validation part: ", data.x_validation, data.y_validation))
    for part, x, y in (*parts, ("test part: ", data.x_test, data.y_test)):
        if x is None or y is None:
            continue
        if not len(y) or not math.prod(x.shape):
            raise InputError(f"{data.name}: {part}no rows; it needs some of every class")
        if len(x) != len(y) or x.shape[1:] != data.x.shape[1:]:
            raise InputError(
                f"{data.name}: {part}rows of {x.shape} and labels of {y.shape} where a row has shape {data.shape}"
            )
        if not np.isfinite(x).all():
            place = np.argwhere(~np.isfinite(x))[0]
            column = ", ".join(str(index + 1) for index in place[1:])
            raise InputError(
                f"{data.name}: {part}row {place[0] + 1}, column {column} is {x[tuple(place)]}; fill it in or leave the"
                " row out"
            )
    if len(np.unique(data.y)) < 2:
        raise InputError(
            f"{data.name}: all rows are of class '{data.class_names[int(data.y[0])]}'; there is nothing to learn"
        )
    return data


def _resized(data: LabelledData, size: int) -> LabelledData:
    """Return square images: resized ones, or those that the columns of a table are."""

    def images(x: NDArray[np.float32]) -> NDArray[np.float32]:
        if x.ndim == 2 and x.shape[1] in (size * size, 3 * size * size):
            return x.reshape(len(x), -1, size, size)
        if x.ndim != 4:
            raise InputError(
                f"{data.name}: rows of shape {x.shape[1:]} are no images of {size} x {size}; leave --size out"
            )
        if x.shape[2:] == (size, size):
            return x
        smaller = torch.nn.functional.interpolate(torch.from_numpy(x), (size, size), mode="area")
        return smaller.numpy()

    changed = {
        name: images(part)
        for name in ("x", "x_test", "x_validation")
        if (part := cast("NDArray[np.float32] | None", getattr(data, name))) is not None
    }
    return replace(data, **cast("Any", changed), feature_names=data.feature_names if data.x.ndim == 2 else ())


def _from_images(found: ImageData) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    x = found.images.astype(np.float32) / np.float32(found.peak)
    return (x[:, None] if x.ndim == 3 else np.ascontiguousarray(x.transpose(0, 3, 1, 2))), found.labels


def _named(name: str) -> LabelledData:
    entry = entry_of(name)
    if not issubclass(entry.kind, ImageData | TableData):
        raise InputError(f"{entry.name} is {entry.kind.__name__}: no images, and no table of one target")
    found = load(name)
    if isinstance(found, TableData):
        if found.task != "classification":
            raise InputError(f"{entry.name} is a regression table; give one with classes, such as breast-cancer")
        return LabelledData(
            entry.name,
            found.x.astype(np.float32),
            found.y.astype(np.int64),
            found.class_names,
            feature_names=found.feature_names,
            target=found.target_name,
            notes=found.provenance.notes,
        )
    images = cast("ImageData", found)
    x, y = _from_images(images)
    data = LabelledData(entry.name, x, y, images.class_names, notes=images.provenance.notes)
    if "test" in entry.splits and images.split == "train":
        return _with_test(data, lambda: load(name, split="test", expect=ImageData))
    return data


def _with_test(data: LabelledData, read: Callable[[], ImageData]) -> LabelledData:
    """Return the data with the official test part, if its files are there."""
    try:
        found = read()
    except MissingFilesError:
        return data
    if found.class_names[: data.classes] != data.class_names[: len(found.class_names)]:
        # The classes of few-shot sets are others in every part.
        return data
    x, y = _from_images(found)
    notes = "; ".join(
        note for note in (data.notes, found.provenance.notes and f"test {found.provenance.notes}") if note
    )
    return replace(data, x_test=x, y_test=y, notes=notes)


def _folder(path: Path, size: int | None, limit: int | None, test_limit: int | None, seed: int) -> LabelledData:
    names = {file.relative_to(path).as_posix().lower() for depth in ("*", "*/*") for file in path.glob(depth)}

    def has(*parts: str) -> bool:
        return any(all(part in name for part in parts) for name in names)

    if has("images", "idx3-ubyte"):
        return _official(path, "mnist", mnist)
    if has("data_batch_1"):
        return _official(path, "cifar10", cifar)
    if has("train.bin") or ("meta" in names and has("train") and not (path / "train").is_dir()):
        return _official(path, "cifar100", cifar)
    return _picture_folder(path, size, limit, test_limit, seed)


def _official(path: Path, name: str, read: Callable[[Source], ImageData]) -> LabelledData:
    """Read a folder of any name that has the layout of a named set."""
    entry = entry_of(name)
    if name == "mnist":
        # Other sets come in the same files with more classes.
        entry = replace(entry, names=tuple(map(str, range(256))))
    found = read(Source(entry, "train", path))
    x, y = _from_images(found)
    names = found.class_names[: int(y.max()) + 1] if name == "mnist" else found.class_names
    data = LabelledData(path.name, x, y, names, notes=found.provenance.notes)
    return _with_test(data, lambda: read(Source(entry, "test", path)))


def _pillow() -> Any:
    try:
        return importlib.import_module("PIL.Image")
    except ImportError:
        raise not_installed("reading image files", "pillow", "srq-dropbits[images]") from None


def _picture_folder(path: Path, size: int | None, limit: int | None, test_limit: int | None, seed: int) -> LabelledData:
    train = next((path / name for name in ("train", "training") if (path / name).is_dir()), path)
    found = _pictures(train)
    if not found:
        raise InputError(
            f"{path}: no MNIST or CIFAR files and no images; expected train/<class>/*.png, or <class>/*.png"
        )
    names = tuple(sorted(found))
    reader = _PictureReader(size)
    x, y = reader.read_all(found, names, limit, seed)
    data = LabelledData(path.name, x, y, names)
    if train == path:
        return data
    parts = {
        kind: folder
        for kind, words in (("validation", ("val", "valid", "validation")), ("test", ("test",)))
        if (folder := next((path / word for word in words if (path / word).is_dir()), None)) is not None
    }
    if "test" not in parts and "validation" in parts:
        # As ImageNet has it: results are reported on val, and rows to choose by come out of train.
        parts = {"test": parts["validation"]}
    for kind, folder in parts.items():
        pictures = _pictures(folder)
        unknown = next((name for name in pictures if name not in found), None)
        if unknown is not None:
            raise InputError(f"{folder / unknown}: there is no class '{unknown}' in {train}; rename one of them")
        x, y = reader.read_all(pictures, names, test_limit, seed)
        data = replace(data, **cast("Any", {f"x_{kind}": x, f"y_{kind}": y}))
    return data


def _pictures(folder: Path) -> dict[str, list[Path]]:
    """Return the image files of each class: of each folder in `folder` that has any, at any depth."""
    found = {
        inner.name: sorted(file for file in inner.rglob("*") if file.suffix.lower() in _PICTURES and file.is_file())
        for inner in sorted(folder.iterdir())
        if inner.is_dir() and not inner.name.startswith(".")
    }
    return {name: files for name, files in found.items() if files}


class _PictureReader:
    """Decodes image files to one size and kind, which the first file decides where nobody says."""

    def __init__(self, size: int | None, mode: str | None = None) -> None:
        self.library = _pillow()
        self.size = size
        self.mode = mode
        self.first: tuple[Path, tuple[int, int]] | None = None

    def read_all(
        self, pictures: Mapping[str, Sequence[Path]], names: Sequence[str], limit: int | None, seed: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        files = [(file, number) for number, name in enumerate(names) for file in pictures.get(name, ())]
        if not files:
            raise InputError("a part of the image folder holds no images; fill it or remove it")
        y = np.array([number for _, number in files], dtype=np.int64)
        if limit is not None and limit < len(y):
            # Before decoding: a large folder need not be read to take a part of it.
            kept = _subset(y, limit, seed)
            files, y = [files[index] for index in kept], y[kept]
        return np.stack([self.read(file) for file, _ in files]), y

    def read(self, file: Path) -> NDArray[np.float32]:
        try:
            with self.library.open(file) as image:
                if image.width * image.height > _LARGEST_PICTURE:
                    raise InputError(f"{file}: {image.width} x {image.height} pixels is too large; shrink it")
                self.mode = self.mode or ("L" if image.mode in {"1", "L", "I", "I;16", "F"} else "RGB")
                picture = image.convert(self.mode)
                if self.size is not None and picture.size != (self.size, self.size):
                    picture = picture.resize((self.size, self.size), self.library.Resampling.LANCZOS)
                pixels = np.asarray(picture, dtype=np.float32) / np.float32(255)
        except (OSError, ValueError, SyntaxError, EOFError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{file}: not a readable image ({error}); remove or replace it") from error
        self.first = self.first or (file, picture.size)
        if picture.size != self.first[1]:
            (width, height), (first_width, first_height) = picture.size, self.first[1]
            raise InputError(
                f"{file}: {width} x {height} pixels, and {self.first[0]} has {first_width} x {first_height}; give"
                " --size to resize all"
            )
        return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _file(path: Path, target: str | None, allow_gaps: bool) -> LabelledData:
    try:
        if _ending(path) == "npz":
            return _npz(path, allow_gaps)
        table = _Table.read(path, target)
    except InputError:
        raise
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8 text; save the table as UTF-8") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}; check the path") from error
    except (ValueError, zipfile.BadZipFile, zlib.error, EOFError, KeyError, csv.Error) as error:
        raise InputError(f"{path}: not a readable {_ending(path)} file ({error}); is it damaged?") from error
    column = table.place_of(target)
    labels, features = table.labels(column), [place for place in range(len(table.names)) if place != column]
    if not features:
        raise InputError(f"{path}: no column beside the labels; it needs features")
    x = table.numbers(features)
    y, class_names = _number_classes(
        np.array(labels), f"{path}", lambda row: f"line {table.lines[row]}", f"column {table.label(column)}", allow_gaps
    )
    return LabelledData(
        path.name.split(".")[0],
        x,
        y,
        class_names,
        feature_names=tuple(table.names[place] for place in features) if table.header else (),
        target=table.names[column] if table.header else str(column + 1),
    )


def _ending(path: Path) -> str:
    endings = [suffix.lower() for suffix in path.suffixes]
    if endings[-1:] == [".gz"]:
        endings.pop()
    kind = endings[-1][1:] if endings else ""
    if kind not in {"csv", "tsv", "npz"}:
        raise InputError(
            f"{path}: cannot tell what '{path.suffix}' is; give .csv, .tsv (also .gz) or .npz, or a folder"
        )
    return kind


@dataclass(frozen=True, eq=False)
class _Table:
    """The cells of a text table, with the line each row is from."""

    path: Path
    names: tuple[str, ...]
    header: bool
    rows: list[list[str]]
    lines: list[int]

    @classmethod
    def read(cls, path: Path, target: str | None = None) -> _Table:
        with io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", newline="") as file:
            return cls.parse(path, file, "\t" if _ending(path) == "tsv" else None, target)

    @classmethod
    def parse(cls, path: Path, text: Iterable[str], separator: str | None, target: str | None) -> _Table:
        lines = iter(text)
        first = next(lines, "")
        if separator is None:
            separator = max(",;\t", key=first.count)
        reader = csv.reader(_chain(first, lines), delimiter=separator)
        rows: list[list[str]] = []
        numbers: list[int] = []
        for row in reader:
            if any(cell.strip() for cell in row):
                rows.append(row)
                numbers.append(reader.line_num)
        if not rows:
            raise InputError(f"{path}: the file is empty; it needs rows of numbers with a label")
        # The label may be text in every row, so a header is known by the features.
        width = len(rows[0])
        label = int(target) - 1 if target is not None and target.isdecimal() and 0 < int(target) <= width else width - 1
        header = any(
            not _is_number(cell) and cell.strip().lower() not in _MISSING
            for place, cell in enumerate(rows[0])
            if place != label or width == 1
        )
        names = tuple(cell.strip() for cell in rows[0]) if header else tuple(str(i + 1) for i in range(len(rows[0])))
        if header:
            rows, numbers = rows[1:], numbers[1:]
            if twice := next((name for place, name in enumerate(names) if name in names[:place]), None):
                raise InputError(f"{path}: column '{twice}' occurs twice; rename one")
        if not rows:
            raise InputError(f"{path}: no rows below the column names")
        for row, line in zip(rows, numbers, strict=True):
            if len(row) != len(names):
                raise InputError(f"{path}: line {line} has {len(row)} values for {len(names)} columns")
        return cls(path, names, header, rows, numbers)

    def place_of(self, target: str | None) -> int:
        if target is None:
            return len(self.names) - 1
        if target in self.names:
            return self.names.index(target)
        if not self.header:
            raise InputError(
                f"{self.path}: no column '{target}'; the file has no header: give a column's number,"
                f" 1 to {len(self.names)}"
            )
        raise no_such("column", target, self.names, where=f"{self.path}: labels")

    def label(self, place: int) -> str:
        return f"{place + 1} ('{self.names[place]}')" if self.header else f"{place + 1}"

    def labels(self, place: int) -> list[str]:
        labels = [row[place].strip() for row in self.rows]
        for label, line in zip(labels, self.lines, strict=True):
            if label.lower() in _NO_LABEL:
                raise InputError(
                    f"{self.path}: line {line}, column {self.label(place)}: the label is missing; give it, or leave the"
                    " row out"
                )
        return labels

    def numbers(self, places: Sequence[int]) -> NDArray[np.float32]:
        x = np.empty((len(self.rows), len(places)), dtype=np.float32)
        for index, row in enumerate(self.rows):
            try:
                x[index] = [float(row[place]) for place in places]
            except ValueError:
                place = next(place for place in places if not _is_number(row[place]))
                raise self._bad_cell(index, place) from None
        if not np.isfinite(x).all():
            index, place = (int(i) for i in np.argwhere(~np.isfinite(x))[0])
            raise self._bad_cell(index, places[place])
        return x

    def _bad_cell(self, index: int, place: int) -> InputError:
        cell = self.rows[index][place].strip()
        where = f"{self.path}: line {self.lines[index]}, column {self.label(place)}"
        if cell.lower() in _MISSING:
            return InputError(f"{where}: the value is missing; fill it in or leave the row out")
        return InputError(f"{where}: '{cell}' is not a finite number; encode categories as numbers")


def _chain(first: str, rest: Iterable[str]) -> Iterable[str]:
    yield first
    yield from rest


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _npz(path: Path, allow_gaps: bool) -> LabelledData:
    arrays = _arrays(path)

    def pick(*names: str) -> tuple[str, NDArray[Any]] | None:
        return next(((name, arrays[name]) for name in names if name in arrays), None)

    x, y = pick("x", "X", "x_train", "X_train"), pick("y", "Y", "y_train", "Y_train")
    if x is None or y is None:
        found = ", ".join(f"{name} {array.shape}" for name, array in arrays.items()) or "nothing"
        raise InputError(f"{path}: needs arrays 'x' and 'y', found {found}")
    codes, names = _number_classes(
        _flat(y[1], path, y[0], len(x[1])), str(path), lambda row: f"row {row + 1}", f"'{y[0]}'", allow_gaps
    )
    data = LabelledData(path.name.split(".")[0], _floats(x[1], path, x[0]), codes, names)
    x_test, y_test = pick("x_test", "X_test"), pick("y_test", "Y_test")
    if x_test is None or y_test is None:
        return data
    labels = _flat(y_test[1], path, y_test[0], len(x_test[1]))
    return replace(
        data, x_test=_floats(x_test[1], path, x_test[0]), y_test=_known_classes(labels, names, f"{path}: '{y_test[0]}'")
    )


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    return read_arrays(path)


def _flat(labels: NDArray[Any], path: Path, name: str, rows: int) -> NDArray[Any]:
    if labels.shape not in {(rows,), (rows, 1)}:
        raise InputError(f"{path}: '{name}' must be a label a row, ({rows},), got {labels.shape}")
    return labels.reshape(-1)


def _floats(x: NDArray[Any], path: Path, name: str) -> NDArray[np.float32]:
    """Return rows as float32: bytes in 0..1, images with their channels first."""
    if x.ndim < 2 or x.dtype.kind not in "fiub":
        raise InputError(f"{path}: '{name}' must be rows of numbers, got {x.dtype} of shape {x.shape}")
    if x.ndim == 4 and x.shape[3] in {1, 3, 4} and x.shape[1] not in {1, 3, 4}:
        x = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    elif x.ndim == 3:
        x = x[:, None]
    return x.astype(np.float32) / np.float32(255 if x.dtype == np.uint8 and x.ndim == 4 else 1)


def _number_classes(
    labels: NDArray[Any], file: str, place: _Place, column: str, allow_gaps: bool
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Give the classes numbers in the order of their values: of their size, or of the alphabet."""
    if not len(labels):
        raise InputError(f"{file}: no rows; it needs some of every class")
    values: NDArray[Any] = labels
    if labels.dtype.kind in "US":
        missing = np.isin(np.char.lower(np.char.strip(labels.astype(str))), list(_NO_LABEL))
        if missing.any():
            raise InputError(f"{file}: {place(int(missing.argmax()))}, {column}: the label is missing; give it")
    if labels.dtype.kind in "US" and all(_is_number(str(label)) for label in np.unique(labels)):
        values = labels.astype(np.float64)
    if values.dtype.kind not in "fiub":
        names, codes = np.unique(values.astype(str), return_inverse=True)
        kinds = tuple(str(name) for name in names)
    else:
        values = values.astype(np.float64)
        bad = ~np.isfinite(values)
        if bad.any():
            raise InputError(f"{file}: {place(int(bad.argmax()))}, {column}: the label is missing; give it")
        fractions = values != np.round(values)
        if fractions.any():
            row = int(fractions.argmax())
            raise InputError(
                f"{file}: {place(row)}, {column}: {values[row]:g} is a measurement, not a class; choose another column"
                " with --target"
            )
        numbers, codes = np.unique(values.astype(np.int64), return_inverse=True)
        kinds = tuple(str(number) for number in numbers)
        gaps = np.flatnonzero(np.diff(numbers) > 1)
        if len(kinds) > max(20, len(values) // 2):
            raise InputError(
                f"{file}: {column} has {len(kinds):,} different values in {len(values):,} rows; these are no classes:"
                " choose another column with --target"
            )
        if len(gaps) and not allow_gaps:
            after = int(gaps[0])
            row = int((codes == after + 1).argmax())
            raise InputError(
                f"{file}: {place(row)}, {column}: class {kinds[after + 1]} follows {kinds[after]}, with none between;"
                " number classes without gaps, name them by words, or allow gaps"
            )
    return codes.astype(np.int64), kinds


def _known_classes(labels: NDArray[Any], names: Sequence[str], where: str) -> NDArray[np.int64]:
    order = {name: number for number, name in enumerate(names)}
    texts = [str(label) if labels.dtype.kind in "US" else f"{float(label):g}" for label in labels]
    for row, text in enumerate(texts):
        if text not in order:
            raise InputError(f"{where}: row {row + 1}: class '{text}' does not occur among the training rows")
    return np.array([order[text] for text in texts], dtype=np.int64)


def read_rows(source: str | Path, inputs: InputFormat) -> Float32[Tensor, "n ..."]:
    """Read rows to predict, scaled as the model was trained.

    Parameters
    ----------
    source : CSV or TSV (columns are found by their names where the training table had any; a column of labels is left
        out), NPZ with ``x``, an image file, or a folder of image files
    inputs : of the trained model

    Returns
    -------
    Rows (n, ...) in the order of the file, or of the names in a folder.

    Raises
    ------
    InputError
        One line that says where and what.
    """
    path = Path(source)
    if path.is_dir() or path.suffix.lower() in _PICTURES:
        x = _picture_rows(path, inputs)
    elif _ending(path) == "npz":
        arrays = _arrays(path)
        name = next((name for name in ("x", "X", "x_test", "X_test") if name in arrays), None)
        if name is None:
            raise InputError(f"{path}: needs an array 'x', found {', '.join(arrays) or 'nothing'}")
        x = _floats(arrays[name], path, name)
        if len(x) and math.prod(x.shape[1:]) == math.prod(inputs.shape):
            x = x.reshape(len(x), *inputs.shape)
    else:
        x = _table_rows(path, inputs)
    if not len(x):
        raise InputError(f"{path}: no rows; there is nothing to predict")
    if tuple(x.shape[1:]) != inputs.shape:
        raise InputError(f"{path}: rows have shape {tuple(x.shape[1:])}, and the model was trained on {inputs.shape}")
    if not np.isfinite(x).all():
        row = int(np.argwhere(~np.isfinite(x))[0][0])
        raise InputError(f"{path}: row {row + 1} holds NaN or infinity; fill it in or leave the row out")
    return inputs.apply(x)


def _picture_rows(path: Path, inputs: InputFormat) -> NDArray[np.float32]:
    if len(inputs.shape) != 3 or inputs.shape[1] != inputs.shape[2] or inputs.shape[0] not in {1, 3}:
        raise InputError(f"{path}: the model was trained on rows of shape {inputs.shape}, not on square images")
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _PICTURES and file.is_file())
    if not files:
        raise InputError(f"{path}: no image files; give a folder of {', '.join(sorted(_PICTURES))}")
    reader = _PictureReader(inputs.shape[1], "L" if inputs.shape[0] == 1 else "RGB")
    return np.stack([reader.read(file) for file in files])


def _table_rows(path: Path, inputs: InputFormat) -> NDArray[np.float32]:
    try:
        table = _Table.read(path, inputs.target)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8 text; save the table as UTF-8") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}; check the path") from error
    except (zlib.error, EOFError, csv.Error) as error:
        raise InputError(f"{path}: not a readable table ({error}); is it damaged?") from error
    if table.header and inputs.feature_names:
        absent = next((name for name in inputs.feature_names if name not in table.names), None)
        if absent is not None:
            raise no_such("column", absent, table.names, where=f"{path}: the model was trained on other columns")
        places = [table.names.index(name) for name in inputs.feature_names]
    else:
        places, wanted = list(range(len(table.names))), math.prod(inputs.shape)
        if len(places) == wanted + 1:
            target = inputs.target if inputs.target in table.names else None
            places.remove(table.place_of(target))
        if len(places) != wanted:
            raise InputError(f"{path}: {len(table.names)} columns, and the model was trained on {wanted}")
    return table.numbers(places).reshape(-1, *inputs.shape)
