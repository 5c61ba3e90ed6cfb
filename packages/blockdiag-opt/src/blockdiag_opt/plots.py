"""Every picture: training curves, grids of learning rates, comparisons, quality against price, spectra of layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

import shared_core.plots as core
from shared_core.errors import InputError
from shared_core.plots import COLOURS, drawing, legend_outside, looks, plain_log, save_figure
from shared_core.runs import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import XAxis, YAxis

__all__ = [
    "Curve",
    "plot_comparison",
    "plot_curves",
    "plot_grids",
    "plot_history",
    "plot_monitor",
    "plot_pareto",
    "plot_spectrum",
]

_OURS = ("block-", "adablock", "radablock")
# Neither better nor worse.
_TABLE_ONLY = ("best learning rate", "diverged runs")


@dataclass(frozen=True)
class Curve:
    """Training losses of one optimizer, a row a seed.

    Parameters
    ----------
    steps : (points,) training steps done
    loss : (seeds, points) mean training loss of the steps since the point before
    seconds : (seeds, points) wall time of training so far
    """

    steps: Float[np.ndarray, " points"]
    loss: Float[np.ndarray, "seeds points"]
    seconds: Float[np.ndarray, "seeds points"]


def _width(name: str) -> float:
    return 2.2 if name.startswith(_OURS) else 1.3


def _names(panels: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for panel in panels.values() for name in panel))


def _number(axis: XAxis | YAxis) -> None:
    """Label a logarithmic axis of little range with plain numbers: powers of ten would be few or none."""
    low, high = axis.get_view_interval()
    if high < 100 * low:
        plain_log(axis, float(low), float(high))


def _smooth(values: Float[np.ndarray, "seeds points"], points: int) -> Float[np.ndarray, "seeds points"]:
    """Average over neighbouring points, fewer at the ends."""
    if values.shape[1] < 4 * points:
        return values
    kernel = np.ones(points)
    weight = np.convolve(np.ones(values.shape[1]), kernel, mode="same")
    return np.stack([np.convolve(row, kernel, mode="same") / weight for row in values])


def plot_curves(
    path: str | Path,
    panels: Mapping[str, Mapping[str, Curve]],
    *,
    ylabel: str = "training loss",
    log_y: bool = True,
    smooth: int = 5,
) -> Path:
    """Draw loss against steps and against seconds, a row a task, a line an optimizer: median and range over seeds.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    panels : task -> optimizer -> curve
    ylabel : axis label
    log_y : logarithmic losses
    smooth : average over that many neighbouring points of a curve

    Returns
    -------
    The path.
    """
    if not any(panels.values()):
        raise InputError("there is no training curve to draw")
    look = looks(_names(panels))
    with drawing():
        figure = Figure(figsize=(9.6, 3.4 * len(panels) + 0.5), layout="constrained")
        grid = figure.subplots(len(panels), 2, squeeze=False, sharey="row")
        for (left, right), (title, curves) in zip(grid, panels.items(), strict=True):
            for name, curve in curves.items():
                colour, _, line = look[name]
                loss = _smooth(curve.loss, smooth)
                middle = np.median(loss, axis=0)
                style: Any = {"color": colour, "linestyle": line, "linewidth": _width(name), "label": name}
                for axis, x in ((left, curve.steps), (right, np.median(curve.seconds, axis=0))):
                    axis.plot(x, middle, **style)
                    low, high = loss.min(axis=0), loss.max(axis=0)
                    axis.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)
            left.set(title=title, xlabel="step", ylabel=ylabel)
            right.set(title=title, xlabel="seconds")
            if log_y and all((curve.loss > 0).all() for curve in curves.values()):
                left.set_yscale("log")
            _show_both_ends(left, curves)
            for axis in (left, right):
                axis.grid(alpha=0.3)
                axis.set_xlim(left=0)
        legend_outside(figure, list(grid.ravel()), below=True)
        return save_figure(figure, path)


def _show_both_ends(axis: Axes, curves: Mapping[str, Curve]) -> None:
    """Cut off spikes above the starting losses: what matters lies below them."""
    bottom = min(float(curve.loss.min()) for curve in curves.values())
    top = max(float(np.median(curve.loss[:, 0])) for curve in curves.values())
    if axis.get_yscale() == "log":
        axis.set_ylim(bottom / 1.1, top * 1.15)
        _number(axis.yaxis)
    else:
        axis.set_ylim(bottom - 0.05 * (top - bottom), top + 0.1 * (top - bottom))


def plot_grids(path: str | Path, panels: Mapping[str, Mapping[str, Mapping[float, float | None]]]) -> Path:
    """Draw what was reached at each learning rate, the best one marked; a panel a task, a line an optimizer.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    panels : task -> optimizer -> learning rate -> loss, None where training diverged

    Returns
    -------
    The path.
    """
    if not any(panels.values()):
        raise InputError("there is no grid of learning rates to draw")
    look = looks(_names(panels))
    with drawing():
        columns = min(len(panels), 3)
        lines = -(-len(panels) // columns)
        figure = Figure(figsize=(max(5.0 * columns, 6.4), 3.6 * lines + 0.7), layout="constrained")
        axes = cast("Sequence[Axes]", figure.subplots(lines, columns, squeeze=False).ravel())
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        for axis, (title, grids) in zip(axes, panels.items(), strict=False):
            for name, grid in grids.items():
                colour, marker, line = look[name]
                points = sorted((lr, value) for lr, value in grid.items() if value is not None)
                if not points:
                    continue
                x, y = (list(side) for side in zip(*points, strict=True))
                axis.plot(x, y, marker=marker, linestyle=line, color=colour, markersize=4, label=name)
                best = int(np.argmin(y))
                axis.plot(x[best], y[best], "*", color=colour, markersize=14, markeredgecolor="black")
            axis.set(title=title, xlabel="learning rate", ylabel="tuning loss", xscale="log")
            if all(value is None or value > 0 for grid in grids.values() for value in grid.values()):
                axis.set_yscale("log")
                _number(axis.yaxis)
            axis.grid(alpha=0.3)
        legend_outside(figure, axes[: len(panels)], below=True)
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
    return core.plot_comparison(path, results, ours=lambda name: name.startswith(_OURS), leave_out=_TABLE_ONLY)


def plot_pareto(
    path: str | Path,
    points: Mapping[str, tuple[float, float]],
    *,
    xlabel: str = "optimizer, ms per step",
    ylabel: str = "training loss",
    title: str = "",
) -> Path:
    """Draw loss against price, a labelled point a setting; settings that no other beats in both are joined.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    points : setting -> (milliseconds, loss)
    xlabel, ylabel, title : texts

    Returns
    -------
    The path.
    """
    if not points:
        raise InputError("there is no setting to draw")
    front = sorted(
        xy
        for xy in points.values()
        if not any(other != xy and other[0] <= xy[0] and other[1] <= xy[1] for other in points.values())
    )
    with drawing():
        figure = Figure(figsize=(7.4, 4.8), layout="constrained")
        axis = figure.subplots()
        axis.step(*zip(*front, strict=True), where="post", color="#bbbbbb", linewidth=1.2, zorder=1)
        for name, (x, y) in points.items():
            colour = COLOURS[1] if name.startswith((*_OURS, "b=")) else COLOURS[0]
            axis.plot(x, y, "o", color=colour, markersize=6, zorder=2)
        axis.set(xlabel=xlabel, ylabel=ylabel, title=title, xscale="log")
        axis.margins(x=0.12, y=0.12)
        if all(y > 0 for _, y in points.values()):
            axis.set_yscale("log")
            _number(axis.yaxis)
        _number(axis.xaxis)
        axis.grid(alpha=0.3, which="both")
        _place_labels(figure, axis, points)
        return save_figure(figure, path)


def _place_labels(figure: Figure, axis: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Put each label at the first place round its point that covers no other label and no point."""
    figure.canvas.draw_idle()
    figure.draw_without_rendering()
    pixels = {name: axis.transData.transform(xy) for name, xy in points.items()}
    frame = axis.get_window_extent()
    taken = [(float(x) - 5, float(y) - 5, float(x) + 5, float(y) + 5) for x, y in pixels.values()]
    around = [
        (8, 0, "left", "center"),
        (-8, 0, "right", "center"),
        (0, 9, "center", "bottom"),
        (0, -9, "center", "top"),
    ]
    around += [(x, y, "left" if x > 0 else "right", "center") for y in (14, -14, 26, -26, 40, -40) for x in (12, -12)]
    for name in sorted(points, key=lambda name: points[name]):
        best: tuple[int, int, Any] | None = None
        for order, (dx, dy, across, along) in enumerate(around):
            label = axis.annotate(
                name.removeprefix("block-adam:"),
                points[name],
                xytext=(dx * 0.72, dy * 0.72),
                textcoords="offset points",
                ha=across,
                va=along,
                fontsize="small",
                path_effects=[withStroke(linewidth=3, foreground="white")],
            )
            box = label.get_window_extent()
            overlaps = sum(
                box.x0 < right and left < box.x1 and box.y0 < top and bottom < box.y1
                for left, bottom, right, top in taken
            )
            overlaps += 3 * (box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1)
            if best is None or overlaps < best[0]:
                if best is not None:
                    best[2].remove()
                best = overlaps, order, label
            else:
                label.remove()
            if not best[0]:
                break
        assert best is not None
        box = best[2].get_window_extent()
        taken.append((box.x0, box.y0, box.x1, box.y1))


def plot_monitor(path: str | Path, records: Mapping[str, Sequence[Mapping[str, Any]]]) -> Path:
    """Draw what a monitor saw of each layer: how ill-conditioned its blocks are, and how far from diagonal.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    records : layer -> records with the keys ``step``, ``condition`` (of the blocks), ``off_diagonal`` (share of a
        block's norm, 0..1), ``oscillation`` (change of the preconditioner) and ``low`` and ``high`` (range of effective
        learning rates); None where a quantity does not exist

    Returns
    -------
    The path.
    """
    if not any(records.values()):
        raise InputError("the monitor has recorded nothing; record at least one step before drawing")
    look = looks(list(records))
    with drawing():
        figure = Figure(figsize=(9.6, 6.4), layout="constrained")
        axes = cast("Sequence[Axes]", figure.subplots(2, 2, sharex=True).ravel())
        titles = {
            "condition": "condition number of the blocks",
            "off_diagonal": "off-diagonal share of a block's norm",
            "oscillation": "change of the preconditioner",
        }
        for axis, (key, title) in zip(axes, titles.items(), strict=False):
            for name, lines in records.items():
                colour, _, line = look[name]
                x, y = _series(lines, key)
                axis.plot(x, y, color=colour, linestyle=line, label=name, marker="o" if len(x) == 1 else "")
            axis.set(title=title)
            if key != "off_diagonal" and _positive(records, key):
                axis.set_yscale("log")
        axes[1].set_ylim(0, 1)
        for name, lines in records.items():
            colour, _, _ = look[name]
            x, low = _series(lines, "low")
            _, high = _series(lines, "high")
            if len(low) == len(high):
                axes[3].fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)
                axes[3].plot(x, low, color=colour, linewidth=0.9)
                axes[3].plot(x, high, color=colour, linewidth=0.9)
        axes[3].set(title="range of effective learning rates")
        if _positive(records, "low") and _positive(records, "high"):
            axes[3].set_yscale("log")
        for axis in axes:
            axis.grid(alpha=0.3)
        for axis in axes[2:]:
            axis.set_xlabel("step")
        legend_outside(figure, axes, below=True)
        return save_figure(figure, path)


def _series(lines: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    points = [(float(line["step"]), float(line[key])) for line in lines if line.get(key) is not None]
    points = [point for point in points if math.isfinite(point[1])]
    return [x for x, _ in points], [y for _, y in points]


def _positive(records: Mapping[str, Sequence[Mapping[str, Any]]], key: str) -> bool:
    values = [value for lines in records.values() for value in _series(lines, key)[1]]
    return bool(values) and min(values) > 0


def plot_history(path: str | Path, history: Sequence[Mapping[str, float | int]]) -> Path:
    """Draw the training loss and the learning rate of each epoch.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    history : a dict an epoch with ``epoch``, ``loss`` and ``learning_rate``

    Returns
    -------
    The path.
    """
    if not history:
        raise InputError("the training has no epoch to draw")
    epochs = [line["epoch"] for line in history]
    with drawing():
        figure = Figure(figsize=(7.4, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        for axis, key, label in ((left, "loss", "training loss"), (right, "learning_rate", "learning rate")):
            values = [line[key] for line in history]
            axis.plot(epochs, values, marker="." if len(epochs) < 30 else "", color=COLOURS[0])
            axis.set(xlabel="epoch", ylabel=label)
            axis.grid(alpha=0.3)
        if min(line["loss"] for line in history) > 0:
            left.set_yscale("log")
        return save_figure(figure, path)


def plot_spectrum(
    path: str | Path,
    spectra: Mapping[str, Float[np.ndarray, "blocks size"]],
    *,
    off_diagonal: Mapping[str, float] | None = None,
) -> Path:
    """Draw how the eigenvalues of each layer's second-moment blocks are distributed, relative to each block's largest.

    A layer whose line falls far has blocks that are worth more than their diagonal.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    spectra : layer -> (blocks, size) eigenvalues, in any order
    off_diagonal : layer -> share of the norm off the diagonal, written into the legend

    Returns
    -------
    The path.
    """
    if not spectra:
        raise InputError("there is no layer with blocks to draw; the state holds diagonal second moments only")
    look = looks(list(spectra))
    with drawing():
        figure = Figure(figsize=(7.4, 4.6), layout="constrained")
        axis = figure.subplots()
        for name, eigenvalues in spectra.items():
            colour, marker, line = look[name]
            ordered = np.sort(eigenvalues, axis=1)[:, ::-1]
            largest = ordered[:, :1]
            relative = np.maximum(ordered[largest[:, 0] > 0] / largest[largest[:, 0] > 0], 1e-12)
            if not len(relative):
                continue
            low, middle, high = np.quantile(relative, [0.1, 0.5, 0.9], axis=0)
            rank = np.arange(1, relative.shape[1] + 1)
            share = (
                "" if off_diagonal is None or name not in off_diagonal else f" (off-diagonal {off_diagonal[name]:.0%})"
            )
            axis.plot(rank, middle, color=colour, marker=marker, linestyle=line, markersize=4, label=name + share)
            axis.fill_between(rank, low, high, color=colour, alpha=0.13, linewidth=0)
        axis.set(
            xlabel="eigenvalue, by rank in its block",
            ylabel="relative to the block's largest\n(median, 10 to 90 % of blocks)",
            yscale="log",
        )
        if max(np.shape(values)[1] for values in spectra.values()) <= 16:
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        legend_outside(figure, [axis], below=True)
        return save_figure(figure, path)
