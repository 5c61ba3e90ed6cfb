"""Imagined annotators for training: which cells they want left out, and what they say about it (spec 2.6).

An episode with an off-set D trains the model to be the best predictor without D, so that later, when somebody says "do
not attend to D", that predictor is there already. What is hidden and what is wrong in the masks makes it read several.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int8
from torch import Tensor

from shared_core.errors import InputError

__all__ = ["Episodes", "Imagined"]


@dataclass(frozen=True, eq=False)
class Imagined:
    """Several episodes that have as many masks.

    Parameters
    ----------
    off : cells to leave out, ``(e, t, r)``
    masks : verdicts, ``(e, k, t, r)``
    """

    off: Bool[Tensor, "e t r"]
    masks: Int8[Tensor, "e k t r"]


@dataclass(frozen=True)
class Episodes:
    """How episodes are drawn.

    Parameters
    ----------
    steps, features : T and r
    most_masks : K is uniform on 1..most_masks
    empty : probability of an episode in which nothing is left out: nothing is known, or cells are marked 1 at random
    most_off : an episode's probability of leaving a feature out is uniform on 0..most_off
    whole : probability that a feature is left out at all steps, rather than in a span of them
    most_hidden : a cell's probability of not being seen (-1) is uniform on 0..most_hidden
    most_flipped : that of the opposite verdict on 0..most_flipped

    Raises
    ------
    InputError
        For sizes below 1, or probabilities that are none.

    Examples
    --------
    >>> drawn = Episodes(4, 12).draw(5, torch.Generator().manual_seed(0))
    >>> tuple(drawn.off.shape), tuple(drawn.masks.shape)[2:]
    ((5, 4, 12), (4, 12))
    """

    steps: int
    features: int
    most_masks: int = 20
    empty: float = 0.2
    most_off: float = 1.0
    whole: float = 0.9
    most_hidden: float = 0.7
    most_flipped: float = 0.1

    def __post_init__(self) -> None:
        """Refuse what is no probability."""
        if min(self.steps, self.features, self.most_masks) < 1:
            raise InputError(
                f"episodes need steps, features and masks: {self.steps}, {self.features}, {self.most_masks}"
            )
        for name in ("empty", "most_off", "whole", "most_hidden", "most_flipped"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} must be within 0 and 1, got {getattr(self, name)}")

    def draw(self, count: int, generator: torch.Generator) -> Imagined:
        """Draw episodes with one number of masks.

        Parameters
        ----------
        count : episodes e
        generator : of all that is drawn
        """
        shape = (count, self.steps, self.features)
        masks_each = int(torch.randint(1, self.most_masks + 1, (), generator=generator))
        is_empty = self._chance(count, 1, 1, generator=generator) < self.empty
        off = self._off(count, generator) & ~is_empty
        masks = (~off).to(torch.int8).unsqueeze(1).repeat(1, masks_each, 1, 1)
        flipped = self._chance(*masks.shape, generator=generator) < self._level(count, self.most_flipped, generator)
        masks = torch.where(flipped & ~is_empty.unsqueeze(1), 1 - masks, masks)
        hidden = self._chance(*masks.shape, generator=generator) < self._level(count, self.most_hidden, generator)
        nothing_known = is_empty & (self._chance(count, 1, 1, generator=generator) < 0.5)
        masks = masks.masked_fill(hidden | nothing_known.unsqueeze(1), -1)
        return Imagined(off.expand(shape), masks)

    def again(self, drawn: Imagined, generator: torch.Generator) -> Int8[Tensor, "e k t r"]:
        """Draw other masks of the same off-sets; of an episode in which nothing is known, nothing becomes known.

        Parameters
        ----------
        drawn : episodes
        generator : of what is hidden and flipped
        """
        count = len(drawn.off)
        masks = (~drawn.off).to(torch.int8).unsqueeze(1).expand_as(drawn.masks)
        flipped = self._chance(*masks.shape, generator=generator) < self._level(count, self.most_flipped, generator)
        masks = torch.where(flipped & drawn.off.flatten(1).any(1).view(-1, 1, 1, 1), 1 - masks, masks)
        hidden = self._chance(*masks.shape, generator=generator) < self._level(count, self.most_hidden, generator)
        unknown = (drawn.masks == -1).flatten(1).all(1).view(-1, 1, 1, 1)
        return masks.masked_fill(hidden | unknown, -1)

    def _off(self, count: int, generator: torch.Generator) -> Tensor:
        feature = self._chance(count, 1, self.features, generator=generator)
        chosen = feature < self.most_off * self._chance(count, 1, 1, generator=generator)
        ends = torch.randint(0, self.steps, (2, count, 1, self.features), generator=generator)
        step = torch.arange(self.steps).view(1, -1, 1)
        span = (step >= ends.min(0).values) & (step <= ends.max(0).values)
        span = span | (self._chance(count, 1, self.features, generator=generator) < self.whole)
        off = chosen & span
        # Where nothing would be left, the feature least likely to be chosen stays.
        all_off = off.flatten(1).all(1).view(-1, 1, 1)
        return off & ~(all_off & (feature == feature.amax(2, keepdim=True)))

    @staticmethod
    def _chance(*shape: int, generator: torch.Generator) -> Tensor:
        return torch.rand(shape, generator=generator)

    def _level(self, count: int, most: float, generator: torch.Generator) -> Tensor:
        return most * self._chance(count, 1, 1, 1, generator=generator)
