"""Users' own tables and models: CSV and NPZ files, ``module:factory`` names, and the tasks that come of them."""

from __future__ import annotations

import csv
import inspect
import io
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypedDict, cast

import numpy as np
import torch
from jaxtyping import Float, Shaped
from safetensors import SafetensorError
from torch import Tensor, nn

from blockdiag_opt.tasks import Metric, Task
from shared_core.arrays import open_bytes, read_arrays
from shared_core.device import seeded
from shared_core.errors import DAMAGE, InputError, no_such
from shared_core.objects import load_function, one_line

__all__ = ["Schema", "Table", "build_model", "read_shapes", "read_table", "table_task"]

Kind = Literal["regression", "classification", "reconstruction"]
_MISSING = {"", "?", "na", "n/a", "nan", "null", "none"}
_MOST_CLASSES = 100


@dataclass(frozen=True)
class Table:
    """Numbers in named columns.

    Parameters
    ----------
    source : the file
    names : column names
    values : (rows, columns)
    shape : shape of a row's features, where the file had images; else None
    """

    source: str
    names: tuple[str, ...]
    values: Float[np.ndarray, "rows columns"]
    shape: tuple[int, ...] | None = None

    def column(self, name: str) -> Float[np.ndarray, " rows"]:
        """Return a column by name.

        Parameters
        ----------
        name : a name of the table
        """
        if name not in self.names:
            raise no_such("column", name, self.names, where=str(self.source))
        return self.values[:, self.names.index(name)]


def read_table(path: str | Path) -> Table:
    """Read a CSV or TSV file with a header (also gzipped), or an NPZ with ``x`` and perhaps ``y``.

    Parameters
    ----------
    path : the file; an NPZ's columns are called x0, x1, ..., and y

    Returns
    -------
    The table.

    Raises
    ------
    InputError
        One line naming the file, the row and the column that cannot be used.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a directory; give a CSV or NPZ file")
    endings = [suffix.lower() for suffix in path.suffixes]
    try:
        if endings[-1:] == [".npz"]:
            return _read_npz(path)
        if ".csv" in endings[-2:] or ".tsv" in endings[-2:]:
            with io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", newline="") as file:
                return _read_rows(path, file, "\t" if ".tsv" in endings else ",")
    except InputError:
        raise
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8 text; save the table as UTF-8") from error
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; check the path") from error
    except DAMAGE as error:
        raise InputError(f"{path}: not a readable {endings[-1] if endings else 'table'}: {one_line(error)}") from error
    raise InputError(f"{path}: cannot tell what '{path.suffix}' is; give .csv, .tsv or .npz")


def _read_rows(path: Path, lines: Any, separator: str) -> Table:
    rows = csv.reader(lines, delimiter=separator)
    names = tuple(name.strip() for name in next(rows, []))
    if not names:
        raise InputError(f"{path}: the file is empty; it needs a line of column names and rows of numbers")
    if len(set(names)) < len(names):
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise InputError(f"{path}: column '{twice}' occurs twice; rename one")
    values: list[list[float]] = []
    for number, row in enumerate(rows, start=2):
        if not row:
            continue
        if len(row) != len(names):
            raise InputError(f"{path}: line {number} has {len(row)} values for {len(names)} columns")
        values.append([_number(cell, path, number, name) for cell, name in zip(row, names, strict=True)])
    if not values:
        raise InputError(f"{path}: no rows below the column names")
    return Table(str(path), names, np.array(values, dtype=np.float64))


def _number(cell: str, path: Path, line: int, name: str) -> float:
    text = cell.strip()
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isfinite(value):
        return value
    if text.lower() in _MISSING:
        raise InputError(f"{path}: line {line}, column '{name}': the value is missing; fill it in or leave the row out")
    raise InputError(
        f"{path}: line {line}, column '{name}': '{text}' is not a finite number; encode categories as numbers, or leave"
        " the column out with --exclude"
    )


def _read_npz(path: Path) -> Table:
    arrays = read_arrays(path)
    x = arrays.get("x")
    if x is None or x.ndim < 2 or not len(x) or x.dtype.kind not in "fiub":
        found = ", ".join(f"{name} {array.shape}" for name, array in arrays.items()) or "nothing"
        raise InputError(f"{path}: needs a numeric array 'x' (rows, ...), found {found}")
    shape = tuple(int(size) for size in x.shape[1:])
    flat = x.reshape(len(x), -1).astype(np.float64)
    names = [f"x{place}" for place in range(flat.shape[1])]
    if "y" in arrays:
        y = arrays["y"]
        if y.shape != (len(x),) or y.dtype.kind not in "fiub":
            raise InputError(f"{path}: y must be numbers of shape ({len(x)},), got {y.shape} of {y.dtype}")
        flat, names = np.column_stack([flat, y.astype(np.float64)]), [*names, "y"]
    if not np.isfinite(flat).all():
        row, column = np.argwhere(~np.isfinite(flat))[0]
        raise InputError(
            f"{path}: row {row}, column '{names[column]}' is {flat[row, column]}; only finite numbers train"
        )
    return Table(str(path), tuple(names), flat, shape if len(shape) > 1 else None)


@dataclass(frozen=True)
class Schema:
    """What a trained model expects of a table, learned from the training rows.

    Parameters
    ----------
    features : column names in order
    target : column to predict; None for reconstruction
    kind : regression, classification or reconstruction
    classes : values of the target in order (classification)
    offset, factor : features enter as ``(x - offset) * factor``
    target_offset, target_factor : the same of a regression target
    shape : shape a row is given to the model in, or None for a flat one
    """

    features: tuple[str, ...]
    target: str | None
    kind: Kind
    classes: tuple[float, ...]
    offset: tuple[float, ...]
    factor: tuple[float, ...]
    target_offset: float = 0.0
    target_factor: float = 1.0
    shape: tuple[int, ...] | None = None

    @property
    def outputs(self) -> int:
        """Numbers the model must return for a row."""
        return {"regression": 1, "classification": len(self.classes), "reconstruction": len(self.features)}[self.kind]

    def to_dict(self) -> dict[str, Any]:
        """Return a tree that ``shared_core.runs.save_tree`` takes; ``Schema(**tree)`` undoes it."""
        return asdict(self)

    def inputs(self, table: Table) -> Tensor:
        """Return a table's features as the model takes them.

        Parameters
        ----------
        table : has all feature columns, in any order

        Returns
        -------
        float32 (rows, features) or (rows, *shape).
        """
        x = np.column_stack([table.column(name) for name in self.features])
        scaled = torch.from_numpy((x - np.asarray(self.offset)) * np.asarray(self.factor)).float()
        return scaled if self.shape is None else scaled.view(-1, *self.shape)

    def targets(self, table: Table) -> Tensor:
        """Return a table's targets: int64 classes (rows,), scaled float32 (rows, 1), or the inputs themselves.

        Parameters
        ----------
        table : has the target column
        """
        if self.kind == "reconstruction":
            return self.inputs(table).flatten(1)
        y = table.column(cast("str", self.target))
        if self.kind == "regression":
            return torch.from_numpy((y - self.target_offset) * self.target_factor).float()[:, None]
        known = np.asarray(self.classes)
        codes = np.searchsorted(known, y).clip(max=len(known) - 1)
        if (known[codes] != y).any():
            row = int(np.argmax(known[codes] != y))
            raise InputError(
                f"{table.source}: row {row + 1}: class {y[row]:g} of '{self.target}' was not in the training data"
                f" ({', '.join(f'{value:g}' for value in self.classes[:10])})"
            )
        return torch.from_numpy(codes)

    @classmethod
    def learn(
        cls,
        table: Table,
        rows: Shaped[np.ndarray, " some"],
        target: str | None,
        *,
        exclude: tuple[str, ...] = (),
        kind: Kind | Literal["auto"] = "auto",
        scale: bool = True,
    ) -> Schema:
        """Learn from a table what a model of it needs.

        Parameters
        ----------
        table : all rows
        rows : indices of the training rows, which scaling is learned from
        target : column to predict, None to reconstruct the features
        exclude : columns to leave out
        kind : "auto" takes a target of few whole numbers for classes
        scale : standardise features and a regression target
        """
        for name in (*exclude, *((target,) if target else ())):
            table.column(name)
        features = tuple(name for name in table.names if name != target and name not in exclude)
        if not features:
            raise InputError(f"{table.source}: no column is left to learn from")
        x = np.column_stack([table.column(name) for name in features])[rows]
        if not scale:
            offset, factor = np.zeros(len(features)), np.ones(len(features))
        else:
            spread = x.std(0)
            offset, factor = x.mean(0), 1 / np.where(spread > 0, spread, 1.0)
        shape = table.shape if table.shape is not None and math.prod(table.shape) == len(features) else None
        found = cls(features, target, "reconstruction", (), tuple(offset.tolist()), tuple(factor.tolist()), shape=shape)
        if target is None:
            return found
        y = table.column(target)
        values = np.unique(y)
        if kind == "auto":
            few = len(values) <= min(_MOST_CLASSES, max(2, len(y) // 5))
            kind = "classification" if few and (values == np.round(values)).all() else "regression"
        if kind == "classification":
            if len(values) < 2:
                raise InputError(
                    f"{table.source}: target '{target}' has the single value {values[0]:g}; nothing to learn"
                )
            return replace(found, kind="classification", classes=tuple(values.tolist()))
        spread = float(y[rows].std()) if scale else 1.0
        if spread == 0:
            raise InputError(f"{table.source}: target '{target}' is constant; nothing to learn")
        mean = float(y[rows].mean()) if scale else 0.0
        return replace(found, kind="regression", target_offset=mean, target_factor=1 / spread)


def build_model(name: str, inputs: int, outputs: int, seed: int, shape: tuple[int, ...] | None = None) -> nn.Module:
    """Build a model: ``mlp:64,32``, ``linear``, ``cnn``, ``ae:32,8``, or a user's ``package.module:function``.

    Parameters
    ----------
    name : the model; a user's function, in a module or in a file (``file.py:function``), is called with those of
        ``inputs``, ``outputs`` and ``shape`` that it has as parameters
    inputs, outputs : numbers of a row, and of its prediction
    seed : of the initial weights
    shape : shape of a row, for convolutions

    Returns
    -------
    The module, in training mode.

    Examples
    --------
    >>> build_model("mlp:4", 3, 1, seed=0)
    Sequential(
      (0): Linear(in_features=3, out_features=4, bias=True)
      (1): Tanh()
      (2): Linear(in_features=4, out_features=1, bias=True)
    )
    """
    kind, _, tail = name.partition(":")
    with seeded(seed):
        if kind in {"mlp", "linear", "cnn", "ae"}:
            try:
                sizes = [int(size) for size in tail.split(",") if size] or ([64, 32] if kind == "mlp" else [32])
            except ValueError:
                raise InputError(f"model '{name}': layer sizes are whole numbers, as in {kind}:64,32") from None
            if min(sizes) < 1:
                raise InputError(f"model '{name}': a layer has at least one unit")
            return _own_model(kind, inputs, outputs, sizes, shape)
        model = _call(load_function(name), {"inputs": inputs, "outputs": outputs, "shape": shape}, name)
    if not isinstance(model, nn.Module):
        raise InputError(f"{name} returned a {type(model).__name__}; it must return a torch.nn.Module")
    return model.train()


def _call(factory: Callable[..., Any], known: Mapping[str, Any], name: str) -> Any:
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        parameters = {}
    if isinstance(factory, type) or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        parameters = {key: value for key, value in parameters.items() if key in known}
    chosen = {key: value for key, value in known.items() if key in parameters}
    try:
        return factory(**chosen)
    except TypeError as error:
        raise InputError(
            f"{name}{tuple(chosen)} fails: {one_line(error)}; it is called with those of {', '.join(known)} that it has"
        ) from error


def _own_model(kind: str, inputs: int, outputs: int, sizes: list[int], shape: tuple[int, ...] | None) -> nn.Module:
    layers: list[nn.Module] = []
    if kind == "linear":
        return nn.Linear(inputs, outputs)
    if kind == "cnn":
        if shape is None or len(shape) not in {2, 3} or min(shape[-2:]) < 4:
            raise InputError("model 'cnn' needs images: an NPZ whose x has shape (rows, height, width), 4 x 4 at least")
        channels = 1 if len(shape) == 2 else shape[0]
        first = sizes[0]
        layers += [nn.Unflatten(1, (1, shape[0]))] if len(shape) == 2 else []
        for before, after in ((channels, first), (first, 2 * first)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2 * first * (shape[-2] // 4) * (shape[-1] // 4), outputs))
    widths = [inputs, *sizes, *(sizes[-2::-1] if kind == "ae" else [])]
    if shape is not None:
        layers.append(nn.Flatten())
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], outputs))


class Split(TypedDict):
    """Rows of a table: indices of those to train on, to choose by, and to report on."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def split_rows(rows: int, seed: int, *, validation: float = 0.1, test: float = 0.2) -> Split:
    """Split rows at random.

    Parameters
    ----------
    rows : how many there are
    seed : of the split
    validation, test : shares of the rows
    """
    order = np.random.default_rng(seed).permutation(rows)
    first, second = round(rows * test), round(rows * (test + validation))
    if second >= rows:
        raise InputError(f"{rows} rows leave none to train on; give more rows or smaller shares")
    return {
        "train": np.sort(order[second:]),
        "validation": np.sort(order[first:second]),
        "test": np.sort(order[:first]),
    }


def loss_of(kind: Kind, prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean loss of a batch: cross-entropy, or squared error.

    Parameters
    ----------
    kind : what is predicted
    prediction : (batch, outputs)
    target : as :meth:`Schema.targets` makes it
    """
    if kind == "classification":
        return nn.functional.cross_entropy(prediction, target)
    return nn.functional.mse_loss(prediction.reshape(target.shape), target)


def metrics_of(schema: Schema, model: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    """Measure a model.

    Parameters
    ----------
    schema : of its data
    model : in any mode
    x, y : as the schema makes them

    Returns
    -------
    ``accuracy`` (0..1) and ``loss`` in nats (classification), ``rmse`` in the target's own unit (regression), or
    ``squared error`` a row (reconstruction).
    """
    mode = model.training
    model.eval()
    try:
        with torch.no_grad():
            prediction = torch.cat([model(part) for part in x.split(1024)]).reshape(len(y), -1)
    finally:
        model.train(mode)
    if schema.kind == "classification":
        return {
            "accuracy": float((prediction.argmax(1) == y).double().mean()),
            "loss": float(nn.functional.cross_entropy(prediction, y)),
        }
    if schema.kind == "regression":
        return {"rmse": float((prediction - y).double().square().mean().sqrt() / schema.target_factor)}
    return {"squared error": float((prediction - y).double().square().sum(1).mean())}


def metric_named(name: str) -> Metric:
    """Say in which unit tables show what :func:`metrics_of` measures, and which direction is better.

    Parameters
    ----------
    name : such as ``test accuracy``
    """
    if name.endswith("accuracy"):
        return Metric(name, "%", "higher")
    return Metric(name, "nats" if name.endswith("loss") else "1")


def in_units(found: Mapping[str, float]) -> dict[str, float]:
    """Return what :func:`metrics_of` measured in the units of :func:`metric_named`: accuracies in percent.

    Parameters
    ----------
    found : name -> value

    Examples
    --------
    >>> in_units({"test accuracy": 0.5, "test loss": 0.7})
    {'test accuracy': 50.0, 'test loss': 0.7}
    """
    return {name: 100 * value if metric_named(name).unit == "%" else value for name, value in found.items()}


def table_task(
    path: str | Path,
    target: str | None,
    *,
    model: str = "mlp:64,32",
    exclude: tuple[str, ...] = (),
    kind: Kind | Literal["auto"] = "auto",
    scale: bool = True,
    steps: int = 500,
    batch_size: int = 64,
) -> Task:
    """Make a task for the comparison from a user's table and model.

    A fifth of the rows is test data, a tenth chooses learning rates; both are drawn with a fixed seed.

    Parameters
    ----------
    path : CSV, TSV or NPZ
    target : column to predict, None to reconstruct
    model : as in :func:`build_model`
    exclude, kind, scale : as in :meth:`Schema.learn`
    steps : training steps
    batch_size : rows in a step

    Returns
    -------
    The task.
    """
    table = read_table(path)
    parts = split_rows(len(table.values), 0)
    schema = Schema.learn(table, parts["train"], target, exclude=exclude, kind=kind, scale=scale)
    x, y = schema.inputs(table), schema.targets(table)
    train, validation, test = (torch.from_numpy(parts[name]) for name in ("train", "validation", "test"))

    def build(seed: int) -> nn.Module:
        return build_model(model, len(schema.features), schema.outputs, seed, schema.shape)

    def batches(seed: int, count: int) -> Iterator[tuple[Tensor, ...]]:
        random = torch.Generator().manual_seed(seed)
        waiting = torch.empty(0, dtype=torch.int64)
        for _ in range(count):
            while len(waiting) < min(batch_size, len(train)):
                waiting = torch.cat([waiting, train[torch.randperm(len(train), generator=random)]])
            rows, waiting = waiting[:batch_size], waiting[batch_size:]
            yield x[rows], y[rows]

    def loss(network: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return loss_of(schema.kind, network(batch[0]).flatten(1), batch[1])

    def evaluate(network: nn.Module) -> dict[str, float]:
        found = {f"test {name}": value for name, value in metrics_of(schema, network, x[test], y[test]).items()}
        chosen = metrics_of(schema, network, x[validation], y[validation])
        return in_units(found | {f"validation {name}": value for name, value in chosen.items()})

    probe = build(0)
    try:
        with torch.no_grad():
            loss(probe, (x[train[:2]], y[train[:2]]))
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        detail = str(error).splitlines()[0]
        raise InputError(
            f"model '{model}' does not take rows of {tuple(x.shape[1:])} to {schema.outputs} outputs: {detail}"
        ) from error
    names = {"classification": ("accuracy", "loss"), "regression": ("rmse",), "reconstruction": ("squared error",)}
    metrics = tuple(metric_named(f"{part} {name}") for part in ("test", "validation") for name in names[schema.kind])
    return Task(
        name=Path(path).name.split(".")[0],
        description=f"{model} on {Path(path).name}, {schema.kind}, {len(train)} rows",
        build=build,
        batches=batches,
        loss=loss,
        evaluate=evaluate,
        metrics=metrics,
        steps=steps,
        batch_size=batch_size,
        tuned_by=f"validation {names[schema.kind][-1]}",
    )


def read_shapes(path: str | Path) -> nn.Module:
    """Make a module with the tensors that a safetensors file names, so that it can be planned for; values stay away.

    Parameters
    ----------
    path : a model's weights

    Returns
    -------
    A module on the meta device with the same parameter names and shapes.
    """
    from safetensors import safe_open

    root = nn.Module()
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                shape = file.get_slice(name).get_shape()
                owner = root
                *parents, leaf = name.split(".")
                for part in parents:
                    if not hasattr(owner, part):
                        owner.add_module(part, nn.Module())
                    owner = cast("nn.Module", getattr(owner, part))
                owner.register_parameter(leaf, nn.Parameter(torch.empty(shape, device="meta")))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except (SafetensorError, KeyError, ValueError) as error:
        raise InputError(f"{path} is not a safetensors file, or it is damaged ({error})") from error
    return root
