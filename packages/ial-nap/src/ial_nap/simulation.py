"""The loop with annotators who know the truth, or nearly: rank, ask, obey, measure, for a few rounds (spec 6)."""

from __future__ import annotations

import copy
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Generic, TypeAlias, TypeVar, cast

import torch
from jaxtyping import Float, Int8
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from ial_nap.attention import Retain, Uncertain
from ial_nap.baselines import (
    Annotated,
    MaskedPlain,
    attention_supervision,
    heed,
    majority_off,
    masked_logits,
    right_reasons,
)
from ial_nap.choices import METHODS, Method
from ial_nap.context import Context
from ial_nap.episodes import Episodes
from ial_nap.influence import HeadInfluence
from ial_nap.nap import FeatureNAP, probabilities
from ial_nap.ranking import CER, FeatureRanker, InstanceRanker, Ranked
from ial_nap.series import Series
from ial_nap.training import Episodic, Plain, Training, finetune, losses
from shared_core.errors import InputError, no_such

__all__ = ["Method", "Oracle", "Round", "Setting", "Trained", "score", "simulate", "tuned"]

Trained: TypeAlias = "dict[str, tuple[nn.Module, float]]"
"""Models as they are before any verdict, and the seconds their training took; by what they are and their seed."""


@dataclass(frozen=True, eq=False)
class Oracle:
    """An annotator who knows which cells to attend to, and is as careful as you say.

    Parameters
    ----------
    mask : the truth, 1 and 0, for all instances ``(t, r)`` or for each ``(n, t, r)``
    flip : probability of the opposite verdict
    unsure : probability of -1
    seed : of slips

    Raises
    ------
    InputError
        For something that is no probability.
    """

    mask: Int8[Tensor, "... t r"]
    flip: float = 0.0
    unsure: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what is no probability."""
        if not (0 <= self.flip <= 1 and 0 <= self.unsure <= 1):
            raise InputError(f"flip and unsure must be within 0 and 1, got {self.flip} and {self.unsure}")

    def judge(self, item: Ranked, series: Series) -> list[tuple[int, int, int]]:
        """Give verdicts on the features shown, at every real step: step, feature, verdict.

        Parameters
        ----------
        item : what is shown
        series : of which it is one
        """
        truth = self.mask if self.mask.ndim == 2 else self.mask[item.index]
        # Slips belong to the cell, so that every method meets the same annotator.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + item.index)
        drawn = torch.rand((2, *truth.shape), generator=generator)
        said = torch.where(drawn[0] < self.flip, 1 - truth, truth).masked_fill(drawn[1] < self.unsure, -1)
        columns = [series.features.index(name) for name in item.features]
        return [(t, d, int(said[t, d])) for t in range(int(series.lengths[item.index])) for d in columns]


@dataclass(frozen=True)
class Setting:
    """What all methods have in common.

    Parameters
    ----------
    rounds : of annotation
    k, f : instances a round, features of each
    epochs, batch_size, lr, l2 : of the first training
    hidden, latent, keep : of the models
    steps : gradient steps a round of those that train
    step_lr : of these
    weight : of the penalties of "aila" and "rrr"
    samples : draws of a prediction
    cer : ranking; k and f are taken from here
    episodes : of the first training; None takes the defaults
    """

    rounds: int = 4
    k: int = 10
    f: int = 8
    epochs: int = 150
    batch_size: int = 200
    lr: float = 3e-3
    l2: float = 0.004
    hidden: int = 32
    latent: int = 16
    keep: float = 0.8
    steps: int = 50
    step_lr: float = 1e-3
    weight: float = 1.0
    samples: int = 8
    cer: CER = CER()  # noqa: RUF009  (frozen)
    episodes: Episodes | None = None


@dataclass(frozen=True)
class Round:
    """Where a method stands after a round; round 0 is before any annotation.

    Parameters
    ----------
    method : its name
    round : 0, 1, ...
    cells : verdicts so far
    score : see :func:`score`
    seconds : that learning from the round's verdicts took, or the first training
    """

    method: Method
    round: int
    cells: int
    score: float
    seconds: float


def score(predicted: Float[Tensor, "n c"], series: Series) -> float:
    """AUROC of a binary task, accuracy of classes and labels, root mean squared error of a regression in its unit.

    Parameters
    ----------
    predicted : probabilities, or standardised predictions
    series : with labels
    """
    y = series.targets
    if series.kind == "binary":
        return float(roc_auc_score(y.numpy(), predicted[:, 0].numpy()))
    if series.kind == "multiclass":
        return float((predicted.argmax(1) == y).double().mean())
    if series.kind == "multilabel":
        return float(((predicted > 0.5) == (y > 0.5)).double().mean())
    return float((predicted[:, 0] - y).square().mean().sqrt() * series.scaling.target_deviation)


def simulate(
    method: Method,
    train: Series,
    validation: Series,
    test: Series,
    oracle: Oracle,
    setting: Setting = Setting(),
    *,
    seed: int = 0,
    on_round: Callable[[Round], None] | None = None,
    trained: Trained | None = None,
) -> list[Round]:
    """Train, then rank, ask and learn in rounds, and measure on the test series after each.

    "ial-nap" ranks by the setting's :class:`ial_nap.CER`, "gate-only" and "ial-nap-finetuned" do too, "ial-nap:a-b"
    by a for instances and b for features, and "if-retain" by influence through the output layer, once, before anybody
    is asked. All others ask about instances and features drawn at random, the same ones for the same seed.

    "random-retain" and "if-retain" train anew after each round with the masks on the weights of what was annotated,
    "drop" without the features that a majority marked 0; the other baselines take as many gradient steps a round as
    the setting says. "ial-nap", its rankings, "random-nap" and "gate-only" take none.

    Parameters
    ----------
    method : how to learn
    train, validation, test : series; the choice of what to ask never sees the test
    oracle : who answers
    setting : sizes and numbers
    seed : of weights, batches, episodes and random choices
    on_round : called after each round with where the method stands
    trained : kept from one call to the next on the same series with the same setting, so that methods that begin with
        the same model train it once; what belongs to it is found by model and seed

    Raises
    ------
    InputError
        For an unknown method, or a setting without a round.

    Examples
    --------
    >>> from ial_nap import shift_mask, shift_task
    >>> train = shift_task(60, shift=1.2, seed=0)
    >>> others = [shift_task(40, shift=shift, seed=1, like=train) for shift in (1.2, 0.0)]
    >>> quick = Setting(rounds=2, k=3, f=2, epochs=1, hidden=4, latent=2, samples=2)
    >>> [row.cells for row in simulate("ial-nap", train, *others, Oracle(shift_mask()), quick)]
    [0, 24, 48]
    """
    arm = _arm(method, train, validation, setting, seed, trained)
    return _rounds(arm, method, test, oracle, setting.rounds, on_round)


def tuned(
    method: Method,
    train: Series,
    validation: Series,
    oracle: Oracle,
    setting: Setting = Setting(),
    seed: int = 0,
    trials: int = 3,
    *,
    trained: Trained | None = None,
) -> Setting:
    """Choose the numbers a method's learning depends on by the validation series; each method has as many trials.

    "aila" and "rrr" have the weight of their penalty, then the learning rate of their steps; "random-ua" and
    "ial-nap-finetuned" the learning rate. Others have none, and their setting is returned as it is. A try is the whole
    of :func:`simulate` after the first training, which is shared. What counts is the score of the last round on the
    validation series in which the cells that the oracle excludes take their means: on series that have the same
    shortcut as those trained on, not heeding the oracle would win. So the baselines are chosen by what the oracle
    wants, which no test series shows.

    Parameters
    ----------
    method : how to learn
    train, validation : series
    oracle : who answers; one with a mask for each instance excludes none of the validation series
    setting : sizes and numbers to begin with
    seed : as of the simulation
    trials : settings to try, at most 9; the first is the setting's own weight 1 and learning rate 0.001
    trained : as of :func:`simulate`

    Returns
    -------
    The setting with the numbers that did best, the first of equals.

    Raises
    ------
    InputError
        For an unknown method, a setting without a round, or fewer than 1 or more than 9 trials.
    """
    if not 1 <= trials <= len(_RATES):
        raise InputError(f"trials must be within 1 and {len(_RATES)}, got {trials}")
    if method in ("aila", "rrr"):
        pairs = [(weight, rate) for rate in _RATES[:3] for weight in _WEIGHTS][:trials]
    elif method in ("random-ua", "ial-nap-finetuned"):
        pairs = [(setting.weight, rate) for rate in _RATES[:trials]]
    else:
        _check(method, setting)
        return setting
    deprived = validation
    if oracle.mask.ndim == 2:
        deprived = replace(validation, x=torch.where(oracle.mask.to(validation.x.device) == 0, 0, validation.x))
    begun = _arm(method, train, validation, setting, seed, trained)
    sign = -1 if train.kind == "regression" else 1
    best, found = -float("inf"), setting
    for weight, rate in pairs:
        arm = copy.deepcopy(begun, {id(kept): kept for kept in (train, validation)})
        arm.setting = replace(setting, weight=weight, step_lr=rate)
        value = sign * _rounds(arm, method, deprived, oracle, setting.rounds)[-1].score
        if value > best:
            best, found = value, arm.setting
    return found


_WEIGHTS = (1.0, 0.1, 10.0)
_RATES = (1e-3, 3e-3, 3e-4, 1e-2, 1e-4, 2e-3, 5e-4, 5e-3, 2e-4)


def _check(method: Method, setting: Setting) -> None:
    if method not in METHODS:
        raise no_such("method", method, METHODS)
    if setting.rounds < 1:
        raise InputError(f"rounds must be 1 or more, got {setting.rounds}")


def _arm(
    method: Method, train: Series, validation: Series, setting: Setting, seed: int, trained: Trained | None
) -> _Arm:
    _check(method, setting)
    return _ARMS[method](train, validation, setting, seed, {} if trained is None else trained)


def _rounds(
    arm: _Arm,
    method: Method,
    test: Series,
    oracle: Oracle,
    rounds: int,
    on_round: Callable[[Round], None] | None = None,
) -> list[Round]:
    train, found = arm.train, list[Round]()

    def stand(number: int, cells: int, seconds: float) -> None:
        found.append(Round(method, number, cells, score(arm.predict(test), test), seconds))
        if on_round is not None:
            on_round(found[-1])

    stand(0, 0, arm.seconds)
    context = Context(len(train.steps), len(train.features), schema=train.schema)
    left, cells = list(range(len(train))), 0
    for number in range(1, rounds + 1):
        shown = arm.choose(left, arm.seed * 100 + number)
        for item in shown:
            said = oracle.judge(item, train)
            cells += len(said)
            context.mark(item.instance, said, allow_empty=True)
        chosen = {item.index for item in shown}
        left = [k for k in left if k not in chosen]
        began = time.perf_counter()
        arm.learn(context)
        stand(number, cells, time.perf_counter() - began)
    return found


_Model = TypeVar("_Model", bound=nn.Module)


class _Arm(ABC):
    """A method at work."""

    def __init__(self, train: Series, validation: Series, setting: Setting, seed: int) -> None:
        self.train, self.validation, self.setting, self.seed = train, validation, setting, seed
        self.seconds = 0.0

    def choose(self, left: Sequence[int], seed: int) -> list[Ranked]:
        """Draw instances and features of each; equal seeds draw alike, whatever the method."""
        s, names = self.setting, self.train.features
        generator = torch.Generator().manual_seed(seed)
        features = torch.rand(s.k, len(names), generator=generator).argsort(dim=1, stable=True)[:, : s.f]
        instances = torch.rand(len(left), generator=generator).argsort(dim=0, stable=True)[: s.k].tolist()
        return [
            Ranked(
                left[k],
                self.train.ids[left[k]],
                0.0,
                "drawn at random",
                tuple(names[d] for d in row),
                (0.0,) * len(row),
            )
            for k, row in zip(instances, features.tolist(), strict=False)
        ]

    @abstractmethod
    def learn(self, context: Context) -> None:
        """Take up all that was said so far."""

    @abstractmethod
    def predict(self, series: Series) -> Tensor:
        """Predict as :func:`score` takes it."""


class _Began(_Arm, Generic[_Model]):
    """A method that begins with a model trained without verdicts, or under imagined ones."""

    begins_as: ClassVar[str]

    def __init__(self, train: Series, validation: Series, setting: Setting, seed: int, trained: Trained) -> None:
        super().__init__(train, validation, setting, seed)
        key = f"{self.begins_as}:{seed}"
        if key not in trained:
            began = time.perf_counter()
            model = self.first()
            trained[key] = (copy.deepcopy(model), time.perf_counter() - began)
        first, self.seconds = trained[key]
        self.model = cast("_Model", copy.deepcopy(first))

    @abstractmethod
    def first(self) -> _Model:
        """Train the model that there is before any verdict."""


# ---- RETAIN


class _Retain(_Began[Retain]):
    begins_as = "retain"

    def first(self) -> Retain:
        return self.trained_with(None)

    def made(self) -> Retain:
        s = self.setting
        return Retain(len(self.train.features), self.train.outputs, hidden=s.hidden, keep=s.keep, seed=self.seed)

    def trained_with(self, seen: Annotated | None) -> Retain:
        s, model = self.setting, self.made()
        objective = Plain(model, l2=s.l2) if seen is None else MaskedPlain(model, seen, l2=s.l2)
        Training(
            model,
            objective,
            self.train,
            self.validation,
            epochs=s.epochs,
            batch_size=s.batch_size,
            lr=s.lr,
            seed=self.seed,
        ).run()
        return model

    def learn(self, context: Context) -> None:
        """Do nothing: what was said is not heard."""

    @torch.no_grad()
    def predict(self, series: Series) -> Tensor:
        return probabilities(self.model(series.x, series.lengths).logits, series.kind)


class _RandomRetain(_Retain):
    def learn(self, context: Context) -> None:
        self.model = self.trained_with(Annotated.of(self.train, context))


class _InfluenceRetain(_RandomRetain):
    """Instances in the order of the first model's influence, so that nothing heard changes what is asked."""

    def __init__(self, train: Series, validation: Series, setting: Setting, seed: int, trained: Trained) -> None:
        super().__init__(train, validation, setting, seed, trained)
        self.scores = self.influence()

    @torch.no_grad()
    def influence(self) -> Tensor:
        s, model = self.setting, self.model

        def seen(series: Series) -> tuple[Tensor, Tensor, Tensor]:
            phi = model.additive(series.x, series.lengths)
            return phi, model.output(phi), series.targets

        value = losses(seen(self.validation)[1], self.validation.targets, self.validation.kind)
        hard_ones = self.validation.part(value.argsort(descending=True, stable=True)[: s.cer.worst].sort().values)
        head = HeadInfluence.of(seen(self.train), seen(hard_ones), self.train.kind, l2=s.l2)
        found = head.scores(*seen(self.train))
        return found.abs() if s.cer.order == "abs" else -found

    def choose(self, left: Sequence[int], seed: int) -> list[Ranked]:
        # The features are drawn, so that it differs from its random twin by its instances alone.
        best = self.scores[torch.tensor(left)].argsort(descending=True, stable=True)[: self.setting.k].tolist()
        shown = super().choose([left[k] for k in best], seed)
        return [replace(item, score=float(self.scores[item.index]), reason="influence") for item in shown]


class _RandomUA(_Retain):
    """Uncertainty-aware attention whose generators are fine-tuned with the masks on its weights."""

    begins_as = "ua"

    def made(self) -> Uncertain:
        s = self.setting
        return Uncertain(len(self.train.features), self.train.outputs, hidden=s.hidden, keep=s.keep, seed=self.seed)

    def learn(self, context: Context) -> None:
        s, seen, model = self.setting, Annotated.of(self.train, context), self.model

        def loss(generator: torch.Generator) -> Tensor:
            logits = masked_logits(model, seen.series, seen.masks, generator)
            return losses(logits, seen.series.targets, seen.series.kind).mean()

        frozen = [*model.embedding.parameters(), *model.output.parameters()]
        for parameter in frozen:
            parameter.requires_grad_(False)
        heed(model, loss, None, _no_task, steps=s.steps, lr=s.step_lr, l2=s.l2, seed=self.seed)
        for parameter in frozen:
            parameter.requires_grad_()

    @torch.no_grad()
    def predict(self, series: Series) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        draws = [
            probabilities(self.model(series.x, series.lengths, generator).logits, series.kind)
            for _ in range(self.setting.samples)
        ]
        return torch.stack(draws).mean(0)


def _no_task(_series: Series, _generator: torch.Generator) -> Tensor:
    raise AssertionError("no task is trained on")


# ---- attention in feature space


class _Features(_Began[FeatureNAP]):
    begins_as = "features"
    is_episodic: ClassVar[bool] = False
    has_latent: ClassVar[bool] = False

    def first(self) -> FeatureNAP:
        return self.fitted(self.train, self.validation)

    def fitted(self, train: Series, validation: Series) -> FeatureNAP:
        s = self.setting
        latent = s.latent if self.has_latent else 0
        model = FeatureNAP.of(train, hidden=s.hidden, latent=latent, keep=s.keep, seed=self.seed)
        episodes = s.episodes or Episodes(model.steps, model.features)
        if not self.is_episodic:
            episodes = replace(episodes, steps=model.steps, features=model.features, empty=1.0)
        objective = Episodic(model, episodes=episodes, gate=0.5 if self.is_episodic else 0.0, l2=s.l2, seed=self.seed)
        Training(
            model, objective, train, validation, epochs=s.epochs, batch_size=s.batch_size, lr=s.lr, seed=self.seed
        ).run()
        return model

    def predict(self, series: Series) -> Tensor:
        return self.model.predict(series.x, series.lengths, samples=self.setting.samples).mean


class _RandomNAP(_Features):
    begins_as = "nap"
    is_episodic = has_latent = True

    def learn(self, context: Context) -> None:
        self.model.update(context)


class _NAP(_RandomNAP):
    rankers: ClassVar[tuple[InstanceRanker, FeatureRanker] | None] = None

    def choose(self, left: Sequence[int], seed: int) -> list[Ranked]:
        s = self.setting
        cer = replace(s.cer, k=s.k, f=s.f, samples=s.samples)
        if self.rankers is not None:
            cer = replace(cer, instance=self.rankers[0], feature=self.rankers[1])
        return cer.rank(self.model, self.train, self.validation, among=left, seed=seed)


class _InfluenceUncertainty(_NAP):
    rankers = ("influence", "uncertainty")


class _InfluenceInfluence(_NAP):
    rankers = ("influence", "influence")


class _InfluenceCounterfactual(_NAP):
    rankers = ("influence", "counterfactual")


class _GateOnly(_NAP):
    begins_as = "gate"
    has_latent = False


class _Finetuned(_NAP):
    def learn(self, context: Context) -> None:
        s = self.setting
        seen = Annotated.of(self.train, context).series
        finetune(self.model, seen, context, steps=s.steps, lr=s.step_lr, l2=s.l2, seed=self.seed)


class _Drop(_Features):
    gone: tuple[str, ...] = ()

    def learn(self, context: Context) -> None:
        off = majority_off(context).tolist()
        gone = tuple(name for name, is_off in zip(self.train.features, off, strict=True) if is_off)
        if gone != self.gone and len(gone) < len(off):
            self.gone = gone
            self.smaller = self.fitted(self.train.without(gone), self.validation.without(gone))

    def predict(self, series: Series) -> Tensor:
        if not self.gone:
            return super().predict(series)
        part = series.without(self.gone)
        return self.smaller.predict(part.x, part.lengths, samples=self.setting.samples).mean


class _Supervised(_Features):
    def logits(self, series: Series, generator: torch.Generator) -> Tensor:
        model = self.model
        drops = model.drops(len(series), generator) if model.keep < 1 else None
        return model.read(series.x, series.lengths, model.condition(), drops=drops).logits

    def penalty(self, seen: Annotated) -> Tensor:
        model, series = self.model, seen.series
        return attention_supervision(model.read(series.x, series.lengths, model.condition()).beta, seen.masks)

    def learn(self, context: Context) -> None:
        s, seen = self.setting, Annotated.of(self.train, context)
        heed(
            self.model,
            lambda _: s.weight * self.penalty(seen),
            self.train,
            self.logits,
            steps=s.steps,
            lr=s.step_lr,
            batch_size=s.batch_size,
            l2=s.l2,
            seed=self.seed,
        )


class _RightReasons(_Supervised):
    def penalty(self, seen: Annotated) -> Tensor:
        model, series = self.model, seen.series

        def likelihood(x: Tensor) -> Tensor:
            return -losses(model.read(x, series.lengths, model.condition()).logits, series.targets, series.kind)

        return right_reasons(likelihood, series.x, seen.masks)


_ARMS: dict[Method, Callable[[Series, Series, Setting, int, Trained], _Arm]] = {
    "retain": _Retain,
    "random-retain": _RandomRetain,
    "if-retain": _InfluenceRetain,
    "random-ua": _RandomUA,
    "random-nap": _RandomNAP,
    "aila": _Supervised,
    "rrr": _RightReasons,
    "drop": _Drop,
    "gate-only": _GateOnly,
    "ial-nap": _NAP,
    "ial-nap-finetuned": _Finetuned,
    "ial-nap:influence-uncertainty": _InfluenceUncertainty,
    "ial-nap:influence-influence": _InfluenceInfluence,
    "ial-nap:influence-counterfactual": _InfluenceCounterfactual,
}
