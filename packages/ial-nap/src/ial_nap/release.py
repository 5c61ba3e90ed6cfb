"""The neural attention process as the paper's authors released it, to compare with (spec 2.4 and 2.7).

Two encoders read masks as numbers, one for each attention of RETAIN; what they make of them enters the attentions and
nothing else. Trained with one and the same context, as in the release, they have no reason to react to another.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ial_nap.attention import Retain, lstm_or_gru, normal_like, positive, reverse_by_length
from ial_nap.context import Context
from shared_core.device import seeded
from shared_core.errors import InputError

__all__ = ["ReleaseNAP"]


class _Process(nn.Module):
    """One of the two copies: masks to the Gaussian of z, ``(t, z)``."""

    def __init__(self, inputs: int, width: int, hidden: int, latent: int, rnn: Literal["gru", "lstm"]) -> None:
        super().__init__()
        self.embedding = nn.Linear(inputs, width, bias=False)
        self.rnn = lstm_or_gru(rnn, width, hidden)
        self.to_mean = nn.Linear(hidden, latent)
        self.to_deviation = nn.Linear(hidden, latent)

    def forward(self, masks: Float[Tensor, "k t m"], generator: torch.Generator | None) -> Float[Tensor, "t z"]:
        mean_state = self.rnn(self.embedding(masks))[0].mean(0)
        mean, deviation = self.to_mean(mean_state), positive(self.to_deviation(mean_state))
        return mean if generator is None else mean + deviation * normal_like(mean, generator)


class ReleaseNAP(Retain):
    """RETAIN whose attentions read a latent of the context, one draw for a whole batch.

    Parameters
    ----------
    features, outputs, hidden, embed, keep, rnn, seed : as of :class:`ial_nap.attention.Retain`
    steps : T
    masks_at_once : a pass that draws reads as many masks at most, chosen at random
    legacy_time : let z of step t meet the states of step T-1-t, as in the release

    Examples
    --------
    >>> model = ReleaseNAP(3, 1, steps=2, hidden=4)
    >>> model.update(Context.of(torch.ones(1, 2, 3)))
    >>> model(torch.randn(5, 2, 3), torch.full((5,), 2)).logits.shape
    torch.Size([5, 1])
    """

    def __init__(
        self,
        features: int,
        outputs: int,
        *,
        steps: int,
        hidden: int = 32,
        embed: int | None = None,
        keep: float = 0.8,
        rnn: Literal["gru", "lstm"] = "lstm",
        masks_at_once: int = 40,
        legacy_time: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(features, outputs, hidden=hidden, embed=embed, keep=keep, rnn=rnn, seed=seed)
        width = embed or features
        self.steps, self.masks_at_once, self.legacy_time = steps, masks_at_once, legacy_time
        with seeded(seed + 1):
            self.for_beta = _Process(features, width, hidden, width, rnn)
            self.for_alpha = _Process(1, 1, hidden, 1, rnn)
            self.to_alpha = nn.Linear(hidden + 1, 1)
            self.to_beta = nn.Linear(hidden + width, width)
            for layer in (self.to_alpha, self.to_beta):
                nn.init.normal_(layer.weight, std=0.01)
        self._masks = Context(steps, features).masks

    def update(self, context: Context) -> None:
        """Read another context from now on.

        Parameters
        ----------
        context : verdicts

        Raises
        ------
        InputError
            For a context of other sizes.
        """
        if (context.steps, context.features) != (self.steps, self.features):
            raise InputError(
                f"the context is of {context.steps} steps and {context.features} features, the model of {self.steps}"
                f" and {self.features}"
            )
        self._masks = context.masks

    def generators(self) -> Iterator[nn.Parameter]:
        """Return the parameters that a round of annotation trains: all but the embedding and the output."""
        for name, parameter in self.named_parameters():
            if not name.startswith(("embedding.", "output.")):
                yield parameter

    def from_states(
        self,
        on_steps: Float[Tensor, "b t h"],
        on_entries: Float[Tensor, "b t h"],
        lengths: Int64[Tensor, " b"],
        generator: torch.Generator | None,
    ) -> tuple[Float[Tensor, "b t"], Float[Tensor, "b t m"]]:
        """Let the latent of the present context meet the hidden states.

        Parameters
        ----------
        on_steps, on_entries, lengths : as of :meth:`ial_nap.attention.Retain.from_states`
        generator : of the masks read and of z; None for all, and the mean
        """
        masks = self._masks
        if generator is not None and len(masks) > self.masks_at_once:
            masks = masks[torch.randperm(len(masks), generator=generator)[: self.masks_at_once]]
        shown = masks.to(on_steps)
        whether_any = (shown >= 0).flatten(1).any(1).to(on_steps) * 2 - 1
        z_beta = self.for_beta(shown, generator)
        z_alpha = self.for_alpha(whether_any.view(-1, 1, 1).expand(-1, self.steps, 1), generator)
        both = torch.cat([z_alpha, z_beta], 1).expand(len(on_steps), -1, -1)
        if not self.legacy_time:
            both = reverse_by_length(both, lengths)
        on_steps, on_entries = torch.cat([on_steps, both[:, :, :1]], 2), torch.cat([on_entries, both[:, :, 1:]], 2)
        return self.to_alpha(on_steps).squeeze(2), self.to_beta(on_entries).tanh()
