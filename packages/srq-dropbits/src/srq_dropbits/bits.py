"""Learned bit-widths: the penalty on levels, the controller that meets a budget, freezing, and what it all weighs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from srq_dropbits.config import LearnBits
from srq_dropbits.errors import BudgetError, SrqError
from srq_dropbits.gates import hard_concrete_mean, nested_masks, probability_nonzero
from srq_dropbits.grid import Grid, check_bits
from srq_dropbits.quantizers import InputQuantizer, WeightQuantizer, mse_step
from srq_dropbits.structure import (
    float_weight,
    input_quantizer,
    quantized_layers,
    quantizers,
    weight_quantizer,
)

__all__ = [
    "BitController",
    "LayerBits",
    "Report",
    "bit_penalty",
    "freeze_bits",
    "report",
    "truncate",
    "update_controller",
]


def _learners(model: nn.Module) -> list[WeightQuantizer]:
    """List the weight quantizers whose bits are learned, or were until they were frozen."""
    return _learning(_weights(model))


def _learning(parts: Iterable[WeightQuantizer]) -> list[WeightQuantizer]:
    return [part for part in parts if part.gates and part.learn_bits is not None]


def _weights(model: nn.Module) -> list[WeightQuantizer]:
    return [module for module in model.modules() if isinstance(module, WeightQuantizer)]


def _bytes(count: int, bits: int) -> int:
    return -(-count * bits // 8)


class BitController(nn.Module):
    """Strength of the penalty on bits, moved towards a target; a part of the model, so that it is saved with it.

    While the mean gates are at the target or below, the penalty rests: Adam would otherwise carry closed gates on to
    where no draw opens them again.

    Parameters
    ----------
    settings : target, weighting and speed
    """

    strength: Tensor
    active: Tensor

    def __init__(self, settings: LearnBits) -> None:
        super().__init__()
        self.settings = settings
        self.register_buffer("strength", torch.tensor(float(settings.penalty)))
        self.register_buffer("active", torch.tensor(1.0))

    def shares(self, model: nn.Module) -> dict[WeightQuantizer, float]:
        """Give each learning layer's weight w_l in the penalty; they sum to 1."""
        return self._shares(_learners(model))

    def _shares(self, learners: list[WeightQuantizer]) -> dict[WeightQuantizer, float]:
        match self.settings.weighting:
            case "size":
                raw = {part: float(part.count) for part in learners}
            case "macs":
                raw = {part: float(part.macs) for part in learners}
                if not any(raw.values()):
                    raise SrqError("weighting='macs' needs the multiplications: give prepare an example_input")
            case _:
                raw = dict.fromkeys(learners, 1.0)
        total = math.fsum(raw.values())
        return {part: value / total for part, value in raw.items()}

    def check_budget(self, model: nn.Module) -> None:
        """Raise BudgetError where even the lowest bit-widths exceed the target."""
        target = self.settings.target_bytes
        if target is None:
            return
        parts = _weights(model)
        learners = set(_learning(parts))
        least = 0
        for part in parts:
            bits = self.settings.min_bits if part in learners else part.grid.bits
            least += _bytes(part.count, 0 if bits == 1 else bits)
        if target < least:
            raise BudgetError(f"target_bytes {target:,} is below what the lowest bit-widths need: {least:,} bytes")

    def distance(self, model: nn.Module) -> float:
        """Give how far the mean gates are above the target, in average bits; 0 without a target."""
        if (self.settings.target_bits, self.settings.target_bytes) == (None, None):
            return 0.0
        parts = _weights(model)
        learners = _learning(parts)
        expected = _mean_bits(learners)
        if self.settings.target_bits is not None:
            shares = self._shares(learners)
            return math.fsum(share * expected[part] for part, share in shares.items()) - self.settings.target_bits
        fixed = sum(part.count * part.grid.bits for part in parts if part not in expected)
        used = fixed + math.fsum(part.count * bits for part, bits in expected.items())
        return (used - 8 * cast("int", self.settings.target_bytes)) / sum(part.count for part in learners)

    def penalty(self, parts: Iterable[WeightQuantizer]) -> Tensor | None:
        """Give the expected number of levels, weighted, times the strength: a () tensor; None where none are learned.

        Parameters
        ----------
        parts : the model's weight quantizers
        """
        shares = {part: share for part, share in self._shares(_learning(parts)).items() if not part.frozen}
        if not shares:
            return None
        # All start with the same bits and so have equally many gates: one operation serves all layers.
        expected = nested_masks(probability_nonzero(torch.stack([part.phi for part in shares]))).sum(1)
        return self.strength * self.active * (expected * expected.new_tensor(list(shares.values()))).sum()

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the strength: up where there are more bits than wanted, down where there are fewer."""
        if (self.settings.target_bits, self.settings.target_bytes) != (None, None):
            distance = self.distance(model)
            self.strength.mul_(math.exp(self.settings.speed * distance)).clamp_(1e-6, 1e4)
            self.active.fill_(float(distance > 0))


def _mean_bits(learners: list[WeightQuantizer]) -> dict[WeightQuantizer, float]:
    found = {part: float(part.grid.bits) for part in learners if part.frozen}
    learning = [part for part in learners if not part.frozen]
    if not learning:
        return found
    # One transfer from the device for all layers.
    rows = nested_masks(hard_concrete_mean(torch.stack([part.phi.detach() for part in learning]))).tolist()
    for part, masks in zip(learning, rows, strict=True):
        lowest = part.base_grid.upto(part.base_level).bits
        # The first level of a layer that can vanish brings a sign along.
        found[part] = lowest + math.fsum(masks) + (masks[0] if lowest == 0 else 0.0)
    return found


def _controller(model: nn.Module) -> BitController | None:
    return next((module for module in model.modules() if isinstance(module, BitController)), None)


def update_controller(model: nn.Module) -> None:
    """Move the penalty's strength towards the target of bits or bytes; call it once a training step.

    Parameters
    ----------
    model : a prepared model; without a target nothing happens
    """
    controller = _controller(model)
    if controller is not None:
        controller.update(model)


def bit_penalty(model: nn.Module) -> Tensor:
    """Give the penalty to add to the task's loss (specification 2.6), and PACT's on its clipping values.

    ``strength * sum_l w_l sum_k prod_(j<=k) P(Z_lj != 0)``: the expected number of levels, weighted.

    Parameters
    ----------
    model : a prepared model, also wrapped by DDP or compiled

    Returns
    -------
    A tensor of shape (); 0 where there is nothing to penalise.
    """
    first = next(model.parameters(), None)
    total = torch.zeros((), device=None if first is None else first.device)
    # One walk for everything: this is called in every training step.
    controller: BitController | None = None
    of_weights: list[WeightQuantizer] = []
    of_inputs: list[InputQuantizer] = []
    for module in model.modules():
        if isinstance(module, WeightQuantizer):
            of_weights.append(module)
        elif isinstance(module, InputQuantizer):
            of_inputs.append(module)
        elif isinstance(module, BitController):
            controller = module
    levels = None if controller is None else controller.penalty(of_weights)
    if levels is not None:
        total = total + levels
    for part in of_inputs:
        decay = part.pact_decay if part.estimator == "pact" else 0.0
        if decay and part.ready and part.log_alpha.requires_grad:
            total = total + decay * (part.alpha * part.base_grid.n_hi).square().sum()
    return total


@torch.no_grad()
def freeze_bits(model: nn.Module) -> dict[str, int]:
    """End the learning of bits: every layer keeps the levels whose gates are open; go on training as usual.

    With a target, levels are dropped, the least open first, until the bytes fit, or until the average is as near to the
    target as whole bits allow. A layer that loses levels so, with which the network was tested until now, gets the step
    with the least squared error on what is left. Where gates closed in training, the step was trained along and stays.

    Parameters
    ----------
    model : a prepared model

    Returns
    -------
    Layer -> bits of its weights.
    """
    learners = _learners(model)
    controller = _controller(model)
    tested = {part: part.grid for part in learners}
    levels = {part: grid.levels if grid.size > 1 else 0 for part, grid in tested.items()}
    if controller is not None:
        if controller.settings.target_bytes is not None:
            _fit_bytes(model, levels, controller.settings.target_bytes)
        elif controller.settings.target_bits is not None:
            _approach(levels, controller.shares(model), controller.settings.target_bits)
    for part, level in levels.items():
        if not part.frozen:
            part.freeze(part.base_grid.upto(level))
    narrowed = {part for part in learners if 1 < part.grid.size < tested[part].size}
    for _, module in quantized_layers(model):
        part = weight_quantizer(module)
        if part in narrowed:
            narrowed.remove(part)
            part.initialize(float_weight(module), "mse")
    return {part.name: part.grid.bits for part in learners}


def _openness(part: WeightQuantizer, level: int) -> float:
    """Give the log-odds of the gate that opens this level."""
    return float(part.phi.detach()[level - part.base_level - 1])


def _fit_bytes(model: nn.Module, levels: dict[WeightQuantizer, int], target: int) -> None:
    parts = _weights(model)

    def used() -> int:
        return sum(
            _bytes(part.count, part.base_grid.upto(levels[part]).bits if part in levels else part.grid.bits)
            for part in parts
        )

    while used() > target:
        droppable = [part for part, level in levels.items() if level > part.base_level]
        if not droppable:
            raise BudgetError(f"target_bytes {target:,}: the lowest bit-widths need {used():,} bytes")
        levels[min(droppable, key=lambda part: _openness(part, levels[part]))] -= 1


def _approach(levels: dict[WeightQuantizer, int], shares: dict[WeightQuantizer, float], target: float) -> None:
    def gap(changes: dict[WeightQuantizer, int]) -> float:
        return math.fsum(share * part.base_grid.upto(changes[part]).bits for part, share in shares.items()) - target

    while True:
        here = gap(levels)
        step = -1 if here > 0 else 1
        better: list[WeightQuantizer] = []
        for part, level in levels.items():
            possible = part.base_level <= level + step <= part.base_grid.levels and not part.frozen
            if possible and abs(gap(levels | {part: level + step})) < abs(here) - 1e-9:
                better.append(part)
        if not better:
            return
        if step < 0:
            part = min(better, key=lambda part: _openness(part, levels[part]))
        else:
            part = max(better, key=lambda part: _openness(part, levels[part] + 1))
        levels[part] += step


# ---- report


@dataclass(frozen=True)
class LayerBits:
    """One layer of a report.

    Parameters
    ----------
    name : of the layer
    kind : its type
    weights : how many it has
    weight_bits : of its weights, or None where it has none
    act_bits : of its input, or None where that is not quantized
    steps : how many steps its weights have
    bytes : of the packed codes
    float_bytes : of the weights in float32
    macs : multiplications for one instance; 0 if not counted
    """

    name: str
    kind: str
    weights: int
    weight_bits: int | None
    act_bits: int | None
    steps: int
    bytes: int
    float_bytes: int
    macs: int

    @property
    def bit_operations(self) -> int:
        """Multiplications times the bits of both factors; inputs that are not quantized count 32."""
        return self.macs * (self.weight_bits or 32) * (self.act_bits or 32) if self.weights else 0


@dataclass(frozen=True)
class Report:
    """Bits, bytes and multiplications of a prepared model.

    Parameters
    ----------
    rows : layer by layer
    other_bytes : parameters and buffers that stay float32: biases, norms, steps, layers left alone
    """

    rows: tuple[LayerBits, ...]
    other_bytes: int

    @property
    def avg_bits(self) -> float:
        """Average bits of a quantized weight."""
        count = sum(row.weights for row in self.rows)
        return math.fsum(row.weights * (row.weight_bits or 0) for row in self.rows) / max(count, 1)

    @property
    def layer_bits(self) -> float:
        """Average bits of a layer, each layer counted once."""
        bits = [row.weight_bits for row in self.rows if row.weight_bits is not None]
        return math.fsum(bits) / max(len(bits), 1)

    @property
    def bytes(self) -> int:
        """Packed weights and everything that stays float."""
        return sum(row.bytes for row in self.rows) + self.other_bytes

    @property
    def float_bytes(self) -> int:
        """The same in float32."""
        return sum(row.float_bytes for row in self.rows) + self.other_bytes

    @property
    def macs(self) -> int:
        """Multiplications for one instance."""
        return sum(row.macs for row in self.rows)

    @property
    def bit_operations(self) -> int:
        """Multiplications times the bits of both factors."""
        return sum(row.bit_operations for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON."""
        return {
            "layers": [asdict(row) | {"bit_operations": row.bit_operations} for row in self.rows],
            "avg_bits": self.avg_bits,
            "layer_bits": self.layer_bits,
            "bytes": self.bytes,
            "other_bytes": self.other_bytes,
            "float_bytes": self.float_bytes,
            "macs": self.macs,
            "bit_operations": self.bit_operations,
        }

    def __str__(self) -> str:
        """Return the report as a table."""
        head = ["layer", "kind", "weights", "bits", "input bits", "bytes", "float32", "MACs", "bit ops"]
        lines = [
            [
                row.name,
                row.kind,
                f"{row.weights:,}",
                "-" if row.weight_bits is None else str(row.weight_bits),
                "-" if row.act_bits is None else str(row.act_bits),
                f"{row.bytes:,}",
                f"{row.float_bytes:,}",
                f"{row.macs:,}",
                f"{row.bit_operations:,}",
            ]
            for row in self.rows
        ]
        total = f"{sum(row.weights for row in self.rows):,}", f"{self.avg_bits:.2f}", f"{self.bytes:,}"
        lines.append(
            [
                "total",
                "",
                *total[:2],
                "",
                total[2],
                f"{self.float_bytes:,}",
                f"{self.macs:,}",
                f"{self.bit_operations:,}",
            ]
        )
        widths = [max(len(line[place]) for line in [head, *lines]) for place in range(len(head))]
        text = [
            "  ".join(
                cell.ljust(width) if place < 2 else cell.rjust(width)
                for place, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in [head, *lines]
        ]
        return "\n".join([*text, f"not quantized: {self.other_bytes:,} bytes of biases, norms, steps and other layers"])


def report(model: nn.Module) -> Report:
    """Say what a prepared model weighs, layer by layer.

    Parameters
    ----------
    model : a prepared model

    Raises
    ------
    SrqError
        For a model that was not prepared.
    """
    rows: list[LayerBits] = []
    counted: set[WeightQuantizer] = set()
    for name, module in quantized_layers(model):
        part, of_input = weight_quantizer(module), input_quantizer(module)
        first = part is not None and part not in counted
        if part is not None:
            counted.add(part)
        count = part.count if first and part is not None else 0
        bits = None if part is None else part.grid.bits
        kind = type(module).__name__.removeprefix("Quantized").removeprefix("Parametrized")
        rows.append(
            LayerBits(
                name=name or kind,
                kind=kind,
                weights=count,
                weight_bits=bits,
                act_bits=None if of_input is None else of_input.grid.bits,
                steps=part.log_alpha.numel() if first and part is not None else 0,
                bytes=_bytes(count, bits or 0),
                float_bytes=4 * count,
                macs=part.macs if first and part is not None else 0,
            )
        )
    if not rows:
        raise SrqError("the model has no quantized layer: prepare it first")
    inside = {id(value) for part in quantizers(model) for value in [*part.parameters(), *part.buffers()]}
    seen: dict[int, Tensor] = {id(value): value for value in [*model.parameters(), *model.buffers()]}
    rest = sum(value.numel() for key, value in seen.items() if key not in inside and value.is_floating_point())
    steps = sum(
        part.log_alpha.numel() for part in quantizers(model) if not (isinstance(part, InputQuantizer) and part.off)
    )
    return Report(tuple(rows), 4 * (rest - sum(row.weights for row in rows) + steps))


@torch.no_grad()
def truncate(model: nn.Module, bits: int) -> dict[str, int]:
    """Cut a trained model down to fewer bits by dropping top levels, and fit each step to what is left.

    DropBits trains every lower bit-width along; this makes one checkpoint serve all of them.

    Parameters
    ----------
    model : a prepared model; it is changed: copy it first to keep it
    bits : width that no layer's weights exceed afterwards, 2..8

    Returns
    -------
    Layer -> bits of its weights.
    """
    check_bits(bits)
    found: dict[str, int] = {}
    for _, module in quantized_layers(model):
        part = weight_quantizer(module)
        if part is None or part.name in found:
            continue
        if part.grid.stride != 1:
            raise SrqError(f"layer '{part.name}': estimator '{part.estimator}' has no bit levels to drop")
        if part.grid.bits > bits:
            codes = part.codes(float_weight(module)).float() * part.alpha
            grid = Grid.signed(bits, symmetric=part.grid.n_lo == -part.grid.n_hi)
            alpha = mse_step(part.by_step(codes), grid.n_lo, grid.n_hi)
            part.freeze(grid)
            part.set_alpha(torch.where(alpha > 0, alpha, torch.ones_like(alpha)))
        found[part.name] = part.grid.bits
    return found
