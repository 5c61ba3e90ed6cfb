from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from stamp.sampling import (
    bernoulli_kl,
    concrete,
    kumaraswamy_kl,
    kumaraswamy_mean,
    kumaraswamy_sample,
    safe_probability,
    safe_uniform,
)

DRAWS = 100_000


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("temperature", [0.05, 0.1, 0.67, 2.0])
@pytest.mark.parametrize("pi", [0.02, 0.3, 0.5, 0.9])
def test_a_gate_exceeds_one_half_with_its_probability_at_every_temperature(temperature, pi):
    gates = concrete(torch.full((DRAWS,), pi), temperature, generator(7))
    sigma = math.sqrt(pi * (1 - pi) / DRAWS)
    assert abs(float((gates > 0.5).double().mean()) - pi) <= 4 * sigma
    assert 0 <= float(gates.min()) <= float(gates.max()) <= 1


@pytest.mark.parametrize(("temperature", "mean"), [(0.67, 0.338), (2.0, 0.410)])
def test_the_mean_of_a_gate_is_not_its_probability(temperature, mean):
    gates = concrete(torch.full((DRAWS,), 0.3, dtype=torch.float64), temperature, generator())
    assert float(gates.mean()) == pytest.approx(mean, abs=4 * float(gates.std()) / math.sqrt(DRAWS) + 5e-4)


def test_gates_gather_at_zero_and_one_as_the_temperature_falls():
    pi = torch.full((2000,), 0.4)
    between = [
        float(z.minimum(1 - z).mean()) for z in (concrete(pi, tau, generator()) for tau in (2.0, 0.67, 0.1, 0.01))
    ]
    assert between == sorted(between, reverse=True)
    assert between[-1] < 0.01


def test_hard_gates_are_zero_or_one_with_the_gradient_of_the_soft_ones():
    pi = torch.rand(500, generator=generator(1)).requires_grad_()
    soft, hard = concrete(pi, 0.5, generator(3)), concrete(pi, 0.5, generator(3), hard=True)
    assert set(hard.tolist()) == {0.0, 1.0}
    assert torch.equal(hard, soft.round())
    weight = torch.randn(500, generator=generator(2))
    assert torch.equal(*(torch.autograd.grad((weight * z).sum(), pi)[0] for z in (soft, hard)))


def test_nothing_overflows_at_the_ends():
    ends = torch.tensor([0.0, 1e-12, 1 - 1e-7, 1.0], requires_grad=True)
    gates = concrete(ends, 0.01, generator())
    kl = bernoulli_kl(ends, 0.1)
    assert torch.isfinite(torch.cat([gates, *torch.autograd.grad(gates.sum() + kl, ends), kl[None]])).all()
    assert torch.isfinite(safe_probability(ends).logit()).all()
    uniform = safe_uniform(torch.empty(DRAWS * 5), generator())
    assert torch.isfinite(uniform.logit()).all()
    extreme = torch.tensor([4.5e-5, 50.0, 4.5e-5, 50.0]), torch.tensor([4.5e-5, 4.5e-5, 50.0, 50.0])
    a, b = (x.requires_grad_() for x in extreme)
    values = [kumaraswamy_sample(a, b, generator()), kumaraswamy_mean(a, b), kumaraswamy_kl(a, b, 1e-4)[None]]
    assert torch.isfinite(torch.cat(values)).all()
    assert all(torch.isfinite(slope).all() for slope in torch.autograd.grad(torch.cat(values).sum(), (a, b)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_half_precision_is_widened_also_under_autocast(dtype):
    half = torch.full((8,), 0.5, dtype=dtype)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = [
            concrete(half, 0.1, generator()),
            concrete(half, 0.1, generator(), hard=True),
            bernoulli_kl(half, 0.1),
            kumaraswamy_sample(half, half, generator()),
            kumaraswamy_mean(half, half),
            kumaraswamy_kl(half, half, 0.1),
        ]
    assert {x.dtype for x in made} == {wanted}


def test_bernoulli_divergence_is_zero_at_the_prior_only_and_agrees_with_torch():
    for rho in (0.1, 0.25, 0.9):
        pi = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
        own = torch.stack([bernoulli_kl(p[None], rho) for p in pi])
        p, q = (torch.distributions.Bernoulli(probs=x) for x in (pi, torch.full_like(pi, rho)))
        assert torch.allclose(own, torch.distributions.kl_divergence(p, q), atol=1e-12)
        assert float(bernoulli_kl(torch.full((3,), rho, dtype=torch.float64), rho)) == pytest.approx(0, abs=1e-14)
        assert bool((own[(pi - rho).abs() > 1e-3] > 0).all())
        assert float(bernoulli_kl(pi, rho)) == pytest.approx(float(own.sum()))


@pytest.mark.parametrize(("a", "b", "alpha"), [(0.7, 2.3, 0.1), (2.0, 0.5, 0.5), (0.3133, 1.0, 1e-4), (5.0, 3.0, 2.0)])
def test_kumaraswamy_against_monte_carlo_and_its_density(a, b, alpha):
    wide = torch.full((DRAWS,), a, dtype=torch.float64), torch.full((DRAWS,), b, dtype=torch.float64)
    drawn = kumaraswamy_sample(*wide, generator(11))
    assert stats.kstest(drawn.numpy(), lambda x: 1 - (1 - x**a) ** b).pvalue > 1e-4
    error = float(drawn.std()) / math.sqrt(DRAWS)
    one = [torch.tensor([value], dtype=torch.float64) for value in (a, b)]
    assert float(kumaraswamy_mean(*one)) == pytest.approx(float(drawn.mean()), abs=5 * error)

    log_ratio = math.log(a * b / alpha) + (a - alpha) * drawn.log() + (b - 1) * torch.log1p(-(drawn**a))
    error = float(log_ratio.std()) / math.sqrt(DRAWS)
    assert float(kumaraswamy_kl(*one, alpha)) == pytest.approx(float(log_ratio.mean()), abs=5 * error)


def test_constants_and_limits():
    a, b = torch.tensor([0.7]), torch.tensor([2.3])
    assert float(kumaraswamy_kl(a, b, 0.1)) == pytest.approx(0.83185, abs=5e-6)
    assert float(kumaraswamy_mean(a, b)) == pytest.approx(0.21124, abs=5e-6)
    ones = torch.ones(4)
    assert float(kumaraswamy_kl(0.3 * ones, ones, 0.3)) == pytest.approx(0, abs=1e-6)
    assert float(kumaraswamy_kl(ones * 0.7, ones * 2.3, 0.1)) == pytest.approx(4 * 0.83185, abs=5e-5)
    small = torch.tensor([4.5398e-5])
    assert float(kumaraswamy_mean(small, torch.ones(1))) == pytest.approx(4.5398e-5 / (1 + 4.5398e-5), rel=1e-6)


def test_gradients():
    pi = torch.tensor([0.05, 0.3, 0.8], dtype=torch.float64, requires_grad=True)
    a = torch.tensor([0.4, 0.7, 3.0], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([0.6, 2.3, 8.0], dtype=torch.float64, requires_grad=True)
    check = torch.autograd.gradcheck
    assert check(lambda p: concrete(p, 0.67, generator()), pi)
    assert check(lambda p: bernoulli_kl(p, 0.1), pi)
    assert check(lambda x, y: kumaraswamy_sample(x, y, generator()), (a, b))
    assert check(kumaraswamy_mean, (a, b))
    assert check(lambda x, y: kumaraswamy_kl(x, y, 1e-2), (a, b))


def test_draws_depend_on_the_generator_alone():
    pi = torch.full((50,), 0.3)
    assert torch.equal(concrete(pi, 0.5, generator(4)), concrete(pi, 0.5, generator(4)))
    assert not torch.equal(concrete(pi, 0.5, generator(4)), concrete(pi, 0.5, generator(5)))


def test_impossible_parameters_are_refused():
    pi = torch.full((2,), 0.5)
    with pytest.raises(ValueError, match=r"temperature=0.0 must be above 0"):
        concrete(pi, 0.0, generator())
    with pytest.raises(ValueError, match=r"prior=1.0 must be in \(0, 1\)"):
        bernoulli_kl(pi, 1.0)
    with pytest.raises(ValueError, match=r"alpha=-1.0 must be above 0"):
        kumaraswamy_kl(pi, pi, -1.0)
