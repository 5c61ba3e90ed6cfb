"""When and how the functions of this package look at the values that they are given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shared_core.errors import InputError


def is_concrete(*tensors: Tensor) -> bool:
    """Whether values of the tensors may be looked at: not while compiling, exporting, tracing, vmapping or capturing.

    Shapes are always checked; checks of *values* need a concrete tensor, and on a GPU a synchronisation.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return False
    # The only way torch has to say "inside vmap"; asking a batched tensor for its value raises.
    if torch._C._functorch.maybe_current_level() is not None:  # pyright: ignore[reportAttributeAccessIssue, reportPrivateUsage]
        return False
    if any(tensor.is_meta for tensor in tensors):
        return False
    return not (any(tensor.is_cuda for tensor in tensors) and torch.cuda.is_current_stream_capturing())


def place(index: list[int]) -> str:
    if len(index) == 1:
        return f"position {index[0]}"
    if len(index) == 2:
        return f"row {index[0]}, column {index[1]}"
    return f"index {tuple(index)}"


def check_floating(x: Any, name: str) -> None:
    if not isinstance(x, Tensor):
        kind = type(x).__name__
        raise InputError(
            f"{name} is a {kind}; give a torch tensor, for example torch.as_tensor({name}), or a CSR matrix"
        )
    if not x.is_floating_point():
        raise InputError(f"{name} has dtype {x.dtype}; give a floating-point tensor, for example {name}.float()")


def check_finite(x: Tensor, observed: Tensor | None, probe: Tensor) -> None:
    """Refuse NaN and infinity among observed entries; ``observed=None`` means that NaN marks missing entries.

    ``probe`` holds every value that has to be finite; where all of it is, nothing more is looked at.
    """
    # One reduction without a temporary: a finite sum proves every term finite.
    total = probe.detach().sum(dtype=torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else None)
    if bool(torch.isfinite(total)):
        return
    bad = torch.isinf(x) if observed is None else observed & ~torch.isfinite(x)
    if not bool(bad.any()):
        return
    index = [int(i) for i in bad.nonzero()[0]]
    if bool(torch.isnan(x[tuple(index)])):
        raise InputError(
            f"x is NaN at {place(index)} although mask says observed; set the mask to 0 there or fill the value"
        )
    raise InputError(f"x is infinite at {place(index)}; observed entries must be finite, use NaN for a missing one")


def check_mask_values(mask: Tensor, weighted: bool) -> None:
    bad = ~((mask >= 0) & (mask <= 1)) if weighted else (mask != 0) & (mask != 1)
    if bool(bad.any()):
        index = [int(i) for i in bad.nonzero()[0]]
        allowed = "in [0, 1]" if weighted else "0 or 1 (weighted=True allows confidences between them)"
        raise InputError(f"mask is {mask[tuple(index)].item():g} at {place(index)}; it must be {allowed}")


def check_groups(groups: Tensor, features: int) -> None:
    if groups.ndim != 1 or groups.shape[0] != features:
        raise InputError(f"groups has shape {tuple(groups.shape)}; expected ({features},), one group number a feature")
    if groups.is_floating_point():
        raise InputError(f"groups has dtype {groups.dtype}; give integer group numbers")
    if is_concrete(groups) and features:
        low, high = (int(bound) for bound in torch.aminmax(groups))
        if low < 0 or high >= features:
            bad = low if low < 0 else high
            raise InputError(f"groups holds {bad}; group numbers must lie in 0..{features - 1}")


def count_dtype(x: Tensor) -> torch.dtype:
    # bfloat16 counts above 256 and float16 counts above 2048 are not exact.
    return torch.float64 if x.dtype == torch.float64 else torch.float32
