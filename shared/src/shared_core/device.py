"""Devices, seeds, precision, and the few process-group helpers that let any training scale out with ``torchrun``."""

from __future__ import annotations

import os
import random
from collections.abc import Generator, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, SupportsInt

from shared_core.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "World",
    "autocast",
    "deterministic",
    "generator",
    "one_thread",
    "process_group",
    "resolve_device",
    "seed_everything",
    "seeded",
]


def resolve_device(name: str = "auto") -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps`` into a device that is really there.

    ``auto`` takes the first of CUDA (this process's own under ``torchrun``), MPS, CPU.

    Raises
    ------
    InputError
        For an unknown name, or a device this machine does not have.

    Examples
    --------
    >>> resolve_device("cpu")
    device(type='cpu')
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, index = str(name).partition(":")
    if kind not in {"cpu", "cuda", "mps"} or (index and not index.isdigit()):
        raise InputError(f"unknown device '{name}': choose auto, cpu, cuda, cuda:N or mps")
    available = {
        "cpu": 1,
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
    }[kind]
    if not available or (index and int(index) >= available):
        raise InputError(f"device '{name}' is not on this machine ({available} of kind '{kind}'); try --device auto")
    if kind == "cuda" and not index:
        index = os.environ.get("LOCAL_RANK", "0")
    return torch.device(f"{kind}:{index}" if index and kind == "cuda" else kind)


def generator(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Make a seeded generator on `device`; the global random state is left alone."""
    import torch

    return torch.Generator(device=device).manual_seed(seed)


def seed_everything(seed: int) -> torch.Generator:
    """Seed Python, NumPy and torch for code that still draws from global state; return a generator for the rest."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)
    return generator(seed)


@contextmanager
def seeded(seed: SupportsInt | Sequence[int], *devices: torch.device) -> Generator[torch.Generator]:
    """Seed torch's global state inside the body, and restore it: initial weights, dropout and such draw from it.

    States of devices that are not named are neither touched nor restored, unlike by ``torch.manual_seed``.

    Parameters
    ----------
    seed : or several numbers, which are mixed: that of a run and of an epoch, say
    devices : besides the CPU

    Yields
    ------
    A generator on the CPU, seeded alike, for what takes one.

    Examples
    --------
    >>> import torch
    >>> before = torch.get_rng_state()
    >>> with seeded(3):
    ...     one = torch.nn.Linear(2, 1)
    >>> with seeded(3):
    ...     other = torch.nn.Linear(2, 1)
    >>> torch.equal(one.weight, other.weight), torch.equal(torch.get_rng_state(), before)
    (True, True)
    """
    import numpy as np
    import torch

    if isinstance(seed, Sequence):
        seed = int(np.random.SeedSequence(list(seed)).generate_state(1, np.uint64)[0]) >> 1
    # NumPy's integers are welcome too, as they are to `torch.manual_seed`.
    seed = int(seed)
    cards = [device for device in devices if device.type == "cuda"]
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=cards))
        torch.default_generator.manual_seed(seed)
        for card in cards:
            with torch.cuda.device(card):
                torch.cuda.manual_seed(seed)
        if any(device.type == "mps" for device in devices):
            stack.callback(torch.mps.set_rng_state, torch.mps.get_rng_state())
            torch.mps.manual_seed(seed)
        yield generator(seed)


@contextmanager
def deterministic(enabled: bool = True) -> Generator[None]:
    """Run the body with algorithms that give the same bits every time, where torch has them; then restore."""
    import torch

    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if enabled:
        # cuBLAS reads it when it makes its workspace.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(enabled, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextmanager
def one_thread(enabled: bool = True) -> Generator[None]:
    """Keep torch to one thread in the body: for small models a second only waits, for minutes where cores are busy.

    Parameters
    ----------
    enabled : False changes nothing

    Examples
    --------
    >>> import torch
    >>> with one_thread():
    ...     torch.get_num_threads()
    1
    """
    import torch

    before = torch.get_num_threads()
    if enabled:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def autocast(device: torch.device, precision: str = "float32") -> AbstractContextManager[object]:
    """Context in which matrix products run in `precision`: ``float32`` (off), ``bfloat16``, or ``auto``.

    ``auto`` is bfloat16 on CUDA devices that have it in hardware and float32 elsewhere. float16 is left out on
    purpose: it needs loss scaling, bfloat16 does not.
    """
    import torch

    if precision == "auto":
        precision = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    if precision not in {"float32", "bfloat16"}:
        raise InputError(f"unknown precision '{precision}': choose auto, float32 or bfloat16")
    return nullcontext() if precision == "float32" else torch.autocast(device.type, dtype=torch.bfloat16)


@dataclass(frozen=True)
class World:
    """One process among those that train together; a world of one needs no process group."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes files and prints."""
        return self.rank == 0

    def shard(self, length: int) -> slice:
        """Return the process's contiguous part of `length` things; parts differ in size by at most one."""
        return slice(length * self.rank // self.size, length * (self.rank + 1) // self.size)

    def all_reduce(self, tensors: Iterable[Tensor]) -> None:
        """Sum tensors over all processes, in place, in one message for each dtype and device."""
        import torch
        import torch.distributed as dist

        if self.size == 1:
            return
        groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor in tensors:
            groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        for group in groups.values():
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in group])
            dist.all_reduce(flat)
            for tensor, part in zip(group, flat.split([tensor.numel() for tensor in group]), strict=True):
                tensor.detach().copy_(part.view_as(tensor))

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Sum the gradients of `parameters` over all processes; a missing gradient counts as zero.

        With a loss that each process divides by the GLOBAL batch size, the result equals one process's gradient.
        """
        import torch

        if self.size == 1:
            return
        gradients: list[Tensor] = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        self.all_reduce(gradients)

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the first process's values, in place."""
        import torch.distributed as dist

        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)

    def barrier(self) -> None:
        """Wait until every process has come here."""
        import torch.distributed as dist

        if self.size > 1:
            dist.barrier()


@contextmanager
def process_group(device: torch.device, timeout: timedelta = timedelta(minutes=10)) -> Generator[World]:
    """Join the group ``torchrun`` started (nccl on CUDA, gloo elsewhere), or give a world of one.

    Examples
    --------
    >>> with process_group(resolve_device("cpu")) as world:
    ...     print(world)
    World(rank=0, size=1)
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    import torch
    import torch.distributed as dist

    if device.type == "cuda":
        torch.cuda.set_device(device)
    joined = not dist.is_initialized()
    if joined:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    try:
        yield World(dist.get_rank(), dist.get_world_size())
    finally:
        if joined:
            dist.destroy_process_group()
