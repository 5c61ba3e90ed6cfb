"""Clients whose tasks share a body in full, for methods that do not decompose weights.

To `DecomposedModel`, a body is a base with open gates and no parts. So such a client is FedAPC's own with a larger
base: batches, optimizer, plateaus, messages, restarts and refusals are the same by construction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from fedapc import messages, wire
from fedapc.baselines.fisher import diagonal_fisher
from fedapc.baselines.strategy import Strategy
from fedapc.choices import Start
from fedapc.client import Client, Learning
from fedapc.decomposition import DecomposedModel, FinishedTask, Layout, RunningTask, initial_base
from fedapc.errors import ProtocolError
from fedapc.states import State, bytes_of, tensor_of
from fedapc.tasks import Task
from shared_core.errors import InputError

__all__ = ["LocalClient", "NetworkClient", "NetworkModel", "body_layout", "initial_body"]

Tensors = dict[str, Tensor]


def body_layout(module: nn.Module, layout: Layout) -> Layout:
    """Return the layout of a network whose tasks share everything but the head and running statistics.

    Parameters
    ----------
    module : the network
    layout : of it when its weights are decomposed

    Returns
    -------
    A layout whose ``layers`` are all trained parameters outside the head that have an axis, in the network's order;
    single numbers stay a task's own, as messages are made of rows.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> body_layout(net, Layout.of(net)).layers
    {'0.weight': (4, 8), '0.bias': (4,)}
    """
    shared = {*layout.layers, *layout.own}
    shapes = {name: tuple(value.shape) for name, value in module.named_parameters() if name in shared and value.ndim}
    return replace(layout, layers=shapes, own=tuple(name for name in layout.own if name not in shapes), biases=())


def initial_body(module: nn.Module, layout: Layout, seed: int = 0, how: Start = "fan-in") -> dict[str, Tensor]:
    """Draw the body that all clients begin with; its weights are those of `initial_base`.

    Parameters
    ----------
    module : the network
    layout : of it when its weights are decomposed
    seed : of the draw
    how : ``fan-in``, drawn weights, biases of zero, and norms as they are; ``module``, all that the network has

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> body = initial_body(net, Layout.of(net), seed=1)
    >>> torch.equal(body["0.weight"], initial_base(net, Layout.of(net), seed=1)["0.weight"]), body["0.bias"]
    (True, tensor([0., 0., 0., 0.]))
    """
    drawn = initial_base(module, layout, seed, how)
    given = dict(module.named_parameters())
    body: Tensors = {}
    for name in body_layout(module, layout).layers:
        if name in drawn:
            body[name] = drawn[name]
        elif how == "fan-in" and name in layout.biases:
            body[name] = torch.zeros_like(given[name]).detach()
        else:
            body[name] = given[name].detach().clone()
    return body


class NetworkModel(DecomposedModel):
    """A network whose tasks share their body.

    Parameters
    ----------
    module : the user's network; it is not changed
    layout : of its body, see `body_layout`
    hidden : names of the layers whose inputs are hidden activations
    dropout : share of the hidden activations, and of the features that enter the head, dropped in training. Hooks of
        a private copy of the network do it: the user's, and what is exported, have none
    separate : every task keeps the body it ended with, instead
    """

    def __init__(
        self,
        module: nn.Module,
        layout: Layout,
        hidden: Sequence[str] = (),
        *,
        dropout: float = 0.0,
        separate: bool = False,
    ) -> None:
        super().__init__(module, layout, mask=False, adaptive=False, transfer="none")
        self._separate = separate
        self._bodies: dict[int, Tensors] = {}
        if dropout:

            def drop(part: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
                return functional.dropout(inputs[0], dropout, part.training), *inputs[1:]

            for name in (*hidden, layout.head):
                self._skeleton.get_submodule(name).register_forward_pre_hook(drop)

    def finish(self) -> FinishedTask:
        """Finish the task that runs."""
        if self._separate and self.running is not None:
            self._bodies[self.running[0]] = {name: value.detach().clone() for name, value in self.base.items()}
        return super().finish()

    def weights(self, task: int, *, foreign: bool = True) -> dict[str, Tensor]:
        """Return the body that a task is evaluated with, by name."""
        found = super().weights(task, foreign=foreign)
        return dict(self._bodies[task]) if task in self._bodies else found

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return copies of all tensors by flat names, and what else there is for JSON."""
        found, about = super().state()
        for task, body in self._bodies.items():
            found.update({f"bodies/{task}/{name}": value.clone() for name, value in body.items()})
        return found, about

    def load_state(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Take up what `state` returned."""
        super().load_state(tensors, meta)
        self._bodies = {
            task: {name: tensors[f"bodies/{task}/{name}"].to(base, copy=True) for name, base in self.base.items()}
            for task in self.finished
            if self._separate
        }


class NetworkClient(Client):
    """A client whose tasks share a body, with a head and running statistics each.

    Parameters
    ----------
    name, module, tasks, seed : see `fedapc.Client`
    learning : how it learns; what concerns decomposed weights is switched off
    strategy : of its method. Default: none
    layout : of the network when its weights are decomposed. Default: read off it
    dropout : share of the hidden activations dropped in training: of what enters the head, and every layer of `layout`
        but the first
    lr_decay : multiplies the learning rate from task to task
    separate : every task has a body of its own
    shares : send the body to the server; else nothing is sent

    Examples
    --------
    >>> from fedapc.baselines.coordinators import DenseServer
    >>> net = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> client = NetworkClient("a", net, [Task(torch.rand(20, 8), torch.arange(20) % 2, classes=2)])
    >>> server = DenseServer(initial_body(net, Layout.of(net)), {"a": 1}, rounds=1)
    >>> server.receive("a", client.answer(server.request("a")))
    True
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        tasks: Sequence[Task],
        learning: Learning | None = None,
        *,
        strategy: Strategy | None = None,
        layout: Layout | None = None,
        seed: int = 0,
        dropout: float = 0.0,
        lr_decay: float = 1.0,
        separate: bool = False,
        shares: bool = True,
    ) -> None:
        layout = layout or Layout.of(module)
        learning = replace(
            learning or Learning(),
            mask=False,
            adaptive=False,
            transfer="none",
            sparsity=0.0,
            mask_sparsity=0.0,
            retention=0.0,
            retroactive="none",
            train_base=True,
            share_adaptive=False,
        )
        hidden = [layer.removesuffix("weight").removesuffix(".") for layer in layout.layers][1:]
        body = body_layout(module, layout)
        model = NetworkModel(module, body, hidden, dropout=dropout, separate=separate)
        super().__init__(name, module, tasks, learning, layout=body, seed=seed, model=model)
        self.strategy = strategy or Strategy()
        self._decayed = tuple(layout.layers)
        self._lr_decay = lr_decay
        self._shares = shares

    def state(self) -> State:
        """Return all that a restart needs but the tasks."""
        found = super().state()
        found.update({f"strategy/{name}": value for name, value in self.strategy.state().items()})
        found["strategy.name"] = tensor_of(self.strategy.name.encode())
        return found

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state` returned.

        Raises
        ------
        InputError
            For the state of something else, of another client, or of another method.
        """
        found = bytes_of(state["strategy.name"]).decode() if "strategy.name" in state else "none"
        if found != self.strategy.name:
            raise InputError(
                f"client '{self.name}': this is a state of the strategy '{found}', expected '{self.strategy.name}';"
                " take up a run with the method it was begun with"
            )
        super().load_state(state)
        prefix = "strategy/"
        self.strategy.load_state(
            {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
        )

    def _undo(self) -> Callable[[], None]:
        return partial(self.load_state, self.state())

    def _expected(self) -> Mapping[str, tuple[int, ...]]:
        layers = self.layout.layers
        extras = {f"{extra}/{name}": shape for extra in self.strategy.extras for name, shape in layers.items()}
        return {**layers, **extras}

    def _load(self, received: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        super()._load({name: received[name] for name in self.layout.layers})
        extras: dict[str, dict[str, Tensor]] = {extra: {} for extra in self.strategy.extras}
        for extra, found in extras.items():
            for name, body in self.model.base.items():
                rows, values = received[f"{extra}/{name}"]
                if not bool(rows.all()):
                    raise ProtocolError(f"client '{self.name}': a part of {extra}/{name} was sent, expected all of it")
                found[name] = values.to(body)
        self.strategy.begin_round(self.model.base, extras)

    def _do(self, message: messages.Message) -> bytes:
        running = self.model.running
        if running is not None and running[0] != message.task:
            self.strategy.end_task(self.model.base, lambda: self._fisher(running[0]))
        return super()._do(message)

    def _begin(self, message: messages.Message) -> None:
        super()._begin(message)
        self._pace.lr *= self._lr_decay**message.task

    def _train(self, message: messages.Message) -> None:
        super()._train(message)
        self.strategy.end_round(self.model.base, lambda: self._fisher(message.task))

    def _loss(
        self, running: RunningTask, weights: Mapping[str, Tensor], x: Tensor, y: Tensor, task: int
    ) -> Float[Tensor, ""]:
        loss = super()._loss(running, weights, x, y, task)
        penalty = self.strategy.penalty(self.model.base)
        return loss if penalty is None else loss + penalty

    def _correct(self) -> None:
        self.strategy.correct(self.model.base, self._pace.lr)

    def _optimizer(self, running: RunningTask) -> torch.optim.Optimizer:
        """Make the optimizer of a round: weights decay in every task, biases, norms and heads in none."""
        decayed = [value for name, value in self.model.base.items() if name in self._decayed]
        free = [value for name, value in self.model.base.items() if name not in self._decayed]
        groups: list[dict[str, Any]] = [
            {"params": decayed, "weight_decay": self.learning.weight_decay},
            # The place of the attention, which has a learning rate of its own.
            {"params": cast("list[Tensor]", []), "weight_decay": 0.0},
            {"params": [*free, *running.own.values()], "weight_decay": 0.0},
        ]
        kind = torch.optim.Adam if self.learning.optimizer == "adam" else torch.optim.SGD
        return kind(groups, lr=self._pace.lr, fused=True)

    def _upload(self) -> tuple[bytes, ...]:
        if not self._shares:
            return _nothing(self.model.base)
        extras = self.strategy.upload()
        sent = [*self.model.base.values()]
        sent += [extras[extra][name] for extra in self.strategy.extras for name in self.model.base]
        return tuple(map(wire.encode, sent))

    def _fisher(self, number: int) -> Tensors:
        task = self.tasks[number]
        body = {name: value.detach() for name, value in self.model.base.items()}

        def run(weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
            return self.model.run(weights, number, x, training=False)

        return diagonal_fisher(run, body, task.x, task.y)


class LocalClient(Client):
    """A client of FedAPC that sends nothing: its tasks share a base with each other only."""

    def _upload(self) -> tuple[bytes, ...]:
        return _nothing(self.model.base)


def _nothing(tensors: Mapping[str, Tensor]) -> tuple[bytes, ...]:
    """Write that no row of these is sent."""
    return tuple(wire.encode(value, rows=torch.zeros(len(value), dtype=torch.bool)) for value in tensors.values())
