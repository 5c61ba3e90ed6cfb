"""Every reader of this package meets damaged files: it reads them, or refuses them in one line."""

from __future__ import annotations

import functools

import numpy as np

from bayes_taml.learner import MetaLearner
from bayes_taml.networks import conv_features
from bayes_taml.pictures import read_query, read_support
from shared_core.testing import Readers

NETWORK = {"size": 8, "filters": 3, "blocks": 2, "norm": "batch"}

readers = Readers()


@readers
def learners(folder):
    made = MetaLearner(conv_features(**NETWORK), "bayesian-taml", input_shape=(1, 8, 8), inner_steps=1, max_shot=3)
    path = folder / "m.safetensors"
    made.save(path, network=NETWORK)
    return [path], functools.partial(MetaLearner.load, path)


@readers
def pictures(folder):
    files = [folder / "support.npz", folder / "query.npz"]
    for file in files:
        np.savez(file, x=np.random.default_rng(0).integers(0, 256, (6, 9, 9)).astype(np.uint8), y=np.arange(6) % 3)

    def read():
        known = read_support(files[0], 8, 1)
        return read_query(files[1], 8, 1, known)

    return files, read


test_valid_files_are_read, test_fuzz = readers.tests(15)
