"""Stacks of independent networks that run as one: every layer of all members is one batched matrix product."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from cib_ite.settings import Settings

__all__ = ["CIBStack", "StackedMLP"]


class StackedMLP(nn.Module):
    """``stack`` multilayer perceptrons of the same shape with ELU between layers, evaluated together.

    Parameters
    ----------
    sizes : widths from input to output
    seeds : one for each network; a network's initial weights depend on its own seed only
    last_gain : factor on the initial weights of the last layer
    final_activation : apply ELU after the last layer as well

    Examples
    --------
    >>> StackedMLP((3, 8, 1), seeds=(0, 1))(torch.zeros(2, 5, 3)).shape
    torch.Size([2, 5, 1])
    """

    def __init__(
        self, sizes: Sequence[int], *, seeds: Sequence[int], last_gain: float = 1.0, final_activation: bool = False
    ) -> None:
        super().__init__()
        self.final_activation = final_activation
        weights: list[Tensor] = []
        for layer, (fan_in, fan_out) in enumerate(pairwise(sizes)):
            gain = last_gain if layer == len(sizes) - 2 else 1.0
            drawn = [np.random.default_rng([seed, layer]).standard_normal((fan_in, fan_out)) for seed in seeds]
            weights.append(torch.from_numpy(np.stack(drawn) * (gain / np.sqrt(fan_in))).to(torch.get_default_dtype()))
        self.weights = nn.ParameterList(weights)
        self.biases = nn.ParameterList([torch.zeros(len(seeds), 1, weight.shape[2]) for weight in weights])

    def forward(
        self, x: Float[Tensor, "stack rows inputs"], masks: Sequence[Tensor | None] | None = None
    ) -> Float[Tensor, "stack rows outputs"]:
        """Evaluate all networks.

        Parameters
        ----------
        x : ``(stack, rows, inputs)``
        masks : for each layer a factor on its inputs, or None; how dropout is done
        """
        last = len(self.weights) - 1
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            mask = None if masks is None else masks[layer]
            if mask is not None:
                x = x * mask
            x = torch.baddbmm(bias, x, weight)
            if layer < last or self.final_activation:
                x = nn.functional.elu_(x)
        return x


class CIBStack(nn.Module):
    """Encoder, two outcome heads and a discriminator, for a whole stack of members at once.

    Parameters
    ----------
    inputs : covariates
    settings : sizes and options
    seeds : one for each member

    Examples
    --------
    >>> stack = CIBStack(4, Settings(trunk=(8,), heads=(8,), latent=2), seeds=(0, 1, 2))
    >>> mean, scale = stack.encode(torch.zeros(3, 5, 4))
    >>> mean.shape, stack.outcomes(mean[:, :, None]).shape
    (torch.Size([3, 5, 2]), torch.Size([3, 2, 5, 1]))
    """

    def __init__(self, inputs: int, settings: Settings, *, seeds: Sequence[int]) -> None:
        super().__init__()
        self.settings = settings
        s, size = settings, len(seeds)
        trunk = (inputs, *s.trunk)
        self.encoder = StackedMLP(trunk, seeds=[4 * k for k in seeds], final_activation=True)
        width = trunk[-1]
        if not s.deterministic:
            # Two seeds a member, so that mean and scale start apart.
            self.projection = StackedMLP((width, 2 * s.latent), seeds=[4 * k + 1 for k in seeds])
            width = s.latent
        outputs = 2 if s.likelihood == "hetero" else 1
        # Arm a of member g is network 2 g + a of this stack.
        arms = [8 * k + 4 * arm + 2 for k in seeds for arm in (0, 1)]
        self.heads = StackedMLP((width, *s.heads, outputs), seeds=arms, last_gain=0.1)
        hidden = () if s.dragon else s.discriminator
        self.discriminator = StackedMLP((width, *hidden, 1), seeds=[4 * k + 3 for k in seeds])
        self.log_sigma = nn.Parameter(torch.zeros(size, 2))
        self.epsilon = nn.Parameter(torch.zeros(size))

    @property
    def size(self) -> int:
        """Number of members in the stack."""
        return self.log_sigma.shape[0]

    def encode(
        self, x: Float[Tensor, "stack rows inputs"], masks: Sequence[Tensor | None] | None = None
    ) -> tuple[Float[Tensor, "stack rows latent"], Float[Tensor, "stack rows latent"] | None]:
        """Return mean and scale of q(z|x), each ``(stack, rows, latent)``; scale is None where z is deterministic."""
        h = self.encoder(x, masks)
        if self.settings.deterministic:
            if self.settings.normalize:
                h = h / h.square().sum(-1, keepdim=True).clamp(min=1e-10).sqrt()
            return h, None
        mean, rho = self.projection(h).chunk(2, dim=-1)
        return mean, nn.functional.softplus(rho - 2) + 1e-3

    def outcomes(
        self, z: Float[Tensor, "stack rows samples latent"], masks: Sequence[Tensor | None] | None = None
    ) -> Float[Tensor, "stack 2 rows samples"]:
        """Mean outcome (standardised), or logit, in both arms: ``(stack, 2, rows, samples)``."""
        return self.raw_outcomes(z, masks)[..., 0]

    def raw_outcomes(
        self, z: Float[Tensor, "stack rows samples latent"], masks: Sequence[Tensor | None] | None = None
    ) -> Float[Tensor, "stack 2 rows samples outputs"]:
        """All outputs of both heads for the *same* z, ``(stack, 2, rows, samples, outputs)``."""
        g, rows, samples, latent = z.shape
        both = z.reshape(g, 1, rows * samples, latent).expand(g, 2, rows * samples, latent).reshape(2 * g, -1, latent)
        return self.heads(both, masks).view(g, 2, rows, samples, -1)

    def arm_outcomes(
        self, arm: int, z: Float[Tensor, "stack rows samples latent"]
    ) -> Float[Tensor, "stack rows samples outputs"]:
        """All outputs of one arm's heads, ``(stack, rows, samples, outputs)``."""
        g, rows, samples, latent = z.shape
        x = z.reshape(g, rows * samples, latent)
        last = len(self.heads.weights) - 1
        for layer, (weight, bias) in enumerate(zip(self.heads.weights, self.heads.biases, strict=True)):
            x = torch.baddbmm(bias[arm::2], x, weight[arm::2])
            if layer < last:
                x = nn.functional.elu_(x)
        return x.view(g, rows, samples, -1)

    def treatment_logit(self, z: Float[Tensor, "stack rows latent"]) -> Float[Tensor, "stack rows"]:
        """Return what the discriminator makes of z: the logit of being treated, ``(stack, rows)``."""
        return self.discriminator(z)[..., 0]

    @property
    def noise_log_scale(self) -> Float[Tensor, "stack 2"]:
        """Logarithm of each arm's outcome noise in standardised units, clamped to [-3, 2]."""
        return self.log_sigma.clamp(-3, 2)
