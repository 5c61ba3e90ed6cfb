"""Race: tracing, choosing and cutting a network, and the small network's time, against torch-pruning.

    python benchmarks/race_torch_pruning.py [--repeats 9] [--threads 2] [--batch 64] [--json]

Needs ``pip install torch-pruning``. Everything runs in one process, the entrants taking turns, and the median of the
repeats counts. (a) From a network to one of half its channels: their dependency graph and a step of their pruner by
magnitude against our trace, L1 scores, choice and cut, both in place; copies are made outside the clock. (b) A forward
pass of ResNet-18 at half its widths on 32 x 32 images: the dense network, ours and theirs, whose widths must be equal
layer by layer. Wanted: theirs / ours at least 1 in (a); dense / ours at least 2 and theirs / ours at least 0.95 in (b).
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from stamp.baselines import SCORERS
from stamp.counting import macs
from stamp.examples import Examples
from stamp.groups import trace
from stamp.networks import resnet18, resnet50
from stamp.selection import widths_like
from stamp.surgery import cut
from stamp.timing import time_together

IMAGE = (1, 3, 32, 32)


def ours(model: nn.Module) -> nn.Module:
    groups = trace(model, torch.rand(IMAGE))
    nothing = Examples(torch.rand(IMAGE), torch.zeros(1, dtype=torch.int64), ("a",))
    scores = SCORERS["l1"](model, groups, nothing, torch.Generator())
    keep = widths_like(scores, {name: width // 2 for name, width in groups.widths().items()})
    return cut(model, groups, keep, inplace=True)


def theirs(model: nn.Module) -> nn.Module:
    import torch_pruning as tp

    pruner = tp.pruner.MagnitudePruner(
        model,
        torch.rand(IMAGE),
        importance=tp.importance.MagnitudeImportance(p=1),
        pruning_ratio=0.5,
        ignored_layers=[model.fc],
    )
    pruner.step()
    return model


def widths(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }


def checked(entrants: Mapping[str, Callable[[nn.Module], nn.Module]], model: nn.Module) -> dict[str, nn.Module]:
    """Let each prune a copy; their networks must be of one shape, or it is no race."""
    made = {name: entrant(copy.deepcopy(model)) for name, entrant in entrants.items()}
    shapes = {name: widths(small) for name, small in made.items()}
    for name, shape in shapes.items():
        odd = [layer for layer in shape if shape[layer] != shapes["ours"][layer]]
        if odd:
            raise RuntimeError(f"{name} leaves {odd[0]} with {shape[odd[0]]}, ours with {shapes['ours'][odd[0]]}")
    return made


def prune_seconds(
    entrants: Mapping[str, Callable[[nn.Module], nn.Module]], model: nn.Module, repeats: int
) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in entrants}
    for _ in range(repeats):
        for name, entrant in entrants.items():
            copied = copy.deepcopy(model)
            start = time.perf_counter()
            entrant(copied)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def latency(networks: Mapping[str, nn.Module], batch: Tensor, repeats: int) -> dict[str, dict[str, float]]:
    timings = time_together(networks, batch, warmup=10, repeats=repeats)
    return {
        name: {"p50_ms": timings.p50(name), "p90_ms": timings.p90(name), "macs": macs(network, batch[:1])}
        for name, network in networks.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="torch_pruning")
    torch.set_num_threads(options.threads)
    entrants = {"torch-pruning": theirs, "ours": ours}
    document: dict[str, object] = {"options": vars(options)}

    def say(text: str) -> None:
        if not options.json:
            print(text, flush=True)

    for name, make in {"ResNet-18": resnet18, "ResNet-50": resnet50}.items():
        model = make().eval()
        checked(entrants, model)
        seconds = prune_seconds(entrants, model, options.repeats)
        ratio = seconds["torch-pruning"] / seconds["ours"]
        document[f"a: {name}"] = {"seconds": seconds, "theirs/ours": ratio}
        say(f"\n(a) {name} to half its channels (wanted: at least 1.0)")
        for entrant, value in seconds.items():
            say(f"{entrant:>14}: {1000 * value:8.1f} ms  {seconds['torch-pruning'] / value:6.2f} x")

    model = resnet18().eval()
    networks = {"dense": model, **checked(entrants, model)}
    batch = torch.rand(options.batch, *IMAGE[1:], generator=torch.Generator().manual_seed(0))
    found = latency(networks, batch, options.repeats)
    fast = found["ours"]["p50_ms"]
    ratios = {
        "dense/ours": found["dense"]["p50_ms"] / fast,
        "theirs/ours": found["torch-pruning"]["p50_ms"] / fast,
    }
    document["b: ResNet-18, half widths"] = {"networks": found, **ratios}
    say(f"\n(b) ResNet-18 at half its widths, batch {options.batch}, {options.threads} threads")
    for entrant, figures in found.items():
        say(
            f"{entrant:>14}: {figures['p50_ms']:8.1f} ms (90 %: {figures['p90_ms']:.1f})"
            f"  {figures['macs'] / 1e6:7.1f} M multiply-adds an image"
        )
    say(f"dense / ours {ratios['dense/ours']:.2f} (wanted: at least 2)")
    say(f"theirs / ours {ratios['theirs/ours']:.3f} (wanted: at least 0.95)")
    if options.json:
        json.dump(document, sys.stdout, indent=2)


if __name__ == "__main__":
    main()
