from __future__ import annotations

import math

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

import shared_core.plots as core
from shared_core.errors import InputError
from shared_core.plots import save_figure
from shared_core.runs import Result, summarize
from srq_dropbits import plots
from srq_dropbits.config import LearnBits, QuantConfig
from srq_dropbits.diagnose import gain_curve
from srq_dropbits.grid import Grid
from srq_dropbits.qat import calibrate, prepare


def row(dataset, method, values, metric="test accuracy", **options) -> Result:
    given = {"better": "higher", "unit": "%" if metric == "test accuracy" else "1", **options}
    return summarize(values, dataset=dataset, method=method, metric=metric, **given)


def ladder() -> list[Result]:
    rows = []
    levels = {"float32": 98.5, "ptq": 61.0, "lsq": 95.0, "mcste-zero": 11.0, "rq-st": 95.5, "srq+dropbits": 95.7}
    for bits, gain in (("2/2", 0.0), ("4/4", 2.0)):
        for name, level in levels.items():
            rows.append(row(f"digits {bits}", name, [min(level + gain + 0.4 * k, 100) for k in (-1, 0, 1)]))
            rows.append(row(f"digits {bits}", name, [1e-3], "best learning rate", better="lower"))
        rows.append(row(f"digits {bits}", "lsq", [0.3, 0.4], "quantization error", better="lower"))
    return rows


def small_model(**options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
        x = torch.randn(64, 6)
    qmodel = prepare(model, QuantConfig(**{"weight_bits": 3, "act_bits": 3, **options}), x[:1])
    calibrate(qmodel, [x])
    return qmodel


def history() -> list[dict]:
    records = []
    for epoch in range(1, 5):
        layers = {
            "0": {"bits": 4.0, "alpha": 0.1 * epoch, "rho": 0.33, "act_alpha": None},
            "2": {"bits": 5.0 - epoch / 2, "alpha": 0.2, "rho": 0.3, "act_alpha": 0.05},
        }
        record = {"epoch": epoch, "loss": 1 / epoch, "penalty": 0.1 / epoch, "validation_accuracy": 1 - 0.2 / epoch}
        records.append(record | {"avg_bits": 4.0 - epoch / 8, "layers": layers})
    return records


def points():
    return {
        "uniform 2 bits": [(2.0, 0.9, {"0": 2}), (2.0, 0.92, {"0": 2})],
        "uniform 4 bits": [(4.0, 0.97, {"0": 4}), (4.0, 0.98, {"0": 4})],
        "learned, target 2.5": [(2.4, 0.95, {"0": 2}), (2.6, 0.96, {"0": 3})],
        "learned, penalty 0.03": [(3.1, 0.97, {"0": 3})],
    }


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """What the functions drew, to look at its parts."""
    drawn: list[Figure] = []

    def keep(figure, path):
        drawn.append(figure)
        return save_figure(figure, path)

    for module in (plots, core):
        monkeypatch.setattr(module, "save_figure", keep)
    return drawn


DRAW = {
    "ladder": lambda path: plots.plot_ladder(path, ladder()),
    "pareto": lambda path: plots.plot_pareto(path, points()),
    "weights": lambda path: plots.plot_weights(path, small_model(per_channel=True)),
    "bits": lambda path: plots.plot_bits(path, small_model().report()),
    "history": lambda path: plots.plot_history(path, history()),
    "estimators": lambda path: plots.plot_estimators(
        path, [gain_curve(name, Grid.signed(2), points=60, draws=20) for name in ("lsq", "mcste-zero", "rq")]
    ),
}


@pytest.mark.parametrize("name", DRAW)
def test_the_same_input_gives_the_same_bytes_and_leaves_nothing_else(name, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "picture.svg"
        assert DRAW[name](path) == path
    first, second = (tmp_path / folder / "picture.svg" for folder in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
    assert [path.name for path in first.parent.iterdir()] == ["picture.svg"]


@pytest.mark.parametrize(
    ("draw", "empty"),
    [
        (plots.plot_ladder, []),
        (plots.plot_pareto, {}),
        (plots.plot_history, []),
        (plots.plot_estimators, []),
        (plots.plot_weights, nn.Linear(2, 2)),
    ],
)
def test_nothing_to_draw_is_said(draw, empty, tmp_path):
    with pytest.raises(InputError):
        draw(tmp_path / "p.png", empty)
    assert not list(tmp_path.iterdir())


def test_ladder_has_a_panel_for_each_bit_width_and_cuts_off_what_failed(tmp_path, figures):
    plots.plot_ladder(tmp_path / "p.png", ladder())
    assert [axis.get_title() for axis in figures[0].axes] == [
        "digits 2/2 bits",
        "digits 4/4 bits",
    ]
    # Neighbours with the same methods share their names.
    named = [[label.get_text() for label in axis.get_yticklabels()] for axis in figures[0].axes]
    assert named == [["srq+dropbits", "rq-st", "mcste-zero", "lsq", "ptq"], []]
    for axis, rows in zip(figures[0].axes, (ladder()[:12], ladder()[13:25]), strict=True):
        means = {one.method: one.mean for one in rows if one.metric == "test accuracy"}
        # What is beyond the edge is written out.
        left = axis.get_xlim()[0]
        assert {text.get_text() for text in axis.texts} == {
            f"{mean:.1f}" for method, mean in means.items() if mean < left and method != "float32"
        }
        assert means["mcste-zero"] < left < means["lsq"]
        lines = [line for line in axis.lines if line.get_linestyle() == "--"]
        assert [line.get_xdata()[0] for line in lines] == [pytest.approx(means["float32"])]


def test_ladder_keeps_all_where_methods_are_alike(tmp_path, figures):
    rows = [row("wine 3/3", name, [level]) for name, level in (("float32", 96.0), ("lsq", 90.0), ("srq", 93.0))]
    plots.plot_ladder(tmp_path / "p.png", rows)
    assert not figures[0].axes[0].texts
    assert figures[0].axes[0].get_xlim()[0] < 90


def test_comparison_leaves_settings_to_the_table(tmp_path, figures):
    plots.plot_comparison(tmp_path / "p.png", [*ladder(), row("digits 2/2", "mode-gumbel", [95.2])])
    labels = [axis.get_xlabel() for axis in figures[0].axes if axis.get_xlabel()]
    assert sorted(set(labels)) == ["quantization error (lower is better)", "test accuracy [%] (higher is better)"]
    bold = {label.get_text() for label in figures[0].axes[0].get_yticklabels() if label.get_fontweight() == "bold"}
    assert bold == {"mcste-zero", "mode-gumbel", "srq+dropbits"}


def test_pareto_joins_uniform_widths_and_stars_learned_ones(tmp_path, figures):
    plots.plot_pareto(tmp_path / "p.png", points())
    (axis,) = figures[0].axes
    line = axis.lines[0]
    assert list(line.get_xdata()) == [2.0, 4.0]
    assert list(line.get_ydata()) == pytest.approx([91.0, 97.5])
    stars = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axis.lines if line.get_marker() == "*"]
    assert stars == [pytest.approx((2.5, 95.5)), pytest.approx((3.1, 97.0))]
    legend = {text.get_text() for text in figures[0].legends[0].get_texts()}
    assert legend == {"uniform: one bit-width for all layers", "learned, target 2.5", "learned, penalty 0.03"}


def test_weights_show_the_share_of_each_grid_point(tmp_path, figures):
    model = small_model()
    plots.plot_weights(tmp_path / "p.png", model)
    stems = [axis for axis in figures[0].axes if axis.yaxis.get_ticks_position() == "right"]
    for axis, layer in zip(stems, (model[0], model[2]), strict=True):
        part = layer.parametrizations.weight[0]
        codes = part.codes(layer.parametrizations.weight.original)
        expected = [(codes == n).float().mean().item() for n in range(-3, 4)]
        assert list(axis.lines[0].get_ydata()) == pytest.approx(expected)
        assert math.fsum(axis.lines[0].get_ydata()) == pytest.approx(1, abs=1e-6)


def test_weights_of_dorefa_and_of_a_pruned_layer_can_be_drawn(tmp_path, figures):
    plots.plot_weights(tmp_path / "odd.png", small_model(estimator="ste-minmax"))
    model = small_model(learn_bits=LearnBits(max_bits=3, min_bits=1))
    model[0].parametrizations.weight[0].freeze(Grid(0, 0, 0))
    plots.plot_weights(tmp_path / "pruned.png", model)
    plots.plot_bits(tmp_path / "bits.png", model.report())
    assert figures[1].axes[0].get_title().startswith("0: 0 bits")
    assert [text.get_text() for text in figures[2].axes[0].texts] == ["pruned", "3"]


def test_bits_show_the_bytes_of_the_report(tmp_path, figures):
    report = small_model(overrides={"2": {"weight_bits": 8}}).report()
    plots.plot_bits(tmp_path / "p.png", report)
    left, right = figures[0].axes
    assert [bar.get_width() for bar in left.patches] == [3, 8]
    assert [bar.get_width() for bar in right.patches] == [384, 36, 192, 48]
    assert f"{report.avg_bits:.2f}" in left.get_title()


def test_history_has_a_panel_for_what_was_recorded(tmp_path, figures):
    plots.plot_history(tmp_path / "p.png", history())
    titles = [axis.get_title() for axis in figures[0].axes]
    assert titles[:4] == ["loss", "accuracy, %", "average bits", "bits of weights"]
    assert titles[4:7] == ["step of weights / first", "noise scale / step", "step of inputs / first"]
    steps = figures[0].axes[4].lines[0].get_ydata()
    assert list(steps) == pytest.approx([1, 2, 3, 4])
    plots.plot_history(tmp_path / "p.png", [{"epoch": 1, "loss": 0.5}])
    assert [axis.get_title() for axis in figures[1].axes] == ["loss"]
    with pytest.raises(InputError, match="no loss"):
        plots.plot_history(tmp_path / "q.png", [{"epoch": 1, "loss": math.nan}])


def test_estimators_that_give_the_same_value_share_a_line(tmp_path, figures):
    table = [gain_curve(name, Grid.signed(2), points=60, draws=200) for name in ("lsq", "mcste-zero", "sr")]
    plots.plot_estimators(tmp_path / "p.png", table)
    legend = figures[0].subfigs[0].axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["lsq, mcste-zero", "sr"]
    assert figures[0].subfigs[1].axes[1].get_title() == "mcste-zero: dead 32%, against 0%, mean 0.30"
