"""Layers whose output is perturbed by learned noise, and the normalisation that goes with them.

Lee, Nam, Yang and Hwang, *Meta Dropout: Learning to Perturb Latent Features for Generalization*, ICLR 2020. The layers
follow the authors' released code; where a variant could only be recollected, its class says so.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Literal, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from meta_dropout.passes import current
from shared_core.errors import InputError

__all__ = [
    "NOISES",
    "BatchShift",
    "Noise",
    "PerturbedHead",
    "PerturbedLayer",
    "UnsupportedLayerError",
]

Noise = Literal[
    "none",
    "multiplicative",
    "deterministic",
    "more-params",
    "learned-variance",
    "fixed",
    "independent",
    "weight",
    "additive",
    "dropout",
    "information",
    "vib",
]
NOISES: tuple[str, ...] = get_args(Noise)
_GENERATED = frozenset(
    {"multiplicative", "deterministic", "more-params", "learned-variance", "additive", "information"}
)
_PLAIN = frozenset({"none", "vib"})
_MOST_INFORMATION_NOISE = 0.7
Main = nn.Conv1d | nn.Conv2d | nn.Linear


class UnsupportedLayerError(InputError):
    """A layer that cannot be perturbed, or cannot be batched over tasks; the message names it."""


def like(main: Main) -> Main:
    """Make a layer of the same kind and shape, with a bias: the noise path beside a main path."""
    if isinstance(main, nn.Linear):
        return nn.Linear(main.in_features, main.out_features, bias=True)
    return type(main)(
        main.in_channels,
        main.out_channels,
        main.kernel_size,  # pyright: ignore[reportArgumentType]
        main.stride,  # pyright: ignore[reportArgumentType]
        cast("tuple[int, ...]", main.padding),  # pyright: ignore[reportArgumentType]
        main.dilation,  # pyright: ignore[reportArgumentType]
        main.groups,
        bias=True,
    )


def _mixed(site: PerturbedLayer | PerturbedHead, h: Tensor) -> Tensor:
    found = current().mix.get(site.name)
    if found is None:
        return h
    weight, partner = found
    return weight * h + (1 - weight) * h[partner]


def _pay(penalty: Tensor) -> None:
    told = current()
    if told.penalties is not None:
        told.penalties.append(penalty)


def _leave(site: PerturbedLayer | PerturbedHead, h: Tensor, unit: Tensor) -> None:
    told = current()
    if told.shapes is not None:
        told.shapes[site.name] = tuple(unit.shape)
    if told.inputs is not None:
        told.inputs[site.name] = h


class PerturbedLayer(nn.Module):
    """A convolution or linear layer with noise on its output, before normalisation and activation.

    ``multiplicative``, the method: with main path ``mu = main(h)`` and noise path ``m = generator(h)`` of that shape,
    the output is ``mu * softplus(m + eps)`` where noise is given and ``mu * softplus(m)`` where it is not: the branch
    stays on. The generator is never adapted to a task.

    Parameters
    ----------
    main : the layer to perturb; it stays the same object, with its weights
    noise : which family, see :data:`NOISES`

        * ``deterministic``: the branch without noise (ablation; from memory)
        * ``more-params``: as that, its parameters adapted with the others (from memory)
        * ``learned-variance``: a second generator gives the noise's standard deviation (from memory)
        * ``fixed``: ``mu * softplus(eps)``, nothing learned (from memory)
        * ``independent``: ``mu * softplus(m + eps)`` with one learned `m` a unit, whatever the input (from memory)
        * ``weight``: Gaussian noise on the weights with a learned scale for each (from memory)
        * ``additive``: ``mu + softplus(m) * eps`` (inferred from summaries of the paper's later versions)
        * ``dropout``: ``mu`` or 0 at the given `rate`, scaled (Bernoulli dropout; a baseline)
        * ``information``: ``mu * exp(s eps)`` with ``s = 0.7 sigmoid(generator(h))``, and the penalty ``-log(s / 0.7)``
          (information dropout, Achille and Soatto, 2018; a baseline, adapted with the others; cap inferred)
        * ``none``, ``vib``: the main path
    rate : share of units that ``dropout`` drops

    Raises
    ------
    UnsupportedLayerError
        When `main` is no convolution and no linear layer.

    Examples
    --------
    >>> layer = PerturbedLayer(nn.Linear(4, 3))
    >>> layer.name = "first"
    >>> layer(torch.ones(2, 4)).shape
    torch.Size([2, 3])
    """

    def __init__(self, main: nn.Module, noise: Noise = "multiplicative", *, rate: float = 0.1) -> None:
        super().__init__()
        if noise not in NOISES:
            raise InputError(f"noise: '{noise}' is not one of {', '.join(NOISES)}")
        if not isinstance(main, nn.Conv1d | nn.Conv2d | nn.Linear):
            raise UnsupportedLayerError(
                f"cannot perturb a {type(main).__name__}: choose Conv1d, Conv2d or Linear layers as sites"
            )
        if not 0 <= rate < 1:
            raise InputError(f"rate: must be in [0, 1), got {rate}")
        self.main, self.noise, self.name, self.rate = main, noise, "", rate
        if noise in _GENERATED:
            self.generator = like(main)
        if noise == "learned-variance":
            self.spread = like(main)
        if noise == "weight":
            self.scale = nn.Parameter(torch.full_like(main.weight, -4.0))
        if noise == "independent":
            # One for each output channel or feature until `shape_units` has seen a batch.
            self.level = nn.Parameter(torch.zeros(main.weight.shape[0]))

    @property
    def sampled(self) -> bool:
        """Whether the family draws noise at all."""
        return self.noise not in _PLAIN and self.noise not in {"deterministic", "more-params"}

    def shape_units(self, output: tuple[int, ...]) -> None:
        """Give ``independent`` noise one level for each unit of an output ``(batch, ...)`` of this shape."""
        if self.noise == "independent":
            self.level = nn.Parameter(self.level.new_zeros(output[1:]))

    def forward(self, h: Tensor) -> Tensor:
        """Evaluate; noise, if any, is what :func:`meta_dropout.passes.running` was told under this site's name."""
        told = current()
        h = _mixed(self, h)
        eps = told.noise.get(self.name)
        if self.noise == "weight":
            return self._noisy_weights(h, eps)
        mu = self.main(h)
        _leave(self, h, mu)
        if self.noise in _PLAIN:
            return mu
        if self.noise == "dropout":
            if eps is None:
                return mu
            # A normal draw is below this with the probability `rate`.
            return mu * (eps > NormalDist().inv_cdf(max(self.rate, 1e-12))) / (1 - self.rate)
        if self.noise == "fixed":
            # Without noise the factor is softplus(0) for every unit, as for the other families the mean's softplus.
            return mu * (math.log(2.0) if eps is None else functional.softplus(eps))
        if self.noise == "independent":
            return mu * functional.softplus(self.level if eps is None else self.level + eps)
        mean = told.means.get(self.name)
        if mean is None:
            mean = self.generator(h)
        if self.noise == "information":
            share = torch.sigmoid(mean)
            _pay(-functional.logsigmoid(mean).mean())
            return mu if eps is None else mu * torch.exp(_MOST_INFORMATION_NOISE * share * eps)
        if self.noise == "additive":
            return mu if eps is None else mu + functional.softplus(mean) * eps
        if eps is None or not self.sampled:
            return mu * functional.softplus(mean)
        if self.noise == "learned-variance":
            eps = functional.softplus(self.spread(h)) * eps
        return mu * functional.softplus(mean + eps)

    def _noisy_weights(self, h: Tensor, eps: Tensor | None) -> Tensor:
        weight = self.main.weight if eps is None else self.main.weight + functional.softplus(self.scale) * eps
        if isinstance(self.main, nn.Linear):
            made = functional.linear(h, weight, self.main.bias)
        else:
            made = self.main._conv_forward(h, weight, self.main.bias)  # pyright: ignore[reportPrivateUsage]
        _leave(self, h, weight)
        return made


class PerturbedHead(nn.Module):
    """The last linear layer, with additive noise of one standard deviation for all classes.

    ``logits + softplus(w . h + b) * eps``; the one shared column keeps the generator free of the arbitrary order of an
    episode's classes, and lets it serve any number of them. Without noise the logits are the main path's, so the
    generator learns through the inner loop only.

    Parameters
    ----------
    main : the head
    noise : the additive noise is drawn for ``multiplicative``, ``learned-variance`` and ``additive``. ``vib`` is
        another head (variational information bottleneck, Alemi et al., 2017; a baseline): features become a draw
        from ``N(m(h), s(h)^2)``, or by ``m(h)`` without noise, and the inner loss pays for ``KL(. || N(0, I))``

    Examples
    --------
    >>> head = PerturbedHead(nn.Linear(8, 5))
    >>> head(torch.ones(2, 8)).shape, head.generator.weight.shape
    (torch.Size([2, 5]), torch.Size([1, 8]))
    """

    def __init__(self, main: nn.Linear, noise: Noise = "multiplicative") -> None:
        super().__init__()
        self.main, self.noise, self.name = main, noise, ""
        if noise == "vib":
            self.code = nn.Linear(main.in_features, 2 * main.in_features)
        elif self.sampled:
            self.generator = nn.Linear(main.in_features, 1)

    @property
    def sampled(self) -> bool:
        """Whether the family draws noise here."""
        return self.noise in {"multiplicative", "learned-variance", "additive", "vib"}

    def forward(self, h: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch ways"]:
        """Evaluate, with noise if there is any for this site."""
        h = _mixed(self, h)
        if self.noise == "vib":
            return self._bottleneck(h)
        logits = self.main(h)
        _leave(self, h, logits)
        eps = current().noise.get(self.name)
        if eps is None or not self.sampled:
            return logits
        return logits + functional.softplus(self.generator(h)) * eps

    def _bottleneck(self, h: Tensor) -> Tensor:
        mean, raw = self.code(h).chunk(2, dim=-1)
        # Little noise at the start, as everything else would be drowned.
        scale = functional.softplus(raw - 2)
        _leave(self, h, mean)
        _pay(0.5 * (mean.square() + scale.square() - 1 - 2 * scale.log()).sum(-1).mean())
        eps = current().noise.get(self.name)
        return self.main(mean if eps is None else mean + scale * eps)


class BatchShift(nn.Module):
    """Batch normalisation by the batch's own statistics, always, with a shift and no scale.

    Biased variance, ``eps = 1e-3``, no running averages: what the authors' code does in every pass. Statistics of
    another batch are used where :func:`meta_dropout.passes.running` was told some.

    Parameters
    ----------
    channels : of the input, its second axis
    eps : added to the variance

    Examples
    --------
    >>> BatchShift(3)(torch.randn(4, 3, 5, 5)).mean(dim=(0, 2, 3)).abs().max() < 1e-6
    tensor(True)
    """

    def __init__(self, channels: int, eps: float = 1e-3) -> None:
        super().__init__()
        self.shift, self.eps, self.name = nn.Parameter(torch.zeros(channels)), eps, ""

    def forward(self, h: Float[Tensor, "batch channels *space"]) -> Float[Tensor, "batch channels *space"]:
        """Normalise over everything but the channels."""
        told = current()
        known = told.statistics.get(self.name)
        if known is None:
            axes = [axis for axis in range(h.dim()) if axis != 1]
            mean = h.mean(axes)
            variance = (h - self._along(mean, h)).square().mean(axes)
            if told.record is not None:
                told.record[self.name] = mean, variance
        else:
            mean, variance = known
        scale = torch.rsqrt(variance + self.eps)
        return h * self._along(scale, h) + self._along(self.shift - mean * scale, h)

    @staticmethod
    def _along(values: Tensor, h: Tensor) -> Tensor:
        return values.view(-1, *[1] * (h.dim() - 2))
