"""The sparse wire format: which entries of a tensor are sent, and their bits (spec 6.1).

A tensor is a header of ``20 + 4 * ndim`` bytes (``FAPC``, version, codec, dtype, ndim, shape, entries sent, CRC-32)
and a payload, little-endian:

========  =====================================================================
codec     payload
========  =====================================================================
0 dense   all entries
1 bitmap  ``ceil(n / 8)`` bytes, lowest bit first, then the entries set in it
2 gaps    LEB128 of the first place and of the later differences less one, then the entries
3 rows    ``ceil(shape[0] / 8)`` bytes, lowest bit first, then the rows set in it
========  =====================================================================

What is sent is told by the codec, never by a value: zeros of either sign and NaNs arrive with their bits. 8-bit
integers are preceded by their scale, a float32. The encoder takes the codec of the fewest bytes, of equals the lowest.
The checksum covers the header too, else a flipped bit of a shape would pass.

The decoder trusts nothing: it allocates in proportion to the bytes it was given, never to what they announce, and
refuses with a `WireError` everything but the one way to write a tensor with a given codec.
"""

from __future__ import annotations

import hashlib
import math
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast
from weakref import WeakValueDictionary

import numpy as np
import torch
from jaxtyping import Bool, Int64, Shaped
from numpy.typing import NDArray
from torch import Tensor

from fedapc.errors import NonFiniteError, WireError
from fedapc.sparse import SparseTensor

__all__ = [
    "MOST_ELEMENTS",
    "Codec",
    "Decoded",
    "contents",
    "decode",
    "decode_shared",
    "encode",
    "encode_sparse",
    "header_size",
]

Codec = Literal["dense", "bitmap", "gaps", "rows"]

MOST_ELEMENTS = 2**31
_CODECS: tuple[Codec, ...] = ("dense", "bitmap", "gaps", "rows")
_MAGIC = b"FAPC"
_VERSION = 1
_MOST_AXES = 8
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float64)
_RAW = ("<f4", "<f2", "<i2", "<i1", "<f8")
_INT8 = 3
_FIXED = struct.Struct("<4sBBBB")
_TAIL = struct.Struct("<QI")

_Bytes = NDArray[np.uint8]


def header_size(axes: int) -> int:
    """Bytes before the payload of a tensor of so many axes."""
    return 20 + 4 * axes


def contents(blobs: Iterable[bytes]) -> tuple[int, int]:
    """Numbers in tensors that `encode` made, and bytes of these numbers, read off the headers."""
    values = size = 0
    for blob in blobs:
        _, _, _, kind, axes = _FIXED.unpack_from(blob)
        kept = _TAIL.unpack_from(blob, header_size(axes) - _TAIL.size)[0]
        values += kept
        size += kept * np.dtype(_RAW[kind]).itemsize
    return values, size


@dataclass(frozen=True, eq=False)
class Decoded:
    """What a message says about a tensor.

    Parameters
    ----------
    shape : of the whole tensor
    values : the entries sent, in C order
    codec : that they were sent with
    index : places of the entries in C order; none if all were sent or whole rows
    rows : which rows were sent, if whole rows were
    scale : to multiply 8-bit integers by
    """

    shape: tuple[int, ...]
    values: Shaped[Tensor, " sent"]
    codec: Codec
    index: Int64[Tensor, " sent"] | None = None
    rows: Bool[Tensor, " height"] | None = None
    scale: float | None = None

    def places(self) -> Int64[Tensor, " sent"]:
        """Places of the entries sent, in C order."""
        if self.index is not None:
            return self.index
        if self.rows is None:
            return torch.arange(len(self.values))
        width = math.prod(self.shape[1:])
        return (self.rows.nonzero() * width + torch.arange(width)).reshape(-1)

    def floats(self) -> Shaped[Tensor, " sent"]:
        """Return the entries sent; 8-bit integers times their scale."""
        return self.values if self.scale is None else self.values.float() * self.scale

    def dense(self) -> Shaped[Tensor, "..."]:
        """Return the whole tensor, zero where nothing was sent.

        This allocates what the message announced: give `decode` the shape you expect, or a limit.
        """
        values = self.floats()
        if self.codec == "dense":
            return values.view(self.shape)
        whole = torch.zeros(math.prod(self.shape), dtype=values.dtype)
        if self.rows is not None:
            whole.view(len(self.rows), -1)[self.rows] = values.view(int(self.rows.sum()), -1)
        else:
            whole[self.places()] = values
        return whole.view(self.shape)

    def sparse(self) -> SparseTensor:
        """Return the entries that were sent and are not zero."""
        values = self.floats()
        keep = values != 0
        return SparseTensor(self.places()[keep], values[keep], self.shape)

    def by_rows(self) -> tuple[Bool[Tensor, " height"], Shaped[Tensor, "sent ..."]]:
        """Return which rows were sent, and them.

        Raises
        ------
        WireError
            When a part of a row was sent, or the tensor has no rows.
        """
        if not self.shape:
            raise WireError("a tensor without axes has no rows")
        height, width = self.shape[0], math.prod(self.shape[1:])
        if self.rows is not None:
            rows = self.rows
        elif self.index is None:
            rows = torch.ones(height, dtype=torch.bool)
        else:
            counts = torch.bincount(self.index // max(1, width), minlength=height)
            rows = counts == width
            if int(rows.sum()) * width != len(self.index):
                raise WireError(f"shape {self.shape}: a part of a row was sent, expected whole rows")
        return rows, self.floats().view(int(rows.sum()), *self.shape[1:])


def encode(
    tensor: Shaped[Tensor, "*shape"],
    keep: Bool[Tensor, "*shape"] | None = None,
    rows: Bool[Tensor, " height"] | None = None,
    scale: float | None = None,
) -> bytes:
    """Write a tensor, or the part of it that is kept.

    Parameters
    ----------
    tensor : float32, float16, bfloat16, float64, or int8 with a scale
    keep : which entries to send. Default: all
    rows : which rows to send, in place of `keep`
    scale : that int8 entries are to be multiplied by

    Raises
    ------
    WireError
        For another type, too many axes or elements, `keep` together with `rows`.

    Examples
    --------
    >>> blob = encode(torch.arange(8.0).view(4, 2), rows=torch.tensor([True, False, False, False]))
    >>> len(blob) - header_size(2), decode(blob).by_rows()[1]
    (9, tensor([[0., 1.]]))
    """
    if keep is not None and rows is not None:
        raise WireError("keep and rows: give one of them")
    kind = _kind(tensor.dtype, scale)
    shape = tuple(tensor.shape)
    flat = _raw(tensor, kind)
    if rows is not None:
        if not shape or rows.shape != shape[:1]:
            raise WireError(f"rows: {tuple(rows.shape)} for a tensor of shape {shape}; give one boolean a row")
        return _encode_rows(shape, kind, flat, _mask(rows), scale)
    if keep is None:
        return _frame(shape, kind, 0, flat.size, b"", flat, scale)
    return _encode_kept(shape, kind, flat, _mask(keep), scale)


def encode_sparse(part: SparseTensor) -> bytes:
    """Write a sparse tensor; where that takes fewer bytes its zeros are sent too."""
    kind = _kind(part.values.dtype, None)
    values, n = _raw(part.values, kind), math.prod(part.shape)
    kept, bitmap = values.size, (n + 7) // 8
    if bitmap + kept * values.itemsize >= n * values.itemsize:
        return encode(part.dense())
    places = cast("NDArray[np.int64]", part.index.cpu().numpy())
    if kept < bitmap:
        gaps = _gap_bytes(places)
        if gaps.size < bitmap:
            return _frame(part.shape, kind, 2, kept, gaps.data, values, None)
    mask = np.zeros(n, dtype=np.bool_)
    mask[places] = True
    return _frame(part.shape, kind, 1, kept, _packed(mask).data, values, None)


def decode(
    blob: bytes,
    *,
    shape: tuple[int, ...] | None = None,
    limit: int = 2**28,
    finite: bool = False,
) -> Decoded:
    """Read a tensor, allocating no more than some ten times the bytes given.

    Parameters
    ----------
    blob : one tensor, and nothing after it
    shape : that it must have
    limit : refuse more elements than this
    finite : refuse NaN and infinities among the entries sent

    Raises
    ------
    NonFiniteError
        For NaN or infinities, if asked for.
    WireError
        For everything else that is wrong.
    """
    if len(blob) < header_size(0):
        raise WireError(f"{len(blob)} bytes, expected at least the {header_size(0)} of a header")
    magic, version, codec, kind, axes = _FIXED.unpack_from(blob)
    if magic != _MAGIC or version != _VERSION:
        raise WireError(f"starts with {bytes(blob[:5])!r}, expected FAPC and version {_VERSION}")
    if codec >= len(_CODECS) or kind >= len(_DTYPES) or axes > _MOST_AXES:
        raise WireError(f"codec {codec}, dtype {kind}, {axes} axes: not of version {_VERSION}")
    start = header_size(axes)
    if len(blob) < start:
        raise WireError(f"{len(blob)} bytes, expected a header of {start}")
    found: tuple[int, ...] = struct.unpack_from(f"<{axes}I", blob, _FIXED.size)
    kept, checksum = _TAIL.unpack_from(blob, start - _TAIL.size)
    n = math.prod(found)
    if n > min(limit, MOST_ELEMENTS) or any(size > MOST_ELEMENTS for size in found):
        raise WireError(f"announces {n} elements in the shape {found}, at most {min(limit, MOST_ELEMENTS)} are taken")
    if shape is not None and found != tuple(shape):
        raise WireError(f"has the shape {found}, expected {tuple(shape)}")
    if kept > n or (codec == 0 and kept != n):
        raise WireError(f"announces {kept} of {n} elements with the codec {_CODECS[codec]}")
    value_bytes = kept * np.dtype(_RAW[kind]).itemsize
    places = len(blob) - start - value_bytes - (4 if kind == _INT8 else 0)
    if places < 0:
        raise WireError(f"{len(blob)} bytes are too few for {kept} elements")
    if zlib.crc32(memoryview(blob)[start:], zlib.crc32(blob[: start - 4])) != checksum:
        raise WireError("the checksum does not match: the bytes were changed on the way")
    return _decode_payload(blob, start, places, found, codec, kind, kept, finite=finite)


_SHARED: WeakValueDictionary[bytes, SparseTensor] = WeakValueDictionary()


def decode_shared(blob: bytes, shape: tuple[int, ...]) -> SparseTensor:
    """Read a sparse tensor of finite numbers; who reads the same bytes again meanwhile gets the same tensor.

    So that clients of one process hold a part that all of them were sent only once. Nobody may change it.

    Parameters
    ----------
    blob : one tensor, and nothing after it
    shape : that it must have

    Raises
    ------
    WireError
        As `decode` does.
    """
    key = hashlib.sha256(blob).digest()
    part = _SHARED.get(key)
    if part is None or part.shape != tuple(shape):
        part = decode(blob, shape=tuple(shape), limit=MOST_ELEMENTS, finite=True).sparse()
        _SHARED[key] = part
    return part


def _decode_payload(
    blob: bytes, start: int, places: int, shape: tuple[int, ...], codec: int, kind: int, kept: int, *, finite: bool
) -> Decoded:
    n = math.prod(shape)
    index: Tensor | None = None
    rows: Tensor | None = None
    head = np.frombuffer(blob, np.uint8, places, start)
    if codec == 0:
        if places:
            raise WireError(f"{places} bytes too many")
    elif codec == 2:
        index = torch.from_numpy(_places(head, kept, n))
    else:
        if codec == 3 and not shape:
            raise WireError("rows of a tensor without axes")
        bits = n if codec == 1 else shape[0]
        mask = _unpacked(head, bits)
        if codec == 1:
            found = np.flatnonzero(mask)
            index, marked = torch.from_numpy(found), found.size
        else:
            rows = torch.from_numpy(mask)
            marked = int(np.count_nonzero(mask)) * math.prod(shape[1:])
        if marked != kept:
            raise WireError(f"the bitmap marks {marked} elements, the header announces {kept}")
    scale: float | None = None
    at = start + places
    if kind == _INT8:
        scale = float(struct.unpack_from("<f", blob, at)[0])
        at += 4
    raw = np.frombuffer(blob, _RAW[kind], kept, at).astype(np.dtype(_RAW[kind]).newbyteorder("="), copy=True)
    values = torch.from_numpy(raw)
    if kind == 2:
        values = values.view(torch.bfloat16)
    if finite and not (bool(torch.isfinite(values).all()) and (scale is None or math.isfinite(scale))):
        raise NonFiniteError(f"shape {shape}: {int((~torch.isfinite(values)).sum())} of {kept} values are not finite")
    return Decoded(shape, values, _CODECS[codec], index, rows, scale)


def _encode_rows(
    shape: tuple[int, ...], kind: int, flat: NDArray[Any], rows: NDArray[np.bool_], scale: float | None
) -> bytes:
    width = math.prod(shape[1:])
    kept = int(np.count_nonzero(rows))
    if kept * width == flat.size:
        return _frame(shape, kind, 0, flat.size, b"", flat, scale)
    if width == 1:
        return _encode_kept(shape, kind, flat, rows, scale)
    values = flat.reshape(len(rows), width)[rows].reshape(-1)
    bitmap = (len(rows) + 7) // 8
    as_short = (flat.size + 7) // 8 == bitmap
    # A gap takes a byte or more, so that only few entries can take fewer bytes than the bitmap.
    if kept * width <= bitmap:
        gaps = _gap_bytes((np.flatnonzero(rows)[:, None] * width + np.arange(width)).reshape(-1))
        if gaps.size < bitmap + (not as_short):
            return _frame(shape, kind, 2, values.size, gaps.data, values, scale)
    if as_short:
        return _frame(shape, kind, 1, values.size, _packed(np.repeat(rows, width)).data, values, scale)
    return _frame(shape, kind, 3, values.size, _packed(rows).data, values, scale)


def _encode_kept(
    shape: tuple[int, ...], kind: int, flat: NDArray[Any], keep: NDArray[np.bool_], scale: float | None
) -> bytes:
    keep = keep.reshape(-1)
    n, kept = flat.size, int(np.count_nonzero(keep))
    if kept == n:
        return _frame(shape, kind, 0, n, b"", flat, scale)
    if shape and (width := math.prod(shape[1:])) > 1 and kept % width == 0:
        by_row = keep.reshape(shape[0], width)
        rows = by_row[:, 0]
        if np.array_equal(by_row, np.broadcast_to(rows[:, None], by_row.shape)):
            return _encode_rows(shape, kind, flat, rows, scale)
    bitmap = (n + 7) // 8
    if kept < bitmap:
        places = np.flatnonzero(keep)
        gaps = _gap_bytes(places)
        if gaps.size < bitmap:
            return _frame(shape, kind, 2, kept, gaps.data, flat[places], scale)
    return _frame(shape, kind, 1, kept, _packed(keep).data, flat[keep], scale)


def _frame(
    shape: tuple[int, ...],
    kind: int,
    codec: int,
    kept: int,
    places: bytes | memoryview,
    values: NDArray[Any],
    scale: float | None,
) -> bytes:
    if len(shape) > _MOST_AXES or math.prod(shape) > MOST_ELEMENTS or max(shape, default=0) > MOST_ELEMENTS:
        raise WireError(f"shape {shape}: at most {_MOST_AXES} axes and {MOST_ELEMENTS} elements can be sent")
    head = _FIXED.pack(_MAGIC, _VERSION, codec, kind, len(shape)) + struct.pack(f"<{len(shape)}IQ", *shape, kept)
    middle = b"" if scale is None else struct.pack("<f", scale)
    body = values.reshape(-1).view(np.uint8).data if values.size else b""
    checksum = zlib.crc32(body, zlib.crc32(middle, zlib.crc32(places, zlib.crc32(head))))
    return b"".join((head, struct.pack("<I", checksum), places, middle, body))


def _kind(dtype: torch.dtype, scale: float | None) -> int:
    if dtype not in _DTYPES:
        raise WireError(f"{dtype} cannot be sent; use float32, float16, bfloat16, float64 or int8 with a scale")
    kind = _DTYPES.index(dtype)
    if (kind == _INT8) != (scale is not None):
        raise WireError("scale: given with int8, and with int8 only")
    return kind


def _raw(tensor: Tensor, kind: int) -> NDArray[Any]:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    raw = (flat.view(torch.int16) if kind == 2 else flat).numpy()
    return raw.astype(_RAW[kind], copy=False)


def _mask(mask: Tensor) -> NDArray[np.bool_]:
    return cast("NDArray[np.bool_]", mask.detach().cpu().contiguous().numpy())


def _packed(mask: NDArray[np.bool_]) -> _Bytes:
    return np.packbits(mask, bitorder="little")


def _unpacked(packed: _Bytes, bits: int) -> NDArray[np.bool_]:
    if packed.size != (bits + 7) // 8:
        raise WireError(f"a bitmap of {packed.size} bytes for {bits} bits")
    if bits % 8 and packed[-1] >> (bits % 8):
        raise WireError("bits are set after the end of the bitmap")
    return np.unpackbits(packed, count=bits, bitorder="little").view(np.bool_)


def _gap_bytes(places: NDArray[np.int64]) -> _Bytes:
    gaps = np.diff(places, prepend=-1) - 1
    largest = int(gaps.max(initial=0))
    if largest < 128:
        return gaps.astype(np.uint8)
    lengths = np.ones(gaps.size, dtype=np.int64)
    for bits in range(7, largest.bit_length(), 7):
        lengths += gaps >= 1 << bits
    starts = np.cumsum(lengths) - lengths
    out = np.empty(int(lengths.sum()), dtype=np.uint8)
    out[starts] = (gaps & 127) | np.where(lengths > 1, 128, 0)
    for byte in range(1, int(lengths.max())):
        longer = np.flatnonzero(lengths > byte)
        more = np.where(lengths[longer] > byte + 1, 128, 0)
        out[starts[longer] + byte] = ((gaps[longer] >> (7 * byte)) & 127) | more
    return out


def _places(packed: _Bytes, kept: int, n: int) -> NDArray[np.int64]:
    ends = np.flatnonzero(packed < 128)
    if ends.size != kept or (packed.size and packed[-1] >= 128):
        raise WireError(f"the gaps are {ends.size} numbers, the header announces {kept} elements")
    if ends.size == packed.size:
        gaps = packed.astype(np.int64)
    else:
        lengths = np.diff(ends, prepend=-1)
        if int(lengths.max()) > 5:
            raise WireError("a gap of more than five bytes")
        if bool(np.any((lengths > 1) & (packed[ends] == 0))):
            raise WireError("a gap with more bytes than it needs")
        starts = ends - lengths + 1
        gaps = (packed[starts] & 127).astype(np.int64)
        for byte in range(1, int(lengths.max())):
            longer = np.flatnonzero(lengths > byte)
            gaps[longer] |= (packed[starts[longer] + byte] & 127).astype(np.int64) << (7 * byte)
    # Less than n each, below 2**31 of them: the sum cannot overflow.
    if gaps.size and int(gaps.max()) >= n:
        raise WireError(f"a gap of {int(gaps.max())} elements in a tensor of {n}")
    places = np.cumsum(gaps + 1) - 1
    if places.size and int(places[-1]) >= n:
        raise WireError(f"a gap leads to element {int(places[-1])} of {n}")
    return places
