"""The inference network: it reads a support set and says how to balance the adaptation to it.

A set of sets (Lee et al., ICLR 2020, section 3.3): images of a class are pooled to statistics of the class,
classes to statistics of the task; both with their cardinality, which neither mean nor variance can tell. All rows of
all tasks go through in one pass, without padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn

from bayes_taml.posterior import VARIABLES, Posterior
from shared_core.errors import InputError

__all__ = [
    "STATISTICS",
    "ConvEmbedding",
    "InferenceNetwork",
    "PackedSupport",
    "VectorEmbedding",
    "pool_statistics",
    "relative_count",
]

STATISTICS = ("mean", "var", "n", "skew", "kurt")
"""What a set can be pooled to; the paper's are the first three."""

_TINY = 1e-12


@dataclass(frozen=True, eq=False)
class PackedSupport:
    """Supports of several tasks, real rows only, in any order.

    Parameters
    ----------
    rows : ``(rows, ...)`` inputs of the embedding
    labels : ``(rows,)`` classes 0..ways-1
    task : ``(rows,)`` positions of tasks
    tasks, ways : how many
    """

    rows: Shaped[Tensor, "rows ..."]
    labels: Int64[Tensor, " rows"]
    task: Int64[Tensor, " rows"]
    tasks: int
    ways: int

    def counts(self) -> Int64[Tensor, "tasks ways"]:
        """Support rows of each class."""
        return torch.bincount(self.task * self.ways + self.labels, minlength=self.tasks * self.ways).view(
            self.tasks, self.ways
        )


def relative_count(counts: Int64[Tensor, "*n"], max_shot: int) -> Float[Tensor, "*n"]:
    """Cardinality as the network sees it: ``(N - 1) / (max_shot - 1)``, 0 where there is one shot at most.

    Parameters
    ----------
    counts : of rows
    max_shot : most that training has; more than that gives values above 1
    """
    return (counts - 1).to(torch.get_default_dtype()) / (max_shot - 1) if max_shot > 1 else torch.zeros(counts.shape)


def pool_statistics(
    rows: Float[Tensor, "rows d"],
    segment: Int64[Tensor, " rows"],
    segments: int,
    size: Float[Tensor, " segments"],
    names: Sequence[str] = ("mean", "var", "n"),
) -> Float[Tensor, "segments d statistics"]:
    """Pool sets of vectors to statistics of each coordinate.

    Parameters
    ----------
    rows : elements of all sets
    segment : which set each is in; no set is empty
    segments : how many sets
    size : what stands for the cardinality of each
    names : of :data:`STATISTICS`. The variance is the population's, by two passes, so that a set of one has 0
    """
    counts = torch.bincount(segment, minlength=segments).to(rows.dtype).unsqueeze(1)

    def averaged(values: Tensor) -> Tensor:
        return values.new_zeros((segments, values.shape[1])).index_add(0, segment, values) / counts

    mean = averaged(rows)
    centred = rows - mean[segment]
    variance = averaged(centred.square())
    found: list[Tensor] = []
    for name in names:
        if name == "mean":
            found.append(mean)
        elif name == "var":
            found.append(variance)
        elif name == "n":
            found.append(size.to(rows.dtype).unsqueeze(1).expand_as(mean))
        else:
            power = 3 if name == "skew" else 4
            # Of a set without spread they are 0, and their gradients finite.
            scale = torch.where(variance > _TINY, variance, torch.ones_like(variance)).pow(power / 2)
            found.append(averaged(centred.pow(power)) / scale)
    return torch.stack(found, 2)


class ConvEmbedding(nn.Module):
    """The paper's image encoder: two convolutions of 10 filters, each pooled by two, and a linear map to 64.

    Parameters
    ----------
    channels, height, width : of the images; sides of at least 4 pixels
    """

    def __init__(self, channels: int, height: int, width: int) -> None:
        super().__init__()
        if min(height, width) < 4:
            raise InputError(f"the image encoder needs sides of at least 4 pixels, got {height} x {width}")
        self.first = nn.Conv2d(channels, 10, 3, padding=1)
        self.second = nn.Conv2d(10, 10, 3, padding=1)
        self.last = nn.Linear(10 * (height // 4) * (width // 4), 64)

    def forward(self, x: Float[Tensor, "rows channels height width"]) -> Float[Tensor, "rows 64"]:
        """Embed images, each alone."""
        # Pooling first is the same, and a quarter of the work for ReLU.
        h = nn.functional.max_pool2d(self.first(x), 2).relu()
        h = nn.functional.max_pool2d(self.second(h), 2).relu()
        return self.last(h.flatten(1))


class VectorEmbedding(nn.Sequential):
    """For inputs that are vectors: two linear maps.

    Parameters
    ----------
    size : of the vectors
    """

    def __init__(self, size: int) -> None:
        super().__init__(nn.Flatten(), nn.Linear(size, 64), nn.ReLU(), nn.Linear(64, 64))


class _Gaussian(nn.Module):
    """Means and raw deviations from a hidden layer, or from the input itself."""

    def __init__(self, inputs: int, outputs: int, *, hidden: bool = True) -> None:
        super().__init__()
        self.hidden = nn.Linear(inputs, 64) if hidden else None
        self.mean = nn.Linear(64 if hidden else inputs, outputs)
        self.raw = nn.Linear(64 if hidden else inputs, outputs)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = x if self.hidden is None else self.hidden(x).relu()
        return self.mean(h), self.raw(h)


class InferenceNetwork(nn.Module):
    """Posterior of the balancing variables given the support (never the query).

    Parameters
    ----------
    embed : maps rows to vectors of `width`
    layers : step multipliers, the head's included
    modulated : gains and shifts of the initial parameters
    variables : which of ``omega``, ``gamma``, ``z`` to infer
    max_shot : what cardinalities are relative to
    statistics : what sets are pooled to
    width : of the embedding
    direct_omega : read the class weights straight from the class's statistics (the paper's run over several data sets)
    deviation : where the posterior's deviations start; None is the paper's ``softplus(0)``, 0.69. Ours: a small one
        makes the first steps less noisy, which short training needs
    seed : of the initial weights, normal with deviation 0.02 (convolutions: cut at two deviations), biases 0

    Examples
    --------
    >>> network = InferenceNetwork(ConvEmbedding(3, 32, 32), layers=5, modulated=256)
    >>> sum(p.numel() for p in network.parameters())  # as in the authors' code
    146290
    """

    def __init__(
        self,
        embed: nn.Module,
        *,
        layers: int,
        modulated: int,
        variables: Sequence[str] = VARIABLES,
        max_shot: int = 50,
        statistics: Sequence[str] = ("mean", "var", "n"),
        width: int = 64,
        direct_omega: bool = False,
        deviation: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if deviation is not None and not deviation > 0:
            raise InputError(f"deviation: must be > 0, got {deviation}")
        if not statistics or set(statistics) - set(STATISTICS) or len(set(statistics)) != len(statistics):
            raise InputError(f"statistics: some of {', '.join(STATISTICS)}, each once; got {', '.join(statistics)}")
        if not variables or set(variables) - set(VARIABLES):
            raise InputError(f"balance: some of {', '.join(VARIABLES)}; got {', '.join(variables) or 'none'}")
        if max_shot < 1:
            raise InputError(f"max_shot: must be at least 1, got {max_shot}")
        self.embed = embed
        self.max_shot, self.statistics = max_shot, tuple(statistics)
        self.variables = tuple(name for name in VARIABLES if name in variables)
        kinds = len(self.statistics)
        self.class_mix = nn.Linear(kinds, 4)
        self.omega = _Gaussian(4 * width, 1, hidden=not direct_omega) if "omega" in self.variables else None
        task_wide = {"gamma", "z"} & set(self.variables)
        self.per_class = nn.Sequential(nn.Linear(4 * width, 128), nn.ReLU(), nn.Linear(128, 32)) if task_wide else None
        self.task_mix = nn.Linear(kinds, 4) if task_wide else None
        self.gamma = _Gaussian(128, layers) if "gamma" in self.variables else None
        self.z = _Gaussian(128, modulated) if "z" in self.variables else None
        self._reset(seed)
        if deviation is not None:
            for head in (self.omega, self.gamma, self.z):
                if head is not None:
                    nn.init.constant_(head.raw.bias, math.log(math.expm1(deviation)))

    def _reset(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
                    nn.init.trunc_normal_(module.weight, 0, 0.02, -0.04, 0.04, generator=generator)
                elif isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, 0, 0.02, generator=generator)
                else:
                    continue
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, support: PackedSupport, change_counts: Callable[[Tensor], Tensor] | None = None) -> Posterior:
        """Infer the posterior of each task.

        Parameters
        ----------
        support : rows of all tasks; every class has some
        change_counts : what to do with the cardinalities ``(tasks, ways)`` before they are read, for studies
        """
        tasks, ways = support.tasks, support.ways
        counts = support.counts()
        size = relative_count(counts if change_counts is None else change_counts(counts), self.max_shot)
        size = size.to(support.labels.device)
        embedded = self.embed(support.rows)
        segment = support.task * ways + support.labels
        pooled = pool_statistics(embedded, segment, tasks * ways, size.flatten(), self.statistics)
        classes = self.class_mix(pooled).relu().flatten(1)
        mean: dict[str, Tensor] = {}
        raw: dict[str, Tensor] = {}
        if self.omega is not None:
            mean["omega"], raw["omega"] = (v.view(tasks, ways) for v in self.omega(classes))
        if self.per_class is not None and self.task_mix is not None:
            of_task = torch.arange(tasks, device=segment.device).repeat_interleave(ways)
            pooled = pool_statistics(self.per_class(classes), of_task, tasks, size.mean(1), self.statistics)
            whole = self.task_mix(pooled).relu().flatten(1)
            if self.gamma is not None:
                mean["gamma"], raw["gamma"] = self.gamma(whole)
            if self.z is not None:
                mean["z"], raw["z"] = self.z(whole)
        return Posterior(mean, raw)


Encoder = Literal["auto", "conv", "mlp", "features"]
