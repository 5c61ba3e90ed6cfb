"""What was said and what it did, as one HTML file: it loads nothing, runs nothing, and follows light and dark.

The page has no script and asks for no other file, which its own security policy makes the browser enforce; so it can be
mailed, archived and opened years later. Every text in it that comes from data is escaped.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float

from ial_nap.annotations import (
    VERDICTS,
    Annotation,
    Disagreement,
    disagreements,
    kappa_between,
    kappa_of_all,
    latest,
)
from ial_nap.choices import written
from ial_nap.context import Context
from ial_nap.resampling import resampled
from shared_core.errors import InputError

if TYPE_CHECKING:
    from ial_nap.estimator import NAPClassifier, NAPRegressor, ScoreReport
    from ial_nap.series import Series

__all__ = ["Certified", "Heat", "Report", "Scored", "heat_of", "report_html", "report_of"]

_MOST_VERDICTS = 2000
_SIGNS = {1: "\u2713", 0: "\u2715", -1: "?"}


@dataclass(frozen=True)
class Scored:
    """A score without verdicts and with them.

    Parameters
    ----------
    metric : its name
    better : ``higher`` or ``lower``
    before, after : values
    low, high : 95 % interval of their difference; not a number where there is none
    """

    metric: str
    better: str
    before: float
    after: float
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True, eq=False)
class Heat:
    """What counts in one instance, without verdicts and with them.

    Parameters
    ----------
    instance : its id
    before, after : what each cell adds to the prediction, ``(t, r)``
    values : in the user's units, ``(t, r)``; NaN where there is none
    prediction : before and after
    interval : bounds of the prediction after
    label : of the instance, if there is one
    uncertain : cells whose contribution is not certain, ``(t, r)``
    note : why it is here
    """

    instance: str
    before: Float[np.ndarray, "t r"]
    after: Float[np.ndarray, "t r"]
    values: Float[np.ndarray, "t r"]
    prediction: tuple[float, float]
    interval: tuple[float, float]
    label: float | None = None
    uncertain: Bool[np.ndarray, "t r"] | None = None
    note: str = ""


@dataclass(frozen=True)
class Certified:
    """What is certain about exclusion.

    Parameters
    ----------
    holds : no excluded cell has any effect, as far as was checked
    cells : excluded cells as step and feature
    lines : what was checked and what came of it
    """

    holds: bool
    cells: tuple[tuple[str, str], ...]
    lines: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """All that the page says; what is empty is left out.

    Parameters
    ----------
    title : of the page
    features, steps : names, r and T of them
    units : one per feature, or none
    facts : lines of the head, by name
    scores : on held-out series
    heats : instances
    annotations : verdicts that stand
    agreement : kappas by name; not a number where there is none
    disagreements : cells of two opinions
    certificate : about exclusion
    curves : by kind, by order: predictions as cells are taken away or put in, evenly spaced over the share of cells;
        three orders at most
    notes : lines of the end
    """

    title: str
    features: Sequence[str]
    steps: Sequence[str]
    units: Sequence[str] = ()
    facts: Mapping[str, str] = field(default_factory=dict[str, str])
    scores: Sequence[Scored] = ()
    heats: Sequence[Heat] = ()
    annotations: Sequence[Annotation] = ()
    agreement: Mapping[str, float] = field(default_factory=dict[str, float])
    disagreements: Sequence[Disagreement] = ()
    certificate: Certified | None = None
    curves: Mapping[str, Mapping[str, Sequence[float]]] = field(
        default_factory=dict[str, Mapping[str, Sequence[float]]]
    )
    notes: Sequence[str] = ()


_STYLE = """
:root { color-scheme: light dark; --ground: #f4f5f8; --surface: #fff; --ink: #1c2230; --muted: #5a6375; --line: #e1e5ec;
  --soft: #f0f2f6; --accent: #3a55c9; --pos: #ea9433; --neg: #62a8d8; --good: #0b6b45; --warn: #8f4a00;
  --hatch: rgb(28 34 48 / .28); }
@media (prefers-color-scheme: dark) { :root { --ground: #0f1217; --surface: #171b22; --ink: #e7eaf0; --muted: #9ba5b7;
  --line: #2a313d; --soft: #1f252e; --accent: #93a7ff; --pos: #9a5006; --neg: #1f5f9c; --good: #6fd3a2; --warn: #ffc078;
  --hatch: rgb(231 234 240 / .24); } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 14px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Noto Sans", "DejaVu Sans", sans-serif; font-variant-numeric: tabular-nums; }
main { max-width: 1120px; margin: 0 auto; padding: 24px 16px 48px; }
h1 { font-size: 22px; margin: 0 0 4px; } h2 { font-size: 16px; margin: 0 0 10px; } h3 { font-size: 14px; margin: 0; }
table + h3 { margin-top: 12px; }
section { background: var(--surface); border: 1px solid var(--line); border-radius: 12px; padding: 16px 18px;
  margin-top: 16px; overflow-x: auto; }
p { margin: 0 0 8px; max-width: 90ch; } .muted, dt, caption { color: var(--muted); } .good { color: var(--good); }
.warn { color: var(--warn); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 8px 0 0; } dd { margin: 0;
  overflow-wrap: anywhere; }
table { border-collapse: separate; border-spacing: 2px; } th { font-weight: 500; text-align: left; }
caption { text-align: left; padding: 0 0 4px; }
.plain { border-spacing: 0; } .plain th, .plain td { padding: 4px 14px 4px 0; border-bottom: 1px solid var(--line);
  vertical-align: top; } .plain th { color: var(--muted); } .plain .n { text-align: right; }
.heat th { padding: 2px 6px; max-width: 220px; overflow-wrap: anywhere; }
.heat thead th { text-align: center; color: var(--muted); font-size: 12px; }
.unit { color: var(--muted); font-size: 11px; margin-left: 4px; }
.heat td { position: relative; min-width: 44px; height: 28px; padding: 0 5px; border-radius: 5px; text-align: center;
  font-size: 12px; background: var(--surface); box-shadow: inset 0 0 0 1px var(--line); white-space: nowrap; }
.heat td.p { background: color-mix(in oklab, var(--pos) var(--s), var(--surface)); }
.heat td.m { background: color-mix(in oklab, var(--neg) var(--s), var(--surface)); }
.heat td.d::after { content: ""; position: absolute; inset: 0; border-radius: 5px;
  background: repeating-linear-gradient(135deg, transparent 0 5px, var(--hatch) 5px 6px); }
.heat td.v0 span { text-decoration: line-through; text-decoration-thickness: 2px; }
.heat td.v1, .heat td.v0 { box-shadow: inset 0 0 0 2px var(--ink); } .heat td b { font-size: 11px; margin-right: 4px; }
.pair { display: flex; flex-wrap: wrap; gap: 8px 28px; align-items: flex-start; margin: 8px 0 0; }
article + article { border-top: 1px solid var(--line); margin-top: 16px; padding-top: 14px; }
.ramp { display: inline-block; width: 110px; height: 10px; border-radius: 5px; border: 1px solid var(--line);
  margin: 0 6px; background: linear-gradient(90deg, var(--neg), var(--surface), var(--pos)); }
svg { width: 320px; height: auto; overflow: visible; font-size: 11px; fill: var(--muted); }
svg polyline { fill: none; stroke-width: 2; } svg .a { stroke: var(--accent); } svg .b { stroke: var(--muted);
  stroke-dasharray: 5 4; } svg .c { stroke: var(--pos); } svg line { stroke: var(--line); }
summary { cursor: pointer; color: var(--accent); } .cells { columns: 3 220px; margin: 6px 0 0; padding-left: 18px; }
@media print { body { background: none; } section { break-inside: avoid; } }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def report_html(report: Report) -> str:
    """Return the page.

    Parameters
    ----------
    report : what it says

    Raises
    ------
    InputError
        For maps that are not ``(t, r)``, and units that are not one per feature.

    Examples
    --------
    >>> page = report_html(Report("Verdicts on <cells>", ["LDL"], ["2009"], facts={"model": "m.safetensors"}))
    >>> "Verdicts on &lt;cells&gt;" in page, "<script" in page, "http:" in page or "https:" in page
    (True, False, False)
    """
    shape = len(report.steps), len(report.features)
    if report.units and len(report.units) != shape[1]:
        raise InputError(f"units: one per feature, got {len(report.units)} for {shape[1]} features")
    for heat in report.heats:
        for name in ("before", "after", "values", "uncertain"):
            given = getattr(heat, name)
            if given is not None and given.shape != shape:
                raise InputError(f"{name} of '{heat.instance}': needs shape {shape}, got {given.shape}")
    parts = [
        _head(report), _scores(report), _heats(report), _certificate(report), _curves(report), _agreement(report),
        _verdicts(report), _notes(report),
    ]  # fmt: skip
    body = "\n".join(part for part in parts if part)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(report.title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        "</body>\n</html>\n"
    )


def _number(value: float) -> str:
    return f"{value:.4g}".replace("-", "\u2212") if math.isfinite(value) else "\u2013"


def _signed(value: float) -> str:
    return f"{value:+.3g}".replace("-", "\u2212") if math.isfinite(value) else "\u2013"


def _head(report: Report) -> str:
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in report.facts.items())
    return f"<header><h1>{escape(report.title)}</h1>" + (f"<dl>{facts}</dl>" if facts else "") + "</header>"


def _scores(report: Report) -> str:
    if not report.scores:
        return ""
    rows: list[str] = []
    for one in report.scores:
        metric = written(one.metric)
        before, after, low, high = (metric.factor * v for v in (one.before, one.after, one.low, one.high))
        gain = after - before
        if not (math.isfinite(low) and math.isfinite(high)):
            verdict, look = "no interval", "muted"
        elif low <= 0 <= high:
            verdict, look = "within its interval: no clear change", "muted"
        elif (gain > 0) == (one.better == "higher"):
            verdict, look = "better", "good"
        else:
            verdict, look = "worse", "warn"
        bounds = f"{_signed(low)} .. {_signed(high)}" if math.isfinite(low) else "\u2013"
        note = f"{one.better} is better" if metric.unit == "1" else f"{metric.unit}, {one.better} is better"
        rows.append(
            f'<tr><th scope="row">{escape(metric.name)} <span class="unit">{escape(note)}</span></th>'
            f'<td class="n">{_number(before)}</td><td class="n">{_number(after)}</td>'
            f'<td class="n">{_signed(gain)}</td><td class="n">{bounds}</td><td class="{look}">{verdict}</td></tr>'
        )
    return (
        "<section><h2>Held-out scores, without verdicts and with them</h2>"
        '<table class="plain"><thead><tr><th>metric</th><th class="n">without</th><th class="n">with</th>'
        '<th class="n">change</th><th class="n">95 % interval of the change</th><th></th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
        '<p class="muted">Series that share a shortcut with the training flatter a model that uses it: without it, a'
        " lower score on them may be the honest one.</p></section>"
    )


def _said(report: Report) -> dict[tuple[str, int, str], list[Annotation]]:
    found: dict[tuple[str, int, str], list[Annotation]] = {}
    for one in report.annotations:
        if one.verdict >= 0:
            found.setdefault(one.cell, []).append(one)
    return found


def _heats(report: Report) -> str:
    if not report.heats:
        return ""
    said = _said(report)
    articles: list[str] = []
    for heat in report.heats:
        limit = max(float(np.nanmax(np.abs(cells), initial=0.0)) for cells in (heat.before, heat.after)) or 1.0
        weight = np.nan_to_num(np.abs(heat.before)).sum(0) + np.nan_to_num(np.abs(heat.after)).sum(0)
        order: list[int] = np.argsort(-weight, kind="stable").tolist()
        low, high = heat.interval
        label = "" if heat.label is None else f", label {_number(heat.label)}"
        tables = (
            _table(report, heat, heat.before, order, limit, "without verdicts", {})
            + _table(report, heat, heat.after, order, limit, "with verdicts", said)
        )  # fmt: skip
        articles.append(
            f'<article><h3>{escape(heat.instance)} <span class="unit">{escape(heat.note)}</span></h3>'
            f"<p>prediction {_number(heat.prediction[0])} \u2192 <b>{_number(heat.prediction[1])}</b>"
            f' <span class="muted">({_number(low)} .. {_number(high)}){label}</span></p>'
            f'<div class="pair">{tables}</div></article>'
        )
    return (
        "<section><h2>What counts, cell by cell</h2>"
        '<p class="muted">Colour is what a cell adds to the prediction, on the scale on which cells add up: less'
        '<span class="ramp"></span>more; no colour is nothing. Hatched: not certain. \u2713 attend,'
        f" \u2715 do not attend.</p>{''.join(articles)}</section>"
    )


def _table(
    report: Report,
    heat: Heat,
    cells: Float[np.ndarray, "t r"],
    order: Sequence[int],
    limit: float,
    caption: str,
    said: Mapping[tuple[str, int, str], Sequence[Annotation]],
) -> str:
    head = "".join(f'<th scope="col">{escape(step)}</th>' for step in report.steps)
    rows: list[str] = []
    for d in order:
        name = report.features[d]
        unit = report.units[d] if report.units else ""
        row = "".join(_cell(report, heat, float(cells[t, d]), t, d, limit, said) for t in range(len(report.steps)))
        shown = f'<span class="unit">{escape(unit)}</span>' if unit else ""
        rows.append(f'<tr><th scope="row">{escape(name)}{shown}</th>{row}</tr>')
    return (
        f'<table class="heat"><caption>{caption}</caption><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _cell(
    report: Report,
    heat: Heat,
    added: float,
    t: int,
    d: int,
    limit: float,
    said: Mapping[tuple[str, int, str], Sequence[Annotation]],
) -> str:
    name, value = report.features[d], float(heat.values[t, d])
    given = said.get((heat.instance, t, name), ())
    looks: list[str] = []
    share = 0.0 if not math.isfinite(added) else min(1.0, abs(added) / limit)
    if share:
        looks.append("p" if added > 0 else "m")
    if heat.uncertain is not None and bool(heat.uncertain[t, d]):
        looks.append("d")
    verdicts = {one.verdict for one in given}
    if len(verdicts) == 1:
        looks.append(f"v{next(iter(verdicts))}")
    mark = "".join(_SIGNS[verdict] for verdict in sorted(verdicts, reverse=True))
    who = "".join(f"; {VERDICTS[one.verdict]}: {one.annotator or 'somebody'}" for one in given)
    unit = f" {report.units[d]}" if report.units and report.units[d] else ""
    told = f"{name}, {report.steps[t]}: {_number(value)}{unit}, adds {_signed(added)}{who}"
    return (
        f'<td class="{" ".join(looks)}" style="--s:{100 * share:.0f}%" title="{escape(told)}">'
        f"{f'<b>{mark}</b>' if mark else ''}<span>{_number(value)}</span></td>"
    )


def _certificate(report: Report) -> str:
    found = report.certificate
    if found is None:
        return ""
    lines = "".join(f"<p>{escape(line)}</p>" for line in found.lines)
    if not found.cells:
        verdict = '<p class="muted">No cell is excluded exactly: none has been marked \u2715 often enough.</p>'
    elif found.holds:
        verdict = (
            f'<p class="good">{len(found.cells)} cells are excluded, and nothing in them can reach the prediction.</p>'
        )
    else:
        verdict = (
            f'<p class="warn">{len(found.cells)} cells are shut, but something in them reaches the prediction.</p>'
        )
    cells = "".join(f"<li>{escape(feature)}, {escape(step)}</li>" for step, feature in found.cells)
    listed = f'<details><summary>these cells</summary><ul class="cells">{cells}</ul></details>' if cells else ""
    return f"<section><h2>Certificate of exclusion</h2>{verdict}{lines}{listed}</section>"


def _curves(report: Report) -> str:
    if not report.curves:
        return ""
    values = [value for panel in report.curves.values() for curve in panel.values() for value in curve]
    low, high = min(values), max(values)
    high = high if high > low else low + 1.0
    panels: list[str] = []
    for kind, panel in report.curves.items():
        lines: list[str] = []
        for look, (order, curve) in zip("abc", panel.items(), strict=False):
            points = " ".join(
                f"{30 + 270 * k / max(len(curve) - 1, 1):.1f},{150 - 130 * (value - low) / (high - low):.1f}"
                for k, value in enumerate(curve)
            )
            lines.append(f'<polyline class="{look}" points="{points}"><title>{escape(order)}</title></polyline>')
        orders = ", ".join(
            f"{name}: {escape(order)}" for name, order in zip(("solid", "dashed", "orange"), panel, strict=False)
        )
        panels.append(
            f'<figure style="margin:0"><figcaption>{escape(kind)} <span class="muted">({orders})</span></figcaption>'
            f'<svg viewBox="0 0 320 180" role="img" aria-label="{escape(kind)}">'
            '<line x1="30" y1="150" x2="300" y2="150"/><line x1="30" y1="20" x2="30" y2="150"/>'
            f"{''.join(lines)}"
            f'<text x="26" y="24" text-anchor="end">{_number(high)}</text>'
            f'<text x="26" y="154" text-anchor="end">{_number(low)}</text>'
            '<text x="30" y="168">no cells</text><text x="300" y="168" text-anchor="end">all cells</text>'
            "</svg></figure>"
        )
    return (
        "<section><h2>Are the shares true to the model?</h2>"
        '<p class="muted">The prediction as cells are taken away, or put in, those with the largest share first. The'
        " further it is from a random order, the more the shares say about the model.</p>"
        f'<div class="pair">{"".join(panels)}</div></section>'
    )


def _agreement(report: Report) -> str:
    if not report.agreement and not report.disagreements:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="n">{_number(value)}</td></tr>'
        for name, value in report.agreement.items()
    )
    table = f'<table class="plain"><tbody>{rows}</tbody></table>' if rows else ""
    splits = "".join(
        f"<tr><td>{escape(one.instance)}</td><td>{escape(_step(report, one.step))}</td><td>{escape(one.feature)}</td>"
        f"<td>{escape(', '.join(one.attend))}</td><td>{escape(', '.join(one.ignore))}</td></tr>"
        for one in report.disagreements
    )
    listed = (
        "<h3>Where opinions differ</h3>"
        '<table class="plain"><thead><tr><th>instance</th><th>step</th><th>feature</th><th>attend</th>'
        f"<th>do not attend</th></tr></thead><tbody>{splits}</tbody></table>"
        if splits
        else "<p>Nobody contradicts anybody.</p>"
    )
    return f"<section><h2>Agreement</h2>{table}{listed}</section>"


def _step(report: Report, step: int) -> str:
    return report.steps[step] if step < len(report.steps) else str(step)


def _verdicts(report: Report) -> str:
    if not report.annotations:
        return ""
    rows = "".join(
        f"<tr><td>{escape(one.instance)}</td><td>{escape(_step(report, one.step))}</td><td>{escape(one.feature)}</td>"
        f"<td>{_SIGNS[one.verdict]} {escape(VERDICTS[one.verdict])}</td><td>{escape(one.annotator)}</td>"
        f'<td class="n">{one.round}</td><td class="n">{_number(one.seconds)}</td><td>{escape(one.note)}</td></tr>'
        for one in report.annotations[:_MOST_VERDICTS]
    )
    counts = ", ".join(
        f"{sum(one.verdict == verdict for one in report.annotations)} {name}" for verdict, name in VERDICTS.items()
    )
    people = len({one.annotator for one in report.annotations})
    seconds = sum(one.seconds for one in report.annotations)
    more = len(report.annotations) - _MOST_VERDICTS
    rest = f'<p class="muted">and {more} more</p>' if more > 0 else ""
    return (
        f"<section><h2>Verdicts</h2><p>{len(report.annotations)} stand: {escape(counts)}; of {people}"
        f" {'person' if people == 1 else 'people'}, in {_number(seconds)} s of their time.</p>"
        '<details><summary>all of them</summary><table class="plain"><thead><tr><th>instance</th><th>step</th>'
        '<th>feature</th><th>verdict</th><th>who</th><th class="n">round</th><th class="n">seconds</th><th>note</th>'
        f"</tr></thead><tbody>{rows}</tbody></table>{rest}</details></section>"
    )


def _notes(report: Report) -> str:
    if not report.notes:
        return ""
    return f"<section><h2>Notes</h2>{''.join(f'<p>{escape(note)}</p>' for note in report.notes)}</section>"


# ---- of an estimator


def heat_of(estimator: NAPClassifier | NAPRegressor, one: Series, *, note: str = "") -> Heat:
    """Return what counts in an instance, without the verdicts that an estimator holds and with them.

    Of several classes or labels, the one that is likeliest with verdicts. A cell is uncertain where its contribution,
    over draws, may as well be of the other sign, and is not negligible.

    Parameters
    ----------
    estimator : fitted
    one : one instance, as the estimator reads it
    note : why it is here
    """
    after, new, interval, chosen = _look(estimator, one, None)
    with _without_verdicts(estimator):
        before, old, _, _ = _look(estimator, one, chosen)
    _, variance = estimator.model_.spread_of_contributions(
        one.x.to(estimator.device_), one.lengths.to(estimator.device_), samples=int(estimator.samples)
    )
    scale = one.scaling.target_deviation if estimator.kind_ == "regression" else 1.0
    spread = scale * variance[0, :, :, chosen].sqrt().cpu().double().numpy()
    mean = after[:, :, chosen]
    uncertain = (1.96 * spread > np.abs(mean)) & (spread > 0.05 * max(float(np.abs(mean).max()), 1e-12))
    values = one.scaling.raw(one.x[0]).double().cpu().numpy()
    values[~one.observed[0].cpu().numpy()] = np.nan
    label = None if one.y is None else _label(one, chosen)
    return Heat(one.ids[0], before[:, :, chosen], mean, values, (old, new), interval, label, uncertain, note)


def _without_verdicts(estimator: NAPClassifier | NAPRegressor) -> AbstractContextManager[None]:
    """Let an estimator forget for a while."""
    held = estimator.context_
    nothing = Context(held.steps, held.features, kappa=held.kappa, schema=held.schema, lengths=held.lengths)
    return estimator.trial(nothing)


def _look(
    estimator: NAPClassifier | NAPRegressor, one: Series, output: int | None
) -> tuple[np.ndarray, float, tuple[float, float], int]:
    """Return contributions (t, r, c), prediction, its interval, and which output they are of."""
    cells = estimator.contributions(one).cells[0].double().numpy()
    mean, _ = estimator.predict_dist(one)
    low, high = estimator.interval(one, 0.95)
    if mean.ndim == 1:
        return cells, float(mean[0]), (float(low[0]), float(high[0])), 0
    # A binary task has two probabilities and one output.
    column = 1 if estimator.kind_ == "binary" else int(mean[0].argmax()) if output is None else output
    chosen = 0 if estimator.kind_ == "binary" else column
    return cells, float(mean[0, column]), (float(low[0, column]), float(high[0, column])), chosen


def _label(one: Series, output: int) -> float:
    y = one.targets[0]
    if one.kind == "regression":
        y = one.scaling.raw_target(y)
    if one.kind == "multiclass":
        return float(int(y) == output)
    return float(y[output] if y.ndim else y)


def report_of(
    estimator: NAPClassifier | NAPRegressor,
    pool: Series,
    held_out: Series | None,
    annotations: Sequence[Annotation],
    *,
    instances: int = 10,
    draws: int = 1000,
    facts: Mapping[str, str] | None = None,
    certificate: Certified | None = None,
    curves: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
    notes: Sequence[str] = (),
) -> Report:
    """Return a report on what verdicts do to an estimator that obeys them.

    Parameters
    ----------
    estimator : fitted, and told the verdicts
    pool : among which the annotated instances are
    held_out : to score on, with labels; None leaves scores out
    annotations : a log, oldest first
    instances : to show at most, those with most verdicts first
    draws : resamples of held-out instances, for intervals
    facts : lines of the head; the context's hash is added
    certificate, curves, notes : as of :class:`Report`
    """
    standing = latest(annotations)
    counts = Counter(one.instance for one in standing if one.verdict >= 0)
    place = {name: k for k, name in enumerate(pool.ids)}
    shown = [name for name, _ in counts.most_common() if name in place][:instances]
    heats = [heat_of(estimator, pool.part([place[name]]), note=f"{counts[name]} verdicts") for name in shown]
    scores: Sequence[Scored] = ()
    if held_out is not None:
        after = estimator.score_report(held_out)
        with _without_verdicts(estimator):
            before = estimator.score_report(held_out)
        scores = _scored(before, after, draws)
    people = sorted({one.annotator for one in standing})
    agreement: dict[str, float] = {}
    if len(people) > 1:
        agreement["all (Fleiss' kappa)"] = kappa_of_all(standing)
        for k, first in enumerate(people):
            for second in people[k + 1 :]:
                agreement[f"{first} and {second} (Cohen's kappa)"] = kappa_between(standing, first, second)
    return Report(
        "What verdicts do to the model",
        pool.features,
        pool.steps,
        estimator.units_,
        facts={**(facts or {}), "context": estimator.context_hash},
        scores=scores,
        heats=heats,
        annotations=standing,
        agreement=agreement,
        disagreements=disagreements(standing),
        certificate=certificate,
        curves=curves or {},
        notes=notes,
    )


def _scored(before: ScoreReport, after: ScoreReport, draws: int) -> list[Scored]:
    """Compare all scores, on resamples of the instances that both predicted."""
    old, new = (resampled(report.series, report.predictions, draws=draws) for report in (before, after))
    found: list[Scored] = []
    for name, one in new.items():
        low, high = one.gain_over(old[name]) or (math.nan, math.nan)
        if math.isfinite(one.value):
            found.append(Scored(name, one.better, old[name].value, one.value, low, high))
    return found
