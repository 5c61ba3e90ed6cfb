"""Adaptation and meta-gradients against closed forms, finite differences, loops, and separate passes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from meta_dropout.backbones import conv4, initialise, mlp
from meta_dropout.engine import (
    AdaptationError,
    Mix,
    Plan,
    Tasks,
    adapt,
    cross_entropy,
    draw_noise,
    meta_gradients,
    query,
)
from meta_dropout.passes import Pass
from meta_dropout.perturb import Perturbed
from shared_core.errors import InputError

PLAN = Plan(steps=2, lr=0.2)


def images(tasks=3, ways=4, shots=1, queries=2, size=16, dtype=torch.float64, seed=0) -> Tasks:
    random = torch.Generator().manual_seed(seed)
    x = torch.rand(tasks, ways * shots, 1, size, size, generator=random, dtype=dtype)
    q = torch.rand(tasks, ways * queries, 1, size, size, generator=random, dtype=dtype)
    y, yq = torch.arange(ways).repeat_interleave(shots), torch.arange(ways).repeat_interleave(queries)
    return Tasks(x, y.expand(tasks, -1), q, yq.expand(tasks, -1))


def small(noise="multiplicative", dtype=torch.float64, **options) -> Perturbed:
    net = conv4(ways=4, size=16, filters=4, blocks=2, init="kaiming", **options)
    return Perturbed(net, noise=noise).to(dtype)


def parts(model, tasks, plan, dtype=torch.float64):
    shapes = model.prepare(tasks.support[0])
    return dict(model.named_parameters()), draw_noise(shapes, plan, seeds=list(range(len(tasks))), dtype=dtype)


def gap(a, b) -> float:
    return max((a.gradients[name] - b.gradients[name]).abs().max().item() for name in a.gradients)


@pytest.mark.parametrize("noise", ["multiplicative", "none", "learned-variance", "weight", "additive", "vib"])
@pytest.mark.parametrize("statistics", ["batch", "support"])
def test_all_tasks_at_once_are_one_task_after_another(noise, statistics):
    model, tasks, plan = small(noise), images(), replace(PLAN, statistics=statistics, penalty=0.1, samples=2)
    parameters, drawn = parts(model, tasks, plan)
    together = meta_gradients(model, parameters, tasks, drawn, plan)
    for other in (
        meta_gradients(model, parameters, tasks, drawn, replace(plan, backend="loop")),
        meta_gradients(model, parameters, tasks, drawn, plan, chunk=2),
        meta_gradients(model, parameters, tasks, drawn, replace(plan, recompute=True)),
        meta_gradients(model, parameters, tasks, drawn, plan, data_sites=model.data_sites(tasks.support[0])),
    ):
        assert gap(together, other) < 1e-10
        assert torch.allclose(together.loss, other.loss, atol=1e-12)


def test_single_precision_agrees_too():
    model, tasks = small(dtype=torch.float32), images(dtype=torch.float32)
    parameters, drawn = parts(model, tasks, PLAN, torch.float32)
    together = meta_gradients(model, parameters, tasks, drawn, PLAN)
    assert gap(together, meta_gradients(model, parameters, tasks, drawn, replace(PLAN, backend="loop"))) < 1e-5


def smooth() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    initialise(net, seed=1, init="kaiming")
    return net


@pytest.mark.parametrize(
    "noise", ["multiplicative", "additive", "learned-variance", "independent", "weight", "vib", "information"]
)
def test_meta_gradients_are_finite_differences(noise):
    """Along random directions, of everything that is learned over tasks, learned step sizes included."""
    model = Perturbed(smooth(), noise=noise).double()
    random = torch.Generator().manual_seed(0)
    x, q = (torch.randn(2, n, 3, generator=random, dtype=torch.float64) for n in (6, 9))
    tasks = Tasks(x, torch.arange(6).remainder(3).expand(2, 6), q, torch.arange(9).remainder(3).expand(2, 9))
    plan = Plan(steps=2, lr=0.3, samples=2, penalty=0.2)
    shapes = model.prepare(x[0])
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=random, dtype=torch.float64))
    parameters = dict(model.named_parameters())
    drawn = draw_noise(shapes, plan, seeds=[1, 2], dtype=torch.float64)
    rates = {n: torch.full_like(p, 0.3).requires_grad_() for n, p in model.role("theta").items()}
    found = meta_gradients(model, parameters, tasks, drawn, plan, rates=rates)

    def value(shift: dict, step: float) -> float:
        moved = {n: (p + step * shift[n]).detach() for n, p in parameters.items()}
        faster = {n: (r + step * shift[f"rate.{n}"]).detach() for n, r in rates.items()}
        made = adapt(model, moved, tasks.support, tasks.support_labels, drawn, plan, rates=faster, graph=False)
        outputs = query(model, moved, made, tasks.support, tasks.query, plan)
        return torch.vmap(cross_entropy)(outputs, tasks.query_labels).mean().item()

    groups = {role: list(model.role(role)) for role in ("theta", "phi", "norm")} | {
        "rate": [f"rate.{n}" for n in rates]
    }
    for group, members in groups.items():
        for _ in range(2 if members else 0):
            shift = {n: torch.zeros_like(v) for n, v in found.gradients.items()}
            for n in members:
                shift[n] = torch.randn(shift[n].shape, generator=random, dtype=torch.float64)
            slope = sum((found.gradients[n] * shift[n]).sum().item() for n in members)
            difference = (value(shift, 1e-5) - value(shift, -1e-5)) / 2e-5
            assert slope == pytest.approx(difference, rel=1e-5, abs=1e-8), group


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_the_quadratic_has_its_closed_form(steps):
    """Inner ``|w - c|^2 / 2``, outer ``|w_J - q|^2 / 2``."""

    class Bias(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([0.3, -0.7], dtype=torch.float64))

        def forward(self, x):
            return self.w + 0 * x

    model = Perturbed(Bias(), noise="none")
    c, q = (torch.randn(4, 1, 2, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (0, 1))
    tasks = Tasks(torch.zeros_like(c), c, torch.zeros_like(q), q)
    half = lambda outputs, target: 0.5 * (outputs - target).square().sum()  # noqa: E731
    plan = Plan(steps=steps, lr=0.1)
    parameters = dict(model.named_parameters())
    w = parameters["module.w"].detach()
    made = adapt(model, parameters, tasks.support, c, {}, plan, loss=half)
    expected = c[:, 0] + 0.9**steps * (w - c[:, 0])
    assert torch.allclose(made.parameters["module.w"], expected)
    found = meta_gradients(model, parameters, tasks, {}, plan, loss=half)
    assert torch.allclose(found.gradients["module.w"], (0.9**steps * (expected - q[:, 0])).mean(0))
    first = meta_gradients(model, parameters, tasks, {}, replace(plan, first_order=True), loss=half)
    assert torch.allclose(first.gradients["module.w"], (expected - q[:, 0]).mean(0))


def test_the_first_order_trap():
    """The head's generator learns through the inner loop only: first-order gradients of it are exactly zero."""
    model, tasks = small(), images()
    parameters, drawn = parts(model, tasks, PLAN)
    second = meta_gradients(model, parameters, tasks, drawn, PLAN).gradients
    first = meta_gradients(model, parameters, tasks, drawn, replace(PLAN, first_order=True)).gradients
    head = [name for name in model.role("phi") if f".{model.head}." in name]
    assert len(head) == 2
    for name in model.role("phi"):
        assert (second[name] != 0).any(), name
        assert (first[name] == 0).all() == (name in head), name
    # What first order keeps of the other generators is their part in the query pass.
    made = adapt(model, parameters, tasks.support, tasks.support_labels, drawn, PLAN, graph=False)
    outputs = query(model, parameters, made, tasks.support, tasks.query, PLAN)
    loss = torch.vmap(cross_entropy)(outputs, tasks.query_labels).mean()
    others = [name for name in model.role("phi") if name not in head]
    for name, gradient in zip(others, torch.autograd.grad(loss, [parameters[n] for n in others]), strict=True):
        assert torch.allclose(first[name], gradient, atol=1e-12), name


def test_generators_and_shifts_are_not_adapted():
    model, tasks = small(), images()
    parameters, drawn = parts(model, tasks, PLAN)
    made = adapt(model, parameters, tasks.support, tasks.support_labels, drawn, PLAN)
    assert set(made.parameters) == set(model.role("theta"))
    everything = small("more-params")
    parameters, drawn = parts(everything, tasks, PLAN)
    made = adapt(everything, parameters, tasks.support, tasks.support_labels, drawn, PLAN)
    assert any("generator" in name for name in made.parameters)


def test_samples_are_passes_of_their_own():
    """The mean of separate losses, each with its own batch statistics; folded into the batch it is something else."""
    model, tasks = small(), images(tasks=1)
    plan = replace(PLAN, steps=1, samples=3)
    parameters, drawn = parts(model, tasks, plan)
    made = adapt(model, parameters, tasks.support, tasks.support_labels, drawn, plan)
    x, y = tasks.support[0], tasks.support_labels[0]
    each = [
        cross_entropy(model.call(parameters, x, Pass(noise={n: d[0, 0, k] for n, d in drawn.items()})), y)
        for k in range(3)
    ]
    assert torch.allclose(made.losses[0, 0], torch.stack(each).mean())
    folded = model.call(
        parameters, x.repeat(3, 1, 1, 1), Pass(noise={n: d[0, 0].flatten(0, 1) for n, d in drawn.items()})
    )
    assert (cross_entropy(folded, y.repeat(3)) - made.losses[0, 0]).abs() > 1e-4


def test_the_variance_of_the_inner_gradient_falls_as_one_over_the_samples():
    model, tasks = Perturbed(smooth()).double(), 300
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.arange(6).remainder(3)
    with torch.no_grad():
        for parameter in model.role("phi").values():
            parameter.add_(0.2)
    parameters, shapes = dict(model.named_parameters()), model.prepare(x)
    spreads = []
    for samples in (1, 4, 16):
        plan = Plan(steps=1, lr=1.0, samples=samples)
        drawn = draw_noise(shapes, plan, seeds=[1000 * samples + k for k in range(tasks)], dtype=torch.float64)
        made = adapt(model, parameters, x.expand(tasks, 6, 3), y.expand(tasks, 6), drawn, plan, graph=False)
        spreads.append(sum(v.var(0).sum().item() for v in made.parameters.values()))
    slope = torch.log(torch.tensor(spreads[-1] / spreads[0])) / torch.log(torch.tensor(16.0))
    assert slope.item() == pytest.approx(-1, abs=0.15)


def test_queries_are_judged_together_or_by_the_supports_statistics():
    model, tasks = small(), images(tasks=1, queries=3)
    for statistics, moves in (("batch", True), ("support", False)):
        plan = replace(PLAN, statistics=statistics)
        parameters, drawn = parts(model, tasks, plan)
        made = adapt(model, parameters, tasks.support, tasks.support_labels, drawn, plan, graph=False)
        alone = tasks.query.clone()
        alone[0, 1:] = 0
        a, b = (query(model, parameters, made, tasks.support, x, plan)[0, 0] for x in (tasks.query, alone))
        assert torch.allclose(a, b, atol=1e-12) != moves


def test_noise_of_a_task_is_its_seeds_whatever_is_beside_it():
    shapes = {"a": (2, 3), "b": (4,)}
    both = draw_noise(shapes, PLAN, seeds=[5, 9])
    alone = draw_noise(shapes, PLAN, seeds=[9])
    assert all(torch.equal(both[n][:, 1:], alone[n]) for n in shapes)
    assert both["a"].shape == (2, 2, 1, 2, 3)
    assert not torch.equal(both["a"][0], both["a"][1])
    assert not torch.equal(both["a"][:, 0], both["a"][:, 1])
    assert draw_noise(shapes, replace(PLAN, sample=False), seeds=[1]) == {}


def test_mixing_is_of_inputs_and_of_losses():
    model, tasks = small("none"), images(tasks=2)
    partner = torch.tensor([[1, 0, 3, 2], [2, 3, 0, 1]])
    weight = torch.tensor([0.3, 0.8], dtype=torch.float64)
    plan = replace(PLAN, steps=1)
    parameters = dict(model.named_parameters())
    made = adapt(
        model, parameters, tasks.support, tasks.support_labels, {}, plan, mixes=[Mix(weight, partner, "0")], graph=False
    )
    for t in range(2):
        x, y, w = tasks.support[t], tasks.support_labels[t], weight[t]
        logits = model.call(parameters, w * x + (1 - w) * x[partner[t]], Pass())
        expected = w * functional.cross_entropy(logits, y) + (1 - w) * functional.cross_entropy(logits, y[partner[t]])
        assert torch.allclose(made.losses[0, t], expected)


def test_a_loss_that_is_not_finite_is_told_with_step_and_task():
    model = Perturbed(mlp(inputs=1, outputs=1), noise="none")
    x = torch.ones(3, 4, 1)
    y = torch.ones(3, 4, 1)
    y[1] = 1e25
    with pytest.raises(AdaptationError, match="inner step 1 of task 1: the loss is not finite"):
        adapt(
            model,
            dict(model.named_parameters()),
            x,
            y,
            {},
            Plan(steps=2, lr=0.1),
            loss=functional.mse_loss,
            graph=False,
        )


def test_plans_that_cannot_be_are_refused():
    for options, message in (
        ({"steps": -1}, "steps >= 0"),
        ({"samples": 0}, "samples >= 1"),
        ({"lr": 0.0}, "lr: must be > 0"),
    ):
        with pytest.raises(InputError, match=message):
            Plan(**options)


def test_regression_tasks_adapt_too():
    model = Perturbed(mlp(inputs=1, outputs=1), noise="none")
    x = torch.linspace(-1, 1, 10)[None, :, None]
    made = adapt(
        model,
        dict(model.named_parameters()),
        x,
        x.sin(),
        {},
        Plan(steps=20, lr=0.05),
        loss=functional.mse_loss,
        graph=False,
    )
    assert made.losses[-1, 0] < 0.5 * made.losses[0, 0]
