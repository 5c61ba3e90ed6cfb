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
from srq_dropbits.config import QuantConfig
from srq_dropbits.deploy import convert
from srq_dropbits.models import load_weights
from srq_dropbits.packing import inspect_packed, load_packed, save_packed
from srq_dropbits.qat import prepare
from srq_dropbits.saving import load, read_config, save
from srq_dropbits.userdata import load_images_or_table

READERS = {}


def reader(make):
    """Name what writes valid files into a folder and returns them with what reads them."""
    READERS[make.__name__] = make
    return make


@reader
def tables(folder):
    (folder / "a.csv").write_text("age,dose,y\n" + "".join(f"{k},{k / 3},{'ab'[k % 2]}\n" for k in range(20)))
    np.savez(folder / "b.npz", x=np.random.default_rng(0).random((20, 4)), y=np.arange(20) % 2)
    files = [folder / "a.csv", folder / "b.npz"]
    return files, lambda: [load_images_or_table(str(file)) for file in files]


@reader
def weights(folder):
    model = nn.Linear(3, 2)
    torch.save(model.state_dict(), folder / "w.pt")
    return [folder / "w.pt"], lambda: load_weights(nn.Linear(3, 2), folder / "w.pt")


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


@reader
def quantized(folder):
    path = folder / "q.safetensors"
    x = torch.zeros(1, 3)
    save(prepare(network(), QuantConfig(act_bits=None), x), path)
    return [path], lambda: (
        read_config(path),
        load(path, network(), x),
    )


@reader
def packed(folder):
    path = folder / "p.safetensors"
    x = torch.zeros(1, 3)
    model = prepare(network(), QuantConfig(act_bits=None), x)
    save_packed(convert(model.eval()), path)
    return [path], lambda: (inspect_packed(path), load_packed(path))


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
