"""Every picture: comparisons of methods, accuracy against bits, weights on grids, trainings, estimators' gains."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from torch import nn

import shared_core.plots as core
from shared_core.errors import InputError
from shared_core.plots import COLOURS, QUIET, Look, drawing, legend_outside, looks, save_figure
from shared_core.runs import Result, interval
from srq_dropbits.bits import Report
from srq_dropbits.diagnose import GainCurve
from srq_dropbits.quantizers import WeightQuantizer
from srq_dropbits.structure import float_weight, quantized_layers, weight_quantizer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "plot_bits",
    "plot_comparison",
    "plot_estimators",
    "plot_history",
    "plot_ladder",
    "plot_pareto",
    "plot_weights",
]

_BLUE, _ORANGE, _GREEN = COLOURS[:3]
_GREY = QUIET
_OURS = ("srq", "mcste", "mode-")
_FLOAT = "float32"
# Neither better nor worse, or of no use beside the others: they belong into the table.
_TABLE_ONLY = frozenset({"best learning rate", "seconds a training", "validation accuracy"})
_MOST_PANELS = 24


def _grid_of_axes(count: int, width: float, height: float, columns: int) -> tuple[Figure, Sequence[Axes]]:
    columns = min(count, columns)
    lines = -(-count // columns)
    figure = Figure(figsize=(max(width * columns, 5.4), height * lines), layout="constrained")
    axes = cast("Sequence[Axes]", figure.subplots(lines, columns, squeeze=False).ravel())
    for axis in axes[count:]:
        axis.set_axis_off()
    return figure, axes[:count]


# ---- methods


def plot_ladder(path: str | Path, results: Sequence[Result]) -> Path:
    """Draw the test accuracy of every method with its 95 % interval, a panel for each data set and bit-width.

    The float network is a line. Methods that fail far below the others are an arrow with their value at the left edge,
    so that the rest can be told apart.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    results : rows of a comparison, with the metric ``test accuracy`` in % and data sets such as ``digits 2/2``

    Returns
    -------
    The path.
    """
    panels: dict[str, list[Result]] = {}
    for row in results:
        if row.metric == "test accuracy":
            panels.setdefault(row.dataset, []).append(row)
    panels = {name: rows for name, rows in panels.items() if any(row.method != _FLOAT for row in rows)}
    if not panels:
        raise InputError("the run has no test accuracy of a quantized network to draw; run compare first")
    tallest = max(len(rows) for rows in panels.values())
    with drawing():
        columns = 2 if len(panels) in {2, 4} else 3
        figure, axes = _grid_of_axes(len(panels), 4.2, 1.3 + 0.26 * tallest, columns)
        named: list[str] = []
        for place, (axis, (name, rows)) in enumerate(zip(axes, panels.items(), strict=True)):
            _rungs(axis, rows)
            axis.set_title(f"{name} bits" if "/" in name else name)
            axis.set_xlabel("test accuracy, %" + (" (bits: weights/inputs)" if "/" in name else ""), fontsize="small")
            methods = [row.method for row in rows]
            if place % columns and methods == named:
                axis.tick_params(labelleft=False)
            named = methods
        legend_outside(figure, axes, below=True)
        return save_figure(figure, path)


def _rungs(axis: Axes, rows: Sequence[Result]) -> None:
    methods = [row for row in rows if row.method != _FLOAT]
    floats = [row for row in rows if row.method == _FLOAT]
    for row in floats:
        label = f"{_FLOAT} (line and band: mean and 95 % interval)" if row.low is not None else _FLOAT
        axis.axvline(row.mean, color=_GREY, linewidth=1.3, linestyle="--", label=label, zorder=1)
        if row.low is not None and row.high is not None:
            axis.axvspan(row.low, min(row.high, 100.0), color=_GREY, alpha=0.15, linewidth=0, zorder=0)
    left = _left_edge([row.mean for row in rows], [row.low for row in rows if row.low is not None])
    for place, row in enumerate(reversed(methods)):
        colour = _ORANGE if row.method.startswith(_OURS) else _BLUE
        if row.mean < left:
            axis.plot(left, place, "<", color=colour, markersize=6, clip_on=False)
            axis.annotate(f"{row.mean:.1f}", (left, place), (7, 0), textcoords="offset points", va="center", size=8)
            continue
        if row.low is not None and row.high is not None:
            ends = [max(row.low, left), min(row.high, 100.0)]
            axis.plot(ends, [place, place], color=colour, linewidth=2, alpha=0.5)
        axis.plot(row.mean, place, "o", color=colour, markersize=5)
    axis.plot([], [], "o", color=_ORANGE, label="semi-relaxed: mode forward, distribution backward")
    axis.plot([], [], "o", color=_BLUE, label="others")
    axis.set_yticks(range(len(methods)), [row.method for row in reversed(methods)])
    axis.set_xlim(left=left)
    axis.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axis.margins(y=0.08)
    axis.grid(axis="x", alpha=0.3)


def _left_edge(means: Sequence[float], lows: Sequence[float]) -> float:
    """Find where to cut the axis off: below what lies within a few times the range of the better half."""
    ordered = sorted(means, reverse=True)
    better = ordered[: len(ordered) // 2 + 1]
    reach = max(4 * (better[0] - better[-1]), 2.0)
    kept = [mean for mean in ordered if mean >= better[-1] - reach]
    kept += [low for low in lows if low >= better[-1] - reach]
    bottom, top = min(kept), max(kept)
    return max(bottom - 0.06 * (top - bottom) - 0.1, 0.0)


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


# ---- bits


def plot_pareto(
    path: str | Path,
    points: Mapping[str, Sequence[tuple[float | int, float | int, Mapping[str, int]]]],
    *,
    xlabel: str = "average bits of a weight",
    title: str = "",
) -> Path:
    """Draw accuracy against average bits: uniform bit-widths joined, learned ones as stars, with 95 % intervals.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    points : method -> a triple a seed: average bits, test accuracy 0..1, layer -> bits; ``Sweep.points``. Names that
        begin with ``uniform`` are joined
    xlabel, title : texts

    Returns
    -------
    The path.
    """
    points = {name: each for name, each in points.items() if each}
    if not points:
        raise InputError("the sweep has no point to draw")
    with drawing():
        figure = Figure(figsize=(7.6, 5.0), layout="constrained")
        axis = figure.subplots()
        uniform = sorted(_middle(each) for name, each in points.items() if name.startswith("uniform"))
        if uniform:
            axis.plot(*zip(*uniform, strict=True), color=_BLUE, linewidth=1.2, zorder=1)
        look = looks(["uniform" if name.startswith("uniform") else name for name in ["uniform", *points]])
        for name, each in points.items():
            joined = name.startswith("uniform")
            colour, marker = (_BLUE, "o") if joined else (look[name].colour, "*")
            x, y = _middle(each)
            axis.errorbar(
                x,
                y,
                xerr=_reach([bits for bits, _, _ in each], 8.0),
                yerr=_reach([100 * accuracy for _, accuracy, _ in each], 100.0),
                fmt=marker,
                color=colour,
                markersize=6 if joined else 13,
                markeredgecolor=colour if joined else "black",
                markeredgewidth=0.6,
                elinewidth=1.2,
                capsize=2,
                label="uniform: one bit-width for all layers" if joined else name,
                zorder=2 if joined else 3,
            )
            if joined:
                text = name.removeprefix("uniform").strip()
                outline = [withStroke(linewidth=3, foreground="white")]
                axis.annotate(text, (x, y), (6, -12), textcoords="offset points", size=9, path_effects=outline)
        axis.set(xlabel=xlabel, ylabel="test accuracy, %", title=title)
        axis.margins(x=0.08, y=0.1)
        axis.grid(alpha=0.3)
        legend_outside(figure, [axis], below=True)
        return save_figure(figure, path)


def _middle(each: Sequence[tuple[float | int, float | int, Mapping[str, int]]]) -> tuple[float, float]:
    return (
        math.fsum(bits for bits, _, _ in each) / len(each),
        100 * math.fsum(accuracy for _, accuracy, _ in each) / len(each),
    )


def _reach(values: Sequence[float | int], most: float) -> list[list[float]] | None:
    """Give how far the 95 % interval reaches down and up, within 0 .. `most`."""
    mean, low, high = interval([float(value) for value in values])
    if low is None or high is None:
        return None
    return [[mean - max(low, 0.0)], [max(min(high, most) - mean, 0.0)]]


def plot_bits(path: str | Path, report: Report) -> Path:
    """Draw the bits of each layer's weights and input, and the bytes that the weights take.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    report : what ``srq_dropbits.report`` returned

    Returns
    -------
    The path.
    """
    rows = [row for row in report.rows if row.weight_bits is not None or row.act_bits is not None]
    if not rows:
        raise InputError("the report has no quantized layer to draw")
    places = np.arange(len(rows))[::-1]
    with drawing():
        figure = Figure(figsize=(8.4, 1.6 + 0.32 * len(rows)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
        for place, row in zip(places, rows, strict=True):
            if row.weight_bits is not None:
                left.barh(place, row.weight_bits, height=0.6, color=_BLUE, label="bits of a weight")
                name = "pruned" if row.weight_bits == 0 else f"{row.weight_bits}"
                left.annotate(name, (row.weight_bits, place), (4, 0), textcoords="offset points", va="center", size=9)
            if row.act_bits is not None:
                left.plot(row.act_bits, place, "D", color=_ORANGE, markersize=5, label="bits of its input", zorder=3)
            if row.weights:
                right.barh(place, row.float_bytes, height=0.6, color="#dddddd", label="float32")
                right.barh(place, row.bytes, height=0.6, color=_GREEN, label="packed")
                right.annotate(
                    _size(row.bytes), (row.float_bytes, place), (4, 0), textcoords="offset points", va="center", size=9
                )
        left.axvline(report.avg_bits, color=_GREY, linestyle="--", linewidth=1.2)
        left.set_yticks(places, [row.name for row in rows])
        highest = max(8 if (row.act_bits or 0) > 4 or (row.weight_bits or 0) > 4 else 4 for row in rows)
        left.set(xlabel="bits", title=f"average {report.avg_bits:.2f} bits (dashed)", xlim=(0, highest + 0.6))
        left.xaxis.set_major_locator(MaxNLocator(integer=True))
        share = report.bytes / max(report.float_bytes, 1)
        right.set(xlabel="bytes of weights", title=f"in all {_size(report.bytes)}, {share:.1%} of float32")
        sizes = [row.float_bytes for row in rows if row.weights] or [1]
        if max(sizes) > 20 * min(sizes):
            right.set_xscale("log")
            right.set_xlim(left=max(min(row.bytes for row in rows if row.weights) / 2, 1))
        # Room for the number beside the longest bar.
        right.set_xlim(right=max(sizes) * (8 if right.get_xscale() == "log" else 1.35))
        for axis in (left, right):
            axis.grid(axis="x", alpha=0.3)
            axis.set_axisbelow(True)
        legend_outside(figure, [left, right], below=True)
        return save_figure(figure, path)


def _size(count: int) -> str:
    for unit, factor in (("MB", 1_000_000), ("kB", 1000)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count} B"


# ---- weights


def plot_weights(path: str | Path, model: nn.Module) -> Path:
    """Draw how each layer's weights lie on its grid: a histogram, the grid, and the share rounded to each point.

    Weights are in steps, so that layers with a step for every channel fit one axis. Of a model with more than 24 layers
    the largest are drawn.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    model : a prepared model

    Returns
    -------
    The path.
    """
    layers: list[tuple[str, WeightQuantizer, torch.Tensor]] = []
    for name, module in quantized_layers(model):
        part = weight_quantizer(module)
        if part is not None and all(part is not other for _, other, _ in layers):
            layers.append((name or type(module).__name__, part, float_weight(module).detach().float().cpu()))
    if not layers:
        raise InputError("the model has no quantized weights to draw; prepare it first")
    largest = sorted(layers, key=lambda layer: layer[2].numel(), reverse=True)[:_MOST_PANELS]
    chosen = [layer for layer in layers if any(layer[1] is other[1] for other in largest)]
    with drawing():
        figure, axes = _grid_of_axes(len(chosen), 3.8, 2.8, 3)
        for axis, (name, part, weight) in zip(axes, chosen, strict=True):
            _weights_of_layer(axis, name, part, weight)
        for axis in axes[-min(len(axes), 3) :]:
            axis.set_xlabel("weight / step")
        axes[0].set_ylabel("share")
        if len(chosen) < len(layers):
            figure.suptitle(f"the {len(chosen)} largest of {len(layers)} layers")
        legend_outside(figure, axes, below=True)
        return save_figure(figure, path)


def _weights_of_layer(axis: Axes, name: str, part: WeightQuantizer, weight: torch.Tensor) -> None:
    grid = part.grid
    alpha = part.alpha.detach().float().cpu()
    # Where the layer is in use on another device, so that the same numbers come out.
    codes = part.codes(weight.to(part.log_alpha.device)).cpu()
    steps = (weight / alpha).flatten().numpy()
    error = float((weight - alpha * codes).square().sum() / weight.square().sum().clamp(min=1e-30))
    numbers = np.arange(grid.n_lo, grid.n_hi + 1, grid.stride)
    low, high = min(float(steps.min()), grid.n_lo - 0.5), max(float(steps.max()), grid.n_hi + 0.5)
    # Narrow enough to see what happens within a cell, if there are weights enough.
    width = max(grid.stride / 8, (high - low) / min(160, 4 * math.sqrt(len(steps)) + 8))
    bins = np.arange(low, high + width, width)
    counts, edges = np.histogram(steps, bins)
    axis.stairs(counts / max(len(steps), 1), edges, fill=True, color=_BLUE, alpha=0.6, label="weights")
    shares = np.array([(codes == int(n)).float().mean() for n in numbers])
    fine = len(numbers) <= 31
    if fine:
        for n in numbers.tolist():
            axis.axvline(n, color=_GREY, linewidth=0.6, alpha=0.6, zorder=0)
    right = axis.twinx()
    right.vlines(numbers, 0, shares, color=_ORANGE, linewidth=1.2 if fine else 0.8, alpha=0.7)
    if fine:
        right.plot(numbers, shares, "o", color=_ORANGE, markersize=4)
    axis.plot([], [], "-o", color=_ORANGE, markersize=4, label="rounded to a grid point (right axis)")
    right.set_ylim(0, max(float(shares.max()) * 1.1, 0.05))
    right.tick_params(axis="y", labelcolor=_ORANGE, labelsize=8)
    right.yaxis.set_major_locator(MaxNLocator(4))
    right.spines["right"].set_visible(True)
    right.spines["right"].set_color(_ORANGE)
    axis.yaxis.set_major_locator(MaxNLocator(4))
    axis.tick_params(axis="y", labelsize=8)
    axis.set_ylim(bottom=0)
    axis.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    step = f"{float(alpha):.3g}" if alpha.numel() == 1 else f"{float(alpha.min()):.2g}..{float(alpha.max()):.2g}"
    axis.set_title(f"{name}: {grid.bits} bits, step {step}, error {error:.1%}", fontsize=9)


# ---- training


def plot_history(path: str | Path, history: Sequence[Mapping[str, Any]]) -> Path:
    """Draw a training: loss, accuracy, average bits, and each layer's step and noise ratio, epoch by epoch.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    history : records of ``srq_dropbits.training.Training``; panels without numbers are left out

    Returns
    -------
    The path.
    """
    if not history:
        raise InputError("the training has no epoch to draw")
    curves = {
        "loss": {"training": "loss", "validation": "validation_loss", "penalty on bits": "penalty"},
        "accuracy, %": {"training": "train_accuracy", "validation": "validation_accuracy"},
        "average bits": {"average bits": "avg_bits"},
    }
    layered = {
        "bits of weights": "bits",
        "step of weights / first": "alpha",
        "noise scale / step": "rho",
        "step of inputs / first": "act_alpha",
    }
    names = list(dict.fromkeys(name for record in history for name in record.get("layers", {})))
    panels = [title for title, keys in curves.items() if any(_points(history, key)[0] for key in keys.values())]
    panels += [title for title, key in layered.items() if any(_points(history, key, name)[0] for name in names)]
    if not panels:
        raise InputError("the training's records hold no loss, accuracy or bits to draw")
    look = looks(names)
    with drawing():
        figure, axes = _grid_of_axes(len(panels), 3.7, 2.7, 2 if len(panels) in {2, 4} else 3)
        for axis, title in zip(axes, panels, strict=True):
            if title in curves:
                _scalar_curves(axis, history, curves[title], 100.0 if "%" in title else 1.0)
            else:
                for name in names:
                    _layer_curve(axis, history, layered[title], name, look[name], relative="/ first" in title)
            axis.set(title=title, xlabel="epoch")
            axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axis.grid(alpha=0.3)
        of_layers = [axis for axis, title in zip(axes, panels, strict=True) if title in layered]
        legend_outside(figure, of_layers, columns=8, below=True)
        return save_figure(figure, path)


def _points(history: Sequence[Mapping[str, Any]], key: str, layer: str | None = None) -> tuple[list[int], list[float]]:
    epochs: list[int] = []
    values: list[float] = []
    for record in history:
        holder = record if layer is None else record.get("layers", {}).get(layer, {})
        value = holder.get(key)
        if value is not None and math.isfinite(value):
            epochs.append(int(record["epoch"]))
            values.append(float(value))
    return epochs, values


def _scalar_curves(axis: Axes, history: Sequence[Mapping[str, Any]], keys: Mapping[str, str], factor: float) -> None:
    drawn = 0
    for (label, key), colour in zip(keys.items(), COLOURS, strict=False):
        epochs, values = _points(history, key)
        # Without learned bits the penalty is 0 all along.
        if not epochs or (key == "penalty" and not any(values)):
            continue
        marker = "." if len(epochs) < 30 else ""
        axis.plot(epochs, [factor * value for value in values], color=colour, marker=marker, label=label)
        drawn += 1
    if drawn > 1:
        axis.legend(fontsize="small")


def _layer_curve(
    axis: Axes,
    history: Sequence[Mapping[str, Any]],
    key: str,
    name: str,
    look: Look,
    *,
    relative: bool,
) -> None:
    epochs, values = _points(history, key, name)
    if not epochs:
        return
    if relative:
        values = [value / values[0] if values[0] else 1.0 for value in values]
    style: Any = {"color": look.colour, "linestyle": look.dash, "marker": look.marker}
    axis.plot(epochs, values, **style, markersize=3, linewidth=1.2, label=name)


# ---- estimators


def plot_estimators(path: str | Path, table: Sequence[GainCurve]) -> Path:
    """Draw what each estimator gives back for a value, and what share of the gradient it passes on.

    Blue is descent, red is a gain below 0, where a step goes uphill, and grey is dead: no gradient at all.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    table : what ``srq_dropbits.diagnose.gain_curve`` returned, one an estimator, on one grid

    Returns
    -------
    The path.
    """
    if not table:
        raise InputError("there is no estimator to draw")
    with drawing():
        columns = min(3, len(table))
        lines = -(-len(table) // columns)
        figure = Figure(figsize=(3.7 * columns + 0.4, 2.8 + 2.4 * lines), layout="constrained")
        parts = cast("Any", figure.subfigures(2, 1, height_ratios=[2.6, 2.4 * lines]))
        _transfers(parts[0].subplots(), table)
        axes = cast("Sequence[Axes]", parts[1].subplots(lines, columns, squeeze=False, sharex=True).ravel())
        for axis in axes[len(table) :]:
            axis.set_axis_off()
        for place, (axis, curve) in enumerate(zip(axes, table, strict=False)):
            _gain(axis, curve)
            if place + columns >= len(table):
                axis.set_xlabel("value / step")
                axis.tick_params(labelbottom=True)
            if place % columns == 0:
                axis.set_ylabel("gain")
        handles, labels = axes[0].get_legend_handles_labels()
        known = dict(zip(labels, handles, strict=True))
        for axis in axes[1 : len(table)]:
            known |= {
                label: handle
                for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
                if label not in known
            }
        parts[1].legend(known.values(), known.keys(), loc="outside lower center", ncols=4, fontsize="small")
        return save_figure(figure, path)


def _transfers(axis: Axes, table: Sequence[GainCurve]) -> None:
    groups: list[tuple[GainCurve, list[str]]] = []
    for curve in table:
        # Curves over draws that differ by less than their noise are drawn once.
        same = next((names for first, names in groups if np.allclose(first.value, curve.value, atol=0.05)), None)
        if same is None:
            groups.append((curve, [curve.estimator]))
        else:
            same.append(curve.estimator)
    for (curve, names), colour, line in zip(groups, COLOURS * 2, ["-", "--", "-.", ":"] * 5, strict=False):
        label = ", ".join(names)
        axis.plot(curve.x / curve.alpha, curve.value / curve.alpha, color=colour, linestyle=line, label=label)
    axis.set(title="value given back (mean over draws), in steps", xlabel="value / step")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small", loc="lower right")


def _gain(axis: Axes, curve: GainCurve) -> None:
    x, gain, spread = curve.x / curve.alpha, curve.gain, curve.spread
    sampled = bool(spread.any())
    if sampled:
        axis.fill_between(
            x, gain - spread, gain + spread, color=_GREEN, alpha=0.2, linewidth=0, label="standard deviation of a draw"
        )
    axis.fill_between(x, 0, np.maximum(gain, 0), color=_BLUE, alpha=0.35, linewidth=0, label="with descent")
    axis.fill_between(x, 0, np.minimum(gain, 0), color=_ORANGE, alpha=0.6, linewidth=0, label="against descent")
    axis.plot(x, gain, color="black", linewidth=1.0)
    dead = (gain == 0) & (spread == 0)
    # The end of the axis, whatever its scale.
    axis.fill_between(
        x, 0, 1, where=dead.tolist(), transform=axis.get_xaxis_transform(), color="#bbbbbb", alpha=0.55, linewidth=0,
        label="no gradient",
    )  # fmt: skip
    for n in range(curve.grid.n_lo, curve.grid.n_hi + 1):
        axis.axvline(n, color=_GREY, linewidth=0.5, linestyle=":", zorder=0)
    low, high = min(float(gain.min()), 0.0), max(float(gain.max()), 0.0)
    if sampled:
        low, high = (
            min(low, float(np.quantile(gain - spread, 0.05))),
            max(high, float(np.quantile(gain + spread, 0.95))),
        )
    room = 0.08 * max(high - low, 0.1)
    axis.set_ylim(low - room, high + room)
    axis.set_title(
        f"{curve.estimator}: dead {curve.dead:.0%}, against {curve.opposed:.0%}, mean {curve.mean_gain:.2f}", fontsize=9
    )
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
