"""See that what would be released can be: ``make release-check``.

Builds every wheel and source distribution twice and compares them byte for byte, renders their metadata, looks for the
licence and for files that do not belong, installs them into an empty environment of each Python 3.11 to 3.13 that is
here (``pip check``, import, ``--version``, ``--help`` of each), and writes bills of materials (CycloneDX): of each such
environment into ``dist/sbom``, and of everything that ``constraints.txt`` pins into ``dist/sbom.json``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ("3.11", "3.12", "3.13")
FIELDS = ("Name", "Version", "Summary", "License-Expression", "Requires-Python", "Keywords", "Description-Content-Type")
STRANGE = re.compile(r"(^|/)(tests?|benchmarks|runs|\.venv|__pycache__)(/|$)|\.(pyc|pt|safetensors|npz|ipynb|db)$")


def run(*command: object, **options: object) -> str:
    """Run a command and return what it printed, or stop and say how it failed."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def projects() -> list[Path]:
    """List the folders of all distributions, the core first."""
    return [ROOT / "shared", *(path.parent for path in sorted(ROOT.glob("packages/*/pyproject.toml")))]


def build(uv: Path, out: Path) -> None:
    """Build all distributions."""
    # The same date in both builds and in everybody's: that of the last commit.
    date = run("git", "log", "-1", "--format=%ct", cwd=ROOT).strip()
    for folder in projects():
        run(uv, "build", "--quiet", "--out-dir", out, folder, env={**os.environ, "SOURCE_DATE_EPOCH": date})


def digests(folder: Path) -> dict[str, str]:
    """Hash every distribution in a folder."""
    files = [*folder.glob("*.whl"), *folder.glob("*.tar.gz")]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def contents(file: Path) -> tuple[list[str], Message, bytes]:
    """Return names, metadata and the licence of a wheel or a source distribution."""
    if file.suffix == ".whl":
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            metadata = archive.read(next(name for name in names if name.endswith(".dist-info/METADATA")))
            licence = next((archive.read(name) for name in names if name.endswith("licenses/LICENSE")), b"")
    else:
        with tarfile.open(file) as archive:
            names = [member.name.partition("/")[2] for member in archive.getmembers()]
            by_name = {member.name.partition("/")[2]: member for member in archive.getmembers()}
            read = {key: archive.extractfile(by_name[key]) for key in ("PKG-INFO", "LICENSE") if key in by_name}
            metadata, licence = (read[key].read() if read.get(key) else b"" for key in ("PKG-INFO", "LICENSE"))
    return names, HeaderParser().parsestr(metadata.decode()), licence


def faults(file: Path, version: str) -> Iterator[str]:
    """Say what is wrong with a distribution."""
    names, metadata, licence = contents(file)
    yield from (f"has no {field}" for field in FIELDS if not metadata.get(field))
    if metadata.get("Version") != version:
        yield f"is version {metadata.get('Version')}, the core is {version}"
    if b"Apache License" not in licence:
        yield "has no licence text"
    if file.suffix == ".whl":
        yield from (f"holds {name}" for name in names if STRANGE.search(name))
        if not any(name.endswith("/py.typed") for name in names):
            yield "has no py.typed"
    for requirement in metadata.get_all("Requires-Dist") or []:
        if requirement.startswith("shared-core") and f"=={version}" not in requirement.replace(" ", ""):
            yield f"needs {requirement}, and not the core of its own version"


def pythons(uv: Path) -> dict[str, str]:
    """Find an interpreter of each version that is installed."""
    found = {}
    for version in VERSIONS:
        command = [uv, "python", "find", "--no-python-downloads", "--system", version]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            found[version] = done.stdout.strip()
    return found


def install(uv: Path, python: str, dist: Path, room: Path) -> Path:
    """Install every wheel into an empty environment and try each; return the environment."""
    run(uv, "venv", "--quiet", "--python", python, room)
    here = room / ("Scripts" if os.name == "nt" else "bin")
    wheels = sorted(dist.glob("*.whl"))
    run(uv, "pip", "install", "--quiet", "--python", here / "python", "-c", ROOT / "constraints.txt", *wheels)
    run(uv, "pip", "check", "--quiet", "--python", here / "python")
    for folder in projects():
        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        module = folder.name.replace("-", "_") if folder.name != "shared" else "shared_core"
        run(here / "python", "-c", f"import {module}; [getattr({module}, name) for name in {module}.__all__]", cwd=room)
        said = run(here / project["name"], "--version", cwd=room).strip()
        if folder.name != "shared" and said != f"{project['name']} {project['version']}":
            raise SystemExit(f"{project['name']} --version says '{said}'")
        run(here / project["name"], "--help", cwd=room)
    return here / "python"


def bill_of_pins(tools: Path, scratch: Path) -> dict[str, object]:
    """List all that is pinned, with its address (purl) and, of what is installed here, its licence."""
    pinned, installed = scratch / "pinned.json", scratch / "installed.json"
    make = (tools / "cyclonedx-py", "--output-reproducible", "-o")
    run(make[0], "requirements", ROOT / "constraints.txt", *make[1:], pinned)
    run(make[0], "environment", sys.executable, *make[1:], installed)
    known = {
        component["purl"]: component["licenses"]
        for component in json.loads(installed.read_text(encoding="utf-8"))["components"]
        if "purl" in component and "licenses" in component
    }
    bill = json.loads(pinned.read_text(encoding="utf-8"))
    for component in bill["components"]:
        if licences := known.get(component["purl"]):
            component["licenses"] = licences
    return bill


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("uv", type=Path)
    parser.add_argument("tools", type=Path, help="bin folder that has twine and cyclonedx-py")
    asked = parser.parse_args()
    dist = ROOT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    version = tomllib.loads((ROOT / "shared" / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    if f"## {version}" not in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"):
        raise SystemExit(f"CHANGELOG.md has nothing on {version}")
    with tempfile.TemporaryDirectory() as scratch:
        build(asked.uv, dist)
        build(asked.uv, Path(scratch) / "again")
        first, second = digests(dist), digests(Path(scratch) / "again")
        if len(first) != 2 * len(projects()):
            raise SystemExit(f"{len(first)} files in dist, expected a wheel and a source distribution of each")
        different = sorted(name for name in first if first[name] != second.get(name))
        if different:
            raise SystemExit(f"two builds differ: {', '.join(different)}")
        print(f"{len(first)} files, built twice, the same to the byte")
        wrong = [f"{name} {fault}" for name in sorted(first) for fault in faults(dist / name, version)]
        if wrong:
            raise SystemExit("\n".join(wrong))
        print("metadata, licences and contents are in order")
        run(asked.tools / "twine", "check", "--strict", *(dist / name for name in sorted(first)))
        print("descriptions render")
        sbom = dist / "sbom"
        sbom.mkdir()
        for number, python in pythons(asked.uv).items():
            installed = install(asked.uv, python, dist, Path(scratch) / number)
            print(f"Python {number}: all installed together, checked, imported and asked for their version")
            bill = sbom / f"python-{number}.cdx.json"
            run(asked.tools / "cyclonedx-py", "environment", "--output-reproducible", "-o", bill, installed)
            print(f"{bill.relative_to(ROOT)}: {len(json.loads(bill.read_text())['components'])} components")
        bill = bill_of_pins(asked.tools, Path(scratch))
        (dist / "sbom.json").write_text(json.dumps(bill, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        with_licence = sum("licenses" in component for component in bill["components"])
        print(f"dist/sbom.json: {len(bill['components'])} pinned, the licence of {with_licence} known")
    (dist / "SHA256SUMS").write_text("".join(f"{digest}  {name}\n" for name, digest in sorted(first.items())))
    print("dist/SHA256SUMS")


if __name__ == "__main__":
    sys.exit(main())
