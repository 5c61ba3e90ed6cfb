"""Any-shot tasks drawn from classes of images: as many examples of each class as there happen to be."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from bayes_taml.ragged import Tasks
from shared_core.classes import ClassImages, load_classes
from shared_core.episodes import Episode, EpisodeSampler, TooFewItemsError
from shared_core.errors import InputError

__all__ = ["AnyShotSource", "ClassImages", "Mode", "WayError", "load", "load_classes"]

load = load_classes

Mode = Literal["mixed", "class", "task", "step"]


class WayError(TooFewItemsError):
    """More classes are asked for than there are."""


class AnyShotSource:
    """Tasks with different numbers of support examples; number i depends on the seed and on i alone.

    Parameters
    ----------
    images : the classes of one split
    ways : classes of a task
    shots : fewest and most support images of a class; the same number twice for a fixed one
    queries : query images of each class, never among the support
    mode : ``class``: every class its own number; ``task``: one number for all classes of a task; ``mixed``: a fair coin
        between the two (section 4 of the paper); ``step``: half of the classes (the fewer half) have the most, the
        others the fewest
    seed : with a task's number, decides the task
    bucket : draw so many tasks ahead and batch those of similar size together (0: not). Every task is still used once,
        and batches of a bucket come in random order

    Raises
    ------
    WayError
        For fewer classes than `ways`.
    TooFewItemsError
        For a class that has no more images than `queries`; a class with fewer than the shots drawn gives what it has.

    Examples
    --------
    >>> toy = ClassImages("toy", np.zeros((40, 1, 16, 16), np.uint8), np.repeat(np.arange(4), 10), tuple("abcd"))
    >>> tasks = AnyShotSource(toy, ways=3, shots=(1, 5), queries=2, mode="class").batch(0, 4)
    >>> tasks.query.shape, bool((tasks.counts() >= 1).all())
    (torch.Size([4, 6, 1, 16, 16]), True)
    """

    def __init__(
        self,
        images: ClassImages,
        ways: int = 5,
        shots: tuple[int, int] = (1, 50),
        queries: int = 15,
        *,
        mode: Mode = "mixed",
        seed: int = 0,
        bucket: int = 0,
    ) -> None:
        if queries < 1:
            raise InputError(f"queries: must be at least 1, got {queries}")
        if images.ways < ways:
            raise WayError(
                f"{images.name}: has {images.ways} classes, and tasks of {ways} need {ways}; ask for fewer ways or give"
                " more classes"
            )
        if mode not in get_args(Mode):
            raise InputError(f"mode: one of {', '.join(get_args(Mode))}, got '{mode}'")
        if bucket < 0:
            raise InputError(f"bucket: must be at least 0, got {bucket}")
        self.images, self.ways, self.shots, self.queries = images, ways, shots, queries
        self.mode, self.seed, self.bucket = mode, seed, bucket
        counts = images.counts
        if (counts <= queries).any():
            worst = int(counts.argmin())
            raise TooFewItemsError(
                f"{images.name}: class '{images.class_names[worst]}' has {counts[worst]} images; {queries} queries and"
                f" at least one of support need {queries + 1}; add images, leave the class out or ask for fewer queries"
            )
        self._sampler = EpisodeSampler(
            images.labels,
            ways=ways,
            shots=shots,
            queries=queries,
            seed=seed,
            imbalance="class" if mode == "step" else mode,
            shrink=True,
        )
        pixels = np.ascontiguousarray(images.images)
        self._pixels = torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy())
        self._order = lru_cache(maxsize=8)(self._sorted)

    def batch(self, number: int, count: int) -> Tasks:
        """Return batch `number` of `count` tasks, images in [0, 1], on the CPU.

        Parameters
        ----------
        number : of the batch, 0, 1, ... without end
        count : tasks in it
        """
        if number < 0 or count < 1:
            raise InputError(f"need a batch number >= 0 and at least 1 task, got {number} and {count}")
        episodes = [self.episode(k) for k in self._numbers(number, count)]
        return Tasks.collate(
            [
                (
                    self._gather(e.support),
                    torch.from_numpy(e.support_labels),
                    self._gather(e.query),
                    torch.from_numpy(e.query_labels),
                )
                for e in episodes
            ],
            self.ways,
        )

    def episode(self, number: int) -> Episode:
        """Return task `number` as positions of images.

        Parameters
        ----------
        number : of the task
        """
        drawn = self._sampler[number]
        return self._stepped(drawn, number) if self.mode == "step" else drawn

    def _stepped(self, drawn: Episode, number: int) -> Episode:
        """Draw again with the most shots for half of the classes and the fewest for the others."""
        low, high = self.shots
        random = np.random.default_rng([self.seed, 29, number])
        many = random.permutation(self.ways) < self.ways // 2
        support: list[np.ndarray] = []
        query: list[np.ndarray] = []
        for name, large in zip(drawn.classes, many, strict=True):
            rows = random.permutation(np.flatnonzero(self.images.labels == name))
            shots = min(high if large else low, len(rows) - self.queries)
            support.append(rows[:shots])
            query.append(rows[shots : shots + self.queries])
        labels = np.arange(self.ways)
        return Episode(
            classes=drawn.classes,
            support=np.concatenate(support).astype(np.int64),
            support_labels=np.repeat(labels, [len(rows) for rows in support]).astype(np.int64),
            query=np.concatenate(query).astype(np.int64),
            query_labels=drawn.query_labels,
        )

    def _numbers(self, number: int, count: int) -> list[int]:
        batches = self.bucket // count
        if batches < 2:
            return list(range(number * count, (number + 1) * count))
        window, place = divmod(number, batches)
        return self._order(window, batches, count)[place]

    def _sorted(self, window: int, batches: int, count: int) -> list[list[int]]:
        first = window * batches * count
        numbers = np.arange(first, first + batches * count)
        sizes = np.array([len(self.episode(int(k)).support) for k in numbers])
        parts = numbers[np.argsort(sizes, kind="stable")].reshape(batches, count)
        shuffled = np.random.default_rng([self.seed, 31, window]).permutation(batches)
        return [[int(k) for k in parts[place]] for place in shuffled]

    def _gather(self, index: Int64[np.ndarray, " n"]) -> Tensor:
        chosen = self._pixels[torch.from_numpy(index)]
        return chosen.float().div_(255) if chosen.dtype == torch.uint8 else chosen
