"""Gradients of the objective, written down: several times faster than taping them for networks so small.

A step of a small stack is a few dozen kernels of some microseconds each, and recording and replaying them costs more
than running them. Not covered are DragonNet's losses, dropout, noise that depends on z, and unlabelled rows: these are
differentiated by torch, and tests hold one against the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cib_ite import losses
from cib_ite.network import CIBStack, StackedMLP
from cib_ite.settings import Settings

__all__ = ["Batch", "Imbalance", "covers", "discriminator_gradients", "model_gradients"]


@dataclass(frozen=True, eq=False)
class Batch:
    """One batch of every member, treated rows first.

    Parameters
    ----------
    x : (stack, rows, inputs)
    y : (stack, rows)
    weight : (stack, rows) of each row in the loss
    share : (stack, rows) part of the batch's mean that is the row's; 0 for padding
    treated : rows in the treated slots
    treatment : (rows,) 1 in the treated slots, else 0
    treated_share : (stack,) treated share of the training rows
    """

    x: Float[Tensor, "stack rows inputs"]
    y: Float[Tensor, "stack rows"]
    weight: Float[Tensor, "stack rows"]
    share: Float[Tensor, "stack rows"]
    treated: int
    treatment: Float[Tensor, " rows"]
    treated_share: Float[Tensor, " stack"]


Imbalance = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def covers(settings: Settings) -> bool:
    """Whether these gradients are those of the objective that the settings describe, without unlabelled rows.

    Parameters
    ----------
    settings : of the members
    """
    s = settings
    return s.dragon == 0 and s.likelihood != "hetero" and not s.dropout_trunk and not s.dropout_head


@dataclass(frozen=True, eq=False)
class _Layers:
    """Weights and biases of some of the networks of a stack."""

    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    final_activation: bool = False


def _forward(part: StackedMLP | _Layers, x: Tensor) -> list[Tensor]:
    """Evaluate, keeping the inputs of every layer, and the output."""
    values, last = [x], len(part.weights) - 1
    for layer, (weight, bias) in enumerate(zip(part.weights, part.biases, strict=True)):
        x = torch.baddbmm(bias, x, weight)
        if layer < last or part.final_activation:
            x = nn.functional.elu_(x)
        values.append(x)
    return values


def _backward(
    part: StackedMLP | _Layers, values: list[Tensor], gradient: Tensor, *, weights: bool = True, inputs: bool = True
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Gradients of weights, biases and input from that of the output."""
    last = len(part.weights) - 1
    of_weights: list[Tensor] = []
    of_biases: list[Tensor] = []
    for layer in range(last, -1, -1):
        if layer < last or part.final_activation:
            # The slope of ELU from its value: 1 above 0, value + 1 below.
            gradient = values[layer + 1].clamp(max=0).add_(1).mul_(gradient)
        if weights:
            of_weights.append(torch.bmm(values[layer].mT, gradient))
            of_biases.append(gradient.sum(1, keepdim=True))
        if layer > 0 or inputs:
            gradient = torch.bmm(gradient, part.weights[layer].mT)
    return of_weights[::-1], of_biases[::-1], gradient


@torch.no_grad()
def model_gradients(
    net: CIBStack,
    batch: Batch,
    noise: Float[Tensor, "stack rows samples latent"] | None,
    *,
    binary: bool,
    variance: bool,
    imbalance: Imbalance | None,
    beta: Float[Tensor, " stack"],
    gamma: Float[Tensor, " stack"],
    lam: Float[Tensor, " stack"],
) -> tuple[dict[str, Tensor], dict[str, Tensor], Float[Tensor, "..."]]:
    """Terms of the objective ``(stack,)``, gradients of its weighted sum by parameter name, and z's distribution.

    Parameters
    ----------
    net : the stack
    batch : ``(stack, rows, ...)``
    noise : ``(stack, rows, samples, latent)``; None for a deterministic z
    binary : heads give logits
    variance : penalise the variance of the counterfactual prediction
    imbalance : measure of dependence ``(z, mean, scale) -> (stack,)`` that torch differentiates; None for the
        discriminator's
    beta, gamma, lam : ``(stack,)`` weights of the terms, warm-up included

    Returns
    -------
    The last is what z is drawn from: mean and scale ``(2, stack, rows, latent)``, or z itself ``(stack, rows, width)``.
    """
    s, share = net.settings, batch.share
    trunk = _forward(net.encoder, batch.x)
    projected: list[Tensor] = []
    rho = scale = None
    if noise is None:
        mean = trunk[-1]
        if s.normalize:
            mean = mean / _length(mean)
        z = mean.unsqueeze(2)
    else:
        projected = _forward(net.projection, trunk[-1])
        mean, rho = projected[-1].chunk(2, dim=-1)
        scale = nn.functional.softplus(rho - 2).add_(1e-3)
        z = torch.addcmul(mean.unsqueeze(2), scale.unsqueeze(2), noise)
    terms: dict[str, Tensor] = {}
    found: dict[str, Tensor] = {"epsilon": torch.zeros_like(net.epsilon), "log_sigma": torch.zeros_like(net.log_sigma)}
    if variance and noise is not None:
        of_z = _both_arms(net, batch, z, lam, terms, found, binary=binary)
    else:
        of_z = _own_arm(net, batch, z, terms, found, binary=binary)
    of_mean = of_scale = None
    if imbalance is not None:
        terms["independence"], of_first, of_mean, of_scale = _measured(imbalance, z[:, :, 0], mean, scale, gamma)
        of_z[:, :, 0] += of_first
    elif s.independence != "none":
        terms["independence"], of_first = _independence(net, z[:, :, 0], batch, gamma)
        of_z[:, :, 0] += of_first
    if noise is None or scale is None or rho is None:
        gradient = of_z[:, :, 0] if of_mean is None else of_z[:, :, 0] + of_mean
        if s.normalize:
            gradient = (gradient - mean * (gradient * mean).sum(-1, keepdim=True)) / _length(trunk[-1])
        of_weights, of_biases, _ = _backward(net.encoder, trunk, gradient, inputs=False)
        _name(found, "encoder", of_weights, of_biases)
        return terms, found, mean
    terms["rate"] = (losses.kl_diag(mean, scale) * share).sum(1)
    price = (beta.unsqueeze(1) * share).unsqueeze(2)
    gradient = torch.addcmul(of_z.sum(2), price, mean)
    spread = torch.addcmul((of_z * noise).sum(2), price, scale - 1 / scale)
    if of_mean is not None:
        gradient += of_mean
    if of_scale is not None:
        spread += of_scale
    spread.mul_(torch.sigmoid(rho - 2))
    of_weights, of_biases, of_trunk = _backward(net.projection, projected, torch.cat([gradient, spread], 2))
    _name(found, "projection", of_weights, of_biases)
    of_weights, of_biases, _ = _backward(net.encoder, trunk, of_trunk, inputs=False)
    _name(found, "encoder", of_weights, of_biases)
    return terms, found, torch.stack([mean, scale])


def _length(h: Tensor) -> Tensor:
    return h.square().sum(-1, keepdim=True).clamp(min=1e-10).sqrt()


def _both_arms(
    net: CIBStack,
    batch: Batch,
    z: Tensor,
    lam: Tensor,
    terms: dict[str, Tensor],
    found: dict[str, Tensor],
    *,
    binary: bool,
) -> Tensor:
    """Prediction and counterfactual variance, and their gradient in z ``(stack, rows, samples, latent)``."""
    g, rows, k, latent = z.shape
    treated = batch.treated
    both = z.view(g, 1, rows * k, latent).expand(g, 2, rows * k, latent).reshape(2 * g, rows * k, latent)
    heads = _forward(net.heads, both)
    f = heads[-1].view(g, 2, rows, k)
    seen = torch.cat([f[:, 1, :treated], f[:, 0, treated:]], 1)
    other = torch.cat([f[:, 0, :treated], f[:, 1, treated:]], 1)
    terms["variance"], of_other = _variance(other, batch.share, lam, binary)
    of_seen = _prediction(net, batch, seen, terms, found, binary=binary)
    of_f = torch.stack(
        [
            torch.cat([of_other[:, :treated], of_seen[:, treated:]], 1),
            torch.cat([of_seen[:, :treated], of_other[:, treated:]], 1),
        ],
        1,
    )
    of_weights, of_biases, of_both = _backward(net.heads, heads, of_f.view(2 * g, rows * k, 1))
    _name(found, "heads", of_weights, of_biases)
    return of_both.view(g, 2, rows, k, latent).sum(1)


def _own_arm(
    net: CIBStack, batch: Batch, z: Tensor, terms: dict[str, Tensor], found: dict[str, Tensor], *, binary: bool
) -> Tensor:
    """As :func:`_both_arms` without the variance: each row goes through the head of its own arm only."""
    g, _, k, latent = z.shape
    treated = batch.treated
    arms = [
        _Layers([w[arm::2] for w in net.heads.weights], [b[arm::2] for b in net.heads.biases]) for arm in (1, 0)
    ]  # fmt: skip
    parts = [part.reshape(g, -1, latent) for part in (z[:, :treated], z[:, treated:])]
    values = [_forward(arm, part) for arm, part in zip(arms, parts, strict=True)]
    seen = torch.cat([value[-1].view(g, -1, k) for value in values], 1)
    of_seen = _prediction(net, batch, seen, terms, found, binary=binary)
    of_parts = [of.reshape(g, -1, 1) for of in (of_seen[:, :treated], of_seen[:, treated:])]
    back = [_backward(arm, value, of) for arm, value, of in zip(arms, values, of_parts, strict=True)]
    # Control is the first of a member's two networks.
    weights, biases = (
        [
            torch.stack([control, treated_], 1).flatten(0, 1)
            for control, treated_ in zip(back[1][kind], back[0][kind], strict=True)
        ]
        for kind in (0, 1)
    )
    _name(found, "heads", weights, biases)
    return torch.cat([part[2].view(g, -1, k, latent) for part in back], 1)


def _prediction(
    net: CIBStack, batch: Batch, seen: Tensor, terms: dict[str, Tensor], found: dict[str, Tensor], *, binary: bool
) -> Tensor:
    """Weighted loss of the observed outcomes, its gradient in the predictions, and in the noise scales."""
    g, rows, k = seen.shape
    treated = batch.treated
    each = (batch.weight * batch.share).unsqueeze(2) / k
    y = batch.y.unsqueeze(2)
    if binary:
        terms["prediction"] = (losses.bernoulli_nll(y, seen) * each).sum((1, 2))
        return (torch.sigmoid(seen) - y) * each
    gap = seen - y
    if net.settings.likelihood == "mse":
        terms["prediction"] = (gap.square() * each).sum((1, 2))
        return gap * (2 * each)
    log_scale = net.noise_log_scale
    by_row = torch.cat(
        [log_scale[:, 1:].expand(g, treated), log_scale[:, :1].expand(g, rows - treated)], 1
    ).unsqueeze(2)  # fmt: skip
    of_seen = gap * torch.exp(-2 * by_row)
    squared = gap * of_seen
    terms["prediction"] = ((0.5 * squared + by_row) * each).sum((1, 2))
    slope = ((1 - squared) * each).sum(2)
    # Clamped scales stay where they are, as under torch's own rule.
    free = (net.log_sigma >= -3) & (net.log_sigma <= 2)
    found["log_sigma"] = torch.stack([slope[:, treated:].sum(1), slope[:, :treated].sum(1)], 1) * free
    return of_seen * each


def _measured(
    imbalance: Imbalance, z: Tensor, mean: Tensor, scale: Tensor | None, gamma: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Evaluate a measure of dependence, and gamma times its gradients in z, mean and scale, which torch finds."""
    leaves = [value.detach().requires_grad_() for value in (z, mean, scale) if value is not None]
    with torch.enable_grad():
        value = imbalance(leaves[0], leaves[1], leaves[2] if len(leaves) > 2 else None)
        if not value.requires_grad:
            return value, torch.zeros_like(z), None, None
        found: Any = torch.autograd.grad((gamma * value).sum(), leaves, allow_unused=True)
    of_z, of_mean, *rest = found
    return value.detach(), torch.zeros_like(z) if of_z is None else of_z, of_mean, rest[0] if rest else None


def _variance(other: Tensor, share: Tensor, lam: Tensor, binary: bool) -> tuple[Tensor, Tensor]:
    """Variance over samples of the counterfactual prediction, and lam times its gradient."""
    prediction = torch.sigmoid(other) if binary else other
    centred = prediction - prediction.mean(2, keepdim=True)
    factor = 1 / (other.shape[2] - 1)
    value = (centred.square().sum(2) * share).sum(1) * factor
    gradient = centred * ((2 * factor) * (lam.unsqueeze(1) * share)).unsqueeze(2)
    return value, gradient * (prediction * (1 - prediction)) if binary else gradient


def _independence(net: CIBStack, z: Tensor, batch: Batch, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Evaluate the term for the first sample of z, and gamma times its gradient in z, the discriminator held fixed."""
    values = _forward(net.discriminator, z)
    logit = values[-1][..., 0]
    price = gamma.unsqueeze(1) * batch.share
    if net.settings.independence == "confusion":
        u = batch.treated_share.unsqueeze(1)
        entropy = -(torch.special.xlogy(u, u) + torch.special.xlogy(1 - u, 1 - u))
        value = ((nn.functional.softplus(logit) - u * logit - entropy) * batch.share).sum(1)
        gradient = (torch.sigmoid(logit) - u) * price
    else:
        cost = losses.bernoulli_nll(batch.treatment.expand(logit.shape), logit)
        value = -(cost.clamp(max=losses.BCE_LIMIT) * batch.share).sum(1)
        gradient = (batch.treatment - torch.sigmoid(logit)) * price * (cost <= losses.BCE_LIMIT)
    return value, _backward(net.discriminator, values, gradient.unsqueeze(2), weights=False)[2]


@torch.no_grad()
def discriminator_gradients(
    net: CIBStack,
    z: Float[Tensor, "stack rows latent"],
    treatment: Float[Tensor, " rows"],
    share: Float[Tensor, "stack rows"],
) -> dict[str, Tensor]:
    """Gradients of the discriminator's cross-entropy by parameter name.

    Parameters
    ----------
    net : the stack
    z : ``(stack, rows, latent)`` a fresh draw
    treatment : ``(rows,)`` 1 in the treated slots, else 0
    share : ``(stack, rows)`` part of the batch's mean that is the row's
    """
    values = _forward(net.discriminator, z)
    gradient = (torch.sigmoid(values[-1]) - treatment[:, None]) * share.unsqueeze(2)
    found: dict[str, Tensor] = {}
    of_weights, of_biases, _ = _backward(net.discriminator, values, gradient, inputs=False)
    _name(found, "discriminator", of_weights, of_biases)
    return found


def _name(found: dict[str, Tensor], part: str, weights: list[Tensor], biases: list[Tensor]) -> None:
    for kind, values in (("weights", weights), ("biases", biases)):
        for layer, value in enumerate(values):
            found[f"{part}.{kind}.{layer}"] = value
