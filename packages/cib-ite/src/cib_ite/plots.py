"""Every picture: effects, withholding, calibration, overlap, deferral, comparisons, training, sweeps over beta.

Each function writes one file, whose ending says what kind (PNG, SVG, PDF), and returns its path; the same arguments
give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike, NDArray

from cib_ite.estimator import EffectInference
from cib_ite.evaluate import CalibrationCurve
from cib_ite.metrics import DeferralCurve, Sparsification
from shared_core.errors import InputError
from shared_core.plots import COLOURS, MARKERS, QUIET, drawing, looks, save_figure
from shared_core.plots import plot_comparison as _plot_comparison
from shared_core.runs import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "plot_calibration",
    "plot_comparison",
    "plot_deferral",
    "plot_effects",
    "plot_history",
    "plot_overlap",
    "plot_sweep",
    "plot_withholding",
]

_DECISIONS = {"control": COLOURS[1], "defer": "#8A8A8A", "treat": COLOURS[0]}
_ARMS = (COLOURS[1], COLOURS[0])
_POINTS_AS_VECTORS = 2000


def plot_effects(
    path: str | Path, inference: EffectInference, decision: ArrayLike, *, cost: float = 0.0, unit: str = ""
) -> Path:
    """Draw the effect of every row with its interval, in order and coloured by decision; beside it, how they spread.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    inference : of n rows
    decision : (n,) treat, control or defer
    cost : of treating; a line is drawn there
    unit : of the outcome, for the label

    Returns
    -------
    The path.
    """
    made = np.asarray(decision)
    order = np.argsort(inference.effect, kind="stable")
    effect, place = inference.effect[order], np.arange(1, len(order) + 1)
    with drawing():
        figure = Figure(figsize=(7.6, 3.8), layout="constrained")
        axis, side = cast("Sequence[Axes]", figure.subplots(1, 2, sharey=True, width_ratios=[3.2, 1]))
        level = round(100 * (1 - inference.alpha))
        axis.fill_between(
            place,
            inference.lower[order],
            inference.upper[order],
            color="#B8B8B8",
            alpha=0.45,
            linewidth=0,
            label=f"{level} % interval",
        )
        shown = made[order]
        for name, colour in _DECISIONS.items():
            rows = shown == name
            if rows.any():
                size = float(np.clip(4000 / len(order), 3, 14))
                axis.scatter(
                    place[rows],
                    effect[rows],
                    s=size,
                    color=colour,
                    linewidths=0,
                    zorder=3,
                    label=f"{name} ({int(rows.sum())})",
                    rasterized=len(order) > _POINTS_AS_VECTORS,
                )
        for each in (axis, side):
            each.axhline(cost, color="black", linewidth=1, linestyle="--", zorder=2)
        low, high = _span(np.concatenate([inference.lower, inference.upper, [cost]]), inference.effect)
        axis.set(xlabel="rows, by estimated effect", ylabel=_with_unit("effect", unit), ylim=(low, high))
        axis.set_xlim(0.5 - 0.01 * len(order), len(order) + 0.5 + 0.01 * len(order))
        figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=4, markerscale=1.6)
        bins = np.linspace(effect[0], effect[-1], 31) if effect[0] < effect[-1] else np.array([-0.5, 0.5]) + effect[0]
        stacks = [effect[shown == name] for name in _DECISIONS]
        side.hist(stacks, bins=bins.tolist(), orientation="horizontal", stacked=True, color=list(_DECISIONS.values()))
        side.set(xlabel="rows")
        side.xaxis.set_major_locator(MaxNLocator(3, integer=True))
        return save_figure(figure, path)


def plot_withholding(
    path: str | Path,
    curves: Mapping[str, Sparsification],
    *,
    ylabel: str = "root PEHE of the rows kept",
    title: str = "",
) -> Path:
    """Draw how the error of the rows kept falls as the most uncertain are withheld.

    One method is drawn between chance and the oracle, which withholds the rows of largest error. Several are drawn in
    units of their own error with no row withheld, so that the ranking is compared and not the accuracy.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    curves : method -> curve
    ylabel : what the error is
    title : over the picture

    Returns
    -------
    The path.
    """
    if not curves:
        raise InputError("there is no withholding curve to draw; the model gives no uncertainty")
    with drawing():
        figure = Figure(figsize=(4.8, 3.6), layout="constrained")
        axis = figure.subplots()
        alone = len(curves) == 1
        colours = {name: look.colour for name, look in looks([*curves]).items()}
        for name, found in curves.items():
            keep = found.fractions <= 0.95
            x, colour = found.fractions[keep], colours[name]
            whole = 1.0 if alone or found.curve[0] <= 0 else float(found.curve[0])
            curve, oracle = found.curve[keep] / whole, found.oracle[keep] / whole
            if alone:
                axis.fill_between(x, oracle, curve, color=colour, alpha=0.1, linewidth=0)
                axis.plot(x, found.random[keep], "--", color="black", linewidth=1, label="at random")
            axis.plot(x, curve, color=colour, linewidth=2, label=name)
            dots = ":" if alone else (0, (1, 3))
            axis.plot(x, oracle, color="black" if alone else colour, linewidth=1, linestyle=dots)
            if alone:
                axis.lines[-1].set_label("by the true error")
        if not alone:
            axis.axhline(1, color="black", linewidth=1, linestyle="--", label="at random")
            axis.plot([], [], color="black", linewidth=1, linestyle=(0, (1, 3)), label="by the true error")
            ylabel = f"{ylabel}\nrelative to all rows"
        axis.set(xlabel="share of rows withheld", ylabel=ylabel, title=title, xlim=(0, 0.95), ylim=(0, None))
        axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        _legend_beside(figure, axis, inside=alone)
        return save_figure(figure, path)


def plot_calibration(
    path: str | Path, curves: Mapping[str, CalibrationCurve], *, ylabel: str = "share of true effects covered"
) -> Path:
    """Draw how often intervals cover against how often they say they do, a line for each method.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    curves : method -> coverage
    ylabel : what is covered

    Returns
    -------
    The path.
    """
    if not curves:
        raise InputError("there is no coverage to draw; it needs intervals and true effects")
    with drawing():
        figure = Figure(figsize=(4.2 if len(curves) == 1 else 5.6, 3.8), layout="constrained")
        axis = figure.subplots()
        axis.plot([0, 1], [0, 1], "--", color="black", linewidth=1, label="exact")
        looked = looks([*curves])
        for name, found in curves.items():
            colour, marker, dash = looked[name]
            axis.plot(found.nominal, found.measured, dash, marker=marker, color=colour, markersize=4, label=name)
        axis.set(xlabel="nominal level", ylabel=ylabel, xlim=(0, 1), ylim=(0, 1.02), aspect="equal")
        for line in (axis.xaxis, axis.yaxis):
            line.set_major_formatter(PercentFormatter(1, decimals=0))
        if len(curves) > 1:
            _legend_beside(figure, axis, inside=False)
        else:
            note: Any = {"color": QUIET, "fontsize": 9}
            axis.text(0.97, 0.03, "below the line:\ntoo sure of itself", ha="right", va="bottom", **note)
            axis.text(0.03, 0.97, "above:\ntoo cautious", ha="left", va="top", **note)
        return save_figure(figure, path)


def plot_overlap(
    path: str | Path,
    propensity: ArrayLike,
    treatment: ArrayLike,
    *,
    no_overlap: ArrayLike | None = None,
    rate_percentile: ArrayLike | None = None,
    bounds: tuple[float, float] = (0.05, 0.95),
) -> Path:
    """Draw the propensities of both arms back to back and, beside them, how unusual each row is.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    propensity : (n,) probability of treatment
    treatment : (n,) 0 or 1
    no_overlap : (n,) flagged rows, marked in the right panel; some are flagged for a corner that only a forest sees
    rate_percentile : (n,) percentile of the rate among training rows; None draws the left panel only
    bounds : propensities outside are flagged, and shaded

    Returns
    -------
    The path.
    """
    score, arm = np.asarray(propensity, dtype=np.float64), np.asarray(treatment)
    flagged = np.zeros(len(score), dtype=np.bool_) if no_overlap is None else np.asarray(no_overlap, dtype=np.bool_)
    with drawing():
        panels = 1 if rate_percentile is None else 2
        figure = Figure(figsize=(4.4 * panels, 3.6), layout="constrained")
        axes = cast("Sequence[Axes]", figure.subplots(1, panels, squeeze=False)[0])
        bins = np.linspace(0, 1, 41)
        tallest = 1
        for value, sign, name in ((1, 1, "treated"), (0, -1, "control")):
            rows = arm == value
            height = np.histogram(score[rows], bins)[0]
            tallest = max(tallest, int(height.max()))
            axes[0].bar(
                bins[:-1],
                sign * height,
                width=np.diff(bins),
                align="edge",
                color=_ARMS[value],
                alpha=0.85,
                linewidth=0,
                label=f"{name} ({int(rows.sum())})",
            )
        axes[0].axhline(0, color="black", linewidth=0.8)
        axes[0].set(xlabel="propensity of treatment", ylabel="rows", ylim=(-1.08 * tallest, 1.08 * tallest))
        axes[0].yaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes[0].yaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
        if rate_percentile is not None:
            percentile = np.asarray(rate_percentile, dtype=np.float64)
            for value in (0, 1):
                rows = (arm == value) & ~flagged
                axes[1].scatter(score[rows], percentile[rows], s=9, color=_ARMS[value], alpha=0.6, linewidths=0)
            if flagged.any():
                axes[1].scatter(
                    score[flagged],
                    percentile[flagged],
                    s=16,
                    marker="x",
                    color="#222222",
                    linewidths=0.9,
                    label=f"no overlap ({int(flagged.sum())})",
                )
            for dots in axes[1].collections:
                dots.set_rasterized(len(score) > _POINTS_AS_VECTORS)
            axes[1].set(xlabel="propensity of treatment", ylabel="how unusual: percentile of the rate", ylim=(-3, 103))
        for axis in axes:
            for low, high in ((0.0, bounds[0]), (bounds[1], 1.0)):
                axis.axvspan(low, high, color="#E69F00", alpha=0.18, linewidth=0, zorder=0)
            axis.set_xlim(0, 1)
            _legend_above(axis)
        return save_figure(figure, path)


def plot_deferral(path: str | Path, curves: Mapping[str, DeferralCurve], *, title: str = "") -> Path:
    """Draw the share of wrong decisions as the most doubtful rows are deferred, a line for each method.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    curves : method -> curve
    title : over the picture

    Returns
    -------
    The path.
    """
    if not curves:
        raise InputError("there is no deferral curve to draw; it needs an uncertainty and true effects")
    with drawing():
        figure = Figure(figsize=(4.8 if len(curves) == 1 else 5.8, 3.6), layout="constrained")
        axis = figure.subplots()
        looked = looks([*curves])
        for name, found in curves.items():
            look = looked[name]
            axis.plot(found.fractions, found.wrong_rate, look.dash, color=look.colour, linewidth=2, label=name)
        highest = max(float(found.wrong_rate.max()) for found in curves.values())
        axis.set(xlabel="share of rows deferred", ylabel="wrong decisions among the rest", title=title)
        axis.set(
            xlim=(0, max(float(found.fractions[-1]) for found in curves.values())), ylim=(0, 1.08 * highest or 0.01)
        )
        axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0 if highest > 0.06 else 1))
        if len(curves) > 1:
            _legend_beside(figure, axis, inside=False)
        return save_figure(figure, path)


def plot_comparison(path: str | Path, results: Sequence[Result]) -> Path:
    """Draw every method's mean with its 95 % interval, best on top; see :func:`shared_core.plots.plot_comparison`.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    results : rows of a run's summary; methods whose name starts with ``cib`` are highlighted

    Returns
    -------
    The path.
    """
    return _plot_comparison(path, results, ours=lambda name: name.lower().startswith("cib"))


def plot_history(path: str | Path, history: Sequence[Mapping[str, float]]) -> Path:
    """Draw the losses at each validation, the validation loss on its own panel.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    history : one mapping a validation with ``step``, ``validation`` and the terms of the loss, as in ``history_``

    Returns
    -------
    The path.
    """
    if not history:
        raise InputError("no validation was logged, so there is no history to draw")
    terms = [name for name in history[-1] if name not in {"step", "validation"}]
    drawn = {"validation": "validation loss"}
    words = {
        "prediction": "prediction (negative log-likelihood)",
        "rate": "rate: KL(q(z|x) ‖ N(0, I)), nats",
        "independence": "independence",
        "variance": "counterfactual variance",
        "discriminator": "discriminator",
    }
    drawn |= {name: words.get(name, name) for name in terms if any(line.get(name) for line in history)}
    with drawing():
        columns = min(len(drawn), 3)
        lines = -(-len(drawn) // columns)
        figure = Figure(figsize=(3.3 * columns, 2.3 * lines), layout="constrained")
        axes = cast("Sequence[Axes]", figure.subplots(lines, columns, squeeze=False, sharex=True).ravel())
        for place, axis in enumerate(axes):
            if place >= len(drawn):
                axis.set_axis_off()
                continue
            name = list(drawn)[place]
            points = [(line["step"], line[name]) for line in history if line.get(name) is not None]
            x, y = np.array(points).T
            axis.plot(x, y, color=COLOURS[place % len(COLOURS)], linewidth=1.6)
            if name == "validation":
                best = int(np.argmin(y))
                axis.plot(x[best], y[best], "o", color=COLOURS[1], markersize=5)
                drawn[name] += f" (least at step {int(x[best])})"
            axis.set_title(drawn[name], fontsize=9)
            axis.yaxis.set_major_locator(MaxNLocator(4))
            if place + columns >= len(drawn):
                axis.set_xlabel("step")
                axis.tick_params(labelbottom=True)
        return save_figure(figure, path)


def plot_sweep(
    path: str | Path,
    beta: ArrayLike,
    *,
    rate: ArrayLike,
    risk: ArrayLike,
    probe_auc: ArrayLike,
    risk_label: str = "root R-risk",
) -> Path:
    """Draw what compression does: kept information, error and what z tells of the treatment, against beta.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    beta : (k,) weights of the compression term, positive
    rate : (k,) mean rates in nats
    risk : (k,) errors, such as root R-risks
    probe_auc : (k,) areas under the ROC curve of a fresh probe that tells the treatment from z
    risk_label : what `risk` is

    Returns
    -------
    The path.
    """
    x = np.asarray(beta, dtype=np.float64)
    if not len(x) or x.min() <= 0:
        raise InputError("beta: a sweep is drawn on a logarithmic axis; give at least one value, all positive")
    order = np.argsort(x)
    with drawing():
        figure = Figure(figsize=(9.6, 3.1), layout="constrained")
        axes = cast("Sequence[Axes]", figure.subplots(1, 3))
        rows = ((rate, "rate, nats"), (risk, risk_label), (probe_auc, "probe's AUC for the treatment"))
        for axis, (values, label), colour, marker in zip(axes, rows, COLOURS, MARKERS, strict=False):
            y = np.asarray(values, dtype=np.float64)
            axis.plot(x[order], y[order], marker=marker, color=colour, markersize=5)
            axis.set(xscale="log", xlabel="β", ylabel=label)
            axis.grid(alpha=0.25)
        axes[0].set_ylim(0, None)
        axes[2].axhline(0.5, color="black", linewidth=1, linestyle="--")
        axes[2].annotate("tells nothing", (x.min(), 0.5), xytext=(0, 3), textcoords="offset points", fontsize=8)
        finite = np.asarray(risk, dtype=np.float64)
        best = x[int(np.nanargmin(finite))]
        for axis in axes:
            axis.axvline(best, color="#888888", linewidth=1, linestyle=":", zorder=0)
        axes[1].annotate(
            f"least at β = {best:g}",
            (best, 0.97),
            xycoords=("data", "axes fraction"),
            xytext=(4 if best < np.sqrt(x.min() * x.max()) else -4, 0),
            textcoords="offset points",
            ha="left" if best < np.sqrt(x.min() * x.max()) else "right",
            va="top",
            fontsize=8,
        )
        return save_figure(figure, path)


def _span(values: NDArray[np.float64], centre: NDArray[np.float64]) -> tuple[float, float]:
    """Limits that show all finite values, but not a few intervals that are wider by far than what they hold."""
    finite = np.concatenate([values[np.isfinite(values)], centre])
    low, high = float(finite.min()), float(finite.max())
    reach = max(float(np.ptp(centre)), 1e-9)
    cut_low, cut_high = np.quantile(finite, [0.005, 0.995])
    low = max(low, float(min(cut_low, centre.min())) - 0.25 * reach)
    high = min(high, float(max(cut_high, centre.max())) + 0.25 * reach)
    margin = 0.04 * max(high - low, 1e-9)
    return low - margin, high + margin


def _with_unit(name: str, unit: str) -> str:
    return f"{name} [{unit}]" if unit else name


def _legend_above(axis: Axes) -> None:
    handles, labels = axis.get_legend_handles_labels()
    if handles:
        axis.legend(handles, labels, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(labels), fontsize=9)


def _legend_beside(figure: Figure, axis: Axes, *, inside: bool) -> None:
    if inside:
        axis.legend(loc="lower left")
        return
    width, height = figure.get_size_inches()
    figure.set_size_inches(width + 1.2, height)
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
