"""What the tests of all packages begin with: checked shapes, real data, calls of a command line, damaged files.

Needs pytest and hypothesis; nothing else of the core imports it. A package's ``tests/conftest.py`` is

    import ial_nap
    from shared_core.testing import check_shapes, data_folder as data_folder, unchecked as unchecked

    check_shapes(ial_nap)
"""

from __future__ import annotations

import atexit
import contextlib
import gzip
import io
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
import zipfile
import zlib
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import jaxtyping
import pytest
import torch

from shared_core.cli import CommandLine
from shared_core.errors import InputError
from shared_core.runs import Result, Summary

if TYPE_CHECKING:
    from hypothesis import settings
    from hypothesis.strategies import DataObject, DrawFn, SearchStrategy
    from matplotlib.figure import Figure

__all__ = [
    "Caller",
    "Program",
    "Readers",
    "check_shapes",
    "data_folder",
    "figures",
    "fuzz",
    "fuzz_file",
    "in_two_processes",
    "keep_figures",
    "misplaced",
    "mutations",
    "survives",
    "unchecked",
    "visible_texts",
]

_ROOM = 3 << 30
_HOSTILE_NUMBERS = ("0", "-1", "1e400", "nan", "0.5", "99999999999", "9223372036854775808", "1" * 400)
_HOSTILE_BYTES = (
    *(number.encode() for number in _HOSTILE_NUMBERS),
    *(
        b"",
        b"\0",
        b"\xff" * 4,
        b"\x7f" + b"\xff" * 7,
        b"\xff" * 8,
        b"\xed\xa0\x80",
        b'"',
        b"'",
        b",",
        b"\n",
        b"\r",
        b"::",
    ),
    *(b"[" * 2000, b"{" * 2000, b"<f8", b"|O8", b"|S0", b"null", b"true", b"../../x", b"=1+1", b"\xef\xbb\xbf"),
)
_HOSTILE_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1.5, 10**30, -(10**9), 1e308, float("nan"), float("inf"), "", "x", "\0", "\ud800"),
    *("../../x", "1" * 400, [], {}, [[]], [0] * 100, {"x": None}, [None], ["x", 1], {"": {}}),
)


def check_shapes(package: ModuleType, *, leave_out: Collection[str] = ()) -> None:
    """Check shapes and types in calls of a package's functions from here on.

    Besides, torch is kept to one thread, and hypothesis lets an example take as long as it takes: a busy machine is no
    fault of what is tested.

    Call it before anything else of the package is imported. Only modules that have shapes in their signatures are
    checked: for the types of others, which the type checker sees, every call would pay.

    Parameters
    ----------
    package : imported, with a lazy ``__init__``
    leave_out : modules that cannot be checked, such as ``networks`` where torch.fx calls forward passes with proxies
    """
    from hypothesis import settings

    # Inherited by child processes: threads that only wait for each other make small models many times slower.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    settings.register_profile("patient", deadline=None)
    settings.load_profile("patient")
    root = Path(next(iter(package.__path__)))
    files = {".".join(path.relative_to(root).with_suffix("").parts): path for path in sorted(root.rglob("*.py"))}
    names = [
        f"{package.__name__}.{name.removesuffix('.__init__')}"
        for name, path in files.items()
        if name not in {"__init__", "cli", *leave_out} and "from jaxtyping import" in path.read_text(encoding="utf-8")
    ]
    jaxtyping.install_import_hook(names, typechecker="beartype.beartype")


@pytest.fixture
def unchecked() -> Generator[None]:
    """Switch run-time checks of shapes off: bad input must meet the function's own message."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Return the folder of real data sets, or skip and say how to get it."""
    folder = os.environ.get("SHARED_CORE_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("needs real data: set SHARED_CORE_DATA to a folder that holds the official files")
    return Path(folder)


def figures(summary: Summary) -> list[Result]:
    """Return the results of a run without their times: equal where two runs found the same.

    Parameters
    ----------
    summary : of the run
    """
    return [row.model_copy(update={"seconds": 0.0}) for row in summary.results]


def keep_figures(monkeypatch: pytest.MonkeyPatch, plots: ModuleType, *, write: bool = True) -> list[Figure]:
    """Collect the figures that a module saves, to look at their parts.

    Parameters
    ----------
    monkeypatch : of pytest
    plots : module whose functions call `shared_core.plots.save_figure`, or let that module do it
    write : write them too; it takes longer than all else

    Returns
    -------
    A list that fills.
    """
    import shared_core.plots

    kept: list[Figure] = []
    original = shared_core.plots.save_figure

    def save(figure: Figure, path: str | Path) -> Path:
        kept.append(figure)
        return original(figure, path) if write else Path(path)

    for module in (plots, shared_core.plots):
        monkeypatch.setattr(module, "save_figure", save)
    return kept


def visible_texts(figure: Figure) -> list[tuple[str, Any]]:
    """Return every text that is seen in a figure, with its box in pixels.

    Parameters
    ----------
    figure : of matplotlib
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    hidden = set[int]()
    for line in [line for axes in figure.axes for line in (axes.xaxis, axes.yaxis)]:
        low, high = sorted(line.get_view_interval())
        # Ticks beyond the view keep their text but are not drawn.
        for tick in [*line.get_major_ticks(), *line.get_minor_ticks()]:
            if not (low <= tick.get_loc() <= high and line.get_visible() and line.axes.axison):
                hidden |= {id(tick.label1), id(tick.label2)}
    found: list[tuple[str, Any]] = []
    for text in figure.findobj(Text):
        box = Text.get_window_extent(text, renderer)  # an annotation's own has its arrow in it
        if text.get_visible() and text.get_text().strip() and box.width > 0 and id(text) not in hidden:
            found.append((text.get_text(), box))
    return found


def misplaced(figure: Figure) -> list[tuple[str, str]]:
    """Name pairs of texts of a figure that cover each other, and texts beyond the edge of the page.

    Parameters
    ----------
    figure : of matplotlib
    """
    boxes, edge = visible_texts(figure), figure.bbox
    beyond = [
        (text, "the edge")
        for text, box in boxes
        if box.x0 < edge.x0 - 1 or box.x1 > edge.x1 + 1 or box.y0 < edge.y0 - 1 or box.y1 > edge.y1 + 1
    ]
    return beyond + [
        (a, b)
        for place, (a, one) in enumerate(boxes)
        for b, two in boxes[place + 1 :]
        if min(one.x1, two.x1) - max(one.x0, two.x0) > 1 and min(one.y1, two.y1) - max(one.y0, two.y0) > 1
    ]


class Caller:
    """Calls of a command line in this process, from one folder.

    Parameters
    ----------
    line : of a package
    folder : to call it from
    """

    def __init__(self, line: CommandLine, folder: Path) -> None:
        self.line, self.folder = line, folder

    def __call__(self, *args: object) -> subprocess.CompletedProcess[str]:
        """Call, and return exit status and output.

        Parameters
        ----------
        args : of the command line
        """
        out, err = io.StringIO(), io.StringIO()
        with (
            contextlib.chdir(self.folder),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as stop,
        ):
            self.line.main([str(arg) for arg in args])
        code = stop.value.code
        status = code if isinstance(code, int) else int(code is not None)
        return subprocess.CompletedProcess([str(arg) for arg in args], status, out.getvalue(), err.getvalue())

    def done(self, *args: object) -> Summary:
        """Call with ``--json``, see that it went well, and return what it printed.

        Parameters
        ----------
        args : of the command line
        """
        result = self(*args, "--json")
        assert result.returncode == 0, result.stderr
        return Summary.model_validate_json(result.stdout)

    def wrong(self, *args: object) -> str:
        """Call, see that the input was refused with one line and nothing else, and return that line.

        Parameters
        ----------
        args : of the command line
        """
        result = self(*args)
        assert result.returncode == 2, (result.stdout, result.stderr)
        assert result.stdout == ""
        assert len(result.stderr.strip().splitlines()) == 1, result.stderr
        return result.stderr


# ---- programs in processes of their own

# What they find imported when they begin, most of the seconds that a new interpreter would take: forks of a process
# that has done nothing else.
_IMPORTED = (
    "shared_core.testing",
    "torch._dynamo",
    "torch.distributed.nn",
    "matplotlib.figure",
    "scipy.stats",
    "sklearn.model_selection",
)
_METHOD = "forkserver" if sys.platform == "linux" else "spawn"


class Program:
    """Python source in a process of its own, as by ``python -c``, except that torch and such are imported already.

    Not for one that starts workers: their pool waits for the end of an interpreter, and this one is left at once.

    Parameters
    ----------
    source : Python; it runs as ``__main__``
    args : of the command line
    folder : to run it in
    environment : variables besides those of this process

    Examples
    --------
    >>> Program("import sys; print(sys.argv[1])", "hello").finish().stdout.split()
    ['hello']
    """

    def __init__(
        self, source: str, *args: object, folder: Path | str = ".", environment: Mapping[str, str] | None = None
    ) -> None:
        self.args = [str(arg) for arg in args]
        self._written = tempfile.TemporaryDirectory()
        self._files = [Path(self._written.name) / name for name in ("out", "err")]
        context = multiprocessing.get_context(_METHOD)
        context.set_forkserver_preload(list(_IMPORTED))
        variables = dict(os.environ) | dict(environment or {})
        told = (source, self.args, str(Path(folder).resolve()), variables, [str(file) for file in self._files])
        self._process = context.Process(target=_begin, args=told)
        self._process.start()
        # One that nobody waits for, because a test failed before, must not hold up the end of all tests.
        weakref.finalize(self, self._process.kill)

    @property
    def status(self) -> int | None:
        """Its exit status, minus the number of the signal that ended it; None while it runs."""
        return self._process.exitcode

    @property
    def said(self) -> str:
        """What it has written so far."""
        return self._files[0].read_text(encoding="utf-8") if self._files[0].exists() else ""

    def send(self, number: int) -> None:
        """Send a signal, unless it has ended.

        Parameters
        ----------
        number : of the signal
        """
        if self.status is None and self._process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, number)

    def finish(self, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """Wait until it ends, and return exit status and output; kill it when that takes too long.

        Parameters
        ----------
        timeout : seconds

        Raises
        ------
        TimeoutError
            When it had to be killed.
        """
        self._process.join(timeout)
        status = self._process.exitcode
        if status is None:
            self._process.kill()
            self._process.join()
        # A process that was killed at its very start has not opened them.
        out, err = (file.read_text(encoding="utf-8") if file.exists() else "" for file in self._files)
        self._written.cleanup()
        if status is None:
            raise TimeoutError(f"a program ran longer than {timeout:g} s; it wrote {out!r} and {err!r}")
        return subprocess.CompletedProcess(self.args, status, out, err)


def _begin(source: str, args: list[str], folder: str, variables: dict[str, str], written: list[str]) -> None:
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    for number, path in enumerate(written, 1):
        with open(path, "wb") as file:  # noqa: PTH123
            os.dup2(file.fileno(), number)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.argv = ["-c", *args]
    sys.path.insert(0, folder)
    main = sys.modules["__main__"] = ModuleType("__main__")
    try:
        exec(compile(source, "<program>", "exec"), main.__dict__)  # noqa: S102
    finally:
        atexit._run_exitfuncs()  # pyright: ignore[reportPrivateUsage]


def in_two_processes(
    folder: Path, program: str, *args: object, path: Path | None = None, torchrun: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run a program in two processes that train together, and see that it goes well.

    Parameters
    ----------
    folder : to run it in
    program : Python
    args : its arguments
    path : a folder that it may import from
    torchrun : start them by that, as users do, which takes several times as long
    """
    if path is not None:
        program = f"import sys\nsys.path.insert(0, {str(path)!r})\n{program}"
    if torchrun:
        (folder / "together.py").write_text(program, encoding="utf-8")
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "together.py"]
        result = subprocess.run(  # noqa: S603
            [*launch, *map(str, args)],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert result.returncode == 0, result.stderr
        return result
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    both = [
        Program(program, *args, folder=folder, environment=where | {"RANK": rank, "LOCAL_RANK": rank}) for rank in "01"
    ]
    until = time.monotonic() + 300
    while None in (states := [one.status for one in both]) and not any(states) and time.monotonic() < until:
        time.sleep(0.02)
    # The other would wait for the one that failed.
    for one in both:
        one.send(signal.SIGKILL)
    ended = [one.finish() for one in both]
    assert not any(one.returncode for one in ended), "\n".join(one.stderr for one in ended)
    out, err = "".join(one.stdout for one in ended), "".join(one.stderr for one in ended)
    return subprocess.CompletedProcess(both[0].args, 0, out, err)


# ---- damaged and hostile files

_Read = TypeVar("_Read")
_Files: TypeAlias = "tuple[Sequence[Path], Callable[[], object]]"


def fuzz(examples: int) -> settings:
    """Return how a test of hypothesis looks for damage that a reader does not survive; decorate the test with it.

    The same examples every time, so that a test fails for what was changed and for nothing else. To look for more,
    name how many in the environment: ``FUZZ=5000 pytest -k fuzz`` draws that many new ones.

    Parameters
    ----------
    examples : how many
    """
    from hypothesis import HealthCheck, settings

    more = os.environ.get("FUZZ")
    return settings(
        max_examples=int(more or examples),
        derandomize=not more,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
    )


def survives(read: Callable[[], _Read]) -> _Read | None:
    """Read, and see that it went well or that the input was refused in one line: no other error, no huge allocation.

    Parameters
    ----------
    read : calls a reader

    Returns
    -------
    What was read; None when it was refused.
    """
    try:
        with _little_memory():
            return read()
    except InputError as error:
        message = str(error)
        assert message.strip(), "an error says nothing"
        assert len(message.splitlines()) == 1, f"not one line: {message!r}"
        message.encode()
        return None


class Readers:
    """Readers of a package's files, to be tried on valid and on damaged ones.

    It makes the whole of a ``test_fuzz.py``::

        readers = Readers()

        @readers
        def summaries(folder):
            write_summary(folder / "summary.json")
            return [folder / "summary.json"], lambda: read_summary(folder)

        test_valid_files_are_read, test_fuzz = readers.tests(15)
    """

    def __init__(self) -> None:
        self._makers: dict[str, Callable[[Path], _Files]] = {}

    def __call__(self, make: Callable[[Path], _Files]) -> Callable[[Path], _Files]:
        """Take what writes valid files into an empty folder, and returns them with what reads them.

        Parameters
        ----------
        make : its name is shown
        """
        self._makers[make.__name__] = make
        return make

    def tests(self, examples: int) -> tuple[Callable[..., None], Callable[..., None]]:
        """Return a test that reads the valid files, and one that damages them.

        Parameters
        ----------
        examples : of damage for each reader
        """
        from hypothesis import given, strategies

        kept: dict[str, _Files] = {}

        def made(name: str, factory: pytest.TempPathFactory) -> _Files:
            if name not in kept:
                kept[name] = self._makers[name](factory.mktemp(name))
            return kept[name]

        @pytest.mark.parametrize("name", self._makers)
        def valid(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
            made(name, tmp_path_factory)[1]()

        @pytest.mark.usefixtures("unchecked")
        @pytest.mark.parametrize("name", self._makers)
        @fuzz(examples)
        @given(data=strategies.data())
        def damaged(name: str, tmp_path_factory: pytest.TempPathFactory, data: DataObject) -> None:
            files, read = made(name, tmp_path_factory)
            fuzz_file(data, data.draw(strategies.sampled_from(files)), read)

        return valid, damaged


def fuzz_file(draw: DataObject, path: Path, read: Callable[[], object]) -> None:
    """Damage a file, see that a reader survives it, and put the file back.

    Parameters
    ----------
    draw : of ``hypothesis.strategies.data()``
    path : of a valid file
    read : calls a reader that reads it
    """
    valid = path.read_bytes()
    try:
        path.write_bytes(draw.draw(mutations(valid)))
        survives(read)
    finally:
        path.write_bytes(valid)


def mutations(valid: bytes) -> SearchStrategy[bytes]:
    """Draw damaged versions of a file: of its bytes, and of what it holds, packed again as if nothing had happened.

    Members of zip files (NPZ), gzipped content, values in JSON documents (in the header of safetensors too), and words
    and numbers of texts are replaced; bytes are flipped, put in, left out, doubled and cut off.

    Parameters
    ----------
    valid : a file as its writer writes it
    """
    from hypothesis import strategies

    @strategies.composite
    def damaged(draw: DrawFn) -> bytes:
        data = valid
        for _ in range(draw(strategies.integers(1, 3))):
            data = _damaged(draw, data)
        return data

    return damaged()


@contextlib.contextmanager
def _little_memory() -> Generator[None]:
    """Let this process have only little more memory than it has, where the system can do that."""
    if not sys.platform.startswith("linux"):
        yield
        return
    import resource

    had = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (had + _ROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _damaged(draw: DrawFn, data: bytes) -> bytes:
    from hypothesis import strategies

    if draw(strategies.integers(0, 3)):
        with contextlib.suppress(OSError, EOFError, ValueError, RecursionError, zipfile.BadZipFile, zlib.error):
            if data[:2] == b"\x1f\x8b":
                return gzip.compress(_damaged(draw, gzip.decompress(data)), mtime=0)
            if data[:2] == b"PK":
                return _damaged_zip(draw, data)
            if data[:1] in {b"{", b"["}:
                return _damaged_document(draw, json.loads(data))
            length = int.from_bytes(data[:8], "little")
            if 8 < length + 8 <= len(data):
                # The header of safetensors.
                text = _damaged_document(draw, json.loads(data[8 : 8 + length]))
                return len(text).to_bytes(8, "little") + text + data[8 + length :]
    return _damaged_bytes(draw, data)


def _damaged_zip(draw: DrawFn, data: bytes) -> bytes:
    from hypothesis import strategies

    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    if not members:
        return data
    name = draw(strategies.sampled_from(sorted(members)))
    match draw(strategies.integers(0, 9)):
        case 0:
            members.pop(name)
        case 1:
            members[draw(strategies.sampled_from(["../x", "x" * 100, "x.npy"]))] = members.pop(name)
        case 2:
            members[name] = members[draw(strategies.sampled_from(sorted(members)))]
        case _:
            members[name] = _damaged(draw, members[name])
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for each, content in members.items():
            archive.writestr(each, content)
    return packed.getvalue()


def _damaged_document(draw: DrawFn, document: Any) -> bytes:
    """Replace, remove or double one value somewhere in a JSON document, or in a text in it that is one."""
    from hypothesis import strategies

    places: list[tuple[Any, Any]] = []
    waiting = [document]
    while waiting:
        node = waiting.pop()
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                waiting.append(node[key])
    hostile = draw(strategies.sampled_from(_HOSTILE_VALUES))
    if not places:
        return json.dumps(hostile).encode()
    node, key = places[draw(strategies.integers(0, len(places) - 1))]
    value = node[key]
    inner = None
    if isinstance(value, str) and value[:1] in {"{", "["}:
        with contextlib.suppress(ValueError):
            inner = json.loads(value)
    match draw(strategies.integers(0, 5)):
        case _ if inner is not None:
            node[key] = _damaged_document(draw, inner).decode()
        case 0:
            del node[key]
        case 1 if isinstance(node, dict):
            node[draw(strategies.sampled_from(["", "x", "__proto__", "a.b"]))] = value
        case 1 | 2:
            node[key] = [value, value]
        case 3 if isinstance(value, int | float):
            node[key] = value * draw(strategies.sampled_from([-1, 2, 1000, 10**12]))
        case _:
            node[key] = hostile
    return json.dumps(document).encode()


def _damaged_bytes(draw: DrawFn, data: bytes) -> bytes:
    from hypothesis import strategies

    # Headers are short, and what is in them does the most harm.
    end = len(data) if draw(strategies.booleans()) else min(len(data), 160)
    at = draw(strategies.integers(0, end))
    length = draw(strategies.integers(0, 12))
    hostile = draw(strategies.sampled_from(_HOSTILE_BYTES))
    match draw(strategies.integers(0, 8)):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + data[at + length :]
        case 2:
            return data[:at] + data[at : at + 8 * length] + data[at:]
        case 3:
            return data[:at] + draw(strategies.binary(max_size=8)) + data[at + length :]
        case 4:
            return data[:at] + bytes([draw(strategies.integers(0, 255))]) + data[at + 1 :]
        case 5:
            return data[:at] + hostile + data[at:]
        case _:
            # A word or a number, from here on.
            word = re.compile(rb"-?\d[\d.e+-]*|\w+|'[^']*'|\([^)]*\)").search(data, at)
            start, stop = word.span() if word else (at, at + length)
            return data[:start] + hostile + data[stop:]
