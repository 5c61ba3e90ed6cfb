"""Against Flower: bytes of a round of its FedAvg, and the time the same federation takes with and without it.

    python benchmarks/race_flower.py [--clients 4] [--tasks 4] [--rounds 5] [--epochs 3] [--repeats 5] [--simulation]

Needs ``pip install 'fedapc[flower]'``; with ``--simulation``, ``'fedapc[flower-simulation]'``.

(a) Bytes. The same clients, tasks, network, rounds and epochs: `fedapc` and Flower's own ``FedAvg`` of the body, with a
head a task at each client; both over `fedapc.flower.LocalGrid`, and both counted by the ``count_bytes`` of all records
of all messages. Accuracy, over all tasks at the end, is printed beside them: fewer bytes are worth nothing without.
(b) Time. One federation that only averages (no masks, no parts, all rows) by `fedapc.simulate`, over the local grid,
and by Flower's simulation with Ray, whose start is not counted. The results have the same bits.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial

import torch
from torch.nn import functional

from fedapc.client import Client, Learning
from fedapc.data import benchmark
from fedapc.decomposition import Layout, initial_base
from fedapc.engine import simulate
from fedapc.networks import network
from fedapc.seeds import generator
from fedapc.server import Server

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_HOME", os.path.join(tempfile.gettempdir(), "fedapc-race-flower"))  # noqa: PTH118


class Setting:
    """Clients and a server of one size."""

    def __init__(self, given, learning):
        self.data = benchmark("digits", clients=given.clients, tasks=given.tasks, per_class=given.per_class)
        self.names = sorted(self.data.tasks)
        self.net = network(self.data.network, self.data.tasks[self.names[0]][0].x, classes=5)
        self.layout = Layout.of(self.net)
        self.learning = learning
        self.rounds = given.rounds
        self.nodes = [{"partition-id": number} for number in range(given.clients)]

    def client(self, number):
        name = self.names[number]
        return Client(name, self.net, self.data.tasks[name], self.learning, layout=self.layout)

    def server(self, **options):
        counts = {name: len(tasks) for name, tasks in self.data.tasks.items()}
        return Server(initial_base(self.net, self.layout), counts, rounds=self.rounds, **options)


def on_node(setting, context):
    return setting.client(context.node_config["partition-id"])


class Counter:
    """Bytes of all records that pass."""

    def __init__(self):
        self.up = self.down = 0

    def __call__(self, message, reply):
        self.down += sum(record.count_bytes() for record in message.content.values())
        self.up += sum(record.count_bytes() for record in reply.content.values())
        return reply


def ours(setting):
    from fedapc.flower import FedAPCStrategy, LocalGrid, client_app

    counter = Counter()
    strategy = FedAPCStrategy(setting.server())
    strategy.start(LocalGrid(client_app(partial(on_node, setting)), setting.nodes, channel=counter))
    last = strategy.accuracy[strategy.server.round]
    return counter, statistics.mean(value for values in last.values() for value in values)


def theirs(setting):
    """Flower's FedAvg of the body."""
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp.strategy import FedAvg

    from fedapc.flower import LocalGrid

    body = list(setting.layout.layers)
    nets, done = {}, {}
    app = ClientApp()

    @app.train()
    def train(message, context):
        number = context.node_config["partition-id"]
        name, learning = setting.names[number], setting.learning
        round_ = done.get(name, 0)
        done[name] = round_ + 1
        task = round_ // setting.rounds
        if (name, task) not in nets:
            nets[name, task] = network(setting.data.network, setting.data.tasks[name][0].x, classes=5, seed=task)
        net, data = nets[name, task], setting.data.tasks[name][task]
        net.load_state_dict(message.content["arrays"].to_torch_state_dict(), strict=False)
        optimizer = torch.optim.Adam(net.parameters(), lr=learning.lr)
        for epoch in range(learning.epochs):
            order = torch.randperm(len(data.y), generator=generator(0, name, "shuffle", round_, epoch))
            for chosen in order.split(learning.batch_size):
                optimizer.zero_grad()
                functional.cross_entropy(net(data.x[chosen]), data.y[chosen]).backward()
                optimizer.step()
        state = net.state_dict()
        content = RecordDict(
            {
                "arrays": ArrayRecord({layer: state[layer] for layer in body}),
                "metrics": MetricRecord({"num-examples": len(data.y)}),
            }
        )
        return Message(content, reply_to=message)

    counter = Counter()
    grid = LocalGrid(app, setting.nodes, channel=counter)
    result = FedAvg(fraction_evaluate=0.0, min_available_nodes=len(setting.nodes)).start(
        grid,
        ArrayRecord(initial_base(setting.net, setting.layout)),
        num_rounds=setting.rounds * max(len(tasks) for tasks in setting.data.tasks.values()),
    )
    body_now = result.arrays.to_torch_state_dict()
    found = []
    for (name, task), net in nets.items():
        net.load_state_dict(body_now, strict=False)
        x, y = setting.data.tasks[name][task].test
        with torch.no_grad():
            found.append(float((net(x).argmax(1) == y).double().mean()))
    return counter, statistics.mean(found)


def in_process(setting):
    begin = time.perf_counter()
    server = setting.server(kb_policy="none")
    simulate([setting.client(number) for number in range(len(setting.names))], server)
    return time.perf_counter() - begin, server


def on_grid(setting):
    from fedapc.flower import FedAPCStrategy, LocalGrid, client_app

    begin = time.perf_counter()
    strategy = FedAPCStrategy(setting.server(kb_policy="none"), evaluate="never")
    strategy.start(LocalGrid(client_app(partial(on_node, setting)), setting.nodes))
    return time.perf_counter() - begin, strategy.server


def on_ray(setting):
    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation

    from fedapc.flower import FedAPCStrategy, client_app

    found = []
    app = ServerApp()

    @app.main()
    def main(grid, _):
        server = setting.server(kb_policy="none")
        # The first round starts the workers.
        strategy = FedAPCStrategy(server, evaluate="never", poll=0.05)
        strategy.start(grid, num_rounds=1)
        begin = time.perf_counter()
        strategy.start(grid)
        found.append(((time.perf_counter() - begin) * (server.round / (server.round - 1)), server))

    run_simulation(
        server_app=app,
        client_app=client_app(partial(on_node, setting)),
        num_supernodes=len(setting.nodes),
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )
    return found[0]


def same(one, other):
    return all(torch.equal(one.base[name], other.base[name]) for name in one.base)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("clients", 4),
        ("tasks", 4),
        ("rounds", 5),
        ("epochs", 3),
        ("per-class", 20),
        ("repeats", 5),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--simulation", action="store_true", help="time Flower's simulation too (needs Ray)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if importlib.util.find_spec("flwr") is None:
        print(
            "this race needs Flower, in an environment of its own: make flower, then .venv-flower/bin/python this file"
        )
        return 0
    logging.getLogger("flwr").setLevel(logging.ERROR)
    learning = Learning(epochs=given.epochs, batch_size=50, lr=9e-4)
    setting = Setting(given, learning)
    (own, own_accuracy), (peer, peer_accuracy) = ours(setting), theirs(setting)
    messages = given.clients * given.tasks * given.rounds
    print(f"digits, {given.clients} clients, {given.tasks} tasks, {given.rounds} rounds of {given.epochs} epochs")
    print(f"{'bytes a client and round':28} {'up':>10} {'down':>10} {'accuracy':>9}")
    for title, count, accuracy in (("fedapc", own, own_accuracy), ("Flower's FedAvg", peer, peer_accuracy)):
        print(f"{title:28} {count.up / messages:10.0f} {count.down / messages:10.0f} {accuracy:9.3f}")
    print(f"{'ratio':28} {own.up / peer.up:10.2f} {own.down / peer.down:10.2f} {own_accuracy - peer_accuracy:+9.3f}")

    averaging = Setting(
        given,
        replace(
            learning, mask=False, adaptive=False, transfer="none", retention=0.0, weight_decay=0.0, upload_fraction=1.0
        ),
    )
    pairs = [(in_process(averaging), on_grid(averaging)) for _ in range(given.repeats)]
    assert all(same(one[1], other[1]) for one, other in pairs)
    first = statistics.median(one[0] for one, _ in pairs)
    second = statistics.median(other[0] for _, other in pairs)
    print(f"\naveraging only, median of {given.repeats}: seconds, and times fedapc.simulate")
    print(f"{'fedapc.simulate':28} {first:8.2f}")
    print(f"{'fedapc.flower.LocalGrid':28} {second:8.2f} {second / first:8.1f}")
    if given.simulation:
        third, server = on_ray(averaging)
        assert same(server, pairs[0][0][1])
        print(f"{'flwr simulation, Ray':28} {third:8.2f} {third / first:8.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
