"""What a context says of whom: annotated instances beside their masks, and who of them is like the one at hand.

A mask alone says which cells, not for whom. With ``context="full"`` the encoder reads the annotated series and label
beside each mask (in the paper's figure they are part of a context point); with ``context="attentive"`` each instance
besides weighs the masks of a context by cross-attention, so that what was said of one kind of instance acts on that
kind (spec 2.6, optional).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Int8, Int64
from torch import Tensor, nn
from torch.nn import functional

from ial_nap.series import Series, find_name
from shared_core.errors import InputError

__all__ = ["Around", "Likeness", "Reads", "Shown", "labels_as_numbers", "over_steps"]

Reads: TypeAlias = Literal["masks", "full", "attentive"]
"""What a model reads of a context: masks alone; series and labels beside them; and each instance those like it."""

_HEADS = 4


def labels_as_numbers(series: Series) -> Float[Tensor, "n c"]:
    """Return labels as a network reads them: one-hot classes, and others as they are; 0 where there are none.

    Parameters
    ----------
    series : with or without labels
    """
    if series.y is None:
        return series.x.new_zeros(len(series), series.outputs)
    if series.kind == "multiclass":
        return functional.one_hot(series.targets, series.outputs).to(series.x)
    return series.targets.view(len(series), -1).to(series.x)


@dataclass(frozen=True, eq=False)
class Shown:
    """Annotated instances, one for each mask of one or several contexts.

    Parameters
    ----------
    x : standardised values, 0 beyond an instance's length, ``(*e, k, t, r)``
    y : labels as numbers, ``(*e, k, c)``
    lengths : real steps, ``(*e, k)``
    """

    x: Float[Tensor, "*e k t r"]
    y: Float[Tensor, "*e k c"]
    lengths: Int64[Tensor, "*e k"]

    @classmethod
    def of(cls, series: Series, instances: Sequence[str] | Int64[Tensor, "*e k"]) -> Shown:
        """Pick instances.

        Parameters
        ----------
        series : among which they are
        instances : ids, or places of instances

        Raises
        ------
        InputError
            For an id that is not there.
        """
        if isinstance(instances, Tensor):
            at = instances
        else:
            place = {name: k for k, name in enumerate(series.ids)}
            rows = [
                place[name] if name in place else find_name(name, series.ids, "annotated instance")
                for name in instances
            ]
            at = torch.tensor(rows, dtype=torch.int64)
        inside = torch.arange(series.x.shape[1], device=series.x.device) < series.lengths.unsqueeze(1)
        x = torch.where(inside.unsqueeze(2), series.x, series.x.new_zeros(()))
        return cls(x[at], labels_as_numbers(series)[at], series.lengths[at])

    @classmethod
    def nobody(cls, masks: int, steps: int, features: int, outputs: int) -> Shown:
        """Stand for masks that belong to no instance.

        Parameters
        ----------
        masks, steps, features, outputs : sizes
        """
        return cls(
            torch.zeros(masks, steps, features),
            torch.zeros(masks, outputs),
            torch.full((masks,), steps),
        )

    def where_seen(self, masks: Int8[Tensor, "*e k t r"]) -> Shown:
        """Return these without what belongs to masks that have no verdict: they say nothing, of nobody.

        Parameters
        ----------
        masks : of these instances
        """
        seen = (masks >= 0).flatten(-2).any(-1)
        return Shown(self.x * seen[..., None, None], self.y * seen.unsqueeze(-1), self.lengths)

    def beside(self) -> Float[Tensor, "*e k t m"]:
        """Return what the encoder reads beside a mask: values of a step, and the label at each."""
        label = self.y.unsqueeze(-2).expand(*self.x.shape[:-1], self.y.shape[-1])
        return torch.cat([self.x, label], -1)

    def to(self, like: Tensor) -> Shown:
        """Move to the device, and to the precision, of a tensor.

        Parameters
        ----------
        like : on that device, in that precision
        """
        return Shown(self.x.to(like), self.y.to(like), self.lengths.to(like.device))


@dataclass(frozen=True, eq=False)
class Around:
    """Instances to be predicted, each under one of several contexts.

    Parameters
    ----------
    x : standardised values, ``(b, t, r)``
    lengths : real steps, ``(b,)``
    context : which of the contexts, ``(b,)``
    """

    x: Float[Tensor, "b t r"]
    lengths: Int64[Tensor, " b"]
    context: Int64[Tensor, " b"]


def over_steps(values: Float[Tensor, "*e t m"], lengths: Int64[Tensor, "*e"]) -> Float[Tensor, "*e m"]:
    """Mean over real steps.

    Parameters
    ----------
    values : ``(*e, t, m)``
    lengths : real steps
    """
    inside = torch.arange(values.shape[-2], device=values.device) < lengths.unsqueeze(-1)
    return (values * inside.unsqueeze(-1)).sum(-2) / lengths.unsqueeze(-1)


class Likeness(nn.Module):
    """Weigh the instances of a context by how like they are to the one at hand: attention with 4 heads.

    Queries and keys are of the mean hidden state, of the attention's and of the encoder's recurrent layer, and of the
    mean values; the angle between them counts. A query sees values only as far as the gate is open for all, so that
    what everybody excludes moves no weight.

    Parameters
    ----------
    features : r
    hidden : units of the recurrent layers, a multiple of 4

    Raises
    ------
    InputError
        For other units.
    """

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        if hidden % _HEADS:
            raise InputError(f"hidden must be a multiple of {_HEADS} for an attentive context, got {hidden}")
        self.to_query = nn.Linear(hidden + features, hidden, bias=False)
        self.to_key = nn.Linear(hidden + features, hidden, bias=False)
        with torch.no_grad():
            # To begin with, like is what has like values.
            self.to_query.weight[:, :hidden] = 0
            self.to_key.weight.copy_(self.to_query.weight)
        # Of directions, whose length a penalty on weights cannot take away.
        self.sharpness = nn.Parameter(torch.full((_HEADS,), 2.0))

    def keys(self, states: Float[Tensor, "*e k t h"], shown: Shown) -> Float[Tensor, "*e k h"]:
        """Describe annotated instances.

        Parameters
        ----------
        states : of the encoder
        shown : the instances
        """
        return self.to_key(torch.cat([over_steps(states, shown.lengths), over_steps(shown.x, shown.lengths)], -1))

    def weights(
        self,
        states: Float[Tensor, "b t h"],
        gated: Float[Tensor, "b t r"],
        lengths: Int64[Tensor, " b"],
        keys: Float[Tensor, "b2 k h"],
    ) -> Float[Tensor, "b 4 k"]:
        """Return each head's weights of the annotated instances, which add up to 1.

        Parameters
        ----------
        states : of the layer that weighs cells, in forward time
        gated : values behind the gate that is open for all
        lengths : real steps
        keys : of a context for each instance, or of one for all
        """
        query = self.to_query(torch.cat([over_steps(states, lengths), over_steps(gated, lengths)], -1))
        query, keys = (
            functional.normalize(part.unflatten(-1, (_HEADS, -1)), dim=-1, eps=1e-6) for part in (query, keys)
        )
        scores = torch.einsum("bhd,bkhd->bhk", query, keys.expand(len(query), -1, -1, -1))
        return (self.sharpness.exp().unsqueeze(-1) * scores).softmax(-1)

    @staticmethod
    def pooled(weights: Float[Tensor, "b 4 k"], states: Float[Tensor, "b2 k t h"]) -> Float[Tensor, "b t h"]:
        """Return the states of a context as an instance sees them; each head has its part of the entries.

        Parameters
        ----------
        weights : of :meth:`weights`
        states : of the encoder
        """
        parts = states.unflatten(-1, (_HEADS, -1)).expand(len(weights), *states.shape[1:-1], _HEADS, -1)
        return torch.einsum("bhk,bkthd->bthd", weights, parts).flatten(-2)
