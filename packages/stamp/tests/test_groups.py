from __future__ import annotations

import copy

import pytest
import torch
import zoo
from torch import nn
from torch.nn import functional as F

from stamp.groups import ChannelGroups, Group, GroupsError, Slot, TraceError, trace

x8 = torch.randn(2, 3, 8, 8)


def slots(group: Group, role: str) -> set[str]:
    return {str(slot) for slot in getattr(group, role)}


def test_a_plain_network_gives_a_group_for_each_layer_and_freezes_the_logits():
    groups = trace(zoo.vgg(), x8)
    assert groups.widths() == {"0": 6, "4": 8, "7": 8, "12": 12}
    assert slots(groups["7"], "consumers") == {"12.in x4"}
    assert groups["7"].consumers == (Slot("12", "in", 0, 4, 0, 8),)
    assert slots(groups["12"], "followers") == {"13.norm"}
    assert groups["16"].frozen == "reaches the model's output"


def test_residual_sums_tie_all_that_is_added():
    groups = trace(zoo.ResNet("basic", 4), x8)
    assert slots(groups["stem.0"], "producers") == {"stem.0.out", "layers.0.conv2.out", "layers.1.conv2.out"}
    assert slots(groups["layers.2.conv2"], "producers") == {
        "layers.2.conv2.out",
        "layers.2.down.0.out",
        "layers.3.conv2.out",
    }
    assert len(groups.prunable) == 4 + 8


def test_depthwise_convolutions_follow_and_do_not_consume():
    groups = trace(zoo.mobilenet(), x8)
    expand = groups["2.conv.0"]
    assert slots(expand, "consumers") == {"2.conv.6.in"}
    assert {"2.conv.3.in", "2.conv.3.out"} <= slots(expand, "followers")
    assert slots(groups["1.conv.6"], "producers") == {"1.conv.6.out", "2.conv.6.out"}


def test_grouped_convolutions_and_group_norms_go_in_whole_groups():
    groups = trace(zoo.ResNet("bottleneck", 8, (1, 1), groups=4), x8)
    assert groups["layers.0.body.0.0"].width == 4
    assert groups["layers.0.body.0.0"].producers[0].block == 2
    normed = trace(zoo.group_norm(), x8)
    assert normed.widths() == {"0": 4, "3": 8}
    assert normed["6"].width == 6
    assert normed["6"].frozen == "GroupNorm '7' normalises over all of it"


def test_concatenations_keep_offsets():
    groups = trace(zoo.DenseNet(), x8)
    assert groups["blocks.1.2"].consumers[0] == Slot("blocks.2.2", "in", 10, 1, 0, 4)
    nested = trace(zoo.NestedCat(), x8)
    assert nested.widths() == {"a": 3, "b": 4, "c": 5}
    assert nested["c"].producers == (Slot("c", "out", 0, 1, 0, 5), Slot("d", "out", 7, 1, 0, 5))
    assert nested["b"].consumers == (Slot("fc", "in", 192, 64, 0, 4),)
    unet = trace(zoo.UNet(), x8)
    assert slots(unet["down2.0"], "consumers") == {"mid.0.in", "dec2.0.in@4"}


@pytest.mark.parametrize("kind", ["torch", "hand", "fused"])
def test_attention_heads_and_hidden_units_of_a_transformer(kind):
    groups = trace(zoo.ViT(kind), x8)
    heads = "blocks.0.attn.heads" if kind == "torch" else "blocks.0.attn.qkv"
    assert groups[heads].width == 4
    assert groups[heads].producers[0].block == 4
    assert groups["blocks.0.mlp.0"].width == 32
    assert groups["patch"].width == 16
    assert "LayerNorm 'blocks.0.norm1' normalises over all of it" in groups["patch"].frozen
    if kind != "torch":
        assert groups[heads].attributes[0].name == "num_heads"


def test_a_residual_stream_without_norms_carries_bare_parameters_along():
    groups = trace(zoo.NormFreeViT(), x8)
    assert groups["patch"].frozen is None
    assert slots(groups["patch"], "followers") == {"cls.dim2", "pos.dim2", "gamma.dim0"}


def test_sizes_written_out_freeze_with_the_reason():
    groups = trace(zoo.ViT("hard"), x8)
    assert "writes sizes out in 'reshape' of 'blocks.0.attn'" in groups["blocks.0.attn.qkv"].frozen
    assert trace(zoo.Written(), x8)["conv2"].frozen is None
    written = trace(zoo.Written(True), x8)
    assert "'view' of 'the model'" in written["conv2"].frozen
    assert written["conv1"].frozen is None
    assert "writes sizes out" in trace(zoo.Shuffle(), x8)["a"].frozen


class Odd(nn.Module):
    def __init__(self, operation) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
        self.operation = operation

    def forward(self, x):
        return self.b(self.operation(self.a(x)))


def scaled_by_width(x):
    return x * x.shape[1] ** -0.5


@pytest.mark.parametrize(
    ("operation", "reason"),
    [
        (lambda x: torch.einsum("bchw,bdhw->bchw", x, x), "the operation 'einsum' is not known"),
        (lambda x: x.softmax(1), "'softmax' mixes it"),
        (lambda x: x - x.mean(1, keepdim=True), "'mean' mixes it"),
        (lambda x: x + torch.ones(1, 4, 1, 1), "a constant made in the forward pass has its size"),
        (lambda x: x + x.new_ones(1, 4, 1, 1), "the operation 'new_ones' is not known"),
        (lambda x: F.pad(x, (0, 0, 0, 0, 1, 1))[:, 1:-1], "'pad' works along its channels"),
        (scaled_by_width, "writes sizes out in 'size'"),
        (lambda x: x.flip(1), None),
        (lambda x: F.normalize(x, dim=1), "'normalize' mixes it"),
        (lambda x: torch.cat(x.chunk(2, 1)[::-1], 1), "writes sizes out in 'chunk'"),
        (nn.LocalResponseNorm(2), "module 'operation' of type LocalResponseNorm is not known"),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)), "module 'operation'"),
        (nn.LayerNorm([4, 8, 8]), "LayerNorm 'operation' normalises over all of it"),
    ],
)
def test_what_is_not_exact_is_frozen_with_the_reason(operation, reason):
    frozen = trace(Odd(operation), x8)["a"].frozen
    assert frozen is None if reason is None else reason in frozen


def test_what_is_added_to_the_input_and_what_shares_weights_is_frozen():
    class ToInput(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 2, 1)

        def forward(self, x):
            return self.b(x + self.a(x))

    assert trace(ToInput(), x8)["a"].frozen == "is tied to the model's input"
    net = nn.Sequential(*(nn.Conv2d(c, 4, 1) for c in (3, 4, 4, 4)), nn.Conv2d(4, 2, 1))
    net[2].weight = net[1].weight
    groups = trace(net, x8)
    assert "shared" in groups["0"].frozen
    assert "shared" in groups["1"].frozen
    assert groups["3"].frozen is None


def test_a_module_called_twice_ties_its_calls():
    shared = nn.Conv2d(4, 4, 3, padding=1)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), shared, nn.ReLU(), shared, nn.Conv2d(4, 2, 1))
    groups = trace(net, x8)
    assert groups.widths() == {"0": 4}
    assert slots(groups["0"], "producers") == {"0.out", "1.out"}


def test_untraceable_models_get_a_helpful_error_and_opaque_modules_a_way_out():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Sequential(Branching()), nn.Conv2d(4, 2, 1))
    with pytest.raises(TraceError, match=r"cannot trace module '2.0' \(Branching\)(.|\n)*groups="):
        trace(net, x8)
    groups = trace(net, x8, opaque=["2.0"])
    assert groups.widths() == {"0": 4}
    assert "not looked into" in groups["1"].frozen
    with pytest.raises(TraceError, match="names no module"):
        trace(net, x8, opaque=["3.7"])
    with pytest.raises(TraceError, match=r"failed on the example of shapes \[\(2, 5, 8, 8\)\]"):
        trace(zoo.vgg(), torch.randn(2, 5, 8, 8))


def test_tracing_changes_neither_the_model_nor_the_random_state():
    model = zoo.ViT("hand").train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    trace(model, x8)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_signatures_tell_architectures_apart_and_nothing_else():
    first = trace(zoo.ResNet("basic", 4), x8).signature()
    assert first == trace(zoo.ResNet("basic", 4), torch.randn(1, 3, 16, 16)).signature()
    assert len({first, trace(zoo.ResNet("basic", 5), x8).signature(), trace(zoo.vgg(), x8).signature()}) == 3


def test_asserts_sliced_buffers_and_halves_do_not_stop_the_trace():
    groups = trace(zoo.Causal().bfloat16(), torch.randn(2, 5, 3).bfloat16())
    assert groups.widths() == {"q": 2}
    assert [slot.module for slot in groups["q"].producers] == ["q", "k", "v"]


def test_the_table_and_groups_made_by_hand():
    text = str(trace(zoo.UNet(), x8))
    assert text.splitlines()[0].split() == ["group", "width", "producers", "consumers", "followers", "frozen"]
    assert "dec2.0.in@4" in text
    assert "reaches the model's output" in text
    group = Group("a", 4, (Slot("a", "out", 0, 1, 0, 4),))
    with pytest.raises(GroupsError, match="two groups are named 'a'"):
        ChannelGroups((group, group))
    with pytest.raises(GroupsError, match="has 3 channels"):
        ChannelGroups((Group("a", 3, group.producers),))
