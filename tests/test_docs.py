"""What a reader is told: docstrings with shapes, code that runs, commands that exist, tables that were measured."""

from __future__ import annotations

import doctest
import inspect
import pkgutil
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from contract import ROOT, Package
from shared_core.testing import Program

FENCE = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


# "(rows, features)", or jaxtyping's 'Float[Tensor, "rows features"]'.
SHAPE = re.compile(r"""\(\w+(?:, ?[\w .*+]+)*,?\)|\[(?:Tensor|np\.ndarray), "[^"]+"\]""")


def blocks(text: str, language: str) -> list[str]:
    return [body for found, body in FENCE.findall(text) if found == language]


def readme(package: Package) -> str:
    return (package.folder / "README.md").read_text(encoding="utf-8")


def test_all_is_the_table_of_contents(package: Package):
    module = package.module()
    assert module.__all__ == sorted(module.__all__)
    assert set(module.__all__) <= set(dir(module))
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        module.nonsense  # noqa: B018


def public(package: Package) -> list[tuple[str, object]]:
    module = package.module()
    found = [(name, getattr(module, name)) for name in module.__all__]
    return [(name, thing) for name, thing in found if inspect.isclass(thing) or inspect.isroutine(thing)]


def test_every_public_name_says_what_it_takes(package: Package):
    texts = {name: inspect.getdoc(thing) or "" for name, thing in public(package)}
    for name, thing in public(package):
        text = texts[name]
        # "As `MaskedConv2d`, in one dimension": what the sibling explains is explained.
        text += " ".join(texts.get(other, "") for other in re.findall(r"`([\w.]+)`", text))
        assert len(text.split()) >= 5, f"{name} has no docstring"
        if inspect.isclass(thing) and issubclass(thing, BaseException):
            continue
        for parameter in inspect.signature(thing).parameters.values():
            if parameter.name in {"self", "args", "kwargs"} or parameter.kind in {
                parameter.VAR_KEYWORD,
                parameter.VAR_POSITIONAL,
            }:
                continue
            assert re.search(rf"\b{re.escape(parameter.name)}\b", text), f"{name}: {parameter.name} is not explained"


def test_arrays_have_shapes(package: Package):
    for name, thing in public(package):
        if inspect.isclass(thing) and issubclass(thing, BaseException):
            continue
        annotations = [str(p.annotation) for p in inspect.signature(thing).parameters.values()]
        takes_arrays = any("Tensor" in text or "ndarray" in text for text in annotations)
        if takes_arrays:
            assert SHAPE.search(inspect.getdoc(thing) or ""), f"{name}: no shape given"


def test_docstring_examples_run(package: Package):
    module = package.module()
    ran = 0
    for found in pkgutil.walk_packages(module.__path__, f"{package.import_name}."):
        result = doctest.testmod(import_module(found.name), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
        assert result.failed == 0, found.name
        ran += result.attempted
    assert ran >= 5


def test_core_docstring_examples_run():
    import shared_core

    for found in pkgutil.walk_packages(shared_core.__path__, "shared_core."):
        if not found.name.endswith("__main__"):
            assert doctest.testmod(import_module(found.name)).failed == 0, found.name


def run_code(text: str, folder: Path) -> None:
    code = "\n".join(blocks(text, "python"))
    assert code
    done = Program(code, folder=folder).finish()
    assert done.returncode == 0, done.stderr


def test_readme_code_runs(package: Package, tmp_path):
    run_code(readme(package), tmp_path)


def console_commands(text: str) -> list[str]:
    lines = "\n".join(blocks(text, "console")).replace("\\\n", " ").splitlines()
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]


def test_readme_commands_exist(package: Package, call):
    commands = [text for text in console_commands(readme(package)) if text.startswith(f"{package.name} ")]
    assert commands
    for text in commands:
        words = shlex.split(text.partition(" | ")[0], comments=True)[1:]
        config = package.line().configs.get(words[0])
        assert config is not None or words[0].startswith("--"), text
        help_text = call(package, *([words[0]] if config else []), "--help").stdout
        for word in words[1:]:
            if word.startswith("--"):
                assert word.partition("=")[0] in help_text, text


def test_make_targets_in_the_readmes_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for file in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("packages/*/README.md")]:
        for target in re.findall(r"`make ([a-z]+)", file.read_text(encoding="utf-8")):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{file.name}: make {target}"


def test_readme_tables_are_the_committed_results(package: Package):
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/readme_tables.py", "--check", package.folder / "README.md"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_readme_says_when_not_to_use_it_and_what_is_confirmed(package: Package):
    text = readme(package).lower()
    assert "when not to use" in text
    assert "confirmed" in text
    assert "reconstruction" in text
    for target in re.findall(r"\]\((?!http|#|mailto)([^)#]+)", readme(package)):
        assert (package.folder / target).exists(), target
    assert re.search(r"!\[[^\]]+\]\([^)]+\.png\)", readme(package))


def test_paper_to_code_names_what_exists_and_the_tutorial_is_run(package: Package):
    pages = ROOT / "docs" / "packages" / package.name
    paper = (pages / "paper.md").read_text(encoding="utf-8")
    assert paper.startswith(f"# {package.name}: paper to code\n")
    own = package.module().__name__
    linked = re.findall(rf"\]\[({own}\.[\w.]+)\]", paper)
    assert linked
    for name in linked:
        module, _, thing = name.rpartition(".")
        assert resolves(module, thing), name
    tutorial = (pages / "tutorial.md").read_text(encoding="utf-8")
    ran = re.findall(r'^```python exec="1"', tutorial, re.MULTILINE)
    assert len(ran) >= 2, "a tutorial is made of code that the site runs"


def resolves(module: str, name: str) -> bool:
    try:
        return hasattr(import_module(module), name)
    except ImportError:
        # A method: the class is an attribute of its module.
        outer, _, kind = module.rpartition(".")
        return bool(outer) and hasattr(getattr(import_module(outer), kind, None), name)
