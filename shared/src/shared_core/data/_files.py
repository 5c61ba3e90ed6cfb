"""Bytes from files, gz files and archives: bounded, read in place, and every fault one line that names the file."""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
import sys
import tarfile
import zipfile
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, cast

import numpy as np

from shared_core.arrays import open_bytes
from shared_core.data._datasets import Dataset, Provenance
from shared_core.errors import DAMAGE, InputError

MEMBER_LIMIT = 4 << 30
_Opener = Callable[[], io.BufferedIOBase]


class MissingFilesError(InputError):
    """A data set, or a part of it, is not on this machine."""


def cache_root() -> Path:
    """Return the folder for what can be made or fetched again: the platform's user cache / ``shared-core``."""
    base = {
        "win32": os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local",
        "darwin": Path.home() / "Library" / "Caches",
    }.get(sys.platform, os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(base) / "shared-core"


def data_root() -> Path:
    """Return the folder that holds the data sets: ``SHARED_CORE_DATA``, else the user's cache folder."""
    chosen = os.environ.get("SHARED_CORE_DATA")
    return Path(chosen).expanduser() if chosen else cache_root()


@contextmanager
def reading(place: str | Path) -> Generator[None]:
    """Turn whatever an absent, damaged or hostile file raises into one ``InputError`` line that names it."""
    try:
        yield
    except InputError:
        raise
    except DAMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        what = f"cannot be read; it is damaged, truncated or of another kind ({reason})"
        if Path(place).is_dir():
            what = "is a folder, and a file is needed"
        elif isinstance(error, FileNotFoundError | PermissionError):
            what = "no such file" if isinstance(error, FileNotFoundError) else "may not be read (permission denied)"
        raise InputError(f"{place}: {what}") from error


def is_archive(path: Path) -> bool:
    """Say whether the name is that of a zip or tar archive."""
    return path.name.lower().endswith((".zip", ".tar", ".tar.gz", ".tgz"))


@dataclass(frozen=True)
class Member:
    """What an archive holds: ``kind`` "file", "folder" or "other" (a link or a device)."""

    name: str
    size: int
    kind: Literal["file", "folder", "other"]
    open: _Opener


def archived(path: Path) -> Iterator[Member]:
    """Yield the members of a zip or tar archive; each can be opened until the next one is asked for."""
    with reading(path):
        if path.suffix.lower() == ".zip":
            with zipfile.ZipFile(path) as opened:
                for info in opened.infolist():
                    plain = stat.S_IFMT(info.external_attr >> 16) in (0, stat.S_IFREG, stat.S_IFDIR)
                    kind = "other" if not plain else "folder" if info.is_dir() else "file"
                    yield Member(info.filename, info.file_size, kind, cast("_Opener", partial(opened.open, info)))
        else:
            with tarfile.open(path) as opened:
                for info in opened:
                    kind = "file" if info.isfile() else "folder" if info.isdir() else "other"
                    yield Member(info.name, info.size, kind, cast("_Opener", partial(opened.extractfile, info)))


def _bounded(open_it: _Opener, label: str, limit: int) -> bytes:
    """Read all of a stream, refusing more than ``limit`` bytes: a few kB of zip can hold terabytes."""
    with reading(label), open_it() as stream:
        data = stream.read(limit + 1)
    if len(data) > limit:
        raise InputError(f"{label}: larger than the {limit:,} bytes that such a file can have")
    return data


def _walk(where: Path) -> Iterator[tuple[str, str, Callable[[int], bytes]]]:
    """Yield (name inside ``where``, label for messages, reader) of every file: loose ones first, then archived."""
    paths = [where] if where.is_file() else sorted(path for path in where.rglob("*") if path.is_file())
    for path in paths:
        if not is_archive(path):
            name = path.name if path == where else path.relative_to(where).as_posix()
            yield name.removesuffix(".gz"), str(path), partial(_bounded, partial(open_bytes, path), str(path))
    for path in filter(is_archive, paths):
        for member in archived(path):
            if member.kind == "file":
                yield member.name, f"{path}:{member.name}", partial(_bounded, member.open, f"{path}:{member.name}")


def sha256_of(*arrays: np.ndarray) -> str:
    """Return the SHA-256 over dtype, shape and C-order bytes of arrays: equal data, equal sum, whatever the file."""
    total = hashlib.sha256()
    for array in arrays:
        total.update(f"{array.dtype.str}{array.shape}".encode())
        total.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return total.hexdigest()


@dataclass(frozen=True)
class Entry:
    """One data set of the registry.

    Parameters
    ----------
    name, kind, description, licence, url : what it is, the class that ``load`` returns, its terms, its official page.
    reader : the function that reads it, ``module:function``.
    files : name patterns of the files expected in its folder; none where the set comes with scikit-learn or is made.
    folders : the folders (or archives) under the data root that are looked in, in this order.
    splits : the splits, the default one first.
    counts : the number of rows of each split where it is known.
    names : names of classes, covariates or channels that the files do not hold.
    downloads : what ``fetch`` gets: (address, checksum), the latter "md5:..." or "sha256:..." of the file,
        "sha256-gunzipped:..." of what is in the gz, or "" where none is published. Empty where the publisher asks for
        a visit.
    where : its folder on this machine, or None; filled in by ``available``.
    """

    name: str
    kind: type[Dataset]
    description: str
    licence: str
    url: str
    reader: str
    files: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    splits: tuple[str, ...] = ("all",)
    counts: dict[str, int] = field(default_factory=dict[str, int])
    names: tuple[str, ...] = ()
    downloads: tuple[tuple[str, str], ...] = ()
    where: Path | None = None

    @property
    def embedded(self) -> bool:
        """Whether the set needs no files."""
        return not self.files

    @property
    def present(self) -> bool:
        """Whether ``load`` can work on this machine without a download."""
        return self.embedded or self.where is not None


@dataclass(frozen=True)
class Source:
    """One split of one set, as its reader gets it: what it is and where its files are."""

    entry: Entry
    split: str
    where: Path

    def origin(self, *arrays: np.ndarray | None, notes: str = "") -> tuple[str, str, Provenance]:
        """Return name, split and provenance of what was read, with the checksum of the arrays given."""
        checksum = sha256_of(*(array for array in arrays if array is not None))
        entry = self.entry
        return entry.name, self.split, Provenance(entry.description, entry.licence, entry.url, checksum, notes)

    def members(self, pattern: str, limit: int = MEMBER_LIMIT) -> Iterator[tuple[re.Match[str], str, bytes]]:
        """Yield (match, label, bytes) of the files whose path matches; of files with equal groups only the first."""
        seen: set[object] = set()
        compiled = re.compile(rf"(?:^|/){pattern}$")
        for name, label, read in _walk(self.where):
            match = compiled.search(name)
            if match and (key := match.groups() or match.group()) not in seen:
                seen.add(key)
                yield match, label, read(limit)

    def read(self, pattern: str, wanted: str, limit: int = MEMBER_LIMIT) -> tuple[str, bytes]:
        """Return (label, bytes) of the first file whose path matches, or say that ``wanted`` is missing."""
        for _, label, data in self.members(pattern, limit):
            return label, data
        raise self.missing(wanted)

    def missing(self, wanted: str) -> MissingFilesError:
        """Return the error that says what is not in the folder and where to get it."""
        return MissingFilesError(f"{self.entry.name}: no {wanted} in {self.where}; get it from {self.entry.url}")
