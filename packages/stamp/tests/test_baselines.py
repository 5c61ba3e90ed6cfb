from __future__ import annotations

import copy
import functools
import itertools
import sys

import numpy as np
import pytest
import torch
import torch_pruning
import zoo
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from stamp.axes import axis_length, axis_places
from stamp.baselines import SCORERS, PeerError, channel_sums
from stamp.baselines.sensitivity import synaptic_flow
from stamp.counting import CostModel
from stamp.examples import Examples
from stamp.groups import trace
from stamp.parameter_masks import layer_weights
from stamp.surgery import Masked

QUICK = {"synflow": {"rounds": 3}, "free": {"steps": 2}, "bbdropout": {"steps": 2}}
DETERMINISTIC = [name for name in SCORERS if name not in {"random", "free", "bbdropout"}]


class Classified(nn.Module):
    """Any network with a head for four classes on all that it computes."""

    def __init__(self, body: nn.Module, features: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(features, 4)

    def forward(self, x):
        return self.head(self.body(x).flatten(1))


def classifier(name, seed=0):
    body, x = zoo.build(name, seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Classified(body, body(x)[0].numel()).double().eval()
    return model, trace(model, x)


def examples(n=24, seed=0, shape=(3, 8, 8)):
    generator = torch.Generator().manual_seed(seed)
    return Examples(torch.randn(n, *shape, generator=generator), torch.arange(n) % 4, tuple("abcd"))


def score(method, model, groups, data=None, seed=0, **options):
    options = QUICK.get(method, {}) | options
    return SCORERS[method](model, groups, data or examples(), torch.Generator().manual_seed(seed), **options)


def mlp(seed=0, sizes=(5, 6, 4), bias=True):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Linear(a, b, bias=bias) for a, b in itertools.pairwise(sizes)]
        model = nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh())))[:-1].double()
    return model, trace(model, torch.rand(2, sizes[0], dtype=torch.float64))


@pytest.mark.parametrize("name", zoo.ZOO)
def test_every_scorer_scores_every_architecture_and_leaves_it_alone(name):
    model, groups = classifier(name)
    data = examples(8)
    model.train()
    model.body.eval()
    state = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    for method in SCORERS:
        before = torch.random.get_rng_state()
        scores = score(method, model, groups, data)
        assert {key: value.shape for key, value in scores.items()} == {n: (w,) for n, w in groups.widths().items()}
        assert all(bool(value.isfinite().all()) and not value.requires_grad for value in scores.values())
        if name == "vgg":
            again = score(method, model, groups, data)
            assert all(torch.equal(again[key], value) for key, value in scores.items())
        assert torch.equal(before, torch.random.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def permuted(model, groups, seed=0):
    """The same network with the channels of each group in another order, and the orders."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    order = {group.name: torch.randperm(group.width, generator=generator) for group in groups.prunable}
    axes = {}
    for group in groups.prunable:
        for slot in set(group.slots):
            axes.setdefault((slot.module, slot.axis), []).append((group.name, slot))
    for (module, axis), slots in axes.items():
        owner = model.get_submodule(module)
        length = axis_length(owner, axis)
        index = torch.arange(length)
        for name, slot in slots:
            assert (slot.start, slot.count) == (0, groups[name].width)
            entries = slot.offset + torch.arange(slot.count * slot.block).view(slot.count, slot.block)
            index[entries.flatten()] = entries[order[name]].flatten()
        for tensor, dim, repeats in axis_places(owner, axis):
            value = functools.reduce(getattr, tensor.split("."), owner)
            value.data = value.data.index_select(dim, torch.cat([index + k * length for k in range(repeats)]))
    return model, order


@pytest.mark.parametrize("name", ["vgg", "preact", "densenet", "mobilenet", "group-norm", "vit-torch"])
def test_scores_follow_their_channels(name):
    model, groups = classifier(name)
    other, order = permuted(model, groups)
    data = examples(8)
    assert torch.allclose(model(data.x.double()), other(data.x.double()), atol=1e-9)
    for method in DETERMINISTIC:
        own, moved = score(method, model, groups, data), score(method, other, groups, data)
        for key, index in order.items():
            assert torch.allclose(own[key][index], moved[key], rtol=1e-6, atol=1e-9), (method, key)


@pytest.mark.parametrize("name", ["vgg", "resnet", "densenet", "vit-hand", "vit-torch", "upscaling", "group-norm"])
def test_magnitudes_by_loops(name):
    model, groups = classifier(name)
    l1, l2 = score("l1", model, groups), score("l2", model, groups)
    for group in groups.prunable:
        for c in range(group.width):
            numbers = []
            for slot in group.producers:
                if not slot.start <= c < slot.start + slot.count:
                    continue
                module = model.get_submodule(slot.module)
                for k in range(slot.block):
                    row = slot.offset + (c - slot.start) * slot.block + k
                    if slot.axis == "inner":
                        rows = [module.in_proj_weight[row + part * module.embed_dim] for part in range(3)]
                        numbers += [row.detach().numpy().ravel() for row in rows]
                    else:
                        transposed = isinstance(module, nn.ConvTranspose2d)
                        weight = module.weight.detach().numpy()
                        numbers.append((weight[:, row] if transposed else weight[row]).ravel())
            numbers = np.concatenate(numbers)
            assert abs(float(l1[group.name][c]) - abs(numbers).sum()) <= 1e-9
            assert abs(float(l2[group.name][c]) - np.sqrt((numbers**2).sum())) <= 1e-9


def test_bn_scales_by_loops_and_weights_where_there_is_no_norm():
    model, groups = classifier("densenet")
    bn, l1 = score("bn", model, groups), score("l1", model, groups)
    body = model.body
    norms = [body.blocks[1][0], body.blocks[2][0], body.transition[0]]
    for c in range(4):
        wanted = sum(abs(norm.weight[6 + c].item()) for norm in norms)
        assert float(bn["body.blocks.0.2"][c]) == pytest.approx(wanted)
    assert torch.equal(bn["body.fc"], l1["body.fc"])
    model, groups = classifier("group-norm")
    found = score("bn", model, groups)
    wanted = model.body[1].weight.abs().view(4, 3).sum(1)
    assert torch.allclose(found["body.0"], wanted)
    assert torch.allclose(found["body.3"], model.body[4].weight.abs())


def test_activations_are_those_that_enter_the_consumer():
    model, groups = classifier("vgg")
    data = examples(30)
    entering = model.body[:7](data.x.double())
    assert torch.allclose(score("act", model, groups, data, batch_size=7)["body.4"], entering.mean((0, 2, 3)))
    nonzero = (entering != 0).double().mean((0, 2, 3))
    assert torch.allclose(score("apoz", model, groups, data, batch_size=7)["body.4"], nonzero)
    few = score("act", model, groups, data, batches=1, batch_size=8)["body.4"]
    assert not torch.allclose(few, entering.mean((0, 2, 3)))
    pooled = model.body(data.x.double()).abs().mean(0)
    assert torch.allclose(score("act", model, groups, data)["body.16"], pooled)


def loss_of_gates(model, groups, x, y, gates):
    return F.cross_entropy(Masked(model, groups, gates)(x), y).item()


@pytest.mark.parametrize("name", ["vgg", "preact", "vit-torch"])
def test_snip_and_taylor_are_slopes_of_the_loss_by_finite_differences(name):
    model, groups = classifier(name)
    data = examples(8)
    x, y = data.x.double(), data.y
    gates = {group.name: torch.ones(group.width, dtype=torch.float64) for group in groups.prunable}
    snip, taylor = score("snip", model, groups, data, batch_size=8), score("taylor", model, groups, data, batch_size=8)
    halves = score("snip", model, groups, data, batch_size=5)
    slopes = {}
    for group in list(groups.prunable)[:3]:
        for c in range(0, group.width, 2):
            found = []
            for step in (1e-5, -1e-5):
                moved = gates[group.name].clone()
                moved[c] += step
                found.append(loss_of_gates(model, groups, x, y, gates | {group.name: moved}))
            slopes[group.name, c] = (found[0] - found[1]) / 2e-5
    key, c = max(slopes, key=lambda at: abs(slopes[at]))
    ratio = float(snip[key][c]) / abs(slopes[key, c])
    for (key, c), slope in slopes.items():
        assert float(taylor[key][c]) == pytest.approx(slope**2, rel=1e-4, abs=1e-10)
        assert float(snip[key][c]) == pytest.approx(ratio * abs(slope), rel=1e-3, abs=1e-9)
    assert sum(float(values.sum()) for values in snip.values()) == pytest.approx(1)
    assert all(torch.allclose(snip[key], halves[key]) for key in snip)


def test_taylor_averages_squares_over_batches():
    model, groups = mlp()
    data = examples(6, shape=(5,))
    found = score("taylor", model, groups, data, batch_size=1)["0"]
    each = [score("taylor", model, groups, data.rows(slice(k, k + 1)))["0"] for k in range(6)]
    assert torch.allclose(found, torch.stack(each).mean(0))


def test_grasp_by_an_explicit_hessian():
    model, groups = mlp()
    data = examples(7, shape=(5,))
    weights = layer_weights(model)
    sizes = [w.numel() for w in weights.values()]

    def loss(vector):
        own = {n: p.view_as(w) for (n, w), p in zip(weights.items(), vector.split(sizes), strict=True)}
        return F.cross_entropy(functional_call(model, own, data.x.double()) / 200, data.y)

    theta = torch.cat([w.detach().flatten() for w in weights.values()])
    gradient = torch.autograd.functional.jacobian(loss, theta)
    wanted = theta * (torch.autograd.functional.hessian(loss, theta) @ gradient)
    wanted = wanted / (wanted.sum().abs() + 1e-10)
    rows = wanted[: sizes[0]].view(6, 5).sum(1)
    for size in (64, 3):
        assert torch.allclose(score("grasp", model, groups, data, batch_size=size)["0"], rows, rtol=1e-8)


def test_removing_the_channels_that_grasp_would_keep_costs_gradient_flow():
    """To first order, weights shrunk by a little lose twice that share of their score from the gradient's norm."""
    model, groups = mlp()
    data = examples(7, shape=(5,))
    weights = {name: w.detach() for name, w in layer_weights(model).items()}

    def flow(own):
        own = {name: w.clone().requires_grad_() for name, w in own.items()}
        loss = F.cross_entropy(functional_call(model, own, data.x.double()) / 200, data.y)
        return sum(float(g.square().sum()) for g in torch.autograd.grad(loss, list(own.values())))

    losses = []
    for c in range(6):
        shrunk = {name: w.clone() for name, w in weights.items()}
        shrunk["0.weight"][c] *= 1 - 1e-5
        losses.append((flow(weights) - flow(shrunk)) / 1e-5)
    found = score("grasp", model, groups, data)["0"].numpy()
    assert np.corrcoef(losses, found)[0, 1] > 0.9999
    assert np.array_equal(np.sign(losses), np.sign(found))


def test_grasp_takes_as_many_of_each_class():
    model, groups = mlp()
    data = examples(40, shape=(5,))
    few = score("grasp", model, groups, data, per_class=3)["0"]
    assert not torch.allclose(few, score("grasp", model, groups, data)["0"], rtol=1e-3)
    everything = [score("grasp", model, groups, data, seed=seed, per_class=10)["0"] for seed in (0, 1)]
    assert torch.allclose(*everything)


def test_synaptic_flow_is_conserved():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = zoo.vgg(bias=False)
    model = nn.Sequential(*(m for m in model if not isinstance(m, (nn.BatchNorm2d, nn.BatchNorm1d)))).double().eval()
    model[-1].bias = None
    for module in model:
        if getattr(module, "bias", None) is not None:
            module.bias = None
    for parameter in model.parameters():
        parameter.data.abs_()
    x = torch.ones(1, 3, 8, 8, dtype=torch.float64)
    weights = layer_weights(model)
    mask = {n: w * (torch.rand(w.shape, generator=torch.Generator().manual_seed(0)) < 0.7) for n, w in weights.items()}
    for own in (weights, mask):
        flow = synaptic_flow(model, own, x)
        totals = [float(values.sum()) for values in flow.values()]
        output = float(functional_call(model, {n: w.detach() for n, w in own.items()}, x).sum())
        assert len(totals) == 5
        assert totals == pytest.approx([output] * 5, rel=1e-12)
        assert all(torch.equal(flow[name] > 0, own[name] != 0) for name in own)
    # What flows into a unit flows out of it.
    flow = synaptic_flow(model, weights, x)
    names = list(weights)
    assert torch.allclose(flow[names[0]].sum((1, 2, 3)), flow[names[1]].sum((0, 2, 3)))


def test_synflow_prunes_in_rounds_and_ignores_the_data():
    model, groups = classifier("vgg")
    once = score("synflow", model, groups, rounds=1)
    many = score("synflow", model, groups, rounds=20)
    assert any(not torch.allclose(once[key], many[key]) for key in once)
    other = score("synflow", model, groups, examples(seed=9), rounds=20)
    assert all(torch.equal(other[key], many[key]) for key in many)
    positive = copy.deepcopy(model)
    for tensor in (*positive.parameters(), *positive.buffers()):
        tensor.data.abs_()
    flow = synaptic_flow(positive, layer_weights(positive), torch.ones(1, 3, 8, 8, dtype=torch.float64))
    total = sum(values.sum() for values in flow.values())
    wanted = channel_sums(positive, groups, {name: values / total for name, values in flow.items()})
    assert all(torch.allclose(once[key], wanted[key]) for key in once)


def four_of_twelve(seed=0):
    """Labels that depend on four of eight inputs, and a network with a unit for each of these before eight others."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(400, 8, generator=generator)
    data = Examples(x, (x[:, :4].relu().sum(1) > 1.5).long(), ("no", "yes"))
    model = nn.Sequential(nn.Linear(8, 12, bias=False), nn.BatchNorm1d(12, affine=False), nn.ReLU(), nn.Linear(12, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(8)[torch.arange(12) % 8])
        model[0].weight[8:] = torch.randn(4, 8, generator=generator)
        model[3].weight.copy_(0.3 * torch.randn(2, 12, generator=generator))
        model[3].weight[:, :4] = torch.tensor([[-1.0], [1.0]])
        model[3].bias.copy_(torch.tensor([1.5, -1.5]))
    return model, trace(model, x[:2]), data


@pytest.mark.usefixtures("unchecked")  # for speed: shapes are checked by the others
def test_free_gates_find_the_channels_that_matter_and_meet_the_budget():
    model, groups, data = four_of_twelve()
    found = SCORERS["free"](model, groups, data, torch.Generator().manual_seed(0), keep=0.4, steps=300)
    assert float(found["0"][:4].min()) > 0.6 > 0.4 > float(found["0"][4:].max())
    cost = CostModel.macs(model, groups, data.x[:1])
    assert float(cost.expected(found)) / float(cost.expected({})) == pytest.approx(0.4, abs=0.06)


@pytest.mark.usefixtures("unchecked")  # for speed: shapes are checked by the others
def test_bbdropout_keeps_what_the_labels_need():
    model, groups, data = four_of_twelve()

    def trained(steps):
        return SCORERS["bbdropout"](model, groups, data, torch.Generator().manual_seed(0), steps=steps, gate_lr=3e-2)[
            "0"
        ]

    found, longer = trained(250), trained(350)
    assert float(found[:4].min()) > float(found[4:].max())
    assert float(longer[4:].mean()) < float(found[4:].mean())


def test_random_scores_follow_the_generator():
    model, groups = mlp()
    first, same, other = (score("random", model, groups, examples(shape=(5,)), seed)["0"] for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert 0 <= float(first.min()) <= float(first.max()) < 1


@pytest.mark.parametrize("method", ["magnitude", "taylor"])
@pytest.mark.parametrize("name", ["vgg", "preact", "densenet", "mobilenet", "nested-cat", "unet"])
def test_scores_of_torch_pruning_are_its_own(name, method):
    model, groups = classifier(name)
    model.float()
    data = examples()
    peer = copy.deepcopy(model)
    F.cross_entropy(peer(data.x), data.y).backward()
    graph = torch_pruning.DependencyGraph().build_dependency(peer, example_inputs=data.x)
    kind = {"magnitude": "GroupMagnitudeImportance", "taylor": "GroupTaylorImportance"}[method]
    importance = getattr(torch_pruning.importance, kind)(normalizer=None)
    found = score(f"torch-pruning-{method}", model, groups, data)
    for group in groups.prunable:
        layer = peer.get_submodule(group.producers[0].module)
        prune = graph.get_pruner_of_module(layer).prune_out_channels
        wanted = importance(graph.get_pruning_group(layer, prune, list(range(group.width))))
        assert torch.allclose(found[group.name], wanted, rtol=1e-4, atol=1e-8), group.name


def test_heads_count_alike_however_the_attention_is_written():
    model, groups = classifier("vit-torch")
    hand = copy.deepcopy(model)
    other, _ = classifier("vit-hand")
    for k in range(2):
        block = copy.deepcopy(other.body.blocks[k].attn)
        source = hand.body.blocks[k].attn
        block.qkv.weight, block.qkv.bias, block.proj = source.in_proj_weight, source.in_proj_bias, source.out_proj
        hand.body.blocks[k].attn = block
        hand.body.blocks[k].kind = "hand"
    data = examples()
    traced = trace(hand, data.x[:2].double())
    assert torch.allclose(model(data.x.double()), hand(data.x.double()))
    for method in DETERMINISTIC:
        if method == "act":  # it sees values here, what attention mixes of them there
            continue
        own, written = score(method, model, groups, data), score(method, hand, traced, data)
        for k in range(2):
            a, b = own[f"body.blocks.{k}.attn.heads"], written[f"body.blocks.{k}.attn.qkv"]
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-9), method


def test_a_peer_that_is_not_installed_is_named(monkeypatch):
    model, groups = mlp()
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    for method in ("torch-pruning-magnitude", "torch-pruning-taylor"):
        with pytest.raises(PeerError, match=r"pip install 'stamp\[torch-pruning\]'"):
            score(method, model, groups, examples(shape=(5,)))


def test_a_network_without_groups_has_no_scores():
    model = nn.Linear(5, 4)
    groups = trace(model, torch.rand(2, 5))
    assert not groups.prunable
    for method in SCORERS:
        assert score(method, model, groups, examples(shape=(5,))) == {}
