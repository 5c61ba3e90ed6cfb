"""Every picture: predictions against the number of known inputs, comparisons with intervals, training histories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from shared_core.errors import InputError
from shared_core.runs import Result, atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Curve", "plot_comparison", "plot_drift", "plot_history"]

# Okabe and Ito's colours, which stay apart for readers who do not see all colours.
_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#5E3C99"]
_STYLE: Any = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": "medium",
    "figure.dpi": 100,
    "font.size": 10,
    "legend.frameon": False,
    "savefig.dpi": 150,
    "svg.hashsalt": "sparsity-norm",
}


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
) -> None:
    """Draw how predictions drift with the number of known inputs, a panel a data set, a line a method.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    panels : data set -> method -> curve
    xlabel, ylabel : axis labels
    zero : draw the line of no drift
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(4.8 * len(panels), 3.6), layout="constrained")
        axes = cast("Sequence[Axes]", figure.subplots(1, len(panels), squeeze=False)[0])
        for axis, (title, curves) in zip(axes, panels.items(), strict=True):
            if zero:
                axis.axhline(0, color="black", linewidth=1, linestyle="--", label="no drift")
            for name, colour in zip(curves, _COLOURS * len(curves), strict=False):
                curve = curves[name]
                axis.plot(curve.count, curve.mean, "o-", color=colour, markersize=3.5, label=name)
                low, high = curve.mean - curve.half_width, curve.mean + curve.half_width
                axis.fill_between(curve.count, low, high, color=colour, alpha=0.12, linewidth=0)
            axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
            if max((curve.count.max() / max(curve.count.min(), 1) for curve in curves.values()), default=1.0) > 30:
                axis.set_xscale("log")
            axis.legend()
        _save(figure, path)


def plot_comparison(path: str | Path, results: Sequence[Result]) -> None:
    """Draw every method's mean with its 95 % interval, best on top, a panel for each data set and metric.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    results : rows of a run's summary
    """
    groups: dict[tuple[str, str], list[Result]] = {}
    for row in results:
        groups.setdefault((row.dataset, row.metric), []).append(row)
    if not groups:
        raise InputError("the run has no results to draw")
    with mpl.rc_context(_STYLE):
        columns = 2 if len(groups) in {2, 4} else min(len(groups), 3)
        lines = -(-len(groups) // columns)
        tallest = max(len(rows) for rows in groups.values())
        figure = Figure(figsize=(4.6 * columns, (1.1 + 0.3 * tallest) * lines), layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False).ravel()
        for axis in axes[len(groups) :]:
            axis.set_axis_off()
        for axis, ((dataset, metric), rows) in zip(axes, groups.items(), strict=False):
            ordered = sorted(rows, key=lambda row: row.mean, reverse=rows[0].better == "lower")
            for place, row in enumerate(ordered):
                colour = _COLOURS[1] if row.method.startswith(("sn", "autorec-sn")) else _COLOURS[0]
                if row.low is not None and row.high is not None:
                    axis.plot([row.low, row.high], [place, place], color=colour, linewidth=2, alpha=0.6)
                axis.plot(row.mean, place, "o", color=colour)
            axis.set_yticks(range(len(ordered)), [row.method for row in ordered])
            axis.set(title=dataset, xlabel=f"{metric} ({rows[0].better} is better)")
            axis.margins(y=0.1)
            axis.grid(axis="x", alpha=0.3)
        _save(figure, path)


def plot_history(path: str | Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Draw the numbers logged at each epoch.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    lines : one mapping an epoch, as in ``metrics.jsonl``
    """
    names = [key for key, value in (lines[-1] if lines else {}).items() if isinstance(value, float) and key != "epoch"]
    names = [name for name in names if name != "seconds"]
    if not names:
        raise InputError("nothing was logged that could be drawn")
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(5.2, 3.8), layout="constrained")
        axis = figure.subplots()
        for name, colour in zip(names, _COLOURS * len(names), strict=False):
            points = [
                (line.get("epoch", place), line[name]) for place, line in enumerate(lines) if line.get(name) is not None
            ]
            axis.plot(*zip(*points, strict=True), color=colour, label=name)
        axis.set(xlabel="epoch")
        axis.legend()
        _save(figure, path)


def _save(figure: Figure, path: str | Path) -> None:
    with atomic_path(path) as temporary:
        try:
            # No date in the file: the same run gives the same bytes.
            figure.savefig(temporary, metadata={"Date": None} if temporary.suffix in {".svg", ".pdf"} else {})
        except ValueError as error:
            raise InputError(f"{path}: cannot draw into this kind of file; use .png, .svg or .pdf") from error
