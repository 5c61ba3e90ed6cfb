"""Every byte that was sent, and everything that went wrong on the way."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, cast, get_args

from shared_core.errors import InputError, no_such

__all__ = ["Amount", "Direction", "Entry", "Event", "Kind", "Ledger"]

Direction = Literal["up", "down"]
Kind = Literal["base", "adaptive", "knowledge", "control"]
Event = Literal[
    "", "no_answer", "late", "duplicate", "corrupt", "non_finite", "mismatch", "misplaced", "unknown_client", "failed"
]
Amount = Literal["values", "payload_bytes", "encoded_bytes", "wire_bytes", "messages"]
_AMOUNTS: tuple[Amount, ...] = get_args(Amount)


@dataclass(frozen=True)
class Entry:
    """A part of a message, or an event.

    Parameters
    ----------
    round, client, task : of the message; the task is -1 where it is unknown
    direction : ``up`` to the server, ``down`` from it
    kind : what the part holds; ``control`` is the envelope, or a whole message that was refused
    values : numbers sent
    payload_bytes : of these numbers alone, which is what the paper counts
    encoded_bytes : of all bytes of the part; those of the parts of a message add up to its length
    wire_bytes : what a transport says it sent for it. Default: the encoded bytes
    messages : 1 in one entry of each message, the one of its envelope
    event : what went wrong, nothing if the part was used
    note : on the event
    """

    round: int
    client: str
    task: int
    direction: Direction
    kind: Kind
    values: int = 0
    payload_bytes: int = 0
    encoded_bytes: int = 0
    wire_bytes: int = -1
    messages: int = 0
    event: Event = ""
    note: str = ""

    def __post_init__(self) -> None:
        if self.wire_bytes < 0:
            object.__setattr__(self, "wire_bytes", self.encoded_bytes)


class Ledger:
    """A log that only grows.

    Parameters
    ----------
    entries : to begin with

    Examples
    --------
    >>> ledger = Ledger()
    >>> ledger.add(Entry(0, "a", 0, "up", "base", values=10, payload_bytes=40, encoded_bytes=63))
    >>> ledger.add(Entry(0, "a", 0, "up", "control", encoded_bytes=50, messages=1))
    >>> ledger.total("encoded_bytes"), ledger.sums("kind"), ledger.total("values", direction="down")
    (113, {('base',): 63, ('control',): 50}, 0)
    """

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self._entries = list(entries)

    def __len__(self) -> int:
        """Return the number of entries."""
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        """Entries in the order they were added."""
        return iter(self._entries)

    def __eq__(self, other: object) -> bool:
        """Tell whether another ledger has the same entries."""
        return isinstance(other, Ledger) and self._entries == other._entries

    def add(self, entry: Entry) -> None:
        """Append an entry."""
        self._entries.append(entry)

    def carried(self, extra: int) -> None:
        """Write down what a transport adds to the last message.

        Parameters
        ----------
        extra : bytes, besides those of the message

        Examples
        --------
        >>> ledger = Ledger([Entry(0, "a", 0, "up", "control", encoded_bytes=50, messages=1)])
        >>> ledger.carried(11)
        >>> ledger.total("encoded_bytes"), ledger.total("wire_bytes")
        (50, 61)
        """
        last = next(place for place in reversed(range(len(self))) if self._entries[place].messages)
        self._entries[last] = replace(self._entries[last], wire_bytes=self._entries[last].wire_bytes + extra)

    def total(self, amount: Amount = "encoded_bytes", **where: object) -> int:
        """Sum an amount over the entries whose fields have the values given."""
        return self.sums(amount=amount, **where).get((), 0)

    def sums(self, *by: str, amount: Amount = "encoded_bytes", **where: object) -> dict[tuple[object, ...], int]:
        """Sum an amount over the entries whose fields have the values given, for each value of the fields `by`.

        Raises
        ------
        InputError
            For a field there is none of.
        """
        names = {field.name for field in fields(Entry)}
        unknown = ({*by, *where} - names) or ({amount} - set(_AMOUNTS))
        if unknown:
            raise no_such("field", min(unknown), sorted(names), where="ledger")
        found: dict[tuple[object, ...], int] = {}
        for entry in self._entries:
            if all(getattr(entry, name) == value for name, value in where.items()):
                key = tuple(getattr(entry, name) for name in by)
                found[key] = found.get(key, 0) + getattr(entry, amount)
        return found

    def events(self) -> list[Entry]:
        """Entries of what went wrong."""
        return [entry for entry in self._entries if entry.event]

    def ordered(self) -> Ledger:
        """Return the ledger by round, client and direction, down first: the same whatever order messages came in."""
        return Ledger(sorted(self._entries, key=lambda entry: (entry.round, entry.client, entry.direction)))

    def to_jsonl(self) -> str:
        """Write a line of JSON an entry."""
        return "".join(json.dumps(asdict(entry)) + "\n" for entry in self._entries)

    @classmethod
    def from_jsonl(cls, text: str) -> Ledger:
        """Read what `to_jsonl` wrote.

        Raises
        ------
        InputError
            For a line that is no entry.
        """
        return cls(_entry(line, number) for number, line in enumerate(text.split("\n"), 1) if line.strip())


_CHECKS: dict[str, Callable[[Any], bool]] = {
    "str": lambda value: isinstance(value, str),
    "int": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "Direction": lambda value: value in get_args(Direction),
    "Kind": lambda value: value in get_args(Kind),
    "Event": lambda value: value in get_args(Event),
}


def _entry(line: str, number: int) -> Entry:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"ledger line {number}: no JSON: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"ledger line {number}: expected an object of the fields of an entry")
    row = cast("dict[str, Any]", found)
    expected = {field.name: str(field.type) for field in fields(Entry)}
    if row.keys() != expected.keys():
        odd = sorted(row.keys() ^ expected.keys())[0]
        raise InputError(f"ledger line {number}: field '{odd}' is missing or unknown")
    for name, kind in expected.items():
        if not _CHECKS[kind](row[name]):
            raise InputError(f"ledger line {number}: {name} is {row[name]!r}, expected {kind}")
    return Entry(**row)
