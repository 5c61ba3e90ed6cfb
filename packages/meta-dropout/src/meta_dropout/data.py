"""Tasks drawn from classes of images; the classes themselves are loaded by :mod:`shared_core.classes`.

:func:`load` gives the classes of one split, :class:`TaskSource` draws tasks from them. No class is in two splits, so
that validation and test tasks are about classes never seen. :func:`read_labelled` and :func:`read_unlabelled` read
pictures from anywhere in the form that a trained network takes.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float32, Int64
from numpy.typing import NDArray
from torch import Tensor

from meta_dropout.engine import Tasks
from shared_core.classes import (
    NAMES,
    ClassImages,
    LabelledPictures,
    Pictures,
    Split,
    SplitBy,
    load_classes,
    read_labelled,
    read_unlabelled,
)
from shared_core.episodes import Episode, EpisodeSampler, TooFewItemsError
from shared_core.errors import InputError

__all__ = [
    "NAMES",
    "ClassImages",
    "LabelledPictures",
    "Pictures",
    "Split",
    "SplitBy",
    "TaskSource",
    "load",
    "read_labelled",
    "read_unlabelled",
]

load = load_classes


class TaskSource:
    """Tasks from classes of images: episode number i depends on the seed and on i alone.

    Parameters
    ----------
    images : the classes of one split
    ways : classes of a task
    shots : support images of each class
    queries : query images of each class, never among the support
    seed : with an episode's number, decides the episode
    shared_classes : let all tasks of a batch have the same classes in the same order, with images of their own, as the
        sampler of the authors' released code does; the batch's first episode decides which
    disjoint : take a class's queries from other groups (typefaces of glyphs, folders) than its support, so that no
        query is the support's picture turned a little

    Raises
    ------
    TooFewItemsError
        For fewer classes than `ways`, or a class of fewer than `shots` + `queries` images, by name.
    InputError
        For `disjoint` with images that have no groups, or a class whose groups cannot be divided so; it is named.

    Examples
    --------
    >>> toy = ClassImages("toy", np.zeros((12, 1, 16, 16), np.uint8), np.repeat(np.arange(3), 4), ("a", "b", "c"))
    >>> tasks = TaskSource(toy, ways=2, shots=1, queries=3, seed=0).batch(0, 5)
    >>> tasks.support.shape, tasks.query.shape, tasks.support_labels[0].tolist()
    (torch.Size([5, 2, 1, 16, 16]), torch.Size([5, 6, 1, 16, 16]), [0, 1])
    """

    def __init__(
        self,
        images: ClassImages,
        ways: int,
        shots: int,
        queries: int,
        seed: int = 0,
        shared_classes: bool = False,
        disjoint: bool = False,
    ) -> None:
        if ways < 2 or shots < 1 or queries < 1:
            raise InputError(f"need ways >= 2, shots >= 1 and queries >= 1, got {ways}, {shots} and {queries}")
        if images.ways < ways:
            raise TooFewItemsError(
                f"{images.name}: has {images.ways} classes, and {ways}-way tasks need {ways}; ask for fewer ways or"
                " give more classes"
            )
        worst = int(images.counts.argmin())
        if images.counts[worst] < shots + queries:
            raise TooFewItemsError(
                f"{images.name}: class '{images.class_names[worst]}' has {images.counts[worst]} images, needs"
                f" {shots + queries} ({shots} support + {queries} query); add images, leave the class out or ask for"
                " fewer"
            )
        self.images, self.ways, self.shots, self.queries = images, ways, shots, queries
        self.seed, self.shared_classes, self.disjoint = seed, shared_classes, disjoint
        if disjoint:
            self._require_groups()
        pixels = np.ascontiguousarray(images.images)
        self._pixels = torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy())
        self._sampler = EpisodeSampler(images.labels, ways=ways, shots=shots, queries=queries, seed=seed)

    def batch(self, number: int, count: int) -> Tasks:
        """Return the episodes ``number * count`` to ``number * count + count - 1`` as tasks, on the CPU.

        Parameters
        ----------
        number : of the batch, 0, 1, ... without end
        count : tasks in it

        Returns
        -------
        Tasks, their images float32 in [0, 1], ``(count, ways * shots, channels, height, width)`` for the support, class
        after class.
        """
        if number < 0 or count < 1:
            raise InputError(f"need a batch number >= 0 and at least 1 task, got {number} and {count}")
        picks = self._shared(number, count) if self.shared_classes else self._independent(number, count)
        cut = self.ways * self.shots
        labels = torch.arange(self.ways)
        return Tasks(
            self._gather(picks[:, :cut]),
            labels.repeat_interleave(self.shots).expand(count, -1).contiguous(),
            self._gather(picks[:, cut:]),
            labels.repeat_interleave(self.queries).expand(count, -1).contiguous(),
        )

    def classes(self, number: int, count: int) -> Int64[Tensor, "tasks ways"]:
        """Return which classes of the split the tasks of a batch are about, in the order of their labels.

        Parameters
        ----------
        number, count : as for :meth:`batch`
        """
        picks = self._shared(number, count) if self.shared_classes else self._independent(number, count)
        return torch.from_numpy(self.images.labels[picks[:, : self.ways * self.shots : self.shots]])

    def _gather(self, index: NDArray[np.int64]) -> Float32[Tensor, "tasks n channels height width"]:
        chosen = self._pixels[torch.from_numpy(index)]
        return chosen.float().div_(255) if chosen.dtype == torch.uint8 else chosen

    def _independent(self, number: int, count: int) -> NDArray[np.int64]:
        episodes = self._sampler.episodes(count, number * count)
        if self.disjoint:
            return np.stack([self._apart(e.classes, number * count + k) for k, e in enumerate(episodes)])
        return np.stack([_indices(episode) for episode in episodes])

    def _require_groups(self) -> None:
        groups, shared = self.images.groups, self.shared_classes
        if groups is None or shared:
            raise InputError(
                "disjoint: tasks of shared classes are drawn as the authors' code does; use one of the two" if shared
                else f"disjoint: {self.images.name} says no group (typeface, folder) of its images"
            )  # fmt: skip
        for number, name in enumerate(self.images.class_names):
            _, sizes = np.unique(groups[self.images.labels == number], return_counts=True)
            # At the worst the support's last image opens the largest group.
            least = int(sizes.sum()) - (self.shots - 1) - int(sizes.max())
            if least < self.queries:
                raise InputError(
                    f"disjoint: class '{name}' has {sizes.sum()} images in {len(sizes)} groups; with {self.shots} in"
                    f" the support, other groups may leave {max(least, 0)} for {self.queries} queries; ask for fewer"
                )

    def _apart(self, classes: NDArray[np.int64], number: int) -> NDArray[np.int64]:
        """Return an episode's rows, the support first; a class's groups are used up one after another, in any order."""
        groups = self.images.groups
        assert groups is not None
        random = np.random.default_rng([self.seed, 17, number])
        support: list[NDArray[np.int64]] = []
        query: list[NDArray[np.int64]] = []
        for label in classes:
            rows = random.permutation(np.flatnonzero(self.images.labels == label))
            known, place = np.unique(groups[rows], return_inverse=True)
            rows = rows[np.argsort(random.permutation(len(known))[place], kind="stable")]
            first = rows[: self.shots]
            rest = rows[~np.isin(groups[rows], groups[first])]
            support.append(first)
            query.append(random.permutation(rest)[: self.queries])
        return np.concatenate([*support, *query])

    def _shared(self, number: int, count: int) -> NDArray[np.int64]:
        classes = self._sampler[number * count].classes
        rows = np.flatnonzero(np.isin(self.images.labels, classes))
        # Numbers in the order wanted; only such episodes have all of the classes, each in an order of its own.
        position = np.empty(self.images.ways, dtype=np.int64)
        position[classes] = np.arange(self.ways)
        sampler = EpisodeSampler(
            position[self.images.labels[rows]], ways=self.ways, shots=self.shots, queries=self.queries, seed=self.seed
        )
        episodes = sampler.episodes(count, number * count)
        return rows[np.stack([_indices(episode, np.argsort(episode.classes)) for episode in episodes])]


def _indices(episode: Episode, order: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
    """Return the support's indices and then the query's, class after class, the classes perhaps in another order."""
    if order is None:
        return np.concatenate([episode.support, episode.query])
    ways = len(episode.classes)
    return np.concatenate([part.reshape(ways, -1)[order].ravel() for part in (episode.support, episode.query)])
