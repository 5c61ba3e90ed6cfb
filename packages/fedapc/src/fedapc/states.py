"""State of a client or a server as one flat dictionary of tensors, which safetensors and ``torch.save`` can write."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

import torch
from jaxtyping import Shaped, UInt8
from torch import Tensor

from shared_core.errors import InputError

__all__ = ["State", "bytes_of", "described", "description", "tensor_of"]

State = dict[str, Tensor]
_ABOUT = "about.json"


def tensor_of(blob: bytes) -> UInt8[Tensor, " bytes"]:
    """Bytes as a tensor."""
    return torch.frombuffer(bytearray(blob), dtype=torch.uint8) if blob else torch.zeros(0, dtype=torch.uint8)


def bytes_of(tensor: UInt8[Tensor, " bytes"]) -> bytes:
    """Bytes that a tensor was made of."""
    return tensor.numpy().tobytes()


def described(tensors: Mapping[str, Shaped[Tensor, "..."]], about: Mapping[str, Any]) -> State:
    """Put what JSON can hold beside the tensors."""
    return {**tensors, _ABOUT: tensor_of(json.dumps(about).encode())}


def description(state: Mapping[str, Shaped[Tensor, "..."]], kind: str) -> dict[str, Any]:
    """Return what was put beside the tensors.

    Raises
    ------
    InputError
        For a state of another kind.
    """
    if _ABOUT not in state:
        raise InputError(f"this is no state of a {kind}: it has no '{_ABOUT}'")
    about = cast("dict[str, Any]", json.loads(bytes_of(state[_ABOUT])))
    if about.get("kind") != kind:
        raise InputError(f"this is the state of a {about.get('kind')}, expected one of a {kind}")
    return about
