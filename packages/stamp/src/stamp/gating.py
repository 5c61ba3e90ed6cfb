"""Features of a gated network, and how much each channel matters to telling a set's instances or classes apart."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from stamp.observing import evaluating
from stamp.structure import ChannelGroups
from stamp.surgery import entry_gates, gated_parameters

__all__ = ["gated_features", "separations"]

_SCALE = 10.0


def gated_features(
    model: nn.Module,
    groups: ChannelGroups,
    gates: Mapping[str, Float[Tensor, " width"]],
    x: Float[Tensor, "n ..."],
    head: str,
    *,
    batch_statistics: bool = False,
) -> Float[Tensor, "n *positions features"]:
    """Run a network with gates and return what enters its head, gated too.

    Parameters
    ----------
    model : run in eval mode; modes, statistics and parameters stay
    groups : its channel groups
    gates : a number a channel; groups left out are not gated
    x : a batch
    head : qualified name of the last layer
    batch_statistics : normalise by the batch's own statistics, as a network does that was recalibrated on such data

    Examples
    --------
    >>> from stamp.groups import trace
    >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> groups = trace(net, torch.rand(2, 3))
    >>> gates = {"0": torch.tensor([1.0, 0.0, 0.0, 0.0])}
    >>> gated_features(net, groups, gates, torch.rand(5, 3), "2")[:, 1:].sum().item()
    0.0
    """
    changed = gated_parameters(model, groups, gates)
    found: list[Tensor] = []
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        handle = model.get_submodule(head).register_forward_pre_hook(lambda _, args: found.append(args[0]))
        stack.callback(handle.remove)
        if batch_statistics:
            for module in model.modules():
                if isinstance(module, _BatchNorm):
                    module.train()
            changed |= {name: value.clone() for name, value in model.named_buffers()}
        functional_call(model, changed, (x,))
    return found[-1] * entry_gates(model, groups, gates, head).to(found[-1])


def separations(
    model: nn.Module,
    groups: ChannelGroups,
    x: Float[Tensor, "set ..."],
    head: str,
    y: Int64[Tensor, " set"] | None = None,
) -> dict[str, Float[Tensor, " width"]]:
    """Return what each channel does to the separation of a set, to first order.

    Without classes each instance is to be told from all others by the cosine of its feature with itself; with classes,
    by the cosine with the means of classes. The result is minus the derivative of that cross-entropy in the channel's
    gate, at 1: positive where the channel helps. With classes its absolute value is SNIP's score of channels.

    Parameters
    ----------
    model : run in eval mode; nothing of it changes
    groups : its channel groups
    x : the set
    head : qualified name of the last layer
    y : class of each instance

    References
    ----------
    Lee et al., "SNIP: Single-shot network pruning based on connection sensitivity", ICLR 2019, section 3.
    """
    # Also where the caller has switched gradients off for good.
    with torch.inference_mode(mode=False), torch.enable_grad():
        x = x.clone() if x.is_inference() else x
        gates = {
            name: torch.ones(width, device=x.device, requires_grad=True) for name, width in groups.widths().items()
        }
        # In float64, on the CPU that always has it: float32 keeps little of a softmax that is nearly certain.
        features = gated_features(model, groups, gates, x, head).flatten(1).to("cpu", torch.float64)
        features = features - features.detach().mean(0)
        if y is None:
            of = torch.arange(len(x))
            target = functional.normalize(features.detach(), dim=1)
        else:
            _, of = y.cpu().unique(return_inverse=True)
            member = functional.one_hot(of).to(features)
            target = functional.normalize((member.T @ features.detach()) / member.sum(0)[:, None], dim=1)
        logits = _SCALE * functional.normalize(features, dim=1) @ target.T
        loss = functional.cross_entropy(logits, of)
        found = torch.autograd.grad(loss, list(gates.values()), materialize_grads=True)
    return {name: -value for name, value in zip(gates, found, strict=True)}
