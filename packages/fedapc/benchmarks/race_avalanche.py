"""Against Avalanche: elastic weight consolidation of one client, its accuracy and forgetting, and the time it takes.

    python benchmarks/race_avalanche.py [--data digits] [--tasks 4] [--epochs 15] [--repeats 3]

Needs ``pip install avalanche-lib==0.6.0``, best in an environment of its own: it brings dozens of packages.

Both get the same tasks in the same order, task identities, a head a task, the same network with the same first weights
of its body, batches of the same size, Adam at the same rate, and as many epochs. Their lambdas do not compare:
`fedapc` takes the mean of squares of gradients of single examples for the Fisher information and multiplies by half of
lambda; Avalanche squares the mean gradient of a batch, which is smaller by up to the size of the batch, and multiplies
by lambda. Of 10, 100, ..., 10,000 and some in between, the defaults are a pair at which both are at their best
accuracy, to half a point, and forget as much. Evaluation is not timed, nor is a first run of each that loads what is
loaded once; the two take turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from copy import deepcopy
from dataclasses import replace

import torch
from torch import nn

from fedapc.baselines import Training, build, initial_body
from fedapc.data import BENCHMARKS, benchmark
from fedapc.decomposition import Layout
from fedapc.engine import simulate
from fedapc.metrics import accuracy_matrix, average_accuracy, forgetting
from fedapc.networks import network


def clocks():
    return torch.tensor([time.perf_counter(), time.process_time()], dtype=torch.float64)


def ours(net, tasks, given, seed):
    """Local-EWC of `fedapc`: seconds and CPU seconds of training, and accuracies after each task."""
    training = Training(
        epochs=given.epochs, batch_size=given.batch_size, lr=given.lr, weight_decay=0.0, ewc_strength=given.strength
    )
    (client,), server = build("ewc", net, {"a": tasks}, training=training, rounds=1, seed=seed)
    spent, rows = torch.zeros(2, dtype=torch.float64), []
    for number in range(len(tasks)):
        begin = clocks()
        simulate([client], server, rounds=1)
        spent += clocks() - begin
        rows.append([client.accuracy(*task.test, k) for k, task in enumerate(tasks[: number + 1])])
    assert not server.ledger.events()
    return spent.tolist(), rows


def theirs(net, tasks, given, seed):
    """Avalanche's EWC, likewise."""
    from avalanche.benchmarks import benchmark_from_datasets, task_incremental_benchmark
    from avalanche.benchmarks.utils import AvalancheDataset, DataAttribute
    from avalanche.models import as_multitask
    from avalanche.training.plugins import EvaluationPlugin
    from avalanche.training.supervised import EWC

    torch.manual_seed(seed)
    layout, net = Layout.of(net), deepcopy(net)
    net.load_state_dict(initial_body(net, layout, seed), strict=False)
    net.get_submodule(layout.head).reset_parameters()
    model = as_multitask(net, layout.head)
    sets = [
        AvalancheDataset(
            torch.utils.data.TensorDataset(task.x, task.y),
            data_attributes=[DataAttribute(task.y.tolist(), "targets")],
        )
        for task in tasks
    ]
    stream = task_incremental_benchmark(benchmark_from_datasets(train=sets)).train_stream
    strategy = EWC(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=given.lr),
        criterion=nn.CrossEntropyLoss(),
        ewc_lambda=given.peer_strength,
        train_mb_size=given.batch_size,
        train_epochs=given.epochs,
        evaluator=EvaluationPlugin(loggers=[]),
    )
    spent, rows = torch.zeros(2, dtype=torch.float64), []
    for number, experience in enumerate(stream):
        # Its heads index with this, which its own helper makes a set.
        experience.classes_in_this_experience = list(range(tasks[number].classes))
        begin = clocks()
        strategy.train(experience)
        spent += clocks() - begin
        model.eval()
        with torch.no_grad():
            rows.append(
                [
                    float((model(x, torch.full_like(y, k)).argmax(1) == y).double().mean())
                    for k, (x, y) in enumerate(task.test for task in tasks[: number + 1])
                ]
            )
    return spent.tolist(), rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("tasks", 4),
        ("per-class", 40),
        ("epochs", 15),
        ("batch-size", 50),
        ("repeats", 3),
        ("lr", 1e-3),
        ("strength", 3000.0),
        ("peer-strength", 1e4),
    ):
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--data", choices=sorted(BENCHMARKS), default="digits")
    given = parser.parse_args()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import avalanche
    except ImportError as error:
        print(f"Avalanche cannot be imported ({error}): pip install avalanche-lib==0.6.0, or skip this race")
        return 0
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    data = benchmark(given.data, clients=1, tasks=given.tasks, per_class=given.per_class)
    (tasks,) = ([replace(task, validation=None) for task in own] for own in data.tasks.values())
    net = network(data.network, tasks[0].x, classes=tasks[0].classes)
    racers = {"fedapc, Local-EWC": ours, f"avalanche {avalanche.__version__}, EWC": theirs}
    short = argparse.Namespace(**{**vars(given), "epochs": 1})
    for race in racers.values():
        race(net, tasks[:2], short, 0)
    runs = {title: [] for title in racers}
    for seed in range(given.repeats):
        for title, race in racers.items():
            runs[title].append(race(net, tasks, given, seed))
    steps = given.epochs * sum(-(-len(task.y) // given.batch_size) for task in tasks)
    print(f"{given.data}, one client, {given.tasks} tasks, {given.epochs} epochs each, {steps} steps;", end=" ")
    print(f"medians of {given.repeats}")
    print(f"{'':30} {'accuracy':>9} {'forgetting':>11} {'seconds':>8} {'CPU':>8}")
    medians = []
    for title, found in runs.items():
        matrices = [accuracy_matrix([rows]) for _, rows in found]
        medians.append(
            [
                statistics.median(map(average_accuracy, matrices)),
                statistics.median(map(forgetting, matrices)),
                *(statistics.median(spent[clock] for spent, _ in found) for clock in (0, 1)),
            ]
        )
        print("{:30} {:9.3f} {:11.3f} {:8.2f} {:8.2f}".format(title, *medians[-1]))
    own, peer = medians
    print(
        f"{'difference; times as fast':30} {own[0] - peer[0]:+9.3f} {own[1] - peer[1]:+11.3f}"
        f" {peer[2] / own[2]:8.2f} {peer[3] / own[3]:8.2f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
