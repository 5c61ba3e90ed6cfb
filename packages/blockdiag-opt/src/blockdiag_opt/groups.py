"""Which weights share a block: by the kind of layer, by correlations found in a probe, and what either costs.

:func:`block_groups` knows layers, where an optimizer sees bare tensors: that a weight is recurrent, an embedding or of
a transposed convolution. :func:`plan` tells time and memory before training. :func:`discover_groups` finds groups of
correlated weights in a few gradients; Yun, Lozano and Yang (arXiv:1905.10757) take neighbours.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim import Optimizer

from blockdiag_opt import native
from blockdiag_opt.layout import GROUPINGS, Layout, lay_out
from blockdiag_opt.optimizer import BlockDiagonal
from shared_core.device import seeded
from shared_core.errors import InputError, no_such

__all__ = ["Alternative", "Plan", "PlanRow", "block_groups", "cluster", "discover_groups", "plan"]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


# ---- groups by layer


@dataclass(frozen=True)
class _Weight:
    """A trainable parameter, the layer it belongs to, and every name it goes by."""

    name: str
    param: Tensor
    owner: nn.Module
    aliases: tuple[str, ...]


def _weights(model: nn.Module) -> list[_Weight]:
    modules = dict(model.named_modules(remove_duplicate=False))
    names: dict[Tensor, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(param, []).append(name)
    found: list[_Weight] = []
    for param, aliases in names.items():
        if not param.requires_grad:
            continue
        name = aliases[0]
        if isinstance(param, nn.parameter.UninitializedParameter):
            raise InputError(
                f"parameter '{name}' belongs to a lazy layer and has no shape yet; run the model on one batch first"
            )
        # A parametrized weight (weight or spectral norm) lies in a module of its own, below its layer.
        owner = name.partition(".parametrizations.")[0] if ".parametrizations." in name else name.rpartition(".")[0]
        owner = "" if owner.startswith("parametrizations.") else owner
        found.append(_Weight(name, param, modules[owner], tuple(aliases)))
    if not found:
        raise InputError("the model has no trainable parameters: every requires_grad is False, or it has no layers")
    return found


def _resolve(weight: _Weight, grouping: str) -> str:
    """Turn the grouping that was asked for into what `lay_out` must be told for this layer's tensor."""
    owner, dims = weight.owner, weight.param.ndim
    if isinstance(owner, _EMBEDDINGS):
        # Rows are tokens, whose gradients meet only by chance: never a block across rows.
        return "output" if grouping in {"paper", "input"} else grouping
    if isinstance(owner, _RECURRENT):
        return "output" if grouping == "paper" else grouping
    if isinstance(owner, _TRANSPOSED) and dims > 2:
        # Their weight is (in, out, ...): what leads into an output unit is a column.
        if grouping == "auto" and math.prod(weight.param.shape[2:]) == 1:
            return "input"
        return {"output": "input", "input": "output"}.get(grouping, grouping)
    if grouping == "paper" and dims > 2 and not isinstance(owner, _CONVOLUTIONS):
        return "diag"
    if grouping == "auto" and isinstance(owner, nn.Bilinear):
        return "output"
    return grouping


def block_groups(
    model: nn.Module,
    *,
    block_size: int = 10,
    grouping: str = "auto",
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    blocks: Mapping[str, Tensor] | None = None,
) -> list[dict[str, Any]]:
    """Make parameter groups that suit each layer of a model.

    Unlike a bare list of parameters this knows recurrent layers (output-wise in the paper's scheme), embeddings (blocks
    within a token's vector) and transposed convolutions (whose weights are stored the other way round: "output" and
    "input" mean the layer's units, not the tensor's axes). Tied parameters appear once, frozen ones not at all.

    Parameters
    ----------
    model : whose parameters are trained
    block_size : largest size of a block, >= 1
    grouping : as in :func:`blockdiag_opt.layout.lay_out`; ``"paper"`` is dense input-wise, recurrent output-wise,
        convolutions with kernels of 2 to 5 filter-wise, everything else diagonal
    overrides : pattern of parameter names -> settings of theirs: ``{"head.*": {"block_size": 1, "lr": 1e-4}}``.
        Patterns are those of :mod:`fnmatch`; where several match, later ones win
    blocks : parameter name -> explicit partition (blocks, n) of its flat indices, -1 pads

    Returns
    -------
    Parameter groups for any optimizer of this package, with parameter names; parameters with equal settings share one.

    Raises
    ------
    InputError
        For a pattern or name that matches nothing, a grouping or partition that is none, a lazy layer without shape.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(20, 8), nn.Linear(8, 2))
    >>> for group in block_groups(net, overrides={"1.*": {"block_size": 1}}):
    ...     print(group["block_size"], [name for name, _ in group["params"]])
    10 ['0.weight', '0.bias']
    1 ['1.weight', '1.bias']
    """
    weights = _weights(model)
    names = [alias for weight in weights for alias in weight.aliases]
    for pattern in overrides or {}:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise no_such("trainable parameter", pattern, names, where="overrides")
    for name in blocks or {}:
        if name not in names:
            raise no_such("trainable parameter", name, names, where="blocks")
    groups: list[dict[str, Any]] = []
    for weight in weights:
        settings: dict[str, Any] = {"block_size": block_size, "grouping": grouping}
        literal = False
        for pattern, changes in (overrides or {}).items():
            if any(fnmatchcase(name, pattern) for name in weight.aliases):
                settings |= changes
                # Whoever names an embedding and says "input" means it.
                literal = literal or ("grouping" in changes and isinstance(weight.owner, _EMBEDDINGS))
        own = settings.pop("blocks", None)
        for name in weight.aliases:
            own = (blocks or {}).get(name, own)
        if settings["grouping"] in GROUPINGS and not (literal and settings["grouping"] == "input"):
            settings["grouping"] = _resolve(weight, settings["grouping"])
        try:
            lay_out(weight.param.shape, settings["grouping"], settings["block_size"], own, weight.name)
        except ValueError as error:
            message = str(error) if weight.name in str(error) else f"parameter '{weight.name}': {error}"
            raise InputError(message) from None
        _join(groups, settings, weight, own)
    for group in groups:
        if all(part is None for part in group["blocks"]):
            del group["blocks"]
    return groups


def _join(groups: list[dict[str, Any]], settings: dict[str, Any], weight: _Weight, own: Tensor | None) -> None:
    for group in groups:
        others = {key: value for key, value in group.items() if key not in {"params", "blocks"}}
        if others.keys() == settings.keys() and all(_equal(others[key], settings[key]) for key in settings):
            group["params"].append((weight.name, weight.param))
            group["blocks"].append(own)
            return
    groups.append({**settings, "params": [(weight.name, weight.param)], "blocks": [own]})


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return one is other
    return bool(one == other)


# ---- what it costs


@dataclass(frozen=True)
class Alternative:
    """A cheaper setting for a tensor.

    Attributes
    ----------
    change : the setting, as one would write it
    ms : predicted milliseconds of a step for this tensor with it
    state_bytes : bytes of this tensor's state with it
    """

    change: str
    ms: float
    state_bytes: int


@dataclass(frozen=True)
class PlanRow:
    """What one tensor costs.

    Attributes
    ----------
    name : the parameter's name
    shape : its shape
    grouping : resolved grouping: never "auto" or "paper"
    block_size : coordinates of a block, padding included
    blocks : number of blocks; of a diagonal tensor its number of elements
    state_bytes : bytes of optimizer state
    adam_bytes : bytes of state that torch.optim.Adam keeps
    ms : predicted milliseconds of a step
    share : of the predicted time of all tensors, 0..1
    cheaper : settings that take less time, for tensors that take a tenth or more of it; best first
    """

    name: str
    shape: tuple[int, ...]
    grouping: str
    block_size: int
    blocks: int
    state_bytes: int
    adam_bytes: int
    ms: float
    share: float
    cheaper: tuple[Alternative, ...]


@dataclass(frozen=True)
class Plan:
    """What an optimizer of this package will cost; prints as a table.

    Attributes
    ----------
    rows : a row for each tensor
    total_ms : predicted milliseconds of ``optimizer.step()``
    adam_ms : the same with block_size=1, that is, of Adam in this package
    state_bytes, adam_bytes : bytes of state here and in torch.optim.Adam
    engine : what the blocks run on: ``"native"``, ``"torch"``, or both
    threads : of torch
    measured : whether times come from this machine or from the stored cost model
    warnings : what should be known before training
    """

    rows: tuple[PlanRow, ...]
    total_ms: float
    adam_ms: float
    state_bytes: int
    adam_bytes: int
    engine: str
    threads: int
    measured: bool
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        head = ("tensor", "shape", "grouping", "block", "blocks", "state", "Adam's", "ms/step", "share")
        lines = [
            (
                row.name,
                "x".join(map(str, row.shape)) or "scalar",
                row.grouping,
                str(row.block_size),
                f"{row.blocks:,}",
                _bytes(row.state_bytes),
                _bytes(row.adam_bytes),
                _ms(row.ms),
                f"{row.share:.0%}",
            )
            for row in self.rows
        ]
        total = ("total", "", "", "", "", _bytes(self.state_bytes), _bytes(self.adam_bytes), _ms(self.total_ms), "")
        table = [head, *lines, total]
        widths = [max(len(line[k]) for line in table) for k in range(len(head))]
        left = {0, 1, 2}
        text = [
            "  ".join(
                cell.ljust(widths[k]) if k in left else cell.rjust(widths[k]) for k, cell in enumerate(line)
            ).rstrip()
            for line in table
        ]
        rule = "-" * max(map(len, text))
        text = [text[0], rule, *text[1:-1], rule, text[-1]]
        source = "measured here" if self.measured else "from a stored cost model"
        memory, slower = self.state_bytes / max(self.adam_bytes, 1), self.total_ms / self.adam_ms
        text.append(f"state {memory:.1f} x Adam's; time {slower:.1f} x that of block_size=1")
        text.append(f"times {source}; engine {self.engine}, {self.threads} thread{'s' if self.threads > 1 else ''}")
        for row in self.rows:
            if row.cheaper:
                ways = ", ".join(f"{way.change} {_ms(way.ms)}" for way in row.cheaper)
                text.append(f"cheaper for {row.name} ({_ms(row.ms)} ms): {ways}")
        return "\n".join([*text, *(f"warning: {warning}" for warning in self.warnings)])


def _bytes(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def _ms(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:.0f}"


# Microseconds of one block on one core of 2023: the step with its decomposition, and the step between two of them.
_SOLVE = {
    "native": {1: 0.0025, 2: 0.018, 4: 0.1, 6: 0.25, 10: 0.62, 16: 1.6, 25: 4.2, 32: 9.0, 64: 60.0, 128: 500.0},
    "torch": {1: 0.008, 2: 0.2, 3: 1.6, 4: 2.3, 6: 5.5, 10: 9.8, 16: 23.0, 32: 92.0, 64: 370.0, 128: 1460.0},
}
_TRACK = {
    "native": {1: 0.0025, 2: 0.012, 4: 0.03, 10: 0.12, 32: 0.9, 64: 4.0, 128: 16.0},
    "torch": {1: 0.008, 2: 0.12, 4: 0.3, 10: 1.2, 32: 9.0, 64: 40.0, 128: 120.0},
}
# How much more a decomposition takes whose eigenvectors are kept.
_KEPT = {"native": 1.8, "torch": 1.0}
_BASE_US, _TENSOR_US = 40.0, 15.0
# An interval that is never reached: what is left is the step between decompositions.
_NEVER = 1 << 40
_BUDGET_SECONDS = 0.8
_SAMPLE_US = 1500.0


def _stored(table: Mapping[int, float], n: int) -> float:
    """Interpolate a table of costs on logarithmic axes; beyond its end costs grow with the cube."""
    sizes = sorted(table)
    if n >= sizes[-1]:
        return table[sizes[-1]] * (n / sizes[-1]) ** 3
    high = next(k for k, size in enumerate(sizes) if size > n)
    left, right = sizes[high - 1], sizes[high]
    weight = math.log(n / left) / math.log(right / left)
    return table[left] ** (1 - weight) * table[right] ** weight


def _stored_step(engine: str, n: int, interval: int) -> float:
    solve = _stored(_SOLVE[engine], n)
    return solve if interval == 1 else _stored(_TRACK[engine], n) + _KEPT[engine] * solve / interval


@dataclass(frozen=True)
class _Machine:
    """What calibrations depend on besides the block."""

    device: str
    threads: int
    dtype: torch.dtype


def _timed(step: Callable[[], object], device: str, repeats: int, limit: float) -> float:
    """Return the median time of a call in microseconds."""
    # A backward pass leaves nothing of the optimizer in the caches.
    other = torch.zeros(1 << 20, device=device)
    spent: list[float] = []
    start = time.perf_counter()
    while len(spent) < repeats and (not spent or time.perf_counter() - start < limit):
        other.add_(1)
        if device != "cpu":
            torch.cuda.synchronize(device)
        before = time.perf_counter()
        step()
        if device != "cpu":
            torch.cuda.synchronize(device)
        spent.append((time.perf_counter() - before) * 1e6)
    return sorted(spent)[len(spent) // 2]


def _scratch(machine: _Machine, count: int, n: int, **options: Any) -> BlockDiagonal:
    kind: dict[str, Any] = {"device": machine.device, "dtype": machine.dtype}
    param = torch.zeros(count, n, **kind, requires_grad=True)
    random = torch.Generator().manual_seed(n)
    param.grad = torch.randn(count, n, generator=random).to(**kind)
    return BlockDiagonal([param], block_size=n, grouping="output" if n > 1 else "diag", **options)


@functools.cache
def _overhead(machine: _Machine, engine: str) -> tuple[float, float]:
    """Microseconds of an empty step, and of one more tensor in it."""
    found: list[float] = []
    for count in (1, 9):
        params = [torch.zeros(1, device=machine.device, dtype=machine.dtype, requires_grad=True) for _ in range(count)]
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer = BlockDiagonal(params, engine=engine)
        optimizer.step()
        found.append(_timed(optimizer.step, machine.device, 15, 0.08))
    each = max((found[1] - found[0]) / 8, 0.1)
    return max(found[0] - each, 0.1), each


@functools.cache
def _measured(machine: _Machine, engine: str, n: int, count: int, interval: int) -> float:
    """Microseconds that the engine needs for each of `count` blocks in an average step."""
    optimizer = _scratch(machine, count, n, engine=engine, update_interval=interval)
    grad = cast("Tensor", optimizer.param_groups[0]["params"][0].grad)
    random = torch.Generator().manual_seed(count)
    draws = [torch.randn(grad.shape, generator=random).to(grad) for _ in range(4)]
    # Behind the first steps, in which moments are of low rank and intervals not yet kept.
    limit = time.perf_counter() + 0.1
    for step in range(8):
        if time.perf_counter() < limit or step < 2:
            grad.copy_(draws[step % 4])
            optimizer.step()
    # Where a block is decomposed at every other step, two make an average.
    pair = 2 if interval == 2 else 1

    def steps() -> None:
        for _ in range(pair):
            optimizer.step()

    spent = _timed(steps, machine.device, 5, 0.08) / pair
    base, each = _overhead(machine, engine)
    return max(spent - base - each, 0.05 * spent) / count


class _Clock:
    """Predicts times of steps; measures while its budget lasts, then scales the stored model by what it has seen."""

    def __init__(self, machine: _Machine, measure: bool) -> None:
        self.machine = machine
        self.measure = measure
        self.end = time.perf_counter() + _BUDGET_SECONDS
        self.seen: dict[str, float] = {}

    def overhead(self, engine: str) -> tuple[float, float]:
        return _overhead(self.machine, engine) if self.measure else (_BASE_US, _TENSOR_US)

    def _block(self, engine: str, n: int, blocks: int, interval: int) -> float:
        stored = _stored_step(engine, n, interval)
        if not self.measure:
            return stored / (self.machine.threads if engine == "native" and blocks * stored > _SAMPLE_US else 1)
        wanted = int(min(_SAMPLE_US * self.machine.threads / stored, 100_000))
        # The kernel works on sixteen blocks at a time.
        count = blocks if blocks <= 16 else min(blocks // 16, max(wanted // 16, 1)) * 16
        if time.perf_counter() > self.end:
            return stored * self.seen.get(engine, 1.0)
        found = _measured(self.machine, engine, n, count, interval)
        self.seen[engine] = found / stored
        return found

    def microseconds(self, layout: Layout, interval: int, engine: str) -> float:
        """Predict one tensor's part of a step."""
        blocks = layout.numel if layout.diagonal else layout.blocks
        if blocks == 0:
            return 0.0
        if layout.diagonal or interval == 1:
            each = self._block(engine, layout.n, blocks, 1)
        else:
            # Decompositions that keep their eigenvectors cost more than those of interval 1, which apply them at once.
            track, often = (self._block(engine, layout.n, blocks, every) for every in (_NEVER, 2))
            each = track + max(often - track, 0.0) * 2 / interval
        return blocks * each + self.overhead(engine)[1]


@dataclass(frozen=True)
class _Entry:
    """A tensor with the settings that decide its cost."""

    name: str
    param: Tensor
    layout: Layout
    group: Mapping[str, Any]

    @property
    def interval(self) -> int:
        return int(self.group["update_interval"])

    def engine(self, layout: Layout) -> str:
        fits = _home(self.param).type == "cpu" and layout.n <= native.LARGEST and not self.group["amsgrad"]
        return "native" if fits and self.group["engine"] != "torch" and native.load() is not None else "torch"

    def state_bytes(self, layout: Layout, interval: int) -> int:
        group = self.group
        wide = "64" in str(group["state_dtype"]) or (group["state_dtype"] is None and self.param.dtype == torch.float64)
        numbers = layout.floats * (2 if group["amsgrad"] else 1)
        if group["method"] in {"adam", "adafom"} and group["betas"][0] > 0:
            numbers += layout.numel
        if group["momentum"]:
            numbers += layout.numel
        if interval > 1 and not layout.diagonal:
            numbers += layout.tiles * layout.width * (layout.n**2 + layout.n)
        return numbers * (8 if wide else 4) + 4

    def alternatives(self, clock: _Clock, ms: float) -> tuple[Alternative, ...]:
        layout, interval = self.layout, self.interval
        if layout.diagonal:
            return ()
        choices: list[tuple[str, Layout, int]] = []
        if interval == 1:
            choices.append(("update_interval=10", layout, 10))
        if layout.n > 3 and layout.kind in {"output", "input"}:
            half = layout.n // 2
            choices.append((f"block_size={half}", lay_out(layout.shape, layout.kind, half), interval))
        choices.append(('grouping="diag"', lay_out(layout.shape, "diag"), interval))
        found: list[Alternative] = []
        for change, other, every in choices:
            if other.diagonal and not change.startswith("grouping"):
                continue
            cost = clock.microseconds(other, every, self.engine(other)) / 1e3
            if cost < 0.9 * ms:
                found.append(Alternative(change, cost, self.state_bytes(other, every)))
        return tuple(sorted(found, key=lambda way: way.ms))


def _entries(groups: Iterable[Any], settings: Mapping[str, Any]) -> list[_Entry]:
    listed = list(groups)
    if listed and not isinstance(listed[0], Mapping):
        listed = [{"params": listed}]
    # Not those of an instance: torch imports its compiler, which takes seconds, with the first optimizer made.
    signature = inspect.signature(BlockDiagonal).parameters.values()
    defaults = {each.name: each.default for each in signature} | dict(settings)
    found: list[_Entry] = []
    for number, group in enumerate(listed):
        params = group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        blocks = group.get("blocks")
        blocks = [blocks] if isinstance(blocks, Tensor) else blocks
        names = group.get("param_names")
        full: dict[str, Any] = defaults | {key: value for key, value in group.items() if key != "params"}
        for place, each in enumerate(params):
            name, param = each if isinstance(each, tuple) else (names[place] if names else f"{number}.{place}", each)
            own = None if blocks is None else blocks[place]
            found.append(
                _Entry(name, param, lay_out(param.shape, full["grouping"], full["block_size"], own, name), full)
            )
    if not found:
        raise InputError("there are no parameters to plan for")
    return found


def plan(
    groups_or_model_or_optimizer: nn.Module | Optimizer | Iterable[Any],
    *,
    block_size: int = 10,
    grouping: str = "auto",
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    update_interval: int = 1,
    engine: str = "auto",
    measure: bool = True,
) -> Plan:
    """Tell before training what an optimizer with blocks will cost, tensor by tensor.

    Times come from runs of the optimizer on a few hundred blocks of each size, which take about a second and are
    remembered; they are good to about a factor of two. Memory is exact: first moments, packed second moments, and with
    an update interval eigenvectors and eigenvalues.

    Parameters
    ----------
    groups_or_model_or_optimizer : a model, parameter groups (from :func:`block_groups`, or plain parameters), or an
        optimizer; settings in groups and optimizers win over those below
    block_size, grouping, overrides : as in :func:`block_groups`
    update_interval : steps between two decompositions of a block
    engine : ``"auto"``, ``"native"`` or ``"torch"``
    measure : False takes times from a stored cost model of another machine, at once

    Returns
    -------
    The plan; print it.

    Examples
    --------
    >>> found = plan(nn.Linear(784, 64), measure=False)
    >>> [(row.name, row.blocks, row.block_size) for row in found.rows]
    [('weight', 5056, 10), ('bias', 64, 1)]
    >>> found.state_bytes > 5 * found.adam_bytes / 2
    True
    """
    subject = groups_or_model_or_optimizer
    shape = {"block_size": block_size, "grouping": grouping}
    groups: Iterable[Any]
    if isinstance(subject, nn.Module):
        groups = block_groups(subject, block_size=block_size, grouping=grouping, overrides=overrides)
    elif isinstance(subject, Optimizer):
        groups = subject.param_groups
    else:
        groups = subject
    entries = _entries(groups, shape | {"update_interval": update_interval, "engine": engine})
    clocks: dict[_Machine, _Clock] = {}

    def clock(entry: _Entry) -> _Clock:
        dtype = torch.float64 if entry.param.dtype == torch.float64 else torch.float32
        machine = _Machine(str(_home(entry.param)), torch.get_num_threads(), dtype)
        return clocks.setdefault(machine, _Clock(machine, measure))

    engines = [entry.engine(entry.layout) for entry in entries]
    costs = [
        clock(entry).microseconds(entry.layout, entry.interval, used) / 1e3
        for entry, used in zip(entries, engines, strict=True)
    ]
    flat = [lay_out(entry.layout.shape, "diag") for entry in entries]
    plain = [
        clock(entry).microseconds(layout, 1, entry.engine(layout)) / 1e3
        for entry, layout in zip(entries, flat, strict=True)
    ]
    base = clock(entries[0]).overhead(engines[0])[0] / 1e3
    whole = sum(costs)
    rows = tuple(
        PlanRow(
            name=entry.name,
            shape=entry.layout.shape,
            grouping=entry.layout.kind,
            block_size=entry.layout.n,
            blocks=entry.layout.blocks,
            state_bytes=entry.state_bytes(entry.layout, entry.interval),
            adam_bytes=2 * entry.param.numel() * entry.param.element_size() + 4,
            ms=cost,
            share=cost / whole,
            cheaper=entry.alternatives(clock(entry), cost) if cost >= 0.1 * whole else (),
        )
        for entry, cost in zip(entries, costs, strict=True)
    )
    busy = {used for used, row in zip(engines, rows, strict=True) if row.block_size > 1}
    return Plan(
        rows=rows,
        total_ms=whole + base,
        adam_ms=sum(plain) + base,
        state_bytes=sum(row.state_bytes for row in rows),
        adam_bytes=sum(row.adam_bytes for row in rows),
        engine=" and ".join(sorted(busy or {engines[0]})),
        threads=torch.get_num_threads(),
        measured=measure,
        warnings=tuple(_plan_warnings(entries, rows)),
    )


def _plan_warnings(entries: Sequence[_Entry], rows: Sequence[PlanRow]) -> list[str]:
    found = [
        f"{row.name}: blocks of {row.block_size} take {_ms(row.ms)} ms of every step; block_size <= 32 is the practical"
        " range"
        for row in rows
        if row.block_size > 32
    ]
    for device in {_home(entry.param) for entry in entries}:
        needed = sum(row.state_bytes for entry, row in zip(entries, rows, strict=True) if _home(entry.param) == device)
        free = _free_memory(device)
        if free is not None and needed > free / 2:
            found.append(
                f"the state needs {_bytes(needed)} of {_bytes(free)} free on {device}; take a smaller block_size, or"
                ' grouping="diag" for the largest tensors'
            )
    blocks = any(row.block_size > 1 for row in rows)
    if blocks and any(_home(entry.param).type == "cpu" for entry in entries) and native.load() is None:
        found.append(f"no native engine: {native.reason()}; torch does the decompositions, about ten times slower")
    return found


def _home(param: Tensor) -> torch.device:
    # A model of shapes alone is planned for as if it were trained on the CPU.
    return torch.device("cpu") if param.device.type == "meta" else param.device


def _free_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if device.type == "cpu" else None
    except (ValueError, OSError, AttributeError):
        return None


# ---- groups by correlation

_LONGEST_LINE = 2048
_SWAP_ROUNDS = 200
# Smaller ones are rounding, and could go round in circles.
_LEAST_GAIN = 1e-5


def cluster(similarity: Float[Tensor, "d d"], size: int) -> Int[Tensor, "groups size"]:
    """Split coordinates into balanced groups whose members are similar to each other.

    Groups grow one after another from the most similar pair left, by the coordinate with the largest sum of
    similarities to the group; then pairs change places as long as that raises the sum of similarities inside groups.

    Parameters
    ----------
    similarity : symmetric, >= 0 (d, d); the diagonal is not used
    size : largest size of a group, >= 1

    Returns
    -------
    Members of each group, ascending; -1 pads groups that are one smaller, for which d is no multiple.

    Examples
    --------
    >>> near = torch.tensor([[0.0, 0.1, 0.9, 0.0], [0.1, 0.0, 0.0, 0.8], [0.9, 0.0, 0.0, 0.1], [0.0, 0.8, 0.1, 0.0]])
    >>> cluster(near, 2)
    tensor([[0, 2],
            [1, 3]])
    """
    d = similarity.shape[0]
    count = -(-d // size)
    width = -(-d // count)
    close = similarity.to(torch.float32, copy=True).fill_diagonal_(0)
    label = torch.full((d,), -1, dtype=torch.int64)
    free = torch.ones(d, dtype=torch.bool)
    missing = count * width - d
    nowhere = torch.tensor(-math.inf)
    best = close.amax(1) if d > 1 else close[:, 0]
    for group in range(count):
        member = int(torch.where(free, best, nowhere).argmax())
        total = torch.zeros(d)
        for _ in range(width - (group >= count - missing)):
            label[member], free[member] = group, False
            total += close[member]
            member = int(torch.where(free, total, nowhere).argmax())
        stale = free & (close.argmax(1) >= 0) & ~free[close.argmax(1)]
        if bool(stale.any()):
            best[stale] = torch.where(free, close[stale], nowhere).amax(1)
    _swap(close, label, count)
    order = torch.argsort(label, stable=True)
    groups = torch.full((count, width), -1, dtype=torch.int64)
    sizes = torch.bincount(label, minlength=count)
    places = torch.arange(d) - (sizes.cumsum(0) - sizes)[label[order]]
    groups[label[order], places] = order
    # By their first member: neighbours stay neighbours where nothing speaks against it.
    return groups[torch.argsort(groups[:, 0])]


def _swap(close: Tensor, label: Tensor, count: int) -> None:
    """Exchange members of groups, several disjoint pairs of groups at a time, while that raises their cohesion."""
    d = len(label)
    rows = torch.arange(d)
    scale = float(close.max()) if d else 0.0
    for _ in range(_SWAP_ROUNDS):
        member = torch.nn.functional.one_hot(label, count).float()
        affinity = close @ member
        own = affinity[rows, label]
        # Gain of i and j changing places; each was counted in the other's new group.
        moved = affinity[:, label]
        gain = moved + moved.T - own[:, None] - own[None] - 2 * close
        gain[label[:, None] == label[None]] = -math.inf
        value, partner = gain.max(1)
        order = torch.argsort(value, descending=True)
        order = order[value[order] > _LEAST_GAIN * scale]
        if not len(order):
            return
        now, partners = label.tolist(), partner.tolist()
        touched: set[int] = set()
        for i in order.tolist():
            j = partners[i]
            # Gains are exact as long as no other swap has touched either group.
            if now[i] not in touched and now[j] not in touched:
                touched |= {now[i], now[j]}
                now[i], now[j] = now[j], now[i]
        label.copy_(torch.tensor(now))


def _probe(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    names: Sequence[str],
    steps: int,
    lr: float,
    seed: int,
) -> Iterable[dict[str, Tensor]]:
    """Yield gradients of a copy that is trained by Adam; the model and the global random state stay as they are."""
    try:
        trained = copy.deepcopy(model)
    except RuntimeError as error:
        raise InputError(f"the probe trains a copy of the model, which cannot be copied: {error}") from None
    wanted = {name: param for name, param in trained.named_parameters() if name in set(names)}
    params = [param for param in trained.parameters() if param.requires_grad]
    optimizer = torch.optim.Adam(params, lr=lr) if lr > 0 else None
    devices = {param.device for param in params}
    stream = iter(batches)
    done = 0
    with seeded(seed, *devices):
        while done < steps:
            batch = next(stream, None)
            if batch is None:
                break
            for param in params:
                param.grad = None
            with torch.enable_grad():
                loss(trained, batch).backward()
            done += 1
            found = {name: param.grad.detach() for name, param in wanted.items() if param.grad is not None}
            for name, grad in found.items():
                if not bool(grad.isfinite().all()):
                    raise InputError(f"the probe met a gradient that is not finite in '{name}' at step {done}")
            yield found
            if optimizer is not None:
                optimizer.step()
    if done < 4:
        raise InputError(f"the probe saw {done} batches; it needs at least 4, and 50 or more to be of use")


def discover_groups(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    block_size: int = 10,
    steps: int = 50,
    grouping: str = "auto",
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    per_row: bool = False,
    lr: float = 1e-3,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Find which weights have correlated gradients, and make them each other's block.

    Blocks of neighbours, the paper's choice, are worth something only where neighbours are correlated; features in an
    arbitrary order are not. A copy of the model takes a few steps of Adam. Correlations are those of the differences of
    successive gradients: the mean gradient, which changes slowly and correlates everything with everything, drops out.

    Parameters
    ----------
    model : stays as it is
    batches : training batches; the first `steps` are used
    loss : (model, batch) -> scalar to minimise
    block_size : largest size of a block, >= 1
    steps : batches to look at
    grouping : which coordinates may share a block: ``"output"`` those of a row of a dense weight, ``"input"`` of a
        column, ``"auto"`` and ``"paper"`` as :func:`block_groups` has it. Other tensors keep their ordinary grouping,
        as do lines longer than 2048.
    overrides : as in :func:`block_groups`; what they name has the settings they say
    per_row : let every row (or column) have groups of its own, from its own gradients only. By default all rows of a
        weight share their groups: they share their inputs, and pooling makes a short probe precise
    lr : of the copy's Adam; 0 looks at the initial point only
    seed : of dropout and the like in the probe

    Returns
    -------
    Parameter groups with explicit ``blocks``.

    Raises
    ------
    InputError
        For fewer than 4 batches, gradients that are not finite, and whatever :func:`block_groups` refuses.

    Examples
    --------
    >>> net, data = nn.Linear(6, 2), [torch.randn(16, 3).repeat(1, 2) for _ in range(20)]
    >>> groups = discover_groups(net, data, lambda net, x: net(x).square().mean(), block_size=2)
    >>> groups[0]["blocks"][0][:3]
    tensor([[0, 3],
            [1, 4],
            [2, 5]])
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 4:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(f"steps must be an integer >= 4, got {steps!r}")
    weights = {weight.name: weight for weight in _weights(model)}
    chosen: dict[str, Mapping[str, Any]] = dict(overrides or {})
    if grouping in {"output", "input"}:
        # The choice is about dense weights: convolutions stay filter-wise.
        dense = [
            name
            for name, weight in weights.items()
            if weight.param.ndim == 2 and not isinstance(weight.owner, _EMBEDDINGS)
        ]
        chosen = {_literal(name): {"grouping": grouping} for name in dense} | chosen
        grouping = "auto"
    plain = block_groups(model, block_size=block_size, grouping=grouping, overrides=chosen)
    layouts: dict[str, Layout] = {}
    for group in plain:
        given = group.get("blocks") or [None] * len(group["params"])
        for (name, param), own in zip(group["params"], given, strict=True):
            layout = lay_out(param.shape, group["grouping"], group["block_size"], own, name)
            if layout.kind not in {"output", "input"} or layout.length <= layout.n:
                continue
            if layout.length > _LONGEST_LINE:
                warnings.warn(
                    f"'{name}' has lines of {layout.length} weights, above {_LONGEST_LINE}: its blocks are neighbours",
                    stacklevel=2,
                )
                continue
            layouts[name] = layout
    sizes = {name: group["block_size"] for group in plain for name, _ in group["params"]}
    pooled = {name: torch.zeros(layout.length, layout.length, dtype=torch.float64) for name, layout in layouts.items()}
    kept: dict[str, list[Tensor]] = {name: [] for name in layouts}
    before: dict[str, Tensor] = {}
    for grads in _probe(model, batches, loss, list(layouts), steps, lr, seed):
        for name, grad in grads.items():
            layout = layouts[name]
            flat = grad.reshape(layout.shape[0], -1)
            lines = (flat if layout.kind == "output" else flat.T).to("cpu", torch.float32, copy=True)
            if name in before:
                change = lines - before[name]
                if per_row:
                    kept[name].append(change)
                else:
                    pooled[name] += _scatter(change)
            before[name] = lines
    found: dict[str, Tensor] = {}
    for name, layout in layouts.items():
        lines = layout.blocks // layout.chunks
        if per_row:
            if not kept[name]:
                continue
            history = torch.stack(kept[name], 1).double()
            groups = torch.stack([cluster(_correlation(line.T @ line), sizes[name]) for line in history])
        else:
            groups = cluster(_correlation(pooled[name]), sizes[name])[None].expand(lines, -1, -1)
        strides = (layout.length, 1) if layout.kind == "output" else (1, lines)
        flat = torch.arange(lines)[:, None, None] * strides[0] + groups * strides[1]
        found[name] = torch.where(groups >= 0, flat, -1).reshape(-1, groups.shape[-1])
    return block_groups(model, block_size=block_size, grouping=grouping, overrides=chosen, blocks=found)


def _literal(name: str) -> str:
    """Make a pattern that matches this name only."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _scatter(lines: Tensor) -> Tensor:
    """Return the sum of outer products of lines, of any magnitude."""
    # In single precision, where the squares of tiny gradients would vanish.
    scale = lines.abs().max().clamp(min=torch.finfo(lines.dtype).tiny)
    lines = lines / scale
    return (lines.T @ lines).double() * scale.double().square()


def _correlation(scatter: Tensor) -> Tensor:
    """Return squared correlations; a coordinate that never moved has none."""
    spread = scatter.diagonal().clamp(min=0).sqrt()
    scale = torch.where(spread > 0, 1 / spread, torch.zeros_like(spread))
    return (scatter * scale[:, None] * scale[None]).square()
