"""The user's own series, from a long table, an NPZ or the release's pickle: everything is checked, nothing is run."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from ial_nap.dataset import Dataset, Part
from ial_nap.series import Kind
from shared_core.arrays import read_arrays
from shared_core.errors import InputError, no_such
from shared_core.pickles import read_pickle

__all__ = ["read_series"]

_MISSING = {"", "?", "NA", "N/A", "NaN", "nan", "null", "NULL", "None", "."}


def read_series(path: Path, columns: Mapping[str, str | None], kind: Kind | None) -> Dataset:
    """Read a file as :func:`ial_nap.data.load_data` describes.

    Parameters
    ----------
    path : of a .csv, .tsv, .npz or .pkl file
    columns : of a table, by role "id", "time" and "label"; None looks for the usual names
    kind : of the task; None guesses

    Raises
    ------
    InputError
        One line that names the file, the place in it, what was found and what to do.
    """
    ending = path.suffix.lower()
    readers: dict[str, Callable[[bytes], Dataset]] = {
        ".csv": lambda data: _read_long(data, path, ",", columns, kind),
        ".tsv": lambda data: _read_long(data, path, "\t", columns, kind),
        ".npz": lambda _: _of_arrays(read_arrays(path), path, kind),
        ".pkl": lambda data: _of_arrays(_unpickled(data, path), path, kind),
        ".pickle": lambda data: _of_arrays(_unpickled(data, path), path, kind),
    }
    if path.is_dir():
        raise InputError(f"{path} is a folder: give a .csv, .tsv, .npz or .pkl file")
    if ending not in readers:
        raise InputError(f"{path}: cannot tell what '{path.suffix}' is: give .csv, .tsv, .npz or .pkl")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; check the path") from None
    return readers[ending](data)


def _guessed(y: np.ndarray | None, kind: Kind | None) -> Kind:
    if kind is not None:
        return kind
    if y is None:
        return "binary"
    flat = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    if flat.ndim == 2:
        return "multilabel"
    if not np.array_equal(flat, np.round(flat)):
        return "regression"
    return "binary" if np.isin(flat, (0, 1)).all() else "multiclass"


def _read_long(
    data: bytes, path: Path, separator: str, columns: Mapping[str, str | None], kind: Kind | None
) -> Dataset:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8 text; save the table as UTF-8") from None
    if "\0" in text:
        raise InputError(f"{path}: there is a zero byte in it: this is no text, or it was cut; export it again")
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    try:
        rows = [(lines.line_num, [cell.strip() for cell in row]) for row in lines if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise InputError(f"{path}:{lines.line_num}: {error}") from None
    if len(rows) < 2:
        raise InputError(f"{path}: the table is empty; give a line of column names, and a row for an instance and time")
    header = rows[0][1]
    twice = next((name for k, name in enumerate(header) if name in header[:k]), None)
    if twice is not None:
        raise InputError(f"{path}:1: column '{twice}' is there twice: make names unique")
    of_id, of_time = (_column(path, header, role, columns[role]) for role in ("id", "time"))
    of_label = _label_column(path, header, columns["label"])
    read = [k for k in range(len(header)) if k not in {of_id, of_time, of_label}]
    if not read:
        raise InputError(f"{path}: there is no column beside {', '.join(header)}: nothing to read")
    places: dict[str, list[int]] = {}
    last: dict[str, tuple[float, str]] = {}
    labels: dict[str, str] = {}
    values = np.full((len(rows) - 1, len(read)), np.nan)
    for k, (line, row) in enumerate(rows[1:]):
        if len(row) != len(header):
            raise InputError(f"{path}:{line}: {len(row)} fields, expected {len(header)} as in the first line")
        name, moment = row[of_id], row[of_time]
        if not name:
            raise InputError(f"{path}:{line}, column '{header[of_id]}': no id; give one to every row")
        now = _moment(moment, f"{path}:{line}, column '{header[of_time]}'")
        before = last.get(name)
        if before is not None and now == before[0]:
            raise InputError(
                f"{path}:{line}: id '{name}' has time '{moment}' twice: keep one row for an id and time, or their mean"
            )
        if before is not None and now < before[0]:
            raise InputError(
                f"{path}:{line}: id '{name}' goes back from time '{before[1]}' to '{moment}': sort rows by time"
            )
        last[name] = (now, moment)
        if of_label is not None:
            said = row[of_label]
            if said in _MISSING:
                raise InputError(
                    f"{path}:{line}, column '{header[of_label]}': no label; fill it, or leave '{name}' out"
                )
            if labels.setdefault(name, said) != said:
                raise InputError(
                    f"{path}:{line}: id '{name}' has label '{said}' after '{labels[name]}': one label for an id"
                )
        places.setdefault(name, []).append(k)
        for column, source in enumerate(read):
            if row[source] not in _MISSING:
                values[k, column] = _number(row[source], f"{path}:{line}, column '{header[source]}'")
    y, classes = _labels_of(list(labels.values()), kind) if labels else (None, ())
    lengths = np.array([len(own) for own in places.values()])
    x = np.full((len(places), int(lengths.max()), len(read)), np.nan, dtype=np.float32)
    for k, own in enumerate(places.values()):
        x[k, : len(own)] = values[own]
    times = {tuple(rows[1 + k][1][of_time] for k in own) for own in places.values()}
    steps = next(iter(times)) if len(times) == 1 else tuple(str(k) for k in range(x.shape[1]))
    return Dataset(
        path.stem,
        x,
        y,
        lengths,
        tuple(header[k] for k in read),
        ("",) * len(read),
        steps,
        tuple(places),
        _guessed(y, kind),
        classes=classes,
        source=str(path),
    )


def _column(path: Path, header: Sequence[str], role: str, given: str | None) -> int:
    name = given or role
    if name in header:
        return header.index(name)
    raise no_such("column", name, header, where=f"{path}:1, the {role}")


def _label_column(path: Path, header: Sequence[str], given: str | None) -> int | None:
    name = given or next((name for name in ("label", "y") if name in header), None)
    return None if name is None else _column(path, header, "label", name)


def _number(text: str, place: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise InputError(
            f"{place}: '{text[:40]}' is not a number; leave it empty if it is missing, and make categories columns of"
            " 0 and 1"
        ) from None
    if not math.isfinite(value):
        raise InputError(f"{place}: {text} is not finite; leave it empty if it is missing")
    return value


def _moment(text: str, place: str) -> float:
    try:
        value = float(text)
    except ValueError:
        try:
            value = datetime.fromisoformat(text).timestamp()
        except ValueError:
            raise InputError(f"{place}: '{text[:40]}' is no time: give numbers, or dates such as 2024-05-31") from None
    if not math.isfinite(value):
        raise InputError(f"{place}: time '{text}' is not finite; give every row its time")
    return value


def _labels_of(said: Sequence[str], kind: Kind | None) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels as numbers; texts become classes in alphabetical order."""
    try:
        return np.array([float(text) for text in said]), ()
    except ValueError:
        if kind == "regression":
            wrong = next(text for text in said if not _is_number(text))
            raise InputError(f"label '{wrong[:40]}' of a regression is not a number") from None
    classes = tuple(sorted(set(said)))
    return np.array([float(classes.index(text)) for text in said]), classes


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _of_arrays(arrays: Mapping[str, Any], path: Path, kind: Kind | None) -> Dataset:
    """Make a set of named arrays: ours, or those of the release with a part for each purpose."""

    def array(key: str) -> np.ndarray:
        found = np.asarray(arrays[key])
        if found.dtype.kind not in "fiub":
            raise InputError(f"{path}: '{key}' is an array of {found.dtype}, expected numbers")
        return found

    def names(*keys: str) -> tuple[str, ...] | None:
        found = next((arrays[key] for key in keys if key in arrays), None)
        return None if found is None else tuple(_text(name) for name in np.asarray(found).ravel().tolist())

    parts: tuple[Part, ...] | None = None
    if "train_inputs" in arrays:
        released: dict[str, Part] = {"train": "train", "validation": "validation", "evaluation": "test"}
        there = [prefix for prefix in released if f"{prefix}_inputs" in arrays]
        absent = [prefix for prefix in there if f"{prefix}_labels" not in arrays]
        if absent:
            raise InputError(f"{path}: there is '{absent[0]}_inputs' but no '{absent[0]}_labels'")
        xs, ys = ([array(f"{prefix}_{what}") for prefix in there] for what in ("inputs", "labels"))
        shapes = {one.shape[1:] for one in xs}
        if len(shapes) > 1 or any(one.ndim != 3 for one in xs):
            raise InputError(
                f"{path}: inputs have shapes {', '.join(str(one.shape) for one in xs)}: give (n, T, r) each"
            )
        if any(len(one) != len(labels) for one, labels in zip(xs, ys, strict=True)):
            raise InputError(f"{path}: there are not as many labels as inputs in every part")
        x = np.concatenate(xs)
        y: np.ndarray | None = np.concatenate([labels.reshape(len(labels), -1) for labels in ys])
        parts = tuple(released[prefix] for prefix, one in zip(there, xs, strict=True) for _ in range(len(one)))
        if "test" not in parts:
            parts = None
    else:
        key = next((key for key in ("X", "x") if key in arrays), None)
        if key is None:
            there = ", ".join(sorted(arrays)[:20]) or "nothing"
            raise InputError(f"{path}: no array 'X' of (instances, steps, features); there is {there}")
        x, y = array(key), array("y") if "y" in arrays else None
    if x.ndim != 3 or not x.size:
        raise InputError(f"{path}: x has shape {x.shape}: expected (instances, steps, features), none of them 0")
    n, t, r = x.shape
    if y is not None:
        if y.ndim not in {1, 2} or len(y) != n:
            raise InputError(f"{path}: y has shape {y.shape} for {n} instances: give (n,) or (n, labels)")
        y = (y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y).astype(np.float64)
    lengths = array("lengths").ravel() if "lengths" in arrays else np.full(n, t)
    if len(lengths) != n or not np.array_equal(lengths, np.round(lengths)):
        raise InputError(f"{path}: lengths must be {n} whole numbers, one for each instance, got {len(lengths)}")
    named = {
        "feature": (names("feature_names", "features") or tuple(f"f{k}" for k in range(r)), r),
        "unit": (names("units", "feature_units") or ("",) * r, r),
        "step": (names("step_names", "steps") or tuple(str(k) for k in range(t)), t),
        "id": (names("ids") or tuple(str(k) for k in range(n)), n),
    }
    for what, (found, count) in named.items():
        if len(found) != count:
            raise InputError(f"{path}: {len(found)} {what} names for {count}: give one each")
    return Dataset(
        path.stem,
        x.astype(np.float32),
        y,
        lengths.astype(np.int64),
        named["feature"][0],
        named["unit"][0],
        named["step"][0],
        named["id"][0],
        _guessed(y, kind),
        parts=parts,
        source=str(path),
    )


def _text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _plain(value: Any) -> Any:
    """Return an array of a pickle, or a list of names; refuse anything else."""
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, list | tuple) and all(isinstance(entry, str | bytes | int) for entry in value):
        return [_text(entry) for entry in value]
    raise ValueError(f"an entry is a {type(value).__name__}, neither an array nor names")


def _unpickled(data: bytes, path: Path) -> dict[str, Any]:
    instead = "save them as NPZ with the same keys"
    loaded = read_pickle(data, str(path), instead=instead)
    try:
        if not isinstance(loaded, dict):
            raise ValueError(f"it holds a {type(loaded).__name__}, not arrays by name")  # noqa: TRY004
        return {_text(key): _plain(value) for key, value in loaded.items()}
    except ValueError as error:
        raise InputError(f"{path}: is not a pickle of plain arrays ({error}); {instead}") from None
