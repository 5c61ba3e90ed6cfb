"""Public names that are imported when first used, so that ``import package`` and ``--help`` stay fast."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module

__all__ = ["attach"]


def attach(
    package: str, modules: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], object], Callable[[], list[str]], list[str]]:
    """Make ``__getattr__``, ``__dir__`` and ``__all__`` (PEP 562) for a package's ``__init__``.

    Parameters
    ----------
    package : the package's ``__name__``
    modules : public names by the submodule that defines them; the submodules become attributes too

    Examples
    --------
    >>> getter, _, names = attach("shared_core", {"episodes": ["EpisodeSampler"]})
    >>> names, getter("EpisodeSampler").__module__
    (['EpisodeSampler'], 'shared_core.episodes')
    """
    homes = {name: module for module, names in modules.items() for name in names}

    def get(name: str) -> object:
        if name in homes:
            return getattr(import_module(f"{package}.{homes[name]}"), name)
        if name in modules:
            return import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get, lambda: sorted({*homes, *(name for name in modules if "." not in name)}), sorted(homes)
