"""Any model of one's own behind a gate that obeys verdicts (the input gate of spec 2.6, and nothing else)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int8, Int64
from torch import Tensor, nn

from ial_nap.context import Context, check_masks, counts, preference
from ial_nap.nap import Condition, Latent, open_gate
from ial_nap.series import Series
from shared_core.errors import InputError

__all__ = ["GatedModel", "wrap"]


class GatedModel(nn.Module):
    """A module that reads series, behind a gate on its input.

    Train it with ``Training(model, Episodic(model), series)``, or in a loop of one's own with ``Episodic(model)`` as
    the loss; without that it closes gates too, but nobody has shown it how to do without a feature.

    Parameters
    ----------
    module : maps standardised values ``(b, t, r)`` to logits ``(b, c)``; with `takes_lengths`, values and lengths
    steps, features : T and r
    takes_lengths : call the module with lengths too; otherwise values beyond them are 0
    kappa : prior count of :func:`ial_nap.context.preference`
    hard : outside training, close the gate entirely where the preference is -0.5 or less

    Examples
    --------
    >>> model = GatedModel(nn.Sequential(nn.Flatten(), nn.Linear(6, 1)), 2, 3)
    >>> context = Context(2, 3)
    >>> shift = context.mark("17", [(0, 1, 0), (1, 1, 0)])
    >>> model.update(context)
    >>> model.excluded().tolist()
    [[False, True, False], [False, True, False]]
    """

    preference: Tensor

    def __init__(
        self,
        module: nn.Module,
        steps: int,
        features: int,
        *,
        takes_lengths: bool = False,
        kappa: float = 1.0,
        hard: bool = True,
    ) -> None:
        super().__init__()
        if min(steps, features) < 1:
            raise InputError(f"steps and features must be 1 or more, got {steps} and {features}")
        self.module, self.steps, self.features = module, steps, features
        self.takes_lengths, self.kappa, self.hard = takes_lengths, kappa, hard
        # Dropout is the module's own affair, and there is no latent.
        self.latent, self.keep = 0, 1.0
        self.gate_bias = nn.Parameter(torch.tensor(2.0))
        self.gate_slope = nn.Parameter(torch.tensor(3.0).expm1().log())
        self.register_buffer("preference", torch.zeros(steps, features))

    @torch.no_grad()
    def update(self, context: Context) -> None:
        """Obey a context from now on; no parameter changes.

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
        self.preference.copy_(preference(context.one, context.zero, self.kappa))

    def forward(self, x: Float[Tensor, "b t r"], lengths: Int64[Tensor, " b"]) -> Float[Tensor, "b c"]:
        """Predict under the present context.

        Parameters
        ----------
        x : standardised values
        lengths : real steps
        """
        return self._logits(x, lengths, self.gate(self._present(), hard=self.hard))

    def condition_on(
        self,
        masks: Int8[Tensor, "e k t r"],
        noise: Tensor | None = None,  # noqa: ARG002  (there is no latent to draw)
    ) -> tuple[Condition, Latent | None]:
        """Condition on contexts other than the present one.

        Parameters
        ----------
        masks : of each of e contexts
        noise : not used
        """
        check_masks(masks.flatten(0, 1), self.steps, self.features)
        shown = preference(*counts(masks), self.kappa).to(self.preference)
        return Condition(shown, shown.new_zeros(len(shown), self.steps, 0)), None

    def gate(self, condition: Condition, *, hard: bool) -> Float[Tensor, "e t r"]:
        """Open each cell as far as verdicts ask for.

        Parameters
        ----------
        condition : preference
        hard : close entirely where it is -0.5 or less
        """
        return open_gate(condition.preference, self.gate_bias, self.gate_slope, hard=hard)

    def drops(self, rows: int, generator: torch.Generator) -> tuple[Tensor, ...]:  # noqa: ARG002
        """Return nothing: dropout is the module's own.

        Parameters
        ----------
        rows, generator : not used
        """
        return ()

    def logits_under(
        self,
        x: Float[Tensor, "b t r"],
        lengths: Int64[Tensor, " b"],
        condition: Condition,
        drops: tuple[Tensor, ...] | None = None,  # noqa: ARG002
    ) -> Float[Tensor, "b c"]:
        """Return the logits under conditions, with the gate as it is in training.

        Parameters
        ----------
        x, lengths : as of the forward pass
        condition : one, or one for each instance
        drops : not used
        """
        return self._logits(x, lengths, self.gate(condition, hard=False))

    def excluded(self) -> Bool[Tensor, "t r"]:
        """Return the cells that have no effect whatever under the present context."""
        return (self.gate(self._present(), hard=self.hard) == 0)[0]

    def _present(self) -> Condition:
        return Condition(self.preference.unsqueeze(0), self.preference.new_zeros(1, self.steps, 0))

    def _logits(self, x: Tensor, lengths: Tensor, gate: Tensor) -> Tensor:
        gated = gate * x
        if self.takes_lengths:
            return self.module(gated, lengths)
        inside = torch.arange(self.steps, device=x.device) < lengths.unsqueeze(1)
        return self.module(torch.where(inside.unsqueeze(2), gated, gated.new_zeros(())))


def wrap(
    module: nn.Module,
    like: Series | tuple[int, int],
    *,
    takes_lengths: bool = False,
    kappa: float = 1.0,
    hard: bool = True,
) -> GatedModel:
    """Put a module of one's own behind the gate (spec 6).

    Parameters
    ----------
    module : as of :class:`GatedModel`
    like : series it reads, or their steps and features
    takes_lengths, kappa, hard : as of :class:`GatedModel`

    Raises
    ------
    InputError
        For sizes below 1.

    Examples
    --------
    >>> wrap(nn.Sequential(nn.Flatten(), nn.Linear(6, 1)), (2, 3)).features
    3
    """
    steps, features = (len(like.steps), len(like.features)) if isinstance(like, Series) else like
    return GatedModel(module, steps, features, takes_lengths=takes_lengths, kappa=kappa, hard=hard)
