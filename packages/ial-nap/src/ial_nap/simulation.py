"""The loop with annotators who know the truth, or nearly: rank, ask, obey, measure, for a few rounds (spec 6)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Float, Int8
from sklearn.metrics import roc_auc_score
from torch import Tensor

from ial_nap.attention import Uncertain
from ial_nap.baselines import Annotated, attention_supervision, heed, majority_off, masked_logits, right_reasons
from ial_nap.context import Context
from ial_nap.episodes import Episodes
from ial_nap.nap import FeatureNAP, probabilities
from ial_nap.ranking import CER, Ranked
from ial_nap.series import Series
from ial_nap.training import Episodic, Plain, Training, finetune, losses
from shared_core.errors import InputError

__all__ = ["Method", "Oracle", "Round", "Setting", "score", "simulate"]

Method: TypeAlias = Literal[
    "none", "ial-nap", "random-nap", "gate-only", "ial-nap-finetune", "random-ua", "aila", "rrr", "drop"
]
"""Ways to learn from verdicts; "none" does not."""


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
    epochs, batch, lr, l2 : of the first training
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
    batch: int = 200
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
) -> list[Round]:
    """Train, then rank, ask and learn in rounds, and measure on the test series after each.

    Methods whose name says random choose at random, as do those without a way of ranking of their own; all others rank
    by :class:`ial_nap.CER`.

    Parameters
    ----------
    method : how to learn
    train, validation, test : series; the choice of what to ask never sees the test
    oracle : who answers
    setting : sizes and numbers
    seed : of weights, batches, episodes and random choices

    Raises
    ------
    InputError
        For an unknown method, or a setting without a round.
    """
    if method not in get_args(Method):
        raise InputError(f"unknown method '{method}': choose {', '.join(get_args(Method))}")
    if setting.rounds < 1:
        raise InputError(f"rounds must be 1 or more, got {setting.rounds}")
    began = time.perf_counter()
    arm = _ARMS[method](train, validation, setting, seed)
    found = [Round(method, 0, 0, score(arm.predict(test), test), time.perf_counter() - began)]
    context = Context(len(train.steps), len(train.features), schema=train.schema)
    left, cells = list(range(len(train))), 0
    for number in range(1, setting.rounds + 1):
        shown = arm.choose(left, seed * 100 + number)
        for item in shown:
            said = oracle.judge(item, train)
            cells += len(said)
            context.mark(item.instance, said, allow_empty=True)
        chosen = {item.index for item in shown}
        left = [k for k in left if k not in chosen]
        began = time.perf_counter()
        arm.learn(context)
        seconds = time.perf_counter() - began
        found.append(Round(method, number, cells, score(arm.predict(test), test), seconds))
    return found


class _Arm:
    """A method at work: an attention model in feature space without verdicts, unless a subclass says otherwise."""

    is_episodic = False
    latent = 0
    is_random = True

    def __init__(self, train: Series, validation: Series, setting: Setting, seed: int) -> None:
        self.train, self.validation, self.setting, self.seed = train, validation, setting, seed
        self.model = self.fitted(train, validation)

    def fitted(self, train: Series, validation: Series) -> FeatureNAP:
        s = self.setting
        latent = s.latent if self.latent else 0
        model = FeatureNAP.of(train, hidden=s.hidden, latent=latent, keep=s.keep, seed=self.seed)
        episodes = s.episodes or Episodes(model.steps, model.features)
        if not self.is_episodic:
            episodes = replace(episodes, steps=model.steps, features=model.features, empty=1.0)
        objective = Episodic(model, episodes=episodes, gate=0.5 if self.is_episodic else 0.0, l2=s.l2, seed=self.seed)
        Training(model, objective, train, validation, epochs=s.epochs, batch=s.batch, lr=s.lr, seed=self.seed).run()
        return model

    def choose(self, left: Sequence[int], seed: int) -> list[Ranked]:
        s = self.setting
        cer = replace(s.cer, k=s.k, f=s.f, samples=s.samples)
        if self.is_random:
            cer = replace(cer, instance="random", feature="random")
        return cer.rank(self.model, self.train, self.validation, among=left, seed=seed)

    def learn(self, context: Context) -> None:
        """Do nothing: what was said is not heard."""

    def predict(self, series: Series) -> Tensor:
        return self.model.predict(series.x, series.lengths, samples=self.setting.samples).mean


class _NAP(_Arm):
    is_episodic, latent, is_random = True, 1, False

    def learn(self, context: Context) -> None:
        self.model.update(context)


class _RandomNAP(_NAP):
    is_random = True


class _GateOnly(_NAP):
    latent = 0


class _Finetuned(_NAP):
    def learn(self, context: Context) -> None:
        s = self.setting
        seen = Annotated.of(self.train, context).series
        finetune(self.model, seen, context, steps=s.steps, lr=s.step_lr, l2=s.l2, seed=self.seed)


class _Drop(_Arm):
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


class _Supervised(_Arm):
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
            batch=s.batch,
            l2=s.l2,
            seed=self.seed,
        )


class _RightReasons(_Supervised):
    def penalty(self, seen: Annotated) -> Tensor:
        model, series = self.model, seen.series

        def likelihood(x: Tensor) -> Tensor:
            return -losses(model.read(x, series.lengths, model.condition()).logits, series.targets, series.kind)

        return right_reasons(likelihood, series.x, seen.masks)


class _RandomUA(_Arm):
    """Uncertainty-aware attention, fine-tuned with the masks on its weights."""

    def __init__(self, train: Series, validation: Series, setting: Setting, seed: int) -> None:
        super().__init__(train, validation, replace(setting, epochs=1), seed)
        self.setting = s = setting
        self.attentive = Uncertain(len(train.features), train.outputs, hidden=s.hidden, keep=s.keep, seed=seed)
        objective = Plain(self.attentive, l2=s.l2)
        Training(self.attentive, objective, train, validation, epochs=s.epochs, batch=s.batch, lr=s.lr, seed=seed).run()

    def learn(self, context: Context) -> None:
        s, seen, model = self.setting, Annotated.of(self.train, context), self.attentive

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
        if not hasattr(self, "attentive"):
            return super().predict(series)
        generator = torch.Generator().manual_seed(self.seed)
        draws = [
            probabilities(self.attentive(series.x, series.lengths, generator).logits, series.kind)
            for _ in range(self.setting.samples)
        ]
        return torch.stack(draws).mean(0)


def _no_task(_series: Series, _generator: torch.Generator) -> Tensor:
    raise AssertionError("no task is trained on")


_ARMS: dict[Method, Callable[[Series, Series, Setting, int], _Arm]] = {
    "none": _Arm,
    "ial-nap": _NAP,
    "random-nap": _RandomNAP,
    "gate-only": _GateOnly,
    "ial-nap-finetune": _Finetuned,
    "random-ua": _RandomUA,
    "aila": _Supervised,
    "rrr": _RightReasons,
    "drop": _Drop,
}
