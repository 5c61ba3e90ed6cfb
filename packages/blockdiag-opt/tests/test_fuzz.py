"""Every reader of this package meets damaged files: it reads them, or refuses them in one line."""

from __future__ import annotations

import functools

import numpy as np
from safetensors.torch import save_file
from torch import nn

from blockdiag_opt.userdata import read_shapes, read_table
from shared_core.testing import Readers

readers = Readers()


@readers
def tables(folder):
    (folder / "a.csv").write_text("age,dose,y\n3,0.5,1\n4,1e-3,0\n5,2,1\n")
    (folder / "b.tsv").write_text("age\tdose\n3\t0.5\n4\t1\n")
    np.savez(folder / "c.npz", x=np.arange(12.0).reshape(3, 2, 2), y=np.arange(3))
    files = [folder / name for name in ("a.csv", "b.tsv", "c.npz")]
    return files, lambda: [read_table(file) for file in files]


@readers
def weights(folder):
    save_file(nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)).state_dict(), folder / "w.safetensors")
    return [folder / "w.safetensors"], functools.partial(read_shapes, folder / "w.safetensors")


test_valid_files_are_read, test_fuzz = readers.tests(15)
