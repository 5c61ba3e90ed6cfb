"""Which axis of which tensor of a module belongs to its inputs, its outputs or its normalised channels."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

__all__ = ["CONVS", "NORMS", "TRANSPOSED", "Place", "axis_length", "axis_places", "gate_places", "resize"]

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
INSTANCE = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
BATCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
NORMS = (*BATCH, *INSTANCE, nn.GroupNorm, nn.PReLU)


class Place(NamedTuple):
    """An axis of a tensor of a module, holding the module's axis `repeats` times in a row."""

    tensor: str
    dim: int
    repeats: int = 1


def axis_places(module: nn.Module, axis: str) -> list[Place]:
    """Return the tensors to slice when entries of the axis go.

    Parameters
    ----------
    module : a convolution, linear layer, embedding, norm, PReLU or attention
    axis : see `structure.Slot`

    Raises
    ------
    TypeError
        For a module that has no such axis.
    """
    places: list[Place]
    match module:
        case nn.Linear() | nn.Conv1d() | nn.Conv2d() | nn.Conv3d() if axis == "out":
            places = [Place("weight", 0), Place("bias", 0)]
        case nn.Linear() if axis == "in":
            places = [Place("weight", 1)]
        case nn.Conv1d() | nn.Conv2d() | nn.Conv3d() if axis == "in":
            places = [Place("weight", 1)] if module.groups == 1 else []
        case nn.ConvTranspose1d() | nn.ConvTranspose2d() | nn.ConvTranspose3d() if axis == "out":
            places = [Place("bias", 0)] + ([Place("weight", 1)] if module.groups == 1 else [])
        case nn.ConvTranspose1d() | nn.ConvTranspose2d() | nn.ConvTranspose3d() if axis == "in":
            places = [Place("weight", 0)]
        case nn.Embedding() if axis == "out":
            places = [Place("weight", 1)]
        case nn.Module() if isinstance(module, NORMS) and axis == "norm":
            places = [Place(name, 0) for name in ("weight", "bias", "running_mean", "running_var")]
        case nn.MultiheadAttention() if axis in {"in", "key", "value", "inner", "out"}:
            places = {
                "in": [Place("in_proj_weight", 1), Place("q_proj_weight", 1)],
                "key": [Place("k_proj_weight", 1)],
                "value": [Place("v_proj_weight", 1)],
                "out": [Place("out_proj.weight", 0), Place("out_proj.bias", 0)],
                "inner": [
                    Place("in_proj_weight", 0, 3),
                    Place("in_proj_bias", 0, 3),
                    *(Place(f"{part}_proj_weight", 0) for part in "qkv"),
                    Place("out_proj.weight", 1),
                ],
            }[axis]
        case _:
            raise TypeError(f"{type(module).__name__} has no axis {axis!r} to remove channels from")
    return [place for place in places if _tensor(module, place.tensor) is not None]


def gate_places(module: nn.Module, axis: str) -> list[Place]:
    """Return the axes of weights that a gate on the module's input multiplies (spec 2.2)."""
    if isinstance(module, nn.MultiheadAttention) and axis == "inner":
        return [Place("out_proj.weight", 1)]
    return axis_places(module, axis)


def axis_length(module: nn.Module, axis: str) -> int:
    """Return the entries of the axis."""
    named: Any = module
    match module:
        case nn.Linear():
            return module.in_features if axis == "in" else module.out_features
        case nn.Embedding():
            return module.embedding_dim
        case nn.GroupNorm():
            return module.num_channels
        case nn.PReLU():
            return module.num_parameters
        case nn.MultiheadAttention():
            return {"key": module.kdim, "value": module.vdim}.get(axis, module.embed_dim) or module.embed_dim
        case nn.Module() if isinstance(module, NORMS):
            return int(named.num_features)
        case _:
            return int(named.in_channels if axis == "in" else named.out_channels)


def resize(module: nn.Module, axis: str, length: int) -> None:
    """Write the axis's new length into the module's attributes; a tied convolution loses whole groups.

    An attention is not resized but replaced: see `attention.NarrowAttention`.
    """
    named: Any = module
    match module:
        case nn.Linear():
            setattr(module, "in_features" if axis == "in" else "out_features", length)
        case nn.Embedding():
            module.embedding_dim = length
        case nn.GroupNorm():
            module.num_groups = length * module.num_groups // module.num_channels
            module.num_channels = length
        case nn.PReLU():
            module.num_parameters = length
        case nn.Module() if isinstance(module, NORMS):
            named.num_features = length
        case nn.Module() if isinstance(module, CONVS):
            if axis == "in" and named.groups > 1:
                named.groups = length * named.groups // named.in_channels
            setattr(module, "in_channels" if axis == "in" else "out_channels", length)
        case _:
            raise TypeError(f"{type(module).__name__} has no axis {axis!r} to resize")


def _tensor(module: nn.Module, name: str) -> Tensor | None:
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part, None)
    return value
