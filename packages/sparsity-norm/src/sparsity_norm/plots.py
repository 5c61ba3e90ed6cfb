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

__all__ = ["Curve", "binned_curve", "plot_comparison", "plot_count_curves", "plot_history"]

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
    """Mean of some values in bins of the observed count, with a 95 % band of that mean."""

    count: Float[np.ndarray, " bins"]
    mean: Float[np.ndarray, " bins"]
    half_width: Float[np.ndarray, " bins"]


def binned_curve(
    count: Float[np.ndarray, " instances"], values: Float[np.ndarray, " instances"], bins: int = 10
) -> Curve:
    """Average `values` in bins of equal size along `count`; ties of the count stay together.

    Parameters
    ----------
    count : (instances,) observed entries of each instance
    values : (instances,) predictions, or the truth
    bins : bins of about equal size; fewer come out when counts repeat

    Examples
    --------
    >>> curve = binned_curve(np.array([1.0, 1, 4, 4]), np.array([0.0, 2, 5, 5]), bins=2)
    >>> curve.count.tolist(), curve.mean.tolist()
    ([1.0, 4.0], [1.0, 5.0])
    """
    if len(count) == 0:
        raise InputError("no instances to draw a curve of")
    edges = np.unique(np.quantile(count, np.linspace(0, 1, bins + 1)))
    code = np.searchsorted(edges[1:-1], count, side="right")
    size = np.bincount(code)
    kept = size > 0

    def average(numbers: np.ndarray) -> np.ndarray:
        return (np.bincount(code, numbers) / np.maximum(size, 1))[kept]

    mean = average(values)
    variance = average(values**2) - mean**2
    return Curve(average(count), mean, 1.96 * np.sqrt(np.maximum(variance, 0) / size[kept]))


def plot_count_curves(
    path: str | Path,
    panels: Mapping[str, Mapping[str, Curve]],
    *,
    xlabel: str = "number of known inputs",
    ylabel: str = "mean prediction",
    truth: str = "truth",
) -> None:
    """Draw predictions against the number of known inputs, a panel a data set, a line a method.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    panels : data set -> method -> curve; the method named `truth` is drawn in black
    xlabel, ylabel : axis labels
    truth : name of the curve of the true values
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(5.2 * len(panels), 3.8), layout="constrained")
        axes = cast("Sequence[Axes]", figure.subplots(1, len(panels), squeeze=False)[0])
        for axis, (title, curves) in zip(axes, panels.items(), strict=True):
            methods = [name for name in curves if name != truth]
            for name, colour in zip(methods, _COLOURS * len(methods), strict=False):
                curve = curves[name]
                axis.plot(curve.count, curve.mean, "o-", color=colour, markersize=3.5, label=name)
                axis.fill_between(
                    curve.count, curve.mean - curve.half_width, curve.mean + curve.half_width, color=colour, alpha=0.15
                )
            if truth in curves:
                curve = curves[truth]
                axis.plot(curve.count, curve.mean, "s--", color="black", markersize=3.5, label=truth)
            axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
            widest = max((curve.count.max() / max(curve.count.min(), 1) for curve in curves.values()), default=1.0)
            if widest > 30:
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
        columns = min(len(groups), 3)
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
