"""What the races share: optimizers by name, three models, gradients that look like real ones, and the clock.

Peers come from ``pip install pytorch-optimizer==4.1.0`` and, if wanted, ``heavyball``. Distributed Shampoo is installed
from its repository only; pytorch-optimizer's ``Shampoo`` and ``ScalableShampoo`` stand in for it.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

MODELS = ("mlp", "autoencoder", "cnn")


class PerTensorSVD(Optimizer):
    """The authors' loop, on a CPU: tensor by tensor, an SVD of every block at every step.

    AdaBlockW by the rules of the authors' released code (abcdxyzpqrst/blockopt), none of its text: weights leaving an
    input unit in chunks of ``block_size``, filters of 2 x 2 to 5 x 5, everything else diagonal; uncorrected moments
    with one scalar step; V + jitter I, then U diag(1 / (sqrt(s) + eps)) U^T. As theirs, it refuses a matrix that blocks
    do not divide.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        jitter: float = 1e-6,
        weight_decay: float = 0.0,
        block_size: int = 10,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "jitter": jitter,
                "weight_decay": weight_decay,
                "block_size": block_size,
            },
        )

    @staticmethod
    def to_blocks(tensor: Tensor, block_size: int) -> Tensor | None:
        """Cut a tensor into rows, one a block; None where the rule is diagonal."""
        if tensor.ndim == 2:
            size = min(block_size, tensor.shape[0])
            if tensor.numel() % size:
                raise ValueError(f"{tuple(tensor.shape)} cannot be cut into blocks of {size}")
            return tensor.t().reshape(-1, size)
        if tensor.ndim == 4 and 2 <= tensor.shape[-1] <= 5:
            return tensor.reshape(-1, tensor.shape[-2] * tensor.shape[-1])
        return None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                p.mul_(1 - group["lr"] * group["weight_decay"])
                g = self.to_blocks(p.grad, group["block_size"])
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(p.grad if g is None else g)
                    shape = p.shape if g is None else (len(g), g.shape[1], g.shape[1])
                    state["exp_avg_sq"] = p.new_zeros(shape)
                state["step"] += 1
                m, V = state["exp_avg"], state["exp_avg_sq"]
                size = group["lr"] * math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
                if g is None:
                    m.mul_(beta1).add_(p.grad, alpha=1 - beta1)
                    V.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                    p.addcdiv_(m, V.sqrt().add_(group["eps"]), value=-size)
                    continue
                m.mul_(beta1).add_(g, alpha=1 - beta1)
                V.mul_(beta2).add_(torch.bmm(g[:, :, None], g[:, None, :]), alpha=1 - beta2)
                U, s, _ = torch.linalg.svd(V + group["jitter"] * torch.eye(V.shape[1]))
                root = torch.bmm(U * (1 / (s.sqrt() + group["eps"]))[:, None, :], U.transpose(1, 2))
                update = torch.bmm(root, m[:, :, None])
                p.add_(update.reshape(p.t().shape).t() if p.ndim == 2 else update.view_as(p), alpha=-size)
        return loss


def make(name: str, params: Iterable[nn.Parameter], lr: float, **options: Any) -> Optimizer:
    """Make an optimizer: ``torch:Adam``, ``pytorch_optimizer:SOAP``, ``heavyball:SOAP``, ``peers:PerTensorSVD``, ours.

    Parameters
    ----------
    name : ``module:Class``, or a class of `blockdiag_opt` alone, such as ``BlockAdam``
    params : what it optimizes
    lr : learning rate
    options : for its constructor

    Raises
    ------
    SystemExit
        With one line, if it cannot be had.
    """
    home, _, kind = name.rpartition(":")
    homes = {"": "blockdiag_opt", "torch": "torch.optim"}
    if home == "peers":
        return globals()[kind](params, lr=lr, **options)
    try:
        return getattr(importlib.import_module(homes.get(home, home)), kind)(params, lr=lr, **options)
    except ModuleNotFoundError as error:
        raise SystemExit(f"{name}: {error.name} is not installed; pip install {error.name.replace('_', '-')}") from None
    except AttributeError as error:
        raise SystemExit(f"{name}: {error}") from None


def build_model(name: str, seed: int = 0) -> nn.Module:
    """Build ``mlp`` (101,000 weights), ``autoencoder`` (25,440) or ``cnn`` (2,664), the same for a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "mlp":
            return nn.Sequential(nn.Linear(196, 250), nn.Tanh(), nn.Linear(250, 200), nn.Tanh(), nn.Linear(200, 10))
        if name == "autoencoder":
            sizes = (196, 60, 16, 60, 196)
            layers: list[nn.Module] = []
            for before, after in itertools.pairwise(sizes):
                layers += [nn.Linear(before, after), nn.Tanh()]
            return nn.Sequential(*layers[:-1])
        if name == "cnn":
            return nn.Sequential(
                nn.Conv2d(1, 8, 3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Conv2d(8, 16, 3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Flatten(),
                nn.Linear(144, 10),
            )
    raise SystemExit(f"no model {name!r}; there are {', '.join(MODELS)}")


def make_gradients(model: nn.Module, count: int, seed: int = 0, batch: int = 32) -> list[list[Tensor]]:
    """Make a model's gradients: errors times correlated inputs over a batch, and one hundredth of white noise.

    The condition of the inputs' covariance is 1e3, as natural data may have; without noise a layer's gradient would
    have rank ``batch`` at most.
    """
    generator = torch.Generator().manual_seed(seed)
    mixers = {}
    for place, p in enumerate(model.parameters()):
        columns = p[0].numel() if p.ndim > 1 else 1
        basis = torch.linalg.qr(torch.randn(columns, columns, generator=generator)).Q
        mixers[place] = basis * torch.logspace(0, -1.5, columns)
    pool: list[list[Tensor]] = []
    for _ in range(count):
        gradients: list[Tensor] = []
        for place, p in enumerate(model.parameters()):
            columns = len(mixers[place])
            inputs = torch.randn(batch, columns, generator=generator) @ mixers[place].T
            errors = torch.randn(batch, p.numel() // columns, generator=generator)
            gradient = errors.T @ inputs / batch
            gradient += 0.01 * gradient.std(correction=0) * torch.randn(gradient.shape, generator=generator)
            gradients.append(gradient.reshape(p.shape))
        pool.append(gradients)
    return pool


@dataclass
class Contestant:
    """An optimizer that takes part: how a table calls it, and how `make` makes it."""

    label: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    lr: float = 1e-3


@dataclass
class Time:
    """Milliseconds of one ``step()``: the median over cycles, the fastest and the slowest tenth of cycles."""

    label: str
    model: str
    median_ms: float
    low_ms: float
    high_ms: float


def race(
    contestants: list[Contestant], model: str, steps: int, cycle: int = 1, seed: int = 0
) -> tuple[list[Time], list[Tensor]]:
    """Time ``step()`` alone, contestants taking turns, on the same gradients.

    Parameters
    ----------
    contestants : who takes part
    model : one of `MODELS`
    steps : of each contestant, after a warm-up of 3 steps, or of 21 cycles of more than one step
    cycle : steps that are timed as one, so that what an optimizer does every ``cycle`` steps is neither missed by the
        median nor all of it
    seed : of weights and gradients

    Returns
    -------
    tuple[list[Time], list[Tensor]]
        Times, and the weights each contestant arrived at, flattened.
    """
    networks = [build_model(model, seed) for _ in contestants]
    optimizers = [
        make(c.name, network.parameters(), c.lr, **c.options) for c, network in zip(contestants, networks, strict=True)
    ]
    pool = make_gradients(networks[0], 24, seed)
    # Our interval of K is in force from step 20 K on.
    warm_up, cycles = 3 if cycle == 1 else 21, max(2, math.ceil(steps / cycle))
    took: list[list[float]] = [[] for _ in contestants]
    for turn in range(warm_up + cycles):
        for place, (network, optimizer) in enumerate(zip(networks, optimizers, strict=True)):
            spent = 0.0
            for step in range(turn * cycle, (turn + 1) * cycle):
                # Some optimizers consume gradients.
                for p, gradient in zip(network.parameters(), pool[step % len(pool)], strict=True):
                    p.grad = gradient.clone()
                start = time.perf_counter()
                optimizer.step()
                spent += time.perf_counter() - start
            if turn >= warm_up:
                took[place].append(1e3 * spent / cycle)
    times = []
    for c, ms in zip(contestants, took, strict=True):
        tenths = statistics.quantiles(ms, n=10) if len(ms) > 1 else [ms[0]] * 9
        times.append(Time(c.label, model, statistics.median(ms), tenths[0], tenths[-1]))
    return times, [torch.cat([p.detach().flatten() for p in network.parameters()]) for network in networks]


def options_of(
    description: str, *, steps: int, intervals: list[int], block_sizes: list[int]
) -> argparse.ArgumentParser:
    """Make the parser with what all races have in common."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--steps", type=int, default=steps, help="steps of each contestant that are timed")
    parser.add_argument("--block-sizes", type=int, nargs="*", default=block_sizes, help="b")
    parser.add_argument("--intervals", type=int, nargs="*", default=intervals, help="K, steps between roots")
    parser.add_argument("--ours", default="BlockAdam", help="class of blockdiag_opt, or module:Class")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to a file, too")
    return parser


def ours(options: argparse.Namespace, label: str, **more: Any) -> Contestant:
    """Make our contestant; with another class than ours (``--ours torch:Adam``), without our options."""
    return Contestant(label, options.ours, {} if ":" in options.ours else more)


def print_times(title: str, times: list[Time]) -> None:
    print(f"\n{title}")
    print(f"{'':>34} {'ms a step':>10} {'10 %':>8} {'90 %':>8}")
    for t in times:
        print(f"{t.label:>34} {t.median_ms:10.3f} {t.low_ms:8.3f} {t.high_ms:8.3f}", flush=True)


def write_json(options: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    """Write results with what they were measured on, if the caller named a file."""
    if options.json is None:
        return
    document = {
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
        "torch": torch.__version__,
        "results": results,
    }
    options.json.write_text(json.dumps(document, indent=2) + "\n")


def as_result(times: list[Time], **facts: Any) -> dict[str, Any]:
    return {**facts, "times": [asdict(t) for t in times]}
