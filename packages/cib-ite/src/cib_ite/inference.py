"""What trained members say about rows: effects, their variance in parts, and how unusual a row is.

The same z goes through both heads. Drawing z anew for each arm would add ``Var f_1 + Var f_0`` and lose the covariance,
which inflates intervals and destroys their ranking.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from cib_ite import losses
from cib_ite.network import CIBStack
from cib_ite.training import dropout_masks

__all__ = ["Posterior", "Variance", "draw_latent", "draw_posterior", "total_variance"]

_CELLS = 4_000_000


@dataclass(frozen=True, eq=False)
class Posterior:
    """Each member's predictions, as means and variances over the samples of z; in the units of the network.

    Parameters
    ----------
    effect, effect_variance : (members, n) of ``f_1(z) - f_0(z)``
    outcome, outcome_variance : (members, 2, n) of each arm
    noise : (members, 2, n) standard deviation of the outcome's noise
    rate : (members, n) ``KL(q(z|x) || N(0, I))`` in nats; 0 where z is deterministic
    latent : (members, n, d) ``E[z|x]``
    """

    effect: Float[np.ndarray, "members n"]
    effect_variance: Float[np.ndarray, "members n"]
    outcome: Float[np.ndarray, "members 2 n"]
    outcome_variance: Float[np.ndarray, "members 2 n"]
    noise: Float[np.ndarray, "members 2 n"]
    rate: Float[np.ndarray, "members n"]
    latent: Float[np.ndarray, "members n d"]


@dataclass(frozen=True, eq=False)
class Variance:
    """The law of total variance for an effect: ``representation + model = total``, each ``(n,)``."""

    representation: Float[np.ndarray, " n"]
    model: Float[np.ndarray, " n"]

    @property
    def total(self) -> Float[np.ndarray, " n"]:
        """Variance of the effect over members and samples of z."""
        return self.representation + self.model


def total_variance(mean: Float[np.ndarray, "members n"], variance: Float[np.ndarray, "members n"]) -> Variance:
    """Split the variance of an effect into the mean of the members' variances and the variance of their means.

    Parameters
    ----------
    mean, variance : ``(members, n)`` of the effect over samples of z

    Examples
    --------
    >>> parts = total_variance(np.array([[1.0], [3.0]]), np.array([[0.5], [0.5]]))
    >>> parts.representation, parts.model, parts.total
    (array([0.5]), array([2.]), array([2.5]))
    """
    model = mean.var(axis=0, ddof=1) if len(mean) > 1 else np.zeros(mean.shape[1])
    return Variance(variance.mean(axis=0), model)


@torch.no_grad()
def draw_posterior(
    stack: CIBStack, x: Float[np.ndarray, "n p"], *, binary: bool, samples: int = 200, seed: int = 0
) -> Posterior:
    """Evaluate all members of a stack on the same rows.

    Parameters
    ----------
    stack : trained members
    x : ``(n, p)`` standardised rows
    binary : heads give logits; what comes back are probabilities
    samples : of z for each row (passes, where the stack has dropout); a deterministic z needs one
    seed : of the samples, which are the same for every row, so that a row's result does not depend on its neighbours
    """
    first = next(stack.parameters())
    s = stack.settings
    dropout = s.dropout_trunk > 0 or s.dropout_head > 0
    draws = 1 if s.deterministic and not dropout else samples
    width = s.trunk[-1] if s.deterministic else s.latent
    generator = torch.Generator().manual_seed(seed)
    half = torch.randn((stack.size, 1, -(-draws // 2), width), generator=generator, dtype=first.dtype)
    # With its mirror image beside each draw, what is linear in z has no Monte Carlo error in the mean.
    noise = torch.cat([half, -half], 2)[:, :, :draws].to(first.device)
    step = max(1, _CELLS // (stack.size * draws * max(s.heads or (1,))))
    parts = [
        _draw(
            stack,
            torch.as_tensor(x[start : start + step], dtype=first.dtype, device=first.device),
            noise,
            binary,
            draws,
        )
        for start in range(0, len(x), step)
    ]
    joined = [
        torch.cat(values, -1 if values[0].dim() < 4 else 2).double().cpu().numpy()
        for values in zip(*parts, strict=True)
    ]
    latent = joined.pop()
    return Posterior(*joined, latent=latent[:, 0])


@torch.no_grad()
def draw_latent(
    stack: CIBStack, x: Float[np.ndarray, "n p"], *, seed: int = 0
) -> Float[np.ndarray, "members n latent"]:
    """Draw one z of each row from each member's q(z|x), ``(members, n, latent)``.

    Parameters
    ----------
    stack : trained members
    x : ``(n, p)`` standardised rows
    seed : of the draw; a deterministic z needs none
    """
    first = next(stack.parameters())
    rows = torch.as_tensor(x, dtype=first.dtype, device=first.device)
    mean, scale = stack.encode(rows.expand(stack.size, *rows.shape))
    found = mean.double().cpu().numpy()
    if scale is None:
        return found
    return found + scale.double().cpu().numpy() * np.random.default_rng(seed).standard_normal(found.shape)


def _draw(stack: CIBStack, x: Tensor, noise: Tensor, binary: bool, draws: int) -> tuple[Tensor, ...]:
    s = stack.settings
    rows = x.expand(stack.size, *x.shape)
    if s.dropout_trunk > 0 or s.dropout_head > 0:
        raw = torch.cat([_dropout_pass(stack, rows, k) for k in range(draws)], 3)
        mean, scale = stack.encode(rows)
    else:
        mean, scale = stack.encode(rows)
        z = mean.unsqueeze(2) if scale is None else torch.addcmul(mean.unsqueeze(2), scale.unsqueeze(2), noise)
        raw = stack.raw_outcomes(z)
    outcome = torch.sigmoid(raw[..., 0]) if binary else raw[..., 0]
    effect = outcome[:, 1] - outcome[:, 0]
    if binary:
        p = outcome.mean(-1)
        sd = (p * (1 - p)).sqrt()
    elif s.likelihood == "hetero":
        sd = (torch.nn.functional.softplus(raw[..., 1]) + 1e-3).square().mean(-1).sqrt()
    else:
        sd = stack.noise_log_scale.exp().unsqueeze(2).expand(outcome.shape[:3])
    rate = torch.zeros(rows.shape[:2], dtype=x.dtype, device=x.device) if scale is None else losses.kl_diag(mean, scale)
    return (
        effect.mean(-1),
        _variance(effect),
        outcome.mean(-1),
        _variance(outcome),
        sd,
        rate,
        mean.unsqueeze(1),
    )


def _variance(values: Tensor) -> Tensor:
    return values.var(-1) if values.shape[-1] > 1 else torch.zeros_like(values[..., 0])


def _dropout_pass(stack: CIBStack, rows: Tensor, seed: int) -> Tensor:
    """One pass with units dropped, the same ones for every row and in both heads."""
    s = stack.settings
    trunk = dropout_masks(stack, 1, s.dropout_trunk, seed=2 * seed, kind="trunk")
    h, _ = stack.encode(rows, trunk)
    return stack.raw_outcomes(h.unsqueeze(2), dropout_masks(stack, 1, s.dropout_head, seed=2 * seed + 1, kind="heads"))
