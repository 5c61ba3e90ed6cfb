"""A family of tasks in which the best step is known: estimating a mean from N values.

A task's mean is ``m ~ N(start, spread)``, its support N values ``x ~ N(m, 1)``. One step of gradient descent on
``(x - w)^2 / 2``, from the start, with the size a, gives an excess risk whose best a is ``N spread / (N spread + 1)``:
the posterior mean. What multiplies the step therefore has to grow with N, and how is known exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from bayes_taml.encoder import InferenceNetwork, PackedSupport
from shared_core.errors import InputError

__all__ = ["StepStudy", "best_step", "excess_risk", "study_steps"]


def best_step(number: Float[np.ndarray, " n"], spread: float) -> Float[np.ndarray, " n"]:
    """Step size of least excess risk, ``N spread / (N spread + 1)``.

    Parameters
    ----------
    number : support values
    spread : variance of the means over tasks, that of the values being 1
    """
    return number * spread / (number * spread + 1)


def excess_risk(step: Tensor, number: Tensor, spread: float) -> Tensor:
    """Half of the expected squared error of the mean after one step, ``((1 - a)^2 spread + a^2 / N) / 2``.

    Parameters
    ----------
    step : sizes a
    number : support values N, as `step`
    spread : variance of the means
    """
    return 0.5 * ((1 - step).square() * spread + step.square() / number)


class _Nothing(nn.Module):
    """An embedding that tells nothing, so that only the cardinality is left."""

    def __init__(self) -> None:
        super().__init__()
        self.zero = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, rows: Float[Tensor, "rows 1"]) -> Float[Tensor, "rows 64"]:
        return torch.zeros(len(rows), 64)


@dataclass(frozen=True, eq=False)
class StepStudy:
    """What was learned, for N = 1 to the most.

    Parameters
    ----------
    number : N
    step : learned step sizes (the mean under the posterior, of the step's multiplier times the shared size)
    best : the best ones
    risk, constant_risk, best_risk : mean excess risks over N: learned, of the best constant step (Meta-SGD's optimum),
        and of the best steps
    """

    number: Float[np.ndarray, " n"]
    step: Float[np.ndarray, " n"]
    best: Float[np.ndarray, " n"]
    risk: float
    constant_risk: float
    best_risk: float


def study_steps(
    spread: float = 0.1, *, most: int = 50, steps: int = 3000, tasks: int = 1024, lr: float = 1e-2, seed: int = 0
) -> StepStudy:
    """Train the multiplier's branch of the inference network, which sees the cardinality alone, on query losses.

    Means and values are drawn; neither the best step nor the risk's formula is used in training.

    Parameters
    ----------
    spread : variance of the tasks' means
    most : N is uniform on 1..most
    steps, tasks, lr : of Adam, decaying to nothing
    seed : of weights and tasks
    """
    if spread <= 0 or most < 2:
        raise InputError(f"need spread > 0 and most >= 2, got {spread} and {most}")
    network = InferenceNetwork(
        _Nothing(), layers=1, modulated=0, variables=("gamma",), max_shot=most, statistics=("n",), seed=seed
    )
    generator = torch.Generator().manual_seed(seed)
    log_size = nn.Parameter(torch.tensor(-1.0))
    leaves = [*(p for p in network.parameters() if p.requires_grad), log_size]
    optimizer = torch.optim.Adam(leaves, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    everyone = _supports(torch.arange(1, most + 1))
    for _ in range(steps):
        number = torch.randint(1, most + 1, (tasks,), generator=generator)
        mean = spread**0.5 * torch.randn(tasks, generator=generator)
        support_mean = mean + torch.randn(tasks, generator=generator) / number.sqrt()
        # One posterior a cardinality: tasks of equal N share it.
        posterior = network(everyone)
        place = number - 1
        noise = torch.randn(tasks, generator=generator)
        log_factor = posterior.mean["gamma"][place, 0] + posterior.deviation["gamma"][place, 0] * noise
        adapted = (log_size + log_factor).exp() * support_mean
        # The query's own noise adds a constant to the expected loss, so that the mean stands for it.
        loss = 0.5 * (adapted - mean).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        posterior = network(everyone)
        spread_of = posterior.deviation["gamma"][:, 0]
        step = (log_size + posterior.mean["gamma"][:, 0] + 0.5 * spread_of.square()).exp().double().numpy()
    number = np.arange(1, most + 1, dtype=np.float64)

    def risk(a: np.ndarray) -> float:
        return float(excess_risk(torch.from_numpy(a), torch.from_numpy(number), spread).mean())

    constant = spread / (spread + float((1 / number).mean()))
    best = best_step(number, spread)
    return StepStudy(number, step, best, risk(step), risk(np.full_like(number, constant)), risk(best))


def _supports(counts: Tensor) -> PackedSupport:
    total = int(counts.sum())
    task = torch.repeat_interleave(torch.arange(len(counts)), counts)
    return PackedSupport(torch.zeros(total, 1), torch.zeros(total, dtype=torch.int64), task, len(counts), 1)
