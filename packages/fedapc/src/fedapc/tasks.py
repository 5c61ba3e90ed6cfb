"""What a client has to learn: examples that it has while a task runs, and others that it is judged by."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Int64, Shaped
from torch import Tensor

from fedapc.errors import TaskError

__all__ = ["Task"]


@dataclass(frozen=True, eq=False)
class Task:
    """Examples that a client has while a task runs.

    Parameters
    ----------
    x : inputs, ``(examples, ...)``
    y : classes 0..classes-1, ``(examples,)``
    classes : of the task
    validation : inputs and classes that the learning rate is lowered by. Default: none, it stays
    test : inputs and classes that the task is judged by, never trained on. Default: none
    name : for people

    Raises
    ------
    TaskError
        For no examples, fewer than two classes, or labels that are none.

    Examples
    --------
    >>> import torch
    >>> Task(torch.rand(6, 8), torch.arange(6) % 3, classes=3, name="wards").classes
    3
    """

    x: Shaped[Tensor, "examples ..."]
    y: Int64[Tensor, " examples"]
    classes: int
    validation: tuple[Shaped[Tensor, "held ..."], Int64[Tensor, " held"]] | None = None
    test: tuple[Shaped[Tensor, "unseen ..."], Int64[Tensor, " unseen"]] | None = None
    name: str = ""

    def __post_init__(self) -> None:
        held = [(what, part) for what, part in (("validation", self.validation), ("test", self.test)) if part]
        where = f"task '{self.name}', " if self.name else ""
        for what, (x, y) in (("training", (self.x, self.y)), *held):
            if len(x) != len(y) or not len(y):
                raise TaskError(
                    f"{where}{what}: {len(x)} inputs and {len(y)} labels; give as many of both, at least one"
                )
            odd = sorted({int(label) for label in y.unique() if not 0 <= int(label) < self.classes})
            if odd:
                raise TaskError(f"{where}{what}: labels {odd} are not among 0..{self.classes - 1}")
        if self.classes < 2 or len(self.y.unique()) < 2:
            raise TaskError(f"{where}{len(self.y.unique())} of {self.classes} classes have examples; a task needs two")
