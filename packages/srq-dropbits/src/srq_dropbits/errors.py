"""What can be wrong with a user's model, data, budget or file; every message is one line that says what to do."""

from __future__ import annotations

from shared_core.errors import InputError

__all__ = [
    "BudgetError",
    "CalibrationError",
    "ExportError",
    "InvalidBitsError",
    "NonFiniteError",
    "NothingToQuantizeError",
    "OverrideError",
    "PackedFormatError",
    "SrqError",
]


class SrqError(InputError):
    """Base of this package's errors; a ``ValueError``, and exit status 2 on the command line."""


class InvalidBitsError(SrqError):
    """A bit-width outside 2..8 (1..8 on grids without negative values)."""


class NonFiniteError(SrqError):
    """NaN or infinity among weights or activations."""


class CalibrationError(SrqError):
    """Input quantizers that have seen no data, or data they cannot be set from."""


class NothingToQuantizeError(SrqError):
    """A model, or a selection of its layers, without anything to quantize."""


class OverrideError(SrqError):
    """A layer pattern that matches nothing, or a setting that a layer cannot have."""


class BudgetError(SrqError):
    """A budget of bits or bytes that no assignment of bit-widths can meet."""


class PackedFormatError(SrqError):
    """A file that is not packed weights of this package, or is damaged."""


class ExportError(SrqError):
    """A model that cannot be written in the format asked for."""
