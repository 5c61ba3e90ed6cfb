"""Race: accuracy, reliability and seconds a fit, against uncertainty baselines and the packages of others.

    python benchmarks/race_reliability.py [--draws 10] [--methods cib ...] [--quick] [--json]

IHDP from the folder that ``SHARED_CORE_DATA`` names (or the embedded data in its place, which the table then says),
90 % of each draw to fit to, 10 % to test. Nobody is tuned: all run with the defaults of this package, for BCF and the
causal forest those of ``cib_ite.baselines.external``. ``pip install stochtree econml`` for these two; where one is
absent, a line says that it is left out.

All run in one process and on one thread, one method after the other, each after a warm-up outside its clock (of peers:
their import). Seconds are of fitting a draw, calibration of ours included. Networks of all draws train as one program,
which is how this package compares methods, and their time is divided by the number of draws: a single fit takes longer
than the figure (``--one-by-one`` times that instead). A method that gives no standard deviation has no reliability.

Columns:

sqrt PEHE
    error of the effect on test rows, mean and median over draws (a few draws with heavy tails decide the mean)
Spearman, withholding, coverage
    on all rows, as test parts are small: rank correlation of the uncertainty with the absolute error of the effect;
    sqrt PEHE without the 20 % most uncertain rows, as a ratio to that of all rows (less is better); share of true
    effects inside the 90 % interval
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
from typing import Any

import numpy as np
import torch
from race_catenets import Draw, load_draws

from cib_ite.experiments import Settled, fit_method, measure

METHODS = ("cib", "tarnet-ensemble", "mc-dropout", "rf-t", "bcf", "causal-forest")
# What a method imports, and what installs it.
PEERS = {
    "bcf": ("stochtree", "stochtree"),
    "causal-forest": ("econml.dml", "econml"),
    "cevae": ("pyro.contrib.cevae", "pyro-ppl"),
}
MEANS = {"Spearman": "spearman", "withholding": "withholding 20 %", "coverage": "CATE coverage 90 %"}


def warm_up(name: str, draw: Draw) -> None:
    """Import what the method imports, and let the networks' program run once."""
    if name in PEERS:
        importlib.import_module(PEERS[name][0])
    else:
        fit_method(name, [draw.fitting], [0], tune=False, changes={"steps": 25})


def run_method(name: str, draws: list[Draw], *, together: bool, changes: dict[str, Any]) -> dict[str, Any]:
    warm_up(name, draws[0])
    tables, seeds = [draw.fitting for draw in draws], list(range(len(draws)))
    groups = [seeds] if together else [[seed] for seed in seeds]
    settled: list[Settled] = []
    for group in groups:
        settled += fit_method(name, [tables[seed] for seed in group], group, tune=False, changes=changes)
    cells = [measure(s.model, draw.table, draw.parts) for s, draw in zip(settled, draws, strict=True)]
    errors = [cell["sqrt PEHE out"] for cell in cells]
    found: dict[str, Any] = {"method": name, "mean": float(np.mean(errors)), "median": float(np.median(errors))}
    for column, metric in MEANS.items():
        values = [cell[metric] for cell in cells if metric in cell]
        found[column] = float(np.mean(values)) if values else None
    found["positive"] = sum(cell.get("spearman", 0) > 0 for cell in cells)
    found["seconds"] = float(np.mean([s.seconds for s in settled]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="names in cib_ite.experiments.METHODS")
    parser.add_argument("--one-by-one", action="store_true", help="fit the networks of each draw alone")
    parser.add_argument("--quick", action="store_true", help="two draws, 50 steps, to see whether it runs")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    torch.set_num_threads(1)
    changes: dict[str, Any] = {}
    if options.quick:
        options.draws, changes = 2, {"steps": 50}
    data, draws = load_draws(options.draws)
    if not options.json:
        print(f"{data}, {len(draws)} draws; 1 thread")
        print(f"{'':16}   sqrt PEHE, median   Spearman (draws > 0)   withholding 20 %   coverage 90 %   seconds a fit")
    results: list[dict[str, Any]] = []
    absent: list[str] = []
    for name in options.methods:
        if name in PEERS and importlib.util.find_spec(PEERS[name][0].partition(".")[0]) is None:
            absent.append(name)
            if not options.json:
                print(f"{name:>16}: left out, as it needs pip install {PEERS[name][1]}", flush=True)
            continue
        found = run_method(name, draws, together=not options.one_by_one, changes=changes)
        results.append(found)
        if not options.json:
            shown = {k: f"{v:.2f}" if v is not None else "-" for k, v in found.items() if k in MEANS}
            positive = f"({found['positive']})" if found["Spearman"] is not None else ""
            print(
                f"{name:>16}: {found['mean']:9.3f}  {found['median']:6.3f}   {shown['Spearman']:>12} {positive:>6}"
                f"   {shown['withholding']:>16}   {shown['coverage']:>13}   {found['seconds']:13.2f}",
                flush=True,
            )
    if options.json:
        json.dump({"options": vars(options), "data": data, "results": results, "absent": absent}, sys.stdout, indent=2)
        return
    first = next((found for found in results if found["method"] == "cib"), None)
    if first is None:
        return
    print("\nAgainst cib (below 1: less error, or less time, than cib):")
    for found in results:
        if found is not first:
            print(
                f"{found['method']:>16}: mean sqrt PEHE {found['mean'] / first['mean']:.2f},"
                f" median {found['median'] / first['median']:.2f}, seconds {found['seconds'] / first['seconds']:.2f}"
            )


if __name__ == "__main__":
    main()
