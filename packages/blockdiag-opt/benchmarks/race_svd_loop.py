"""Race: our ``step()`` against the authors' loop over tensors with an SVD of each block, both at every step.

    python benchmarks/race_svd_loop.py [--models mlp autoencoder cnn] [--block-sizes 10] [--threads 1] [--json FILE]

``AdaBlock`` takes the same steps as the loop (groups, damping, jitter) where b divides the outputs of every layer;
where not, the loop's blocks straddle two neurons and ours do not. The table says how far the weights are apart at the
end, in parts of the largest distance that a weight has gone: rounding on ``mlp`` and ``cnn`` with b = 10, and on
``autoencoder`` with b = 4. Target: 5 times as fast.
"""

from __future__ import annotations

import torch
from peers import Contestant, as_result, build_model, options_of, ours, print_times, race, write_json

TARGET = 5.0


def main() -> None:
    parser = options_of(__doc__.splitlines()[0], steps=30, intervals=[1], block_sizes=[10])
    parser.set_defaults(ours="AdaBlock")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = []
    for model in options.models:
        for b in options.block_sizes:
            contestants = [Contestant("authors' loop", "peers:PerTensorSVD", {"block_size": b})]
            contestants += [
                ours(options, f"{options.ours} K={k}", block_size=b, update_interval=k) for k in options.intervals
            ]
            times, ends = race(contestants, model, options.steps, max(options.intervals), options.seed)
            print_times(f"{model}, b={b}, {options.threads} thread(s)", times)
            start = torch.cat([p.detach().flatten() for p in build_model(model, options.seed).parameters()])
            facts = {}
            for us, end in zip(times[1:], ends[1:], strict=True):
                ratio = times[0].median_ms / us.median_ms
                apart = float((end - ends[0]).abs().max() / (ends[0] - start).abs().max())
                facts[us.label] = {"ratio": ratio, "apart": apart}
                print(f"  ratio authors' loop / {us.label}: {ratio:.1f}x; target {TARGET:g}x (apart by {apart:.1e})")
            results.append(as_result(times, block_size=b, against=facts))
    write_json(options, results)


if __name__ == "__main__":
    main()
