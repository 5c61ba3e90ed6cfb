"""Pages of the site that are made of what is already written: READMEs and docstrings. A hook of mkdocs.

A package's README becomes two pages: how to use it, and what was measured. Its public names become the reference.
Tutorials and "paper to code" are written by hand: ``docs/packages/NAME/tutorial.md`` and ``paper.md``.
"""

from __future__ import annotations

import ast
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = [path.parent for path in sorted(ROOT.glob("packages/*/pyproject.toml"))]
MEASURED = ("Results", "Speed")
CONFIRMED = "What is confirmed, what is reconstruction"
LINK = re.compile(r"(!?\[[^\]]*\])\(([^)\s]+)\)")


def sections(text: str) -> Iterator[tuple[str, str]]:
    """Divide a README at its second-level headings; what comes before them has the heading ''."""
    heading, lines, fenced = "", [], False
    for line in text.splitlines(keepends=True):
        fenced ^= line.startswith("```")
        if line.startswith("## ") and not fenced:
            yield heading, "".join(lines)
            heading, lines = line[3:].strip(), []
        lines.append(line)
    yield heading, "".join(lines)


def slug(heading: str) -> str:
    """Return the anchor that a heading gets."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip())


def page_of(heading: str) -> str:
    """Say on which page a section of a README stands."""
    if heading == CONFIRMED:
        return "paper.md"
    return "results.md" if heading in MEASURED else "index.md"


class Pages:
    """The generated pages of one package.

    Parameters
    ----------
    folder : of the package
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, folder.name
        self.parts = list(sections((folder / "README.md").read_text(encoding="utf-8")))
        self.homes: dict[str, str] = {}
        for heading, text in self.parts:
            for each in re.findall(r"^##+ (.+)$", text, re.MULTILINE):
                self.homes[slug(each)] = page_of(heading)
        self.copied: dict[str, Path] = {}

    def links(self, text: str, page: str) -> str:
        """Point links at pages of the site; what the site does not have becomes plain text."""

        def one(found: re.Match[str]) -> str:
            label, target = found[1], found[2]
            if re.match(r"[a-z]+:", target):
                return found[0]
            path, _, anchor = target.partition("#")
            if not path:
                home = self.homes.get(anchor, page)
                return f"{label}({'' if home == page else home}#{anchor})"
            file = (self.folder / path).resolve()
            if file.suffix == ".png" and file.is_file():
                self.copied[file.name] = file
                return f"{label}({file.name})"
            if file.parent == ROOT / "packages" or file.name == "README.md":
                home = file.parent if file.name == "README.md" else file
                if (ROOT / "packages") in home.parents:
                    return f"{label}(../{home.name}/index.md)"
            return label if label.startswith("!") else label[1:-1]

        return LINK.sub(one, text)

    def text(self, page: str) -> str:
        """Return what the README has for a page."""
        return "".join(self.links(text, page) for heading, text in self.parts if page_of(heading) == page)

    def file(self, module: str) -> Path:
        """Return the source of a module."""
        stem = (self.folder / "src").joinpath(*module.split("."))
        return stem / "__init__.py" if stem.is_dir() else stem.with_suffix(".py")

    def public(self, module: str) -> dict[str, list[str]]:
        """Return a module's public names, by the module they come from; of submodules that are public whole, theirs."""
        tree = ast.parse(self.file(module).read_text(encoding="utf-8"))
        homes: dict[str, list[str]] = {}
        for node in ast.walk(tree):
            match node:
                case ast.ImportFrom(module=str(home), names=names) if home.startswith(f"{module}."):
                    homes.setdefault(home, []).extend(alias.name for alias in names)
                case ast.Call(func=ast.Name("attach"), args=[_, ast.Dict(keys, values)]):
                    for key, value in zip(keys, values, strict=True):
                        if isinstance(key, ast.Constant) and isinstance(value, ast.List) and not value.elts:
                            homes |= self.listed(f"{module}.{key.value}")
                case _:
                    pass
        return homes

    def listed(self, module: str) -> dict[str, list[str]]:
        """Return what a module's ``__all__`` has, or where that is put together from submodules, theirs."""
        for node in ast.parse(self.file(module).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                return {module: ast.literal_eval(node.value)}
        return self.public(module)

    def reference(self) -> str:
        """Return the page of all public names, by the module they come from."""
        homes = self.public(self.name.replace("-", "_"))
        lines = [f"# Reference of {self.name}", ""]
        for module in sorted(homes):
            document = ast.get_docstring(ast.parse(self.file(module).read_text(encoding="utf-8"))) or ""
            lines += [f"## {module}", "", *document.strip().splitlines()[:1], ""]
            lines += [f"::: {module}.{name}\n" for name in homes[module]]
        return "\n".join(lines)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Write the navigation: the same five pages for each package."""
    packages: list[Any] = []
    for folder in PACKAGES:
        at = f"packages/{folder.name}"
        pages: list[Any] = [f"{at}/index.md"]
        if (ROOT / "docs" / at / "tutorial.md").exists():
            pages.append({"Tutorial": f"{at}/tutorial.md"})
        pages += [
            {"Results": f"{at}/results.md"},
            {"Paper to code": f"{at}/paper.md"},
            {"Reference": f"{at}/reference.md"},
        ]
        packages.append({folder.name: pages})
    config.nav = [
        {"Start": "index.md"},
        {"Packages": packages},
        {"Scale out": "scale-out.md"},
        {"Contributing": "contributing.md"},
        {"Changes": "changes.md"},
        {"Security": "security.md"},
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages and the pictures that they show."""

    def add(uri: str, content: str | bytes) -> None:
        files.append(File.generated(config, uri, content=content))

    for folder in PACKAGES:
        pages = Pages(folder)
        at = f"packages/{folder.name}"
        add(f"{at}/index.md", pages.text("index.md"))
        add(f"{at}/results.md", f"# Results of {folder.name}\n\n{pages.text('results.md')}")
        add(f"{at}/reference.md", pages.reference())
        paper = ROOT / "docs" / at / "paper.md"
        table = paper.read_text(encoding="utf-8") if paper.exists() else f"# {folder.name}: paper to code\n"
        if (known := files.get_file_from_path(f"{at}/paper.md")) is not None:
            files.remove(known)
        add(f"{at}/paper.md", f"{table.rstrip()}\n\n{pages.text('paper.md')}")
        for name, file in pages.copied.items():
            add(posixpath.join(at, name), file.read_bytes())
    for name, uri in (
        ("README.md", "index.md"),
        ("CONTRIBUTING.md", "contributing.md"),
        ("CHANGELOG.md", "changes.md"),
        ("SECURITY.md", "security.md"),
    ):
        text = (ROOT / name).read_text(encoding="utf-8")
        for folder in PACKAGES:
            text = text.replace(f"(packages/{folder.name})", f"(packages/{folder.name}/index.md)")
            for picture in re.findall(rf"\(packages/{folder.name}/docs/([\w.-]+)\)", text):
                text = text.replace(f"(packages/{folder.name}/docs/{picture})", f"(packages/{folder.name}/{picture})")
                if files.get_file_from_path(f"packages/{folder.name}/{picture}") is None:
                    add(f"packages/{folder.name}/{picture}", (folder / "docs" / picture).read_bytes())
        for at, page in (
            ("CONTRIBUTING.md", "contributing.md"),
            ("CHANGELOG.md", "changes.md"),
            ("SECURITY.md", "security.md"),
            ("docs/scale-out.md", "scale-out.md"),
        ):
            text = text.replace(f"({at})", f"({page})")
        if files.get_file_from_path(uri) is None:
            add(uri, text)
    return files
