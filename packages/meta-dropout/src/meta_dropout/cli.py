"""The command line ``meta-dropout``. Everything that needs torch is imported when a command runs, so help is quick."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from shared_core.cli import CommandConfig, CommandLine, Outcome, Session, argument
from shared_core.errors import InputError
from shared_core.runs import (
    Noted,
    Result,
    Run,
    atomic_path,
    read_document,
    read_lines,
    read_summary,
    summarize,
    write_json,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from meta_dropout.experiments import Protocol, Splits
    from meta_dropout.learner import MetaLearner
    from shared_core.cli import Advance

line = CommandLine(
    "meta-dropout",
    help="Few-shot learners that learn how to perturb features so that they generalise (after Lee et al., 2020).",
)
main = line.main

_MODEL, _FACTS = "model.safetensors", "learner.json"
_SplitBy = Literal["class", "group", "official", "script"]
_SOURCE = "glyphs, omniglot, mini-imagenet, cifar-fs, a folder <class>/*.png, or an NPZ"


class DataOptions(CommandConfig):
    """Which images, and how they are divided."""

    size: int = Field(20, ge=8, description="side of the images, pixels")
    split_by: _SplitBy | None = Field(
        None, description="how classes are divided into training, validation and test (default: each source's own)"
    )
    classes: int | None = Field(None, ge=2, description="keep only so many classes of each split")
    rotations: bool = Field(False, description="add training classes turned by 90, 180 and 270 degrees")


class TaskOptions(DataOptions):
    """What a task is, and the network that learns it."""

    ways: int = Field(5, ge=2, description="classes of a task")
    shots: int = Field(1, ge=1, description="support images of each class")
    queries: int = Field(15, ge=1, description="query images of each class")
    disjoint: bool = Field(False, description="take queries from other typefaces (or folders) than the support")
    filters: int = Field(16, ge=1, description="filters of each block")
    blocks: int = Field(4, ge=1, description="convolutional blocks; each halves the size")
    init: Literal["tf", "kaiming"] = Field("tf", description="initial weights: as the authors' code, or kaiming")
    norm: Literal["batch", "support"] = Field(
        "batch", description="normalise queries by their own batch (transductive, as published) or by the support"
    )
    inner_steps: int = Field(3, ge=0, description="gradient steps of an adaptation")
    inner_lr: float = Field(0.1, gt=0, description="their step size")
    samples: int = Field(10, ge=1, description="noise samples in each of them at test time")
    steps: int = Field(1500, ge=0, description="meta-steps")
    meta_batch: int = Field(4, ge=1, description="tasks of a meta-step")
    outer_lr: float = Field(1e-3, gt=0, description="step size of Adam over tasks")
    episodes: int = Field(400, ge=1, description="test episodes")


def _protocol(config: TaskOptions, **more: Any) -> Protocol:
    from meta_dropout.experiments import Protocol

    names = (
        "ways",
        "shots",
        "queries",
        "disjoint",
        "size",
        "filters",
        "blocks",
        "init",
        "norm",
        "inner_steps",
        "inner_lr",
    )
    names = (*names, "samples", "steps", "meta_batch", "outer_lr", "episodes")
    values: dict[str, Any] = {name: getattr(config, name) for name in names}
    values = {**values, "test_queries": config.queries, **more}
    return Protocol(**values)


def _splits(source: str, config: DataOptions) -> Splits:
    from meta_dropout.experiments import load_splits

    more: dict[str, Any] = {}
    if config.split_by is not None:
        more["split_by"] = config.split_by
    if config.classes is not None:
        more["classes"] = config.classes
    if config.rotations:
        more["rotations"] = True
    return load_splits(source, config.size, seed=config.seed, **more)


# ---- demo and compare


class DemoConfig(CommandConfig):
    """Settings of ``demo``."""

    steps: int = Field(180, ge=1, description="meta-steps of each method")
    methods: tuple[str, ...] = Field(("pixels", "maml", "meta-dropout"), description="methods to compare")
    episodes: int = Field(200, ge=1, description="test episodes")


@line.command(DemoConfig, spread=True)
def demo(config: DemoConfig, session: Session) -> Outcome:
    """Learn to tell characters apart from one example of each, with and without learned noise (under a minute)."""
    from meta_dropout.experiments import Protocol, compare, load_splits

    protocol = Protocol(
        size=14, blocks=3, queries=5, test_queries=5, init="kaiming", inner_steps=2, outer_lr=5e-3,
        steps=config.steps, episodes=config.episodes,
    )  # fmt: skip
    splits = load_splits("glyphs", protocol.size, seed=0)
    with session.progress("demo", len(config.methods)) as advance:
        results, claims, _ = compare(
            session.run,
            splits,
            methods=config.methods,
            seeds=(config.seed,),
            protocol=protocol,
            device=session.device,
            advance=lambda note, steps: advance(steps, note=note),
        )
    notes = [
        f"{splits.train.ways:,} characters to train on, {splits.test.ways} others to test on, drawn in 16 typefaces;",
        f"'pixels' is the nearest class mean. {config.steps} meta-steps here; the paper takes 60,000, and is then",
        "ahead of MAML.",
    ]
    return Outcome(_with_picture(session, results), claims, notes)


def _with_picture(session: Session, results: list[Result]) -> list[Result]:
    from meta_dropout.plots import plot_comparison

    shown = [row for row in results if row.metric != "meta-step"]
    plot_comparison(session.run.artifact("comparison.png"), shown)
    return results


class CompareConfig(TaskOptions):
    """Settings of ``compare``."""

    data: str = argument(_SOURCE, "glyphs")
    methods: tuple[str, ...] = Field(
        ("pixels", "protonet", "maml", "deterministic", "fixed", "meta-dropout"),
        description="methods; an unknown name lists them all",
    )
    seeds: int = Field(3, ge=1, description="trainings of each method")
    tune: bool = Field(False, description="choose settings on validation classes, as many trials for every method")
    trials: int = Field(3, ge=1, description="settings to try for each method")
    test_queries: int | None = Field(None, ge=1, description="query images of each class in test tasks (as --queries)")
    attack: tuple[Literal["l1", "l2", "linf"], ...] = Field((), description="attack test queries too, in these norms")
    radii: tuple[float, ...] = Field((), description="radii of the attack, for one norm (default: as in the paper)")
    attack_episodes: int = Field(50, ge=1, description="test episodes to attack")
    attack_steps: int = Field(20, ge=1, description="steps of the attack")


_RADII = {"l1": (20.0, 40.0, 60.0, 80.0, 100.0), "l2": (1.0, 2.0, 3.0, 4.0, 5.0), "linf": (0.02, 0.04, 0.06, 0.08, 0.1)}


def _radii(norm: str, size: int) -> tuple[float, ...]:
    """Radii of the paper's figure, which are for 28 x 28 pixels, for as much change of each pixel at another size."""
    power = {"l1": 2, "l2": 1, "linf": 0}[norm]
    return tuple(round(radius * (size / 28) ** power, 3) for radius in _RADII[norm])


@line.command(CompareConfig, spread=True)
def compare(config: CompareConfig, session: Session) -> Outcome:
    """Train methods alike and test them on the same episodes of classes that none of them saw."""
    import numpy as np
    import torch

    from meta_dropout import experiments
    from meta_dropout.attacks import RobustnessCurve
    from meta_dropout.plots import plot_robustness

    if config.radii and len(config.attack) > 1:
        raise InputError("radii: they are for one norm; leave them out, or name one norm in --attack")
    protocol = _protocol(config, trials=config.trials, test_queries=config.test_queries or config.queries)
    splits = _splits(config.data, config)
    radii = {norm: config.radii or _radii(norm, config.size) for norm in config.attack}

    def attack(run: Run, name: str, seed: int, learner: MetaLearner, history: Any) -> None:
        del history
        source = experiments.source_of(splits.test, protocol, seed=seed + 1, test=True)
        for norm in config.attack:
            found = experiments.robustness(
                learner, source, norm, radii[norm], episodes=config.attack_episodes, steps=config.attack_steps,
                seed=seed,
            )  # fmt: skip
            run.once(f"attack/{norm}/{name}/{seed}", found.tolist)

    seeds = range(config.seed, config.seed + config.seeds)
    with session.progress("compare", config.seeds * len(config.methods)) as advance:
        results, claims, cells = experiments.compare(
            session.run,
            splits,
            methods=config.methods,
            seeds=seeds,
            protocol=protocol,
            tuned=config.tune,
            device=session.device,
            advance=lambda note, steps: advance(steps, note=note),
            on_learner=attack,
        )
    dataset = results[0].dataset
    curves: dict[str, dict[str, Any]] = {norm: {} for norm in config.attack}
    for norm in config.attack:
        for name in config.methods:
            if name == experiments.PIXELS:
                continue
            # (seeds, radii, episodes); all are done, each before the cell of its training was.
            per_seed = [session.run.once(f"attack/{norm}/{name}/{seed}", list) for seed in seeds]
            whole = np.asarray(per_seed, dtype=np.float64)
            at = (0.0, *radii[norm])
            areas = (np.trapezoid(whole.mean(2), at, axis=1) / at[-1]).tolist()
            metric = f"area under accuracy ({norm.capitalize()})"
            results.append(summarize(areas, dataset=dataset, method=name, metric=metric, better="higher"))
            curves[norm][name] = RobustnessCurve(
                norm,
                torch.tensor(at, dtype=torch.float64),
                torch.from_numpy(whole.mean((0, 2))),
                torch.from_numpy(np.concatenate(list(whole), axis=1)),
            )
    write_json(session.run.artifact("cells.json"), {m: {str(s): c for s, c in by.items()} for m, by in cells.items()})
    if any(curves.values()):
        plot_robustness(session.run.artifact("robustness.png"), curves)
    settings = {name: by[config.seed]["setting"] for name, by in cells.items()}
    chosen = [f"{name}: {setting}" for name, setting in settings.items() if setting]
    return Outcome(_with_picture(session, results), claims, [f"chosen on validation classes: {c}" for c in chosen])


# ---- one learner


class TrainConfig(TaskOptions):
    """Settings of ``train``."""

    data: str = argument(_SOURCE)
    method: str = Field("meta-dropout", description="a method; an unknown name lists them all")
    chunk: int | None = Field(None, ge=1, description="tasks at a time, to save memory")


@line.command(TrainConfig)
def train(config: TrainConfig, session: Session) -> Outcome:
    """Train a learner over tasks; what it leaves adapts to new tasks."""
    from meta_dropout import experiments
    from meta_dropout.plots import plot_history

    protocol = _protocol(config)
    splits = _splits(config.data, config)
    learner = experiments.make_learner(
        config.method, protocol, splits.channels, seed=config.seed, device=session.device, chunk=config.chunk
    )
    # What cannot be trained on is said at once.
    experiments.source_of(splits.train, protocol, seed=config.seed)
    judge, notes = None, list[str]()
    try:
        judge = experiments.source_of(splits.validation, protocol, seed=config.seed + 1, test=True)
    except InputError as error:
        notes.append(f"no validation, the accuracy is of training classes ({error})")
        session.say(notes[0])
    state = session.run.load_checkpoint()
    done = 0 if state is None else int(state["step"])
    with session.progress("train", config.steps, done) as advance:

        def after(step: Any) -> None:
            session.run.log(step=float(step.step), loss=step.loss, accuracy=step.accuracy)
            advance(1, note=f"query loss {step.loss:.3f}, accuracy {step.accuracy:.3f}")

        history = experiments.train(
            learner,
            splits.train,
            protocol,
            seed=config.seed,
            on_step=after,
            resume=state,
            on_state=session.run.save_checkpoint,
            world=session.world,
        )
    network = protocol.network(splits.channels, config.seed)
    learner.save(session.run.artifact(_MODEL), network=network)
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
    found = learner.evaluate(judge, episodes=min(config.episodes, 200))
    row = summarize(
        [100 * found.mean], dataset=f"{splits.train.name}, {kind} classes", method=config.method,
        metric="accuracy", unit="%", better="higher",
    )  # fmt: skip
    return Outcome([row], notes=[*notes, f"± {100 * found.half_width:.2f} over {len(found.accuracy)} episodes"])


class _Facts(BaseModel):
    """What a training leaves beside its learner: all that tests of it ask for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: str
    mean: float
    channels: int = Field(ge=1, le=1024)
    size: int = Field(ge=1, le=4096)
    ways: int = Field(ge=2, le=100_000)
    shots: int = Field(ge=1, le=100_000)
    queries: int = Field(ge=1, le=100_000)
    norm: Literal["batch", "support"]
    split_by: _SplitBy | None
    classes: int | None = Field(ge=1)
    seed: int


class _Line(BaseModel):
    """What a training notes of a meta-step."""

    step: int
    loss: Noted
    accuracy: Noted


def _open(run: Path) -> tuple[MetaLearner, _Facts]:
    from meta_dropout.learner import MetaLearner

    for name in (_MODEL, _FACTS):
        if not (run / name).exists():
            raise InputError(f"{run}: has no {name}; give the run folder of 'meta-dropout train'")
    return MetaLearner.load(run / _MODEL), read_document(run / _FACTS, _Facts, "what 'meta-dropout train' writes")


def _counting(advance: Advance) -> Callable[[int], None]:
    """Tell a progress bar of counts that are sums."""
    done = 0

    def after(count: int) -> None:
        nonlocal done
        advance(count - done)
        done = count

    return after


def _over_episodes(
    values: Any,
    dataset: str,
    method: str,
    metric: str,
    *,
    unit: str = "%",
    better: Literal["lower", "higher"] = "higher",
) -> Result:
    """Mean over episodes with its 95 % interval, 1.96 standard errors as in the paper's code."""
    mean, half = float(values.mean()), 1.96 * float(values.std()) / len(values) ** 0.5
    return Result(
        dataset=dataset, method=method, metric=metric, unit=unit, better=better,
        mean=mean, low=mean - half, high=mean + half, n=len(values), seconds=0.0,
    )  # fmt: skip


class EvaluateConfig(CommandConfig):
    """Settings of ``evaluate``."""

    run: Path = argument("run folder of train")
    data: str | None = Field(None, description=f"{_SOURCE} (default: what it was trained on)")
    split: Literal["train", "validation", "test", "all"] = Field("test", description="classes to test on")
    split_by: _SplitBy | None = Field(None, description="how classes are divided")
    ways: int | None = Field(None, ge=2, description="classes of a task (default: as trained)")
    shots: int | None = Field(None, ge=1, description="support images of each class (default: as trained)")
    queries: int | None = Field(None, ge=1, description="query images of each class (default: as trained)")
    episodes: int = Field(1000, ge=1, description="test episodes")
    samples: int | None = Field(None, ge=1, description="noise samples in each inner step (default: as trained)")


@line.command(EvaluateConfig)
def evaluate(config: EvaluateConfig, session: Session) -> Outcome:
    """Adapt to test episodes and measure the answers, with a confidence interval over episodes."""
    learner, source, facts = _test_source(config, session)
    with session.progress("evaluate", config.episodes) as advance:
        found = learner.evaluate(source, episodes=config.episodes, samples=config.samples, on_batch=_counting(advance))
    dataset = f"{source.images.name}, {source.ways}-way {source.shots}-shot, {facts.norm} statistics"

    method = learner.method_name
    results = [
        _over_episodes(100 * found.accuracy, dataset, method, "accuracy"),
        _over_episodes(found.loss, dataset, method, "query loss", unit="1", better="lower"),
    ]
    results.append(
        summarize([found.calibration_error], dataset=dataset, method=learner.method_name, metric="calibration error",
                  better="lower")
    )  # fmt: skip
    write_json(session.run.artifact("protocol.json"), found.protocol)
    return Outcome(results, notes=[f"protocol: {json.dumps(found.protocol)}"])


def _test_source(config: Any, session: Session) -> tuple[MetaLearner, Any, _Facts]:
    from meta_dropout.data import TaskSource, load

    learner, facts = _open(config.run)
    learner.to(session.device)
    images = load(
        config.data or facts.data,
        split=config.split,
        size=facts.size,
        seed=facts.seed,
        split_by=config.split_by or (facts.split_by if config.data is None else None),
        classes=facts.classes if config.data is None else None,
        channels=facts.channels if facts.channels in (1, 3) else None,
    )
    ways, shots, queries = (getattr(config, n, None) or getattr(facts, n) for n in ("ways", "shots", "queries"))
    if ways != facts.ways:
        raise InputError(
            f"ways: the head was trained for {facts.ways} classes; evaluate with as many, or use 'adapt', which"
            " makes a head for any number"
        )
    return learner, TaskSource(images, ways, shots, queries, seed=config.seed + 1), facts


class AdaptConfig(CommandConfig):
    """Settings of ``adapt``."""

    run: Path = argument("run folder of train")
    support: Path = argument("folder of labelled examples, <class>/*.png")
    query: Path = argument("folder of pictures to classify")
    output: Path | None = Field(None, description="CSV to write (default: predictions.csv in the run folder)")
    models: int = Field(10, ge=0, description="models adapted under other noise, for the spread of probabilities")
    steps: int | None = Field(None, ge=0, description="inner steps (default: as trained)")
    invert: Literal["auto", "yes", "no"] = Field("auto", description="exchange light and dark")


@line.command(AdaptConfig)
def adapt(config: AdaptConfig, session: Session) -> Outcome:
    """Learn a task from a folder of labelled examples, and say what the pictures of another folder are."""
    from meta_dropout.data import read_labelled, read_unlabelled

    learner, facts = _open(config.run)
    learner.to(session.device)
    invert = {"auto": "auto", "yes": True, "no": False}[config.invert]
    channels: Any = facts.channels
    known = read_labelled(config.support, facts.size, channels, invert=invert, training_mean=facts.mean)  # type: ignore[arg-type]
    asked = read_unlabelled(config.query, facts.size, channels, invert=known.inverted)
    task = learner.adapt(
        known.images.to(session.device), known.labels, spread=config.models, steps=config.steps, seed=config.seed
    )
    found = task.predict(asked.images.to(session.device))
    path = config.output or session.run.artifact("predictions.csv")
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        names = known.class_names
        writer.writerow(["file", "class", "probability", "spread", *(f"p({name})" for name in names)])
        for file, p, s in zip(asked.files, found.probability, found.spread, strict=True):
            best = int(p.argmax())
            writer.writerow([file, names[best], f"{p[best]:.4f}", f"{s[best]:.4f}", *(f"{v:.4f}" for v in p)])
    counts = ", ".join(f"{name} {int((found.label == k).sum())}" for k, name in enumerate(names))
    notes = [*known.notes, *asked.notes, f"wrote {path}: {len(asked.files)} pictures; {counts}"]
    if facts.norm == "batch" and len(asked.files) < len(names):
        notes.append(
            "few pictures: they are normalised by their own batch; a learner trained with --norm support is not"
        )
    return Outcome(notes=notes)


class AttackConfig(EvaluateConfig):
    """Settings of ``attack``."""

    episodes: int = Field(50, ge=1, description="test episodes")
    norm: Literal["l1", "l2", "linf"] = Field("linf", description="norm of the perturbation, over pixels in 0..1")
    kind: Literal["pgd", "fgsm"] = Field("pgd", description="attack")
    radii: tuple[float, ...] = Field((), description="radii (default: as in the paper's figure)")
    attack_steps: int = Field(40, ge=1, description="steps of PGD")


@line.command(AttackConfig)
def attack(config: AttackConfig, session: Session) -> Outcome:
    """Attack the queries of adapted models: accuracy over the radius of the perturbation, and the area under it."""
    import numpy as np
    import torch

    from meta_dropout.attacks import RobustnessCurve
    from meta_dropout.experiments import robustness
    from meta_dropout.plots import plot_robustness

    learner, source, facts = _test_source(config, session)
    radii = config.radii or _radii(config.norm, facts.size)
    with session.progress("attack", config.episodes) as advance:
        found = robustness(
            learner, source, config.norm, radii, episodes=config.episodes, steps=config.attack_steps,
            seed=config.seed, kind=config.kind, on_batch=_counting(advance),
        )  # fmt: skip
    all_radii = (0.0, *radii)
    dataset = f"{source.images.name}, {source.ways}-way {source.shots}-shot, {facts.norm} statistics"
    results: list[Result] = []
    for radius, row in zip(all_radii, found, strict=True):
        metric = f"accuracy at {config.norm} {radius:g}"
        results.append(_over_episodes(100 * row, dataset, learner.method_name, metric))
    area = float(np.trapezoid(found.mean(1), all_radii) / all_radii[-1])
    results.append(summarize([area], dataset=dataset, method=learner.method_name, metric="area under accuracy",
                             better="higher"))  # fmt: skip
    curve = RobustnessCurve(
        config.norm,
        torch.tensor(all_radii, dtype=torch.float64),
        torch.from_numpy(found.mean(1)).double(),
        torch.from_numpy(found).double(),
    )
    plot_robustness(session.run.artifact("robustness.png"), {config.norm: {learner.method_name: curve}})
    return Outcome(results)


class DiagnoseConfig(EvaluateConfig):
    """Settings of ``diagnose``."""

    episodes: int = Field(100, ge=1, description="test episodes")
    draws: int = Field(3, ge=1, description="draws of all the noise")


@line.command(DiagnoseConfig)
def diagnose(config: DiagnoseConfig, session: Session) -> Outcome:
    """Ask whether the learned noise does anything: adapt without it, with more samples, with shuffled generators."""
    from meta_dropout.experiments import noise_use

    learner, source, facts = _test_source(config, session)
    counts = (1, 10, 30) if config.samples is None else (config.samples,)
    with session.progress("diagnose", config.episodes * (2 + config.draws * len(counts))) as advance:
        found = noise_use(
            learner, source, samples=counts, draws=config.draws, episodes=config.episodes, seed=config.seed,
            on_batch=_counting(advance),
        )  # fmt: skip
    dataset = f"{source.images.name}, {source.ways}-way {source.shots}-shot, {facts.norm} statistics"
    results: list[Result] = []
    for variant, accuracy in found.items():
        results.append(_over_episodes(100 * accuracy.mean(0), dataset, variant, "accuracy"))
        if len(accuracy) > 1:
            apart = 100 * float(accuracy.std(0, ddof=1).mean())
            results.append(
                summarize([apart], dataset=dataset, method=variant, metric="spread over draws of noise", unit="%",
                          better="lower")
            )  # fmt: skip
    return Outcome(results)


class PlotConfig(CommandConfig):
    """Settings of ``plot``."""

    run: Path = argument("run folder of train or compare, or a summary.json")
    kind: Literal["auto", "history", "comparison", "gates", "boundary"] = Field(
        "auto", description="what to draw; auto is the history of a training and the comparison of anything else"
    )
    output: Path | None = Field(None, description="PNG, SVG or PDF to write (default: in the run folder of plot)")


@line.command(PlotConfig)
def plot(config: PlotConfig, session: Session) -> Outcome:
    """Draw learning curves, what the generators do to an image, or how an adaptation moves the boundary."""
    from meta_dropout import plots

    trained = config.run.is_dir() and (config.run / _MODEL).exists()
    kind = config.kind if config.kind != "auto" else ("history" if trained else "comparison")
    path = config.output or session.run.artifact(f"{kind}.png")
    if kind == "comparison":
        plots.plot_comparison(path, [r for r in read_summary(config.run).results if r.metric != "meta-step"])
        return Outcome(notes=[f"wrote {path}"])
    learner, facts = _open(config.run)
    if kind == "history":
        from meta_dropout.learner import Step

        lines = read_lines(config.run / "metrics.jsonl", _Line, "a training's history")
        steps = [Step(line.step, len(lines), line.loss, line.accuracy, 0) for line in lines]
        plots.plot_history(path, {learner.method_name: steps})
        return Outcome(notes=[f"wrote {path}"])
    from meta_dropout import diagnose
    from meta_dropout.data import TaskSource, load

    images = load(facts.data, split="test", size=facts.size, seed=facts.seed, split_by=facts.split_by,
                  classes=facts.classes, channels=facts.channels if facts.channels in (1, 3) else None)  # fmt: skip
    tasks = TaskSource(images, facts.ways, facts.shots, facts.queries, seed=config.seed).batch(0, 1)
    if kind == "gates":
        plots.plot_gates(path, tasks.support[0, 0], diagnose.gates(learner, tasks.support[0]))
    else:
        traced = diagnose.trace(
            learner,
            tasks.support[0],
            tasks.support_labels[0],
            tasks.query[0],
            query_labels=tasks.query_labels[0],
            seed=config.seed,
        )
        plots.plot_boundary(path, diagnose.project(traced, 0, 1))
    return Outcome(notes=[f"wrote {path}"])


class ExportConfig(CommandConfig):
    """Settings of ``export``."""

    run: Path = argument("run folder of train")
    support: Path = argument("folder of labelled examples, <class>/*.png")
    output: Path | None = Field(None, description="ONNX file to write (default: in the run folder of export)")


@line.command(ExportConfig)
def export(config: ExportConfig, session: Session) -> Outcome:
    """Adapt to a folder of labelled examples and write the adapted model to an ONNX file: images in, logits out."""
    from meta_dropout.data import read_labelled
    from meta_dropout.export import export_onnx

    learner, facts = _open(config.run)
    channels: Any = facts.channels
    known = read_labelled(config.support, facts.size, channels, training_mean=facts.mean)
    task = learner.adapt(known.images, known.labels, spread=0, seed=config.seed)
    path = config.output or session.run.artifact("model.onnx")
    export_onnx(task, path, example=known.images, classes=known.class_names)
    return Outcome(notes=[*known.notes, f"wrote {path}: images (n, {channels}, {facts.size}, {facts.size}) -> logits"])


class DataConfig(DataOptions):
    """Settings of ``data``."""

    source: str = argument(_SOURCE)


@line.command(DataConfig)
def data(config: DataConfig, session: Session) -> Outcome:
    """Say how a source is divided, and whether its classes are large enough for tasks."""
    del session
    splits = _splits(config.source, config)
    notes = [
        f"{kind}: {part.ways:,} classes, {len(part):,} images of {part.shape[0]} x {part.shape[1]} x {part.shape[2]},"
        f" {int(part.counts.min())} to {int(part.counts.max())} of each"
        for kind, part in (("train", splits.train), ("validation", splits.validation), ("test", splits.test))
    ]
    return Outcome(notes=[*notes, *([splits.train.notes] if splits.train.notes else [])])
