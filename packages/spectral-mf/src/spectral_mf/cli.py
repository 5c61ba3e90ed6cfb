"""The command line ``spectral-mf``. Everything that needs torch is imported when a command runs, so help is quick."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from shared_core.cli import Advance, CommandConfig, CommandLine, Outcome, Session, argument
from shared_core.errors import InputError, no_such
from shared_core.runs import Claim, Result, read_summary, summarize, write_json

if TYPE_CHECKING:
    import numpy as np
    import torch

    from spectral_mf.model import Ising
    from spectral_mf.result import LogPartition

line = CommandLine(
    "spectral-mf",
    help="Log partition functions of Ising models, with certified bounds (Park et al., ICML 2019, and what beats it).",
)
main = line.main

_FAMILIES = ("complete", "er", "grid", "sk", "hopfield", "rbm", "ferromagnet", "chain")
_REAL = ("digits20", "digits-rbm", "ability")
_METHODS = ("spectral", "modes", "ais", "ais-modes", "tap", "mean-field-1", "mean-field-20", "bp-200", "bp-damped",
         "mini-bucket", "sdp-rounding")  # fmt: skip


def _noting(advance: Advance) -> Callable[[str], None]:
    def note(text: str) -> None:
        advance(note=text)

    return note


def _generator(seed: int) -> torch.Generator:
    from shared_core.device import generator

    return generator(seed)


class ModelOptions(CommandConfig):
    """How to read a user's model; shared by the commands that take one."""

    evidence: str | None = Field(None, description="UAI evidence file, or 'auto' for the .evid beside the model")
    floor: float | None = Field(
        None, gt=0, description="takes the place of zero entries of UAI tables (default: refuse)"
    )
    fields: Path | None = Field(None, description="CSV of i,field beside an edge list")
    index: tuple[int, ...] = Field((), description="strength,instance in the authors' .mat file")


def _read(path: Path, config: ModelOptions, session: Session | None = None) -> Ising:
    from spectral_mf.model import Ising

    model = Ising.from_file(path, **_reading(config))
    return model if session is None else _placed(model, session)


def _placed(model: Ising, session: Session) -> Ising:
    return model if session.device.type == "cpu" else model.to(session.device)


def _reading(config: ModelOptions) -> dict[str, Any]:
    return {
        "evidence": config.evidence,
        "floor": config.floor,
        "fields": config.fields,
        "index": config.index or None,
    }


# ---- demo and compare


class DemoConfig(CommandConfig):
    """Settings of ``demo``."""

    seeds: int = Field(3, ge=1, description="repetitions of the real models: different training parts")
    models: int = Field(12, ge=1, description="drawn models of each strength")
    n: int = Field(16, ge=4, le=22, description="spins of the drawn models")
    methods: tuple[str, ...] = Field(_METHODS, description="methods")
    real: tuple[str, ...] = Field(("digits20", "digits-rbm"), description="models fitted to real data")
    strengths: tuple[float, ...] = Field(
        (0.05, 0.25, 0.5, 1.0, 2.0, 5.0), description="coupling strengths of the drawn models"
    )


@line.command(DemoConfig)
def demo(config: DemoConfig, session: Session) -> Outcome:
    """Answer: what is log Z of this model, how sure are we, what would other methods have said (under a minute)."""
    from spectral_mf.experiments import compare_families, compare_model, real_models
    from spectral_mf.plots import plot_curves, plot_opinions

    _check_methods(config.methods)
    seeds = [config.seed + k for k in range(config.seeds)]
    results: list[Result] = []
    claims: list[Claim] = []
    panels: dict[str, Any] = {}
    certain: dict[str, tuple[float, float]] = {}
    truth: dict[str, float] = {}
    notes: list[str] = []
    steps = len(config.methods) * (len(config.real) + len(config.strengths))
    with session.progress("demo", steps) as advance:
        for name in config.real:
            models = [real_models(name, seed) for seed in seeds]
            rows, held, opinions, about = compare_model(
                session.run,
                name,
                models,
                methods=config.methods,
                seed=config.seed,
                device=session.device.type,
                advance=_noting(advance),
            )
            results += rows
            claims += held
            title = f"{name} (n = {models[0].n})"
            panels[title], truth[title] = opinions, about["truth"]
            certain[title] = (about["lower"], about["upper"])
            notes.append(
                f"{name}: log Z = {about['truth']:.4f} exactly, certain to lie in"
                f" [{about['lower']:.2f}, {about['upper']:.2f}] without knowing that."
            )
        rows, held, curves = compare_families(
            session.run,
            ["complete"],
            n=config.n,
            strengths=config.strengths,
            methods=config.methods,
            seeds=[config.seed + k for k in range(config.models)],
            device=session.device.type,
            advance=_noting(advance),
        )
    results += rows
    claims += held
    plot_opinions(session.run.artifact("opinions.png"), panels, certain=certain, truth=truth)
    plot_curves(
        session.run.artifact("strength.png"),
        curves["complete"],
        xlabel="coupling strength",
        ylabel="mean |error| of log Z, nats",
        floor=1e-4,
        title=f"Complete graphs of {config.n} spins, {config.models} each",
    )
    notes.append("The spectral scheme is the paper's; modes, ais-modes and the bounds are this package's.")
    return Outcome(results, claims, notes)


def _check_methods(methods: Sequence[str]) -> None:
    from spectral_mf.experiments import METHODS

    for method in methods:
        if method not in METHODS:
            raise no_such("method", method, METHODS, where="--methods")


class CompareConfig(ModelOptions):
    """Settings of ``compare``."""

    model: str = argument(
        f"model file, a family ({', '.join(_FAMILIES)}; several with commas), or a real model ({', '.join(_REAL)})",
        "complete,er",
    )
    methods: tuple[str, ...] = Field(_METHODS, description="methods")
    seeds: int = Field(10, ge=1, description="repetitions: drawn models, training parts, or the methods' randomness")
    n: int = Field(20, ge=2, description="spins of drawn models")
    strengths: tuple[float, ...] = Field(
        (0.05, 0.1, 0.25, 0.5, 1.0, 3.0, 5.0), description="coupling strengths of drawn models"
    )
    sizes: tuple[int, ...] = Field((), description="measure seconds at these numbers of spins too (drawn models)")
    budget: float = Field(20.0, gt=0, description="seconds for the reference where no exact log Z is affordable")


@line.command(CompareConfig, spread=True)
def compare(config: CompareConfig, session: Session) -> Outcome:
    """Compare all methods on drawn models, real models, or your own."""
    from spectral_mf.experiments import compare_families, compare_model, compare_times, real_models
    from spectral_mf.plots import plot_comparison, plot_curves, plot_opinions

    _check_methods(config.methods)
    seeds = [config.seed + k for k in range(config.seeds)]
    names = [part.strip() for part in config.model.split(",") if part.strip()]
    if names and all(name in _FAMILIES for name in names):
        steps = len(config.methods) * (len(names) * len(config.strengths) + len(config.sizes))
        with session.progress("compare", steps) as advance:
            results, claims, curves = compare_families(
                session.run,
                names,
                n=config.n,
                strengths=config.strengths,
                methods=config.methods,
                seeds=seeds,
                device=session.device.type,
                advance=_noting(advance),
            )
            if config.sizes:
                rows, times = compare_times(
                    session.run,
                    sorted(config.sizes),
                    family=names[0],
                    strength=1.0,
                    methods=config.methods,
                    seed=config.seed,
                    device=session.device.type,
                    advance=_noting(advance),
                )
                results += rows
                plot_curves(
                    session.run.artifact("time.png"),
                    times,
                    xlabel="number of spins",
                    ylabel="seconds",
                    title=f"{names[0]}: time against n",
                )
        for name, lines in curves.items():
            if len(config.strengths) > 1:
                plot_curves(
                    session.run.artifact(f"strength-{name}.png"),
                    lines,
                    xlabel="coupling strength",
                    ylabel="mean |error| of log Z, nats",
                    floor=1e-4,
                    title=f"{name}, {config.n} spins, {config.seeds} models each",
                )
        plot_comparison(session.run.artifact("comparison.png"), results)
        return Outcome(results, claims)
    if len(names) == 1 and names[0] in _REAL:
        models, shown = [real_models(names[0], seed) for seed in seeds], names[0]
    else:
        path = Path(config.model)
        models, shown = [_read(path, config)], path.stem
    with session.progress("compare", len(config.methods)) as advance:
        results, claims, opinions, about = compare_model(
            session.run,
            shown,
            models,
            methods=config.methods,
            seed=config.seed,
            budget_s=config.budget,
            device=session.device.type,
            advance=_noting(advance),
        )
    plot_opinions(
        session.run.artifact("opinions.png"),
        {shown: opinions},
        certain={shown: (about["lower"], about["upper"])},
        truth={shown: about["truth"]} if about["exact"] else None,
    )
    plot_comparison(session.run.artifact("comparison.png"), results)
    word = "exactly" if about["exact"] else "by the reference run"
    notes = [f"log Z = {about['truth']:.6f} {word}; certain to lie in [{about['lower']:.4f}, {about['upper']:.4f}]"]
    notes += [f"left out: {text}" for text in about["skipped"]]
    return Outcome(results, claims, notes)


# ---- logz, bounds, marginals, sample


class LogzConfig(ModelOptions):
    """Settings of ``logz``."""

    model: Path = argument("model: .npz, .csv (edges), .uai, .mat, .safetensors")
    method: str = Field("auto", description="auto, or any method: see 'spectral-mf compare --help'")
    budget: float = Field(30.0, gt=0, description="seconds that sampling may take where nothing exact is affordable")
    tol: float | None = Field(None, gt=0, description="accuracy in nats asked of --method low_rank")
    clamp: int = Field(0, ge=0, le=12, description="spins to fix in all ways for tighter bounds")
    opinions: bool = Field(False, description="ask the other methods too, and draw what they say")


@line.command(LogzConfig)
def logz(config: LogzConfig, session: Session) -> Outcome:
    """Compute log Z of a model: value, certified bounds, and whether other estimators agree."""
    from spectral_mf.estimate import log_partition
    from spectral_mf.experiments import opinions_of
    from spectral_mf.formats import write_pr
    from spectral_mf.plots import Opinion, plot_opinions

    model = _read(config.model, config, session)
    chosen = model.plan(method=config.method, budget_s=config.budget)
    session.say(f"{model}: {chosen.method} ({chosen.reason})")
    options: dict[str, Any] = {} if config.tol is None else {"tol": config.tol}
    found = log_partition(
        model,
        method=config.method,
        bounds=True,
        budget_s=config.budget,
        generator=_generator(config.seed),
        **options,
    )
    low, high = _float(found.lower), _float(found.upper)
    if config.clamp:
        tighter = model.bounds(clamp=config.clamp, generator=_generator(config.seed))
        low, high = max(low, _float(tighter.lower)), min(high, _float(tighter.upper))
    value, name = _float(found.value), config.model.stem
    results = _log_z_rows(name, found, low, high)
    write_json(
        session.run.artifact("logz.json"),
        {
            "value": value,
            "lower": _finite(low),
            "upper": _finite(high),
            "std_error": None if found.std_error is None else _float(found.std_error),
            "method": found.method,
            "seconds": found.seconds,
            "n": model.n,
            "edges": len(model.problem.edges.i),
            "warnings": list(found.warnings),
            "diagnostics": _jsonable(found.diagnostics),
        },
    )
    write_pr(session.run.artifact(f"{name}.PR"), value)
    if config.opinions:
        asked = [method for method in _METHODS if method != "ais"] + ["ais"]
        others = opinions_of(model, asked, seed=config.seed, device=session.device.type)
        error = None if found.std_error is None else _float(found.std_error)
        ours = Opinion(f"{found.method} (value)", value, error)
        exact = value if chosen.exact else None
        plot_opinions(
            session.run.artifact("opinions.png"),
            {name: [*others, ours]},
            certain={name: (low, high)},
            truth=None if exact is None else {name: exact},
        )
        results += [
            summarize([o.value], dataset=name, method=o.method, metric="log Z", unit="nats", better="higher")
            for o in others
        ]
    notes = [
        f"log Z = {value:.8g}  by {found.method}"
        + ("" if found.std_error is None else f", standard error {_float(found.std_error):.2g}")
    ]
    notes.append(f"certain: {low:.8g} <= log Z <= {high:.8g}")
    notes += [f"warning: {text}" for text in found.warnings]
    return Outcome(results, notes=notes)


def _log_z_rows(name: str, found: LogPartition, low: float, high: float) -> list[Result]:
    value = _float(found.value)
    row = summarize(
        [value], dataset=name, method=found.method, metric="log Z", unit="nats", better="higher", seconds=found.seconds
    )
    if found.std_error is not None:
        half = 1.96 * _float(found.std_error)
        row = row.model_copy(update={"low": max(value - half, low), "high": min(value + half, high)})
    rows = [row]
    for kind, bound, better in (("certified lower bound", low, "higher"), ("certified upper bound", high, "lower")):
        if _finite(bound) is not None:
            rows.append(_row(name, found.method, kind, bound, better))
    return rows


def _row(
    name: str, method: str, metric: str, value: float, better: Literal["lower", "higher"] | str, unit: str = "nats"
) -> Result:
    return summarize(
        [value],
        dataset=name,
        method=method,
        metric=metric,
        unit=unit,
        better="lower" if better == "lower" else "higher",
    )


def _float(value: Any) -> float:
    return float(value)


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None


def _jsonable(value: Any) -> Any:
    """Diagnostics as plain JSON: arrays of more than 64 numbers are left out."""
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value][:64]
    if hasattr(value, "tolist"):
        return _jsonable(value.tolist()) if value.size <= 64 else f"{value.size} numbers"
    if isinstance(value, float):
        return _finite(value)
    return value if isinstance(value, str | int | bool | None) else str(value)


class BoundsConfig(ModelOptions):
    """Settings of ``bounds``."""

    model: Path = argument("model: .npz, .csv (edges), .uai, .mat, .safetensors")
    clamp: int = Field(4, ge=0, le=12, description="spins to fix in all 2^clamp ways: tighter, and twice the work each")


@line.command(BoundsConfig)
def bounds(config: BoundsConfig, session: Session) -> Outcome:
    """Bound log Z and the largest energy from both sides; every bound is certain."""
    from spectral_mf.bounds import log_partition_bounds, map_bound

    model, name = _read(config.model, config, session), config.model.stem
    found = log_partition_bounds(model, clamp=config.clamp, generator=_generator(config.seed))
    rows = [
        _row(name, key.removesuffix(" (upper)"), "upper bound" if key.endswith("(upper)") else "lower bound",
             _float(value), "lower" if key.endswith("(upper)") else "higher")
        for key, value in found.candidates.items()
        if _finite(_float(value)) is not None
    ]  # fmt: skip
    above = found.upper_from.removesuffix(" (upper)")
    notes = [f"{_float(found.lower):.8g} <= log Z <= {_float(found.upper):.8g}, by {found.lower_from} and {above}"]
    if model.n <= 1500:
        low, high = map_bound(model)
        rows += [_row(name, "largest energy", "lower bound", _float(low), "higher")]
        rows += [_row(name, "largest energy", "upper bound", _float(high), "lower")]
        notes.append(f"{_float(low):.8g} <= largest energy <= {_float(high):.8g}")
    return Outcome(rows, notes=notes)


class MarginalsConfig(ModelOptions):
    """Settings of ``marginals``."""

    model: Path = argument("model: .npz, .csv (edges), .uai, .mat, .safetensors")
    method: str = Field(
        "auto", description="auto, exact, clamp, modes, tap, ais, mean_field, belief_propagation, trw, ..."
    )
    pairs: bool = Field(False, description="also the second moments E[x_i x_j]")


@line.command(MarginalsConfig)
def marginals(config: MarginalsConfig, session: Session) -> Outcome:
    """Compute the means E[x_i] (and E[x_i x_j]); writes marginals.npz, marginals.csv and a UAI .MAR file."""
    import numpy as np

    from shared_core.runs import atomic_path
    from spectral_mf._inputs import to_numpy
    from spectral_mf.formats import read_model, write_mar
    from spectral_mf.model import Ising
    from spectral_mf.moments import marginals as means_of
    from spectral_mf.moments import pair_moments
    from spectral_mf.plots import plot_marginals

    arrays = read_model(config.model, **_reading(config))
    model = Ising(arrays.A, arrays.b, arrays.const)
    model = _placed(model, session)
    random = _generator(config.seed)
    means = to_numpy(means_of(model, method=config.method, generator=random))
    computed: dict[str, Any] = {"means": means}
    if config.pairs:
        computed["pairs"] = to_numpy(pair_moments(model, method=config.method, generator=random))
    with atomic_path(session.run.artifact("marginals.npz")) as temporary:
        np.savez(temporary, **computed)
    lines = ["spin,mean,probability_up", *(f"{i},{m:.10g},{(1 + m) / 2:.10g}" for i, m in enumerate(means))]
    _write_text(session, "marginals.csv", lines)
    write_mar(session.run.artifact(f"{config.model.stem}.MAR"), (1 + means) / 2, evidence=arrays.evidence)
    plot_marginals(session.run.artifact("marginals.png"), {config.method: means})
    shown = ", ".join(f"{m:.4f}" for m in means[:10])
    return Outcome(notes=[f"{model.n} means: {shown}{', ...' if model.n > 10 else ''}"])


def _write_text(session: Session, name: str, lines: Sequence[str]) -> None:
    from shared_core.runs import atomic_path

    with atomic_path(session.run.artifact(name)) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


class SampleConfig(ModelOptions):
    """Settings of ``sample``."""

    model: Path = argument("model: .npz, .csv (edges), .uai, .mat, .safetensors")
    k: int = Field(1000, ge=1, description="states to draw")
    coding: Literal["pm1", "01"] = Field("pm1", description="write -1/1 or 0/1")


@line.command(SampleConfig)
def sample(config: SampleConfig, session: Session) -> Outcome:
    """Draw states of a model: exactly where that is affordable, else by annealing; writes samples.csv."""
    import numpy as np

    from spectral_mf._inputs import to_numpy

    model = _read(config.model, config, session)
    states = to_numpy(model.sample(config.k, _generator(config.seed))).astype(int)
    shown = states if config.coding == "pm1" else (states + 1) // 2
    lines = [",".join(f"x{i}" for i in range(model.n)), *(",".join(map(str, row)) for row in shown.tolist())]
    _write_text(session, "samples.csv", lines)
    return Outcome(
        notes=[
            f"{config.k} states of {model.n} spins, mean energy {float(np.mean(to_numpy(model.energy(states)))):.4f}"
        ]
    )


# ---- fit and evaluate


class FitConfig(CommandConfig):
    """Settings of ``fit``."""

    data: Path = argument("table of 0/1 or -1/1 values (CSV or NPZ), a row an observation")
    l2: float = Field(1e-2, ge=0, description="penalty on couplings and fields")
    loss: Literal["pseudo", "likelihood"] = Field("pseudo", description="pseudo-likelihood, or the likelihood itself")
    coding: Literal["auto", "01", "pm1"] = Field("auto", description="what the values mean")
    held_out: float = Field(0.25, ge=0, lt=1, description="share of the rows kept to evaluate on")
    budget: float = Field(30.0, gt=0, description="seconds log Z may take")


@line.command(FitConfig)
def fit(config: FitConfig, session: Session) -> Outcome:
    """Learn an Ising network from binary data; writes model.npz and a picture, and its held-out log-likelihood."""
    import numpy as np

    from spectral_mf.formats import read_spins, write_model
    from spectral_mf.learn import IsingModel
    from spectral_mf.plots import plot_model

    X = _complete(read_spins(config.data, coding=config.coding), config.data)
    order = np.random.default_rng(config.seed).permutation(len(X))
    held = order[: round(config.held_out * len(X))]
    train = np.setdiff1d(order, held)
    if len(train) < 2:
        raise InputError(f"{config.data}: {len(train)} rows are left to learn from; lower --held-out or give more rows")
    model = IsingModel(l2=config.l2, loss=config.loss, coding="pm1", random_state=config.seed).fit(X[train])
    A, b = np.asarray(model.A_), np.asarray(model.b_)
    write_model(session.run.artifact("model.npz"), A, b)
    plot_model(session.run.artifact("model.png"), A, b)
    results: list[Result] = []
    notes = [f"{len(train)} rows, {X.shape[1]} spins; model.npz goes into logz, bounds, marginals, sample, evaluate"]
    parts = [("training", train), ("held out", held)] if len(held) else [("training", train)]
    from spectral_mf.model import Ising

    fitted = Ising(A, b)
    found = fitted.log_partition(budget_s=config.budget, generator=_generator(config.seed))
    for name, rows in parts:
        results += _likelihood_rows(config.data.stem, name, np.asarray(fitted.energy(X[rows])), found)
    notes.append(f"log Z = {_float(found.value):.6g} by {found.method}")
    return Outcome(results, notes=notes)


def _complete(X: np.ndarray, path: Path) -> np.ndarray:
    import numpy as np

    missing = np.isnan(X)
    if missing.any():
        row, column = (int(i) for i in np.argwhere(missing)[0])
        raise InputError(f"{path}: row {row + 1}, column {column + 1} is missing; leave out incomplete rows")
    return X


def _likelihood_rows(name: str, part: str, energies: np.ndarray, found: LogPartition) -> list[Result]:
    """Mean log-likelihood: its 95 % interval over rows, and what log Z's own doubt makes of it."""
    from shared_core.runs import interval

    mean, low, high = interval(energies.tolist())
    log_z = _float(found.value)
    row = summarize(
        [mean - log_z], dataset=name, method=part, metric="log-likelihood a row", unit="nats", better="higher"
    )
    if low is not None and high is not None:
        doubt = 0.0 if found.std_error is None else 1.96 * _float(found.std_error)
        half = (max(high - mean, mean - low) ** 2 + doubt**2) ** 0.5
        row = row.model_copy(update={"low": mean - log_z - half, "high": mean - log_z + half, "n": len(energies)})
    rows = [row]
    for kind, bound, better in (
        ("certified lower bound", found.upper, "higher"),
        ("certified upper bound", found.lower, "lower"),
    ):
        if _finite(_float(bound)) is not None:
            rows.append(_row(name, part, f"log-likelihood a row, {kind}", mean - _float(bound), better))
    return rows


class EvaluateConfig(ModelOptions):
    """Settings of ``evaluate``."""

    model: Path = argument("model: .npz, .csv (edges), .uai, .mat; or an RBM: .npz or .safetensors with W, bv, bh")
    data: Path = argument("table of 0/1 or -1/1 values (CSV or NPZ), a row an observation")
    coding: Literal["auto", "01", "pm1"] = Field("auto", description="what the values mean")
    budget: float = Field(30.0, gt=0, description="seconds log Z may take")


@line.command(EvaluateConfig)
def evaluate(config: EvaluateConfig, session: Session) -> Outcome:
    """Held-out log-likelihood of a model (an RBM too) with its interval."""
    import numpy as np

    from spectral_mf.formats import read_model, read_spins
    from spectral_mf.model import Ising

    arrays = read_model(config.model, **_reading(config))
    X = _complete(read_spins(config.data, coding=config.coding), config.data)
    random = _generator(config.seed)
    if arrays.rbm is not None:
        from spectral_mf.rbm import RBM

        machine = RBM.from_arrays(*arrays.rbm)
        if X.shape[1] != len(arrays.rbm[1]):
            raise InputError(f"{config.data}: {X.shape[1]} columns, but the RBM has {len(arrays.rbm[1])} visible units")
        fitted = Ising(*machine.to_ising())
        energies = -np.asarray(machine.free_energy((X + 1) / 2))
    else:
        model = Ising(arrays.A, arrays.b, arrays.const)
        if X.shape[1] != model.n:
            raise InputError(f"{config.data}: {X.shape[1]} columns, but the model has {model.n} spins")
        fitted = model
        energies = np.asarray(model.energy(X))
    found = _placed(fitted, session).log_partition(budget_s=config.budget, generator=random)
    notes = [f"log Z = {_float(found.value):.8g} by {found.method}; {len(X)} rows"]
    notes += [f"warning: {text}" for text in found.warnings]
    return Outcome(_likelihood_rows(config.data.stem, config.model.stem, energies, found), notes=notes)


# ---- convert, generate, plot


class ConvertConfig(ModelOptions):
    """Settings of ``convert``."""

    model: Path = argument("model to read: .npz, .csv (edges), .uai, .mat, .safetensors")
    to: Path = argument("file to write: .npz, .csv, .uai, .safetensors")


@line.command(ConvertConfig)
def convert(config: ConvertConfig, session: Session) -> Outcome:
    """Write a model in another format; log Z stays what it is."""
    del session
    model = _read(config.model, config)
    model.save(config.to)
    return Outcome(notes=[f"{model} -> {config.to}"])


class GenerateConfig(CommandConfig):
    """Settings of ``generate``."""

    family: Literal["complete", "er", "grid", "sk", "hopfield", "rbm", "ferromagnet", "chain"] = Field(
        "complete", description="kind of model"
    )
    n: int = Field(20, ge=1, description="spins")
    strength: float = Field(1.0, ge=0, description="coupling strength, as the family defines it")
    file: Path | None = Field(None, description="file to write (default: model.npz in the run folder)")


@line.command(GenerateConfig)
def generate(config: GenerateConfig, session: Session) -> Outcome:
    """Draw a model of a family: complete and er follow the paper's protocol."""
    from spectral_mf.generators import generate as draw
    from spectral_mf.model import Ising

    model = Ising(*draw(config.family, config.n, config.strength, config.seed))
    path = config.file or session.run.artifact("model.npz")
    model.save(path)
    return Outcome(notes=[f"{model} -> {path}"])


class PlotConfig(CommandConfig):
    """Settings of ``plot``."""

    run: Path = argument("run folder of any command or its summary.json; or a model file, to draw its couplings")
    kind: Literal["png", "svg", "pdf"] = Field("png", description="kind of picture")


@line.command(PlotConfig)
def plot(config: PlotConfig, session: Session) -> Outcome:
    """Draw a finished run again, or a model's couplings and fields."""
    import numpy as np

    from spectral_mf.plots import plot_comparison, plot_model

    if config.run.suffix in {".npz", ".csv", ".uai", ".mat", ".safetensors"}:
        from spectral_mf.model import Ising

        model = Ising.from_file(config.run)
        if model.n > 2000:
            raise InputError(f"{config.run}: {model.n} spins are too many to draw as a matrix (2000 at most)")
        A = model.A if isinstance(model.A, np.ndarray) else model.A.toarray()
        plot_model(session.run.artifact(f"model.{config.kind}"), A, np.asarray(model.b))
    else:
        plot_comparison(session.run.artifact(f"comparison.{config.kind}"), read_summary(config.run).results)
    return Outcome()


if __name__ == "__main__":
    main()
