from __future__ import annotations

import contextlib
import gzip
import io
import os
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared_core.data import RatingData, find, load, read_ratings
from shared_core.data import _ratings as module
from shared_core.data._text import PlainTable, parse_number
from shared_core.errors import InputError

ROWS = b"7\t10\t4.5\t100\n3\t10\t2\t101\n7\t2\t3\t99\n"


def read(text: str | bytes, **options) -> RatingData:
    return read_ratings(io.BytesIO(text if isinstance(text, bytes) else text.encode()), **options)


def message(text: str | bytes, **options) -> str:
    with pytest.raises(InputError) as caught:
        read(text, name="f", **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rows_of(data: RatingData) -> list[tuple]:
    """The ratings by id, as a reader without codes would give them."""
    times = [None] * len(data) if data.timestamps is None else data.timestamps.tolist()
    users, items = (np.array(ids, dtype=object) for ids in (data.user_ids, data.item_ids))
    return list(zip(users[data.users], items[data.items], data.values.tolist(), times, strict=True))


def sorted_ids(ids: set[str]) -> tuple[str, ...]:
    numeric = all(re.fullmatch("0|[1-9][0-9]{0,15}", text) for text in ids)
    return tuple(sorted(ids, key=int if numeric else str.encode))


ids = st.one_of(
    st.integers(0, 10**17).map(str),
    st.text("abcXYZ0123456789_.:é", min_size=1, max_size=12),
    st.sampled_from(["007", "7", "0", "-1", "1e3"]),
)
numbers = st.one_of(
    st.integers(-99, 10**6).map(str),
    st.floats(-1e6, 1e6).map(repr),
    st.sampled_from(["3.50", "+4", "5e-1", ".5", "0004", "123456789.25", "1E2"]),
)
tables = st.lists(st.tuples(ids, ids, numbers, st.integers(-5, 10**12).map(str)), min_size=1, max_size=40)


@settings(deadline=None)
@given(
    table=tables,
    sep=st.sampled_from(["::", "\t", ",", ";", "|"]),
    newline=st.sampled_from(["\n", "\r\n"]),
    blank_every=st.integers(2, 9),
    ending=st.booleans(),
    head=st.booleans(),
    block=st.sampled_from([17, 64, 1 << 22]),
)
def test_reads_what_a_plain_parser_reads(table, sep, newline, blank_every, ending, head, block):
    table = [row for row in table if not any(set(sep) & set(field) for field in row)] or [("1", "2", "3", "4")]
    lines = ["userId,movieId,rating,timestamp".replace(",", sep)] if head else []
    for number, row in enumerate(table):
        lines += [sep.join(row)] + [""] * (number % blank_every == 0)
    original = module._BLOCK
    module._BLOCK = block
    try:
        data = read(newline.join(lines) + newline * ending, sep=sep, duplicates="last")
    finally:
        module._BLOCK = original
    last = {(user, item): (user, item, float(rating), int(time)) for user, item, rating, time in table}
    positions = {(row[0], row[1]): number for number, row in enumerate(table)}
    assert rows_of(data) == sorted(last.values(), key=lambda row: positions[row[:2]])
    assert data.user_ids == sorted_ids({row[0] for row in table})
    assert data.item_ids == sorted_ids({row[1] for row in table})


@settings(deadline=None, max_examples=300)
@given(
    st.one_of(
        st.binary(max_size=200),
        st.text("0123456789.,;:|\t\n\r\"'eE-+ aé\ufeff", max_size=200).map(str.encode),
        st.tuples(st.integers(0, len(ROWS)), st.binary(max_size=3)).map(lambda c: ROWS[: c[0]] + c[1] + ROWS[c[0] :]),
    ),
    st.sampled_from([None, (1.0, 5.0)]),
)
def test_any_bytes_give_ratings_or_one_line(content, scale):
    data = None
    with contextlib.suppress(InputError):
        data = read(content, scale=scale)
    if data is not None:
        assert len(data) > 0
        assert np.isfinite(data.values).all()
        assert len(set(zip(data.users.tolist(), data.items.tolist(), strict=True))) == len(data)


@given(st.lists(st.tuples(st.integers(0, 10**16 - 1), numbers), min_size=1, max_size=50))
def test_fast_columns_are_int_and_float(rows):
    block = "".join(f"{whole},{number}\n" for whole, number in rows).encode()
    table = PlainTable.of(block, b",", 2)
    assert table is not None
    integers, floats = table.integers(0), table.numbers(1)
    assert integers is not None
    assert floats is not None
    assert integers.tolist() == [whole for whole, _ in rows]
    assert floats.tolist() == [float(number) for _, number in rows]


@pytest.mark.parametrize("field", ["", "x", "1x", "1.5", "-1", "12345678901234567", "1_0", "\uff11"])
def test_fast_integers_refuse_what_is_not_digits(field):
    table = PlainTable.of(f"5,{field}\n".encode(), b",", 2)
    assert table is None or table.integers(1) is None


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1_0", "", "x", "1e999"])
def test_only_finite_numbers_are_numbers(text):
    assert parse_number(text) is None


def test_large_file_equals_the_careful_path():
    generator = np.random.default_rng(0)
    n = 60_000
    users, items = generator.integers(1, 7000, n), generator.integers(1, 90_000, n)
    values, times = generator.integers(1, 11, n) / 2, generator.integers(7 * 10**8, 10**9, n)
    columns = zip(users.tolist(), items.tolist(), values.tolist(), times.tolist(), strict=True)
    text = "".join(f"{u}::{i}::{v:g}::{t}\n" for u, i, v, t in columns)
    fast = read(text, duplicates="mean")
    # One blank at the end of each line is enough to leave the array path.
    careful = read(text.replace("\n", " \n"), duplicates="mean")
    for name in ("users", "items", "values", "timestamps"):
        np.testing.assert_array_equal(getattr(fast, name), getattr(careful, name))
    assert (fast.user_ids, fast.item_ids) == (careful.user_ids, careful.item_ids)
    assert fast.provenance.checksum == careful.provenance.checksum


@pytest.mark.parametrize(
    ("text", "options"),
    [
        (ROWS, {}),
        (ROWS.replace(b"\t", b"::"), {}),
        (ROWS.replace(b"\t", b","), {}),
        (b"\xef\xbb\xbfuserId,movieId,rating,timestamp\r\n" + ROWS.replace(b"\t", b",").replace(b"\n", b"\r\n"), {}),
        (b"\n\n" + ROWS, {}),
        (b"user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + ROWS, {}),
        (b"when;stars;who;what\n100;4.5;7;10\n101;2;3;10\n99;3;7;2\n", {"columns": ["who", "what", "stars", "when"]}),
        (b"100|4.5|7|10\n101|2|3|10\n99|3|7|2\n", {"columns": [2, 3, 1, 0]}),
        (b'"user","item","rating","timestamp"\n"7","10",4.5,100\n"3", 10,2,101\n7,"2",3,99\n', {}),
        (b"a b c d\n" + ROWS.replace(b"\t", b" "), {"header": True}),
        (gzip.compress(ROWS, mtime=0), {}),
    ],
    ids=lambda value: None if isinstance(value, bytes) else ",".join(value) or "sniffed",
)
def test_layouts(tmp_path, text, options):
    path = tmp_path / "ratings"
    path.write_bytes(text)
    data = read_ratings(path, **options)
    assert rows_of(data) == [("7", "10", 4.5, 100), ("3", "10", 2.0, 101), ("7", "2", 3.0, 99)]
    assert data.users.tolist() == [1, 0, 1]
    assert data.item_ids == ("2", "10")
    assert (data.scale, data.shape, data.density) == ((2.0, 4.5), (2, 2), 0.75)
    np.testing.assert_array_equal(data.to_csr().toarray(), [[0, 2], [3, 4.5]])


def test_ids_that_are_not_numbers_sort_as_text():
    data = read("u9,i,1\nu10,i,2\nü,7,3\n")
    assert data.user_ids == ("u10", "u9", "ü")
    assert data.item_ids == ("7", "i")
    assert data.timestamps is None
    assert read("07,1,1\n7,1,2\n").user_ids == ("07", "7")


def test_max_rows_limits_ids_too():
    data = read(ROWS, max_rows=1)
    assert rows_of(data) == [("7", "10", 4.5, 100)]
    assert data.user_ids == ("7",)


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("1,2,3,4\n1,3,3\n", {}, "f:2: expected 4 fields, got 3"),
        ("1,2,3,4\n\n\n1,3,3,4,5\n", {}, "f:4: expected 4 fields, got 5"),
        ("1,2,3\n1,3,x\n", {}, "f:2: rating 'x' is not a number"),
        ("1,2,3\n1,3,nan\n", {}, "f:2: rating 'nan' is not a number"),
        ("a,b,c\n1,2,3\n", {}, "f:1: rating 'c' is not a number; if this is a header, say which columns= to read"),
        ("1,2,3,4\n1,3,3,4.5\n", {}, "f:2: timestamp '4.5' is not a whole number"),
        ("user,item,rating\n\n1,2,3\n1,3,7\n", {"scale": (1.0, 5.0)}, "f:4: rating 7 outside the declared scale 1..5"),
        ("1,2,0.5\n", {"scale": (1.0, 5.0)}, "f:1: rating 0.5 outside the declared scale 1..5"),
        (
            "1,2,3\n\n1,4,3\n1,2,5\n",
            {},
            "f:4: user '1' rated item '2' already on line 1; remove one, or choose duplicates='last' or 'mean'",
        ),
        ("1,,3\n", {}, "f:1: a user or item id that is empty or longer than 256 bytes"),
        (f"1,{'é' * 200},3\n", {}, "f:1: a user or item id that is empty or longer than 256 bytes"),
        ("1,2\n", {}, "f:1: expected at least 3 fields (user, item, rating), got 2: '1,2'"),
        ("just words\n", {}, "f:1: expected at least 3 fields (user, item, rating), got 2: 'just words'"),
        ("", {}, "f: holds no ratings"),
        ("\n \n\r\n", {}, "f: holds no ratings"),
        ("user,item,rating\n", {}, "f: holds no ratings"),
        (b"1,2,3\n1\0,2,3\n", {}, "f: holds NUL bytes: a binary or UTF-16 file, where a text file is needed"),
        (b"1,2,3\n\xff\xfe,2,3\n", {}, "f:2: not UTF-8 text; is it a rating file?"),
        ("a" * 70_000, {}, "f: a line of more than 65,536 bytes; is it a rating file?"),
        ("1,2,3\n", {"columns": [0, 1, 3]}, "f:1: columns 0, 1, 3: not 3 or 4 of '1', '2', '3'"),
        ("u,i,r\n1,2,3\n", {"columns": ["u", "i", "q"]}, "f:1: columns 'u', 'i', 'q': not 3 or 4 of 'u', 'i', 'r'"),
        ("1,2,3\n", {"sep": "::::"}, "sep: expected '::' or one ASCII character, got '::::'"),
        ("1,2,3\n", {"scale": (5.0, 1.0)}, "scale: the lowest rating must be below the highest, got 5..1"),
        ("1,2,3\n", {"max_rows": 0}, "max_rows: must be at least 1, got 0"),
    ],
)
def test_bad_files_are_named_by_line(text, options, expected):
    assert message(text, **options) == expected


def test_bad_choice_of_duplicates(unchecked):
    assert message("1,2,3\n", duplicates="first") == "duplicates: expected 'error', 'mean' or 'last', got 'first'"


def test_lines_are_counted_across_blocks(monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 16)
    good = "".join(f"{user},{user % 7},3\n" for user in range(100, 200))
    assert message(f"\nuser,item,rating\n{good}\n1,2,x\n") == "f:104: rating 'x' is not a number"
    assert message(f"{good}\n{good[:8]}") == "f:102: user '100' rated item '2' already on line 1; " + (
        "remove one, or choose duplicates='last' or 'mean'"
    )


def test_duplicates_last_and_mean():
    text = "1,5,1,10\n2,5,4,11\n1,5,2,12\n1,6,3,13\n1,5,6,14\n"
    assert rows_of(read(text, duplicates="last")) == [("2", "5", 4, 11), ("1", "6", 3, 13), ("1", "5", 6, 14)]
    assert rows_of(read(text, duplicates="mean")) == [("2", "5", 4, 11), ("1", "6", 3, 13), ("1", "5", 3, 14)]


def test_files_that_cannot_be_read(tmp_path):
    truncated, folder = tmp_path / "cut.csv.gz", tmp_path / "folder"
    truncated.write_bytes(gzip.compress(b"".join(b"%d,2,3\n" % user for user in range(5000)))[:-20])
    folder.mkdir()
    for path, expected in [(truncated, "truncated"), (folder, "is a folder"), (tmp_path / "absent", "no such file")]:
        with pytest.raises(InputError, match=expected) as caught:
            read_ratings(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_file_without_permission(tmp_path):
    path = tmp_path / "ratings.csv"
    path.write_text("1,2,3\n")
    path.chmod(0)
    with pytest.raises(InputError, match="may not be read"):
        read_ratings(path)


def test_movielens_100k():
    if not os.environ.get("SHARED_CORE_DATA"):
        pytest.skip("SHARED_CORE_DATA is not set")
    data = load("movielens-100k", expect=RatingData)
    assert (len(data), data.shape, data.scale) == (100_000, (943, 1682), (1.0, 5.0))
    assert data.values.mean() == pytest.approx(3.52986, abs=1e-9)
    assert data.density == pytest.approx(0.0630, abs=1e-4)
    first = np.array(data.user_ids)[data.users[0]], np.array(data.item_ids)[data.items[0]], data.values[0]
    assert first == ("196", "242", 3.0)
    lines = (find("ml-100k") / "u.data").read_text().splitlines()
    expected = [(u, i, float(r), int(t)) for u, i, r, t in map(str.split, lines)]
    assert rows_of(data) == expected
