from __future__ import annotations

import copy
import math

import pytest
import torch
import zoo
from torch import nn
from torch.func import functional_call

from stamp.counting import macs, parameters
from stamp.examples import Examples
from stamp.parameter_masks import (
    MaskError,
    edge_popup,
    initial_scores,
    layer_weights,
    masked_weights,
    sparse_network,
    top_k_mask,
)
from stamp.surgery import cut, gated_parameters, restrict
from stamp.training import accuracy, finetune


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("keep", [0.01, 0.25, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("shape", [(7,), (4, 5), (3, 2, 3, 3)])
def test_the_largest_scores_live(keep, shape):
    scores = torch.randn(shape, generator=generator())
    mask = top_k_mask(scores, keep)
    gone = int((1 - keep) * scores.numel())
    assert int((mask == 0).sum()) == gone
    assert int((mask == 1).sum()) == scores.numel() - gone
    size = scores.abs()
    if gone:
        assert size[mask == 1].min() >= size[mask == 0].max()


def test_ties_and_zeros_are_counted_out_exactly():
    assert top_k_mask(torch.zeros(10), 0.3).tolist() == [0.0] * 7 + [1.0] * 3
    assert top_k_mask(torch.tensor([1.0, -1.0, 1.0, -1.0]), 0.5).sum() == 2


def test_the_gradient_goes_straight_to_the_absolute_scores():
    scores = torch.randn(6, 5, generator=generator()).requires_grad_()
    passed = torch.randn(6, 5, generator=generator(1))
    slope = torch.autograd.grad((top_k_mask(scores, 0.4) * passed).sum(), scores)[0]
    assert torch.equal(slope, passed * scores.detach().sign())


def test_scores_start_as_linear_layers_do():
    model = nn.Sequential(nn.Conv2d(4, 500, 3), nn.BatchNorm2d(500), nn.Flatten(), nn.Linear(500, 300))
    scores = initial_scores(model, generator())
    assert list(scores) == ["0.weight", "3.weight"]
    for name, fan_in in (("0.weight", 36), ("3.weight", 500)):
        bound = 1 / math.sqrt(fan_in)
        assert float(scores[name].detach().abs().max()) == pytest.approx(bound, rel=1e-3)
        assert float(scores[name].detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)
        assert scores[name].requires_grad
    again = initial_scores(model, generator())
    assert all(torch.equal(again[name], score) for name, score in scores.items())


def test_masks_of_weights_go_with_gates_of_channels_and_with_cuts():
    model, x, groups = zoo.traced("resnet")
    keep = zoo.random_keep(groups, 0)
    gates = {name: mask.double() for name, mask in keep.items()}
    scores = initial_scores(model, generator())
    gated = gated_parameters(model, groups, gates)
    both = masked_weights(model, scores, 0.5, weights=gated)
    assert set(both) == set(scores) | set(gated)
    for name, weight in gated.items():
        assert torch.equal(both[name], weight * top_k_mask(scores[name], 0.5))
    masks = {name: top_k_mask(score, 0.5) for name, score in scores.items()}
    zeroed = copy.deepcopy(model)
    for name, mask in masks.items():
        zeroed.get_parameter(name).data *= mask.detach()
    assert torch.allclose(functional_call(model, both, x), cut(zeroed, groups, keep)(x))
    small = cut(model, groups, keep)
    own = restrict(model, groups, keep, scores)
    assert all(own[name].shape == weight.shape for name, weight in layer_weights(small).items())
    found = sparse_network(small, own, 0.5)
    assert found.total == parameters(small)
    zeros = sum(int((weight == 0).sum()) for weight in layer_weights(found.model).values())
    assert found.kept == found.total - zeros


def problem(seed=0):
    """Four classes that ask for all of four inputs, and a random network with fresh norms."""
    x = torch.randn(600, 6, generator=generator(seed))
    y = (x[:, 0] * x[:, 1] > 0).long() + 2 * (x[:, 2] * x[:, 3] > 0).long()
    data = Examples(x, y, tuple("abcd"))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Linear(6, 100), nn.BatchNorm1d(100), nn.ReLU(), nn.Linear(100, 60), nn.BatchNorm1d(60), nn.ReLU()]
        model = nn.Sequential(*layers, nn.Dropout(), nn.Linear(60, 4))
    return model, data.rows(slice(0, 400)), data.rows(slice(400, 600))


def test_a_subnetwork_of_random_weights_learns_the_task():
    model, train, test = problem()
    before = copy.deepcopy(model.state_dict())
    state = torch.random.get_rng_state()
    first = edge_popup(model, train, 0.5, generator=generator(), steps=0)
    found = edge_popup(model, train, 0.5, generator=generator(), steps=200)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert accuracy(found.model, test) >= accuracy(first.model, test) + 0.3

    gone = 0
    for name, weight in layer_weights(model).items():
        own = found.model.get_parameter(name)
        alive = own != 0
        gone += int((~alive).sum())
        assert int((~alive).sum()) == weight.numel() // 2
        assert torch.equal(own[alive], weight[alive])
    for name, value in model.named_parameters():
        if name not in layer_weights(model):
            assert torch.equal(found.model.get_parameter(name), value)
    assert (found.kept, found.total) == (parameters(model) - gone, parameters(model))


def test_it_brings_no_speed():
    model, train, _ = problem()
    found = edge_popup(model, train, 0.1, generator=generator(), steps=2)
    assert macs(found.model, train.x[:3]) == macs(model, train.x[:3])
    assert found.speed_up == 1.0
    assert found.kept < 0.2 * found.total
    assert [m.training for m in found.model.modules()] == [m.training for m in model.modules()]


def test_keeping_all_is_the_network_and_it_repeats():
    model, train, _ = problem()
    whole = edge_popup(model.eval(), train, 1.0, generator=generator(), steps=0)
    assert torch.equal(whole.model(train.x), model(train.x))
    assert whole.kept == whole.total
    runs = [edge_popup(model, train, 0.5, generator=generator(3), steps=5).model for _ in range(2)]
    assert torch.equal(*(run(train.x) for run in runs))
    finetune(runs[0], train, epochs=1)
    assert not torch.equal(*(run(train.x) for run in runs))


@pytest.mark.usefixtures("unchecked")
def test_what_no_mask_can_do_is_refused():
    model, train, _ = problem()
    for keep in (0.0, 1.5, float("nan")):
        with pytest.raises(MaskError, match=r"is no share; give one above 0 and at most 1"):
            edge_popup(model, train, keep, generator=generator(), steps=1)
    with pytest.raises(MaskError, match=r"belong to no parameter of the model; the first is '0.weight'"):
        masked_weights(model, {"9.weight": torch.ones(2)}, 0.5)
    with pytest.raises(
        MaskError, match=r"have shape \(2,\), and the weight \(100, 6\); cut them with surgery.restrict"
    ):
        masked_weights(model, {"0.weight": torch.ones(2)}, 0.5)
