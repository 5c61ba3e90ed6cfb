"""Speed of the wire format, as bytes of the dense tensor a second; ``python benchmarks/codec.py``."""

from __future__ import annotations

import statistics
import time

import torch

from fedapc.sparse import SparseTensor
from fedapc.wire import decode, encode, encode_sparse

SHAPE = (800, 3200)
REPEATS = 5


def median_seconds(function):
    taken = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        function()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def main():
    torch.set_num_threads(1)
    random = torch.Generator().manual_seed(0)
    tensor = torch.randn(SHAPE, generator=random)
    chance = torch.rand(SHAPE, generator=random)
    megabytes = tensor.numel() * 4 / 1e6
    print(f"{megabytes:.1f} MB of float32, MB/s dense-equivalent")
    print(f"{'kept':>12} {'codec':>7} {'encode':>8} {'decode':>8} {'dense':>8}")
    cases = {f"{density:g}": {"keep": chance < density} for density in (0.001, 0.01, 0.05, 0.1, 0.3, 0.5, 0.9, 1.0)}
    cases["rows 0.3"] = {"rows": torch.rand(SHAPE[0], generator=random) < 0.3}
    for name, options in cases.items():
        blob = encode(tensor, **options)
        speeds = [median_seconds(lambda options=options: encode(tensor, **options))]
        speeds.append(median_seconds(lambda blob=blob: decode(blob)))
        speeds.append(median_seconds(lambda blob=blob: decode(blob).dense()))
        print(f"{name:>12} {decode(blob).codec:>7}" + "".join(f" {megabytes / s:8.0f}" for s in speeds))
    for density in (0.01, 0.1, 0.5):
        part = SparseTensor.of(tensor * (chance < density))
        blob = encode_sparse(part)
        speeds = [
            median_seconds(lambda part=part: encode_sparse(part)),
            median_seconds(lambda blob=blob: decode(blob).sparse()),
        ]
        print(f"sparse {density:>5g} {decode(blob).codec:>7}" + "".join(f" {megabytes / s:8.0f}" for s in speeds))


if __name__ == "__main__":
    main()
