"""Users' own tasks: one ``tasks.toml`` that names the files of each client, read into tasks of one federation."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Float32, Shaped
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from torch import Tensor

from fedapc.messages import MOST_NAME
from fedapc.seeds import generator
from fedapc.tasks import Task
from shared_core.arrays import read_arrays
from shared_core.classes import read_labelled, read_unlabelled
from shared_core.data import ImageData
from shared_core.data import load as load_shared
from shared_core.errors import InputError, UnknownKeyError, no_such
from shared_core.runs import atomic_path
from shared_core.tables import TableSchema, learn_scale, read_table

__all__ = ["TaskFile", "read_tasks", "write_example"]

Arrays = dict[str, Shaped[np.ndarray, "..."]]
# Inputs, and the label of each as text.
Part = tuple[Shaped[np.ndarray, "_ ..."], list[str]]

_TABLES = (".csv", ".tsv", ".parquet", ".csv.gz", ".tsv.gz")
_MOST_BYTES = 2**34


class _Settings(BaseModel):
    """What may stand at the top, of a client, or of a task; the nearest counts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    label: str | None = Field(None, min_length=1)
    size: int | None = Field(None, ge=1, le=1024)
    channels: Literal[1, 3] | None = None
    scale: Literal["standard", "none"] | None = None
    test_share: float | None = Field(None, ge=0, lt=1)
    validation_share: float | None = Field(None, ge=0, lt=1)


class _TaskEntry(_Settings):
    file: str = Field(min_length=1)
    name: str = ""
    test: str | None = None
    validation: str | None = None


class _ClientEntry(_Settings):
    tasks: list[_TaskEntry] = Field(min_length=1)

    @field_validator("tasks", mode="before")
    @classmethod
    def _a_file_is_a_task(cls, value: object) -> object:
        if not isinstance(value, list):
            return value
        return [{"file": entry} if isinstance(entry, str) else entry for entry in cast("list[object]", value)]


class _Entries(_Settings):
    network: str = Field("mlp", min_length=1)
    seed: int = 0
    clients: dict[str, _ClientEntry] = Field(min_length=1)


@dataclass(frozen=True)
class _Options:
    """Settings of one task, all of them known."""

    label: str
    size: int
    channels: Literal[1, 3]
    scale: Literal["standard", "none"]
    test_share: float
    validation_share: float

    @classmethod
    def of(cls, *settings: _Settings) -> _Options:
        """Take each setting from the first that has it."""
        defaults: dict[str, Any] = {
            "label": "label",
            "size": 32,
            "channels": 3,
            "scale": "standard",
            "test_share": 0.2,
            "validation_share": 0.1,
        }
        for given in reversed(settings):
            defaults |= {name: value for name in defaults if (value := getattr(given, name)) is not None}
        return cls(**defaults)


@dataclass(frozen=True, eq=False)
class _Preparation:
    """How the files of one task become inputs."""

    options: _Options
    schema: TableSchema | None
    offset: Float[np.ndarray, " inputs"] | None
    factor: Float[np.ndarray, " inputs"] | None

    def inputs(self, x: Shaped[np.ndarray, "n ..."]) -> Float32[Tensor, "n ..."]:
        """Return inputs as a network takes them, of what a file holds."""
        if self.offset is not None and self.factor is not None:
            x = np.nan_to_num((x - self.offset) * self.factor, nan=0.0)
        return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))


@dataclass(frozen=True, eq=False)
class TaskFile:
    """The tasks of a ``tasks.toml``.

    Parameters
    ----------
    tasks : of each client, in the order that it learns them
    network : for `fedapc.networks.network`
    labels : of each client and task, the user's labels of the classes 0, 1, ...
    notes : what was done to the data, a line each
    preparations : how files become inputs, for :meth:`inputs`
    """

    tasks: dict[str, list[Task]]
    network: str
    labels: dict[str, list[tuple[str, ...]]]
    notes: tuple[str, ...] = ()
    preparations: Mapping[str, Sequence[Any]] = field(default_factory=dict[str, Sequence[Any]], repr=False)

    def inputs(self, client: str, task: int, path: str | Path) -> Float32[Tensor, "n ..."]:
        """Read a file to predict, prepared as that task's own; labels in it are passed over.

        Parameters
        ----------
        client : of the file
        task : its place, from 0 on
        path : a table, an NPZ with ``x``, a folder of pictures or one picture

        Raises
        ------
        UnknownKeyError
            For a client or a task that there is not.
        InputError
            For a file that cannot be read, or has inputs of another shape.
        """
        if client not in self.tasks:
            raise no_such("client", client, self.tasks)
        if not 0 <= task < len(self.tasks[client]):
            raise UnknownKeyError(f"client '{client}' has {len(self.tasks[client])} tasks, not task {task}")
        path = Path(path)
        prepared = cast("_Preparation", self.preparations[client][task])
        expected = tuple(self.tasks[client][task].x.shape[1:])
        x, _ = _read(path, prepared.options, prepared.schema, labelled=False)
        if x.shape[1:] != expected:
            raise InputError(f"{path}: inputs have the shape {tuple(x.shape[1:])}, expected {expected}")
        return prepared.inputs(x)


def read_tasks(path: str | Path) -> TaskFile:
    """Read the tasks of all clients.

    The file is TOML::

        network = "mlp"                       # or "package.module:function", "my_network.py:function"

        [clients.siteA]
        tasks = ["first.npz", "second.csv", "third_folder"]

        [[clients.siteB.tasks]]
        file = "first.csv"
        test = "first_test.csv"
        label = "diagnosis"

    ``file`` is an NPZ with ``x`` ``(examples, ...)`` and ``y`` ``(examples,)``; a CSV, TSV or Parquet table with a
    column of labels; or a folder with a folder of pictures for each class. Paths are relative to the file. A task may
    have a ``name``, and ``test`` and ``validation`` files; where it has none, ``test_share`` (0.2) and
    ``validation_share`` (0.1) of each class are taken from its examples, drawn by ``seed`` (0). ``label`` is the column
    of labels ("label"), ``size`` and ``channels`` are those of pictures (32 pixels, 3). These and ``scale`` may be at
    the top, below a client or below a task.

    Tables, and arrays of numbers ``(examples, inputs)``, are standardised column by column by a task's training
    examples, and what is missing becomes the mean; ``scale = "none"`` leaves them as they are. A text column becomes
    one input for each of its values in all tables. Arrays of bytes with more axes are images ``(n, height, width[,
    channels])``, and become ``(n, channels, height, width)`` in [0, 1], as pictures do. Labels may be numbers or text;
    they become 0, 1, ... in their order, for each task by itself.

    Parameters
    ----------
    path : of the file

    Raises
    ------
    InputError
        One line that names the file, the place in it and what to do about it.

    Examples
    --------
    >>> import tempfile
    >>> found = read_tasks(write_example(tempfile.mkdtemp()))
    >>> [(client, [task.name for task in tasks]) for client, tasks in found.tasks.items()]
    [('siteA', ['low', 'high']), ('siteB', ['parity', 'low'])]
    >>> found.labels["siteB"][0], found.tasks["siteB"][0].x.shape
    (('even', 'odd'), torch.Size([70, 64]))
    """
    path = Path(path)
    entries = _entries(path)
    readings = [
        _Reading(path, client, place, task, _Options.of(task, listed, entries))
        for client, listed in entries.clients.items()
        for place, task in enumerate(listed.tasks)
    ]
    schema = _common_schema(readings)
    tasks: dict[str, list[Task]] = {client: [] for client in entries.clients}
    labels: dict[str, list[tuple[str, ...]]] = {client: [] for client in entries.clients}
    preparations: dict[str, list[_Preparation]] = {client: [] for client in entries.clients}
    notes: list[str] = []
    for reading in readings:
        task, names, prepared = reading.task(schema if reading.is_table else None, entries.seed, notes)
        tasks[reading.client].append(task)
        labels[reading.client].append(names)
        preparations[reading.client].append(prepared)
    first = next(iter(tasks.values()))[0]
    for reading in readings:
        shape = tasks[reading.client][reading.place].x.shape[1:]
        if shape != first.x.shape[1:]:
            raise InputError(
                f"{reading.file}: inputs have the shape {tuple(shape)}, and those of {readings[0].file}"
                f" {tuple(first.x.shape[1:])}; all clients share one network, give all files the same shape"
            )
    return TaskFile(tasks, _network(entries.network, path), labels, tuple(notes), preparations)


def _network(name: str, path: Path) -> str:
    """Name the file of a network from wherever the program runs."""
    place, colon, function = name.rpartition(":")
    beside = path.parent / place
    return f"{beside}:{function}" if colon and place.endswith(".py") and beside.is_file() else name


def _entries(path: Path) -> _Entries:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; check the path") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8 text; save it as UTF-8") from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InputError(f"{path}: not valid TOML: {error}") from error
    try:
        entries = _Entries.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{path}: {_first_fault(error)}") from error
    for client in entries.clients:
        if not 0 < len(client.encode()) <= MOST_NAME:
            raise InputError(f"{path}: clients.{client}: a client's name has 1 to {MOST_NAME} bytes")
    return entries


def _first_fault(error: ValidationError) -> str:
    # A key that does not exist is the likelier mistake than one that is missing.
    faults = sorted(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden")
    fault = faults[0]
    place = ""
    for part in fault["loc"]:
        place += f"[{part}]" if isinstance(part, int) else f".{part}" if place else str(part)
    if fault["type"] == "extra_forbidden":
        kinds = (_Entries, _ClientEntry, _TaskEntry)
        known = list(kinds[min(2, len(fault["loc"]) // 2)].model_fields)
        return str(no_such("key", fault["loc"][-1], known, where=place.rpartition(".")[0]))
    if fault["type"] == "missing":
        example = 'add [clients.NAME] with tasks = ["a.csv"]' if fault["loc"] == ("clients",) else "add it"
        return f"{place}: is missing; {example}"
    return f"{place}: {fault['msg'][:1].lower()}{fault['msg'][1:]}, got {str(fault['input'])[:60]!r}"


@dataclass(frozen=True, eq=False)
class _Reading:
    """One task of the file, to be read."""

    listing: Path
    client: str
    place: int
    entry: _TaskEntry
    options: _Options

    @property
    def file(self) -> Path:
        return self.listing.parent / self.entry.file

    @property
    def is_table(self) -> bool:
        return _is_table(self.file)

    def task(
        self, schema: TableSchema | None, seed: int, notes: list[str]
    ) -> tuple[Task, tuple[str, ...], _Preparation]:
        """Read the files of the task; `schema` is that of all tables."""
        x, given = _read(self.file, self.options, schema, labelled=True)
        names = tuple(sorted(set(given), key=_numbers_first))
        if len(names) < 2:
            raise InputError(f"{self.file}: has the single class '{given[0]}'; a task needs at least two")
        parts: dict[str, Part] = {"training": (x, given)}
        for what, other in (("test", self.entry.test), ("validation", self.entry.validation)):
            if other is not None:
                parts[what] = _read(self.listing.parent / other, self.options, schema, labelled=True)
                self._check(self.listing.parent / other, parts[what], x, names)
        self._hold_out(parts, seed, notes)
        train = parts["training"][0]
        offset = factor = None
        if train.ndim == 2 and self.options.scale == "standard":
            missing = int(np.isnan(train).sum())
            notes += [f"{self.file}: {missing} missing inputs became the mean of their column"] if missing else []
            offset, factor = learn_scale(train.astype(np.float64), "standard")
        prepared = _Preparation(self.options, schema, offset, factor)
        number = {name: place for place, name in enumerate(names)}
        made = {
            what: (prepared.inputs(inputs), torch.tensor([number[label] for label in labels]))
            for what, (inputs, labels) in parts.items()
        }
        task = Task(
            *made["training"],
            classes=len(names),
            validation=made.get("validation"),
            test=made.get("test"),
            name=self.entry.name or Path(self.entry.file).name.partition(".")[0],
        )
        return task, names, prepared

    def _check(
        self,
        file: Path,
        part: Part,
        x: Shaped[np.ndarray, "examples ..."],
        names: tuple[str, ...],
    ) -> None:
        if part[0].shape[1:] != x.shape[1:]:
            raise InputError(
                f"{file}: inputs have the shape {part[0].shape[1:]}, and those of {self.file} {x.shape[1:]}"
            )
        for row, label in enumerate(part[1]):
            if label not in names:
                raise InputError(
                    f"{file}: row {row + 1}: the label '{label}' never occurs in {self.file}; known are"
                    f" {', '.join(names[:20])}"
                )

    def _hold_out(self, parts: dict[str, Part], seed: int, notes: list[str]) -> None:
        """Take shares of each class out of the training examples where there are no files."""
        shares = {"test": self.options.test_share, "validation": self.options.validation_share}
        shares = {what: share for what, share in shares.items() if share and what not in parts}
        if not shares:
            return
        x, labels = parts["training"]
        where: dict[str, list[int]] = {}
        for row, label in enumerate(labels):
            where.setdefault(label, []).append(row)
        taken: dict[str, list[int]] = {what: [] for what in shares}
        kept: list[int] = []
        for label, rows in sorted(where.items()):
            random = generator(seed, "tasks", self.client, self.place, label)
            left = [rows[at] for at in torch.randperm(len(rows), generator=random).tolist()]
            for what, share in shares.items():
                # One is left to learn from.
                count = min(max(1, round(share * len(rows))), len(left) - 1)
                taken[what] += left[:count]
                left = left[count:]
            kept += left
        parts["training"] = x[sorted(kept)], [labels[row] for row in sorted(kept)]
        for what, rows in taken.items():
            if rows:
                parts[what] = x[sorted(rows)], [labels[row] for row in sorted(rows)]
            else:
                notes.append(f"{self.file}: too few examples to hold any out for {what}")


def _is_table(path: Path) -> bool:
    return path.name.lower().endswith(_TABLES)


def _read(
    path: Path, options: _Options, schema: TableSchema | None, *, labelled: bool
) -> tuple[Shaped[np.ndarray, "n ..."], list[str]]:
    """Return what a file holds, and the label of each row as text; what is missing is NaN if it will be filled in."""
    x, labels = _content(path, options, schema, labelled=labelled)
    if options.scale == "none" and x.ndim == 2 and len(missing := np.argwhere(np.isnan(x))):
        row, column = (int(at) for at in missing[0])
        raise InputError(
            f"{path}: row {row + 1}, input {column + 1} is missing; fill it in, or leave out scale = 'none', so that it"
            " becomes the mean"
        )
    return x, labels


def _content(
    path: Path, options: _Options, schema: TableSchema | None, *, labelled: bool
) -> tuple[Shaped[np.ndarray, "n ..."], list[str]]:
    if path.is_dir() or (not labelled and path.suffix.lower() in (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")):
        return _pictures(path, options, labelled=labelled)
    if _is_table(path):
        frame = read_table(path)
        if schema is None:
            raise InputError(f"{path}: is a table, and the task's own file is none; give the same kind")
        return schema.features(frame, str(path)), _column_labels(frame, options.label, path) if labelled else []
    if path.suffix.lower() == ".npz":
        return _npz(path, labelled=labelled)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; check the path, which is relative to that of tasks.toml")
    raise InputError(
        f"{path}: cannot tell what '{path.suffix}' is; give .npz, .csv, .tsv, .parquet or a folder of pictures"
    )


def _pictures(
    path: Path, options: _Options, *, labelled: bool
) -> tuple[Float32[np.ndarray, "n channels size size"], list[str]]:
    if not labelled:
        return read_unlabelled(path, options.size, options.channels).images.numpy(), []
    found = read_labelled(path, options.size, options.channels)
    return found.images.numpy(), [found.class_names[label] for label in found.labels.tolist()]


def _npz(path: Path, *, labelled: bool) -> tuple[Shaped[np.ndarray, "n ..."], list[str]]:
    arrays = _arrays(path)
    missing = next((name for name in ("x", "y") if name not in arrays and (labelled or name == "x")), None)
    if missing:
        found = ", ".join(f"{name} {array.shape}" for name, array in arrays.items()) or "nothing"
        raise InputError(f"{path}: has no array '{missing}'; needs x (examples, ...) and y (examples,), found {found}")
    x = arrays["x"]
    if x.ndim < 2 or not x.size or x.dtype.kind not in "fiub":
        raise InputError(f"{path}: x is {x.dtype} {x.shape}, expected numbers (examples, ...), at least one of each")
    images = x.dtype == np.uint8 and x.ndim in (3, 4)
    if images:
        x = x[:, None] if x.ndim == 3 else x.transpose(0, 3, 1, 2) if x.shape[3] in (1, 3) else x
    x = x.astype(np.float32 if x.ndim > 2 else np.float64)
    x = x / np.float32(255) if images else x
    wrong = np.argwhere(np.isinf(x) if x.ndim == 2 else ~np.isfinite(x))
    if len(wrong):
        row, *place = (int(at) for at in wrong[0])
        value = x[tuple(wrong[0])]
        raise InputError(f"{path}: row {row + 1}: x is {value:g} at {tuple(place)}; expected finite numbers")
    return x, _array_labels(arrays["y"], len(x), path) if labelled else []


def _arrays(path: Path) -> Arrays:
    if not path.is_file():
        raise InputError(f"{path}: there is no such file; check the path, relative to that of tasks.toml")
    return read_arrays(path, most_bytes=_MOST_BYTES)


def _array_labels(y: Shaped[np.ndarray, "..."], count: int, path: Path) -> list[str]:
    if y.shape != (count,):
        raise InputError(f"{path}: y has the shape {y.shape}, expected ({count},), one label for each row of x")
    if y.dtype.kind not in "iubUf":
        raise InputError(f"{path}: y is {y.dtype}, expected whole numbers or text")
    if y.dtype.kind == "f" and len(wrong := np.flatnonzero(~np.isfinite(y) | (y != np.floor(y)))):
        raise InputError(f"{path}: row {int(wrong[0]) + 1}: y is {y[wrong[0]]:g}, expected whole numbers or text")
    return [_text(value) for value in y.tolist()]


def _column_labels(frame: pd.DataFrame, label: str, path: Path) -> list[str]:
    if label not in frame.columns:
        raise InputError(
            f"{path}: no column '{label}' for the labels; name it by label = '...'; there are"
            f" {', '.join(map(str, frame.columns[:20]))}"
        )
    column = frame[label]
    empty = np.flatnonzero(column.isna().to_numpy())
    if len(empty):
        raise InputError(f"{path}: row {int(empty[0]) + 1}: has no label in column '{label}'; fill it in or remove it")
    return [_text(value) for value in column.tolist()]


def _text(value: object) -> str:
    # 1, 1.0 and "1" are one class.
    return str(value).strip().removesuffix(".0")


def _numbers_first(text: str) -> tuple[int, float, str]:
    try:
        return 0, float(text), text
    except ValueError:
        return 1, 0.0, text


def _common_schema(readings: Sequence[_Reading]) -> TableSchema | None:
    """Return how the columns of all tables become numbers: the same inputs for all clients."""
    frames: list[tuple[Path, pd.DataFrame, TableSchema]] = []
    for reading in readings:
        if reading.is_table:
            frame = read_table(reading.file)
            _column_labels(frame, reading.options.label, reading.file)
            alone = TableSchema.infer(
                frame, target=reading.options.label, task="classification", source=str(reading.file)
            )
            frames.append((reading.file, frame.drop(columns=reading.options.label), alone))
    if not frames:
        return None
    first, features, _ = frames[0]
    for path, frame, _ in frames[1:]:
        for name, has, lacks in (
            *((name, first, path) for name in features.columns if name not in frame.columns),
            *((name, path, first) for name in frame.columns if name not in features.columns),
        ):
            raise InputError(
                f"{lacks}: no column '{name}', which {has} has; all tables need the same columns besides the label"
            )
    kinds: dict[str, tuple[bool, Path]] = {}
    for path, _, alone in frames:
        for column in alone.columns:
            numeric, where = kinds.setdefault(column.name, (column.categories is None, path))
            if numeric != (column.categories is None):
                is_text, of_numbers = (path, where) if numeric else (where, path)
                raise InputError(
                    f"{is_text}: column '{column.name}' holds text, and in {of_numbers} numbers; make them alike"
                )
    target = "label"
    while target in features.columns:
        target += "_"
    whole = pd.concat([frame[features.columns] for _, frame, _ in frames], ignore_index=True)
    # Another column in a frame of hundreds is slow, and pandas says so.
    whole = pd.concat([whole, pd.Series(np.arange(len(whole)) % 2, name=target)], axis=1)
    return TableSchema.infer(whole, target=target, task="classification", source=str(first))


_EXAMPLE = """\
# Two sites that learn handwritten digits, each its own tasks; `fedapc` reads this by read_tasks.
network = "mlp"  # or "my_network.py:function", a function that returns a torch.nn.Module

[clients.siteA]
# Arrays x and y; a fifth of each class is held out to test on, a tenth for validation.
tasks = ["low.npz", "high.npz"]

[[clients.siteB.tasks]]
# A table: 64 columns of pixels and one of labels.
file = "parity.csv"
label = "parity"

[[clients.siteB.tasks]]
file = "low_of_siteB.npz"
name = "low"
test = "low_test.npz"
validation_share = 0.2
"""


def write_example(folder: str | Path) -> Path:
    """Write a small ``tasks.toml`` with its data, which runs as it is.

    Parameters
    ----------
    folder : to write into; made where it is not there

    Returns
    -------
    The path of ``tasks.toml``.

    Raises
    ------
    InputError
        For a folder that has one already, or cannot be written to.

    Examples
    --------
    >>> import tempfile
    >>> sorted(file.name for file in write_example(tempfile.mkdtemp()).parent.iterdir())
    ['high.npz', 'low.npz', 'low_of_siteB.npz', 'low_test.npz', 'parity.csv', 'tasks.toml']
    """
    folder = Path(folder)
    target = folder / "tasks.toml"
    if target.exists():
        raise InputError(f"{target}: is there already; choose another folder")
    digits = load_shared("digits", expect=ImageData)
    x, y = digits.images.reshape(len(digits), -1).astype(np.float32), digits.labels
    low, high = np.flatnonzero(y < 5), np.flatnonzero(y >= 5)

    def arrays(name: str, rows: Shaped[np.ndarray, " n"]) -> None:
        _write(folder / name, lambda file: np.savez(file, x=x[rows], y=y[rows]))

    arrays("low.npz", low[:150])
    arrays("low_of_siteB.npz", low[150:250])
    arrays("low_test.npz", low[250:350])
    arrays("high.npz", high[:150])
    rows = high[150:250]
    table = pd.DataFrame(x[rows].astype(int), columns=pd.Index([f"pixel{number}" for number in range(64)]))
    table["parity"] = np.where(y[rows] % 2, "odd", "even")
    _write(folder / "parity.csv", lambda file: table.to_csv(file, index=False))
    _write(target, lambda file: file.write_text(_EXAMPLE, encoding="utf-8"))
    return target


def _write(path: Path, content: Callable[[Path], object]) -> None:
    with atomic_path(path) as temporary:
        content(temporary)
