"""Race: second-order meta-gradients over any-shot tasks, ours against `higher` and `parallel-metalearn`.

    python benchmarks/race_metasgd.py [--repeats 5] [--size 28] [--filters 32] [--most 50] [--threads 1] [--json]

Needs ``pip install higher parallel-metalearn`` (learn2learn 0.2.0, whose Meta-SGD loop does the same as the loop with
`higher` here, has C extensions that do not build on current Pythons). Networks, tasks and initial values are equal,
everything runs in one process, the entrants taking turns, and the median of the repeats counts. Meta-gradients must
agree first. 5-way, 1 to ``most`` shots a class (every class its own), 8 tasks, 75 queries a task, 5 inner steps, four
blocks of 3x3 convolutions.

(a) Meta-SGD with batch normalisation, against `higher`, which adapts one task after another and pads nothing.
(b) MAML without normalisation, against `parallel-metalearn`, which pads every support to ways x most rows and runs all
tasks under one ``vmap``; under normalisation its padding would change the statistics, so that gradients would differ.
(c) What Bayesian TAML's step costs against our own Meta-SGD step.
(d) What 100 rows of garbage that pad a support change in the meta-gradient.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from bayes_taml import Latents, MetaLearner, Tasks, conv_features
from bayes_taml.engine import HEAD_BIAS, HEAD_WEIGHT, Plan, meta_gradients
from bayes_taml.networks import Modulated

Gradients = Mapping[str, Tensor]
WAYS, QUERIES, STEPS, TASKS = 5, 15, 5, 8


def draw(size: int, most: int, tasks: int = TASKS, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tasks:
    random = torch.Generator().manual_seed(seed)
    asked = torch.arange(WAYS).repeat_interleave(QUERIES)
    made = []
    for _ in range(tasks):
        labels = torch.arange(WAYS).repeat_interleave(torch.randint(1, most + 1, (WAYS,), generator=random))
        x = torch.rand(len(labels), 1, size, size, generator=random, dtype=dtype)
        made.append((x, labels, torch.rand(len(asked), 1, size, size, generator=random, dtype=dtype), asked))
    return Tasks.collate(made, WAYS)


def plain(size: int, filters: int, *, norm: bool) -> nn.Sequential:
    """Build the network as the peers have it: the usual order, and a head that starts at zero."""
    layers: list[nn.Module] = []
    for block in range(4):
        layers.append(nn.Conv2d(1 if block == 0 else filters, filters, 3, padding=1))
        if norm:
            layers.append(nn.BatchNorm2d(filters, eps=1e-3, affine=False, track_running_stats=False))
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
    head = nn.Linear(filters * (size // 16) ** 2, WAYS)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return nn.Sequential(*layers, nn.Flatten(), head)


def convolutions(module: nn.Module) -> list[nn.Conv2d]:
    return [m for m in module.modules() if isinstance(m, nn.Conv2d)]


def same_weights(source: nn.Module, target: nn.Module) -> None:
    for a, b in zip(convolutions(source), convolutions(target), strict=True):
        b.load_state_dict(a.state_dict())


def conv_gradients(module: nn.Module, by_name: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Gradients of the convolutions' weights, under names that all entrants share."""
    names = {id(p): name for name, p in module.named_parameters()}
    found: dict[str, Tensor] = {}
    for place, conv in enumerate(convolutions(module)):
        gradient = by_name[names[id(conv.weight)]]
        assert gradient is not None
        found[f"conv{place}"] = gradient
    return found


def metasgd(size: int, filters: int, tasks: Tasks) -> dict[str, Callable[[], Gradients]]:
    """Setting (a)."""
    import higher

    backbone = conv_features(size=size, filters=filters, init="kaiming")
    model = Modulated(backbone, (1, size, size))
    parameters = dict(backbone.named_parameters())
    rates = {name: torch.full_like(parameters[name], 0.05, requires_grad=True) for name in model.theta}
    rates[HEAD_WEIGHT] = torch.full((1, model.features), 0.05, requires_grad=True)
    rates[HEAD_BIAS] = torch.full((1,), 0.05, requires_grad=True)

    def ours(backend: str) -> Gradients:
        plan = Plan(steps=STEPS, backend=backend)
        found = meta_gradients(model, parameters, tasks, Latents(), rates, plan).gradients
        named = conv_gradients(backbone, found)
        return {**named, "rate": torch.cat([found[f"rate.{n}"].flatten() for n in model.theta if "weight" in n])}

    peer = plain(size, filters, norm=True)
    same_weights(backbone, peer)
    optimizer = torch.optim.SGD([{"params": [p], "lr": 0.05} for p in peer.parameters()])
    own_rates = [torch.full(p.shape, 0.05, requires_grad=True) for p in list(peer.parameters())[:-2]]
    own_rates += [torch.full(shape, 0.05, requires_grad=True) for shape in ((1, model.features), (1,))]

    def loop() -> Gradients:
        peer.zero_grad()
        for rate in own_rates:
            rate.grad = None
        for t in range(len(tasks)):
            x, y = tasks.support[t, tasks.support_mask[t]], tasks.support_labels[t, tasks.support_mask[t]]
            with higher.innerloop_ctx(peer, optimizer, copy_initial_weights=False) as (fast, inner):
                for _ in range(STEPS):
                    inner.step(functional.cross_entropy(fast(x), y), override={"lr": own_rates})
                loss = functional.cross_entropy(fast(tasks.query[t]), tasks.query_labels[t])
                (loss / len(tasks)).backward()
        named = conv_gradients(peer, {name: p.grad for name, p in peer.named_parameters()})
        shared = [r.grad.flatten() for r in own_rates[:-2] if r.dim() > 1 and r.grad is not None]
        return {**named, "rate": torch.cat(shared)}

    return {
        "higher": loop,
        "ours": lambda: ours("auto"),
        "ours, one task after another": lambda: ours("loop"),
    }


def maml(size: int, filters: int, most: int, tasks: Tasks) -> dict[str, Callable[[], Gradients]]:
    """Setting (b)."""
    from metalearn.algorithms.MAML import MAML
    from metalearn.inner_optimizers.optimizers import InnerSGD
    from metalearn.loss.base import BaseLoss

    peer = plain(size, filters, norm=False)
    for conv in convolutions(peer):
        nn.init.kaiming_normal_(conv.weight)
    backbone = copy.deepcopy(peer[:-1])
    model = Modulated(backbone, (1, size, size))
    parameters = dict(backbone.named_parameters())

    def ours(backend: str) -> Gradients:
        plan = Plan(steps=STEPS, backend=backend)
        return conv_gradients(backbone, meta_gradients(model, parameters, tasks, Latents(), 0.05, plan).gradients)

    class Loss(BaseLoss):
        def forward(self, out_dict, targets, model_states=None, **more):  # noqa: ARG002
            per_row = functional.cross_entropy(out_dict["logits"], targets["labels"], reduction="none")
            mask = targets["samples_mask"].to(per_row.dtype)
            return (per_row * mask).sum() / mask.sum(), torch.zeros(())

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = peer

        def forward(self, x, **more):  # noqa: ARG002
            return {"logits": self.module(x), "buffers": {}}

        def get_fast_weights(self, **more):  # noqa: ARG002
            return OrderedDict(self.named_parameters())

    wrapped = Wrapped()
    inner = InnerSGD(wrapped.get_fast_weights(), inner_lr=0.05, max_inner_steps=STEPS, learn_lr=False)
    learner = MAML(
        model=wrapped, optimizer=torch.optim.SGD(wrapped.parameters(), lr=0.0), inner_optimizer=inner,
        support_loss_fn=Loss(), inner_steps=STEPS, chunk_size=len(tasks), device=torch.device("cpu"),
    )  # fmt: skip
    missing = WAYS * most - tasks.support.shape[1]
    support = functional.pad(tasks.support, (0, 0, 0, 0, 0, 0, 0, missing))
    labels, mask = (functional.pad(v, (0, missing)) for v in (tasks.support_labels, tasks.support_mask))
    batch = (
        support,
        {"labels": labels, "samples_mask": mask},
        tasks.query,
        {"labels": tasks.query_labels, "samples_mask": tasks.query_mask},
    )

    def step() -> Gradients:
        learner.step(itertools.repeat(batch))
        return conv_gradients(peer, {name: p.grad for name, p in peer.named_parameters()})

    return {"parallel-metalearn": step, "ours": lambda: ours("auto")}


def own_steps(size: int, filters: int, most: int, tasks: Tasks) -> dict[str, Callable[[], object]]:
    """Setting (c)."""

    def step(method: str) -> Callable[[], object]:
        learner = MetaLearner(
            conv_features(size=size, filters=filters, init="kaiming"), method, input_shape=(1, size, size),
            inner_lr=0.05, inner_steps=STEPS, max_shot=most,
        )  # fmt: skip
        seeds = list(range(len(tasks)))
        return lambda: learner.meta_step(tasks, seeds)

    return {"Meta-SGD": step("metasgd"), "Bayesian TAML": step("bayesian-taml")}


def agreement(made: Callable[[Tasks], Mapping[str, Callable[[], Gradients]]], size: int, most: int) -> float:
    """Return the largest difference between entrants' gradients, relative to the largest gradient of the same kind.

    In double precision, on two of the tasks: in single precision a rounding error decides which of two pixels that are
    all but equal is the larger, and gradients of such a network then differ in the third digit.
    """
    torch.set_default_dtype(torch.float64)
    entrants = made(draw(size, most, 2, dtype=torch.float64))
    first, *rest = [entrant() for entrant in entrants.values()]
    torch.set_default_dtype(torch.float32)
    worst = max(float((first[k] - other[k]).abs().max() / first[k].abs().max()) for other in rest for k in first)
    if worst > 1e-6:
        raise RuntimeError(f"meta-gradients differ by {worst:.2g} of the largest; that is no race")
    return worst


def median_seconds(found: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(repeats):
        for name, entrant in found.items():
            start = time.perf_counter()
            entrant()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def padding_error(filters: int) -> float:
    """Setting (d), in double precision."""
    tasks = draw(16, 10, 3, dtype=torch.float64)
    garbage = torch.full((3, 100, 1, 16, 16), float("nan"), dtype=torch.float64)
    padded = replace(
        tasks,
        support=torch.cat([tasks.support, garbage], 1),
        support_labels=functional.pad(tasks.support_labels, (0, 100), value=3),
        support_mask=functional.pad(tasks.support_mask, (0, 100)),
    )
    backbone = conv_features(size=16, filters=filters, init="kaiming").double()
    model = Modulated(backbone, (1, 16, 16))
    parameters = dict(backbone.named_parameters())
    a, b = (meta_gradients(model, parameters, t, Latents(), 0.05, Plan(steps=STEPS)).gradients for t in (tasks, padded))
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("repeats", 5), ("size", 28), ("filters", 32), ("most", 50), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    tasks = draw(given.size, given.most)
    found: dict[str, object] = {}
    settings: dict[str, Callable[[Tasks], dict[str, Callable[[], Gradients]]]] = {
        "a: Meta-SGD, batch norm": lambda tasks: metasgd(given.size, given.filters, tasks),
        "b: MAML, no norm": lambda tasks: maml(given.size, given.filters, given.most, tasks),
    }
    for name, made in settings.items():
        worst = agreement(made, given.size, given.most)
        entrants = made(tasks)
        seconds = median_seconds(entrants, given.repeats)
        peer = next(iter(seconds.values()))
        found[name] = {"gradients differ by": worst, "seconds": seconds, "ratio": peer / seconds["ours"]}
    cost = median_seconds(own_steps(given.size, given.filters, given.most, tasks), given.repeats)
    found["c: step against our Meta-SGD"] = {"seconds": cost, "ratio": cost["Bayesian TAML"] / cost["Meta-SGD"]}
    found["d: change by 100 rows of NaN as padding"] = padding_error(8)
    if given.json:
        json.dump(found, sys.stdout, indent=2)
        return
    for name, value in found.items():
        if not isinstance(value, dict):
            print(f"{name}: {value:.1e}")
            continue
        print(
            name
            + (f" (gradients agree to {value['gradients differ by']:.0e})" if "gradients differ by" in value else "")
        )
        for entrant, seconds in value["seconds"].items():
            print(f"  {entrant:<30} {seconds:8.3f} s a meta-step, {TASKS / seconds:6.2f} tasks/s")
        print(f"  ratio {value['ratio']:.2f}")


if __name__ == "__main__":
    main()
