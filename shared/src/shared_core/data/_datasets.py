"""What ``load`` returns: small frozen objects of NumPy arrays, each with where it came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float, Float32, Int64, UInt8

if TYPE_CHECKING:
    from scipy.sparse import csr_array


@dataclass(frozen=True)
class Provenance:
    """Where a data set comes from and under which licence.

    Parameters
    ----------
    source : who made it, as one would cite it.
    licence : its licence or terms, in words.
    url : the official address.
    checksum : SHA-256 over dtype, shape and bytes of the arrays that were loaded.
    notes : what a reader should know: files that were absent, simulated parts, recodings.
    """

    source: str
    licence: str
    url: str
    checksum: str
    notes: str = ""


@dataclass(frozen=True, eq=False)
class Dataset:
    """What every data set has: its registry name, the split that was loaded and its provenance."""

    name: str
    split: str
    provenance: Provenance

    def __len__(self) -> int:
        """Return the number of rows: images, table rows, ratings, units or series."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class ImageData(Dataset):
    """Labelled images.

    Parameters
    ----------
    images : grey ``(n, height, width)`` or colour ``(n, height, width, 3)``, values 0..``peak``.
    labels : positions in ``class_names``.
    groups : positions in ``group_names``, or None; ``group_kind`` says of what ("alphabet", "face", ...).
    peak : the value of full white: 255 except for ``digits``, where it is 16.
    """

    images: UInt8[np.ndarray, "n height width *channels"]
    labels: Int64[np.ndarray, " n"]
    class_names: tuple[str, ...]
    groups: Int64[np.ndarray, " n"] | None = None
    group_names: tuple[str, ...] = ()
    group_kind: str = ""
    peak: int = 255

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class TableData(Dataset):
    """A table with one target: ``x`` (NaN = missing), ``y`` float64 (regression) or int64 (classification)."""

    x: Float[np.ndarray, "n features"]
    y: Float[np.ndarray, " n"] | Int64[np.ndarray, " n"]
    feature_names: tuple[str, ...]
    target_name: str
    task: Literal["regression", "classification"]
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.y)


@dataclass(frozen=True, eq=False)
class RatingData(Dataset):
    """Ratings in file order; user code ``k`` is the user whose id is ``user_ids[k]``, and so for items.

    Parameters
    ----------
    users, items : codes 0.. in the order of the sorted ids (by number where all ids are numbers, else by text).
    values : the ratings.
    timestamps : seconds as the file gives them, or None.
    scale : the lowest and highest rating allowed: as declared, else as found.
    """

    users: Int64[np.ndarray, " n"]
    items: Int64[np.ndarray, " n"]
    values: Float[np.ndarray, " n"]
    timestamps: Int64[np.ndarray, " n"] | None
    user_ids: tuple[str, ...]
    item_ids: tuple[str, ...]
    scale: tuple[float, float]

    def __len__(self) -> int:
        """Return the number of ratings."""
        return len(self.values)

    @property
    def shape(self) -> tuple[int, int]:
        """``(users, items)``."""
        return len(self.user_ids), len(self.item_ids)

    @property
    def density(self) -> float:
        """The rated share of all (user, item) pairs, 0..1."""
        return len(self) / (self.shape[0] * self.shape[1])

    def to_csr(self) -> csr_array[Any]:
        """Return the ratings as a SciPy sparse array of shape ``(users, items)``, float64."""
        from scipy.sparse import csr_array

        return csr_array((self.values, (self.users, self.items)), shape=self.shape)


@dataclass(frozen=True, eq=False)
class EffectData(Dataset):
    """Treatment-effect data; every array starts with an axis of realisations (1 where there is only one).

    Parameters
    ----------
    x : covariates ``(realisations, n, features)``.
    treatment : 0 or 1, ``(realisations, n)``, as are all that follow.
    y_factual : the outcome under the treatment received.
    y_counterfactual : the outcome under the other one, or None where nobody knows it.
    mu0, mu1 : expected outcome without and with treatment (for Twins: the outcomes observed), or None.
    randomised : 1 where the unit comes from a randomised trial (Jobs), or None.
    """

    x: Float[np.ndarray, "realisations n features"]
    treatment: Int64[np.ndarray, "realisations n"]
    y_factual: Float[np.ndarray, "realisations n"]
    y_counterfactual: Float[np.ndarray, "realisations n"] | None
    mu0: Float[np.ndarray, "realisations n"] | None
    mu1: Float[np.ndarray, "realisations n"] | None
    feature_names: tuple[str, ...]
    randomised: Int64[np.ndarray, "realisations n"] | None = None

    def __len__(self) -> int:
        """Return the number of units in one realisation."""
        return self.x.shape[1]


@dataclass(frozen=True, eq=False)
class SeriesData(Dataset):
    """Series on a regular time grid, NaN where nothing was measured, with static features and one label each."""

    values: Float32[np.ndarray, "n steps channels"]
    static: Float32[np.ndarray, "n static"]
    labels: Int64[np.ndarray, " n"]
    ids: tuple[str, ...]
    channel_names: tuple[str, ...]
    static_names: tuple[str, ...]
    label_name: str

    def __len__(self) -> int:
        """Return the number of series."""
        return len(self.labels)
