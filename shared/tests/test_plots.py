"""What all pictures share: files, names, axes, and the comparison, looked at as data."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure
from numpy.testing import assert_allclose

from shared_core import plots
from shared_core.errors import InputError
from shared_core.plots import (
    COLOURS,
    MARKERS,
    drawing,
    legend_outside,
    looks,
    plain_log,
    plot_comparison,
    running_mean,
    save_figure,
    short_names,
)
from shared_core.runs import Result


def row(method: str, mean: float, *, low=None, high=None, dataset="digits", metric="error", unit="1", better="lower"):
    return Result(
        dataset=dataset, method=method, metric=metric, unit=unit, better=better, mean=mean, low=low, high=high, n=3,
        seconds=0.5,
    )  # fmt: skip


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draw a comparison and return its figure."""
    kept: list[Figure] = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: kept.append(figure) or path)

    def draw(results, **options) -> Figure:
        plot_comparison(tmp_path / "a.png", results, **options)
        return kept[-1]

    return draw


@pytest.mark.parametrize("kind", ["png", "svg", "pdf", "PNG"])
def test_the_same_figure_gives_the_same_bytes(tmp_path, kind):
    rows = [row("a", 0.1, low=0.05, high=0.2), row("b", 0.3)]
    files = [plot_comparison(tmp_path / f"{k}.{kind}", rows).read_bytes() for k in range(2)]
    assert files[0] == files[1]
    assert files[0].lstrip()[:4] in {b"\x89PNG", b"<?xm", b"%PDF"}


def test_other_files_are_refused_and_nothing_is_left(tmp_path):
    with pytest.raises(InputError, match=r"a\.bmp: cannot draw into this kind of file; use \.png, \.svg or \.pdf"):
        save_figure(Figure(), tmp_path / "a.bmp")
    assert not list(tmp_path.iterdir())


def test_style_ends_with_the_block():
    before = mpl.rcParams["font.size"]
    with drawing(font_size=3):
        assert mpl.rcParams["font.size"] == 3
        assert not mpl.rcParams["axes.spines.top"]
    assert mpl.rcParams["font.size"] == before


def test_twenty_four_names_look_different():
    names = [f"m{k}" for k in range(24)]
    found = looks([*names, "m0"])
    assert len({*found.values()}) == 24
    assert found["m8"] == (COLOURS[0], MARKERS[0], "--")


def test_names_that_look_alike_are_numbered():
    assert short_names(["abcdefgh-x-123", "abcdefgh-y-123", "b"], 9) == ["1: abcd…-123", "2: abcd…-123", "b"]


@pytest.mark.parametrize("window", [1, 3, 100])
def test_running_mean_is_the_mean_by_hand(window):
    values = np.random.default_rng(0).normal(size=20).tolist()
    by_hand = [np.mean(values[max(0, k + 1 - window) : k + 1]) for k in range(20)]
    assert_allclose(running_mean(values, window), by_hand, atol=1e-12)


def test_one_legend_for_all_panels():
    figure = Figure(layout="constrained")
    axes = figure.subplots(1, 2)
    axes[0].plot([0, 1], label="a")
    axes[1].plot([0, 1], label="a")
    axes[1].plot([1, 0], label="b")
    legend_outside(figure, list(axes))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


def test_a_legend_of_long_names_stays_within_the_figure():
    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    for k in range(4):
        axis.plot([0, 1], label=f"{k} of the methods, which has a long name")
    legend_outside(figure, [axis])
    figure.draw_without_rendering()
    assert figure.legends[0].get_window_extent().width < figure.bbox.width


@pytest.mark.parametrize(("low", "high"), [(0.5, 0.6), (0.21, 0.45), (1.0, 30.0), (0.01, 5000.0)])
def test_logarithmic_axes_are_written_out(low, high):
    axis = Figure().subplots()
    axis.set_xscale("log")
    plain_log(axis.xaxis, low, high)
    left, right = axis.get_xlim()
    assert left < low < high < right
    ticks = [tick for tick in axis.get_xticks() if left <= tick <= right]
    assert len(ticks) >= 2
    assert all(label.get_text() and "10^" not in label.get_text() for label in axis.get_xticklabels())


def test_best_on_top_with_intervals_and_ours_set_off(drawn):
    figure = drawn(
        [row("a", 0.1, low=0.05, high=0.2), row("ours", 0.3), row("c", 0.2)], ours=lambda name: name == "ours"
    )
    (axis,) = figure.axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["ours", "c", "a"]
    assert [label.get_fontweight() for label in axis.get_yticklabels()] == ["bold", "normal", "normal"]
    assert [*axis.lines[-2].get_xdata()] == [0.05, 0.2]
    assert axis.get_xlabel() == "error (lower is better)"
    assert figure.get_suptitle() == "digits"


@pytest.mark.parametrize(("better", "top"), [("lower", "a"), ("higher", "b")])
def test_what_is_better_is_on_top(drawn, better, top):
    figure = drawn([row("a", 1.0, better=better), row("b", 2.0, better=better)])
    assert figure.axes[0].get_yticklabels()[-1].get_text() == top


def test_a_method_far_off_makes_the_axis_logarithmic(drawn):
    rows = [row("a", 1.0, low=-0.5, high=2.0), row("b", 1.2), row("c", 900.0)]
    axis = drawn(rows).axes[0]
    assert axis.get_xscale() == "log"
    assert min(line.get_xdata()[0] for line in axis.lines) == pytest.approx(1 / 3)
    assert drawn(rows[:2]).axes[0].get_xscale() == "linear"
    sizes = [row(name, mean) for name, mean in zip("abcde", (0.1, 3.0, 4.0, 8.0, 30.0), strict=True)]
    assert drawn(sizes).axes[0].get_xscale() == "log"
    assert drawn(sizes[1:]).axes[0].get_xscale() == "linear"


@pytest.mark.parametrize(
    ("datasets", "metrics", "shape"), [(1, 1, (1, 1)), (1, 2, (1, 2)), (1, 5, (2, 3)), (2, 3, (2, 3)), (4, 1, (2, 2))]
)
def test_rows_are_data_sets_and_columns_metrics(drawn, datasets, metrics, shape):
    rows = [row("a", 1.0, dataset=f"d{d}", metric=f"m{m}") for d in range(datasets) for m in range(metrics)]
    figure = drawn(rows)
    grid = figure.axes[0].get_gridspec()
    assert (grid.nrows, grid.ncols) == shape
    shown = [axis for axis in figure.axes if axis.axison]
    assert len(shown) == len(rows)
    if datasets > 1:
        assert [axis.get_title() for axis in shown] == [r.dataset for r in rows]


def test_units_of_metrics(drawn):
    figure = drawn([row("a", 1.0, metric="test loss", unit="nats"), row("a", 2.0, metric="ms a step", unit="ms"),
                    row("a", 2.0, metric="average bits", unit="bits")],
                   leave_out=["best learning rate"])  # fmt: skip
    labels = [axis.get_xlabel().partition(" (")[0] for axis in figure.axes]
    assert labels == ["test loss [nats]", "ms a step", "average bits"]


def test_nothing_to_draw(tmp_path):
    for rows, left_out in (([], ()), ([row("a", 1.0)], ("error",))):
        with pytest.raises(InputError, match="the run has no results to draw"):
            plot_comparison(tmp_path / "a.png", rows, leave_out=left_out)
