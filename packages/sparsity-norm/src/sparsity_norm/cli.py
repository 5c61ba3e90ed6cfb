"""The command line ``sparsity-norm``. Everything that needs torch is imported when a command runs, so help is quick."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from shared_core.cli import Advance, CommandConfig, CommandLine, Outcome, Session, argument
from shared_core.errors import InputError, no_such
from shared_core.runs import Claim, Result, read_summary, summarize, write_json

if TYPE_CHECKING:
    import pandas as pd

    from sparsity_norm.data import Table
    from sparsity_norm.models import TableModel
    from sparsity_norm.ratings import RatingMatrix
    from sparsity_norm.recommend import AutoRecRecommender

line = CommandLine(
    "sparsity-norm",
    help="Networks that do not suffer when the number of missing inputs varies (Yi et al., ICLR 2020).",
)
main = line.main

_TABLE_METHODS = ("sn", "sn-center", "sqrt", "zero", "zero+mask", "mean", "mean+mask", "median", "knn", "iterative",
               "softimpute", "l2norm", "batchnorm", "layernorm", "partial", "promissing", "tree")  # fmt: skip
_RATING_METHODS = ("autorec-sn", "autorec-zero", "global-mean", "baseline-only", "biased-mf", "item-knn")


class DataOptions(CommandConfig):
    """How to read the user's data; shared by the commands that train."""

    target: str | None = Field(None, description="column to predict; without it the data are ratings")
    exclude: tuple[str, ...] = Field((), description="columns to leave out")
    task: Literal["auto", "regression", "classification"] = Field("auto", description="what the target is")
    scale: Literal["none", "minmax", "standard"] = Field(
        "minmax", description="scaling of a table's columns, learned on training rows"
    )
    duplicates: Literal["error", "mean", "last"] = Field(
        "error", description="what to do with a (user, item) pair rated twice"
    )
    rating_scale: tuple[float, ...] = Field(
        (), description="lowest,highest rating; ratings outside are refused (default: what the file holds)"
    )


# ---- demo and compare


class DemoConfig(CommandConfig):
    """Settings of ``demo``."""

    seeds: int = Field(3, ge=1, description="repetitions with different removals, splits and initial weights")
    methods: tuple[str, ...] = Field(("zero", "zero+mask", "mean", "sn", "sn-center"), description="inputs to compare")


@line.command(DemoConfig, spread=True)
def demo(config: DemoConfig, session: Session) -> Outcome:
    """Show what Sparsity Normalization does, and where it does not help, on two real data sets (under a minute)."""
    from sparsity_norm.data import load_table
    from sparsity_norm.experiments import compare_tables
    from sparsity_norm.plots import plot_comparison, plot_drift

    photograph = load_table("photograph")
    # Half of the tiles: enough to tell the methods apart, in half the time.
    tables = [replace(photograph, x=photograph.x[::2], y=photograph.y[::2]), load_table("breast-cancer")]
    results: list[Result] = []
    claims: list[Claim] = []
    panels: dict[str, Any] = {}
    with session.progress("demo", len(tables) * len(config.methods) * config.seeds) as advance:
        for table in tables:
            rows, found, curves = compare_tables(
                session.run,
                table,
                methods=config.methods,
                seeds=_seeds(config.seed, config.seeds),
                folds=1 if len(table.x) > 2000 else 5,
                rates=(0.05, 1.0),
                device=str(session.device),
                advance=_noting(advance),
            )
            results += [row for row in rows if row.metric in {"RMSE", "AUROC", "count correlation gap"}]
            claims += found
            panels[table.name] = {name: curves[name] for name in ("zero", "mean", "sn") if name in curves}
    plot_drift(session.run.artifact("drift.png"), panels)
    plot_comparison(session.run.artifact("comparison.png"), results)
    notes = [
        "Networks of two hidden layers, all tuned alike; each row keeps a random 5 to 100 % of its entries.",
        "photograph: 48 like sensors, one target. breast-cancer: 30 columns that differ, mean filling's home ground.",
    ]
    return Outcome(results, claims, notes)


class CompareConfig(DataOptions):
    """Settings of ``compare``."""

    data: str = argument(
        "file (CSV, TSV, Parquet, NPZ; ratings without --target), or a name: latent, photograph, digits, breast-cancer,"
        " diabetes, wine, physionet2012, movielens-100k, movielens-1m, movielens-10m"
    )
    methods: tuple[str, ...] = Field((), description="methods (default: the main ones for this kind of data)")
    seeds: int = Field(5, ge=1, description="repetitions with different splits")
    model: Literal["network", "linear"] = Field("network", description="what follows the input (tables)")
    folds: int = Field(1, ge=1, le=20, description="1 tests on a fifth of the rows, more on every row once (tables)")
    group: str | None = Field(None, description="column whose values must not be split between training and test")
    rates: tuple[float, ...] = Field(
        (),
        description="low,high: keep each entry with its row's own probability in it (default: 0.05,1 for named tables)",
    )
    native: bool = Field(False, description="remove nothing from a named table")
    mode: Literal["item", "user"] = Field("item", description="who is an instance of AutoRec (ratings)")
    hidden: int = Field(100, ge=1, description="hidden units of AutoRec")
    epochs: int = Field(200, ge=1, description="most epochs of AutoRec; validation stops it earlier")
    lr: float = Field(3e-3, gt=0, description="step size of AutoRec")
    batch_size: int = Field(256, ge=1, description="instances in a step of AutoRec")


@line.command(CompareConfig, spread=True)
def compare(config: CompareConfig, session: Session) -> Outcome:
    """Compare Sparsity Normalization with its baselines, every method tuned alike, over several splits."""
    from sparsity_norm.data import TABLES
    from sparsity_norm.experiments import compare_ratings, compare_tables
    from sparsity_norm.plots import plot_comparison, plot_drift

    seeds = _seeds(config.seed, config.seeds)
    is_table = config.data in TABLES or config.target is not None
    methods = config.methods or (_TABLE_METHODS if is_table else _RATING_METHODS)
    if is_table:
        table = _named_or_own_table(config)
        rates = _pair(config.rates, "--rates")
        if rates is None and config.data in TABLES and config.data not in {"latent", "physionet2012"}:
            rates = None if config.native else (0.05, 1.0)
        if config.model == "linear":
            methods = (
                tuple(method for method in methods if method not in {"tree", "sn-learn"})
                if not config.methods
                else methods
            )
        with session.progress("compare", len(methods) * len(seeds)) as advance:
            results, claims, curves = compare_tables(
                session.run,
                table,
                methods=methods,
                seeds=seeds,
                model=config.model,
                folds=config.folds,
                rates=rates,
                device=str(session.device),
                advance=_noting(advance),
            )
        shown = {name: curves[name] for name in ("zero", "mean", "sn", "sn-center") if name in curves}
        plot_drift(session.run.artifact("drift.png"), {table.name: shown})
    else:
        ratings = _ratings(config.data, config)
        options = {name: getattr(config, name) for name in ("hidden", "epochs", "lr", "batch_size")}
        with session.progress("compare", len(methods) * len(seeds)) as advance:
            results, claims = compare_ratings(
                session.run,
                ratings,
                name=Path(config.data).stem if Path(config.data).suffix else config.data,
                methods=methods,
                seeds=seeds,
                mode=config.mode,
                options=options | {"device": str(session.device)},
                advance=_noting(advance),
            )
    plot_comparison(session.run.artifact("comparison.png"), results)
    return Outcome(results, claims)


def _noting(advance: Advance) -> Callable[[str], None]:
    return lambda note: advance(note=note)


def _seeds(first: int, count: int) -> list[int]:
    return list(range(first, first + count))


def _pair(values: Sequence[float], option: str) -> tuple[float, float] | None:
    if not values:
        return None
    if len(values) != 2 or not values[0] <= values[1]:
        raise InputError(f"{option}: give two numbers low,high with low <= high, got {','.join(map(str, values))}")
    return values[0], values[1]


def _named_or_own_table(config: CompareConfig) -> Table:
    from sparsity_norm.data import TABLES, Table, load_table

    if config.data in TABLES:
        if config.target is not None:
            raise InputError(f"--target: '{config.data}' is a named table, which has its target already")
        return load_table(config.data)
    import numpy as np

    from shared_core.tables import TableSchema, read_table

    frame = read_table(config.data)
    exclude = (*config.exclude, config.group) if config.group else config.exclude
    schema = TableSchema.infer(frame, target=config.target or "", task=config.task, exclude=exclude, source=config.data)
    x, y = schema.features(frame, config.data), schema.labels(frame, config.data)
    kept = ~np.isnan(y)
    groups = None if config.group is None else frame[config.group].astype(str).to_numpy()[kept]
    task = "regression" if schema.classes is None else "classification"
    return Table(Path(config.data).stem, x[kept], y[kept], task, groups, config.scale)


def _ratings(data: str, options: DataOptions) -> RatingMatrix:
    from sparsity_norm.data import load_ratings

    scale = _pair(options.rating_scale, "--rating-scale")
    return load_ratings(data, scale=scale, duplicates=options.duplicates)


# ---- fit


class FitConfig(DataOptions):
    """Settings of ``fit``; options that are not given take the default of the kind of data."""

    data: Path = argument("table (with --target) or ratings: CSV, TSV, Parquet, NPZ, sparse NPZ, u.data, ratings.dat")
    holdout: float = Field(
        0.1, ge=0, lt=1, description="share kept out of training and reported on; 0 trains on everything"
    )
    power: float = Field(1.0, ge=0, le=2, description="exponent of K / count: 1 the paper's, 0 zero imputation")
    lr: float | None = Field(None, gt=0, description="step size (default: ratings 3e-3, tables 1e-3)")
    epochs: int = Field(200, ge=1, description="most epochs; validation stops it earlier")
    batch_size: int | None = Field(None, ge=1, description="instances in a step (default: ratings 256, tables 64)")
    input: str = Field("sn", description="what is done with missing entries: sn, sn-center, zero, mean, ... (tables)")
    layers: tuple[int, ...] = Field((64, 64), description="hidden units of each layer (tables)")
    weight_decay: float = Field(1e-2, ge=0, description="decoupled weight decay (tables)")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of hidden units dropped in training")
    mode: Literal["item", "user"] = Field("item", description="who is an instance (ratings)")
    hidden: int = Field(200, ge=1, description="hidden units (ratings)")
    reg: float = Field(5.0, ge=0, description="penalty of the weights (ratings)")
    biases: bool = Field(False, description="put user and item offsets outside the network (ratings)")


@line.command(FitConfig)
def fit(config: FitConfig, session: Session) -> Outcome:
    """Fit a network to a table with missing entries (--target COLUMN), or a recommender to ratings."""
    return _fit_table(config, session) if config.target is not None else _fit_ratings(config, session)


def _fit_ratings(config: FitConfig, session: Session) -> Outcome:
    from sparsity_norm.plots import plot_history
    from sparsity_norm.ratings import split_ratings
    from sparsity_norm.recommend import AutoRecRecommender, FitProgress

    ratings = _ratings(str(config.data), config)
    train, test = (
        split_ratings(ratings, test_fraction=config.holdout, seed=config.seed) if config.holdout else (ratings, None)
    )
    recommender = AutoRecRecommender(
        config.mode,
        hidden=config.hidden,
        reg=config.reg,
        power=config.power,
        lr=config.lr or 3e-3,
        batch_size=config.batch_size or 256,
        epochs=config.epochs,
        dropout=config.dropout,
        biases=config.biases,
        device=str(session.device),
        random_state=config.seed,
    )
    state = session.run.load_checkpoint()
    done = len(state["history"]) if state else 0
    with session.progress("fit", 2 * recommender.epochs, done) as advance:

        def after(progress: FitProgress) -> None:
            report = progress.report
            session.run.log(
                phase=progress.phase,
                epoch=report.epoch,
                train_rmse=report.train_rmse,
                validation_rmse=report.validation_rmse,
            )
            session.run.save_checkpoint(progress.state())
            advance(note=f"{progress.phase}, train RMSE {report.train_rmse:.4f}")

        recommender.fit(train, on_epoch=after, resume=state)
    recommender.save(session.run.artifact("model"))
    history = [
        {"epoch": r.epoch, "train RMSE": r.train_rmse, "validation RMSE": r.validation_rmse}
        for r in recommender.history_
    ]
    plot_history(session.run.artifact("history.png"), history)
    notes = [
        f"{len(train):,} ratings by {train.shape[0]:,} users of {train.shape[1]:,} items; trained for"
        f" {recommender.n_epochs_} epochs"
    ]
    results = _rating_results(recommender, test, config.data.stem, session) if test is not None else []
    return Outcome(results, notes=notes)


def _rating_results(model: AutoRecRecommender, test: RatingMatrix, name: str, session: Session) -> list[Result]:
    found = model.evaluate(test, by=model.mode)
    write_json(session.run.artifact("evaluation.json"), asdict(found))
    method = "autorec-sn" if model.power else "autorec-zero"
    return [
        summarize([value], dataset=name, method=method, metric=metric, unit="rating", better="lower")
        for metric, value in (("RMSE", found.rmse), ("MAE", found.mae))
    ]


def _fit_table(config: FitConfig, session: Session) -> Outcome:
    import numpy as np

    from shared_core.tables import TableSchema, read_table
    from sparsity_norm.models import TableModel
    from sparsity_norm.plots import plot_history
    from sparsity_norm.sklearn import SNClassifier, SNRegressor

    source = str(config.data)
    frame = read_table(config.data)
    schema = TableSchema.infer(
        frame, target=config.target or "", task=config.task, exclude=config.exclude, source=source
    )
    x, y = schema.features(frame, source), schema.labels(frame, source)
    labelled = np.flatnonzero(~np.isnan(y))
    shuffled = np.random.default_rng(config.seed).permutation(labelled)
    held = shuffled[: round(len(shuffled) * config.holdout)]
    train = np.sort(shuffled[len(held) :])
    if len(train) < 2:
        raise InputError(f"{source}: {len(train)} rows are left to train on; give more rows or a smaller --holdout")
    schema = schema.fit_scale(x[train], config.scale)
    x = schema.features(frame, source)
    classify = schema.classes is not None
    make = SNClassifier if classify else SNRegressor
    options: dict[str, Any] = {}
    if any(column.categories is not None for column in schema.columns) and config.input.startswith(("sn", "sqrt")):
        options["groups"] = schema.groups.tolist()
    estimator = make(
        hidden=config.layers,
        input=config.input,
        power=config.power if config.input in {"sn", "sn-center", "sn+mask", "sn-center+mask"} else None,
        input_options=options or None,
        dropout=config.dropout,
        lr=config.lr or 1e-3,
        weight_decay=config.weight_decay,
        batch_size=config.batch_size or 64,
        epochs=config.epochs,
        early_stopping=True,
        device=str(session.device),
        random_state=config.seed,
    )
    state = session.run.load_checkpoint()
    with session.progress("fit", estimator.epochs) as advance:

        def after(epoch: int, info: dict[str, float]) -> None:
            session.run.log(epoch=epoch, **info)
            session.run.save_checkpoint(estimator.state())
            advance(note=", ".join(f"{key} {value:.4f}" for key, value in info.items()))

        estimator.fit(x[train], y[train].astype(np.int64) if classify else y[train], on_epoch=after, resume_from=state)
    history = [{"epoch": number, **info} for number, info in enumerate(estimator.history_, start=1)]
    model = TableModel(schema, estimator)
    model.save(session.run.artifact("model"))
    plot_history(session.run.artifact("history.png"), history)
    notes = [
        f"{len(train):,} rows, {len(schema.columns)} columns ({x.shape[1]} inputs), {np.isnan(x).mean():.1%} missing"
    ]
    if len(labelled) < len(frame):
        notes.append(f"{len(frame) - len(labelled)} rows without a target were left out")
    results = _table_results(model, frame.iloc[held], config.data.stem, session) if len(held) else []
    return Outcome(results, notes=notes)


def _table_results(model: TableModel, frame: pd.DataFrame, name: str, session: Session) -> list[Result]:
    import numpy as np

    from sparsity_norm.experiments import OutOfFold, count_correlation, drift_curve, table_metrics, table_row
    from sparsity_norm.plots import plot_drift

    x, y = model.schema.features(frame, name), model.schema.labels(frame, name)
    x, y = x[~np.isnan(y)], y[~np.isnan(y)]
    if not len(y):
        raise InputError(f"{name}: no row has a target to evaluate on")
    scores = (
        np.asarray(model.estimator.predict(x), dtype=np.float64).ravel()
        if model.schema.classes is None
        else model.probabilities(x)
    )
    found = OutOfFold(np.arange(len(y)), model.known(x).astype(np.float64), scores, y, {}, 0.0)
    metrics = table_metrics(found, "regression" if model.schema.classes is None else "classification")
    metrics["count correlation gap"] = abs(
        count_correlation(found.count, found.prediction) - count_correlation(found.count, found.target)
    )
    drift = drift_curve(found.prediction, found.count, found.target)
    plot_drift(session.run.artifact("drift.png"), {name: {model.estimator.input: drift}})
    return [
        table_row([value], dataset=name, method=model.estimator.input, metric=metric)
        for metric, value in metrics.items()
    ]


# ---- evaluate, predict, recommend


class EvaluateConfig(CommandConfig):
    """Settings of ``evaluate``."""

    model: Path = argument("run folder of a fit, or its model folder")
    data: Path = argument("held-out table with the target, or held-out ratings")


@line.command(EvaluateConfig)
def evaluate(config: EvaluateConfig, session: Session) -> Outcome:
    """Measure a fitted model on held-out data, also by how much was known."""
    from shared_core.tables import read_table
    from sparsity_norm.data import load_ratings
    from sparsity_norm.models import TableModel, load_model

    model = load_model(config.model, device=str(session.device))
    if isinstance(model, TableModel):
        return Outcome(_table_results(model, read_table(config.data), config.data.stem, session))
    test = load_ratings(config.data)
    results = _rating_results(model, test, config.data.stem, session)
    return Outcome(results)


class PredictConfig(CommandConfig):
    """Settings of ``predict``."""

    model: Path = argument("run folder of a fit, or its model folder")
    data: Path = argument("table to predict, or CSV with the columns user,item")
    unknown: Literal["error", "mean"] = Field(
        "error", description="what to do with a user or item that was not there in training"
    )


@line.command(PredictConfig)
def predict(config: PredictConfig, session: Session) -> Outcome:
    """Predict each row of a table, or each (user, item) pair of a list; writes predictions.csv."""
    from shared_core.tables import read_table
    from sparsity_norm.models import TableModel, load_model

    model = load_model(config.model, device=str(session.device))
    frame = read_table(config.data)
    if isinstance(model, TableModel):
        predictions = model.predict(frame, str(config.data))
    else:
        users, items = _id_columns(frame, ("user", "item"), str(config.data))
        model.set_params(unknown=config.unknown)
        predictions = frame.iloc[:, :2].assign(prediction=model.predict(users, items))
    _write_csv(predictions, session, "predictions.csv")
    return Outcome(notes=[predictions.head(5).to_string(index=False), f"{len(predictions):,} predictions"])


def _id_columns(frame: pd.DataFrame, wanted: Sequence[str], source: str) -> list[list[str]]:
    found: list[list[str]] = []
    for name in wanted:
        column = next((c for c in frame.columns if c.lower().removesuffix("id").rstrip("_") == name), None)
        if column is None:
            raise no_such("column", name, frame.columns, where=source)
        if frame[column].isna().any():
            row = int(frame[column].isna().to_numpy().argmax())
            raise InputError(f"{source}: row {row + 1}: the {name} is missing")
        found.append([str(value).removesuffix(".0") for value in frame[column]])
    return found


def _write_csv(frame: pd.DataFrame, session: Session, name: str) -> None:
    from shared_core.runs import atomic_path

    with atomic_path(session.run.artifact(name)) as temporary:
        frame.to_csv(temporary, index=False)


class RecommendConfig(CommandConfig):
    """Settings of ``recommend``."""

    model: Path = argument("run folder of a fit on ratings, or its model folder")
    users: tuple[str, ...] = Field((), description="users to recommend to (default: all)")
    ratings: Path | None = Field(
        None, description="CSV with item,rating (one new user) or user,item,rating (several): no retraining"
    )
    k: int = Field(10, ge=1, description="recommendations for each user")
    include_seen: bool = Field(False, description="also recommend what the user has rated")


@line.command(RecommendConfig)
def recommend(config: RecommendConfig, session: Session) -> Outcome:
    """Recommend items to known users, or to new ones from their ratings; writes recommendations.csv."""
    import pandas as pd

    from shared_core.tables import read_table
    from sparsity_norm.models import TableModel, load_model

    model = load_model(config.model, device=str(session.device))
    if isinstance(model, TableModel):
        raise InputError(f"{config.model}: is a model of a table; recommend needs one of ratings")
    rows: list[tuple[str, int, str, float]] = []
    if config.ratings is not None:
        if config.users:
            raise InputError("--users: give either known users or the --ratings of new ones")
        frame = read_table(config.ratings)
        for user, given in _new_users(frame, str(config.ratings)).items():
            best = model.fold_in(given).recommend(config.k, exclude_seen=not config.include_seen)
            rows += [(user, rank, item, score) for rank, (item, score) in enumerate(best, start=1)]
    else:
        wanted = [model.ratings_.user_code(user) for user in config.users] or None
        top = model.recommend_all(config.k, users=wanted, exclude_seen=not config.include_seen).as_lists()
        rows = [(user, rank, *pair) for user, best in top.items() for rank, pair in enumerate(best, start=1)]
    frame = pd.DataFrame(rows, columns=["user", "rank", "item", "prediction"])
    _write_csv(frame, session, "recommendations.csv")
    return Outcome(notes=[frame.head(20).to_string(index=False), f"{frame['user'].nunique():,} users"])


def _new_users(frame: pd.DataFrame, source: str) -> dict[str, dict[str, float]]:
    import numpy as np
    import pandas as pd

    several = any(name.lower().startswith("user") for name in frame.columns)
    columns = _id_columns(frame, ("user", "item") if several else ("item",), source)
    rating = next((name for name in frame.columns if name.lower() == "rating"), None)
    if rating is None:
        raise no_such("column", "rating", frame.columns, where=source)
    values = np.asarray(pd.to_numeric(frame[rating], errors="coerce"), dtype=np.float64)
    if not np.isfinite(values).all():
        row = int(np.argmin(np.isfinite(values)))
        raise InputError(f"{source}: row {row + 1}: the rating '{frame[rating].iloc[row]}' is not a number")
    users = columns[0] if several else ["new user"] * len(frame)
    given: dict[str, dict[str, float]] = {}
    for row, (user, item, value) in enumerate(zip(users, columns[-1], values.tolist(), strict=True), start=1):
        if item in given.setdefault(user, {}):
            raise InputError(f"{source}: row {row}: '{user}' rates '{item}' twice; keep one")
        given[user][item] = value
    return given


# ---- diagnose


class DiagnoseConfig(DataOptions):
    """Settings of ``diagnose``."""

    data: Path = argument("table (with --target), ratings, or predictions of any model (with --prediction and --count)")
    prediction: str | None = Field(None, description="column with another model's predictions")
    count: str | None = Field(None, description="column with the number of known inputs behind each prediction")
    truth: str | None = Field(None, description="column with the true values, if they are known")
    folds: int = Field(5, ge=2, le=20, description="parts for out-of-fold predictions (tables)")
    mode: Literal["item", "user"] = Field("user", description="who is an instance (ratings)")


@line.command(DiagnoseConfig, spread=True)
def diagnose(config: DiagnoseConfig, session: Session) -> Outcome:
    """Tell whether predictions depend on how much is known, before and after Sparsity Normalization, with a picture."""
    from sparsity_norm.experiments import diagnose_predictions, diagnose_ratings, diagnose_table
    from sparsity_norm.plots import plot_drift

    name = config.data.stem
    if config.prediction is not None or config.count is not None:
        if config.prediction is None or config.count is None:
            raise InputError("--prediction and --count go together: name both columns")
        from shared_core.tables import numeric_columns, read_table

        wanted = [config.prediction, config.count, *([config.truth] if config.truth else [])]
        columns = numeric_columns(read_table(config.data), wanted, str(config.data))
        found = diagnose_predictions(name, *columns)
    elif config.target is not None:
        given = config.model_dump(include=set(DataOptions.model_fields))
        table = _named_or_own_table(CompareConfig.model_validate({"data": str(config.data)} | given))
        with session.progress("diagnose", 3) as advance:
            found = diagnose_table(
                session.run,
                table,
                seed=config.seed,
                folds=config.folds,
                device=str(session.device),
                advance=_noting(advance),
            )
    else:
        with session.progress("diagnose", 2) as advance:
            found = diagnose_ratings(
                session.run,
                _ratings(str(config.data), config),
                name=name,
                seed=config.seed,
                mode=config.mode,
                device=str(session.device),
                advance=_noting(advance),
            )
    write_json(session.run.artifact("audit.json"), found.reports)
    known = config.truth is not None or config.prediction is None
    ylabel = "mean of prediction minus truth" if known else "mean prediction"
    plot_drift(session.run.artifact("audit.png"), {name: found.curves}, ylabel=ylabel, zero=known)
    return Outcome(found.results, found.claims, found.notes)


# ---- ampute, export, plot


class AmputeConfig(CommandConfig):
    """Settings of ``ampute``."""

    data: Path = argument("complete table")
    exclude: tuple[str, ...] = Field((), description="columns to leave untouched, such as the target")
    mechanism: Literal["mcar", "mar", "mnar"] = Field(
        "mcar", description="entries go missing at random, by another column, or by their own value"
    )
    rate_low: float = Field(0.05, gt=0, le=1, description="lowest share of entries a row keeps")
    rate_high: float = Field(1.0, gt=0, le=1, description="highest share of entries a row keeps")


@line.command(AmputeConfig)
def ampute(config: AmputeConfig, session: Session) -> Outcome:
    """Remove entries from a table, each row at a rate of its own; writes amputed.csv."""
    import numpy as np

    from shared_core.tables import numeric_columns, read_table
    from sparsity_norm.ampute import ampute as remove

    source = str(config.data)
    frame = read_table(config.data)
    for name in config.exclude:
        if name not in frame.columns:
            raise no_such("column to exclude", name, frame.columns, where=source)
    names = [name for name in frame.columns if name not in config.exclude]
    x = np.column_stack(numeric_columns(frame, names, source))
    kept = remove(x, config.rate_low, config.rate_high, mechanism=config.mechanism, random_state=config.seed)
    frame[names] = kept.x
    _write_csv(frame, session, "amputed.csv")
    return Outcome(notes=[f"{np.isnan(kept.x).mean():.1%} of {x.size:,} entries are missing now"])


class ExportConfig(CommandConfig):
    """Settings of ``export``."""

    model: Path = argument("run folder of a fit, or its model folder")
    format: Literal["onnx", "pt2"] = Field("onnx", description="ONNX, or a torch.export program")


@line.command(ExportConfig)
def export(config: ExportConfig, session: Session) -> Outcome:
    """Export a fitted model as a graph of (x, mask), checked against the model it came from."""
    from sparsity_norm.export import export_graph
    from sparsity_norm.models import graph_of, load_model

    file = session.run.artifact(f"model.{config.format}")
    graph, features = graph_of(load_model(config.model, device=str(session.device)))
    difference = export_graph(graph, features, file, kind=config.format)
    note = "not checked: onnxruntime is not installed" if difference is None else f"largest difference {difference:.1e}"
    return Outcome(notes=[f"inputs x and mask (1 = known); {note}"])


class PlotConfig(CommandConfig):
    """Settings of ``plot``."""

    run: Path = argument("run folder of any command, or its summary.json")
    kind: Literal["png", "svg", "pdf"] = Field("png", description="kind of picture")


@line.command(PlotConfig)
def plot(config: PlotConfig, session: Session) -> Outcome:
    """Draw a finished run again: its results with their intervals."""
    from sparsity_norm.plots import plot_comparison

    plot_comparison(session.run.artifact(f"comparison.{config.kind}"), read_summary(config.run).results)
    return Outcome()


if __name__ == "__main__":
    main()
