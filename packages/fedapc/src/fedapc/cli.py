"""The command line ``fedapc``. Everything that needs torch is imported when a command runs, so help is quick."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field

from fedapc.choices import Norm, Start
from fedapc.config import FedAPCConfig, FedAPCFields
from shared_core.cli import CommandConfig, CommandLine, Outcome, Session, argument
from shared_core.errors import InputError
from shared_core.runs import Result, atomic_path, read_document, summarize, write_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fedapc.experiments import Cell, Protocol
    from fedapc.federation import Federation, Progress
    from fedapc.ledger import Amount
    from fedapc.report import Report

line = CommandLine(
    "fedapc",
    help="Federated continual learning: a shared base, sparse parts of tasks, attention over those of other clients.",
)
main = line.main

_SAVED, _FACTS, _LEDGER = "federation.safetensors", "federation.json", "ledger.csv"
_BENCHMARKS = "digits, overlapped-mnist, noniid-mini, gaussian; noniid50, overlapped-cifar100 where you have the sets"
_DRAWN_METRICS = ("accuracy", "forgetting", "accuracy when learnt", "sent up", "sent down", "density of parts")


# ---- demo, compare, ablate, transfer


class ProtocolOptions(CommandConfig):
    """What methods that are compared have in common."""

    clients: int = Field(4, ge=1, description="clients")
    tasks: int = Field(4, ge=1, description="tasks of a client")
    per_class: int = Field(20, ge=1, description="training examples of a class, of each client")
    network: str | None = Field(
        None, description="mlp, lenet, resnet18, or package.module:function (default: the benchmark's)"
    )
    rounds: int = Field(5, ge=1, description="rounds of communication a task")
    epochs: int = Field(3, ge=1, description="passes over a task's examples a round")
    batch_size: int = Field(50, ge=1, description="examples a step")
    lr: float = Field(1e-3, gt=0, description="learning rate of methods that are not tuned")
    upload_fraction: float = Field(0.3, gt=0, le=1, description="share of the base's rows that FedAPC sends up")
    sparsity: float = Field(1e-3, ge=0, description="lambda 1, of the L1 norm of adaptive parts")
    retention: float = Field(100.0, ge=0, description="lambda 2, of changes of past tasks")
    threshold: float = Field(1e-2, ge=0, description="what an entry of a part must exceed to be kept and sent")
    attention_lr: float = Field(3.0, gt=0, description="multiplies the learning rate of the attention")
    kb_policy: str = Field("last", description="parts of others a client gets: last, last+self, all, sample:K, none")


_SETTINGS = ("upload_fraction", "sparsity", "retention", "threshold", "attention_lr", "kb_policy")


def _protocol(config: ProtocolOptions, **more: Any) -> Protocol:
    from fedapc.experiments import Protocol

    names = ("clients", "tasks", "per_class", "network", "rounds", "epochs", "batch_size", "lr")
    values: dict[str, Any] = {name: getattr(config, name) for name in names}
    settings = {name: getattr(config, name) for name in _SETTINGS}
    found = Protocol(**values, config=settings, **more)
    # What is wrong with the settings is said before anything runs.
    found.federation_config(config.lr)
    return found


class DemoConfig(ProtocolOptions):
    """Settings of ``demo``."""

    methods: tuple[str, ...] = Field(
        ("finetune", "fedavg", "ewc", "apd", "fedapc"), description="methods; an unknown name lists them all"
    )


@line.command(DemoConfig)
def demo(config: DemoConfig, session: Session) -> Outcome:
    """Four clients learn four tasks of handwritten digits each: what they remember, and what they sent."""
    cells = _compared(config, session, "digits", config.methods, seeds=1)
    return _outcome(
        session,
        "digits",
        cells,
        [
            "Four clients, each with its own sequence of tasks: five classes of digits, their pixels permuted or not.",
            "'finetune', 'ewc' and 'apd' learn alone, the others send weights. memory.png shows what is forgotten.",
        ],
        shown=("accuracy", "forgetting", "sent up", "sent down"),
    )


class CompareConfig(ProtocolOptions):
    """Settings of ``compare``."""

    data: str = argument(f"benchmark: {_BENCHMARKS}", "digits")
    methods: tuple[str, ...] = Field(
        ("stl", "finetune", "ewc", "stable-sgd", "apd", "fedavg", "fedprox", "scaffold", "fedcurv", "fedavg-ewc",
         "fedprox-apd", "fedapc"),
        description="methods; an unknown name lists them all",
    )  # fmt: skip
    seeds: int = Field(3, ge=1, description="draws of the benchmark, and runs of each method")
    tune: bool = Field(False, description="choose each method's settings on validation examples of another draw")
    trials: int = Field(6, ge=1, description="settings to try for each method")
    leave_out: bool = Field(False, description="noniid50: go on without the data sets that are missing")


def _compared(
    config: ProtocolOptions,
    session: Session,
    name: str,
    methods: Sequence[str],
    *,
    seeds: int,
    tuned: bool = False,
    trials: int = 6,
    leave_out: bool = False,
) -> dict[str, dict[int, Cell]]:
    from fedapc.experiments import compare

    protocol = _protocol(config, trials=trials)
    runs = len(methods) * (seeds + (trials if tuned else 0))
    with session.progress("federations", runs) as advance:
        return compare(
            session.run,
            name,
            methods=methods,
            seeds=range(config.seed, config.seed + seeds),
            protocol=protocol,
            tuned=tuned,
            device=str(session.device),
            options={"absent": "leave out"} if leave_out else {},
            advance=lambda note, done: advance(done, note=note),
        )


def _outcome(
    session: Session,
    name: str,
    cells: Mapping[str, Mapping[int, Cell]],
    notes: Sequence[str] = (),
    *,
    shown: Sequence[str] = (),
) -> Outcome:
    import numpy as np

    from fedapc import plots
    from fedapc.experiments import claims_of, mean_known, results_of

    results = results_of(name, cells)
    plots.plot_comparison(session.run.artifact("comparison.png"), [r for r in results if r.metric in _DRAWN_METRICS])
    means = {
        method: tuple(
            float(np.mean([cell[key] for cell in by_seed.values()])) for key in ("accuracy", "forgetting", "up", "down")
        )
        for method, by_seed in cells.items()
    }
    plots.plot_bytes(
        session.run.artifact("bytes.png"),
        {method: (a, f, up / 1e6, down / 1e6) for method, (a, f, up, down) in means.items()},
    )
    matrices = {
        method: mean_known([np.array(cell["matrix"], dtype=object).astype(float) for cell in by_seed.values()])
        for method, by_seed in cells.items()
    }
    plots.plot_memory(session.run.artifact("memory.png"), matrices)
    write_json(session.run.artifact("cells.json"), {m: {str(s): c for s, c in by.items()} for m, by in cells.items()})
    notes = list(notes)
    for method, by_seed in cells.items():
        setting = next(iter(by_seed.values())).get("setting")
        if setting:
            chosen = ", ".join(f"{key} {value:.3g}" for key, value in setting.items() if key != "accuracy")
            notes.append(f"chosen on validation examples: {method}: {chosen}")
    kept = [row for row in results if row.metric in shown] if shown else results
    return Outcome(kept, claims_of(cells), notes)


@line.command(CompareConfig, spread=True)
def compare(config: CompareConfig, session: Session) -> Outcome:
    """Run methods on the same draws of a benchmark: accuracy, forgetting, bytes."""
    cells = _compared(
        config,
        session,
        config.data,
        config.methods,
        seeds=config.seeds,
        tuned=config.tune,
        trials=config.trials,
        leave_out=config.leave_out,
    )
    return _outcome(session, config.data, cells)


class AblateConfig(ProtocolOptions):
    """Settings of ``ablate``."""

    data: str = argument(f"benchmark: {_BENCHMARKS}", "digits")
    seeds: int = Field(3, ge=1, description="draws of the benchmark, and runs of each variant")


@line.command(AblateConfig, spread=True)
def ablate(config: AblateConfig, session: Session) -> Outcome:
    """Leave out one part of FedAPC at a time."""
    from fedapc.experiments import ABLATIONS

    return _outcome(session, config.data, _compared(config, session, config.data, ABLATIONS, seeds=config.seeds))


class TransferConfig(ProtocolOptions):
    """Settings of ``transfer``."""

    data: str = argument("benchmark: digits or overlapped-mnist", "digits")
    seeds: int = Field(5, ge=1, description="draws")
    donor: int = Field(60, ge=2, description="examples of a class that the client has who learns the problem first")
    receiver: int = Field(5, ge=1, description="examples of a class that the client has who meets it later")
    distractors: int = Field(2, ge=0, description="clients with other problems")
    train_base: bool = Field(False, description="train the base too, which then carries the knowledge by itself")


@line.command(TransferConfig, spread=True)
def transfer(config: TransferConfig, session: Session) -> Outcome:
    """Measure what a client gains from the part of another that learnt the same, and loses by those of strangers."""
    from fedapc import experiments, plots

    protocol = _protocol(config)
    with session.progress("federations", 6 * config.seeds) as advance:
        cells = experiments.transfer(
            session.run,
            config.data,
            seeds=range(config.seed, config.seed + config.seeds),
            protocol=protocol,
            donor=config.donor,
            receiver=config.receiver,
            distractors=config.distractors,
            train_base=config.train_base,
            device=str(session.device),
            advance=lambda note, done: advance(done, note=note),
        )
    results: list[Result] = []
    for label, by_seed in cells.items():
        for key, metric, scale, unit in (
            ("accuracy", "accuracy of the receiver", 100.0, "%"),
            ("donor", "attention to the donor", 1.0, "1"),
            ("strangers", "attention to strangers", 1.0, "1"),
        ):
            values = [scale * cell[key] for cell in by_seed.values() if cell[key] is not None]
            if values:
                seconds = sum(cell["seconds"] for cell in by_seed.values())
                results.append(
                    summarize(
                        values,
                        dataset=config.data,
                        method=label,
                        metric=metric,
                        unit=unit,
                        better="higher",
                        seconds=seconds,
                    )
                )
    plots.plot_comparison(session.run.artifact("comparison.png"), results)
    claims = experiments.transfer_claims(cells)
    return Outcome(
        results, claims, [f"the base is {'trained and averaged' if config.train_base else 'random and fixed'}"]
    )


# ---- one federation


class FitConfig(FedAPCFields, CommandConfig):
    """Settings of ``fit``: those of `fedapc.FedAPCConfig`, and where tasks, network and preset come from."""

    tasks: Path = argument("tasks.toml, which names each client's files; 'fedapc example DIR' writes one")
    method: str = Field("fedapc", description="a method; an unknown name lists them all")
    preset: Literal["probed", "fedweit", "reference", "fed-apc"] = Field(
        "probed", description="ours; the paper's; what the authors' code does; the mean of parts, unattended"
    )
    network: str | None = Field(
        None, description="mlp, lenet, resnet18, package.module:function or file.py:function (default: tasks.toml's)"
    )
    norm: Norm = Field(
        "refuse", description="running statistics of batch norms: each task its own, or those of the network given"
    )
    start: Start = Field("fan-in", description="weights to begin with: drawn, or the network's")
    threads: int = Field(1, ge=1, description="threads that clients are spread over")
    processes: int = Field(0, ge=0, description="processes that clients are spread over instead; method fedapc only")


def _settings(config: FitConfig) -> FedAPCConfig:
    """Put what was given over the preset, and the preset over the defaults."""
    given = {name: getattr(config, name) for name in FedAPCFields.model_fields if name in config.model_fields_set}
    return FedAPCConfig.preset(config.preset, **given)


class _Facts(BaseModel):
    """What ``fit`` leaves beside its federation: all it takes to make it again."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tasks: Path
    network: str
    method: str
    norm: Norm
    start: Start
    seed: int
    settings: FedAPCConfig
    labels: dict[str, list[list[str]]]


def _federation(facts: _Facts, files: Any, device: str) -> Federation:
    from fedapc.federation import Federation
    from fedapc.networks import network

    first = next(iter(files.tasks.values()))[0]
    body = network(facts.network, first.x[:1], first.classes)
    return Federation(
        body,
        facts.method,
        config=facts.settings,
        norm=facts.norm,
        start=facts.start,
        seed=facts.seed,
        device=device,
    )


@line.command(FitConfig)
def fit(config: FitConfig, session: Session) -> Outcome:
    """Let clients learn their tasks, and keep what they know."""
    from fedapc.baselines.methods import find_method
    from fedapc.data import read_tasks
    from fedapc.errors import SparsityWarning
    from fedapc.experiments import measure, results_of

    find_method(config.method)
    settings = _settings(config)
    files = read_tasks(config.tasks)
    facts = _Facts(
        tasks=config.tasks.resolve(),
        network=config.network or files.network,
        method=config.method,
        norm=config.norm,
        start=config.start,
        seed=config.seed,
        settings=settings,
        labels={client: [list(names) for names in own] for client, own in files.labels.items()},
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SparsityWarning)
        federation = _federation(facts, files, str(session.device))
        # The same is said once a client; here once.
        settings.learning()
    for text in dict.fromkeys(str(warning.message) for warning in caught):
        session.say(f"note: {text}")
    total = settings.rounds * max(map(len, files.tasks.values()))
    with session.progress("rounds", total) as advance:
        done = 0

        def after(progress: Progress) -> None:
            nonlocal done
            session.run.log(
                round=float(progress.round),
                task=float(progress.task),
                accuracy=progress.accuracy,
                megabytes=progress.megabytes,
            )
            advance(progress.round - done, note=f"task {progress.task + 1}, {progress.megabytes:.1f} MB")
            done = progress.round

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SparsityWarning)
            report = federation.fit(
                files.tasks,
                workers=config.threads,
                processes=config.processes,
                checkpoint=session.run,
                on_round=after,
            )
    federation.save(session.run.artifact(_SAVED))
    write_json(session.run.artifact(_FACTS), facts.model_dump(mode="json"))
    _keep(session, report)
    results = results_of(config.tasks.stem, {config.method: {config.seed: measure(report)}})
    results += _client_rows(config.tasks.stem, report)
    return Outcome(results, notes=[*files.notes, *_events(report)])


def _keep(session: Session, report: Report) -> None:
    import numpy as np

    run = session.run
    for name in ("report.json", "ledger.jsonl"):
        run.artifact(name)
    report.save(run.folder)
    with atomic_path(run.artifact("accuracy.npz")) as temporary:
        np.savez(temporary, accuracy=report.matrix, clients=np.array(report.clients))
    _write_ledger(run.artifact(_LEDGER), report)
    _draw(session, report)


def _draw(session: Session, report: Report) -> None:
    import numpy as np

    from fedapc import plots

    run = session.run
    if not np.isnan(report.matrix).all():
        plots.plot_matrix(run.artifact("matrix.png"), report)
        plots.plot_memory(run.artifact("memory.png"), {report.method: report.matrix})
    if any(report.attentions.values()):
        plots.plot_attention(run.artifact("attention.png"), report)
    if len(report.ledger):
        plots.plot_ledger(run.artifact("ledger.png"), report.ledger)


def _write_ledger(path: Path, report: Report) -> None:
    from dataclasses import asdict, fields

    from fedapc.ledger import Entry

    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Entry)])
        writer.writeheader()
        writer.writerows(asdict(entry) for entry in report.ledger)


def _client_rows(name: str, report: Report) -> list[Result]:
    rows: list[Result] = []
    for client in report.clients:
        last = report.of_client(client)[-1]
        rows += [
            summarize([100 * float(value)], dataset=f"{name}, {client}", method=report.method,
                      metric=f"accuracy on {task}", unit="%", better="higher")
            for task, value in zip(report.tasks[client], last, strict=True)
            if value == value
        ]  # fmt: skip
    return rows


def _events(report: Report) -> list[str]:
    counts: dict[str, int] = {}
    for entry in report.ledger.events():
        counts[entry.event] = counts.get(entry.event, 0) + 1
    return [f"the ledger has {count} x '{event}'" for event, count in counts.items()]


def _opened(run: Path, device: str, *, with_tasks: bool = True) -> tuple[Federation, Any]:
    from fedapc.data import read_tasks

    for name in (_SAVED, _FACTS):
        if not (run / name).exists():
            raise InputError(f"{run}: has no {name}; give the run folder of 'fedapc fit'")
    facts = read_document(run / _FACTS, _Facts, "what 'fedapc fit' writes")
    files = read_tasks(facts.tasks)
    federation = _federation(facts, files, device)
    federation.load(run / _SAVED, files.tasks if with_tasks else None)
    return federation, files


class EvaluateConfig(CommandConfig):
    """Settings of ``evaluate``."""

    run: Path = argument("run folder of fit")


@line.command(EvaluateConfig)
def evaluate(config: EvaluateConfig, session: Session) -> Outcome:
    """Test every client again on all its tasks, as it is now."""
    federation, files = _opened(config.run, str(session.device))
    results: list[Result] = []
    for name, client in federation.clients.items():
        for number, value in enumerate(client.evaluate()):
            if value == value:
                task = files.tasks[name][number].name or str(number)
                results.append(
                    summarize([100 * value], dataset=name, method=federation.method, metric=f"accuracy on {task}",
                              unit="%", better="higher")
                )  # fmt: skip
    if not results:
        raise InputError(f"{config.run}: no task has test examples; name them in its tasks.toml, as test or test_share")
    return Outcome(results)


class OneTaskConfig(CommandConfig):
    """Settings of commands for one task of one client."""

    run: Path = argument("run folder of fit")
    client: str = Field(description="name of the client")
    task: int = Field(ge=1, description="number of its task, from 1")


class PredictConfig(OneTaskConfig):
    """Settings of ``predict``."""

    input: Path = Field(description="what to predict: CSV, NPZ with x, picture or folder of pictures")
    output: Path | None = Field(None, description="CSV file to write (default: predictions.csv in the run folder)")


@line.command(PredictConfig)
def predict(config: PredictConfig, session: Session) -> Outcome:
    """Predict the classes of new inputs, with probabilities, in the user's own labels."""
    import torch

    federation, files = _opened(config.run, str(session.device))
    x = files.inputs(config.client, config.task - 1, config.input)
    shares = torch.softmax(federation.predict(config.client, x, config.task - 1).double(), 1)
    labels = files.labels[config.client][config.task - 1]
    target = config.output or session.run.artifact("predictions.csv")
    with atomic_path(target) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["label", *(f"p({label})" for label in labels)])
        for row in shares.tolist():
            writer.writerow([labels[row.index(max(row))], *(f"{share:.6g}" for share in row)])
    counts = [int((shares.argmax(1) == number).sum()) for number in range(len(labels))]
    shown = ", ".join(f"{label} {count}" for label, count in zip(labels, counts, strict=True))
    return Outcome(notes=[f"{len(shares)} inputs: {shown}", f"written to {target}"])


class ExportConfig(OneTaskConfig):
    """Settings of ``export``."""

    output: Path | None = Field(
        None, description="file to write: .safetensors or .onnx (default: model.safetensors in the run folder)"
    )


@line.command(ExportConfig)
def export(config: ExportConfig, session: Session) -> Outcome:
    """Write the plain network of one task of one client, and check that it computes the same."""
    from fedapc.export import export_network

    federation, files = _opened(config.run, str(session.device))
    net = federation.export(config.client, config.task - 1).cpu()
    target = config.output or session.run.artifact("model.safetensors")
    example = files.tasks[config.client][config.task - 1].x[:8]
    expected = federation.predict(config.client, example, config.task - 1)
    difference = export_network(net, target, example, expected)
    labels = ", ".join(files.labels[config.client][config.task - 1])
    return Outcome(
        notes=[f"classes: {labels}", f"written to {target}; logits of 8 examples differ by at most {difference:.2g}"]
    )


class PlotConfig(CommandConfig):
    """Settings of ``plot``."""

    run: Path = argument("run folder of fit, or of demo, compare or ablate, or a summary.json")


@line.command(PlotConfig)
def plot(config: PlotConfig, session: Session) -> Outcome:
    """Draw the pictures of a run again, e.g. into another folder."""
    from fedapc import plots
    from fedapc.report import Report
    from shared_core.runs import read_summary

    if (config.run / "report.json").exists():
        _draw(session, Report.load(config.run))
    else:
        rows = [row for row in read_summary(config.run).results if row.metric in _DRAWN_METRICS]
        plots.plot_comparison(session.run.artifact("comparison.png"), rows)
    return Outcome(notes=[f"drawn into {session.run.folder}"])


class LedgerConfig(CommandConfig):
    """Settings of ``ledger``."""

    run: Path = argument("run folder of fit")
    by: tuple[str, ...] = Field(
        ("direction", "kind"), description="fields to sum by: round, client, task, direction, kind, event"
    )
    amount: Literal["values", "payload-bytes", "encoded-bytes", "wire-bytes", "messages"] = Field(
        "encoded-bytes", description="what to sum; payload bytes are of the numbers alone"
    )


@line.command(LedgerConfig)
def ledger(config: LedgerConfig, session: Session) -> Outcome:
    """Sum what was sent, and list what went wrong."""
    from fedapc.report import Report

    report = Report.load(config.run)
    sums = report.ledger.sums(*config.by, amount=cast("Amount", config.amount.replace("-", "_")))
    unit = "bytes" if config.amount.endswith("bytes") else "1"
    results = [
        summarize([float(value)], dataset=", ".join(map(str, key)) or "all", method=report.method,
                  metric=config.amount.replace("-", " "), unit=unit, better="lower")
        for key, value in sorted(sums.items(), key=lambda item: tuple(map(str, item[0])))
    ]  # fmt: skip
    _write_ledger(session.run.artifact(_LEDGER), report)
    odd = [
        f"round {entry.round}, {entry.client}, task {entry.task}: {entry.event} {entry.note}"
        for entry in report.ledger.events()
    ]
    more = [f"and {len(odd) - 20} more, see {_LEDGER}"] if len(odd) > 20 else []
    return Outcome(results, notes=[*odd[:20], *more])


class InspectWireConfig(CommandConfig):
    """Settings of ``inspect-wire``."""

    file: Path = argument("a message, or a tensor, as it went over the wire")


@line.command(InspectWireConfig)
def inspect_wire(config: InspectWireConfig, session: Session) -> Outcome:
    """Check a message or a tensor of the wire format, and tell what is in it."""
    from fedapc.inspection import describe

    del session
    blob = config.file.read_bytes()
    try:
        return Outcome(notes=describe(blob))
    except InputError as error:
        raise InputError(f"{config.file}: {error}") from error


class FlowerAppConfig(CommandConfig):
    """Settings of ``flower-app``."""

    folder: Path = argument("folder to write to")
    data: str = Field("digits", description="benchmark whose tasks the nodes get; or the path of a tasks.toml")
    clients: int = Field(4, ge=1, description="clients of the benchmark")
    tasks: int = Field(4, ge=1, description="tasks of a client")
    per_class: int = Field(20, ge=1, description="training examples of a class")
    network: str | None = Field(None, description="mlp, lenet, resnet18, or package.module:function")
    rounds: int = Field(5, ge=1, description="rounds of communication a task")
    epochs: int = Field(3, ge=1, description="passes over a task's examples a round")
    batch_size: int = Field(50, ge=1, description="examples a step")
    lr: float = Field(9e-4, gt=0, description="learning rate; below the threshold of 0.001")


@line.command(FlowerAppConfig)
def flower_app(config: FlowerAppConfig, session: Session) -> Outcome:
    """Write a Flower project that runs as it is, on one machine and on many."""
    from fedapc.flower.project import write_project

    file = Path(config.data) if config.data.endswith(".toml") or Path(config.data).is_file() else None
    settings = {name: getattr(config, name) for name in ("rounds", "epochs", "batch_size", "lr")}
    more: dict[str, Any] = {} if file else {"benchmark": config.data}
    written = write_project(
        config.folder,
        clients=config.clients,
        tasks=config.tasks,
        per_class=config.per_class,
        network=config.network,
        tasks_file=file,
        seed=config.seed,
        config=FedAPCConfig.preset("probed", **settings),
        **more,
    )
    del session
    return Outcome(notes=[*(str(path) for path in written), f"see {config.folder / 'README.md'} for how to run it"])


class ExampleConfig(CommandConfig):
    """Settings of ``example``."""

    folder: Path = argument("folder to write to")


@line.command(ExampleConfig)
def example(config: ExampleConfig, session: Session) -> Outcome:
    """Write a small tasks.toml with its data, to try 'fedapc fit' and to begin one's own from."""
    from fedapc.data import write_example

    del session
    target = write_example(config.folder)
    return Outcome(notes=[f"fedapc fit {target}"])
