"""Gradients of the bottleneck's objective, written down: several times faster than taping them for networks so small.

A step of a small stack is a few dozen kernels of some microseconds each, and recording and replaying them costs more
than running them. What is here covers the default objective; anything else is differentiated by torch, and tests hold
one against the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cib_ite import losses
from cib_ite.network import CIBStack, StackedMLP
from cib_ite.settings import Settings

__all__ = ["Batch", "covers", "discriminator_gradients", "model_gradients"]


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


def covers(settings: Settings, *, variance: bool, unlabeled: bool) -> bool:
    """Whether these gradients are those of the objective that the settings describe.

    Parameters
    ----------
    settings : of the members
    variance : the counterfactual variance is penalised
    unlabeled : there are unlabelled rows
    """
    return (
        variance
        and not unlabeled
        and not settings.deterministic
        and settings.dragon == 0
        and settings.likelihood in {"gaussian", "mse"}
        and settings.independence in {"confusion", "adversarial", "none"}
    )


def _forward(part: StackedMLP, x: Tensor) -> list[Tensor]:
    """Evaluate, keeping the inputs of every layer, and the output."""
    values, last = [x], len(part.weights) - 1
    for layer, (weight, bias) in enumerate(zip(part.weights, part.biases, strict=True)):
        x = torch.baddbmm(bias, x, weight)
        if layer < last or part.final_activation:
            x = nn.functional.elu_(x)
        values.append(x)
    return values


def _backward(
    part: StackedMLP, values: list[Tensor], gradient: Tensor, *, weights: bool = True, inputs: bool = True
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
    noise: Float[Tensor, "stack rows samples latent"],
    *,
    binary: bool,
    beta: Float[Tensor, " stack"],
    gamma: Float[Tensor, " stack"],
    lam: Float[Tensor, " stack"],
) -> tuple[dict[str, Tensor], dict[str, Tensor], Float[Tensor, "2 stack rows latent"]]:
    """Terms of the objective ``(stack,)``, gradients of its weighted sum by parameter name, and mean and scale of z.

    Parameters
    ----------
    net : the stack
    batch : ``(stack, rows, ...)``
    noise : ``(stack, rows, samples, latent)``
    binary : heads give logits
    beta, gamma, lam : ``(stack,)`` weights of the terms, warm-up included
    """
    s, k = net.settings, noise.shape[2]
    g, rows, treated, share = len(batch.x), batch.x.shape[1], batch.treated, batch.share
    trunk = _forward(net.encoder, batch.x)
    projected = _forward(net.projection, trunk[-1])
    mean, rho = projected[-1].chunk(2, dim=-1)
    scale = nn.functional.softplus(rho - 2).add_(1e-3)
    z = torch.addcmul(mean.unsqueeze(2), scale.unsqueeze(2), noise)
    latent = z.shape[3]
    both = z.view(g, 1, rows * k, latent).expand(g, 2, rows * k, latent).reshape(2 * g, rows * k, latent)
    heads = _forward(net.heads, both)
    f = heads[-1].view(g, 2, rows, k)
    seen = torch.cat([f[:, 1, :treated], f[:, 0, treated:]], 1)
    other = torch.cat([f[:, 0, :treated], f[:, 1, treated:]], 1)
    terms: dict[str, Tensor] = {}
    found: dict[str, Tensor] = {"epsilon": torch.zeros_like(net.epsilon)}
    each = (batch.weight * share).unsqueeze(2) / k
    y = batch.y.unsqueeze(2)
    found["log_sigma"] = torch.zeros_like(net.log_sigma)
    if binary:
        nll = losses.bernoulli_nll(y, seen)
        of_seen = (torch.sigmoid(seen) - y) * each
    elif s.likelihood == "mse":
        nll = (seen - y).square()
        of_seen = (seen - y) * (2 * each)
    else:
        log_scale = net.noise_log_scale
        by_row = torch.cat(
            [log_scale[:, 1:].expand(g, treated), log_scale[:, :1].expand(g, rows - treated)], 1
        ).unsqueeze(2)  # fmt: skip
        precise = torch.exp(-2 * by_row)
        gap = seen - y
        of_seen = gap * precise
        squared = gap * of_seen
        nll = 0.5 * squared + by_row
        slope = ((1 - squared) * each).sum(2)
        # Clamped scales stay where they are, as under torch's own rule.
        free = (net.log_sigma >= -3) & (net.log_sigma <= 2)
        found["log_sigma"] = torch.stack([slope[:, treated:].sum(1), slope[:, :treated].sum(1)], 1) * free
        of_seen = of_seen * each
    terms["variance"], of_other = _variance(other, share, lam, binary)
    terms["prediction"] = (nll * each).sum((1, 2))
    of_f = torch.stack(
        [
            torch.cat([of_other[:, :treated], of_seen[:, treated:]], 1),
            torch.cat([of_seen[:, :treated], of_other[:, treated:]], 1),
        ],
        1,
    )
    of_weights, of_biases, of_both = _backward(net.heads, heads, of_f.view(2 * g, rows * k, 1))
    _name(found, "heads", of_weights, of_biases)
    of_z = of_both.view(g, 2, rows, k, latent).sum(1)
    if s.independence != "none":
        terms["independence"], of_first = _independence(net, z[:, :, 0], batch, gamma)
        of_z[:, :, 0] += of_first
    terms["rate"] = (losses.kl_diag(mean, scale) * share).sum(1)
    price = (beta.unsqueeze(1) * share).unsqueeze(2)
    of_mean = torch.addcmul(of_z.sum(2), price, mean)
    of_scale = torch.addcmul((of_z * noise).sum(2), price, scale - 1 / scale)
    of_rho = of_scale.mul_(torch.sigmoid(rho - 2))
    of_weights, of_biases, of_trunk = _backward(net.projection, projected, torch.cat([of_mean, of_rho], 2))
    _name(found, "projection", of_weights, of_biases)
    of_weights, of_biases, _ = _backward(net.encoder, trunk, of_trunk, inputs=False)
    _name(found, "encoder", of_weights, of_biases)
    return terms, found, torch.stack([mean, scale])


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
