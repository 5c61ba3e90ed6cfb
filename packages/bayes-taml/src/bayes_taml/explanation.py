"""What the learner decided about one task: how much each class counted, how far each layer moved, and why."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from bayes_taml import baselines, engine
from bayes_taml.engine import HEAD_WEIGHT
from bayes_taml.learner import MetaLearner
from bayes_taml.posterior import Latents, Posterior
from bayes_taml.ragged import Tasks
from shared_core.errors import InputError

__all__ = ["Counterfactual", "Explanation", "balance_table", "counterfactual", "explain"]


@dataclass(frozen=True, eq=False)
class Explanation:
    """The balancing of one task.

    Intervals hold the middle 95 % of the posterior. Without an inference network the class weights are even (or those
    of the method's rule), multipliers 1, and intervals points.

    Parameters
    ----------
    class_names : labels
    counts : ``(C,)`` support rows of each class
    omega, omega_low, omega_high : ``(C,)`` class weights, which sum to 1
    pull : ``(C,)`` share of the steps' gradients that each class supplied: its weighted gradients' norm, over all steps
    layers : names, the head's last
    gamma, gamma_low, gamma_high : ``(L,)`` step multipliers
    moved : ``(L,)`` distance that the layer moved in adaptation, relative to where it started; NaN for a head from zero
    z_size : ``(L-1,)`` root mean square of the layer's modulation
    class_loss : ``(steps + 1, C)`` mean support loss of each class before each step, and at the end
    kl : divergence from the prior by variable, in nats: how far this task is from an ordinary one
    """

    class_names: tuple[str, ...]
    counts: Int64[np.ndarray, " C"]
    omega: Float[np.ndarray, " C"]
    omega_low: Float[np.ndarray, " C"]
    omega_high: Float[np.ndarray, " C"]
    pull: Float[np.ndarray, " C"]
    layers: tuple[str, ...]
    gamma: Float[np.ndarray, " L"]
    gamma_low: Float[np.ndarray, " L"]
    gamma_high: Float[np.ndarray, " L"]
    moved: Float[np.ndarray, " L"]
    z_size: Float[np.ndarray, " body"]
    class_loss: Float[np.ndarray, "points C"]
    kl: Mapping[str, float]

    def text(self) -> str:
        """Say it in lines of text."""
        even = 1 / len(self.counts)
        lines = [f"class weights (even: {even:.3f})"]
        width = max(len(name) for name in self.class_names)
        lines += [
            f"  {self.class_names[k]:<{width}}  {self.omega[k]:.3f} ({self.omega_low[k]:.3f} to"
            f" {self.omega_high[k]:.3f})  {self.counts[k]} examples, {100 * self.pull[k]:.0f} % of the pull, loss"
            f" {self.class_loss[0, k]:.2f} -> {self.class_loss[-1, k]:.2f}"
            for k in np.argsort(-self.omega)
        ]
        lines.append("layers: step multiplier, relative distance moved, size of the modulation")
        for k, name in enumerate(self.layers):
            moved = "from zero" if np.isnan(self.moved[k]) else f"{100 * self.moved[k]:.2f} %"
            z = f", z {self.z_size[k]:.2f}" if k < len(self.z_size) else ""
            lines.append(
                f"  {name}: {self.gamma[k]:.2f} ({self.gamma_low[k]:.2f} to {self.gamma_high[k]:.2f}), moved {moved}{z}"
            )
        if self.kl:
            said = ", ".join(f"{name} {value:.2f}" for name, value in self.kl.items())
            lines.append(f"divergence from an ordinary task (nats): {said}")
        return "\n".join(lines)

    def record(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        named = {
            name: getattr(self, name).tolist()
            for name in (
                *("counts", "omega", "omega_low", "omega_high", "pull", "gamma", "gamma_low", "gamma_high", "z_size"),
                "class_loss",
            )
        }
        moved = [None if np.isnan(v) else float(v) for v in self.moved]
        return {
            "classes": list(self.class_names),
            "layers": list(self.layers),
            **named,
            "moved": moved,
            "kl": dict(self.kl),
        }


def explain(
    learner: MetaLearner,
    x: Any,
    y: Sequence[Hashable] | Tensor | np.ndarray,
    *,
    steps: int | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> Explanation:
    """Adapt at the means of the balancing variables, and record what happened.

    Parameters
    ----------
    learner : trained; not ``protonet`` or ``scratch``, which balance nothing
    x, y : the labelled data set: ``(n, ...)`` rows and ``(n,)`` labels
    steps : inner steps; None is as at test time
    draws : from the posterior, for intervals
    seed : of the draws
    """
    if learner.method.algorithm != "maml":
        raise InputError(f"method '{learner.method_name}' takes no weighted steps; there is nothing to explain")
    task, classes = learner.task_of(x, y)
    counts = task.counts()[0].cpu().numpy()
    if learner.method.rule == "oversample":
        task = baselines.oversampled(task, [seed])
    with torch.no_grad():
        posterior = learner.posterior(task) if learner.inference is not None else None
        latents, _ = learner.latents(task, posterior=posterior).bounded()
    omega, gamma, z = _intervals(learner, task, latents, posterior, draws, seed)
    pull, moved, losses = _followed(learner, task, latents, steps)
    return Explanation(
        class_names=tuple(str(name) for name in classes.tolist()),
        counts=counts,
        omega=omega[0],
        omega_low=omega[1],
        omega_high=omega[2],
        pull=pull,
        layers=(*learner.model.layers, "head"),
        gamma=gamma[0],
        gamma_low=gamma[1],
        gamma_high=gamma[2],
        moved=moved,
        z_size=z,
        class_loss=losses,
        kl={}
        if posterior is None or not learner.method.bayes
        else {k: float(v) for k, v in posterior.kl_by_variable().items()},
    )


def _intervals(
    learner: MetaLearner, task: Tasks, latents: Latents, posterior: Posterior | None, draws: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Value, low and high of class weights ``(3, C)`` and multipliers ``(3, L)``, and the size of z by layer."""
    ways, layers = task.ways, len(learner.model.layers) + 1
    weights = torch.full((1, ways), 1 / ways) if latents.omega is None else torch.softmax(latents.omega, 1)
    factors = torch.ones(1, layers) if latents.gamma is None else latents.gamma.exp()
    omega, gamma = (v.double().cpu().numpy().repeat(3, 0) for v in (weights, factors))
    if posterior is not None:
        many = Posterior(
            {name: v.detach().repeat_interleave(draws, 0) for name, v in posterior.mean.items()},
            {name: v.detach().repeat_interleave(draws, 0) for name, v in posterior.raw.items()},
        )
        drawn, _ = many.sample(many.draw(range(seed, seed + draws))).bounded()
        if drawn.omega is not None and learner.method.bayes:
            omega[1:] = np.quantile(torch.softmax(drawn.omega, 1).double().cpu().numpy(), (0.025, 0.975), axis=0)
        if drawn.gamma is not None and learner.method.bayes:
            gamma[1:] = np.quantile(drawn.gamma.exp().double().cpu().numpy(), (0.025, 0.975), axis=0)
    size = np.zeros(layers - 1)
    if latents.z is not None:
        squares: dict[str, list[np.ndarray]] = {name: [] for name in learner.model.layers}
        for name, at in learner.model.slices().items():
            place = learner.model.layer_of.get(name)
            layer = name.split(".")[0] if place is None else learner.model.layers[place]
            if layer in squares:
                squares[layer].append(latents.z[0, at].double().cpu().numpy() ** 2)
        size = np.array([np.sqrt(np.concatenate(v).mean()) if v else 0.0 for v in squares.values()])
    return omega, gamma, size


def _followed(
    learner: MetaLearner, task: Tasks, latents: Latents, steps: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Follow the adaptation: shares of the gradient by class, distances by layer, losses by class and step."""
    labels, counts = task.support_labels[0], task.counts()[0]
    weight = engine.row_weights(task.support_labels, task.support_mask, task.ways, latents.omega, task.support.dtype)[0]
    pull = torch.zeros(task.ways, dtype=torch.float64)
    losses: list[Tensor] = []
    ends: list[dict[str, Tensor]] = []

    def observe(step: int, parameters: dict[str, Tensor], per_row: Tensor) -> None:
        summed = per_row.new_zeros(task.ways).index_add(0, labels, per_row[0])
        losses.append(summed / counts)
        own = {name: (v[0] if v.dim() > shapes[name] else v).detach() for name, v in parameters.items()}
        ends.append(own)
        if step < taken:
            pull.add_(_pull(learner, own, task, weight))

    shapes = {name: p.dim() for name, p in learner.model.backbone.named_parameters()}
    shapes |= {engine.HEAD_WEIGHT: 2, engine.HEAD_BIAS: 1}
    taken = learner.test_steps if steps is None else steps
    learner.run_task(task, latents, steps=taken, observe=observe)
    share = pull / pull.sum() if float(pull.sum()) > 0 else torch.full_like(pull, 1 / task.ways)
    return share.numpy(), _distances(learner, ends), torch.stack(losses).double().cpu().numpy()


def _pull(learner: MetaLearner, own: dict[str, Tensor], task: Tasks, weight: Tensor) -> Tensor:
    """Norm of each class's weighted gradient at one point, ``(ways,)``."""
    leaves = {name: v.clone().requires_grad_() for name, v in own.items()}
    with torch.enable_grad():
        per_row = learner.row_losses(leaves, task.support[0], task.support_labels[0])
        found = torch.zeros(task.ways, dtype=torch.float64)
        wanted = [v for name, v in leaves.items() if name in learner.model.theta or name.startswith("head.")]
        for label in range(task.ways):
            part = (per_row * weight * (task.support_labels[0] == label)).sum()
            gradients: Any = torch.autograd.grad(part, wanted, retain_graph=True, allow_unused=True)
            square = sum(float(g.double().square().sum()) for g in gradients if g is not None)
            found[label] = square**0.5
    return found


def _distances(learner: MetaLearner, ends: list[dict[str, Tensor]]) -> np.ndarray:
    model = learner.model
    moved, size = np.zeros(len(model.layers) + 1), np.zeros(len(model.layers) + 1)
    for name in (*model.theta, HEAD_WEIGHT):
        layer = model.layer_of.get(name, len(model.layers))
        moved[layer] += float((ends[-1][name] - ends[0][name]).double().square().sum())
        size[layer] += float(ends[0][name].double().square().sum())
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(size > 0, np.sqrt(moved / size), np.nan)


@dataclass(frozen=True, eq=False)
class Counterfactual:
    """What the learner would decide had one class more examples (or fewer).

    Parameters
    ----------
    count : of the class, as imagined
    omega : ``(C,)`` class weights
    gamma : ``(L,)`` step multipliers
    """

    count: int
    omega: Float[np.ndarray, " C"]
    gamma: Float[np.ndarray, " L"]


def counterfactual(
    learner: MetaLearner, x: Any, y: Sequence[Hashable] | Tensor | np.ndarray, label: Hashable, counts: Sequence[int]
) -> list[Counterfactual]:
    """Ask how the balance would change with another number of examples of one class, the images as they are.

    Only the cardinality that the inference network reads is changed; its other statistics stay.

    Parameters
    ----------
    learner : with an inference network
    x, y : the data set: ``(n, ...)`` rows and ``(n,)`` labels
    label : whose number to change
    counts : numbers to try
    """
    task, classes = learner.task_of(x, y)
    names: list[Any] = classes.tolist()
    if label not in names:
        raise InputError(f"label: no class {label!r} in the support; there are {names}")
    place = names.index(label)
    found: list[Counterfactual] = []
    for count in counts:

        def changed(given: Tensor, count: int = count) -> Tensor:
            made = given.clone()
            made[:, place] = count
            return made

        with torch.no_grad():
            posterior = learner.posterior(task, changed)
            latents, _ = learner.latents(task, posterior=posterior).bounded()
        omega, gamma, _ = _intervals(learner, task, latents, None, 1, 0)
        found.append(Counterfactual(count, omega[0], gamma[0]))
    return found


def balance_table(learner: MetaLearner, source: Any, tasks: int = 200, batch: int = 20) -> dict[str, np.ndarray]:
    """Class weights and step multipliers over many tasks, at the means.

    Parameters
    ----------
    learner : with an inference network
    source : of tasks
    tasks : how many
    batch : at a time

    Returns
    -------
    ``count`` and ``omega``, an entry for each class of each task; ``size`` ``(tasks,)`` and ``gamma`` ``(tasks, L)``.
    """
    found: dict[str, list[np.ndarray]] = {"count": [], "omega": [], "size": [], "gamma": []}
    for number in range(-(-tasks // batch)):
        part: Tasks = source.batch(number, batch).part(0, min(batch, tasks - number * batch)).to(learner.device)
        with torch.no_grad():
            latents, _ = learner.latents(part).bounded()
        ways, layers = part.ways, len(learner.model.layers) + 1
        even = torch.full((len(part), ways), 1 / ways)
        omega = even if latents.omega is None else torch.softmax(latents.omega, 1)
        gamma = torch.ones(len(part), layers) if latents.gamma is None else latents.gamma.exp()
        found["count"].append(part.counts().flatten().cpu().numpy())
        found["omega"].append(omega.flatten().double().cpu().numpy())
        found["size"].append(part.sizes().cpu().numpy())
        found["gamma"].append(gamma.double().cpu().numpy())
    return {name: np.concatenate(parts) for name, parts in found.items()}
