from __future__ import annotations

import math
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ial_nap.annotations import Annotation, context_hash, latest, parse_lines, to_jsonl
from ial_nap.store import AnnotationStore, Round
from shared_core.errors import InputError, UnknownKeyError

FEATURES = ["LDL", "HDL"]


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "verdicts.db"


@pytest.fixture
def store(path):
    with AnnotationStore(path, FEATURES, 3) as opened:
        yield opened


def one(verdict: int = 1, *, step: int = 0, annotator: str = "a", instance: str = "p", **more) -> Annotation:
    return Annotation(instance, step, "LDL", verdict, annotator=annotator, **more)


cells = st.lists(st.tuples(st.integers(0, 1), st.sampled_from(FEATURES), st.integers(-1, 1)), min_size=1, max_size=3)
acts = st.one_of(
    st.tuples(st.just("add"), st.sampled_from("ab"), cells),
    st.tuples(st.sampled_from(["undo", "close", "revert"]), st.sampled_from("ab"), st.just([])),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(acts, max_size=15))
def test_any_story_ends_where_its_log_says_and_where_the_next_start_finds_it(tmp_path_factory, story):
    path = tmp_path_factory.mktemp("store") / "verdicts.db"
    past: dict[str, list[list[Annotation]]] = {"a": [], "b": []}
    with AnnotationStore(path, FEATURES, 2) as store:
        for act, who, given_ in story:
            before = [line for line in latest(store.log()) if line.annotator == who]
            if act == "add":
                past[who].append(before)
                store.add([Annotation("p", *cell, annotator=who) for cell in given_])
            elif act == "undo":
                gone = store.undo(who)
                if past[who]:
                    # Whoever undoes is where they were before the action.
                    now = [line for line in store.standing() if line.annotator == who]
                    assert {x.key: x.verdict for x in now} == {x.key: x.verdict for x in past[who].pop()}
                else:
                    assert not gone
            elif act == "close":
                store.close_round(Round(who, store.round(who), "", "AUROC", "higher", 0.5, 0.5, 0.4, 0.6))
            else:
                number = store.round(who)
                store.revert_round(who, number)
                assert not [x for x in store.standing() if x.annotator == who and x.round == number]
                past[who] = []
                while store.undo(who):
                    pass
        assert store.standing() == store.of_instance("p") == latest(store.log())
        log, standing, rounds = store.log(), store.standing(), [store.round(who) for who in "ab"]
        version, efforts = store.version, store.efforts()
    with AnnotationStore(path, FEATURES, 2) as again:
        assert (again.log(), again.standing(), [again.round(who) for who in "ab"]) == (log, standing, rounds)
        assert (again.version, again.efforts(), again.context_hash()) == (version, efforts, context_hash(log))
        assert parse_lines(to_jsonl(again.log()).split("\n")) == (log, [])


def test_one_action_is_undone_as_a_whole(store):
    store.add([one(1, step=step) for step in range(3)])
    store.add([one(0, step=0), one(0, step=0), one(0, step=1)])
    assert sorted((gone.step, gone.verdict) for gone in store.undo("a")) == [(0, 0), (0, 0), (1, 0)]
    assert {x.step: x.verdict for x in store.standing()} == {0: 1, 1: 1, 2: 1}
    assert len(store.undo("a")) == 3
    assert not store.standing()
    assert not store.undo("a")
    assert len(store.log()) == 12


def test_undoing_is_ones_own(store):
    store.add([one(1, annotator="a")])
    store.add([one(0, annotator="b")])
    store.undo("a")
    assert [x.annotator for x in store.standing()] == ["b"]
    assert not store.undo("nobody")


def test_the_same_action_twice_counts_once(store, path):
    assert store.add([one(1)], action="k")
    assert not store.add([one(1)], action="k")
    assert store.add([one(1, annotator="b")], action="k")
    assert store.undo("a", action="u")
    store.add([one(0)])
    assert not store.undo("a", action="u")
    store.close()
    with AnnotationStore(path, FEATURES, 3) as again:
        assert not again.add([one(1)], action="k")
        assert [x.verdict for x in again.standing() if x.annotator == "a"] == [0]


def test_rounds_are_counted_kept_and_reverted(store, path):
    store.add([one(1, seconds=2.0)])
    closed = store.close_round(Round("a", 1, "m", "AUROC", "higher", 0.8, 0.7, 0.6, math.nan))
    assert (closed.verdicts, closed.seconds, closed.worse) == (1, 2.0, True)
    store.add([one(0, seconds=1.0), one(0, step=1)])
    assert (store.round("a"), store.round("b")) == (2, 1)
    with pytest.raises(InputError, match="'a' is in round 2"):
        store.close_round(closed)
    assert len(store.revert_round("a", 2)) == 2
    assert [(x.step, x.verdict, x.round) for x in store.standing()] == [(0, 1, 1)]
    store.close()
    with AnnotationStore(path, FEATURES, 3) as again:
        (kept,) = again.rounds("a")
        assert (kept.value, math.isnan(kept.high), again.round("a"), again.rounds("b")) == (0.7, True, 2, [])


def test_a_round_that_is_closed_twice_under_one_name_is_closed_once(store, path):
    store.add([one(1)])
    first = store.close_round(Round("a", 1, "m", "AUROC", "higher", 0.5, 0.6, 0.5, 0.7), action="k")
    store.add([one(0)])
    # The page never saw the answer; by now there is a verdict of the next round.
    again = store.close_round(Round("a", 2, "m", "AUROC", "higher", 0.6, 0.9, 0.8, 1.0), action="k")
    assert (again, store.round("a"), store.has("a", "k"), store.has("b", "k")) == (first, 2, True, False)
    store.close()
    with AnnotationStore(path, FEATURES, 3) as later:
        assert later.close_round(Round("a", 2, "m", "AUROC", "higher", 0.6, 0.9, 0.8, 1.0), action="k") == first
        assert (later.round("a"), len(later.rounds())) == (2, 1)


def test_a_later_verdict_keeps_what_is_under_it(store):
    store.add([one(1)])
    store.close_round(Round("a", 1, "", "loss", "lower", 0.5, 0.6, 0.5, 0.7))
    store.add([one(0)])
    assert not store.revert_round("a", 1)
    assert [x.verdict for x in store.standing()] == [0]
    assert store.rounds()[0].worse


def test_efforts_disagreements_and_single_cells(store):
    store.add([one(1, seconds=2.5, note="why"), one(1, step=1)])
    store.add([one(0, annotator="b", seconds=1.0)])
    assert [(x.annotator, x.verdicts, x.instances, x.seconds) for x in store.efforts()] == [
        ("a", 2, 1, 2.5),
        ("b", 1, 1, 1.0),
    ]
    (found,) = store.disagreements()
    assert (found.step, found.attend, found.ignore) == (0, ("a",), ("b",))
    assert store.of_cell("p", 0, "LDL", "a").note == "why"
    assert store.of_cell("p", 2, "LDL", "a") is None
    store.undo("a")
    assert [(x.verdicts, x.seconds) for x in store.efforts()] == [(0, 2.5), (1, 1.0)]


def test_the_log_only_grows(store, path):
    store.add([one(1)])
    with sqlite3.connect(path) as other:
        for statement in ("DELETE FROM log", "UPDATE log SET verdict = 0", "UPDATE actions SET action = 'x'"):
            with pytest.raises(sqlite3.DatabaseError, match="only grows"):
                other.execute(statement)


@pytest.mark.parametrize(
    ("features", "steps", "units", "message"),
    [
        (["LDL", "HDL"], 4, (), "3 steps there, 4 here"),
        (["LDL", "AST"], 3, (), "'HDL' there, 'AST' here"),
        (["LDL", "HDL", "AST"], 3, (), "2 of them there, 3 here"),
        (["LDL", "HDL"], 3, ("mg/dL", ""), "'LDL' there, 'LDL' in mg/dL here"),
    ],
)
def test_verdicts_about_other_features_are_refused(store, path, features, steps, units, message):
    store.close()
    with pytest.raises(InputError, match="other features than the model's") as raised:
        AnnotationStore(path, features, steps, units=units)
    assert message in str(raised.value)
    AnnotationStore(path, FEATURES, 3).close()


def test_one_writer_and_any_number_of_readers(store, path):
    store.add([one(1)])
    with pytest.raises(InputError, match="another process is writing"):
        AnnotationStore(path, FEATURES, 3)
    with AnnotationStore(path, FEATURES, 3, read_only=True) as reader:
        assert reader.standing() == store.standing()
        store.add([one(0)])
        assert [x.verdict for x in reader.standing()] == [1]
        assert reader.refresh() == store.version
        assert reader.standing() == store.standing()
        with pytest.raises(InputError, match="open to read only"):
            reader.add([one(1)])


def test_files_that_are_no_store(tmp_path):
    text = tmp_path / "text.db"
    text.write_text("instance,step\n" * 200)
    with pytest.raises(InputError, match="cannot be used as a store of verdicts"):
        AnnotationStore(text, FEATURES, 3)
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as file:
        file.execute("CREATE TABLE friends (name)")
    with pytest.raises(InputError, match="not one of verdicts"):
        AnnotationStore(other, FEATURES, 3)
    with pytest.raises(InputError, match="in a folder that exists"):
        AnnotationStore(tmp_path / "nowhere" / "verdicts.db", FEATURES, 3)
    with pytest.raises(InputError, match="no such file"):
        AnnotationStore(tmp_path / "nothing.db", FEATURES, 3, read_only=True)


def test_a_store_of_a_newer_version(store, path):
    store.close()
    with sqlite3.connect(path) as file:
        file.execute("PRAGMA user_version=9")
    with pytest.raises(InputError, match="is of version 9, this reads up to 1"):
        AnnotationStore(path, FEATURES, 3)


def test_a_store_that_was_cut_short(store, path):
    for step in range(3):
        store.add([one(1, step=step, instance=f"p{k}") for k in range(100)])
    store.close()
    path.write_bytes(path.read_bytes()[:6000])
    with pytest.raises(InputError, match="cannot be used as a store"):
        AnnotationStore(path, FEATURES, 3)


def test_wrong_verdicts_leave_nothing_behind(store):
    bad = [
        ([Annotation("p", 0, "LDL", 1), Annotation("p", 0, "AST", 1)], "feature 'AST' is not known"),
        ([one(1), one(1, step=3)], "there are 3 steps"),
        ([one(1), one(1, annotator="b")], "of one annotator at a time, got 2"),
        ([], "got 0"),
        ([Annotation("p", 0, "LDL", 1, undo=True)], r"call undo\(\)"),
    ]
    for given_, message in bad:
        with pytest.raises((InputError, UnknownKeyError), match=message):
            store.add(given_)
    assert not store.log()


def test_a_disk_that_fails_loses_the_call_and_nothing_else(store, path):
    store.add([one(1)])
    store._file.execute("PRAGMA max_page_count=1")
    with pytest.raises(sqlite3.OperationalError, match="full"):
        store.add([one(0, note="x" * 100_000)], action="k")
    assert [x.verdict for x in store.standing()] == [1]
    store._file.execute("PRAGMA max_page_count=100000")
    assert store.add([one(0)], action="k")
    assert store.standing() == latest(store.log())


def test_many_annotators_at_once(store, path):
    def work(who: str) -> None:
        for number in range(40):
            store.add([one(number % 2, annotator=who, instance=f"p{number}")])
            if number % 10 == 9:
                store.undo(who)

    people = [threading.Thread(target=work, args=(f"w{k}",)) for k in range(8)]
    for person in people:
        person.start()
    for person in people:
        person.join()
    assert len(store.standing()) == 8 * 36
    assert store.standing() == latest(store.log())
    assert [x.verdicts for x in store.efforts()] == [36] * 8


CHILD = """
import sys, threading
from ial_nap.annotations import Annotation
from ial_nap.store import AnnotationStore
store = AnnotationStore(sys.argv[1], ["LDL", "HDL"], 3)
say = threading.Lock()
def work(who):
    number = 0
    while True:
        store.add([Annotation(f"p{number}", step, "LDL", number % 2, annotator=who) for step in range(3)])
        with say:
            sys.stdout.write(f"{who} {number}\\n"); sys.stdout.flush()
        number += 1
for who in "abc":
    threading.Thread(target=work, args=(who,)).start()
"""


def killed_in_the_middle(path: Path, lines: int) -> list[tuple[str, int]]:
    """Let a process write and say so, kill it, and return what it said."""
    source = Path(__file__).parent.parent / "src"
    world = os.environ | {"PYTHONPATH": os.pathsep.join([str(source), os.environ.get("PYTHONPATH", "")])}
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path)],
        stdout=subprocess.PIPE,
        text=True,
        env=world,
    )
    said = [child.stdout.readline() for _ in range(lines)]
    child.send_signal(signal.SIGKILL)
    said += child.stdout.readlines()
    child.wait()
    child.stdout.close()
    return [(line.split()[0], int(line.split()[1])) for line in said if line.endswith("\n") and len(line.split()) == 2]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs a system that can kill a process outright")
def test_every_verdict_that_was_acknowledged_outlives_a_kill(path):
    before = 0
    for lines in (1, 17, 40):
        path.unlink(missing_ok=True)
        for rest in path.parent.glob("verdicts.db-*"):
            rest.unlink()
        said = killed_in_the_middle(path, lines)
        assert len(said) >= lines
        # The dead process's lock is gone, and its actions are there as a whole.
        with AnnotationStore(path, FEATURES, 3) as again:
            kept = {(x.annotator, x.instance, x.step): x.verdict for x in again.standing()}
            for who, number in said:
                for step in range(3):
                    assert kept[who, f"p{number}", step] == number % 2
            assert len(kept) % 3 == 0
            assert len(kept) - 3 * len(said) <= 9
            again.add([one(1)])
            before += len(again.log())
    assert before > 3 * 58


def test_tokens_stay_and_differ(store, path):
    first, second = store.token("a"), store.token("b")
    assert first != second
    assert len(first) == 32
    store.close()
    with AnnotationStore(path, FEATURES, 3) as again:
        assert again.token("a") == first
    if os.name == "posix":
        assert path.stat().st_mode & 0o077 == 0


def test_a_queue_stays_for_its_round(store):
    assert store.queue("a", 1) is None
    store.keep_queue("a", 1, [{"instance": "p"}])
    store.keep_queue("a", 1, [{"instance": "q"}])
    assert store.queue("a", 1) == [{"instance": "p"}]


def test_a_store_says_what_it_is_about(store, path, tmp_path):
    assert AnnotationStore.about(path) == (tuple(FEATURES), 3, ("", ""))
    (tmp_path / "text.db").write_text("x" * 999)
    for wrong, message in (("text.db", "no store"), ("none.db", "no such file")):
        with pytest.raises(InputError, match=message):
            AnnotationStore.about(tmp_path / wrong)


def test_a_backup_is_a_store(store, tmp_path):
    store.add([one(1)])
    store.backup(tmp_path / "copy.db")
    with pytest.raises(InputError, match="exists"):
        store.backup(tmp_path / "copy.db")
    with AnnotationStore(tmp_path / "copy.db", FEATURES, 3) as copy:
        assert copy.log() == store.log()
