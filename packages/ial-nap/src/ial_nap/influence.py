"""How much worse the validation loss would be without a training instance, by influence functions (spec 2.5).

Koh and Liang, "Understanding Black-box Predictions via Influence Functions", ICML 2017: with g the gradient of the
validation loss and H the Hessian of the training objective, ``(H + damping I)^-1 g . grad L_i / N`` is the increase of
the validation loss if instance i is removed. Above 0 the instance helps; harmful ones come first in ascending order.

For the output layer, in which the logits are linear, the Hessian is small and exact, and one direct solve serves all
instances. For more parameters, products with the Hessian (or with the Gauss-Newton matrix, which is never indefinite)
and conjugate gradients do.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.sparse.linalg
import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from ial_nap.nap import FeatureNAP
from ial_nap.series import Kind, Series
from ial_nap.training import losses
from shared_core.errors import InputError

__all__ = [
    "HeadInfluence",
    "Influence",
    "ModelInfluence",
    "Solved",
    "conjugate_gradients",
    "gauss_newton_product",
    "hessian_product",
    "influence_on",
    "logit_curvature",
    "logit_slopes",
    "sample_gradients",
    "smallest_eigenvalue",
]

_DOUBLE_UP_TO = 50_000


def logit_slopes(logits: Float[Tensor, "n c"], y: Shaped[Tensor, "n ..."], kind: Kind) -> Float[Tensor, "n c"]:
    """Gradient of each instance's loss in its logits.

    Parameters
    ----------
    logits, y, kind : as of :func:`ial_nap.training.losses`

    Examples
    --------
    >>> logit_slopes(torch.zeros(1, 1), torch.ones(1), "binary").item()
    -0.5
    """
    if kind == "multiclass":
        return logits.softmax(1) - torch.nn.functional.one_hot(y, logits.shape[1]).to(logits)
    target = y.view(len(y), -1).to(logits)
    if kind == "regression":
        return 2 * (logits - target) / logits.shape[1]
    return (logits.sigmoid() - target) / logits.shape[1]


def logit_curvature(logits: Float[Tensor, "n c"], kind: Kind) -> Float[Tensor, "n c c"]:
    """Hessian of each instance's loss in its logits; none depends on the label.

    Parameters
    ----------
    logits, kind : as of :func:`ial_nap.training.losses`
    """
    if kind == "multiclass":
        p = logits.softmax(1)
        return torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    if kind == "regression":
        return torch.diag_embed(torch.full_like(logits, 2 / logits.shape[1]))
    p = logits.sigmoid()
    return torch.diag_embed(p * (1 - p) / logits.shape[1])


# ---- the output layer


@dataclass(frozen=True, eq=False)
class HeadInfluence:
    """Influence through the parameters in which the logits are linear, exactly solved.

    Parameters
    ----------
    solution : ``(H + damping I)^-1 g``, ``(f, c)`` with f = r + 1 features, the bias last
    hessian : H, ``(p, p)`` with p = f c
    count : training instances N
    kind : of the task
    """

    solution: Float[Tensor, "f c"]
    hessian: Float[Tensor, "p p"]
    count: int
    kind: Kind

    @classmethod
    def of(
        cls,
        train: tuple[Float[Tensor, "n r"], Float[Tensor, "n c"], Shaped[Tensor, "n ..."]],
        validation: tuple[Float[Tensor, "m r"], Float[Tensor, "m c"], Shaped[Tensor, "m ..."]],
        kind: Kind,
        *,
        l2: float = 0.004,
        damping: float = 1e-2,
    ) -> HeadInfluence:
        """Solve once for all instances, in double precision.

        Parameters
        ----------
        train, validation : what the logits are linear in, logits, and labels
        kind : of the task
        l2 : weight of half the squared weights in the training objective; the bias is free
        damping : added to the diagonal of the Hessian

        Raises
        ------
        InputError
            For a Hessian that cannot be inverted.
        """
        phi, logits, _ = train
        shown, curvature = _with_one(phi), logit_curvature(logits.double(), kind)
        f, c = shown.shape[1], logits.shape[1]
        hessian = torch.einsum("nf,ncd,ng->fcgd", shown, curvature, shown).reshape(f * c, f * c) / len(shown)
        penalised = torch.ones(f, c, dtype=torch.float64)
        penalised[-1] = 0
        hessian = hessian + l2 * torch.diag(penalised.flatten())
        other, other_logits, other_y = validation
        slope = _with_one(other).T @ logit_slopes(other_logits.double(), other_y, kind) / len(other)
        damped = hessian + damping * torch.eye(f * c, dtype=torch.float64)
        solution, info = torch.linalg.solve_ex(damped, slope.flatten())
        if int(info):
            raise InputError(f"the Hessian of the output layer is singular with damping {damping}: give a larger one")
        return cls(solution.view(f, c), hessian, len(shown), kind)

    def scores(
        self, phi: Float[Tensor, "n r"], logits: Float[Tensor, "n c"], y: Shaped[Tensor, "n ..."]
    ) -> Float[Tensor, " n"]:
        """Return the predicted increase of the validation loss if an instance is removed.

        Parameters
        ----------
        phi : what the logits are linear in
        logits, y : and labels
        """
        slopes = logit_slopes(logits.double(), y, self.kind)
        return torch.einsum("nf,fc,nc->n", _with_one(phi), self.solution, slopes) / self.count


def _with_one(phi: Tensor) -> Tensor:
    return torch.cat([phi.double(), torch.ones(len(phi), 1, dtype=torch.float64)], 1)


# ---- any parameters


@dataclass(frozen=True, eq=False)
class Solved:
    """What conjugate gradients found.

    Parameters
    ----------
    x : the last iterate
    iterations : done
    residual : norm of what is left, relative to the right-hand side
    curvature : the least ``p^T A p / p^T p`` met; at or below 0 the matrix is not positive definite, `x` no solution
    """

    x: Float[Tensor, " p"]
    iterations: int
    residual: float
    curvature: float


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], b: Float[Tensor, " p"], *, iterations: int = 100, tolerance: float = 1e-8
) -> Solved:
    """Solve ``A x = b`` for a positive definite A given by products, and stop where A turns out not to be.

    Parameters
    ----------
    product : maps v to A v
    b : right-hand side
    iterations : at most
    tolerance : of the residual, relative to `b`

    Examples
    --------
    >>> conjugate_gradients(lambda v: 4 * v, torch.tensor([2.0, 8.0])).x.tolist()
    [0.5, 2.0]
    """
    x, residual = torch.zeros_like(b), b.clone()
    direction, size = residual.clone(), float(residual @ residual)
    first, least, done = size, float("inf"), 0
    while done < iterations and size > tolerance**2 * first and size > 0:
        image = product(direction)
        bend = float(direction @ image)
        least = min(least, bend / float(direction @ direction))
        if bend <= 0:
            break
        step = size / bend
        x = x + step * direction
        residual = residual - step * image
        smaller = float(residual @ residual)
        direction = residual + smaller / size * direction
        size, done = smaller, done + 1
    return Solved(x, done, (size / first) ** 0.5 if first else 0.0, least)


def smallest_eigenvalue(product: Callable[[Tensor], Tensor], size: int, *, seed: int = 0) -> float:
    """Estimate the smallest eigenvalue of a symmetric matrix given by products (Lanczos).

    Parameters
    ----------
    product : maps v to A v, in double precision
    size : of v
    seed : of the first vector
    """

    def apply(v: np.ndarray) -> np.ndarray:
        return product(torch.from_numpy(np.ascontiguousarray(v, dtype=np.float64).reshape(-1))).numpy()

    if size < 3:
        matrix = np.stack([apply(row) for row in np.eye(size)])
        return float(np.linalg.eigvalsh(matrix)[0])
    operator = scipy.sparse.linalg.LinearOperator((size, size), matvec=apply, dtype=np.float64)  # pyright: ignore[reportCallIssue]
    start = np.random.default_rng(seed).normal(size=size)
    found = scipy.sparse.linalg.eigsh(operator, k=1, which="SA", v0=start, tol=1e-3, return_eigenvectors=False)
    return float(found[0])


def sample_gradients(values: Float[Tensor, " n"], parameters: Sequence[Tensor]) -> Float[Tensor, "n p"]:
    """Return the gradient of each value, flat; one backward pass for each.

    Parameters
    ----------
    values : losses of instances
    parameters : in which
    """
    rows = [torch.autograd.grad(v, parameters, retain_graph=True, materialize_grads=True) for v in values]
    return torch.stack([_flat(row) for row in rows])


def hessian_product(loss: Callable[[], Tensor], parameters: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """Return the map from v to H v, for the Hessian of a loss; its graph is built once.

    Parameters
    ----------
    loss : of the parameters
    parameters : in which
    """
    slope = _flat(torch.autograd.grad(loss(), parameters, create_graph=True, materialize_grads=True))

    def product(v: Tensor) -> Tensor:
        found = torch.autograd.grad(slope, parameters, v, retain_graph=True, materialize_grads=True)
        return _flat(found).detach()

    return product


def gauss_newton_product(
    logits: Callable[[], Tensor], parameters: Sequence[Tensor], kind: Kind
) -> Callable[[Tensor], Tensor]:
    """Return the map from v to ``J^T Q J v / N``: the Hessian without the curvature of the network itself.

    Parameters
    ----------
    logits : of the parameters, ``(n, c)``
    parameters : in which
    kind : of the task
    """
    found = logits()
    curvature = logit_curvature(found.detach(), kind) / len(found)
    # J^T u is linear in u, and the gradient of it in u is J.
    u = torch.zeros_like(found, requires_grad=True)
    back = _flat(torch.autograd.grad(found, parameters, u, create_graph=True, materialize_grads=True))

    def product(v: Tensor) -> Tensor:
        (forward,) = torch.autograd.grad(back, u, v, retain_graph=True)
        weighed = torch.einsum("ncd,nd->nc", curvature, forward)
        return _flat(
            torch.autograd.grad(found, parameters, weighed, retain_graph=True, materialize_grads=True)
        ).detach()

    return product


def _flat(parts: Iterable[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


class ModelInfluence:
    """Influence through any parameters of a model.

    Parameters
    ----------
    logits : of some series, ``(n, c)``, as a function of the parameters
    parameters : in which
    train, validation : series with labels
    l2 : weight of half the squared weights (not of vectors and numbers) in the training objective
    damping : added to the diagonal
    curvature : "ggn", right for models that have not converged, or "hessian"
    iterations, tolerance : of conjugate gradients

    Raises
    ------
    InputError
        For another curvature.

    Warns
    -----
    RuntimeWarning
        Where the Hessian is not positive definite: it is solved again with the damping that the message names.
    """

    def __init__(
        self,
        logits: Callable[[Series], Tensor],
        parameters: Sequence[nn.Parameter],
        train: Series,
        validation: Series,
        *,
        l2: float = 0.004,
        damping: float = 1e-2,
        curvature: Literal["ggn", "hessian"] = "ggn",
        iterations: int = 100,
        tolerance: float = 1e-8,
    ) -> None:
        if curvature not in {"ggn", "hessian"}:
            raise InputError(f"curvature must be ggn or hessian, got '{curvature}'")
        self.logits, self.parameters, self.count = logits, list(parameters), len(train)
        loss = losses(logits(validation), validation.targets, validation.kind).mean()
        slope = _flat(torch.autograd.grad(loss, self.parameters, materialize_grads=True)).detach()
        penalised = _flat([torch.full_like(p, float(p.ndim > 1)) for p in self.parameters]).detach()
        if curvature == "ggn":
            bare = gauss_newton_product(lambda: logits(train), self.parameters, train.kind)
        else:
            bare = hessian_product(lambda: losses(logits(train), train.targets, train.kind).mean(), self.parameters)

        def product(v: Tensor) -> Tensor:
            return bare(v) + l2 * penalised * v

        self.product, self.damping = product, damping
        solved = self._solve(slope, iterations, tolerance)
        if solved.curvature <= 0:
            lowest = smallest_eigenvalue(lambda v: product(v.to(slope)).double(), len(slope))
            self.damping = max(damping, damping - lowest, damping - solved.curvature)
            warnings.warn(
                f"the Hessian has the eigenvalue {lowest:.3g}: the model is at no minimum; damping raised from"
                f" {damping:g} to {self.damping:.3g} (or use curvature='ggn')",
                RuntimeWarning,
                stacklevel=2,
            )
            solved = self._solve(slope, iterations, tolerance)
        self.solved = solved

    def _solve(self, slope: Tensor, iterations: int, tolerance: float) -> Solved:
        return conjugate_gradients(
            lambda v: self.product(v) + self.damping * v, slope, iterations=iterations, tolerance=tolerance
        )

    def scores(self, series: Series) -> Float[Tensor, " n"]:
        """Return the predicted increase of the validation loss if an instance is removed, for all in two passes.

        Parameters
        ----------
        series : instances with labels
        """
        values = losses(self.logits(series), series.targets, series.kind)
        # The gradient of sum_i c_i L_i is linear in c: its product with s, differentiated in c, is s . grad L_i.
        weights = torch.ones_like(values, requires_grad=True)
        total = (weights * values).sum()
        slope = _flat(torch.autograd.grad(total, self.parameters, create_graph=True, materialize_grads=True))
        (found,) = torch.autograd.grad(slope @ self.solved.x, weights)
        return found.detach() / self.count


# ---- of the attention model


@dataclass(frozen=True, eq=False)
class Influence:
    """Influence on a model's validation loss, for instances old and altered.

    Parameters
    ----------
    of : maps series with labels to their scores, ``(n,)``
    damping : that was used
    """

    of: Callable[[Series], Float[Tensor, " n"]]
    damping: float


def influence_on(
    model: FeatureNAP,
    train: Series,
    validation: Series,
    *,
    scope: Literal["head", "attention"] = "head",
    worst: int = 400,
    l2: float = 0.004,
    damping: float = 1e-2,
    curvature: Literal["ggn", "hessian"] = "ggn",
) -> Influence:
    """Prepare influence scores under the present context, at the mean of the latent and without dropout.

    Parameters
    ----------
    model : trained
    train : what it was trained on
    validation : whose `worst` predicted instances' loss counts
    scope : "head", the output layer, solved exactly; "attention", that and the layers that make attention and gate
    worst : validation instances P
    l2 : as in training
    damping : added to the diagonal
    curvature : for the scope "attention"

    Raises
    ------
    InputError
        For another scope, or fewer than 1 validation instance.
    """
    if worst < 1:
        raise InputError(f"worst must be 1 or more, got {worst}")
    if scope not in {"head", "attention"}:
        raise InputError(f"scope must be head or attention, got '{scope}'")
    with torch.no_grad():
        value = losses(model(validation.x, validation.lengths).logits, validation.targets, validation.kind)
    hard_ones = validation.part(value.argsort(descending=True, stable=True)[:worst].sort().values)
    if scope == "head":

        @torch.no_grad()
        def seen(series: Series) -> tuple[Tensor, Tensor, Tensor]:
            phi = model.additive(series.x, series.lengths)
            # The solve is small and in double precision: it is the CPU's.
            return phi.cpu(), model.output(phi).cpu(), series.targets.cpu()

        head = HeadInfluence.of(seen(train), seen(hard_ones), model.kind, l2=l2, damping=damping)
        return Influence(lambda series: head.scores(*seen(series)), damping)
    twin = copy.deepcopy(model)
    names = ("output.", "to_alpha.", "to_beta.", "to_gate.", "gate_", "encoder.to_mean.")
    chosen = [p for name, p in twin.named_parameters() if name.startswith(names)]
    dtype = torch.float64 if sum(p.numel() for p in chosen) < _DOUBLE_UP_TO else torch.float32
    twin.to(dtype)

    def logits(series: Series) -> Tensor:
        # The recurrent kernels of cuDNN have no second derivative.
        with torch.backends.cudnn.flags(enabled=False):
            return twin(series.x, series.lengths).logits

    whole = ModelInfluence(
        logits,
        chosen,
        train.to(dtype),
        hard_ones.to(dtype),
        l2=l2,
        damping=damping,
        curvature=curvature,
    )
    return Influence(lambda series: whole.scores(series.to(dtype)), whole.damping)
