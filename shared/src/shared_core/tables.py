"""Users' own tables: read a file, learn how its columns become numbers, and apply exactly that to the next file.

CSV, TSV and Parquet hold named columns; NPZ holds ``x`` (NaN = missing, or a ``mask``) and perhaps ``y``; an NPZ
written by ``scipy.sparse.save_npz`` holds a matrix whose stored pattern says what was observed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import numpy as np
import pandas as pd
from jaxtyping import Float, Int64, Shaped
from pydantic import BaseModel, Field, ValidationError

from shared_core.arrays import open_bytes, read_arrays
from shared_core.errors import DAMAGE, InputError

__all__ = ["Column", "Scale", "TableSchema", "Task", "learn_scale", "numeric_columns", "read_sparse", "read_table"]

Task = Literal["auto", "regression", "classification"]
Scale = Literal["none", "minmax", "standard"]

_MISSING = ["", "?", "NA", "N/A", "NaN", "nan", "null", "NULL", "None", "."]
_MAX_CATEGORIES = 64
_MAX_DENSE_CELLS = 200_000_000


def read_table(path: str | Path) -> pd.DataFrame:
    """Read a table from CSV, TSV (also ``.gz``), Parquet, NPZ or sparse NPZ.

    Parameters
    ----------
    path : the file; its ending says what it is. In text files empty cells, ``?``, ``NA``, ``NaN`` and the like are
        missing. An NPZ holds ``x`` (rows, columns) and, if it likes, ``mask``, ``y`` and ``feature_names``.

    Returns
    -------
    DataFrame with unique column names; an NPZ's are ``x0, x1, ...`` (or its ``feature_names``) and ``y``.

    Raises
    ------
    InputError
        One line that names the file and what is wrong with it.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a directory; give a CSV, Parquet or NPZ file")
    ending = "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
    try:
        match ending.lower():
            case ".npz":
                frame = _read_npz(path)
            case ".parquet":
                frame = pd.read_parquet(path)
            case ".csv" | ".csv.gz" | ".tsv" | ".tsv.gz" | ".txt" | ".data":
                separator = "\t" if ".tsv" in ending.lower() else ("," if ".csv" in ending.lower() else None)
                engine: Any = "python" if separator is None else "c"
                with open_bytes(path) as stream:
                    frame = pd.read_csv(
                        stream,
                        sep=separator,
                        engine=engine,
                        na_values=_MISSING,
                        skipinitialspace=True,
                        encoding="utf-8-sig",
                    )
            case _:
                raise InputError(f"{path}: cannot tell what '{path.suffix}' is; give .csv, .tsv, .parquet or .npz")
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; check the path") from error
    except ImportError as error:
        raise InputError(f"{path}: reading Parquet needs pyarrow; pip install pyarrow") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8 text; save the table as UTF-8") from error
    except DAMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: not a readable {ending.lstrip('.')} table: {reason[:200]}") from error
    frame.columns = [str(name).strip() for name in frame.columns]
    if frame.shape[0] == 0 or frame.shape[1] == 0:
        raise InputError(f"{path}: the table is empty ({frame.shape[0]} rows, {frame.shape[1]} columns)")
    if (repeated := frame.columns[frame.columns.duplicated()]).size:
        raise InputError(f"{path}: column '{repeated[0]}' occurs twice; rename one")
    return frame


def _read_npz(path: Path) -> pd.DataFrame:
    arrays = read_arrays(path)
    if "format" in arrays and "shape" in arrays:
        arrays = {"x": _dense_from_sparse(path)}
    if "x" not in arrays or arrays["x"].ndim != 2:
        found = ", ".join(f"{name} {array.shape}" for name, array in arrays.items()) or "nothing"
        raise InputError(f"{path}: needs a two-dimensional array 'x' (rows, columns), found {found}")
    x = arrays["x"].astype(np.float64)
    if "mask" in arrays:
        mask = arrays["mask"]
        if mask.shape != x.shape or not np.isin(mask, (0, 1)).all():
            raise InputError(f"{path}: mask must hold 0 and 1 in the shape of x {x.shape}, got shape {mask.shape}")
        if (bad := np.argwhere(mask.astype(bool) & np.isnan(x))).size:
            row, column = bad[0]
            raise InputError(f"{path}: x is NaN at row {row}, column {column} although mask says observed")
        x = np.where(mask.astype(bool), x, np.nan)
    names = [str(name) for name in arrays["feature_names"]] if "feature_names" in arrays else None
    names = names or [f"x{index}" for index in range(x.shape[1])]
    if len(names) != x.shape[1]:
        raise InputError(f"{path}: {len(names)} feature_names for {x.shape[1]} columns of x")
    frame = pd.DataFrame(x, columns=names)
    if "y" in arrays:
        if arrays["y"].shape != (len(x),):
            raise InputError(f"{path}: y must have shape ({len(x)},), got {arrays['y'].shape}")
        frame["y"] = arrays["y"]
    return frame


def read_sparse(path: str | Path) -> Any:
    """Read a matrix that ``scipy.sparse.save_npz`` wrote.

    Raises
    ------
    InputError
        When the file is missing, damaged, or another kind of NPZ.
    """
    from scipy import sparse

    read_arrays(path)
    try:
        matrix: Any = sparse.load_npz(path)
        if matrix.format in {"csr", "csc", "bsr"}:
            # SciPy's compiled loops trust the pointers to rows.
            matrix.check_format(full_check=True)
        return sparse.coo_array(matrix)
    except DAMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: not a sparse matrix written by scipy.sparse.save_npz: {reason}") from error


def _dense_from_sparse(path: Path) -> Float[np.ndarray, "rows columns"]:
    matrix = read_sparse(path)
    rows, columns = cast("tuple[int, int]", matrix.shape)
    if rows * columns > _MAX_DENSE_CELLS:
        raise InputError(f"{path}: {rows} x {columns} is too large for a dense table; give fewer columns")
    dense = np.full((rows, columns), np.nan)
    dense[matrix.coords[0], matrix.coords[1]] = matrix.data
    return dense


def learn_scale(
    x: Float[np.ndarray, "rows inputs"], scale: Scale
) -> tuple[Float[np.ndarray, " inputs"], Float[np.ndarray, " inputs"]]:
    """Find `offset` and `factor` so that ``(x - offset) * factor`` is scaled column by column, NaN left out.

    Parameters
    ----------
    x : (rows, inputs) training rows
    scale : ``minmax`` to [0, 1], ``standard`` to mean 0 and sd 1, ``none`` to leave as it is. Columns that are constant
        are only shifted, those never observed are left alone.

    Examples
    --------
    >>> learn_scale(np.array([[2.0], [np.nan], [6.0]]), "minmax")
    (array([2.]), array([0.25]))
    """
    if scale == "none":
        return np.zeros(x.shape[1]), np.ones(x.shape[1])
    observed = ~np.isnan(x)
    count = np.maximum(observed.sum(0), 1)
    if scale == "minmax":
        offset = np.where(observed, x, np.inf).min(0)
        span = np.where(observed, x, -np.inf).max(0) - offset
    else:
        offset = np.where(observed, x, 0).sum(0) / count
        span = np.sqrt((np.where(observed, x - offset, 0) ** 2).sum(0) / count)
    usable = np.isfinite(span) & (span > 0)
    return np.where(np.isfinite(offset), offset, 0.0), 1.0 / np.where(usable, span, 1.0)


@dataclass(frozen=True)
class Column:
    """A feature column: a number, or a category that becomes one 0/1 input for each of its values."""

    name: str
    categories: tuple[str, ...] | None = None

    @property
    def width(self) -> int:
        """Inputs this column becomes."""
        return 1 if self.categories is None else len(self.categories)


_Scaling = list[Annotated[float, Field(allow_inf_nan=False)]] | None


class _Document(BaseModel):
    """A schema as JSON."""

    columns: list[tuple[str, tuple[str, ...] | None]]
    target: str
    classes: tuple[str, ...] | None
    offset: _Scaling
    factor: _Scaling


@dataclass(frozen=True)
class TableSchema:
    """How a table's columns become numbers; learned from the training file, applied to every later one.

    Parameters
    ----------
    columns : feature columns in order
    target : name of the column to predict
    classes : the target's classes in sorted order, None for regression
    offset, factor : (inputs,) scaling ``(x - offset) * factor``; None until :meth:`fit_scale`

    Examples
    --------
    >>> import pandas as pd
    >>> frame = pd.DataFrame({"age": [31.0, None, 50.0], "ward": ["a", "b", None], "dead": [0, 1, 0]})
    >>> schema = TableSchema.infer(frame, target="dead", task="classification")
    >>> schema.features(frame).tolist()
    [[31.0, 1.0, 0.0], [nan, 0.0, 1.0], [50.0, nan, nan]]
    >>> schema.groups.tolist()
    [0, 1, 1]
    """

    columns: tuple[Column, ...]
    target: str
    classes: tuple[str, ...] | None
    offset: Float[np.ndarray, " inputs"] | None = field(default=None, compare=False)
    factor: Float[np.ndarray, " inputs"] | None = field(default=None, compare=False)

    @classmethod
    def infer(
        cls,
        frame: pd.DataFrame,
        *,
        target: str,
        task: Task = "auto",
        exclude: Sequence[str] = (),
        source: str = "table",
    ) -> TableSchema:
        """Decide for each column of `frame` whether it is a number or a category, and what the target is.

        With ``task="auto"`` a target of text, of booleans, or of at most ten different whole numbers is classified.

        Raises
        ------
        InputError
            Unknown columns, a text in a column of numbers, a column with too many different texts, infinite values,
            a target with a single class or without any value.
        """
        for name in (target, *exclude):
            if name not in frame.columns:
                raise InputError(f"{source}: no column '{name}'; there are: {', '.join(frame.columns[:20])}")
        names = [name for name in frame.columns if name != target and name not in exclude]
        columns = [_infer_column(frame[name], name, source) for name in names]
        columns = [column for column in columns if column.width > 0]
        if not columns:
            raise InputError(f"{source}: no feature column is left besides the target '{target}'")
        known = frame[target].dropna()
        if known.empty:
            raise InputError(f"{source}: the target '{target}' has no value at all")
        numeric = _is_numeric(known)
        if task == "auto":
            few_integers = numeric and known.nunique() <= 10 and bool((known.astype(float) % 1 == 0).all())
            task = "classification" if not numeric or few_integers else "regression"
        if task == "regression":
            if not numeric:
                raise InputError(
                    f"{source}: the target '{target}' is not numeric; choose the task classification, or another target"
                )
            return cls(tuple(columns), target, None)
        classes = tuple(sorted({_label(value) for value in known}, key=_numbers_first))
        if len(classes) < 2:
            raise InputError(
                f"{source}: the target '{target}' has a single class, '{''.join(classes)}'; need at least two"
            )
        return cls(tuple(columns), target, classes)

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names of the inputs; a category's inputs are called ``column=value``."""
        names: list[str] = []
        for column in self.columns:
            names += [column.name] if column.categories is None else [f"{column.name}={c}" for c in column.categories]
        return tuple(names)

    @property
    def groups(self) -> Int64[np.ndarray, " inputs"]:
        """Which column each input comes from: a missing category is one missing feature, not several."""
        return np.repeat(np.arange(len(self.columns)), [column.width for column in self.columns]).astype(np.int64)

    def features(self, frame: pd.DataFrame, source: str = "table") -> Float[np.ndarray, "rows inputs"]:
        """Turn a table into inputs, NaN where missing; a category value never seen in training counts as missing."""
        parts: list[np.ndarray] = []
        for column in self.columns:
            if column.name not in frame.columns:
                raise InputError(f"{source}: no column '{column.name}', which the model was trained on")
            values = frame[column.name]
            if column.categories is None:
                parts.append(_as_numbers(values, column.name, source)[:, None])
            else:
                index = {category: code for code, category in enumerate(column.categories)}
                codes = np.array([-1 if _absent(v) else index.get(_label(v), -1) for v in values])
                block = np.full((len(values), column.width), np.nan)
                block[codes >= 0] = np.eye(column.width)[codes[codes >= 0]]
                parts.append(block)
        x = np.hstack(parts)
        return x if self.offset is None or self.factor is None else (x - self.offset) * self.factor

    def labels(self, frame: pd.DataFrame, source: str = "table") -> Shaped[np.ndarray, " rows"]:
        """Return the target: float64 (regression) or class codes as float64; NaN where it is missing."""
        if self.target not in frame.columns:
            raise InputError(f"{source}: no target column '{self.target}'")
        if self.classes is None:
            return _as_numbers(frame[self.target], self.target, source)
        index = {name: code for code, name in enumerate(self.classes)}
        codes = np.full(len(frame), np.nan)
        for row, value in enumerate(frame[self.target]):
            if not _absent(value):
                if (name := _label(value)) not in index:
                    raise InputError(
                        f"{source}: row {row + 1}: the target '{self.target}' is '{name}', which training never saw;"
                        f" known: {', '.join(self.classes[:20])}"
                    )
                codes[row] = index[name]
        return codes

    def fit_scale(self, x: Float[np.ndarray, "rows inputs"], scale: Scale) -> TableSchema:
        """Return this schema with a scaling learned from the training rows; see :func:`learn_scale`."""
        if scale == "none":
            return self
        offset, factor = learn_scale(x, scale)
        return replace(self, offset=offset, factor=factor)

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON values, for the model's ``config.json``."""
        return {
            "columns": [
                [column.name, None if column.categories is None else [*column.categories]] for column in self.columns
            ],
            "target": self.target,
            "classes": None if self.classes is None else [*self.classes],
            "offset": None if self.offset is None else self.offset.tolist(),
            "factor": None if self.factor is None else self.factor.tolist(),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TableSchema:
        """Rebuild what :meth:`to_json` wrote.

        Raises
        ------
        InputError
            For anything else; the line names the place in the document, and callers put the file in front.
        """
        try:
            found = _Document.model_validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"]) or "the document"
            raise InputError(f"no schema of a table: {place}: {first['msg']}") from None
        made = cls(
            tuple(Column(name, values) for name, values in found.columns),
            found.target,
            found.classes,
            None if found.offset is None else np.asarray(found.offset, dtype=np.float64),
            None if found.factor is None else np.asarray(found.factor, dtype=np.float64),
        )
        for name, scale in (("offset", made.offset), ("factor", made.factor)):
            if scale is not None and len(scale) != len(made.groups):
                raise InputError(f"no schema of a table: {name} has {len(scale)} numbers for {len(made.groups)} inputs")
        return made


def numeric_columns(
    frame: pd.DataFrame, names: Sequence[str], source: str = "table"
) -> list[Float[np.ndarray, " rows"]]:
    """Return columns of a table as numbers, NaN where missing.

    Raises
    ------
    InputError
        For a column that is not there, or a cell that is not a number.
    """
    for name in names:
        if name not in frame.columns:
            raise InputError(f"{source}: no column '{name}'; there are: {', '.join(frame.columns[:20])}")
    return [_as_numbers(frame[name], name, source) for name in names]


def _infer_column(values: pd.Series[Any], name: str, source: str) -> Column:
    known = values.dropna()
    if known.empty:
        return Column(name, ())
    if _is_numeric(known):
        _as_numbers(values, name, source)
        return Column(name)
    numbers = cast("pd.Series[float]", pd.to_numeric(known, errors="coerce"))
    if bool(numbers.notna().mean() >= 0.9):
        _as_numbers(values, name, source)
    labels = {_label(value) for value in known}
    if len(labels) > _MAX_CATEGORIES:
        raise InputError(
            f"{source}: column '{name}' has {len(labels)} different texts (at most {_MAX_CATEGORIES} make a category);"
            f" leave it out with --exclude {name}"
        )
    return Column(name, tuple(sorted(labels)))


def _is_numeric(values: pd.Series[Any]) -> bool:
    return pd.api.types.is_numeric_dtype(values.dtype) and not pd.api.types.is_bool_dtype(values.dtype)


def _as_numbers(values: pd.Series[Any], name: str, source: str) -> Float[np.ndarray, " rows"]:
    numbers = cast("pd.Series[float]", pd.to_numeric(values, errors="coerce"))
    wrong = np.flatnonzero((numbers.isna() & values.notna()).to_numpy())
    if wrong.size:
        row = int(wrong[0])
        raise InputError(
            f"{source}: row {row + 1}, column '{name}': '{values.iloc[row]}' is not a number; correct it or"
            " leave it empty"
        )
    array = numbers.to_numpy(dtype=np.float64, na_value=np.nan)
    infinite = np.flatnonzero(np.isinf(array))
    if infinite.size:
        raise InputError(
            f"{source}: row {infinite[0] + 1}, column '{name}' is infinite; leave it empty if it is missing"
        )
    return array


def _absent(value: object) -> bool:
    return value is None or value != value or str(value) == "<NA>"


def _label(value: object) -> str:
    # 1, 1.0 and "1" are one class: an integer column turns into floats when a cell of it is missing.
    text = str(value).strip()
    return text.removesuffix(".0")


def _numbers_first(text: str) -> tuple[int, float, str]:
    try:
        return 0, float(text), text
    except ValueError:
        return 1, 0.0, text
