"""Run a package's full-size experiments and keep their summaries under docs/results/.

A package lists them in ``reproduce.toml``: a table ``[experiments]`` of name = "arguments of its command line", and, if
need be, ``[prepare]`` of name = "a Python script and its arguments" to run before. ``{runs}`` is the folder of runs.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    package, bin_folder, runs = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    listing = ROOT / "packages" / package / "reproduce.toml"
    listed = tomllib.loads(listing.read_text(encoding="utf-8").replace("{runs}", str(runs)))
    experiments: dict[str, str] = listed["experiments"]
    for command in listed.get("prepare", {}).values():
        subprocess.run([bin_folder / "python", *shlex.split(command)], cwd=ROOT, check=True)
    target = ROOT / "docs" / "results" / package
    target.mkdir(parents=True, exist_ok=True)
    for name, arguments in experiments.items():
        out = runs / package / "reproduce" / name
        print(f"== {package} {arguments}", flush=True)
        # An interrupted reproduction goes on where it stopped.
        unfinished = (out / "config.json").exists() and not (out / "summary.json").exists()
        again = ["--resume"] if unfinished else []
        subprocess.run([bin_folder / package, *shlex.split(arguments), *again, "--out", out], cwd=ROOT, check=True)
        shutil.copy(out / "summary.json", target / f"{name}.json")


if __name__ == "__main__":
    main()
