"""Say what pruning has brought, counted and measured, and where the figures disagree (spec 9)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shared_core.errors import InputError
from stamp.axes import CONVS
from stamp.counting import macs, parameters
from stamp.folding import FoldError, fold_bn
from stamp.structure import ChannelGroups
from stamp.surgery import cut
from stamp.timing import Measure, as_inputs, call_ms, time_together

__all__ = [
    "FoldError",
    "Report",
    "RoundTo",
    "Size",
    "fold_bn",
    "report",
    "suggest_round_to",
    "warnings_of",
]


@dataclass(frozen=True)
class Size:
    """What one network amounts to.

    Parameters
    ----------
    params : numbers in its parameters
    macs : multiply-adds of convolutions and linear layers for one example
    bytes : of parameters and buffers
    p50_ms, p90_ms : milliseconds of a forward pass of the batch, median and nine in ten
    gmacs : thousand million multiply-adds a second, at the median
    """

    params: int
    macs: int
    bytes: int
    p50_ms: float
    p90_ms: float
    gmacs: float

    @property
    def flops(self) -> int:
        """Floating-point operations for one example: two for each multiply-add."""
        return 2 * self.macs


@dataclass(frozen=True)
class Report:
    """A network and what pruning made of it.

    Parameters
    ----------
    dense, small : before and after
    batch_size, device, threads, dtype : under which both were timed, in turns
    warnings : a line each
    """

    dense: Size
    small: Size
    batch_size: int
    device: str
    threads: int
    dtype: str
    warnings: tuple[str, ...] = ()

    @property
    def ratios(self) -> dict[str, float]:
        """Small over dense, of parameters, multiply-adds, bytes and time."""
        return {
            "params": self.small.params / self.dense.params,
            "macs": self.small.macs / self.dense.macs,
            "bytes": self.small.bytes / self.dense.bytes,
            "p50_ms": self.small.p50_ms / self.dense.p50_ms,
        }

    @property
    def speedup(self) -> float:
        """How many times faster the small network is, by the median."""
        return self.dense.p50_ms / self.small.p50_ms

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as JSON takes it."""
        found = asdict(self)
        for name in ("dense", "small"):
            found[name]["flops"] = getattr(self, name).flops
        return found | {"ratios": self.ratios, "speedup": self.speedup, "warnings": list(self.warnings)}

    def table(self) -> str:
        """Write it as text, with its warnings."""
        ratios = self.ratios
        rows = [("", "dense", "small", "small / dense")]
        for name, key, show in (
            ("parameters", "params", _count),
            ("multiply-adds (conv + linear)", "macs", _count),
            ("FLOPs (2 each)", "flops", _count),
            ("bytes", "bytes", _count),
            ("median, ms", "p50_ms", _figures),
            ("90 %, ms", "p90_ms", _figures),
            ("GMAC/s", "gmacs", _figures),
        ):
            values = [getattr(size, key) for size in (self.dense, self.small)]
            ratio = ratios.get(key, values[1] / values[0])
            rows.append((name, show(values[0]), show(values[1]), f"{ratio:.3f}"))
        sizes = [max(len(row[k]) for row in rows) for k in range(4)]
        lines = [
            "  ".join([row[0].ljust(sizes[0]), *(cell.rjust(n) for cell, n in zip(row[1:], sizes[1:], strict=True))])
            for row in rows
        ]
        lines.insert(1, "  ".join("-" * size for size in sizes))
        where = f"batch {self.batch_size} on {self.device}, {self.threads} threads, {self.dtype}"
        lines.append(f"{self.speedup:.2f} x faster: {where}, timed in turns")
        return "\n".join([*(line.rstrip() for line in lines), *(f"warning: {line}" for line in self.warnings)])

    def __str__(self) -> str:
        """Write the table."""
        return self.table()


def report(
    model: nn.Module,
    small: nn.Module,
    input_shape: Sequence[int],
    *,
    batch_size: int = 64,
    device: str = "cpu",
    example: Tensor | Sequence[Tensor] | None = None,
    warmup: int = 10,
    repeats: int = 30,
    measure: Measure = call_ms,
) -> Report:
    """Count and time a network before and after pruning.

    Parameters
    ----------
    model, small : before and after; copies are timed, in evaluation mode
    input_shape : of one example, e.g. ``(3, 32, 32)``
    batch_size : examples of a forward pass
    device : on which
    example : inputs to use instead of random numbers of that shape; its first axis counts examples
    warmup, repeats, measure : see `timing.time_together`

    Raises
    ------
    InputError
        For a batch of none.
    """
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size} has no example; give 1 or more")
    if example is None:
        like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
        generator = torch.Generator().manual_seed(0)
        example = torch.rand(batch_size, *input_shape, generator=generator).to(like.dtype)
    inputs = tuple(x.to(device) for x in as_inputs(example))
    networks = {"dense": copy.deepcopy(model).to(device), "small": copy.deepcopy(small).to(device)}
    timings = time_together(networks, inputs, warmup=warmup, repeats=repeats, measure=measure)
    examples = len(inputs[0])

    def size(name: str) -> Size:
        network = networks[name]
        own = macs(network, [x[:1] for x in inputs])
        tensors = {id(t): t for t in (*network.parameters(), *network.buffers())}.values()
        p50 = timings.p50(name)
        return Size(
            parameters(network),
            own,
            sum(t.numel() * t.element_size() for t in tensors),
            p50,
            timings.p90(name),
            own * examples / p50 / 1e6,
        )

    dense, after = size("dense"), size("small")
    warnings = warnings_of(dense, after, batch_size=examples, device=device, widths=_cut_widths(model, small))
    return Report(dense, after, examples, timings.device, timings.threads, timings.dtype, warnings)


def warnings_of(
    dense: Size, small: Size, *, batch_size: int, device: str, widths: Mapping[str, int]
) -> tuple[str, ...]:
    """Say what in the figures of two networks calls for care.

    Parameters
    ----------
    dense, small : before and after
    batch_size, device : under which both were timed
    widths : outputs of the layers that were cut
    """
    found: list[str] = []
    fewer, time = small.macs / dense.macs, small.p50_ms / dense.p50_ms
    if fewer < 0.9 and time > 0.95:
        found.append(
            f"multiply-adds fall to {fewer:.0%} but the time only to {time:.0%}: arithmetic does not take the time"
            " here; try a larger batch, wider cuts where the time goes (budget in milliseconds), or fewer layers"
        )
    on_gpu = torch.device(device).type == "cuda"
    multiple = 8 if on_gpu else 16
    odd = {name: width for name, width in widths.items() if width % multiple}
    if odd:
        name, width = next(iter(odd.items()))
        found.append(
            f"{len(odd)} of {len(widths)} layers that were cut have widths that are no multiple of {multiple} (e.g."
            f" {name!r}: {width}), which {'tensor cores' if on_gpu else 'vector units'} may do badly; try"
            f" round_to={multiple}, or ask suggest_round_to"
        )
    if on_gpu and batch_size == 1:
        found.append(
            "a batch of 1 on a GPU waits for launches, of which there are as many as before; only fewer layers, CUDA"
            " graphs or a larger batch help"
        )
    return tuple(found)


@dataclass(frozen=True)
class RoundTo:
    """Which multiple of channels this machine does best.

    Parameters
    ----------
    value : the smallest of the candidates that is about as good as the best
    gmacs : thousand million multiply-adds a second of networks whose widths are multiples of each
    """

    value: int
    gmacs: Mapping[int, float]


def suggest_round_to(
    model: nn.Module,
    groups: ChannelGroups,
    example: Tensor | Sequence[Tensor],
    candidates: Sequence[int] = (1, 4, 8, 16),
    *,
    tolerance: float = 0.03,
    seed: int = 0,
    device: str = "cpu",
    warmup: int = 3,
    repeats: int = 10,
    measure: Measure = call_ms,
) -> RoundTo:
    """Measure to which multiple widths should be rounded.

    Each candidate gets the network of the same random widths, around half of all, rounded down to its multiples; what
    counts is the arithmetic that it does in a second, as rounding itself makes networks smaller.

    Parameters
    ----------
    model : from which the groups were traced
    groups : its channel groups
    example : a batch ``(n, channels, height, width)``, or the tensors of several inputs
    candidates : multiples to compare
    tolerance : share of the best rate that is not worth a coarser multiple
    seed : of the widths
    device, warmup, repeats, measure : see `timing.time_together`

    Raises
    ------
    InputError
        For candidates that are none, or below 1.
    """
    if not candidates or min(candidates) < 1:
        raise InputError(f"candidates={tuple(candidates)} are no multiples; give integers from 1")
    inputs = tuple(x.to(device) for x in as_inputs(example))
    model = copy.deepcopy(model).to(device).eval()
    generator = torch.Generator().manual_seed(seed)
    counts = _spread_counts(groups.widths(), max(candidates), generator)
    networks: dict[str, nn.Module] = {}
    for multiple in candidates:
        kept = {name: count // multiple * multiple or count for name, count in counts.items()}
        keep = {name: torch.arange(width) < kept[name] for name, width in groups.widths().items()}
        networks[str(multiple)] = cut(model, groups, keep)
    timings = time_together(networks, inputs, warmup=warmup, repeats=repeats, measure=measure)
    gmacs = {int(name): macs(network, inputs) / timings.p50(name) / 1e6 for name, network in networks.items()}
    best = max(gmacs.values())
    return RoundTo(min(multiple for multiple, rate in gmacs.items() if rate >= (1 - tolerance) * best), gmacs)


def _cut_widths(model: nn.Module, small: nn.Module) -> dict[str, int]:
    """Return the outputs of each convolution and linear layer with fewer than before, but for the classifier."""
    before, after = _outputs(model), _outputs(small)
    head = next((name for name, module in reversed(list(small.named_modules())) if isinstance(module, nn.Linear)), None)
    return {name: width for name, width in after.items() if name != head and width < before.get(name, width)}


def _spread_counts(widths: Mapping[str, int], multiple: int, generator: torch.Generator) -> dict[str, int]:
    """Draw about half of each width, such that the remainders by the multiple are spread evenly."""
    shares = 0.35 + 0.3 * torch.rand(len(widths), generator=generator)
    remainders = (torch.randperm(len(widths), generator=generator) + 0.5) / max(1, len(widths)) * multiple
    drawn = zip(widths.items(), shares.tolist(), remainders.int().tolist(), strict=True)
    return {
        name: min(width, max(1, round(share * width) // multiple * multiple + remainder))
        for (name, width), share, remainder in drawn
    }


def _outputs(model: nn.Module) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, CONVS):
            found[name] = module.out_channels
        elif isinstance(module, nn.Linear):
            found[name] = module.out_features
    return found


def _count(value: int | float) -> str:
    return f"{value:,.0f}"


def _figures(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
