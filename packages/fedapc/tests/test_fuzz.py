"""Every reader of this package meets damaged files: it reads them, or refuses them in one line."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedapc.data import read_tasks, write_example
from shared_core.testing import fuzz, fuzz_file

READERS = {}


def reader(make):
    """Name what writes valid files into a folder and returns them with what reads them."""
    READERS[make.__name__] = make
    return make


@reader
def tasks(folder):
    path = write_example(folder)
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return files, functools.partial(read_tasks, path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return functools.cache(lambda name: READERS[name](tmp_path_factory.mktemp(name)))


@pytest.mark.parametrize("name", READERS)
def test_valid_files_are_read(name, made):
    made(name)[1]()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", READERS)
@fuzz(15)
@given(data=st.data())
def test_fuzz(name, made, data):
    files, read = made(name)
    fuzz_file(data, data.draw(st.sampled_from(files)), read)
