"""Every picture: comparisons, training, accuracy by class size, what was learned, calibration, one task explained.

Each function writes one file, whose ending says what kind (PNG, SVG, PDF), and returns its path; the same arguments
give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike, NDArray

from bayes_taml.metrics import SizeBin, reliability
from shared_core.errors import InputError
from shared_core.plots import (
    COLOURS,
    MARKERS,
    QUIET,
    drawing,
    legend_outside,
    looks,
    plain_log,
    running_mean,
    save_figure,
    short_names,
)
from shared_core.plots import plot_comparison as _plot_comparison
from shared_core.runs import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "ExplanationLike",
    "StepLike",
    "plot_comparison",
    "plot_explanation",
    "plot_gamma",
    "plot_history",
    "plot_omega",
    "plot_reliability",
    "plot_sizes",
]


Vector = NDArray[np.float64]


@runtime_checkable
class StepLike(Protocol):
    """What is known after a meta-step."""

    @property
    def step(self) -> int:
        """Number of the meta-step, from 1."""
        ...

    @property
    def loss(self) -> float:
        """Mean query loss of its tasks."""
        ...

    @property
    def accuracy(self) -> float:
        """Mean query accuracy of its tasks, in 0..1."""
        ...


@runtime_checkable
class ExplanationLike(Protocol):
    """What a learner made of one task of C classes, with a network of L layers."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the C classes."""
        ...

    @property
    def counts(self) -> np.ndarray:
        """Support examples of each class, (C,)."""
        ...

    @property
    def omega(self) -> np.ndarray:
        """Weight of each class, (C,), sums to 1."""
        ...

    @property
    def omega_low(self) -> np.ndarray:
        """Lower end of the weights' 95 % interval, (C,)."""
        ...

    @property
    def omega_high(self) -> np.ndarray:
        """Upper end of the weights' 95 % interval, (C,)."""
        ...

    @property
    def pull(self) -> np.ndarray:
        """Share of the steps' total gradient that each class supplied, (C,), sums to 1."""
        ...

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the L layers, the head last."""
        ...

    @property
    def gamma(self) -> np.ndarray:
        """Multiplier of each layer's step, (L,)."""
        ...

    @property
    def gamma_low(self) -> np.ndarray:
        """Lower end of the multipliers' 95 % interval, (L,)."""
        ...

    @property
    def gamma_high(self) -> np.ndarray:
        """Upper end of the multipliers' 95 % interval, (L,)."""
        ...

    @property
    def moved(self) -> np.ndarray:
        """How far each layer moved relative to its length, (L,); NaN where it starts at zero."""
        ...

    @property
    def z_size(self) -> np.ndarray:
        """Root mean square of the shift of each layer's start, (L - 1,): all but the head."""
        ...

    @property
    def class_loss(self) -> np.ndarray:
        """Support loss of each class before each step and at the end, (steps + 1, C)."""
        ...


def plot_comparison(path: str | Path, results: Sequence[Result]) -> Path:
    """Draw every method's mean with its 95 % interval, best on top; see :func:`shared_core.plots.plot_comparison`.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    results : rows of a run's summary; those that balance, ``bayesian-taml`` and its parts, are highlighted

    Returns
    -------
    The path.
    """
    return _plot_comparison(path, results, ours=lambda name: name.endswith("-taml"))


def plot_history(path: str | Path, histories: Mapping[str, Sequence[StepLike]], window: int | None = None) -> Path:
    """Draw query loss and accuracy over meta-steps, each point the mean of the steps before it.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    histories : method -> its meta-steps; those whose loss is not finite are left out
    window : meta-steps averaged; None is a twentieth of the longest

    Returns
    -------
    The path.
    """
    kept = {name: [step for step in steps if np.isfinite(step.loss)] for name, steps in histories.items()}
    kept = {name: steps for name, steps in kept.items() if steps}
    if not kept:
        raise InputError("no meta-step was taken, so there is no history to draw")
    if window is None:
        window = max(1, max(len(steps) for steps in kept.values()) // 20)
    if window < 1:
        raise InputError(f"window: must be at least 1 meta-step, got {window}")
    with drawing():
        figure = Figure(figsize=(8.6, 3.2 + 0.22 * -(-len(kept) // 4)), layout="constrained")
        axes = cast("Sequence[Axes]", figure.subplots(1, 2))
        found = looks([*kept])
        for name, steps in kept.items():
            look = found[name]
            at = [step.step for step in steps]
            for axis, values in zip(axes, ([s.loss for s in steps], [s.accuracy for s in steps]), strict=True):
                if len(kept) == 1 and window > 1:
                    axis.plot(at, values, color=COLOURS[0], linewidth=0.6, alpha=0.3)
                mean = running_mean(values, window)
                axis.plot(at, mean, look.dash, color=look.colour, linewidth=1.6, label=name)
        axes[0].set(ylabel="query loss (cross-entropy, nats)")
        axes[1].set(ylabel="query accuracy")
        axes[1].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        average = f", mean of the last {window}" if window > 1 else ""
        for axis in axes:
            axis.set(xlabel=f"meta-step{average}")
            axis.grid(alpha=0.25)
            axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        legend_outside(figure, axes)
        return save_figure(figure, path)


def plot_sizes(path: str | Path, bins: Mapping[str, Sequence[SizeBin]], *, reference: str | None = None) -> Path:
    """Draw accuracy over how many support examples the query's class has, and each method's gain over one of them.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    bins : method -> what :func:`bayes_taml.metrics.accuracy_by_size` gave
    reference : method that gains are measured against, in a panel of their own; their intervals take the two methods
        as independent, which is too wide for methods on the same episodes

    Returns
    -------
    The path.
    """
    bins = {name: found for name, found in bins.items() if found}
    if not bins:
        raise InputError("there is no accuracy by class size to draw")
    if reference is not None and reference not in bins:
        raise InputError(f"reference: must be one of {', '.join(bins)}, got {reference}")
    places = sorted({(found.low, found.high) for each in bins.values() for found in each})
    with drawing():
        panels = 1 if reference is None or len(bins) == 1 else 2
        columns = 2 * panels
        size = (max(4.8, 1.6 + 0.75 * len(places)) * panels, 3.3 + 0.22 * -(-len(bins) // columns))
        figure = Figure(figsize=size, layout="constrained")
        axes = cast("Sequence[Axes]", figure.subplots(1, panels, squeeze=False)[0])
        base = {} if reference is None else {(found.low, found.high): found for found in bins[reference]}
        looked = looks([*bins])
        for rank, (name, each) in enumerate(bins.items()):
            # Side by side within a bin, so that no interval hides another.
            shift = (rank - (len(bins) - 1) / 2) * min(0.08, 0.5 / len(bins))
            look: dict[str, Any] = {
                "color": looked[name].colour,
                "linestyle": looked[name].dash,
                "marker": looked[name].marker,
                "markersize": 4.5,
                "linewidth": 1.4,
                "elinewidth": 1.2,
                "label": name,
            }
            at = [places.index((found.low, found.high)) + shift for found in each]
            axes[0].errorbar(at, [found.mean for found in each], [found.half for found in each], **look)
            both = [
                (x, found, base[found.low, found.high])
                for x, found in zip(at, each, strict=True)
                if (found.low, found.high) in base
            ]
            if panels == 2 and name != reference and both:
                gain = [100 * (found.mean - other.mean) for _, found, other in both]
                half = [100 * float(np.hypot(found.half, other.half)) for _, found, other in both]
                axes[1].errorbar([x for x, _, _ in both], gain, half, **look)
        axes[0].set_ylabel("query accuracy")
        axes[0].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        if panels == 2:
            axes[1].axhline(0, color=looked[str(reference)].colour, linewidth=1.4)
            axes[1].set_ylabel(f"gain over {reference} [points]")
        for axis in axes:
            axis.set_xticks(
                range(len(places)), [str(low) if low == high else f"{low}\u2013{high}" for low, high in places]
            )
            axis.set(xlabel="support examples of the query's class", xlim=(-0.5, len(places) - 0.5))
            axis.grid(axis="y", alpha=0.25)
        legend_outside(figure, axes[:1], columns)
        return save_figure(figure, path)


def plot_omega(path: str | Path, counts: ArrayLike, omega: ArrayLike, ways: int) -> Path:
    """Draw the learned weight of a class over how many support examples it has.

    Beside it stand what plain averaging does (1/C for every class) and what weighting by 1/N would do on the same
    tasks. Means are over classes of about the same size.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    counts : (n,) support examples of classes, task after task
    omega : (n,) their weights, which sum to 1 in each task
    ways : C, classes a task

    Returns
    -------
    The path.
    """
    counts, omega = _vector("counts", counts), _vector("omega", omega)
    _same_length(counts=counts, omega=omega)
    if ways < 1 or len(counts) % ways:
        raise InputError(f"counts: needs {ways} classes for each task, task after task, got {len(counts)} in all")
    if counts.min() < 1:
        raise InputError(f"counts: must be at least 1, got {counts.min():g}")
    inverse = 1 / counts.reshape(-1, ways)
    rule = (inverse / inverse.sum(1, keepdims=True)).ravel()
    groups = _groups(counts)
    middle = [float(np.median(counts[rows])) for rows in groups]
    with drawing():
        figure = Figure(figsize=(5.6, 4.1), layout="constrained")
        axis = figure.subplots()
        alpha = float(np.clip(60 / len(counts) ** 0.7, 0.04, 0.5))
        axis.plot(counts, omega, "o", color=COLOURS[0], alpha=alpha, markersize=3, markeredgewidth=0, rasterized=True)
        axis.axhline(1 / ways, color=QUIET, linewidth=1.2, linestyle=":", label=f"1/C = {1 / ways:.3g}")
        means = [float(rule[rows].mean()) for rows in groups]
        axis.plot(middle, means, "--", color=COLOURS[1], linewidth=1.4, label="weights by 1/N, mean")
        means = [float(omega[rows].mean()) for rows in groups]
        axis.plot(middle, means, "o-", color=COLOURS[0], markeredgecolor="white", linewidth=1.8, label="learned, mean")
        axis.set(xscale="log", xlabel="support examples of the class", ylabel="weight of the class in the inner loss")
        axis.set_ylim(0, min(1.02, 1.08 * max(float(omega.max()), *means, 1 / ways)))
        plain_log(axis.xaxis, float(counts.min()), float(counts.max()))
        axis.grid(alpha=0.25)
        legend_outside(figure, [axis], 3)
        return save_figure(figure, path)


def plot_gamma(
    path: str | Path, sizes: ArrayLike, gamma: ArrayLike, names: Sequence[str], *, rule: float | None = None
) -> Path:
    """Draw the learned multiplier of each layer's step over the size of the support set, medians with 80 % of tasks.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    sizes : (n,) support examples of tasks
    gamma : (n, layers) multipliers, above 0
    names : of layers
    rule : kappa of the rule N / (N + kappa), drawn beside them if given

    Returns
    -------
    The path.
    """
    sizes = _vector("sizes", sizes)
    gamma = np.asarray(gamma, dtype=np.float64)
    if gamma.shape != (len(sizes), len(names)) or not len(names):
        raise InputError(
            f"gamma: needs a row a task and a column a layer, {(len(sizes), len(names))}, got {gamma.shape}"
        )
    if not (gamma > 0).all() or not np.isfinite(gamma).all() or sizes.min() <= 0:
        raise InputError("gamma, sizes: must be finite and above 0")
    if rule is not None and rule < 0:
        raise InputError(f"rule: kappa must not be negative, got {rule}")
    groups = _groups(sizes)
    middle = [float(np.median(sizes[rows])) for rows in groups]
    with drawing():
        labels = short_names(names)
        size = (5.0 + 0.085 * max(map(len, labels)), max(4.0, 1.2 + 0.22 * len(names)))
        figure = Figure(figsize=size, layout="constrained")
        axis = figure.subplots()
        axis.axhline(1, color=QUIET, linewidth=1.0, linestyle=":")
        colours = _shades(len(names))
        ends = [1.0]
        for place, name in enumerate(labels):
            low, median, high = (
                [float(np.quantile(gamma[rows, place], share)) for rows in groups] for share in (0.1, 0.5, 0.9)
            )
            band = 0.13 if len(names) <= len(COLOURS) else 0.05
            axis.fill_between(middle, low, high, color=colours[place], alpha=band, linewidth=0)
            marker = MARKERS[place % len(MARKERS)]
            axis.plot(middle, median, marker=marker, color=colours[place], markersize=4, linewidth=1.6, label=name)
            ends += [min(low), max(high)]
        if rule is not None:
            at = np.geomspace(sizes.min(), sizes.max(), 100)
            axis.plot(at, at / (at + rule), "--", color="black", linewidth=1.4, label=f"N / (N + {rule:.3g})")
            ends.append(float(at[0] / (at[0] + rule)))
        axis.set(xscale="log", yscale="log", xlabel="support examples N of the task", ylabel="multiplier of the step")
        plain_log(axis.xaxis, float(sizes.min()), float(sizes.max()))
        plain_log(axis.yaxis, min(ends), max(ends))
        axis.grid(alpha=0.25)
        figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper", fontsize=9)
        return save_figure(figure, path)


def plot_reliability(path: str | Path, curves: Mapping[str, tuple[ArrayLike, ArrayLike]], bins: int = 15) -> Path:
    """Draw how often the top answer is right over how sure it is, and below how sure the answers are.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    curves : method -> (probability (n, ways), labels (n,)); the legend has each method's expected calibration error
    bins : of confidence, of equal width

    Returns
    -------
    The path.
    """
    if not curves:
        raise InputError("there are no probabilities to draw")
    with drawing():
        figure = Figure(figsize=(4.9, 5.4 + 0.2 * len(curves)), layout="constrained")
        axes = cast("Sequence[Axes]", figure.subplots(2, 1, sharex=True, height_ratios=[3, 1]))
        axes[0].plot([0, 1], [0, 1], ":", color=QUIET, linewidth=1.2, label="as sure as right")
        least = 1.0
        looked = looks([*curves])
        for name, (probability, labels) in curves.items():
            found = reliability(np.asarray(probability, dtype=np.float64), np.asarray(labels), bins)
            share = found.n / found.n.sum()
            error = float((share * np.abs(found.confidence - found.accuracy)).sum())
            colour, marker, dash = looked[name]
            look: dict[str, Any] = {"color": colour, "marker": marker, "linewidth": 1.5, "markersize": 4}
            label = f"{name}, ECE {100 * error:.1f} %"
            axes[0].plot(found.confidence, found.accuracy, dash, label=label, **look)
            axes[1].plot(found.confidence, share, dash, **look)
            least = min(least, float(found.confidence.min()))
        axes[0].set(ylabel="accuracy", ylim=(-0.02, 1.03))
        axes[1].set(xlabel="confidence: probability of the top answer", ylabel="share of\nanswers")
        axes[1].set_ylim(0, None)
        axes[1].set_xlim(np.floor(10 * least) / 10, 1.015)
        for axis in axes:
            axis.grid(alpha=0.25)
            axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        legend_outside(figure, axes[:1], 1)
        return save_figure(figure, path)


def plot_explanation(path: str | Path, explanation: ExplanationLike) -> Path:
    """Draw one page on one task: class weights, class losses while adapting, step multipliers, how far layers moved.

    Parameters
    ----------
    path : PNG, SVG or PDF to write
    explanation : of one adaptation; classes are drawn from most to fewest support examples

    Returns
    -------
    The path.
    """
    classes, layers = len(explanation.class_names), len(explanation.layers)
    _check_explanation(explanation)
    with drawing():
        heights = [max(2.5, 0.9 + 0.23 * classes), max(2.1, 0.9 + 0.26 * layers)]
        figure = Figure(figsize=(10.4, sum(heights) + 0.3), layout="constrained")
        axes = cast("NDArray[Any]", figure.subplots(2, 2, height_ratios=heights))
        order = np.argsort(-np.asarray(explanation.counts), kind="stable")
        colours = _shades(classes)
        _class_weights(axes[0, 0], explanation, order, colours)
        _class_losses(axes[0, 1], explanation, order, colours)
        _multipliers(axes[1, 0], explanation)
        _movement(axes[1, 1], explanation)
        return save_figure(figure, path)


def _check_explanation(explanation: ExplanationLike) -> None:
    classes, layers = len(explanation.class_names), len(explanation.layers)
    if not classes or not layers:
        raise InputError("explanation: needs at least one class and one layer")
    wanted: dict[str, tuple[int, ...]] = dict.fromkeys(
        ("counts", "omega", "omega_low", "omega_high", "pull"), (classes,)
    )
    wanted |= dict.fromkeys(("gamma", "gamma_low", "gamma_high", "moved"), (layers,))
    wanted["z_size"] = (layers - 1,)
    for name, shape in wanted.items():
        if np.shape(getattr(explanation, name)) != shape:
            raise InputError(f"explanation: {name} must have shape {shape}, got {np.shape(getattr(explanation, name))}")
    losses = np.shape(explanation.class_loss)
    if len(losses) != 2 or not losses[0] or losses[1] != classes:
        raise InputError(f"explanation: class_loss must have shape (steps + 1, {classes}), got {losses}")


def _class_weights(axis: Axes, found: ExplanationLike, order: NDArray[np.intp], colours: Sequence[Any]) -> None:
    rows, classes, names = np.arange(len(order)), len(order), short_names(found.class_names)
    omega, low, high = (np.asarray(values)[order] for values in (found.omega, found.omega_low, found.omega_high))
    axis.barh(rows, omega, color=colours, alpha=0.75, height=0.72)
    axis.errorbar(omega, rows, xerr=_arms(omega, low, high), fmt="none", ecolor="black", elinewidth=1.0, capsize=2)
    axis.plot(
        np.asarray(found.pull)[order], rows, "D", color="white", markeredgecolor="black", markersize=5, label="gradient"
    )
    axis.axvline(1 / classes, color=QUIET, linewidth=1.2, linestyle=":")
    axis.set_yticks(rows, [f"{names[k]}  ({int(found.counts[k])})" for k in order])
    _list_down(axis, classes)
    axis.set_xlim(0, 1.06 * float(np.nanmax([high.max(), np.nanmax(found.pull), 1 / classes])))
    axis.set(xlabel="bar: weight with its 95 % interval, dots: 1/C\ndiamond: share of the gradient")
    axis.set_title("how much each class counts (support examples)")


def _class_losses(axis: Axes, found: ExplanationLike, order: NDArray[np.intp], colours: Sequence[Any]) -> None:
    losses = np.asarray(found.class_loss, dtype=np.float64)
    for colour, k in zip(colours, order, strict=True):
        axis.plot(losses[:, k], "o-", color=colour, markersize=3, linewidth=1.4, alpha=0.9)
    axis.set(
        xlabel="inner step",
        ylabel="support loss [nats]",
        title="how classes are learned (colours as on the left)",
    )
    axis.set_ylim(0, None)
    axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axis.grid(alpha=0.25)


def _multipliers(axis: Axes, found: ExplanationLike) -> None:
    rows, gamma = np.arange(len(found.layers)), np.asarray(found.gamma, dtype=np.float64)
    low, high = np.asarray(found.gamma_low), np.asarray(found.gamma_high)
    axis.axvline(1, color=QUIET, linewidth=1.2, linestyle=":")
    axis.errorbar(gamma, rows, xerr=_arms(gamma, low, high), fmt="o", color=COLOURS[0], elinewidth=1.6, capsize=2)
    axis.set_yticks(rows, short_names(found.layers))
    _list_down(axis, len(rows))
    axis.set(xscale="log", xlabel="multiplier of the step with its 95 % interval", title="how far each layer may move")
    ends = np.concatenate([gamma, low, high, [1.0]])
    ends = ends[np.isfinite(ends) & (ends > 0)]
    plain_log(axis.xaxis, float(ends.min()) / 1.15, float(ends.max()) * 1.15)


def _movement(axis: Axes, found: ExplanationLike) -> None:
    rows, moved = np.arange(len(found.layers)), np.asarray(found.moved, dtype=np.float64)
    shift = np.asarray(found.z_size, dtype=np.float64)
    axis.barh(rows, np.nan_to_num(moved), color=COLOURS[2], alpha=0.75, height=0.6)
    if len(shift):
        # Half of a diamond at 0 lies beyond the axis.
        axis.plot(shift, rows[:-1], "D", color="white", markeredgecolor="black", markersize=5, clip_on=False, zorder=5)
    for row in rows[np.isnan(moved)]:
        axis.annotate(
            "starts at zero", (0, row), (4, 0), textcoords="offset points", va="center", color=QUIET, fontsize=9
        )
    axis.set_yticks(rows, [""] * len(rows))
    _list_down(axis, len(rows))
    longest = np.nanmax([*np.nan_to_num(moved), *shift, 0])
    axis.set_xlim(0, 1.08 * longest if longest > 0 else 1)
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.set(
        xlabel="bar: by the steps, relative to its length before\ndiamond: by z, rms",
        title="how far it did move (layers as on the left)",
    )


def _arms(mean: NDArray[Any], low: NDArray[Any], high: NDArray[Any]) -> Vector:
    """Return how far an interval reaches to either side, (2, n); a mean outside of its interval has no arm there."""
    return np.maximum(np.stack([mean - low, high - mean]), 0)


def _list_down(axis: Axes, rows: int) -> None:
    axis.set_ylim(rows - 0.4, -0.6)
    axis.tick_params(axis="y", length=0, labelsize=9 if rows <= 15 else 8)
    axis.grid(axis="x", alpha=0.25)
    axis.set_axisbelow(True)


def _groups(values: Vector, most: int = 12) -> list[NDArray[np.intp]]:
    """Rows of about the same value: one group a value if these are few, else equal steps of its logarithm."""
    distinct = np.unique(values)
    if len(distinct) <= most:
        return [np.flatnonzero(values == value) for value in distinct]
    edges = np.geomspace(distinct[0], distinct[-1], most + 1)
    place = np.searchsorted(edges[1:-1], values, side="left")
    return [np.flatnonzero(place == k) for k in np.unique(place)]


def _shades(count: int) -> list[Any]:
    """Colours of what has an order: named ones for a few, a scale for many."""
    if count <= len(COLOURS):
        return [*COLOURS[:count]]
    return [mpl.colormaps["viridis"](0.95 * place / (count - 1)) for place in range(count)]


def _vector(name: str, values: ArrayLike) -> Vector:
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1 or not len(vector) or not np.isfinite(vector).all():
        raise InputError(f"{name}: needs one finite number a row, (n,), got {vector.shape}")
    return vector


def _same_length(**given: Vector) -> None:
    (first, one), (second, two) = given.items()
    if len(one) != len(two):
        raise InputError(f"{second}: needs as many rows as {first}, {len(one)}, got {len(two)}")
