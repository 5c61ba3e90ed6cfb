"""GGT: full-matrix adaptation over a window of the last gradients.

Agarwal, Bullins, Chen, Hazan, Singh, Zhang and Zhang, "Efficient Full-Matrix Adaptive Regularization", ICML 2019,
arXiv:1806.02958, section 2. The second-moment matrix of all d weights at once has the rank r of the window, so that its
root can be inverted through the r x r Gram matrix of the gradients.
"""

# The multi-tensor operations that torch's own optimizers are made of have private names.
# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT, StateDict

from blockdiag_opt.baselines.adabound import dense_gradients, parameter_name, refuse_complex, restore_precision
from shared_core.errors import InputError

__all__ = ["GGT", "window_weights"]

Number = float | int
# Singular values below this share of the largest are noise of the Gram matrix.
_CUTOFF = 1e-6
# Columns of the window that are taken to double precision at a time: few enough to stay in a processor's cache.
_CHUNK = 4096


def window_weights(
    gram: Float[Tensor, "slots slots"], along: Float[Tensor, " slots"], *, eps: Number, sgd_scale: Number
) -> Float[Tensor, " slots"]:
    """Find how much of each gradient of the window the direction holds.

    The direction of arXiv:1806.02958, section 2.2, is ``c v + U [(S + eps)^-1 - c] U^T v`` for ``G = U S W^T``. As
    ``U = G W S^-1``, its second part is ``G a`` with ``a = W [(S + eps)^-1 - c] S^-2 W^T (G^T v)``.

    Parameters
    ----------
    gram : G^T G, of the gradients with their decay, (slots, slots)
    along : G^T v, (slots,)
    eps : damping, added to the singular values
    sgd_scale : c, how much of ``v`` outside of the window's span is taken

    Returns
    -------
    Float[Tensor, " slots"]
        ``a``, in double precision, (slots,).

    Examples
    --------
    One gradient of length 5, and v equal to it: v is divided by 5.

    >>> one = torch.tensor([25.0])
    >>> window_weights(one[None], one, eps=0.0, sgd_scale=0.0)
    tensor([0.2000], dtype=torch.float64)
    """
    squares, W = torch.linalg.eigh(gram.double())
    S = squares.clamp(min=0).sqrt()
    kept = S.gt(_CUTOFF * S[-1])
    S, W = S[kept], W[:, kept]
    return W @ ((1 / (S + eps) - sgd_scale) / S.square() * (W.T @ along.double()))


class GGT(Optimizer):
    r"""Full-matrix adaptation: divide by the root of the sum of the last gradients' outer products.

    All parameters of a group are one vector of d weights. With the window :math:`G_t = [g_t, \beta_2 g_{t-1}, \ldots,
    \beta_2^{r-1} g_{t-r+1}]` and :math:`v_t` the moving mean of gradients, the step is
    :math:`x \leftarrow x - \alpha_t ((G_t G_t^T)^{1/2} + \epsilon I)^{-1} v_t`. A step takes O(d r) time, as the Gram
    matrix gains one row, and O(d r) memory: ``window`` numbers a weight.

    Parameters
    ----------
    params : parameters, named parameters, or dictionaries of groups; real, with dense gradients, each group on one
        device
    lr : learning rate, >= 0
    window : r, gradients that are kept, >= 1
    eps : damping, > 0, in the units of a gradient
    beta1 : decay rate of the mean of gradients, in [0, 1); 0 uses the gradient alone. The mean starts at 0 and is not
        corrected for it
    beta2 : decay rate of the window, in (0, 1]
    sgd_scale : factor of the part of v outside of the window's span, >= 0: 0 leaves it out, the learning rate of an SGD
        over ``lr`` gives that SGD there; None is the full-matrix method's 1 / eps
    weight_decay : L2 penalty, added to the gradient, >= 0
    maximize : ascend instead

    Raises
    ------
    InputError
        If an option is out of range or a parameter is not real; in `step`, if a gradient is sparse or not finite.

    Notes
    -----
    A parameter without gradient is left alone, and counts as 0 in the window. A step before which no parameter of a
    group has a gradient does not count. State is under the group's first parameter: ``window`` (r, d), ``gram`` (r, r),
    ``exp_avg`` (d,) and ``step``. Decay is applied to copies of the Gram matrix, never to the window.

    With 1 / eps outside of the span, whatever the mean still holds of gradients older than the window is magnified;
    that is what ``sgd_scale`` is for.

    Examples
    --------
    >>> weight = torch.nn.Parameter(torch.tensor([3.0, -4.0]))
    >>> optimizer = GGT([weight], lr=1.0, beta1=0.0)
    >>> (0.5 * weight.square().sum()).backward()
    >>> optimizer.step()
    >>> weight.detach()
    tensor([ 2.4000, -3.2000])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: Number | Tensor = 1e-3,
        window: int = 50,
        eps: Number = 1e-4,
        beta1: Number = 0.9,
        beta2: Number = 1.0,
        sgd_scale: Number | None = None,
        weight_decay: Number = 0.0,
        maximize: bool = False,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "window": window,
            "eps": eps,
            "beta1": beta1,
            "beta2": beta2,
            "sgd_scale": sgd_scale,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, which is adapted on its own.

        Parameters
        ----------
        param_group : ``params``, and any option of the constructor
        """
        super().add_param_group(param_group)
        number = len(self.param_groups) - 1
        try:
            _check_options(self.param_groups[-1], number)
            refuse_complex(self, number)
        except InputError:
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load what `state_dict` gave, numbers in the precision they were saved in.

        Parameters
        ----------
        state_dict : state and options of an optimizer with groups of the same sizes

        Raises
        ------
        InputError
            If a saved window is of another number of weights than its group.
        """
        for number, (group, saved) in enumerate(zip(self.param_groups, state_dict["param_groups"], strict=False)):
            weights = sum(parameter.numel() for parameter in group["params"])
            for key in saved["params"][:1]:
                shape = tuple(state_dict["state"].get(key, {}).get("window", torch.empty(0, weights)).shape)
                if shape[-1] != weights:
                    raise InputError(
                        f"group {number}: the checkpoint's window is of {shape[-1]} weights, this group has {weights};"
                        " make the optimizer with the parameters it was saved with"
                    )
        super().load_state_dict(state_dict)
        restore_precision(self, state_dict, on_cpu=("gram",))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Parameters
        ----------
        closure : evaluates the model again and returns the loss

        Returns
        -------
        Any
            What ``closure`` returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, group in enumerate(self.param_groups):
            found = dense_gradients(self, number)
            if found:
                self._step_group(number, group, found)
        return loss

    def _step_group(self, number: int, group: dict[str, Any], found: list[tuple[int, Tensor, Tensor]]) -> None:
        state = self._state(number, group)
        window: Tensor = state["window"]
        mean: Tensor = state["exp_avg"]
        sizes = [parameter.numel() for parameter in group["params"]]
        places = [place for place, _, _ in found]
        params = [parameter for _, parameter, _ in found]
        complete = len(found) == len(sizes)
        step = state["step"] + 1
        slot = (step - 1) % len(window)

        newest = window[slot]
        if not complete:
            newest.zero_()
        self._write_gradient(number, group, found, _views(newest, sizes, places))

        v = mean.lerp(newest, 1 - group["beta1"])
        if not complete:
            # Where there is no gradient, the mean waits, and is no part of the direction.
            for place, whole in enumerate(v.split(sizes)):
                if place not in places:
                    whole.zero_()
        filled = min(step, len(window))
        row, along = _dot(window[:filled], [newest, v])
        gram: Tensor = state["gram"]
        gram[slot, :filled] = gram[:filled, slot] = row
        torch._foreach_copy_(_views(mean, sizes, places), _views(v, sizes, places))
        state["step"] = step

        scale = 1 / group["eps"] if group["sgd_scale"] is None else float(group["sgd_scale"])
        ages = (slot - torch.arange(filled)) % len(window)
        decay = torch.pow(torch.tensor(float(group["beta2"]), dtype=torch.float64), ages)
        weights = decay * window_weights(
            decay[:, None] * gram[:filled, :filled] * decay, decay * along, eps=group["eps"], sgd_scale=scale
        )
        direction = _combine(window[:filled], weights.to(window.device), v, scale)
        updates = _views(direction, sizes, places)
        torch._foreach_add_(
            params, [u.view_as(p) for u, p in zip(updates, params, strict=True)], alpha=-float(group["lr"])
        )

    def _write_gradient(
        self, number: int, group: dict[str, Any], found: list[tuple[int, Tensor, Tensor]], rows: list[Tensor]
    ) -> None:
        """Write the gradients into their parts of the window's newest row, with penalty and sign."""
        for row, (_, _, gradient) in zip(rows, found, strict=True):
            row.view(gradient.shape).copy_(gradient)
        if group["maximize"]:
            torch._foreach_neg_(rows)
        if group["weight_decay"]:
            parameters = [p.reshape(-1).to(row.dtype) for row, (_, p, _) in zip(rows, found, strict=True)]
            torch._foreach_add_(rows, parameters, alpha=float(group["weight_decay"]))
        for row, (place, _, _) in zip(rows, found, strict=True):
            if not bool(row.isfinite().all()):
                raise InputError(
                    f"{parameter_name(self, number, place)}: its gradient is not finite; use torch.amp.GradScaler,"
                    " clip gradients, or lower lr"
                )

    def _state(self, number: int, group: dict[str, Any]) -> dict[str, Any]:
        first: Tensor = group["params"][0]
        state: dict[str, Any] = self.state[first]
        if not state:
            dtype = torch.float32
            for place, parameter in enumerate(group["params"]):
                dtype = torch.promote_types(dtype, parameter.dtype)
                if parameter.device != first.device:
                    raise InputError(
                        f"{parameter_name(self, number, place)}: it is on {parameter.device}, the group's first on"
                        f" {first.device}; give GGT one group for each device"
                    )
            weights = sum(parameter.numel() for parameter in group["params"])
            state["step"] = 0
            state["window"] = torch.zeros(group["window"], weights, dtype=dtype, device=first.device)
            state["gram"] = torch.zeros(group["window"], group["window"], dtype=torch.float64)
            state["exp_avg"] = torch.zeros(weights, dtype=dtype, device=first.device)
        return state


def _views(flat: Shaped[Tensor, " weights"], sizes: list[int], places: list[int]) -> list[Tensor]:
    parts = flat.split(sizes)
    return [parts[place] for place in places]


def _wide(tensor: Tensor) -> torch.dtype:
    """Give the type to add up in: double, where the device has it."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def _dot(window: Float[Tensor, "slots weights"], vectors: list[Tensor]) -> list[Tensor]:
    """Multiply without rounding to single precision: singular values are roots of differences of these products."""
    dtype = _wide(window)
    totals = [torch.zeros(len(window), dtype=dtype, device=window.device) for _ in vectors]
    parts = zip(*(vector.split(_CHUNK) for vector in vectors), strict=True)
    for columns, pieces in zip(window.split(_CHUNK, dim=1), parts, strict=True):
        wide = columns.to(dtype)
        for total, piece in zip(totals, pieces, strict=True):
            # Two products with vectors are faster than one with a matrix of two columns.
            total.addmv_(wide, piece.to(dtype))
    return [total.cpu().double() for total in totals]


def _combine(
    window: Float[Tensor, "slots weights"],
    weights: Float[Tensor, " slots"],
    v: Float[Tensor, " weights"],
    scale: float,
) -> Float[Tensor, " weights"]:
    """Give ``scale * v + weights @ window``, added up in double precision as large terms may cancel."""
    dtype = _wide(window)
    weights = weights.to(dtype)
    out = torch.empty_like(v)
    for columns, part, place in zip(window.split(_CHUNK, dim=1), v.split(_CHUNK), out.split(_CHUNK), strict=True):
        place.copy_(torch.addmv(part.to(dtype), columns.to(dtype).T, weights, beta=scale))
    return out


def _check_options(group: dict[str, Any], number: int) -> None:
    lr, window = group["lr"], group["window"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise InputError(f"group {number}: lr as a tensor must hold one number, got {lr.numel()}")
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise InputError(f"group {number}: window must be a whole number >= 1, got {window!r}")
    lr, sgd_scale = float(lr), group["sgd_scale"]
    for name, fits, wanted in (
        ("lr", 0 <= lr < math.inf, "a number >= 0"),
        ("eps", 0 < group["eps"] < math.inf, "a number > 0"),
        ("beta1", 0 <= group["beta1"] < 1, "in [0, 1)"),
        ("beta2", 0 < group["beta2"] <= 1, "in (0, 1]"),
        ("sgd_scale", sgd_scale is None or 0 <= sgd_scale < math.inf, "None or a number >= 0"),
        ("weight_decay", 0 <= group["weight_decay"] < math.inf, "a number >= 0"),
    ):
        if not fits:
            raise InputError(f"group {number}: {name} must be {wanted}, got {group[name]}")
