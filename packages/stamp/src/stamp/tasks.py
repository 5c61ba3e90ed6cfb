"""Tasks for meta-training: some classes of a reference set, their examples seen through one transform (spec 2.7)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional

from stamp.examples import DataError, Examples

__all__ = ["Task", "TaskSampler", "jittered"]


@dataclass(frozen=True, eq=False)
class Task:
    """A classification problem, with examples to learn it from and others to judge it by.

    Parameters
    ----------
    support, support_y : examples of each class to learn from, classes numbered from 0
    query, query_y : other examples of the same classes
    classes : their numbers in the source
    source : which of the reference sets they are of
    """

    support: Float[Tensor, "support ..."]
    support_y: Int64[Tensor, " support"]
    query: Float[Tensor, "query ..."]
    query_y: Int64[Tensor, " query"]
    classes: tuple[int, ...]
    source: int

    @property
    def ways(self) -> int:
        """Number of classes."""
        return len(self.classes)


class TaskSampler:
    """Draws tasks, from all reference sets in turn.

    Parameters
    ----------
    reference : one or more sets of examples, of one shape
    ways : fewest and most classes of a task, where a set has as many
    shots, queries : examples of a class for each part; of a class with fewer, as many as there are, at least one each
    jitter : look at each task through a transform of its own, see `jittered`

    Raises
    ------
    DataError
        For a set with fewer than two classes of two examples, or numbers that make no task.

    Examples
    --------
    >>> data = Examples(torch.rand(40, 1, 8, 8), torch.arange(4).repeat(10), ("a", "b", "c", "d"))
    >>> task = TaskSampler([data], ways=(2, 3), shots=4).draw(1, torch.Generator().manual_seed(0))[0]
    >>> task.support.shape[0] == 4 * task.ways, task.query.shape[1:]
    (True, torch.Size([1, 8, 8]))
    """

    def __init__(
        self,
        reference: Sequence[Examples],
        *,
        ways: tuple[int, int] = (5, 20),
        shots: int = 4,
        queries: int = 4,
        jitter: bool = False,
    ) -> None:
        if not reference:
            raise DataError("reference: give at least one set of examples")
        if not 2 <= ways[0] <= ways[1]:
            raise DataError(f"ways: must be two numbers, 2 <= fewest <= most, got {ways}")
        if shots < 1 or queries < 1:
            raise DataError(f"shots and queries: must be at least 1, got {shots} and {queries}")
        self.reference = tuple(reference)
        self.ways, self.shots, self.queries, self.jitter = ways, shots, queries, jitter
        self._members: list[list[tuple[int, Tensor]]] = []
        for data in self.reference:
            labels = data.y.cpu()
            order = torch.argsort(labels, stable=True).split(
                torch.bincount(labels, minlength=data.num_classes).tolist()
            )
            usable = [(k, index) for k, index in enumerate(order) if len(index) > 1]
            if len(usable) < 2:
                raise DataError(f"{data.name}: {len(usable)} classes have two examples; meta-training needs at least 2")
            self._members.append(usable)

    def draw(self, number: int, generator: torch.Generator) -> list[Task]:
        """Draw tasks; with several reference sets, each step sees as many of them as it has tasks.

        Parameters
        ----------
        number : of tasks
        generator : of everything that is drawn
        """
        order: list[int] = []
        while len(order) < number:
            order += torch.randperm(len(self.reference), generator=generator).tolist()
        return [self._task(source, generator) for source in order[:number]]

    def stream(self, generator: torch.Generator) -> Iterator[Task]:
        """Draw tasks for ever.

        Parameters
        ----------
        generator : of everything that is drawn
        """
        while True:
            yield from self.draw(len(self.reference), generator)

    def _task(self, source: int, generator: torch.Generator) -> Task:
        data, members = self.reference[source], self._members[source]
        most = min(self.ways[1], len(members))
        ways = int(torch.randint(min(self.ways[0], most), most + 1, (1,), generator=generator))
        chosen = torch.randperm(len(members), generator=generator)[:ways].tolist()
        parts: tuple[list[Tensor], list[Tensor]] = ([], [])
        for place in chosen:
            index = members[place][1]
            index = index[torch.randperm(len(index), generator=generator)]
            support = min(self.shots, max(1, len(index) * self.shots // (self.shots + self.queries)))
            parts[0].append(index[:support])
            parts[1].append(index[support : support + self.queries])
        labels = [torch.repeat_interleave(torch.arange(ways), torch.tensor([len(i) for i in part])) for part in parts]
        sizes = [sum(len(i) for i in part) for part in parts]
        x = data.inputs(torch.cat([*parts[0], *parts[1]]).to(data.x.device))
        if self.jitter:
            x = jittered(x, generator)
        first, second = x.split(sizes)
        classes = tuple(members[place][0] for place in chosen)
        return Task(first, labels[0].to(x.device), second, labels[1].to(x.device), classes, source)


def jittered(x: Float[Tensor, "n ..."], generator: torch.Generator) -> Float[Tensor, "n ..."]:
    """Apply one random transform to a whole task: what differs between data sets, not between examples.

    Images are turned by up to half a radian, scaled by 0.7 to 1.3, and their contrast multiplied by 0.5 to 1.3, half of
    the time shifted by up to 0.2, and one time in five inverted about their extremes. Features are scaled and shifted.

    Parameters
    ----------
    x : images ``(n, channels, height, width)`` or features ``(n, features)``
    generator : of the transform
    """
    if x.dim() == 4:
        angle, scale = _uniform(-0.5, 0.5, generator), _uniform(0.7, 1.3, generator)
        # Positions run from -1 to 1 on both axes, also of images that are not square.
        shape = x.shape[2] / x.shape[3]
        cos, sin = math.cos(angle), math.sin(angle)
        turn = torch.tensor([[cos, -sin * shape, 0.0], [sin / shape, cos, 0.0]], dtype=x.dtype)
        grid = functional.affine_grid(
            (turn / scale).to(x.device).expand(len(x), 2, 3), list(x.shape), align_corners=False
        )
        x = functional.grid_sample(x, grid, padding_mode="border", align_corners=False)
        if _uniform(0.0, 1.0, generator) < 0.2:
            low, high = torch.aminmax(x)
            x = low + high - x
    contrast = _uniform(0.5, 1.3, generator)
    shift = _uniform(-0.2, 0.2, generator) if _uniform(0.0, 1.0, generator) < 0.5 else 0.0
    return contrast * x + shift


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))
