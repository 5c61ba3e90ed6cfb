"""Networks by name: the paper's, two more, and a user's own function (spec 2.7).

The last linear layer of each is the head, of which every task gets its own.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional

from shared_core.device import seeded
from shared_core.errors import InputError, UnknownKeyError, no_such
from shared_core.objects import load_function, one_line

__all__ = ["NETWORKS", "SamePool", "lenet", "mlp", "network", "resnet18"]

Norm = Literal["group", "batch"]


def mlp(inputs: int, hidden: Sequence[int] = (128, 64), classes: int = 2) -> nn.Module:
    """Return fully connected layers with ReLU between them; inputs of any shape are flattened.

    Parameters
    ----------
    inputs : numbers an example
    hidden : units of the layers before the head, at least one layer: the head alone has nothing to share
    classes : of the head

    Raises
    ------
    InputError
        For no hidden layer, or numbers below 1.

    Examples
    --------
    >>> mlp(196, classes=5)(torch.rand(3, 1, 14, 14)).shape
    torch.Size([3, 5])
    """
    if not hidden or min(inputs, classes, *hidden) < 1:
        raise InputError(f"mlp: {inputs} inputs, hidden {tuple(hidden)}, {classes} classes; all have to be at least 1")
    sizes = (inputs, *hidden)
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], classes))


class SamePool(nn.Module):
    """Maximum over windows padded as TensorFlow's "same" does: what is short is split, the odd row goes to the end.

    Parameters
    ----------
    size : side of a window
    stride : between windows

    Examples
    --------
    >>> SamePool(3, 2)(torch.arange(4.0).view(1, 1, 1, 4))
    tensor([[[[2., 3.]]]])
    """

    def __init__(self, size: int = 3, stride: int = 2) -> None:
        super().__init__()
        self.size = size
        self.stride = stride

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels rows columns"]:
        """Pool every channel to ``ceil(side / stride)`` a side."""
        top, bottom = self._padding(x.shape[2])
        left, right = self._padding(x.shape[3])
        if any((top, bottom, left, right)):
            x = functional.pad(x, (left, right, top, bottom), value=-math.inf)
        return functional.max_pool2d(x, self.size, self.stride)

    def extra_repr(self) -> str:
        """Show the arguments."""
        return f"{self.size}, {self.stride}"

    def _padding(self, side: int) -> tuple[int, int]:
        short = max(0, (math.ceil(side / self.stride) - 1) * self.stride + self.size - side)
        return short // 2, short - short // 2


def lenet(channels: int = 3, side: int | tuple[int, int] = 32, classes: int = 5) -> nn.Module:
    """Return the network of the paper's experiments, 2,986,500 numbers in its body for 3 channels of 32 x 32.

    Two 5 x 5 convolutions of 20 and 50 channels, each with ReLU, local response normalisation and 3 x 3 pooling of
    stride 2, then layers of 800 and 500 units. Normalisation and padding are those of the authors' TensorFlow.

    Parameters
    ----------
    channels : of the images
    side : of the images in pixels, or height and width
    classes : of the head

    Raises
    ------
    InputError
        For numbers below 1.

    Examples
    --------
    >>> lenet(channels=1, side=28)(torch.rand(2, 1, 28, 28)).shape
    torch.Size([2, 5])
    """
    height, width = (side, side) if isinstance(side, int) else side
    if min(channels, height, width, classes) < 1:
        raise InputError(f"lenet: {channels} channels, {height} x {width} pixels, {classes} classes; at least 1 each")
    features = 50 * math.ceil(height / 4) * math.ceil(width / 4)

    def block(before: int, after: int) -> list[nn.Module]:
        # TensorFlow's depth_radius 4, alpha 0.001 / 9, bias 1: PyTorch divides alpha by the size.
        norm = nn.LocalResponseNorm(9, alpha=1e-3, beta=0.75, k=1.0)
        return [nn.Conv2d(before, after, 5, padding=2), nn.ReLU(), norm, SamePool(3, 2)]

    return nn.Sequential(
        *block(channels, 20),
        *block(20, 50),
        nn.Flatten(),
        nn.Linear(features, 800),
        nn.ReLU(),
        nn.Linear(800, 500),
        nn.ReLU(),
        nn.Linear(500, classes),
    )


class _Residual(nn.Module):
    def __init__(self, before: int, after: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.first_norm = _norm(after, norm)
        self.second = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.second_norm = _norm(after, norm)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), _norm(after, norm))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.first_norm(self.first(x)).relu()
        return (self.second_norm(self.second(inner)) + self.shortcut(x)).relu()


def resnet18(channels: int = 3, width: int = 64, norm: Norm = "group", classes: int = 5) -> nn.Module:
    """Return ResNet-18 for small images: a 3 x 3 stem without pooling, as for CIFAR.

    Parameters
    ----------
    channels : of the images
    width : channels of the first stage; later stages have 2, 4 and 8 times as many
    norm : ``group``, which keeps no statistics; ``batch``, which needs ``Layout.of(net, norm="per-task")``
    classes : of the head

    Raises
    ------
    InputError
        For another norm, or numbers below 1.

    Examples
    --------
    >>> resnet18(channels=1, width=4)(torch.rand(2, 1, 16, 16)).shape
    torch.Size([2, 5])
    """
    if norm not in ("group", "batch"):
        raise InputError(f"norm: '{norm}'; choose group or batch")
    if min(channels, width, classes) < 1:
        raise InputError(f"resnet18: {channels} channels, width {width}, {classes} classes; at least 1 each")
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1, bias=False), _norm(width, norm), nn.ReLU()]
    before = width
    for stage in range(4):
        after = width * 2**stage
        layers += [_Residual(before, after, 1 if stage == 0 else 2, norm), _Residual(after, after, 1, norm)]
        before = after
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))


def _norm(channels: int, norm: Norm) -> nn.Module:
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.GroupNorm(math.gcd(32, channels), channels)


def _mlp_for(shape: tuple[int, ...], classes: int) -> nn.Module:
    return mlp(math.prod(shape), classes=classes)


def _lenet_for(shape: tuple[int, ...], classes: int) -> nn.Module:
    channels, height, width = _image(shape, "lenet")
    return lenet(channels, (height, width), classes)


def _resnet_for(shape: tuple[int, ...], classes: int) -> nn.Module:
    return resnet18(_image(shape, "resnet18")[0], classes=classes)


NETWORKS: dict[str, Callable[[tuple[int, ...], int], nn.Module]] = {
    "mlp": _mlp_for,
    "lenet": _lenet_for,
    "resnet18": _resnet_for,
}
"""Functions of an example's shape and the number of classes, by the names that :func:`network` knows."""


def network(name: str, example: Shaped[Tensor, "batch ..."], classes: int, seed: int = 0) -> nn.Module:
    """Make a network by name, and try it on examples.

    Parameters
    ----------
    name : ``mlp``, ``lenet``, ``resnet18``; or a user's function, ``package.module:function`` or
        ``path/to/file.py:function``. Of its parameters those called ``input_shape`` (of one example, a tuple) and
        ``classes`` are given by name; one with two others that are required gets the two in this order; any other is
        called without arguments. A class of networks does too
    example : a few inputs, ``(batch, ...)``
    classes : of the head; every task gets a head of its own with its own number
    seed : of the weights that it is made with. The base is drawn by `fedapc.initial_base`

    Returns
    -------
    The network, whose outputs for the example are ``(batch, classes)``.

    Raises
    ------
    InputError
        When there is no such network, or it does not take the example, or is no classifier.

    Examples
    --------
    >>> network("mlp", torch.rand(2, 64), classes=5)[-1]
    Linear(in_features=64, out_features=5, bias=True)
    """
    shape = tuple(example.shape[1:])
    made = NETWORKS.get(name)
    with seeded(seed):
        net: Any = made(shape, classes) if made else _called(name, _found(name), shape, classes)
    if not isinstance(net, nn.Module):
        raise InputError(f"network '{name}': returned a {type(net).__name__}, expected a torch.nn.Module")
    mode = net.training
    try:
        with torch.no_grad():
            logits: Any = net.eval()(example[:2])
    except Exception as error:  # a user's network can raise anything
        raise InputError(f"network '{name}': does not take inputs of shape {shape}: {one_line(error)}") from error
    net.train(mode)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        got = f"of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise InputError(f"network '{name}': its output is {got}, expected logits (batch, classes)")
    return net


def _image(shape: tuple[int, ...], name: str) -> tuple[int, int, int]:
    if len(shape) != 3:
        raise InputError(f"network '{name}': takes images (channels, height, width), an example has the shape {shape}")
    return shape[0], shape[1], shape[2]


def _found(name: str) -> Callable[..., object]:
    if ":" not in name:
        known = no_such("network", name, NETWORKS)
        raise UnknownKeyError(f"{known}; your own is package.module:function or path/to/file.py:function")
    return load_function(name)


def _called(name: str, function: Callable[..., object], shape: tuple[int, ...], classes: int) -> object:
    given: dict[str, object] = {"input_shape": shape, "classes": classes}
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        parameters = []
    free = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    named = {p.name: given[p.name] for p in free if p.name in given and p.kind is not p.POSITIONAL_ONLY}
    missing = [p for p in free if p.default is p.empty and p.name not in named]
    positional = not named and len(missing) == 2 and all(p.kind is not p.KEYWORD_ONLY for p in missing)
    if missing and not positional:
        raise InputError(
            f"network '{name}': needs {', '.join(p.name for p in missing)}; a function gets input_shape and classes by"
            " these names, or has no parameters that are required"
        )
    try:
        return function(shape, classes) if positional else function(**named)
    except Exception as error:  # a user's function can raise anything
        raise InputError(f"network '{name}': cannot be made: {one_line(error)}") from error
