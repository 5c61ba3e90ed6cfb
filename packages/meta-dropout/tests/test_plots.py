"""Pictures are made, hold the numbers that they were given, and no text covers another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from meta_dropout import plots
from meta_dropout.attacks import RobustnessCurve
from meta_dropout.diagnose import Gate, Panel, Plane
from meta_dropout.learner import Step
from shared_core.errors import InputError
from shared_core.runs import Result
from shared_core.testing import keep_figures, misplaced

METHODS = ("meta-dropout", "maml", "information-dropout")


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    return keep_figures(monkeypatch, plots)


def results(datasets=("glyphs",), metrics=("accuracy", "calibration error"), methods=METHODS) -> list[Result]:
    random = np.random.default_rng(0)
    return [
        Result(
            dataset=d, method=name, metric=m, unit="%", better="higher", mean=v, low=v - 1, high=v + 1, n=5, seconds=1.0
        )
        for d in datasets
        for m in metrics
        for name, v in zip(methods, random.uniform(80, 90, len(methods)).tolist(), strict=True)
    ]


def history(steps: int = 40) -> list[Step]:
    return [Step(k, steps, 2 / k, 1 - 1 / k, 0) for k in range(1, steps + 1)]


def curve(norm: str = "l2", tasks: int = 3) -> RobustnessCurve:
    each = torch.linspace(0.9, 0.1, 4)[:, None] + 0.02 * torch.arange(tasks)
    return RobustnessCurve(norm, torch.tensor([0.0, 1.0, 2.0, 4.0]), each.mean(1), each)


def curves(count: int = 2) -> dict[str, dict[str, RobustnessCurve]]:
    return {norm: {f"method_{k}": curve(norm) for k in range(count)} for norm in ("linf", "l2")}


def gates(rows: int = 2) -> dict[str, Gate]:
    random = np.random.default_rng(0)

    def gate(*shape: int, kind="factor") -> Gate:
        return Gate(kind, 1 + random.random((rows, *shape)), random.random((rows, *shape)), np.ones((rows, *shape)))

    return {
        "0": gate(4, 8, 8),
        "4": gate(4, 4, 4),
        "9": gate(5),
        "extra": gate(4, 2, 2, kind="added"),
        "head": gate(kind="added"),
    }


def panels(steps: int = 3, *, known: bool = True, draws: int = 4) -> list[Panel]:
    random = np.random.default_rng(0)
    labels = np.array([1, 3])
    return [
        Panel(
            step,
            (1, 3),
            labels,
            np.repeat(labels, 5) if known else None,
            random.normal(size=(2, 2)),
            random.normal(size=(draws, 2, 2)),
            random.normal(size=(10, 2)),
        )
        for step in range(steps + 1)
    ]


def plane(steps: int = 2, ways: int = 3) -> Plane:
    probability = np.random.default_rng(0).dirichlet(np.ones(ways), (steps + 1, 6, 6))
    return Plane(np.linspace(-1, 1, 6), np.linspace(0, 4, 6), probability)


def draw_plane(path, steps: int = 2, known: bool = True) -> Path:
    points = np.random.default_rng(1).uniform(0, 1, (6, 2))
    labels = np.arange(6) % 3
    return plots.plot_plane(path, plane(steps), points[:3], labels[:3], points, labels if known else None)


EVERY = {
    "comparison": lambda path: plots.plot_comparison(path, results()),
    "comparison_grid": lambda path: plots.plot_comparison(path, results(("glyphs", "omniglot"))),
    "history": lambda path: plots.plot_history(path, {name: history() for name in METHODS}),
    "history_of_one": lambda path: plots.plot_history(path, {"maml": history()}, 5),
    "robustness": lambda path: plots.plot_robustness(path, curves()),
    "robustness_of_many": lambda path: plots.plot_robustness(path, curves(10)),
    "gates": lambda path: plots.plot_gates(path, np.random.default_rng(0).random((1, 8, 8)), gates()),
    "boundary": lambda path: plots.plot_boundary(path, panels(5)),
    "boundary_before": lambda path: plots.plot_boundary(path, panels(0, known=False)),
    "boundary_without_noise": lambda path: plots.plot_boundary(path, panels(1, draws=0)),
    "plane": draw_plane,
    "plane_before": lambda path: draw_plane(path, 0, known=False),
}


@pytest.mark.parametrize("name", EVERY)
def test_every_picture_is_drawn_without_text_on_text(name, tmp_path, drawn):
    assert EVERY[name](tmp_path / "picture.png") == tmp_path / "picture.png"
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert misplaced(drawn[0]) == []
    edge = drawn[0].bbox
    for legend in [*drawn[0].legends, *(axis.get_legend() for axis in drawn[0].axes if axis.get_legend())]:
        box = legend.get_window_extent()
        assert box.x0 >= edge.x0 - 1
        assert box.x1 <= edge.x1 + 1
        assert box.y0 >= edge.y0 - 1
        assert box.y1 <= edge.y1 + 1


@pytest.mark.parametrize(
    ("name", "ending", "start"),
    [("gates", "svg", b"<?xml"), ("history", "pdf", b"%PDF"), ("comparison", "png", b"\x89PNG")],
)
def test_the_same_arguments_give_the_same_bytes(name, ending, start, tmp_path):
    first, second = tmp_path / f"a.{ending}", tmp_path / f"b.{ending}"
    for path in (first, second):
        EVERY[name](path)
    assert first.read_bytes().startswith(start)
    assert first.read_bytes() == second.read_bytes()


def test_a_comparison_sets_ours_off(tmp_path, drawn):
    methods = ("maml", "meta-dropout", "metasgd-dropout")
    metrics = ("calibration error", "area under accuracy (Linf)")
    plots.plot_comparison(tmp_path / "c.png", results(metrics=metrics, methods=methods))
    labels = [axis.get_xlabel() for axis in drawn[0].axes]
    assert labels == [
        "calibration error [%]\n(higher is better)",
        "area under accuracy (Linf) [%]\n(higher is better)",
    ]
    bold = {label.get_text() for label in drawn[0].axes[0].get_yticklabels() if label.get_fontweight() == "bold"}
    assert bold == {"meta-dropout", "metasgd-dropout"}


def test_a_history_is_averaged_over_the_steps_before(tmp_path, drawn):
    plots.plot_history(tmp_path / "h.png", {"maml": history(10), "meta-dropout": history(10)}, 3)
    loss, accuracy = drawn[0].axes
    values = [2 / k for k in range(1, 11)]
    expected = [np.mean(values[max(0, k - 2) : k + 1]) for k in range(10)]
    np.testing.assert_allclose(loss.lines[0].get_ydata(), expected)
    assert accuracy.lines[0].get_ydata()[0] == 0
    assert "mean of the last 3" in loss.get_xlabel()


def test_skipped_steps_are_left_out_of_a_history(tmp_path, drawn):
    """Their loss is logged as 0. A resumed run's first step counts those skipped before it."""
    steps = [Step(5, 9, 1.0, 0.5, 2), Step(6, 9, 0.0, 0.0, 3), Step(7, 9, 0.9, 0.6, 3)]
    plots.plot_history(tmp_path / "h.png", {"maml": steps}, 1)
    np.testing.assert_array_equal(drawn[0].axes[0].lines[0].get_xdata(), [5, 7])


def test_a_regression_has_one_panel(tmp_path, drawn):
    plots.plot_history(tmp_path / "h.png", {"maml": [Step(k, 5, 1 / k, 1 / k, 0) for k in range(1, 6)]})
    assert [axis.get_ylabel() for axis in drawn[0].axes] == ["mean squared error of queries"]


def test_robustness_shows_accuracy_and_its_mean_over_radii(tmp_path, drawn):
    plots.plot_robustness(tmp_path / "r.png", {"linf": {"a": curve()}, "l1": {}, "l2": {"b": curve(), "a": curve()}})
    left, right = drawn[0].axes
    np.testing.assert_allclose(left.lines[0].get_ydata(), curve().accuracy.double())
    area = 100 * curve().auc
    assert [text.get_text() for text in right.get_legend().get_texts()] == [f"b, {area:.1f} %", f"a, {area:.1f} %"]
    # A method has one colour in all panels.
    assert left.lines[0].get_color() == right.lines[1].get_color() != right.lines[0].get_color()


def test_gates_are_channel_means_of_the_images_row(tmp_path, drawn):
    found = gates()
    plots.plot_gates(tmp_path / "g.png", np.zeros((8, 8)), found, row=1)
    heat = [axis.images[0].get_array() for axis in drawn[0].axes if axis.images and axis.get_xticks().size == 0]
    np.testing.assert_allclose(heat[1], found["0"].mean[1].mean(0))
    np.testing.assert_allclose(heat[4], found["4"].relative_sd[1].mean(0))
    assert len(heat) == 5


def test_a_flat_map_is_not_blown_up(tmp_path, drawn):
    flat = np.full((1, 2, 3, 3), 0.8) + 1e-6 * np.arange(9).reshape(3, 3)
    plots.plot_gates(tmp_path / "g.png", np.zeros((8, 8)), {"0": Gate("factor", flat, flat, flat)})
    low, high = drawn[0].axes[1].images[0].get_clim()
    assert high - low == pytest.approx(0.05)


def test_a_boundary_is_at_zero_and_counts_queries_on_their_side(tmp_path, drawn):
    made = panels(2)
    plots.plot_boundary(tmp_path / "b.png", made)
    axes = [axis for axis in drawn[0].axes if axis.axison]
    assert len(axes) == 3
    for axis, panel in zip(axes, made, strict=True):
        assert list(axis.lines[0].get_xdata()) == [0, 0]
        right = np.mean((panel.query[:, 0] > 0) == (panel.query_labels == 1))
        assert f"{100 * right:.0f} %" in axis.get_title()
        seen = np.concatenate([line.get_xydata() for line in axis.lines[1:] if len(line.get_xydata())])
        wanted = np.concatenate([panel.support, panel.noisy.reshape(-1, 2), panel.query])
        np.testing.assert_allclose(np.sort(seen, 0), np.sort(wanted, 0))


def test_the_plane_is_coloured_by_its_most_probable_class(tmp_path, drawn):
    found = plane(0)
    points = np.zeros((3, 2))
    plots.plot_plane(tmp_path / "p.png", found, points, np.arange(3), points)
    pixels = drawn[0].axes[0].images[0].get_array()
    best = found.probability[0].argmax(-1)
    strongest = {0: 2, 1: 0, 2: 1}
    # Blue, vermilion and green: each has one channel above the others.
    assert all(pixels[i, j].argmax() == strongest[best[i, j]] for i in range(6) for j in range(6))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda path: plots.plot_comparison(path, []), "no results"),
        (lambda path: plots.plot_history(path, {}), "no history"),
        (lambda path: plots.plot_history(path, {"maml": []}), "no history"),
        (lambda path: plots.plot_history(path, {"maml": history()}, 0), "window: must be at least 1"),
        (lambda path: plots.plot_robustness(path, {}), "no robustness curve"),
        (lambda path: plots.plot_robustness(path, {"l2": {}}), "no robustness curve"),
        (lambda path: plots.plot_gates(path, np.zeros((1, 8, 8)), {}), "no gate"),
        (
            lambda path: plots.plot_gates(path, np.zeros((1, 8, 8)), gates(), 2),
            r"row: must be one of the batch's 0\.\.1",
        ),
        (lambda path: plots.plot_gates(path, np.zeros((2, 8, 8)), gates()), "one or three channels"),
        (lambda path: plots.plot_boundary(path, []), "no inner step"),
        (
            lambda path: plots.plot_plane(path, plane(), np.zeros((3, 4)), np.arange(3), np.zeros((1, 2))),
            "support: needs points in the plane",
        ),
        (lambda path: plots.plot_robustness(path.with_suffix(".bmp2"), curves()), "use .png"),
    ],
)
def test_nothing_to_draw_is_said_in_a_line(call, words, tmp_path):
    with pytest.raises(InputError, match=words) as caught:
        call(tmp_path / "p.png")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
