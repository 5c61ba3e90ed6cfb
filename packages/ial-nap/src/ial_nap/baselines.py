"""What the loop is compared with: other ways to make a model heed verdicts, all of which train (spec 3).

Attention supervision after Choi et al., "AILA", CHI 2019; "right for the right reasons" after Ross et al., IJCAI 2017
(arXiv:1703.03717); masked attention after the release's comparison with uncertainty-aware attention; and what any
practitioner does, leaving features out and training anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int8
from torch import Tensor, nn

from ial_nap.attention import Retain, weighed
from ial_nap.context import Context
from ial_nap.nap import FeatureNAP
from ial_nap.series import Series
from ial_nap.training import losses, weight_penalty
from shared_core.errors import InputError

__all__ = [
    "Annotated",
    "MaskedPlain",
    "attention_supervision",
    "heed",
    "majority_off",
    "masked_logits",
    "right_reasons",
]


@dataclass(frozen=True, eq=False)
class Annotated:
    """Instances somebody looked at, each with its mask.

    Parameters
    ----------
    series : with labels
    masks : verdicts, ``(n, t, r)``
    """

    series: Series
    masks: Int8[Tensor, "n t r"]

    @classmethod
    def of(cls, series: Series, context: Context) -> Annotated:
        """Pick the instances of a context's masks; one mask for each instance and annotator.

        Parameters
        ----------
        series : among which they are, by id
        context : verdicts

        Raises
        ------
        InputError
            For an empty context.
        """
        if not len(context):
            raise InputError("nothing is annotated yet: there is nothing to heed")
        place = {name: k for k, name in enumerate(series.ids)}
        return cls(series.part([place[instance] for instance, _ in context.keys]), context.masks)


def attention_supervision(beta: Float[Tensor, "n t r"], masks: Int8[Tensor, "n t r"]) -> Float[Tensor, ""]:
    """Mean over judged cells of ``b^2`` at verdicts 0 and ``(1 - b)^2`` at 1, where b is ``|beta| / max |beta|``.

    Parameters
    ----------
    beta : weights of cells
    masks : verdicts; -1 counts nowhere

    Examples
    --------
    >>> beta, masks = torch.tensor([[[0.5, -1.0]]]), torch.tensor([[[0, 1]]], dtype=torch.int8)
    >>> attention_supervision(beta, masks).item()
    0.125
    """
    size = beta.abs()
    size = size / size.amax((1, 2), keepdim=True).clamp(min=1e-8)
    wrong = torch.where(masks == 0, size, 1 - size).square() * (masks >= 0)
    return wrong.sum() / (masks >= 0).sum().clamp(min=1)


def right_reasons(
    predict: Callable[[Tensor], Tensor], x: Float[Tensor, "n t r"], masks: Int8[Tensor, "n t r"]
) -> Float[Tensor, ""]:
    """Mean over instances of the squared slope of the log-likelihood, summed over cells marked 0.

    Parameters
    ----------
    predict : maps x to the log-likelihood of each instance, or to its sum over classes as in the paper
    x : standardised values
    masks : verdicts
    """
    leaf = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(predict(leaf).sum(), leaf, create_graph=True)
    return (slope.square() * (masks == 0)).sum() / len(x)


def masked_logits(model: Retain, series: Series, masks: Int8[Tensor, "n t r"], generator: torch.Generator) -> Tensor:
    """Predict with the weights of cells marked 0 multiplied by 0.

    Parameters
    ----------
    model : whose embedding is as wide as there are features, as in the release
    series : annotated
    masks : verdicts
    generator : of draws

    Raises
    ------
    InputError
        For an embedding of another width: a mask of features would mean nothing in it.
    """
    embedded = model.embedding(series.x)
    if embedded.shape != series.x.shape:
        raise InputError(
            f"the embedding has {embedded.shape[2]} entries for {series.x.shape[2]} features: use embed=None"
        )
    alpha, beta = model.attention(embedded, series.lengths, generator)
    return model.output(weighed(alpha, beta * (masks != 0).to(beta), embedded))


class MaskedPlain:
    """Loss of RETAIN trained once on annotated series: weights of cells marked 0 are multiplied by 0 (spec 3).

    Parameters
    ----------
    model : whose embedding is as wide as there are features
    seen : what was annotated; of an instance with several masks, a cell is left out where any marks it 0
    l2 : of :func:`ial_nap.training.weight_penalty`
    """

    def __init__(self, model: Retain, seen: Annotated, *, l2: float = 0.004) -> None:
        self.model, self.l2 = model, l2
        self.off: dict[str, Tensor] = {}
        for name, mask in zip(seen.series.ids, seen.masks, strict=True):
            self.off[name] = (mask == 0) | self.off.get(name, torch.zeros(()).bool())

    def __call__(self, batch: Series, generator: torch.Generator | None, done: float) -> Tensor:  # noqa: ARG002
        """Return the loss of a batch; at evaluation, that of the model as it is used, without masks and penalty."""
        if generator is None:
            return losses(self.model(batch.x, batch.lengths).logits, batch.targets, batch.kind).mean()
        masks = torch.ones(batch.x.shape, dtype=torch.int8, device=batch.x.device)
        for row, name in enumerate(batch.ids):
            if name in self.off:
                masks[row, self.off[name]] = 0
        logits = masked_logits(self.model, batch, masks, generator)
        return losses(logits, batch.targets, batch.kind).mean() + self.l2 * weight_penalty(self.model)


def majority_off(context: Context) -> Bool[Tensor, " r"]:
    """Return the features that got more verdicts 0 than 1.

    Parameters
    ----------
    context : verdicts

    Examples
    --------
    >>> majority_off(Context.of(torch.tensor([[[1, 0, -1]]]))).tolist()
    [False, True, False]
    """
    return context.zero.sum(0) > context.one.sum(0)


def heed(
    model: nn.Module,
    penalty: Callable[[torch.Generator], Tensor],
    train: Series | None,
    logits: Callable[[Series, torch.Generator], Tensor],
    *,
    steps: int = 50,
    lr: float = 1e-3,
    batch_size: int = 200,
    l2: float = 0.004,
    seed: int = 0,
) -> list[float]:
    """Fine-tune on a penalty on what was annotated, and on the task.

    Parameters
    ----------
    model : to change
    penalty : on what was annotated, its weight included
    train : to draw a batch of the task from at each step; None for the penalty alone
    logits : of a batch
    steps, lr, batch_size, l2 : of Adam, of batches, and of the weights' penalty
    seed : of batches and of what is drawn in a pass

    Returns
    -------
    The loss of each step.

    Raises
    ------
    InputError
        For fewer than 1 step.
    """
    if steps < 1:
        raise InputError(f"steps must be 1 or more, got {steps}")
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    generator = torch.Generator().manual_seed(seed)
    found: list[float] = []
    for _ in range(steps):
        loss = penalty(generator) + l2 * weight_penalty(model)
        if train is not None:
            part = train.part(torch.randperm(len(train), generator=generator)[:batch_size])
            loss = loss + losses(logits(part, generator), part.targets, part.kind).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    if isinstance(model, FeatureNAP):
        model.refresh()
    return found
