"""Fold norms into the convolutions before them: the same function with a pass over the data less each (spec 9)."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.nn.utils.parametrize import is_parametrized

from shared_core.errors import InputError
from stamp.axes import CONVS, TRANSPOSED

__all__ = ["FoldError", "fold_bn"]

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class FoldError(InputError):
    """A network of which it cannot be seen which norm follows which convolution."""


def fold_bn(model: nn.Module) -> nn.Module:
    """Fold each BatchNorm into the convolution whose output it alone takes, for inference.

    Cut first and fold then: a folded network has no norms left to recalibrate or train, and its groups are others.

    Parameters
    ----------
    model : with the statistics it is to keep; it stays as it is

    Returns
    -------
    A copy of the same class in evaluation mode, with `torch.nn.Identity` in place of the norms folded: equal to the
    model in evaluation mode up to rounding. Norms after anything else, or of batch statistics only, stay.

    Raises
    ------
    FoldError
        If `torch.fx` cannot trace the network.

    Examples
    --------
    >>> fold_bn(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()))
    Sequential(
      (0): Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1))
      (1): Identity()
      (2): ReLU()
    )
    """
    model = copy.deepcopy(model).eval()
    try:
        graph = fx.Tracer().trace(model)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise FoldError(f"torch.fx cannot trace the model ({reason}); leave its norms unfolded") from error
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    holders = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        conv, norm = (model.get_submodule(str(n.target)) for n in (before, node))
        if not _folds(conv, norm) or any(calls[n.target] > 1 for n in (before, node)):
            continue
        if any(holders[id(p)] > 1 for p in (*conv.parameters(), *norm.parameters())):
            continue
        _fold(conv, norm)
        owner, _, leaf = str(node.target).rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Identity())
    return model


def _folds(conv: nn.Module, norm: nn.Module) -> bool:
    if type(conv) not in CONVS or is_parametrized(conv) or type(norm) not in NORMS or is_parametrized(norm):
        return False
    grouped = isinstance(conv, TRANSPOSED) and conv.groups > 1
    return not grouped and getattr(norm, "running_mean", None) is not None


def _fold(conv: Any, norm: Any) -> None:
    statistics = norm.running_mean, norm.running_var, norm.eps
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, *statistics, norm.weight, norm.bias, isinstance(conv, TRANSPOSED)
    )
