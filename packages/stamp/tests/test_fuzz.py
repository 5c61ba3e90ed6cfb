"""Every reader of this package meets damaged files: it reads them, or refuses them in one line."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import nn

from shared_core.testing import Readers
from stamp._files import read_weights, save_weights
from stamp.generator import MaskGenerator
from stamp.groups import trace
from stamp.latency import LatencyTable, LayerTable
from stamp.networks import smallconv
from stamp.plan import PrunePlan
from stamp.sources import read_examples

readers = Readers()


@readers
def tables(folder):
    (folder / "a.csv").write_text("age,dose,class\n" + "".join(f"{k},{k / 3},{'xyz'[k % 3]}\n" for k in range(30)))
    np.savez(folder / "b.npz", x=np.random.default_rng(0).random((30, 4)), y=np.arange(30) % 3)
    files = [folder / "a.csv", folder / "b.npz"]
    return files, lambda: [read_examples(file) for file in files]


@readers
def weights(folder):
    path = folder / "w.safetensors"
    save_weights(nn.Linear(3, 2), path)
    return [path], functools.partial(read_weights, path)


@readers
def plans(folder):
    model = smallconv(6, 1, channels=(6, 8), seed=2).eval()
    groups = trace(model, torch.rand(4, 1, 8, 8))
    keep = {name: torch.arange(width) < width // 2 for name, width in groups.widths().items()}
    path = folder / "plan.json"
    PrunePlan(keep, groups, "l1", {"macs": 0.3}, {"macs": 0.29}).save(path)
    return [path], lambda: PrunePlan.load(path).apply(smallconv(6, 1, channels=(6, 8), seed=2))


@readers
def generators(folder):
    groups = trace(smallconv(6, 1, channels=(6, 8), seed=2).eval(), torch.rand(4, 1, 8, 8))
    path = folder / "g.safetensors"
    MaskGenerator(groups, head="mlp").save(path)
    return [path], lambda: MaskGenerator.load(path, groups)


@readers
def latencies(folder):
    zeros, ones = torch.zeros(1, 4, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    layer = LayerTable((1, 3), (1, 4), ((0.1, 0.2), (0.3, 0.4)))
    table = LatencyTable(("g",), (4,), ("layer",), (0,), (layer,), zeros, zeros, ones, ones, 0 * ones, 2.0)
    path = folder / "l.json"
    path.write_text(table.to_json(), encoding="utf-8")
    return [path], lambda: LatencyTable.from_json(path.read_text(encoding="utf-8", errors="replace"))


test_valid_files_are_read, test_fuzz = readers.tests(15)
