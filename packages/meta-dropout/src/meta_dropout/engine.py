"""Adapt to tasks, and differentiate through it: all tasks of a batch at once, as pure functions.

The forward pass is batched over tasks (and over Monte Carlo samples of the noise) by ``torch.func.vmap``. Gradients are
taken by plain automatic differentiation of the *sum* over tasks: a task's loss depends on its own copy of the adapted
parameters only, so that the sum's gradient holds each task's. ``backend="loop"`` does one task after another, to hold
the other against.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from meta_dropout.passes import Pass
from meta_dropout.perturb import Perturbed
from shared_core.errors import InputError

__all__ = [
    "AdaptationError",
    "Adapted",
    "Disturb",
    "MetaGradients",
    "Mix",
    "Plan",
    "Tasks",
    "adapt",
    "cross_entropy",
    "draw_noise",
    "meta_gradients",
    "query",
    "squared_error",
]

Parameters = dict[str, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]
Disturb = Callable[[Parameters, Tensor, Tensor], Tensor]


class AdaptationError(ArithmeticError):
    """An inner loss was not finite; says at which step, and of which task."""


@dataclass(frozen=True, eq=False)
class Tasks:
    """A batch of tasks of one shape.

    Parameters
    ----------
    support : ``(tasks, n, ...)``
    support_labels : ``(tasks, n)`` classes 0..ways-1, or ``(tasks, n, outputs)`` targets of a regression
    query : ``(tasks, m, ...)``
    query_labels : as those of the support
    """

    support: Shaped[Tensor, "tasks n ..."]
    support_labels: Shaped[Tensor, "tasks n ..."]
    query: Shaped[Tensor, "tasks m ..."]
    query_labels: Shaped[Tensor, "tasks m ..."]

    def __len__(self) -> int:
        """Return the number of tasks."""
        return len(self.support)

    def part(self, first: int, count: int) -> Tasks:
        """Return `count` tasks from the position `first` on."""
        at = slice(first, first + count)
        return Tasks(self.support[at], self.support_labels[at], self.query[at], self.query_labels[at])

    def to(self, device: torch.device | str) -> Tasks:
        """Move all of it."""
        return Tasks(*(v.to(device) for v in (self.support, self.support_labels, self.query, self.query_labels)))


@dataclass(frozen=True)
class Plan:
    """How tasks are adapted to.

    Parameters
    ----------
    steps : inner gradient steps
    lr : inner step size, where no learned ones are given
    samples : Monte Carlo samples of the noise in a step; their losses are averaged
    sample : draw noise in the inner loop
    first_order : take the inner gradients for constants (FOMAML)
    adapted : names of the parameters to adapt; None is all of ``theta``
    statistics : ``batch``: queries are normalised by the query batch's own statistics, as in the authors' code
        (transductive); ``support``: by those of the support under the adapted parameters (inductive)
    backend : ``vmap`` or ``loop`` over tasks
    penalty : weight of what sites leave to pay for (``vib``, ``information``)
    recompute : keep no activations of inner steps, and compute them again on the way back
    """

    steps: int = 5
    lr: float = 0.1
    samples: int = 1
    sample: bool = True
    first_order: bool = False
    adapted: tuple[str, ...] | None = None
    statistics: Literal["batch", "support"] = "batch"
    backend: Literal["vmap", "loop"] = "vmap"
    penalty: float = 0.0
    recompute: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be done."""
        if self.steps < 0 or self.samples < 1:
            raise InputError(f"need steps >= 0 and samples >= 1, got {self.steps} and {self.samples}")
        if not self.lr > 0:
            raise InputError(f"lr: must be > 0, got {self.lr}")


@dataclass(frozen=True, eq=False)
class Adapted:
    """What adaptation gives.

    Parameters
    ----------
    parameters : adapted ones by name, ``(tasks, ...)``
    losses : ``(steps, tasks)`` inner losses before each step
    """

    parameters: Parameters
    losses: Float[Tensor, "steps tasks"]


def cross_entropy(logits: Float[Tensor, "n ways"], labels: Int64[Tensor, " n"]) -> Float[Tensor, ""]:
    """Mean cross-entropy."""
    return functional.cross_entropy(logits, labels)


def squared_error(outputs: Float[Tensor, "n outputs"], targets: Float[Tensor, "n outputs"]) -> Float[Tensor, ""]:
    """Mean squared error; ``functional.mse_loss`` fails inside two ``vmap`` of which one batches only its outputs."""
    return (outputs - targets).square().mean()


def draw_noise(
    shapes: Mapping[str, tuple[int, ...]],
    plan: Plan,
    *,
    seeds: list[int],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Float[Tensor, "steps tasks samples ..."]]:
    """Draw the noise of an adaptation, each task's from a seed of its own, so that chunks of tasks do not matter.

    Parameters
    ----------
    shapes : of one pass's noise, by site
    plan : how many steps and samples
    seeds : one for each task
    device, dtype : of the draws; they are made on the CPU, so that they are the same everywhere
    """
    if not plan.sample or not plan.steps:
        return {}
    found: dict[str, list[Tensor]] = {name: [] for name in shapes}
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for name, shape in shapes.items():
            found[name].append(torch.randn((plan.steps, plan.samples, *shape), generator=generator, dtype=dtype))
    return {name: torch.stack(draws, 1).to(device) for name, draws in found.items()}


@dataclass(frozen=True, eq=False)
class Mix:
    """Mixing of one inner step (mixup, manifold mixup), for every task.

    Parameters
    ----------
    weight : ``(tasks,)`` of a row itself; its partner has the rest
    partner : ``(tasks, n)``
    site : where inputs are mixed
    """

    weight: Float[Tensor, " tasks"]
    partner: Int64[Tensor, "tasks n"]
    site: str


def _inner_losses(
    model: Perturbed,
    theta: Parameters,
    fixed: Parameters,
    x: Tensor,
    y: Tensor,
    noise: Mapping[str, Tensor],
    means: Mapping[str, Tensor],
    loss: Loss,
    *,
    penalty: float,
    mix: Mix | None,
) -> Tensor:
    """Inner loss of every task ``(tasks,)``; noise is ``(tasks, samples, ...)``, theta ``(tasks, ...)``."""

    def one(theta: Parameters, x: Tensor, y: Tensor, noise: Parameters, means: Parameters, mixed: Any) -> Tensor:
        def sampled(noise: Parameters) -> Tensor:
            paid: list[Tensor] = []
            at = {} if mix is None else {mix.site: (mixed[0], mixed[1])}
            outputs = model.call({**fixed, **theta}, x, Pass(noise=noise, means=means, mix=at, penalties=paid))
            value = loss(outputs, y)
            if mix is not None:
                value = mixed[0] * value + (1 - mixed[0]) * loss(outputs, y[mixed[1]])
            return value + penalty * torch.stack(paid).sum() if paid and penalty else value

        if not noise:
            return sampled({})
        count = next(iter(noise.values())).shape[0]
        if count == 1:
            return sampled({name: draw[0] for name, draw in noise.items()})
        # Each sample is a pass of its own, with its own statistics: folded into the batch they would share them.
        return torch.vmap(sampled)(noise).mean()

    mixed = (x.new_zeros(len(x)), x.new_zeros(len(x))) if mix is None else (mix.weight, mix.partner)
    return torch.vmap(one)(theta, x, y, dict(noise), dict(means), mixed)


def adapt(
    model: Perturbed,
    parameters: Mapping[str, Tensor],
    support: Tensor,
    labels: Tensor,
    noise: Mapping[str, Tensor],
    plan: Plan,
    *,
    rates: Mapping[str, Tensor] | None = None,
    loss: Loss = cross_entropy,
    graph: bool = True,
    data_sites: tuple[str, ...] = (),
    mixes: Sequence[Mix] | None = None,
    disturb: Disturb | None = None,
) -> Adapted:
    """Take `plan.steps` gradient steps on each task's support, from the same parameters.

    Parameters
    ----------
    model : the perturbed network
    parameters : all of its parameters by name, shared by the tasks
    support, labels : ``(tasks, n, ...)``
    noise : by site, ``(steps, tasks, samples, ...)``; empty for none
    plan : how
    rates : learned step sizes (Meta-SGD) by name of the parameter; None uses ``plan.lr``
    loss : mean over a batch, of outputs and labels
    graph : keep the graph, to differentiate through the adaptation
    data_sites : sites whose input is the data: their generators are evaluated once for all steps and samples
    mixes : one for each step, or None
    disturb : makes the support of a step from parameters, support and labels (adversarial training), or None

    Raises
    ------
    AdaptationError
        When an inner loss is not finite.
    """
    names = plan.adapted if plan.adapted is not None else tuple(model.role("theta"))
    fixed = {name: p for name, p in parameters.items() if name not in names}
    tasks = len(support)
    # Views of the shared parameters: a gradient with respect to them has an entry for each task.
    theta = {name: parameters[name].expand(tasks, *parameters[name].shape) for name in names}
    with torch.set_grad_enabled(graph):
        means = _known_means(model, parameters, support, data_sites)
    losses: list[Tensor] = []
    for step in range(plan.steps):
        drawn = {name: draws[step] for name, draws in noise.items()}
        mix = None if mixes is None else mixes[step]
        seen = support
        if disturb is not None:
            seen = disturb({**fixed, **{name: value.detach() for name, value in theta.items()}}, support, labels)

        def move(
            *values: Tensor, drawn: Parameters = drawn, mix: Mix | None = mix, seen: Tensor = seen
        ) -> tuple[Tensor, ...]:
            at = dict(zip(names, values, strict=True))
            with torch.enable_grad():
                if not graph:
                    at = {name: value.detach().requires_grad_() for name, value in at.items()}
                per_task = _inner_losses(
                    model, at, fixed, seen, labels, drawn, means, loss, penalty=plan.penalty, mix=mix
                )
                found: Any = torch.autograd.grad(
                    per_task.sum(), list(at.values()), create_graph=graph and not plan.first_order, allow_unused=True
                )
            moved: list[Tensor] = []
            for (name, value), gradient in zip(at.items(), found, strict=True):
                if gradient is None:
                    moved.append(value)
                    continue
                rate = plan.lr if rates is None else rates[name]
                moved.append((value if graph else value.detach()) - rate * gradient)
            return (per_task.detach(), *moved)

        if plan.recompute and graph:
            per_task, *moved = checkpoint(move, *theta.values(), use_reentrant=False)  # pyright: ignore[reportGeneralTypeIssues]
        else:
            per_task, *moved = move(*theta.values())
        theta = dict(zip(names, moved, strict=True))
        losses.append(per_task)
    stacked = torch.stack(losses) if losses else support.new_zeros((0, tasks))
    if not bool(torch.isfinite(stacked).all()):
        step, task = (int(v[0]) for v in torch.nonzero(~torch.isfinite(stacked), as_tuple=True))
        raise AdaptationError(
            f"inner step {step + 1} of task {task}: the loss is not finite; lower the inner step size, or look for"
            " extreme values in the support"
        )
    return Adapted(theta, stacked)


def _known_means(
    model: Perturbed, parameters: Mapping[str, Tensor], support: Tensor, sites: tuple[str, ...]
) -> Parameters:
    """Evaluate the generators of the first layers once: their input is the data, and they are not adapted."""
    found: Parameters = {}
    tasks, rows = support.shape[:2]
    for site in sites:
        layer = model.module.get_submodule(site)
        prefix = f"module.{site}." if site else "module."
        own = {
            name.removeprefix(f"{prefix}generator."): p
            for name, p in parameters.items()
            if name.startswith(f"{prefix}generator.")
        }
        if not own or model.noise in {"more-params", "information"}:
            # Adapted with the others, so not the same at every step.
            continue
        folded = torch.func.functional_call(layer.generator, own, (support.flatten(0, 1),))  # type: ignore[arg-type]
        found[site] = folded.unflatten(0, (tasks, rows))
    return found


def query(
    model: Perturbed,
    parameters: Mapping[str, Tensor],
    adapted: Adapted,
    support: Tensor,
    x: Tensor,
    plan: Plan,
) -> Tensor:
    """Answer the query without noise: outputs ``(tasks, m, ...)``.

    Parameters
    ----------
    model : the perturbed network
    parameters : all parameters, shared by the tasks
    adapted : what :func:`adapt` gave
    support : ``(tasks, n, ...)``, needed where the plan normalises by its statistics
    x : ``(tasks, m, ...)``
    plan : how
    """
    fixed = {name: p for name, p in parameters.items() if name not in adapted.parameters}

    def one(theta: Parameters, support: Tensor, x: Tensor) -> Tensor:
        everything = {**fixed, **theta}
        if plan.statistics == "batch":
            return model.call(everything, x, Pass())
        record: dict[str, tuple[Tensor, Tensor]] = {}
        model.call(everything, support, Pass(record=record))
        return model.call(everything, x, Pass(statistics=record))

    return torch.vmap(one)(adapted.parameters, support, x)


@dataclass(frozen=True, eq=False)
class MetaGradients:
    """Gradients of the mean query loss.

    Parameters
    ----------
    gradients : by parameter name; learned step sizes are under ``rate.<name>``
    loss : ``(tasks,)`` query losses
    outputs : ``(tasks, m, ...)`` query outputs
    """

    gradients: Parameters
    loss: Float[Tensor, " tasks"]
    outputs: Tensor


def meta_gradients(
    model: Perturbed,
    parameters: Mapping[str, Tensor],
    tasks: Tasks,
    noise: Mapping[str, Tensor],
    plan: Plan,
    *,
    rates: Mapping[str, Tensor] | None = None,
    loss: Loss = cross_entropy,
    chunk: int | None = None,
    data_sites: tuple[str, ...] = (),
    mixes: Sequence[Mix] | None = None,
    disturb: Disturb | None = None,
) -> MetaGradients:
    """Differentiate the mean query loss after adaptation, through the adaptation.

    Parameters
    ----------
    model : the perturbed network
    parameters : all parameters, requiring gradients
    tasks : the batch
    noise : by site, ``(steps, tasks, samples, ...)``
    plan : how; ``first_order`` leaves the inner gradients out of the graph
    rates : learned step sizes by parameter name
    loss : mean over a batch
    chunk : tasks at a time; gradients are summed over chunks, which changes nothing but memory and time
    data_sites, mixes, disturb : see :func:`adapt`
    """
    size = 1 if plan.backend == "loop" else (chunk or len(tasks))
    leaves = {**parameters, **{f"rate.{name}": rate for name, rate in (rates or {}).items()}}
    total: Parameters = {}
    losses: list[Tensor] = []
    outputs: list[Tensor] = []
    for first in range(0, len(tasks), size):
        part = tasks.part(first, size)
        drawn = {name: draws[:, first : first + size] for name, draws in noise.items()}
        at = slice(first, first + size)
        made = adapt(
            model,
            parameters,
            part.support,
            part.support_labels,
            drawn,
            plan,
            rates=rates,
            loss=loss,
            data_sites=data_sites,
            mixes=None if mixes is None else [Mix(m.weight[at], m.partner[at], m.site) for m in mixes],
            disturb=disturb,
        )
        found = query(model, parameters, made, part.support, part.query, plan)
        per_task = torch.vmap(loss)(found, part.query_labels)
        gradients: Any = torch.autograd.grad(per_task.sum() / len(tasks), list(leaves.values()), allow_unused=True)
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
            value = torch.zeros_like(leaf) if gradient is None else gradient
            total[name] = total[name] + value if name in total else value
        losses.append(per_task.detach())
        outputs.append(found.detach())
    return MetaGradients(total, torch.cat(losses), torch.cat(outputs))
