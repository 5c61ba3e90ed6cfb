from __future__ import annotations

import copy
import itertools
import math
import warnings

import numpy as np
import pytest
import torch
import worlds
import zoo
from pydantic import ValidationError
from sklearn.linear_model import Ridge
from torch import nn
from torch.nn import functional

from shared_core.errors import InputError
from shared_core.runs import load_tree, save_tree
from stamp.counting import CostModel
from stamp.examples import DataError, Examples
from stamp.generator import MaskGenerator
from stamp.groups import trace
from stamp.meta import MetaConfig, MetaHistory, MetaTrainer
from stamp.projection import project
from stamp.selection import overlap, select
from stamp.tasks import Task
from stamp.training import HeadError, class_mean_weights

FEATURES, CLASSES = 5, 4


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def built(make, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def perceptron(seed=0):
    sizes = (FEATURES, 7, 6, CLASSES)
    layers = built(lambda: [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)], seed)
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


def convolutional(seed=0):
    net = built(
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(),
            nn.Dropout(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2 * CLASSES),
        ),
        seed,
    )  # fmt: skip
    for norm in (net[1], net[4]):
        norm.running_var.uniform_(0.5, 2, generator=seeded(seed))
        norm.running_mean.normal_(generator=seeded(seed))
    return net


def vectors(n=60, seed=0, shape=(FEATURES,), classes=CLASSES, name="data"):
    centres = torch.randn(classes, *shape, generator=seeded(77))
    y = torch.arange(n) % classes
    x = centres[y] + 0.5 * torch.randn(n, *shape, generator=seeded(seed))
    return Examples(x, y, tuple("abcdefgh"[:classes]), name)


def task(classes=(0, 2, 3), shots=4, queries=3, seed=0, shape=(FEATURES,)):
    generator = seeded(seed)
    centres = 2 * torch.randn(8, *shape, generator=seeded(78))
    y, z = (torch.arange(len(classes)).repeat(n) for n in (shots, queries))
    x = [centres[list(classes)][k] + torch.randn(len(k), *shape, generator=generator) for k in (y, z)]
    return Task(x[0], y, x[1], z, tuple(classes), 0)


class Fixed:
    """In place of a trainer's sampler: always the same tasks."""

    def __init__(self, *tasks):
        self.tasks = tasks

    def draw(self, number, generator):
        return list(self.tasks)


PLAIN = {
    "gates": "annealed", "inner": "class-mean", "penalty": "projected", "swap": 0.0, "budgets": (0.4, 0.4),
    "temperature": (0.7, 0.7), "jitter": False, "tasks": 2,
}  # fmt: skip


def trainer_of(model, generator, given, **settings):
    shape = tuple(given[0].support.shape[1:])
    settings = PLAIN | {"iters": 1} | settings
    trainer = MetaTrainer(model, generator, vectors(shape=shape), config=MetaConfig(**settings))
    trainer.sampler = Fixed(*given)
    return trainer


def quiet(trainer, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return trainer.fit(**options)


# ---- one step against the same step written out


def class_means(features, y, ways):
    means = torch.stack([features[y == k].mean(0) for k in range(ways)])
    return 10 * means / means.norm(dim=1, keepdim=True) / features.norm(dim=1).mean()


def ridge(support, task, query, strength=0.1, scale=6.0):
    """The primal form; the norm of features counts as a constant in gradients."""
    norm = (support - support.mean(0)).square().sum(1).mean().sqrt().detach() + 1e-6
    x = (support - support.mean(0)) / norm
    y = functional.one_hot(task.support_y, task.ways).to(x)
    gram = x.T @ x + strength * torch.eye(x.shape[1], dtype=x.dtype)
    return scale * (query - support.mean(0)) / norm @ torch.linalg.inv(gram) @ x.T @ (y - y.mean(0))


def entering_head(weights, gates, x):
    """What enters the head of the perceptron, with the gates where they mean to act: on the activations."""
    w0, b0, w2, b2 = weights
    hidden = gates["0"] * torch.relu(x @ w0.T + b0)
    return gates["2"] * torch.relu(hidden @ w2.T + b2)


def by_hand(model, gates, task, *, inner="class-mean", inner_steps=0, adapt="head", second_order=False, inner_lr=0.05):
    """Logits on the query: the inner loop written with autograd and torch's optimizers."""
    weights = [p.detach().clone() for p in list(model.parameters())[:4]]
    support = entering_head(weights, gates, task.support)
    rows = list(task.classes)
    if inner == "ridge":
        return ridge(support, task, entering_head(weights, gates, task.query))
    if inner == "slice":
        weight, bias = model[4].weight.detach()[rows], model[4].bias.detach()[rows]
    else:
        weight, bias = class_means(support, task.support_y, task.ways), torch.zeros(task.ways, dtype=support.dtype)
    if not inner_steps:
        return entering_head(weights, gates, task.query) @ weight.T + bias
    if second_order:
        for _ in range(inner_steps):
            weight, bias = (p if p.requires_grad else p.clone().requires_grad_() for p in (weight, bias))
            loss = functional.cross_entropy(support @ weight.T + bias, task.support_y)
            slopes = torch.autograd.grad(loss, (weight, bias), create_graph=True)
            weight, bias = weight - inner_lr * slopes[0], bias - inner_lr * slopes[1]
        return entering_head(weights, gates, task.query) @ weight.T + bias
    weight, bias = (p.detach().clone().requires_grad_() for p in (weight, bias))
    still = {name: gate.detach() for name, gate in gates.items()}
    moving = [p.requires_grad_() for p in weights] if adapt == "all" else []
    optimizer = torch.optim.SGD([*moving, weight, bias], lr=inner_lr)
    for _ in range(inner_steps):
        optimizer.zero_grad()
        functional.cross_entropy(
            entering_head(weights, still, task.support) @ weight.T + bias, task.support_y
        ).backward()
        optimizer.step()
    weights = [p.detach() for p in weights]
    return entering_head(weights, gates, task.query) @ weight.detach().T + bias.detach()


STEPS = [
    {"inner": inner, **steps}
    for inner in ("class-mean", "slice")
    for steps in (
        {},
        {"inner_steps": 3},
        {"inner_steps": 3, "second_order": True},
        {"inner_steps": 3, "adapt": "all"},
        {"inner_steps": 2, "adapt": "head+bn"},
    )
] + [{"inner": "ridge"}]


def double_perceptron():
    model = perceptron().double().eval()
    groups = trace(model, torch.rand(2, FEATURES, dtype=torch.float64))
    generator = MaskGenerator(groups, head="free").double()
    with torch.no_grad():
        for k, logits in enumerate(generator.head.free):
            logits.copy_(torch.randn(logits.shape, generator=seeded(k), dtype=torch.float64))
    return model, groups, generator


def doubled(*tasks):
    return [Task(t.support.double(), t.support_y, t.query.double(), t.query_y, t.classes, t.source) for t in tasks]


@pytest.mark.parametrize("settings", STEPS, ids=str)
def test_a_step_is_what_it_is_written_out(settings):
    model, groups, generator = double_perceptron()
    tasks = doubled(task(), task((1, 0), 6, 2, seed=1))
    free = {
        name: value.detach().clone().requires_grad_() for name, value in zip(groups, generator.head.free, strict=False)
    }
    cost = CostModel.macs(model, groups, torch.rand(1, FEATURES, dtype=torch.float64))
    trainer = trainer_of(model, generator, tasks, **settings)
    record = quiet(trainer).records[0]
    pi, _ = project(free, cost, 0.4, temperature=0.7)
    outcomes = [by_hand(model, pi, t, **settings) for t in tasks]
    loss = torch.stack([functional.cross_entropy(z, t.query_y) for z, t in zip(outcomes, tasks, strict=True)]).mean()
    assert abs(record.loss - float(loss.detach())) <= 1e-7
    hits = [float((z.argmax(1) == t.query_y).double().mean()) for z, t in zip(outcomes, tasks, strict=True)]
    assert abs(record.accuracy - sum(hits) / 2) <= 1e-6
    assert abs(record.ratio - 0.4) <= 1e-9
    flat = torch.cat(list(pi.values())).detach()
    assert abs(record.spread - float((flat * (1 - flat)).mean())) <= 1e-9
    # The gradient that was stepped along, clipped to norm 1.
    wanted = torch.cat(torch.autograd.grad(loss, list(free.values())))
    found = torch.cat([parameter.grad for parameter in generator.head.free])
    assert (found - wanted * min(1.0, 1 / (float(wanted.norm()) + 1e-6))).abs().max() <= 1e-7


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("settings", [{}, {"inner": "slice"}, *STEPS[2:3]], ids=str)
def test_the_outer_gradient_is_that_of_finite_differences(settings):
    model, _, generator = double_perceptron()
    tasks = doubled(task(), task((1, 0), 6, 2, seed=1))
    start = copy.deepcopy(generator.state_dict())

    def loss(name=None, place=0, step=0.0):
        generator.load_state_dict(start)
        if name is not None:
            with torch.no_grad():
                generator.head.free[name][place] += step
        return quiet(trainer_of(model, generator, tasks, **settings)).records[0].loss

    loss()
    slopes = [parameter.grad.clone() for parameter in generator.head.free]
    assert 0 < float(torch.cat(slopes).norm()) < 1 - 1e-6
    for name, place in ((0, 0), (0, 5), (1, 2), (1, 4)):
        # The shift of the projection is known to ten digits, which a smaller step would make much of.
        wanted = (loss(name, place, 1e-3) - loss(name, place, -1e-3)) / 2e-3
        assert abs(float(slopes[name][place]) - wanted) <= 1e-5


def test_ridge_is_that_of_scikit_learn():
    model, groups, generator = double_perceptron()
    tasks = doubled(task(shots=6))
    pi, _ = project(
        {name: value.detach() for name, value in zip(groups, generator.head.free, strict=False)},
        CostModel.macs(model, groups, torch.rand(1, FEATURES, dtype=torch.float64)), 0.4, temperature=0.7,
    )  # fmt: skip
    weights = [p.detach() for p in list(model.parameters())[:4]]
    support, query = (entering_head(weights, pi, x).numpy() for x in (tasks[0].support, tasks[0].query))
    norm = ((support - support.mean(0)) ** 2).sum(1).mean() ** 0.5
    y = functional.one_hot(tasks[0].support_y).double().numpy()
    fitted = Ridge(alpha=0.1).fit(support / norm, y)
    logits = torch.from_numpy(6 * (fitted.predict(query / norm) - y.mean(0)))
    record = quiet(trainer_of(model, generator, tasks, inner="ridge", tasks=1)).records[0]
    assert abs(record.loss - float(functional.cross_entropy(logits, tasks[0].query_y))) <= 1e-5
    assert math.isnan(record.overlap)


@pytest.mark.parametrize("batch", [True, False])
def test_norms_take_the_statistics_of_the_batch_or_the_running_ones(batch):
    model = convolutional().double()
    x = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    generator = MaskGenerator(trace(model, x), head="free").double()
    tasks = doubled(task(shape=(1, 8, 8)))
    before = copy.deepcopy(model.state_dict())
    trainer = trainer_of(model, generator, tasks, batch_statistics=batch, tasks=1)
    record = quiet(trainer).records[0]
    reference = copy.deepcopy(model).eval()
    for norm in (reference[1], reference[4]):
        norm.train(batch)
    pi, _ = project({"0": torch.ones(4).double(), "3": torch.ones(6).double()}, trainer.cost, 0.4, temperature=0.7)
    h = torch.cat([tasks[0].support, tasks[0].query])
    h = reference[:3](h) * pi["0"][:, None, None]
    h = reference[3:9](h) * pi["3"]
    support, query = h[: len(tasks[0].support)], h[len(tasks[0].support) :]
    logits = query @ class_means(support, tasks[0].support_y, 3).T
    assert abs(record.loss - float(functional.cross_entropy(logits, tasks[0].query_y).detach())) <= 1e-9
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("gate", [0.0, 1e-38, 1e-25, 1e-12])
def test_gates_that_switch_everything_off_leave_numbers(gate):
    features = torch.rand(6, 3, generator=seeded())
    gates = torch.full((3,), gate, requires_grad=True)
    weight, bias = class_mean_weights(features * gates, torch.arange(6) % 2, 2)
    assert bool((weight.abs() < 1e-9).all())
    functional.cross_entropy(features * gates @ weight.T + bias, torch.arange(6) % 2).backward()
    assert bool(gates.grad.isfinite().all())


# ---- what every training keeps


VALID = [
    {"inner": inner, "inner_steps": steps, "adapt": adapt, "second_order": second}
    for inner, steps, adapt, second in itertools.product(
        ("class-mean", "slice", "ridge"), (0, 2), ("head", "head+bn", "all"), (False, True)
    )
    if not (inner == "ridge" and steps) and not (adapt != "head" and (second or not steps))
]
HEADS = [
    {}, {"head": "mlp"}, {"head": "clamp"}, {"head": "free"}, {"labels": True}, {"sequential": True},
    {"sensitivity": False}, {"encoder": "attention"}, {"encoder": "pma"}, {"encoder": "subsample", "labels": True},
]  # fmt: skip


def on_images(seed=0, **settings):
    model = convolutional()
    x = vectors(shape=(1, 8, 8)).x[:2]
    return model, MaskGenerator(trace(model, x), seed=seed, input_shape=(1, 8, 8), pseudo=4, **settings)


def small(**settings):
    return MetaConfig(**({"iters": 2, "ways": (2, 3), "shots": 2, "queries": 2, "tasks": 2} | settings))


@pytest.mark.usefixtures("unchecked")  # for speed; annotations are checked elsewhere
@pytest.mark.parametrize("penalty", ["projected", "dual", "squared", "kl"])
@pytest.mark.parametrize("gates", ["annealed", "concrete", "hard"])
def test_every_combination_of_settings_trains(gates, penalty):
    data = vectors(shape=(1, 8, 8))
    # A third of the others' combinations each, every one of them with a third of these.
    first = ("annealed", "concrete", "hard").index(gates) + len(penalty)
    for place, settings in enumerate(VALID):
        if (place + first) % 3:
            continue
        model, generator = on_images(**HEADS[place % len(HEADS)])
        before = copy.deepcopy(generator.state_dict())
        swap = 0.3 * (place % 2)
        config = small(
            iters=1, gates=gates, penalty=penalty, swap=swap, jitter=place % 3 > 0, batch_statistics=place % 5 > 1,
            **settings,
        )  # fmt: skip
        history = quiet(MetaTrainer(model, generator, [data, data], config=config))
        assert all(math.isfinite(value) for r in history.records for value in (r.loss, r.ratio, r.spread, r.overlap))
        after = generator.state_dict()
        assert all(bool(value.isfinite().all()) for value in after.values())
        assert any(not torch.equal(before[name], after[name]) for name in dict(generator.named_parameters()))
        if penalty == "projected":
            assert all(0.1 - 1e-6 <= r.ratio <= 0.5 + 1e-6 for r in history.records)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("settings", [{}, {"sequential": True}, {"encoder": "pma", "head": "clamp"}], ids=str)
def test_the_network_stays_as_it_is(settings):
    model, generator = on_images(**settings)
    model.train()
    model[1].eval()
    model[0].weight.requires_grad_(requires_grad=False)
    data = vectors(shape=(1, 8, 8))
    state = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    wanted = [p.requires_grad for p in model.parameters()]
    random = torch.random.get_rng_state()
    config = small(iters=1, inner_steps=1, adapt="all")
    quiet(MetaTrainer(model, generator, data, validation=data, config=config))
    assert torch.equal(random, torch.random.get_rng_state())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert modes == [m.training for m in model.modules()]
    assert wanted == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(m.training for m in generator.modules())


RESUMED: list[dict] = [
    {},
    {"gates": "concrete", "penalty": "dual", "validation": True, "tasks": 1, "inner": "ridge", "head": "free"},
    {"gates": "hard", "penalty": "squared", "swap": 0.3, "inner": "slice"},
    {"penalty": "kl", "inner_steps": 2, "adapt": "all"},
    {"gates": "concrete", "encoder": "subsample", "labels": True},
    {"inner_steps": 2, "second_order": True, "head": "clamp", "sequential": True},
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("settings", RESUMED, ids=str)
def test_an_interrupted_training_goes_on_bit_for_bit(settings, tmp_path):
    settings = dict(settings)
    data = vectors(shape=(1, 8, 8))
    held = vectors(40, seed=3, shape=(1, 8, 8)) if settings.pop("validation", False) else None
    made = {key: settings.pop(key) for key in ("encoder", "labels", "head", "sequential") if key in settings}
    # Dual ascent acts every 20 steps, on all of them.
    iters, at = (21, 18) if settings.get("penalty") == "dual" else (4, 2)
    config = small(iters=iters, validate_every=iters // 3, **settings)

    def trainer(seed):
        model, generator = on_images(seed, **made)
        return MetaTrainer(model, generator, [data, data], validation=held, config=config)

    def keep(step):
        if step.step == at:
            save_tree(tmp_path / "state", step.state())

    whole = trainer(0)
    history = quiet(whole, on_step=keep)
    wanted = whole.generator.state_dict()
    # Another generator, so that everything must come from the state.
    other = trainer(1)
    found = quiet(other, state=load_tree(tmp_path / "state"))
    after = other.generator.state_dict()
    assert all(torch.equal(wanted[name], after[name]) for name in after)
    assert len(found.records) == iters
    for a, b in zip(history.records, found.records, strict=True):
        a, b = ({k: v for k, v in vars(r).items() if k != "seconds"} for r in (a, b))
        assert a == b or all(a[k] == b[k] or (a[k] != a[k] and b[k] != b[k]) for k in a)


@pytest.mark.usefixtures("unchecked")
def test_a_key_pressed_between_steps_costs_nothing():
    data = vectors(shape=(1, 8, 8))
    results = []
    for interrupted in (False, True):
        model, generator = on_images()
        trainer = MetaTrainer(model, generator, data, config=small(iters=4))

        def stop(step, interrupted=interrupted):
            if interrupted and step.step == 2:
                raise KeyboardInterrupt

        if interrupted:
            with pytest.raises(KeyboardInterrupt):
                quiet(trainer, on_step=stop)
        history = quiet(trainer)
        assert [record.step for record in history.records] == [1, 2, 3, 4]
        results.append((generator.state_dict(), [record.loss for record in history.records]))
    assert results[0][1] == results[1][1]
    assert all(torch.equal(results[0][0][name], results[1][0][name]) for name in results[0][0])


def test_the_seed_decides_everything():
    data = vectors(shape=(1, 8, 8))
    losses = []
    for seed in (0, 0, 1):
        model, generator = on_images()
        losses.append([r.loss for r in quiet(MetaTrainer(model, generator, data, config=small(seed=seed))).records])
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


@pytest.mark.usefixtures("unchecked")
def test_the_generator_that_does_best_on_validation_is_kept():
    data, held = vectors(shape=(1, 8, 8)), vectors(60, seed=5, shape=(1, 8, 8))
    model, generator = on_images()
    states = {}
    config = small(iters=3, validate_every=1, lr=0.3, own_lr=0.3)
    trainer = MetaTrainer(model, generator, data, validation=held, config=config)
    history = quiet(trainer, on_step=lambda step: states.update({step.step: step.state()}))
    validated = {r.step: r.validation for r in history.records if r.validation is not None}
    assert list(validated) == [1, 2, 3]
    assert all(0 <= value <= 1 for value in validated.values())
    assert len(set(validated.values())) > 1
    best = max(step for step, value in validated.items() if value == max(validated.values()))
    kept = generator.state_dict()
    assert all(torch.equal(kept[name], states[best]["generator"][name]) for name in kept)
    # Saved again as nothing happened: what was kept does not change any more.
    assert quiet(trainer).records == history.records
    assert all(torch.equal(kept[name], value) for name, value in generator.state_dict().items())


# ---- penalties


@pytest.mark.usefixtures("unchecked")  # for speed: shapes are checked by the others
def test_dual_ascent_raises_its_weight_by_how_far_the_cost_is_off():
    model = perceptron()
    data = vectors()
    generator = MaskGenerator(trace(model, data.x[:2]), head="free")
    config = small(iters=40, tasks=1, penalty="dual", budgets=(0.3, 0.3), cost_weight=1.0, own_lr=0.001)
    weights = {}
    history = quiet(
        MetaTrainer(model, generator, data, config=config),
        on_step=lambda step: weights.update({step.step: step.state()["weight"]}),
    )
    over = [record.ratio - 0.3 for record in history.records]
    assert all(weights[step] == 1.0 for step in range(1, 20))
    for step in (20, 40):
        wanted = weights[step - 1] + 50 * sum(over[step - 20 : step]) / 20
        assert abs(weights[step] - max(0.0, wanted)) <= 1e-5
    assert weights[20] > 1.0


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("penalty", ["dual", "squared", "none"])
def test_a_penalty_brings_the_cost_to_the_budget(penalty):
    model, generator = on_images(head="free")
    data = vectors(shape=(1, 8, 8))
    weight = {"cost_weight": 0.0, "penalty": "squared"} if penalty == "none" else {"penalty": penalty}
    config = small(iters=40, budgets=(0.3, 0.3), own_lr=0.15, tasks=1, temperature=(1.0, 1.0), **weight)
    ratios = [record.ratio for record in quiet(MetaTrainer(model, generator, data, config=config)).records]
    assert ratios[0] > 0.5
    if penalty == "none":
        assert min(ratios) > 0.5
    else:
        assert ratios[-1] < 0.3 + 1e-3
    if penalty == "squared":
        # Below its budget it asks for nothing.
        assert ratios[-1] > 0.15


@pytest.mark.usefixtures("unchecked")
def test_the_divergence_pulls_to_its_prior():
    model, generator = on_images(head="free")
    data = vectors(shape=(1, 8, 8))
    config = small(iters=40, penalty="kl", prior=0.2, kl_weight=1000.0, own_lr=0.2, tasks=1, temperature=(1.0, 1.0))
    quiet(MetaTrainer(model, generator, data, config=config))
    for value in generator.head.free:
        assert bool(((torch.sigmoid(value) - 0.2).abs() < 0.02).all())


# ---- does it read what it is given?


def kept(generator, net, groups, data, budget=0.25):
    cost = CostModel.macs(net, groups, data.x[:1])
    return select(generator.pi(net, data, sets=4, cost=cost, budget=budget), cost, budget)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("seed", [0])
def test_masks_of_two_worlds_keep_their_own_channels(seed):
    net, groups, data, owners = worlds.two_worlds(seed=seed)
    generator, history, caught = worlds.trained(seed=seed)
    masks = [kept(generator, net, groups, d) for d in data]
    for world, mask in enumerate(masks):
        for owner, keep in zip(owners, mask.values(), strict=True):
            assert int(keep.sum()) >= 3
            assert float((owner[keep] == world).float().mean()) >= 0.9
    assert max(overlap(*masks).values()) <= 0.1
    assert not history.ignored
    assert not caught


@pytest.mark.usefixtures("unchecked")
def test_free_gates_ignore_the_data_and_nobody_is_warned():
    net, groups, data, _ = worlds.two_worlds()
    generator, history, caught = worlds.trained("free")
    masks = [kept(generator, net, groups, d) for d in data]
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])
    assert history.ignored
    assert not caught
    assert {record.overlap for record in history.records} == {1.0}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("settings", [{}, {"gates": "concrete", "penalty": "kl"}], ids=str)
def test_a_generator_that_ignores_its_input_is_told_of(settings):
    net, groups, data, _ = worlds.two_worlds()
    generator = worlds.dead(groups)
    trainer = MetaTrainer(net, generator, data, config=MetaConfig(iters=4, ways=worlds.WAYS, **settings))
    with pytest.warns(UserWarning, match="the generator ignores its input: masks of different tasks overlap") as caught:
        history = trainer.fit()
    assert history.ignored
    assert len(caught) == 1
    assert not generator.head.second.weight.any()
    # Low probabilities alone are no such sign: where all are below one half, what is likeliest still differs.
    reads = MaskGenerator(groups)
    with torch.no_grad():
        for own in reads.head.free:
            own.fill_(-3.0)
        reads.head.second.weight.mul_(10)
    history = quiet(MetaTrainer(net, reads, data, config=MetaConfig(iters=4, ways=worlds.WAYS, penalty="kl")))
    assert not history.ignored
    assert not MetaHistory().ignored


def test_the_overlap_is_that_of_the_likeliest_channels_of_two_tasks():
    model, groups, _ = double_perceptron()
    generator = MaskGenerator(groups, head="mlp", seed=3).double()
    tasks = doubled(task(), task((1, 0), 6, 2, seed=1))
    other = copy.deepcopy(generator)
    trainer = trainer_of(model, generator, tasks)
    record = quiet(trainer).records[0]
    masks = [
        project(other.logits(model, t.support), trainer.cost, 0.4, temperature=0.7)[0] for t in tasks
    ]  # fmt: skip
    ratios = []
    for name in masks[0]:
        best = [
            set(pi[name].argsort(descending=True)[: round(float(pi[name].sum().detach()))].tolist()) for pi in masks
        ]
        ratios.append(len(best[0] & best[1]) / len(best[0] | best[1]))
    assert 0 < sum(ratios) < len(ratios)
    assert abs(record.overlap - sum(ratios) / len(ratios)) <= 1e-9


def test_masks_are_rewarded_where_another_task_would_not_like_them():
    model, groups, _ = double_perceptron()
    generator = MaskGenerator(groups, head="mlp", seed=3).double()
    tasks = doubled(task(), task((1, 0), 6, 2, seed=1), task((3, 1, 2), seed=2))
    other = copy.deepcopy(generator)
    trainer = trainer_of(model, generator, tasks, swap=0.7, tasks=3)
    record = quiet(trainer).records[0]
    gates = [project(other.logits(model, t.support), trainer.cost, 0.4, temperature=0.7)[0] for t in tasks]

    def loss(t, own):
        return functional.cross_entropy(by_hand(model, own, t), t.query_y)

    own = torch.stack([loss(t, g) for t, g in zip(tasks, gates, strict=True)])
    swapped = torch.stack([loss(tasks[k], gates[(k + 1) % 3]) for k in range(3)])
    assert abs(record.loss - float(own.mean().detach())) <= 1e-9
    total = own.mean() + 0.7 * (0.2 + own - swapped).clamp_min(0).mean()
    assert int((0.2 + own - swapped > 0).sum()) > 0
    wanted = torch.autograd.grad(total, list(other.parameters()))
    norm = math.sqrt(sum(float(w.square().sum()) for w in wanted))
    for w, parameter in zip(wanted, generator.parameters(), strict=True):
        assert (parameter.grad - w * min(1.0, 1 / (norm + 1e-6))).abs().max() <= 1e-8


# ---- what is refused


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"budgets": (0.5, 0.1)}, "budgets: must be two shares"),
        ({"budgets": (0.0, 0.5)}, "budgets: must be two shares"),
        ({"budgets": (0.1, 1.5)}, "budgets: must be two shares"),
        ({"temperature": (0.1, 0.5)}, "temperature: must fall"),
        ({"temperature": (0.5, 0.0)}, "temperature: must fall"),
        ({"inner": "ridge", "inner_steps": 2}, "inner_steps: ridge is solved in closed form"),
        ({"inner_steps": 1, "second_order": True, "adapt": "all"}, "second_order: is for adapt='head' only"),
        ({"adapt": "all"}, "adapt: 'all' changes nothing in 0 steps; give inner_steps"),
        ({"adapt": "head+bn", "inner": "ridge"}, "adapt: 'head.bn' changes nothing in 0 steps"),
        ({"inner": "slice", "ways": (2, 3)}, "'slice' needs a head for all 12 reference classes, not 8"),
        ({"ways": (1, 3)}, "ways: must be two numbers"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, words):
    model, generator = on_images()
    data = vectors(shape=(1, 8, 8))
    with pytest.raises(InputError, match=words) as caught:
        MetaTrainer(model, generator, [data] * 3, config=MetaConfig(**settings))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [{"iter": 3}, {"iters": -1}, {"tasks": 0}, {"lr": 0.0}, {"prior": 1.0}, {"gates": "soft"}, {"swap": -1.0}],
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValidationError):
        MetaConfig(**settings)
    with pytest.raises(ValidationError):
        MetaConfig().iters = 3


def test_what_does_not_fit_is_refused_in_a_line():
    model, generator = on_images()
    data = vectors(shape=(1, 8, 8))
    with pytest.raises(DataError, match="takes 1 channels"):
        MetaTrainer(model, generator, [data, vectors(shape=(3, 8, 8), name="colour")])
    with pytest.raises(InputError, match="give at least one set"):
        MetaTrainer(model, generator, [])
    lonely = Examples(data.x[:3], torch.arange(3), tuple("abc"), "lonely")
    for options in ({"reference": lonely}, {"reference": data, "validation": lonely}):
        with pytest.raises(DataError, match="lonely: 0 classes have two examples"):
            MetaTrainer(model, generator, **options)
    wide = convolutional()
    wide[3], wide[4], wide[9] = nn.Conv2d(4, 7, 3), nn.BatchNorm2d(7), nn.Linear(7, 8)
    others = [wide, nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 8))]
    for other in others:
        with pytest.raises(InputError, match="generator: it was made for another network") as caught:
            MetaTrainer(other, generator, data)
        assert "\n" not in str(caught.value)
    tokens, x = zoo.build("windowed")
    with pytest.raises(HeadError, match="pool first"):
        MetaTrainer(tokens.float(), MaskGenerator(trace(tokens, x.float())), vectors(shape=(3, 8, 8)))
    for head in ("0", "nothing"):
        with pytest.raises(HeadError):
            MetaTrainer(model, generator, data, head=head)
    broken = convolutional()
    with torch.no_grad():
        broken[3].weight[0, 0, 0, 0] = float("inf")
    with pytest.raises(InputError, match="step 1: the loss is nan"):
        quiet(MetaTrainer(broken, generator, data, config=small()))


def test_states_of_other_trainings_are_refused_in_a_line():
    data = vectors(shape=(1, 8, 8))

    def trainer(**settings):
        return MetaTrainer(*on_images(), data, config=small(**settings))

    first = trainer()
    quiet(first)
    state = first.state()
    other, _, generator = double_perceptron()
    refused = [
        (trainer(seed=1), state, "other settings"),
        (MetaTrainer(other.float(), generator.float(), vectors(), config=small()), state, "another network"),
        (trainer(), {}, "not that of a meta-training"),
        (trainer(), {**state, "generator": {}}, "not that of a meta-training"),
        (trainer(), {**state, "records": [{"step": 1}]}, "not that of a meta-training"),
        (trainer(), {**state, "random": None}, "not that of a meta-training"),
        (trainer(), {**state, "optimizer": {"state": {}}}, "not that of a meta-training"),
    ]
    for made, given, words in refused:
        with pytest.raises(InputError, match=words) as caught:
            quiet(made, state=given)
        assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("unchecked")  # for speed: shapes are checked by the others
@pytest.mark.parametrize("encoder", ["attention", "pma"])
@pytest.mark.parametrize("head", ["channel", "mlp", "clamp"])
def test_encoders_that_make_pseudo_instances_learn(encoder, head):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    data = Examples(torch.rand(60, 6), torch.arange(3).repeat(20), ("a", "b", "c"))
    groups = trace(net, data.inputs(slice(0, 2)))
    generator = MaskGenerator(groups, encoder=encoder, head=head, pseudo=4, input_shape=(6,))
    before = {name: value.clone() for name, value in generator.encoder.named_parameters()}
    MetaTrainer(net, generator, data, config=MetaConfig(iters=3, ways=(2, 3), tasks=2)).fit()
    moved = {name: float((value - before[name]).abs().max()) for name, value in generator.encoder.named_parameters()}
    assert max(moved.values()) > 1e-4
    assert all(np.isfinite(list(moved.values())))
