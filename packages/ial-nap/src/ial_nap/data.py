"""Series by name or from the user's own file: see :mod:`ial_nap.sets` and :mod:`ial_nap.files`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from ial_nap.dataset import Dataset, Part, Split, plant
from ial_nap.files import read_series
from ial_nap.series import Kind
from ial_nap.sets import SETS, housing_of, pbc_of, physionet_of
from shared_core.errors import InputError, UnknownKeyError, no_such

__all__ = ["SETS", "Dataset", "Part", "Split", "housing_of", "load_data", "pbc_of", "physionet_of", "plant"]


def load_data(
    source: str | os.PathLike[str],
    *,
    id: str | None = None,  # noqa: A002  (what people call the column)
    time: str | None = None,
    label: str | None = None,
    kind: Kind | None = None,
    features: Sequence[str] | None = None,
    hours: int = 1,
) -> Dataset:
    """Load a set by name, or read the user's own from a file.

    A file is a long CSV or TSV (one row for an instance and time, empty cells missing, the label the same in all rows
    of an instance); an NPZ with ``X`` (or ``x``) of (n, t, r), and if it likes ``y``, ``lengths``, ``feature_names``,
    ``units``, ``step_names``, ``ids``; or the ``processed_datasets.pkl`` of the paper's authors (also as NPZ with its
    keys), of which nothing but plain arrays and names is read and nothing run.

    Parameters
    ----------
    source : one of :data:`SETS`, or the path of a file
    id, time, label : columns of a CSV; None looks for ``id``, ``time``, and ``label`` or ``y``, which may be absent
    kind : of the task; None guesses from the labels
    features : columns, or names of features, to read; None is all
    hours : width of a bin of physionet2012

    Raises
    ------
    UnknownKeyError
        For a name that is no set, nor a file.
    InputError
        One line that names the file, the place in it, what was found and what to do.

    Examples
    --------
    >>> data = load_data("cells")
    >>> data.x.shape, data.steps, data.classes
    ((569, 3, 10), ('mean', 'error', 'worst'), ('benign', 'malignant'))
    """
    name, path = str(source), Path(source)
    if kind is not None and kind not in get_args(Kind):
        raise no_such("kind", kind, get_args(Kind))
    if name in SETS:
        found = SETS[name][1](hours)
    elif not path.suffix and not path.exists():
        raise UnknownKeyError(f"no set '{name}' and no such file: give a CSV or NPZ file, or one of {', '.join(SETS)}")
    else:
        found = read_series(path, {"id": id, "time": time, "label": label}, kind)
    if kind is not None and kind != found.kind:
        found = replace(found, kind=kind)
    if features is not None:
        found = _chosen(found, features)
    try:
        checked = found.series()
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    return replace(found, kind=checked.kind)


def _chosen(data: Dataset, features: Sequence[str]) -> Dataset:
    unknown = [name for name in features if name not in data.features]
    if unknown:
        raise no_such("feature", unknown[0], data.features, where=data.name)
    if not features:
        raise InputError(f"{data.name}: choose one feature at least")
    at = [data.features.index(name) for name in features]
    return replace(
        data,
        x=data.x[:, :, at],
        features=tuple(features),
        units=tuple(data.units[k] for k in at),
        groups=tuple(group for group in data.groups if set(group) <= set(features)),
        truth=None if data.truth is None else data.truth[:, at],
    )
