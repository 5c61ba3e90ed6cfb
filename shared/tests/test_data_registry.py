from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from shared_core.data import (
    Check,
    Dataset,
    ImageData,
    RatingData,
    TableData,
    available,
    data_root,
    find,
    load,
    verify,
)
from shared_core.data import _registry as registry
from shared_core.data._files import Source, archived, cache_root, sha256_of
from shared_core.data.cli import register
from shared_core.errors import InputError, UnknownKeyError

NAMES = {entry.name: entry for entry in available("absent")}
FILES = [name for name, entry in NAMES.items() if not entry.embedded]


@pytest.fixture
def mnist(tmp_path, monkeypatch):
    """A data folder with five images called MNIST, whose labels have the published checksum and whose images do not."""
    folder = tmp_path / "mnist"
    folder.mkdir()
    images = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (5, 28, 28)) + bytes(5 * 784)
    labels = b"\0\0\x08\x01\0\0\0\x05" + bytes(5)
    (folder / "train-images-idx3-ubyte").write_bytes(images)
    (folder / "train-labels-idx1-ubyte").write_bytes(labels)
    checksum = f"sha256-gunzipped:{hashlib.sha256(labels).hexdigest()}"
    sums = [(url, checksum) for url, _ in NAMES["mnist"].downloads]
    monkeypatch.setitem(registry._REGISTRY, "mnist", replace(registry._REGISTRY["mnist"], downloads=tuple(sums)))
    return tmp_path


def one_line(expected, call, *arguments, error=InputError, **options):
    with pytest.raises(error, match=expected) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_importing_costs_nothing_heavy():
    code = "import shared_core.data, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "shared_core.data" in loaded
    heavy = {"torch", "sklearn", "scipy", "pandas", "matplotlib", "PIL", "typer", "rich", "pydantic"}
    assert not heavy & set(loaded)


def test_every_entry_is_complete():
    assert {"digits", "glyphs", "mnist", "cifar100", "omniglot", "movielens-100k", "ihdp", "physionet2012"} <= set(
        NAMES
    )
    for entry in NAMES.values():
        assert all((entry.description, entry.licence, entry.url.startswith("http"), entry.splits))
        assert set(entry.counts) <= set(entry.splits)
        assert entry.embedded == (not entry.folders) == (not entry.files)
        for url, checksum in entry.downloads:
            assert url.startswith("http")
            algorithm, _, value = checksum.partition(":")
            length = {"": 0, "md5": 32, "sha256": 64, "sha256-gunzipped": 64}[algorithm]
            assert len(bytes.fromhex(value)) * 2 == length
        assert registry.entry_of(entry.name).name == entry.name
        assert all(registry.entry_of(folder).name == entry.name for folder in entry.folders)


@pytest.mark.parametrize(
    ("alias", "name"), [("ml-100k", "movielens-100k"), ("CIFAR-10", "cifar10"), ("MiniImageNet", "mini-imagenet")]
)
def test_other_spellings(alias, name):
    assert registry.entry_of(alias).name == name


@pytest.mark.parametrize("call", [load, find, verify])
def test_unknown_name(call):
    text = one_line("no data set is called 'mnits'; did you mean 'mnist'", call, "mnits", error=UnknownKeyError)
    assert all(name in text for name in NAMES)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_set_says_all_there_is_to_say(name, tmp_path):
    (tmp_path / NAMES[name].folders[0]).mkdir(parents=True)
    for call in (load, find):
        text = one_line(f"^{name}: not found in ", call, name, root=tmp_path)
        assert str(tmp_path) in text
        assert all(file in text for file in NAMES[name].files)
        assert NAMES[name].url in text
        assert (f"shared-core data fetch {name}" in text) == bool(NAMES[name].downloads)


def test_expected_kind_splits_and_options(mnist):
    one_line("digits is ImageData, and TableData was asked for", load, "digits", expect=TableData)
    one_line("mnist is ImageData, and RatingData was asked for", load, "mnist", expect=RatingData)
    one_line("split: digits has all, and not 'test'", load, "digits", split="test")
    one_line("split: mnist has train, test, and not 'all'", load, "mnist", split="all", root=mnist)
    one_line("size: not an option of mnist, which takes none", load, "mnist", root=mnist, size=3)
    one_line("sise: not an option of omniglot, which takes size, ink, groups", load, "omniglot", sise=3)
    assert load("wine", split="train").split == "all"
    assert isinstance(load("wine"), Dataset)


def test_provenance(mnist):
    data = load("mnist", root=mnist, expect=ImageData)
    entry = NAMES["mnist"]
    assert (data.provenance.source, data.provenance.licence, data.provenance.url) == (
        entry.description,
        entry.licence,
        entry.url,
    )
    assert data.provenance.checksum == sha256_of(data.images, data.labels)
    assert (
        sha256_of(data.images) != sha256_of(data.images.reshape(-1)) != sha256_of(data.images.reshape(-1).view(np.int8))
    )
    assert sha256_of(np.eye(3)[:, :2]) == sha256_of(np.eye(3)[:, :2].copy())


def test_data_root(monkeypatch, tmp_path):
    monkeypatch.setenv("SHARED_CORE_DATA", str(tmp_path))
    assert data_root() == tmp_path
    monkeypatch.delenv("SHARED_CORE_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    for platform, expected in [
        ("linux", tmp_path / "cache/shared-core"),
        ("win32", tmp_path / "local/shared-core"),
        ("darwin", Path.home() / "Library/Caches/shared-core"),
    ]:
        monkeypatch.setattr(sys, "platform", platform)
        assert data_root() == cache_root() == expected


def test_available_and_find(mnist, monkeypatch):
    monkeypatch.setenv("SHARED_CORE_DATA", str(mnist))
    (mnist / "omniglot").mkdir()
    with zipfile.ZipFile(mnist / "omniglot/images_evaluation.zip", "w"):
        pass
    (mnist / "ml-1m.zip").write_bytes(b"")
    found = {entry.name: entry.where for entry in available() if entry.where}
    assert found == {"mnist": mnist / "mnist", "omniglot": mnist / "omniglot", "movielens-1m": mnist / "ml-1m.zip"}
    assert find("mnist") == mnist / "mnist"
    assert all(entry.present == (entry.embedded or entry.name in found) for entry in available())
    one_line("digits has no folder", find, "digits")


def test_verify(mnist):
    report = verify("mnist", root=mnist)
    labels = (mnist / "mnist/train-labels-idx1-ubyte").read_bytes()
    assert [(check.item, check.size, check.status) for check in report.checks] == [
        ("train-images-idx3-ubyte", 16 + 5 * 784, "differs"),
        ("train-labels-idx1-ubyte", 13, "official"),
        ("split train", 5, "partial"),
        ("split test", 0, "absent"),
    ]
    assert report.checks[1].detail == hashlib.sha256(labels).hexdigest()
    assert report.checks[2].detail == "60,000 rows expected"
    assert "no t10k-images" in report.checks[3].detail
    assert not report.ok
    (mnist / "mnist/train-images-idx3-ubyte").write_bytes(labels)
    assert [check.status for check in verify("mnist", root=mnist).checks] == [
        "official",
        "official",
        "broken",
        "absent",
    ]
    wine = verify("wine")
    assert (wine.ok, wine.where, wine.checks) == (True, None, (Check("split all", 178, "complete"),))


def test_verify_real_mnist():
    if not os.environ.get("SHARED_CORE_DATA"):
        pytest.skip("SHARED_CORE_DATA is not set")
    report = verify("mnist")
    assert report.ok
    assert {check.status for check in report.checks} == {"official", "complete"}


def test_archive_members_say_what_they_are(tmp_path):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        for name, kind in [
            ("folder", tarfile.DIRTYPE),
            ("file", tarfile.REGTYPE),
            ("link", tarfile.SYMTYPE),
            ("pipe", tarfile.FIFOTYPE),
        ]:
            info = tarfile.TarInfo(name)
            info.type = kind
            archive.addfile(info)
    assert [(m.name, m.kind) for m in archived(tmp_path / "a.tar.gz")] == [
        ("folder", "folder"),
        ("file", "file"),
        ("link", "other"),
        ("pipe", "other"),
    ]


def test_members_larger_than_allowed_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "twins.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inner/file.csv", bytes(1 << 20))
    (tmp_path / "file.gz").write_bytes(gzip.compress(bytes(1 << 20)))
    source = Source(NAMES["twins"], "all", tmp_path)
    for pattern, label in ((r"file\.csv", "twins.zip:inner/file.csv"), ("file", "file.gz")):
        assert len(source.read(pattern, "file", 1 << 20)[1]) == 1 << 20
        one_line(f"{label}: larger than the 1,048,575 bytes", source.read, pattern, "file", (1 << 20) - 1)


class Test_Commands:
    @pytest.fixture
    def run(self, mnist, monkeypatch):
        monkeypatch.setenv("SHARED_CORE_DATA", str(mnist))
        app = typer.Typer()
        register(app)
        return lambda *arguments: CliRunner().invoke(app, ["data", *arguments])

    def test_list(self, run, mnist):
        sets = {row["name"]: row for row in json.loads(run("list", "--json").stdout)}
        assert set(sets) == set(NAMES)
        assert (sets["mnist"]["where"], sets["mnist"]["present"]) == (str(mnist / "mnist"), True)
        assert (sets["jobs"]["where"], sets["jobs"]["present"], sets["jobs"]["kind"]) == (None, False, "EffectData")
        result = run("list")
        assert result.exit_code == 0
        assert all(name in result.stdout for name in NAMES)

    def test_path(self, run, mnist):
        assert run("path", "mnist").stdout.strip() == str(mnist / "mnist")
        assert json.loads(run("path", "mnist", "--json").stdout) == {"name": "mnist", "where": str(mnist / "mnist")}

    def test_verify(self, run):
        result = run("verify", "mnist", "--json")
        report = json.loads(result.stdout)
        assert (result.exit_code, report["ok"], report["checks"][0]["status"]) == (2, False, "differs")
        assert result.stderr.count("\n") == 1
        assert "differs" in run("verify", "mnist").stdout
        assert run("verify", "wine").exit_code == 0

    @pytest.mark.parametrize(
        "arguments",
        [
            ("path", "jobs"),
            ("path", "digits"),
            ("verify", "nothing"),
            ("fetch", "glyphs"),
            ("fetch", "mini-imagenet"),
            ("fetch", "ftp://x/y"),
        ],
    )
    def test_wrong_input_is_one_line(self, run, arguments):
        result = run(*arguments)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith(f"shared-core data {arguments[0]}: ")
        assert result.stderr.count("\n") == 1
