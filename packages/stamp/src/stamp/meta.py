"""Meta-training of a mask generator over tasks drawn from reference sets, once for a backbone (spec 2.5 to 2.7).

Each step draws tasks, lets the generator read the support examples of each, gates the frozen network by what it says,
fits a classifier to the gated features of the support, and judges it on the query. By default the budget holds in each
step (`projection.project`) and is another one every time, which is ours; the specification's penalties are options.
Sampled gates, the default, keep the channels of different domains apart. Deterministic ones that sharpen
(``gates="annealed"``, with a temperature down to 0.03) let a network live on half-open channels, but did better on a
data set unlike the reference.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int64
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from shared_core.device import World
from shared_core.errors import InputError
from stamp.counting import CostModel
from stamp.examples import Examples, check_fits
from stamp.gating import gated_features
from stamp.generator import MaskGenerator
from stamp.plan import PlanError, PrunePlan
from stamp.projection import project
from stamp.sampling import bernoulli_kl, concrete
from stamp.selection import overlap, select, widths_like
from stamp.tasks import Task, TaskSampler
from stamp.training import class_mean_weights, head_name, penultimate

__all__ = ["MetaConfig", "MetaHistory", "MetaRecord", "MetaStep", "MetaTrainer"]

SAME = 0.95
"""Overlap of masks above which a generator counts as ignoring what it reads."""

_Gates = dict[str, Tensor]


class MetaConfig(BaseModel):
    """Settings of meta-training, checked; every one has a default that works on small data.

    Parameters
    ----------
    iters : outer steps
    tasks : tasks of a step, over all reference sets in turn
    ways : fewest and most classes of a task
    shots : examples of a class to learn from
    queries : other examples of a class to judge by
    set_size : most examples of a task that the generator reads
    lr : Adam's learning rate for the networks of the generator
    own_lr : that for the logits of the channels' own
    inner : classifier of a task: means of classes, closed form, or rows of the network's own head
    inner_steps : gradient steps of the inner adaptation (not with ridge)
    inner_lr : learning rate of these steps
    adapt : what they change
    second_order : differentiate through the steps of the head
    gates : deterministic and sharpening; binary concrete samples; those, rounded forwards
    temperature : at the start and at the end, geometric between
    penalty : how the budget is kept: exactly, by dual ascent, by a squared penalty, or by a prior
    budgets : share of the multiply-adds, drawn between these
    cost_weight : of the penalties dual (at the start) and squared
    prior : keep rate of the prior, penalty kl
    kl_weight : of the divergence from the prior, over a task's examples
    swap : weight of the reward for masks that only their own task likes; off with one task
    jitter : look at each task through a random transform
    batch_statistics : judge with the batch's statistics, as after recalibration, and not with the running
    validate_every : steps between validations, where there are validation examples
    seed : of tasks, budgets and gates

    Examples
    --------
    >>> MetaConfig(iters=100, budgets=(0.25, 0.25)).gates
    'concrete'
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    iters: int = Field(default=400, ge=0, description="outer steps")
    tasks: int = Field(default=4, ge=1, description="tasks of a step, over all reference sets in turn")
    ways: tuple[int, int] = Field(default=(5, 20), description="fewest and most classes of a task")
    shots: int = Field(default=4, ge=1, description="examples of a class to learn from")
    queries: int = Field(default=4, ge=1, description="other examples of a class to judge by")
    set_size: int = Field(default=64, ge=2, description="most examples of a task that the generator reads")
    lr: float = Field(default=1e-2, gt=0, description="Adam's learning rate for the networks of the generator")
    own_lr: float = Field(default=1e-2, gt=0, description="that for the logits of the channels' own")
    inner: Literal["class-mean", "ridge", "slice"] = Field(
        default="class-mean",
        description="classifier of a task: means of classes, closed form, or rows of the network's own head",
    )
    inner_steps: int = Field(default=0, ge=0, description="gradient steps of the inner adaptation (not with ridge)")
    inner_lr: float = Field(default=0.05, gt=0, description="learning rate of these steps")
    adapt: Literal["head", "head+bn", "all"] = Field(default="head", description="what they change")
    second_order: bool = Field(default=False, description="differentiate through the steps of the head")
    gates: Literal["annealed", "concrete", "hard"] = Field(
        default="concrete", description="deterministic and sharpening; binary concrete samples; those, rounded forwards"
    )
    temperature: tuple[float, float] = Field(
        default=(0.67, 0.1), description="at the start and at the end, geometric between"
    )
    penalty: Literal["projected", "dual", "squared", "kl"] = Field(
        default="projected",
        description="how the budget is kept: exactly, by dual ascent, by a squared penalty, or by a prior",
    )
    budgets: tuple[float, float] = Field(
        default=(0.1, 0.5), description="share of the multiply-adds, drawn between these"
    )
    cost_weight: float = Field(default=20.0, ge=0, description="of the penalties dual (at the start) and squared")
    prior: float = Field(default=0.1, gt=0, lt=1, description="keep rate of the prior, penalty kl")
    kl_weight: float = Field(default=1.0, ge=0, description="of the divergence from the prior, over a task's examples")
    swap: float = Field(
        default=0.1,
        ge=0,
        description="weight of the reward for masks that only their own task likes; off with one task",
    )
    jitter: bool = Field(default=True, description="look at each task through a random transform")
    batch_statistics: bool = Field(
        default=True, description="judge with the batch's statistics, as after recalibration, and not with the running"
    )
    validate_every: int = Field(
        default=100, ge=1, description="steps between validations, where there are validation examples"
    )
    seed: int = Field(default=0, ge=0, description="of tasks, budgets and gates")


@dataclass(frozen=True)
class MetaRecord:
    """What happened in a step.

    Parameters
    ----------
    step : 1, 2, ...
    loss : mean cross-entropy on the queries
    accuracy : mean accuracy on the queries, in [0, 1], with gates as they were
    ratio : expected share of the multiply-adds
    spread : mean of ``pi (1 - pi)``; 0 where every decision is sharp
    overlap : mean over the groups of the intersection over union of what two tasks of the step keep, of each group the
        best at its expected width; nan of one task
    validation : accuracy on validation tasks, mean over budgets, or None
    seconds : of training so far
    """

    step: int
    loss: float
    accuracy: float
    ratio: float
    spread: float
    overlap: float
    validation: float | None
    seconds: float


@dataclass(frozen=True)
class MetaStep(MetaRecord):
    """A record for `on_step`, with the state to go on from.

    Parameters
    ----------
    state : makes the state, a tree that `shared_core.runs.save_tree` takes
    """

    state: Callable[[], dict[str, Any]] = field(repr=False)


@dataclass(frozen=True)
class MetaHistory:
    """What meta-training did.

    Parameters
    ----------
    records : one a step
    seconds : in all
    """

    records: tuple[MetaRecord, ...] = ()
    seconds: float = 0.0

    @property
    def ignored(self) -> bool:
        """Whether the masks of different tasks were nearly the same at the end: overlap above 0.95."""
        last = [r.overlap for r in self.records[-50:] if r.overlap == r.overlap]
        return bool(last) and sum(last) / len(last) > SAME


class MetaTrainer:
    """Trains a mask generator for a frozen network.

    Parameters
    ----------
    model : the pretrained network; a copy is used, and it stays as it is
    generator : trained in place
    reference : one or more sets to draw tasks from, as the network takes them
    example : a batch that shows the shape of inputs. Default: one example of the reference
    validation : sets with other classes or examples; the generator that does best on them is kept
    head : qualified name of the network's last layer. Default: its last linear layer
    cost : that budgets are shares of. Default: multiply-adds
    config : see `MetaConfig`

    Raises
    ------
    InputError
        For data that do not fit, a generator for another network, or settings that contradict each other.

    Examples
    --------
    >>> from stamp.groups import trace
    >>> net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> data = Examples(torch.rand(60, 6), torch.arange(3).repeat(20), ("a", "b", "c"))
    >>> generator = MaskGenerator(trace(net, data.inputs(slice(0, 2))))
    >>> trainer = MetaTrainer(net, generator, data, config=MetaConfig(iters=3, ways=(2, 3)))
    >>> len(trainer.fit().records)
    3
    """

    def __init__(
        self,
        model: nn.Module,
        generator: MaskGenerator,
        reference: Examples | Sequence[Examples],
        *,
        example: Tensor | None = None,
        validation: Examples | Sequence[Examples] | None = None,
        head: str | None = None,
        cost: CostModel | None = None,
        config: MetaConfig | None = None,
    ) -> None:
        self.config = c = MetaConfig() if config is None else config
        sets = [reference] if isinstance(reference, Examples) else list(reference)
        if not sets:
            raise InputError("reference: give at least one set of examples")
        for data in sets:
            check_fits(model, data)
        _check(c)
        self.head = head_name(model) if head is None else head
        self.model = copy.deepcopy(model).eval().requires_grad_(requires_grad=False)
        self.generator = generator
        self._like = next(iter(self.model.parameters()), torch.zeros(()))
        self.device = self._like.device
        whole = {name: torch.ones(width, dtype=torch.bool) for name, width in generator.groups.widths().items()}
        try:
            PrunePlan(whole, generator.groups).apply(self.model)
        except PlanError as error:
            raise InputError(f"generator: it was made for another network ({error}); make one for this one") from error
        self._weights = generator.weight_ratios(self.model)
        example = (sets[0].inputs(slice(0, 1)) if example is None else example[:1]).to(self._like)
        with torch.no_grad():
            penultimate(self.model, example, self.head)
        self.cost = CostModel.macs(self.model, generator.groups, example) if cost is None else cost

        def sampled(sets: Sequence[Examples], *, jitter: bool) -> TaskSampler:
            return TaskSampler(sets, ways=c.ways, shots=c.shots, queries=c.queries, jitter=jitter)

        self.sampler = sampled(sets, jitter=c.jitter)
        self._offsets = [0]
        for data in sets:
            self._offsets.append(self._offsets[-1] + data.num_classes)
        outputs = cast("nn.Linear", self.model.get_submodule(self.head)).out_features
        if c.inner == "slice" and self._offsets[-1] > outputs:
            number = self._offsets[-1]
            raise InputError(f"inner: 'slice' needs a head for all {number} reference classes, not {outputs}")
        self._validation: list[Task] = []
        if validation is not None:
            held = [validation] if isinstance(validation, Examples) else list(validation)
            random = torch.Generator().manual_seed(c.seed + 1)
            self._validation = sampled(held, jitter=False).draw(max(8, len(held)), random)
        own = [p for name, p in generator.head.named_parameters() if name.startswith("free")]
        known = {id(p) for p in own}
        rest = [p for p in generator.parameters() if id(p) not in known]
        groups = [{"params": p, "lr": rate, "rate": rate} for p, rate in ((rest, c.lr), (own, c.own_lr)) if p]
        self.optimizer = torch.optim.Adam(groups)
        self._trained = [p for p in generator.parameters() if p.requires_grad]
        self._random = torch.Generator().manual_seed(c.seed)
        self._records: list[MetaRecord] = []
        self._weight = c.cost_weight
        self._over: list[float] = []
        self._best: tuple[float, dict[str, Tensor]] | None = None

    def fit(
        self,
        *,
        state: Mapping[str, Any] | None = None,
        on_step: Callable[[MetaStep], None] | None = None,
        world: World | None = None,
    ) -> MetaHistory:
        """Train for the steps of the settings.

        Parameters
        ----------
        state : of a `MetaStep`, to go on from there, bit for bit as without the interruption
        on_step : called after each step
        world : processes that share the tasks of each step, from `shared_core.device.process_group`; all end with the
            same generator, up to rounding that of one process

        Warns
        -----
        UserWarning
            When the masks of different tasks are nearly the same: the generator ignores what it reads.

        Raises
        ------
        InputError
            For a state of another training, or more processes than tasks of a step.
        """
        c = self.config
        world = world or World()
        if world.size > c.tasks:
            raise InputError(f"{world.size} processes share {c.tasks} tasks a step; use fewer, or more tasks")
        if state is not None:
            self._resume(state)
        seconds = self._records[-1].seconds if self._records else 0.0
        world.broadcast([*self.generator.parameters(), *self.generator.buffers()])
        self.generator.train()
        while len(self._records) < c.iters:
            start = time.perf_counter()
            found = self._step(len(self._records), world)
            seconds += time.perf_counter() - start
            step = len(self._records) + 1
            validation = None
            if self._validation and (step % c.validate_every == 0 or step == c.iters):
                validation = self._validated()
                if self._best is None or validation >= self._best[0]:
                    kept = {name: value.detach().clone() for name, value in self.generator.state_dict().items()}
                    self._best = validation, kept
            self._records.append(MetaRecord(step, *found, validation, seconds))
            if on_step is not None:
                on_step(MetaStep(**asdict(self._records[-1]), state=self.state))
        self.generator.eval()
        if self._records:
            self.generator.settings["temperature"] = c.temperature[1] if c.gates == "annealed" else 1.0
        if self._best is not None:
            self.generator.load_state_dict(self._best[1])
        history = MetaHistory(tuple(self._records), seconds)
        if history.ignored and self.generator.settings["head"] != "free":
            warnings.warn(
                "the generator ignores its input: masks of different tasks overlap by more than 95 %; train longer, on"
                " more varied reference sets, or with swap= above 0",
                UserWarning,
                stacklevel=2,
            )
        return history

    def state(self) -> dict[str, Any]:
        """Copy everything that the next step depends on."""
        clone = {name: value.detach().clone() for name, value in self.generator.state_dict().items()}
        return {
            "config": self.config.model_dump_json(),
            "signature": self.generator.groups.signature(),
            "generator": clone,
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "random": self._random.get_state(),
            "records": [asdict(record) for record in self._records],
            "weight": self._weight,
            "over": list(self._over),
            "best": None if self._best is None else [self._best[0], self._best[1]],
        }

    def _resume(self, state: Mapping[str, Any]) -> None:
        try:
            same = state["config"], state["signature"]
            if same != (self.config.model_dump_json(), self.generator.groups.signature()):
                raise InputError("state: it is of a meta-training with other settings, or of another network")
            self.generator.load_state_dict(state["generator"])
            self.optimizer.load_state_dict(state["optimizer"])
            self._random.set_state(state["random"].cpu())
            self._records = [MetaRecord(**record) for record in state["records"]]
            self._weight, self._over = float(state["weight"]), [float(value) for value in state["over"]]
            best = state["best"]
            self._best = None if best is None else (float(best[0]), dict(best[1]))
        except InputError:
            raise
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"state: is not that of a meta-training of this generator ({reason})") from error

    def _step(self, step: int, world: World) -> tuple[float, float, float, float, float]:
        c, random = self.config, self._random
        done = step / max(1, c.iters)
        temperature = c.temperature[0] * (c.temperature[1] / c.temperature[0]) ** done
        budget = c.budgets[0] + (c.budgets[1] - c.budgets[0]) * float(torch.rand((), generator=random))
        tasks = [_moved(task, self._like) for task in self.sampler.draw(c.tasks, random)]
        masks: list[_Gates] = []
        drawn: list[_Gates] = []
        mine = range(len(tasks))[world.shard(len(tasks))]
        rivals = {place: (place + 1) % len(tasks) for place in mine}
        for place, task in enumerate(tasks):
            # Other processes' tasks are read, too, so that all draw and learn statistics alike; but not judged.
            with torch.set_grad_enabled(place in mine or place in rivals.values()):
                index = torch.randperm(len(task.support), generator=random)[: c.set_size].to(self.device)
                y = task.support_y[index] if self.generator.labels else None
                logits = self.generator.logits(
                    self.model, task.support[index], y=y, generator=random, learn=True, weights=self._weights,
                    cost=self.cost if c.penalty == "projected" else None, budget=budget,
                )  # fmt: skip
                pi, gates = self._gates(logits, budget, temperature)
            # What a mask costs counts where its task is.
            masks.append(pi if place in mine else {name: value.detach() for name, value in pi.items()})
            drawn.append(gates)
        outcomes = [self._judged(tasks[place], drawn[place]) for place in mine]
        own = torch.stack([functional.cross_entropy(logits, y) for logits, y in outcomes])
        loss = own.sum() / len(tasks)
        ratios = torch.stack([self.cost.expected(pi) for pi in masks]) / float(self.cost.exact({}))
        loss = loss + self._penalty(masks, ratios, budget, tasks)
        if c.swap and len(tasks) > 1:
            shifted = [self._judged(tasks[place], drawn[rival]) for place, rival in rivals.items()]
            other = torch.stack([functional.cross_entropy(logits, y) for logits, y in shifted])
            loss = loss + c.swap * functional.relu(0.2 + own - other).sum() / len(tasks)
        hits = [float((logits.detach().argmax(1) == y).float().mean()) for logits, y in outcomes]
        said = [float(loss.detach()), float(own.detach().sum() / len(tasks)), sum(hits)]
        # Double precision for the sums, which accelerators of one process need not have.
        told = torch.tensor(said, dtype=torch.float64, device=self.device if world.size > 1 else "cpu")
        world.all_reduce([told])
        if not bool(torch.isfinite(told[0])):
            raise InputError(
                f"step {step + 1}: the loss is {float(told[0])}; the network gives no finite features for some inputs,"
                " or lr= is too high"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * max(0.05, 1 - done)
        self.optimizer.zero_grad(set_to_none=True)
        cast("Any", loss).backward()
        world.sum_gradients(self._trained)
        nn.utils.clip_grad_norm_(self._trained, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            flat = torch.cat([value for pi in masks for value in pi.values()])
            shared = float("nan")
            if len(tasks) > 1:
                found = overlap(*(widths_like(pi, _expected_widths(pi)) for pi in masks[:2]))
                shared = sum(found.values()) / len(found)
            spread = float((flat * (1 - flat)).mean())
        return float(told[1]), float(told[2]) / len(tasks), float(ratios.detach().mean()), spread, shared

    def _gates(self, logits: _Gates, budget: float, temperature: float) -> tuple[_Gates, _Gates]:
        """Return keep probabilities, and the gates that the network is run with."""
        annealed = self.config.gates == "annealed"
        sharp = temperature if annealed else 1.0
        if self.config.penalty == "projected":
            pi, _ = project(logits, self.cost, budget, temperature=sharp)
        else:
            pi = {name: torch.sigmoid(value / sharp) for name, value in logits.items()}
        if annealed:
            return pi, pi
        hard = self.config.gates == "hard"
        return pi, {name: concrete(value, temperature, self._random, hard=hard) for name, value in pi.items()}

    def _penalty(self, masks: list[_Gates], ratios: Tensor, budget: float, tasks: list[Task]) -> Tensor:
        c = self.config
        if c.penalty == "squared":
            return c.cost_weight * functional.relu(ratios - budget).square().mean().float()
        if c.penalty == "dual":
            self._over.append(float(ratios.detach().mean()) - budget)
            if len(self._over) == 20:
                self._weight = max(0.0, self._weight + 50 * sum(self._over) / 20)
                self._over = []
            return self._weight * (ratios - budget).mean().float()
        if c.penalty == "kl":
            parts = [
                bernoulli_kl(torch.cat(list(pi.values())), c.prior) / len(task.support)
                for pi, task in zip(masks, tasks, strict=True)
            ]
            return c.kl_weight * torch.stack(parts).mean()
        return ratios.new_zeros((), dtype=torch.float32)

    def _judged(self, task: Task, gates: _Gates) -> tuple[Float[Tensor, "query ways"], Int64[Tensor, " query"]]:
        """Fit a classifier to the gated support, and return its logits on the query."""
        c = self.config
        model = self.model
        if c.inner_steps and c.adapt != "head":
            return self._adapted(task, gates)
        support, query = self._features(model, gates, (task.support, task.query))
        if c.inner == "ridge":
            return _ridge(support, task.support_y, query, task.ways), task.query_y
        weight, bias = self._first_head(model, task, support)
        if c.inner_steps and not c.second_order:
            support, weight, bias = support.detach(), weight.detach(), bias.detach()
        for _ in range(c.inner_steps):
            error = (torch.softmax(support @ weight.T + bias, 1) - _one_hot(task.support_y, task.ways)) / len(support)
            weight, bias = weight - c.inner_lr * error.T @ support, bias - c.inner_lr * error.sum(0)
        return query @ weight.T + bias, task.query_y

    def _first_head(self, model: nn.Module, task: Task, support: Tensor) -> tuple[Tensor, Tensor]:
        if self.config.inner == "class-mean":
            return class_mean_weights(support, task.support_y, task.ways)
        layer = cast("nn.Linear", model.get_submodule(self.head))
        rows = torch.tensor(task.classes, device=self.device) + self._offsets[task.source]
        bias = layer.bias[rows] if cast("Tensor | None", layer.bias) is not None else support.new_zeros(len(rows))
        return layer.weight[rows], bias

    def _adapted(self, task: Task, gates: _Gates) -> tuple[Tensor, Tensor]:
        """Take the inner steps in a copy of the network, whose gradients stop there (first order)."""
        c = self.config
        still = {name: value.detach() for name, value in gates.items()}
        inner = copy.deepcopy(self.model)
        norms = {p for m in inner.modules() if isinstance(m, _BatchNorm) for p in m.parameters()}
        moving = [p for p in inner.parameters() if c.adapt == "all" or p in norms]
        for p in moving:
            p.requires_grad_()
        with torch.no_grad():
            (support,) = self._features(inner, still, (task.support,))
            weight, bias = self._first_head(inner, task, support)
        weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
        optimizer = torch.optim.SGD([*moving, weight, bias], lr=c.inner_lr)
        for _ in range(c.inner_steps):
            (support,) = self._features(inner, still, (task.support,))
            optimizer.zero_grad()
            cast("Any", functional.cross_entropy(support @ weight.T + bias, task.support_y)).backward()
            optimizer.step()
        inner.requires_grad_(requires_grad=False)
        _, query = self._features(inner, gates, (task.support, task.query))
        return query @ weight.detach().T + bias.detach(), task.query_y

    def _features(self, model: nn.Module, gates: _Gates, parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return what enters the head, gated, of several batches that share one pass."""
        gated = gated_features(
            model,
            self.generator.groups,
            gates,
            torch.cat(list(parts)),
            self.head,
            batch_statistics=self.config.batch_statistics,
        )
        return gated.split([len(part) for part in parts])

    def _validated(self) -> float:
        """Return the accuracy on the validation tasks at three budgets, with hard masks."""
        hits: list[float] = []
        self.generator.eval()
        random = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for found in self._validation:
                task = _moved(found, self._like)
                y = task.support_y if self.generator.labels else None
                logits: _Gates = {}
                for budget in (0.5, 0.25, 0.1):
                    if not logits or self.generator.sequential:
                        logits = self.generator.logits(
                            self.model, task.support, y=y, generator=random, weights=self._weights, cost=self.cost,
                            budget=budget,
                        )  # fmt: skip
                    kept = select(logits, self.cost, max(budget, self._least))
                    gates = {name: mask.to(self.device, torch.float32) for name, mask in kept.items()}
                    support, query = self._features(self.model, gates, (task.support, task.query))
                    guess = _ridge(support, task.support_y, query, task.ways).argmax(1)
                    hits.append(float((guess == task.query_y).float().mean()))
        self.generator.train()
        return sum(hits) / len(hits)

    @property
    def _least(self) -> float:
        """A budget that the floor under each group's width always allows."""
        floor = {
            name: torch.arange(width) < max(1, math.ceil(0.05 * width))
            for name, width in self.generator.groups.widths().items()
        }
        return min(1.0, float(self.cost.exact(floor)) / float(self.cost.exact({})) + 1e-9)


def _check(c: MetaConfig) -> None:
    low, high = c.budgets
    if not 0 < low <= high <= 1:
        raise InputError(f"budgets: must be two shares, 0 < least <= most <= 1, got {c.budgets}")
    if not 0 < c.temperature[1] <= c.temperature[0]:
        raise InputError(f"temperature: must fall from one positive number to another, got {c.temperature}")
    if c.inner == "ridge" and c.inner_steps:
        raise InputError("inner_steps: ridge is solved in closed form; take inner='class-mean' for gradient steps")
    if c.adapt != "head" and not c.inner_steps:
        raise InputError(
            f"adapt: '{c.adapt}' changes nothing in 0 steps; give inner_steps of 1 or more, or leave it out"
        )
    if c.second_order and c.adapt != "head":
        raise InputError(f"second_order: is for adapt='head' only, not '{c.adapt}'")


def _expected_widths(masks: _Gates) -> dict[str, int]:
    return {name: max(1, round(float(pi.sum()))) for name, pi in masks.items()}


def _moved(task: Task, like: Tensor) -> Task:
    return replace(
        task,
        support=task.support.to(like),
        support_y=task.support_y.to(like.device),
        query=task.query.to(like),
        query_y=task.query_y.to(like.device),
    )


def _one_hot(y: Int64[Tensor, " n"], ways: int) -> Float[Tensor, "n ways"]:
    return functional.one_hot(y, ways).to(torch.float32)


def _ridge(
    support: Float[Tensor, "support features"],
    y: Int64[Tensor, " support"],
    query: Float[Tensor, "query features"],
    ways: int,
    strength: float = 0.1,
    scale: float = 6.0,
) -> Float[Tensor, "query ways"]:
    """Regress the classes on centred features of mean squared norm 1, in the dual, and return scaled predictions."""
    centre = support.mean(0)
    norm = (support - centre).square().sum(1).mean().sqrt().detach() + 1e-6
    first, second = (support - centre) / norm, (query - centre) / norm
    target = _one_hot(y, ways)
    target = target - target.mean(0)
    kernel = first @ first.T + strength * torch.eye(len(first), device=first.device, dtype=first.dtype)
    return scale * (second @ first.T @ torch.linalg.solve(kernel, target.to(first)))
