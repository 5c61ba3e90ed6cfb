from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import zoo
from scipy.interpolate import RegularGridInterpolator
from torch import nn

from shared_core.errors import InputError
from stamp.counting import CostModel, macs
from stamp.groups import trace
from stamp.latency import LatencyTable, LayerTable, TableError, fit_latency
from stamp.layer_times import calls_of
from stamp.selection import BudgetError, LayerCost, select
from stamp.surgery import cut
from stamp.timing import as_inputs

KNOWN = {}


def by_macs(module, inputs) -> float:
    """A clock that ticks once for each thousand multiply-adds."""
    key = repr(module), [x.shape for x in (*module.parameters(), *as_inputs(inputs))]
    if str(key) not in KNOWN:
        KNOWN[str(key)] = macs(module, inputs) / 1000
    return KNOWN[str(key)]


def built(name, measure=by_macs, **options):
    model, x, groups = zoo.traced(name)
    return model, x, groups, LatencyTable.build(model, groups, x, measure=measure, warmup=0, repeats=1, **options)


# What is measured grows with the product of a layer's widths, which a bilinear table holds exactly.
@pytest.mark.parametrize(
    "name", ["vgg", "resnet", "resnext", "mobilenet", "densenet", "nested-cat", "mixer", "upscaling", "vit-torch"]
)
def test_the_table_knows_what_the_cut_network_would_take(name):
    model, x, groups, table = built(name, grid=2)
    assert isinstance(table, LayerCost)
    assert table.dense_ms == pytest.approx(by_macs(model, x))
    for seed in range(3):
        keep = zoo.random_keep(groups, seed)
        assert table.exact(keep) == pytest.approx(by_macs(cut(model, groups, keep), x))
    assert abs(table.other_ms) <= 1e-9 * table.dense_ms


def test_only_distinct_kinds_of_layers_are_measured():
    seen = []

    def measure(module, inputs):
        seen.append((repr(module), tuple(inputs[0].shape)))
        return by_macs(module, inputs)

    model, *_, table = built("resnet", measure=measure, grid=2)
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(table.layers) == len(layers)
    of_layers = [found for found in seen if found[0].startswith(("Conv2d", "Linear"))]
    assert len(of_layers) == len(set(of_layers)) < 9 * len(layers)
    assert len(table.tables) == len(set(table.kinds)) < len(layers)


class TwoAttentions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 4)

    def forward(self, x):
        x = x + self.a(x, x, x, need_weights=False)[0]
        return x + self.b(x, x, x, need_weights=False)[0]


def test_attentions_of_other_heads_are_other_kinds():
    model, x = TwoAttentions(), torch.rand(3, 2, 8)
    groups = trace(model, x)
    table = LatencyTable.build(model, groups, x, measure=by_macs, warmup=0, repeats=1)
    assert groups.widths() == {"a.heads": 2, "b.heads": 4}
    assert [layer.leaving for layer in table.tables] == [(4, 8), (2, 4, 6, 8)]
    keep = {"a.heads": torch.tensor([True, False]), "b.heads": torch.tensor([False, True, True, True])}
    assert table.exact(keep) == pytest.approx(by_macs(cut(model, groups, keep), [x]))


def left_layers(model, x) -> float:
    """How many numbers leave the layers."""
    return sum(call.size for call in calls_of(model, (x,)))


def test_what_layers_do_not_explain_grows_with_the_numbers_that_leave_them():
    def measure(module, inputs):
        rest = left_layers(module, *inputs) / 100 if isinstance(module, nn.Sequential) else 0.0
        return by_macs(module, inputs) + rest

    model, x, groups, table = built("vgg", measure=measure, grid=2)
    assert table.dense_ms == pytest.approx(measure(model, (x,)))
    assert table.other_ms == pytest.approx(left_layers(model, x) / 100)
    assert table.scale == pytest.approx(1.0)
    for seed in range(3):
        keep = zoo.random_keep(groups, seed)
        assert table.exact(keep) == pytest.approx(measure(cut(model, groups, keep), (x,)))


@pytest.mark.parametrize("overhead", [50.0, -50.0])
def test_the_dense_network_takes_what_was_measured_even_where_the_small_one_cannot(overhead):
    def measure(module, inputs):
        small = isinstance(module, nn.Sequential) and module[0].out_channels < 6
        return max(0.1, by_macs(module, inputs) + (overhead if small else 0.0))

    model, x, _, table = built("vgg", measure=measure, grid=1)
    assert table.dense_ms == pytest.approx(by_macs(model, x))
    assert 0 <= table.other_ms <= table.dense_ms
    assert (table.other_ms > 0) == (overhead > 0)


def test_layers_that_explain_more_than_all_are_scaled():
    def measure(module, inputs):
        return by_macs(module, inputs) / (2 if isinstance(module, nn.Sequential) else 1)

    model, x, groups, table = built("vgg", measure=measure, grid=2)
    keep = zoo.random_keep(groups, 0)
    assert table.scale == pytest.approx(0.5)
    assert table.other_ms == pytest.approx(0.0, abs=1e-9)
    assert table.exact(keep) == pytest.approx(by_macs(cut(model, groups, keep), x) / 2)


def test_noisy_measurements_become_a_table_under_which_more_channels_take_no_less():
    generator = torch.Generator().manual_seed(0)

    def measure(module, inputs):
        return by_macs(module, inputs) * float(0.5 + torch.rand((), generator=generator))

    _, _, groups, table = built("mobilenet", measure=measure, grid=4)
    for layer in table.tables:
        times = np.array(layer.ms)
        assert (np.diff(times, axis=0) >= 0).all()
        assert (np.diff(times, axis=1) >= 0).all()
    keep = {name: torch.ones(width, dtype=torch.bool) for name, width in groups.widths().items()}
    before = table.dense_ms
    for name, c in ((name, c) for name, width in groups.widths().items() for c in range(width - 1)):
        keep[name][c] = False
        now = table.exact(keep)
        assert now <= before + 1e-12
        before = now
    scores = {name: torch.rand(width, generator=generator) for name, width in groups.widths().items()}
    for mode in ("budget", "efficiency"):
        assert table.exact(select(scores, table, 0.6, mode=mode)) <= 0.6 * table.dense_ms


def test_between_grid_points_it_is_bilinear_as_scipys():
    generator = np.random.default_rng(0)
    ms = np.sort(np.sort(generator.random((4, 3)), 0), 1)
    grids = (1, 3, 5, 9), (1, 4, 6)
    zeros, ones = torch.zeros(1, 4, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    table = LatencyTable(
        ("g",), (4,), ("layer",), (0,), (LayerTable(*grids, tuple(map(tuple, ms.tolist()))),), zeros, zeros, ones, ones,
        0 * ones, 2.0,
    )  # fmt: skip
    entering, leaving = 1 + 8 * generator.random((1, 50)), 1 + 5 * generator.random((1, 50))
    entering[0, :4], leaving[0, :4] = [1, 9, 1, 9], [1, 6, 6, 1]
    expected = RegularGridInterpolator(grids, ms)(np.stack([entering[0], leaving[0]], 1))
    assert np.allclose(table.of_layers(entering, leaving)[0], 2 * expected, rtol=1e-12)
    beyond = table.of_layers(np.array([[0.0, 20.0]]), np.array([[0.0, 20.0]]))
    assert np.allclose(beyond[0], [2 * ms[0, 0], 2 * ms[-1, -1]])


def test_a_table_survives_json():
    _, _, groups, table = built("nested-cat", grid=2)
    text = table.to_json()
    again = LatencyTable.from_json(text)
    assert again.to_json() == text
    assert torch.equal(again.inputs, table.inputs)
    assert torch.equal(again.outputs, table.outputs)
    for seed in range(3):
        keep = zoo.random_keep(groups, seed)
        assert again.exact(keep) == table.exact(keep)
    scores = {name: torch.rand(w, generator=torch.Generator().manual_seed(0)) for name, w in groups.widths().items()}
    assert all(
        torch.equal(a, b) for a, b in zip(*(select(scores, t, 0.5).values() for t in (table, again)), strict=True)
    )


@pytest.mark.parametrize(
    "spoil",
    [
        lambda found: found[:-20],
        lambda found: "[]",
        lambda found: json.dumps(json.loads(found) | {"extra": [0.0]}),
        lambda found: json.dumps(json.loads(found) | {"groups": {"0": 1}}),
        lambda found: json.dumps({k: v for k, v in json.loads(found).items() if k != "tables"}),
    ],
)
def test_other_text_is_no_table(spoil):
    *_, table = built("vgg", grid=1)
    with pytest.raises(TableError, match="this is no table of latencies") as caught:
        LatencyTable.from_json(spoil(table.to_json()))
    assert "\n" not in str(caught.value)


def test_choices_that_do_not_fit_are_refused():
    *_, table = built("vgg", grid=1)
    with pytest.raises(InputError, match=r"keep names \['16'\]: frozen, or no groups"):
        table.exact({"16": torch.ones(5, dtype=torch.bool)})
    with pytest.raises(InputError, match=r"keep\['0'\] has shape \(5,\); the group has 6 channels"):
        table.exact({"0": torch.ones(5, dtype=torch.bool)})
    with pytest.raises(InputError, match="grid=0 has no step"):
        built("vgg", grid=0)


@pytest.mark.parametrize("target", [0.9, 0.6, 0.3])
@pytest.mark.parametrize("predict", ["table", "macs"])
def test_the_network_is_measured_to_keep_the_time_whatever_was_predicted(target, predict):
    model, x, groups = zoo.traced("unet" if predict == "table" else "resnet")
    generator = torch.Generator().manual_seed(0)
    scores = {name: torch.rand(width, generator=generator) for name, width in groups.widths().items()}

    def measure(module, inputs):
        # Layers alone are measured right; a network has an overhead of which the tables know nothing.
        return by_macs(module, inputs) + (40.0 if isinstance(module, zoo.ResNet | zoo.UNet) else 0.0)

    cost = CostModel.macs(model, groups, x) if predict == "macs" else None
    dense = measure(model, (x,))
    asked = 40 + target * (dense - 40)
    fit = fit_latency(model, groups, scores, asked, x, cost=cost, measure=measure, warmup=0, repeats=1)
    small = cut(model, groups, fit.keep)
    assert fit.ms == measure(small, (x,)) <= asked
    assert fit.ms >= 0.85 * asked
    assert fit.dense_ms == dense
    assert fit.macs_ratio == macs(small, x) / macs(model, x)
    assert 1 <= len(fit.tries) <= 8
    assert fit.disagreement == pytest.approx(fit.ms / fit.predicted_ms)
    if predict == "macs":
        assert fit.disagreement > 1
        assert fit.tries[0].measured_ms > asked
    assert "ms measured for" in str(fit)


def test_a_network_that_is_fast_enough_stays_whole():
    model, x, groups = zoo.traced("vgg")
    scores = {name: torch.ones(width) for name, width in groups.widths().items()}
    fit = fit_latency(model, groups, scores, 1e9, x, measure=by_macs, cost=CostModel.macs(model, groups, x))
    assert all(bool(mask.all()) for mask in fit.keep.values())
    assert (fit.macs_ratio, len(fit.tries)) == (1.0, 1)


def test_a_time_that_no_network_takes_is_refused_with_what_can_be_reached():
    model, x, groups = zoo.traced("vgg")
    scores = {name: torch.rand(w, generator=torch.Generator().manual_seed(0)) for name, w in groups.widths().items()}
    cost = CostModel.macs(model, groups, x)
    options = {"measure": by_macs, "cost": cost, "min_channels": 0.5, "warmup": 0, "repeats": 1}
    with pytest.raises(BudgetError, match=r"target_ms=0\.5 cannot be reached: the fastest network") as caught:
        fit_latency(model, groups, scores, 0.5, x, **options)
    half = {name: int(w / 2) for name, w in groups.widths().items()}
    assert caught.value.smallest < 0.5
    again = fit_latency(model, groups, scores, 1.0001 * caught.value.smallest * by_macs(model, x), x, **options)
    assert {name: int(mask.sum()) for name, mask in again.keep.items()} == half
    for target in (0.0, math.inf, math.nan):
        with pytest.raises(BudgetError, match="is no time"):
            fit_latency(model, groups, scores, target, x, **options)
