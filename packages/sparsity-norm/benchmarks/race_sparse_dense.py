"""Race: our sparse training path against our own dense one, on a synthetic rating matrix.

    python benchmarks/race_sparse_dense.py [--rows 20000] [--columns 10000] [--density 0.01] [--hidden 100] [--json]

Both paths make the same optimisation steps (the final training errors are printed to show it). Each runs in a process
of its own. *Time* is that of the fastest whole epoch after one of warm-up, so that other load disturbs it least.
*Memory* is the highest resident set size while loading the matrix and training, less the resident set size after the
imports; so it counts the compressed matrix itself, weights, gradients, Adam's moments and all temporaries, for both
paths alike. The dense path keeps the matrix and its mask as dense arrays. One thread each by default: where other
processes keep the cores busy, threads mostly wait for each other, which disturbs short steps (the sparse path's) far
more than long ones.

``--sweep`` instead times one epoch of either path over densities, which is where the threshold of
``sparsity_norm.autorec.choose_path`` comes from.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


def make_matrix(rows: int, columns: int, density: float, file: Path) -> None:
    """Write a CSR matrix of half-star ratings; observed counts differ between rows by a factor of about 20."""
    generator = np.random.default_rng(0)
    weight = generator.lognormal(0, 0.8, rows)
    counts = np.clip(np.round(weight / weight.mean() * density * columns), 1, columns).astype(np.int64)
    indptr = np.concatenate([[0], np.cumsum(counts)])
    indices = np.empty(indptr[-1], dtype=np.int32)
    for row in range(rows):
        chosen = generator.choice(columns, counts[row], replace=False, shuffle=False)
        indices[indptr[row] : indptr[row + 1]] = np.sort(chosen)
    level = generator.normal(3.5, 0.4, columns)[indices] + np.repeat(generator.normal(0, 0.4, rows), counts)
    values = np.clip(np.round(2 * (level + generator.normal(0, 0.8, len(level)))) / 2, 0.5, 5).astype(np.float32)
    np.savez(file, indptr=indptr, indices=indices, values=values, columns=columns)


def memory(field: str) -> int:
    """Return a figure of this process in bytes: VmRSS (now) or VmHWM (highest)."""
    status = Path("/proc/self/status")
    if not status.exists():
        import resource

        # Elsewhere only the highest figure is to be had; macOS gives it in bytes.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def run_path(path: str, file: str, hidden: int, batch_size: int, epochs: int, threads: int) -> None:
    """Train by one path and print what it took, as JSON."""
    import scipy.sparse  # noqa: F401  (loaded before the base line, as torch is)
    import torch

    torch.set_num_threads(threads)

    from sparsity_norm.autorec import AutoRec, AutoRecTrainer, SparseRows

    base = memory("VmRSS")
    with np.load(file) as arrays:
        features = int(arrays["columns"])
        instances = SparseRows.of(arrays["indptr"], arrays["indices"], arrays["values"])
    trainer = AutoRecTrainer(
        AutoRec(features, hidden),
        instances,
        reg=5.0,
        lr=1e-3,
        batch_size=batch_size,
        epochs=epochs + 1,
        path=path,  # pyright: ignore[reportArgumentType]
    )
    trainer.run_epoch()
    seconds = []
    for _ in range(epochs):
        start = time.perf_counter()
        report = trainer.run_epoch()
        seconds.append(time.perf_counter() - start)
    entries = instances.columns.numel()
    print(
        json.dumps(
            {
                "path": path,
                "ratings": entries,
                "seconds_an_epoch": min(seconds),
                "ratings_a_second": entries / min(seconds),
                "peak_bytes": memory("VmHWM") - base,
                "train_rmse": report.train_rmse,
                "threads": torch.get_num_threads(),
            }
        )
    )


def race(file: Path, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Run both paths, each in a process of its own."""
    results = {}
    for path in ("dense", "sparse"):
        command = [sys.executable, __file__, "--path", path, "--file", str(file)]
        for name in ("hidden", "batch_size", "epochs", "threads"):
            command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
        results[path] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--columns", type=int, default=10_000)
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--hidden", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sweep", action="store_true", help="time either path over densities")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--path", choices=["dense", "sparse"], help=argparse.SUPPRESS)
    parser.add_argument("--file", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.path:
        run_path(options.path, options.file, options.hidden, options.batch_size, options.epochs, options.threads)
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "matrix.npz"
        if options.sweep:
            for density in (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8):
                make_matrix(2000, 1500, density, file)
                results = race(file, options)
                ratio = results["dense"]["seconds_an_epoch"] / results["sparse"]["seconds_an_epoch"]
                print(f"density {density:4.0%}: sparse is {ratio:.2f} times as fast as dense", flush=True)
            return
        make_matrix(options.rows, options.columns, options.density, file)
        results = race(file, options)
    sparse, dense = results["sparse"], results["dense"]
    ratios = {
        "speed": sparse["ratings_a_second"] / dense["ratings_a_second"],
        "memory": sparse["peak_bytes"] / dense["peak_bytes"],
    }
    if options.json:
        print(json.dumps({"options": vars(options), **results, "ratios": ratios}, indent=2))
        return
    print(f"{options.rows} x {options.columns}, {sparse['ratings']} ratings, {sparse['threads']} threads")
    for name, result in results.items():
        speed = f"{result['seconds_an_epoch']:.2f} s an epoch, {result['ratings_a_second'] / 1e6:.3f} M ratings/s"
        print(f"{name:>7}: {speed}, {result['peak_bytes'] / 1e6:.0f} MB, training RMSE {result['train_rmse']:.6f}")
    print(f"  ratio: sparse is {ratios['speed']:.1f} times as fast, in 1/{1 / ratios['memory']:.1f} of the memory")


if __name__ == "__main__":
    main()
