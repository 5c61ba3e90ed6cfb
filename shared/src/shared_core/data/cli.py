"""The commands ``shared-core data list|path|verify|fetch``; the only file of the data layer that imports typer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

from shared_core.cli import exit_on_error
from shared_core.data._fetch import fetch
from shared_core.data._registry import available, find, verify
from shared_core.errors import InputError

_Name = Annotated[str, typer.Argument(help="name of a data set, as `list` shows it")]
_Json = Annotated[bool, typer.Option("--json", help="print one JSON document")]


def register(app: typer.Typer) -> None:
    """Add the ``data`` commands to a typer application."""
    data = typer.Typer(help="Data sets: what there is, where it is, whether it is whole.", no_args_is_help=True)
    app.add_typer(data, name="data")
    for name, command in (("list", _list), ("path", _path), ("verify", _verify), ("fetch", _fetch)):
        data.command(name)(command)


def _list(as_json: _Json = False) -> None:
    """List the data sets, and which of them are on this machine."""
    sets = available()
    rows = [
        (s.name, s.kind.__name__, "built in" if s.embedded else str(s.where or "absent"), s.description) for s in sets
    ]
    _print([{**asdict(s), "present": s.present} for s in sets], "name kind where description", rows, as_json)


def _path(name: _Name, as_json: _Json = False) -> None:
    """Print the folder that holds a data set."""
    with exit_on_error("shared-core data path"):
        _print_place(name, find(name), as_json)


def _verify(name: _Name, as_json: _Json = False) -> None:
    """Check the files of a data set against the published checksums, and that every split loads."""
    with exit_on_error("shared-core data verify"):
        report = verify(name)
        rows = [(check.item, check.status, f"{check.size:,}", check.detail) for check in report.checks]
        _print({**asdict(report), "ok": report.ok}, "item status size detail", rows, as_json)
        if not report.ok:
            raise InputError(f"{report.name} is not whole: what is printed above says where")


def _fetch(
    name: Annotated[str, typer.Argument(help="name of a data set, or an http(s) address")],
    checksum: Annotated[str, typer.Option(help="for an address: sha256:... or md5:...")] = "",
    extract: Annotated[bool, typer.Option(help="unpack archives too")] = False,
    as_json: _Json = False,
) -> None:
    """Download a data set from its official address; a cut download goes on where it stopped."""
    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with exit_on_error("shared-core data fetch"):
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task(name, total=None)

            def show(done: int, total: int | None) -> None:
                bar.update(task, completed=done, total=total)

            where = fetch(name, checksum=checksum, extract=extract, progress=show)
        _print_place(name, where, as_json)


def _print_place(name: str, where: object, as_json: bool) -> None:
    typer.echo(json.dumps({"name": name, "where": str(where)}) if as_json else str(where))


def _print(document: object, header: str, rows: Sequence[tuple[str, ...]], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(document, default=lambda value: getattr(value, "__name__", None) or str(value)))
        return
    lines = [tuple(header.split()), *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
