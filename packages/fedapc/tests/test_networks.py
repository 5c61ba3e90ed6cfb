"""Networks against the paper's counts and loops by hand, and users' functions, good and bad."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional

from fedapc.decomposition import DecomposedModel, Layout, initial_base
from fedapc.networks import NETWORKS, SamePool, lenet, mlp, network, resnet18
from shared_core.errors import InputError, UnknownKeyError


def pooled(x, size, stride):
    """TensorFlow's max_pool with padding "same", one output after the other."""
    height, width = x.shape

    def windows(side):
        count = math.ceil(side / stride)
        short = max((count - 1) * stride + size - side, 0)
        return [range(max(0, k * stride - short // 2), min(side, k * stride - short // 2 + size)) for k in range(count)]

    return torch.tensor(
        [[max(float(x[r, c]) for r in rows for c in cols) for cols in windows(width)] for rows in windows(height)]
    )


@pytest.mark.parametrize("side", [(8, 8), (7, 7), (7, 8), (1, 5), (2, 3), (32, 16)])
@pytest.mark.parametrize(("size", "stride"), [(3, 2), (2, 2), (5, 3), (1, 2)])
def test_pooling_is_tensorflows_same(side, size, stride):
    x = torch.randn(2, 3, *side, generator=torch.Generator().manual_seed(1)) - 5
    found = SamePool(size, stride)(x)
    for image in range(2):
        for channel in range(3):
            assert torch.equal(found[image, channel], pooled(x[image, channel], size, stride))


def test_pooling_of_even_sides_pads_bottom_right_only():
    x = torch.randn(1, 2, 16, 16)
    assert torch.equal(SamePool()(x), functional.max_pool2d(functional.pad(x, (0, 1, 0, 1), value=-math.inf), 3, 2))
    assert repr(SamePool()) == "SamePool(3, 2)"


def test_lenet_has_the_papers_numbers():
    net = lenet()
    layout = Layout.of(net)
    assert layout.elements() == 2_986_500
    assert [math.prod(shape) for shape in layout.layers.values()] == [1_500, 25_000, 2_560_000, 400_000]
    assert layout.elements() * 4 == 11_946_000
    assert layout.head_inputs == 500
    assert net(torch.rand(2, 3, 32, 32)).shape == (2, 5)


def test_lenet_normalises_as_tensorflow_does():
    x = torch.rand(1, 20, 2, 2) * 30
    norm = next(part for part in lenet() if isinstance(part, nn.LocalResponseNorm))
    squares = functional.pad(x.square(), (0, 0, 0, 0, 4, 4))
    total = torch.stack([squares[:, k : k + 9].sum(1) for k in range(20)], 1)
    torch.testing.assert_close(norm(x), x / (1 + (0.001 / 9) * total) ** 0.75)


@pytest.mark.parametrize("side", [28, 16, 15, (20, 33), 4, 1])
def test_lenet_takes_other_sides(side):
    height, width = (side, side) if isinstance(side, int) else side
    net = lenet(channels=1, side=side, classes=7)
    x = torch.rand(3, 1, height, width)
    assert net(x).shape == (3, 7)
    assert list(net.children())[8](net[:8](x)).shape == (3, 50 * math.ceil(height / 4) * math.ceil(width / 4))


def test_resnet_is_resnet18():
    net = resnet18(channels=3, width=64)
    convolutions = [part for part in net.modules() if isinstance(part, nn.Conv2d)]
    assert len([part for part in convolutions if part.kernel_size == (3, 3)]) == 17
    assert len(convolutions) == 20
    # 11,173,962 with ten classes, batch norms and a CIFAR stem, as published ports have it.
    assert sum(value.numel() for value in resnet18(norm="batch", classes=10).parameters()) == 11_173_962
    assert sum(value.numel() for value in resnet18(norm="group", classes=10).parameters()) == 11_173_962


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_resnet_can_be_decomposed(norm):
    net = resnet18(channels=1, width=4, norm=norm)
    layout = Layout.of(net, norm="per-task" if norm == "batch" else "refuse")
    model = DecomposedModel(net, layout, initial_base(net, layout))
    model.begin(0, classes=3)
    assert len(layout.layers) == 20
    assert model(torch.rand(2, 1, 8, 8), task=0).shape == (2, 3)


@pytest.mark.parametrize("name", NETWORKS)
def test_names_make_networks_whose_head_is_the_last_layer(name):
    net = network(name, torch.rand(2, 1, 16, 16), classes=4)
    head = net.get_submodule(Layout.of(net).head)
    assert head is list(net.children())[-1]
    assert head.out_features == 4


def test_the_same_seed_makes_the_same_network_and_the_global_state_is_left_alone():
    example = torch.rand(2, 8)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, two, other = (network("mlp", example, 3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one[-1].weight, two[-1].weight)
    assert not torch.equal(one[-1].weight, other[-1].weight)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: mlp(0), "0 inputs"),
        (lambda: mlp(4, hidden=()), "hidden \\(\\)"),
        (lambda: lenet(side=0), "0 x 0 pixels"),
        (lambda: resnet18(width=0), "width 0"),
        (lambda: resnet18(norm="layer"), "choose group or batch"),
        (
            lambda: network("mlpp", torch.rand(2, 4), 2),
            "no network 'mlpp'; did you mean 'mlp'",
        ),
        (lambda: network("lenet", torch.rand(2, 4), 2), r"takes images \(channels, height, width\).*\(4,\)"),
        (
            lambda: network("no.such.module:net", torch.rand(2, 4), 2),
            r"cannot import 'no\.such\.module' \(ModuleNotFoundError",
        ),
        (lambda: network("math:cube", torch.rand(2, 4), 2), "'math' has no 'cube'"),
        (lambda: network("no/such.py:net", torch.rand(2, 4), 2), "there is no file no.such.py"),
    ],
)
def test_wrong_arguments_are_told(make, says, unchecked):
    with pytest.raises(InputError, match=says):
        make()


def test_unknown_names_are_key_errors():
    with pytest.raises(UnknownKeyError, match="there are mlp"):
        network("vgg", torch.rand(2, 4), 2)


MODULE = """
import torch
from torch import nn

def named(*, classes, input_shape, width=8):
    return nn.Sequential(nn.Flatten(), nn.Linear(input_shape[0] * input_shape[1], width), nn.Linear(width, classes))

def only_classes(classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Linear(5, classes))

def positional(shape, ways):
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.Linear(6, ways))

def plain(width=7):
    return nn.Sequential(nn.Flatten(), nn.Linear(12, width), nn.Linear(width, 2))

class Net(nn.Module):
    def __init__(self, classes=2):
        super().__init__()
        self.body, self.head = nn.Linear(12, 9), nn.Linear(9, classes)
    def forward(self, x):
        return self.head(self.body(x.flatten(1)).relu())

def three(a, b, c):
    return None

def nothing():
    return 3

def wrong_size():
    return nn.Sequential(nn.Flatten(), nn.Linear(99, 3), nn.Linear(3, 2))

def no_logits():
    return nn.Identity()

def fails(classes):
    raise RuntimeError("no\\nluck")
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(MODULE)
    return path


@pytest.mark.parametrize(
    ("function", "body", "classes"),
    [("named", 8, 5), ("only_classes", 5, 5), ("positional", 6, 5), ("plain", 7, 2), ("Net", 9, 5)],
)
def test_users_functions_get_what_they_ask_for(file, function, body, classes):
    net = network(f"{file}:{function}", torch.rand(4, 3, 4), classes=5)
    head = net.get_submodule(Layout.of(net).head)
    assert (head.in_features, head.out_features) == (body, classes)
    assert net.training


def test_users_modules_are_imported(file, monkeypatch):
    # Whatever is imported here is forgotten again: other tests have modules of that name.
    monkeypatch.setitem(sys.modules, "mine", None)
    monkeypatch.delitem(sys.modules, "mine")
    monkeypatch.syspath_prepend(str(file.parent))
    assert isinstance(network("mine:plain", torch.rand(4, 3, 4), classes=5), nn.Sequential)


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("three", "needs a, b, c; a function gets input_shape and classes by"),
        ("nothing", "returned a int, expected a torch.nn.Module"),
        ("wrong_size", r"does not take inputs of shape \(3, 4\): RuntimeError: .*99"),
        ("no_logits", r"of shape \(2, 3, 4\), expected logits"),
        ("fails", "cannot be made: RuntimeError: no luck"),
        ("plane", "has no 'plane'; did you mean 'plain'?"),
    ],
)
def test_users_functions_that_do_not_work_are_told_in_one_line(file, function, says):
    with pytest.raises(InputError, match=says) as caught:
        network(f"{file}:{function}", torch.rand(4, 3, 4), classes=5)
    assert "\n" not in str(caught.value)


def test_files_that_do_not_run_are_told_in_one_line(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("def net(:\n")
    with pytest.raises(InputError, match=r"running .*broken.py fails: SyntaxError") as caught:
        network(f"{path}:net", torch.rand(4, 3), classes=2)
    assert "\n" not in str(caught.value)
