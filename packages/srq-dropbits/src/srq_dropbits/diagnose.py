"""The estimator lab: what each gradient estimator passes on, how biased it is, and what it does to a network's weights.

Three questions that papers argue about and users cannot see. :func:`gain_curve`: how much of the gradient of the
quantized value reaches the value itself, across the grid. :func:`estimator_bias`: how far that is from the gradient of
the expected loss, which can be enumerated on small layers (Louizos et al., arXiv:1810.01875, Eq 2-4).
:func:`weight_diagnosis`: how many weights of a real network stand still, or are sent the wrong way.

Why the multi-class straight-through estimator needs its control variate (specification 2.4): with ``c = 0`` the gain is
``g_m dpi_m/dx``, which is 0 in the whole cell of ``g_m = 0``, and negative in the outer half of every other inner cell;
over such a cell it averages to 0. Only the two outermost cells always pull the right way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from shared_core.device import seeded
from shared_core.errors import no_such
from srq_dropbits.config import METHODS, Estimator
from srq_dropbits.errors import InvalidBitsError, SrqError
from srq_dropbits.functional import (
    Baseline,
    concrete_quantize,
    grid_round,
    log_probs,
    lsq_quantize,
    mode_quantize,
    stochastic_round,
)
from srq_dropbits.grid import Grid
from srq_dropbits.quantizers import WeightQuantizer, mse_step
from srq_dropbits.structure import float_weight, quantized_layers, quantizers, weight_quantizer

__all__ = [
    "LAB",
    "Agreement",
    "EstimatorBias",
    "GainCurve",
    "LayerDiagnosis",
    "SmallLayer",
    "WeightDiagnosis",
    "bias_study",
    "estimator_bias",
    "gain_curve",
    "random_layer",
    "weight_diagnosis",
]

LAB = ("lsq", "sr", "rq", "rq-st", "mcste-zero", "mcste-input", "mcste-clipped", "mode-soft", "mode-gumbel")
"""Estimators that differ in their gradient, by the names that ``METHODS`` gives them; ``lsq`` is the identity."""
_SAMPLING = frozenset({"sr", "rq", "rq-st", "rq-local", "mode-gumbel"})
_MOST_COMBINATIONS = 200_000


def _settings(name: str) -> tuple[Estimator, Baseline]:
    """Return estimator and baseline of a method's name."""
    settings = METHODS.get(name, {})
    estimator = settings.get("estimator")
    if estimator is None or "dropbits" in settings or estimator in {"pact", "ste-minmax", "lsq+"}:
        raise SrqError(str(no_such("estimator", name, [*LAB, "rq-local"])))
    return estimator, settings.get("baseline", "input")


def _quantize(
    name: str, x: Tensor, alpha: Tensor, sigma: Tensor, grid: Grid, temperature: float, generator: torch.Generator
) -> Tensor:
    if grid.stride != 1:
        raise InvalidBitsError(f"the lab needs grids of neighbouring integers, not every {grid.stride}nd; use 'signed'")
    estimator, baseline = _settings(name)
    bounds = (grid.n_lo, grid.n_hi)
    options: dict[str, Any] = {"temperature": temperature, "generator": generator}
    match estimator:
        case "mcste":
            return mode_quantize(x, alpha, sigma, *bounds, baseline=baseline)
        case "mode-soft":
            return mode_quantize(x, alpha, sigma, *bounds, soft=True)
        case "mode-gumbel":
            return concrete_quantize(x, alpha, sigma, *bounds, forward_mode=True, **options)
        case "rq" | "rq-st":
            return concrete_quantize(x, alpha, sigma, *bounds, hard=estimator == "rq-st", **options)
        case "rq-local":
            return concrete_quantize(x, alpha, sigma, *bounds, delta=3.0, **options)
        case "sr":
            return stochastic_round(x, alpha, *bounds, generator=generator)
        case _:
            return lsq_quantize(x, alpha, *bounds)


# ---- gain


@dataclass(frozen=True)
class GainCurve:
    """What an estimator gives back for a value, and what share of the gradient it passes on.

    Parameters
    ----------
    estimator : its name
    grid : that was quantized to
    alpha : step
    rho : noise scale / step
    x : (points,) values, over the grid and one step beyond on both sides
    value : (points,) quantized value, the mean over draws where it is random
    gain : (points,) d value / d x as the estimator has it, the mean over draws
    spread : (points,) standard deviation of the gain over draws; 0 for estimators that do not sample
    """

    estimator: str
    grid: Grid
    alpha: float
    rho: float
    x: Float[np.ndarray, " points"]
    value: Float[np.ndarray, " points"]
    gain: Float[np.ndarray, " points"]
    spread: Float[np.ndarray, " points"]

    @property
    def _inside(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        v = self.x / self.alpha
        return (v > self.grid.n_lo - 0.5) & (v < self.grid.n_hi + 0.5)

    @property
    def dead(self) -> float:
        """Share of the grid's cells, by length, in which no gradient ever passes."""
        return float(np.mean((self.gain == 0)[self._inside] & (self.spread == 0)[self._inside]))

    @property
    def opposed(self) -> float:
        """Share of the grid's cells in which the mean gain is negative: a step goes uphill."""
        return float(np.mean(self.gain[self._inside] < 0))

    @property
    def mean_gain(self) -> float:
        """Gain averaged over the grid's cells."""
        return float(np.mean(self.gain[self._inside]))

    def to_dict(self) -> dict[str, Any]:
        """Return the curve as plain values."""
        arrays = {name: getattr(self, name).tolist() for name in ("x", "value", "gain", "spread")}
        head = {"estimator": self.estimator, "grid": asdict(self.grid), "alpha": self.alpha, "rho": self.rho}
        return head | arrays | {"dead": self.dead, "opposed": self.opposed, "mean_gain": self.mean_gain}


def gain_curve(
    estimator: str,
    grid: Grid,
    alpha: float | int = 1.0,
    rho: float | int = 1 / 3,
    points: int = 400,
    *,
    temperature: float | int = 1.0,
    draws: int = 2000,
    seed: int = 0,
) -> GainCurve:
    """Measure what an estimator passes on at each place of the grid: exactly, or over draws where it samples.

    Parameters
    ----------
    estimator : one of ``LAB``
    grid : with stride 1
    alpha : step > 0
    rho : noise scale / step > 0
    points : how many values, over the grid and a step beyond
    temperature : of concrete samples
    draws : of estimators that sample
    seed : of the draws

    Examples
    --------
    >>> curve = gain_curve("mcste-zero", Grid.signed(2), points=400)
    >>> round(curve.dead, 2), curve.opposed
    (0.33, 0.0)
    """
    x = torch.linspace(alpha * (grid.n_lo - 1), alpha * (grid.n_hi + 1), points, dtype=torch.float64)
    step = torch.tensor(float(alpha), dtype=torch.float64)
    count = draws if estimator in _SAMPLING else 1
    wide = x.expand(count, points).contiguous().requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    value = _quantize(estimator, wide, step, step * float(rho), grid, float(temperature), generator)
    (gain,) = torch.autograd.grad(value.sum(), wide)
    return GainCurve(
        estimator,
        grid,
        float(alpha),
        float(rho),
        x=x.numpy(),
        value=value.detach().mean(0).numpy(),
        gain=gain.mean(0).numpy(),
        spread=gain.std(0, correction=0).numpy(),
    )


# ---- bias and variance on layers that can be enumerated


@dataclass(frozen=True)
class SmallLayer:
    """A layer of few weights with a squared error: small enough to enumerate all its quantized versions.

    Parameters
    ----------
    inputs : (rows, n) one row an example
    targets : (rows,) what the layer should give
    weights : (n,) where its gradients are taken
    """

    inputs: Float[Tensor, "rows n"]
    targets: Float[Tensor, " rows"]
    weights: Float[Tensor, " n"]

    def loss(self, weights: Float[Tensor, "*count n"]) -> Float[Tensor, "*count"]:
        """Return half the mean squared error of layers with these weights, (count, n)."""
        return (weights @ self.inputs.T - self.targets).square().mean(-1) / 2


def random_layer(weights: int = 4, rows: int = 32, noise: float | int = 0.3, seed: int = 0) -> SmallLayer:
    """Make a layer with correlated Gaussian inputs, near the weights that made its targets.

    Parameters
    ----------
    weights : how many, up to 6
    rows : examples
    noise : standard deviation of the distance to the true weights, which have 1
    seed : of all numbers
    """
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn((rows, weights), generator=draw, dtype=torch.float64)
    # Correlated inputs, so that the best choice for a weight depends on the others.
    inputs = inputs + inputs.roll(1, 1) / 2
    truth = torch.randn(weights, generator=draw, dtype=torch.float64)
    start = truth + noise * torch.randn(weights, generator=draw, dtype=torch.float64)
    return SmallLayer(inputs, inputs @ truth, start)


@dataclass(frozen=True)
class Agreement:
    """How a mean gradient compares to a reference.

    Parameters
    ----------
    cosine : of the angle between them; 0 if one of them vanishes
    size : norm of the gradient / norm of the reference
    error : norm of their difference / norm of the reference: the relative bias
    """

    cosine: float
    size: float
    error: float


@dataclass(frozen=True)
class EstimatorBias:
    """Bias and variance of an estimator's gradient with respect to the weights of small layers.

    Parameters
    ----------
    estimator : its name
    expected : against the gradient of the expected loss under the distribution over the grid, all K^n terms
    difference : against finite differences: what the quantized loss changes by when one weight moves by a step
    spread : standard deviation of one draw's gradient / norm of the gradient of the expected loss
    dead : share of the weights whose gradient is 0 in every draw
    """

    estimator: str
    expected: Agreement
    difference: Agreement
    spread: float
    dead: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def estimator_bias(
    layer: SmallLayer,
    grid: Grid,
    alpha: float | int | None = None,
    rho: float | int = 1 / 3,
    *,
    estimators: Sequence[str] = LAB,
    temperature: float | int = 1.0,
    draws: int = 2000,
    seed: int = 0,
) -> list[EstimatorBias]:
    """Hold the gradient of each estimator against the true one on a layer small enough to enumerate.

    Parameters
    ----------
    layer : with n weights
    grid : of K points with stride 1, K^n at most 200,000
    alpha : step; None: that of the least squared error
    rho : noise scale / step
    estimators : names from ``LAB``
    temperature : of concrete samples
    draws : of estimators that sample
    seed : of the draws

    Raises
    ------
    SrqError
        When there are too many combinations to enumerate, or an estimator is unknown.
    """
    w = layer.weights.detach().double()
    if grid.size ** len(w) > _MOST_COMBINATIONS:
        raise SrqError(
            f"{len(w)} weights on {grid.size} grid points have {grid.size ** len(w):,} combinations;"
            f" at most {_MOST_COMBINATIONS:,} can be enumerated: take fewer weights or bits"
        )
    step = mse_step(w.unsqueeze(0), grid.n_lo, grid.n_hi)[0] if alpha is None else torch.tensor(float(alpha)).double()
    sigma = step * float(rho)
    expected = _expected_gradient(layer, w, step, sigma, grid)
    difference = _finite_difference(layer, w, step, grid)
    found: list[EstimatorBias] = []
    for name in estimators:
        count = draws if name in _SAMPLING else 1
        wide = w.expand(count, len(w)).contiguous().requires_grad_(True)
        generator = torch.Generator().manual_seed(seed)
        value = _quantize(name, wide, step, sigma, grid, float(temperature), generator)
        (gradient,) = torch.autograd.grad(layer.loss(value).sum(), wide)
        mean = gradient.mean(0)
        spread = (gradient - mean).square().sum(1).mean().sqrt() / expected.norm().clamp(min=1e-300)
        found.append(
            EstimatorBias(
                name,
                _agreement(mean, expected),
                _agreement(mean, difference),
                float(spread),
                float(gradient.eq(0).all(0).double().mean()),
            )
        )
    return found


def _expected_gradient(layer: SmallLayer, w: Tensor, alpha: Tensor, sigma: Tensor, grid: Grid) -> Tensor:
    """Differentiate ``sum_q P(q | w) L(q)`` over all quantized layers q."""
    w = w.clone().requires_grad_(True)
    log_pi = log_probs(w, alpha, sigma, grid.n_lo, grid.n_hi)
    choices = torch.cartesian_prod(*[torch.arange(grid.size)] * len(w)).reshape(-1, len(w))
    log_p = log_pi.gather(1, choices.T).sum(0)
    losses = layer.loss(alpha * (choices + grid.n_lo).to(w.dtype))
    (gradient,) = torch.autograd.grad((log_p.exp() * losses).sum(), w)
    return gradient


def _finite_difference(layer: SmallLayer, w: Tensor, alpha: Tensor, grid: Grid) -> Tensor:
    """Give the slope of the rounded layer's loss, averaged over a step around each weight, the others as they are."""
    shift = torch.eye(len(w), dtype=w.dtype) * alpha / 2

    def loss(at: Tensor) -> Tensor:
        return layer.loss(alpha * grid_round(at, alpha, grid.n_lo, grid.n_hi))

    # Along one coordinate the average slope over a width is the difference between its ends.
    return (loss(w + shift) - loss(w - shift)) / alpha


def _agreement(gradient: Tensor, reference: Tensor) -> Agreement:
    norm, length = float(gradient.norm()), float(reference.norm())
    if not length:
        return Agreement(0.0, 0.0 if not norm else math.inf, 0.0 if not norm else math.inf)
    cosine = float(gradient @ reference) / (norm * length) if norm else 0.0
    return Agreement(cosine, norm / length, float((gradient - reference).norm()) / length)


def bias_study(
    layers: int = 30,
    weights: int = 4,
    bits: int = 2,
    rho: float | int = 1 / 3,
    *,
    estimators: Sequence[str] = LAB,
    temperature: float | int = 1.0,
    draws: int = 500,
    seed: int = 0,
) -> list[EstimatorBias]:
    """Average :func:`estimator_bias` over random layers.

    Parameters
    ----------
    layers : how many
    weights : of each
    bits : of a symmetric grid
    rho : noise scale / step
    estimators : names from ``LAB``
    temperature : of concrete samples
    draws : of estimators that sample
    seed : of layers and draws

    Examples
    --------
    >>> zero, soft = bias_study(5, bits=2, estimators=("mcste-zero", "mode-soft"))
    >>> zero.expected.cosine < soft.expected.cosine
    True
    """
    grid = Grid.signed(bits)
    options: dict[str, Any] = {"estimators": estimators, "temperature": temperature, "draws": draws}
    runs = [
        estimator_bias(random_layer(weights, seed=seed * 100_000 + place), grid, None, rho, seed=place, **options)
        for place in range(layers)
    ]
    return [_averaged([run[place] for run in runs]) for place in range(len(estimators))]


def _averaged(each: Sequence[EstimatorBias]) -> EstimatorBias:
    def mean(value: Callable[[EstimatorBias], float]) -> float:
        return math.fsum(value(one) for one in each) / len(each)

    def agreement(part: Callable[[EstimatorBias], Agreement]) -> Agreement:
        return Agreement(*(mean(lambda one, key=key: getattr(part(one), key)) for key in ("cosine", "size", "error")))

    return EstimatorBias(
        each[0].estimator,
        agreement(lambda one: one.expected),
        agreement(lambda one: one.difference),
        mean(lambda one: one.spread),
        mean(lambda one: one.dead),
    )


# ---- the weights of a network


@dataclass(frozen=True)
class LayerDiagnosis:
    """What one estimator does to the weights of one layer, or of all.

    Parameters
    ----------
    estimator : its name
    layer : its name, or ``total``
    weights : how many
    zero : share whose gradient is exactly 0 where the identity's is not
    opposed : share whose gradient has the opposite sign of the identity's, the straight-through estimator's
    beyond : share outside the grid's outermost cells
    in_zero_cell : share that is rounded to 0
    size : sum of the gradient's magnitudes / that of the identity's
    cosine : of the angle between both
    """

    estimator: str
    layer: str
    weights: int
    zero: float
    opposed: float
    beyond: float
    in_zero_cell: float
    size: float
    cosine: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


@dataclass(frozen=True)
class WeightDiagnosis:
    """What each estimator does to a network's weights.

    Parameters
    ----------
    layers : a row an estimator and layer
    total : a row an estimator
    """

    layers: tuple[LayerDiagnosis, ...]
    total: tuple[LayerDiagnosis, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {"layers": [row.to_dict() for row in self.layers], "total": [row.to_dict() for row in self.total]}


def weight_diagnosis(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Callable[[Any, Any], Tensor] = nn.functional.cross_entropy,
    estimators: Sequence[str] = LAB,
    inputs: bool = False,
    max_batches: int = 8,
    seed: int = 0,
) -> WeightDiagnosis:
    """Give every estimator the same network and batches, and look at the gradients of its weights.

    Batch norm and dropout are as at test time and no bits are dropped, so that nothing but the estimator differs.
    Estimators that sample do so once a batch. The model is left as it was.

    Parameters
    ----------
    model : a prepared and calibrated model
    batches : pairs (x, y), with x as (n, features)
    loss : of the model's output and y, a () tensor
    estimators : names from ``LAB``
    inputs : use the estimator for inputs of layers too; otherwise these pass gradients by the identity inside their
        range, and differences are those of the weights alone
    max_batches : how many to average over
    seed : of the draws

    Raises
    ------
    SrqError
        When the model is not prepared, has DoReFa's weights, or there is no batch.
    """
    pairs = [batch for batch, _ in zip(batches, range(max_batches), strict=False)]
    if not pairs:
        raise SrqError("no batch to diagnose with: the loader is empty")
    weights = _weights(model)
    for part in weights:
        if part.grid.stride != 1:
            raise SrqError(
                f"layer '{part.name}': estimator '{part.estimator}' has a grid of its own; prepare the model with 'lsq'"
            )
    for name in estimators:
        _settings(name)
    identity = _gradients(model, weights, "lsq", pairs, loss, inputs=False, seed=seed, of_quantized=True)
    rows: list[LayerDiagnosis] = []
    total: list[LayerDiagnosis] = []
    for name in estimators:
        gradients = _gradients(model, weights, name, pairs, loss, inputs=inputs, seed=seed)
        parts = [_facts(part, weights[part], gradients[part], identity[part]) for part in weights]
        rows += [_row(name, part.name, facts) for part, facts in zip(weights, parts, strict=True)]
        total.append(_row(name, "total", torch.stack(parts).sum(0)))
    return WeightDiagnosis(tuple(rows), tuple(total))


def _weights(model: nn.Module) -> dict[WeightQuantizer, Tensor]:
    found: dict[WeightQuantizer, Tensor] = {}
    for _, module in quantized_layers(model):
        part = weight_quantizer(module)
        if part is None or part in found or part.grid.size == 1:
            continue
        weight = float_weight(module)
        if weight.requires_grad:
            found[part] = weight.detach()
    if not found:
        raise SrqError("the model has no quantized weights that train: prepare it first")
    return found


@contextmanager
def _estimating(model: nn.Module, name: str, inputs: bool) -> Generator[None]:
    """Exchange the estimators; quantizers sample and everything else is as at test time."""
    estimator, baseline = _settings(name)
    parts = quantizers(model)
    before = [{key: getattr(part, key) for key in ("estimator", "baseline", "dropping")} for part in parts]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for part in parts:
        part.training, part.dropping = True, False
        part.baseline = baseline
        if isinstance(part, WeightQuantizer):
            part.estimator = estimator
        elif part.estimator not in {"pact", "ste-minmax", "lsq+"}:
            part.estimator = estimator if inputs else "lsq"
    try:
        yield
    finally:
        for part, settings in zip(parts, before, strict=True):
            for key, value in settings.items():
                setattr(part, key, value)
        for module, mode in modes:
            module.training = mode


def _gradients(
    model: nn.Module,
    weights: Mapping[WeightQuantizer, Tensor],
    name: str,
    pairs: Sequence[Any],
    loss: Callable[[Any, Any], Tensor],
    *,
    inputs: bool,
    seed: int,
    of_quantized: bool = False,
) -> dict[WeightQuantizer, Tensor]:
    """Average the gradients of the weights over batches, or those of the quantized weights."""
    sums = {part: torch.zeros_like(weight, dtype=torch.float64) for part, weight in weights.items()}
    # By identity, as layers that share weights read the same tensor more than once.
    taken: dict[WeightQuantizer, dict[int, Tensor]] = {part: {} for part in weights}

    def keep(part: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        tensor = output if of_quantized else args[0]
        taken[cast("WeightQuantizer", part)][id(tensor)] = tensor

    device = next(iter(weights.values())).device
    hooks = [part.register_forward_hook(keep) for part in weights]
    try:
        with _estimating(model, name, inputs), seeded(seed, device):
            for x, y, *_ in pairs:
                for tensors in taken.values():
                    tensors.clear()
                value = loss(model(x.to(device)), y.to(device))
                owners = [part for part in weights for _ in taken[part]]
                targets = [tensor for part in weights for tensor in taken[part].values()]
                gradients = torch.autograd.grad(value, targets, materialize_grads=True)
                for part, gradient in zip(owners, gradients, strict=True):
                    sums[part] += gradient / len(pairs)
    finally:
        for hook in hooks:
            hook.remove()
    return sums


def _facts(part: WeightQuantizer, weight: Tensor, gradient: Tensor, identity: Tensor) -> Tensor:
    """Count and sum what :func:`_row` makes shares of, so that layers add up."""
    grid = part.grid
    v = weight / part.alpha.detach()
    return torch.tensor(
        [
            weight.numel(),
            float((gradient.eq(0) & identity.ne(0)).sum()),
            float((gradient.sign() * identity.sign()).lt(0).sum()),
            float(((v < grid.n_lo - 0.5) | (v > grid.n_hi + 0.5)).sum()),
            float(part.codes(weight).eq(0).sum()),
            float(gradient.abs().sum()),
            float(identity.abs().sum()),
            float((gradient * identity).sum()),
            float(gradient.square().sum()),
            float(identity.square().sum()),
        ],
        dtype=torch.float64,
    )


def _row(estimator: str, layer: str, facts: Tensor) -> LayerDiagnosis:
    count, zero, opposed, beyond, zero_cell, size, whole, product, square, square_identity = facts.tolist()
    shares = {"zero": zero, "opposed": opposed, "beyond": beyond, "in_zero_cell": zero_cell}
    norms = math.sqrt(square * square_identity)
    return LayerDiagnosis(
        estimator,
        layer,
        int(count),
        **{key: value / count for key, value in shares.items()},
        size=size / whole if whole else 0.0,
        cosine=product / norms if norms else 0.0,
    )
