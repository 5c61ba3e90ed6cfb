"""The one kind of error that means: the input is wrong, and here is what to do about it."""

from __future__ import annotations


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


class UnknownKeyError(InputError, KeyError):
    """A name (a user, an item, a data set) that is not known; both an ``InputError`` and a ``KeyError``."""

    def __str__(self) -> str:
        """Return the message as it is: ``KeyError`` would put it in quotes."""
        return str(self.args[0]) if self.args else ""
