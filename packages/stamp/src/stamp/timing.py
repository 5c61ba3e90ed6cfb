"""Time forward passes of networks in turns, so that what disturbs one disturbs all (spec 9)."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from shared_core.errors import InputError

__all__ = ["Measure", "Timings", "as_inputs", "call_ms", "evaluating", "time_together"]

Measure = Callable[[nn.Module, tuple[Tensor, ...]], float]


def call_ms(module: nn.Module, inputs: tuple[Tensor, ...]) -> float:
    """Time one forward pass, in milliseconds, until the device has done it."""
    on_gpu = any(x.is_cuda for x in inputs)
    with torch.inference_mode():
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        module(*inputs)
        if on_gpu:
            torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - start)


@contextmanager
def evaluating(*models: nn.Module) -> Generator[None]:
    """Put networks into evaluation mode, and each of their modules back afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


@dataclass(frozen=True, eq=False)
class Timings:
    """What forward passes took, measured in turns.

    Parameters
    ----------
    samples : milliseconds of each pass, by the name of the network
    threads : of torch on the CPU
    device, dtype : of the example
    """

    samples: Mapping[str, Float64[Tensor, " repeats"]]
    threads: int
    device: str
    dtype: str

    def p50(self, name: str) -> float:
        """Return the median in milliseconds."""
        return self._quantile(name, 0.5)

    def p90(self, name: str) -> float:
        """Return the time in milliseconds that nine of ten passes keep within."""
        return self._quantile(name, 0.9)

    def speedup(self, slow: str, fast: str) -> float:
        """Return how many times faster, by the median, one is than the other."""
        return self.p50(slow) / self.p50(fast)

    def _quantile(self, name: str, q: float) -> float:
        return float(self.samples[name].quantile(q))


def time_together(
    modules: Mapping[str, nn.Module],
    example: Tensor | Sequence[Tensor],
    *,
    warmup: int = 10,
    repeats: int = 30,
    measure: Measure = call_ms,
) -> Timings:
    """Time networks in turns (A B A B ...), so that what disturbs one disturbs all.

    Parameters
    ----------
    modules : on the example's device; timed in evaluation mode, and put back
    example : a batch, or the tensors of several inputs
    warmup : rounds that do not count
    repeats : rounds that do
    measure : milliseconds of one pass of a module on the inputs

    Raises
    ------
    InputError
        For nothing to time.
    """
    if not modules or repeats < 1:
        raise InputError(f"modules has {len(modules)} entries and repeats={repeats}; time one or more, once or more")
    inputs = as_inputs(example)
    samples: dict[str, list[float]] = {name: [] for name in modules}
    with evaluating(*modules.values()):
        for k in range(warmup + repeats):
            for name, module in modules.items():
                taken = measure(module, inputs)
                if k >= warmup:
                    samples[name].append(taken)
    return Timings(
        {name: torch.tensor(values, dtype=torch.float64) for name, values in samples.items()},
        torch.get_num_threads(),
        str(inputs[0].device),
        _dtype(modules, inputs),
    )


def as_inputs(example: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the inputs of a network: a batch, or the tensors of several inputs."""
    return (example,) if isinstance(example, Tensor) else tuple(example)


def _dtype(modules: Mapping[str, nn.Module], inputs: tuple[Tensor, ...]) -> str:
    floating = (p for module in modules.values() for p in module.parameters() if p.is_floating_point())
    return str(next(floating, inputs[0]).dtype).removeprefix("torch.")
