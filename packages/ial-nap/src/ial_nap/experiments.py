"""What the method claims, measured: data, models and numbers, with every piece of work stored once (spec 8).

Each experiment takes a set, seeds and a protocol, and gives cells of numbers by name and seed, rows for a table, and
claims with what was measured. Settings are chosen on validation series, never on those that are tested on.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, Literal, TypeAlias, TypeVar, cast, runtime_checkable
from typing import Protocol as TypingProtocol

import numpy as np
import torch
from jaxtyping import Int8
from scipy.stats import spearmanr
from sklearn.linear_model import Ridge
from torch import Tensor

from ial_nap.attention import Contributions, Retain
from ial_nap.choices import Written, written
from ial_nap.context import Context
from ial_nap.data import Dataset, Split, load_data, plant
from ial_nap.influence import influence_on
from ial_nap.nap import FeatureNAP, probabilities
from ial_nap.ranking import CER, Ranked, uncertainty
from ial_nap.release import ReleaseNAP
from ial_nap.series import Series
from ial_nap.simulation import Method, Oracle, Setting, Trained, score, simulate, tuned
from ial_nap.toys import CAUSAL, shift_task
from ial_nap.training import Episodic, Plain, Training, finetune
from shared_core.errors import InputError, no_such
from shared_core.runs import Claim, Result, summarize

__all__ = [
    "EXPERIMENTS",
    "UNSTORED",
    "Demo",
    "Found",
    "Protocol",
    "Store",
    "by_seed",
    "compare_methods",
    "correction",
    "demo_run",
    "drawn",
    "harmless",
    "honesty",
    "leak",
    "loop",
    "ranking",
    "run_experiment",
    "tax",
    "update_race",
]


_Value = TypeVar("_Value")


@runtime_checkable
class Store(TypingProtocol):
    """Does pieces of work, or has others do them, and keeps each: :class:`shared_core.runs.Run`."""

    def each(
        self, work: Mapping[str, Callable[[], _Value]], told: Callable[[str, _Value], None] | None = None
    ) -> dict[str, _Value]:
        """Return the values of pieces of work that do not need each other, and tell of each."""
        ...

    def spread_parts(self, parts: Mapping[str, Callable[[Any], object]], told: Callable[[str], None] = ...) -> None:
        """Have parts done elsewhere, each with a store that it asks for its pieces, and keep these; or do nothing."""
        ...


class _Unstored:
    def each(
        self, work: Mapping[str, Callable[[], _Value]], told: Callable[[str, _Value], None] | None = None
    ) -> dict[str, _Value]:
        found: dict[str, _Value] = {}
        for key, compute in work.items():
            found[key] = compute()
            if told is not None:
                told(key, found[key])
        return found

    def spread_parts(
        self, parts: Mapping[str, Callable[[Any], object]], told: Callable[[str], None] = lambda _: None
    ) -> None:
        """Do nothing."""


UNSTORED: Store = _Unstored()
"""Does each piece of work here, and keeps nothing."""

Cells: TypeAlias = "dict[str, dict[int, Any]]"
"""Numbers by name and seed."""

DEMO_METHODS: tuple[Method, ...] = ("retain", "aila", "rrr", "drop", "random-nap", "ial-nap")


@dataclass(frozen=True)
class Protocol:
    """What methods and seeds of an experiment have in common.

    Parameters
    ----------
    columns, shift : of the planted shortcut, see :func:`ial_nap.data.plant`
    test, validation : shares, see :meth:`ial_nap.data.Dataset.split`
    audit : share of the validation in which the shortcut does not hold
    setting : sizes and numbers of all methods
    trials : settings tried for each method that has a number to choose, on the validation; 0 takes the setting's own
    flip, unsure : of the annotator
    unseen : share of cells that an imagined annotator of :func:`correction` leaves out
    masks : numbers of annotated instances that :func:`correction` looks at
    most : instances of the test part to read at most; None is all
    """

    columns: int = 2
    shift: float = 1.2
    test: float = 0.25
    validation: float = 0.4
    audit: float = 0.5
    setting: Setting = field(default_factory=Setting)
    trials: int = 3
    flip: float = 0.0
    unsure: float = 0.0
    unseen: float = 0.5
    masks: tuple[int, ...] = (1, 5, 20)
    most: int | None = None


@dataclass(frozen=True)
class Found:
    """What an experiment found.

    Parameters
    ----------
    cells : numbers, or rounds of numbers, by name and seed
    results : rows of a table
    claims : with what was measured
    """

    cells: Cells
    results: list[Result]
    claims: list[Claim]


def drawn(data: Dataset, seed: int, protocol: Protocol, *, planted: bool = True) -> Split:
    """Split a set by a seed and plant a shortcut in it; of the toy, draw another one.

    Parameters
    ----------
    data : a set
    seed : of the split and of what is planted
    protocol : shares, and how strong the shortcut is
    planted : leave it out when False
    """
    if data.name == "shift":
        shift = protocol.shift if planted else 0.0
        train = shift_task(800, shift=shift, seed=seed)
        split = Split(
            train,
            shift_task(200, shift=shift, seed=seed + 100, like=train),
            shift_task(2000, shift=0.0, seed=seed + 200, like=train),
            shift_task(200, shift=0.0, seed=seed + 300, like=train),
            data.truth if planted else None,
        )
    else:
        split = data.split(seed, test=protocol.test, validation=protocol.validation)
        if planted:
            split = plant(split, columns=protocol.columns, shift=protocol.shift, seed=seed, audit=protocol.audit)
    if protocol.most is not None:
        split = replace(split, test=split.test.part(range(min(protocol.most, len(split.test)))))
    return split


def _set(source: str | Dataset) -> Dataset:
    return load_data(source) if isinstance(source, str) else source


def _trained(train: Series, validation: Series | None, setting: Setting, seed: int) -> FeatureNAP:
    s = setting
    model = FeatureNAP.of(train, hidden=s.hidden, latent=s.latent, keep=s.keep, seed=seed)
    objective = Episodic(model, l2=s.l2, seed=seed)
    Training(model, objective, train, validation, epochs=s.epochs, batch_size=s.batch_size, lr=s.lr, seed=seed).run()
    return model


def _measured(model: FeatureNAP, series: Series, setting: Setting) -> float:
    return score(model.predict(series.x, series.lengths, samples=setting.samples).mean, series)


def _masks(truth: Int8[Tensor, "t r"], count: int, unseen: float, seed: int) -> Int8[Tensor, "k t r"]:
    """Return what as many annotators say who each leave some cells out."""
    generator = torch.Generator().manual_seed(seed)
    said = truth.repeat(count, 1, 1)
    return said.masked_fill(torch.rand(said.shape, generator=generator) < unseen, -1)


def _of(masks: Int8[Tensor, "k t r"]) -> Context:
    return Context.of(masks, allow_empty=True)


# ---- rows and claims

_METRIC: dict[str, tuple[Written, Literal["lower", "higher"]]] = {
    "binary": (written("auroc"), "higher"),
    "multiclass": (written("accuracy"), "higher"),
    "multilabel": (written("accuracy"), "higher"),
    "regression": (written("rmse"), "lower"),
}


def _rows(
    data: Dataset, cells: Cells, metric: Written, better: Literal["lower", "higher"], names: Sequence[str] | None = None
) -> list[Result]:
    """Return a row for each name whose cells are numbers."""
    return [
        summarize(
            [metric.factor * float(value) for value in cells[name].values()],
            dataset=data.name,
            method=name,
            metric=metric.name,
            unit=metric.unit,
            better=better,
        )
        for name in names or cells
        if cells.get(name)
    ]


def _mean(cells: Mapping[int, float]) -> float:
    return float(np.mean(list(cells.values())))


def _gap(more: Mapping[int, float], less: Mapping[int, float]) -> float:
    """Mean of what one has over the other, seed by seed."""
    return float(np.mean([more[seed] - less[seed] for seed in more]))


def _share(more: Mapping[int, float], less: Mapping[int, float]) -> float:
    """Share of seeds in which one has more than the other."""
    return float(np.mean([more[seed] > less[seed] for seed in more]))


def _claim(
    text: str,
    value: float,
    threshold: float,
    *,
    below: bool = False,
    source: str = "specification 8",
    of: Written | None = None,
) -> Claim:
    """Hold a number against a threshold; differences of scores are written as `of` is."""
    holds = value <= threshold if below else value >= threshold
    if of is not None:
        value, threshold = of.factor * value, of.factor * threshold
    return Claim(text=text, source=source, holds=bool(holds), value=float(value), threshold=threshold)


def _collect(
    seeds: Sequence[int],
    store: Store,
    what: str,
    compute: Callable[[int], dict[str, float]],
    advance: Callable[[str, float], None] | None,
) -> Cells:
    """Compute a row of numbers for each seed, each stored; turn them into numbers by name and seed."""
    cells: Cells = {}
    work = {f"{what}, seed {seed}": (lambda seed=seed: compute(seed)) for seed in seeds}
    for seed, row in zip(seeds, store.each(work, _telling(advance)).values(), strict=True):
        for name, value in row.items():
            cells.setdefault(name, {})[seed] = value
    return cells


def by_seed(
    seeds: Sequence[int],
    work: Callable[[int], Mapping[str, Callable[[], _Value]]],
    store: Store,
    advance: Callable[[str, float], None] | None = None,
) -> dict[int, list[_Value]]:
    """Do all pieces of work of each seed; those of a seed stay together where work is spread, for what they share.

    Parameters
    ----------
    seeds : of which each has its pieces
    work : gives the pieces of a seed, by key
    store : keeps pieces of work
    advance : called with a note and how many pieces are done since

    Returns
    -------
    Values by seed, in the order of the pieces.
    """
    ahead = set[str]()

    def told(part: str) -> None:
        ahead.add(part)
        if advance is not None:
            advance(part, len(work(seeds[0])))

    store.spread_parts({f"seed {seed}": partial(_do_seed, seed=seed, work=work) for seed in seeds}, told)
    return {
        seed: list(store.each(work(seed), None if f"seed {seed}" in ahead else _telling(advance)).values())
        for seed in seeds
    }


def _do_seed(store: Store, *, seed: int, work: Callable[[int], Mapping[str, Callable[[], Any]]]) -> None:
    store.each(work(seed))


def _telling(advance: Callable[[str, float], None] | None) -> Callable[[str, Any], None]:
    return lambda key, _: None if advance is None else advance(key, 1)


# ---- E2: verdicts correct a model that trusts a shortcut


def correction(
    source: str | Dataset,
    seeds: Sequence[int],
    protocol: Protocol = Protocol(),
    *,
    store: Store = UNSTORED,
    advance: Callable[[str, float], None] | None = None,
) -> Found:
    """Show masks of a planted shortcut to a trained model, and measure where the shortcut does not hold (E2).

    Against it: the model trained anew without the shortcut; masks on two features that are no shortcut; and the
    release's schedule, in which the encoder only ever saw one context, before and after its 50 gradient steps.

    Parameters
    ----------
    source : a set, or its name
    seeds : of splits, shortcuts, weights and masks
    protocol : what is common
    store : keeps pieces of work
    advance : called with a note and how many pieces are done since

    Returns
    -------
    Scores by condition: "none", "1", "5", "20" masks, "irrelevant" and "causal" (the toy, where these are known),
    "drop", "release", "release 20", "release 20 finetuned"; and shares of contributions that are the shortcut's.
    """
    data, s = _set(source), protocol.setting

    def compute(seed: int) -> dict[str, float]:
        split = drawn(data, seed, protocol)
        assert split.truth is not None
        train, test, truth = split.train, split.test, split.truth
        model = _trained(train, split.validation, s, seed)
        contexts = {"none": Context(*truth.shape)}
        contexts |= {str(k): _of(_masks(truth, k, protocol.unseen, seed)) for k in protocol.masks}
        most = str(max(protocol.masks))
        if data.name == "shift":
            for name, columns in (("irrelevant", (4, 6)), ("causal", CAUSAL[:2])):
                other = torch.ones_like(truth)
                other[:, list(columns)] = 0
                contexts[name] = _of(_masks(other, int(most), protocol.unseen, seed))
        row: dict[str, float] = {}
        at = [train.features.index(name) for name in split.planted]
        for name, context in contexts.items():
            model.update(context)
            row[name] = _measured(model, test, s)
            if name in {"none", most}:
                with torch.no_grad():
                    cells = model.contributions(test.x, test.lengths).cells.abs()
                row[f"share of the shortcut, {name}"] = float(cells[:, :, at].sum() / cells.sum())
        names = split.planted
        smaller = _trained(train.without(names), split.validation.without(names), s, seed)
        row["drop"] = _measured(smaller, test.without(names), s)
        return row | _release(split, contexts[most], most, s, seed)

    cells = _collect(seeds, store, f"correction {data.name}", compute, advance)
    metric, better = _METRIC[data.kind]
    shares = [name for name in cells if name.startswith("share")]
    results = _rows(data, cells, metric, better, [name for name in cells if name not in shares])
    results += _rows(data, cells, Written("share of |contributions|"), "lower", shares)
    sign = -1 if better == "lower" else 1
    scores = {name: {seed: sign * value for seed, value in by.items()} for name, by in cells.items()}
    first, most = "none", str(max(protocol.masks))
    ladder = [first, *map(str, protocol.masks)]
    least = min(_gap(scores[b], scores[a]) for a, b in itertools.pairwise(ladder))
    middle = "5" if "5" in scores else most
    claims = [
        _claim(
            f"{middle} masks raise the score by {metric.size(0.08)} or more",
            _gap(scores[middle], scores[first]),
            0.08,
            of=metric,
        ),
        _claim(
            f"{most} masks come within {metric.size(0.02)} of training anew",
            _gap(scores["drop"], scores[most]),
            0.02,
            below=True,
            of=metric,
        ),
        _claim(f"more masks never cost more than {metric.size(0.01)}", least, -0.01, of=metric),
        _claim(
            f"the shortcut's share of contributions falls below 0.05 with {most} masks",
            _mean(cells[f"share of the shortcut, {most}"]),
            0.05,
            below=True,
        ),
        _claim(
            f"the release's schedule does not react without gradient steps: less than {metric.size(0.01)}",
            max(abs(scores[f"release {most}"][seed] - scores["release"][seed]) for seed in seeds),
            0.01,
            below=True,
            of=metric,
        ),
    ]
    if "causal" in scores:
        claims += [
            _claim(
                f"masks on features that do not matter change less than {metric.size(0.02)}",
                abs(_gap(scores["irrelevant"], scores[first])),
                0.02,
                below=True,
                of=metric,
            ),
            _claim(
                f"masks on features that matter cost {metric.size(0.10)} or more",
                _gap(scores[first], scores["causal"]),
                0.10,
                of=metric,
            ),
        ]
    return Found(cells, results, claims)


def _release(split: Split, context: Context, most: str, s: Setting, seed: int) -> dict[str, float]:
    train, test = split.train, split.test
    released = ReleaseNAP(
        len(train.features), train.outputs, steps=len(train.steps), hidden=s.hidden, keep=s.keep, seed=seed
    )
    objective = Plain(released, l2=s.l2)
    Training(
        released, objective, train, split.validation, epochs=s.epochs, batch_size=s.batch_size, lr=s.lr, seed=seed
    ).run()

    def measured() -> float:
        with torch.no_grad():
            return score(probabilities(released(test.x, test.lengths).logits, test.kind), test)

    row = {"release": measured()}
    released.update(context)
    row[f"release {most}"] = measured()
    # The release's round: gradient steps on what makes attention, on what was annotated.
    annotated = train.part(range(min(len(context), len(train))))
    leaves = list(released.generators())
    again = Training(released, objective, annotated, epochs=s.steps, batch_size=len(annotated), lr=s.step_lr,
                     parameters=leaves, seed=seed)  # fmt: skip
    again.run()
    return row | {f"release {most} finetuned": measured()}


# ---- E3: the loop, method against method


def loop(
    source: str | Dataset,
    methods: Sequence[Method],
    seeds: Sequence[int],
    protocol: Protocol = Protocol(),
    *,
    planted: bool = True,
    store: Store = UNSTORED,
    advance: Callable[[str, float], None] | None = None,
) -> Found:
    """Let an annotator who knows the planted shortcut answer each method's questions for some rounds (E3).

    Parameters
    ----------
    source : a set, or its name
    methods : see :data:`ial_nap.simulation.Method`
    seeds : of splits, shortcuts, weights and choices
    protocol : what is common; a method that has numbers to choose gets as many tries as the others
    planted : without, the annotator marks every cell 1
    store : keeps pieces of work, here a method with a seed
    advance : called with a note and how many pieces are done since

    Returns
    -------
    By method and seed: ``rounds``, each of number, cells, score and seconds, and the ``setting`` that was chosen.
    """
    data = _set(source)
    cells: Cells = {method: {} for method in methods}

    work = partial(_works, data=data, methods=methods, protocol=protocol, planted=planted)
    for seed, row in by_seed(seeds, work, store, advance).items():
        for method, cell in zip(methods, row, strict=True):
            cells[method][seed] = cell
    return Found(cells, _loop_rows(data, cells), _loop_claims(data, cells) if planted else [])


def _works(
    seed: int, *, data: Dataset, methods: Sequence[Method], protocol: Protocol, planted: bool
) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return what there is to do for a seed; its methods share the split and the first training."""
    split = cache(lambda: drawn(data, seed, protocol, planted=planted))
    trained: Trained = {}
    return {
        f"{method}, seed {seed}": lambda method=method: _rounds(method, split(), protocol, seed, trained)
        for method in methods
    }


def _rounds(method: Method, split: Split, protocol: Protocol, seed: int, trained: Trained) -> dict[str, Any]:
    truth = split.truth
    if truth is None:
        truth = torch.ones(len(split.train.steps), len(split.train.features), dtype=torch.int8)
    oracle = Oracle(truth, flip=protocol.flip, unsure=protocol.unsure, seed=seed)
    setting = protocol.setting
    if protocol.trials and split.truth is not None:
        setting = tuned(method, split.train, split.validation, oracle, setting, seed, protocol.trials, trained=trained)
    found = simulate(method, split.train, split.validation, split.test, oracle, setting, seed=seed, trained=trained)
    return {
        "rounds": [[row.round, row.cells, row.score, row.seconds] for row in found],
        "setting": {"weight": setting.weight, "step_lr": setting.step_lr},
    }


def _scores(cells: Mapping[int, Any], at: int) -> dict[int, float]:
    return {seed: cell["rounds"][at][2] for seed, cell in cells.items()}


def _area(cells: Mapping[int, Any]) -> dict[int, float]:
    """Mean score over rounds with verdicts."""
    return {seed: float(np.mean([row[2] for row in cell["rounds"][1:]])) for seed, cell in cells.items()}


def _seconds(cells: Mapping[int, Any]) -> dict[int, float]:
    return {seed: float(np.mean([row[3] for row in cell["rounds"][1:]])) for seed, cell in cells.items()}


def _loop_rows(data: Dataset, cells: Cells) -> list[Result]:
    metric, better = _METRIC[data.kind]
    rows: list[Result] = []
    for method, by in cells.items():
        seconds = sum(row[3] for cell in by.values() for row in cell["rounds"])
        first = {seed: cell["rounds"][0][3] for seed, cell in by.items()}
        values: list[tuple[Written, Literal["lower", "higher"], dict[int, float]]] = [
            (metric, better, _scores(by, -1)),
            (metric._replace(name=f"{metric.name} before"), better, _scores(by, 0)),
            (metric._replace(name=f"{metric.name}, mean of rounds"), better, _area(by)),
            (Written("verdicts"), "lower", {seed: cell["rounds"][-1][1] for seed, cell in by.items()}),
            (Written("time a round", "s"), "lower", _seconds(by)),
            (Written("time of the first training", "s"), "lower", first),
        ]
        rows += [
            summarize(
                [of.factor * float(v) for v in found.values()],
                dataset=data.name, method=method, metric=of.name, unit=of.unit, better=way, seconds=seconds,
            )
            for of, way, found in values
        ]  # fmt: skip
    return rows


def _loop_claims(data: Dataset, cells: Cells) -> list[Claim]:
    if "ial-nap" not in cells:
        return []
    metric, better = _METRIC[data.kind]
    sign = -1 if better == "lower" else 1
    last = {method: {seed: sign * value for seed, value in _scores(by, -1).items()} for method, by in cells.items()}
    ours = cells["ial-nap"]
    before = {seed: sign * value for seed, value in _scores(ours, 0).items()}
    claims = [_claim("ial-nap gains by verdicts, in four seeds of five or more", _share(last["ial-nap"], before), 0.8)]
    if "drop" in cells:
        gap = _gap(last["drop"], last["ial-nap"])
        text = f"ial-nap ends within {metric.size(0.03)} of leaving features out and training anew"
        claims.append(_claim(text, gap, 0.03, below=True, of=metric))
    if "random-nap" in cells:
        rounds = range(1, len(next(iter(ours.values()))["rounds"]))
        ahead = min(sign * _gap(_scores(ours, at), _scores(cells["random-nap"], at)) for at in rounds)
        claims.append(_claim("ranking is no worse than chance after any round", ahead, 0.0, of=metric))
    claims += [
        _claim(
            f"ial-nap ends above {method}",
            _gap(last["ial-nap"], last[method]),
            0.0,
            source="Heo et al. 2020",
            of=metric,
        )
        for method in ("random-ua", "aila", "rrr", "random-retain", "if-retain")
        if method in cells
    ]
    if "ial-nap-finetuned" in cells:
        ratio = _mean(_seconds(ours)) / _mean(_seconds(cells["ial-nap-finetuned"]))
        claims.append(_claim("an update takes less than 1/20 of fine-tuning", ratio, 0.05, below=True))
    return claims


def compare_methods(
    source: str | Dataset,
    methods: Sequence[Method],
    seeds: Sequence[int],
    protocol: Protocol = Protocol(),
    *,
    store: Store = UNSTORED,
    advance: Callable[[str, float], None] | None = None,
) -> Found:
    """Compare methods on a set with a planted shortcut: :func:`loop`.

    Parameters
    ----------
    source, methods, seeds, protocol, store, advance : as of :func:`loop`
    """
    return loop(source, methods, seeds, protocol, store=store, advance=advance)


def harmless(
    source: str | Dataset,
    seeds: Sequence[int],
    protocol: Protocol = Protocol(),
    *,
    store: Store = UNSTORED,
    advance: Callable[[str, float], None] | None = None,
) -> Found:
    """Let an annotator who never says 0 answer where nothing is planted: little may change (E3, no free lunch).

    Parameters
    ----------
    source, seeds, protocol, store, advance : as of :func:`loop`
    """
    data = _set(source)
    found = loop(data, ["ial-nap"], seeds, protocol, planted=False, store=store, advance=advance)
    ours = found.cells["ial-nap"]
    moved = max(abs(row[2] - cell["rounds"][0][2]) for cell in ours.values() for row in cell["rounds"])
    metric = _METRIC[data.kind][0]
    text = f"verdicts that exclude nothing change the score by {metric.size(0.01)} at most"
    claim = _claim(text, moved, 0.01, below=True, of=metric)
    return replace(found, claims=[claim])


# ---- E4: does the ranking save a person's time


def ranking(
    source: str | Dataset,
    seeds: Sequence[int],
    protocol: Protocol = Protocol(),
    *,
    store: Store = UNSTORED,
    advance: Callable[[str, float], None] | None = None,
    questions: int = 8,
    flipped: float = 0.08,
) -> Found:
    """Ask whether rankings find what is wrong (E4): flipped labels, a planted shortcut, and better scores sooner.

    Parameters
    ----------
    source, seeds, protocol, store, advance : as of :func:`correction`
    questions : instances asked about one after the other, two features of each
    flipped : share of training labels that are made wrong, where nothing is planted; of a binary task only

    Returns
    -------
    "flips found" by influence, uncertainty and error, as precision at their number; "first shortcut" by feature ranker,
    as mean reciprocal rank; "over questions" by ranking and at random, as mean score; and "chance" of the first two.
    """
    data, s = _set(source), protocol.setting

    def compute(seed: int) -> dict[str, float]:
        row = _find_flips(drawn(data, seed, protocol, planted=False), flipped, s, seed) if data.kind == "binary" else {}
        split = drawn(data, seed, protocol)
        assert split.truth is not None
        train, names = split.train, split.planted
        model = _trained(train, split.validation, s, seed)
        r, k = len(train.features), min(100, len(train))
        for feature in ("counterfactual", "uncertainty", "influence"):
            queue = CER(feature=cast("Any", feature), k=k, f=r).rank(model, train, split.validation, seed=seed)
            ranks = [1 + min(item.features.index(name) for name in names) for item in queue]
            row[f"first shortcut, {feature}"] = float(np.mean([1 / rank for rank in ranks]))
        row["first shortcut, chance"] = _chance(r, len(names))
        for name, cer in (("ranked", CER(k=1, f=2)), ("at random", CER("random", "random", k=1, f=2))):
            row[f"over questions, {name}"] = _asked(model, split, cer, questions, s, seed)
        return row

    cells = _collect(seeds, store, f"ranking {data.name}", compute, advance)
    metric, better = _METRIC[data.kind]
    parts: list[tuple[str, Written, Literal["lower", "higher"]]] = [
        ("flips found", Written("precision"), "higher"),
        ("first shortcut", Written("mean reciprocal rank"), "higher"),
        ("over questions", metric, better),
    ]
    results = [
        row
        for prefix, what, way in parts
        for row in _rows(data, cells, what, way, [name for name in cells if name.startswith(prefix)])
    ]
    sign = -1 if better == "lower" else 1
    ranked, chance = (
        {seed: sign * value for seed, value in cells[f"over questions, {name}"].items()}
        for name in ("ranked", "at random")
    )
    claims = [
        _claim(
            f"{feature} ranks the first shortcut twice as high as chance or more",
            _mean(cells[f"first shortcut, {feature}"]) / _mean(cells["first shortcut, chance"]),
            2.0,
        )
        for feature in ("counterfactual", "uncertainty")
    ]
    claims.append(
        _claim("asking by rank scores more than at random, in four seeds of five or more", _share(ranked, chance), 0.8)
    )
    if "flips found, influence" in cells:
        found = cells["flips found, influence"]
        claims += [
            _claim("influence finds flipped labels at 3 times their rate or more", _mean(found) / flipped, 3.0),
            _claim(
                "influence finds more flipped labels than uncertainty",
                _gap(found, cells["flips found, uncertainty"]),
                0.0,
            ),
        ]
    return Found(cells, results, claims)


def _chance(features: int, among: int) -> float:
    """Mean reciprocal rank of the first of several features in a random order."""
    left, total = 1.0, 0.0
    for rank in range(1, features - among + 2):
        hit = among / (features - rank + 1)
        total += left * hit / rank
        left *= 1 - hit
    return total


def _find_flips(split: Split, share: float, s: Setting, seed: int) -> dict[str, float]:
    train = split.train
    count = max(1, round(share * len(train)))
    wrong = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:count]
    y = train.targets.clone()
    y[wrong] = 1 - y[wrong]
    train = replace(train, y=y)
    model = _trained(train, split.validation, s, seed)
    is_wrong = torch.zeros(len(train))
    is_wrong[wrong] = 1
    predicted = model.predict(train.x, train.lengths, samples=s.samples)
    orders = {
        "influence": -influence_on(model, train, split.validation).of(train),
        "uncertainty": uncertainty(predicted),
        "error": (predicted.mean[:, 0] - y.to(predicted.mean)).abs(),
    }
    return {
        f"flips found, {name}": float(is_wrong[order.argsort(descending=True)[:count]].mean())
        for name, order in orders.items()
    }


def _asked(model: FeatureNAP, split: Split, cer: CER, questions: int, s: Setting, seed: int) -> float:
    """Mean score over questions about one instance each."""
    assert split.truth is not None
    train, context, found = split.train, Context(*split.truth.shape), list[float]()
    left, oracle = list(range(len(train))), Oracle(split.truth)
    for question in range(questions):
        model.update(context)
        item = cer.rank(model, train, among=left, seed=100 * seed + question)[0]
        left.remove(item.index)
        context.mark(item.instance, oracle.judge(item, train), allow_empty=True)
        model.update(context)
        found.append(_measured(model, split.test, s))
    model.update(Context(*split.truth.shape))
    return float(np.mean(found))


# ---- E5: a regression with a leak


def leak(
    source: str | Dataset = "txhousing",
    seeds: Sequence[int] = (0,),
    protocol: Protocol = Protocol(columns=1, shift=5.0),
    *,
    store: Store = UNSTORED,
    advance: Callable[[str, float], None] | None = None,
) -> Found:
    """Give a regression a column that all but holds its target in training and is noise in the test (E5).

    Parameters
    ----------
    source : a regression, or its name
    seeds, protocol, store, advance : as of :func:`correction`

    Returns
    -------
    Mean percentage errors: "clean" without the column, "leak, none" and "leak, 20 masks" with it; "ridge" of scikit-
    learn on flattened series; of house prices, "persistence", the last month's price.

    Raises
    ------
    InputError
        For a set that is no regression.
    """
    data, s = _set(source), protocol.setting
    if data.kind != "regression":
        raise InputError(f"{data.name}: a leak is planted in a regression, this is a {data.kind} task")
    is_log = data.name == "txhousing"

    def error(series: Series, predicted: np.ndarray) -> float:
        y, p = (series.scaling.raw_target(torch.as_tensor(v)).double().numpy() for v in (series.targets, predicted))
        y, p = (np.exp(v) if is_log else v for v in (y, p))
        return float((np.abs(p - y) / np.abs(y)).mean())

    def by(model: FeatureNAP, series: Series) -> float:
        return error(series, model.predict(series.x, series.lengths, samples=s.samples).mean[:, 0].numpy())

    def compute(seed: int) -> dict[str, float]:
        clean = drawn(data, seed, protocol, planted=False)
        row = {"clean": by(_trained(clean.train, clean.validation, s, seed), clean.test)}
        flat = [part.x.flatten(1).double().numpy() for part in (clean.train, clean.test)]
        row["ridge"] = error(clean.test, Ridge(1.0).fit(flat[0], clean.train.targets.numpy()).predict(flat[1]))
        if is_log:
            price = clean.test.scaling.raw(clean.test.x)[:, -1, data.features.index("median")].double().expm1().log()
            scaling = clean.test.scaling
            row["persistence"] = error(clean.test, ((price - scaling.target_mean) / scaling.target_deviation).numpy())
        split = drawn(data, seed, protocol)
        assert split.truth is not None
        model = _trained(split.train, split.validation, s, seed)
        row["leak, none"] = by(model, split.test)
        model.update(_of(_masks(split.truth, 20, protocol.unseen, seed)))
        row["leak, 20 masks"] = by(model, split.test)
        return row

    cells = _collect(seeds, store, f"leak {data.name}", compute, advance)
    claims = [
        _claim(
            "with 20 masks the error is within 15 % of the clean model's",
            _mean(cells["leak, 20 masks"]) / _mean(cells["clean"]) - 1,
            0.15,
            below=True,
        ),
        _claim("the leak costs more than 15 % before", _mean(cells["leak, none"]) / _mean(cells["clean"]) - 1, 0.15),
    ]
    if is_log:
        claims.append(
            _claim("no worse than the last price", _mean(cells["clean"]) / _mean(cells["persistence"]), 1.0, below=True)
        )
    return Found(cells, _rows(data, cells, written("mpe"), "lower"), claims)


# ---- E6: what the model does not know


def honesty(
    source: str | Dataset,
    seeds: Sequence[int],
    protocol: Protocol = Protocol(),
    *,
    store: Store = UNSTORED,
    advance: Callable[[str, float], None] | None = None,
) -> Found:
    """Ask whether spread says what is not known (E6): with more masks, with annotators in conflict, with more draws.

    Parameters
    ----------
    source, seeds, protocol, store, advance : as of :func:`correction`

    Returns
    -------
    Rank correlations with the number of masks, 0 to 50, of the latent's deviation and of the spread of predictions; the
    spread of the gate at cells where half say 0 and half 1, over that where all agree; the slope of the logarithm of
    the Monte Carlo error over that of the draws.
    """
    data, s = _set(source), protocol.setting
    counts = (0, 1, 2, 5, 10, 20, 50)

    def compute(seed: int) -> dict[str, float]:
        split = drawn(data, seed, protocol)
        assert split.truth is not None
        model, test = (
            _trained(split.train, split.validation, s, seed),
            split.test.part(range(min(200, len(split.test)))),
        )
        latent, spread = list[float](), list[float]()
        for k in counts:
            model.update(_of(_masks(split.truth, k, protocol.unseen, seed)) if k else Context(*split.truth.shape))
            gaussian = model.gaussian()
            assert gaussian is not None
            latent.append(float(gaussian.deviation.detach().mean()))
            spread.append(float(model.predict(test.x, test.lengths, samples=50).spread.mean()))
        row = {
            "correlation of the latent's deviation with masks": float(spearmanr(counts, latent).statistic),
            "correlation of the spread with masks": float(spearmanr(counts, spread).statistic),
            "spread with 50 masks, of that with none": spread[-1] / spread[0],
        }
        off = split.truth == 0
        for name, masks in _conflict(split.truth).items():
            model.update(_of(masks))
            with torch.no_grad():
                gate = model.gate(model.condition(200, seed), hard=False)
            row[f"spread of the gate, {name}"] = float(gate.std(0)[off].mean())
            row[f"preference, {name}"] = float(model.preference[off].mean())
        row["slope of the error over draws"] = _slope(model, test)
        return row

    cells = _collect(seeds, store, f"honesty {data.name}", compute, advance)
    claims = [
        _claim(
            "the spread of predictions falls with masks (rank correlation)",
            _mean(cells["correlation of the spread with masks"]),
            -0.8,
            below=True,
        ),
        _claim(
            "the latent's deviation falls with masks (rank correlation)",
            _mean(cells["correlation of the latent's deviation with masks"]),
            -0.8,
            below=True,
        ),
        _claim(
            "annotators in conflict leave the preference near 0",
            abs(_mean(cells["preference, in conflict"])),
            0.05,
            below=True,
        ),
        _claim(
            "the gate varies more where annotators are in conflict than where they agree",
            _mean(cells["spread of the gate, in conflict"]) / _mean(cells["spread of the gate, in agreement"]),
            1.0,
        ),
        _claim(
            "the Monte Carlo error falls with the root of the draws: slope within 0.15 of -0.5",
            abs(_mean(cells["slope of the error over draws"]) + 0.5),
            0.15,
            below=True,
        ),
    ]
    return Found(cells, _rows(data, cells, Written("measured"), "lower"), claims)


def _conflict(truth: Int8[Tensor, "t r"]) -> dict[str, Int8[Tensor, "k t r"]]:
    agreed = truth.repeat(20, 1, 1)
    torn = agreed.clone()
    torn[::2] = torch.where(truth == 0, 1, truth)
    return {"in agreement": agreed, "in conflict": torn}


def _slope(model: FeatureNAP, series: Series) -> float:
    """Fit the logarithm of the error of a mean of S draws, from one of many, over that of S."""
    draws = model.predict(series.x, series.lengths, samples=2048, seed=1).samples[:, :, 0]
    truth, sizes = draws.mean(0), (4, 8, 16, 32, 64)
    errors = [
        float((draws[: 1024 // size * size].unflatten(0, (-1, size)).mean(1) - truth).square().mean().sqrt())
        for size in sizes
    ]
    return float(np.polyfit(np.log(sizes), np.log(errors), 1)[0])


# ---- what training with imagined annotators costs


def tax(
    source: str | Dataset,
    seeds: Sequence[int],
    protocol: Protocol = Protocol(),
    *,
    store: Store = UNSTORED,
    advance: Callable[[str, float], None] | None = None,
) -> Found:
    """Compare the model before any verdict with a plain RETAIN, where nothing is planted (spec 10, pitfall 12).

    Parameters
    ----------
    source, seeds, protocol, store, advance : as of :func:`correction`
    """
    data, s = _set(source), protocol.setting

    def compute(seed: int) -> dict[str, float]:
        split = drawn(data, seed, protocol, planted=False)
        train, test = split.train, split.test
        row = {"ial-nap": _measured(_trained(train, split.validation, s, seed), test, s)}
        plain = Retain(len(train.features), train.outputs, hidden=s.hidden, keep=s.keep, seed=seed)
        training = Training(
            plain,
            Plain(plain, l2=s.l2),
            train,
            split.validation,
            epochs=s.epochs,
            batch_size=s.batch_size,
            lr=s.lr,
            seed=seed,
        )
        training.run()
        with torch.no_grad():
            row["retain"] = score(probabilities(plain(test.x, test.lengths).logits, test.kind), test)
        return row

    cells = _collect(seeds, store, f"tax {data.name}", compute, advance)
    metric, better = _METRIC[data.kind]
    sign = -1 if better == "lower" else 1
    cost = sign * _gap(cells["retain"], cells["ial-nap"])
    limit = 0.02 if better == "higher" else 0.02 * _mean(cells["retain"])
    text = f"without verdicts, within {metric.size(0.02)} of a plain RETAIN"
    claim = _claim(text, cost, limit, below=True, source="specification 10", of=metric)
    return Found(cells, _rows(data, cells, metric, better), [claim])


# ---- update against training


def update_race(
    source: str | Dataset,
    seeds: Sequence[int],
    protocol: Protocol = Protocol(),
    *,
    store: Store = UNSTORED,
    advance: Callable[[str, float], None] | None = None,
) -> Found:
    """Time an update on 40 annotated instances against 50 gradient steps and against training anew (spec 9).

    Parameters
    ----------
    source, seeds, protocol, store, advance : as of :func:`correction`
    """
    data, s = _set(source), protocol.setting

    def compute(seed: int) -> dict[str, float]:
        split = drawn(data, seed, protocol)
        assert split.truth is not None
        train, names = split.train, split.planted
        model = _trained(train, split.validation, replace(s, epochs=1), seed)
        count = min(40, len(train))
        context = Context.of(_masks(split.truth, count, protocol.unseen, seed), ids=train.ids[:count], allow_empty=True)
        row: dict[str, float] = {}
        model.update(context)
        began = time.perf_counter()
        for _ in range(20):
            model.update(context)
        row["update"] = (time.perf_counter() - began) / 20
        began = time.perf_counter()
        finetune(model, train.part(range(count)), context, steps=s.steps, lr=s.step_lr, seed=seed)
        row["finetune"] = time.perf_counter() - began
        began = time.perf_counter()
        _trained(train.without(names), split.validation.without(names), s, seed)
        row["drop and train anew"] = time.perf_counter() - began
        return row

    cells = _collect(seeds, store, f"update {data.name}", compute, advance)
    update = _mean(cells["update"])
    claims = [
        _claim("an update takes less than 1/20 of fine-tuning", update / _mean(cells["finetune"]), 0.05, below=True),
        _claim(
            "an update takes less than 1/1000 of training anew",
            update / _mean(cells["drop and train anew"]),
            0.001,
            below=True,
        ),
    ]
    rows = [
        summarize(list(by.values()), dataset=data.name, method=name, metric="time", unit="s", better="lower")
        for name, by in cells.items()
    ]
    return Found(cells, rows, claims)


EXPERIMENTS: dict[str, tuple[str, Callable[..., Found]]] = {
    "loop": ("methods against each other, in rounds of annotation", loop),
    "correction": ("what masks of a planted shortcut do to a trained model", correction),
    "harmless": ("verdicts that exclude nothing, where nothing is planted", harmless),
    "ranking": ("whether rankings find flipped labels and a shortcut", ranking),
    "leak": ("a regression with a leaked target", leak),
    "honesty": ("what spread says about what is known", honesty),
    "tax": ("the model before any verdict, against RETAIN", tax),
    "update": ("an update against fine-tuning and training anew, timed", update_race),
}
"""Experiments by name: what they ask, and how they are run."""


def run_experiment(
    name: str,
    source: str | Dataset,
    seeds: Sequence[int],
    protocol: Protocol = Protocol(),
    *,
    methods: Sequence[Method] = DEMO_METHODS,
    store: Store = UNSTORED,
    advance: Callable[[str, float], None] | None = None,
) -> Found:
    """Run one of :data:`EXPERIMENTS`.

    Parameters
    ----------
    name : of it
    source : a set, or its name
    seeds : of splits, shortcuts, weights and choices
    protocol : what is common
    methods : of "loop"
    store : keeps pieces of work
    advance : called with a note and how many pieces are done since

    Raises
    ------
    UnknownKeyError
        For another name.
    """
    if name not in EXPERIMENTS:
        raise no_such("experiment", name, EXPERIMENTS)
    if name == "loop":
        return loop(source, methods, seeds, protocol, store=store, advance=advance)
    return EXPERIMENTS[name][1](source, seeds, protocol, store=store, advance=advance)


# ---- the demo


@dataclass(frozen=True, eq=False)
class Demo:
    """What a demo shows.

    Parameters
    ----------
    data : the set, with its shortcut planted in `split`
    split : of it
    found : methods against each other
    queue : what the model asked about first
    item : test instance of the pictures
    before, after : what its cells contribute, before any verdict and after `masks` of them
    masks : annotated instances of the pictures
    scores : of the test part, before and after
    """

    data: Dataset
    split: Split
    found: Found
    queue: list[Ranked]
    item: int
    before: Contributions
    after: Contributions
    masks: int
    scores: tuple[float, float]


def demo_run(
    source: str | Dataset = "cells",
    *,
    methods: Sequence[Method] = DEMO_METHODS,
    seeds: Sequence[int] = (0,),
    protocol: Protocol | None = None,
    store: Store = UNSTORED,
    advance: Callable[[str, float], None] | None = None,
) -> Demo:
    """Plant a shortcut in real data, let a model learn it, ask an annotator who knows, and see it obey.

    Parameters
    ----------
    source : a set, or its name
    methods : to compare
    seeds : the first is also that of the pictures
    protocol : None is a quick one: two rounds of five instances with four features each
    store : keeps pieces of work
    advance : called with a note and how many pieces are done since
    """
    data = _set(source)
    protocol = protocol or Protocol(setting=Setting(rounds=2, k=5, f=4, epochs=100), trials=1)
    found = loop(data, methods, seeds, protocol, store=store, advance=advance)
    seed, s = seeds[0], protocol.setting
    split = drawn(data, seed, protocol)
    assert split.truth is not None
    model = _trained(split.train, split.validation, s, seed)
    queue = CER(k=s.k, f=s.f, samples=s.samples).rank(model, split.train, seed=seed)
    test = split.test
    # The instance that the shortcut misleads most.
    at = [test.features.index(name) for name in split.planted]
    with torch.no_grad():
        cells = model.contributions(test.x, test.lengths).cells
    misled = cells[:, :, at].sum((1, 2, 3)) * (1 - 2 * test.targets.float()) if data.kind == "binary" else (
        cells[:, :, at].abs().sum((1, 2, 3))
    )  # fmt: skip
    item = int(misled.argmax())
    scores = [_measured(model, test, s)]
    one = test.part([item])
    with torch.no_grad():
        before = model.contributions(one.x, one.lengths)
    context, oracle = Context(*split.truth.shape), Oracle(split.truth)
    for asked in queue:
        context.mark(asked.instance, oracle.judge(asked, split.train), allow_empty=True)
    model.update(context)
    scores.append(_measured(model, test, s))
    with torch.no_grad():
        after = model.contributions(one.x, one.lengths)
    return Demo(data, split, found, queue, item, before, after, len(queue), (scores[0], scores[1]))
