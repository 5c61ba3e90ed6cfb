"""Say whose a distribution's name is on the index, before anything is uploaded under it.

    scripts/name_owner.py NAME

Prints ``free`` (nobody's), ``ours`` (its newest release is one of this repository's) or ``taken``, and exits 1 for the
last. A release is ours when it is ``shared-core`` with this repository's modules, or depends on ``shared-core``.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path

CORE = "shared-core"
CORE_MODULES = {"shared_core/cli.py", "shared_core/runs.py", "shared_core/episodes.py"}


def owner(name: str) -> str:
    """Return "free", "ours" or "taken", as pip with its settings finds the name.

    Parameters
    ----------
    name : of a distribution
    """
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *pip,
            "download",
            "--quiet",
            "--no-deps",
            "--pre",
            "--ignore-requires-python",
            "--dest",
            folder,
            name,
        ]
        done = subprocess.run([*command, "--only-binary=:all:"], capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode == 0 and wheels:
            return "ours" if _is_ours(wheels[0], name) else "taken"
        if not re.search(r"No matching distribution|Could not find a version", done.stderr):
            raise SystemExit(f"{name}: the index did not answer: {done.stderr.strip()[-300:]}")
        # There may be sources only, which are not run to read them: whoever has them has the name.
        listed = subprocess.run([*pip, "index", "versions", "--pre", name], capture_output=True, text=True, check=False)
        return "taken" if listed.returncode == 0 else "free"


def _is_ours(wheel: Path, name: str) -> bool:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        if name == CORE:
            return names >= CORE_MODULES
        metadata = next(entry for entry in names if entry.endswith(".dist-info/METADATA"))
        required = HeaderParser().parsestr(archive.read(metadata).decode()).get_all("Requires-Dist") or []
    return any(re.split(r"[\[<>=!~; ]", text)[0] == CORE for text in required)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    found = owner(sys.argv[1])
    print(f"{sys.argv[1]}: {found}")
    sys.exit(found == "taken")
