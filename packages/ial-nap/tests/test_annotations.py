from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score

from ial_nap.annotations import (
    Annotation,
    cohen_kappa,
    context_hash,
    disagreements,
    feature_set_hash,
    fleiss_kappa,
    kappa_between,
    kappa_of_all,
    latest,
    masks,
    parse_lines,
    read_jsonl,
    to_csv,
    to_jsonl,
    to_label_studio,
)
from shared_core.errors import InputError, UnknownKeyError

annotations = st.builds(
    Annotation,
    instance=st.sampled_from(["p", "q"]),
    step=st.integers(0, 2),
    feature=st.sampled_from(["LDL", "HDL"]),
    verdict=st.sampled_from([-1, 0, 1]),
    seconds=st.floats(0, 1e6),
    annotator=st.sampled_from(["a", "b"]),
    note=st.text(max_size=20),
    undo=st.booleans(),
)
logs = st.lists(annotations, max_size=30)


def standing(log: list[Annotation]) -> dict:
    """What stands, told by looking backwards: an undo swallows the next verdict that it meets."""
    verdicts, swallow = {}, {}
    piles: dict = {}
    for one in log:
        piles.setdefault(one.key, []).append(one)
    for key, pile in piles.items():
        # An undo with nothing before it must not swallow what comes later, so cut the log where the balance is lowest.
        balance, lowest, start = 0, 0, 0
        for position, one in enumerate(pile, 1):
            balance += -1 if one.undo else 1
            if balance < lowest:
                lowest, start = balance, position
        swallow[key] = 0
        for one in reversed(pile[start:]):
            if one.undo:
                swallow[key] += 1
            elif swallow[key]:
                swallow[key] -= 1
            else:
                verdicts[key] = one
                break
    return verdicts


@given(logs)
def test_the_last_verdict_wins_after_undoing(log):
    assert {one.key: one for one in latest(log)} == standing(log)


@given(logs)
def test_lines_come_back_as_they_went(log):
    assert parse_lines(to_jsonl(log).split("\n")) == (log, [])


@given(logs)
def test_masks_hold_what_stands_and_nothing_else(log):
    ids, context = masks(log, ["p", "q"], 3, ["LDL", "HDL"])
    found = {
        (instance, step, ["LDL", "HDL"][feature], annotator): int(mask[step, feature])
        for (instance, annotator), mask in zip(ids, context, strict=True)
        for step, feature in np.argwhere(mask >= 0).tolist()
    }
    assert found == {key: one.verdict for key, one in standing(log).items() if one.verdict >= 0}
    assert context.dtype == np.int8
    assert context.shape == (len(ids), 3, 2)


def test_masks_of_one_annotator():
    log = [Annotation("p", 0, "LDL", 1, annotator="a"), Annotation("p", 0, "LDL", 0, annotator="b")]
    ids, context = masks(log, ["p"], 1, ["LDL"], annotator="b")
    assert ids == [("p", "b")]
    assert context.tolist() == [[[0]]]


def test_a_file_keeps_its_good_lines(tmp_path):
    path = tmp_path / "annotations.jsonl"
    good = to_jsonl([Annotation("p", 0, "LDL", 1)])
    path.write_bytes(good.encode() + b'{"v": 1, "inst\xff\n\n' + good.encode() + b'{"v": 1, "instance": "p"')
    with pytest.raises(InputError, match=r"annotations\.jsonl:2: not JSON"):
        read_jsonl(path)
    read, problems = read_jsonl(path, skip_bad=True)
    assert len(read) == 2
    assert [problem.split(":")[1] for problem in problems] == ["2", "5"]


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"nothing\.jsonl: cannot be read"):
        read_jsonl(tmp_path / "nothing.jsonl")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": 2}, 'key "v": this reads version 1, got 2'),
        ({"verdict": 7}, "verdict: 1"),
        ({"verdict": True}, 'key "verdict": expected a whole number, got True'),
        ({"step": 1.5}, 'key "step": expected a whole number'),
        ({"step": -1}, "count from 0"),
        ({"seconds": "3"}, 'key "seconds": expected a number'),
        ({"seconds": -1}, "at least 0"),
        ({"undo": 1}, 'key "undo": expected true or false'),
        ({"instance": ""}, "must not be empty"),
        ({"featur": "LDL"}, "no key 'featur'; did you mean 'feature'?"),
    ],
)
def test_bad_lines_say_what_is_wrong(change, message):
    record = {"v": 1, "instance": "p", "step": 0, "feature": "LDL", "verdict": 1} | change
    with pytest.raises(InputError) as raised:
        parse_lines([json.dumps(record)], source="f")
    assert str(raised.value).startswith("f:1: ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("line", ["[1]", "null", '{"v": 1}', "[" * 100_000, '{"v": 1, "seconds": NaN}'])
def test_lines_that_are_no_annotation(line):
    with pytest.raises(InputError, match=r"^f:1: "):
        parse_lines([line], source="f")


def test_seconds_that_are_no_number():
    line = '{"v": 1, "instance": "p", "step": 0, "feature": "LDL", "verdict": 1, "seconds": NaN}'
    with pytest.raises(InputError, match="at least 0, got nan"):
        parse_lines([line])


def test_masks_of_what_is_not_known():
    log = [Annotation("pid-17", 1, "LDL", 0)]
    with pytest.raises(UnknownKeyError, match="no instance 'pid-17'; did you mean 'pid-71'"):
        masks(log, ["pid-71"], 2, ["LDL"])
    with pytest.raises(UnknownKeyError, match="no feature 'LDL'; did you mean 'LDL-C'"):
        masks(log, ["pid-17"], 2, ["LDL-C"])
    with pytest.raises(InputError, match="there are 1 steps"):
        masks(log, ["pid-17"], 1, ["LDL"])
    with pytest.raises(InputError, match="'LDL' is there twice"):
        masks(log, ["pid-17"], 2, ["LDL", "LDL"])


def test_disagreements_name_both_sides():
    log = [
        Annotation("p", 0, "LDL", 1, annotator="b"),
        Annotation("p", 0, "LDL", 0, annotator="a"),
        Annotation("p", 0, "LDL", 1, annotator="c"),
        Annotation("p", 0, "HDL", 1, annotator="a"),
        Annotation("p", 0, "HDL", -1, annotator="b"),
    ]
    (found,) = disagreements(log)
    assert (found.attend, found.ignore) == (("b", "c"), ("a",))
    assert not disagreements([*log, replace(log[1], undo=True)])


@given(st.lists(st.tuples(st.integers(-1, 1), st.integers(-1, 1)), min_size=1, max_size=40))
def test_cohen_against_scikit_learn(pairs):
    first, second = np.array(pairs).T
    if len(np.union1d(first, second)) == 1:
        assert math.isnan(cohen_kappa(first, second))
    else:
        assert cohen_kappa(first, second) == pytest.approx(cohen_kappa_score(first, second))


def test_fleiss_of_the_textbook():
    """Fleiss (1971) as worked through in many textbooks: ten subjects, fourteen raters, five categories."""
    counts = np.array(
        [
            [0, 0, 0, 0, 14],
            [0, 2, 6, 4, 2],
            [0, 0, 3, 5, 6],
            [0, 3, 9, 2, 0],
            [2, 2, 8, 1, 1],
            [7, 7, 0, 0, 0],
            [3, 2, 6, 3, 0],
            [2, 5, 3, 2, 2],
            [6, 5, 2, 1, 0],
            [0, 2, 2, 3, 7],
        ]
    )
    assert fleiss_kappa(counts) == pytest.approx(0.20993, abs=1e-5)


@given(st.integers(2, 5), st.lists(st.lists(st.integers(0, 2), min_size=5, max_size=5), min_size=1, max_size=20))
def test_fleiss_by_counting_pairs(raters, items):
    given_ = np.array(items)[:, :raters]
    counts = np.stack([(given_ == category).sum(1) for category in range(3)], 1)
    pairs = [(row[i] == row[j]) for row in given_ for i in range(raters) for j in range(raters) if i != j]
    chance = sum((given_ == category).mean() ** 2 for category in range(3))
    expected = math.nan if chance == 1 else (np.mean(pairs) - chance) / (1 - chance)
    assert fleiss_kappa(counts) == pytest.approx(expected, nan_ok=True)


def test_fleiss_needs_as_many_verdicts_everywhere():
    with pytest.raises(InputError, match="from 2 to 3"):
        fleiss_kappa(np.array([[1, 1], [1, 2]]))


def test_kappas_of_a_log():
    log = [
        Annotation("p", step, "LDL", verdict, annotator=who)
        for who, verdicts in {"a": [1, 1, 0, 0, -1], "b": [1, 1, 0, 1, 1]}.items()
        for step, verdict in enumerate(verdicts)
    ]
    assert kappa_between(log, "a", "b") == pytest.approx(0.5)
    assert kappa_of_all(log) == pytest.approx(fleiss_kappa(np.array([[2, 0], [2, 0], [0, 2], [1, 1]])))
    assert kappa_between(log, "a", "b", unknown=True) < 0.5
    assert math.isnan(kappa_between(log, "a", "nobody"))
    assert math.isnan(kappa_of_all(log[:5]))


def test_the_hash_of_features_knows_names_order_units_and_steps():
    hashes = {
        feature_set_hash(["LDL", "HDL"], 4),
        feature_set_hash(["HDL", "LDL"], 4),
        feature_set_hash(["LDL", "HDL"], 5),
        feature_set_hash(["LDL", "HDL"], 4, ["mg/dL", "mmol/L"]),
        feature_set_hash(["LDL,HDL"], 4),
    }
    assert len(hashes) == 5
    assert feature_set_hash(["LDL"], 1) == feature_set_hash(["LDL"], 1, [""])
    with pytest.raises(InputError, match="one per feature"):
        feature_set_hash(["LDL"], 1, ["a", "b"])


def test_the_hash_of_a_context_forgets_order_and_what_is_undone():
    first, second = Annotation("p", 0, "LDL", 1), Annotation("p", 1, "LDL", 0)
    assert context_hash([first, second]) == context_hash([second, first])
    assert context_hash([first, second, replace(second, undo=True)]) == context_hash([first])
    assert context_hash([]) == context_hash([replace(first, verdict=-1)]) != context_hash([first])


def test_csv_is_read_back_and_runs_nothing():
    given_ = Annotation("p", 0, "L,D\nL", -1, note='=HYPERLINK("x")', annotator="@a")
    (row,) = csv.DictReader(io.StringIO(to_csv([given_]), newline=""))
    assert (row["feature"], row["verdict"], row["note"], row["annotator"]) == (
        "L,D\nL",
        "-1",
        '\'=HYPERLINK("x")',
        "'@a",
    )


def test_label_studio_tasks():
    log = [
        Annotation("p", 0, "LDL", 1, seconds=2.0, annotator="a"),
        Annotation("p", 1, "LDL", 0, seconds=3.0, annotator="a", note="why"),
        Annotation("p", 0, "LDL", -1, annotator="b"),
        Annotation("q", 0, "LDL", 1, annotator="b"),
    ]
    tasks = json.loads(json.dumps(to_label_studio(log)))
    assert [task["data"]["instance"] for task in tasks] == ["p", "q"]
    a, b = tasks[0]["annotations"]
    assert a["lead_time"] == 5
    assert [region["value"]["timeserieslabels"] for region in a["result"]] == [["attend"], ["not attend"]]
    assert b["result"][0]["value"]["timeserieslabels"] == ["don't know"]
    assert a["result"][1]["meta"]["text"] == ["why"]
    assert len({region["id"] for task in tasks for one in task["annotations"] for region in one["result"]}) == 4
