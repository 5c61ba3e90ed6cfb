"""What Bayesian TAML is held against, where it is more than a switch of the engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from bayes_taml.engine import HEAD_BIAS, HEAD_WEIGHT, Plan
from bayes_taml.networks import Modulated, Pass
from bayes_taml.ragged import Tasks, without_padding

__all__ = ["fine_tune", "inverse_frequency", "oversampled", "pixel_means", "prototype_logits", "step_rule"]


def inverse_frequency(tasks: Tasks, dtype: torch.dtype = torch.float32) -> Float[Tensor, "tasks ways"]:
    """Class weights in proportion to 1/N, as logarithms for the softmax.

    Parameters
    ----------
    tasks : supports
    dtype : of the result
    """
    return -tasks.counts().to(dtype).log()


def step_rule(tasks: Tasks, log_kappa: Tensor, layers: int) -> Float[Tensor, "tasks layers"]:
    """Logarithm of N / (N + kappa), the same for every layer: the best step for a mean of N values is of this form.

    Parameters
    ----------
    tasks : supports
    log_kappa : logarithm of kappa
    layers : how many
    """
    number = tasks.sizes().to(log_kappa.dtype)
    return -torch.log1p(log_kappa.exp() / number).unsqueeze(1).expand(-1, layers)


def oversampled(tasks: Tasks, seeds: Sequence[int]) -> Tasks:
    """Repeat rows of the smaller classes, drawn at random, until all classes of a task have as many.

    Parameters
    ----------
    tasks : the batch
    seeds : one for each task
    """
    made: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    counts = tasks.counts()
    for place, seed in enumerate(seeds):
        random = np.random.default_rng(seed)
        real = tasks.support_mask[place].nonzero().squeeze(1)
        labels = tasks.support_labels[place, real]
        most = int(counts[place].max())
        rows: list[Tensor] = []
        for label in range(tasks.ways):
            own = real[labels == label]
            more = torch.from_numpy(random.integers(0, len(own), most - len(own))).to(own.device)
            rows += [own, own[more]]
        chosen = torch.cat(rows)
        asked = tasks.query_mask[place]
        made.append(
            (
                tasks.support[place, chosen],
                tasks.support_labels[place, chosen],
                tasks.query[place, asked],
                tasks.query_labels[place, asked],
            )
        )
    return Tasks.collate(made, tasks.ways)


def _centres(h: Tensor, labels: Tensor, mask: Tensor, ways: int) -> Tensor:
    chosen = functional.one_hot(labels, ways).to(h.dtype) * mask.unsqueeze(-1).to(h.dtype)
    return (chosen.mT @ h) / chosen.sum(1).unsqueeze(-1)


def prototype_logits(
    model: Modulated, parameters: Mapping[str, Tensor], tasks: Tasks, plan: Plan
) -> Float[Tensor, "tasks m ways"]:
    """Minus squared distances of query features to the class means of support features (Snell et al., 2017).

    Parameters
    ----------
    model : the backbone
    parameters : by name
    tasks : the batch
    plan : of which ``statistics`` says how queries are normalised
    """

    def one(x: Tensor, mask: Tensor, asked: Tensor, asked_mask: Tensor) -> tuple[Tensor, Tensor]:
        record: dict[str, tuple[Tensor, Tensor]] = {}
        h = model.call(parameters, x, Pass(mask=mask, record=record))
        told = Pass(mask=asked_mask) if plan.statistics == "batch" else Pass(statistics=record)
        return h, model.call(parameters, asked, told)

    x = without_padding(tasks.support, tasks.support_mask)
    asked = without_padding(tasks.query, tasks.query_mask)
    h, found = torch.vmap(one)(x, tasks.support_mask, asked, tasks.query_mask)
    labels = torch.where(tasks.support_mask, tasks.support_labels, 0)
    centre = _centres(h, labels, tasks.support_mask, tasks.ways)
    return -(found.unsqueeze(2) - centre.unsqueeze(1)).square().sum(-1)


def pixel_means(tasks: Tasks) -> Float[Tensor, "tasks m ways"]:
    """Minus squared distances of the inputs themselves to the class means; nothing is learned.

    Parameters
    ----------
    tasks : the batch
    """
    x = without_padding(tasks.support, tasks.support_mask).flatten(2)
    labels = torch.where(tasks.support_mask, tasks.support_labels, 0)
    centre = _centres(x, labels, tasks.support_mask, tasks.ways)
    return -torch.cdist(without_padding(tasks.query, tasks.query_mask).flatten(2), centre).square()


def fine_tune(
    model: Modulated,
    parameters: Mapping[str, Tensor],
    tasks: Tasks,
    plan: Plan,
    *,
    steps: int = 50,
    lr: float = 1e-2,
    on_loss: Callable[[Tensor], None] | None = None,
) -> Float[Tensor, "tasks m ways"]:
    """Train backbone and a zero head on each support with Adam, and answer the queries.

    Adam works element by element, so that all tasks are trained at once as one stack of parameters.

    Parameters
    ----------
    model, parameters : where every task starts
    tasks : the batch
    plan : how queries are normalised
    steps, lr : of Adam
    on_loss : called with the mean losses ``(tasks,)`` before each step
    """
    count = len(tasks)
    own = {
        name: parameters[name].detach().expand(count, *parameters[name].shape).clone().requires_grad_()
        for name in model.theta
    }
    like = next(iter(own.values()))
    own[HEAD_WEIGHT] = like.new_zeros((count, tasks.ways, model.features), requires_grad=True)
    own[HEAD_BIAS] = like.new_zeros((count, tasks.ways), requires_grad=True)
    shared = {name: p.detach() for name, p in parameters.items() if name not in own}
    optimizer = torch.optim.Adam(list(own.values()), lr=lr)
    x, mask = without_padding(tasks.support, tasks.support_mask), tasks.support_mask
    labels = torch.where(mask, tasks.support_labels, 0)

    def logits(own: dict[str, Tensor], x: Tensor, told: Pass) -> Tensor:
        body = {name: own[name] for name in model.theta}
        h = model.call({**shared, **body}, x, told)
        return functional.linear(h, own[HEAD_WEIGHT], own[HEAD_BIAS])

    def loss(own: dict[str, Tensor], x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        per_row = functional.cross_entropy(logits(own, x, Pass(mask=mask)), y, reduction="none")
        return (per_row * mask).sum() / mask.sum()

    for _ in range(steps):
        per_task = torch.vmap(loss)(own, x, labels, mask)
        if on_loss is not None:
            on_loss(per_task.detach())
        optimizer.zero_grad()
        per_task.sum().backward()
        optimizer.step()

    def answered(own: dict[str, Tensor], x: Tensor, mask: Tensor, asked: Tensor, asked_mask: Tensor) -> Tensor:
        record: dict[str, tuple[Tensor, Tensor]] = {}
        if plan.statistics == "batch":
            return logits(own, asked, Pass(mask=asked_mask))
        logits(own, x, Pass(mask=mask, record=record))
        return logits(own, asked, Pass(statistics=record))

    with torch.no_grad():
        return torch.vmap(answered)(own, x, mask, without_padding(tasks.query, tasks.query_mask), tasks.query_mask)
