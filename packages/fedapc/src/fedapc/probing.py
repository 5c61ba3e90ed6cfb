"""Whose part is worth listening to: tried on the client's own examples before the task begins. Ours, not the paper's.

Attention begins at zero in the paper's setting and moves by a step of Adam at a time: in the few steps of a short task
it cannot tell a part that solves the task from one that does not (spec 8). A client can tell at once, without another
message: it adds each part to its weights, looks at the features that enter the head, and asks how well a linear
classifier on them predicts the examples that it has not seen, by leave-one-out ridge regression, which has a closed
form. Attention begins at 1 for the part with the lowest error if that is below three quarters of the error without
parts, and at 0 for all others.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor
from torch.nn import functional

from fedapc.decomposition import DecomposedModel
from fedapc.seeds import generator

__all__ = ["leave_one_out_error", "probe"]

_RIDGE = 0.1
_MUST_FALL_TO = 0.75


def leave_one_out_error(
    features: Float[Tensor, "examples features"], y: Int64[Tensor, " examples"], classes: int, ridge: float = _RIDGE
) -> float:
    """Return the mean squared error of ridge regression on one-hot classes, each example predicted by all others.

    With X the centred features, scaled to a mean square of 1 over all of an example's, and a column of ones, the error
    of example i left out is ``(Y - X W)_i / (1 - h_i)``: W are the weights that ridge regression finds, and h the
    diagonal of ``X (X'X + ridge I)^-1 X'``. With more features than examples the same comes from the kernel XX'.

    Parameters
    ----------
    features : ``(examples, features)``
    y : classes 0..classes-1, ``(examples,)``
    classes : of the task
    ridge : relative to the mean square of the features

    Examples
    --------
    >>> y = torch.arange(20) % 2
    >>> told, noise = torch.eye(2)[y], torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    >>> leave_one_out_error(told, y, 2) < 0.1 < 0.5 * leave_one_out_error(noise, y, 2)
    True
    """
    centred = features.double() - features.double().mean(0)
    scale = centred.square().sum(1).mean().clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    inputs = torch.cat([centred / scale, centred.new_ones(len(centred), 1)], 1)
    wanted = functional.one_hot(y, classes).double() - 1 / classes
    # The smaller of the two matrices.
    if inputs.shape[1] < len(inputs):
        gram = inputs.T @ inputs
        gram.diagonal().add_(ridge)
        solved = torch.cholesky_solve(inputs.T, torch.linalg.cholesky(gram))
        left = wanted - inputs @ (solved @ wanted)
        left_out = left / (1 - (inputs * solved.T).sum(1, keepdim=True))
    else:
        kernel = inputs @ inputs.T
        kernel.diagonal().add_(ridge)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(kernel))
        left_out = inverse @ wanted / inverse.diagonal()[:, None]
    return float(left_out.square().sum(1).mean())


@torch.no_grad()
def probe(
    model: DecomposedModel,
    x: Shaped[Tensor, "examples ..."],
    y: Int64[Tensor, " examples"],
    *,
    most: int = 500,
    seed: int = 0,
) -> Float[Tensor, " slots"]:
    """Return where the attention of the task that has just begun should begin, ``(slots,)``.

    Parameters
    ----------
    model : whose running task has received parts; its attention is as it was afterwards
    x, y : examples of the task, ``(examples, ...)`` and ``(examples,)``
    most : examples to look at, drawn by `seed`
    seed : of the draw
    """
    assert model.running is not None
    task, running = model.running
    slots = len(running.slots)
    random = generator(seed, "probe", task)
    chosen = torch.randperm(len(y), generator=random)[:most].sort().values
    x, y = x[chosen.to(x.device)], y[chosen.to(y.device)]
    before = {name: weights.detach().clone() for name, weights in running.attention.items()}

    def error(slot: int | None) -> float:
        for weights in running.attention.values():
            weights.zero_()
            if slot is not None:
                weights[slot] = 1.0
        return leave_one_out_error(model.features(x, task), y, running.classes)

    alone = error(None)
    errors = [error(slot) for slot in range(slots)]
    for name, weights in running.attention.items():
        weights.copy_(before[name])
    found = torch.zeros(slots)
    best = min(range(slots), key=errors.__getitem__)
    if errors[best] < _MUST_FALL_TO * alone:
        found[best] = 1.0
    return found
