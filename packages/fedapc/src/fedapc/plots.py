"""Every picture: comparisons, accuracy against bytes, what is remembered, who listens to whom, the ledger.

Each function writes one file, whose ending says what kind (PNG, SVG, PDF), and returns its path; the same arguments
give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from jaxtyping import Float64
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fedapc.ledger import Ledger
from fedapc.report import Report
from shared_core.errors import InputError
from shared_core.plots import COLOURS, MARKERS, drawing, save_figure
from shared_core.plots import plot_comparison as _plot_comparison
from shared_core.runs import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_attention", "plot_bytes", "plot_comparison", "plot_ledger", "plot_matrix", "plot_memory"]

_OURS = "fedapc"
_MOST_SHOWN = 12


def plot_comparison(path: str | Path, results: Sequence[Result]) -> Path:
    """Draw every method's mean with its 95 % interval, best on top; see :func:`shared_core.plots.plot_comparison`.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    results : rows of a run's summary; ``fedapc`` is highlighted

    Returns
    -------
    The path.
    """
    return _plot_comparison(path, results, ours=lambda name: name == _OURS)


def plot_bytes(path: str | Path, points: Mapping[str, tuple[float, float, float, float]]) -> Path:
    """Draw accuracy against what was sent: up on the left, down on the right.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    points : by method, its accuracy in 0..1, its forgetting, megabytes up and down; methods that send nothing are
        lines across

    Returns
    -------
    The path.
    """
    if not points:
        raise InputError("there is no method to draw")
    with drawing():
        figure = Figure(figsize=(9.4, 4.0), layout="constrained")
        axes = cast("Sequence[Axes]", figure.subplots(1, 2, sharey=True))
        for axis, place, word in zip(axes, (2, 3), ("up", "down"), strict=True):
            sending = {name: point for name, point in points.items() if point[place] > 0}
            widest = max((point[place] for point in sending.values()), default=1.0)
            for number, (name, point) in enumerate(points.items()):
                colour = COLOURS[number % len(COLOURS)]
                if name in sending:
                    axis.plot(
                        point[place], point[0], MARKERS[number % len(MARKERS)], color=colour, markersize=8, label=name
                    )
                else:
                    axis.axhline(point[0], color=colour, linestyle="--", linewidth=1.2, label=f"{name} (sends nothing)")
            axis.set_xlim(0, 1.1 * widest)
            axis.set_xlabel(f"megabytes {word}, all clients, whole run")
            axis.grid(alpha=0.3)
        axes[0].set_ylabel("accuracy on all tasks at the end")
        axes[0].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", fontsize="small")
        return save_figure(figure, path)


def plot_matrix(path: str | Path, report: Report) -> Path:
    """Draw each client's accuracies: a row for every task finished, a column for every task tested.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    report : of a run; the first 12 clients are drawn

    Returns
    -------
    The path.
    """
    clients = report.clients[:_MOST_SHOWN]
    columns = min(4, len(clients))
    lines = -(-len(clients) // columns)
    most = report.matrix.shape[1]
    known = report.matrix[~np.isnan(report.matrix)]
    low = float(known.min()) if known.size else 0.0
    with drawing():
        side = max(2.1, 0.52 * most + 0.9)
        figure = Figure(figsize=(side * columns + 1.0, side * lines + 0.5), layout="constrained")
        axes = cast("Sequence[Axes]", figure.subplots(lines, columns, squeeze=False).ravel())
        image: Any = None
        for axis, client in zip(axes, clients, strict=False):
            values = report.of_client(client)
            image = axis.imshow(values, vmin=low, vmax=1.0, cmap="viridis")
            _write_in(axis, values, low)
            axis.set_title(client)
            _numbered(axis, len(values))
        for axis in axes[len(clients) :]:
            axis.set_axis_off()
        figure.supxlabel("tested on task", fontsize="medium")
        figure.supylabel("after task", fontsize="medium")
        figure.colorbar(image, ax=list(axes), label="accuracy", shrink=0.8, format=PercentFormatter(1.0, decimals=0))
        return save_figure(figure, path)


def _write_in(axis: Axes, values: Float64[np.ndarray, "rows columns"], low: float) -> None:
    if len(values) > 10:
        return
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            light = (value - low) / max(1.0 - low, 1e-9) > 0.55
            axis.text(
                column, row, f"{100 * value:.0f}", ha="center", va="center", color="black" if light else "white",
                fontsize="small",
            )  # fmt: skip


def _numbered(axis: Axes, count: int) -> None:
    ticks = range(count) if count <= 12 else range(0, count, -(-count // 10))
    axis.set_xticks(ticks, [str(tick + 1) for tick in ticks])
    axis.set_yticks(ticks, [str(tick + 1) for tick in ticks])
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)


def plot_memory(path: str | Path, matrices: Mapping[str, Float64[np.ndarray, "clients tasks tasks"]]) -> Path:
    """Draw what is remembered: mean accuracy on each task, from when it was learnt to the end, a panel for each method.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    matrices : by method, accuracies as in `Report.matrix`

    Returns
    -------
    The path.
    """
    if not matrices:
        raise InputError("there is no method to draw")
    with drawing():
        lines = -(-len(matrices) // 5)
        columns = -(-len(matrices) // lines)
        figure = Figure(figsize=(2.7 * columns + 0.8, 2.5 * lines + 0.6), layout="constrained")
        axes = cast("Sequence[Axes]", figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).ravel())
        for axis, (name, matrix) in zip(axes, matrices.items(), strict=False):
            for task in range(matrix.shape[1]):
                column = matrix[:, :, task]
                there = ~np.isnan(column).all(0)
                if there.any():
                    mean = np.nanmean(column[:, there], 0)
                    axis.plot(
                        np.flatnonzero(there) + 1, mean, marker=MARKERS[task % len(MARKERS)], markersize=4,
                        color=COLOURS[task % len(COLOURS)], label=f"task {task + 1}",
                    )  # fmt: skip
            axis.set_title(name, fontweight="bold" if name == _OURS else "normal")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axis.grid(alpha=0.3)
        for axis in axes[len(matrices) :]:
            axis.set_axis_off()
        figure.supxlabel("tasks finished", fontsize="medium")
        figure.supylabel("accuracy", fontsize="medium")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles[:_MOST_SHOWN], labels[:_MOST_SHOWN], loc="outside right upper", fontsize="small")
        return save_figure(figure, path)


def plot_attention(path: str | Path, report: Report, task: int | None = None) -> Path:
    """Draw what the parts of others weigh: a row for each client, a column for each part, the mean over layers.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    report : of a run
    task : that attends. Default: the last one that received parts

    Returns
    -------
    The path.
    """
    tasks = sorted({number for (_, number), layers in report.attentions.items() if layers})
    if not tasks:
        raise InputError("no task received parts of others; there is no attention to draw")
    task = tasks[-1] if task is None else task
    if task not in tasks:
        raise InputError(f"task {task}: received no parts of others; those that did are {tasks}")
    rows = [client for client in report.clients if report.attentions.get((client, task))][:30]
    heard = {slot for client in rows for layer in report.attention(client, task).values() for slot in layer}
    slots = sorted(heard, key=lambda slot: (report.clients.index(slot[0]), slot[1]))[:30]
    values = np.full((len(rows), len(slots)), np.nan)
    for place, client in enumerate(rows):
        layers = report.attention(client, task)
        for column, slot in enumerate(slots):
            found = [layer[slot] for layer in layers.values() if slot in layer]
            values[place, column] = np.mean(found) if found else np.nan
    widest = max(float(np.nanmax(np.abs(values))), 1e-9)
    with drawing():
        figure = Figure(
            figsize=(max(4.4, 1.9 + 0.62 * len(slots)), max(2.6, 1.6 + 0.42 * len(rows))), layout="constrained"
        )
        axis = figure.subplots()
        axis.set_facecolor("#eeeeee")
        image = axis.imshow(values, cmap="PuOr", vmin=-widest, vmax=widest, aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            if not np.isnan(value) and len(rows) * len(slots) <= 150:
                dark = abs(value) > 0.6 * widest
                axis.text(
                    column, row, f"{value:.2f}", ha="center", va="center", fontsize="small",
                    color="white" if dark else "black",
                )  # fmt: skip
        axis.set_yticks(range(len(rows)), rows)
        axis.set_xticks(range(len(slots)), [f"{client}\ntask {number + 1}" for client, number in slots])
        axis.tick_params(length=0)
        axis.set_title(f"Who listens to whom in task {task + 1}")
        figure.colorbar(image, ax=axis, label="attention, mean over layers")
        return save_figure(figure, path)


def plot_ledger(path: str | Path, ledger: Ledger) -> Path:
    """Draw the bytes of every round by what they hold, up and down, and what went wrong.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    ledger : of a run

    Returns
    -------
    The path.
    """
    if not len(ledger):
        raise InputError("the ledger is empty: nothing was sent")
    rounds = sorted({entry.round for entry in ledger})
    kinds = ("base", "adaptive", "knowledge", "control")
    with drawing():
        figure = Figure(figsize=(9.0, 3.6), layout="constrained")
        axes = cast("Sequence[Axes]", figure.subplots(1, 2, sharex=True))
        for axis, direction in zip(axes, ("up", "down"), strict=True):
            sums = ledger.sums("round", "kind", direction=direction)
            below = np.zeros(len(rounds))
            for number, kind in enumerate(kinds):
                amounts = np.array([sums.get((round_, kind), 0) for round_ in rounds]) / 1e6
                if amounts.any():
                    axis.bar(rounds, amounts, bottom=below, color=COLOURS[number], width=0.85, label=kind)
                below += amounts
            odd = sorted({entry.round for entry in ledger.events() if entry.direction == direction})
            if odd:
                axis.plot(
                    odd, [0.0] * len(odd), "x", color="black", clip_on=False, zorder=5, label="something went wrong"
                )
            axis.set_title(f"{direction}: {below.sum():.2f} MB")
            axis.set_xlabel("round")
            axis.set_ylabel("megabytes")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.legend(fontsize="small")
        return save_figure(figure, path)
