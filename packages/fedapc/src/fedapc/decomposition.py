"""A user's network whose weights are a shared base, gated by a task, plus parts of the task's own (spec 2.2, 2.4).

Of every decomposed weight, rows first,

    theta(t) = B * sigmoid(m(t)) + A(t) + sum_k alpha(t)[k] * kb(t)[k]                                             (W)

with the base B shared by all tasks, a gate m a row, a part A of the task, and parts kb received from other clients,
weighed by a number each. Biases, what norms learn, and the classifier's last layer belong to a task. The network keeps
its own ``forward``: the weights are handed to it by ``torch.func.functional_call``.
"""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from fedapc import wire
from fedapc.choices import AdaptiveInit, AttentionInit, Norm, Start, Transfer
from fedapc.errors import ModelMismatchError, TaskError
from fedapc.seeds import generator
from fedapc.sparse import SparseStack, SparseTensor
from fedapc.states import bytes_of, tensor_of
from shared_core.errors import InputError, UnknownKeyError, no_such

__all__ = [
    "AdaptiveInit",
    "AttentionInit",
    "DecomposedModel",
    "FinishedTask",
    "Kept",
    "Layout",
    "Norm",
    "RunningTask",
    "Transfer",
    "add_gradient",
    "effective_weight",
    "fingerprint",
    "gate",
    "initial_base",
]

Tensors = dict[str, Tensor]

_LARGEST_LOGIT = 30.0
# The standard deviation of a standard normal cut off at two.
_CUT_NORMAL = 0.87962566103423978


@dataclass(frozen=True)
class Layout:
    """Which parameters of a network are decomposed, and what becomes of the others.

    Parameters
    ----------
    layers : shapes of the decomposed weights, by qualified name, in the order they are sent
    head : qualified name of the classifier's last linear layer, of which every task has its own
    head_inputs : features that enter it
    own : names of the other parameters that are trained, of which every task has its own
    biases : those of `own` that are a decomposed layer's bias
    buffers : names of buffers, of which every task has its own if `norm` says so
    norm : ``per-task`` for statistics of batch norms a task each; ``frozen`` to leave those of the network given
    """

    layers: Mapping[str, tuple[int, ...]]
    head: str
    head_inputs: int
    own: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()
    norm: Norm = "refuse"

    @classmethod
    def of(
        cls,
        module: nn.Module,
        *,
        head: str | None = None,
        include: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d),
        exclude: Sequence[str] = (),
        norm: Norm = "refuse",
    ) -> Layout:
        """Read the layout off a network.

        Parameters
        ----------
        module : whose last linear layer gives logits
        head : qualified name of that layer. Default: the last linear layer there is
        include : kinds of modules whose ``weight`` is decomposed
        exclude : qualified names of modules that are not, with all below them; their parameters are a task's own
        norm : what to do with running statistics

        Raises
        ------
        InputError
            For a network with nothing to decompose, an unknown name, running statistics and ``norm="refuse"``.

        Examples
        --------
        >>> net = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> layout = Layout.of(net)
        >>> layout.layers, layout.head, layout.own
        ({'0.weight': (4, 8)}, '2', ('0.bias',))
        """
        modules = dict(module.named_modules())
        linear = [name for name, part in modules.items() if isinstance(part, nn.Linear) and name]
        if head is None and not linear:
            raise InputError(
                f"{type(module).__name__} has no linear layer below it to be the head; it has {_kinds(module)}"
            )
        head = linear[-1] if head is None else head
        for name in (head, *exclude):
            if name not in modules:
                raise no_such("module", name, filter(None, modules))
        last = modules[head]
        if not isinstance(last, nn.Linear):
            raise InputError(f"head '{head}' is a {type(last).__name__}, expected a Linear")
        skipped = (head, *exclude)
        parameters = dict(module.named_parameters())
        layers: dict[str, tuple[int, ...]] = {}
        biases: list[str] = []
        for name, part in modules.items():
            weight = f"{name}.weight" if name else "weight"
            inside = any(name == other or name.startswith(f"{other}.") for other in skipped)
            if inside or not isinstance(part, include) or weight not in parameters:
                continue
            if parameters[weight].requires_grad:
                layers[weight] = tuple(parameters[weight].shape)
                bias = weight.removesuffix("weight") + "bias"
                biases += [bias] if bias in parameters and parameters[bias].requires_grad else []
        if not layers:
            raise InputError(
                f"{type(module).__name__} has no weight to decompose below its head '{head}'; it has {_kinds(module)}"
            )
        heads = {f"{head}.weight", f"{head}.bias"}
        own = tuple(
            name
            for name, parameter in parameters.items()
            if parameter.requires_grad and name not in layers and name not in heads
        )
        buffers = tuple(name for name, _ in module.named_buffers())
        tracking = [name for name, part in modules.items() if getattr(part, "running_mean", None) is not None]
        if tracking and norm == "refuse":
            raise InputError(
                f"'{tracking[0]}' keeps running statistics, which tasks must not share; choose norm='per-task', or"
                " norm='frozen' to leave those of the network given"
            )
        return cls(layers, head, last.in_features, own, tuple(biases), buffers, norm)

    def fingerprint(self) -> int:
        """Return a number of 32 bits, which networks of other names or shapes do not share but by chance."""
        return fingerprint(self.layers)

    def elements(self) -> int:
        """Numbers in the decomposed weights."""
        return sum(map(math.prod, self.layers.values()))


def fingerprint(layers: Mapping[str, Sequence[int]]) -> int:
    """Return a number of 32 bits of names and shapes in their order."""
    return zlib.crc32(repr([(name, tuple(shape)) for name, shape in layers.items()]).encode())


def initial_base(module: nn.Module, layout: Layout, seed: int = 0, how: Start = "fan-in") -> Tensors:
    """Draw the base that the server begins with.

    Parameters
    ----------
    module : the network
    layout : of it
    seed : of the draw
    how : ``fan-in``, a normal of variance 1 / fan-in cut off at two standard deviations; ``module``, the weights that
        the network has, e.g. pretrained ones
    """
    parameters = dict(module.named_parameters())
    if how == "module":
        return {name: parameters[name].detach().clone() for name in layout.layers}
    random = generator(seed, "base")
    return {
        name: _cut_normal(shape, math.prod(shape[1:]), random, parameters[name])
        for name, shape in layout.layers.items()
    }


def gate(mask: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """Turn raw logits into gates; logits beyond 30 have no gradient."""
    return mask.clamp(-_LARGEST_LOGIT, _LARGEST_LOGIT).sigmoid()


def effective_weight(
    base: Float[Tensor, "rows ..."],
    gates: Float[Tensor, " rows"] | None = None,
    adaptive: Float[Tensor, "rows ..."] | None = None,
    foreign: Float[Tensor, "rows ..."] | None = None,
) -> Float[Tensor, "rows ..."]:
    """Return equation (W); what is none is left out, an open gate is 1."""
    added = adaptive if foreign is None else foreign if adaptive is None else adaptive + foreign
    if gates is None:
        return base if added is None else base + added
    gates = gates.view(-1, *[1] * (base.ndim - 1))
    return base * gates if added is None else torch.addcmul(added, base, gates)


@dataclass(eq=False)
class RunningTask:
    """What a client learns of the task that runs.

    Parameters
    ----------
    classes : of the head
    own : biases, norms, the head, by the names of their parameters
    buffers : running statistics
    mask : raw logits a row by layer; empty if gates are open
    adaptive : by layer; empty without adaptive parts
    attention : a number a slot by layer; empty if nothing was received
    received : by layer, the parts of others
    slots : clients and tasks of these parts
    """

    classes: int
    own: Tensors
    buffers: Tensors
    mask: Tensors = field(default_factory=dict[str, Tensor])
    adaptive: Tensors = field(default_factory=dict[str, Tensor])
    attention: Tensors = field(default_factory=dict[str, Tensor])
    received: dict[str, SparseStack] = field(default_factory=dict[str, SparseStack])
    slots: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, eq=False)
class FinishedTask:
    """What is left of a task: gates instead of logits, and the parts of others folded into one."""

    classes: int
    own: Tensors
    buffers: Tensors
    gates: Tensors
    adaptive: dict[str, SparseTensor]
    foreign: dict[str, SparseTensor]
    attention: Tensors
    slots: tuple[tuple[str, int], ...]


@dataclass(frozen=True, eq=False)
class Kept:
    """What a model was; tensors that training does not change in place are its own, not copies."""

    base: Tensors
    compensation: Tensors
    finished: dict[int, FinishedTask]
    running: tuple[int, RunningTask] | None


class DecomposedModel:
    """A network of a client, for all its tasks.

    Parameters
    ----------
    module : the user's network; it is copied without its weights, and not changed
    layout : of it
    base : by layer. Default: zeros, until a server sends one
    mask : gates are learnt, else open
    adaptive : tasks have parts of their own
    transfer : ``learned`` weights of the parts received, their ``mean``, or ``none``
    adaptive_init : ``scaled``, the base over `adaptive_factor`; or ``zeros``
    adaptive_factor : 3 in the authors' code
    attention_init : ``zeros``, as are those of ``probe``, until its owner has set them, see `fedapc.probing`; or
        ``scaled``, of variance 1 / slots, foreign noise at the first step
    threshold : what a part has to exceed in absolute value to be kept when its task is done, and when it is evaluated

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> layout = Layout.of(net)
    >>> model = DecomposedModel(net, layout, initial_base(net, layout))
    >>> model.begin(0, classes=3)
    >>> model(torch.rand(5, 8), task=0).shape, model.export(0)[2]
    (torch.Size([5, 3]), Linear(in_features=4, out_features=3, bias=True))
    """

    def __init__(
        self,
        module: nn.Module,
        layout: Layout,
        base: Mapping[str, Tensor] | None = None,
        *,
        mask: bool = True,
        adaptive: bool = True,
        transfer: Transfer = "learned",
        adaptive_init: AdaptiveInit = "scaled",
        adaptive_factor: float = 3.0,
        attention_init: AttentionInit = "zeros",
        threshold: float = 1e-3,
    ) -> None:
        self.layout = layout
        self.transfer: Transfer = transfer
        self.threshold = threshold
        self._mask = mask
        self._adaptive = adaptive
        self._adaptive_init = adaptive_init
        self._adaptive_factor = adaptive_factor
        self._attention_init = attention_init
        self._module = module
        self._skeleton = copy.deepcopy(module).to("meta")
        self._initial = {name: p.detach() for name, p in module.named_parameters()}
        self._initial_buffers = {name: b.detach() for name, b in module.named_buffers()}
        self._aliases = _aliases(module)
        self._norms = [part for part in self._skeleton.modules() if getattr(part, "running_mean", None) is not None]
        self._places = _places(self._skeleton)
        self._empty = [(place, place[0][place[1]]) for place in self._places.values()]
        self._training: bool | None = None
        self.base: Tensors = {
            name: torch.zeros_like(self._initial[name])
            if base is None
            else _fitting(name, base[name], self._initial[name]).clone()
            for name in layout.layers
        }
        self.running: tuple[int, RunningTask] | None = None
        self.finished: dict[int, FinishedTask] = {}
        # What the retroactive penalty has moved the parts of finished tasks by, see `fedapc.objective`.
        self.compensation: Tensors = {}

    @property
    def tasks(self) -> list[int]:
        """Tasks that were begun, in their order."""
        return sorted({*self.finished, *([self.running[0]] if self.running else [])})

    def begin(
        self,
        task: int,
        classes: int,
        knowledge: Sequence[Mapping[str, SparseTensor]] = (),
        slots: Sequence[tuple[str, int]] | None = None,
        seed: int = 0,
    ) -> None:
        """Begin a task; one that runs has to be finished first.

        Parameters
        ----------
        task : its number, greater than those before
        classes : at least two
        knowledge : by layer, the parts of others, one a slot
        slots : whose these are
        seed : of what is drawn

        Raises
        ------
        TaskError
            For fewer than two classes, another task that runs, a number that is no greater.
        ModelMismatchError
            For parts of another architecture.
        """
        if classes < 2:
            raise TaskError(f"task {task}: {classes} classes, expected at least two")
        if self.running is not None:
            raise TaskError(f"task {task}: task {self.running[0]} still runs; finish it first")
        if self.finished and task <= max(self.finished):
            raise TaskError(f"task {task}: comes after task {max(self.finished)}; tasks are numbered upwards")
        if any(part.keys() != self.layout.layers.keys() for part in knowledge):
            raise ModelMismatchError(
                f"task {task}: received parts of other layers than {', '.join(self.layout.layers)}"
            )
        random = generator(seed, "task", task)
        running = RunningTask(classes, self._own(classes, random), self._statistics())
        for name, base in self.base.items():
            if self._mask:
                running.mask[name] = _trained(_cut_normal((len(base),), len(base), random, base))
            if self._adaptive:
                start = base / self._adaptive_factor if self._adaptive_init == "scaled" else torch.zeros_like(base)
                running.adaptive[name] = _trained(start)
        if knowledge and self.transfer != "none":
            running.slots = tuple(slots or [("", k) for k in range(len(knowledge))])
            for name, base in self.base.items():
                running.received[name] = SparseStack([part[name] for part in knowledge], base.shape, base)
                running.attention[name] = self._first_attention(len(knowledge), base, random)
        self.running = (task, running)

    def finish(self) -> FinishedTask:
        """Finish the task that runs: cut its adaptive parts off at the threshold, fold what was received.

        The base is what it is now, not what it was in the last step of training.
        """
        task, running = self._ongoing()
        self.settle()
        done = FinishedTask(
            running.classes,
            {name: value.detach() for name, value in running.own.items()},
            running.buffers,
            {name: gate(mask.detach()) for name, mask in running.mask.items()},
            {name: SparseTensor.of(part, self.threshold) for name, part in running.adaptive.items()},
            {name: stack.fold(running.attention[name]) for name, stack in running.received.items()},
            {name: value.detach() for name, value in running.attention.items()},
            running.slots,
        )
        self.finished[task] = done
        self.running = None
        return done

    def settle(self) -> None:
        """Write what the retroactive penalty moved into the parts of finished tasks."""
        for task, done in self.finished.items():
            self.finished[task] = replace(done, adaptive={name: self._moved(done, name) for name in done.adaptive})
        self.compensation = {}

    def training_weights(self) -> Tensors:
        """Return equation (W) of the task that runs, differentiable, by layer."""
        _, running = self._ongoing()
        return {
            name: effective_weight(
                base,
                gate(running.mask[name]) if running.mask else None,
                running.adaptive.get(name),
                running.received[name].weighted_sum(running.attention[name]) if running.received else None,
            )
            for name, base in self.base.items()
        }

    @torch.no_grad()
    def leaves(self) -> tuple[Tensors, Tensors]:
        """Return equation (W) of the task that runs as leaves of a graph, by layer, and the gates that went into it.

        Their gradients become those of what they are made of by `pull_back`: by hand, since a graph through these few
        products costs as much as a small network.
        """
        _, running = self._ongoing()
        gates = {name: gate(mask) for name, mask in running.mask.items()}
        found: Tensors = {}
        for name, base in self.base.items():
            foreign = running.received[name].weighted_sum(running.attention[name]) if running.received else None
            found[name] = effective_weight(base, gates.get(name), running.adaptive.get(name), foreign).detach()
            found[name].requires_grad_()
        return found, gates

    @torch.no_grad()
    def pull_back(self, weights: Tensors, gates: Tensors) -> None:
        """Add to gradients of the base, masks, parts and attention what those of the weights amount to.

        Parameters
        ----------
        weights, gates : of `leaves`, after a backward pass through the weights
        """
        _, running = self._ongoing()
        for name, weight in weights.items():
            base, slope = self.base[name], weight.grad
            if slope is None:
                continue
            if name in gates:
                mask, opened = running.mask[name], gates[name]
                inner = (slope * base).flatten(1).sum(1)
                inner = inner.mul_(opened * (1 - opened)).masked_fill_(mask.abs() > _LARGEST_LOGIT, 0)
                add_gradient(mask, inner)
                add_gradient(base, slope * opened.view(-1, *[1] * (base.ndim - 1)))
            else:
                add_gradient(base, slope.clone() if name in running.adaptive else slope)
            if name in running.attention and running.attention[name].requires_grad:
                add_gradient(running.attention[name], running.received[name].slopes(slope))
            if name in running.adaptive:
                add_gradient(running.adaptive[name], slope)

    @torch.no_grad()
    def weights(self, task: int, *, foreign: bool = True) -> Tensors:
        """Return equation (W) of a task with the base as it is now, and adaptive parts cut off, by layer.

        Parameters
        ----------
        task : that was begun
        foreign : with the parts of others
        """
        if self.running is not None and task == self.running[0]:
            running = self.running[1]
            cut = {name: part * (part.abs() > self.threshold) for name, part in running.adaptive.items()}
            return {
                name: effective_weight(
                    base.detach(),
                    gate(running.mask[name]) if running.mask else None,
                    cut.get(name),
                    running.received[name].total(running.attention[name]) if running.received and foreign else None,
                )
                for name, base in self.base.items()
            }
        if task not in self.finished:
            raise UnknownKeyError(f"there is no task {task}; there are {self.tasks}")
        done = self.finished[task]
        found: Tensors = {}
        for name, base in self.base.items():
            weight = effective_weight(base.detach(), done.gates.get(name)).clone()
            parts = [self._moved(done, name)] if name in done.adaptive else []
            parts += [done.foreign[name]] if foreign and name in done.foreign else []
            for part in parts:
                weight.view(-1).index_add_(0, part.index, part.values)
            found[name] = weight
        return found

    def run(self, weights: Mapping[str, Tensor], task: int, *inputs: Tensor, training: bool) -> Shaped[Tensor, "..."]:
        """Run the network with these weights of its layers, and what else belongs to a task."""
        part = self._part(task)
        given = {name: value for name, value in self._initial.items() if name not in weights and name not in part.own}
        given.update(weights)
        given.update(part.own)
        given.update(self._initial_buffers)
        given.update(part.buffers)
        given.update({name: given[of] for name, of in self._aliases.items()})
        if self._training != training:
            self._skeleton.train(training)
            if self.layout.norm == "frozen":
                for norm in self._norms:
                    norm.eval()
            self._training = training
        # What torch.func.functional_call does, but for looking the names up anew at every call.
        try:
            for name, (held, key) in self._places.items():
                if name in given:
                    held[key] = given[name]
            return cast("Tensor", self._skeleton(*inputs))
        finally:
            for (held, key), value in self._empty:
                held[key] = value

    def __call__(self, *inputs: Tensor, task: int) -> Float[Tensor, "batch classes"]:
        """Return logits of a task, without gradients, in evaluation mode."""
        with torch.no_grad():
            return self.run(self.weights(task), task, *inputs, training=False)

    def features(self, x: Shaped[Tensor, "batch ..."], task: int) -> Float[Tensor, "batch features"]:
        """Return what enters the head for a task that was begun, without gradients, in evaluation mode.

        Parameters
        ----------
        x : inputs, ``(batch, ...)``
        task : index of the task
        """
        seen: list[Tensor] = []

        def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen.append(inputs[0])

        hook = self._skeleton.get_submodule(self.layout.head).register_forward_pre_hook(keep)
        try:
            self(x, task=task)
        finally:
            hook.remove()
        return seen[-1].flatten(1)

    def export(self, task: int) -> nn.Module:
        """Return a plain network of the user's class with the weights of a task, in evaluation mode."""
        part = self._part(task)
        net = copy.deepcopy(self._module)
        head = cast("nn.Linear", net.get_submodule(self.layout.head))
        weight = part.own[f"{self.layout.head}.weight"]
        fresh = nn.Linear(
            head.in_features,
            part.classes,
            bias=f"{self.layout.head}.bias" in part.own,
            device=weight.device,
            dtype=weight.dtype,
        )
        parent, _, child = self.layout.head.rpartition(".")
        setattr(net.get_submodule(parent), child, fresh)
        with torch.no_grad():
            for name, value in {**self.weights(task), **part.own}.items():
                net.get_parameter(name).copy_(value)
            for name, value in part.buffers.items():
                net.get_buffer(name).copy_(value)
        return net.eval()

    def part(self, task: int) -> dict[str, SparseTensor]:
        """Return the adaptive part of a task as others may receive it, by layer; empty without adaptive parts."""
        if self.running is not None and self.running[0] == task:
            return {name: SparseTensor.of(value, self.threshold) for name, value in self.running[1].adaptive.items()}
        if task not in self.finished:
            raise UnknownKeyError(f"there is no task {task}; there are {self.tasks}")
        done = self.finished[task]
        return {name: self._moved(done, name) for name in done.adaptive}

    def attention(self, task: int) -> tuple[tuple[tuple[str, int], ...], Tensors]:
        """Return whose parts a task received, and what they weigh, ``(slots,)`` by layer; nothing if it received none.

        Parameters
        ----------
        task : that was begun
        """
        part = self._part(task)
        return part.slots, {name: weights.detach() for name, weights in part.attention.items()}

    def copied(self) -> Kept:
        """Keep the model as it is for `put_back`, at the cost of what the running task trains."""
        running = self.running
        if running is not None:
            task, part = running
            trained = {
                name: {key: _alike(value) for key, value in getattr(part, name).items()}
                for name in ("own", "buffers", "mask", "adaptive", "attention")
            }
            running = task, replace(part, **trained)
        return Kept(dict(self.base), dict(self.compensation), dict(self.finished), running)

    def put_back(self, kept: Kept) -> None:
        """Be as when `kept` was made, provided that nobody changed the base in place since."""
        self.base, self.compensation = dict(kept.base), dict(kept.compensation)
        self.finished, self.running = dict(kept.finished), kept.running
        self.release()

    def release(self) -> None:
        """Hold of the parts of others no more than the parts, until they are summed again."""
        if self.running is not None:
            for stack in self.running[1].received.values():
                stack.release()

    def state(self) -> tuple[Tensors, dict[str, Any]]:
        """Return copies of all tensors by flat names, and what else there is for JSON."""
        found = {**_under("base", self.base), **_under("compensation", self.compensation)}
        meta: dict[str, Any] = {"finished": {}, "running": None}
        for task, done in self.finished.items():
            meta["finished"][str(task)] = {"classes": done.classes, "slots": done.slots}
            for name in ("own", "buffers", "gates", "attention"):
                found |= _under(f"finished/{task}/{name}", getattr(done, name))
            for name in ("adaptive", "foreign"):
                parts: dict[str, SparseTensor] = getattr(done, name)
                found |= _under(f"finished/{task}/{name}.index", {layer: part.index for layer, part in parts.items()})
                found |= _under(f"finished/{task}/{name}.values", {layer: part.values for layer, part in parts.items()})
        if self.running is not None:
            task, running = self.running
            meta["running"] = {"task": task, "classes": running.classes, "slots": running.slots}
            for name in ("own", "buffers", "mask", "adaptive", "attention"):
                found |= _under(f"running/{name}", getattr(running, name))
            for name, stack in running.received.items():
                found |= {
                    f"running/received.{slot}/{name}": tensor_of(wire.encode_sparse(part))
                    for slot, part in enumerate(stack.parts)
                }
        return found, meta

    def load_state(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Take up what `state` returned.

        Raises
        ------
        ModelMismatchError
            For the state of another architecture.
        """
        layout, device = self.layout, next(iter(self.base.values())).device
        names = (
            *layout.layers,
            *layout.own,
            *layout.buffers,
            f"{layout.head}.weight",
            f"{layout.head}.bias",
        )
        take = partial(_taken, tensors, names, device)
        base = take("base")
        if {name: tuple(value.shape) for name, value in base.items()} != dict(self.layout.layers):
            raise ModelMismatchError("the state is of a network with other layers")
        shapes = self.layout.layers
        sparse = partial(_sparse_taken, take, shapes)
        self.base = {name: base[name] for name in self.layout.layers}
        self.compensation = take("compensation")
        self.finished = {}
        for key, about in meta["finished"].items():
            at = f"finished/{key}"
            self.finished[int(key)] = FinishedTask(
                about["classes"],
                take(f"{at}/own"),
                take(f"{at}/buffers"),
                take(f"{at}/gates"),
                sparse(f"{at}/adaptive"),
                sparse(f"{at}/foreign"),
                take(f"{at}/attention"),
                _slots(about["slots"]),
            )
        self.running = None
        if (about := meta["running"]) is not None:
            own, mask, adaptive = (take(f"running/{name}") for name in ("own", "mask", "adaptive"))
            attention = take("running/attention")
            received = {
                name: SparseStack(
                    [
                        wire.decode_shared(
                            bytes_of(tensors[f"running/received.{slot}/{name}"].cpu()), tuple(shapes[name])
                        )
                        for slot in range(len(weights))
                    ],
                    shapes[name],
                    base[name],
                )
                for name, weights in attention.items()
            }
            for tensor in (*own.values(), *mask.values(), *adaptive.values()):
                tensor.requires_grad_()
            for tensor in attention.values():
                tensor.requires_grad_(self.transfer == "learned")
            running = RunningTask(
                about["classes"],
                own,
                take("running/buffers"),
                mask,
                adaptive,
                attention,
                received,
                _slots(about["slots"]),
            )
            self.running = (about["task"], running)

    def _moved(self, done: FinishedTask, name: str) -> SparseTensor:
        part = done.adaptive[name]
        moved = self.compensation.get(name)
        if moved is None:
            return part.pruned(self.threshold)
        by = moved.detach().reshape(-1)[part.index]
        gates = done.gates.get(name)
        values = part.values - (by if gates is None else gates[part.rows()] * by)
        return SparseTensor(part.index, values, part.shape).pruned(self.threshold)

    def _ongoing(self) -> tuple[int, RunningTask]:
        if self.running is None:
            raise TaskError("no task runs; begin one")
        return self.running

    def _part(self, task: int) -> RunningTask | FinishedTask:
        if self.running is not None and self.running[0] == task:
            return self.running[1]
        if task not in self.finished:
            raise UnknownKeyError(f"there is no task {task}; there are {self.tasks}")
        return self.finished[task]

    def _own(self, classes: int, random: torch.Generator) -> Tensors:
        own: Tensors = {}
        for name in self.layout.own:
            given = self._initial[name]
            if name in self.layout.biases:
                own[name] = _trained(_cut_normal(given.shape, len(given), random, given))
            else:
                own[name] = _trained(given.clone())
        weight = self._initial[f"{self.layout.head}.weight"]
        inputs = self.layout.head_inputs
        bound = math.sqrt(6 / (inputs + classes))
        drawn = torch.rand(classes, inputs, generator=random, dtype=torch.float64) * 2 - 1
        own[f"{self.layout.head}.weight"] = _trained((drawn * bound).to(weight))
        if f"{self.layout.head}.bias" in self._initial:
            own[f"{self.layout.head}.bias"] = _trained(weight.new_zeros(classes))
        return own

    def _statistics(self) -> Tensors:
        if self.layout.norm == "frozen":
            return {}
        return {name: self._initial_buffers[name].clone() for name in self.layout.buffers}

    def _first_attention(self, slots: int, like: Tensor, random: torch.Generator) -> Tensor:
        if self.transfer == "mean":
            return like.new_full((slots,), 1 / slots)
        if self._attention_init == "scaled":
            return _trained(_cut_normal((slots,), slots, random, like))
        return _trained(like.new_zeros(slots))


def add_gradient(leaf: Tensor, slope: Tensor, scale: float = 1.0) -> None:
    """Add to the gradient of a leaf, which takes `slope` as its own if it has none; one that is not trained has none.

    Parameters
    ----------
    leaf : a parameter
    slope : of its shape; another that nobody else needs
    scale : that it is multiplied by
    """
    if not leaf.requires_grad:
        return
    if leaf.grad is None:
        leaf.grad = slope if scale == 1 else slope * scale
    else:
        leaf.grad.add_(slope, alpha=scale)


def _places(module: nn.Module) -> dict[str, tuple[dict[str, Any], str]]:
    """Where a network keeps each of its parameters and buffers, by their names."""
    found: dict[str, tuple[dict[str, Any], str]] = {}
    for prefix, part in module.named_modules():
        for held in (vars(part)["_parameters"], vars(part)["_buffers"]):
            found |= {
                f"{prefix}.{key}" if prefix else key: (held, key) for key, value in held.items() if value is not None
            }
    return found


def _alike(value: Tensor) -> Tensor:
    return value.detach().clone().requires_grad_(value.requires_grad)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """Copy tensors to names below a prefix."""
    return {f"{prefix}/{name}": value.detach().clone() for name, value in tensors.items()}


def _taken(tensors: Mapping[str, Tensor], names: Sequence[str], device: torch.device, prefix: str) -> Tensors:
    """Copy what there is below a prefix, in the order of `names`: safetensors sorts what it writes."""
    return {name: tensors[f"{prefix}/{name}"].to(device, copy=True) for name in names if f"{prefix}/{name}" in tensors}


def _sparse_taken(
    take: Callable[[str], Tensors], shapes: Mapping[str, tuple[int, ...]], prefix: str
) -> dict[str, SparseTensor]:
    """Make sparse tensors of what is below a prefix."""
    values = take(f"{prefix}.values")
    return {
        name: SparseTensor(index, values[name], tuple(shapes[name])) for name, index in take(f"{prefix}.index").items()
    }


def _slots(pairs: Sequence[Sequence[Any]]) -> tuple[tuple[str, int], ...]:
    return tuple((str(client), int(task)) for client, task in pairs)


def _trained(value: Tensor) -> Tensor:
    return value.detach().requires_grad_()


def _fitting(name: str, value: Tensor, like: Tensor) -> Tensor:
    if value.shape != like.shape:
        raise ModelMismatchError(f"{name}: has the shape {tuple(value.shape)}, expected {tuple(like.shape)}")
    return value.detach().to(like)


def _cut_normal(shape: Sequence[int], fan: int, random: torch.Generator, like: Tensor) -> Tensor:
    """Draw normals of variance 1 / fan, cut off at two standard deviations of what is drawn from, as in Keras."""
    low = 0.5 * (1 + math.erf(-math.sqrt(2)))
    uniform = low + (1 - 2 * low) * torch.rand(*shape, generator=random, dtype=torch.float64)
    normal = torch.special.ndtri(uniform) / _CUT_NORMAL
    return (normal / math.sqrt(max(1, fan))).to(like)


def _aliases(module: nn.Module) -> dict[str, str]:
    """Other names of tied parameters, by the first name of each."""
    first: dict[int, str] = {}
    found: dict[str, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if (of := first.setdefault(id(parameter), name)) != name:
            found[name] = of
    return found


def _kinds(module: nn.Module) -> str:
    return ", ".join(sorted({type(part).__name__ for part in module.modules()}))
