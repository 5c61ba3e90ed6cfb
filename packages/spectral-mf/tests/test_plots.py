"""The comparison of methods whose errors span many sizes."""

from __future__ import annotations

import numpy as np
import pytest

import shared_core.plots as core
from shared_core.runs import Result
from spectral_mf.plots import Opinion, plot_comparison, plot_curves, plot_marginals, plot_model, plot_opinions


def row(method: str, mean: float) -> Result:
    return Result(
        dataset="grid", method=method, metric="error of log Z", unit="nats", better="lower", mean=mean, low=None,
        high=None, n=1, seconds=0.1,
    )  # fmt: skip


def test_exact_methods_leave_the_others_room(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(core, "save_figure", lambda figure, path: figures.append(figure) or path)
    plot_comparison(tmp_path / "a.png", [row("modes", 0.0), row("tap", 0.3), row("spectral", 1.5)])
    axis = figures[0].axes[0]
    assert axis.get_xscale() == "log"
    assert sorted(float(line.get_xdata()[0]) for line in axis.lines) == [1e-4, 0.3, 1.5]
    labels = axis.get_yticklabels()
    assert {label.get_text() for label in labels if label.get_fontweight() == "bold"} == {"modes", "spectral"}


@pytest.mark.parametrize(
    "draw",
    [
        lambda path: plot_opinions(path, {"m": [Opinion("tap", 1.0), Opinion("modes", 1.2, 0.1)]}),
        lambda path: plot_curves(path, {"tap": ([1.0, 2.0], [0.1, 0.2])}, xlabel="x", ylabel="y"),
        lambda path: plot_model(path, np.zeros((2, 2)), np.ones(2)),
        lambda path: plot_marginals(path, {f"m{k}": np.zeros(3) for k in range(12)}),
    ],
)
def test_pictures_say_where_they_are(draw, tmp_path):
    path = tmp_path / "p.svg"
    assert draw(path) == path
    assert path.read_bytes().startswith(b"<?xml")
