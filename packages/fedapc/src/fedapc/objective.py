"""What a client minimises besides the cross-entropy, at a cost that past tasks do not add to (spec 2.3).

The retroactive penalty keeps what past tasks computed with, ``R_i = B * s_i + A_i``, at the anchor it had when the
task began. With ``D = B - B_anchor`` and ``C_i = A_i - A_i_anchor``,

    1/2 sum_i || D * s_i + C_i ||^2 = 1/2 sum_rows (sum_i s_i^2) ||D_row||^2 + 1/2 sum_i <C_i, C_i + 2 s_i * D>

so that the first term, all there is if the parts are frozen, is a weighted norm of one tensor, and the second lives on
the entries of the parts. `RetroactivePenalty.joint` is this sum, over the non-zeros of all past tasks at once.

`RetroactivePenalty.shared` costs the same for any number of tasks. The gradient in ``C_i`` is ``s_i * D + C_i``:
gradient descent from the anchor moves every part by ``C_i = -s_i * E`` with one and the same E, because
``C_i <- (1 - step) C_i - step * s_i * D`` is that recursion for ``E <- (1 - step) E + step * D``. With E in place of
the parts, and u the sum of ``s_i^2`` over the parts that an entry belongs to,

    1/2 sum (u * (D - E)^2 + (sum_i s_i^2 - u) * D^2)

is the penalty of all past tasks, exactly, on two tensors of the size of the base.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from fedapc.sparse import SparseTensor

__all__ = ["RetroactivePenalty", "l1_norm", "proximal_step", "soft_threshold"]


@dataclass(frozen=True, eq=False)
class RetroactivePenalty:
    """The penalty on changes of past tasks in one layer.

    Parameters
    ----------
    base : anchor of the base, ``(rows, ...)``
    row_weight : sum of the squared gates over past tasks, ``(rows,)``
    index, gates, values : places, gates and anchors of the entries of the parts of all past tasks, ``(entries,)``
    lengths : entries of each past task
    shared_weight : sum of the squared gates over the tasks to whose parts an entry belongs, ``(rows, ...)``
    """

    base: Float[Tensor, "rows ..."]
    row_weight: Float[Tensor, " rows"]
    index: Int64[Tensor, " entries"]
    gates: Float[Tensor, " entries"]
    values: Float[Tensor, " entries"]
    lengths: tuple[int, ...]
    shared_weight: Float[Tensor, "rows ..."]

    @classmethod
    def of(
        cls,
        base: Float[Tensor, "rows ..."],
        gates: Sequence[Float[Tensor, " rows"] | None],
        parts: Sequence[SparseTensor],
    ) -> RetroactivePenalty:
        """Take anchors from the base and the parts as they are.

        Parameters
        ----------
        base : before the new task's first base of the server is loaded
        gates : of each past task, none where they are open
        parts : of each past task; none at all for frozen tasks without parts
        """
        base = base.detach().clone()
        opened = [base.new_ones(len(base)) if gate is None else gate for gate in gates]
        row_weight = torch.stack(opened).double().square().sum(0) if opened else base.new_zeros(len(base)).double()
        none = torch.zeros(0, dtype=torch.int64, device=base.device)
        index = torch.cat([none, *(part.index for part in parts)])
        values = torch.cat([base.new_zeros(0), *(part.values for part in parts)])
        at = torch.cat([base.new_zeros(0), *(gate[part.rows()] for gate, part in zip(opened, parts, strict=False))])
        shared = torch.zeros(base.numel(), dtype=torch.float64, device=base.device)
        shared.index_add_(0, index, at.double().square())
        return cls(
            base,
            row_weight.to(base),
            index,
            at,
            values,
            tuple(len(part.index) for part in parts),
            shared.view(base.shape).to(base),
        )

    def frozen(self, base: Float[Tensor, "rows ..."]) -> Float[Tensor, ""]:
        """Return the penalty when the parts of past tasks stay as they are."""
        change = (base - self.base).flatten(1)
        return 0.5 * (change.square().sum(1) * self.row_weight).sum()

    def joint(self, base: Float[Tensor, "rows ..."], values: Float[Tensor, " entries"]) -> Float[Tensor, ""]:
        """Return the penalty when the entries of the parts are `values`."""
        change = values - self.values
        moved = (base - self.base).reshape(-1).index_select(0, self.index)
        return self.frozen(base) + 0.5 * (change * (change + 2 * self.gates * moved)).sum()

    def shared(self, base: Float[Tensor, "rows ..."], compensation: Float[Tensor, "rows ..."]) -> Float[Tensor, ""]:
        """Return the penalty when every part has moved by its gates times ``-compensation``."""
        change = base - self.base
        left = change - compensation
        # D^2 - (D - E)^2 = E (2 D - E): the weight of the rows stays a vector.
        traded = self.shared_weight * compensation * (change + left)
        return 0.5 * ((change.square().flatten(1).sum(1) * self.row_weight).sum() - traded.sum())

    def frozen_slope(self, base: Float[Tensor, "rows ..."]) -> Float[Tensor, "rows ..."]:
        """Return the gradient of `frozen`."""
        return (base - self.base) * self._by_row()

    def joint_slopes(
        self, base: Float[Tensor, "rows ..."], values: Float[Tensor, " entries"]
    ) -> tuple[Float[Tensor, "rows ..."], Float[Tensor, " entries"]]:
        """Return the gradient of `joint` in the base and in the values."""
        moved, change = base - self.base, values - self.values
        slope = moved * self._by_row()
        slope.view(-1).index_add_(0, self.index, self.gates * change)
        return slope, torch.addcmul(change, self.gates, moved.reshape(-1).index_select(0, self.index))

    def shared_slopes(
        self, base: Float[Tensor, "rows ..."], compensation: Float[Tensor, "rows ..."]
    ) -> tuple[Float[Tensor, "rows ..."], Float[Tensor, "rows ..."]]:
        """Return the gradient of `shared` in the base and in the compensation."""
        change = base - self.base
        slope = (change * self._by_row()).addcmul_(self.shared_weight, compensation, value=-1)
        return slope, change.sub_(compensation).mul_(self.shared_weight).neg_()

    def _by_row(self) -> Float[Tensor, "rows ..."]:
        return self.row_weight.view(-1, *[1] * (self.base.ndim - 1))

    def shared_l1_slope(self, compensation: Float[Tensor, "rows ..."]) -> Float[Tensor, "rows ..."]:
        """Return the gradient of the L1 norm of all past parts in the compensation, constant until a sign changes."""
        at = compensation.detach().reshape(-1).index_select(0, self.index)
        signs = (self.values - self.gates * at).sign()
        slope = torch.zeros_like(self.base).reshape(-1).index_add_(0, self.index, -self.gates * signs)
        return slope.view(self.base.shape)

    def split(self, values: Float[Tensor, " entries"]) -> list[SparseTensor]:
        """Give `values` back as the parts of the past tasks."""
        shape = tuple(self.base.shape)
        pairs = zip(self.index.split(self.lengths), values.detach().split(self.lengths), strict=True)
        return [SparseTensor(index, part, shape) for index, part in pairs] if self.lengths else []


def l1_norm(tensors: Iterable[Float[Tensor, "..."]]) -> Float[Tensor, ""]:
    """Sum of absolute values, with the subgradient 0 at 0."""
    return torch.stack([tensor.abs().sum() for tensor in tensors]).sum()


def soft_threshold(value: Float[Tensor, "*shape"], amount: float | Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Move towards zero by `amount`, and not beyond: the proximal map of the L1 norm.

    Examples
    --------
    >>> soft_threshold(torch.tensor([-2.0, 0.5, 3.0]), 1.0).tolist()
    [-1.0, 0.0, 2.0]
    """
    return value.sign() * (value.abs() - amount).clamp_min(0)


@torch.no_grad()
def proximal_step(optimizer: torch.optim.Optimizer, tensors: Iterable[Tensor], strength: float) -> None:
    """Follow a step of plain SGD or Adam by the proximal step of ``strength * ||.||_1``, in the same metric.

    Parameters
    ----------
    optimizer : after its step
    tensors : of its parameters, those to make sparse
    strength : coefficient of the norm
    """
    wanted = {id(tensor) for tensor in tensors}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in wanted:
                continue
            step = float(group["lr"])
            state = optimizer.state.get(parameter, {})
            if "exp_avg_sq" not in state:
                parameter.copy_(soft_threshold(parameter, step * strength))
                continue
            beta = group["betas"][1]
            scale = state["exp_avg_sq"].div(1 - math.pow(beta, float(state["step"]))).sqrt_().add_(group["eps"])
            parameter.copy_(soft_threshold(parameter, step * strength / scale))
