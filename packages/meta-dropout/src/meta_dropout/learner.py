"""The learner: train over tasks, adapt to one, evaluate over episodes, save and load."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, cast, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from meta_dropout import engine
from meta_dropout.backbones import conv4, mlp
from meta_dropout.data import TaskSource
from meta_dropout.engine import Mix, Plan, Tasks
from meta_dropout.layers import PerturbedHead, PerturbedLayer
from meta_dropout.methods import METHODS, Method, find_method
from meta_dropout.passes import Pass
from meta_dropout.perturb import Perturbed, require_finite
from shared_core.device import World
from shared_core.errors import DAMAGE, InputError

__all__ = ["Evaluation", "LabelError", "MetaLearner", "Prediction", "Source", "Step", "TaskModel"]

_FORMAT = 1


class LabelError(InputError):
    """Labels of a task that are not what they must be."""


@runtime_checkable
class Source(Protocol):
    """Where tasks come from; batch `number` is the same whenever it is asked for."""

    def batch(self, number: int, count: int) -> Tasks:
        """Return `count` tasks, those of positions ``number * count`` and on."""
        ...


@dataclass(frozen=True)
class Step:
    """What is known after a meta-step: its number, the mean query loss and accuracy, and steps that were skipped."""

    step: int
    steps: int
    loss: float
    accuracy: float
    skipped: int


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Results over test episodes.

    Parameters
    ----------
    accuracy : (episodes,) share of right answers, or mean squared errors in a regression
    loss : (episodes,) mean query loss
    calibration_error : expected calibration error over all queries, 15 bins; NaN in a regression
    protocol : how these numbers came about
    """

    accuracy: Float[np.ndarray, " episodes"]
    loss: Float[np.ndarray, " episodes"]
    calibration_error: float
    protocol: dict[str, Any]

    @property
    def mean(self) -> float:
        """Mean accuracy."""
        return float(self.accuracy.mean())

    @property
    def half_width(self) -> float:
        """Half of the 95 % interval over episodes, ``1.96 sd / sqrt(episodes)`` as in the paper's code."""
        return float(1.96 * self.accuracy.std() / np.sqrt(len(self.accuracy)))


@dataclass(frozen=True, eq=False)
class Prediction:
    """Answers of an adapted model.

    Parameters
    ----------
    probability : (n, ways); of a regression the outputs themselves
    spread : (n, ways) standard deviation over models adapted under noise of their own; 0 without noise
    """

    probability: Float[np.ndarray, "n ways"]
    spread: Float[np.ndarray, "n ways"]

    @property
    def label(self) -> np.ndarray:
        """Most probable class of each row, ``(n,)``."""
        return self.probability.argmax(1)


class TaskModel(nn.Module):
    """A model adapted to one task: a plain module, the learner's own parameters untouched.

    Parameters
    ----------
    model : the perturbed network
    parameters : of the task, by name
    support : ``(n, ...)`` that it was adapted to
    plan : how
    members : parameters of models adapted under other noise, ``(members, ...)``, for the spread
    regression : answers are outputs, not probabilities
    """

    def __init__(
        self,
        model: Perturbed,
        parameters: Mapping[str, Tensor],
        support: Tensor,
        plan: Plan,
        members: Mapping[str, Tensor] | None = None,
        regression: bool = False,
    ) -> None:
        super().__init__()
        self.regression = regression
        # Kept out of the registered submodules: its parameters are the learner's.
        self._model = [model]
        self.names = tuple(parameters)
        self.values = nn.ParameterList([nn.Parameter(p.detach().clone()) for p in parameters.values()])
        self.register_buffer("support", support.detach())
        self.plan = plan
        self.members = dict(members or {})

    def parameters_by_name(self) -> dict[str, Tensor]:
        """All parameters of the network under this task."""
        return dict(zip(self.names, self.values, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(n, ways)``, without noise."""
        return self._outputs(self.parameters_by_name(), x)

    def _outputs(self, parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
        model = self._model[0]
        if self.plan.statistics == "batch":
            return model.call(parameters, x, Pass())
        record: dict[str, tuple[Tensor, Tensor]] = {}
        model.call(parameters, cast("Tensor", self.support), Pass(record=record))
        return model.call(parameters, x, Pass(statistics=record))

    def _answers(self, outputs: Tensor) -> Tensor:
        return outputs if self.regression else functional.softmax(outputs, -1)

    @torch.no_grad()
    def predict(self, x: Tensor) -> Prediction:
        """Return probabilities, and how far they differ between models adapted under other noise.

        Parameters
        ----------
        x : ``(n, ...)`` queries. Under ``statistics="batch"`` they are normalised by their own statistics, so that an
            answer depends on what is asked beside it.
        """
        probability = self._answers(self(x))
        if not self.members:
            return Prediction(probability.double().cpu().numpy(), np.zeros(probability.shape))
        shared = {k: v for k, v in self.parameters_by_name().items() if k not in self.members}

        def one(own: dict[str, Tensor]) -> Tensor:
            return self._answers(self._outputs({**shared, **own}, x))

        each = torch.vmap(one)(self.members)
        return Prediction(probability.double().cpu().numpy(), each.std(0).double().cpu().numpy())


class MetaLearner:
    """Learn from many small tasks to learn the next one from a few examples.

    Parameters
    ----------
    module : network of one's own; its last linear layer is the head. Its weights are copied
    method : a name of :data:`meta_dropout.methods.METHODS`, or a `Method`
    inner_lr, inner_steps : of the adaptation
    test_samples : Monte Carlo samples of the noise in each inner step at test time
    statistics : ``batch`` (transductive, as in the authors' code) or ``support``; see :class:`meta_dropout.engine.Plan`
    task : ``classification`` or ``regression``
    sites : names of layers to perturb; None takes all convolutions and linear layers
    chunk : tasks at a time
    recompute : save memory in long inner loops
    seed : of generators' weights and of all noise
    allow_first_order : train noise with ``algorithm="fomaml"`` all the same, though the generators then learn next to
        nothing
    device : where

    Examples
    --------
    >>> learner = MetaLearner(mlp(inputs=2, outputs=3), method="maml", inner_lr=0.1, inner_steps=2)
    >>> x, y = torch.randn(6, 2), torch.arange(3).repeat(2)
    >>> learner.adapt(x, y).predict(torch.randn(4, 2)).probability.shape
    (4, 3)
    """

    def __init__(
        self,
        module: nn.Module,
        method: str | Method = "meta-dropout",
        *,
        inner_lr: float = 0.1,
        inner_steps: int = 5,
        test_samples: int = 30,
        statistics: Literal["batch", "support"] = "batch",
        task: Literal["classification", "regression"] = "classification",
        sites: Sequence[str] | None = None,
        chunk: int | None = None,
        recompute: bool = False,
        seed: int = 0,
        allow_first_order: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self.method = find_method(method) if isinstance(method, str) else method
        self.method_name = method if isinstance(method, str) else "custom"
        m = self.method
        if m.algorithm in {"fomaml", "reptile"} and m.noise != "none":
            if not allow_first_order:
                raise InputError(
                    f"algorithm '{m.algorithm}' takes inner gradients for constants, through which noise generators"
                    " would learn; use maml, or set allow_first_order=True"
                )
            warnings.warn("the noise generators learn from the query pass only", UserWarning, stacklevel=2)
        self.model = Perturbed(module, sites=sites, noise=m.noise, rate=m.rate, seed=seed).to(device)
        self.task, self.chunk, self.seed, self.device = task, chunk, seed, torch.device(device)
        self.test_samples = test_samples
        self._loss: engine.Loss = engine.cross_entropy if task == "classification" else engine.squared_error
        adapted: tuple[str, ...] | None = None
        if m.algorithm == "anil":
            prefix = f"module.{self.model.head}."
            adapted = tuple(name for name in self.model.role("theta") if name.startswith(prefix))
        self.plan = Plan(
            steps=0 if m.algorithm == "protonet" else inner_steps,
            lr=inner_lr,
            first_order=m.algorithm in {"fomaml", "reptile"},
            adapted=adapted,
            statistics=statistics,
            penalty=m.penalty,
            recompute=recompute,
        )
        self.rates: dict[str, nn.Parameter] = {}
        if m.algorithm == "metasgd":
            self.rates = {
                name: nn.Parameter(torch.full_like(p, inner_lr)) for name, p in self.model.role("theta").items()
            }
        # The head over all training classes, while there is one.
        self._wide_head: dict[str, nn.Parameter] = {}
        self._shapes: dict[tuple[int, ...], tuple[dict[str, tuple[int, ...]], tuple[str, ...]]] = {}
        self.steps_done = 0
        self.skipped = 0

    def to(self, device: torch.device | str) -> MetaLearner:
        """Move everything that is learned."""
        self.device = torch.device(device)
        self.model.to(device)
        for rate in self.rates.values():
            rate.data = rate.data.to(device)
        return self

    # ---- parts of a step

    def parameters(self) -> dict[str, nn.Parameter]:
        """Everything that is learned over tasks; learned step sizes are under ``rate.<name>``."""
        return {**dict(self.model.named_parameters()), **{f"rate.{name}": p for name, p in self.rates.items()}}

    def _known(self, x: Tensor) -> tuple[dict[str, tuple[int, ...]], tuple[str, ...]]:
        """Shapes of the noise for a batch like `x`, and the sites that see the data."""
        key = tuple(x.shape)
        if key not in self._shapes:
            self._shapes[key] = self.model.prepare(x), self.model.data_sites(x)
        return self._shapes[key]

    def _mixes(self, tasks: Tensor, plan: Plan, seeds: list[int]) -> list[Mix] | None:
        if not self.method.mixup:
            return None
        sites = [m.name for m in self.model.modules() if isinstance(m, PerturbedLayer | PerturbedHead)]
        drawn = [np.random.default_rng([seed, 7]) for seed in seeds]
        # All tasks of a batch mix at one layer, which is drawn for each step.
        where = np.random.default_rng([seeds[0], 8])
        made: list[Mix] = []
        for _ in range(plan.steps):
            site = sites[int(where.integers(len(sites)))] if self.method.manifold else sites[0]
            weight = torch.tensor([r.beta(self.method.mixup, self.method.mixup) for r in drawn], dtype=tasks.dtype)
            partner = torch.from_numpy(np.stack([r.permutation(tasks.shape[1]) for r in drawn]))
            made.append(Mix(weight.to(tasks.device), partner.to(tasks.device), site))
        return made

    def _disturb(self) -> engine.Disturb | None:
        if self.method.attack is None:
            return None
        from meta_dropout.attacks import Attack, perturb_images

        norm, radius = self.method.attack
        attack = Attack(kind="pgd", norm=norm, eps=radius, steps=5)
        names = self.plan.adapted or tuple(self.model.role("theta"))

        def disturb(parameters: dict[str, Tensor], support: Tensor, labels: Tensor) -> Tensor:
            own = {name: parameters[name] for name in names}
            shared = {name: p.detach() for name, p in parameters.items() if name not in own}

            def outputs(x: Tensor) -> Tensor:
                def one(own: dict[str, Tensor], x: Tensor) -> Tensor:
                    return self.model.call({**shared, **own}, x, Pass())

                return torch.vmap(one)(own, x)

            return perturb_images(outputs, support, labels, attack, seed=self.seed)

        return disturb

    def _prototype_logits(self, parameters: Mapping[str, Tensor], tasks: Tasks, ways: int) -> Tensor:
        """Minus squared distances of query embeddings to the support's class means, ``(tasks, m, ways)``."""
        head = self.model.head or ""

        def embed(x: Tensor) -> Tensor:
            inputs: dict[str, Tensor] = {}
            self.model.call(parameters, x, Pass(inputs=inputs))
            return inputs[head]

        def one(support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
            chosen = functional.one_hot(labels, ways).to(support.dtype)
            h = embed(support)
            centre = (chosen.mT @ h) / chosen.sum(0).unsqueeze(1)
            if self.plan.statistics == "batch":
                found = embed(query)
            else:
                record: dict[str, tuple[Tensor, Tensor]] = {}
                self.model.call(parameters, support, Pass(record=record))
                inputs: dict[str, Tensor] = {}
                self.model.call(parameters, query, Pass(inputs=inputs, statistics=record))
                found = inputs[head]
            return -(found.unsqueeze(1) - centre.unsqueeze(0)).square().sum(-1)

        return torch.vmap(one)(tasks.support, tasks.support_labels, tasks.query)

    def meta_step(self, tasks: Tasks, seeds: list[int]) -> engine.MetaGradients:
        """Gradients of the mean query loss of a batch of tasks.

        Parameters
        ----------
        tasks : the batch
        seeds : one for each task, of its noise
        """
        parameters = dict(self.model.named_parameters())
        if self.method.algorithm == "protonet":
            logits = self._prototype_logits(parameters, tasks, int(tasks.support_labels.max()) + 1)
            loss = torch.vmap(self._loss)(logits, tasks.query_labels)
            found: Any = torch.autograd.grad(loss.mean(), list(parameters.values()), allow_unused=True)
            gradients = {
                name: torch.zeros_like(p) if g is None else g
                for (name, p), g in zip(parameters.items(), found, strict=True)
            }
            return engine.MetaGradients(gradients, loss.detach(), logits.detach())
        noise, sites = self._noise_for(parameters, tasks.support, self.plan, seeds)
        mixes = self._mixes(tasks.support, self.plan, seeds)
        if self.method.algorithm == "reptile":
            return self._towards_adapted(parameters, tasks, noise)
        return engine.meta_gradients(
            self.model,
            parameters,
            tasks,
            noise,
            self.plan,
            rates=self.rates or None,
            loss=self._loss,
            chunk=self.chunk,
            data_sites=sites,
            mixes=mixes,
            disturb=self._disturb(),
        )

    def _classify(self, tasks: Tasks, classes: Tensor) -> engine.MetaGradients:
        """Gradients of telling all training classes apart, over all images of a batch of tasks, ``(tasks, ways)``."""
        leaves = {**dict(self.model.named_parameters()), **self._wide_head}
        images = torch.cat([tasks.support, tasks.query], 1)
        labels = classes.gather(1, torch.cat([tasks.support_labels, tasks.query_labels], 1))
        inputs: dict[str, Tensor] = {}
        self.model.call(dict(self.model.named_parameters()), images.flatten(0, 1), Pass(inputs=inputs))
        logits = functional.linear(inputs[self.model.head or ""], self._wide_head["wide.weight"])
        logits = (logits + self._wide_head["wide.bias"]).unflatten(0, images.shape[:2])
        loss = torch.vmap(self._loss)(logits, labels)
        found: Any = torch.autograd.grad(loss.mean(), list(leaves.values()), allow_unused=True)
        gradients = {
            name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(leaves.items(), found, strict=True)
        }
        asked = logits.detach()[:, tasks.support.shape[1] :]
        return engine.MetaGradients(gradients, loss.detach(), asked.gather(2, _across(classes, asked)))

    def _towards_adapted(
        self, parameters: dict[str, nn.Parameter], tasks: Tasks, noise: Mapping[str, Tensor]
    ) -> engine.MetaGradients:
        made = engine.adapt(
            self.model, parameters, tasks.support, tasks.support_labels, noise, self.plan, loss=self._loss, graph=False
        )
        with torch.no_grad():
            outputs = engine.query(self.model, parameters, made, tasks.support, tasks.query, self.plan)
            loss = torch.vmap(self._loss)(outputs, tasks.query_labels)
        gradients = {name: torch.zeros_like(p) for name, p in parameters.items()}
        for name, value in made.parameters.items():
            gradients[name] = (parameters[name].detach() - value.mean(0)) / self.plan.lr
        return engine.MetaGradients(gradients, loss, outputs)

    # ---- training

    def fit(
        self,
        source: Source,
        *,
        steps: int,
        meta_batch: int = 4,
        outer_lr: float = 1e-3,
        clip: float = 3.0,
        on_step: Callable[[Step], None] | None = None,
        resume: Mapping[str, Any] | None = None,
        on_state: Callable[[dict[str, Any]], None] | None = None,
        state_every: int = 200,
        world: World | None = None,
    ) -> list[Step]:
        """Train over tasks.

        Parameters
        ----------
        source : of tasks
        steps : meta-steps
        meta_batch : tasks of each
        outer_lr : step size of Adam over everything that is learned
        clip : bound on every entry of the averaged meta-gradient
        on_step : called after each meta-step
        resume : a state that `on_state` was given
        on_state : called with everything needed to go on, every `state_every` steps, at the end and on Ctrl-C
        state_every : see `on_state`
        world : processes that share each batch of tasks, from :func:`shared_core.device.process_group`

        Returns
        -------
        What was known after each step.
        """
        if meta_batch < 1 or steps < 0:
            raise InputError(f"need meta_batch >= 1 and steps >= 0, got {meta_batch} and {steps}")
        if not outer_lr > 0 or not clip > 0:
            raise InputError(f"outer_lr and clip must be > 0, got {outer_lr} and {clip}")
        world = world or World()
        if world.size > meta_batch:
            raise InputError(
                f"{world.size} processes share {meta_batch} tasks a step; use fewer, or a larger meta_batch"
            )
        if self.method.algorithm == "scratch":
            return []
        first = source.batch(0, meta_batch)
        self._known(first.support[0].to(self.device))
        if self.method.algorithm == "pretrained":
            self._widen(source)
        leaves = {**self.parameters(), **self._wide_head}
        optimizer = torch.optim.Adam(list(leaves.values()), lr=outer_lr)
        history: list[Step] = []
        self.steps_done = self.skipped = 0
        if resume is not None:
            self._load_state(resume, leaves, optimizer)
        # Whether parameters, moments and the step's number belong together, so that an interruption may keep them.
        whole = True
        try:
            while self.steps_done < steps:
                number = self.steps_done
                tasks = first if number == 0 else source.batch(number, meta_batch)
                own = world.shard(meta_batch)
                part = tasks.part(own.start, own.stop - own.start).to(self.device)
                seeds = [self._task_seed(number * meta_batch + place) for place in range(own.start, own.stop)]
                known = None
                if isinstance(source, TaskSource) and self._wide_head:
                    known = source.classes(number, meta_batch)[own].to(self.device)
                found = self._try(part, seeds, known)
                share = len(part) / meta_batch
                summed = (
                    [share * found.gradients[name] for name in leaves]
                    if found
                    else [torch.zeros_like(p) for p in leaves.values()]
                )
                told = torch.tensor(
                    [0.0, 0.0, 1.0]
                    if found is None
                    else [float(found.loss.sum()), float(self._right(found, part)), 0.0],
                    device=self.device,
                )
                world.all_reduce([*summed, told])
                good = bool(told[2] == 0) and all(bool(torch.isfinite(gradient).all()) for gradient in summed)
                whole = False
                if good:
                    for leaf, gradient in zip(leaves.values(), summed, strict=True):
                        leaf.grad = gradient.clamp(-clip, clip)
                    optimizer.step()
                else:
                    self.skipped += 1
                    if self.skipped > max(20, steps // 10):
                        raise engine.AdaptationError(
                            f"{self.skipped} meta-steps were not finite; lower inner_lr or outer_lr, or look at the"
                            " data"
                        )
                self.steps_done += 1
                whole = True
                line = Step(
                    self.steps_done, steps, float(told[0]) / meta_batch, float(told[1]) / meta_batch, self.skipped
                )
                history.append(line)
                if on_step is not None:
                    on_step(line)
                if on_state is not None and (self.steps_done % state_every == 0 or self.steps_done == steps):
                    on_state(self._state(leaves, optimizer))
        except KeyboardInterrupt:
            if on_state is not None and whole and world.size == 1:
                on_state(self._state(leaves, optimizer))
            raise
        return history

    def _task_seed(self, number: int) -> int:
        return int(np.random.default_rng([self.seed, 11, number]).integers(1 << 62))

    def _widen(self, source: Source) -> None:
        """Make a head over all training classes; the task's own stays as it was drawn."""
        if not isinstance(source, TaskSource) or not self.model.head:
            raise InputError(
                "method 'pretrained' needs to know the classes of the training set: give a TaskSource, and a network"
                " whose last layer is linear"
            )
        width = dict(self.model.named_parameters())[self._head_names()[0]].shape[1]
        generator = torch.Generator().manual_seed(self.seed)
        weight = torch.randn(source.images.ways, width, generator=generator) / width**0.5
        self._wide_head = {
            "wide.weight": nn.Parameter(weight.to(self.device)),
            "wide.bias": nn.Parameter(torch.zeros(source.images.ways, device=self.device)),
        }

    def _try(self, tasks: Tasks, seeds: list[int], known: Tensor | None = None) -> engine.MetaGradients | None:
        try:
            return self.meta_step(tasks, seeds) if known is None else self._classify(tasks, known)
        except engine.AdaptationError:
            return None

    def _right(self, found: engine.MetaGradients, tasks: Tasks) -> Tensor:
        """Sum over tasks of the share of right answers (of the squared error, in a regression)."""
        if self.task == "regression":
            return found.loss.sum()
        return (found.outputs.argmax(-1) == tasks.query_labels).to(found.loss.dtype).mean(1).sum()

    def _state(self, leaves: Mapping[str, Tensor], optimizer: torch.optim.Adam) -> dict[str, Any]:
        moments = optimizer.state
        return {
            "step": self.steps_done,
            "skipped": self.skipped,
            "parameters": {name: leaf.detach() for name, leaf in leaves.items()},
            "moments": {
                name: [moments[leaf]["exp_avg"], moments[leaf]["exp_avg_sq"], moments[leaf]["step"]]
                for name, leaf in leaves.items()
                if leaf in moments
            },
        }

    def _load_state(
        self, state: Mapping[str, Any], leaves: Mapping[str, nn.Parameter], optimizer: torch.optim.Adam
    ) -> None:
        self.steps_done, self.skipped = int(state["step"]), int(state["skipped"])
        for name, leaf in leaves.items():
            leaf.data.copy_(state["parameters"][name])
            if name in state["moments"]:
                first, second, step = state["moments"][name]
                optimizer.state[leaf] = {
                    "step": step.clone(),
                    "exp_avg": first.to(leaf.device).clone(),
                    "exp_avg_sq": second.to(leaf.device).clone(),
                }

    # ---- one task

    def _check_labels(self, labels: Tensor, rows: int, *, allow_missing: bool) -> int:
        if self.task == "regression":
            return 0
        if labels.dtype not in (torch.int64, torch.int32, torch.uint8, torch.int16):
            raise LabelError(f"labels: must be whole numbers 0..ways-1, got {labels.dtype}")
        if labels.dim() != 1 or len(labels) != rows:
            raise LabelError(f"labels: need one for each of {rows} examples, got shape {tuple(labels.shape)}")
        ways = int(labels.max()) + 1
        if int(labels.min()) < 0:
            raise LabelError(f"labels: must be 0..ways-1, found {int(labels.min())}")
        absent = [k for k in range(ways) if not bool((labels == k).any())]
        if absent and not allow_missing:
            raise LabelError(f"labels: class {absent[0]} of 0..{ways - 1} has no example in the support")
        return ways

    def adapt(
        self,
        support: Tensor,
        labels: Tensor,
        *,
        spread: int = 10,
        steps: int | None = None,
        allow_missing: bool = False,
        seed: int = 0,
    ) -> TaskModel:
        """Adapt to one task; the learner itself does not change.

        Parameters
        ----------
        support : ``(n, ...)`` examples
        labels : ``(n,)`` classes 0..ways-1, or ``(n, outputs)`` targets. With another number of classes than the head
            has, the head starts from the class means of the support (proto-MAML, Triantafillou et al., 2020)
        spread : models to adapt under noise of their own beside, for the spread of predictions
        steps : inner steps; None is as in training
        allow_missing : accept classes without an example
        seed : of the noise
        """
        require_finite(support, "support")
        ways = self._check_labels(labels, len(support), allow_missing=allow_missing)
        support, labels = support.to(self.device), labels.to(self.device)
        if self.task == "classification":
            labels = labels.long()
        plan = self.plan if steps is None else replace(self.plan, steps=steps)
        parameters: dict[str, Tensor] = {name: p.detach() for name, p in self.model.named_parameters()}
        if self.method.algorithm == "protonet":
            parameters |= self._proto_head(parameters, support, labels, ways)
        elif ways and ways != self._head_width():
            if self.rates:
                raise InputError(
                    f"the head has {self._head_width()} classes and the task {ways}; learned step sizes fit only"
                    " the former"
                )
            parameters |= self._proto_head(parameters, support, labels, ways)
        main = replace(plan, samples=self.test_samples)
        found = self._adapt_many(parameters, support[None], labels[None], main, [seed])
        members: dict[str, Tensor] = {}
        if spread and self._noisy():
            many = (spread, *[-1] * support.dim())
            many_labels = (spread, *[-1] * labels.dim())
            seeds = [self._task_seed((seed + 1) * 100_003 + k) for k in range(spread)]
            members = self._adapt_many(
                parameters, support[None].expand(many), labels[None].expand(many_labels), plan, seeds
            )
        own = {**parameters, **{k: v[0] for k, v in found.items()}}
        return TaskModel(self.model, own, support, plan, members, regression=self.task == "regression")

    def _noisy(self) -> bool:
        return any(m.sampled for m in self.model.modules() if isinstance(m, PerturbedLayer | PerturbedHead))

    def _head_width(self) -> int:
        head = self.model.module.get_submodule(self.model.head) if self.model.head else None
        main = head.main if isinstance(head, PerturbedHead | PerturbedLayer) else head
        return int(main.out_features) if isinstance(main, nn.Linear) else 0

    def _head_names(self) -> tuple[str, str]:
        head = self.model.module.get_submodule(self.model.head or "")
        prefix = f"module.{self.model.head}." if self.model.head else "module."
        prefix += "main." if isinstance(head, PerturbedHead | PerturbedLayer) else ""
        return f"{prefix}weight", f"{prefix}bias"

    def _proto_head(
        self, parameters: Mapping[str, Tensor], support: Tensor, labels: Tensor, ways: int
    ) -> dict[str, Tensor]:
        """Head whose logits are minus squared distances to the class means, but for what all classes share."""
        with torch.no_grad():
            inputs: dict[str, Tensor] = {}
            self.model.call(parameters, support, Pass(inputs=inputs))
            h = inputs[self.model.head or ""]
            chosen = functional.one_hot(labels, ways).to(h.dtype)
            centre = (chosen.mT @ h) / chosen.sum(0).clamp(min=1).unsqueeze(1)
        weight, bias = self._head_names()
        return {weight: 2 * centre, bias: -centre.square().sum(1)}

    def _adapt_many(
        self, parameters: Mapping[str, Tensor], support: Tensor, labels: Tensor, plan: Plan, seeds: list[int]
    ) -> dict[str, Tensor]:
        if not plan.steps:
            return {}
        noise, sites = self._noise_for(parameters, support, plan, seeds)
        made = engine.adapt(
            self.model,
            parameters,
            support,
            labels,
            noise,
            plan,
            rates={name: rate.detach() for name, rate in self.rates.items()} or None,
            loss=self._loss,
            graph=False,
            data_sites=sites,
            mixes=self._mixes(support, plan, seeds),
            disturb=self._disturb(),
        )
        return {name: value.detach() for name, value in made.parameters.items()}

    def _wide(self, parameters: Mapping[str, Tensor]) -> bool:
        return bool(self.model.head) and parameters[self._head_names()[0]].shape[0] != self._head_width()

    def _noise_for(
        self, parameters: Mapping[str, Tensor], support: Tensor, plan: Plan, seeds: list[int]
    ) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        shapes, sites = self._known(support[0])
        if self._wide(parameters) and self.model.head in shapes and self.method.noise != "vib":
            ways = parameters[self._head_names()[0]].shape[0]
            shapes = {**shapes, cast("str", self.model.head): (support.shape[1], ways)}
        return engine.draw_noise(shapes, plan, seeds=seeds, device=support.device, dtype=support.dtype), sites

    # ---- many tasks

    def outputs(self, tasks: Tasks, seeds: list[int], *, samples: int | None = None, sample: bool = True) -> Tensor:
        """Adapt to each task and answer its queries, ``(tasks, m, ...)``.

        Parameters
        ----------
        tasks : the batch
        seeds : of their noise
        samples : Monte Carlo samples of each inner step; None is ``test_samples``
        sample : draw noise in the inner loop at all
        """
        answer = self.answering(tasks, seeds, samples=samples, sample=sample)
        with torch.no_grad():
            return answer(tasks.query)

    def answering(
        self, tasks: Tasks, seeds: list[int], *, samples: int | None = None, sample: bool = True
    ) -> Callable[[Tensor], Tensor]:
        """Adapt to each task and return what maps queries ``(tasks, m, ...)`` to outputs, differentiable in them.

        Parameters
        ----------
        tasks, seeds, samples, sample : as for :meth:`outputs`
        """
        parameters = {name: p.detach() for name, p in self.model.named_parameters()}
        if self.method.algorithm == "protonet":
            ways = int(tasks.support_labels.max()) + 1
            return lambda x: self._prototype_logits(parameters, replace(tasks, query=x), ways)
        plan = replace(self.plan, samples=samples or self.test_samples, sample=sample)
        made = self.adapted(tasks, seeds, plan)
        return lambda x: engine.query(self.model, parameters, made, tasks.support, x, plan)

    def adapted(self, tasks: Tasks, seeds: list[int], plan: Plan | None = None) -> engine.Adapted:
        """Parameters adapted to each task, without a graph.

        Parameters
        ----------
        tasks : the batch
        seeds : of their noise
        plan : how; None is as at test time
        """
        plan = plan or replace(self.plan, samples=self.test_samples)
        parameters = {name: p.detach() for name, p in self.model.named_parameters()}
        found = self._adapt_many(parameters, tasks.support, tasks.support_labels, plan, seeds)
        return engine.Adapted(found, tasks.support.new_zeros((0, len(tasks))))

    def evaluate(
        self,
        source: Source,
        *,
        episodes: int = 600,
        batch: int = 20,
        samples: int | None = None,
        sample: bool = True,
        noise_seed: int = 0,
        on_batch: Callable[[int], None] | None = None,
    ) -> Evaluation:
        """Adapt to test episodes and measure their queries.

        Parameters
        ----------
        source : of test tasks
        episodes : how many
        batch : at a time
        samples, sample : see :meth:`outputs`
        noise_seed : another one is other noise on the same episodes
        on_batch : called with the number of episodes done
        """
        if episodes < 1:
            raise InputError(f"episodes: must be at least 1, got {episodes}")
        right: list[Tensor] = []
        losses: list[Tensor] = []
        confidence: list[Tensor] = []
        hits: list[Tensor] = []
        done = 0
        while done < episodes:
            tasks = source.batch(done // batch, batch).to(self.device)
            tasks = tasks.part(0, min(batch, episodes - done))
            seeds = [self._task_seed((1 << 40) + (noise_seed << 32) + done + k) for k in range(len(tasks))]
            found = self.outputs(tasks, seeds, samples=samples, sample=sample)
            loss = torch.vmap(self._loss)(found, tasks.query_labels)
            losses.append(loss)
            if self.task == "classification":
                most, label = functional.softmax(found, -1).max(-1)
                hit = label == tasks.query_labels
                right.append(hit.to(loss.dtype).mean(1))
                confidence.append(most.flatten())
                hits.append(hit.flatten())
            else:
                right.append(loss)
            done += len(tasks)
            if on_batch is not None:
                on_batch(done)
        error = float("nan")
        if confidence:
            error = calibration_error(torch.cat(confidence).double().cpu().numpy(), torch.cat(hits).cpu().numpy())
        protocol = {
            "method": self.method_name,
            "statistics": self.plan.statistics,
            "inner_steps": self.plan.steps,
            "inner_lr": self.plan.lr,
            "samples": samples or self.test_samples if sample and self._noisy() else 0,
            "episodes": episodes,
            "seed": self.seed,
        }
        return Evaluation(
            torch.cat(right).double().cpu().numpy(), torch.cat(losses).double().cpu().numpy(), error, protocol
        )

    # ---- saving

    def save(self, path: str | Path, *, network: Mapping[str, Any] | None = None) -> None:
        """Write everything that was learned to one safetensors file.

        Parameters
        ----------
        path : file to write
        network : arguments of :func:`meta_dropout.conv4` (or ``{"kind": "mlp", ...}``) that made the module, so that
            :meth:`load` can make it again
        """
        from shared_core.runs import save_tree

        options = {
            "inner_lr": self.plan.lr,
            "inner_steps": self.plan.steps,
            "test_samples": self.test_samples,
            "statistics": self.plan.statistics,
            "task": self.task,
            "seed": self.seed,
            "sites": list(self.model.sites),
        }
        save_tree(
            path,
            {
                "meta-dropout": _FORMAT,
                "method": self.method_name,
                "definition": json.dumps(asdict(self.method)),
                "options": json.dumps(options),
                "network": json.dumps(dict(network) if network is not None else None),
                "parameters": {name: p.detach() for name, p in self.parameters().items()},
            },
        )

    @classmethod
    def load(
        cls, path: str | Path, module: nn.Module | None = None, *, device: torch.device | str = "cpu"
    ) -> MetaLearner:
        """Read what :meth:`save` wrote.

        Parameters
        ----------
        path : the file
        module : the network, if it is not one of this package's
        device : where to
        """
        from shared_core.runs import load_tree

        tree = load_tree(path)
        if not isinstance(tree, dict) or "meta-dropout" not in tree:
            raise InputError(f"{path} is no meta-learner of meta-dropout; give the file that `save` wrote")
        tree = cast("dict[str, Any]", tree)
        try:
            network, options = json.loads(tree["network"]), json.loads(tree["options"])
            definition: dict[str, Any] = json.loads(tree["definition"])
            if module is None:
                if network is None:
                    raise InputError(f"{path}: the network was one of your own; pass the module as well")
                kind = network.pop("kind", "conv4")
                module = mlp(**network) if kind == "mlp" else conv4(**network)
            name = tree["method"]
            attack = definition["attack"]
            definition["attack"] = None if attack is None else tuple(attack)
            definition["tune"] = {key: tuple(options_) for key, options_ in definition["tune"].items()}
            method = Method(**definition)
            made = cls(module, name if name in METHODS else method, allow_first_order=True, device=device, **options)
            made.method = method
            leaves = made.parameters()
            if unlike := set(leaves) ^ set(tree["parameters"]):
                raise KeyError(min(unlike))
            for key, value in tree["parameters"].items():
                if key.endswith(".level"):
                    # Its shape is that of the layer's output, which no batch has shown yet.
                    leaves[key].data = torch.empty_like(value, device=made.device)
                elif leaves[key].shape != value.shape:
                    raise ValueError(f"{key} has shape {tuple(value.shape)}, the module's {tuple(leaves[key].shape)}")
                leaves[key].data.copy_(value)
        except DAMAGE as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{path} was written by another version of meta-dropout, or it is damaged ({error})"
            ) from error
        return made


def _across(classes: Tensor, logits: Tensor) -> Tensor:
    """Index of each task's classes in logits over all of them, ``(tasks, m, ways)``."""
    return classes.unsqueeze(1).expand(-1, logits.shape[1], -1)


def calibration_error(confidence: Float[np.ndarray, " n"], right: np.ndarray, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over equal bins of confidence, weighted by their rows.

    Parameters
    ----------
    confidence : ``(n,)`` probability of the answer given
    right : ``(n,)`` whether it was right
    bins : of equal width in 0..1

    Examples
    --------
    >>> round(calibration_error(np.array([0.9, 0.9]), np.array([True, False])), 3)
    0.4
    """
    place = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    gaps = np.bincount(place, weights=confidence - right, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))
