"""How instances of classes are dealt to clients, so that nobody shares one, and nobody trains on what is tested."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from fedapc.seeds import generator
from fedapc.tasks import Task
from shared_core.errors import InputError

__all__ = [
    "Benchmark",
    "Images",
    "Pooled",
    "Wanted",
    "deal",
    "divided",
    "evenly",
    "first_of_each",
    "rows_by_class",
    "standardised",
]


@dataclass(frozen=True, eq=False)
class Benchmark:
    """Tasks of the clients of a federation.

    Parameters
    ----------
    name : of the benchmark
    tasks : of each client, in the order that it learns them
    network : that fits, a name for `fedapc.networks.network`
    related : what underlies the task of a client, by its name and the task's place; clients with the same text have the
        same task, with other instances
    notes : what a reader should know: what was left out, what was used twice
    """

    name: str
    tasks: dict[str, list[Task]]
    network: str
    related: dict[tuple[str, int], str]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Wanted:
    """The arguments that all benchmarks have; `per_class` is none for all instances that there are."""

    clients: int
    tasks: int
    per_class: int | None
    seed: int
    root: str | Path | None

    @property
    def names(self) -> list[str]:
        """Clients, in an order that sorting keeps."""
        digits = len(str(self.clients - 1))
        return [f"client{number:0{digits}d}" for number in range(self.clients)]

    def drawn(self, pool: list[str], client: str) -> list[str]:
        """Draw which tasks of a pool a client has, in their order."""
        if self.tasks > len(pool):
            raise InputError(f"tasks: {self.tasks}, and there are {len(pool)} different ones; ask for at most these")
        order = torch.randperm(len(pool), generator=generator(self.seed, "benchmark", "tasks", client))
        return [pool[at] for at in order[: self.tasks].tolist()]


@dataclass(frozen=True, eq=False)
class Images:
    """Inputs to train on and inputs to test on, with the class of each: not only images.

    Large sets stay bytes, and what is dealt becomes ``(x - mean) / sd``.

    Parameters
    ----------
    name : of the set
    x : may be trained on
    y : classes of these, any numbers
    test_x : never trained on
    test_y : classes of these
    mean, sd : of the inputs, in shapes that broadcast to one
    """

    name: str
    x: Shaped[Tensor, "train ..."]
    y: Int64[Tensor, " train"]
    test_x: Shaped[Tensor, "test ..."]
    test_y: Int64[Tensor, " test"]
    mean: Float[Tensor, "..."]
    sd: Float[Tensor, "..."]


@dataclass(frozen=True, eq=False)
class Pooled:
    """A task of a pool.

    Parameters
    ----------
    name : different from all others of the pool
    images : of the set
    labels : classes of the set, in the order that the task numbers them
    order : of the inputs, none as they are
    """

    name: str
    images: Images
    labels: tuple[int, ...]
    order: Int64[Tensor, " inputs"] | None = None


def rows_by_class(y: Int64[Tensor, " n"]) -> dict[int, Int64[Tensor, " instances"]]:
    """Where each class is."""
    return {int(label): (y == label).nonzero().squeeze(1) for label in y.unique()}


def divided(y: Int64[Tensor, " n"], share: float, name: str) -> tuple[Int64[Tensor, " train"], Int64[Tensor, " test"]]:
    """Hold a share of each class out for testing, at least one: the same rows for every seed of a benchmark."""
    if not 0 < share < 1:
        raise InputError(f"test_share: {share}, expected more than 0 and less than 1")
    train: list[Tensor] = []
    test: list[Tensor] = []
    for label, rows in rows_by_class(y).items():
        shuffled = rows[torch.randperm(len(rows), generator=generator(0, "benchmark", "test", name, label))]
        held = max(1, round(share * len(rows)))
        test.append(shuffled[:held])
        train.append(shuffled[held:])
    return torch.cat(train).sort().values, torch.cat(test).sort().values


def standardised(name: str, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> Images:
    """Bring all that may be trained on to mean 0 and variance 1, by two numbers, and what is tested alike.

    Parameters
    ----------
    name : of the set
    train, test : inputs and classes
    """
    x = train[0].float()
    return Images(name, *train, *test, x.mean(), x.std(correction=0).clamp_min(1e-6))


def first_of_each(labels: Int64[np.ndarray, " n"], most: int | None) -> Int64[np.ndarray, " kept"]:
    """Return the places of the first so many of each class, in their order; all for none."""
    if most is not None and most < 1:
        raise InputError(f"{most} instances of a class, expected at least 1")
    kept = [np.flatnonzero(labels == label)[:most] for label in np.unique(labels)]
    return np.sort(np.concatenate(kept)).astype(np.int64)


class _Hands:
    """Instances of the classes of all sets, dealt to the clients that have a task with them."""

    def __init__(self, assigned: Mapping[str, Sequence[Pooled]], seed: int) -> None:
        uses: dict[tuple[str, int], dict[str, int]] = {}
        sets: dict[str, Images] = {}
        for client, tasks in assigned.items():
            for pooled in tasks:
                sets[pooled.images.name] = pooled.images
                for label in pooled.labels:
                    of = uses.setdefault((pooled.images.name, label), {})
                    of[client] = of.get(client, 0) + 1
        rows = {name: rows_by_class(images.y) for name, images in sets.items()}
        self._hands: dict[tuple[str, str, int], Int64[Tensor, " hand"]] = {}
        self._at: dict[tuple[str, str, int], int] = {}
        self._uses: dict[tuple[str, str, int], int] = {}
        self.repeats = False
        for (name, label), holders in uses.items():
            known = rows[name].get(label, torch.zeros(0, dtype=torch.int64))
            random = generator(seed, "benchmark", "instances", name, label)
            shuffled = known[torch.randperm(len(known), generator=random)]
            share = len(known) // len(holders)
            for number, (client, times) in enumerate(holders.items()):
                key = client, name, label
                self._hands[key] = shuffled[number * share : (number + 1) * share]
                self._at[key] = 0
                self._uses[key] = times

    def without_repeats(self, client: str, pooled: Pooled) -> int:
        """Return how many instances of each class there are for a task if none is used twice."""
        keys = [(client, pooled.images.name, label) for label in pooled.labels]
        return min(len(self._hands[key]) // self._uses[key] for key in keys)

    def most(self, client: str, pooled: Pooled) -> int:
        """Return how many instances of each class there are for a task."""
        return min(len(self._hands[client, pooled.images.name, label]) for label in pooled.labels)

    def take(self, client: str, pooled: Pooled, label: int, count: int) -> Int64[Tensor, " taken"]:
        """Return the next instances in a client's hand, from its beginning again when they run out."""
        key = client, pooled.images.name, label
        hand, at = self._hands[key], self._at[key]
        self._at[key] = at + count
        self.repeats |= at + count > len(hand)
        return hand[(at + torch.arange(count)) % len(hand)]


def deal(
    name: str,
    wanted: Wanted,
    assigned: Mapping[str, Sequence[Pooled]],
    network: str,
    notes: Sequence[str] = (),
    *,
    fewer: bool = False,
    held_share: float = 0.1,
) -> Benchmark:
    """Give clients the instances of their tasks.

    Parameters
    ----------
    name : of the benchmark
    wanted : its arguments
    assigned : tasks of each client
    network : that fits
    notes : of what was left out
    fewer : take what there is where `per_class` asks for more
    held_share : of all instances, those for validation, where `per_class` asks for all

    Raises
    ------
    InputError
        For more than there is, or so many clients that not two instances of a class are left for one.
    """
    hands = _Hands(assigned, wanted.seed)
    made: dict[str, list[Task]] = {}
    related: dict[tuple[str, int], str] = {}
    short: dict[str, int] = {}
    for client, tasks in assigned.items():
        made[client] = []
        for place, pooled in enumerate(tasks):
            most = hands.most(client, pooled)
            if wanted.per_class is None:
                count = hands.without_repeats(client, pooled)
                held_out = max(1, round(held_share * count))
            else:
                held_out = max(1, round(0.1 * wanted.per_class))
                count = wanted.per_class + held_out
            if fewer and count > most:
                count, held_out = most, max(1, round(most / 11))
                of = pooled.images.name.split()[0]
                short[of] = min(count - held_out, short.get(of, count))
            if count > most or count <= held_out:
                raise InputError(
                    f"per_class: {pooled.images.name} has {most} training instances of a class for '{client}', and"
                    f" {max(2, count)} are needed with those for validation; ask for fewer, or for fewer clients"
                )
            rows = {label: hands.take(client, pooled, label, count) for label in pooled.labels}
            made[client].append(_task(pooled, rows, held_out))
            related[client, place] = pooled.name
    again = ["instances of a client recur in its tasks of the same classes"] if hands.repeats else []
    less = [
        f"{of}: down to {count} training instances of a class, not {wanted.per_class}" for of, count in short.items()
    ]
    return Benchmark(name, made, network, related, (*notes, *less, *again))


def _task(pooled: Pooled, rows: Mapping[int, Int64[Tensor, " taken"]], held_out: int) -> Task:
    """Make a task of instances of its classes, the last of each for validation."""
    images = pooled.images
    number = {label: place for place, label in enumerate(pooled.labels)}
    train = torch.cat([rows[label][:-held_out] for label in pooled.labels])
    validation = torch.cat([rows[label][-held_out:] for label in pooled.labels])
    test = torch.isin(images.test_y, torch.tensor(pooled.labels)).nonzero().squeeze(1)

    def part(
        x: Shaped[Tensor, "n ..."], y: Shaped[Tensor, " n"], chosen: Shaped[Tensor, " k"]
    ) -> tuple[Tensor, Tensor]:
        inputs = (x[chosen].float() - images.mean) / images.sd
        inputs = inputs if pooled.order is None else inputs[:, pooled.order]
        return inputs, torch.tensor([number[label] for label in y[chosen].tolist()], dtype=torch.int64)

    return Task(
        *part(images.x, images.y, train),
        classes=len(pooled.labels),
        validation=part(images.x, images.y, validation),
        test=part(images.test_x, images.test_y, test) if len(test) else None,
        name=pooled.name,
    )


def evenly(pool: Sequence[Pooled], counts: Mapping[str, int], seed: int) -> dict[str, list[Pooled]]:
    """Deal the tasks of a pool so that one is given a second time only when all have been given once.

    Raises
    ------
    InputError
        For a client that is to have more tasks than there are.
    """
    if counts and max(counts.values()) > len(pool):
        raise InputError(
            f"tasks: {max(counts.values())}, and there are {len(pool)} different ones; ask for at most these"
        )
    shuffled = torch.randperm(len(pool), generator=generator(seed, "benchmark", "tasks")).tolist()
    given = [0] * len(pool)
    assigned: dict[str, list[Pooled]] = {client: [] for client in counts}
    held: dict[str, set[int]] = {client: set() for client in counts}
    for turn in range(max(counts.values(), default=0)):
        for client in (client for client, count in counts.items() if count > turn):
            free = [at for at in shuffled if at not in held[client]]
            chosen = min(free, key=given.__getitem__)
            given[chosen] += 1
            held[client].add(chosen)
            assigned[client].append(pool[chosen])
    return assigned
