"""Rating files of any common layout, parsed at memory speed; a bad line is reported by file and line."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Literal

import numpy as np
from numpy.typing import NDArray

from shared_core.data._datasets import Provenance, RatingData
from shared_core.data._files import open_binary, reading, sha256_of
from shared_core.data._text import PlainTable, parse_number
from shared_core.errors import InputError

_BLOCK = 1 << 22
_LONGEST_LINE = 1 << 16
_LONGEST_ID = 256
_SEPARATORS = ("::", "\t", ",", ";", "|", " ")
_ROLES = ("user", "item", "rating", "timestamp")
_COLUMN_NAMES: dict[str, tuple[str, ...]] = {
    "user": ("user", "userid", "uid", "reviewerid", "customerid"),
    "item": ("item", "itemid", "iid", "movie", "movieid", "product", "productid", "asin", "book", "bookid", "isbn"),
    "rating": ("rating", "ratings", "value", "score", "overall", "stars", "bookrating"),
    "timestamp": ("timestamp", "time", "ts", "unixreviewtime"),
}

Ids = NDArray[np.int64] | NDArray[np.bytes_]


@dataclass(frozen=True)
class _Layout:
    separator: str
    width: int
    positions: tuple[int, ...]
    has_header: bool


@dataclass(frozen=True)
class _Rows:
    users: Ids
    items: Ids
    values: NDArray[np.float64]
    timestamps: NDArray[np.int64] | None
    blank_lines: tuple[int, ...] = ()


def read_ratings(
    path: str | Path,
    *,
    columns: Sequence[str] | Sequence[int] | None = None,
    sep: str | None = None,
    header: bool | None = None,
    scale: tuple[float, float] | None = None,
    duplicates: Literal["error", "mean", "last"] = "error",
    max_rows: int | None = None,
) -> RatingData:
    """Read a file of ratings: ``u.data``, ``ratings.dat``, any CSV or TSV with a line per rating, also as ``.gz``.

    Parameters
    ----------
    path : the file.
    columns : where user, item, rating (and, if wanted, timestamp) stand: header names or positions from 0. Default:
        by the usual header names (userId, user_id, movieId, item, rating, score, timestamp ...); in a file without
        header the first three columns and, of exactly four, the last as timestamp.
    sep : ``"::"`` or one character; default: the first of ``:: TAB , ; |`` and space that gives three fields.
    header : whether the first line is one; default: when it holds the column names.
    scale : lowest and highest rating allowed, both included; default: not checked, and set to what was found.
    duplicates : what to do when a user rated an item twice: refuse ("error"), keep the "last", take the "mean".
    max_rows : read only so many ratings from the start.

    Returns
    -------
    RatingData : in file order. Ids sort by number when all are whole numbers of at most 16 digits, else by text.

    Raises
    ------
    InputError : one line with file and line, for anything that cannot be read without guessing.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp(), "ratings.csv")
    >>> _ = path.write_text("userId,movieId,rating\n7,10,4.5\n3,10,2\n")
    >>> ratings = read_ratings(path)
    >>> ratings.user_ids, ratings.users.tolist(), ratings.values.tolist(), ratings.scale
    (('3', '7'), [1, 0], [4.5, 2.0], (2.0, 4.5))
    """
    path = Path(path)
    place = str(path)
    if duplicates not in ("error", "mean", "last"):
        raise InputError(f"duplicates: expected 'error', 'mean' or 'last', got {duplicates!r}")
    if scale is not None and not scale[0] < scale[1]:
        raise InputError(f"scale: the lowest rating must be below the highest, got {scale[0]:g}..{scale[1]:g}")
    if max_rows is not None and max_rows < 1:
        raise InputError(f"max_rows: must be at least 1, got {max_rows}")
    with reading(path), open_binary(path) as stream:
        parts, first_row_line = _parse(stream, place, columns, sep, header, max_rows)
    if not parts:
        raise InputError(f"{place}: holds no ratings")
    values = np.concatenate([part.values for part in parts])[:max_rows]
    blank = np.array([line for part in parts for line in part.blank_lines], dtype=np.int64)

    def line_of(row: int) -> int:
        before = np.searchsorted(blank - np.arange(len(blank)), first_row_line + row, side="right")
        return int(first_row_line + row + before)

    low, high = scale or (float(values.min()), float(values.max()))
    outside = np.flatnonzero((values < low) | (values > high))
    if len(outside):
        row = int(outside[0])
        raise InputError(f"{place}:{line_of(row)}: rating {values[row]:g} outside the declared scale {low:g}..{high:g}")
    users, user_ids = _codes([part.users for part in parts], max_rows)
    items, item_ids = _codes([part.items for part in parts], max_rows)
    timestamps = None
    if parts[0].timestamps is not None:
        timestamps = np.concatenate([part.timestamps for part in parts if part.timestamps is not None])[:max_rows]
    data = RatingData(
        path.name, "all", Provenance(path.name, "", "", ""),
        users, items, values, timestamps, user_ids, item_ids, (low, high),
    )  # fmt: skip
    data = _resolve_duplicates(data, duplicates, place, line_of)
    checksum = sha256_of(data.users, data.items, data.values)
    return replace(data, provenance=Provenance(path.name, "unknown: a file of the user", "", checksum))


def _parse(
    stream: IO[bytes],
    place: str,
    columns: Sequence[str] | Sequence[int] | None,
    sep: str | None,
    header: bool | None,
    max_rows: int | None,
) -> tuple[list[_Rows], int]:
    """Parse block by block; return the parts and the line number of the first row if no line were blank."""
    layout: _Layout | None = None
    parts: list[_Rows] = []
    line, rows, first_row_line = 1, 0, 1
    for block in _blocks(stream, place):
        number, body = line, block
        line += block.count(b"\n")
        if layout is None:
            stripped = block.lstrip(b"\r\n")
            number += block[: len(block) - len(stripped)].count(b"\n")
            first, _, rest = stripped.partition(b"\n")
            if not first.strip():
                continue
            layout = _sniff(_decode(first, place, number), f"{place}:{number}", columns, sep, header)
            number, body = (number + 1, rest) if layout.has_header else (number, stripped)
            first_row_line = number
        if body:
            parts.append(_plain_rows(body, layout) or _careful_rows(body, number, place, layout))
            rows += len(parts[-1].values)
        if max_rows is not None and rows >= max_rows:
            break
    return [part for part in parts if len(part.values) or part.blank_lines] if rows else [], first_row_line


def _blocks(stream: IO[bytes], place: str) -> Iterator[bytes]:
    """Yield whole lines, some MB at a time, each block ending in a newline."""
    rest, first = b"", True
    while chunk := stream.read(_BLOCK):
        if first:
            chunk, first = chunk.removeprefix(b"\xef\xbb\xbf"), False
        if b"\0" in chunk:
            raise InputError(f"{place}: holds NUL bytes: a binary or UTF-16 file, where a text file is needed")
        cut = chunk.rfind(b"\n") + 1
        if cut:
            yield rest + chunk[:cut]
            rest = b""
        rest += chunk[cut:]
        if len(rest) > _LONGEST_LINE:
            raise InputError(f"{place}: a line of more than {_LONGEST_LINE:,} bytes; is it a rating file?")
    if rest:
        yield rest + b"\n"


def _decode(line: bytes, place: str, number: int) -> str:
    try:
        return line.decode("utf-8").rstrip("\r")
    except UnicodeDecodeError:
        raise InputError(f"{place}:{number}: not UTF-8 text; is it a rating file?") from None


def _split(line: str, separator: str, place: str) -> list[str]:
    fields = line.split(separator)
    if '"' in line and len(separator) == 1:
        try:
            fields = next(csv.reader([line], delimiter=separator, skipinitialspace=separator != " "))
        except (csv.Error, StopIteration) as error:
            raise InputError(f"{place}: quotes that do not match ({error})") from None
    return [field.strip() for field in fields]


def _sniff(
    line: str, place: str, columns: Sequence[str] | Sequence[int] | None, sep: str | None, header: bool | None
) -> _Layout:
    """Find separator, header and columns from the first line."""
    if sep is not None and not (sep == "::" or (len(sep) == 1 and sep.isascii() and sep not in '\r\n"\0')):
        raise InputError(f"sep: expected '::' or one ASCII character, got {sep!r}")
    candidates = (sep,) if sep else _SEPARATORS
    separator = next((mark for mark in candidates if len(_split(line, mark, place)) >= 3), candidates[0])
    fields = _split(line, separator, place)
    if len(fields) < 3:
        raise InputError(f"{place}: expected at least 3 fields (user, item, rating), got {len(fields)}: {line[:40]!r}")
    names = [field.lower().split(":")[0].replace("_", "").replace("-", "").replace(" ", "") for field in fields]
    usual = {role: next((names.index(a) for a in _COLUMN_NAMES[role] if a in names), -1) for role in _ROLES}
    named = all(usual[role] >= 0 for role in _ROLES[:3])
    if columns is not None:
        if not 3 <= len(columns) <= 4:
            raise InputError(f"columns: expected 3 or 4 (user, item, rating[, timestamp]), got {len(columns)}")
        positions = tuple(fields.index(c) if isinstance(c, str) and c in fields else c for c in columns)
        bad = [c for c in positions if not isinstance(c, int) or not 0 <= c < len(fields)]
        if bad:
            raise InputError(f"{place}: columns: {bad[0]!r} is not in this line, which has {', '.join(fields)}")
        by_name = isinstance(columns[0], str)
        return _Layout(separator, len(fields), tuple(map(int, positions)), by_name or (named if header is None else header))
    if named and header is not False:
        return _Layout(separator, len(fields), tuple(p for p in usual.values() if p >= 0), True)
    return _Layout(separator, len(fields), (0, 1, 2, 3)[: 4 if len(fields) == 4 else 3], bool(header))


def _plain_rows(block: bytes, layout: _Layout) -> _Rows | None:
    """Parse a block of plain lines by arrays, or answer None: an unusual or a bad line is somewhere in it."""
    table = PlainTable.of(block, layout.separator.encode(), layout.width)
    if table is None:
        return None
    ids: list[Ids] = []
    for position in layout.positions[:2]:
        column = table.integers(position, canonical=True)
        column = table.texts(position) if column is None else column
        if column is None:
            return None
        ids.append(column)
    values = table.numbers(layout.positions[2])
    timestamps = table.integers(layout.positions[3]) if len(layout.positions) == 4 else None
    if values is None or (timestamps is None and len(layout.positions) == 4):
        return None
    return _Rows(ids[0], ids[1], values, timestamps)


def _careful_rows(block: bytes, first_line: int, place: str, layout: _Layout) -> _Rows:
    """Parse a block line by line: quotes, blanks and rare spellings are understood, and a bad line is named."""
    users: list[str] = []
    items: list[str] = []
    values: list[float] = []
    timestamps: list[int] = []
    blank: list[int] = []
    for number, raw in enumerate(block.split(b"\n")[:-1], first_line):
        line = _decode(raw, place, number)
        if not line.strip():
            blank.append(number)
            continue
        here = f"{place}:{number}"
        fields = _split(line, layout.separator, here)
        if len(fields) != layout.width:
            raise InputError(f"{here}: expected {layout.width} fields, got {len(fields)}")
        user, item, rating = (fields[position] for position in layout.positions[:3])
        for role, text in (("user", user), ("item", item)):
            if not 0 < len(text.encode()) <= _LONGEST_ID:
                raise InputError(f"{here}: {role} id of {len(text.encode())} bytes; expected 1 to {_LONGEST_ID}")
        value = parse_number(rating)
        if value is None:
            hint = " (for a header with other names, say which columns= to read)" if number == 1 else ""
            raise InputError(f"{here}: rating {rating[:40]!r} is not a number{hint}")
        if len(layout.positions) == 4:
            time = parse_number(fields[layout.positions[3]])
            if time is None or not time.is_integer() or abs(time) >= 1e16:
                raise InputError(f"{here}: timestamp {fields[layout.positions[3]][:40]!r} is not a whole number")
            timestamps.append(int(time))
        users.append(user)
        items.append(item)
        values.append(value)
    times = np.array(timestamps, dtype=np.int64) if len(layout.positions) == 4 else None
    return _Rows(_ids(users), _ids(items), np.array(values, dtype=np.float64), times, tuple(blank))


def _ids(texts: list[str]) -> Ids:
    if all(len(t) <= 16 and t.isascii() and t.isdigit() and (t[0] != "0" or t == "0") for t in texts):
        return np.array([int(text) for text in texts], dtype=np.int64)
    return np.array([text.encode() for text in texts], dtype=np.bytes_)


def _codes(parts: list[Ids], max_rows: int | None) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Number the distinct ids in sorted order."""
    if any(part.dtype.kind == "S" for part in parts):
        texts = [text for part in parts for text in part.astype(np.bytes_).tolist()][:max_rows]
        known = sorted(set(texts))
        index = {text: code for code, text in enumerate(known)}
        codes = np.fromiter(map(index.__getitem__, texts), dtype=np.int64, count=len(texts))
        return codes, tuple(text.decode() for text in known)
    numbers = np.concatenate(parts)[:max_rows].astype(np.int64)
    low, span = int(numbers.min()), int(np.ptp(numbers)) + 1
    if span > 4 * len(numbers) + (1 << 20):
        ids, codes = np.unique(numbers, return_inverse=True)
        return codes.astype(np.int64), tuple(map(str, ids.tolist()))
    present = np.zeros(span, dtype=bool)
    present[numbers - low] = True
    code_of = np.cumsum(present, dtype=np.int64) - 1
    return code_of[numbers - low], tuple(map(str, (np.flatnonzero(present) + low).tolist()))


def _resolve_duplicates(data: RatingData, duplicates: str, place: str, line_of: object) -> RatingData:
    """Refuse, keep the last of, or average ratings of one pair; the row kept is where the last one stood."""
    pair = data.users * len(data.item_ids) + data.items
    in_order = np.sort(pair)
    if not (in_order[1:] == in_order[:-1]).any():
        return data
    order = np.argsort(pair, kind="stable")
    same = pair[order][1:] == pair[order][:-1]
    if duplicates == "error":
        second = int(order[1:][same].min())
        first = int(order[np.flatnonzero(order == second)[0] - 1])
        assert callable(line_of)
        raise InputError(
            f"{place}:{line_of(second)}: user {data.user_ids[data.users[second]]!r} rated item "
            f"{data.item_ids[data.items[second]]!r} already on line {line_of(first)}; "
            "choose duplicates='last' or 'mean', or remove one"
        )
    last = np.append(~same, True)
    values = data.values
    if duplicates == "mean":
        group = np.cumsum(np.append(True, ~same)) - 1
        values = values.copy()
        values[order[last]] = np.bincount(group, weights=data.values[order]) / np.bincount(group)
    keep = np.sort(order[last])
    times = None if data.timestamps is None else data.timestamps[keep]
    return replace(data, users=data.users[keep], items=data.items[keep], values=values[keep], timestamps=times)
