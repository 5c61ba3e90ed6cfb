"""Pictures hold the numbers that they were given, no text covers another, and the report stands alone."""

from __future__ import annotations

import html.parser
import re
from dataclasses import dataclass, replace

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ial_nap import plots
from ial_nap.annotations import Annotation, disagreements
from ial_nap.page_report import Certified, Heat, Report, Scored, report_html
from shared_core.errors import InputError
from shared_core.plots import short_names
from shared_core.runs import Result
from shared_core.testing import keep_figures, misplaced

METHODS = ("retain", "drop", "ial-nap", "ial-nap:influence-counterfactual")
FEATURES = ("mean radius", "texture", "LDL cholesterol, fasting", "systolic blood pressure at rest", "age", "HDL")
UNITS = ("mm", "", "mg/dl", "mmHg", "years", "mg/dl")
STEPS = ("2008", "2009", "2010")


@dataclass(frozen=True)
class Epoch:
    epoch: int
    loss: float
    validation: float
    is_best: bool = False


@dataclass(frozen=True)
class Round:
    cells: int
    score: float
    seconds: float


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    return keep_figures(monkeypatch, plots, write=False)


def results(datasets=("cells",), metrics=("auroc", "area under the curve"), methods=METHODS) -> list[Result]:
    random = np.random.default_rng(0)
    return [
        Result(dataset=d, method=name, metric=m, unit="1", better="higher", mean=v, low=v - 0.01, high=v + 0.01, n=5,
               seconds=1.0)
        for d in datasets
        for m in metrics
        for name, v in zip(methods, random.uniform(0.7, 0.9, len(methods)).tolist(), strict=True)
    ]  # fmt: skip


def history(epochs: int = 30, *, checked: bool = True) -> list[Epoch]:
    return [Epoch(k, 1 / k, 1 / k + 0.01 * k if checked else float("nan")) for k in range(1, epochs + 1)]


def cells(steps: int = 3, features: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(steps, features))


def curves(methods=METHODS, seeds: int = 3) -> dict[str, list[list[Round]]]:
    return {
        name: [
            [Round(320 * k, 0.7 + 0.02 * k * m + 0.001 * s, 9.0 if k == 0 else 10.0 ** (m - 3)) for k in range(5)]
            for s in range(seeds)
        ]
        for m, name in enumerate(methods)
    }


def answers(seed: int = 0, n: int = 300) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    p = random.random(n)
    return p, (random.random(n) < p).astype(float)


def verdicts() -> np.ndarray:
    found = -np.ones((3, 6))
    found[:, 1], found[2, 3] = 0, 1
    return found


def kappas(n: int) -> np.ndarray:
    found = np.full((n, n), 0.5)
    found[0, 1] = found[1, 0] = np.nan
    return found


def named(count: int) -> list[str]:
    return [f"{k}" for k in range(count)]


EVERY = {
    "history": lambda path: plots.plot_history(path, {"ial-nap": history()}),
    "history_of_two": lambda path: plots.plot_history(path, {"a": history(), "b": history(checked=False)}),
    "contributions": lambda path: plots.plot_contributions(
        path, {"without verdicts": cells(), "with 4 verdicts": 0.5 * cells()}, features=FEATURES, steps=STEPS,
        values=100 * cells(seed=1), units=UNITS, uncertain=cells(seed=2) > 1, verdicts=verdicts(), title="pid-17",
    ),
    "contributions_of_one_cell": lambda path: plots.plot_contributions(
        path, {"contributions": [[0.0]]}, features=["a"], steps=["0"], values=[[np.nan]]
    ),
    "contributions_of_many": lambda path: plots.plot_contributions(
        path, {"contributions": cells(48, 42)}, features=named(42), steps=named(48), title="pid-17"
    ),
    "attention": lambda path: plots.plot_attention(
        path, [0.5, 0.3, 0.2], cells(), features=FEATURES, steps=STEPS, alpha_deviation=[0.1] * 3,
        gate=np.full((3, 6), 0.9), title="pid-17",
    ),
    "attention_of_many": lambda path: plots.plot_attention(
        path, np.full(48, 1 / 48), cells(48, 42), features=named(42), steps=named(48)
    ),
    "gates": lambda path: plots.plot_gates(
        path, np.full((3, 6), 0.9), np.where(verdicts() == 0, 0, 0.95), features=FEATURES, steps=STEPS
    ),
    "curve": lambda path: plots.plot_curve(path, curves(), metric="auroc", title="cells, a planted site code"),
    "curve_of_many": lambda path: plots.plot_curve(path, curves([f"method {k}" for k in range(14)], 1)),
    "reliability": lambda path: plots.plot_reliability(path, {name: answers(k) for k, name in enumerate("ab")}),
    "reliability_of_one": lambda path: plots.plot_reliability(path, {"a": ([1.0], [1.0])}),
    "intervals": lambda path: plots.plot_intervals(path, {"a": (cells()[0], np.ones(6), cells()[1])}),
    "faithfulness": lambda path: plots.plot_faithfulness(
        path,
        {kind: {"contributions": [1.0, 0.2, 0.0], "random order": [1.0, 0.5, 0.0]} for kind in ("deletion", "insert")},
    ),
    "agreement": lambda path: plots.plot_agreement(path, ["a", "b", "c"], kappas(3), np.full((3, 3), 40)),
    "agreement_of_long_names": lambda path: plots.plot_agreement(
        path, ["doctor of internal medicine A", "doctor of internal medicine B"], kappas(2), np.zeros((2, 2))
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EVERY)
def test_every_picture_is_drawn_without_text_on_text(name, tmp_path, drawn):
    EVERY[name](tmp_path / "picture.png")
    assert misplaced(drawn[0]) == []
    edge = drawn[0].bbox
    for legend in drawn[0].legends:
        box = legend.get_window_extent()
        assert box.x0 >= edge.x0 - 1
        assert box.x1 <= edge.x1 + 1
        assert box.y0 >= edge.y0 - 1
        assert box.y1 <= edge.y1 + 1


@pytest.mark.parametrize(
    ("name", "ending", "start"),
    [("gates", "svg", b"<?xml"), ("history", "pdf", b"%PDF"), ("contributions", "png", b"\x89PNG")],
)
def test_the_same_arguments_give_the_same_bytes(name, ending, start, tmp_path):
    first, second = tmp_path / f"a.{ending}", tmp_path / f"b.{ending}"
    for path in (first, second):
        EVERY[name](path)
    assert first.read_bytes().startswith(start)
    assert first.read_bytes() == second.read_bytes()


def test_nothing_is_white_and_signs_are_apart_for_every_eye():
    assert plots.DIVERGING(0.5) == (1.0, 1.0, 1.0, 1.0)
    both = np.array([plots.DIVERGING(0.5 + side * x)[:3] for x in (0.1, 0.25, 0.5) for side in (-1, 1)])
    # Blue is what readers without the red or the green cones keep: it must fall on one side, and stay on the other.
    blue = both[:, 2].reshape(3, 2)
    assert (blue[:, 0] - blue[:, 1] > 0.05).all()
    assert both[0::2, 0].max() < both[1::2, 0].min() + 0.4
    luminance = np.array([plots.DIVERGING(x)[:3] for x in np.linspace(0, 1, 257)]) @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(luminance[:129]) >= -1e-3).all()
    assert (np.diff(luminance[128:]) <= 1e-3).all()


def test_maps_share_one_scale_and_the_largest_share_comes_first(tmp_path, drawn):
    before, after = cells(), cells(seed=3)
    plots.plot_contributions(tmp_path / "c.png", {"b": before, "a": after}, features=FEATURES, steps=STEPS)
    first, second, _ = drawn[0].axes
    order = np.argsort(-(np.abs(before) + np.abs(after)).sum(0))
    np.testing.assert_allclose(first.images[0].get_array(), before[:, order].T)
    np.testing.assert_allclose(second.images[0].get_array(), after[:, order].T)
    limit = max(np.abs(before).max(), np.abs(after).max())
    assert first.images[0].get_clim() == second.images[0].get_clim() == (-limit, limit)
    assert [label.get_text() for label in first.get_yticklabels()] == short_names([FEATURES[d] for d in order])


def test_verdicts_values_and_doubt_are_marked_where_they_are(tmp_path, drawn):
    values = 100 * cells(seed=1)
    values[0, 0] = np.nan
    uncertain = np.zeros((3, 6))
    uncertain[1, 2] = 1
    plots.plot_contributions(
        tmp_path / "c.png", {"a": cells()}, features=FEATURES, steps=STEPS, values=values, uncertain=uncertain,
        verdicts=verdicts(),
    )  # fmt: skip
    axis = drawn[0].axes[0]
    order = np.argsort(-np.abs(cells()).sum(0)).tolist()
    shown = {(round(t.get_position()[0]), order[round(t.get_position()[1])]): t.get_text() for t in axis.texts}
    assert shown == {
        (t, d): f"{values[t, d]:.3g}" for t in range(3) for d in range(6) if np.isfinite(values[t, d])
    }  # fmt: skip
    boxes = [patch for patch in axis.patches if isinstance(patch, Rectangle)]
    (hatched,) = [patch for patch in boxes if patch.get_hatch()]
    assert (round(hatched.get_x() + 0.5), order[round(hatched.get_y() + 0.5)]) == (1, 2)
    framed = {(round(b.get_x()), order[round(b.get_y())]): b.get_linestyle() for b in boxes if not b.get_hatch()}
    assert framed == {**{(t, 1): ":" for t in range(3)}, (2, 3): "-"}


def test_a_curve_is_over_verdicts_and_over_the_time_that_learning_took(tmp_path, drawn):
    found = curves(("retain", "ial-nap"), 2)
    plots.plot_curve(tmp_path / "c.png", found, metric="auroc")
    left, right = drawn[0].axes
    assert left.get_ylabel() == "AUROC (higher is better)"
    for line, runs in zip(left.lines, found.values(), strict=True):
        np.testing.assert_array_equal(line.get_xdata(), [0, 320, 640, 960, 1280])
        np.testing.assert_allclose(line.get_ydata(), np.mean([[r.score for r in run] for run in runs], 0))
    np.testing.assert_allclose(right.lines[1].get_xdata(), np.array([1, 2, 3, 4]) * 0.01)
    plots.plot_curve(tmp_path / "a.png", found, metric="accuracy")
    shares = drawn[1].axes[0]
    assert shares.get_ylabel() == "accuracy [%] (higher is better)"
    np.testing.assert_allclose(shares.lines[0].get_ydata(), 100 * left.lines[0].get_ydata())


def test_reliability_is_the_share_that_came_true(tmp_path, drawn):
    p, y = np.array([0.12, 0.18, 0.15, 0.11, 0.95]), np.array([1.0, 0.0, 0.0, 0.0, 1.0])
    plots.plot_reliability(tmp_path / "r.png", {"a": (p, y)})
    top, below = drawn[0].axes
    np.testing.assert_allclose(top.containers[0][0].get_xydata(), [[0.14, 0.25], [0.95, 1.0]])
    assert below.patches[0].get_data().values.tolist() == [0, 0.8, *[0] * 7, 0.2]


def test_as_many_intervals_hold_what_came_as_they_say(tmp_path, drawn):
    random = np.random.default_rng(0)
    mean = random.normal(size=20000)
    plots.plot_intervals(tmp_path / "i.png", {"a": (mean, np.full(20000, 0.5), mean + 0.5 * random.normal(size=20000))})
    levels, held = drawn[0].axes[1].lines[0].get_data()
    np.testing.assert_allclose(held, levels, atol=0.015)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda path: plots.plot_comparison(path, []), "no results"),
        (lambda path: plots.plot_history(path, {"a": []}), "no history"),
        (lambda path: plots.plot_contributions(path, {}, features=FEATURES, steps=STEPS), "at least one map"),
        (
            lambda path: plots.plot_contributions(path, {"a": cells(2)}, features=FEATURES, steps=STEPS),
            r"'a': needs shape \(3, 6\), got \(2, 6\)",
        ),
        (
            lambda path: plots.plot_attention(path, [0.5, 0.5], cells(), features=FEATURES, steps=STEPS),
            "alpha: needs 3 numbers, got 2",
        ),
        (
            lambda path: plots.plot_gates(path, cells(), cells(2), features=FEATURES, steps=STEPS),
            "after: needs shape",
        ),
        (lambda path: plots.plot_curve(path, {"a": []}), "no rounds"),
        (lambda path: plots.plot_curve(path, {"a": [curves()["drop"][0], [Round(0, 1.0, 1.0)]]}), r"got \[5, 1\]"),
        (lambda path: plots.plot_reliability(path, {}), "no predictions"),
        (lambda path: plots.plot_reliability(path, {"a": ([0.5], [1, 0])}), "got 2 for 1"),
        (lambda path: plots.plot_reliability(path, {"a": ([1.5], [1])}), "within 0 and 1"),
        (lambda path: plots.plot_intervals(path, {}), "no predictions"),
        (lambda path: plots.plot_intervals(path, {"a": ([0.0, 1.0], [1.0], [0.0])}), "deviations: needs 2"),
        (lambda path: plots.plot_faithfulness(path, {"deletion": {}}), "no curves"),
        (lambda path: plots.plot_agreement(path, ["a"], [[1.0]], [[1]]), "two people"),
        (lambda path: plots.plot_history(path.with_suffix(".bmp2"), {"a": history()}), "use .png"),
    ],
)
def test_nothing_to_draw_is_said_in_a_line(call, words, tmp_path):
    with pytest.raises(InputError, match=words) as caught:
        call(tmp_path / "p.png")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# ---- the report


HOSTILE = '<img src="x" onerror="alert(1)">"\'&'


def verdict(feature: str = "texture", said: int = 0, who: str = "a", **more: object) -> Annotation:
    return Annotation("pid-17", 1, feature, said, seconds=2.0, annotator=who, **more)


def report(**changes: object) -> Report:
    said = [verdict(), verdict(who="b"), verdict("age", 1), verdict("age", 0, "b"), verdict("HDL", -1)]
    values = 100 * cells(seed=1)
    values[0, 0] = np.nan
    heat = Heat("pid-17", cells(), 0.5 * cells(), values, (0.81, 0.43), (0.3, 0.5), 1.0, cells(seed=2) > 1, "uncertain")
    made = Report(
        "What verdicts did", FEATURES, STEPS, UNITS, facts={"model": "m.safetensors"},
        scores=[Scored("auroc", "higher", 0.7, 0.8, 0.05, 0.15), Scored("brier", "lower", 0.2, 0.21, -0.02, 0.04),
                Scored("ece", "lower", 0.1, 0.2, 0.05, 0.15), Scored("accuracy", "higher", 0.9, 0.9)],
        heats=[heat], annotations=said, agreement={"Fleiss": 0.5, "Cohen, a and c": float("nan")},
        disagreements=disagreements(said), certificate=Certified(True, (("2009", "texture"),), ("gradient 0",)),
        curves={"deletion": {"contributions": [1.0, 0.0], "random": [1.0, 0.5]}}, notes=["the end"],
    )  # fmt: skip
    return replace(made, **changes)


class Tags(html.parser.HTMLParser):
    """What is in a page: its tags, attributes, and whether they are closed as they were opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(page: str) -> Tags:
    tags = Tags()
    tags.feed(page)
    tags.close()
    assert tags.open == []
    return tags


def test_a_report_asks_for_nothing_and_runs_nothing():
    page = report_html(report())
    tags = read(page)
    assert not {"script", "link", "img", "iframe", "object", "embed", "form", "base", "a"} & set(tags.seen)
    assert not {"src", "href", "action", "srcset", "data"} & {name for name, _ in tags.attributes}
    assert not [name for name, _ in tags.attributes if name.startswith("on")]
    assert not re.search(r"https?:|//|url\(|@import|@font-face", page)
    assert "default-src 'none'" in page
    assert "prefers-color-scheme: dark" in page
    assert "color-scheme: light dark" in page


def test_a_report_says_what_happened():
    text = " ".join(read(report_html(report())).text)
    for words in (
        "m.safetensors", "better", "worse", "no clear change", "no interval", "pid-17", "label 1",
        "1 cells are excluded, and nothing in them can reach the prediction", "gradient 0",
        "5 stand: 1 attend, 3 not attend, 1 don't know; of 2 people, in 10 s", "Where opinions differ", "the end",
        "AUROC  higher is better", "Brier score  lower is better", "accuracy  %, higher is better",
    ):  # fmt: skip
        assert words in text, words


def test_cells_of_a_report_are_coloured_by_sign_and_share_and_tell_all_on_a_touch():
    page = report_html(report())
    before, after = (
        re.findall(r'<td class="([^"]*)" style="--s:(\d+)%" title="([^"]*)">', table)
        for table in page.split('<table class="heat">')[1:]
    )
    found = {title.split(", adds")[0]: (look.split(), int(share)) for look, share, title in before}
    limit = np.abs(cells()).max()
    for (t, d), value in np.ndenumerate(cells()):
        name = f"{FEATURES[d]}, {STEPS[t]}:"
        ((look, share),) = [found[key] for key in found if key.startswith(name)]
        assert share == round(100 * abs(value) / limit)
        assert ("p" in look) == (value > 0)
        assert ("d" in look) == (cells(seed=2)[t, d] > 1)
    marked = {title: look for look, _, title in after if "attend" in title}
    assert len(marked) == 2
    assert [look.split()[-1] for title, look in marked.items() if "texture" in title] == ["v0"]
    assert [title for title in marked if "age" in title and "attend: a" in title and "not attend: b" in title]


@pytest.mark.parametrize("place", ["title", "feature", "instance", "unit", "step", "note", "who", "fact"])
def test_nothing_in_the_data_becomes_part_of_the_page(place):
    changes: dict[str, object] = {
        "title": {"title": HOSTILE},
        "feature": {"features": (HOSTILE, *FEATURES[1:])},
        "instance": {"heats": [replace(report().heats[0], instance=HOSTILE, note=HOSTILE)]},
        "unit": {"units": (HOSTILE, *UNITS[1:])},
        "step": {"steps": (HOSTILE, *STEPS[1:])},
        "note": {"annotations": [verdict(note=HOSTILE)], "notes": [HOSTILE]},
        "who": {"annotations": [verdict(who=HOSTILE)], "agreement": {HOSTILE: 1.0}},
        "fact": {"facts": {HOSTILE: HOSTILE}, "certificate": Certified(False, ((HOSTILE, HOSTILE),), (HOSTILE,))},
    }[place]
    tags = read(report_html(report(**changes)))
    assert "img" not in tags.seen
    assert HOSTILE in " ".join(tags.text)


def test_a_report_of_nothing_is_a_page():
    assert read(report_html(Report("empty", ["a"], ["0"]))).seen.count("section") == 0
    text = read(report_html(Report("e", ["a"], ["0"], certificate=Certified(True, ())))).text
    assert "No cell is excluded" in " ".join(text)


def test_a_report_of_other_shapes_is_refused(unchecked):
    with pytest.raises(InputError, match="units: one per feature, got 1 for 6"):
        report_html(report(units=("mm",)))
    with pytest.raises(InputError, match=r"values of 'pid-17': needs shape \(3, 6\), got \(2, 6\)"):
        report_html(report(heats=[replace(report().heats[0], values=cells(2))]))
