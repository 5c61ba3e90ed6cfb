"""Steps a second of a client against plain PyTorch training of the same network; ``python benchmarks/race_plain.py``.

Both run the same batches through the same network with fused Adam, in one process and turn by turn; the client also
reads a request, gates rows, has an adaptive part with its L1 norm and weight decay, and writes its answer. Then the
step of a client with more and more past tasks, whose penalty should not cost more. Times are CPU seconds, to which
other programs add nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings

import torch
from torch import nn
from torch.nn import functional

from fedapc.client import Client, Learning
from fedapc.decomposition import initial_base
from fedapc.networks import lenet, mlp
from fedapc.seeds import generator
from fedapc.server import Server
from fedapc.tasks import Task


def task(shape, examples, classes=5, seed=0):
    random = torch.Generator().manual_seed(seed)
    return Task(torch.randn(examples, *shape, generator=random), torch.arange(examples) % classes, classes)


def federation(net, tasks, learning, rounds):
    client = Client("a", net, tasks, learning)
    server = Server(initial_base(net, client.layout), {"a": len(tasks)}, rounds=rounds, kb_policy="none")
    return client, server


def client_seconds(client, server):
    request = server.request("a")
    begin = time.process_time()
    answer = client.answer(request)
    taken = time.process_time() - begin
    assert server.receive("a", answer)
    server.close()
    return taken


class Plain:
    """The same network, its own parameters, the same optimizer."""

    def __init__(self, net: nn.Module, data: Task, learning: Learning):
        self.net, self.data, self.learning = net, data, learning
        self.round = 0

    def seconds(self):
        begin = time.process_time()
        optimizer = torch.optim.Adam(
            self.net.parameters(), lr=self.learning.lr, weight_decay=self.learning.weight_decay, fused=True
        )
        for epoch in range(self.learning.epochs):
            random = generator(0, "a", "shuffle", self.round, epoch)
            total = torch.zeros((), dtype=torch.float64)
            for chosen in torch.randperm(len(self.data.y), generator=random).split(self.learning.batch_size):
                optimizer.zero_grad(set_to_none=True)
                loss = functional.cross_entropy(self.net(self.data.x[chosen]), self.data.y[chosen])
                loss.backward()
                optimizer.step()
                total += loss.detach()
        self.round += 1
        return time.process_time() - begin


def race(name, net, shape, batch, steps, repeats):
    data = task(shape, batch * steps)
    learning = Learning(batch_size=batch)
    client, server = federation(net, [data], learning, repeats + 1)
    plain = Plain(net, data, learning)
    client_seconds(client, server), plain.seconds()
    ours, theirs = [], []
    for _ in range(repeats):
        ours.append(client_seconds(client, server))
        theirs.append(plain.seconds())
    ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    speeds = (steps / statistics.median(times) for times in (ours, theirs))
    print(f"{name:>18} {batch:6d} {next(speeds):10.1f} {next(speeds):10.1f} {ratio:7.2f}", flush=True)


def late(past, retroactive, steps, repeats, batch=50):
    """Milliseconds of a step after so many past tasks."""
    net, shape = mlp(196, (128, 64), 5), (196,)
    learning = Learning(batch_size=batch, retroactive=retroactive)
    tasks = [task(shape, batch * 2, seed=number) for number in range(past)] + [task(shape, batch * steps, seed=past)]
    client, server = federation(net, tasks, learning, repeats + 1)
    for _ in range(past * (repeats + 1) + 1):
        client_seconds(client, server)
    return statistics.median(client_seconds(client, server) for _ in range(repeats)) / steps * 1e3


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="rounds that the median is of")
    parser.add_argument("--steps", type=int, default=100, help="of the small network, a round")
    parser.add_argument("--lenet-steps", type=int, default=4, help="of LeNet, a round; 0 leaves it out")
    parser.add_argument("--past", type=int, nargs="*", default=[1, 5, 20], help="past tasks")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    print(f"{'network':>18} {'batch':>6} {'client/s':>10} {'plain/s':>10} {'ratio':>7}")
    for batch in (20, 100):
        race("MLP 196-128-64", mlp(196, (128, 64), 5), (196,), batch, arguments.steps, arguments.repeats)
    if arguments.lenet_steps:
        for batch in (20, 100):
            race("LeNet", lenet(3, 32, 5), (3, 32, 32), batch, arguments.lenet_steps, arguments.repeats)
    kinds = ("shared", "joint", "none") if arguments.past else ()
    for kind in kinds:
        times = [late(past, kind, arguments.steps, arguments.repeats) for past in arguments.past]
        line = ", ".join(f"{past} past tasks {ms:.2f} ms" for past, ms in zip(arguments.past, times, strict=True))
        print(f"a step, retroactive={kind}: {line}", flush=True)


if __name__ == "__main__":
    main()
