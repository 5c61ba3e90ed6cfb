from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from srq_dropbits.config import LearnBits, QuantConfig
from srq_dropbits.diagnose import (
    LAB,
    SmallLayer,
    bias_study,
    estimator_bias,
    gain_curve,
    random_layer,
    weight_diagnosis,
)
from srq_dropbits.errors import InvalidBitsError, SrqError
from srq_dropbits.functional import log_probs
from srq_dropbits.grid import Grid
from srq_dropbits.qat import calibrate, prepare
from srq_dropbits.structure import quantized_layers, quantizers, weight_quantizer


def network(bits: int = 3, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.5), nn.Linear(24, 4))
        x, y = torch.randn(96, 8), torch.randint(0, 4, (96,))
    qmodel = prepare(model, QuantConfig(**{"weight_bits": bits, "act_bits": 4, **options}), x[:1])
    calibrate(qmodel, [x])
    return qmodel, [(x[:48], y[:48]), (x[48:], y[48:])]


# ---- gain


def sigmoid(value):
    return 1 / (1 + np.exp(-value))


def mode_probability(x: np.ndarray, grid: Grid, sigma: float) -> np.ndarray:
    """Naive differences of the logistic CDF, in float64: good enough near the grid."""
    n = np.clip(np.round(x), grid.n_lo, grid.n_hi)
    cell = sigmoid((n + 0.5 - x) / sigma) - sigmoid((n - 0.5 - x) / sigma)
    return cell / (sigmoid((grid.n_hi + 0.5 - x) / sigma) - sigmoid((grid.n_lo - 0.5 - x) / sigma))


@pytest.mark.parametrize("name", ["mcste-zero", "mcste-input", "mcste-clipped"])
def test_gain_of_the_multi_class_estimator_by_finite_differences(name):
    grid, sigma = Grid.signed(3), 0.4
    curve = gain_curve(name, grid, 1.0, sigma, points=157)
    n = np.clip(np.round(curve.x), grid.n_lo, grid.n_hi)
    baseline = {"mcste-zero": 0.0, "mcste-input": curve.x, "mcste-clipped": np.clip(curve.x, grid.n_lo, grid.n_hi)}
    # Away from edges, which a difference would step across.
    inner = (np.abs(curve.x) < grid.n_hi + 0.49) & (np.abs(np.abs(curve.x - np.floor(curve.x)) - 0.5) > 1e-3)
    slope = (mode_probability(curve.x + 1e-5, grid, sigma) - mode_probability(curve.x - 1e-5, grid, sigma)) / 2e-5
    np.testing.assert_allclose(curve.gain[inner], ((n - baseline[name]) * slope)[inner], atol=1e-6)
    assert not curve.spread.any()


def test_gain_does_not_depend_on_the_step():
    small, large = (gain_curve("mcste-zero", Grid.signed(3), alpha, points=50) for alpha in (0.1, 10))
    np.testing.assert_allclose(small.gain, large.gain, atol=1e-12)
    np.testing.assert_allclose(small.value * 100, large.value)


def test_without_a_control_variate_the_zero_cell_is_dead_and_inner_cells_oppose_descent():
    ternary = gain_curve("mcste-zero", Grid.signed(2), points=4000)
    # Outermost cells pull the right way throughout: at 2 bits only the zero cell fails.
    assert ternary.dead == pytest.approx(1 / 3, abs=2e-3)
    assert ternary.opposed == 0
    for bits in (3, 4):
        grid = Grid.signed(bits)
        curve = gain_curve("mcste-zero", grid, points=4000)
        assert curve.dead == pytest.approx(1 / grid.size, abs=3e-3)
        # Half of every inner cell but zero's.
        assert curve.opposed == pytest.approx((grid.size - 3) / 2 / grid.size, abs=0.01)
        v = curve.x
        outer_half = (np.abs(v) < grid.n_hi - 0.5) & (np.abs(v) - np.round(np.abs(v)) > 0.05) & (np.abs(v) > 0.5)
        assert (curve.gain[outer_half] < 0).all()


def test_without_a_control_variate_an_inner_cell_passes_nothing_on_average():
    curve = gain_curve("mcste-zero", Grid.signed(5), points=32_000)
    cell = (curve.x > 2.5) & (curve.x < 3.5)
    assert abs(curve.gain[cell].mean()) < 2e-3 * np.abs(curve.gain[cell]).mean()
    other = gain_curve("mcste-input", Grid.signed(5), points=32_000)
    # The closed form of the specification, section 2.4: 0.118 at sigma = alpha / 3.
    assert other.gain[cell].mean() == pytest.approx(0.1177, abs=3e-4)


def test_clipping_the_control_variate_ends_the_opposition():
    plain, clipped = (gain_curve(name, Grid.signed(3), points=1000) for name in ("mcste-input", "mcste-clipped"))
    assert plain.opposed == pytest.approx(1 / 7, abs=0.01)
    # The tails beyond the grid move the zero of an inner cell's slope a little off its centre.
    assert clipped.opposed < 0.01
    assert clipped.gain.min() > -1e-3 * clipped.gain.max()
    assert plain.gain.min() < -0.1 * plain.gain.max()


@pytest.mark.parametrize("name", ["rq", "rq-st", "sr"])
def test_sampling_estimators_spread_and_agree_with_the_expected_value(name):
    grid = Grid.signed(2)
    curve = gain_curve(name, grid, points=21, draws=4000, temperature=0.3)
    if name == "sr":
        expected = np.clip(curve.x, -1, 1)
    else:
        pi = log_probs(torch.as_tensor(curve.x), torch.tensor(1.0).double(), torch.tensor(1 / 3).double(), -1, 1).exp()
        expected = (pi[:, 2] - pi[:, 0]).numpy()
    # rq's values are off the grid; near a low temperature they are nearly the categorical's.
    np.testing.assert_allclose(curve.value, expected, atol=0.08 if name == "rq" else 0.04)
    assert bool(curve.spread.any()) is (name != "sr")


def test_curves_are_plain_values_and_repeat():
    first, second = (gain_curve("rq", Grid.signed(2), points=9, draws=50, seed=3).to_dict() for _ in range(2))
    assert json.loads(json.dumps(first)) == second
    assert first != gain_curve("rq", Grid.signed(2), points=9, draws=50, seed=4).to_dict()


def test_what_the_lab_does_not_have_is_said():
    with pytest.raises(SrqError, match=r"no estimator 'pact'.*mcste-zero"):
        gain_curve("pact", Grid.signed(2))
    with pytest.raises(SrqError, match="srq\\+dropbits"):
        gain_curve("srq+dropbits", Grid.signed(2))
    with pytest.raises(InvalidBitsError, match="neighbouring"):
        gain_curve("lsq", Grid.odd(2))


# ---- bias


def test_expected_gradient_by_brute_force():
    layer, grid, alpha, rho = random_layer(3, seed=1), Grid.signed(2), 0.7, 0.4
    layer = SmallLayer(layer.inputs, layer.targets, torch.tensor([0.5, -0.3, 0.9], dtype=torch.float64))

    def expected_loss(w: np.ndarray) -> float:
        edges = [alpha * (n + side) for n in (-1, 0, 1) for side in (-0.5, 0.5)]
        total = 0.0
        for codes in itertools.product((-1, 0, 1), repeat=3):
            p = 1.0
            for value, n in zip(w, codes, strict=True):
                mass = [sigmoid((edge - value) / (alpha * rho)) for edge in (alpha * (n - 0.5), alpha * (n + 0.5))]
                whole = [sigmoid((edge - value) / (alpha * rho)) for edge in (edges[0], edges[-1])]
                p *= (mass[1] - mass[0]) / (whole[1] - whole[0])
            q = alpha * torch.tensor(codes, dtype=torch.float64)
            total += p * float(layer.loss(q))
        return total

    w = layer.weights.numpy()
    shifts = 1e-5 * np.eye(3)
    numeric = np.array([(expected_loss(w + shift) - expected_loss(w - shift)) / 2e-5 for shift in shifts])
    (found,) = estimator_bias(layer, grid, alpha, rho, estimators=["lsq"])
    # From the definitions of cosine and size, with lsq's gradient written out.
    q = alpha * (layer.weights / alpha).round().clamp(-1, 1)
    inside = (layer.weights / alpha).abs() <= 1
    gradient = ((layer.inputs @ q - layer.targets) @ layer.inputs / len(layer.targets) * inside).numpy()
    norms = np.linalg.norm(gradient), np.linalg.norm(numeric)
    assert found.expected.size == pytest.approx(norms[0] / norms[1], rel=1e-6)
    assert found.expected.cosine == pytest.approx(gradient @ numeric / (norms[0] * norms[1]), abs=1e-6)
    assert found.expected.error == pytest.approx(np.linalg.norm(gradient - numeric) / norms[1], rel=1e-6)
    assert found.dead == pytest.approx(float((~inside).double().mean()))


def test_one_weight_and_a_linear_model_leave_the_soft_estimator_without_bias():
    # Of one weight, (x w - y)^2 / 2 on rows whose quadratic parts cancel to nothing against a large target: nearly
    # linear, where the gradient of the mean is the mean of the gradient.
    x = torch.ones(1, 1, dtype=torch.float64)
    layer = SmallLayer(x, torch.tensor([1e6], dtype=torch.float64), torch.tensor([0.8], dtype=torch.float64))
    soft, rq, zero = estimator_bias(
        layer, Grid.signed(3), 1.0, estimators=["mode-soft", "rq", "mcste-zero"], draws=20_000, temperature=0.5
    )
    assert soft.expected.error < 1e-5
    assert soft.spread == 0
    assert rq.expected.cosine == pytest.approx(1)
    assert rq.spread > 0.3
    assert zero.expected.size != pytest.approx(1, abs=0.1)


def test_finite_difference_is_a_step_of_one_weight():
    layer = SmallLayer(
        torch.eye(2, dtype=torch.float64),
        torch.tensor([0.0, 0.0], dtype=torch.float64),
        torch.tensor([1.2, -0.4], dtype=torch.float64),
    )
    # Loss (q0^2 + q1^2) / 4: from 1 to 2 it rises by 3/4, from 0 to -1 by 1/4.
    (found,) = estimator_bias(layer, Grid.signed(3), 1.0, estimators=["lsq"])
    gradient, difference = np.array([0.5, 0.0]), np.array([0.75, -0.25])
    assert found.difference.size == pytest.approx(np.linalg.norm(gradient) / np.linalg.norm(difference))
    assert found.difference.error == pytest.approx(np.linalg.norm(gradient - difference) / np.linalg.norm(difference))


def test_study_ranks_the_estimators_as_the_mechanism_says():
    found = {one.estimator: one for one in bias_study(100, bits=3, draws=50)}
    assert list(found) == list(LAB)
    # No draw, no variance; relaxed samples are nearly unbiased and vary most.
    assert {name for name, one in found.items() if one.spread == 0} == {
        "lsq",
        "mcste-zero",
        "mcste-input",
        "mcste-clipped",
        "mode-soft",
    }
    assert found["rq"].expected.cosine > 0.95
    assert found["mcste-zero"].expected.cosine < found["mcste-input"].expected.cosine - 0.15
    assert found["mcste-input"].expected.cosine < found["mode-soft"].expected.cosine
    # Its gradients are an eighth of the true ones: it needs a larger learning rate.
    assert found["mcste-input"].expected.size < 0.3
    assert json.dumps(found["rq"].to_dict())


def test_too_many_combinations_are_refused():
    with pytest.raises(SrqError, match="6 weights on 15 grid points have 11,390,625 combinations"):
        estimator_bias(random_layer(6), Grid.signed(4))


# ---- networks


def test_shares_by_hand():
    model = nn.Linear(6, 1, bias=False)
    with torch.no_grad():
        # In steps of 1 on -3 .. 3: zero cell twice, inner half, outer half, outermost cell, beyond.
        model.weight.copy_(torch.tensor([[0.2, -0.3, 0.7, 1.3, 3.1, 3.8]]))
    qmodel = prepare(model, QuantConfig(weight_bits=3, act_bits=None))
    qmodel.parametrizations.weight[0].set_alpha(torch.tensor(1.0))
    batch = (torch.ones(1, 6), torch.zeros(1))

    def loss(output, y):
        return (output[:, 0] - y).sum()

    names = ("lsq", "mcste-zero", "mcste-input", "mcste-clipped", "mode-soft")
    found = {row.estimator: row for row in weight_diagnosis(qmodel, [batch], loss=loss, estimators=names).total}
    shares = {name: (6 * row.zero, 6 * row.opposed) for name, row in found.items()}
    assert shares == {
        "lsq": pytest.approx((2, 0)),
        "mcste-zero": pytest.approx((3, 1)),
        "mcste-input": pytest.approx((1, 1)),
        "mcste-clipped": pytest.approx((2, 0)),
        "mode-soft": pytest.approx((1, 0)),
    }
    for row in found.values():
        assert (row.weights, row.beyond, row.in_zero_cell) == (6, pytest.approx(1 / 6), pytest.approx(2 / 6))
    # Identity: 4 of 6 entries pass unchanged.
    assert found["lsq"].size == pytest.approx(4 / 6)
    assert found["lsq"].cosine == pytest.approx(math.sqrt(4 / 6))


def test_every_estimator_on_a_network():
    model, batches = network()
    found = weight_diagnosis(model, batches)
    total = {row.estimator: row for row in found.total}
    assert list(total) == list(LAB)
    assert len(found.layers) == len(LAB) * 2
    for name, row in total.items():
        parts = [one for one in found.layers if one.estimator == name]
        assert row.weights == sum(one.weights for one in parts) == 8 * 24 + 24 * 4
        for key in ("zero", "opposed", "beyond", "in_zero_cell"):
            shares = [getattr(one, key) * one.weights for one in parts]
            assert getattr(row, key) * row.weights == pytest.approx(math.fsum(shares))
    assert total["lsq"].opposed == 0
    assert total["mcste-clipped"].opposed < 0.01
    # All of the zero cell stands still, and more is sent the wrong way than by any other.
    assert total["mcste-zero"].zero >= total["mcste-zero"].in_zero_cell > 0.1
    assert total["mcste-zero"].opposed > 0.15
    assert total["mcste-zero"].cosine < min(total[name].cosine for name in ("mcste-input", "mode-soft", "lsq"))
    assert json.dumps(found.to_dict())


def test_gains_of_inputs_multiply_through_the_layers():
    model, batches = network()
    only, both = (
        {
            row.layer: row.size
            for row in weight_diagnosis(model, batches, estimators=["mcste-input"], inputs=flag).layers
        }
        for flag in (False, True)
    )
    # The last layer's own gradient passes no input quantizer; the first layer's passes one.
    assert both["4"] == pytest.approx(only["4"], rel=1e-6)
    assert both["0"] < 0.4 * only["0"]


def test_the_model_is_left_as_it_was():
    model, batches = network(dropbits={"p_keep": 0.8})
    model.train()
    model[3].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    settings = [(part.estimator, part.baseline, part.dropping, part.training) for part in quantizers(model)]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, second = (weight_diagnosis(model, batches, seed=2) for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)
    assert [(part.estimator, part.baseline, part.dropping, part.training) for part in quantizers(model)] == settings
    assert model.training
    assert not model[3].training
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items() if not key.endswith("meta"))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(part._forward_hooks for part in quantizers(model))


def test_tied_weights_count_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(5, 5, bias=False)
            self.second = nn.Linear(5, 5, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(torch.tanh(self.first(x)))

    model = prepare(Tied(), QuantConfig(weight_bits=4, act_bits=None))
    x, y = torch.randn(20, 5), torch.randint(0, 5, (20,))
    (row,) = weight_diagnosis(model, [(x, y)], estimators=["lsq"]).layers
    assert row.weights == 25
    # Inside the range lsq is the identity, so nothing may be lost or counted twice.
    part = weight_quantizer(model.first)
    inside = (model.first.parametrizations.weight.original / part.alpha).abs() <= 7
    assert row.zero == pytest.approx(float((~inside).double().mean()))
    part.set_alpha(part.alpha.detach() * 2)
    assert weight_diagnosis(model, [(x, y)], estimators=["lsq"]).total[0].size == pytest.approx(1, rel=1e-6)


def test_weights_behind_another_parametrization():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = prepare(nn.Sequential(weight_norm(nn.Linear(5, 4))), QuantConfig(weight_bits=3, act_bits=None))
        x, y = torch.randn(20, 5), torch.randint(0, 4, (20,))
    (row,) = weight_diagnosis(model, [(x, y)], estimators=["mcste-zero"]).total
    assert row.weights == 20
    assert row.zero >= row.in_zero_cell > 0


def test_learned_bits_are_taken_as_they_are():
    model, batches = network(4, learn_bits=LearnBits(max_bits=4, min_bits=2))
    part = weight_quantizer(model[0])
    with torch.no_grad():
        part.phi.fill_(-20)
    assert part.grid.bits == 2
    row = weight_diagnosis(model, batches, estimators=["lsq"]).layers[0]
    v = model[0].parametrizations.weight.original / part.alpha
    assert row.beyond == pytest.approx(float((v.abs() > 1.5).double().mean()))


def test_models_that_cannot_be_diagnosed():
    model, batches = network()
    with pytest.raises(SrqError, match="no batch"):
        weight_diagnosis(model, [])
    with pytest.raises(SrqError, match="no estimator 'sgd'"):
        weight_diagnosis(model, batches, estimators=["sgd"])
    with pytest.raises(SrqError, match="prepare it first"):
        weight_diagnosis(nn.Linear(8, 4), batches)
    dorefa, _ = network(estimator="ste-minmax")
    with pytest.raises(SrqError, match=r"layer '0'.*prepare the model with 'lsq'"):
        weight_diagnosis(dorefa, batches)
    for _, module in quantized_layers(model):
        module.parametrizations.weight.original.requires_grad_(False)
    with pytest.raises(SrqError, match="that train"):
        weight_diagnosis(model, batches)
