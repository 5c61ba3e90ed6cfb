"""Adversarial perturbations of query images, and accuracy as a function of their size.

The paper (Lee, Nam, Yang and Hwang, *Meta Dropout*, ICLR 2020) shows accuracy under attacks of bounded L1, L2 and
L-infinity norm as a figure, without steps or step sizes. Here: FGSM (Goodfellow, Shlens and Szegedy, 2015) and PGD
(Madry et al., 2018), untargeted, on images in [0, 1], all tasks at once.

Attacks see a model as a function from images ``(tasks, m, ...)`` to logits ``(tasks, m, ways)``. That function must not
be random. It may be transductive, one image's logits depending on the others in its batch: the gradient is that of the
summed loss, so that images then also work on each other, but each has a budget of its own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional

from shared_core.errors import InputError

__all__ = [
    "KINDS",
    "NORMS",
    "Attack",
    "Kind",
    "Norm",
    "Outputs",
    "RobustnessCurve",
    "perturb_images",
    "project_l1",
    "project_l1_box",
    "project_l2",
    "project_linf",
    "robustness_curve",
    "transfer",
]

Kind = Literal["fgsm", "pgd"]
Norm = Literal["l1", "l2", "linf"]
Outputs = Callable[[Tensor], Tensor]
KINDS: tuple[str, ...] = ("fgsm", "pgd")
NORMS: tuple[str, ...] = ("l1", "l2", "linf")
SPARSITY = 0.01


@dataclass(frozen=True)
class Attack:
    """How images are attacked.

    Parameters
    ----------
    kind : ``fgsm``, one step of the whole budget along the gradient, or ``pgd``, many projected steps
    norm : in which an image's perturbation is bounded: ``l1``, ``l2`` or ``linf``
    eps : largest norm of the perturbation, > 0, of pixels in [0, 1]
    steps : of PGD
    step_size : norm of a PGD step; None is ``2.5 * eps / steps``
    random_start : start PGD at a uniform draw from the ball, else at the clean image

    Raises
    ------
    InputError
        When a value is out of range.

    Examples
    --------
    >>> Attack("pgd", "linf", eps=0.08, steps=20).step
    0.01
    """

    kind: Kind
    norm: Norm
    eps: float
    steps: int = 40
    step_size: float | None = None
    random_start: bool = True

    def __post_init__(self) -> None:
        """Refuse what cannot be done."""
        if self.kind not in KINDS:
            raise InputError(f"kind: '{self.kind}' is not one of {', '.join(KINDS)}")
        if self.norm not in NORMS:
            raise InputError(f"norm: '{self.norm}' is not one of {', '.join(NORMS)}")
        if not 0 < self.eps < math.inf:
            raise InputError(f"eps: must be > 0 and finite, got {self.eps}")
        if self.steps < 1:
            raise InputError(f"steps: must be at least 1, got {self.steps}")
        if self.step_size is not None and not 0 < self.step_size < math.inf:
            raise InputError(f"step_size: must be > 0 and finite, or None for 2.5 * eps / steps, got {self.step_size}")

    @property
    def step(self) -> float:
        """Norm of one PGD step."""
        return 2.5 * self.eps / self.steps if self.step_size is None else self.step_size


def project_l1(v: Float[Tensor, "n d"], radius: float) -> Float[Tensor, "n d"]:
    """Return the nearest points with an L1 norm of at most `radius`, by sorting (Duchi et al., 2008, figure 1).

    Parameters
    ----------
    v : ``(n, d)``, a point in each row
    radius : > 0

    Examples
    --------
    >>> project_l1(torch.tensor([[3.0, 1.0], [0.5, 0.0]]), 2.0)
    tensor([[2.0000, 0.0000],
            [0.5000, 0.0000]])
    """
    _check_radius(radius)
    size = v.to(_wide(v.device)).abs()
    descending = size.sort(1, descending=True).values
    excess = descending.cumsum(1) - radius
    count = torch.arange(1, v.shape[1] + 1, device=v.device)
    kept = (descending * count > excess).sum(1, keepdim=True).clamp(min=1)
    # Negative inside the ball, whose points stay where they are.
    threshold = (excess.gather(1, kept - 1) / kept).clamp(min=0)
    return (v.sign() * (size - threshold).clamp(min=0)).to(v.dtype)


def project_l1_box(
    v: Float[Tensor, "n d"], radius: float, low: Float[Tensor, "n d"], high: Float[Tensor, "n d"]
) -> Float[Tensor, "n d"]:
    """Return the nearest points with an L1 norm of at most `radius` and coordinates in ``[low, high]``, which holds 0.

    They are ``sign(v) * clamp(|v| - t, 0, room)`` for the smallest threshold ``t >= 0`` that the radius allows (as in
    Croce and Hein, 2021). Projecting on the ball and cutting off afterwards wastes what is cut off, which
    makes L1 attacks on images weak.

    Parameters
    ----------
    v : ``(n, d)``, a point in each row
    radius : > 0
    low, high : ``(n, d)``, at most 0 and at least 0

    Examples
    --------
    >>> v = torch.tensor([[3.0, 1.0]])
    >>> project_l1_box(v, 2.0, torch.zeros_like(v), torch.full_like(v, 1.25))
    tensor([[1.2500, 0.7500]])
    """
    _check_radius(radius)
    wide = _wide(v.device)
    size = v.to(wide).abs()
    room = torch.where(v > 0, high, -low).to(wide)
    # As the threshold falls, a coordinate begins to count at |v| and stops growing at |v| - room; between these the
    # norm is linear.
    begins, stops = size, size - room
    ends, order = torch.cat([begins, stops], 1).sort(1, descending=True)
    slopes = torch.cat([torch.ones_like(size), -torch.ones_like(size)], 1).gather(1, order).cumsum(1)
    norms = functional.pad(slopes[:, :-1] * (ends[:, :-1] - ends[:, 1:]), (1, 0)).cumsum(1)
    # The last end at which the norm is still within the radius, and what is left of it from there on.
    last = (norms <= radius).sum(1, keepdim=True).clamp(min=1) - 1
    left = (radius - norms.gather(1, last)) / slopes.gather(1, last).clamp(min=1)
    threshold = (ends.gather(1, last) - left).clamp(min=0)
    return (v.sign() * torch.minimum((size - threshold).clamp(min=0), room)).to(v.dtype)


def project_l2(v: Float[Tensor, "n d"], radius: float) -> Float[Tensor, "n d"]:
    """Return the nearest points with an L2 norm of at most `radius`.

    Parameters
    ----------
    v : ``(n, d)``, a point in each row
    radius : > 0

    Examples
    --------
    >>> project_l2(torch.tensor([[3.0, 4.0]]), 1.0)
    tensor([[0.6000, 0.8000]])
    """
    _check_radius(radius)
    wide = v.to(_wide(v.device))
    length = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
    return torch.where(length > radius, wide * (radius / length), wide).to(v.dtype)


def project_linf(v: Float[Tensor, "n d"], radius: float) -> Float[Tensor, "n d"]:
    """Return the nearest points with no coordinate beyond `radius`.

    Parameters
    ----------
    v : ``(n, d)``, a point in each row
    radius : > 0

    Examples
    --------
    >>> project_linf(torch.tensor([[3.0, -0.5]]), 1.0)
    tensor([[ 1.0000, -0.5000]])
    """
    _check_radius(radius)
    return v.clamp(-radius, radius)


def _check_radius(radius: float) -> None:
    if not radius > 0:
        raise InputError(f"radius: must be > 0, got {radius}")


def _wide(device: torch.device) -> torch.dtype:
    """Precision of budgets and losses: sums over pixels must not eat the tolerance. MPS has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def perturb_images(
    outputs: Outputs,
    x: Float[Tensor, "tasks m *image"],
    labels: Int64[Tensor, "tasks m"],
    attack: Attack,
    *,
    seed: int = 0,
) -> Float[Tensor, "tasks m *image"]:
    """Perturb images so that the cross-entropy of their labels becomes large.

    FGSM takes the step that raises a linear function most: for ``linf`` and ``l1`` among all images in [0, 1] (``l1``
    spends the budget on the steepest pixels, each as far as it can go, which solves that linear program), for ``l2`` as
    long as no pixel hits 0 or 1; where one does, the step is cut off and part of the budget is lost.

    PGD steps along the sign of the gradient (``linf``), along the gradient (``l2``), or along the signs of the
    steepest 1 % of the pixels (``l1``; Tramer and Boneh, 2019), where what a pixel has no room for goes to the next
    steepest. It goes back to the nearest point of the ball, then of [0, 1], which only makes perturbations smaller; for
    ``l1``, where that would waste much of the budget, to the nearest point of both.

    Every image is the one of highest loss among its iterates, the clean one included. Where images of a batch act on
    each other, such a mixture can be weaker than an iterate was: a task then gets its iterate of highest total loss.

    Parameters
    ----------
    outputs : from images ``(tasks, m, ...)`` to logits ``(tasks, m, ways)``; differentiable, and not random
    x : ``(tasks, m, channels, height, width)`` in [0, 1]
    labels : ``(tasks, m)``, classes 0..ways-1
    attack : how
    seed : of the random starts; those of task t are drawn from ``seed + t``, whatever the other tasks

    Returns
    -------
    ``(tasks, m, ...)`` in [0, 1], each within ``attack.eps`` of its clean image

    Raises
    ------
    InputError
        When images are outside [0, 1], when shapes or labels do not fit, or when logits or their gradient are missing
        or not finite.

    Examples
    --------
    >>> x, labels = torch.full((1, 1, 1, 1, 2), 0.5), torch.zeros(1, 1, dtype=torch.int64)
    >>> perturb_images(lambda images: images.flatten(2), x, labels, Attack("fgsm", "linf", 0.25)).flatten()
    tensor([0.2500, 0.7500])
    """
    _check_images(x, labels)
    flat = x.detach().flatten(0, 1).flatten(1)
    images, rounds = x.detach(), attack.steps if attack.kind == "pgd" else 1
    with torch.no_grad():
        hardest = _Hardest(images, _losses(outputs, images, labels))
        if attack.kind == "pgd" and attack.random_start:
            images = _moved(flat, _random_perturbations(x, attack, seed)).view_as(x)
        for _ in range(rounds):
            loss, gradient = _loss_and_gradient(outputs, images, labels)
            hardest.see(images, loss)
            at = images.flatten(0, 1).flatten(1)
            gradient = gradient.reshape(at.shape).to(_wide(x.device))
            images = _moved(flat, _perturbation(flat, at, gradient, attack)).view_as(x)
        hardest.see(images, _losses(outputs, images, labels))
        mixture = _losses(outputs, hardest.images, labels).sum(1)
        return torch.where(_over(mixture >= hardest.total, x), hardest.images, hardest.batch)


class _Hardest:
    """Highest losses so far: `images` of each image for itself, `batch` and `total` of each task as a whole."""

    def __init__(self, images: Tensor, loss: Float[Tensor, "tasks m"]) -> None:
        self.images = self.batch = images
        self.loss, self.total = loss, loss.sum(1)

    def see(self, images: Tensor, loss: Float[Tensor, "tasks m"]) -> None:
        """Take what is harder."""
        total = loss.sum(1)
        self.images = torch.where(_over(loss > self.loss, images), images, self.images)
        self.batch = torch.where(_over(total > self.total, images), images, self.batch)
        self.loss, self.total = torch.maximum(loss, self.loss), torch.maximum(total, self.total)


def _over(choice: Tensor, images: Tensor) -> Tensor:
    return choice.reshape(choice.shape + (1,) * (images.ndim - choice.ndim))


def _check_images(x: Tensor, labels: Tensor) -> None:
    if x.dtype not in {torch.float32, torch.float64}:
        raise InputError(f"images: need float32 or float64 in [0, 1], got {x.dtype}; divide bytes by 255")
    if x.ndim < 3 or not x.numel():
        raise InputError(f"images: need some, in shape (tasks, m, channels, height, width), got {tuple(x.shape)}")
    if not bool(((x >= 0) & (x <= 1)).all()):
        raise InputError(
            f"images: must be in [0, 1], found {float(x.min()):g} to {float(x.max()):g}; move any scaling into"
            " `outputs`"
        )
    if labels.shape != x.shape[:2]:
        raise InputError(
            f"labels: need one for each image, shape {tuple(x.shape[:2])}, got shape {tuple(labels.shape)}"
        )


def _losses(outputs: Outputs, images: Tensor, labels: Tensor) -> Float[Tensor, "tasks m"]:
    """Cross-entropy of each image.

    In float32 the gradient of a loss below 1e-7 is rounded to zero, and a confident model would look robust.
    """
    logits = _logits(outputs, images, labels)
    return functional.cross_entropy(
        logits.flatten(0, 1).to(_wide(logits.device)), labels.flatten(), reduction="none"
    ).unflatten(0, labels.shape)


def _logits(outputs: Outputs, images: Tensor, labels: Tensor) -> Float[Tensor, "tasks m ways"]:
    logits = outputs(images)
    tasks, m = labels.shape
    if logits.ndim != 3 or logits.shape[:2] != labels.shape:
        raise InputError(f"outputs: must give logits of shape ({tasks}, {m}, ways), gave {tuple(logits.shape)}")
    if not bool(torch.isfinite(logits).all()):
        raise InputError("outputs: gave logits that are not finite; an attack on them would say nothing")
    low, high, ways = int(labels.min()), int(labels.max()), logits.shape[2]
    if low < 0 or high >= ways:
        raise InputError(f"labels: must be 0..{ways - 1}, as `outputs` has {ways} classes, found {low} to {high}")
    return logits


def _loss_and_gradient(outputs: Outputs, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Losses ``(tasks, m)``, and the gradient of their sum with respect to the images."""
    with torch.enable_grad():
        at = images.detach().requires_grad_()
        loss = _losses(outputs, at, labels)
        gradient = torch.autograd.grad(loss.sum(), at, allow_unused=True)[0] if loss.requires_grad else None
    # Typed as always there, but None where the graph does not reach the images.
    if gradient is None:  # pyright: ignore[reportUnnecessaryComparison]
        raise InputError(
            "outputs: its logits have no gradient with respect to the images; is it detached, or under no_grad?"
        )
    # Signs of what is not a number are 0: the attack would go on, and the model would look robust.
    if not bool(torch.isfinite(gradient).all()):
        raise InputError("outputs: its gradient with respect to the images is not finite; look for a root or log of 0")
    return loss.detach(), gradient


def _moved(clean: Tensor, perturbation: Tensor) -> Tensor:
    """Add perturbations and cut off at 0 and 1; no pixel ends further from the clean one than its perturbation says."""
    d = perturbation.to(clean.dtype)
    rounded = clean + d
    # Knuth's two-sum: `clean + d` is `rounded + error` exactly. Rounding adds up over pixels, so it must go inwards.
    back = rounded - clean
    error = (clean - (rounded - back)) + (d - back)
    return torch.where(error * d.sign() < 0, torch.nextafter(rounded, clean), rounded).clamp(0, 1)


def _random_perturbations(x: Tensor, attack: Attack, seed: int) -> Float[Tensor, "n d"]:
    """Draw uniformly from the ball of every image, on the CPU, so that all devices start from the same."""
    tasks, m = x.shape[:2]
    d = x[0, 0].numel()
    drawn: list[Tensor] = []
    for task in range(tasks):
        generator = torch.Generator().manual_seed(seed + task)
        if attack.norm == "linf":
            made = 2 * torch.rand((m, d), generator=generator, dtype=torch.float64) - 1
        elif attack.norm == "l2":
            # The first d coordinates of a point on the sphere in d + 2 dimensions are uniform in the ball.
            normal = torch.randn((m, d + 2), generator=generator, dtype=torch.float64)
            made = (normal / torch.linalg.vector_norm(normal, dim=1, keepdim=True))[:, :d]
        else:
            # With random signs, the first d of d + 1 exponential variables divided by their sum are, too.
            waits = torch.empty((m, d + 1), dtype=torch.float64).exponential_(generator=generator)
            signs = 2 * torch.randint(2, (m, d), generator=generator) - 1
            made = signs * (waits / waits.sum(1, keepdim=True))[:, :d]
        drawn.append(made)
    return attack.eps * torch.cat(drawn).to(_wide(x.device)).to(x.device)


def _ascent(
    gradient: Float[Tensor, "n d"], at: Float[Tensor, "n d"], norm: Norm, budget: float, share: float = 0
) -> Float[Tensor, "n d"]:
    """Change with a norm of `budget` that raises a linear function most.

    For ``l1`` it stays in [0, 1], and is spread over at least the `share` of the pixels, where they have the room.
    """
    if norm == "linf":
        return budget * gradient.sign()
    if norm == "l2":
        length = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
        return torch.where(length > 0, budget * gradient / length, 0)
    largest = budget / max(1, round(share * at.shape[1]))
    room = torch.where(gradient > 0, 1 - at, at).to(gradient.dtype).clamp(max=largest) * gradient.sign().abs()
    steepest = gradient.abs().argsort(dim=1, descending=True, stable=True)
    ordered = room.gather(1, steepest)
    left = (budget - (ordered.cumsum(1) - ordered)).clamp(min=0)
    return gradient.sign() * torch.zeros_like(room).scatter(1, steepest, torch.minimum(ordered, left))


def _perturbation(clean: Tensor, at: Tensor, gradient: Tensor, attack: Attack) -> Float[Tensor, "n d"]:
    """Perturbations of the clean images after a step from `at`, within the ball."""
    if attack.kind == "fgsm":
        return _ascent(gradient, at, attack.norm, attack.eps)
    further = at - clean + _ascent(gradient, at, attack.norm, attack.step, SPARSITY)
    if attack.norm == "linf":
        return project_linf(further, attack.eps)
    if attack.norm == "l2":
        return project_l2(further, attack.eps)
    clean = clean.to(further.dtype)
    return project_l1_box(further, attack.eps, -clean, 1 - clean)


def _correct(outputs: Outputs, x: Tensor, labels: Tensor) -> Bool[Tensor, "tasks m"]:
    with torch.no_grad():
        return _logits(outputs, x, labels).argmax(-1) == labels


@dataclass(frozen=True, eq=False)
class RobustnessCurve:
    """Accuracy for growing perturbations.

    Parameters
    ----------
    norm : of the perturbations
    radii : ``(radii,)`` ascending, the first is 0: no attack
    accuracy : ``(radii,)``, share of all images of all tasks that no attack up to that radius changed to another class
    per_task : ``(radii, tasks)``, the same for each task

    Examples
    --------
    >>> falling = torch.tensor([1.0, 0.5, 0.0])
    >>> RobustnessCurve("l2", torch.tensor([0.0, 1.0, 2.0]), falling, falling[:, None]).auc
    0.5
    """

    norm: Norm
    radii: Float[Tensor, " radii"]
    accuracy: Float[Tensor, " radii"]
    per_task: Float[Tensor, "radii tasks"]

    @property
    def auc(self) -> float:
        """Area under the accuracy (trapezoids) divided by the largest radius: a mean accuracy, in [0, 1]."""
        return float(torch.trapezoid(self.accuracy, self.radii) / self.radii[-1])


def robustness_curve(
    outputs: Outputs,
    x: Float[Tensor, "tasks m *image"],
    labels: Int64[Tensor, "tasks m"],
    norm: Norm,
    radii: Sequence[float],
    *,
    steps: int = 40,
    seed: int = 0,
    kind: Kind = "pgd",
) -> RobustnessCurve:
    """Measure accuracy under attacks of several sizes.

    An image that was fooled at a smaller radius counts as fooled at larger ones, whose balls hold its perturbation too,
    and one that is wrong without attack counts as fooled at all of them. So accuracy never rises.

    Parameters
    ----------
    outputs : from images ``(tasks, m, ...)`` to logits ``(tasks, m, ways)``
    x : ``(tasks, m, channels, height, width)`` in [0, 1]
    labels : ``(tasks, m)``, classes 0..ways-1
    norm : of the perturbations
    radii : > 0, ascending; 0 is measured besides
    steps : of PGD
    seed : see :func:`perturb_images`; the same for all radii
    kind : ``pgd`` or ``fgsm``

    Returns
    -------
    the curve, on the CPU in float64

    Raises
    ------
    InputError
        When radii are not ascending, and as :func:`perturb_images` does.

    Examples
    --------
    >>> x, labels = torch.tensor([[[0.9, 0.1], [0.6, 0.4]]]), torch.zeros(1, 2, dtype=torch.int64)
    >>> robustness_curve(lambda images: images, x, labels, "linf", [0.2, 0.45]).accuracy.tolist()
    [1.0, 0.5, 0.0]
    """
    sizes = [0.0, *(float(radius) for radius in radii)]
    if len(sizes) < 2 or not all(a < b for a, b in itertools.pairwise(sizes)):
        raise InputError(f"radii: need some, > 0 and ascending (0 is measured besides), got {list(radii)}")
    attacks = [Attack(kind, norm, radius, steps=steps) for radius in sizes[1:]]
    _check_images(x, labels)
    correct = _correct(outputs, x, labels)
    rows = [correct]
    for attack in attacks:
        correct = correct & _correct(outputs, perturb_images(outputs, x, labels, attack, seed=seed), labels)
        rows.append(correct)
    per_task = torch.stack(rows).cpu().double().mean(2)
    return RobustnessCurve(norm, torch.tensor(sizes, dtype=torch.float64), per_task.mean(1), per_task)


def transfer(
    outputs_source: Outputs,
    outputs_target: Outputs,
    x: Float[Tensor, "tasks m *image"],
    labels: Int64[Tensor, "tasks m"],
    attack: Attack,
    *,
    seed: int = 0,
) -> Float[Tensor, " tasks"]:
    """Measure one model's accuracy on images that were perturbed to fool another.

    A target that does worse here than under an attack of the same size on itself hides its gradients: its robustness is
    apparent (Athalye, Carlini and Wagner, 2018).

    Parameters
    ----------
    outputs_source, outputs_target : from images ``(tasks, m, ...)`` to logits ``(tasks, m, ways)``; the target needs
        no gradient
    x : ``(tasks, m, channels, height, width)`` in [0, 1]
    labels : ``(tasks, m)``, classes 0..ways-1
    attack : on the source
    seed : see :func:`perturb_images`

    Returns
    -------
    ``(tasks,)`` accuracy of the target, on the CPU in float64

    Examples
    --------
    >>> x, labels = torch.tensor([[[0.6, 0.4]]]), torch.zeros(1, 1, dtype=torch.int64)
    >>> transfer(lambda images: images, lambda images: images.round(), x, labels, Attack("fgsm", "linf", 0.2)).tolist()
    [0.0]
    """
    fooling = perturb_images(outputs_source, x, labels, attack, seed=seed)
    return _correct(outputs_target, fooling, labels).cpu().double().mean(1)
