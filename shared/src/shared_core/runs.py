"""A run folder: what a command was asked, what it measured, and everything needed to go on after an interruption.

A folder holds ``config.json``, ``environment.json``, ``metrics.jsonl`` (a line an epoch or round), ``summary.json``
(the one schema, :class:`Summary`), ``*.safetensors`` and ``*.png``. Every file appears under its name only when it is
complete. While a run is unfinished, ``checkpoint.safetensors`` and ``cells.jsonl`` hold what it has done so far.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, TypeAdapter, ValidationError

from shared_core.errors import DAMAGE, InputError
from shared_core.workers import Workers

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Claim",
    "Noted",
    "Result",
    "Run",
    "Summary",
    "atomic_path",
    "interval",
    "load_tree",
    "read_document",
    "read_lines",
    "save_tree",
    "summarize",
    "write_json",
]

_Value = TypeVar("_Value")

Noted = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
"""A number of ``metrics.jsonl``, to be read by `read_lines`: what is not finite is noted as null there, and is NaN."""

_CHECKPOINT, _CELLS, _METRICS, _SUMMARY = "checkpoint.safetensors", "cells.jsonl", "metrics.jsonl", "summary.json"


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Result(_Strict):
    """One measured quantity of one method on one data set: the mean over seeds or splits with its 95 % interval."""

    dataset: str
    method: str
    metric: str
    unit: str = Field(description='unit of the metric, "1" when it has none')
    better: Literal["lower", "higher"]
    mean: float
    low: float | None = Field(description="lower end of the 95 % interval; null when n is 1")
    high: float | None = Field(description="upper end of the 95 % interval; null when n is 1")
    n: int = Field(ge=1, description="seeds or splits behind the mean")
    seconds: float = Field(ge=0, description="wall time of all n repetitions")


class Claim(_Strict):
    """A claim about the method, and whether this run bears it out."""

    text: str
    source: str = Field(description="where the claim comes from: paper section, specification, or this project")
    holds: bool
    value: float | None = Field(description="what was measured")
    threshold: float | None = Field(description="what it was held against")


class Summary(_Strict):
    """What every command prints with ``--json`` and leaves in ``summary.json``."""

    package: str
    version: str
    command: str
    config: dict[str, JsonValue]
    seed: int
    device: str
    threads: int = Field(ge=1)
    wall_seconds: float = Field(ge=0)
    results: list[Result] = []
    claims: list[Claim] = []
    artifacts: list[str] = Field(default=[], description="paths relative to the run folder")


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float | None, float | None]:
    """Mean and Student-t confidence interval of independent repetitions.

    Parameters
    ----------
    values : sequence of n finite numbers
    level : confidence level in (0, 1)

    Returns
    -------
    (mean, low, high); low and high are None when n is 1, where no interval exists.

    Examples
    --------
    >>> mean, low, high = interval([1.0, 2.0, 3.0])
    >>> round(mean, 3), round(low, 3), round(high, 3)
    (2.0, -0.484, 4.484)
    """
    n = len(values)
    if n == 0:
        raise InputError("interval needs at least one value, got none")
    mean = math.fsum(values) / n
    if n == 1:
        return mean, None, None
    from scipy.stats import t

    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = float(t.ppf(0.5 + level / 2, n - 1)) * deviation / math.sqrt(n)
    return mean, mean - half, mean + half


def summarize(
    values: Sequence[float],
    *,
    dataset: str,
    method: str,
    metric: str,
    better: Literal["lower", "higher"],
    unit: str = "1",
    seconds: float = 0.0,
) -> Result:
    """Make a :class:`Result` of the values a metric took over seeds or splits."""
    mean, low, high = interval(values)
    return Result(
        dataset=dataset,
        method=method,
        metric=metric,
        unit=unit,
        better=better,
        mean=mean,
        low=low,
        high=high,
        n=len(values),
        seconds=seconds,
    )


@contextmanager
def atomic_path(path: str | Path) -> Generator[Path]:
    """Give a temporary path beside `path`; on success it is renamed to `path`, on failure it is removed.

    Examples
    --------
    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "note.txt"
    >>> with atomic_path(target) as temporary:
    ...     _ = temporary.write_text("done")
    >>> target.read_text()
    'done'
    """
    path = Path(path)
    # The suffix stays last: writers such as matplotlib choose the format by it.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; choose a folder you can write to") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_json(path: str | Path, value: object) -> None:
    """Write `value` as indented JSON, atomically; NaN and infinities are refused because JSON has none."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_tree(path: str | Path, tree: object) -> None:
    """Write nested dicts, lists and tuples of tensors, arrays and plain values to one safetensors file, atomically.

    Dict keys may be strings or integers, so optimizer and generator states go in as they are. No pickle is involved.

    Examples
    --------
    >>> import tempfile, torch
    >>> file = Path(tempfile.mkdtemp()) / "state.safetensors"
    >>> save_tree(file, {"epoch": 3, "weights": [torch.ones(2)], 7: None})
    >>> load_tree(file)
    {'epoch': 3, 'weights': [tensor([1., 1.])], 7: None}
    """
    import numpy as np
    import torch
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}

    def store(tensor: Tensor) -> str:
        name = str(len(tensors))
        tensors[name] = tensor.detach().cpu().contiguous().clone()
        return name

    def encode(node: object) -> list[Any]:
        match node:
            case torch.Tensor():
                return ["tensor", store(node)]
            case np.ndarray():
                return ["array", store(torch.from_numpy(np.ascontiguousarray(node)))]
            case dict():
                items = cast("dict[object, object]", node)
                if bad := [key for key in items if not isinstance(key, str | int)]:
                    raise TypeError(f"a saved dict has string or integer keys, got {bad[0]!r}")
                return ["dict", [[key, encode(value)] for key, value in items.items()]]
            case list() | tuple():
                return [type(node).__name__, [encode(value) for value in cast("Sequence[object]", node)]]
            case None | bool() | int() | float() | str():
                return ["value", node]
            case np.generic():
                return ["value", node.item()]
            case _:
                raise TypeError(f"cannot save a {type(node).__name__}; use tensors, arrays, dicts, lists, plain values")

    structure = json.dumps(encode(tree))
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"tree": structure})


def load_tree(path: str | Path) -> Any:
    """Read what :func:`save_tree` wrote; tensors come back on the CPU.

    Raises
    ------
    InputError
        When the file is missing, truncated or not one of ours.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    try:
        with safe_open(path, framework="pt") as file:
            structure = cast("dict[str, str]", file.metadata() or {})["tree"]
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

        def decode(node: list[Any]) -> object:
            kind, content = node
            match kind:
                case "tensor":
                    return tensors[content]
                case "array":
                    return tensors[content].numpy()
                case "dict":
                    return {key: decode(value) for key, value in content}
                case "list":
                    return [decode(value) for value in content]
                case "tuple":
                    return tuple(decode(value) for value in content)
                case "value":
                    return content
                case _:
                    raise ValueError(f"it holds a {str(kind)[:40]}")

        return decode(json.loads(structure))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except (SafetensorError, *DAMAGE) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{path} is not a saved state, or it is damaged ({reason}); give another file") from error


class Run:
    """A run folder that a command writes into and can be resumed from.

    Parameters
    ----------
    folder : where everything goes; made if absent
    package, version, command : who writes
    config : the command's configuration as plain JSON values; a resumed run must have the same
    seed, device : recorded in the summary
    resume : continue an interrupted run in `folder`; False starts over
    overwrite : allow starting over where an interrupted run left a checkpoint
    writes : False on all but the first process of a distributed run, which then only reads
    workers : who does what :meth:`spread` is given; None does nothing ahead

    Raises
    ------
    InputError
        When the folder cannot be written, an interrupted run would be lost, or the configuration differs.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        package: str,
        version: str,
        command: str,
        config: Mapping[str, JsonValue],
        seed: int = 0,
        device: str = "cpu",
        resume: bool = False,
        overwrite: bool = False,
        writes: bool = True,
        workers: Workers | None = None,
    ) -> None:
        self.folder = Path(folder)
        self._workers = workers
        self._head = {"package": package, "version": version, "command": command, "config": dict(config)}
        self._head |= {"seed": seed, "device": device}
        self._writes = writes
        # What the other processes of a distributed run write goes nowhere.
        self._scratch = None if writes else tempfile.TemporaryDirectory(prefix="shared-core-")
        self._artifacts: list[str] = []
        self._metric_lines = 0
        self._started = time.perf_counter()
        self._earlier_seconds = 0.0
        self._cells: dict[str, Any] = {}
        if resume:
            self._check_same_config(config)
            cells = _read_lines(self.folder / _CELLS)
            self._cells = {
                cell["key"]: cell["value"] for cell in cells if isinstance(cell.get("key"), str) and "value" in cell
            }
        elif writes:
            self._start_over(overwrite)
        if writes:
            write_json(self.folder / "config.json", {"package": package, "command": command, "config": dict(config)})
            write_json(self.folder / "environment.json", _environment(seed, device))

    @staticmethod
    def stored_config(folder: str | Path, *, package: str, command: str) -> dict[str, JsonValue]:
        """Read the configuration an interrupted run was started with."""
        path = Path(folder) / "config.json"
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            owner, config = (str(stored["package"]), str(stored["command"])), dict(stored["config"])
        except OSError as error:
            raise InputError(f"nothing to resume in {folder}: {path.name}: {error.strerror or error}") from error
        except DAMAGE as error:
            raise InputError(f"{path} is not a run's configuration ({error}); start without --resume") from error
        if owner != (package, command):
            raise InputError(f"{folder} holds a run of '{' '.join(owner)}', not of '{package} {command}'")
        return config

    def _check_same_config(self, config: Mapping[str, JsonValue]) -> None:
        stored = self.stored_config(self.folder, package=str(self._head["package"]), command=str(self._head["command"]))
        now = json.loads(json.dumps(dict(config)))
        for key in {**stored, **now}:
            if stored.get(key) != now.get(key):
                raise InputError(
                    f"cannot resume {self.folder}: it was started with {key} = {stored.get(key)!r}, now it is"
                    f" {now.get(key)!r}; give the same value or another --out"
                )

    def _start_over(self, overwrite: bool) -> None:
        if self.interrupted(self.folder) and not overwrite:
            raise InputError(
                f"{self.folder} holds an interrupted run; continue it with --resume, discard it with --overwrite,"
                " or choose another --out"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in (_SUMMARY, _CHECKPOINT, _CELLS, _METRICS):
                (self.folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise InputError(
                f"cannot write to {self.folder}: {error.strerror or error}; choose another folder with --out"
            ) from error

    @staticmethod
    def interrupted(folder: str | Path) -> bool:
        """Whether `folder` holds work of a run that did not come to its end."""
        folder = Path(folder)
        try:
            started = any((folder / name).exists() for name in (_CHECKPOINT, _CELLS))
            return started and not (folder / _SUMMARY).exists()
        except OSError:
            return False

    def artifact(self, name: str) -> Path:
        """Register a file of this run (a path relative to the folder) and return where to write it."""
        if name not in self._artifacts:
            self._artifacts.append(name)
        return (self.folder if self._scratch is None else Path(self._scratch.name)) / name

    def log(self, **metrics: float | str | None) -> None:
        """Append one line to ``metrics.jsonl``; a number that is not finite is stored as null."""
        self._metric_lines += 1
        if self._writes:
            line = {key: _finite(value) for key, value in metrics.items()}
            _append_line(self.folder / _METRICS, line)

    def save_checkpoint(self, state: object) -> None:
        """Replace the checkpoint by `state`, a tree as :func:`save_tree` takes it."""
        if self._writes:
            seconds = self._earlier_seconds + time.perf_counter() - self._started
            tree = {"state": state, "metric_lines": self._metric_lines, "seconds": seconds}
            save_tree(self.folder / _CHECKPOINT, tree)

    def load_checkpoint(self) -> Any:
        """Return the last checkpoint's state, or None; lines logged after it are dropped, to be logged again."""
        path = self.folder / _CHECKPOINT
        tree: dict[str, Any] = {"state": None, "metric_lines": 0, "seconds": 0.0}
        if path.exists():
            found = load_tree(path)
            if not (
                isinstance(found, dict) and isinstance(found.get("metric_lines"), int) and found.keys() == tree.keys()
            ):
                raise InputError(f"{path} is not a checkpoint of a run; start over with --overwrite")
            tree = found
        self._metric_lines, self._earlier_seconds = tree["metric_lines"], float(tree["seconds"])
        if self._writes and (self.folder / _METRICS).exists():
            kept = _read_lines(self.folder / _METRICS)[: self._metric_lines]
            with atomic_path(self.folder / _METRICS) as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        return tree["state"]

    def __getstate__(self) -> dict[str, Any]:
        """Give another process all that is known, but nothing to write with."""
        return self.__dict__ | {"_writes": False, "_scratch": None, "_workers": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Write to a folder that goes away."""
        self.__dict__ |= state
        self._scratch = tempfile.TemporaryDirectory(prefix="shared-core-")

    @property
    def spreads(self) -> bool:
        """Whether :meth:`spread` has somebody to give work to."""
        return self._workers is not None and self._workers.spreads

    def spread(self, work: Mapping[str, Callable[[], Any]], told: Callable[[str], None] = lambda _: None) -> None:
        """Do what a loop of :meth:`once` will ask for, spread over the run's workers; without workers, do nothing.

        Each value is stored as it comes, so an interrupted run loses what was under way and nothing else. Functions
        run in other processes: what they do besides returning a value is lost, and what they look up by :meth:`once`
        must have been done before.

        Parameters
        ----------
        work : functions by key, as :meth:`once` takes them; those whose value is stored are not called
        told : called with the key of each piece that is done, in the order in which they end
        """
        if self._workers is None or not self.spreads:
            return
        missing = {key: compute for key, compute in work.items() if key not in self._cells}
        for key, value in self._workers.each(missing) if missing else ():
            self._store(key, value)
            told(key)

    def spread_parts(
        self, parts: Mapping[str, Callable[[Run], object]], told: Callable[[str], None] = lambda _: None
    ) -> None:
        """Like :meth:`spread`, for pieces of which many share something costly that is not stored, such as a network.

        A part makes what its pieces share, and asks the run it is given for each piece by :meth:`once`, as a loop
        without workers does; all these values are stored. A part whose pieces are stored already is to make nothing.

        Parameters
        ----------
        parts : functions of a run by name; each is called once, in one process
        told : called with the name of each part that is done, in the order in which they end
        """
        if self._workers is None or not self.spreads or not parts:
            return
        work = {name: partial(_new_cells, self, part) for name, part in parts.items()}
        for name, cells in self._workers.each(work):
            for key, value in cells.items():
                if key not in self._cells:
                    self._store(key, value)
            told(name)

    def once(self, key: str, compute: Callable[[], _Value]) -> _Value:
        """Return the stored value of this piece of work, or compute and store it.

        An interrupted comparison thereby repeats only the piece it was in. The value must be JSON: what comes back
        after a resume is what JSON makes of it (tuples become lists).
        """
        if key not in self._cells:
            self._store(key, compute())
        return cast("_Value", self._cells[key])

    def each(
        self, work: Mapping[str, Callable[[], _Value]], told: Callable[[str, _Value], None] | None = None
    ) -> dict[str, _Value]:
        """Return the values of pieces of work that do not need each other: stored, or computed as workers there are.

        Parameters
        ----------
        work : functions by key, as :meth:`spread` and :meth:`once` take them
        told : called with the key and the value of each piece as soon as it is there, once

        Returns
        -------
        The values by key, in the order of `work`.
        """

        def tell(key: str) -> None:
            if told is not None:
                told(key, cast("_Value", self._cells[key]))

        for key in work:
            if key in self._cells:
                tell(key)
        missing = {key: compute for key, compute in work.items() if key not in self._cells}
        self.spread(missing, tell)
        for key, compute in missing.items():
            if key not in self._cells:
                self.once(key, compute)
                tell(key)
        return {key: cast("_Value", self._cells[key]) for key in work}

    def _store(self, key: str, value: object) -> None:
        self._cells[key] = json.loads(json.dumps(value, allow_nan=False))
        if self._writes:
            _append_line(self.folder / _CELLS, {"key": key, "value": self._cells[key]})

    def finish(self, results: Sequence[Result] = (), claims: Sequence[Claim] = ()) -> Summary:
        """Write ``summary.json`` and drop the checkpoint, which is no longer needed."""
        summary = Summary.model_validate(
            self._head
            | {
                "threads": _threads(),
                "wall_seconds": self._earlier_seconds + time.perf_counter() - self._started,
                "results": [result.model_dump() for result in results],
                "claims": [claim.model_dump() for claim in claims],
                "artifacts": [name for name in self._artifacts if (self.folder / name).exists()],
            }
        )
        if self._writes:
            write_json(self.folder / _SUMMARY, summary.model_dump())
            for name in (_CHECKPOINT, _CELLS):
                (self.folder / name).unlink(missing_ok=True)
        return summary


def _new_cells(run: Run, part: Callable[[Run], object]) -> dict[str, Any]:
    """Do a part with a copy of a run, and return what it stored."""
    known = set(run._cells)  # pyright: ignore[reportPrivateUsage]
    part(run)
    return {key: value for key, value in run._cells.items() if key not in known}  # pyright: ignore[reportPrivateUsage]


def read_summary(path: str | Path) -> Summary:
    """Read a ``summary.json`` (or the run folder that holds one)."""
    path = Path(path)
    path = path / _SUMMARY if path.is_dir() else path
    return read_document(path, Summary, "a run summary", "a run folder or its summary")


def read_document(path: Path, kind: type[_Value], what: str, give: str = "") -> _Value:
    """Read a JSON document as what it should be: a model of pydantic, a dataclass, ``dict[str, list[float]]``, ...

    Parameters
    ----------
    path : the file
    kind : what it should be; a field's type and limits are checked, however deep
    what : words for it, as in "it is not {what}"
    give : words for what to give instead of a file that cannot be read

    Raises
    ------
    InputError
        For a file that cannot be read, and for anything else than `kind`: says where it is wrong.

    Examples
    --------
    >>> path = Path(tempfile.mkdtemp()) / "a.json"
    >>> write_json(path, {"size": 8})
    >>> read_document(path, dict[str, int], "a table of sizes")
    {'size': 8}
    """
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except OSError as error:
        hint = f"; give {give}" if give else ""
        raise InputError(f"cannot read {path}: {error.strerror or error}{hint}") from error
    except ValidationError as error:
        raise InputError(f"{path} is not {what}: {_first(error)}") from error


def read_lines(path: Path, kind: type[_Value], what: str) -> list[_Value]:
    """Read a file with a JSON document a line, such as ``metrics.jsonl``.

    Parameters
    ----------
    path : the file
    kind : of a line, as in `read_document`
    what : words for the file

    Raises
    ------
    InputError
        For a file that cannot be read, or a line of another kind: says which.
    """
    reader, found = TypeAdapter(kind), list[_Value]()
    try:
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            try:
                found.append(reader.validate_json(line))
            except ValidationError as error:
                raise InputError(f"{path} is not {what}: line {number}: {_first(error)}") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    return found


def _first(error: ValidationError) -> str:
    """Return the first fault in one line, with its place."""
    first = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(str(part) for part in first["loc"]) or "the document"
    return " ".join(f"{place}: {first['msg']}".encode("utf-8", "backslashreplace").decode().split())


def _finite(value: float | str | None) -> float | str | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _append_line(path: Path, value: object) -> None:
    # One write call of a whole line: an interruption leaves at most a torn last line, which _read_lines drops.
    try:
        with path.open("ab") as file:
            file.write((json.dumps(value, allow_nan=False) + "\n").encode())
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines: list[dict[str, Any]] = []
    for line in path.read_bytes().split(b"\n"):
        with suppress(ValueError, RecursionError):
            found = json.loads(line)
            if isinstance(found, dict):
                lines.append(found)
    return lines


def _threads() -> int:
    torch = sys.modules.get("torch")
    return int(torch.get_num_threads()) if torch is not None else 1


def _environment(seed: int, device: str) -> dict[str, JsonValue]:
    versions: dict[str, JsonValue] = {}
    for name in ("numpy", "scipy", "torch", "scikit-learn", "shared-core"):
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "device": device,
        "seed": seed,
        "threads": _threads(),
        "versions": versions,
    }
