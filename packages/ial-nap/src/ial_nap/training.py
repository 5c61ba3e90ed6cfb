"""Train on imagined annotators, so that nothing has to be trained when real ones speak (spec 2.6)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, TypedDict, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int8, Int64, Shaped
from torch import Tensor, nn
from torch.nn import functional

from ial_nap.attention import Retain
from ial_nap.context import Context
from ial_nap.episodes import Episodes, Imagined
from ial_nap.instances import Around, Shown, over_steps
from ial_nap.nap import Condition, FeatureNAP, Latent
from ial_nap.series import Kind, Series
from shared_core.device import World
from shared_core.errors import InputError

__all__ = [
    "Episodic",
    "Epoch",
    "Objective",
    "Plain",
    "Training",
    "TrainingState",
    "finetune",
    "losses",
    "weight_penalty",
]

Objective: TypeAlias = "Callable[[Series, torch.Generator | None, float], Tensor]"
"""Loss of a batch: series, generator (None at evaluation), and the share of all steps that is done."""


_Parts: TypeAlias = "Callable[[Series, torch.Generator, float, slice], Tensor]"


def losses(logits: Float[Tensor, "b c"], y: Shaped[Tensor, "b ..."], kind: Kind) -> Float[Tensor, " b"]:
    """Loss of each instance: cross-entropy, that of labels averaged, or the squared error.

    Parameters
    ----------
    logits : of a regression, the prediction
    y : labels as :class:`ial_nap.Series` holds them
    kind : of the task

    Examples
    --------
    >>> abs(losses(torch.zeros(1, 1), torch.ones(1), "binary").item() - math.log(2)) < 1e-6
    True
    """
    if kind == "multiclass":
        return functional.cross_entropy(logits, y, reduction="none")
    target = y.view(len(y), -1).to(logits)
    if kind == "regression":
        return (logits - target).square().mean(1)
    return functional.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(1)


def weight_penalty(model: nn.Module | Conditioned) -> Float[Tensor, ""]:
    """Half of the sum of squares of all weights; biases and single numbers are left alone.

    Parameters
    ----------
    model : any
    """
    parts = [0.5 * p.square().sum() for p in model.parameters() if p.requires_grad and p.ndim > 1]
    return torch.stack(parts).sum() if parts else torch.zeros(())


@dataclass(frozen=True, eq=False)
class Plain:
    """Loss without annotators.

    Parameters
    ----------
    model : takes ``(x, lengths, generator)``
    l2 : of :func:`weight_penalty`
    """

    model: Retain
    l2: float = 0.004

    def __call__(self, batch: Series, generator: torch.Generator | None, done: float) -> Tensor:  # noqa: ARG002
        """Return the loss of a batch, with the penalty only in training."""
        logits = self.model(batch.x, batch.lengths, generator).logits
        loss = losses(logits, batch.targets, batch.kind).mean()
        return loss if generator is None else loss + self.l2 * weight_penalty(self.model)


@runtime_checkable
class Conditioned(Protocol):
    """What :class:`Episodic` asks of a model: :class:`ial_nap.FeatureNAP` and :class:`ial_nap.GatedModel` have it."""

    steps: int
    features: int
    latent: int
    keep: float
    preference: Tensor

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return what is trained."""
        ...

    def condition_on(self, masks: Tensor, noise: Tensor | None = None) -> tuple[Condition, Latent | None]:
        """Return conditions under other contexts than the present one."""
        ...

    def gate(self, condition: Condition, *, hard: bool) -> Tensor:
        """Return how far cells are open."""
        ...

    def drops(self, rows: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Draw what dropout multiplies."""
        ...

    def logits_under(
        self, x: Tensor, lengths: Tensor, condition: Condition, drops: tuple[Tensor, ...] | None = None
    ) -> Tensor:
        """Predict under conditions."""
        ...


class Episodic:
    """Loss under imagined annotators: of the task, of the gate, of the latent's divergence, of the weights.

    Parameters
    ----------
    model : to train
    episodes : how annotators are imagined; None takes the defaults at the model's sizes
    per_batch : episodes that share a batch, each with its part of the instances
    gate : weight of the binary cross-entropy between the gate and what is not in the off-set
    kl : weight of the latent's divergence, reached after the first fifth of the steps
    l2 : of :func:`weight_penalty`
    bound : "prior": divergence from N(0, 1); "np": of the latent under the masks and a second draw of masks from the
        latent under the first, as in a neural process
    seed : of the episodes that evaluation uses, always the same
    rules : for models that read whom a mask is of: share of episodes whose off-set holds for those instances alone
        whose mean of one feature is above, or below, that of another instance
    by : features that rules are by; () is all

    Raises
    ------
    InputError
        For an unknown bound, fewer than one episode a batch, or rules that are no probability or by no feature.
    """

    def __init__(
        self,
        model: Conditioned,
        *,
        episodes: Episodes | None = None,
        per_batch: int = 8,
        gate: float = 0.5,
        kl: float = 1e-4,
        l2: float = 0.004,
        bound: Literal["prior", "np"] = "prior",
        seed: int = 0,
        rules: float = 0.5,
        by: Sequence[int] = (),
    ) -> None:
        if bound not in {"prior", "np"} or per_batch < 1:
            raise InputError(f"bound must be prior or np, got '{bound}'; per_batch 1 or more, got {per_batch}")
        if bound == "np" and isinstance(model, FeatureNAP) and model.context != "masks":
            raise InputError(f"bound='np' is for context='masks', the model's is '{model.context}': use bound='prior'")
        if not 0 <= rules <= 1 or any(not 0 <= d < model.features for d in by):
            raise InputError(
                f"rules must be within 0 and 1 and by features 0..{model.features - 1}, got {rules} and {list(by)}"
            )
        self.rules, self.by = rules, tuple(by)
        self.model, self.per_batch, self.weights, self.bound = model, per_batch, (gate, kl, l2), bound
        self.episodes = episodes or Episodes(model.steps, model.features)
        self.seed = seed

    def __call__(self, batch: Series, generator: torch.Generator | None, done: float) -> Tensor:
        """Return the loss of a batch; at evaluation, of the task alone, under episodes that are always the same."""
        if generator is not None:
            return self.part(batch, generator, done, slice(len(batch)))
        source = torch.Generator().manual_seed(self.seed)
        drawn = self.episodes.draw(min(self.per_batch, len(batch)), source)
        own, _, _, _ = self._conditions(batch, drawn, None, source)
        return losses(self.model.logits_under(batch.x, batch.lengths, own), batch.targets, batch.kind).mean()

    def part(self, batch: Series, generator: torch.Generator, done: float, own: slice) -> Tensor:
        """Return what some instances add to the loss of a batch; over all parts of it, they sum to the whole.

        Parameters
        ----------
        batch : all of it, so that every process draws alike
        generator : of episodes, latents and dropout
        done : share of all steps that is done
        own : the instances; of none, the first is read, and counts nothing
        """
        model, source, e = self.model, generator, min(self.per_batch, len(batch))
        drawn = self.episodes.draw(e, source)
        noise = torch.randn(e, model.steps, model.latent, generator=source).to(model.preference)
        each, condition, off, latent = self._conditions(batch, drawn, noise, source)
        drops = model.drops(len(batch), source) if model.keep < 1 else None
        count = len(range(*own.indices(len(batch))))
        rows = own if count else slice(1)
        logits = model.logits_under(
            batch.x[rows],
            batch.lengths[rows],
            Condition(each.preference[rows], each.z[rows]),
            None if drops is None else tuple(drop[rows] for drop in drops),
        )
        loss = losses(logits, batch.targets[rows], batch.kind).mean()
        return count / len(batch) * self._with_penalties(loss, drawn, condition, off, latent, source, done)

    def _with_penalties(
        self,
        loss: Tensor,
        drawn: Imagined,
        condition: Condition,
        off: Tensor,
        latent: Latent | None,
        source: torch.Generator,
        done: float,
    ) -> Tensor:
        model = self.model
        gate_weight, kl_weight, l2 = self.weights
        if gate_weight:
            gate = model.gate(condition, hard=False).clamp(1e-6, 1 - 1e-6)
            loss = loss + gate_weight * functional.binary_cross_entropy(gate, (~off).to(gate))
        if kl_weight and latent is not None:
            if self.bound == "np":
                both = torch.cat([drawn.masks, self.episodes.again(drawn, source)], 1).to(model.preference.device)
                _, wider = model.condition_on(both)
                assert wider is not None
                divergence = wider.kl(latent)
            else:
                divergence = latent.kl()
            loss = loss + kl_weight * min(1.0, done / 0.2) * divergence.mean()
        return loss + l2 * weight_penalty(model)

    def _conditions(
        self, batch: Series, drawn: Imagined, noise: Tensor | None, source: torch.Generator
    ) -> tuple[Condition, Condition, Tensor, Latent | None]:
        """Return the condition of each instance; conditions with their off-sets, for the gate; the latent."""
        model, e = self.model, len(drawn.off)
        device = model.preference.device
        row = torch.arange(len(batch), device=device) % e
        if not isinstance(model, FeatureNAP) or model.context == "masks":
            condition, latent = model.condition_on(drawn.masks.to(device), noise)
            own = Condition(condition.preference[row], condition.z[row])
            return own, condition, drawn.off.to(device), latent
        off, masks, at = self._of_instances(batch, drawn, row.cpu(), source)
        around = Around(batch.x, batch.lengths, row)
        condition, latent = model.condition_on(masks.to(device), noise, Shown.of(batch, at.to(device)), around)
        own = condition
        if model.context == "full":
            own = Condition(condition.preference[row], condition.z[row])
        return own, own, off.to(device), latent

    def _of_instances(
        self, batch: Series, drawn: Imagined, row: Int64[Tensor, " b"], source: torch.Generator
    ) -> tuple[Bool[Tensor, "b t r"], Int8[Tensor, "e k t r"], Int64[Tensor, "e k"]]:
        """Give each mask an instance of another episode, and let some off-sets hold for some instances alone."""
        e, k = drawn.masks.shape[:2]
        n = len(batch)
        own = row == torch.arange(e).unsqueeze(1)
        # An instance that is asked about is none of those annotated: its label would be there to read.
        order = torch.rand(e, n, generator=source).masked_fill(own & (e > 1), 2.0).argsort(1)
        others = max(1, n - int(own.sum(1).max())) if e > 1 else n
        at = order[:, torch.arange(k) % others]
        by = torch.tensor(self.by or range(self.episodes.features))
        means = over_steps(batch.x, batch.lengths).cpu()[:, by[torch.randint(len(by), (e,), generator=source)]].T
        level = means[torch.arange(e), torch.randint(n, (e,), generator=source)].unsqueeze(1)
        is_above = torch.rand(e, 1, generator=source) < 0.5
        holds = torch.where(is_above, means > level, means < level)
        holds = holds | (torch.rand(e, 1, generator=source) >= self.rules)
        spared = drawn.off.unsqueeze(1) & ~holds.gather(1, at)[..., None, None] & (drawn.masks >= 0)
        off = drawn.off[row] & holds[row, torch.arange(n)].view(-1, 1, 1)
        return off, torch.where(spared, 1 - drawn.masks, drawn.masks), at


@dataclass(frozen=True)
class Epoch:
    """What an epoch of training came to.

    Parameters
    ----------
    epoch : 1, 2, ...
    loss : mean of the objective
    validation : loss on validation series; NaN without them
    is_best : the best validation loss so far
    """

    epoch: int
    loss: float
    validation: float
    is_best: bool


class TrainingState(TypedDict):
    """All that going on with a training needs."""

    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    generator: Tensor
    history: list[tuple[int, float, float, bool]]
    best: dict[str, Tensor] | None
    since_best: int


class Training:
    """A training that can stop after any epoch and go on from its state, to the bit.

    Parameters
    ----------
    model : to train
    objective : :class:`Episodic`, :class:`Plain`, or any other of the same form
    train : series to learn from
    validation : series to stop by; None trains for all epochs
    lr, batch_size, epochs : of Adam
    patience : epochs without a better validation loss after which to stop
    clip : largest norm of a gradient
    parameters : what is trained; None is all
    seed : of batches, episodes, latents and dropout
    world : processes that share each batch, from :func:`shared_core.device.process_group`; all end with the same model

    Raises
    ------
    InputError
        For numbers that cannot be, series without labels, and several processes with an objective without
        :meth:`Episodic.part`, or a batch smaller than they are many.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        train: Series,
        validation: Series | None = None,
        *,
        lr: float = 3e-3,
        batch_size: int = 200,
        epochs: int = 150,
        patience: int = 20,
        clip: float = 5.0,
        parameters: Sequence[nn.Parameter] | None = None,
        seed: int = 0,
        world: World | None = None,
    ) -> None:
        if lr <= 0 or min(batch_size, epochs, patience) < 1 or clip <= 0:
            raise InputError(
                f"lr and clip must be above 0, batch_size, epochs and patience 1 or more, got {lr}, {clip},"
                f" {batch_size}, {epochs}, {patience}"
            )
        world = world or World()
        self._parts: _Parts | None = getattr(objective, "part", None)
        if world.size > 1 and self._parts is None:
            raise InputError(f"{world.size} processes cannot share a {type(objective).__name__} objective: use one")
        if world.size > batch_size:
            raise InputError(f"{world.size} processes share batches of {batch_size}; use fewer, or a larger batch_size")
        _ = train.targets, None if validation is None else validation.targets
        self.world = world
        self.model, self.objective, self.train, self.validation = model, objective, train, validation
        self.batch_size, self.epochs, self.patience, self.clip = batch_size, epochs, patience, clip
        self.leaves = list(model.parameters() if parameters is None else parameters)
        self.optimizer = torch.optim.Adam(self.leaves, lr=lr)
        self.generator = torch.Generator().manual_seed(seed)
        self.history: list[Epoch] = []
        self.best: dict[str, Tensor] | None = None
        self._since_best = 0

    @property
    def is_done(self) -> bool:
        """No epoch is left, or none has been better for as long as patience lasts."""
        return len(self.history) >= self.epochs or self._since_best >= self.patience

    def run(self, epochs: int | None = None, on_epoch: Callable[[Epoch], None] | None = None) -> list[Epoch]:
        """Train until it is done, or for some epochs; when done, the model is the best one.

        Parameters
        ----------
        epochs : at most; None is all that are left
        on_epoch : called after each

        Returns
        -------
        The whole history.
        """
        left = math.inf if epochs is None else epochs
        while left > 0 and not self.is_done:
            left -= 1
            found = self._epoch()
            if on_epoch is not None:
                on_epoch(found)
        if self.is_done and self.best is not None:
            self.model.load_state_dict(self.best)
        if isinstance(self.model, FeatureNAP):
            self.model.refresh()
        return self.history

    def _epoch(self) -> Epoch:
        order = torch.randperm(len(self.train), generator=self.generator)
        parts = order.split(self.batch_size)
        total = 0.0
        for k, index in enumerate(parts):
            done = (len(self.history) + k / len(parts)) / self.epochs
            batch = self.train.part(index)
            if self.world.size > 1 and self._parts is not None:
                loss = self._parts(batch, self.generator, done, self.world.shard(len(batch)))
            else:
                loss = self.objective(batch, self.generator, done)
            self.optimizer.zero_grad()
            loss.backward()
            self.world.sum_gradients(self.leaves)
            loss = loss.detach()
            self.world.all_reduce([loss])
            nn.utils.clip_grad_norm_(self.leaves, self.clip)
            self.optimizer.step()
            total += loss.item() * len(index)
        value = math.nan
        if self.validation is not None:
            with torch.no_grad():
                found = self.objective(self.validation, None, 1.0)
            # Machines that round differently must not stop at different epochs.
            self.world.broadcast([found])
            value = found.item()
        earlier = [epoch.validation for epoch in self.history]
        is_best = self.validation is not None and all(value < other for other in earlier)
        self._since_best = 0 if is_best or self.validation is None else self._since_best + 1
        if is_best:
            self.best = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        epoch = Epoch(len(self.history) + 1, total / len(self.train), value, is_best)
        self.history.append(epoch)
        return epoch

    def state_dict(self) -> TrainingState:
        """Return all that going on needs."""
        return copy.deepcopy(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "generator": self.generator.get_state(),
                "history": [(e.epoch, e.loss, e.validation, e.is_best) for e in self.history],
                "best": self.best,
                "since_best": self._since_best,
            }
        )

    def load_state_dict(self, state: TrainingState) -> None:
        """Go on from a state.

        Parameters
        ----------
        state : of :meth:`state_dict`, of a training made with the same arguments
        """
        held = copy.deepcopy(state)
        self.model.load_state_dict(held["model"])
        self.optimizer.load_state_dict(held["optimizer"])
        self.generator.set_state(held["generator"])
        self.history = [Epoch(*row) for row in held["history"]]
        self.best = held["best"]
        self._since_best = held["since_best"]


def finetune(
    model: FeatureNAP,
    series: Series,
    context: Context,
    *,
    steps: int = 50,
    lr: float = 1e-3,
    l2: float = 0.004,
    seed: int = 0,
) -> list[float]:
    """Take gradient steps on what makes attention, under the context and on what was annotated (spec 2.6, optional).

    Parameters
    ----------
    model : its output layer stays as it is
    series : annotated instances, all of them a step
    context : what was said
    steps, lr : of Adam
    l2 : of :func:`weight_penalty`
    seed : of dropout and latents

    Returns
    -------
    The loss at each step.

    Raises
    ------
    InputError
        For fewer than 1 step.
    """
    if steps < 1 or lr <= 0:
        raise InputError(f"steps must be 1 or more and lr above 0, got {steps} and {lr}")
    leaves = [p for name, p in model.named_parameters() if not name.startswith("output.")]
    optimizer = torch.optim.Adam(leaves, lr=lr)
    generator = torch.Generator().manual_seed(seed)
    masks = context.masks.unsqueeze(0).to(model.preference.device)
    shown = around = None
    if model.context != "masks" and len(context):
        them = Shown.of(series, [instance for instance, _ in context.keys])
        shown = Shown(them.x.unsqueeze(0), them.y.unsqueeze(0), them.lengths.unsqueeze(0))
        around = Around(series.x, series.lengths, torch.zeros_like(series.lengths))
    found: list[float] = []
    for _ in range(steps):
        noise = torch.randn(1, model.steps, model.latent, generator=generator).to(model.preference)
        condition, _ = model.condition_on(masks, noise, shown, around)
        drops = model.drops(len(series), generator) if model.keep < 1 else None
        logits = model.read(series.x, series.lengths, condition, hard=model.hard, drops=drops).logits
        loss = losses(logits, series.targets, series.kind).mean() + l2 * weight_penalty(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    model.zero_grad()
    model.update(context, series)
    return found
