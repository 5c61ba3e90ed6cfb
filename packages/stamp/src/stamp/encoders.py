"""Set encoders: from the instances of a set to what the network is shown to decide on its channels (spec 2.3).

``attention`` and ``pma`` make a few pseudo-instances of a set, mixtures of its instances; ``subsample`` draws some of
the instances; ``instances`` takes all as they are, so that the heads see how channels vary over the set.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional

from shared_core.errors import InputError
from stamp.drawing import drawn_linear

__all__ = ["Attention", "EncoderName", "Instances", "Pooling", "Subsample", "make_encoder"]

EncoderName = Literal["instances", "subsample", "attention", "pma"]

_SIDE = 8


def make_encoder(
    name: EncoderName, *, pseudo: int = 32, input_shape: Sequence[int] | None = None, generator: torch.Generator
) -> nn.Module:
    """Make an encoder by name.

    Parameters
    ----------
    name : ``instances``, ``subsample``, ``attention`` or ``pma``
    pseudo : instances to show; ``instances`` shows all of a set, whatever this is
    input_shape : of one input, ``(channels, height, width)`` or ``(features,)``; ``attention`` and ``pma`` need it
    generator : of the initial parameters

    Returns
    -------
    A module that takes ``(set, *input_shape)`` and a generator or None, and returns ``(r, *input_shape)``.

    Raises
    ------
    InputError
        For an unknown name, or no shape where it is needed.

    Examples
    --------
    >>> encoder = make_encoder("attention", pseudo=4, input_shape=(1, 8, 8), generator=torch.Generator())
    >>> encoder(torch.rand(10, 1, 8, 8), None).shape
    torch.Size([4, 1, 8, 8])
    """
    if pseudo < 1:
        raise InputError(f"pseudo: must be at least 1, got {pseudo}")
    if name == "instances":
        return Instances()
    if name == "subsample":
        return Subsample(pseudo)
    if name not in ("attention", "pma"):
        raise InputError(f"encoder: must be instances, subsample, attention or pma, got '{name}'")
    if input_shape is None:
        raise InputError(f"encoder: '{name}' needs input_shape=, the shape of one input, e.g. (3, 32, 32)")
    kind = Attention if name == "attention" else Pooling
    return kind(tuple(input_shape), pseudo, generator=generator)


class Instances(nn.Module):
    """Show the set as it is."""

    def forward(
        self,
        x: Float[Tensor, "set ..."],
        generator: torch.Generator | None = None,  # noqa: ARG002
    ) -> Float[Tensor, "set ..."]:
        """Return the set.

        Parameters
        ----------
        x : the set
        generator : not used
        """
        return x


class Subsample(nn.Module):
    """Show some instances of a set, without replacement: the ablation that encodes nothing.

    Parameters
    ----------
    pseudo : how many; a smaller set is shown whole
    """

    def __init__(self, pseudo: int) -> None:
        super().__init__()
        self.pseudo = pseudo

    def forward(
        self, x: Shaped[Tensor, "set ..."], generator: torch.Generator | None = None
    ) -> Shaped[Tensor, "r ..."]:
        """Draw instances.

        Parameters
        ----------
        x : the set
        generator : of the draw; without one, the first instances are shown
        """
        if generator is None:
            return x[: self.pseudo]
        chosen = torch.randperm(len(x), generator=generator, device=generator.device)[: self.pseudo]
        return x[chosen.to(x.device)]


class Attention(nn.Module):
    """Pseudo-instances that are convex mixtures of a set's instances, weighted by attention (spec 2.3).

    Its parameters do not depend on the size of images: keys are made of their reduction to at most 8 x 8.

    Parameters
    ----------
    input_shape : of one input, ``(channels, height, width)`` or ``(features,)``
    pseudo : pseudo-instances
    width : of keys and seeds
    generator : of the initial parameters
    """

    def __init__(
        self, input_shape: tuple[int, ...], pseudo: int, width: int = 64, *, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.keys = _Keys(input_shape, width, generator)
        self.seeds = nn.Parameter(0.3 * torch.randn(pseudo, width, generator=generator))

    def weights(self, x: Float[Tensor, "set ..."]) -> Float[Tensor, "r set"]:
        """Return the share of each instance in each pseudo-instance; rows sum to 1.

        Parameters
        ----------
        x : the set
        """
        keys = self.keys(x)
        return torch.softmax(self.seeds @ keys.T / math.sqrt(keys.shape[1]), dim=1)

    def forward(
        self,
        x: Float[Tensor, "set ..."],
        generator: torch.Generator | None = None,  # noqa: ARG002
    ) -> Float[Tensor, "r ..."]:
        """Mix the instances.

        Parameters
        ----------
        x : the set
        generator : not used
        """
        return torch.einsum("rb,b...->r...", self.weights(x).to(x), x)


class Pooling(nn.Module):
    """Pseudo-instances made by pooling with multi-head attention, as in the Set Transformer (spec 2.3).

    Parameters
    ----------
    input_shape : of one input
    pseudo : pseudo-instances
    width : of keys and seeds
    heads : into which the width is divided
    blocks : of attention within the set, before it is pooled
    generator : of the initial parameters

    References
    ----------
    Lee et al., "Set Transformer", ICML 2019, section 3.2.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        pseudo: int,
        width: int = 64,
        heads: int = 4,
        blocks: int = 0,
        *,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.shape = input_shape
        self.keys = _Keys(input_shape, width, generator)
        self.blocks = nn.ModuleList(_Block(width, heads, generator) for _ in range(blocks))
        self.pool = _Block(width, heads, generator)
        bound = math.sqrt(6 / (pseudo + width))
        self.seeds = nn.Parameter(torch.empty(pseudo, width).uniform_(-bound, bound, generator=generator))
        self.out = drawn_linear(width, math.prod(input_shape), generator)

    def forward(
        self,
        x: Float[Tensor, "set ..."],
        generator: torch.Generator | None = None,  # noqa: ARG002
    ) -> Float[Tensor, "r ..."]:
        """Pool the set.

        Parameters
        ----------
        x : the set
        generator : not used
        """
        z = self.keys(x)
        for block in self.blocks:
            z = block(z, z)
        return self.out(self.pool(self.seeds, z)).unflatten(1, self.shape).to(x)


class _Block(nn.Module):
    """Multi-head attention with the projected query as residual, and a residual layer after it."""

    def __init__(self, width: int, heads: int, generator: torch.Generator) -> None:
        super().__init__()
        if width % heads:
            raise InputError(f"heads: {heads} do not divide the width {width}")
        self.heads = heads
        self.query, self.key, self.value, self.out = (drawn_linear(width, width, generator) for _ in range(4))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, queries: Float[Tensor, "r width"], z: Float[Tensor, "set width"]) -> Float[Tensor, "r width"]:
        """Attend to the set."""
        q, k, v = (
            layer(t).unflatten(1, (self.heads, -1)).transpose(0, 1)
            for layer, t in ((self.query, queries), (self.key, z), (self.value, z))
        )
        # The scale is that of the whole width, not of a head's.
        attended = q + torch.softmax(q @ k.transpose(1, 2) / math.sqrt(z.shape[1]), dim=2) @ v
        pooled: Tensor = self.norms[0](attended.transpose(0, 1).flatten(1))
        return self.norms[1](pooled + functional.relu(self.out(pooled)))


class _Keys(nn.Module):
    """A vector for each instance: of images, made of their reduction to at most 8 x 8."""

    def __init__(self, input_shape: tuple[int, ...], width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.shape = input_shape
        self.sides = tuple(min(side, _SIDE) for side in input_shape[1:])
        entries = input_shape[0] * math.prod(self.sides)
        self.norm = nn.LayerNorm(entries)
        self.linear = drawn_linear(entries, width, generator)

    def forward(self, x: Float[Tensor, "set ..."]) -> Float[Tensor, "set width"]:
        """Reduce and project."""
        if x.shape[1] != self.shape[0] or x.dim() != len(self.shape) + 1:
            raise InputError(f"the set encoder was made for inputs {self.shape}, and got {tuple(x.shape[1:])}")
        x = x.to(self.linear.weight)
        match self.sides:
            case (length,):
                x = functional.adaptive_avg_pool1d(x, length)
            case (height, width):
                x = functional.adaptive_avg_pool2d(x, (height, width))
            case (depth, height, width):
                x = functional.adaptive_avg_pool3d(x, (depth, height, width))
            case _:
                pass
        return self.linear(self.norm(x.flatten(1)))
