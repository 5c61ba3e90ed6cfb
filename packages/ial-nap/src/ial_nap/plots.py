"""Every picture: comparisons, what counts in an instance, attention, learning curves, calibration, faith, agreement.

Each function writes one file, whose ending says what kind (PNG, SVG, PDF); the same arguments give the same bytes.
Signed numbers go from blue over white, which is exactly 0, to orange: readers who do not see all colours can follow.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast, runtime_checkable

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike, NDArray

from ial_nap.choices import written
from shared_core import plots as shared
from shared_core.errors import InputError
from shared_core.plots import COLOURS, QUIET, drawing, legend_outside, looks, save_figure, short_names
from shared_core.runs import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "DIVERGING",
    "EpochLike",
    "RoundLike",
    "plot_agreement",
    "plot_attention",
    "plot_comparison",
    "plot_contributions",
    "plot_curve",
    "plot_faithfulness",
    "plot_gates",
    "plot_history",
    "plot_intervals",
    "plot_reliability",
]

_MOST_ROWS = 40
_MOST_COLUMNS = 24

_POINTS = [(0.0, "#0B5A94"), (0.25, "#62A8D8"), (0.5, "#FFFFFF"), (0.75, "#EA9433"), (1.0, "#A34E00")]
# An odd number of colours has one in the middle.
DIVERGING = LinearSegmentedColormap.from_list("ial-nap-diverging", _POINTS, N=257)
"""Blue below 0, white at 0, orange above; for limits that are symmetric about 0."""

_RISING = LinearSegmentedColormap.from_list("ial-nap-rising", ["#FFFFFF", "#B79FDB", "#5E3C99"])

Array = NDArray[np.float64]


@runtime_checkable
class EpochLike(Protocol):
    """What is known after an epoch of training."""

    @property
    def epoch(self) -> int:
        """Its number, from 1."""
        ...

    @property
    def loss(self) -> float:
        """Mean of the objective."""
        ...

    @property
    def validation(self) -> float:
        """Loss on validation series; NaN without them."""
        ...

    @property
    def is_best(self) -> bool:
        """Whether the validation loss was the best so far."""
        ...


@runtime_checkable
class RoundLike(Protocol):
    """Where a method stands after a round of annotation."""

    @property
    def cells(self) -> int:
        """Verdicts so far."""
        ...

    @property
    def score(self) -> float:
        """On held-out series."""
        ...

    @property
    def seconds(self) -> float:
        """What learning from this round's verdicts took; of round 0, the first training."""
        ...


# ---- comparisons


def plot_comparison(path: str | Path, results: Sequence[Result]) -> None:
    """Draw every method's mean with its 95 % interval, best on top: a row for each data set, a column for each metric.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    results : rows of a run's summary; methods whose name begins with ``ial-nap`` are highlighted

    Raises
    ------
    InputError
        When there is nothing to draw.
    """
    shared.plot_comparison(path, results, ours=lambda method: method.startswith("ial-nap"))


def plot_history(path: str | Path, histories: Mapping[str, Sequence[EpochLike]]) -> None:
    """Draw the objective on training series and its value on validation series over epochs; a ring marks the best.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    histories : of each training, by name

    Raises
    ------
    InputError
        When no epoch was taken.
    """
    kept = {name: list(epochs) for name, epochs in histories.items() if len(epochs)}
    if not kept:
        raise InputError("no epoch was taken, so there is no history to draw")
    with drawing():
        figure = Figure(figsize=(7.2, 3.4), layout="constrained")
        axis = figure.subplots()
        look = _looks(kept)
        for name, epochs in kept.items():
            colour, label = look[name].colour, look[name].label
            prefix = f"{label}, " if len(kept) > 1 else ""
            at = [epoch.epoch for epoch in epochs]
            axis.plot(at, [e.loss for e in epochs], "-", color=colour, linewidth=1.4, label=f"{prefix}training")
            checked = [e for e in epochs if np.isfinite(e.validation)]
            if checked:
                x, y = [e.epoch for e in checked], [e.validation for e in checked]
                axis.plot(x, y, "--", color=colour, linewidth=1.4, label=f"{prefix}validation")
                best = min(range(len(y)), key=y.__getitem__)
                axis.plot(x[best], y[best], "o", color=colour, markersize=8, fillstyle="none")
        axis.set(xlabel="epoch", ylabel="objective")
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axis.grid(alpha=0.25)
        legend_outside(figure, [axis], 4)
        save_figure(figure, path)


# ---- what counts in an instance


def plot_contributions(
    path: str | Path,
    contributions: Mapping[str, ArrayLike],
    *,
    features: Sequence[str],
    steps: Sequence[str],
    values: ArrayLike | None = None,
    units: Sequence[str] = (),
    uncertain: ArrayLike | None = None,
    verdicts: ArrayLike | None = None,
    title: str = "",
) -> None:
    """Draw what each cell adds to the prediction, one map beside the other, as before and after a correction.

    All maps share one colour scale, which is symmetric about 0. The features with the largest share come first; beyond
    40 the rest is left out, which the picture says.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    contributions : maps by title, each ``(t, r)``
    features, steps : names
    values : to print into the cells of the last map, ``(t, r)``, in the user's units; NaN where there is none
    units : one per feature, or none
    uncertain : cells to hatch in the last map, ``(t, r)`` of true and false
    verdicts : marks in the last map, ``(t, r)`` of 1 (attend), 0 (do not) and -1 (none)
    title : of the picture

    Raises
    ------
    InputError
        For arrays that are not ``(t, r)``.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "cells.svg"
    >>> plot_contributions(path, {"before": [[1.0, -0.5]]}, features=["LDL", "HDL"], steps=["2009"])
    >>> path.exists()
    True
    """
    shape = len(steps), len(features)
    maps = {name: _cells(f"contributions of '{name}'", cells, shape) for name, cells in contributions.items()}
    if not maps:
        raise InputError("contributions: give at least one map")
    shown = None if values is None else _cells("values", values, shape)
    hatched = None if uncertain is None else _cells("uncertain", uncertain, shape)
    marks = None if verdicts is None else _cells("verdicts", verdicts, shape)
    weight = np.sum([np.nan_to_num(np.abs(cells)).sum(0) for cells in maps.values()], axis=0)
    rows: list[int] = np.argsort(-weight, kind="stable")[:_MOST_ROWS].tolist()
    limit = max(float(np.nanmax(np.abs(cells), initial=0.0)) for cells in maps.values()) or 1.0
    names = short_names([f"{features[d]} [{units[d]}]" if units and units[d] else features[d] for d in rows])
    with drawing(hatch_linewidth=0.6):
        text = shape[0] <= _MOST_COLUMNS
        width = max(0.52 if text and shown is not None else 0.34, 2.2 / shape[0]) * min(shape[0], 30)
        size = (1.9 + 0.062 * max(map(len, names)) + (width + 0.35) * len(maps), 1.5 + 0.27 * len(rows))
        figure = Figure(figsize=size, layout="constrained")
        axes = cast("Sequence[Axes]", figure.subplots(1, len(maps), sharey=True, squeeze=False)[0])
        for place, (axis, (name, cells)) in enumerate(zip(axes, maps.items(), strict=True)):
            last = place == len(maps) - 1
            axis.imshow(cells[:, rows].T, cmap=DIVERGING, vmin=-limit, vmax=limit, aspect="auto")
            _grid(axis, names if place == 0 else None, steps)
            axis.set_title(short_names([name])[0])
            if not last:
                continue
            for (k, t), cell in np.ndenumerate(cells[:, rows].T):
                if hatched is not None and hatched[t, rows[k]] > 0:
                    axis.add_patch(
                        Rectangle(
                            (t - 0.5, k - 0.5), 1, 1, fill=False, hatch="////", edgecolor="#00000055", linewidth=0
                        )
                    )
                said = -1 if marks is None else int(marks[t, rows[k]])
                if said >= 0:
                    colour = "#000000"
                    axis.add_patch(
                        Rectangle(
                            (t - 0.45, k - 0.42), 0.9, 0.84, fill=False, edgecolor=colour, linewidth=1.3,
                            linestyle="-" if said else ":",
                        )
                    )  # fmt: skip
                    if said == 0:
                        axis.plot([t - 0.45, t + 0.45], [k + 0.42, k - 0.42], color=colour, linewidth=0.9)
                if shown is not None and text and np.isfinite(shown[t, rows[k]]):
                    colour = "white" if abs(cell) > 0.72 * limit else "black"
                    axis.text(t, k, f"{shown[t, rows[k]]:.3g}", ha="center", va="center", fontsize=7.5, color=colour)
        thin = max(20.0, 2.2 * len(rows))
        bar = figure.colorbar(ScalarMappable(Normalize(-limit, limit), DIVERGING), ax=list(axes), pad=0.02, aspect=thin)
        bar.set_label("adds to the prediction")
        bar.locator = MaxNLocator(5)
        bar.update_ticks()
        notes = [title] if title else []
        if len(rows) < shape[1]:
            notes.append(f"{len(rows)} of {shape[1]} features, those with the largest share")
        if notes:
            figure.suptitle("\n".join(notes), fontsize="medium")
        save_figure(figure, path)


def plot_attention(
    path: str | Path,
    alpha: ArrayLike,
    beta: ArrayLike,
    *,
    features: Sequence[str],
    steps: Sequence[str],
    alpha_deviation: ArrayLike | None = None,
    gate: ArrayLike | None = None,
    title: str = "",
) -> None:
    """Draw the weight of each step, and of each feature at each step; with the gate, what lets a feature in at all.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    alpha : ``(t,)``, sums to 1
    beta : ``(t, r)``, signed
    features, steps : names
    alpha_deviation : standard deviation of alpha over draws, ``(t,)``
    gate : ``(t, r)`` within 0 and 1
    title : of the picture

    Raises
    ------
    InputError
        For arrays of other shapes.
    """
    shape = len(steps), len(features)
    weight, cells = _vector("alpha", alpha, shape[0]), _cells("beta", beta, shape)
    spread = None if alpha_deviation is None else _vector("alpha_deviation", alpha_deviation, shape[0])
    gates = None if gate is None else _cells("gate", gate, shape)
    rows: list[int] = np.argsort(-np.nan_to_num(np.abs(cells)).sum(0), kind="stable")[:_MOST_ROWS].tolist()
    limit = float(np.nanmax(np.abs(cells), initial=0.0)) or 1.0
    names = short_names([features[d] for d in rows])
    maps: list[tuple[str, Array, Any, tuple[float, float]]] = [
        ("weight of features (beta)", cells, DIVERGING, (-limit, limit))
    ]
    if gates is not None:
        maps.append(("gate (0: excluded)", gates, _RISING, (0.0, 1.0)))
    with drawing():
        width = max(0.34 * min(shape[0], 30), 2.6)
        size = (1.2 + 0.062 * max(map(len, names)) + (width + 0.9) * len(maps), 2.6 + 0.25 * len(rows))
        figure = Figure(figsize=size, layout="constrained")
        heights = [1.1, max(1.2, 0.25 * len(rows))]
        axes: Any = figure.subplots(2, len(maps), squeeze=False, sharex="col", height_ratios=heights)
        top: Axes = axes[0, 0]
        top.bar(range(shape[0]), weight, color=COLOURS[0], width=0.7)
        if spread is not None:
            top.errorbar(range(shape[0]), weight, spread, fmt="none", ecolor=QUIET, capsize=2, linewidth=1)
        top.set_ylabel("weight of\nsteps (alpha)")
        top.set_ylim(0, None)
        top.yaxis.set_major_locator(MaxNLocator(3))
        top.tick_params(which="both", bottom=False, labelbottom=False)
        for axis in axes[0, 1:]:
            axis.set_axis_off()
        for place, (name, values, colours, limits) in enumerate(maps):
            axis = axes[1, place]
            axis.imshow(values[:, rows].T, cmap=colours, vmin=limits[0], vmax=limits[1], aspect="auto")
            _grid(axis, names if place == 0 else None, steps)
            if place:
                axis.set_yticks([])
            bar = figure.colorbar(
                ScalarMappable(Normalize(*limits), colours), ax=axis, location="bottom", pad=0.04,
                fraction=min(0.15, 0.4 / size[1]), aspect=max(20.0, 7 * width),
            )  # fmt: skip
            bar.set_label(name)
            bar.locator = MaxNLocator(4)
            bar.update_ticks()
        if title:
            figure.suptitle(title, fontsize="medium")
        save_figure(figure, path)


def plot_gates(
    path: str | Path,
    before: ArrayLike,
    after: ArrayLike,
    *,
    features: Sequence[str],
    steps: Sequence[str],
) -> None:
    """Draw how far verdicts moved the gate of each cell: orange opened, blue closed, a cross where it is exactly shut.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    before, after : gates ``(t, r)`` within 0 and 1
    features, steps : names

    Raises
    ------
    InputError
        For arrays that are not ``(t, r)``.
    """
    shape = len(steps), len(features)
    old, new = _cells("before", before, shape), _cells("after", after, shape)
    moved = new - old
    rows: list[int] = np.argsort(-np.abs(moved).sum(0), kind="stable")[:_MOST_ROWS].tolist()
    names = short_names([features[d] for d in rows])
    with drawing():
        width = max(0.34 * min(shape[0], 30), 2.4)
        figure = Figure(
            figsize=(2.0 + 0.062 * max(map(len, names)) + width, 1.5 + 0.25 * len(rows)), layout="constrained"
        )
        axis = figure.subplots()
        axis.imshow(moved[:, rows].T, cmap=DIVERGING, vmin=-1, vmax=1, aspect="auto")
        for k, t in np.argwhere(new[:, rows].T == 0):
            axis.plot(t, k, "x", color="white", markersize=5, markeredgewidth=1.2)
        _grid(axis, names, steps)
        bar = figure.colorbar(ScalarMappable(Normalize(-1, 1), DIVERGING), ax=axis, pad=0.02)
        bar.set_label("change of the gate")
        save_figure(figure, path)


def _grid(axis: Axes, names: Sequence[str] | None, steps: Sequence[str]) -> None:
    """Name the rows and as many steps as have room, and draw thin lines between cells."""
    every = -(-len(steps) // 10)
    shown = list(range(0, len(steps), every))
    labels = short_names([steps[t] for t in shown])
    longest = max(map(len, labels))
    crowded = longest * len(shown) > 4.2 * min(len(steps), 30) + 8
    axis.set_xticks(shown, labels, rotation=90 if crowded else 0, fontsize=8)
    if names is not None:
        axis.set_yticks(range(len(names)), names, fontsize=8.5)
    axis.tick_params(length=0)
    for side in ("left", "bottom"):
        axis.spines[side].set_visible(False)
    if len(steps) <= 60:
        axis.set_xticks(np.arange(len(steps) + 1) - 0.5, minor=True)
        lines = len(names) if names is not None else round(axis.get_ylim()[0] + 0.5)
        axis.set_yticks(np.arange(lines + 1) - 0.5, minor=True)
        axis.grid(which="minor", color="#d8dce3", linewidth=0.7)
        axis.tick_params(which="minor", length=0)
    axis.set_xlabel("step")


# ---- learning


def plot_curve(
    path: str | Path,
    rounds: Mapping[str, Sequence[Sequence[RoundLike]]],
    *,
    metric: str = "score",
    better: str = "higher",
    title: str = "",
) -> None:
    """Draw the score over verdicts given, and over the seconds that learning from them took.

    Lines are means over seeds, with a band of two standard errors; dots are rounds. A method that does not learn from
    verdicts is a level line, drawn where others have points.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    rounds : by method, of each seed its rounds; the first is before any verdict
    metric : name of the score
    better : ``higher`` or ``lower``
    title : of the picture

    Raises
    ------
    InputError
        Without rounds, or for seeds with different numbers of them.
    """
    kept = {name: [list(run) for run in runs if len(run)] for name, runs in rounds.items()}
    kept = {name: runs for name, runs in kept.items() if runs}
    if not kept:
        raise InputError("there are no rounds to draw")
    for name, runs in kept.items():
        if len({len(run) for run in runs}) > 1:
            raise InputError(f"rounds of '{name}': as many for every seed, got {[len(run) for run in runs]}")
    # Few verdicts are given in a round and a training may take a thousand times as long: seconds need a log axis.
    with drawing():
        columns = min(4, len(kept))
        figure = Figure(figsize=(9.4, 3.7 + 0.22 * -(-len(kept) // columns)), layout="constrained")
        axes = cast("Sequence[Axes]", figure.subplots(1, 2, sharey=True))
        positive: list[float] = []
        shown, every = written(metric), _looks(kept)
        for name, runs in kept.items():
            look = every[name]
            scores = shown.factor * np.array([[one.score for one in run] for run in runs], np.float64)
            cells = np.array([[one.cells for one in run] for run in runs], np.float64).mean(0)
            spent = np.array([np.cumsum([one.seconds for one in run[1:]]) for run in runs], np.float64).mean(0)
            mean = scores.mean(0)
            error = 2 * scores.std(0, ddof=1) / np.sqrt(len(runs)) if len(runs) > 1 else np.zeros_like(mean)
            ours = name.startswith("ial-nap")
            style: Any = {
                "color": look.colour, "linewidth": 2.0 if ours else 1.3, "linestyle": look.dash,
                "marker": look.marker, "markersize": 5, "label": look.label,
            }  # fmt: skip
            axes[0].plot(cells, mean, **style)
            axes[0].fill_between(cells, mean - error, mean + error, color=look.colour, alpha=0.13, linewidth=0)
            # What takes no time does not learn: it stays out, and the axis stays short.
            at = spent > 1e-4
            if at.any():
                axes[1].plot(spent[at], mean[1:][at], **style)
                positive += spent[at].tolist()
        if positive and max(positive) > 20 * min(positive):
            axes[1].set_xscale("log")
        label = shown.name if shown.unit == "1" else f"{shown.name} [{shown.unit}]"
        axes[0].set(xlabel="verdicts on cells", ylabel=f"{label} ({better} is better)")
        axes[1].set(xlabel="seconds of learning from verdicts, all rounds so far")
        axes[0].xaxis.set_major_locator(MaxNLocator(6, integer=True))
        for axis in axes:
            axis.grid(alpha=0.25)
        if title:
            figure.suptitle(title, fontsize="medium")
        legend_outside(figure, axes[:1], columns, below=True)
        save_figure(figure, path)


# ---- how far predictions and explanations can be trusted


def plot_reliability(path: str | Path, answers: Mapping[str, tuple[ArrayLike, ArrayLike]], *, bins: int = 10) -> None:
    """Draw how often what was predicted with a probability came true, and how often each probability was given.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    answers : by name, probabilities within 0 and 1 and outcomes 0 or 1, of the same shape
    bins : equal parts of 0 to 1

    Raises
    ------
    InputError
        For nothing to draw, other shapes, and numbers out of range.
    """
    if not answers:
        raise InputError("there are no predictions to draw")
    with drawing():
        figure = Figure(figsize=(5.0, 5.2), layout="constrained")
        top, below = cast("Sequence[Axes]", figure.subplots(2, 1, height_ratios=[3, 1], sharex=True))
        top.plot([0, 1], [0, 1], color=QUIET, linewidth=1, linestyle=":")
        edges = np.linspace(0, 1, bins + 1)
        for (name, (given, seen)), look in zip(answers.items(), _looks(answers).values(), strict=True):
            p, y = np.asarray(given, np.float64).ravel(), np.asarray(seen, np.float64).ravel()
            if len(p) != len(y) or not len(p):
                raise InputError(f"'{name}': give an outcome for each probability, got {len(y)} for {len(p)}")
            if not ((p >= 0) & (p <= 1) & ((y == 0) | (y == 1))).all():
                raise InputError(f"'{name}': probabilities are within 0 and 1, outcomes 0 or 1")
            at = np.minimum((p * bins).astype(np.int64), bins - 1)
            count = np.bincount(at, minlength=bins)
            kept = count > 0
            total, came = np.bincount(at, p, bins)[kept], np.bincount(at, y, bins)[kept]
            x, share, n = total / count[kept], came / count[kept], count[kept]
            half = 1.96 * np.sqrt(np.maximum(share * (1 - share), 0.25 / n) / n)
            top.errorbar(
                x, share, half, color=look.colour, marker=look.marker, markersize=5, linewidth=1.4,
                elinewidth=0.8, label=f"{look.label} (n = {len(p):,})",
            )  # fmt: skip
            below.stairs(count / len(p), edges, color=look.colour, linewidth=1.4)
        top.set(ylabel="share that came true", xlim=(0, 1), ylim=(-0.02, 1.02))
        below.set(xlabel="predicted probability", ylabel="share of\npredictions")
        below.yaxis.set_major_locator(MaxNLocator(3))
        for axis in (top, below):
            axis.grid(alpha=0.25)
        legend_outside(figure, [top], 2)
        save_figure(figure, path)


def plot_intervals(path: str | Path, answers: Mapping[str, tuple[ArrayLike, ArrayLike, ArrayLike]]) -> None:
    """Draw predictions of a number against what came, and how many of the intervals of each level hold it.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    answers : by name, means, standard deviations and outcomes, ``(n,)`` each

    Raises
    ------
    InputError
        For nothing to draw, or other shapes.
    """
    if not answers:
        raise InputError("there are no predictions to draw")
    normal, levels = NormalDist(), np.linspace(0.05, 0.95, 19).tolist()
    with drawing():
        figure = Figure(figsize=(8.6, 4.2), layout="constrained")
        left, right = cast("Sequence[Axes]", figure.subplots(1, 2))
        ends: list[float] = []
        for (means, deviations, seen), look in zip(answers.values(), _looks(answers).values(), strict=True):
            mean = _vector("means", means)
            spread = _vector("deviations", deviations, len(mean))
            outcome = _vector("outcomes", seen, len(mean))
            left.plot(outcome, mean, look.marker, color=look.colour, markersize=3, alpha=0.5, label=look.label)
            off = np.abs(outcome - mean)
            held = [float((off <= normal.inv_cdf(0.5 + level / 2) * spread).mean()) for level in levels]
            right.plot(levels, held, color=look.colour, marker=look.marker, markersize=4, linewidth=1.3)
            ends += [outcome.min(), outcome.max()]
        left.plot([min(ends), max(ends)], [min(ends), max(ends)], color=QUIET, linewidth=1, linestyle=":")
        right.plot([0, 1], [0, 1], color=QUIET, linewidth=1, linestyle=":")
        left.set(xlabel="what came", ylabel="predicted")
        right.set(xlabel="level of the interval", ylabel="share of intervals that hold it", xlim=(0, 1), ylim=(0, 1))
        for axis in (left, right):
            axis.grid(alpha=0.25)
        legend_outside(figure, [left], 4)
        save_figure(figure, path)


def plot_faithfulness(path: str | Path, curves: Mapping[str, Mapping[str, ArrayLike]]) -> None:
    """Draw how the prediction changes as cells are taken away or put in, those of the largest share first.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    curves : by kind (a panel each, such as ``deletion``), by order (a line each, such as ``contributions``), the mean
        prediction after each share of cells, from none to all, evenly spaced

    Raises
    ------
    InputError
        When there is nothing to draw.
    """
    if not curves or not all(curves.values()):
        raise InputError("there are no curves to draw")
    every = _looks([order for panel in curves.values() for order in panel])
    with drawing():
        figure = Figure(figsize=(0.8 + 3.8 * len(curves), 3.7), layout="constrained")
        axes = cast("Sequence[Axes]", figure.subplots(1, len(curves), sharey=True, squeeze=False)[0])
        for axis, (kind, panel) in zip(axes, curves.items(), strict=True):
            for order, given in panel.items():
                look = every[order]
                values = _vector(f"{kind}, {order}", given)
                at = np.linspace(0, 1, len(values))
                axis.plot(at, values, look.dash, color=look.colour, linewidth=1.7, label=look.label)
            axis.set(xlabel="share of cells", title=kind, xlim=(0, 1))
            axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            axis.xaxis.set_major_locator(MaxNLocator(4))
            axis.grid(alpha=0.25)
        axes[0].set_ylabel("mean output for what is predicted")
        legend_outside(figure, [axes[0]], 4)
        save_figure(figure, path)


def plot_agreement(path: str | Path, people: Sequence[str], kappas: ArrayLike, counts: ArrayLike) -> None:
    """Draw Cohen's kappa of every two annotators, with the number of cells that both have judged.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    people : names
    kappas : ``(n, n)``, within -1 and 1; NaN where there is none
    counts : ``(n, n)`` of cells

    Raises
    ------
    InputError
        For fewer than two people, or arrays of other shapes.
    """
    if len(people) < 2:
        raise InputError(f"agreement is between two people at least, got {len(people)}")
    shape = len(people), len(people)
    kappa, both = _cells("kappas", kappas, shape), _cells("counts", counts, shape)
    names = short_names(people)
    with drawing():
        longest = max(map(len, names))
        side, room = max(1.7, 0.8 * len(people)), 0.085 * longest
        upright = longest > 9
        figure = Figure(figsize=(1.5 + side + room, 0.6 + side + (room if upright else 0)), layout="constrained")
        axis = figure.subplots()
        off = np.where(np.eye(len(people), dtype=bool), np.nan, kappa)
        axis.imshow(np.nan_to_num(off), cmap=DIVERGING, vmin=-1, vmax=1, aspect="auto")
        for (i, j), value in np.ndenumerate(off):
            if i == j:
                axis.add_patch(Rectangle((i - 0.5, i - 0.5), 1, 1, facecolor="#E8EAEE", linewidth=0))
                continue
            said = f"{value:.2f}".replace("-", "\u2212") if np.isfinite(value) else "\u2013"
            colour = "white" if np.isfinite(value) and abs(value) > 0.72 else "black"
            axis.text(j, i, f"{said}\n{int(both[i, j])} cells", ha="center", va="center", fontsize=8, color=colour)
        axis.set_xticks(range(len(people)), names, rotation=90 if upright else 0, fontsize=9)
        axis.set_yticks(range(len(people)), names, fontsize=9)
        for spine in axis.spines.values():
            spine.set_visible(False)
        axis.tick_params(length=0)
        bar = figure.colorbar(ScalarMappable(Normalize(-1, 1), DIVERGING), ax=axis, pad=0.03)
        bar.set_label("Cohen's kappa")
        save_figure(figure, path)


# ---- helpers


class _Look(NamedTuple):
    colour: str
    marker: str
    dash: str
    label: str


def _looks(names: Iterable[str]) -> dict[str, _Look]:
    """Say how each name is drawn, and what it is called where there is little room."""
    found = looks(list(names))
    return {
        name: _Look(*look, label)
        for (name, look), label in zip(found.items(), short_names(list(found), 34), strict=True)
    }


def _cells(name: str, values: ArrayLike, shape: tuple[int, int]) -> Array:
    found = np.asarray(values, dtype=np.float64)
    if found.shape != shape:
        raise InputError(f"{name}: needs shape {shape}, got {found.shape}")
    return found


def _vector(name: str, values: ArrayLike, length: int | None = None) -> Array:
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or not len(found) or not np.isfinite(found).all():
        raise InputError(f"{name}: needs one finite number each, (n,), got {found.shape}")
    if length is not None and len(found) != length:
        raise InputError(f"{name}: needs {length} numbers, got {len(found)}")
    return found
