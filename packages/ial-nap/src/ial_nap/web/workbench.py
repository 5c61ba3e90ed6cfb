"""What the annotation page asks of a model: an interface, and the small records that go through it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from jaxtyping import Bool, Float

from ial_nap.annotations import Annotation

if TYPE_CHECKING:
    from ial_nap.series import Kind

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
    label : of the instance, if there is one: 0 or 1, the place of a class, or a number
    output : the class or label that all this is about; 0 where there is one output
    chances : the prediction of every output; empty where there is one
    length : real steps of the instance, the first ones; None when all are
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
    output: int = 0
    chances: tuple[float, ...] = ()
    length: int | None = None


@dataclass(frozen=True)
class Score:
    """How good the model is on held-out data.

    Parameters
    ----------
    metric : its name
    better : ``higher`` or ``lower``
    value, low, high : with its 95 % interval
    before : the value before the last `Workbench.update`
    draws : the value on resampled instances, always the same resamples, so that differences are in pairs; empty where
        nothing was resampled
    """

    metric: str
    better: Literal["higher", "lower"]
    value: float
    low: float
    high: float
    before: float
    draws: tuple[float, ...] = ()

    def change(self, start: Score) -> tuple[float, float, float]:
        """Return how much better this is than a start, with its 95 % interval; above 0 is better, whatever the metric.

        Parameters
        ----------
        start : an earlier score of the same metric; without resamples in common, the interval is that of the value

        Examples
        --------
        >>> start = Score("MAE", "lower", 2.0, 1.0, 3.0, 2.0, (1.0, 3.0))
        >>> Score("MAE", "lower", 1.0, 0.5, 2.0, 2.0, (0.5, 2.5)).change(start)
        (1.0, 0.5, 0.5)
        """
        sign = 1.0 if self.better == "higher" else -1.0
        value = sign * (self.value - start.value)
        if self.draws and len(self.draws) == len(start.draws):
            gains = sign * (np.array(self.draws) - np.array(start.draws))
            gains = gains[np.isfinite(gains)]
            if len(gains):
                low, high = np.quantile(gains, [0.025, 0.975]).tolist()
                return value, low, high
        low, high = sorted(sign * (edge - start.value) for edge in (self.low, self.high))
        return value, low, high


class Workbench(Protocol):
    """A model that obeys verdicts, as the annotation page sees it.

    The page calls from one thread at a time, except `queue`, which may take long and runs beside the others: it answers
    for the model as it was when it was called.
    """

    @property
    def kind(self) -> Kind:
        """What is predicted."""
        ...

    @property
    def outputs(self) -> Sequence[str]:
        """Names of classes or labels; of a binary task or a regression, one name for what is predicted."""
        ...

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

    def queue(self, count: int, skip: Collection[str] = ()) -> Sequence[QueueItem]:
        """Return up to `count` instances, the one most worth a look first; those to skip come last."""
        ...

    def view(self, instance: str, output: int | None = None) -> View:
        """Return what the model makes of an instance now; ``UnknownKeyError`` if there is no such one.

        Without an output, of several classes it is about the likeliest one.
        """
        ...

    def what_if(
        self, instance: str, cells: Sequence[tuple[int, int]], output: int | None = None
    ) -> tuple[float, float, float]:
        """Return prediction, low and high with these cells (step, feature) ignored."""
        ...

    def update(self, annotations: Sequence[Annotation]) -> None:
        """Obey exactly these verdicts, all that stand, and forget those of earlier calls."""
        ...

    def score(self) -> Score:
        """Return how good the model is now."""
        ...
