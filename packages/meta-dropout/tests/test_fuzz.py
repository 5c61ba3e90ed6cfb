"""Every reader of this package meets damaged files: it reads them, or refuses them in one line."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meta_dropout.backbones import mlp
from meta_dropout.learner import MetaLearner
from shared_core.classes import load_classes
from shared_core.testing import fuzz, fuzz_file

READERS = {}


def reader(make):
    """Name what writes valid files into a folder and returns them with what reads them."""
    READERS[make.__name__] = make
    return make


@reader
def learners(folder):
    network = {"inputs": 4, "outputs": 3, "hidden": (8,)}
    made = MetaLearner(mlp(**network), "meta-dropout", inner_lr=0.1, inner_steps=1, test_samples=2)
    path = folder / "m.safetensors"
    made.save(path, network={"kind": "mlp", **network})
    return [path], functools.partial(MetaLearner.load, path)


@reader
def pictures(folder):
    path = folder / "a.npz"
    np.savez(path, x=np.zeros((6, 9, 9), np.uint8), y=np.arange(6) % 3)
    return [path], functools.partial(load_classes, path, split="all")


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
