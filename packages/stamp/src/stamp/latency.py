"""Predict what a cut network would take from tables of measured layers, and measure until it holds (spec 2.9, 11.1)."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float64, Num
from numpy.typing import NDArray
from torch import Tensor, nn

from shared_core.errors import DAMAGE, InputError
from stamp.counting import macs
from stamp.layer_times import LayerTable, Sides, calls_of, measured
from stamp.selection import BudgetError, Cost, select
from stamp.structure import ChannelGroups
from stamp.surgery import cut
from stamp.timing import Measure, Timings, as_inputs, call_ms, time_together

__all__ = [
    "LatencyFit",
    "LatencyTable",
    "LayerTable",
    "Measure",
    "TableError",
    "Timings",
    "Try",
    "fit_latency",
    "measured_ms",
    "time_together",
]


class TableError(InputError):
    """Text that holds no table of latencies."""


@dataclass(frozen=True, eq=False)
class LatencyTable:
    """What a network takes, as a sum over its layers, each from a table of its own kind and bilinear in between.

    Layers timed alone do not add up to a network: tables are scaled, and the rest (norms, activations) is shared out in
    proportion to the numbers that leave each layer, such that the dense network takes what it was measured to take, and
    one of a quarter of its widths as nearly as can be. Tables are made monotone: more channels never take less, which
    measurements would not always say.

    Parameters
    ----------
    names, widths : of the groups that are not frozen
    layers : names of the layers, one entry for each call
    kinds : which table each layer has
    tables : of the distinct kinds of layers
    inputs, outputs : ``(layers, channels)`` entries of each side that each channel owns
    fixed_inputs, fixed_outputs : ``(layers,)`` entries that no channel owns
    extra : ``(layers,)`` milliseconds for each entry that leaves, beside the tables
    scale : of the tables
    device, threads, dtype : under which it was measured
    """

    names: tuple[str, ...]
    widths: tuple[int, ...]
    layers: tuple[str, ...]
    kinds: tuple[int, ...]
    tables: tuple[LayerTable, ...]
    inputs: Float64[Tensor, "layers channels"]
    outputs: Float64[Tensor, "layers channels"]
    fixed_inputs: Float64[Tensor, " layers"]
    fixed_outputs: Float64[Tensor, " layers"]
    extra: Float64[Tensor, " layers"]
    scale: float = 1.0
    device: str = "cpu"
    threads: int = 1
    dtype: str = "float32"

    @classmethod
    def build(
        cls,
        model: nn.Module,
        groups: ChannelGroups,
        example: Tensor | Sequence[Tensor],
        *,
        device: str = "cpu",
        grid: int = 8,
        warmup: int = 1,
        repeats: int = 3,
        measure: Measure = call_ms,
    ) -> LatencyTable:
        """Measure every kind of layer at ``1 / grid`` steps of its widths, and two whole networks.

        Parameters
        ----------
        model : from which the groups were traced; a copy is measured
        groups : its channel groups
        example : as `time_together` takes it; its batch is the batch measured
        device : on which
        grid : steps; a layer with channels of both sides to be cut is measured at about its square of widths
        warmup, repeats : passes of each layer; whole networks get five times as many
        measure : milliseconds of one pass of a module on the inputs

        Raises
        ------
        InputError
            For a grid without a step.
        """
        if grid < 1:
            raise InputError(f"grid={grid} has no step; give 1 or more")
        inputs = tuple(x.to(device) for x in as_inputs(example))
        model = copy.deepcopy(model).to(device).eval()
        calls = calls_of(model, inputs)
        sides = Sides(groups)
        rows = [sides.of(call) for call in calls]
        keys = list(dict.fromkeys(row.kind for row in rows))
        tables = [
            measured(*next((call, row) for call, row in zip(calls, rows, strict=True) if row.kind == key), grid,
                      lambda module, given: _median(measure, module, given, warmup, repeats))
            for key in keys
        ]  # fmt: skip
        quarter = {name: torch.arange(width) < max(1, width // 4) for name, width in groups.widths().items()}
        networks = {"dense": model, "quarter": cut(model, groups, quarter)}
        taken = time_together(networks, inputs, warmup=5 * warmup, repeats=5 * repeats, measure=measure)
        empty = torch.zeros(0, sides.total, dtype=torch.float64)
        table = cls(
            tuple(groups.widths()),
            tuple(groups.widths().values()),
            tuple(call.name for call in calls),
            tuple(keys.index(row.kind) for row in rows),
            tuple(tables),
            torch.stack([row.inputs for row in rows]) if rows else empty,
            torch.stack([row.outputs for row in rows]) if rows else empty,
            torch.tensor([row.fixed_input for row in rows], dtype=torch.float64),
            torch.tensor([row.fixed_output for row in rows], dtype=torch.float64),
            torch.zeros(len(rows), dtype=torch.float64),
            device=taken.device,
            threads=taken.threads,
            dtype=taken.dtype,
        )
        sizes = torch.tensor([float(call.size) for call in calls], dtype=torch.float64)
        return table._fitted(sizes, taken.p50("dense"), quarter, taken.p50("quarter"))

    def _fitted(self, sizes: Tensor, dense_ms: float, small: Mapping[str, Tensor], small_ms: float) -> LatencyTable:
        """Choose the scale of the tables, and what they leave to the numbers that leave each layer."""
        if not self.layers:
            return self
        extra = sizes / sizes.sum() / (self.outputs.sum(1) + self.fixed_outputs)
        rest = replace(self, scale=0.0, extra=extra).exact(small)
        explained = self.exact(small) / self.dense_ms
        # Of the small network, the rest is a larger part: that tells them apart.
        other_ms = (small_ms - dense_ms * explained) / (rest - explained) if rest > explained else 0.0
        other_ms = min(max(other_ms, 0.0), dense_ms)
        return replace(self, scale=(dense_ms - other_ms) / self.dense_ms, extra=other_ms * extra)

    @property
    def dense_ms(self) -> float:
        """Milliseconds of the network with all its channels."""
        return self.exact({})

    @property
    def other_ms(self) -> float:
        """Milliseconds of the dense network that its layers do not explain."""
        return float(self.extra @ (self.outputs.sum(1) + self.fixed_outputs))

    def exact(self, keep: Mapping[str, Bool[Tensor, " _width"]]) -> float:
        """Return the milliseconds of the network that `surgery.cut` makes, as far as the tables know.

        Parameters
        ----------
        keep : which channels of each group stay; a group left out stays whole

        Raises
        ------
        InputError
            For a group that does not exist or is frozen, or a choice of a wrong width.
        """
        unknown = sorted(set(keep) - set(self.names))
        if unknown:
            raise InputError(f"keep names {unknown}: frozen, or no groups; those that are not are {list(self.names)}")
        pieces = [torch.zeros(0, dtype=torch.float64)]
        for name, width in zip(self.names, self.widths, strict=True):
            own = keep.get(name, torch.ones(width, dtype=torch.bool))
            if own.shape != (width,):
                raise InputError(f"keep[{name!r}] has shape {tuple(own.shape)}; the group has {width} channels")
            pieces.append(own.to("cpu", torch.float64))
        flat = torch.cat(pieces)
        entering = (self.inputs @ flat + self.fixed_inputs).numpy()[:, None]
        leaving = (self.outputs @ flat + self.fixed_outputs).numpy()[:, None]
        return float(self.of_layers(entering, leaving).sum())

    def of_layers(self, entering: NDArray[np.float64], leaving: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the milliseconds of each layer, for several networks.

        Parameters
        ----------
        entering, leaving : ``(layers, networks)`` entries on the sides of each layer
        """
        if not self.kinds:
            return np.zeros_like(entering)
        first, second, ms = self._padded
        layer = np.arange(len(ms))[:, None]
        i, t = _located(first, entering)
        j, u = _located(second, leaving)
        low = ms[layer, i, j] * (1 - u) + ms[layer, i, j + 1] * u
        high = ms[layer, i + 1, j] * (1 - u) + ms[layer, i + 1, j + 1] * u
        return self.scale * (low * (1 - t) + high * t) + self.extra.numpy()[:, None] * leaving

    @cached_property
    def _padded(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Grids and times of each layer, in arrays of one size: grids go on to infinity, times stay."""
        size = 1 + max(2, *(max(len(table.entering), len(table.leaving)) for table in self.tables))
        first = np.full((len(self.tables), size), np.inf)
        second = first.copy()
        ms = np.zeros((len(self.tables), size, size))
        for k, table in enumerate(self.tables):
            first[k, : len(table.entering)] = table.entering
            second[k, : len(table.leaving)] = table.leaving
            pad = [(0, size - len(table.entering)), (0, size - len(table.leaving))]
            ms[k] = np.pad(np.array(table.ms), pad, mode="edge")
        kinds = list(self.kinds)
        return first[kinds], second[kinds], ms[kinds]

    def to_json(self) -> str:
        """Write it as JSON."""
        return json.dumps(
            {
                "groups": dict(zip(self.names, self.widths, strict=True)),
                "layers": self.layers,
                "kinds": self.kinds,
                "tables": [{"entering": t.entering, "leaving": t.leaving, "ms": t.ms} for t in self.tables],
                "inputs": _runs(self.inputs),
                "outputs": _runs(self.outputs),
                "fixed_inputs": self.fixed_inputs.tolist(),
                "fixed_outputs": self.fixed_outputs.tolist(),
                "extra": self.extra.tolist(),
                "scale": self.scale,
                "device": self.device,
                "threads": self.threads,
                "dtype": self.dtype,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> LatencyTable:
        """Read what `to_json` wrote.

        Parameters
        ----------
        text : JSON

        Raises
        ------
        TableError
            For other text.
        """
        try:
            found = json.loads(text)
            shape = len(found["layers"]), sum(found["groups"].values())
            return cls(
                tuple(found["groups"]),
                tuple(found["groups"].values()),
                tuple(found["layers"]),
                tuple(found["kinds"]),
                tuple(
                    LayerTable(tuple(t["entering"]), tuple(t["leaving"]), tuple(map(tuple, t["ms"])))
                    for t in found["tables"]
                ),
                _matrix(found["inputs"], shape),
                _matrix(found["outputs"], shape),
                _numbers(found["fixed_inputs"], shape[0]),
                _numbers(found["fixed_outputs"], shape[0]),
                _numbers(found["extra"], shape[0]),
                float(found["scale"]),
                str(found["device"]),
                int(found["threads"]),
                str(found["dtype"]),
            )
        except DAMAGE as error:
            raise TableError(
                f"this is no table of latencies ({type(error).__name__}: {error}); write one with LatencyTable.to_json"
            ) from error


@dataclass(frozen=True)
class Try:
    """A network tried out for its time, in milliseconds: asked for, predicted and measured (median)."""

    asked_ms: float
    predicted_ms: float
    measured_ms: float


@dataclass(frozen=True, eq=False)
class LatencyFit:
    """Channels whose network was measured to be fast enough.

    Parameters
    ----------
    keep : which channels stay
    target_ms : what was asked for
    dense_ms, ms : measured medians of the dense network and the small one
    macs_ratio : multiply-adds of the small network over the dense one's
    tries : networks measured on the way, the last of which need not be the one kept
    """

    keep: Mapping[str, Bool[Tensor, " _width"]]
    target_ms: float
    dense_ms: float
    ms: float
    predicted_ms: float
    macs_ratio: float
    tries: tuple[Try, ...]

    @property
    def disagreement(self) -> float:
        """Measured over predicted time of the network kept; 1 where the prediction was right."""
        return self.ms / self.predicted_ms

    def __str__(self) -> str:
        """Say in a line what was reached."""
        return (
            f"{self.ms:.3g} ms measured for {self.target_ms:.3g} asked ({self.predicted_ms:.3g} predicted, dense"
            f" {self.dense_ms:.3g}; {len(self.tries)} tries): multiply-adds fall to {self.macs_ratio:.0%}, time to"
            f" {self.ms / self.dense_ms:.0%}"
        )


def fit_latency(
    model: nn.Module,
    groups: ChannelGroups,
    scores: Mapping[str, Num[Tensor, " _width"]],
    target_ms: float,
    example: Tensor | Sequence[Tensor],
    *,
    cost: Cost | None = None,
    mode: Literal["budget", "efficiency"] = "budget",
    min_channels: int | float = 0.05,
    round_to: int = 1,
    multiples: Mapping[str, int] | None = None,
    device: str = "cpu",
    tries: int = 8,
    slack: float = 0.05,
    warmup: int = 5,
    repeats: int = 20,
    measure: Measure = call_ms,
) -> LatencyFit:
    """Choose channels whose network is measured, not just predicted, to take no longer than asked (spec 11.1).

    A network is selected by predicted cost, cut and measured; the budget is tightened by how far the measurement is
    off, or loosened where time is left, until the median lies within `slack` below the target.

    Parameters
    ----------
    model, groups : see `surgery.cut`
    scores : ``(width,)`` of each group, higher for channels that are to stay
    mode, min_channels, round_to, multiples : see `selection.select`
    target_ms : milliseconds for a forward pass of the example
    example : as `time_together` takes it
    cost : what predicts the time, up to a factor; None measures a `LatencyTable` first
    device : on which to measure
    tries : networks to measure at most
    slack : fraction of the target that may stay unused
    warmup, repeats, measure : see `time_together`

    Returns
    -------
    The largest network found whose measured median is at most the target.

    Raises
    ------
    BudgetError
        For a target that is no time, or that even the smallest network misses.
    """
    if not 0 < target_ms < math.inf:
        raise BudgetError(f"target_ms={target_ms} is no time; give milliseconds above 0")
    inputs = tuple(x.to(device) for x in as_inputs(example))
    model = copy.deepcopy(model).to(device).eval()

    def timed(module: nn.Module) -> float:
        return time_together({"": module}, inputs, warmup=warmup, repeats=repeats, measure=measure).p50("")

    dense_ms = timed(model)
    predictor = cost or LatencyTable.build(model, groups, inputs, device=device, measure=measure)
    whole = predictor.exact({})

    chosen = partial(
        select, scores, predictor, mode=mode, min_channels=min_channels, round_to=round_to, multiples=multiples
    )

    least = _smallest(chosen)
    low, high, fraction = 0.0, 1.0, max(least, min(1.0, target_ms / dense_ms))
    found: list[tuple[Try, dict[str, Tensor]]] = []
    while len(found) < tries:
        keep = chosen(fraction)
        tried = Try(fraction * dense_ms, predictor.exact(keep) / whole * dense_ms, timed(cut(model, groups, keep)))
        found.append((tried, keep))
        low, high = (fraction, high) if tried.measured_ms <= target_ms else (low, fraction)
        if fraction == low and (fraction == 1 or tried.measured_ms >= (1 - slack) * target_ms):
            break
        nearer = fraction * target_ms / tried.measured_ms * (1 - slack / 2)
        # The last try goes to the smallest network where nothing has been fast enough.
        last = low == 0 and len(found) == tries - 1
        nearer = least if last else nearer if low < nearer < high else (low + high) / 2
        if max(least, nearer) == fraction:
            break
        fraction = max(least, nearer)
    enough = [(tried, keep) for tried, keep in found if tried.measured_ms <= target_ms]
    if not enough:
        measured = min(tried.measured_ms for tried, _ in found)
        raise BudgetError(
            f"target_ms={target_ms:.6g} cannot be reached: the fastest network was measured to take {measured:.6g} ms,"
            f" the dense one {dense_ms:.6g}; ask for that or more, or lower min_channels",
            measured / dense_ms,
        )
    best, keep = max(enough, key=lambda pair: pair[0].predicted_ms)
    return LatencyFit(
        keep,
        target_ms,
        dense_ms,
        best.measured_ms,
        best.predicted_ms,
        macs(cut(model, groups, keep), inputs) / macs(model, inputs),
        tuple(tried for tried, _ in found),
    )


def _smallest(chosen: Callable[[float], object]) -> float:
    """Return the smallest fraction of the cost that can be asked for."""
    tiny = 1e-12
    try:
        chosen(tiny)
    except BudgetError as error:
        return error.smallest or tiny
    return tiny


def _located(grid: NDArray[np.float64], value: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the cell of each value on its row's grid, and how far into it the value lies; no further than the ends."""
    cell = np.clip((grid[:, None, :] <= value[:, :, None]).sum(-1) - 1, 0, grid.shape[1] - 2)
    row = np.arange(len(grid))[:, None]
    start, end = grid[row, cell], grid[row, cell + 1]
    return cell, np.maximum((value - start) / (end - start), 0)


def measured_ms(
    model: nn.Module,
    example: Tensor | Sequence[Tensor],
    *,
    device: str = "cpu",
    warmup: int = 5,
    repeats: int = 20,
    measure: Measure = call_ms,
) -> float:
    """Measure a network's forward pass, as `fit_latency` does.

    Parameters
    ----------
    model : left as it is
    example : as `time_together` takes it
    device : on which to measure
    warmup, repeats, measure : see `time_together`

    Returns
    -------
    The median, in milliseconds.
    """
    inputs = tuple(x.to(device) for x in as_inputs(example))
    return _median(measure, copy.deepcopy(model).to(device).eval(), inputs, warmup, repeats)


def _median(measure: Measure, module: nn.Module, inputs: tuple[Tensor, ...], warmup: int, repeats: int) -> float:
    return time_together({"": module}, inputs, warmup=warmup, repeats=repeats, measure=measure).p50("")


def _runs(matrix: Tensor) -> list[tuple[int, int, int, float]]:
    """Write a matrix as runs of equal numbers: row, first column, columns and number."""
    runs: list[tuple[int, int, int, float]] = []
    for k, row in enumerate(matrix):
        values, counts = row.unique_consecutive(return_counts=True)
        firsts = counts.cumsum(0) - counts
        found = zip(firsts.tolist(), counts.tolist(), values.tolist(), strict=True)
        runs.extend((k, first, count, value) for first, count, value in found if value)
    return runs


def _matrix(runs: Sequence[Sequence[int | float]], shape: tuple[int, int]) -> Tensor:
    matrix = torch.zeros(shape, dtype=torch.float64)
    for row, first, count, value in runs:
        if first + count > shape[1]:
            raise ValueError(f"channel {first + count - 1} of {shape[1]}")
        matrix[int(row), int(first) : int(first + count)] = value
    return matrix


def _numbers(values: Sequence[int | float], length: int) -> Tensor:
    if len(values) != length:
        raise ValueError(f"{len(values)} numbers for {length} layers")
    return torch.tensor(values, dtype=torch.float64)
