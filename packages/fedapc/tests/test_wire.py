"""The wire format, against its own description written out byte by byte, and against hostile input."""

from __future__ import annotations

import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedapc.errors import NonFiniteError, WireError
from fedapc.sparse import SparseTensor
from fedapc.wire import contents, decode, encode, encode_sparse, header_size

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float64)
ITEM = {torch.float32: 4, torch.float16: 2, torch.bfloat16: 2, torch.int8: 1, torch.float64: 8}
SHAPES = ((), (0,), (1,), (7,), (64,), (5, 0), (3, 1), (2, 2), (9, 33), (4, 3, 5, 5), (17, 260))


def bits(tensor):
    kinds = {4: torch.int32, 2: torch.int16, 1: torch.int8, 8: torch.int64}
    return tensor.contiguous().view(kinds[tensor.element_size()])


def draw(shape, dtype, seed=0):
    random = torch.Generator().manual_seed(seed)
    if dtype == torch.int8:
        return torch.randint(-128, 128, shape, generator=random, dtype=torch.int8)
    return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)


def varint(number):
    out = b""
    while number >= 128:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


def sizes(shape, keep, item):
    """Bytes of every codec that can say what is kept, by its number."""
    n, places = keep.numel(), keep.reshape(-1).nonzero().squeeze(1).tolist()
    found = {1: (n + 7) // 8, 2: sum(len(varint(b - a - 1)) for a, b in zip([-1, *places], places, strict=False))}
    if len(places) == n:
        found[0] = 0
    if shape and n and (keep.flatten(1).all(1) == keep.flatten(1).any(1)).all() if len(shape) > 1 else False:
        found[3] = (shape[0] + 7) // 8
    return {codec: size + len(places) * item for codec, size in found.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0, 1e-4, 0.01, 0.1, 0.5, 0.99, 1])
def test_every_bit_comes_back_and_the_size_is_the_least(shape, dtype, density):
    tensor = draw(shape, dtype)
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < density
    scale = 0.25 if dtype == torch.int8 else None
    blob = encode(tensor, keep=keep, scale=scale)
    found = decode(blob, shape=shape)
    expected = sizes(shape, keep, ITEM[dtype])
    assert len(blob) == header_size(len(shape)) + min(expected.values()) + (4 if scale else 0)
    codec = min(expected, key=lambda name: (expected[name], name))
    assert blob[5] == codec
    assert found.shape == shape
    assert found.scale == scale
    assert torch.equal(bits(found.values), bits(tensor[keep]))
    assert torch.equal(found.places(), keep.reshape(-1).nonzero().squeeze(1))
    whole = torch.where(keep, tensor, torch.zeros((), dtype=dtype))
    assert torch.equal(found.dense(), whole.float() * scale if scale else whole)
    assert contents([blob]) == (int(keep.sum()), int(keep.sum()) * ITEM[dtype])


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (9, 33), (20, 3, 5, 5), (100, 2)])
@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.3, 0.9, 1.0])
def test_rows_come_back_as_rows(shape, fraction):
    tensor = draw(shape, torch.float32)
    rows = torch.rand(shape[0], generator=torch.Generator().manual_seed(2)) < fraction
    blob = encode(tensor, rows=rows)
    keep = rows.view(-1, *[1] * (len(shape) - 1)).expand(shape)
    assert blob == encode(tensor, keep=keep)
    expected = sizes(shape, keep, 4)
    assert len(blob) == header_size(len(shape)) + min(expected.values())
    found_rows, values = decode(blob).by_rows()
    assert torch.equal(found_rows, rows)
    assert torch.equal(values, tensor[rows])


def test_the_bytes_are_those_of_the_description():
    tensor = torch.zeros(3, 400)
    tensor[0, 1], tensor[2, 399] = 1.5, -0.0
    keep = torch.zeros(3, 400, dtype=torch.bool)
    keep[0, 1] = keep[2, 399] = True
    head = b"FAPC" + bytes([1, 2, 0, 2]) + struct.pack("<IIQ", 3, 400, 2)
    payload = varint(1) + varint(1199 - 1 - 1) + struct.pack("<ff", 1.5, -0.0)
    assert encode(tensor, keep) == head + struct.pack("<I", zlib.crc32(head + payload)) + payload
    head = b"FAPC" + bytes([1, 3, 0, 2]) + struct.pack("<IIQ", 3, 400, 400)
    payload = b"\x02" + struct.pack("<400f", *[0.0] * 400)
    found = encode(tensor, rows=torch.tensor([False, True, False]))
    assert found == head + struct.pack("<I", zlib.crc32(head + payload)) + payload


def test_odd_numbers_arrive_with_their_bits():
    odd = torch.tensor([0x7FC00001, -0x400001, 0x7F800000, -0x80000000, 0x1], dtype=torch.int32).view(torch.float32)
    assert torch.equal(bits(decode(encode(odd)).values), bits(odd))
    keep = torch.tensor([True, False, True, True, True])
    assert torch.equal(bits(decode(encode(odd, keep)).values), bits(odd[keep]))
    with pytest.raises(NonFiniteError, match="not finite"):
        decode(encode(odd), finite=True)


def test_a_sparse_tensor_comes_back_and_is_never_larger_than_a_dense_one():
    for density in (0.0, 0.003, 0.1, 0.4, 0.96, 0.98, 1.0):
        whole = draw((30, 41), torch.float32) * (
            torch.rand(30, 41, generator=torch.Generator().manual_seed(3)) < density
        )
        part = SparseTensor.of(whole)
        blob = encode_sparse(part)
        found = decode(blob).sparse()
        assert torch.equal(found.index, part.index)
        assert torch.equal(found.values, part.values)
        assert len(blob) == min(len(encode(whole)), len(encode(whole, whole != 0)))


def test_index_overhead_is_near_the_entropy():
    random = torch.Generator().manual_seed(0)
    n = 200_000
    for density in (0.001, 0.01, 0.05, 0.1, 0.3, 0.5):
        keep = torch.rand(n, generator=random) < density
        p = float(keep.double().mean())
        entropy = -(p * np.log2(p) + (1 - p) * np.log2(1 - p)) * n / 8
        assert len(encode(torch.ones(n), keep)) - 4 * int(keep.sum()) <= 2 * entropy + header_size(1)


def resealed(blob, **changes):
    """The blob with bytes replaced at places, and a checksum that fits."""
    raw = bytearray(blob)
    for place, value in changes.items():
        raw[int(place[1:])] = value
    return sealed(raw)


def sealed(raw):
    raw = bytearray(raw)
    end = header_size(raw[7])
    if len(raw) >= end:
        raw[end - 4 : end] = struct.pack("<I", zlib.crc32(raw[end:], zlib.crc32(raw[: end - 4])))
    return bytes(raw)


EXAMPLES = [
    encode(torch.arange(12.0).view(3, 4)),
    encode(torch.arange(12.0).view(3, 4), torch.arange(12).view(3, 4) % 2 == 0),
    encode(torch.arange(900.0).view(3, 300), torch.arange(900).view(3, 300) % 200 == 7),
    encode(torch.arange(40.0).view(20, 2), rows=torch.arange(20) % 3 == 0),
    encode(torch.arange(9, dtype=torch.int8), scale=0.5),
    encode(torch.tensor(3.0, dtype=torch.bfloat16)),
    encode(torch.zeros(0)),
]


@pytest.mark.parametrize("blob", EXAMPLES)
def test_every_flipped_bit_and_every_lost_or_added_byte_is_refused(blob):
    for place in range(len(blob)):
        for bit in range(8):
            changed = bytearray(blob)
            changed[place] ^= 1 << bit
            with pytest.raises(WireError):
                decode(bytes(changed))
    for end in range(len(blob)):
        with pytest.raises(WireError):
            decode(blob[:end])
    for more in (b"\0", b"\1", blob):
        with pytest.raises(WireError):
            decode(blob + more)
        with pytest.raises(WireError):
            decode(sealed(blob + more))


def again(found):
    """The one blob of the codec that says what was decoded."""
    n = int(np.prod(found.shape, dtype=np.int64))
    keep = torch.zeros(n, dtype=torch.bool)
    keep[found.places()] = True
    tensor = torch.zeros(n, dtype=found.values.dtype)
    tensor[keep] = found.values
    return encode(tensor.view(found.shape), keep.view(found.shape), scale=found.scale)


@settings(deadline=None, max_examples=250)
@given(st.data())
def test_resealed_mutations_decode_to_something_consistent_or_are_refused(data):
    raw = bytearray(data.draw(st.sampled_from(EXAMPLES)))
    for _ in range(data.draw(st.integers(1, 4))):
        action = data.draw(st.sampled_from(["set", "cut", "add"]))
        if action == "set" and raw:
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
        elif action == "cut":
            del raw[data.draw(st.integers(0, len(raw))) :]
        else:
            raw += data.draw(st.binary(max_size=9))
    blob = sealed(raw) if len(raw) > 7 else bytes(raw)
    try:
        found = decode(blob, limit=10_000)
    except WireError:
        return
    places = found.places()
    assert len(places) == len(found.values)
    assert (places.diff() > 0).all()
    assert not len(places) or (places[0] >= 0 and places[-1] < np.prod(found.shape, dtype=np.int64))
    if found.scale is None or not np.isnan(found.scale):
        once_more = decode(again(found))
        assert torch.equal(once_more.places(), places)
        assert torch.equal(bits(once_more.values), bits(found.values))


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=120))
def test_arbitrary_bytes_are_refused(blob):
    with pytest.raises(WireError):
        decode(blob)
    with pytest.raises(WireError):
        decode(sealed(b"FAPC\1" + blob) if len(blob) > 3 else blob)


def head(codec, shape, kept, dtype=0):
    return b"FAPC" + bytes([1, codec, dtype, len(shape)]) + struct.pack(f"<{len(shape)}IQ", *shape, kept) + b"\0" * 4


@pytest.mark.parametrize(
    ("blob", "match"),
    [
        (head(2, (2**31,), 0), "announces 2147483648 elements"),
        (head(2, (2**32 - 1,) * 8, 0), "announces"),
        (head(2, (0, 2**32 - 1), 0), "announces"),
        (head(0, (5,), 4) + b"\0" * 16, "announces 4 of 5"),
        (head(1, (8,), 9) + b"\xff" * 40, "announces 9 of 8"),
        (head(1, (8,), 3) + b"\xff" + b"\0" * 12, "marks 8 elements"),
        (head(1, (4,), 4) + b"\xff" + b"\0" * 16, "after the end"),
        (head(3, (), 1) + b"\1" + b"\0" * 4, "without axes"),
        (head(3, (2, 3), 4) + b"\1" + b"\0" * 16, "marks 3 elements"),
        (head(2, (4,), 1) + b"\x80\x00" + b"\0" * 4, "more bytes than it needs"),
        (head(2, (4,), 1) + b"\x80\x80\x80\x80\x80\x01" + b"\0" * 4, "more than five"),
        (head(2, (4,), 1) + b"\xff\xff\xff\xff\x7f" + b"\0" * 4, "a gap of"),
        (head(2, (4,), 2) + b"\x03\x00" + b"\0" * 8, "element 4 of 4"),
        (head(2, (4,), 1) + b"\x80" + b"\0" * 4, "numbers"),
        (head(0, (2**27,), 2**27), "too few"),
        (head(4, (1,), 1), "not of version"),
        (head(0, (1,), 1, dtype=5), "not of version"),
    ],
)
def test_what_is_wrong_is_said(blob, match):
    with pytest.raises(WireError, match=match):
        decode(sealed(blob))


def test_memory_follows_the_bytes_given_and_not_those_announced():
    bombs = [sealed(head(2, (2**28,), 0)), sealed(head(1, (2**28,), 0)), sealed(head(0, (2**28,), 2**28))]
    bombs += [sealed(head(2, (2**28,), 2**27) + b"\0" * 1000), sealed(head(3, (2**28, 1), 0))]
    tracemalloc.start()
    for bomb in bombs:
        try:
            decode(bomb)
        except WireError:
            continue
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000


def test_other_shapes_than_expected_are_refused():
    blob = encode(torch.zeros(3, 4))
    with pytest.raises(WireError, match=r"has the shape \(3, 4\), expected \(4, 3\)"):
        decode(blob, shape=(4, 3))
    with pytest.raises(WireError, match="at most 5"):
        decode(blob, limit=5)
    with pytest.raises(WireError, match="part of a row"):
        decode(encode(torch.zeros(30, 4), torch.arange(120).view(30, 4) == 7)).by_rows()
    with pytest.raises(WireError, match="without axes"):
        decode(encode(torch.tensor(1.0))).by_rows()


@pytest.mark.parametrize(
    "given",
    [
        {"tensor": torch.zeros(3, dtype=torch.int64)},
        {"tensor": torch.zeros(3, dtype=torch.int8)},
        {"tensor": torch.zeros(3), "scale": 1.0},
        {"tensor": torch.zeros(3), "rows": torch.ones(2, dtype=torch.bool)},
        {"tensor": torch.zeros(3), "rows": torch.ones(3, dtype=torch.bool), "keep": torch.ones(3, dtype=torch.bool)},
        {"tensor": torch.zeros((1,) * 9)},
    ],
)
def test_what_cannot_be_sent_is_refused(given, unchecked):
    with pytest.raises(WireError):
        encode(**given)
