"""Attention over time and features as in RETAIN, and what it says each cell contributes, exactly.

Choi et al., "RETAIN", NeurIPS 2016 (arXiv:1608.05745): two recurrent networks read a series from its last step to its
first; one weighs steps (alpha), the other the entries of each step's embedding (beta), and the prediction is linear in
their products. Heo et al., "Uncertainty-Aware Attention", NeurIPS 2018, makes both attentions Gaussian.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn
from torch.nn import functional

from shared_core.device import seeded
from shared_core.errors import InputError

__all__ = [
    "Attended",
    "Contributions",
    "Retain",
    "Uncertain",
    "dropped",
    "lstm_or_gru",
    "masked_softmax",
    "normal_like",
    "positive",
    "reverse_by_length",
    "weighed",
]

_LEAST, _MOST = 1e-4, 10.0


@dataclass(frozen=True, eq=False)
class Attended:
    """What a forward pass gives.

    Parameters
    ----------
    logits : ``(b, c)``; of a regression, the standardised prediction
    alpha : weight of each step, ``(b, t)``, 0 beyond an instance's length
    beta : weight of each entry of a step, ``(b, t, m)``, m features or entries of the embedding
    """

    logits: Float[Tensor, "b c"]
    alpha: Float[Tensor, "b t"]
    beta: Float[Tensor, "b t m"]


@dataclass(frozen=True, eq=False)
class Contributions:
    """What each cell adds to the logits: ``cells.sum((1, 2)) + intercept`` is them.

    Parameters
    ----------
    cells : ``(b, t, r, c)``, 0 beyond an instance's length
    intercept : what no cell accounts for, ``(b, c)``
    """

    cells: Float[Tensor, "b t r c"]
    intercept: Float[Tensor, "b c"]


def reverse_by_length(values: Shaped[Tensor, "b t ..."], lengths: Int64[Tensor, " b"]) -> Shaped[Tensor, "b t ..."]:
    """Reverse the real steps of each series; what is beyond its length stays where it is. It is its own inverse.

    Parameters
    ----------
    values : ``(b, t, ...)``
    lengths : real steps, ``(b,)``

    Examples
    --------
    >>> reverse_by_length(torch.tensor([[1, 2, 3], [4, 5, 0]]), torch.tensor([3, 2])).tolist()
    [[3, 2, 1], [5, 4, 0]]
    """
    step = torch.arange(values.shape[1], device=values.device)
    back = lengths.unsqueeze(1) - 1 - step
    place = torch.where(back >= 0, back, step)
    place = place + values.shape[1] * torch.arange(len(values), device=values.device).unsqueeze(1)
    # Whole steps are moved, at half the time of picking entries.
    return values.flatten(0, 1).index_select(0, place.flatten()).view(values.shape)


def masked_softmax(scores: Float[Tensor, "b t"], lengths: Int64[Tensor, " b"]) -> Float[Tensor, "b t"]:
    """Softmax over the real steps of each series; exactly 0 beyond them.

    Parameters
    ----------
    scores : ``(b, t)``
    lengths : real steps, ``(b,)``, at least 1

    Raises
    ------
    InputError
        For a series without a step.

    Examples
    --------
    >>> masked_softmax(torch.zeros(1, 3), torch.tensor([2])).tolist()
    [[0.5, 0.5, 0.0]]
    """
    if bool((lengths < 1).any()):
        raise InputError("a series of length 0 has no step to attend to: leave it out")
    beyond = torch.arange(scores.shape[1], device=scores.device) >= lengths.unsqueeze(1)
    return scores.masked_fill(beyond, -math.inf).softmax(1)


def weighed(
    alpha: Float[Tensor, "b t"], beta: Float[Tensor, "b t m"], values: Float[Tensor, "b t m"]
) -> Float[Tensor, "b m"]:
    """Return ``sum_t alpha_t beta_t values_t``.

    Parameters
    ----------
    alpha, beta : weights of steps and of entries
    values : of steps

    Examples
    --------
    >>> weighed(torch.tensor([[0.5, 0.5]]), torch.ones(1, 2, 1), torch.tensor([[[2.0], [4.0]]])).tolist()
    [[3.0]]
    """
    return (alpha.unsqueeze(2) * beta * values).sum(1)


def positive(raw: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Turn any number into a standard deviation within 1e-4 and 10: ``softplus(raw) + 1e-4``.

    Parameters
    ----------
    raw : any numbers
    """
    return (functional.softplus(raw) + _LEAST).clamp(max=_MOST)


def dropped(values: Float[Tensor, "... m"], keep: float, generator: torch.Generator | None) -> Float[Tensor, "... m"]:
    """Drop entries at random and scale what is kept, the same ones at every step of a series (axis -2).

    Parameters
    ----------
    values : ``(..., t, m)``
    keep : probability of keeping an entry
    generator : None keeps all
    """
    if generator is None or keep >= 1:
        return values
    shape = (*values.shape[:-2], 1, values.shape[-1])
    mask = torch.rand(shape, generator=generator, device=generator.device) < keep
    return values * (mask.to(values) / keep)


def normal_like(values: Float[Tensor, "*n"], generator: torch.Generator) -> Float[Tensor, "*n"]:
    """Draw as many standard normal numbers.

    Parameters
    ----------
    values : whose shape, precision and device they have
    generator : of the draw, on its own device
    """
    drawn = torch.randn(values.shape, generator=generator, device=generator.device, dtype=values.dtype)
    return drawn.to(values.device)


def lstm_or_gru(kind: Literal["gru", "lstm"], inputs: int, hidden: int) -> nn.GRU | nn.LSTM:
    """Make a recurrent layer that takes ``(b, t, inputs)``.

    Parameters
    ----------
    kind : "gru" or "lstm"
    inputs, hidden : sizes

    Raises
    ------
    InputError
        For another kind.
    """
    if kind not in {"gru", "lstm"}:
        raise InputError(f"unknown recurrent layer '{kind}': choose gru or lstm")
    return (nn.GRU if kind == "gru" else nn.LSTM)(inputs, hidden, batch_first=True)


class Retain(nn.Module):
    """Predict from a series by attention over its steps and the entries of their embeddings (spec 2.2).

    Parameters
    ----------
    features : r
    outputs : logits c
    hidden : units of each recurrent layer
    embed : width m of the embedding; None is `features`
    keep : probability of keeping an entry of the embedding, and of a hidden state, where a generator is given
    rnn : "gru" or "lstm"
    seed : of the initial weights

    Examples
    --------
    >>> model = Retain(3, 1, hidden=4)
    >>> x, lengths = torch.randn(2, 5, 3), torch.tensor([5, 2])
    >>> found, parts = model(x, lengths), model.contributions(x, lengths)
    >>> bool(((parts.cells.sum((1, 2)) + parts.intercept) - found.logits).abs().max() < 1e-5)
    True
    """

    def __init__(
        self,
        features: int,
        outputs: int,
        *,
        hidden: int = 32,
        embed: int | None = None,
        keep: float = 0.8,
        rnn: Literal["gru", "lstm"] = "gru",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.features, self.outputs, self.keep = features, outputs, keep
        width = embed or features
        with seeded(seed):
            self.embedding = nn.Linear(features, width)
            self.rnn_alpha = lstm_or_gru(rnn, width, hidden)
            self.rnn_beta = lstm_or_gru(rnn, width, hidden)
            self.to_alpha = nn.Linear(hidden, 1)
            self.to_beta = nn.Linear(hidden, width)
            self.output = nn.Linear(width, outputs)

    def attention(
        self,
        embedded: Float[Tensor, "b t m"],
        lengths: Int64[Tensor, " b"],
        generator: torch.Generator | None,
    ) -> tuple[Float[Tensor, "b t"], Float[Tensor, "b t m"]]:
        """Return alpha and beta in forward time.

        Parameters
        ----------
        embedded : steps
        lengths : real steps
        generator : of dropout; None leaves it out
        """
        back = reverse_by_length(embedded, lengths)
        on_steps = dropped(self.rnn_alpha(dropped(back, self.keep, generator))[0], self.keep, generator)
        on_entries = dropped(self.rnn_beta(dropped(back, self.keep, generator))[0], self.keep, generator)
        alpha, beta = self.from_states(on_steps, on_entries, lengths, generator)
        return masked_softmax(reverse_by_length(alpha, lengths), lengths), reverse_by_length(beta, lengths)

    def from_states(
        self,
        on_steps: Float[Tensor, "b t h"],
        on_entries: Float[Tensor, "b t h"],
        lengths: Int64[Tensor, " b"],  # noqa: ARG002  (subclasses bring in what has a time of its own)
        generator: torch.Generator | None,  # noqa: ARG002  (subclasses draw)
    ) -> tuple[Float[Tensor, "b t"], Float[Tensor, "b t m"]]:
        """Turn hidden states into scores of steps and weights of entries, all in reversed time.

        Parameters
        ----------
        on_steps, on_entries : hidden states, the last real step first
        lengths : real steps
        generator : of what is drawn, None for means
        """
        return self.to_alpha(on_steps).squeeze(2), self.to_beta(on_entries).tanh()

    def forward(
        self,
        x: Float[Tensor, "b t r"],
        lengths: Int64[Tensor, " b"],
        generator: torch.Generator | None = None,
    ) -> Attended:
        """Predict.

        Parameters
        ----------
        x : standardised values
        lengths : real steps
        generator : of dropout; None leaves it out
        """
        embedded = self.embedding(x)
        alpha, beta = self.attention(embedded, lengths, generator)
        seen = weighed(alpha, beta, embedded)
        return Attended(self.output(seen), alpha, beta)

    def additive(self, x: Float[Tensor, "b t r"], lengths: Int64[Tensor, " b"]) -> Float[Tensor, "b m"]:
        """Return what the logits are linear in, ``sum_t alpha_t beta_t v_t``, without dropout.

        Parameters
        ----------
        x, lengths : as of the forward pass
        """
        embedded = self.embedding(x)
        alpha, beta = self.attention(embedded, lengths, None)
        return weighed(alpha, beta, embedded)

    def contributions(
        self,
        x: Float[Tensor, "b t r"],
        lengths: Int64[Tensor, " b"],
        generator: torch.Generator | None = None,
    ) -> Contributions:
        """Divide the logits among cells: ``alpha_t w_o^T (beta_t * W_emb[d]) x[t, d]``.

        Parameters
        ----------
        x, lengths, generator : as of the forward pass
        """
        alpha, beta = self.attention(self.embedding(x), lengths, generator)
        weighed = torch.einsum("bt,btm,cm->btmc", alpha, beta, self.output.weight)
        cells = torch.einsum("btmc,md,btd->btdc", weighed, self.embedding.weight, x)
        intercept = torch.einsum("btmc,m->bc", weighed, self.embedding.bias) + self.output.bias
        return Contributions(cells, intercept)


class Uncertain(Retain):
    """RETAIN whose attentions are Gaussian before softmax and tanh, one draw a pass (spec 2.3).

    Parameters
    ----------
    features, outputs, hidden, embed, keep, rnn, seed : as of :class:`Retain`
    plus : draw the logits too, from Gaussians whose deviation is read off what the logits are linear in ("UA+")

    Examples
    --------
    >>> model = Uncertain(3, 1, hidden=4, keep=1.0, plus=True)
    >>> x, lengths, random = torch.randn(1, 5, 3), torch.tensor([5]), torch.Generator().manual_seed(0)
    >>> model(x, lengths, random).logits.equal(model(x, lengths, random).logits)
    False
    """

    def __init__(
        self,
        features: int,
        outputs: int,
        *,
        hidden: int = 32,
        embed: int | None = None,
        keep: float = 0.8,
        rnn: Literal["gru", "lstm"] = "gru",
        plus: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(features, outputs, hidden=hidden, embed=embed, keep=keep, rnn=rnn, seed=seed)
        drawn = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            self.alpha_spread = nn.Linear(hidden, 1)
            self.beta_spread = nn.Linear(hidden, embed or features)
        with torch.no_grad():
            for layer in (self.to_alpha, self.to_beta, self.alpha_spread, self.beta_spread):
                layer.weight.copy_(0.01 * torch.randn(layer.weight.shape, generator=drawn))
                layer.bias.zero_()
        self.output_spread: nn.Linear | None = None
        if plus:
            with seeded(seed):
                self.output_spread = nn.Linear(embed or features, outputs)

    def forward(
        self,
        x: Float[Tensor, "b t r"],
        lengths: Int64[Tensor, " b"],
        generator: torch.Generator | None = None,
    ) -> Attended:
        """Predict; with `plus` and a generator, the logits are drawn too.

        Parameters
        ----------
        x, lengths : as of :meth:`Retain.forward`
        generator : of dropout and draws; None leaves them out
        """
        found = super().forward(x, lengths, generator)
        if self.output_spread is None or generator is None:
            return found
        seen = weighed(found.alpha, found.beta, self.embedding(x))
        drawn = positive(self.output_spread(seen)) * normal_like(found.logits, generator)
        return Attended(found.logits + drawn, found.alpha, found.beta)

    def from_states(
        self,
        on_steps: Float[Tensor, "b t h"],
        on_entries: Float[Tensor, "b t h"],
        lengths: Int64[Tensor, " b"],  # noqa: ARG002
        generator: torch.Generator | None,
    ) -> tuple[Float[Tensor, "b t"], Float[Tensor, "b t m"]]:
        """Draw scores of steps and weights of entries, or return their means.

        Parameters
        ----------
        on_steps, on_entries, lengths : as of :meth:`Retain.from_states`
        generator : of the draw, None for means
        """
        alpha, beta = self.to_alpha(on_steps).squeeze(2), self.to_beta(on_entries)
        if generator is not None:
            alpha = alpha + positive(self.alpha_spread(on_steps).squeeze(2)) * normal_like(alpha, generator)
            beta = beta + positive(self.beta_spread(on_entries)) * normal_like(beta, generator)
        return alpha, beta.tanh()
