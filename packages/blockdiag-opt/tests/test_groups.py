"""Groups follow the layers, plans count what the optimizer really holds, and a probe finds correlated weights."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from blockdiag_opt import BlockAdam, BlockRMSprop, block_groups, discover_groups, lay_out, native, partition, plan
from blockdiag_opt.groups import cluster
from blockdiag_opt.tasks import correlated
from shared_core.errors import InputError


def seeded(make, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 12)
        self.lstm = nn.LSTM(12, 5)
        self.cell = nn.GRUCell(5, 5)
        self.conv = nn.Conv2d(3, 4, 3)
        self.point = nn.Conv2d(4, 6, 1)
        self.wide = nn.Conv1d(2, 3, 7)
        self.up = nn.ConvTranspose2d(6, 8, 3)
        self.up1 = nn.ConvTranspose2d(6, 8, 1)
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 9)


def layouts(groups):
    found = {}
    for group in groups:
        own = group.get("blocks") or [None] * len(group["params"])
        for (name, param), blocks in zip(group["params"], own, strict=True):
            found[name] = lay_out(param.shape, group["grouping"], group["block_size"], blocks, name)
    return found


@pytest.mark.parametrize(
    ("grouping", "expected"),
    [
        ("auto", {"embed.weight": "output", "lstm.weight_ih_l0": "output", "cell.weight_hh": "output",
                  "conv.weight": "filter", "point.weight": "output", "wide.weight": "filter", "up.weight": "filter",
                  "up1.weight": "input", "norm.weight": "diag", "head.weight": "output", "head.bias": "diag"}),
        ("paper", {"embed.weight": "output", "lstm.weight_ih_l0": "output", "lstm.weight_hh_l0": "output",
                   "cell.weight_ih": "output", "conv.weight": "filter", "point.weight": "diag", "wide.weight": "diag",
                   "up.weight": "filter", "up1.weight": "diag", "norm.weight": "diag", "head.weight": "input"}),
        ("output", {"up.weight": "input", "conv.weight": "output", "head.weight": "output", "embed.weight": "output"}),
        ("input", {"up.weight": "output", "conv.weight": "input", "head.weight": "input", "embed.weight": "output"}),
        ("diag", {"embed.weight": "diag", "conv.weight": "diag", "head.weight": "diag"}),
    ],
)  # fmt: skip
def test_each_layer_is_cut_its_own_way(grouping, expected):
    found = layouts(block_groups(Mixed(), block_size=4, grouping=grouping))
    assert {name: found[name].kind for name in expected} == expected


def test_a_block_of_a_pointwise_transposed_convolution_leads_into_one_unit():
    model = Mixed()
    layout = layouts(block_groups(model, block_size=6))["up1.weight"]
    # Its weight is (in, out, 1, 1): mark every element with its output unit.
    unit = torch.arange(8.0).expand(6, 8)[..., None, None]
    blocks = partition(unit.contiguous(), layout)
    assert blocks.shape == (8, 6)
    assert torch.equal(blocks, torch.arange(8.0)[:, None].expand(8, 6))


def test_equal_settings_share_a_group_and_every_parameter_is_there_once():
    model = Mixed()
    groups = block_groups(model, block_size=4)
    names = [name for group in groups for name, _ in group["params"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    # What leads into a unit of the 1 x 1 transposed convolution is a column; everything else is as "auto" has it.
    assert len(groups) == 2
    optimizer = BlockAdam(groups, lr=1e-3)
    assert {name for group in optimizer.param_groups for name in group["param_names"]} == set(names)


def test_later_overrides_win_and_carry_any_setting():
    model = nn.Sequential(nn.Linear(20, 8), nn.Linear(8, 4))
    groups = block_groups(
        model, overrides={"*": {"lr": 0.5}, "1.*": {"block_size": 1, "lr": 0.25}, "1.bias": {"lr": 0.1}}
    )
    settings = {name: (group["lr"], group["block_size"]) for group in groups for name, _ in group["params"]}
    assert settings == {"0.weight": (0.5, 10), "0.bias": (0.5, 10), "1.weight": (0.25, 1), "1.bias": (0.1, 1)}
    optimizer = BlockAdam(groups, lr=1e-3)
    assert sorted(group["lr"] for group in optimizer.param_groups) == [0.1, 0.25, 0.5]


def test_an_override_that_names_an_embedding_is_taken_literally():
    found = layouts(block_groups(Mixed(), block_size=4, overrides={"embed.*": {"grouping": "input"}}))
    assert found["embed.weight"].kind == "input"


def test_tied_frozen_and_parametrized_parameters():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(6, 8)
            self.body = nn.Linear(8, 8)
            self.head = nn.Linear(8, 6, bias=False)
            self.head.weight = self.embed.weight
            self.body.bias.requires_grad_(False)

    groups = block_groups(Tied(), overrides={"head.weight": {"block_size": 2}})
    sizes = {name: group["block_size"] for group in groups for name, _ in group["params"]}
    # The pattern names the tensor by its second name.
    assert sizes == {"embed.weight": 2, "body.weight": 10}
    normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    assert layouts(block_groups(normed, grouping="paper"))["parametrizations.weight.original1"].kind == "filter"


def test_explicit_blocks_train_like_the_grouping_they_spell_out():
    index = torch.arange(24).view(4, 2, 3).reshape(-1, 3)
    runs = []
    for options in ({"block_size": 3}, {"blocks": {"weight": index}}):
        layer = seeded(lambda: nn.Linear(6, 4))
        optimizer = BlockAdam(block_groups(layer, **options), lr=0.1)
        x = torch.linspace(-1, 1, 18).view(3, 6)
        for _ in range(5):
            optimizer.zero_grad()
            layer(x).square().sum().backward()
            optimizer.step()
        runs.append(layer.weight.detach().clone())
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"overrides": {"heads.*": {"block_size": 1}}}, ["heads.*", "head."]),
        ({"blocks": {"head.weigth": torch.zeros(1, 1, dtype=torch.long)}}, ["head.weigth", "'head.weight'"]),
        ({"blocks": {"head.weight": torch.zeros(1, 2, dtype=torch.long)}}, ["head.weight", "twice"]),
        ({"grouping": "columns"}, ["columns", "output"]),
        ({"block_size": 0}, ["block_size", "0"]),
        ({"overrides": {"head.*": {"block_size": 0}}}, ["head.weight", "block_size"]),
    ],
)
def test_what_cannot_be_is_named(options, words):
    with pytest.raises(InputError) as caught:
        block_groups(Mixed(), **options)
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)


def test_lazy_and_frozen_models_are_refused():
    with pytest.raises(InputError, match=r"'0\.weight'.*lazy.*batch"):
        block_groups(nn.Sequential(nn.LazyLinear(3)))
    with pytest.raises(InputError, match="no trainable"):
        block_groups(nn.Linear(2, 2).requires_grad_(False))


# ---- plan


def held(optimizer):
    return sum(value.numel() * value.element_size() for state in optimizer.state.values() for value in state.values())


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (BlockAdam, {}),
        (BlockAdam, {"update_interval": 3}),
        (BlockAdam, {"amsgrad": True}),
        (BlockAdam, {"state_dtype": torch.float64}),
        (BlockAdam, {"block_size": 3, "grouping": "paper"}),
        (BlockRMSprop, {}),
        (BlockRMSprop, {"momentum": 0.9}),
    ],
)
def test_the_state_is_as_large_as_planned(kind, options):
    model = nn.Sequential(nn.Linear(23, 11), nn.Conv1d(2, 3, 3))
    optimizer = kind(model.parameters(), **options)
    expected = plan(optimizer, measure=False)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert expected.state_bytes == held(optimizer)
    adam = torch.optim.Adam(model.parameters())
    adam.step()
    assert expected.adam_bytes == held(adam)


def test_a_plan_adds_up_and_says_what_would_be_cheaper():
    model = nn.Sequential(nn.Linear(300, 100), nn.Linear(100, 10))
    found = plan(model, measure=False)
    assert [row.name for row in found.rows] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert sum(row.share for row in found.rows) == pytest.approx(1)
    assert found.total_ms >= sum(row.ms for row in found.rows)
    first = found.rows[0]
    assert {way.change for way in first.cheaper} == {"update_interval=10", "block_size=5", 'grouping="diag"'}
    assert all(way.ms < first.ms for way in first.cheaper)
    # What it recommends costs what it says when it is planned itself.
    half = plan(model, block_size=5, measure=False).rows[0]
    ways = {way.change: way for way in first.cheaper}
    assert (half.ms, half.state_bytes) == (ways["block_size=5"].ms, ways["block_size=5"].state_bytes)
    assert found.rows[1].cheaper == ()
    assert json.loads(json.dumps(found.to_dict()))["rows"][0]["name"] == "0.weight"


def test_the_table_is_aligned():
    lines = str(plan(nn.Sequential(nn.Linear(300, 100), nn.Linear(100, 10)), measure=False)).splitlines()
    rows = lines[2:6]
    assert [row.split()[0] for row in rows] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert len({row.index("output") if "output" in row else row.index("diag") for row in rows}) == 1
    assert len({len(row) for row in rows}) == 1
    assert lines[7].startswith("total")


def test_larger_blocks_and_more_decompositions_cost_more():
    model = nn.Linear(640, 50)
    assert plan(model, block_size=2, measure=False).total_ms < plan(model, block_size=64, measure=False).total_ms / 5
    assert plan(model, update_interval=20, measure=False).total_ms < plan(model, measure=False).total_ms
    if native.load() is not None:
        assert plan(model, measure=False).total_ms < plan(model, engine="torch", measure=False).total_ms / 2


@pytest.mark.parametrize("options", [{}, {"update_interval": 4}, {"engine": "torch"}])
def test_measurements_are_remembered(options, monkeypatch):
    # On a busy machine the time for measuring could end within the first plan, and the second would measure the rest.
    monkeypatch.setattr("blockdiag_opt.groups._BUDGET_SECONDS", math.inf)
    model = nn.Linear(64, 50)
    found = plan(model, **options)
    assert found.measured
    assert all(row.ms > 0 for row in found.rows)
    assert plan(model, **options).to_dict() == found.to_dict()


def test_when_the_time_to_measure_is_over_the_stored_model_answers(monkeypatch):
    monkeypatch.setattr("blockdiag_opt.groups._BUDGET_SECONDS", -1.0)
    monkeypatch.setattr("blockdiag_opt.groups._overhead", lambda machine, engine: (40.0, 15.0))
    model = nn.Linear(64, 50)
    assert plan(model).total_ms == plan(model, measure=False).total_ms


def test_plans_take_groups_bare_parameters_and_optimizers():
    layer = nn.Linear(30, 4)
    optimizer = BlockAdam(layer.parameters(), block_size=5)
    sizes = [
        plan(layer, block_size=5, measure=False).rows[0].block_size,
        plan(block_groups(layer, block_size=5), measure=False).rows[0].block_size,
        plan(list(layer.parameters()), block_size=5, measure=False).rows[0].block_size,
        plan(layer.named_parameters(), block_size=5, measure=False).rows[0].block_size,
        plan(optimizer, measure=False).rows[0].block_size,
    ]
    assert sizes == [5] * 5
    with pytest.raises(InputError, match="no parameters"):
        plan([], measure=False)


def test_a_plan_warns(monkeypatch):
    monkeypatch.setattr("blockdiag_opt.groups.native.load", lambda: None)
    monkeypatch.setattr("blockdiag_opt.groups.native.reason", lambda: "no C compiler found")
    monkeypatch.setattr("blockdiag_opt.groups._free_memory", lambda device: 1000)
    found = plan(nn.Linear(100, 10), block_size=50, measure=False)
    assert found.engine == "torch"
    assert [any(word in warning for warning in found.warnings) for word in ("<= 32", "free", "no C compiler")] == [
        True
    ] * 3
    assert found.warnings[0] in str(found)


# ---- discovery


def captured(similarity, groups):
    return sum(float(similarity[i, j]) for group in groups for i in group if i >= 0 for j in group if j >= 0 and i != j)


def test_clusters_equal_brute_force():
    from itertools import combinations

    random = np.random.default_rng(3)
    for _ in range(20):
        root = random.random((6, 6))
        similarity = (root + root.T) / 2
        best = 0.0
        for first in combinations(range(1, 6), 2):
            group = {0, *first}
            best = max(best, captured(similarity, [sorted(group), sorted(set(range(6)) - group)]))
        found = cluster(torch.from_numpy(similarity), 3)
        # A local optimum, which swaps of single pairs make the global one almost always, and never far from it.
        assert captured(similarity, found.tolist()) >= 0.97 * best


@pytest.mark.parametrize(("d", "size"), [(1, 3), (7, 3), (10, 10), (13, 4), (12, 5), (9, 1)])
def test_clusters_are_balanced_and_complete(d, size):
    root = torch.rand(d, d, generator=torch.Generator().manual_seed(d))
    groups = cluster(root + root.T, size)
    sizes = (groups >= 0).sum(1)
    assert groups.shape[0] == -(-d // size)
    assert int(sizes.max()) <= size
    assert int(sizes.max() - sizes.min()) <= 1
    assert sorted(groups[groups >= 0].tolist()) == list(range(d))


def planted(order, seed, outputs=5, groups=6, size=4):
    """Batches of a regression whose features share a factor in groups, in some order."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, groups * size, generator=random)
    for _ in range(60):
        factor = torch.randn(32, groups, 1, generator=random)
        x = (factor + 0.7 * torch.randn(32, groups, size, generator=random)).flatten(1)[:, order]
        yield x, x @ weight.T


def squares(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("lr", [0.0, 1e-3])
def test_planted_groups_are_found(per_row, lr):
    order = torch.randperm(24, generator=torch.Generator().manual_seed(9))
    truth = {frozenset((order // 4 == group).nonzero().flatten().tolist()) for group in range(6)}
    model = seeded(lambda: nn.Linear(24, 5, bias=False))
    before = model.weight.detach().clone()
    state = torch.random.get_rng_state()
    groups = discover_groups(model, planted(order, 1), squares, block_size=4, steps=60, per_row=per_row, lr=lr)
    assert torch.equal(model.weight, before)
    assert model.weight.grad is None
    assert torch.equal(torch.random.get_rng_state(), state)
    blocks = groups[0]["blocks"][0]
    assert blocks.shape == (30, 4)
    rows = [{frozenset((block % 24).tolist()) for block in blocks if int(block[0]) // 24 == row} for row in range(5)]
    assert all((blocks // 24 == blocks[:, :1] // 24).all(1))
    share = sum(len(row & truth) for row in rows) / 30
    # One row alone has a fifth of the gradients to go by.
    assert share == 1 if not per_row else share > 0.6


def test_input_wise_groups_lie_in_columns():
    # Two output units of each pair have the same targets up to a little noise: their errors are correlated.
    model = seeded(lambda: nn.Linear(3, 6, bias=False))
    nn.init.zeros_(model.weight)
    random = torch.Generator().manual_seed(4)
    batches = []
    for _ in range(50):
        y = torch.randn(32, 3, generator=random)
        batches.append((torch.randn(32, 3, generator=random), torch.cat([y, y], 1)))
    groups = discover_groups(model, batches, squares, block_size=2, grouping="input")
    blocks = groups[0]["blocks"][0]
    assert blocks.shape == (9, 2)
    assert torch.equal(blocks % 3, (blocks % 3)[:, :1].expand(9, 2))
    assert {tuple(sorted((block // 3).tolist())) for block in blocks} == {(0, 3), (1, 4), (2, 5)}


def test_other_tensors_keep_their_grouping_and_overrides_hold():
    model = seeded(
        lambda: nn.Sequential(nn.Conv1d(1, 2, 3, padding=1), nn.Flatten(), nn.Linear(24, 12), nn.Linear(12, 9))
    )
    batches = [torch.randn(8, 1, 12, generator=torch.Generator().manual_seed(k)) for k in range(6)]
    groups = discover_groups(
        model,
        batches,
        lambda model, x: model(x).square().mean(),
        block_size=4,
        steps=6,
        overrides={"3.*": {"block_size": 1}},
    )
    found = layouts(groups)
    kinds = {name: (layout.kind, layout.n) for name, layout in found.items() if name.endswith("weight")}
    assert kinds == {"0.weight": ("filter", 3), "2.weight": ("blocks", 4), "3.weight": ("diag", 1)}
    BlockAdam(groups)


def test_a_probe_that_cannot_work_says_why():
    model, x = nn.Linear(4, 2), torch.ones(3, 4)
    with pytest.raises(InputError, match="saw 2 batches"):
        discover_groups(model, [x, x], lambda model, x: model(x).mean(), block_size=2)
    with pytest.raises(InputError, match="not finite in 'weight' at step 1"):
        discover_groups(model, [x] * 5, lambda model, x: (model(x) / 0).mean(), block_size=2)
    with pytest.raises(InputError, match="steps"):
        discover_groups(model, [x] * 5, lambda model, x: model(x).mean(), steps=2)


@pytest.mark.claims
def test_discovery_restores_what_a_permutation_of_features_destroys():
    aligned, permuted = correlated(), correlated(permuted=True)

    def risk(task, params, model, lr, seed):
        optimizer = BlockAdam(params, lr=lr)
        for step, batch in enumerate(task.batches(seed + 100, task.steps)):
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 - step / task.steps)
            optimizer.zero_grad()
            task.loss(model, batch).backward()
            optimizer.step()
        return task.evaluate(model)["relative excess risk"]

    for seed in range(3):
        best = risk(aligned, block_groups(model := aligned.build(seed)), model, 0.1, seed)
        model = permuted.build(seed)
        probed = discover_groups(model, permuted.batches(seed, 50), permuted.loss)
        assert risk(permuted, probed, model, 0.1, seed) <= 2 * best
        blind = min(
            risk(permuted, block_groups(model := permuted.build(seed)), model, lr, seed) for lr in (0.3, 0.6, 1.0)
        )
        assert best <= 0.2 * blind
