"""What a server and a client say to each other: one blob a message, tensors of `fedapc.wire` in a checked envelope.

An envelope is a fixed head, a table and the tensors. The table names the client, the tasks whose adaptive parts are
asked for, and for every section its kind, the client and task it is of, and the bytes of each of its tensors, which
are those of the layers in their order. The head holds the length and the CRC-32 of all before the tensors, each of
which has a checksum of its own; lengths must add up to the message.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field
from typing import Literal

from fedapc.errors import WireError

__all__ = ["MOST_NAME", "Message", "Section", "SectionKind", "pack", "unpack"]

MessageKind = Literal["request", "update"]
SectionKind = Literal["base", "adaptive", "knowledge"]

MOST_NAME = 64
_MESSAGES: tuple[MessageKind, ...] = ("request", "update")
_SECTIONS: tuple[SectionKind, ...] = ("base", "adaptive", "knowledge")
_MAGIC = b"FAPM"
_VERSION = 1
_HEAD = struct.Struct("<4sBBBBIIIIHHII")
_SECTION = struct.Struct("<BBII")
_MOST_SECTIONS = 2**16 - 1


@dataclass(frozen=True)
class Section:
    """Tensors of all layers, in the order of the layers.

    Parameters
    ----------
    kind : ``base``, the client's own ``adaptive`` part, or ``knowledge`` of another client
    client : whose
    task : of which of its tasks
    tensors : a blob of `fedapc.wire` a layer
    """

    kind: SectionKind
    client: str
    task: int
    tensors: tuple[bytes, ...]

    @property
    def size(self) -> int:
        """Bytes of the tensors."""
        return sum(map(len, self.tensors))


@dataclass(frozen=True)
class Message:
    """A server's request of a round of training, or a client's answer.

    Parameters
    ----------
    kind : ``request`` or ``update``
    client : that is asked, or answers
    round : from 0 on
    task : index of the client's task, from 0 on
    layout : number of the architecture, see `Layout.fingerprint`
    examples : the client trains on; 0 in a request
    wanted : tasks whose adaptive parts the server asks for
    sections : tensors
    """

    kind: MessageKind
    client: str
    round: int
    task: int
    layout: int
    examples: int = 0
    wanted: tuple[int, ...] = ()
    sections: tuple[Section, ...] = field(default=(), repr=False)

    def of_kind(self, kind: SectionKind) -> list[Section]:
        """Sections of one kind."""
        return [section for section in self.sections if section.kind == kind]


def pack(message: Message) -> bytes:
    """Write a message.

    Raises
    ------
    WireError
        For names of more than 64 bytes, numbers that are negative or too large, too many sections.
    """
    client = _name_bytes(message.client)
    if len(message.sections) > _MOST_SECTIONS or len(message.wanted) > _MOST_SECTIONS:
        raise WireError(f"{len(message.sections)} sections, at most {_MOST_SECTIONS} fit in a message")
    try:
        table = [client, struct.pack(f"<{len(message.wanted)}I", *message.wanted)]
        for section in message.sections:
            name = _name_bytes(section.client)
            lengths = tuple(map(len, section.tensors))
            table += [
                _SECTION.pack(_SECTIONS.index(section.kind), len(name), section.task, len(lengths)),
                name,
                struct.pack(f"<{len(lengths)}I", *lengths),
            ]
        body = b"".join(table)
        head = _HEAD.pack(
            _MAGIC,
            _VERSION,
            _MESSAGES.index(message.kind),
            len(client),
            0,
            message.round,
            message.task,
            message.layout,
            message.examples,
            len(message.wanted),
            len(message.sections),
            len(body),
            0,
        )[:-4]
    except struct.error as error:
        raise WireError(f"a number does not fit in a message: {error}") from error
    checksum = struct.pack("<I", zlib.crc32(body, zlib.crc32(head)))
    return b"".join((head, checksum, body, *(blob for section in message.sections for blob in section.tensors)))


def unpack(blob: bytes, limit: int = 2**31) -> Message:
    """Read a message; its tensors stay as they are, for `fedapc.wire.decode`.

    Parameters
    ----------
    blob : one message, and nothing after it
    limit : refuse more bytes than this

    Raises
    ------
    WireError
        For everything that is wrong with it.
    """
    if len(blob) > limit:
        raise WireError(f"a message of {len(blob)} bytes, at most {limit} are taken")
    if len(blob) < _HEAD.size:
        raise WireError(f"{len(blob)} bytes, expected at least the {_HEAD.size} of a head")
    head = _HEAD.unpack_from(blob)
    magic, version, kind, name_length, reserved, round_, task, layout, examples, wants, sections, length, checksum = (
        head
    )
    if magic != _MAGIC or version != _VERSION or reserved or kind >= len(_MESSAGES):
        raise WireError(f"starts with {bytes(blob[:8])!r}, expected FAPM, version {_VERSION} and a kind of message")
    end = _HEAD.size + length
    if end > len(blob):
        raise WireError(f"announces a table of {length} bytes, and {len(blob) - _HEAD.size} are left")
    if zlib.crc32(blob[_HEAD.size : end], zlib.crc32(blob[: _HEAD.size - 4])) != checksum:
        raise WireError("the checksum of the table does not match: the bytes were changed on the way")
    table = _Reader(blob[_HEAD.size : end])
    client = table.name(name_length)
    wanted = table.numbers(wants)
    tensors = _Reader(blob, end)
    read = tuple(_section(table, tensors) for _ in range(sections))
    if table.left or tensors.left:
        raise WireError(f"{table.left + tensors.left} bytes too many")
    return Message(_MESSAGES[kind], client, round_, task, layout, examples, wanted, read)


def _section(table: _Reader, tensors: _Reader) -> Section:
    kind, name_length, task, count = _SECTION.unpack(table.take(_SECTION.size))
    if kind >= len(_SECTIONS):
        raise WireError(f"section of kind {kind}: not of version {_VERSION}")
    name = table.name(name_length)
    return Section(_SECTIONS[kind], name, task, tuple(tensors.take(size) for size in table.numbers(count)))


class _Reader:
    """Bytes taken from the front, never more than there are."""

    def __init__(self, blob: bytes, at: int = 0) -> None:
        self._blob = blob
        self._at = at

    @property
    def left(self) -> int:
        return len(self._blob) - self._at

    def take(self, size: int) -> bytes:
        if size > self.left:
            raise WireError(f"{size} bytes are announced, and {self.left} are left")
        self._at += size
        return self._blob[self._at - size : self._at]

    def numbers(self, count: int) -> tuple[int, ...]:
        return struct.unpack(f"<{count}I", self.take(4 * count))

    def name(self, length: int) -> str:
        if not 0 < length <= MOST_NAME:
            raise WireError(f"a name of {length} bytes, expected 1 to {MOST_NAME}")
        raw = self.take(length)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise WireError(f"a name that is no UTF-8: {raw!r}") from error


def _name_bytes(name: str) -> bytes:
    try:
        raw = name.encode()
    except UnicodeEncodeError as error:
        raise WireError(f"client {name!r}: cannot be written as UTF-8") from error
    if not 0 < len(raw) <= MOST_NAME:
        raise WireError(f"client '{name}': a name has 1 to {MOST_NAME} bytes, this one {len(raw)}")
    return raw
