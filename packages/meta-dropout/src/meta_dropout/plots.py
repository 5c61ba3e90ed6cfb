"""Every picture: comparisons, training, robustness, where noise acts, how a boundary moves while adapting.

Each function writes one file, whose ending says what kind (PNG, SVG, PDF), and returns its path; the same arguments
give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike, NDArray

from meta_dropout.attacks import RobustnessCurve
from meta_dropout.diagnose import Gate, Panel, Plane
from meta_dropout.learner import Step
from shared_core.errors import InputError
from shared_core.plots import COLOURS, QUIET, drawing, legend_outside, looks, running_mean, save_figure
from shared_core.plots import plot_comparison as _plot_comparison
from shared_core.runs import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "plot_boundary",
    "plot_comparison",
    "plot_gates",
    "plot_history",
    "plot_plane",
    "plot_robustness",
]

_UNKNOWN = "#8A8A8A"
_OURS = ("meta-dropout", "metasgd-dropout")
_NORMS = {"l1": "$\\ell_1$", "l2": "$\\ell_2$", "linf": "$\\ell_\\infty$"}
_LEAST_SPAN = 0.05


def plot_comparison(path: str | Path, results: Sequence[Result]) -> Path:
    """Draw every method's mean with its 95 % interval, best on top; see :func:`shared_core.plots.plot_comparison`.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    results : rows of a run's summary; ``meta-dropout`` and ``metasgd-dropout`` are highlighted

    Returns
    -------
    The path.
    """
    return _plot_comparison(path, results, ours=_OURS.__contains__)


def plot_history(path: str | Path, histories: Mapping[str, Sequence[Step]], window: int | None = None) -> Path:
    """Draw query loss and accuracy over meta-steps, each point the mean of the steps before it.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    histories : method -> what :meth:`meta_dropout.MetaLearner.fit` returned. Steps that were skipped are left out; a
        regression, whose accuracy is its loss, gets one panel
    window : meta-steps averaged; None is a twentieth of the longest

    Returns
    -------
    The path.
    """
    kept = {name: _taken(steps) for name, steps in histories.items()}
    kept = {name: steps for name, steps in kept.items() if steps}
    if not kept:
        raise InputError("no meta-step was taken, so there is no history to draw")
    if window is None:
        window = max(1, max(len(steps) for steps in kept.values()) // 20)
    if window < 1:
        raise InputError(f"window: must be at least 1 meta-step, got {window}")
    regression = all(step.accuracy == step.loss for steps in kept.values() for step in steps)
    with drawing():
        panels = 1 if regression else 2
        figure = Figure(figsize=(4.3 * panels, 3.2 + 0.22 * -(-len(kept) // (2 * panels))), layout="constrained")
        axes = cast("Sequence[Axes]", figure.subplots(1, panels, squeeze=False)[0])
        found = looks([*kept])
        for name, steps in kept.items():
            look, at = found[name], [step.step for step in steps]
            for axis, values in zip(axes, ([s.loss for s in steps], [s.accuracy for s in steps]), strict=False):
                if len(kept) == 1 and window > 1:
                    axis.plot(at, values, color=look.colour, linewidth=0.6, alpha=0.3)
                mean = running_mean(values, window)
                axis.plot(at, mean, look.dash, color=look.colour, linewidth=1.6, label=name)
        axes[0].set(ylabel="mean squared error of queries" if regression else "query loss (cross-entropy, nats)")
        if not regression:
            axes[1].set(ylabel="query accuracy")
            axes[1].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        average = f", mean of the last {window}" if window > 1 else ""
        for axis in axes:
            axis.set(xlabel=f"meta-step{average}")
            axis.grid(alpha=0.25)
            axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        legend_outside(figure, axes, 2 * panels)
        return save_figure(figure, path)


def _taken(steps: Sequence[Step]) -> list[Step]:
    """Leave out skipped steps, whose loss is not known."""
    before = [0, *(step.skipped for step in steps)]
    # After a resumption the first step counts those skipped before; it was skipped itself if it has no loss.
    return [
        step
        for place, (last, step) in enumerate(zip(before, steps, strict=False))
        if step.skipped == last or (place == 0 and step.loss > 0)
    ]


def plot_robustness(path: str | Path, curves: Mapping[str, Mapping[str, RobustnessCurve]]) -> Path:
    """Draw accuracy over the radius of an attack, a panel a norm, with its 95 % interval over tasks.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    curves : norm -> method -> curve; the legend has each curve's area, the mean accuracy over radii

    Returns
    -------
    The path.
    """
    curves = {norm: lines for norm, lines in curves.items() if lines}
    if not curves:
        raise InputError("there is no robustness curve to draw; attack at least one method in one norm")
    found = looks([name for lines in curves.values() for name in lines])
    with drawing():
        figure = Figure(figsize=(4.0 * len(curves), 3.2 + 0.2 * len(found)), layout="constrained")
        axes = cast("Sequence[Axes]", figure.subplots(1, len(curves), squeeze=False, sharey=True)[0])
        for axis, (norm, lines) in zip(axes, curves.items(), strict=True):
            for name, curve in lines.items():
                colour, marker, dash = found[name]
                radii = curve.radii.double().cpu().numpy()
                accuracy = curve.accuracy.double().cpu().numpy()
                each = curve.per_task.double().cpu().numpy()
                if each.shape[1] > 1:
                    half = 1.96 * each.std(1) / np.sqrt(each.shape[1])
                    axis.fill_between(radii, accuracy - half, accuracy + half, color=colour, alpha=0.12, linewidth=0)
                axis.plot(
                    radii,
                    accuracy,
                    dash,
                    marker=marker,
                    color=colour,
                    markersize=4,
                    label=f"{name}, {100 * curve.auc:.1f} %",
                )
            shown = _NORMS.get(norm, norm)
            axis.set(title=f"{shown} attack", xlabel=f"radius in {shown}, pixels in 0..1", ylim=(0, 1.02))
            axis.set_xlim(0, None)
            axis.grid(alpha=0.25)
            axis.legend(
                loc="upper center",
                bbox_to_anchor=(0.5, -0.2),
                fontsize=9,
                title="method, mean accuracy over radii",
                title_fontsize=9,
            )
        axes[0].set_ylabel("accuracy under attack")
        axes[0].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        return save_figure(figure, path)


def plot_gates(path: str | Path, image: ArrayLike, gates: Mapping[str, Gate], row: int = 0) -> Path:
    """Draw an image and where each convolution is let through and made noisy: means over the layer's channels.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    image : ``(channels, height, width)`` or ``(height, width)`` in [0, 1]
    gates : as :func:`meta_dropout.diagnose.gates` gives them; of convolutions those with a factor are drawn
    row : of the batch, the image's

    Returns
    -------
    The path.
    """
    maps = {site: gate for site, gate in gates.items() if gate.kind == "factor" and gate.mean.ndim == 4}
    if not maps:
        raise InputError("there is no gate to draw: it takes convolutions with learned multiplicative noise")
    rows = min(len(gate.mean) for gate in maps.values())
    if not 0 <= row < rows:
        raise InputError(f"row: must be one of the batch's 0..{rows - 1}, got {row}")
    picture = np.asarray(image, dtype=np.float64)
    picture = picture[None] if picture.ndim == 2 else picture
    if picture.ndim != 3 or picture.shape[0] not in (1, 3):
        raise InputError(f"image: needs one or three channels, (channels, height, width), got {picture.shape}")
    with drawing(axes_spines_left=False, axes_spines_bottom=False):
        figure = Figure(figsize=(2.3 * (len(maps) + 1), 4.3), layout="constrained")
        axes = cast("NDArray[Any]", figure.subplots(2, len(maps) + 1))
        shown = picture[0] if len(picture) == 1 else picture.transpose(1, 2, 0)
        first = cast("Axes", axes[0, 0])
        first.imshow(np.clip(shown, 0, 1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        first.set_title(f"input\n{picture.shape[1]} x {picture.shape[2]}")
        cast("Axes", axes[1, 0]).set_axis_off()
        for place, (site, gate) in enumerate(maps.items(), start=1):
            channels, height, width = gate.mean.shape[1:]
            for line, values, colours in ((0, gate.mean, "viridis"), (1, gate.relative_sd, "magma")):
                axis = cast("Axes", axes[line, place])
                heat = values[row].mean(0)
                low, high = _heat_limits(heat)
                drawn = axis.imshow(heat, cmap=colours, vmin=low, vmax=high, interpolation="nearest")
                bar = figure.colorbar(drawn, ax=axis, shrink=0.75, pad=0.03)
                bar.ax.tick_params(labelsize=8)
                bar.ax.yaxis.set_major_locator(MaxNLocator(4))
                bar.ax.yaxis.get_major_formatter().set_useOffset(False)  # type: ignore[attr-defined]
                bar.outline.set_visible(False)  # type: ignore[operator]
            axes[0, place].set_title(f"layer {place}: '{site}'\n{height} x {width}, mean of {channels} channels")
        axes[0, 1].set_ylabel("mean factor")
        axes[1, 1].set_ylabel("noise: sd / mean")
        for axis in axes.ravel():
            axis.set(xticks=[], yticks=[])
        return save_figure(figure, path)


def _heat_limits(heat: NDArray[np.float64]) -> tuple[float, float]:
    """Limits of a colour scale, never so narrow that what is next to nothing looks like a pattern."""
    low, high = float(heat.min()), float(heat.max())
    missing = max(0.0, _LEAST_SPAN - (high - low)) / 2
    return low - missing, high + missing


def plot_boundary(path: str | Path, panels: Sequence[Panel]) -> Path:
    """Draw support, its noisy passes and queries of two classes beside their boundary, a panel an inner step.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    panels : as :func:`meta_dropout.diagnose.project` gives them

    Returns
    -------
    The path.
    """
    if not panels:
        raise InputError("there is no inner step to draw")
    classes = panels[0].classes
    columns = min(len(panels), 3) if len(panels) != 4 else 4
    lines = -(-len(panels) // columns)
    with drawing():
        figure = Figure(figsize=(max(3.1 * columns, 4.6), 2.7 * lines + 0.6), layout="constrained")
        axes = cast("Sequence[Axes]", figure.subplots(lines, columns, squeeze=False).ravel())
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        for place, (axis, panel) in enumerate(zip(axes, panels, strict=False)):
            _one_boundary(axis, panel)
            if place % columns == 0:
                axis.set_ylabel("first principal component\nof the rest")
            if place + columns >= len(panels):
                axis.set_xlabel("signed distance to the boundary")
        marks = [_mark(name, **look) for name, look in _BOUNDARY_MARKS.items()]
        if not panels[0].noisy.size:
            marks = [mark for mark in marks if mark.get_label() != "support with noise"]
        marks += [
            _mark(f"class {value}", marker="s", markersize=7, color=colour)
            for value, colour in zip(classes, COLOURS, strict=False)
        ]
        if panels[0].query_labels is None:
            marks.append(_mark("class not known", marker="s", markersize=7, color=_UNKNOWN))
        figure.legend(handles=marks, loc="outside upper center", ncols=3 if columns < 3 else len(marks), fontsize=9)
        return save_figure(figure, path)


_BOUNDARY_MARKS: dict[str, dict[str, Any]] = {
    "support": {"marker": "*", "markersize": 11, "color": QUIET, "markeredgecolor": "black"},
    "support with noise": {"marker": "x", "markersize": 5, "color": QUIET},
    "query": {"marker": "o", "markersize": 4, "color": QUIET, "alpha": 0.6},
}


def _mark(label: str, **look: Any) -> Line2D:
    return Line2D([], [], linestyle="none", label=label, **look)


def _one_boundary(axis: Axes, panel: Panel) -> None:
    axis.axvline(0, color="black", linewidth=1.2)
    query = panel.query_labels
    known = np.full(len(panel.query), -1) if query is None else query
    for value, colour in ((-1, _UNKNOWN), *zip(panel.classes, COLOURS, strict=False)):
        at = panel.query[known == value]
        axis.plot(at[:, 0], at[:, 1], "o", color=colour, markersize=3.5, alpha=0.45, markeredgewidth=0)
        rows = panel.labels == value
        noisy = panel.noisy[:, rows].reshape(-1, 2)
        axis.plot(noisy[:, 0], noisy[:, 1], "x", color=colour, markersize=4.5, alpha=0.9)
        mean = panel.support[rows]
        axis.plot(mean[:, 0], mean[:, 1], "*", color=colour, markersize=11, markeredgecolor="black")
    right = ""
    if query is not None and len(query):
        share = float(((panel.query[:, 0] > 0) == (query == panel.classes[0])).mean())
        right = f": {100 * share:.0f} % of queries right"
    axis.set_title(f"step {panel.step}{right}" if panel.step else f"before{right}")
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.yaxis.set_major_locator(MaxNLocator(5))


def plot_plane(
    path: str | Path,
    plane: Plane,
    support: ArrayLike,
    labels: ArrayLike,
    query: ArrayLike,
    query_labels: ArrayLike | None = None,
) -> Path:
    """Draw the most probable class over the plane at every inner step, stronger where it is surer, with the points.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    plane : as :func:`meta_dropout.diagnose.boundary_grid` gives it
    support : ``(n, 2)``
    labels : ``(n,)``
    query : ``(m, 2)``
    query_labels : ``(m,)``; None draws queries in grey

    Returns
    -------
    The path.
    """
    points, asked = np.asarray(support, dtype=np.float64), np.asarray(query, dtype=np.float64)
    classes = np.asarray(labels)
    known = None if query_labels is None else np.asarray(query_labels)
    for name, value in (("support", points), ("query", asked)):
        if value.ndim != 2 or value.shape[1] != 2:
            raise InputError(f"{name}: needs points in the plane, (n, 2), got {value.shape}")
    ways, count = plane.probability.shape[-1], len(plane.probability)
    palette = np.array([to_rgb(COLOURS[k % len(COLOURS)]) for k in range(ways)])
    columns = min(count, 3) if count != 4 else 4
    lines = -(-count // columns)
    limits = float(plane.x[0]), float(plane.x[-1]), float(plane.y[0]), float(plane.y[-1])
    with drawing():
        figure = Figure(figsize=(max(2.8 * columns, 4.0), 2.8 * lines + 0.5), layout="constrained")
        axes = cast("Sequence[Axes]", figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).ravel())
        for axis in axes[count:]:
            axis.set_axis_off()
        for step, (axis, probability) in enumerate(zip(axes, plane.probability, strict=False)):
            sure = (probability.max(-1) - 1 / ways) / max(1 - 1 / ways, 1e-9)
            ink = (0.1 + 0.5 * np.clip(sure, 0, 1))[..., None]
            shade = 1 - ink * (1 - palette[probability.argmax(-1)])
            axis.imshow(shade, origin="lower", extent=limits, aspect="auto", interpolation="nearest")
            if ways > 1:
                for k in range(ways):
                    lead = probability[..., k] - np.delete(probability, k, -1).max(-1)
                    if lead.min() < 0 < lead.max():
                        axis.contour(plane.x, plane.y, lead, levels=[0], colors="black", linewidths=0.7)
            shades = _UNKNOWN if known is None else palette[known]
            axis.scatter(asked[:, 0], asked[:, 1], s=9, c=shades, edgecolors="white", linewidths=0.4)
            axis.scatter(
                points[:, 0], points[:, 1], s=110, c=palette[classes], marker="*", edgecolors="black", linewidths=0.8
            )
            axis.set(xlim=limits[:2], ylim=limits[2:], title=f"step {step}" if step else "before")
            if step + columns >= count:
                axis.set_xlabel("first input")
                axis.tick_params(labelbottom=True)
            if step % columns == 0:
                axis.set_ylabel("second input")
        marks = [
            _mark("support", marker="*", markersize=11, color=QUIET, markeredgecolor="black"),
            _mark("query", marker="o", markersize=4, color=QUIET),
            *(_mark(f"class {k}", marker="s", markersize=7, color=tuple(palette[k])) for k in range(min(ways, 8))),
        ]
        figure.legend(handles=marks, loc="outside upper center", ncols=min(len(marks), max(2 * columns, 3)), fontsize=9)
        return save_figure(figure, path)
