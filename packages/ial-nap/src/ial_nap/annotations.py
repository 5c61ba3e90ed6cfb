"""Verdicts of people on cells of (step, feature): as records, as lines of JSON, as masks, and how far people agree.

A verdict is 1 (attend), 0 (do not attend) or -1 (don't know). A cell that nobody has seen is -1 too, never 1.
Agreement: J. Cohen (1960), "A coefficient of agreement for nominal scales"; J. L. Fleiss (1971), "Measuring nominal
scale agreement among many raters".
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast

import numpy as np
from jaxtyping import Int, Int8

from shared_core.errors import InputError, no_such

__all__ = [
    "Annotation",
    "Disagreement",
    "cohen_kappa",
    "context_hash",
    "disagreements",
    "feature_set_hash",
    "fleiss_kappa",
    "kappa_between",
    "kappa_of_all",
    "latest",
    "masks",
    "parse_lines",
    "read_jsonl",
    "to_csv",
    "to_jsonl",
    "to_label_studio",
]

VERSION = 1
VERDICTS = {1: "attend", 0: "not attend", -1: "don't know"}
_TYPES: dict[str, type | tuple[type, ...]] = {
    "instance": str,
    "step": int,
    "feature": str,
    "verdict": int,
    "seconds": (int, float),
    "annotator": str,
    "round": int,
    "model": str,
    "note": str,
    "undo": bool,
}
_REQUIRED = ("instance", "step", "feature", "verdict")


@dataclass(frozen=True)
class Annotation:
    """One verdict on one cell, or the undoing of one.

    Parameters
    ----------
    instance : id of the instance
    step : time step, counted from 0
    feature : name of the feature
    verdict : 1 attend, 0 do not attend, -1 don't know
    seconds : of the annotator's time that went into it
    annotator : who
    round : of annotation, 0 if there are none
    model : hash of the context that the model had when this was decided
    note : free text
    undo : take the annotator's last standing verdict on this cell back; the one before it, if any, stands again

    Raises
    ------
    InputError
        For a verdict other than these three, an empty instance or feature, a negative step or round, and seconds that
        are negative or not finite.

    Examples
    --------
    >>> Annotation("pid-17", 2, "LDL", 0, seconds=3.1, annotator="a").cell
    ('pid-17', 2, 'LDL')
    """

    instance: str
    step: int
    feature: str
    verdict: int
    seconds: float = 0.0
    annotator: str = ""
    round: int = 0
    model: str = ""
    note: str = ""
    undo: bool = False

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise InputError(f"verdict: 1 (attend), 0 (not attend) or -1 (don't know), got {self.verdict}")
        if not self.instance or not self.feature:
            raise InputError("instance and feature: must not be empty")
        if self.step < 0 or self.round < 0:
            raise InputError(f"step and round: count from 0, got step {self.step} and round {self.round}")
        if not math.isfinite(self.seconds) or self.seconds < 0:
            raise InputError(f"seconds: a number of at least 0, got {self.seconds}")

    @property
    def cell(self) -> tuple[str, int, str]:
        """Instance, step and feature."""
        return self.instance, self.step, self.feature

    @property
    def key(self) -> tuple[str, int, str, str]:
        """What the last verdict wins for: instance, step, feature and annotator."""
        return self.instance, self.step, self.feature, self.annotator


def _names(names: Sequence[str]) -> dict[str, int]:
    positions = {name: position for position, name in enumerate(names)}
    if len(positions) < len(names):
        twice = next(name for position, name in enumerate(names) if positions[name] != position)
        raise InputError(f"features: '{twice}' is there twice; every feature needs a name of its own")
    return positions


def feature_set_hash(features: Sequence[str], steps: int, units: Sequence[str] = ()) -> str:
    """Return a hash of what verdicts are about: the features in their order, their units and the number of steps.

    Parameters
    ----------
    features : names, r of them
    steps : time steps T
    units : one per feature, or none

    Returns
    -------
    16 hexadecimal digits; equal for equal input on every machine.

    Raises
    ------
    InputError
        For a name that is there twice, and for units that are not one per feature.

    Examples
    --------
    >>> feature_set_hash(["LDL", "HDL"], 4) == feature_set_hash(["HDL", "LDL"], 4)
    False
    """
    _names(features)
    if units and len(units) != len(features):
        raise InputError(f"units: one per feature, got {len(units)} for {len(features)} features")
    text = json.dumps([list(features), list(units) or [""] * len(features), steps])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def context_hash(annotations: Iterable[Annotation]) -> str:
    """Return a hash of the standing verdicts, whatever the order they came in.

    Parameters
    ----------
    annotations : a log, oldest first

    Returns
    -------
    16 hexadecimal digits. Verdicts of -1 do not count: they say nothing to a model.
    """
    standing = sorted((*one.key, one.verdict) for one in latest(annotations) if one.verdict >= 0)
    return hashlib.sha256(json.dumps(standing).encode()).hexdigest()[:16]


def to_jsonl(annotations: Iterable[Annotation]) -> str:
    """Return one line of JSON per annotation, as `parse_lines` reads them.

    Parameters
    ----------
    annotations : in any order, which is kept

    Examples
    --------
    >>> to_jsonl([Annotation("p", 0, "LDL", 1)])[:50]
    '{"v": 1, "instance": "p", "step": 0, "feature": "L'
    """
    return "".join(json.dumps({"v": VERSION, **asdict(one)}, ensure_ascii=False) + "\n" for one in annotations)


def _parse(line: str) -> Annotation:
    try:
        found: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON ({error}); an annotation is one object on one line") from None
    if not isinstance(found, dict):
        raise InputError(f"expected an object in braces, got {type(found).__name__}")
    record = cast("dict[str, Any]", found)
    version = record.pop("v", None)
    if version != VERSION:
        raise InputError(f'key "v": this reads version {VERSION}, got {version!r}')
    for name in _REQUIRED:
        if name not in record:
            raise InputError(f'key "{name}": missing')
    for name, value in record.items():
        if name not in _TYPES:
            raise no_such("key", name, _TYPES)
        wanted = _TYPES[name]
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
            kind = (
                "a number"
                if isinstance(wanted, tuple)
                else {str: "text", int: "a whole number"}.get(wanted, "true or false")
            )
            raise InputError(f'key "{name}": expected {kind}, got {value!r}')
    if "seconds" in record:
        record["seconds"] = float(record["seconds"])
    return Annotation(**record)


def parse_lines(
    lines: Iterable[str], *, source: str = "annotations", skip_bad: bool = False
) -> tuple[list[Annotation], list[str]]:
    """Read lines of JSON.

    Parameters
    ----------
    lines : one object each; empty lines are passed over
    source : name in messages
    skip_bad : leave lines that cannot be read out, and tell of them, instead of raising

    Returns
    -------
    The annotations in order, and one message for each line that was left out.

    Raises
    ------
    InputError
        For the first line that cannot be read, with its number and what is wrong with it.

    Examples
    --------
    >>> parse_lines(['{"v": 1, "instance": "p", "step": 0, "feature": "LDL", "verdict": 2}'])
    Traceback (most recent call last):
    ...
    shared_core.errors.InputError: annotations:1: verdict: 1 (attend), 0 (not attend) or -1 (don't know), got 2
    """
    read: list[Annotation] = []
    problems: list[str] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            read.append(_parse(line))
        except InputError as error:
            message = f"{source}:{number}: {error}"
            if not skip_bad:
                raise InputError(message) from None
            problems.append(message)
    return read, problems


def read_jsonl(path: str | Path, *, skip_bad: bool = False) -> tuple[list[Annotation], list[str]]:
    """Read a file of `to_jsonl`; see `parse_lines`.

    Parameters
    ----------
    path : of the file
    skip_bad : leave lines that cannot be read out, and tell of them, instead of raising

    Returns
    -------
    The annotations in order, and one message for each line that was left out.

    Raises
    ------
    InputError
        For a file that is not there, and for a line that cannot be read, with its number.
    """
    try:
        # A line that is not UTF-8 must not take the others with it.
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a file of annotations") from None
    return parse_lines(text.split("\n"), source=str(path), skip_bad=skip_bad)


def latest(annotations: Iterable[Annotation]) -> list[Annotation]:
    """Return the verdicts that stand: the last one per instance, step, feature and annotator, after undoing.

    Parameters
    ----------
    annotations : a log, oldest first

    Returns
    -------
    In the order in which they were given. Undoing where nothing stands does nothing.

    Examples
    --------
    >>> log = [Annotation("p", 0, "LDL", 1), Annotation("p", 0, "LDL", 0), Annotation("p", 0, "LDL", 0, undo=True)]
    >>> [one.verdict for one in latest(log)]
    [1]
    """
    standing: dict[tuple[str, int, str, str], list[tuple[int, Annotation]]] = {}
    for position, one in enumerate(annotations):
        pile = standing.setdefault(one.key, [])
        if not one.undo:
            pile.append((position, one))
        elif pile:
            pile.pop()
    return [one for _, one in sorted((pile[-1] for pile in standing.values() if pile), key=lambda pair: pair[0])]


def masks(
    annotations: Iterable[Annotation],
    instances: Sequence[str],
    steps: int,
    features: Sequence[str],
    annotator: str | None = None,
) -> tuple[list[tuple[str, str]], Int8[np.ndarray, "K T r"]]:
    """Return the context that a model is conditioned on: one mask per instance and annotator.

    Parameters
    ----------
    annotations : a log, oldest first
    instances : every instance that there is
    steps : time steps T
    features : names in the model's order, r of them
    annotator : take this one's verdicts only; all by default

    Returns
    -------
    K pairs of instance and annotator, in the order of the first standing verdict, and their masks (K, T, r): 1 attend,
    0 do not attend, -1 don't know or not seen. A pair with nothing but -1 is left out.

    Raises
    ------
    InputError
        For an instance, step or feature that is not known; the message names the closest one.

    Examples
    --------
    >>> ids, context = masks([Annotation("p", 1, "LDL", 0, annotator="a")], ["p", "q"], 2, ["LDL", "HDL"])
    >>> ids, context.tolist()
    ([('p', 'a')], [[[-1, -1], [0, -1]]])
    """
    columns, known = _names(features), set(instances)
    found: dict[tuple[str, str], Int8[np.ndarray, "T r"]] = {}
    for one in latest(annotations):
        if annotator is not None and one.annotator != annotator:
            continue
        if one.instance not in known:
            raise no_such("instance", one.instance, known)
        if one.feature not in columns:
            raise no_such("feature", one.feature, columns)
        if one.step >= steps:
            raise InputError(f"step {one.step} of '{one.instance}': there are {steps} steps, counted from 0")
        if one.verdict >= 0:
            pair = one.instance, one.annotator
            if pair not in found:
                found[pair] = np.full((steps, len(columns)), -1, np.int8)
            found[pair][one.step, columns[one.feature]] = one.verdict
    shape = len(found), steps, len(columns)
    return list(found), np.stack(list(found.values())) if found else np.empty(shape, np.int8)


@dataclass(frozen=True)
class Disagreement:
    """A cell that some say to attend to and others not to.

    Parameters
    ----------
    instance, step, feature : the cell
    attend, ignore : annotators of each opinion, sorted
    """

    instance: str
    step: int
    feature: str
    attend: tuple[str, ...]
    ignore: tuple[str, ...]


def _by_cell(annotations: Iterable[Annotation]) -> dict[tuple[str, int, str], dict[str, int]]:
    cells: dict[tuple[str, int, str], dict[str, int]] = {}
    for one in latest(annotations):
        cells.setdefault(one.cell, {})[one.annotator] = one.verdict
    return cells


def disagreements(annotations: Iterable[Annotation]) -> list[Disagreement]:
    """Return the cells with both a 1 and a 0 among the standing verdicts.

    Parameters
    ----------
    annotations : a log of several annotators, oldest first

    Returns
    -------
    Sorted by instance, step and feature; how many are of each opinion is the length of its tuple.
    """
    found: list[Disagreement] = []
    for cell, said in sorted(_by_cell(annotations).items()):
        attend = tuple(sorted(who for who, verdict in said.items() if verdict == 1))
        ignore = tuple(sorted(who for who, verdict in said.items() if verdict == 0))
        if attend and ignore:
            found.append(Disagreement(*cell, attend, ignore))
    return found


def cohen_kappa(first: Int[np.ndarray, " items"], second: Int[np.ndarray, " items"]) -> float:
    """Return Cohen's kappa of two people who judged the same things.

    Parameters
    ----------
    first, second : (items,) categories, any whole numbers

    Returns
    -------
    1 for agreement in everything, 0 for no more than chance; not a number where chance alone agrees in everything (both
    always said the same one thing) or there is nothing to compare.

    Raises
    ------
    InputError
        For different lengths.

    Examples
    --------
    >>> cohen_kappa(np.array([1, 1, 0, 0]), np.array([1, 1, 0, 1]))
    0.5
    """
    if len(first) != len(second):
        raise InputError(f"two people must have judged the same things, got {len(first)} and {len(second)} verdicts")
    if not len(first):
        return math.nan
    categories = np.union1d(first, second)
    shares = [(whose[:, None] == categories).mean(0) for whose in (first, second)]
    expected = float(shares[0] @ shares[1])
    return (float((first == second).mean()) - expected) / (1 - expected) if expected < 1 else math.nan


def fleiss_kappa(counts: Int[np.ndarray, "items categories"]) -> float:
    """Return Fleiss' kappa of several people who judged the same things.

    Parameters
    ----------
    counts : (items, categories) how many people put an item into a category; as many people for every item

    Returns
    -------
    1 for agreement in everything, 0 for no more than chance; not a number where everybody always said the same one
    thing, or there is nothing to compare.

    Raises
    ------
    InputError
        For rows that do not add up to the same number, at least 2.

    Examples
    --------
    >>> fleiss_kappa(np.array([[3, 0], [0, 3], [3, 0]]))
    1.0
    """
    if not len(counts):
        return math.nan
    people = counts.sum(1)
    if (people != people[0]).any() or people[0] < 2:
        raise InputError(f"every item needs as many verdicts, at least 2; got from {people.min()} to {people.max()}")
    raters = int(people[0])
    agreement = float((((counts**2).sum(1) - raters) / (raters * (raters - 1))).mean())
    expected = float(((counts.sum(0) / counts.sum()) ** 2).sum())
    return (agreement - expected) / (1 - expected) if expected < 1 else math.nan


def kappa_between(annotations: Iterable[Annotation], first: str, second: str, *, unknown: bool = False) -> float:
    """Return Cohen's kappa of two annotators, over the cells that both have judged.

    Parameters
    ----------
    annotations : a log, oldest first
    first, second : annotators
    unknown : count "don't know" as a third opinion; by default such a verdict is left out

    Returns
    -------
    See `cohen_kappa`.
    """
    pairs = [
        (said[first], said[second])
        for said in _by_cell(annotations).values()
        if first in said and second in said and (unknown or min(said[first], said[second]) >= 0)
    ]
    both = np.array(pairs, np.int64).reshape(-1, 2)
    return cohen_kappa(both[:, 0], both[:, 1])


def kappa_of_all(annotations: Iterable[Annotation], *, unknown: bool = False) -> float:
    """Return Fleiss' kappa of all annotators, over the cells that every one of them has judged.

    Parameters
    ----------
    annotations : a log, oldest first
    unknown : count "don't know" as a third opinion; by default such a verdict is left out

    Returns
    -------
    See `fleiss_kappa`; not a number for fewer than two annotators.
    """
    cells = _by_cell(annotations)
    people = {who for said in cells.values() for who in said}
    rows = [
        [list(said.values()).count(verdict) for verdict in VERDICTS]
        for said in cells.values()
        if len(said) == len(people) and (unknown or min(said.values()) >= 0)
    ]
    return fleiss_kappa(np.array(rows, np.int64).reshape(-1, len(VERDICTS))) if len(people) > 1 else math.nan


def _inert(text: str) -> str:
    """Put an apostrophe before what a spreadsheet would run as a formula."""
    return f"'{text}" if text[:1] in {"=", "+", "-", "@", "\t", "\r"} else text


def to_csv(annotations: Iterable[Annotation]) -> str:
    """Return a table with a header: one row per annotation, in the given order.

    Parameters
    ----------
    annotations : a log, or what stands of it

    Returns
    -------
    CSV with CRLF line ends (RFC 4180). Text that a spreadsheet would take for a formula gets an apostrophe before it.
    """
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(field.name for field in fields(Annotation))
    for one in annotations:
        writer.writerow(_inert(value) if isinstance(value, str) else value for value in asdict(one).values())
    return table.getvalue()


def to_label_studio(annotations: Iterable[Annotation]) -> list[dict[str, Any]]:
    """Return what stands as tasks of Label Studio: one per instance, one completion per annotator.

    Parameters
    ----------
    annotations : a log, oldest first

    Returns
    -------
    Tasks to be written as JSON: every verdict is a time-series label at one instant, with the feature as its channel;
    `lead_time` is in seconds.
    """
    tasks: dict[str, dict[str, list[Annotation]]] = {}
    for one in latest(annotations):
        tasks.setdefault(one.instance, {}).setdefault(one.annotator, []).append(one)
    return [
        {
            "data": {"instance": instance},
            "annotations": [
                {
                    "completed_by": {"email": annotator},
                    "lead_time": sum(one.seconds for one in given),
                    "result": [_region(one) for one in given],
                }
                for annotator, given in people.items()
            ],
        }
        for instance, people in tasks.items()
    ]


def _region(one: Annotation) -> dict[str, Any]:
    unique = hashlib.sha256(json.dumps(one.key).encode()).hexdigest()[:10]
    return {
        "id": unique,
        "from_name": "verdict",
        "to_name": "series",
        "type": "timeserieslabels",
        "value": {
            "start": one.step,
            "end": one.step,
            "instant": True,
            "channel": one.feature,
            "timeserieslabels": [VERDICTS[one.verdict]],
        },
        "meta": {"text": [one.note] if one.note else []},
    }
