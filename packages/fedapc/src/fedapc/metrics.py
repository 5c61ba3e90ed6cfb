"""How well clients do, how much they forget, and how large their models are (spec 2.5, 4).

Accuracies are an array ``a`` of float64, ``(clients, T, T)``: ``a[c, t, i]`` is the accuracy of client c on the test
examples of its task i after it finished task t, NaN for tasks that come later, and where there is nothing, because
clients have different numbers of tasks or a task has no test examples. Metrics are of a client first, up to the last
task that it has accuracies after, and then the mean over the clients that have the metric: every client counts once.
For clients with equal numbers of tasks these are the paper's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float64

from fedapc.decomposition import DecomposedModel
from shared_core.errors import InputError

__all__ = [
    "accuracy_matrix",
    "average_accuracy",
    "backward_transfer",
    "capacity",
    "forgetting",
    "learning_accuracy",
    "per_client",
]

Accuracies = Float64[np.ndarray, "clients tasks tasks"]
Metric = Callable[[Float64[np.ndarray, "clients tasks tasks"]], float]


def accuracy_matrix(evaluations: Sequence[Sequence[Sequence[float]]]) -> Accuracies:
    """Arrange what clients returned after each of their tasks.

    Parameters
    ----------
    evaluations : of each client, after each of its tasks, an accuracy a task, as ``Client.evaluate`` returns them.
        Rows may be of any length; a row that is empty stands for a task after which nothing was evaluated

    Returns
    -------
    ``(clients, T, T)``, T the most tasks that a client has; NaN for tasks later than the row's.

    Raises
    ------
    InputError
        For no clients, no tasks, or numbers outside [0, 1].

    Examples
    --------
    >>> accuracy_matrix([[[0.9], [0.8, 0.7]], [[0.5]]]).tolist()
    [[[0.9, nan], [0.8, 0.7]], [[0.5, nan], [nan, nan]]]
    """
    most = max((len(rows) for rows in evaluations), default=0)
    if not most:
        raise InputError("accuracies: of no client, or after no task; evaluate at least one client after one task")
    found = np.full((len(evaluations), most, most), np.nan)
    for client, rows in enumerate(evaluations):
        for task, row in enumerate(rows):
            known = row[: task + 1]
            found[client, task, : len(known)] = known
    return _checked(found)


def average_accuracy(a: Accuracies) -> float:
    """Return the mean accuracy on all tasks at the end: the mean of the last row.

    Parameters
    ----------
    a : ``(clients, T, T)``, see the module's docstring

    Raises
    ------
    InputError
        For another shape, or numbers outside [0, 1].

    Examples
    --------
    >>> round(average_accuracy(accuracy_matrix([[[0.9], [0.8, 0.7]], [[0.5]]])), 6)
    0.625
    """
    return _mean_of_clients(a, lambda rows: rows[-1])


def forgetting(a: Accuracies) -> float:
    """Return how far accuracies fell: the mean over earlier tasks of the best before the end less that at the end.

    Parameters
    ----------
    a : ``(clients, T, T)``, see the module's docstring

    Returns
    -------
    ``mean_{i<T} max_{i<=t<T} (a[t, i] - a[T, i])``, negative if tasks became better; NaN without an earlier task.

    Raises
    ------
    InputError
        For another shape, or numbers outside [0, 1].

    Examples
    --------
    >>> round(forgetting(accuracy_matrix([[[0.9], [0.8, 0.7]], [[0.5]]])), 6)
    0.1
    """

    def fallen(rows: Float64[np.ndarray, "tasks tasks"]) -> Float64[np.ndarray, " earlier"]:
        before = np.where(np.isnan(rows[:-1, :-1]), -np.inf, rows[:-1, :-1])
        best = before.max(0, initial=-np.inf)
        return np.where(np.isinf(best), np.nan, best) - rows[-1, :-1]

    return _mean_of_clients(a, fallen)


def backward_transfer(a: Accuracies) -> float:
    """Return what later tasks did to earlier ones: the mean of ``a[T, i] - a[i, i]`` over ``i < T``.

    Parameters
    ----------
    a : ``(clients, T, T)``, see the module's docstring

    Raises
    ------
    InputError
        For another shape, or numbers outside [0, 1].

    Examples
    --------
    >>> round(backward_transfer(accuracy_matrix([[[0.9], [0.8, 0.7]], [[0.5]]])), 6)
    -0.1
    """
    return _mean_of_clients(a, lambda rows: (rows[-1] - np.diagonal(rows))[:-1])


def learning_accuracy(a: Accuracies) -> float:
    """Return the mean accuracy on tasks when they were just learnt: the mean of ``a[i, i]``.

    Parameters
    ----------
    a : ``(clients, T, T)``, see the module's docstring

    Raises
    ------
    InputError
        For another shape, or numbers outside [0, 1].

    Examples
    --------
    >>> round(learning_accuracy(accuracy_matrix([[[0.9], [0.8, 0.7]], [[0.5]]])), 6)
    0.65
    """
    return _mean_of_clients(a, np.diagonal)


def per_client(a: Accuracies, metric: Metric) -> Float64[np.ndarray, " clients"]:
    """Return a metric of each client alone; their mean, without those that have none, is the metric of all.

    Parameters
    ----------
    a : ``(clients, T, T)``, see the module's docstring
    metric : one of this module's

    Raises
    ------
    InputError
        For another shape, or numbers outside [0, 1].

    Examples
    --------
    >>> per_client(accuracy_matrix([[[0.9], [0.8, 0.7]], [[0.5]]]), average_accuracy).tolist()
    [0.75, 0.5]
    """
    _checked(a)
    return np.array([metric(a[client : client + 1]) for client in range(len(a))], dtype=np.float64)


def capacity(model: DecomposedModel) -> float:
    """Return the non-zeros of a client's base and adaptive parts over the numbers in the base.

    Heads, biases and masks are not counted, as in the authors' code; nor are the parts of others, which are folded
    into one when a task ends and stay on the client.

    Parameters
    ----------
    model : of a client

    Examples
    --------
    >>> from torch import nn
    >>> from fedapc.decomposition import Layout, initial_base
    >>> net = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> layout = Layout.of(net)
    >>> model = DecomposedModel(net, layout, initial_base(net, layout), adaptive=False)
    >>> capacity(model)
    1.0
    """
    kept = sum(int(base.detach().count_nonzero()) for base in model.base.values())
    kept += sum(len(part.index) for task in model.tasks for part in model.part(task).values())
    return kept / model.layout.elements()


def _checked(a: Accuracies) -> Accuracies:
    if a.ndim != 3 or a.shape[1] != a.shape[2] or not a.size:
        raise InputError(f"accuracies: have the shape {a.shape}, expected (clients, tasks, tasks)")
    wrong = np.argwhere(~np.isnan(a) & ~((a >= 0) & (a <= 1)))
    if len(wrong):
        place = tuple(int(at) for at in wrong[0])
        raise InputError(f"accuracies: {a[place]:g} at {place}, expected shares in [0, 1], or NaN")
    return a


def _mean_of_clients(
    a: Accuracies, of: Callable[[Float64[np.ndarray, "tasks tasks"]], Float64[np.ndarray, " terms"]]
) -> float:
    means: list[float] = []
    later = np.triu(np.ones(_checked(a).shape[1:], dtype=bool), 1)
    for rows in np.where(later, np.nan, a):
        evaluated = np.flatnonzero(~np.isnan(rows).all(1))
        if not len(evaluated):
            continue
        tasks = int(evaluated[-1]) + 1
        terms = of(rows[:tasks, :tasks])
        if not np.isnan(terms).all():
            means.append(float(np.nanmean(terms)))
    return math.fsum(means) / len(means) if means else math.nan
