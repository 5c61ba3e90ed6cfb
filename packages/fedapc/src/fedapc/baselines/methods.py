"""All methods by name, and what each is made of: a client, a server, and settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor, nn

from fedapc.baselines.coordinators import DenseServer, LocalServer
from fedapc.baselines.ewc import ElasticWeights
from fedapc.baselines.fedcurv import Curvature, CurvatureServer
from fedapc.baselines.network import LocalClient, NetworkClient, initial_body
from fedapc.baselines.scaffold import ControlVariates, ScaffoldServer
from fedapc.baselines.strategy import Strategy
from fedapc.baselines.training import Training
from fedapc.choices import Start
from fedapc.client import Client, Learning
from fedapc.decomposition import Layout, initial_base
from fedapc.roles import Coordinator, Participant
from fedapc.server import Server
from fedapc.tasks import Task
from shared_core.errors import no_such

__all__ = ["METHODS", "MethodInfo", "build", "find_method"]

# Stable-SGD wants small batches: 10 to 32 (spec 3).
_SMALL_BATCH = 32


@dataclass(frozen=True)
class _Recipe:
    """How a method is made.

    Parameters
    ----------
    server : which; by default one for clients that learn alone
    strategy : of clients that do not decompose weights
    decomposed : settings in place of those of `Training.decomposed`, for clients that do
    proximal : with FedProx's term
    stable : with what makes Stable-SGD
    sgd : defined with SGD
    separate : every task has a body of its own
    """

    server: Literal["local", "dense", "scaffold", "fedcurv", "fedapc"] = "local"
    strategy: Callable[[Training], Strategy] = lambda _: Strategy()
    decomposed: Mapping[str, Any] | None = None
    proximal: bool = False
    stable: bool = False
    sgd: bool = False
    separate: bool = False


@dataclass(frozen=True)
class MethodInfo:
    """What there is to know of a method before it runs.

    Parameters
    ----------
    title : for tables
    kind : ``local`` methods send nothing
    description : in a sentence
    strength : the field of `Training` that is tuned besides the learning rate, if there is one
    grid : values to try for it
    recipe : what `build` makes it of
    """

    title: str
    kind: Literal["local", "federated"]
    description: str
    strength: str | None = None
    grid: tuple[float, ...] = ()
    recipe: _Recipe = field(default=_Recipe(), repr=False, compare=False)


def _elastic(training: Training) -> Strategy:
    return ElasticWeights(training.ewc_strength, training.ewc_mode, training.ewc_decay)


_EWC = (1.0, 10.0, 100.0, 1000.0, 5000.0)
_PROXIMAL = (1e-3, 1e-2, 1e-1, 1.0)
_CURVATURE = (1e-2, 1e-1, 1.0, 10.0, 100.0)
_DECAY = (0.6, 0.8, 1.0)
_ALONE = {"transfer": "none", "share_adaptive": False}
_AVERAGED = {**_ALONE, "upload_fraction": 1.0}

METHODS: dict[str, MethodInfo] = {
    "stl": MethodInfo(
        "Single-task",
        "local",
        "a fresh network for every task of every client: no forgetting, no sharing, and as many bodies as tasks",
        recipe=_Recipe(separate=True),
    ),
    "finetune": MethodInfo(
        "Fine-tuning",
        "local",
        "one body a client, trained on one task after the other, with nothing against forgetting",
    ),
    "ewc": MethodInfo(
        "EWC",
        "local",
        "elastic weight consolidation: weights that past tasks depend on move less",
        "ewc_strength",
        _EWC,
        _Recipe(strategy=_elastic),
    ),
    "apd": MethodInfo(
        "APD",
        "local",
        "additive parameter decomposition: FedAPC's shared base, masks and parts within a client, without a server",
        recipe=_Recipe(decomposed=_ALONE),
    ),
    "stable-sgd": MethodInfo(
        "Stable-SGD",
        "local",
        "SGD with dropout, small batches, and a learning rate that falls from task to task",
        "lr_decay_per_task",
        _DECAY,
        _Recipe(stable=True, sgd=True),
    ),
    "fedavg": MethodInfo(
        "FedAvg",
        "federated",
        "bodies averaged by the number of examples, heads local",
        recipe=_Recipe("dense"),
    ),
    "fedprox": MethodInfo(
        "FedProx",
        "federated",
        "FedAvg, and clients are held near the body that the round began with",
        "proximal",
        _PROXIMAL,
        _Recipe("dense", proximal=True),
    ),
    "scaffold": MethodInfo(
        "SCAFFOLD",
        "federated",
        "SGD with control variates against the drift of clients, at twice the traffic of FedAvg",
        recipe=_Recipe("scaffold", lambda _: ControlVariates(), sgd=True),
    ),
    "fedcurv": MethodInfo(
        "FedCurv",
        "federated",
        "FedAvg, and weights that other clients depend on move less, at three times the traffic",
        "curvature_strength",
        _CURVATURE,
        _Recipe("fedcurv", lambda training: Curvature(training.curvature_strength)),
    ),
    "fedavg-ewc": MethodInfo(
        "FedAvg-EWC",
        "federated",
        "FedAvg, and every client consolidates its own past tasks",
        "ewc_strength",
        _EWC,
        _Recipe("dense", _elastic),
    ),
    "fedprox-ewc": MethodInfo(
        "FedProx-EWC",
        "federated",
        "FedProx, and every client consolidates its own past tasks",
        "ewc_strength",
        _EWC,
        _Recipe("dense", _elastic, proximal=True),
    ),
    "fedavg-apd": MethodInfo(
        "FedAvg-APD",
        "federated",
        "FedAPC's decomposition with the base sent in full and averaged, and nothing else between clients",
        recipe=_Recipe("dense", decomposed=_AVERAGED),
    ),
    "fedprox-apd": MethodInfo(
        "FedProx-APD",
        "federated",
        "FedAvg-APD, and the base is held near what the round began with",
        "proximal",
        _PROXIMAL,
        _Recipe("dense", decomposed=_AVERAGED, proximal=True),
    ),
    "fedprox-stable-sgd": MethodInfo(
        "FedProx-Stable-SGD",
        "federated",
        "FedProx of clients that train by Stable-SGD",
        "lr_decay_per_task",
        _DECAY,
        _Recipe("dense", proximal=True, stable=True, sgd=True),
    ),
    "fedapc": MethodInfo(
        "FedAPC",
        "federated",
        "a shared base of which clients send a part, sparse parts of every task, attention over those of others",
        recipe=_Recipe("fedapc", decomposed={}),
    ),
    "fedapc-no-kb": MethodInfo(
        "FedAPC, nothing from others",
        "federated",
        "FedAPC without the parts of other clients",
        recipe=_Recipe("fedapc", decomposed=_ALONE),
    ),
    "fedapc-dense": MethodInfo(
        "FedAPC, base in full",
        "federated",
        "FedAPC with all rows of the base sent",
        recipe=_Recipe("fedapc", decomposed={"upload_fraction": 1.0}),
    ),
    "fedapc-mean": MethodInfo(
        "FedAPC, mean",
        "federated",
        "FedAPC with the mean of the parts of others in place of attention",
        recipe=_Recipe("fedapc", decomposed={"transfer": "mean"}),
    ),
    "fedapc-no-mask": MethodInfo(
        "FedAPC, no masks",
        "federated",
        "FedAPC with every gate open",
        recipe=_Recipe("fedapc", decomposed={"mask": False}),
    ),
    "fedapc-frozen": MethodInfo(
        "FedAPC, past parts frozen",
        "federated",
        "FedAPC whose parts of past tasks do not follow the base, as in the authors' code",
        recipe=_Recipe("fedapc", decomposed={"retroactive": "none"}),
    ),
    "fedapc-no-retention": MethodInfo(
        "FedAPC, no retention",
        "federated",
        "FedAPC whose parts of past tasks move freely, so that the L1 norm wears them off: it must forget",
        recipe=_Recipe("fedapc", decomposed={"retention": 0.0, "retroactive": "joint"}),
    ),
    "fedweit": MethodInfo(
        "FedWeIT",
        "federated",
        "FedAPC as in the paper: parts begin as a third of the base, attention begins at zero",
        recipe=_Recipe(
            "fedapc", decomposed={"adaptive_init": "scaled", "attention_init": "zeros", "attention_lr": 30.0}
        ),
    ),
}
"""Methods by name: those that the paper compares to, FedAPC, and FedAPC without one of its parts each."""


def find_method(name: str) -> MethodInfo:
    """Return what there is to know of a method.

    Parameters
    ----------
    name : of `METHODS`

    Raises
    ------
    UnknownKeyError
        That lists all.
    """
    if name not in METHODS:
        raise no_such("method", name, METHODS)
    return METHODS[name]


def build(
    method: str,
    module: nn.Module,
    tasks: Mapping[str, Sequence[Task]],
    *,
    training: Training | None = None,
    layout: Layout | None = None,
    rounds: int = 20,
    fraction: float = 1.0,
    seed: int = 0,
    start: Start = "fan-in",
    counts: Mapping[str, int] | None = None,
) -> tuple[list[Participant], Coordinator]:
    """Make the two sides of a federation, for `fedapc.simulate` and every other engine.

    All methods begin with the same weights, see batches in the same order, and train as many rounds.

    Parameters
    ----------
    method : of `METHODS`
    module : the network, whose last linear layer is the head; it is not changed
    tasks : by client, in their order
    training : how clients learn. Default: that of `Training`
    layout : of the network when its weights are decomposed. Default: read off it
    rounds, fraction, seed : see `fedapc.Server`; they hold for clients that learn alone too
    start : ``fan-in``, weights are drawn; ``module``, they are those of `module`, e.g. pretrained ones
    counts : how many tasks each client has. Default: those given; else these may be missing, e.g. to predict only

    Raises
    ------
    UnknownKeyError
        For another method.
    InputError
        For no clients, clients without tasks, numbers out of range, a network with nothing to share.

    Examples
    --------
    >>> import torch
    >>> from fedapc.engine import simulate
    >>> net = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> task = Task(torch.rand(20, 8), torch.arange(20) % 2, classes=2)
    >>> clients, server = build("fedavg", net, {"a": [task], "b": [task]}, rounds=2)
    >>> simulate(clients, server).total("values", direction="up") == 2 * 2 * (8 * 4 + 4)
    True
    """
    recipe, training = find_method(method).recipe, training or Training()
    layout = layout or Layout.of(module)
    counts = {name: len(own) for name, own in tasks.items()} if counts is None else counts
    draw = initial_body if recipe.decomposed is None else initial_base
    body = {name: value.cpu() for name, value in draw(module, layout, seed, start).items()}
    server = _serve(recipe, training, body, counts, {"rounds": rounds, "fraction": fraction, "seed": seed})
    if recipe.decomposed is None:
        return [_network_client(recipe, training, name, module, tasks[name], layout, seed) for name in tasks], server
    proximal = {"proximal": training.proximal} if recipe.proximal else {}
    learning = replace(training.decomposed(), **{**recipe.decomposed, **proximal})
    kind = LocalClient if recipe.server == "local" else Client
    return [kind(name, module, tasks[name], learning, layout=layout, seed=seed) for name in tasks], server


def _serve(
    recipe: _Recipe,
    training: Training,
    body: Mapping[str, Tensor],
    counts: Mapping[str, int],
    options: Mapping[str, Any],
) -> Server:
    match recipe.server:
        case "local":
            return LocalServer(body, counts, afresh=recipe.separate, **options)
        case "dense":
            return DenseServer(body, counts, **options)
        case "scaffold":
            return ScaffoldServer(body, counts, server_lr=training.server_lr, **options)
        case "fedcurv":
            return CurvatureServer(body, counts, **options)
        case "fedapc":
            alone = (recipe.decomposed or {}).get("transfer") == "none"
            policy = "none" if alone else training.kb_policy
            return Server(body, counts, kb_policy=policy, keep_unsent=training.keep_unsent, **options)


def _network_client(
    recipe: _Recipe,
    training: Training,
    name: str,
    module: nn.Module,
    tasks: Sequence[Task],
    layout: Layout,
    seed: int,
) -> NetworkClient:
    learning: Learning = training.sgd() if recipe.sgd else training.plain()
    if recipe.stable:
        learning = replace(learning, batch_size=min(learning.batch_size, _SMALL_BATCH))
    if recipe.proximal:
        learning = replace(learning, proximal=training.proximal)
    return NetworkClient(
        name,
        module,
        tasks,
        learning,
        strategy=recipe.strategy(training),
        layout=layout,
        seed=seed,
        dropout=training.dropout if recipe.stable else 0.0,
        lr_decay=training.lr_decay_per_task if recipe.stable else 1.0,
        separate=recipe.separate,
        shares=recipe.server != "local",
    )
