"""A federation in a few lines: a network, each client's list of tasks, a report."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from fedapc.baselines import Training, build
from fedapc.choices import Start
from fedapc.client import Client
from fedapc.config import FedAPCConfig
from fedapc.decomposition import Layout, Norm, initial_base
from fedapc.engine import Channel, Fleet, LocalFleet, ProcessFleet, simulate
from fedapc.errors import ModelMismatchError, TaskError
from fedapc.report import Attention, Report
from fedapc.roles import Coordinator, Participant
from fedapc.server import Server
from fedapc.tasks import Task
from shared_core.device import resolve_device
from shared_core.errors import DAMAGE, InputError, no_such
from shared_core.objects import one_line
from shared_core.runs import Run, load_tree, save_tree

__all__ = ["FedAPC", "Federation", "Progress", "training_of"]

_Call = Callable[..., Any]

_KIND = "fedapc federation 1"


@dataclass(frozen=True)
class Progress:
    """Where a run is.

    Parameters
    ----------
    round, rounds : that are over, and all there are
    task : that the last round belonged to
    accuracy : mean on the tasks so far, when a task has just been finished, else NaN
    megabytes : sent so far, both ways
    """

    round: int
    rounds: int
    task: int
    accuracy: float
    megabytes: float


class Federation:
    """Clients with a sequence of tasks each, which learn together by one of the methods of `fedapc.METHODS`.

    Parameters
    ----------
    body : the network, whose last linear layer is the head; each task gets a head of its own. Or one by client, if
        clients differ in what is not shared
    method : see `fedapc.METHODS`
    config : of FedAPC. Default: the paper's
    training : of every other method. Default: that of `config`
    head : qualified name of the head. Default: the last linear layer
    exclude : qualified names of modules that are not shared, see `Layout.of`
    norm : what becomes of running statistics, see `Layout.of`
    start : ``fan-in``, the server draws the weights it begins with; ``module``, it takes those of `body`, e.g.
        pretrained ones
    seed : of everything random
    device : where clients compute: auto, cpu, cuda, cuda:N or mps

    Raises
    ------
    InputError
        For a network with nothing to share, another method.
    ModelMismatchError
        For clients whose shared layers differ.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> x, y = torch.randn(40, 8), torch.arange(40) % 2
    >>> task = Task(x + y[:, None], y, classes=2, test=(x + y[:, None], y))
    >>> report = Federation(net, "fedavg", config=FedAPCConfig(rounds=2)).fit({"a": [task], "b": [task]})
    >>> report.matrix.shape, report.ledger.total("values", direction="up") > 0
    ((2, 1, 1), True)
    """

    def __init__(
        self,
        body: nn.Module | Mapping[str, nn.Module],
        method: str = "fedapc",
        *,
        config: FedAPCConfig | None = None,
        training: Training | None = None,
        head: str | None = None,
        exclude: Sequence[str] = (),
        norm: Norm = "refuse",
        start: Start = "fan-in",
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        self.method = method
        self.config = config or FedAPCConfig()
        self.training = training or training_of(self.config)
        self.seed = seed
        self.device = resolve_device(device)
        self._start: Start = start
        given = dict(body) if isinstance(body, Mapping) else {"": body}
        if not given:
            raise InputError("body: no network; give one, or one by client")
        self._modules = {name: copy.deepcopy(module).to(self.device) for name, module in given.items()}
        self._layouts = {
            name: Layout.of(module, head=head, exclude=exclude, norm=norm) for name, module in self._modules.items()
        }
        self._check_layers()
        self._clients: dict[str, Participant] = {}
        self._server: Coordinator | None = None
        self._tasks: dict[str, tuple[str, ...]] = {}

    @property
    def clients(self) -> dict[str, Participant]:
        """The clients of the last run by name, as it left them; empty where they were in other processes."""
        return dict(self._clients)

    @property
    def server(self) -> Coordinator:
        """The server of the last run.

        Raises
        ------
        InputError
            Before the first run.
        """
        if self._server is None:
            raise InputError("nothing was learnt yet; call fit, or load what was saved")
        return self._server

    def fit(
        self,
        tasks: Mapping[str, Sequence[Task]],
        *,
        workers: int = 1,
        processes: int = 0,
        checkpoint: str | Path | Run | None = None,
        channel: Channel | None = None,
        on_round: Callable[[Progress], None] | None = None,
    ) -> Report:
        """Let every client learn its tasks, one after the other.

        Parameters
        ----------
        tasks : by client, in their order; their number may differ
        workers : threads that clients are spread over
        processes : that clients are spread over instead; they, and the networks, must be picklable. Method ``fedapc``
            only
        checkpoint : file that the run is kept in after every round, and taken up from if it is there; or a run folder,
            whose checkpoint it is
        channel : that answers go through, to try faults, see `fedapc.simulate`
        on_round : called after every round

        Raises
        ------
        TaskError, ModelMismatchError, InputError
            For tasks that cannot be learnt, or that the network cannot take.
        """
        self._check(tasks)
        if processes and self.method != "fedapc":
            raise InputError(f"processes: {processes}; method '{self.method}' runs in one, use workers")
        begun = time.perf_counter()
        own = {name: [self._placed(task) for task in tasks[name]] for name in sorted(tasks)}
        self._tasks = {name: tuple(task.name or str(k) for k, task in enumerate(own[name])) for name in own}
        with self._fleet(own, workers, processes) as (fleet, call, server):
            self._server = server
            watch = _Watch(own, server, call, self.method, begun)
            kept, keep = _kept(checkpoint)
            if kept is not None:
                watch.load(kept)

            def after(_: object) -> None:
                progress = watch.after_round()
                # Before the state is kept, so that a run folder's log has the rounds that its checkpoint has.
                if on_round is not None:
                    on_round(progress)
                keep(watch.state)

            simulate(fleet, server, channel=channel, after_round=after)
            return watch.report()

    def predict(
        self, client: str, x: Shaped[Tensor, "batch ..."], task: int, batch_size: int = 1000
    ) -> Float[Tensor, "batch classes"]:
        """Return logits of a client's task.

        Raises
        ------
        UnknownKeyError
            For a client or a task there is none of.
        """
        found = self._client(client).predict(x.to(self.device), task, batch_size)
        return found.cpu()

    def export(self, client: str, task: int) -> nn.Module:
        """Return a plain network with the weights of a client's task; it needs nothing of this package.

        Raises
        ------
        UnknownKeyError
            For a client or a task there is none of.
        """
        return self._client(client).export(task)

    def save(self, path: str | Path) -> None:
        """Write the clients, with all that is private to them, and the server to one safetensors file."""
        server = self.server
        save_tree(
            path,
            {
                "kind": _KIND,
                "method": self.method,
                "config": self.config.model_dump(),
                "seed": self.seed,
                "tasks": {name: list(names) for name, names in self._tasks.items()},
                "counts": dict(server.tasks),
                "server": server.state(),
                "clients": {name: client.state() for name, client in self._clients.items()},
            },
        )

    def load(self, path: str | Path, tasks: Mapping[str, Sequence[Task]] | None = None) -> None:
        """Take up what `save` wrote, into a federation of the same network.

        Parameters
        ----------
        path : of the file
        tasks : as given to `fit`. Default: none, which is enough to predict and to export

        Raises
        ------
        InputError
            For something else, or another network.
        """
        found = load_tree(path)
        if not isinstance(found, dict) or found.get("kind") != _KIND:
            raise InputError(f"{path}: is no saved federation; give a file that Federation.save wrote")
        try:
            self.method, self.seed = found["method"], found["seed"]
            self.config = FedAPCConfig(**found["config"])
            names = {name: list(tasks[name]) if tasks else [] for name in found["tasks"]}
            clients, server = self._make(names, found["counts"])
            server.load_state(found["server"])
            for client in clients:
                client.load_state(found["clients"][client.name])
            self._tasks = {name: tuple(kept) for name, kept in found["tasks"].items()}
        except InputError:
            raise
        except DAMAGE as error:
            raise InputError(f"{path}: is damaged, or of another release ({one_line(error)})") from error
        self._clients = {client.name: client for client in clients}
        self._server = server

    @classmethod
    def open(cls, path: str | Path, body: nn.Module | Mapping[str, nn.Module], **options: Any) -> Federation:
        """Make a federation of `body` and load what `save` wrote into it.

        Parameters
        ----------
        path : of the file
        body, options : as for `Federation`
        """
        made = cls(body, **options)
        made.load(path)
        return made

    def _client(self, name: str) -> Participant:
        if name not in self._clients:
            raise no_such("client", name, self._clients)
        return self._clients[name]

    def _module(self, client: str) -> nn.Module:
        if "" in self._modules:
            return self._modules[""]
        if client not in self._modules:
            raise ModelMismatchError(f"client '{client}': has no network; there are {', '.join(self._modules)}")
        return self._modules[client]

    def _layout(self, client: str) -> Layout:
        return self._layouts.get("") or self._layouts[client]

    def _check_layers(self) -> None:
        first, layers = next((name, layout.layers) for name, layout in self._layouts.items())
        for name, layout in self._layouts.items():
            for layer in {**layers, **layout.layers}:
                here, there = layout.layers.get(layer), layers.get(layer)
                if here != there:
                    raise ModelMismatchError(
                        f"client '{name}': layer {layer} has the shape {here}, that of client '{first}' {there};"
                        " what is shared must be the same everywhere"
                    )

    def _check(self, tasks: Mapping[str, Sequence[Task]]) -> None:
        if not tasks:
            raise TaskError("there are no clients; give each client's list of tasks")
        tried: set[tuple[int, tuple[int, ...], torch.dtype]] = set()
        for client, own in tasks.items():
            if not own:
                raise TaskError(f"client '{client}': has no tasks; leave it out, or give it some")
            module = self._module(client)
            for number, task in enumerate(own):
                key = (id(module), tuple(task.x.shape[1:]), task.x.dtype)
                if key in tried:
                    continue
                tried.add(key)
                fresh = copy.deepcopy(module).eval()
                try:
                    with torch.no_grad():
                        fresh(task.x[:2].to(self.device))
                except (RuntimeError, ValueError, IndexError) as error:
                    why = str(error).splitlines()[0]
                    raise ModelMismatchError(
                        f"client '{client}', task {number}: the network cannot take inputs of shape"
                        f" {tuple(task.x.shape[1:])} and type {task.x.dtype}: {why}"
                    ) from error

    def _placed(self, task: Task) -> Task:
        if self.device.type == "cpu":
            return task
        held, test = task.validation, task.test
        return replace(
            task,
            x=task.x.to(self.device),
            y=task.y.to(self.device),
            validation=held and (held[0].to(self.device), held[1].to(self.device)),
            test=test and (test[0].to(self.device), test[1].to(self.device)),
        )

    def _serve(self, counts: Mapping[str, int]) -> Server:
        name, module = next(iter(self._modules.items()))
        base = initial_base(module, self._layouts[name], self.seed, self._start)
        return Server(
            {layer: value.cpu() for layer, value in base.items()}, counts, seed=self.seed, **self.config.serving()
        )

    def _make(
        self, tasks: Mapping[str, Sequence[Task]], counts: Mapping[str, int]
    ) -> tuple[list[Participant], Coordinator]:
        if self.method == "fedapc":
            learning = self.config.learning()
            clients: list[Participant] = [
                Client(name, self._module(name), tasks[name], learning, layout=self._layout(name), seed=self.seed)
                for name in tasks
            ]
            return clients, self._serve(counts)
        if "" not in self._modules:
            raise InputError(f"method '{self.method}' takes one network for all clients")
        return build(
            self.method,
            self._modules[""],
            tasks,
            training=self.training,
            layout=self._layouts[""],
            rounds=self.config.rounds,
            fraction=self.config.fraction,
            seed=self.seed,
            start=self._start,
            counts=counts,
        )

    @contextmanager
    def _fleet(
        self, tasks: Mapping[str, Sequence[Task]], workers: int, processes: int
    ) -> Generator[tuple[Fleet, _Call, Coordinator]]:
        counts = {name: len(own) for name, own in tasks.items()}
        if not processes:
            clients, server = self._make(tasks, counts)
            self._clients = {client.name: client for client in clients}

            def call(name: str, method: str, *args: object) -> Any:
                return getattr(self._clients[name], method)(*args)

            yield LocalFleet(clients, workers), call, server
            return
        self._clients = {}
        making = partial(
            _make_client,
            modules={name: self._module(name) for name in tasks},
            layouts={name: self._layout(name) for name in tasks},
            tasks=tasks,
            config=self.config,
            seed=self.seed,
        )
        server = self._serve(counts)
        with ProcessFleet(making, list(tasks), processes) as fleet:
            yield fleet, fleet.call, server
            states = {name: fleet.call(name, "state") for name in tasks}
        for name, state in states.items():
            client = making(name)
            client.load_state(state)
            self._clients[name] = client


class FedAPC(Federation):
    """FedAPC, also known as FedWeIT: a shared base, sparse parts of every task, attention over those of others.

    After Yoon et al., "Federated Continual Learning with Weighted Inter-client Transfer", ICML 2021.

    Parameters
    ----------
    body, config, options : as for `Federation`

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> x, y = torch.randn(40, 8), torch.arange(40) % 2
    >>> task = Task(x + y[:, None], y, classes=2, test=(x + y[:, None], y))
    >>> federation = FedAPC(net, FedAPCConfig(rounds=2, batch_size=10))
    >>> report = federation.fit({"siteA": [task, task], "siteB": [task]})
    >>> report.matrix.shape, federation.export("siteA", task=1)(x).shape
    ((2, 2, 2), torch.Size([40, 2]))
    """

    def __init__(
        self, body: nn.Module | Mapping[str, nn.Module], config: FedAPCConfig | None = None, **options: Any
    ) -> None:
        super().__init__(body, "fedapc", config=config, **options)


class _Watch:
    """Measures clients whenever a task is finished, and keeps all that a restart needs."""

    def __init__(
        self, tasks: Mapping[str, Sequence[Task]], server: Coordinator, call: _Call, method: str, begun: float
    ) -> None:
        self._counts = {name: len(own) for name, own in tasks.items()}
        self._names = {name: tuple(task.name or str(k) for k, task in enumerate(own)) for name, own in tasks.items()}
        self._server = server
        self._call = call
        self._method = method
        self._begun = begun
        most = max(self._counts.values())
        self._matrix = np.full((len(tasks), most, most), np.nan)
        self._gains = np.full((len(tasks), most), np.nan)
        self._densities = np.full((len(tasks), most), np.nan)
        self._capacities = np.full(len(tasks), np.nan)
        self._attentions: dict[tuple[str, int], Attention] = {}

    def after_round(self) -> Progress:
        server = self._server
        task = (server.round - 1) // server.rounds
        found = float("nan")
        if server.round % server.rounds == 0:
            found = self._measure(task)
        sent = server.ledger.total("encoded_bytes") / 1e6
        return Progress(server.round, server.rounds * max(self._counts.values()), task, found, sent)

    def _measure(self, task: int) -> float:
        scores: list[float] = []
        for place, (name, count) in enumerate(self._counts.items()):
            if count <= task:
                continue
            row: list[float] = self._call(name, "evaluate")
            self._matrix[place, task, : task + 1] = row[: task + 1]
            scores += row[: task + 1]
            about: dict[str, Any] = self._call(name, "about", task)
            self._densities[place, task] = about["density"]
            self._capacities[place] = about["capacity"]
            if about["attention"]:
                self._attentions[name, task] = about["attention"]
                self._gains[place, task] = row[task] - about["accuracy_alone"]
        known = [score for score in scores if not np.isnan(score)]
        return float(np.mean(known)) if known else float("nan")

    def report(self) -> Report:
        return Report(
            tuple(self._counts),
            self._names,
            self._matrix,
            self._server.ledger.ordered(),
            self._attentions,
            self._gains,
            self._densities,
            self._method,
            time.perf_counter() - self._begun,
            self._capacities,
        )

    def state(self) -> dict[str, Any]:
        return {
            "kind": _KIND + " checkpoint",
            "method": self._method,
            "names": {name: list(names) for name, names in self._names.items()},
            "seconds": time.perf_counter() - self._begun,
            "matrix": self._matrix,
            "gains": self._gains,
            "densities": self._densities,
            "capacities": self._capacities,
            "attentions": [
                [client, task, layer, of, of_task, weight]
                for (client, task), layers in self._attentions.items()
                for layer, slots in layers.items()
                for (of, of_task), weight in slots.items()
            ],
            "server": self._server.state(),
            "clients": {name: self._call(name, "state") for name in self._counts},
        }

    def load(self, found: dict[str, Any]) -> None:
        names: dict[str, Any] = {name: list(kept) for name, kept in self._names.items()}
        if found["method"] != self._method or found["names"] != names:
            raise InputError("the checkpoint is of other clients, tasks or another method; name another file")
        self._begun = time.perf_counter() - found["seconds"]
        self._matrix, self._gains, self._densities, self._capacities = (
            np.array(found[name], dtype=np.float64) for name in ("matrix", "gains", "densities", "capacities")
        )
        self._attentions = {}
        for client, task, layer, of, of_task, weight in found["attentions"]:
            self._attentions.setdefault((client, task), {}).setdefault(layer, {})[of, of_task] = weight
        self._server.load_state(found["server"])
        for name in self._counts:
            self._call(name, "load_state", found["clients"][name])


def _kept(checkpoint: str | Path | Run | None) -> tuple[dict[str, Any] | None, Callable[[Callable[[], Any]], None]]:
    """Return what there is to go on from, and what keeps a state."""
    if checkpoint is None:
        return None, lambda _: None
    if isinstance(checkpoint, Run):
        return checkpoint.load_checkpoint(), lambda state: checkpoint.save_checkpoint(state())
    path = Path(checkpoint)
    found = load_tree(path) if path.exists() else None
    if path.exists() and (not isinstance(found, dict) or found.get("kind") != _KIND + " checkpoint"):
        raise InputError(f"{path}: is no checkpoint of a federation; name another file, or remove it")
    return found, lambda state: save_tree(path, state())


def training_of(config: FedAPCConfig) -> Training:
    """Return settings of the other methods that say the same as those of FedAPC.

    Parameters
    ----------
    config : of FedAPC
    """
    names = ("epochs", "batch_size", "optimizer", "lr", "patience", "lr_factor", "least_lr", "weight_decay")
    names = (*names, "kb_policy", "keep_unsent")
    return Training(**{name: getattr(config, name) for name in names}, learning=config.learning())


def _make_client(
    name: str,
    *,
    modules: Mapping[str, nn.Module],
    layouts: Mapping[str, Layout],
    tasks: Mapping[str, Sequence[Task]],
    config: FedAPCConfig,
    seed: int,
) -> Client:
    return Client(name, modules[name], tasks[name], config.learning(), layout=layouts[name], seed=seed)
