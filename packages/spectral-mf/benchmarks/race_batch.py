"""Race: a thousand models in one call against a loop over them, both ours.

    python benchmarks/race_batch.py [--models 1000] [--loop 50] [--threads 1 2] [--json]

Complete models of 20 spins, couplings uniform in ±2, fields in ±1. The loop runs over the first ``--loop`` models, and
is scaled; each clock is the best of ``--repeats``, after a warm-up call. AIS takes part with fewer
models (the column says). With two threads on two cores that others use too, threads wait for each other: set
``OMP_WAIT_POLICY=passive`` or believe the figures of one thread.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from spectral_mf.estimate import log_partition

METHODS = ("spectral", "gaussian", "modes", "mean_field", "belief_propagation", "exact_enumeration", "ais")
FEW = {"ais": 50}
TARGETS = {"spectral": 10.0, "modes": 10.0}


@dataclass
class Result:
    """Milliseconds a model, alone and in a batch."""

    method: str
    threads: int
    models: int
    alone_ms: float
    batched_ms: float
    ratio: float
    apart: float


def best(call: Callable[[], object], repeats: int) -> float:
    took: list[float] = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        took.append(time.perf_counter() - start)
    return min(took)


def race(method: str, A: np.ndarray, b: np.ndarray, loop: int, repeats: int) -> Result:
    count = min(len(A), FEW.get(method, len(A)))
    loop = min(loop, count)
    A, b = A[:count], b[:count]

    def alone() -> np.ndarray:
        return np.array([log_partition(A[k], b[k], method=method).value for k in range(loop)])

    def batched() -> np.ndarray:
        return log_partition(A, b, method=method).value

    log_partition(A[0], b[0], method=method)
    log_partition(A[: min(count, 16)], b[: min(count, 16)], method=method)
    one, many = best(alone, repeats) / loop, best(batched, repeats) / count
    apart = float(np.abs(alone() - batched()[:loop]).max())
    return Result(method, torch.get_num_threads(), count, 1e3 * one, 1e3 * many, one / many, apart)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--spins", type=int, default=20)
    parser.add_argument("--models", type=int, default=1000)
    parser.add_argument("--loop", type=int, default=50, help="models the loop runs over")
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rng = np.random.default_rng(options.seed)
    n, strength = options.spins, options.strength
    A = np.triu(rng.uniform(-2 * strength, 2 * strength, (options.models, n, n)), 1)
    A, b = A + A.transpose(0, 2, 1), rng.uniform(-1, 1, (options.models, n))
    results: list[Result] = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        # NumPy's BLAS has threads of its own.
        threadpool_limits(threads)
        for method in options.methods:
            r = race(method, A, b, options.loop, options.repeats)
            results.append(r)
            if not options.json:
                target = TARGETS.get(method)
                goal = "" if target is None else f"; target {target:g}x"
                print(
                    f"{method:>20}, {threads} thread(s), {r.models} models: {r.alone_ms:8.3f} ms alone,"
                    f" {r.batched_ms:8.3f} ms batched: {r.ratio:5.1f}x{goal} (values differ by at most {r.apart:.1e})",
                    flush=True,
                )
    if options.json:
        json.dump({"options": vars(options), "results": [asdict(r) for r in results]}, sys.stdout, indent=2)


if __name__ == "__main__":
    main()
