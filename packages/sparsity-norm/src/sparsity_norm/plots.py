"""Every picture: predictions against the number of known inputs, comparisons with intervals, training histories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

import shared_core.plots as core
from shared_core.errors import InputError
from shared_core.plots import drawing, looks, save_figure
from shared_core.runs import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Curve", "plot_comparison", "plot_drift", "plot_history"]


@dataclass(frozen=True)
class Curve:
    """Mean of some values in bins of the observed count, with the half width of its 95 % interval."""

    count: Float[np.ndarray, " bins"]
    mean: Float[np.ndarray, " bins"]
    half_width: Float[np.ndarray, " bins"]


def plot_drift(
    path: str | Path,
    panels: Mapping[str, Mapping[str, Curve]],
    *,
    xlabel: str = "number of known inputs",
    ylabel: str = "mean of prediction minus truth",
    zero: bool = True,
) -> Path:
    """Draw how predictions drift with the number of known inputs, a panel a data set, a line a method.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    panels : data set -> method -> curve
    xlabel, ylabel : axis labels
    zero : draw the line of no drift

    Returns
    -------
    The path.
    """
    with drawing():
        figure = Figure(figsize=(4.8 * len(panels), 3.6), layout="constrained")
        axes = cast("Sequence[Axes]", figure.subplots(1, len(panels), squeeze=False)[0])
        for axis, (title, curves) in zip(axes, panels.items(), strict=True):
            if zero:
                axis.axhline(0, color="black", linewidth=1, linestyle="--", label="no drift")
            look = looks([*curves])
            for name, curve in curves.items():
                colour = look[name].colour
                axis.plot(curve.count, curve.mean, f"o{look[name].dash}", color=colour, markersize=3.5, label=name)
                low, high = curve.mean - curve.half_width, curve.mean + curve.half_width
                axis.fill_between(curve.count, low, high, color=colour, alpha=0.12, linewidth=0)
            axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
            if max((curve.count.max() / max(curve.count.min(), 1) for curve in curves.values()), default=1.0) > 30:
                axis.set_xscale("log")
            axis.legend()
        return save_figure(figure, path)


def plot_comparison(path: str | Path, results: Sequence[Result]) -> Path:
    """Draw every method's mean with its 95 % interval, best on top: a row for each data set, a column for each metric.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    results : rows of a run's summary

    Returns
    -------
    The path.
    """
    return core.plot_comparison(path, results, ours=lambda name: name.startswith(("sn", "autorec-sn")))


def plot_history(path: str | Path, lines: Sequence[Mapping[str, Any]]) -> Path:
    """Draw the numbers logged at each epoch.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    lines : one mapping an epoch, as in ``metrics.jsonl``

    Returns
    -------
    The path.
    """
    names = [key for key, value in (lines[-1] if lines else {}).items() if isinstance(value, float) and key != "epoch"]
    names = [name for name in names if name != "seconds"]
    if not names:
        raise InputError("nothing was logged that could be drawn")
    with drawing():
        figure = Figure(figsize=(5.2, 3.8), layout="constrained")
        axis = figure.subplots()
        look = looks(names)
        for name in names:
            points = [
                (line.get("epoch", place), line[name]) for place, line in enumerate(lines) if line.get(name) is not None
            ]
            axis.plot(*zip(*points, strict=True), color=look[name].colour, linestyle=look[name].dash, label=name)
        axis.set(xlabel="epoch")
        axis.legend()
        return save_figure(figure, path)
