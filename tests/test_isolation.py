"""A package stands alone: what importing it costs, what it may know, and what its wheel holds."""

from __future__ import annotations

import ast
import email
import functools
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from contract import ALL, ROOT, Package

# Importing a package loads none of these: they are extras, or are needed by one command only.
HEAVY = {"fastapi", "flwr", "matplotlib", "onnx", "onnxruntime", "pandas", "ray", "rich", "sklearn", "typer"}


@functools.cache
def modules_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys, json\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


def test_import_loads_little_more_than_torch(package: Package):
    torch, ours = modules_after("import torch, jaxtyping"), modules_after(f"import {package.import_name}")
    assert not {name.partition(".")[0] for name in ours} & HEAVY
    extra = ours - torch
    assert len(extra) < 60, sorted(extra)


def test_help_loads_no_torch(package: Package):
    loaded = modules_after(f"import {package.import_name}.cli")
    assert not {"torch", "sklearn", "matplotlib", "pandas"} & loaded


def imported_names(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def test_no_sibling_is_imported(package: Package):
    siblings = {other.import_name for other in ALL} - {package.import_name}
    for folder in ("src", "tests", "benchmarks"):
        for file in (package.folder / folder).rglob("*.py"):
            assert not imported_names(file) & siblings, file


def test_every_import_is_declared(package: Package):
    project = package.project
    requirements = [*project["dependencies"]]
    for extra in project.get("optional-dependencies", {}).values():
        requirements += extra
    declared = {re.split(r"[\[<>=!~; ]", text)[0].lower().replace("_", "-") for text in requirements}
    distributions = metadata.packages_distributions()
    for file in package.source.rglob("*.py"):
        for name in imported_names(file) - set(sys.stdlib_module_names) - {package.import_name}:
            owners = {owner.lower().replace("_", "-") for owner in distributions.get(name, [name])}
            # pydantic-core is pydantic's own other half.
            assert owners & (declared | {"pydantic-core"}), f"{file.name} imports {name}, which is not declared"


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    made: dict[str, Path] = {}

    def build(folder: Path) -> Path:
        if folder.name not in made:
            out = tmp_path_factory.mktemp("wheel")
            command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            made[folder.name] = next(out.glob("*.whl"))
        return made[folder.name]

    return build


@pytest.mark.parametrize("kind", ["core", "package"])
def test_wheel_holds_the_package_and_nothing_else(package: Package, wheels, kind):
    folder, name = (ROOT / "shared", "shared_core") if kind == "core" else (package.folder, package.import_name)
    wheel = wheels(folder)
    assert wheel.stat().st_size < 1_000_000
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        tops = {member.partition("/")[0] for member in names}
        info = next(top for top in tops if top.endswith(".dist-info"))
        assert tops == {name, info}
        assert f"{name}/py.typed" in names
        assert any(member.startswith(f"{info}/licenses/") for member in names)
        sources = {str(path.relative_to(folder / "src")) for path in (folder / "src" / name).rglob("*.py")}
        assert sources <= {str(Path(member)) for member in names}
        about = email.message_from_bytes(archive.read(f"{info}/METADATA"))
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
    assert about["Name"] == folder.name.replace("shared", "shared-core")
    assert about["Requires-Python"] == ">=3.11"
    assert about["License-Expression"] == "Apache-2.0"
    assert about["Description-Content-Type"] == "text/markdown"
    assert about["Summary"]
    assert about.get_payload().strip().startswith("# ")
    assert f"{about['Name']} = " in entry_points


def test_versions_agree(package: Package):
    core = tomllib.loads((ROOT / "shared/pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert package.project["version"] == core["version"]
    assert f"shared-core=={core['version']}" in package.project["dependencies"]


def test_the_build_workflow_and_import_contracts_name_every_package(package: Package):
    workflow = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    assert re.search(rf"\b{package.name}\b", workflow)
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    assert package.import_name in contracts["root_packages"]
