"""AdaBound and AMSBound: Adam whose elementwise step sizes are squeezed between bounds that meet at that of SGD.

Luo, Xiong, Liu and Sun, "Adaptive Gradient Methods with Dynamic Bound of Learning Rate", ICLR 2019, arXiv:1902.09843.
Spectrum clipping of block-diagonal methods is the same idea on eigenvalues; with blocks of one weight the two agree.
"""

# The multi-tensor operations that torch's own optimizers are made of have private names.
# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT, StateDict

from blockdiag_opt.clip import SpectrumClip
from shared_core.errors import InputError

__all__ = ["AMSBound", "AdaBound", "dense_gradients", "restore_precision", "step_size_bounds"]

Number = float | int


def step_size_bounds(step: Number, *, final_lr: Number, gamma: Number) -> tuple[float, float]:
    """Give the bounds between which every effective step size lies at a step.

    Arxiv:1902.09843, section 4: ``final_lr (1 - 1 / (gamma t + 1))`` and ``final_lr (1 + 1 / (gamma t))``.

    Parameters
    ----------
    step : t, counted from 1
    final_lr : where both bounds end, the learning rate of the SGD that the method turns into
    gamma : how fast they get there, per step

    Returns
    -------
    tuple[float, float]
        The lower bound and the upper bound.

    Examples
    --------
    >>> step_size_bounds(1000, final_lr=0.1, gamma=1e-3)
    (0.05, 0.2)
    """
    return SpectrumClip(final_lr, gamma).bounds(step)


def dense_gradients(optimizer: Optimizer, number: int) -> list[tuple[int, Tensor, Tensor]]:
    """List the parameters of a group that have a gradient: place in the group, parameter, gradient.

    Parameters
    ----------
    optimizer : whose group it is
    number : the group's place in ``optimizer.param_groups``

    Raises
    ------
    InputError
        If a gradient is sparse.
    """
    found: list[tuple[int, Tensor, Tensor]] = []
    for place, parameter in enumerate(optimizer.param_groups[number]["params"]):
        gradient = parameter.grad
        if gradient is None:
            continue
        if gradient.layout != torch.strided:
            raise InputError(
                f"{parameter_name(optimizer, number, place)}: {type(optimizer).__name__} cannot use a sparse gradient;"
                " make the embedding with sparse=False, or give it to torch.optim.SparseAdam"
            )
        found.append((place, parameter, gradient))
    return found


def parameter_name(optimizer: Optimizer, number: int, place: int) -> str:
    """Name a parameter in a message: by its own name, if the optimizer was given names, else by its place."""
    names = optimizer.param_groups[number].get("param_names")
    return f"parameter '{names[place]}'" if names else f"parameter {place} of group {number}"


def refuse_complex(optimizer: Optimizer, number: int) -> None:
    """Raise `InputError` if a group holds a complex parameter."""
    for place, parameter in enumerate(optimizer.param_groups[number]["params"]):
        if not parameter.is_floating_point():
            raise InputError(
                f"{parameter_name(optimizer, number, place)}: {type(optimizer).__name__} needs real floating-point"
                f" parameters, got {parameter.dtype}; optimize torch.view_as_real of a complex one"
            )


def restore_precision(optimizer: Optimizer, state_dict: StateDict, *, on_cpu: tuple[str, ...]) -> None:
    """Take the tensors of a loaded state again as they were saved.

    torch casts loaded state to the type of its parameter; moments of 16-bit parameters would lose half their digits.

    Parameters
    ----------
    optimizer : that has just loaded ``state_dict``
    state_dict : what it loaded
    on_cpu : names of state that stays on the processor; the rest goes to its parameter's device
    """
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        for parameter, key in zip(group["params"], saved["params"], strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if isinstance(value, Tensor):
                    device = "cpu" if name in on_cpu else parameter.device
                    optimizer.state[parameter][name] = value.detach().to(device, copy=True)


class AdaBound(Optimizer):
    r"""Adam with every effective step size clamped between two bounds that meet at ``final_lr``.

    With :math:`s_t = \alpha_t \sqrt{1 - \beta_2^t} / (1 - \beta_1^t)` the update is
    :math:`x \leftarrow x - \mathrm{clamp}(s_t / (\sqrt{v_t} + \epsilon), l_t, u_t)\, m_t` (arXiv:1902.09843, algorithm
    2, in the form of the authors' code). The bounds are those of `step_size_bounds`, times ``lr / base_lr``, so that a
    schedule scales them too.

    Parameters
    ----------
    params : parameters, named parameters, or dictionaries of groups; real, with dense gradients
    lr : learning rate of the adaptive phase, >= 0, a number or a tensor of shape (1,)
    betas : decay rates of the first and second moment, in [0, 1)
    final_lr : learning rate of the SGD that it turns into, > 0
    gamma : how fast the bounds close, per step, > 0
    eps : added to the root of the uncorrected second moment, >= 0
    weight_decay : L2 penalty, >= 0
    amsbound : divide by the root of the largest second moment so far
    decoupled_weight_decay : scale weights by ``1 - lr * weight_decay`` instead of adding the penalty to the gradient
    base_lr : the learning rate at which the bounds are ``final_lr``'s; the group's ``lr`` when it was made, unless that
        is 0 (a warm-up that starts there), then a scheduler's ``max_lr`` or ``initial_lr`` from the group
    maximize : ascend instead

    Raises
    ------
    InputError
        If an option is out of range or a parameter is not real; in `step`, if a gradient is sparse or ``base_lr``
        cannot be known.

    Examples
    --------
    >>> weight = torch.nn.Parameter(torch.tensor([3.0, -4.0]))
    >>> optimizer = AdaBound([weight], lr=0.1, final_lr=0.2)
    >>> weight.square().sum().backward()
    >>> optimizer.step()
    >>> weight.detach()
    tensor([ 2.9000, -3.9000])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: Number | Tensor = 1e-3,
        betas: tuple[Number, Number] = (0.9, 0.999),
        final_lr: Number = 0.1,
        gamma: Number = 1e-3,
        eps: Number = 1e-8,
        weight_decay: Number = 0.0,
        *,
        amsbound: bool = False,
        decoupled_weight_decay: bool = False,
        base_lr: Number | None = None,
        maximize: bool = False,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "final_lr": final_lr,
            "gamma": gamma,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsbound": amsbound,
            "decoupled_weight_decay": decoupled_weight_decay,
            "base_lr": base_lr,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with options of its own where it names them.

        Parameters
        ----------
        param_group : ``params``, and any option of the constructor
        """
        super().add_param_group(param_group)
        group, number = self.param_groups[-1], len(self.param_groups) - 1
        try:
            _check_options(group, number)
            refuse_complex(self, number)
        except InputError:
            self.param_groups.pop()
            raise
        if group["base_lr"] is None and group["lr"] > 0:
            group["base_lr"] = float(group["lr"])

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load what `state_dict` gave, moments in the precision they were saved in.

        Parameters
        ----------
        state_dict : state and options of an optimizer with groups of the same sizes
        """
        super().load_state_dict(state_dict)
        restore_precision(self, state_dict, on_cpu=("step",))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; parameters without gradient are left alone and do not count it.

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
                self._step_group(number, group, [p for _, p, _ in found], [g for _, _, g in found])
        return loss

    def _step_group(self, number: int, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        lr = float(group["lr"])
        beta1, beta2 = group["betas"]
        decay = float(group["weight_decay"])
        scale = self._final_scale(number, group, lr)
        states = [self._state(parameter, amsbound=group["amsbound"]) for parameter in params]
        means = [state["exp_avg"] for state in states]
        squares = [state["exp_avg_sq"] for state in states]

        grads = [gradient.to(mean.dtype) for gradient, mean in zip(grads, means, strict=True)]
        if group["maximize"]:
            grads = list(torch._foreach_neg(grads))
        if decay and group["decoupled_weight_decay"]:
            torch._foreach_mul_(params, 1 - lr * decay)
        elif decay:
            grads = list(torch._foreach_add(grads, params, alpha=decay))
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        if group["amsbound"]:
            largest = [state["max_exp_avg_sq"] for state in states]
            torch._foreach_maximum_(largest, squares)
            squares = largest

        counts = [state["step"] for state in states]
        torch._foreach_add_(counts, 1)
        if lr == 0:
            # Both bounds are 0, and the step size may be 0 / 0.
            return
        steps = [float(count) for count in counts]
        sizes = [lr * (1 - beta2**t) ** 0.5 / (1 - beta1**t) for t in steps]
        bounds = [step_size_bounds(t, final_lr=group["final_lr"] * scale, gamma=group["gamma"]) for t in steps]
        rates = torch._foreach_sqrt(squares)
        torch._foreach_add_(rates, float(group["eps"]))
        torch._foreach_reciprocal_(rates)
        torch._foreach_mul_(rates, sizes)
        torch._foreach_clamp_min_(rates, [lower for lower, _ in bounds])
        torch._foreach_clamp_max_(rates, [upper for _, upper in bounds])
        torch._foreach_addcmul_(params, rates, means, -1)

    def _state(self, parameter: Tensor, *, amsbound: bool) -> dict[str, Tensor]:
        state = cast("dict[str, Tensor]", self.state[parameter])
        if not state:
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter, dtype=dtype)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=dtype)
        if amsbound and "max_exp_avg_sq" not in state:
            state["max_exp_avg_sq"] = torch.zeros_like(state["exp_avg_sq"])
        return state

    def _final_scale(self, number: int, group: dict[str, Any], lr: float) -> float:
        """Give lr / base_lr, by which a schedule scales the bounds."""
        if lr == 0:
            return 0.0
        if group["base_lr"] is None:
            known = next((float(group[name]) for name in ("max_lr", "initial_lr") if group.get(name)), None)
            if known is None:
                raise InputError(
                    f"group {number} was made with lr=0 and now has lr={lr:g}: which learning rate final_lr belongs to"
                    f" is not known; pass base_lr, the highest rate of the schedule, to {type(self).__name__}"
                )
            group["base_lr"] = known
        return lr / group["base_lr"]


class AMSBound(AdaBound):
    """AdaBound with the largest second moment so far in the place of the current one.

    Parameters
    ----------
    params : parameters, named parameters, or dictionaries of groups; real, with dense gradients
    lr : learning rate of the adaptive phase, >= 0, a number or a tensor of shape (1,)
    betas : decay rates of the first and second moment, in [0, 1)
    final_lr : learning rate of the SGD that it turns into, > 0
    gamma : how fast the bounds close, per step, > 0
    eps : added to the root of the uncorrected second moment, >= 0
    weight_decay : L2 penalty, >= 0
    decoupled_weight_decay : scale weights by ``1 - lr * weight_decay`` instead of adding the penalty to the gradient
    base_lr : the learning rate at which the bounds are ``final_lr``'s, as in `AdaBound`
    maximize : ascend instead

    Raises
    ------
    InputError
        As `AdaBound` does.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: Number | Tensor = 1e-3,
        betas: tuple[Number, Number] = (0.9, 0.999),
        final_lr: Number = 0.1,
        gamma: Number = 1e-3,
        eps: Number = 1e-8,
        weight_decay: Number = 0.0,
        *,
        decoupled_weight_decay: bool = False,
        base_lr: Number | None = None,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            final_lr,
            gamma,
            eps,
            weight_decay,
            amsbound=True,
            decoupled_weight_decay=decoupled_weight_decay,
            base_lr=base_lr,
            maximize=maximize,
        )


def _check_options(group: dict[str, Any], number: int) -> None:
    lr, base_lr = group["lr"], group["base_lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise InputError(f"group {number}: lr as a tensor must hold one number, got {lr.numel()}")
    lr = float(lr)
    for name, fits, wanted in (
        ("lr", 0 <= lr < math.inf, ">= 0"),
        ("eps", 0 <= group["eps"] < math.inf, ">= 0"),
        ("weight_decay", 0 <= group["weight_decay"] < math.inf, ">= 0"),
        ("final_lr", 0 < group["final_lr"] < math.inf, "> 0"),
        ("gamma", 0 < group["gamma"] < math.inf, "> 0"),
    ):
        if not fits:
            raise InputError(f"group {number}: {name} must be a number {wanted}, got {group[name]}")
    for place, beta in enumerate(group["betas"]):
        if not 0 <= beta < 1:
            raise InputError(f"group {number}: betas[{place}] must be in [0, 1), got {beta}")
    if base_lr is not None and not 0 < base_lr < math.inf:
        raise InputError(f"group {number}: base_lr must be a number > 0, got {base_lr}")
