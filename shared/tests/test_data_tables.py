from __future__ import annotations

import gzip
import io
import os
import tarfile

import numpy as np
import pytest
from sklearn import datasets

from shared_core.data import EffectData, ImageData, RatingData, SeriesData, TableData, find, load
from shared_core.errors import InputError


def real(name: str, **options):
    if not os.environ.get("SHARED_CORE_DATA"):
        pytest.skip("SHARED_CORE_DATA is not set")
    return load(name, **options)


def fails(expected: str, name: str, root, **options) -> None:
    with pytest.raises(InputError, match=expected) as caught:
        load(name, root=root, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["breast-cancer", "wine", "diabetes"])
def test_embedded_tables(name):
    data = load(name, expect=TableData)
    x, y = getattr(datasets, f"load_{name.replace('-', '_')}")(return_X_y=True)
    np.testing.assert_array_equal(data.x, x)
    np.testing.assert_array_equal(data.y, y)
    assert len(data.feature_names) == x.shape[1]
    assert (data.task == "regression", data.y.dtype == np.float64) == ((name == "diabetes"),) * 2
    assert len(data.class_names) == (0 if name == "diabetes" else len(np.unique(y)))


def test_embedded_options():
    digits = load("digits", expect=ImageData)
    np.testing.assert_array_equal(digits.images.reshape(1797, 64), datasets.load_digits().data)
    assert digits.images.max() == digits.peak == 16
    measured = load("diabetes", expect=TableData, scaled=False)
    assert measured.x[:, 0].mean() == pytest.approx(48.5, abs=0.1)


@pytest.mark.parametrize(
    ("name", "path", "content"),
    [
        ("movielens-100k", "ml-100k/u.data", "1\t20\t5\t7\n2\t20\t1\t8\n"),
        ("movielens-1m", "ml-1m/ratings.dat", "1::20::5::7\n2::20::1::8\n"),
        ("movielens-10m", "ml-10M100K/ratings.dat", "1::20::5::7\n2::20::1::8\n"),
        ("movielens-csv", "ml-latest-small/ratings.csv", "userId,movieId,rating,timestamp\n1,20,5.0,7\n2,20,1.0,8\n"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_movielens_layouts(tmp_path, name, path, content, zipped):
    path = tmp_path / (f"{path}.gz" if zipped else path)
    path.parent.mkdir()
    path.write_bytes(gzip.compress(content.encode()) if zipped else content.encode())
    data = load(name, root=tmp_path, expect=RatingData)
    assert (data.name, data.split, data.provenance.notes) == (name, "all", path.parent.name)
    assert (data.user_ids, data.item_ids, data.values.tolist()) == (("1", "2"), ("20",), [5, 1])
    assert data.scale == ((1, 5) if name in ("movielens-100k", "movielens-1m") else (0.5, 5))
    path.write_text(content.replace("20", "30").replace("5", "6"))
    fails(r"ratings.*:\d: rating 6 outside|u.data.*:1: rating 6 outside", name, tmp_path)


def test_movielens_official_folds(tmp_path):
    (tmp_path / "ml-100k").mkdir()
    (tmp_path / "ml-100k/u.data").write_text("1\t2\t3\t4\n")
    (tmp_path / "ml-100k/u2.test").write_text("9\t8\t2\t1\n")
    assert load("ml-100k", split="u2.test", root=tmp_path, expect=RatingData).user_ids == ("9",)
    fails("no ub.base in", "ml-100k", tmp_path, split="ub.base")


class Test_Ihdp:
    @staticmethod
    def table(seed: int, rows: int = 6) -> np.ndarray:
        generator = np.random.default_rng(seed)
        table = generator.normal(size=(rows, 30))
        table[:, 0] = generator.integers(0, 2, rows)
        table[:, 5 + 13] = generator.integers(1, 3, rows)
        return table

    def test_csv(self, tmp_path):
        (tmp_path / "ihdp").mkdir()
        tables = {number: self.table(number) for number in (1, 2, 10)}
        for number, table in tables.items():
            np.savetxt(tmp_path / f"ihdp/ihdp_npci_{number}.csv", table, delimiter=",", fmt="%.17g")
        data = load("ihdp", root=tmp_path, expect=EffectData)
        assert (len(data), data.x.shape, data.feature_names[13]) == (6, (3, 6, 25), "first")
        np.testing.assert_array_equal(data.mu1[2], tables[10][:, 4])
        np.testing.assert_array_equal(data.x[1, :, 13], tables[2][:, 18] - 1)
        np.testing.assert_array_equal(data.x[1, :, 12], tables[2][:, 17])
        two = load("ihdp", root=tmp_path, expect=EffectData, realisations=2)
        np.testing.assert_array_equal(two.y_factual, data.y_factual[:2])
        fails("no 4 files ihdp_npci_1.csv .. .there are 3", "ihdp", tmp_path, realisations=4)
        fails("realisations: must be at least 1", "ihdp", tmp_path, realisations=0)
        (tmp_path / "ihdp/ihdp_npci_2.csv").write_text("1,2,x\n")
        fails("ihdp_npci_2.csv: cannot be read.*x", "ihdp", tmp_path)
        (tmp_path / "ihdp/ihdp_npci_2.csv").write_text("1,2,3\n")
        fails("ihdp_npci_2.csv: 1 rows of 3 numbers, expected rows of 30", "ihdp", tmp_path)
        np.savetxt(tmp_path / "ihdp/ihdp_npci_2.csv", self.table(2, rows=5), delimiter=",")
        fails("differ in their number of rows", "ihdp", tmp_path)
        tables[1][:, 0] = 2
        np.savetxt(tmp_path / "ihdp/ihdp_npci_1.csv", tables[1], delimiter=",")
        fails("the treatment must be 0 or 1", "ihdp", tmp_path, realisations=1)

    def test_npz(self, tmp_path):
        (tmp_path / "ihdp").mkdir()
        stack = np.stack([self.table(seed) for seed in range(4)], axis=-1)
        arrays = {"x": stack[:, 5:], **{key: stack[:, i] for i, key in enumerate(("t", "yf", "ycf", "mu0", "mu1"))}}
        path = tmp_path / "ihdp/ihdp_npci_1-100.train.npz"
        np.savez(path, ate=np.array(4.0), **arrays)
        data = load("ihdp", root=tmp_path, split="train", expect=EffectData)
        np.testing.assert_array_equal(data.y_counterfactual, stack[:, 2].T)
        np.testing.assert_array_equal(data.x[3, :, 0], stack[:, 5, 3])
        np.savez(path, **arrays | {"mu1": np.zeros((6, 3))})
        fails("mu1 is not numbers", "ihdp", tmp_path, split="train")
        np.savez(path, **arrays | {"yf": np.full((6, 4), {}, dtype=object)})
        fails("cannot be read", "ihdp", tmp_path, split="train")
        np.savez(path, x=arrays["x"])
        fails("cannot be read.*'?t'? is not a file", "ihdp", tmp_path, split="train")

    def test_real(self):
        data = real("ihdp", expect=EffectData)
        assert data.x.shape[1:] == (747, 25)
        assert (data.treatment.sum(1) == 139).all()
        assert np.ptp(data.mu1 - data.mu0, axis=1).min() > 0.5, "surface B has effects that vary"
        factual = np.where(data.treatment == 1, data.mu1, data.mu0)
        assert (data.y_factual - factual).std() == pytest.approx(1, abs=0.05)
        held_out = real("ihdp", split="test", expect=EffectData)
        assert held_out.x.shape == (100, 75, 25)
        assert set(np.unique(held_out.x[:, :, 13])) == {0, 1}


def test_jobs(tmp_path):
    generator = np.random.default_rng(0)
    arrays = {"x": generator.normal(size=(8, 17, 10)), "yf": generator.integers(0, 2, (8, 10)).astype(float)}
    arrays |= {key: generator.integers(0, 2, (8, 10)) for key in "te"}
    (tmp_path / "jobs").mkdir()
    np.savez(tmp_path / "jobs/jobs_DW_bin.new.10.test.npz", **arrays)
    data = load("jobs", root=tmp_path, split="test", expect=EffectData)
    assert (data.x.shape, data.mu0, data.y_counterfactual) == ((10, 8, 17), None, None)
    np.testing.assert_array_equal(data.randomised, arrays["e"].T)
    fails("no jobs_DW_bin.new.10.train.npz", "jobs", tmp_path)


class Test_Twins:
    def test_layout(self, tmp_path):
        header = ",".join([f"'x{i}'" for i in range(30)] + ["'outcome(t=0)\u2019", "'outcome(t=1)\u2019"])
        rows = ["1," * 30 + "9999,9999", "2," * 30 + "3,9999", "3," * 30 + "9999,0", "5," * 30 + "1,1"]
        (tmp_path / "twins").mkdir()
        (tmp_path / "twins/Twin_data.csv.gz").write_bytes(gzip.compress("\n".join([header, *rows]).encode()))
        data = load("twins", root=tmp_path, expect=EffectData)
        assert data.feature_names[29] == "x29"
        assert (data.mu0.tolist(), data.mu1.tolist()) == ([[0, 1, 0, 1]], [[0, 0, 1, 1]])
        np.testing.assert_array_equal(data.y_factual, np.where(data.treatment == 1, data.mu1, data.mu0))
        np.testing.assert_array_equal(data.y_counterfactual, np.where(data.treatment == 0, data.mu1, data.mu0))

    def test_real(self):
        data = real("twins", expect=EffectData)
        assert data.x.shape == (1, 11_400, 30)
        assert data.feature_names[0] == "dtotord"
        assert (data.mu0.mean(), data.mu1.mean()) == pytest.approx((0.177, 0.161), abs=5e-4)

        def dependence(treatment):
            return np.abs([np.corrcoef(column, treatment)[0, 1] for column in data.x[0].T if column.std()]).max()

        fair = real("twins", expect=EffectData, assignment="random", seed=3)
        assert dependence(fair.treatment[0]) < 0.05 < dependence(data.treatment[0])
        again = real("twins", expect=EffectData, assignment="random", seed=3)
        np.testing.assert_array_equal(again.treatment, fair.treatment)


RECORD = """Time,Parameter,Value
00:00,RecordID,7
00:00,Age,54
00:00,Gender,-1
00:00,Weight,80
00:07,HR,70
00:50,HR,74
01:00,HR,-1
01:00,pH,7.25
02:00,Weight,82
47:59,TroponinI,1.5
48:00,TroponinI,2.5
48:00,Unheard,3
"""


class Test_Physionet:
    @pytest.fixture
    def root(self, tmp_path):
        folder = tmp_path / "physionet2012"
        folder.mkdir()
        (folder / "Outcomes-a.txt").write_text("RecordID,SOFA,In-hospital_death\n9,3,1\n7,-1,0\n")
        with tarfile.open(folder / "set-a.tar.gz", "w:gz") as archive:
            for name, text in [("set-a/7.txt", RECORD), ("set-a/9.txt", RECORD.replace("RecordID,7", "RecordID,9"))]:
                info = tarfile.TarInfo(name)
                info.size = len(text)
                archive.addfile(info, io.BytesIO(text.encode()))
        return tmp_path

    def test_archive(self, root):
        data = load("physionet2012", root=root, expect=SeriesData)
        assert (data.values.shape, data.ids, data.labels.tolist()) == ((2, 48, 37), ("7", "9"), [0, 1])
        series = {name: data.values[0, :, channel] for channel, name in enumerate(data.channel_names)}
        measured = {name: {h: v for h, v in enumerate(s.tolist()) if v == v} for name, s in series.items()}
        assert {name: values for name, values in measured.items() if values} == {
            "HR": {0: 72},
            "pH": {1: 7.25},
            "TroponinI": {47: 2},
            "Weight": {0: 80, 2: 82},
        }
        assert dict(zip(data.static_names, data.static[0].tolist(), strict=True)) == pytest.approx(
            {"Age": 54, "Gender": np.nan, "Height": np.nan, "ICUType": np.nan, "Weight": 80}, nan_ok=True
        )
        assert load("physionet2012", root=root, expect=SeriesData, target="SOFA").labels.tolist() == [-1, 3]
        fails("target: 'Age' is not a column", "physionet2012", root, target="Age")
        fails("no Outcomes-b.txt", "physionet2012", root, split="validation")

    @pytest.mark.parametrize(
        ("line", "expected"),
        [("00:07,HR", "HR'"), ("x,HR,70", "x,HR,70"), ("00:07,HR,seventy", "seventy"), ("00:07,HR,7,0", "7,0")],
    )
    def test_folder_with_a_bad_line(self, root, line, expected):
        folder = root / "physionet2012"
        (folder / "set-a.tar.gz").unlink()
        (folder / "set-a").mkdir()
        (folder / "set-a/9.txt").write_text(RECORD)
        assert len(load("physionet2012", root=root)) == 1
        (folder / "set-a/9.txt").write_text(RECORD.replace("00:07,HR,70", line))
        fails(f"9.txt:6: expected HH:MM,Parameter,Value, got '.*{expected}", "physionet2012", root)
        (folder / "set-a/8.txt").write_text(RECORD)
        (folder / "set-a/9.txt").write_text(RECORD)
        fails("record 8 is not in Outcomes-a.txt", "physionet2012", root)

    def test_real(self):
        data = real("physionet2012", expect=SeriesData)
        assert data.values.shape == (4000, 48, 37)
        assert data.labels.sum() == 554
        assert np.isnan(data.values).mean() == pytest.approx(0.808, abs=1e-3)
        # One stay, read line by line in another way.
        stay = data.ids.index("132540")
        folder = find("physionet2012")
        with tarfile.open(folder / "set-a.tar.gz") as archive:
            text = archive.extractfile("set-a/132540.txt").read().decode()
        heart = [line.split(",") for line in text.splitlines() if ",HR," in line]
        for hour in range(48):
            values = [float(value) for time, _, value in heart if int(time[:2]) == hour]
            found = data.values[stay, hour, data.channel_names.index("HR")]
            assert found == pytest.approx(np.mean(values)) if values else np.isnan(found)
