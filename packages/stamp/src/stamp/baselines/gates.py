"""Gates trained on the new data itself, one a channel, that nothing generates (spec 2.4 "free", 2.6 "beta", 3)."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.optim.lr_scheduler import MultiStepLR

from stamp.axes import BATCH
from stamp.baselines.channels import Scores
from stamp.counting import CostModel
from stamp.drawing import endless_batches
from stamp.examples import Examples
from stamp.observing import evaluating
from stamp.sampling import concrete, kumaraswamy_kl, kumaraswamy_mean, kumaraswamy_sample
from stamp.structure import ChannelGroups, Group
from stamp.surgery import gated_parameters

__all__ = ["bbdropout", "free_gates"]


def free_gates(
    model: nn.Module,
    groups: ChannelGroups,
    data: Examples,
    generator: torch.Generator,
    *,
    keep: float = 0.25,
    steps: int = 300,
    batch_size: int = 64,
    lr: float = 0.05,
    temperatures: tuple[float, float] = (0.67, 0.1),
    ascent: float = 2.5,
) -> Scores:
    """Train one logit a channel against the loss, under a price on the expected multiply-adds that meets a budget.

    Parameters
    ----------
    model : from which the groups were traced, with a head for the data's classes; it stays as it is, weights frozen
    groups : its channel groups
    data : labelled
    generator : draws batches and gates
    keep : share of the multiply-adds that the gates may cost in expectation
    steps : of Adam
    batch_size : of each
    lr : of the logits
    temperatures : of the concrete relaxation at the first and the last step; geometric in between
    ascent : of the price a step, for each unit above the budget

    Returns
    -------
    Keep probabilities.
    """
    like = next(model.parameters())
    logits = {name: like.new_ones(width).requires_grad_() for name, width in groups.widths().items()}
    if not logits:
        return {}
    cost = CostModel.macs(model, groups, data.inputs(slice(0, 1)).to(like))
    dense = float(cost.expected({}))
    optimizer = torch.optim.Adam(logits.values(), lr)
    batches = endless_batches(model, data, generator, batch_size)
    price = 0.0
    first, last = temperatures
    with torch.enable_grad(), evaluating(model):
        for step in range(steps):
            temperature = first * (last / first) ** (step / max(1, steps - 1))
            keep_prob = {name: logit.sigmoid() for name, logit in logits.items()}
            gates = {name: concrete(pi, temperature, generator) for name, pi in keep_prob.items()}
            x, y = next(batches)
            loss = functional.cross_entropy(functional_call(model, gated_parameters(model, groups, gates), x), y)
            excess = cost.expected(keep_prob) / dense - keep
            slopes = torch.autograd.grad(loss + price * excess.to(loss), list(logits.values()))
            for logit, slope in zip(logits.values(), slopes, strict=True):
                logit.grad = slope
            optimizer.step()
            price = max(0.0, price + ascent * float(excess.detach()))
    return {name: logit.detach().sigmoid().cpu() for name, logit in logits.items()}


def bbdropout(
    model: nn.Module,
    groups: ChannelGroups,
    data: Examples,
    generator: torch.Generator,
    *,
    steps: int = 500,
    batch_size: int = 100,
    lr: float = 1e-3,
    gate_lr: float = 1e-2,
    alpha: float = 1e-4,
    temperature: float = 0.1,
    weight_decay: float = 1e-4,
) -> Scores:
    """Train a copy of the network with a Kumaraswamy posterior over each channel's keep probability.

    Parameters
    ----------
    model : from which the groups were traced, with a head for the data's classes; it stays as it is
    groups : its channel groups
    data : labelled
    generator : draws batches, probabilities and gates
    steps : of Adam; rates fall to a tenth after half of them and again after four fifths. The authors took 200 epochs
    batch_size : of each step
    lr, gate_lr : of the weights and of the posteriors
    alpha : of the Beta(alpha, 1) prior; near 0, channels must earn their keep
    temperature : of the concrete relaxation
    weight_decay : of the weights

    Returns
    -------
    Mean keep probabilities of the posteriors.

    References
    ----------
    Lee et al., "Adaptive Network Sparsification with Dependent Variational Beta-Bernoulli Dropout", 2018, section 4.1.
    """
    net = copy.deepcopy(model).eval().requires_grad_()
    for module in net.modules():
        # Gates are the only noise: other dropout stays off.
        if isinstance(module, BATCH):
            module.train()
    like = next(net.parameters())
    raw_a = {g.name: like.new_full((g.width,), _first_a(net, g)).requires_grad_() for g in groups.prunable}
    raw_b = {g.name: like.new_full((g.width,), 0.5413).requires_grad_() for g in groups.prunable}
    if not raw_a:
        return {}
    optimizer = torch.optim.Adam(
        [
            {"params": list(net.parameters()), "lr": lr, "weight_decay": weight_decay},
            {"params": [*raw_a.values(), *raw_b.values()], "lr": gate_lr},
        ]
    )
    schedule = MultiStepLR(optimizer, [steps // 2, steps * 4 // 5], 0.1)
    batches = endless_batches(net, data, generator, batch_size)
    with torch.enable_grad():
        for _ in range(steps):
            posterior = {name: (_a(raw_a[name]), _b(raw_b[name])) for name in raw_a}
            gates = {
                name: concrete(kumaraswamy_sample(a, b, generator), temperature, generator)
                for name, (a, b) in posterior.items()
            }
            x, y = next(batches)
            loss = functional.cross_entropy(functional_call(net, gated_parameters(net, groups, gates), x), y)
            divergence = torch.stack([kumaraswamy_kl(a, b, alpha) for a, b in posterior.values()]).sum()
            optimizer.zero_grad()
            (loss + divergence / len(data)).backward()
            optimizer.step()
            schedule.step()
    return {name: kumaraswamy_mean(_a(raw_a[name]), _b(raw_b[name])).detach().cpu() for name in raw_a}


def _first_a(model: nn.Module, group: Group) -> float:
    """Return where the authors' code starts the first parameter: higher for convolutions."""
    return -1.0 if isinstance(model.get_submodule(group.producers[0].module), nn.Linear) else 2.0


def _a(raw: Tensor) -> Tensor:
    return functional.softplus(raw.clamp_min(-10))


def _b(raw: Tensor) -> Tensor:
    return functional.softplus(raw.clamp(-10, 50))
