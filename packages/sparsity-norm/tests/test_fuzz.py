"""Every reader of this package meets damaged files: it reads them, or refuses them in one line."""

from __future__ import annotations

import functools

import numpy as np

from shared_core.testing import Readers
from sparsity_norm.models import load_model
from sparsity_norm.ratings import RatingMatrix
from sparsity_norm.recommend import AutoRecRecommender
from sparsity_norm.sklearn import SNRegressor

RANDOM = np.random.default_rng(0)

readers = Readers()


@readers
def recommenders(folder):
    users, items = np.divmod(np.arange(40), 8)
    ratings = RatingMatrix.from_triplets(users, items, 1.0 + (users + items) % 5)
    options = {"hidden": 4, "epochs": 1, "device": "cpu", "random_state": 0}
    AutoRecRecommender(**options).fit(ratings).save(folder)
    return sorted(file for file in folder.iterdir() if file.is_file()), functools.partial(load_model, folder)


@readers
def estimators(folder):
    x = RANDOM.random((30, 4))
    model = SNRegressor(hidden=(4,), epochs=1, batch_size=32, random_state=0, device="cpu").fit(x, x[:, 0])
    model.save(folder)
    return sorted(file for file in folder.iterdir() if file.is_file()), lambda: SNRegressor.load(folder).predict(x)


test_valid_files_are_read, test_fuzz = readers.tests(15)
