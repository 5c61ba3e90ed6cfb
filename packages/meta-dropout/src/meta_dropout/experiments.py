"""Compare methods on the same episodes: trained alike, tuned with the same number of trials."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypedDict

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from meta_dropout.attacks import robustness_curve
from meta_dropout.backbones import conv4
from meta_dropout.data import NAMES, ClassImages, TaskSource, load
from meta_dropout.engine import Tasks
from meta_dropout.learner import MetaLearner, Step
from meta_dropout.methods import METHODS, Method, find_method
from shared_core.classes import OTHER_DOMAINS
from shared_core.device import one_thread
from shared_core.errors import InputError, no_such
from shared_core.runs import Claim, Result, Run, summarize

__all__ = [
    "PIXELS",
    "Cell",
    "Protocol",
    "Splits",
    "compare",
    "load_splits",
    "make_learner",
    "noise_use",
    "paired",
    "pixel_prototypes",
    "robustness",
    "train",
    "tune",
]

# Nearest class mean of raw pixels: what everything that learns must beat.
PIXELS = "pixels"


@dataclass(frozen=True)
class Protocol:
    """What methods that are compared have in common.

    Parameters
    ----------
    ways, shots, queries : of a task; `test_queries` at test time
    disjoint : take queries from other groups (typefaces) than the support
    size, filters, blocks, init : of the network
    norm : how queries are normalised: ``batch`` by their own statistics (transductive, as in the authors' code),
        ``support`` by the support's (inductive)
    inner_steps, inner_lr : of the adaptation
    samples : Monte Carlo samples of the noise in each inner step at test time
    steps, meta_batch, outer_lr : of the training; Adam
    episodes : to test on, the same ones for every method
    trials : settings tried for every method, if it is tuned
    tune_share : part of `steps` that a trial trains
    """

    ways: int = 5
    shots: int = 1
    queries: int = 15
    test_queries: int = 15
    disjoint: bool = False
    size: int = 20
    filters: int = 16
    blocks: int = 4
    init: Literal["tf", "kaiming"] = "tf"
    norm: Literal["batch", "support"] = "batch"
    inner_steps: int = 3
    inner_lr: float = 0.1
    samples: int = 10
    steps: int = 1500
    meta_batch: int = 4
    outer_lr: float = 1e-3
    episodes: int = 400
    trials: int = 3
    tune_share: float = 0.3

    def network(self, channels: int, seed: int) -> dict[str, Any]:
        """Arguments of :func:`meta_dropout.conv4` for images of so many channels."""
        return {
            "ways": self.ways,
            "channels": channels,
            "size": self.size,
            "filters": self.filters,
            "blocks": self.blocks,
            "seed": seed,
            "init": self.init,
        }


@dataclass(frozen=True, eq=False)
class Splits:
    """Classes to train on, to choose by, and to test on; none in two of them."""

    train: ClassImages
    validation: ClassImages
    test: ClassImages
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def channels(self) -> int:
        """Of the images."""
        return self.train.shape[0]


class Cell(TypedDict):
    """What one method did under one seed; plain JSON."""

    accuracy: list[float]
    loss: float
    calibration_error: float
    train_seconds: float
    step_ms: float
    skipped: int
    setting: dict[str, float]


def load_splits(source: str, size: int, *, seed: int = 0, **options: Any) -> Splits:
    """Load all three splits of a source at one size and with the channels of its training images.

    Parameters
    ----------
    source : as :func:`meta_dropout.data.load` takes it
    size : side in pixels
    seed : of the splits
    options : others of ``load``

    Raises
    ------
    InputError
        For a source that has the same classes in every split, and all that ``load`` refuses.
    """
    name = source.lower().replace("_", "-")
    if name in OTHER_DOMAINS and name != "hershey":
        raise InputError(
            f"{source}: its classes are the same in every split, and test tasks must be about new classes; train on"
            f" {', '.join(NAMES)}, hershey, a folder or an NPZ, and test on {source} by 'evaluate --data'"
        )
    first = load(source, split="train", size=size, seed=seed, **options)
    channels = first.shape[0]
    more: dict[str, Any] = {**options, "channels": channels if channels in (1, 3) else None}
    rest = [load(source, split=split, size=size, seed=seed, **more) for split in ("validation", "test")]
    return Splits(first, rest[0], rest[1], options)


def make_learner(
    name: str,
    protocol: Protocol,
    channels: int,
    *,
    seed: int = 0,
    setting: Mapping[str, float] = {},
    device: torch.device | str = "cpu",
    chunk: int | None = None,
) -> MetaLearner:
    """Make an untrained learner.

    Parameters
    ----------
    name : a method, of :data:`meta_dropout.methods.METHODS`
    protocol : its network and adaptation
    channels : of the images
    seed : of weights and noise
    setting : options of the method to change (``penalty``, ``rate``, ``mixup``), and ``inner_lr``
    device, chunk : as :class:`meta_dropout.MetaLearner` takes them
    """
    method: Method = find_method(name)
    own = {key: value for key, value in setting.items() if key in {"penalty", "rate", "mixup"}}
    made = MetaLearner(
        conv4(**protocol.network(channels, seed)),
        replace(method, **own) if own else name,
        inner_lr=setting.get("inner_lr", protocol.inner_lr),
        inner_steps=protocol.inner_steps,
        test_samples=protocol.samples,
        statistics=protocol.norm,
        seed=seed,
        device=device,
        chunk=chunk,
    )
    made.method_name = name
    return made


def source_of(images: ClassImages, protocol: Protocol, *, seed: int, test: bool = False) -> TaskSource:
    """Tasks of a split under a protocol.

    Parameters
    ----------
    images : the split
    protocol : ways, shots and queries
    seed : of the episodes
    test : take the number of queries for tests
    """
    queries = protocol.test_queries if test else protocol.queries
    return TaskSource(images, protocol.ways, protocol.shots, queries, seed=seed, disjoint=protocol.disjoint)


def train(
    learner: MetaLearner,
    images: ClassImages,
    protocol: Protocol,
    *,
    seed: int,
    setting: Mapping[str, float] = {},
    steps: int | None = None,
    on_step: Callable[[Step], None] | None = None,
    **more: Any,
) -> list[Step]:
    """Train a learner on the tasks of a split.

    Parameters
    ----------
    learner : changed in place
    images : training classes
    protocol : how long, how many at a time
    seed : of the episodes
    setting : ``outer_lr`` to change
    steps : meta-steps instead of the protocol's
    on_step : called after each
    more : of :meth:`MetaLearner.fit`
    """
    return learner.fit(
        source_of(images, protocol, seed=seed),
        steps=protocol.steps if steps is None else steps,
        meta_batch=protocol.meta_batch,
        outer_lr=setting.get("outer_lr", protocol.outer_lr),
        on_step=on_step,
        **more,
    )


def settings_of(name: str, protocol: Protocol) -> list[dict[str, float]]:
    """List the settings to try: as many for every method, so that nobody is tuned more.

    Parameters
    ----------
    name : a method
    protocol : how many
    """
    own = [{key: value} for key, values in find_method(name).tune.items() for value in values]
    rates = [{"outer_lr": protocol.outer_lr * factor} for factor in (1.0, 3.0, 1 / 3, 10.0, 0.1)]
    # The method's own options first, at the protocol's step size; then step sizes.
    candidates = [*own[: max(protocol.trials - 1, 0)], *rates] if own else rates
    return candidates[: protocol.trials]


def tune(
    name: str, splits: Splits, protocol: Protocol, *, seed: int, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """Choose a setting by the accuracy on validation classes after a part of the training.

    Parameters
    ----------
    name : a method
    splits : of which the test classes are not looked at
    protocol : the trials
    seed : of everything
    device : where
    """
    candidates = settings_of(name, protocol)
    if len(candidates) < 2:
        return candidates[0] if candidates else {}
    steps = max(1, round(protocol.tune_share * protocol.steps))
    judge = source_of(splits.validation, protocol, seed=seed + 7919, test=True)
    found: list[float] = []
    with one_thread(str(device) == "cpu"):
        for setting in candidates:
            learner = make_learner(name, protocol, splits.channels, seed=seed, setting=setting, device=device)
            train(learner, splits.train, protocol, seed=seed, setting=setting, steps=steps)
            found.append(learner.evaluate(judge, episodes=min(100, protocol.episodes)).mean)
    return candidates[int(np.argmax(found))]


def pixel_prototypes(tasks: Tasks) -> Float[Tensor, "tasks m ways"]:
    """Minus squared distances of pixels to the class means of the support; nothing is learned.

    Parameters
    ----------
    tasks : images
    """
    ways = int(tasks.support_labels.max()) + 1
    support, asked = tasks.support.flatten(2), tasks.query.flatten(2)
    chosen = torch.nn.functional.one_hot(tasks.support_labels, ways).to(support.dtype)
    centre = chosen.mT @ support / chosen.sum(1).unsqueeze(2)
    return -torch.cdist(asked, centre).square()


def _pixels(splits: Splits, protocol: Protocol, seed: int) -> Cell:
    source, batch = source_of(splits.test, protocol, seed=seed + 1, test=True), 20
    right: list[float] = []
    loss: list[float] = []
    for number in range(-(-protocol.episodes // batch)):
        tasks = source.batch(number, batch)
        logits = pixel_prototypes(tasks)
        right += (logits.argmax(-1) == tasks.query_labels).double().mean(1).tolist()
        loss += torch.vmap(torch.nn.functional.cross_entropy)(logits, tasks.query_labels).tolist()
    return {
        "accuracy": right[: protocol.episodes],
        "loss": float(np.mean(loss[: protocol.episodes])),
        "calibration_error": 0.0,
        "train_seconds": 0.0,
        "step_ms": 0.0,
        "skipped": 0,
        "setting": {},
    }


def _silent(note: str, steps: int) -> None:
    del note, steps


def compare(
    run: Run,
    splits: Splits,
    *,
    methods: Sequence[str],
    seeds: Sequence[int],
    protocol: Protocol,
    tuned: bool = False,
    device: torch.device | str = "cpu",
    advance: Callable[[str, int], None] = _silent,
    on_learner: Callable[[Run, str, int, MetaLearner, list[Step]], None] | None = None,
) -> tuple[list[Result], list[Claim], dict[str, dict[int, Cell]]]:
    """Train every method under every seed, and test all of a seed on the same episodes.

    Parameters
    ----------
    run : keeps what is done, so that an interrupted comparison repeats only the piece it was in
    splits : the classes
    methods : names, :data:`PIXELS` among them if wanted
    seeds : of weights, episodes and noise
    protocol : what they have in common
    tuned : choose each method's setting on validation classes under the first seed, with the same number of trials
    device : where
    advance : called with a note after each piece
    on_learner : called with the run, each trained learner (its method, its seed, itself) and its history, in a worker
        where one trains; what it keeps goes into that run. Not for what a resumed run had done before

    Returns
    -------
    Results for the table, claims, and the cells by method and seed.
    """
    for name in methods:
        if name != PIXELS and name not in METHODS:
            raise no_such("method", name, [PIXELS, *METHODS])
    if not seeds:
        raise InputError("seeds: need at least one")
    tuning = {
        f"setting/{name}": partial(tune, name, splits, protocol, seed=seeds[0], device=device)
        for name in methods
        if tuned and name != PIXELS
    }
    settings = run.each(tuning)
    parts: dict[str, Callable[[Run], Cell]] = {}
    for seed in seeds:
        for name in methods:
            setting = settings.get(f"setting/{name}", {})
            parts[f"{name}/{seed}"] = partial(
                _train_and_test, name=name, splits=splits, protocol=protocol, seed=seed, setting=setting,
                device=device, on_learner=on_learner,
            )  # fmt: skip

    def tell(key: str) -> None:
        advance(f"{key.partition('/')[0]}: {100 * np.mean(parts[key](run)['accuracy']):.1f} %", 1)

    run.spread_parts(parts, tell)
    cells: dict[str, dict[int, Cell]] = {name: {} for name in methods}
    for key, part in parts.items():
        name, _, seed = key.partition("/")
        cells[name][int(seed)] = part(run)
        if not run.spreads:
            tell(key)
    return _rows(splits.test.name, protocol, cells), paired(cells), cells


def _train_and_test(
    run: Run,
    *,
    name: str,
    splits: Splits,
    protocol: Protocol,
    seed: int,
    setting: Mapping[str, float],
    device: torch.device | str,
    on_learner: Callable[[Run, str, int, MetaLearner, list[Step]], None] | None,
) -> Cell:
    def compute() -> Cell:
        if name == PIXELS:
            return _pixels(splits, protocol, seed)
        watch = None if on_learner is None else partial(on_learner, run)
        with one_thread(str(device) == "cpu"):
            return _cell(name, splits, protocol, seed, setting, device, watch)

    return run.once(f"{name}/{seed}", compute)


def _cell(
    name: str,
    splits: Splits,
    protocol: Protocol,
    seed: int,
    setting: Mapping[str, float],
    device: torch.device | str,
    on_learner: Callable[[str, int, MetaLearner, list[Step]], None] | None,
) -> Cell:
    learner = make_learner(name, protocol, splits.channels, seed=seed, setting=setting, device=device)
    started = time.perf_counter()
    history = train(learner, splits.train, protocol, seed=seed, setting=setting)
    seconds = time.perf_counter() - started
    found = learner.evaluate(source_of(splits.test, protocol, seed=seed + 1, test=True), episodes=protocol.episodes)
    if on_learner is not None:
        on_learner(name, seed, learner, history)
    return {
        "accuracy": found.accuracy.tolist(),
        "loss": float(found.loss.mean()),
        "calibration_error": found.calibration_error,
        "train_seconds": seconds,
        "step_ms": 1000 * seconds / max(protocol.steps, 1),
        "skipped": learner.skipped,
        "setting": dict(setting),
    }


def _rows(name: str, protocol: Protocol, cells: Mapping[str, Mapping[int, Cell]]) -> list[Result]:
    dataset = f"{name}, {protocol.ways}-way {protocol.shots}-shot, {protocol.norm} statistics"
    found: list[Result] = []
    measures: tuple[tuple[str, str, Literal["lower", "higher"], Callable[[Cell], float]], ...] = (
        ("accuracy", "%", "higher", lambda cell: 100 * float(np.mean(cell["accuracy"]))),
        ("query loss", "1", "lower", lambda cell: cell["loss"]),
        ("calibration error", "1", "lower", lambda cell: cell["calibration_error"]),
        ("meta-step", "ms", "lower", lambda cell: cell["step_ms"]),
    )
    for metric, unit, better, of in measures:
        for method, by_seed in cells.items():
            if method == PIXELS and metric != "accuracy":
                continue
            values = [of(cell) for cell in by_seed.values()]
            seconds = sum(cell["train_seconds"] for cell in by_seed.values())
            found.append(
                summarize(
                    values, dataset=dataset, method=method, metric=metric, unit=unit, better=better, seconds=seconds
                )
            )
    return found


def paired(cells: Mapping[str, Mapping[int, Cell]], ours: str = "meta-dropout") -> list[Claim]:
    """Hold our method against each other one on the same episodes: mean difference with its 95 % interval.

    Parameters
    ----------
    cells : by method and seed
    ours : method to hold against the others
    """
    if ours not in cells:
        return []
    claims: list[Claim] = []
    for other, by_seed in cells.items():
        shared = [seed for seed in by_seed if seed in cells[ours]]
        if other == ours or not shared:
            continue
        gap = 100 * np.concatenate(
            [np.subtract(cells[ours][seed]["accuracy"], by_seed[seed]["accuracy"]) for seed in shared]
        )
        half = 1.96 * float(gap.std()) / np.sqrt(len(gap))
        claims.append(
            Claim(
                text=f"{ours} is more accurate than {other} on the same {len(gap)} episodes: {gap.mean():+.2f} ±"
                f" {half:.2f} points (over episodes; the spread over trainings is in the table)",
                source="this project",
                holds=bool(gap.mean() - half > 0),
                value=float(gap.mean()),
                threshold=0.0,
            )
        )
    return claims


def robustness(
    learner: MetaLearner,
    source: TaskSource,
    norm: Literal["l1", "l2", "linf"],
    radii: Sequence[float],
    *,
    episodes: int = 50,
    batch: int = 10,
    steps: int = 20,
    seed: int = 0,
    kind: Literal["pgd", "fgsm"] = "pgd",
    on_batch: Callable[[int], None] | None = None,
) -> Float[np.ndarray, "radii episodes"]:
    """Accuracy of adapted models on attacked queries; the first radius of the answer is 0.

    Parameters
    ----------
    learner : trained
    source : of test tasks
    norm, radii : of the attack
    episodes, batch : how many, and at a time
    steps, kind : of the attack
    seed : of the noise and of the attack's starts
    on_batch : called with the number of episodes done
    """
    found: list[np.ndarray] = []
    done = 0
    while done < episodes:
        tasks = source.batch(done // batch, batch).part(0, min(batch, episodes - done)).to(learner.device)
        seeds = [seed + (1 << 30) + done + k for k in range(len(tasks))]
        curve = robustness_curve(
            learner.answering(tasks, seeds),
            tasks.query,
            tasks.query_labels,
            norm,
            list(radii),
            steps=steps,
            seed=seed + done,
            kind=kind,
        )
        found.append(np.asarray(curve.per_task))
        done += len(tasks)
        if on_batch is not None:
            on_batch(done)
    return np.concatenate(found, axis=1)


def noise_use(
    learner: MetaLearner,
    source: TaskSource,
    *,
    samples: Sequence[int] = (1, 10, 30),
    draws: int = 3,
    episodes: int = 100,
    batch: int = 20,
    seed: int = 0,
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, Float[np.ndarray, "draws episodes"]]:
    """Accuracy of adaptations that use the learned noise in other ways, all on the same episodes.

    Parameters
    ----------
    learner : trained
    source : of test tasks
    samples : Monte Carlo samples of the noise in each inner step
    draws : of all the noise, to see how much the answer hangs on it
    episodes, batch : how many, and at a time
    seed : of the shuffling
    on_batch : called with the number of episodes done, over all variants

    Returns
    -------
    By variant: ``no noise``; ``S = 1`` and so on; ``generators shuffled``, whose weights are permuted within each
    tensor, so that they are as large as before and know nothing.
    """
    whole = episodes * (2 + draws * len(samples))
    done = 0

    def measured(judged: MetaLearner, **options: Any) -> np.ndarray:
        nonlocal done
        before = done

        def after(count: int) -> None:
            nonlocal done
            done = before + count
            if on_batch is not None:
                on_batch(min(done, whole))

        return judged.evaluate(source, episodes=episodes, batch=batch, on_batch=after, **options).accuracy

    found = {"no noise": measured(learner, sample=False)[None]}
    for count in samples:
        found[f"S = {count}"] = np.stack([measured(learner, samples=count, noise_seed=draw) for draw in range(draws)])
    shuffled = copy.deepcopy(learner)
    generator = torch.Generator().manual_seed(seed)
    for parameter in shuffled.model.role("phi").values():
        order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
        parameter.data = parameter.data.flatten()[order].view_as(parameter)
    found["generators shuffled"] = measured(shuffled, samples=max(samples))[None]
    return found
