"""Race: exact log Z of grids with couplings ±J, against toulbar2 and tensor networks (quimb, cotengra).

    python benchmarks/race_grids.py [--grids 6x6 8x8 10x10 14x14 18x18 22x22] [--limit 20] [--json]

Needs the peers (``pip install pytoulbar2 quimb cotengra``). Fields ±0.1; one model each. Ours: ``exact_transfer`` and
``exact_elimination``. toulbar2 counts by depth-first search: ``Option.isZ`` with ``NormFactor`` 10^decimals (else its
integer costs are taken for logarithms) and ``logepsilon`` of minus infinity; with a tree decomposition it returns no
log Z. A run it cannot finish within ``--limit`` CPU seconds is "unfinished": its value is then a partial sum. Of the
tensor networks' clock, the search of a contraction path (``auto-hq``, and cotengra's greedy optimizer with 16 tries) is
shown apart: further models of that shape need only the rest. Imports are outside the clocks; no warm-up for any.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from shared_core.errors import InputError
from spectral_mf.estimate import log_partition
from spectral_mf.generators import generate

_DECIMALS = 7


@dataclass
class Result:
    """One method on one grid."""

    grid: str
    method: str
    value: float | None
    seconds: float
    note: str = ""


def ours(grid: str, A: np.ndarray, b: np.ndarray, method: str, **options: Any) -> Result:
    start = time.perf_counter()
    try:
        value = float(log_partition(A, b, method=method, **options).value)
    except InputError as error:
        return Result(grid, method, None, time.perf_counter() - start, f"refuses: {error}")
    return Result(grid, method, value, time.perf_counter() - start)


def pairs(A: np.ndarray) -> list[tuple[int, int, float]]:
    i, j = np.nonzero(np.triu(A, 1))
    return list(zip(i.tolist(), j.tolist(), A[i, j].tolist(), strict=True))


@contextmanager
def silenced() -> Iterator[None]:
    """Keep what C++ prints off stdout, where ``--json`` promises one document."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def toulbar2(grid: str, A: np.ndarray, b: np.ndarray, limit: float) -> Result:
    import pytoulbar2

    start = time.perf_counter()
    network = pytoulbar2.CFN(1e9, resolution=_DECIMALS)
    network.Option.isZ = True
    network.Option.NormFactor = 10.0**_DECIMALS
    network.Option.logepsilon = -math.inf
    for k, field in enumerate(b.tolist()):
        network.AddVariable(f"x{k}", [0, 1])
        network.AddFunction([k], [abs(field) + field, abs(field) - field])
    shift = float(np.abs(b).sum())
    for i, j, a in pairs(A):
        # Costs must not be negative.
        network.AddFunction([i, j], [abs(a) - a, abs(a) + a, abs(a) + a, abs(a) - a])
        shift += abs(a)
    with silenced():
        network.Solve(timeLimit=math.ceil(limit))
    seconds = time.perf_counter() - start
    value = network.Option.logZ + shift
    if seconds >= limit:
        return Result(grid, "toulbar2", None, seconds, f"unfinished, partial sum {value:.4f}")
    return Result(grid, "toulbar2", value, seconds, f"{network.GetNbBacktracks()} backtracks")


def tensors(A: np.ndarray, b: np.ndarray) -> tuple[list[tuple[int, ...]], list[np.ndarray], float]:
    """Indices and arrays of the network, scaled so that no entry is above one, and the logarithm of the scale."""
    x = np.array([-1.0, 1.0])
    where: list[tuple[int, ...]] = [(k,) for k in range(len(b))]
    arrays = [np.exp(b[k] * x - abs(b[k])) for k in range(len(b))]
    log_scale = float(np.abs(b).sum())
    for i, j, a in pairs(A):
        where.append((i, j))
        arrays.append(np.exp(a * np.outer(x, x) - abs(a)))
        log_scale += abs(a)
    return where, arrays, log_scale


def quimb(grid: str, A: np.ndarray, b: np.ndarray) -> Result:
    import quimb.tensor as qtn

    start = time.perf_counter()
    where, arrays, log_scale = tensors(A, b)
    network = qtn.TensorNetwork(
        [qtn.Tensor(array, inds=[f"x{k}" for k in spins]) for spins, array in zip(where, arrays, strict=True)]
    )
    tree = network.contraction_tree(output_inds=(), optimize="auto-hq")
    searched = time.perf_counter() - start
    value = contracted(network, tree) + log_scale
    seconds = time.perf_counter() - start
    return Result(grid, "quimb auto-hq", value, seconds, f"path {searched:.3f} s, width {tree.contraction_width():.0f}")


def contracted(network: Any, tree: Any) -> float:
    mantissa, exponent = network.contract(output_inds=(), optimize=tree, strip_exponent=True)
    return math.log(abs(float(mantissa))) + float(exponent) * math.log(10)


def cotengra(grid: str, A: np.ndarray, b: np.ndarray) -> Result:
    import cotengra as ctg

    start = time.perf_counter()
    where, arrays, log_scale = tensors(A, b)
    names = [tuple(ctg.get_symbol(k) for k in spins) for spins in where]
    sizes = {ctg.get_symbol(k): 2 for k in range(len(b))}
    optimizer = ctg.HyperOptimizer(methods=["greedy"], max_repeats=16, parallel=False, progbar=False)
    tree = optimizer.search(names, (), sizes)
    searched = time.perf_counter() - start
    mantissa, exponent = tree.contract(arrays, strip_exponent=True)
    value = math.log(abs(float(mantissa))) + float(exponent) * math.log(10) + log_scale
    seconds = time.perf_counter() - start
    return Result(
        grid, "cotengra greedy", value, seconds, f"path {searched:.3f} s, width {tree.contraction_width():.0f}"
    )


def entrants_for(
    grid: str, A: np.ndarray, b: np.ndarray, limit: float, without: list[str]
) -> list[Callable[[], Result]]:
    # Refused by default, for the time it takes.
    side = min(int(side) for side in grid.split("x"))
    wide = {"max_width": side} if side > 20 else None
    entrants = [partial(ours, grid, A, b, "exact_transfer"), partial(ours, grid, A, b, "exact_elimination")]
    if wide:
        entrants.insert(1, partial(ours, grid, A, b, "exact_transfer", **wide))
    peers = {
        "toulbar2": partial(toulbar2, grid, A, b, limit),
        "quimb": partial(quimb, grid, A, b),
        "cotengra": partial(cotengra, grid, A, b),
    }
    return entrants + [run for name, run in peers.items() if name not in without]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--grids", nargs="*", default=["6x6", "8x8", "10x10", "14x14", "18x18", "22x22"], help="rows x columns"
    )
    parser.add_argument("--coupling", type=float, default=1.0, help="J")
    parser.add_argument("--limit", type=float, default=20.0, help="seconds of CPU toulbar2 may take; it stops late")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--without", nargs="*", default=[], help="peers to leave out: toulbar2, quimb, cotengra")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    # NumPy's BLAS has threads of its own.
    threadpool_limits(options.threads)
    warnings.simplefilter("ignore")
    if "quimb" not in options.without:
        importlib.import_module("quimb.tensor")  # before any clock
    everything: list[Result] = []
    for grid in options.grids:
        rows, cols = (int(side) for side in grid.split("x"))
        A, b = generate("grid", rows * cols, options.coupling, options.seed, rows=rows, cols=cols)
        entrants = entrants_for(grid, A, b, options.limit, options.without)
        results: list[Result] = []
        for entrant in entrants:
            results.append(entrant())
            r = results[-1]
            fastest = min(
                (x.seconds for x in results if x.method.startswith("exact") and x.value is not None), default=None
            )
            if not options.json:
                value = "no value" if r.value is None else f"{r.value:.8f}"
                ratio = "" if fastest is None or r.method.startswith("exact") else f"{r.seconds / fastest:9.1f}x"
                print(f"{grid:>8} {r.method:>18} {value:>16} {r.seconds:9.4f} s {ratio:>10}  {r.note}", flush=True)
        everything += results
    if options.json:
        json.dump({"options": vars(options), "results": [asdict(r) for r in everything]}, sys.stdout, indent=2)


if __name__ == "__main__":
    main()
