"""What to keep of a network, as an object and as a file (spec 2.11).

A plan holds the places of every channel, so that applying it needs no tracing: a file of it, the user's function that
makes the original network, and the small weights give the small network back in any process.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from shared_core.errors import no_such
from shared_core.objects import one_line
from shared_core.runs import atomic_path
from stamp._files import (
    MOST_CHANNELS,
    VERSION,
    PlanError,
    kept_channels,
    read_plan,
    read_weights,
    save_weights,
)
from stamp.axes import axis_length, axis_places
from stamp.examples import as_examples
from stamp.networks import factory as named_factory
from stamp.structure import ChannelGroups, Group, GroupsError, Slot
from stamp.surgery import Masked, cut, gated_parameters, restrict
from stamp.training import HeadError, head_name, recalibrate_bn, with_head

__all__ = ["PlanError", "PrunePlan", "SurgeryError", "load", "save_weights"]

Fold = Literal["hard", "soft"]

_MISFITS = (AttributeError, TypeError, ValueError, IndexError, KeyError, RuntimeError)


class SurgeryError(RuntimeError):
    """A small network that does not compute what the large one does with its channels switched off."""


@dataclass(frozen=True, eq=False)
class PrunePlan:
    """Which channels of a network stay, and how that was decided.

    Parameters
    ----------
    keep : by name of group, which of its channels stay; a group left out stays whole
    groups : all groups of the network
    method : that chose
    budget : what was asked for, e.g. ``{"macs": 0.25}``
    ratios : what was reached, as shares of the whole network's
    scores : of each channel by group, that the choice went by
    head : qualified name of the classifier's last layer. Default: its last linear layer
    gates : by name of group, a number a channel that `fold` may multiply in
    seconds : that the choice took
    notes : what a reader should know, a line each

    Raises
    ------
    PlanError
        For masks, scores or gates that do not fit the groups.

    Examples
    --------
    >>> from stamp.groups import trace
    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    >>> plan = PrunePlan({"0": torch.tensor([True, False, True, False])}, trace(net, torch.rand(1, 3, 8, 8)))
    >>> small = plan.apply(net, num_classes=5)
    >>> small[0], small[-1], plan.check(net, small, torch.rand(2, 3, 8, 8)) < 1e-5
    (Conv2d(3, 2, kernel_size=(3, 3), stride=(1, 1)), Linear(in_features=2, out_features=5, bias=True), True)
    """

    keep: Mapping[str, Bool[Tensor, " width"]]
    groups: ChannelGroups
    method: str = ""
    budget: Mapping[str, Any] = field(default_factory=dict[str, Any])
    ratios: Mapping[str, float] = field(default_factory=dict[str, float])
    scores: Mapping[str, Float[Tensor, " scored"]] = field(default_factory=dict[str, Tensor])
    head: str | None = None
    gates: Mapping[str, Float[Tensor, " gated"]] | None = None
    seconds: float = 0.0
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        for what, values in (("keep", self.keep), ("scores", self.scores), ("gates", self.gates or {})):
            for name, value in values.items():
                if name not in self.groups:
                    raise PlanError(str(no_such("group", name, self.groups, where=what)))
                group = self.groups[name]
                if value.shape != (group.width,) or (value.dtype == torch.bool) != (what == "keep"):
                    kind = "booleans" if what == "keep" else "floats"
                    raise PlanError(
                        f"{what}['{name}']: {value.dtype} of shape {tuple(value.shape)}, expected {group.width} {kind},"
                        " one a channel"
                    )
                if what == "keep" and not bool(value.any()):
                    raise PlanError(f"keep['{name}']: none of {group.width} channels stays; keep at least one")
                if group.frozen is not None and (what == "gates" or (what == "keep" and not bool(value.all()))):
                    raise PlanError(f"{what}['{name}']: the group is frozen ({group.frozen}); leave it out")

    def widths(self) -> dict[str, int]:
        """Return how many channels stay of each group that is not frozen."""
        return {name: self._kept(name, width) for name, width in self.groups.widths().items()}

    def apply(
        self,
        model: nn.Module,
        num_classes: int | None = None,
        data: object = None,
        *,
        fold: Fold = "hard",
        recalibrate: bool = False,
    ) -> nn.Module:
        """Cut a copy of the network.

        Parameters
        ----------
        model : of the architecture that the plan is for; only its head may have another number of outputs
        num_classes : give the copy a fresh head for so many classes
        data : give it a head of the class means of these, in evaluation mode, instead; what `as_examples` takes
        fold : ``soft`` multiplies the gates into the weights that consume their channels, but for a head that is
            replaced; ``hard`` leaves weights as they are
        recalibrate : replace the statistics of batch norms by those of the data, before the head is made of them. A
            head of class means is useless once the statistics below it are others; `check` is for a network before that

        Returns
        -------
        The small network, on the model's device.

        Raises
        ------
        PlanError
            For a model of other modules or widths, or ``soft`` without gates.
        HeadError, DataError
            When the head cannot be replaced.
        """
        self._check_fits(model)
        examples = None if data is None else as_examples(data)
        if examples is not None and num_classes not in (None, examples.num_classes):
            raise PlanError(
                f"num_classes: {num_classes}, and the data have {examples.num_classes} classes; leave it out"
            )
        if recalibrate and examples is None:
            raise PlanError("recalibrate: needs data, whose statistics are taken")
        gates = self._gates(fold)
        small = copy.deepcopy(model)
        try:
            with torch.no_grad():
                for name, value in gated_parameters(model, self.groups, gates).items():
                    small.get_parameter(name).copy_(value)
            cut(small, self.groups, self.keep, inplace=True)
        except _MISFITS as error:
            raise PlanError(f"the plan does not fit this {type(model).__name__}: {one_line(error)}") from error
        if examples is None and num_classes is None:
            return small
        if examples is not None:
            small = recalibrate_bn(small, examples) if recalibrate else small
            return with_head(small, examples, head=self.head, inplace=True)
        return with_head(small, cast("int", num_classes), kind="fresh", head=self.head, inplace=True)

    def check(self, model: nn.Module, small: nn.Module, x: Tensor | Sequence[Tensor], *, fold: Fold = "hard") -> float:
        """Assert that the small network computes what the model does with its channels switched off.

        Compared are the outputs, or what enters the head where that was replaced, in evaluation mode.

        Parameters
        ----------
        model : that the plan was applied to
        small : what that gave, not trained since
        x : a batch, or the tensors of several inputs
        fold : as in `apply`

        Returns
        -------
        The largest difference.

        Raises
        ------
        SurgeryError
            For more than ``1e-10 * (1 + max|f|)`` in float64, or ``1e-5 * (1 + max|f|)`` in float32.
        """
        inputs = (x,) if isinstance(x, Tensor) else tuple(x)
        reference = Masked(model, self.groups, self._whole_gates(fold))
        head = self._replaced_head(model, small, fold)
        with torch.no_grad(), _exact(model, small):
            wanted = _entering(reference, model, head, inputs)
            found = _entering(small, small, head, inputs)
        if head is not None:
            wanted = [part.index_select(-1, self._kept_features(model, head).to(part.device)) for part in wanted]
        if len(wanted) != len(found) or any(a.shape != b.shape for a, b in zip(wanted, found, strict=True)):
            shapes = [[tuple(a.shape) for a in part] for part in (found, wanted)]
            raise SurgeryError(f"the small network gives shapes {shapes[0]}, and the masked one {shapes[1]}")
        difference, largest = 0.0, 0.0
        for a, b in zip(wanted, found, strict=True):
            difference = max(difference, float((a - b).abs().max()))
            largest = max(largest, float(a.abs().max()))
        tolerance = {torch.float64: 1e-10, torch.float32: 1e-5}.get(wanted[0].dtype, 0.02) * (1 + largest)
        if not difference <= tolerance:
            raise SurgeryError(
                f"the small network differs from the masked one by {difference:.3g}, more than {tolerance:.3g}; check"
                " it before it is trained, and with the fold that it was cut with"
            )
        return difference

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, a line a group, atomically.

        Parameters
        ----------
        path : to write

        Raises
        ------
        InputError
            When it cannot be written.
        """
        head = {
            "format": "stamp-plan",
            "version": VERSION,
            "backbone": self.groups.signature(),
            "method": self.method,
            "budget": dict(self.budget),
            "ratios": dict(self.ratios),
            "head": self.head,
            "seconds": self.seconds,
            "notes": list(self.notes),
        }
        lines = [json.dumps(self._record(group), allow_nan=False) for group in self.groups.groups]
        opened = json.dumps(head, indent=2, allow_nan=False).removesuffix("\n}")
        listed = ",\n    ".join(lines)
        with atomic_path(path) as temporary:
            temporary.write_text(f'{opened},\n  "groups": [\n    {listed}\n  ]\n}}\n', encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> PrunePlan:
        """Read what `save` wrote.

        Parameters
        ----------
        path : of the file

        Raises
        ------
        PlanError
            For a file that is absent, damaged, of another kind or made by a newer version.
        """
        path = Path(path)
        content = read_plan(path)
        if sum(group.width for group in content.groups) > MOST_CHANNELS:
            raise PlanError(f"{path}: its groups have more than {MOST_CHANNELS:,} channels; it is damaged")
        keep: dict[str, Tensor] = {}
        values: dict[str, dict[str, Tensor]] = {"scores": {}, "gates": {}}
        for place, group in enumerate(content.groups):
            if group.keep is not None:
                keep[group.name] = kept_channels(group.keep, group.width, f"{path}: groups[{place}] ('{group.name}')")
            for what, found in (("scores", group.scores), ("gates", group.gates)):
                if found is not None:
                    values[what][group.name] = torch.tensor([float(value) for value in found], dtype=torch.float64)
        try:
            groups = ChannelGroups(tuple(group.group() for group in content.groups))
            plan = PrunePlan(
                keep=keep,
                groups=groups,
                method=content.method,
                budget=content.budget,
                ratios=content.ratios,
                scores=values["scores"],
                head=content.head,
                gates=values["gates"] or None,
                seconds=content.seconds,
                notes=tuple(content.notes),
            )
        except (GroupsError, PlanError) as error:
            raise PlanError(f"{path}: {error}") from error
        if groups.signature() != content.backbone:
            raise PlanError(
                f"{path}: its groups were changed after it was written ('backbone' is another); make it anew"
            )
        return plan

    def table(self) -> str:
        """Return a table with a line a group: how many channels stay, and the scores of those that stay and go."""
        head = ("group", "width", "kept", "share", "score kept", "score cut")
        rows: list[tuple[str, ...]] = [head]
        for group in self.groups.groups:
            if group.frozen is not None:
                rows.append((group.name, str(group.width), "all", "frozen", "", ""))
                continue
            kept = self._kept(group.name, group.width)
            rows.append((group.name, str(group.width), str(kept), f"{kept / group.width:.0%}", *self._means(group)))
        widest = [max(len(row[k]) for row in rows) for k in range(len(head))]
        lines = [
            "  ".join(cell.rjust(size) if k else cell.ljust(size) for k, (cell, size) in enumerate(pairs)).rstrip()
            for pairs in (zip(row, widest, strict=True) for row in rows)
        ]
        lines.insert(1, "  ".join("-" * size for size in widest))
        budget = ", ".join(f"{name} {value}" for name, value in self.budget.items() if value is not None)
        ratios = ", ".join(f"{name} {value:.3g}" for name, value in self.ratios.items())
        title = f"{self.method or 'plan'}{f' for {budget}' if budget else ''}{f': {ratios}' if ratios else ''}"
        return "\n".join([title, *lines, *self.notes])

    def __str__(self) -> str:
        """Write the table."""
        return self.table()

    def _kept(self, name: str, width: int) -> int:
        return int(self.keep[name].sum()) if name in self.keep else width

    def _means(self, group: Group) -> tuple[str, str]:
        scores = self.scores.get(group.name)
        if scores is None:
            return "", ""
        mask = self.keep.get(group.name, torch.ones(group.width, dtype=torch.bool)).to(scores.device)
        return f"{float(scores[mask].mean()):.3g}", "" if bool(mask.all()) else f"{float(scores[~mask].mean()):.3g}"

    def _record(self, group: Group) -> dict[str, Any]:
        found: dict[str, Any] = {"name": group.name, "width": group.width}
        if group.name in self.keep:
            found["keep"] = self.keep[group.name].nonzero().flatten().tolist()
        if group.frozen is not None:
            found["frozen"] = group.frozen
        for kind in ("producers", "consumers", "followers"):
            slots: tuple[Slot, ...] = getattr(group, kind)
            if slots:
                found[kind] = [[s.module, s.axis, s.offset, s.block, s.start, s.count] for s in slots]
        if group.attributes:
            found["attributes"] = [[a.module, a.name, a.unit] for a in group.attributes]
        for what, values in (("scores", self.scores), ("gates", self.gates or {})):
            if group.name in values:
                numbers = values[group.name].detach().to("cpu", torch.float64).tolist()
                found[what] = [number if math.isfinite(number) else str(number) for number in numbers]
        return found

    def _gates(self, fold: Fold) -> dict[str, Tensor]:
        if fold == "hard":
            return {}
        if fold != "soft":
            raise PlanError(f"fold: must be hard or soft, got '{fold}'")
        if not self.gates:
            raise PlanError(f"fold: this plan ({self.method or 'by hand'}) has no gates to fold; take 'hard'")
        return dict(self.gates)

    def _whole_gates(self, fold: Fold) -> dict[str, Tensor]:
        """Return the gates of the large network that give the small one's outputs."""
        whole = {
            name: mask.to("cpu", torch.float64) for name, mask in self.keep.items() if self.groups[name].frozen is None
        }
        for name, gate in self._gates(fold).items():
            own = gate.detach().to("cpu", torch.float64)
            whole[name] = own * whole[name] if name in whole else own
        return whole

    def _kept_features(self, model: nn.Module, head: str) -> Int64[Tensor, " kept"]:
        name = f"{head}.weight" if head else "weight"
        weight = model.get_parameter(name)
        columns = torch.arange(weight.shape[1]).expand(weight.shape)
        return restrict(model, self.groups, self.keep, {name: columns})[name][0]

    def _check_fits(self, model: nn.Module) -> None:
        """Compare every axis that is to be cut with the places that the plan knows on it."""
        modules, parameters = dict(model.named_modules()), dict(model.named_parameters(remove_duplicate=False))
        buffers = dict(model.named_buffers())
        axes: dict[tuple[str, str], list[Slot]] = {}
        for group in self.groups.groups:
            for slot in dict.fromkeys(group.slots):
                axes.setdefault((slot.module, slot.axis), []).append(slot)
        touched = {*self.keep, *(self.gates or {})}
        cut_axes = {(slot.module, slot.axis) for name in touched for slot in self.groups[name].slots}
        for (module, axis), slots in axes.items():
            if (module, axis) not in cut_axes or axis.startswith("rows"):
                continue
            kind = type(model).__name__
            if axis.startswith("dim"):
                tensor = parameters.get(module, buffers.get(module))
                dim = int(axis[3:]) if axis[3:].isdigit() else 0
                length = tensor.shape[dim] if tensor is not None and dim < tensor.dim() else None
            else:
                length = _length(modules.get(module), axis)
            if length is None:
                raise PlanError(
                    f"the plan cuts '{module}' ({axis}), which this {kind} has not; it is of another network"
                )
            end = _end(slots)
            if length < end or (length > end and _covers(slots, end)):
                raise PlanError(
                    f"plan applied to a model of other widths: '{module}' has {length} entries ({axis}), and the plan"
                    f" is for {end}"
                )
        for name in self.keep:
            for attribute in self.groups[name].attributes:
                value = getattr(modules.get(attribute.module), attribute.name, None)
                wanted = attribute.unit * self.groups[name].width
                if type(value) is not int or value != wanted:
                    raise PlanError(
                        f"plan applied to a model of other widths: '{attribute.module}.{attribute.name}' is {value},"
                        f" and the plan is for {wanted}"
                    )

    def _replaced_head(self, model: nn.Module, small: nn.Module, fold: Fold) -> str | None:
        """Return the name of the head when it is not what cutting the model gives."""
        try:
            head = head_name(small) if self.head is None else self.head
            own = {name: value for name, value in small.named_parameters() if name.rpartition(".")[0] == head}
        except HeadError:
            return None
        prefix = f"{head}." if head else ""
        before = {name: value.detach() for name, value in model.named_parameters() if name.startswith(prefix)}
        if self._gates(fold):
            gated = gated_parameters(model, self.groups, self._gates(fold))
            before |= {name: value for name, value in gated.items() if name in before}
        expected = restrict(model, self.groups, self.keep, before)
        kept = all(
            name in expected and value.shape == expected[name].shape and torch.equal(value, expected[name])
            for name, value in own.items()
        )
        return None if kept else head


def load(
    factory: Callable[..., nn.Module] | str, plan_path: str | Path, weights_path: str | Path, **options: Any
) -> nn.Module:
    """Make the small network again: the original architecture, cut by the plan, with the small weights.

    Parameters
    ----------
    factory : makes the original network, or its name as `stamp.networks.factory` takes it
    plan_path : what `PrunePlan.save` wrote
    weights_path : what `save_weights` wrote
    options : for the factory

    Returns
    -------
    The network, on the CPU unless the factory puts it elsewhere, in the mode in which the factory makes it.

    Raises
    ------
    PlanError
        For damaged files, or files that do not go together.
    """
    plan = PrunePlan.load(plan_path)
    weights = read_weights(Path(weights_path))
    made = (named_factory(factory) if isinstance(factory, str) else factory)(**options)
    small = plan.apply(made)
    floats = [value.dtype for value in weights.values() if value.is_floating_point()]
    if floats:
        small = small.to(floats[0])
    small = _fit_head(small, plan.head, weights)
    expected = small.state_dict()
    for name in {**expected, **weights}:
        if name not in weights:
            raise PlanError(
                f"{weights_path}: has no '{name}', and the network has; weights and plan must be of one network"
            )
        if name not in expected:
            raise PlanError(
                f"{weights_path}: has '{name}', and the network has not; weights and plan must be of one network"
            )
        if weights[name].shape != expected[name].shape:
            raise PlanError(
                f"{weights_path}: '{name}' has shape {tuple(weights[name].shape)}, and the plan gives"
                f" {tuple(expected[name].shape)}; weights and plan must be of one network"
            )
    small.load_state_dict(weights)
    return small


def _fit_head(small: nn.Module, head: str | None, weights: Mapping[str, Tensor]) -> nn.Module:
    """Give the network a head of the shape that the weights have, when only the number of outputs differs."""
    try:
        name = head_name(small) if head is None else head
        old = small.get_submodule(name)
    except (HeadError, AttributeError):
        return small
    prefix = f"{name}." if name else ""
    weight = weights.get(f"{prefix}weight")
    if not isinstance(old, nn.Linear) or weight is None or weight.dim() != 2:
        return small
    has_bias = f"{prefix}bias" in weights
    same = weight.shape[0] == old.out_features and has_bias == (old.bias is not None)  # pyright: ignore[reportUnnecessaryComparison]
    if same or weight.shape[1] != old.in_features:
        return small
    small = with_head(small, weight.shape[0], kind="fresh", head=name, inplace=True)
    if not has_bias:
        cast("nn.Linear", small.get_submodule(name)).register_parameter("bias", None)
    return small


def _length(module: nn.Module | None, axis: str) -> int | None:
    """Return the entries of an axis, or None for a module that has no such axis."""
    if module is None:
        return None
    try:
        axis_places(module, axis)
        return axis_length(module, axis)
    except _MISFITS:
        return None


def _end(slots: Sequence[Slot]) -> int:
    return max(slot.offset + slot.block * slot.count for slot in slots)


def _covers(slots: Sequence[Slot], end: int) -> bool:
    """Whether the places leave no gap from the start of the axis to the end."""
    at = 0
    for slot in sorted(slots, key=lambda slot: slot.offset):
        if slot.offset > at:
            return False
        at = max(at, slot.offset + slot.block * slot.count)
    return at == end


@contextmanager
def _exact(*models: nn.Module) -> Generator[None]:
    """Evaluate without dropout, and without the short mantissas that some GPUs use for float32."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    short = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        for model in models:
            model.eval()
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = short
        for module, training in modes:
            module.training = training


def _entering(run: nn.Module, owner: nn.Module, head: str | None, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Return the outputs, or what enters the head."""
    if head is None:
        return _tensors(run(*inputs))
    found: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(args[0])

    handle = owner.get_submodule(head).register_forward_pre_hook(note)
    try:
        run(*inputs)
    finally:
        handle.remove()
    return found


def _tensors(output: object) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
