"""Every reader of this package meets damaged files: it reads them, or refuses them in one line."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from shared_core.testing import Readers
from srq_dropbits.config import QuantConfig
from srq_dropbits.deploy import convert
from srq_dropbits.models import load_weights
from srq_dropbits.packing import inspect_packed, load_packed, save_packed
from srq_dropbits.qat import prepare
from srq_dropbits.saving import load, read_config, save
from srq_dropbits.userdata import load_images_or_table

readers = Readers()


@readers
def tables(folder):
    (folder / "a.csv").write_text("age,dose,y\n" + "".join(f"{k},{k / 3},{'ab'[k % 2]}\n" for k in range(20)))
    np.savez(folder / "b.npz", x=np.random.default_rng(0).random((20, 4)), y=np.arange(20) % 2)
    files = [folder / "a.csv", folder / "b.npz"]
    return files, lambda: [load_images_or_table(str(file)) for file in files]


@readers
def weights(folder):
    model = nn.Linear(3, 2)
    torch.save(model.state_dict(), folder / "w.pt")
    return [folder / "w.pt"], lambda: load_weights(nn.Linear(3, 2), folder / "w.pt")


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


@readers
def quantized(folder):
    path = folder / "q.safetensors"
    x = torch.zeros(1, 3)
    save(prepare(network(), QuantConfig(act_bits=None), x), path)
    return [path], lambda: (
        read_config(path),
        load(path, network(), x),
    )


@readers
def packed(folder):
    path = folder / "p.safetensors"
    x = torch.zeros(1, 3)
    model = prepare(network(), QuantConfig(act_bits=None), x)
    save_packed(convert(model.eval()), path)
    return [path], lambda: (inspect_packed(path), load_packed(path))


test_valid_files_are_read, test_fuzz = readers.tests(15)
