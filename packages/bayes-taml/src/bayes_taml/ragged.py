"""Tasks whose supports have any number of rows, and how to put them together so that little is computed in vain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int64, Shaped
from torch import Tensor

from shared_core.errors import InputError

__all__ = ["EmptyClassError", "NeedTwoClassesError", "Tasks", "UnknownLabelError", "group_by_size", "without_padding"]


class EmptyClassError(InputError):
    """A class has no support example."""


class NeedTwoClassesError(InputError):
    """A task has fewer than two classes."""


class UnknownLabelError(InputError):
    """A query's label is not among the support's."""


@dataclass(frozen=True, eq=False)
class Tasks:
    """A batch of tasks, padded to one shape; what the masks leave out never reaches a computation.

    Parameters
    ----------
    support : ``(tasks, n, ...)``
    support_labels : ``(tasks, n)`` classes 0..ways-1
    support_mask : ``(tasks, n)`` rows that are real
    query : ``(tasks, m, ...)``
    query_labels : ``(tasks, m)``
    query_mask : ``(tasks, m)``
    ways : classes of every task

    Raises
    ------
    EmptyClassError, NeedTwoClassesError, UnknownLabelError, InputError
        For a class without a support row, fewer than two classes, a query of another class, shapes that do not go
        together.

    Examples
    --------
    >>> x, y = torch.rand(3, 4), torch.tensor([0, 1, 1])
    >>> tasks = Tasks.collate([(x, y, x, y), (x[:2], y[:2], x, y)], ways=2)
    >>> tasks.support.shape, tasks.sizes().tolist(), tasks.counts().tolist()
    (torch.Size([2, 3, 4]), [3, 2], [[1, 2], [1, 1]])
    """

    support: Shaped[Tensor, "tasks n ..."]
    support_labels: Int64[Tensor, "tasks n"]
    support_mask: Bool[Tensor, "tasks n"]
    query: Shaped[Tensor, "tasks m ..."]
    query_labels: Int64[Tensor, "tasks m"]
    query_mask: Bool[Tensor, "tasks m"]
    ways: int

    def __post_init__(self) -> None:
        """Refuse what is no task."""
        if self.ways < 2:
            raise NeedTwoClassesError(f"a task needs at least two classes, got {self.ways}")
        for what, x, labels, mask in (
            ("support", self.support, self.support_labels, self.support_mask),
            ("query", self.query, self.query_labels, self.query_mask),
        ):
            if labels.shape != x.shape[:2] or mask.shape != labels.shape:
                raise InputError(
                    f"{what}: inputs {tuple(x.shape)}, labels {tuple(labels.shape)} and mask {tuple(mask.shape)} must"
                    " agree in their first two axes"
                )
            real = labels[mask]
            if len(real) and not 0 <= int(real.min()) <= int(real.max()) < self.ways:
                kind = UnknownLabelError if what == "query" else InputError
                raise kind(
                    f"{what}: labels {int(real.min())}..{int(real.max())} in a task of {self.ways} classes; they are"
                    f" 0..{self.ways - 1}, the classes of the support"
                )
        empty = (self.counts() == 0).nonzero()
        if len(empty):
            raise EmptyClassError(f"task {int(empty[0, 0])}: class {int(empty[0, 1])} has no support example")

    @classmethod
    def collate(cls, tasks: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]], ways: int) -> Tasks:
        """Put tasks of different sizes together.

        Parameters
        ----------
        tasks : support, its labels, query and its labels of each
        ways : classes of every task
        """
        support, support_mask = _padded([task[0] for task in tasks])
        query, query_mask = _padded([task[2] for task in tasks])
        labels, query_labels = (_padded([task[k] for task in tasks])[0] for k in (1, 3))
        return cls(support, labels, support_mask, query, query_labels, query_mask, ways)

    def __len__(self) -> int:
        """Return the number of tasks."""
        return len(self.support)

    def sizes(self) -> Int64[Tensor, " tasks"]:
        """Real support rows of each task."""
        return self.support_mask.sum(1)

    def counts(self) -> Int64[Tensor, "tasks ways"]:
        """Real support rows of each class of each task."""
        place = torch.arange(len(self), device=self.support_labels.device).unsqueeze(1) * self.ways
        chosen = (place + self.support_labels)[self.support_mask]
        return torch.bincount(chosen, minlength=len(self) * self.ways).view(len(self), self.ways)

    def part(self, first: int, count: int) -> Tasks:
        """Return `count` tasks from the position `first` on."""
        at = slice(first, first + count)
        return Tasks(
            self.support[at],
            self.support_labels[at],
            self.support_mask[at],
            self.query[at],
            self.query_labels[at],
            self.query_mask[at],
            self.ways,
        )

    def to(self, device: torch.device | str) -> Tasks:
        """Move all of it."""
        return replace(
            self,
            **{
                name: getattr(self, name).to(device)
                for name in ("support", "support_labels", "support_mask", "query", "query_labels", "query_mask")
            },
        )


def _padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    longest = max(len(r) for r in rows)
    mask = torch.stack([torch.arange(longest, device=r.device) < len(r) for r in rows])
    filled = rows[0].new_zeros((len(rows), longest, *rows[0].shape[1:]))
    for place, r in zip(filled, rows, strict=True):
        place[: len(r)] = r
    return filled, mask


def without_padding(x: Shaped[Tensor, "tasks n ..."], mask: Bool[Tensor, "tasks n"]) -> Shaped[Tensor, "tasks n ..."]:
    """Put zeros in the rows that are not real, whatever they hold, NaN even.

    Parameters
    ----------
    x : rows, or anything with an entry a row
    mask : those that are real
    """
    return torch.where(mask.view(*mask.shape, *[1] * (x.dim() - 2)), x, x.new_zeros(()))


def group_by_size(sizes: Sequence[int], overhead: float, most: int = 1 << 30) -> list[list[int]]:
    """Divide tasks into groups that are computed together, each padded to its largest, at the least cost.

    The cost of a group is ``overhead + largest * members`` rows: for small networks it pays to batch, for large ones to
    leave nothing padded. Sorted by size, the best division is one into consecutive runs, found by dynamic programming.

    Parameters
    ----------
    sizes : rows of each task
    overhead : what a group costs besides, in rows
    most : rows of a group at most (a larger single task is a group of its own)

    Returns
    -------
    Positions in `sizes`, group after group.

    Examples
    --------
    >>> group_by_size([5, 100, 6], overhead=10.0)
    [[0, 2], [1]]
    """
    order = sorted(range(len(sizes)), key=lambda k: (sizes[k], k))
    best, cut = [0.0], [0]
    for end in range(1, len(order) + 1):
        largest = sizes[order[end - 1]]
        options = [
            (best[start] + overhead + largest * (end - start), start)
            for start in range(end)
            if end - start == 1 or largest * (end - start) <= most
        ]
        value, start = min(options)
        best.append(value)
        cut.append(start)
    groups: list[list[int]] = []
    end = len(order)
    while end:
        groups.append(order[cut[end] : end])
        end = cut[end]
    return groups[::-1]
