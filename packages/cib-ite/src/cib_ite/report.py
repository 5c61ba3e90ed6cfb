"""One self-contained HTML page about a fitted model and a table, for a colleague who decides.

The page needs no network and no script, prints on paper and follows the reader's dark mode. Words follow the numbers:
where the uncertainty did not foretell the error, the page says so.
"""

from __future__ import annotations

import base64
import importlib.metadata
import json
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cib_ite import metrics as measure
from cib_ite.calibration import check_alpha, normal_quantile
from cib_ite.data import EffectTable
from cib_ite.estimator import CIB, EffectInference, doubt
from cib_ite.evaluate import Evaluation, as_rows, evaluate_model
from shared_core.errors import InputError
from shared_core.runs import atomic_path

__all__ = ["write_report"]

Vector = NDArray[np.float64]
_SHOWN, _LISTED, _MODIFIERS = 20, 1000, 4
_MINUS, _DASH, _THIN = "\N{MINUS SIGN}", "\N{EN DASH}", "\N{NARROW NO-BREAK SPACE}"
_REASONS = {
    "no overlap": "hardly anybody like them got one of the two treatments, so the effect is an extrapolation",
    "unlike training rows": "their representation is further out than that of any row the model learned from",
    "doubtful sign": "the effect could well be on the other side of the cost of treating",
}


@dataclass(frozen=True, eq=False)
class _Facts:
    """Everything the sections draw on, computed once."""

    model: CIB
    table: EffectTable
    evaluation: Evaluation
    found: EffectInference
    decision: np.ndarray
    reasons: list[list[str]]
    doubt: Vector
    ids: list[str]
    alpha: float
    cost: float
    max_defer: float
    treatment: str
    outcome: str
    unit: str

    @property
    def level(self) -> str:
        return f"{100 * (1 - self.alpha):g} %"

    @property
    def binary(self) -> bool:
        return self.model.outcome_ == "binary"


def write_report(
    path: str | Path,
    model: CIB,
    table: EffectTable,
    *,
    evaluation: Evaluation | None = None,
    title: str | None = None,
    alpha: float = 0.1,
    cost: float = 0.0,
    max_defer: float = 0.2,
    ids: Sequence[object] | None = None,
    run_config: Mapping[str, Any] | None = None,
    treatment_name: str = "treatment",
    outcome_name: str = "outcome",
    unit: str = "",
) -> None:
    """Write a page that says what the model found, how far to trust it, and which rows to look at by hand.

    Parameters
    ----------
    path : HTML file to write
    model : fitted
    table : n units to report on: those of ``fit``, which are recognised and judged by held-out predictions, or new ones
    evaluation : from :func:`~cib_ite.evaluate.evaluate_model` on this table; made here by default
    title : of the page
    alpha : share of misses that intervals allow
    cost : of treating, in units of the outcome
    max_defer : share of training-like rows left to a person for doubt
    ids : (n,) names of the rows; by default their numbers, from 1
    run_config : how the run was configured, for the model card
    treatment_name, outcome_name, unit : what the columns are called, and what the outcome is measured in

    Raises
    ------
    InputError
        When the table, the ids or the evaluation do not belong together, or the file cannot be written.
    """
    check_alpha(alpha)
    if ids is not None and len(ids) != table.n:
        raise InputError(f"ids: {len(ids)} names for {table.n} rows of {table.name}; give one for each")
    if evaluation is None:
        evaluation = evaluate_model(model, table, alpha=alpha, cost=cost)
    if evaluation.n != table.n:
        raise InputError(
            f"evaluation: it was made on {evaluation.n} rows, {table.name} has {table.n}; evaluate this table"
        )
    if (evaluation.alpha, evaluation.cost) != (alpha, cost):
        raise InputError(
            f"evaluation: it was made with alpha={evaluation.alpha:g} and cost={evaluation.cost:g}, the report has"
            f" {alpha:g} and {cost:g}; give both the same"
        )
    X = as_rows(model, table)
    found = model.effect_inference(X, alpha)
    decision = model.decide(X, cost, max_defer, alpha=alpha)
    doubtful = model.decide(X, cost, max_defer, alpha=alpha, defer_flagged=False) == "defer"
    marks = (found.no_overlap, found.unusual, doubtful)
    facts = _Facts(
        model=model,
        table=table,
        evaluation=evaluation,
        found=found,
        decision=decision,
        reasons=[[name for name, mark in zip(_REASONS, marks, strict=True) if mark[row]] for row in range(table.n)],
        doubt=doubt(found.effect, found.std, cost),
        ids=[str(row + 1) for row in range(table.n)] if ids is None else [str(name) for name in ids],
        alpha=alpha,
        cost=cost,
        max_defer=max_defer,
        treatment=treatment_name,
        outcome=outcome_name,
        unit=unit,
    )
    name = title or f"Effect of {treatment_name} on {outcome_name}"
    sections = [
        _headline(facts, name),
        _caveats(facts),
        _effects(facts),
        _trust(facts),
        _overlap(facts),
        _deferred(facts),
        _groups(facts),
        _training(facts),
        _card(facts, run_config),
    ]
    body = "\n".join(part for part in sections if part).replace(" %", "&nbsp;%")
    page = _PAGE.format(title=escape(name), style=_STYLE, script=_SCRIPT, body=body)
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _number(value: float, digits: int = 3) -> str:
    """Write a number with so many significant digits, and a true minus sign."""
    if np.isnan(value):
        return _DASH
    if np.isinf(value):
        return "∞" if value > 0 else f"{_MINUS}∞"
    if value != 0 and (abs(value) >= 1e6 or abs(value) < 1e-4):
        return f"{value:.{digits - 1}e}".replace("-", _MINUS)
    places = max(0, digits - 1 - int(np.floor(np.log10(abs(value))))) if value else 0
    return f"{value:,.{min(places, 6)}f}".replace("-", _MINUS).replace(",", _THIN)


def _share(part: float) -> str:
    """Write a share in percent, without making few into none or most into all."""
    percent = 100 * part
    if 0 < percent < 0.1:
        return "under 0.1 %"
    if 99.9 < percent < 100:
        return "over 99.9 %"
    return f"{percent:.1f} %" if percent < 10 and percent != round(percent) else f"{percent:.0f} %"


def _effect(facts: _Facts, value: float, *, sign: bool = False, unit: bool = True) -> str:
    """Write an effect in the reader's units: percentage points for a binary outcome."""
    shown = 100 * value if facts.binary else value
    # As many decimals for all effects as tell apart what the intervals tell apart.
    width = float(np.median(facts.found.upper - facts.found.lower)) * (100 if facts.binary else 1)
    places = int(np.clip(2 - np.floor(np.log10(width)), 0, 6)) if 0 < width < np.inf else 3
    if abs(shown) < 1e6:
        # Adding 0 takes the sign off a zero.
        text = f"{round(shown, places) + 0.0:,.{places}f}".replace("-", _MINUS).replace(",", _THIN)
    else:
        text = _number(shown)
    if sign and shown > 0:
        text = f"+{text}"
    if not unit:
        return text
    return f"{text} percentage points" if facts.binary else f"{text} {facts.unit}".rstrip()


def _cost(facts: _Facts) -> str:
    return "0" if facts.cost == 0 else f"the cost of {_effect(facts, facts.cost)}"


def _range(facts: _Facts, low: float, high: float) -> str:
    return f"{_effect(facts, low, unit=False)} to {_effect(facts, high, unit=False)}"


def _count(number: int, noun: str | None = "row") -> str:
    text = f"{number:,}".replace(",", _THIN)
    return text if noun is None else f"{text} {noun}{'' if number == 1 else 's'}"


def _head(*cells: str) -> str:
    made: list[str] = []
    for cell in cells:
        numeric, text = cell.startswith(">"), escape(cell.removeprefix(">"))
        made.append(f'<th scope="col"{" class=n" if numeric else ""}>{text}</th>')
    return f"<thead><tr>{''.join(made)}</tr></thead>"


def _line(*cells: str) -> str:
    """Make a table row; a cell that starts with ``>`` is a number, and everything is escaped."""
    made: list[str] = []
    for cell in cells:
        numeric, text = cell.startswith(">"), escape(cell.removeprefix(">"))
        made.append(f"<td{' class=n' if numeric else ''}>{text}</td>")
    return f"<tr>{''.join(made)}</tr>"


def _table(head: str, lines: Sequence[str], *, kind: str = "") -> str:
    opening = f"<table class={kind}>" if kind else "<table>"
    return f'<div class="wide">{opening}{head}<tbody>{"".join(lines)}</tbody></table></div>'


def _picture(draw: Callable[[Path], object], description: str, caption: str) -> str:
    """Draw into a file for a moment, and put the picture into the page itself."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "picture.svg"
        draw(file)
        data = base64.b64encode(file.read_bytes()).decode("ascii")
    return (
        f'<figure><img alt="{escape(description)}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _headline(facts: _Facts, name: str) -> str:
    values, n = facts.evaluation.metrics, facts.table.n
    low, high = values["ate_low"], values["ate_high"]
    # On rows of training the doubly robust mean, which the interval is about; on new rows the mean of their effects.
    average = values.get("aipw_ate", values["ate"]) if facts.evaluation.in_sample else values["ate"]
    target = f"the probability of {facts.outcome}" if facts.binary else facts.outcome
    size = _effect(facts, abs(average))
    interval = f"{facts.level} interval {_range(facts, low, high)}"
    if low <= 0 <= high:
        verdict = (
            f"No average effect of {facts.treatment} on {target} can be told from these data: the estimate is"
            f" {_effect(facts, average, sign=True)} ({interval}), and the interval holds 0."
        )
    else:
        verb = "raises" if average > 0 else "lowers"
        verdict = f"On average, {facts.treatment} {verb} {target} by {size} ({interval})."
    counts = {key: int(np.sum(facts.decision == key)) for key in ("treat", "control", "defer")}
    words = {"treat": "treat", "control": "do not treat", "defer": "look at by hand"}
    bar = "".join(
        f'<span class="{key}" style="width:{100 * count / n:.2f}%"></span>' for key, count in counts.items() if count
    )
    cards = "".join(
        f'<div class="card {key}"><b>{_count(count, None)}</b>{words[key]}<small>{_share(count / n)}</small></div>'
        for key, count in counts.items()
    )
    treated = int(facts.table.treatment.sum())
    which = "the rows the model was fitted to" if facts.evaluation.in_sample else "rows given to the fitted model"
    cost = _cost(facts)
    return (
        f"<header><h1>{escape(name)}</h1>"
        f'<p class="lead">{escape(verdict)}</p>'
        f"<p>{escape(facts.table.name)}: {_count(n)} ({treated} treated, {n - treated} not), "
        f"{_count(facts.table.x.shape[1], 'covariate')}; {which}.</p></header>"
        f'<section><div class="bar" role="img" aria-label="decisions">{bar}</div><div class="cards">{cards}</div>'
        f"<p>Rows whose estimated effect exceeds {escape(cost)} are to be treated, the others not, unless the estimate "
        "is not good enough to say; those are left to a person. This takes larger values of "
        f"{escape(facts.outcome)} for better.</p></section>"
    )


def _verdict(facts: _Facts) -> str:
    """Say whether the uncertainty foretold the error, as the numbers have it."""
    values = facts.evaluation.metrics
    if "spearman" in values:
        rho, ratio, n = values["spearman"], values.get("withhold_20_ratio", 1.0), facts.table.n
        what, tail = "the error of the effect, which is known here", ""
    elif "factual_spearman" in values:
        rho, ratio = values["factual_spearman"], values.get("factual_withhold_20_ratio", 1.0)
        n = int(np.isfinite(facts.evaluation.pseudo_effect).sum()) if facts.evaluation.pseudo_effect is not None else 0
        n = n or facts.table.n
        what = "the error in the outcome that was seen" + (
            ", of predictions by members that had not seen the row" * facts.evaluation.in_sample
        )
        tail = (
            " The error of the effect itself cannot be seen, and most of the outcome's error is noise that no"
            " uncertainty of the effect can foretell; so a weak relation is what to expect even of a good uncertainty."
        )
    else:
        return "Whether the uncertainty foretells the error could not be measured on this table."
    # Bonett and Wright (2000): the rank correlation on Fisher's scale.
    half = normal_quantile(0.05) * float(np.sqrt((1 + rho**2 / 2) / max(n - 3, 1)))
    low, high = np.tanh(np.arctanh(np.clip(rho, -0.999999, 0.999999)) + np.array([-half, half]))
    numbers = (
        f"its rank correlation with {what}, is {_number(rho, 2)} (95 % interval {_number(float(low), 2)} to"
        f" {_number(float(high), 2)}), and withholding the most uncertain fifth of the rows changes the error by"
        f" {_signed_percent(ratio - 1)}."
    )
    if high < 0 and tail:
        noise = " (a yes-or-no outcome has most of it where its probability is near one half)" if facts.binary else ""
        return (
            f"There is no sign of it; rows of larger uncertainty even had smaller errors: {numbers}{tail} Noise that"
            f" differs between rows{noise} can turn the relation round by itself, so this table cannot settle the"
            " question: do not rank rows by the uncertainty on the strength of it."
        )
    if high < 0:
        return f"No: the uncertainty pointed the wrong way; do not use it to rank rows. As measured, {numbers}{tail}"
    if low <= 0:
        return f"It did not, or the table is too small to tell: {numbers}{tail}"
    strength = "weakly" if rho < 0.15 else "moderately" if rho < 0.4 else "strongly"
    if ratio >= 1:
        return f"Only in part: it ranks the rows {strength}, but withholding the worst did not help; {numbers}{tail}"
    return f"It did, {strength}: {numbers}{tail}"


def _signed_percent(change: float) -> str:
    return f"{100 * change:+.1f} %".replace("-", _MINUS)


def _caveats(facts: _Facts) -> str:
    values, found = facts.evaluation.metrics, facts.found
    n, level = facts.table.n, facts.level
    flagged = int(found.no_overlap.sum())
    low, high = facts.model.overlap_bounds
    area = values.get("propensity_auc")
    overlap = (
        f"For {_count(flagged)} ({_share(flagged / n)}) there is hardly anyone to compare with: the chance of treatment"
        f" is outside {low:g} to {high:g}, or nearly all rows alike got the same. The effect there is an extrapolation."
        if flagged
        else f"No row is flagged: everywhere the chance of treatment is within {low:g} to {high:g}."
    )
    if area is not None:
        tells = "hardly tell" if area < 0.6 else "tell in part" if area < 0.85 else "tell almost surely"
        overlap += f" The covariates {tells} who is treated (AUC {area:.2f}; 0.5 would be a coin)."
    infinite = int(np.sum(~np.isfinite(found.ite_lower) | ~np.isfinite(found.ite_upper)))
    wide = float(np.median(found.ite_upper - found.ite_lower))
    nothing = ", which is everything possible," if facts.binary and wide > 1.999 else ","
    individual = (
        f"The intervals of effects are about the average over everybody with the same covariates. For one person the"
        f" difference also depends on what no covariate tells. Its {level} interval is, at the median,"
        f" {_effect(facts, wide)} wide{nothing} against"
        f" {_effect(facts, float(np.median(found.upper - found.lower)))} for the average."
    )
    if infinite:
        individual += f" For {_count(infinite)} it is infinite: the data do not bound it."
    inflation = facts.model.calibration_.inflation
    approximate = (
        "Intervals of the average effect given the covariates are the model's, "
        + (
            f"widened {inflation:.2f} times because held-out outcomes are missed by so much more than those trained on"
            if inflation > 1.005
            else "and the misses of held-out outcomes gave no cause to widen them"
        )
        + "; they are approximate and carry no guarantee. Intervals of individual differences are conformal: valid on"
        " average over rows, if the first point holds and the propensities are right."
    )
    place = f"cate_coverage_{round(100 * (1 - facts.alpha))}"
    if place in values:
        approximate += f" Here the true effects are known: the {level} intervals hold {_share(values[place])} of them."
    items = [
        (
            "Hidden causes",
            f"Every number here is right only if the {facts.table.x.shape[1]} covariates hold every common cause of"
            f" {facts.treatment} and {facts.outcome}. No number on this page, and no other, can test that: it has to be"
            " argued from how the data came about.",
        ),
        ("Overlap", overlap),
        ("Did the uncertainty foretell the error?", _verdict(facts)),
        ("Intervals", approximate),
        ("Averages and persons", individual),
    ]
    if not facts.evaluation.in_sample:
        items.append(
            (
                "New rows",
                "The model takes these rows for new. If it was fitted to some of them, their errors look too small.",
            )
        )
    if facts.model.collapsed():
        items.append(
            ("Collapse", "The bottleneck kept next to nothing of the covariates: effects come out alike. Lower beta.")
        )
    body = "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in items)
    return f'<section class="box"><h2>What this can and cannot say</h2><dl>{body}</dl></section>'


def _effects(facts: _Facts) -> str:
    from cib_ite.plots import plot_effects

    effect = facts.found.effect
    unit = "difference of probabilities" if facts.binary else facts.unit
    picture = _picture(
        lambda file: plot_effects(file, facts.found, facts.decision, cost=facts.cost, unit=unit),
        "Estimated effect of each row with its interval, in order",
        f"Estimated effect of each row with its {facts.level} interval for the average over such rows, by decision.",
    )
    shares = (0.05, 0.25, 0.5, 0.75, 0.95)
    quantiles = np.quantile(effect, shares)
    head = _head("effect", *(f">{100 * share:g} % of rows below" for share in shares), ">mean", ">sd")
    cells = [f">{_effect(facts, float(v), unit=False)}" for v in (*quantiles, effect.mean(), effect.std())]
    above = float(np.mean(effect > facts.cost))
    clear = float(np.mean((facts.found.lower > facts.cost) | (facts.found.upper < facts.cost)))
    cost = _cost(facts)
    unit_words = "percentage points" if facts.binary else facts.unit or f"units of {facts.outcome}"
    return (
        f"<section><h2>How the effect differs</h2>{picture}{_table(head, [_line(unit_words, *cells)])}"
        f"<p>{escape(_share(above))} of the rows have an estimate above {escape(cost)}; for {escape(_share(clear))} "
        f"the {escape(facts.level)} interval excludes {escape(cost)}.</p></section>"
    )


def _trust(facts: _Facts) -> str:
    from cib_ite.plots import plot_calibration, plot_deferral, plot_withholding

    evaluation, values = facts.evaluation, dict(facts.evaluation.metrics)
    if facts.table.effect is not None and (facts.decision != "defer").any():
        values["decide_wrong"] = measure.decision_error(facts.decision, facts.table.effect, facts.cost).wrong_rate
    parts: list[str] = []
    if "effect" in evaluation.withholding:
        curve = evaluation.withholding["effect"]
        parts.append(
            _picture(
                lambda file: plot_withholding(file, {"by uncertainty": curve}),
                "Error of the effect as uncertain rows are withheld",
                "Error of the effect, against the truth, as the most uncertain rows are withheld. The nearer to the"
                " dotted line, the better the uncertainty ranks.",
            )
        )
    if "factual" in evaluation.withholding:
        seen = evaluation.withholding["factual"]
        held = " by members that had not seen the row" if evaluation.in_sample else ""
        parts.append(
            _picture(
                lambda file: plot_withholding(
                    file, {"by uncertainty": seen}, ylabel="root mean squared error of outcome"
                ),
                "Error of the outcome as uncertain rows are withheld",
                f"Error in the outcome that was seen, predicted{held}. Noise that nobody can predict keeps it high.",
            )
        )
    if "r_loss" in evaluation.withholding:
        loss = evaluation.withholding["r_loss"]
        parts.append(
            _picture(
                lambda file: plot_withholding(file, {"by uncertainty": loss}, ylabel="root R-loss of the rows kept"),
                "R-loss as uncertain rows are withheld",
                "R-loss: what the effect leaves unexplained of the outcome once treatment and outcome have been"
                " predicted from the covariates by other models.",
            )
        )
    coverage = evaluation.calibration
    if coverage is not None:
        parts.append(
            _picture(
                lambda file: plot_calibration(file, {"CIB": coverage}),
                "Coverage of the intervals against their level",
                "How often intervals of the effect hold the true one, against how often they say they do.",
            )
        )
    deferral = evaluation.deferral
    if deferral is not None:
        parts.append(
            _picture(
                lambda file: plot_deferral(file, {"CIB": deferral}),
                "Wrong decisions against the share of rows deferred",
                "Wrong decisions among the rows decided, as the most doubtful are left to a person.",
            )
        )
    words = [
        ("factual_rmse", "root mean squared error of the outcome seen"),
        ("factual_log_loss", "log loss of the outcome seen (nats)"),
        ("factual_auc", "AUC of the outcome seen"),
        (
            f"outcome_coverage_{round(100 * (1 - facts.alpha))}",
            f"share of outcomes inside their {facts.level} interval",
        ),
        ("r_loss", "R-loss"),
        ("dr_loss", "DR-loss"),
        ("sqrt_pehe", "root PEHE, against the true effects"),
        ("sqrt_pehe_normalised", "the same, by the true effects' standard deviation"),
        ("ate_error", "error of the average effect"),
        ("spearman", "rank correlation of uncertainty and error of the effect"),
        ("factual_spearman", "rank correlation of uncertainty and error of the outcome"),
        ("withhold_20_ratio", "error of the effect without the most uncertain fifth, relative to all rows"),
        ("factual_withhold_20_ratio", "error of the outcome without the most uncertain fifth, relative to all rows"),
        ("wrong_decisions", "wrong decisions if no row is deferred (share)"),
        ("decide_wrong", "wrong decisions among the rows decided (share)"),
        ("policy_risk", "policy risk on the randomised rows"),
        ("policy_risk_treat_all", "policy risk of treating everybody"),
        ("policy_risk_treat_none", "policy risk of treating nobody"),
        ("jobs_att_error", "error of the effect on the treated, against the trial"),
    ]
    lines: list[str] = []
    for name, label in words:
        if name in values:
            interval = (
                f"{_number(values[f'{name}_low'])} to {_number(values[f'{name}_high'])}"
                if f"{name}_low" in values
                else ""
            )
            lines.append(_line(label, f">{_number(values[name])}", f">{interval}"))
    table = _table(_head("measure", ">value", ">95 % interval" if "policy_risk" in values else ">"), lines)
    how = (
        "The box above says it in a sentence; here is what it rests on. An uncertainty is of use when the error of the"
        " rows kept falls as the most uncertain are withheld: below the dashed line is better than chance, and nothing"
        " can be better than the dotted one."
    )
    figures = f'<div class="pictures">{"".join(parts)}</div>'
    return f"<section><h2>Can the uncertainty be believed?</h2><p>{escape(how)}</p>{figures}{table}</section>"


def _overlap(facts: _Facts) -> str:
    from cib_ite.plots import plot_overlap

    found = facts.found
    picture = _picture(
        lambda file: plot_overlap(
            file,
            found.propensity,
            facts.table.treatment,
            no_overlap=found.no_overlap,
            rate_percentile=found.rate_percentile,
            bounds=facts.model.overlap_bounds,
        ),
        "Propensities of both arms, and how unusual rows are",
        "Left: chance of being treated, treated rows up, the others down; where only one colour is, there is nobody to"
        " compare with. Right: how unusual each row is to the model; crosses have no overlap, some of them for a corner"
        " of the covariates that the chance of treatment does not show.",
    )
    return f"<section><h2>Who could be compared with whom</h2>{picture}</section>"


def _unusual_values(facts: _Facts, row: int, most: int = 3) -> str:
    """Name the covariates in which a row is furthest from the training rows' means."""
    made, values = facts.model.preprocessor_, facts.table.x[row]
    # Columns of 0 and 1 are not scaled for the networks; their standard deviation follows from their mean.
    zero_one = (made.offset == 0) & (made.factor == 1) & (made.fill > 0) & (made.fill < 1)
    sd = np.where(zero_one, np.sqrt(np.abs(made.fill * (1 - made.fill))), 1 / made.factor)
    away = (values - made.fill) / sd
    order = np.argsort(-np.nan_to_num(np.abs(away)), kind="stable")
    words: list[str] = []
    for place in order[:most]:
        name, value = facts.table.feature_names[place], values[place]
        if np.isnan(value) or abs(away[place]) < 1:
            continue
        if zero_one[place]:
            like = made.fill[place] if value == 1 else 1 - made.fill[place]
            words.append(f"{name} = {value:g} (as {_share(float(like))} of training rows)")
        else:
            words.append(f"{name} = {_number(float(value))} ({away[place]:+.1f} sd)".replace("-", _MINUS))
    missing = [facts.table.feature_names[place] for place in np.flatnonzero(np.isnan(values))[:most]]
    words += [f"{name} missing" for name in missing]
    return "; ".join(words) if words else "nothing beyond 1 sd"


def _deferred(facts: _Facts) -> str:
    waits = np.flatnonzero(facts.decision == "defer")
    opening = "<section><h2>Who is deferred, and why</h2>"
    if not len(waits):
        return f"{opening}<p>No row is: the estimate decides all of them.</p></section>"
    lines: list[str] = []
    for name, meaning in _REASONS.items():
        count = sum(name in facts.reasons[row] for row in waits)
        lines.append(_line(name, f">{count}", f">{_share(count / facts.table.n)}", meaning))
    several = sum(len(facts.reasons[row]) > 1 for row in waits)
    lines.append(_line("more than one of these", f">{several}", f">{_share(several / facts.table.n)}", ""))
    counts = _table(_head("reason", ">rows", ">share of all", "what it means"), lines)
    order = waits[np.argsort(-facts.doubt[waits], kind="stable")]

    def listed(rows: NDArray[np.intp], *, values: bool) -> str:
        head = [
            "row",
            "reason",
            ">effect",
            f">{facts.level} interval",
            ">wrong sign",
            ">propensity",
            ">rate percentile",
        ]
        made: list[str] = []
        for row in rows.tolist():
            cells = [
                facts.ids[row],
                ", ".join(facts.reasons[row]),
                f">{_effect(facts, float(facts.found.effect[row]), unit=False)}",
                f">{_range(facts, float(facts.found.lower[row]), float(facts.found.upper[row]))}",
                f">{_share(float(facts.doubt[row]))}",
                f">{facts.found.propensity[row]:.2f}",
                f">{facts.found.rate_percentile[row]:.0f}",
            ]
            made.append(_line(*cells, *([_unusual_values(facts, row)] if values else [])))
        return _table(_head(*head, *(["most unusual values"] if values else [])), made, kind="sortable")

    unit = "percentage points" if facts.binary else facts.unit
    shown = listed(order[:_SHOWN], values=True)
    note = f", the first {_LISTED} of them" if len(order) > _LISTED else ""
    rest = ""
    if len(order) > _SHOWN:
        rest = (
            f"<details><summary>All {len(order)} deferred rows{note}</summary>"
            f"{listed(order[:_LISTED], values=False)}</details>"
        )
    return (
        f"{opening}<p>{_count(len(waits))} of {facts.table.n} are left to a person.</p>"
        f"{counts}<h3>The {min(_SHOWN, len(order))} most doubtful</h3><p>Wrong sign: the probability, by the model's "
        f"own account, that the effect is on the other side of {escape(_cost(facts))}. Effects are in "
        f"{escape(unit or f'units of {facts.outcome}')}; sd are standard deviations of the training rows.</p>"
        f"{shown}{rest}</section>"
    )


def _groups(facts: _Facts) -> str:
    """Average effects by quarters of the covariates that go with the estimated effect."""
    x, effect = facts.table.x, facts.found.effect
    pseudo = facts.evaluation.pseudo_effect
    if np.ptp(effect) == 0:
        return ""
    strength = np.array([_correlation(x[:, place], effect) for place in range(x.shape[1])])
    chosen = [int(place) for place in np.argsort(-strength, kind="stable")[:_MODIFIERS] if strength[place] > 0.1]
    if not chosen:
        return (
            "<section><h2>Effects in groups</h2><p>No single covariate goes with the estimated effect (all rank "
            "correlations are under 0.1).</p></section>"
        )
    blocks: list[str] = []
    z = normal_quantile(facts.alpha)
    for place in chosen:
        for part, (label, rows) in enumerate(_quarters(x[:, place])):
            mean = _effect(facts, float(effect[rows].mean()), unit=False)
            robust = interval = _DASH
            known = np.zeros(0) if pseudo is None else pseudo[rows & np.isfinite(pseudo)]
            if len(known) > 1:
                half = z * float(known.std(ddof=1) / np.sqrt(len(known)))
                robust = _effect(facts, float(known.mean()), unit=False)
                interval = _range(facts, float(known.mean()) - half, float(known.mean()) + half)
            waits = _share(float(np.mean(facts.decision[rows] == "defer")))
            name = "" if part else facts.table.feature_names[place]
            blocks.append(
                _line(name, label, f">{int(rows.sum())}", f">{mean}", f">{robust}", f">{interval}", f">{waits}")
            )
    head = _head(
        "covariate",
        "values",
        ">rows",
        ">mean of estimates",
        ">doubly robust",
        f">its {facts.level} interval",
        ">deferred",
    )
    unit = "percentage points" if facts.binary else facts.unit or f"units of {facts.outcome}"
    return (
        "<section><h2>Effects in groups</h2><p>Quarters of the covariates that go most with the estimated effect, which"
        " is not to say that they cause it to differ. The doubly robust average does not rest on the model alone: where"
        f" it disagrees with the mean of the estimates, be careful. Effects in {escape(unit)}.</p>"
        f"{_table(head, blocks)}</section>"
    )


def _correlation(values: Vector, effect: Vector) -> float:
    known = np.isfinite(values)
    if known.sum() < 3 or np.ptp(values[known]) == 0:
        return 0.0
    return abs(measure.spearman(values[known], effect[known]))


def _quarters(values: Vector) -> list[tuple[str, NDArray[np.bool_]]]:
    """Divide rows at the quartiles, or by value where there are no more than four."""
    known = np.isfinite(values)
    different = np.unique(values[known])
    if len(different) <= 4:
        made = [(_number(float(value)), values == value) for value in different]
    else:
        cuts = np.unique(np.quantile(values[known], [0.25, 0.5, 0.75]))
        place = np.digitize(values, cuts)
        edges = [different[0], *cuts, different[-1]]
        made = [
            (f"{_number(float(edges[part]))} to {_number(float(edges[part + 1]))}", known & (place == part))
            for part in range(len(cuts) + 1)
        ]
    if not known.all():
        made.append(("missing", ~known))
    return [(label, rows) for label, rows in made if rows.any()]


def _training(facts: _Facts) -> str:
    from cib_ite.plots import plot_history

    history = facts.model.history_
    if not history:
        return ""
    picture = _picture(
        lambda file: plot_history(file, history),
        "Losses during training",
        "Means over the ensemble's members still training; each member keeps the weights of its own best validation.",
    )
    return f"<section><h2>Training</h2>{picture}</section>"


def _card(facts: _Facts, run_config: Mapping[str, Any] | None) -> str:
    model = facts.model
    versions = {"Python": platform.python_version()}
    for name in ("cib-ite", "torch", "numpy", "scikit-learn"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "unknown"
    calibration = model.calibration_
    made = {
        "method": "causal information bottleneck, after Kim, Baek, Hwang and Yang (arXiv:1906.03118); the paper's exact"
        " losses are reconstructed",
        "outcome": model.outcome_,
        "members": str(model.n_members),
        "seed": str(model.random_state),
        "held-out rows for calibration": str(len(calibration.rows)),
        "factor on standard deviations": f"{calibration.inflation:.3f}",
        "mean rate (information kept)": f"{float(np.mean(calibration.rate)):.2f} nats",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    facts_table = _table(_head("fact", "value"), [_line(name, value) for name, value in made.items()])
    parameters = model.get_params(deep=False)
    lines = [_line(name, str(value)) for name, value in sorted(parameters.items())]
    blocks = f"<details><summary>All parameters</summary>{_table(_head('parameter', 'value'), lines)}</details>"
    if run_config:
        text = json.dumps(dict(run_config), indent=2, default=str, ensure_ascii=False)
        blocks += f"<details><summary>Configuration of the run</summary><pre>{escape(text)}</pre></details>"
    return f"<section><h2>Model card</h2>{facts_table}{blocks}</section>"


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
<script>{script}</script>
</body>
</html>
"""

_STYLE = """
:root{--ink:#1b1f24;--soft:#57606a;--line:#d5dae0;--paper:#fff;--panel:#f5f7f9;--blue:#0072b2;--red:#d55e00;--grey:#8a8a8a}
@media (prefers-color-scheme:dark){:root{--ink:#e4e8ec;--soft:#9aa5b1;--line:#38404a;--paper:#15181c;--panel:#1e2329;
--blue:#56b4e9;--red:#f0883e;--grey:#9a9a9a}img{filter:invert(1) hue-rotate(180deg);mix-blend-mode:screen;opacity:.92}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Helvetica,Arial,sans-serif}
main{max-width:62rem;margin:0 auto;padding:2.5rem 1.5rem 4rem}
h1{font-size:1.8rem;line-height:1.2;margin:0 0 .8rem}
h2{font-size:1.25rem;margin:2.6rem 0 .7rem;padding-top:.9rem;border-top:1px solid var(--line)}
h3{font-size:1.02rem;margin:1.6rem 0 .4rem}
p{max-width:48rem;margin:.5rem 0}
.lead{font-size:1.25rem;line-height:1.45}
header p:last-child{color:var(--soft)}
.bar{display:flex;height:.8rem;border-radius:.4rem;overflow:hidden;margin:1.6rem 0 .8rem;background:var(--panel)}
.bar .treat{background:var(--blue)}.bar .control{background:var(--red)}.bar .defer{background:var(--grey)}
.cards{display:grid;grid-template-columns:repeat(3,1fr);gap:.8rem;margin-bottom:1rem}
.card{background:var(--panel);border-left:.3rem solid;border-radius:.3rem;padding:.7rem 1rem;display:flex;
flex-direction:column}
.card.treat{border-color:var(--blue)}.card.control{border-color:var(--red)}.card.defer{border-color:var(--grey)}
.card b{font-size:1.6rem;line-height:1.2}.card small{color:var(--soft)}
.box{background:var(--panel);border:1px solid var(--line);border-radius:.5rem;padding:.2rem 1.4rem 1rem;margin-top:2rem}
.box h2{border:0;margin-top:.6rem}
dt{font-weight:600;margin-top:.8rem}dd{margin:.1rem 0 0;max-width:52rem}
figure{margin:1rem 0}figure img{max-width:100%;height:auto;display:block}
figcaption{color:var(--soft);font-size:.9rem;max-width:46rem;margin-top:.3rem}
.pictures{display:grid;grid-template-columns:repeat(auto-fit,minmax(19rem,1fr));gap:0 1.6rem;align-items:start}
.wide{overflow-x:auto;margin:.8rem 0}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums;width:100%}
th,td{text-align:left;padding:.35rem .7rem .35rem 0;border-bottom:1px solid var(--line);vertical-align:top}
th{font-weight:600;vertical-align:bottom}td.n,th.n{text-align:right;white-space:nowrap}th.n{white-space:normal}
th.by{cursor:pointer}th.by:hover{text-decoration:underline}
input{font:inherit;padding:.3rem .6rem;margin:.4rem 0;background:var(--paper);color:var(--ink);
border:1px solid var(--line);border-radius:.3rem}
details{margin:.8rem 0}summary{cursor:pointer}
pre{background:var(--panel);padding:1rem;overflow-x:auto;font-size:.85rem}
@media (max-width:40rem){.cards{grid-template-columns:1fr}}
@media print{:root{--ink:#000;--soft:#444;--line:#bbb;--paper:#fff;--panel:#fff;--blue:#0072b2;--red:#d55e00;
--grey:#8a8a8a}
body{font-size:10.5pt}img{filter:none!important;mix-blend-mode:normal!important;opacity:1!important}main{max-width:none;padding:0}figure,tr,.cards{break-inside:avoid}
h2,h3{break-after:avoid}input{display:none}dt{break-after:avoid}dd{break-inside:avoid}.bar,.card{print-color-adjust:exact;-webkit-print-color-adjust:exact}
.wide{overflow:visible}table{font-size:8.5pt}}
"""

_SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], rows = [...body.rows];
  const value = (row, place) => row.cells[place].textContent.replace(/\\u2212/g, "-").trim();
  [...table.tHead.rows[0].cells].forEach((cell, place) => {
    let sign = 1;
    cell.classList.add("by");
    cell.title = "sort";
    cell.addEventListener("click", () => {
      const numeric = cell.classList.contains("n");
      const number = row => { const found = parseFloat(value(row, place).replace(/[^0-9.e-]/g, " ").trim());
        return isNaN(found) ? -Infinity : found; };
      rows.sort((a, b) => sign * (numeric ? number(b) - number(a)
        : value(a, place).localeCompare(value(b, place), undefined, {numeric: true})));
      sign = -sign;
      body.append(...rows);
    });
  });
  if (rows.length > 5) {
    const filter = document.createElement("input");
    filter.type = "search";
    filter.placeholder = "filter rows";
    filter.setAttribute("aria-label", "filter rows");
    filter.addEventListener("input", () => {
      const wanted = filter.value.toLowerCase();
      for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
    });
    table.parentElement.before(filter);
  }
}
"""
