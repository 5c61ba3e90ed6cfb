"""Work spread over processes: the same values, nothing lost, nothing left running."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import cache, partial
from pathlib import Path

import pytest
from pydantic import Field

from shared_core.cli import CommandConfig, CommandLine, Outcome
from shared_core.errors import InputError
from shared_core.runs import Run, summarize
from shared_core.testing import Caller
from shared_core.workers import Workers

line = CommandLine("shared-core", help="For tests.")


class Config(CommandConfig):
    """Settings."""

    seeds: int = Field(4, description="how many")
    fail: bool = Field(False, description="whether one fails")


def piece(seed: int, fail: bool) -> dict[str, float]:
    if fail and seed == 2:
        raise InputError("data.csv: row 7: seed 2 does not like it")
    return {"value": seed**2, "process": os.getpid()}


@line.command(Config, spread=True)
def compare(config, session):
    """Square numbers."""
    work = {f"cell/{seed}": (lambda seed=seed: piece(seed, config.fail)) for seed in range(config.seeds)}
    with session.progress("compare", len(work)) as advance:
        session.run.spread(work, lambda key: advance(note=key))
        found = [session.run.once(key, compute) for key, compute in work.items()]
    values = [cell["value"] for cell in found]
    processes = len({cell["process"] for cell in found} - {os.getpid()})
    return Outcome(
        [
            summarize(values, dataset="d", method="m", metric="value", better="higher"),
            summarize([processes], dataset="d", method="m", metric="processes", better="higher"),
        ]
    )


@pytest.fixture
def call(tmp_path):
    return Caller(line, tmp_path)


def run_in(folder, **options) -> Run:
    return Run(folder, package="shared-core", version="0", command="compare", config={}, **options)


@pytest.mark.parametrize("workers", [Workers(), Workers(2), Workers(0)])
def test_closures_give_what_they_give_here(workers):
    offset = 10
    work = {str(k): (lambda k=k: {"value": k + offset}) for k in range(5)}
    assert dict(workers.each(work)) == {str(k): {"value": k + 10} for k in range(5)}


def test_they_run_in_processes_of_their_own():
    assert os.getpid() not in dict(Workers(2).each({"a": os.getpid, "b": os.getpid})).values()


def test_they_work_where_they_are_asked_to(tmp_path, monkeypatch):
    """Processes of an earlier call, which began in another folder, are used again."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        found = dict(Workers(2).each({str(k): lambda: str(Path.cwd()) for k in range(3)}))
        assert set(found.values()) == {str(tmp_path / name)}


def test_an_exception_of_one_ends_all():
    with pytest.raises(InputError, match="row 7"):
        dict(Workers(2).each({str(k): (lambda k=k: piece(k, True)) for k in range(4)}))


def test_fewer_than_none():
    with pytest.raises(InputError, match=r"--workers must be 0 \(all cores\) or more, got -1"):
        Workers(-1)


def test_a_run_stores_what_comes_back_and_asks_for_nothing_twice(tmp_path):
    run = run_in(tmp_path / "a", workers=Workers(2))
    assert run.once("0", lambda: "here") == "here"
    told: list[str] = []
    run.spread({str(k): (lambda k=k: [k, run.once("0", lambda: "anew")]) for k in range(3)}, told.append)
    assert sorted(told) == ["1", "2"]
    assert [run.once(str(k), lambda: pytest.fail("done already")) for k in range(3)] == [
        "here",
        [1, "here"],
        [2, "here"],
    ]
    again = run_in(tmp_path / "a", resume=True)
    assert again.once("2", lambda: pytest.fail("stored already")) == [2, "here"]


@pytest.mark.parametrize("workers", [None, Workers(), Workers(2)])
def test_each_piece_is_told_once_and_comes_back_in_order(tmp_path, workers):
    run = run_in(tmp_path / "a", workers=workers)
    run.once("1", lambda: "here")
    told: list[tuple[str, object]] = []
    found = run.each({str(k): (lambda k=k: k**2) for k in range(3)}, lambda key, value: told.append((key, value)))
    assert list(found.items()) == [("0", 0), ("1", "here"), ("2", 4)]
    assert sorted(told) == list(found.items())
    assert run.each({"2": lambda: pytest.fail("done already")}) == {"2": 4}


def test_pieces_that_share_something_are_done_in_one_process(tmp_path):
    run = run_in(tmp_path / "a", workers=Workers(2))
    assert run.once("1/b", lambda: "here") == "here"
    made: list[int] = []

    def part(run: Run, seed: int) -> None:
        # What they share: made when the first of the pieces asks for it.
        shared = cache(lambda: (seed, len(made), made.append(seed), os.getpid()))
        for name in ("a", "b"):
            run.once(f"{seed}/{name}", lambda name=name: [name, *shared()])

    told: list[str] = []
    run.spread_parts({str(seed): partial(part, seed=seed) for seed in range(3)}, told.append)
    assert sorted(told) == ["0", "1", "2"]
    assert made == []
    found = {key: run.once(key, lambda: pytest.fail("done already")) for key in ("0/a", "0/b", "1/a", "1/b")}
    assert found["1/b"] == "here"
    for key in ("0/a", "0/b", "1/a"):
        name, seed, before, _, process = found[key]
        assert (f"{seed}/{name}", before) == (key, 0)
        assert process != os.getpid()
    assert found["0/a"][-1] == found["0/b"][-1]


def test_without_workers_nothing_is_done_ahead(tmp_path):
    for workers in (None, Workers()):
        run_in(tmp_path / "a", workers=workers, overwrite=True).spread({"a": lambda: pytest.fail("too early")})
        run_in(tmp_path / "b", workers=workers, overwrite=True).spread_parts({"a": lambda _: pytest.fail("too early")})


def test_a_run_in_another_process_writes_nothing(tmp_path):
    run = run_in(tmp_path / "a", workers=Workers(2))

    def write() -> bool:
        run.log(loss=1.0)
        run.artifact("x.txt").write_text("away")
        run.save_checkpoint({"a": 1})
        return True

    run.spread({"a": write, "b": write})
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"config.json", "environment.json", "cells.jsonl"}


def test_the_command_line_gives_the_same_with_and_without(call):
    one, two = call.done("compare", "--out", "a"), call.done("compare", "--workers", 2, "--out", "b")
    assert one.results[0].mean == two.results[0].mean == 3.5
    assert one.results[1].mean == 0
    assert two.results[1].mean >= 1
    assert one.config == two.config


@pytest.mark.parametrize("count", ["-1", "two", "1.5"])
def test_wrong_counts(call, count):
    assert f"--workers must be 0 (all cores) or more, got {count}" in call.wrong("compare", f"--workers={count}")


def test_wrong_input_inside_a_worker_is_told_as_here(call):
    assert "data.csv: row 7: seed 2" in call.wrong("compare", "--workers", 2, "--fail", "--out", "a")


def test_not_under_torchrun(call, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "leave them out under torchrun" in call.wrong("compare", "--workers", 2, "--out", "a")


SLOW = """
import sys, time
sys.path.insert(0, {tests!r})
import test_workers
def piece(seed, fail):
    if seed > 1:
        time.sleep(600)
    return {{"value": seed, "process": 0}}
test_workers.piece = piece
test_workers.line.main(["compare", "--workers", "2", "--out", "run"])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent otherwise there")
def test_an_interruption_keeps_what_is_done_and_leaves_nothing_running(tmp_path):
    code = SLOW.format(tests=str(Path(__file__).parent))
    job = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    cells = tmp_path / "run" / "cells.jsonl"
    # Two workers that import torch beside other work take their time.
    for _ in range(3000):
        if cells.exists() and len(cells.read_text().splitlines()) == 2:
            break
        assert job.poll() is None, job.communicate()
        time.sleep(0.1)
    # As a terminal does it: everyone in the group is told.
    os.killpg(job.pid, signal.SIGINT)
    _, said = job.communicate(timeout=200)
    assert job.returncode == 130, said
    assert "Continue with: shared-core compare --resume --out run" in said
    assert "Traceback" not in said
    for _ in range(1000):
        try:
            os.killpg(job.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("workers are still there")


def test_ray_is_asked_for_where_it_is_missing(call, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "--ray needs Ray: pip install 'shared-core[ray]'" in call.wrong("compare", "--ray", "local", "--out", "a")


def test_a_cluster_that_is_not_there(call):
    pytest.importorskip("ray", reason="needs shared-core[ray]")
    assert "--ray 127.0.0.1:1: cannot be reached" in call.wrong("compare", "--ray", "127.0.0.1:1", "--out", "a")


RAY = """
import json, os
from shared_core.errors import InputError
from shared_core.workers import Workers
def refuse():
    raise InputError("data.csv: row 7: no")
workers = Workers(2, "local")
offset = 10
found = dict(workers.each({str(k): (lambda k=k: [k + offset, os.getpid()]) for k in range(5)}))
try:
    dict(workers.each({"a": refuse, "b": refuse}))
except InputError as error:
    said = str(error)
print(json.dumps([found, os.getpid(), said]))
"""


def test_a_cluster_of_this_machine(tmp_path):
    pytest.importorskip("ray", reason="needs shared-core[ray]")
    done = subprocess.run([sys.executable, "-c", RAY], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found, here, said = json.loads(done.stdout.splitlines()[-1])
    assert {key: value[0] for key, value in found.items()} == {str(k): k + 10 for k in range(5)}
    assert here not in {value[1] for value in found.values()}
    assert said == "data.csv: row 7: no"
