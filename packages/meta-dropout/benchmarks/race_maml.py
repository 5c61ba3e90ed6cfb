"""Race: second-order MAML meta-gradients, ours against `higher` (a loop) and `parallel-metalearn` (vmap).

    python benchmarks/race_maml.py [--repeats 9] [--threads 1] [--json]

Needs ``pip install higher parallel-metalearn``. Networks and tasks are equal, everything runs in one process, the
entrants taking turns, and the median of the repeats counts. Meta-gradients must agree first. Two settings: (a) a
regression with a 40-40 perceptron on sine waves, 32 tasks, 5 inner steps; (b) four blocks of 16 filters, 5-way 1-shot
on 20x20 images, 8 tasks, 3 inner steps, 75 queries a task. The peers do not know which parameters to leave alone, so
the network of (b) has no normalisation here. The last table says what meta-dropout's step costs against our own MAML
step, with and without the means that are computed once. Memory is the most that the process held during one
meta-gradient beyond what it held before (resident set, sampled in a child; Linux only).
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import multiprocessing
import resource
import statistics
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from meta_dropout.backbones import conv4, mlp
from meta_dropout.engine import Plan, Tasks, cross_entropy, draw_noise, meta_gradients
from meta_dropout.perturb import Perturbed
from meta_dropout.toys import SineTasks

Gradients = Mapping[str, Tensor]


def images(tasks: int, ways: int, queries: int, size: int, seed: int = 0) -> Tasks:
    random = torch.Generator().manual_seed(seed)
    x = torch.rand(tasks, ways, 1, size, size, generator=random)
    asked = torch.rand(tasks, ways * queries, 1, size, size, generator=random)
    labels = torch.arange(ways)
    return Tasks(x, labels.expand(tasks, -1), asked, labels.repeat_interleave(queries).expand(tasks, -1))


def settings() -> dict[str, tuple[torch.nn.Module, Tasks, Plan, Callable[[Tensor, Tensor], Tensor]]]:
    return {
        "a: sine, MLP 40-40, 32 tasks, 5 steps": (
            mlp(inputs=1, outputs=1), SineTasks().batch(0, 32), Plan(steps=5, lr=0.001), functional.mse_loss
        ),
        "b: conv4-16, 5-way 1-shot 20x20, 8 tasks, 3 steps": (
            conv4(ways=5, size=20, filters=16, norm="none", init="kaiming"), images(8, 5, 15, 20),
            Plan(steps=3, lr=0.1), cross_entropy,
        ),
    }  # fmt: skip


def entrants(name: str) -> dict[str, Callable[[], Gradients]]:
    module, tasks, plan, loss = settings()[name]
    model = Perturbed(module, noise="none")
    parameters = dict(model.named_parameters())

    def ours(backend: str) -> Gradients:
        return meta_gradients(model, parameters, tasks, {}, replace(plan, backend=backend), loss=loss).gradients

    def peer() -> Gradients:
        import higher

        optimizer = torch.optim.SGD(model.parameters(), lr=plan.lr)
        model.zero_grad()
        for t in range(len(tasks)):
            with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (fast, inner):
                for _ in range(plan.steps):
                    inner.step(loss(fast(tasks.support[t]), tasks.support_labels[t]))
                (loss(fast(tasks.query[t]), tasks.query_labels[t]) / len(tasks)).backward()
        return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}

    return {
        "higher": peer,
        "parallel-metalearn": parallel(module, tasks, plan, loss, list(parameters)),
        "ours, one task after another": lambda: ours("loop"),
        "ours, all at once": lambda: ours("vmap"),
    }


def parallel(
    module: torch.nn.Module, tasks: Tasks, plan: Plan, loss: Callable[[Tensor, Tensor], Tensor], names: list[str]
) -> Callable[[], Gradients]:
    """Let the peer take its own meta-step, with an outer optimizer that moves nothing; its gradients stay behind."""
    from metalearn.algorithms.MAML import MAML
    from metalearn.inner_optimizers.optimizers import InnerSGD
    from metalearn.loss.base import BaseLoss

    class Loss(BaseLoss):
        def forward(self, out_dict, targets, model_states=None, **more):  # noqa: ARG002
            return loss(out_dict["logits"], targets["labels"]), torch.zeros(())

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = copy.deepcopy(module)

        def forward(self, x, **more):  # noqa: ARG002
            return {"logits": self.module(x), "buffers": {}}

        def get_fast_weights(self, **more):  # noqa: ARG002
            return OrderedDict(self.named_parameters())

    model = Wrapped()
    inner = InnerSGD(model.get_fast_weights(), inner_lr=plan.lr, max_inner_steps=plan.steps, learn_lr=False)
    maml = MAML(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.0), inner_optimizer=inner,
        support_loss_fn=Loss(), inner_steps=plan.steps, chunk_size=len(tasks), device=torch.device("cpu"),
    )  # fmt: skip
    batch = (tasks.support, {"labels": tasks.support_labels}, tasks.query, {"labels": tasks.query_labels})

    def step() -> Gradients:
        maml.step(itertools.repeat(batch))
        return dict(zip(names, (p.grad for p in model.parameters()), strict=True))

    return step


def check(found: dict[str, Callable[[], Gradients]]) -> float:
    """Largest difference between entrants' gradients, relative to the largest gradient."""
    first, *rest = [entrant() for entrant in found.values()]
    scale = max(float(g.abs().max()) for g in first.values())
    worst = max(float((first[k] - other[k]).abs().max()) for other in rest for k in first) / scale
    if worst > 1e-5:
        raise RuntimeError(f"meta-gradients differ by {worst:.2g} of the largest; that is no race")
    return worst


def median_seconds(found: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in found}
    for name in found:
        found[name]()
    for _ in range(repeats):
        for name, entrant in found.items():
            start = time.perf_counter()
            entrant()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _peak(name: str, entrant: str, threads: int, answer: multiprocessing.Queue) -> None:
    torch.set_num_threads(threads)
    run = entrants(name)[entrant]
    before, most, done = _resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, _resident())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    done.set()
    watcher.join()
    answer.put((most - before) / 2**20)


def peak_memory(name: str, entrant: str, threads: int) -> float:
    """Megabytes that one meta-gradient adds to a fresh process's most."""
    context = multiprocessing.get_context("spawn")
    answer: multiprocessing.Queue = context.Queue()
    child = context.Process(target=_peak, args=(name, entrant, threads, answer))
    child.start()
    value = answer.get(timeout=120)
    child.join()
    return float(value)


def dropout_cost(repeats: int) -> dict[str, float]:
    """Times of MAML's and meta-dropout's meta-gradients on setting (b), with normalisation, as ratios to MAML's."""
    tasks, plan = images(8, 5, 15, 20), Plan(steps=3, lr=0.1)
    net = conv4(ways=5, size=20, filters=16, init="kaiming")
    plain, noisy = Perturbed(net, noise="none"), Perturbed(net)
    shapes, sites = noisy.prepare(tasks.support[0]), noisy.data_sites(tasks.support[0])
    seeds = list(range(len(tasks)))

    def step(model: Perturbed, sites: tuple[str, ...] = ()) -> object:
        drawn = draw_noise(shapes, plan, seeds=seeds) if model is noisy else {}
        return meta_gradients(model, dict(model.named_parameters()), tasks, drawn, plan, data_sites=sites)

    found = median_seconds(
        {
            "MAML": lambda: step(plain),
            "meta-dropout": lambda: step(noisy, sites),
            "meta-dropout, first layer's means not kept": lambda: step(noisy),
        },
        repeats,
    )
    return {name: seconds / found["MAML"] for name, seconds in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    document: dict[str, object] = {"options": vars(options)}
    for name, (_, tasks, _, _) in settings().items():
        found = entrants(name)
        worst = check(found)
        seconds = median_seconds(found, options.repeats)
        memory = {entrant: peak_memory(name, entrant, options.threads) for entrant in found}
        document[name] = {"difference": worst, "seconds": seconds, "memory_mb": memory}
        if not options.json:
            print(f"\n{name} (meta-gradients agree to {worst:.1e})")
            for entrant, value in seconds.items():
                print(
                    f"{entrant:>30}: {len(tasks) / value:8.1f} tasks/s  {seconds['higher'] / value:6.2f} x"
                    f"  {memory[entrant]:7.1f} MB",
                    flush=True,
                )
    document["cost"] = cost = dropout_cost(options.repeats)
    if options.json:
        json.dump(document, sys.stdout, indent=2)
        return
    print("\nwhat a meta-gradient costs, MAML = 1 (wanted: at most 1.8)")
    for entrant, value in cost.items():
        print(f"{entrant:>42}: {value:5.2f}")


if __name__ == "__main__":
    main()
