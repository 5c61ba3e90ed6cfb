"""Tables to try the method on: real data that is installed already, the core's named sets, and one exact model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float, Shaped

from shared_core.data import ImageData, RatingData, SeriesData, TableData, load, read_ratings
from shared_core.errors import no_such
from shared_core.tables import Scale, read_sparse, read_table
from sparsity_norm.ratings import Duplicates, RatingMatrix

__all__ = ["RATING_SETS", "TABLES", "Table", "latent_level", "load_ratings", "load_table", "photograph"]

RATING_SETS = ("movielens-100k", "movielens-1m", "movielens-10m")


@dataclass(frozen=True)
class Table:
    """Instances with missing entries and what is to be predicted of them.

    Parameters
    ----------
    name : what to call it in results
    x : (instances, features) NaN = missing
    y : (instances,) numbers, or class codes 0, 1, ... as float64
    task : regression or classification
    groups : (instances,) labels that must not be split between training and test, or None
    scale : how its columns are best scaled; ``none`` where they are alike already
    """

    name: str
    x: Float[np.ndarray, "instances features"]
    y: Float[np.ndarray, " instances"]
    task: Literal["regression", "classification"]
    groups: Shaped[np.ndarray, " instances"] | None = None
    scale: Scale = "none"


def latent_level(n: int = 4000, features: int = 50, seed: int = 0, rates: tuple[float, float] = (0.05, 1.0)) -> Table:
    """Draw instances whose features all share one hidden level, which is the target.

    ``z ~ N(0, 1)``, ``x_j = 3 + z + N(0, 1)``, each entry kept with the instance's own rate ``~ U(rates)``, at least
    one. The best
    possible prediction from `s` known entries has variance ``1 / (1 + s)``, so the distance to the optimum is known:
    this is the case Sparsity Normalization is made for, and mean filling is not.

    Parameters
    ----------
    n : instances
    features : entries of an instance
    seed : seed of everything drawn
    rates : range of the instances' observation rates

    Examples
    --------
    >>> table = latent_level(n=10, features=4)
    >>> table.x.shape, table.y.shape
    ((10, 4), (10,))
    """
    random = np.random.default_rng(seed)
    z = random.standard_normal(n)
    x = 3 + z[:, None] + random.standard_normal((n, features))
    kept = random.random((n, features)) < random.uniform(*rates, (n, 1))
    # Of an instance of which nothing is known there is nothing to learn.
    empty = np.flatnonzero(~kept.any(axis=1))
    kept[empty, random.integers(features, size=len(empty))] = True
    return Table("latent level", np.where(kept, x, np.nan), z, "regression")


def photograph(size: int = 7) -> Table:
    """Cut a photograph into tiles: predict the brightness in the middle of a tile from what is known around it.

    Tiles do not overlap. The photograph (a palace roof, shipped with scikit-learn) stands for any array of like sensors
    of which a varying number report. Nothing is missing yet; see :func:`sparsity_norm.ampute.ampute`.

    Parameters
    ----------
    size : side of a tile in pixels, odd

    Returns
    -------
    Table of ``size**2 - 1`` features and a target, all brightness in [0, 1].
    """
    from sklearn.datasets import load_sample_image

    brightness = load_sample_image("china.jpg").mean(axis=2) / 255
    rows, columns = (length // size for length in brightness.shape)
    tiles = brightness[: rows * size, : columns * size].reshape(rows, size, columns, size)
    tiles = tiles.swapaxes(1, 2).reshape(-1, size * size)
    middle = size * size // 2
    return Table("photograph", np.delete(tiles, middle, axis=1), tiles[:, middle], "regression")


def _embedded(name: str) -> Table:
    data = load(name, expect=TableData)
    return Table(name, data.x, data.y.astype(np.float64), data.task, scale="minmax")


def _digits() -> Table:
    data = load("digits", expect=ImageData)
    flat = data.images.reshape(len(data.images), -1).astype(np.float64) / data.images.max()
    return Table("digits", flat, data.labels.astype(np.float64), "classification")


def _physionet() -> Table:
    """Mean of each variable over the 48 hours; a variable never measured is missing."""
    data = load("physionet2012", expect=SeriesData)
    measured = ~np.isnan(data.values)
    count = measured.sum(axis=1)
    total = np.where(measured, data.values, 0).sum(axis=1, dtype=np.float64)
    means = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    x = np.hstack([means, data.static])
    kept = ~np.isnan(x).all(axis=0)
    return Table("physionet2012", x[:, kept], data.labels.astype(np.float64), "classification", scale="minmax")


TABLES: dict[str, Callable[[], Table]] = {
    "latent": latent_level,
    "photograph": photograph,
    "digits": _digits,
    "breast-cancer": lambda: _embedded("breast-cancer"),
    "diabetes": lambda: _embedded("diabetes"),
    "wine": lambda: _embedded("wine"),
    "physionet2012": _physionet,
}


def load_table(name: str) -> Table:
    """Load one of :data:`TABLES` by name.

    Parameters
    ----------
    name : latent, photograph, digits, breast-cancer, diabetes, wine, or physionet2012 (from the data folder)

    Raises
    ------
    UnknownKeyError
        For any other name.
    InputError
        When the set is not embedded and not in the data folder.
    """
    if name not in TABLES:
        raise no_such("table", name, TABLES)
    return TABLES[name]()


def load_ratings(
    source: str | Path, *, scale: tuple[float, float] | None = None, duplicates: Duplicates = "error"
) -> RatingMatrix:
    """Read ratings from a file, or one of :data:`RATING_SETS` from the data folder.

    Parameters
    ----------
    source : a name; or a text file as :func:`shared_core.data.read_ratings` takes it; a Parquet file with the columns
        user, item, rating; or a SciPy sparse NPZ, users in rows, every stored entry a rating
    scale : lowest and highest rating there can be; a rating outside is refused
    duplicates : what to do with a (user, item) pair rated twice

    Raises
    ------
    InputError
        One line that names the file, the place in it and what is wrong.
    """
    if str(source) in RATING_SETS:
        return RatingMatrix.of(load(str(source), expect=RatingData), scale=scale, duplicates=duplicates)
    match Path(source).suffix.lower():
        case ".npz":
            return RatingMatrix.from_scipy(read_sparse(source), scale=scale, duplicates=duplicates)
        case ".parquet":
            return RatingMatrix.from_frame(read_table(source), scale=scale, duplicates=duplicates)
        case _:
            return RatingMatrix.of(read_ratings(source, scale=scale, duplicates=duplicates), scale=scale)
