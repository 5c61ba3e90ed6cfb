"""Networks to prune, for images of 32 x 32 pixels unless said otherwise, and the user's own by ``module:attribute``.

All can be traced. ResNets and MobileNetV2 name their modules as torchvision does, so that its weights load.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Literal, ParamSpec, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from shared_core.device import seeded
from shared_core.errors import InputError, UnknownKeyError, no_such
from shared_core.objects import load_function, one_line

__all__ = [
    "NETWORKS",
    "build",
    "densenet",
    "factory",
    "mobilenetv2",
    "resnet18",
    "resnet20",
    "resnet50",
    "smallconv",
    "vgg19",
    "vit",
]

Stem = Literal["small", "imagenet"]
_P = ParamSpec("_P")


def _seeded(make: Callable[_P, nn.Module]) -> Callable[_P, nn.Module]:
    """Draw the weights by `seed` and leave torch's global random state alone."""

    @wraps(make)
    def made(*args: _P.args, **kwargs: _P.kwargs) -> nn.Module:
        seed = kwargs.get("seed", 0)
        with seeded(cast("int", seed)):
            return make(*args, **kwargs)

    return made


def _scaled(channels: int, width: float) -> int:
    if not 0 < width <= 64:
        raise InputError(f"width: must be above 0, a factor on all numbers of channels, got {width:g}")
    return max(1, round(channels * width))


@_seeded
def smallconv(
    num_classes: int = 10,
    in_channels: int = 3,
    width: float = 1.0,
    *,
    channels: Sequence[int] = (32, 64, 64),
    seed: int = 0,  # noqa: ARG001 (for _seeded)
) -> nn.Module:
    """Make blocks of convolution, batch norm, ReLU and pooling by 2, then the mean over positions and a linear head.

    Parameters
    ----------
    num_classes : logits
    in_channels : of the images, of at least ``2 ** len(channels)`` pixels a side
    width : factor on `channels`
    channels : of each block
    seed : of the weights

    Examples
    --------
    >>> smallconv(5, 1)(torch.rand(2, 1, 16, 16)).shape
    torch.Size([2, 5])
    """
    layers: list[nn.Module] = []
    entering = in_channels
    for own in channels:
        leaving = _scaled(own, width)
        layers += [
            nn.Conv2d(entering, leaving, 3, padding=1, bias=False),
            nn.BatchNorm2d(leaving),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
        ]
        entering = leaving
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(entering, num_classes))


_VGG19 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 256, 0, 512, 512, 512, 512, 0, 512, 512, 512, 512, 0)


@_seeded
def vgg19(num_classes: int = 10, in_channels: int = 3, width: float = 1.0, *, seed: int = 0) -> nn.Module:  # noqa: ARG001
    """Make a VGG-19 with batch norms and a single linear head.

    Parameters
    ----------
    num_classes : logits
    in_channels : of the images, of 32 x 32 pixels or more
    width : factor on all numbers of channels
    seed : of the weights
    """
    layers: list[nn.Module] = []
    entering = in_channels
    for own in _VGG19:
        if own:
            leaving = _scaled(own, width)
            layers += [
                _conv(entering, leaving, 3),
                nn.BatchNorm2d(leaving),
                nn.ReLU(inplace=True),
            ]
            entering = leaving
        else:
            layers.append(nn.MaxPool2d(2))
    features = nn.Sequential(*layers)
    _he(features)
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(entering, num_classes))


def _he(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _conv(cin: int, cout: int, size: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, size, stride, size // 2, groups=groups, bias=False)


def _shortcut(cin: int, cout: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and cin == cout:
        return None
    return nn.Sequential(_conv(cin, cout, 1, stride), nn.BatchNorm2d(cout))


class _Basic(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(cin, cout, 3, stride)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = _conv(cout, cout, 3)
        self.bn2 = nn.BatchNorm2d(cout)
        self.downsample = _shortcut(cin, cout, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(out)) + identity)


class _Bottleneck(nn.Module):
    """A 3 x 3 convolution of a quarter of the channels between two of 1 x 1, beside a shortcut."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        inner = max(1, cout // 4)
        self.conv1 = _conv(cin, inner, 1)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = _conv(inner, inner, 3, stride)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = _conv(inner, cout, 1)
        self.bn3 = nn.BatchNorm2d(cout)
        self.downsample = _shortcut(cin, cout, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = functional.relu(self.bn1(self.conv1(x)))
        out = functional.relu(self.bn2(self.conv2(out)))
        return functional.relu(self.bn3(self.conv3(out)) + identity)


class _ResNet(nn.Module):
    def __init__(
        self,
        block: type[_Basic | _Bottleneck],
        depths: Sequence[int],
        stem_width: int,
        widths: Sequence[int],
        num_classes: int,
        in_channels: int,
        stem: Stem,
    ) -> None:
        super().__init__()
        large = stem == "imagenet"
        self.conv1 = _conv(in_channels, stem_width, 7 if large else 3, 2 if large else 1)
        self.bn1 = nn.BatchNorm2d(stem_width)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
        entering = stem_width
        self.stages: list[str] = []
        for number, (depth, leaving) in enumerate(zip(depths, widths, strict=True), start=1):
            blocks: list[nn.Module] = []
            for k in range(depth):
                blocks.append(block(entering, leaving, 2 if number > 1 and k == 0 else 1))
                entering = leaving
            self.stages.append(f"layer{number}")
            self.add_module(self.stages[-1], nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(entering, num_classes)
        _he(self)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        x = self.maxpool(functional.relu(self.bn1(self.conv1(x))))
        for name in self.stages:
            x = self.get_submodule(name)(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _resnet(
    block: type[_Basic | _Bottleneck],
    depths: Sequence[int],
    stem_width: int,
    expansion: int,
    width: float,
    num_classes: int,
    in_channels: int,
    stem: Stem,
) -> nn.Module:
    if stem not in ("small", "imagenet"):
        raise InputError(f"stem: must be small (32 x 32 pixels) or imagenet, got '{stem}'")
    widths = [expansion * _scaled(stem_width * 2**k, width) for k in range(len(depths))]
    return _ResNet(block, depths, _scaled(stem_width, width), widths, num_classes, in_channels, stem)


@_seeded
def resnet18(
    num_classes: int = 10,
    in_channels: int = 3,
    width: float = 1.0,
    *,
    stem: Stem = "small",
    seed: int = 0,  # noqa: ARG001
) -> nn.Module:
    """Make a ResNet-18 (He et al. 2016).

    Parameters
    ----------
    num_classes : logits
    in_channels : of the images
    width : factor on all numbers of channels
    stem : ``small`` is one 3 x 3 convolution; ``imagenet`` divides the sides by 4 first
    seed : of the weights
    """
    return _resnet(_Basic, (2, 2, 2, 2), 64, 1, width, num_classes, in_channels, stem)


@_seeded
def resnet20(num_classes: int = 10, in_channels: int = 3, width: float = 1.0, *, seed: int = 0) -> nn.Module:  # noqa: ARG001
    """Make a ResNet-20 of 16, 32 and 64 channels (He et al. 2016), with projections where the width changes.

    Parameters
    ----------
    num_classes : logits
    in_channels : of the images
    width : factor on all numbers of channels
    seed : of the weights
    """
    return _resnet(_Basic, (3, 3, 3), 16, 1, width, num_classes, in_channels, "small")


@_seeded
def resnet50(
    num_classes: int = 10,
    in_channels: int = 3,
    width: float = 1.0,
    *,
    stem: Stem = "small",
    seed: int = 0,  # noqa: ARG001
) -> nn.Module:
    """Make a ResNet-50 (He et al. 2016), with the stride in the 3 x 3 convolutions.

    Parameters
    ----------
    num_classes, in_channels, width, stem, seed : as for `resnet18`
    """
    return _resnet(_Bottleneck, (3, 4, 6, 3), 64, 4, width, num_classes, in_channels, stem)


class _Inverted(nn.Module):
    """A depthwise convolution of more channels than enter and leave, beside a shortcut where both are as many."""

    def __init__(self, cin: int, cout: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = cin * expansion
        layers: list[nn.Module] = [] if expansion == 1 else [_conv_bn6(cin, inner, 1)]
        layers += [_conv_bn6(inner, inner, 3, stride, inner), _conv(inner, cout, 1), nn.BatchNorm2d(cout)]
        self.conv = nn.Sequential(*layers)
        self.shortcut = stride == 1 and cin == cout

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.shortcut else self.conv(x)


def _conv_bn6(cin: int, cout: int, size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(_conv(cin, cout, size, stride, groups), nn.BatchNorm2d(cout), nn.ReLU6(inplace=True))


_MOBILENET = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))


@_seeded
def mobilenetv2(
    num_classes: int = 10,
    in_channels: int = 3,
    width: float = 1.0,
    *,
    stem: Stem = "small",
    seed: int = 0,  # noqa: ARG001
) -> nn.Module:
    """Make a MobileNetV2 (Sandler et al. 2018).

    Parameters
    ----------
    num_classes : logits
    in_channels : of the images
    width : factor on all numbers of channels but the last layer's 1280, which only grows
    stem : ``small`` divides the sides by 8 in all; ``imagenet`` by 32
    seed : of the weights
    """
    if stem not in ("small", "imagenet"):
        raise InputError(f"stem: must be small (32 x 32 pixels) or imagenet, got '{stem}'")
    large = stem == "imagenet"
    strides = (1, 2 if large else 1, 2, 2, 1, 2, 1)
    entering, last = _scaled(32, width), _scaled(1280, max(1.0, width))
    layers: list[nn.Module] = [_conv_bn6(in_channels, entering, 3, 2 if large else 1)]
    for (expansion, channels, depth), stride in zip(_MOBILENET, strides, strict=True):
        leaving = _scaled(channels, width)
        for k in range(depth):
            layers.append(_Inverted(entering, leaving, 1 if k else stride, expansion))
            entering = leaving
    model = _MobileNetV2(nn.Sequential(*layers, _conv_bn6(entering, last, 1)), last, num_classes)
    _he(model)
    return model


class _MobileNetV2(nn.Module):
    def __init__(self, features: nn.Sequential, last: int, num_classes: int) -> None:
        super().__init__()
        self.features = features
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, num_classes))

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        return self.classifier(torch.flatten(functional.adaptive_avg_pool2d(self.features(x), 1), 1))


class _Dense(nn.Module):
    """Add `growth` channels to those that enter, computed from all of them."""

    def __init__(self, cin: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(cin)
        self.conv1 = _conv(cin, 4 * growth, 1)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = _conv(4 * growth, growth, 3)

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv1(functional.relu(self.norm1(x)))
        new = self.conv2(functional.relu(self.norm2(new)))
        return torch.cat([x, new], 1)


@_seeded
def densenet(
    num_classes: int = 10,
    in_channels: int = 3,
    width: float = 1.0,
    *,
    depths: Sequence[int] = (4, 4, 4),
    growth: int = 12,
    seed: int = 0,  # noqa: ARG001
) -> nn.Module:
    """Make a small DenseNet with bottlenecks and halving transitions (Huang et al. 2017).

    Parameters
    ----------
    num_classes : logits
    in_channels : of the images
    width : factor on `growth`
    depths : dense layers of each of the stages, between which the sides are halved
    growth : channels that each layer adds
    seed : of the weights
    """
    growth = _scaled(growth, width)
    channels = 2 * growth
    layers: list[nn.Module] = [_conv(in_channels, channels, 3)]
    for stage, depth in enumerate(depths):
        for _ in range(depth):
            layers.append(_Dense(channels, growth))
            channels += growth
        if stage + 1 < len(depths):
            layers += [
                nn.BatchNorm2d(channels),
                nn.ReLU(inplace=True),
                _conv(channels, channels // 2, 1),
                nn.AvgPool2d(2),
            ]
            channels //= 2
    layers += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(channels, num_classes))
    _he(model)
    return model


class _Encoder(nn.Module):
    """Attention and two linear layers, each behind a layer norm and beside a shortcut."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))


class _ViT(nn.Module):
    def __init__(
        self, num_classes: int, in_channels: int, dim: int, depth: int, heads: int, hidden: int, image: int, patch: int
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(in_channels, dim, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, (image // patch) ** 2, dim))
        self.blocks = nn.Sequential(*(_Encoder(dim, heads, hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(tokens)).mean(1))


@_seeded
def vit(
    num_classes: int = 10,
    in_channels: int = 3,
    width: float = 1.0,
    *,
    image_size: int = 32,
    patch: int = 4,
    depth: int = 6,
    heads: int = 4,
    seed: int = 0,  # noqa: ARG001
) -> nn.Module:
    """Make a small vision transformer (Dosovitskiy et al. 2021): norms first, the mean over patches at the end.

    Parameters
    ----------
    num_classes : logits
    in_channels : of the images
    width : factor on the 32 features of each head
    image_size : pixels a side
    patch : pixels a side of a patch
    depth : encoder layers
    heads : of each attention
    seed : of the weights
    """
    if image_size < patch or image_size % patch:
        raise InputError(f"patch: {patch} pixels do not divide a side of {image_size}")
    dim = heads * _scaled(32, width)
    return _ViT(num_classes, in_channels, dim, depth, heads, 2 * dim, image_size, patch)


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "smallconv": smallconv,
    "vgg19": vgg19,
    "resnet18": resnet18,
    "resnet20": resnet20,
    "resnet50": resnet50,
    "mobilenetv2": mobilenetv2,
    "densenet": densenet,
    "vit": vit,
}
"""The networks of this file by name."""


def factory(text: str) -> Callable[..., nn.Module]:
    """Return what makes a network.

    Parameters
    ----------
    text : one of `NETWORKS`, or the user's own; see `shared_core.objects.load_function`

    Returns
    -------
    A function or class; those of `NETWORKS` take ``num_classes``, ``in_channels`` and ``width``.

    Raises
    ------
    InputError
        When there is no such thing, or importing it fails.

    Examples
    --------
    >>> factory("resnet20")(num_classes=4).fc
    Linear(in_features=64, out_features=4, bias=True)
    """
    if text in NETWORKS:
        return NETWORKS[text]
    if ":" not in text:
        raise UnknownKeyError(f"{no_such('network', text, NETWORKS)}; your own is package.module:function")
    found = load_function(text)
    if isinstance(found, nn.Module):
        raise InputError(f"{text}: is a {type(found).__name__} already; name a function that makes a network")
    return found


def build(text: str, **options: object) -> nn.Module:
    """Make a network by `factory`, with those of the options that it takes.

    Parameters
    ----------
    text : see `factory`
    options : such as ``num_classes``, ``in_channels``, ``width`` and ``seed``

    Raises
    ------
    InputError
        When making it fails, or makes no `torch.nn.Module`.
    """
    make = factory(text)
    try:
        taken = inspect.signature(make).parameters.values()
    except (TypeError, ValueError):
        taken = []
    names = {p.name for p in taken if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    everything = any(p.kind is p.VAR_KEYWORD for p in taken)
    try:
        with seeded(int(cast("int", options.get("seed", 0)))):
            model = make(**{name: value for name, value in options.items() if everything or name in names})
    except InputError:
        raise
    except Exception as error:  # a user's function can raise anything
        raise InputError(f"{text} fails: {one_line(error)}") from error
    if not isinstance(cast("object", model), nn.Module):
        raise InputError(f"{text} returned a {type(model).__name__}; it must return a torch.nn.Module")
    return model
