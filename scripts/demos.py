"""Run the demos of all packages, some at a time, and make one page of what they measured.

    scripts/demos.py BIN RUNS [PACKAGE ...] [--jobs 2]

Each demo writes its run folder ``RUNS/PACKAGE/demo``; what it printed is beside it, in ``RUNS/PACKAGE/demo.log``. The
page is ``RUNS/report/index.html``. The exit status is 1 when a demo failed; the page says which, and why.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from demo_page import Shown, make_page
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Demos:
    """Demos that are running, and how those that ended did."""

    bin_folder: Path
    runs: Path
    threads: int
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)
    stopped: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, package: str) -> Shown:
        """Run one demo to its end."""
        folder = self.runs / package / "demo"
        log = folder.parent / "demo.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        command = [str(self.bin_folder / package), "demo", "--overwrite", "--out", str(folder)]
        with log.open("wb") as out:
            with self.lock:
                if self.stopped:
                    return Shown(package, ROOT / "packages" / package, folder, 0.0, "not started")
                job = subprocess.Popen(
                    command,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    env={**os.environ, "OMP_NUM_THREADS": str(self.threads), "COLUMNS": "120"},
                )
                self.running.append(job)
            status = job.wait()
        seconds = time.monotonic() - began
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        failure = f"exit status {status}: {said[-1] if said else 'it said nothing'}" if status else ""
        return Shown(package, ROOT / "packages" / package, folder, seconds, failure)

    def stop(self) -> None:
        """End those that run, and start no other."""
        with self.lock:
            self.stopped = True
            for job in self.running:
                if job.poll() is None:
                    job.terminate()


def run_all(demos: Demos, packages: Sequence[str], jobs: int) -> list[Shown]:
    console = Console()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[now]}"),
    )
    busy: list[str] = []
    found: dict[str, Shown] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("demos", total=len(packages), now="")

        def one(package: str) -> None:
            busy.append(package)
            progress.update(bar, now=", ".join(busy))
            shown = demos.run(package)
            busy.remove(package)
            found[package] = shown
            if not demos.stopped:
                end = f"[red]failed[/]: {shown.failure}" if shown.failure else f"{shown.verdict}"
                console.print(f"{package:15} {shown.seconds:5.0f} s  {end}", highlight=False)
            progress.update(bar, advance=1, now=", ".join(busy))

        with ThreadPoolExecutor(jobs) as pool:
            try:
                for done in [pool.submit(one, package) for package in packages]:
                    done.result()
            except KeyboardInterrupt:
                demos.stop()
                pool.shutdown(cancel_futures=True)
                raise
    return [found[package] for package in packages]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bin", type=Path, help="folder of the console scripts")
    parser.add_argument("runs", type=Path, help="folder of runs")
    parser.add_argument("packages", nargs="*", help="which (default: all)")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="demos at a time")
    parser.add_argument("--page-only", action="store_true", help="make the page of the run folders there are")
    asked = parser.parse_args()
    known = sorted(path.parent.name for path in ROOT.glob("packages/*/pyproject.toml"))
    unknown = [name for name in asked.packages if name not in known]
    if unknown or asked.jobs < 1:
        parser.error(
            f"no package '{unknown[0]}': there are {', '.join(known)}" if unknown else "--jobs must be 1 or more"
        )
    packages = asked.packages or known
    threads = max(1, (os.cpu_count() or 1) // asked.jobs)
    began = time.monotonic()
    try:
        if asked.page_only:
            folders = {name: asked.runs / name / "demo" for name in packages}
            shown = [
                Shown(name, ROOT / "packages" / name, folder)
                for name, folder in folders.items()
                if (folder / "summary.json").exists()
            ]
        else:
            shown = run_all(Demos(asked.bin.absolute(), asked.runs, threads), packages, asked.jobs)
    except KeyboardInterrupt:
        print("interrupted: run it again; demos take no more than a minute each", file=sys.stderr)
        return 130
    page = asked.runs / "report" / "index.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(make_page(shown, None if asked.page_only else time.monotonic() - began), encoding="utf-8")
    print(f"{page}: open it in a browser")
    return int(any(one.failure for one in shown))


if __name__ == "__main__":
    sys.exit(main())
