"""The objective around networks of one's own: any encoder, any two heads, an optional discriminator."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cib_ite import losses
from shared_core.errors import InputError

__all__ = ["CIBModule"]


class CIBModule(nn.Module):
    """A causal information bottleneck made of your modules.

    Parameters
    ----------
    encoder : takes ``(n, ...)`` and returns ``(n, 2 d)``: the means of z and, before softplus, its scales
    control, treated : heads that take ``(n, d)`` and return ``(n, 1)``: mean outcomes, or logits if `binary`
    discriminator : takes ``(n, d)`` and returns ``(n, 1)``: the logit of being treated; None is without
    share : treated share of the training set
    binary : the outcome is 0/1

    Examples
    --------
    >>> _ = torch.manual_seed(0)
    >>> head = lambda: nn.Sequential(nn.Linear(2, 8), nn.ELU(), nn.Linear(8, 1))
    >>> model = CIBModule(nn.Linear(5, 4), head(), head(), nn.Linear(2, 1), share=0.5)
    >>> x, t, y = torch.randn(20, 5), torch.randint(0, 2, (20,)).float(), torch.randn(20)
    >>> terms = model.terms(x, t, y, samples=3)
    >>> sorted(terms)
    ['independence', 'prediction', 'rate', 'variance']
    >>> model.total(terms, beta=0.1, gamma=0.1, lam=0.01).backward()
    >>> model.discriminator_loss(x, t).item() > 0
    True
    """

    def __init__(
        self,
        encoder: nn.Module,
        control: nn.Module,
        treated: nn.Module,
        discriminator: nn.Module | None = None,
        *,
        share: float,
        binary: bool = False,
    ) -> None:
        super().__init__()
        if not 0 < share < 1:
            raise InputError(f"share: the treated share of the training set must be in (0, 1), got {share}")
        self.encoder, self.control, self.treated, self.discriminator = encoder, control, treated, discriminator
        self.share, self.binary = share, binary
        self.log_sigma = nn.Parameter(torch.zeros(2))

    def encode(self, x: Tensor) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]:
        """Mean and scale of q(z|x), ``(n, d)`` each.

        Parameters
        ----------
        x : (n, ...) what the encoder takes
        """
        mean, rho = self.encoder(x).chunk(2, dim=-1)
        return mean, nn.functional.softplus(rho - 2) + 1e-3

    def outcomes(self, z: Float[Tensor, "... d"]) -> Float[Tensor, "... 2"]:
        """Both arms' mean outcomes (or logits) for the same z, ``(..., 2)``."""
        return torch.cat([self.control(z), self.treated(z)], dim=-1)

    def terms(
        self,
        x: Tensor,
        treatment: Float[Tensor, " n"],
        y: Float[Tensor, " n"],
        *,
        samples: int = 5,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Each term of the objective, to be minimised.

        Parameters
        ----------
        x : (n, ...) a batch
        treatment, y : (n,)
        samples : draws of z
        generator : of the draws
        """
        mean, scale = self.encode(x)
        noise = torch.randn((samples, *mean.shape), generator=generator, device=mean.device, dtype=mean.dtype)
        both = self.outcomes(mean + scale * noise)
        arm = treatment.to(torch.int64).expand(samples, -1).unsqueeze(-1)
        factual = both.gather(-1, arm)[..., 0]
        other = both.gather(-1, 1 - arm)[..., 0]
        if self.binary:
            nll, other = losses.bernoulli_nll(y, factual), torch.sigmoid(other)
        else:
            log_sigma = self.log_sigma.clamp(-3, 2)[treatment.to(torch.int64)]
            nll = losses.gaussian_nll(y, factual, log_sigma)
        weight = losses.reweight(treatment, self.share)
        found = {"prediction": (nll.mean(0) * weight).mean(), "rate": losses.kl_diag(mean, scale).mean()}
        if self.discriminator is not None:
            logit = torch.func.functional_call(
                self.discriminator, {k: v.detach() for k, v in self.discriminator.named_parameters()},
                (mean + scale * noise[0],),
            )[..., 0]  # fmt: skip
            found["independence"] = losses.confusion(logit, self.share)
        if samples > 1:
            found["variance"] = losses.counterfactual_variance(other.movedim(0, -1)).mean()
        return found

    def total(self, terms: Mapping[str, Tensor], *, beta: float, gamma: float = 0.0, lam: float = 0.0) -> Tensor:
        """Weighted sum of the terms.

        Parameters
        ----------
        terms : what :meth:`terms` gave
        beta, gamma, lam : weights of rate, independence and variance
        """
        total = terms["prediction"] + beta * terms["rate"]
        for name, weight in (("independence", gamma), ("variance", lam)):
            if weight:
                if name not in terms:
                    raise InputError(f"the term '{name}' is missing: give a discriminator, and samples >= 2")
                total = total + weight * terms[name]
        return total

    def discriminator_loss(
        self, x: Tensor, treatment: Float[Tensor, " n"], *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Cross-entropy of the discriminator on fresh z; no gradient reaches the encoder.

        Parameters
        ----------
        x : (n, ...) a batch
        treatment : (n,)
        generator : of the draw of z
        """
        if self.discriminator is None:
            raise InputError("this model has no discriminator")
        with torch.no_grad():
            mean, scale = self.encode(x)
            noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
            z = mean + scale * noise
        return losses.bernoulli_nll(treatment, self.discriminator(z)[..., 0]).mean()
