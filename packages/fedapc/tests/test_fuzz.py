"""Every reader of this package meets damaged files: it reads them, or refuses them in one line."""

from __future__ import annotations

import functools

import torch
from torch import nn

from fedapc.config import FedAPCConfig
from fedapc.data import read_tasks, write_example
from fedapc.federation import FedAPC, Federation
from fedapc.report import Report
from fedapc.tasks import Task
from shared_core.testing import Readers

readers = Readers()


@readers
def tasks(folder):
    path = write_example(folder)
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return files, functools.partial(read_tasks, path)


def mlp():
    return nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))


@readers
def federations(folder):
    random = torch.Generator().manual_seed(0)
    own = [Task(torch.randn(30, 6, generator=random), torch.arange(30) % 3, 3, name=f"task{k}") for k in range(2)]
    federation = FedAPC(mlp(), FedAPCConfig(rounds=1, epochs=1, batch_size=16))
    federation.fit({"a": own, "b": own[:1]})
    path = folder / "federation.safetensors"
    federation.save(path)
    return [path], lambda: Federation.open(path, mlp()).predict("a", torch.zeros(2, 6), 0)


@readers
def reports(folder):
    random = torch.Generator().manual_seed(0)
    task = Task(torch.randn(30, 6, generator=random), torch.arange(30) % 3, 3, name="task")
    FedAPC(mlp(), FedAPCConfig(rounds=1, epochs=1, batch_size=16)).fit({"a": [task], "b": [task]}).save(folder)
    return sorted(folder.iterdir()), functools.partial(Report.load, folder)


test_valid_files_are_read, test_fuzz = readers.tests(15)
