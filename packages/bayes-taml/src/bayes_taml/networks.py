"""Backbones that map rows to features, and normalisation by the statistics of the real rows of one task.

Running averages would mix tasks, and rows that only pad a support must not enter a statistic. Layers are told of both
by a context variable, so that a user's own module needs no extra arguments.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]
from torch.nn.modules.dropout import _DropoutNd  # pyright: ignore[reportPrivateUsage]

from shared_core.errors import InputError

__all__ = [
    "BackboneNotice",
    "BatchStatistics",
    "Block",
    "Modulated",
    "Pass",
    "StatefulNormError",
    "conv_features",
    "mlp_features",
    "running",
]

Norm = Literal["batch", "film", "group"]


class StatefulNormError(InputError):
    """A module keeps running statistics, which tasks would share."""


class BackboneNotice(UserWarning):
    """A layer of the module given was replaced."""


@dataclass(frozen=True, eq=False)
class Pass:
    """What one forward pass is told besides its input.

    Parameters
    ----------
    mask : ``(n,)`` rows that are real; None where all are
    statistics : mean and variance by the name of the normalisation, to use instead of the batch's own
    record : where normalisations leave the batch's mean and variance; None to keep nothing
    alone : the pass is of one task, not batched over several
    """

    mask: Bool[Tensor, " n"] | None = None
    statistics: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict[str, tuple[Tensor, Tensor]])
    record: dict[str, tuple[Tensor, Tensor]] | None = None
    alone: bool = False


_NOTHING = Pass()
_CURRENT: ContextVar[Pass] = ContextVar("bayes_taml_pass", default=_NOTHING)


@contextmanager
def running(told: Pass) -> Generator[None]:
    """Tell every layer inside.

    Parameters
    ----------
    told : of the pass
    """
    token = _CURRENT.set(told)
    try:
        yield
    finally:
        _CURRENT.reset(token)


_LARGE = 1 << 18
# Channels of images up to which a convolution is computed as a product with the patches; with three it gains nothing.
_FEW = 2
# Columns of an image up to which a byte holds a step to the corner across of a window.
_WIDE = 254


class _Moments(torch.autograd.Function):
    """Mean and population variance of each channel, by two passes.

    Twice differentiable by hand: a gradient is one affine map of each channel, where plain operations write half a
    dozen arrays of the input's size, and these are what second-order steps spend half of their time on.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        axes = (0, *range(2, x.dim()))
        mean = x.mean(axes)
        off = x - _channels(mean, x)
        return mean, off.mul_(off).mean(axes)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(inputs[0], output[0])

    @staticmethod
    def backward(ctx: Any, of_mean: Tensor, of_variance: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, mean = ctx.saved_tensors
        count = x.numel() // x.shape[1]
        slope = of_variance * (2 / count)
        return torch.addcmul(_channels(of_mean / count - slope * mean, x), x, _channels(slope, x))


class BatchStatistics(nn.Module):
    """Normalise channels by the batch's own mean and variance over its real rows, always; no running averages.

    Parameters
    ----------
    channels : of the input ``(n, channels, ...)``
    eps : added to the variance
    scale : learn a scale; the paper's network has a shift only
    shift : learn a shift
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, channels: int, *, eps: float = 1e-3, scale: bool = False, shift: bool = True) -> None:
        super().__init__()
        self.eps, self.name = eps, ""
        self.weight = nn.Parameter(torch.ones(channels)) if scale else None
        self.bias = nn.Parameter(torch.zeros(channels)) if shift else None

    def moments(self, x: Float[Tensor, "n channels ..."]) -> tuple[Tensor, Tensor]:
        """Return mean and population variance of each channel, ``(channels,)``, over real rows and all places."""
        told = _CURRENT.get()
        if self.name in told.statistics:
            return told.statistics[self.name]
        axes = (0, *range(2, x.dim()))
        if told.mask is None:
            # By hand where arrays are large; under ``vmap``, and on small ones, to call it costs more than it saves.
            if told.alone and x.numel() > _LARGE:
                mean, variance = cast("tuple[Tensor, Tensor]", _Moments.apply(x))
            else:
                mean = x.mean(axes)
                variance = (x - _channels(mean, x)).square().mean(axes)
        else:
            weight = told.mask.to(x.dtype).view(-1, *[1] * (x.dim() - 1))
            weight = weight / (weight.sum() * (x[0, 0].numel()))
            mean = (x * weight).sum(axes)
            variance = ((x - _channels(mean, x)).square() * weight).sum(axes)
        if told.record is not None:
            told.record[self.name] = (mean, variance)
        return mean, variance

    def normalise(self, x: Float[Tensor, "n channels ..."], moments: tuple[Tensor, Tensor]) -> Tensor:
        """Normalise by moments that are known.

        Parameters
        ----------
        x : the input
        moments : of :meth:`moments`
        """
        mean, variance = moments
        factor = torch.rsqrt(variance + self.eps)
        if self.weight is not None:
            factor = factor * self.weight
        offset = -mean * factor if self.bias is None else self.bias - mean * factor
        return torch.addcmul(_channels(offset, x), x, _channels(factor, x))

    def forward(self, x: Float[Tensor, "n channels ..."]) -> Float[Tensor, "n channels ..."]:
        """Normalise by the batch's own statistics, or those that the pass is told."""
        return self.normalise(x, self.moments(x))


def _channels(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *[1] * (x.dim() - 2))


class Block(nn.Module):
    """Convolution 3x3, normalisation, ReLU and 2x2 pooling.

    Without a negative scale, pooling first gives the same, and leaves a quarter of the work to the rest.

    Parameters
    ----------
    inputs, filters : channels in and out
    norm : ``batch`` with a shift only, as in the paper; ``film`` with a scale too, which the modulation acts on instead
        of on the convolution; ``group``
    """

    def __init__(self, inputs: int, filters: int, norm: Norm = "batch") -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, filters, 3, padding=1)
        self.norm: nn.Module = (
            nn.GroupNorm(min(8, filters), filters)
            if norm == "group"
            else BatchStatistics(filters, scale=norm == "film")
        )

    def forward(self, x: Float[Tensor, "n inputs height width"]) -> Float[Tensor, "n filters half_height half_width"]:
        """Map images to half their size."""
        y = _convolution(self.conv, x)
        norm = self.norm
        if isinstance(norm, BatchStatistics) and norm.weight is None:
            moments = norm.moments(y)
            return norm.normalise(_pool(y), moments).relu()
        return _pool(norm(y).relu())


def _by_hand(x: Tensor) -> bool:
    """Whether plain operations beat torch's own kernels where arrays are large: those of one task, on a CPU."""
    return _CURRENT.get().alone and x.device.type == "cpu"


def _convolution(conv: nn.Conv2d, x: Float[Tensor, "n inputs h w"]) -> Float[Tensor, "n filters h w"]:
    """Convolve 3x3 within a border of zeros.

    Few input channels, those of images, as a product with the patches: torch's kernel fills its vectors with channels,
    and its second derivative goes on to that of the images, which nobody asks for.
    """
    few = x.shape[1] <= _FEW and _by_hand(x)
    if conv.bias is None or not few or len(x) * conv.out_channels * x[0, 0].numel() <= _LARGE:
        return conv(x)
    weight = conv.weight.view(1, conv.out_channels, -1).expand(len(x), -1, -1)
    y = torch.baddbmm(conv.bias.view(1, -1, 1), weight, nn.functional.unfold(x, 3, padding=1))
    return y.view(len(x), conv.out_channels, *x.shape[2:])


def _pool(y: Float[Tensor, "n filters h w"]) -> Float[Tensor, "n filters half_h half_w"]:
    """Take the largest of each 2x2 window, the first in reading order where several are."""
    width, rows, columns = y.shape[-1], y.shape[-2] // 2, y.shape[-1] // 2
    if not (_by_hand(y) and y.numel() > _LARGE and width <= _WIDE):
        return nn.functional.max_pool2d(y, 2)
    with torch.no_grad():
        upper, lower = y[..., 0 : 2 * rows : 2, : 2 * columns], y[..., 1 : 2 * rows : 2, : 2 * columns]
        larger = torch.maximum(upper, lower)
        largest = torch.maximum(larger[..., 0::2], larger[..., 1::2])
        first, second, third = (
            (corner != largest).view(torch.uint8) for corner in (upper[..., 0::2], upper[..., 1::2], lower[..., 0::2])
        )
        # Corners in reading order are 0, 1, `width` and `width + 1` after the first one.
        after = first * (1 + second * (width - 1 + third))
        corner = torch.arange(rows).unsqueeze(1) * (2 * width) + torch.arange(columns) * 2
        winner = corner + after
    return y.flatten(-2).gather(-1, winner.flatten(-2)).view_as(winner)


def conv_features(
    *,
    channels: int = 1,
    size: int = 28,
    filters: int = 32,
    blocks: int = 4,
    norm: Norm = "batch",
    seed: int = 0,
    init: Literal["tf", "kaiming"] = "tf",
) -> nn.Sequential:
    """Build the paper's backbone, without a head.

    Parameters
    ----------
    channels, size : of the images
    filters : of each block
    blocks : how many; each halves the size, rounding down
    norm : see :class:`Block`
    seed : of the initial weights
    init : ``tf``, normal of deviation 0.02 cut at two deviations, as in the authors' code; ``kaiming``

    Raises
    ------
    InputError
        When the images are too small for so many blocks.

    Examples
    --------
    >>> conv_features(channels=3, size=32)(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 128])
    """
    if size < 1 << blocks:
        raise InputError(
            f"size: {blocks} blocks halve images {blocks} times, and those of {size} pixels vanish; use at least"
            f" {1 << blocks} pixels or fewer blocks"
        )
    made = {f"conv{k + 1}": Block(channels if k == 0 else filters, filters, norm) for k in range(blocks)}
    net = nn.Sequential(OrderedDict[str, nn.Module](**made, flatten=nn.Flatten()))
    _initialise(net, seed, init)
    return net


def mlp_features(
    *, inputs: int, hidden: Sequence[int] = (64, 64), seed: int = 0, init: Literal["tf", "kaiming"] = "kaiming"
) -> nn.Sequential:
    """Build a backbone for vectors: linear maps and ReLU.

    Parameters
    ----------
    inputs : length of the vectors
    hidden : width of each layer; the last is that of the features
    seed, init : see :func:`conv_features`
    """
    layers: list[nn.Module] = []
    for width_in, width in zip((inputs, *hidden), hidden, strict=False):
        layers += [nn.Linear(width_in, width), nn.ReLU()]
    net = nn.Sequential(*layers)
    _initialise(net, seed, init)
    return net


def _initialise(net: nn.Module, seed: int, init: Literal["tf", "kaiming"]) -> None:
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            if init == "tf":
                nn.init.trunc_normal_(module.weight, 0, 0.02, -0.04, 0.04, generator=generator)
            else:
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


Groups = Mapping[str, Sequence[str]] | Callable[[str], str]


class Modulated:
    """A backbone with the roles of its parameters: what tasks adapt, in which layers, and what they modulate.

    Parameters
    ----------
    backbone : any module that maps ``(n, *input_shape)`` to features ``(n, F)``; changed in place: batch norms with
        running statistics become :class:`BatchStatistics`, with a notice
    input_shape : of one row
    groups : layers with one step multiplier each: names of parameters by layer, or a function from name to layer.
        Default: the top-level submodules that own parameters
    norm : ``keep`` refuses batch norms with running statistics instead of replacing them

    Attributes
    ----------
    theta : names of adapted parameters
    layers : names of the layers, without the head
    layer_of : layer of each name in `theta`, a position in `layers`
    gains, shifts : names that the modulation multiplies and adds to, a value for each output channel
    features : F
    work : multiplications and additions for one row

    Raises
    ------
    StatefulNormError
        For running statistics with ``norm="keep"``.
    InputError
        When the module does not map such rows to features ``(n, F)``.
    """

    def __init__(
        self,
        backbone: nn.Module,
        input_shape: Sequence[int],
        *,
        groups: Groups | None = None,
        norm: Literal["replace", "keep"] = "replace",
    ) -> None:
        self.backbone = _stateless(backbone, replace=norm == "replace")
        self.input_shape = tuple(input_shape)
        norms = {name: module for name, module in backbone.named_modules() if isinstance(module, BatchStatistics)}
        for name, module in norms.items():
            module.name = name or "norm"
        outer = {f"{name}.{part}" if name else part for name in norms for part in ("weight", "bias")}
        named = {name: p for name, p in backbone.named_parameters() if p.requires_grad}
        self.theta = tuple(name for name in named if name not in outer)
        if not self.theta:
            raise InputError("the backbone has no parameters that could be adapted")
        self.layers, self.layer_of = _grouped(self.theta, groups)
        film = [name for name in named if name in outer and name.endswith("weight")]
        if film and all(m.weight is not None for m in norms.values()):
            self.gains = tuple(film)
            self.shifts = tuple(name for name in named if name in outer and name.endswith("bias"))
        else:
            self.gains = tuple(name for name in self.theta if named[name].dim() >= 2)
            self.shifts = tuple(name for name in self.theta if named[name].dim() == 1 and name.endswith("bias"))
        self._sizes = {name: int(named[name].shape[0]) for name in (*self.gains, *self.shifts)}
        self.features, self.work = self._probe()

    @property
    def modulated(self) -> int:
        """Number of gains and shifts."""
        return sum(self._sizes.values())

    def slices(self) -> dict[str, slice]:
        """Where each modulated parameter's values are in z: gains first, then shifts."""
        found: dict[str, slice] = {}
        at = 0
        for name in (*self.gains, *self.shifts):
            found[name] = slice(at, at + self._sizes[name])
            at += self._sizes[name]
        return found

    def modulate(
        self, parameters: Mapping[str, Tensor], z: Float[Tensor, "tasks channels"]
    ) -> dict[str, Float[Tensor, "tasks ..."]]:
        """Return the modulated parameters of each task: weights times ``1 + z``, biases plus ``z`` (section 3.1).

        Parameters
        ----------
        parameters : shared, by name
        z : a value for each gain and shift
        """
        found: dict[str, Tensor] = {}
        for name, at in self.slices().items():
            value = parameters[name]
            if name in self.gains:
                # One value for each OUTPUT channel, which is the first axis of a weight.
                found[name] = value * (1 + z[:, at]).view(len(z), -1, *[1] * (value.dim() - 1))
            else:
                found[name] = value + z[:, at]
        return found

    def call(self, parameters: Mapping[str, Tensor], x: Shaped[Tensor, "n ..."], told: Pass) -> Float[Tensor, "n F"]:
        """Map rows to features with other parameters; no state is read or written.

        Parameters
        ----------
        parameters : by name
        x : rows
        told : mask and statistics
        """
        with running(told):
            return torch.func.functional_call(self.backbone, dict(parameters), (x,))

    def _probe(self) -> tuple[int, int]:
        from torch.utils.flop_counter import FlopCounterMode

        first = next(self.backbone.parameters())
        x = torch.zeros((2, *self.input_shape), device=first.device, dtype=first.dtype)
        counter = FlopCounterMode(display=False)
        try:
            with torch.no_grad(), counter, running(_NOTHING):
                found: Any = self.backbone(x)
        except (RuntimeError, ValueError, IndexError) as error:
            message = str(error).splitlines()[0]
            raise InputError(f"the backbone fails on rows of shape {self.input_shape}: {message}") from error
        if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != 2:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise InputError(f"the backbone must map (n, ...) to features (n, F); 2 rows gave {shape}")
        return int(found.shape[1]), max(1, int(counter.get_total_flops()) // 4)


def _grouped(theta: Sequence[str], groups: Groups | None) -> tuple[tuple[str, ...], dict[str, int]]:
    if groups is None:
        of = {name: name.split(".")[0] if "." in name else "own" for name in theta}
    elif callable(groups):
        of = {name: groups(name) for name in theta}
    else:
        of = {name: layer for layer, names in groups.items() for name in names if name in theta}
        if missing := [name for name in theta if name not in of]:
            raise InputError(f"groups: no layer has the parameter '{missing[0]}'; every adapted one needs a layer")
    layers = tuple(dict.fromkeys(of[name] for name in theta))
    return layers, {name: layers.index(of[name]) for name in theta}


def _stateless(backbone: nn.Module, *, replace: bool) -> nn.Module:
    """Replace what cannot be batched over tasks, and say so."""
    if isinstance(backbone, _BatchNorm):
        raise StatefulNormError("the backbone is a batch norm and nothing else")
    for name, module in list(backbone.named_modules()):
        for key, child in list(module.named_children()):
            path = f"{name}.{key}" if name else key
            if isinstance(child, _BatchNorm):
                if not replace:
                    raise StatefulNormError(
                        f"{path}: {type(child).__name__} keeps running statistics, which all tasks would share; leave"
                        ' norm="replace" to normalise by each task\'s own, or use GroupNorm or LayerNorm'
                    )
                warnings.warn(
                    f"{path}: {type(child).__name__} now normalises by the batch's own statistics, always",
                    BackboneNotice,
                    stacklevel=4,
                )
                made = BatchStatistics(child.num_features, eps=child.eps, scale=child.affine, shift=child.affine)
                made.to(next(backbone.parameters()))
                if child.affine:
                    made.load_state_dict({k: v for k, v in child.state_dict().items() if k in ("weight", "bias")})
                setattr(module, key, made)
            elif isinstance(child, _DropoutNd) and child.p > 0:
                warnings.warn(f"{path}: {type(child).__name__} is left out", BackboneNotice, stacklevel=4)
                setattr(module, key, nn.Identity())
    for module in backbone.modules():
        if getattr(module, "inplace", False) is True:
            # In-place layers write to what other tasks read under vmap.
            cast("Any", module).inplace = False
    return backbone
