from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure

from cib_ite import plots
from cib_ite.estimator import EffectInference
from cib_ite.evaluate import CalibrationCurve
from cib_ite.metrics import deferral_curve, sparsification
from shared_core.errors import InputError
from shared_core.runs import Result
from shared_core.testing import keep_figures, misplaced


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    return keep_figures(monkeypatch, plots)


def inference(n: int = 60) -> EffectInference:
    random = np.random.default_rng(0)
    effect, std = random.normal(size=n), random.uniform(0.1, 1, n)
    lower, upper = effect - 1.64 * std, effect + 1.64 * std
    flags = np.zeros(n, dtype=bool)
    return EffectInference(
        effect=effect,
        std=std,
        lower=lower,
        upper=upper,
        ite_lower=np.where(np.arange(n) % 7 == 0, -np.inf, lower - 2),
        ite_upper=np.where(np.arange(n) % 7 == 0, np.inf, upper + 2),
        alpha=0.1,
        parts={"representation": std**2, "model": std**2, "noise": std},
        uncertainty=std,
        rate=std,
        rate_percentile=100 * random.random(n),
        propensity=random.random(n),
        support=random.random(n),
        no_overlap=flags,
        unusual=flags,
    )


def results(datasets, metrics, methods=("cib", "tarnet", "mc_dropout_tarnet")) -> list[Result]:
    random = np.random.default_rng(0)
    return [
        Result(
            dataset=d, method=name, metric=m, unit="1", better="lower", mean=v, low=v - 1, high=v + 1, n=5, seconds=1.0
        )
        for d in datasets
        for m in metrics
        for name, v in zip(methods, random.uniform(2, 5, len(methods)).tolist(), strict=True)
    ]


EVERY = {
    "effects": lambda path: plots.plot_effects(
        path, inference(), np.array(["treat", "defer", "control"] * 20), unit="kg"
    ),
    "withholding": lambda path: plots.plot_withholding(path, {"cib": curve()}),
    "several": lambda path: plots.plot_withholding(path, {"cib": curve(), "bcf": curve(1)}),
    "calibration": lambda path: plots.plot_calibration(path, {"cib": coverage()}),
    "calibrations": lambda path: plots.plot_calibration(path, {"cib": coverage(), "bcf": coverage()}),
    "overlap": lambda path: plots.plot_overlap(
        path, *arms(), no_overlap=arms()[0] < 0.1, rate_percentile=arms()[0] * 100
    ),
    "deferral": lambda path: plots.plot_deferral(path, {"cib": deferral()}),
    "history": lambda path: plots.plot_history(path, history()),
    "sweep": lambda path: plots.plot_sweep(
        path, [0.01, 0.1, 1], rate=[9, 4, 1], risk=[2, 1, 3], probe_auc=[0.7, 0.6, 0.5]
    ),
    "comparison": lambda path: plots.plot_comparison(path, results(["ihdp"], ["sqrt PEHE", "ATE error", "spearman"])),
    "grid": lambda path: plots.plot_comparison(path, results(["ihdp", "diabetes"], ["sqrt PEHE", "ATE error"])),
}


def curve(seed: int = 0):
    random = np.random.default_rng(seed)
    error = random.normal(size=200)
    return sparsification(np.abs(error) + random.random(200), error)


def coverage() -> CalibrationCurve:
    return CalibrationCurve(np.array([0.5, 0.8, 0.9]), np.array([0.6, 0.85, 0.91]), np.array([1.0, 2.0, 3.0]))


def arms():
    random = np.random.default_rng(0)
    propensity = random.beta(2, 2, 300)
    return propensity, (random.random(300) < propensity).astype(np.int64)


def deferral():
    random = np.random.default_rng(0)
    effect = random.normal(size=300)
    return deferral_curve(effect, 1 / np.abs(effect), effect + random.normal(size=300), 0.0, np.arange(90) / 100)


def history() -> list[dict[str, float]]:
    return [
        {"step": 25.0 * k, "validation": (k - 6) ** 2 + 1.0, "prediction": 1 / k, "rate": 2.0, "discriminator": 0.0}
        for k in range(1, 10)
    ]


@pytest.mark.parametrize("name", EVERY)
def test_every_picture_is_drawn_without_text_on_text(name, tmp_path, drawn):
    assert EVERY[name](tmp_path / "picture.png") == tmp_path / "picture.png"
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert misplaced(drawn[0]) == []


@pytest.mark.parametrize("ending", ["svg", "pdf"])
def test_the_same_arguments_give_the_same_bytes(ending, tmp_path):
    first, second = tmp_path / f"a.{ending}", tmp_path / f"b.{ending}"
    for path in (first, second):
        plots.plot_deferral(path, {"cib": deferral()})
    assert first.read_bytes() == second.read_bytes()


def test_effects_are_drawn_in_order_with_their_own_intervals(tmp_path, drawn):
    found = inference()
    decision = np.where(found.effect > 0.5, "treat", np.where(found.effect < -0.5, "control", "defer"))
    plots.plot_effects(tmp_path / "e.png", found, decision, cost=0.3)
    main, side = drawn[0].axes
    dots = {dots.get_label().split()[0]: dots.get_offsets()[:, 1] for dots in main.collections[1:]}
    for name, heights in dots.items():
        np.testing.assert_allclose(np.sort(heights), np.sort(found.effect[decision == name]))
    band = main.collections[0].get_paths()[0].vertices
    order = np.argsort(found.effect)
    for place in (1, 30, 60):
        ends = band[band[:, 0] == place][:, 1]
        assert ends.min() == pytest.approx(found.lower[order[place - 1]])
        assert ends.max() == pytest.approx(found.upper[order[place - 1]])
    assert sum(bar.get_width() for bar in side.patches) == 60
    assert main.lines[0].get_ydata()[0] == 0.3


def test_infinite_intervals_leave_a_finite_picture(tmp_path, drawn):
    found = inference()
    wide = EffectInference(**{**vars(found), "lower": np.full(60, -np.inf), "upper": np.full(60, np.inf)})
    plots.plot_effects(tmp_path / "e.png", wide, np.full(60, "defer"))
    low, high = drawn[0].axes[0].get_ylim()
    assert found.effect.min() > low > -10
    assert found.effect.max() < high < 10


def test_equal_effects_can_be_drawn(tmp_path):
    found = EffectInference(**{**vars(inference()), **dict.fromkeys(("effect", "lower", "upper"), np.ones(60))})
    plots.plot_effects(tmp_path / "e.png", found, np.full(60, "treat"))
    assert (tmp_path / "e.png").exists()


def test_several_methods_are_withheld_relative_to_their_own_error(tmp_path, drawn):
    plots.plot_withholding(tmp_path / "w.png", {"a": curve(), "b": curve(1)})
    solid = [line for line in drawn[0].axes[0].lines if line.get_label() in {"a", "b"}]
    assert [line.get_ydata()[0] for line in solid] == [1, 1]
    np.testing.assert_allclose(solid[0].get_ydata() * curve().curve[0], curve().curve[curve().fractions <= 0.95])


def test_arms_are_counted_back_to_back(tmp_path, drawn):
    propensity, treatment = arms()
    plots.plot_overlap(tmp_path / "o.png", propensity, treatment)
    (axis,) = drawn[0].axes
    heights = [bar.get_height() for container in axis.containers for bar in container]
    assert sum(h for h in heights if h > 0) == treatment.sum()
    assert sum(h for h in heights if h < 0) == -(treatment == 0).sum()


def test_a_comparison_sets_ours_off(tmp_path, drawn):
    plots.plot_comparison(tmp_path / "c.png", results(["ihdp"], ["sqrt PEHE", "ATE error"], ("CIB", "tarnet", "cib-1")))
    axes = drawn[0].axes
    assert [axis.get_xlabel() for axis in axes] == ["sqrt PEHE (lower is better)", "ATE error (lower is better)"]
    bold = {label.get_text() for label in axes[0].get_yticklabels() if label.get_fontweight() == "bold"}
    assert bold == {"CIB", "cib-1"}


def test_the_history_leaves_out_terms_that_were_off_and_names_the_best_step(tmp_path, drawn):
    plots.plot_history(tmp_path / "h.png", history())
    titles = [axis.get_title() for axis in drawn[0].axes if axis.axison]
    assert len(titles) == 3
    assert titles[0] == "validation loss (least at step 150)"


def test_a_sweep_is_sorted_and_marks_the_least_risk(tmp_path, drawn):
    plots.plot_sweep(tmp_path / "s.png", [1, 0.01, 0.1], rate=[1, 9, 4], risk=[3, 2, 1], probe_auc=[0.5, 0.7, 0.6])
    axes = drawn[0].axes
    assert all(axis.get_xscale() == "log" for axis in axes)
    np.testing.assert_array_equal(axes[0].lines[0].get_ydata(), [9, 4, 1])
    assert any("0.1" in text.get_text() for text in axes[1].texts)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda path: plots.plot_withholding(path, {}), "no withholding curve"),
        (lambda path: plots.plot_calibration(path, {}), "no coverage"),
        (lambda path: plots.plot_deferral(path, {}), "no deferral curve"),
        (lambda path: plots.plot_comparison(path, []), "no results"),
        (lambda path: plots.plot_history(path, []), "no history"),
        (lambda path: plots.plot_sweep(path, [0.0, 1.0], rate=[1, 1], risk=[1, 1], probe_auc=[1, 1]), "all positive"),
        (lambda path: plots.plot_history(path.with_suffix(".bmp2"), history()), "use .png"),
    ],
)
def test_nothing_to_draw_is_said_in_a_line(call, words, tmp_path):
    with pytest.raises(InputError, match=words) as caught:
        call(tmp_path / "p.png")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
