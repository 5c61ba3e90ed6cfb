"""One page, whole in itself, of what the demos measured: pictures, tables, claims, machine."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from html import escape
from pathlib import Path

from markdown_it import MarkdownIt
from PIL import Image

__all__ = ["Shown", "make_page"]


@dataclass(frozen=True)
class Shown:
    """A package and its demo's run folder."""

    package: str
    folder: Path
    run: Path
    seconds: float | None = None
    failure: str = ""

    @cached_property
    def summary(self) -> dict:
        """The summary the demo wrote; empty when it failed."""
        path = self.run / "summary.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() and not self.failure else {}

    @cached_property
    def environment(self) -> dict:
        """Machine and versions."""
        path = self.run / "environment.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    @cached_property
    def readme(self) -> str:
        """The package's README."""
        return (self.folder / "README.md").read_text(encoding="utf-8")

    @cached_property
    def purpose(self) -> str:
        """What the package is for, in a line."""
        project = tomllib.loads((self.folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        return project["description"]

    @property
    def pictures(self) -> list[Path]:
        """The demo's pictures, the telling one first."""
        named = [self.run / name for name in self.summary.get("artifacts", []) if name.endswith(".png")]
        return [path for path in named if path.exists()]

    @property
    def verdict(self) -> str:
        """How many claims hold."""
        claims = self.summary.get("claims", [])
        held = sum(claim["holds"] for claim in claims)
        return f"{held} of {len(claims)} claims hold" if claims else "no claims"

    @property
    def limits(self) -> str:
        """The README's section on when not to use it, as HTML without links to files that are not here."""
        found = re.search(r"^## When not to use it\n(.*?)(?=^## |\Z)", self.readme, re.DOTALL | re.MULTILINE)
        if not found:
            return ""
        # Only the list: tables and code belong to the README.
        points = re.search(r"^[-*] .*?(?=\n\n(?![-* ])|\Z)", found[1].strip(), re.DOTALL | re.MULTILINE)
        text = re.sub(r"\[([^\]]+)\]\((?!https?:)[^)]+\)", r"\1", points[0] if points else found[1].strip())
        return MarkdownIt("commonmark", {"html": False}).render(text)


def number(value: float) -> str:
    """Four significant digits, as a person writes them."""
    if not math.isfinite(value):
        return "n/a" if math.isnan(value) else ("∞" if value > 0 else "-∞")
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e6):
        return f"{value:.2e}"
    digits = 0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 10 else 3
    return f"{value:,.{digits}f}"


def cell(row: dict, best: bool) -> str:
    text = number(row["mean"])
    low, high = row["low"], row["high"]
    title = f"n = {row['n']}"
    half = ""
    if low is not None and high is not None:
        title += f", 95 % interval {number(low)} to {number(high)}"
        half = f'<span class="half">±{number((high - low) / 2)}</span>'
    shown = f"<b>{text}</b>" if best else text
    return f'<td title="{escape(title)}">{shown}{half}</td>'


def tables(rows: Sequence[dict]) -> Iterable[tuple[str, str]]:
    """One table a metric: methods down, data sets across; the best of a column is bold."""
    for metric in dict.fromkeys(row["metric"] for row in rows):
        group = [row for row in rows if row["metric"] == metric]
        methods = list(dict.fromkeys(row["method"] for row in group))
        data = list(dict.fromkeys(row["dataset"] for row in group))
        at = {(row["method"], row["dataset"]): row for row in group}
        lower = group[0]["better"] == "lower"
        unit = group[0]["unit"]
        head = "".join(f"<th>{escape(name)}</th>" for name in data)
        lines = []
        for method in methods:
            cells = []
            for name in data:
                row = at.get((method, name))
                if row is None:
                    cells.append("<td></td>")
                    continue
                column = [other["mean"] for other in group if other["dataset"] == name and math.isfinite(other["mean"])]
                best = bool(column) and len(column) > 1 and row["mean"] == (min if lower else max)(column)
                cells.append(cell(row, best))
            lines.append(f'<tr><th scope="row">{escape(method)}</th>{"".join(cells)}</tr>')
        named = metric if unit in {"", "1", metric} else f"{metric}, {unit}"
        caption = f"{escape(named)} <span class='half'>{'lower' if lower else 'higher'} is better</span>"
        table = (
            f'<div class="scroll"><table><caption>{caption}</caption><thead><tr><th></th>{head}</tr></thead>'
            f"<tbody>{''.join(lines)}</tbody></table></div>"
        )
        yield metric, table


def claims(found: Sequence[dict]) -> str:
    items = []
    for claim in found:
        value = "" if claim["value"] is None else f"measured {number(claim['value'])}"
        if value and claim["threshold"] is not None:
            value += f", threshold {number(claim['threshold'])}"
        source = "; ".join(filter(None, (claim["source"], value)))
        word, mark = ("holds", "✓") if claim["holds"] else ("does not hold", "✗")
        items.append(
            f'<li class="{"yes" if claim["holds"] else "no"}"><span class="mark" role="img" aria-label="{word}">{mark}'
            f"</span><span>{escape(claim['text'])}<small>{escape(source)}</small></span></li>"
        )
    return f'<ul class="claims">{"".join(items)}</ul>'


def embedded(png: bytes) -> str:
    """Return an address that is the picture itself."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def picture(path: Path, name: str, *, first: bool) -> str:
    alt = f"{name}: {path.stem.replace('-', ' ').replace('_', ' ')}"
    kind = "lead" if first else "more"
    return f'<img class="{kind}" loading="lazy" alt="{escape(alt)}" src="{embedded(path.read_bytes())}">'


def section(shown: Shown) -> str:
    name = escape(shown.package)
    head = f'<section id="{name}"><h2><a href="#{name}">{name}</a></h2><p class="purpose">{escape(shown.purpose)}</p>'
    if shown.failure or not shown.summary:
        return (
            f'{head}<p class="failed">This demo failed: {escape(shown.failure or "it left no summary")}</p></section>'
        )
    pictures = [picture(path, shown.package, first=not k) for k, path in enumerate(shown.pictures)]
    found = list(tables(shown.summary["results"]))
    heads = "".join(table for _, table in found[:1])
    rest = "".join(table for _, table in found[1:])
    more = f"<details><summary>All figures ({len(shown.summary['results'])})</summary>{rest}</details>" if rest else ""
    listed = shown.summary["claims"]
    said, left = listed[:8], listed[8:]
    stated = f"<h3>Claims, as measured: {escape(shown.verdict)}</h3>{claims(said)}" if listed else ""
    if left:
        stated += f"<details><summary>{len(left)} more claims</summary>{claims(left)}</details>"
    limits = f"<details><summary>When not to use it</summary>{shown.limits}</details>" if shown.limits else ""
    beside = f'<div class="row">{"".join(pictures[1:])}</div>' if pictures[1:] else ""
    versions = shown.environment.get("versions", {})
    facts = [
        f"<code>{name} demo --seed {shown.summary['seed']}</code>",
        f"{shown.summary['wall_seconds']:.0f} s",
        f"{escape(shown.summary['device'])}, {shown.summary['threads']} thread{'s' * (shown.summary['threads'] != 1)}",
        f"version {escape(shown.summary['version'])}",
        *(f"{escape(key)} {escape(value)}" for key, value in versions.items() if key in {"torch", "numpy"}),
    ]
    return (
        f"{head}{pictures[0] if pictures else ''}{heads}{more}{stated}{beside}{limits}"
        f'<p class="facts">{" · ".join(facts)}</p></section>'
    )


def card(shown: Shown) -> str:
    image = ""
    if pictures := shown.pictures:
        with Image.open(pictures[0]) as whole:
            small = whole.convert("RGB")
        small.thumbnail((480, 300))
        held = io.BytesIO()
        small.save(held, "PNG", optimize=True)
        image = f'<img alt="" src="{embedded(held.getvalue())}">'
    state = "failed" if shown.failure or not shown.summary else shown.verdict
    name = escape(shown.package)
    return (
        f'<a class="card" href="#{name}"><div class="thumb">{image}</div><b>{name}</b><span>{escape(state)}</span></a>'
    )


STYLE = """
:root { color-scheme: light dark; --back: #fbfaf7; --card: #fff; --ink: #1c1b19; --soft: #66625a; --line: #e4e0d6;
  --accent: #0b6e75; --yes: #1a7f4b; --no: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --back: #15171a; --card: #1e2125; --ink: #ecebe7; --soft: #a5a29a;
  --line: #34383e; --accent: #6cc7cd; --yes: #6fd19b; --no: #ff8a80; } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; scroll-padding-top: 1rem; }
body { margin: 0; background: var(--back); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", sans-serif; }
main, header { max-width: 68rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 3rem; }
h1 { font-size: 2.1rem; line-height: 1.15; margin: 0 0 .5rem; letter-spacing: -.02em; }
h2 { margin: 0; font-size: 1.5rem; letter-spacing: -.01em; }
h2 a { color: inherit; text-decoration: none; } h2 a:hover { color: var(--accent); }
h3 { margin: 1.5rem 0 .5rem; font-size: 1rem; }
.lede, .purpose { color: var(--soft); max-width: 46rem; } .purpose { margin: .25rem 0 1.25rem; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(12rem, 1fr)); gap: .9rem; margin: 2rem 0; }
.card { display: flex; flex-direction: column; gap: .15rem; padding: .7rem; background: var(--card); color: inherit;
  border: 1px solid var(--line); border-radius: .7rem; text-decoration: none; }
.card:hover, .card:focus-visible { border-color: var(--accent); }
.card span { color: var(--soft); font-size: .85rem; }
.thumb { height: 7.5rem; border-radius: .4rem; overflow: hidden; background: #fff; }
.thumb img { width: 100%; height: 100%; object-fit: contain; }
section { background: var(--card); border: 1px solid var(--line); border-radius: .9rem; padding: 1.6rem;
  margin: 1.4rem 0; }
img.lead { display: block; max-width: 100%; max-height: 38rem; margin: 0 auto 1.2rem; }
img.lead, img.more { background: #fff; border-radius: .5rem; }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1rem; margin-top: 1.2rem; }
.row img { width: 100%; height: 100%; object-fit: contain; }
.scroll { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .2rem 0 .4rem; }
th, td { padding: .3rem .8rem .3rem 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th[scope=row], thead th:first-child { text-align: left; font-weight: 500; }
thead th { color: var(--soft); font-weight: 500; white-space: normal; min-width: 5.5rem; max-width: 11rem;
  vertical-align: bottom; }
th[scope=row], thead th:first-child { position: sticky; left: 0; background: var(--card); }
.half { color: var(--soft); font-size: .82em; font-weight: 400; margin-left: .35em; }
.claims { list-style: none; margin: 0; padding: 0; }
.claims li { display: flex; gap: .6rem; padding: .25rem 0; }
.claims small { display: block; color: var(--soft); }
.mark { font-weight: 700; } .yes .mark { color: var(--yes); } .no .mark { color: var(--no); }
details { margin-top: .9rem; } summary { cursor: pointer; color: var(--accent); }
.facts { color: var(--soft); font-size: .85rem; margin: 1.2rem 0 0; }
.failed { color: var(--no); font-weight: 600; }
code { font: .9em ui-monospace, monospace; }
footer { color: var(--soft); font-size: .9rem; padding: 1rem 0 3rem; }
@media (max-width: 40rem) { section { padding: 1rem; border-radius: .6rem; } h1 { font-size: 1.6rem; } }
@media print { body { background: #fff; } section { break-inside: avoid; } }
"""


def make_page(shown: Sequence[Shown], seconds: float | None = None) -> str:
    """Return the page.

    Parameters
    ----------
    shown : packages with their run folders, in order
    seconds : that all demos took together; None when they were not run now
    """
    environment = next((one.environment for one in shown if one.environment), {})
    versions = " · ".join(f"{escape(k)} {escape(v)}" for k, v in environment.get("versions", {}).items())
    claims_of_all = [claim for one in shown for claim in one.summary.get("claims", [])]
    held = sum(claim["holds"] for claim in claims_of_all)
    took = "" if seconds is None else f" All demos together took {seconds / 60:.1f} minutes."
    machine = f"{escape(environment.get('platform', ''))}, {environment.get('cpu_count', '?')} cores, Python "
    machine += escape(environment.get("python", "?"))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Ten methods, measured here</title><style>{STYLE}</style></head><body><header>"
        "<h1>Ten methods, measured on this machine</h1>"
        f'<p class="lede">Every figure and picture below was made by the demos, each on real data that comes with the'
        f" packages, against the baselines it should be held against. Of {len(claims_of_all)} claims that were put to"
        f" the test, {held} hold here; those that do not are shown as such.{took}</p>"
        f'<nav class="gallery" aria-label="packages">{"".join(map(card, shown))}</nav></header><main>'
        f"{''.join(map(section, shown))}<footer><p>{machine}<br>{versions}<br>"
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC</p></footer></main></body></html>\n"
    )
