"""What users name on a command line as ``package.module:function`` or ``path/to/file.py:function``."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

from shared_core.errors import InputError

__all__ = ["load_function", "one_line"]


def one_line(error: BaseException) -> str:
    r"""Write an exception of a user's code in one line: its type and what it says.

    Parameters
    ----------
    error : raised

    Examples
    --------
    >>> one_line(ValueError("two\nlines"))
    'ValueError: two lines'
    """
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def load_function(name: str, what: str = "a function that returns a torch.nn.Module") -> Callable[..., Any]:
    """Import what a user named; modules in the current folder are found too.

    Parameters
    ----------
    name : ``package.module:function``, or ``path/to/file.py:function``; a class, or ``Outer.inner``, will do too
    what : it is, for messages

    Returns
    -------
    The function or class.

    Raises
    ------
    InputError
        When there is no such module, file or function, or importing it fails.

    Examples
    --------
    >>> load_function("torch.nn:Linear")(3, 2)
    Linear(in_features=3, out_features=2, bias=True)
    """
    place, colon, attribute = name.rpartition(":")
    if not colon or not place or not attribute:
        raise InputError(f"'{name}' names nothing; write package.module:function or path/to/file.py:function, {what}")
    found: Any = _from_file(Path(place), name) if place.endswith(".py") else _from_module(place, name)
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = [key for key in vars(found) if not key.startswith("_")]
            close = difflib.get_close_matches(part, public, n=1)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            raise InputError(f"{name}: '{place}' has no '{attribute}'{hint}")
        found = getattr(found, part)
    if not callable(found) or isinstance(found, ModuleType):
        raise InputError(f"{name}: '{attribute}' is a {type(found).__name__}, not {what}")
    return found


def _from_module(place: str, name: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(place)
    except ImportError as error:
        raise InputError(
            f"{name}: cannot import '{place}' ({one_line(error)}); is it installed, or in the current folder?"
        ) from error
    except Exception as error:  # importing runs the user's code
        raise InputError(f"{name}: importing '{place}' fails: {one_line(error)}") from error


def _from_file(path: Path, name: str) -> ModuleType:
    if not path.is_file():
        raise InputError(f"{name}: there is no file {path}; check the path")
    # Two files of one name are two modules.
    key = f"_user_{path.stem}_{sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(key, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickling look a module up by its name.
    sys.modules[key] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # importing runs the user's code
        del sys.modules[key]
        raise InputError(f"{name}: running {path} fails: {one_line(error)}") from error
    return module
