"""A distribution of another author is called `stamp` on the public index: nothing here may mean it by that name."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import pytest

import stamp

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def checkout() -> Path:
    """The repository these tests lie in, at any depth; a package's tests may be run elsewhere."""
    for folder in HERE.parents:
        if (folder / "constraints.txt").is_file() and (folder / "packages/stamp/pyproject.toml").is_file():
            return folder
    pytest.skip("needs the repository")


def name_of(requirement: str) -> str:
    """Give a requirement's distribution, in the index's spelling."""
    found = re.match(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)", requirement)
    return re.sub(r"[-_.]+", "-", found.group(1)).lower() if found else ""


def requirements(manifest: dict[str, Any]) -> Iterator[str]:
    project = manifest.get("project", {})
    yield from project.get("dependencies", [])
    for extra in project.get("optional-dependencies", {}).values():
        yield from extra
    for group in manifest.get("dependency-groups", {}).values():
        yield from (each for each in group if isinstance(each, str))
    yield from manifest.get("build-system", {}).get("requires", [])


def named_in_commands(text: str) -> list[str]:
    """Give what the text's `pip install` commands take from an index by name."""
    commands = text.replace("\\\n", " ").splitlines()
    found: list[str] = []
    for command in commands:
        for part in re.findall(r"\bpip\d? install\b([^|;&#`]*)", command):
            words = [word.strip("'\"") for word in part.split()]
            # What follows an option may be its value; a path or a variable is no name on an index.
            found += [word for word in words if re.fullmatch(r"[A-Za-z0-9._-]+(\[[^\]]*\])?([=<>~!].*)?", word)]
    return [name_of(word) for word in found if not word.startswith("-") and not word.endswith(".whl")]


def commands_of(path: Path) -> str:
    """Give a file's text; of prose only its blocks of code, for a sentence may warn of a command."""
    text = path.read_text(encoding="utf-8")
    return "\n".join(re.findall(r"^```.*?^```", text, re.M | re.S)) if path.suffix == ".md" else text


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("stamp==1.0", "stamp"),
        ("Stamp[all] >= 1; python_version > '3'", "stamp"),
        ("stamp", "stamp"),
        ("  stamp @ https://example.org/stamp.whl", "stamp"),
        ("stamp-tools==2", "stamp-tools"),
        ("timestamp>=1", "timestamp"),
        ("# via stamp", ""),
    ],
)
def test_names_of_requirements_are_read(text, name):
    assert name_of(text) == name


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("$ pip install stamp", ["stamp"]),
        ("uv pip install --quiet 'stamp[onnx]>=0.1' \\\n  torch", ["stamp", "torch"]),
        ("pip install ./shared ./packages/stamp     # stamp itself", []),
        ("pip install dist/stamp-0.1.0-py3-none-any.whl && stamp demo", []),
        ("pip install stamp-0.1.0-py3-none-any.whl", []),
        ("run `pip install './packages/stamp[all]'` or pip install 'numpy'", ["numpy"]),
    ],
)
def test_commands_that_install_by_name_are_seen(text, names):
    assert named_in_commands(text) == names


def test_no_pin_is_of_the_other_distribution(checkout):
    pins = [name_of(line) for line in (checkout / "constraints.txt").read_text(encoding="utf-8").splitlines()]
    assert "torch" in pins
    assert "stamp" not in pins


def test_no_other_package_requires_it(checkout):
    manifests = [checkout / "pyproject.toml", *checkout.glob("shared/pyproject.toml")]
    manifests += [path for path in checkout.glob("packages/*/pyproject.toml") if path.parent.name != "stamp"]
    assert len(manifests) > 2
    for path in manifests:
        found = {name_of(text) for text in requirements(tomllib.loads(path.read_text(encoding="utf-8")))}
        assert found, path
        assert "stamp" not in found, path


def test_this_package_requires_its_name_only_for_its_own_extras(checkout):
    manifest = tomllib.loads((checkout / "packages/stamp/pyproject.toml").read_text(encoding="utf-8"))
    extras = manifest["project"]["optional-dependencies"]
    for text in requirements(manifest):
        if name_of(text) == "stamp":
            inside = re.fullmatch(r"stamp\[([a-z, -]+)\]", text)
            assert inside, text
            assert {extra.strip() for extra in inside.group(1).split(",")} <= set(extras)


def test_no_command_of_the_repository_installs_it_by_name(checkout):
    files = [checkout / "Makefile", checkout / ".ci/run", *checkout.glob("scripts/*"), *checkout.glob("*.md")]
    files += [*checkout.glob(".github/workflows/*.yml"), *checkout.glob("docs/**/*.md")]
    files += [*checkout.glob("packages/*/README.md")]
    seen = 0
    for path in (path for path in files if path.is_file()):
        names = named_in_commands(commands_of(path))
        seen += len(names)
        assert "stamp" not in names, path
    assert seen > 0


def test_the_module_that_is_imported_is_ours():
    known = [each for each in metadata.distributions() if name_of(each.metadata["Name"] or "") == "stamp"]
    # The same distribution may be found on the path twice, but not two of them.
    assert len({(each.version, each.metadata["Summary"]) for each in known}) == 1
    ours = metadata.distribution("stamp")
    assert {"shared-core", "torch"} <= {name_of(text) for text in ours.requires or []}
    assert ours.metadata["License-Expression"] == "Apache-2.0"
    assert [entry.value for entry in ours.entry_points if entry.name == "stamp"] == ["stamp.cli:main"]
    module = Path(str(stamp.__file__)).resolve()
    installed = Path(str(ours.locate_file("stamp/__init__.py"))).resolve()
    origin = json.loads(ours.read_text("direct_url.json") or "{}")
    if origin.get("dir_info", {}).get("editable"):
        assert module == Path(url2pathname(urlsplit(origin["url"]).path), "src/stamp/__init__.py").resolve()
    else:
        assert module == installed


def test_the_installed_description_is_the_manifests(checkout):
    project = tomllib.loads((checkout / "packages/stamp/pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert metadata.metadata("stamp")["Summary"] == project["description"]
    assert metadata.version("stamp") == project["version"]


def test_the_readme_says_how_to_install_it(checkout):
    path = checkout / "packages/stamp/README.md"
    text = path.read_text(encoding="utf-8")
    if len(text.splitlines()) < 5:
        pytest.skip("the README is not written yet")
    commands = re.findall(r"\bpip install\b[^`\n]*", commands_of(path))
    assert any("packages/stamp" in command or ".whl" in command for command in commands)
    # And why not by its name.
    assert re.search(r"\bPyPI\b|public index|package index", text)
