"""The family in one class: m and V of every block, the root of V with damping, clipping, and the step.

Yun, Lozano and Yang, "Stochastic Gradient Methods with Block Diagonal Matrix Adaptation", arXiv:1905.10757 (AdaBlock,
AISTATS 2022): ``x_{t+1} = x_t - clip(alpha_t (V_t^{1/2} + eps I)^{-1}) m_t`` for each block of coordinates.
"""

# pyright: reportPrivateImportUsage=false, reportPrivateUsage=false
# The foreach functions that torch's own optimizers use have no public names.

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict, cast

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer

from blockdiag_opt import native
from blockdiag_opt.clip import SpectrumClip
from blockdiag_opt.layout import GROUPINGS, Layout, lay_out, merge, partition
from blockdiag_opt.roots import decompose, diagonal_places, positive_part, tile, to_full, to_packed, triangle_on, untile

__all__ = ["METHODS", "BlockDiagonal", "Health", "StepScalars", "step_scalars"]

METHODS = ("adam", "rmsprop", "adagrad", "adafom")
"""How second moments are kept: decaying average with and without first moment, sum, mean."""

_BY_BLOCK = {"exp_avg_sq", "max_exp_avg_sq", "eigvecs", "eigvals"}
_SHARDED = {"output", "row", "filter", "diag"}
_STATE_DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "float64": torch.float64}
# Measured: microseconds of the kernel for one block, about a n^2 + b n^3, to decide whether threads pay.
_COST_SQUARE, _COST_CUBE = 5e-3, 2e-4
_OWN_SETTINGS = ("block_size", "grouping", "update_interval", "layers_per_step", "damping_form", "stochastic_rounding")
# An update interval of k is in force from step 20 k on.
_STEPS_PER_INTERVAL = 20


class Health(TypedDict):
    """What went wrong so far without stopping the training, and which engine runs."""

    engine: str
    fallen_blocks: int
    skipped_steps: int
    note: str


@dataclass
class _Plan:
    """What of a parameter stays the same from step to step."""

    layout: Layout
    key: tuple[object, ...]
    name: str
    task: native.Task


@dataclass
class _Job:
    """One parameter's part in a step."""

    group: dict[str, Any]
    param: Tensor
    grad: Tensor
    state: dict[str, Any]
    plan: _Plan
    dtype: torch.dtype
    block_step: bool = True
    shared: bool = False
    anew: bool = False
    out: Tensor | None = field(default=None)

    @property
    def layout(self) -> Layout:
        return self.plan.layout

    @property
    def precision(self) -> float:
        return torch.finfo(self.dtype).eps


@dataclass(frozen=True)
class StepScalars:
    """The numbers of a step.

    Attributes
    ----------
    mean_keep, mean_add : the first moment is kept and gets the gradient with these factors
    moment_keep, moment_add : the same of second moments and the gradient's outer product
    rate, root_scale : an eigenvalue becomes ``rate / (root_scale sqrt(eigenvalue) + eps)``
    lower, upper : bounds of that
    coupled : weight decay that is added to the gradient
    shrink : factor of decoupled weight decay
    """

    mean_keep: float
    mean_add: float
    moment_keep: float
    moment_add: float
    rate: float
    root_scale: float
    lower: float
    upper: float
    coupled: float
    shrink: float


def step_scalars(group: Mapping[str, Any], step: float | int) -> StepScalars:
    """Return the numbers that a group's settings and the number of a step amount to.

    Parameters
    ----------
    group : parameter group of a :class:`BlockDiagonal`
    step : number of the step, from 1
    """
    lr, (beta1, beta2), method = float(group["lr"]), group["betas"], group["method"]
    keep, add, rate, root = beta2, 1 - beta2, lr, 1.0
    if method == "adam":
        first, second = 1 - beta1**step, 1 - beta2**step
        if group["damping_form"] == "torch":
            rate, root = lr / first, 1 / math.sqrt(second)
        else:
            rate = lr * math.sqrt(second) / first
    elif method == "adagrad":
        keep, add, rate = 1.0, 1.0, lr / (1 + (step - 1) * group["lr_decay"])
    elif method == "adafom":
        keep, add, rate = (step - 1) / step, 1 / step, lr / math.sqrt(step)
    elif group["momentum"]:
        rate = 1.0
    lower, upper = 0.0, math.inf
    if group["clip"] is not None:
        lower, upper = SpectrumClip(*group["clip"]).bounds(step, lr / group["base_lr"])
    decay = float(group["weight_decay"])
    coupled, shrink = (0.0, 1 - lr * decay) if group["decoupled"] else (decay, 1.0)
    return StepScalars(beta1, 1 - beta1, keep, add, rate, root, lower, upper, coupled, shrink)


def block_rate(group: Mapping[str, Any], scalars: StepScalars, n: int) -> float:
    """Return the rate of blocks of size n: see `lr_scale`.

    Parameters
    ----------
    group : parameter group
    scalars : of the step
    n : coordinates of a block
    """
    return scalars.rate * (math.sqrt(n) if group["lr_scale"] == "sqrt_block" else 1.0)


def floor_of(group: Mapping[str, Any], n: int, precision: float) -> float:
    """Return the share of a block's largest eigenvalue that its others are raised to.

    Parameters
    ----------
    group : parameter group
    n : coordinates of a block
    precision : machine precision of the state
    """
    return n * precision if group["floor"] is None else float(group["floor"])


def raise_to_floor(eigenvalues: Tensor, floor: float) -> Tensor:
    """Raise eigenvalues (blocks, n) to a share of their block's largest.

    Parameters
    ----------
    eigenvalues : (blocks, n)
    floor : the share
    """
    return eigenvalues.maximum(floor * eigenvalues.amax(-1, keepdim=True)) if floor else eigenvalues


def effective_rates(eigenvalues: Tensor, group: Mapping[str, Any], scalars: StepScalars, n: int) -> Tensor:
    """Return clip(rate / (root_scale sqrt(eigenvalue) + eps)), what the first moment is multiplied with.

    Parameters
    ----------
    eigenvalues : of blocks, of any shape
    group : parameter group
    scalars : of the step
    n : coordinates of a block; a diagonal tensor (1) has no eigenvalues that jitter could apply to
    """
    jitter = float(group["jitter"]) if n > 1 else 0.0
    below = (eigenvalues + jitter).sqrt() * scalars.root_scale + float(group["eps"])
    rates = torch.where(below > 0, block_rate(group, scalars, n) / below, torch.zeros_like(below))
    return rates.clamp(scalars.lower, scalars.upper) if scalars.upper < math.inf else rates


def state_dtype(group: Mapping[str, Any], param: Tensor) -> torch.dtype:
    """Return the type of a parameter's state.

    Parameters
    ----------
    group : parameter group
    param : of any shape
    """
    named = group.get("state_dtype")
    if named is not None:
        return _STATE_DTYPES[named]
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def _local(tensor: Tensor) -> Tensor:
    return cast("Any", tensor).to_local() if _is_sharded(tensor) else tensor


def _is_sharded(tensor: Tensor) -> bool:
    # A DTensor, without importing torch.distributed.tensor.
    return hasattr(tensor, "to_local") and hasattr(tensor, "placements")


def _number(
    name: str, value: object, low: float | int, high: float | int = math.inf, *, open_low: bool = False
) -> float:
    number = float(value) if isinstance(value, int | float | Tensor) and not isinstance(value, bool) else math.nan
    if not (low < number if open_low else low <= number) or not number < high:
        bounds = f"{'>' if open_low else '>='} {low:g}" + (f" and < {high:g}" if high < math.inf else "")
        raise ValueError(f"invalid {name}: {value!r}; it must be {bounds}")
    return number


class BlockDiagonal(Optimizer):
    """Adaptive gradient methods with a dense second-moment matrix for every block of coordinates.

    The members of the family (:class:`BlockAdam` and others) are this class with their settings.

    Parameters
    ----------
    params : parameters, (name, parameter) pairs, or parameter groups, as for any torch optimizer; a group may have its
        own values of everything below
    lr : learning rate, >= 0. A block's first step has norm `lr`, where Adam's has ``lr * sqrt(n)``: the best
        value is another one than Adam's, 0.02 to 0.2 in this package's experiments
    betas : decay of first and second moments, each in [0, 1)
    eps : damping, added to the root of the eigenvalues (the paper's delta)
    weight_decay : decoupled (as in AdamW) or added to the gradient (as in Adam), see `decoupled`
    amsgrad : keep the Loewner upper bound of all second moments, the maximum of AMSGrad for matrices
    method : ``"adam"``, ``"rmsprop"``, ``"adagrad"`` or ``"adafom"``
    decoupled : whether weight decay is decoupled
    block_size : largest size of a block, >= 1; 1 is the diagonal method exactly
    grouping : which coordinates share a block, see :func:`blockdiag_opt.layout.lay_out`
    blocks : explicit partition (blocks, n) of a parameter's flat indices, -1 pads; one tensor for a group of one
        parameter, or a list with a tensor or None for each
    clip : :class:`SpectrumClip`, or None
    base_lr : learning rate that `clip` belongs to, for schedules; default the group's `lr` when it is added
    update_interval : steps between two eigen-decompositions of a block, once training is under way: an interval of k
        is in force from step 20 k on, before that it is shorter. Between decompositions the eigenvectors stay and the
        eigenvalues follow the gradients. Staggered, so that every step costs the same.
    lr_scale : ``"none"``, or ``"sqrt_block"``: multiply the rate of blocks of size n by ``sqrt(n)``
    damping_form : ``"torch"`` (eps after bias correction, as torch.optim.Adam) or ``"paper"`` (before it)
    jitter : added to the eigenvalues of blocks, >= 0
    floor : eigenvalues are raised to this share of their block's largest; default n times the precision of the state
    momentum : of RMSprop's update
    lr_decay : of Adagrad
    initial_accumulator_value : of Adagrad
    maximize : ascend instead
    foreach : False handles tensors one at a time where torch does the work, which takes less memory
    engine : ``"native"`` (C kernel), ``"torch"``, or ``"auto"``: native on CPU where a compiler is there
    state_dtype : ``torch.float32`` or ``torch.float64``; default float64 for float64 parameters, else float32
    on_nonfinite : ``"raise"`` FloatingPointError for a gradient that is not finite, or ``"skip"`` the step and count it
    stochastic_rounding : round updates of bfloat16 parameters up or down at random, right on average
    shard_eigh : share the eigen-decompositions among the processes of ``torch.distributed``; their results are summed,
        so that replicas stay identical
    layers_per_step : draw this many tensors a step for the block step, the others take the diagonal one; None: all
    seed : of the draws and of stochastic rounding
    capturable, fused, differentiable : refused if true; there for the sake of code written for torch's optimizers

    Raises
    ------
    ValueError
        For settings out of range and partitions that are none.
    TypeError
        For complex or quantised parameters.

    Examples
    --------
    >>> layer = torch.nn.Linear(20, 4)
    >>> optimizer = BlockDiagonal(layer.parameters(), lr=1e-2, block_size=10)
    >>> layer(torch.ones(8, 20)).square().mean().backward()
    >>> optimizer.step()
    """

    def __init__(
        self,
        params: Any,
        lr: float | int | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float | int = 1e-8,
        weight_decay: float | int = 0.0,
        amsgrad: bool = False,
        *,
        method: str = "adam",
        decoupled: bool = False,
        block_size: int = 10,
        grouping: str = "auto",
        blocks: Tensor | Sequence[Tensor | None] | None = None,
        clip: SpectrumClip | tuple[float, float] | None = None,
        base_lr: float | None = None,
        update_interval: int = 1,
        lr_scale: str = "none",
        damping_form: str = "torch",
        jitter: float | int = 0.0,
        floor: float | None = None,
        momentum: float | int = 0.0,
        lr_decay: float | int = 0.0,
        initial_accumulator_value: float | int = 0.0,
        maximize: bool = False,
        foreach: bool | None = None,
        engine: str = "auto",
        state_dtype: torch.dtype | str | None = None,
        on_nonfinite: str = "raise",
        stochastic_rounding: bool = False,
        shard_eigh: bool = False,
        layers_per_step: int | None = None,
        seed: int = 0,
        capturable: bool = False,
        fused: bool | None = None,
        differentiable: bool = False,
    ) -> None:
        if capturable:
            raise ValueError("capturable: an eigen-decomposition waits for the device, a CUDA graph cannot hold it")
        if fused or differentiable:
            name = "fused" if fused else "differentiable"
            raise ValueError(f"{name}=True is not to be had for blocks; leave it out")
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "method": method,
            "decoupled": decoupled,
            "block_size": block_size,
            "grouping": grouping,
            "blocks": blocks,
            "clip": clip,
            "base_lr": base_lr,
            "update_interval": update_interval,
            "lr_scale": lr_scale,
            "damping_form": damping_form,
            "jitter": jitter,
            "floor": floor,
            "momentum": momentum,
            "lr_decay": lr_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "maximize": maximize,
            "foreach": foreach,
            "engine": engine,
            "state_dtype": state_dtype,
            "on_nonfinite": on_nonfinite,
            "stochastic_rounding": stochastic_rounding,
            "shard_eigh": shard_eigh,
            "layers_per_step": layers_per_step,
            "seed": seed,
            "draws": 0,
        }
        self._forget()
        super().__init__(params, defaults)

    def _forget(self) -> None:
        self._plans: dict[Tensor, _Plan] = {}
        self._counts: Tensor = torch.zeros(1, dtype=torch.int64)
        self._fallen = 0
        self._skipped = 0
        self._used = ""
        self._sharded = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Rebuild what is not saved: see torch.optim.Optimizer."""
        if "_plans" not in self.__dict__:
            self._forget()
        super().__setstate__(state)

    # ---- groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, at any time.

        Parameters
        ----------
        param_group : as for any torch optimizer; every setting of the constructor may be given
        """
        unknown = set(param_group) - set(self.defaults) - {"params", "param_names", "initial_lr"}
        if unknown:
            import difflib

            # Other people's code keeps its own keys in groups; only what is all but one of ours is a mistake.
            for key in sorted(unknown):
                near = difflib.get_close_matches(key, _OWN_SETTINGS, 1, cutoff=0.85)
                if near and near[0] not in param_group:
                    raise ValueError(f"parameter group: unknown setting '{key}'; did you mean '{near[0]}'?")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
            for place, param in enumerate(group["params"]):
                self._check_param(group, place, param)
        except Exception:
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        lr = _number("lr", group["lr"], 0)
        if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
            raise ValueError("a tensor lr must have one element")
        betas = group["betas"]
        if not isinstance(betas, tuple | list) or len(cast("Sequence[object]", betas)) != 2:
            raise ValueError(f"invalid betas: {betas!r}; give two numbers in [0, 1)")
        group["betas"] = tuple(
            _number(f"betas[{k}]", beta, 0, 1) for k, beta in enumerate(cast("Iterable[Any]", betas))
        )
        for name in ("weight_decay", "jitter", "momentum", "lr_decay", "initial_accumulator_value", "eps"):
            _number(name, group[name], 0)
        if group["floor"] is not None:
            _number("floor", group["floor"], 0, 1)
        if group["eps"] == 0 and group["floor"] == 0:
            raise ValueError(
                "eps = 0 needs an eigenvalue floor > 0: without either a singular block has no inverse root"
            )
        for name, low in (("block_size", 1), ("update_interval", 1), ("layers_per_step", 0)):
            value = group[name]
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < low):
                raise ValueError(f"{name} must be an integer >= {low}, got {value!r}")
        if isinstance(group["lr_scale"], int | float):
            # Another library's key of that name, a factor it has put into lr already.
            group["lr_scale"] = "none"
        if group["layers_per_step"] is not None and group["update_interval"] > 1:
            raise ValueError("layers_per_step goes with update_interval=1: an idle tensor has no eigenvectors to keep")
        if group["layers_per_step"] != self.param_groups[0]["layers_per_step"]:
            raise ValueError("layers_per_step counts over all groups: give it to the optimizer, not to a group")
        choices = {
            "method": METHODS,
            "grouping": GROUPINGS,
            "lr_scale": ("none", "sqrt_block"),
            "damping_form": ("torch", "paper"),
            "engine": ("auto", "native", "torch"),
            "on_nonfinite": ("raise", "skip"),
        }
        for name, known in choices.items():
            if group[name] not in known:
                raise ValueError(f"unknown {name} {group[name]!r}: choose {', '.join(known)}")
        if group["state_dtype"] is not None:
            name = str(group["state_dtype"]).removeprefix("torch.")
            if name not in _STATE_DTYPES:
                raise ValueError(f"state_dtype must be float32 or float64, got {group['state_dtype']}")
            group["state_dtype"] = name
        if group["amsgrad"] and (group["method"] != "adam" or group["update_interval"] > 1):
            raise ValueError("amsgrad goes with method='adam' and update_interval=1")
        if group["clip"] is not None:
            self._check_clip(group, lr)
        elif group["base_lr"] is None:
            group["base_lr"] = lr
        if group["shard_eigh"] and group["update_interval"] > 1:
            raise ValueError("shard_eigh shares the decompositions of every step: it goes with update_interval=1")
        blocks = group["blocks"]
        if isinstance(blocks, Tensor):
            blocks = [blocks]
        if blocks is not None:
            if len(blocks) != len(group["params"]):
                raise ValueError(
                    f"blocks: {len(blocks)} partitions for {len(group['params'])} parameters; give one for each, None"
                    " where the grouping applies"
                )
            group["blocks"] = list(blocks)

    @staticmethod
    def _check_clip(group: dict[str, Any], lr: float) -> None:
        clip = group["clip"]
        if isinstance(clip, SpectrumClip):
            clip = (clip.final_lr, clip.gamma)
        if not isinstance(clip, tuple | list) or len(cast("Sequence[object]", clip)) != 2:
            raise ValueError(f"clip must be a SpectrumClip or (final_lr, gamma), got {clip!r}")
        group["clip"] = tuple(float(value) for value in cast("Iterable[float]", clip))
        SpectrumClip(*group["clip"])
        if group["momentum"]:
            raise ValueError("clip bounds the whole step: RMSprop's momentum does not go with it")
        if group["base_lr"] is None:
            if lr == 0:
                raise ValueError(
                    "clip with lr = 0: the bounds follow lr / base_lr; give base_lr, the largest lr planned"
                )
            group["base_lr"] = lr
        group["base_lr"] = _number("base_lr", group["base_lr"], 0, open_low=True)

    def _check_param(self, group: dict[str, Any], place: int, param: Tensor) -> None:
        if isinstance(param, UninitializedParameter):
            raise TypeError(f"parameter #{place} has no shape yet; run one forward pass before making the optimizer")
        name = _name(group, place, param)
        if param.is_complex():
            raise TypeError(f"parameter '{name}' is complex; view it as real (torch.view_as_real)")
        if param.is_quantized or not param.is_floating_point():
            raise TypeError(f"parameter '{name}' has type {param.dtype}; only floating-point parameters can be trained")
        if type(param).__name__ == "FlatParameter":
            raise TypeError(
                f"parameter '{name}' is flattened by FSDP1, which hides the layers; use use_orig_params=True or FSDP2"
                " (fully_shard)"
            )
        self._plan(group, place, param)

    def _plan(self, group: dict[str, Any], place: int, param: Tensor) -> _Plan:
        blocks = None if group["blocks"] is None else group["blocks"][place]
        key = (group["grouping"], group["block_size"], id(blocks), tuple(param.shape))
        plan = self._plans.get(param)
        if plan is not None and plan.key == key:
            return plan
        name = _name(group, place, param)
        if plan is not None:
            was = (*plan.key[:2], plan.key[3])
            raise ValueError(
                f"parameter '{name}' had grouping, block size and shape {was} and now has {(*key[:2], key[3])}; make a"
                " new optimizer"
            )
        layout = lay_out(_local(param).shape, group["grouping"], group["block_size"], blocks, name)
        if _is_sharded(param):
            self._sharded = True
            layout = _sharded_layout(param, layout, group, blocks, name)
        task = native.Task()
        task.width, task.n, task.chunks, task.length = layout.width, layout.n, layout.chunks, layout.length
        task.line_stride, task.stride, task.first = layout.line_stride, layout.stride, 0
        task.last = layout.numel if layout.diagonal else layout.blocks
        if layout.index is not None:
            task.index = layout.index.data_ptr()
        self._plans[param] = plan = _Plan(layout, key, name, task)
        return plan

    # ---- the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Parameters
        ----------
        closure : evaluates the model with gradients and returns the loss; called once

        Returns
        -------
        What the closure returned, or None.

        Raises
        ------
        FloatingPointError
            For a gradient that is not finite, before anything was changed (see `on_nonfinite`).
        RuntimeError
            For sparse gradients.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        _undisturbed(self._step)()
        return loss

    def _step(self) -> None:
        jobs = self._jobs()
        if not self._all_finite(jobs) or not jobs:
            return
        self._draw(jobs)
        for job in jobs:
            self._prepare(job)
        batches: dict[tuple[int, float], list[_Job]] = {}
        for job in jobs:
            batches.setdefault((id(job.group), float(job.state["step"])), []).append(job)
        kernel_jobs: list[tuple[_Job, StepScalars]] = []
        for (_, step), batch in batches.items():
            scalars = step_scalars(batch[0].group, step)
            by_torch: list[_Job] = []
            for job in batch:
                if self._goes_native(job):
                    kernel_jobs.append((job, scalars))
                else:
                    by_torch.append(job)
            for part in [by_torch] if batch[0].group["foreach"] is not False else [[job] for job in by_torch]:
                if part:
                    self._step_by_torch(part, scalars, step)
        if kernel_jobs:
            self._step_by_kernel(kernel_jobs)

    def _jobs(self) -> list[_Job]:
        jobs: list[_Job] = []
        for group in self.param_groups:
            for place, param in enumerate(group["params"]):
                grad = param.grad
                if grad is None:
                    continue
                local = _local(param)
                if local.numel() == 0:
                    continue
                plan = self._plan(group, place, param)
                if grad.layout != torch.strided:
                    raise RuntimeError(
                        f"parameter '{plan.name}' has a sparse gradient; make its embedding dense (sparse=False), or"
                        " give it to torch.optim.SparseAdam"
                    )
                grad = _local(grad)
                grad = grad.resolve_neg() if grad.is_neg() else grad
                grad = grad if grad.is_contiguous() else grad.contiguous()
                jobs.append(_Job(group, local, grad, self.state[param], plan, state_dtype(group, param)))
        return jobs

    def _all_finite(self, jobs: list[_Job]) -> bool:
        bad = self._first_bad(jobs)
        broken = bad >= 0
        if self._sharded:
            # Processes that hold parts of one parameter must agree on whether this step takes place.
            broken = _anywhere(broken)
        if not broken:
            return True
        group = jobs[bad].group if bad >= 0 else self.param_groups[0]
        if group["on_nonfinite"] == "skip":
            self._skipped += 1
            return False
        if bad < 0:
            raise FloatingPointError("non-finite gradient on another process; its message names the parameter")
        job = jobs[bad]
        step = int(job.state["step"]) + 1 if job.state else 1
        found = "non-finite" if not bool(job.grad.isfinite().all()) else "too large (its square overflows)"
        raise FloatingPointError(
            f"{found} gradient in '{job.plan.name}' at step {step}; use GradScaler, clip gradients, or lower the"
            " learning rate (on_nonfinite='skip' drops such steps)"
        )

    def _first_bad(self, jobs: list[_Job]) -> int:
        if not jobs:
            return -1
        # The square root of the largest number: squares must be finite as well.
        limits = [1e18 if job.dtype == torch.float32 else 1e150 for job in jobs]
        grads = [job.grad for job in jobs]
        kernel = self._kernel(jobs[0].group)
        if kernel is not None and all(
            grad.device.type == "cpu" and grad.dtype in {torch.float32, torch.float64} for grad in grads
        ):
            return native.scan(kernel, grads, limits)
        device = grads[0].device
        norms = torch._foreach_norm(grads, math.inf)
        largest = torch.stack([norm.to(device, torch.float64) for norm in norms])
        broken = ~(largest <= torch.tensor(limits, dtype=torch.float64, device=device))
        return int(broken.nonzero()[0]) if bool(broken.any()) else -1

    def _draw(self, jobs: list[_Job]) -> None:
        count = self.param_groups[0]["layers_per_step"]
        if count is None:
            return
        eligible = [job for job in jobs if not job.layout.diagonal]
        first = self.param_groups[0]
        random = torch.Generator().manual_seed((first["seed"] * 1_000_003 + first["draws"]) % 2**63)
        first["draws"] += 1
        drawn = set(torch.randperm(len(eligible), generator=random)[:count].tolist())
        for place, job in enumerate(eligible):
            job.block_step = place in drawn

    def _prepare(self, job: _Job) -> None:
        state, layout, group = job.state, job.layout, job.group
        options: dict[str, Any] = {"dtype": job.dtype, "device": job.param.device}
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            shape = layout.shape if layout.diagonal else (layout.tiles, layout.packed, layout.width)
            moments = torch.zeros(shape, **options)
            start = float(group["initial_accumulator_value"])
            if start and layout.diagonal:
                moments.fill_(start)
            elif start:
                moments[:, diagonal_places(layout.n)] = start
            state["exp_avg_sq"] = moments
        moments: Tensor = state["exp_avg_sq"]
        if moments.device != job.param.device or moments.dtype != job.dtype:
            # The model was moved or cast in the middle of training.
            for key, value in state.items():
                if key != "step":
                    state[key] = value.to(**options)
        # What the settings ask for, now or since they were changed in the middle of training.
        if "exp_avg" not in state and group["method"] in {"adam", "adafom"} and group["betas"][0] > 0:
            state["exp_avg"] = torch.zeros(layout.shape, **options)
        if group["amsgrad"] and "max_exp_avg_sq" not in state:
            state["max_exp_avg_sq"] = torch.zeros_like(state["exp_avg_sq"])
        if group["momentum"] and "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros(layout.shape, **options)
        tracked = group["update_interval"] > 1 and not layout.diagonal
        if tracked and "eigvecs" not in state:
            job.anew = True
            state["eigvecs"] = torch.zeros((layout.tiles, layout.n**2, layout.width), **options)
            state["eigvals"] = torch.zeros((layout.tiles, layout.n, layout.width), **options)
        elif not tracked and "eigvecs" in state:
            del state["eigvecs"], state["eigvals"]
        state["step"] += 1

    def _kernel(self, group: Mapping[str, Any]) -> native.Kernel | None:
        if group["engine"] == "torch":
            return None
        kernel = native.load()
        if kernel is None and group["engine"] == "native":
            raise RuntimeError(f"engine='native' is not to be had here: {native.reason()}; use engine='auto'")
        return kernel

    def _goes_native(self, job: _Job) -> bool:
        fits = job.param.device.type == "cpu" and job.layout.n <= native.LARGEST and not job.group["amsgrad"]
        if not fits:
            return False
        return self._kernel(job.group) is not None

    def _mode(self, job: _Job) -> int:
        interval = job.group["update_interval"]
        if job.layout.diagonal:
            return native.FLAT
        if not job.block_step:
            return native.DIAGONAL
        if interval == 1:
            return native.SOLVE
        return native.REFRESH if job.anew or _interval_at(int(job.state["step"]), interval) == 1 else native.TRACKED

    # ---- by the kernel

    def _step_by_kernel(self, jobs: list[tuple[_Job, StepScalars]]) -> None:
        kernel = native.load()
        assert kernel is not None
        self._used = "native" if self._used in {"", "native"} else "native and torch"
        rank, world = _world(any(job.group["shard_eigh"] for job, _ in jobs))
        tasks: list[native.Task] = []
        kept: list[Tensor] = []
        cost = 0.0
        for place, (job, scalars) in enumerate(jobs):
            group, state, layout, task = job.group, job.state, job.layout, job.plan.task
            job.shared = world > 1 and group["shard_eigh"] and not layout.diagonal
            direct = (
                job.param.dtype == job.dtype
                and job.param.is_contiguous()
                and not group["momentum"]
                and not group["stochastic_rounding"]
                and not job.shared
            )
            grad = job.grad if job.grad.dtype == job.dtype else job.grad.to(job.dtype)
            target = job.param
            if not direct:
                job.out = target = torch.zeros(layout.shape, dtype=job.dtype)
                if scalars.coupled:
                    grad = grad.mul(-1 if group["maximize"] else 1).add_(job.param.to(job.dtype), alpha=scalars.coupled)
            kept += [grad, target]
            task.grad, task.param = grad.data_ptr(), target.data_ptr()
            task.mean = state["exp_avg"].data_ptr() if "exp_avg" in state else None
            task.moments = state["exp_avg_sq"].data_ptr()
            tracked = "eigvecs" in state
            task.basis = state["eigvecs"].data_ptr() if tracked else None
            task.spectrum = state["eigvals"].data_ptr() if tracked else None
            task.failed = self._counts.data_ptr()
            task.mode, task.double_storage = self._mode(job), job.dtype == torch.float64
            task.subtract, task.phase = direct, int(state["step"])
            task.interval = _interval_at(task.phase, group["update_interval"])
            decayed = scalars.coupled and not direct
            task.sign = 1.0 if decayed or not group["maximize"] else -1.0
            task.coupled_decay = scalars.coupled if direct else 0.0
            task.shrink = scalars.shrink
            task.mean_keep, task.mean_add = scalars.mean_keep, scalars.mean_add
            task.moment_keep, task.moment_add = scalars.moment_keep, scalars.moment_add
            task.jitter, task.floor, task.damping = (
                float(group["jitter"]),
                floor_of(group, layout.n, job.precision),
                float(group["eps"]),
            )
            task.rate, task.root_scale = block_rate(group, scalars, layout.n), scalars.root_scale
            task.lower, task.upper = scalars.lower, scalars.upper
            cost += layout.blocks * layout.n * (_COST_SQUARE * layout.n + _COST_CUBE * layout.n**2)
            tasks += _shares(task, layout, (rank + place) % world, world) if job.shared else [task]
        native.step(kernel, (native.Task * len(tasks))(*tasks), cost)
        fallen = int(self._counts)
        if fallen:
            self._fallen += fallen
            self._counts.zero_()
            self._check_moments([job for job, _ in jobs])
        _sum_over_processes([job.out for job, _ in jobs if job.shared])
        for place, (job, scalars) in enumerate(jobs):
            if job.out is not None:
                self._apply(job, scalars, place)

    @staticmethod
    def _check_moments(jobs: list[_Job]) -> None:
        for job in jobs:
            if not bool(job.state["exp_avg_sq"].isfinite().all()):
                raise FloatingPointError(
                    f"second moments of '{job.plan.name}' have overflowed at step {int(job.state['step'])}; clip"
                    " gradients or scale the loss down"
                )

    def _apply(self, job: _Job, scalars: StepScalars, place: int) -> None:
        """Subtract the update `job.out` from the parameter."""
        assert job.out is not None
        update, group, param = job.out, job.group, job.param
        if group["momentum"]:
            buffer: Tensor = job.state["momentum_buffer"]
            buffer.mul_(group["momentum"]).add_(update)
            update = buffer * float(group["lr"])
        if param.dtype == update.dtype:
            if scalars.shrink != 1:
                param.mul_(scalars.shrink)
            param.sub_(update)
            return
        exact = param.to(update.dtype).mul_(scalars.shrink).sub_(update)
        if group["stochastic_rounding"] and param.dtype == torch.bfloat16:
            step = int(job.state["step"])
            random = torch.Generator(param.device).manual_seed(
                (group["seed"] * 1_000_003 + step * 4099 + place) % 2**63
            )
            exact = _round_stochastically(exact.float(), random)
        param.copy_(exact)

    # ---- by torch

    def _step_by_torch(self, jobs: list[_Job], scalars: StepScalars, step: float) -> None:
        self._used = "torch" if self._used in {"", "torch"} else "native and torch"
        group = jobs[0].group
        grads = [job.grad.to(job.dtype) for job in jobs]
        if group["maximize"]:
            grads = list(torch._foreach_neg(grads))
        if scalars.coupled:
            decays = [job.param.to(job.dtype) for job in jobs]
            grads = list(torch._foreach_add(grads, decays, alpha=scalars.coupled))
        means = grads
        if "exp_avg" in jobs[0].state:
            means = [job.state["exp_avg"] for job in jobs]
            torch._foreach_mul_(means, scalars.mean_keep)
            torch._foreach_add_(means, grads, alpha=scalars.mean_add)
        stacks: dict[tuple[int, torch.dtype, torch.device], list[tuple[_Job, Tensor, Tensor]]] = {}
        for job, grad, mean in zip(jobs, grads, means, strict=True):
            if job.layout.diagonal:
                self._diagonal_by_torch(job, grad, mean, scalars)
                continue
            blocks, first = partition(grad, job.layout), partition(mean, job.layout)
            moments = job.state["exp_avg_sq"]
            row, column, _ = triangle_on(job.layout.n, moments.device)
            lanes = tile(blocks, job.layout)
            moments.mul_(scalars.moment_keep).addcmul_(lanes[:, row], lanes[:, column], value=scalars.moment_add)
            if group["amsgrad"]:
                moments = self._raise_bound(job, moments)
            if not job.block_step:
                diagonal = untile(moments[:, diagonal_places(job.layout.n)], job.layout)
                response = effective_rates(diagonal, group, scalars, job.layout.n)
                job.out = merge(response * first, job.layout)
            elif group["update_interval"] > 1:
                job.out = self._tracked_by_torch(job, lanes, first, scalars, step)
            else:
                key = (job.layout.n, job.dtype, moments.device)
                stacks.setdefault(key, []).append((job, untile(moments, job.layout), first))
        for (n, dtype, _), stack in stacks.items():
            self._solve_by_torch(n, dtype, stack, scalars)
        _sum_over_processes([job.out for job in jobs if job.shared])
        for place, job in enumerate(jobs):
            self._apply(job, scalars, place)

    def _diagonal_by_torch(self, job: _Job, grad: Tensor, mean: Tensor, scalars: StepScalars) -> None:
        moments: Tensor = job.state["exp_avg_sq"]
        moments.mul_(scalars.moment_keep).addcmul_(grad, grad, value=scalars.moment_add)
        if job.group["amsgrad"]:
            bound: Tensor = job.state["max_exp_avg_sq"]
            moments = torch.maximum(bound, moments, out=bound)
        job.out = effective_rates(moments, job.group, scalars, 1).mul_(mean)

    def _raise_bound(self, job: _Job, moments: Tensor) -> Tensor:
        bound: Tensor = job.state["max_exp_avg_sq"]
        above = to_full(untile(moments - bound, job.layout), job.layout.n)
        bound.add_(tile(to_packed(positive_part(above)), job.layout))
        return bound

    def _solve_by_torch(
        self, n: int, dtype: torch.dtype, stack: list[tuple[_Job, Tensor, Tensor]], scalars: StepScalars
    ) -> None:
        rank, world = _world(stack[0][0].group["shard_eigh"])
        packed = torch.cat([moments for _, moments, _ in stack])
        first = torch.cat([mean for _, _, mean in stack])
        own = slice(len(packed) * rank // world, len(packed) * (rank + 1) // world)
        spectrum = decompose(to_full(packed[own], n))
        self._fallen += int(spectrum.fallen.sum())
        if bool(spectrum.fallen.any()):
            self._check_moments([each for each, _, _ in stack])
        job = stack[0][0]
        values = raise_to_floor(spectrum.values, floor_of(job.group, n, job.precision))
        response = effective_rates(values, job.group, scalars, n)
        wanted = first[own].to(spectrum.vectors.dtype)[..., None]
        turned = spectrum.vectors @ (response[..., None] * (spectrum.vectors.mT @ wanted))
        update = torch.zeros_like(first)
        update[own] = turned[..., 0].to(dtype)
        for (each, _, _), part in zip(stack, update.split([each.layout.blocks for each, _, _ in stack]), strict=True):
            each.out, each.shared = merge(part, each.layout), world > 1

    def _tracked_by_torch(self, job: _Job, lanes: Tensor, first: Tensor, scalars: StepScalars, step: float) -> Tensor:
        layout, interval = job.layout, job.group["update_interval"]
        basis: Tensor = job.state["eigvecs"]
        values: Tensor = job.state["eigvals"]
        vectors = basis.view(layout.tiles, layout.n, layout.n, layout.width)
        turned = (vectors * lanes[:, :, None]).sum(1)
        values.mul_(scalars.moment_keep).addcmul_(turned, turned, value=scalars.moment_add)
        now = 1 if job.anew else _interval_at(int(step), interval)
        chosen = torch.arange(layout.tiles)[-int(step) % now :: now]
        if len(chosen):
            chosen = chosen.to(basis.device)
            packed = job.state["exp_avg_sq"][chosen].transpose(1, 2).reshape(-1, layout.packed)
            spectrum = decompose(to_full(packed, layout.n))
            self._fallen += int(spectrum.fallen.sum())
            shape = (len(chosen), layout.width)
            basis[chosen] = spectrum.vectors.to(basis.dtype).reshape(*shape, -1).transpose(1, 2)
            values[chosen] = spectrum.values.to(basis.dtype).view(*shape, -1).transpose(1, 2)
        wanted = (vectors * tile(first, layout)[:, :, None]).sum(1)
        flat = values.transpose(1, 2).reshape(-1, layout.n)
        flat = raise_to_floor(flat, floor_of(job.group, layout.n, job.precision))
        response = effective_rates(flat, job.group, scalars, layout.n).view(layout.tiles, layout.width, layout.n)
        return merge(untile((vectors * (response.transpose(1, 2) * wanted)[:, None]).sum(2), layout), layout)

    # ---- saving and loading

    def state_dict(self) -> dict[str, Any]:
        """Return settings and state, in a form that does not depend on how blocks lie in memory.

        Returns
        -------
        As of any torch optimizer. Each parameter has ``step``, ``exp_avg`` (its own shape), ``exp_avg_sq`` (blocks,
        n (n + 1) / 2) lower triangles by rows (a parameter without blocks: its own shape), and, with an update
        interval, ``eigvecs`` (blocks, n, n) and ``eigvals`` (blocks, n). ``torch.load(weights_only=True)`` reads it.
        """
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        state: dict[int, dict[str, Any]] = {}
        groups: list[dict[str, Any]] = []
        for group in self.param_groups:
            first = sum(len(other["params"]) for other in groups)
            params = group["params"]
            groups.append(group | {"params": list(range(first, first + len(params)))})
            for place, param in enumerate(params):
                if self.state.get(param):
                    layout = self._plan(group, place, param).layout
                    entries = self.state[param].items()
                    state[first + place] = {name: _export(name, value, layout, param) for name, value in entries}
        found: dict[str, Any] = {"state": state, "param_groups": groups}
        for hook in self._optimizer_state_dict_post_hooks.values():
            changed = hook(self, found)
            found = found if changed is None else changed
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over settings and state of an optimizer with the same parameters and groups.

        Parameters
        ----------
        state_dict : from :meth:`state_dict`

        Raises
        ------
        ValueError
            If it belongs to another optimizer or other blocks; the message names the parameter.
        """
        given: dict[str, Any] = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, given)
            given = given if changed is None else changed
        imported: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
        groups = given["param_groups"]
        if len(groups) != len(self.param_groups):
            raise ValueError(
                f"the checkpoint has {len(groups)} parameter groups, the optimizer {len(self.param_groups)}"
            )
        for saved, group in zip(groups, self.param_groups, strict=True):
            if "block_size" not in saved or "grouping" not in saved:
                raise ValueError("the checkpoint is of another optimizer: its groups have no block_size and grouping")
            for name in ("method", "decoupled", "amsgrad"):
                if saved.get(name) != group[name]:
                    raise ValueError(
                        f"the checkpoint is of another optimizer of the family: {name} is {saved.get(name)!r} there and"
                        f" {group[name]!r} here"
                    )
            if len(saved["params"]) != len(group["params"]):
                raise ValueError(
                    f"the checkpoint has {len(saved['params'])} parameters in a group where the optimizer has"
                    f" {len(group['params'])}"
                )
            for place, (key, param) in enumerate(zip(saved["params"], group["params"], strict=True)):
                plan = self._plan(group, place, param)
                entry = given["state"].get(key)
                if entry:
                    imported[param] = _import(entry, plan, saved, place, param, group)
        # The base class would cast state to the parameters' type.
        merged: list[dict[str, Any]] = []
        for saved, group in zip(copy.deepcopy(list(groups)), self.param_groups, strict=True):
            names = {"param_names": group["param_names"]} if "param_names" in group else {}
            # Partitions are equal, and the plans refer to those at hand.
            kept = {"params": group["params"], "blocks": group["blocks"]}
            merged.append(self.defaults | names | saved | kept)
        self.__setstate__({"state": imported, "param_groups": merged})
        for group in self.param_groups:
            for place, param in enumerate(group["params"]):
                plan = self._plans[param]
                blocks = None if group["blocks"] is None else group["blocks"][place]
                plan.key = (group["grouping"], group["block_size"], id(blocks), plan.key[3])
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def health(self) -> Health:
        """Tell what went wrong so far without stopping the training, and which engine runs.

        Returns
        -------
        ``engine``; ``fallen_blocks``: decompositions that failed and were replaced; ``skipped_steps``: steps dropped
        for gradients that were not finite; ``note``: why there is no native engine, if there is none.
        """
        return {
            "engine": self._used or "not used yet",
            "fallen_blocks": self._fallen,
            "skipped_steps": self._skipped,
            "note": native.reason(),
        }

    def layouts(self) -> dict[str, Layout]:
        """Return how each parameter is cut into blocks, by name.

        Returns
        -------
        Name -> layout; a parameter without a name is called by its place in its group.
        """
        found: dict[str, Layout] = {}
        for number, group in enumerate(self.param_groups):
            for place, param in enumerate(group["params"]):
                plan = self._plan(group, place, param)
                found[plan.name if "param_names" in group else f"{number}.{place}"] = plan.layout
        return found


def _undisturbed(function: Callable[[], None]) -> Callable[[], None]:
    # torch.compile must not trace the loop over tensors; asking for the compiler costs seconds where it is not in use.
    if torch.compiler.is_compiling():
        return cast("Callable[[], None]", torch.compiler.disable(function))
    return function


def _name(group: Mapping[str, Any], place: int, param: Tensor) -> str:
    names = group.get("param_names")
    return str(names[place]) if names else f"#{place} of shape {tuple(param.shape)}"


def _interval_at(step: int, interval: int) -> int:
    """Return the update interval in force at a step.

    Moments change by about 1 / step of themselves in a step: the interval grows with the steps done, until it is the
    one asked for. Without that a training starts badly and does not recover (measured on the autoencoder).
    """
    return max(1, min(interval, step // _STEPS_PER_INTERVAL))


def _shares(task: native.Task, layout: Layout, rank: int, world: int) -> list[native.Task]:
    # This process solves its tiles and only keeps the books of the others.
    def part(first: int, last: int, mode: int) -> native.Task:
        copy = native.Task.from_buffer_copy(task)
        copy.first, copy.last, copy.mode = 16 * first, min(16 * last, layout.blocks), mode
        return copy

    tiles = -(-layout.blocks // 16)
    low, high = tiles * rank // world, tiles * (rank + 1) // world
    parts = [(0, low, native.ACCUMULATE), (low, high, task.mode), (high, tiles, native.ACCUMULATE)]
    return [part(*each) for each in parts if each[0] < each[1]]


def _world(wanted: bool) -> tuple[int, int]:
    if not wanted:
        return 0, 1
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def _anywhere(flag: bool) -> bool:
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return flag
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    told = torch.tensor(int(flag), device=device)
    dist.all_reduce(told, op=dist.ReduceOp.MAX)
    return bool(told)


def _sum_over_processes(tensors: Sequence[Tensor | None]) -> None:
    import torch.distributed as dist

    # Every block is zero on all processes but one: the sum is exact.
    for tensor in tensors:
        if tensor is not None:
            dist.all_reduce(tensor)


def _round_stochastically(values: Tensor, random: torch.Generator) -> Tensor:
    bits = values.view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=random)
    return ((bits + noise) & -(1 << 16)).view(torch.float32)


def _sharded_layout(param: Tensor, layout: Layout, group: Mapping[str, Any], blocks: Any, name: str) -> Layout:
    from torch.distributed.tensor import Replicate, Shard

    placements = cast("Any", param).placements
    if all(isinstance(place, Replicate) for place in placements) or layout.diagonal:
        return layout
    whole = lay_out(param.shape, group["grouping"], group["block_size"], blocks, name)
    rows_only = all(isinstance(place, Replicate) or place == Shard(0) for place in placements)
    if rows_only and whole.kind in _SHARDED and whole.n == layout.n:
        return layout
    local = _local(param).shape
    if rows_only and whole.kind == "input" and len(local) > 0 and local[0] % whole.n == 0:
        return lay_out(local, group["grouping"], whole.n, None, name)
    raise ValueError(
        f"parameter '{name}': blocks of grouping '{whole.kind}' would cross shards ({placements}); use grouping="
        "'output', 'row' or 'filter' with sharding along dimension 0"
    )


def _export(name: str, value: Any, layout: Layout, param: Tensor) -> Any:
    """Return a copy of a state tensor that does not depend on how blocks lie in memory."""
    if not isinstance(value, Tensor):
        return value
    if name == "step":
        return value.clone()
    by_block = name in _BY_BLOCK and not layout.diagonal
    if by_block:
        value = untile(value, layout)
        if name == "eigvecs":
            value = value.view(-1, layout.n, layout.n)
    value = value.clone(memory_format=torch.contiguous_format)
    if not _is_sharded(param):
        return value
    from torch.distributed.tensor import DTensor

    sharded = cast("Any", param)
    shape = param.shape
    if by_block:
        # A row of the parameter has its blocks in a row: sharded as the parameter is.
        value = value.reshape(_local(param).shape[0], -1)
        shape = torch.Size((param.shape[0], value.shape[1]))
    stride = tuple(math.prod(shape[k + 1 :]) for k in range(len(shape)))
    return DTensor.from_local(
        value, sharded.device_mesh, sharded.placements, run_check=False, shape=shape, stride=stride
    )


def _import(
    entry: Mapping[str, Any], plan: _Plan, saved: Mapping[str, Any], place: int, param: Tensor, group: Mapping[str, Any]
) -> dict[str, Any]:
    layout = plan.layout
    blocks = None if saved["blocks"] is None else saved["blocks"][place]
    mine = None if group["blocks"] is None else group["blocks"][place]
    same = blocks is mine or (blocks is not None and mine is not None and torch.equal(blocks.cpu(), mine.cpu()))
    expected = {
        "exp_avg_sq": layout.shape if layout.diagonal else (layout.blocks, layout.packed),
        "exp_avg": layout.shape,
        "eigvecs": (layout.blocks, layout.n, layout.n),
        "eigvals": (layout.blocks, layout.n),
    }
    local = _local(param)
    found: dict[str, Any] = {}
    if missing := {"step", "exp_avg_sq"} - set(entry):
        raise ValueError(f"parameter '{plan.name}': the checkpoint has no {sorted(missing)[0]}")
    dtype = state_dtype(saved, param)
    was = (saved["grouping"], saved["block_size"])
    now = (group["grouping"], group["block_size"])
    if not same or (was != now and lay_out(local.shape, *was, name=plan.name).kind != layout.kind):
        raise ValueError(f"parameter '{plan.name}': the checkpoint's blocks are {was}, the optimizer's {now}")
    for name, value in entry.items():
        if not isinstance(value, Tensor) or name == "step":
            found[name] = value.clone() if isinstance(value, Tensor) else value
            continue
        value = _local(value)
        shape = expected.get(name.removeprefix("max_"), layout.shape)
        if value.numel() != math.prod(shape):
            raise ValueError(
                f"parameter '{plan.name}': the checkpoint's {name} has shape {tuple(value.shape)}, expected"
                f" {tuple(shape)}; it was made with {was}, the optimizer has {now}"
            )
        value = value.detach().to(local.device, dtype).reshape(shape)
        tiled = name in _BY_BLOCK and not layout.diagonal
        found[name] = tile(value.reshape(layout.blocks, -1), layout).clone() if tiled else value.clone()
    return found
