"""A Flower project of a federation, which runs as it is: ``fedapc flower-app DIR``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from fedapc.config import FedAPCConfig
from fedapc.data import benchmark as make_benchmark
from fedapc.networks import network as make_network
from shared_core.errors import InputError
from shared_core.runs import atomic_path

__all__ = ["write_project"]


def write_project(
    folder: str | Path,
    *,
    benchmark: str = "digits",
    clients: int = 4,
    tasks: int = 4,
    per_class: int = 20,
    seed: int = 0,
    network: str | None = None,
    tasks_file: str | Path | None = None,
    config: FedAPCConfig | None = None,
) -> list[Path]:
    """Write a project that ``flwr run`` takes; Flower itself is not needed to write it.

    It holds ``pyproject.toml`` with all settings, ``fedapc_app`` with ``client_app.py``, ``server_app.py`` and
    ``task.py``, and ``README.md`` with the commands to simulate it, and to deploy it with TLS and authenticated nodes.

    Parameters
    ----------
    folder : to write to; it must not hold a project yet
    benchmark : whose tasks clients have, see `fedapc.data.benchmark`, if there is no `tasks_file`
    clients, tasks, per_class, seed : of the benchmark; the seed is that of training too
    network : see `fedapc.networks.network`. Default: the benchmark's, or that of the file
    tasks_file : a ``tasks.toml`` to learn the names of clients and the shape of inputs from. Deployed, every site has
        one of its own
    config : settings. Default: 5 rounds of 3 epochs a task, batches of 50, a learning rate of 0.0009

    Returns
    -------
    The files.

    Raises
    ------
    InputError
        For a folder that has a project, data that cannot be read, a network that does not take them.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp()) / "federation"
    >>> [str(path.relative_to(folder)) for path in write_project(folder, clients=2, tasks=2)]
    ['pyproject.toml', 'README.md', 'fedapc_app/__init__.py', 'fedapc_app/task.py', 'fedapc_app/client_app.py', \
'fedapc_app/server_app.py']
    """
    folder = Path(folder)
    if (folder / "pyproject.toml").exists() or (folder / "fedapc_app").exists():
        raise InputError(f"{folder}: has a project already; choose another folder, or remove it")
    config = config or FedAPCConfig.preset("probed", rounds=5, epochs=3, batch_size=50, lr=9e-4)
    file = "" if tasks_file is None else str(Path(tasks_file).expanduser().resolve())
    if file:
        from fedapc.data import read_tasks

        read = read_tasks(file)
        found, fits = read.tasks, read.network
    else:
        made = make_benchmark(benchmark, clients=clients, tasks=tasks, per_class=per_class, seed=seed)
        found, fits = made.tasks, made.network
    example = next(iter(found.values()))[0].x
    network = network or fits
    if network.partition(":")[0].endswith(".py"):
        network = str(Path(network).expanduser().resolve())
    make_network(network, example[:2], classes=2)
    shape = "x".join(str(side) for side in example.shape[1:])
    data: dict[str, Any] = {
        "tasks": file,
        "benchmark": benchmark,
        "benchmark-clients": len(found),
        "benchmark-tasks": tasks,
        "per-class": per_class,
        "network": network,
        "input-shape": shape,
        "seed": seed,
    }
    names = sorted(found)
    words = {
        "clients": str(len(names)),
        "settings": _settings(config),
        "data": _toml(data, _DATA_COMMENTS),
        "note": _FILE_NOTE if file else _BENCHMARK_NOTE,
        "node_one": f'client="{names[0]}"' if file else "partition-id=0",
        "node_two": (f'client="{names[1]}"' if file else "partition-id=1") if len(names) > 1 else "partition-id=0",
        "given": f'tasks="{file}" ' if file else "",
    }
    texts = {
        "pyproject.toml": _PYPROJECT,
        "README.md": _README,
        "fedapc_app/__init__.py": '"""Federated continual learning with fedapc."""\n',
        "fedapc_app/task.py": _TASK,
        "fedapc_app/client_app.py": _CLIENT,
        "fedapc_app/server_app.py": _SERVER,
    }
    paths: list[Path] = []
    for name, text in texts.items():
        path = folder / name
        with atomic_path(path) as temporary:
            temporary.write_text(_Marked(text).substitute(words), encoding="utf-8")
        paths.append(path)
    return paths


class _Marked(Template):
    # Shell commands are full of dollars.
    delimiter = "@@"


def _settings(config: FedAPCConfig) -> str:
    values: Mapping[str, Any] = config.model_dump()
    comments = {name: field.description or "" for name, field in type(config).model_fields.items()}
    return _toml(
        {name.replace("_", "-"): value for name, value in values.items()},
        {name.replace("_", "-"): comment for name, comment in comments.items()},
    )


def _toml(values: Mapping[str, Any], comments: Mapping[str, str]) -> str:
    """Write settings; JSON's strings, numbers and booleans are TOML's."""
    lines = [(f"{name} = {json.dumps(value)}", comments.get(name, "")) for name, value in values.items()]
    return "\n".join(f"{line}  # {comment}" if comment else line for line, comment in lines)


_DATA_COMMENTS = {
    "tasks": "a tasks.toml, unless a node names its own; if empty, the benchmark's tasks",
    "benchmark": "see fedapc.data.BENCHMARKS",
    "network": "mlp, lenet, resnet18, package.module:function or /path/to/file.py:function",
    "input-shape": "of one example",
}

_BENCHMARK_NOTE = """\
Node number n of the simulation is client n of the benchmark; in deployment, `partition-id` in a node's configuration
says which. To train on your own data, give every node a `tasks.toml` (the README of fedapc describes it) by
`tasks="/path/tasks.toml"` and its own name in that file by `client="siteA"`; in `pyproject.toml`, set `input-shape` to
the shape of one example and `clients` to the number of sites."""

_FILE_NOTE = """\
Clients are those of the `tasks.toml`, in the order of their names: node number n of the simulation is the n-th of them.
In deployment every site has a `tasks.toml` of its own, and names it and itself in its node's configuration."""

_PYPROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "fedapc-app"
version = "1.0.0"
description = "Federated continual learning with fedapc on Flower"
license = "Apache-2.0"
requires-python = ">=3.11"
# Nothing is installed when the app runs: `pip install 'fedapc[flower]'` on every machine before.
dependencies = []

[tool.hatch.build.targets.wheel]
packages = ["fedapc_app"]

[tool.flwr.app]
publisher = "fedapc"

[tool.flwr.app.components]
serverapp = "fedapc_app.server_app:app"
clientapp = "fedapc_app.client_app:app"

[tool.flwr.app.config]
# What the server waits for, see `fedapc.flower.server_app`.
clients = @@{clients}
state-folder = ""  # an absolute path on the SuperLink's machine; a run with the same folder goes on
evaluate = "task"  # or "round", or "never"
timeout = 3600.0  # seconds
absence = 300.0
resend = 600.0
poll = 1.0

# Data and network.
@@{data}

# The method, see `fedapc.FedAPCConfig`.
@@{settings}
"""

_TASK = '''\
"""What a client and the server have in common: tasks, the network, settings."""

import functools

import torch

from fedapc.config import FedAPCConfig
from fedapc.data import benchmark, read_tasks
from fedapc.networks import network
from shared_core.errors import InputError, no_such


def settings(context):
    """Settings of the method, from the run's configuration."""
    given = {key.replace("-", "_"): value for key, value in context.run_config.items()}
    known = {name: given[name] for name in FedAPCConfig.model_fields if name in given}
    return FedAPCConfig.preset("probed", **known)


def make_network(context):
    """The network, the same everywhere. The head's size here does not matter: every task gets its own."""
    shape = [int(side) for side in str(context.run_config["input-shape"]).split("x")]
    seed = int(context.run_config["seed"])
    return network(context.run_config["network"], torch.zeros(2, *shape), classes=2, seed=seed)


def client_tasks(context):
    """The name of this node's client, and its tasks."""
    path = context.node_config.get("tasks") or context.run_config["tasks"]
    found = _from_file(str(path)) if path else _from_benchmark(*_benchmark_of(context.run_config))
    name = context.node_config.get("client")
    if name is None:
        number = context.node_config.get("partition-id")
        names = sorted(found)
        if not isinstance(number, int) or not 0 <= number < len(names):
            raise InputError(f"partition-id {number!r} of the node: there are {len(names)} clients, counted from 0")
        name = names[number]
    if name not in found:
        raise no_such("client", name, sorted(found), where="the node's client")
    return name, found[name]


def _benchmark_of(config):
    return tuple(config[key] for key in ("benchmark", "benchmark-clients", "benchmark-tasks", "per-class", "seed"))


@functools.cache
def _from_file(path):
    return read_tasks(path).tasks


@functools.cache
def _from_benchmark(name, clients, tasks, per_class, seed):
    return benchmark(name, clients=clients, tasks=tasks, per_class=per_class, seed=seed).tasks
'''

_CLIENT = '''\
"""What runs on a node."""

from fedapc import Client
from fedapc.flower import client_app

from fedapc_app.task import client_tasks, make_network, settings


def build(context):
    """Make this node's client, before its first task."""
    name, tasks = client_tasks(context)
    seed = int(context.run_config["seed"])
    return Client(name, make_network(context), tasks, settings(context).learning(), seed=seed)


app = client_app(build)
'''

_SERVER = '''\
"""What runs at the server: it never sees data, only the bytes that `fedapc.Client` sends."""

from fedapc import Layout, Server, initial_base
from fedapc.flower import server_app

from fedapc_app.task import make_network, settings


def build(context, tasks):
    """Make the server, of the clients' numbers of tasks."""
    net = make_network(context)
    seed = int(context.run_config["seed"])
    return Server(initial_base(net, Layout.of(net), seed), tasks, seed=seed, **settings(context).serving())


app = server_app(build)
'''

_README = """\
# A federation of fedapc on Flower

@@{note}

Every machine needs `pip install 'fedapc[flower]'`; simulation `pip install 'fedapc[flower-simulation]'`. Flower sends
usage statistics unless told not to: `export FLWR_TELEMETRY_ENABLED=0`.

## Simulated on one machine

```bash
flwr run . --stream --federation-config "num-supernodes=@@{clients} client-resources-num-cpus=1"
```

Settings of the run are in `pyproject.toml`; `--run-config 'rounds=2 state-folder="/tmp/federation"'` overrides them.
With a state folder, results are left there: `ledger.jsonl`, `accuracy.json`, `base.safetensors`. `flwr run` leaves a
`flower-superlink` running in the background for the next run; end it when you are done.

## Deployed, with TLS and authenticated nodes

Make certificates to try it; in earnest they come from your authority, and each site makes its own key
(`ssh-keygen -t ecdsa -b 384 -N "" -f node1`) and hands over `node1.pub`:

```bash
python -m fedapc.flower.certificates certificates --host server.example.org --node node1 --node node2
```

The server, which everybody reaches at port 8000:

```bash
flower-superlink --host 0.0.0.0 --port 8000 --enable-supernode-auth --disable-runtime-dependency-installation \\
    --ssl-ca-certfile certificates/ca.crt --ssl-certfile certificates/server.pem \\
    --ssl-keyfile certificates/server.key --database superlink.db
```

Whoever starts runs has a connection to it in `~/.flwr/config.toml` (or `$FLWR_HOME/config.toml`):

```toml
[superlink]
default = "deployed"

[superlink.deployed]
address = "server.example.org:8000"
root-certificates = "/path/to/certificates/ca.crt"
```

and registers the nodes' public keys, once:

```bash
flwr supernode register certificates/node1.pub deployed
flwr supernode register certificates/node2.pub deployed
```

Each site, with its own key. `state-dir` is where the client's private state is kept, so that it survives restarts; a
second SuperNode on one machine needs another `--port`, such as 9095:

```bash
flower-supernode --superlink server.example.org:8000 --root-certificates certificates/ca.crt \\
    --auth-supernode-private-key certificates/node1 --port 9094 \\
    --node-config '@@{node_one} @@{given}state-dir="/srv/fedapc/node1"'
flower-supernode --superlink server.example.org:8000 --root-certificates certificates/ca.crt \\
    --auth-supernode-private-key certificates/node2 --port 9095 \\
    --node-config '@@{node_two} @@{given}state-dir="/srv/fedapc/node2"'
```

Then run it:

```bash
flwr run . deployed --stream --run-config 'state-folder="/srv/fedapc/server"'
```

A site that goes away is waited for (`absence` seconds), and asked again when it is back. A SuperNode that was killed is
let in again when the SuperLink has missed its heartbeats for a minute: have it started until it stays. If the server
itself was stopped, start the SuperLink again and repeat `flwr run` with the same `state-folder`: the run goes on in the
round it was in, and ends with the same bits. Give another folder to begin anew.
"""
