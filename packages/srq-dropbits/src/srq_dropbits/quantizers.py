"""The two quantizers of a layer, weights' and input's, each with a step and a noise scale of its own (RQ, section 2.1).

A weight quantizer is a parametrization of ``weight`` (``torch.nn.utils.parametrize``), so that any code that reads the
weight reads the quantized one; an input quantizer is called by a forward pre-hook. Both keep what they need for use and
export in buffers: a ``state_dict`` is all there is to save.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from srq_dropbits import pieces
from srq_dropbits.config import DropBits, Estimator, LearnBits
from srq_dropbits.errors import CalibrationError, NonFiniteError
from srq_dropbits.functional import (
    Baseline,
    concrete_quantize,
    grid_round,
    lsq_quantize,
    mode_quantize,
    soft_gradients,
    stochastic_round,
)
from srq_dropbits.gates import (
    counter_uniform,
    gate_count,
    hard_concrete,
    hard_concrete_mean,
    keep_logit,
    masked_quantize,
    nested_masks,
    plan_levels,
    residual_quantize,
)
from srq_dropbits.grid import Grid
from srq_dropbits.pieces import Plan, applies, plan_of

__all__ = ["RHO_MAX", "RHO_MIN", "InputQuantizer", "Quantizer", "WeightQuantizer", "mse_step"]

RHO_MIN, RHO_MAX = 1 / 8, 1 / 2
"""Bounds of the noise scale's ratio to the step: beyond them nothing is learned (specification 2.4)."""
_SPAN = math.log(RHO_MAX / RHO_MIN)
_RELAXED: frozenset[Estimator] = frozenset({"mcste", "mode-soft", "mode-gumbel", "rq", "rq-st", "rq-local"})
_FIXED_STEP: frozenset[Estimator] = frozenset({"ptq", "ste-minmax"})
_SAMPLE = 50_000
_CANDIDATES = 80
_OPEN = 0.9


def mse_step(x: Float[Tensor, "rows n"], n_lo: int, n_hi: int) -> Float[Tensor, " rows"]:
    """Search the step with the least squared rounding error, row by row, among 80 candidates.

    Parameters
    ----------
    x : values, shape (rows, n)
    n_lo : lowest integer of the grid
    n_hi : highest integer of the grid

    Returns
    -------
    Shape (rows,); 0 where a row is all zero.

    Examples
    --------
    >>> mse_step(torch.tensor([[-1.0, 0.0, 1.0, 1.0]]), -1, 1)
    tensor([1.])
    """
    largest = (x.amax(1) / max(n_hi, 1)).clamp(min=0)
    if n_lo < 0:
        largest = torch.maximum(largest, x.amin(1) / n_lo)
    best, error = largest, torch.full_like(largest, torch.inf)
    # From the largest down: ties go to the wider range.
    for place in range(_CANDIDATES, 0, -1):
        alpha = largest * (place / _CANDIDATES)
        step = alpha.clamp(min=torch.finfo(x.dtype).tiny).unsqueeze(1)
        found = (grid_round(x, step, n_lo, n_hi).mul_(step).sub_(x)).square_().sum(1)
        best = torch.where(found < error, alpha, best)
        error = torch.minimum(found, error)
    return best


def _rho(raw: Tensor) -> Tensor:
    return RHO_MIN * torch.exp(_SPAN * torch.sigmoid(raw))


def _rho_of(raw: float) -> tuple[float, float]:
    """Give the ratio and the derivative of its logarithm."""
    share = 1 / (1 + math.exp(-raw)) if raw > -700 else 0.0
    return RHO_MIN * math.exp(_SPAN * share), _SPAN * share * (1 - share)


class _FromParameters(torch.autograd.Function):
    """Quantize to the mode as ``mode_quantize`` and ``masked_quantize`` do, with what :meth:`Quantizer._steps` does.

    On small tensors a graph of a dozen scalars takes longer than the quantization.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        log_alpha: Tensor,
        raw_rho: Tensor,
        _: Tensor | None,
        plan: Plan,
        baseline: Baseline,
        factor: float,
    ) -> Tensor:
        alpha = log_alpha.exp()
        ctx.save_for_backward(x, alpha, raw_rho)
        ctx.rest = plan, baseline, factor
        return pieces.forward(x, alpha, plan)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, alpha, raw_rho = ctx.saved_tensors
        plan, baseline, factor = ctx.rest
        _, by_alpha, by_rho, by_masks, *_ = ctx.needs_input_grad
        step = alpha.item()
        d_x, sums = pieces.backward(x, gradients[0], step, plan, baseline, u=by_rho, masks=by_masks)
        d_alpha = torch.full_like(alpha, factor * step * sums.step) if by_alpha else None
        d_rho = None
        if by_rho:
            d_rho = torch.full_like(raw_rho, -factor * plan.u * _rho_of(raw_rho.item())[1] * sums.u)
        return d_x, d_alpha, d_rho, sums.of_masks(x, by_masks), None, None, None


class _SoftFromParameters(torch.autograd.Function):
    """Quantize as ``mode_quantize(soft=True)`` does, straight from the parameters."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, log_alpha: Tensor, raw_rho: Tensor, bounds: tuple[int, int], factor: float
    ) -> Tensor:
        alpha = log_alpha.exp()
        ctx.save_for_backward(x, alpha, raw_rho)
        ctx.rest = bounds, factor
        return grid_round(x, alpha, *bounds).mul_(alpha)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, alpha, raw_rho = ctx.saved_tensors
        bounds, factor = ctx.rest
        _, by_alpha, by_rho, *_ = ctx.needs_input_grad
        rho, derivative = _rho_of(raw_rho.item())
        u = alpha.new_tensor(1 / rho)
        d_x, of_alpha, of_u = soft_gradients(x, gradients[0], alpha, u, *bounds, by_u=by_rho)
        d_alpha = (of_alpha * (alpha * factor).reshape(())).reshape(alpha.shape) if by_alpha else None
        d_rho = None
        if of_u is not None:
            d_rho = (of_u * alpha.reshape(()) * (-factor * derivative / rho)).reshape(raw_rho.shape)
        return d_x, d_alpha, d_rho, None, None


def _scaled_gradient(value: Tensor, factor: float) -> Tensor:
    return value.detach() + (value - value.detach()) * factor


class Quantizer(nn.Module):
    """What weight and input quantizers share: step, noise scale, grid and estimator.

    Parameters
    ----------
    grid : the integers a value may take
    estimator : how gradients pass the rounding
    shape : shape of the step: () or (channels, 1, ..)
    baseline : control variate of ``mcste``
    learn_sigma : learn the noise scale
    rho : noise scale / step at the start
    temperature : of concrete samples
    delta : window of ``rq-local``
    name : of the layer, for messages
    """

    log_alpha: Tensor
    raw_rho: Tensor
    meta: Tensor

    def __init__(
        self,
        grid: Grid,
        estimator: Estimator,
        *,
        shape: tuple[int, ...] = (),
        baseline: Baseline = "input",
        learn_sigma: bool = True,
        rho: float = 1 / 3,
        temperature: float = 1.0,
        delta: float = 3.0,
        name: str = "",
    ) -> None:
        super().__init__()
        self.base_grid = grid
        self.estimator: Estimator = estimator
        self.baseline: Baseline = baseline
        self.temperature, self.delta, self.name = temperature, delta, name
        self.enabled = True
        self.ready = False
        self.plain = False
        self._register("log_alpha", torch.zeros(shape), trained=estimator not in _FIXED_STEP)
        share = min(max(math.log(rho / RHO_MIN) / _SPAN, 1e-4), 1 - 1e-4)
        raw = torch.tensor(math.log(share / (1 - share)))
        self._register("raw_rho", raw, trained=learn_sigma and estimator in _RELAXED)
        self.register_buffer("meta", torch.zeros(8, dtype=torch.int64))
        self._remember()

    def _register(self, name: str, value: Tensor, *, trained: bool) -> None:
        # A parameter that no gradient reaches would stop distributed training.
        if trained:
            self.register_parameter(name, nn.Parameter(value))
        else:
            self.register_buffer(name, value)

    # Everything that is not a tensor but changes after construction is mirrored in `meta`.
    def _remember(self) -> None:
        grid = self.base_grid
        self.meta[:5] = torch.tensor([grid.bits, grid.n_lo, grid.n_hi, grid.stride, self.ready])

    def _recall(self) -> None:
        bits, n_lo, n_hi, stride, ready = (int(value) for value in self.meta[:5])
        self.base_grid, self.ready = Grid(bits, n_lo, n_hi, stride), bool(ready)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._recall()

    @property
    def grid(self) -> Grid:
        """The grid used at test time."""
        return self.base_grid

    @property
    def alpha(self) -> Tensor:
        """The step, () or (channels, 1, ..), float32."""
        return self.log_alpha.exp()

    @property
    def rho(self) -> Tensor:
        """The noise scale's ratio to the step."""
        return _rho(self.raw_rho)

    @torch.no_grad()
    def set_alpha(self, alpha: Tensor) -> None:
        """Set the step.

        Parameters
        ----------
        alpha : > 0, of the step's shape, () or (channels, 1, ..)
        """
        self.log_alpha.copy_(alpha.to(self.log_alpha).reshape(self.log_alpha.shape).log())
        self.ready = True
        self._remember()

    def by_step(self, x: Tensor) -> Tensor:
        """Arrange a tensor such as (out, in, ..) in one row for each step, (steps, n)."""
        axis = next((place for place, size in enumerate(self.log_alpha.shape) if size > 1), None)
        return x.reshape(1, -1) if axis is None else x.movedim(axis, 0).flatten(1)

    def codes(self, x: Tensor) -> Tensor:
        """Give the integers of test-time quantization, int32, of the shape of `x` such as (n, m)."""
        with torch.no_grad():
            return grid_round(x.float(), self.alpha.detach(), self.grid.n_lo, self.grid.n_hi).to(torch.int32)

    def _factor(self, count: int) -> float:
        # LSQ's balance between a step, which sums over all entries, and the entries themselves.
        return 1 / math.sqrt(max(count // max(self.log_alpha.numel(), 1), 1) * max(self.base_grid.n_hi, 1))

    def _steps(self, count: int) -> tuple[Tensor, Tensor]:
        factor = self._factor(count)
        log_alpha = _scaled_gradient(self.log_alpha, factor) if self.log_alpha.requires_grad else self.log_alpha
        raw = _scaled_gradient(self.raw_rho, factor) if self.raw_rho.requires_grad else self.raw_rho
        alpha = log_alpha.exp()
        return alpha, alpha * _rho(raw)

    def _relaxed(self, x: Tensor, grid: Grid, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Quantize with the estimator's gradients; sampling estimators sample in training only."""
        bounds = (grid.n_lo, grid.n_hi)
        if self.plain:
            return lsq_quantize(x, alpha, *bounds)
        match self.estimator:
            case "mcste":
                return mode_quantize(x, alpha, sigma, *bounds, baseline=self.baseline)
            case "mode-soft":
                return mode_quantize(x, alpha, sigma, *bounds, soft=True)
            case "mode-gumbel":
                return concrete_quantize(x, alpha, sigma, *bounds, temperature=self.temperature, forward_mode=True)
            case "rq" | "rq-st" | "rq-local" if self.training:
                window = self.delta if self.estimator == "rq-local" else None
                hard = self.estimator == "rq-st"
                return concrete_quantize(
                    x, alpha, sigma, *bounds, temperature=self.temperature, hard=hard, delta=window
                )
            case "sr" if self.training:
                return stochastic_round(x, alpha, *bounds)
            case _:
                return lsq_quantize(x, alpha, *bounds)

    def extra_repr(self) -> str:
        """Show grid and estimator."""
        grid = self.grid
        return f"{grid.bits} bits, {grid.n_lo}..{grid.n_hi}, {self.estimator}"


class _Gated(Quantizer):
    """A quantizer whose bit levels may have gates."""

    phi: Tensor

    def __init__(
        self,
        grid: Grid,
        estimator: Estimator,
        *,
        dropbits: DropBits | None = None,
        learn_bits: LearnBits | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(grid, estimator, **options)
        self.dropbits, self.learn_bits, self.seed = dropbits, learn_bits, seed
        self.dropping = True
        self.frozen = False
        self.gates = 0
        if dropbits is not None or learn_bits is not None:
            settings = dropbits or DropBits()
            self._lowest_bits = learn_bits.min_bits if learn_bits else settings.min_bits
            self.sharing, self.mask_path = settings.sharing, settings.path(estimator)
            keep = settings.p_keep if learn_bits is None else _OPEN
            count = gate_count(grid, self._base_level(grid), self.sharing)
            phi = torch.full((count,), keep_logit(keep))
            self._register("phi", phi, trained=bool(count) and (learn_bits is not None or settings.learn))
            self._fit_gates()

    def _base_level(self, grid: Grid) -> int:
        # A grid without negative values has one level more than a signed one of the same width.
        return max(self._lowest_bits - grid.is_signed, 0)

    def _fit_gates(self) -> None:
        """Give each level above the base a gate; a grid that calibration has made wider than planned has none."""
        if not hasattr(self, "phi") or self.frozen:
            return
        self.base_level = self._base_level(self.base_grid)
        wanted = gate_count(self.base_grid, self.base_level, self.sharing)
        self.gates = wanted if wanted <= len(self.phi) and not self.plain else 0

    def _remember(self) -> None:
        super()._remember()
        self.meta[5] = int(getattr(self, "frozen", False))

    def _recall(self) -> None:
        super()._recall()
        frozen = bool(self.meta[5])
        if frozen != self.frozen:
            self.frozen = frozen
            if isinstance(getattr(self, "phi", None), nn.Parameter):
                self.phi.requires_grad_(not frozen)
        self._fit_gates()

    def resample(self) -> None:
        """Move on to the next draw of the masks."""
        if self.gates:
            self.meta[6] += 1

    @property
    def learns_bits(self) -> bool:
        """Whether the bit-width is still being learned."""
        return bool(self.gates) and self.learn_bits is not None and not self.frozen

    @property
    def grid(self) -> Grid:
        """The grid used at test time: while bits are learned, that of the levels whose mean gate is not 0."""
        if not self.learns_bits:
            return self.base_grid
        alive = int((hard_concrete_mean(self.phi.detach()) > 0).long().cumprod(0).sum())
        return self.base_grid.upto(self.base_level + alive)

    def freeze(self, grid: Grid) -> None:
        """Keep this grid from now on; gates stay as a record.

        Parameters
        ----------
        grid : the grid
        """
        self.base_grid = grid
        self.frozen = True
        if hasattr(self, "phi"):
            self.phi.requires_grad_(False)
        self._remember()

    def masks(self) -> Tensor:
        """Draw the masks of this step, shape (gates,); the same until :meth:`resample`."""
        gates = hard_concrete(self.phi[: self.gates], counter_uniform(self.meta[6], self.seed, self.gates))
        # Pairs of end points drop out each for itself; levels are nested.
        return gates if self.sharing == "endpoint" else nested_masks(gates)

    def _quantize(self, x: Tensor) -> Tensor:
        masks = self.masks() if self.training and self.gates and self.dropping and not self.frozen else None
        found = self._quantize_at_once(x, masks)
        if found is not None:
            return found if masks is not None else self._with_idle_gates(found)
        alpha, sigma = self._steps(x.numel())
        if masks is not None:
            if self.mask_path == "value":

                def plain(x: Tensor, grid: Grid) -> Tensor:
                    if grid.size == 1:
                        return torch.zeros_like(x)
                    return self._relaxed(x, grid, alpha, sigma)

                return residual_quantize(x, self.base_grid, masks, plain, base=self.base_level)
            return masked_quantize(
                x,
                alpha,
                sigma,
                self.base_grid,
                masks,
                base=self.base_level,
                sharing=self.sharing,
                baseline=self.baseline,
            )
        grid = self.grid
        found = torch.zeros_like(x) if grid.size == 1 else self._relaxed(x, grid, alpha, sigma)
        return self._with_idle_gates(found)

    def _quantize_at_once(self, x: Tensor, masks: Tensor | None) -> Tensor | None:
        """Quantize straight from the parameters; None where that is not possible."""
        grid = self.grid if masks is None else self.base_grid
        if self.plain or grid.size == 1 or not applies(x, self.log_alpha, self.raw_rho):
            return None
        if self.estimator == "mode-soft" and masks is None:
            bounds = (grid.n_lo, grid.n_hi)
            return _SoftFromParameters.apply(x, self.log_alpha, self.raw_rho, bounds, self._factor(x.numel()))
        if self.estimator != "mcste":
            return None
        if masks is not None and (self.mask_path == "value" or self.sharing != "bit"):
            return None
        u = 1 / _rho_of(self.raw_rho.item())[0]
        bounds = (grid.n_lo, grid.n_hi)
        plan = plan_of(u, bounds, [bounds], [1.0]) if masks is None else plan_levels(u, grid, self.base_level, masks)
        if plan is None:
            return None
        return _FromParameters.apply(
            x, self.log_alpha, self.raw_rho, masks, plan, self.baseline, self._factor(x.numel())
        )

    def _with_idle_gates(self, x: Tensor) -> Tensor:
        # Gates that could be learned and are not in use get a gradient of zeros: distributed training waits for one.
        phi = self._parameters.get("phi")
        return x + 0.0 * phi.sum() if self.training and phi is not None and phi.requires_grad else x


def _in_float32(quantize: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """Compute in float32 under autocast, and for half-precision tensors; give back the type that came."""

    def wrapped(self: Any, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return quantize(self, x.float() if x.dtype in {torch.float16, torch.bfloat16} else x).to(x.dtype)

    return wrapped


class WeightQuantizer(_Gated):
    """Quantizer of a layer's weights, registered as a parametrization of ``weight``.

    Parameters are those of :class:`Quantizer`, and ``dropbits``, ``learn_bits`` and ``seed``. Every reading of the
    weight quantizes it, in evaluation too: to find out whether a kept result still holds would cost as much. Code that
    knows that its weights stay may keep them itself, within ``torch.nn.utils.parametrize.cached()``.
    """

    def __init__(self, grid: Grid, estimator: Estimator, **options: Any) -> None:
        super().__init__(grid, estimator, **options)
        self.macs = 0
        self.count = 0

    def _remember(self) -> None:
        super()._remember()
        self.meta[7] = getattr(self, "macs", 0)

    def _recall(self) -> None:
        super()._recall()
        self.macs = int(self.meta[7])

    @torch.no_grad()
    def initialize(self, weight: Tensor, how: str = "auto") -> bool:
        """Set the first step from the weights.

        Parameters
        ----------
        weight : of the layer, as (out, in, ..)
        how : ``mse``, ``lsq``, ``max`` or ``auto``

        Returns
        -------
        Whether some weight is not zero; steps of all-zero tensors or channels become 1.
        """
        if not bool(weight.isfinite().all()):
            raise NonFiniteError(f"layer '{self.name}': weights hold NaN or infinity; train or load the model anew")
        self.count = weight.numel()
        grid = self.base_grid
        rows = self.by_step(weight).float()
        if self.estimator in {"ste-minmax", "pact"}:
            unit = _dorefa_codes(rows, self._levels(), rows.abs().amax()).double()
            # The unit scale of DoReFa would undo a trained network; this one keeps the least squared error.
            alpha = ((rows.double() * unit).sum(1) / unit.square().sum(1)).abs().float()
        else:
            kind = ("mse" if grid.bits <= 4 else "lsq") if how == "auto" else how
            if kind == "mse":
                alpha = mse_step(rows, grid.n_lo, grid.n_hi)
            elif kind == "lsq":
                alpha = 2 * rows.abs().mean(1) / math.sqrt(grid.n_hi)
            else:
                alpha = rows.abs().amax(1) / grid.n_hi
        dead = alpha <= torch.finfo(torch.float32).tiny
        self.set_alpha(torch.where(dead, torch.ones_like(alpha), alpha))
        return not bool(dead.all())

    def _levels(self) -> int:
        return 2**self.base_grid.bits - 1

    @_in_float32
    def forward(self, weight: Tensor) -> Tensor:
        """Quantize the weights, of shape (out, in, ..)."""
        if not self.enabled:
            return weight
        if self.estimator in {"ste-minmax", "pact"}:
            codes = _dorefa_codes(weight, self._levels(), None)
            return self.alpha * codes
        return self._quantize(weight)

    def codes(self, x: Tensor) -> Tensor:
        """Give the integers of test-time quantization, int32, of the shape of the weight `x`, (out, in, ..)."""
        if self.estimator in {"ste-minmax", "pact"}:
            with torch.no_grad():
                return _dorefa_codes(x.float(), self._levels(), None).round().to(torch.int32)
        return super().codes(x)


def _dorefa_codes(weight: Tensor, levels: int, largest: Tensor | None) -> Tensor:
    """Give DoReFa's odd integers 2 round(levels v) - levels, v = tanh(w) / (2 max|tanh w|) + 1/2; identity gradient."""
    bent = weight.tanh()
    top = bent.detach().abs().amax() if largest is None else largest.tanh()
    v = (bent / (2 * top.clamp(min=torch.finfo(weight.dtype).tiny)) + 0.5) * levels
    return 2 * (v + (v.round() - v).detach()) - levels


class InputQuantizer(_Gated):
    """Quantizer of a layer's input, one step for the whole tensor; calibration sets it before it can be used.

    Parameters are those of :class:`Quantizer`, and ``dropbits`` and ``seed``.
    """

    shift: Tensor

    def __init__(self, grid: Grid, estimator: Estimator, **options: Any) -> None:
        super().__init__(grid, estimator, **options)
        self.observing = False
        self.off = False
        self.pact_decay = 0.0
        self._seen: list[Tensor] = []
        self._lowest = math.inf
        self._register("shift", torch.zeros(()), trained=estimator == "lsq+")

    def _remember(self) -> None:
        super()._remember()
        self.meta[7] = int(getattr(self, "off", False)) + 2 * int(getattr(self, "plain", False))

    def _recall(self) -> None:
        self.off, self.plain = bool(self.meta[7] & 1), bool(self.meta[7] & 2)
        super()._recall()
        self.raw_rho.requires_grad_(self.raw_rho.requires_grad and not self.plain)
        if self.off:
            self._stop_learning()

    def switch_off(self) -> None:
        """Leave the layer's input as it is, for good."""
        self.off = True
        self._remember()
        self._stop_learning()

    def _stop_learning(self) -> None:
        for parameter in self.parameters():
            parameter.requires_grad_(False)

    # ---- calibration

    def forget(self) -> None:
        """Drop what an earlier calibration, which may have failed midway, has seen."""
        self._seen, self._lowest = [], math.inf

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Look at a batch.

        Parameters
        ----------
        x : activations of any shape, such as (n, m)
        """
        if not bool(x.isfinite().all()):
            raise NonFiniteError(f"layer '{self.name}': its input holds NaN or infinity; look at data and model")
        flat = x.detach().flatten().float()
        if flat.numel() == 0:
            return
        self._lowest = min(self._lowest, float(flat.min()))
        stride = -(-flat.numel() // _SAMPLE)
        # The largest come along: a sample alone would miss the range.
        self._seen.append(torch.cat([flat[::stride], flat.max().reshape(1), flat.min().reshape(1)]))

    @torch.no_grad()
    def conclude(self, bits: int | None = None) -> bool:
        """Set grid and step from what was observed.

        Parameters
        ----------
        bits : another width, for the network's own input; that is rounded plainly, as it has no gradient to estimate

        Returns
        -------
        Whether some activation was not zero; the step of an all-zero input becomes 1.
        """
        if not self._seen:
            raise CalibrationError(f"layer '{self.name}' has seen no data: the batches given never reach it")
        x, lowest = torch.cat(self._seen), self._lowest
        self.forget()
        width = self.base_grid.bits if bits is None else bits
        signed = lowest < 0
        # One bit on a signed range would leave zero alone.
        self.base_grid = Grid.signed(max(width, 2), symmetric=False) if signed else Grid.unsigned(width)
        if bits is not None and self.estimator in _RELAXED:
            # Sampling among 256 points would cost more than the network; all methods see the same input.
            self.plain = True
            self.raw_rho.requires_grad_(False)
        self._fit_gates()
        grid = self.base_grid
        magnitude = x.abs() if signed else x
        if self.estimator == "pact" or grid.bits > 4:
            alpha = torch.quantile(magnitude[:: -(-len(magnitude) // 1_000_000)], 0.999) / grid.n_hi
            alpha = torch.where(alpha > 0, alpha, magnitude.max() / grid.n_hi)
        else:
            alpha = mse_step(x.unsqueeze(0), grid.n_lo, grid.n_hi)[0]
        alive = bool(alpha > torch.finfo(torch.float32).tiny)
        self.set_alpha(alpha if alive else torch.ones_like(alpha))
        return alive

    # ---- use

    @property
    def grid(self) -> Grid:
        """The grid used at test time; LSQ+ shifts it by whole steps."""
        # Inputs never learn their bits; a property behind super() would stop torch.compile.
        grid = self.base_grid
        if self.estimator != "lsq+" or not self.ready:
            return grid
        offset = int((self.shift.detach() / self.alpha.detach()).round())
        return Grid(grid.bits, grid.n_lo + offset, grid.n_hi + offset)

    @_in_float32
    def forward(self, x: Tensor) -> Tensor:
        """Quantize activations of any shape, such as (n, m)."""
        if self.observing:
            self.observe(x)
            return x
        if self.off or not self.enabled:
            return x
        if not self.ready:
            raise CalibrationError(f"layer '{self.name}' has not seen data: call calibrate(model, batches) first")
        if self.estimator == "lsq+":
            return self._with_idle_gates(self._shifted(x))
        if self.estimator in {"pact", "ste-minmax"}:
            return _clip_quantize(x, self._steps(x.numel())[0], self.base_grid)
        return self._quantize(x)

    def _shifted(self, x: Tensor) -> Tensor:
        alpha, _ = self._steps(x.numel())
        grid = self.base_grid
        offset = _scaled_gradient(self.shift, 1 / math.sqrt(max(x.numel(), 1) * grid.n_hi)) / alpha
        offset = offset + (offset.round() - offset).detach()
        v = torch.minimum(torch.maximum(x / alpha, grid.n_lo + offset), grid.n_hi + offset)
        return alpha * (v + (v.round() - v).detach())


def _clip_quantize(x: Tensor, alpha: Tensor, grid: Grid) -> Tensor:
    """Clip to the range, whose end alone gets a gradient (PACT, section 3), and round with the identity as gradient."""
    top = alpha * grid.n_hi
    clipped = torch.minimum(torch.maximum(x, alpha * grid.n_lo if grid.is_signed else torch.zeros_like(top)), top)
    rounded = (clipped.detach() / alpha.detach()).round() * alpha.detach()
    return clipped + (rounded - clipped.detach())
