"""Race: our ``step()`` against SOAP's at the same interval between eigen-decompositions.

    python benchmarks/race_soap.py [--models mlp autoencoder cnn] [--intervals 1 5 10] [--threads 1] [--json FILE]

Both optimizers step on the same gradients, in turns, in one process; the clock is on ``step()`` alone, summed over the
K steps from one refresh to the next. ``--peers heavyball:SOAP pytorch_optimizer:ScalableShampoo`` adds others. Steps
are not equally good for a loss: SOAP rotates a whole layer, we decompose blocks of b weights exactly.
"""

from __future__ import annotations

from typing import Any

import torch
from peers import Contestant, as_result, options_of, ours, print_times, race, write_json


def peer(name: str, interval: int) -> Contestant:
    """Give a peer the interval by the name it has there, and no weight decay."""
    kind = name.rpartition(":")[2]
    options: dict[str, Any] = {"weight_decay": 0.0}
    if kind == "Shampoo":
        options["preconditioning_compute_steps"] = interval
    elif kind == "ScalableShampoo":
        options |= {"preconditioning_compute_steps": interval, "start_preconditioning_step": 1}
    else:
        options["precondition_frequency"] = interval
    if name == "heavyball:SOAP":
        # Its default schedule stretches the interval as training goes on.
        options |= {"use_precond_schedule": False, "compile_step": False}
    return Contestant(name, name, options)


def main() -> None:
    parser = options_of(__doc__.splitlines()[0], steps=60, intervals=[1, 5, 10], block_sizes=[10])
    parser.add_argument("--peers", nargs="*", default=["pytorch_optimizer:SOAP"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = []
    for model in options.models:
        for interval in options.intervals:
            contestants = [peer(name, interval) for name in options.peers]
            contestants += [
                ours(options, f"{options.ours} b={b}", block_size=b, update_interval=interval)
                for b in options.block_sizes
            ]
            times, _ = race(contestants, model, options.steps, interval, options.seed)
            print_times(f"{model}, K={interval}, {options.threads} thread(s)", times)
            rivals, mine = times[: len(options.peers)], times[len(options.peers) :]
            ratios = {f"{them.label} / {us.label}": them.median_ms / us.median_ms for them in rivals for us in mine}
            for label, ratio in ratios.items():
                print(f"  ratio {label}: {ratio:.2f}x")
            results.append(as_result(times, interval=interval, ratios=ratios))
    write_json(options, results)


if __name__ == "__main__":
    main()
