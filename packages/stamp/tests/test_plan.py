from __future__ import annotations

import copy
import json

import pytest
import torch
import zoo
from torch import nn

from shared_core.errors import InputError
from shared_core.testing import Program
from stamp.examples import Examples
from stamp.groups import trace
from stamp.networks import resnet20, smallconv, vit
from stamp.plan import PlanError, PrunePlan, SurgeryError, load, save_weights
from stamp.structure import Attribute, ChannelGroups, Group, Slot
from stamp.surgery import Masked, cut, masked
from stamp.training import head_name, recalibrate_bn, with_head


def zoo_plan(name, seed=0, **options):
    model, x, groups = zoo.traced(name)
    return model, x, PrunePlan(zoo.random_keep(groups, seed), groups, **options)


def gates_of(groups, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(width, generator=generator, dtype=torch.float64) for name, width in groups.widths().items()
    }


@pytest.fixture
def conv():
    model = smallconv(6, 1, channels=(6, 8), seed=2).eval()
    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    groups = trace(model, x)
    plan = PrunePlan(
        zoo.random_keep(groups, 1), groups, "l1", {"macs": 0.3}, {"macs": 0.29}, gates_of(groups), "10",
        gates_of(groups, 5), 0.25, ("one note",),
    )  # fmt: skip
    return model, x, plan


def same(first, second):
    a, b = first.state_dict(), second.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", zoo.ZOO)
def test_a_plan_from_a_file_cuts_every_architecture_as_the_plan_did(name, tmp_path):
    model, x, plan = zoo_plan(name)
    before = copy.deepcopy(model)
    small = plan.apply(model)
    assert same(model, before)
    assert same(small, cut(model, plan.groups, plan.keep))
    assert plan.check(model, small, x) <= 1e-10
    plan.save(tmp_path / "plan.json")
    loaded = PrunePlan.load(tmp_path / "plan.json")
    assert loaded.groups == plan.groups
    assert same(loaded.apply(model), small)
    save_weights(small, tmp_path / "small.safetensors")
    again = load(lambda: zoo.build(name, seed=1)[0], tmp_path / "plan.json", tmp_path / "small.safetensors")
    assert torch.equal(again(x), small(x))
    assert same(again, small)


@pytest.mark.parametrize("name", ["vgg", "resnet", "densenet", "mobilenet", "vit-torch", "unet"])
def test_soft_gates_are_folded_exactly(name):
    model, x, plan = zoo_plan(name)
    plan = PrunePlan(plan.keep, plan.groups, gates=gates_of(plan.groups))
    small = plan.apply(model, fold="soft")
    gates = {name: gate * plan.keep[name] for name, gate in plan.gates.items()}
    reference = Masked(model, plan.groups, gates)
    assert (small(x) - reference(x)).abs().max() <= 1e-10
    assert (small(x) - masked(model, plan.groups, plan.keep)(x)).abs().max() > 1e-4
    assert plan.check(model, small, x, fold="soft") <= 1e-10
    with pytest.raises(SurgeryError, match="differs"):
        plan.check(model, small, x)


def test_a_check_finds_wrong_weights_behind_a_new_head_too(conv):
    model, x, plan = conv
    for options in ({}, {"num_classes": 3}):
        small = plan.apply(model, **options)
        assert plan.check(model, small, x) <= 1e-5
        with torch.no_grad():
            small[4].weight[:, 0, 1, 1] += 0.1
        with pytest.raises(SurgeryError, match="differs from the masked one"):
            plan.check(model, small, x)
    with pytest.raises(SurgeryError):
        plan.check(model, plan.apply(smallconv(6, 1, channels=(6, 8), seed=3)), x)
    other = PrunePlan({"0": ~plan.keep["0"]}, plan.groups)
    with pytest.raises(SurgeryError, match="shapes"):
        plan.check(model, other.apply(model, num_classes=2), x)


def test_a_check_leaves_modes_and_statistics(conv):
    model, x, plan = conv
    model.train()
    small = plan.apply(model)
    statistics = model[1].running_mean.clone()
    plan.check(model, small, x)
    assert model.training
    assert small.training
    assert torch.equal(model[1].running_mean, statistics)


def test_the_head_is_replaced_by_class_means_or_afresh(conv):
    model, x, plan = conv
    data = Examples(torch.cat([x] * 3), torch.arange(12) % 4, tuple("abcd"))
    small = plan.apply(model, data=data)
    assert small(x).shape == (4, 4)
    # Examples 0..3 repeat, so that each is its class's mean.
    assert small(x).argmax(1).tolist() == [0, 1, 2, 3]
    assert same(plan.apply(model, data=(data.x, data.y)), small)
    fresh = plan.apply(model, num_classes=9)
    assert fresh(x).shape == (4, 9)
    assert same(fresh[:10], plan.apply(model)[:10])
    with pytest.raises(PlanError, match="num_classes: 5"):
        plan.apply(model, num_classes=5, data=data)


def test_statistics_are_recalibrated_before_the_head_is_made(conv):
    model, x, plan = conv
    data = Examples(torch.cat([x, x.flip(0)]), torch.arange(8) % 4, tuple("abcd"))
    expected = with_head(recalibrate_bn(plan.apply(model), data), data)
    assert same(plan.apply(model, data=data, recalibrate=True), expected)
    assert not same(plan.apply(model, data=data), expected)
    with pytest.raises(PlanError, match="needs data"):
        plan.apply(model, recalibrate=True)


def test_everything_comes_back_from_the_file(conv, tmp_path):
    model, x, plan = conv
    plan.save(tmp_path / "plan.json")
    loaded = PrunePlan.load(tmp_path / "plan.json")
    for name in ("keep", "scores", "gates"):
        before, after = getattr(plan, name), getattr(loaded, name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    for name in ("groups", "method", "budget", "ratios", "head", "seconds", "notes"):
        assert getattr(loaded, name) == getattr(plan, name)
    assert torch.equal(loaded.apply(model, fold="soft")(x), plan.apply(model, fold="soft")(x))
    assert loaded.widths() == {name: int(mask.sum()) for name, mask in plan.keep.items()}
    infinite = PrunePlan(plan.keep, plan.groups, scores={"0": torch.tensor([1.0, float("inf"), *[-float("inf")] * 4])})
    infinite.save(tmp_path / "plan.json")
    assert torch.equal(PrunePlan.load(tmp_path / "plan.json").scores["0"], infinite.scores["0"].double())


def test_the_table_says_what_stays(conv):
    _, _, plan = conv
    text = plan.table()
    assert text.splitlines()[0] == "l1 for macs 0.3: macs 0.29"
    kept, scores = plan.keep["0"], plan.scores["0"]
    row = next(line.split() for line in text.splitlines() if line.startswith("0 "))
    assert row == [
        "0", "6", str(int(kept.sum())), f"{int(kept.sum()) / 6:.0%}",
        f"{scores[kept].mean():.3g}", f"{scores[~kept].mean():.3g}",
    ]  # fmt: skip
    assert text.endswith("one note")
    assert str(plan) == text


FACTORY = """
from torch import nn
def make(num_classes=6):
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 5), nn.ReLU(),
        nn.Linear(5, num_classes),
    )
"""
READER = """
import sys, torch
from safetensors.torch import load_file, save_file
from stamp.plan import load
small = load("mine:make", "plan.json", "small.safetensors").eval()
save_file({"y": small(load_file("x.safetensors")["x"])}, "y.safetensors")
print("stamp.groups" in sys.modules)
"""


def test_a_fresh_process_makes_the_same_network_without_tracing(tmp_path):
    from safetensors.torch import load_file, save_file

    (tmp_path / "mine.py").write_text(FACTORY)
    scope = {}
    exec(FACTORY, scope)
    model, x = scope["make"]().eval(), torch.rand(3, 1, 8, 8)
    groups = trace(model, x)
    plan = PrunePlan(zoo.random_keep(groups, 0), groups)
    small = plan.apply(model, num_classes=4)
    plan.save(tmp_path / "plan.json")
    save_weights(small, tmp_path / "small.safetensors")
    save_file({"x": x}, tmp_path / "x.safetensors")
    run = Program(READER, folder=tmp_path).finish()
    assert run.stdout == "False\n"
    assert torch.equal(load_file(tmp_path / "y.safetensors")["y"], small(x))


def test_groups_made_by_hand_are_kept_in_the_file(tmp_path):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.parts = nn.Linear(3, 8), nn.Linear(8, 2), 4

        def forward(self, x):
            if x.sum() > 1e9:
                raise RuntimeError("no tracing of this")
            return self.down(torch.relu(self.up(x)).unflatten(-1, (self.parts, -1)).flatten(1))

    model = Twice()
    group = Group(
        "units", 4, (Slot("up", "out", 0, 2, 0, 4),), (Slot("down", "in", 0, 2, 0, 4),),
        attributes=(Attribute("", "parts", 1),),
    )  # fmt: skip
    plan = PrunePlan({"units": torch.tensor([True, False, True, False])}, ChannelGroups((group,)))
    small = plan.apply(model)
    assert (small.parts, small.up.out_features) == (2, 4)
    plan.save(tmp_path / "plan.json")
    save_weights(small, tmp_path / "small.safetensors")
    again = load(Twice, tmp_path / "plan.json", tmp_path / "small.safetensors")
    x = torch.rand(5, 3)
    assert torch.equal(again(x), small(x))
    assert again.parts == 2
    model.parts = 5
    with pytest.raises(PlanError, match="parts' is 5, and the plan is for 4"):
        plan.apply(model)


def test_heads_without_a_bias_tied_and_half_precision_weights_come_back(tmp_path):
    def tied():
        model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3, bias=False))
        model[2].weight = model[0].weight
        return model

    model = tied().to(torch.bfloat16)
    groups = ChannelGroups((Group("4", 3, (Slot("4", "out", 0, 1, 0, 3),), frozen="output"),))
    plan = PrunePlan({}, groups)
    plan.save(tmp_path / "plan.json")
    model[4] = nn.Linear(6, 7, bias=False, dtype=torch.bfloat16)
    save_weights(model, tmp_path / "small.safetensors")
    again = load(tied, tmp_path / "plan.json", tmp_path / "small.safetensors")
    assert same(again, model)
    assert again[2].weight is again[0].weight


@pytest.mark.parametrize("make", [lambda: resnet20(width=0.25), lambda: vit(width=0.25)])
def test_a_model_of_other_widths_or_modules_is_refused(make):
    model = make()
    groups = trace(model, torch.rand(1, 3, 32, 32))
    plan = PrunePlan(zoo.random_keep(groups, 0), groups)
    kind = resnet20 if head_name(model) == "fc" else vit
    for width in (0.125, 0.5):
        with pytest.raises(PlanError, match="plan applied to a model of other widths"):
            plan.apply(kind(width=width))
    with pytest.raises(PlanError, match="which this Sequential has not"):
        plan.apply(smallconv())
    assert plan.apply(kind(num_classes=77, width=0.25))(torch.rand(1, 3, 32, 32)).shape == (1, 77)


def test_choices_that_do_not_fit_the_groups(conv, unchecked):
    _, _, plan = conv
    groups, yes = plan.groups, torch.ones(6, dtype=torch.bool)
    for options, words in (
        ({"keep": {"7": yes}}, "no group '7'"),
        ({"keep": {"0": yes[:5]}}, "expected 6 booleans"),
        ({"keep": {"0": yes.float()}}, "expected 6 booleans"),
        ({"keep": {"0": ~yes}}, "keep at least one"),
        ({"keep": {"10": yes.logical_not().logical_or(torch.arange(6) == 0)}}, "frozen"),
        ({"keep": {}, "gates": {"10": torch.ones(6)}}, "frozen"),
        ({"keep": {}, "scores": {"0": torch.ones(5)}}, "expected 6 floats"),
    ):
        with pytest.raises(PlanError, match=words):
            PrunePlan(groups=groups, **options)
    with pytest.raises(PlanError, match="no gates"):
        PrunePlan({"0": yes}, groups).apply(smallconv(6, 1, channels=(6, 8)), fold="soft")


def damage(change):
    def changed(text):
        content = json.loads(text)
        change(content)
        return json.dumps(content)

    return changed


DAMAGE = {
    "empty": (lambda text: "", "not JSON"),
    "truncated": (lambda text: text[: len(text) // 2], "not JSON"),
    "bytes": (lambda text: b"\xff\xfe\x00\x01" * 10, "not JSON"),
    "deeply nested": (lambda text: "[" * 200_000, "not JSON"),
    "a list": (lambda text: "[1, 2]", "is no plan"),
    "another file": (lambda text: '{"format": "picture"}', "is no plan"),
    "newer": (damage(lambda c: c.update(version=2)), "version 2"),
    "no groups": (damage(lambda c: c.pop("groups")), "groups: Field required"),
    "no name": (damage(lambda c: c["groups"][1].pop("name")), r"groups\[1\].name: Field required"),
    "an unknown key": (damage(lambda c: c.update(code="import os")), "code: Extra inputs"),
    "an index too high": (damage(lambda c: c["groups"][0].update(keep=[0, 6])), "keeps channel 6, and it has 6"),
    "an index below 0": (damage(lambda c: c["groups"][0].update(keep=[-1])), r"groups\[0\].keep\[0\]"),
    "an index twice": (damage(lambda c: c["groups"][0].update(keep=[1, 1])), "channel 1 twice"),
    "no index": (damage(lambda c: c["groups"][0].update(keep=[])), "keep at least one"),
    "an index that is text": (damage(lambda c: c["groups"][0].update(keep=["1"])), r"keep\[0\]"),
    "an index that is true": (damage(lambda c: c["groups"][0].update(keep=[True])), r"keep\[0\]"),
    "few scores": (damage(lambda c: c["groups"][0]["scores"].pop()), "expected 6 floats"),
    "a wrong width": (damage(lambda c: c["groups"][0].update(width=7)), "expected 7 floats"),
    "a smaller width": (damage(lambda c: c["groups"][0].update(width=5)), "keeps channel 5|speaks of channel"),
    "a huge width": (damage(lambda c: c["groups"][0].update(width=10**12)), r"groups\[0\].width"),
    "huge widths": (
        damage(lambda c: c.update(groups=[{"name": str(k), "width": 1 << 26} for k in range(9)])), "damaged",
    ),
    "another place": (damage(lambda c: c["groups"][0]["producers"][0].__setitem__(0, "4")), "'backbone' is another"),
    "a bad place": (damage(lambda c: c["groups"][0]["producers"][0].pop()), r"producers\[0\]\[5\]"),
    "two groups of a name": (damage(lambda c: c["groups"].append(c["groups"][0])), "two groups"),
    "a frozen group cut": (damage(lambda c: c["groups"][0].update(frozen="so")), "frozen"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_refused_in_one_line(name, conv, tmp_path, unchecked):
    _, _, plan = conv
    path = tmp_path / "plan.json"
    plan.save(path)
    spoil, words = DAMAGE[name]
    spoilt = spoil(path.read_text())
    path.write_bytes(spoilt if isinstance(spoilt, bytes) else spoilt.encode())
    with pytest.raises(PlanError, match=words) as caught:
        PrunePlan.load(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "place",
    [["0", "sideways", 0, 1, 0, 6], ["0", "dim7", 0, 1, 0, 6], ["", "out", 0, 1, 0, 6], ["2", "out", 0, 1, 0, 6]],
)
def test_places_that_no_network_has_are_refused(place, conv):
    model, _, plan = conv
    group = plan.groups["0"]
    hostile = ChannelGroups((Group("0", 6, group.producers, group.consumers, (Slot(*place),)),))
    with pytest.raises(PlanError):
        PrunePlan({"0": plan.keep["0"]}, hostile).apply(model)


def test_files_that_do_not_go_together_are_refused(conv, tmp_path):
    model, _, plan = conv
    plan.save(tmp_path / "plan.json")
    weights = tmp_path / "small.safetensors"

    def make():
        return smallconv(6, 1, channels=(6, 8))

    for other, words in (
        (model, "has shape"),
        (nn.Sequential(plan.apply(model)), "has no '0.weight'"),
        (nn.Sequential(*plan.apply(model), nn.Linear(6, 6)), "and the network has not"),
    ):
        save_weights(other, weights)
        with pytest.raises(PlanError, match=words):
            load(make, tmp_path / "plan.json", weights)
    weights.write_bytes(weights.read_bytes()[:50])
    with pytest.raises(PlanError, match="no safetensors file"):
        load(make, tmp_path / "plan.json", weights)
    for missing in ((tmp_path / "no.json", weights), (tmp_path / "plan.json", tmp_path / "no.safetensors")):
        with pytest.raises(PlanError, match="cannot be read"):
            load(make, *missing)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        plan.save(tmp_path / "file" / "plan.json")
