"""Few-shot tasks drawn from a class-indexed data set: N-way K-shot and any-shot.

Episode number ``i`` of a sampler depends on the seed and on ``i`` alone. Two methods can therefore be compared on the
same episodes, evaluation can be resumed anywhere, and workers need not share any state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int64, Shaped

from shared_core.errors import InputError

__all__ = ["Episode", "EpisodeSampler", "TooFewItemsError"]


class TooFewItemsError(InputError):
    """A class, or the data set, is too small for the episodes asked for."""


@dataclass(frozen=True)
class Episode:
    """Indices into the data set and labels 0..ways-1, in the order of `classes`."""

    classes: Shaped[np.ndarray, " ways"]
    support: Int64[np.ndarray, " n_support"]
    support_labels: Int64[np.ndarray, " n_support"]
    query: Int64[np.ndarray, " n_query"]
    query_labels: Int64[np.ndarray, " n_query"]

    @property
    def shots(self) -> Int64[np.ndarray, " ways"]:
        """Support items of each class."""
        return np.bincount(self.support_labels, minlength=len(self.classes)).astype(np.int64)


class EpisodeSampler:
    """Draw episodes: `ways` classes, `shots` support and `queries` query items of each, never overlapping.

    Parameters
    ----------
    labels : (n,) class of each item; any integers or strings
    ways : classes in an episode, at least 2
    shots : support items of each class; a pair (low, high) draws them uniformly (any-shot)
    queries : query items of each class
    seed : with an episode's number, decides the episode
    imbalance : how a range of shots is used. ``class``: every class its own draw; ``task``: one draw for all classes
        of an episode; ``mixed``: a fair coin between the two (Lee et al., ICLR 2020, any-shot protocol)
    shrink : with a class smaller than shots + queries, take fewer shots (at least 1) instead of refusing it

    Raises
    ------
    TooFewItemsError
        When a class is too small, naming it, its size and the size needed; or when there are too few classes.

    Examples
    --------
    >>> sampler = EpisodeSampler(np.repeat(np.arange(6), 10), ways=5, shots=1, queries=3, seed=0)
    >>> episode = sampler[0]
    >>> episode.support.shape, episode.query.shape, episode.shots.tolist()
    ((5,), (15,), [1, 1, 1, 1, 1])
    """

    def __init__(
        self,
        labels: Shaped[np.ndarray, " n"] | Sequence[int],
        *,
        ways: int,
        shots: int | tuple[int, int],
        queries: int,
        seed: int = 0,
        imbalance: Literal["class", "task", "mixed"] = "mixed",
        shrink: bool = False,
    ) -> None:
        array = np.asarray(labels)
        if array.ndim != 1:
            raise InputError(f"labels must have shape (n,), got {array.shape}")
        if imbalance not in {"class", "task", "mixed"}:
            raise InputError(f"imbalance must be class, task or mixed, got {imbalance!r}")
        low, high = (shots, shots) if isinstance(shots, int) else shots
        if ways < 2 or queries < 0 or not 1 <= low <= high:
            raise InputError(f"need ways >= 2, queries >= 0, 1 <= shots; got {ways=}, {shots=}, {queries=}")
        self.classes, codes, sizes = np.unique(array, return_inverse=True, return_counts=True)
        if len(self.classes) < ways:
            raise TooFewItemsError(f"{ways}-way episodes need {ways} classes, the data set has {len(self.classes)}")
        needed = queries + (1 if shrink else high)
        if (sizes < needed).any():
            worst = int(np.argmin(sizes))
            raise TooFewItemsError(
                f"class {self.classes[worst]} has {sizes[worst]} items, episodes need {needed}"
                f" ({needed - queries} support + {queries} query); leave the class out or ask for fewer"
            )
        self._members = np.split(np.argsort(codes, kind="stable"), np.cumsum(sizes)[:-1])
        self._sizes, self._shots = sizes, (low, high)
        self.ways, self.queries, self.seed, self.imbalance = ways, queries, seed, imbalance

    def __getitem__(self, number: int) -> Episode:
        """Return episode `number` (0, 1, ... without end)."""
        if number < 0:
            raise IndexError(number)
        random = np.random.default_rng([self.seed, number])
        chosen = random.choice(len(self.classes), self.ways, replace=False)
        shots = self._draw_shots(random, chosen)
        picks = [
            random.choice(self._members[code], count + self.queries, replace=False, shuffle=True)
            for code, count in zip(chosen, shots, strict=True)
        ]
        labels = np.arange(self.ways)
        return Episode(
            classes=self.classes[chosen],
            support=np.concatenate([pick[:count] for pick, count in zip(picks, shots, strict=True)]).astype(np.int64),
            support_labels=np.repeat(labels, shots).astype(np.int64),
            query=np.concatenate([pick[count:] for pick, count in zip(picks, shots, strict=True)]).astype(np.int64),
            query_labels=np.repeat(labels, self.queries).astype(np.int64),
        )

    def _draw_shots(
        self, random: np.random.Generator, chosen: Int64[np.ndarray, " ways"]
    ) -> Int64[np.ndarray, " ways"]:
        low, high = self._shots
        by_class = self.imbalance == "class" or (self.imbalance == "mixed" and bool(random.integers(2)))
        drawn = random.integers(low, high + 1, self.ways if by_class else 1)
        return np.minimum(np.broadcast_to(drawn, (self.ways,)), self._sizes[chosen] - self.queries).astype(np.int64)

    def episodes(self, count: int, start: int = 0) -> Iterator[Episode]:
        """Yield `count` episodes from number `start` on."""
        for number in range(start, start + count):
            yield self[number]
