"""Sample gates that are nearly or exactly zero or one, and measure their distance from a prior (spec 2.5, 2.6).

A gate is a binary concrete variable: a Bernoulli one whose threshold is softened by a temperature, so that gradients
reach its probability. Everything is computed in float32 at least, also under autocast: half precision has no number
between 0.9995 and 1.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = [
    "PROBABILITY_MARGIN",
    "UNIFORM_MARGIN",
    "bernoulli_kl",
    "concrete",
    "kumaraswamy_kl",
    "kumaraswamy_mean",
    "kumaraswamy_sample",
    "safe_probability",
    "safe_uniform",
]

PROBABILITY_MARGIN = 1e-4
UNIFORM_MARGIN = 1e-6
EULER_GAMMA = 0.5772156649015329


def safe_probability(keep_prob: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Move probabilities away from 0 and 1, by `PROBABILITY_MARGIN`, so that their logits are finite in float32.

    Parameters
    ----------
    keep_prob : in [0, 1], of any floating type

    Returns
    -------
    In float32, or float64 if they came so; no gradient passes where the margin was needed.

    Examples
    --------
    >>> safe_probability(torch.tensor([0.0, 0.5, 1.0])).tolist()
    [9.999999747378752e-05, 0.5, 0.9998999834060669]
    """
    return _precise(keep_prob).clamp(PROBABILITY_MARGIN, 1 - PROBABILITY_MARGIN)


def safe_uniform(like: Float[Tensor, "*shape"], generator: torch.Generator) -> Float[Tensor, "*shape"]:
    """Draw uniform numbers in [`UNIFORM_MARGIN`, 1 - `UNIFORM_MARGIN`].

    Parameters
    ----------
    like : a tensor of the shape and device wanted; its type too, but float32 at least
    generator : of any device

    Returns
    -------
    Numbers that depend on the generator alone, whatever the device of the tensor.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    drawn = torch.rand(like.shape, generator=generator, dtype=dtype, device=generator.device)
    return drawn.clamp(UNIFORM_MARGIN, 1 - UNIFORM_MARGIN).to(like.device)


def concrete(
    keep_prob: Float[Tensor, "*shape"], temperature: float, generator: torch.Generator, hard: bool = False
) -> Float[Tensor, "*shape"]:
    """Draw gates from the binary concrete distribution, ``sigmoid((logit(pi) + logit(u)) / temperature)``.

    Parameters
    ----------
    keep_prob : probabilities `pi`
    temperature : above 0; gates gather at 0 and 1 as it falls
    generator : of the uniform numbers `u`
    hard : round the gates to 0 or 1, with the gradient of those not rounded (straight-through)

    Returns
    -------
    Gates in [0, 1], float32 at least. A gate exceeds 1/2 with probability `pi` at every temperature, though its mean
    is not `pi`.

    Raises
    ------
    ValueError
        If the temperature is not above 0.

    References
    ----------
    Maddison, Mnih, Teh, "The Concrete Distribution", ICLR 2017, section 3.

    Examples
    --------
    >>> concrete(torch.tensor([0.01, 0.99]), 0.1, torch.Generator().manual_seed(0), hard=True)
    tensor([0., 1.])
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be above 0; 0.1 is nearly hard, 0.67 is soft")
    uniform = safe_uniform(keep_prob, generator)
    soft = torch.sigmoid((safe_probability(keep_prob).logit() + uniform.logit()) / temperature)
    if not hard:
        return soft
    # Added last, so that the forward value is exactly 0 or 1.
    return (soft > 0.5).to(soft.dtype) + (soft - soft.detach())


def bernoulli_kl(keep_prob: Float[Tensor, "*shape"], prior: float) -> Float[Tensor, ""]:
    """Sum the divergences of independent Bernoulli variables from a common prior, KL(q || p).

    Parameters
    ----------
    keep_prob : probabilities of q
    prior : probability of p, in (0, 1)

    Returns
    -------
    Nats; 0 where all probabilities are the prior's.

    Raises
    ------
    ValueError
        If the prior is not in (0, 1).

    Examples
    --------
    >>> float(bernoulli_kl(torch.tensor([0.25, 0.25]), 0.25))
    0.0
    """
    if not 0 < prior < 1:
        raise ValueError(f"prior={prior} must be in (0, 1), e.g. 0.1 to keep a tenth")
    pi = safe_probability(keep_prob)
    rho = pi.new_tensor(prior)
    return (pi * (pi / rho).log() + (1 - pi) * ((1 - pi) / (1 - rho)).log()).sum()


def kumaraswamy_sample(
    a: Float[Tensor, "*shape"], b: Float[Tensor, "*shape"], generator: torch.Generator
) -> Float[Tensor, "*shape"]:
    """Draw probabilities from Kumaraswamy(a, b) distributions, ``(1 - u^(1/b))^(1/a)``.

    Parameters
    ----------
    a, b : above 0
    generator : of the uniform numbers `u`

    Returns
    -------
    In [0, 1], float32 at least, differentiable in `a` and `b`.

    References
    ----------
    Nalisnick, Smyth, "Stick-Breaking Variational Autoencoders", ICLR 2017, section 3.2.

    Examples
    --------
    >>> bool(kumaraswamy_sample(torch.ones(3), torch.ones(3), torch.Generator().manual_seed(0)).max() < 1)
    True
    """
    a, b = _precise(a), _precise(b)
    # As logarithms: u^(1/b) rounds to 1 in float32 when b is large.
    return ((-torch.expm1(safe_uniform(a, generator).log() / b)).log() / a).exp()


def kumaraswamy_mean(a: Float[Tensor, "*shape"], b: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return the means of Kumaraswamy(a, b) distributions, ``b Gamma(1 + 1/a) Gamma(b) / Gamma(1 + 1/a + b)``.

    Parameters
    ----------
    a, b : above 0

    Returns
    -------
    In (0, 1), float32 at least.

    Examples
    --------
    >>> kumaraswamy_mean(torch.tensor([1.0]), torch.tensor([3.0]))
    tensor([0.2500])
    """
    # In float64, on the CPU that always has it: for a small a, gamma functions near 1e5 are subtracted.
    wide_a, wide_b = a.to("cpu", torch.float64), b.to("cpu", torch.float64)
    shape = 1 + 1 / wide_a
    return (wide_b.log() + shape.lgamma() + wide_b.lgamma() - (shape + wide_b).lgamma()).exp().to(_precise(a))


def kumaraswamy_kl(a: Float[Tensor, "*shape"], b: Float[Tensor, "*shape"], alpha: float) -> Float[Tensor, ""]:
    """Sum the divergences of Kumaraswamy(a, b) distributions from a Beta(alpha, 1) prior.

    Parameters
    ----------
    a, b : above 0
    alpha : above 0; near 0, most of the prior is at 0

    Returns
    -------
    Nats, float32 at least; 0 where ``a = alpha`` and ``b = 1``.

    Raises
    ------
    ValueError
        If `alpha` is not above 0.

    References
    ----------
    Lee et al., "Adaptive Network Sparsification with Dependent Variational Beta-Bernoulli Dropout", 2018, equation 11.

    Examples
    --------
    >>> round(float(kumaraswamy_kl(torch.tensor([0.7]), torch.tensor([2.3]), 0.1)), 3)
    0.832
    """
    if not alpha > 0:
        raise ValueError(f"alpha={alpha} must be above 0")
    a, b = _precise(a), _precise(b)
    return ((1 - alpha / a) * (-EULER_GAMMA - b.digamma() - 1 / b) + (a * b / alpha).log() - (b - 1) / b).sum()


def _precise(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    return x.to(torch.promote_types(x.dtype, torch.float32))
