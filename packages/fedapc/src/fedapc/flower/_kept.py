"""States in files that are there as a whole or not at all, and in what Flower keeps of a node."""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save

from fedapc.flower._flwr import Array, ArrayRecord, ConfigRecord, Context
from fedapc.flower._records import STATE
from fedapc.states import State
from shared_core.errors import InputError
from shared_core.runs import atomic_path

__all__ = ["STATE_DIR", "STATE_LIMIT", "ClientStore", "locked", "read_state", "write_state"]

STATE_DIR = "state-dir"
STATE_LIMIT = 64 * 2**20
_KEY = "fedapc"


def write_state(path: Path, state: State) -> int:
    """Write a state; a program killed meanwhile leaves the last one.

    Returns
    -------
    Its bytes.

    Raises
    ------
    InputError
        Where no file can be written.
    """
    blob = _packed(state)
    with atomic_path(path) as temporary:
        temporary.write_bytes(blob)
    return len(blob)


def read_state(path: Path) -> State | None:
    """Read what `write_state` wrote, None where nothing is.

    Raises
    ------
    InputError
        For a file that cannot be read, or is something else.
    """
    try:
        return load(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: no state of fedapc ({error}); move it away to begin anew") from error


@contextmanager
def locked(path: Path, waiting: Callable[[], None] = lambda: None) -> Generator[None]:
    """Have a file to oneself; that of a program that was killed is free.

    Parameters
    ----------
    path : which
    waiting : called when somebody else has it

    Raises
    ------
    InputError
        Where no file can be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("w")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; choose another folder") from error
    with lock:
        try:
            import fcntl
        except ImportError:  # Windows has none
            yield
            return
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class ClientStore:
    """State of a client between messages: in Flower's context, or in a file.

    A context survives rounds, and neither the end of the SuperNode nor of the run; simulation sends it to a worker and
    back with every message. A file in ``state-dir`` of the node's configuration survives both.

    Parameters
    ----------
    context : of the node
    federation : that the state belongs to; that of another one is not found
    client : whose
    limit : bytes from which on a state goes to a file in any case
    """

    def __init__(self, context: Context, federation: str, client: str, limit: int = STATE_LIMIT) -> None:
        self._context = context
        self._about = {"federation": federation, "client": client}
        self._limit = limit
        configured = context.node_config.get(STATE_DIR)
        self._always = configured is not None
        # Both names come over the network.
        parts = [urllib.parse.quote(f"{name}-state", safe="") for name in (federation, client)]
        self._file = _folder(configured).joinpath(*parts).with_suffix(".safetensors")

    @contextmanager
    def locked(self) -> Generator[None]:
        """Wait for the app of a SuperNode that was killed: it may still be training for a moment."""
        if not self._always:
            yield
            return
        with locked(self._file.with_suffix(".lock")):
            yield

    def read(self) -> State | None:
        """Return the state, None if there is none."""
        if self._always:
            return read_state(self._file)
        about = dict(self._context.state.config_records.get(_KEY, {}))
        if about.pop("in-file", None) is True:
            return read_state(self._file) if about == self._about else None
        if about != self._about:
            return None
        return load(self._context.state.array_records[f"{_KEY}.state"]["state"].data)

    def write(self, state: State) -> None:
        """Keep a state in place of the last."""
        if self._always:
            write_state(self._file, state)
            return
        blob = _packed(state)
        in_file = len(blob) >= self._limit
        kept = self._context.state
        with suppress(KeyError):
            del kept[f"{_KEY}.state"]
        if in_file:
            write_state(self._file, state)
        else:
            kept[f"{_KEY}.state"] = ArrayRecord({"state": Array("uint8", (len(blob),), STATE, blob)})
        kept[_KEY] = ConfigRecord({**self._about, **({"in-file": True} if in_file else {})})


def _packed(state: State) -> bytes:
    return save({name: value.contiguous() for name, value in state.items()})


def _folder(configured: object) -> Path:
    if configured is not None:
        if not isinstance(configured, str) or not configured:
            raise InputError(
                f"{STATE_DIR}: {configured!r}, expected a folder, as in --node-config 'state-dir=\"/srv/a\"'"
            )
        return Path(configured).expanduser()
    home = os.environ.get("FLWR_HOME")
    return (Path(home) if home else Path.home() / ".flwr") / "fedapc"
