"""No file that is read can run: no code of ours unpickles, evaluates, or unpacks without a look."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LOOKED_AT = ("shared/src", "packages/*/src", "packages/*/benchmarks", "scripts")

# What must not be called, by the name it is imported from, and why.
FORBIDDEN = {
    **dict.fromkeys(
        ("pickle.load", "pickle.loads", "pickle.Unpickler", "_pickle", "cPickle"), "runs what a file names"
    ),
    **dict.fromkeys(("dill", "cloudpickle.load", "cloudpickle.loads", "shelve", "marshal", "joblib.load"), "unpickles"),
    **dict.fromkeys(("pandas.read_pickle", "pandas.read_hdf", "numpy.core.multiarray._reconstruct"), "unpickles"),
    **dict.fromkeys(("yaml.load", "yaml.full_load", "yaml.unsafe_load", "yaml.Loader"), "makes any object; safe_load"),
    **dict.fromkeys(("eval", "exec", "builtins.eval", "builtins.exec"), "runs text"),
    **dict.fromkeys(("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"), "runs a shell"),
    **dict.fromkeys(("xml.etree", "xml.dom", "xml.sax", "lxml"), "expands entities without end"),
    **dict.fromkeys(("tempfile.mktemp", "os.tempnam"), "names a file that somebody else may make first"),
    **dict.fromkeys(("torch.jit.load", "torch.package", "torch.hub"), "runs what a file holds"),
    **dict.fromkeys(("tarfile.TarFile.extractall", "shutil.unpack_archive"), "unpacks outside its folder"),
}
# Methods, whatever they are called on.
METHODS = {"extractall": "unpacks outside its folder", "extract_all": "unpacks outside its folder"}

# The one place that may, and why: (file, what).
ALLOWED = {
    ("packages/stamp/src/stamp/export.py", "torch.jit.load"): "reads back what it wrote itself, to compare outputs",
    ("shared/src/shared_core/testing.py", "exec"): "runs what a test is made of; only tests import it",
}


def names_of(tree: ast.AST) -> dict[str, str]:
    """What each name of a module stands for: ``np`` for ``numpy``, ``loads`` for ``pickle.loads``."""
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for one in node.names:
                known[one.asname or one.name.partition(".")[0]] = one.name if one.asname else one.name.partition(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            known |= {one.asname or one.name: f"{node.module}.{one.name}" for one in node.names}
    return known


def dotted(node: ast.AST, known: dict[str, str]) -> str:
    """The full name of what is written, or ''."""
    if isinstance(node, ast.Name):
        return known.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value, known)
        return f"{inner}.{node.attr}" if inner else ""
    return ""


@functools.cache
def matches(name: str) -> str | None:
    return next((rule for rule in FORBIDDEN if name == rule or name.startswith(rule + ".")), None)


def literal(call: ast.Call, key: str) -> object:
    """The value of a keyword, if it is written out; else what it is written as."""
    for keyword in call.keywords:
        if keyword.arg == key:
            return keyword.value.value if isinstance(keyword.value, ast.Constant) else ast.unparse(keyword.value)
    return None


def faults(source: str) -> Iterator[tuple[int, str, str]]:
    """Yield line, what, and why it is refused."""
    tree = ast.parse(source)
    known = names_of(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None)
            for one in node.names:
                full = f"{module}.{one.name}" if module else one.name
                if rule := matches(full):
                    yield node.lineno, rule, FORBIDDEN[rule]
        elif isinstance(node, ast.Attribute | ast.Name) and (rule := matches(dotted(node, known))):
            yield node.lineno, rule, FORBIDDEN[rule]
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func, known)
        method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        if method in METHODS:
            yield node.lineno, method, METHODS[method]
        if literal(node, "allow_pickle") not in (None, False):
            yield node.lineno, "allow_pickle", "unpickles"
        if literal(node, "shell") not in (None, False):
            yield node.lineno, "shell=True", "runs a shell"
        if name == "torch.load" and literal(node, "weights_only") is not True:
            yield node.lineno, "torch.load without weights_only=True", "unpickles"
        if any(keyword.arg is None for keyword in node.keywords) and name in {"torch.load", "numpy.load"}:
            yield node.lineno, f"{name} with arguments that cannot be seen", "may unpickle"


def files() -> list[Path]:
    return sorted(file for pattern in LOOKED_AT for folder in ROOT.glob(pattern) for file in folder.rglob("*.py"))


@functools.cache
def found() -> dict[tuple[str, str], list[int]]:
    everything: dict[tuple[str, str], list[int]] = {}
    for file in files():
        for line, what, _ in faults(file.read_text(encoding="utf-8")):
            everything.setdefault((file.relative_to(ROOT).as_posix(), what), []).append(line)
    return everything


def test_nothing_that_runs_a_file_is_called():
    wrong = [f"{file}:{lines[0]}: {what}" for (file, what), lines in found().items() if (file, what) not in ALLOWED]
    assert not wrong, "\n".join(wrong)


def test_what_is_allowed_is_there():
    """An exception that nothing needs any more goes."""
    assert set(ALLOWED) <= set(found())


def test_all_packages_are_looked_at():
    names = {file.relative_to(ROOT).parts[1] for file in files() if file.relative_to(ROOT).parts[0] == "packages"}
    assert names == {folder.name for folder in (ROOT / "packages").iterdir() if (folder / "pyproject.toml").exists()}
    assert {"shared", "scripts"} < {file.relative_to(ROOT).parts[0] for file in files()}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle; pickle.load(f)",
        "import pickle as p\np.loads(f)",
        "from pickle import loads as read; read(f)",
        "import pickle\nclass U(pickle.Unpickler): pass",
        "def f():\n    import dill",
        "import shelve; shelve.open('x')",
        "from marshal import loads",
        "import joblib; joblib.load('x')",
        "import pandas as pd; pd.read_pickle('x')",
        "import pandas; read = pandas.read_pickle",
        "import numpy as np; np.load('x', allow_pickle=True)",
        "import numpy as np; np.load('x', allow_pickle=wanted)",
        "import numpy as np; np.load('x', **options)",
        "import torch; torch.load('x')",
        "import torch; torch.load('x', weights_only=False)",
        "import torch; torch.load('x', weights_only=safe)",
        "from torch import load; load('x')",
        "import torch; torch.jit.load('x')",
        "import yaml; yaml.load(text, Loader=yaml.SafeLoader)",
        "eval('1')",
        "exec(text)",
        "import builtins; builtins.eval('1')",
        "import os; os.system('x')",
        "import subprocess; subprocess.run('x', shell=True)",
        "import subprocess; subprocess.run('x', shell=flag)",
        "import tarfile; tarfile.open('x').extractall('y')",
        "archive.extractall('y', filter='data')",
        "import zipfile; zipfile.ZipFile('x').extractall('y')",
        "import shutil; shutil.unpack_archive('x')",
        "import xml.etree.ElementTree as ET; ET.parse('x')",
        "from xml.etree import ElementTree",
        "import tempfile; tempfile.mktemp()",
    ],
)
def test_each_forbidden_form_is_found(source):
    assert list(faults(source))


@pytest.mark.parametrize(
    "source",
    [
        "import numpy as np; np.load('x'); np.load('x', allow_pickle=False)",
        "import torch; torch.load('x', map_location='cpu', weights_only=True)",
        "model.eval(); re.compile('x'); torch.compile(model); self.exec = 1",
        "import pickle; pickle.dumps(x); pickle.PicklingError",
        "import subprocess; subprocess.run(['x'], check=True)",
        "import yaml; yaml.safe_load(text)",
        "archive.extract(member); frame.eval('a + b')",
    ],
)
def test_what_is_harmless_is_not_found(source):
    assert not list(faults(source))
