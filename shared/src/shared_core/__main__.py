"""The core's own command line: ``shared-core data list|path|verify|fetch``."""

from __future__ import annotations

from shared_core.cli import CommandLine
from shared_core.data.cli import register

line = CommandLine("shared-core", help="Data sets of the ten methods: where they are, whether they are whole.")
register(line.app)
main = line.main

if __name__ == "__main__":
    main()
