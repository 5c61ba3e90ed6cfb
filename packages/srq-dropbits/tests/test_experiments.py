"""Comparisons: who starts where, what is chosen on what, what is counted."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from shared_core.errors import InputError
from shared_core.runs import Run
from srq_dropbits import QuantConfig, prepare
from srq_dropbits.experiments import (
    Task,
    compare,
    lottery,
    parse_method,
    quantization_error,
    sweep,
    task_named,
)

TINY = Task("tiny", "digits", "mlp:12", rows=300, float_epochs=3, epochs=1)


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "r", package="srq-dropbits", version="0", command="test", config={}, seed=0, device="cpu")


def test_methods_are_parsed_with_their_settings():
    config = parse_method("mcste-input:p_keep=0.7,sharing=endpoint,per_channel=true,temperature=2", 3, None, 5)
    assert config.dropbits is not None
    assert (config.dropbits.p_keep, config.dropbits.sharing) == (0.7, "endpoint")
    assert (config.per_channel, config.temperature, config.act_bits, config.seed) == (True, 2.0, None, 5)
    learned = parse_method("srq+dropbits+bits:target_bits=2.5", 4, 4)
    assert learned.learn_bits is not None
    assert (learned.learn_bits.max_bits, learned.learn_bits.target_bits) == (4, 2.5)
    assert parse_method("cpq+dropbits", 3, 3) == parse_method("srq+dropbits", 3, 3)
    with pytest.raises(InputError, match="no setting 'tempreature'; did you mean 'temperature'"):
        parse_method("rq:tempreature=2", 3, 3)
    with pytest.raises(InputError, match="did you mean 'mode-soft'"):
        parse_method("mode_sofd", 3, 3)
    with pytest.raises(InputError, match="is not key=value"):
        parse_method("rq:fast", 3, 3)


def test_quantization_error_is_the_relative_squared_distance_from_the_grid():
    layer = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.4, -1.1, 2.6]]))
    model = prepare(layer, QuantConfig(weight_bits=3, act_bits=None))
    model.parametrizations.weight[0].set_alpha(torch.tensor(0.5))
    w = np.array([0.4, -1.1, 2.6])
    nearest = np.array([0.5, -1.0, 1.5])
    assert quantization_error(model) == pytest.approx(((w - nearest) ** 2).sum() / (w**2).sum(), rel=1e-5)


def test_a_comparison_reports_every_method_and_resumes_without_training_again(run, tmp_path):
    methods, bits = ["ptq", "lsq", "srq+dropbits"], [(2, 2), (4, None)]
    notes: list[str] = []
    found = compare(run, [TINY], methods, bits, [0, 1], tuning_seeds=[7], rates=[1e-3, 3e-3], advance=notes.append)
    rows = {(row.dataset, row.method, row.metric): row for row in found.results}
    for dataset in ("tiny 2/2", "tiny 4/32"):
        for method in ["float32", *methods]:
            row = rows[dataset, method, "test accuracy"]
            assert row.unit == "%"
            assert 10 <= row.mean <= 100
            assert row.n == 2
        assert rows[dataset, "lsq", "average bits"].mean == int(dataset[5])
        # Validation decides the learning rate; what was found is told.
        grid = found.grids[dataset]
        scores = {float(rate): value for rate, value in grid["lsq"].items() if rate != "chosen"}
        assert {1e-3, 3e-3} <= set(scores)
        assert scores[grid["lsq"]["chosen"]] == max(scores.values())
        # A best rate at the edge of the grid sends the search on, three rates at most.
        assert len(scores) == 5 or grid["lsq"]["chosen"] not in {min(scores), max(scores)}
        assert len(grid["ptq"]) == 2
    assert rows["tiny 2/2", "lsq", "bytes"].mean < 0.2 * rows["tiny 2/2", "float32", "bytes"].mean
    tuned = sum(len(grid[method]) - 1 for grid in found.grids.values() for method in methods)
    # 2 bit-widths x 3 methods x 2 seeds, and 2 float networks.
    assert len(notes) == tuned + 2 * 3 * 2 + 2

    folder = tmp_path / "r"
    again = Run(
        folder, package="srq-dropbits", version="0", command="test", config={}, seed=0, device="cpu", resume=True
    )
    repeated = compare(again, [TINY], methods, bits, [0, 1], tuning_seeds=[7], rates=[1e-3, 3e-3])
    assert repeated.results == found.results


def test_float_networks_are_the_same_for_all_methods(run):
    found = compare(run, [TINY], ["ptq", "lsq"], [(8, 8)], [3], rates=[1e-4])
    accuracy = {row.method: row.mean for row in found.results if row.metric == "test accuracy"}
    # At 8 bits and a tiny rate all are the float network but for rounding.
    assert max(accuracy.values()) - min(accuracy.values()) < 5


def test_what_cannot_be_compared_is_refused(run):
    with pytest.raises(InputError, match="tuning and for the results"):
        compare(run, [TINY], ["lsq"], [(2, 2)], [0], tuning_seeds=[0])
    with pytest.raises(InputError, match="'lsq' is given twice"):
        compare(run, [TINY], ["lsq", "lsq"], [(2, 2)], [0])
    with pytest.raises(InputError, match="weight_bits is 9"):
        compare(run, [TINY], ["lsq"], [(9, 2)], [0])
    with pytest.raises(InputError, match="no task 'digit'"):
        task_named("digit")


def test_sweep_steers_bits_and_says_where_they_went(run):
    found = sweep(run, TINY, [0], uniform=[2], targets=[2.5], penalties=[0.0, 10.0], weighting="layer", epochs=6)
    points = {name: each[0] for name, each in found.points.items()}
    assert points["uniform 2 bits"][0] == 2
    assert points["learned, target 2.5"][0] == pytest.approx(2.5)
    assert set(points["learned, target 2.5"][2].values()) <= {2, 3, 4}
    assert points["learned, penalty 0"][0] == 4
    assert points["learned, penalty 10"][0] == 2
    texts = {claim.text: claim for claim in found.claims}
    assert next(claim for text, claim in texts.items() if "target of 2.5" in text).holds
    assert next(claim for text, claim in texts.items() if "bits change" in text).value == 2
    right = {row.method: row.mean for row in found.results if row.metric == "test accuracy"}
    assert right["learned, penalty 0"] == pytest.approx(100 * points["learned, penalty 0"][1])
    near = next(claim for text, claim in texts.items() if "within 0.5 points of uniform 2" in text)
    assert near.value == pytest.approx(right["learned, target 2.5"] - right["uniform 2 bits"])
    assert near.threshold == -0.5


def test_lottery_retrains_with_exactly_the_bits_that_were_learned(run):
    found = lottery(run, TINY, [0, 1], target=3.0, epochs=4)
    for start in ("float network", "random weights"):
        together, again = found.points[f"joint, from {start}"], found.points[f"retrained, from {start}"]
        assert [point[2] for point in together] == [point[2] for point in again]
        row = next(r for r in found.results if r.method == f"from {start}")
        difference = np.mean([100 * (a[1] - b[1]) for a, b in zip(together, again, strict=True)])
        assert (row.mean, row.unit) == (pytest.approx(difference), "points")
        claim = next(claim for claim in found.claims if f"from {start}" in claim.text)
        assert claim.value == row.mean
        assert row.low is not None
        assert math.isfinite(row.low)
