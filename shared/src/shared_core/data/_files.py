"""Bytes from files, gz files and archives: bounded, read in place, and every fault one line that names the file."""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import struct
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from shared_core.data._datasets import Provenance
from shared_core.errors import InputError

MEMBER_LIMIT = 4 << 30
_DAMAGE = (
    OSError, EOFError, ValueError, TypeError, LookupError, RuntimeError, ArithmeticError, MemoryError,
    struct.error, zlib.error, zipfile.BadZipFile, tarfile.TarError,
)  # fmt: skip
_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")


class MissingFilesError(InputError):
    """A data set, or a part of it, is not on this machine."""


def cache_root() -> Path:
    """Return the folder for what can be made or fetched again: the platform's user cache / ``shared-core``."""
    home = Path.home()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = home / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or home / ".cache"
    return Path(base) / "shared-core"


def data_root() -> Path:
    """Return the folder that holds the data sets: ``SHARED_CORE_DATA``, else the user's cache folder."""
    chosen = os.environ.get("SHARED_CORE_DATA")
    return Path(chosen).expanduser() if chosen else cache_root()


@contextmanager
def reading(place: str | Path) -> Iterator[None]:
    """Turn whatever an absent, damaged or hostile file raises into one ``InputError`` line that names it."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{place}: no such file") from None
    except _DAMAGE as error:
        if Path(place).is_dir():
            raise InputError(f"{place}: is a folder, and a file is needed") from None
        if isinstance(error, PermissionError):
            raise InputError(f"{place}: may not be read (permission denied)") from None
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{place}: cannot be read, it is damaged, truncated or of another kind ({reason})") from error


def open_binary(path: Path) -> IO[bytes]:
    """Open a file for reading, through gzip when its first two bytes say so (the name does not matter)."""
    with path.open("rb") as stream:
        zipped = stream.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if zipped else path.open("rb")


def bounded(stream: IO[bytes], limit: int, place: str | Path) -> bytes:
    """Read all of a stream, refusing more than ``limit`` bytes: a few kB of zip can hold terabytes."""
    data = stream.read(limit + 1)
    if len(data) > limit:
        raise InputError(f"{place}: larger than the {limit:,} bytes that such a file can have")
    return data


def is_archive(path: Path) -> bool:
    """Say whether the name is that of a zip or tar archive."""
    return path.name.lower().endswith(_ARCHIVES)


def _walk(where: Path) -> Iterator[tuple[str, str, Callable[[int], bytes]]]:
    """Yield (name inside ``where``, label for messages, reader) of every file: loose ones first, then archived."""
    paths = [where] if where.is_file() else sorted(path for path in where.rglob("*") if path.is_file())

    def loose(path: Path, limit: int) -> bytes:
        with reading(path), open_binary(path) as stream:
            return bounded(stream, limit, path)

    for path in paths:
        if not is_archive(path):
            name = path.name if path == where else path.relative_to(where).as_posix()
            yield name.removesuffix(".gz"), str(path), lambda limit, path=path: loose(path, limit)
    for path in filter(is_archive, paths):
        with reading(path):
            archive = zipfile.ZipFile(path) if path.suffix == ".zip" else tarfile.open(path)
        with archive, reading(path):
            for member in archive.infolist() if isinstance(archive, zipfile.ZipFile) else archive:
                name = member.filename if isinstance(member, zipfile.ZipInfo) else member.name
                label = f"{path}:{name}"
                if isinstance(member, zipfile.ZipInfo) or member.isfile():
                    yield name, label, lambda limit, m=member, label=label: _archived(archive, m, limit, label)


def _archived(archive: zipfile.ZipFile | tarfile.TarFile, member: Any, limit: int, label: str) -> bytes:
    with reading(label):
        stream = archive.open(member) if isinstance(archive, zipfile.ZipFile) else archive.extractfile(member)
        if stream is None:
            raise InputError(f"{label}: is not a regular file")
        with stream:
            return bounded(stream, limit, label)


def sha256_of(*arrays: np.ndarray) -> str:
    """Return the SHA-256 over dtype, shape and C-order bytes of arrays: equal data, equal sum, whatever the file."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return digest.hexdigest()


@dataclass(frozen=True)
class Source:
    """One split of one set, as its reader gets it: where the files are and what to say about them."""

    name: str
    split: str
    where: Path
    citation: str
    licence: str
    url: str

    def provenance(self, *arrays: np.ndarray | None, notes: str = "") -> Provenance:
        """Return the provenance of what was read, with the checksum of the arrays given."""
        checksum = sha256_of(*(array for array in arrays if array is not None))
        return Provenance(self.citation, self.licence, self.url, checksum, notes)

    def members(self, pattern: str, limit: int = MEMBER_LIMIT) -> Iterator[tuple[re.Match[str], str, bytes]]:
        """Yield (match, label, bytes) of the files whose name matches; of files with equal groups only the first."""
        seen: set[object] = set()
        compiled = re.compile(pattern)
        for name, label, read in _walk(self.where):
            match = compiled.search(name)
            if match and (key := match.groups() or match.group()) not in seen:
                seen.add(key)
                yield match, label, read(limit)

    def read(self, pattern: str, wanted: str, limit: int = MEMBER_LIMIT) -> tuple[str, bytes]:
        """Return (label, bytes) of the first file whose name matches, or say that ``wanted`` is missing."""
        for _, label, data in self.members(pattern, limit):
            return label, data
        raise self.missing(wanted)

    def missing(self, wanted: str) -> MissingFilesError:
        """Return the error that says what is not in the folder and where to get it."""
        return MissingFilesError(f"{self.name}: no {wanted} in {self.where}; the official address is {self.url}")
