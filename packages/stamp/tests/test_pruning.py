from __future__ import annotations

import copy
import functools
import itertools

import pytest
import torch
import worlds
import zoo

from shared_core.errors import InputError, UnknownKeyError
from stamp import pruning
from stamp.baselines import SCORERS
from stamp.counting import CostModel, macs
from stamp.examples import DataError, Examples
from stamp.generator import GeneratorError, MaskGenerator
from stamp.groups import trace
from stamp.latency import LatencyTable, fit_latency
from stamp.meta import MetaConfig, MetaTrainer
from stamp.pruning import METHODS, Adaptivity, adapt, adaptivity, prune
from stamp.selection import Budget, BudgetError, ScoresError, normalised, overlap, select, widths_like
from stamp.surgery import Masked, cut
from stamp.timing import as_inputs
from stamp.training import accuracy, head_name, recalibrate_bn, with_head

SHAPE = (3, 8, 8)
QUICK = {
    "synflow": {"rounds": 3},
    "free": {"steps": 2},
    "bbdropout": {"steps": 2},
    "metapruning": {"steps": 2, "population": 4, "generations": 1, "parents": 2, "recalibration": 1},
}


def examples(n=24, seed=0, classes=3, offset=0.0, shape=SHAPE):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *shape, generator=generator) + offset
    return Examples(x, torch.arange(n) % classes, tuple("abcdef"[:classes]))


@functools.cache
def traced(name):
    model, x = zoo.build(name)
    return model.float(), trace(model, x.float())


def single(name):
    model, groups = traced(name)
    return copy.deepcopy(model), groups


def shares(plan, model, x):
    """What the small network costs, counted in it, and not by the plan."""
    small = cut(model, plan.groups, plan.keep)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (small, model)]
    return {"macs": macs(small, x) / macs(model, x), "params": sizes[0] / sizes[1]}


def same(a, b):
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


# ---- every method under one call


@pytest.mark.parametrize("method", METHODS)
def test_every_method_meets_its_budget(method):
    model, groups = single("vgg")
    model.train()
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    random = torch.random.get_rng_state()
    data, x = examples(), examples().x[:4]
    for budget in (Budget(macs=0.4), Budget(params=0.3)):
        plan = prune(model, groups, method=method, data=data, budget=budget, options=QUICK.get(method))
        assert plan.method == method
        if method == "dense":
            assert plan.widths() == groups.widths()
            assert plan.ratios == {"macs": 1.0, "params": 1.0}
        else:
            found = shares(plan, model, x[:1])
            assert found[budget.kind] <= budget.value
            assert plan.budget == {budget.kind: budget.value}
            assert all(abs(plan.ratios[kind] - found[kind]) <= 1e-9 for kind in found)
            assert all(width >= max(1, 0.05 * groups[name].width) for name, width in plan.widths().items())
        assert plan.check(model, plan.apply(model), x) <= 1e-4
        assert plan.head == head_name(model)
        assert plan.seconds >= 0
        made = plan.apply(model, data=data).eval()
        assert made(x).shape == (4, 3)
    assert modes == [m.training for m in model.modules()]
    assert same(state, model.state_dict())
    assert torch.equal(random, torch.random.get_rng_state())


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ["mobilenet", "densenet", "vit-torch", "nested-cat"])
def test_every_architecture_is_pruned_by_generators_and_others(name):
    model, groups = single(name)
    data = examples()
    for method in (MaskGenerator(groups), MaskGenerator(groups, head="mlp", sequential=True), "snip"):
        plan = prune(model, groups, method=method, data=data, budget=Budget(macs=0.5), sets=2)
        assert shares(plan, model, data.x[:1])["macs"] <= 0.5
        assert plan.check(model, plan.apply(model), data.x[:2]) <= 1e-3


def test_named_methods_are_scored_with_a_head_for_the_data_and_ranked_by_what_is_normal_in_their_group():
    model, groups = single("vgg")
    data = examples()
    cost = CostModel.macs(model, groups, data.x[:1])
    ready = with_head(model, data)
    for method in ("l1", "act", "snip", "taylor"):
        raw = SCORERS[method](ready, groups, data, torch.Generator().manual_seed(3))
        plan = prune(model, groups, method=method, data=data, budget=Budget(macs=0.4), seed=3)
        assert same(plan.keep, select(normalised(raw), cost, 0.4))
    raw = SCORERS["random"](ready, groups, data, torch.Generator().manual_seed(3))
    plan = prune(model, groups, method="random", data=data, budget=Budget(macs=0.4), seed=3)
    assert same(plan.keep, select(raw, cost, 0.4))
    other = prune(model, groups, method="random", data=data, budget=Budget(macs=0.4), seed=4)
    assert not same(plan.keep, other.keep)


def test_scores_of_ones_own():
    model, groups = single("vgg")
    data = examples()
    cost = CostModel.macs(model, groups, data.x[:1])
    generator = torch.Generator().manual_seed(0)
    scores = {name: torch.rand(width, generator=generator) for name, width in groups.widths().items()}
    plan = prune(model, groups, method=scores, data=data, budget=Budget(macs=0.3))
    assert same(plan.keep, select(scores, cost, 0.3))
    assert plan.method == "scores"
    asked = []

    def mine(given, of, examples_, random):
        asked.append((given, of, examples_, random.initial_seed()))
        return scores

    called = prune(model, groups, method=mine, data=(data.x, data.y), budget=Budget(macs=0.3), seed=11)
    assert same(called.keep, plan.keep)
    assert called.method == "mine"
    given, of, found, seed = asked[0]
    assert given[-1].out_features == 3
    assert of is groups
    assert torch.equal(found.x, data.x)
    assert seed == 11
    assert same(called.scores, scores)


def test_choices_are_those_of_select():
    model, groups = single("vgg")
    data = examples()
    cost = CostModel.macs(model, groups, data.x[:1])
    scores = {n: torch.rand(w, generator=torch.Generator().manual_seed(w)) for n, w in groups.widths().items()}
    for options in (
        {"round_to": 2}, {"min_channels": 3}, {"min_channels": 0.5}, {"mode": "efficiency"},
        {"mode": "threshold", "threshold": 0.7},
    ):  # fmt: skip
        plan = prune(model, groups, method=scores, data=data, budget=Budget(macs=0.6), **options)
        assert same(plan.keep, select(scores, cost, 0.6, **options))
        wanted = {"threshold": 0.7} if "threshold" in options else {"macs": 0.6}
        assert plan.budget == wanted


# ---- generators


@pytest.mark.parametrize("budget", [Budget(macs=0.3), Budget(params=0.25)])
def test_a_generator_is_asked_for_the_budget_and_its_scores_are_ranked(budget):
    model, groups = single("vgg")
    generator = MaskGenerator(groups, seed=2)
    data = examples(40)
    costs = {"macs": CostModel.macs(model, groups, data.x[:1]), "params": CostModel.parameters(model, groups)}
    cost = costs[budget.kind]
    random = torch.Generator().manual_seed(7)
    pi = generator.pi(model, data, sets=3, set_size=16, cost=cost, budget=budget.value, generator=random)
    plan = prune(model, groups, method=generator, data=data, budget=budget, sets=3, set_size=16, seed=7)
    assert same(plan.scores, pi)
    assert same(plan.gates, pi)
    assert same(plan.keep, select(pi, cost, budget.value))
    assert plan.method == "stamp"
    soft = plan.apply(model, fold="soft")
    assert plan.check(model, soft, data.x[:4], fold="soft") <= 1e-4
    kept = {name: pi[name] * plan.keep[name] for name in pi}
    assert torch.allclose(soft(data.x[:4]), Masked(model, groups, kept)(data.x[:4]), atol=1e-4)
    free = prune(model, groups, method=MaskGenerator(groups, head="free"), data=data, budget=budget)
    assert free.method != "stamp"
    assert prune(model, groups, method=generator, data=data, budget=budget, sets="auto").keep


def test_a_note_says_when_probabilities_are_not_sharp():
    model, groups = single("vgg")
    for own, noted in ((0.0, True), (40.0, False)):
        generator = MaskGenerator(groups, head="free")
        with torch.no_grad():
            for k, value in enumerate(generator.head.free):
                value.copy_(own * torch.randn(value.shape, generator=torch.Generator().manual_seed(k)))
        plan = prune(model, groups, method=generator, data=examples(), budget=Budget(macs=0.5), sets=1)
        assert bool(plan.notes) == noted
        if noted:
            assert "not sharp" in plan.notes[0]


@pytest.mark.usefixtures("unchecked")
def test_sharpness_is_judged_at_the_temperature_that_training_ended_with(tmp_path):
    net, groups, data, _ = worlds.two_worlds()
    generator = MaskGenerator(groups)
    options = {"tasks": 2, "ways": worlds.WAYS, "inner": "slice", "gates": "annealed", "temperature": (0.4, 0.03)}
    MetaTrainer(net, generator, data, config=MetaConfig(iters=20, **options)).fit()
    generator.save(tmp_path / "g")
    loaded = MaskGenerator.load(tmp_path / "g", groups)
    decide = functools.partial(prune, net, groups, data=data[0], budget=Budget(macs=0.4), sets=3)
    for own in (generator, loaded):
        plan = decide(method=own)
        flat = torch.cat(list(plan.scores.values()))
        assert float((flat * (1 - flat)).mean()) > 0.1
        assert plan.notes == ()
    undecided = MaskGenerator(groups, head="free", temperature=0.03)
    with torch.no_grad():
        for value in undecided.head.free:
            value.zero_()
    assert "not sharp" in decide(method=undecided).notes[0]
    MetaTrainer(net, loaded, data, config=MetaConfig(iters=1, tasks=2, ways=worlds.WAYS)).fit()
    assert loaded.settings["temperature"] == 1.0
    assert adapt(net, generator, data[0], budget=0.3, steps=1).settings["temperature"] == 0.03


@pytest.mark.usefixtures("unchecked")
def test_adaptation_is_under_the_budget_that_is_asked_for(monkeypatch):
    net, groups, data, _ = worlds.two_worlds()
    seen = []

    class Watched(MetaTrainer):
        def fit(self, **options):
            seen.append((self.cost.exact({}), *self.config.budgets))
            return super().fit(**options)

    monkeypatch.setattr(pruning, "MetaTrainer", Watched)
    monkeypatch.setattr(pruning, "fit_latency", functools.partial(fit_latency, measure=by_macs))
    table = LatencyTable.build(net, groups, data[0].x[:64], measure=by_macs, warmup=0, repeats=1)
    whole = {"macs": macs(net, data[0].x[:1]), "params": sum(p.numel() for p in net.parameters())}
    decide = functools.partial(prune, net, groups, method=MaskGenerator(groups), data=data[0], adapt_steps=1, sets=1)
    decide(budget=Budget(macs=0.3))
    decide(budget=Budget(params=0.3))
    assert seen == [(whole["macs"], 0.3, 0.3), (whole["params"], 0.3, 0.3)]
    for budget in (Budget(latency=0.5), Budget(latency_ms=0.5 * table.dense_ms)):
        decide(budget=budget, table=table)
        cost, low, high = seen[-1]
        # This clock counts multiply-adds, so that half of the time is about half of them.
        assert (cost, low) == (whole["macs"], high)
        assert 0.42 <= low <= 0.5


@pytest.mark.usefixtures("unchecked")
def test_adapting_changes_a_copy_only():
    net, groups, data, _ = worlds.two_worlds()
    net = copy.deepcopy(net)
    generator, *_ = worlds.trained()
    before, weights = copy.deepcopy(generator.state_dict()), copy.deepcopy(net.state_dict())
    first, second = (adapt(net, generator, data[0], budget=0.3, steps=3, lr=0.01, seed=s) for s in (0, 0))
    other = adapt(net, generator, data[0], budget=0.3, steps=3, lr=0.01, seed=1)
    assert same(before, generator.state_dict())
    assert same(weights, net.state_dict())
    assert same(first.state_dict(), second.state_dict())
    assert not same(first.state_dict(), other.state_dict())
    assert all(not torch.equal(before[name], first.state_dict()[name]) for name in before if "second" in name)
    plan = prune(net, groups, method=generator, data=data[0], budget=Budget(macs=0.3), adapt_steps=4, seed=5)
    wanted = adapt(net, generator, data[0], budget=0.3, steps=4, seed=5)
    assert same(plan.keep, prune(net, groups, method=wanted, data=data[0], budget=Budget(macs=0.3), seed=5).keep)
    assert same(before, generator.state_dict())


@pytest.mark.usefixtures("unchecked")
def test_a_generator_that_knows_nothing_learns_from_the_data_it_is_adapted_to():
    net, groups, data, _ = worlds.two_worlds()
    generator = MaskGenerator(groups)
    losses = []
    for steps in (0, 40):
        adapted = adapt(net, generator, data[0], budget=0.3, steps=steps, lr=0.03)
        config = MetaConfig(iters=8, tasks=1, ways=(4, 4), budgets=(0.3, 0.3), temperature=(0.1, 0.1), jitter=False,
                            lr=1e-12, own_lr=1e-12, seed=9)  # fmt: skip
        records = MetaTrainer(net, adapted, data[0], config=config).fit().records
        losses.append(sum(r.loss for r in records) / 8)
    assert losses[1] < losses[0]


# ---- milliseconds


KNOWN = {}


def by_macs(module, inputs) -> float:
    """A clock that ticks once for each thousand multiply-adds."""
    key = repr(module), tuple(x.shape for x in (*module.parameters(), *as_inputs(inputs)))
    if key not in KNOWN:
        KNOWN[key] = macs(module, as_inputs(inputs)) / 1000
    return KNOWN[key]


@pytest.mark.parametrize(
    ("budget", "mode"), [(Budget(latency=0.5), "budget"), (Budget(latency_ms=1.0), "efficiency")], ids=str
)
def test_a_budget_in_time_is_measured(budget, mode, monkeypatch):
    model, groups = single("vgg")
    data = examples(8)
    table = LatencyTable.build(model, groups, data.x, measure=by_macs, warmup=0, repeats=1, grid=2)
    dense = by_macs(model, data.x)
    target = budget.value * (dense if budget.kind == "latency" else 200.0)
    budget = budget if budget.kind == "latency" else Budget(latency_ms=target)
    asked = []

    def fit(*args, **kwargs):
        asked.append(kwargs)
        return fit_latency(*args, measure=by_macs, **kwargs)

    monkeypatch.setattr(pruning, "fit_latency", fit)
    for method in ("l1", MaskGenerator(groups)):
        plan = prune(model, groups, method=method, data=data, budget=budget, table=table, mode=mode, sets=1)
        small = cut(model, groups, plan.keep)
        assert by_macs(small, data.x) <= target
        assert by_macs(small, data.x) >= 0.5 * target
        assert abs(plan.ratios["latency"] - table.exact(plan.keep) / table.dense_ms) <= 1e-9
        assert plan.check(model, plan.apply(model), data.x[:2]) <= 1e-4
    assert all(kwargs["mode"] == mode and kwargs["cost"] is table for kwargs in asked)
    threshold = prune(model, groups, method="l1", data=data, budget=budget, table=table, mode="threshold")
    assert len(asked) == 2
    assert threshold.budget == {"threshold": 0.5}


def test_a_table_is_measured_where_none_is_given(monkeypatch):
    model, groups = single("vgg")
    data = examples(8)
    build = LatencyTable.build
    monkeypatch.setattr(
        pruning.LatencyTable, "build", functools.partial(build, measure=by_macs, warmup=0, repeats=1, grid=2)
    )
    monkeypatch.setattr(pruning, "fit_latency", functools.partial(fit_latency, measure=by_macs))
    plan = prune(model, groups, method="l1", data=data, budget=Budget(latency=0.6))
    assert by_macs(cut(model, groups, plan.keep), data.x) <= 0.6 * by_macs(model, data.x) * (1 + 1e-9)


def test_widths_that_were_searched_by_predicted_times_are_measured(monkeypatch):
    model, groups = single("vgg")
    data = examples()
    table = LatencyTable.build(model, groups, data.x, measure=by_macs, warmup=0, repeats=1)
    target = 0.5 * table.dense_ms
    searched, search, slow, measured = [], pruning.meta_pruning, [0], []

    def watched(*args, **options):
        searched.append(search(*args, **options))
        return searched[-1]

    def clock(network, batch, *, device):
        measured.append(by_macs(network, batch))
        return 2 * target if len(measured) <= slow[0] else measured[-1]

    monkeypatch.setattr(pruning, "meta_pruning", watched)
    monkeypatch.setattr(pruning, "measured_ms", clock)
    options = {"steps": 0, "population": 12, "generations": 1, "recalibration": 1}
    decide = functools.partial(
        prune, model, groups, method="metapruning", data=data, budget=Budget(latency=0.5), table=table, options=options
    )
    for number in (0, 2):
        slow[0] = number
        measured.clear()
        plan = decide()
        tried = searched[-1].tried
        best = sorted(tried, key=lambda widths: -tried[widths])
        assert tuple(int(mask.sum()) for mask in plan.keep.values()) == best[number]
        assert len(measured) == number + 1
        assert by_macs(cut(model, groups, plan.keep), data.x) <= target
        assert plan.notes == (f"{measured[-1]:.3g} ms measured for {target:.3g} asked",)
    slow[0] = 100
    with pytest.raises(BudgetError, match="of its 8 best candidates the fastest was measured to take"):
        decide()


# ---- what is refused


def test_double_precision_is_pruned_too():
    model, groups = single("vgg")
    generator = MaskGenerator(groups)
    for method in ("snip", generator):
        first, second = (
            prune(m, groups, method=method, data=examples(), budget=Budget(macs=0.4))
            for m in (model, copy.deepcopy(model).double())
        )
        assert same(first.keep, second.keep)


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_done_is_refused_in_a_line():
    model, groups = single("vgg")
    data, budget = examples(), Budget(macs=0.5)
    other = single("resnet")
    refused = [
        (UnknownKeyError, "method: no method 'l3'; there are dense, random, l1", {"method": "l3"}),
        (GeneratorError, "made for another network", {"method": MaskGenerator(other[1])}),
        (DataError, "takes 3 channels", {"data": examples(shape=(1, 8, 8))}),
        (ScoresError, "4", {"method": {"4": torch.rand(7)}}),
        (InputError, "nothing", {"method": {"nothing": torch.rand(7)}}),
        (InputError, "NaN", {"method": {"4": torch.full((8,), float("nan"))}}),
        (DataError, "cannot make examples of int", {"data": 3}),
        (InputError, "head: ", {"head": "0", "method": "snip"}),
    ]
    for error, words, options in refused:
        given = {"method": "l1", "data": data, "budget": budget} | options
        with pytest.raises(error, match=words) as caught:
            prune(model, groups, **given)
        assert "\n" not in str(caught.value)
    for method in ("l1", MaskGenerator(groups)):
        with pytest.raises(BudgetError, match="cannot be reached") as caught:
            prune(model, groups, method=method, data=data, budget=Budget(macs=0.001))
        smallest = caught.value.smallest
        assert 0.001 < smallest < 0.5
        plan = prune(model, groups, method=method, data=data, budget=Budget(macs=smallest + 1e-6))
        assert abs(plan.ratios["macs"] - smallest) <= 1e-5


# ---- are the masks the data's?


def owned(place):
    """Scores that like the channels of one world."""
    _, groups, _, owners = worlds.two_worlds()
    spread = torch.Generator().manual_seed(place)
    return {
        name: (owner == place % 2).float() + 0.1 * torch.rand(len(owner), generator=spread)
        for name, owner in zip(groups.widths(), owners, strict=True)
    }


def numbered(data, world):
    return Examples(data.x, data.y + 4 * world, tuple("abcdefgh"), data.name)


def three_sets():
    _, _, data, _ = worlds.two_worlds()
    sets, only = {}, {}
    for name, world, start in (("first", 0, 0), ("second", 1, 0), ("third", 0, 120)):
        part = numbered(data[world].rows(slice(start, start + 120)), world)
        sets[name] = part.rows(slice(0, 80)), part.rows(slice(80, 120))
        only[name] = list(range(4 * world, 4 * world + 4))
    return sets, only


@pytest.mark.parametrize("keep_head", [True, False])
def test_the_numbers_are_those_of_a_computation_by_hand(keep_head):
    net, groups, _, _ = worlds.two_worlds()
    sets, only = three_sets()
    scores = {"first": owned(0), "second": owned(1), "third": owned(2)}
    found = adaptivity(
        net, groups, scores, sets, 0.4, baselines=("l1", "random", "act"), draws=3, keep_head=keep_head,
        classes=only if keep_head else None, seed=4,
    )  # fmt: skip
    cost = CostModel.macs(net, groups, sets["first"][0].x[:1])
    keeps = {name: select(own, cost, 0.4) for name, own in scores.items()}
    random = torch.Generator().manual_seed(4)

    def judged(keep, name):
        small = cut(net, groups, keep)
        if not keep_head:
            small = with_head(small, sets[name][0])
        return accuracy(small, sets[name][1], classes=only[name] if keep_head else None)

    for name in sets:
        assert same(found.keep[name], keeps[name])
        widths = {group: int(mask.sum()) for group, mask in keeps[name].items()}
        assert found.accuracy[name]["dense"] == judged({}, name)
        assert found.accuracy[name]["own"] == judged(keeps[name], name)
        for other in sets:
            wanted = judged(widths_like(scores[other], widths), name)
            assert found.swapped[name][other] == wanted
        others = [found.swapped[name][other] for other in sets if other != name]
        assert found.accuracy[name]["other"] == sum(others) / 2
        scored = net if keep_head else with_head(net, sets[name][0])
        for baseline, times in (("l1", 1), ("random", 3), ("act", 1)):
            values = [
                judged(widths_like(SCORERS[baseline](scored, groups, sets[name][0], random), widths), name)
                for _ in range(times)
            ]
            assert abs(found.accuracy[name][baseline] - sum(values) / times) <= 1e-12
    assert set(found.overlaps) == set(itertools.combinations(sets, 2))
    for (a, b), each in found.overlaps.items():
        assert each == overlap(keeps[a], keeps[b])
    values = [value for each in found.overlaps.values() for value in each.values()]
    assert abs(found.mean_overlap - sum(values) / len(values)) <= 1e-12
    assert not found.ignored
    lines = found.table().splitlines()
    assert len(lines) == 4
    assert lines[0].split() == ["dense", "own", "other", "l1", "random", "act"]
    for line, name in zip(lines[1:], sets, strict=True):
        assert line.split() == [name, *(f"{100 * value:.1f}" for value in found.accuracy[name].values())]


def test_one_mask_for_all_data_is_no_adaptation():
    net, groups, _, _ = worlds.two_worlds()
    sets, _ = three_sets()
    found = adaptivity(net, groups, dict.fromkeys(sets, owned(0)), sets, 0.4, baselines=())
    assert found.mean_overlap == 1.0
    assert found.ignored
    assert all(row["own"] == row["other"] for row in found.accuracy.values())
    alone = adaptivity(net, groups, {"first": owned(0)}, {"first": sets["first"]}, 0.4, baselines=())
    assert alone.accuracy["first"]["other"] != alone.accuracy["first"]["other"]
    assert not alone.ignored
    nearly = {("a", "b"): {"0": 0.96, "2": 0.93}}
    assert not Adaptivity({}, {}, nearly, {}).ignored
    assert Adaptivity({}, {}, {("a", "b"): {"0": 0.97, "2": 0.94}}, {}).ignored


@pytest.mark.usefixtures("unchecked")
def test_a_trained_generator_adapts_and_a_dead_one_is_told_of():
    net, groups, _, owners = worlds.two_worlds()
    sets, only = three_sets()
    generator, *_ = worlds.trained()
    pair = {name: sets[name] for name in ("first", "second")}

    def judged(by):
        return adaptivity(
            net,
            groups,
            by,
            pair,
            0.4,
            baselines=("random", "l1"),
            draws=4,
            keep_head=True,
            classes=only,
            masks=3,
        )

    found = judged(generator)
    assert not found.ignored
    assert found.mean_overlap < 0.2
    for world, name in enumerate(pair):
        row = found.accuracy[name]
        assert row["own"] >= row["other"] + 0.2
        assert row["own"] > row["random"]
        for owner, keep in zip(owners, found.keep[name].values(), strict=True):
            assert float((owner[keep] == world).float().mean()) >= 0.9
    dead = judged(worlds.dead(groups))
    assert dead.ignored
    assert dead.mean_overlap == 1.0
    assert same(dead.keep["first"], dead.keep["second"])
    free = judged(MaskGenerator(groups, head="free"))
    assert free.ignored


def test_statistics_are_those_of_the_data_where_asked():
    model, groups = single("vgg")
    train, test = examples(60, offset=1.0), examples(30, seed=1, offset=1.0)
    scores = {n: torch.rand(w, generator=torch.Generator().manual_seed(w)) for n, w in groups.widths().items()}
    before = copy.deepcopy(model.state_dict())
    found = {
        recalibrate: adaptivity(
            model, groups, {"a": scores}, {"a": (train, test)}, 0.5, baselines=(), recalibrate=recalibrate, seed=2
        ).accuracy["a"]["own"]
        for recalibrate in (True, False)
    }
    keep = select(scores, CostModel.macs(model, groups, train.x[:1]), 0.5)
    small = cut(model, groups, keep)
    assert found[False] == accuracy(with_head(small, train), test)
    assert found[True] == accuracy(with_head(recalibrate_bn(small, train, seed=2), train), test)
    assert same(before, model.state_dict())


@pytest.mark.usefixtures("unchecked")
def test_no_data_set_is_refused():
    net, groups, _, _ = worlds.two_worlds()
    with pytest.raises(InputError, match="sets: give at least one data set"):
        adaptivity(net, groups, {}, {}, 0.4)
    sets, _ = three_sets()
    wrong = examples(shape=(5,))
    for pair in ((wrong, wrong), (sets["first"][0], wrong)):
        with pytest.raises(DataError, match="takes 12 features"):
            adaptivity(net, groups, {"a": owned(0)}, {"a": pair}, 0.4)
    with pytest.raises(BudgetError):
        adaptivity(net, groups, {"a": owned(0)}, {"a": sets["first"]}, 0.001)
