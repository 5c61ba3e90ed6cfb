"""Which weights a task depends on: the diagonal of its empirical Fisher information."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor
from torch.nn import functional

__all__ = ["diagonal_fisher"]

# Numbers in the gradients of the examples that are taken at once.
_AT_ONCE = 2**25


@torch.no_grad()
def diagonal_fisher(
    run: Callable[[Mapping[str, Tensor], Tensor], Tensor],
    weights: Mapping[str, Float[Tensor, "..."]],
    x: Shaped[Tensor, "examples ..."],
    y: Int64[Tensor, " examples"],
) -> dict[str, Tensor]:
    """Return the mean over examples of the squared gradient of each one's log-likelihood (spec 3).

    This is the empirical Fisher information: of the labels there are, not of labels drawn from the model; and a mean
    of squares of single examples, not a square of the gradient of a batch.

    Parameters
    ----------
    run : logits ``(batch, classes)`` of weights by name, and inputs ``(batch, ...)``
    weights : to differentiate by, by name
    x : inputs, ``(examples, ...)``
    y : classes, ``(examples,)``

    Returns
    -------
    In the shapes of the weights.

    Examples
    --------
    >>> weights = {"w": torch.zeros(2, 1)}
    >>> diagonal_fisher(lambda w, x: x @ w["w"].T, weights, torch.tensor([[1.0], [3.0]]), torch.tensor([0, 1]))
    {'w': tensor([[1.2500],
            [1.2500]])}
    """

    def log_likelihood(at: Mapping[str, Tensor], one: Tensor, label: Tensor) -> Tensor:
        return -functional.cross_entropy(run(at, one[None]), label[None])

    of_one = torch.func.grad(log_likelihood)
    of_each = torch.func.vmap(of_one, in_dims=(None, 0, 0))
    given = {name: value.detach() for name, value in weights.items()}
    total = {name: torch.zeros_like(value) for name, value in given.items()}
    size = max(1, _AT_ONCE // max(1, sum(value.numel() for value in given.values())))
    for xs, ys in zip(x.split(size), y.split(size), strict=True):
        try:
            gradients = of_each(given, xs, ys)
        except RuntimeError:
            # Networks whose course depends on values cannot be vectorised over examples.
            each = [of_one(given, one, label) for one, label in zip(xs, ys, strict=True)]
            gradients = {name: torch.stack([found[name] for found in each]) for name in given}
        for name, found in gradients.items():
            total[name] += found.square().sum(0)
    return {name: value / len(y) for name, value in total.items()}
