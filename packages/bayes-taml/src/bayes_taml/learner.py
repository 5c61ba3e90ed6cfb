"""The learner: train over tasks of any size, adapt to one, evaluate over episodes, save and load."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, cast, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn
from torch.nn import functional

from bayes_taml import baselines, engine
from bayes_taml.encoder import ConvEmbedding, Encoder, InferenceNetwork, PackedSupport, VectorEmbedding
from bayes_taml.engine import HEAD_BIAS, HEAD_WEIGHT, Compat, Plan
from bayes_taml.methods import Method, find_method
from bayes_taml.metrics import calibration_error, interval, negative_log_likelihood
from bayes_taml.networks import Groups, Modulated, Pass, conv_features, mlp_features
from bayes_taml.posterior import Latents, Posterior
from bayes_taml.ragged import EmptyClassError, NeedTwoClassesError, Tasks, without_padding
from shared_core.device import World
from shared_core.errors import DAMAGE, InputError

__all__ = [
    "CheckpointError",
    "Evaluation",
    "ExtrapolationWarning",
    "MetaLearner",
    "RangeWarning",
    "Source",
    "Step",
    "TaskClassifier",
    "TaskModel",
]

_FORMAT = 1


class CheckpointError(InputError):
    """A file is no learner of this package, or of another network."""


class RangeWarning(UserWarning):
    """Inputs are not in the range that training had."""


class ExtrapolationWarning(UserWarning):
    """A support is far larger than those of training."""


@runtime_checkable
class Source(Protocol):
    """Where tasks come from; batch `number` is the same whenever it is asked for."""

    def batch(self, number: int, count: int) -> Tasks:
        """Return the tasks of a batch."""
        ...


@dataclass(frozen=True)
class Step:
    """What is known after a meta-step: its number, query loss and accuracy, divergence, and steps that were skipped."""

    step: int
    steps: int
    loss: float
    accuracy: float
    kl: float
    skipped: int


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Answers to the queries of test tasks; what is measured follows from them.

    Parameters
    ----------
    probability : ``(tasks, m, ways)``
    labels : ``(tasks, m)``
    mask : ``(tasks, m)`` queries that are real
    counts : ``(tasks, ways)`` support rows of each class
    diverged : samples of the latents, over all tasks, under which adaptation stopped early
    held : step multipliers, over all tasks, that were held within their bounds
    protocol : how these answers came about
    """

    probability: Float[np.ndarray, "tasks m ways"]
    labels: Int64[np.ndarray, "tasks m"]
    mask: Shaped[np.ndarray, "tasks m"]
    counts: Int64[np.ndarray, "tasks ways"]
    diverged: int
    held: int
    protocol: dict[str, Any]

    @property
    def right(self) -> np.ndarray:
        """Whether each query was answered rightly, ``(tasks, m)``."""
        return self.probability.argmax(2) == self.labels

    @property
    def accuracy(self) -> Float[np.ndarray, " tasks"]:
        """Share of right answers of each task."""
        return (self.right & self.mask).sum(1) / self.mask.sum(1)

    @property
    def loss(self) -> Float[np.ndarray, " tasks"]:
        """Mean negative log-likelihood of each task's queries."""
        labels = np.where(self.mask, self.labels, 0)
        chosen = np.take_along_axis(self.probability, labels[..., None], 2)[..., 0]
        per_row = -np.log(np.maximum(chosen, np.finfo(np.float64).tiny))
        return (per_row * self.mask).sum(1) / self.mask.sum(1)

    @property
    def mean(self) -> float:
        """Mean accuracy."""
        return float(self.accuracy.mean())

    @property
    def half_width(self) -> float:
        """Half of the 95 % interval over tasks, ``1.96 sd / sqrt(tasks)`` as in the authors' code."""
        return interval(self.accuracy)[1]

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood over all queries."""
        return negative_log_likelihood(self.probability[self.mask], self.labels[self.mask])

    @property
    def calibration_error(self) -> float:
        """Expected calibration error over all queries, 15 bins."""
        return calibration_error(self.probability[self.mask], self.labels[self.mask])

    def rows(self) -> dict[str, np.ndarray]:
        """Return one entry for each query: ``right``, ``class_size``, ``task_size`` and ``task``."""
        size = np.take_along_axis(self.counts, np.where(self.mask, self.labels, 0), 1)
        whole = np.broadcast_to(self.counts.sum(1, keepdims=True), self.labels.shape)
        task = np.broadcast_to(np.arange(len(self.labels))[:, None], self.labels.shape)
        named = {"right": self.right, "class_size": size, "task_size": whole, "task": task}
        return {name: values[self.mask] for name, values in named.items()}


class TaskModel(nn.Module):
    """Models adapted to one task under several samples of the latents, as a plain module.

    Parameters
    ----------
    model : the backbone and its roles
    shared : parameters that all samples share
    own : parameters by name, ``(samples, ...)``, the head's among them
    support : ``(n, ...)`` that was adapted to
    plan : of which ``statistics`` says how inputs are normalised
    """

    def __init__(
        self,
        model: Modulated,
        shared: Mapping[str, Tensor],
        own: Mapping[str, Tensor],
        support: Tensor,
        plan: Plan,
        prototypes: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.plan, self.prototypes = model, plan, prototypes
        self._shared, self._own = tuple(shared), tuple(own)
        for k, value in enumerate((*shared.values(), *own.values())):
            self.register_buffer(f"p{k}", value.detach().clone())
        # Statistics of the support under the adapted parameters, (samples, channels) by normalisation.
        self._moments: list[str] = []
        record = self._record(support) if plan.statistics == "support" else {}
        for k, (name, pair) in enumerate(record.items()):
            self._moments.append(name)
            self.register_buffer(f"mean{k}", pair[0])
            self.register_buffer(f"variance{k}", pair[1])

    @property
    def samples(self) -> int:
        """Number of adapted models."""
        return len(cast("Tensor", getattr(self, f"p{len(self._shared)}")))

    def _parameters_of(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        values = [cast("Tensor", getattr(self, f"p{k}")) for k in range(len(self._shared) + len(self._own))]
        cut = len(self._shared)
        return dict(zip(self._shared, values[:cut], strict=True)), dict(zip(self._own, values[cut:], strict=True))

    def under(self, sample: int) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
        """Return all parameters under one sample, by name, and the moments to normalise by, where they are fixed.

        Parameters
        ----------
        sample : its position
        """
        shared, own = self._parameters_of()
        moments = {
            name: (getattr(self, f"mean{k}")[sample], getattr(self, f"variance{k}")[sample])
            for k, name in enumerate(self._moments)
        }
        return {**shared, **{name: v[sample] for name, v in own.items()}}, moments

    def _one(self, shared: Mapping[str, Tensor], own: Mapping[str, Tensor], x: Tensor, told: Pass) -> Tensor:
        body = {name: v for name, v in {**shared, **own}.items() if name not in (HEAD_WEIGHT, HEAD_BIAS)}
        h = self.model.call(body, x, told)
        if self.prototypes:
            return -(h.unsqueeze(1) - own[HEAD_WEIGHT]).square().sum(-1)
        return functional.linear(h, own[HEAD_WEIGHT], own[HEAD_BIAS])

    def _record(self, support: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        shared, own = self._parameters_of()
        found: list[dict[str, tuple[Tensor, Tensor]]] = []
        with torch.no_grad():
            for sample in range(self.samples):
                record: dict[str, tuple[Tensor, Tensor]] = {}
                self._one(shared, {name: v[sample] for name, v in own.items()}, support, Pass(record=record))
                found.append(record)
        return {
            name: (torch.stack([r[name][0] for r in found]), torch.stack([r[name][1] for r in found]))
            for name in found[0]
        }

    def each(self, x: Shaped[Tensor, "n ..."]) -> Float[Tensor, "samples n ways"]:
        """Log-probabilities under each sample.

        Parameters
        ----------
        x : rows
        """
        shared, own = self._parameters_of()
        found: list[Tensor] = []
        for sample in range(self.samples):
            moments = {
                name: (getattr(self, f"mean{k}")[sample], getattr(self, f"variance{k}")[sample])
                for k, name in enumerate(self._moments)
            }
            mine = {name: v[sample] for name, v in own.items()}
            found.append(functional.log_softmax(self._one(shared, mine, x, Pass(statistics=moments)), -1))
        return torch.stack(found)

    def forward(self, x: Shaped[Tensor, "n ..."]) -> Float[Tensor, "n ways"]:
        """Logarithm of the probabilities, averaged over samples (probabilities are averaged, not logits).

        Parameters
        ----------
        x : rows
        """
        return torch.logsumexp(self.each(x), 0) - float(np.log(self.samples))


class TaskClassifier:
    """A classifier for one task, with scikit-learn's protocol.

    Parameters
    ----------
    module : the adapted models
    classes : labels, in the order of the columns of probabilities
    counts : ``(ways,)`` support rows of each class
    learner : that adapted
    """

    def __init__(
        self, module: TaskModel, classes: np.ndarray, counts: Int64[np.ndarray, " ways"], learner: MetaLearner
    ) -> None:
        self.module, self.classes_, self.counts_, self._learner = module, classes, counts, learner

    def predict_proba(self, x: Any, *, batch: int = 512) -> Float[np.ndarray, "n ways"]:
        """Probabilities of each class, averaged over samples of the balancing variables.

        Parameters
        ----------
        x : ``(n, ...)`` rows, tensor or array
        batch : rows at a time where they are normalised by the support; otherwise all rows are one batch, because they
            share their statistics
        """
        return self._each(x, batch).mean(0)

    def spread(self, x: Any, *, batch: int = 512) -> Float[np.ndarray, "n ways"]:
        """Return the standard deviation of the probabilities over samples of the balancing variables.

        Parameters
        ----------
        x, batch : as for :meth:`predict_proba`
        """
        return self._each(x, batch).std(0)

    def _each(self, x: Any, batch: int) -> np.ndarray:
        rows = self._learner.checked_rows(x, "x")
        alone = self.module.plan.statistics == "batch"
        step = len(rows) if alone else batch
        with torch.no_grad():
            parts = [self.module.each(rows[k : k + step]).exp() for k in range(0, max(len(rows), 1), max(step, 1))]
        return torch.cat(parts, 1).double().cpu().numpy()

    def predict(self, x: Any) -> np.ndarray:
        """Most probable class of each row.

        Parameters
        ----------
        x : as for :meth:`predict_proba`
        """
        return self.classes_[self.predict_proba(x).argmax(1)]

    def score(self, x: Any, y: Any) -> float:
        """Share of right answers.

        Parameters
        ----------
        x : rows
        y : their labels
        """
        return float(np.mean(self.predict(x) == np.asarray(y)))


class MetaLearner:
    """Learns over tasks how to adapt to the next one.

    Parameters
    ----------
    backbone : maps rows to features; the head is made here, and is zero at the start of every task
    method : of :data:`bayes_taml.METHODS`, or one of your own
    input_shape : of one row
    inner_lr : step size: the only one of MAML, the first value of the learned ones
    inner_steps, test_steps : of an adaptation in training and at test time
    samples : of the balancing variables at test time; their predictions are averaged
    max_shot : most support examples of a class in training; the inference network counts relative to it
    encoder : reads rows for the inference network: ``conv`` for images, ``mlp`` for vectors, ``features`` for features
        of the backbone; or a module that gives vectors of 64. ``auto`` takes one of the first two by the shape
    pooling : statistics of sets that it sees
    deviation : where the deviations of the balancing variables start; None is the paper's 0.69
    groups, norm : layers with a step multiplier each, and what to do about batch norms with running statistics, see
        :class:`bayes_taml.networks.Modulated`
    statistics : how queries are normalised: ``batch`` by their own (transductive, as published), ``support``
    first_order, recompute, backend, compat : see :class:`bayes_taml.engine.Plan`
    rows : support rows to compute together at most
    seed : of weights and samples
    device : where

    Examples
    --------
    >>> learner = MetaLearner(conv_features(size=16, filters=4, blocks=2), input_shape=(1, 16, 16), max_shot=5)
    >>> x, y = torch.rand(5, 1, 16, 16), ["a", "a", "b", "b", "b"]
    >>> learner.adapt(x, y, samples=2).predict_proba(torch.rand(4, 1, 16, 16)).shape
    (4, 2)
    """

    def __init__(
        self,
        backbone: nn.Module,
        method: str | Method = "bayesian-taml",
        *,
        input_shape: Sequence[int],
        inner_lr: float = 0.01,
        inner_steps: int = 5,
        test_steps: int = 10,
        samples: int = 10,
        max_shot: int = 50,
        encoder: Encoder | nn.Module = "auto",
        pooling: Sequence[str] = ("mean", "var", "n"),
        deviation: float | None = None,
        groups: Groups | None = None,
        norm: Literal["replace", "keep"] = "replace",
        statistics: Literal["batch", "support"] = "batch",
        first_order: bool = False,
        recompute: bool = False,
        backend: Literal["auto", "vmap", "loop"] = "auto",
        compat: Compat | None = None,
        rows: int = 1 << 30,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        if not inner_lr > 0:
            raise InputError(f"inner_lr: must be > 0, got {inner_lr}")
        if samples < 1 or test_steps < 0:
            raise InputError(f"need samples >= 1 and test_steps >= 0, got {samples} and {test_steps}")
        self.method_name = method if isinstance(method, str) else "own"
        self.method = find_method(method) if isinstance(method, str) else method
        self.device = torch.device(device)
        backbone.to(self.device)
        self.model = Modulated(backbone, input_shape, groups=groups, norm=norm)
        self.plan = Plan(inner_steps, first_order, self.method.head, statistics, backend, recompute, compat or Compat())
        self.inner_lr, self.test_steps, self.samples, self.max_shot = inner_lr, test_steps, samples, max_shot
        self.pooling, self.seed, self.rows = tuple(pooling), seed, rows
        self.deviation = deviation
        self.encoder_kind = encoder if isinstance(encoder, str) else "own"
        self.inference = self._inference(encoder) if self.method.balance else None
        self.rates = self._rates() if self.method.alpha == "learned" and self.method.algorithm == "maml" else {}
        self.log_kappa = nn.Parameter(torch.zeros((), device=self.device)) if self.method.rule == "gamma" else None
        self.range: tuple[float, float] | None = None
        self.steps_done = self.skipped = 0
        self._warned = False

    def _inference(self, encoder: Encoder | nn.Module) -> InferenceNetwork:
        shape = self.model.input_shape
        if encoder == "auto":
            encoder = "conv" if len(shape) == 3 and min(shape[1:]) >= 4 else "mlp"
            self.encoder_kind = encoder
        if isinstance(encoder, nn.Module):
            embed = encoder
        elif encoder == "conv":
            if len(shape) != 3:
                raise InputError(f"encoder: 'conv' reads images (channels, height, width), rows are {shape}; use 'mlp'")
            embed = ConvEmbedding(*shape)
        elif encoder == "mlp":
            embed = VectorEmbedding(int(np.prod(shape)))
        else:
            embed = nn.Linear(self.model.features, 64)
        return InferenceNetwork(
            embed,
            layers=len(self.model.layers) + 1,
            modulated=self.model.modulated,
            variables=self.method.balance,
            max_shot=self.max_shot,
            statistics=self.pooling,
            deviation=self.deviation,
            seed=self.seed + 1,
        ).to(self.device)

    def _rates(self) -> dict[str, Tensor]:
        shapes = {name: p.shape for name, p in self.model.backbone.named_parameters() if name in self.model.theta}
        shapes = {**shapes, HEAD_WEIGHT: (1, self.model.features), HEAD_BIAS: (1,)}
        return {
            name: nn.Parameter(torch.full(shape, self.inner_lr, device=self.device)) for name, shape in shapes.items()
        }

    def parameters(self) -> dict[str, Tensor]:
        """Everything that is learned over tasks, by name."""
        found: dict[str, Tensor] = {n: p for n, p in self.model.backbone.named_parameters() if p.requires_grad}
        found |= {f"rate.{name}": rate for name, rate in self.rates.items()}
        if self.inference is not None:
            found |= {f"inference.{name}": p for name, p in self.inference.named_parameters()}
        if self.log_kappa is not None:
            found["log_kappa"] = self.log_kappa
        return found

    def to(self, device: torch.device | str) -> MetaLearner:
        """Move to a device.

        Parameters
        ----------
        device : where to
        """
        self.device = torch.device(device)
        self.model.backbone.to(self.device)
        if self.inference is not None:
            self.inference.to(self.device)
        for leaf in (*self.rates.values(), *([self.log_kappa] if self.log_kappa is not None else [])):
            leaf.data = leaf.data.to(self.device)
        return self

    def _body(self) -> dict[str, Tensor]:
        return dict(self.model.backbone.named_parameters())

    # ---- balancing variables

    def posterior(self, tasks: Tasks, change_counts: Callable[[Tensor], Tensor] | None = None) -> Posterior:
        """Infer the balancing variables from the supports of tasks.

        Parameters
        ----------
        tasks : the batch
        change_counts : what to do with the cardinalities before they are read, for studies

        Raises
        ------
        InputError
            For a method without an inference network.
        """
        if self.inference is None:
            raise InputError(f"method '{self.method_name}' infers nothing about a task")
        place, row = tasks.support_mask.nonzero(as_tuple=True)
        rows, labels = tasks.support[place, row], tasks.support_labels[place, row]
        if self.encoder_kind == "features":
            rows = self._plain_features(tasks)[place, row]
        return self.inference(PackedSupport(rows, labels, place, len(tasks), tasks.ways), change_counts)

    def _plain_features(self, tasks: Tasks) -> Tensor:
        body = {name: p.detach() for name, p in self._body().items()}
        x = without_padding(tasks.support, tasks.support_mask)

        def one(x: Tensor, mask: Tensor) -> Tensor:
            return self.model.call(body, x, Pass(mask=mask))

        with torch.no_grad():
            return torch.vmap(one)(x, tasks.support_mask)

    def _latents(
        self, tasks: Tasks, seeds: Sequence[int], *, samples: int = 0, posterior: Posterior | None = None
    ) -> Latents:
        """Latents of tasks: ``samples`` draws of each task one after another, or the means for 0 samples."""
        if posterior is None and self.inference is not None:
            posterior = self.posterior(tasks)
        if posterior is None:
            fixed = Latents()
            dtype = next(iter(self._body().values())).dtype
            if self.method.rule == "inverse":
                fixed = Latents(omega=baselines.inverse_frequency(tasks, dtype))
            elif self.log_kappa is not None:
                fixed = Latents(gamma=baselines.step_rule(tasks, self.log_kappa, len(self.model.layers) + 1))
            return fixed.repeated(max(samples, 1))
        if not samples:
            return posterior.at_mean()
        many = Posterior(
            {name: v.repeat_interleave(samples, 0) for name, v in posterior.mean.items()},
            {name: v.repeat_interleave(samples, 0) for name, v in posterior.raw.items()},
        )
        return many.sample(many.draw([_seed(seed, k) for seed in seeds for k in range(samples)]))

    def latents(self, tasks: Tasks, *, posterior: Posterior | None = None) -> Latents:
        """Means of the balancing variables of tasks, or what the method's rule has in their place.

        Parameters
        ----------
        tasks : the batch
        posterior : of :meth:`posterior`, where it is known
        """
        return self._latents(tasks, [], posterior=posterior)

    def run_task(self, task: Tasks, latents: Latents, *, steps: int, observe: engine.Observe) -> None:
        """Adapt to one task under given latents, for what `observe` sees on the way.

        Parameters
        ----------
        task : one, without padding
        latents : of it
        steps : inner steps
        observe : see :func:`bayes_taml.engine.adapt`
        """
        body = {name: p.detach() for name, p in self._body().items()}
        rates = {name: rate.detach() for name, rate in self.rates.items()} or self.inner_lr
        engine.adapt_all(self.model, body, task, latents, rates, replace(self.plan, steps=steps), observe=observe)

    def row_losses(self, parameters: Mapping[str, Tensor], x: Tensor, labels: Tensor) -> Float[Tensor, " n"]:
        """Cross-entropy of each row under the parameters of a task, the head's among them.

        Parameters
        ----------
        parameters : by name
        x, labels : rows and classes
        """
        body = {name: v for name, v in parameters.items() if name not in (HEAD_WEIGHT, HEAD_BIAS)}
        h = self.model.call(body, x, Pass())
        logits = functional.linear(h, parameters[HEAD_WEIGHT], parameters[HEAD_BIAS])
        return functional.cross_entropy(logits, labels, reduction="none")

    # ---- training

    def meta_step(self, tasks: Tasks, seeds: Sequence[int]) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
        """Gradients of the objective of a batch of tasks.

        Per task, mean query cross-entropy plus the divergence over (support rows + query rows), from one sample
        (section 3.2; nothing else weighs the divergence).

        Parameters
        ----------
        tasks : the batch
        seeds : one for each task, of its sample

        Returns
        -------
        Gradients by name, and query losses, accuracies and divergences ``(tasks,)``.
        """
        body = self._body()
        if self.method.rule == "oversample":
            tasks = baselines.oversampled(tasks, seeds)
        kl = torch.zeros(len(tasks), device=self.device)
        if self.method.algorithm == "protonet":
            return self._prototype_step(tasks, body, kl)
        posterior = self.posterior(tasks) if self.inference is not None else None
        sampled = 1 if posterior is not None and self.method.bayes else 0
        latents = self._latents(tasks, seeds, samples=sampled, posterior=posterior)
        found = engine.meta_gradients(
            self.model, body, tasks, latents, self.rates or self.inner_lr, self.plan, most=self.rows
        )
        gradients = {name: g for name, g in found.gradients.items() if name in body and body[name].requires_grad}
        gradients |= {name: g for name, g in found.gradients.items() if name.startswith("rate.")}
        upstream = latents.values()
        outputs, weights = list(upstream.values()), [found.latents[name] for name in upstream]
        if posterior is not None and self.method.bayes:
            number = tasks.sizes() + tasks.query_mask.sum(1)
            if self.plan.compat.padded_n:
                number = torch.full_like(number, tasks.support.shape[1]) + tasks.query_mask.sum(1)
            own = posterior.kl()
            kl = own.detach()
            outputs.append((own / number).mean())
            weights.append(torch.ones((), device=self.device))
        leaves = {name: p for name, p in self.parameters().items() if name not in gradients}
        if leaves:
            made: Any = torch.autograd.grad(outputs, list(leaves.values()), weights, allow_unused=True)
            for (name, leaf), gradient in zip(leaves.items(), made, strict=True):
                gradients[name] = torch.zeros_like(leaf) if gradient is None else gradient
        return gradients, found.loss, found.right, kl

    def _prototype_step(
        self, tasks: Tasks, body: dict[str, Tensor], kl: Tensor
    ) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
        logits = baselines.prototype_logits(self.model, body, tasks, self.plan)
        labels = torch.where(tasks.query_mask, tasks.query_labels, 0)
        per_row = functional.cross_entropy(logits.mT, labels, reduction="none")
        number = tasks.query_mask.sum(1)
        loss = (per_row * tasks.query_mask).sum(1) / number
        leaves = self.parameters()
        found: Any = torch.autograd.grad(loss.mean(), list(leaves.values()), allow_unused=True)
        gradients = {
            name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(leaves.items(), found, strict=True)
        }
        right = ((logits.argmax(-1) == labels) & tasks.query_mask).sum(1) / number
        return gradients, loss.detach(), right, kl

    def fit(
        self,
        source: Source,
        *,
        steps: int,
        meta_batch: int = 4,
        outer_lr: float = 1e-3,
        clip: float = 3.0,
        validation: Source | None = None,
        validate_every: int = 0,
        validation_tasks: int = 100,
        on_step: Callable[[Step], None] | None = None,
        on_validation: Callable[[int, float], None] | None = None,
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
        clip : bound on every entry of the meta-gradient
        validation : of tasks to judge by, at the means of the balancing variables; the best parameters are kept
        validate_every : steps between judgements; 0 for none
        validation_tasks : tasks of each
        on_step, on_validation : called after each
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
        leaves = self.parameters()
        optimizer = torch.optim.Adam(list(leaves.values()), lr=outer_lr)
        history: list[Step] = []
        self.steps_done = self.skipped = 0
        best: tuple[float, dict[str, Tensor]] | None = None
        judged = 0
        if resume is not None:
            best = self._load_state(resume, leaves, optimizer)
            judged = int(resume.get("judged", resume["step"]))

        def judge() -> None:
            nonlocal best, judged
            if validation is None or not validate_every or self.steps_done % validate_every:
                return
            if self.steps_done == judged:
                return
            found = self.evaluate(validation, tasks=validation_tasks, samples=0, steps=self.test_steps).mean
            if best is None or found > best[0]:
                best = (found, {name: leaf.detach().clone() for name, leaf in leaves.items()})
            judged = self.steps_done
            if on_validation is not None:
                on_validation(self.steps_done, found)

        # Whether parameters, moments and the step's number belong together, so that an interruption may keep them.
        whole = True
        try:
            # One that was due when the run was interrupted.
            judge()
            while self.steps_done < steps:
                number = self.steps_done
                tasks = source.batch(number, meta_batch)
                self._see(tasks)
                own = world.shard(meta_batch)
                part = tasks.part(own.start, own.stop - own.start).to(self.device)
                seeds = [self._task_seed(number * meta_batch + place) for place in range(own.start, own.stop)]
                gradients, loss, right, kl = self.meta_step(part, seeds)
                share = len(part) / meta_batch
                summed = [share * gradients[name] for name in leaves]
                told = torch.stack([loss.sum(), right.sum(), kl.sum()]) / meta_batch
                world.all_reduce([*summed, told])
                whole = False
                if all(bool(torch.isfinite(gradient).all()) for gradient in (*summed, told)):
                    for leaf, gradient in zip(leaves.values(), summed, strict=True):
                        leaf.grad = gradient.clamp(-clip, clip)
                    optimizer.step()
                else:
                    self.skipped += 1
                    if self.skipped > max(20, steps // 10):
                        raise ArithmeticError(
                            f"{self.skipped} meta-steps were not finite; lower inner_lr or outer_lr, or look at the"
                            " data"
                        )
                self.steps_done += 1
                whole = True
                line = Step(self.steps_done, steps, float(told[0]), float(told[1]), float(told[2]), self.skipped)
                history.append(line)
                if on_step is not None:
                    on_step(line)
                judge()
                if on_state is not None and (self.steps_done % state_every == 0 or self.steps_done == steps):
                    on_state(self._state(leaves, optimizer, best, judged))
        except KeyboardInterrupt:
            if on_state is not None and whole and world.size == 1:
                on_state(self._state(leaves, optimizer, best, judged))
            raise
        if best is not None:
            with torch.no_grad():
                for name, leaf in leaves.items():
                    leaf.copy_(best[1][name])
        return history

    def _task_seed(self, number: int) -> int:
        return _seed(self.seed, 11, number)

    def _see(self, tasks: Tasks) -> None:
        """Remember the range of inputs, to warn of others later."""
        if self.range is None:
            real = tasks.support[tasks.support_mask]
            self.range = (float(real.min()), float(real.max()))

    def _state(
        self,
        leaves: Mapping[str, Tensor],
        optimizer: torch.optim.Adam,
        best: tuple[float, dict[str, Tensor]] | None,
        judged: int,
    ) -> dict[str, Any]:
        moments = optimizer.state
        return {
            "step": self.steps_done,
            "skipped": self.skipped,
            "range": None if self.range is None else list(self.range),
            "parameters": {name: leaf.detach() for name, leaf in leaves.items()},
            "moments": {
                name: [moments[leaf]["exp_avg"], moments[leaf]["exp_avg_sq"], moments[leaf]["step"]]
                for name, leaf in leaves.items()
                if leaf in moments
            },
            "best": None if best is None else [best[0], best[1]],
            "judged": judged,
        }

    def _load_state(
        self, state: Mapping[str, Any], leaves: Mapping[str, Tensor], optimizer: torch.optim.Adam
    ) -> tuple[float, dict[str, Tensor]] | None:
        if unlike := set(leaves) ^ set(state["parameters"]):
            raise CheckpointError(f"the state to resume from is of another learner: it differs in {min(unlike)}")
        with torch.no_grad():
            for name, leaf in leaves.items():
                leaf.copy_(state["parameters"][name])
        for name, (first, second, step) in state["moments"].items():
            optimizer.state[leaves[name]] = {
                "step": step.clone(),
                "exp_avg": first.to(self.device).clone(),
                "exp_avg_sq": second.to(self.device).clone(),
            }
        self.steps_done, self.skipped = int(state["step"]), int(state["skipped"])
        seen = state["range"]
        self.range = None if seen is None else (float(seen[0]), float(seen[1]))
        best = state["best"]
        return None if best is None else (float(best[0]), dict(best[1]))

    # ---- many tasks

    def probabilities(
        self,
        tasks: Tasks,
        seeds: Sequence[int],
        *,
        samples: int | None = None,
        steps: int | None = None,
        change_counts: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Float[Tensor, "tasks m ways"], int, int]:
        """Adapt to each task and answer its queries with probabilities averaged over samples.

        Parameters
        ----------
        tasks : the batch
        seeds : of their samples
        samples : of the balancing variables; 0 plugs in their means, None is as set
        steps : inner steps; None is ``test_steps``
        change_counts : see :meth:`posterior`

        Returns
        -------
        Probabilities, how many samples diverged, and how many step multipliers were held within their bounds.
        """
        body = {name: p.detach() for name, p in self._body().items()}
        if self.method.rule == "oversample":
            tasks = baselines.oversampled(tasks, seeds)
        with torch.no_grad():
            if self.method.algorithm == "protonet":
                logits = baselines.prototype_logits(self.model, body, tasks, self.plan)
                return functional.softmax(logits, -1), 0, 0
        if self.method.algorithm == "scratch":
            return functional.softmax(baselines.fine_tune(self.model, body, tasks, self.plan), -1), 0, 0
        wanted = self.samples if samples is None else samples
        if self.method.naive or not self.method.bayes or self.inference is None:
            wanted = 0
        with torch.no_grad():
            posterior = self.posterior(tasks, change_counts) if self.inference is not None else None
            latents = self._latents(tasks, seeds, samples=wanted, posterior=posterior)
            held = torch.zeros(1)
            if not self.plan.compat.on:
                latents, held = latents.bounded()
        plan = replace(self.plan, steps=self.test_steps if steps is None else steps)
        rates = {name: rate.detach() for name, rate in self.rates.items()} or self.inner_lr
        logits, diverged = engine.answer(
            self.model, body, tasks, latents, rates, plan, samples=max(wanted, 1), most=min(self.rows, 4096)
        )
        return functional.softmax(logits, -1).mean(1), int(diverged.sum()), int(held.sum())

    def evaluate(
        self,
        source: Source,
        *,
        tasks: int = 600,
        batch: int = 20,
        samples: int | None = None,
        steps: int | None = None,
        seed: int = 0,
        change_counts: Callable[[Tensor], Tensor] | None = None,
        on_batch: Callable[[int], None] | None = None,
    ) -> Evaluation:
        """Adapt to test tasks and keep the answers to their queries.

        Parameters
        ----------
        source : of test tasks
        tasks : how many
        batch : at a time
        samples, steps, change_counts : see :meth:`probabilities`
        seed : of the samples of the balancing variables
        on_batch : called with the number of tasks done
        """
        if tasks < 1:
            raise InputError(f"tasks: must be at least 1, got {tasks}")
        found: list[tuple[np.ndarray, ...]] = []
        diverged = held = done = 0
        while done < tasks:
            part = source.batch(done // batch, batch).part(0, min(batch, tasks - done)).to(self.device)
            seeds = [_seed(self.seed, 13, seed, done + k) for k in range(len(part))]
            probability, stopped, bounded = self.probabilities(
                part, seeds, samples=samples, steps=steps, change_counts=change_counts
            )
            diverged, held = diverged + stopped, held + bounded
            found.append(
                tuple(
                    v.cpu().numpy() for v in (probability.double(), part.query_labels, part.query_mask, part.counts())
                )
            )
            done += len(part)
            if on_batch is not None:
                on_batch(done)
        probability, labels, mask = (_joined([f[k] for f in found]) for k in range(3))
        sampled = self.inference is not None and self.method.bayes and not self.method.naive
        protocol = {
            "method": self.method_name,
            "statistics": self.plan.statistics,
            "inner_steps": self.test_steps if steps is None else steps,
            "inner_lr": self.inner_lr,
            "samples": (self.samples if samples is None else samples) if sampled else 0,
            "tasks": tasks,
            "seed": self.seed,
        }
        return Evaluation(probability, labels, mask, np.concatenate([f[3] for f in found]), diverged, held, protocol)

    # ---- one task

    def checked_rows(self, x: Any, what: str) -> Tensor:
        """Turn rows into a tensor of the right shape, or say what is wrong.

        Parameters
        ----------
        x : tensor or array
        what : name for messages
        """
        if not isinstance(x, Tensor):
            try:
                array = np.asarray(x)
            except ValueError as error:
                raise InputError(f"{what}: rows differ in shape, expected (n, {_shape(self.model)})") from error
            if array.dtype.kind not in "fiub":
                raise InputError(f"{what}: holds {array.dtype}, expected numbers of shape (n, {_shape(self.model)})")
            x = torch.from_numpy(np.ascontiguousarray(array))
        if x.dim() != len(self.model.input_shape) + 1 or tuple(x.shape[1:]) != self.model.input_shape:
            raise InputError(f"{what}: has shape {tuple(x.shape)}, expected (n, {_shape(self.model)})")
        dtype = next(iter(self._body().values())).dtype
        rows = x.to(dtype)
        finite = torch.isfinite(rows.flatten(1)).all(1)
        if not bool(finite.all()):
            raise InputError(f"{what}: row {int((~finite).nonzero()[0])} holds NaN or infinity")
        if self.range is not None and len(rows):
            low, high = float(rows.min()), float(rows.max())
            span = max(self.range[1] - self.range[0], 1e-12)
            if low < self.range[0] - span or high > self.range[1] + span:
                warnings.warn(
                    f"{what}: values are {low:g}..{high:g}, training had {self.range[0]:g}..{self.range[1]:g}; scale"
                    " them alike",
                    RangeWarning,
                    stacklevel=3,
                )
        return rows.to(self.device)

    def task_of(self, x: Any, y: Sequence[Hashable] | Tensor | np.ndarray) -> tuple[Tasks, np.ndarray]:
        """Turn a labelled data set into a task without queries; return it and its classes in order.

        Parameters
        ----------
        x : ``(n, ...)`` rows
        y : ``(n,)`` labels: integers, text, anything that can be sorted

        Raises
        ------
        NeedTwoClassesError, InputError
            For a single class, or labels that do not go with the rows.
        """
        rows = self.checked_rows(x, "support")
        values = np.asarray(y.cpu() if isinstance(y, Tensor) else y)
        if values.shape != (len(rows),):
            raise InputError(f"support: {len(rows)} rows and labels of shape {values.shape}; give one label a row")
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise InputError(f"support: label {int(np.flatnonzero(~np.isfinite(values))[0])} is not finite")
        if not len(rows):
            raise EmptyClassError("support: has no rows")
        classes, codes = np.unique(values, return_inverse=True)
        if len(classes) < 2:
            raise NeedTwoClassesError(
                f"support: all labels are {classes.tolist()[0]!r}; a task needs at least two classes"
            )
        labels = torch.from_numpy(codes.reshape(-1).astype(np.int64)).to(self.device)
        task = Tasks(
            rows[None],
            labels[None],
            torch.ones(1, len(rows), dtype=torch.bool, device=self.device),
            rows[None, :1],
            labels[None, :1],
            torch.ones(1, 1, dtype=torch.bool, device=self.device),
            len(classes),
        )
        most = int(task.counts().max())
        if self.inference is not None and most > 2 * self.max_shot:
            warnings.warn(
                f"a class has {most} examples, training had at most {self.max_shot}; step multipliers are held within"
                " 1/100 and 100",
                ExtrapolationWarning,
                stacklevel=3,
            )
        return task, classes

    def adapt(
        self,
        x: Any,
        y: Sequence[Hashable] | Tensor | np.ndarray,
        *,
        steps: int | None = None,
        samples: int | None = None,
        class_weight: Mapping[Any, float] | None = None,
        seed: int = 0,
    ) -> TaskClassifier:
        """Adapt to one labelled data set, with as many examples of each class as there are; the learner stays as it is.

        Parameters
        ----------
        x : ``(n, ...)`` rows
        y : ``(n,)`` labels
        steps : inner steps; None is ``test_steps``
        samples : of the balancing variables; 0 plugs in their means
        class_weight : factors by label that the inferred class weights are multiplied by, for costs or for class shares
            where the model will be used
        seed : of the samples

        Examples
        --------
        >>> learner = MetaLearner(mlp_features(inputs=3), "metasgd", input_shape=(3,))
        >>> learner.adapt(np.eye(3), ["a", "b", "b"]).classes_.tolist()
        ['a', 'b']
        """
        task, classes = self.task_of(x, y)
        body = {name: p.detach() for name, p in self._body().items()}
        counts = task.counts()[0].cpu().numpy()
        if self.method.rule == "oversample":
            task = baselines.oversampled(task, [seed])
        rows = task.support[0]
        if self.method.algorithm == "protonet":
            return TaskClassifier(self._prototypes(task, body), classes, counts, self)
        if self.method.algorithm == "scratch":
            raise InputError("method 'scratch' learns nothing over tasks; fit a network to the data set instead")
        wanted = self.samples if samples is None else samples
        if self.method.naive or not self.method.bayes or self.inference is None:
            wanted = 0
        with torch.no_grad():
            latents = self._latents(task, [_seed(self.seed, 17, seed)], samples=wanted)
            if not self.plan.compat.on:
                latents, held = latents.bounded()
                if bool(held.any()) and not self._warned:
                    self._warned = True
                    warnings.warn(
                        "a step multiplier was held within 1/100 and 100: the support is unlike those of training",
                        ExtrapolationWarning,
                        stacklevel=2,
                    )
            latents = _reweighted(latents, class_weight, classes)
        plan = replace(self.plan, steps=self.test_steps if steps is None else steps)
        rates = {name: rate.detach() for name, rate in self.rates.items()} or self.inner_lr
        made = engine.adapt_all(self.model, body, task, latents, rates, plan, samples=max(wanted, 1))
        own = {**made.parameters, HEAD_WEIGHT: made.weight, HEAD_BIAS: made.bias}
        shared = {name: p for name, p in body.items() if name not in own}
        return TaskClassifier(TaskModel(self.model, shared, own, rows, plan), classes, counts, self)

    def _prototypes(self, task: Tasks, body: Mapping[str, Tensor]) -> TaskModel:
        with torch.no_grad():
            h = self.model.call(body, task.support[0], Pass())
            centre = torch.stack([h[task.support_labels[0] == c].mean(0) for c in range(task.ways)])
        own = {HEAD_WEIGHT: centre[None], HEAD_BIAS: centre.new_zeros(1, task.ways)}
        return TaskModel(self.model, body, own, task.support[0], self.plan, prototypes=True)

    # ---- saving

    def save(self, path: str | Path, *, network: Mapping[str, Any] | None = None) -> None:
        """Write everything that was learned to one safetensors file.

        Parameters
        ----------
        path : file to write
        network : arguments of :func:`bayes_taml.conv_features` (or ``{"kind": "mlp", ...}``) that made the backbone, so
            that :meth:`load` can make it again
        """
        from shared_core.runs import save_tree

        options = {
            "input_shape": list(self.model.input_shape),
            "inner_lr": self.inner_lr,
            "inner_steps": self.plan.steps,
            "test_steps": self.test_steps,
            "samples": self.samples,
            "max_shot": self.max_shot,
            "encoder": self.encoder_kind,
            "pooling": list(self.pooling),
            "deviation": self.deviation,
            "statistics": self.plan.statistics,
            "first_order": self.plan.first_order,
            "compat": asdict(self.plan.compat),
            "seed": self.seed,
        }
        save_tree(
            path,
            {
                "bayes_taml": _FORMAT,
                "method": self.method_name,
                "definition": json.dumps(asdict(self.method)),
                "options": json.dumps(options),
                "layers": json.dumps([list(self.model.layers), self.model.layer_of]),
                "network": json.dumps(dict(network) if network is not None else None),
                "range": None if self.range is None else list(self.range),
                "parameters": {name: p.detach() for name, p in self.parameters().items()},
            },
        )

    @classmethod
    def load(
        cls,
        path: str | Path,
        backbone: nn.Module | None = None,
        *,
        encoder: nn.Module | None = None,
        device: torch.device | str = "cpu",
    ) -> MetaLearner:
        """Read what :meth:`save` wrote.

        Parameters
        ----------
        path : the file
        backbone : the network, if it is not one of this package's
        encoder : the inference network's reader of rows, if it is your own
        device : where to

        Raises
        ------
        CheckpointError
            For a file that is no learner, or one of another network; the parameters that differ are named.
        """
        from shared_core.runs import load_tree

        tree = load_tree(path)
        if not isinstance(tree, dict) or "bayes_taml" not in tree:
            raise CheckpointError(f"{path}: is no learner of bayes-taml; give the file that `save` wrote")
        tree = cast("dict[str, Any]", tree)
        try:
            network, options = json.loads(tree["network"]), json.loads(tree["options"])
            layers, layer_of = json.loads(tree["layers"])
            if backbone is None:
                if network is None:
                    raise CheckpointError(f"{path}: the backbone was one of your own; pass it as well")
                kind = network.pop("kind", "conv")
                backbone = mlp_features(**network) if kind == "mlp" else conv_features(**network)
            definition: dict[str, Any] = json.loads(tree["definition"])
            definition["balance"] = tuple(definition["balance"])
            options["compat"] = Compat(**options["compat"])
            if options["encoder"] == "own":
                if encoder is None:
                    raise CheckpointError(f"{path}: the encoder was one of your own; pass it as well")
                options["encoder"] = encoder

            def layer(name: str) -> str:
                return layers[layer_of[name]] if name in layer_of else name

            made = cls(backbone, Method(**definition), groups=layer, device=device, **options)
            made.method_name = tree["method"]
            leaves = made.parameters()
            if unlike := sorted(set(leaves) ^ set(tree["parameters"])):
                raise CheckpointError(f"{path}: is of another network; it differs in {', '.join(unlike[:5])}")
            with torch.no_grad():
                for name, value in tree["parameters"].items():
                    if leaves[name].shape != value.shape:
                        raise CheckpointError(
                            f"{path}: {name} has shape {tuple(value.shape)}, the network's {tuple(leaves[name].shape)}"
                        )
                    leaves[name].copy_(value)
            made.range = None if tree["range"] is None else (float(tree["range"][0]), float(tree["range"][1]))
        except DAMAGE as error:
            if isinstance(error, InputError):
                raise
            raise CheckpointError(
                f"{path}: was written by another version of bayes-taml, or is damaged ({error})"
            ) from error
        return made


def _seed(*parts: int) -> int:
    return int(np.random.default_rng(list(parts)).integers(1 << 62))


def _shape(model: Modulated) -> str:
    return ", ".join(str(side) for side in model.input_shape)


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    """Concatenate along tasks, and pad queries to the most."""
    most = max(p.shape[1] for p in parts)
    return np.concatenate([np.pad(p, [(0, 0), (0, most - p.shape[1]), *[(0, 0)] * (p.ndim - 2)]) for p in parts])


def _reweighted(latents: Latents, class_weight: Mapping[Any, float] | None, classes: np.ndarray) -> Latents:
    if class_weight is None:
        return latents
    names: list[Any] = classes.tolist()
    if unknown := [name for name in class_weight if name not in names]:
        raise InputError(f"class_weight: no class {unknown[0]!r} in the support; there are {names}")
    factors = np.array([float(class_weight.get(name, 1.0)) for name in names])
    if not (np.isfinite(factors).all() and (factors > 0).all()):
        raise InputError("class_weight: factors must be finite and > 0")
    values = latents.values()
    first = next(iter(values.values()), None)
    shift = torch.from_numpy(np.log(factors)).to(torch.float32 if first is None else first)
    rows = 1 if first is None else len(first)
    omega = shift.expand(rows, -1) if latents.omega is None else latents.omega + shift
    return Latents(omega, latents.gamma, latents.z)
