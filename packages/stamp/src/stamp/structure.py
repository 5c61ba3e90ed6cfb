"""What a network's channels are tied to: groups, the places in the modules that they own, and how a group is named."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["Attribute", "ChannelGroups", "Group", "GroupsError", "Slot"]


class GroupsError(ValueError):
    """Groups that contradict themselves, or a name that is no group's."""


@dataclass(frozen=True)
class Slot:
    """A run of entries of one axis of a module, owned by consecutive channels of a group.

    Channel ``start + j`` owns the entries ``offset + j * block`` up to ``offset + (j + 1) * block``, for ``j < count``.

    Parameters
    ----------
    module : qualified name of the module, or of a parameter that the forward pass uses directly
    axis : ``"in"``, ``"out"``, ``"norm"``, ``"inner"`` (the heads of an attention), ``"rows<k>"`` (the
        channels are the positions of a linear layer, axis k of its input) or ``"dim<k>"`` of a bare parameter
    offset : first entry
    block : entries of each channel, e.g. ``height * width`` after a flatten
    start : first channel
    count : channels
    """

    module: str
    axis: str
    offset: int
    block: int
    start: int
    count: int

    def __str__(self) -> str:
        """Write it as ``module.axis`` with what is not trivial about it."""
        at = f"@{self.offset}" if self.offset else ""
        return f"{self.module}.{self.axis}{at}{f' x{self.block}' if self.block > 1 else ''}"


@dataclass(frozen=True)
class Attribute:
    """A whole number of a module that counts a group's channels, e.g. the number of heads.

    Parameters
    ----------
    module : qualified name
    name : of the attribute
    unit : its value for one channel
    """

    module: str
    name: str
    unit: int


@dataclass(frozen=True)
class Group:
    """Channels that are kept or removed one by one, each in all its places at once.

    Parameters
    ----------
    name : the first module that produces it
    width : channels
    producers : output axes that compute the channels
    consumers : input axes that mix them: where a gate acts (spec 2.2)
    followers : what goes along: norms, depthwise convolutions, bare parameters
    frozen : why no channel may be removed, or None
    attributes : numbers of modules to be updated
    """

    name: str
    width: int
    producers: tuple[Slot, ...]
    consumers: tuple[Slot, ...] = ()
    followers: tuple[Slot, ...] = ()
    frozen: str | None = None
    attributes: tuple[Attribute, ...] = ()

    @property
    def slots(self) -> tuple[Slot, ...]:
        """All its places."""
        return self.producers + self.consumers + self.followers


@dataclass(frozen=True)
class ChannelGroups(Mapping[str, Group]):
    """The channel groups of a network, by name, in the order in which the network computes them.

    Printing them gives a table. `trace` makes them; for a network that it cannot follow, make them by hand.

    Parameters
    ----------
    groups : with distinct names

    Raises
    ------
    GroupsError
        For two groups of one name, or a slot beyond its group's width.
    """

    groups: Sequence[Group]
    _index: dict[str, Group] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Index the names."""
        for group in self.groups:
            if group.name in self._index:
                raise GroupsError(f"two groups are named {group.name!r}; names must be distinct")
            self._index[group.name] = group
            for slot in group.slots:
                if slot.start + slot.count > group.width:
                    raise GroupsError(
                        f"group {group.name!r} has {group.width} channels, but its place {slot} speaks of channel"
                        f" {slot.start + slot.count - 1}"
                    )

    def __getitem__(self, name: str) -> Group:
        """Return the group of that name."""
        return self._index[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over names."""
        return iter(self._index)

    def __len__(self) -> int:
        """Return the number of groups, frozen ones included."""
        return len(self.groups)

    @property
    def prunable(self) -> tuple[Group, ...]:
        """The groups that are not frozen."""
        return tuple(group for group in self.groups if group.frozen is None)

    def widths(self) -> dict[str, int]:
        """Return the width of each group that is not frozen."""
        return {group.name: group.width for group in self.prunable}

    def signature(self) -> str:
        """Return 16 hexadecimal digits of the names, widths and places; equal for equal architectures."""
        lines = [
            f"{group.name}|{group.width}|{group.frozen is None}|" + ";".join(sorted(map(repr, group.slots)))
            for group in self.groups
        ]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        """Write a table with a line a group."""
        head = ("group", "width", "producers", "consumers", "followers", "frozen")
        rows = [
            (
                *(group.name, str(group.width)),
                *map(_listed, (group.producers, group.consumers, group.followers)),
                _shortened(group.frozen or ""),
            )
            for group in self.groups
        ]
        sizes = [max(len(row[k]) for row in [head, *rows]) for k in range(len(head))]
        lines = ["  ".join(cell.ljust(size) for cell, size in zip(row, sizes, strict=True)) for row in [head, *rows]]
        lines.insert(1, "  ".join("-" * size for size in sizes))
        return "\n".join(line.rstrip() for line in lines)


def _shortened(reasons: str) -> str:
    first, *others = reasons.split("; ")
    return first + (f" (+{len(others)})" if others else "")


def _listed(slots: tuple[Slot, ...], most: int = 3) -> str:
    names = list(dict.fromkeys(map(str, slots)))
    return ", ".join(names[:most]) + (f" +{len(names) - most}" if len(names) > most else "")
