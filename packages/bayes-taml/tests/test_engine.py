"""Adaptation and meta-gradients against a plain loop over tasks, closed forms, and what padding must not change."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional

from bayes_taml.engine import (
    HEAD_BIAS,
    HEAD_WEIGHT,
    Compat,
    Plan,
    adapt_all,
    answer,
    meta_gradients,
    row_weights,
)
from bayes_taml.networks import Modulated, conv_features
from bayes_taml.posterior import Latents
from bayes_taml.ragged import Tasks
from shared_core.errors import InputError

COUNTS = ((1, 4, 2), (3, 1, 1), (2, 2, 6))
WAYS = 3


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ragged(counts=COUNTS, size=8, seed=0):
    """Support, labels, queries and their labels of each task; rows in any order, queries as many as they like."""
    random = torch.Generator().manual_seed(seed)
    found = []
    for k, own in enumerate(counts):
        labels = torch.arange(len(own)).repeat_interleave(torch.tensor(own))
        labels = labels[torch.randperm(len(labels), generator=random)]
        asked = torch.arange(4 + k).remainder(len(own))
        shift = torch.randn(len(own), 1, size, size, generator=random)
        x, q = (torch.randn(len(y), 1, size, size, generator=random) + shift[y] for y in (labels, asked))
        found.append((x, labels, q, asked))
    return found


def model(norm="batch", filters=3) -> Modulated:
    net = conv_features(size=8, filters=filters, blocks=2, norm=norm, init="kaiming")
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=random))
    return Modulated(net, (1, 8, 8))


def parameters_of(made: Modulated):
    return dict(made.backbone.named_parameters())


def rates_of(made: Modulated, value=0.3, seed=4):
    """A step size for each element, none like another."""
    shapes = {name: p.shape for name, p in made.backbone.named_parameters() if name in made.theta}
    shapes |= {HEAD_WEIGHT: (1, made.features), HEAD_BIAS: (1,)}
    random = torch.Generator().manual_seed(seed)
    return {n: (value * (0.5 + torch.rand(s, generator=random))).requires_grad_() for n, s in shapes.items()}


def latents_of(made: Modulated, tasks=3, names=("omega", "gamma", "z"), seed=6) -> Latents:
    sizes = {"omega": WAYS, "gamma": len(made.layers) + 1, "z": made.modulated}
    return Latents(**{n: (0.4 * drawn(tasks, sizes[n], seed=seed + k)).requires_grad_() for k, n in enumerate(names)})


# ---- the method once more, for one task, as plain as it can be


def forward(p, x, by=None):
    """The backbone; normalised by rows `by`, if there are some."""
    for layer in range(2):

        def convolved(v, layer=layer):
            return functional.conv2d(v, p[f"conv{layer + 1}.conv.weight"], p[f"conv{layer + 1}.conv.bias"], padding=1)

        def rest(y, source, layer=layer):
            mean, variance = (
                f(source, (0, 2, 3), keepdim=True) for f in (torch.mean, partial(torch.var, correction=0))
            )
            scale = p.get(f"conv{layer + 1}.norm.weight", torch.ones(len(mean[0]))).view(-1, 1, 1)
            y = (y - mean) / (variance + 1e-3).sqrt() * scale + p[f"conv{layer + 1}.norm.bias"].view(-1, 1, 1)
            return functional.max_pool2d(y.relu(), 2)

        source = convolved(x if by is None else by)
        x, by = rest(convolved(x), source), None if by is None else rest(source, source)
    return x.flatten(1)


def reference(
    made, parameters, task, rates, steps, latents=None, k=0, *, first_order=False, proto=False, support=False
):
    """Query loss, logits and adapted parameters of task number `k`: Lee et al., section 3.1, in a loop."""
    x, y, q, yq = task
    p, ways = dict(parameters), WAYS
    own = latents.values() if latents is not None else {}
    at = 0
    for role, names in (("gain", made.gains), ("shift", made.shifts)) if "z" in own else ():
        for name in names:
            z = own["z"][k, at : at + len(p[name])]
            at += len(z)
            p[name] = p[name] * (1 + z).view(-1, *[1] * (p[name].dim() - 1)) if role == "gain" else p[name] + z
    omega = torch.softmax(own["omega"][k], 0) if "omega" in own else torch.full((ways,), 1 / ways)
    # Copies: the head of prototypes is a parameter of its own, wherever it came from.
    theta = {name: p[name].clone() for name in made.theta}
    theta |= {HEAD_WEIGHT: torch.zeros(ways, made.features, requires_grad=True),
              HEAD_BIAS: torch.zeros(ways, requires_grad=True)}  # fmt: skip
    if proto:
        h = forward(p, x)
        centres = torch.stack([h[y == c].mean(0) for c in range(ways)])
        theta |= {HEAD_WEIGHT: 2 * centres, HEAD_BIAS: -(centres**2).sum(1)}

    def logits(rows, by=None):
        return forward({**p, **theta}, rows, by) @ theta[HEAD_WEIGHT].T + theta[HEAD_BIAS]

    for _ in range(steps):
        found = logits(x)
        each = [
            ways / len(y) * functional.cross_entropy(found[y == c], y[y == c], reduction="sum") for c in range(ways)
        ]
        if first_order:
            by_class = [torch.autograd.grad(e, list(theta.values()), retain_graph=True) for e in each]
            gradients = [sum(omega[c] * by_class[c][n] for c in range(ways)) for n in range(len(theta))]
        else:
            inner = sum(omega[c] * each[c] for c in range(ways))
            gradients = torch.autograd.grad(inner, list(theta.values()), create_graph=True)
        for name, gradient in zip(list(theta), gradients, strict=True):
            rate = rates[name] if isinstance(rates, dict) else rates
            layer = made.layer_of.get(name, len(made.layers))
            factor = own["gamma"][k, layer].exp() if "gamma" in own else 1.0
            theta[name] = theta[name] - factor * rate * gradient
    found = logits(q, x if support else None)
    return functional.cross_entropy(found, yq), found, theta


def expected(made, parameters, tasks, rates, steps, latents=None, **options):
    """Losses, and gradients of their mean as `meta_gradients` names them."""
    each = [reference(made, parameters, task, rates, steps, latents, k, **options) for k, task in enumerate(tasks)]
    losses = torch.stack([loss for loss, _, _ in each])
    leaves = dict(parameters) | ({f"rate.{n}": r for n, r in rates.items()} if isinstance(rates, dict) else {})
    leaves |= {f"latent.{n}": v for n, v in latents.values().items()} if latents is not None else {}
    found = torch.autograd.grad(losses.mean(), list(leaves.values()), allow_unused=True)
    gradients = {n: torch.zeros_like(v) if g is None else g for (n, v), g in zip(leaves.items(), found, strict=True)}
    return losses.detach(), gradients, each


def gradients_of(found):
    return {**found.gradients, **{f"latent.{n}": v for n, v in found.latents.items()}}


def close(a, b, tolerance=1e-10):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


CASES = {
    "maml": {"learned": False, "names": None},
    "metasgd": {"names": None},
    "omega": {"names": ("omega",)},
    "everything": {},
    "scalar step": {"learned": False},
    "film": {"norm": "film"},
    "proto": {"names": None, "learned": False, "head": "proto"},
    "everything from prototypes": {"head": "proto"},
    "by the support": {"statistics": "support"},
    "no step": {"steps": 0},
    "one step": {"steps": 1},
}


@pytest.mark.parametrize("case", list(CASES))
def test_meta_gradients_are_those_of_a_plain_loop_over_tasks(case):
    """Zero head and no shortcut, nothing padded, nothing batched: MAML in a few lines, and all that is added to it."""
    options = {"norm": "batch", "learned": True, "steps": 3, "head": "zero", "statistics": "batch", **CASES[case]}
    made, tasks = model(options["norm"]), ragged()
    names = options.get("names", ("omega", "gamma", "z"))
    latents = Latents() if names is None else latents_of(made, names=names)
    rates = rates_of(made) if options["learned"] else 0.4
    plan = Plan(options["steps"], head=options["head"], statistics=options["statistics"])
    parameters = parameters_of(made)
    losses, gradients, each = expected(made, parameters, tasks, rates, plan.steps, latents,
                                       proto=plan.head == "proto", support=plan.statistics == "support")  # fmt: skip
    batch = Tasks.collate(tasks, WAYS)
    found = meta_gradients(made, parameters, batch, latents, rates, plan)
    torch.testing.assert_close(found.loss, losses, atol=1e-10, rtol=1e-10)
    close(gradients_of(found), gradients)
    if plan.steps > 1:
        assert all(g.abs().max() > 1e-8 for n, g in gradients.items() if n.endswith("weight"))
    right = torch.stack([(e[1].argmax(1) == t[3]).double().mean() for e, t in zip(each, tasks, strict=True)])
    torch.testing.assert_close(found.right, right)
    logits, diverged = answer(made, parameters, batch, latents, rates, plan)
    for k, (_, own, _) in enumerate(each):
        torch.testing.assert_close(logits[k, 0, : len(own)], own.detach(), atol=1e-10, rtol=1e-10)
    assert not diverged.any()
    adapted = adapt_all(made, parameters, batch, latents, rates, plan)
    for k, (_, _, theta) in enumerate(each):
        torch.testing.assert_close(adapted.weight[k], theta[HEAD_WEIGHT].detach(), atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(adapted.bias[k], theta[HEAD_BIAS].detach(), atol=1e-10, rtol=1e-10)
        for name in made.theta:
            torch.testing.assert_close(adapted.parameters[name][k], theta[name].detach(), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("case", ["zero", "zero latents", "even latents"])
def test_latents_at_the_prior_are_meta_sgd(case):
    made, tasks = model(), Tasks.collate(ragged(), WAYS)
    rates, parameters = rates_of(made), parameters_of(made)
    at = {
        "zero": Latents(),
        "zero latents": Latents(torch.zeros(3, 3), torch.zeros(3, 3), torch.zeros(3, made.modulated)),
        "even latents": Latents(omega=torch.full((3, 3), 7.0)),
    }[case]
    plain = meta_gradients(made, parameters, tasks, Latents(), rates, Plan(3))
    found = meta_gradients(made, parameters, tasks, at, rates, Plan(3))
    close(found.gradients, plain.gradients)
    torch.testing.assert_close(found.loss, plain.loss, atol=1e-12, rtol=1e-12)


# ---- padding and batching


def scattered(tasks: Tasks, extra=100, fill="mixed", seed=0) -> Tasks:
    """The real rows in their order, anywhere between rows of garbage; queries likewise."""
    random = torch.Generator().manual_seed(seed)
    values = {"nan": [torch.nan], "mixed": [torch.nan, 1e30, -torch.inf, 0.0]}[fill]
    parts = {}
    for what, more in (("support", extra), ("query", 7)):
        x, labels, mask = (getattr(tasks, what + end) for end in ("", "_labels", "_mask"))
        length = x.shape[1] + more
        rows = torch.tensor(values)[torch.randint(len(values), (len(x), length), generator=random)]
        rows = rows.view(len(x), length, *[1] * (x.dim() - 2)).expand(len(x), length, *x.shape[2:]).clone()
        names = torch.randint(-9, 9, (len(x), length), generator=random)
        real = torch.zeros(len(x), length, dtype=torch.bool)
        for k in range(len(x)):
            at = torch.randperm(length, generator=random)[: int(mask[k].sum())].sort().values
            rows[k, at], names[k, at], real[k, at] = x[k, mask[k]], labels[k, mask[k]], True
        parts |= {what: rows, f"{what}_labels": names, f"{what}_mask": real}
    return Tasks(**parts, ways=tasks.ways)


@pytest.mark.parametrize("fill", ["nan", "mixed"])
@pytest.mark.parametrize("statistics", ["batch", "support"])
def test_padding_changes_nothing_wherever_it_is_and_whatever_it_holds(fill, statistics):
    made, tasks = model(), Tasks.collate(ragged(), WAYS)
    parameters, rates, latents = parameters_of(made), rates_of(made), latents_of(made)
    plan, padded = Plan(2, statistics=statistics), scattered(tasks, fill=fill)
    plain = meta_gradients(made, parameters, tasks, latents, rates, plan)
    found = meta_gradients(made, parameters, padded, latents, rates, plan)
    close(gradients_of(found), gradients_of(plain), 1e-9)
    torch.testing.assert_close(found.loss, plain.loss, atol=1e-9, rtol=0)
    assert torch.equal(found.right, plain.right)
    logits, _ = answer(made, parameters, tasks, latents, rates, plan)
    wide, _ = answer(made, parameters, padded, latents, rates, plan)
    for k in range(3):
        torch.testing.assert_close(wide[k, 0, padded.query_mask[k]], logits[k, 0, tasks.query_mask[k]],
                                   atol=1e-9, rtol=0)  # fmt: skip


@pytest.mark.parametrize("head", ["zero", "proto"])
@pytest.mark.parametrize("first_order", [False, True])
def test_all_ways_of_grouping_tasks_agree(head, first_order):
    made, tasks = model(), Tasks.collate(ragged(), WAYS)
    parameters, rates, latents = parameters_of(made), rates_of(made), latents_of(made)
    plan = Plan(2, first_order=first_order, head=head, backend="loop")
    one = meta_gradients(made, parameters, tasks, latents, rates, plan)
    for other, most in (
        (replace(plan, backend="vmap"), 1 << 30),
        (replace(plan, backend="auto"), 1 << 30),
        (replace(plan, backend="vmap"), 15),
        (replace(plan, recompute=True), 1 << 30),
        (replace(plan, backend="vmap", recompute=True), 1 << 30),
    ):
        found = meta_gradients(made, parameters, tasks, latents, rates, other, most=most)
        close(gradients_of(found), gradients_of(one))
        torch.testing.assert_close(found.loss, one.loss, atol=1e-12, rtol=1e-12)


def test_samples_of_a_task_are_adapted_to_apart():
    made, tasks = model(), Tasks.collate(ragged(), WAYS)
    parameters, rates, latents = parameters_of(made), rates_of(made), latents_of(made, tasks=6)
    logits, _ = answer(made, parameters, tasks, latents, rates, Plan(2), samples=2)
    assert logits.shape == (3, 2, 6, 3)
    for k in range(3):
        for sample in range(2):
            own = latents.part(torch.tensor([2 * k + sample]))
            alone, _ = answer(made, parameters, tasks.part(k, 1), own, rates, Plan(2))
            real = tasks.query_mask[k]
            torch.testing.assert_close(logits[k, sample, real], alone[0, 0, real], atol=1e-10, rtol=1e-10)


# ---- closed forms


def test_class_weights_by_inverse_frequency_shrink_the_class_balanced_gradient():
    """By the harmonic over the arithmetic mean of the class sizes: 0.29047 for 1, 4, 6, 17 and 29."""
    counts = torch.tensor([1.0, 4, 6, 17, 29])
    labels = torch.arange(5).repeat_interleave(counts.long())
    logits = drawn(57, 5).requires_grad_()
    weight = row_weights(labels[None], torch.ones(1, 57, dtype=torch.bool), 5, -counts.log()[None], torch.float64)
    (found,) = torch.autograd.grad((weight[0] * functional.cross_entropy(logits, labels, reduction="none")).sum(),
                                   logits)  # fmt: skip
    balanced = torch.stack([functional.cross_entropy(logits[labels == c], labels[labels == c]) for c in range(5)])
    (wanted,) = torch.autograd.grad(balanced.mean(), logits)
    factor = (5 / (1 / counts).sum() / counts.mean()).item()
    assert factor == pytest.approx(0.29047, abs=5e-6)
    torch.testing.assert_close(found, factor * wanted, atol=1e-12, rtol=1e-12)


def test_inverse_frequency_is_adaptation_to_the_class_balanced_loss_in_shorter_steps():
    made, (task, *_) = model(), ragged()
    x, y, q, _ = task
    counts = torch.tensor(COUNTS[0], dtype=torch.float64)
    rate = 0.4 * (3 / (1 / counts).sum() / counts.mean()).item()
    p = {n: v.detach().requires_grad_() for n, v in parameters_of(made).items()}
    theta = {n: p[n] for n in made.theta}
    theta |= {
        HEAD_WEIGHT: torch.zeros(3, made.features, requires_grad=True),
        HEAD_BIAS: torch.zeros(3, requires_grad=True),
    }
    for _ in range(3):
        logits = forward({**p, **theta}, x) @ theta[HEAD_WEIGHT].T + theta[HEAD_BIAS]
        loss = sum(functional.cross_entropy(logits[y == c], y[y == c]) for c in range(3)) / 3
        gradients = torch.autograd.grad(loss, list(theta.values()))
        theta = {
            n: (v - rate * g).detach().requires_grad_() for (n, v), g in zip(theta.items(), gradients, strict=True)
        }
    wanted = forward({**p, **theta}, q) @ theta[HEAD_WEIGHT].T + theta[HEAD_BIAS]
    found, _ = answer(made, parameters_of(made), Tasks.collate([task], 3), Latents(omega=-counts.log()[None]), 0.4,
                      Plan(3))  # fmt: skip
    torch.testing.assert_close(found[0, 0], wanted.detach(), atol=1e-10, rtol=1e-10)


def test_even_class_weights_are_the_mean_loss():
    labels, mask = (
        torch.tensor([[0, 1, 1, 0, 2], [2, 1, 0, 0, 0]]),
        torch.tensor([[True] * 5, [True] * 3 + [False] * 2]),
    )
    for omega in (None, torch.full((2, 3), -3.0)):
        found = row_weights(labels, mask, 3, omega, torch.float64)
        torch.testing.assert_close(found, torch.tensor([[0.2] * 5, [1 / 3] * 3 + [0.0] * 2]))
    far = row_weights(labels, mask, 3, torch.tensor([[800.0, 0, -800], [0, 0, 0]]), torch.float64)
    torch.testing.assert_close(far[0], torch.tensor([0.6, 0, 0, 0.6, 0]))


def test_one_step_moves_the_head_alone_and_has_a_closed_form():
    made, tasks = model(), Tasks.collate(ragged(), WAYS)
    parameters, rates, latents = parameters_of(made), rates_of(made), latents_of(made)
    adapted = adapt_all(made, parameters, tasks, latents, rates, Plan(1))
    start = made.modulate(parameters, latents.z)
    for name in made.theta:
        assert torch.equal(adapted.parameters[name], start[name]), name
    logits, _ = answer(made, parameters, tasks, latents, rates, Plan(1))
    for k, (x, y, q, _) in enumerate(ragged()):
        own = {**parameters, **{n: v[k] for n, v in start.items()}}
        h, factor = forward(own, x), latents.gamma[k, -1].exp()
        pull = (3 * torch.softmax(latents.omega[k], 0)[y] / len(y)).unsqueeze(1) * (torch.eye(3)[y] - 1 / 3)
        weight = factor * rates[HEAD_WEIGHT] * (pull.T @ h)
        bias = factor * rates[HEAD_BIAS] * pull.sum(0)
        torch.testing.assert_close(adapted.weight[k], weight.detach(), atol=1e-12, rtol=1e-10)
        wanted = (forward(own, q) @ weight.T + bias).detach()
        torch.testing.assert_close(logits[k, 0, : len(q)], wanted, atol=1e-12, rtol=1e-10)


def test_class_labels_are_names_and_nothing_more():
    made, tasks, new = model(), ragged(), torch.tensor([2, 0, 1])
    moved = [(x, new[y], q, new[yq]) for x, y, q, yq in tasks]
    parameters, rates, latents = parameters_of(made), rates_of(made), latents_of(made)
    omega = torch.empty_like(latents.omega).index_copy(1, new, latents.omega)
    found, _ = answer(made, parameters, Tasks.collate(tasks, WAYS), latents, rates, Plan(3))
    other, _ = answer(made, parameters, Tasks.collate(moved, WAYS), Latents(omega, latents.gamma, latents.z), rates,
                      Plan(3))  # fmt: skip
    torch.testing.assert_close(other[..., new], found, atol=1e-9, rtol=0)
    assert (found - other).abs().max() > 1e-3


def test_a_bias_before_batch_statistics_does_nothing():
    made, tasks = model(), Tasks.collate(ragged(), WAYS)
    latents, rates = latents_of(made), rates_of(made)
    found = meta_gradients(made, parameters_of(made), tasks, latents, rates, Plan(3))
    shifts = torch.cat([torch.arange(s.start, s.stop) for n, s in made.slices().items() if n in made.shifts])
    for layer in (0, 1):
        assert found.gradients[f"conv{layer + 1}.conv.bias"].abs().max() < 1e-10
        assert found.gradients[f"rate.conv{layer + 1}.conv.bias"].abs().max() < 1e-10
    assert found.latents["z"][:, shifts].abs().max() < 1e-10
    assert found.latents["z"][:, : shifts.min()].abs().max() > 1e-6


def test_a_gain_before_batch_statistics_is_a_longer_step():
    """From w (1 + z) in steps of alpha as from w in steps of alpha / (1 + z)^2, but for eps."""
    made, tasks = model(), Tasks.collate(ragged(((2, 3, 4), (3, 3, 3))), WAYS)
    for module in made.backbone.modules():
        if hasattr(module, "eps"):
            module.eps = 1e-13
    parameters = parameters_of(made)
    z = 0.5 * torch.rand(2, made.modulated, generator=torch.Generator().manual_seed(1)) - 0.2
    z[1] = z[0]
    modulated, _ = answer(made, parameters, tasks, Latents(z=z), 0.1, Plan(4))
    rates = {n: torch.full_like(p, 0.1) for n, p in parameters.items() if n in made.theta}
    rates |= {HEAD_WEIGHT: torch.full((1, made.features), 0.1), HEAD_BIAS: torch.full((1,), 0.1)}
    for name, at in made.slices().items():
        if name in made.gains:
            rates[name] = rates[name] / (1 + z[0, at]).square().view(-1, 1, 1, 1)
    faster, _ = answer(made, parameters, tasks, Latents(), rates, Plan(4))
    plain, _ = answer(made, parameters, tasks, Latents(), 0.1, Plan(4))
    torch.testing.assert_close(modulated, faster, atol=1e-8, rtol=1e-7)
    assert (modulated - plain).abs().max() > 1e-4


def test_film_modulation_moves_predictions_even_before_a_step_is_taken_by_the_body():
    for norm, moves in (("film", True), ("batch", False)):
        made, tasks = model(norm), Tasks.collate(ragged(), WAYS)
        z = 0.3 * drawn(3, made.modulated)
        one, other = (
            answer(made, parameters_of(made), tasks, Latents(z=v), 0.3, Plan(1))[0] for v in (z, torch.zeros_like(z))
        )
        assert ((one - other).abs().max() > 1e-2) == moves, norm


# ---- first order


def test_the_first_order_changes_gradients_and_no_value():
    made, tasks = model(), Tasks.collate(ragged(), WAYS)
    parameters, rates, latents = parameters_of(made), rates_of(made), latents_of(made)
    second = meta_gradients(made, parameters, tasks, latents, rates, Plan(3))
    first = meta_gradients(made, parameters, tasks, latents, rates, Plan(3, first_order=True))
    torch.testing.assert_close(first.loss, second.loss, atol=1e-12, rtol=1e-12)
    assert not torch.allclose(first.gradients["conv1.conv.weight"], second.gradients["conv1.conv.weight"], rtol=1e-2)


@pytest.mark.parametrize("names", [(), ("omega",), ("gamma", "z"), ("omega", "gamma", "z")])
@pytest.mark.parametrize("head", ["zero", "proto"])
def test_the_first_order_takes_class_gradients_for_constants_and_their_weights_not(names, head):
    made, tasks = model(), ragged()
    parameters, rates, latents = parameters_of(made), rates_of(made), latents_of(made, names=names)
    plan = Plan(3, first_order=True, head=head)
    losses, gradients, _ = expected(made, parameters, tasks, rates, 3, latents, first_order=True, proto=head == "proto")
    found = meta_gradients(made, parameters, Tasks.collate(tasks, WAYS), latents, rates, plan)
    torch.testing.assert_close(found.loss, losses, atol=1e-10, rtol=1e-10)
    close(gradients_of(found), gradients)
    assert all(found.latents[name].abs().max() > 1e-5 for name in names)
    assert found.gradients["rate.conv1.conv.weight"].abs().max() > 1e-7


# ---- deviations of the authors' code


def test_compatible_modes_change_padded_tasks_only():
    made, tasks = model(), Tasks.collate(ragged(), WAYS)
    parameters, rates, latents = parameters_of(made), rates_of(made), latents_of(made)
    plain, _ = answer(made, parameters, tasks, latents, rates, Plan(2))
    longest = int(tasks.sizes().argmax())
    for compat in (Compat(pad_in_norm=True), Compat(padded_n=True)):
        assert compat.on
        found, _ = answer(made, parameters, tasks, latents, rates, Plan(2, compat=compat))
        for k in range(3):
            assert torch.allclose(found[k], plain[k], atol=1e-10) == (k == longest), (compat, k)
        found, _ = answer(made, parameters, tasks.part(longest, 1), latents.part(torch.tensor([longest])), rates,
                          Plan(2, compat=compat))  # fmt: skip
        torch.testing.assert_close(found[0], plain[longest], atol=1e-10, rtol=0)
    assert not Compat().on


def test_the_padded_length_shrinks_steps_as_far_as_it_is_longer():
    made, tasks = model(), Tasks.collate(ragged(), WAYS)
    parameters = parameters_of(made)
    found, _ = answer(made, parameters, tasks, Latents(), 0.4, Plan(3, compat=Compat(padded_n=True)))
    for k, size in enumerate(tasks.sizes().tolist()):
        own, _ = answer(made, parameters, tasks.part(k, 1), Latents(), 0.4 * size / 10, Plan(3))
        torch.testing.assert_close(found[k], own[0], atol=1e-10, rtol=1e-10)


def test_padding_in_the_normalisation_is_rows_of_zeros_without_a_loss():
    made, tasks = model(), ragged()
    parameters, steps, rate = parameters_of(made), 2, 0.4
    found, _ = answer(made, parameters, Tasks.collate(tasks, WAYS), Latents(), rate,
                      Plan(steps, compat=Compat(pad_in_norm=True)))  # fmt: skip
    for k, (x, y, q, _) in enumerate(tasks):
        longer = torch.cat([x, torch.zeros(10 - len(x), *x.shape[1:])])
        theta = {n: parameters[n] for n in made.theta}
        theta |= {HEAD_WEIGHT: torch.zeros(3, made.features, requires_grad=True),
                  HEAD_BIAS: torch.zeros(3, requires_grad=True)}  # fmt: skip
        for _ in range(steps):
            h = forward({**parameters, **theta}, longer)[: len(x)]
            loss = functional.cross_entropy(h @ theta[HEAD_WEIGHT].T + theta[HEAD_BIAS], y)
            gradients = torch.autograd.grad(loss, list(theta.values()))
            theta = {n: v - rate * g for (n, v), g in zip(theta.items(), gradients, strict=True)}
        wanted = forward({**parameters, **theta}, q) @ theta[HEAD_WEIGHT].T + theta[HEAD_BIAS]
        torch.testing.assert_close(found[k, 0, : len(q)], wanted.detach(), atol=1e-10, rtol=1e-10)


# ---- normalisation of queries, divergence, and what sees the way


def test_queries_are_answered_apart_only_under_statistics_of_the_support():
    made, tasks = model(), Tasks.collate(ragged()[:1], WAYS)
    other = replace(tasks, query=torch.cat([tasks.query[:, :1], tasks.query[:, 1:] + 3], 1))
    for statistics, apart in (("support", True), ("batch", False)):
        one, two = (
            answer(made, parameters_of(made), t, Latents(), 0.4, Plan(2, statistics=statistics))[0]
            for t in (tasks, other)
        )
        assert torch.allclose(one[0, 0, 0], two[0, 0, 0], atol=1e-10) == apart
        alone = replace(tasks, **{n: getattr(tasks, n)[:, :1] for n in ("query", "query_labels", "query_mask")})
        single, _ = answer(made, parameters_of(made), alone, Latents(), 0.4, Plan(2, statistics=statistics))
        assert torch.allclose(single[0, 0, 0], one[0, 0, 0], atol=1e-10) == apart


def vectors() -> tuple[Modulated, Tasks]:
    net = nn.Sequential(nn.Linear(4, 5), nn.Softplus(), nn.Linear(5, 5), nn.Softplus())
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=random))
    y = torch.arange(6).remainder(3).expand(2, 6)
    mask = torch.ones(2, 6, dtype=torch.bool)
    return Modulated(net.float(), (4,)), Tasks(
        drawn(2, 6, 4).float(), y, mask, drawn(2, 6, 4, seed=1).float(), y, mask, 3
    )


@pytest.mark.parametrize("rate", [1e12, 1e20, 1e38])
@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("head", ["zero", "proto"])
def test_steps_that_go_too_far_stop_a_task_and_are_counted(rate, steps, head):
    """The other task goes its way; what is returned is finite, in any number of steps."""
    torch.set_default_dtype(torch.float32)
    made, tasks = vectors()
    gamma = torch.zeros(2, 3)
    gamma[0] = float(torch.tensor(rate).log())
    plan = Plan(steps, head=head)
    logits, diverged = answer(made, parameters_of(made), tasks, Latents(gamma=gamma), 0.1, plan)
    probability = functional.softmax(logits, -1)
    assert torch.isfinite(probability).all()
    calm, _ = answer(made, parameters_of(made), tasks.part(1, 1), Latents(gamma=gamma[1:]), 0.1, plan)
    torch.testing.assert_close(logits[1], calm[0], atol=1e-4, rtol=1e-4)
    assert diverged[1] == 0
    if rate >= 1e38 and steps > 2:
        assert diverged[0] == 1


def test_an_observer_sees_every_point_of_the_way():
    made, tasks = model(), ragged()[:1]
    parameters, rates, latents = parameters_of(made), rates_of(made), latents_of(made, tasks=1)
    seen = []
    adapt_all(made, parameters, Tasks.collate(tasks, WAYS), latents, rates, Plan(3),
              observe=lambda step, at, losses: seen.append((step, at, losses)))  # fmt: skip
    assert [step for step, _, _ in seen] == [0, 1, 2, 3]
    x, y, _, _ = tasks[0]
    for step, at, losses in seen:
        _, _, theta = reference(made, parameters, tasks[0], rates, step, latents)
        for name, value in theta.items():
            found = at[name][0] if at[name].dim() > value.dim() else at[name]
            torch.testing.assert_close(found, value.detach(), atol=1e-10, rtol=1e-10)
        logits = forward({**parameters, **theta}, x) @ theta[HEAD_WEIGHT].T + theta[HEAD_BIAS]
        torch.testing.assert_close(losses[0], functional.cross_entropy(logits, y, reduction="none").detach())


def test_layers_that_are_frozen_stay_and_the_rest_learns():
    net = conv_features(size=8, filters=3, blocks=2, init="kaiming")
    net[0].requires_grad_(False)
    made, tasks = Modulated(net, (1, 8, 8)), Tasks.collate(ragged(), WAYS)
    assert made.theta == ("conv2.conv.weight", "conv2.conv.bias")
    found = meta_gradients(made, parameters_of(made), tasks, latents_of(made), rates_of(made), Plan(3))
    assert found.gradients["conv2.conv.weight"].abs().max() > 1e-6
    before = net[0].conv.weight.clone()
    adapted = adapt_all(made, parameters_of(made), tasks, Latents(), 0.4, Plan(3))
    assert "conv1.conv.weight" not in adapted.parameters
    assert torch.equal(net[0].conv.weight, before)


def test_a_plan_that_cannot_be_is_refused():
    with pytest.raises(InputError, match="steps: must be >= 0, got -1"):
        Plan(-1)
