"""Compare methods over draws or splits: every method tuned without the truth, with the same number of settings."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypedDict, cast

import numpy as np
from jaxtyping import Float, Int64

from cib_ite import metrics
from cib_ite.baselines.classical import CLASSICAL, GRIDS
from cib_ite.baselines.external import EXTERNAL
from cib_ite.data import EffectTable, Split, split
from cib_ite.estimator import CIB, Problem, fit_many
from cib_ite.inputs import OverlapWarning, SmallArmWarning
from cib_ite.overlap import auc
from cib_ite.settings import PRESETS
from cib_ite.training import HYPERPARAMETERS
from shared_core.device import one_thread
from shared_core.errors import InputError, no_such
from shared_core.runs import Claim, Result, Run, summarize

__all__ = [
    "METHODS",
    "NEURAL",
    "NEURAL_GRIDS",
    "Cell",
    "Settled",
    "choose_setting",
    "compare",
    "fit_method",
    "make_method",
    "measure",
    "paired",
    "population_shift",
    "probe_auc",
    "sweep",
]

_NO_TERMS: dict[str, Any] = {"beta": 0.0, "gamma": 0.0, "lam": 0.0, "independence": "none"}
_ONE: dict[str, Any] = {"n_members": 1}
_DECAY: dict[str, Any] = {"head_l2": 1e-2, "trunk_l2": 1e-2}
NEURAL: Mapping[str, dict[str, Any]] = {
    "cib": {},
    "cib-one": _ONE,
    "cib-adversarial": {"independence": "adversarial"},
    "vib": PRESETS["vib"],
    "cib-none": _NO_TERMS,
    "cib-gamma": {"beta": 0.0, "lam": 0.0},
    "cib-lam": _NO_TERMS | {"lam": 0.01},
    # Little compression leaves the independence term something to do.
    "light": {"beta": 0.01, "gamma": 0.0},
    "light-confusion": {"beta": 0.01, "gamma": 0.3, "disc_steps": 5},
    "light-mi": {"beta": 0.01, "gamma": 0.3, "independence": "mi-gauss"},
    "tarnet": PRESETS["tarnet"] | _ONE,
    "cfr-wass": PRESETS["cfr-wass"] | _ONE,
    "cfr-mmd": PRESETS["cfr-mmd"] | _ONE,
    "dragonnet": PRESETS["dragonnet"] | {"heads": (64,)} | _ONE,
    "mc-dropout": PRESETS["mc-dropout"] | _ONE | {"predict_samples": 100},
    # With the weight decay that CIB has, which is not CFR's: what is left between them is the bottleneck.
    "tarnet-decay": PRESETS["tarnet"] | _DECAY | _ONE,
    "tarnet-ensemble": PRESETS["tarnet"] | _DECAY,
}
_L2: list[dict[str, Any]] = [
    {"head_l2": head, "trunk_l2": trunk}
    for head, trunk in ((1e-4, 0.0), (1e-3, 1e-4), (1e-3, 1e-3), (1e-2, 1e-3), (1e-2, 1e-2), (1e-1, 1e-2))
]
_BETA: list[dict[str, Any]] = [
    {"beta": 0.1},
    {"beta": 0.01},
    {"beta": 0.03},
    {"beta": 0.3},
    {"beta": 0.1, "head_l2": 0.1},
    {"beta": 0.1, "head_l2": 1e-4, "trunk_l2": 0.0},
]
NEURAL_GRIDS: Mapping[str, list[dict[str, Any]]] = {
    **dict.fromkeys(("tarnet", "cfr-wass", "cfr-mmd", "dragonnet", "mc-dropout", "tarnet-ensemble"), _L2),
    **dict.fromkeys(("cib", "cib-one", "cib-adversarial"), _BETA),
    "vib": [{"beta": beta} for beta in (0.1, 0.01, 0.03, 0.2, 0.3, 0.5)],
}
METHODS: tuple[str, ...] = (*NEURAL, *CLASSICAL, *EXTERNAL)
_CHUNK = 5


class Cell(TypedDict):
    """What one method did on one draw; plain JSON."""

    metrics: dict[str, float]
    setting: dict[str, Any]
    seconds: float


def _silent(note: str, draws: int) -> None:
    del note, draws


def make_method(name: str, seed: int, **setting: Any) -> Any:
    """Make an unfitted estimator.

    Parameters
    ----------
    name : one of :data:`METHODS`
    seed : of everything random in it
    setting : parameters to change

    Raises
    ------
    UnknownKeyError
        For a name that does not exist.

    Examples
    --------
    >>> make_method("tarnet", 0, head_l2=0.01).head_l2
    0.01
    """
    if name in NEURAL:
        parameters: dict[str, Any] = {**NEURAL[name], **setting, "random_state": seed}
        return CIB(**parameters)
    if name in CLASSICAL:
        return CLASSICAL[name](seed).set_params(**setting)
    if name in EXTERNAL:
        return EXTERNAL[name](seed).set_params(**setting)
    raise no_such("method", name, METHODS)


def _quietly(fit: Callable[[], Any]) -> Any:
    # Overlap and arm sizes belong to the data, and every method would say the same of them again.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OverlapWarning)
        warnings.simplefilter("ignore", SmallArmWarning)
        return fit()


def _fit_all(estimators: Sequence[Any], tables: Sequence[EffectTable]) -> None:
    """Fit each estimator to its table; networks that can train together do."""
    alone: list[int] = []
    together: dict[tuple[Any, ...], list[int]] = {}
    for place, (estimator, table) in enumerate(zip(estimators, tables, strict=True)):
        if isinstance(estimator, CIB):
            settings = estimator._settings()  # pyright: ignore[reportPrivateUsage]
            fixed = {k: v for k, v in settings.to_json().items() if k not in HYPERPARAMETERS}
            key = (repr(sorted(fixed.items())), table.x.shape[1], table.outcome)
            together.setdefault(key, []).append(place)
        else:
            alone.append(place)
    for place in alone:
        table = tables[place]
        _quietly(lambda place=place, table=table: estimators[place].fit(table.x, table.treatment, table.y))
    for places in together.values():
        problems = [Problem(tables[p].x, tables[p].treatment, tables[p].y) for p in places]
        _quietly(lambda places=places, problems=problems: fit_many([estimators[p] for p in places], problems))


def factual_loss(model: Any, table: EffectTable) -> float:
    """Squared error (log loss, if binary) of the outcomes that were observed, both arms counting alike.

    Parameters
    ----------
    model : a fitted estimator
    table : rows it was not fitted to
    """
    predicted = np.asarray(model.predict_outcomes(table.x))[np.arange(table.n), table.treatment]
    if table.outcome == "binary":
        p = np.clip(predicted, 1e-6, 1 - 1e-6)
        each = -np.where(table.y == 1, np.log(p), np.log(1 - p))
    else:
        each = np.square(table.y - predicted)
    return float(np.mean([each[table.treatment == arm].mean() for arm in (0, 1)]))


def choose_setting(
    name: str, tables: Sequence[EffectTable], seeds: Sequence[int], settings: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Choose a setting for each table by the factual loss on rows held out for it; the true effects play no part.

    Parameters
    ----------
    name : one of :data:`METHODS`
    tables : rows to fit to
    seeds : one for each table
    settings : the candidates

    Returns
    -------
    The chosen setting of each table.
    """
    if len(settings) < 2:
        return [dict(settings[0]) if settings else {} for _ in tables]
    parts = [split(table, seed=seed + 77, fractions=(0.7, 0.2, 0.1)) for table, seed in zip(tables, seeds, strict=True)]
    held = [table.rows(np.concatenate([p.validation, p.test])) for table, p in zip(tables, parts, strict=True)]
    light = {"interval": "none", "n_members": 1} if name in NEURAL else {}
    estimators: list[Any] = []
    fitting: list[EffectTable] = []
    for table, part, seed in zip(tables, parts, seeds, strict=True):
        for setting in settings:
            estimators.append(make_method(name, seed, **{**light, **setting}))
            fitting.append(table.rows(part.train))
    _fit_all(estimators, fitting)
    chosen: list[dict[str, Any]] = []
    for place, rows in enumerate(held):
        own = estimators[place * len(settings) : (place + 1) * len(settings)]
        losses = [factual_loss(model, rows) for model in own]
        chosen.append(dict(settings[int(np.argmin(losses))]))
    return chosen


@dataclass(frozen=True, eq=False)
class Settled:
    """A method fitted to a table: the estimator, the setting that was chosen, and the seconds both took."""

    model: Any
    setting: dict[str, Any]
    seconds: float


def fit_method(
    name: str,
    tables: Sequence[EffectTable],
    seeds: Sequence[int],
    *,
    tune: bool = True,
    changes: Mapping[str, Any] = {},
) -> list[Settled]:
    """Tune a method on each table, if asked to, and fit it.

    Parameters
    ----------
    name : one of :data:`METHODS`
    tables : rows to fit to
    seeds : one for each table
    tune : choose among six settings by held-out factual loss; False keeps the defaults
    changes : parameters of networks to change throughout
    """
    started = time.perf_counter()
    grid = list({**NEURAL_GRIDS, **GRIDS}.get(name, []))
    fixed = dict(changes) if name in NEURAL else {}
    with one_thread():
        chosen = (
            choose_setting(name, tables, seeds, [{**fixed, **setting} for setting in grid])
            if tune and grid
            else [dict(fixed) for _ in tables]
        )
        models = [make_method(name, seed, **setting) for seed, setting in zip(seeds, chosen, strict=True)]
        _fit_all(models, tables)
    seconds = (time.perf_counter() - started) / len(tables)
    return [Settled(model, setting, seconds) for model, setting in zip(models, chosen, strict=True)]


# ---- what is measured


def probe_auc(z: Float[np.ndarray, "n d"], treatment: Int64[np.ndarray, " n"], *, seed: int = 0) -> float:
    """How well fresh probes tell the treatment from z, out of fold: the better of a linear one and a small network.

    0.5 is independence. The discriminator that trained with z is no judge of it.

    Parameters
    ----------
    z : ``(n, d)`` representations
    treatment : ``(n,)`` 0 or 1
    seed : of folds and network

    Examples
    --------
    >>> z = np.random.default_rng(0).normal(size=(200, 2))
    >>> t = (z[:, 0] > 0).astype(np.int64)
    >>> probe_auc(z, t) > 0.95
    True
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    probes: list[Any] = [
        LogisticRegression(max_iter=1000),
        MLPClassifier((32,), early_stopping=True, max_iter=200, random_state=seed),
    ]
    found: list[float] = []
    for probe in probes:
        guess = cross_val_predict(
            make_pipeline(StandardScaler(), probe), z, treatment, cv=folds, method="predict_proba"
        )
        found.append(auc(np.asarray(guess)[:, 1], treatment))
    return max(found)


def _uncertainty(model: Any, x: np.ndarray) -> np.ndarray | None:
    if isinstance(model, CIB):
        return model.uncertainty(x)
    return np.asarray(model.effect_std(x)) if hasattr(model, "effect_std") else None


def measure(model: Any, table: EffectTable, parts: Split, *, probe: bool = False) -> dict[str, float]:
    """Everything that is reported of a fitted method on one draw.

    Parameters
    ----------
    model : fitted to the rows of training and validation
    table : all rows, with whatever is known of the truth
    parts : which rows are which
    probe : also tell the treatment from the representation (networks only)

    Returns
    -------
    Metric -> value. "out" is on test rows, "in" on the others; reliability pools all rows, which the specification asks
    for because test parts are small.
    """
    test, fitted = parts.test, np.concatenate([parts.train, parts.validation])
    effect = np.asarray(model.effect(table.x))
    found: dict[str, float] = {}
    both = table.potential_outcomes()
    if table.mu0 is not None and table.mu1 is not None:
        true = table.mu1 - table.mu0
        binary_truth = table.outcome == "binary" and set(np.unique(table.mu0)) <= {0.0, 1.0}
        if not binary_truth:
            found["sqrt PEHE out"] = metrics.sqrt_pehe(effect[test], table.mu0[test], table.mu1[test])
            found["sqrt PEHE in"] = metrics.sqrt_pehe(effect[fitted], table.mu0[fitted], table.mu1[fitted])
            if (sd := float(true.std())) > 0:
                found["sqrt PEHE out / sd"] = found["sqrt PEHE out"] / sd
        else:
            outcomes = np.asarray(model.predict_outcomes(table.x))
            areas = metrics.twins_auc(
                outcomes[test, 0], outcomes[test, 1], table.mu0[test], table.mu1[test], table.treatment[test]
            )
            found |= {f"AUC {name} out": value for name, value in areas.items()}
        found["ATE error out"] = metrics.ate_error(effect[test], table.mu0[test], table.mu1[test])
        found |= _reliability(model, table, effect, true, both)
    if table.randomised is not None:
        found["policy risk out"] = metrics.policy_risk(
            effect[test], table.treatment[test], table.y[test], table.randomised[test]
        )
        found["ATT error"] = metrics.jobs_att_error(effect, table.treatment, table.y, table.randomised)
    found["factual loss out"] = factual_loss(model, table.rows(test))
    if isinstance(model, CIB) and not model.deterministic and hasattr(model, "calibration_"):
        found["rate"] = float(model.calibration_.rate.mean())
    if probe and isinstance(model, CIB):
        found["probe AUC"] = probe_auc(model.sample_latent(table.x[test])[0], table.treatment[test])
    return {name: float(value) for name, value in found.items() if np.isfinite(value)}


def _reliability(
    model: Any, table: EffectTable, effect: np.ndarray, true: np.ndarray, both: np.ndarray | None
) -> dict[str, float]:
    uncertainty = _uncertainty(model, table.x)
    if uncertainty is None or np.ptp(uncertainty) == 0:
        return {}
    error = np.abs(effect - true)
    curve = metrics.sparsification(uncertainty, error)
    kept = uncertainty <= np.quantile(uncertainty, 0.8)
    found = {
        "spearman": metrics.spearman(uncertainty, error),
        "withholding 20 %": float(np.sqrt(np.mean(error[kept] ** 2) / np.mean(error**2))),
        "AUSE / random": curve.ause / curve.ause_random if curve.ause_random > 0 else float("nan"),
    }
    if hasattr(model, "effect_std"):
        std = np.asarray(model.effect_std(table.x))
        for level, z in ((90, 1.645), (95, 1.96)):
            found[f"CATE coverage {level} %"] = float(np.mean(error <= z * std))
        found["CATE width 90 %"] = float(np.mean(2 * 1.645 * std))
        found["CRPS"] = metrics.gaussian_crps(effect, np.maximum(std, 1e-9), true)
    if isinstance(model, CIB) and both is not None:
        low, high = model.effect_interval(table.x, 0.1, target="ite")
        finite = np.isfinite(low) & np.isfinite(high)
        found["ITE coverage 90 %"] = metrics.interval_coverage(low, high, both[:, 1] - both[:, 0])
        found["ITE width 90 %"] = float(np.mean((high - low)[finite])) if finite.any() else float("nan")
        found["ITE infinite"] = float(1 - finite.mean())
    return found


_HIGHER = ("AUC", "spearman")


def _better(metric: str) -> Any:
    return "higher" if metric.startswith(_HIGHER) or "coverage" in metric else "lower"


def compare(
    run: Run,
    name: str,
    tables: Mapping[int, EffectTable],
    *,
    methods: Sequence[str],
    seed: int = 0,
    tune: bool = True,
    probe: bool = False,
    changes: Mapping[str, Any] = {},
    fractions: tuple[float, float, float] = (0.63, 0.27, 0.10),
    advance: Callable[[str, int], None] = _silent,
    on_model: Callable[[str, int, Any], None] | None = None,
) -> tuple[list[Result], list[Claim], dict[str, dict[int, Cell]]]:
    """Compare methods over several draws, or splits, of a data set.

    Parameters
    ----------
    run : where finished pieces are kept
    name : of the data set
    tables : draw -> table
    methods : names in :data:`METHODS`
    seed : of splits and methods
    tune : choose each method's setting on each draw, by held-out factual loss
    probe : tell the treatment from representations
    changes : parameters of all networks to change
    fractions : of training, validation and test rows; methods are fitted to the first two and divide them as they like
    advance : called with a note and a number of draws after each piece
    on_model : called with method, draw and fitted model, where it was made in this process and run

    Returns
    -------
    Results, claims of CIB against every other method on paired draws, and method -> draw -> cell.
    """
    for method in methods:
        make_method(method, 0)
    draws = sorted(tables)
    parts = {draw: split(tables[draw], seed=seed + draw, fractions=fractions) for draw in draws}
    pieces: dict[str, tuple[str, list[int]]] = {}
    work: dict[str, Callable[[], list[Cell]]] = {}
    for start in range(0, len(draws), _CHUNK):
        chunk = draws[start : start + _CHUNK]
        for method in methods:
            key = f"{name}/{method}/{chunk}/{tune}/{probe}/{sorted(changes.items())}"
            pieces[key] = method, chunk
            of_chunk = {d: (tables[d], parts[d]) for d in chunk}
            work[key] = partial(_cells, method, of_chunk, seed, tune, probe, changes, on_model)

    def tell(key: str, found: list[Cell]) -> None:
        method, chunk = pieces[key]
        metric = next(iter(found[0]["metrics"]))
        mean = np.mean([cell["metrics"][metric] for cell in found])
        advance(f"{method}: {metric} {mean:.3f}", len(chunk))

    cells: dict[str, dict[int, Cell]] = {method: {} for method in methods}
    for key, found in run.each(work, tell).items():
        method, chunk = pieces[key]
        cells[method].update(zip(chunk, found, strict=True))
    return _rows(name, cells), paired(name, cells), cells


def _cells(
    method: str,
    draws: Mapping[int, tuple[EffectTable, Split]],
    seed: int,
    tune: bool,
    probe: bool,
    changes: Mapping[str, Any],
    on_model: Callable[[str, int, Any], None] | None,
) -> list[Cell]:
    """Fit a method to some draws together, and measure it on each."""
    fitted = [table.rows(np.concatenate([parts.train, parts.validation])) for table, parts in draws.values()]
    settled = fit_method(method, fitted, [seed + draw for draw in draws], tune=tune, changes=changes)
    if on_model is not None:
        for draw, each in zip(draws, settled, strict=True):
            on_model(method, draw, each.model)
    return [
        {
            "metrics": measure(each.model, table, parts, probe=probe),
            "setting": each.setting,
            "seconds": each.seconds,
        }
        for (table, parts), each in zip(draws.values(), settled, strict=True)
    ]


def _rows(name: str, cells: Mapping[str, Mapping[int, Cell]]) -> list[Result]:
    metrics_seen = dict.fromkeys(m for by_draw in cells.values() for cell in by_draw.values() for m in cell["metrics"])
    results: list[Result] = []
    for metric in metrics_seen:
        for method, by_draw in cells.items():
            values = [cell["metrics"][metric] for cell in by_draw.values() if metric in cell["metrics"]]
            if not values:
                continue
            seconds = sum(cell["seconds"] for cell in by_draw.values())
            results.append(
                summarize(values, dataset=name, method=method, metric=metric, better=_better(metric), seconds=seconds)
            )
            if metric == "sqrt PEHE out" and len(values) > 2:
                # A few draws with heavy tails decide the mean.
                median = float(np.median(values))
                results.append(
                    summarize([median], dataset=name, method=method, metric="median sqrt PEHE out", better="lower")
                )
    return results


def paired(name: str, cells: Mapping[str, Mapping[int, Cell]], *, seed: int = 0) -> list[Claim]:
    """Hold CIB against every other method on the same draws: mean difference with a bootstrap interval, and wins.

    Parameters
    ----------
    name : of the data set
    cells : method -> draw -> cell
    seed : of the bootstrap
    """
    ours = "cib" if "cib" in cells else next((m for m in cells if m.startswith(("cib", "vib"))), None)
    if ours is None:
        return []
    first = next(iter(next(iter(cells[ours].values()))["metrics"]))
    sign = 1.0 if _better(first) == "lower" else -1.0
    claims: list[Claim] = []
    for other, by_draw in cells.items():
        draws = [d for d in by_draw if d in cells[ours] and first in by_draw[d]["metrics"]]
        if other == ours or len(draws) < 2:
            continue
        gap = sign * np.array([cells[ours][d]["metrics"][first] - by_draw[d]["metrics"][first] for d in draws])
        random = np.random.default_rng(seed)
        means = gap[random.integers(0, len(gap), (4000, len(gap)))].mean(axis=1)
        low, high = np.quantile(means, [0.025, 0.975])
        claims.append(
            Claim(
                text=f"{name}: {first} of {ours} is better than {other}'s on the same draws: difference"
                f" {gap.mean():.3f}, bootstrap interval {low:.3f} to {high:.3f}, better on"
                f" {int((gap < 0).sum())} of {len(gap)}",
                source="this project",
                holds=bool(high < 0),
                value=float(gap.mean()),
                threshold=0.0,
            )
        )
    return claims


# ---- population shift


class Shift(TypedDict):
    """What happened on rows of a group that training never saw; plain JSON."""

    auroc: float
    auroc_rate: float
    uncertainty_seen: float
    uncertainty_unseen: float
    deferred_seen: float
    deferred_unseen: float
    sqrt_pehe_seen: float
    sqrt_pehe_unseen: float


def population_shift(table: EffectTable, column: str, *, seed: int = 0, **changes: Any) -> Shift:
    """Fit where a 0/1 covariate is 1, without that covariate, and look at all rows (protocol of Jesson et al., 2020).

    Parameters
    ----------
    table : all rows
    column : name of the covariate, e.g. ``b.marr``
    seed : of the estimator
    changes : its parameters

    Returns
    -------
    AUROC with which the uncertainty, and the rate, tell the unseen group; means, deferred shares and errors of both.
    """
    if column not in table.feature_names:
        raise no_such("covariate", column, table.feature_names)
    place = table.feature_names.index(column)
    group = table.x[:, place]
    if set(np.unique(group)) != {0.0, 1.0}:
        raise InputError(f"'{column}' is not a 0/1 covariate")
    x = np.delete(table.x, place, axis=1)
    seen = group == 1
    # Part of the seen group is kept out of training: what is compared must differ in the group only.
    held = np.random.default_rng([seed, 3]).random(table.n) < 0.3
    fit = seen & ~held
    with one_thread():
        model = CIB(random_state=seed, **changes)
        _quietly(lambda: model.fit(x[fit], table.treatment[fit], table.y[fit]))
    found = model.effect_inference(x)
    looked = ~fit
    unseen = (~seen[looked]).astype(np.int64)
    deferred = model.decide(x)[looked] == "defer"
    score, rate = found.uncertainty[looked], found.rate[looked]
    error = np.square(found.effect - table.effect)[looked] if table.effect is not None else None

    def root(rows: np.ndarray) -> float:
        return float("nan") if error is None else float(np.sqrt(error[rows].mean()))

    return {
        "auroc": auc(score, unseen),
        "auroc_rate": auc(rate, unseen),
        "uncertainty_seen": float(score[unseen == 0].mean()),
        "uncertainty_unseen": float(score[unseen == 1].mean()),
        "deferred_seen": float(deferred[unseen == 0].mean()),
        "deferred_unseen": float(deferred[unseen == 1].mean()),
        "sqrt_pehe_seen": root(unseen == 0),
        "sqrt_pehe_unseen": root(unseen == 1),
    }


def sweep(
    table: EffectTable, grid: Sequence[tuple[float, float]], *, seed: int = 0, **parameters: Any
) -> list[dict[str, float]]:
    """Fit one estimator for each (beta, gamma), all as one program, and judge each on rows it did not see.

    Parameters
    ----------
    table : the rows
    grid : values of beta and gamma
    seed : of the split and the estimators
    parameters : others of :class:`cib_ite.CIB`

    Returns
    -------
    For each point beta, gamma, the factual loss, R-loss, mean rate (nats) and fresh-probe AUC on held-out rows. True
    effects are not used, even where the table has them.
    """
    parts = split(table, seed=seed, fractions=(0.7, 0.2, 0.1))
    held_rows = np.concatenate([parts.validation, parts.test])
    fitted, held = table.rows(parts.train), table.rows(held_rows)
    settings: dict[str, Any] = {**parameters, "interval": "none", "random_state": seed}
    settings["allow_missing"] = bool(np.isnan(table.x).any())
    points_at: list[dict[str, Any]] = [{"beta": float(b), "gamma": float(g)} for b, g in grid]
    models = [CIB(**settings).set_params(**point) for point in points_at]
    with one_thread():
        _quietly(lambda: fit_many(models, [Problem(fitted.x, fitted.treatment, fitted.y)] * len(models)))
    filled = models[0].preprocessor_.transform(held.x)
    nuisances = metrics.cross_fit_nuisances(
        filled, held.treatment, held.y, outcome=cast("Any", held.outcome), seed=seed
    )
    points: list[dict[str, float]] = []
    for model, (b, g) in zip(models, grid, strict=True):
        risk = metrics.tau_risk_r(
            model.effect(held.x), held.treatment, held.y, nuisances.outcome_mean, nuisances.propensity
        )  # fmt: skip
        points.append(
            {
                "beta": float(b),
                "gamma": float(g),
                "factual loss": factual_loss(model, held),
                "R loss": float(risk),
                "rate": model.mean_rate(held.x),
                "probe AUC": probe_auc(model.sample_latent(held.x)[0], held.treatment, seed=seed),
            }
        )
    return points
