"""Every reader of this package meets damaged files: it reads them, or refuses them in one line."""

from __future__ import annotations

import functools

import numpy as np

from cib_ite.data import draws, load
from cib_ite.estimator import CIB
from shared_core.testing import Readers

RANDOM = np.random.default_rng(0)

readers = Readers()


@readers
def tables(folder):
    path = folder / "a.csv"
    path.write_text("age,sex,treatment,y\n" + "".join(f"{k}.5,{'mf'[k % 2]},{k % 3 % 2},{k / 7}\n" for k in range(20)))
    return [path], functools.partial(load, path, treatment="treatment", outcome="y")


@readers
def simulated(folder):
    path = folder / "a.npz"
    shape = (12, 2)
    arrays = {name: RANDOM.random(shape) for name in ("yf", "ycf", "mu0", "mu1")}
    np.savez(path, x=RANDOM.random((12, 3, 2)), t=RANDOM.integers(0, 2, shape), ate=np.array(4.0), **arrays)
    return [path], lambda: (draws(path), load(path))


@readers
def models(folder):
    x = RANDOM.random((60, 3))
    t = np.arange(60) % 2
    small = {"trunk": (4,), "heads": (4,), "discriminator": (4,), "latent": 2, "steps": 4, "n_members": 2}
    path = folder / "model.safetensors"
    CIB(**small, device="cpu", random_state=0).fit(x, t, x[:, 0] + t).save(path)
    return [path], lambda: CIB.load(path).predict(x)


test_valid_files_are_read, test_fuzz = readers.tests(15)
