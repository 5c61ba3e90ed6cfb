"""Compare methods on the same any-shot episodes: trained alike, tuned with the same number of trials."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypedDict

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from bayes_taml.baselines import pixel_means
from bayes_taml.data import AnyShotSource, ClassImages, Mode, load_classes
from bayes_taml.learner import Evaluation, MetaLearner, Step
from bayes_taml.methods import METHODS, find_method
from bayes_taml.metrics import SizeBin, accuracy_by_size, paired_interval, reliability
from bayes_taml.networks import conv_features
from shared_core.classes import NAMES, OTHER_DOMAINS, SplitBy
from shared_core.device import one_thread
from shared_core.episodes import TooFewItemsError
from shared_core.errors import InputError, no_such
from shared_core.runs import Claim, Result, Run, summarize

__all__ = [
    "FAR",
    "PIXELS",
    "Answers",
    "Cell",
    "Protocol",
    "Splits",
    "answers_of",
    "balanced",
    "compare",
    "instances_for",
    "load_splits",
    "make_learner",
    "paired",
    "pooled_answers",
    "pooled_bins",
    "pooling_study",
    "settings_of",
    "shots_study",
    "shuffled_counts",
    "size_edges",
    "source_of",
    "sources_of",
    "train",
    "tune",
]

PIXELS = "pixels"
"""Nearest class mean of raw pixels: what everything that learns must beat."""

FAR = "far"
"""Another domain by name: Hershey's Japanese, astrology and music, which no training on Hershey's glyphs sees."""

_DRAWN = ("glyphs", "hershey")
# Methods that differ at test time alone share the training of one of them.
_TRAINED_AS = {"naive-taml": "bayesian-taml"}
_VALIDATION_SEED = 7919


@dataclass(frozen=True)
class Protocol:
    """What methods that are compared have in common.

    Parameters
    ----------
    ways : classes of a task
    shots : fewest and most support images of a class
    queries, test_queries : query images of each class, in training and at test time
    mode : how shots differ, see :class:`bayes_taml.AnyShotSource`
    size, filters, blocks, init, net_norm : of the network, see :func:`bayes_taml.conv_features`
    norm : how queries are normalised: ``batch`` by their own statistics (transductive, as in the authors' code),
        ``support`` by the support's (inductive)
    inner_lr : step size of adaptation, or the first value where it is learned
    inner_steps, test_steps : of an adaptation in training and at test time
    samples : of the balancing variables at test time
    pooling : statistics that the inference network sees
    deviation : where the deviations of the balancing variables start; None is the paper's 0.69, with which training of
        this length is too noisy
    steps, meta_batch, outer_lr : of the training; Adam
    episodes : to test on, the same ones for every method
    trials : settings tried for every method, if it is tuned
    tune_share : part of `steps` that a trial trains
    validate_every : steps between judgements on validation classes, of which the best is kept; 0 for none
    """

    ways: int = 5
    shots: tuple[int, int] = (1, 10)
    queries: int = 5
    test_queries: int = 10
    mode: Mode = "mixed"
    size: int = 14
    filters: int = 16
    blocks: int = 2
    init: Literal["tf", "kaiming"] = "kaiming"
    norm: Literal["batch", "support"] = "batch"
    net_norm: Literal["batch", "film", "group"] = "batch"
    inner_lr: float = 0.1
    inner_steps: int = 3
    test_steps: int = 3
    samples: int = 10
    pooling: tuple[str, ...] = ("mean", "var", "n")
    deviation: float | None = 0.1
    steps: int = 400
    meta_batch: int = 4
    outer_lr: float = 1e-2
    episodes: int = 400
    trials: int = 3
    tune_share: float = 0.3
    validate_every: int = 0

    def __post_init__(self) -> None:
        """Refuse shots that no task can have."""
        if not 1 <= self.shots[0] <= self.shots[1]:
            raise InputError(f"shots: the fewest must be 1 or more and not above the most, got {self.shots}")

    @property
    def largest(self) -> int:
        """Images of a class that the largest task takes."""
        return self.shots[1] + max(self.queries, self.test_queries)

    @property
    def bins(self) -> tuple[int, ...]:
        """Edges of the bins of class sizes that accuracy is reported in."""
        return size_edges(self.shots)

    def network(self, channels: int, seed: int) -> dict[str, Any]:
        """Return arguments of :func:`bayes_taml.conv_features` for images of so many channels.

        Parameters
        ----------
        channels : of the images
        seed : of the initial weights
        """
        return {
            "channels": channels,
            "size": self.size,
            "filters": self.filters,
            "blocks": self.blocks,
            "norm": self.net_norm,
            "seed": seed,
            "init": self.init,
        }


def size_edges(shots: tuple[int, int]) -> tuple[int, ...]:
    """Return edges of bins of class sizes: 1, 3, 5, 10, 30, 50, 100 ... within the fewest and the most.

    Parameters
    ----------
    shots : fewest and most

    Examples
    --------
    >>> size_edges((1, 50)), size_edges((5, 5))
    ((1, 3, 5, 10, 30, 50), (5, 5))
    """
    low, high = shots
    edges = [base * 10**power for power in range(7) for base in (1, 3, 5)]
    return (low, *(edge for edge in edges if low < edge < high), high)


@dataclass(frozen=True, eq=False)
class Splits:
    """Classes to train on, to choose by, and to test on, none in two of them; and other domains to test on.

    Parameters
    ----------
    train, validation, test : of one source
    others : sets by name, of which nothing is seen in training or chosen by
    """

    train: ClassImages
    validation: ClassImages
    test: ClassImages
    others: Mapping[str, ClassImages] = field(default_factory=dict[str, ClassImages])

    @property
    def channels(self) -> int:
        """Of the images."""
        return self.train.shape[0]


class SizeRow(TypedDict):
    """A :class:`bayes_taml.metrics.SizeBin` as plain JSON; ``half`` is null for a single episode."""

    low: int
    high: int
    mean: float
    half: float | None
    n: int


class Answers(TypedDict):
    """How one learner did on one test set; plain JSON.

    ``accuracy`` and ``nll`` have a number an episode. A row of ``reliability`` is a bin of confidence: mean confidence,
    share of right answers, answers.
    """

    accuracy: list[float]
    nll: list[float]
    ece: float
    sizes: list[SizeRow]
    reliability: list[list[float]]
    diverged: int
    held: int


class Cell(TypedDict):
    """What one method did under one seed, by name of the test set; plain JSON."""

    tests: dict[str, Answers]
    train_seconds: float
    step_ms: float
    skipped: int
    setting: dict[str, float]


def _plain_name(source: str) -> str:
    return source.lower().replace("_", "-")


def instances_for(source: str, instances: int | None, least: int) -> int | None:
    """Return how many images of each class to take: of sources that are drawn, as many as the largest task needs.

    Parameters
    ----------
    source : as :func:`load_splits` takes it
    instances : what was asked for, or None
    least : images of a class that the largest task takes
    """
    drawn = _plain_name(source) in (*_DRAWN, FAR)
    return max(20, least) if instances is None and drawn else instances


def load_splits(
    source: str,
    size: int,
    *,
    seed: int = 0,
    split_by: SplitBy | None = None,
    classes: int | None = None,
    instances: int | None = None,
    channels: Literal[1, 3] | None = None,
    others: Sequence[str] = (),
    least: int = 20,
) -> Splits:
    """Load all three splits of a source at one size, and other domains to test on, all with the same channels.

    Parameters
    ----------
    source : as :func:`bayes_taml.load` takes it, but for sets that have the same classes in every split
    size : side in pixels
    seed : of the splits
    split_by, classes, channels : as of ``load``
    instances : most images of a class; of glyphs and Hershey as many are drawn. Default: all, or `least` drawn ones
    others : further sources, of which the test split is taken; :data:`FAR` is Hershey's far test
    least : images of a class that the largest task takes

    Raises
    ------
    InputError
        For a source that has the same classes in every split, two other domains of one name, and all that ``load``
        refuses.
    """
    if _plain_name(source) in OTHER_DOMAINS and _plain_name(source) != "hershey":
        raise InputError(
            f"{source}: its classes are the same in every split, and test tasks must be about new classes; train on"
            f" {', '.join(NAMES)}, hershey, a folder or an NPZ, and test on {source} as another domain"
        )
    more: dict[str, Any] = {"size": size, "seed": seed, "split_by": split_by, "classes": classes}
    more["instances"] = instances_for(source, instances, least)
    first = load_classes(source, split="train", channels=channels, **more)
    same: Any = first.shape[0]
    validation, test = (load_classes(source, split=split, channels=same, **more) for split in ("validation", "test"))
    found: dict[str, ClassImages] = {}
    for other in others:
        far = other == FAR
        loaded = load_classes(
            "hershey" if far else other,
            split="test",
            size=size,
            seed=seed,
            split_by="script" if far else None,
            instances=instances_for(other, instances, least),
            channels=same,
        )
        name = FAR if far else loaded.name
        if name in found:
            raise InputError(f"others: two of them are called '{name}'; rename one")
        found[name] = replace(loaded, name=name)
    return Splits(first, validation, test, found)


def make_learner(
    name: str,
    protocol: Protocol,
    channels: int,
    *,
    seed: int = 0,
    setting: Mapping[str, float] = {},
    device: torch.device | str = "cpu",
    **more: Any,
) -> MetaLearner:
    """Make an untrained learner.

    Parameters
    ----------
    name : a method, of :data:`bayes_taml.METHODS`
    protocol : its network and adaptation
    channels : of the images
    seed : of weights and samples
    setting : ``inner_lr`` to change
    device : where
    more : of :class:`bayes_taml.MetaLearner`
    """
    find_method(name)
    return MetaLearner(
        conv_features(**protocol.network(channels, seed)),
        name,
        input_shape=(channels, protocol.size, protocol.size),
        inner_lr=setting.get("inner_lr", protocol.inner_lr),
        inner_steps=protocol.inner_steps,
        test_steps=protocol.test_steps,
        samples=protocol.samples,
        max_shot=protocol.shots[1],
        pooling=protocol.pooling,
        deviation=protocol.deviation,
        statistics=protocol.norm,
        seed=seed,
        device=device,
        **more,
    )


def source_of(
    images: ClassImages,
    protocol: Protocol,
    *,
    seed: int,
    test: bool = False,
    mode: Mode | None = None,
    shots: tuple[int, int] | None = None,
) -> AnyShotSource:
    """Tasks of a split under a protocol.

    Parameters
    ----------
    images : the split
    protocol : ways, shots, queries and mode
    seed : of the episodes
    test : take the number of queries for tests
    mode, shots : instead of the protocol's
    """
    return AnyShotSource(
        images,
        protocol.ways,
        shots or protocol.shots,
        protocol.test_queries if test else protocol.queries,
        mode=mode or protocol.mode,
        seed=seed,
    )


def train(
    learner: MetaLearner,
    images: ClassImages,
    protocol: Protocol,
    *,
    seed: int,
    setting: Mapping[str, float] = {},
    steps: int | None = None,
    validation: ClassImages | None = None,
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
    validation : classes to judge by every ``validate_every`` steps of the protocol
    on_step : called after each
    more : of :meth:`MetaLearner.fit`
    """
    judge = None
    if validation is not None and protocol.validate_every:
        judge = source_of(validation, protocol, seed=seed + _VALIDATION_SEED, test=True)
    return learner.fit(
        source_of(images, protocol, seed=seed),
        steps=protocol.steps if steps is None else steps,
        meta_batch=protocol.meta_batch,
        outer_lr=setting.get("outer_lr", protocol.outer_lr),
        validation=judge,
        validate_every=protocol.validate_every,
        validation_tasks=min(100, protocol.episodes),
        on_step=on_step,
        **more,
    )


def settings_of(name: str, protocol: Protocol) -> list[dict[str, float]]:
    """List the settings to try: as many for every method, so that nobody is tuned more.

    Parameters
    ----------
    name : a method
    protocol : how many, and where they start from
    """
    method = find_method(name)
    inner = [(factor, 1.0) for factor in (3.0, 1 / 3, 10.0, 0.1)] if method.algorithm == "maml" else []
    outer = [(1.0, factor) for factor in (3.0, 1 / 3, 10.0, 0.1)]
    # Two of the one, two of the other: what is near the protocol's values comes first.
    order = [(1.0, 1.0), *inner[:2], *outer[:2], *inner[2:], *outer[2:]]
    found = [{"inner_lr": protocol.inner_lr * i, "outer_lr": protocol.outer_lr * o} for i, o in order]
    return found[: protocol.trials]


def tune(
    name: str, splits: Splits, protocol: Protocol, *, seed: int, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """Choose a setting by the accuracy on validation classes of the training's domain, after a part of the training.

    Parameters
    ----------
    name : a method
    splits : of which neither the test classes nor the other domains are looked at
    protocol : the trials
    seed : of everything
    device : where
    """
    candidates = settings_of(name, protocol)
    if len(candidates) < 2 or find_method(name).algorithm == "scratch":
        return candidates[0] if candidates else {}
    steps = max(1, round(protocol.tune_share * protocol.steps))
    judge = source_of(splits.validation, protocol, seed=seed + _VALIDATION_SEED, test=True)
    found: list[float] = []
    with one_thread(str(device) == "cpu"):
        for setting in candidates:
            learner = make_learner(name, protocol, splits.channels, seed=seed, setting=setting, device=device)
            try:
                train(learner, splits.train, protocol, seed=seed, setting=setting, steps=steps)
            except ArithmeticError:
                found.append(0.0)
                continue
            # At the means of the balancing variables, as the paper judges while it trains.
            found.append(learner.evaluate(judge, tasks=min(100, protocol.episodes), samples=0).mean)
    return candidates[int(np.argmax(found))]


# ---- what is kept of an evaluation


def answers_of(found: Evaluation, edges: Sequence[int]) -> Answers:
    """Return what to keep of an evaluation, as plain JSON.

    Parameters
    ----------
    found : of :meth:`MetaLearner.evaluate`
    edges : of the bins of class sizes
    """
    rows = found.rows()
    curve = reliability(found.probability[found.mask], found.labels[found.mask])
    return {
        "accuracy": found.accuracy.tolist(),
        "nll": found.loss.tolist(),
        "ece": found.calibration_error,
        "sizes": [
            {"low": b.low, "high": b.high, "mean": b.mean, "half": None if np.isnan(b.half) else b.half, "n": b.n}
            for b in accuracy_by_size(rows["right"], rows["class_size"], tuple(edges), rows["task"])
        ],
        "reliability": np.stack([curve.confidence, curve.accuracy, curve.n], 1).tolist(),
        "diverged": found.diverged,
        "held": found.held,
    }


def pooled_bins(answers: Iterable[Answers]) -> list[SizeBin]:
    """Put the accuracies by class size of several seeds together, as if their episodes were of one.

    Parameters
    ----------
    answers : of each seed
    """
    sums: dict[tuple[int, int], list[float]] = {}
    for each in answers:
        for row in each["sizes"]:
            mean, n, half = row["mean"], row["n"], row["half"]
            square = 0.0 if half is None else (half / 1.96) ** 2 * n
            total = sums.setdefault((row["low"], row["high"]), [0.0, 0.0, 0.0])
            for place, value in enumerate((n, n * mean, n * (square + mean**2))):
                total[place] += value
    bins: list[SizeBin] = []
    for (low, high), (n, first, second) in sorted(sums.items()):
        deviation = max(second / n - (first / n) ** 2, 0.0) ** 0.5
        half = 1.96 * deviation / n**0.5 if n > 1 else float("nan")
        bins.append(SizeBin(low, high, first / n, half, int(n)))
    return bins


def pooled_answers(answers: Iterable[Answers], ways: int) -> tuple[np.ndarray, np.ndarray]:
    """Return probabilities and labels that have the reliability of those of several seeds, for its picture.

    Parameters
    ----------
    answers : of each seed
    ways : classes of a task

    Returns
    -------
    ``(n, ways)`` with the mean confidence of each answer's bin in the first column, and labels ``(n,)``
    """
    sure: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    for each in answers:
        for confidence, right, n in each["reliability"]:
            sure.append(np.full(int(n), confidence))
            labels.append((np.arange(int(n)) >= round(right * n)).astype(np.int64))
    top = np.concatenate(sure)
    rest = np.repeat(((1 - top) / (ways - 1))[:, None], ways - 1, axis=1)
    return np.concatenate([top[:, None], rest], axis=1), np.concatenate(labels)


# ---- comparisons


def sources_of(
    splits: Splits, protocol: Protocol, *, seed: int, modes: Sequence[Mode] = ()
) -> dict[str, AnyShotSource]:
    """Test tasks by name of the test set: new classes of the same domain in each mode, and other domains.

    Parameters
    ----------
    splits : the classes
    protocol : of the tasks
    seed : of the training; tests have another
    modes : of the same domain's tests; the first is that of the other domains. Default: the protocol's
    """
    modes = tuple(dict.fromkeys(modes or (protocol.mode,)))
    low, high = protocol.shots
    shots = f"{low}-{high} shots" if low < high else f"{low} shots"
    found = {
        f"{splits.test.name} ({mode} {shots})": source_of(splits.test, protocol, seed=seed + 1, test=True, mode=mode)
        for mode in modes
    }
    for name, images in splits.others.items():
        found[f"{name} (out of distribution)"] = source_of(images, protocol, seed=seed + 1, test=True, mode=modes[0])
    return found


def _pixels(tests: Mapping[str, AnyShotSource], protocol: Protocol) -> Cell:
    found: dict[str, Answers] = {}
    batch = 20
    for name, source in tests.items():
        parts: list[tuple[np.ndarray, ...]] = []
        for number in range(-(-protocol.episodes // batch)):
            tasks = source.batch(number, min(batch, protocol.episodes)).part(0, protocol.episodes - number * batch)
            probability = torch.softmax(pixel_means(tasks).double(), -1)
            parts.append(tuple(v.numpy() for v in (probability, tasks.query_labels, tasks.query_mask, tasks.counts())))
        joined = [np.concatenate([part[k] for part in parts]) for k in range(4)]
        found[name] = answers_of(Evaluation(joined[0], joined[1], joined[2], joined[3], 0, 0, {}), protocol.bins)
    return {"tests": found, "train_seconds": 0.0, "step_ms": 0.0, "skipped": 0, "setting": {}}


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
    modes: Sequence[Mode] = (),
    device: torch.device | str = "cpu",
    advance: Callable[[str, int], None] = _silent,
    on_learner: Callable[[str, int, MetaLearner, list[Step]], None] | None = None,
) -> tuple[list[Result], list[Claim], dict[str, dict[int, Cell]]]:
    """Train every method under every seed, and test all of a seed on the same episodes.

    Parameters
    ----------
    run : keeps what is done, so that an interrupted comparison repeats only the piece it was in
    splits : the classes
    methods : names, :data:`PIXELS` among them if wanted; those that differ at test time alone share a training
    seeds : of weights, episodes and samples
    protocol : what they have in common
    tuned : choose each method's setting on validation classes under the first seed, with the same number of trials
    modes : of the tests on new classes, see :func:`sources_of`
    device : where
    advance : called with a note and the number of methods done
    on_learner : called with each trained learner and its history; not for what a resumed run had done before, and
        where workers train, in theirs

    Returns
    -------
    Results for the table, claims, and the cells by method and seed.
    """
    methods = tuple(dict.fromkeys(methods))
    for name in methods:
        if name != PIXELS and name not in METHODS:
            raise no_such("method", name, [PIXELS, *METHODS])
    if not seeds or not methods:
        raise InputError("seeds, methods: need at least one of each")
    trainings: dict[str, list[str]] = {}
    for name in methods:
        trainings.setdefault(_TRAINED_AS.get(name, name), []).append(name)
    # What cannot be trained on, chosen by or tested on is said at once.
    source_of(splits.train, protocol, seed=seeds[0])
    if tuned or protocol.validate_every:
        source_of(splits.validation, protocol, seed=seeds[0], test=True)
    first = next(iter(sources_of(splits, protocol, seed=seeds[0], modes=modes)))
    tuning = {
        f"setting/{training}": partial(tune, training, splits, protocol, seed=seeds[0], device=device)
        for training in trainings
        if tuned and training != PIXELS
    }
    settings = run.each(tuning)
    pairs = {f"{training}/{seed}": (training, seed) for seed in seeds for training in trainings}
    work = {
        key: partial(
            _cells,
            training,
            trainings[training],
            splits,
            protocol,
            modes,
            seed,
            settings.get(f"setting/{training}", {}),
            device,
            on_learner,
        )
        for key, (training, seed) in pairs.items()
    }

    def tell(_: str, found: dict[str, Cell]) -> None:
        said = [f"{name}: {100 * np.mean(cell['tests'][first]['accuracy']):.1f} %" for name, cell in found.items()]
        advance(", ".join(said), len(found))

    cells: dict[str, dict[int, Cell]] = {name: {} for name in methods}
    for key, found in run.each(work, tell).items():
        for name, cell in found.items():
            cells[name][pairs[key][1]] = cell
    return _rows(cells), paired(cells), cells


def _cells(
    training: str,
    members: Sequence[str],
    splits: Splits,
    protocol: Protocol,
    modes: Sequence[Mode],
    seed: int,
    setting: Mapping[str, float],
    device: torch.device | str,
    on_learner: Callable[[str, int, MetaLearner, list[Step]], None] | None,
) -> dict[str, Cell]:
    """Train once, and test every method that shares the training."""
    tests = sources_of(splits, protocol, seed=seed, modes=modes)
    if training == PIXELS:
        return {PIXELS: _pixels(tests, protocol)}
    with one_thread(str(device) == "cpu"):
        learner = make_learner(training, protocol, splits.channels, seed=seed, setting=setting, device=device)
        started = time.perf_counter()
        history = train(learner, splits.train, protocol, seed=seed, setting=setting, validation=splits.validation)
        seconds = time.perf_counter() - started
        found: dict[str, Cell] = {}
        for name in members:
            at_means = 0 if METHODS[name].naive else None
            found[name] = {
                "tests": {
                    test: answers_of(learner.evaluate(source, tasks=protocol.episodes, samples=at_means), protocol.bins)
                    for test, source in tests.items()
                },
                "train_seconds": seconds,
                "step_ms": 1000 * seconds / len(history) if history else 0.0,
                "skipped": learner.skipped,
                "setting": dict(setting),
            }
    if on_learner is not None:
        on_learner(training, seed, learner, history)
    return found


def _rows(cells: Mapping[str, Mapping[int, Cell]]) -> list[Result]:
    found: list[Result] = []
    tests = next(iter(next(iter(cells.values())).values()))["tests"]
    for dataset in tests:
        measured = {m: [cell["tests"][dataset] for cell in by_seed.values()] for m, by_seed in cells.items()}
        seconds = {m: sum(cell["train_seconds"] for cell in by_seed.values()) for m, by_seed in cells.items()}

        def row(
            method: str,
            metric: str,
            values: Sequence[float],
            unit: str,
            better: Literal["lower", "higher"],
            dataset: str = dataset,
            seconds: Mapping[str, float] = seconds,
        ) -> None:
            found.append(
                summarize(
                    values, dataset=dataset, method=method, metric=metric, unit=unit, better=better,
                    seconds=seconds[method],
                )
            )  # fmt: skip

        for method, answers in measured.items():
            row(method, "accuracy", [100 * float(np.mean(a["accuracy"])) for a in answers], "%", "higher")
        # Distances of pixels are no probabilities.
        sure = {method: answers for method, answers in measured.items() if method != PIXELS}
        for method, answers in sure.items():
            row(method, "negative log-likelihood", [float(np.mean(a["nll"])) for a in answers], "nats", "lower")
        for method, answers in sure.items():
            row(method, "calibration error", [a["ece"] for a in answers], "1", "lower")
        places = dict.fromkeys((b["low"], b["high"]) for each in measured.values() for a in each for b in a["sizes"])
        for low, high in sorted(places) if len(places) > 1 else ():
            span = str(low) if low == high else f"{low}-{high}"
            for method, answers in measured.items():
                values = [100 * b["mean"] for a in answers for b in a["sizes"] if (b["low"], b["high"]) == (low, high)]
                if values:
                    row(method, f"accuracy at {span} shots", values, "%", "higher")
    first = next(iter(tests))
    for method, by_seed in cells.items():
        steps = [cell["step_ms"] for cell in by_seed.values()]
        if all(steps):
            whole = sum(cell["train_seconds"] for cell in by_seed.values())
            found.append(
                summarize(steps, dataset=first, method=method, metric="meta-step", unit="ms", better="lower",
                          seconds=whole)
            )  # fmt: skip
    return found


def paired(cells: Mapping[str, Mapping[int, Cell]], ours: str = "bayesian-taml") -> list[Claim]:
    """Hold our method against each other one on the same episodes of each test set, with 95 % intervals.

    Parameters
    ----------
    cells : by method and seed
    ours : method to hold against the others
    """
    claims: list[Claim] = []
    for other, by_seed in cells.items():
        shared = [seed for seed in by_seed if seed in cells.get(ours, {})]
        if other == ours or not shared:
            continue
        for test in by_seed[shared[0]]["tests"]:
            mine, others = (
                100 * np.concatenate([np.asarray(c[seed]["tests"][test]["accuracy"], np.float64) for seed in shared])
                for c in (cells[ours], by_seed)
            )
            mean, low, high = paired_interval(mine, others)
            claims.append(
                Claim(
                    text=f"{ours} is more accurate than {other} on the same {len(mine)} episodes of {test}: {mean:+.2f}"
                    f" points, {low:+.2f} to {high:+.2f} (over episodes; the spread over trainings is in the table)",
                    source="this project",
                    holds=bool(low > 0),
                    value=mean,
                    threshold=0.0,
                )
            )
    return claims


# ---- studies


def balanced(images: ClassImages, protocol: Protocol, count: int, *, seed: int) -> AnyShotSource:
    """Test tasks with the same number of support images of every class, none of which may have fewer.

    Parameters
    ----------
    images : the split
    protocol : ways and queries
    count : support images of each class
    seed : of the episodes
    """
    needed, least = count + protocol.test_queries, int(images.counts.argmin())
    if images.counts[least] < needed:
        raise TooFewItemsError(
            f"{images.name}: class '{images.class_names[least]}' has {images.counts[least]} images; {count} shots and"
            f" {protocol.test_queries} queries need {needed}; add images, or ask for fewer shots or queries"
        )
    return source_of(images, protocol, seed=seed, test=True, mode="task", shots=(count, count))


def shots_study(
    learners: Mapping[str, MetaLearner],
    images: ClassImages,
    protocol: Protocol,
    *,
    counts: Sequence[int] = (1, 2, 5, 10, 20, 50),
    episodes: int | None = None,
    seed: int = 0,
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, dict[int, Evaluation]]:
    """Test on balanced tasks of several sizes, within and beyond those of training; all learners on the same episodes.

    Parameters
    ----------
    learners : trained, by name
    images : test classes
    protocol : ways and queries
    counts : support images of each class
    episodes : of each; None is the protocol's
    seed : of the episodes
    on_batch : called with the number of episodes done over all
    """
    sources = {count: balanced(images, protocol, count, seed=seed + 1) for count in counts}
    number, before = episodes or protocol.episodes, 0
    found: dict[str, dict[int, Evaluation]] = {name: {} for name in learners}
    for name, learner in learners.items():
        for count, source in sources.items():

            def after(done: int, before: int = before) -> None:
                if on_batch is not None:
                    on_batch(before + done)

            found[name][count] = learner.evaluate(source, tasks=number, on_batch=after)
            before += number
    return found


def shuffled_counts(seed: int = 0) -> Callable[[Tensor], Tensor]:
    """Return what exchanges the cardinalities of a batch's classes among each other, for studies.

    Parameters
    ----------
    seed : of the order
    """

    def change(counts: Int64[Tensor, "tasks ways"]) -> Int64[Tensor, "tasks ways"]:
        order = torch.randperm(counts.numel(), generator=torch.Generator().manual_seed(seed)).to(counts.device)
        return counts.flatten()[order].view_as(counts)

    return change


def pooling_study(
    run: Run,
    splits: Splits,
    protocol: Protocol,
    *,
    seeds: Sequence[int],
    variants: Sequence[Sequence[str]] = (("mean",), ("mean", "n"), ("mean", "var", "n")),
    method: str = "bayesian-taml",
    device: torch.device | str = "cpu",
    advance: Callable[[str, int], None] = _silent,
) -> dict[str, dict[int, list[float]]]:
    """Train with the inference network seeing fewer statistics, and test also under cardinalities that are shuffled.

    Parameters
    ----------
    run : keeps what is done
    splits : the classes
    protocol : of all of them, but for ``pooling``
    seeds : of weights, episodes and samples
    variants : statistics of sets
    method : with an inference network
    device : where
    advance : called with a note after each training

    Returns
    -------
    Accuracy of each episode by variant (``mean n``; ``mean n, shuffled`` for those that see cardinalities) and seed;
    the same episodes for all.
    """
    pairs = {f"pooling/{' '.join(names)}/{seed}": (tuple(names), seed) for seed in seeds for names in variants}
    work = {
        key: partial(_pooled, method, names, splits, protocol, seed, device) for key, (names, seed) in pairs.items()
    }

    def tell(_: str, made: dict[str, list[float]]) -> None:
        label, accuracy = next(iter(made.items()))
        advance(f"{label}: {100 * np.mean(accuracy):.1f} %", 1)

    found: dict[str, dict[int, list[float]]] = {}
    for key, made in run.each(work, tell).items():
        for name, accuracy in made.items():
            found.setdefault(name, {})[pairs[key][1]] = accuracy
    return found


def _pooled(
    method: str, names: tuple[str, ...], splits: Splits, protocol: Protocol, seed: int, device: torch.device | str
) -> dict[str, list[float]]:
    """Train with an inference network that sees these statistics, and test it."""
    mine, label = replace(protocol, pooling=names), " ".join(names)
    with one_thread(str(device) == "cpu"):
        learner = make_learner(method, mine, splits.channels, seed=seed, device=device)
        train(learner, splits.train, mine, seed=seed, validation=splits.validation)
        source = source_of(splits.test, mine, seed=seed + 1, test=True)
        made = {label: learner.evaluate(source, tasks=mine.episodes).accuracy.tolist()}
        if "n" in names:
            changed = learner.evaluate(source, tasks=mine.episodes, change_counts=shuffled_counts(seed))
            made[f"{label}, shuffled"] = changed.accuracy.tolist()
    return made
