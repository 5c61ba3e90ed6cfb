"""Perturbed layers and normalisation against hand-written formulas and the specification's table."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from meta_dropout.layers import NOISES, BatchShift, PerturbedHead, PerturbedLayer, UnsupportedLayerError
from meta_dropout.passes import Pass, running
from shared_core.errors import InputError


def named(layer, name="site"):
    layer.name = name
    return layer


@pytest.mark.parametrize(
    ("mean", "plug", "expected", "sd"),
    [
        (-4, 0.018150, 0.029096, 0.035199),
        (-2, 0.126928, 0.182737, 0.177684),
        (0, 0.693147, 0.806059, 0.521071),
        (2, 2.126928, 2.182737, 0.848909),
        (4, 4.018150, 4.029096, 0.972127),
    ],
)
def test_the_gate_has_the_moments_of_a_softplus_of_a_normal(mean, plug, expected, sd):
    layer = named(PerturbedLayer(nn.Linear(1, 1)))
    with torch.no_grad():
        layer.main.weight.fill_(1), layer.main.bias.zero_()
        layer.generator.weight.zero_(), layer.generator.bias.fill_(mean)
    x = torch.ones(1_000_000, 1)
    assert layer(x[:1]).item() == pytest.approx(plug, abs=1e-6)
    with running(Pass(noise={"site": torch.randn(x.shape, generator=torch.Generator().manual_seed(0))})):
        z = layer(x).detach().double().numpy()
    assert abs(z.mean() - expected) < 4 * sd / 1000
    assert abs(z.std() - sd) < 4 * sd / 1000


def test_multiplicative_noise_is_on_the_output_before_anything_else():
    layer = named(PerturbedLayer(nn.Conv2d(2, 3, 3, padding=1)))
    x, eps = torch.randn(4, 2, 5, 5), torch.randn(4, 3, 5, 5)
    mu, mean = layer.main(x), layer.generator(x)
    with running(Pass(noise={"site": eps})):
        assert torch.allclose(layer(x), mu * functional.softplus(mean + eps))
    # Without noise the branch stays on, by the softplus of its mean: not 1, and not the mean of the softplus.
    assert torch.allclose(layer(x), mu * functional.softplus(mean))
    with running(Pass(noise={"another": eps})):
        assert torch.allclose(layer(x), mu * functional.softplus(mean))


def test_a_mean_that_is_known_is_not_computed_again():
    layer = named(PerturbedLayer(nn.Linear(2, 3)))
    x, mean = torch.randn(4, 2), torch.randn(4, 3)
    with running(Pass(means={"site": mean})):
        assert torch.allclose(layer(x), layer.main(x) * functional.softplus(mean))


def test_families_are_their_definitions():
    x, eps = torch.randn(6, 2), torch.randn(6, 3)

    def out(noise, **options):
        torch.manual_seed(0)
        layer = named(PerturbedLayer(nn.Linear(2, 3), noise, **options))
        with running(Pass(noise={"site": eps})):
            noisy = layer(x)
        return layer, layer.main(x), noisy, layer(x)

    layer, mu, noisy, quiet = out("deterministic")
    assert torch.equal(noisy, quiet)
    assert torch.allclose(quiet, mu * functional.softplus(layer.generator(x)))
    layer, mu, noisy, quiet = out("learned-variance")
    assert torch.allclose(
        noisy, mu * functional.softplus(layer.generator(x) + functional.softplus(layer.spread(x)) * eps)
    )
    layer, mu, noisy, quiet = out("fixed")
    assert torch.allclose(noisy, mu * functional.softplus(eps))
    assert torch.allclose(quiet, mu * np.log(2.0))
    layer, mu, noisy, quiet = out("additive")
    assert torch.allclose(noisy, mu + functional.softplus(layer.generator(x)) * eps)
    assert torch.equal(quiet, mu)
    layer, mu, noisy, quiet = out("independent")
    assert torch.allclose(noisy, mu * functional.softplus(layer.level + eps))
    layer, mu, noisy, quiet = out("information")
    s = 0.7 * torch.sigmoid(layer.generator(x))
    assert torch.allclose(noisy, mu * torch.exp(s * eps))
    assert torch.equal(quiet, mu)
    layer, mu, noisy, quiet = out("dropout", rate=0.4)
    assert torch.equal(quiet, mu)
    kept = noisy != 0
    assert torch.allclose(noisy[kept], (mu / 0.6)[kept])
    layer, mu, noisy, quiet = out("none")
    assert torch.equal(noisy, mu)


def test_dropout_drops_its_share():
    layer = named(PerturbedLayer(nn.Linear(1, 1, bias=False), "dropout", rate=0.3))
    x = torch.ones(200_000, 1)
    with running(Pass(noise={"site": torch.randn(x.shape, generator=torch.Generator().manual_seed(0))})):
        assert (layer(x) == 0).double().mean().item() == pytest.approx(0.3, abs=0.005)


def test_weight_noise_is_on_the_weights():
    layer = named(PerturbedLayer(nn.Conv2d(2, 3, 3, padding=1), "weight"))
    x, eps = torch.randn(4, 2, 5, 5), torch.randn(3, 2, 3, 3)
    with running(Pass(noise={"site": eps})):
        weight = layer.main.weight + functional.softplus(layer.scale) * eps
        assert torch.allclose(layer(x), functional.conv2d(x, weight, layer.main.bias, padding=1))


def test_the_penalty_of_information_dropout_is_of_the_noise_it_makes():
    layer = named(PerturbedLayer(nn.Linear(2, 3), "information"))
    x, paid = torch.randn(6, 2), []
    with running(Pass(penalties=paid)):
        layer(x)
    s = 0.7 * torch.sigmoid(layer.generator(x))
    assert torch.allclose(paid[0], -torch.log(s / 0.7).mean())


def test_head_noise_is_one_scalar_a_row_whatever_the_order_of_classes():
    head = named(PerturbedHead(nn.Linear(7, 5)))
    h, eps = torch.randn(6, 7), torch.randn(6, 5)
    with running(Pass(noise={"site": eps})):
        noisy = head(h)
    s = functional.softplus(head.generator(h))
    assert s.shape == (6, 1)
    assert torch.allclose(noisy, head.main(h) + s * eps)
    assert torch.equal(head(h), head.main(h))
    order = torch.tensor([2, 0, 4, 1, 3])
    with torch.no_grad():
        head.main.weight.copy_(head.main.weight[order]), head.main.bias.copy_(head.main.bias[order])
    with running(Pass(noise={"site": eps[:, order]})):
        assert torch.allclose(head(h), noisy[:, order], atol=1e-6)


def test_the_bottleneck_head_pays_for_the_divergence_of_its_code():
    head = named(PerturbedHead(nn.Linear(4, 3), "vib"))
    h, paid = torch.randn(50, 4), []
    with running(Pass(penalties=paid)):
        quiet = head(h)
    mean, raw = head.code(h).chunk(2, dim=-1)
    q = torch.distributions.Normal(mean, functional.softplus(raw - 2))
    p = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    assert torch.allclose(paid[0], torch.distributions.kl_divergence(q, p).sum(-1).mean(), rtol=1e-4)
    assert torch.allclose(quiet, head.main(mean))


def test_batch_shift_is_torchs_normalisation_without_scale():
    norm, reference = named(BatchShift(3)), nn.BatchNorm2d(3, eps=1e-3, affine=False, track_running_stats=False)
    x = 3 + 2 * torch.randn(4, 3, 5, 5)
    assert torch.allclose(norm(x), reference(x), atol=1e-5)
    with torch.no_grad():
        norm.shift.fill_(0.5)
    assert torch.allclose(norm(x), reference(x) + 0.5, atol=1e-5)
    kept: dict = {}
    with running(Pass(record=kept)):
        norm(x)
    mean, variance = kept["site"]
    assert torch.allclose(variance, x.var((0, 2, 3), unbiased=False), atol=1e-4)
    with running(Pass(statistics={"site": (mean, variance)})):
        assert torch.allclose(norm(x[:1]), norm(x)[:1] if False else ((x[:1] - mean[:, None, None])
                              * torch.rsqrt(variance + 1e-3)[:, None, None] + 0.5), atol=1e-5)  # fmt: skip


def test_mixing_is_of_inputs():
    layer = named(PerturbedLayer(nn.Linear(2, 3), "none"))
    x, partner = torch.randn(4, 2), torch.tensor([1, 0, 3, 2])
    with running(Pass(mix={"site": (torch.tensor(0.3), partner)})):
        assert torch.allclose(layer(x), layer.main(0.3 * x + 0.7 * x[partner]))


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_perturbed_is_refused():
    with pytest.raises(UnsupportedLayerError, match="cannot perturb a LSTM"):
        PerturbedLayer(nn.LSTM(2, 3))
    with pytest.raises(InputError, match="'louder' is not one of none, multiplicative"):
        PerturbedLayer(nn.Linear(2, 3), "louder")
    with pytest.raises(InputError, match="rate: must be in"):
        PerturbedLayer(nn.Linear(2, 3), "dropout", rate=1.0)
    assert len(set(NOISES)) == 12
