from __future__ import annotations

import pytest
import torch
import zoo
from torch import nn
from torch.nn import functional as F

from stamp.axes import CONVS
from stamp.groups import ChannelGroups, Group, GroupsError, Slot, trace
from stamp.observing import Features, observe
from stamp.surgery import KeepError, Masked, cut


def random_gates(groups, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {g.name: torch.rand(g.width, generator=generator, dtype=torch.float64) for g in groups.prunable}


def inputs_of_modules(model, x):
    """What the first call of each module is given, in the order of the calls."""
    seen = {}

    def note(name):
        def hook(module, args, kwargs):
            seen.setdefault(name, (*args, *kwargs.values()))

        return hook

    hooks = [m.register_forward_pre_hook(note(name), with_kwargs=True) for name, m in model.named_modules()]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("name", zoo.ZOO)
def test_features_are_the_statistics_of_what_enters_the_first_consumer(name):
    model, x, groups = zoo.traced(name)
    found = observe(model, groups, x)
    seen = inputs_of_modules(model, x)
    calls = list(seen)
    assert set(found) == {group.name for group in groups.prunable}
    for group in groups.prunable:
        first = min((slot.module for slot in group.consumers), key=calls.index)
        module, entering = model.get_submodule(first), seen[first][0]
        if isinstance(module, nn.MultiheadAttention) and group.consumers[0].axis == "inner":
            weight, bias = (tensor.detach().chunk(3)[2] for tensor in (module.in_proj_weight, module.in_proj_bias))
            entering = F.linear(seen[first][2], weight, bias)
        if isinstance(module, CONVS):
            entering = entering.movedim(1, -1)
        own = found[group.name]
        for c in range(group.width):
            values = torch.cat(
                [
                    entering[..., slot.offset + (c - slot.start) * slot.block + k, None].flatten(1)
                    for slot in group.consumers
                    if slot.module == first and slot.start <= c < slot.start + slot.count
                    for k in range(slot.block)
                ],
                1,
            ).numpy()
            for kind, wanted in (("mean", values.mean(1)), ("std", values.std(1)), ("nonzero", (values != 0).mean(1))):
                assert abs(getattr(own, kind)[:, c].detach().numpy() - wanted).max() <= 1e-9


@pytest.mark.parametrize("name", zoo.ZOO)
def test_gates_on_the_way_equal_gates_on_the_weights(name):
    model, x, groups = zoo.traced(name)
    gates = random_gates(groups)
    asked, outputs = [], []

    def gate(name, features):
        asked.append(name)
        assert features.mean.shape == (len(x), groups[name].width)
        return gates[name]

    hook = model.register_forward_hook(lambda m, args, output: outputs.append(output))
    found = observe(model, groups, x, gate=gate)
    hook.remove()
    assert (outputs[-1] - Masked(model, groups, gates)(x)).abs().max() <= 1e-10
    assert sorted(asked) == sorted(group.name for group in groups.prunable)
    assert list(found) == asked
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("name", ["vgg", "resnet", "preact", "densenet", "unet", "vit-hand"])
def test_later_groups_see_what_was_cut_before(name):
    model, x, groups = zoo.traced(name)
    keep = zoo.random_keep(groups, 3, rate=0.7)
    gated = observe(model, groups, x, gate=lambda name, _: keep[name].to(x))
    small = cut(model, groups, keep)
    wanted = observe(small, trace(small, x), x)
    if not wanted:
        pytest.fail("nothing is left to compare")
    for key, features in wanted.items():
        for kind in ("mean", "std", "nonzero"):
            assert torch.allclose(getattr(gated[key], kind)[:, keep[key]], getattr(features, kind), atol=1e-9)
    ungated = observe(model, groups, x)
    assert any(not torch.allclose(ungated[key].mean, gated[key].mean) for key in gated)


def test_a_group_may_be_left_alone():
    model, x, groups = zoo.traced("resnet")
    left = observe(model, groups, x, gate=lambda *_: None)
    plain = observe(model, groups, x)
    assert all(torch.equal(left[name].mean, plain[name].mean) for name in plain)


def test_gradients_pass_through_gates_and_inputs():
    model, x, groups = zoo.traced("vgg")
    first, last = groups.prunable[0], groups.prunable[-1]
    gate = torch.rand(first.width, dtype=x.dtype, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def late(z, entering):
        return observe(model, groups, entering, gate=lambda name, _: z if name == first.name else None)[last.name].mean

    assert torch.autograd.gradcheck(late, (gate, x.clone().requires_grad_()), fast_mode=True)
    found = observe(model, groups, x.clone().requires_grad_())[last.name]
    assert not found.std.any()
    slope = torch.autograd.grad(found.std.sum() + found.mean.sum(), model[0].weight)[0]
    assert bool(slope.isfinite().all())


def test_the_model_stays_as_it_was():
    model, x = zoo.build("vit-torch")
    model.train()
    model.blocks[0].mlp.eval()
    model.norm.register_forward_pre_hook(lambda *_: None)
    groups = trace(model, x)
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    gates = random_gates(groups)
    observe(model, groups, x, gate=lambda name, _: gates[name])

    def fails(name, _):
        if name == groups.prunable[1].name:
            raise KeyboardInterrupt
        return gates[name]

    with pytest.raises(KeyboardInterrupt):
        observe(model, groups, x, gate=fails)
    assert torch.backends.mha.get_fastpath_enabled()
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert isinstance(model.blocks[0].attn.out_proj.weight, nn.Parameter)
    assert sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()) == 1
    model, x = zoo.build("resnet")
    model.train()
    mean = model.stem[1].running_mean.clone()
    observe(model, trace(model, x), x)
    assert torch.equal(mean, model.stem[1].running_mean)


class Halves(nn.Module):
    """Each half of the channels has a consumer of its own, the second after a gated one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.out = (
            nn.Conv2d(3, 6, 1),
            nn.Conv2d(3, 4, 1),
            nn.Conv2d(3, 4, 1),
            nn.Conv2d(4, 2, 1),
        )

    def forward(self, x):
        x = self.stem(x)
        return self.out(self.a(x[:, :3]).relu() + self.b(x[:, 3:].sigmoid()))


def test_a_group_whose_consumers_take_parts():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = Halves().double(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    parts = tuple(Slot(name, "in", 0, 1, start, 3) for name, start in (("a", 0), ("b", 3)))
    groups = ChannelGroups(
        (
            Group("stem", 6, (Slot("stem", "out", 0, 1, 0, 6),), parts),
            Group(
                "a", 4, (Slot("a", "out", 0, 1, 0, 4), Slot("b", "out", 0, 1, 0, 4)), (Slot("out", "in", 0, 1, 0, 4),)
            ),
        )
    )
    stem = model.stem(x)
    wanted = torch.cat([stem[:, :3], stem[:, 3:].sigmoid()], 1)
    gates = random_gates(groups)
    asked = {}

    def gate(name, features):
        asked[name] = features.mean
        return gates[name]

    outputs = []
    model.register_forward_hook(lambda m, args, output: outputs.append(output))
    for found in (observe(model, groups, x), observe(model, groups, x, gate=gate)):
        assert torch.allclose(found["stem"].mean, wanted.mean((2, 3)))
    assert torch.allclose(asked["stem"], wanted.mean((2, 3)))
    assert torch.allclose(outputs[-1], Masked(model, groups, gates)(x))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.step, self.out = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x):
        x = self.stem(x).relu()
        for _ in range(3):
            x = self.step(input=x).relu()
        return self.out(x)


def test_a_layer_that_is_used_again_is_gated_again_and_observed_once():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = Recurrent().double(), torch.randn(4, 3, dtype=torch.float64)
    groups = trace(model, x)
    gates = random_gates(groups)
    outputs = []
    model.register_forward_hook(lambda m, args, output: outputs.append(output))
    found = observe(model, groups, x, gate=lambda name, _: gates[name])
    assert torch.allclose(outputs[-1], Masked(model, groups, gates)(x))
    assert torch.equal(found["stem"].mean, model.stem(x).relu())


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kdim", [None, 6])
def test_attention_of_other_layouts(batch_first, kdim):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        attention = nn.MultiheadAttention(8, 4, kdim=kdim, vdim=kdim, bias=False, batch_first=batch_first).double()
        q, k = torch.randn(3, 5, 8, dtype=torch.float64), torch.randn(3, 7, kdim or 8, dtype=torch.float64)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention

        def forward(self, q, k):
            q, k = (x if batch_first else x.transpose(0, 1) for x in (q, k))
            return self.attention(q, value=k, key=k)[0]

    net = Net()
    inner, entering = Slot("attention", "inner", 0, 2, 0, 4), Slot("attention", "in", 0, 1, 0, 8)
    groups = [Group("embedding", 8, (entering,), (entering,)), Group("heads", 4, (inner,), (inner,))]
    if kdim is not None:
        keys = tuple(Slot("attention", axis, 0, 1, 0, kdim) for axis in ("key", "value"))
        groups.append(Group("memory", kdim, keys, keys))
    groups = ChannelGroups(tuple(groups))
    gates = random_gates(groups)
    outputs = []
    net.register_forward_hook(lambda m, args, output: outputs.append(output))
    found = observe(net, groups, (q, k))
    assert torch.allclose(found["embedding"].mean, q.mean(1))
    weight = attention.v_proj_weight if kdim else attention.in_proj_weight[16:]
    assert torch.allclose(found["heads"].mean, F.linear(k, weight).unflatten(-1, (4, 2)).mean((1, 3)))
    if kdim is not None:
        assert torch.allclose(found["memory"].mean, k.mean(1))
    observe(net, groups, (q, k), gate=lambda name, _: gates[name])
    assert torch.allclose(outputs[-1], Masked(net, groups, gates)(q, k))


def test_windows_on_the_batch_axis_are_positions_of_their_example():
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch, self.mix, self.bias = nn.Conv2d(3, 4, 1), nn.Linear(4, 4), nn.Linear(4, 4)
            self.table = nn.Parameter(torch.ones(1, 4))

        def forward(self, x):
            y = self.patch(x).unflatten(2, (2, 4)).permute(0, 2, 3, 4, 1).flatten(0, 1)
            return self.mix(y).unflatten(0, (-1, 2)) + self.bias(self.table)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = Windows(), torch.randn(3, 3, 8, 4)
    at = Slot("patch", "out", 0, 1, 0, 4), Slot("mix", "in", 0, 1, 0, 4), Slot("bias", "in", 0, 1, 0, 4)
    groups = ChannelGroups((Group("patch", 4, at[:1], at[1:2]), Group("table", 4, at[:1], at[2:])))
    found = observe(model, groups, x)
    assert torch.allclose(found["patch"].mean, model.patch(x).mean((2, 3)), atol=1e-6)
    assert torch.equal(found["table"].mean, torch.ones(3, 4))


def test_half_precision_is_pooled_in_single():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).to(torch.bfloat16)
    x = torch.rand(2, 3, 8, 8, dtype=torch.bfloat16)
    groups = trace(net.float(), x.float())
    found = observe(net.to(torch.bfloat16), groups, x, gate=lambda _, features: features.mean.mean(0))
    assert isinstance(found["0"], Features)
    assert found["0"].mean.dtype == torch.float32


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_is_named():
    model, x, groups = zoo.traced("vgg")
    with pytest.raises(KeepError, match=r"gates of group '0' have shape \(5,\); it has 6 channels"):
        observe(model, groups, x, gate=lambda *_: torch.ones(5))
    net = nn.Sequential(nn.Conv2d(3, 4, 1))
    net.unused = nn.Conv2d(4, 2, 1)
    net.forward = net[0].forward
    slots = Slot("0", "out", 0, 1, 0, 4), Slot("unused", "in", 0, 1, 0, 4)
    with pytest.raises(GroupsError, match=r"no consumer of the groups \['0'\] ran"):
        observe(net, ChannelGroups((Group("0", 4, slots[:1], slots[1:]),)), torch.rand(1, 3, 2, 2))
