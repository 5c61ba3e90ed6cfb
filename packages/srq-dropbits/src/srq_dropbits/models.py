"""Float networks to start from: the papers' LeNet-5 and VGG-7, small ones of other kinds, and the user's own.

All are plain modules in the order convolution, batch norm, ReLU, which quantizes well and exports exactly: batch norm
folds into the scales of the integers before it. ``build`` makes one from a short text, as command lines need it.
"""

from __future__ import annotations

import inspect
import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from shared_core.device import seeded
from shared_core.errors import DAMAGE, InputError, UnknownKeyError, no_such
from shared_core.objects import load_function, one_line

__all__ = [
    "MLP",
    "VGG7",
    "DigitsCNN",
    "LeNet5",
    "MobileNetSmall",
    "ResNetSmall",
    "TransformerSmall",
    "build",
    "load_weights",
]

Shape = tuple[int, ...]


def _image(shape: Sequence[int], name: str, smallest: int) -> tuple[int, int, int]:
    if len(shape) != 3 or min(shape[1:]) < smallest:
        raise InputError(
            f"model '{name}' needs images (channels, height, width) of at least {smallest} x {smallest} pixels,"
            f" and a row has shape {tuple(shape)}; give images, or take model 'mlp'"
        )
    channels, height, width = shape
    return channels, height, width


def _wide(channels: int, width: float | int) -> int:
    return max(1, round(channels * width))


def _conv(before: int, after: int, size: int = 3, *, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Return convolution, batch norm and ReLU; the batch norm has the bias."""
    convolution = nn.Conv2d(before, after, size, stride, padding=size // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(after), nn.ReLU()]


class DigitsCNN(nn.Sequential):
    """A small convolutional network for small images: 16C3-32C3-MP2-64FC-softmax with batch norm.

    Parameters
    ----------
    shape : (channels, height, width) of an image
    classes : numbers it returns
    width : factor on the numbers of channels and hidden units

    Examples
    --------
    >>> DigitsCNN((1, 8, 8), 10)(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """

    def __init__(self, shape: Sequence[int], classes: int, width: float | int = 1.0) -> None:
        channels, height, across = _image(shape, "digits-cnn", 2)
        first, second, hidden = _wide(16, width), _wide(32, width), _wide(64, width)
        super().__init__(
            *_conv(channels, first),
            *_conv(first, second),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(second * (height // 2) * (across // 2), hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, classes),
        )


class LeNet5(nn.Sequential):
    """The papers' network for MNIST: 32C5-MP2-64C5-MP2-512FC-softmax, without batch norm (RQ, section 4.1).

    Convolutions of images of at least 16 pixels are not padded, as in the original; smaller images are.

    Parameters
    ----------
    shape : (channels, height, width) of an image
    classes : numbers it returns
    width : factor on the numbers of channels and hidden units; 0.25 is the slim one of the tests

    Examples
    --------
    >>> sum(p.numel() for p in LeNet5((1, 28, 28), 10).parameters())
    582026
    """

    def __init__(self, shape: Sequence[int], classes: int, width: float | int = 1.0) -> None:
        channels, height, across = _image(shape, "lenet5", 4)
        padding = 0 if min(height, across) >= 16 else 2

        def remaining(side: int) -> int:
            return ((side - 4 + 2 * padding) // 2 - 4 + 2 * padding) // 2

        first, second, hidden = _wide(32, width), _wide(64, width), _wide(512, width)
        super().__init__(
            nn.Conv2d(channels, first, 5, padding=padding),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(first, second, 5, padding=padding),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(second * remaining(height) * remaining(across), hidden),
            nn.ReLU(),
            nn.Linear(hidden, classes),
        )


class VGG7(nn.Sequential):
    """The papers' network for CIFAR-10: 2x128C3-MP2-2x256C3-MP2-2x512C3-MP2-1024FC-softmax with batch norm (RQ, 4.1).

    Parameters
    ----------
    shape : (channels, height, width) of an image
    classes : numbers it returns
    width : factor on the numbers of channels and hidden units

    Examples
    --------
    >>> VGG7((3, 32, 32), 10, width=0.125)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(self, shape: Sequence[int], classes: int, width: float | int = 1.0) -> None:
        channels, height, across = _image(shape, "vgg7", 8)
        layers: list[nn.Module] = []
        for wide in (128, 256, 512):
            after = _wide(wide, width)
            layers += [*_conv(channels, after), *_conv(after, after), nn.MaxPool2d(2)]
            channels = after
        hidden = _wide(1024, width)
        super().__init__(
            *layers,
            nn.Flatten(),
            nn.Linear(channels * (height // 8) * (across // 8), hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, classes),
        )


class _Residual(nn.Module):
    """Two convolutions beside a shortcut; the sum is an ordinary one, or on one shared grid."""

    def __init__(self, before: int, after: int, stride: int, shared_add: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(*_conv(before, after, stride=stride), *_conv(after, after)[:2])
        same = stride == 1 and before == after
        self.shortcut = nn.Identity() if same else nn.Sequential(*_conv(before, after, 1, stride=stride)[:2])
        self.add: nn.Module | None = None
        if shared_add:
            from srq_dropbits.layers import ResidualAdd

            self.add = ResidualAdd()
        self.relu = nn.ReLU()

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c2 h2 w2"]:
        branch, short = self.body(x), self.shortcut(x)
        return self.relu(branch + short if self.add is None else self.add(branch, short))


class ResNetSmall(nn.Sequential):
    """A residual network of three stages of one block each.

    Parameters
    ----------
    shape : (channels, height, width) of an image
    classes : numbers it returns
    width : factor on the numbers of channels: 16, 32 and 64
    shared_add : sum branches by ``ResidualAdd``, which puts both on one grid so that integers add

    Examples
    --------
    >>> ResNetSmall((3, 16, 16), 10)(torch.zeros(2, 3, 16, 16)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self, shape: Sequence[int], classes: int, width: float | int = 1.0, *, shared_add: bool = False
    ) -> None:
        channels, _, _ = _image(shape, "resnet", 4)
        first, second, third = (_wide(channels, width) for channels in (16, 32, 64))
        super().__init__(
            *_conv(channels, first),
            _Residual(first, first, 1, shared_add),
            _Residual(first, second, 2, shared_add),
            _Residual(second, third, 2, shared_add),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(third, classes),
        )


class MobileNetSmall(nn.Sequential):
    """Four depthwise separable convolutions behind an ordinary one: the kind that low bits hurt most.

    Parameters
    ----------
    shape : (channels, height, width) of an image
    classes : numbers it returns
    width : factor on the numbers of channels

    Examples
    --------
    >>> MobileNetSmall((1, 8, 8), 10)(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """

    def __init__(self, shape: Sequence[int], classes: int, width: float | int = 1.0) -> None:
        channels, _, _ = _image(shape, "mobilenet", 4)
        before = _wide(16, width)
        layers = _conv(channels, before)
        for wide, stride in ((32, 1), (64, 2), (64, 1), (128, 2)):
            after = _wide(wide, width)
            layers += [*_conv(before, before, stride=stride, groups=before), *_conv(before, after, 1)]
            before = after
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))


class TransformerSmall(nn.Module):
    """A transformer encoder over the rows of an image, or over its square patches.

    Parameters
    ----------
    shape : (channels, height, width) of an image
    classes : numbers it returns
    patch : side of a patch, which must divide both sides of the image; None takes whole rows
    width : numbers in a token
    heads : attention heads, a divisor of ``width``
    layers : encoder layers

    Examples
    --------
    >>> TransformerSmall((1, 8, 8), 10, patch=4)(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        shape: Sequence[int],
        classes: int,
        patch: int | None = None,
        *,
        width: int = 32,
        heads: int = 4,
        layers: int = 2,
    ) -> None:
        super().__init__()
        channels, height, across = _image(shape, "transformer", 2)
        high, wide = (1, across) if patch is None else (patch, patch)
        if high < 1 or height % high or across % wide:
            raise InputError(
                f"model 'transformer:{patch}': images are {height} x {across}; the patch must divide both sides"
            )
        # A convolution whose stride is its size cuts patches and embeds them in one step.
        self.embed = nn.Conv2d(channels, width, (high, wide), stride=(high, wide))
        self.position = nn.Parameter(0.02 * torch.randn((height // high) * (across // wide), width))
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, batch_first=True),
            layers,
            enable_nested_tensor=False,
        )
        self.head = nn.Linear(width, classes)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n classes"]:
        """Return logits.

        Parameters
        ----------
        x : (n, c, h, w) images
        """
        tokens = self.embed(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.encoder(tokens).mean(1))


class MLP(nn.Sequential):
    """A multilayer perceptron with ReLU; rows of any shape are flattened.

    Parameters
    ----------
    shape : of a row
    classes : numbers it returns
    hidden : units of the hidden layers, as numbers or as text: ``"64,32"``

    Examples
    --------
    >>> MLP((13,), 3, "4")
    MLP(
      (0): Linear(in_features=13, out_features=4, bias=True)
      (1): ReLU()
      (2): Linear(in_features=4, out_features=3, bias=True)
    )
    """

    def __init__(self, shape: Sequence[int], classes: int, hidden: str | Sequence[int] = "64,32") -> None:
        sizes = _sizes(hidden) if isinstance(hidden, str) else [int(size) for size in hidden]
        if any(size < 1 for size in sizes):
            raise InputError(f"model 'mlp': hidden layers have at least one unit, got {hidden!r}")
        layers: list[nn.Module] = [nn.Flatten()] if len(shape) != 1 else []
        widths = [math.prod(shape), *sizes]
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
        super().__init__(*layers, nn.Linear(widths[-1], classes))


def _sizes(text: str) -> list[int]:
    try:
        return [int(size) for size in text.split(",") if size.strip()]
    except ValueError:
        raise InputError(f"model 'mlp:{text}': layer sizes are whole numbers, as in mlp:64,32") from None


def _scaled(factory: Callable[..., nn.Module], name: str) -> Callable[[Shape, int, str], nn.Module]:
    def make(shape: Shape, classes: int, options: str) -> nn.Module:
        return factory(shape, classes, _width(name, options))

    return make


def _width(name: str, text: str) -> float:
    try:
        width = float(text or 1)
    except ValueError:
        width = math.nan
    if not 0 < width <= 16:
        raise InputError(f"model '{name}:{text}': the width is a factor such as 0.5, up to 16")
    return width


def _resnet(shape: Shape, classes: int, options: str) -> nn.Module:
    words = [word.strip() for word in options.split(",") if word.strip()]
    numbers = [word for word in words if word != "shared"]
    width = _width("resnet", ",".join(numbers))
    return ResNetSmall(shape, classes, width, shared_add="shared" in words)


def _transformer(shape: Shape, classes: int, options: str) -> nn.Module:
    if options and not (options.isdecimal() and int(options)):
        raise InputError(f"model 'transformer:{options}': the patch is a whole number of pixels, as in transformer:4")
    return TransformerSmall(shape, classes, int(options) if options else None)


_MODELS: dict[str, Callable[[Shape, int, str], nn.Module]] = {
    "digits-cnn": _scaled(DigitsCNN, "digits-cnn"),
    "lenet5": _scaled(LeNet5, "lenet5"),
    "vgg7": _scaled(VGG7, "vgg7"),
    "resnet": _resnet,
    "mobilenet": _scaled(MobileNetSmall, "mobilenet"),
    "transformer": _transformer,
    "mlp": lambda shape, classes, options: MLP(shape, classes, options or "64,32"),
}


def build(spec: str, shape: Sequence[int], classes: int, seed: int = 0) -> nn.Module:
    """Build a model from a text.

    Parameters
    ----------
    spec : ``digits-cnn``, ``lenet5``, ``vgg7``, ``resnet``, ``mobilenet`` (all with a factor on their width after a
        colon: ``vgg7:0.25``; ``resnet:0.5,shared`` adds on a shared grid), ``transformer`` (``transformer:4``: patches
        of 4 x 4), ``mlp:64,32``, or a function of the user's, ``package.module:factory`` or ``file.py:factory``, which
        is called with those of ``in_shape``, ``classes`` and ``seed`` that it has as parameters
    shape : of a row: (channels, height, width), or (features,)
    classes : how many there are
    seed : of the initial weights; the global random state is left alone

    Returns
    -------
    The module, in training mode.

    Raises
    ------
    InputError
        When there is no such model, when it does not take such rows, or when the user's function fails.

    Examples
    --------
    >>> type(build("lenet5:0.5", (1, 28, 28), 10)).__name__
    'LeNet5'
    """
    name, _, options = spec.partition(":")
    with seeded(seed):
        if name in _MODELS:
            return _MODELS[name](tuple(shape), classes, options)
        if not options:
            raise UnknownKeyError(f"{no_such('network', name, _MODELS)}; your own is package.module:factory")
        known = {"in_shape": tuple(shape), "classes": classes, "seed": seed}
        model = _call(load_function(spec), known, spec)
    if not isinstance(model, nn.Module):
        raise InputError(f"{spec} returned a {type(model).__name__}; it must return a torch.nn.Module")
    return model.train()


def _call(factory: Callable[..., Any], known: Mapping[str, Any], name: str) -> Any:
    try:
        parameters = dict(inspect.signature(factory).parameters)
    except (TypeError, ValueError):
        parameters = {}
    needed = [
        parameter.name
        for parameter in parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and parameter.name not in known
    ]
    if needed:
        raise InputError(
            f"{name} needs '{needed[0]}', which is not known here; give it a default: a model's function is called"
            f" with those of {', '.join(known)} that it takes"
        )
    chosen = {key: value for key, value in known.items() if key in parameters}
    try:
        return factory(**chosen)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{name}({', '.join(chosen)}) fails: {one_line(error)}") from error


def load_weights(model: nn.Module, path: str | Path) -> nn.Module:
    """Load a state dict into a model.

    Parameters
    ----------
    model : whose parameters and buffers take the values
    path : ``.safetensors``, or ``.pt`` / ``.pth`` as ``torch.save`` writes a state dict, also inside
        ``{"state_dict": ...}`` or ``{"model": ...}`` and with the ``module.`` of data-parallel training before the
        names; pickles that would run code are refused

    Returns
    -------
    The model.

    Raises
    ------
    InputError
        When the file cannot be read, or names or shapes differ from the model's.
    """
    path = Path(path)
    state = _read_state(path)
    expected = model.state_dict()
    if not any(name in expected for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    # Old checkpoints lack it, and nothing but a momentum of None reads it.
    absent = [name for name in expected if name not in state and not name.endswith("num_batches_tracked")]
    unknown = [name for name in state if name not in expected]
    if absent or unknown:
        parts = [("lacks", absent), ("has", unknown)]
        text = " and ".join(f"{verb} {_some(names)}" for verb, names in parts if names)
        raise InputError(f"{path} {text}, unlike the model; give the model that the weights were saved from")
    for name, value in state.items():
        found, wanted = tuple(value.shape), tuple(expected[name].shape)
        if found != wanted:
            raise InputError(
                f"{path}: '{name}' has shape {found} and the model's has {wanted};"
                " give the model that the weights were saved from"
            )
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise InputError(f"{path}: '{name}' holds NaN or infinity; the training that wrote it diverged")
    model.load_state_dict(state, strict=False)
    return model


def _some(names: Sequence[str], most: int = 3) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"'{name}'" for name in names[:most]) + rest


def _read_state(path: Path) -> dict[str, Tensor]:
    if path.suffix not in {".safetensors", ".pt", ".pth"}:
        raise InputError(f"{path}: cannot tell what '{path.suffix}' is; give weights as .safetensors, .pt or .pth")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}; check the path") from error
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} is damaged, or holds more than tensors, which could run code; save model.state_dict() instead"
        ) from error
    except (SafetensorError, *DAMAGE) as error:
        raise InputError(f"{path}: not a readable {path.suffix} file ({one_line(error)}); is it damaged?") from error
    for key in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    tensors = cast("dict[Any, Any]", found) if isinstance(found, dict) else {}
    if not tensors or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in tensors.items()):
        raise InputError(f"{path} holds no state dict (names -> tensors); save model.state_dict()")
    return tensors
