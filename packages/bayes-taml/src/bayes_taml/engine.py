"""Adapt to ragged tasks, and differentiate through it, as pure functions of parameters, tasks and latents.

Lee et al., ICLR 2020, section 3.1: from modulated initial parameters, steps of element-wise size, times a multiplier
for each layer, along gradients in which each class has a weight. Tasks of similar size are computed together
(``torch.func.vmap``), padded to the largest of them under a mask; large ones alone and unpadded.

The head starts at zero in every task. In the first step the gradient into the body is then exactly zero and that into
the head has a closed form, so that it costs a forward pass only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from bayes_taml.networks import Modulated, Pass
from bayes_taml.posterior import Latents
from bayes_taml.ragged import Tasks, group_by_size, without_padding
from shared_core.errors import InputError

__all__ = [
    "HEAD_BIAS",
    "HEAD_WEIGHT",
    "Adapted",
    "Compat",
    "MetaGradients",
    "Observe",
    "Plan",
    "adapt",
    "adapt_all",
    "answer",
    "meta_gradients",
    "query",
    "row_weights",
]

Parameters = dict[str, Tensor]
Rates = Mapping[str, Tensor] | float
Observe = Callable[[int, Parameters, Tensor], None]

HEAD_WEIGHT, HEAD_BIAS = "head.weight", "head.bias"

# What a group costs besides its rows, in multiply-adds: calls, not arithmetic.
_OVERHEAD = 6e6
# Multiply-adds of a forward pass from which a task is computed alone: convolutions with weights of each task (``vmap``)
# are slower than one after another there.
_LARGE = 2e7


@dataclass(frozen=True)
class Compat:
    """Deviations of the authors' code from the equations, off by default.

    Parameters
    ----------
    pad_in_norm : rows that pad a support enter its normalisation statistics
    padded_n : N in the class losses and before the divergence is the padded length of the batch
    """

    pad_in_norm: bool = False
    padded_n: bool = False

    @property
    def on(self) -> bool:
        """Whether anything deviates."""
        return self.pad_in_norm or self.padded_n


@dataclass(frozen=True)
class Plan:
    """How tasks are adapted to.

    Parameters
    ----------
    steps : inner gradient steps
    first_order : take class gradients for constants; multipliers, class weights and step sizes still learn
    head : ``zero``, or ``proto``: from the class means of the support (proto-MAML, Triantafillou et al., 2020)
    statistics : ``batch``: queries are normalised by their own batch, as in the authors' code (transductive);
        ``support``: by the support, under the adapted parameters (inductive)
    backend : ``auto`` groups tasks by cost, ``vmap`` computes all together, ``loop`` one after another
    recompute : keep no activations of inner steps, and compute them again on the way back
    compat : deviations of the authors' code
    """

    steps: int = 5
    first_order: bool = False
    head: Literal["zero", "proto"] = "zero"
    statistics: Literal["batch", "support"] = "batch"
    backend: Literal["auto", "vmap", "loop"] = "auto"
    recompute: bool = False
    compat: Compat = Compat()

    def __post_init__(self) -> None:
        """Refuse what cannot be done."""
        if self.steps < 0:
            raise InputError(f"steps: must be >= 0, got {self.steps}")


@dataclass(frozen=True, eq=False)
class Adapted:
    """What adaptation of a group of tasks gives.

    Parameters
    ----------
    parameters : adapted ones by name, and modulated ones, ``(tasks, ...)``
    weight, bias : of the head, ``(tasks, ways, F)`` and ``(tasks, ways)``
    diverged : ``(tasks,)`` whether the support loss or a step was not finite; parameters are the last of a finite loss
    """

    parameters: Parameters
    weight: Float[Tensor, "tasks ways F"]
    bias: Float[Tensor, "tasks ways"]
    diverged: Bool[Tensor, " tasks"]


@dataclass(frozen=True, eq=False)
class _Group:
    """Supports of tasks that are computed together."""

    index: Int64[Tensor, " tasks"]
    x: Shaped[Tensor, "tasks n ..."]
    labels: Int64[Tensor, "tasks n"]
    mask: Bool[Tensor, "tasks n"]
    ragged: bool
    ways: int
    length: int | None


def row_weights(
    labels: Int64[Tensor, "tasks n"],
    mask: Bool[Tensor, "tasks n"],
    ways: int,
    omega: Float[Tensor, "tasks ways"] | None,
    dtype: torch.dtype,
    length: int | None = None,
) -> Float[Tensor, "tasks n"]:
    """Weight of each row's cross-entropy in the inner loss: ``softmax(omega)[class] * ways / N``, 0 where masked.

    The SUM over a class times ``ways / N``, not its mean: with even class weights this is the ordinary mean loss.

    Parameters
    ----------
    labels, mask : of the support
    ways : classes
    omega : class weights before the softmax; None for even ones
    dtype : of the result
    length : N to use instead of the real rows (the authors' code has the padded length)
    """
    number = mask.sum(1, keepdim=True).to(dtype) if length is None else torch.full_like(labels[:, :1], length).to(dtype)
    real = mask.to(dtype)
    if omega is None:
        return real / number
    return functional.log_softmax(omega, 1).exp().gather(1, labels) * (ways / number) * real


def _groups(tasks: Tasks, model: Modulated, plan: Plan, *, most: int) -> list[_Group]:
    """Take the real rows out of the padding, and put tasks of similar size together."""
    sizes = tasks.sizes().tolist()
    count = len(sizes)
    everything = list(range(count))
    if plan.compat.on:
        divided = [everything]
    elif plan.backend == "loop":
        divided = [[k] for k in everything]
    elif plan.backend == "vmap" or tasks.support.device.type != "cpu":
        divided = group_by_size(sizes, 1e15, most)
    else:
        alone = [k for k in everything if sizes[k] * model.work > _LARGE]
        small = [k for k in everything if sizes[k] * model.work <= _LARGE]
        grouped = group_by_size([sizes[k] for k in small], _OVERHEAD / model.work, most)
        divided = [*([small[k] for k in members] for members in grouped), *([k] for k in alone)]
    found: list[_Group] = []
    for members in divided:
        longest = tasks.support.shape[1] if plan.compat.on else max(sizes[k] for k in members)
        index = torch.tensor(members, device=tasks.support.device)
        mask = torch.arange(longest, device=index.device) < tasks.sizes()[index].unsqueeze(1)
        # Real rows first, in their order; what padding holds, NaN even, is never looked at.
        order = (~tasks.support_mask[index]).to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]
        x = tasks.support[index.unsqueeze(1), order]
        labels = tasks.support_labels[index.unsqueeze(1), order]
        ragged = not bool(mask.all())
        if ragged:
            x = without_padding(x, mask)
            labels = without_padding(labels, mask)
        length = longest if plan.compat.padded_n else None
        found.append(_Group(index, x, labels, mask, ragged, tasks.ways, length))
    return found


def _features(
    model: Modulated,
    own: Mapping[str, Tensor],
    shared: Mapping[str, Tensor],
    x: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """Features ``(tasks, n, F)`` under parameters of each task (`own`) and of all (`shared`)."""
    if len(x) == 1:
        alone = {name: value[0] for name, value in own.items()}
        told = Pass(mask=None if mask is None else mask[0], alone=True)
        return model.call({**shared, **alone}, x[0], told).unsqueeze(0)

    def one(own: Parameters, x: Tensor, mask: Tensor | None) -> Tensor:
        return model.call({**shared, **own}, x, Pass(mask=mask))

    return torch.vmap(one, in_dims=(0, 0, None if mask is None else 0))(dict(own), x, mask)


def _logits(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.baddbmm(bias.unsqueeze(1), h, weight.mT)


def _row_losses(logits: Tensor, labels: Tensor) -> Tensor:
    return -functional.log_softmax(logits, -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def _by_layer(model: Modulated, latents: Latents) -> Callable[[str, Tensor], Tensor] | None:
    """Return what multiplies a parameter's step in every task."""
    if latents.gamma is None:
        return None
    factor = latents.gamma.exp()

    def of(name: str, like: Tensor) -> Tensor:
        layer = model.layer_of.get(name, len(model.layers))
        return factor[:, layer].view(-1, *[1] * (like.dim() - 1))

    return of


def adapt(
    model: Modulated,
    parameters: Mapping[str, Tensor],
    group: _Group,
    latents: Latents,
    rates: Rates,
    plan: Plan,
    *,
    graph: bool,
    observe: Observe | None = None,
) -> Adapted:
    """Take the inner steps on the supports of a group of tasks.

    Parameters
    ----------
    model : the backbone and its roles
    parameters : of the backbone, shared by the tasks
    group : supports
    latents : of the group's tasks
    rates : one step size, or one for each element by name: ``head.weight`` ``(1, F)`` and ``head.bias`` ``(1,)`` are
        shared by the classes
    plan : how
    graph : keep the graph, to differentiate through the adaptation
    observe : called before each step and at the end with its number, parameters (the head's among them) and the
        row losses ``(tasks, n)``
    """
    tasks, mask = len(group.x), (group.mask if group.ragged else None)
    if plan.compat.pad_in_norm:
        mask = None
    factor = _by_layer(model, latents)
    weights = row_weights(group.labels, group.mask, group.ways, latents.omega, group.x.dtype, group.length)
    with torch.set_grad_enabled(graph):
        own: Parameters = {} if latents.z is None else model.modulate(parameters, latents.z)
        shared = {name: p for name, p in parameters.items() if name not in own}

        def step_of(name: str, gradient: Tensor) -> Tensor:
            moved = (rates[name] if isinstance(rates, Mapping) else rates) * gradient
            return moved if factor is None else moved * factor(name, gradient)

        zeros = group.x.new_zeros
        weight, bias = zeros((tasks, group.ways, model.features)), zeros((tasks, group.ways))
        first = {HEAD_WEIGHT: weight, HEAD_BIAS: bias}
        begun = 0
        if plan.head == "proto" or plan.steps:
            h = _features(model, own, shared, group.x, mask)
            chosen = functional.one_hot(group.labels, group.ways).to(h.dtype) * group.mask.unsqueeze(-1).to(h.dtype)
            if plan.head == "proto":
                centre = (chosen.mT @ h) / chosen.sum(1).unsqueeze(-1)
                weight, bias = 2 * centre, -centre.square().sum(-1)
                first = {HEAD_WEIGHT: weight, HEAD_BIAS: bias}
            else:
                if observe is not None:
                    everything = {**shared, **own, HEAD_WEIGHT: weight, HEAD_BIAS: bias}
                    observe(0, everything, _row_losses(_logits(h, weight, bias), group.labels).detach())
                pull = weights.unsqueeze(-1) * (1 / group.ways - chosen)
                weight = -step_of(HEAD_WEIGHT, pull.mT @ (h.detach() if plan.first_order else h))
                bias = -step_of(HEAD_BIAS, pull.sum(1))
                begun = 1
        # Views, apart from what the first head was made of: a gradient with respect to them has an entry for each task,
        # and takes the head for a parameter of its own.
        theta = {name: {**shared, **own}[name].expand(tasks, *parameters[name].shape) for name in model.theta}
        fixed_own = {name: value for name, value in own.items() if name not in theta}
    fixed = {name: p for name, p in shared.items() if name not in theta}
    names = (*theta, HEAD_WEIGHT, HEAD_BIAS)
    before, state = {**theta, **first}, {**theta, HEAD_WEIGHT: weight, HEAD_BIAS: bias}
    diverged = torch.zeros(tasks, dtype=torch.bool, device=group.x.device)

    def losses_at(at: Mapping[str, Tensor]) -> Tensor:
        body = {name: at[name] for name in theta}
        h = _features(model, {**body, **fixed_own}, fixed, group.x, mask)
        return _row_losses(_logits(h, at[HEAD_WEIGHT], at[HEAD_BIAS]), group.labels)

    for step in range(begun, plan.steps):

        def move(*values: Tensor) -> tuple[Tensor, ...]:
            at = dict(zip(names, values, strict=True))
            with torch.enable_grad():
                # What no parameter has a part in yet (a first bias under a step size that is set) becomes a leaf too.
                at = {
                    name: value if graph and value.requires_grad else value.detach().requires_grad_()
                    for name, value in at.items()
                }
                per_row = losses_at(at)
                gradients = _gradients(per_row, weights, at, group, plan, latents, graph=graph)
            moved = [
                (value if graph else value.detach()) - (0.0 if g is None else step_of(name, g))
                for (name, value), g in zip(at.items(), gradients, strict=True)
            ]
            return (per_row.detach(), *moved)

        if plan.recompute and graph:
            per_row, *moved = checkpoint(move, *state.values(), use_reentrant=False)  # pyright: ignore[reportGeneralTypeIssues]
        else:
            per_row, *moved = move(*state.values())
        if observe is not None:
            observe(step, {**fixed, **fixed_own, **state}, per_row)
        if graph:
            state = dict(zip(names, moved, strict=True))
            continue
        with torch.no_grad():
            lost = _lost(per_row, group.mask)
            finite = torch.stack([torch.isfinite(v.flatten(1)).all(1) for v in moved]).all(0)
            diverged |= lost | ~finite
            if bool(diverged.any()):
                state = _where(lost, before, state)
                moved = list(_where(diverged, state, dict(zip(names, moved, strict=True))).values())
        before, state = state, dict(zip(names, moved, strict=True))
    if not graph and plan.steps:
        with torch.no_grad():
            lost = _lost(losses_at(state), group.mask)
            if bool(lost.any()):
                diverged |= lost
                state = _where(lost, before, state)
    if observe is not None:
        with torch.no_grad():
            observe(plan.steps, {**fixed, **fixed_own, **state}, losses_at(state))
    body = {name: state[name] for name in theta}
    return Adapted({**body, **fixed_own}, state[HEAD_WEIGHT], state[HEAD_BIAS], diverged)


def _lost(per_row: Tensor, mask: Tensor) -> Tensor:
    """Tasks whose loss is not finite."""
    return (~torch.isfinite(per_row) & mask).any(1)


def _where(chosen: Tensor, these: Parameters, others: Parameters) -> Parameters:
    """Parameters of some tasks from one point, and of the rest from another."""
    return {
        name: torch.where(chosen.view(-1, *[1] * (value.dim() - 1)), these[name], value)
        for name, value in others.items()
    }


def _gradients(
    per_row: Tensor,
    weights: Tensor,
    at: Mapping[str, Tensor],
    group: _Group,
    plan: Plan,
    latents: Latents,
    *,
    graph: bool,
) -> list[Tensor | None]:
    """Gradients of every task's weighted loss with respect to its own parameters."""
    leaves = list(at.values())
    if not (graph and plan.first_order and latents.omega is not None):
        # A task's loss depends on its own copy only, so that the sum's gradient holds each task's.
        total = (per_row * weights).sum()
        found: Any = torch.autograd.grad(total, leaves, create_graph=graph and not plan.first_order, allow_unused=True)
        return list(found)
    # The class gradients are constants, their weights are not: without this the weights would not learn.
    number = weights.new_tensor(group.length) if group.length else group.mask.sum(1).to(weights.dtype)
    even = group.mask.to(per_row.dtype) * (group.ways / number).view(-1, 1)
    omega = functional.log_softmax(latents.omega, 1).exp()
    summed: list[Tensor | None] = [None] * len(leaves)
    for label in range(group.ways):
        part = (per_row * even * (group.labels == label)).sum()
        found = torch.autograd.grad(part, leaves, retain_graph=True, allow_unused=True)
        for k, gradient in enumerate(found):
            if gradient is not None:
                share = omega[:, label].view(-1, *[1] * (gradient.dim() - 1)) * gradient
                before = summed[k]
                summed[k] = share if before is None else before + share
    return summed


def query(
    model: Modulated,
    parameters: Mapping[str, Tensor],
    adapted: Adapted,
    x: Shaped[Tensor, "tasks m ..."],
    mask: Bool[Tensor, "tasks m"] | None,
    plan: Plan,
    support: tuple[Tensor, Tensor | None] | None = None,
) -> Float[Tensor, "tasks m ways"]:
    """Logits of the queries of a group of tasks.

    Parameters
    ----------
    model, parameters : see :func:`adapt`
    adapted : what that gave
    x, mask : queries; None where all rows are real
    plan : how they are normalised
    support : rows and mask of the supports, needed where the plan normalises by them
    """
    own = adapted.parameters
    shared = {name: p for name, p in parameters.items() if name not in own}
    if plan.statistics == "batch":
        return _logits(_features(model, own, shared, x, mask), adapted.weight, adapted.bias)
    if support is None:
        raise InputError("statistics of the support: the support is needed")
    rows, rows_mask = support

    def one(own: Parameters, rows: Tensor, rows_mask: Tensor | None, x: Tensor) -> Tensor:
        record: dict[str, tuple[Tensor, Tensor]] = {}
        model.call({**shared, **own}, rows, Pass(mask=rows_mask, record=record))
        return model.call({**shared, **own}, x, Pass(statistics=record))

    h = torch.vmap(one, in_dims=(0, 0, None if rows_mask is None else 0, 0))(own, rows, rows_mask, x)
    return _logits(h, adapted.weight, adapted.bias)


def _query_of(tasks: Tasks, index: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return queries, labels, mask (None where all rows are real) and the mask itself, of some tasks."""
    mask = tasks.query_mask[index]
    x, labels = tasks.query[index], tasks.query_labels[index]
    if bool(mask.all()):
        return x, labels, None, mask
    x = without_padding(x, mask)
    return x, without_padding(labels, mask), mask, mask


def _support_of(group: _Group) -> tuple[Tensor, Tensor | None]:
    return group.x, group.mask if group.ragged else None


def answer(
    model: Modulated,
    parameters: Mapping[str, Tensor],
    tasks: Tasks,
    latents: Latents,
    rates: Rates,
    plan: Plan,
    *,
    samples: int = 1,
    most: int = 4096,
) -> tuple[Float[Tensor, "tasks samples m ways"], Int64[Tensor, " tasks"]]:
    """Adapt to every task under each of its samples of the latents, and answer its queries; no graph is kept.

    Parameters
    ----------
    model, parameters, rates, plan : see :func:`adapt`
    tasks : the batch
    latents : of ``tasks * samples`` rows, those of a task one after another
    samples : of the latents for each task
    most : support rows to compute together at most

    Returns
    -------
    Logits, and how many samples of each task diverged (they keep their last finite parameters).
    """
    count = len(tasks)
    many = _repeated(tasks, samples)
    logits = parameters[model.theta[0]].new_zeros((count * samples, tasks.query.shape[1], tasks.ways))
    diverged = torch.zeros(count * samples, dtype=torch.int64, device=logits.device)
    with torch.no_grad():
        for group in _groups(many, model, plan, most=most):
            made = adapt(model, parameters, group, latents.part(group.index), rates, plan, graph=False)
            x, _, mask, _ = _query_of(many, group.index)
            logits[group.index] = query(model, parameters, made, x, mask, plan, _support_of(group))
            diverged[group.index] = made.diverged.to(torch.int64)
    return logits.view(count, samples, *logits.shape[1:]), diverged.view(count, samples).sum(1)


def adapt_all(
    model: Modulated,
    parameters: Mapping[str, Tensor],
    tasks: Tasks,
    latents: Latents,
    rates: Rates,
    plan: Plan,
    *,
    samples: int = 1,
    observe: Observe | None = None,
) -> Adapted:
    """Adapt to tasks of one size under each of their samples of the latents, in one group and without a graph.

    Parameters
    ----------
    model, parameters, latents, rates, plan, observe : see :func:`adapt`
    tasks : the batch
    samples : of the latents for each task
    """
    with torch.no_grad():
        (group,) = _groups(_repeated(tasks, samples), model, replace(plan, backend="vmap"), most=1 << 60)
        order = torch.argsort(group.index)
        made = adapt(model, parameters, group, latents.part(group.index), rates, plan, graph=False, observe=observe)
    own = {name: value[order] for name, value in made.parameters.items()}
    return Adapted(own, made.weight[order], made.bias[order], made.diverged[order])


def _repeated(tasks: Tasks, samples: int) -> Tasks:
    if samples == 1:
        return tasks
    index = torch.arange(len(tasks), device=tasks.support.device).repeat_interleave(samples)
    return Tasks(
        tasks.support[index],
        tasks.support_labels[index],
        tasks.support_mask[index],
        tasks.query[index],
        tasks.query_labels[index],
        tasks.query_mask[index],
        tasks.ways,
    )


@dataclass(frozen=True, eq=False)
class MetaGradients:
    """Gradients of the mean query loss through the adaptation.

    Parameters
    ----------
    gradients : by name of the parameter; learned step sizes under ``rate.<name>``
    latents : of the loss with respect to each latent, ``(tasks, size)`` by variable
    loss : ``(tasks,)`` mean cross-entropy of the queries
    right : ``(tasks,)`` share of right answers
    """

    gradients: Parameters
    latents: Parameters
    loss: Float[Tensor, " tasks"]
    right: Float[Tensor, " tasks"]


def meta_gradients(
    model: Modulated,
    parameters: Mapping[str, Tensor],
    tasks: Tasks,
    latents: Latents,
    rates: Rates,
    plan: Plan,
    *,
    most: int = 1 << 30,
) -> MetaGradients:
    """Differentiate the mean over tasks of the query loss after adaptation.

    The latents are taken as leaves, and their gradients returned, so that groups of tasks can go one after another
    while the inference network, which sees all supports in one pass, is differentiated once.

    Parameters
    ----------
    model, rates, plan : see :func:`adapt`
    parameters : of the backbone; those that require no gradient (frozen ones) have a gradient of 0
    tasks : the batch
    latents : of each task
    most : support rows to compute together at most
    """
    learned = rates if isinstance(rates, Mapping) else {}
    leaves = {**parameters, **{f"rate.{name}": rate for name, rate in learned.items()}}
    inner = Latents(**{name: value.detach().requires_grad_() for name, value in latents.values().items()})
    wanted = {**leaves, **{f"latent.{name}": value for name, value in inner.values().items()}}
    learning = {name: value for name, value in wanted.items() if value.requires_grad}
    total: Parameters = {name: torch.zeros_like(value) for name, value in wanted.items()}
    loss = parameters[model.theta[0]].new_zeros(len(tasks))
    right = torch.zeros_like(loss)
    for group in _groups(tasks, model, plan, most=most):
        made = adapt(model, parameters, group, inner.part(group.index), rates, plan, graph=True)
        x, labels, mask, real = _query_of(tasks, group.index)
        logits = query(model, parameters, made, x, mask, plan, _support_of(group))
        number = real.sum(1)
        per_task = (_row_losses(logits, labels) * real.to(logits.dtype)).sum(1) / number
        found: Any = torch.autograd.grad(per_task.sum() / len(tasks), list(learning.values()), allow_unused=True)
        for name, gradient in zip(learning, found, strict=True):
            if gradient is not None:
                total[name] += gradient
        loss[group.index] = per_task.detach()
        right[group.index] = ((logits.argmax(-1) == labels) & real).sum(1).to(loss.dtype) / number
    return MetaGradients(
        {name: total[name] for name in leaves},
        {name.removeprefix("latent."): value for name, value in total.items() if name.startswith("latent.")},
        loss,
        right,
    )
