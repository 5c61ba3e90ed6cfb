"""What a federation learned: accuracies of every client after every task, bytes, and who listened to whom."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64
from pydantic import BaseModel, ConfigDict

from fedapc import metrics
from fedapc.ledger import Ledger
from shared_core.errors import InputError, UnknownKeyError, no_such
from shared_core.runs import atomic_path, read_document, write_json

__all__ = ["Attention", "Report", "plain_numbers"]

# By layer, then by the part listened to: its client and task.
Attention = dict[str, dict[tuple[str, int], float]]
_FILE, _LEDGER = "report.json", "ledger.jsonl"


@dataclass(frozen=True, eq=False)
class Report:
    """What `Federation.fit` returns.

    Parameters
    ----------
    clients : in their order, that of the first axis of `matrix`
    tasks : names of each client's tasks
    matrix : accuracies ``(clients, tasks, tasks)``: of a client on its task i after it finished its task t, in 0..1;
        NaN for ``i > t`` and tasks it has not
    ledger : of all messages
    attentions : by client and task, what the parts of others weigh
    gains : ``(clients, tasks)``, accuracy on a task when it was finished, less that without the parts of others
    capacities : ``(clients,)``, non-zeros of the base and of the parts of all tasks, relative to one network; NaN
        without parts
    densities : ``(clients, tasks)``, share of the entries of a task's part that are kept; NaN without parts
    method : that was run
    seconds : it took

    Examples
    --------
    >>> matrix = np.array([[[0.9, np.nan], [0.8, 0.7]]])
    >>> report = Report(("a",), {"a": ("first", "second")}, matrix, Ledger())
    >>> round(report.accuracy, 3), round(report.forgetting, 3)
    (0.75, 0.1)
    """

    clients: tuple[str, ...]
    tasks: Mapping[str, tuple[str, ...]]
    matrix: Float64[np.ndarray, "clients tasks tasks"]
    ledger: Ledger = field(repr=False)
    attentions: Mapping[tuple[str, int], Attention] = field(
        default_factory=dict[tuple[str, int], Attention], repr=False
    )
    gains: Float64[np.ndarray, "clients tasks"] = field(default_factory=lambda: np.zeros((0, 0)), repr=False)
    densities: Float64[np.ndarray, "clients tasks"] = field(default_factory=lambda: np.zeros((0, 0)), repr=False)
    method: str = "fedapc"
    seconds: float = 0.0
    capacities: Float64[np.ndarray, " clients"] = field(default_factory=lambda: np.zeros(0), repr=False)

    @property
    def accuracy(self) -> float:
        """Mean accuracy on all tasks of all clients when all is over."""
        return metrics.average_accuracy(self.matrix)

    @property
    def forgetting(self) -> float:
        """Mean over clients of what the best accuracy on earlier tasks is above the last."""
        return metrics.forgetting(self.matrix)

    @property
    def backward_transfer(self) -> float:
        """Mean change of the accuracy on a task since it was finished."""
        return metrics.backward_transfer(self.matrix)

    @property
    def learning_accuracy(self) -> float:
        """Mean accuracy on a task when it was finished."""
        return metrics.learning_accuracy(self.matrix)

    @property
    def transfer_gain(self) -> float:
        """Mean of `gains` over the tasks that received parts of others; NaN if none did."""
        known = self.gains[~np.isnan(self.gains)]
        return float(known.mean()) if known.size else float("nan")

    @property
    def density(self) -> float:
        """Mean share of the entries of the parts of tasks that are kept; NaN without parts."""
        known = self.densities[~np.isnan(self.densities)]
        return float(known.mean()) if known.size else float("nan")

    @property
    def capacity(self) -> float:
        """Mean of `capacities`: how many networks' weights a client holds at the end; NaN without parts."""
        known = self.capacities[~np.isnan(self.capacities)]
        return float(known.mean()) if known.size else float("nan")

    def attention(self, client: str, task: int) -> Attention:
        """Return what the parts of others weigh for a client's task, by layer; empty if it received none.

        Raises
        ------
        UnknownKeyError
            For a client or a task there is none of.
        """
        self._known(client, task)
        return self.attentions.get((client, task), {})

    def of_client(self, client: str) -> Float64[np.ndarray, "tasks tasks"]:
        """Return a client's own accuracies, without tasks it has not."""
        self._known(client, 0)
        count = len(self.tasks[client])
        return self.matrix[self.clients.index(client), :count, :count]

    def _known(self, client: str, task: int) -> None:
        if client not in self.clients:
            raise no_such("client", client, self.clients)
        if not 0 <= task < len(self.tasks[client]):
            raise UnknownKeyError(f"client '{client}' has no task {task}; it has 0..{len(self.tasks[client]) - 1}")

    def save(self, folder: str | Path) -> None:
        """Write ``report.json`` and ``ledger.jsonl`` into a folder."""
        write_json(
            Path(folder) / _FILE,
            {
                "method": self.method,
                "seconds": self.seconds,
                "clients": list(self.clients),
                "tasks": {client: list(names) for client, names in self.tasks.items()},
                "matrix": plain_numbers(self.matrix),
                "gains": plain_numbers(self.gains),
                "densities": plain_numbers(self.densities),
                "capacities": plain_numbers(self.capacities),
                "attention": [
                    {"client": client, "task": task, "layer": layer, "of": of, "of_task": of_task, "weight": weight}
                    for (client, task), layers in self.attentions.items()
                    for layer, slots in layers.items()
                    for (of, of_task), weight in slots.items()
                ],
            },
        )
        with atomic_path(Path(folder) / _LEDGER) as temporary:
            temporary.write_text(self.ledger.to_jsonl(), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Report:
        """Read what `save` wrote.

        Raises
        ------
        InputError
            For a folder without these files, or files that are damaged.
        """
        for name in (_FILE, _LEDGER):
            if not (Path(folder) / name).exists():
                raise InputError(f"{folder}: has no {name}; give the run folder of 'fedapc fit'")
        file, beside = Path(folder) / _FILE, Path(folder) / _LEDGER
        found = read_document(file, _Document, "a report of a federation")
        try:
            ledger = Ledger.from_jsonl(beside.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"{beside}: {error.strerror}; give the run folder of 'fedapc fit'") from error
        except UnicodeDecodeError as error:
            raise InputError(f"{beside}: byte {error.start} is not UTF-8 text; it is damaged") from error
        attentions: dict[tuple[str, int], Attention] = {}
        for row in found.attention:
            layers = attentions.setdefault((row.client, row.task), {})
            layers.setdefault(row.layer, {})[row.of, row.of_task] = row.weight
        try:
            tasks = {client: found.tasks[client] for client in found.clients}
            many, most = len(tasks), max(map(len, tasks.values()))
            return cls(
                found.clients,
                tasks,
                _array(found.matrix, (many, most, most)),
                ledger,
                attentions,
                _array(found.gains, (many, most)),
                _array(found.densities, (many, most)),
                found.method,
                found.seconds,
                _array(found.capacities, (many,)),
            )
        except (KeyError, ValueError) as error:
            raise InputError(f"{file} is not a report of a federation: {error}") from error


class _Weight(BaseModel):
    client: str
    task: int
    layer: str
    of: str
    of_task: int
    weight: float


class _Document(BaseModel):
    """What `Report.save` writes; null is NaN."""

    model_config = ConfigDict(extra="forbid")

    method: str
    seconds: float
    clients: tuple[str, ...]
    tasks: dict[str, tuple[str, ...]]
    matrix: list[list[list[float | None]]]
    gains: list[list[float | None]]
    densities: list[list[float | None]]
    capacities: list[float | None]
    attention: list[_Weight]


def plain_numbers(values: Float64[np.ndarray, "..."]) -> Any:
    """Return an array as lists, with none for NaN, which JSON has not.

    Parameters
    ----------
    values : of any shape

    Examples
    --------
    >>> plain_numbers(np.array([[1.0, np.nan]]))
    [[1.0, None]]
    """
    found = values.astype(object)
    found[np.isnan(values)] = None
    return found.tolist()


def _array(values: Any, shape: tuple[int, ...]) -> Float64[np.ndarray, "..."]:
    return np.array(values, dtype=object).astype(np.float64).reshape(shape)
