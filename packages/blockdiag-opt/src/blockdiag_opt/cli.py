"""The command line ``blockdiag-opt``. Everything that needs torch is imported when a command runs, so help is quick."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from pydantic import Field, field_validator

from shared_core.cli import Advance, CommandConfig, CommandLine, Outcome, Session, argument
from shared_core.errors import InputError, no_such
from shared_core.runs import Result, load_tree, read_summary, save_tree, summarize, write_json

if TYPE_CHECKING:
    from torch import nn

    from blockdiag_opt.experiments import Comparison, Density
    from blockdiag_opt.tasks import Task
    from blockdiag_opt.userdata import Schema

line = CommandLine(
    "blockdiag-opt",
    help="Optimizers that see correlations inside a group of weights (Yun, Lozano and Yang, AISTATS 2022).",
)
main = line.main

_SPEC_HELP = (
    "optimizers, commas between them: a name of ours (block-adam, ...), of torch.optim or of pytorch_optimizer (soap,"
    " ...), with options after a colon, as in adam,block-adam:b=25,K=5,soap:precondition_frequency=5"
)


def _whole_methods(value: object) -> object:
    """Take methods apart at commas and spaces; what reads ``key=value`` belongs to the settings before it.

    Examples
    --------
    >>> _whole_methods("adam,block-adam:b=25,K=5,soap")
    ['adam', 'block-adam:b=25,K=5', 'soap']
    """
    if isinstance(value, list | tuple):
        value = " ".join(map(str, cast("Sequence[object]", value)))
    if not isinstance(value, str):
        return value
    methods: list[str] = []
    for part in value.replace(",", " ").split():
        if methods and ":" in methods[-1] and "=" in part.partition(":")[0]:
            methods[-1] += f",{part}"
        else:
            methods.append(part)
    return methods


class TableOptions(CommandConfig):
    """How to read the user's table, and the model for it."""

    target: str | None = Field(None, description="column to predict; without it the model reconstructs its input")
    model: str = Field(
        "mlp:64,32", description="mlp:64,32, linear, cnn, ae:32,8, or package.module:function that returns a module"
    )
    exclude: tuple[str, ...] = Field((), description="columns to leave out")
    kind: Literal["auto", "regression", "classification"] = Field("auto", description="what the target is")
    raw: bool = Field(False, description="do not standardise columns")
    batch_size: int = Field(64, ge=1, description="rows in a step")


# ---- demo and compare


class DemoConfig(CommandConfig):
    """Settings of ``demo``."""

    seeds: int = Field(3, ge=1, description="training runs of each optimizer, after tuning on two others")
    steps: int | None = Field(None, ge=1, description="steps of a training run (default 200)")


@line.command(DemoConfig, spread=True)
def demo(config: DemoConfig, session: Session) -> Outcome:
    """Show block-diagonal adaptation against Adam and SGD on real data, every learning rate tuned (under a minute)."""
    from blockdiag_opt.experiments import compare as run_comparison
    from blockdiag_opt.experiments import demo_settings

    settings = demo_settings(config.seeds, config.steps)
    runs = len(settings.tasks) * len(settings.specs)
    expected = runs * (settings.points * len(settings.tuning_seeds) + len(settings.seeds))
    with session.progress("demo", expected) as advance:
        found = run_comparison(
            session.run,
            settings.tasks,
            settings.specs,
            [config.seed + seed for seed in settings.seeds],
            tuning_seeds=[config.seed + seed for seed in settings.tuning_seeds],
            points=settings.points,
            density=settings.density,
            extend=settings.extend,
            device=str(session.device),
            advance=_noting(advance),
        )
    notes = [task.description for task in settings.tasks]
    return _outcome(found, session, [*notes, *_grid_lines(found)])


class CompareConfig(TableOptions):
    """Settings of ``compare``."""

    task: str = argument(
        "CSV, TSV or NPZ file, or names: correlated, correlated-permuted, breast-cancer, digits, digits-clip,"
        " autoencoder-digits, char-lstm; with MNIST in the data folder autoencoder, cnn, mlp"
    )
    methods: tuple[str, ...] = Field(("adam", "sgd", "block-adam", "block-adam:grouping=input"), description=_SPEC_HELP)
    block_sizes: tuple[int, ...] = Field((), description="compare block-adam at these block sizes as well ...")
    intervals: tuple[int, ...] = Field((1,), description="... each with these update intervals; draws pareto.png")
    seeds: int = Field(5, ge=1, description="training runs of each optimizer at its best learning rate")
    tuning_seeds: int = Field(2, ge=1, description="other seeds, which the learning rates are chosen on")
    points: int = Field(5, ge=1, description="learning rates each optimizer is given at first")
    density: Literal["1", "2", "3"] = Field("3", description="learning rates a decade")
    extend: int = Field(12, ge=0, description="most further learning rates while the best is at an edge")
    steps: int | None = Field(None, ge=1, description="steps of a training run (default: the task's)")
    schedule: Literal["linear", "constant"] = Field("linear", description="after the warm-up")
    lr: float | None = Field(None, gt=0, le=1e4, description="take this learning rate everywhere instead of tuning")
    text: Path | None = Field(None, description="text file for char-lstm")

    @field_validator("methods", mode="before")
    @classmethod
    def _split_methods(cls, value: object) -> object:
        return _whole_methods(value)


@line.command(CompareConfig, spread=True)
def compare(config: CompareConfig, session: Session) -> Outcome:
    """Compare optimizers, each tuned with the same budget: loss against steps and against seconds."""
    from blockdiag_opt.experiments import block_specs
    from blockdiag_opt.experiments import compare as run_comparison
    from blockdiag_opt.plots import plot_pareto

    tasks = _tasks(config)
    specs = list(config.methods)
    specs += [spec for spec in block_specs(config.block_sizes, config.intervals) if spec not in specs]
    seeds = [config.seed + seed for seed in range(config.seeds)]
    expected = len(tasks) * len(specs) * (config.points * config.tuning_seeds * (config.lr is None) + len(seeds))
    with session.progress("compare", expected) as advance:
        found = run_comparison(
            session.run,
            tasks,
            specs,
            seeds,
            tuning_seeds=[config.seed + 1000 + seed for seed in range(config.tuning_seeds)],
            points=config.points,
            density=cast("Density", int(config.density)),
            extend=config.extend,
            steps=config.steps,
            schedule=config.schedule,
            lrs=None if config.lr is None else dict.fromkeys(specs, config.lr),
            device=str(session.device),
            advance=_noting(advance),
        )
    if config.block_sizes:
        _draw_pareto(plot_pareto, found, tasks, session)
    return _outcome(found, session, [*(task.description for task in tasks), *_grid_lines(found)])


def _draw_pareto(plot: Callable[..., Path], found: Comparison, tasks: Sequence[Task], session: Session) -> None:
    from blockdiag_opt.experiments import pareto_points

    for task in tasks:
        name = "pareto.png" if len(tasks) == 1 else f"pareto-{task.name}.png"
        plot(session.run.artifact(name), pareto_points(found.results, task.name))


def _tasks(config: CompareConfig) -> list[Task]:
    from blockdiag_opt.tasks import TASKS, make_task
    from blockdiag_opt.userdata import table_task

    if Path(config.task).suffix:
        options: dict[str, Any] = {"model": config.model, "exclude": config.exclude, "batch_size": config.batch_size}
        options |= {"kind": config.kind, "scale": not config.raw, "steps": config.steps or 500}
        return [table_task(config.task, config.target, **options)]
    names = [name.strip() for name in config.task.split(",") if name.strip()]
    if unknown := [name for name in names if name not in TASKS]:
        raise InputError(f"{no_such('task', unknown[0], TASKS)}; files end in .csv, .tsv or .npz")
    return [make_task(name, text=config.text if name == "char-lstm" else None, steps=config.steps) for name in names]


def _outcome(found: Comparison, session: Session, notes: list[str]) -> Outcome:
    from blockdiag_opt.plots import plot_comparison, plot_curves, plot_grids

    if any(found.curves.values()):
        plot_curves(session.run.artifact("curves.png"), {task: found.curves[task] for task in found.curves})
    plot_comparison(session.run.artifact("comparison.png"), found.results)
    grids = {task: {spec: grid.losses for spec, grid in each.items()} for task, each in found.grids.items() if each}
    if grids:
        plot_grids(session.run.artifact("grids.png"), grids)
        plain = {
            task: {
                spec: {
                    "tried": {f"{lr:g}": loss for lr, loss in sorted(grid.losses.items())},
                    "best": grid.best,
                    "edge": grid.edge,
                    "seconds": grid.seconds,
                }
                for spec, grid in each.items()
            }
            for task, each in found.grids.items()
        }
        write_json(session.run.artifact("grids.json"), plain)
    return Outcome(found.results, found.claims, notes)


def _grid_lines(found: Comparison) -> list[str]:
    lines: list[str] = []
    for task, each in found.grids.items():
        for spec, grid in each.items():
            tried = ", ".join(
                f"{'*' if lr == grid.best else ''}{lr:g}: {'diverged' if loss is None else f'{loss:.4g}'}"
                for lr, loss in sorted(grid.losses.items())
            )
            lines.append(f"{task}, {spec}: {tried}{'  (best at an edge: --extend more)' if grid.edge else ''}")
    return lines


def _noting(advance: Advance) -> Callable[[str], None]:
    return lambda note: advance(note=note)


# ---- plan and bench


class PlanConfig(CommandConfig):
    """Settings of ``plan``."""

    model: str = argument("package.module:function that returns a module, or a .safetensors file of weights")
    block_size: int = Field(10, ge=1, description="largest block")
    grouping: str = Field("auto", description="auto, paper, output, input, filter, row, diag or full")
    update_interval: int = Field(1, ge=1, description="steps between two decompositions of a block")
    inputs: int | None = Field(None, ge=1, description="passed to the function if it has that parameter")
    outputs: int | None = Field(None, ge=1, description="passed to the function if it has that parameter")


@line.command(PlanConfig)
def plan(config: PlanConfig, session: Session) -> Outcome:
    """Say before training how each tensor would be grouped, what that costs on this machine, and what is cheaper."""
    from blockdiag_opt.groups import block_groups
    from blockdiag_opt.groups import plan as make_plan

    model = _model_to_plan(config)
    try:
        groups = block_groups(model, block_size=config.block_size, grouping=config.grouping)
    except ValueError as error:
        raise InputError(f"{config.model}: {error}") from error
    if not any(True for _ in model.parameters()):
        raise InputError(f"{config.model}: the model has no parameters to train")
    found = make_plan(groups, update_interval=config.update_interval)
    write_json(session.run.artifact("plan.json"), found.to_dict())
    results = [
        summarize([value], dataset=config.model, method="block-adam", metric=metric, unit=unit, better="lower")
        for metric, value, unit in (
            ("predicted step", found.total_ms, "ms"),
            ("state", found.state_bytes / 2**20, "MiB"),
        )
    ]
    return Outcome(results, notes=str(found).splitlines())


def _model_to_plan(config: PlanConfig) -> nn.Module:
    from blockdiag_opt.userdata import build_model, read_shapes

    if Path(config.model).suffix == ".safetensors":
        return read_shapes(config.model)
    if ":" not in config.model:
        raise InputError(f"'{config.model}' is neither package.module:function nor a .safetensors file")
    return build_model(config.model, config.inputs or 1, config.outputs or 1, config.seed)


class BenchConfig(CommandConfig):
    """Settings of ``bench``."""

    weights: int = Field(100_000, ge=1000, description="weights of the model to plan for")
    block_sizes: tuple[int, ...] = Field((1, 2, 4, 8, 10, 16, 25, 32), description="block sizes to time")
    intervals: tuple[int, ...] = Field((1, 5, 20), description="update intervals to time")
    max_overhead: float = Field(10.0, gt=0, description="largest step time accepted, as a multiple of Adam's")


@line.command(BenchConfig)
def bench(config: BenchConfig, session: Session) -> Outcome:
    """Time a step on this machine for block sizes and update intervals, and recommend a pair within a budget."""
    from blockdiag_opt.experiments import time_steps

    pairs = [(b, K) for b in config.block_sizes for K in config.intervals if b > 1 or config.intervals[0] == K]
    if not pairs or min(min(config.block_sizes), min(config.intervals)) < 1:
        raise InputError("--block-sizes and --intervals are whole numbers, 1 or more")
    with session.progress("bench", len(pairs) + 1) as advance:
        found = time_steps(session.run, config.weights, pairs, device=str(session.device), advance=_noting(advance))
    floor = found["adam"]
    results: list[Result] = []
    for name, seconds in found.items():
        for metric, value, unit in (("step", 1e3 * seconds, "ms"), ("ratio to Adam", seconds / floor, "1")):
            results.append(
                summarize(
                    [value],
                    dataset=f"{config.weights:,} weights",
                    method=name,
                    metric=metric,
                    unit=unit,
                    better="lower",
                )
            )
    within = [(b, K) for b, K in pairs if found[f"b={b},K={K}"] <= config.max_overhead * floor and b > 1]
    if within:
        b, K = max(within, key=lambda pair: (pair[0], -pair[1]))
        advice = f"within {config.max_overhead:g} x Adam: the largest block is block_size={b} with update_interval={K}"
    else:
        advice = f"no block size stays within {config.max_overhead:g} x Adam's time on this machine"
    return Outcome(results, notes=[advice])


# ---- train, evaluate, predict, export


class TrainConfig(TableOptions):
    """Settings of ``train``."""

    data: Path = argument("table: CSV or TSV with a header (also .gz), or NPZ with x and perhaps y")
    optimizer: str = Field("block-adam", description="as in compare")
    lr: float = Field(1e-2, gt=0, le=1e4, description="learning rate at the top of the schedule")
    epochs: int = Field(50, ge=1, description="passes through the training rows")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps over which the learning rate rises")
    schedule: Literal["linear", "constant"] = Field("linear", description="after the warm-up")
    clip_norm: float | None = Field(None, gt=0, description="clip the gradient's norm (default: not)")
    holdout: float = Field(0.2, ge=0, lt=1, description="share of the rows kept for the report")
    monitor: bool = Field(True, description="record what blocks see; draws monitor.png")


@line.command(TrainConfig)
def train(config: TrainConfig, session: Session) -> Outcome:
    """Train a model on a table with any optimizer; resumes where it was interrupted."""
    from blockdiag_opt.plots import plot_history, plot_monitor
    from blockdiag_opt.training import Trained, fit

    options = config.model_dump(include={"target", "model", "exclude", "kind", "optimizer", "lr", "epochs", "seed"})
    options |= config.model_dump(include={"warmup", "schedule", "clip_norm", "holdout", "batch_size", "monitor"})
    state = session.run.load_checkpoint()
    done = len(state["history"]) if state else 0
    with session.progress("train", config.epochs, done) as advance:

        def after(trained: Trained) -> None:
            last = trained.history[-1]
            session.run.log(**last)
            session.run.save_checkpoint(trained.state())
            advance(note=f"loss {last['loss']:.4g}")

        trained = fit(
            config.data, scale=not config.raw, device=str(session.device), resume=state, after_epoch=after,
            world=session.world, **options,
        )  # fmt: skip
    save_tree(session.run.artifact("model.safetensors"), trained.saved())
    save_tree(session.run.artifact("optimizer.safetensors"), trained.optimizer_state())
    plot_history(session.run.artifact("history.png"), trained.history)
    notes = [trained.description]
    if trained.records:
        plot_monitor(session.run.artifact("monitor.png"), trained.records)
        write_json(session.run.artifact("monitor.json"), trained.records)
        notes += trained.advice
    return Outcome(_metric_rows(trained.metrics, config.data.name, config.optimizer), notes=notes)


def _metric_rows(metrics: Mapping[str, float], dataset: str, method: str) -> list[Result]:
    from blockdiag_opt.userdata import in_units, metric_named

    rows: list[Result] = []
    for name, value in in_units(metrics).items():
        metric = metric_named(name)
        rows.append(
            summarize([value], dataset=dataset, method=method, metric=name, unit=metric.unit, better=metric.better)
        )
    return rows


class EvaluateConfig(CommandConfig):
    """Settings of ``evaluate``."""

    model: Path = argument("run folder of a train")
    data: Path = argument("table with the same columns")


@line.command(EvaluateConfig)
def evaluate(config: EvaluateConfig, session: Session) -> Outcome:
    """Measure a trained model on another table."""
    from blockdiag_opt.userdata import metrics_of, read_table

    model, schema, saved = _load_model(config.model)
    table = read_table(config.data)
    found = metrics_of(schema, model, schema.inputs(table), schema.targets(table))
    del session
    return Outcome(_metric_rows(found, config.data.name, saved["options"]["optimizer"]))


class PredictConfig(CommandConfig):
    """Settings of ``predict``."""

    model: Path = argument("run folder of a train")
    data: Path = argument("table with the features; the target may be missing")


@line.command(PredictConfig)
def predict(config: PredictConfig, session: Session) -> Outcome:
    """Write predictions for a table's rows to predictions.csv."""
    from blockdiag_opt.training import write_predictions
    from blockdiag_opt.userdata import read_table

    model, schema, _ = _load_model(config.model)
    table = read_table(config.data)
    first = write_predictions(session.run.artifact("predictions.csv"), model, schema, table)
    return Outcome(notes=[*first, f"{len(table.values):,} rows"])


def _load_model(run: Path) -> tuple[nn.Module, Schema, dict[str, Any]]:
    from blockdiag_opt.training import file_of_run, load_trained

    return load_trained(file_of_run(run, "model.safetensors"))


class SpectrumConfig(CommandConfig):
    """Settings of ``spectrum``."""

    run: Path = argument("run folder of a train, or its optimizer.safetensors")


@line.command(SpectrumConfig)
def spectrum(config: SpectrumConfig, session: Session) -> Outcome:
    """Show what the optimizer of a finished training saw: condition and off-diagonal energy of every layer's blocks."""
    from blockdiag_opt.monitor import spectrum_of_state
    from blockdiag_opt.plots import plot_spectrum
    from blockdiag_opt.training import file_of_run

    path = file_of_run(config.run, "optimizer.safetensors")
    state = load_tree(path)
    if not isinstance(state, dict) or "state" not in state or "param_groups" not in state:
        raise InputError(f"{path} is not the state of an optimizer; give the run folder of 'blockdiag-opt train'")
    try:
        found = spectrum_of_state(state)
    except (ValueError, KeyError) as error:
        raise InputError(f"{path}: {error}") from error
    if not found:
        raise InputError(f"{path}: no tensor has blocks; it was not one of ours, or block_size was 1")
    plot_spectrum(
        session.run.artifact("spectrum.png"), {name: layer.eigenvalues.cpu().numpy() for name, layer in found.items()}
    )
    results = [
        summarize([value], dataset=name, method="blocks", metric=metric, better="lower")
        for name, layer in found.items()
        for metric, value in (
            ("median condition", layer.to_dict()["condition"]),
            ("off-diagonal energy", layer.to_dict()["off_diagonal"]),
            ("energy beyond chance", layer.excess),
        )
    ]
    return Outcome(results)


class ExportConfig(CommandConfig):
    """Settings of ``export``."""

    run: Path = argument("run folder of a train")
    format: Literal["optimizer", "weights", "pt2"] = Field(
        "weights", description="weights or optimizer state as plain safetensors, or a torch.export program"
    )


@line.command(ExportConfig)
def export(config: ExportConfig, session: Session) -> Outcome:
    """Export a trained model, or its optimizer's state, for other programs."""
    from blockdiag_opt.training import export_run

    if config.format != "pt2" and session.run.folder.resolve() == config.run.resolve():
        raise InputError(f"{config.run}: the run's own files would be overwritten; give another folder with --out")
    name = {"optimizer": "optimizer.safetensors", "weights": "model.safetensors", "pt2": "model.pt2"}[config.format]
    note = export_run(config.run, config.format, session.run.artifact(name))
    return Outcome(notes=[note])


class PlotConfig(CommandConfig):
    """Settings of ``plot``."""

    run: Path = argument("run folder of any command, or its summary.json")
    kind: Literal["png", "svg", "pdf"] = Field("png", description="kind of picture")


@line.command(PlotConfig)
def plot(config: PlotConfig, session: Session) -> Outcome:
    """Draw a finished run again: its results with their intervals."""
    from blockdiag_opt.plots import plot_comparison

    results = read_summary(config.run).results
    if not results:
        raise InputError(f"{config.run}: the run has no results to draw")
    plot_comparison(session.run.artifact(f"comparison.{config.kind}"), results)
    return Outcome()


if __name__ == "__main__":
    main()
