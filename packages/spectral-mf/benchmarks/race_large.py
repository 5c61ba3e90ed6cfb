"""Race against ourselves: seconds and peak memory of the estimators on large dense models.

    python benchmarks/race_large.py [--sizes 50 100 200 500 1000] [--methods spectral bounds modes ais] [--json]

Sherrington-Kirkpatrick models below and beyond their transition (β = 0.5 and 1.5), and a Hopfield network with two
patterns at twice its critical strength; ±0.1 fields on all. Each run is a process of its own, so that its peak memory
(resident, less what it was with the model made and everything imported) is its own; one thread unless asked otherwise.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from typing import Any

FAMILIES: dict[str, tuple[str, float, dict[str, Any]]] = {
    "sk 0.5": ("sk", 0.5, {"field": 0.1}),
    "sk 1.5": ("sk", 1.5, {"field": 0.1}),
    "hopfield 2": ("hopfield", 2.0, {"patterns": 2, "field": 0.1}),
}


@dataclass
class Result:
    """One method on one model."""

    family: str
    n: int
    method: str
    seconds: float | None
    peak_mb: float | None
    value: float | None
    lower: float | None
    upper: float | None
    error: str = ""


def peak_mb() -> float:
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Kilobytes on Linux, bytes on macOS.
    return size / (1024 if sys.platform != "darwin" else 1024**2)


def one(family: str, n: int, method: str, threads: int) -> Result:
    """What the child process does."""
    import torch
    from threadpoolctl import threadpool_limits

    from spectral_mf.bounds import log_partition_bounds
    from spectral_mf.estimate import log_partition
    from spectral_mf.generators import generate

    torch.set_num_threads(threads)
    # NumPy's BLAS has threads of its own.
    threadpool_limits(threads)
    warnings.simplefilter("ignore")
    name, strength, options = FAMILIES[family]
    A, b = generate(name, n, strength, 0, **options)
    small = generate(name, 20, strength, 0, **options)
    if method == "bounds":
        log_partition_bounds(*small)
    else:
        log_partition(*small, method=method)
    before, start = peak_mb(), time.perf_counter()
    if method == "bounds":
        found = log_partition_bounds(A, b)
        value = None
    else:
        found = log_partition(A, b, method=method)
        value = float(found.value)
    seconds = time.perf_counter() - start
    return Result(family, n, method, seconds, peak_mb() - before, value, float(found.lower), float(found.upper))


def run(family: str, n: int, method: str, threads: int, limit: float) -> Result:
    child = [sys.executable, __file__, "--child", family, str(n), method, "--threads", str(threads)]
    try:
        done = subprocess.run(child, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return Result(family, n, method, None, None, None, None, None, f"over {limit:g} s")
    if done.returncode:
        return Result(family, n, method, None, None, None, None, None, done.stderr.strip().splitlines()[-1])
    return Result(**json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="*", default=[50, 100, 200, 500, 1000])
    parser.add_argument("--families", nargs="*", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--methods", nargs="*", default=["spectral", "bounds", "modes", "ais"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=float, default=600.0, help="seconds a run may take")
    parser.add_argument("--child", nargs=3, metavar=("FAMILY", "N", "METHOD"), help="make one run and print it")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    if options.child:
        family, n, method = options.child
        json.dump(asdict(one(family, int(n), method, options.threads)), sys.stdout)
        return
    results: list[Result] = []
    for family in options.families:
        for method in options.methods:
            for n in options.sizes:
                r = run(family, n, method, options.threads, options.limit)
                results.append(r)
                if options.json:
                    continue
                if r.seconds is None:
                    print(f"{family:>10} n={n:<5} {method:>9}: {r.error}", flush=True)
                    continue
                value = "" if r.value is None else f" log Z / n {r.value / n:.5f},"
                print(
                    f"{family:>10} n={n:<5} {method:>9}: {r.seconds:8.2f} s, {r.peak_mb:7.0f} MB;{value}"
                    f" in [{r.lower / n:.5f}, {r.upper / n:.5f}] n",
                    flush=True,
                )
    if options.json:
        json.dump({"options": vars(options), "results": [asdict(r) for r in results]}, sys.stdout, indent=2)


if __name__ == "__main__":
    main()
