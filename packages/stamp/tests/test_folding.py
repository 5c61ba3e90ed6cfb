from __future__ import annotations

import pytest
import torch
import zoo
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from stamp.folding import FoldError, fold_bn
from stamp.surgery import cut

BATCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def norms(model):
    return sum(isinstance(module, BATCH) for module in model.modules())


# How many norms follow something other than a convolution of their own.
LEFT = {
    "vgg": 1,
    "resnet": 0,
    "bottleneck": 0,
    "resnext": 0,
    "preact": 3,
    "densenet": 7,
    "mobilenet": 0,
    "unet": 0,
    "nested-cat": 1,
}


@pytest.mark.parametrize("name", LEFT)
def test_folding_changes_no_output(name):
    model, x = zoo.build(name)
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    folded = fold_bn(model)
    assert model.training
    assert not folded.training
    assert type(folded) is type(model)
    assert norms(folded) == LEFT[name] <= norms(model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    model.eval()
    with torch.no_grad():
        assert float((folded(x) - model(x)).abs().max()) <= 1e-10 * float(1 + model(x).abs().max())


def test_a_cut_network_folds_too():
    model, x, groups = zoo.traced("resnet")
    small = cut(model, groups, zoo.random_keep(groups, 0))
    with torch.no_grad():
        assert torch.allclose(fold_bn(small)(x), small(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("conv", "norm", "shape"),
    [
        (lambda bias: nn.Conv1d(2, 4, 3, groups=2, bias=bias), nn.BatchNorm1d, (2, 2, 9)),
        (lambda bias: nn.Conv3d(2, 4, 2, bias=bias), nn.BatchNorm3d, (2, 2, 4, 4, 4)),
        (lambda bias: nn.ConvTranspose2d(2, 4, 3, stride=2, bias=bias), nn.BatchNorm2d, (2, 2, 5, 5)),
        (lambda bias: nn.ConvTranspose2d(2, 4, 3, groups=2, bias=bias), nn.BatchNorm2d, (2, 2, 5, 5)),
    ],
)
def test_every_kind_of_convolution(conv, norm, shape, bias, affine):
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(conv(bias), norm(4, affine=affine)).double().eval()
    for tensor in (*net.parameters(), net[1].running_mean):
        tensor.data.copy_(torch.randn(tensor.shape, generator=generator))
    net[1].running_var.copy_(torch.rand(4, generator=generator) + 0.5)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    folded = fold_bn(net)
    assert norms(folded) == int(isinstance(net[0], nn.ConvTranspose2d) and net[0].groups > 1)
    with torch.no_grad():
        assert torch.allclose(folded(x), net(x), rtol=1e-12, atol=1e-12)


class Twice(nn.Module):
    """A convolution whose output is also used as it is, one that is called twice, and two that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(3, 3, 1) for _ in range(4))
        self.d.weight = self.c.weight
        self.norms = nn.ModuleList(nn.BatchNorm2d(3, momentum=0.5) for _ in range(4))

    def forward(self, x):
        y = self.a(x)
        y = y + self.norms[0](y)
        y = self.norms[1](self.b(self.b(y)))
        return self.norms[3](self.d(self.norms[2](self.c(y))))


def test_what_is_used_elsewhere_too_is_left_alone():
    generator = torch.Generator().manual_seed(0)
    net = Twice().double()
    x = torch.randn(4, 3, 5, 5, generator=generator, dtype=torch.float64)
    net(x)
    net.eval()
    folded = fold_bn(net)
    assert norms(folded) == 4
    with torch.no_grad():
        assert torch.equal(folded(x), net(x))
    for odd in (
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
        nn.Sequential(weight_norm(nn.Conv2d(3, 4, 1)), nn.BatchNorm2d(4)),
    ):
        assert norms(fold_bn(odd)) == 1


class Deciding(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_what_cannot_be_traced_is_refused():
    with pytest.raises(FoldError, match=r"torch\.fx cannot trace the model") as caught:
        fold_bn(Deciding())
    assert "\n" not in str(caught.value)
