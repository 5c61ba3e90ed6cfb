"""Delimited text as arrays: the fields of millions of lines found and parsed without a Python loop over them.

Eight characters are one 64-bit word, so a field of up to eight characters is one gather, and its decimal value
three multiplications (the trick is known from fast integer parsers; checked here against ``int`` and ``float``).
Only plain ASCII blocks of complete lines are taken; ``PlainTable.of`` answers None for all others, and the caller
then reads them line by line, which also finds the place of an error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_PAD = 16
_ONES = np.uint64(0xFFFFFFFFFFFFFFFF)
_NOT_PLAIN = np.ones(256, dtype=bool)
_NOT_PLAIN[33:127] = False
_NOT_PLAIN[[10, 13]] = False
_NOT_PLAIN[ord('"')] = True


def parse_number(text: str) -> float | None:
    """Return the finite number that a field spells, or None."""
    try:
        value = float(text) if "_" not in text else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _keep_last(words: NDArray[np.uint64], length: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Blank all but the last ``length`` (0..8) characters of each word; a shift by 64 would be undefined."""
    shift = (8 * (8 - length)).astype(np.uint64)
    return np.where(length > 0, words & (_ONES << np.minimum(shift, np.uint64(56))), np.uint64(0))


@dataclass(frozen=True)
class PlainTable:
    """The fields of a block of text: field (row, column) is ``data[starts[row, column]:stops[row, column]]``."""

    data: bytes
    starts: NDArray[np.int64]
    stops: NDArray[np.int64]

    @staticmethod
    def of(block: bytes, separator: bytes, width: int) -> PlainTable | None:
        """Split a block that ends in a newline; None unless every line is plain ASCII and has ``width`` fields."""
        data = b"\0" * _PAD + block
        characters = np.frombuffer(data, dtype=np.uint8)
        odd = _NOT_PLAIN.copy()
        odd[separator[0]] = False
        if odd[characters[_PAD:]].any():
            return None
        ends = np.flatnonzero(characters == 10)
        is_mark = characters == separator[0]
        marks = np.flatnonzero(is_mark[:-1] & is_mark[1:] if len(separator) == 2 else is_mark)
        if not len(ends) or len(marks) != len(ends) * (width - 1):
            return None
        starts = np.empty((len(ends), width), dtype=np.int64)
        stops = np.empty_like(starts)
        starts[0, 0], starts[1:, 0] = _PAD, ends[:-1] + 1
        stops[:, :-1] = marks.reshape(len(ends), width - 1)
        starts[:, 1:] = stops[:, :-1] + len(separator)
        returns = block.count(b"\r")
        stops[:, -1] = ends - bool(returns)
        if returns and (returns != len(ends) or (characters[stops[:, -1]] != 13).any()):
            return None
        return PlainTable(data, starts, stops) if (stops >= starts).all() else None

    def words(self, column: int, before: int = 0) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Return the last 8 characters of each field (or the 8 ``before`` those), zeros in front, and its length."""
        stops = self.stops[:, column] - before
        length = stops - self.starts[:, column]
        view = np.ndarray((len(self.data) - 7,), dtype="<u8", buffer=self.data, strides=(1,))
        return _keep_last(view[stops - 8], np.clip(length, 0, 8)), length

    def integers(self, column: int, *, canonical: bool = False) -> NDArray[np.int64] | None:
        """Return a column of 1 to 16 digits each, or None; ``canonical`` refuses leading zeros too."""
        length = self.stops[:, column] - self.starts[:, column]
        if length.min() < 1 or length.max() > _PAD:
            return None
        if canonical:
            first = np.frombuffer(self.data, dtype=np.uint8)[self.starts[:, column]]
            if ((first == ord("0")) & (length > 1)).any():
                return None
        total = np.zeros(len(length), dtype=np.int64)
        for before, scale in ((0, 1), (8, 10**8)):
            if length.max() <= before:
                break
            words, rest = self.words(column, before)
            digits = words ^ _keep_last(np.full_like(words, 0x3030303030303030), np.clip(rest, 0, 8))
            if (((digits + np.uint64(0x7676767676767676)) | digits) & np.uint64(0x8080808080808080)).any():
                return None
            value = (digits * np.uint64(2561)) >> np.uint64(8) & np.uint64(0x00FF00FF00FF00FF)
            value = (value * np.uint64(6553601)) >> np.uint64(16) & np.uint64(0x0000FFFF0000FFFF)
            value = (value * np.uint64(42949672960001)) >> np.uint64(32)
            total += value.astype(np.int64) * scale
        return total

    def numbers(self, column: int) -> NDArray[np.float64] | None:
        """Return a column of finite numbers, exactly as ``float`` reads them, or None."""
        words, length = self.words(column)
        if length.min() < 1:
            return None
        # Ratings and readings repeat: each distinct spelling is parsed once.
        known = np.unique(words[:4096])
        index = np.minimum(np.searchsorted(known, words), len(known) - 1)
        if (known[index] != words).any():
            known, index = np.unique(words, return_inverse=True)
        table = [parse_number(word.tobytes().lstrip(b"\0").decode("ascii")) for word in known.astype("<u8")]
        values = np.array([math.nan if value is None else value for value in table])[index]
        for row in np.flatnonzero(length > 8):
            text = self.data[self.starts[row, column] : self.stops[row, column]].decode("ascii")
            values[row] = math.nan if (value := parse_number(text)) is None else value
        return None if np.isnan(values).any() else values

    def ids(self, column: int, limit: int = 64) -> NDArray[Any] | None:
        """Return a column of ids: numbers if all are, else texts of 1 to ``limit`` characters, else None."""
        numbers = self.integers(column, canonical=True)
        if numbers is not None:
            return numbers
        starts = self.starts[:, column]
        length = self.stops[:, column] - starts
        if length.min() < 1 or length.max() > limit:
            return None
        offsets = np.arange(length.max())
        inside = offsets < length[:, None]
        characters = np.frombuffer(self.data, dtype=np.uint8)[np.where(inside, starts[:, None] + offsets, 0)]
        return np.ascontiguousarray(characters).view(f"S{len(offsets)}")[:, 0]
