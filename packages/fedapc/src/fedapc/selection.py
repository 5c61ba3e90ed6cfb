"""What is sent and to whom: rows of the base upwards, their mean, and adaptive parts of others downwards (spec 2.5)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fedapc.choices import Score, sampled_parts
from fedapc.seeds import generator
from shared_core.errors import InputError

__all__ = ["KnowledgeBase", "Score", "aggregate", "rows_to_send", "top_rows"]

_Key = tuple[str, int]


def top_rows(scores: Float[Tensor, " rows"], fraction: float) -> Bool[Tensor, " rows"]:
    """Mark exactly ``max(1, round(fraction * rows))`` rows of the highest scores; of equal ones the first.

    Raises
    ------
    InputError
        For a fraction outside ``(0, 1]``.

    Examples
    --------
    >>> top_rows(torch.tensor([1.0, 3.0, 3.0, 2.0]), 0.25).tolist()
    [False, True, False, False]
    """
    if not 0 < fraction <= 1:
        raise InputError(f"upload_fraction: {fraction}, expected more than 0 and at most 1")
    count = max(1, round(fraction * len(scores)))
    order = torch.sort(scores, descending=True, stable=True).indices
    chosen = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    chosen[order[:count]] = True
    return chosen


def rows_to_send(
    base: Float[Tensor, "rows ..."],
    mask: Float[Tensor, " rows"] | None,
    fraction: float,
    score: Score = "gated-norm",
) -> Bool[Tensor, " rows"]:
    """Choose the rows of a layer's base that a client uploads.

    Parameters
    ----------
    base : the local base
    mask : raw logits of the task's mask, none if the mask is open
    fraction : share of the rows to send
    score : ``gated-norm``, the gate times the row's norm; ``abs-raw-mask``, as the authors' code has it, which ranks
        a channel that is strongly closed first
    """
    if score == "abs-raw-mask" and mask is not None:
        return top_rows(mask.detach().abs(), fraction)
    norms = base.detach().flatten(1).norm(dim=1)
    return top_rows(norms if mask is None else mask.detach().sigmoid() * norms, fraction)


def aggregate(
    previous: Float[Tensor, "rows ..."],
    uploads: Iterable[tuple[Bool[Tensor, " rows"], Float[Tensor, "_ ..."]]],
) -> tuple[Float[Tensor, "rows ..."], Bool[Tensor, " rows"]]:
    """Average every row over the clients that sent it, in float64 and in the order given.

    Parameters
    ----------
    previous : what rows that nobody sent keep
    uploads : of each client, which rows, and these; sort them by client for a result that no arrival order changes

    Returns
    -------
    The new base, and which of its rows somebody sent.
    """
    total = torch.zeros_like(previous, dtype=torch.float64)
    count = torch.zeros(len(previous), dtype=torch.float64, device=previous.device)
    for rows, values in uploads:
        total[rows] += values.double()
        count += rows
    sent = count > 0
    merged = previous.clone()
    merged[sent] = (total[sent] / count[sent].view(-1, *[1] * (previous.ndim - 1))).to(previous.dtype)
    return merged, sent


class KnowledgeBase:
    """Adaptive parts that clients have sent, as the bytes they came in, and who gets which.

    Parameters
    ----------
    policy : ``last``, the newest part of every other client; ``last+self``, of the receiver too, as the authors' code
        has it; ``all``; ``sample:K``, so many of all, drawn without replacement; ``none``. A part is offered only to
        tasks later than its own, and, but for ``last+self``, to other clients.
    seed : of the draws

    Raises
    ------
    InputError
        For another policy.

    Examples
    --------
    >>> stored = KnowledgeBase("last")
    >>> for client, task in (("a", 0), ("b", 0), ("b", 1)): stored.add(client, task, (b"part",))
    >>> stored.choose("a", 1), stored.choose("a", 2), stored.choose("b", 1)
    ([('b', 0)], [('b', 1)], [('a', 0)])
    """

    def __init__(self, policy: str = "last", seed: int = 0) -> None:
        self._sample = sampled_parts(policy)
        self.policy = policy
        self._seed = seed
        self._parts: dict[_Key, tuple[bytes, ...]] = {}

    def __len__(self) -> int:
        """Return the number of parts."""
        return len(self._parts)

    def __contains__(self, key: _Key) -> bool:
        """Tell whether a client's part of a task is here."""
        return key in self._parts

    def __iter__(self) -> Iterator[_Key]:
        """Clients and tasks, in their order."""
        return iter(sorted(self._parts))

    def __getitem__(self, key: _Key) -> tuple[bytes, ...]:
        """Return the tensors of a part."""
        return self._parts[key]

    def add(self, client: str, task: int, tensors: tuple[bytes, ...]) -> None:
        """Store a part; one that is here already stays, as it may have been sent to somebody."""
        self._parts.setdefault((client, task), tensors)

    def choose(self, receiver: str, task: int) -> list[_Key]:
        """Clients and tasks whose parts `receiver` gets for its `task`, in their order."""
        if self.policy == "none":
            return []
        earlier = [key for key in self if key[1] < task and (key[0] != receiver or self.policy == "last+self")]
        if self.policy == "all":
            return earlier
        if self._sample is not None:
            random = generator(self._seed, "knowledge", receiver, task)
            drawn = torch.randperm(len(earlier), generator=random)[: self._sample]
            return [earlier[i] for i in sorted(drawn.tolist())]
        newest: Mapping[str, _Key] = {key[0]: key for key in earlier}
        return list(newest.values())
