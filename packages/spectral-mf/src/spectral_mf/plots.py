"""Every picture: errors by coupling strength, opinions about a log Z and what is certain, times, models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

import shared_core.plots as core
from shared_core.errors import InputError
from shared_core.plots import COLOURS, drawing, looks, save_figure
from shared_core.runs import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Opinion", "plot_comparison", "plot_curves", "plot_marginals", "plot_model", "plot_opinions"]

_OURS = ("spectral", "modes", "ais-modes")
# Errors of methods that are exact where they can be: nothing would be seen of others beside 0 or rounding.
_SMALLEST = 1e-4


@dataclass(frozen=True)
class Opinion:
    """What one method says of log Z: its value, its standard error or None, and its own bounds."""

    method: str
    value: float
    std_error: float | None = None
    lower: float = -np.inf
    upper: float = np.inf


def plot_opinions(
    path: str | Path,
    panels: Mapping[str, Sequence[Opinion]],
    *,
    certain: Mapping[str, tuple[float, float]] | None = None,
    truth: Mapping[str, float] | None = None,
) -> Path:
    """Draw what each method says of one log Z, the certified interval, and the truth where it is known.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    panels : model -> opinions
    certain : model -> (lower, upper), drawn as a band
    truth : model -> exact log Z

    Returns
    -------
    The path.
    """
    if not panels or not any(panels.values()):
        raise InputError("there is no estimate to draw")
    certain, truth = certain or {}, truth or {}
    with drawing():
        tallest = max(len(opinions) for opinions in panels.values())
        figure = Figure(figsize=(5.4 * len(panels), 1.5 + 0.27 * tallest), layout="constrained")
        axes = cast("Sequence[Axes]", figure.subplots(1, len(panels), squeeze=False)[0])
        for axis, (name, opinions) in zip(axes, panels.items(), strict=True):
            centre = truth.get(name)
            low, high = certain.get(name, (-np.inf, np.inf))
            ordered = sorted(
                opinions, key=lambda o: -abs(o.value - (centre if centre is not None else _middle(opinions)))
            )
            left, right = _window([o.value for o in opinions], low, high, centre)
            if np.isfinite(low) and np.isfinite(high):
                axis.axvspan(
                    max(low, left), min(high, right), color=COLOURS[2], alpha=0.13, label="certain: log Z is in here"
                )
                for end in (low, high):
                    if left <= end <= right:
                        axis.axvline(end, color=COLOURS[2], linewidth=1)
            if centre is not None:
                axis.axvline(centre, color="black", linewidth=1, linestyle="--", label="exact")
            for place, opinion in enumerate(ordered):
                x = min(max(opinion.value, left), right)
                outside = x != opinion.value
                marker = "<" if opinion.value < left else ">" if opinion.value > right else "o"
                if opinion.std_error and not outside:
                    axis.errorbar(x, place, xerr=1.96 * opinion.std_error, color=COLOURS[0], capsize=2, linewidth=1)
                axis.plot(x, place, marker, color=COLOURS[1 if outside else 0], markersize=5)
                if outside:
                    axis.annotate(
                        f"{opinion.value:.1f}",
                        (x, place),
                        xytext=(7 if marker == "<" else -7, 0),
                        textcoords="offset points",
                        ha="left" if marker == "<" else "right",
                        va="center",
                        fontsize="small",
                        color=COLOURS[1],
                    )
            axis.set_yticks(range(len(ordered)), [o.method for o in ordered])
            margin = 0.03 * (right - left)
            axis.set(title=name, xlabel="log Z (nats)", xlim=(left - margin, right + margin))
            axis.set_ylim(-0.7, len(ordered) - 0.3)
            axis.grid(axis="x", alpha=0.3)
            if axis.get_legend_handles_labels()[0]:
                axis.legend(loc="lower left", bbox_to_anchor=(0, 1.08), ncols=2, fontsize="small")
        return save_figure(figure, path)


def _middle(opinions: Sequence[Opinion]) -> float:
    return float(np.median([o.value for o in opinions]))


def _window(values: Sequence[float], low: float, high: float, centre: float | None) -> tuple[float, float]:
    """Range that shows what is near: far-off values are drawn at its edge."""
    middle = centre if centre is not None else float(np.median(values))
    distance = np.abs(np.array(values) - middle)
    near = float(np.quantile(distance, 0.6)) * 1.5
    certain = [abs(end - middle) for end in (low, high) if np.isfinite(end)]
    reach = max([near, 0.5, *[c * 1.15 for c in certain if c < 12 * max(near, 0.5)]])
    return middle - reach, middle + reach


def plot_curves(
    path: str | Path,
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    xlabel: str,
    ylabel: str,
    floor: float | None = None,
    log_x: bool = True,
    title: str | None = None,
) -> Path:
    """Draw a line a method: error against coupling strength, or seconds against the number of spins.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    curves : method -> (x, y)
    xlabel, ylabel, title : texts
    floor : smaller values are drawn here
    log_x : logarithmic x axis

    Returns
    -------
    The path.
    """
    if not curves:
        raise InputError("there is no curve to draw")
    with drawing():
        figure = Figure(figsize=(7.2, 4.4), layout="constrained")
        axis = figure.subplots()
        look = looks([*curves])
        for name, (x, y) in curves.items():
            values = np.asarray(y, dtype=np.float64)
            if floor is not None:
                values = np.maximum(values, floor)
            axis.plot(
                x,
                values,
                marker=look[name].marker,
                color=look[name].colour,
                linestyle=look[name].dash,
                linewidth=2.2 if name.startswith(_OURS) else 1.2,
                markersize=4,
                label=name,
            )
        axis.set(xlabel=xlabel, ylabel=ylabel, yscale="log")
        if title:
            axis.set_title(title)
        if log_x:
            axis.set_xscale("log")
        axis.grid(alpha=0.3, which="major")
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
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
    drawn = [
        row.model_copy(update={"mean": max(row.mean, _SMALLEST)}) if row.metric.startswith("error") else row
        for row in results
    ]
    return core.plot_comparison(path, drawn, ours=lambda name: name.startswith(_OURS))


def plot_model(
    path: str | Path, A: Float[np.ndarray, "n n"], b: Float[np.ndarray, " n"], names: Sequence[str] | None = None
) -> Path:
    """Draw couplings as a matrix and fields beside it.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    A : (n, n) couplings
    b : (n,) fields
    names : of the spins

    Returns
    -------
    The path.
    """
    with drawing():
        figure = Figure(figsize=(7.4, 5.2), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[5, 1.3])
        size = float(np.abs(A).max()) or 1.0
        image = left.imshow(A, cmap="RdBu_r", vmin=-size, vmax=size)
        left.spines[:].set_visible(True)
        left.set(title="couplings", xlabel="spin", ylabel="spin")
        figure.colorbar(image, ax=left, shrink=0.8, label="A_ij")
        n = len(b)
        right.barh(range(n), b, color=np.where(b >= 0, COLOURS[1], COLOURS[0]))
        right.axvline(0, color="black", linewidth=0.8)
        right.set_ylim(n - 0.5, -0.5)
        right.set(title="fields", xlabel="b_i")
        if names is not None and n <= 40:
            left.set_yticks(range(n), names, fontsize="x-small")
            left.set_xticks(range(n), names, fontsize="x-small", rotation=90)
            left.set(xlabel="", ylabel="")
            right.set_yticks([])
        return save_figure(figure, path)


def plot_marginals(path: str | Path, means: Mapping[str, Float[np.ndarray, " n"]]) -> Path:
    """Draw E[x_i] by spin, a series a method.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    means : method -> (n,) means

    Returns
    -------
    The path.
    """
    with drawing():
        figure = Figure(figsize=(7.2, 3.4), layout="constrained")
        axis = figure.subplots()
        look = looks([*means])
        for name, values in means.items():
            axis.plot(values, look[name].marker, color=look[name].colour, markersize=4, label=name)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set(xlabel="spin", ylabel="E[x]", ylim=(-1.05, 1.05))
        axis.legend()
        return save_figure(figure, path)
