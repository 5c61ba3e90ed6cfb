"""What annotators said: masks of verdicts, their counts per cell, and the way back.

A mask is int8 ``(T, r)``: 1 attend, 0 do not attend, -1 not known or not seen. A context is an ordered set of masks,
one for an instance and annotator. All that the deterministic path of the attention process reads of it is how often a
cell was marked 1 and 0, so that new verdicts cost what they touch and no more (spec 2.6 and 9).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int, Int8, Int64
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


Key: TypeAlias = tuple[str, str]
"""Instance and annotator."""


@dataclass(frozen=True)
class Shift:
    """What a change of the context did.

    Parameters
    ----------
    keys : instance and annotator of each mask that changed
    cells : cells whose verdicts changed, ``(t, d)``, sorted
    verdicts : cells of masks that changed
    """

    keys: tuple[Key, ...]
    cells: tuple[tuple[int, int], ...]
    verdicts: int


@dataclass(frozen=True, eq=False)
class _Change:
    """What undoing needs: where something was written, what was there, and which masks there were."""

    keys: tuple[Key, ...]
    rows: Int64[np.ndarray, " m"]
    cells: Int64[np.ndarray, " m"]
    before: Int8[np.ndarray, " m"]
    order: dict[Key, int]


class Context:
    """Masks by instance and annotator, with counts kept up to date at the cost of the cells that change.

    A mask without a verdict is none: it says no more than an instance that nobody has seen.

    Parameters
    ----------
    steps, features : of the model
    kappa : prior count of :func:`preference`
    schema : of the series annotated, see :attr:`ial_nap.Series.schema`; "" when not known
    lengths : real steps of instances by id, for series that are ragged; one that is not there has all steps

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

    def __init__(
        self,
        steps: int,
        features: int,
        *,
        kappa: float = 1.0,
        schema: str = "",
        lengths: Mapping[str, int] | None = None,
    ) -> None:
        if steps < 1 or features < 1:
            raise InputError(f"a context needs steps and features, got {steps} and {features}")
        self.steps, self.features, self.kappa, self.schema = steps, features, kappa, schema
        self.lengths = dict(lengths or {})
        size = steps * features
        # Rows are masks; which row is whose, and in which order they came, is in `_rows`.
        self._store = np.full((0, size), -1, np.int8)
        self._used = np.zeros(0, np.bool_)
        self._rows: dict[Key, int] = {}
        self._one, self._zero = np.zeros(size, np.float32), np.zeros(size, np.float32)
        self._past: list[_Change] = []

    @classmethod
    def of(
        cls,
        masks: Tensor | np.ndarray,
        *,
        ids: Sequence[str] | None = None,
        annotators: Sequence[str] | None = None,
        kappa: float = 1.0,
        schema: str = "",
        lengths: Mapping[str, int] | None = None,
        allow_empty: bool = False,
    ) -> Context:
        """Make a context of masks.

        Parameters
        ----------
        masks : ``(k, t, r)``
        ids : instance of each; None numbers them
        annotators : of each; None is one without a name
        kappa, schema, lengths : as of the context
        allow_empty : accept a mask that leaves nothing to attend to

        Raises
        ------
        InputError
            As :meth:`add`.
        """
        found = torch.as_tensor(masks)
        if found.ndim != 3:
            raise InputError(f"masks have shape {tuple(found.shape)}: expected (K, T, r)")
        context = cls(found.shape[1], found.shape[2], kappa=kappa, schema=schema, lengths=lengths)
        context.add(found, ids=ids, annotators=annotators, allow_empty=allow_empty)
        context.forget_past()
        return context

    def __len__(self) -> int:
        """Return the number of masks."""
        return len(self._rows)

    @property
    def keys(self) -> tuple[Key, ...]:
        """Instance and annotator of each mask, in their order."""
        return tuple(self._rows)

    @property
    def masks(self) -> Int8[Tensor, "k t r"]:
        """All masks, ``(k, t, r)``; one of -1 when there is none, for that is what no annotation means."""
        if not self._rows:
            return torch.full((1, self.steps, self.features), -1, dtype=torch.int8)
        rows = self._store[np.fromiter(self._rows.values(), np.int64, len(self._rows))]
        return torch.from_numpy(rows.reshape(-1, self.steps, self.features))

    @property
    def one(self) -> Float[Tensor, "t r"]:
        """How many masks say 1 of each cell."""
        return torch.from_numpy(self._one.reshape(self.steps, self.features).copy())

    @property
    def zero(self) -> Float[Tensor, "t r"]:
        """How many masks say 0 of each cell."""
        return torch.from_numpy(self._zero.reshape(self.steps, self.features).copy())

    @property
    def preference(self) -> Float[Tensor, "t r"]:
        """Preference for attending to each cell, see :func:`preference`."""
        return preference(self.one, self.zero, self.kappa)

    @property
    def verdicts(self) -> int:
        """How many verdicts stand, 1 and 0."""
        return int(self._one.sum() + self._zero.sum())

    @property
    def depth(self) -> int:
        """How many changes can be undone."""
        return len(self._past)

    @property
    def digest(self) -> str:
        """Hash of masks, whatever their order, and of the schema."""
        found = hashlib.sha256(f"{self.schema}:{self.steps}:{self.features}".encode())
        for mask in sorted(self._store[row].tobytes() for row in self._rows.values()):
            found.update(mask)
        return found.hexdigest()[:16]

    def copy(self) -> Context:
        """Return a context of the same masks, without the past."""
        other = Context(self.steps, self.features, kappa=self.kappa, schema=self.schema, lengths=self.lengths)
        other._store, other._used, other._rows = self._store.copy(), self._used.copy(), dict(self._rows)
        other._one, other._zero = self._one.copy(), self._zero.copy()
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
            For another shape, another verdict, a mask that is 0 at all real steps, or as many names as there are no
            masks.
        """
        found = check_masks(masks, self.steps, self.features).cpu().numpy()
        names = self.new_names(len(found)) if ids is None else list(ids)
        people = [""] * len(found) if annotators is None else list(annotators)
        if len(names) != len(found) or len(people) != len(found):
            raise InputError(f"{len(found)} masks, {len(names)} ids and {len(people)} annotators: give one each")
        flat = found.reshape(len(found), self.steps * self.features)
        which, cells = (flat >= 0).nonzero()
        return self._change(list(zip(names, people, strict=True)), which, cells, flat[which, cells], allow_empty)

    def new_names(self, count: int) -> list[str]:
        """Return names that no instance has, for masks without one.

        Parameters
        ----------
        count : how many
        """
        taken = {instance for instance, _ in self._rows}
        found: list[str] = []
        number = len(self)
        while len(found) < count:
            if f"#{number}" not in taken:
                found.append(f"#{number}")
            number += 1
        return found

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
        rows = cells.tolist() if isinstance(cells, Tensor) else cells
        return self.give([(instance, annotator, t, d, v) for t, d, v in rows], allow_empty=allow_empty)

    def give(
        self,
        verdicts: Sequence[tuple[str, str, int, int, int]],
        *,
        exactly: bool = False,
        allow_empty: bool = False,
    ) -> Shift:
        """Give verdicts on cells of several instances at once: one change, to be undone as one.

        Parameters
        ----------
        verdicts : instance, annotator, step, feature, verdict of each; the last one of a cell counts
        exactly : take back whatever is not among them, so that they are the whole context
        allow_empty : accept that nothing of an instance is left to attend to

        Raises
        ------
        InputError
            For a cell that is not there, another verdict, or an instance of which every cell at its real steps is
            marked 0; nothing changes then.

        Examples
        --------
        >>> context = Context(2, 2)
        >>> context.give([("p", "ann", 0, 1, 0), ("q", "ann", 1, 1, 1)]).verdicts
        2
        >>> context.give([("q", "ann", 1, 1, 1)], exactly=True).keys, len(context)
        ((('p', 'ann'),), 1)
        """
        places: dict[Key, int] = {}
        which = np.array([places.setdefault(one[:2], len(places)) for one in verdicts], np.int64)
        said = np.array([one[2:] for one in verdicts], np.int64).reshape(-1, 3)
        self._check_cells(list(places), which, said)
        cells = said[:, 0] * self.features + said[:, 1]
        if exactly and self._rows:
            standing = list(self._rows)
            at, old = (self._store[list(self._rows.values())] >= 0).nonzero()
            owner = np.array([places.setdefault(key, len(places)) for key in standing], np.int64)
            which, cells = np.concatenate([owner[at], which]), np.concatenate([old, cells])
            now = np.concatenate([np.full(len(old), -1), said[:, 2]])
        else:
            now = said[:, 2]
        return self._change(list(places), which, cells, now.astype(np.int8), allow_empty)

    def _check_cells(self, keys: Sequence[Key], which: np.ndarray, said: np.ndarray) -> None:
        t, d, verdict = said.T
        wrong = (t < 0) | (t >= self.steps) | (d < 0) | (d >= self.features)
        if wrong.any():
            k = int(wrong.argmax())
            raise InputError(
                f"instance '{keys[which[k]][0]}': cell (step {t[k]}, feature {d[k]}) is not within {self.steps} steps"
                f" and {self.features} features"
            )
        wrong = (verdict < -1) | (verdict > 1)
        if wrong.any():
            k = int(wrong.argmax())
            raise InputError(
                f"instance '{keys[which[k]][0]}': verdict {verdict[k]} must be 1 (attend), 0 (not attend) or -1"
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
        done = self._past.pop()
        self._write(done.rows, done.cells, self._store[done.rows, done.cells], done.before)
        self._set_rows(done.order)
        return self._shift(done.keys, done.cells)

    def forget_past(self) -> None:
        """Let go of what undoing needs."""
        self._past.clear()

    def _change(
        self, given: Sequence[Key], which: np.ndarray, cells: np.ndarray, verdicts: np.ndarray, allow_empty: bool
    ) -> Shift:
        """Write verdicts on cells of the masks of some keys: `which` key, which cell, what."""
        order = dict(self._rows)
        rows = self._places(given)[which]
        place = rows * self._store.shape[1] + cells
        # The last verdict on a cell counts, so that one cell is written once and undone once.
        last = len(place) - 1 - np.unique(place[::-1], return_index=True)[1]
        before = self._store[rows[last], cells[last]]
        last, before = last[before != verdicts[last]], before[before != verdicts[last]]
        rows, cells, verdicts = rows[last], cells[last], verdicts[last]
        self._write(rows, cells, before, verdicts)
        touched = np.unique(rows)
        now = self._store[touched]
        if not allow_empty and len(touched):
            self._refuse_nothing_left(touched, now, order, _Change((), rows, cells, before, order))
        changed = set(touched.tolist())
        keys = tuple(key for key, row in self._rows.items() if row in changed)
        silent = set(touched[(now < 0).all(1)].tolist()) | {row for key, row in self._rows.items() if key not in order}
        silent -= set(touched[(now >= 0).any(1)].tolist())
        if silent:
            self._set_rows({key: row for key, row in self._rows.items() if row not in silent})
        self._past.append(_Change(keys, rows, cells, before, order))
        return self._shift(keys, cells)

    def _refuse_nothing_left(self, rows: np.ndarray, now: np.ndarray, order: dict[Key, int], done: _Change) -> None:
        shut = (now == 0).reshape(-1, self.steps, self.features).all(2)
        # Most masks leave something at the first step, and need no look at lengths.
        doubtful = shut[:, 0].nonzero()[0]
        if not len(doubtful):
            return
        owner = {row: key for key, row in self._rows.items()}
        for k in doubtful.tolist():
            key = owner[int(rows[k])]
            length = self.lengths.get(key[0], self.steps)
            if shut[k, :length].all():
                self._write(done.rows, done.cells, self._store[done.rows, done.cells], done.before)
                self._set_rows(order)
                raise InputError(
                    f"instance '{key[0]}': every cell is marked 0, nothing would be left to attend to; leave one, or"
                    " give allow_empty=True"
                )

    def _places(self, keys: Sequence[Key]) -> Int64[np.ndarray, " k"]:
        """Return the row of each key's mask, a new one of -1 where it has none."""
        new = list(dict.fromkeys(key for key in keys if key not in self._rows))
        free = np.flatnonzero(~self._used)
        if len(new) > len(free):
            grown = max(16, len(self._used), len(new))
            self._store = np.concatenate([self._store, np.full((grown, self._store.shape[1]), -1, np.int8)])
            self._used = np.concatenate([self._used, np.zeros(grown, np.bool_)])
            free = np.flatnonzero(~self._used)
        self._rows.update(zip(new, free.tolist(), strict=False))
        self._used[free[: len(new)]] = True
        return np.array([self._rows[key] for key in keys], np.int64)

    def _set_rows(self, rows: dict[Key, int]) -> None:
        self._rows = dict(rows)
        self._used[:] = False
        self._used[list(rows.values())] = True

    def _write(self, rows: np.ndarray, cells: np.ndarray, before: np.ndarray, after: np.ndarray) -> None:
        size = len(self._one)
        for verdict, count in ((1, self._one), (0, self._zero)):
            count += np.bincount(cells[after == verdict], minlength=size)
            count -= np.bincount(cells[before == verdict], minlength=size)
        self._store[rows, cells] = after

    def _shift(self, keys: tuple[Key, ...], cells: np.ndarray) -> Shift:
        moved = np.unique(cells).tolist()
        return Shift(keys, tuple(divmod(cell, self.features) for cell in moved), len(cells))
