"""The registry: which data sets there are, where they are looked for, and how they are read and checked."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import inspect
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from shared_core.arrays import open_bytes
from shared_core.data import _datasets
from shared_core.data._datasets import Dataset
from shared_core.data._files import (
    Entry,
    MissingFilesError,
    Source,
    data_root,
    is_archive,
    reading,
)
from shared_core.errors import InputError, UnknownKeyError

T = TypeVar("T", bound=Dataset)


def _entry(table: dict[str, Any]) -> Entry:
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}
    values["kind"] = getattr(_datasets, table["kind"])
    values["downloads"] = tuple((url, checksum) for url, checksum in table.get("downloads", ()))
    return Entry(**values)


_TABLES = tomllib.loads(Path(__file__).with_name("registry.toml").read_text(encoding="utf-8"))["set"]
_REGISTRY = {entry.name: entry for entry in map(_entry, _TABLES)}


def entry_of(name: str) -> Entry:
    """Return the entry of a data set, by its name in any spelling or by a folder name such as ``ml-100k``."""

    def plain(text: str) -> str:
        return text.lower().replace("_", "").replace("-", "")

    for entry in _REGISTRY.values():
        if plain(name) in {plain(entry.name), *map(plain, entry.folders)}:
            return entry
    close = difflib.get_close_matches(name.lower(), _REGISTRY, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise UnknownKeyError(f"no data set is called {name!r}; {hint}there are {', '.join(_REGISTRY)}")


def _locate(entry: Entry, root: str | Path | None) -> Path | None:
    """Return the first of the entry's folders that holds a file it expects, loose or in an archive."""
    base = data_root() if root is None else Path(root)
    patterns = [f"{depth}{name}{gz}" for name in entry.files for gz in ("", ".gz") for depth in ("", "*/")]
    for path in (base / folder for folder in entry.folders):
        with reading(path):
            if path.is_file() and is_archive(path):
                return path
            if path.is_dir() and (any(map(is_archive, path.iterdir())) or any(any(path.glob(p)) for p in patterns)):
                return path
    return None


def available(root: str | Path | None = None) -> list[Entry]:
    """Return the registry, each entry with the folder it was found in (``where``; None if absent)."""
    return [replace(entry, where=_locate(entry, root)) for entry in _REGISTRY.values()]


def find(name: str, root: str | Path | None = None) -> Path:
    """Return the folder (or the archive) that holds a data set.

    Raises
    ------
    InputError : naming the set, the folder looked in, the files expected and the official address.
    """
    entry = entry_of(name)
    if entry.embedded:
        raise InputError(f"{entry.name} has no folder: it needs no files")
    where = _locate(entry, root)
    if where is None:
        fetching = f", or run: shared-core data fetch {entry.name}" if entry.downloads else ""
        raise MissingFilesError(
            f"{entry.name}: not found in {data_root() if root is None else root}; expected a folder "
            f"{' or '.join(entry.folders)} with {', '.join(entry.files)}; get it from {entry.url}{fetching}"
        )
    return where


def load(
    name: str,
    *,
    split: str | None = None,
    expect: type[T] = Dataset,
    root: str | Path | None = None,
    **options: object,
) -> T:
    """Load a data set by name.

    Parameters
    ----------
    name : as ``available`` lists them; the folder names of the publishers (``ml-100k``) work too.
    split : default: the first of the set's splits, which is "train" where there is an official one and mostly "all"
        elsewhere. A set without official splits takes "train" for "all", and refuses "test": how to divide it is for
        the caller to say.
    expect : the class the caller counts on (``ImageData``, ``TableData`` ...); checked, and known to type checkers.
    root : the folder that holds the data sets; default: ``data_root()``.
    options : what the reader of this set takes, such as ``size=28`` for Omniglot.

    Raises
    ------
    UnknownKeyError : for a name that is not registered, with the closest one.
    InputError : for a missing or damaged set, an unknown split or option, or another kind than expected.

    Examples
    --------
    >>> from shared_core.data import ImageData
    >>> digits = load("digits", expect=ImageData)
    >>> digits.images.shape, digits.peak, digits.split
    ((1797, 8, 8), 16, 'all')
    """
    entry = entry_of(name)
    if not issubclass(entry.kind, expect):
        raise InputError(f"{entry.name} is {entry.kind.__name__}, and {expect.__name__} was asked for")
    chosen = entry.splits[0] if split is None or (split == "train" and entry.splits == ("all",)) else split
    if chosen not in entry.splits:
        raise InputError(f"split: {entry.name} has {', '.join(entry.splits)}, and not {chosen!r}")
    module, function = entry.reader.split(":")
    reader: Callable[..., T] = getattr(importlib.import_module(f"shared_core.data.{module}"), function)
    known = [p.name for p in inspect.signature(reader).parameters.values() if p.kind is p.KEYWORD_ONLY]
    unknown = next((option for option in options if option not in known), None)
    if unknown is not None:
        raise InputError(f"{unknown}: not an option of {entry.name}, which takes {', '.join(known) or 'none'}")
    return reader(Source(entry, chosen, Path() if entry.embedded else find(name, root)), **options)


@dataclass(frozen=True)
class Check:
    """What was found about one file or one split.

    Parameters
    ----------
    item : the file's name, or ``split NAME``.
    size : bytes of a file, rows of a split.
    status : a file is "official" (its checksum is the published one), "unknown" (none is published) or "differs"; a
        split is "complete", "partial" (fewer or more rows than the official ones), "absent" or "broken".
    detail : the file's SHA-256; the rows expected of a partial split; the error of an absent or broken one.
    """

    item: str
    size: int
    status: Literal["official", "unknown", "differs", "complete", "partial", "absent", "broken"]
    detail: str = ""


@dataclass(frozen=True)
class Report:
    """What ``verify`` found; ``ok`` when no file differs, no split is broken and at least one can be loaded."""

    name: str
    where: Path | None
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether the set can be used as it is."""
        found = {check.status for check in self.checks}
        return not found & {"differs", "broken"} and bool(found & {"complete", "partial"})


def digest(path: Path, checksum: str = "sha256:") -> str:
    """Return the checksum of a file as ``Entry.downloads`` has it, by the algorithm of the one given."""
    algorithm = algorithm_of(checksum)
    with reading(path), open_bytes(path) if algorithm.endswith("-gunzipped") else path.open("rb") as stream:
        total = hashlib.new(algorithm.removesuffix("-gunzipped"), usedforsecurity=False)
        while chunk := stream.read(1 << 20):
            total.update(chunk)
    return f"{algorithm}:{total.hexdigest()}"


def algorithm_of(checksum: str) -> str:
    """Return the algorithm that a checksum begins with, one of those in use here."""
    algorithm = checksum.split(":")[0]
    if algorithm not in ("md5", "sha256", "sha256-gunzipped"):
        raise InputError(f"checksum: expected md5:..., sha256:... or sha256-gunzipped:..., got {checksum!r}")
    return algorithm


def verify(name: str, root: str | Path | None = None) -> Report:
    """Check a data set: the checksums of its files where they are published, and whether every split loads in full."""
    entry = entry_of(name)
    where = None if entry.embedded else find(name, root)
    official = {url.rsplit("/", 1)[1]: checksum for url, checksum in entry.downloads}
    official |= {file.removesuffix(".gz"): checksum for file, checksum in official.items() if "gunzipped" in checksum}
    checks: list[Check] = []
    paths = [] if where is None else [where] if where.is_file() else sorted(where.iterdir())
    for path in filter(Path.is_file, paths):
        checksum = official.get(path.name)
        status = "unknown" if not checksum else "official" if digest(path, checksum) == checksum else "differs"
        checks.append(Check(path.name, path.stat().st_size, status, digest(path).split(":")[1]))
    for split in entry.splits:
        try:
            found, expected = len(load(entry.name, split=split, root=root)), entry.counts.get(split)
            partial = expected not in (None, found)
            detail = f"{expected:,} rows expected" if partial else ""
            checks.append(Check(f"split {split}", found, "partial" if partial else "complete", detail))
        except InputError as error:
            status = "absent" if isinstance(error, MissingFilesError) else "broken"
            checks.append(Check(f"split {split}", 0, status, str(error)))
    return Report(entry.name, where, tuple(checks))
