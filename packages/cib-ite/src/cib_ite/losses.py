r"""The terms of the objective, each a function of tensors; usable alone, with any network of one's own.

All of them take any number of leading dimensions: ``(..., rows, latent)`` is a stack of independent batches, and what
comes back has one value for each of them. Everything is in nats. The causal information bottleneck (Kim et al., 2019,
arXiv:1906.03118) maximises ``I(Z;Y|T) - beta I(Z;X) - gamma I(Z;T)``; the paper's exact losses were not available, so
these are the standard variational bounds of those three terms, and the treatment-effect literature's own measures of
imbalance.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from shared_core.errors import InputError

__all__ = [
    "BCE_LIMIT",
    "adversarial",
    "bernoulli_nll",
    "confusion",
    "counterfactual_variance",
    "gaussian_nll",
    "kl_diag",
    "mi_gauss",
    "mmd_lin",
    "mmd_rbf",
    "reweight",
    "sinkhorn",
]

BCE_LIMIT = 5.0


def kl_diag(mean: Float[Tensor, "... latent"], scale: Float[Tensor, "... latent"]) -> Float[Tensor, "..."]:
    """Kullback-Leibler divergence of N(mean, diag scale^2) from N(0, I), summed over the latent dimensions.

    The compression term: its average over x bounds ``I(Z;X)`` from above, the gap being ``KL(q(z) || r(z))``.

    Parameters
    ----------
    mean, scale : ``(..., latent)``, scale > 0

    Returns
    -------
    ``(...)`` in nats, never negative.

    Examples
    --------
    >>> kl_diag(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0]))
    tensor(0.5000)
    """
    return 0.5 * (mean.square() + scale.square() - 1 - 2 * scale.log()).sum(-1)


def gaussian_nll(
    y: Float[Tensor, "..."], mean: Float[Tensor, "..."], log_scale: Float[Tensor, "..."]
) -> Float[Tensor, "..."]:
    """Negative log density of N(mean, exp(log_scale)^2) at y, elementwise, without the constant ``log(2 pi) / 2``.

    Parameters
    ----------
    y, mean, log_scale : ``(...)``, broadcast against each other

    Examples
    --------
    >>> gaussian_nll(torch.tensor(1.0), torch.tensor(0.0), torch.tensor(0.0))
    tensor(0.5000)
    """
    return 0.5 * ((y - mean) * torch.exp(-log_scale)).square() + log_scale


def bernoulli_nll(y: Float[Tensor, "..."], logit: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Negative log probability of y in {0, 1} under ``sigmoid(logit)``, elementwise.

    Parameters
    ----------
    y, logit : ``(...)``

    Examples
    --------
    >>> bernoulli_nll(torch.tensor(1.0), torch.tensor(0.0))
    tensor(0.6931)
    """
    return nn.functional.softplus(logit) - y * logit


def reweight(treatment: Float[Tensor, "... rows"], share: float | Tensor) -> Float[Tensor, "... rows"]:
    """Weights that give both arms the same total: ``t / 2u + (1 - t) / 2(1 - u)`` (Shalit et al., 2017).

    Parameters
    ----------
    treatment : ``(..., rows)`` of 0 and 1
    share : `u`, the treated share of the whole training set (not of the batch)

    Examples
    --------
    >>> reweight(torch.tensor([1.0, 0.0, 0.0, 0.0]), 0.25)
    tensor([2.0000, 0.6667, 0.6667, 0.6667])
    """
    return treatment / (2 * share) + (1 - treatment) / (2 * (1 - share))


def confusion(logit: Float[Tensor, "... rows"], share: Float[Tensor, "..."] | float) -> Float[Tensor, "..."]:
    """Mean ``KL(Bern(u) || Bern(sigmoid(logit)))``: zero exactly where the discriminator says the base rate.

    The bounded form of the adversarial game, with the same fixed point.

    Parameters
    ----------
    logit : ``(..., rows)`` of a discriminator that guesses the treatment from z
    share : `u`, the treated share of the training set; a number, or one for each leading index

    Examples
    --------
    >>> confusion(torch.logit(torch.tensor([0.2, 0.2])), 0.2).abs() < 1e-6
    tensor(True)
    """
    u = torch.as_tensor(share, dtype=logit.dtype, device=logit.device).unsqueeze(-1)
    entropy = -(torch.special.xlogy(u, u) + torch.special.xlogy(1 - u, 1 - u))
    return (nn.functional.softplus(logit) - u * logit - entropy).mean(-1)


def adversarial(logit: Float[Tensor, "... rows"], treatment: Float[Tensor, "... rows"]) -> Float[Tensor, "..."]:
    """Negative cross-entropy of the discriminator (gradient reversal), clipped at 5 nats a row.

    ``H(T) + E log d(t|z)`` is a *lower* bound on ``I(Z;T)``: minimising it means something only while the
    discriminator is nearly optimal.

    Parameters
    ----------
    logit, treatment : ``(..., rows)``

    Examples
    --------
    >>> adversarial(torch.tensor([0.0, 0.0]), torch.tensor([0.0, 1.0]))
    tensor(-0.6931)
    """
    return -bernoulli_nll(treatment, logit).clamp(max=BCE_LIMIT).mean(-1)


def _arms(
    z: Float[Tensor, "... rows latent"], treatment: Float[Tensor, "... rows"], share: Tensor | float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return both arms' indicator, treated share and whether each arm has two rows."""
    t = treatment.to(z.dtype)
    treated = t.sum(-1)
    u = t.mean(-1) if share is None else torch.as_tensor(share, dtype=z.dtype, device=z.device).expand(treated.shape)
    enough = (treated >= 2) & (t.shape[-1] - treated >= 2)
    return t, 1 - t, u, enough


def mmd_lin(
    z: Float[Tensor, "... rows latent"],
    treatment: Float[Tensor, "... rows"],
    share: Float[Tensor, "..."] | float | None = None,
) -> Float[Tensor, "..."]:
    """Squared distance of the arms' weighted means: ``||2u mean_treated - 2(1 - u) mean_control||^2``.

    Parameters
    ----------
    z : ``(..., rows, latent)`` representations
    treatment : ``(..., rows)`` of 0 and 1; a batch with fewer than two rows in an arm gives 0
    share : `u`; None takes the batch's own, 0.5 is the plain distance of means

    Examples
    --------
    >>> mmd_lin(torch.tensor([[1.0], [1.0], [0.0], [0.0]]), torch.tensor([1.0, 1.0, 0.0, 0.0]), 0.5)
    tensor(1.)
    """
    t, c, u, enough = _arms(z, treatment, share)
    mean_t = (z * t.unsqueeze(-1)).sum(-2) / t.sum(-1, keepdim=True).clamp(min=1)
    mean_c = (z * c.unsqueeze(-1)).sum(-2) / c.sum(-1, keepdim=True).clamp(min=1)
    gap = 2 * u.unsqueeze(-1) * mean_t - 2 * (1 - u).unsqueeze(-1) * mean_c
    return torch.where(enough, gap.square().sum(-1), 0.0)


def _squared_distances(z: Float[Tensor, "... rows latent"]) -> Float[Tensor, "... rows rows"]:
    norms = z.square().sum(-1)
    return (norms.unsqueeze(-1) + norms.unsqueeze(-2) - 2 * z @ z.mT).clamp(min=0)


def mmd_rbf(
    z: Float[Tensor, "... rows latent"],
    treatment: Float[Tensor, "... rows"],
    share: Float[Tensor, "..."] | float | None = None,
    width: float | None = None,
) -> Float[Tensor, "..."]:
    """Unbiased squared maximum mean discrepancy of the arms under ``exp(-d^2 / width^2)`` (cfrnet's scaling).

    Parameters
    ----------
    z : ``(..., rows, latent)`` representations
    treatment : ``(..., rows)`` of 0 and 1; a batch with fewer than two rows in an arm gives 0
    share : `u`; None takes the batch's own, 0.5 is the plain unbiased estimate
    width : of the kernel; None takes the median distance of the batch

    Examples
    --------
    >>> z = torch.tensor([[0.0], [0.0], [9.0], [9.0]])
    >>> mmd_rbf(z, torch.tensor([1.0, 1.0, 0.0, 0.0]), 0.5, width=1.0)
    tensor(2.)
    """
    t, c, u, enough = _arms(z, treatment, share)
    d2 = _squared_distances(z)
    if width is None:
        scale = d2.detach().flatten(-2).median(-1).values.clamp(min=1e-12)
    else:
        scale = torch.full_like(u, width**2)
    kernel = torch.exp(-d2 / scale[..., None, None])
    n, m = t.sum(-1), c.sum(-1)

    def total(left: Tensor, right: Tensor) -> Tensor:
        return (left.unsqueeze(-2) @ kernel @ right.unsqueeze(-1))[..., 0, 0]

    within_c = (total(c, c) - m) / (m * (m - 1)).clamp(min=1)
    within_t = (total(t, t) - n) / (n * (n - 1)).clamp(min=1)
    across = total(c, t) / (m * n).clamp(min=1)
    return torch.where(enough, 4 * ((1 - u) ** 2 * within_c + u**2 * within_t - 2 * u * (1 - u) * across), 0.0)


def sinkhorn(
    z: Float[Tensor, "... rows latent"],
    treatment: Float[Tensor, "... rows"],
    share: Float[Tensor, "..."] | float | None = None,
    *,
    sharpness: float = 10.0,
    rounds: int = 10,
    slack: bool = True,
    through_plan: bool = True,
) -> Float[Tensor, "..."]:
    """Entropic Wasserstein distance between the arms, as in counterfactual regression; iterated in logarithms.

    Parameters
    ----------
    z : ``(..., rows, latent)`` representations
    treatment : ``(..., rows)`` of 0 and 1; a batch with fewer than two rows in an arm gives 0
    share : `u`; None takes the batch's own
    sharpness : the kernel is ``exp(-sharpness * distance / mean distance)``; larger is nearer to exact transport
    rounds : Sinkhorn iterations
    slack : with cfrnet's extra point, at the largest distance from everything, that takes mass which does not match;
        False transports all of it, both arms having mass 1
    through_plan : differentiate through the plan as well as through the distances

    Examples
    --------
    >>> z, t = torch.tensor([[0.0], [0.0], [3.0], [3.0]]), torch.tensor([1.0, 1.0, 0.0, 0.0])
    >>> round(float(sinkhorn(z, t, slack=False)), 4)
    3.0
    """
    if sharpness <= 0 or rounds < 1:
        raise InputError(f"sinkhorn: need sharpness > 0 and rounds >= 1, got {sharpness} and {rounds}")
    t, c, u, enough = _arms(z, treatment, share)
    pairs = t.unsqueeze(-1) * c.unsqueeze(-2)
    distance = _squared_distances(z).clamp(min=1e-10).sqrt() * pairs
    with torch.no_grad():
        farthest = distance.amax((-2, -1))
        mean = distance.sum((-2, -1)) / pairs.sum((-2, -1)).clamp(min=1)
        rate = sharpness / mean.clamp(min=1e-12)
    n, m = t.sum(-1, keepdim=True).clamp(min=1), c.sum(-1, keepdim=True).clamp(min=1)
    if slack:
        edge = farthest[..., None].expand(*farthest.shape, z.shape[-2])
        corner = torch.zeros_like(farthest)[..., None, None]
        distance = torch.cat([distance, edge.unsqueeze(-1)], -1)
        bottom = torch.cat([edge.unsqueeze(-2), corner], -1)
        distance = torch.cat([distance, bottom], -2)
        a = torch.cat([t * u.unsqueeze(-1) / n, (1 - u).unsqueeze(-1)], -1)
        b = torch.cat([c * (1 - u).unsqueeze(-1) / m, u.unsqueeze(-1)], -1)
        factor = 2.0
    else:
        a, b, factor = t / n, c / m, 1.0
    # Rows of the other arm have no mass: a large negative number keeps gradients finite where -inf would not.
    log_a, log_b = torch.where(a > 0, a, 1).log() + (a <= 0) * -1e4, torch.where(b > 0, b, 1).log() + (b <= 0) * -1e4
    log_kernel = -rate[..., None, None] * distance
    if slack:
        log_kernel = torch.logaddexp(log_kernel, torch.full_like(log_kernel, math.log(1e-6)))
    log_left = log_a
    with torch.set_grad_enabled(through_plan and torch.is_grad_enabled()):
        log_right = log_b - torch.logsumexp(log_left.unsqueeze(-1) + log_kernel, -2)
        for _ in range(rounds):
            log_left = log_a - torch.logsumexp(log_kernel + log_right.unsqueeze(-2), -1)
            log_right = log_b - torch.logsumexp(log_left.unsqueeze(-1) + log_kernel, -2)
        plan = torch.exp(log_left.unsqueeze(-1) + log_kernel + log_right.unsqueeze(-2))
    return torch.where(enough, factor * (plan * distance).sum((-2, -1)), 0.0)


def mi_gauss(
    mean: Float[Tensor, "... rows latent"],
    scale: Float[Tensor, "... rows latent"],
    treatment: Float[Tensor, "... rows"],
    share: Float[Tensor, "..."] | float | None = None,
) -> Float[Tensor, "..."]:
    """``sum_t u_t KL(q_t || q)`` with each arm's z, and all z, replaced by diagonal Gaussians of the same moments.

    A surrogate of ``I(Z;T)`` without an adversary: zero when the arms agree in every mean and variance.

    Parameters
    ----------
    mean, scale : ``(..., rows, latent)`` of q(z|x)
    treatment : ``(..., rows)`` of 0 and 1; a batch with fewer than two rows in an arm gives 0
    share : `u`; None takes the batch's own

    Examples
    --------
    >>> m, t = torch.tensor([[1.0], [1.0], [1.0], [1.0]]), torch.tensor([1.0, 1.0, 0.0, 0.0])
    >>> mi_gauss(m, torch.ones(4, 1), t)
    tensor(0.)
    """
    t, c, u, enough = _arms(mean, treatment, share)
    second = scale.square() + mean.square()

    def moments(weight: Tensor) -> tuple[Tensor, Tensor]:
        weight = weight / weight.sum(-1, keepdim=True).clamp(min=1)
        first = (weight.unsqueeze(-1) * mean).sum(-2)
        return first, ((weight.unsqueeze(-1) * second).sum(-2) - first.square()).clamp(min=1e-12)

    (mean_t, var_t), (mean_c, var_c) = moments(t), moments(c)
    u_ = u.unsqueeze(-1)
    mean_all = u_ * mean_t + (1 - u_) * mean_c
    var_all = u_ * (var_t + mean_t.square()) + (1 - u_) * (var_c + mean_c.square()) - mean_all.square()
    var_all = var_all.clamp(min=1e-12)

    def divergence(first: Tensor, variance: Tensor) -> Tensor:
        ratio = variance / var_all
        return 0.5 * (ratio + (first - mean_all).square() / var_all - 1 - ratio.log()).sum(-1)

    return torch.where(enough, u * divergence(mean_t, var_t) + (1 - u) * divergence(mean_c, var_c), 0.0)


def counterfactual_variance(prediction: Float[Tensor, "... samples"]) -> Float[Tensor, "..."]:
    """Unbiased variance of a prediction over the samples of z: what the semi-supervised term keeps small.

    Parameters
    ----------
    prediction : ``(..., samples)`` of the arm in which the unit was *not* seen; at least two samples

    Examples
    --------
    >>> counterfactual_variance(torch.tensor([1.0, 3.0]))
    tensor(2.)
    """
    if prediction.shape[-1] < 2:
        raise InputError("the variance over samples of z needs at least two samples (K >= 2 when lam > 0)")
    return prediction.var(-1)
