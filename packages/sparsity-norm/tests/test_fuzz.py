"""Every reader of this package meets damaged files: it reads them, or refuses them in one line."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_core.testing import fuzz, fuzz_file
from sparsity_norm.models import load_model
from sparsity_norm.ratings import RatingMatrix
from sparsity_norm.recommend import AutoRecRecommender
from sparsity_norm.sklearn import SNRegressor

RANDOM = np.random.default_rng(0)

READERS = {}


def reader(make):
    """Name what writes valid files into a folder and returns them with what reads them."""
    READERS[make.__name__] = make
    return make


@reader
def recommenders(folder):
    users, items = np.divmod(np.arange(40), 8)
    ratings = RatingMatrix.from_triplets(users, items, 1.0 + (users + items) % 5)
    options = {"hidden": 4, "epochs": 1, "device": "cpu", "random_state": 0}
    AutoRecRecommender(**options).fit(ratings).save(folder)
    return sorted(file for file in folder.iterdir() if file.is_file()), functools.partial(load_model, folder)


@reader
def estimators(folder):
    x = RANDOM.random((30, 4))
    model = SNRegressor(hidden=(4,), epochs=1, batch_size=32, random_state=0, device="cpu").fit(x, x[:, 0])
    model.save(folder)
    return sorted(file for file in folder.iterdir() if file.is_file()), lambda: SNRegressor.load(folder).predict(x)


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
