"""Backbones and their roles, against ``torch.nn.functional`` and networks written out."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from bayes_taml import networks
from bayes_taml.networks import (
    BackboneNotice,
    BatchStatistics,
    Block,
    Modulated,
    Pass,
    StatefulNormError,
    conv_features,
    mlp_features,
    running,
)
from shared_core.errors import InputError


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shaken(module: nn.Module) -> nn.Module:
    """No parameter at a value where it would not show."""
    random = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=random))
    return module


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 5), (6, 3, 4, 2)])
@pytest.mark.parametrize("scale", [False, True])
def test_normalisation_is_torchs_in_training(shape, scale):
    norm = shaken(BatchStatistics(3, scale=scale))
    x = drawn(*shape) * 2 + 1
    expected = functional.batch_norm(x, None, None, norm.weight, norm.bias, training=True, eps=1e-3)
    torch.testing.assert_close(norm(x), expected)
    norm.eval()
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 4, 2)])
def test_padding_does_not_enter_statistics(shape):
    norm, x = shaken(BatchStatistics(3)), drawn(*shape)
    mask = torch.tensor([True, False, True, True, False, True])
    alone = norm(x[mask])
    filled = x.clone()
    filled[~mask] = 1e6
    with running(Pass(mask=mask)):
        torch.testing.assert_close(norm(filled)[mask], alone)
    torch.testing.assert_close(norm(x[mask]), alone)
    assert not torch.allclose(norm(filled)[mask], alone)


def test_statistics_are_recorded_and_can_be_given_back():
    norm, x, other = shaken(BatchStatistics(3)), drawn(6, 3), drawn(4, 3, seed=1)
    norm.name = "here"
    record = {}
    with running(Pass(record=record)):
        norm(x)
    mean, variance = record["here"]
    torch.testing.assert_close(mean, x.mean(0))
    torch.testing.assert_close(variance, x.var(0, correction=0))
    with running(Pass(statistics=record)):
        found = norm(other)
    torch.testing.assert_close(found, (other - x.mean(0)) / (x.var(0, correction=0) + 1e-3).sqrt() + norm.bias)


def slow_block(block: Block, x):
    """In the paper's order: convolution, norm, ReLU, pooling."""
    y = functional.conv2d(x, block.conv.weight, block.conv.bias, padding=1)
    norm = block.norm
    if isinstance(norm, nn.GroupNorm):
        y = functional.group_norm(y, norm.num_groups, norm.weight, norm.bias)
    else:
        y = functional.batch_norm(y, None, None, norm.weight, norm.bias, training=True, eps=1e-3)
    return functional.max_pool2d(y.relu(), 2)


@pytest.mark.parametrize("norm", ["batch", "film", "group"])
def test_a_block_may_pool_before_it_normalises(norm):
    block = shaken(Block(2, 4, norm))
    if norm == "film":
        with torch.no_grad():
            block.norm.weight[0] = -1.0
    x = drawn(3, 2, 9, 8)
    torch.testing.assert_close(block(x), slow_block(block, x))


def derivatives(make, leaves):
    """Value, gradients of a sum of squares, and gradients of the sum of their squares."""
    made = make()
    first = torch.autograd.grad(made.square().sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(v.square().sum() for v in first), leaves)
    return [made, *first, *second]


@pytest.mark.parametrize("shape", [(5, 1, 8, 8), (5, 2, 7, 9), (3, 1, 4, 300), (2, 3, 6, 6)])
def test_a_block_by_hand_is_torchs_to_the_second_derivative(shape, monkeypatch):
    """Equal neighbours are no exception: the first of them takes the gradient, as torch has it."""
    monkeypatch.setattr(networks, "_LARGE", 0)
    block = shaken(Block(shape[1], 4))
    # Few values, so that most windows hold equal ones, and a corner without any difference.
    x = drawn(*shape).round()
    x[..., :4, :4] = 0
    x.requires_grad_()
    leaves = [x, block.conv.weight, block.conv.bias]
    with running(Pass(alone=True)):
        y = networks._convolution(block.conv, x)
        found = derivatives(lambda: networks._pool(networks._convolution(block.conv, x)), leaves)
        whole = derivatives(lambda: block(x), leaves)
        pooled = derivatives(lambda: networks._pool(x), [x])
    weight, bias = leaves[1:]
    expected = derivatives(lambda: functional.max_pool2d(functional.conv2d(x, weight, bias, padding=1), 2), leaves)
    assert y.shape == (shape[0], 4, *shape[2:])
    for a, b in zip(pooled, derivatives(lambda: functional.max_pool2d(x, 2), [x]), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    for a, b in zip(whole, derivatives(lambda: block(x), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_the_backbone_is_the_papers():
    net = conv_features(channels=3, size=84)
    assert net(torch.rand(2, 3, 84, 84)).shape == (2, 800)
    assert [tuple(p.shape) for n, p in net.named_parameters() if n.startswith("conv2.")] == [
        (32, 32, 3, 3), (32,), (32,)]  # fmt: skip
    model = Modulated(conv_features(channels=3, size=32), (3, 32, 32))
    assert (model.features, len(model.layers), model.modulated) == (128, 4, 256)
    assert not [name for name in model.theta if "norm" in name]
    for name, p in net.named_parameters():
        assert p.abs().max() <= 0.04 if name.endswith("conv.weight") else not p.any()
    again, other = conv_features(channels=3, size=84), conv_features(channels=3, size=84, seed=1)
    assert torch.equal(net[0].conv.weight, again[0].conv.weight)
    assert not torch.equal(net[0].conv.weight, other[0].conv.weight)
    with pytest.raises(InputError, match="use at least 16 pixels or fewer blocks"):
        conv_features(size=15)


def test_modulation_is_by_output_channel():
    """Three channels in and three out: along the wrong axis it would broadcast without an error."""
    model = Modulated(shaken(conv_features(channels=3, size=4, filters=3, blocks=2)), (3, 4, 4))
    assert model.gains == ("conv1.conv.weight", "conv2.conv.weight")
    assert model.shifts == ("conv1.conv.bias", "conv2.conv.bias")
    z, parameters = drawn(2, 12), dict(model.backbone.named_parameters())
    found = model.modulate(parameters, z)
    for task in range(2):
        for layer in range(2):
            for k in range(3):
                weight, bias = f"conv{layer + 1}.conv.weight", f"conv{layer + 1}.conv.bias"
                gain, shift = 1 + z[task, 3 * layer + k], z[task, 6 + 3 * layer + k]
                torch.testing.assert_close(found[weight][task, k], parameters[weight][k] * gain)
                torch.testing.assert_close(found[bias][task, k], parameters[bias][k] + shift)


def test_film_modulates_scales_and_shifts_of_the_normalisation():
    model = Modulated(conv_features(size=4, filters=3, blocks=2, norm="film"), (1, 4, 4))
    assert model.gains == ("conv1.norm.weight", "conv2.norm.weight")
    assert model.shifts == ("conv1.norm.bias", "conv2.norm.bias")
    assert model.theta == ("conv1.conv.weight", "conv1.conv.bias", "conv2.conv.weight", "conv2.conv.bias")


def test_layers_are_submodules_or_what_one_says():
    def net():
        return nn.ModuleDict({"a": mlp_features(inputs=2, hidden=(3, 3)), "b": nn.Linear(3, 4)})

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts, self.own = net(), nn.Parameter(torch.ones(4))

        def forward(self, x):
            return self.parts["b"](self.parts["a"](x)) * self.own

    names = ("own", "parts.a.0.weight", "parts.a.0.bias", "parts.a.2.weight", "parts.a.2.bias", "parts.b.weight",
             "parts.b.bias")  # fmt: skip
    default = Modulated(Two(), (2,))
    assert default.theta == names
    assert default.layers == ("own", "parts")
    assert [default.layer_of[name] for name in names] == [0, 1, 1, 1, 1, 1, 1]
    called = Modulated(Two(), (2,), groups=lambda name: "weights" if name.endswith("weight") else "rest")
    assert called.layers == ("rest", "weights")
    assert [called.layer_of[name] for name in names] == [0, 1, 0, 1, 0, 1, 0]
    given = Modulated(Two(), (2,), groups={"early": names[:3], "late": names[3:]})
    assert given.layers == ("early", "late")
    with pytest.raises(InputError, match=r"no layer has the parameter 'parts.b.bias'"):
        Modulated(Two(), (2,), groups={"all": names[:-1]})


def common(*, inplace=False, drop=False) -> nn.Sequential:
    layers = [nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(inplace=inplace)]
    layers += [nn.Dropout(0.5)] if drop else []
    return shaken(nn.Sequential(*layers, nn.Flatten(), nn.Linear(48, 5), nn.BatchNorm1d(5, affine=False)))


def test_batch_norms_are_replaced_with_a_notice():
    net = common()
    plain = copy.deepcopy(net).train()
    with pytest.warns(BackboneNotice) as told:
        model = Modulated(net, (1, 4, 4))
    assert [str(w.message).split(" now ")[0] for w in told] == ["1: BatchNorm2d", "5: BatchNorm1d"]
    x = drawn(7, 1, 4, 4)
    parameters = dict(model.backbone.named_parameters())
    assert all(p.dtype == torch.float64 for p in parameters.values())
    torch.testing.assert_close(model.call(parameters, x, Pass()), plain(x))
    net.eval()
    torch.testing.assert_close(model.call(parameters, x, Pass()), plain(x))
    assert model.theta == ("0.weight", "0.bias", "4.weight", "4.bias")


def test_a_replacement_keeps_the_precision_of_the_network():
    net = common()
    torch.set_default_dtype(torch.float32)
    with pytest.warns(BackboneNotice):
        model = Modulated(net, (1, 4, 4))
    assert {p.dtype for p in model.backbone.parameters()} == {torch.float64}


def test_running_statistics_can_be_refused_instead():
    with pytest.raises(StatefulNormError, match=r"1: BatchNorm2d keeps running statistics.*use GroupNorm or LayerNorm"):
        Modulated(common(), (1, 4, 4), norm="keep")
    with pytest.raises(StatefulNormError, match="a batch norm and nothing else"):
        Modulated(nn.BatchNorm1d(4), (4,))
    group = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.LayerNorm(16))
    assert Modulated(group, (1, 4, 4), norm="keep").features == 16


def test_dropout_is_left_out_with_a_notice():
    with pytest.warns(BackboneNotice) as told:
        model = Modulated(common(drop=True), (1, 4, 4))
    assert "3: Dropout is left out" in [str(w.message) for w in told]
    x, parameters = drawn(5, 1, 4, 4), dict(model.backbone.named_parameters())
    assert torch.equal(model.call(parameters, x, Pass()), model.call(parameters, x, Pass()))


def test_layers_that_write_in_place_work_with_many_tasks_at_once():
    with pytest.warns(BackboneNotice):
        model = Modulated(common(inplace=True), (1, 4, 4))
    with pytest.warns(BackboneNotice):
        plain = Modulated(common(), (1, 4, 4))
    x, parameters = drawn(2, 5, 1, 4, 4), dict(model.backbone.named_parameters())
    many = {name: torch.stack([p, 2 * p]) for name, p in parameters.items()}
    found = torch.vmap(lambda p, x: model.call(p, x, Pass()))(many, x)
    for task in range(2):
        own = {name: p[task] for name, p in many.items()}
        torch.testing.assert_close(found[task], plain.call(own, x[task], Pass()))


def test_calling_with_other_parameters_leaves_the_network_as_it_is():
    model = Modulated(mlp_features(inputs=3, hidden=(4,)), (3,))
    before = copy.deepcopy(model.backbone.state_dict())
    other = {name: p + 1 for name, p in model.backbone.named_parameters()}
    x = drawn(2, 3)
    expected = functional.linear(x, other["0.weight"], other["0.bias"]).relu()
    torch.testing.assert_close(model.call(other, x, Pass()), expected)
    assert all(torch.equal(before[name], p) for name, p in model.backbone.state_dict().items())


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (nn.Conv2d(1, 2, 3), r"features \(n, F\); 2 rows gave \(2, 2, 2, 2\)"),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(0)), r"2 rows gave \(16,\)"),
        (nn.Linear(7, 2), r"fails on rows of shape \(1, 4, 4\)"),
        (nn.Flatten(), "no parameters that could be adapted"),
    ],
)
def test_a_module_that_gives_no_features_is_refused(net, message):
    with pytest.raises(InputError, match=message):
        Modulated(net, (1, 4, 4))


def test_the_work_of_a_row_is_counted():
    assert Modulated(nn.Linear(10, 4), (10,)).work == 40
    assert Modulated(conv_features(size=8, filters=3, blocks=1), (1, 8, 8)).work == 8 * 8 * 9 * 3


@pytest.mark.parametrize("shape", [(4, 3), (5, 3, 2, 3)])
def test_moments_have_first_and_second_gradients(shape):
    x = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    moments = networks._Moments.apply
    assert torch.autograd.gradcheck(moments, (x,))
    assert torch.autograd.gradgradcheck(moments, (x,))
    axes = (0, *range(2, x.dim()))
    variance, mean = torch.var_mean(x, axes, correction=0)
    for found, expected in zip(moments(x), (mean, variance), strict=True):
        torch.testing.assert_close(found, expected)
    many = torch.stack([x, 2 * x]).detach().requires_grad_()
    assert torch.autograd.gradgradcheck(torch.vmap(moments), (many,))
