from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from shared_core.errors import InputError
from stamp.counting import macs, parameters
from stamp.groups import trace
from stamp.networks import (
    NETWORKS,
    build,
    factory,
    mobilenetv2,
    resnet18,
    resnet20,
    resnet50,
    smallconv,
    vgg19,
    vit,
)
from stamp.surgery import cut, masked
from stamp.training import head_name

X = torch.zeros(1, 3, 32, 32)


def test_the_sizes_are_those_of_the_literature():
    assert (parameters(vgg19()), macs(vgg19(), X)) == (20_035_018, 398_136_320)
    assert (parameters(resnet18()), macs(resnet18(), X)) == (11_173_962, 555_422_720)
    # 0.27 million and 41 million in the paper, whose shortcuts have no parameters.
    shortcuts = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    assert parameters(resnet20()) - shortcuts == 269_722
    assert parameters(resnet18(1000, stem="imagenet")) == 11_689_512
    assert parameters(resnet50(1000, stem="imagenet")) == 25_557_032
    assert parameters(mobilenetv2(1000, stem="imagenet")) == 3_504_872


def test_the_work_of_large_images_is_that_of_the_literature():
    large = torch.zeros(1, 3, 224, 224)
    assert macs(resnet50(1000, stem="imagenet"), large) == 4_089_184_256
    assert macs(mobilenetv2(1000, stem="imagenet"), large) == 300_774_272


@pytest.mark.usefixtures("unchecked")  # for speed: shapes are checked by the others
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_is_traced_and_cut_exactly(name):
    # As narrow as its blocks allow: what is traced does not depend on the width.
    model = NETWORKS[name](7, 1, 0.125).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(0))
    x = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert model(x).shape == (2, 7)
    groups = trace(model, x)
    widths = groups.widths()
    assert len(widths) >= 3
    keep = {group: torch.arange(width) % 2 == 0 for group, width in widths.items()}
    small = cut(model, groups, keep)
    assert parameters(small) < parameters(model)
    assert (small(x) - masked(model, groups, keep)(x)).abs().max() <= 1e-10
    assert model.get_submodule(head_name(model)).out_features == 7


def test_all_convolutions_of_the_residual_networks_can_be_cut():
    for model in (resnet20(width=0.25), resnet50(width=0.125), mobilenetv2(width=0.25)):
        assert [group.name for group in trace(model, X).groups if group.frozen] == [head_name(model)]


def test_heads_and_hidden_units_of_the_transformer_can_be_cut():
    names = trace(vit(width=0.25), X).widths()
    assert {f"blocks.{k}.fc1" for k in range(6)} <= set(names)
    assert sum(width == 4 for width in names.values()) == 6


def test_weights_depend_on_the_seed_alone():
    before = torch.get_rng_state()
    one, same, other = smallconv(), smallconv(seed=0), smallconv(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one[0].weight, same[0].weight)
    assert not torch.equal(one[0].weight, other[0].weight)
    wide = smallconv(width=0.5, channels=(8, 16))
    assert [m.out_channels for m in wide if isinstance(m, nn.Conv2d)] == [4, 8]


def test_names_make_networks():
    assert factory("resnet18") is resnet18
    assert isinstance(factory("torch.nn:Linear")(3, 4), nn.Linear)
    model = build("smallconv", num_classes=4, in_channels=1, nonsense=3)
    assert model(torch.rand(1, 1, 8, 8)).shape == (1, 4)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("resnet8", "did you mean 'resnet18'"), ("", "names no|no network"), ("nosuchmodule:make", "cannot import"),
        ("torch.nn:Linaer", "did you mean 'Linear'"), ("torch:__version__", "not a function"), (":make", "names no"),
        ("torch:", "names no"),
    ],
)  # fmt: skip
def test_names_that_make_none(text, words):
    with pytest.raises(InputError, match=words) as caught:
        factory(text)
    assert "\n" not in str(caught.value)


def test_factories_in_the_current_folder_and_what_they_raise(tmp_path, monkeypatch):
    (tmp_path / "mynets.py").write_text(
        "from torch import nn\n"
        "def good(num_classes): return nn.Linear(3, num_classes)\n"
        "made = nn.Linear(3, 2)\n"
        "def wrong(): return 3\n"
        "def bad(): raise RuntimeError('two\\nlines')\n"
    )
    (tmp_path / "broken.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setitem(sys.modules, "mynets", None)
    monkeypatch.delitem(sys.modules, "mynets")
    assert str(build("mynets:good", num_classes=5, in_channels=1)) == "Linear(in_features=3, out_features=5, bias=True)"
    assert build("mynets.py:good", num_classes=5).out_features == 5
    for name, words in (
        ("mynets:made", "mynets:made: is a Linear already; name a function that makes a network"),
        ("mynets:wrong", "mynets:wrong returned a int; it must return a torch.nn.Module"),
        ("mynets:bad", "mynets:bad fails: RuntimeError: two lines"),
        ("broken:net", "broken:net: importing 'broken' fails: ZeroDivisionError: division by zero"),
    ):
        with pytest.raises(InputError) as caught:
            build(name)
        assert str(caught.value) == words


def test_options_out_of_range():
    for make, words in (
        (lambda: smallconv(width=0.0), "width"),
        (lambda: vit(patch=5), "do not divide"),
    ):
        with pytest.raises(InputError, match=words):
            make()
