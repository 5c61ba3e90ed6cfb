"""Tables, rating sets, treatment-effect benchmarks and PhysioNet 2012 in their official layouts."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from shared_core.data._datasets import EffectData, ImageData, RatingData, SeriesData, TableData
from shared_core.data._files import Source, reading
from shared_core.data._ratings import read_ratings
from shared_core.errors import InputError

_STATIC = ("Age", "Gender", "Height", "ICUType", "Weight")


def embedded(source: Source, *, scaled: bool = True) -> ImageData | TableData:
    """Load a set that scikit-learn holds: digits (8 x 8 images, 0..16), breast-cancer, wine, diabetes.

    ``scaled`` is for diabetes only: False gives the measured values instead of standardised ones.
    """
    from sklearn import datasets

    name = source.entry.name
    bunch: Any = getattr(datasets, f"load_{name.replace('-', '_')}")(
        **({"scaled": scaled} if name == "diabetes" else {})
    )
    classes = tuple(str(label) for label in getattr(bunch, "target_names", ()))
    if name == "digits":
        images, labels = bunch.images.astype(np.uint8), bunch.target.astype(np.int64)
        return ImageData(*source.origin(images, labels), images, labels, classes, peak=16)
    x, y = bunch.data.astype(np.float64), bunch.target.astype(np.int64 if classes else np.float64)
    features = tuple(str(feature) for feature in bunch.feature_names)
    if classes:
        return TableData(*source.origin(x, y), x, y, features, "class", "classification", classes)
    return TableData(*source.origin(x, y), x, y, features, "disease progression", "regression")


def movielens(
    source: Source, *, duplicates: Literal["error", "mean", "last"] = "error", max_rows: int | None = None
) -> RatingData:
    """MovieLens 100k (``u.data``; its official folds as splits), 1M and 10M (``ratings.dat``) and the CSV releases."""
    file = source.entry.files[0] if source.split == "all" else source.split
    place, data = source.read(file.replace(".", r"\."), file)
    scale = (1.0, 5.0) if source.entry.name in ("movielens-100k", "movielens-1m") else (0.5, 5.0)
    found = read_ratings(io.BytesIO(data), scale=scale, duplicates=duplicates, max_rows=max_rows, name=place)
    name, split, origin = source.origin(
        found.users, found.items, found.values, found.timestamps, notes=source.where.name
    )
    return replace(found, name=name, split=split, provenance=origin)


def _matrix(data: bytes, place: str, width: int, *, header: bool = False) -> NDArray[np.float64]:
    """Parse comma-separated numbers, ``width`` to a line."""
    with reading(place):
        text = io.StringIO(data.decode("utf-8"))
        matrix = np.loadtxt(text, delimiter=",", skiprows=int(header), ndmin=2, dtype=np.float64)
    if matrix.shape[1] != width or not len(matrix):
        raise InputError(f"{place}: {len(matrix):,} rows of {matrix.shape[1]} numbers, expected rows of {width}")
    return matrix


def _npz(source: Source, pattern: str, wanted: str, keys: str) -> dict[str, NDArray[Any]]:
    """Read named arrays, all with the draws on the last axis, which is moved to the front."""
    place, data = source.read(pattern, wanted, 1 << 30)
    with reading(place), np.load(io.BytesIO(data), allow_pickle=False) as archive:
        arrays = {key: np.moveaxis(archive[key], -1, 0) for key in keys.split()}
    units = arrays["x"].shape[:2]
    wrong = next((k for k, a in arrays.items() if a.shape[:2] != units or a.ndim != 2 + (k == "x")), None)
    if wrong or any(array.dtype.kind not in "fiub" for array in arrays.values()):
        raise InputError(f"{place}: {wrong or 'an array'} is not numbers (n, draws), or (n, features, draws) for x")
    return arrays


def _effects(source: Source, names: tuple[str, ...], arrays: Mapping[str, NDArray[Any]], notes: str = "") -> EffectData:
    """Put arrays in place under the names of the CFR files: x, t, yf, ycf, mu0, mu1 and e (randomised)."""
    if not np.isin(arrays["t"], (0, 1)).all():
        raise InputError(f"{source.where}: the treatment must be 0 or 1")
    if arrays["x"].shape[2] != len(names):
        raise InputError(f"{source.where}: {arrays['x'].shape[2]} covariates, expected {len(names)}")
    x, t, y = arrays["x"].astype(np.float64), arrays["t"].astype(np.int64), arrays["yf"].astype(np.float64)
    ycf, mu0, mu1 = (arrays[key].astype(np.float64) if key in arrays else None for key in ("ycf", "mu0", "mu1"))
    trial = arrays["e"].astype(np.int64) if "e" in arrays else None
    origin = source.origin(x, t, y, ycf, mu0, mu1, trial, notes=notes)
    return EffectData(*origin, x, t, y, ycf, mu0, mu1, names, trial)


def ihdp(source: Source, *, realisations: int | None = None) -> EffectData:
    """IHDP, response surface B: split "all" reads ``ihdp_npci_1.csv`` .., "train" and "test" the CFR npz files.

    ``realisations`` asks for the first so many draws; default: all that are there. The covariate "first", 1 or 2 in
    the files, becomes 0 or 1.
    """
    if realisations is not None and realisations < 1:
        raise InputError(f"realisations: must be at least 1, got {realisations}")
    keys = "t yf ycf mu0 mu1"
    if source.split == "all":
        files = {int(m.group(1)): (data, place) for m, place, data in source.members(r"ihdp_npci_(\d+)\.csv", 1 << 26)}
        chosen = sorted(files)[:realisations]
        if len(chosen) < (realisations or 1):
            raise source.missing(f"{realisations or 1} files ihdp_npci_1.csv .. (there are {len(chosen)})")
        draws = [_matrix(*files[number], 30) for number in chosen]
        if len({len(draw) for draw in draws}) > 1:
            raise InputError(f"{source.where}: the ihdp_npci_*.csv files differ in their number of rows")
        table = np.stack(draws)
        arrays = {"x": table[:, :, 5:], **{key: table[:, :, column] for column, key in enumerate(keys.split())}}
    else:
        file = f"ihdp_npci_1-100.{source.split}.npz"
        arrays = _npz(source, rf"ihdp_npci_1-\d+\.{source.split}\.npz", file, f"x {keys}")
        arrays = {key: array[:realisations] for key, array in arrays.items()}
    x, first = arrays["x"].astype(np.float64), source.entry.names.index("first")
    if x.shape[2] > first and np.isin(x[..., first], (1, 2)).all():
        x[..., first] -= 1
    notes = f"{len(x)} draws; the covariate 'first' recoded from 1/2 to 0/1"
    return _effects(source, source.entry.names, {**arrays, "x": x}, notes)


def jobs(source: Source) -> EffectData:
    """Jobs (LaLonde's trial and PSID) in the CFR layout: 10 draws of the split.

    There are no counterfactuals; ``randomised`` is 1 for the units of the trial.
    """
    file = f"jobs_DW_bin.new.10.{source.split}.npz"
    arrays = _npz(source, file.replace(".", r"\."), file, "x t yf e")
    return _effects(source, tuple(f"x{i + 1}" for i in range(arrays["x"].shape[2])), arrays)


def twins(source: Source, *, assignment: Literal["logistic", "random"] = "logistic", seed: int = 0) -> EffectData:
    """Twins: death (1) within the year of the lighter (arm 0) and the heavier (arm 1) twin, both observed.

    ``mu0`` and ``mu1`` are these outcomes. Who is "treated" is simulated, as every paper does: ``"random"`` by a fair
    coin; ``"logistic"`` (our rule) with probability sigmoid(z w), z the standardised covariates, w uniform in +-0.1.
    """
    place, data = source.read(r"(?i:twin_data)\.csv", "Twin_data.csv[.gz]", 1 << 28)
    header = data.split(b"\n", 1)[0].decode("utf-8", "replace")
    names = tuple(name.strip(" '\"\u2018\u2019\ufffd\r") for name in header.split(","))
    table = _matrix(data, place, 32, header=True)
    x, died = table[:, :30], (table[:, 30:] < 9999).astype(np.float64)
    generator = np.random.default_rng(seed)
    weights = generator.uniform(-0.1, 0.1, 30) * (assignment == "logistic")
    scores = (x - x.mean(0)) / np.maximum(x.std(0), 1e-12) @ weights
    t = (generator.random(len(x)) < 1 / (1 + np.exp(-scores))).astype(np.int64)
    row = np.arange(len(x))
    arrays = {"x": x, "t": t, "yf": died[row, t], "ycf": died[row, 1 - t], "mu0": died[:, 0], "mu1": died[:, 1]}
    arrays = {key: array[None] for key, array in arrays.items()}
    return _effects(source, names[:30], arrays, f"treatment simulated: {assignment}, seed {seed}")


def physionet2012(source: Source, *, target: str = "In-hospital_death") -> SeriesData:
    """PhysioNet/CinC Challenge 2012: set a ("train"), b ("validation") or c ("test"), 48 hourly means of 37 channels.

    A value of -1 means missing, among the static descriptors as in the series; 48:00 counts to the last hour. Weight
    is static (the first of a stay) and a channel. ``labels`` is the column ``target`` of the outcomes file:
    In-hospital_death, Length_of_stay, Survival, SAPS-I or SOFA.
    """
    letter, channels = {"train": "a", "validation": "b", "test": "c"}[source.split], source.entry.names
    labels = _outcomes(source, letter, target)
    channel_of = {name: position for position, name in enumerate(channels)}
    cells: list[int] = []
    values: list[float] = []
    statics: dict[str, dict[str, float]] = {}
    for match, place, data in source.members(rf"set-{letter}/(\d+)\.txt", 1 << 24):
        start, static = len(statics) * 48, statics.setdefault(match.group(1), {})
        for number, line in enumerate(data.decode("utf-8", "replace").splitlines()[1:], 2):
            try:
                time, parameter, text = line.split(",")
                hour, value = min(int(time[:2]), 47), float(text)
            except ValueError:
                raise InputError(f"{place}:{number}: expected HH:MM,Parameter,Value, got {line[:40]!r}") from None
            if value != -1 and hour >= 0:
                if parameter in channel_of:
                    cells.append((start + hour) * len(channels) + channel_of[parameter])
                    values.append(value)
                static.setdefault(parameter, value)
    if not statics:
        raise source.missing(f"set-{letter}[.tar.gz]")
    absent = next((record for record in statics if record not in labels), None)
    if absent is not None:
        raise InputError(f"{source.where}: record {absent} is not in Outcomes-{letter}.txt")
    size = len(statics) * 48 * len(channels)
    count = np.bincount(cells, minlength=size)
    means = np.full(size, np.nan)
    np.divide(np.bincount(cells, weights=values, minlength=size), count, out=means, where=count > 0)
    series = means.astype(np.float32).reshape(len(statics), 48, len(channels))
    static = np.array([[row.get(name, np.nan) for name in _STATIC] for row in statics.values()], dtype=np.float32)
    outcomes = np.array([labels[record] for record in statics], dtype=np.int64)
    origin = source.origin(series, static, outcomes, notes=f"set {letter}, hourly means")
    return SeriesData(*origin, series, static, outcomes, tuple(statics), channels, _STATIC, target)


def _outcomes(source: Source, letter: str, target: str) -> dict[str, int]:
    place, data = source.read(rf"(?i:outcomes)-{letter}\.txt", f"Outcomes-{letter}.txt", 1 << 24)
    header = data.split(b"\n", 1)[0].decode("utf-8", "replace").strip().split(",")
    if target not in header[1:]:
        raise InputError(f"target: {target!r} is not a column of {place} ({', '.join(header[1:])})")
    table = _matrix(data, place, len(header), header=True).astype(np.int64)
    return dict(zip(map(str, table[:, 0].tolist()), table[:, header.index(target)].tolist(), strict=True))
