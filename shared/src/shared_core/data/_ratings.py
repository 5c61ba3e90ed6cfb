"""Rating files of any common layout, parsed at memory speed; a bad line is reported by file and line."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from shared_core.arrays import open_bytes
from shared_core.data._datasets import Provenance, RatingData
from shared_core.data._files import reading, sha256_of
from shared_core.data._text import PlainTable, parse_number
from shared_core.errors import InputError

_BLOCK = 1 << 22
_LONGEST_LINE, _LONGEST_ID = 1 << 16, 256
_BLANK_LINES = re.compile(rb"(?:[ \t\r]*\n)*")
_SEPARATORS = ("::", "\t", ",", ";", "|", " ")
_HEADER_NAMES = {
    "user": "user userid uid reviewerid customerid",
    "item": "item itemid iid movie movieid product productid asin book bookid isbn",
    "rating": "rating ratings value score overall stars bookrating",
    "timestamp": "timestamp time ts unixreviewtime",
}
Columns = Sequence[str] | Sequence[int] | None
Ids = NDArray[Any]


@dataclass(frozen=True)
class _Layout:
    separator: str
    width: int
    positions: tuple[int, ...]
    has_header: bool


@dataclass(frozen=True)
class _Rows:
    """Ratings of one block with the line number of each; ids are numbers where all of the block's are."""

    lines: Sequence[int]
    users: Ids
    items: Ids
    values: NDArray[np.float64]
    times: NDArray[np.int64] | None


def read_ratings(
    path: str | Path | io.BufferedIOBase,
    *,
    columns: Columns = None,
    sep: str | None = None,
    header: bool | None = None,
    scale: tuple[float, float] | None = None,
    duplicates: Literal["error", "mean", "last"] = "error",
    max_rows: int | None = None,
    name: str | None = None,
) -> RatingData:
    r"""Read a file of ratings: ``u.data``, ``ratings.dat``, any CSV or TSV with a line per rating, also as ``.gz``.

    Parameters
    ----------
    path : the file, or a binary stream of text.
    columns : where user, item, rating (and, if wanted, timestamp) stand: header names or positions from 0. Default:
        by the usual header names (userId, user_id, movieId, item, rating, score, timestamp ...); in a file without
        header the first three columns and, of exactly four, the last as timestamp.
    sep : ``"::"`` or one character; default: the first of ``:: TAB , ; |`` and space that gives three fields.
    header : whether the first line is one; default: when it holds the column names.
    scale : lowest and highest rating allowed, both included; default: not checked, and set to what was found.
    duplicates : what to do when a user rated an item twice: refuse ("error"), keep the "last", take the "mean".
    max_rows : read only so many ratings from the start.
    name : what messages call the file; default: its path.

    Returns
    -------
    RatingData : in file order. Ids sort by number when all are whole numbers of at most 16 digits, else by text.

    Raises
    ------
    InputError : one line with file and line, for anything that cannot be read without guessing.

    Examples
    --------
    >>> import io
    >>> ratings = read_ratings(io.BytesIO(b"userId,movieId,rating\n7,10,4.5\n3,10,2\n"))
    >>> ratings.user_ids, ratings.users.tolist(), ratings.values.tolist(), ratings.scale
    (('3', '7'), [1, 0], [4.5, 2.0], (2.0, 4.5))
    """
    if duplicates not in ("error", "mean", "last"):
        raise InputError(f"duplicates: expected 'error', 'mean' or 'last', got {duplicates!r}")
    if scale is not None and not scale[0] < scale[1]:
        raise InputError(f"scale: the lowest rating must be below the highest, got {scale[0]:g}..{scale[1]:g}")
    if max_rows is not None and max_rows < 1:
        raise InputError(f"max_rows: must be at least 1, got {max_rows}")
    place = name or (str(path) if isinstance(path, str | Path) else "ratings")
    with reading(place):
        stream = open_bytes(Path(path)) if isinstance(path, str | Path) else path
    with stream:
        parts = list(_parse(stream, place, columns, sep, header, max_rows))
    if not parts:
        raise InputError(f"{place}: holds no ratings")

    def line_of(row: int) -> int:
        for part in parts:
            if row < len(part.lines):
                return part.lines[row]
            row -= len(part.lines)
        raise IndexError(row)

    values = np.concatenate([part.values for part in parts])[:max_rows]
    low, high = map(float, scale or (values.min(), values.max()))
    outside = np.flatnonzero((values < low) | (values > high))
    if len(outside):
        found, line = values[outside[0]], line_of(int(outside[0]))
        raise InputError(f"{place}:{line}: rating {found:g} outside the declared scale {low:g}..{high:g}")
    users, user_ids = _codes([part.users for part in parts], max_rows)
    items, item_ids = _codes([part.items for part in parts], max_rows)
    found = [part.times for part in parts if part.times is not None]
    times = np.concatenate(found)[:max_rows] if found else None
    origin = Provenance(Path(place).name, "unknown: a file of the user", "", "")
    data = RatingData(Path(place).name, "all", origin, users, items, values, times, user_ids, item_ids, (low, high))
    data = _resolve_duplicates(data, duplicates, place, line_of)
    arrays = [array for array in (data.users, data.items, data.values, data.timestamps) if array is not None]
    return replace(data, provenance=replace(origin, checksum=sha256_of(*arrays)))


def _parse(
    stream: io.BufferedIOBase, place: str, columns: Columns, sep: str | None, header: bool | None, max_rows: int | None
) -> Iterator[_Rows]:
    layout: _Layout | None = None
    line, rows = 1, 0
    for block in _blocks(stream, place):
        number, line = line, line + block.count(b"\n")
        blank = _BLANK_LINES.match(block)
        body = block[blank.end() if blank else 0 :]
        number = line - body.count(b"\n")
        if layout is None and body:
            first, _, rest = body.partition(b"\n")
            layout = _sniff(_decode(first, f"{place}:{number}"), f"{place}:{number}", columns, sep, header)
            body, number = (rest, number + 1) if layout.has_header else (body, number)
        if layout is not None and body:
            part = _plain_rows(body, number, layout) or _careful_rows(body, number, place, layout)
            rows += len(part.lines)
            if len(part.lines):
                yield part
        if max_rows is not None and rows >= max_rows:
            return


def _blocks(stream: io.BufferedIOBase, place: str) -> Iterator[bytes]:
    """Yield whole lines, some MB at a time, each block ending in a newline."""
    rest, first = b"", True
    while True:
        with reading(place):
            chunk = stream.read(_BLOCK)
        if not chunk:
            break
        chunk, first = chunk.removeprefix(b"\xef\xbb\xbf") if first else chunk, False
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


def _decode(line: bytes, here: str) -> str:
    try:
        return line.decode("utf-8").rstrip("\r")
    except UnicodeDecodeError:
        raise InputError(f"{here}: not UTF-8 text; is it a rating file?") from None


def _split(line: str, separator: str, here: str) -> list[str]:
    fields = line.split(separator)
    if '"' in line and len(separator) == 1:
        try:
            fields = next(csv.reader([line], delimiter=separator, skipinitialspace=separator != " "))
        except (csv.Error, StopIteration) as error:
            raise InputError(f"{here}: quotes that do not match ({error})") from None
    return [field.strip() for field in fields]


def _sniff(line: str, here: str, columns: Columns, sep: str | None, header: bool | None) -> _Layout:
    """Find separator, columns and header from the first line."""
    if sep is not None and sep != "::" and not (len(sep) == 1 and sep.isascii() and sep not in '\r\n"'):
        raise InputError(f"sep: expected '::' or one ASCII character, got {sep!r}")
    split = {mark: _split(line, mark, here) for mark in ((sep,) if sep else _SEPARATORS)}
    separator = next((mark for mark in split if len(split[mark]) >= 3), max(split, key=lambda mark: len(split[mark])))
    fields = split[separator]
    if len(fields) < 3:
        raise InputError(f"{here}: expected at least 3 fields (user, item, rating), got {len(fields)}: {line[:40]!r}")
    names = [re.sub(r":.*|[_\- ]", "", field.lower()) for field in fields]
    usual = [next((names.index(n) for n in known.split() if n in names), -1) for known in _HEADER_NAMES.values()]
    named = min(usual[:3]) >= 0
    if columns is not None:
        found = [fields.index(c) if isinstance(c, str) and c in fields else c for c in columns]
        positions = tuple(c for c in found if isinstance(c, int) and 0 <= c < len(fields))
        if len(positions) != len(columns) or not 3 <= len(positions) <= 4:
            raise InputError(
                f"{here}: columns {', '.join(map(repr, columns))}: not 3 or 4 of {', '.join(map(repr, fields))}"
            )
        return _Layout(separator, len(fields), positions, isinstance(columns[0], str) or bool(header))
    if named and header is not False:
        return _Layout(separator, len(fields), tuple(position for position in usual if position >= 0), True)
    return _Layout(separator, len(fields), (0, 1, 2, 3)[: 4 if len(fields) == 4 else 3], bool(header))


def _plain_rows(block: bytes, line: int, layout: _Layout) -> _Rows | None:
    """Parse a block of plain lines by arrays, or answer None: an unusual or a bad line is somewhere in it."""
    table = PlainTable.of(block, layout.separator.encode(), layout.width)
    if table is None:
        return None
    user, item, rating, *time = layout.positions
    users, items, values = table.ids(user), table.ids(item), table.numbers(rating)
    times = table.integers(time[0]) if time else None
    if users is None or items is None or values is None or (time and times is None):
        return None
    return _Rows(range(line, line + len(values)), users, items, values, times)


def _careful_rows(block: bytes, line: int, place: str, layout: _Layout) -> _Rows:
    """Parse a block line by line: quotes, blanks and rare spellings are understood, and a bad line is named."""
    rows: list[tuple[int, str, str, float, int]] = []
    user_column, item_column, rating_column, *time_column = layout.positions
    for number, raw in enumerate(block.split(b"\n")[:-1], line):
        here = f"{place}:{number}"
        text = _decode(raw, here)
        if not text.strip():
            continue
        fields = _split(text, layout.separator, here)
        if len(fields) != layout.width:
            raise InputError(f"{here}: expected {layout.width} fields, got {len(fields)}")
        user, item, rating = fields[user_column], fields[item_column], fields[rating_column]
        if not 0 < min(len(user), len(item)) <= max(len(user.encode()), len(item.encode())) <= _LONGEST_ID:
            raise InputError(f"{here}: a user or item id that is empty or longer than {_LONGEST_ID} bytes")
        value, time = parse_number(rating), 0.0
        if value is None:
            hint = "; if this is a header, say which columns= to read" if number == 1 else ""
            raise InputError(f"{here}: rating {rating[:40]!r} is not a number{hint}")
        if time_column:
            time = parse_number(fields[time_column[0]])
            if time is None or not time.is_integer() or abs(time) >= 1e16:
                raise InputError(f"{here}: timestamp {fields[time_column[0]][:40]!r} is not a whole number")
        rows.append((number, user, item, value, int(time)))
    lines, users, items, values, times = zip(*rows, strict=True) if rows else ((), (), (), (), ())
    stamps = np.array(times, dtype=np.int64) if time_column else None
    return _Rows(lines, _ids(users), _ids(items), np.array(values, dtype=np.float64), stamps)


def _ids(texts: Sequence[str]) -> Ids:
    if all(re.fullmatch(r"0|[1-9][0-9]{0,15}", text) for text in texts):
        return np.array([int(text) for text in texts], dtype=np.int64)
    return np.array([text.encode() for text in texts], dtype=np.bytes_)


def _codes(parts: list[Ids], max_rows: int | None) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Return the code of each id and the distinct ids in sorted order."""
    if all(part.dtype.kind == "i" for part in parts):
        numbers = np.concatenate(parts)[:max_rows]
        low, span = int(numbers.min()), int(np.ptp(numbers)) + 1
        if span <= 4 * len(numbers) + (1 << 20):
            present = np.zeros(span, dtype=bool)
            present[numbers - low] = True
            code_of = np.cumsum(present, dtype=np.int64) - 1
            return code_of[numbers - low], tuple(map(str, (np.flatnonzero(present) + low).tolist()))
        found = numbers.tolist()
    else:
        found = [text.decode() for part in parts for text in part.astype(np.bytes_).tolist()][:max_rows]
    known = sorted(set(found))
    index = {key: code for code, key in enumerate(known)}
    return np.fromiter(map(index.__getitem__, found), np.int64, len(found)), tuple(map(str, known))


def _resolve_duplicates(data: RatingData, how: str, place: str, line_of: Callable[[int], int]) -> RatingData:
    """Refuse, keep the last of, or average ratings of one pair; the row kept is where the last one stood."""
    pair = data.users * len(data.item_ids) + data.items
    in_order = np.sort(pair)
    if not (in_order[1:] == in_order[:-1]).any():
        return data
    order = np.argsort(pair, kind="stable")
    same = np.diff(pair[order]) == 0
    if how == "error":
        second = int(order[1:][same].min())
        first = int(order[np.flatnonzero(order == second)[0] - 1])
        user, item = data.user_ids[data.users[second]], data.item_ids[data.items[second]]
        raise InputError(
            f"{place}:{line_of(second)}: user {user!r} rated item {item!r} already on line {line_of(first)}; "
            "remove one, or choose duplicates='last' or 'mean'"
        )
    values, last = data.values.copy(), np.append(~same, True)
    if how == "mean":
        group = np.cumsum(np.append(True, ~same)) - 1
        values[order[last]] = np.bincount(group, weights=data.values[order]) / np.bincount(group)
    keep = np.sort(order[last])
    times = None if data.timestamps is None else data.timestamps[keep]
    return replace(data, users=data.users[keep], items=data.items[keep], values=values[keep], timestamps=times)
