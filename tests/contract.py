"""What the cross-package tests know of a package."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

from shared_core.cli import CommandLine
from shared_core.testing import Program

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Package:
    """One package under the contract. `contract.toml` in its folder says what the suite cannot guess."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def import_name(self) -> str:
        return self.name.replace("-", "_")

    @property
    def source(self) -> Path:
        return self.folder / "src" / self.import_name

    @property
    def contract(self) -> dict[str, object]:
        return tomllib.loads((self.folder / "contract.toml").read_text(encoding="utf-8"))

    @property
    def project(self) -> dict[str, object]:
        return tomllib.loads((self.folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    def module(self) -> ModuleType:
        return import_module(self.import_name)

    def line(self) -> CommandLine:
        return import_module(f"{self.import_name}.cli").line

    def script(self, *args: object, folder: Path) -> Program:
        """Begin to run the command line in a process of its own."""
        return Program(f"from {self.import_name}.cli import main; main()", *args, folder=folder)


ALL = [Package(path.parent) for path in sorted(ROOT.glob("packages/*/pyproject.toml"))]
