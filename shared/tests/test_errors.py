"""The wordings that ten packages have in common."""

import pytest

from shared_core.errors import InputError, no_such, not_installed


def test_long_lists_are_cut_and_counted():
    said = str(no_such("column", "x", [f"c{i}" for i in range(100)], where="a.csv"))
    assert said.startswith("a.csv: no column 'x'; there are c0, c1, ")
    assert said.endswith("c7, ... (100 in all)")


def test_it_is_an_input_error_and_a_key_error():
    error = no_such("method", "foo", ["bar"])
    assert isinstance(error, InputError)
    assert isinstance(error, KeyError)
    assert str(error) == "no method 'foo'; there are bar"


@pytest.mark.parametrize(("install", "shown"), [("ray", "ray"), ("stamp[onnx]", "'stamp[onnx]'"), ("a>=2", "'a>=2'")])
def test_what_a_shell_would_read_otherwise_is_quoted(install, shown):
    assert str(not_installed("x", "y", install)) == f"x needs y, which is not installed: pip install {shown}"


def test_a_message_is_one_line_whatever_a_file_put_into_it():
    hostile = "\x1b[31m\n\r\x0b\u2028\ud800é"
    for error in (InputError(hostile), no_such("column", hostile, ["age"])):
        assert len(str(error).splitlines()) == 1
        assert str(error).isprintable()
        assert r"\x1b[31m" in str(error)
        assert "é" in str(error)
