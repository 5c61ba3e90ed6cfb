"""An attention model in feature space that is conditioned on verdicts, so that a new verdict needs no training.

Two paths lead from a context of masks to attention (spec 2.6). The deterministic one counts verdicts of each cell and
closes the cell's gate before anything reads it. The latent one is a neural process: a recurrent network reads every
mask, the mean over masks gives the Gaussian of a latent z for each step, and z enters both attentions and the gate.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int8, Int64
from torch import Tensor, nn
from torch.nn import functional

from ial_nap.attention import Attended, Contributions, lstm_or_gru, masked_softmax, positive, reverse_by_length, weighed
from ial_nap.context import Context, check_masks, counts, preference
from ial_nap.instances import Around, Likeness, Reads, Shown
from ial_nap.series import Kind, Series
from shared_core.device import seeded
from shared_core.errors import InputError

__all__ = ["Condition", "ContextEncoder", "FeatureNAP", "Latent", "Predicted", "Read", "open_gate", "probabilities"]

_MOST_ROWS = 8192


@dataclass(frozen=True, eq=False)
class Latent:
    """Gaussian of the latent, for one or several contexts.

    Parameters
    ----------
    mean, deviation : ``(e, t, z)``
    """

    mean: Float[Tensor, "e t z"]
    deviation: Float[Tensor, "e t z"]

    def drawn(self, noise: Float[Tensor, "s t z"]) -> Float[Tensor, "s t z"]:
        """Return ``mean + deviation * noise``, through which gradients flow.

        Parameters
        ----------
        noise : standard normal; one context stands for any number of draws
        """
        return self.mean + self.deviation * noise

    def kl(self, other: Latent | None = None) -> Float[Tensor, " e"]:
        """Kullback-Leibler divergence from another Gaussian, summed over steps and entries.

        Parameters
        ----------
        other : None is N(0, 1)
        """
        mean = self.mean if other is None else self.mean - other.mean
        scale = torch.ones_like(self.deviation) if other is None else other.deviation
        ratio = self.deviation / scale
        return (0.5 * ((mean / scale).square() + ratio.square() - 1) - ratio.log()).sum((1, 2))


@dataclass(frozen=True, eq=False)
class Condition:
    """What attention is conditioned on; one for all instances of a batch, or one for each.

    Parameters
    ----------
    preference : of each cell, see :func:`ial_nap.context.preference`, ``(e, t, r)``
    z : latent of each step, ``(e, t, z)``
    """

    preference: Float[Tensor, "e t r"]
    z: Float[Tensor, "e2 t z"]


@dataclass(frozen=True, eq=False)
class Read:
    """A forward pass, with the gate.

    Parameters
    ----------
    logits : ``(b, c)``
    alpha : weight of each step, ``(b, t)``
    beta : weight of each cell, ``(b, t, r)``
    gate : how far a cell is open, within [0, 1], ``(e, t, r)``
    gated : what was read, the gate times x, ``(b, t, r)``
    """

    logits: Float[Tensor, "b c"]
    alpha: Float[Tensor, "b t"]
    beta: Float[Tensor, "b t r"]
    gate: Float[Tensor, "e t r"]
    gated: Float[Tensor, "b t r"]

    @property
    def additive(self) -> Float[Tensor, "b r"]:
        """What the logits are linear in: ``sum_t alpha_t beta_td x~_td``."""
        return weighed(self.alpha, self.beta, self.gated)


@dataclass(frozen=True, eq=False)
class Predicted:
    """A Monte Carlo prediction.

    Parameters
    ----------
    samples : probabilities, or standardised values of a regression, ``(s, n, c)``
    kind : of the task
    """

    samples: Float[Tensor, "s n c"]
    kind: Kind

    @property
    def mean(self) -> Float[Tensor, "n c"]:
        """Mean over samples."""
        return self.samples.mean(0)

    @property
    def spread(self) -> Float[Tensor, "n c"]:
        """Standard deviation over samples: what the model does not know."""
        return self.samples.std(0, correction=0)

    @property
    def noise(self) -> Float[Tensor, "n c"]:
        """Standard deviation of the label itself, ``sqrt(E[p (1 - p)])``; 0 for a regression, which models none."""
        if self.kind == "regression":
            return torch.zeros_like(self.mean)
        return (self.samples * (1 - self.samples)).mean(0).clamp(min=0).sqrt()

    def interval(self, level: float = 0.9) -> tuple[Float[Tensor, "n c"], Float[Tensor, "n c"]]:
        """Return bounds that hold this share of the samples.

        Parameters
        ----------
        level : share, within 0 and 1
        """
        tail = (1 - level) / 2
        return self.samples.quantile(tail, 0), self.samples.quantile(1 - tail, 0)


def probabilities(logits: Float[Tensor, "... c"], kind: Kind) -> Float[Tensor, "... c"]:
    """Turn logits into probabilities; those of a regression are the prediction already.

    Parameters
    ----------
    logits : ``(..., c)``
    kind : of the task

    Examples
    --------
    >>> probabilities(torch.zeros(1, 4), "multiclass").tolist()
    [[0.25, 0.25, 0.25, 0.25]]
    """
    if kind == "multiclass":
        return logits.softmax(-1)
    return logits if kind == "regression" else logits.sigmoid()


def open_gate(
    preference: Float[Tensor, "e t r"],
    bias: Float[Tensor, ""],
    slope: Float[Tensor, ""],
    shift: Float[Tensor, "e2 t r"] | None = None,
    *,
    hard: bool,
) -> Float[Tensor, "e3 t r"]:
    """Open each cell as far as verdicts ask for: ``sigmoid(a0 + a1 (u, or 2u below 0) + shift)``.

    Parameters
    ----------
    preference : u, within (-1, 1)
    bias : a0
    slope : a1 before softplus, so that more verdicts 1 never close a gate
    shift : what the latent adds
    hard : close entirely where u is -0.5 or less

    Examples
    --------
    >>> u = torch.tensor([[[-0.5, 0.0]]])
    >>> open_gate(u, torch.tensor(0.0), torch.tensor(1.0), hard=True).tolist()
    [[[0.0, 0.5]]]
    """
    scores = bias + functional.softplus(slope) * torch.where(preference >= 0, preference, 2 * preference)
    gate = (scores if shift is None else scores + shift).sigmoid()
    return torch.where(preference <= -0.5, gate.new_zeros(()), gate) if hard else gate


class ContextEncoder(nn.Module):
    """Turn masks into the Gaussian of a latent for each step: read each mask, take the mean, map it (spec 2.4, 2.6).

    A verdict is a choice of three, not an amount: three indicators stand for it.

    Parameters
    ----------
    features : r
    hidden : units of the recurrent layer
    latent : entries z of the latent of a step
    rnn : "gru" or "lstm"
    beside : entries of a step that it reads beside the mask, see :class:`ial_nap.instances.Shown`
    """

    def __init__(
        self, features: int, hidden: int, latent: int, rnn: Literal["gru", "lstm"] = "lstm", beside: int = 0
    ) -> None:
        super().__init__()
        self.hidden = hidden
        self.rnn = lstm_or_gru(rnn, 3 * features + beside, hidden)
        self.to_mean = nn.Linear(hidden, latent)
        self.to_deviation = nn.Linear(hidden, latent)

    def states(
        self, masks: Int8[Tensor, "k t r"], beside: Float[Tensor, "k t m"] | None = None
    ) -> Float[Tensor, "k t h"]:
        """Read masks, each by itself.

        Parameters
        ----------
        masks : verdicts 1, 0, -1
        beside : what is read beside them
        """
        shown = torch.cat([masks == verdict for verdict in (1, 0, -1)], 2).to(self.to_mean.weight.dtype)
        return self.rnn(shown if beside is None else torch.cat([shown, beside], 2))[0]

    def gaussian(self, summary: Float[Tensor, "e t h"]) -> Latent:
        """Map the mean state of a context to the Gaussian of the latent.

        Parameters
        ----------
        summary : means over masks
        """
        return Latent(self.to_mean(summary), positive(self.to_deviation(summary)))


class FeatureNAP(nn.Module):
    """Predict from a series, obeying verdicts on its cells (spec 2.6).

    Parameters
    ----------
    steps, features, outputs : T, r and the number of logits
    kind : of the task
    hidden : units of each recurrent layer
    latent : entries of the latent of a step; 0 leaves the latent path out
    keep : probability of keeping a feature as the attention reads it, and a hidden state, where dropout is on
    rnn : "gru" or "lstm", of the two that read series
    kappa : prior count of :func:`ial_nap.context.preference`
    hard : outside training, close the gate entirely where the preference is -0.5 or less
    limit : most different masks that the latent path reads; of more, a seeded choice
    gated : False leaves the gate out, so that verdicts reach attention through the latent alone, as in the release
    context : "masks": a context is its masks; "full": the series and labels annotated too; "attentive": besides, each
        instance weighs the masks by who they are of, see :mod:`ial_nap.instances`. Both others need a latent, and
        :meth:`update` needs the series
    schema : of the series it reads, see :attr:`ial_nap.Series.schema`; a context of another one is refused
    seed : of the initial weights, and of that choice

    Examples
    --------
    >>> model = FeatureNAP(4, 3, 1, hidden=8, latent=2)
    >>> x, lengths = torch.randn(5, 4, 3), torch.full((5,), 4)
    >>> context = Context(4, 3)
    >>> shift = context.mark("17", [(t, 1, 0) for t in range(4)])
    >>> model.update(context)
    >>> parts = model.contributions(x, lengths)
    >>> bool((parts.cells[:, :, 1] == 0).all()), tuple(model.predict(x, lengths, samples=30).mean.shape)
    (True, (5, 1))
    """

    preference: Tensor
    summary: Tensor

    def __init__(
        self,
        steps: int,
        features: int,
        outputs: int,
        kind: Kind = "binary",
        *,
        hidden: int = 32,
        latent: int = 16,
        keep: float = 0.8,
        rnn: Literal["gru", "lstm"] = "gru",
        kappa: float = 1.0,
        hard: bool = True,
        limit: int = 512,
        gated: bool = True,
        context: Reads = "masks",
        schema: str = "",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if min(steps, features, outputs, hidden, limit) < 1 or latent < 0:
            raise InputError(
                f"sizes must be 1 or more: steps {steps}, features {features}, outputs {outputs}, hidden {hidden},"
                f" limit {limit}; latent 0 or more: {latent}"
            )
        if not 0 < keep <= 1:
            raise InputError(f"keep must be above 0 and at most 1, got {keep}")
        if context not in get_args(Reads) or (context != "masks" and not latent):
            raise InputError(
                f"context must be {', '.join(get_args(Reads))}, and all but masks need a latent: got '{context}' with"
                f" latent {latent}"
            )
        self.steps, self.features, self.outputs = steps, features, outputs
        self.kind: Kind = kind
        self.hidden, self.latent, self.keep, self.kappa = hidden, latent, keep, kappa
        self.hard, self.limit, self.schema, self.seed = hard, limit, schema, seed
        self.gated, self.context = gated, context
        with seeded(seed):
            self.rnn_alpha = lstm_or_gru(rnn, features, hidden)
            self.rnn_beta = lstm_or_gru(rnn, features, hidden)
            self.to_alpha = nn.Linear(hidden + latent, 1)
            self.to_beta = nn.Linear(hidden + latent, features)
            self.output = nn.Linear(features, outputs)
            beside = 0 if context == "masks" else features + outputs
            self.encoder = ContextEncoder(features, hidden, latent, beside=beside) if latent else None
            self.to_gate = nn.Linear(latent, features, bias=False) if latent else None
            self.likeness = Likeness(features, hidden) if context == "attentive" else None
        self.gate_bias = nn.Parameter(torch.tensor(2.0))
        # softplus of it is the slope, 3 at the beginning.
        self.gate_slope = nn.Parameter(torch.tensor(3.0).expm1().log())
        if self.to_gate is not None:
            nn.init.zeros_(self.to_gate.weight)
        self.register_buffer("preference", torch.zeros(steps, features))
        self.register_buffer("summary", torch.zeros(steps, hidden))
        self._masks = Context(steps, features).masks
        self._shown = Shown.nobody(1, steps, features, outputs)
        self.refresh()

    @classmethod
    def of(
        cls,
        series: Series,
        *,
        hidden: int = 32,
        latent: int = 16,
        keep: float = 0.8,
        rnn: Literal["gru", "lstm"] = "gru",
        kappa: float = 1.0,
        context: Reads = "masks",
        seed: int = 0,
    ) -> FeatureNAP:
        """Make a model of the sizes that some series have.

        Parameters
        ----------
        series : to be trained on
        hidden, latent, keep, rnn, kappa, context, seed : as of the class
        """
        return cls(
            len(series.steps),
            len(series.features),
            series.outputs,
            series.kind,
            hidden=hidden,
            latent=latent,
            keep=keep,
            rnn=rnn,
            kappa=kappa,
            context=context,
            schema=series.schema,
            seed=seed,
        )

    @property
    def config(self) -> dict[str, int | float | bool | str]:
        """What the class has to be called with to make a model that loads this one's state."""
        return {
            "steps": self.steps,
            "features": self.features,
            "outputs": self.outputs,
            "kind": self.kind,
            "hidden": self.hidden,
            "latent": self.latent,
            "keep": self.keep,
            "rnn": "gru" if isinstance(self.rnn_beta, nn.GRU) else "lstm",
            "kappa": self.kappa,
            "hard": self.hard,
            "limit": self.limit,
            "gated": self.gated,
            "context": self.context,
            "schema": self.schema,
            "seed": self.seed,
        }

    # ---- the context

    @torch.no_grad()
    def update(self, context: Context, series: Series | None = None) -> None:
        """Obey a context from now on. No parameter changes, and no gradient is needed.

        Parameters
        ----------
        context : verdicts; an empty one takes all back
        series : among which the annotated instances are, by id; for models that read more of a context than masks

        Raises
        ------
        InputError
            For a context of other sizes, or made for series of other names, or series that are needed and not there.
        """
        if (context.steps, context.features) != (self.steps, self.features):
            raise InputError(
                f"the context is of {context.steps} steps and {context.features} features, the model of {self.steps}"
                f" and {self.features}"
            )
        if context.schema and self.schema and context.schema != self.schema:
            raise InputError(
                f"the context was made for another set of features (schema {context.schema}, the model's is"
                f" {self.schema}): annotate with the features the model was trained on, in their order"
            )
        if self.context != "masks" and len(context) and series is None:
            raise InputError(
                f"a model with context='{self.context}' reads whom masks are of: update(context, series) with series"
            )
        self.preference.copy_(preference(context.one, context.zero, self.kappa))
        self._masks = context.masks
        self._shown = Shown.nobody(len(self._masks), self.steps, self.features, self.outputs)
        if self.context != "masks" and len(context) and series is not None:
            self._shown = Shown.of(series, [instance for instance, _ in context.keys]).where_seen(self._masks)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Read the masks again, after parameters of the encoder have changed."""
        # On the device "meta" there are shapes only.
        if self.encoder is None or self.summary.is_meta:
            return
        if self.context != "masks":
            self._refresh_with_instances(self.encoder)
            return
        # In an order of their own, each once: the same masks give the same bits, however they came together.
        shown = self._masks.flatten(1).numpy() + np.int8(2)
        _, first, times = np.unique(shown.view(f"S{shown.shape[1]}"), return_index=True, return_counts=True)
        if len(first) > self.limit:
            chosen = torch.randperm(len(first), generator=torch.Generator().manual_seed(self.seed))[: self.limit]
            first, times = first[chosen.numpy()], times[chosen.numpy()]
        states = self.encoder.states(self._masks[torch.from_numpy(first)].to(self.summary.device))
        weights = torch.from_numpy(times / times.sum()).to(states)
        self.summary.copy_(torch.einsum("k,kth->th", weights, states))

    def _refresh_with_instances(self, encoder: ContextEncoder) -> None:
        masks, shown = self._masks, self._shown.to(self.summary)
        beside = shown.beside()
        # In an order of their own, as above.
        rows = torch.cat([masks.flatten(1), beside.flatten(1).cpu()], 1).numpy()
        order = torch.from_numpy(np.lexsort(rows.T[::-1]))
        if len(order) > self.limit:
            order = order[torch.randperm(len(order), generator=torch.Generator().manual_seed(self.seed))[: self.limit]]
        at = order.to(beside.device)
        states = encoder.states(masks[order].to(beside.device), beside[at])
        self.summary.copy_(states.mean(0))
        if self.likeness is not None:
            keys = self.likeness.keys(states, Shown(shown.x[at], shown.y[at], shown.lengths[at]))
            self._kept = keys, states, masks[order].to(beside.device)

    def _as_seen_by(
        self,
        around: Around,
        likeness: Likeness,
        pooled: Float[Tensor, "e t r"],
        kept: tuple[Tensor, Tensor, Tensor],
        count: int,
        *,
        hard: bool,
    ) -> tuple[Float[Tensor, "b t r"], Float[Tensor, "b t h"]]:
        """Return preference and mean state as each instance weighs the masks; what all exclude stays excluded."""
        keys, states, masks = (part if len(part) == 1 else part[around.context] for part in kept)
        shared = pooled if len(pooled) == 1 else pooled[around.context]
        gated = around.x
        if self.gated:
            gated = open_gate(shared, self.gate_bias, self.gate_slope, hard=hard) * gated
        on_cells = self.rnn_beta(reverse_by_length(gated, around.lengths))[0]
        weights = likeness.weights(reverse_by_length(on_cells, around.lengths), gated, around.lengths, keys)
        share = count * weights.mean(1)
        one, zero = (
            torch.einsum("bk,bktr->btr", share, (masks == said).to(share).expand(len(share), -1, -1, -1))
            for said in (1, 0)
        )
        own = preference(one, zero, self.kappa)
        return torch.where(shared <= -0.5, torch.minimum(own, shared), own), likeness.pooled(weights, states)

    def gaussian(self) -> Latent | None:
        """Return the Gaussian of the latent under the present context, ``e = 1``; None without a latent path."""
        return None if self.encoder is None else self.encoder.gaussian(self.summary.unsqueeze(0))

    def condition(
        self,
        samples: int = 0,
        seed: int = 0,
        x: Float[Tensor, "b t r"] | None = None,
        lengths: Int64[Tensor, " b"] | None = None,
    ) -> Condition:
        """Return what attention is conditioned on under the present context.

        Parameters
        ----------
        samples : draws of the latent; 0 is its mean
        seed : of the draws, the same for every context, so that before and after can be compared
        x, lengths : instances, which an attentive context is weighed by: there is a condition for each draw and each of
            them, all of a draw together; None is what holds for anybody

        Returns
        -------
        One condition, or as many as draws, or draws times instances.
        """
        latent = self.gaussian()
        shown = self.preference.unsqueeze(0)
        if latent is None:
            return Condition(shown, shown.new_zeros(max(1, samples), self.steps, 0))
        if self.likeness is not None and self.encoder is not None and x is not None and lengths is not None:
            around = Around(x, lengths, torch.zeros_like(lengths))
            keys, states, masks = self._kept
            kept = keys.unsqueeze(0).to(shown), states.unsqueeze(0).to(shown), masks.unsqueeze(0).to(shown.device)
            shown, summary = self._as_seen_by(around, self.likeness, shown, kept, len(self._masks), hard=self.hard)
            latent = self.encoder.gaussian(summary)
        if not samples:
            return Condition(shown, latent.mean)
        noise = torch.randn(samples, self.steps, self.latent, generator=torch.Generator().manual_seed(seed))
        noise = noise.to(latent.mean)
        if len(latent.mean) == 1:
            return Condition(shown, latent.drawn(noise))
        drawn = latent.mean + latent.deviation * noise.unsqueeze(1)
        return Condition(shown.repeat(samples, 1, 1), drawn.flatten(0, 1))

    def condition_on(
        self,
        masks: Int8[Tensor, "e k t r"],
        noise: Float[Tensor, "e t z"] | None = None,
        shown: Shown | None = None,
        around: Around | None = None,
    ) -> tuple[Condition, Latent | None]:
        """Condition on contexts other than the present one, through which gradients flow.

        Parameters
        ----------
        masks : of each of e contexts
        noise : standard normal; None is the mean of the latent
        shown : whom the masks are of, for models that read it; None is of nobody
        around : instances that weigh an attentive context; None is what holds for anybody

        Returns
        -------
        The conditions, and the Gaussian of their latents: one for each context, or for each instance of `around`.

        Raises
        ------
        InputError
            For masks of other sizes.
        """
        e, k = masks.shape[:2]
        flat = check_masks(masks.flatten(0, 1), self.steps, self.features)
        said = preference(*counts(masks), self.kappa).to(self.preference)
        if self.encoder is None:
            return Condition(said, said.new_zeros(e, self.steps, 0)), None
        if self.context == "masks":
            summary = self.encoder.states(flat).unflatten(0, (e, k)).mean(1)
        else:
            if shown is None:
                nobody = Shown.nobody(e * k, self.steps, self.features, self.outputs)
                shown = Shown(*(part.unflatten(0, (e, k)) for part in (nobody.x, nobody.y, nobody.lengths)))
            shown = shown.to(said).where_seen(masks.to(said.device))
            states = self.encoder.states(flat, shown.beside().flatten(0, 1)).unflatten(0, (e, k))
            summary = states.mean(1)
            if self.likeness is not None and around is not None:
                kept = self.likeness.keys(states, shown), states, masks
                said, summary = self._as_seen_by(around, self.likeness, said, kept, k, hard=False)
                noise = None if noise is None else noise[around.context]
        latent = self.encoder.gaussian(summary)
        return Condition(said, latent.mean if noise is None else latent.drawn(noise)), latent

    # ---- reading

    def gate(self, condition: Condition, *, hard: bool) -> Float[Tensor, "e t r"]:
        """Open each cell as far as verdicts ask for: ``sigmoid(a0 + a1 (u or 2u below 0) + U z)``.

        Parameters
        ----------
        condition : preference u and latent z
        hard : close entirely where u is -0.5 or less
        """
        if not self.gated:
            return torch.ones_like(condition.preference)
        shift = None if self.to_gate is None else self.to_gate(condition.z)
        return open_gate(condition.preference, self.gate_bias, self.gate_slope, shift, hard=hard)

    def drops(self, rows: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Draw what dropout multiplies: of both inputs and of both hidden states, ``(rows, 1, entries)`` each.

        Parameters
        ----------
        rows : draws
        generator : of them
        """
        sizes = (self.features, self.features, self.hidden, self.hidden)
        device = generator.device
        kept = [torch.rand(rows, 1, size, generator=generator, device=device) < self.keep for size in sizes]
        return tuple(part.to(self.preference) / self.keep for part in kept)

    def read(
        self,
        x: Float[Tensor, "b t r"],
        lengths: Int64[Tensor, " b"],
        condition: Condition,
        *,
        hard: bool = False,
        drops: tuple[Tensor, ...] | None = None,
    ) -> Read:
        """Predict under conditions.

        Parameters
        ----------
        x : standardised values
        lengths : real steps
        condition : one, or one for each instance
        hard : see :meth:`gate`
        drops : of :meth:`drops`, a row for each instance; None leaves dropout out
        """
        gate = self.gate(condition, hard=hard)
        gated = gate * x
        back = reverse_by_length(gated, lengths)
        for_alpha, for_beta = (back, back) if drops is None else (back * drops[0], back * drops[1])
        on_steps, on_cells = self.rnn_alpha(for_alpha)[0], self.rnn_beta(for_beta)[0]
        if drops is not None:
            on_steps, on_cells = on_steps * drops[2], on_cells * drops[3]
        # States return to forward time before they meet z, which is in forward time.
        z = condition.z.expand(len(x), -1, -1)
        on_steps = torch.cat([reverse_by_length(on_steps, lengths), z], 2)
        on_cells = torch.cat([reverse_by_length(on_cells, lengths), z], 2)
        alpha = masked_softmax(self.to_alpha(on_steps).squeeze(2), lengths)
        beta = self.to_beta(on_cells).tanh()
        additive = weighed(alpha, beta, gated)
        return Read(self.output(additive), alpha, beta, gate, gated)

    def logits_under(
        self,
        x: Float[Tensor, "b t r"],
        lengths: Int64[Tensor, " b"],
        condition: Condition,
        drops: tuple[Tensor, ...] | None = None,
    ) -> Float[Tensor, "b c"]:
        """Return the logits under conditions, with the gate as it is in training.

        Parameters
        ----------
        x, lengths, condition, drops : as of :meth:`read`
        """
        return self.read(x, lengths, condition, drops=drops).logits

    def forward(self, x: Float[Tensor, "b t r"], lengths: Int64[Tensor, " b"]) -> Attended:
        """Predict under the present context, at the mean of the latent and without dropout.

        Parameters
        ----------
        x, lengths : as of :meth:`read`
        """
        found = self.read(x, lengths, self.condition(x=x, lengths=lengths), hard=self.hard)
        return Attended(found.logits, found.alpha, found.beta)

    def additive(self, x: Float[Tensor, "b t r"], lengths: Int64[Tensor, " b"]) -> Float[Tensor, "b r"]:
        """Return what the logits are linear in, under the present context.

        Parameters
        ----------
        x, lengths : as of :meth:`read`
        """
        return self.read(x, lengths, self.condition(x=x, lengths=lengths), hard=self.hard).additive

    def contributions(self, x: Float[Tensor, "b t r"], lengths: Int64[Tensor, " b"]) -> Contributions:
        """Divide the logits among cells, ``alpha_t beta_td w_d x~_td``, under the present context.

        Parameters
        ----------
        x, lengths : as of :meth:`read`
        """
        return self._parts(self.read(x, lengths, self.condition(x=x, lengths=lengths), hard=self.hard))

    def _parts(self, found: Read) -> Contributions:
        cells = torch.einsum("bt,btr,btr,cr->btrc", found.alpha, found.beta, found.gated, self.output.weight)
        return Contributions(cells, self.output.bias.expand(len(cells), -1))

    # ---- Monte Carlo

    def _sampled(
        self, x: Tensor, lengths: Tensor, samples: int, seed: int, dropout: bool
    ) -> Iterator[tuple[slice, Read]]:
        """Read instances, some at a time, each under every sample: rows are samples times instances."""
        generator = torch.Generator().manual_seed(seed + 1)
        drops = self.drops(samples, generator) if dropout and self.keep < 1 else None
        size = max(1, _MOST_ROWS // samples)
        for first in range(0, len(x), size):
            at = slice(first, min(first + size, len(x)))
            count = at.stop - at.start
            condition = self.condition(samples, seed, x[at], lengths[at])
            is_own = len(condition.z) != samples

            def spread(values: Tensor, count: int = count) -> Tensor:
                return values.repeat_interleave(count, 0)

            yield (
                at,
                self.read(
                    x[at].repeat(samples, 1, 1),
                    lengths[at].repeat(samples),
                    condition if is_own else Condition(condition.preference, spread(condition.z)),
                    hard=self.hard,
                    drops=None if drops is None else tuple(spread(part) for part in drops),
                ),
            )

    @torch.no_grad()
    def predict(
        self,
        x: Float[Tensor, "n t r"],
        lengths: Int64[Tensor, " n"],
        *,
        samples: int = 30,
        seed: int = 0,
        dropout: bool = True,
    ) -> Predicted:
        """Predict by draws of the latent and of dropout, each the same for all instances and for every context.

        Parameters
        ----------
        x, lengths : as of :meth:`read`
        samples : draws, 1 or more
        seed : of them
        dropout : leave it on, as the paper does

        Raises
        ------
        InputError
            For fewer than 1 sample.
        """
        self._check_samples(samples)
        found = [
            probabilities(read.logits, self.kind).unflatten(0, (samples, -1))
            for _, read in self._sampled(x, lengths, samples, seed, dropout)
        ]
        return Predicted(torch.cat(found, 1), self.kind)

    @torch.no_grad()
    def spread_of_contributions(
        self,
        x: Float[Tensor, "n t r"],
        lengths: Int64[Tensor, " n"],
        *,
        samples: int = 30,
        seed: int = 0,
        dropout: bool = True,
    ) -> tuple[Float[Tensor, "n t r c"], Float[Tensor, "n t r c"]]:
        """Return mean and variance, over draws, of what each cell contributes.

        Parameters
        ----------
        x, lengths, samples, seed, dropout : as of :meth:`predict`

        Raises
        ------
        InputError
            For fewer than 1 sample.
        """
        self._check_samples(samples)
        means, variances = list[Tensor](), list[Tensor]()
        for _, read in self._sampled(x, lengths, samples, seed, dropout):
            cells = self._parts(read).cells.unflatten(0, (samples, -1))
            means.append(cells.mean(0))
            variances.append(cells.var(0, correction=0))
        return torch.cat(means), torch.cat(variances)

    @torch.no_grad()
    def attend(
        self,
        x: Float[Tensor, "n t r"],
        lengths: Int64[Tensor, " n"],
        *,
        samples: int = 30,
        seed: int = 0,
        dropout: bool = True,
    ) -> tuple[Float[Tensor, "n t"], Float[Tensor, "n t"], Float[Tensor, "n t r"], Float[Tensor, "n t r"]]:
        """Return mean and standard deviation, over draws, of the weights of steps and of cells.

        Parameters
        ----------
        x, lengths, samples, seed, dropout : as of :meth:`predict`

        Returns
        -------
        Mean and deviation of alpha, mean and deviation of beta times the gate: how far a cell is attended to.

        Raises
        ------
        InputError
            For fewer than 1 sample.
        """
        self._check_samples(samples)
        found: list[tuple[Tensor, ...]] = []
        for _, read in self._sampled(x, lengths, samples, seed, dropout):
            count = len(read.alpha) // samples
            parts = (read.alpha, read.beta * read.gate)
            spread = [part.unflatten(0, (samples, count)) for part in parts]
            found.append(tuple(value for part in spread for value in (part.mean(0), part.std(0, correction=0))))
        alpha, alpha_std, beta, beta_std = (torch.cat(column) for column in zip(*found, strict=True))
        return alpha, alpha_std, beta, beta_std

    @staticmethod
    def _check_samples(samples: int) -> None:
        if samples < 1:
            raise InputError(f"samples must be 1 or more, got {samples}")

    def excluded(self) -> Bool[Tensor, "t r"]:
        """Return the cells that have no effect whatever under the present context: those whose gate is exactly 0."""
        return (self.gate(self.condition(), hard=self.hard) == 0)[0]
