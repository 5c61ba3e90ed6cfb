"""The command line ``bayes-taml``. Everything that needs torch is imported when a command runs, so help is quick."""

from __future__ import annotations

import csv
import json
import math
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from shared_core.cli import CommandConfig, CommandLine, Outcome, Session, argument
from shared_core.errors import InputError, no_such
from shared_core.runs import Noted, Result, atomic_path, read_document, read_lines, read_summary, summarize, write_json

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping, Sequence

    from bayes_taml.data import AnyShotSource
    from bayes_taml.experiments import Cell, Protocol, Splits
    from bayes_taml.learner import Evaluation, MetaLearner
    from bayes_taml.metrics import SizeBin
    from bayes_taml.pictures import Labelled
    from shared_core.cli import Advance

line = CommandLine(
    "bayes-taml",
    help="Few-shot learners for tasks with any number of examples of each class (after Lee et al., 2020).",
)
main = line.main

_MODEL, _FACTS = "model.safetensors", "learner.json"
_SOURCE = "glyphs, omniglot, hershey, mini-imagenet, cifar-fs, a folder <class>/*.png, or an NPZ"
_SUPPORT = "labelled examples: folder <class>/*.png, or NPZ with x and y"
_SplitBy = Literal["class", "group", "official", "script"]
_Mode = Literal["mixed", "class", "task", "step"]
_MODES = (
    "class: each class its own number of shots; task: one number for all; mixed: either; step: half of the classes the"
    " most, the others the fewest"
)
_DRAWN_METRICS = ("accuracy", "negative log-likelihood", "calibration error")


class DataOptions(CommandConfig):
    """Which images, and how they are divided."""

    size: int = Field(14, ge=8, description="side of the images, pixels")
    split_by: _SplitBy | None = Field(
        None, description="how classes are divided into training, validation and test (default: each source's own)"
    )
    classes: int | None = Field(None, ge=2, description="keep only so many classes of each split")
    instances: int | None = Field(
        None,
        ge=2,
        description="keep at most so many images of a class; glyphs and hershey: draw so many (default: as needed)",
    )


class TaskOptions(DataOptions):
    """What a task is, and the network that learns it."""

    ways: int = Field(5, ge=2, description="classes of a task")
    low: int = Field(1, ge=1, description="fewest support images of a class")
    high: int = Field(10, ge=1, description="most support images of a class")
    queries: int = Field(5, ge=1, description="query images of each class in training")
    test_queries: int = Field(10, ge=1, description="query images of each class in tests")
    mode: _Mode = Field("mixed", description=_MODES)
    filters: int = Field(16, ge=1, description="filters of each block")
    blocks: int = Field(2, ge=1, description="convolutional blocks; each halves the size")
    init: Literal["tf", "kaiming"] = Field("kaiming", description="initial weights: as the authors' code, or kaiming")
    norm: Literal["batch", "support"] = Field(
        "batch", description="normalise queries by their own batch (transductive, as published) or by the support"
    )
    net_norm: Literal["batch", "film", "group"] = Field(
        "batch",
        description="normalisation layers: batch, with a shift; film, with a scale too, which z then acts on; group",
    )
    inner_lr: float = Field(0.1, gt=0, description="step size of adaptation, or the first value of a learned one")
    inner_steps: int = Field(3, ge=0, description="gradient steps of an adaptation in training")
    test_steps: int = Field(3, ge=0, description="gradient steps of an adaptation in tests")
    samples: int = Field(10, ge=1, description="samples of the balancing variables in tests")
    pooling: tuple[Literal["mean", "var", "n", "skew", "kurt"], ...] = Field(
        ("mean", "var", "n"), description="statistics of sets that the inference network sees"
    )
    deviation: float | None = Field(
        0.1, gt=0, description="where the deviations of the balancing variables start; the paper's is 0.69"
    )
    steps: int = Field(400, ge=0, description="meta-steps")
    meta_batch: int = Field(4, ge=1, description="tasks of a meta-step")
    outer_lr: float = Field(1e-2, gt=0, description="step size of Adam over tasks")
    episodes: int = Field(400, ge=1, description="test episodes")
    validate_every: int = Field(
        0, ge=0, description="meta-steps between judgements on validation classes, the best is kept (0: none)"
    )


def _protocol(config: TaskOptions, **more: Any) -> Protocol:
    from bayes_taml.experiments import Protocol

    if config.low > config.high:
        raise InputError(f"--low: must not be above --high, got {config.low} and {config.high}")
    names = ("ways", "queries", "test_queries", "mode", "size", "filters", "blocks", "init", "norm", "net_norm")
    names = (
        *names,
        "inner_lr",
        "inner_steps",
        "test_steps",
        "samples",
        "pooling",
        "deviation",
        "steps",
        "meta_batch",
        "outer_lr",
    )
    values: dict[str, Any] = {name: getattr(config, name) for name in (*names, "episodes", "validate_every")}
    values |= {"shots": (config.low, config.high), **more}
    return Protocol(**values)


def _splits(source: str, config: DataOptions, *, least: int = 20, others: Sequence[str] = ()) -> Splits:
    from bayes_taml.experiments import load_splits

    return load_splits(
        source, config.size, seed=config.seed, split_by=config.split_by, classes=config.classes,
        instances=config.instances, others=others, least=least,
    )  # fmt: skip


# ---- demo and compare


class DemoConfig(CommandConfig):
    """Settings of ``demo``."""

    steps: int = Field(100, ge=1, description="meta-steps of each method")
    methods: tuple[str, ...] = Field(("pixels", "metasgd", "deterministic-taml"), description="methods to compare")
    episodes: int = Field(100, ge=1, description="test episodes of each domain")
    inner_lr: float = Field(0.03, gt=0, description="first value of the learned step sizes of adaptation")
    outer_lr: float = Field(1e-2, gt=0, description="step size of Adam over tasks")
    inner_steps: int = Field(3, ge=1, description="gradient steps of an adaptation")
    samples: int = Field(5, ge=1, description="samples of the balancing variables in tests")


@line.command(DemoConfig, spread=True)
def demo(config: DemoConfig, session: Session) -> Outcome:
    """Learn characters from 1 to 10 examples of each, with and without balancing; then handwritten digits."""
    from bayes_taml.experiments import Protocol, compare, load_splits, paired

    protocol = Protocol(
        steps=config.steps, episodes=config.episodes, inner_lr=config.inner_lr, outer_lr=config.outer_lr,
        inner_steps=config.inner_steps, test_steps=config.inner_steps, samples=config.samples,
    )  # fmt: skip
    splits = load_splits("glyphs", protocol.size, others=("digits",), least=protocol.largest)
    with session.progress("demo", len(config.methods)) as advance:
        results, claims, cells = compare(
            session.run,
            splits,
            methods=config.methods,
            seeds=(config.seed,),
            protocol=protocol,
            modes=("class",),
            device=session.device,
            advance=lambda note, steps: advance(steps, note=note),
        )
    _pictures_of(session, results, cells)
    notes = [
        f"{splits.train.ways:,} printed characters to train on, {splits.test.ways} others to test on, and handwritten",
        "digits, which no training saw. A class has 1 to 10 examples. 'pixels' is the nearest class mean.",
        f"{config.steps} meta-steps here; the paper takes 50,000.",
    ]
    shown = [row for row in results if row.metric in (*_DRAWN_METRICS, "accuracy at 1-3 shots")]
    ours = "bayesian-taml" if "bayesian-taml" in config.methods else config.methods[-1]
    return Outcome(shown, claims or paired(cells, ours), notes)


def _pictures_of(session: Session, results: Sequence[Result], cells: Mapping[str, Mapping[int, Cell]]) -> None:
    from bayes_taml.experiments import pooled_bins
    from bayes_taml.plots import plot_comparison, plot_sizes

    plot_comparison(session.run.artifact("comparison.png"), [r for r in results if r.metric in _DRAWN_METRICS])
    first = results[0].dataset
    bins = {name: pooled_bins(cell["tests"][first] for cell in by_seed.values()) for name, by_seed in cells.items()}
    if any(bins.values()):
        reference = "metasgd" if bins.get("metasgd") else None
        plot_sizes(session.run.artifact("sizes.png"), bins, reference=reference)


class CompareConfig(TaskOptions):
    """Settings of ``compare``."""

    data: str = argument(_SOURCE, "glyphs")
    others: tuple[str, ...] = Field(
        (), description="other domains to test on: mnist, digits, cifar-10, svhn, hershey, far, folders or NPZ files"
    )
    methods: tuple[str, ...] = Field(
        ("pixels", "protonet", "maml", "metasgd", "metasgd-inverse", "omega-taml", "bayesian-taml"),
        description="methods; an unknown name lists them all",
    )
    modes: tuple[_Mode, ...] = Field((), description="how shots differ in tests, as --mode; several are tested apart")
    seeds: int = Field(3, ge=1, description="trainings of each method")
    tune: bool = Field(False, description="choose settings on validation classes, as many trials for every method")
    trials: int = Field(3, ge=1, description="settings to try for each method")


@line.command(CompareConfig, spread=True)
def compare(config: CompareConfig, session: Session) -> Outcome:
    """Train methods alike and test them on the same episodes: classes that none of them saw, and other domains."""
    from bayes_taml import experiments
    from bayes_taml.plots import plot_reliability

    protocol = _protocol(config, trials=config.trials)
    splits = _splits(config.data, config, least=protocol.largest, others=config.others)
    seeds = range(config.seed, config.seed + config.seeds)
    with session.progress("compare", config.seeds * len(config.methods)) as advance:
        results, claims, cells = experiments.compare(
            session.run,
            splits,
            methods=config.methods,
            seeds=seeds,
            protocol=protocol,
            tuned=config.tune,
            modes=config.modes,
            device=session.device,
            advance=lambda note, steps: advance(steps, note=note),
        )
    _pictures_of(session, results, cells)
    first = results[0].dataset
    curves: dict[str, Any] = {
        name: experiments.pooled_answers((cell["tests"][first] for cell in by_seed.values()), protocol.ways)
        for name, by_seed in cells.items()
        if name != experiments.PIXELS
    }
    if curves:
        plot_reliability(session.run.artifact("reliability.png"), curves)
    write_json(session.run.artifact("cells.json"), {m: {str(s): c for s, c in by.items()} for m, by in cells.items()})
    notes = [f"sizes.png and reliability.png are of {first}"]
    for name, by_seed in cells.items():
        if by_seed[config.seed]["setting"]:
            notes.append(f"chosen on validation classes: {name}: {by_seed[config.seed]['setting']}")
        stopped = sum(a["diverged"] for cell in by_seed.values() for a in cell["tests"].values())
        held = sum(a["held"] for cell in by_seed.values() for a in cell["tests"].values())
        if stopped or held:
            notes.append(f"{name}: {stopped} adaptations stopped early, {held} step multipliers were held")
    return Outcome(results, claims, notes)


# ---- one learner


class TrainConfig(TaskOptions):
    """Settings of ``train``."""

    data: str = argument(_SOURCE)
    method: str = Field("bayesian-taml", description="a method; an unknown name lists them all")
    rows: int | None = Field(None, ge=1, description="support images to compute together at most, to save memory")
    recompute: bool = Field(False, description="keep no activations of inner steps: less memory, more time")


@line.command(TrainConfig)
def train(config: TrainConfig, session: Session) -> Outcome:
    """Train a learner over tasks; what it leaves adapts to new tasks."""
    from bayes_taml import experiments
    from bayes_taml.plots import plot_history

    protocol = _protocol(config)
    splits = _splits(config.data, config, least=protocol.largest)
    more: dict[str, Any] = {} if config.rows is None else {"rows": config.rows}
    learner = experiments.make_learner(
        config.method, protocol, splits.channels, seed=config.seed, device=session.device, recompute=config.recompute,
        **more,
    )  # fmt: skip
    # What cannot be trained on is said at once.
    experiments.source_of(splits.train, protocol, seed=config.seed)
    judge, notes = None, list[str]()
    try:
        judge = experiments.source_of(splits.validation, protocol, seed=config.seed + 1, test=True)
    except InputError as error:
        if config.validate_every:
            raise
        notes.append(f"no validation, the accuracy is of training classes ({error})")
        session.say(notes[0])
    state = session.run.load_checkpoint()
    done = 0 if state is None else int(state["step"])
    with session.progress("train", config.steps, done) as advance:

        def after(step: Any) -> None:
            session.run.log(step=float(step.step), loss=step.loss, accuracy=step.accuracy, kl=step.kl)
            advance(1, note=f"query loss {step.loss:.3f}, accuracy {step.accuracy:.3f}")

        def judged(step: int, accuracy: float) -> None:
            session.run.log(step=float(step), validation=accuracy)

        history = experiments.train(
            learner,
            splits.train,
            protocol,
            seed=config.seed,
            validation=splits.validation,
            on_step=after,
            on_validation=judged,
            resume=state,
            on_state=session.run.save_checkpoint,
            world=session.world,
        )
    learner.save(session.run.artifact(_MODEL), network=protocol.network(splits.channels, config.seed))
    facts = _Facts(
        data=config.data if not Path(config.data).exists() else str(Path(config.data).resolve()),
        mean=splits.train.mean,
        channels=splits.channels,
        **{name: getattr(config, name) for name in _Facts.model_fields.keys() - {"data", "mean", "channels"}},
    )
    write_json(session.run.artifact(_FACTS), facts.model_dump())
    if history:
        plot_history(session.run.artifact("history.png"), {config.method: history})
    kind = "training" if judge is None else "validation"
    judge = judge or experiments.source_of(splits.train, protocol, seed=config.seed + 1, test=True)
    found = learner.evaluate(judge, tasks=min(config.episodes, 200))
    row = summarize(
        [100 * found.mean], dataset=f"{splits.train.name}, {kind} classes", method=config.method,
        metric="accuracy", unit="%", better="higher",
    )  # fmt: skip
    if len(found.accuracy) > 1:
        notes.append(f"± {100 * found.half_width:.2f} over {len(found.accuracy)} episodes")
    if learner.skipped:
        notes.append(f"{learner.skipped} meta-steps were not finite and were skipped")
    return Outcome([row], notes=notes)


class _Facts(BaseModel):
    """What a training leaves beside its learner: all that tests of it ask for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: str
    mean: float
    channels: int = Field(ge=1, le=1024)
    size: int = Field(ge=1, le=4096)
    ways: int = Field(ge=2, le=100_000)
    low: int = Field(ge=1, le=100_000)
    high: int = Field(ge=1, le=100_000)
    queries: int = Field(ge=1, le=100_000)
    test_queries: int = Field(ge=1, le=100_000)
    mode: _Mode
    norm: Literal["batch", "support"]
    split_by: _SplitBy | None
    classes: int | None = Field(ge=1)
    instances: int | None = Field(ge=1)
    seed: int


class _Line(BaseModel):
    """What a training notes of a meta-step; lines of validation have other values."""

    step: int
    loss: Noted = math.nan
    accuracy: Noted = math.nan
    kl: Noted = math.nan


def _open(run: Path) -> tuple[MetaLearner, _Facts]:
    from bayes_taml.learner import MetaLearner

    for name in (_MODEL, _FACTS):
        if not (run / name).exists():
            raise InputError(f"{run}: has no {name}; give the run folder of 'bayes-taml train'")
    return MetaLearner.load(run / _MODEL), read_document(run / _FACTS, _Facts, "what 'bayes-taml train' writes")


def _counting(advance: Advance) -> Callable[[int], None]:
    """Tell a progress bar of counts that are sums."""
    done = 0

    def after(count: int) -> None:
        nonlocal done
        advance(count - done)
        done = count

    return after


@contextmanager
def _noting(notes: list[str]) -> Generator[None]:
    """Turn warnings about the data into notes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    notes += dict.fromkeys(str(warning.message) for warning in caught)


class EvaluateConfig(CommandConfig):
    """Settings of ``evaluate``."""

    run: Path = argument("run folder of train")
    data: str | None = Field(
        None, description="what train takes, mnist, digits, cifar-10, svhn or far (default: what it was trained on)"
    )
    split: Literal["train", "validation", "test", "all"] = Field("test", description="classes to test on")
    split_by: _SplitBy | None = Field(None, description="how classes are divided")
    mode: _Mode | None = Field(None, description=f"{_MODES} (default: as trained)")
    ways: int | None = Field(None, ge=2, description="classes of a task (default: as trained)")
    low: int | None = Field(None, ge=1, description="fewest support images of a class (default: as trained)")
    high: int | None = Field(None, ge=1, description="most support images of a class (default: as trained)")
    queries: int | None = Field(None, ge=1, description="query images of each class (default: as in training's tests)")
    instances: int | None = Field(None, ge=2, description="keep, or draw, so many images of a class")
    episodes: int = Field(1000, ge=1, description="test episodes")
    samples: int | None = Field(
        None, ge=0, description="samples of the balancing variables, 0 for their means (default: as trained)"
    )
    test_steps: int | None = Field(None, ge=0, description="gradient steps of an adaptation (default: as trained)")
    counts: tuple[int, ...] = Field((), description="test also on tasks with so many images of every class")


def _test_images(config: Any, facts: _Facts, least: int) -> Any:
    from bayes_taml.data import load_classes
    from bayes_taml.experiments import FAR, instances_for

    own = config.data is None
    source = facts.data if own else config.data
    far = source == FAR
    needed = instances_for(source, config.instances or (facts.instances if own else None), least)
    return load_classes(
        "hershey" if far else source,
        split=config.split,
        size=facts.size,
        seed=facts.seed,
        split_by="script" if far else config.split_by or (facts.split_by if own else None),
        classes=facts.classes if own else None,
        instances=needed,
        channels=facts.channels if facts.channels in (1, 3) else None,
    )


@line.command(EvaluateConfig)
def evaluate(config: EvaluateConfig, session: Session) -> Outcome:
    """Adapt to test episodes and measure the answers: how right, how sure, for which sizes of classes and of tasks."""
    from bayes_taml import experiments, plots
    from bayes_taml.data import AnyShotSource
    from bayes_taml.metrics import accuracy_by_size

    learner, facts = _open(config.run)
    learner.to(session.device)
    ways, low, high = (getattr(config, name) or getattr(facts, name) for name in ("ways", "low", "high"))
    if low > high:
        raise InputError(f"--low: must not be above --high, got {low} and {high}")
    queries, mode = config.queries or facts.test_queries, config.mode or facts.mode
    images = _test_images(config, facts, max((high, *config.counts)) + queries)
    source = AnyShotSource(images, ways, (low, high), queries, mode=mode, seed=config.seed + 1)
    protocol = experiments.Protocol(ways=ways, shots=(low, high), test_queries=queries, episodes=config.episodes)
    sources = {count: experiments.balanced(images, protocol, count, seed=config.seed + 1) for count in config.counts}
    how: dict[str, Any] = {"samples": config.samples, "steps": config.test_steps, "seed": config.seed}
    notes: list[str] = []
    with session.progress("evaluate", config.episodes * (1 + len(sources))) as advance, _noting(notes):
        found = learner.evaluate(source, tasks=config.episodes, on_batch=_counting(advance), **how)
        by_count = {
            count: learner.evaluate(each, tasks=config.episodes, on_batch=_counting(advance), **how)
            for count, each in sources.items()
        }
    dataset, method = f"{images.name} ({mode} {low}-{high} shots)", learner.method_name
    results = [
        _over(100 * found.accuracy, dataset, method, "accuracy"),
        _over(found.loss, dataset, method, "negative log-likelihood", unit="nats", better="lower"),
        summarize([found.calibration_error], dataset=dataset, method=method, metric="calibration error",
                  better="lower"),
    ]  # fmt: skip
    rows, edges = found.rows(), experiments.size_edges((low, high))
    by_class = accuracy_by_size(rows["right"], rows["class_size"], edges, rows["task"])
    results += [_of_bin(b, dataset, method, f"accuracy at {_span(b)} shots") for b in by_class]
    for b in accuracy_by_size(rows["right"], rows["task_size"], tuple(ways * e for e in edges), rows["task"]):
        results.append(_of_bin(b, dataset, method, f"accuracy in tasks of {_span(b)} images"))
    for count, each in by_count.items():
        name = f"{images.name} ({count} shots of every class)"
        results.append(_over(100 * each.accuracy, name, method, "accuracy"))
    if by_class:
        plots.plot_sizes(session.run.artifact("sizes.png"), {method: by_class})
    answers = found.probability[found.mask], found.labels[found.mask]
    plots.plot_reliability(session.run.artifact("reliability.png"), {method: answers})
    _draw_balance(learner, source, session.run.artifact, min(config.episodes, 200))
    notes += _stops({"": found, **{f" at {count} shots": each for count, each in by_count.items()}})
    write_json(session.run.artifact("protocol.json"), found.protocol)
    return Outcome(results, notes=[f"protocol: {json.dumps(found.protocol)}", *notes])


def _stops(found: Mapping[str, Evaluation]) -> list[str]:
    return [
        f"{each.diverged} adaptations{where} stopped early, {each.held} step multipliers were held within 1/100 and 100"
        for where, each in found.items()
        if each.diverged or each.held
    ]


def _span(found: SizeBin) -> str:
    return f"{found.low}" if found.low == found.high else f"{found.low}-{found.high}"


def _of_bin(found: SizeBin, dataset: str, method: str, metric: str) -> Result:
    return _result(100 * found.mean, 100 * found.half, found.n, dataset, method, metric, "%", "higher")


def _over(
    values: Any,
    dataset: str,
    method: str,
    metric: str,
    *,
    unit: str = "%",
    better: Literal["lower", "higher"] = "higher",
) -> Result:
    """Mean over episodes with its 95 % interval, 1.96 standard errors as in the authors' code."""
    from bayes_taml.metrics import interval

    mean, half = interval(values)
    return _result(mean, half, len(values), dataset, method, metric, unit, better)


def _result(
    mean: float,
    half: float,
    n: int,
    dataset: str,
    method: str,
    metric: str,
    unit: str,
    better: Literal["lower", "higher"],
) -> Result:
    known = not math.isnan(half)
    return Result(
        dataset=dataset, method=method, metric=metric, unit=unit, better=better, mean=mean,
        low=mean - half if known else None, high=mean + half if known else None, n=n, seconds=0.0,
    )  # fmt: skip


def _draw_balance(learner: MetaLearner, source: AnyShotSource, place: Callable[[str], Path], tasks: int) -> list[Path]:
    """Draw class weights over class sizes and step multipliers over task sizes, of what the method infers."""
    from bayes_taml.explanation import balance_table
    from bayes_taml.plots import plot_gamma, plot_omega

    drawn: list[Path] = []
    if learner.inference is None:
        return drawn
    table = balance_table(learner, source, tasks=tasks)
    if "omega" in learner.method.balance:
        drawn.append(place("balance-omega.png"))
        plot_omega(drawn[-1], table["count"], table["omega"], source.ways)
    if "gamma" in learner.method.balance:
        drawn.append(place("balance-gamma.png"))
        plot_gamma(drawn[-1], table["size"], table["gamma"], (*learner.model.layers, "head"))
    return drawn


class SupportOptions(CommandConfig):
    """A learner and a labelled data set."""

    run: Path = argument("run folder of train")
    support: Path = argument(_SUPPORT)


def _support(config: Any, facts: _Facts, invert: str = "auto") -> Labelled:
    from bayes_taml.pictures import read_support

    how: Any = {"auto": "auto", "yes": True, "no": False}[invert]
    return read_support(config.support, facts.size, facts.channels, invert=how, training_mean=facts.mean)


class AdaptConfig(SupportOptions):
    """Settings of ``adapt``."""

    query: Path = argument("what to classify: folder of pictures, or NPZ with x (and y, to count right answers)")
    output: Path | None = Field(None, description="CSV to write (default: predictions.csv in the run folder)")
    samples: int | None = Field(
        None, ge=0, description="samples of the balancing variables, 0 for their means (default: as trained)"
    )
    test_steps: int | None = Field(None, ge=0, description="gradient steps of the adaptation (default: as trained)")
    invert: Literal["auto", "yes", "no"] = Field(
        "auto", description="exchange light and dark; auto: as the training's images, never in NPZ files"
    )
    favour: tuple[str, ...] = Field(
        (), description="class weights to multiply, such as owl=2, for costs or for shares where the model will be used"
    )


def _factors(given: Sequence[str], classes: Sequence[Any]) -> dict[Any, float] | None:
    """Read ``owl=2`` as factors by label."""
    labels = {str(name): name for name in classes}
    found: dict[Any, float] = {}
    for text in given:
        name, _, value = text.rpartition("=")
        try:
            factor = float(value)
        except ValueError:
            factor = 0.0
        if not 0 < factor < float("inf"):
            raise InputError(f"--favour: '{text}' is no CLASS=FACTOR with a factor > 0, such as owl=2")
        if name not in labels:
            raise InputError(f"--favour: no class '{name}' in the support; there are {', '.join(labels)}")
        found[labels[name]] = factor
    return found or None


@line.command(AdaptConfig)
def adapt(config: AdaptConfig, session: Session) -> Outcome:
    """Adapt to labelled examples, as many of each class as there are, and say what other pictures are."""
    import numpy as np

    from bayes_taml.explanation import explain as explained
    from bayes_taml.pictures import read_query

    learner, facts = _open(config.run)
    learner.to(session.device)
    known = _support(config, facts, config.invert)
    asked = read_query(config.query, facts.size, facts.channels, known)
    notes = [*known.notes, *asked.notes]
    assert known.labels is not None
    with _noting(notes):
        task = learner.adapt(
            known.images,
            known.labels,
            steps=config.test_steps,
            samples=config.samples,
            class_weight=_factors(config.favour, np.unique(known.labels).tolist()),
            seed=config.seed,
        )
        probability, spread = task.predict_proba(asked.images), task.spread(asked.images)
    path = config.output or session.run.artifact("predictions.csv")
    names = [str(name) for name in task.classes_.tolist()]
    best = probability.argmax(1)
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["file", "class", "probability", "spread", *(f"p({name})" for name in names)])
        for file, k, p, s in zip(asked.files, best.tolist(), probability, spread, strict=True):
            writer.writerow([file, names[k], f"{p[k]:.4f}", f"{s[k]:.4f}", *(f"{v:.4f}" for v in p)])
    counts = ", ".join(f"{name} {int((best == k).sum())}" for k, name in enumerate(names))
    notes.append(f"wrote {path}: {len(asked.files)} pictures; {counts}")
    if learner.method.algorithm == "maml":
        made = explained(learner, known.images, known.labels, steps=config.test_steps, seed=config.seed)
        write_json(session.run.artifact("explanation.json"), made.record())
    if facts.norm == "batch" and len(asked.files) < len(names):
        notes.append(
            "few pictures: they are normalised by their own batch; a learner trained with --norm support is not"
        )
    results: list[Result] = []
    if asked.labels is not None:
        right = float((task.classes_[best] == asked.labels).mean())
        results.append(
            summarize([100 * right], dataset=config.query.stem, method=learner.method_name, metric="accuracy", unit="%",
                      better="higher")
        )  # fmt: skip
    return Outcome(results, notes=notes)


class ExplainConfig(SupportOptions):
    """Settings of ``explain``."""

    label: str | None = Field(None, description="class whose number of examples to change in thought")
    counts: tuple[int, ...] = Field((1, 5, 20), description="numbers of examples of that class to think of")
    test_steps: int | None = Field(None, ge=0, description="gradient steps of the adaptation (default: as trained)")
    invert: Literal["auto", "yes", "no"] = Field("auto", description="exchange light and dark")


@line.command(ExplainConfig)
def explain(config: ExplainConfig, session: Session) -> Outcome:
    """Say what the learner decides about a data set: weights of classes, steps of layers, and what came of them."""
    from bayes_taml import plots
    from bayes_taml.explanation import counterfactual
    from bayes_taml.explanation import explain as explained

    learner, facts = _open(config.run)
    learner.to(session.device)
    if any(count < 1 for count in config.counts):
        raise InputError(f"--counts: must be 1 or more, got {min(config.counts)}")
    known = _support(config, facts, config.invert)
    notes, labels = list(known.notes), known.labels
    assert labels is not None
    with _noting(notes):
        found = explained(learner, known.images, labels, steps=config.test_steps, seed=config.seed)
        record = found.record()
        notes += found.text().splitlines()
        if config.label is not None:
            place = found.class_names.index(config.label) if config.label in found.class_names else 0
            for other in counterfactual(learner, known.images, labels, config.label, config.counts):
                record.setdefault("counterfactual", []).append(
                    {"label": config.label, "count": other.count, "omega": other.omega.tolist(),
                     "gamma": other.gamma.tolist()}
                )  # fmt: skip
                steps = ", ".join(f"{k} {g:.2f}" for k, g in zip(found.layers, other.gamma.tolist(), strict=True))
                notes.append(
                    f"with {other.count} examples of {config.label}: its weight {other.omega[place]:.3f}, steps {steps}"
                )
    write_json(session.run.artifact("explanation.json"), record)
    plots.plot_explanation(session.run.artifact("explanation.png"), found)
    return Outcome(notes=notes)


class PlotConfig(CommandConfig):
    """Settings of ``plot``."""

    run: Path = argument("run folder of train or compare, or a summary.json")
    kind: Literal["auto", "history", "comparison", "sizes", "balance"] = Field(
        "auto", description="what to draw; auto is the history of a training and the comparison of anything else"
    )
    methods: tuple[str, ...] = Field((), description="of a comparison, draw only these methods (default: all)")
    output: Path | None = Field(
        None, description="PNG, SVG or PDF to write (default: in the run folder of plot); of balance two, by its name"
    )


@line.command(PlotConfig)
def plot(config: PlotConfig, session: Session) -> Outcome:
    """Draw learning curves, a comparison, or class weights and step multipliers over the sizes of tasks."""
    from bayes_taml import plots

    trained = config.run.is_dir() and (config.run / _MODEL).exists()
    kind = config.kind if config.kind != "auto" else ("history" if trained else "comparison")
    path = config.output or session.run.artifact(f"{kind}.png")
    if kind == "comparison":
        rows = [row for row in read_summary(config.run).results if row.metric in _DRAWN_METRICS]
        shown = [row for row in rows if not config.methods or row.method in config.methods]
        plots.plot_comparison(path, shown)
        return Outcome(notes=[f"wrote {path}"])
    if kind == "sizes":
        _draw_sizes(config.run, config.methods, path)
        return Outcome(notes=[f"wrote {path}"])
    learner, facts = _open(config.run)
    if kind == "history":
        plots.plot_history(path, {learner.method_name: _history(config.run)})
        return Outcome(notes=[f"wrote {path}"])
    from bayes_taml.data import AnyShotSource

    if learner.inference is None:
        raise InputError(f"{config.run}: method '{learner.method_name}' infers nothing; there is no balance to draw")
    asked = EvaluateConfig.model_validate({"run": config.run})
    images = _test_images(asked, facts, facts.high + facts.test_queries)
    source = AnyShotSource(
        images, facts.ways, (facts.low, facts.high), facts.test_queries, mode=facts.mode,
        seed=config.seed + 1,
    )  # fmt: skip

    def place(name: str) -> Path:
        output = config.output
        if output is None:
            return session.run.artifact(name)
        return output.with_name(f"{output.stem}-{Path(name).stem.partition('-')[2]}{output.suffix}")

    return Outcome(notes=[f"wrote {drawn}" for drawn in _draw_balance(learner, source, place, 200)])


def _draw_sizes(run: Path, methods: Sequence[str], path: Path) -> None:
    """Accuracy by class size from the cells that ``compare`` left."""
    from bayes_taml.experiments import pooled_bins
    from bayes_taml.plots import plot_sizes

    kept = run / "cells.json"
    if not kept.exists():
        raise InputError(f"{run}: has no cells.json; give the run folder of 'bayes-taml compare'")
    try:
        cells: dict[str, dict[str, Any]] = json.loads(kept.read_text(encoding="utf-8"))
        first = next(iter(next(iter(next(iter(cells.values())).values()))["tests"]))
        bins = {m: pooled_bins(cell["tests"][first] for cell in by.values()) for m, by in cells.items()}
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration, RecursionError) as error:
        raise InputError(f"{kept}: is not what compare writes ({error!r})") from error
    if unknown := [name for name in methods if name not in bins]:
        raise no_such("method", unknown[0], bins, where=str(run))
    shown = {name: bins[name] for name in methods or bins if bins[name]}
    plot_sizes(path, shown, reference="metasgd" if "metasgd" in shown else None)


def _history(run: Path) -> list[Any]:
    from bayes_taml.learner import Step

    lines = read_lines(run / "metrics.jsonl", _Line, "a training's history")
    lines = [line for line in lines if "loss" in line.model_fields_set]
    return [Step(line.step, len(lines), line.loss, line.accuracy, line.kl, 0) for line in lines]


class ExportConfig(SupportOptions):
    """Settings of ``export``."""

    output: Path | None = Field(None, description="ONNX file to write (default: in the run folder of export)")
    samples: int | None = Field(
        None, ge=0, description="samples of the balancing variables, a network each; 0 for their means (as trained)"
    )
    test_steps: int | None = Field(None, ge=0, description="gradient steps of the adaptation (default: as trained)")


@line.command(ExportConfig)
def export(config: ExportConfig, session: Session) -> Outcome:
    """Adapt to labelled examples and write the adapted model to an ONNX file: images in, log-probabilities out."""
    from bayes_taml.export import export_onnx

    learner, facts = _open(config.run)
    known = _support(config, facts)
    notes = list(known.notes)
    assert known.labels is not None
    with _noting(notes):
        task = learner.adapt(
            known.images, known.labels, steps=config.test_steps, samples=config.samples, seed=config.seed
        )
    path = config.output or session.run.artifact("model.onnx")
    export_onnx(task, path, support=known.images)
    shape = f"(n, {facts.channels}, {facts.size}, {facts.size})"
    notes.append(f"wrote {path}: images {shape} -> log-probabilities of {', '.join(map(str, task.classes_.tolist()))}")
    if known.inverted:
        notes.append("light and dark were exchanged: do so with the images that you ask it, too (1 - x)")
    if facts.norm == "batch":
        notes.append("trained to normalise queries by their own batch; the file normalises by the support instead")
    return Outcome(notes=notes)


class DataConfig(DataOptions):
    """Settings of ``data``."""

    source: str = argument(f"{_SOURCE}; or mnist, digits, cifar-10, svhn")
    queries: int = Field(5, ge=1, description="query images of each class that tasks are to have")


@line.command(DataConfig)
def data(config: DataConfig, session: Session) -> Outcome:
    """Say how a source is divided, and how many classes are large enough for tasks of several sizes."""
    from bayes_taml.data import load_classes
    from shared_core.classes import OTHER_DOMAINS

    del session
    notes: list[str] = []
    if config.source.lower().replace("_", "-") in OTHER_DOMAINS and config.source.lower() != "hershey":
        images = load_classes(
            config.source, split="test", size=config.size, seed=config.seed, split_by=config.split_by,
            classes=config.classes, instances=config.instances,
        )  # fmt: skip
        parts = [("test", images)]
        notes.append(f"{config.source} has the same classes in every split: to test on (others, evaluate --data)")
    else:
        try:
            splits = _splits(config.source, config)
            parts = [("train", splits.train), ("validation", splits.validation), ("test", splits.test)]
        except InputError as error:
            # What can be read but not divided is a data set to adapt to; what cannot be read fails here again.
            whole = load_classes(
                config.source, split="all", size=config.size, seed=config.seed, instances=config.instances
            )
            parts = [("all", whole)]
            notes += [f"one data set to adapt to or explain, not one to train on ({error}):"]
            notes += [f"  {name}: {n} images" for name, n in zip(whole.class_names, whole.counts, strict=True)]
    shots = (1, 2, 5, 10, 20, 50)
    channels, height, width = parts[0][1].shape
    heading = f"images of {channels} x {height} x {width}; ways possible with {config.queries} queries and shots of"
    notes.append(f"{'':12}{'classes':>8}{'images':>9}{'of each':>12}   {heading} {', '.join(map(str, shots))}")
    for kind, part in parts:
        counts = part.counts
        each = f"{int(counts.min())}-{int(counts.max())}"
        ways = ", ".join(str(int((counts >= shot + config.queries).sum())) for shot in shots)
        notes.append(f"{kind:12}{part.ways:>8,}{len(part):>9,}{each:>12}   {ways}")
    if config.source.lower() in ("glyphs", "hershey"):
        notes.append(f"{config.source} is drawn: as many images of each class as --instances asks for")
    return Outcome(notes=[*notes, *([parts[0][1].notes] if parts[0][1].notes else [])])
