"""Relaxed quantization against NumPy in float64, closed forms, quadrature and finite differences."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import expit, log_expit
from torch import Tensor

from srq_dropbits.functional import (
    concrete_quantize,
    grid_round,
    interval_log_mass,
    log_probs,
    lsq_quantize,
    mode_quantize,
    stochastic_round,
)

GRIDS = [(-1, 1), (-3, 3), (-4, 3), (0, 7), (0, 1), (-127, 127)]
BASELINES = ["input", "zero", "clipped"]
THIRD = torch.tensor(1 / 3, dtype=torch.float64)
ONE = torch.tensor(1.0, dtype=torch.float64)


def categorical(x: np.ndarray, alpha: float, sigma: float, n_lo: int, n_hi: int) -> np.ndarray:
    """The definition, by differences of the logistic distribution function."""
    edges = alpha * (np.arange(n_lo, n_hi + 2) - 0.5)
    cdf = expit((edges - x[..., None]) / sigma)
    return np.diff(cdf, axis=-1) / (cdf[..., -1:] - cdf[..., :1])


def nearest(x: np.ndarray, alpha: float, n_lo: int, n_hi: int) -> np.ndarray:
    n = np.arange(n_lo, n_hi + 1)
    return n[np.abs(x[..., None] - alpha * n).argmin(-1)]


def derivatives(x: np.ndarray, alpha: float, sigma: float, n_lo: int, n_hi: int, n: np.ndarray) -> list[np.ndarray]:
    """d pi_n / d(x, alpha, sigma), by the closed forms of the specification, section 2.3."""
    low, high = (alpha * (n - 0.5) - x) / sigma, (alpha * (n + 0.5) - x) / sigma
    first, last = (alpha * (n_lo - 0.5) - x) / sigma, (alpha * (n_hi + 0.5) - x) / sigma
    size, u = n_hi - n_lo + 1, alpha / sigma
    pi = (expit(high) - expit(low)) / (expit(last) - expit(first))
    by_x = (expit(low) - expit(-high) - expit(first) + expit(-last)) / sigma
    by_alpha = (
        (n + 0.5) * expit(-high) - (n - 0.5) * expit(low) - (n_hi + 0.5) * expit(-last) + (n_lo - 0.5) * expit(first)
    ) / sigma + (np.exp(-u) / -np.expm1(-u) - size * np.exp(-size * u) / -np.expm1(-size * u)) / sigma
    return [pi * by_x, pi * by_alpha, pi * (-x * by_x - alpha * by_alpha) / sigma]


def values(count: int, span: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-span, span, count)


def leaf(value: np.ndarray | float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


class TestDistribution:
    @pytest.mark.parametrize(
        ("x", "expected"),
        [
            (0.0, (0.175290, 0.649419, 0.175290)),
            (0.3, (0.081201, 0.580534, 0.338264)),
            (1.0, (0.012771, 0.209834, 0.777395)),
            (2.0, (0.002880, 0.057205, 0.939915)),
        ],
    )
    def test_it_has_the_values_of_the_table(self, x, expected):
        found = log_probs(torch.tensor(x), torch.tensor(1.0), torch.tensor(1 / 3), -1, 1).exp()
        assert found.tolist() == pytest.approx(expected, abs=1e-6)

    @pytest.mark.parametrize(("n_lo", "n_hi"), GRIDS)
    @pytest.mark.parametrize("sigma", [0.05, 0.2, 0.9])
    def test_it_is_the_difference_of_distribution_functions(self, n_lo, n_hi, sigma):
        x = 0.6 * np.random.default_rng(0).uniform(n_lo - 1, n_hi + 1, 200)
        expected = categorical(x, 0.6, sigma, n_lo, n_hi)
        found = log_probs(torch.tensor(x), 0.6 * ONE, sigma * ONE, n_lo, n_hi)
        sure = expected > 1e-9
        assert np.abs(found.numpy()[sure] - np.log(expected[sure])).max() < 1e-6
        assert np.abs(found.exp().sum(-1).numpy() - 1).max() < 1e-10

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("ratio", [1e-3, 1e-2, 1 / 8, 1 / 2])
    @pytest.mark.parametrize("distance", [1e2, 1e4, 1e8, 1e30])
    def test_far_away_it_is_the_geometric_distribution(self, dtype, ratio, distance):
        x = torch.tensor([distance, -distance], dtype=dtype, requires_grad=True)
        alpha, sigma = (torch.tensor(v, dtype=dtype, requires_grad=True) for v in (1.0, ratio))
        found = log_probs(x, alpha, sigma, -3, 3)
        n = np.arange(-3, 4)
        expected = n / ratio - np.logaddexp.reduce(n / ratio)
        assert found[0].tolist() == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-4)
        assert found[1].tolist() == pytest.approx(expected[::-1].tolist(), rel=1e-4, abs=1e-4)
        found.exp().square().sum().backward()
        assert all(bool(part.grad.isfinite().all()) for part in (x, alpha, sigma))

    def test_fuzz_is_added_as_in_algorithm_1(self):
        x = values(50, 2.0)
        edges = 0.5 * (np.arange(-3, 5) - 0.5)
        cdf = expit((edges - x[:, None]) / 0.2)
        expected = (np.diff(cdf) + 1e-2) / (cdf[:, -1:] - cdf[:, :1] + 7 * 1e-2)
        found = log_probs(torch.tensor(x), 0.5 * ONE, 0.2 * ONE, -3, 3, fuzz=1e-2).exp()
        assert np.abs(found.numpy() - expected).max() < 1e-12

    def test_masses_of_neighbouring_cells_add_up(self):
        x = torch.tensor(values(100, 4.0))
        parts = torch.stack([interval_log_mass(x, ONE, THIRD, float(n), float(n)) for n in range(-2, 4)])
        assert torch.allclose(parts.logsumexp(0), interval_log_mass(x, ONE, THIRD, -2.0, 3.0), atol=1e-12, rtol=0)

    def test_torch_agrees_with_its_gradients(self):
        x, alpha, sigma = leaf(values(3, 1.5)), leaf(0.7), leaf(0.25)
        assert torch.autograd.gradcheck(lambda *parts: log_probs(*parts, -2, 3), (x, alpha, sigma))

    def test_it_depends_on_ratios_alone(self):
        """Euler: x dlog pi/dx + alpha dlog pi/dalpha + sigma dlog pi/dsigma = 0."""
        for n_lo, n_hi, place in [(-1, 1, 0), (-3, 3, 5), (0, 7, 3)]:
            x, alpha, sigma = leaf(values(40, 3.0)), leaf(0.7), leaf(0.25)
            one = log_probs(x, alpha, sigma, n_lo, n_hi)[:, place]
            for row in range(len(one)):
                by_x, by_alpha, by_sigma = torch.autograd.grad(one[row], (x, alpha, sigma), retain_graph=True)
                residual = x[row] * by_x[row] + alpha * by_alpha + sigma * by_sigma
                assert abs(residual.item()) < 1e-8

    def test_its_closed_forms_are_its_gradients(self):
        x, n_lo, n_hi = values(30, 2.0), -2, 3
        found = leaf(x), leaf(0.7), leaf(0.25)
        log_probs(*found, n_lo, n_hi).exp()[:, 4].sum().backward()
        expected = derivatives(x, 0.7, 0.25, n_lo, n_hi, np.full(30, 2))
        assert found[0].grad.numpy() == pytest.approx(expected[0], abs=1e-10)
        assert float(found[1].grad) == pytest.approx(expected[1].sum(), abs=1e-9)
        assert float(found[2].grad) == pytest.approx(expected[2].sum(), abs=1e-9)

    def test_its_mode_is_plain_rounding_on_a_million_values(self):
        x = values(1_000_000, 5.0)
        x = x[np.abs(x - np.floor(x) - 0.5) > 1e-6]
        rounded = grid_round(torch.tensor(x), ONE, -3, 3)
        assert np.array_equal(rounded.numpy(), np.clip(np.rint(x), -3, 3))
        mode = log_probs(torch.tensor(x), ONE, THIRD, -3, 3).argmax(-1) - 3
        assert bool((rounded == mode).all())

    def test_halves_go_to_even(self):
        assert grid_round(torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5]), torch.tensor(1.0), -3, 3).tolist() == [
            -2.0,
            0.0,
            0.0,
            2.0,
            2.0,
        ]


class TestModeQuantize:
    @pytest.mark.parametrize("baseline", BASELINES)
    @pytest.mark.parametrize(("n_lo", "n_hi"), GRIDS)
    @pytest.mark.parametrize("ratio", [1 / 8, 1 / 3, 1 / 2, 5.0, 20.0])
    def test_forward_and_backward_are_the_formulas(self, baseline, n_lo, n_hi, ratio):
        a, s = 0.7, 0.7 * ratio
        x = a * np.random.default_rng(0).uniform(n_lo - 2, n_hi + 2, 300)
        upstream = values(300, 1.0, seed=1)
        n = nearest(x, a, n_lo, n_hi)
        pieces = leaf(x), leaf(a), leaf(s)
        out = mode_quantize(*pieces, n_lo, n_hi, baseline=baseline)
        out.backward(torch.tensor(upstream))
        inside = (x > a * (n_lo - 0.5)) & (x < a * (n_hi + 0.5))
        half = {"input": 0.5, "clipped": 0.0}.get(baseline, 0.0)
        control = 0.0 if baseline == "zero" else np.clip(x, a * (n_lo - half), a * (n_hi + half))
        lever = upstream * inside * (a * n - control)
        by_x, by_alpha, by_sigma = derivatives(x, a, s, n_lo, n_hi, n)
        assert out.detach().numpy() == pytest.approx(a * n, abs=1e-12)
        assert pieces[0].grad.numpy() == pytest.approx(lever * by_x, abs=1e-9)
        assert float(pieces[1].grad) == pytest.approx((upstream * n + lever * by_alpha).sum(), abs=1e-7)
        assert float(pieces[2].grad) == pytest.approx((lever * by_sigma).sum(), abs=1e-7)

    def test_without_a_baseline_the_zero_cell_is_dead(self):
        x = leaf(np.linspace(-0.49, 0.49, 99))
        mode_quantize(x, ONE, THIRD, -3, 3, baseline="zero").sum().backward()
        assert not bool(x.grad.any())
        y = leaf(np.linspace(-0.49, 0.49, 99))
        mode_quantize(y, ONE, THIRD, -3, 3, baseline="input").sum().backward()
        assert bool((y.grad[y.detach().abs() > 0.02] > 0).all())

    @pytest.mark.parametrize("ratio", [1 / 8, 1 / 3, 1 / 2])
    def test_in_interior_cells_no_gradient_opposes_descent(self, ratio):
        x = leaf(np.linspace(-126.4999, 126.4999, 40_001))
        mode_quantize(x, ONE, ratio * ONE, -127, 127).sum().backward()
        # Truncation moves the zero of the slope off the centre of the cells next to the outermost, by very little.
        assert float(x.grad.min()) > -1e-3
        assert float(x.grad[x.detach().abs() < 100].min()) >= -1e-15

    def test_clipped_control_never_opposes_descent_in_outer_cells(self):
        x = leaf(np.linspace(2.5001, 3.4999, 1001))
        mode_quantize(x, ONE, THIRD, -3, 3, baseline="clipped").sum().backward()
        assert float(x.grad.min()) >= 0

    @pytest.mark.parametrize(("n_lo", "n_hi"), [(-1, 1), (0, 1), (-2, 1), (0, 3), (-3, 3), (0, 7), (-7, 7)])
    @pytest.mark.parametrize(
        ("ratio", "worst", "sliver", "share"),
        [(1 / 5, 5e-7, 8e-4, 5e-4), (1 / 3, 7e-5, 0.013, 0.007), (1 / 2, 8e-4, 0.07, 0.031)],
    )
    def test_where_the_clipped_control_opposes_descent(self, n_lo, n_hi, ratio, worst, sliver, share):
        """Beside the middle of inner cells, where the grid's ends have moved the top of the mode's probability to."""
        x = leaf(np.linspace(n_lo - 0.4999, n_hi + 0.4999, 40_001))
        mode_quantize(x, ONE, ratio * ONE, n_lo, n_hi, baseline="clipped").sum().backward()
        n = x.detach().round().clamp(n_lo, n_hi)
        against = x.grad < -1e-14
        # With three points in a row the ends are even, with two there is no inner cell.
        assert bool(against.any()) == (n_hi - n_lo > 2)
        assert not bool((against & ((n == n_lo) | (n == n_hi))).any())
        assert float(x.grad.min()) > -worst
        assert float((x.detach() - n).abs()[against].max() if against.any() else 0) < sliver
        assert float(against.double().mean()) < share

    @pytest.mark.parametrize(("ratio", "expected"), [(1 / 3, 0.1177), (1 / 2, 0.0530)])
    def test_the_mean_gain_of_a_cell(self, ratio, expected):
        count = 200_000
        x = leaf((np.arange(count) + 0.5) / count - 0.5)
        mode_quantize(x, ONE, ratio * ONE, -127, 127).sum().backward()
        u = 1 / ratio
        closed = (-log_expit(-u) - log_expit(u) - 2 * math.log(2)) / u - (expit(u) - 0.5)
        assert float(x.grad.mean()) == pytest.approx(closed, abs=1e-3)
        assert float(x.grad.mean()) == pytest.approx(expected, abs=1e-3)

    def test_the_gain_at_the_edge(self):
        x = leaf([0.5 - 1e-9])
        mode_quantize(x, ONE, THIRD, -127, 127).sum().backward()
        assert float(x.grad) == pytest.approx(0.307, abs=1e-3)

    @pytest.mark.parametrize("soft", [False, True])
    def test_it_scales_with_its_arguments(self, soft):
        x, grads = values(500, 3.0), []
        for scale in (1.0, 7.5):
            parts = leaf(scale * x), leaf(scale * 0.7), leaf(scale * 0.2)
            out = mode_quantize(*parts, -3, 3, soft=soft)
            out.sum().backward()
            grads.append([(out / scale).detach(), *(part.grad for part in parts)])
        for one, other in zip(*grads, strict=True):
            assert torch.allclose(one, other, atol=1e-9, rtol=1e-9)

    def test_all_coordinates_are_differentiated_where_soft(self):
        x = values(60, 2.0)
        parts = leaf(x), leaf(0.7), leaf(0.25)
        mode_quantize(*parts, -2, 2, soft=True).sum().backward()
        grid, h = 0.7 * np.arange(-2, 3), 1e-6
        inside = np.abs(x) < 0.7 * 2.5

        def mean(x: np.ndarray, alpha: float, sigma: float) -> np.ndarray:
            return (categorical(x, alpha, sigma, -2, 2) * grid).sum(-1) * inside

        by_x = (mean(x + h, 0.7, 0.25) - mean(x - h, 0.7, 0.25)) / (2 * h)
        by_alpha = (mean(x, 0.7 + h, 0.25) - mean(x, 0.7 - h, 0.25)) / (2 * h) + nearest(x, 0.7, -2, 2)
        by_sigma = (mean(x, 0.7, 0.25 + h) - mean(x, 0.7, 0.25 - h)) / (2 * h)
        assert parts[0].grad.numpy() == pytest.approx(by_x, abs=1e-6)
        assert float(parts[1].grad) == pytest.approx(by_alpha.sum(), abs=1e-5)
        assert float(parts[2].grad) == pytest.approx(by_sigma.sum(), abs=1e-5)

    @pytest.mark.parametrize("rho", [1 / 8, 1 / 3, 1 / 2])
    @pytest.mark.parametrize(("n_lo", "n_hi"), [(-1, 1), (-8, 7), (0, 15), (-127, 127), (0, 255)])
    def test_soft_gradients_are_those_of_the_whole_distribution(self, n_lo, n_hi, rho):
        """On wide grids only the edges that the noise reaches are looked at."""
        x = 0.7 * np.random.default_rng(0).uniform(n_lo - 0.5, n_hi + 0.5, 800)
        parts, whole = (tuple(leaf(value) for value in (x, 0.7, 0.7 * rho)) for _ in range(2))
        upstream = torch.randn(800, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        mode_quantize(*parts, n_lo, n_hi, soft=True).backward(upstream)
        points = torch.arange(n_lo, n_hi + 1, dtype=torch.float64)
        mode = torch.from_numpy(nearest(x, 0.7, n_lo, n_hi))
        mean = (log_probs(*whole, n_lo, n_hi).exp() * points * 0.7).sum(-1) + mode * whole[1]
        mean.backward(upstream)
        for one, other in zip(parts, whole, strict=True):
            assert torch.allclose(one.grad, other.grad, atol=1e-8, rtol=1e-8)

    @pytest.mark.parametrize("rho", [1 / 6, 1 / 3, 1 / 2])
    @pytest.mark.parametrize(("n_lo", "n_hi"), [(-1, 1), (-7, 7), (0, 15), (0, 255)])
    def test_soft_gradients_of_large_tensors_are_interpolated_closely(self, n_lo, n_hi, rho):
        random = np.random.default_rng(0)
        x, upstream = random.uniform(n_lo - 1, n_hi + 1, 70_001), random.normal(size=70_001)
        # What float32 rounds to another cell is another function.
        x = x[np.abs(x - 0.5 - np.round(x - 0.5)) > 1e-5]
        found = []
        for kind in (torch.float64, torch.float32):
            parts = [torch.tensor(value, dtype=kind, requires_grad=True) for value in (x, 1.0, rho)]
            out = mode_quantize(*parts, n_lo, n_hi, soft=True)
            found.append(torch.autograd.grad(out, parts, torch.tensor(upstream[: len(x)], dtype=kind)))
        exact, interpolated = found
        assert torch.allclose(interpolated[0].double(), exact[0], atol=4e-4 if rho == 1 / 6 else 1e-4)
        for one, other in zip(interpolated[1:], exact[1:], strict=True):
            assert float(one) == pytest.approx(float(other), rel=1e-3, abs=0.1)

    @pytest.mark.parametrize("n", [-1.5, -0.5, 0.5, 1.5])
    def test_soft_gradients_on_an_edge_are_those_beside_it(self, n):
        x = torch.tensor([n - 1e-9, n, n + 1e-9], dtype=torch.float64, requires_grad=True)
        mode_quantize(x, ONE, THIRD, -3, 3, soft=True).sum().backward()
        assert x.grad.numpy() == pytest.approx(float(x.grad[0]), abs=1e-7)

    @pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
    def test_large_tensors_are_the_sum_of_their_pieces(self, shape):
        """Longer than the pieces the backward pass works in, and no multiple of them; every shape of a single step."""
        count = 2**18 + 1234
        x = torch.randn(1, count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        upstream = torch.randn(1, count, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        alpha = torch.full(shape, 0.6, dtype=torch.float64, requires_grad=True)
        sigma = torch.full(shape, 0.2, dtype=torch.float64, requires_grad=True)
        whole = x.clone().requires_grad_()
        mode_quantize(whole, alpha, sigma, -3, 3).backward(upstream)
        found = whole.grad, alpha.grad.clone(), sigma.grad.clone()
        alpha.grad = sigma.grad = None
        pieces = []
        for start in range(0, count, 50_000):
            part = x[:, start : start + 50_000].clone().requires_grad_()
            mode_quantize(part, alpha, sigma, -3, 3).backward(upstream[:, start : start + 50_000])
            pieces.append(part.grad)
        assert torch.equal(found[0], torch.cat(pieces, 1))
        assert torch.allclose(found[1], alpha.grad, rtol=1e-10)
        assert torch.allclose(found[2], sigma.grad, rtol=1e-10)
        assert found[1].shape == shape

    @pytest.mark.parametrize("bits", range(2, 9))
    @pytest.mark.parametrize("kind", ["symmetric", "full", "unsigned"])
    @pytest.mark.parametrize("baseline", BASELINES)
    @pytest.mark.parametrize("ratio", [1 / 8, 1 / 3, 1 / 2])
    def test_one_step_gives_what_steps_a_channel_give(self, bits, kind, baseline, ratio):
        """The fast form of one step on the CPU, hyperbolic functions in pieces, and the general one in sigmoids."""
        top = 2 ** (bits - 1) - 1
        n_lo, n_hi = {"symmetric": (-top, top), "full": (-top - 1, top), "unsigned": (0, 2 * top + 1)}[kind]
        x = 0.7 * np.random.default_rng(bits).uniform(n_lo - 2, n_hi + 2, (2, 150))
        x[0, :2] = 1e9, -1e30
        upstream = torch.tensor(values(300, 1.0, seed=1).reshape(2, 150))
        found = []
        for shape in ((), (2, 1)):
            parts = leaf(x), *(leaf(np.full(shape, value)) for value in (0.7, 0.7 * ratio))
            out = mode_quantize(*parts, n_lo, n_hi, baseline=baseline)
            out.backward(upstream)
            found.append([out.detach(), parts[0].grad, *(part.grad.sum() for part in parts[1:])])
        for one, other in zip(*found, strict=True):
            assert torch.allclose(one, other, atol=1e-10, rtol=1e-10)
        assert torch.equal(found[0][0], found[1][0])
        # In float32 the gradient of x is exact to a few units of the value's own rounding, n_hi eps, times the lever.
        part = torch.tensor(x, dtype=torch.float32, requires_grad=True)
        steps = torch.tensor(0.7), torch.tensor(0.7 * ratio)
        mode_quantize(part, *steps, n_lo, n_hi, baseline=baseline).backward(upstream.float())
        # Entries beside a cell edge may go to either side.
        v = x / 0.7
        sure = torch.tensor(np.abs(v - np.floor(v) - 0.5) > 1e-3)
        lever = n_hi if baseline == "zero" else 1
        assert torch.allclose(part.grad.double()[sure], found[1][1][sure], atol=5e-6 * max(n_hi, 8) * lever, rtol=1e-4)

    def test_an_expanded_gradient_counts_every_entry(self):
        x = values(200, 3.0)
        found = []
        for upstream in (torch.ones(()).double().expand(200), torch.ones(200).double()):
            parts = leaf(x), leaf(0.7), leaf(0.2)
            mode_quantize(*parts, -3, 3).backward(upstream)
            found.append([part.grad for part in parts])
        for one, other in zip(*found, strict=True):
            assert torch.allclose(one, other, atol=1e-12)

    def test_a_step_a_channel_is_every_channel_by_itself(self):
        x = values(24, 2.0).reshape(4, 3, 2)
        steps = np.array([0.2, 0.5, 0.9, 3.0])
        whole = leaf(x), leaf(steps[:, None, None]), leaf(steps[:, None, None] / 3)
        out = mode_quantize(*whole, -3, 3)
        out.square().sum().backward()
        for row in range(4):
            part = leaf(x[row]), leaf(float(steps[row])), leaf(float(steps[row] / 3))
            one = mode_quantize(*part, -3, 3)
            one.square().sum().backward()
            assert torch.equal(one, out[row])
            assert torch.allclose(part[0].grad, whole[0].grad[row], atol=1e-12)
            assert torch.allclose(part[1].grad, whole[1].grad[row].sum(), atol=1e-12)
            assert torch.allclose(part[2].grad, whole[2].grad[row].sum(), atol=1e-12)

    def test_strided_and_empty_tensors(self):
        x = leaf(values(60, 2.0).reshape(6, 10))
        mode_quantize(x.t()[::3], ONE, THIRD, -1, 1).sum().backward()
        y = leaf(x.detach().numpy())
        mode_quantize(y, ONE, THIRD, -1, 1)[:, ::3].sum().backward()
        assert torch.equal(x.grad, y.grad)
        empty = torch.zeros(0, 3, requires_grad=True)
        mode_quantize(empty, torch.tensor(1.0), torch.tensor(0.3), -1, 1).sum().backward()
        assert empty.grad.shape == (0, 3)


class TestLsq:
    def test_its_gradients_are_the_rule(self):
        x, upstream = values(300, 4.0), values(300, 1.0, seed=1)
        parts = leaf(x), leaf(0.8)
        out = lsq_quantize(*parts, -3, 4)
        out.backward(torch.tensor(upstream))
        n, inside = np.clip(np.rint(x / 0.8), -3, 4), (x / 0.8 >= -3) & (x / 0.8 <= 4)
        assert out.detach().numpy() == pytest.approx(0.8 * n)
        assert parts[0].grad.numpy() == pytest.approx(upstream * inside)
        assert float(parts[1].grad) == pytest.approx((upstream * np.where(inside, n - x / 0.8, n)).sum())


def draws(x: float, count: int, **options: object) -> Tensor:
    many = torch.full((count,), x, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    return concrete_quantize(many, ONE, THIRD, -3, 3, generator=generator, **options)


class TestConcrete:
    @pytest.mark.parametrize("x", [0.0, 0.45, -1.2, 2.9, 5.0])
    def test_hard_samples_follow_the_distribution(self, x):
        found = draws(x, 100_000, hard=True)
        observed = torch.stack([(found == n).sum() for n in range(-3, 4)]).numpy()
        assert observed.sum() == 100_000
        expected = 100_000 * categorical(np.array(x), 1.0, 1 / 3, -3, 3)
        keep = expected >= 5
        rest = observed[~keep].sum(), expected[~keep].sum()
        cells = [*zip(observed[keep], expected[keep], strict=True), *([rest] if rest[1] > 5 else [])]
        seen, meant = np.array(cells).T
        assert stats.chisquare(seen, meant * seen.sum() / meant.sum()).pvalue > 1e-4

    def test_cold_samples_are_grid_points_and_warm_ones_are_not(self):
        cold, warm = draws(0.4, 2000, temperature=1e-3), draws(0.4, 2000, temperature=1.0)
        assert float(((cold - cold.round()).abs() < 1e-3).double().mean()) > 0.99
        assert float(((warm - warm.round()).abs() < 1e-3).double().mean()) < 0.2
        assert torch.equal(cold.round(), draws(0.4, 2000, hard=True))

    def test_its_gradients_are_finite_differences_with_the_same_noise(self):
        x, h = values(20, 2.0), 1e-6

        def run(x: Tensor, alpha: Tensor, sigma: Tensor, **options: object) -> Tensor:
            generator = torch.Generator().manual_seed(3)
            return concrete_quantize(x, alpha, sigma, -2, 2, generator=generator, temperature=0.7, **options)

        for options in ({}, {"delta": 3.0}):
            parts = leaf(x), leaf(0.8), leaf(0.25)
            run(*parts, **options).sum().backward()
            for place, part in enumerate(parts):
                up = [p.detach() + h * (q == place) for q, p in enumerate(parts)]
                down = [p.detach() - h * (q == place) for q, p in enumerate(parts)]
                slope = (run(*up, **options) - run(*down, **options)) / (2 * h)
                expected = slope if place == 0 else slope.sum()
                assert torch.allclose(part.grad, expected, atol=1e-5)

    @pytest.mark.parametrize("kind", ["hard", "forward_mode"])
    def test_straight_through_variants_take_the_relaxed_samples_gradient(self, kind):
        x = values(50, 2.0)
        grads, outs = [], []
        for options in ({}, {kind: True}):
            parts = leaf(x), leaf(0.8), leaf(0.25)
            generator = torch.Generator().manual_seed(3)
            out = concrete_quantize(*parts, -2, 2, generator=generator, **options)
            out.sum().backward()
            grads.append([parts[0].grad, parts[2].grad])
            outs.append(out.detach() / 0.8)
        assert torch.allclose(grads[0][0], grads[1][0])
        assert torch.allclose(grads[0][1], grads[1][1])
        assert torch.allclose(outs[1], outs[1].round(), atol=1e-12)
        if kind == "forward_mode":
            assert outs[1].numpy() == pytest.approx(np.clip(np.rint(x / 0.8), -2, 2))

    def test_the_local_grid_is_the_window_around_the_nearest_point(self):
        """RQ, Eq 6-7, by rejection: the distribution of samples given that they fall into the window."""
        found = draws(0.9, 100_000, hard=True, delta=3.0)
        assert set(found.tolist()) == {0.0, 1.0, 2.0}
        whole = categorical(np.array(0.9), 1.0, 1 / 3, -3, 3)[3:6]
        observed = [int((found == n).sum()) for n in range(3)]
        assert stats.chisquare(observed, 100_000 * whole / whole.sum()).pvalue > 1e-4
        assert set(draws(2.9, 5000, hard=True, delta=3.0).tolist()) == {2.0, 3.0}
        assert set(draws(9.0, 5000, hard=True, delta=6.0).tolist()) <= {1.0, 2.0, 3.0}

    def test_a_window_of_the_whole_grid_changes_nothing(self):
        x = torch.zeros(4000, dtype=torch.float64)
        local = concrete_quantize(
            x, ONE, THIRD, -1, 1, delta=4.0, hard=True, generator=torch.Generator().manual_seed(0)
        )
        whole = concrete_quantize(x, ONE, THIRD, -1, 1, hard=True, generator=torch.Generator().manual_seed(0))
        assert torch.equal(local, whole)

    @pytest.mark.parametrize("x", [0.3, -1.75, 2.5, 3.7])
    def test_uniform_noise_rounds_up_as_often_as_the_distance_from_below(self, x):
        many = torch.full((100_000,), 0.5 * x, dtype=torch.float64)
        found = stochastic_round(many, 0.5 * ONE, -3, 3, generator=torch.Generator().manual_seed(0)) / 0.5
        clipped = min(x, 3.0)
        up = float((found == math.ceil(clipped)).double().mean())
        below = math.floor(clipped)
        assert set(found.tolist()) <= {float(below), float(math.ceil(clipped))}
        assert up == pytest.approx(clipped - below or 1.0, abs=4 * 0.5 / math.sqrt(100_000))

    def test_stochastic_values_are_on_the_grid_exactly(self):
        x = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * 5
        out = stochastic_round(x, torch.tensor(1.0), -3, 3, generator=torch.Generator().manual_seed(1))
        assert torch.equal(out, out.round())

    def test_stochastic_gradients_use_the_sampled_integer(self):
        x = values(200, 4.0)
        parts = leaf(x), leaf(0.8)
        out = stochastic_round(*parts, -3, 3, generator=torch.Generator().manual_seed(1))
        out.sum().backward()
        n, inside = out.detach().numpy() / 0.8, np.abs(x / 0.8) <= 3
        assert parts[0].grad.numpy() == pytest.approx(inside.astype(float))
        assert float(parts[1].grad) == pytest.approx(np.where(inside, n - x / 0.8, n).sum())


QUANTIZERS = {
    "mode": mode_quantize,
    "zero": lambda *parts: mode_quantize(*parts, baseline="zero"),
    "soft": lambda *parts: mode_quantize(*parts, soft=True),
    "rq": concrete_quantize,
    "rq-st": lambda *parts: concrete_quantize(*parts, hard=True),
    "rq-local": lambda *parts: concrete_quantize(*parts, delta=3.0),
    "gumbel": lambda *parts: concrete_quantize(*parts, forward_mode=True),
    "lsq": lambda x, alpha, sigma, *grid: lsq_quantize(x, alpha, *grid),
    "sr": lambda x, alpha, sigma, *grid: stochastic_round(x, alpha, *grid),
}


@pytest.mark.parametrize("name", QUANTIZERS)
class TestExtremes:
    def test_values_far_outside_saturate_without_nan(self, name):
        big = [30.0, 1e4, 1e9, 1e30, 3e38]
        x = torch.tensor([*big, *(-value for value in big)], requires_grad=True)
        alpha, sigma = torch.tensor(0.01, requires_grad=True), torch.tensor(0.001, requires_grad=True)
        out = QUANTIZERS[name](x, alpha, sigma, -3, 3)
        assert (out / 0.01).tolist() == pytest.approx([3.0] * 5 + [-3.0] * 5, abs=0.05)
        out.sum().backward()
        for part in (x, alpha) if name in {"lsq", "sr"} else (x, alpha, sigma):
            assert bool(part.grad.isfinite().all())
        assert float(x.grad.abs().max()) < 1e-3

    def test_nan_stays_nan(self, name):
        out = QUANTIZERS[name](torch.tensor([math.nan, 0.0]), torch.tensor(1.0), torch.tensor(0.3), -3, 3)
        assert bool(out[0].isnan())
        assert not bool(out[1].isnan())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_it_keeps_the_type(self, name, dtype):
        x = torch.linspace(-3, 3, 20, dtype=dtype, requires_grad=True)
        alpha, sigma = (torch.tensor(v, dtype=dtype, requires_grad=True) for v in (0.5, 0.2))
        out = QUANTIZERS[name](x, alpha, sigma, -3, 3)
        out.sum().backward()
        assert (out.dtype, x.grad.dtype, alpha.grad.dtype) == (dtype, dtype, dtype)


def test_single_precision_gradients_are_those_of_double_precision():
    """At the narrowest and widest noise that is allowed, where closed forms could cancel."""
    for ratio, (n_lo, n_hi) in itertools.product((1 / 8, 1 / 2), ((-1, 1), (-127, 127), (0, 255))):
        x = values(2000, 1.2 * max(n_hi, -n_lo))
        found = []
        for dtype in (torch.float32, torch.float64):
            parts = [torch.tensor(v, dtype=dtype, requires_grad=True) for v in (x, 1.0, ratio)]
            mode_quantize(*parts, n_lo, n_hi).sum().backward()
            found.append([part.grad.double() for part in parts])
        same = np.abs(np.abs(x - np.rint(x)) - 0.5) > 1e-3
        assert torch.allclose(found[0][0][same], found[1][0][same], atol=1e-4)
        assert torch.allclose(found[0][1], found[1][1], rtol=1e-3, atol=0.5)
