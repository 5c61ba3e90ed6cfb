"""Envelopes: what goes in comes out, and nothing else does."""

from __future__ import annotations

import dataclasses
import struct
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedapc.errors import WireError
from fedapc.messages import Message, Section, pack, unpack

names = st.text("aZ9-_ /é中\0", min_size=1, max_size=12)
numbers = st.integers(0, 2**32 - 1)
sections = st.tuples(
    st.sampled_from(["base", "adaptive", "knowledge"]),
    names,
    numbers,
    st.lists(st.binary(max_size=20), max_size=4).map(tuple),
)
made = st.tuples(
    st.sampled_from(["request", "update"]),
    names,
    numbers,
    numbers,
    numbers,
    numbers,
    st.lists(numbers, max_size=4).map(tuple),
    st.lists(sections, max_size=4).map(tuple),
)

EXAMPLE = Message(
    "update",
    "siteA",
    3,
    1,
    99,
    20,
    (0, 1),
    (Section("base", "siteA", 1, (b"abc", b"")), Section("adaptive", "é", 0, ())),
)


@settings(deadline=None)
@given(made)
def test_messages_come_back(fields):
    message = Message(*fields[:-1], sections=tuple(Section(*section) for section in fields[-1]))
    blob = pack(message)
    assert unpack(blob) == message
    assert pack(unpack(blob)) == blob


def test_every_flipped_bit_before_the_tensors_and_every_other_length_is_refused():
    blob = pack(EXAMPLE)
    for place in range(len(blob) - 3):
        for bit in range(8):
            changed = bytearray(blob)
            changed[place] ^= 1 << bit
            with pytest.raises(WireError):
                unpack(bytes(changed))
    for end in range(len(blob)):
        with pytest.raises(WireError):
            unpack(blob[:end])
    with pytest.raises(WireError, match="too many"):
        unpack(blob + b"\0")
    with pytest.raises(WireError, match="at most 10"):
        unpack(blob, limit=10)


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_resealed_mutations_are_messages_or_are_refused(data):
    raw = bytearray(pack(EXAMPLE))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw
    if len(raw) >= 40:
        length = struct.unpack_from("<I", raw, 32 - 4)[0]
        raw[32:36] = struct.pack("<I", zlib.crc32(raw[36 : 36 + length], zlib.crc32(raw[:32])))
    try:
        found = unpack(bytes(raw))
    except WireError:
        return
    assert pack(found) == bytes(raw)


@pytest.mark.parametrize(
    "changes",
    [{"client": ""}, {"client": "x" * 65}, {"client": "\ud800"}, {"round": -1}, {"task": 2**32}, {"examples": 2**32}],
)
def test_what_does_not_fit_is_refused(changes):
    with pytest.raises(WireError):
        pack(dataclasses.replace(EXAMPLE, **changes))
