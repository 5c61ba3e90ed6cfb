"""The balancing variables of a task as independent Gaussians, and what they say about the adaptation.

Lee et al., "Learning to Balance", ICLR 2020, section 3: ``omega`` weighs the classes, ``gamma`` multiplies the step of
each layer, ``z`` modulates the initial parameters. All have the prior N(0, 1), at which adaptation is Meta-SGD's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

__all__ = ["GAMMA_BOUND", "VARIABLES", "Latents", "Posterior", "gaussian_kl"]

VARIABLES = ("omega", "gamma", "z")
"""Names of the balancing variables."""

GAMMA_BOUND = math.log(100.0)
"""Largest size of the logarithm of a step's multiplier at test time."""

_FLOOR = 1e-6


def gaussian_kl(mean: Float[Tensor, "*n"], raw: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Kullback-Leibler divergence of N(mean, softplus(raw)^2) from N(0, 1), of each scalar.

    Parameters
    ----------
    mean : of the Gaussian
    raw : its deviation before ``softplus``

    Examples
    --------
    >>> gaussian_kl(torch.zeros(1), torch.full((1,), math.log(math.e - 1))).abs().item() < 1e-6
    True
    """
    deviation = functional.softplus(raw) + _FLOOR
    return 0.5 * (mean.square() + deviation.square() - 1) - deviation.log()


@dataclass(frozen=True, eq=False)
class Latents:
    """One value of the balancing variables for each task; None where a variable is switched off.

    Parameters
    ----------
    omega : ``(tasks, ways)`` before the softmax
    gamma : ``(tasks, layers)`` logarithms of the multipliers, the head's last
    z : ``(tasks, channels)`` modulation: first the gains of weights, then the shifts of biases
    """

    omega: Float[Tensor, "tasks ways"] | None = None
    gamma: Float[Tensor, "tasks layers"] | None = None
    z: Float[Tensor, "tasks channels"] | None = None

    def values(self) -> dict[str, Tensor]:
        """Return those that are there, by name."""
        return {name: value for name in VARIABLES if (value := getattr(self, name)) is not None}

    def part(self, index: Tensor) -> Latents:
        """Return those of some tasks.

        Parameters
        ----------
        index : positions of tasks
        """
        return Latents(**{name: value[index] for name, value in self.values().items()})

    def bounded(self) -> tuple[Latents, Tensor]:
        """Hold the multipliers within 1/100 and 100, and count for each task how many had to be held, ``(tasks,)``."""
        if self.gamma is None:
            first = next(iter(self.values().values()), None)
            return self, torch.zeros(0 if first is None else len(first), dtype=torch.int64)
        held = (self.gamma.detach().abs() > GAMMA_BOUND).sum(1)
        return Latents(self.omega, self.gamma.clamp(-GAMMA_BOUND, GAMMA_BOUND), self.z), held

    def repeated(self, count: int) -> Latents:
        """Return every task's `count` times, one after another.

        Parameters
        ----------
        count : how often
        """
        return Latents(**{name: value.repeat_interleave(count, 0) for name, value in self.values().items()})


@dataclass(frozen=True, eq=False)
class Posterior:
    """What the inference network says about a batch of tasks: independent Gaussians by variable.

    Parameters
    ----------
    mean : by name of the variable, ``(tasks, size)``
    raw : deviations before ``softplus``, as `mean`
    """

    mean: Mapping[str, Float[Tensor, "tasks size"]]
    raw: Mapping[str, Float[Tensor, "tasks size"]]

    @property
    def deviation(self) -> dict[str, Float[Tensor, "tasks size"]]:
        """Standard deviations, ``softplus(raw)``, by variable."""
        return {name: functional.softplus(raw) + _FLOOR for name, raw in self.raw.items()}

    def kl(self) -> Float[Tensor, " tasks"]:
        """Divergence from the prior, summed over all variables that are switched on (section 3.2)."""
        return torch.stack([gaussian_kl(self.mean[name], self.raw[name]).sum(1) for name in self.mean]).sum(0)

    def kl_by_variable(self) -> dict[str, Float[Tensor, " tasks"]]:
        """Divergence from the prior of each variable."""
        return {name: gaussian_kl(self.mean[name], self.raw[name]).sum(1) for name in self.mean}

    def at_mean(self) -> Latents:
        """Return the means: what "naive" prediction plugs in."""
        return Latents(**self.mean)

    def sample(self, noise: Mapping[str, Float[Tensor, "tasks size"]]) -> Latents:
        """Draw by reparameterisation.

        Parameters
        ----------
        noise : standard normal, by variable, of the shapes of the means
        """
        deviation = self.deviation
        return Latents(**{name: mean + deviation[name] * noise[name] for name, mean in self.mean.items()})

    def draw(self, seeds: Sequence[int]) -> dict[str, Tensor]:
        """Draw the noise for :meth:`sample`, each task's from a seed of its own.

        Drawn on the CPU, so that it is the same on every device and however tasks are grouped.

        Parameters
        ----------
        seeds : one for each task
        """
        found: dict[str, list[Tensor]] = {name: [] for name in self.mean}
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            for name, mean in self.mean.items():
                found[name].append(torch.randn(mean.shape[1], generator=generator, dtype=mean.dtype))
        return {name: torch.stack(rows).to(self.mean[name].device) for name, rows in found.items()}
