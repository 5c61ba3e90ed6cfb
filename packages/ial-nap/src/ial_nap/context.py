"""What annotators said: masks of verdicts, their counts per cell, and the way back.

A mask is int8 ``(T, r)``: 1 attend, 0 do not attend, -1 not known or not seen. A context is an ordered set of masks,
one for an instance and annotator. All that the deterministic path of the attention process reads of it is how often a
cell was marked 1 and 0, so that new verdicts cost what they touch and no more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int8, Int64
from torch import Tensor

from shared_core.errors import InputError

__all__ = ["Context", "Shift", "check_masks", "counts", "preference"]


def check_masks(masks: Tensor | np.ndarray, steps: int, features: int) -> Int8[Tensor, "k t r"]:
    """Return masks as int8, or say what is wrong with them.

    Parameters
    ----------
    masks : ``(k, steps, features)`` of 1, 0, -1
    steps, features : of the model

    Raises
    ------
    InputError
        For another shape or another verdict.

    Examples
    --------
    >>> check_masks(np.array([[[1, -1]]]), 1, 2).dtype
    torch.int8
    """
    found = torch.as_tensor(masks)
    if found.ndim != 3 or found.shape[1:] != (steps, features):
        raise InputError(f"masks have shape {tuple(found.shape)}: expected (K, {steps}, {features}), (K, T, r)")
    wrong = ((found != 1) & (found != 0) & (found != -1)).nonzero()
    if len(wrong):
        k, t, d = wrong[0].tolist()
        raise InputError(f"masks[{k}, {t}, {d}] = {found[k, t, d]}: a verdict is 1 (attend), 0 (not attend) or -1")
    return found.to(torch.int8)


def counts(masks: Int8[Tensor, "*e k t r"]) -> tuple[Float[Tensor, "*e t r"], Float[Tensor, "*e t r"]]:
    """Count verdicts 1 and 0 of each cell.

    Parameters
    ----------
    masks : of one or several contexts

    Examples
    --------
    >>> one, zero = counts(torch.tensor([[[1, 0]], [[1, -1]]], dtype=torch.int8))
    >>> one.tolist(), zero.tolist()
    ([[2.0, 0.0]], [[0.0, 1.0]])
    """
    return (masks == 1).sum(-3).to(torch.float32), (masks == 0).sum(-3).to(torch.float32)


def preference(one: Float[Tensor, "*c"], zero: Float[Tensor, "*c"], kappa: float = 1.0) -> Float[Tensor, "*c"]:
    """Preference for attending, ``u = (n1 - n0) / (n1 + n0 + kappa)``, within (-1, 1); 0 where nothing is known.

    Parameters
    ----------
    one, zero : counts of verdicts 1 and 0
    kappa : prior count, above 0: as many verdicts move u half way

    Raises
    ------
    InputError
        For a kappa that is not above 0.

    Examples
    --------
    >>> preference(torch.tensor([0.0, 3.0, 0.0]), torch.tensor([0.0, 0.0, 1.0])).tolist()
    [0.0, 0.75, -0.5]
    """
    if not kappa > 0:
        raise InputError(f"kappa must be above 0, got {kappa}")
    return (one - zero) / (one + zero + kappa)


_NOWHERE, _NOTHING = torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, dtype=torch.int8)


def _nothing_left(key: tuple[str, str]) -> InputError:
    return InputError(
        f"instance '{key[0]}': every cell is marked 0, nothing would be left to attend to; leave one, or give"
        " allow_empty=True"
    )


@dataclass(frozen=True)
class Shift:
    """What a change of the context did.

    Parameters
    ----------
    keys : instance and annotator of each mask that changed
    cells : cells whose counts changed, ``(t, d)``
    verdicts : cells of masks that changed
    """

    keys: tuple[tuple[str, str], ...]
    cells: tuple[tuple[int, int], ...]
    verdicts: int


class Context:
    """Masks by instance and annotator, with counts kept up to date at the cost of the cells that change.

    Parameters
    ----------
    steps, features : of the model
    kappa : prior count of :func:`preference`
    schema : of the series annotated, see :attr:`ial_nap.Series.schema`; "" when not known

    Examples
    --------
    >>> context = Context(1, 2)
    >>> context.mark("17", [(0, 1, 0)]).cells
    ((0, 1),)
    >>> context.preference.tolist()
    [[0.0, -0.5]]
    >>> context.undo().verdicts, len(context)
    (1, 0)
    """

    def __init__(self, steps: int, features: int, *, kappa: float = 1.0, schema: str = "") -> None:
        if steps < 1 or features < 1:
            raise InputError(f"a context needs steps and features, got {steps} and {features}")
        self.steps, self.features, self.kappa, self.schema = steps, features, kappa, schema
        # What is made in inference mode could not be changed outside of it.
        with torch.inference_mode(False):
            self.one = torch.zeros(steps, features)
            self.zero = torch.zeros(steps, features)
        self._masks: dict[tuple[str, str], Tensor] = {}
        self._past: list[list[tuple[tuple[str, str], bool, Tensor, Tensor]]] = []

    @classmethod
    def of(
        cls,
        masks: Tensor | np.ndarray,
        *,
        ids: Sequence[str] | None = None,
        annotators: Sequence[str] | None = None,
        kappa: float = 1.0,
        schema: str = "",
        allow_empty: bool = False,
    ) -> Context:
        """Make a context of masks.

        Parameters
        ----------
        masks : ``(k, t, r)``
        ids : instance of each; None numbers them
        annotators : of each; None is one without a name
        kappa, schema : as of the context
        allow_empty : accept a mask that leaves nothing to attend to

        Raises
        ------
        InputError
            As :meth:`add`.
        """
        found = torch.as_tensor(masks)
        if found.ndim != 3:
            raise InputError(f"masks have shape {tuple(found.shape)}: expected (K, T, r)")
        context = cls(found.shape[1], found.shape[2], kappa=kappa, schema=schema)
        context.add(found, ids=ids, annotators=annotators, allow_empty=allow_empty)
        context.forget_past()
        return context

    def __len__(self) -> int:
        """Return the number of masks."""
        return len(self._masks)

    @property
    def keys(self) -> tuple[tuple[str, str], ...]:
        """Instance and annotator of each mask, in their order."""
        return tuple(self._masks)

    @property
    def masks(self) -> Int8[Tensor, "k t r"]:
        """All masks, ``(k, t, r)``; one of -1 when there is none, for that is what no annotation means."""
        if not self._masks:
            return torch.full((1, self.steps, self.features), -1, dtype=torch.int8)
        return torch.stack(list(self._masks.values()))

    @property
    def preference(self) -> Float[Tensor, "t r"]:
        """Preference for attending to each cell, see :func:`preference`."""
        return preference(self.one, self.zero, self.kappa)

    @property
    def depth(self) -> int:
        """How many changes can be undone."""
        return len(self._past)

    @property
    def digest(self) -> str:
        """Hash of masks, whatever their order, and of the schema."""
        found = hashlib.sha256(f"{self.schema}:{self.steps}:{self.features}".encode())
        for mask in sorted(mask.numpy().tobytes() for mask in self._masks.values()):
            found.update(mask)
        return found.hexdigest()[:16]

    def copy(self) -> Context:
        """Return a context of the same masks, without the past."""
        other = Context(self.steps, self.features, kappa=self.kappa, schema=self.schema)
        with torch.inference_mode(False):
            other.one, other.zero = self.one.clone(), self.zero.clone()
            other._masks = {key: mask.clone() for key, mask in self._masks.items()}
        return other

    def add(
        self,
        masks: Tensor | np.ndarray,
        *,
        ids: Sequence[str] | None = None,
        annotators: Sequence[str] | None = None,
        allow_empty: bool = False,
    ) -> Shift:
        """Add masks; where an instance and annotator have one, what is seen in the new one replaces the old.

        Parameters
        ----------
        masks : ``(k, t, r)``
        ids : instance of each; None names them by their place in the context
        annotators : of each; None is one without a name
        allow_empty : accept a mask that leaves nothing to attend to

        Raises
        ------
        InputError
            For another shape, another verdict, a mask of zeros only, or as many names as there are no masks.
        """
        found = check_masks(masks, self.steps, self.features)
        names = [f"#{len(self) + k}" for k in range(len(found))] if ids is None else list(ids)
        people = [""] * len(found) if annotators is None else list(annotators)
        if len(names) != len(found) or len(people) != len(found):
            raise InputError(f"{len(found)} masks, {len(names)} ids and {len(people)} annotators: give one each")
        keys = list(zip(names, people, strict=True))
        if len(set(keys)) == len(keys) and self._masks.keys().isdisjoint(keys):
            return self._append(keys, found, allow_empty)
        parts = []
        for key, mask in zip(keys, found, strict=True):
            at = (mask >= 0).nonzero()
            parts.append((key, at, mask[at[:, 0], at[:, 1]]))
        return self._change(parts, allow_empty)

    def mark(
        self,
        instance: str,
        cells: Sequence[tuple[int, int, int]] | Int[Tensor, "m 3"],
        *,
        annotator: str = "",
        allow_empty: bool = False,
    ) -> Shift:
        """Give verdicts on cells of an instance; -1 takes a verdict back.

        Parameters
        ----------
        instance : its id
        cells : step, feature, verdict of each; the last one of a cell counts
        annotator : who
        allow_empty : accept that nothing is left to attend to

        Raises
        ------
        InputError
            For a cell that is not there, another verdict, or an instance of which every cell is marked 0.
        """
        found = torch.as_tensor(cells, dtype=torch.int64).reshape(-1, 3)
        for t, d, verdict in found.tolist():
            if not (0 <= t < self.steps and 0 <= d < self.features):
                raise InputError(
                    f"instance '{instance}': cell (step {t}, feature {d}) is not within {self.steps} steps and"
                    f" {self.features} features"
                )
            if verdict not in {-1, 0, 1}:
                raise InputError(f"instance '{instance}': verdict {verdict} must be 1 (attend), 0 (not attend) or -1")
        # The last verdict on a cell counts, so that one cell is written once and undone once.
        last = {(t, d): verdict for t, d, verdict in found.tolist()}
        at = torch.tensor(list(last), dtype=torch.int64).reshape(-1, 2)
        return self._change(
            [((instance, annotator), at, torch.tensor(list(last.values()), dtype=torch.int8))], allow_empty
        )

    def undo(self) -> Shift:
        """Take the last change back; counts are what they were, to the bit.

        Raises
        ------
        InputError
            When there is nothing to undo.
        """
        if not self._past:
            raise InputError("there is nothing to undo")
        keys, moved, verdicts = [], torch.zeros(self.steps, self.features, dtype=torch.bool), 0
        for key, is_new, at, before in reversed(self._past.pop()):
            if is_new:
                mask = self._masks.pop(key)
                self.one -= (mask == 1).float()
                self.zero -= (mask == 0).float()
                seen = mask >= 0
                moved |= seen
                verdicts += int(seen.sum())
            else:
                verdicts += self._put(key, at, before, moved)
            keys.append(key)
        return self._shift(keys[::-1], moved, verdicts)

    def forget_past(self) -> None:
        """Let go of what undoing needs."""
        self._past.clear()

    def _append(self, keys: Sequence[tuple[str, str]], masks: Int8[Tensor, "k t r"], allow_empty: bool) -> Shift:
        empty = (masks == 0).flatten(1).all(1)
        if not allow_empty and bool(empty.any()):
            raise _nothing_left(keys[int(empty.nonzero()[0])])
        with torch.inference_mode(False):
            own = masks.clone()
        self._masks.update(zip(keys, own, strict=True))
        one, zero = counts(own)
        self.one += one
        self.zero += zero
        seen = own >= 0
        self._past.append([(key, True, _NOWHERE, _NOTHING) for key in keys])
        return self._shift(keys, seen.any(0), int(seen.sum()))

    def _change(self, parts: Sequence[tuple[tuple[str, str], Tensor, Tensor]], allow_empty: bool) -> Shift:
        past: list[tuple[tuple[str, str], bool, Tensor, Tensor]] = []
        moved, verdicts = torch.zeros(self.steps, self.features, dtype=torch.bool), 0
        self._past.append(past)
        for key, at, verdict in parts:
            is_new = key not in self._masks
            if is_new:
                with torch.inference_mode(False):
                    self._masks[key] = torch.full((self.steps, self.features), -1, dtype=torch.int8)
            mask = self._masks[key]
            past.append((key, is_new, at, mask[at[:, 0], at[:, 1]]))
            verdicts += self._put(key, at, verdict, moved)
            if not allow_empty and not mask.any():
                self.undo()
                raise _nothing_left(key)
        return self._shift([key for key, _, _ in parts], moved, verdicts)

    def _put(
        self,
        key: tuple[str, str],
        at: Int64[Tensor, "m 2"],
        verdict: Int8[Tensor, " m"],
        moved: Bool[Tensor, "t r"],
    ) -> int:
        mask, t, d = self._masks[key], at[:, 0], at[:, 1]
        before = mask[t, d]
        self.one[t, d] += (verdict == 1).float() - (before == 1).float()
        self.zero[t, d] += (verdict == 0).float() - (before == 0).float()
        mask[t, d] = verdict
        changed = before != verdict
        moved[t, d] |= changed
        return int(changed.sum())

    @staticmethod
    def _shift(keys: Sequence[tuple[str, str]], moved: Tensor, verdicts: int) -> Shift:
        return Shift(tuple(keys), tuple((int(t), int(d)) for t, d in moved.nonzero().tolist()), verdicts)
