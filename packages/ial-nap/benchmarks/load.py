"""Ten annotators at once on ten thousand instances: how long the page waits, and whether any verdict is lost.

    python benchmarks/load.py --annotators 10 --instances 10000 --verdicts 20 --pause 1
    python benchmarks/load.py --bench linear --pause 0 --kill

The model is a `FeatureNAP` of 4 steps and 12 features, scored on 1,000 instances after every verdict; `--bench linear`
takes a logistic regression, which leaves the server alone to be measured. Annotators think for `--pause` seconds
between two verdicts; with 0 they are one closed loop, and wait for each other. Server and annotators share this
machine, and talk over its loopback only; `--kill` ends the server outright half-way and starts it again on its port.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

root = Path(__file__).parent.parent
sys.path[:0] = [str(root / "src"), str(root / "tests")]

from nap_served import Served, fitted  # noqa: E402

from ial_nap.store import AnnotationStore  # noqa: E402


class Annotator(threading.Thread):
    """Opens instances and judges cells of them as fast as the server answers."""

    def __init__(self, served: Served, name: str, number: int, settings: argparse.Namespace) -> None:
        super().__init__()
        self.served, self.who, self.number, self.settings = served, name, number, settings
        self.times: dict[str, list[float]] = {}
        self.acknowledged: dict[tuple[str, int], int] = {}
        self.failures = 0
        self.wire: http.client.HTTPConnection | None = None

    def ask(self, kind: str, path: str, body: object = None) -> dict:
        text = None if body is None else json.dumps(body).encode()
        headers = {"X-Token": self.served.tokens[self.who], "Content-Type": "application/json"}
        while True:
            begun = time.perf_counter()
            try:
                if self.wire is None:
                    self.wire = http.client.HTTPConnection("127.0.0.1", self.served.port, timeout=60)
                self.wire.request("GET" if text is None else "POST", path, text, headers)
                answer = self.wire.getresponse()
                found = json.loads(answer.read())
            except (OSError, http.client.HTTPException, ValueError):
                # The server is gone: ask again, as the page does, under the same key.
                self.wire, self.failures = None, self.failures + 1
                time.sleep(0.2)
                continue
            if answer.status != 200:
                raise SystemExit(f"{path}: {answer.status} {found}")
            self.times.setdefault(kind, []).append(time.perf_counter() - begun)
            return found

    def run(self) -> None:
        queue = self.ask("queue", "/api/queue")
        feature = queue["features"][1]["name"]
        start = queue["items"][0]["instance"]
        stem = start.rstrip("0123456789")
        for number in range(self.settings.verdicts):
            instance = f"{stem}{(number * 997 + self.number * 613) % self.settings.instances}"
            self.ask("instance", f"/api/instance/{instance}")
            self.ask("whatif", "/api/whatif", {"instance": instance, "cells": [{"step": 0, "feature": feature}]})
            step, verdict = number % 4, (number + self.number) % 2
            cell = {"step": step, "feature": feature, "verdict": verdict}
            body = {"instance": instance, "cells": [cell], "seconds": 1.0, "key": f"{self.number}-{number}"}
            self.ask("annotate", "/api/annotate", body)
            self.acknowledged[instance, step] = verdict
            if number % 10 == 4:
                # A slip, and back.
                self.ask("annotate", "/api/annotate", {**body, "cells": [{**cell, "step": (step + 1) % 4}], "key": ""})
                self.ask("undo", "/api/undo", {"key": f"u{self.number}-{number}"})
            if (number + self.number) % 10 == 9:
                self.ask("metrics", "/api/metrics")
                self.ask("round", "/api/round", {"action": "close", "key": f"r{self.number}-{number}"})
                self.ask("queue", "/api/queue")
            time.sleep(self.settings.pause)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--annotators", type=int, default=10)
    parser.add_argument("--instances", type=int, default=10_000)
    parser.add_argument("--bench", choices=["model", "linear"], default="model")
    parser.add_argument("--verdicts", type=int, default=20, help="of each annotator")
    parser.add_argument("--pause", type=float, default=1.0, help="seconds between two verdicts of an annotator")
    parser.add_argument("--kill", action="store_true", help="kill the server half-way")
    parser.add_argument("--json", action="store_true")
    settings = parser.parse_args()
    people = [f"w{number}" for number in range(settings.annotators)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "verdicts.db"
        options = {"instances": settings.instances}
        if settings.bench == "model":
            options = {"data": f"shift:{settings.instances}", "model": fitted("shift:200", Path(folder) / "model", 5)}
        served = Served(path, ",".join(people), **options)
        crowd = [Annotator(served, name, number, settings) for number, name in enumerate(people)]
        begun = time.perf_counter()
        for one in crowd:
            one.start()
        if settings.kill:
            while sum(len(one.acknowledged) for one in crowd) < settings.annotators * settings.verdicts / 2:
                time.sleep(0.01)
            served.kill()
            served = Served(path, ",".join(people), port=served.port, **options)
        for one in crowd:
            one.join()
        wall = time.perf_counter() - begun
        served.kill()
        features, steps, units = AnnotationStore.about(path)
        with AnnotationStore(path, features, steps, units=units) as store:
            kept = {(one.annotator, one.instance, one.step): one.verdict for one in store.standing()}
            lines = len(store.log())
    said = {(one.who, *cell): verdict for one in crowd for cell, verdict in one.acknowledged.items()}
    lost = sum(kept.get(cell) != verdict for cell, verdict in said.items())
    figures = {}
    for kind in ("queue", "instance", "whatif", "annotate", "undo", "round", "metrics"):
        times = sorted(1000 * value for one in crowd for value in one.times.get(kind, []))
        if len(times) > 1:
            figures[kind] = {
                "n": len(times),
                "median_ms": round(statistics.median(times), 1),
                "p95_ms": round(statistics.quantiles(times, n=20, method="inclusive")[-1], 1),
            }
    result = {
        "annotators": settings.annotators,
        "instances": settings.instances,
        "acknowledged": len(said),
        "lost": lost,
        "lines": lines,
        "seconds": round(wall, 1),
        "asked_again": sum(one.failures for one in crowd),
        "answers": figures,
    }
    if settings.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            if name != "answers":
                print(f"{name:>14}: {value}")
        for kind, row in figures.items():
            print(f"{kind:>14}: median {row['median_ms']:7.1f} ms, 95 % {row['p95_ms']:7.1f} ms, n = {row['n']}")
    sys.exit(1 if lost else 0)


if __name__ == "__main__":
    main()
