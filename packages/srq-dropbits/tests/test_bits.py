"""Learned bit-widths: penalty, controller, budgets and truncation against closed forms and exhaustive search."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import expit
from sklearn.datasets import load_digits
from torch import Tensor, nn

from srq_dropbits.bits import BitController, bit_penalty, freeze_bits, report, truncate, update_controller
from srq_dropbits.config import DropBits, LearnBits, QuantConfig
from srq_dropbits.errors import BudgetError, InvalidBitsError, SrqError
from srq_dropbits.grid import Grid
from srq_dropbits.qat import calibrate, param_groups, prepare, weight_quantizer
from srq_dropbits.quantizers import WeightQuantizer
from srq_dropbits.structure import quantizers

SIZES = (40, 12, 100)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network() -> nn.Module:
    """Three layers of 40, 12 and 100 weights, without activations between them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.ModuleList([nn.Linear(10, 4, bias=False), nn.Linear(4, 3, bias=False), nn.Linear(10, 10, bias=False)])


def learning(phis: list[list[float]] | None = None, max_bits: int = 4, **settings: object) -> nn.Module:
    model = prepare(network(), QuantConfig(act_bits=None, learn_bits=LearnBits(max_bits=max_bits, **settings)))
    if phis is not None:
        set_gates(model, phis)
    return model


def parts(model: nn.Module) -> list[WeightQuantizer]:
    return [part for layer in model if (part := weight_quantizer(layer)) is not None]


def set_gates(model: nn.Module, phis: list[list[float]]) -> None:
    with torch.no_grad():
        for part, phi in zip(parts(model), phis, strict=True):
            part.phi.copy_(torch.tensor(phi))


def bits_of(model: nn.Module) -> list[int]:
    return [part.grid.bits for part in parts(model)]


PHIS = [[0.4, -0.2], [2.0, 1.0], [-0.5, 0.3]]


@pytest.fixture(scope="module")
def digits_network() -> tuple[nn.Module, Tensor, Tensor]:
    """A small network trained on scikit-learn's digits, and digits that it has not seen."""
    x, y = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    x = x.float() / 16
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[::2]), y[::2]).backward()
        optimizer.step()
    return model, x[1::2], y[1::2]


class TestPenalty:
    @pytest.mark.parametrize("target", [{"target_bits": 3.0}, {"target_bytes": 60}])
    def test_a_step_walks_the_model_twice(self, target, monkeypatch):
        """Once for the penalty, once for the controller."""
        model = learning(PHIS, **target)
        walks = []
        plain = nn.Module.named_modules

        def counted(self: nn.Module, *args: Any, **options: Any) -> Iterator[tuple[str, nn.Module]]:
            yield from plain(self, *args, **options)
            # Who looks for the first of something stops before this.
            if self is model:
                walks.append(self)

        monkeypatch.setattr(nn.Module, "named_modules", counted)
        bit_penalty(model)
        assert len(walks) == 1
        update_controller(model)
        assert len(walks) == 2

    def test_a_copy_has_its_own(self):
        model = learning(PHIS)
        other = copy.deepcopy(model)
        set_gates(other, [[9.0, 9.0]] * 3)
        (other.bit_penalty() - model.bit_penalty()).backward()
        assert other.bit_penalty().item() > model.bit_penalty().item()
        assert all(float(part.phi.grad.abs().min()) > 0 for part in [*parts(model), *parts(other)])

    @pytest.mark.parametrize("weighting", ["size", "layer"])
    def test_it_is_the_expected_number_of_levels(self, weighting):
        model = learning(PHIS, weighting=weighting, penalty=0.7)
        open_ = expit(np.array(PHIS) - 2 / 3 * np.log(0.1 / 1.1))
        shares = np.array(SIZES) / sum(SIZES) if weighting == "size" else np.full(3, 1 / 3)
        expected = 0.7 * (shares * np.cumprod(open_, 1).sum(1)).sum()
        found = model.bit_penalty()
        assert found.item() == pytest.approx(expected, rel=1e-5)
        found.backward()
        h = 1e-3
        for layer, gate in itertools.product(range(3), range(2)):
            values = []
            for sign in (1, -1):
                moved = copy.deepcopy(PHIS)
                moved[layer][gate] += sign * h
                values.append(learning(moved, weighting=weighting, penalty=0.7).bit_penalty().item())
            assert parts(model)[layer].phi.grad[gate].item() == pytest.approx(
                (values[0] - values[1]) / (2 * h), rel=0.02, abs=1e-4
            )

    def test_macs_weigh_by_multiplications_and_need_an_example(self):
        model = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.Flatten(), nn.Linear(72, 5, bias=False))
        config = QuantConfig(act_bits=None, learn_bits=LearnBits(weighting="macs", penalty=1.0))
        with pytest.raises(SrqError, match="example_input"):
            bit_penalty(prepare(model, config))
        qmodel = prepare(model, config, torch.zeros(2, 1, 8, 8))
        conv, linear = 2 * 36 * 9, 360
        assert [row.macs for row in qmodel.report().rows] == [conv, linear]
        with torch.no_grad():
            weight_quantizer(qmodel[0]).phi.fill_(-50.0)
            weight_quantizer(qmodel[2]).phi.fill_(50.0)
        assert qmodel.bit_penalty().item() == pytest.approx(2 * linear / (conv + linear))

    def test_there_is_none_without_gates_or_after_freezing(self):
        assert prepare(network(), QuantConfig(act_bits=None)).bit_penalty().item() == 0
        model = learning(PHIS)
        freeze_bits(model)
        assert model.bit_penalty().item() == 0

    def test_pacts_is_the_square_of_its_clipping_values(self):
        qmodel = prepare(network()[0], QuantConfig.method("pact", 3, 3, pact_decay=0.1, quantize_input=None))
        calibrate(qmodel, [normal(30, 10).abs()])
        part = qmodel.input_quantizer
        expected = 0.1 * (part.alpha.item() * part.grid.n_hi) ** 2
        assert qmodel.bit_penalty().item() == pytest.approx(expected, rel=1e-5)


class TestTestTimeBits:
    def test_levels_count_up_to_the_first_closed_gate(self):
        shut, open_ = -4.0, 2.0
        model = learning([[open_, open_], [open_, shut], [shut, open_]])
        assert bits_of(model) == [4, 3, 2]
        assert learning([[shut, open_], [shut, shut], [open_, open_]], min_bits=2).report().avg_bits == pytest.approx(
            (40 * 2 + 12 * 2 + 100 * 4) / 152
        )

    def test_a_gate_is_open_where_its_mean_is_above_zero(self):
        edge = math.log((0.1 / 1.2) / (1 - 0.1 / 1.2))
        model = learning([[edge + 0.01, edge - 0.01], [edge - 0.01, 9.0], [9.0, edge + 0.01]])
        assert bits_of(model) == [3, 2, 4]

    def test_a_layer_may_vanish(self):
        model = learning([[-5.0] * 3, [5.0, -5.0, -5.0], [5.0, 5.0, 5.0]], min_bits=1).eval()
        assert bits_of(model) == [0, 2, 4]
        assert not bool(model[0].weight.any())
        assert freeze_bits(model) == {"0": 0, "1": 2, "2": 4}
        assert not bool(model[0](normal(2, 10)).any())
        rows = model.report().rows
        assert [row.bytes for row in rows] == [0, 3, 50]


class TestFreeze:
    def test_evaluation_is_the_same_before_and_after(self):
        model = learning(PHIS).eval()
        before = [layer.weight.detach().clone() for layer in model]
        assert list(freeze_bits(model).values()) == bits_of(model)
        for layer, weight in zip(model, before, strict=True):
            assert torch.equal(layer.weight, weight)
            assert torch.equal(layer.train().weight, weight)

    def test_it_can_go_on_training_and_its_gates_rest(self):
        model = learning(PHIS)
        freeze_bits(model)
        assert not any(part.phi.requires_grad for part in parts(model))
        assert all(group["name"] != "gates" for group in param_groups(model))
        model[0](normal(2, 10)).sum().backward()

    @pytest.mark.parametrize("per_channel", [False, True])
    def test_layers_that_lose_levels_they_were_tested_with_get_the_best_step(self, per_channel):
        settings = LearnBits(max_bits=6, target_bits=3.0, weighting="layer")
        model = prepare(network(), QuantConfig(act_bits=None, per_channel=per_channel, learn_bits=settings)).eval()
        # The gates of the first are closed already; the others are cut.
        set_gates(model, [[9.0, -9.0, -9.0, -9.0], [3.0, 2.0, 2.0, 2.0], [3.0, 1.0, 1.0, 1.0]])
        before = [part.alpha.detach().clone() for part in parts(model)]
        assert list(freeze_bits(model).values()) == [3, 3, 3]
        assert torch.equal(parts(model)[0].alpha, before[0])
        for layer, old in zip(list(model)[1:], before[1:], strict=True):
            weight = layer.parametrizations.weight.original.detach()
            alpha = weight_quantizer(layer).alpha.detach()
            earlier = found = 0.0
            for row in range(alpha.numel()):
                own = weight[row] if per_channel else weight

                def error(step: Tensor, own: Tensor = own) -> float:
                    return ((own / step).round().clamp(-3, 3) * step - own).square().sum().item()

                best = min(error(own.abs().max() / 3 * place / 80) for place in range(1, 81))
                assert error(alpha.flatten()[row]) == pytest.approx(best, rel=1e-3, abs=1e-9)
                earlier, found = earlier + error(old.flatten()[row]), found + best
            assert found < 0.5 * earlier

    @pytest.mark.parametrize("per_channel", [False, True])
    def test_real_digits_are_still_told_apart(self, digits_network, per_channel):
        model, x, y = digits_network
        settings = LearnBits(max_bits=8, min_bits=3, target_bits=3.0)
        qmodel = prepare(model, QuantConfig(act_bits=None, per_channel=per_channel, learn_bits=settings)).eval()

        def accuracy() -> float:
            return float((qmodel(x).argmax(1) == y).double().mean())

        with torch.no_grad():
            before = accuracy()
            freeze_bits(qmodel)
            assert before > 0.93
            assert accuracy() > before - 0.03
            for layer in (qmodel[0], qmodel[2]):
                weight = layer.parametrizations.weight.original
                assert float((layer.weight - weight).square().sum() / weight.square().sum()) < 0.1

    @pytest.mark.parametrize("seed", range(6))
    @pytest.mark.parametrize("min_bits", [1, 2])
    def test_bytes_never_exceed_the_target(self, seed, min_bits):
        gates = 3 if min_bits == 2 else 4
        phis = (2 * normal(3, gates, seed=seed)).tolist()
        least = 0 if min_bits == 1 else sum(-(-size * 2 // 8) for size in SIZES)
        for target in (least or 1, least + 9, least + 30, 95, 10_000):
            model = learning(phis, 5, min_bits=min_bits, target_bytes=target)
            free = bits_of(learning(phis, 5, min_bits=min_bits))
            found = list(freeze_bits(model).values())
            used = sum(-(-size * bits // 8) for size, bits in zip(SIZES, found, strict=True))
            assert used <= target
            assert all(bits <= own for bits, own in zip(found, free, strict=True))
            if target >= 95:
                assert found == free

    @pytest.mark.parametrize("seed", range(8))
    @pytest.mark.parametrize("target", [2.0, 2.4, 3.1, 4.4, 5.0])
    def test_the_average_is_next_to_the_best_that_whole_bits_allow(self, seed, target):
        """No single level more or less, in any layer, comes nearer to the target."""
        model = learning((2 * normal(3, 3, seed=seed)).tolist(), 5, target_bits=target)
        found = np.array(list(freeze_bits(model).values()))
        shares = np.array(SIZES) / sum(SIZES)
        gap = abs((shares * found).sum() - target)
        for place, step in itertools.product(range(3), (1, -1)):
            other = found + step * (np.arange(3) == place)
            if other.min() >= 2 and other.max() <= 5:
                assert abs((shares * other).sum() - target) >= gap - 1e-9

    def test_the_least_open_level_goes_first(self):
        model = learning([[3.0, 2.0], [3.0, 0.5], [3.0, 1.0]], target_bits=3.9, weighting="layer")
        assert list(freeze_bits(model).values()) == [4, 4, 4]
        model = learning([[3.0, 2.0], [3.0, 0.5], [3.0, 1.0]], target_bits=3.34, weighting="layer")
        assert list(freeze_bits(model).values()) == [4, 3, 3]

    def test_budgets_that_cannot_be_met_say_what_can(self):
        least = sum(-(-size * 2 // 8) for size in SIZES)
        learning(target_bytes=least)
        with pytest.raises(BudgetError, match=rf"{least - 1}.*{least} bytes"):
            learning(target_bytes=least - 1)
        fixed = {"2": {"weight_bits": 8}}
        with pytest.raises(BudgetError, match=f"{least - 25 + 100} bytes"):
            prepare(network(), QuantConfig(learn_bits=LearnBits(target_bytes=least), overrides=fixed))

    @pytest.mark.parametrize(
        "settings",
        [{"min_bits": 4}, {"target_bits": 1.5}, {"target_bits": 5.0}, {"target_bits": 3.0, "target_bytes": 100}],
    )
    def test_settings_that_contradict_each_other(self, settings):
        with pytest.raises((SrqError, ValueError)):
            LearnBits(max_bits=4, **settings)


class TestController:
    def strength(self, model: nn.Module) -> float:
        return next(module for module in model.modules() if isinstance(module, BitController)).strength.item()

    @pytest.mark.parametrize("phi", [-4.0, -0.7, 0.0, 0.6, 4.0])
    def test_it_follows_its_law(self, phi):
        """lambda <- lambda exp(speed (bits - target)), bits by the mean gates."""
        model = learning([[phi, phi + 0.3]] * 3, target_bits=3.0, penalty=0.2, speed=0.1)
        gates = np.clip(expit([phi, phi + 0.3]) * 1.2 - 0.1, 0, 1)
        update_controller(model)
        assert self.strength(model) == pytest.approx(0.2 * math.exp(0.1 * (2 + np.cumprod(gates).sum() - 3)), rel=1e-5)

    @pytest.mark.parametrize(("target", "direction"), [(60, 1), (80, -1)])
    def test_bytes_move_it_too(self, target, direction):
        model = learning([[5.0, 5.0]] * 3, target_bytes=target, penalty=0.2)
        for _ in range(3):
            update_controller(model)
        assert direction * (self.strength(model) - 0.2) > 0

    @pytest.mark.parametrize(("target", "factor"), [(2.25, 1.0), (3.9, 0.0)])
    def test_the_penalty_rests_at_the_target_and_below(self, target, factor):
        model = learning([[0.0, 0.0]] * 3, target_bits=target, penalty=0.2)
        before = float(bit_penalty(model).detach())
        assert before > 0
        update_controller(model)
        assert float(bit_penalty(model).detach()) == pytest.approx(factor * before / 0.2 * self.strength(model))

    def test_without_a_target_it_rests_and_it_is_saved(self):
        model = learning(PHIS, penalty=0.2)
        update_controller(model)
        assert self.strength(model) == pytest.approx(0.2)
        moved = learning(PHIS, target_bits=2.5, penalty=0.2)
        update_controller(moved)
        other = learning(target_bits=2.5, penalty=0.2)
        other.load_state_dict(moved.state_dict())
        assert self.strength(other) == self.strength(moved) != pytest.approx(0.2)


def train(penalty: float, steps: int = 60, gate_lr: float = 0.15, **settings: object) -> nn.Module:
    """Fit one linear layer to targets of its own float weights."""
    layer = network()[2]
    config = QuantConfig(
        act_bits=None, dropbits=DropBits(p_keep=0.9), learn_bits=LearnBits(penalty=penalty, **settings)
    )
    qmodel = prepare(layer, config)
    optimizer = torch.optim.Adam(param_groups(qmodel, 5e-3, gate_lr=gate_lr))
    x = normal(64, 10)
    y = layer(x).detach()
    for _ in range(steps):
        optimizer.zero_grad()
        ((qmodel(x) - y).square().mean() + qmodel.bit_penalty()).backward()
        optimizer.step()
        update_controller(qmodel)
    return qmodel


class TestTraining:
    def test_bits_change_with_the_penalty(self):
        averages = [train(penalty).report().avg_bits for penalty in (0.0, 3.0)]
        assert averages == [4.0, 2.0]

    def test_gates_open_and_close_with_the_controller(self):
        qmodel = train(0.01, target_bits=3.0, speed=0.2, steps=150, gate_lr=0.05)
        controller = next(module for module in qmodel.modules() if isinstance(module, BitController))
        assert abs(controller.distance(qmodel)) < 0.5


class TestTruncate:
    @pytest.mark.parametrize("per_channel", [False, True])
    @pytest.mark.parametrize("bits", [2, 3, 4])
    def test_each_step_is_the_best_of_the_smaller_grid(self, per_channel, bits):
        model = prepare(network(), QuantConfig(weight_bits=4, act_bits=None, per_channel=per_channel)).eval()
        before = [layer.weight.detach().clone() for layer in model]
        assert truncate(model, bits) == {"0": bits, "1": bits, "2": bits}
        top = 2 ** (bits - 1) - 1
        for layer, weight in zip(model, before, strict=True):
            alpha = weight_quantizer(layer).alpha.detach()
            ratio = layer.weight.detach() / alpha
            assert torch.allclose(ratio, ratio.round(), atol=1e-4)
            assert float(ratio.abs().max()) <= top + 1e-4
            if bits == 4:
                assert torch.equal(layer.weight.detach(), weight)
                continue
            for row in range(alpha.numel()):
                own = weight[row] if per_channel else weight
                steps = own.abs().max() * torch.arange(1, 81) / 80 / top
                errors = [((own / s).round().clamp(-top, top) * s - own).square().sum().item() for s in steps]
                a = alpha.flatten()[row]
                found = ((own / a).round().clamp(-top, top) * a - own).square().sum().item()
                assert found == pytest.approx(min(errors), rel=1e-3, abs=1e-9)

    def test_smaller_layers_stay_and_the_cut_survives_a_state_dict(self):
        config = QuantConfig(weight_bits=4, act_bits=None, overrides={"1": {"weight_bits": 2}})
        model = prepare(network(), config).eval()
        kept = model[1].weight.detach().clone()
        assert truncate(model, 3) == {"0": 3, "1": 2, "2": 3}
        assert torch.equal(model[1].weight, kept)
        other = prepare(network(), config).eval()
        other.load_state_dict(copy.deepcopy(model.state_dict()))
        assert all(torch.equal(one.weight, two.weight) for one, two in zip(model, other, strict=True))
        assert str(other.report()) == str(model.report())

    def test_what_cannot_be_cut(self):
        with pytest.raises(InvalidBitsError):
            truncate(learning(), 1)
        with pytest.raises(SrqError, match=r"'0'.*pact"):
            truncate(prepare(network(), QuantConfig.method("pact", 4, None)), 2)


class TestReport:
    def test_bytes_add_up(self):
        qmodel = prepare(nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)), QuantConfig(weight_bits=3))
        calibrate(qmodel, [normal(9, 7)])
        found = report(qmodel)
        assert [row.bytes for row in found.rows] == [-(-35 * 3 // 8), -(-15 * 3 // 8)]
        steps, others = 4, 5 + 3 + 4 * 5
        assert found.other_bytes == 4 * (steps + others)
        assert found.bytes == sum(row.bytes for row in found.rows) + found.other_bytes
        assert found.float_bytes == 4 * (35 + 15) + found.other_bytes
        assert found.macs == 50
        assert found.bit_operations == 35 * 3 * 8 + 15 * 3 * 4
        assert found.to_dict()["avg_bits"] == 3
        assert "total" in str(found)

    def test_a_float_model_has_none(self):
        with pytest.raises(SrqError, match="prepare"):
            report(network())


def test_names_of_quantizers_are_the_layers():
    model = learning(PHIS)
    assert [part.name for part in quantizers(model)] == ["0", "1", "2"]
    assert parts(model)[0].base_grid == Grid.signed(4)
