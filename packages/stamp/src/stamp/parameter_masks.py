"""Masks of single weights: the largest scores live, and scores learn through them straight (spec 2.10).

Such masks lower the number of parameters and nothing else. A weight that is zero is still multiplied, so that a network
masked this way takes as long as before; only whole channels, which `surgery.cut` removes, save time.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.optim.lr_scheduler import CosineAnnealingLR

from shared_core.errors import InputError
from stamp.axes import BATCH, CONVS
from stamp.drawing import endless_batches
from stamp.examples import Examples

__all__ = [
    "MaskError",
    "Sparse",
    "edge_popup",
    "initial_scores",
    "layer_weights",
    "masked_weights",
    "sparse_network",
    "top_k_mask",
]


class MaskError(InputError):
    """A share of weights that no mask can keep, or scores that fit no weights."""


def top_k_mask(scores: Float[Tensor, "*shape"], keep: float) -> Float[Tensor, "*shape"]:
    """Return 1 where a score's absolute value is among the largest, 0 elsewhere.

    Parameters
    ----------
    scores : of the weights of one layer
    keep : share in (0, 1]; the ``int((1 - keep) * n)`` lowest of n are zero

    Returns
    -------
    Zeros and ones; their gradient passes to the absolute scores as if they were these (straight-through).

    Raises
    ------
    MaskError
        For a share out of range.

    References
    ----------
    Ramanujan et al., "What's Hidden in a Randomly Weighted Neural Network?", CVPR 2020, section 3.2.

    Examples
    --------
    >>> top_k_mask(torch.tensor([0.3, -2.0, 0.1, 1.0]), 0.5)
    tensor([0., 1., 0., 1.])
    """
    if not 0 < keep <= 1:
        raise MaskError(f"keep={keep} is no share; give one above 0 and at most 1, e.g. 0.5")
    size = scores.abs()
    order = size.detach().flatten().argsort(stable=True)
    mask = torch.ones_like(order, dtype=scores.dtype)
    mask[order[: int((1 - keep) * len(order))]] = 0
    # Added last, so that the forward value is exactly 0 or 1.
    return mask.view_as(scores) + (size - size.detach())


def layer_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weight matrices and kernels of convolutions, linear layers, embeddings and attentions.

    Parameters
    ----------
    model : its biases, norms and bare parameters are left out

    Examples
    --------
    >>> list(layer_weights(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))))
    ['0.weight']
    """
    layers = (*CONVS, nn.Linear, nn.Embedding, nn.MultiheadAttention)
    owners = {name for name, module in model.named_modules() if isinstance(module, layers)}
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and name.rpartition(".")[0] in owners
    }


def initial_scores(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw scores for every weight of `layer_weights`, Kaiming-uniform as linear layers draw their weights.

    Parameters
    ----------
    model : whose weights are to be masked
    generator : of the numbers, of any device

    Returns
    -------
    Scores by the weights' names, on their devices, that require gradients. `surgery.restrict` cuts them like weights.
    """
    scores: dict[str, Tensor] = {}
    for name, weight in layer_weights(model).items():
        drawn = torch.empty(weight.shape, dtype=weight.dtype, device=generator.device)
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
        scores[name] = drawn.to(weight.device).requires_grad_()
    return scores


def masked_weights(
    model: nn.Module, scores: Mapping[str, Tensor], keep: float, *, weights: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Multiply weights by their masks, for `torch.func.functional_call`.

    Parameters
    ----------
    model : whose weights they are
    scores : by the weights' names; a weight left out is not masked
    keep : share of each layer's weights that live
    weights : to be masked in place of the model's own, e.g. those that `surgery.gated_parameters` returns

    Returns
    -------
    All the weights that are masked or were given, differentiable in weights and scores.

    Raises
    ------
    MaskError
        For scores that are not shaped like their weight, or are no weight's.

    Examples
    --------
    >>> net = nn.Linear(2, 2, bias=False)
    >>> made = masked_weights(net, {"weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}, 0.5)
    >>> bool((made["weight"][0] == 0).all())
    True
    """
    own = dict(model.named_parameters())
    made = dict(weights or {})
    for name, score in scores.items():
        if name not in own:
            raise MaskError(f"scores[{name!r}] belong to no parameter of the model; the first is {next(iter(own))!r}")
        weight = made.get(name, own[name])
        if score.shape != weight.shape:
            raise MaskError(
                f"scores[{name!r}] have shape {tuple(score.shape)}, and the weight {tuple(weight.shape)};"
                " cut them with surgery.restrict when the network is cut"
            )
        made[name] = weight * top_k_mask(score, keep)
    return made


@dataclass(frozen=True)
class Sparse:
    """A network with weights set to zero: as large and as slow as before.

    Parameters
    ----------
    model : of the same shapes
    kept : parameters that live, the unmasked ones included
    total : parameters of the network
    """

    model: nn.Module
    kept: int
    total: int

    @property
    def speed_up(self) -> float:
        """One: zeros are multiplied like other numbers."""
        return 1.0


def sparse_network(model: nn.Module, scores: Mapping[str, Tensor], keep: float) -> Sparse:
    """Copy a network and set the weights to zero that their masks remove.

    Parameters
    ----------
    model : stays as it is
    scores, keep : as for `masked_weights`
    """
    network = copy.deepcopy(model)
    removed = 0
    with torch.no_grad():
        masks = {name: top_k_mask(score.detach(), keep) for name, score in scores.items()}
        for name, value in masked_weights(model, scores, keep).items():
            network.get_parameter(name).copy_(value)
            removed += int((masks[name] == 0).sum())
    total = sum(parameter.numel() for parameter in network.parameters())
    return Sparse(network, total - removed, total)


def edge_popup(
    model: nn.Module,
    data: Examples,
    keep: float = 0.5,
    *,
    generator: torch.Generator,
    steps: int = 300,
    batch_size: int = 64,
    lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
) -> Sparse:
    """Search a subnetwork of a network whose weights never change: train the scores of its weights alone.

    Parameters
    ----------
    model : with a head for the data's classes; it stays as it is
    data : labelled
    keep : share of each layer's weights that live
    generator : draws scores and batches
    steps : of stochastic gradient descent with a cosine rate
    batch_size, lr, momentum, weight_decay : of them

    Returns
    -------
    A copy with the removed weights at zero and batch norms' statistics of the new data. It is **not faster**: no weight
    has gone, so that its speed-up is 1. Report its accuracy and its kept parameters only.

    Raises
    ------
    MaskError
        For a share out of range.

    References
    ----------
    Ramanujan et al., "What's Hidden in a Randomly Weighted Neural Network?", CVPR 2020.

    Examples
    --------
    >>> net = nn.Linear(4, 2)
    >>> data = Examples(torch.rand(4, 4), torch.tensor([0, 1, 0, 1]), ("a", "b"))
    >>> found = edge_popup(net, data, 0.25, generator=torch.Generator().manual_seed(0), steps=2)
    >>> found.kept, found.total, found.speed_up
    (4, 10, 1.0)
    """
    network = copy.deepcopy(model).eval()
    for module in network.modules():
        if isinstance(module, BATCH):
            module.train()
    scores = initial_scores(network, generator)
    optimizer = torch.optim.SGD(scores.values(), lr, momentum=momentum, weight_decay=weight_decay)
    schedule = CosineAnnealingLR(optimizer, max(1, steps))
    batches = endless_batches(network, data, generator, batch_size)
    with torch.enable_grad():
        for _ in range(steps):
            x, y = next(batches)
            loss = functional.cross_entropy(functional_call(network, masked_weights(network, scores, keep), x), y)
            slopes = torch.autograd.grad(loss, list(scores.values()), allow_unused=True)
            for score, slope in zip(scores.values(), slopes, strict=True):
                score.grad = slope
            optimizer.step()
            schedule.step()
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in network.named_modules():
        module.training = modes[name]
    return sparse_network(network, scores, keep)
