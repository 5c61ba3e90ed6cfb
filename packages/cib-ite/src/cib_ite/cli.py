"""The command line ``cib-ite``. Everything that needs torch is imported when a command runs, so help is quick."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from pydantic import Field

from shared_core.cli import CommandConfig, CommandLine, Outcome, Session, argument
from shared_core.errors import InputError
from shared_core.runs import Claim, Result, Run, atomic_path, read_summary, summarize, write_json

if TYPE_CHECKING:
    import pandas as pd

    from cib_ite.data import EffectSchema, EffectTable, Loaded
    from cib_ite.estimator import CIB
    from cib_ite.evaluate import Evaluation

line = CommandLine(
    "cib-ite",
    help="Individual treatment effects with uncertainty one can act on (after Kim et al., 2019).",
)
main = line.main

_MODEL, _SCHEMA, _TABLE = "model.safetensors", "schema.json", "training.json"
_SMALL = ("cib", "tarnet", "cfr-wass", "ols2", "rf-t")


class DataOptions(CommandConfig):
    """Which columns of a user's table are what."""

    treatment: str | None = Field(None, description="column of the treatment (own tables)")
    outcome: str | None = Field(None, description="column of the outcome (own tables)")
    exclude: tuple[str, ...] = Field((), description="columns to leave out (own tables)")
    control: str | None = Field(None, description="value of the treatment column that is the control")
    positive: str | None = Field(None, description="value of a two-valued outcome column that counts as 1")
    draw: int = Field(0, ge=0, description="which draw of data that has several")


class ModelOptions(CommandConfig):
    """The model's parameters that matter; the others are for Python."""

    members: int = Field(5, ge=1, description="networks in the ensemble")
    beta: float = Field(0.1, ge=0, description="weight of the compression term, per nat")
    gamma: float = Field(0.1, ge=0, description="weight of the independence term")
    lam: float = Field(0.01, ge=0, description="weight of the variance of counterfactual predictions")
    independence: Literal["confusion", "adversarial", "mmd-lin", "mmd-rbf", "wass", "mi-gauss", "none"] = Field(
        "confusion", description="measure of dependence between representation and treatment"
    )
    likelihood: Literal["gaussian", "hetero", "mse"] = Field("gaussian", description="noise of continuous outcomes")
    steps: int = Field(2000, ge=1, description="most training steps; validation stops earlier")
    latent: int = Field(20, ge=1, description="dimensions of the representation")
    width: int = Field(64, ge=1, description="hidden units of each layer")
    batch_size: int = Field(100, ge=4, description="rows in a step")
    lr: float = Field(2e-3, gt=0, description="step size")
    interval: Literal["conformal", "split"] = Field(
        "conformal", description="calibrate on the rows each member held out, or on a quarter that no member sees"
    )


def _model(config: ModelOptions, **more: Any) -> CIB:
    from cib_ite.estimator import CIB

    return CIB(
        n_members=config.members,
        beta=config.beta,
        gamma=config.gamma,
        lam=config.lam,
        independence=config.independence,
        likelihood=config.likelihood,
        steps=config.steps,
        latent=config.latent,
        trunk=(config.width, config.width),
        heads=(config.width, config.width),
        discriminator=(config.width,),
        batch_size=config.batch_size,
        lr=config.lr,
        interval=config.interval,
        device=config.device,
        random_state=config.seed,
        **more,
    )


def _load(source: str | Path, config: DataOptions, **more: Any) -> Loaded:
    from cib_ite.data import load

    return load(
        source,
        draw=config.draw,
        seed=config.seed,
        treatment=config.treatment,
        outcome=config.outcome,
        exclude=config.exclude,
        control=config.control,
        positive=config.positive,
        **more,
    )


# ---- demo and compare


class DemoConfig(CommandConfig):
    """Settings of ``demo``."""

    draws: int = Field(5, ge=1, description="draws of the outcome surface and of the treatment")
    methods: tuple[str, ...] = Field(("cib", "tarnet", "ols2", "rf-t"), description="methods to compare")
    steps: int = Field(300, ge=25, description="most training steps of the networks")


@line.command(DemoConfig, spread=True)
def demo(config: DemoConfig, session: Session) -> Outcome:
    """Estimate effects on real covariates with a known outcome surface, and test the uncertainty (under a minute)."""
    from cib_ite.data import embedded
    from cib_ite.experiments import compare as compare_methods
    from cib_ite.experiments import fit_method
    from cib_ite.plots import plot_comparison

    tables = {d: embedded("diabetes", seed=config.seed + d) for d in range(config.draws)}
    changes = {"steps": config.steps, "device": str(session.device)}
    models: dict[str, Any] = {}

    def keep(method: str, draw: int, model: Any) -> None:
        if (method, draw) == ("cib", 0):
            models["cib"] = model

    with session.progress("demo", len(config.methods) * config.draws) as advance:
        results, claims, _ = compare_methods(
            session.run,
            "diabetes, surface B",
            tables,
            methods=config.methods,
            seed=config.seed,
            tune=False,
            changes=changes,
            advance=lambda note, draws: advance(draws, note=note),
            on_model=keep,
        )
    # After an interruption, or where a worker made it, the model is not at hand.
    model = models.get("cib") or fit_method("cib", [tables[0]], [config.seed], tune=False, changes=changes)[0].model
    drawn = ("sqrt PEHE out / sd", "spearman", "withholding 20 %", "CATE coverage 90 %")
    shown = [r for r in results if r.metric in ("sqrt PEHE out", *drawn)]
    plot_comparison(session.run.artifact("comparison.png"), [r for r in shown if r.metric in drawn])
    _pictures(session, model, tables[0])
    notes = [
        "442 real patients; treatment and outcome are simulated on them (Hill's response surface B, and a corner of",
        "the covariates in which nobody is treated), so that true effects are known. Methods have their default",
        "settings; 'cib-ite compare' tunes them. sqrt PEHE: root mean squared error of the effects (/ sd: of theirs).",
    ]
    return Outcome(shown, claims, notes)


def _pictures(session: Session, model: CIB, table: EffectTable, evaluation: Evaluation | None = None) -> None:
    from cib_ite.evaluate import as_rows, evaluate_model
    from cib_ite.plots import plot_effects, plot_overlap

    x = as_rows(model, table)
    found = model.effect_inference(x)
    plot_effects(session.run.artifact("effects.png"), found, model.decide(x))
    plot_overlap(
        session.run.artifact("overlap.png"),
        found.propensity,
        table.treatment,
        no_overlap=found.no_overlap,
        rate_percentile=found.rate_percentile,
        bounds=model.overlap_.bounds,
    )
    _withheld(session.run.artifact("withholding.png"), evaluation or evaluate_model(model, table))


def _withheld(path: Path, evaluation: Evaluation) -> bool:
    """Draw the withholding curve of the true error, or, where nobody knows it, of the factual one."""
    from cib_ite.plots import plot_withholding

    for kind, label in (("effect", "root PEHE of the rows kept"), ("factual", "factual error of the rows kept")):
        if kind in evaluation.withholding:
            plot_withholding(path, {"cib": evaluation.withholding[kind]}, ylabel=label)
            return True
    return False


def _write_report(session: Session, model: CIB, table: EffectTable, config: dict[str, Any], **more: Any) -> None:
    from cib_ite.report import write_report

    write_report(session.run.artifact("report.html"), model, table, run_config=config, **more)


class CompareConfig(DataOptions):
    """Settings of ``compare``."""

    data: str = argument(
        "ihdp, twins, jobs, acic2016, diabetes, breast-cancer, confounded, overlap-failure, ihdp-econml, or a file"
    )
    methods: tuple[str, ...] = Field(_SMALL, description="methods; an unknown name lists them all")
    draws: int = Field(10, ge=1, description="draws (or splits, where there is one draw only)")
    tune: bool = Field(True, description="choose each method's setting on each draw by held-out factual loss")
    probe: bool = Field(False, description="tell the treatment from representations by fresh probes")
    units: int | None = Field(None, ge=50, description="rows to draw or choose (twins, acic2016, generated sets)")
    kappa: float | None = Field(None, description="strength of confounding (confounded)")
    members: int | None = Field(None, ge=1, description="members of the networks, instead of each method's own")
    steps: int | None = Field(None, ge=25, description="most training steps of the networks")
    width: int | None = Field(None, ge=1, description="hidden units of the networks")
    beta: float | None = Field(None, ge=0, description="beta of the bottleneck methods, not tuned then")
    shift: str | None = Field(
        None, description="0/1 covariate: train where it is 1 and look at the unseen group (cib only)"
    )
    test: float = Field(0.1, gt=0, lt=0.9, description="share of rows to test on")


@line.command(CompareConfig, spread=True)
def compare(config: CompareConfig, session: Session) -> Outcome:
    """Compare methods over draws: accuracy, and whether the uncertainty predicts the error."""
    from cib_ite.data import draws as count_draws
    from cib_ite.experiments import compare as compare_methods
    from cib_ite.plots import plot_comparison

    more = {key: value for key, value in (("n", config.units), ("kappa", config.kappa)) if value is not None}
    available = count_draws(config.data)
    tables: dict[int, EffectTable] = {}
    for d in range(config.draws):
        draw = config.draw + d
        if available == 1:
            tables[d] = tables[0] if d else _load(config.data, config, **more).table
        else:
            tables[draw] = _load(config.data, config.model_copy(update={"draw": draw}), **more).table
    if config.shift is not None:
        return _shift(config, session, tables)
    changes: dict[str, Any] = {"device": str(session.device)}
    if config.members is not None:
        changes["n_members"] = config.members
    if config.steps is not None:
        changes["steps"] = config.steps
    if config.width is not None:
        changes |= {"trunk": (config.width,) * 2, "heads": (config.width,) * 2, "discriminator": (config.width,)}
    if config.beta is not None:
        changes["beta"] = config.beta
    name = Path(config.data).stem + ("" if config.kappa is None else f", kappa {config.kappa:g}")
    with session.progress("compare", len(config.methods) * config.draws) as advance:
        results, claims, cells = compare_methods(
            session.run,
            name,
            tables,
            methods=config.methods,
            seed=config.seed,
            tune=config.tune and config.beta is None,
            probe=config.probe,
            changes=changes,
            fractions=(0.7 * (1 - config.test), 0.3 * (1 - config.test), config.test),
            advance=lambda note, draws: advance(draws, note=note),
        )
    write_json(session.run.artifact("cells.json"), {m: {str(d): c for d, c in by.items()} for m, by in cells.items()})
    plot_comparison(session.run.artifact("comparison.png"), results)
    picked = [json.dumps(c["setting"], sort_keys=True) for m, by in cells.items() if m == "cib" for c in by.values()]
    notes = [f"settings chosen for cib: {', '.join(f'{picked.count(s)} x {s}' for s in dict.fromkeys(picked))}"]
    return Outcome(results, claims, notes if picked and config.tune else [])


def _shift_cell(table: EffectTable, column: str, seed: int, changes: dict[str, Any]) -> dict[str, float]:
    import math

    from cib_ite.experiments import population_shift

    found = cast("dict[str, float]", population_shift(table, column, seed=seed, **changes))
    return {name: float(value) for name, value in found.items() if not math.isnan(value)}


def _shift(config: CompareConfig, session: Session, tables: dict[int, EffectTable]) -> Outcome:
    from cib_ite.evaluate import in_words

    changes: dict[str, Any] = {"device": str(session.device)}
    changes |= {} if config.steps is None else {"steps": config.steps}
    changes |= {} if config.members is None else {"n_members": config.members}
    work = {
        f"shift/{config.shift}/{draw}": partial(_shift_cell, table, config.shift or "", config.seed + draw, changes)
        for draw, table in tables.items()
    }
    with session.progress("shift", len(tables)) as advance:
        found = session.run.each(work, lambda _, cell: advance(note=f"AUROC {cell['auroc']:.3f}"))
    cells = list(found.values())
    results: list[Result] = []
    for metric in cells[0]:
        values = [cell[metric] for cell in cells if metric in cell]
        better: Literal["lower", "higher"] = "lower" if metric.endswith("_seen") or "pehe" in metric else "higher"
        results.append(
            summarize(
                values,
                dataset=f"{config.data}, shift {config.shift}",
                method="cib",
                metric=in_words(metric),
                better=better,
            )
        )
    mean = sum(max(c["auroc"], c["auroc_rate"]) for c in cells) / len(cells)
    text = "uncertainty or rate tells rows of the unseen group (mean AUROC)"
    return Outcome(
        results, [Claim(text=text, source="specification 8.4b", holds=mean >= 0.6, value=mean, threshold=0.6)]
    )


# ---- a user's own data


class FitConfig(DataOptions, ModelOptions):
    """Settings of ``fit``."""

    data: str = argument("table (CSV, TSV, Parquet, NPZ) with --treatment and --outcome, or a named set")
    cost: float = Field(0.0, description="of treating, in units of the outcome: effects above it are worth treating")
    max_defer: float = Field(0.2, ge=0, le=1, description="share of rows like those of training to defer for doubt")
    alpha: float = Field(0.1, gt=0, lt=1, description="share of misses that intervals allow")


@line.command(FitConfig)
def fit(config: FitConfig, session: Session) -> Outcome:
    """Fit to a table: effects, intervals and decisions for its rows, pictures and a report."""
    import numpy as np

    found = _load(config.data, config)
    table = found.table
    model = _model(config, allow_missing=bool(np.isnan(table.x).any()), outcome=table.outcome)
    state = session.run.load_checkpoint()
    done = 0 if state is None else int(state["step"])
    with session.progress("fit", config.steps, done) as advance:
        last = done

        def after(check: Any) -> None:
            nonlocal last
            terms = {name: sum(values) / len(values) for name, values in check.terms.items() if values}
            validation = sum(check.validation) / len(check.validation)
            session.run.log(step=float(check.step), validation=validation, **terms)
            advance(check.step - last, note=f"validation {validation:.4f}, {check.alive} training")
            last = check.step

        model.fit(
            _frame(table.x, table.feature_names),
            table.treatment,
            table.y,
            X_unlabeled=None if found.unlabelled is None else _frame(found.unlabelled, table.feature_names),
            on_check=after,
            resume=state,
            on_state=session.run.save_checkpoint,
            world=session.world,
        )
    model.save(session.run.artifact(_MODEL))
    _keep(session.run, config, found)
    frame = _effects_frame(model, table, config.cost, config.max_defer, config.alpha)
    _write_csv(session.run.artifact("effects.csv"), frame)
    return _after_fit(config, session, model, table, frame)


def _after_fit(config: FitConfig, session: Session, model: CIB, table: EffectTable, frame: pd.DataFrame) -> Outcome:
    from cib_ite.evaluate import evaluate_model
    from cib_ite.plots import plot_history

    evaluation = evaluate_model(model, table, alpha=config.alpha, cost=config.cost)
    _write_csv(session.run.artifact("curves.csv"), evaluation.to_frame())
    plot_history(session.run.artifact("history.png"), model.history_)
    _pictures(session, model, table, evaluation)
    _write_report(
        session,
        model,
        table,
        config.model_dump(mode="json"),
        evaluation=evaluation,
        cost=config.cost,
        max_defer=config.max_defer,
        alpha=config.alpha,
    )
    _keep_metrics(session.run, evaluation)
    low, high = model.ate_interval()
    counts = frame["decision"].value_counts()
    notes = [
        f"{table.n:,} rows ({int(table.treatment.sum()):,} treated), outcome {model.outcome_}; average effect"
        f" {float(model.calibration_.pseudo_effect.mean()):.4g}, 95 % interval {low:.4g} to {high:.4g} (doubly robust)",
        "decisions: " + ", ".join(f"{name} {int(counts.get(name, 0)):,}" for name in ("treat", "control", "defer")),
        f"open {session.run.folder / 'report.html'} in a browser",
    ]
    return Outcome(_evaluation_rows(evaluation, Path(config.data).stem), notes=notes)


_DESCRIPTIVE = ("ate", "ate_low", "ate_high", "ause_random", "factual_ause_random", "propensity_auc")


def _keep_metrics(run: Run, evaluation: Any) -> str:
    """Write everything that was measured, and say in a line what describes the rows and is neither good nor bad."""
    import math

    from cib_ite.evaluate import in_words

    found = {name: value for name, value in evaluation.metrics.items() if math.isfinite(value)}
    write_json(run.artifact("metrics.json"), found)
    return ", ".join(f"{in_words(name)} {value:.4g}" for name, value in found.items() if _describes(name))


def _describes(metric: str) -> bool:
    return metric in _DESCRIPTIVE or metric.startswith("aipw_") or metric.endswith(("_share", "_withheld"))


def _evaluation_rows(evaluation: Any, name: str) -> list[Result]:
    import math

    from cib_ite.evaluate import in_words

    higher = ("coverage", "auc", "spearman")
    return [
        summarize(
            [value],
            dataset=name,
            method="cib",
            metric=in_words(metric),
            better="higher" if any(h in metric for h in higher) else "lower",
        )
        for metric, value in evaluation.metrics.items()
        if math.isfinite(value) and not _describes(metric)
    ]  # fmt: skip


def _frame(x: Any, names: tuple[str, ...]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(x, columns=list(names))


def _keep(run: Run, config: FitConfig, found: Loaded) -> None:
    """Remember how the table was read, so that `predict`, `report` and `plot` find their way."""
    from cib_ite.data import NAMES

    write_json(run.artifact(_SCHEMA), None if found.schema is None else found.schema.to_json())
    kept = {name: getattr(config, name) for name in ("treatment", "outcome", "control", "positive", "draw", "seed")}
    where = config.data if config.data in NAMES else str(Path(config.data).resolve())
    settings = {"cost": config.cost, "max_defer": config.max_defer, "alpha": config.alpha}
    write_json(run.artifact(_TABLE), {"data": where, "exclude": list(config.exclude), **kept, **settings})


def _effects_frame(model: CIB, table: EffectTable, cost: float, max_defer: float, alpha: float) -> pd.DataFrame:
    x = _frame(table.x, table.feature_names)
    frame = model.effect_inference(x, alpha).to_frame()
    outcomes = model.predict_outcomes(x)
    frame.insert(1, "mu0", outcomes[:, 0])
    frame.insert(2, "mu1", outcomes[:, 1])
    frame["decision"] = model.decide(x, cost, max_defer)
    return frame


def _write_csv(path: Path, frame: pd.DataFrame) -> None:
    with atomic_path(path) as temporary:
        frame.to_csv(temporary, index=False, float_format="%.8g")


def _open_run(folder: Path) -> tuple[CIB, EffectSchema | None, dict[str, Any]]:
    """Read what ``fit`` left in its run folder."""
    from cib_ite.data import EffectSchema
    from cib_ite.estimator import CIB

    if not folder.is_dir():
        raise InputError(f"{folder}: not a folder; give the run folder of 'cib-ite fit'")
    if not (folder / _MODEL).exists():
        raise InputError(f"{folder}: has no {_MODEL}; give the run folder of 'cib-ite fit'")
    model = CIB.load(folder / _MODEL)
    try:
        schema = json.loads((folder / _SCHEMA).read_text(encoding="utf-8"))
        kept = json.loads((folder / _TABLE).read_text(encoding="utf-8"))
        made = None if schema is None else EffectSchema.from_json(schema)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{folder}: {_SCHEMA} or {_TABLE} is missing or damaged ({error}); fit again") from error
    return model, made, kept


class PredictConfig(CommandConfig):
    """Settings of ``predict``."""

    run: Path = argument("run folder of fit")
    data: Path = argument("table with the covariates of the training table (CSV, TSV, Parquet, NPZ)")
    output: Path | None = Field(None, description="CSV to write (default: effects.csv in the run folder of predict)")
    cost: float = Field(0.0, description="of treating, in units of the outcome")
    max_defer: float = Field(0.2, ge=0, le=1, description="share of rows like those of training to defer for doubt")
    alpha: float = Field(0.1, gt=0, lt=1, description="share of misses that intervals allow")


@line.command(PredictConfig)
def predict(config: PredictConfig, session: Session) -> Outcome:
    """Effects, intervals, uncertainty in parts, propensity and decisions for new rows."""
    import numpy as np

    from cib_ite.data import EffectTable
    from shared_core.tables import read_table

    model, schema, _ = _open_run(config.run)
    frame = read_table(config.data)
    names = tuple(str(name) for name in model.feature_names_in_)
    if schema is not None:
        x = schema.features(frame, str(config.data))
    else:
        if absent := [name for name in names if name not in frame.columns]:
            raise InputError(f"{config.data}: no column '{absent[0]}', which the model was trained on")
        x = frame[list(names)].to_numpy(dtype=np.float64)
    nobody = np.zeros(len(x), dtype=np.int64)
    table = EffectTable(config.data.stem, x, nobody, np.zeros(len(x)), names, cast("Any", model.outcome_))
    effects = _effects_frame(model, table, config.cost, config.max_defer, config.alpha)
    path = config.output or session.run.artifact("effects.csv")
    _write_csv(path, effects)
    counts = effects["decision"].value_counts()
    notes = [
        f"wrote {path}: {len(effects):,} rows, mean effect {effects['effect'].mean():.4g}",
        "decisions: " + ", ".join(f"{name} {int(counts.get(name, 0)):,}" for name in ("treat", "control", "defer")),
    ]
    return Outcome(notes=notes)


class EvaluateConfig(DataOptions):
    """Settings of ``evaluate``."""

    run: Path = argument("run folder of fit")
    data: str = argument("rows to evaluate on: a table like the training table, a CFR-layout NPZ, or a named set")
    cost: float = Field(0.0, description="of treating, in units of the outcome")
    alpha: float = Field(0.1, gt=0, lt=1, description="share of misses that intervals allow")


@line.command(EvaluateConfig)
def evaluate(config: EvaluateConfig, session: Session) -> Outcome:
    """Measure a fitted model on other rows: against true effects where they are known, else without them."""
    from cib_ite.evaluate import evaluate_model
    from cib_ite.plots import plot_calibration

    model, schema, kept = _open_run(config.run)
    table = _table_for(config.data, config, schema, kept)
    evaluation = evaluate_model(model, table, alpha=config.alpha, cost=config.cost)
    described = _keep_metrics(session.run, evaluation)
    _write_csv(session.run.artifact("curves.csv"), evaluation.to_frame())
    _withheld(session.run.artifact("withholding.png"), evaluation)
    if evaluation.calibration is not None:
        plot_calibration(session.run.artifact("calibration.png"), {"cib": evaluation.calibration})
    return Outcome(_evaluation_rows(evaluation, Path(config.data).stem), notes=[described])


def _table_for(source: str, config: DataOptions, schema: EffectSchema | None, kept: dict[str, Any]) -> EffectTable:
    """Read rows with treatment and outcome, a user's table by the schema of the training table."""
    from cib_ite.data import NAMES
    from shared_core.tables import read_table

    if schema is not None and source not in NAMES:
        return schema.read(read_table(source), source, Path(source).stem).table
    if source == kept["data"] and source in NAMES:
        config = config.model_copy(update={"draw": kept["draw"], "seed": kept["seed"]})
    return _load(source, config).table


# ---- tune


class TuneConfig(DataOptions, ModelOptions):
    """Settings of ``tune``."""

    data: str = argument("table with --treatment and --outcome, or a named set")
    betas: tuple[float, ...] = Field((0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5), description="values of beta to try")
    gammas: tuple[float, ...] = Field((), description="values of gamma to try as well (default: --gamma only)")
    criterion: Literal["factual", "r"] = Field(
        "factual", description="choose by held-out factual loss, or by R-loss; true effects are never used"
    )


@line.command(TuneConfig)
def tune(config: TuneConfig, session: Session) -> Outcome:
    """Choose beta (and gamma) for a table without the truth: one vectorised run over all values."""
    from cib_ite.experiments import sweep
    from cib_ite.plots import plot_sweep

    table = _load(config.data, config).table
    grid = [(b, g) for b in config.betas for g in (config.gammas or (config.gamma,))]
    if not grid:
        raise InputError("--betas: give at least one value")

    def compute() -> list[dict[str, float]]:
        base = {key: value for key, value in _model(config).get_params().items() if key not in {"beta", "gamma"}}
        return sweep(table, grid, seed=config.seed, **base)

    with session.progress("tune", 1) as advance:
        points = session.run.once("sweep", compute)
        advance()
    key = "factual loss" if config.criterion == "factual" else "R loss"
    best = min(points, key=lambda point: point[key])
    results = [
        summarize(
            [point[name]],
            dataset=table.name,
            method=f"beta {point['beta']:g} gamma {point['gamma']:g}",
            metric=name,
            better="lower",
        )
        for point in points
        for name in ("factual loss", "R loss", "rate", "probe AUC")
        if name in point
    ]  # fmt: skip
    chosen = f"beta = {best['beta']!r}\ngamma = {best['gamma']!r}\n"
    with atomic_path(session.run.artifact("chosen.toml")) as temporary:
        temporary.write_text(chosen, encoding="utf-8")
    at = [point for point in points if point["gamma"] == best["gamma"]]
    plot_sweep(
        session.run.artifact("sweep.png"),
        [point["beta"] for point in at],
        rate=[point["rate"] for point in at],
        risk=[point[key] for point in at],
        probe_auc=[point["probe AUC"] for point in at],
        risk_label=key,
    )
    notes = [
        f"chosen by {key}: beta {best['beta']:g}, gamma {best['gamma']:g}; use it with --config"
        f" {session.run.folder / 'chosen.toml'}"
    ]
    return Outcome(results, notes=notes)


# ---- plot, report, export, data


class PlotConfig(CommandConfig):
    """Settings of ``plot``."""

    run: Path = argument("run folder of fit, compare or tune, or its summary.json")
    kind: Literal["auto", "withhold", "calibration", "overlap", "effects", "history", "comparison"] = Field(
        "auto", description="what to draw; auto is effects for a fit and comparison for anything else"
    )
    output: Path | None = Field(None, description="PNG, SVG or PDF to write (default: in the run folder of plot)")


@line.command(PlotConfig)
def plot(config: PlotConfig, session: Session) -> Outcome:
    """Draw a finished run again."""
    from cib_ite import plots
    from cib_ite.evaluate import evaluate_model

    fitted = config.run.is_dir() and (config.run / _MODEL).exists()
    kind = config.kind if config.kind != "auto" else ("effects" if fitted else "comparison")
    path = config.output or session.run.artifact(f"{kind}.png")
    if kind == "comparison":
        plots.plot_comparison(path, read_summary(config.run).results)
        return Outcome(notes=[f"wrote {path}"])
    model, schema, kept = _open_run(config.run)
    if kind == "history":
        plots.plot_history(path, model.history_)
        return Outcome(notes=[f"wrote {path}"])
    table = _training_table(schema, kept)
    x = _frame(table.x, table.feature_names)
    if kind == "effects":
        plots.plot_effects(path, model.effect_inference(x), model.decide(x))
    elif kind == "overlap":
        found = model.effect_inference(x)
        plots.plot_overlap(
            path,
            found.propensity,
            table.treatment,
            no_overlap=found.no_overlap,
            rate_percentile=found.rate_percentile,
            bounds=model.overlap_.bounds,
        )
    elif kind == "withhold":
        if not _withheld(path, evaluate_model(model, table)):
            raise InputError(f"{config.run}: these data do not tell any error; try --kind overlap")
    else:
        curve = evaluate_model(model, table).calibration
        if curve is None:
            raise InputError(f"{config.run}: calibration needs true effects, which these data lack; try --kind overlap")
        plots.plot_calibration(path, {"cib": curve})
    return Outcome(notes=[f"wrote {path}"])


def _training_table(schema: EffectSchema | None, kept: dict[str, Any]) -> EffectTable:
    options = DataOptions.model_validate({"draw": kept["draw"], "seed": kept["seed"]})
    if schema is not None and not Path(kept["data"]).exists():
        raise InputError(f"{kept['data']}: the training table is not where it was; put it back, or fit again")
    return _table_for(kept["data"], options, schema, kept)


class ReportConfig(CommandConfig):
    """Settings of ``report``."""

    run: Path = argument("run folder of fit")
    data: str | None = Field(None, description="other rows to report on (default: the training table)")
    title: str | None = Field(None, description="title of the page")
    output: Path | None = Field(None, description="HTML file to write (default: report.html in the run folder)")
    cost: float | None = Field(None, description="of treating, in units of the outcome (default: as fitted)")
    max_defer: float | None = Field(None, ge=0, le=1, description="share to defer for doubt (default: as fitted)")


@line.command(ReportConfig)
def report(config: ReportConfig, session: Session) -> Outcome:
    """Write one HTML page about a fitted model: effects, reliability, overlap, who is deferred and why."""
    from cib_ite.report import write_report

    model, schema, kept = _open_run(config.run)
    options = DataOptions.model_validate({"draw": kept["draw"], "seed": kept["seed"]})
    table = _training_table(schema, kept) if config.data is None else _table_for(config.data, options, schema, kept)
    path = config.output or session.run.artifact("report.html")
    write_report(
        path,
        model,
        table,
        title=config.title,
        alpha=kept["alpha"],
        cost=kept["cost"] if config.cost is None else config.cost,
        max_defer=kept["max_defer"] if config.max_defer is None else config.max_defer,
        run_config={"data": config.data or kept["data"], "seed": kept["seed"]},
    )
    return Outcome(notes=[f"wrote {path}; open it in a browser"])


class ExportConfig(CommandConfig):
    """Settings of ``export``."""

    run: Path = argument("run folder of fit")
    format: Literal["onnx", "torchscript"] = Field("onnx", description="kind of file")
    output: Path | None = Field(None, description="file to write (default: in the run folder of export)")
    samples: int = Field(50, ge=1, description="draws of the representation that are built in")


@line.command(ExportConfig)
def export(config: ExportConfig, session: Session) -> Outcome:
    """Write the model to a file that runs without this package: covariates in; effect, std, outcomes and rate out."""
    from cib_ite.export import export_model

    model, _, _ = _open_run(config.run)
    path = config.output or session.run.artifact("model.onnx" if config.format == "onnx" else "model.pt")
    export_model(model, path, format=config.format, samples=config.samples)
    return Outcome(notes=[f"wrote {path}: x (n, {model.n_features_in_}) -> effect, std, mu0, mu1, rate"])


class DataConfig(DataOptions):
    """Settings of ``data``."""

    action: Literal["list", "check", "simulate"] = argument("list, check or simulate")
    source: str | None = argument("name of a set, or a file", None)
    output: Path | None = Field(None, description="CSV or NPZ to write (simulate)")
    units: int | None = Field(None, ge=50, description="rows to draw (simulate)")
    kappa: float | None = Field(None, description="strength of confounding (simulate confounded)")


@line.command(DataConfig)
def data(config: DataConfig, session: Session) -> Outcome:
    """List the data sets, check that one (or a file of yours) can be read, or simulate one with known effects."""
    from cib_ite.data import NAMES, draws

    if config.action == "list":
        return Outcome(notes=[_describe(name) for name in NAMES])
    if config.source is None:
        raise InputError(f"SOURCE is missing: data {config.action} needs the name of a set, or a file")
    if config.action == "check":
        found = _load(config.source, config)
        table = found.table
        count = draws(config.source)
        notes = [
            f"{table.name}: {table.n:,} rows, {table.x.shape[1]} covariates, {int(table.treatment.sum()):,} treated,"
            f" outcome {table.outcome}, {'any number of' if count is None else count} draws",
            f"true effects: {'known' if table.effect is not None else 'not known'}; unlabelled rows:"
            f" {0 if found.unlabelled is None else len(found.unlabelled):,}",
        ]
        return Outcome(notes=notes)
    if config.source not in ("confounded", "overlap-failure", "diabetes", "breast-cancer", "ihdp-econml"):
        raise InputError(
            f"'{config.source}' is not simulated; choose confounded, overlap-failure, diabetes, breast-cancer or"
            " ihdp-econml"
        )
    more = {key: value for key, value in (("n", config.units), ("kappa", config.kappa)) if value is not None}
    table = _load(config.source, config, **more).table
    path = config.output or session.run.artifact(f"{config.source}.csv")
    _write_table(path, table)
    return Outcome(
        notes=[f"wrote {path}: {table.n:,} rows; treatment, outcome, mu0, mu1 and {table.x.shape[1]} covariates"]
    )


def _describe(name: str) -> str:
    from cib_ite.data import draws, load

    try:
        table = load(name).table
        count = draws(name)
    except InputError as error:
        return f"{name}: not here ({error})"
    amount = "any number of" if count is None else f"{count}"
    return f"{name}: {table.n:,} rows, {table.x.shape[1]} covariates, {amount} draws"


def _write_table(path: Path, table: EffectTable) -> None:
    import numpy as np

    known = {"mu0": table.mu0, "mu1": table.mu1, "ycf": table.y_counterfactual}
    if path.suffix.lower() == ".npz":
        arrays: dict[str, Any] = {key: value for key, value in known.items() if value is not None}
        with atomic_path(path) as temporary:
            np.savez(
                temporary,
                x=table.x,
                t=table.treatment,
                yf=table.y,
                feature_names=np.array(table.feature_names),
                **arrays,
            )
        return
    frame = _frame(table.x, table.feature_names)
    frame.insert(0, "treatment", table.treatment)
    frame.insert(1, "outcome", table.y)
    for key in ("mu0", "mu1"):
        if (values := known[key]) is not None:
            frame[key] = values
    _write_csv(path, frame)
