"""Every picture: comparisons, accuracy against bytes, what is remembered, who listens to whom, the ledger.

Each function writes one file, whose ending says what kind (PNG, SVG, PDF); the same arguments give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import matplotlib as mpl
import numpy as np
from jaxtyping import Float64
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, NullLocator, PercentFormatter

from fedapc.ledger import Ledger
from fedapc.report import Report
from shared_core.errors import InputError
from shared_core.runs import Result, atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_attention", "plot_bytes", "plot_comparison", "plot_ledger", "plot_matrix", "plot_memory"]

# Okabe and Ito's colours, which stay apart for readers who do not see all colours.
_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#5E3C99"]
_QUIET = "#555555"
_MARKERS = "osD^vPX<"
_STYLE: Any = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": "medium",
    "figure.constrained_layout.h_pad": 0.07,
    "figure.constrained_layout.w_pad": 0.07,
    "figure.dpi": 100,
    "font.size": 10,
    "legend.frameon": False,
    "savefig.dpi": 150,
    "svg.hashsalt": "fedapc",
}
_UNDATED: dict[str, Any] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
_OURS = "fedapc"
_MOST_SHOWN = 12


def plot_comparison(path: str | Path, results: Sequence[Result]) -> None:
    """Draw every method's mean with its 95 % interval, best on top: a column for each metric.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    results : rows of a run's summary; ``fedapc`` is highlighted
    """
    groups: dict[tuple[str, str], list[Result]] = {}
    for row in results:
        groups.setdefault((row.dataset, row.metric), []).append(row)
    if not groups:
        raise InputError("the run has no results to draw")
    columns = min(len(groups), 3)
    lines = -(-len(groups) // columns)
    tallest = max(map(len, groups.values()))
    longest = max(len(row.method) for row in results)
    with mpl.rc_context(_STYLE):
        size = ((2.9 + 0.075 * longest) * columns, (1.15 + 0.26 * tallest) * lines)
        figure = Figure(figsize=size, layout="constrained")
        axes = cast("Sequence[Axes]", figure.subplots(lines, columns, squeeze=False).ravel())
        several = len({data for data, _ in groups}) > 1
        for axis, ((data, _), rows) in zip(axes, groups.items(), strict=False):
            _compare(axis, rows, data if several else "")
        for axis in axes[len(groups) :]:
            axis.set_axis_off()
        if not several:
            figure.suptitle(results[0].dataset, fontsize="medium")
        _save(figure, path)


def _compare(axis: Axes, rows: Sequence[Result], title: str) -> None:
    better = rows[0].better
    ordered = sorted(rows, key=lambda row: row.mean, reverse=better == "lower")
    for place, row in enumerate(ordered):
        colour = _COLOURS[1] if row.method == _OURS else _COLOURS[0]
        if row.low is not None and row.high is not None:
            axis.plot(
                [row.low, row.high], [place, place], color=colour, linewidth=2.4, alpha=0.55, solid_capstyle="butt"
            )
        axis.plot(row.mean, place, "D" if row.method == _OURS else "o", color=colour, markersize=5.5)
    axis.set_yticks(range(len(ordered)), [row.method for row in ordered])
    for label, row in zip(axis.get_yticklabels(), ordered, strict=True):
        if row.method == _OURS:
            label.set_fontweight("bold")
    axis.xaxis.set_major_locator(MaxNLocator(5))
    unit = f" [{rows[0].unit}]" if rows[0].unit not in {"1", ""} else ""
    axis.set_title(title)
    axis.set_xlabel(f"{rows[0].metric}{unit} ({better} is better)")
    axis.set_ylim(-0.6, len(ordered) - 0.4)
    axis.grid(axis="x", alpha=0.3)


def plot_bytes(path: str | Path, points: Mapping[str, tuple[float, float, float, float]]) -> None:
    """Draw accuracy against what was sent: up on the left, down on the right.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    points : by method, its accuracy in 0..1, its forgetting, megabytes up and down; methods that send nothing are
        lines across
    """
    if not points:
        raise InputError("there is no method to draw")
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9.4, 4.0), layout="constrained")
        axes = cast("Sequence[Axes]", figure.subplots(1, 2, sharey=True))
        for axis, place, word in zip(axes, (2, 3), ("up", "down"), strict=True):
            sending = {name: point for name, point in points.items() if point[place] > 0}
            widest = max((point[place] for point in sending.values()), default=1.0)
            for number, (name, point) in enumerate(points.items()):
                colour = _COLOURS[number % len(_COLOURS)]
                if name in sending:
                    axis.plot(
                        point[place], point[0], _MARKERS[number % len(_MARKERS)], color=colour, markersize=8, label=name
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
        _save(figure, path)


def plot_matrix(path: str | Path, report: Report) -> None:
    """Draw each client's accuracies: a row for every task finished, a column for every task tested.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    report : of a run; the first 12 clients are drawn
    """
    clients = report.clients[:_MOST_SHOWN]
    columns = min(4, len(clients))
    lines = -(-len(clients) // columns)
    most = report.matrix.shape[1]
    known = report.matrix[~np.isnan(report.matrix)]
    low = float(known.min()) if known.size else 0.0
    with mpl.rc_context(_STYLE):
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
        _save(figure, path)


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


def plot_memory(path: str | Path, matrices: Mapping[str, Float64[np.ndarray, "clients tasks tasks"]]) -> None:
    """Draw what is remembered: mean accuracy on each task, from when it was learnt to the end, a panel for each method.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    matrices : by method, accuracies as in `Report.matrix`
    """
    if not matrices:
        raise InputError("there is no method to draw")
    with mpl.rc_context(_STYLE):
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
                        np.flatnonzero(there) + 1, mean, marker=_MARKERS[task % len(_MARKERS)], markersize=4,
                        color=_COLOURS[task % len(_COLOURS)], label=f"task {task + 1}",
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
        _save(figure, path)


def plot_attention(path: str | Path, report: Report, task: int | None = None) -> None:
    """Draw what the parts of others weigh: a row for each client, a column for each part, the mean over layers.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    report : of a run
    task : that attends. Default: the last one that received parts
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
    with mpl.rc_context(_STYLE):
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
        _save(figure, path)


def plot_ledger(path: str | Path, ledger: Ledger) -> None:
    """Draw the bytes of every round by what they hold, up and down, and what went wrong.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    ledger : of a run
    """
    if not len(ledger):
        raise InputError("the ledger is empty: nothing was sent")
    rounds = sorted({entry.round for entry in ledger})
    kinds = ("base", "adaptive", "knowledge", "control")
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9.0, 3.6), layout="constrained")
        axes = cast("Sequence[Axes]", figure.subplots(1, 2, sharex=True))
        for axis, direction in zip(axes, ("up", "down"), strict=True):
            sums = ledger.sums("round", "kind", direction=direction)
            below = np.zeros(len(rounds))
            for number, kind in enumerate(kinds):
                amounts = np.array([sums.get((round_, kind), 0) for round_ in rounds]) / 1e6
                if amounts.any():
                    axis.bar(rounds, amounts, bottom=below, color=_COLOURS[number], width=0.85, label=kind)
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
        _save(figure, path)


def plot_scale(path: str | Path, sizes: Sequence[int], series: Mapping[str, Sequence[float]]) -> None:
    """Draw how seconds, memory or bytes grow with the number of clients, on logarithmic axes.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    sizes : numbers of clients
    series : by name with its unit, a number a size
    """
    if not sizes or not series:
        raise InputError("there is nothing to draw")
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(3.4 * len(series), 3.2), layout="constrained")
        axes = cast("Sequence[Axes]", figure.subplots(1, len(series), squeeze=False).ravel())
        for axis, (name, values) in zip(axes, series.items(), strict=True):
            axis.plot(sizes, values, "o-", color=_COLOURS[0])
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.set_xticks(sizes, [str(size) for size in sizes])
            axis.xaxis.set_minor_locator(NullLocator())
            axis.yaxis.set_minor_formatter(NullFormatter())
            axis.set_xlabel("clients")
            axis.set_ylabel(name)
            axis.grid(alpha=0.3)
        _save(figure, path)


def _save(figure: Figure, path: str | Path) -> None:
    kind = Path(path).suffix.lower()
    if kind not in {".png", ".svg", ".pdf"}:
        raise InputError(f"{path}: pictures end in .png, .svg or .pdf")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=kind[1:], metadata=_UNDATED.get(kind))
