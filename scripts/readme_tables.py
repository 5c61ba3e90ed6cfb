"""Fill the tables of a README from docs/results, so that no figure in it was typed by hand.

A place in the README is marked by a comment: ``<!-- results: PACKAGE/NAME.json [metric=..] [dataset=..] -->`` up to
``<!-- end -->``; spaces in names are written as underscores. ``layout=matrix`` makes a row a method and a column a data
set (``format=.3g`` writes its numbers so), ``layout=metrics`` a column a metric (``metrics=a,b`` chooses and orders
them). With ``--check`` nothing is written and the exit status says whether all tables are up to date.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLACE = re.compile(r"(<!-- results: (\S+)((?: \w+=[^>]*?)?) -->\n).*?(<!-- end -->)", re.DOTALL)


def chosen(summary: dict, wanted: dict[str, str]) -> list[dict]:
    return [
        row for row in summary["results"] if all(row[key].replace(" ", "_") == value for key, value in wanted.items())
    ]


def table(summary: dict, wanted: dict[str, str]) -> str:
    rows = chosen(summary, wanted)
    lines = [
        "| data | method | metric | mean | 95 % interval | n | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        groups.setdefault((row["dataset"], row["metric"]), []).append(row)
    for group in groups.values():
        best = (min if group[0]["better"] == "lower" else max)(row["mean"] for row in group)
        for row in group:
            mean = f"{row['mean']:.4f}"
            bounds = "" if row["low"] is None else f"{row['low']:.4f} to {row['high']:.4f}"
            shown = f"**{mean}**" if row["mean"] == best and len(group) > 1 else mean
            arrow = "↓" if row["better"] == "lower" else "↑"
            cells = [row["dataset"], row["method"], f"{row['metric']} {arrow}", shown, bounds, row["n"]]
            lines.append("| " + " | ".join(map(str, cells)) + f" | {row['seconds']:.1f} |")
    return "\n".join(lines) + "\n"


def grid(rows: list[dict], key: str, heads: list[str], mean_style: str, half_style: str) -> str:
    """Make a row of each method and a column of each value of `key`; the best mean of a column is set in bold."""
    names = list(dict.fromkeys(row[key] for row in rows))
    cells = {(row["method"], row[key]): row for row in rows}
    lines = ["| method | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for method in dict.fromkeys(row["method"] for row in rows):
        line = [method]
        for name in names:
            row = cells.get((method, name))
            if row is None:
                line.append("")
                continue
            column = [cell for place, cell in cells.items() if place[1] == name]
            best = (min if row["better"] == "lower" else max)(other["mean"] for other in column)
            marked = row["mean"] == best and len(column) > 1 and not row["metric"].startswith("best ")
            mean = f"**{row['mean']:{mean_style}}**" if marked else f"{row['mean']:{mean_style}}"
            if row["high"] is not None:
                half = row["high"] - row["mean"]
                mean += f" ± {half:{'.0f' if half >= 100 else half_style}}"
            line.append(mean)
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines) + "\n"


def matrix(summary: dict, wanted: dict[str, str]) -> str:
    style = wanted.pop("format", ".3f")
    rows = chosen(summary, wanted)
    words = [name.split() for name in dict.fromkeys(row["dataset"] for row in rows)]
    shared = 0
    while len(words) > 1 and all(len(w) > shared + 1 and w[shared] == words[0][shared] for w in words):
        shared += 1
    return grid(rows, "dataset", [" ".join(w[shared:]) for w in words], style, style)


def by_metric(summary: dict, wanted: dict[str, str]) -> str:
    only = [name for name in wanted.pop("metrics", "").split(",") if name]
    rows = chosen(summary, wanted)
    if only:
        rows = [row for name in only for row in rows if row["metric"].replace(" ", "_") == name]
    units = {row["metric"]: row["unit"] for row in reversed(rows)}
    heads = []
    for metric in dict.fromkeys(row["metric"] for row in rows):
        unit = units[metric]
        heads.append(metric + (f" ({unit})" if unit not in {"", "1", *metric.split()} else ""))
    return grid(rows, "metric", heads, ".3g", ".2g")


def fill(text: str) -> str:
    def replace(match: re.Match[str]) -> str:
        summary = json.loads((ROOT / "docs/results" / match[2]).read_text(encoding="utf-8"))
        wanted = dict(pair.split("=", 1) for pair in match[3].split())
        draw = {"matrix": matrix, "metrics": by_metric}.get(wanted.pop("layout", ""), table)
        return match[1] + draw(summary, wanted) + match[4]

    return PLACE.sub(replace, text)


def main() -> int:
    check = "--check" in sys.argv
    stale = []
    for name in sys.argv[1:]:
        if name == "--check":
            continue
        path = Path(name)
        old = path.read_text(encoding="utf-8")
        new = fill(old)
        if new != old:
            stale.append(name)
            if not check:
                path.write_text(new, encoding="utf-8")
    if check and stale:
        print(f"tables out of date in {', '.join(stale)}; run: python scripts/readme_tables.py {' '.join(stale)}")
    return int(check and bool(stale))


if __name__ == "__main__":
    raise SystemExit(main())
