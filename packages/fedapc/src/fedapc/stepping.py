"""Steps of an optimizer without what surrounds them: for a small network that takes longer than the arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

__all__ = ["Steps"]

_Kernel = Callable[..., None]
# Settings, parameters, averages of their gradients and of the squares, steps taken.
_Group = tuple[dict[str, Any], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


class Steps:
    """Steps of an optimizer; of a fused Adam on the CPU by torch's kernel alone, with the same bits.

    ``torch.optim`` looks up states, sorts tensors by device and type, and asks hooks and the profiler at every step.
    The first step is the optimizer's own, and so is every step of another optimizer, or without some of the gradients.

    Parameters
    ----------
    optimizer : whose states and learning rates are used, and changed

    Examples
    --------
    >>> weight = torch.zeros(3, requires_grad=True)
    >>> steps = Steps(torch.optim.Adam([weight], lr=0.1, fused=True))
    >>> for _ in range(2):
    ...     steps.clear()
    ...     weight.sum().backward()
    ...     steps.take()
    >>> weight.detach()
    tensor([-0.2000, -0.2000, -0.2000])
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._parameters: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
        self._kernel = cast("_Kernel | None", getattr(torch, "_fused_adam_", None))
        self._groups: list[_Group] = []

    def clear(self) -> None:
        """Forget all gradients."""
        for parameter in self._parameters:
            parameter.grad = None

    @torch.no_grad()
    def take(self) -> None:
        """Take a step along the gradients there are."""
        if not self._groups or any(parameter.grad is None for parameter in self._parameters):
            self._optimizer.step()
            self._groups = self._read() if self._is_plain() else []
            return
        assert self._kernel is not None
        for group, parameters, averages, squares, counts in self._groups:
            for count in counts:
                count.add_(1)
            beta1, beta2 = group["betas"]
            self._kernel(
                parameters,
                [parameter.grad for parameter in parameters],
                averages,
                squares,
                [],
                counts,
                amsgrad=False,
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
                grad_scale=None,
                found_inf=None,
            )

    def _is_plain(self) -> bool:
        """Tell whether the kernel does all that the optimizer does."""
        return (
            self._kernel is not None
            and type(self._optimizer) is torch.optim.Adam
            and all(
                group["fused"] and not any(group.get(other) for other in ("amsgrad", "maximize", "differentiable"))
                for group in self._optimizer.param_groups
            )
            and all(p.device.type == "cpu" and "step" in self._optimizer.state.get(p, {}) for p in self._parameters)
            and len({p.dtype for p in self._parameters}) == 1
        )

    def _read(self) -> list[_Group]:
        found: list[_Group] = []
        for group in self._optimizer.param_groups:
            parameters: list[Tensor] = group["params"]
            states = [self._optimizer.state[parameter] for parameter in parameters]
            averages, squares, counts = ([of[name] for of in states] for name in ("exp_avg", "exp_avg_sq", "step"))
            if parameters:
                found.append((group, parameters, averages, squares, counts))
        return found
