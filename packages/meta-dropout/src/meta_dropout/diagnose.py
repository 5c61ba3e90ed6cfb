"""Look inside: what the noise does to each unit, where a boundary moves while adapting, and what a plane looks like.

Everything here measures and returns arrays; :mod:`meta_dropout.plots` draws them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, cast

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from meta_dropout import engine
from meta_dropout.engine import Plan
from meta_dropout.layers import PerturbedHead, PerturbedLayer
from meta_dropout.learner import MetaLearner
from meta_dropout.passes import Pass
from meta_dropout.perturb import Perturbed, require_finite
from shared_core.errors import InputError

__all__ = ["Gate", "Panel", "Plane", "Trace", "boundary_grid", "gates", "project", "softplus_moments", "trace"]

# Errors are below 1e-14 at a standard deviation of 1, 1e-10 at 2 and 3e-6 at 4, which a learned one may reach.
_NODES = 64


@dataclass(frozen=True, eq=False)
class Gate:
    """What the noise does to the units of one layer, for each row of a batch.

    Parameters
    ----------
    kind : ``factor``, by which a unit is multiplied; ``added``, the standard deviation of what is added to a unit
    mean : ``(n, ...)``, over the noise; of an ``added`` one, which noise does not change, the value itself
    relative_sd : ``(n, ...)``, standard deviation over the noise divided by the mean; 0 where there is none
    plugin : ``(n, ...)``, the value without noise, which queries get: ``softplus(m)``
    """

    kind: Literal["factor", "added"]
    mean: Float[np.ndarray, "*units"]
    relative_sd: Float[np.ndarray, "*units"]
    plugin: Float[np.ndarray, "*units"]


def softplus_moments(
    mean: Float[Tensor, "*units"], sd: Float[Tensor, "*units"] | float = 1.0
) -> tuple[Float[Tensor, "*units"], Float[Tensor, "*units"]]:
    """Mean and standard deviation of ``softplus(mean + sd eps)`` for a standard normal ``eps``, in float64.

    Gauss-Hermite quadrature with 64 nodes; exact to 1e-9 for ``sd <= 2`` and to 1e-5 for ``sd <= 4``.

    Parameters
    ----------
    mean : of the normal draw
    sd : of the normal draw

    Examples
    --------
    >>> [round(float(v), 6) for v in softplus_moments(torch.tensor(0.0))]
    [0.806059, 0.521071]
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(_NODES)
    weights = weights / weights.sum()
    centre = mean.double()
    pairs = [(float(node), float(weight)) for node, weight in zip(nodes, weights, strict=True)]
    # One node after another: all at once would take 64 times the memory of a layer's output.
    first = torch.zeros_like(centre)
    for node, weight in pairs:
        first += weight * functional.softplus(centre + sd * node)
    second = torch.zeros_like(centre)
    for node, weight in pairs:
        second += weight * (functional.softplus(centre + sd * node) - first).square()
    return first, second.sqrt()


@torch.no_grad()
def gates(
    learner: MetaLearner, x: Float[Tensor, "n ..."], *, parameters: Mapping[str, Tensor] | None = None
) -> dict[str, Gate]:
    """Measure what the noise does to every unit, for each row of a batch, in a pass without noise.

    Factors are there for the families ``multiplicative``, ``learned-variance``, ``independent`` and ``fixed``, and
    without spread for ``deterministic`` and ``more-params``. The head's entry, of shape ``(n,)``, is the standard
    deviation ``s`` that all logits of a row share; ``additive`` layers have one for each unit. Other families have
    none.

    Parameters
    ----------
    learner : with its generators
    x : ``(n, ...)`` batch; normalisations take their statistics from it, so give a whole support rather than one row
    parameters : those of a task, by name, as :meth:`meta_dropout.TaskModel.parameters_by_name` gives them; None takes
        those that every task starts from

    Returns
    -------
    By the name of the layer, in the order of the sites.
    """
    require_finite(x, "x")
    model, x = learner.model, x.to(learner.device)
    model.prepare(x)
    values: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(parameters or {})}
    inputs: dict[str, Tensor] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    model.call(values, x, Pass(inputs=inputs, shapes=shapes))
    found: dict[str, Gate] = {}
    for site in model.sites:
        layer = model.module.get_submodule(site)
        own = f"module.{site}." if site else "module."

        def branch(kind: str, site: str = site, layer: nn.Module = layer, own: str = own) -> Tensor:
            prefix = f"{own}{kind}."
            weights = {name.removeprefix(prefix): p for name, p in values.items() if name.startswith(prefix)}
            return torch.func.functional_call(cast("nn.Module", getattr(layer, kind)), weights, (inputs[site],))

        if isinstance(layer, PerturbedHead):
            if layer.sampled and layer.noise != "vib":
                found[site] = _added(functional.softplus(branch("generator")).squeeze(-1))
        elif isinstance(layer, PerturbedLayer):
            level = values.get(f"{own}level")
            gate = _layer_gate(layer.noise, branch, shapes[site], x.new_zeros(()) if level is None else level)
            if gate is not None:
                found[site] = gate
    return found


def _layer_gate(noise: str, branch: Callable[[str], Tensor], shape: tuple[int, ...], level: Tensor) -> Gate | None:
    match noise:
        case "multiplicative":
            return _factor(branch("generator"), 1.0)
        case "learned-variance":
            return _factor(branch("generator"), functional.softplus(branch("spread")).cpu().double())
        case "independent" | "fixed":
            return _factor(level.expand(shape), 1.0)
        case "deterministic" | "more-params":
            return _factor(branch("generator"), None)
        case "additive":
            return _added(functional.softplus(branch("generator")))
        case _:
            return None


def _factor(mean: Tensor, sd: Tensor | float | None) -> Gate:
    # Some devices have no float64.
    mean = mean.cpu().double()
    plugin = functional.softplus(mean)
    if sd is None:
        return Gate("factor", _array(plugin), np.zeros(plugin.shape), _array(plugin))
    first, spread = softplus_moments(mean, sd)
    return Gate("factor", _array(first), _array(spread / first), _array(plugin))


def _added(sd: Tensor) -> Gate:
    return Gate("added", _array(sd), np.zeros(sd.shape), _array(sd))


def _array(value: Tensor) -> Float[np.ndarray, "..."]:
    return value.detach().cpu().double().numpy()


@dataclass(frozen=True, eq=False)
class Trace:
    """What the head sees and what it is, before the first inner step and after each.

    Parameters
    ----------
    labels : ``(n,)`` classes of the support
    query_labels : ``(m,)`` classes of the query, or None
    support : ``(steps + 1, n, features)`` input of the head, without noise
    noisy : ``(steps + 1, draws, n, features)``, with noise; a draw is the same at all steps
    query : ``(steps + 1, m, features)``, without noise
    weight : ``(steps + 1, ways, features)``
    bias : ``(steps + 1, ways)``
    """

    labels: Int64[np.ndarray, " n"]
    query_labels: Int64[np.ndarray, " m"] | None
    support: Float[np.ndarray, "steps n features"]
    noisy: Float[np.ndarray, "steps draws n features"]
    query: Float[np.ndarray, "steps m features"]
    weight: Float[np.ndarray, "steps ways features"]
    bias: Float[np.ndarray, "steps ways"]


def trace(
    learner: MetaLearner,
    support: Float[Tensor, "n ..."],
    labels: Int64[Tensor, " n"],
    query: Float[Tensor, "m ..."],
    *,
    query_labels: Int64[Tensor, " m"] | None = None,
    noisy: int = 10,
    steps: int | None = None,
    seed: int = 0,
) -> Trace:
    """Adapt to one task as :meth:`meta_dropout.MetaLearner.adapt` does, and keep what the head sees at every step.

    Parameters
    ----------
    learner : a classifier, which does not change
    support : ``(n, ...)``
    labels : ``(n,)`` classes 0..ways-1
    query : ``(m, ...)``
    query_labels : kept with the rest, to tell the classes apart in a picture; nothing learns from them
    noisy : noisy passes of the support; a method without noise gets none
    steps : inner steps; None is as in training
    seed : of the noise

    Raises
    ------
    InputError
        For a regression, or a network without a linear head.
    """
    if noisy < 0:
        raise InputError(f"noisy: must be at least 0, got {noisy}")
    if query_labels is not None and len(query_labels) != len(query):
        raise InputError(f"query_labels: need one for each of {len(query)} queries, got {len(query_labels)}")
    require_finite(query, "query")
    model = learner.model
    support, query = support.to(learner.device), query.to(learner.device)
    path = _trajectory(learner, support, labels, steps, seed)
    weight, bias = _head(model)[1:]
    draws = _draws(model, support, noisy, seed)
    kept: dict[str, list[Tensor]] = {name: [] for name in ("support", "noisy", "query", "weight", "bias")}
    for values in path:
        record: dict[str, tuple[Tensor, Tensor]] = {}
        clean = _features(model, values, support, Pass(record=record))
        told = Pass() if learner.plan.statistics == "batch" else Pass(statistics=record)
        each = [_features(model, values, support, Pass(noise=draw)) for draw in draws]
        kept["support"].append(clean)
        kept["noisy"].append(torch.stack(each) if each else clean.new_zeros((0, *clean.shape)))
        kept["query"].append(_features(model, values, query, told))
        kept["weight"].append(values[weight])
        kept["bias"].append(values[bias] if bias in values else values[weight].new_zeros(len(values[weight])))
    arrays = {name: _array(torch.stack(rows)) for name, rows in kept.items()}
    return Trace(
        labels=labels.cpu().long().numpy(),
        query_labels=None if query_labels is None else query_labels.cpu().long().numpy(),
        **arrays,
    )


def _trajectory(
    learner: MetaLearner, support: Tensor, labels: Tensor, steps: int | None, seed: int
) -> list[dict[str, Tensor]]:
    """Return all parameters of one task before the first inner step and after each."""
    if learner.task != "classification":
        raise InputError("a boundary lies between classes, and this learner was made for a regression")
    if not len(support):
        raise InputError("support: has no examples")
    if steps is not None and steps < 0:
        raise InputError(f"steps: must be at least 0, got {steps}")
    model = learner.model
    model.prepare(support)
    start = learner.adapt(support, labels, spread=0, steps=0).parameters_by_name()
    values = {name: p.detach() for name, p in start.items()}
    count = learner.plan.steps if steps is None else steps
    plan = replace(learner.plan, steps=count, samples=learner.test_samples)
    many, many_labels = support[None], labels.to(learner.device).long()[None]
    # Drawn for all steps at once: fewer steps would take other numbers from the same seed.
    noise, sites = learner._noise_for(values, many, plan, [seed])  # pyright: ignore[reportPrivateUsage]
    mixes = learner._mixes(many, plan, [seed])  # pyright: ignore[reportPrivateUsage]
    disturb = learner._disturb()  # pyright: ignore[reportPrivateUsage]
    path = [values]
    for step in range(count):
        made = engine.adapt(
            model,
            path[-1],
            many,
            many_labels,
            {name: draws[step : step + 1] for name, draws in noise.items()},
            replace(plan, steps=1),
            rates={name: rate.detach() for name, rate in learner.rates.items()} or None,
            graph=False,
            data_sites=sites,
            mixes=None if mixes is None else mixes[step : step + 1],
            disturb=disturb,
        )
        path.append({**path[-1], **{name: value[0].detach() for name, value in made.parameters.items()}})
    return path


def _head(model: Perturbed) -> tuple[nn.Module, str, str]:
    """Return the linear map that gives the logits, and the names of its weight and bias."""
    if model.head is None:
        raise InputError("the network has no linear head, so there is no boundary to follow")
    head = model.module.get_submodule(model.head)
    prefix = f"module.{model.head}." if model.head else "module."
    if isinstance(head, PerturbedHead):
        head, prefix = head.main, f"{prefix}main."
    return head, f"{prefix}weight", f"{prefix}bias"


@torch.no_grad()
def _features(model: Perturbed, values: Mapping[str, Tensor], x: Tensor, told: Pass) -> Float[Tensor, "n features"]:
    """Return the input of the head in one pass."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])

    handle = _head(model)[0].register_forward_pre_hook(keep)
    try:
        model.call(values, x, told)
    finally:
        handle.remove()
    return seen[-1].flatten(1)


def _draws(model: Perturbed, support: Tensor, count: int, seed: int) -> list[dict[str, Tensor]]:
    """Draw the noise of some passes of the support, a stream apart from the adaptation's."""
    shapes = model.prepare(support)
    if model.noise != "vib":
        # Noise on the logits comes after the features; its width may be another than this task's.
        shapes = {name: shape for name, shape in shapes.items() if name != model.head}
    if not shapes or not count:
        return []
    own = int(np.random.default_rng([seed, 5]).integers(1 << 62))
    drawn = engine.draw_noise(shapes, Plan(steps=count), seeds=[own], device=support.device, dtype=support.dtype)
    return [{name: draws[place, 0, 0] for name, draws in drawn.items()} for place in range(count)]


@dataclass(frozen=True, eq=False)
class Panel:
    """Features of two classes, seen along the boundary between them, at one inner step.

    Points are ``(x, y)``: `x` is the signed distance to the boundary, positive on the first class's side, and `y` the
    first principal component of what is left when the direction of `x` is taken out.

    Parameters
    ----------
    step : inner steps taken
    classes : the two
    labels : ``(n,)`` of the support
    query_labels : ``(m,)`` of the query; None where they are not known
    support : ``(n, 2)``
    noisy : ``(draws, n, 2)``
    query : ``(m, 2)``
    """

    step: int
    classes: tuple[int, int]
    labels: Int64[np.ndarray, " n"]
    query_labels: Int64[np.ndarray, " m"] | None
    support: Float[np.ndarray, "n 2"]
    noisy: Float[np.ndarray, "draws n 2"]
    query: Float[np.ndarray, "m 2"]


def project(trace: Trace, a: int, b: int) -> list[Panel]:
    """Project the features of two classes on the normal of the boundary between them, and on what varies most beside.

    The normal is ``(w_a - w_b) / |w_a - w_b|``. The paper's figure has a one-dimensional t-SNE of the residual as its
    other axis; here it is the residual's first principal component, which is linear and comes out the same every time.
    Its sign is chosen so that it points as at the step before.

    Parameters
    ----------
    trace : of an adaptation. Queries are those of the two classes if their classes are known, else all
    a, b : the classes

    Returns
    -------
    One for each inner step, and the first before any.
    """
    ways = trace.weight.shape[1]
    for name, value in (("a", a), ("b", b)):
        if not 0 <= value < ways:
            raise InputError(f"{name}: must be a class 0..{ways - 1}, got {value}")
    if a == b:
        raise InputError(f"a boundary lies between two classes, got {a} twice")
    rows = np.isin(trace.labels, (a, b))
    known = trace.query_labels
    asked = np.ones(trace.query.shape[1], dtype=np.bool_) if known is None else np.isin(known, (a, b))
    before: NDArray[np.float64] | None = None
    panels: list[Panel] = []
    for step in range(len(trace.support)):
        across = trace.weight[step, a] - trace.weight[step, b]
        length = float(np.linalg.norm(across))
        if length <= 0:
            raise InputError(f"the head has the same weights for the classes {a} and {b} at step {step}: no boundary")
        normal, offset = across / length, float(trace.bias[step, a] - trace.bias[step, b]) / length
        parts = [trace.support[step][rows], trace.noisy[step][:, rows], trace.query[step][asked]]
        whole = np.concatenate([part.reshape(-1, len(normal)) for part in parts])
        residual = whole - np.outer(whole @ normal, normal)
        residual -= residual.mean(0)
        main = np.linalg.svd(residual, full_matrices=False)[2][0]
        towards = main[np.abs(main).argmax()] if before is None else main @ before
        before = main = main if towards >= 0 else -main
        points = np.stack([whole @ normal + offset, residual @ main], 1)
        ends = np.cumsum([part.size // len(normal) for part in parts])
        support, noisy, query = np.split(points, ends[:-1])
        panels.append(
            Panel(
                step=step,
                classes=(a, b),
                labels=trace.labels[rows],
                query_labels=None if known is None else known[asked],
                support=support,
                noisy=noisy.reshape(-1, int(rows.sum()), 2),
                query=query,
            )
        )
    return panels


@dataclass(frozen=True, eq=False)
class Plane:
    """Class probabilities over a grid of points in the plane, before the first inner step and after each.

    Parameters
    ----------
    x, y : ``(resolution,)`` coordinates
    probability : ``(steps + 1, resolution, resolution, ways)``, rows along `y`
    """

    x: Float[np.ndarray, " resolution"]
    y: Float[np.ndarray, " resolution"]
    probability: Float[np.ndarray, "steps resolution resolution ways"]


@torch.no_grad()
def boundary_grid(
    learner: MetaLearner,
    support: Float[Tensor, "n dimensions"],
    labels: Int64[Tensor, " n"],
    *,
    steps: int | None = None,
    extent: tuple[float, float, float, float] | None = None,
    resolution: int = 101,
    seed: int = 0,
) -> Plane:
    """Adapt to a task of points in the plane, and evaluate a grid without noise at every inner step.

    Parameters
    ----------
    learner : a classifier of two inputs, which does not change
    support : ``(n, 2)``
    labels : ``(n,)`` classes 0..ways-1
    steps : inner steps; None is as in training
    extent : left, right, bottom and top of the grid; None is the support with half its width around
    resolution : points along each side. Normalisations, if any, take their statistics from the support, as those of a
        grid would mean nothing
    seed : of the noise
    """
    if support.dim() != 2 or support.shape[1] != 2:
        raise InputError(f"support: needs points in the plane, (n, 2), got {tuple(support.shape)}")
    if resolution < 2:
        raise InputError(f"resolution: must be at least 2, got {resolution}")
    support = support.to(learner.device)
    path = _trajectory(learner, support, labels, steps, seed)
    if extent is None:
        (left, bottom), (right, top) = support.amin(0).tolist(), support.amax(0).tolist()
        around = 0.5 * max(right - left, top - bottom) or 1.0
        extent = left - around, right + around, bottom - around, top + around
    left, right, bottom, top = extent
    if not (left < right and bottom < top):
        raise InputError(f"extent: needs left < right and bottom < top, got {extent}")
    x, y = np.linspace(left, right, resolution), np.linspace(bottom, top, resolution)
    grid = torch.from_numpy(np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)).to(support)
    found: list[Float[np.ndarray, "resolution resolution ways"]] = []
    for values in path:
        record: dict[str, tuple[Tensor, Tensor]] = {}
        learner.model.call(values, support, Pass(record=record))
        logits = learner.model.call(values, grid, Pass(statistics=record))
        found.append(_array(functional.softmax(logits.cpu().double(), -1)).reshape(resolution, resolution, -1))
    return Plane(x, y, np.stack(found))
