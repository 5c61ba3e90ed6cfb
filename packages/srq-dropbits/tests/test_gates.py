"""DropBits against brute force over all grid points and all masks, and against finite differences."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import expit
from torch import Tensor

from srq_dropbits.functional import mode_quantize
from srq_dropbits.gates import (
    counter_uniform,
    gate_count,
    hard_concrete,
    hard_concrete_mean,
    keep_logit,
    masked_log_probs,
    masked_quantize,
    nested_masks,
    probability_nonzero,
    residual_quantize,
)
from srq_dropbits.grid import Grid, level_of, levels_of

ALPHA, SIGMA = 0.6, 0.2
GRIDS = [
    Grid.signed(2),
    Grid.signed(3),
    Grid.signed(4),
    Grid.signed(3, symmetric=False),
    Grid.signed(4, symmetric=False),
    Grid.unsigned(1),
    Grid.unsigned(3),
    Grid.unsigned(4),
]
SHARINGS = ["bit", "endpoint"]


def level(n: int, grid: Grid) -> int:
    """ceil(log2(|n| + 1)); the lone lowest point of a full grid joins the top level."""
    found = int(np.ceil(np.log2(abs(n) + 1) - 1e-9))
    return min(found, int(np.ceil(np.log2(grid.n_hi + 1) - 1e-9)))


def mask_of(grid: Grid, masks: np.ndarray, base: int, sharing: str) -> np.ndarray:
    """The mask of every grid point, by the definition of levels and pairs."""
    found = []
    for n in range(grid.n_lo, grid.n_hi + 1):
        if sharing == "bit":
            k = level(n, grid)
            found.append(1.0 if k <= base else masks[k - base - 1])
        else:
            top = 2**base - 1
            found.append(1.0 if abs(n) <= top else masks[abs(n) - top - 1])
    return np.array(found)


def masses(x: np.ndarray, alpha: float, sigma: float, grid: Grid) -> np.ndarray:
    n = np.arange(grid.n_lo, grid.n_hi + 1)
    low, high = ((alpha * (n + half) - x[..., None]) / sigma for half in (-0.5, 0.5))
    return np.where(low > 0, expit(-low) - expit(-high), expit(high) - expit(low))


def masked(x: np.ndarray, alpha: float, sigma: float, grid: Grid, weight: np.ndarray) -> np.ndarray:
    pi = weight * masses(x, alpha, sigma, grid)
    return pi / pi.sum(-1, keepdims=True)


def tensor(value: object, *, grad: bool = False) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=grad)


def cases() -> list[tuple[Grid, int, str]]:
    return [
        (grid, base, sharing)
        for grid, base, sharing in itertools.product(GRIDS, (0, 1, 2), SHARINGS)
        if base < grid.levels and gate_count(grid, base, sharing)
    ]


class TestLevels:
    @pytest.mark.parametrize("grid", GRIDS)
    def test_they_partition_the_grid(self, grid):
        points = [0]
        for k, (low, below, above) in enumerate(levels_of(grid), 1):
            own = [*range(-below, -low + 1)] * (below > 0) + [*range(low, above + 1)] * (above > 0)
            assert {level(n, grid) for n in own} == {k}
            points += own
        assert sorted(points) == list(range(grid.n_lo, grid.n_hi + 1))

    def test_the_level_of_a_point(self):
        assert [level_of(n) for n in range(-300, 301)] == [int(np.ceil(np.log2(abs(n) + 1))) for n in range(-300, 301)]

    @pytest.mark.parametrize("bits", range(2, 9))
    def test_lower_levels_are_the_smaller_grid(self, bits):
        for k in range(1, bits):
            assert Grid.signed(8).upto(k).n_hi == 2**k - 1
        assert Grid.signed(8).upto(bits - 1) == Grid.signed(bits)
        assert Grid.unsigned(8).upto(bits) == Grid.unsigned(bits)

    def test_masks_are_nested(self):
        gates = torch.rand(6, generator=torch.Generator().manual_seed(0))
        expected = [float(np.prod(gates[: k + 1].numpy())) for k in range(6)]
        assert nested_masks(gates).tolist() == pytest.approx(expected)
        assert nested_masks(torch.tensor([1.0, 0.0, 1.0])).tolist() == [1.0, 0.0, 0.0]


class TestMaskedMode:
    @pytest.mark.parametrize(("grid", "base", "sharing"), cases())
    def test_with_hard_masks_it_is_the_nearest_point_that_is_left(self, grid, base, sharing):
        x = ALPHA * np.random.default_rng(0).uniform(grid.n_lo - 2, grid.n_hi + 2, 400)
        count = gate_count(grid, base, sharing)
        every = itertools.product((0.0, 1.0), repeat=count)
        chosen = list(every) if count <= 5 else np.random.default_rng(1).integers(0, 2, (24, count)).astype(float)
        for masks in chosen:
            left = np.array(list(range(grid.n_lo, grid.n_hi + 1)))
            left = left[mask_of(grid, np.array(masks), base, sharing) > 0]
            distance = np.abs(x[:, None] - ALPHA * left)
            two = np.sort(distance, 1)[:, :2] if len(left) > 1 else np.stack([distance[:, 0], distance[:, 0] + 1], 1)
            sure = two[:, 1] - two[:, 0] > 1e-6
            out = masked_quantize(
                tensor(x), tensor(ALPHA), tensor(SIGMA), grid, tensor(list(masks)), base=base, sharing=sharing
            )
            assert out.numpy()[sure] == pytest.approx(ALPHA * left[distance.argmin(1)][sure], abs=1e-12)

    @pytest.mark.parametrize(("grid", "base", "sharing"), cases())
    def test_with_fractional_masks_it_is_the_largest_masked_probability(self, grid, base, sharing):
        random = np.random.default_rng(2)
        x = ALPHA * random.uniform(grid.n_lo - 1, grid.n_hi + 1, 400)
        for trial in range(6):
            masks = random.uniform(0, 1, gate_count(grid, base, sharing)) ** (3 * (trial % 2) + 1)
            if sharing == "bit":
                masks = np.sort(masks)[::-1].copy()
            expected = masked(x, ALPHA, SIGMA, grid, mask_of(grid, masks, base, sharing))
            mode, logs = masked_log_probs(
                tensor(x), tensor(ALPHA), tensor(SIGMA), grid, tensor(masks), base=base, sharing=sharing
            )
            two = np.sort(expected, 1)[:, -2:]
            sure = two[:, 1] - two[:, 0] > 1e-9
            assert np.array_equal(mode.numpy()[sure], expected.argmax(1)[sure] + grid.n_lo)
            assert logs.exp().numpy() == pytest.approx(expected.max(1), abs=1e-9)

    @pytest.mark.parametrize("grid", GRIDS[1:5] + GRIDS[6:])
    @pytest.mark.parametrize("baseline", ["input", "zero", "clipped"])
    @pytest.mark.parametrize("sharing", SHARINGS)
    def test_with_all_masks_1_it_is_the_unmasked_quantizer(self, grid, baseline, sharing):
        x = ALPHA * np.random.default_rng(0).uniform(grid.n_lo - 2, grid.n_hi + 2, 300)
        found = []
        for masks in (None, torch.ones(gate_count(grid, 1, sharing), dtype=torch.float64)):
            parts = tensor(x, grad=True), tensor(ALPHA, grad=True), tensor(SIGMA, grad=True)
            if masks is None:
                out = mode_quantize(*parts, grid.n_lo, grid.n_hi, baseline=baseline)
            else:
                out = masked_quantize(*parts, grid, masks, base=1, sharing=sharing, baseline=baseline)
            out.backward(tensor(np.random.default_rng(1).normal(size=300)))
            found.append([out.detach(), *(part.grad for part in parts)])
        for one, other in zip(*found, strict=True):
            assert torch.allclose(one, other, atol=1e-9, rtol=1e-9)

    @pytest.mark.parametrize(("grid", "base", "sharing"), cases())
    @pytest.mark.parametrize("kind", ["fractional", "hard"])
    def test_its_gradients_are_finite_differences_of_the_masked_probability(self, grid, base, sharing, kind):
        """x_hat = alpha n_m + stop(g_m - c) pi~_m; masks of 0 have a gradient as well."""
        random = np.random.default_rng(5)
        x = ALPHA * random.uniform(grid.n_lo - 0.45, grid.n_hi + 0.45, 60)
        count = gate_count(grid, base, sharing)
        masks = random.uniform(0.2, 0.9, count) if kind == "fractional" else (np.arange(count) < count / 2) * 1.0
        if sharing == "bit":
            masks = np.sort(masks)[::-1].copy()
        parts = [tensor(value, grad=True) for value in (x, ALPHA, SIGMA, masks)]
        upstream = random.normal(size=60)
        masked_quantize(*parts[:3], grid, parts[3], base=base, sharing=sharing).backward(tensor(upstream))
        whole = masked(x, ALPHA, SIGMA, grid, mask_of(grid, masks, base, sharing))
        place = whole.argmax(1)
        n = place + grid.n_lo
        lever = upstream * (ALPHA * n - x)

        def probability(x: np.ndarray, alpha: float, sigma: float, masks: np.ndarray) -> np.ndarray:
            return masked(x, alpha, sigma, grid, mask_of(grid, masks, base, sharing))[np.arange(60), place]

        h = 1e-6
        by_x = (probability(x + h, ALPHA, SIGMA, masks) - probability(x - h, ALPHA, SIGMA, masks)) / (2 * h)
        by_alpha = (probability(x, ALPHA + h, SIGMA, masks) - probability(x, ALPHA - h, SIGMA, masks)) / (2 * h)
        by_sigma = (probability(x, ALPHA, SIGMA + h, masks) - probability(x, ALPHA, SIGMA - h, masks)) / (2 * h)
        assert parts[0].grad.numpy() == pytest.approx(lever * by_x, abs=1e-6)
        assert float(parts[1].grad) == pytest.approx((lever * by_alpha + upstream * n).sum(), rel=1e-6, abs=1e-5)
        assert float(parts[2].grad) == pytest.approx((lever * by_sigma).sum(), rel=1e-6, abs=1e-5)
        # Differences would need steps far below a mask of 0's scale: the quotient rule instead.
        weight = mask_of(grid, masks, base, sharing)
        pi = masses(x, ALPHA, SIGMA, grid)
        total = (weight * pi).sum(1)
        for gate in range(count):
            own = mask_of(grid, (np.arange(count) == gate) * 1.0, base, sharing) - mask_of(
                grid, np.zeros(count), base, sharing
            )
            mode = pi[np.arange(60), place]
            slope = own[place] * mode / total - weight[place] * mode * (own * pi).sum(1) / total**2
            assert float(parts[3].grad[gate]) == pytest.approx((lever * slope).sum(), rel=1e-6, abs=1e-6)

    @pytest.mark.parametrize(
        ("grid", "base"),
        [
            (grid, base)
            for grid in [*GRIDS, Grid.signed(8), Grid.signed(6, symmetric=False), Grid.unsigned(8)]
            for base in (0, 1, 2, 4)
            if base < grid.levels
        ],
    )
    @pytest.mark.parametrize("ratio", [1 / 8, 1 / 3, 1 / 2])
    @pytest.mark.parametrize("baseline", ["input", "zero", "clipped"])
    def test_one_step_gives_what_steps_a_channel_give(self, grid, base, ratio, baseline):
        """The fast form of one step on the CPU, and the general one, with all that gates may be."""
        count, random = gate_count(grid, base), np.random.default_rng(7)
        x = ALPHA * random.uniform(grid.n_lo - 2, grid.n_hi + 2, (2, 150))
        x[0, :2] = 1e9, -1e30
        upstream = tensor(random.normal(size=(2, 150)))
        some = np.sort(random.uniform(0, 1, count))[::-1]
        half = np.arange(count) < (count + 1) // 2
        kinds = [some, some**6, some.round(1).clip(0.3, 0.6), some * half, 1.0 * half, np.ones(count), np.zeros(count)]
        for masks, learn in itertools.product(kinds, (False, True)):
            found = []
            for shape in ((), (2, 1)):
                parts = tensor(x, grad=True), *(tensor(np.full(shape, v), grad=True) for v in (ALPHA, ALPHA * ratio))
                gates = tensor(masks.copy(), grad=learn)
                out = masked_quantize(*parts, grid, gates, base=base, baseline=baseline)
                out.backward(upstream)
                found.append([out.detach(), parts[0].grad, *(part.grad.sum() for part in parts[1:])])
                if learn:
                    # Far inside a level that is gone, a mask of 0 has a gradient without bound: both forms limit it.
                    tame = (masks > 0) | ((grid.n_hi - grid.n_lo) / ratio < 40)
                    found[-1].append(gates.grad[torch.tensor(tame)])
                    assert bool(gates.grad.isfinite().all())
            for one, other in zip(*found, strict=True):
                # The general form's logarithms of masses reach 2000 on the widest grids.
                assert torch.allclose(one, other, atol=1e-8 if grid.n_hi > 15 else 1e-10, rtol=1e-9)

    @pytest.mark.parametrize("masks", [[0.2, 0.9], [float("nan"), 0.5], [1e-20, 1e-30]])
    def test_masks_that_do_not_fall_outwards_or_are_tiny_take_the_general_form(self, masks):
        x, found = np.random.default_rng(0).uniform(-8, 8, (2, 50)), []
        for shape in ((), (2, 1)):
            parts = tensor(x, grad=True), tensor(np.ones(shape), grad=True), tensor(np.full(shape, 0.3))
            out = masked_quantize(*parts, Grid.signed(4), tensor(masks))
            out.sum().backward()
            found.append([out.detach(), parts[0].grad, parts[1].grad.sum()])
        for one, other in zip(*found, strict=True):
            assert torch.allclose(one, other, atol=1e-12, equal_nan=True)

    def test_torch_agrees_with_the_log_probabilitys_gradients(self):
        x = tensor([-1.9, -0.1, 0.35, 1.4, 2.2], grad=True)
        parts = x, tensor(ALPHA, grad=True), tensor(SIGMA, grad=True), tensor([0.7, 0.3], grad=True)
        assert torch.autograd.gradcheck(
            lambda x, alpha, sigma, masks: masked_log_probs(x, alpha, sigma, Grid.signed(4), masks)[1], parts
        )

    @pytest.mark.parametrize("sharing", SHARINGS)
    def test_it_scales_with_its_arguments(self, sharing):
        grid = Grid.signed(3)
        x, masks = np.random.default_rng(0).uniform(-3, 3, 200), tensor([0.6] * gate_count(grid, 1, sharing))
        found = []
        for scale in (1.0, 9.0):
            parts = tensor(scale * x, grad=True), tensor(scale * 0.7, grad=True), tensor(scale * 0.2, grad=True)
            out = masked_quantize(*parts, grid, masks, sharing=sharing) / scale
            out.sum().backward()
            found.append([out.detach(), *(scale * part.grad for part in parts)])
        for one, other in zip(*found, strict=True):
            assert torch.allclose(one, other, atol=1e-9)

    @pytest.mark.parametrize("sharing", SHARINGS)
    @pytest.mark.parametrize("mask", [0.0, 1e-6, 0.5, 1.0])
    def test_extremes_are_finite(self, sharing, mask):
        grid = Grid.signed(8)
        x = torch.tensor([1e30, -1e9, 1e4, 0.0, 130.0, -3.0], requires_grad=True)
        alpha, sigma = torch.tensor(1.0, requires_grad=True), torch.tensor(1 / 8, requires_grad=True)
        masks = torch.full((gate_count(grid, 1, sharing),), mask, requires_grad=True)
        out = masked_quantize(x, alpha, sigma, grid, masks, sharing=sharing)
        top = 1.0 if mask == 0 else 127.0
        if mask in {0.0, 1.0}:
            assert out.tolist() == [top, -top, top, 0.0, top, -min(top, 3.0)]
        out.sum().backward()
        for part in (x, alpha, sigma, masks):
            assert bool(part.grad.isfinite().all())

    def test_steps_a_channel_are_every_channel_by_itself(self):
        x = np.random.default_rng(0).normal(size=(3, 20))
        steps = np.array([[0.1], [0.4], [2.0]])
        masks = tensor([0.4], grad=True)
        whole = tensor(x, grad=True), tensor(steps, grad=True)
        out = masked_quantize(*whole, tensor(steps / 3), Grid.signed(3), masks)
        out.square().sum().backward()
        total = 0.0
        for row in range(3):
            own = tensor([0.4], grad=True)
            part = tensor(x[row], grad=True), tensor(float(steps[row, 0]), grad=True)
            masked_quantize(*part, tensor(float(steps[row, 0] / 3)), Grid.signed(3), own).square().sum().backward()
            assert torch.allclose(part[0].grad, whole[0].grad[row], atol=1e-10)
            assert torch.allclose(part[1].grad, whole[1].grad[row].sum(), atol=1e-10)
            total += float(own.grad)
        assert float(masks.grad) == pytest.approx(total)


class TestValuePath:
    @pytest.mark.parametrize("base", [0, 1, 2])
    def test_levels_add_up(self, base):
        grid, x = Grid.signed(4), np.random.default_rng(0).uniform(-6, 6, 200)
        masks = tensor([0.8, 0.5, 0.2][: grid.levels - base], grad=True)

        def clipped(x: np.ndarray, k: int) -> np.ndarray:
            return ALPHA * np.clip(np.rint(x / ALPHA), -(2**k - 1), 2**k - 1)

        def plain(x: Tensor, grid: Grid) -> Tensor:
            return ALPHA * (x / ALPHA).round().clamp(grid.n_lo, grid.n_hi)

        out = residual_quantize(tensor(x), grid, masks, plain, base=base)
        steps = [clipped(x, k) - clipped(x, k - 1) for k in range(base + 1, 4)]
        expected = clipped(x, base) + sum(float(m) * step for m, step in zip(masks.detach(), steps, strict=True))
        assert out.detach().numpy() == pytest.approx(expected)
        out.sum().backward()
        assert masks.grad.numpy() == pytest.approx([step.sum() for step in steps])


class TestHardConcrete:
    @pytest.mark.parametrize("phi", [-3.0, -0.7, 0.0, 1.0, 4.0])
    def test_zeros_and_ones_come_as_often_as_the_closed_forms_say(self, phi):
        uniform = torch.rand(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        gates = hard_concrete(torch.full_like(uniform, phi), uniform)
        zero, one = float((gates == 0).double().mean()), float((gates == 1).double().mean())
        assert zero == pytest.approx(1 - expit(phi - 2 / 3 * np.log(0.1 / 1.1)), abs=0.01)
        assert one == pytest.approx(expit(phi - 2 / 3 * np.log(1.1 / 0.1)), abs=0.01)
        assert float(probability_nonzero(tensor([phi]))) == pytest.approx(expit(phi - 2 / 3 * np.log(0.1 / 1.1)))

    def test_it_is_the_stretched_clipped_sigmoid(self):
        uniform = np.random.default_rng(0).uniform(0, 1, 1000)
        s = expit((np.log(uniform) - np.log1p(-uniform) + 0.3) / (2 / 3))
        expected = np.clip(s * 1.2 - 0.1, 0, 1)
        assert hard_concrete(tensor([0.3] * 1000), tensor(uniform)).numpy() == pytest.approx(expected, abs=1e-9)
        assert hard_concrete_mean(tensor([-5.0, -1.0, 0.3, 5.0])).numpy() == pytest.approx(
            np.clip(expit([-5.0, -1.0, 0.3, 5.0]) * 1.2 - 0.1, 0, 1)
        )

    def test_its_gradient_with_fixed_noise_is_a_finite_difference(self):
        phi = tensor(np.linspace(-3, 3, 101), grad=True)
        uniform, h = tensor(np.random.default_rng(0).uniform(0.05, 0.95, 101)), 1e-6
        hard_concrete(phi, uniform).sum().backward()
        slope = (hard_concrete(phi.detach() + h, uniform) - hard_concrete(phi.detach() - h, uniform)) / (2 * h)
        assert torch.allclose(phi.grad, slope, atol=1e-6)
        assert bool((phi.grad > 0).any())
        assert bool((phi.grad == 0).any())

    @pytest.mark.parametrize("probability", [0.01, 0.5, 0.7, 0.9, 0.999])
    def test_the_log_odds_of_a_probability(self, probability):
        assert float(probability_nonzero(tensor([keep_logit(probability)]))) == pytest.approx(probability, abs=1e-6)

    def test_noise_at_the_ends_is_harmless(self):
        phi = torch.zeros(2, requires_grad=True)
        gates = hard_concrete(phi, torch.tensor([0.0, 1.0]))
        gates.sum().backward()
        assert gates.tolist() == [0.0, 1.0]
        assert bool(phi.grad.isfinite().all())


class TestCounterUniform:
    def test_it_is_uniform_along_counter_and_stream(self):
        along = torch.stack([counter_uniform(torch.tensor(step), 7, 3) for step in range(1500)]).numpy()
        for column in along.T:
            assert stats.kstest(column, "uniform").pvalue > 1e-3
        assert stats.kstest(counter_uniform(torch.tensor(3), 0, 4000).numpy(), "uniform").pvalue > 1e-3
        assert along.min() > 0
        assert along.max() < 1

    @pytest.mark.parametrize(("one", "other"), [(0, 1), (0, -1), (5, 6), (0, 1000), (3, 2**31 * 1000)])
    def test_streams_do_not_move_together(self, one, other):
        streams = [
            torch.stack([counter_uniform(torch.tensor(step), seed, 2) for step in range(800)]).flatten().numpy()
            for seed in (one, other)
        ]
        assert abs(np.corrcoef(*streams)[0, 1]) < 4 / np.sqrt(1600)
        assert abs(np.corrcoef(streams[0][1:], streams[1][:-1])[0, 1]) < 4 / np.sqrt(1600)

    def test_it_is_a_function_of_its_arguments(self):
        state = torch.get_rng_state()
        first = counter_uniform(torch.tensor(10), 4, 5)
        assert torch.equal(first, counter_uniform(torch.tensor(10), 4, 5))
        assert torch.equal(first[:2], counter_uniform(torch.tensor(10), 4, 2))
        assert not torch.equal(first, counter_uniform(torch.tensor(11), 4, 5))
        assert torch.equal(state, torch.get_rng_state())


def variation(x: float, sharing: str, p_keep: float = 0.7) -> tuple[float, float]:
    """Total variation to pi of what training draws select, without masks and with, by all masks at b=3."""
    grid = Grid.signed(3)
    pi = masked(np.array(x), 1.0, 1 / 3, grid, np.ones(7))
    plain, dropped = np.zeros(7), np.zeros(7)
    plain[int(mode_quantize(tensor([x]), tensor(1.0), tensor(1 / 3), -3, 3).item()) + 3] = 1
    for gates in itertools.product((0.0, 1.0), repeat=gate_count(grid, 1, sharing)):
        out = masked_quantize(tensor([x]), tensor(1.0), tensor(1 / 3), grid, tensor(gates), sharing=sharing)
        dropped[int(out.item()) + 3] += np.prod([p_keep if gate else 1 - p_keep for gate in gates])
    return 0.5 * float(np.abs(plain - pi).sum()), 0.5 * float(np.abs(dropped - pi).sum())


class TestBiasToTheMode:
    """What training draws select, against the distribution they stand for: b=3, p_keep=0.7, all masks enumerated."""

    @pytest.mark.parametrize(("sharing", "last"), [("bit", 2.8), ("endpoint", 3.2)])
    def test_dropping_bits_reduces_it_in_the_levels_that_may_drop_up_to_the_outermost_point(self, sharing, last):
        for x in np.arange(1.501, last, 0.05):
            plain, dropped = variation(float(x), sharing)
            assert dropped < plain

    @pytest.mark.parametrize("sharing", SHARINGS)
    def test_it_does_not_reduce_it_elsewhere(self, sharing):
        """Below, nothing is dropped; near the range's end and beyond it, 30 % of drops are more than pi leaves."""
        for x in np.arange(0.0, 1.5, 0.1):
            plain, dropped = variation(float(x), sharing)
            assert dropped == pytest.approx(plain)
        for x in np.arange(3.3, 5.0, 0.1):
            plain, dropped = variation(float(x), sharing)
            assert dropped > plain
