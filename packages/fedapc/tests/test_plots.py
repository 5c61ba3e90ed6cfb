"""Pictures are made, hold the numbers that they were given, and their text stays inside."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from fedapc import plots
from fedapc.ledger import Entry, Ledger
from fedapc.report import Report
from shared_core.errors import InputError
from shared_core.runs import summarize


@pytest.fixture
def drawn(monkeypatch):
    """What was drawn last, in place of a file."""
    kept = []

    def keep(figure, path, **options):
        FigureCanvasAgg(figure)
        figure.draw_without_rendering()
        kept.append(figure)
        Path(path).write_bytes(b"a picture")

    monkeypatch.setattr(Figure, "savefig", keep)
    return kept


def inside(figure):
    """All that is drawn lies within the picture."""
    box = figure.get_tightbbox(figure.canvas.get_renderer())
    width, height = figure.get_size_inches()
    assert box.x0 > -0.02
    assert box.y0 > -0.02
    assert box.x1 < width + 0.02
    assert box.y1 < height + 0.02


def report(clients=2, tasks=3):
    names = tuple(f"hospital{c}" for c in range(clients))
    matrix = np.full((clients, tasks, tasks), np.nan)
    for t in range(tasks):
        matrix[:, t, : t + 1] = 0.9 - 0.05 * (t - np.arange(t + 1))
    attentions = {
        (name, t): {"0.weight": {(other, t - 1): 0.5 * t for other in names if other != name},
                    "2.weight": {(other, t - 1): 1.5 * t for other in names if other != name}}
        for name in names for t in range(1, tasks)
    }  # fmt: skip
    ledger = Ledger(
        Entry(r, name, 0, way, kind, values=1, payload_bytes=4, encoded_bytes=1_000_000 * (r + 1), messages=1)
        for r in range(3) for name in names for way, kind in (("up", "base"), ("down", "knowledge"))
    )  # fmt: skip
    return Report(names, {name: tuple("abc"[:tasks]) for name in names}, matrix, ledger, attentions)


@pytest.mark.parametrize("clients", [1, 5, 13])
def test_matrix(drawn, tmp_path, clients):
    assert plots.plot_matrix(tmp_path / "m.png", report(clients)) == tmp_path / "m.png"
    (figure,) = drawn
    inside(figure)
    pictures = [axis for axis in figure.axes if axis.images]
    assert len(pictures) == min(clients, 12)
    np.testing.assert_array_equal(pictures[0].images[0].get_array().filled(np.nan), report(clients).matrix[0])
    written = [text.get_text() for text in pictures[0].texts]
    assert written == ["90", "85", "90", "80", "85", "90"]


def test_memory(drawn, tmp_path):
    plots.plot_memory(
        tmp_path / "m.png", {name: report().matrix for name in ("fedapc", "fedavg", "ewc", "a", "b", "c")}
    )
    (figure,) = drawn
    inside(figure)
    line = figure.axes[0].lines[0]
    np.testing.assert_allclose(line.get_xdata(), [1, 2, 3])
    np.testing.assert_allclose(line.get_ydata(), [0.9, 0.85, 0.8])


@pytest.mark.parametrize("clients", [2, 20])
def test_attention(drawn, tmp_path, clients):
    plots.plot_attention(tmp_path / "a.png", report(clients), task=1)
    plots.plot_attention(tmp_path / "a.png", report(clients))
    for figure, expected in zip(drawn, (1.0, 2.0), strict=True):
        inside(figure)
        values = figure.axes[0].images[0].get_array().filled(np.nan)
        assert values.shape == (clients, clients)
        assert np.isnan(np.diag(values)).all()
        assert np.nanmin(values) == np.nanmax(values) == expected
    with pytest.raises(InputError, match=r"\[1, 2\]"):
        plots.plot_attention(tmp_path / "a.png", report(), task=0)
    with pytest.raises(InputError, match="no task received"):
        plots.plot_attention(tmp_path / "a.png", report(1, 1))


def test_ledger(drawn, tmp_path):
    whole = report().ledger
    whole.add(Entry(1, "hospital0", 0, "up", "control", event="corrupt"))
    plots.plot_ledger(tmp_path / "l.png", whole)
    (figure,) = drawn
    inside(figure)
    up, down = figure.axes
    assert [bar.get_height() for bar in up.patches] == [2.0, 4.0, 6.0]
    assert up.get_title() == "up: 12.00 MB"
    assert [bar.get_height() for bar in down.patches] == [2.0, 4.0, 6.0]
    assert any(line.get_label() == "something went wrong" for line in up.lines)
    with pytest.raises(InputError, match="empty"):
        plots.plot_ledger(tmp_path / "l.png", Ledger())


def test_bytes(drawn, tmp_path):
    plots.plot_bytes(tmp_path / "b.png", {"fedapc": (0.9, 0.0, 3.0, 9.0), "apd": (0.88, 0.0, 0.0, 0.0)})
    (figure,) = drawn
    inside(figure)
    assert figure.axes[0].lines[0].get_xdata().tolist() == [3.0]
    assert figure.axes[1].lines[0].get_xdata().tolist() == [9.0]
    assert "apd (sends nothing)" in [text.get_text() for text in figure.findobj(Text)]


def test_a_comparison_sets_fedapc_off(drawn, tmp_path):
    rows = [
        summarize([value, value + 1], dataset="digits", method=method, metric="accuracy", unit="%", better="higher")
        for method, value in (("fedapc", 90.0), ("fedapc-no-kb", 85.0), ("fedavg", 80.0))
    ]
    plots.plot_comparison(tmp_path / "c.png", rows)
    labels = drawn[0].axes[0].get_yticklabels()
    assert [label.get_text() for label in labels if label.get_fontweight() == "bold"] == ["fedapc"]


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_the_same_numbers_give_the_same_bytes(tmp_path, suffix):
    for name in ("one", "two"):
        plots.plot_attention(tmp_path / f"{name}.{suffix}", report())
    assert (tmp_path / f"one.{suffix}").read_bytes() == (tmp_path / f"two.{suffix}").read_bytes()


def test_nothing_to_draw_and_nowhere(tmp_path):
    for draw in (plots.plot_memory, plots.plot_bytes):
        with pytest.raises(InputError, match="no method"):
            draw(tmp_path / "x.png", {})
    with pytest.raises(InputError, match=r"\.png, \.svg or \.pdf"):
        plots.plot_matrix(tmp_path / "x.tiff", report())
