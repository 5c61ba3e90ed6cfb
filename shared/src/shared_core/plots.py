"""What the pictures of all packages have in common: colours, style, files, and the comparison of methods.

The only module of the core that imports matplotlib, which is not among its dependencies: packages that draw declare it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator, StrMethodFormatter

from shared_core.errors import InputError
from shared_core.runs import Result, atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import XAxis, YAxis

__all__ = [
    "COLOURS",
    "MARKERS",
    "QUIET",
    "Look",
    "drawing",
    "legend_outside",
    "looks",
    "plain_log",
    "plot_comparison",
    "running_mean",
    "save_figure",
    "short_names",
]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#5E3C99")
"""Okabe and Ito's colours and two more, which stay apart for readers who do not see all colours."""

QUIET = "#555555"
"""The colour of what is there for orientation: thresholds, chance, limits."""

MARKERS = "osD^vPX<"
"""Markers, as many as :data:`COLOURS`."""

_DASHES = ("-", "--", ":")
_STYLE: dict[str, Any] = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": "medium",
    "figure.constrained_layout.h_pad": 0.07,
    "figure.constrained_layout.w_pad": 0.07,
    "figure.dpi": 100,
    "font.size": 10,
    "legend.frameon": False,
    "savefig.dpi": 150,
    "svg.hashsalt": "shared-core",
}
_UNDATED: dict[str, Any] = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
_LONGEST = 30


class Look(NamedTuple):
    """How one name is drawn, the same in all panels of a figure."""

    colour: str
    marker: str
    dash: str


@contextmanager
def drawing(**style: Any) -> Generator[None]:
    """Draw in the style of all packages.

    Parameters
    ----------
    style : matplotlib's parameters that differ here, with ``_`` for each ``.``

    Examples
    --------
    >>> with drawing(font_size=8):
    ...     mpl.rcParams["font.size"]
    8.0
    """
    changed: Any = {**_STYLE, **{name.replace("_", "."): value for name, value in style.items()}}
    with mpl.rc_context(changed):
        yield


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure, whole or not at all; the same figure gives the same bytes.

    Parameters
    ----------
    figure : to write
    path : whose ending says what kind: ``.png``, ``.svg`` or ``.pdf``

    Returns
    -------
    The path.

    Raises
    ------
    InputError
        For another ending.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in _UNDATED:
        raise InputError(f"{path}: cannot draw into this kind of file; use .png, .svg or .pdf")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=kind[1:], metadata=_UNDATED[kind])
    return path


def looks(names: Sequence[str]) -> dict[str, Look]:
    """Give each name a colour, a marker and a dash; the first eight differ in colour.

    Parameters
    ----------
    names : what is drawn, in the order in which colours are taken; repeated ones count once

    Examples
    --------
    >>> looks(["adam", "sgd"])["sgd"]
    Look(colour='#D55E00', marker='s', dash='-')
    """
    return {
        name: Look(
            COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)], _DASHES[place // len(COLOURS) % len(_DASHES)]
        )
        for place, name in enumerate(dict.fromkeys(names))
    }


def short_names(names: Sequence[str], longest: int = _LONGEST) -> list[str]:
    """Cut the middle out of names that would push a picture aside, and number those that look alike then.

    Parameters
    ----------
    names : of methods or data sets
    longest : letters that are kept at most

    Examples
    --------
    >>> short_names(["adam", "block-adam:grouping=input"], 11)
    ['adam', 'block…input']
    """
    half = (longest - 1) // 2
    short = [name if len(name) <= longest else f"{name[:half].rstrip()}…{name[-half:].lstrip()}" for name in names]
    alike = {label for label in short if short.count(label) > 1}
    return [f"{place + 1}: {label}" if label in alike else label for place, label in enumerate(short)]


def plain_log(axis: XAxis | YAxis, low: float, high: float) -> None:
    """Set limits and ticks 1, 2, 5, 10 ... of a logarithmic axis, written out; a short axis has even steps.

    Parameters
    ----------
    axis : ``axes.xaxis`` or ``axes.yaxis``
    low, high : smallest and largest value shown, above 0
    """
    if high / low < 1.5:
        low, high = low / 1.5, high * 1.5
    margin = (high / low) ** 0.04
    axis.axes.set(**{f"{axis.axis_name}lim": (low / margin, high * margin)})
    steps = (1.0, 2.0, 5.0) if high / low < 3000 else (1.0,)
    # Between two of these numbers there may be all of a short axis.
    axis.set_major_locator(MaxNLocator(5) if high / low < 6 else LogLocator(10, subs=steps, numticks=20))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))


def legend_outside(figure: Figure, axes: Sequence[Axes], columns: int = 4, *, below: bool = False) -> None:
    """Write one legend for all panels above or below them; each name stands in it once.

    Parameters
    ----------
    figure : of the panels, with constrained layout
    axes : panels whose labels are collected
    columns : of the legend at most; fewer where names are too long for them
    below : below instead of above
    """
    entries: dict[str, Any] = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        for handle, label in zip(handles, labels, strict=True):
            entries.setdefault(label, handle)
    if entries:
        place = "outside lower center" if below else "outside upper center"
        # About eleven small letters an inch, and eight for a line beside its name.
        fitting = int(figure.get_figwidth() * 11 / (max(map(len, entries)) + 8))
        columns = max(1, min(columns, len(entries), fitting))
        figure.legend(list(entries.values()), list(entries), loc=place, ncols=columns, fontsize="small")


def running_mean(values: Sequence[float], window: int) -> Float[np.ndarray, " n"]:
    """Return the mean of each value and up to ``window - 1`` before it.

    Parameters
    ----------
    values : such as a loss at each step
    window : how many at most, 1 or more

    Examples
    --------
    >>> running_mean([1.0, 3.0, 5.0], 2).tolist()
    [1.0, 2.0, 4.0]
    """
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(sums))
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def plot_comparison(
    path: str | Path,
    results: Sequence[Result],
    *,
    ours: Callable[[str], bool] = lambda _: False,
    leave_out: Collection[str] = (),
) -> Path:
    """Draw every method's mean with its 95 % interval, best on top: a row for each data set, a column for each metric.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    results : rows of a run's summary
    ours : says which methods are highlighted
    leave_out : metrics that belong into the table only

    Returns
    -------
    The path.

    Raises
    ------
    InputError
        When there is nothing to draw, or the path ends in none of the three.
    """
    groups: dict[tuple[str, str], list[Result]] = {}
    for row in results:
        if row.metric not in leave_out:
            groups.setdefault((row.dataset, row.metric), []).append(row)
    if not groups:
        raise InputError("the run has no results to draw")
    datasets, names = ([*dict.fromkeys(key[place] for key in groups)] for place in (0, 1))
    keys: list[tuple[str, str] | None] = [
        (data, metric) if (data, metric) in groups else None for data in datasets for metric in names
    ]
    columns = len(names)
    if len(datasets) == 1 or columns > 4 or columns == 1:
        keys = list(groups)
        columns = 2 if len(keys) in {2, 4} else min(len(keys), 3)
    lines = -(-len(keys) // columns)
    tallest = max(len(rows) for rows in groups.values())
    longest = min(_LONGEST, max(len(row.method) for rows in groups.values() for row in rows))
    with drawing():
        size = ((2.9 + 0.075 * longest) * columns, (1.2 + 0.26 * tallest) * lines)
        figure = Figure(figsize=size, layout="constrained")
        axes = cast("Sequence[Axes]", figure.subplots(lines, columns, squeeze=False).ravel())
        for axis, key in zip(axes, [*keys, *[None] * (len(axes) - len(keys))], strict=True):
            if key is None:
                axis.set_axis_off()
                continue
            _compare(axis, groups[key], ours)
            axis.set_title(key[0] if len(datasets) > 1 else "")
        if len(datasets) == 1:
            figure.suptitle(datasets[0], fontsize="medium")
        return save_figure(figure, path)


def _compare(axis: Axes, rows: Sequence[Result], ours: Callable[[str], bool]) -> None:
    better = rows[0].better
    ordered = sorted(rows, key=lambda row: row.mean, reverse=better == "lower")
    means = np.array([row.mean for row in ordered])
    ends = [end for row in ordered for end in (row.low, row.high) if end is not None]
    # One method far off must not press all others into one spot, nor must means of many sizes lie in one.
    low = float(means.min())
    log = low > 0 and float(means.max()) > min(20 * float(np.median(means)), 100 * low)
    for place, row in enumerate(ordered):
        mine = ours(row.method)
        colour = COLOURS[1] if mine else COLOURS[0]
        if row.low is not None and row.high is not None:
            # An interval that reaches 0 or below ends at the left edge of a logarithmic axis.
            low = max(row.low, means.min() / 3) if log else row.low
            axis.plot([low, row.high], [place, place], color=colour, linewidth=2.4, alpha=0.55, solid_capstyle="butt")
        axis.plot(row.mean, place, "D" if mine else "o", color=colour, markersize=5.5)
    axis.set_yticks(range(len(ordered)), short_names([row.method for row in ordered]))
    for label, row in zip(axis.get_yticklabels(), ordered, strict=True):
        if ours(row.method):
            label.set_fontweight("bold")
    if log:
        axis.set_xscale("log")
        low, high = float(means.min()), float(max([means.max(), *ends]))
        if high < 100 * low:
            plain_log(axis.xaxis, low / 1.2, high)
        axis.xaxis.set_minor_formatter(NullFormatter())
    else:
        # Long numbers would run into each other.
        axis.xaxis.set_major_locator(MaxNLocator(5 if max(abs(means)) < 10_000 else 3))
    metric, unit = rows[0].metric, rows[0].unit
    if unit not in {"1", "", *metric.split()}:
        metric += f" [{unit}]"
    # Panels are as wide as numbers need, which some metrics' names are not.
    axis.set_xlabel(f"{metric}{chr(10) if len(metric) > 20 else ' '}({better} is better)")
    axis.set_ylim(-0.6, len(ordered) - 0.4)
    axis.grid(axis="x", alpha=0.3)
