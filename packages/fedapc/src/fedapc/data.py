"""Benchmarks: tasks of several clients, whose instances nobody shares, from real images or drawn (spec 4, 7).

A benchmark has a pool of tasks, of which every client learns some, in an order of its own. Clients that have the same
task have other instances of it: no row is with two clients, and test rows are with none. What clients are tested on
is the same for all of them. Users' own tasks are read by `read_tasks`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.nn import functional

from fedapc._dealing import Benchmark, Images, Pooled, Wanted, deal, divided, first_of_each, standardised
from fedapc._noniid import noniid50, noniid_mini, overlapped_cifar100
from fedapc._task_files import TaskFile, read_tasks, write_example
from fedapc.seeds import generator
from fedapc.tasks import Task
from shared_core.data import ImageData
from shared_core.data import load as load_shared
from shared_core.errors import InputError, no_such

__all__ = ["BENCHMARKS", "Benchmark", "TaskFile", "benchmark", "read_tasks", "write_example"]


def benchmark(
    name: str,
    *,
    clients: int | None = None,
    tasks: int | None = None,
    per_class: int | None = None,
    seed: int = 0,
    root: str | Path | None = None,
    **options: Any,
) -> Benchmark:
    """Make a benchmark by name; the same arguments give the same bits.

    Parameters
    ----------
    name : one of :data:`BENCHMARKS`
    clients : how many. Default: 4; of the paper's own two benchmarks 5
    tasks : of each client. Default: 4; of the paper's own 10
    per_class : training instances of each class of a task; a tenth as many more, at least one, are for validation.
        Default: 20; of the paper's own all there are
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
        raise no_such("benchmark", name, _BUILDERS)
    for what, number in (("clients", clients), ("tasks", tasks), ("per_class", per_class)):
        if number is not None and number < 1:
            raise InputError(f"{what}: {number}, expected at least 1")
    build, defaults = _BUILDERS[name]
    known = [p.name for p in inspect.signature(build).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            raise InputError(f"{option}: not an option of '{name}', which takes {', '.join(known) or 'none'}")
    wanted = Wanted(
        defaults[0] if clients is None else clients,
        defaults[1] if tasks is None else tasks,
        defaults[2] if per_class is None else per_class,
        seed,
        root,
    )
    return build(wanted, **options)


def _permutation(number: int, pixels: int) -> Int64[Tensor, " pixels"]:
    """Return one of the fixed orders of pixels, of which the first leaves them where they are."""
    if number == 0:
        return torch.arange(pixels)
    return torch.randperm(pixels, generator=generator(0, "benchmark", "pixels", number))


def _permuted(wanted: Wanted, images: Images, permutations: int) -> Benchmark:
    """Share out ten classes of flat images as five-way tasks with orders of pixels."""
    if permutations < 1:
        raise InputError(f"permutations: {permutations}, expected at least 1, which leaves pixels where they are")
    halves = {"0-4": (0, 1, 2, 3, 4), "5-9": (5, 6, 7, 8, 9)}
    pool = {
        f"{half}, pixels {number}": Pooled(
            f"{half}, pixels {number}", images, labels, _permutation(number, images.x.shape[1])
        )
        for number in range(permutations)
        for half, labels in halves.items()
    }
    assigned = {client: [pool[name] for name in wanted.drawn(list(pool), client)] for client in wanted.names}
    return deal(images.name, wanted, assigned, "mlp")


def _digits(wanted: Wanted, *, permutations: int = 4, test_share: float = 0.2) -> Benchmark:
    """Make five-way tasks of scikit-learn's digits, flattened to 64 numbers."""
    found = load_shared("digits", expect=ImageData, root=wanted.root)
    x = torch.from_numpy(found.images.reshape(len(found), -1)).float()
    y = torch.from_numpy(found.labels)
    train, test = divided(y, test_share, "digits")
    return _permuted(wanted, standardised("digits", (x[train], y[train]), (x[test], y[test])), permutations)


def _overlapped_mnist(
    wanted: Wanted, *, permutations: int = 4, pool_per_class: int = 500, test_per_class: int = 100
) -> Benchmark:
    """Make five-way tasks of MNIST, 14 x 14 means of 2 x 2 pixels, flattened."""
    parts: list[tuple[Tensor, Tensor]] = []
    for split, most in (("train", pool_per_class), ("test", test_per_class)):
        found = load_shared("mnist", split=split, expect=ImageData, root=wanted.root)
        rows = first_of_each(found.labels, most)
        pixels = torch.from_numpy(found.images[rows]).float()[:, None]
        parts.append((functional.avg_pool2d(pixels, 2).flatten(1), torch.from_numpy(found.labels[rows])))
    # Draws of instances follow from the name of the set: this one is that of the published figures.
    return _permuted(wanted, standardised("overlapped_mnist", parts[0], parts[1]), permutations)


def _gaussian(
    wanted: Wanted,
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
    per_class = 20 if wanted.per_class is None else wanted.per_class
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
            x, y = draw(name, per_class, random)
            held = draw(name, max(1, round(0.1 * per_class)), random)
            tasks[client].append(Task(x, y, classes, validation=held, test=tests[name], name=name))
            related[client, place] = name
    return Benchmark("gaussian", tasks, "mlp", related)


# Clients, tasks and instances of a class where a caller does not say.
_SMALL = (4, 4, 20)
_PAPER = (5, 10, None)
_BUILDERS: dict[str, tuple[Callable[..., Benchmark], tuple[int, int, int | None]]] = {
    "digits": (_digits, _SMALL),
    "overlapped-mnist": (_overlapped_mnist, _SMALL),
    "noniid-mini": (noniid_mini, _SMALL),
    "overlapped-cifar100": (overlapped_cifar100, _PAPER),
    "noniid50": (noniid50, _PAPER),
    "gaussian": (_gaussian, _SMALL),
}

BENCHMARKS: dict[str, str] = {
    "digits": "scikit-learn's 8 x 8 digits: {0-4, 5-9} with 4 fixed orders of pixels; needs no files",
    "overlapped-mnist": "500 MNIST digits of each class as 14 x 14: {0-4, 5-9} with 4 fixed orders of pixels",
    "noniid-mini": "16 x 16 grey images of digits and typefaces, and of MNIST, CIFAR-10, Omniglot, ... where they are",
    "overlapped-cifar100": "the paper's: 10 of the 20 superclasses of CIFAR-100 for each of 5 clients",
    "noniid50": "the paper's: 50 five-way tasks of eight sets for 5 clients",
    "gaussian": "drawn clusters; needs no files",
}
"""What :func:`benchmark` knows by name."""
