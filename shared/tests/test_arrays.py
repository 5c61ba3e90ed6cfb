from __future__ import annotations

import gzip
import io
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_core.arrays import open_bytes, read_arrays
from shared_core.errors import InputError
from shared_core.testing import fuzz, fuzz_file

ARRAYS = {"x": np.arange(6.0).reshape(2, 3), "y": np.array(["a", "é"]), "n": np.array(3, dtype=">i2")}


def test_what_was_saved_is_read(tmp_path):
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", **ARRAYS)
        read = read_arrays(tmp_path / "a.npz")
        assert read.keys() == ARRAYS.keys()
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(read[name], array)
    assert list(read_arrays(tmp_path / "a.npz", names=["y", "z"])) == ["y"]
    np.save(tmp_path / "a.npy", ARRAYS["x"])
    np.testing.assert_array_equal(read_arrays(tmp_path / "a.npy", single=True)[""], ARRAYS["x"])


def npy(header, content=b""):
    head = str(header).encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + content


def npz(**members):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return packed.getvalue()


def saved(array, **options):
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


HEADER = {"descr": "<f8", "fortran_order": False, "shape": (3,)}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is not an NPZ file; save arrays with numpy.savez"),
        (b"PK\x03\x04 and no more", "not a whole NPZ file"),
        (npz(x=saved(np.array([{}]))), "'x' holds Python objects, which are never unpickled; save numbers"),
        (saved(np.arange(3)), r"is one array; give an NPZ of named ones: numpy\.savez"),
        (npz(x=npy(HEADER, bytes(16))), "not a whole NPZ file"),
        (npz(x=npy(HEADER | {"shape": (1 << 60,)}, bytes(16))), "not a whole NPZ file"),
        (npz(x=npy(HEADER | {"descr": "|S0", "shape": (1 << 40,)})), r"'x' is an array of \|S0"),
        (npz(x=npy(HEADER | {"descr": [("a", "<f4")]}, bytes(12))), "'x' is an array of"),
        (npz(x=npy("__import__('os').getcwd()", bytes(24))), "not a whole NPZ file"),
        (npz(x=saved(np.array(["ab"])).replace(b"b\0\0\0", b"\xff\xff\xff\0")), "'x' holds texts that are damaged"),
        (npz(x=bytes(3000)), "its arrays take 3,000 bytes, at most 2,000 are read"),
    ],
)
def test_other_files_are_refused(tmp_path, content, said):
    path = tmp_path / "f.npz"
    path.write_bytes(content)
    with pytest.raises(InputError, match=said) as error:
        read_arrays(path, most_bytes=2000)
    assert len(str(error.value).splitlines()) == 1


def test_absent_files_and_folders(tmp_path):
    with pytest.raises(InputError, match=r"No such file.*check the path"):
        read_arrays(tmp_path / "none.npz")
    with pytest.raises(InputError, match="check the path"):
        read_arrays(tmp_path)


@fuzz(80)
@given(st.data())
def test_fuzz(tmp_path, data):
    path = tmp_path / "a.npz"
    np.savez(path, **ARRAYS)
    fuzz_file(data, path, lambda: {name: array.tolist() for name, array in read_arrays(path).items()})


def test_a_small_file_that_holds_too_much_is_refused(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(gzip.compress(b"x,y\n" + b"1,2\n" * 50_000))
    with open_bytes(path) as stream:
        assert stream.readline() == b"x,y\n"
        assert len(stream.read()) == 200_000
    with (
        pytest.raises(InputError, match=r"a\.csv: holds more than 1,000 bytes"),
        open_bytes(path, most_bytes=1000) as stream,
    ):
        stream.read()
    path.write_bytes(b"x,y\n")
    with open_bytes(path, most_bytes=1) as stream:
        assert stream.read() == b"x,y\n"
    with pytest.raises(OSError, match="No such file"):
        open_bytes(tmp_path / "b.csv")
