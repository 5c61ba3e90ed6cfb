"""One grammar for every command line: options, config files, output, errors and interruption are decided here, once.

A package describes each command by a frozen pydantic model and a function; the options, ``--help``,
``--print-config`` and the messages about wrong values all follow from the model.

    line = CommandLine("my-method", help="What it is for.")

    class FitConfig(CommandConfig):
        table: Path = argument("CSV file with the data")
        hidden: int = Field(64, ge=1, description="hidden units")

    @line.command(FitConfig)
    def fit(config: FitConfig, session: Session) -> Outcome:
        '''Fit a model to a table.'''
        ...

    main = line.main
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import json
import os
import shlex
import sys
import time
import tomllib
import types
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    NoReturn,
    Protocol,
    TypeVar,
    cast,
    get_args,
    get_origin,
    runtime_checkable,
)

import typer
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator
from pydantic_core import ErrorDetails, PydanticUndefined

from shared_core.errors import InputError
from shared_core.runs import Claim, Result, Run, Summary
from shared_core.workers import Workers

if TYPE_CHECKING:
    import torch
    from pydantic.fields import FieldInfo

    from shared_core.device import World

__all__ = ["Advance", "CommandConfig", "CommandLine", "Outcome", "Session", "argument", "exit_on_error"]

_Config = TypeVar("_Config", bound="CommandConfig")
_INTERRUPTED = 130


def argument(description: str, default: Any = PydanticUndefined, **constraints: Any) -> Any:
    """Declare a field that is given by position on the command line, not by an option."""
    return Field(default, description=description, json_schema_extra={"argument": True}, **constraints)


class CommandConfig(BaseModel):
    """What every command can be told; a command's own model adds its fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    device: str = Field("auto", description="where to compute: auto, cpu, cuda, cuda:N or mps")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of everything random")
    out: Path | None = Field(None, description="run folder (default: a new one under runs/)")

    @field_validator("*", mode="before")
    @classmethod
    def _split_lists(cls, value: object, info: Any) -> object:
        annotation = cls.model_fields[info.field_name].annotation
        if isinstance(value, str) and any(get_origin(part) in {list, tuple} for part in _union_parts(annotation)):
            return [part.strip() for part in value.split(",") if part.strip()]
        return value


@dataclass
class Outcome:
    """What a command found: rows for the table, claims held against the paper, and lines for a person to read."""

    results: Sequence[Result] = ()
    claims: Sequence[Claim] = ()
    notes: Sequence[str] = ()


@runtime_checkable
class Advance(Protocol):
    """Tells the progress bar that `steps` more are done, with a short note such as the current loss."""

    def __call__(self, steps: float = 1, *, note: str = "") -> None:
        """Tell it."""


@dataclass
class Session:
    """What a running command has at hand besides its configuration."""

    run: Run
    device: torch.device
    world: World
    quiet: bool = False
    resumed: bool = False

    def say(self, text: str) -> None:
        """Print a line for a person, on stderr, unless ``--quiet`` was given."""
        if not self.quiet and self.world.is_main:
            print(text, file=sys.stderr, flush=True)  # noqa: T201

    @contextlib.contextmanager
    def progress(self, description: str, total: float, done: float = 0) -> Generator[Advance]:
        """Show a bar with the time left on a terminal; elsewhere, and with ``--quiet``, show nothing."""
        if self.quiet or not self.world.is_main or not sys.stderr.isatty():
            yield _advance_silently
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(description, total=total, completed=cast("int", done), note="")

            def advance(steps: float = 1, *, note: str = "") -> None:
                bar.update(task, advance=steps, note=note)

            yield advance


def _advance_silently(steps: float = 1, *, note: str = "") -> None:
    del steps, note


@contextlib.contextmanager
def exit_on_error(prefix: str) -> Generator[None]:
    """Turn wrong input into exit status 2 with one line on stderr; anything else goes up with its traceback."""
    try:
        yield
    except InputError as error:
        _fail(prefix, str(error))
    except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as error:
        _fail(prefix, f"{error.filename}: {error.strerror}; check the path")


def _fail(prefix: str, message: str) -> NoReturn:
    print(f"{prefix}: {' '.join(message.split())}", file=sys.stderr)  # noqa: T201
    raise SystemExit(2)


class CommandLine:
    """A package's command line: register commands with :meth:`command`, run it with :meth:`main`.

    Parameters
    ----------
    package : distribution name, which is also the console script's name
    help : what the package is for, shown by ``--help``
    """

    def __init__(self, package: str, *, help: str) -> None:  # noqa: A002
        self.package = package
        self.configs: dict[str, type[CommandConfig]] = {}
        # The parser, made at the first call: those who call often, tests and notebooks, wait for it once.
        self._built: Any = None
        self.app = typer.Typer(
            name=package, help=help, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
        )

        @self.app.callback(invoke_without_command=True)
        def root(  # pyright: ignore[reportUnusedFunction]
            context: typer.Context,
            version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
            print_config: Annotated[
                bool, typer.Option("--print-config", help="Print every command's settings as TOML and stop.")
            ] = False,
        ) -> None:
            if version:
                self._print_version()
            elif print_config:
                for name, config in self.configs.items():
                    print(f"[{name}]\n{_to_toml(config, {})}")  # noqa: T201
            elif context.invoked_subcommand is None:
                print(context.get_help())  # noqa: T201

    @property
    def version(self) -> str:
        """The installed version of the package."""
        return metadata.version(self.package)

    def _print_version(self) -> NoReturn:
        print(f"{self.package} {self.version}")  # noqa: T201
        raise typer.Exit

    def command(
        self, config_type: type[_Config], *, name: str | None = None, spread: bool = False
    ) -> Callable[[Callable[[_Config, Session], Outcome]], Callable[[_Config, Session], Outcome]]:
        """Register a function as a command whose options are the fields of `config_type`.

        With ``spread`` it has ``--workers`` and ``--ray`` too, and gives its independent pieces to `Run.spread`.
        """

        def register(function: Callable[[_Config, Session], Outcome]) -> Callable[[_Config, Session], Outcome]:
            command = name or function.__name__.replace("_", "-")
            self.configs[command] = config_type

            def run(**values: Any) -> None:
                self._invoke(command, config_type, function, values)

            parameters = _parameters(config_type, spread=spread)
            run.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
            run.__annotations__ = {p.name: p.annotation for p in parameters}
            run.__doc__ = function.__doc__
            self.app.command(command)(run)
            self._built = None
            return function

        return register

    def main(self, args: Sequence[str] | None = None) -> NoReturn:
        """Run the command line and leave with the status the house's contract gives."""
        try:
            if self._built is None:
                self._built = typer.main.get_command(self.app)
            given = None if args is None else list(args)
            status = self._built.main(args=given, prog_name=self.package, standalone_mode=False)
        except KeyboardInterrupt:
            _stop_interrupted(f"{self.package}: interrupted before anything was written")
        except Exception as error:
            # Typer's own usage errors: recognised by shape, because some of its versions carry a private click.
            if (format_message := getattr(error, "format_message", None)) is None:
                if type(error).__name__ == "Abort":
                    _stop_interrupted(f"{self.package}: interrupted before anything was written")
                raise
            context = getattr(error, "ctx", None)
            where = context.command_path if context is not None else self.package
            _fail(where, f"{format_message()}; see '{where} --help'")
        raise SystemExit(status if isinstance(status, int) else 0)

    def _invoke(
        self,
        command: str,
        config_type: type[_Config],
        function: Callable[[_Config, Session], Outcome],
        values: dict[str, Any],
    ) -> None:
        if values.pop("version"):
            self._print_version()
        as_json, quiet, print_config = values.pop("json"), values.pop("quiet"), values.pop("print_config")
        resume, overwrite, file = values.pop("resume"), values.pop("overwrite"), values.pop("config")
        count, ray = values.pop("workers", None), values.pop("ray", None)
        prog = f"{self.package} {command}"
        run: Run | None = None
        try:
            with exit_on_error(prog):
                given = {key: value for key, value in values.items() if value is not None}
                settings = _read_config(file, self.configs, command) if file else {}
                places = dict.fromkeys(settings, str(file)) | dict.fromkeys(given)
                settings |= given
                out = Path(settings["out"]) if settings.get("out") else None
                if resume:
                    out = out or self._newest_interrupted(command)
                    settings = Run.stored_config(out, package=self.package, command=command) | settings
                if print_config:
                    print(_show_config(config_type, settings, places, as_json))  # noqa: T201
                    return
                config = _validate(config_type, settings, places)
                workers = _workers(count, ray)
                stdout = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
                with stdout, self._session(command, config, out, quiet, resume, overwrite, workers) as session:
                    run = session.run
                    outcome = function(config, session)
                    summary = run.finish(outcome.results, outcome.claims)
                    main_process = session.world.is_main
                if main_process:
                    if as_json:
                        print(json.dumps(summary.model_dump(), indent=2, allow_nan=False))  # noqa: T201
                    elif not quiet:
                        _show(summary, outcome.notes, run.folder)
        except KeyboardInterrupt:
            if run is None:
                _stop_interrupted(f"{prog}: interrupted before anything was written")
            again = shlex.join([*prog.split(), "--resume", "--out", str(run.folder)])
            _stop_interrupted(f"{prog}: interrupted; what was done is kept. Continue with: {again}")

    @contextlib.contextmanager
    def _session(
        self,
        command: str,
        config: CommandConfig,
        out: Path | None,
        quiet: bool,
        resume: bool,
        overwrite: bool,
        workers: Workers,
    ) -> Generator[Session]:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            if out is None:
                raise InputError("several processes share one run folder: name it with --out")
            if workers.spreads:
                raise InputError("--workers and --ray are for one process: leave them out under torchrun")
        out = out or self._runs() / f"{command}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        from shared_core.device import process_group, resolve_device

        device = resolve_device(config.device)
        with process_group(device) as world:
            plain: dict[str, JsonValue] = config.model_dump(mode="json", exclude={"out"})
            run = Run(
                out,
                package=self.package,
                version=self.version,
                command=command,
                config=plain,
                seed=config.seed,
                device=str(device),
                resume=resume,
                overwrite=overwrite,
                writes=world.is_main,
                workers=workers,
            )
            # The others must not look into the folder before the first has put it in order.
            world.barrier()
            yield Session(run, device, world, quiet, resume)

    def _runs(self) -> Path:
        return Path("runs") / self.package

    def _newest_interrupted(self, command: str) -> Path:
        found = [path.parent for path in self._runs().glob(f"{command}-*/config.json")]
        found = [path for path in found if not (path / "summary.json").exists()]
        if not found:
            raise InputError(f"no interrupted run of '{command}' under {self._runs()}; name its folder with --out")
        return max(found, key=lambda path: path.stat().st_mtime)


def _workers(count: str | None, ray: str | None) -> Workers:
    # On a cluster, as many as it takes unless told otherwise.
    number = ("1" if ray is None else "0") if count is None else count
    if not number.isdecimal():
        raise InputError(f"--workers must be 0 (all cores) or more, got {number}")
    return Workers(int(number), ray)


def _stop_interrupted(message: str) -> NoReturn:
    print(f"\n{message}", file=sys.stderr)  # noqa: T201
    raise SystemExit(_INTERRUPTED)


def _union_parts(annotation: object) -> tuple[object, ...]:
    is_union = get_origin(annotation) is types.UnionType or str(get_origin(annotation)) == "typing.Union"
    return get_args(annotation) if is_union else (annotation,)


def _metavar(info: FieldInfo) -> str:
    names: list[str] = []
    for part in _union_parts(info.annotation):
        if part is types.NoneType:
            continue
        if get_origin(part) is Literal:
            names.append("|".join(str(choice) for choice in get_args(part)))
        elif get_origin(part) in {list, tuple}:
            names.append(f"{getattr(get_args(part)[0], '__name__', 'TEXT').upper()},...")
        else:
            names.append({"str": "TEXT"}.get(name := getattr(part, "__name__", "VALUE"), name.upper()))
    return "|".join(names)


def _parameters(config_type: type[CommandConfig], *, spread: bool = False) -> list[inspect.Parameter]:
    # Values arrive as text and pydantic alone parses them, so that every wrong value gets the same kind of message.
    def parameter(name: str, annotation: object, info: object, default: object) -> inspect.Parameter:
        return inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[annotation, info]
        )

    arguments: list[inspect.Parameter] = []
    options: list[inspect.Parameter] = []
    for name, info in config_type.model_fields.items():
        description, flag = info.description or "", "--" + name.replace("_", "-")
        shown = None if info.is_required() or info.default in (None, ()) else _plain(info.default)
        described = description if shown is None else f"{description} [default: {shown}]"
        if isinstance(info.json_schema_extra, dict) and info.json_schema_extra.get("argument"):
            arguments.append(parameter(name, str | None, typer.Argument(help=described, metavar=name.upper()), None))
        elif info.annotation is bool:
            described = f"{description} [default: {'yes' if info.default else 'no'}]"
            options.append(parameter(name, bool | None, typer.Option(f"{flag}/--no-{flag[2:]}", help=described), None))
        else:
            described += " [required]" if info.is_required() else ""
            options.append(
                parameter(name, str | None, typer.Option(flag, help=described, metavar=_metavar(info)), None)
            )
    if spread:
        for flag, metavar, help_text in (
            ("workers", "INT", "Pieces of work at a time, each in a process; 0 for all cores. [default: 1]"),
            ("ray", "ADDRESS", "Spread the work over this Ray cluster; 'local' starts one here."),
        ):
            options.append(
                parameter(flag, str | None, typer.Option(f"--{flag}", help=help_text, metavar=metavar), None)
            )
    common: list[tuple[str, object, str]] = [
        ("config", Path | None, "TOML file with settings; options given here win over it."),
        ("resume", bool, "Continue the interrupted run in --out (default: the newest one)."),
        ("overwrite", bool, "Start over where --out holds an interrupted run."),
        ("json", bool, "Print exactly one JSON document on stdout."),
        ("quiet", bool, "Print nothing but errors."),
        ("print-config", bool, "Print the settings as TOML and stop."),
        ("version", bool, "Print the version and stop."),
    ]
    for flag, annotation, help_text in common:
        name, default = flag.replace("-", "_"), False if annotation is bool else None
        options.append(parameter(name, annotation, typer.Option(f"--{flag}", help=help_text), default))
    return arguments + options


def _plain(value: object) -> str:
    return (
        ",".join(str(part) for part in cast("list[object]", value)) if isinstance(value, list | tuple) else str(value)
    )


def _read_config(file: Path, commands: Mapping[str, object], command: str) -> dict[str, Any]:
    try:
        settings = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--config {file}: {error.strerror or error}; give a readable TOML file") from error
    except UnicodeDecodeError as error:
        raise InputError(f"--config {file}: byte {error.start} is not UTF-8 text; give a TOML file") from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InputError(f"--config {file}: not valid TOML: {error}") from error
    # One file may hold a table for each command, as the bare --print-config prints them.
    if settings and all(isinstance(value, dict) and key in commands for key, value in settings.items()):
        return dict(settings.get(command, {}))
    return settings


def _validate(config_type: type[_Config], settings: Mapping[str, Any], places: Mapping[str, str | None]) -> _Config:
    try:
        return config_type.model_validate(dict(settings))
    except ValidationError as error:
        # A key that does not exist is the likelier mistake than one that is missing.
        details = sorted(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
        raise InputError(_explain(config_type, details[0], places)) from error


def _explain(config_type: type[CommandConfig], error: ErrorDetails, places: Mapping[str, str | None]) -> str:
    key = str(error["loc"][0]) if error["loc"] else ""
    info = config_type.model_fields.get(key)
    is_argument = info is not None and isinstance(info.json_schema_extra, dict) and "argument" in info.json_schema_extra
    flag = key.upper() if is_argument else "--" + key.replace("_", "-")
    if error["type"] == "missing":
        return f"{flag} is missing: {info.description if info else ''}"
    if error["type"] == "extra_forbidden":
        close = difflib.get_close_matches(key, config_type.model_fields, n=1)
        hint = f"did you mean '{close[0]}'?" if close else "known: " + ", ".join(config_type.model_fields)
        return f"{places.get(key) or 'settings'}: unknown key '{key}'; {hint}"
    message = error["msg"].removeprefix("Value error, ")
    where = f"{places[key]}: key '{key}'" if places.get(key) else flag
    return f"{where}: {message}, got {error['input']!r}" if key else message


def _show_config(
    config_type: type[CommandConfig], settings: Mapping[str, Any], places: Mapping[str, str | None], as_json: bool
) -> str:
    try:
        shown = config_type.model_validate(dict(settings)).model_dump(mode="json")
    except ValidationError as error:
        wrong = [detail for detail in error.errors() if detail["type"] != "missing"]
        if wrong:
            raise InputError(_explain(config_type, wrong[0], places)) from error
        shown = dict(settings)
    if as_json:
        defaults = {k: f.default for k, f in config_type.model_fields.items() if not f.is_required()}
        return json.dumps(defaults | shown, indent=2, default=str)
    return _to_toml(config_type, shown)


def _to_toml(config_type: type[CommandConfig], settings: Mapping[str, Any]) -> str:
    lines: list[str] = []
    for key, info in config_type.model_fields.items():
        value = settings.get(key, None if info.is_required() else info.default)
        required = " (required)" if info.is_required() else ""
        lines.append(f"# {info.description}{required}")
        lines.append(f"# {key} =" if value is None else f"{key} = {_toml_value(value)}")
    return "\n".join(lines) + "\n"


def _toml_value(value: object) -> str:
    match value:
        case bool():
            return str(value).lower()
        case int() | float():
            return repr(value)
        case list() | tuple():
            return "[" + ", ".join(_toml_value(part) for part in cast("Sequence[object]", value)) + "]"
        case _:
            return json.dumps(str(value), ensure_ascii=False)


def _show(summary: Summary, notes: Sequence[str], folder: Path) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    if summary.results:
        table = Table(box=None, header_style="bold", pad_edge=False)
        for column in ("dataset", "method", "metric", "mean", "95 % interval", "n", "seconds"):
            table.add_column(column, justify="left" if column in {"dataset", "method", "metric"} else "right")
        best = _best(summary.results)
        for row in summary.results:
            arrow = "lower is better" if row.better == "lower" else "higher is better"
            unit = "" if row.unit == "1" else f" [{row.unit}]"
            bounds = "" if row.low is None or row.high is None else f"{row.low:.4g} .. {row.high:.4g}"
            style = "bold" if row in best else ""
            cells = (row.dataset, row.method, f"{row.metric}{unit} ({arrow})", f"{row.mean:.4g}", bounds)
            table.add_row(*map(escape, cells), str(row.n), f"{row.seconds:.1f}", style=style)
        console.print(table)
    for claim in summary.claims:
        value = "" if claim.value is None else f" (measured {claim.value:.4g}"
        value += (
            "" if claim.value is None else ")" if claim.threshold is None else f", held against {claim.threshold:.4g})"
        )
        console.print(f"{'holds:         ' if claim.holds else 'does not hold: '}{claim.text}{value}", markup=False)
    for note in notes:
        console.print(note, markup=False, soft_wrap=True)
    for name in summary.artifacts:
        console.print(f"wrote {folder / name}", markup=False, soft_wrap=True)
    console.print(f"run folder: {folder}", markup=False, soft_wrap=True)


def _best(results: Sequence[Result]) -> list[Result]:
    groups: dict[tuple[str, str], list[Result]] = {}
    for row in results:
        groups.setdefault((row.dataset, row.metric), []).append(row)
    return [
        (min if rows[0].better == "lower" else max)(rows, key=lambda row: row.mean)
        for rows in groups.values()
        if len(rows) > 1
    ]
