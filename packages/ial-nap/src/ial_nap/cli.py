"""The command line ``ial-nap``. Everything that needs torch is imported when a command runs, so help is quick."""

from __future__ import annotations

import csv
import json
import math
import sqlite3
import warnings
from collections.abc import Callable, Iterable
from contextlib import closing
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeAlias, cast

from pydantic import BaseModel, Field

from ial_nap.choices import ExportFormat, Picture, TaskKind, chosen_methods, written
from ial_nap.config import EstimatorFields, RankingFields, SimulationFields
from shared_core.cli import CommandConfig, CommandLine, Outcome, Session, argument
from shared_core.errors import InputError, no_such
from shared_core.runs import Result, atomic_path, read_document, read_summary, summarize, write_json

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ial_nap.annotations import Annotation
    from ial_nap.dataset import Dataset, Split
    from ial_nap.estimator import NAPClassifier, NAPRegressor, ScoreReport
    from ial_nap.experiments import Protocol
    from ial_nap.series import Series
    from ial_nap.simulation import Oracle, Round

    Estimator: TypeAlias = NAPClassifier | NAPRegressor

line = CommandLine(
    "ial-nap",
    help="Correct what a time-series model attends to: it ranks what is worth a look, takes verdicts, and obeys them.",
)
main = line.main

_MODEL, _FACTS, _ROUNDS, _QUEUE = "model.safetensors", "fit.json", "rounds.json", "queue.json"
_CHECKPOINT = "checkpoint.safetensors"
_SOURCE = "cells, digits, shift, physionet2012, pbc, txhousing, or a CSV (long), TSV, NPZ or the release's .pkl"
_VERDICTS = "verdicts: JSON lines, or the store of the annotation page"
_MAIN_METRIC = {"binary": "auroc", "multiclass": "accuracy", "multilabel": "accuracy", "regression": "rmse"}
_SHOWN = 20
# The area and the score at the end are drawn; what it was before any verdict is in the table.
_DRAWN = ("AUROC", "accuracy", "RMSE", "AUROC, mean of rounds", "accuracy, mean of rounds", "RMSE, mean of rounds")


class TableOptions(CommandConfig):
    """Where things are in a file of the user's."""

    id: str | None = Field(None, description="column of a table that names the instance (default: id)")
    time: str | None = Field(None, description="column that orders the rows of an instance (default: time)")
    label: str | None = Field(None, description="column of the label (default: label, or y, where there is one)")
    hours: int = Field(1, ge=1, le=48, description="physionet2012: hours that make a step")


class DataOptions(TableOptions):
    """Which series, and how they are divided."""

    kind: TaskKind | None = Field(None, description="what is predicted (default: as the labels look)")
    features: tuple[str, ...] = Field((), description="read only these columns, or features")
    test: float = Field(0.25, gt=0, lt=1, description="share of instances to test on, where the set has no such part")
    validation: float = Field(0.2, gt=0, lt=1, description="share of the others to stop training by")
    plant: int = Field(0, ge=0, description="columns to add that give the label away in training, and not in tests")
    shift: float = Field(1.2, ge=0, description="how much they give away, in deviations of their noise")


def _load(source: str, config: TableOptions, *, kind: TaskKind | None = None, features: Iterable[str] = ()) -> Dataset:
    from ial_nap.data import load_data

    return load_data(
        source, id=config.id, time=config.time, label=config.label, kind=kind, features=tuple(features) or None,
        hours=config.hours,
    )  # fmt: skip


def _split(data: Dataset, config: DataOptions, seed: int) -> Split:
    from ial_nap.data import plant

    split = data.split(seed, test=config.test, validation=config.validation)
    return plant(split, columns=config.plant, shift=config.shift, seed=seed) if config.plant else split


# ---- demo, compare, experiment


class DemoConfig(CommandConfig, SimulationFields):
    """Settings of ``demo``."""

    methods: tuple[str, ...] = Field(
        ("retain", "aila", "rrr", "drop", "random-nap", "ial-nap"),
        description="methods; an unknown name lists them all",
    )
    rounds: int = Field(2, ge=1, description="rounds of annotation")
    k: int = Field(5, ge=1, description="instances shown in a round")
    f: int = Field(4, ge=1, description="features shown of each")
    epochs: int = Field(100, ge=1, description="epochs of the first training at most")
    shift: float = Field(1.2, ge=0, description="how much the planted columns give the label away in training")


@line.command(DemoConfig)
def demo(config: DemoConfig, session: Session) -> Outcome:
    """Real tumours with a shortcut planted in them: a model learns it, an annotator says no, and the model obeys."""
    from ial_nap import plots
    from ial_nap.experiments import Protocol, demo_run

    methods: Any = chosen_methods(config.methods)
    protocol = Protocol(shift=config.shift, setting=config.setting(), trials=1)
    with session.progress("demo", len(methods)) as advance:
        shown = demo_run(
            "cells", methods=methods, seeds=(config.seed,), protocol=protocol, store=session.run,
            advance=lambda note, steps: advance(steps, note=note),
        )  # fmt: skip
    rows, claims = shown.found.results, shown.found.claims
    _keep_rounds(session, shown.data, shown.found.cells)
    names = {"features": shown.split.test.features, "steps": shown.split.test.steps}
    one = shown.split.test
    values = one.scaling.raw(one.x[shown.item]).double().numpy()
    plots.plot_contributions(
        session.run.artifact("contributions.png"),
        {
            "without verdicts": shown.before.cells[0, :, :, 0].double().numpy(),
            f"with verdicts on {shown.masks} others": shown.after.cells[0, :, :, 0].double().numpy(),
        },
        values=values, title=f"{one.ids[shown.item]}, which nobody annotated", **names,
    )  # fmt: skip
    plots.plot_comparison(session.run.artifact("comparison.png"), [row for row in rows if row.metric in _DRAWN])
    asked = shown.queue[0]
    notes = [
        f"{len(one)} tumours to test on. {' and '.join(shown.split.planted)} give the label away in training only.",
        f"First asked about: {asked.instance}, {', '.join(asked.features)}.",
        f"Verdicts on {shown.masks} instances move the test from {shown.scores[0]:.3f} to {shown.scores[1]:.3f} AUROC,"
        " without a gradient step.",
    ]
    return Outcome([row for row in rows if row.metric in (*_DRAWN, "time a round")], claims, notes)


class CompareConfig(TableOptions, SimulationFields):
    """Settings of ``compare``."""

    data: str = argument(_SOURCE, "cells")
    kind: TaskKind | None = Field(None, description="what is predicted (default: as the labels look)")
    features: tuple[str, ...] = Field((), description="read only these columns, or features")
    methods: tuple[str, ...] = Field(("all",), description="methods, or all")
    seeds: int = Field(5, ge=1, description="splits, shortcuts and trainings of each method")
    plant: int = Field(2, ge=1, description="columns to plant that give the label away in training, and not in tests")
    shift: float = Field(1.2, ge=0, description="how much they give away, in deviations of their noise")
    trials: int = Field(3, ge=0, le=9, description="settings to try for each method that has some; 0: as given here")
    flip: float = Field(0.0, ge=0, le=1, description="probability that the simulated annotator says the opposite")
    unsure: float = Field(0.0, ge=0, le=1, description="probability that the simulated annotator does not know")


@line.command(CompareConfig, spread=True)
def compare(config: CompareConfig, session: Session) -> Outcome:
    """Plant a shortcut and let every method learn from the same annotator: scores, verdicts and seconds."""
    from ial_nap import plots
    from ial_nap.experiments import compare_methods

    methods: Any = chosen_methods(config.methods)
    found_data = _load(config.data, config, kind=config.kind, features=config.features)
    with session.progress("compare", len(methods) * config.seeds) as advance:
        found = compare_methods(
            found_data, methods, range(config.seed, config.seed + config.seeds), _protocol(config),
            store=session.run, advance=lambda note, steps: advance(steps, note=note),
        )  # fmt: skip
    _keep_rounds(session, found_data, found.cells)
    plots.plot_comparison(session.run.artifact("comparison.png"), [r for r in found.results if r.metric in _DRAWN])
    first = {name: next(iter(by.values()))["setting"] for name, by in found.cells.items()}
    default = {"weight": config.weight, "step_lr": config.step_lr}
    notes = [f"chosen on validation series: {name}: {chosen}" for name, chosen in first.items() if chosen != default]
    return Outcome(found.results, found.claims, notes)


def _protocol(config: CompareConfig) -> Protocol:
    from ial_nap.experiments import Protocol

    return Protocol(
        columns=config.plant, shift=config.shift, setting=config.setting(), trials=config.trials, flip=config.flip,
        unsure=config.unsure,
    )  # fmt: skip


def _keep_rounds(session: Session, data: Dataset, cells: dict[str, dict[int, Any]]) -> None:
    """Keep every round, and draw the score over verdicts and over seconds."""
    from ial_nap import plots
    from ial_nap.simulation import Round

    rounds: dict[str, list[list[Round]]] = {
        name: [
            [Round(name, number, count, score, seconds) for number, count, score, seconds in cell["rounds"]]  # pyright: ignore[reportArgumentType]
            for cell in by.values()
        ]
        for name, by in cells.items()
    }
    facts = _curve_facts(data)
    _write_rounds(session, rounds, facts)
    plots.plot_curve(session.run.artifact("curve.png"), rounds, **facts)


def _curve_facts(data: Dataset) -> dict[str, str]:
    better = "lower" if data.kind == "regression" else "higher"
    return {"metric": _MAIN_METRIC[data.kind], "better": better, "title": data.name}


def _write_rounds(session: Session, rounds: dict[str, list[list[Round]]], facts: dict[str, str]) -> None:
    from dataclasses import asdict

    record = {name: [[asdict(one) for one in run] for run in runs] for name, runs in rounds.items()}
    write_json(session.run.artifact(_ROUNDS), {**facts, "rounds": record})


class ExperimentConfig(CompareConfig):
    """Settings of ``experiment``."""

    name: Literal["loop", "correction", "harmless", "ranking", "leak", "honesty", "tax", "update"] = Field(
        "correction", description="what to measure"
    )
    methods: tuple[str, ...] = Field(("retain", "drop", "random-nap", "ial-nap"), description="methods of loop, or all")


@line.command(ExperimentConfig, spread=True)
def experiment(config: ExperimentConfig, session: Session) -> Outcome:
    """Measure one of the claims: what verdicts correct, what rankings find, what spread says, what training costs."""
    from ial_nap import plots
    from ial_nap.experiments import EXPERIMENTS, run_experiment

    methods: Any = chosen_methods(config.methods)
    pieces = config.seeds * (len(methods) if config.name == "loop" else 1)
    found_data = _load(config.data, config, kind=config.kind, features=config.features)
    with session.progress(config.name, pieces) as advance:
        found = run_experiment(
            config.name, found_data, range(config.seed, config.seed + config.seeds), _protocol(config),
            methods=methods, store=session.run, advance=lambda note, steps: advance(steps, note=note),
        )  # fmt: skip
    write_json(
        session.run.artifact("cells.json"),
        {name: {str(seed): value for seed, value in by.items()} for name, by in found.cells.items()},
    )
    plots.plot_comparison(session.run.artifact("comparison.png"), found.results)
    return Outcome(found.results, found.claims, [EXPERIMENTS[config.name][0]])


# ---- fit


class FitConfig(DataOptions, EstimatorFields):
    """Settings of ``fit``."""

    data: str = argument(_SOURCE)


@line.command(FitConfig)
def fit(config: FitConfig, session: Session) -> Outcome:
    """Train a model that obeys verdicts at once; an interrupted training goes on to the bit."""
    from ial_nap import plots

    data = _load(config.data, config, kind=config.kind, features=config.features)
    split = _split(data, config, config.seed)
    estimator = config.estimator(split.train.kind, device=str(session.device), seed=config.seed)
    with session.progress("epochs", config.epochs) as advance:

        def after(epoch: Any) -> None:
            session.run.log(epoch=float(epoch.epoch), loss=epoch.loss, validation=epoch.validation)
            advance(1, note=f"loss {epoch.loss:.3f}, validation {epoch.validation:.3f}")

        estimator.fit(
            split.train, validation=split.validation, on_epoch=after, checkpoint=session.run.folder / _CHECKPOINT,
            world=session.world,
        )  # fmt: skip
    _keep_history(session, estimator)
    estimator.save(session.run.artifact(_MODEL))
    facts = {
        **config.model_dump(mode="json", include=set(DataOptions.model_fields) - {"device", "out"}),
        "data": config.data if not Path(config.data).exists() else str(Path(config.data).resolve()),
        "classes": list(data.classes),
        "groups": [list(group) for group in data.groups],
    }
    write_json(session.run.artifact(_FACTS), facts)
    plots.plot_history(session.run.artifact("history.png"), {"ial-nap": estimator.history_})
    report = estimator.score_report(split.test)
    best = min((e for e in estimator.history_ if e.is_best), key=lambda e: e.validation, default=None)
    notes = [f"{len(split.train)} to train on, {len(split.validation)} to stop by, {len(split.test)} to test on"]
    if best is not None:
        notes.append(f"stopped after epoch {len(estimator.history_)}; kept is epoch {best.epoch}")
    if config.plant:
        notes.append(f"{', '.join(split.planted)}: planted, right in training and random in the test")
    return Outcome(_score_rows(report, data.name, "ial-nap"), notes=notes)


def _keep_history(session: Session, estimator: Estimator) -> None:
    """Write a line an epoch as if nothing had been interrupted: one that was cut off may be there twice, or not."""
    if session.world.is_main:
        rows = [
            {
                "epoch": float(e.epoch),
                "loss": e.loss,
                "validation": e.validation if e.validation == e.validation else None,
            }
            for e in estimator.history_
        ]
        with atomic_path(session.run.folder / "metrics.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _score_rows(report: ScoreReport, dataset: str, method: str, *, draws: int = 0, seed: int = 0) -> list[Result]:
    """Make a row for each score, with a bootstrap interval over instances where draws are asked for."""
    from ial_nap.resampling import resampled

    rows: list[Result] = []
    for name, found in resampled(report.series, report.predictions, draws=draws, seed=seed).items():
        metric, bounds = written(name), found.interval()
        low, high = (None, None) if bounds is None else (metric.factor * bound for bound in bounds)
        if math.isfinite(found.value):
            rows.append(
                Result(dataset=dataset, method=method, metric=metric.name, unit=metric.unit, better=found.better,
                       mean=metric.factor * found.value, low=low, high=high,
                       n=1 if low is None else len(report.series), seconds=0.0)
            )  # fmt: skip
    return rows


# ---- what a trained model is asked


class ModelOptions(TableOptions):
    """A trained model, and series for it."""

    model: Path = argument("run folder of fit or update, or a .safetensors file of it")
    data: str | None = argument(f"{_SOURCE} (default: what the model was trained on)", None)


class _Opened(NamedTuple):
    estimator: Estimator
    facts: dict[str, Any]
    path: Path


def _open(model: Path, device: object) -> _Opened:
    from ial_nap.saving import load

    path = model / _MODEL if model.is_dir() else model
    if model.is_dir() and not path.exists():
        raise InputError(f"{model}: has no {_MODEL}; give the run folder of 'ial-nap fit', or a .safetensors file")
    estimator = load(path, device=str(device))
    beside = path.with_name(_FACTS)
    facts: dict[str, Any] = {}
    if beside.exists():
        try:
            facts = json.loads(beside.read_text(encoding="utf-8"))
            DataOptions.model_validate({name: facts[name] for name in facts if name in DataOptions.model_fields})
            _ = facts["data"], facts["classes"], facts["groups"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{beside}: is damaged ({' '.join(str(error).split())[:200]}); fit again") from error
    return _Opened(estimator, facts, path)


def _own(opened: _Opened) -> tuple[Dataset, Split]:
    """Return what a model was trained on, divided as it was then."""
    facts = opened.facts
    if not facts:
        raise InputError(f"{opened.path}: there is no {_FACTS} beside it that says what it was trained on; give DATA")
    options = DataOptions.model_validate({name: facts[name] for name in facts if name in DataOptions.model_fields})
    data = _load(facts["data"], options, kind=options.kind, features=options.features)
    split = _split(data, options, options.seed)
    if split.train.features != opened.estimator.series_.features:
        raise InputError(f"{facts['data']}: has other features than the model was trained on; give DATA")
    return data, split


def _other(opened: _Opened, source: str, config: TableOptions) -> tuple[Dataset, Series]:
    """Read series that the model was not trained on, as it reads them."""
    from dataclasses import replace

    import numpy as np

    template = opened.estimator.series_
    data = _load(source, config, kind=template.kind, features=template.features)
    steps = len(template.steps)
    if data.x.shape[1] < steps:
        # The longest of these may be shorter than the longest of the training.
        room = np.full((len(data), steps - data.x.shape[1], data.x.shape[2]), np.nan, np.float32)
        data = replace(data, x=np.concatenate([data.x, room], 1), steps=template.steps)
    classes = tuple(opened.facts.get("classes", ()))
    if data.classes and classes and data.y is not None:
        unknown = [name for name in data.classes if name not in classes]
        if unknown:
            raise InputError(f"{source}: label '{unknown[0]}' is no class of the training: {', '.join(classes)}")
        codes = np.array([float(classes.index(name)) for name in data.classes])
        data = replace(data, y=codes[data.y.astype(int)], classes=classes)
    try:
        return data, data.series(like=template)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None


def _pool(config: ModelOptions, opened: _Opened) -> tuple[str, Series, Series | None]:
    """Return what can be annotated, and what to check by: never the test."""
    if config.data is None:
        data, split = _own(opened)
        return data.name, split.train, split.validation
    data, series = _other(opened, config.data, config)
    held = _own(opened)[1].validation if opened.facts else None
    return data.name, series, held


def _part(config: ModelOptions, opened: _Opened, part: str) -> tuple[str, Series]:
    """Return series to measure on."""
    if config.data is not None:
        data, series = _other(opened, config.data, config)
        return data.name, series
    data, split = _own(opened)
    found = getattr(split, part)
    if found is None:
        raise InputError(f"--part: {data.name} has no part '{part}'; choose train, validation or test")
    return data.name if part == "test" else f"{data.name}, {part}", found


def _class_names(opened: _Opened) -> list[str]:
    """Return what outputs are called: of a binary task both classes."""
    estimator = opened.estimator
    kind, outputs = estimator.kind_, estimator.series_.outputs
    known = [str(name) for name in opened.facts.get("classes", ())]
    count = 2 if kind == "binary" else outputs
    return known if len(known) == count else [str(k) for k in range(count)]


class RankConfig(ModelOptions, RankingFields):
    """Settings of ``rank``."""

    samples: int = Field(30, ge=2, description="draws of a prediction")
    seen: bool = Field(False, description="rank instances too that are annotated already")


@line.command(RankConfig)
def rank(config: RankConfig, session: Session) -> Outcome:
    """Say which instances, and which of their features, are worth a person's seconds."""
    opened = _open(config.model, session.device)
    estimator = opened.estimator
    name, pool, held = _pool(config, opened)
    estimator.validation_ = held
    judged = {instance for instance, _ in estimator.context_.keys}
    among = [k for k, instance in enumerate(pool.ids) if config.seen or instance not in judged]
    if not among:
        raise InputError(f"{name}: every instance is annotated already; --seen ranks them again")
    known = set(pool.features)
    groups = tuple(tuple(group) for group in opened.facts.get("groups", ()) if set(group) <= known)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = estimator.rank(pool, cer=config.cer(config.samples, groups), among=among, seed=config.seed)
    rows = [
        {"instance": one.instance, "score": one.score, "reason": one.reason, "features": list(one.features),
         "feature_scores": list(one.feature_scores)}
        for one in found
    ]  # fmt: skip
    write_json(session.run.artifact(_QUEUE), rows)
    notes = [f"{'instance':20} {'score':>10}  features to look at first ({found[0].reason})"]
    notes += [f"{one.instance[:20]:20} {one.score:>10.4g}  {', '.join(one.features)}" for one in found]
    return Outcome(notes=[*notes, *dict.fromkeys(str(warning.message) for warning in caught)])


class AnnotateConfig(ModelOptions, RankingFields):
    """Settings of ``annotate``."""

    queue: Path | None = Field(None, description="queue.json of rank: only these instances are shown")
    store: Path | None = Field(None, description="file of verdicts to go on with (default: verdicts.db at the model)")
    annotators: tuple[str, ...] = Field(("you",), description="who may come in, each by a link of their own")
    port: int = Field(8765, ge=0, lt=65536, description="port to listen on; 0 for any that is free")
    host: str = Field("127.0.0.1", description="address to listen on; another one lets other machines in")
    hosts: tuple[str, ...] = Field((), description="names with port under which other machines reach this one")
    browser: bool = Field(True, description="open the page of the first annotator")
    samples: int = Field(30, ge=2, description="draws of a prediction")


@line.command(AnnotateConfig)
def annotate(config: AnnotateConfig, session: Session) -> Outcome:
    """Serve the annotation page until Ctrl-C; every verdict is kept, and the model obeys it, at once."""
    from ial_nap.annotations import latest, to_jsonl
    from ial_nap.web.model import serve

    opened = _open(config.model, session.device)
    estimator = opened.estimator
    _, pool, held = _pool(config, opened)
    if held is None or held.y is None:
        raise InputError(f"{opened.path}: has no {_FACTS} beside it, so there is nothing to score on; fit again")
    if config.queue is not None:
        places = {name: k for k, name in enumerate(pool.ids)}
        asked = _queued(config.queue)
        unknown = next((name for name in asked if name not in places), None)
        if unknown is not None:
            raise InputError(f"{config.queue}: instance '{unknown}' is not among those of the data; rank again")
        pool = pool.part([places[name] for name in asked])
    before = estimator.score_report(held)
    store = config.store or opened.path.with_name("verdicts.db")

    def announce(links: dict[str, str]) -> None:
        for name, link in links.items():
            session.say(f"{name}: {link}")
        session.say(f"Ctrl-C ends the page; verdicts are in {store}")

    names = _class_names(opened)
    standing = serve(
        estimator, pool, validation=held, store=store, annotators=config.annotators, cer=config.cer(config.samples),
        samples=config.samples, port=config.port, host=config.host, hosts=config.hosts, open_browser=config.browser,
        outputs=names if pool.outputs == len(names) else None, announce=announce,
    )  # fmt: skip
    with atomic_path(session.run.artifact("annotations.jsonl")) as temporary:
        temporary.write_text(to_jsonl(_log_of_store(store)), encoding="utf-8")
    _save_again(session, opened)
    after = estimator.score_report(held)
    people = {one.annotator for one in standing}
    notes = [f"{len(latest(standing))} verdicts of {len(people)} annotators stand", _change(before, after)]
    return Outcome(_score_rows(after, "validation", "with verdicts"), notes=notes)


def _queued(path: Path) -> list[str]:
    try:
        rows: Any = json.loads(path.read_text(encoding="utf-8"))
        names = [row["instance"] for row in rows]
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; give the queue.json of 'ial-nap rank'") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: is not what 'ial-nap rank' writes ({error!r})") from None
    if not names or not all(isinstance(name, str) for name in names):
        raise InputError(f"{path}: names no instance; give the queue.json of 'ial-nap rank'")
    return list(dict.fromkeys(names))


def _log_of_store(path: Path) -> list[Annotation]:
    """Read every line of a store, whatever features it is about."""
    from ial_nap.store import AnnotationStore

    try:
        # Never made where there is none, never written to.
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as file:
            (text,) = file.execute("SELECT value FROM meta WHERE key = 'described'").fetchone()
        described = json.loads(text)
        features, steps, units = described["features"], int(described["steps"]), described["units"]
    except (sqlite3.Error, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: is not a store of verdicts ({' '.join(str(error).split())})") from None
    with AnnotationStore(path, features, steps, units=units, read_only=True) as store:
        return store.log()


def _read_verdicts(path: Path, skip_bad: bool) -> tuple[list[Annotation], list[str]]:
    from ial_nap.annotations import read_jsonl

    try:
        with path.open("rb") as file:
            is_store = file.read(16) == b"SQLite format 3\0"
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); give a file of verdicts") from None
    if is_store:
        return _log_of_store(path), []
    found, problems = read_jsonl(path, skip_bad=skip_bad)
    if not found:
        raise InputError(f"{path}: has no verdict; give JSON lines, or the store of the annotation page")
    return found, [f"left out: {problem}" for problem in problems]


def _save_again(session: Session, opened: _Opened) -> None:
    opened.estimator.save(session.run.artifact(_MODEL))
    if opened.facts:
        write_json(session.run.artifact(_FACTS), opened.facts)


def _change(before: ScoreReport, after: ScoreReport) -> str:
    """Say what the score of held-out series did, with an interval over resamples of instances that both share."""
    from ial_nap.resampling import resampled

    old, new = (next(iter(resampled(r.series, r.predictions, draws=1000).values())) for r in (before, after))
    metric = written(new.metric)
    text = f"validation {metric.name} {metric.value(old.value)} -> {metric.value(new.value)}"
    text = f"{text}, change {metric.change(new.value - old.value)}"
    bounds = new.gain_over(old)
    if bounds is None:
        return f"{text}: too few instances for an interval"
    text = f"{text} (95 % interval {metric.change(bounds[0])} .. {metric.change(bounds[1])})"
    if bounds[0] <= 0 <= bounds[1]:
        return f"{text}: no clear change"
    worse = (new.value < old.value) == (new.better == "higher")
    return f"{text}: WORSE, unless these series share the shortcut; --replace takes verdicts back" if worse else text


class UpdateConfig(ModelOptions):
    """Settings of ``update``."""

    annotations: Path = argument(_VERDICTS)
    data: str | None = Field(None, description=f"{_SOURCE}: what was annotated (default: what was trained on)")
    replace: bool = Field(False, description="obey these verdicts only, and none that the model holds")
    finetune: int = Field(0, ge=0, description="gradient steps on what was annotated, as the paper takes 50")
    finetune_lr: float = Field(1e-3, gt=0, description="step size of these")
    skip_bad: bool = Field(False, description="leave lines that cannot be read out, and say which")


@line.command(UpdateConfig)
def update(config: UpdateConfig, session: Session) -> Outcome:
    """Obey verdicts, without training unless asked; say which gates moved, and who asked for it."""
    from ial_nap import plots

    said, notes = _read_verdicts(config.annotations, config.skip_bad)
    opened = _open(config.model, session.device)
    estimator = opened.estimator
    pool, held = (None, None) if config.data is None and not opened.facts else _pool(config, opened)[1:]
    if pool is not None:
        estimator.know(pool)
    before = None if held is None else estimator.score_report(held)
    gates, old = _gates(estimator), estimator.context_hash
    shift = (estimator.replace if config.replace else estimator.update)(said)
    if config.finetune:
        if pool is None:
            raise InputError("--finetune: needs the series that were annotated; give --data")
        estimator.finetune(config.finetune, lr=config.finetune_lr, series=pool)
    moved = _moved(estimator, gates, said)
    shown = moved[:_SHOWN]
    notes.append(
        f"{shift.verdicts} verdicts changed {len(shift.cells)} cells; context {old} -> {estimator.context_hash}"
    )
    if shown:
        notes.append(f"{'feature':24} {'step':>10}   gate            who asked")
    notes += [
        f"{row['feature'][:24]:24} {row['step'][:10]:>10}   {row['before']:.3f} -> {row['after']:.3f}  {_who(row)}"
        for row in shown
    ]
    if len(moved) > len(shown):
        notes.append(f"and {len(moved) - len(shown)} more, see diff.json")
    rows: list[Result] = []
    if before is not None and held is not None:
        after = estimator.score_report(held)
        notes.append(_change(before, after))
        rows = _score_rows(before, "validation", "before")
        rows += _score_rows(after, "validation", "after")
    _save_again(session, opened)
    series = estimator.series_
    plots.plot_gates(
        session.run.artifact("gates.png"), gates, _gates(estimator), features=series.features, steps=series.steps
    )
    record = {
        "context": {"before": old, "after": estimator.context_hash},
        "verdicts": shift.verdicts,
        "instances": sorted({instance for instance, _ in shift.keys}),
        "finetune": config.finetune,
        "gates": moved,
    }
    write_json(session.run.artifact("diff.json"), record)
    return Outcome(rows, notes=notes)


def _gates(estimator: Estimator) -> np.ndarray:
    """Return how far each cell's gate is open at the mean of the latent, (t, r)."""
    import torch

    model = estimator.model_
    with torch.no_grad():
        return model.gate(model.condition(), hard=model.hard)[0].cpu().double().numpy()


def _moved(estimator: Estimator, before: np.ndarray, said: Iterable[Annotation]) -> list[dict[str, Any]]:
    """Return the cells whose gates moved, those that moved most first, with who asked for it."""
    from ial_nap.annotations import latest

    after, series = _gates(estimator), estimator.series_
    asked: dict[tuple[int, str], dict[int, set[str]]] = {}
    for one in latest(said):
        asked.setdefault((one.step, one.feature), {}).setdefault(one.verdict, set()).add(one.annotator or "somebody")
    rows: list[dict[str, Any]] = []
    for t, step in enumerate(series.steps):
        for d, feature in enumerate(series.features):
            by = asked.get((t, feature), {})
            if by or abs(after[t, d] - before[t, d]) > 1e-3:
                rows.append(
                    {"step": step, "feature": feature, "before": float(before[t, d]), "after": float(after[t, d]),
                     "excluded": bool(after[t, d] == 0), "attend": sorted(by.get(1, ())),
                     "not attend": sorted(by.get(0, ()))}
                )  # fmt: skip
    return sorted(rows, key=lambda row: -abs(row["after"] - row["before"]))


def _who(row: dict[str, Any]) -> str:
    parts = [f"{what}: {', '.join(row[what])}" for what in ("attend", "not attend") if row[what]]
    return "; ".join(parts) + (" (excluded)" if row["excluded"] else "") if parts else "through the latent"


class EvaluateConfig(ModelOptions):
    """Settings of ``evaluate``."""

    against: Path | None = Field(None, description="another model to compare with on the same instances")
    part: Literal["train", "validation", "audit", "test"] = Field("test", description="part of the model's own data")
    metric: str | None = Field(None, description="score that is compared (default: the main one of the task)")
    draws: int = Field(500, ge=0, description="resamples of the instances, for intervals")


@line.command(EvaluateConfig)
def evaluate(config: EvaluateConfig, session: Session) -> Outcome:
    """Measure a model on held-out series, alone or against another, with intervals over instances."""
    from ial_nap import plots

    opened = _open(config.model, session.device)
    name, series = _part(config, opened, config.part)
    report = opened.estimator.score_report(series)
    rows = _score_rows(report, name, "model", draws=config.draws, seed=config.seed)
    curves, notes = {"model": report}, [f"{len(series)} instances, {len(opened.estimator.context_)} masks of verdicts"]
    if config.against is not None:
        other = _open(config.against, session.device)
        try:
            second = other.estimator.score_report(series)
        except InputError as error:
            raise InputError(f"--against {config.against}: {error}") from None
        curves["against"] = second
        rows += _score_rows(second, name, "against", draws=config.draws, seed=config.seed)
        rows.append(_difference(report, second, name, config))
        text = "a clear difference" if (rows[-1].low or 0) * (rows[-1].high or 0) > 0 else "no clear difference"
        unit = "" if rows[-1].unit == "1" else f" {rows[-1].unit}"
        gap = f"{rows[-1].metric} {rows[-1].mean:+.4g}{unit}"
        notes.append(f"{gap}: {text}; the same instances are drawn for both models")
    _draw_reliability(session.run.artifact("reliability.png"), curves, plots)
    return Outcome(rows, notes=notes)


def _difference(one: ScoreReport, two: ScoreReport, dataset: str, config: EvaluateConfig) -> Result:
    """Compare two models by a score, on resamples of the instances that both predicted."""
    from ial_nap.resampling import resampled

    first, second = (
        resampled(report.series, report.predictions, draws=max(config.draws, 1), seed=config.seed)
        for report in (one, two)
    )
    name = config.metric or next(iter(first))
    if name not in first:
        raise no_such("metric", name, first, where=f"--metric, a {one.series.kind} task")
    metric, bounds = written(name), first[name].gain_over(second[name])
    low, high = (None, None) if bounds is None else (metric.factor * bound for bound in bounds)
    return Result(
        dataset=dataset, method="model - against", metric=f"{metric.name}, difference", unit=metric.unit_of_change,
        better=first[name].better, mean=metric.factor * (first[name].value - second[name].value), low=low, high=high,
        n=len(one.series), seconds=0.0,
    )  # fmt: skip


def _draw_reliability(path: Path, reports: dict[str, ScoreReport], plots: Any) -> None:
    """Draw calibration of probabilities, or predicted against true numbers."""
    import numpy as np

    first = next(iter(reports.values())).series
    if first.kind == "regression":
        found: dict[str, Any] = {}
        for name, report in reports.items():
            scaling = report.series.scaling
            y, p = (scaling.raw_target(values.double()).numpy() for values in (report.series.targets, _tensor(report)))
            # The spread of what is left is the only one that is about the target itself.
            found[name] = p, np.full(len(p), max(float(np.std(p - y)), 1e-12)), y
        plots.plot_intervals(path, found)
        return
    answers: dict[str, Any] = {}
    for name, report in reports.items():
        y, p = report.series.targets.numpy(), report.predictions
        if first.kind == "multiclass":
            answers[name] = np.clip(p.max(1), 0, 1), (p.argmax(1) == y).astype(float)
        else:
            answers[name] = np.clip(p.ravel(), 0, 1), y.ravel().astype(float)
    plots.plot_reliability(path, answers)


def _tensor(report: ScoreReport) -> Tensor:
    import torch

    return torch.from_numpy(report.predictions[:, 0])


class PredictConfig(ModelOptions):
    """Settings of ``predict``."""

    level: float = Field(
        0.9, gt=0, lt=1, description="level of the interval, over draws of what the model does not know"
    )
    part: Literal["train", "validation", "audit", "test"] = Field("test", description="part of the model's own data")
    output: Path | None = Field(None, description="CSV to write (default: predictions.csv in the run folder)")


@line.command(PredictConfig)
def predict(config: PredictConfig, session: Session) -> Outcome:
    """Predict series, each with its interval."""
    opened = _open(config.model, session.device)
    name, series = _part(config, opened, config.part)
    header, rows = _predictions(opened, series, config.level)
    path = config.output or session.run.artifact("predictions.csv")
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    notes = [f"wrote {path}: {len(rows)} instances of {name}"]
    if header[1] == "class":
        counts = {label: sum(row[1] == label for row in rows) for label in _class_names(opened)}
        notes.append(", ".join(f"{label} {count}" for label, count in counts.items()))
    if series.y is None:
        return Outcome(notes=notes)
    report = opened.estimator.score_report(series)
    return Outcome(_score_rows(report, name, "model"), notes=notes)


def _predictions(opened: _Opened, series: Series, level: float) -> tuple[list[str], list[list[str]]]:
    estimator, names = opened.estimator, _class_names(opened)
    mean, std = estimator.predict_dist(series)
    low, high = estimator.interval(series, level)
    rows: list[list[str]] = []
    if estimator.kind_ == "regression":
        header = ["id", "prediction", "low", "high", "std"]
        columns = mean.tolist(), low.tolist(), high.tolist(), std.tolist()
        rows += [
            [instance, *(f"{value:.6g}" for value in values)]
            for instance, *values in zip(series.ids, *columns, strict=True)
        ]
    elif estimator.kind_ == "multilabel":
        header = ["id", *(f"{what}({name})" for name in names for what in ("p", "low", "high"))]
        for k, instance in enumerate(series.ids):
            cells = [v for c in range(len(names)) for v in (mean[k, c], low[k, c], high[k, c])]
            rows.append([instance, *(f"{value:.4f}" for value in cells)])
    else:
        header = ["id", "class", "probability", "low", "high", *(f"p({name})" for name in names)]
        for k, instance in enumerate(series.ids):
            c = int(mean[k].argmax())
            cells = [mean[k, c], low[k, c], high[k, c], *mean[k]]
            rows.append([instance, names[c], *(f"{value:.4f}" for value in cells)])
    return header, rows


# ---- pictures


class PlotConfig(TableOptions):
    """Settings of ``plot``."""

    picture: Picture = argument(
        "what to draw: attention, contributions, reliability or history of a model; curve of simulate or compare;"
        " comparison of any run; agreement of verdicts"
    )
    source: Path = argument("the model, run folder or file of verdicts to draw it of")
    data: str | None = argument(f"{_SOURCE} (default: what the model was trained on)", None)
    instance: str | None = Field(None, description="instance to draw (default: the one most worth a look)")
    part: Literal["train", "validation", "audit", "test"] = Field("test", description="of the data, for reliability")
    methods: tuple[str, ...] = Field((), description="of a curve or comparison, draw only these methods")
    output: Path | None = Field(None, description="PNG, SVG or PDF to write (default: in the run folder of plot)")


@line.command(PlotConfig)
def plot(config: PlotConfig, session: Session) -> Outcome:
    """Draw what a model attends to, what it adds up, how well it is calibrated, or what runs came to."""
    from ial_nap import plots

    path = config.output or session.run.artifact(f"{config.picture}.png")
    match config.picture:
        case "curve":
            rounds, facts = _read_rounds(config.source)
            plots.plot_curve(path, _only(config.methods, rounds, config.source), **facts)
        case "comparison":
            rows = read_summary(config.source).results
            kept = _only(config.methods, {row.method: [r for r in rows if r.method == row.method] for row in rows},
                         config.source)  # fmt: skip
            plots.plot_comparison(path, [row for name in kept for row in kept[name]])
        case "agreement":
            said, _ = _read_verdicts(config.source, skip_bad=False)
            plots.plot_agreement(path, *_kappas(said))
        case _:
            _draw_model(config, session, path)
    return Outcome(notes=[f"wrote {path}"])


def _draw_model(config: PlotConfig, session: Session, path: Path) -> None:
    from ial_nap import plots

    opened = _open(config.source, session.device)
    estimator = opened.estimator
    if config.picture == "history":
        plots.plot_history(path, {"ial-nap": estimator.history_})
        return
    options = ModelOptions.model_validate(
        {"model": config.source, **{name: getattr(config, name) for name in ("data", *TableOptions.model_fields)}}
    )
    if config.picture == "reliability":
        _, series = _part(options, opened, config.part)
        _draw_reliability(path, {"ial-nap": estimator.score_report(series)}, plots)
        return
    _, pool, _ = _pool(options, opened)
    one = _instance(estimator, pool, config.instance)
    names: dict[str, Any] = {"features": pool.features, "steps": pool.steps}
    if config.picture == "attention":
        seen = estimator.attention(one)
        plots.plot_attention(
            path, seen.alpha[0].numpy(), seen.beta[0].numpy(), alpha_deviation=seen.alpha_std[0].numpy(),
            gate=_gates(estimator), title=one.ids[0], **names,
        )  # fmt: skip
        return
    from ial_nap.page_report import heat_of

    heat = heat_of(estimator, one)
    maps = {"contributions": heat.after}
    if len(estimator.context_):
        maps = {"without verdicts": heat.before, "with verdicts": heat.after}
    plots.plot_contributions(
        path, maps, values=heat.values, units=estimator.units_, uncertain=heat.uncertain,
        title=f"{one.ids[0]}: {heat.prediction[1]:.3g} ({heat.interval[0]:.3g} .. {heat.interval[1]:.3g})", **names,
    )  # fmt: skip


def _instance(estimator: Estimator, pool: Series, name: str | None) -> Series:
    from ial_nap.ranking import CER
    from ial_nap.series import find_name

    if name is None:
        return pool.part([estimator.rank(pool, cer=CER(k=1))[0].index])
    return pool.part([find_name(name, pool.ids, "instance")])


def _only(methods: tuple[str, ...], found: dict[str, Any], source: Path) -> dict[str, Any]:
    unknown = next((name for name in methods if name not in found), None)
    if unknown is not None:
        raise no_such("method", unknown, found, where=f"--methods: {source}")
    return {name: found[name] for name in methods or found}


# ---- verdicts: who agrees, and what they look like elsewhere


class AgreementConfig(CommandConfig):
    """Settings of ``agreement``."""

    annotations: Path = argument(_VERDICTS)
    unknown: bool = Field(False, description="count 'don't know' as a third opinion")
    skip_bad: bool = Field(False, description="leave lines that cannot be read out, and say which")


@line.command(AgreementConfig)
def agreement(config: AgreementConfig, session: Session) -> Outcome:
    """Say how far annotators agree beyond chance, and where they do not."""
    from ial_nap import plots
    from ial_nap.annotations import disagreements, kappa_of_all

    said, notes = _read_verdicts(config.annotations, config.skip_bad)
    people, kappas, counts = _kappas(said, unknown=config.unknown)
    if len(people) < 2:
        raise InputError(f"{config.annotations}: verdicts of {len(people)} annotator; agreement is between two or more")
    rows: list[Result] = []
    pairs = [(i, j) for i in range(len(people)) for j in range(i + 1, len(people))]
    for name, metric, value, n in (
        ("all", "Fleiss' kappa", kappa_of_all(said, unknown=config.unknown), 1),
        *((f"{people[i]}, {people[j]}", "Cohen's kappa", kappas[i, j], int(counts[i, j])) for i, j in pairs),
    ):
        if math.isfinite(value):
            rows.append(
                summarize([float(value)], dataset=config.annotations.stem, method=name, metric=metric, better="higher")
            )
        else:
            notes.append(f"{metric} of {name}: none, for nothing was judged by all or everybody always said the same")
        if metric.startswith("Cohen"):
            notes.append(f"{name}: {n} cells judged by both")
    splits = disagreements(said)
    with (
        atomic_path(session.run.artifact("disagreements.csv")) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["instance", "step", "feature", "attend", "not attend"])
        writer.writerows(
            [one.instance, one.step, one.feature, "; ".join(one.attend), "; ".join(one.ignore)] for one in splits
        )
    plots.plot_agreement(session.run.artifact("agreement.png"), people, kappas, counts)
    notes += [
        f"{one.instance}, step {one.step}, {one.feature}: attend: {', '.join(one.attend)}; not: {', '.join(one.ignore)}"
        for one in splits[:_SHOWN]
    ]
    if len(splits) > _SHOWN:
        notes.append(f"and {len(splits) - _SHOWN} more, see disagreements.csv")
    return Outcome(rows, notes=notes)


def _kappas(said: Iterable[Annotation], *, unknown: bool = False) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return annotators, Cohen's kappa of every two of them, and how many cells both have judged."""
    import numpy as np

    from ial_nap.annotations import kappa_between, latest

    standing = latest(said)
    people = sorted({one.annotator for one in standing})
    cells = {
        who: {one.cell for one in standing if one.annotator == who and (unknown or one.verdict >= 0)} for who in people
    }
    kappas, counts = np.full((len(people), len(people)), np.nan), np.zeros((len(people), len(people)))
    for i, first in enumerate(people):
        for j, second in enumerate(people):
            counts[i, j] = len(cells[first] & cells[second])
            if i != j:
                kappas[i, j] = kappa_between(standing, first, second, unknown=unknown)
    return people, kappas, counts


class ExportConfig(TableOptions):
    """Settings of ``export``."""

    annotations: Path = argument(_VERDICTS)
    format: ExportFormat = Field("csv", description="what to write; html is a report that needs --model")
    standing: bool = Field(True, description="what stands, or else every line ever written (csv, jsonl)")
    model: Path | None = Field(None, description="html: run folder of fit or update, or a .safetensors file")
    data: str | None = Field(None, description="html: what was annotated (default: what the model was trained on)")
    instances: int = Field(10, ge=0, description="html: instances to show at most")
    skip_bad: bool = Field(False, description="leave lines that cannot be read out, and say which")
    output: Path | None = Field(None, description="file to write (default: in the run folder of export)")


@line.command(ExportConfig)
def export(config: ExportConfig, session: Session) -> Outcome:
    """Write verdicts as a table, as lines, as tasks of Label Studio, or as a report that opens anywhere."""
    from ial_nap.annotations import latest, to_csv, to_jsonl, to_label_studio

    said, notes = _read_verdicts(config.annotations, config.skip_bad)
    kept = latest(said) if config.standing else said
    endings = {"csv": ".csv", "jsonl": ".jsonl", "label-studio": ".json", "html": ".html"}
    path = config.output or session.run.artifact(f"annotations{endings[config.format]}")
    match config.format:
        case "csv":
            text = to_csv(kept)
        case "jsonl":
            text = to_jsonl(kept)
        case "label-studio":
            text = json.dumps(to_label_studio(said), indent=2, ensure_ascii=False) + "\n"
        case _:
            text = _page(config, session, said)
    # A table has line ends of its own.
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")
    return Outcome(notes=[*notes, f"wrote {path}: {len(kept)} verdicts"])


def _page(config: ExportConfig, session: Session, said: list[Annotation]) -> str:
    from ial_nap.page_report import report_html, report_of

    if config.model is None:
        raise InputError("--format html: shows what verdicts did to a model; give --model")
    opened = _open(config.model, session.device)
    options = ModelOptions.model_validate(
        {"model": config.model, **{name: getattr(config, name) for name in ("data", *TableOptions.model_fields)}}
    )
    name, pool, held = _pool(options, opened)
    opened.estimator.know(pool)
    opened.estimator.replace(said)
    facts = {"data": name, "model": str(config.model), "verdicts": str(config.annotations)}
    return report_html(report_of(opened.estimator, pool, held, said, instances=config.instances, facts=facts))


# ---- report


class ReportConfig(ModelOptions):
    """Settings of ``report``."""

    part: Literal["train", "validation", "audit", "test"] = Field("test", description="part of the model's own data")
    annotations: Path | None = Field(None, description=f"{_VERDICTS}, for who, when and why (default: the model's own)")
    seeds: int = Field(2, ge=0, description="trainings with other seeds, whose explanations are compared; 0 for none")
    tax: bool = Field(True, description="train a plain RETAIN too: what being correctable costs")
    points: int = Field(11, ge=2, description="shares of cells of the deletion and insertion curves")
    orders: int = Field(5, ge=1, description="random orders that these are compared with")
    instances: int = Field(10, ge=0, description="annotated instances to show at most")


@line.command(ReportConfig)
def report(config: ReportConfig, session: Session) -> Outcome:
    """Say whether explanations are true to the model and stable, what is excluded for certain, and who moved what."""
    from ial_nap import plots, reports
    from ial_nap.page_report import Certified, report_html, report_of
    from shared_core.runs import Claim

    opened = _open(config.model, session.device)
    estimator = opened.estimator
    said = _held(estimator) if config.annotations is None else _read_verdicts(config.annotations, skip_bad=False)[0]
    name, series = _part(config, opened, config.part)
    own = config.data is None
    split = _own(opened)[1] if own else None
    if split is not None:
        estimator.train_, estimator.validation_ = split.train, split.validation
    others = _trained_again(config, session, opened, split) if split is not None else []
    faith = reports.faithfulness(estimator, series, points=config.points, draws=config.orders, seed=config.seed)
    certificate = reports.certificate(estimator, series)
    moved = reports.who_moved(estimator, series, by="cell")
    curves = {
        "deletion": {"contributions": faith.deletion, "random order": faith.random_deletion},
        "insertion": {"contributions": faith.insertion, "random order": faith.random_insertion},
    }
    plots.plot_faithfulness(session.run.artifact("faithfulness.png"), curves)
    write_json(session.run.artifact("certificate.json"), _finite(certificate.to_json()))
    _write_moved(session.run.artifact("moved.csv"), estimator, moved)

    def row(metric: str, value: float, unit: str = "1") -> Result:
        return summarize([value], dataset=name, method="ial-nap", metric=metric, unit=unit, better="higher")

    rows = [
        row("deletion, area below random orders", faith.deletion_gain, "logits"),
        row("insertion, area above random orders", faith.insertion_gain, "logits"),
    ]
    notes = [f"{int(certificate.excluded.sum())} cells are excluded; checked on {certificate.instances} instances"]
    if others:
        stable = reports.stability([estimator, *others], series)
        rows.append(row("stability, rank correlation of seeds", stable.mean))
        notes.append(f"the two seeds that agree least: {stable.low:.3f}")
    if config.tax and split is not None:
        cost = reports.tax(estimator, series)
        metric = written(cost.metric)
        notes.append(
            f"before verdicts, {metric.name} {metric.value(cost.after)}; a plain RETAIN {metric.value(cost.before)}"
            f" (difference {metric.change(cost.low)} .. {metric.change(cost.high)})"
        )
    notes += [
        f"{one.feature} at {estimator.series_.steps[one.step]}: {one.verdicts} verdicts move predictions {one.size:.3g}"
        for one in moved[: _SHOWN // 2]
    ]
    worst = max(certificate.gradient, certificate.garbage)
    claims = [
        Claim(text="what verdicts exclude has no effect, by gradients and by garbage in its place",
              source="specification 11", holds=certificate.holds, value=worst if math.isfinite(worst) else None,
              threshold=0.0),
        Claim(text="contributions are truer to the model than random orders", source="specification 10",
              holds=min(faith.deletion_gain, faith.insertion_gain) > 0,
              value=min(faith.deletion_gain, faith.insertion_gain), threshold=0.0),
    ]  # fmt: skip
    certified = Certified(
        certificate.holds,
        tuple(
            (certificate.steps[t], certificate.features[d])
            for t, d in zip(*certificate.excluded.nonzero(), strict=True)
        ),
        (
            f"Largest slope of an output in an excluded cell: {certificate.gradient:g}.",
            f"Largest change of an output as excluded cells take values up to 1e30: {certificate.garbage:g}.",
            f"Checked on {certificate.instances} instances; network {certificate.network}.",
        ),
    )
    pool, held = series if split is None else split.train, None if series.y is None else series
    page = report_of(
        estimator, pool, held, said, instances=config.instances, facts={"data": name, "model": str(config.model)},
        certificate=certified,
        curves={kind: {order: curve.tolist() for order, curve in panel.items()} for kind, panel in curves.items()},
        notes=notes,
    )  # fmt: skip
    with atomic_path(session.run.artifact("report.html")) as temporary:
        temporary.write_text(report_html(page), encoding="utf-8")
    return Outcome(rows, claims, notes)


def _held(estimator: Estimator) -> list[Annotation]:
    """Return the verdicts that a model holds, as records."""
    from ial_nap.annotations import Annotation

    context, names = estimator.context_, estimator.series_.features
    return [
        Annotation(instance, t, names[d], int(mask[t, d]), annotator=who)
        for (instance, who), mask in zip(context.keys, context.masks, strict=False)
        for t, d in (mask >= 0).nonzero().tolist()
    ]


def _trained_again(config: ReportConfig, session: Session, opened: _Opened, split: Split) -> list[Estimator]:
    """Train with other seeds, each kept as soon as it is done, and tell these models the same verdicts."""
    from sklearn.base import clone

    from ial_nap.saving import load

    estimator, found = opened.estimator, list[Any]()
    with session.progress("seeds", config.seeds) as advance:
        for k in range(config.seeds):
            path = session.run.folder / f"seed-{k + 1}.safetensors"
            if session.resumed and path.exists():
                other = load(path, device=str(session.device))
            else:
                other = cast("Any", clone(estimator)).set_params(
                    seed=int(estimator.seed) + k + 1, device=str(session.device)
                )
                other.fit(
                    split.train, validation=split.validation, checkpoint=session.run.folder / _CHECKPOINT
                ).save(session.run.artifact(path.name))  # fmt: skip
            session.run.artifact(path.name)
            other.know(split.train)
            other.replace(estimator.context_, allow_empty=True)
            found.append(other)
            advance(1, note=f"seed {k + 1}")
    return found


def _write_moved(path: Path, estimator: Estimator, moved: Iterable[Any]) -> None:
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["feature", "step", "verdicts", "mean absolute change of predictions"])
        writer.writerows(
            [one.feature, estimator.series_.steps[one.step], one.verdicts, f"{one.size:.6g}"] for one in moved
        )


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    """Write what is infinite as text: JSON has no word for it."""
    return {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in record.items()
    }


# ---- simulation


class SimulateConfig(DataOptions, SimulationFields):
    """Settings of ``simulate``."""

    data: str = argument(_SOURCE, "shift")
    oracle: Path | None = Field(
        None,
        description="NPZ with 'mask' of 1 and 0, (t, r) or (n, t, r): what is right (default: the set's, or --plant)",
    )
    flip: float = Field(0.0, ge=0, le=1, description="probability that the simulated annotator says the opposite")
    unsure: float = Field(0.0, ge=0, le=1, description="probability that the simulated annotator does not know")
    methods: tuple[str, ...] = Field(("retain", "drop", "random-nap", "ial-nap"), description="methods, or all")
    seeds: int = Field(5, ge=1, description="splits, and trainings of each method")
    tune: bool = Field(False, description="choose the settings of methods that train, as many tries for each")
    trials: int = Field(3, ge=1, le=9, description="settings to try for each")


@line.command(SimulateConfig, spread=True)
def simulate(config: SimulateConfig, session: Session) -> Outcome:
    """Let a simulated annotator correct models round by round: what is gained per verdict, and per second."""
    from dataclasses import asdict

    from ial_nap import plots
    from ial_nap.experiments import by_seed
    from ial_nap.simulation import simulate as simulated
    from ial_nap.simulation import tuned

    methods: Any = chosen_methods(config.methods)
    data = _load(config.data, config, kind=config.kind, features=config.features)
    setting = config.setting()
    seeds = range(config.seed, config.seed + config.seeds)
    rounds: dict[str, list[list[Round]]] = {name: [] for name in methods}

    def work(seed: int) -> dict[str, Callable[[], list[dict[str, Any]]]]:
        trained: dict[str, Any] = {}

        @cache
        def prepared() -> tuple[Split, Oracle]:
            split = _split(data, config, seed)
            return split, _oracle(config, data, split, seed)

        def run(name: Any) -> list[dict[str, Any]]:
            (split, oracle), chosen = prepared(), setting
            if config.tune:
                chosen = tuned(
                    name, split.train, split.validation, oracle, setting, seed, config.trials, trained=trained
                )
            found = simulated(
                name, split.train, split.validation, split.test, oracle, chosen, seed=seed, trained=trained
            )
            return [asdict(one) for one in found]

        return {f"{name}, seed {seed}": lambda name=name: run(name) for name in methods}

    with session.progress("methods", len(methods) * config.seeds) as advance:
        found = by_seed(seeds, work, session.run, lambda note, done: advance(done, note=note))
    for row in found.values():
        for name, run in zip(methods, row, strict=True):
            rounds[name].append(_as_rounds(run))
    facts = _curve_facts(data)
    _write_rounds(session, rounds, facts)
    plots.plot_curve(session.run.artifact("curve.png"), rounds, **facts)
    rows = _simulation_rows(rounds, facts)
    plots.plot_comparison(session.run.artifact("comparison.png"), [r for r in rows if r.unit != "s"])
    cells = max(run[-1].cells for runs in rounds.values() for run in runs)
    return Outcome(rows, notes=[f"up to {cells} verdicts of a simulated annotator; seconds are of learning from them"])


def _oracle(config: SimulateConfig, data: Dataset, split: Split, seed: int) -> Oracle:
    """Return the annotator, who knows the mask that was given, or where the shortcut of the set is."""
    import numpy as np
    import torch

    from ial_nap.simulation import Oracle

    options: dict[str, Any] = {"flip": config.flip, "unsure": config.unsure, "seed": seed}
    if config.oracle is None:
        if split.truth is None:
            raise InputError(f"{data.name}: nobody knows what is right; give --oracle, or --plant 2 to add a shortcut")
        return Oracle(split.truth, **options)
    mask = _mask(config.oracle)
    t, r = split.train.x.shape[1:]
    if config.plant and mask.shape[-1] == r - config.plant:
        # Nobody need know beforehand of what is planted.
        mask = np.concatenate([mask, np.zeros((*mask.shape[:-1], config.plant), np.int8)], -1)
    if mask.shape not in {(t, r), (len(data), t, r)}:
        raise InputError(
            f"{config.oracle}: mask has shape {mask.shape}: expected ({t}, {r}), or ({len(data)}, {t}, {r}) for each"
            " instance"
        )
    if mask.ndim == 3:
        place = {name: k for k, name in enumerate(data.ids)}
        mask = mask[[place[name] for name in split.train.ids]]
    return Oracle(torch.from_numpy(mask), **options)


def _mask(path: Path) -> np.ndarray:
    import zipfile

    import numpy as np

    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise InputError(f"{path}: is a single array; save it with np.savez(file, mask=...)")
        with file:
            name = next((name for name in ("mask", "masks", "M") if name in file.files), None)
            if name is None:
                raise InputError(f"{path}: no array 'mask'; there is {', '.join(file.files) or 'nothing'}")
            found = np.asarray(file[name])
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or 'is no NPZ file'}; give an NPZ with 'mask'") from None
    except (ValueError, EOFError, zipfile.BadZipFile, KeyError) as error:
        raise InputError(f"{path}: is not a whole NPZ file of plain arrays ({' '.join(str(error).split())})") from None
    if found.ndim not in {2, 3} or found.dtype.kind not in "iufb" or not np.isin(found, (0, 1)).all():
        raise InputError(f"{path}: '{name}' must hold 1 (attend) and 0 (do not), (t, r) or (n, t, r)")
    return found.astype(np.int8)


def _as_rounds(rows: Iterable[dict[str, Any]]) -> list[Round]:
    from ial_nap.simulation import Round

    return [Round(**row) for row in rows]


def _simulation_rows(rounds: dict[str, list[list[Round]]], facts: dict[str, str]) -> list[Result]:
    """Return each method's score at the end, its mean over verdicts, and the time it took to learn from them."""
    better: Any = facts["better"]
    metric = written(facts["metric"])
    rows: list[Result] = []
    for name, runs in rounds.items():
        same: dict[str, Any] = {
            "dataset": facts["title"],
            "method": name,
            "seconds": sum(r.seconds for run in runs for r in run),
        }
        scores = {
            "before": [run[0].score for run in runs],
            "after": [run[-1].score for run in runs],
            "over verdicts": [_over_cells(run) for run in runs],
        }
        rows += [
            summarize(
                [metric.factor * value for value in values], metric=f"{metric.name} {when}", unit=metric.unit,
                better=better, **same,
            )
            for when, values in scores.items()
        ]  # fmt: skip
        learnt = [sum(one.seconds for one in run[1:]) for run in runs]
        rows.append(summarize(learnt, metric="learning", unit="s", better="lower", **same))
    return rows


def _over_cells(run: list[Round]) -> float:
    """Return the mean of the score over verdicts, by trapezoids: the area under its curve."""
    span = run[-1].cells - run[0].cells
    area = sum((two.cells - one.cells) * (one.score + two.score) / 2 for one, two in pairwise(run))
    return area / span if span else run[-1].score


_Some = Field(min_length=1)


class _Row(BaseModel):
    method: str
    round: int = Field(ge=0)
    cells: int = Field(ge=0)
    score: float
    seconds: float


class _Rounds(BaseModel):
    """What ``simulate`` and ``compare`` leave of their rounds."""

    metric: Literal["auroc", "accuracy", "rmse"]
    better: Literal["lower", "higher"]
    title: str
    rounds: dict[str, Annotated[list[Annotated[list[_Row], _Some]], _Some]]


def _read_rounds(source: Path) -> tuple[dict[str, list[list[Round]]], dict[str, Any]]:
    path = source / _ROUNDS if source.is_dir() else source
    found = read_document(path, _Rounds, "what 'ial-nap simulate' writes", "the run folder of 'ial-nap simulate'")
    rounds = {
        name: [_as_rounds(row.model_dump() for row in run) for run in runs] for name, runs in found.rounds.items()
    }
    return rounds, found.model_dump(exclude={"rounds"})


# ---- data


class DataConfig(DataOptions):
    """Settings of ``data``."""

    source: str = argument(_SOURCE)


@line.command(DataConfig)
def data(config: DataConfig, session: Session) -> Outcome:
    """Say what is in a source, what is missing in it, and how it would be divided."""
    import numpy as np

    del session
    found = _load(config.source, config, kind=config.kind, features=config.features)
    n, t, r = found.x.shape
    inside = np.arange(t) < found.lengths[:, None]
    notes = [f"{found.name}: {n:,} instances of up to {t} steps and {r} features; {found.kind}"]
    if found.classes:
        notes.append(f"classes: {', '.join(found.classes)}")
    notes += [f"{what}: {text}" for what, text in (("source", found.source), ("licence", found.licence)) if text]
    notes.append(f"lengths {int(found.lengths.min())} to {int(found.lengths.max())}; steps {', '.join(found.steps[:8])}"
                 f"{' ...' if t > 8 else ''}")  # fmt: skip
    notes.append(f"{'feature':28} {'unit':16} {'missing':>8} {'mean':>10} {'sd':>10}")
    for d, name in enumerate(found.features):
        values = found.x[:, :, d][inside].astype(np.float64)
        there = values[np.isfinite(values)]
        mean, spread = (there.mean(), there.std()) if len(there) else (math.nan, math.nan)
        gone = 1 - len(there) / max(len(values), 1)
        notes.append(f"{name[:28]:28} {found.units[d][:16]:16} {gone:>8.1%} {mean:>10.4g} {spread:>10.4g}")
    if found.y is None:
        return Outcome(notes=[*notes, "no labels: to predict or to annotate, not to train on"])
    split = _split(found, config, config.seed)
    parts = [(name, getattr(split, name)) for name in ("train", "validation", "audit", "test")]
    notes.append("; ".join(f"{name} {len(part):,}" for name, part in parts if part is not None))
    if split.planted:
        notes.append(f"a shortcut that does not hold in the test: {', '.join(split.planted)}")
    return Outcome(notes=notes)
