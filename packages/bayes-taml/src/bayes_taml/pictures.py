"""A data set of one's own to adapt to, and what to ask of it: folders of pictures, or arrays in NPZ files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float32, Shaped
from torch import Tensor

from bayes_taml.ragged import UnknownLabelError
from shared_core.arrays import read_arrays
from shared_core.classes import load_classes, read_labelled, read_unlabelled
from shared_core.data._images import resize_area
from shared_core.errors import InputError

__all__ = ["Labelled", "read_query", "read_support"]

_ARRAYS = (".npz", ".npy")

Invert = Literal["auto"] | bool


@dataclass(frozen=True, eq=False)
class Labelled:
    """Images with their classes, as a network takes them.

    Parameters
    ----------
    images : ``(n, channels, size, size)`` in [0, 1]
    labels : ``(n,)`` names of classes; None where they are not known
    files : n names of files, or numbers of rows
    inverted : whether light and dark were exchanged
    notes : what was done to them and what was passed over, a line each
    """

    images: Float32[Tensor, "n channels size size"]
    labels: Shaped[np.ndarray, " n"] | None
    files: tuple[str, ...]
    inverted: bool
    notes: tuple[str, ...]


def read_support(
    path: str | Path, size: int, channels: int, *, invert: Invert = "auto", training_mean: float | None = None
) -> Labelled:
    """Read a labelled data set, with as many examples of each class as there happen to be.

    Parameters
    ----------
    path : folder of ``<class>/*.png``; or an NPZ with ``x`` ``(n, height, width[, channels])`` and ``y`` ``(n,)``
    size, channels : of the network's images
    invert : exchange light and dark; ``auto`` as :func:`shared_core.classes.read_labelled` has it, and never for arrays
    training_mean : mean pixel of the training images, for ``auto``
    """
    kind: Any = channels
    if Path(path).suffix.lower() in _ARRAYS:
        return _labelled_arrays(Path(path), size, kind, invert)
    found = read_labelled(path, size, kind, invert=invert, training_mean=training_mean)
    labels = np.array(found.class_names)[found.labels.numpy()]
    return Labelled(found.images, labels, found.files, found.inverted, found.notes)


def read_query(path: str | Path, size: int, channels: int, known: Labelled) -> Labelled:
    """Read pictures to classify, prepared as the support was.

    Parameters
    ----------
    path : folder of pictures, or one; or an NPZ with ``x`` ``(n, height, width[, channels])``, and perhaps ``y``, the
        right answers
    size, channels : of the network's images
    known : what :func:`read_support` gave

    Raises
    ------
    UnknownLabelError
        For a right answer that is no class of the support.
    """
    kind: Any = channels
    if Path(path).suffix.lower() not in _ARRAYS:
        found = read_unlabelled(path, size, kind, invert=known.inverted)
        return Labelled(found.images, None, found.files, found.inverted, found.notes)
    images, answered = _bare_arrays(Path(path))
    if not answered:
        rows = _prepared(images, size, channels)
        files = tuple(str(k) for k in range(len(rows)))
        return Labelled(1 - rows if known.inverted else rows, None, files, known.inverted, ())
    found = _labelled_arrays(Path(path), size, kind, known.inverted)
    assert found.labels is not None
    assert known.labels is not None
    classes = np.unique(known.labels)
    unknown = np.flatnonzero(~np.isin(found.labels, classes))
    if len(unknown):
        row = int(unknown[0])
        raise UnknownLabelError(
            f"{path}: row {row} is of class '{found.labels[row]}', and the support has {', '.join(classes.tolist())};"
            " leave it out, or give examples of it"
        )
    return found


def _labelled_arrays(path: Path, size: int, channels: Any, invert: Invert) -> Labelled:
    found = load_classes(path, split="all", size=size, channels=channels)
    rows = torch.from_numpy(found.float_images(slice(None)))
    inverted = invert is True
    labels = np.array(found.class_names)[found.labels]
    files = tuple(str(k) for k in range(len(rows)))
    return Labelled(1 - rows if inverted else rows, labels, files, inverted, (found.notes,) if found.notes else ())


def _bare_arrays(path: Path) -> tuple[np.ndarray, bool]:
    """Return ``x``, and whether there is a ``y`` beside it."""
    arrays = read_arrays(path, single=True)
    if "" in arrays:
        return arrays[""], False
    if "x" not in arrays:
        raise InputError(f"{path}: needs an array 'x', found {', '.join(arrays) or 'nothing'}")
    return arrays["x"], "y" in arrays


def _prepared(x: np.ndarray, size: int, channels: int) -> Tensor:
    """Return ``(n, channels, size, size)`` in [0, 1]."""
    wanted = "expected (n, height, width[, channels]), squares, of bytes or of floats in [0, 1]"
    if x.ndim == 3:
        x = x[..., None]
    elif x.ndim == 4 and x.shape[3] not in (1, 3) and x.shape[1] in (1, 3):
        x = x.transpose(0, 2, 3, 1)
    if x.ndim != 4 or x.dtype.kind not in "buf" or not x.size or x.shape[1] != x.shape[2] or x.shape[3] not in (1, 3):
        raise InputError(f"query: 'x' is {x.dtype} {x.shape}; {wanted}")
    values = x.astype(np.float32) / (255 if x.dtype == np.uint8 else 1)
    finite = np.isfinite(values.reshape(len(x), -1)).all(1)
    if not finite.all():
        raise InputError(f"query: row {int(np.flatnonzero(~finite)[0])} of 'x' holds NaN or infinity")
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 1 + 1e-3:
        raise InputError(f"query: values of 'x' are {low:g}..{high:g}; {wanted}")
    pixels = np.rint(255 * np.minimum(values, 1)).astype(np.uint8)
    # As the support's are: resized first, then of other channels.
    pixels = pixels if x.shape[1] == size else resize_area(pixels, size)
    rows = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))).float() / 255
    if rows.shape[1] == channels:
        return rows
    if channels == 3:
        return rows.repeat(1, 3, 1, 1)
    return (rows * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True).clamp(0, 1)
