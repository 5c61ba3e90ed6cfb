"""The command line ``srq-dropbits``. Everything that needs torch is imported when a command runs, so help is quick."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from pydantic import Field, field_validator

from shared_core.cli import Advance, CommandConfig, CommandLine, Outcome, Session, argument
from shared_core.errors import InputError, no_such
from shared_core.runs import Result, read_summary, summarize, write_json

if TYPE_CHECKING:
    from srq_dropbits.config import QuantConfig
    from srq_dropbits.experiments import Comparison, Sweep, Task

line = CommandLine(
    "srq-dropbits",
    help="2- to 8-bit networks with learned grids and bit-widths, exported for real (Lee et al., ICCV 2021).",
)
main = line.main

_METHODS_HELP = (
    "ptq, ste-minmax, pact, lsq, lsq+, sr, rq, rq-local, rq-st, mcste-zero, mcste-input, mcste-clipped, mode-soft,"
    " mode-gumbel, srq, srq+dropbits, srq+dropbits+bits; settings after a colon: srq+dropbits:p_keep=0.8"
)


def _noting(advance: Advance) -> Callable[[str], None]:
    return lambda note: advance(note=note)


def _whole_methods(value: object) -> object:
    """Take methods apart at commas and spaces; what reads ``key=value`` belongs to the settings before it.

    Examples
    --------
    >>> _whole_methods("lsq,srq:p_keep=0.9,per_channel=true,ptq")
    ['lsq', 'srq:p_keep=0.9,per_channel=true', 'ptq']
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


def _pairs(texts: tuple[str, ...]) -> list[tuple[int, int | None]]:
    pairs: list[tuple[int, int | None]] = []
    for text in texts:
        weight, _, act = text.partition("/")
        if not weight.isdigit() or not (act or weight).isdigit():
            raise InputError(f"--bits: '{text}' is not weights/activations, as in 3/3; 3/32 leaves activations float")
        activations = int(act or weight)
        pairs.append((int(weight), None if activations == 32 else activations))
    return pairs


# ---- demo, compare, sweep, lottery


class DemoConfig(CommandConfig):
    """Settings of ``demo``."""

    seeds: int = Field(3, ge=1, description="networks, each quantized by every method")
    epochs: int | None = Field(None, ge=1, description="epochs after quantization (default: 4)")


@line.command(DemoConfig)
def demo(config: DemoConfig, session: Session) -> Outcome:
    """Quantize a digit classifier to 2 and 3 bits by every main method, and export it (under a minute)."""
    from srq_dropbits.experiments import compare as run_comparison
    from srq_dropbits.experiments import export_example, task_named

    task = task_named("digits", epochs=config.epochs or 4, float_epochs=8)
    methods = ("ptq", "lsq", "srq", "srq+dropbits")
    bits = [(2, 2), (3, 3)]
    seeds = [config.seed + seed for seed in range(config.seeds)]
    with session.progress("demo", len(seeds) * (len(methods) * len(bits) + 1) + 1) as advance:
        found = run_comparison(
            session.run,
            [task],
            methods,
            bits,
            seeds,
            rates=(1e-3,),
            device=str(session.device),
            advance=_noting(advance),
        )
        lines = export_example(session.run, task, config.seed, session.run.artifact("digits.srq.safetensors"))
        advance(note="exported")
    return _comparison(found, session, lines)


class TaskOptions(CommandConfig):
    """Changes to a task, or what a user's data need instead of one."""

    float_epochs: int | None = Field(None, ge=1, description="epochs of the float network (default: the task's)")
    arch: str | None = Field(None, description="network: lenet5:0.5, mlp:64,32, package.module:factory, ...")
    rows: int | None = Field(None, ge=20, description="most training rows")
    target: str | None = Field(None, description="label column of a table")


class CompareConfig(TaskOptions):
    """Settings of ``compare``."""

    task: str = argument(
        "names: digits, digits-mlp; with MNIST or CIFAR-10 in the data folder mnist-small, mnist, cifar10; or a data"
        " file or folder, with --arch"
    )
    methods: tuple[str, ...] = Field(
        ("ptq", "lsq", "rq-st", "mcste-zero", "mcste-input", "srq", "srq+dropbits"),
        description=f"methods, commas between them: {_METHODS_HELP}",
    )
    bits: tuple[str, ...] = Field(("2/2", "3/3", "4/4"), description="weights/activations; 3/32: activations float")
    seeds: int = Field(3, ge=1, description="trainings of each method at its best learning rate")
    tuning_seeds: int = Field(1, ge=1, description="other seeds, which the learning rates are chosen on")
    rates: tuple[float, ...] = Field((3e-4, 1e-3, 3e-3), description="learning rates each method may choose from")
    epochs: int | None = Field(None, ge=0, description="epochs after quantization (default: the task's)")

    @field_validator("methods", mode="before")
    @classmethod
    def _split_methods(cls, value: object) -> object:
        return _whole_methods(value)


@line.command(CompareConfig, spread=True)
def compare(config: CompareConfig, session: Session) -> Outcome:
    """Compare quantizers from the same float networks, each at its best learning rate, over bit-widths and seeds."""
    from srq_dropbits.experiments import compare as run_comparison

    tasks = _tasks(config)
    bits = _pairs(config.bits)
    seeds = [config.seed + seed for seed in range(config.seeds)]
    trials = len(config.rates) * config.tuning_seeds if len(config.rates) > 1 else 0
    expected = len(tasks) * (len(config.methods) * len(bits) * (trials + len(seeds)) + len(seeds))
    with session.progress("compare", expected) as advance:
        found = run_comparison(
            session.run,
            tasks,
            config.methods,
            bits,
            seeds,
            tuning_seeds=[config.seed + 1000 + seed for seed in range(config.tuning_seeds)],
            rates=config.rates,
            device=str(session.device),
            advance=_noting(advance),
        )
    return _comparison(found, session, found.notes)


def _tasks(config: CompareConfig | SweepConfig | LotteryConfig) -> list[Task]:
    from srq_dropbits.experiments import TASKS, Task, task_named

    text = config.task
    changes = {name: getattr(config, name) for name in ("epochs", "float_epochs", "arch", "rows", "target")}
    if Path(text).suffix or "/" in text or Path(text).is_dir():
        given: dict[str, Any] = {key: value for key, value in changes.items() if value is not None}
        name = Path(text).name.split(".")[0] or text
        fields: dict[str, Any] = {"name": name, "data": text, "arch": "mlp:64,32"} | given
        return [Task(**fields)]
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in TASKS]:
        raise InputError(f"{no_such('task', unknown[0], TASKS)}, and files and folders of data")
    return [task_named(name, **changes) for name in names]


def _comparison(found: Comparison, session: Session, notes: list[str]) -> Outcome:
    from srq_dropbits.plots import plot_ladder

    plot_ladder(session.run.artifact("ladder.png"), found.results)
    if found.grids:
        write_json(session.run.artifact("grids.json"), found.grids)
    return Outcome(found.results, found.claims, notes)


class LearningOptions(TaskOptions):
    """How bit-widths are learned."""

    max_bits: int = Field(4, ge=3, le=8, description="width that learned layers start from")
    act_bits: int = Field(4, ge=1, le=8, description="bits of activations")
    method: str = Field("srq", description="as in compare")


class SweepConfig(LearningOptions):
    """Settings of ``sweep``."""

    task: str = argument("as in compare")
    uniform: tuple[int, ...] = Field((2, 3, 4), description="bit-widths that all layers share")
    targets: tuple[float, ...] = Field((2.5, 3.0, 3.5), description="average bits to steer learned widths to")
    penalties: tuple[float, ...] = Field((), description="fixed strengths of the penalty on bits, without a target")
    weighting: Literal["size", "layer", "macs"] = Field("size", description="what bits are averaged over")
    lr: float = Field(1e-3, gt=0, le=1, description="learning rate")
    seeds: int = Field(3, ge=1, description="trainings of each point")
    epochs: int | None = Field(None, ge=1, description="epochs after quantization (default: the task's)")


@line.command(SweepConfig, spread=True)
def sweep(config: SweepConfig, session: Session) -> Outcome:
    """Draw accuracy against average bits: uniform bit-widths and learned ones."""
    from srq_dropbits.experiments import sweep as run_sweep

    points = len(config.uniform) + len(config.targets) + len(config.penalties)
    if not points:
        raise InputError("nothing to sweep: give --uniform, --targets or --penalties")
    with session.progress("sweep", points * config.seeds) as advance:
        found = run_sweep(
            session.run,
            _tasks(config)[0],
            [config.seed + seed for seed in range(config.seeds)],
            uniform=config.uniform,
            targets=config.targets,
            penalties=config.penalties,
            max_bits=config.max_bits,
            act_bits=config.act_bits,
            weighting=config.weighting,
            method=config.method,
            lr=config.lr,
            device=str(session.device),
            advance=_noting(advance),
        )
    return _swept(found, session)


def _swept(found: Sweep, session: Session) -> Outcome:
    from srq_dropbits.plots import plot_pareto

    plot_pareto(session.run.artifact("pareto.png"), found.points)
    plain = {
        name: [{"bits": bits, "accuracy": accuracy, "layers": layers} for bits, accuracy, layers in each]
        for name, each in found.points.items()
    }
    write_json(session.run.artifact("points.json"), plain)
    notes = [
        f"{name}: {', '.join(f'{layer} {bits}' for layer, bits in each[0][2].items())} (first seed)"
        for name, each in found.points.items()
        if "learned" in name or "joint" in name
    ]
    return Outcome(found.results, found.claims, notes)


class LotteryConfig(LearningOptions):
    """Settings of ``lottery``."""

    task: str = argument("as in compare")
    target_bits: float | None = Field(2.5, gt=0, le=8, description="average bits to steer to")
    penalty: float = Field(0.03, ge=0, description="strength of the penalty where there is no target")
    weighting: Literal["size", "layer", "macs"] = Field("layer", description="what bits are averaged over")
    lr: float = Field(1e-3, gt=0, le=1, description="learning rate from the float network")
    seeds: int = Field(5, ge=1, description="pairs of trainings")
    epochs: int | None = Field(None, ge=1, description="epochs from the float network (default: the task's)")
    float_epochs: int | None = Field(None, ge=1, description="epochs of the float network, and from random weights")


@line.command(LotteryConfig, spread=True)
def lottery(config: LotteryConfig, session: Session) -> Outcome:
    """Test the quantized lottery ticket: bits learned together with the weights against the same bits retrained."""
    from srq_dropbits.experiments import lottery as run_lottery

    with session.progress("lottery", 4 * config.seeds) as advance:
        found = run_lottery(
            session.run,
            _tasks(config)[0],
            [config.seed + seed for seed in range(config.seeds)],
            target=config.target_bits,
            penalty=config.penalty,
            max_bits=config.max_bits,
            act_bits=config.act_bits,
            weighting=config.weighting,
            method=config.method,
            lr=config.lr,
            device=str(session.device),
            advance=_noting(advance),
        )
    return _swept(found, session)


# ---- train, evaluate, predict


class TrainConfig(CommandConfig):
    """Settings of ``train``."""

    data: str = argument(
        "a set (digits, mnist, cifar10, ...), a CSV, TSV or NPZ file, a folder with MNIST's or CIFAR's files, or of"
        " images by class"
    )
    arch: str = Field(
        "auto",
        description="network: digits-cnn, lenet5:0.5, vgg7:0.25, resnet, mobilenet, transformer, mlp:64,32, or"
        " package.module:factory; auto: by the shape of a row",
    )
    weights: Path | None = Field(None, description="trained float weights, .safetensors or .pt; else trained here")
    method: str = Field("srq", description=_METHODS_HELP)
    weight_bits: int = Field(4, description="bits of weights, 2..8; what layers start from where bits are learned")
    act_bits: int = Field(4, description="bits of activations, 1..8; 32 leaves them float")
    layer_bits: tuple[str, ...] = Field((), description="pattern=bits of single layers, as in '0=8,*.fc=4,head=skip'")
    include: tuple[str, ...] = Field((), description="patterns of layers to quantize (default: all)")
    exclude: tuple[str, ...] = Field((), description="patterns of layers to leave float")
    per_channel: bool = Field(False, description="a step for every output channel")
    target_bits: float | None = Field(None, gt=0, le=8, description="learn bit-widths with this average")
    target_bytes: int | None = Field(None, gt=0, description="learn bit-widths that fit into so many bytes")
    penalty: float | None = Field(None, ge=0, description="learn bit-widths under a penalty of this strength")
    target: str | None = Field(None, description="label column of a table (default: the last)")
    size: int | None = Field(None, ge=1, description="side that images are resized to")
    limit: int | None = Field(None, ge=2, description="most training rows")
    validation: float = Field(0.1, ge=0, lt=1, description="share of the rows to watch")
    test: float = Field(0.2, ge=0, lt=1, description="share of the rows for the report, if the data have no test part")
    float_epochs: int = Field(15, ge=1, description="epochs of the float network")
    float_lr: float = Field(3e-3, gt=0, le=1, description="its learning rate")
    epochs: int = Field(10, ge=0, description="epochs after quantization")
    lr: float = Field(1e-3, gt=0, le=1, description="learning rate of the weights then")
    scale_lr: float | None = Field(None, gt=0, le=1, description="learning rate of the steps (default: as --lr)")
    batch_size: int = Field(64, ge=2, description="rows in a step")
    weight_decay: float = Field(1e-4, ge=0, description="of weights")
    distill: float = Field(0.0, ge=0, le=1, description="share of the loss that comes from the float network")
    augment: Literal["none", "crop", "crop+flip"] = Field("none", description="move and mirror images")


@line.command(TrainConfig)
def train(config: TrainConfig, session: Session) -> Outcome:
    """Train (or load) a float network, quantize it and train it on; resumes where it was interrupted."""
    from srq_dropbits.pipeline import Recipe, train_run
    from srq_dropbits.plots import plot_bits, plot_history, plot_weights

    names = set(Recipe.__dataclass_fields__)
    fields: dict[str, Any] = {key: value for key, value in config.model_dump().items() if key in names}
    fields["weights"] = None if config.weights is None else str(config.weights)
    recipe = Recipe(**fields)
    quant = _quant_config(config)
    total = config.epochs + (0 if config.weights else config.float_epochs)
    with session.progress("train", total) as advance:
        found, split = train_run(
            session.run, recipe, quant, device=session.device, world=session.world, advance=_noting(advance)
        )
    plot_weights(session.run.artifact("weights.png"), found.model)
    plot_bits(session.run.artifact("bits.png"), found.report)
    if found.history:
        plot_history(session.run.artifact("history.png"), found.history)
    results = [
        _measured(name.removeprefix("float "), value, split.name, "float32" if "float" in name else config.method)
        for name, value in found.metrics.items()
    ]
    for metric, value, unit in (
        ("average bits", found.report.avg_bits, "bits"),
        ("bytes", float(found.report.bytes), "bytes"),
    ):
        results.append(
            summarize([value], dataset=split.name, method=config.method, metric=metric, unit=unit, better="lower")
        )
    return Outcome(results, notes=str(found.report).splitlines())


def _measured(metric: str, value: float, dataset: str, method: str) -> Result:
    """Make a row of an accuracy or a loss, as :func:`srq_dropbits.training.evaluate` gives it."""
    if metric.endswith("accuracy"):
        return summarize([100 * value], dataset=dataset, method=method, metric=metric, unit="%", better="higher")
    return summarize([value], dataset=dataset, method=method, metric=metric, unit="nats", better="lower")


def _quant_config(config: TrainConfig) -> QuantConfig:
    from srq_dropbits.config import LearnBits, QuantConfig
    from srq_dropbits.experiments import parse_method

    act_bits = None if config.act_bits == 32 else config.act_bits
    base = parse_method(config.method, config.weight_bits, act_bits, config.seed)
    changes: dict[str, Any] = {"include": config.include, "exclude": config.exclude}
    if config.per_channel:
        changes["per_channel"] = True
    if config.layer_bits:
        changes["overrides"] = dict(_override(text) for text in config.layer_bits)
    if (config.target_bits, config.target_bytes, config.penalty) != (None, None, None):
        learn: dict[str, Any] = (
            {"max_bits": config.weight_bits} if base.learn_bits is None else base.learn_bits.model_dump()
        )
        given = {"target_bits": config.target_bits, "target_bytes": config.target_bytes, "penalty": config.penalty}
        learn |= {key: value for key, value in given.items() if value is not None}
        if "max_bits" in learn and learn["max_bits"] <= LearnBits.model_fields["min_bits"].default:
            raise InputError(f"--weight-bits {config.weight_bits} leaves no bits to learn; start from 3 or more")
        changes["learn_bits"] = learn
    return QuantConfig(**(base.model_dump() | changes))


def _override(text: str) -> tuple[str, Any]:
    pattern, found, value = text.partition("=")
    if not found or not (value == "skip" or value.isdigit()):
        raise InputError(f"--layer-bits: '{text}' is not pattern=bits or pattern=skip")
    return pattern, "skip" if value == "skip" else {"weight_bits": int(value)}


class EvaluateConfig(CommandConfig):
    """Settings of ``evaluate``."""

    run: Path = argument("run folder of a train")
    data: str | None = Field(None, description="other labelled data (default: the rows the run kept for its report)")
    target: str | None = Field(None, description="label column of a table")
    part: Literal["test", "validation", "all"] = Field("test", description="of the data the run was trained on")
    truncate: int | None = Field(None, ge=2, le=8, description="first cut all weights down to so many bits")


@line.command(EvaluateConfig)
def evaluate(config: EvaluateConfig, session: Session) -> Outcome:
    """Measure a trained network, as it was trained and with integer arithmetic, which must agree."""
    from srq_dropbits.bits import report
    from srq_dropbits.pipeline import evaluate_run, labelled_rows, load_run, truncated

    trained = load_run(config.run)
    x, y = labelled_rows(trained, config.data, config.target, config.part)
    if config.truncate is not None:
        truncated(trained, config.truncate)
    del session
    name = config.data or f"{trained.recipe.data}, {config.part} rows"
    results = [
        _measured(metric, value, name, method)
        for method, integer in (("as trained", False), ("integer", True))
        for metric, value in evaluate_run(trained, x, y, integer=integer).items()
    ]
    return Outcome(results, notes=[f"{len(y):,} rows", *str(report(trained.model)).splitlines()])


class PredictConfig(CommandConfig):
    """Settings of ``predict``."""

    run: Path = argument("run folder of a train")
    data: Path = argument("CSV, TSV or NPZ file, an image, or a folder of images; labels may be missing")
    integer: bool = Field(False, description="compute with integer codes, as a deployed network does")


@line.command(PredictConfig)
def predict(config: PredictConfig, session: Session) -> Outcome:
    """Write the class of each row, with probabilities, to predictions.csv."""
    from srq_dropbits.pipeline import load_run, write_predictions

    path = session.run.artifact("predictions.csv")
    return Outcome(notes=write_predictions(path, load_run(config.run), config.data, integer=config.integer))


# ---- export, inspect, diagnose, plot


class ExportConfig(CommandConfig):
    """Settings of ``export``."""

    run: Path = argument("run folder of a train")
    format: Literal["packed", "onnx", "weights"] = Field(
        "packed",
        description="packed: sub-byte codes; onnx: QDQ graph (needs the extra 'onnx'); weights: dequantized tensors",
    )
    weight_type: Literal["auto", "int8", "int4", "int2"] = Field("auto", description="integer type in ONNX")
    truncate: int | None = Field(None, ge=2, le=8, description="first cut all weights down to so many bits")


@line.command(ExportConfig)
def export(config: ExportConfig, session: Session) -> Outcome:
    """Write a trained network for real: packed weights or ONNX, checked against the network that was trained."""
    from srq_dropbits.pipeline import export_run, load_run, truncated

    trained = load_run(config.run)
    if config.format == "weights" and session.run.folder.resolve() == config.run.resolve():
        raise InputError(f"{config.run}: the run's own model.safetensors would be overwritten; give another --out")
    if config.truncate is not None:
        truncated(trained, config.truncate)
    name = {"packed": "model.srq.safetensors", "onnx": "model.onnx", "weights": "model.safetensors"}[config.format]
    notes, figures = export_run(trained, config.format, session.run.artifact(name), weight_type=config.weight_type)
    results = [
        summarize(
            [value],
            dataset=trained.recipe.data,
            method=config.format,
            metric=metric,
            unit="bytes" if metric == "file" else "1",
            better="higher" if "same" in metric else "lower",
        )
        for metric, value in figures.items()
    ]
    return Outcome(results, notes=notes)


class InspectConfig(CommandConfig):
    """Settings of ``inspect``."""

    target: Path = argument("run folder of a train, or a packed .safetensors file")


@line.command(InspectConfig)
def inspect(config: InspectConfig, session: Session) -> Outcome:
    """Show weights on their grids and bits of layers, or where every byte of a packed file is."""
    from srq_dropbits.packing import inspect_packed

    if not config.target.is_dir():
        sizes = inspect_packed(config.target)
        write_json(session.run.artifact("sizes.json"), sizes.to_dict())
        results = [
            summarize(
                [float(value)], dataset=config.target.name, method="packed", metric=metric, unit="bytes", better="lower"
            )
            for metric, value in (
                ("file", sizes.total),
                ("header", sizes.header_bytes),
                ("as float32", sizes.float_bytes),
            )
        ]
        return Outcome(results, notes=str(sizes).splitlines())
    from srq_dropbits.bits import report
    from srq_dropbits.experiments import quantization_error
    from srq_dropbits.pipeline import load_run, read_history
    from srq_dropbits.plots import plot_bits, plot_history, plot_weights

    trained = load_run(config.target)
    found = report(trained.model)
    plot_weights(session.run.artifact("weights.png"), trained.model)
    plot_bits(session.run.artifact("bits.png"), found)
    history = read_history(config.target)
    if history:
        plot_history(session.run.artifact("history.png"), history)
    write_json(session.run.artifact("report.json"), found.to_dict())
    results = [
        summarize([value], dataset=trained.recipe.data, method="network", metric=metric, unit=unit, better="lower")
        for metric, value, unit in (
            ("average bits", found.avg_bits, "bits"),
            ("bytes", float(found.bytes), "bytes"),
            ("bit operations", float(found.bit_operations), "1"),
            ("quantization error", quantization_error(trained.model), "1"),
        )
    ]
    return Outcome(results, notes=str(found).splitlines())


class DiagnoseConfig(CommandConfig):
    """Settings of ``diagnose``."""

    run: Path | None = argument("run folder of a train, whose weights are looked at too", default=None)
    bits: int | None = Field(None, ge=2, le=8, description="of the symmetric grid (default: the run's weights', or 3)")
    estimators: tuple[str, ...] = Field(
        ("lsq", "sr", "rq", "rq-st", "mcste-zero", "mcste-input", "mcste-clipped", "mode-soft", "mode-gumbel"),
        description="estimators, commas between them",
    )
    layers: int = Field(30, ge=1, description="random layers that are enumerated")
    rho: float = Field(1 / 3, gt=0, le=10, description="noise scale / step")
    temperature: float = Field(1.0, gt=0, description="of concrete samples")
    batches: int = Field(8, ge=1, description="batches of a run's training rows")

    @field_validator("estimators", mode="before")
    @classmethod
    def _split_estimators(cls, value: object) -> object:
        return _whole_methods(value)


@line.command(DiagnoseConfig)
def diagnose(config: DiagnoseConfig, session: Session) -> Outcome:
    """Show what each gradient estimator passes on, how biased it is, and what it does to a network's weights."""
    from srq_dropbits.diagnose import bias_study, gain_curve
    from srq_dropbits.experiments import diagnosis_rows
    from srq_dropbits.grid import Grid
    from srq_dropbits.pipeline import diagnose_run, load_run
    from srq_dropbits.plots import plot_estimators

    trained = None if config.run is None else load_run(config.run)
    bits = config.bits or (3 if trained is None else trained.config.weight_bits)
    names = config.estimators
    if not names:
        raise InputError("--estimators: name one at least")
    grid = Grid.signed(bits)
    with session.progress("diagnose", len(names) + 1) as advance:
        curves = []
        for name in names:
            curves.append(
                gain_curve(name, grid, rho=config.rho, temperature=config.temperature, draws=500, seed=config.seed)
            )
            advance(note=name)
        # As many weights as can be enumerated.
        weights = next(count for count in (4, 3, 2) if grid.size**count <= 100_000)
        options: dict[str, Any] = {"temperature": config.temperature, "seed": config.seed, "estimators": names}
        study = bias_study(config.layers, weights, bits, config.rho, draws=200, **options)
        advance(note="enumerated layers")
    plot_estimators(session.run.artifact("estimators.png"), curves)
    found = None if trained is None else diagnose_run(trained, names, batches=config.batches, seed=config.seed)
    write_json(
        session.run.artifact("diagnosis.json"),
        {"bias": [row.to_dict() for row in study], "network": None if found is None else found.to_dict()},
    )
    dataset = None if trained is None else trained.recipe.data
    return Outcome(diagnosis_rows(bits, curves, study, dataset, found))


class PlotConfig(CommandConfig):
    """Settings of ``plot``."""

    run: Path = argument("run folder of any command, or its summary.json")
    kind: Literal["png", "svg", "pdf"] = Field("png", description="kind of picture")


@line.command(PlotConfig)
def plot(config: PlotConfig, session: Session) -> Outcome:
    """Draw a finished run again: its results with their intervals."""
    from srq_dropbits.plots import plot_comparison

    results = read_summary(config.run).results
    if not results:
        raise InputError(f"{config.run}: the run has no results to draw")
    plot_comparison(session.run.artifact(f"comparison.{config.kind}"), results)
    return Outcome()


if __name__ == "__main__":
    main()
