from __future__ import annotations

import copy

import pytest
import torch
import zoo
from torch import nn
from torch.func import functional_call

from stamp.groups import ChannelGroups, Group, Slot, trace
from stamp.surgery import KeepError, Masked, cut, gated_parameters, masked, restrict


@pytest.mark.parametrize("name", zoo.ZOO)
def test_cutting_equals_masking_in_outputs_and_in_gradients(name):
    model, x, groups = zoo.traced(name)
    for seed in range(3):
        keep = zoo.random_keep(groups, seed)
        small = cut(model, groups, keep)
        reference = masked(model, groups, keep)
        y, y_small = reference(x), small(x)
        assert (y - y_small).abs().max() <= 1e-10
        assert (y - model(x)).abs().max() > 1e-4

        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=y.dtype)
        names, parameters = zip(*model.named_parameters(), strict=True)
        wanted = torch.autograd.grad((y * weight).sum(), parameters, allow_unused=True, materialize_grads=True)
        own = torch.autograd.grad(
            (y_small * weight).sum(), small.parameters(), allow_unused=True, materialize_grads=True
        )
        surviving = restrict(model, groups, keep, dict(zip(names, wanted, strict=True)))
        assert [name for name, _ in small.named_parameters()] == list(names)
        for key, gradient in zip(names, own, strict=True):
            assert surviving[key].shape == gradient.shape
            assert (surviving[key] - gradient).abs().max() <= 1e-10 * (1 + gradient.abs().max())


@pytest.mark.parametrize("name", ["resnet", "preact", "densenet", "mobilenet", "unet", "resnext", "group-norm"])
def test_the_small_network_trains_like_the_masked_one_batch_statistics_included(name):
    model, x, groups = zoo.traced(name)
    keep = zoo.random_keep(groups, 5)
    small = cut(model, groups, keep).train()
    reference = masked(model.train(), groups, keep)
    assert (reference(x) - small(x)).abs().max() <= 1e-9
    running = restrict(model, groups, keep, dict(model.named_buffers()))
    for key, value in small.named_buffers():
        assert (running[key].double() - value).abs().max() <= 1e-10


def test_a_gate_before_the_norm_would_not_do():
    model, x, groups = zoo.traced("preact")
    keep = zoo.random_keep(groups, 0)
    small = cut(model, groups, keep)
    wrong = copy.deepcopy(model)
    for group in groups.prunable:
        for slot in group.producers:
            conv = wrong.get_submodule(slot.module)
            conv.weight.data[~keep[group.name]] = 0
            conv.bias.data[~keep[group.name]] = 0
    assert (wrong(x) - small(x)).abs().max() > 1e-2


def test_sizes_are_updated():
    model, x, groups = zoo.traced("mobilenet")
    keep = {"2.conv.0": torch.arange(18) < 5}
    block = cut(model, groups, keep).get_submodule("2.conv")
    assert (block[0].out_channels, block[1].num_features, block[6].in_channels) == (5, 5, 5)
    assert (block[3].in_channels, block[3].out_channels, block[3].groups) == (5, 5, 5)
    model, x = zoo.build("group-norm")
    small = cut(model, trace(model, x), {"0": torch.tensor([True, False, True, False])})
    assert (small[1].num_groups, small[1].num_channels, small[2].num_parameters) == (2, 6, 6)
    model, x = zoo.build("vit-hand")
    small = cut(model, trace(model, x), {"blocks.0.attn.qkv": torch.tensor([True, False, False, True])})
    assert small.blocks[0].attn.num_heads == 2
    assert small.blocks[0].attn.qkv.weight.shape == (24, 16)
    assert model.blocks[0].attn.num_heads == 4


def test_copies_by_default_and_cuts_in_place_on_request():
    model, x, groups = zoo.traced("resnet")
    keep = zoo.random_keep(groups, 1)
    before = model(x)
    small = cut(model, groups, keep)
    assert torch.equal(model(x), before)
    assert type(small) is type(model)
    assert not {p.data_ptr() for p in small.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert cut(model, groups, keep, inplace=True) is model
    assert torch.equal(model(x), small(x))
    assert trace(small, x).widths() == {name: int(mask.sum()) for name, mask in keep.items() if mask.sum() > 1}


def test_keeping_all_changes_nothing_and_cutting_twice_equals_cutting_once():
    model, x, groups = zoo.traced("vit-torch")
    whole = cut(model, groups, {g.name: torch.ones(g.width, dtype=torch.bool) for g in groups.prunable})
    assert (whole(x) - model(x)).abs().max() <= 1e-12
    model, x, groups = zoo.traced("densenet")
    keep = {"stem": torch.tensor([1, 1, 0, 1, 1, 0], dtype=torch.bool)}
    once = cut(model, groups, keep)
    again = cut(once, trace(once, x), {"stem": torch.tensor([0, 1, 1, 0], dtype=torch.bool)})
    both = cut(model, groups, {"stem": torch.tensor([0, 1, 0, 1, 0, 0], dtype=torch.bool)})
    assert torch.equal(again(x), both(x))


@pytest.mark.parametrize("name", ["preact", "squeeze-excite", "nested-cat", "mobilenet", "vit-torch"])
def test_soft_gates_scale_what_the_consumers_read(name):
    model, x, groups = zoo.traced(name)
    generator = torch.Generator().manual_seed(0)
    gates = {g.name: torch.rand(g.width, generator=generator, dtype=x.dtype).requires_grad_() for g in groups.prunable}
    y = Masked(model, groups, gates)(x)

    read: dict[str, torch.Tensor] = {}
    for group in groups.prunable:
        for slot in group.consumers:
            if slot.axis == "in":
                module = model.get_submodule(slot.module)
                size = module.in_features if isinstance(module, nn.Linear) else module.in_channels
                own = gates[group.name][slot.start : slot.start + slot.count].repeat_interleave(slot.block)
                at = torch.arange(slot.offset, slot.offset + len(own))
                read[slot.module] = read.get(slot.module, torch.ones(size, dtype=x.dtype)).index_copy(0, at, own)
    hooks = [
        model.get_submodule(module).register_forward_pre_hook(
            lambda m, args, z=z: (args[0] * (z if isinstance(m, nn.Linear) else z.view(-1, 1, 1)),)
        )
        for module, z in read.items()
    ]
    hard = {
        n: (g if f"{n.removesuffix('.heads')}.out_proj" in dict(model.named_modules()) else None)
        for n, g in gates.items()
    }
    wanted = Masked(model, groups, {n: g for n, g in hard.items() if g is not None})(x)
    for hook in hooks:
        hook.remove()
    assert (y - wanted).abs().max() <= 1e-12
    slopes = torch.autograd.grad(y.square().sum(), list(gates.values()))
    assert all(bool(slope.any()) for slope in slopes)


def test_gates_are_differentiable_and_only_consumers_are_gated():
    model, x, groups = zoo.traced("vgg")
    gate = torch.rand(8, dtype=x.dtype, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert set(gated_parameters(model, groups, {"7": gate})) == {"12.weight"}

    def loss(z):
        return functional_call(model, gated_parameters(model, groups, {"7": z}), x).square().sum()

    assert torch.autograd.gradcheck(loss, gate)


def test_masks_of_attention_survive_the_cut():
    net = nn.Module()
    for bias, kdim in ((True, None), (False, 6)):
        attention = nn.MultiheadAttention(8, 4, bias=bias, batch_first=False, kdim=kdim, vdim=kdim).double().eval()
        net.attention = attention
        slot = Slot("attention", "inner", 0, 2, 0, 4)
        groups = ChannelGroups((Group("heads", 4, (slot,), (slot,)),))
        keep = {"heads": torch.tensor([False, True, True, False])}
        generator = torch.Generator().manual_seed(0)
        q = torch.randn(5, 3, 8, generator=generator, dtype=torch.float64)
        k = torch.randn(7, 3, kdim or 8, generator=generator, dtype=torch.float64)
        padding = torch.zeros(3, 7, dtype=torch.bool)
        padding[1, 5:] = True
        forbidden = torch.ones(5, 7, dtype=torch.bool).triu(3)
        zeroed = gated_parameters(net, groups, {"heads": keep["heads"].double()})
        reference = {name.removeprefix("attention."): value for name, value in zeroed.items()}
        options = {"key_padding_mask": padding, "attn_mask": forbidden}
        wanted, _ = functional_call(attention, reference, (q, k, k), options)
        _, weights = attention(q, k, k, average_attn_weights=False, **options)
        small = cut(net, groups, keep).attention
        got, own = small(q, k, k, average_attn_weights=False, **options)
        assert (got - wanted).abs().max() <= 1e-12
        assert (own - weights[:, keep["heads"]]).abs().max() <= 1e-12
        assert (
            small(q[:, 0], k[:, 0], k[:, 0], attn_mask=forbidden)[0] - small(q, k, k, attn_mask=forbidden)[0][:, 0]
        ).abs().max() < 1e-12
        assert small(q, k, k, need_weights=False)[1] is None


def test_causal_attention_with_branches_on_sizes():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = zoo.Causal().double().eval(), torch.randn(2, 5, 3, dtype=torch.float64)
    groups = trace(model, x)
    for kept in ([True, False], [False, True]):
        keep = {"q": torch.tensor(kept)}
        small = cut(model, groups, keep)
        assert small.q.out_features == 4
        assert (masked(model, groups, keep)(x) - small(x)).abs().max() <= 1e-12


@pytest.mark.usefixtures("unchecked")
def test_bad_choices_are_refused_by_name():
    model, _, groups = zoo.traced("group-norm")
    good = torch.ones(8, dtype=torch.bool)
    for function in (cut, masked):
        with pytest.raises(KeepError, match="no group '4'; there are "):
            function(model, groups, {"4": good})
        with pytest.raises(KeepError, match=r"'3' needs a bool tensor of its width, \(8,\)"):
            function(model, groups, {"3": good[:7]})
        with pytest.raises(KeepError, match="float32 tensor"):
            function(model, groups, {"3": good.float()})
        with pytest.raises(KeepError, match="keeps none of 8 channels; keep at least a channel"):
            function(model, groups, {"3": ~good})
        with pytest.raises(KeepError, match=r"keep at least a channel \(3 entries of '0'\)"):
            function(model, groups, {"0": torch.zeros(4, dtype=torch.bool)})
        with pytest.raises(KeepError, match="'9' is frozen \\(reaches the model's output\\)"):
            function(model, groups, {"9": torch.tensor([True, False, True])})
    with pytest.raises(KeepError, match="is frozen"):
        gated_parameters(model, groups, {"9": torch.ones(3)})
    with pytest.raises(KeepError, match="it has 8 channels"):
        gated_parameters(model, groups, {"3": torch.ones(9)})
