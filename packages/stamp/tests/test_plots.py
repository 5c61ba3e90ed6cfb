"""Pictures are made, hold the numbers that they were given, and no text covers another or leaves the page."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise, product

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.colors import same_color
from matplotlib.figure import Figure

from shared_core.errors import InputError
from shared_core.runs import Result
from shared_core.testing import keep_figures, misplaced, visible_texts
from stamp import plots
from stamp.plots import Course, Point

METHODS = (
    "stamp",
    "random",
    "l1",
    "l2",
    "bn",
    "act",
    "apoz",
    "snip",
    "taylor",
    "grasp",
    "synflow",
    "bbdropout",
    "free",
    "torch-pruning-magnitude",
    "torch-pruning-taylor",
    "metapruning",
)
VARIANTS = ("as it is", "head mlp", "attention, 1 pseudo-instance", "3 inner steps from class means")
LONG = "features.block{}.convolution.weight_of_the_layer"


@dataclass(frozen=True)
class Step:
    step: int
    loss: float
    spread: float
    overlap: float


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    return keep_figures(monkeypatch, plots, write=False)


def networks(methods=METHODS, budgets=(0.1, 0.25, 0.5), spread: float = 12.0, worst: float = 25.0) -> list[Point]:
    random = np.random.default_rng(0)
    points = [Point("dense", 93.2, 92.9, 93.5, macs=1.0, ms=41.2)]
    for name in methods:
        loss = {"stamp": 0.3, "random": worst}.get(name, random.uniform(0, spread))
        for budget in budgets:
            mean = float(93.2 - loss * (0.5 / budget) ** 0.6 + random.normal(0, 0.1))
            share = float(budget * random.uniform(0.97, 1))
            points.append(Point(name, mean, mean - 0.4, mean + 0.6, macs=share, ms=41.2 * share**0.7))
    return points


def widths(methods=METHODS, groups: int = 8, name: str = "conv{}") -> dict[str, dict[str, tuple[int, int]]]:
    random = np.random.default_rng(0)
    dense = [64 * 2 ** min(3, 4 * k // groups) for k in range(groups)]
    return {
        method: {name.format(k): (int(random.integers(0, width + 1)), width) for k, width in enumerate(dense)}
        for method in methods
    }


def overlaps(tasks: int) -> np.ndarray:
    values = np.random.default_rng(0).uniform(0, 1, (tasks, tasks))
    values = (values + values.T) / 2
    np.fill_diagonal(values, 1)
    return values


def adapted(sets=("mnist", "optdigits")) -> dict[str, dict[str, object]]:
    random = np.random.default_rng(0)
    table: dict[str, dict[str, object]] = {}
    for name in sets:
        table[name] = {"own": float(random.uniform(0.9, 0.95))}
        table[name] |= {other: float(random.uniform(0.6, 0.9)) for other in sets if other != name}
        table[name]["random"] = random.uniform(0.2, 0.5, 10).tolist()
        table[name] |= {mask: float(random.uniform(0.91, 0.92)) for mask in ("l1", "bn", "act", "snip")}
    return table


def course(top: float, rate: float, begin: float = 0.0, start: float = 0.1, end: float = 30.0, **more) -> Course:
    at = np.linspace(begin, end, 20)
    return Course(at.tolist(), (top - (top - start) * np.exp(-(at - begin) / rate)).tolist(), **more)


def dense_then_cut() -> Course:
    first, then = course(0.94, 8.0, end=45.0), course(0.935, 5.0, begin=46.0, start=0.8, end=75.0)
    return Course([*first.at, *then.at], [*first.accuracy, *then.accuracy], small_from=45.5)


WAYS = {"stamp": course(0.935, 3.0, begin=0.5, start=0.7), "dense, then l1": dense_then_cut()}


def history(steps: int = 100) -> list[Step]:
    return [Step(k, 2 / k, 0.25 / k**0.5, 1 - k / (2 * steps)) for k in range(1, steps + 1)]


def results(datasets=("optdigits",), metrics=("accuracy", "milliseconds"), methods=METHODS) -> list[Result]:
    random = np.random.default_rng(0)
    return [
        Result(
            dataset=dataset,
            method=method,
            metric=metric,
            unit={"accuracy": "%", "milliseconds": "ms"}.get(metric, "1"),
            better="lower" if metric == "milliseconds" else "higher",
            mean=(mean := float(random.uniform(92, 93))),
            low=mean - 0.4,
            high=mean + 0.4,
            n=3,
            seconds=1.0,
        )
        for dataset, metric, method in product(datasets, metrics, methods)
    ]


def times(methods=METHODS, count: int = 4) -> dict[str, list[tuple[float, float]]]:
    random = np.random.default_rng(0)
    return {
        name: [(ms, ms * float(random.normal(1, 0.06))) for ms in random.uniform(8, 45, count).tolist()]
        for name in methods
    }


EVERY = {
    "tradeoff": lambda path: plots.plot_tradeoff(path, networks(), title="optdigits"),
    "tradeoff_within_a_point": lambda path: plots.plot_tradeoff(path, networks(spread=0.3, worst=0.4), "ms"),
    "tradeoff_of_few": lambda path: plots.plot_tradeoff(path, networks(METHODS[:3])),
    "tradeoff_at_one_budget": lambda path: plots.plot_tradeoff(path, networks(METHODS, (0.25,))),
    "tradeoff_of_one": lambda path: plots.plot_tradeoff(path, [Point("stamp", 90, macs=0.25)]),
    "tradeoff_of_dense": lambda path: plots.plot_tradeoff(path, [Point("dense", 90, ms=3)], "ms"),
    "tradeoff_of_many": lambda path: plots.plot_tradeoff(path, networks([LONG.format(k) for k in range(24)], (0.2, 1))),
    "widths": lambda path: plots.plot_widths(path, widths(groups=4), title="at 0.25 of the MACs"),
    "widths_of_three": lambda path: plots.plot_widths(path, widths(("stamp", "l1"), 3)),
    "widths_of_one": lambda path: plots.plot_widths(path, widths(("digits",), 1)),
    "widths_of_sixty": lambda path: plots.plot_widths(path, widths(METHODS[:2], 60, LONG)),
    "overlap": lambda path: plots.plot_overlap(path, overlaps(6), [*METHODS[:5], LONG], title="mean over groups"),
    "overlap_of_one": lambda path: plots.plot_overlap(path, [[1]], ["mnist"]),
    "overlap_of_many": lambda path: plots.plot_overlap(path, overlaps(14), [LONG.format(k) for k in range(14)]),
    "adaptivity": lambda path: plots.plot_adaptivity(path, adapted(), title="0.3 of the MACs"),
    "adaptivity_of_one": lambda path: plots.plot_adaptivity(path, {"mnist": {"own": 0.9}}),
    "adaptivity_of_many": lambda path: plots.plot_adaptivity(path, adapted([LONG.format(k) for k in range(9)])),
    "rapid": lambda path: plots.plot_rapid(path, WAYS, dense=0.94, title="optdigits"),
    "rapid_of_many": lambda path: plots.plot_rapid(
        path, {LONG.format(k): course(0.9, 1.0 + k) for k in range(8)}, dense=0.95, x="steps"
    ),
    "rapid_of_one": lambda path: plots.plot_rapid(path, {"stamp": Course([3], [0.9])}, dense=1, x="steps"),
    "rapid_at_once": lambda path: plots.plot_rapid(path, {"stamp": Course([0], [0.9])}, dense=0.9),
    "history": lambda path: plots.plot_history(path, history()),
    "history_of_one": lambda path: plots.plot_history(path, [replace(history(1)[0], overlap=float("nan"))]),
    "comparison": lambda path: plots.plot_comparison(path, results()),
    "comparison_grid": lambda path: plots.plot_comparison(path, results(("mnist", "optdigits"), methods=METHODS[:8])),
    "comparison_of_many": lambda path: plots.plot_comparison(
        path, results(metrics=[f"metric_{k}" for k in range(5)], methods=METHODS[:4])
    ),
    "comparison_of_variants": lambda path: plots.plot_comparison(
        path, results(metrics=("accuracy", "steps", "overlap with masks for other data"), methods=VARIANTS)
    ),
    "comparison_of_one": lambda path: plots.plot_comparison(path, results(metrics=("accuracy",), methods=("l1",))),
    "latency": lambda path: plots.plot_latency(path, times(), title="cpu, batch 64"),
    "latency_of_one": lambda path: plots.plot_latency(path, {"stamp": [(3, 3)]}),
    "latency_of_few": lambda path: plots.plot_latency(path, times((LONG, "l1", "l2"), 2)),
}


@pytest.mark.parametrize("name", EVERY)
def test_every_picture_is_drawn_without_text_on_text_or_beyond_the_page(name, tmp_path, drawn):
    path = tmp_path / "picture.png"
    assert EVERY[name](path) == path
    assert misplaced(drawn[0]) == []
    for legend in drawn[0].legends:
        box, edge = legend.get_window_extent(), drawn[0].bbox
        assert box.x0 >= edge.x0 - 1
        assert box.x1 <= edge.x1 + 1
        assert box.y0 >= edge.y0 - 1
        assert box.y1 <= edge.y1 + 1


@pytest.mark.parametrize(
    ("name", "ending", "start"),
    [
        ("tradeoff_of_few", "svg", b"<?xml"),
        ("history", "pdf", b"%PDF"),
        ("overlap_of_one", "png", b"\x89PNG"),
        ("latency_of_one", "PNG", b"\x89PNG"),
    ],
)
def test_the_same_data_gives_the_same_bytes(name, ending, start, tmp_path):
    first, second = tmp_path / f"a.{ending}", tmp_path / f"b.{ending}"
    for path in (first, second):
        assert EVERY[name](str(path)) == path
    assert first.read_bytes().startswith(start)
    assert first.read_bytes() == second.read_bytes()


def test_a_tradeoff_has_a_line_for_each_method_and_a_star_for_dense(tmp_path, drawn):
    points = networks(METHODS[:4])
    plots.plot_tradeoff(tmp_path / "t.png", points[::-1])
    axis = drawn[0].axes[0]
    lines = {each.get_label(): each.lines for each in axis.containers}
    assert set(lines) == {"dense", *METHODS[:4]}
    for name, (line, _, (arms,)) in lines.items():
        rows = [point for point in points if point.method == name]
        np.testing.assert_allclose(line.get_xydata(), [(point.macs, point.accuracy) for point in rows])
        ends = [path.vertices[:, 1] for path in arms.get_paths()]
        np.testing.assert_allclose(ends, [(point.low, point.high) for point in rows])
    assert lines["dense"][0].get_marker() == "*"
    assert lines["stamp"][0].get_linewidth() == max(each[0].get_linewidth() for each in lines.values())
    bold = [text.get_text() for text in axis.texts if text.get_fontweight() == "bold"]
    assert bold == ["stamp"]
    for text in axis.texts:
        assert same_color(text.get_color(), lines[text.get_text().partition(",")[0]][0].get_color())


def test_a_tradeoff_over_milliseconds_leaves_out_intervals_that_there_are_none_of(tmp_path, drawn):
    plots.plot_tradeoff(tmp_path / "t.png", [Point("l1", 90, ms=3), Point("l1", 80, 79, 81, ms=2)], "ms")
    line, _, (arms,) = drawn[0].axes[0].containers[0].lines
    np.testing.assert_array_equal(line.get_xydata(), [(2, 80), (3, 90)])
    np.testing.assert_array_equal([path.vertices[:, 1] for path in arms.get_paths()], [(79, 81), (90, 90)])
    assert "milliseconds" in drawn[0].axes[0].get_xlabel()


def test_networks_at_chance_do_not_press_the_others_together(tmp_path, drawn):
    points = networks(spread=1.0, worst=50.0)
    plots.plot_tradeoff(tmp_path / "t.png", points)
    bottom, top = drawn[0].axes[0].get_ylim()
    shown = [point.accuracy for point in points if point.accuracy >= bottom]
    assert {point.method for point in points if point.accuracy < bottom} == {"random"}
    assert max(shown) - min(shown) > 0.6 * (top - bottom)
    start = points[4].accuracy
    assert points[4].method == "random"
    assert f"random, {start:.1f} % \u2193" in [text.get_text() for text in drawn[0].axes[0].texts]


def test_no_more_than_a_quarter_of_the_networks_is_cut_off():
    random = np.random.default_rng(0)
    for _ in range(200):
        values = random.uniform(0, 100, random.integers(1, 30)) ** random.uniform(0.2, 2)
        assert (values < plots._lowest_shown(values.tolist())).sum() <= len(values) / 4
    assert plots._lowest_shown([95, 91, 92, 93, 94, 90]) == 90
    assert plots._lowest_shown([95, 91, 94, 9]) == 9
    assert plots._lowest_shown([95, 91, 92, 93, 94, 90, 90, 9]) == 90


def test_an_interval_of_two_seeds_does_not_press_the_methods_together(tmp_path, drawn):
    points = [Point("dense", 99.5, macs=1), Point("l1", 97, 70, 124, macs=0.5), Point("l2", 95, 94, 96, macs=0.5)]
    plots.plot_tradeoff(tmp_path / "t.png", points)
    bottom, top = drawn[0].axes[0].get_ylim()
    assert 90 < bottom < 94
    assert 100 < top < 101


def test_labels_are_set_apart_and_move_as_little_as_can_be():
    random = np.random.default_rng(0)
    for _ in range(50):
        wanted = np.sort(random.uniform(0, 1, 6))
        places = np.array(plots._apart(wanted.tolist(), 0.1, 0.0, 1.0))
        assert all(b - a > 0.1 - 1e-9 for a, b in pairwise(places))
        assert places.min() >= 0
        assert places.max() <= 1 + 1e-9
        inside = places[(places > 1e-9) & (places < 1 - 1e-9)]
        # Of all sets of places the best is the mean of its block: none near it that is allowed is better.
        cost = ((places - wanted) ** 2).sum()
        for _ in range(200 if len(inside) else 0):
            other = np.sort(places + random.normal(0, 0.02, 6))
            if np.diff(other).min() >= 0.1 and other.min() >= 0 and other.max() <= 1:
                assert ((other - wanted) ** 2).sum() >= cost - 1e-9
    assert plots._apart([0.2, 0.5, 0.9], 0.1, 0.0, 1.0) == pytest.approx([0.2, 0.5, 0.9])
    assert plots._apart([0.5, 0.5], 0.1, 0.0, 1.0) == pytest.approx([0.45, 0.55])
    crowd = plots._apart([0.5] * 20, 0.1, 0.0, 1.0)
    assert np.diff(crowd) == pytest.approx([0.1] * 19)


def test_bars_are_the_share_kept_with_the_channels_above(tmp_path, drawn):
    given = widths(("stamp", "l1"), 5)
    plots.plot_widths(tmp_path / "w.png", given)
    for axis, (name, groups) in zip(drawn[0].axes, given.items(), strict=True):
        whole, kept = axis.containers
        np.testing.assert_array_equal([bar.get_height() for bar in whole], [100] * 5)
        np.testing.assert_allclose([bar.get_height() for bar in kept], [100 * k / w for k, w in groups.values()])
        assert [text.get_text() for text in axis.texts] == [str(k) for k, _ in groups.values()]
        total = sum(k for k, _ in groups.values())
        assert axis.get_title(loc="left") == f"{name}: {total} of {sum(w for _, w in groups.values())}"
    labels = [label.get_text() for label in drawn[0].axes[0].get_xticklabels()]
    assert labels == [f"conv{k}  ({width})" for k, (_, width) in enumerate(given["l1"].values())]
    ours, theirs = (axis.containers[1][0].get_facecolor() for axis in drawn[0].axes)
    assert same_color(ours, plots._OURS_COLOUR)
    assert not same_color(theirs, ours)


def test_layers_are_named_under_the_last_panel_of_each_column(tmp_path, drawn):
    plots.plot_widths(tmp_path / "w.png", widths(METHODS[:7], 4))
    shown = [text for text, _ in visible_texts(drawn[0])]
    assert [shown.count(f"conv{k}  ({64 * 2**k})") for k in range(4)] == [4] * 4


def test_overlaps_are_written_into_their_cells(tmp_path, drawn):
    values = overlaps(4)
    plots.plot_overlap(tmp_path / "o.png", values, list("abcd"))
    axis = drawn[0].axes[0]
    np.testing.assert_array_equal(axis.images[0].get_array(), values)
    assert axis.images[0].get_clim() == (0, 1)
    written = {text.get_position(): text.get_text() for text in axis.texts}
    assert written == {(column, row): f"{values[row, column]:.2f}" for row in range(4) for column in range(4)}


def test_values_stand_out_from_their_cells(tmp_path, drawn):
    values = np.linspace(0, 1, 100).reshape(10, 10)
    plots.plot_overlap(tmp_path / "o.png", values, list("abcdefghij"))
    axis = drawn[0].axes[0]

    def luminance(colour) -> float:
        channels = np.asarray(mpl.colors.to_rgb(colour))
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    for text, value in zip(axis.texts, values.ravel(), strict=True):
        two = sorted([luminance(text.get_color()), luminance(axis.images[0].cmap(value)[:3])])
        assert (two[1] + 0.05) / (two[0] + 0.05) > 4.5  # WCAG's level AA


def test_dots_are_accuracies_with_the_own_mask_in_front(tmp_path, drawn):
    sets = ("a", "b", "c")
    table = adapted(sets)
    for masks in table.values():
        masks["dense"] = 0.99
    plots.plot_adaptivity(tmp_path / "a.png", table)
    axis = drawn[0].axes[0]
    for row, (name, masks) in enumerate(table.items()):
        dots = {
            line.get_label(): line
            for line in axis.lines
            if not line.get_label().startswith("_") and abs(line.get_ydata()[0] - row) < 0.5
        }
        assert set(dots) == {"own", "other", "random", "l1", "bn", "act", "snip", "dense"}
        others = [100 * masks[other] for other in sets if other != name]
        np.testing.assert_allclose(dots["other"].get_xdata(), others)
        np.testing.assert_allclose(dots["random"].get_xdata(), [100 * np.mean(masks["random"])])
        for mask in ("own", "l1", "bn", "act", "snip", "dense"):
            np.testing.assert_allclose(dots[mask].get_xdata(), [100 * masks[mask]])
        assert dots["own"].get_markersize() > max(dots[mask].get_markersize() for mask in ("l1", "random", "other"))
        assert dots["dense"].get_marker() == "*"
        assert dots["own"].get_zorder() == max(line.get_zorder() for line in dots.values())
        ranges = [
            line.get_xdata()
            for line in axis.lines
            if len(line.get_xdata()) == 2 and line.get_linestyle() == "-" and len(set(line.get_ydata())) == 1
        ]
        assert any(np.allclose(ends, [100 * min(masks["random"]), 100 * max(masks["random"])]) for ends in ranges)
    assert [label.get_text() for label in axis.get_yticklabels()] == list(sets)


def test_the_own_mask_may_go_by_the_name_of_its_data_set(tmp_path, drawn):
    plots.plot_adaptivity(tmp_path / "a.png", {"a": {"a": 0.9, "b": 0.5}, "b": {"own": 0.8, "other": [0.4, 0.6]}})
    labels = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert labels == ["its own mask", "masks of other sets"]


def test_a_way_is_marked_where_its_small_network_is_first_near_dense(tmp_path, drawn):
    cut = Course([1, 2, 3, 4, 5], [0.5, 0.93, 0.8, 0.91, 0.92], small_from=2.5)
    slow = Course([1, 5], [0.2, 0.5])
    plots.plot_rapid(tmp_path / "r.png", {"stamp": Course([1, 2], [0.7, 0.92]), "cut": cut, "slow": slow}, dense=0.92)
    axis = drawn[0].axes[0]
    stars = [line.get_xydata().ravel().tolist() for line in axis.lines if line.get_marker() == "*"]
    assert sorted(stars) == [[2, 92], [4, 91]]
    labels = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert labels == [
        "stamp: within 1 point of dense after 2 s",
        "slow: not within 1 point of dense",
        "cut: within 1 point of dense after 4 s",
        "dense: 92.0 %",
    ]
    solid = next(line for line in axis.lines if line.get_label().startswith("cut"))
    np.testing.assert_allclose(solid.get_xydata(), [(3, 80), (4, 91), (5, 92)])
    dashed = next(line for line in axis.lines if line.get_linestyle() == "--")
    np.testing.assert_allclose(dashed.get_xydata(), [(1, 50), (2, 93)])
    assert same_color(dashed.get_color(), solid.get_color())
    assert "dashed" in axis.get_xlabel()


def test_each_way_shows_its_best(tmp_path, drawn):
    plots.plot_rapid(tmp_path / "r.png", {"a": Course([0, 9], [0.1, 0.3]), "b": Course([0, 9], [0.1, 0.9])}, dense=0.9)
    bottom, top = drawn[0].axes[0].get_ylim()
    assert 10 < bottom < 30
    assert top > 90


def test_training_is_averaged_over_the_steps_before(tmp_path, drawn):
    steps = history(10)
    steps[3] = replace(steps[3], overlap=float("nan"))
    plots.plot_history(tmp_path / "t.png", steps, window=3)
    loss, spread, overlap = drawn[0].axes
    for axis, values in ((loss, [s.loss for s in steps]), (spread, [s.spread for s in steps])):
        expected = [np.mean(values[max(0, k - 2) : k + 1]) for k in range(10)]
        np.testing.assert_allclose(axis.lines[0].get_ydata(), values)
        np.testing.assert_allclose(axis.lines[1].get_ydata(), expected)
    np.testing.assert_array_equal(overlap.lines[0].get_xdata(), [1, 2, 3, 5, 6, 7, 8, 9, 10])
    assert spread.lines[2].get_ydata()[0] == 0.1
    assert overlap.lines[2].get_ydata()[0] == 0.95
    assert "mean of the last 3" in loss.get_xlabel()


def test_a_comparison_sets_what_begins_with_stamp_off(tmp_path, drawn):
    plots.plot_comparison(tmp_path / "c.png", results(methods=("l1", "stamp", "stamp head mlp")))
    for axis in drawn[0].axes:
        bold = {label.get_text() for label in axis.get_yticklabels() if label.get_fontweight() == "bold"}
        assert bold == {"stamp", "stamp head mlp"}


def test_times_are_drawn_with_their_median_error(tmp_path, drawn):
    given = {"stamp": [(10, 11), (20, 20), (30, 24)], "l1": [(12.0, 12.0)]}
    plots.plot_latency(tmp_path / "l.png", given)
    axis = drawn[0].axes[0]
    diagonal, ours, theirs = axis.lines
    np.testing.assert_array_equal(diagonal.get_xdata(), diagonal.get_ydata())
    np.testing.assert_array_equal(ours.get_xydata(), given["stamp"])
    np.testing.assert_array_equal(theirs.get_xydata(), given["l1"])
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["stamp, 10 %", "l1, 0 %"]
    assert axis.get_xlim() == axis.get_ylim()


def test_sixteen_methods_look_different_and_ours_has_a_colour_of_its_own():
    look = plots._looks(METHODS)
    assert len(set(look.values())) == len(METHODS)
    assert [name for name, (colour, _, _) in look.items() if colour == plots._OURS_COLOUR] == ["stamp"]


NAN = float("nan")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda path: plots.plot_tradeoff(path, []), "points: there is no network"),
        (lambda path: plots.plot_tradeoff(path, [Point("l1", NAN, macs=0.5)]), "points: l1: accuracy must be finite"),
        (lambda path: plots.plot_tradeoff(path, [Point("l1", 1.0, NAN, 2.0, macs=0.5)]), "accuracy must be finite"),
        (lambda path: plots.plot_tradeoff(path, [Point("l1", 1.0, macs=NAN)]), "macs must be finite and above 0"),
        (lambda path: plots.plot_tradeoff(path, [Point("l1", 1.0, macs=0)]), "macs must be finite and above 0, got 0"),
        (lambda path: plots.plot_tradeoff(path, [Point("l1", 1.0, macs=0.5)], "ms"), "l1 has no ms; .* over macs"),
        (lambda path: plots.plot_tradeoff(path, [Point("l1", 1.0, macs=0.5)], "flops"), "x: must be macs or ms"),
        (lambda path: plots.plot_widths(path, {}), "widths: there is no layer"),
        (lambda path: plots.plot_widths(path, {"l1": {}}), "widths: there is no layer"),
        (lambda path: plots.plot_widths(path, {"l1": {"a": (5, 4)}}), "l1, a: .* got 5 of 4"),
        (lambda path: plots.plot_widths(path, {"l1": {"a": (0, 0)}}), "got 0 of 0"),
        (lambda path: plots.plot_widths(path, {"l1": {"a": (1, 4)}, "l2": {"a": (1, 5)}}), "l2 must have the groups"),
        (lambda path: plots.plot_widths(path, {"l1": {"a": (1, 4)}, "l2": {"b": (1, 4)}}), "l2 must have the groups"),
        (lambda path: plots.plot_overlap(path, np.zeros((0, 0)), []), "names: there is no task"),
        (lambda path: plots.plot_overlap(path, [[1, 0]], ["a", "b"]), r"\(2, 2\), got \(1, 2\)"),
        (lambda path: plots.plot_overlap(path, [[NAN]], ["a"]), "0..1, got nan"),
        (lambda path: plots.plot_overlap(path, [[1.5]], ["a"]), "0..1, got 1.5"),
        (lambda path: plots.plot_adaptivity(path, {}), "table: there is no accuracy"),
        (lambda path: plots.plot_adaptivity(path, {"a": {}}), "table: there is no accuracy"),
        (lambda path: plots.plot_adaptivity(path, {"a": {"own": NAN}}), "table: a, own: .* got .nan"),
        (lambda path: plots.plot_adaptivity(path, {"a": {"own": 93.0}}), "table: a, own: .* got .93"),
        (lambda path: plots.plot_adaptivity(path, {"a": {"random": []}}), "table: a, random: needs an accuracy"),
        (lambda path: plots.plot_rapid(path, {}, dense=0.9), "curves: there is no course"),
        (lambda path: plots.plot_rapid(path, WAYS, dense=93.0), "dense: must be an accuracy in 0..1, got 93"),
        (lambda path: plots.plot_rapid(path, WAYS, dense=NAN), "dense: must be an accuracy"),
        (lambda path: plots.plot_rapid(path, WAYS, dense=0.9, within=1.0), "within: .* got 1"),
        (lambda path: plots.plot_rapid(path, {"l1": Course([], [])}, dense=0.9), "l1 needs as many .* got 0 and 0"),
        (lambda path: plots.plot_rapid(path, {"l1": Course([1], [])}, dense=0.9), "l1 needs as many .* got 1 and 0"),
        (lambda path: plots.plot_rapid(path, {"l1": Course([NAN], [0.9])}, dense=0.9), "l1: times must be finite"),
        (lambda path: plots.plot_rapid(path, {"l1": Course([2, 1], [0.9, 0.9])}, dense=0.9), "must not fall"),
        (lambda path: plots.plot_rapid(path, {"l1": Course([1], [NAN])}, dense=0.9), "0..1, got nan"),
        (lambda path: plots.plot_history(path, []), "history: no meta-step"),
        (lambda path: plots.plot_history(path, history(3), window=0), "window: must be at least 1"),
        (
            lambda path: plots.plot_history(path, [*history(2), Step(3, NAN, 0.1, 0.5)]),
            "history: loss of step 3 is nan; draw the 2 steps before",
        ),
        (lambda path: plots.plot_history(path, [Step(1, 1.0, NAN, 0.5)]), "spread of step 1 is nan"),
        (lambda path: plots.plot_comparison(path, []), "no results"),
        (lambda path: plots.plot_latency(path, {}), "table: there is no network"),
        (lambda path: plots.plot_latency(path, {"l1": []}), "table: there is no network"),
        (lambda path: plots.plot_latency(path, {"l1": [(1.0, NAN)]}), "l1: milliseconds must be finite"),
        (lambda path: plots.plot_latency(path, {"l1": [(0.0, 1.0)]}), "above 0, got .0.0, 1.0"),
        (lambda path: plots.plot_history(path.with_suffix(".bmp2"), history(3)), "use .png"),
        (lambda path: plots.plot_history(path.with_suffix(""), history(3)), "use .png"),
    ],
)
def test_nothing_to_draw_is_said_in_a_line(call, words, tmp_path, unchecked):
    with pytest.raises(InputError, match=words) as caught:
        call(tmp_path / "p.png")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*t\.png"):
        plots.plot_history(tmp_path / "file" / "t.png", history(3))


def test_drawing_leaves_no_state_behind(tmp_path):
    before = dict(mpl.rcParams)
    plots.plot_history(tmp_path / "t.png", history(3))
    assert dict(mpl.rcParams) == before
