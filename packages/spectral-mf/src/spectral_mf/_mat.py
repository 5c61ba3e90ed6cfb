"""Arrays out of MATLAB files of version 5 to 7.2, and CSR matrices out of parts nobody vouches for.

SciPy's reader of these files, and its compiled code for CSR matrices, crash the process on some damaged input.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from shared_core.errors import InputError
from shared_core.objects import one_line

__all__ = ["LARGEST", "MatFile", "checked_csr", "real_array"]

# A few kilobytes of ZIP can declare terabytes; what a file may unpack to stays below what kills a process.
LARGEST = 2**33
# MAT-file format, level 5: the numbers its documentation gives to types of data and classes of arrays.
_MAT_TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_MAT_MATRIX, _MAT_COMPRESSED = 14, 15
_MAT_SPARSE, _MAT_NUMERIC = 5, range(6, 16)


@dataclass(frozen=True, eq=False)
class MatFile:
    """A MAT-file's bytes. SciPy's reader crashes the process on some damaged files, hence this small one."""

    where: str
    order: str

    def damaged(self, what: str) -> InputError:
        return InputError(
            f"{self.where}not a sound MATLAB file: {what}; save it again with save(name, 'A', 'h', '-v7')"
        )

    def elements(self, data: bytes) -> Generator[tuple[int, bytes]]:
        """Split bytes into (type, content)."""
        at = 0
        while at < len(data):
            if at + 8 > len(data):
                raise self.damaged(f"{len(data) - at} bytes are left where an element of 8 begins")
            kind, size = struct.unpack_from(f"{self.order}II", data, at)
            if kind >> 16:
                # Up to four bytes lie in the tag itself.
                kind, size, start, end = kind & 0xFFFF, kind >> 16, at + 4, at + 8
                if size > 4:
                    raise self.damaged(f"an element of {size} bytes inside a tag of 8")
            else:
                start = at + 8
                end = start + (size if kind == _MAT_COMPRESSED else -(-size // 8) * 8)
            # Some writers leave out the padding at the very end.
            if start + size > len(data):
                raise self.damaged(f"truncated: an element of {size} bytes, {len(data) - start} are there")
            yield kind, data[start : start + size]
            at = end

    def numbers(self, element: tuple[int, bytes], what: str) -> np.ndarray:
        kind, content = element
        if kind not in _MAT_TYPES:
            raise self.damaged(f"{what} has type {kind}, which is not of numbers")
        dtype = np.dtype(f"{self.order}{_MAT_TYPES[kind]}")
        if len(content) % dtype.itemsize:
            raise self.damaged(f"{what} takes {len(content)} bytes, no multiple of {dtype.itemsize}")
        return np.frombuffer(content, dtype)

    def arrays(self, data: bytes) -> Generator[tuple[str, Any]]:
        """Give the names and values of the file's variables; what is no array of real numbers is None."""
        for kind, content in self.elements(data):
            if kind == _MAT_COMPRESSED:
                yield from self.arrays(self.unpacked(content))
            elif kind == _MAT_MATRIX:
                yield self.array(list(self.elements(content)))

    def unpacked(self, content: bytes) -> bytes:
        try:
            stream = zlib.decompressobj()
            unpacked = stream.decompress(content, LARGEST)
        except zlib.error as error:
            raise self.damaged(str(error)) from error
        if stream.unconsumed_tail or not stream.eof:
            raise self.damaged("a compressed variable is truncated or too large")
        if unpacked[:4] == struct.pack(f"{self.order}I", _MAT_COMPRESSED):
            raise self.damaged("a compressed variable inside a compressed variable")
        return unpacked

    def array(self, parts: list[tuple[int, bytes]]) -> tuple[str, Any]:
        flags = self.numbers(parts[0], "flags") if parts else np.zeros(1, int)
        kind, name = int(flags[:1].sum()) & 0xFF, parts[2][1].decode("ascii", "replace") if len(parts) > 2 else ""
        is_complex = bool(int(flags[:1].sum()) & 0x800)
        if is_complex or kind not in (_MAT_SPARSE, *_MAT_NUMERIC):
            return name, None
        if len(parts) < 3:
            raise self.damaged("an array without dimensions and name")
        shape, values = self.numbers(parts[1], "dimensions"), parts[3:]
        if shape.dtype.kind not in "iu" or len(shape) < 2 or (shape < 0).any():
            raise self.damaged(f"variable '{name[:40]}' has no sound dimensions")
        dimensions = tuple(shape.tolist())
        if len(values) != (3 if kind == _MAT_SPARSE else 1):
            raise self.damaged(f"variable '{name[:40]}' has {len(values)} parts of data")
        if kind == _MAT_SPARSE:
            rows, starts, entries = (self.numbers(value, name) for value in values)
            used = int(starts[-1]) if len(starts) else 0
            # By columns, which of a symmetric matrix is the same as by rows.
            turned = np.array(dimensions[::-1], dtype=np.int64)
            return name, checked_csr(self.where, entries[:used], rows[:used], starts, turned)
        numbers = self.numbers(values[0], name)
        if len(numbers) != math.prod(dimensions):
            raise self.damaged(f"variable '{name[:40]}' is {dimensions} but has {len(numbers)} entries")
        return name, numbers.reshape(dimensions, order="F")


def checked_csr(
    where: str, data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, shape: np.ndarray
) -> sparse.csr_array:
    whole = all(array.ndim == 1 and array.dtype.kind in "iu" for array in (indices, indptr, shape))
    if not whole or data.ndim != 1 or len(shape) != 2 or len(indptr) != int(shape[0]) + 1 or (shape < 0).any():
        raise InputError(f"{where}the parts of the sparse matrix do not fit its shape {shape.tolist()}; save it again")
    values = real_array(where, "data", data)
    starts, columns = indptr.astype(np.int64), indices.astype(np.int64)
    # SciPy's own check lets row starts through that make its compiled code read out of bounds when nothing is stored.
    sound = starts[0] == 0 and starts[-1] == len(columns) == len(values) and (np.diff(starts) >= 0).all()
    if not sound or (columns < 0).any() or (columns >= int(shape[1])).any():
        raise InputError(f"{where}not a sound sparse matrix of shape {shape.tolist()}; save it again")
    matrix: Any = sparse.csr_array((values, columns, starts), shape=(int(shape[0]), int(shape[1])))
    return matrix


def real_array(where: str, name: str, values: Any) -> np.ndarray:
    """Take `values` as finite float64, or say which entry is not."""
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"{where}{name} must be numbers in a regular array: {one_line(error)}") from error
    if array.dtype.kind not in "fiub":
        raise InputError(f"{where}{name} must hold real numbers, it holds {array.dtype}")
    array = array.astype(np.float64)
    finite = np.isfinite(array)
    if not finite.all():
        at = tuple(int(k) for k in np.unravel_index(int(np.argmin(finite)), array.shape))
        place = f"[{','.join(map(str, at))}]" if at else ""
        raise InputError(f"{where}{name}{place} is {array[at]}; every entry must be finite")
    return array
