"""Commands that read what other commands left meet damage of it: they do their work, or refuse it in one line.

``damage`` in a package's ``contract.toml`` names both. ``FUZZ=200 pytest tests/test_damage.py`` looks for more.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contract import Package
from shared_core.errors import InputError
from shared_core.testing import Caller, fuzz, mutations, survives

HELD = (".csv", ".db", ".fapc", ".json", ".jsonl", ".npz", ".safetensors", ".toml")


def write_inputs(folder: Path) -> None:
    """Write small tables, series, ratings and images of the user."""
    random = np.random.default_rng(0)
    rows = random.random((60, 3)).round(3)
    lines = [f"{a},{b},{c},{k % 2},{a + k % 2}" for k, (a, b, c) in enumerate(rows)]
    (folder / "table.csv").write_text("\n".join(["a,b,c,t,y", *lines]))
    lines = [f"{user},{item},{1 + user * item % 5}" for user in range(12) for item in range(10) if (user + item) % 3]
    (folder / "ratings.csv").write_text("\n".join(["user,item,rating", *lines]))
    lines = [",".join(map(str, row)) for row in random.integers(0, 2, (60, 4))]
    (folder / "binary.csv").write_text("\n".join(["a,b,c,d", *lines]))
    lines = [f"{k},{t},{random.random():.3f},{random.random():.3f},{k % 2}" for k in range(40) for t in range(4)]
    (folder / "series.csv").write_text("\n".join(["id,time,a,b,label", *lines]))
    np.savez(folder / "images.npz", x=random.random((30, 1, 8, 8), dtype=np.float32), y=np.arange(30) % 5)
    np.savez(folder / "oracle.npz", mask=np.array([[1, 0]] * 4))
    image = pytest.importorskip("PIL.Image")
    for k in range(15):
        (folder / f"photos/{k % 5}").mkdir(parents=True, exist_ok=True)
        image.fromarray(random.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / f"photos/{k % 5}/{k}.png")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    """Return a folder with what the package's commands have made, once for each package."""
    kept: dict[str, Path] = {}

    def make(package: Package) -> Path:
        if package.name not in kept:
            folder = tmp_path_factory.mktemp(package.name)
            write_inputs(folder)
            for command in package.contract["damage"]["make"]:
                Caller(package.line(), folder).done(*command.split())
            kept[package.name] = folder
        return kept[package.name]

    return make


@fuzz(2)
@given(data=st.data())
def test_what_is_left_may_be_damaged(package: Package, reading: str, made, tmp_path_factory, data):
    folder = made(package)
    named = {word.split("/")[0] for word in reading.split()}
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.suffix in HELD and file.relative_to(folder).parts[0] in named and "out" not in file.parts
    )
    assert files, f"{reading} reads nothing that was made"
    path = data.draw(st.sampled_from(files))
    valid = path.read_bytes()
    call = Caller(package.line(), folder)

    def read() -> None:
        result = call(*reading.split(), "--out", "out", "--overwrite", "--quiet")
        if result.returncode:
            assert result.returncode == 2, (result.stdout, result.stderr)
            raise InputError(result.stderr.strip())

    try:
        path.write_bytes(data.draw(mutations(valid)))
        survives(read)
    finally:
        path.write_bytes(valid)
        shutil.rmtree(folder / "out", ignore_errors=True)
