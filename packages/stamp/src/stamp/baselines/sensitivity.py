"""Scores by derivatives, of the loss or of the network's output, at the network as it is (spec 3)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from stamp.baselines.channels import Scores, channel_sums
from stamp.drawing import sampled_batches
from stamp.examples import Examples
from stamp.observing import evaluating
from stamp.parameter_masks import layer_weights
from stamp.structure import ChannelGroups
from stamp.surgery import gated_parameters

__all__ = ["grasp", "snip", "synaptic_flow", "synflow", "taylor"]


def snip(
    model: nn.Module,
    groups: ChannelGroups,
    data: Examples,
    generator: torch.Generator,
    *,
    batches: int = 10,
    batch_size: int = 64,
) -> Scores:
    """Return the sensitivity of the loss to each channel's gate, ``|dL/dz|`` at ``z = 1``, as a share of the total.

    Parameters
    ----------
    model : from which the groups were traced, with a head for the data's classes; it stays as it is
    groups : its channel groups
    data : labelled
    generator : draws the batches
    batches, batch_size : how much of the data the loss is averaged over

    References
    ----------
    Lee, Ajanthan, Torr, "SNIP: Single-shot Network Pruning based on Connection Sensitivity", ICLR 2019, equation 6.

    Examples
    --------
    >>> from stamp.groups import trace
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
    >>> data = Examples(torch.rand(4, 2), torch.tensor([0, 1, 0, 1]), ("a", "b"))
    >>> scores = snip(net, trace(net, data.inputs()), data, torch.Generator().manual_seed(0))
    >>> round(float(scores["0"].sum()), 5)
    1.0
    """
    slopes = _gate_slopes(model, groups, data, generator, batches, batch_size)
    sensitivity = {name: sum((slope[name] for slope in slopes), torch.zeros(())).abs() for name in groups.widths()}
    total = sum(float(values.sum()) for values in sensitivity.values())
    return {name: values / (total or 1.0) for name, values in sensitivity.items()}


def taylor(
    model: nn.Module,
    groups: ChannelGroups,
    data: Examples,
    generator: torch.Generator,
    *,
    batches: int = 10,
    batch_size: int = 64,
) -> Scores:
    """Return the squared change of the loss, to first order, if a channel went: ``(dL/dz)^2`` averaged over batches.

    Parameters
    ----------
    model, groups, data, generator, batches, batch_size : as for `snip`

    References
    ----------
    Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, equation 8.
    """
    slopes = _gate_slopes(model, groups, data, generator, batches, batch_size, average_each=True)
    return {
        name: sum((slope[name].square() for slope in slopes), torch.zeros(())) / len(slopes) for name in groups.widths()
    }


def grasp(
    model: nn.Module,
    groups: ChannelGroups,
    data: Examples,
    generator: torch.Generator,
    *,
    temperature: float = 200.0,
    per_class: int = 25,
    batch_size: int = 64,
) -> Scores:
    """Return what removing the channel would take from the gradient flow, ``sum theta * (H g)``, to first order.

    Parameters
    ----------
    model : from which the groups were traced, with a head for the data's classes; it stays as it is
    groups : its channel groups
    data : labelled
    generator : draws the examples
    temperature : by which logits are divided
    per_class : examples of each class, or all where there are fewer
    batch_size : examples at a time

    Returns
    -------
    Scores of either sign, summed over a channel's weights and divided by the absolute sum over all weights. GraSP's own
    score is the opposite one, of which it drops the largest.

    References
    ----------
    Wang, Zhang, Grosse, "Picking Winning Tickets Before Training by Preserving Gradient Flow", ICLR 2020, equation 8.
    """
    weights = {name: w.detach().requires_grad_() for name, w in layer_weights(model).items()}
    chosen = data.rows(_some_of_each(data, per_class, generator))
    batches = list(sampled_batches(model, chosen, generator, len(chosen), batch_size))

    def gradient(x: Tensor, y: Tensor, **options: Any) -> tuple[Tensor, ...]:
        logits = functional_call(model, weights, x) / temperature
        loss = functional.cross_entropy(logits, y, reduction="sum") / len(chosen)
        return torch.autograd.grad(loss, list(weights.values()), allow_unused=True, materialize_grads=True, **options)

    # The fused attention kernels have no second derivative.
    with torch.enable_grad(), evaluating(model), sdpa_kernel(SDPBackend.MATH):
        flow = [sum(parts, torch.zeros(())) for parts in zip(*(gradient(*batch) for batch in batches), strict=True)]
        product = [torch.zeros_like(g) for g in flow]
        for batch in batches:
            slopes = gradient(*batch, create_graph=True)
            inner = torch.stack([(slope * g).sum() for slope, g in zip(slopes, flow, strict=True)]).sum()
            curved = torch.autograd.grad(inner, list(weights.values()), allow_unused=True, materialize_grads=True)
            for total, part in zip(product, curved, strict=True):
                total += part
    scores = {name: w.detach() * h for (name, w), h in zip(weights.items(), product, strict=True)}
    total = abs(sum(float(values.sum()) for values in scores.values())) + 1e-10
    return channel_sums(model, groups, {name: values / total for name, values in scores.items()})


def synflow(
    model: nn.Module,
    groups: ChannelGroups,
    data: Examples,
    generator: torch.Generator,  # noqa: ARG001
    *,
    rounds: int = 100,
    keep: float = 0.1,
) -> Scores:
    """Sum the synaptic flow of the weights that compute each channel, after pruning weights in many small steps.

    Parameters
    ----------
    model : from which the groups were traced; it stays as it is
    groups : its channel groups
    data : shows the shape of an input only
    generator : not used
    rounds : after round t of them, the share ``keep ** (t / rounds)`` of all weights lives
    keep : share of the weights that live in the end

    Returns
    -------
    Scores, in float64; a weight counts by its flow in the last round in which it lived, as a share of all flow.

    References
    ----------
    Tanaka et al., "Pruning neural networks without any data by iteratively conserving synaptic flow", NeurIPS 2020.
    """
    net = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            if tensor.is_floating_point() and bool(tensor.isfinite().all()):
                tensor.abs_()
    living = {name: w.detach() for name, w in layer_weights(net).items()}
    ones = torch.ones(1, *data.shape, dtype=torch.float64, device=next(net.parameters()).device)
    share = {name: torch.zeros_like(w) for name, w in living.items()}
    for step in range(1, rounds + 1):
        flow = synaptic_flow(net, living, ones)
        everything = torch.cat([values.flatten() for values in flow.values()])
        gone = int((1 - keep ** (step / rounds)) * len(everything))
        threshold = float(everything.kthvalue(gone).values) if gone else -1.0
        total = float(everything.sum())
        for name, values in flow.items():
            share[name] = torch.where(living[name] != 0, values / (total or 1.0), share[name])
            living[name] = living[name] * (values > threshold)
    return channel_sums(net, groups, share)


def synaptic_flow(
    model: nn.Module, weights: Mapping[str, Tensor], x: Float[Tensor, "1 ..."]
) -> dict[str, Float[Tensor, "..."]]:
    """Return ``|dR/dtheta * theta|`` of each weight, R being the sum of what the network makes of `x`.

    Parameters
    ----------
    model : whose parameters and statistics are not negative
    weights : to be used in place of the model's, by name
    x : all ones

    Returns
    -------
    Flows; without biases, each layer that all paths pass has the same total.
    """
    own = {name: w.detach().requires_grad_() for name, w in weights.items()}
    with torch.enable_grad():
        total = functional_call(model, own, x).sum()
        slopes = torch.autograd.grad(total, list(own.values()), allow_unused=True, materialize_grads=True)
    return {name: (w.detach() * slope).abs() for (name, w), slope in zip(own.items(), slopes, strict=True)}


def _gate_slopes(
    model: nn.Module,
    groups: ChannelGroups,
    data: Examples,
    generator: torch.Generator,
    batches: int,
    batch_size: int,
    *,
    average_each: bool = False,
) -> list[Scores]:
    """Differentiate the loss of each batch by gates of ones: its mean, or its part of the mean over all batches."""
    like = next(model.parameters())
    gates = {name: like.new_ones(width).requires_grad_() for name, width in groups.widths().items()}
    slopes: list[tuple[int, tuple[Tensor, ...]]] = []
    with torch.enable_grad(), evaluating(model):
        for x, y in sampled_batches(model, data, generator, batches, batch_size):
            loss = functional.cross_entropy(functional_call(model, gated_parameters(model, groups, gates), x), y)
            slopes.append((len(x), torch.autograd.grad(loss, list(gates.values())) if gates else ()))
    examples = sum(number for number, _ in slopes)
    return [
        {
            name: (slope if average_each else slope * (number / examples)).cpu()
            for name, slope in zip(gates, found, strict=True)
        }
        for number, found in slopes
    ]


def _some_of_each(data: Examples, per_class: int, generator: torch.Generator) -> Tensor:
    order = torch.randperm(len(data), generator=generator, device=generator.device).to(data.y.device)
    return torch.cat([order[data.y[order] == label][:per_class] for label in range(data.num_classes)])
