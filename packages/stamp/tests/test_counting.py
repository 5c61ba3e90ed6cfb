from __future__ import annotations

import itertools

import pytest
import torch
import zoo
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from stamp.attention import NarrowAttention
from stamp.counting import CostModel, macs, parameters
from stamp.groups import GroupsError, trace
from stamp.surgery import cut


def counted(model, x) -> float:
    """Multiply-adds by torch's own counter, without attention's products of activations."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    products = ("bmm", "attention")
    return (
        sum(n for op, n in counter.get_flop_counts()["Global"].items() if not any(p in str(op) for p in products)) / 2
    )


@pytest.mark.parametrize("name", [name for name in zoo.ZOO if name not in {"vit-torch", "vit-norm-free", "encoder"}])
def test_macs_and_parameters_equal_torchs_counter_before_and_after_the_cut(name):
    model, x, groups = zoo.traced(name)
    keep = zoo.random_keep(groups, 3)
    small = cut(model, groups, keep)
    cost = CostModel.macs(model, groups, x)
    assert macs(model, x) == counted(model, x) == cost.exact({})
    assert macs(small, x) == counted(small, x) == cost.exact(keep)
    size = CostModel.parameters(model, groups)
    assert (size.exact({}), size.exact(keep)) == (parameters(model), parameters(small))


@pytest.mark.parametrize("name", ["vit-torch", "vit-norm-free", "encoder"])
def test_macs_of_torchs_attention_are_those_of_its_projections(name):
    model, x, groups = zoo.traced(name)
    keep = zoo.random_keep(groups, 3)
    small = cut(model, groups, keep)
    cost = CostModel.macs(model, groups, x)
    assert macs(model, x) == cost.exact({})
    assert macs(small, x) == cost.exact(keep)
    assert CostModel.parameters(model, groups).exact(keep) == parameters(small)


def test_an_attention_counts_alike_alone_and_inside_a_network():
    attention = NarrowAttention(nn.MultiheadAttention(8, 2), 2)
    x = [torch.rand(3, 1, 8)] * 3
    assert macs(attention, x) == macs(nn.MultiheadAttention(8, 2), x) == 4 * 3 * 8 * 8


def test_published_sizes():
    plan = [64, 64, "M", 128, 128, "M", *[256] * 4, "M", *[512] * 4, "M", *[512] * 4, "M"]
    image = torch.rand(1, 3, 32, 32)
    vgg19 = zoo.vgg(plan, 32, classes=10, hidden=0, bias=False)
    assert (parameters(vgg19), macs(vgg19, image)) == (20_035_018, 398_136_320)
    resnet18 = zoo.ResNet("basic", 64, classes=10)
    assert (parameters(resnet18), macs(resnet18, image)) == (11_173_962, 555_422_720)


class Toy(nn.Module):
    """Three groups: one that a convolution both reads and adds to, one with a depthwise convolution, one flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 3, padding=1)
        self.same = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.wide = nn.Conv2d(3, 3, 1)
        self.depthwise = nn.Conv2d(3, 3, 3, groups=3)
        self.last = nn.Conv2d(3, 2, 2)
        self.head = nn.Linear(2 * 9, 2)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.norm(self.same(x))
        return self.head(torch.flatten(self.last(self.depthwise(self.wide(x))), 1))


@pytest.mark.usefixtures("unchecked")  # for speed: shapes are checked by the others
@pytest.mark.parametrize("kind", ["macs", "parameters"])
def test_expected_costs_equal_the_mean_over_all_masks(kind):
    model, x = Toy(), torch.rand(1, 3, 6, 6)
    groups = trace(model, x)
    assert groups.widths() == {"stem": 3, "wide": 3, "last": 2}
    cost = CostModel.macs(model, groups, x) if kind == "macs" else CostModel.parameters(model, groups)
    generator = torch.Generator().manual_seed(0)
    pi = {name: torch.rand(width, generator=generator, dtype=torch.float64) for name, width in groups.widths().items()}
    flat = torch.cat(list(pi.values()))
    mean = torch.zeros((), dtype=torch.float64)
    for k, bits in enumerate(itertools.product((False, True), repeat=8)):
        keep = dict(zip(pi, torch.tensor(bits).split([3, 3, 2]), strict=True))
        value = cost.exact(keep)
        if all(mask.any() for mask in keep.values()) and k % 17 == 0:
            small = cut(model, groups, keep)
            assert value == (macs(small, x) if kind == "macs" else parameters(small))
        mean += value * torch.where(torch.tensor(bits), flat, 1 - flat).prod()
    expected = cost.expected(pi)
    assert abs(expected - mean) <= 1e-12 * mean
    independent_of_itself = cost.scale @ (
        (cost.inputs @ flat + cost.fixed_inputs) * (cost.outputs @ flat + cost.fixed_outputs)
    )
    assert abs(independent_of_itself - mean) > 1e-3 * mean


def test_the_expected_cost_by_hand():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1))
    x = torch.rand(1, 3, 5, 5)
    pi = torch.tensor([0.1, 0.2, 0.3, 0.9])
    cost = CostModel.macs(net, trace(net, x), x)
    assert cost.expected({"0": pi}).item() == pytest.approx(25 * 9 * 1.5 * (3 + 2), rel=1e-6)


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "densenet"])
def test_expected_costs_are_differentiable_and_grow_with_the_probabilities(name):
    model, x, groups = zoo.traced(name)
    cost = CostModel.macs(model, groups, x)
    generator = torch.Generator().manual_seed(0)
    names = list(groups.widths())
    pi = [torch.rand(w, generator=generator, dtype=torch.float64).requires_grad_() for w in groups.widths().values()]

    def ratio(*values):
        return cost.expected(dict(zip(names, values, strict=True))) / cost.exact({})

    assert torch.autograd.gradcheck(ratio, pi)
    assert all((slope > 0).all() for slope in torch.autograd.grad(ratio(*pi), pi))


def test_counting_leaves_the_model_alone_and_refuses_what_is_no_group():
    model, x = zoo.build("vgg")
    model.train()
    before = model[1].running_mean.clone()
    macs(model, x)
    assert model.training
    assert torch.equal(model[1].running_mean, before)
    assert not model[0]._forward_hooks
    cost = CostModel.macs(model, trace(model, x), x)
    with pytest.raises(GroupsError, match=r"\['16'\] are frozen, or no groups"):
        cost.expected({"16": torch.ones(5)})
    with pytest.raises(GroupsError, match="it has 6 channels"):
        cost.expected({"0": torch.ones(5)})
    assert macs(model, x[:1]) * 2 == macs(model, x)
