"""What the blocks of a running optimizer look like, and whether they do anything that a diagonal would not.

Condition numbers, off-diagonal energy, effective learning rates, and the change of the preconditioner, which is the
oscillation term of the convergence bound (Yun, Lozano and Yang, arXiv:1905.10757; for diagonal methods Chen et al.,
arXiv:1808.02941).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from blockdiag_opt.layout import Layout, lay_out
from blockdiag_opt.optimizer import BlockDiagonal, effective_rates, floor_of, raise_to_floor, step_scalars
from blockdiag_opt.roots import decompose, to_full, untile
from shared_core.errors import InputError

__all__ = ["LayerSpectrum", "Monitor", "independent_energy", "spectrum", "spectrum_of_state"]

# Measured on regression with features correlated in groups of ten, a share of them permuted; gain in excess risk over
# the best diagonal run: at most 1.15 below 0.38 (chance pairs remain even in a random order), 1.3 to 1.7 at 0.42 to
# 0.53, 3 and more from 0.6 on. An autoencoder and two classifiers, which gain, have 0.4 to 0.8.
_NOTHING, _CLEAR = 0.4, 0.5
_SAMPLE_BLOCKS, _SAMPLE_NUMBERS = 64, 1 << 18


@dataclass(frozen=True, eq=False)
class LayerSpectrum:
    """Second moments of one tensor's blocks, seen through their eigenvalues.

    Attributes
    ----------
    name : the parameter's name
    n : coordinates of a block; 1 for a diagonal tensor
    step : steps that went into the moments
    eigenvalues : of V, ascending, without damping and floor (blocks, n)
    condition : largest over smallest eigenvalue after flooring (blocks,)
    off_diagonal : ||V - diag V|| / ||V|| in the Frobenius norm (blocks,)
    expected : what `off_diagonal` would be if coordinates were independent and V merely estimated from so few
        gradients (blocks,)
    low, high : range of effective learning rates alpha_t / (sqrt(eigenvalue) + eps), with bias correction and clipping
    """

    name: str
    n: int
    step: int
    eigenvalues: Float[Tensor, "blocks n"]
    condition: Float[Tensor, " blocks"]
    off_diagonal: Float[Tensor, " blocks"]
    expected: Float[Tensor, " blocks"]
    low: float
    high: float

    @property
    def excess(self) -> float:
        """Mean off-diagonal energy beyond chance: the root of the mean of off_diagonal² - expected², 0 if negative."""
        return _excess(self.off_diagonal, self.expected)

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, for JSON: over blocks, the median condition and root mean square energies."""
        return {
            "name": self.name,
            "block_size": self.n,
            "blocks": len(self.eigenvalues),
            "step": self.step,
            "condition": _median(self.condition),
            "off_diagonal": _mean_square(self.off_diagonal),
            "expected_off_diagonal": _mean_square(self.expected),
            "excess": self.excess,
            "low": self.low,
            "high": self.high,
        }


def _excess(off: Tensor, expected: Tensor) -> float:
    return math.sqrt(max(float((off.square() - expected.square()).mean()), 0.0)) if len(off) else 0.0


def _mean_square(values: Tensor) -> float:
    return math.sqrt(float(values.square().mean())) if len(values) else math.nan


def _median(values: Tensor) -> float:
    return float(values.median()) if len(values) else math.nan


def effective_samples(method: str, beta2: float, step: int) -> float:
    """Return how many equally weighted gradients second moments at a step are worth.

    Parameters
    ----------
    method : of :class:`blockdiag_opt.optimizer.BlockDiagonal`
    beta2 : decay of second moments
    step : gradients so far, >= 1

    Examples
    --------
    >>> round(effective_samples("adam", 0.999, 10**6)), effective_samples("adagrad", 0.0, 50)
    (1999, 50.0)
    """
    if method in {"adagrad", "adafom"} or beta2 == 1:
        return float(step)
    # (sum of weights)² / (sum of squared weights) of the decaying average.
    return (1 - beta2**step) ** 2 * (1 + beta2) / ((1 - beta2) * (1 - beta2 ** (2 * step)))


def independent_energy(full: Float[Tensor, "blocks n n"], samples: float | Tensor) -> Float[Tensor, " blocks"]:
    """Return the off-diagonal energy that blocks with these diagonals have if their coordinates are independent.

    The covariance of two independent coordinates, estimated from N gradients, has mean square v_i v_j / N: even blocks
    that hold nothing look full, the more so the larger and younger they are.

    Parameters
    ----------
    full : second moments (blocks, n, n)
    samples : N, for all blocks or each (blocks,)

    Returns
    -------
    ||V - diag V|| / ||V|| to expect (blocks,).

    Examples
    --------
    >>> independent_energy(torch.eye(10)[None], 1000.0)
    tensor([0.0944])
    """
    diagonal = full.diagonal(dim1=-2, dim2=-1)
    scale = diagonal.amax(-1, keepdim=True)
    diagonal = torch.where(scale > 0, diagonal / scale, torch.zeros_like(diagonal))
    squares = diagonal.square().sum(-1)
    noise = (diagonal.sum(-1).square() - squares).clamp(min=0) / samples
    whole = squares + noise
    return torch.where(whole > 0, noise / whole, torch.zeros_like(whole)).sqrt()


def _off_diagonal(full: Tensor) -> Tensor:
    scale = full.diagonal(dim1=-2, dim2=-1).amax(-1)[:, None, None]
    full = torch.where(scale > 0, full / scale, torch.zeros_like(full))
    off = full - torch.diag_embed(full.diagonal(dim1=-2, dim2=-1))
    whole, part = full.flatten(1).norm(dim=1), off.flatten(1).norm(dim=1)
    return torch.where(whole > 0, part / whole, torch.zeros_like(whole))


def _floored(values: Tensor, group: Mapping[str, Any], precision: float) -> Tensor:
    n = values.shape[-1]
    return raise_to_floor(values, floor_of(group, n, precision)) if n > 1 else values


def _rates(floored: Tensor, group: Mapping[str, Any], step: int) -> Tensor:
    """Return the learning rate along each eigenvector (blocks, n)."""
    found = effective_rates(floored, group, step_scalars(group, step), floored.shape[-1])
    return found * float(group["lr"]) if group["momentum"] else found


def _describe(
    name: str,
    full: Tensor,
    group: Mapping[str, Any],
    step: int,
    precision: float,
    samples: float | Tensor | None = None,
) -> tuple[LayerSpectrum, Tensor, Tensor]:
    """Return the spectrum of blocks, their eigenvectors, and the rates along them."""
    found = decompose(full)
    values = found.values
    floored = _floored(values, group, precision)
    smallest = floored[:, 0]
    condition = torch.where(smallest > 0, floored[:, -1] / smallest, torch.ones_like(smallest))
    rates = _rates(floored, group, step)
    if samples is None:
        samples = effective_samples(group["method"], float(group["betas"][1]), step)
    # Blocks that never had a gradient do not move, whatever their rate.
    alive = rates[values[:, -1] > 0]
    whole = full.double()
    spectrum = LayerSpectrum(
        name,
        full.shape[-1],
        step,
        values,
        condition,
        _off_diagonal(whole),
        independent_energy(whole, samples),
        float(alive.min()) if alive.numel() else math.nan,
        float(alive.max()) if alive.numel() else math.nan,
    )
    return spectrum, found.vectors, rates


def _stored(state: Mapping[str, Any]) -> Tensor | None:
    # AMSGrad's step uses the bound.
    return state.get("max_exp_avg_sq", state.get("exp_avg_sq"))


def spectrum(optimizer: BlockDiagonal) -> dict[str, LayerSpectrum]:
    """Look at the second moments of a live optimizer.

    Parameters
    ----------
    optimizer : after at least one step

    Returns
    -------
    Parameter name -> spectrum, in double precision on CPU. Diagonal tensors are there too, with blocks of one.

    Raises
    ------
    InputError
        For an optimizer of another package, or before the first step.

    Examples
    --------
    >>> layer = torch.nn.Linear(20, 4)
    >>> optimizer = BlockDiagonal(layer.parameters())
    >>> layer(torch.ones(8, 20)).square().mean().backward()
    >>> optimizer.step()
    >>> found = spectrum(optimizer)["0.0"]
    >>> found.n, bool(found.excess < 1e-3)
    (10, True)
    """
    found: dict[str, LayerSpectrum] = {}
    for name, layout, group, param in _tensors(optimizer):
        state = optimizer.state.get(param)
        moments = _stored(state) if state else None
        if state and moments is not None:
            step = int(state["step"])
            packed = _local(moments).detach().cpu()
            packed = packed.reshape(-1, 1) if layout.diagonal else untile(packed, layout)
            full = to_full(packed, layout.n)
            found[name] = _describe(name, full, group, step, torch.finfo(moments.dtype).eps)[0]
    if not found:
        raise InputError("the optimizer has no second moments yet: take at least one step before looking at them")
    return found


def spectrum_of_state(state_dict: Mapping[str, Any]) -> dict[str, LayerSpectrum]:
    """Look at the second moments in a saved state.

    Parameters
    ----------
    state_dict : from ``state_dict()`` of an optimizer of this package: groups with their settings, and
        ``exp_avg_sq`` as lower triangles (blocks, n (n + 1) / 2) or, of a diagonal tensor, in the tensor's own shape

    Returns
    -------
    Parameter name -> spectrum; without names, "group.place".

    Raises
    ------
    InputError
        If it is no such state.
    """
    try:
        groups, states = state_dict["param_groups"], state_dict["state"]
    except (KeyError, TypeError):
        raise InputError(
            "this is no optimizer state: it needs 'state' and 'param_groups', as state_dict() returns"
        ) from None
    found: dict[str, LayerSpectrum] = {}
    for number, group in enumerate(groups):
        if "block_size" not in group or "method" not in group:
            raise InputError(
                "the state is of another optimizer: its groups have no block_size; save one of this package's"
            )
        names = group.get("param_names")
        for place, key in enumerate(group["params"]):
            state = states.get(key)
            moments = _stored(state) if state else None
            if not state or moments is None:
                continue
            name = names[place] if names else f"{number}.{place}"
            own = None if group.get("blocks") is None else group["blocks"][place]
            full = _unpack(_local(moments).detach().cpu(), state, group, own, name)
            found[name] = _describe(name, full, group, int(state["step"]), torch.finfo(moments.dtype).eps)[0]
    if not found:
        raise InputError("the state holds no second moments: it was saved before the first step")
    return found


def _unpack(
    moments: Tensor, state: Mapping[str, Any], group: Mapping[str, Any], own: Tensor | None, name: str
) -> Tensor:
    shape = next((_local(state[key]).shape for key in ("exp_avg", "momentum_buffer") if key in state), None)
    if shape is not None:
        n = lay_out(shape, group["grouping"], group["block_size"], own, name).n
    elif moments.ndim != 2 or group["grouping"] == "diag" or (group["block_size"] == 1 and own is None):
        n = 1
    else:
        # Nothing else tells the tensor's shape; a diagonal tensor of two dimensions has its own.
        n = (math.isqrt(8 * moments.shape[1] + 1) - 1) // 2
        n = n if n * (n + 1) // 2 == moments.shape[1] else 1
    if n > 1 and (moments.ndim != 2 or moments.shape[1] != n * (n + 1) // 2):
        raise InputError(
            f"parameter '{name}': second moments of shape {tuple(moments.shape)} are no triangles of blocks of {n}; the"
            " state does not fit its own settings"
        )
    return to_full(moments, n) if n > 1 else moments.reshape(-1, 1, 1)


def _local(tensor: Tensor) -> Tensor:
    return cast("Any", tensor).to_local() if hasattr(tensor, "to_local") else tensor


def _tensors(optimizer: BlockDiagonal) -> list[tuple[str, Layout, dict[str, Any], Tensor]]:
    if not isinstance(optimizer, BlockDiagonal):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(f"{type(optimizer).__name__} has no blocks to look at; use an optimizer of this package")
    layouts = list(optimizer.layouts().items())
    params = [(group, param) for group in optimizer.param_groups for param in group["params"]]
    return [(name, layout, group, param) for (name, layout), (group, param) in zip(layouts, params, strict=True)]


@dataclass(frozen=True, eq=False)
class _Sample:
    """Blocks of a tensor that are looked at, and where their coordinates lie in it."""

    blocks: Tensor
    elements: Tensor
    there: Tensor


class Monitor:
    """Watch what blocks do while a model is trained, and say in the end whether they were worth it.

    Parameters
    ----------
    optimizer : of this package
    every : steps between two records

    Attributes
    ----------
    records : parameter name -> list of ``{"step", "condition", "off_diagonal", "excess", "oscillation", "low",
        "high"}``: median condition number and root mean square off-diagonal energy of blocks, the energy beyond what
        chance explains, the largest spectral norm of a block's change of alpha_t (V^{1/2} + eps I)^{-1} since the
        record before (None in the first), and the range of effective learning rates. From at most 64 blocks of each
        tensor, evenly spread; diagonal tensors have no records.

    Examples
    --------
    >>> layer = torch.nn.Linear(20, 4)
    >>> optimizer = BlockDiagonal(layer.parameters(), lr=1e-3)
    >>> monitor = Monitor.attach(optimizer, every=5)
    >>> for _ in range(10):
    ...     layer(torch.ones(8, 20)).square().mean().backward()
    ...     optimizer.step()
    >>> [record["step"] for record in monitor.records["0.0"]]
    [1, 5, 10]
    """

    def __init__(self, optimizer: BlockDiagonal, every: int = 10) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InputError(f"every must be an integer >= 1, got {every!r}")
        _tensors(optimizer)
        self.optimizer = optimizer
        self.every = every
        self.records: dict[str, list[dict[str, Any]]] = {}
        self._calls = 0
        self._sizes: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self._before: dict[str, Tensor] = {}
        self._samples: dict[str, _Sample] = {}
        self._handle: RemovableHandle | None = None

    @classmethod
    def attach(cls, optimizer: BlockDiagonal, every: int = 10) -> Monitor:
        """Make a monitor that the optimizer calls by itself after each step.

        Parameters
        ----------
        optimizer : of this package
        every : steps between two records

        Returns
        -------
        The monitor; :meth:`detach` ends it.
        """
        monitor = cls(optimizer, every)

        def after(*_: object) -> None:
            monitor()

        monitor._handle = optimizer.register_step_post_hook(after)
        return monitor

    def detach(self) -> None:
        """Stop watching; records stay."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    @torch.no_grad()
    def __call__(self) -> None:
        """Look at the optimizer: to be called after each step, before gradients are set to zero."""
        self._calls += 1
        due = self._calls == 1 or self._calls % self.every == 0
        for name, layout, group, param in _tensors(self.optimizer):
            state = self.optimizer.state.get(param)
            if layout.diagonal or not state or "exp_avg_sq" not in state:
                continue
            sample = self._sampled(name, layout)
            if param.grad is not None:
                flat = _local(param.grad).reshape(-1)
                self._weigh(name, flat[sample.elements.to(flat.device)] * sample.there.to(flat.device), group)
            if due:
                self._record(name, layout, group, state, sample.blocks)

    def _sampled(self, name: str, layout: Layout) -> _Sample:
        if name not in self._samples:
            most = max(min(_SAMPLE_BLOCKS, _SAMPLE_NUMBERS // layout.n**2, layout.blocks), 1)
            blocks = torch.linspace(0, layout.blocks - 1, most).round().long()
            self._samples[name] = _Sample(blocks, *_elements(layout, blocks))
        return self._samples[name]

    def _weigh(self, name: str, grad: Tensor, group: Mapping[str, Any]) -> None:
        # Gradients that shrink over time, or come in bursts, make the average rest on fewer of them than its decay
        # suggests: sum of weights w |g|² squared, over the sum of squares of the same.
        size = grad.double().square_().sum(1).cpu()
        total, squares, seen = self._sizes.get(
            name, (torch.zeros_like(size), torch.zeros_like(size), torch.zeros_like(size))
        )
        keep = float(group["betas"][1]) if group["method"] in {"adam", "rmsprop"} else 1.0
        self._sizes[name] = (keep * total + size, keep**2 * squares + size.square(), seen + 1)

    def _record(
        self, name: str, layout: Layout, group: Mapping[str, Any], state: Mapping[str, Any], places: Tensor
    ) -> None:
        moments = _stored(state)
        assert moments is not None
        step = int(state["step"])
        moments = _local(moments)
        chosen = places.to(moments.device)
        packed = moments[chosen // layout.width, :, chosen % layout.width].cpu()
        samples: float | Tensor = effective_samples(group["method"], float(group["betas"][1]), step)
        if name in self._sizes:
            total, squares, seen = self._sizes[name]
            # What came before the monitor is not known: only a full view may lower the number.
            if float(seen[0]) >= min(step, 0.5 * samples):
                counted = torch.where(squares > 0, total.square() / squares, torch.ones_like(total))
                samples = counted.clamp(min=1.0, max=samples)
        precision = torch.finfo(moments.dtype).eps
        found, vectors, rates = _describe(name, to_full(packed, layout.n), group, step, precision, samples)
        effective = (vectors * rates[:, None]) @ vectors.mT
        alive = found.eigenvalues[:, -1] > 0
        effective = torch.where(alive[:, None, None], effective, torch.zeros_like(effective))
        oscillation = None
        if name in self._before:
            # The matrices of a block that only now gets its first gradient did not change: they came into being.
            both = alive & (self._before[name].flatten(1).abs().amax(1) > 0)
            change = effective[both] - self._before[name][both]
            oscillation = float(torch.linalg.eigvalsh(change).abs().max()) if len(change) else None
        self._before[name] = effective
        some = bool(alive.any())
        self.records.setdefault(name, []).append(
            {
                "step": step,
                "condition": _median(found.condition[alive]) if some else None,
                "off_diagonal": _mean_square(found.off_diagonal[alive]) if some else None,
                "excess": _excess(found.off_diagonal[alive], found.expected[alive]),
                "oscillation": oscillation,
                "low": found.low if some else None,
                "high": found.high if some else None,
            }
        )

    def summary(self) -> str:
        """Say for each tensor what its blocks do, and for the model whether they are worth their time.

        Returns
        -------
        A line for each tensor with blocks, and a conclusion.
        """
        layouts = self.optimizer.layouts()
        if all(layout.diagonal for layout in layouts.values()):
            return "no tensor has blocks: this is the diagonal method"
        if not self.records:
            return "nothing recorded yet: call the monitor after each step, or attach it"
        lines: list[str] = []
        weight = {"nothing": 0, "some": 0, "clear": 0}
        for name, records in self.records.items():
            layout = layouts[name]
            verdict, text = _advice(records, layout.n, layout.kind)
            weight[verdict] += layout.numel
            lines.append(f"{name}: {text}")
        return "\n".join([*lines, _conclusion(weight)])

    def state_dict(self) -> dict[str, Any]:
        """Return what was recorded and what the next record needs, as plain values and tensors."""
        return {
            "every": self.every,
            "calls": self._calls,
            "records": {name: [dict(record) for record in records] for name, records in self.records.items()},
            "sizes": {name: list(parts) for name, parts in self._sizes.items()},
            "before": dict(self._before),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where another monitor of the same optimizer stopped.

        Parameters
        ----------
        state_dict : from :meth:`state_dict`

        Raises
        ------
        InputError
            If it has tensors that the optimizer does not have, or the wrong blocks.
        """
        missing = {"every", "calls", "records", "sizes", "before"} - set(state_dict)
        if missing:
            raise InputError(f"this is no state of a Monitor: it has no '{sorted(missing)[0]}'")
        layouts = self.optimizer.layouts()
        for name, matrices in state_dict["before"].items():
            if name not in layouts:
                raise InputError(f"the monitor's state has a tensor '{name}', the optimizer has not")
            expected = (len(self._sampled(name, layouts[name]).blocks), layouts[name].n, layouts[name].n)
            if tuple(matrices.shape) != expected:
                raise InputError(
                    f"the monitor's state of '{name}' has blocks {tuple(matrices.shape)}, expected {expected}"
                )
        self.every = int(state_dict["every"])
        self._calls = int(state_dict["calls"])
        self.records = {name: [dict(record) for record in records] for name, records in state_dict["records"].items()}
        self._sizes = {name: (parts[0], parts[1], parts[2]) for name, parts in state_dict["sizes"].items()}
        self._before = dict(state_dict["before"])


def _elements(layout: Layout, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return flat indices of blocks' coordinates (sample, n), and which are no padding."""
    if layout.index is not None:
        chosen = layout.index[blocks]
        return chosen.clamp(min=0), chosen >= 0
    within = (blocks % layout.chunks)[:, None] * layout.n + torch.arange(layout.n)
    there = within < layout.length
    flat = (blocks // layout.chunks)[:, None] * layout.line_stride + within * layout.stride
    return torch.where(there, flat, 0), there


def _recent(records: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """Median of the later half of the records."""
    values = [record[key] for record in records[len(records) // 2 :] if record[key] is not None]
    return statistics.median(values) if values else None


def _advice(records: Sequence[Mapping[str, Any]], n: int, kind: str) -> tuple[str, str]:
    excess, off, condition = (_recent(records, key) for key in ("excess", "off_diagonal", "condition"))
    if excess is None or off is None or condition is None:
        return "nothing", "no gradient has reached it"
    seen = f"condition {condition:.3g}, off-diagonal energy {off:.0%}, beyond chance {excess:.0%}"
    last = records[-1]
    if last["low"] and last["high"] and last["high"] < 1.02 * last["low"]:
        return "nothing", f"{seen}: the clip has closed, every step is SGD's"
    if excess < _NOTHING:
        return "nothing", f"{seen}: blocks of {n} do nothing Adam would not; use block_size=1"
    if excess < _CLEAR:
        other = {"output": "input", "input": "output"}.get(kind)
        way = f'; try grouping="{other}" or discover_groups' if other else ""
        return "some", f"{seen}: blocks of {n} do little{way}"
    larger = "" if kind in {"filter", "full", "row", "blocks"} else "; larger ones may do more"
    return "clear", f"{seen}: blocks of {n} see correlations that Adam cannot{larger}"


def _conclusion(weight: Mapping[str, int]) -> str:
    whole = max(sum(weight.values()), 1)
    share = weight["clear"] / whole
    if weight["clear"] + weight["some"] == 0:
        return (
            f"off-diagonal energy beyond chance is below {_NOTHING:.0%} everywhere: blocks do nothing for this model"
            " that Adam would not; use block_size=1, or let discover_groups look for other groups"
        )
    if share == 0:
        return "blocks do little for this model; compare with block_size=1 before paying for them"
    return f"blocks matter for {share:.0%} of the weights that have them; compare with block_size=1 to see how much"
