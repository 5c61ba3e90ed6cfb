"""Every reader of this package meets damaged files: it reads them, or refuses them in one line."""

from __future__ import annotations

import functools

import numpy as np

from meta_dropout.backbones import mlp
from meta_dropout.learner import MetaLearner
from shared_core.classes import load_classes
from shared_core.testing import Readers

readers = Readers()


@readers
def learners(folder):
    network = {"inputs": 4, "outputs": 3, "hidden": (8,)}
    made = MetaLearner(mlp(**network), "meta-dropout", inner_lr=0.1, inner_steps=1, test_samples=2)
    path = folder / "m.safetensors"
    made.save(path, network={"kind": "mlp", **network})
    return [path], functools.partial(MetaLearner.load, path)


@readers
def pictures(folder):
    path = folder / "a.npz"
    np.savez(path, x=np.zeros((6, 9, 9), np.uint8), y=np.arange(6) % 3)
    return [path], functools.partial(load_classes, path, split="all")


test_valid_files_are_read, test_fuzz = readers.tests(15)
