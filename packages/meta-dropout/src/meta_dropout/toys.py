"""Tasks with a known answer: Gaussian classes among nuisance dimensions, points in the plane, and sine waves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from meta_dropout.engine import Tasks
from shared_core.errors import InputError

__all__ = ["GaussianTasks", "SineTasks", "oracle_accuracy"]


@dataclass(frozen=True)
class GaussianTasks:
    """Classes whose means differ in a few signal dimensions, with large noise in all others.

    Parameters
    ----------
    ways, shots, queries : of a task
    signal, nuisance : dimensions
    spread : standard deviation of class means in the signal dimensions
    noise, clutter : standard deviation within a class, in signal and in nuisance dimensions
    seed : with its number, decides a task; and the rotation that hides which dimensions are which
    rotate : hide them

    Examples
    --------
    >>> GaussianTasks(seed=1).batch(0, 3).support.shape
    torch.Size([3, 5, 20])
    """

    ways: int = 5
    shots: int = 1
    queries: int = 15
    signal: int = 4
    nuisance: int = 16
    spread: float = 1.0
    noise: float = 0.4
    clutter: float = 1.5
    seed: int = 0
    rotate: bool = False

    def __post_init__(self) -> None:
        """Refuse what is no task."""
        if self.ways < 2 or self.shots < 1 or self.queries < 1 or self.signal < 1 or self.nuisance < 0:
            raise InputError(f"need ways >= 2, shots, queries and signal >= 1, nuisance >= 0; got {self}")

    @property
    def scale(self) -> Float[np.ndarray, " dimensions"]:
        """Standard deviation within a class of each dimension, before the rotation."""
        return np.concatenate([np.full(self.signal, self.noise), np.full(self.nuisance, self.clutter)])

    @property
    def basis(self) -> Float[np.ndarray, "dimensions dimensions"]:
        """Rotation from (signal, nuisance) to what is seen."""
        size = self.signal + self.nuisance
        if not self.rotate:
            return np.eye(size)
        return np.linalg.qr(np.random.default_rng([self.seed, 1]).normal(size=(size, size)))[0]

    def batch(self, number: int, count: int) -> Tasks:
        """Return `count` tasks, those of positions ``number * count`` and on.

        Parameters
        ----------
        number, count : see above
        """
        rows = self.shots + self.queries
        size = self.signal + self.nuisance
        x = np.empty((count, self.ways, rows, size))
        for place in range(count):
            random = np.random.default_rng([self.seed, 2, number * count + place])
            mean = np.zeros((self.ways, 1, size))
            mean[..., : self.signal] = self.spread * random.normal(size=(self.ways, 1, self.signal))
            x[place] = mean + self.scale * random.normal(size=(self.ways, rows, size))
        seen = torch.from_numpy(x @ self.basis.T).float()
        labels = torch.arange(self.ways)
        return Tasks(
            seen[:, :, : self.shots].flatten(1, 2),
            labels.repeat_interleave(self.shots).expand(count, -1),
            seen[:, :, self.shots :].flatten(1, 2),
            labels.repeat_interleave(self.queries).expand(count, -1),
        )


def oracle_accuracy(source: GaussianTasks, episodes: int = 500) -> float:
    """Accuracy of linear discriminant analysis that knows the true covariance, from the support's class means.

    Parameters
    ----------
    source : of tasks
    episodes : how many to average

    Examples
    --------
    >>> oracle_accuracy(GaussianTasks(noise=0.01, clutter=0.01), 20)
    1.0
    """
    tasks = source.batch(0, episodes)
    whiten = torch.from_numpy(source.basis / source.scale).float()
    support, query = tasks.support @ whiten, tasks.query @ whiten
    # The prior of the means shrinks nuisance dimensions to nothing, for they have none to differ by.
    keep = slice(0, source.signal)
    centre = support[..., keep].unflatten(1, (source.ways, source.shots)).mean(2)
    nearest = torch.cdist(query[..., keep], centre).argmin(-1)
    return float((nearest == tasks.query_labels).double().mean())


@dataclass(frozen=True)
class SineTasks:
    """Regression on ``a sin(x - b)``, amplitude in 0.1..5, phase in 0..pi, x in -5..5 (Finn et al., 2017, section 5.1).

    Parameters
    ----------
    shots, queries : points of a task
    seed : with its number, decides a task

    Examples
    --------
    >>> SineTasks(shots=10).batch(0, 2).support.shape
    torch.Size([2, 10, 1])
    """

    shots: int = 10
    queries: int = 10
    seed: int = 0

    def batch(self, number: int, count: int) -> Tasks:
        """Return `count` tasks, those of positions ``number * count`` and on.

        Parameters
        ----------
        number, count : see above
        """
        x = np.empty((count, self.shots + self.queries, 1))
        y = np.empty_like(x)
        for place in range(count):
            random = np.random.default_rng([self.seed, 3, number * count + place])
            amplitude, phase = random.uniform(0.1, 5.0), random.uniform(0.0, np.pi)
            x[place] = random.uniform(-5.0, 5.0, x.shape[1:])
            y[place] = amplitude * np.sin(x[place] - phase)
        seen, wanted = torch.from_numpy(x).float(), torch.from_numpy(y).float()
        return Tasks(seen[:, : self.shots], wanted[:, : self.shots], seen[:, self.shots :], wanted[:, self.shots :])
