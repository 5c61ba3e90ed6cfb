"""Every reader of this package meets damaged files: it reads them, or refuses them in one line."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from shared_core.testing import fuzz, fuzz_file
from stamp._files import read_weights, save_weights
from stamp.groups import trace
from stamp.networks import smallconv
from stamp.plan import PrunePlan
from stamp.sources import read_examples

READERS = {}


def reader(make):
    """Name what writes valid files into a folder and returns them with what reads them."""
    READERS[make.__name__] = make
    return make


@reader
def tables(folder):
    (folder / "a.csv").write_text("age,dose,class\n" + "".join(f"{k},{k / 3},{'xyz'[k % 3]}\n" for k in range(30)))
    np.savez(folder / "b.npz", x=np.random.default_rng(0).random((30, 4)), y=np.arange(30) % 3)
    files = [folder / "a.csv", folder / "b.npz"]
    return files, lambda: [read_examples(file) for file in files]


@reader
def weights(folder):
    path = folder / "w.safetensors"
    save_weights(nn.Linear(3, 2), path)
    return [path], functools.partial(read_weights, path)


@reader
def plans(folder):
    model = smallconv(6, 1, channels=(6, 8), seed=2).eval()
    groups = trace(model, torch.rand(4, 1, 8, 8))
    keep = {name: torch.arange(width) < width // 2 for name, width in groups.widths().items()}
    path = folder / "plan.json"
    PrunePlan(keep, groups, "l1", {"macs": 0.3}, {"macs": 0.29}).save(path)
    return [path], lambda: PrunePlan.load(path).apply(smallconv(6, 1, channels=(6, 8), seed=2))


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
