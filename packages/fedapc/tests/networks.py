"""Small networks and federations for the tests."""

from __future__ import annotations

import torch
from torch import nn

from fedapc.client import Client, Learning
from fedapc.decomposition import Layout, initial_base
from fedapc.engine import simulate
from fedapc.server import Server
from fedapc.tasks import Task


def mlp():
    generator = torch.Generator().manual_seed(5)
    net = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 7), nn.ReLU(), nn.Linear(7, 3))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    return net


class Convolutional(nn.Module):
    def __init__(self, norm=False):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4) if norm else nn.Identity()
        self.grouped = nn.Conv2d(4, 4, 3, groups=2, bias=False)
        self.classifier = nn.Linear(4, 3)

    def forward(self, x):
        return self.classifier(self.grouped(self.norm(self.conv(x)).relu()).mean((2, 3)))


def task(seed, classes=3, examples=30):
    """A task of well separated clusters."""
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(classes, 6, generator=generator)
    y = torch.arange(examples) % classes
    return Task(centres[y] + 0.3 * torch.randn(examples, 6, generator=generator), y, classes)


LEARNING = Learning(epochs=2, batch_size=8, lr=5e-4, upload_fraction=0.5)


def federation(clients=3, tasks=3, rounds=2, learning=LEARNING, reverse=False, server=None, **options):
    """Clients ``a``, ``b``, ... with tasks of their own, and their server."""
    net = mlp()
    names = [chr(ord("a") + number) for number in range(clients)]
    made = [
        Client(name, net, [task(10 * number + k) for k in range(tasks)], learning) for number, name in enumerate(names)
    ]
    base = initial_base(net, Layout.of(net))
    counts = dict.fromkeys(names, tasks)
    if reverse:
        made, counts = made[::-1], dict(reversed(counts.items()))
    return made, Server(base, counts, rounds=rounds, **options)


def run(**options):
    clients, server = federation(**options)
    simulate(clients, server)
    return {client.name: client for client in clients}, server


def same(one, other):
    """States of the same bits."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
