"""Messages and states of fedapc in the records of Flower: one blob, and a few words about it."""

from __future__ import annotations

from typing import Any

from fedapc.errors import WireError
from fedapc.flower._flwr import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

__all__ = ["MESSAGE", "STATE", "about_of", "blob_of", "holding", "numbers_of", "reply_to", "wire_bytes"]

MESSAGE, STATE = "fedapc.message.v1", "fedapc.state.v1"
_BLOB, _ABOUT, _NUMBERS = "fedapc", "about", "numbers"


def holding(
    blob: bytes | None = None,
    about: dict[str, Any] | None = None,
    numbers: dict[str, Any] | None = None,
    kind: str = MESSAGE,
) -> RecordDict:
    """Return a content of one blob, of words about it, of numbers; nothing is left in that is none."""
    content = RecordDict()
    if blob is not None:
        # An `Array` of an ndarray would add a header of 128 bytes.
        content[_BLOB] = ArrayRecord({"blob": Array("uint8", (len(blob),), kind, blob)})
    if about is not None:
        content[_ABOUT] = ConfigRecord(about)
    if numbers is not None:
        content[_NUMBERS] = MetricRecord(numbers)
    return content


def reply_to(message: Message, content: RecordDict) -> Message:
    """Return an answer."""
    return Message(content, reply_to=message)


def blob_of(content: RecordDict, kind: str = MESSAGE) -> bytes:
    """Return the one blob of a content.

    Raises
    ------
    WireError
        When there is none, or more, or one of another kind.
    """
    arrays = [array for record in content.array_records.values() for array in record.values()]
    if len(arrays) != 1 or arrays[0].stype != kind:
        raise WireError(f"arrays of the kinds {[array.stype for array in arrays]}, expected one '{kind}'")
    return arrays[0].data


def about_of(content: RecordDict, **kinds: type) -> dict[str, Any]:
    """Return the words about a blob, of which those named have to be there, of these types.

    Raises
    ------
    WireError
        When one is missing or of another type.
    """
    found: dict[str, Any] = dict(content.config_records.get(_ABOUT, {}))
    for name, kind in kinds.items():
        if not isinstance(found.get(name), kind) or (kind is int and isinstance(found[name], bool)):
            raise WireError(f"'{name}' is {found.get(name)!r}, expected {kind.__name__}")
    return found


def numbers_of(content: RecordDict, name: str) -> list[float]:
    """Return a list of numbers.

    Raises
    ------
    WireError
        When there is none.
    """
    found: Any = content.metric_records.get(_NUMBERS, {}).get(name)
    if not isinstance(found, list):
        raise WireError(f"'{name}' is {found!r}, expected a list of numbers")
    return [float(value) for value in found]


def wire_bytes(content: RecordDict) -> int:
    """Bytes of all records as Flower counts them: without compression, HTTP and TLS."""
    return sum(record.count_bytes() for record in content.values())
