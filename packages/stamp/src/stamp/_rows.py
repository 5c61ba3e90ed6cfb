"""Rows of a source that are read only once they have been chosen by their labels: splits, classes, limits."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from shared_core.errors import InputError, no_such

Split = Literal["train", "validation", "test", "all"]
Rows = NDArray[np.int64]
Values = NDArray[Any]


@dataclass(frozen=True)
class Wanted:
    """The options of `read_examples`, by name."""

    split: Split
    size: int | None
    channels: Literal[1, 3] | None
    seed: int
    classes: int | Sequence[str] | None
    instances: int | None


@dataclass(frozen=True, eq=False)
class Found:
    """Labels, and how to read the rows that are still wanted once they have been chosen by their labels."""

    name: str
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    read: Callable[[Rows], Values]

    def take(self, rows: Rows) -> Found:
        def read(index: Rows) -> Values:
            return self.read(rows[index])

        return replace(self, labels=self.labels[rows], read=read)

    def divided(self, split: Split, seed: int) -> Found:
        """Return a split of what has none."""
        if split == "all":
            return self
        return self.take(_parts(self.labels, seed, (0.2, 0.2))[split])

    def held_out(self, split: Split, seed: int) -> Found:
        """Return a split of what is for training and validation."""
        return self.take(_parts(self.labels, seed, (0.0, 0.2))[split])


def in_memory(name: str, x: Values, labels: NDArray[np.int64], class_names: Sequence[str]) -> Found:
    return Found(name, labels, tuple(class_names), lambda rows: x[rows])


def _parts(labels: NDArray[np.int64], seed: int, shares: tuple[float, float]) -> dict[str, Rows]:
    """Divide each class into test and, of the rest, validation; what is left, at least one, is for training."""
    found: dict[str, list[Rows]] = {"train": [], "validation": [], "test": []}
    for number in np.unique(labels).tolist():
        members = np.random.default_rng([seed, number]).permutation(np.flatnonzero(labels == number))
        for part, share in zip(("test", "validation"), shares, strict=True):
            least = 1 if share and len(members) > 1 else 0
            cut = max(least, round(share * len(members)))
            found[part].append(members[:cut])
            members = members[cut:]
        found["train"].append(members)
    return {part: np.sort(np.concatenate([*rows, np.zeros(0, np.int64)])) for part, rows in found.items()}


def joined(parts: Sequence[Found]) -> Found:
    """Return sets of the same classes as one."""
    starts = np.cumsum([0, *(len(part.labels) for part in parts)])

    def read(rows: Rows) -> Values:
        pieces = [
            (np.flatnonzero(inside), part.read(rows[inside] - start))
            for part, start, end in zip(parts, starts[:-1], starts[1:], strict=True)
            if (inside := (rows >= start) & (rows < end)).any()
        ]
        order = np.argsort(np.concatenate([places for places, _ in pieces]), kind="stable")
        return np.concatenate([values for _, values in pieces])[order]

    return replace(parts[0], labels=np.concatenate([part.labels for part in parts]), read=read)


def official(read: Callable[[str], Found], wanted: Wanted, *, validation: bool = False) -> Found:
    """Return a split of what its publisher divided into train and test, and perhaps validation."""
    if wanted.split == "all":
        return joined([read(part) for part in (("train", "validation", "test") if validation else ("train", "test"))])
    if wanted.split == "test" or validation:
        return read(wanted.split)
    return read("train").held_out(wanted.split, wanted.seed)


def chosen(found: Found, wanted: Wanted) -> Found:
    """Return the classes that are wanted, numbered anew."""
    if wanted.classes is None:
        return found
    names = list(found.class_names)
    if isinstance(wanted.classes, int):
        if not 1 <= wanted.classes <= len(names):
            raise InputError(f"classes: {wanted.classes} asked for, and {found.name} has {len(names)}")
        # Each name's place depends on it alone: a new class exchanges at most one.
        order = sorted(names, key=lambda name: hashlib.sha256(f"{wanted.seed}:{name}".encode()).digest())
        drawn = set(order[: wanted.classes])
        kept = [name for name in names if name in drawn]
    else:
        kept = [str(name) for name in wanted.classes]
        if unknown := next((name for name in kept if name not in names), None):
            raise no_such("class", unknown, names, where=f"classes: {found.name}")
        if len(set(kept)) != len(kept) or not kept:
            raise InputError(f"classes: must be different names, at least one, got {', '.join(kept) or 'none'}")
    number = np.full(len(names), -1, dtype=np.int64)
    number[[names.index(name) for name in kept]] = np.arange(len(kept))
    chosen = found.take(np.flatnonzero(number[found.labels] >= 0))
    return replace(chosen, labels=number[chosen.labels], class_names=tuple(kept))


def limited(found: Found, limit: int | None, seed: int) -> Found:
    """Return at most so many rows: one of each class, and the others in the order of a draw that favours no class."""
    if limit is None or limit >= len(found.labels):
        return found
    present = np.unique(found.labels).tolist()
    if limit < len(present):
        raise InputError(f"limit: {limit} examples cannot hold {len(present)} classes; give at least {len(present)}")
    places = np.empty(len(found.labels))
    for number in present:
        members = np.flatnonzero(found.labels == number)
        ranks = np.random.default_rng([seed, number]).permutation(len(members))
        places[members] = np.where(ranks == 0, -1.0, (ranks + 0.5) / len(members))
    return found.take(np.sort(np.argsort(places, kind="stable")[:limit]))


def standardised(found: Found, wanted: Wanted) -> Found:
    """Scale features to the mean 0 and variance 1 that they have in the training split."""
    train = found.divided("train", wanted.seed)
    x = train.read(np.arange(len(train.labels))).astype(np.float64)
    mean, deviation = x.mean(0), x.std(0)
    # A column that hardly varies would blow noise up.
    scale = np.where(deviation > 1e-6 * np.maximum(np.abs(mean), 1.0), deviation, 1.0)
    part = found.divided(wanted.split, wanted.seed)

    def read(rows: Rows) -> Values:
        return ((part.read(rows) - mean) / scale).astype(np.float32)

    return replace(part, read=read)
