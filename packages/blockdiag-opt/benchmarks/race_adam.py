"""Race: what blocks cost, as a multiple of ``torch.optim.Adam(foreach=True)``'s ``step()``, the floor.

python benchmarks/race_adam.py [--models mlp autoencoder cnn] [--intervals 1 20] [--threads 1] [--json FILE]
"""

from __future__ import annotations

import torch
from peers import Contestant, as_result, options_of, ours, print_times, race, write_json


def main() -> None:
    parser = options_of(__doc__.splitlines()[0], steps=100, intervals=[1, 20], block_sizes=[4, 10])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = []
    for model in options.models:
        for interval in options.intervals:
            contestants = [Contestant("Adam", "torch:Adam", {"foreach": True})]
            contestants += [
                ours(options, f"{options.ours} b={b}", block_size=b, update_interval=interval)
                for b in options.block_sizes
            ]
            times, _ = race(contestants, model, options.steps, interval, options.seed)
            print_times(f"{model}, K={interval}, {options.threads} thread(s)", times)
            ratios = {f"{us.label} / Adam": us.median_ms / times[0].median_ms for us in times[1:]}
            for label, ratio in ratios.items():
                print(f"  ratio {label}: {ratio:.2f}x")
            results.append(as_result(times, interval=interval, ratios=ratios))
    write_json(options, results)


if __name__ == "__main__":
    main()
