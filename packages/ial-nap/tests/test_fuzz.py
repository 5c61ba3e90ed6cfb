"""Every reader of this package meets damaged files: it reads them, or refuses them in one line."""

from __future__ import annotations

import functools
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ial_nap.annotations import Annotation, read_jsonl, to_jsonl
from ial_nap.data import load_data
from shared_core.testing import fuzz, fuzz_file

RANDOM = np.random.default_rng(0)

READERS = {}


def reader(make):
    """Name what writes valid files into a folder and returns them with what reads them."""
    READERS[make.__name__] = make
    return make


@reader
def tables(folder):
    lines = [f"{name},{2000 + k},{name in 'bd':d},{k}.5,{1 / (1 + k)}" for name in "abcd" for k in range(3)]
    path = folder / "a.csv"
    path.write_text("\n".join(["id,time,label,LDL,HDL", *lines]))
    return [path], functools.partial(load_data, path)


@reader
def arrays(folder):
    path = folder / "a.npz"
    np.savez(path, X=RANDOM.random((6, 3, 2)), y=np.arange(6) % 2, feature_names=["LDL", "HDL"], lengths=[3] * 6)
    return [path], functools.partial(load_data, path)


@reader
def released(folder):
    parts = ("train", "validation", "evaluation")
    content = {f"{part}_inputs": RANDOM.random((4, 3, 2)) for part in parts}
    content |= {f"{part}_labels": np.arange(4)[:, None] % 2 for part in parts} | {"feature_names": ["LDL", "HDL"]}
    path = folder / "a.pkl"
    path.write_bytes(pickle.dumps(content, 4))
    return [path], functools.partial(load_data, path)


@reader
def verdicts(folder):
    path = folder / "v.jsonl"
    log = [Annotation("p", 0, "LDL", 1, annotator="a"), Annotation("p", 1, "HDL", 0, annotator="b")]
    path.write_text(to_jsonl(log), encoding="utf-8")
    return [path], lambda: (read_jsonl(path, skip_bad=True), read_jsonl(path))


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
