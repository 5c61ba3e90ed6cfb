"""The comparison is fair: same batches, grids of one size, optima inside them, test data untouched, resumable."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from blockdiag_opt.experiments import (
    block_specs,
    compare,
    demo_settings,
    lr_ladder,
    pareto_points,
    schedule_factor,
    train_once,
    tune,
)
from blockdiag_opt.plots import (
    Curve,
    plot_comparison,
    plot_curves,
    plot_grids,
    plot_monitor,
    plot_pareto,
    plot_spectrum,
)
from blockdiag_opt.registry import lr_centre
from blockdiag_opt.tasks import Metric, Task, make_task
from shared_core.errors import InputError
from shared_core.runs import Run

HEAD = {"package": "blockdiag-opt", "version": "0", "command": "compare", "config": {}}


@pytest.fixture
def run(tmp_path):
    return lambda resume=False, name="run": Run(tmp_path / name, **HEAD, resume=resume)


def quadratic(curvature: float = 1.0, steps: int = 20) -> Task:
    """f(x) = curvature x² / 2 from x = 1: gradient descent has a closed form."""

    def build(seed: int) -> nn.Module:
        model = nn.Linear(1, 1, bias=False)
        nn.init.ones_(model.weight)
        return model

    return Task(
        name="quadratic",
        description=f"curvature {curvature}",
        build=build,
        batches=lambda seed, steps: iter([(torch.ones(1, 1),)] * steps),
        loss=lambda model, batch: 0.5 * curvature * model(batch[0]).square().sum(),
        evaluate=lambda model: {"distance": float(model.weight.detach().abs().sum())},
        metrics=(Metric("distance"),),
        steps=steps,
        batch_size=1,
        warmup=0,
    )


def test_the_schedule_rises_and_falls_to_zero():
    factors = [schedule_factor(step, 100, warmup=10) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == max(factors) == 1.0
    np.testing.assert_allclose(np.diff(factors[10:]), -1 / 90)
    assert factors[-1] == pytest.approx(1 / 90)
    assert {schedule_factor(step, 100, schedule="constant", warmup=10) for step in range(10, 100)} == {1.0}
    # A short run keeps most of its steps for the fall.
    assert schedule_factor(2, 10, warmup=500) == 1.0


def test_the_ladder_rises_by_ones_twos_and_fives():
    assert [lr_ladder(place) for place in range(-3, 4)] == [0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0]
    assert [lr_ladder(place, 2) for place in range(-2, 3)] == [0.1, 0.3, 1.0, 3.0, 10.0]
    assert lr_ladder(-7) == 0.005


def test_gradient_descent_follows_its_closed_form():
    steps, lr = 10, 0.1
    trace = train_once(quadratic(steps=steps), "sgd:momentum=0.0", lr, 0, schedule="constant")
    x = (1 - lr) ** np.arange(steps + 1)
    assert trace["steps"] == list(range(1, steps + 1))
    np.testing.assert_allclose(trace["loss"], 0.5 * x[:-1] ** 2, rtol=1e-5)
    assert trace["metrics"]["distance"] == pytest.approx(x[-1], rel=1e-5)
    assert trace["final_loss"] == pytest.approx(0.5 * x[-2] ** 2, rel=1e-5)
    decayed = train_once(quadratic(steps=steps), "sgd:momentum=0.0", lr, 0)
    expected = math.prod(1 - lr * (steps - step) / steps for step in range(steps))
    assert decayed["metrics"]["distance"] == pytest.approx(expected, rel=1e-5)


def test_the_curve_averages_all_losses():
    trace = train_once(quadratic(steps=250), "sgd:momentum=0.0", 0.01, 0, schedule="constant")
    x = 0.99 ** np.arange(250)
    sizes = np.diff([0, *trace["steps"]])
    assert len(trace["loss"]) == 100
    assert trace["steps"][-1] == 250
    assert np.dot(trace["loss"], sizes) == pytest.approx(float((0.5 * x**2).sum()), rel=1e-4)
    assert trace["final_loss"] == pytest.approx(float((0.5 * x[-25:] ** 2).mean()), rel=1e-4)
    assert np.all(np.diff(trace["seconds"]) > 0)
    assert trace["optimizer_seconds"][-1] < trace["seconds"][-1]


@pytest.mark.parametrize(("spec", "lr"), [("sgd", 100.0), ("sgd", 1e30)])
def test_divergence_is_a_result(spec, lr):
    trace = train_once(quadratic(steps=200), spec, lr, 0)
    assert trace["diverged"]
    assert trace["final_loss"] is None
    assert trace["metrics"] == {}
    assert len(trace["loss"]) < 200


def test_a_fault_of_the_optimizer_is_not_taken_for_divergence(monkeypatch):
    def broken(self, closure=None):
        raise RuntimeError("broken")

    monkeypatch.setattr(torch.optim.Adam, "step", broken)
    with pytest.raises(RuntimeError, match="broken"):
        train_once(quadratic(), "adam", 0.1, 0)


def test_a_gradient_that_is_not_finite_is_divergence():
    task = replace(quadratic(), loss=lambda model, batch: (model(batch[0]) - 1).abs().sqrt().sum())
    assert train_once(task, "block-adam", 0.1, 0)["diverged"]
    assert train_once(task, "adam", 0.1, 0)["diverged"]


def test_all_optimizers_see_the_same_weights_and_batches():
    task = make_task("digits")
    first = {
        spec: train_once(task, spec, lr_centre(spec), 3, steps=4)["loss"][0] for spec in ("adam", "sgd", "adagrad")
    }
    assert len(set(first.values())) == 1


def test_a_grid_moves_until_its_best_lies_inside(run):
    """SGD on x²/2 needs a rate near 1 with constant steps; the grid starts far below."""
    task = quadratic(curvature=1e-2)
    grid = tune(run(), task, "sgd:momentum=0.0", [1000], schedule="constant", extend=20)
    rates = list(grid.losses)
    assert not grid.edge
    assert rates == sorted(rates)
    assert rates[0] < grid.best < rates[-1]
    # The loss only falls until 1 / curvature.
    assert grid.best == 100.0
    assert grid.losses[grid.best] == min(value for value in grid.losses.values() if value is not None)


def test_a_grid_that_may_not_move_says_that_its_best_is_at_the_edge(run):
    grid = tune(run(), quadratic(curvature=1e-2), "sgd:momentum=0.0", [1000], extend=0)
    assert grid.edge
    assert len(grid.losses) == 5
    assert grid.best == max(grid.losses)


def test_a_grid_that_diverges_moves_down_and_shows_it(run):
    grid = tune(run(), quadratic(curvature=1e6), "sgd:momentum=0.0", [1000], schedule="constant", extend=25)
    # Stable below 2 / curvature, best at 1 / curvature.
    assert grid.best == 1e-6
    assert grid.losses[max(grid.losses)] is None
    assert not grid.edge
    with pytest.raises(InputError, match=r"task 'quadratic': sgd:momentum=0.0 diverged at every learning rate tried"):
        tune(run(name="other"), quadratic(curvature=1e12), "sgd:momentum=0.0", [1000], extend=0)


def test_every_optimizer_gets_a_grid_of_the_same_size(run):
    for points, density in ((3, 3), (5, 3), (4, 2), (1, 1)):
        sizes = {
            spec: len(
                tune(
                    run(name=f"{points}{density}{spec[:3]}"),
                    quadratic(),
                    spec,
                    [9],
                    points=points,
                    density=density,
                    extend=0,
                ).losses
            )
            for spec in ("adam", "sgd", "rmsprop")
        }
        assert set(sizes.values()) == {points}


def test_rates_are_not_chosen_by_test_data(run):
    """Turn the test metric round: the grid and its best stay."""
    task = make_task("breast-cancer", steps=20)
    spoiled = replace(task, evaluate=lambda model: {name: -value for name, value in task.evaluate(model).items()})
    one, two = (tune(run(name=str(k)), t, "adam", [1000], points=3, extend=0) for k, t in enumerate((task, spoiled)))
    assert one.losses == two.losses


def comparison(run, **options):
    specs = options.pop("specs", ["adam", "sgd"])
    seeds = options.pop("seeds", [0, 1, 2])
    return compare(run, [make_task("breast-cancer", steps=20)], specs, seeds, points=3, extend=1, **options)


def test_rows_and_claims_of_a_comparison(run):
    found = comparison(run(), specs=["adam", "block-adam", "block-adam:grouping=input"])
    methods = {"adam", "block-adam", "block-adam:grouping=input"}
    assert {row.dataset for row in found.results} == {"breast-cancer"}
    by_metric: dict[str, set[str]] = {}
    for row in found.results:
        by_metric.setdefault(row.metric, set()).add(row.method)
    for metric in ("train loss", "test accuracy", "test loss", "ms per step", "best learning rate"):
        assert by_metric[metric] == methods
    texts = [claim.text for claim in found.claims]
    assert any(text.startswith("breast-cancer: block-adam is better than adam in train loss") for text in texts)
    assert any("block-adam is better than block-adam:grouping=input" in text for text in texts)
    assert any("lies inside its grid" in text for text in texts)
    right = {row.method: row for row in found.results if row.metric == "test accuracy"}
    assert all(row.unit == "%" and 10 < row.mean <= 100 for row in right.values())
    claim = next(claim for claim in found.claims if "block-adam is better than adam in test accuracy" in claim.text)
    assert claim.value == pytest.approx(right["block-adam"].mean - right["adam"].mean)
    assert claim.text.endswith(" points)")
    best = {row.method: row.mean for row in found.results if row.metric == "best learning rate"}
    assert best == {spec: grid.best for spec, grid in found.grids["breast-cancer"].items()}
    assert {curve.loss.shape for curve in found.curves["breast-cancer"].values()} == {(3, 20)}
    assert set(pareto_points(found.results, "breast-cancer")) == methods


def test_claims_are_the_paired_differences(run):
    found = comparison(run(), specs=["adam", "block-adam"])
    losses = {
        spec: [
            train_once(make_task("breast-cancer", steps=20), spec, grid.best, seed)["final_loss"] for seed in range(3)
        ]
        for spec, grid in found.grids["breast-cancer"].items()
    }
    gains = np.subtract(losses["adam"], losses["block-adam"])
    claim = next(claim for claim in found.claims if "block-adam is better than adam in train loss" in claim.text)
    half = 4.302653 * gains.std(ddof=1) / math.sqrt(3)
    assert claim.value == pytest.approx(gains.mean(), rel=1e-4)
    assert claim.holds == bool(gains.mean() - half > 0)


def test_time_to_adams_loss_is_its_own_for_adam(run):
    found = comparison(run(), seeds=[0])
    rows = {row.method: row.mean for row in found.results if row.metric == "steps to Adam's final loss"}
    assert 1 <= rows["adam"] <= 20


def test_a_comparison_resumes_to_the_same_results(run):
    def attempt(resume: bool, stop_after: int | None = None, name: str = "run"):
        seen: list[str] = []

        def advance(note: str) -> None:
            seen.append(note)
            if len(seen) == stop_after:
                raise KeyboardInterrupt

        found = comparison(run(resume, name), advance=advance)
        timed = {"ms per step", "seconds to Adam's final loss"}
        rows = [row.model_dump(exclude={"seconds"}) for row in found.results if row.metric not in timed]
        return rows, found.claims, {spec: grid.losses for spec, grid in found.grids["breast-cancer"].items()}

    whole = attempt(False, name="whole")
    with pytest.raises(KeyboardInterrupt):
        attempt(False, stop_after=5)
    assert attempt(True) == whole


def test_given_rates_are_not_tuned(run):
    found = comparison(run(), lrs={"adam": 0.01})
    assert set(found.grids["breast-cancer"]) == {"sgd"}
    assert {row.mean for row in found.results if row.metric == "best learning rate" and row.method == "adam"} == {0.01}


def test_a_diverging_seed_is_counted_and_breaks_the_claim(run):
    """Rates are given, so that nothing keeps block-adam away from a rate at which the loss explodes."""
    found = compare(run(), [quadratic(steps=30)], ["adam", "block-adam"], [0, 1], lrs={"adam": 0.1, "block-adam": 1e6})
    counts = {row.method: row.mean for row in found.results if row.metric == "diverged runs"}
    assert counts == {"adam": 0.0, "block-adam": 2.0}
    assert not any(row.method == "block-adam" and row.metric == "train loss" for row in found.results)
    claim = next(claim for claim in found.claims if "better than adam in train loss" in claim.text)
    assert (claim.holds, claim.value) == (False, None)
    assert set(found.curves["quadratic"]) == {"adam"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"specs": []}, "nothing to compare: give one method at least"),
        ({"specs": ["adam", "adam"]}, "method 'adam' is given twice"),
        ({"seeds": []}, "give one seed at least"),
        ({"seeds": [0, 1000]}, "seed 1000 is used for tuning and for the results"),
        ({"specs": ["adam", "adma"]}, "no optimizer 'adma'; did you mean 'adam"),
    ],
)
def test_wrong_comparisons_are_refused_before_anything_runs(run, options, message):
    with pytest.raises(InputError, match=message):
        comparison(run(), **options)


def test_the_demo_is_embedded_and_compares_what_it_says():
    settings = demo_settings(seeds=2, steps=5)
    assert [task.name for task in settings.tasks] == ["breast-cancer", "autoencoder-digits"]
    assert {task.steps for task in settings.tasks} == {5}
    assert not set(settings.seeds) & set(settings.tuning_seeds)
    assert "block-adam:grouping=input" in settings.specs
    assert block_specs([2], [1, 3]) == ["block-adam:b=2,K=1", "block-adam:b=2,K=3"]


# ---- pictures


def curve(scale: float = 1.0) -> Curve:
    steps = np.arange(1.0, 11.0)
    return Curve(steps, scale / steps + np.zeros((2, 1)), np.tile(steps * 0.01, (2, 1)))


def records() -> dict[str, list[dict[str, float | None]]]:
    line = {"condition": 1e3, "off_diagonal": 0.5, "oscillation": 0.1, "low": 1e-3, "high": 1.0}
    return {"0.weight": [{"step": 1, **line}, {"step": 2, **line, "oscillation": None}]}


def test_pictures_are_drawn(tmp_path, run):
    found = comparison(run(), seeds=[0, 1])
    random = np.random.default_rng(0)
    drawings = {
        "curves.png": lambda path: plot_curves(path, found.curves),
        "grids.png": lambda path: plot_grids(
            path, {name: {spec: grid.losses for spec, grid in grids.items()} for name, grids in found.grids.items()}
        ),
        "comparison.svg": lambda path: plot_comparison(path, found.results),
        "pareto.pdf": lambda path: plot_pareto(path, pareto_points(found.results, "breast-cancer")),
        "monitor.png": lambda path: plot_monitor(path, records()),
        "spectrum.png": lambda path: plot_spectrum(
            path, {"a": random.random((5, 10)), "dead": np.zeros((3, 4))}, off_diagonal={"a": 0.25}
        ),
    }
    signs = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}
    for name, draw in drawings.items():
        draw(tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(signs[(tmp_path / name).suffix])


def test_the_same_run_gives_the_same_bytes(tmp_path):
    for name in ("a.svg", "b.svg"):
        plot_curves(tmp_path / name, {"t": {"adam": curve(), "block-adam": curve(0.5)}})
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_a_grid_with_divergence_everywhere_is_still_drawn(tmp_path):
    plot_grids(tmp_path / "g.png", {"t": {"adam": {0.1: None, 0.2: None}, "sgd": {0.1: 1.0, 0.2: None}}})
    assert (tmp_path / "g.png").exists()


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda path: plot_curves(path, {}), "no training curve"),
        (lambda path: plot_grids(path, {"t": {}}), "no grid"),
        (lambda path: plot_comparison(path, []), "no results"),
        (lambda path: plot_pareto(path, {}), "no setting"),
        (lambda path: plot_monitor(path, {"a": []}), "recorded nothing"),
        (lambda path: plot_spectrum(path, {}), "no layer with blocks"),
        (lambda path: plot_pareto(path.with_suffix(".txt"), {"a": (1.0, 1.0)}), r"use \.png, \.svg or \.pdf"),
    ],
)
def test_nothing_to_draw_is_said(tmp_path, draw, message):
    with pytest.raises(InputError, match=message):
        draw(tmp_path / "a.png")
