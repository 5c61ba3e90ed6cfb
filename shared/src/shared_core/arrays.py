"""Users' own arrays: NPZ and NPY files, read whole or refused in one line; and bytes of files that may be gzipped."""

from __future__ import annotations

import gzip
import io
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from shared_core.errors import DAMAGE, InputError

__all__ = ["check_characters", "open_bytes", "read_arrays"]

_MOST_BYTES = 8 << 30
_KINDS = "biufcSUmM"


def read_arrays(
    path: str | Path, *, names: Collection[str] | None = None, single: bool = False, most_bytes: int = _MOST_BYTES
) -> dict[str, NDArray[Any]]:
    """Read the arrays of an NPZ file by name.

    Parameters
    ----------
    path : the file; what it is is seen from its first bytes
    names : read only these of an NPZ, if they are there; None reads all
    single : read an NPY file too, whose array has the name ""
    most_bytes : that the arrays may take in memory

    Raises
    ------
    InputError
        For a file that is absent, damaged or of another kind, that would take too much memory, or that holds Python
        objects, records, or texts that are none.
    """
    path = Path(path)
    try:
        # Opened here: of a damaged file, NumPy leaves its own handle open.
        with path.open("rb") as stream:
            start = stream.read(6)
            stream.seek(0)
            if start == b"\x93NUMPY" and not single:
                raise InputError(f"{path}: is one array; give an NPZ of named ones: numpy.savez(file, x=array)")
            if start == b"\x93NUMPY":
                return {"": _array(stream, f"{path}")}
            if start[:2] != b"PK":
                raise InputError(f"{path}: is not an NPZ file; save arrays with numpy.savez")
            with zipfile.ZipFile(stream) as archive:
                members = {
                    info.filename.removesuffix(".npy"): info
                    for info in archive.infolist()
                    if info.filename.endswith(".npy") and (names is None or info.filename.removesuffix(".npy") in names)
                }
                if (size := sum(info.file_size for info in members.values())) > most_bytes:
                    raise InputError(f"{path}: its arrays take {size:,} bytes, at most {most_bytes:,} are read")
                arrays: dict[str, NDArray[Any]] = {}
                for name, info in members.items():
                    with archive.open(info) as member:
                        arrays[name] = _array(member, f"{path}: '{name}'")
                return arrays
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; check the path") from error
    except DAMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: not a whole NPZ file ({reason[:200]}); save it again") from error


def _array(stream: IO[bytes], place: str) -> NDArray[Any]:
    try:
        array: NDArray[Any] = np.lib.format.read_array(stream, allow_pickle=False)
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise
        hint = "save numbers, or texts as np.asarray(names, dtype=str)"
        raise InputError(f"{place} holds Python objects, which are never unpickled; {hint}") from None
    # Of entries without bytes a file of nothing can hold any number.
    if array.dtype.kind not in _KINDS or (array.size and not array.dtype.itemsize):
        raise InputError(f"{place} is an array of {array.dtype}; save numbers or texts")
    check_characters(array, place)
    return array


def check_characters(array: NDArray[Any], place: str) -> None:
    """See that an array of texts holds characters only: NumPy takes any bytes for some.

    Parameters
    ----------
    array : of any type
    place : what messages call it

    Raises
    ------
    InputError
        When there is one that is none, or that is half of one.
    """
    if array.dtype.kind == "U" and array.size:
        points = np.ascontiguousarray(array).reshape(-1).view(np.dtype(np.uint32).newbyteorder(array.dtype.byteorder))
        if ((points > 0x10FFFF) | ((points >= 0xD800) & (points < 0xE000))).any():
            raise InputError(f"{place} holds texts that are damaged; save them again")


def open_bytes(path: str | Path, *, most_bytes: int = _MOST_BYTES) -> io.BufferedReader:
    """Open a file for reading, through gzip when its first two bytes say so; its name does not matter.

    Parameters
    ----------
    path : the file
    most_bytes : that are unpacked: a megabyte of gzip can hold a gigabyte

    Raises
    ------
    InputError
        When it is read, once more has been unpacked.
    OSError
        For a file that cannot be read.
    """
    path = Path(path)
    with path.open("rb") as stream:
        zipped = stream.read(2) == b"\x1f\x8b"
    return io.BufferedReader(_Unpacked(path, most_bytes)) if zipped else path.open("rb")


class _Unpacked(io.RawIOBase):
    """What a gzipped file holds, up to a limit."""

    def __init__(self, path: Path, most_bytes: int) -> None:
        self._stream, self._path, self._most, self._left = gzip.open(path, "rb"), path, most_bytes, most_bytes  # noqa: SIM115

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._stream.readinto(buffer)
        self._left -= count
        if self._left < 0:
            raise InputError(f"{self._path}: holds more than {self._most:,} bytes, which is as much as is unpacked")
        return count

    def close(self) -> None:
        self._stream.close()
        super().close()
