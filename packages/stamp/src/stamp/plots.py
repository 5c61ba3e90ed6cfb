"""Every picture: what pruning costs and brings, what it kept, how far masks follow the data, how fast the way there is.

Each function takes the file to write, whose ending says what kind (PNG, SVG, PDF), then plain data, and returns the
path; the same arguments give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast, runtime_checkable

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, MaxNLocator
from numpy.typing import ArrayLike, NDArray

from shared_core.errors import InputError
from shared_core.plots import COLOURS, MARKERS, QUIET, Look, drawing, plain_log, running_mean, save_figure, short_names
from shared_core.plots import plot_comparison as _plot_comparison
from shared_core.runs import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "Course",
    "Point",
    "StepLike",
    "plot_adaptivity",
    "plot_comparison",
    "plot_history",
    "plot_latency",
    "plot_overlap",
    "plot_rapid",
    "plot_tradeoff",
    "plot_widths",
]

# This method's colour is kept for it.
_OURS_COLOUR = COLOURS[1]
_OTHERS = [*(colour for colour in COLOURS if colour != _OURS_COLOUR), "#7F7F7F"]
_OUTLINE = [withStroke(linewidth=3, foreground="white")]
# What the spec warns of: gates that are not decided, and masks that do not depend on the data (spec 10).
_UNDECIDED, _IGNORED = 0.1, 0.95

Number = float | int
Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Point:
    """A pruned network of one method at one budget, the mean over seeds.

    Parameters
    ----------
    method : its name; those that begin with ``stamp`` are emphasised, ``dense`` is drawn as a star
    accuracy : mean, in percent
    low, high : 95 % interval of the mean, in percent; None where there is one seed
    macs : share of the dense network's multiply-adds, in (0, 1]
    ms : measured milliseconds of a forward pass
    """

    method: str
    accuracy: Number
    low: Number | None = None
    high: Number | None = None
    macs: Number | None = None
    ms: Number | None = None


@dataclass(frozen=True)
class Course:
    """How a network's accuracy rose on one way to the small network.

    Parameters
    ----------
    at : seconds (or steps) since the new data was given, not falling; the time to prune counts
    accuracy : on held-out data at these times, in 0..1
    small_from : before this time it is the dense network that is trained, which does not count as the goal reached
    """

    at: Sequence[Number]
    accuracy: Sequence[Number]
    small_from: Number = 0.0


@runtime_checkable
class StepLike(Protocol):
    """What is known after a meta-step."""

    @property
    def step(self) -> int:
        """Number of the meta-step."""
        ...

    @property
    def loss(self) -> float:
        """Loss of its tasks."""
        ...

    @property
    def spread(self) -> float:
        """Mean of pi (1 - pi): 0 where all gates are decided, 0.25 where none is."""
        ...

    @property
    def overlap(self) -> float:
        """Overlap (IoU) of the masks of different tasks; NaN where the step had one task."""
        ...


def plot_tradeoff(
    path: str | Path, points: Sequence[Point], x: Literal["macs", "ms"] = "macs", *, title: str = ""
) -> Path:
    """Draw accuracy with its 95 % interval over what a network costs, a line for each method, dense as a star.

    Names stand where lines lie furthest apart: left, at the smallest networks. Where a few networks are so much worse
    than all others that these could not be told apart, the axis is cut above them and their accuracy stands with the
    name.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    points : networks, in any order
    x : ``macs``, the share of the dense network's multiply-adds, or ``ms``, measured milliseconds
    title : above the picture

    Returns
    -------
    the path written

    Examples
    --------
    >>> import tempfile
    >>> points = [Point("dense", 93.1, macs=1.0), Point("stamp", 91.8, 91.2, 92.4, macs=0.25)]
    >>> plot_tradeoff(Path(tempfile.mkdtemp()) / "tradeoff.png", points).name
    'tradeoff.png'
    """
    if x not in {"macs", "ms"}:
        raise InputError(f"x: must be macs or ms, got {x!r}")
    lines: dict[str, list[Point]] = {}
    for point in points:
        where = f"points: {point.method}"
        if getattr(point, x) is None:
            raise InputError(f"{where} has no {x}; measure it, or draw over {'ms' if x == 'macs' else 'macs'}")
        if not math.isfinite(_cost(point, x)) or _cost(point, x) <= 0:
            raise InputError(f"{where}: {x} must be finite and above 0, got {_cost(point, x)}")
        ends = [end for end in (point.low, point.high) if end is not None]
        if not all(math.isfinite(value) for value in (point.accuracy, *ends)):
            raise InputError(f"{where}: accuracy must be finite, got {point.accuracy} in {point.low} .. {point.high}")
        lines.setdefault(point.method, []).append(point)
    if not lines:
        raise InputError("points: there is no network to draw")
    dense = lines.pop("dense", [])
    with drawing():
        figure = Figure(figsize=(7.6, max(4.6, 1.4 + 0.19 * len(lines))), layout="constrained")
        axis = figure.subplots()
        look = _looks([*lines])
        # What is emphasised is drawn last, on top.
        for name in sorted(lines, key=_is_ours):
            found = sorted(lines[name], key=lambda point: _cost(point, x))
            colour, marker, dash = look[name]
            ours = _is_ours(name)
            at = [_cost(point, x) for point in found]
            axis.errorbar(
                at,
                [point.accuracy for point in found],
                np.array([_reach(point) for point in found]).T,
                color=colour,
                marker=marker,
                linestyle=dash,
                linewidth=2.6 if ours else 1.2,
                elinewidth=2.0 if ours else 0.9,
                markersize=6.5 if ours else 4.5,
                capsize=2.5 if ours else 1.5,
                zorder=4 if ours else 2,
                label=name,
            )
        for point in dense:
            reach = np.array([_reach(point)]).T
            axis.errorbar(
                _cost(point, x),
                point.accuracy,
                reach,
                fmt="*",
                color="black",
                markersize=14,
                capsize=2.5,
                label="dense",
            )
            axis.axhline(point.accuracy, color="black", linewidth=0.8, linestyle=":", zorder=1)
        words = "share of the dense network's MACs" if x == "macs" else "milliseconds of a forward pass, measured"
        axis.set(ylabel="accuracy [%]", xlabel=words, title=title)
        axis.grid(alpha=0.25)
        _cost_axis(axis, [_cost(point, x) for point in points], shares=x == "macs")
        axis.set_ylim(_accuracies_shown(points))
        starts = {name: min(found, key=lambda point: _cost(point, x)) for name, found in lines.items()}
        _names_at_left(
            figure,
            axis,
            {name: (_cost(point, x), point.accuracy) for name, point in starts.items()},
            {name: look[name][0] for name in lines},
        )
        if dense:
            _name_of_dense(axis, dense[0], x)
        return save_figure(figure, path)


def _cost(point: Point, x: str) -> float:
    return float(getattr(point, x))


def _reach(point: Point) -> tuple[float, float]:
    """How far the interval reaches down and up from the mean."""
    low = point.accuracy if point.low is None else point.low
    high = point.accuracy if point.high is None else point.high
    return max(float(point.accuracy - low), 0.0), max(float(high - point.accuracy), 0.0)


def _cost_axis(axis: Axes, costs: Sequence[float], *, shares: bool) -> None:
    low, high = min(costs), max(costs)
    edge = (high / low) ** 0.03 if high > 1.2 * low else 2.2
    axis.set_xscale("log")
    plain_log(axis.xaxis, low, high)
    axis.set_xlim(low / min(edge, 1.03), high * edge)
    if shares:
        axis.xaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.5, 5.0), numticks=20))
        axis.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")


def _lowest_shown(accuracies: Sequence[Number]) -> float:
    """Least accuracy to show where a few networks at chance would press all others together."""
    ordered = np.sort(np.asarray(accuracies, dtype=np.float64))
    first = 0
    while len(ordered) - first > 4:
        rest = ordered[first:]
        # No more than a quarter of all may end up below the cut.
        gaps = np.diff(rest)[: max(0, len(ordered) // 4 - first)]
        if not len(gaps) or gaps.max() < 0.4 * (rest[-1] - rest[0]) or gaps.max() < 2:
            break
        first += int(gaps.argmax()) + 1
    return float(ordered[first])


def _accuracies_shown(points: Sequence[Point]) -> tuple[float, float]:
    lowest = _lowest_shown([point.accuracy for point in points])
    shown = [point for point in points if point.accuracy >= lowest]
    highest = float(max(point.accuracy for point in shown))
    # The interval of two seeds is six times as wide as that of three: not all of it need be seen.
    beyond = 0.5 * max(highest - lowest, 1.0)
    low = max(min(point.accuracy - _reach(point)[0] for point in shown), lowest - beyond)
    high = min(max(point.accuracy + _reach(point)[1] for point in shown), highest + beyond, max(highest, 100.0))
    margin = 0.06 * max(high - low, 1.0)
    return low - margin, high + margin


def _cut_below(axis: Axes, lowest: float) -> None:
    highest = axis.dataLim.y1
    axis.set_ylim(lowest, highest + 0.06 * (highest - lowest))


def _names_at_left(
    figure: Figure, axis: Axes, starts: Mapping[str, tuple[float, Number]], colours: Mapping[str, str]
) -> None:
    """Write names in a column left of where the lines start, apart from each other, each led to its line."""
    if not starts:
        return
    bottom, top = axis.get_ylim()
    labels = dict(zip(starts, short_names([*starts]), strict=True))
    for name, (_, accuracy) in starts.items():
        if accuracy < bottom:
            labels[name] += f", {accuracy:.1f} % \u2193"
    longest = max(labels.values(), key=len)
    probe = axis.text(0, 0, longest, fontsize=9, fontweight="bold")
    figure.draw_without_rendering()
    size = probe.get_window_extent()
    probe.remove()
    frame = axis.get_window_extent()
    # The column takes its share of the axis: what is left of it begins at the lowest cost.
    low, high = axis.get_xlim()
    share = min(0.6, (size.width + 34) / frame.width)
    axis.set_xlim(high * (low / high) ** (1 / (1 - share)), high)
    wanted = {name: float((accuracy - bottom) / (top - bottom)) for name, (_, accuracy) in starts.items()}
    ordered = sorted(wanted, key=lambda name: wanted[name])
    gap = float(size.height / frame.height) * 1.02
    places = _apart([max(wanted[name], 0.0) for name in ordered], gap, 0.6 * gap, 1 - 0.5 * gap)
    for name, place in zip(ordered, places, strict=True):
        at = (size.width + 6) / frame.width, place
        lead = {"arrowstyle": "-", "color": colours[name], "linewidth": 0.6, "alpha": 0.7, "shrinkB": 4}
        axis.annotate(
            labels[name],
            starts[name] if wanted[name] >= 0 else at,
            at,
            xycoords="data" if wanted[name] >= 0 else axis.transAxes,
            textcoords=axis.transAxes,
            ha="right",
            va="center",
            fontsize=9,
            color=colours[name],
            fontweight="bold" if _is_ours(name) else "normal",
            arrowprops={**lead, "relpos": (1, 0.5)} if wanted[name] >= 0 else None,
        )


def _apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places at least `gap` apart within `low` .. `high` (where there is room), as near as can be to those wanted.

    The wanted ones rise. Least squares under "each at least a gap above the last" is isotonic regression of what is
    left when the gaps are taken away: neighbours in the wrong order are pooled at their mean.
    """
    blocks: list[list[float]] = []
    for place, value in enumerate(wanted):
        blocks.append([value - place * gap])
        while len(blocks) > 1 and np.mean(blocks[-2]) > np.mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    flat = [float(np.mean(block)) for block in blocks for _ in block]
    top = high - (len(wanted) - 1) * gap
    return [min(max(value, low), max(top, low)) + place * gap for place, value in enumerate(flat)]


def _name_of_dense(axis: Axes, point: Point, x: str) -> None:
    axis.annotate(
        "dense",
        (_cost(point, x), point.accuracy),
        (-9, 4),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=9,
        path_effects=_OUTLINE,
    )


def plot_widths(path: str | Path, widths: Mapping[str, Mapping[str, tuple[int, int]]], *, title: str = "") -> Path:
    """Draw how much of each layer is kept, a panel for each method or task; kept channels stand over their bar.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    widths : method or task -> group -> (channels kept, channels of the dense network); the same groups in all
    title : above the picture

    Returns
    -------
    the path written
    """
    if not widths or not all(widths.values()):
        raise InputError("widths: there is no layer to draw")
    dense = {group: width for group, (_, width) in next(iter(widths.values())).items()}
    for name, each in widths.items():
        if {group: width for group, (_, width) in each.items()} != dense:
            raise InputError(f"widths: {name} must have the groups and widths of {next(iter(widths))}")
        for group, (kept, width) in each.items():
            if not 0 <= kept <= width or not width:
                raise InputError(f"widths: {name}, {group}: must keep between 0 and its width, got {kept} of {width}")
    names = [*dense]
    crowded = len(names) > 32
    titles = zip(widths, short_names([*widths]), strict=True)
    headings = {name: f"{label}: {_sums(widths[name])}" for name, label in titles}
    heading = 0.078 * max(len(text) for text in headings.values()) + 0.4
    across = max((0.19 if crowded else 0.26) * max(len(names), 6) + 0.7, heading)
    columns = max(1, min(int(13.5 / across), len(widths), 4))
    columns = -(-len(widths) // -(-len(widths) // columns))
    rows = -(-len(widths) // columns)
    labels = [f"{label}  ({dense[name]})" for label, name in zip(short_names(names), names, strict=True)]
    tall = 1.32 if crowded else 1.2
    with drawing():
        below = 0.068 * max(len(label) for label in labels) + 0.1
        figure = Figure(figsize=(across * columns, tall * rows + below + 0.4 * bool(title)), layout="constrained")
        axes = cast("Sequence[Axes]", figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel())
        for axis, name in zip(axes, widths, strict=False):
            _kept(axis, [widths[name][group] for group in names], ours=_is_ours(name), sideways=crowded)
            weight = "bold" if _is_ours(name) else "normal"
            axis.set_title(headings[name], fontsize=9, fontweight=weight, loc="left")
        for place, axis in enumerate(axes):
            axis.set_xticks(range(len(names)), labels, rotation=90, fontsize=8)
            # The last panel of each column has the names below it.
            last = place + columns >= len(widths)
            axis.tick_params(axis="x", length=0, labelbottom=last)
            if place >= len(widths):
                axis.set_axis_off()
            axis.tick_params(axis="y", labelleft=place % columns == 0, labelsize=8)
        axes[0].set(ylim=(0, 132 if crowded else 122), xlim=(-0.7, len(names) - 0.3))
        axes[0].set_yticks([0, 50, 100], ["0 %", "50 %", "100 %"])
        figure.supylabel("channels kept", fontsize="medium")
        figure.suptitle(title, fontsize="medium")
        return save_figure(figure, path)


def _sums(widths: Mapping[str, tuple[int, int]]) -> str:
    return f"{sum(kept for kept, _ in widths.values())} of {sum(width for _, width in widths.values())}"


def _kept(axis: Axes, widths: Sequence[tuple[int, int]], *, ours: bool, sideways: bool) -> None:
    places = range(len(widths))
    axis.bar(places, 100, width=0.8, color="#E9E9E9", zorder=1)
    colour = _OURS_COLOUR if ours else _OTHERS[0]
    bars = axis.bar(places, [100 * kept / width for kept, width in widths], width=0.8, color=colour, zorder=2)
    axis.bar_label(
        bars, [str(kept) for kept, _ in widths], fontsize=7, padding=1.5, rotation=90 if sideways else 0, zorder=3
    )


def plot_overlap(path: str | Path, matrix: ArrayLike, names: Sequence[str], *, title: str = "") -> Path:
    """Draw how much the masks of tasks overlap: kept by both over kept by either (IoU), written into each cell.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    matrix : (tasks, tasks) overlaps in 0..1
    names : of the tasks
    title : above the picture, such as the group or budget it is for

    Returns
    -------
    the path written
    """
    values = np.asarray(matrix, dtype=np.float64)
    if not len(names):
        raise InputError("names: there is no task to draw")
    if values.shape != (len(names), len(names)):
        raise InputError(f"matrix: needs a row and a column a task, {(len(names), len(names))}, got {values.shape}")
    if not ((values >= 0) & (values <= 1)).all():
        raise InputError(f"matrix: overlaps must lie in 0..1, got {_first_outside(values)}")
    labels = short_names(names)
    longest = max(map(len, labels))
    with drawing():
        side = max(1.8, 0.46 * len(names))
        size = (side + 0.075 * longest + 1.5, side + 0.075 * longest + 0.4 + 0.25 * bool(title))
        figure = Figure(figsize=size, layout="constrained")
        axis = figure.subplots()
        image = axis.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                colour = "white" if value > 0.72 else "black"
                axis.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=9)
        places = range(len(names))
        axis.set_xticks(places, labels, rotation=90)
        axis.set_yticks(places, labels)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        axis.set_title(title)
        bar = figure.colorbar(image, ax=axis, shrink=min(1.0, 3.2 / side), aspect=18)
        bar.set_label("overlap of kept channels (IoU)")
        bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
        return save_figure(figure, path)


def plot_adaptivity(
    path: str | Path, table: Mapping[str, Mapping[str, Number | Sequence[Number]]], *, title: str = ""
) -> Path:
    """Draw how each data set fares with its own mask, with the masks of other sets, and with those of baselines.

    The line through a set's own mask shows at a glance what lies left of it, and what does not.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    table : data set -> mask -> accuracy in 0..1, or several, which are drawn as their range with their mean. The mask
        ``own`` (or one with the data set's name) is emphasised; those with the names of the table's other data sets,
        and ``other``, are drawn alike; ``dense`` is the network that nothing was cut from
    title : above the picture

    Returns
    -------
    the path written
    """
    found = {dataset: _by_kind(dataset, masks, [*table]) for dataset, masks in table.items()}
    if not found or not all(found.values()):
        raise InputError("table: there is no accuracy to draw")
    kinds = [*dict.fromkeys(kind for each in found.values() for kind in each)]
    kinds.sort(key=lambda kind: {_OWN: 0, _OTHER: 1, _DENSE: 3}.get(kind, 2))
    baselines = [kind for kind in kinds if kind not in {_OWN, _OTHER, _DENSE}]
    look = {_OWN: (_OURS_COLOUR, "D"), _OTHER: ("black", "o"), _DENSE: ("black", "*")}
    look |= {kind: (_colour(place), MARKERS[(place + 1) % len(MARKERS)]) for place, kind in enumerate(baselines)}
    step = 0.8 / max(len(kinds), 2)
    with drawing():
        tall = (0.15 + 0.1 * len(kinds)) * len(found) + 1.0 + 0.22 * -(-len(kinds) // 4) + 0.25 * bool(title)
        figure = Figure(figsize=(7.2, max(2.4, tall)), layout="constrained")
        axis = figure.subplots()
        for row, each in enumerate(found.values()):
            if row % 2:
                axis.axhspan(row - 0.5, row + 0.5, color="#F3F3F3", linewidth=0, zorder=0)
            if _OWN in each:
                own = 100 * float(np.mean(each[_OWN]))
                axis.plot([own, own], [row - 0.46, row + 0.46], color=_OURS_COLOUR, linewidth=1.0, alpha=0.5, zorder=1)
            for kind, values in each.items():
                place = row + (kinds.index(kind) - (len(kinds) - 1) / 2) * step
                _dots(axis, kind, 100 * np.asarray(values), place, *look[kind])
        axis.set_yticks(range(len(found)), short_names([*found]))
        axis.set_ylim(len(found) - 0.5, -0.5)
        axis.tick_params(axis="y", length=0)
        axis.set(xlabel="accuracy [%]", title=title)
        axis.margins(x=0.04)
        axis.grid(axis="x", alpha=0.25)
        handles = [
            Line2D([], [], linestyle="", label=_SAID.get(kind, kind), **_dot(kind, *look[kind])) for kind in kinds
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 4), fontsize=9)
        return save_figure(figure, path)


_OWN, _OTHER, _DENSE = "own", "other", "dense"
_SAID = {_OWN: "its own mask", _OTHER: "masks of other sets", _DENSE: "dense, nothing cut"}


def _by_kind(
    dataset: str, masks: Mapping[str, Number | Sequence[Number]], datasets: Sequence[str]
) -> dict[str, list[float]]:
    """Accuracies of each kind of mask, where the masks of all other sets are one kind."""
    kinds: dict[str, list[float]] = {}
    for mask, given in masks.items():
        values = [float(given)] if isinstance(given, int | float) else [float(value) for value in given]
        if not values or not all(0 <= value <= 1 for value in values):
            raise InputError(f"table: {dataset}, {mask}: needs an accuracy in 0..1, got {values[:3]}")
        kind = _OWN if mask == dataset else _OTHER if mask in datasets else mask
        kinds.setdefault(kind, []).extend(values)
    return kinds


def _dot(kind: str, colour: str, marker: str) -> dict[str, Any]:
    hollow = kind == _OTHER
    return {
        "color": colour,
        "marker": marker,
        "markersize": {_OWN: 8, _DENSE: 9}.get(kind, 6),
        "markerfacecolor": "white" if hollow else colour,
        "markeredgecolor": colour if hollow else "white",
        "markeredgewidth": 1.1 if hollow else 0.5,
    }


def _dots(axis: Axes, kind: str, values: Vector, place: float, colour: str, marker: str) -> None:
    look = _dot(kind, colour, marker)
    if len(values) > 1:
        axis.plot([values.min(), values.max()], [place, place], color=colour, linewidth=1.2, alpha=0.6, zorder=2)
    # Each of the other sets' masks is a mask of its own; several draws of one kind are not.
    drawn = values if kind == _OTHER else np.array([values.mean()])
    axis.plot(drawn, np.full(len(drawn), place), linestyle="", zorder=4 if kind == _OWN else 3, label=kind, **look)


def plot_rapid(
    path: str | Path,
    curves: Mapping[str, Course],
    *,
    dense: Number,
    x: Literal["seconds", "steps"] = "seconds",
    within: Number = 0.01,
    title: str = "",
) -> Path:
    """Draw accuracy on the way to a small network, and mark where each way is first about as good as the dense one.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    curves : way -> its course; those that begin with ``stamp`` are emphasised
    dense : accuracy of the dense network trained on the new data, in 0..1
    x : what the courses' ``at`` counts
    within : how far below `dense` still counts as reached, 0.01 is one point
    title : above the picture

    Returns
    -------
    the path written

    Examples
    --------
    >>> import tempfile
    >>> ways = {"stamp": Course([1.0, 4.0], [0.5, 0.93]), "dense, cut": Course([1.0, 9.0], [0.6, 0.92], small_from=5.0)}
    >>> plot_rapid(Path(tempfile.mkdtemp()) / "rapid.svg", ways, dense=0.93).name
    'rapid.svg'
    """
    if not curves:
        raise InputError("curves: there is no course to draw")
    if not 0 <= dense <= 1:
        raise InputError(f"dense: must be an accuracy in 0..1, got {dense}")
    if not 0 <= within < 1:
        raise InputError(f"within: must be a share of all answers in 0..1 (0.01 is one point), got {within}")
    for name, course in curves.items():
        _check_course(name, course)
    goal = dense - within
    unit = "s" if x == "seconds" else "steps"
    points = f"{100 * within:.3g} point{'' if within == 0.01 else 's'} of dense"
    end = max(course.at[-1] for course in curves.values())
    with drawing():
        figure = Figure(figsize=(7.4, 4.2 + 0.22 * len(curves)), layout="constrained")
        axis = figure.subplots()
        axis.axhspan(100 * goal, 100 * dense, color="#ECECEC", linewidth=0, zorder=0)
        axis.axhline(100 * dense, color="black", linewidth=1.0, linestyle=":", label=f"dense: {100 * dense:.1f} %")
        look, short = _looks([*curves]), dict(zip(curves, short_names([*curves]), strict=True))
        dashed = False
        for name in sorted(curves, key=_is_ours):
            course, (colour, marker, _) = curves[name], look[name]
            at, accuracy = np.asarray(course.at, dtype=np.float64), 100 * np.asarray(course.accuracy)
            small = at >= course.small_from
            reached = _first_reached(course, goal)
            said = f"not within {points}" if reached is None else f"within {points} after {_plain(reached[0])} {unit}"
            width = 2.4 if _is_ours(name) else 1.5
            place = 3 if _is_ours(name) else 2
            axis.plot(
                at[small],
                accuracy[small],
                color=colour,
                marker=marker,
                markersize=3.5 if small.sum() <= 40 else 0,
                linewidth=width,
                zorder=place,
                label=f"{short[name]}: {said}",
            )
            if not small.all():
                dashed = True
                axis.plot(at[~small], accuracy[~small], color=colour, linewidth=width, linestyle="--", zorder=place)
            if reached is not None:
                axis.axvline(reached[0], color=colour, linewidth=1.0, alpha=0.6, zorder=1)
                axis.plot(reached[0], 100 * reached[1], "*", color=colour, markersize=15, zorder=5, **_EDGE)
        words = "seconds since the new data was given" if x == "seconds" else "fine-tuning steps"
        if dashed:
            words += "  (dashed: the dense network, not yet cut)"
        axis.set(xlabel=words, ylabel="accuracy [%]", title=title)
        axis.set_xlim(min(0.0, float(min(course.at[0] for course in curves.values()))), 1.03 * end if end > 0 else 1)
        axis.xaxis.set_major_locator(MaxNLocator(8, integer=x == "steps"))
        # Where a way begins (at chance, often) matters less than the last points; each still shows its best.
        shown = 100 * min(dense - 0.25, *(max(course.accuracy) - 0.05 for course in curves.values()))
        if shown > axis.get_ylim()[0]:
            _cut_below(axis, shown)
        axis.grid(alpha=0.25)
        handles, labels = axis.get_legend_handles_labels()
        figure.legend(handles[::-1], labels[::-1], loc="outside upper left", ncols=1, fontsize=9)
        return save_figure(figure, path)


_EDGE: dict[str, Any] = {"markeredgecolor": "black", "markeredgewidth": 0.7}


def _check_course(name: str, course: Course) -> None:
    if not len(course.at) or len(course.at) != len(course.accuracy):
        raise InputError(
            f"curves: {name} needs as many times as accuracies, got {len(course.at)} and {len(course.accuracy)}"
        )
    at = np.asarray([*course.at, course.small_from], dtype=np.float64)
    if not np.isfinite(at).all() or (np.diff(at[:-1]) < 0).any():
        raise InputError(f"curves: {name}: times must be finite and must not fall")
    outside = [value for value in course.accuracy if not 0 <= value <= 1]
    if outside:
        raise InputError(f"curves: {name}: accuracies must lie in 0..1, got {outside[0]}")


def _first_reached(course: Course, goal: float) -> tuple[float, float] | None:
    """Time and accuracy of the small network's first measurement at the goal."""
    for at, accuracy in zip(course.at, course.accuracy, strict=True):
        # A share of a few hundred answers, less a hundredth, must not miss its goal by rounding.
        if at >= course.small_from and accuracy >= goal - 1e-9:
            return float(at), float(accuracy)
    return None


def plot_history(path: str | Path, history: Sequence[StepLike], *, window: int | None = None) -> Path:
    """Draw loss, how undecided the gates are, and the overlap of different tasks' masks along meta-training.

    Dotted lines are what to stay below: gates that undecided do not survive being cut, and masks that alike do not
    depend on the data (spec 10).

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    history : its meta-steps, in order
    window : meta-steps averaged for the thick line; None is a twentieth of all

    Returns
    -------
    the path written
    """
    if not len(history):
        raise InputError("history: no meta-step was taken, so there is nothing to draw")
    for place, step in enumerate(history):
        for name in ("loss", "spread"):
            if not math.isfinite(getattr(step, name)):
                raise InputError(
                    f"history: {name} of step {step.step} is {getattr(step, name)}; draw the {place} steps before it"
                )
    window = max(1, len(history) // 20) if window is None else window
    if window < 1:
        raise InputError(f"window: must be at least 1 meta-step, got {window}")
    paired = [step for step in history if math.isfinite(step.overlap)]
    with drawing():
        figure = Figure(figsize=(9.6, 3.1), layout="constrained")
        axes = cast("Sequence[Axes]", figure.subplots(1, 3))
        _trace(axes[0], [step.step for step in history], [step.loss for step in history], window, _OTHERS[0])
        _trace(axes[1], [step.step for step in history], [step.spread for step in history], window, _OTHERS[1])
        if paired:
            _trace(axes[2], [step.step for step in paired], [step.overlap for step in paired], window, _OTHERS[3])
        else:
            axes[2].text(0.5, 0.45, "a step had one task", transform=axes[2].transAxes, ha="center", color=QUIET)
        axes[0].set(title="loss of the tasks")
        axes[1].set(title="undecided gates, mean \N{GREEK SMALL LETTER PI}(1 \N{MINUS SIGN} \N{GREEK SMALL LETTER PI})")
        axes[2].set(title="overlap of different masks (IoU)")
        axes[1].axhline(_UNDECIDED, color=QUIET, linewidth=1.2, linestyle=":")
        axes[2].axhline(_IGNORED, color=QUIET, linewidth=1.2, linestyle=":")
        axes[1].set_ylim(0, 0.26)
        axes[2].set_ylim(0, 1.02)
        average = f"\nthick: mean of the last {window}" if window > 1 else ""
        for axis in axes:
            axis.set(xlabel=f"meta-step{average}")
            axis.grid(alpha=0.25)
            axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        return save_figure(figure, path)


def _trace(axis: Axes, at: Sequence[int], values: Sequence[float], window: int, colour: str) -> None:
    if window > 1:
        axis.plot(at, values, color=colour, linewidth=0.7, alpha=0.35)
    marker = "o" if len(at) <= 20 else ""
    axis.plot(at, running_mean(values, window), color=colour, linewidth=1.8, marker=marker, markersize=3.5)


def plot_comparison(path: str | Path, results: Sequence[Result]) -> Path:
    """Draw every method's mean with its 95 % interval, best on top; see :func:`shared_core.plots.plot_comparison`.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    results : rows of a run's summary; methods that begin with ``stamp`` are highlighted

    Returns
    -------
    the path written
    """
    return _plot_comparison(path, results, ours=_is_ours)


def plot_latency(path: str | Path, table: Mapping[str, Sequence[tuple[Number, Number]]], *, title: str = "") -> Path:
    """Draw measured over predicted milliseconds; the band is a tenth to either side of a right prediction.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    table : method -> (predicted ms, measured ms) of each of its networks
    title : above the picture, such as the device and the batch size

    Returns
    -------
    the path written
    """
    table = {name: pairs for name, pairs in table.items() if len(pairs)}
    if not table:
        raise InputError("table: there is no network to draw")
    for name, pairs in table.items():
        for pair in pairs:
            if not all(math.isfinite(ms) and ms > 0 for ms in pair):
                raise InputError(f"table: {name}: milliseconds must be finite and above 0, got {pair}")
    every = np.array([ms for pairs in table.values() for pair in pairs for ms in pair], dtype=np.float64)
    low, high = float(every.min()) / 1.15, float(every.max()) * 1.15
    with drawing():
        labels = short_names([*table])
        figure = Figure(figsize=(4.9 + 0.07 * max(max(map(len, labels)) + 8, 16), 4.4), layout="constrained")
        axis = figure.subplots()
        line = np.array([low, high])
        axis.fill_between(line, 0.9 * line, 1.1 * line, color="#ECECEC", linewidth=0, zorder=0)
        axis.plot(line, line, color="black", linewidth=1.0, linestyle=":", zorder=1)
        look = _looks([*table])
        for name, label in zip(table, labels, strict=True):
            pairs = np.array(table[name], dtype=np.float64)
            colour, marker, dash = look[name]
            off = float(np.median(np.abs(pairs[:, 1] / pairs[:, 0] - 1)))
            axis.plot(
                pairs[:, 0],
                pairs[:, 1],
                linestyle="",
                marker=marker,
                color=colour,
                # The second round of colours is hollow.
                markerfacecolor=colour if dash == "-" else "white",
                markersize=7.5 if _is_ours(name) else 5.5,
                alpha=0.9,
                zorder=3 if _is_ours(name) else 2,
                label=f"{label}, {100 * off:.0f} %",
            )
        axis.set(xlabel="predicted [ms]", ylabel="measured [ms]", title=title)
        if high > 6 * low:
            axis.set(xscale="log", yscale="log")
            plain_log(axis.xaxis, low, high)
            plain_log(axis.yaxis, low, high)
        axis.set(xlim=(low, high), ylim=(low, high))
        axis.grid(alpha=0.25)
        legend = figure.legend(
            *axis.get_legend_handles_labels(), loc="outside right upper", fontsize=9, title="method, median error"
        )
        legend.get_title().set_fontsize(9)
        return save_figure(figure, path)


def _is_ours(name: str) -> bool:
    return name.startswith("stamp")


def _colour(place: int) -> str:
    return _OTHERS[place % len(_OTHERS)]


def _looks(names: Sequence[str]) -> dict[str, Look]:
    """Give each name its look: this method's own colour, the others' in turn, dashed when used up."""
    ours = [name for name in names if _is_ours(name)]
    found = {name: Look(_OURS_COLOUR, "DoPX"[k % 4], ("-", "--", "-.", ":")[k % 4]) for k, name in enumerate(ours)}
    for place, name in enumerate(name for name in names if not _is_ours(name)):
        again = place // len(_OTHERS)
        found[name] = Look(_colour(place), MARKERS[(place + again) % len(MARKERS)], ("-", "--", ":")[again % 3])
    return found


def _plain(value: float) -> str:
    """Three figures, but no power of ten."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _first_outside(values: Vector) -> float:
    return float(values[~((values >= 0) & (values <= 1))][0])
