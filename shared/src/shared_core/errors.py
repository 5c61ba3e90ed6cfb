"""The one kind of error that means: the input is wrong, and here is what to do about it."""

from __future__ import annotations

import csv
import difflib
import lzma
import re
import struct
import tarfile
import tokenize
import zipfile
import zlib
from collections.abc import Iterable

__all__ = ["DAMAGE", "InputError", "UnknownKeyError", "no_such", "not_installed"]

_LISTED, _SHOWN = 30, 8

DAMAGE: tuple[type[Exception], ...] = (
    *(OSError, EOFError, ValueError, TypeError, LookupError, RuntimeError, ArithmeticError, MemoryError, SyntaxError),
    *(AttributeError, struct.error, zlib.error, lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError),
    *(csv.Error, tokenize.TokenError),
)
"""What readers of NumPy, zipfile, json and the like raise for damaged files: more than any of them says."""


class InputError(ValueError):
    """What the user gave cannot be used; the message is one line that says where, what, and what to do.

    Command lines turn it into exit status 2 with exactly that line. Method code raises it too: it is a
    ``ValueError``, so nobody who uses a package as a library has to know this class.

    Examples
    --------
    >>> raise InputError("ratings.csv:17: expected 3 fields (user, item, rating), got 2")
    Traceback (most recent call last):
    ...
    shared_core.errors.InputError: ratings.csv:17: expected 3 fields (user, item, rating), got 2
    """

    def __str__(self) -> str:
        """Return the message on one line: what files put into it can neither break it nor steer a terminal."""
        message = re.sub(r"\s*[\r\n]+\s*", " ", " ".join(map(str, self.args)))
        if message.isprintable():
            return message
        return "".join(
            letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in message
        )


class UnknownKeyError(InputError, KeyError):
    """A name (a user, an item, a data set) that is not known; both an ``InputError`` and a ``KeyError``."""

    # ``KeyError`` would put the message in quotes.
    __str__ = InputError.__str__


def no_such(kind: str, name: object, known: Iterable[object], *, where: str = "") -> UnknownKeyError:
    """Return the error that says a name is not known, and which one may have been meant.

    Parameters
    ----------
    kind : what the name would be of: "method", "column", "data set"
    name : what was given
    known : the names there are, in the order to list them; of more than 30, the first 8 are listed
    where : the file and the place in it, put in front

    Examples
    --------
    >>> print(no_such("method", "stampp", ["stamp", "random", "l1"]))
    no method 'stampp'; did you mean 'stamp'? there are stamp, random, l1
    >>> print(no_such("column", "age", [], where="patients.csv"))
    patients.csv: no column 'age'; there is none
    """
    names = [str(each) for each in known]
    near = difflib.get_close_matches(str(name), names, n=1)
    shown = names if len(names) <= _LISTED else [*names[:_SHOWN], f"... ({len(names)} in all)"]
    listed = f"there are {', '.join(shown)}" if names else "there is none"
    meant = f"did you mean {near[0]!r}? " if near else ""
    return UnknownKeyError(f"{where + ': ' if where else ''}no {kind} {str(name)!r}; {meant}{listed}")


def not_installed(what: str, needs: str, install: str) -> InputError:
    """Return the error that says a package is missing, and how to get it.

    Parameters
    ----------
    what : what cannot be done without it
    needs : name of the package
    install : what to give to ``pip install``: an extra, such as ``stamp[onnx]``

    Examples
    --------
    >>> print(not_installed("export to ONNX", "onnxscript", "stamp[onnx]"))
    export to ONNX needs onnxscript, which is not installed: pip install 'stamp[onnx]'
    """
    quoted = f"'{install}'" if set("[>< ") & set(install) else install
    return InputError(f"{what} needs {needs}, which is not installed: pip install {quoted}")
