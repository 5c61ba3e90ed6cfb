"""Race: one fit of 50 networks at once against one fit of a single network.

    python benchmarks/race_members.py [--members 1 5 10 50] [--steps 300] [--threads 1 2] [--repeats 2] [--quick]

Against ourselves: how the time of one ``CIB`` fit grows with ``n_members``, all members being one batched program. The
fits take the same number of steps (the patience is never reached), on one draw of IHDP (or of the embedded data, where
``SHARED_CORE_DATA`` names no folder with it), with ``interval="none"``, so that nothing is timed but the networks and
their checks every 25 steps. One process; a short warm-up; of `repeats` fits the fastest counts, which other load
disturbs least. Networks as by default, and as wide as CFR's, for which arithmetic weighs more against the fixed costs
of each operation, which batching shares: expect more growth there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import torch
from race_catenets import load_draws

from cib_ite.estimator import CIB
from shared_core.errors import InputError

SIZES: dict[str, dict[str, Any]] = {
    "default": {},
    "CFR's": {"trunk": (200, 200, 200), "heads": (100, 100, 100), "latent": 32},
}
WANTED = 8.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--members", type=int, nargs="+", default=[1, 5, 10, 50])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="50 steps, once, one thread: to see whether it runs")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.repeats, options.threads = 50, 1, options.threads[:1]
    if options.members[0] != 1:
        raise InputError(f"--members: growth is against one member; start with 1, got {options.members[0]}")
    data, (draw,) = load_draws(1)
    rows = draw.fitting

    def seconds(members: int, steps: int, sizes: dict[str, Any]) -> float:
        model = CIB(n_members=members, steps=steps, patience=10**9, interval="none", device="cpu", **sizes)
        start = time.perf_counter()
        model.fit(rows.x, rows.treatment, rows.y)
        taken = time.perf_counter() - start
        if model.history_[-1]["step"] != steps:
            raise RuntimeError(f"took {model.history_[-1]['step']:.0f} of {steps} steps; that is no race")
        return taken

    results: list[dict[str, Any]] = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for label, sizes in SIZES.items():
            if not options.json:
                print(f"\n{data}: {rows.n} rows, {options.steps} steps; sizes {label}; threads: {threads}", flush=True)
            for members in options.members:
                seconds(members, 25, sizes)
                best = min(seconds(members, options.steps, sizes) for _ in range(options.repeats))
                first = best if members == 1 else results[-options.members.index(members)]["seconds"]
                line = {"sizes": label, "threads": threads, "members": members, "seconds": best, "growth": best / first}
                results.append(line)
                if not options.json:
                    each = 1e3 * best / options.steps
                    print(
                        f"{members:4d} members: {best:8.2f} s, {each:7.2f} ms a step, {best / first:6.2f} x one member,"
                        f" {members * first / best:5.1f} times as fast as one by one",
                        flush=True,
                    )
    if options.json:
        json.dump({"options": vars(options), "data": data, "results": results}, sys.stdout, indent=2)
        return
    most = max(options.members)
    print(f"\nGrowth from 1 to {most} members (wanted for 50 at the default sizes: at most {WANTED:g}):")
    for line in results:
        if line["members"] == most:
            verdict = "reached" if line["growth"] <= WANTED else "missed"
            print(f"  sizes {line['sizes']}, threads {line['threads']}: {line['growth']:.2f} ({verdict})")


if __name__ == "__main__":
    main()
