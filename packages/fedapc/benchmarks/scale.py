"""Many simulated clients, one process each size: seconds, peak memory and bytes; ``python benchmarks/scale.py``.

Clients learn tasks of drawn clusters with a small network, on one thread. A process a line, so that the peak of its
memory is its own; what Python, torch and the data take before the first round is given apart. At the end, by
arithmetic from the bytes measured, what a server of many more clients would hold and send.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
import warnings

import torch

from fedapc.client import Client, Learning
from fedapc.data import benchmark
from fedapc.decomposition import Layout, initial_base
from fedapc.engine import simulate
from fedapc.networks import mlp
from fedapc.server import Server

KINDS = ("base", "adaptive", "knowledge", "control")


def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def federation(clients, policy, options):
    made = benchmark(
        "gaussian",
        clients=clients,
        tasks=options.tasks,
        per_class=options.per_class,
        inputs=options.inputs,
        pool=max(8, options.tasks),
    )
    net = mlp(options.inputs, tuple(options.hidden), 4)
    layout = Layout.of(net)
    learning = Learning(epochs=options.epochs, batch_size=20, attention_init=options.attention)
    members = [Client(name, net, tasks, learning, layout=layout) for name, tasks in made.tasks.items()]
    counts = {client.name: len(client.tasks) for client in members}
    server = Server(
        initial_base(net, layout), counts, rounds=options.rounds, kb_policy=policy, fraction=options.fraction
    )
    return members, server, layout


def measure(clients, policy, options):
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    members, server, layout = federation(clients, policy, options)
    before = peak_mb()
    begin, begin_cpu = time.perf_counter(), time.process_time()
    simulate(members, server)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - begin_cpu
    peak = peak_mb()
    accuracy = [value for client in members for value in client.evaluate()]
    entries = list(server.ledger)
    turns = sum(entry.messages for entry in entries if entry.direction == "up")
    sizes = {
        direction: {
            kind: sum(e.encoded_bytes for e in entries if e.direction == direction and e.kind == kind) / turns
            for kind in KINDS
        }
        for direction in ("up", "down")
    }
    parts = [sum(map(len, server.knowledge[key])) for key in server.knowledge]
    return {
        "clients": clients,
        "policy": policy,
        "seconds": seconds,
        "cpu": cpu,
        "before_mb": before,
        "peak_mb": peak,
        "turns": turns,
        "bytes": sizes,
        "part": sum(parts) / len(parts),
        "weights": layout.elements(),
        "accuracy": sum(accuracy) / len(accuracy),
    }


def extrapolate(found, options, clients=100_000, drawn=5):
    """What follows for a server of very many clients, if messages stay as large."""
    part, weights = found["part"], found["weights"]
    up = found["bytes"]["up"]["base"] + found["bytes"]["up"]["control"]
    down = found["bytes"]["down"]["base"] + found["bytes"]["down"]["control"]
    stored = clients * options.tasks * part
    print(
        f"\n{clients:,} clients, {options.tasks} tasks, sample:{drawn}, {weights:,} weights, parts of {part:,.0f} bytes"
    )
    print(f"the server holds {stored / 1e9:.1f} GB of parts in the end, whatever the policy, and its base twice")
    for fraction in (0.001, 0.01, 0.1):
        asked = fraction * clients
        # Who is first asked in a task gets its parts; whoever is asked in a task's last round sends one.
        contacts = 1 - (1 - fraction) ** options.rounds
        knowledge = contacts * clients * drawn * part / options.rounds
        sent = asked * part / options.rounds
        print(
            f"F = {fraction:g}: {asked:,.0f} clients a round, down {(asked * down + knowledge) / 1e6:,.1f} MB (parts"
            f" {knowledge / 1e6:,.1f}), up {(asked * up + sent) / 1e6:,.1f} MB; of a round's answers it holds"
            f" {asked * (up + part) / 1e6:,.1f} MB at most"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, nargs="*", default=[10, 50, 100, 200])
    parser.add_argument("--policies", nargs="*", default=["last", "sample:5"], help="kb_policy of the server")
    parser.add_argument("--tasks", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2, help="of each task")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--per-class", type=int, default=20, help="training instances; there are four classes")
    parser.add_argument("--inputs", type=int, default=64)
    parser.add_argument("--hidden", type=int, nargs="+", default=[128, 64])
    parser.add_argument("--fraction", type=float, default=1.0, help="of the clients, asked a round")
    parser.add_argument("--attention", default=Learning().attention_init, help="attention_init of the clients")
    parser.add_argument("--one", action="store_true", help="measure one size in this process, and print JSON")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.clients[0], options.policies[0], options)))
        return
    print(
        f"{'clients':>7} {'policy':>9} {'seconds':>8} {'CPU s':>7} {'peak MB':>8} {'before':>7} {'up B/turn':>10}"
        f" {'down B/turn':>12} {'of it parts':>12} {'accuracy':>8}"
    )
    found = None
    for policy in options.policies:
        for clients in options.clients:
            mine = ["--clients", str(clients), "--policies", policy, "--one"]
            command = [sys.executable, __file__, *sys.argv[1:], *mine]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            if run.returncode:
                print(f"{clients:7d} {policy:>9} failed: {(run.stderr.strip().splitlines() or ['killed'])[-1]}")
                continue
            found = json.loads(run.stdout)
            up, down = (sum(found["bytes"][direction].values()) for direction in ("up", "down"))
            print(
                f"{clients:7d} {policy:>9} {found['seconds']:8.1f} {found['cpu']:7.1f} {found['peak_mb']:8.0f}"
                f" {found['before_mb']:7.0f} {up:10,.0f} {down:12,.0f} {found['bytes']['down']['knowledge']:12,.0f}"
                f" {found['accuracy']:8.3f}",
                flush=True,
            )
    if found:
        extrapolate(found, options)


if __name__ == "__main__":
    main()
