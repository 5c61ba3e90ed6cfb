"""A server of fedapc as a ServerApp."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from safetensors.torch import save_file

from fedapc.flower._flwr import Context, Grid, Result, Scalar, ServerApp
from fedapc.flower.strategy import Evaluate, FedAPCStrategy
from fedapc.server import Server
from shared_core.errors import InputError
from shared_core.runs import atomic_path, write_json

__all__ = ["server_app"]

_T = TypeVar("_T", str, int, float)
_log = logging.getLogger("flwr")


def server_app(
    build: Callable[[Context, Mapping[str, int]], Server],
    *,
    after: Callable[[FedAPCStrategy, Result], None] | None = None,
) -> ServerApp:
    """Make the app that runs a federation (spec 6.2).

    Keys of the run's configuration, ``[tool.flwr.app.config]`` or ``flwr run --run-config``:

    ==================  ========  ==================================================================================
    ``clients``         1         how many clients have to come before the server is made
    ``state-folder``    ``""``    where state and results are kept, as an absolute path of the SuperLink's machine;
                                  a run begun anew with the same folder goes on, in the round it was in
    ``timeout``         3600      seconds that a round waits for answers
    ``absence``         300       seconds that it waits for clients that no connected node answers for
    ``resend``          600       seconds after which an unanswered request is sent again
    ``poll``            1         seconds between two looks
    ``evaluate``        ``task``  when clients test themselves: at the end of each ``task``, each ``round``, ``never``
    ==================  ========  ==================================================================================

    When the federation has ended, the folder also has ``ledger.jsonl`` (every message), ``accuracy.json`` (by rounds
    that were over, client and task) and ``base.safetensors``.

    Parameters
    ----------
    build : makes the server of the context and the clients' numbers of tasks, by name
    after : called at the end

    Returns
    -------
    The app, for ``serverapp = "package.module:app"``.

    Examples
    --------
    >>> def build(context, tasks):
    ...     return Server(initial_base(network, Layout.of(network)), tasks, rounds=context.run_config["rounds"])
    >>> app = server_app(build)  # doctest: +SKIP
    """
    app = ServerApp()

    def main(grid: Grid, context: Context) -> None:
        config = context.run_config
        folder = _setting(config, "state-folder", "")
        strategy = FedAPCStrategy(
            lambda tasks: build(context, tasks),
            clients=_setting(config, "clients", 1),
            folder=folder or None,
            evaluate=cast("Evaluate", _setting(config, "evaluate", "task")),
            absence=_setting(config, "absence", 300.0),
            resend=_setting(config, "resend", 600.0),
            poll=_setting(config, "poll", 1.0),
        )
        result = strategy.start(grid, timeout=_setting(config, "timeout", 3600.0))
        _report(strategy)
        if folder:
            _write(Path(folder), strategy)
        if after is not None:
            after(strategy, result)

    app.main()(main)
    return app


def _setting(config: Mapping[str, Scalar], key: str, default: _T) -> _T:
    found: Any = config.get(key, default)
    wanted = type(default)
    if wanted is float and isinstance(found, int) and not isinstance(found, bool):
        found = float(found)
    if not isinstance(found, wanted) or isinstance(found, bool):
        raise InputError(f"run config {key}: {found!r}, expected {wanted.__name__}, such as {default!r}")
    return found


def _report(strategy: FedAPCStrategy) -> None:
    for client, found in strategy.accuracy.get(strategy.server.round, {}).items():
        _log.info("fedapc: %s: accuracy of its tasks: %s", client, " ".join(f"{value:.3f}" for value in found))
    events = strategy.server.ledger.events()
    _log.info("fedapc: %d events%s", len(events), "".join(f"; {e.event}: {e.client}: {e.note}" for e in events[:20]))


def _write(folder: Path, strategy: FedAPCStrategy) -> None:
    with atomic_path(folder / "ledger.jsonl") as temporary:
        temporary.write_text(strategy.server.ledger.ordered().to_jsonl(), encoding="utf-8")
    with atomic_path(folder / "base.safetensors") as temporary:
        save_file(strategy.server.base, temporary)
    accuracy = {
        str(now): {client: [None if math.isnan(value) else value for value in row] for client, row in found.items()}
        for now, found in strategy.accuracy.items()
    }
    write_json(folder / "accuracy.json", accuracy)
