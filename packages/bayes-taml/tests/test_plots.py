"""Pictures are made, hold the numbers that they were given, and no text covers another."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.figure import Figure

from bayes_taml import plots
from bayes_taml.metrics import SizeBin, calibration_error
from shared_core.errors import InputError
from shared_core.runs import Result
from shared_core.testing import keep_figures, misplaced

METHODS = ("bayesian-taml", "metasgd", "protonet")
LONG = "features.block{}.convolution.weight_of_the_layer"


@dataclass(frozen=True)
class Step:
    step: int
    loss: float
    accuracy: float


@dataclass(frozen=True)
class Explanation:
    class_names: tuple[str, ...]
    counts: np.ndarray
    omega: np.ndarray
    omega_low: np.ndarray
    omega_high: np.ndarray
    pull: np.ndarray
    layers: tuple[str, ...]
    gamma: np.ndarray
    gamma_low: np.ndarray
    gamma_high: np.ndarray
    moved: np.ndarray
    z_size: np.ndarray
    class_loss: np.ndarray


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
    return [Step(k, 2 / k, 1 - 1 / k) for k in range(1, steps + 1)]


def bins(gain: float = 0.0, edges=((1, 3), (4, 5), (6, 10), (11, 20), (21, 50))) -> list[SizeBin]:
    return [SizeBin(low, high, 0.5 + 0.05 * k + gain, 0.02, 100) for k, (low, high) in enumerate(edges)]


def tasks(count: int = 60, ways: int = 5) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    counts = random.integers(1, 51, (count, ways))
    omega = counts**-0.7 * np.exp(0.2 * random.normal(size=counts.shape))
    return counts.ravel(), (omega / omega.sum(1, keepdims=True)).ravel()


def multipliers(layers: int = 5, count: int = 60) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    sizes = random.integers(5, 251, count)
    return sizes, (sizes[:, None] / 60) ** np.linspace(-0.5, 0.5, layers) * np.exp(
        0.1 * random.normal(size=(count, layers))
    )


def answers(seed: int = 0, n: int = 300) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.dirichlet(np.full(5, 0.4), n), random.integers(5, size=n)


def explanation(classes: int = 5, layers: int = 5, steps: int = 4, *, long: bool = False) -> Explanation:
    random = np.random.default_rng(0)
    counts = random.integers(1, 51, classes)
    omega, pull = random.dirichlet(np.full(classes, 5.0)), random.dirichlet(np.full(classes, 5.0))
    gamma = np.exp(0.5 * random.normal(size=layers))
    return Explanation(
        tuple(f"Scandinavian long-eared species number {k}" if long else f"class {k}" for k in range(classes)),
        counts,
        omega,
        0.7 * omega,
        1.4 * omega,
        pull,
        (*((LONG if long else "conv{}").format(k) for k in range(layers - 1)), "head"),
        gamma,
        gamma / 2,
        gamma * 2,
        np.append(random.uniform(0, 0.3, layers - 1), np.nan),
        random.uniform(0, 0.2, layers - 1),
        random.uniform(0.1, 1.6, (steps + 1, classes)),
    )


EVERY = {
    "comparison": lambda path: plots.plot_comparison(path, results()),
    "comparison_grid": lambda path: plots.plot_comparison(path, results(("glyphs", "digits"))),
    "history": lambda path: plots.plot_history(path, {name: history() for name in METHODS}),
    "history_of_one": lambda path: plots.plot_history(path, {"maml": history()}, 5),
    "sizes": lambda path: plots.plot_sizes(path, {name: bins() for name in METHODS}, reference="metasgd"),
    "sizes_of_one": lambda path: plots.plot_sizes(path, {"maml": bins()}, reference="maml"),
    "sizes_of_many": lambda path: plots.plot_sizes(
        path, {f"method_{k}": bins(k / 99) for k in range(12)}, reference=None
    ),
    "sizes_in_one_bin": lambda path: plots.plot_sizes(path, {"maml": bins(edges=[(1, 1)])}),
    "omega": lambda path: plots.plot_omega(path, *tasks(), 5),
    "omega_of_equal_counts": lambda path: plots.plot_omega(path, np.full(10, 7), np.full(10, 0.2), 5),
    "gamma": lambda path: plots.plot_gamma(path, *multipliers(), ["a", "b", "c", "d", "head"], rule=20.0),
    "gamma_of_many": lambda path: plots.plot_gamma(path, *multipliers(20), [LONG.format(k) for k in range(20)]),
    "gamma_of_one_task": lambda path: plots.plot_gamma(path, [5], [[1.0]], ["head"], rule=0.0),
    "gamma_far_apart": lambda path: plots.plot_gamma(path, [1, 9999], [[1e-3, 1.0], [1.0, 99.0]], ["a", "head"]),
    "reliability": lambda path: plots.plot_reliability(path, {name: answers(k) for k, name in enumerate(METHODS)}),
    "reliability_of_one_row": lambda path: plots.plot_reliability(path, {"maml": (np.eye(2)[:1], np.array([0]))}),
    "explanation": lambda path: plots.plot_explanation(path, explanation()),
    "explanation_of_many": lambda path: plots.plot_explanation(path, explanation(30, 18, long=True)),
    "explanation_of_few": lambda path: plots.plot_explanation(path, explanation(2, 1, 0)),
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
    for axis in drawn[0].axes:
        assert axis.get_xlabel() or axis.get_shared_x_axes().get_siblings(axis)


@pytest.mark.parametrize(
    ("name", "ending", "start"),
    [("omega", "svg", b"<?xml"), ("explanation", "pdf", b"%PDF"), ("gamma", "png", b"\x89PNG")],
)
def test_the_same_arguments_give_the_same_bytes(name, ending, start, tmp_path):
    first, second = tmp_path / f"a.{ending}", tmp_path / f"b.{ending}"
    for path in (first, second):
        EVERY[name](path)
    assert first.read_bytes().startswith(start)
    assert first.read_bytes() == second.read_bytes()


def test_a_comparison_sets_ours_off(tmp_path, drawn):
    plots.plot_comparison(tmp_path / "c.png", results())
    axes = drawn[0].axes
    assert [axis.get_xlabel() for axis in axes] == [
        "accuracy [%] (higher is better)",
        "calibration error [%]\n(higher is better)",
    ]
    bold = [label.get_text() for label in axes[0].get_yticklabels() if label.get_fontweight() == "bold"]
    assert bold == ["bayesian-taml"]


def test_a_history_is_averaged_over_the_steps_before(tmp_path, drawn):
    plots.plot_history(tmp_path / "h.png", {"maml": history(10), "taml": history(10)}, 3)
    loss, accuracy = drawn[0].axes
    values = [2 / k for k in range(1, 11)]
    expected = [np.mean(values[max(0, k - 2) : k + 1]) for k in range(10)]
    np.testing.assert_allclose(loss.lines[0].get_ydata(), expected)
    assert accuracy.lines[0].get_ydata()[0] == 0
    assert "mean of the last 3" in loss.get_xlabel()


def test_steps_without_a_loss_are_left_out_of_a_history(tmp_path, drawn):
    plots.plot_history(
        tmp_path / "h.png", {"maml": [Step(1, 2.0, 0.1), Step(2, float("nan"), 0.0), Step(3, 1.0, 0.5)]}, 1
    )
    np.testing.assert_array_equal(drawn[0].axes[0].lines[0].get_xdata(), [1, 3])


def test_gains_are_over_the_reference_in_the_bins_that_both_have(tmp_path, drawn):
    ours = bins(0.1)[1:]
    plots.plot_sizes(tmp_path / "s.png", {"maml": bins()[:3], "taml": ours}, reference="maml")
    accuracy, gain = drawn[0].axes
    labels = [label.get_text().replace("\N{EN DASH}", "-") for label in accuracy.get_xticklabels()]
    assert labels == ["1-3", "4-5", "6-10", "11-20", "21-50"]
    assert gain.get_ylabel() == "gain over maml [points]"
    line, _, (arms,) = gain.containers[0]
    np.testing.assert_allclose(line.get_ydata(orig=False), [10, 10])
    np.testing.assert_allclose(np.round(line.get_xdata(orig=False)), [1, 2])
    ends = np.array([path.vertices[:, 1] for path in arms.get_paths()])
    np.testing.assert_allclose(np.diff(ends).ravel(), 2 * 2 * np.sqrt(2))


def test_weights_are_drawn_beside_both_rules(tmp_path, drawn):
    counts, omega = np.array([1, 3, 2, 2]), np.array([0.6, 0.4, 0.5, 0.5])
    plots.plot_omega(tmp_path / "o.png", counts, omega, 2)
    points, flat, rule, learned = drawn[0].axes[0].lines
    np.testing.assert_array_equal(points.get_xydata(), np.stack([counts, omega], 1))
    assert list(flat.get_ydata()) == [0.5, 0.5]
    np.testing.assert_allclose(rule.get_xydata(), [[1, 0.75], [2, 0.5], [3, 0.25]])
    np.testing.assert_allclose(learned.get_xydata(), [[1, 0.6], [2, 0.5], [3, 0.4]])


def test_multipliers_are_medians_over_tasks_of_one_size(tmp_path, drawn):
    gamma = np.array([[1.0, 4.0], [2.0, 2.0], [9.0, 1.0], [0.5, 3.0]])
    plots.plot_gamma(tmp_path / "g.png", [5, 5, 5, 40], gamma, ["conv1", "head"], rule=10.0)
    _, first, second, rule = drawn[0].axes[0].lines
    np.testing.assert_allclose(first.get_xydata(), [[5, 2], [40, 0.5]])
    np.testing.assert_allclose(second.get_xydata(), [[5, 2], [40, 3]])
    np.testing.assert_allclose(rule.get_xydata()[[0, -1]], [[5, 1 / 3], [40, 0.8]])
    assert rule.get_label() == "N / (N + 10)"


def test_many_sizes_are_grouped_and_none_is_lost():
    values = np.random.default_rng(0).integers(1, 51, 500).astype(float)
    groups = plots._groups(values)
    assert len(groups) <= 12
    np.testing.assert_array_equal(np.sort(np.concatenate(groups)), np.arange(500))
    assert all(values[a].max() < values[b].min() for a, b in pairwise(groups))


def test_reliability_names_the_calibration_error(tmp_path, drawn):
    found = {"maml": answers(3), "taml": answers(4)}
    plots.plot_reliability(tmp_path / "r.png", found)
    texts = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert texts[1:] == [f"{name}, ECE {100 * calibration_error(*pair):.1f} %" for name, pair in found.items()]
    assert sum(drawn[0].axes[1].lines[0].get_ydata()) == pytest.approx(1)


def test_an_explanation_lists_classes_from_most_to_fewest_examples(tmp_path, drawn):
    found = explanation()
    plots.plot_explanation(tmp_path / "e.png", found)
    weights, losses, steps, moved = drawn[0].axes
    order = np.argsort(-found.counts, kind="stable")
    assert [label.get_text() for label in weights.get_yticklabels()] == [
        f"class {k}  ({found.counts[k]})" for k in order
    ]
    np.testing.assert_allclose([bar.get_width() for bar in weights.patches], found.omega[order])
    for line, bar, k in zip(losses.lines, weights.patches, order, strict=True):
        np.testing.assert_allclose(line.get_ydata(), found.class_loss[:, k])
        np.testing.assert_allclose(bar.get_facecolor()[:3], plots.mpl.colors.to_rgb(line.get_color()))
    assert [label.get_text() for label in steps.get_yticklabels()] == list(found.layers)
    np.testing.assert_allclose([bar.get_width() for bar in moved.patches], [*found.moved[:-1], 0])
    assert [text.get_text() for text in moved.texts] == ["starts at zero"]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda path: plots.plot_comparison(path, []), "no results"),
        (lambda path: plots.plot_history(path, {}), "no history"),
        (lambda path: plots.plot_history(path, {"maml": [Step(1, float("nan"), 0.0)]}), "no history"),
        (lambda path: plots.plot_history(path, {"maml": history()}, 0), "window: must be at least 1"),
        (lambda path: plots.plot_sizes(path, {"maml": []}), "no accuracy by class size"),
        (lambda path: plots.plot_sizes(path, {"maml": bins()}, reference="taml"), "reference: must be one of maml"),
        (lambda path: plots.plot_omega(path, [1, 2, 3], [0.2, 0.3, 0.5], 2), "needs 2 classes for each task"),
        (lambda path: plots.plot_omega(path, [1, 2], [0.2], 2), "omega: needs as many rows"),
        (lambda path: plots.plot_omega(path, [0, 2], [0.2, 0.8], 2), "counts: must be at least 1"),
        (lambda path: plots.plot_omega(path, [], [], 2), "counts: needs one finite number"),
        (lambda path: plots.plot_gamma(path, [5], [[1.0, 2.0]], ["head"]), r"gamma: .* \(1, 1\), got \(1, 2\)"),
        (lambda path: plots.plot_gamma(path, [5], [[0.0]], ["head"]), "above 0"),
        (lambda path: plots.plot_gamma(path, [5], [[1.0]], ["head"], rule=-1.0), "kappa must not be negative"),
        (lambda path: plots.plot_reliability(path, {}), "no probabilities"),
        (lambda path: plots.plot_explanation(path, replace(explanation(), omega=np.ones(4))), r"omega must .* \(5,\)"),
        (lambda path: plots.plot_explanation(path, replace(explanation(), z_size=np.ones(5))), r"z_size .* \(4,\)"),
        (lambda path: plots.plot_explanation(path, replace(explanation(), class_loss=np.ones(5))), "class_loss"),
        (lambda path: plots.plot_explanation(path, replace(explanation(), class_names=())), "at least one class"),
        (lambda path: plots.plot_history(path.with_suffix(".bmp2"), {"maml": history()}), "use .png"),
    ],
)
def test_nothing_to_draw_is_said_in_a_line(call, words, tmp_path):
    with pytest.raises(InputError, match=words) as caught:
        call(tmp_path / "p.png")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
