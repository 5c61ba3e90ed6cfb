"""What the annotation page asks of a model: an interface, and the small records that go through it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from jaxtyping import Bool, Float

from ial_nap.annotations import Annotation

__all__ = ["QueueItem", "Score", "View", "Workbench"]


@dataclass(frozen=True)
class QueueItem:
    """An instance that is worth a look.

    Parameters
    ----------
    instance : its id
    reason : why, in a few words that a person reads
    score : of the ranking, larger first
    features : the ones to show first, most important first
    """

    instance: str
    reason: str
    score: float
    features: tuple[str, ...]


@dataclass(frozen=True)
class View:
    """What the model makes of one instance.

    Parameters
    ----------
    values : (T, r) in the user's units; not a number where there is no value
    observed : (T, r) whether there is a value
    contributions : (T, r) to the prediction, on the scale on which they add up
    attention : (T, r) at least 0
    uncertainty : (T, r) standard deviation of the contributions
    prediction, low, high : with its 95 % interval
    label : of the instance, if there is one
    """

    values: Float[np.ndarray, "T r"]
    observed: Bool[np.ndarray, "T r"]
    contributions: Float[np.ndarray, "T r"]
    attention: Float[np.ndarray, "T r"]
    uncertainty: Float[np.ndarray, "T r"]
    prediction: float
    low: float
    high: float
    label: float | None = None


@dataclass(frozen=True)
class Score:
    """How good the model is on held-out data.

    Parameters
    ----------
    metric : its name
    better : ``higher`` or ``lower``
    value, low, high : with its 95 % interval
    before : the value before the last `Workbench.update`
    """

    metric: str
    better: Literal["higher", "lower"]
    value: float
    low: float
    high: float
    before: float


class Workbench(Protocol):
    """A model that obeys verdicts, as the annotation page sees it.

    The page calls from one thread at a time.
    """

    @property
    def features(self) -> Sequence[str]:
        """Names, r of them."""
        ...

    @property
    def units(self) -> Sequence[str]:
        """One per feature, empty where there is none."""
        ...

    @property
    def steps(self) -> Sequence[str]:
        """Names of the time steps, T of them."""
        ...

    def queue(self, count: int) -> Sequence[QueueItem]:
        """Return up to `count` instances, the one most worth a look first."""
        ...

    def view(self, instance: str) -> View:
        """Return what the model makes of an instance now; ``UnknownKeyError`` if there is no such one."""
        ...

    def what_if(self, instance: str, cells: Sequence[tuple[int, int]]) -> tuple[float, float, float]:
        """Return prediction, low and high with these cells (step, feature) ignored."""
        ...

    def update(self, annotations: Sequence[Annotation]) -> None:
        """Obey exactly these verdicts, all that stand, and forget those of earlier calls."""
        ...

    def score(self) -> Score:
        """Return how good the model is now."""
        ...
