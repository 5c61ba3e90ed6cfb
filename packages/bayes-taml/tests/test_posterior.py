"""The balancing variables as Gaussians, against ``torch.distributions`` and sums written out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from bayes_taml.posterior import GAMMA_BOUND, Latents, Posterior, gaussian_kl

SIZES = {"omega": 3, "gamma": 4, "z": 6}


def posterior(tasks=2, seed=0, names=("omega", "gamma", "z")) -> Posterior:
    random = torch.Generator().manual_seed(seed)
    mean, raw = (
        {name: torch.randn(tasks, SIZES[name], generator=random, dtype=torch.float64) for name in names}
        for _ in range(2)
    )
    return Posterior(mean, raw)


@settings(deadline=None, max_examples=50)
@given(st.floats(-20, 20), st.floats(-8, 30))
def test_divergence_is_that_of_torch_distributions(mean, raw):
    mean, raw = (torch.tensor([v], dtype=torch.float64) for v in (mean, raw))
    scale = torch.nn.functional.softplus(raw) + 1e-6
    expected = kl_divergence(Normal(mean, scale), Normal(torch.zeros_like(mean), 1.0))
    torch.testing.assert_close(gaussian_kl(mean, raw), expected, rtol=1e-10, atol=1e-10)


def test_divergence_is_zero_at_the_prior_and_nowhere_else():
    prior = torch.tensor([math.log(math.e - 1)], dtype=torch.float64)
    assert gaussian_kl(torch.zeros(1, dtype=torch.float64), prior).abs().item() < 1e-11
    assert gaussian_kl(torch.zeros(1, dtype=torch.float64), prior + 0.1).item() > 1e-3
    assert gaussian_kl(torch.full((1,), -0.1, dtype=torch.float64), prior).item() == pytest.approx(0.005, rel=1e-3)


def test_a_deviation_of_almost_nothing_has_a_finite_divergence_and_gradient():
    raw = torch.tensor([-1000.0, 1000.0], requires_grad=True)
    found = gaussian_kl(torch.zeros(2), raw)
    found.sum().backward()
    assert torch.isfinite(found).all()
    assert torch.isfinite(raw.grad).all()


def test_divergences_are_summed_over_scalars_of_the_variables_that_are_on():
    for names in (("omega",), ("gamma", "z"), ("omega", "gamma", "z")):
        made = posterior(names=names)
        expected = sum(
            kl_divergence(Normal(made.mean[name], made.deviation[name]), Normal(0.0, 1.0)).sum(1) for name in names
        )
        torch.testing.assert_close(made.kl(), expected)
        torch.testing.assert_close(sum(made.kl_by_variable().values()), expected)
        assert list(made.kl_by_variable()) == list(names)


def test_samples_are_reparameterised():
    made = posterior(names=("omega", "gamma"))
    for leaf in (*made.mean.values(), *made.raw.values()):
        leaf.requires_grad_()
    noise = made.draw([4, 5])
    found = made.sample(noise)
    found.gamma.sum().backward()
    assert torch.equal(made.mean["gamma"].grad, torch.ones(2, 4, dtype=torch.float64))
    torch.testing.assert_close(made.raw["gamma"].grad, noise["gamma"] * torch.sigmoid(made.raw["gamma"]))
    assert made.mean["omega"].grad is None
    torch.testing.assert_close(found.omega, made.mean["omega"] + made.deviation["omega"] * noise["omega"])
    assert found.z is None
    assert all(torch.equal(made.at_mean().values()[name], made.mean[name]) for name in ("omega", "gamma"))


def test_noise_is_a_tasks_own_and_standard_normal():
    made = posterior(tasks=3)
    first, again = made.draw([7, 8, 9]), posterior(tasks=2).draw([9, 7])
    for name in SIZES:
        assert torch.equal(first[name][[2, 0]], again[name])
    many = Posterior({"z": torch.zeros(2000, 5)}, {"z": torch.zeros(2000, 5)}).draw(range(2000))["z"]
    assert many.dtype == torch.float32
    assert many.mean().abs() < 0.04
    assert (many.std() - 1).abs() < 0.03
    torch.testing.assert_close(torch.corrcoef(many.T), torch.eye(5), atol=0.1, rtol=0)


def test_multipliers_are_held_within_their_bounds_and_counted():
    gamma = torch.tensor([[0.0, 5.0, -9.0], [4.6, -4.6, 1.0]])
    omega, z = torch.full((2, 2), 50.0), torch.full((2, 1), 50.0)
    found, held = Latents(omega, gamma, z).bounded()
    assert math.exp(GAMMA_BOUND) == pytest.approx(100)
    torch.testing.assert_close(found.gamma.exp()[0], torch.tensor([1.0, 100.0, 0.01]))
    assert torch.equal(found.gamma[1], gamma[1])
    assert held.tolist() == [2, 0]
    assert torch.equal(found.omega, omega)
    assert torch.equal(found.z, z)


def test_latents_without_multipliers_hold_none():
    assert Latents(omega=torch.zeros(3, 2)).bounded()[1].tolist() == [0, 0, 0]
    nothing, held = Latents().bounded()
    assert nothing.values() == {}
    assert held.sum() == 0


def test_latents_of_some_tasks_and_of_repeated_ones():
    made = posterior(tasks=3).at_mean()
    part, many = made.part(torch.tensor([2, 0])), made.repeated(2)
    for name in SIZES:
        whole = made.values()[name]
        assert torch.equal(part.values()[name], whole[[2, 0]])
        assert torch.equal(many.values()[name], whole[[0, 0, 1, 1, 2, 2]])
