"""A client: private tasks, one after the other, and an answer in bytes to every request in bytes (spec 2.5)."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn
from torch.nn import functional

from fedapc import messages, wire
from fedapc.choices import AdaptiveInit, AttentionInit, Retroactive, Score, Transfer
from fedapc.decomposition import DecomposedModel, Kept, Layout, RunningTask, add_gradient, fingerprint
from fedapc.errors import ModelMismatchError, ProtocolError, SparsityWarning, TrainingDivergedError
from fedapc.metrics import capacity
from fedapc.objective import RetroactivePenalty, proximal_step
from fedapc.probing import probe
from fedapc.seeds import derive, generator
from fedapc.selection import rows_to_send
from fedapc.sparse import SparseTensor
from fedapc.states import State, bytes_of, described, description, tensor_of
from fedapc.stepping import Steps
from fedapc.tasks import Task
from shared_core.device import seeded
from shared_core.errors import InputError

__all__ = ["Client", "Learning"]


@dataclass(frozen=True)
class Learning:
    """How a client learns (spec 2.3, 2.6, 2.7).

    Parameters
    ----------
    epochs : passes over the task's examples a round
    batch_size : examples a step
    optimizer : ``adam`` or ``sgd``, begun afresh every round: the base was just overwritten
    lr : learning rate; Adam makes no part sparse unless this is below `threshold`
    patience : epochs without a lower validation loss before `lr` is divided by `lr_factor`
    lr_factor : divides the learning rate
    least_lr : below it a task is not trained any more
    attention_lr : multiplies the learning rate of the attention, which Adam would hardly move else
    sparsity : coefficient of the L1 norm of adaptive parts
    l1_solver : ``subgradient``, or ``prox`` for exact zeros
    mask_sparsity : coefficient of the L1 norm of raw masks
    retention : coefficient of the retroactive penalty
    retroactive : parts of past tasks follow the base by one ``shared`` compensation, at a cost that their number does
        not change; by entries of their own, ``joint``; or stay, ``none``, as in the authors' code
    proximal : coefficient of half the squared distance from the base that the round began with, as in FedProx
    weight_decay : of the task's part and mask, and of the base in a client's first task
    threshold : what an entry of a part has to exceed to be kept, evaluated and sent
    mask, adaptive, transfer, adaptive_init, adaptive_factor, attention_init : see `DecomposedModel`; with an
        `attention_init` of ``probe``, attention begins where `fedapc.probing` finds that it should
    train_base : else it stays what the server drew, and tasks have nothing in common but the parts they share
    upload_fraction, score : see `fedapc.selection.rows_to_send`
    share_adaptive : send adaptive parts when asked

    Raises
    ------
    InputError
        For numbers out of range.
    """

    epochs: int = 1
    batch_size: int = 100
    optimizer: Literal["adam", "sgd"] = "adam"
    lr: float = 1e-3 / 3
    patience: int = 3
    lr_factor: float = 3.0
    least_lr: float = 1e-10
    attention_lr: float = 3.0
    sparsity: float = 1e-3
    l1_solver: Literal["subgradient", "prox"] = "subgradient"
    mask_sparsity: float = 0.0
    retention: float = 100.0
    retroactive: Retroactive = "shared"
    proximal: float = 0.0
    weight_decay: float = 1e-4
    threshold: float = 1e-3
    mask: bool = True
    adaptive: bool = True
    transfer: Transfer = "learned"
    adaptive_init: AdaptiveInit = "zeros"
    adaptive_factor: float = 3.0
    attention_init: AttentionInit = "probe"
    train_base: bool = True
    upload_fraction: float = 0.3
    score: Score = "gated-norm"
    share_adaptive: bool = True

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "patience"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: {getattr(self, name)}, expected at least 1")
        for name in ("lr", "attention_lr", "adaptive_factor"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"{name}: {getattr(self, name)}, expected a positive number")
        for name in ("sparsity", "mask_sparsity", "retention", "proximal", "weight_decay", "threshold", "least_lr"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"{name}: {getattr(self, name)}, expected 0 or more")
        if not 0 < self.upload_fraction <= 1:
            raise InputError(f"upload_fraction: {self.upload_fraction}, expected more than 0 and at most 1")
        if not self.lr_factor > 1:
            raise InputError(f"lr_factor: {self.lr_factor}, expected more than 1")
        if self.adaptive and self.optimizer == "adam" and self.lr >= self.threshold > 0:
            warnings.warn(
                f"lr {self.lr} is not below the threshold {self.threshold}: Adam keeps weights that the L1 norm pins to"
                " zero about lr away from it, so that parts stay dense; lower lr, or raise the threshold",
                SparsityWarning,
                stacklevel=2,
            )


@dataclass
class _Pace:
    """Where the learning rate of a task is."""

    lr: float
    best: float = float("inf")
    waited: int = 0

    def see(self, loss: float, learning: Learning) -> None:
        if loss < self.best:
            self.best, self.waited = loss, 0
            return
        self.waited += 1
        if self.waited >= learning.patience:
            self.lr, self.waited = self.lr / learning.lr_factor, 0


@dataclass(eq=False)
class _Retention:
    """Anchors of the task that runs, and where the parts of past tasks have moved to since."""

    penalties: dict[str, RetroactivePenalty] = field(default_factory=dict[str, RetroactivePenalty])
    moved: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def copied(self) -> _Retention:
        """Keep what is here between rounds; penalties are replaced, never changed."""
        return _Retention(dict(self.penalties), dict(self.moved))


class Client:
    """A client of the federation; between rounds it is a state and nothing runs.

    Parameters
    ----------
    name : that the server knows it by, up to 64 bytes
    module : the network; clients may share one, nobody changes it
    tasks : in their order
    learning : how it learns
    layout : of the network. Default: read off it
    seed : of all draws, together with the name, the task and the round
    model : that it trains. Default: the network with its weights decomposed, by `learning`

    Examples
    --------
    >>> from fedapc.server import Server
    >>> from fedapc.decomposition import initial_base
    >>> from fedapc.tasks import Task
    >>> net = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> client = Client("a", net, [Task(torch.rand(20, 8), torch.arange(20) % 2, classes=2)])
    >>> server = Server(initial_base(net, client.layout), {"a": 1}, rounds=1)
    >>> server.receive("a", client.answer(server.requests()["a"]))
    True
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        tasks: Sequence[Task],
        learning: Learning | None = None,
        *,
        layout: Layout | None = None,
        seed: int = 0,
        model: DecomposedModel | None = None,
    ) -> None:
        self.name = name
        self.tasks = list(tasks)
        self.learning = learning or Learning()
        self.layout = layout or Layout.of(module)
        self.model = model or DecomposedModel(
            module,
            self.layout,
            mask=self.learning.mask,
            adaptive=self.learning.adaptive,
            transfer=self.learning.transfer,
            adaptive_init=self.learning.adaptive_init,
            adaptive_factor=self.learning.adaptive_factor,
            attention_init=self.learning.attention_init,
            threshold=self.learning.threshold,
        )
        self._seed = seed
        self._round = -1
        self._pace = _Pace(self.learning.lr)
        self._retention = _Retention()
        self._answered: tuple[str, bytes] = ("", b"")

    @property
    def fingerprint(self) -> int:
        """Number of the architecture that messages carry, see `Layout.fingerprint`."""
        return fingerprint(self._expected())

    def answer(self, request: bytes) -> bytes:
        """Do a round of training; the request of the last round again gets the answer of the last round again.

        Raises
        ------
        WireError
            For bytes that are no request.
        ModelMismatchError
            For a request to another architecture.
        ProtocolError
            For a request to another client, of a round or a task that is over, or of a task that this one has not.
        TrainingDivergedError
            When a loss is not finite. After this and every other exception the client is as it was before.
        """
        digest = hashlib.sha256(request).hexdigest()
        if digest == self._answered[0]:
            return self._answered[1]
        message = messages.unpack(request)
        self._check(message)
        undo = self._undo()
        try:
            reply = self._do(message)
        except BaseException:
            undo()
            raise
        self._answered = digest, reply
        return reply

    def predict(
        self, x: Shaped[Tensor, "batch ..."], task: int, batch_size: int = 1000, *, foreign: bool = True
    ) -> Float[Tensor, "batch classes"]:
        """Return logits of a task that was begun, with the base as it is now.

        Parameters
        ----------
        x : inputs, ``(batch, ...)``
        task : index of the task
        batch_size : inputs at a time
        foreign : with the parts of others
        """
        weights = self.model.weights(task, foreign=foreign)
        with torch.no_grad():
            return torch.cat([self.model.run(weights, task, part, training=False) for part in x.split(batch_size)])

    def accuracy(self, x: Shaped[Tensor, "batch ..."], y: Int64[Tensor, " batch"], task: int) -> float:
        """Share of examples whose class has the greatest logit."""
        return float((self.predict(x, task).argmax(1) == y).double().mean())

    def evaluate(self) -> list[float]:
        """Return the accuracy on the test examples of every task, as the client is now.

        Returns
        -------
        A number a task in their order; NaN for those that were not begun, or have no test examples.
        """
        begun = set(self.model.tasks)
        return [
            self.accuracy(*task.test, number) if number in begun and task.test is not None else float("nan")
            for number, task in enumerate(self.tasks)
        ]

    def about(self, task: int) -> dict[str, Any]:
        """Tell what there is to know of a task that was begun.

        Returns
        -------
        ``density``, the share of its part's entries that are kept, and ``capacity``, what base and parts of all tasks
        hold relative to one network, NaN without a part; ``attention``, what the parts of others weigh, by layer and
        by their client and task; ``accuracy_alone``, on the test examples without these, NaN if there are none.
        """
        parts = self.model.part(task)
        kept, all_ = sum(len(part.index) for part in parts.values()), self.layout.elements()
        slots, attention = self.model.attention(task)
        test = self.tasks[task].test
        alone = float("nan")
        if test is not None and slots:
            alone = float((self.predict(test[0], task, foreign=False).argmax(1) == test[1]).double().mean())
        return {
            "density": kept / all_ if parts else float("nan"),
            "capacity": capacity(self.model) if parts else float("nan"),
            "attention": {
                layer: dict(zip(slots, weights.tolist(), strict=True)) for layer, weights in attention.items()
            },
            "accuracy_alone": alone,
        }

    def export(self, task: int) -> nn.Module:
        """Return a plain network with the weights of a task."""
        return self.model.export(task)

    def state(self) -> State:
        """Return all that a restart needs but the tasks: private, as adaptive parts and masks are."""
        tensors, about = self.model.state()
        found = {f"model/{name}": value for name, value in tensors.items()}
        for name, penalty in self._retention.penalties.items():
            found[f"anchor.base/{name}"] = penalty.base.clone()
            found[f"anchor.values/{name}"] = penalty.values.clone()
        found["answer"] = tensor_of(self._answered[1])
        return described(
            found,
            {
                "kind": "client",
                "name": self.name,
                "model": about,
                "round": self._round,
                "pace": [self._pace.lr, self._pace.best, self._pace.waited],
                "digest": self._answered[0],
            },
        )

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state` returned.

        Raises
        ------
        InputError
            For the state of something else, or of another client.
        """
        about = description(state, "client")
        if about["name"] != self.name:
            raise InputError(f"client '{self.name}': this is the state of client '{about['name']}'")
        prefix = "model/"
        tensors = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
        self.model.load_state(tensors, about["model"])
        self._round = about["round"]
        self._pace = _Pace(*about["pace"])
        self._answered = about["digest"], bytes_of(state["answer"])
        self._retention = _Retention()
        if f"anchor.base/{next(iter(self.layout.layers))}" in state:
            device = next(iter(self.model.base.values())).device
            self._take_anchors({name: state[f"anchor.base/{name}"].to(device) for name in self.layout.layers})
            for name, penalty in self._retention.penalties.items():
                values = state[f"anchor.values/{name}"].to(device, copy=True)
                self._retention.penalties[name] = replace(penalty, values=values)

    def _undo(self) -> Callable[[], None]:
        """Return what puts the client back to where it is now."""
        return partial(self._put_back, self.model.copied(), self._retention.copied(), replace(self._pace), self._round)

    def _put_back(self, model: Kept, retention: _Retention, pace: _Pace, round_: int) -> None:
        self.model.put_back(model)
        self._retention, self._pace, self._round = retention, pace, round_

    def _check(self, message: messages.Message) -> None:
        if message.kind != "request" or message.client != self.name:
            raise ProtocolError(f"client '{self.name}': got a message '{message.kind}' of client '{message.client}'")
        if message.layout != self.fingerprint:
            raise ModelMismatchError(
                f"client '{self.name}': the server's network has other layers than this one's,"
                f" {', '.join(f'{name} {shape}' for name, shape in self.layout.layers.items())}"
            )
        if message.round <= self._round:
            raise ProtocolError(f"client '{self.name}': round {message.round} is over, the last was {self._round}")
        if message.task >= len(self.tasks):
            raise ProtocolError(f"client '{self.name}': has {len(self.tasks)} tasks, was asked for task {message.task}")
        if self.model.tasks and message.task < max(self.model.tasks):
            raise ProtocolError(f"client '{self.name}': task {message.task} is over, {max(self.model.tasks)} runs")

    def _do(self, message: messages.Message) -> bytes:
        received = self._read_base(message)
        running = self.model.running
        if running is None or running[0] != message.task:
            if running is not None:
                self.model.finish()
            self._retention = _Retention()
            # Without the penalty, the L1 norm still moves past parts that are free to move.
            if self.model.finished and (self.learning.retention or self.learning.retroactive != "none"):
                self._take_anchors(self.model.base)
            self._load(received)
            self._begin(message)
        else:
            self._load(received)
        self._train(message)
        self._round = message.round
        return self._update(message)

    def _expected(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of what a request brings, in the order it is sent in."""
        return self.layout.layers

    def _read_base(self, message: messages.Message) -> dict[str, tuple[Tensor, Tensor]]:
        sections, expected = message.of_kind("base"), self._expected()
        if len(sections) != 1 or len(sections[0].tensors) != len(expected):
            raise ProtocolError(f"client '{self.name}': expected one base of {len(expected)} layers")
        return {
            name: wire.decode(blob, shape=tuple(shape), limit=wire.MOST_ELEMENTS, finite=True).by_rows()
            for (name, shape), blob in zip(expected.items(), sections[0].tensors, strict=True)
        }

    def _load(self, received: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        for name, (rows, values) in received.items():
            base = self.model.base[name].detach().clone()
            base[rows] = values.to(base)
            self.model.base[name] = base

    def _begin(self, message: messages.Message) -> None:
        sections = message.of_kind("knowledge")
        knowledge: list[dict[str, SparseTensor]] = []
        for section in sections:
            if len(section.tensors) != len(self.layout.layers):
                raise ModelMismatchError(f"client '{self.name}': a part of '{section.client}' has other layers")
            pairs = zip(self.layout.layers.items(), section.tensors, strict=True)
            knowledge.append({name: wire.decode_shared(blob, tuple(shape)) for (name, shape), blob in pairs})
        self._pace = _Pace(self.learning.lr)
        self.model.begin(
            message.task,
            self.tasks[message.task].classes,
            knowledge,
            [(section.client, section.task) for section in sections],
            seed=derive(self._seed, self.name),
        )
        running, task = self._running(), self.tasks[message.task]
        if running.slots and self.learning.transfer == "learned" and self.learning.attention_init == "probe":
            first = probe(self.model, task.x, task.y, seed=derive(self._seed, self.name))
            with torch.no_grad():
                for weights in running.attention.values():
                    weights.copy_(first)

    def _take_anchors(self, base: Mapping[str, Tensor]) -> None:
        done = list(self.model.finished.values())
        for name in self.layout.layers:
            parts = [task.adaptive[name] for task in done] if self.learning.adaptive else []
            gates = [task.gates.get(name) for task in done]
            frozen = self.learning.retroactive == "none" or not parts
            self._retention.penalties[name] = RetroactivePenalty.of(base[name], gates, [] if frozen else parts)

    def _train(self, message: messages.Message) -> None:
        learning, task = self.learning, self.tasks[message.task]
        running = self._running()
        for base in self.model.base.values():
            base.requires_grad_(learning.train_base)
        begun = {name: base.detach().clone() for name, base in self.model.base.items()} if learning.proximal else {}
        self._let_past_parts_move()
        slopes = {
            name: self._retention.penalties[name].shared_l1_slope(moved)
            for name, moved in self.model.compensation.items()
        }
        optimizer = self._optimizer(running)
        steps = Steps(optimizer)
        sparse = [*running.adaptive.values(), *self._retention.moved.values()]
        # What the network itself draws, e.g. dropout, comes from the global state.
        with seeded(derive(self._seed, self.name, "network", message.round), task.x.device):
            for epoch in range(learning.epochs):
                if self._pace.lr < learning.least_lr:
                    break
                for number, group in enumerate(optimizer.param_groups):
                    group["lr"] = self._pace.lr * (learning.attention_lr if number == 1 else 1.0)
                random = generator(self._seed, self.name, "shuffle", message.round, epoch)
                total = torch.zeros((), dtype=torch.float64)
                for chosen in torch.randperm(len(task.y), generator=random).split(learning.batch_size):
                    steps.clear()
                    weights, gates = self.model.leaves()
                    loss = self._loss(running, weights, task.x[chosen], task.y[chosen], message.task)
                    loss.backward()
                    self.model.pull_back(weights, gates)
                    self._regularise(running, slopes, begun)
                    self._correct()
                    steps.take()
                    if learning.l1_solver == "prox":
                        proximal_step(optimizer, sparse, learning.sparsity)
                    total += loss.detach()
                if not bool(torch.isfinite(total)):
                    raise TrainingDivergedError(
                        f"client '{self.name}', task {message.task}, round {message.round}: the loss is not finite;"
                        " lower lr, or look for values out of range in the data"
                    )
                if task.validation is not None:
                    self._pace.see(self._validation_loss(task, message.task), learning)
        self._rest(running)

    def _loss(
        self, running: RunningTask, weights: Mapping[str, Tensor], x: Tensor, y: Tensor, task: int
    ) -> Float[Tensor, ""]:
        """Return what is differentiated by a graph: the cross-entropy of a batch, with these weights of the layers."""
        logits = self.model.run(weights, task, x, training=True)
        if logits.shape != (len(y), running.classes):
            raise ModelMismatchError(
                f"client '{self.name}', task {task}: the network returns {tuple(logits.shape)}, expected"
                f" {(len(y), running.classes)}: its head '{self.layout.head}' has to come last"
            )
        return functional.cross_entropy(logits, y)

    @torch.no_grad()
    def _regularise(self, running: RunningTask, slopes: Mapping[str, Tensor], begun: Mapping[str, Tensor]) -> None:
        """Add to the gradients those of all that the objective has besides the cross-entropy (spec 2.3).

        Parameters
        ----------
        running : the task that runs
        slopes : of the L1 norm of past parts in the compensation, by layer
        begun : the base that the round began with, by layer, if distance from it counts
        """
        learning, direct = self.learning, self.learning.l1_solver == "subgradient"
        if learning.sparsity and direct:
            for part in running.adaptive.values():
                add_gradient(part, part.sign(), learning.sparsity)
        if learning.mask_sparsity:
            for mask in running.mask.values():
                add_gradient(mask, mask.sign(), learning.mask_sparsity)
        for name, at in begun.items():
            add_gradient(self.model.base[name], self.model.base[name] - at, learning.proximal)
        for name, penalty in self._retention.penalties.items():
            base = self.model.base[name]
            if name in self.model.compensation:
                moved = self.model.compensation[name]
                of_base, of_moved = penalty.shared_slopes(base, moved)
                add_gradient(moved, of_moved, learning.retention)
                add_gradient(moved, slopes[name], learning.sparsity)
            elif name in self._retention.moved:
                values = self._retention.moved[name]
                of_base, of_values = penalty.joint_slopes(base, values)
                add_gradient(values, of_values, learning.retention)
                if direct:
                    add_gradient(values, values.sign(), learning.sparsity)
            else:
                of_base = penalty.frozen_slope(base)
            add_gradient(base, of_base, learning.retention)

    def _correct(self) -> None:
        """Change the gradients before a step, for methods that do."""

    def _let_past_parts_move(self) -> None:
        """Begin a round with the parts of past tasks where the last one left them."""
        kind = self.learning.retroactive
        if kind == "none" or not self.learning.adaptive or not self._retention.penalties:
            return
        for name, penalty in self._retention.penalties.items():
            if kind == "shared":
                moved = self.model.compensation.get(name)
                start = torch.zeros_like(penalty.base) if moved is None else moved.detach().clone()
                self.model.compensation[name] = start.requires_grad_()
            else:
                parts = [done.adaptive[name].values for done in self.model.finished.values()]
                self._retention.moved[name] = torch.cat(parts).detach().requires_grad_()

    def _optimizer(self, running: RunningTask) -> torch.optim.Optimizer:
        decay = self.learning.weight_decay
        bases = list(self.model.base.values()) if self.learning.train_base else []
        first = not self.model.finished
        decayed = [*running.adaptive.values(), *running.mask.values(), *(bases if first else [])]
        free = [*running.own.values(), *([] if first else bases)]
        free += [*self.model.compensation.values(), *self._retention.moved.values()]
        attention = [weights for weights in running.attention.values() if weights.requires_grad]
        # Of the objective, 1/2 weight_decay ||.||^2 is what optimizers call weight decay.
        groups: list[dict[str, Any]] = [
            {"params": decayed, "weight_decay": decay},
            {"params": attention, "weight_decay": 0.0},
            {"params": free, "weight_decay": 0.0},
        ]
        kind = torch.optim.Adam if self.learning.optimizer == "adam" else torch.optim.SGD
        return kind(groups, lr=self._pace.lr, fused=True)

    def _rest(self, running: RunningTask) -> None:
        """Keep values only: gradients are for the round, and so is what makes sums of received parts fast."""
        self.model.release()
        for tensor in (*running.own.values(), *running.mask.values(), *running.adaptive.values()):
            tensor.grad = None
        for tensor in running.attention.values():
            tensor.grad = None
        for tensors in (self.model.base, self.model.compensation):
            for name, value in tensors.items():
                tensors[name] = value.detach()
        for name, values in self._retention.moved.items():
            parts = self._retention.penalties[name].split(values)
            for (task, done), part in zip(self.model.finished.items(), parts, strict=True):
                self.model.finished[task] = replace(done, adaptive={**done.adaptive, name: part})
        self._retention.moved = {}

    def _validation_loss(self, task: Task, number: int) -> float:
        assert task.validation is not None
        x, y = task.validation
        return float(functional.cross_entropy(self.predict(x, number), y))

    def _running(self) -> RunningTask:
        assert self.model.running is not None
        return self.model.running[1]

    def _upload(self) -> tuple[bytes, ...]:
        """Write what of the base is sent."""
        running = self._running()
        rows = {
            name: rows_to_send(base, running.mask.get(name), self.learning.upload_fraction, self.learning.score)
            for name, base in self.model.base.items()
        }
        return tuple(wire.encode(base, rows=rows[name]) for name, base in self.model.base.items())

    def _update(self, message: messages.Message) -> bytes:
        sections = [messages.Section("base", self.name, message.task, self._upload())]
        if self.learning.share_adaptive and self.learning.adaptive:
            known = [task for task in message.wanted if task in self.model.tasks]
            for task in known:
                parts = tuple(wire.encode_sparse(part) for part in self.model.part(task).values())
                sections.append(messages.Section("adaptive", self.name, task, parts))
        return messages.pack(
            messages.Message(
                "update",
                self.name,
                message.round,
                message.task,
                message.layout,
                examples=len(self.tasks[message.task].y),
                sections=tuple(sections),
            )
        )
