"""What is in the bytes that were sent, for people."""

from __future__ import annotations

import math

from fedapc import messages, wire

__all__ = ["describe"]


def describe(blob: bytes) -> list[str]:
    """Return what a message, or one tensor, of the wire format holds, a line each; every checksum is checked.

    Parameters
    ----------
    blob : the bytes

    Raises
    ------
    WireError
        For everything that is wrong with them.

    Examples
    --------
    >>> import torch
    >>> describe(wire.encode(torch.eye(3)))
    ['a tensor (3, 3) of float32, codec dense, 9 of 9 numbers sent, 64 bytes']
    """
    if blob[:4] != b"FAPM":
        return [_tensor(blob)]
    message = messages.unpack(blob)
    lines = [
        f"a message: {message.kind}, client '{message.client}', round {message.round}, task {message.task}, network"
        f" {message.layout:08x}, {len(blob)} bytes"
    ]
    if message.kind == "update":
        lines.append(f"trained on {message.examples} examples")
    if message.wanted:
        lines.append(f"asks for the parts of tasks {list(message.wanted)}")
    for section in message.sections:
        lines.append(f"{section.kind} of client '{section.client}', task {section.task}, {section.size} bytes")
        lines += [f"    {_tensor(tensor)}" for tensor in section.tensors]
    return lines


def _tensor(blob: bytes) -> str:
    found = wire.decode(blob, limit=wire.MOST_ELEMENTS)
    dtype = str(found.values.dtype).removeprefix("torch.")
    scaled = "" if found.scale is None else f" times {found.scale:.4g}"
    rows = "" if found.rows is None else f", {int(found.rows.sum())} of {len(found.rows)} rows"
    return (
        f"a tensor {found.shape} of {dtype}{scaled}, codec {found.codec}{rows}, {len(found.values)} of"
        f" {math.prod(found.shape)} numbers sent, {len(blob)} bytes"
    )
