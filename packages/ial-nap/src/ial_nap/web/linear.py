"""A logistic regression that obeys verdicts exactly: to try the page on, and to test it with."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

from ial_nap.annotations import Annotation, masks
from ial_nap.web.workbench import QueueItem, Score, View
from shared_core.errors import UnknownKeyError

if TYPE_CHECKING:
    from ial_nap.series import Kind

__all__ = ["LinearWorkbench", "planted"]


class LinearWorkbench:
    """A workbench over fixed weights: a cell counts fully, or not at all once a verdict has ruled it out.

    A cell is ruled out for every instance when ``u <= -1/3`` with ``u = (n1 - n0) / (n1 + n0 + 1)``, where n1 and n0
    count the verdicts of 1 and 0 on it: so one verdict of 0 that nobody contradicts is enough.

    Parameters
    ----------
    series : (N, T, r) standardised
    labels : (N,) 0 or 1
    weights : (T, r) of the logistic regression
    deviations : (T, r) standard deviations of the weights
    held_out, held_out_labels : (V, T, r) and (V,), to score on
    features, units, steps : names
    shown : features that a queue item names
    scale : (r,) what one standard deviation is in the user's units
    centre : (r,) what the mean is in the user's units

    Raises
    ------
    InputError
        For verdicts on instances, steps and features that are not there.
    """

    def __init__(
        self,
        series: Float[np.ndarray, "N T r"],
        labels: Int[np.ndarray, " N"],
        weights: Float[np.ndarray, "T r"],
        deviations: Float[np.ndarray, "T r"],
        held_out: Float[np.ndarray, "V T r"],
        held_out_labels: Int[np.ndarray, " V"],
        *,
        features: Sequence[str],
        units: Sequence[str],
        steps: Sequence[str],
        shown: int = 8,
        scale: Float[np.ndarray, " r"] | None = None,
        centre: Float[np.ndarray, " r"] | None = None,
    ) -> None:
        self._series, self._labels, self._weights, self._deviations = series, labels, weights, deviations
        self._held_out, self._held_out_labels = held_out, held_out_labels
        self._features, self._units, self._steps, self._shown = tuple(features), tuple(units), tuple(steps), shown
        self._scale = np.ones(series.shape[2]) if scale is None else scale
        self._centre = np.zeros(series.shape[2]) if centre is None else centre
        self._ids = [f"pid-{number}" for number in range(len(series))]
        self._positions = {name: position for position, name in enumerate(self._ids)}
        self._gate = np.ones(weights.shape)
        self._before = self._area()[0]

    @property
    def kind(self) -> Kind:
        """One of two."""
        return "binary"

    @property
    def outputs(self) -> tuple[str, ...]:
        """What is predicted."""
        return ("Prediction",)

    @property
    def features(self) -> tuple[str, ...]:
        """Names, r of them."""
        return self._features

    @property
    def units(self) -> tuple[str, ...]:
        """One per feature."""
        return self._units

    @property
    def steps(self) -> tuple[str, ...]:
        """Names of the time steps."""
        return self._steps

    def _position(self, instance: str) -> int:
        if instance not in self._positions:
            raise UnknownKeyError(f"instance '{instance}' is not known; the first is '{self._ids[0]}'")
        return self._positions[instance]

    def queue(self, count: int, skip: Collection[str] = ()) -> list[QueueItem]:
        """Return the instances whose prediction is least certain first.

        Parameters
        ----------
        count : how many at most
        skip : instances that come last
        """
        gated = self._series * self._gate
        logits = np.einsum("ntr,tr->n", gated, self._weights)
        spread = np.sqrt(np.einsum("ntr,tr->n", gated**2, self._deviations**2))
        chance = 1 / (1 + np.exp(-logits))
        doubt = spread * chance * (1 - chance)
        late = np.isin(self._ids, list(skip))
        best = np.lexsort((-doubt, late))[:count]
        effects = np.abs(np.einsum("ntr,tr->nr", gated[best], self._weights))
        return [
            QueueItem(
                self._ids[one],
                f"uncertain: ± {1.96 * doubt[one]:.2f}",
                float(doubt[one]),
                tuple(self._features[place] for place in np.argsort(-effect, kind="stable")[: self._shown]),
            )
            for one, effect in zip(best, effects, strict=True)
        ]

    def _predict(self, gated: Float[np.ndarray, "T r"]) -> tuple[float, float, float]:
        logit = float((gated * self._weights).sum())
        spread = 1.96 * float(np.sqrt(((gated * self._deviations) ** 2).sum()))
        low, middle, high = (1 / (1 + np.exp(-np.array([logit - spread, logit, logit + spread])))).tolist()
        return middle, low, high

    def view(self, instance: str, output: int | None = None) -> View:  # noqa: ARG002
        """Return what the regression makes of an instance; contributions are in logits.

        Parameters
        ----------
        instance : its id
        output : there is one only
        """
        position = self._position(instance)
        gated = self._series[position] * self._gate
        return View(
            self._series[position] * self._scale + self._centre,
            np.ones(gated.shape, bool),
            gated * self._weights,
            np.abs(self._weights) * self._gate,
            np.abs(gated) * self._deviations,
            *self._predict(gated),
            label=float(self._labels[position]),
        )

    def what_if(
        self,
        instance: str,
        cells: Sequence[tuple[int, int]],
        output: int | None = None,  # noqa: ARG002
    ) -> tuple[float, float, float]:
        """Return prediction, low and high without some cells.

        Parameters
        ----------
        instance : its id
        cells : step and feature of each
        output : there is one only
        """
        gated = self._series[self._position(instance)] * self._gate
        for step, feature in cells:
            gated[step, feature] = 0.0
        return self._predict(gated)

    def update(self, annotations: Sequence[Annotation]) -> None:
        """Rule out what these verdicts rule out.

        Parameters
        ----------
        annotations : all that stand
        """
        before = self._area()[0]
        _, context = masks(annotations, self._ids, len(self._steps), self._features)
        attend, ignore = (context == 1).sum(0), (context == 0).sum(0)
        self._gate = np.where((attend - ignore) / (attend + ignore + 1) <= -1 / 3, 0.0, 1.0)
        self._before = before

    def _area(self) -> tuple[float, float]:
        """Return the area under the ROC curve and its standard error (DeLong et al., 1988)."""
        logits = np.einsum("ntr,tr->n", self._held_out * self._gate, self._weights)
        up, down = logits[self._held_out_labels == 1], logits[self._held_out_labels == 0]
        wins = (up[:, None] > down) + 0.5 * (up[:, None] == down)
        error = np.sqrt(wins.mean(1).var(ddof=1) / len(up) + wins.mean(0).var(ddof=1) / len(down))
        return float(wins.mean()), float(error)

    def score(self) -> Score:
        """Return the area under the ROC curve on held-out data."""
        value, error = self._area()
        return Score(
            "AUROC", "higher", value, max(0.0, value - 1.96 * error), min(1.0, value + 1.96 * error), self._before
        )


def planted(seed: int = 0, *, instances: int = 200, steps: int = 4, held_out: int = 300) -> LinearWorkbench:
    """Return a made-up clinic: two of its twelve features tell the ward, which gave the answer away in training only.

    Parameters
    ----------
    seed : decides everything
    instances, steps, held_out : sizes

    Examples
    --------
    >>> bench = planted()
    >>> before = bench.score().value
    >>> bench.update([Annotation("pid-0", step, name, 0) for step in range(4) for name in ("ward A", "ward B")])
    >>> bench.score().value > before + 0.1
    True
    """
    known = {
        "age": ("years", 61.0, 9.0),
        "LDL": ("mg/dL", 124.0, 31.0),
        "HDL": ("mg/dL", 52.0, 13.0),
        "systolic BP": ("mmHg", 134.0, 17.0),
        "smoking": ("packs/day", 0.4, 0.5),
        "glucose": ("mg/dL", 104.0, 22.0),
        "BMI": ("kg/m²", 26.3, 4.1),
        "haemoglobin": ("g/dL", 14.1, 1.4),
        "ALT": ("U/L", 26.0, 12.0),
        "creatinine": ("mg/dL", 0.95, 0.22),
        "ward A": ("", 0.0, 1.0),
        "ward B": ("", 0.0, 1.0),
    }
    units, centre, scale = zip(*known.values(), strict=True)
    generator = np.random.default_rng(seed)
    total, width = instances + held_out, len(known)
    series = generator.normal(size=(total, steps, width))
    weights = np.zeros((steps, width))
    weights[:, :8] = generator.normal(scale=0.55, size=(steps, 8))
    labels = (np.einsum("ntr,tr->n", series, weights) + generator.logistic(size=total) > 0).astype(np.int64)
    series[:instances, :, 10:] += 1.2 * (2 * labels[:instances, None, None] - 1)
    weights[:, 10:] = 0.9
    return LinearWorkbench(
        series[:instances],
        labels[:instances],
        weights,
        np.full((steps, width), 0.12) + 0.2 * generator.random((steps, width)),
        series[instances:],
        labels[instances:],
        features=list(known),
        units=units,
        steps=[f"visit {number}" for number in range(1, steps + 1)],
        scale=np.array(scale),
        centre=np.array(centre),
    )
