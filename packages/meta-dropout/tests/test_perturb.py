"""Wrapping modules: parameter counts of the paper's networks, roles, sites, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from meta_dropout.backbones import conv4, mlp
from meta_dropout.layers import BatchShift, UnsupportedLayerError
from meta_dropout.passes import Pass
from meta_dropout.perturb import Perturbed
from shared_core.errors import InputError


@pytest.mark.parametrize(
    ("network", "counts"),
    [
        ({"ways": 20}, (112_724, 111_489, 256)),
        ({"ways": 5, "channels": 3, "size": 84, "filters": 32}, (32_645, 29_441, 128)),
    ],
)
def test_parameters_are_as_many_as_in_the_papers_networks(network, counts):
    model = Perturbed(conv4(**network))
    assert tuple(sum(p.numel() for p in model.role(role).values()) for role in ("theta", "phi", "norm")) == counts
    plain = Perturbed(conv4(**network), noise="none")
    assert [sum(p.numel() for p in plain.role(role).values()) for role in ("theta", "phi")] == [counts[0], 0]


def test_initial_weights_are_those_of_the_released_code():
    model = Perturbed(conv4(ways=20, seed=3), seed=4)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == 0).all(), name
        elif parameter.dim() == 4:
            assert parameter.abs().max() <= 0.04
            assert parameter.std().item() == pytest.approx(0.0176, rel=0.1), name
    assert not torch.equal(model.module[0].main.weight, model.module[0].generator.weight)
    assert not torch.equal(model.module[4].generator.weight, model.module[8].generator.weight)


def test_a_softplus_of_one_everywhere_is_the_plain_network():
    net = conv4(ways=5, size=20, filters=8)
    model, plain = Perturbed(net), Perturbed(net, noise="none")
    with torch.no_grad():
        for name, parameter in model.role("phi").items():
            parameter.fill_(float(torch.log(torch.tensor(torch.e) - 1)) if name.endswith("bias") else 0.0)
    x = torch.rand(6, 1, 20, 20)
    assert torch.allclose(model(x), plain(x), atol=1e-6)


def test_the_module_given_is_left_alone_and_its_weights_are_taken_over():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 3))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    model = Perturbed(net)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net[2].inplace
    assert not model.module[2].inplace
    assert isinstance(model.module[1], BatchShift)
    assert torch.equal(model.module[0].main.weight, net[0].weight)


def test_sites_say_where():
    net = mlp(inputs=4, outputs=3, hidden=(8, 8))
    model = Perturbed(net, sites=["2"])
    assert {name.split(".")[1] for name in model.role("phi")} == {"2"}
    assert set(model.prepare(torch.randn(5, 4))) == {"2"}
    assert Perturbed(net).prepare(torch.randn(5, 4)) == {"0": (5, 8), "2": (5, 8), "4": (5, 3)}
    assert Perturbed(net).data_sites(torch.randn(5, 4)) == ("0",)
    assert Perturbed(nn.Linear(4, 3)).prepare(torch.randn(5, 4)) == {"": (5, 3)}


def test_levels_of_independent_noise_take_the_shape_of_the_layers_output():
    model = Perturbed(conv4(ways=5, size=20, filters=8), noise="independent")
    model.prepare(torch.rand(2, 1, 20, 20))
    assert model.module[0].level.shape == (8, 20, 20)
    before = model.module[0].level
    model.prepare(torch.rand(3, 1, 20, 20))
    assert model.module[0].level is before


def test_calls_with_other_parameters_leave_the_model_alone():
    model = Perturbed(mlp(inputs=2, outputs=2))
    x = torch.randn(3, 2)
    before = model(x)
    other = {name: p + 1 for name, p in model.named_parameters()}
    assert not torch.allclose(model.call(other, x, Pass()), before)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sites": ["1"]}, "cannot perturb '1', it is a ReLU; Conv1d, Conv2d and Linear layers here: 0, 2, 4"),
        ({"sites": ["nine"]}, "cannot perturb 'nine', there is no such layer"),
        ({"head": "1"}, "'1' is no Linear layer of the module; there are: 0, 2, 4"),
    ],
)
def test_sites_that_are_none_are_named(options, message):
    with pytest.raises(UnsupportedLayerError, match=message):
        Perturbed(mlp(inputs=2, outputs=2), **options)


def test_layers_that_cannot_be_batched_over_tasks_are_named_with_the_way_out():
    with pytest.raises(UnsupportedLayerError, match=r"'1' is a BatchNorm1d: .* use normalise='replace'"):
        Perturbed(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), normalise="refuse")
    with pytest.raises(UnsupportedLayerError, match="'1' is a Dropout: it draws from the global generator"):
        Perturbed(nn.Sequential(nn.Linear(2, 2), nn.Dropout()))


def test_images_too_small_for_the_blocks_are_refused_by_the_block():
    with pytest.raises(InputError, match="images of 12 pixels are 1 before block 4 of 4"):
        conv4(ways=5, size=12)
