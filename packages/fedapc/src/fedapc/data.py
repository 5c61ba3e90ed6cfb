"""Benchmarks: tasks of several clients, whose instances nobody shares, from real images or drawn (spec 7).

A benchmark has a pool of tasks, of which every client learns some, in an order of its own. Clients that have the same
task have other instances of it: no row is with two clients, and test rows are with none. What clients are tested on
is the same for all of them.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional

from fedapc.seeds import generator
from fedapc.tasks import Task
from shared_core.data import ImageData
from shared_core.data import load as load_shared
from shared_core.errors import InputError, UnknownKeyError

__all__ = ["BENCHMARKS", "Benchmark", "benchmark"]


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


def benchmark(
    name: str,
    *,
    clients: int = 4,
    tasks: int = 4,
    per_class: int = 20,
    seed: int = 0,
    root: str | Path | None = None,
    **options: Any,
) -> Benchmark:
    """Make a benchmark by name; the same arguments give the same bits.

    Parameters
    ----------
    name : one of :data:`BENCHMARKS`
    clients : how many
    tasks : of each client
    per_class : training instances of each class of a task; a tenth as many more, at least one, are for validation
    seed : of which tasks and which instances a client gets. What is tested on does not depend on it, nor how pixels are
        permuted
    root : folder of the data sets. Default: that of `shared_core.data`
    options : of this benchmark

    Raises
    ------
    UnknownKeyError
        For another name.
    InputError
        For numbers that the data cannot give, or an unknown option; `shared_core.data.MissingFilesError` for a set that
        is not there.

    Examples
    --------
    >>> made = benchmark("digits", clients=2, tasks=3)
    >>> made.tasks["client1"][0].x.shape, made.tasks["client1"][0].classes, made.related["client1", 0]
    (torch.Size([100, 64]), 5, '0-4, pixels 0')
    """
    if name not in _BUILDERS:
        raise UnknownKeyError(f"benchmark: there is no '{name}'; choose {', '.join(_BUILDERS)}")
    for what, number in (("clients", clients), ("tasks", tasks), ("per_class", per_class)):
        if number < 1:
            raise InputError(f"{what}: {number}, expected at least 1")
    build = _BUILDERS[name]
    known = [p.name for p in inspect.signature(build).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            raise InputError(f"{option}: not an option of '{name}', which takes {', '.join(known) or 'none'}")
    return build(_Wanted(clients, tasks, per_class, seed, root), **options)


@dataclass(frozen=True)
class _Wanted:
    """The arguments that all benchmarks have."""

    clients: int
    tasks: int
    per_class: int
    seed: int
    root: str | Path | None

    @property
    def held_out(self) -> int:
        """Instances of a class for validation."""
        return max(1, round(0.1 * self.per_class))

    @property
    def names(self) -> list[str]:
        digits = len(str(self.clients - 1))
        return [f"client{number:0{digits}d}" for number in range(self.clients)]

    def drawn(self, pool: list[str], name: str) -> list[str]:
        """Draw which tasks a client has, in their order."""
        if self.tasks > len(pool):
            raise InputError(f"tasks: {self.tasks}, and there are {len(pool)} different ones; ask for at most these")
        order = torch.randperm(len(pool), generator=generator(self.seed, "benchmark", "tasks", name))
        return [pool[at] for at in order[: self.tasks].tolist()]


class _Hands:
    """Instances of classes, dealt to clients so that nobody shares one.

    Parameters
    ----------
    rows : of every class, what may be trained on
    holders : clients to deal to
    seed : of the deal
    """

    def __init__(self, rows: Mapping[int, Int64[Tensor, " instances"]], holders: Sequence[str], seed: int) -> None:
        self._hands: dict[tuple[str, int], Int64[Tensor, " hand"]] = {}
        self._at: dict[tuple[str, int], int] = {}
        self.repeats = False
        for label, known in rows.items():
            random = generator(seed, "benchmark", "instances", label)
            shuffled = known[torch.randperm(len(known), generator=random)]
            share = len(known) // max(1, len(holders))
            for number, name in enumerate(holders):
                self._hands[name, label] = shuffled[number * share : (number + 1) * share]
                self._at[name, label] = 0

    def take(self, name: str, label: int, count: int, what: str) -> Int64[Tensor, " taken"]:
        """Return the next instances of a class in a client's hand, from its beginning again when they run out."""
        hand, at = self._hands[name, label], self._at[name, label]
        if count > len(hand):
            raise InputError(
                f"per_class: {what} has {len(hand)} training instances of a class for each client, and {count} are"
                " needed with those for validation; ask for fewer, or for fewer clients"
            )
        self._at[name, label] = at + count
        self.repeats |= at + count > len(hand)
        return hand[(at + torch.arange(count)) % len(hand)]


@dataclass(frozen=True, eq=False)
class _Images:
    """Images to train on and images to test on, with classes 0, 1, ..."""

    x: Float[Tensor, "train ..."]
    y: Int64[Tensor, " train"]
    test_x: Float[Tensor, "test ..."]
    test_y: Int64[Tensor, " test"]


def _by_class(y: Int64[Tensor, " n"]) -> dict[int, Int64[Tensor, " instances"]]:
    return {int(label): (y == label).nonzero().squeeze(1) for label in y.unique()}


def _scaled(images: _Images) -> _Images:
    """Bring all that may be trained on to mean 0 and variance 1, by two numbers, and the rest alike."""
    mean, sd = images.x.mean(), images.x.std(correction=0)
    return _Images((images.x - mean) / sd, images.y, (images.test_x - mean) / sd, images.test_y)


def _divided(y: Int64[Tensor, " n"], share: float) -> tuple[Int64[Tensor, " train"], Int64[Tensor, " test"]]:
    """Hold a share of each class out for testing, the same one for every seed of a benchmark."""
    train: list[Tensor] = []
    test: list[Tensor] = []
    for label, rows in _by_class(y).items():
        order = rows[torch.randperm(len(rows), generator=generator(0, "benchmark", "test", label))]
        held = max(1, round(share * len(rows)))
        test.append(order[:held])
        train.append(order[held:])
    return torch.cat(train).sort().values, torch.cat(test).sort().values


def _permutation(number: int, pixels: int) -> Int64[Tensor, " pixels"]:
    """Return one of the fixed orders of pixels, of which the first leaves them where they are."""
    if number == 0:
        return torch.arange(pixels)
    return torch.randperm(pixels, generator=generator(0, "benchmark", "pixels", number))


@dataclass(frozen=True)
class _Pooled:
    """A task of a pool: some of the classes, and one of the orders of pixels."""

    name: str
    labels: tuple[int, ...]
    permutation: int = 0


def _five_way_pool(permutations: int) -> dict[str, _Pooled]:
    halves = {"0-4": tuple(range(5)), "5-9": tuple(range(5, 10))}
    pool = [
        _Pooled(f"{half}, pixels {number}", labels, number)
        for number in range(permutations)
        for half, labels in halves.items()
    ]
    return {task.name: task for task in pool}


def _task(
    pooled: _Pooled,
    images: _Images,
    rows: Mapping[int, Int64[Tensor, " taken"]],
    held_out: int,
    permutation: Int64[Tensor, " pixels"] | None,
) -> Task:
    """Make a task of instances of its classes, the last of each for validation."""
    number = {label: place for place, label in enumerate(pooled.labels)}
    train = torch.cat([rows[label][:-held_out] for label in pooled.labels])
    validation = torch.cat([rows[label][-held_out:] for label in pooled.labels])
    test = torch.isin(images.test_y, torch.tensor(pooled.labels)).nonzero().squeeze(1)

    def part(x: Tensor, y: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        inputs = x[chosen] if permutation is None else x[chosen][:, permutation]
        return inputs, torch.tensor([number[label] for label in y[chosen].tolist()])

    return Task(
        *part(images.x, images.y, train),
        classes=len(pooled.labels),
        validation=part(images.x, images.y, validation),
        test=part(images.test_x, images.test_y, test),
        name=pooled.name,
    )


def _permuted(name: str, images: _Images, wanted: _Wanted, permutations: int, notes: Sequence[str]) -> Benchmark:
    """Share out ten classes of flat images as five-way tasks with orders of pixels."""
    pool = _five_way_pool(permutations)
    hands = _Hands(_by_class(images.y), wanted.names, wanted.seed)
    tasks: dict[str, list[Task]] = {client: [] for client in wanted.names}
    related: dict[tuple[str, int], str] = {}
    for client in wanted.names:
        for place, chosen in enumerate(wanted.drawn(list(pool), client)):
            pooled = pool[chosen]
            count = wanted.per_class + wanted.held_out
            rows = {label: hands.take(client, label, count, name) for label in pooled.labels}
            order = _permutation(pooled.permutation, images.x.shape[1])
            tasks[client].append(_task(pooled, images, rows, wanted.held_out, order))
            related[client, place] = chosen
    again = "instances of a client recur in its tasks of the same classes, with other orders of pixels"
    return Benchmark(name, tasks, "mlp", related, (*notes, *([again] if hands.repeats else [])))


def _digits(wanted: _Wanted, *, permutations: int = 4, test_share: float = 0.2) -> Benchmark:
    """Make five-way tasks of scikit-learn's digits, flattened to 64 numbers."""
    found = load_shared("digits", expect=ImageData, root=wanted.root)
    x = torch.from_numpy(found.images.reshape(len(found), -1)).float()
    y = torch.from_numpy(found.labels)
    train, test = _divided(y, test_share)
    return _permuted("digits", _scaled(_Images(x[train], y[train], x[test], y[test])), wanted, permutations, [])


def _overlapped_mnist(
    wanted: _Wanted, *, permutations: int = 4, pool_per_class: int = 500, test_per_class: int = 100
) -> Benchmark:
    """Make five-way tasks of MNIST, 14 x 14 means of 2 x 2 pixels, flattened."""
    parts: list[tuple[Tensor, Tensor]] = []
    for split, most in (("train", pool_per_class), ("test", test_per_class)):
        found = load_shared("mnist", split=split, expect=ImageData, root=wanted.root)
        rows = _first(found.labels, most)
        pixels = torch.from_numpy(found.images[rows]).float()[:, None]
        parts.append((functional.avg_pool2d(pixels, 2).flatten(1), torch.from_numpy(found.labels[rows])))
    return _permuted("overlapped_mnist", _scaled(_Images(*parts[0], *parts[1])), wanted, permutations, [])


def _first(labels: Int64[np.ndarray, " n"], most: int) -> Int64[np.ndarray, " kept"]:
    """Return the first so many of each class, in their order."""
    if most < 1:
        raise InputError(f"{most} instances of a class, expected at least 1")
    kept = [np.flatnonzero(labels == label)[:most] for label in np.unique(labels)]
    return np.sort(np.concatenate(kept)).astype(np.int64)


def _gaussian(
    wanted: _Wanted,
    *,
    inputs: int = 16,
    classes: int = 4,
    pool: int = 8,
    noise: float = 1.0,
    test_per_class: int = 50,
) -> Benchmark:
    """Draw tasks whose classes are two Gaussian clusters each, for which no file is needed."""
    if min(inputs, pool, test_per_class) < 1 or classes < 2 or not 0 < noise < math.inf:
        raise InputError(
            f"gaussian: {inputs} inputs, {classes} classes, pool {pool}, {test_per_class} for tests, noise {noise};"
            " expected at least 1 of each, 2 classes and a positive noise"
        )
    names = [f"clusters {number}" for number in range(pool)]

    def draw(name: str, count: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        centres = 2 * torch.randn(classes, 2, inputs, generator=generator(0, "benchmark", "centres", name))
        y = torch.arange(classes).repeat_interleave(count)
        which = torch.arange(len(y)) % 2
        return centres[y, which] + noise * torch.randn(len(y), inputs, generator=random), y

    tests = {name: draw(name, test_per_class, generator(0, "benchmark", "test", name)) for name in names}
    tasks: dict[str, list[Task]] = {}
    related: dict[tuple[str, int], str] = {}
    for client in wanted.names:
        tasks[client] = []
        for place, name in enumerate(wanted.drawn(names, client)):
            random = generator(wanted.seed, "benchmark", "instances", client, name)
            x, y = draw(name, wanted.per_class, random)
            held = draw(name, wanted.held_out, random)
            tasks[client].append(Task(x, y, classes, validation=held, test=tests[name], name=name))
            related[client, place] = name
    return Benchmark("gaussian", tasks, "mlp", related)


_BUILDERS: dict[str, Callable[..., Benchmark]] = {
    "digits": _digits,
    "overlapped_mnist": _overlapped_mnist,
    "gaussian": _gaussian,
}

BENCHMARKS: dict[str, str] = {
    "digits": "scikit-learn's 8 x 8 digits: {0-4, 5-9} with 4 fixed orders of pixels; needs no files",
    "overlapped_mnist": "500 MNIST digits of each class as 14 x 14: {0-4, 5-9} with 4 fixed orders of pixels",
    "gaussian": "drawn clusters; needs no files",
}
"""What :func:`benchmark` knows by name."""
