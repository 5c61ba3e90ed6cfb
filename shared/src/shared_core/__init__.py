"""The thin core of the ten methods: data sets, devices, run folders, episodes, one command-line grammar.

Its parts are imported by name: ``shared_core.data``, ``shared_core.device``, ``shared_core.runs``,
``shared_core.episodes``, ``shared_core.cli``.
"""

from importlib.metadata import version

__all__ = ["__version__"]
__version__ = version("shared-core")
