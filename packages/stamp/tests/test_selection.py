from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from shared_core.errors import InputError
from stamp.counting import CostModel
from stamp.groups import trace
from stamp.selection import Budget, BudgetError, ScoresError, normalised, overlap, select, widths_like
from stamp.surgery import cut


def twenty():
    """Twenty channels, in groups of 8 and 12."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Conv2d(12, 5, 1))
    x = torch.rand(1, 3, 8, 8)
    return net, trace(net, x), x


def random_scores(widths, seed, ties=False):
    generator = torch.Generator().manual_seed(seed)
    scores = {name: torch.rand(width, generator=generator) for name, width in widths.items()}
    return {name: (own * 4).floor() / 4 for name, own in scores.items()} if ties else scores


def guarded(scores, entered, least, multiple):
    """The best of each group in plain Python: as many as entered, with the guards of the specification."""
    keep = {}
    for name, own in scores.items():
        floor = max(1, math.ceil(least * len(own))) if isinstance(least, float) else min(least, len(own))
        count = max(floor, sum(group == name for group, _ in entered))
        if count // multiple * multiple >= floor:
            count = count // multiple * multiple
        best = sorted(range(len(own)), key=lambda c: (-float(own[c]), c))[:count]
        keep[name] = torch.tensor([c in best for c in range(len(own))])
    return keep


def ranking(scores):
    every = [(name, c) for name, own in scores.items() for c in range(len(own))]
    return sorted(every, key=lambda at: -float(scores[at[0]][at[1]]))


def same(a, b):
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


class Counting:
    """A cost that counts how often it is asked, and of which nothing else is known; it remembers its answers."""

    def __init__(self, cost) -> None:
        self.cost, self.asked, self.known = cost, 0, {}

    def exact(self, keep) -> float:
        self.asked += 1
        key = tuple(mask.numpy().tobytes() for mask in keep.values())
        if key not in self.known:
            self.known[key] = float(self.cost.exact(keep))
        return self.known[key]


@pytest.mark.usefixtures("unchecked")  # for speed: shapes are checked by the others
@pytest.mark.parametrize("kind", ["macs", "parameters"])
@pytest.mark.parametrize(("least", "multiple"), [(0.05, 1), (3, 1), (0.3, 2), (1, 4), (5, 4)])
def test_a_budget_keeps_what_brute_force_over_all_thresholds_keeps(kind, least, multiple):
    net, groups, x = twenty()
    cost = CostModel.macs(net, groups, x) if kind == "macs" else CostModel.parameters(net, groups)
    dense = cost.exact({})
    for seed in range(12):
        scores = random_scores(groups.widths(), seed)
        budget = 0.2 + 0.8 * float(torch.rand((), generator=torch.Generator().manual_seed(seed)))
        choices = []
        for threshold in [-1.0, *(float(s) for own in scores.values() for s in own)]:
            entered = [at for at in ranking(scores) if float(scores[at[0]][at[1]]) > threshold]
            keep = guarded(scores, entered, least, multiple)
            choices.append((threshold, keep, cost.exact(keep) / dense))
        fits = [(threshold, keep) for threshold, keep, ratio in choices if ratio <= budget]
        if not fits:
            with pytest.raises(BudgetError) as caught:
                select(scores, cost, budget, min_channels=least, round_to=multiple)
            assert caught.value.smallest == min(ratio for *_, ratio in choices)
            continue
        _, best = min(fits, key=lambda found: found[0])
        assert same(select(scores, cost, budget, min_channels=least, round_to=multiple), best)


def test_equal_scores_enter_one_by_one_in_the_order_of_groups_and_channels():
    net, groups, x = twenty()
    cost = CostModel.macs(net, groups, x)
    for seed in range(20):
        scores = random_scores(groups.widths(), seed, ties=True)
        budget = 0.2 + 0.04 * seed
        every = ranking(scores)
        heads = (guarded(scores, every[:n], 0.05, 1) for n in range(len(every), -1, -1))
        best = next(keep for keep in heads if cost.exact(keep) <= budget * cost.exact({}))
        assert same(select(scores, cost, budget), best)
        backwards = dict(reversed(scores.items()))
        assert same(dict(reversed(select(backwards, cost, budget).items())), best)


@pytest.mark.usefixtures("unchecked")  # for speed: annotations are checked elsewhere
@pytest.mark.parametrize("mode", ["budget", "efficiency"])
def test_smaller_budgets_keep_subsets_and_every_budget_holds(mode):
    model, x, groups = zoo.traced("vgg")
    cost = CostModel.macs(model, groups, x)
    remembered = Counting(cost)
    scores = random_scores(groups.widths(), 0)
    generator = torch.Generator().manual_seed(1)
    before = None
    budgets = (0.1 + 0.9 * torch.rand(1000 if mode == "budget" else 60, generator=generator)).sort().values.tolist()
    for budget in budgets:
        keep = select(scores, remembered if mode == "budget" else cost, budget, mode=mode)
        assert cost.exact(keep) / cost.exact({}) <= budget
        if before is not None:
            assert all(bool((before[name] <= keep[name]).all()) for name in keep)
        before = keep


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    budget=st.floats(0.01, 1.0),
    least=st.one_of(st.integers(1, 9), st.floats(0.0, 1.0)),
    multiple=st.integers(1, 6),
    mode=st.sampled_from(["budget", "efficiency"]),
    ties=st.booleans(),
)
def test_guards_and_budget_hold_together(seed, budget, least, multiple, mode, ties):
    net, groups, x = twenty()
    cost = CostModel.macs(net, groups, x)
    scores = random_scores(groups.widths(), seed, ties)
    choose = partial(select, scores, cost, mode=mode, min_channels=least, round_to=multiple)
    smallest = cost.exact(guarded(scores, [], least, 1)) / cost.exact({})
    if smallest > budget:
        with pytest.raises(BudgetError) as caught:
            choose(budget)
        assert caught.value.smallest == smallest
        budget = smallest
    keep = choose(budget)
    assert cost.exact(keep) / cost.exact({}) <= budget
    for name, mask in keep.items():
        width, kept = len(mask), int(mask.sum())
        floor = max(1, math.ceil(least * width)) if isinstance(least, float) else min(least, width)
        assert kept >= floor
        assert kept % multiple == 0 or kept // multiple * multiple < floor
        assert float(scores[name][mask].min()) >= float(scores[name][~mask].max() if kept < width else -1)


def test_a_budget_asks_for_few_costs():
    model, x, groups = zoo.traced("bottleneck")
    channels = sum(groups.widths().values())
    cost = Counting(CostModel.macs(model, groups, x))
    select(random_scores(groups.widths(), 0), cost, 0.3)
    assert cost.asked <= 3 + math.ceil(math.log2(channels))


def greedy(scores, cost, budget, least):
    """Remove the channel of least score per multiply-add, whichever it is, as long as it takes."""
    keep = {name: torch.ones(len(own), dtype=torch.bool) for name, own in scores.items()}
    while cost.exact(keep) / cost.exact({}) > budget:
        found = []
        for name, c in itertools.chain.from_iterable([(name, c) for c in range(len(keep[name]))] for name in keep):
            if keep[name][c] and int(keep[name].sum()) > least:
                without = keep[name].clone()
                without[c] = False
                marginal = cost.exact(keep) - cost.exact(keep | {name: without})
                found.append((float(scores[name][c]) / marginal, -len(found), name, c))
        *_, name, c = min(found)
        keep[name][c] = False
    return keep


@pytest.mark.usefixtures("unchecked")  # for speed: shapes are checked by the others
@pytest.mark.parametrize("name", ["vgg", "mobilenet", "nested-cat"])
@pytest.mark.parametrize("known", [True, False])
def test_efficiency_equals_a_plain_greedy_removal(name, known):
    model, x, groups = zoo.traced(name)
    cost = CostModel.macs(model, groups, x)
    scores = {name: own.double() for name, own in random_scores(groups.widths(), 3, ties=name == "vgg").items()}
    scores = {name: own + 0.25 for name, own in scores.items()}
    for budget in (0.8, 0.3):
        keep = select(scores, cost if known else Counting(cost), budget, mode="efficiency", min_channels=1)
        assert same(keep, greedy(scores, cost, budget, 1))


def test_efficiency_knows_channels_of_one_group_that_cost_unlike_amounts():
    generator = torch.Generator().manual_seed(0)
    entries = torch.randint(1, 4, (2, 3, 14), generator=generator).double()
    entries[0, :2, :8] = 0
    entries[1, 1:, 8:] = 0
    fixed = torch.ones(3, dtype=torch.float64)
    cost = CostModel(("a", "b"), (8, 6), torch.tensor([3.0, 5.0, 2.0]).double(), entries[0], entries[1], fixed, fixed)
    scores = {name: own.double() for name, own in random_scores({"a": 8, "b": 6}, 1).items()}
    for budget in (0.9, 0.6, 0.3, 0.2):
        assert same(
            select(scores, cost, budget, mode="efficiency", min_channels=1), greedy(scores, cost, budget, least=1)
        )
    part = {"b": scores["b"]}
    assert same(select(part, cost, 0.7, mode="efficiency", min_channels=1), greedy(part, cost, 0.7, least=1))


def test_efficiency_prefers_dear_channels_to_be_removed():
    net, groups, x = twenty()
    cost = CostModel.macs(net, groups, x)
    even = {name: torch.ones(width) for name, width in groups.widths().items()}
    dense, budget = cost.exact({}), 0.5
    by_cost = select(even, cost, budget, mode="efficiency", min_channels=1)
    by_order = select(even, cost, budget, min_channels=1)
    assert sum(int(mask.sum()) for mask in by_cost.values()) > sum(int(mask.sum()) for mask in by_order.values())
    assert cost.exact(by_cost) <= budget * dense


def test_the_smallest_ratio_is_that_of_the_guards_alone():
    net, groups, x = twenty()
    cost = CostModel.macs(net, groups, x)
    scores = random_scores(groups.widths(), 0)
    least = {"0": 4, "2": 6}
    for mode in ("budget", "efficiency"):
        with pytest.raises(BudgetError, match=r"budget=0\.1 cannot be reached: with min_channels=0\.5") as caught:
            select(scores, cost, 0.1, mode=mode, min_channels=0.5)
        assert caught.value.smallest == cost.exact(widths_like(scores, least)) / cost.exact({})
        assert "\n" not in str(caught.value)
        assert same(
            select(scores, cost, caught.value.smallest, mode=mode, min_channels=0.5), widths_like(scores, least)
        )


def test_a_threshold_keeps_what_lies_above_it():
    net, groups, x = twenty()
    cost = CostModel.macs(net, groups, x)
    scores = random_scores(groups.widths(), 5)
    keep = select(scores, cost, 1.0, mode="threshold", threshold=0.6)
    assert all(torch.equal(keep[name], scores[name] > 0.6) for name in scores)
    none = select(scores, cost, 1.0, mode="threshold", threshold=2.0, min_channels=2)
    assert same(none, widths_like(scores, dict.fromkeys(scores, 2)))
    rounded = select(scores, cost, 1.0, mode="threshold", threshold=0.0, round_to=5, multiples={"0": 3})
    assert {name: int(mask.sum()) for name, mask in rounded.items()} == {"0": 6, "2": 10}


def test_what_is_kept_can_be_cut_and_groups_without_scores_stay_whole():
    net, groups, x = twenty()
    cost = CostModel.macs(net, groups, x)
    keep = select({"2": random_scores(groups.widths(), 0)["2"]}, cost, 0.5)
    assert list(keep) == ["2"]
    small = cut(net, groups, keep)
    assert small[0].out_channels == 8
    assert small[2].out_channels == int(keep["2"].sum()) < 12


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        ({"0": torch.ones(8), "2": torch.full((12,), torch.nan)}, {}, r"scores\['2'\] is NaN at channel 0 \(of 12\)"),
        ({"4": torch.ones(5)}, {}, r"scores of \['4'\]: frozen, or no groups; those that may be cut are \['0', '2'\]"),
        ({"0": torch.ones(7)}, {}, r"scores\['0'\] are of 7 channels; the group has 8"),
        ({}, {}, "scores are of no group"),
        ({"0": torch.ones(8)}, {"multiples": {"2": 4}}, r"multiples names \['2'\]"),
        ({"0": torch.ones(8)}, {"multiples": {"0": 0}}, r"multiples\['0'\]=0 is no multiple"),
        ({"0": torch.ones(8)}, {"round_to": 0}, "round_to=0 is no multiple"),
        ({"0": torch.ones(8)}, {"min_channels": 0}, "min_channels=0 would leave a group without a channel"),
        ({"0": torch.ones(8)}, {"min_channels": 1.5}, r"min_channels=1\.5 is no fraction"),
        ({"0": -torch.ones(8)}, {"mode": "efficiency"}, r"scores\['0'\] has negative values"),
        ({"0": torch.ones(2, 4)}, {}, r"scores\['0'\] have shape \(2, 4\)"),
        ({"0": torch.ones(8)}, {"mode": "best"}, "mode='best' is none of"),
    ],
)
def test_what_cannot_be_chosen_by_is_refused_in_one_line(unchecked, scores, options, message):
    net, groups, x = twenty()
    with pytest.raises(ScoresError, match=message) as caught:
        select(scores, CostModel.macs(net, groups, x), 0.9, **options)
    assert isinstance(caught.value, InputError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("budget", [0.0, -0.1, 1.1, math.nan])
def test_a_budget_out_of_range_is_refused(budget):
    net, groups, x = twenty()
    with pytest.raises(BudgetError, match=r"in \(0, 1\]"):
        select({"0": torch.ones(8)}, CostModel.macs(net, groups, x), budget)
    with pytest.raises(BudgetError, match=r"macs=.*in \(0, 1\]"):
        Budget(macs=budget)


def test_a_budget_is_one_number():
    assert Budget(params=0.5).as_dict() == {"params": 0.5}
    assert Budget(latency=0.5).fraction(7.0) == 0.5
    assert Budget(latency_ms=3.0).fraction(12.0) == 0.25
    assert Budget(latency_ms=3.0).fraction(1.0) == 1.0
    with pytest.raises(BudgetError, match="it was given nothing"):
        Budget()
    with pytest.raises(BudgetError, match=r"it was given macs=0\.5 and params=0\.5"):
        Budget(macs=0.5, params=0.5)
    for value in (0.0, math.inf, math.nan):
        with pytest.raises(BudgetError, match=r"latency_ms=.* is no time"):
            Budget(latency_ms=value)


def test_normalised_scores_keep_order_and_sign_and_have_mean_magnitude_one():
    scores = {"a": torch.tensor([3.0, -1.0, 2.0]), "b": torch.zeros(4), "c": torch.tensor([1, 3])}
    found = normalised(scores)
    assert torch.equal(found["a"].argsort(), scores["a"].argsort())
    assert float(found["a"].abs().mean()) == pytest.approx(1.0)
    assert torch.equal(found["b"], scores["b"])
    assert float(found["c"].sum()) == pytest.approx(2.0)
    with pytest.raises(ScoresError, match=r"scores\['a'\] is NaN at channel 1 \(of 1\)"):
        normalised({"a": torch.tensor([1.0, math.nan])})


def test_widths_like_keeps_the_best():
    scores = random_scores({"a": 9, "b": 7}, 0)
    keep = widths_like(scores, {"b": 3, "a": 9})
    assert torch.equal(keep["b"], scores["b"] >= scores["b"].topk(3).values.min())
    assert bool(keep["a"].all())
    with pytest.raises(ScoresError, match=r"widths\['b'\] is 8; the group has 7 channels"):
        widths_like(scores, {"b": 8})
    with pytest.raises(ScoresError, match=r"widths\['c'\] has no scores"):
        widths_like(scores, {"c": 1})


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=12))
def test_overlap_is_that_of_sets(pairs):
    a, b = ({c for c, pair in enumerate(pairs) if pair[side]} for side in (0, 1))
    first, second = (torch.tensor([pair[side] for pair in pairs]) for side in (0, 1))
    found = overlap({"g": first}, {"g": second})["g"]
    assert found == (len(a & b) / len(a | b) if a | b else 1.0)
    assert found == overlap({"g": second}, {"g": first})["g"]
    assert overlap({"g": first}, {})["g"] == len(a) / len(pairs)


def test_choices_of_other_widths_cannot_be_compared(unchecked):
    with pytest.raises(ScoresError, match="has 3 channels in one choice and 2 in the other"):
        overlap({"g": torch.ones(3, dtype=torch.bool)}, {"g": torch.ones(2, dtype=torch.bool)})
