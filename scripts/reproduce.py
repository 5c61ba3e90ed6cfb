"""Run a package's full-size experiments and keep their summaries under docs/results/.

    scripts/reproduce.py PACKAGE BIN RUNS [--workers N] [--ray ADDRESS]

A package lists them in ``reproduce.toml``: a table ``[experiments]`` of name = "arguments of its command line", and, if
need be, ``[prepare]`` of name = "a Python script and its arguments" to run before. ``{runs}`` is the folder of runs.
Workers and a Ray cluster are for the experiments whose command can spread its work; the others run as they are.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Run a package's full-size experiments.")
    parser.add_argument("package")
    parser.add_argument("bin", type=Path, help="folder of the environment's programs")
    parser.add_argument("runs", type=Path, help="folder of runs")
    parser.add_argument("--workers", help="pieces of work at a time; 0 for all cores")
    parser.add_argument("--ray", help="spread the work over this Ray cluster")
    options = parser.parse_args(given)
    listing = ROOT / "packages" / options.package / "reproduce.toml"
    listed = tomllib.loads(listing.read_text(encoding="utf-8").replace("{runs}", str(options.runs)))
    experiments: dict[str, str] = listed["experiments"]
    for command in listed.get("prepare", {}).values():
        subprocess.run([options.bin / "python", *shlex.split(command)], cwd=ROOT, check=True)
    target = ROOT / "docs" / "results" / options.package
    target.mkdir(parents=True, exist_ok=True)
    for name, arguments in experiments.items():
        out = options.runs / options.package / "reproduce" / name
        print(f"== {options.package} {arguments}", flush=True)
        # An interrupted reproduction goes on where it stopped.
        unfinished = (out / "config.json").exists() and not (out / "summary.json").exists()
        again = ["--resume"] if unfinished else []
        words = spread(options.package, shlex.split(arguments), options.workers, options.ray)
        subprocess.run([options.bin / options.package, *words, *again, "--out", out], cwd=ROOT, check=True)
        shutil.copy(out / "summary.json", target / f"{name}.json")


def spread(package: str, words: Sequence[str], workers: str | None, ray: str | None) -> list[str]:
    """Ask for workers or a cluster where the command has such options."""
    config = import_module(f"{package.replace('-', '_')}.cli").line.configs[words[0]]
    given = {"workers": workers, "ray": ray}
    asked = [(name, value) for name, value in given.items() if value and name in config.model_fields]
    return [*words, *(word for name, value in asked for word in (f"--{name}", value))]


if __name__ == "__main__":
    main()
