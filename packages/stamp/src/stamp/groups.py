"""Channel groups of a network, found by tracing it (spec 2.2).

Channels whose tensors are added or multiplied belong together; a depthwise convolution ties what enters it to what
leaves it; flattening gives each channel a block of columns; concatenations, also nested ones, keep track of where each
channel went.
What cannot be removed exactly is frozen, with the reason.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from stamp.labels import Axis, Labeller, Reshaped
from stamp.structure import Attribute, ChannelGroups, Group, GroupsError, Slot
from stamp.surgery import Masked, cut

__all__ = ["Attribute", "ChannelGroups", "Group", "GroupsError", "Slot", "TraceError", "trace"]

HEAD_COUNTS = ("num_heads", "n_heads", "n_head", "nhead", "heads", "num_attention_heads")
HEAD_TOTALS = ("all_head_size", "inner_dim", "attn_dim", "attention_dim", "total_head_dim")
EMBEDDINGS = ("embed_dim", "dim", "hidden_size", "d_model", "width", "emb_dim")


class TraceError(RuntimeError):
    """A network that `torch.fx` cannot follow; the message names the module and the ways out."""


def trace(model: nn.Module, example_input: Tensor | Sequence[Tensor], *, opaque: Collection[str] = ()) -> ChannelGroups:
    """Find the channels of a network that must be kept or removed together.

    A copy of the network is traced in eval mode and followed once on the example, on the CPU; its layers compute
    nothing, so that large images cost hardly more than small ones. A group whose channels pass through a reshape that
    could write sizes out (``x.view(-1, 400)``, a split, attention heads made by hand) is cut on trial, and frozen if
    the result differs.

    Parameters
    ----------
    model : of convolutions, linear layers, norms, attention and what lies between them
    example_input : a batch of any size, or the tensors of several inputs
    opaque : names of modules not to look into; what touches them is frozen

    Returns
    -------
    All groups, in the order in which the network computes them, the frozen ones included.

    Raises
    ------
    TraceError
        If the forward pass depends on values, or fails on the example.

    Notes
    -----
    Removal is exact, not approximate: channels that a LayerNorm averages over are frozen, those of a GroupNorm go in
    whole groups, those of a grouped convolution too.

    Examples
    --------
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    >>> trace(net, torch.rand(1, 3, 8, 8)).widths()
    {'0': 8}
    """
    inputs = tuple(x.cpu() for x in ((example_input,) if isinstance(example_input, Tensor) else example_input))
    # Its weights are only read: the copy has parameters of its own over the same numbers.
    shared = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in model.parameters() if type(p) is nn.Parameter}
    copied = copy.deepcopy(model, shared).cpu().eval()
    known = [name for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())]
    labeller = Labeller(_traced(copied, inputs, opaque), frozenset(known))
    try:
        with torch.no_grad():
            labeller.run(*inputs)
    except Exception as error:
        raise TraceError(
            f"the model was traced but failed on the example of shapes {[tuple(x.shape) for x in inputs]}: {error}\n"
            f"Check the shape of example_input; {_WAY_OUT}"
        ) from error
    groups, touched = _grouped(labeller)
    return _tried(copied, inputs, groups, touched)


_WAY_OUT = (
    "or make a ChannelGroups by hand and give it as groups=, or name the module in opaque= to freeze what touches it."
)


class _Tracer(fx.Tracer):
    """A tracer that knows in which module it is when something fails, and takes some modules as they are."""

    # Buffers are sliced by sizes in many a forward pass.
    proxy_buffer_attributes = True

    def __init__(self, opaque: Collection[str], answers: Iterable[bool]) -> None:
        super().__init__()
        self.answers = iter(answers)
        self.opaque = frozenset(opaque)
        self.inside = [""]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Take torch's own modules, parametrized ones and the opaque ones as leaves."""
        return module_qualified_name in self.opaque or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Note the module while its forward pass is traced."""
        self.inside.append(self.path_of_module(m))
        result = super().call_module(m, forward, args, kwargs)
        self.inside.pop()
        return result

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Decide a branch that depends on nothing but sizes, or an assertion about them, as the example does.

        Whatever asks for sizes is tried out later.
        """
        if not _only_sizes(obj.node):
            return super().to_bool(obj)
        answer = next(self.answers, None)
        if answer is None:
            raise _UndecidedError(obj.node)
        return answer


class _UndecidedError(Exception):
    """A branch on sizes, whose node has to be run on the example before the trace can go on."""

    def __init__(self, node: fx.Node) -> None:
        super().__init__(f"{node} is undecided")
        self.node = node


def _decided(model: nn.Module, inputs: tuple[Tensor, ...], tracer: _Tracer, node: fx.Node) -> bool:
    tracer.graph.output(node)
    with torch.no_grad():
        return bool(fx.Interpreter(fx.GraphModule(model, tracer.graph)).run(*inputs))


def _only_sizes(node: fx.Node) -> bool:
    if node.op == "call_method" and node.target in {"size", "dim", "ndimension", "numel", "is_floating_point"}:
        return True
    if node.target is getattr and node.args[1] in {"shape", "ndim", "dtype", "device"}:
        return True
    inputs = node.all_input_nodes
    return node.op.startswith("call_f") and bool(inputs) and all(map(_only_sizes, inputs))


def _traced(model: nn.Module, inputs: tuple[Tensor, ...], opaque: Collection[str]) -> fx.GraphModule:
    unknown = sorted(set(opaque) - {name for name, _ in model.named_modules()})
    if unknown:
        raise TraceError(f"opaque={unknown} names no module of the model")
    if type(model).__module__.startswith("torch.nn") and not isinstance(model, nn.Sequential):
        model = nn.Sequential(model)
    answers: list[bool] = []
    tracer = _Tracer(opaque, answers)
    plain: dict[type[nn.Module], type[nn.Module]] = {
        nn.TransformerEncoderLayer: _PlainLayer,
        nn.TransformerEncoder: _PlainEncoder,
    }
    encoders = [module for module in model.modules() if type(module) in plain]
    try:
        for module in encoders:
            module.__class__ = plain[type(module)]
        while True:
            try:
                return fx.GraphModule(model, tracer.trace(model))
            except _UndecidedError as question:
                answers.append(_decided(model, inputs, tracer, question.node))
                tracer = _Tracer(opaque, answers)
    except Exception as error:
        name = tracer.inside[-1]
        kind = type(model.get_submodule(name)).__name__
        where = f"module {name!r} ({kind})" if name else f"the model's own forward ({kind})"
        raise TraceError(
            f"torch.fx cannot trace {where}: {error}\nMake its forward pass independent of values, {_WAY_OUT}"
        ) from error
    finally:
        for module in encoders:
            module.__class__ = type(module).__base__ or nn.Module


class _PlainLayer(nn.TransformerEncoderLayer):
    """The layer without the shortcuts, which ask for values, that its own forward pass takes."""

    def forward(
        self,
        src: Any,
        src_mask: Any = None,
        src_key_padding_mask: Any = None,
        is_causal: bool = False,
    ) -> Any:
        """Attend and transform."""
        masks = src_mask, src_key_padding_mask
        if self.norm_first:
            x = src + self._sa_block(self.norm1(src), *masks, is_causal=is_causal)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(src + self._sa_block(src, *masks, is_causal=is_causal))
        return self.norm2(x + self._ff_block(x))


class _PlainEncoder(nn.TransformerEncoder):
    """The stack of layers, likewise."""

    def forward(
        self,
        src: Any,
        mask: Any = None,
        src_key_padding_mask: Any = None,
        is_causal: bool | None = None,
    ) -> Any:
        """Apply one layer after another."""
        for layer in self.layers:
            src = layer(src, src_mask=mask, src_key_padding_mask=src_key_padding_mask, is_causal=bool(is_causal))
        return src if self.norm is None else self.norm(src)


def _grouped(labeller: Labeller) -> tuple[list[Group], dict[str, list[Reshaped]]]:
    """Turn channels, as labels that share a fate, into groups: those computed by the same modules."""
    channel, reasons = labeller.elements.resolve()
    axes = {key: Axis(axis.role, channel[axis.labels]) for key, axis in labeller.axes.items()}
    produced = [axis.labels.numpy() for axis in axes.values() if axis.role == "producer"]
    _freeze_odd_tensors(labeller, channel, produced, reasons)
    axes |= _bare_axes(labeller, channel)

    total = labeller.elements.count
    frozen = np.zeros(total, np.bool_)
    frozen[list(reasons)] = True
    group, index = _members(produced, frozen)
    widths = np.bincount(group[group >= 0]).tolist()

    slots: list[dict[str, list[Slot]]] = [{"producer": [], "consumer": [], "follower": []} for _ in widths]
    for (module, axis), found in axes.items():
        own = found.labels.numpy()
        for g, slot in _runs(module, axis, group[own], index[own]):
            slots[g][found.role].append(slot)
            if axis == "inner":
                slots[g]["consumer"].append(slot)

    whys: list[dict[str, None]] = [{} for _ in widths]
    for c, why in reasons.items():
        if group[c] >= 0:
            whys[group[c]].update(dict.fromkeys(why))
    passed: list[list[Reshaped]] = [[] for _ in widths]
    for found in labeller.reshapes:
        for g in np.unique(group[channel[found.labels].unique().numpy()]).tolist():
            if g >= 0:
                passed[g].append(found)

    groups: list[Group] = []
    touched: dict[str, list[Reshaped]] = {}
    names: dict[str, int] = {}
    for width, places, because, through in zip(widths, slots, whys, passed, strict=True):
        first = places["producer"][0].module
        if places["producer"][0].axis == "inner":
            first = f"{first}.heads"
        names[first] = names.get(first, 0) + 1
        name = first if names[first] == 1 else f"{first}#{names[first]}"
        why = "; ".join(because) or None
        if why is None and width == 1:
            why = "has one channel only, or all are tied to each other"
        if why is None and not places["consumer"]:
            why = "no convolution or linear layer consumes it"
        producers, consumers, followers = (tuple(places[role]) for role in ("producer", "consumer", "follower"))
        groups.append(Group(name, width, producers, consumers, followers, why))
        if through and why is None:
            touched[name] = through
    return groups, touched


def _members(
    produced: list[NDArray[np.int64]], frozen: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the group of each channel, -1 for none, and its place in it: both in order of first appearance.

    Channels of a group are produced by the same axes, and all are frozen or none is.
    """
    kind = frozen.astype(np.int64)
    kinds = 2
    for labels in produced:
        own = np.unique(labels)
        before, inverse = np.unique(kind[own], return_inverse=True)
        kind[own] = kinds + inverse
        kinds += len(before)
    group = np.full(len(frozen), -1)
    index = np.full(len(frozen), -1)
    if not produced:
        return group, index
    every, first = np.unique(np.concatenate(produced), return_index=True)
    ordered = every[np.argsort(first)]
    _, seen, inverse, counts = np.unique(kind[ordered], return_index=True, return_inverse=True, return_counts=True)
    rank = np.argsort(np.argsort(seen))
    group[ordered] = rank[inverse]
    by_group = np.argsort(group[ordered], kind="stable")
    counts = counts[np.argsort(seen)]
    index[ordered[by_group]] = np.arange(len(ordered)) - np.repeat(np.cumsum(counts) - counts, counts)
    return group, index


def _freeze_odd_tensors(
    labeller: Labeller, channel: Tensor, produced: list[NDArray[np.int64]], reasons: dict[int, list[str]]
) -> None:
    """Freeze channels tied to a bare parameter whose entries they do not own along one axis."""
    for name, labels in labeller.tensors.items():
        found = channel[labels]
        if len(_axes_of(found)) != 1:
            for c in np.intersect1d(found.numpy(), np.concatenate(produced or [np.zeros(0, np.int64)])).tolist():
                reasons.setdefault(c, []).append(f"parameter {name!r} has no axis of its own for it")


def _bare_axes(labeller: Labeller, channel: Tensor) -> dict[tuple[str, str], Axis]:
    axes: dict[tuple[str, str], Axis] = {}
    for name, labels in labeller.tensors.items():
        found = channel[labels]
        vary = _axes_of(found)
        if len(vary) == 1:
            at = tuple(slice(None) if k == vary[0] else 0 for k in range(found.dim()))
            axes[name, f"dim{vary[0]}"] = Axis("follower", found[at])
    return axes


def _axes_of(x: Int64[Tensor, "..."]) -> list[int]:
    return [k for k in range(x.dim()) if bool((x != x.narrow(k, 0, 1)).any())]


def _runs(module: str, axis: str, group: NDArray[np.int64], index: NDArray[np.int64]) -> Iterator[tuple[int, Slot]]:
    """Write an axis, given as the group (-1 for none) and channel of each entry, as slots."""
    breaks = (group[1:] != group[:-1]) | (index[1:] != index[:-1]) | (group[1:] < 0)
    position = np.flatnonzero(np.concatenate([[True], breaks]))
    block = np.diff(position, append=len(group))
    g, k = group[position], index[position]
    joined = (g[1:] == g[:-1]) & (block[1:] == block[:-1]) & (k[1:] == k[:-1] + 1) & (g[1:] >= 0)
    start = np.flatnonzero(np.concatenate([[True], ~joined]))
    count = np.diff(start, append=len(position))
    columns = (g[start], position[start], block[start], k[start], count)
    for owner, *place in zip(*(column.tolist() for column in columns), strict=True):
        if owner >= 0:
            yield owner, Slot(module, axis, *place)


def _tried(
    model: nn.Module, inputs: tuple[Tensor, ...], groups: list[Group], touched: dict[str, list[Reshaped]]
) -> ChannelGroups:
    """Freeze the groups that do not survive a trial, and say which numbers of modules must follow the others."""
    if not touched:
        return ChannelGroups(tuple(groups))
    model = _randomised(model)
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    options = {group.name: _attributes(model, group, touched[group.name]) for group in groups if group.name in touched}

    def built(choice: dict[str, tuple[Attribute, ...]]) -> ChannelGroups:
        return ChannelGroups(tuple(replace(g, attributes=choice.get(g.name, ())) for g in groups))

    first = {name: ways[0] for name, ways in options.items()}
    if _survives(model, inputs, built(first), list(touched)):
        return built(first)
    chosen: dict[str, tuple[Attribute, ...]] = {}
    failed: set[str] = set()
    for name, ways in options.items():
        works = next((way for way in ways if _survives(model, inputs, built({name: way}), [name])), None)
        if works is None:
            failed.add(name)
        else:
            chosen[name] = works
    return ChannelGroups(
        tuple(
            replace(
                group,
                frozen="the forward pass writes sizes out in "
                + ", ".join(
                    dict.fromkeys(
                        f"{found.operation!r} of {found.owner or 'the model'!r}" for found in touched[group.name]
                    )
                ),
            )
            if group.name in failed
            else replace(group, attributes=chosen.get(group.name, ()))
            for group in groups
        )
    )


def _attributes(model: nn.Module, group: Group, passed: list[Reshaped]) -> list[tuple[Attribute, ...]]:
    """Guess which numbers of the modules that reshape the group count its channels; the trial decides."""
    blocks = {slot.block for slot in group.slots if slot.block > 1}
    counts: list[Attribute] = []
    dims: list[Attribute] = []
    for owner in dict.fromkeys(found.owner for found in passed):
        module = model.get_submodule(owner)
        for attributes, names, units in (
            (counts, HEAD_COUNTS, {1}),
            (counts, HEAD_TOTALS, blocks),
            (dims, EMBEDDINGS, blocks),
        ):
            attributes.extend(
                Attribute(owner, name, unit)
                for name in names
                for unit in sorted(units)
                if type(getattr(module, name, None)) is int and getattr(module, name) == group.width * unit
            )
    return list(dict.fromkeys((tuple(counts), (*counts, *dims), ())))


def _survives(model: nn.Module, inputs: tuple[Tensor, ...], groups: ChannelGroups, names: list[str]) -> bool:
    """Whether networks with channels cut, and the same ones masked, agree to rounding."""
    # A lopsided choice shows a split at a fixed place, an odd one a size that was written out.
    for removed in ("first", "last", "first half", "every other"):
        keep: dict[str, Tensor] = {}
        for name in names:
            place = torch.arange(groups[name].width)
            keep[name] = {
                "first": place > 0,
                "last": place < len(place) - 1,
                "first half": place >= len(place) // 2,
                "every other": place % 2 == 1,
            }[removed]
        try:
            with torch.no_grad():
                small = cut(model, groups, keep)(*inputs)
        except (RuntimeError, ValueError, IndexError, AssertionError, TypeError):
            return False
        with torch.no_grad():
            masked = Masked(model, groups, keep)(*inputs)
        for a, b in zip(pytree.tree_leaves(masked), pytree.tree_leaves(small), strict=True):
            if isinstance(a, Tensor) and (
                a.shape != b.shape or not bool((a - b).abs().max() <= 1e-8 * (1e-6 + a.abs().max()))
            ):
                return False
    return True


def _randomised(model: nn.Module) -> nn.Module:
    """Return a copy in double precision whose weights hide nothing by being zero."""
    model = copy.deepcopy(model).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in model.parameters():
            scale = math.sqrt(2 / max(1, tensor[0].numel())) if tensor.dim() > 1 and len(tensor) else 0.1
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
            tensor.copy_(noise * scale + (0.5 if tensor.dim() < 2 else 0.0))
    return model
