"""Data sets by name: ``load("digits")`` gives a small typed object of arrays with its provenance.

Sets that come with scikit-learn, and ``glyphs``, which is drawn here, need no files. The others are read from the data
folder in the layout of their publishers, also gzipped or in their archives: the folder that ``SHARED_CORE_DATA`` names,
else the user's cache folder. ``available`` lists them, ``find`` says where one is, ``verify`` checks it and ``fetch``
gets it.
"""

from shared_core.data._datasets import (
    Dataset,
    EffectData,
    ImageData,
    Provenance,
    RatingData,
    SeriesData,
    TableData,
)
from shared_core.data._fetch import extract, fetch
from shared_core.data._files import Entry, MissingFilesError, data_root
from shared_core.data._ratings import read_ratings
from shared_core.data._registry import Check, Report, available, find, load, verify

__all__ = [
    "Check",
    "Dataset",
    "EffectData",
    "Entry",
    "ImageData",
    "MissingFilesError",
    "Provenance",
    "RatingData",
    "Report",
    "SeriesData",
    "TableData",
    "available",
    "data_root",
    "extract",
    "fetch",
    "find",
    "load",
    "read_ratings",
    "verify",
]
