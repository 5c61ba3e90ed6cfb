from __future__ import annotations

import copy
import functools
import json
from itertools import pairwise

import numpy as np
import pytest
import torch
import zoo
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from shared_core.errors import InputError
from stamp.counting import CostModel
from stamp.examples import Examples
from stamp.generator import GeneratorError, MaskGenerator, draw_set
from stamp.groups import trace
from stamp.observing import observe
from stamp.projection import project

SHAPE = (3, 8, 8)
WAYS = [
    {},
    {"head": "mlp"},
    {"head": "clamp"},
    {"head": "free"},
    {"sensitivity": False},
    {"sequential": True},
    {"labels": True},
    {"encoder": "attention"},
    {"encoder": "pma", "sequential": True},
    {"encoder": "subsample", "labels": True, "pseudo": 3},
]
LABELS = torch.tensor([0, 0, 1, 1, 2])


@functools.cache
def traced(name, seed):
    model, x = zoo.build(name, seed)
    return model.float(), trace(model, x.float())


def single(name, seed=0):
    model, groups = traced(name, seed)
    return copy.deepcopy(model), groups


def pictures(n=5, seed=0, shape=SHAPE):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


def examples(n=40, seed=0, classes=3, offset=0.0):
    return Examples(pictures(n, seed) + offset, torch.arange(n) % classes, tuple("abcdef"[:classes]))


def made(groups, *, taught=(), model=None, **settings):
    generator = MaskGenerator(groups, pseudo=settings.pop("pseudo", 4), input_shape=SHAPE, **settings)
    for seed in taught:
        generator.logits(model, pictures(seed=seed), y=LABELS, learn=True)
    return generator


def largest(a, b):
    assert set(a) == set(b)
    return max(float((a[name] - b[name]).detach().abs().max()) for name in a)


@pytest.mark.parametrize("name", zoo.ZOO)
def test_a_probability_a_channel_of_every_architecture_which_stays_as_it_is(name):
    model, groups = single(name)
    model.train()
    next(model.children()).eval()
    list(model.parameters())[-1].requires_grad_(requires_grad=False)
    modes = [module.training for module in model.modules()]
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    state = copy.deepcopy(model.state_dict())
    before = torch.random.get_rng_state()
    for settings in WAYS if name in ("vgg", "vit-torch") else WAYS[:1]:
        generator = made(groups, **settings)
        pi = generator(model, pictures(), y=LABELS, generator=torch.Generator().manual_seed(0))
        assert {key: tuple(value.shape) for key, value in pi.items()} == {k: (w,) for k, w in groups.widths().items()}
        assert list(pi) == [group.name for group in groups.prunable]
        assert all(bool(((value > 0) & (value < 1)).all()) for value in pi.values())
        again = generator(model, pictures(), y=LABELS, generator=torch.Generator().manual_seed(0))
        assert all(torch.equal(pi[key], again[key]) for key in pi)
        torch.cat(list(pi.values())).sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert modes == [module.training for module in model.modules()]
    assert wanted == [parameter.requires_grad for parameter in model.parameters()]
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.usefixtures("unchecked")  # for speed: annotations were checked above
@pytest.mark.parametrize("name", ["mobilenet", "vit-torch"])
@pytest.mark.parametrize("settings", [w for w in WAYS if w.get("encoder") != "subsample"], ids=str)
def test_a_set_has_no_order_and_repetition_says_nothing(name, settings):
    model, groups = single(name)
    generator = made(groups, **settings)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(1))

    def check(x, tolerance):
        pi = generator(model, x, y=LABELS)
        assert largest(generator(model, x[order], y=LABELS[order]), pi) <= tolerance
        assert largest(generator(model, x[order.repeat(3)], y=LABELS[order.repeat(3)]), pi) <= tolerance
        return pi

    if not {"encoder", "labels", "sequential"} & set(settings):
        check(pictures(seed=9), 1e-6)
    # Once it has a history, a channel that never varied amplifies rounding: so that, exactly.
    generator, model = generator.double(), model.double()
    for seed in range(3):
        generator.logits(model, pictures(seed=seed).double(), y=LABELS, learn=True)
    pi = check(pictures(seed=9).double(), 1e-8)
    other = generator(model, pictures(seed=10).double(), y=LABELS)
    assert (largest(other, pi) > 1e-5) == (settings.get("head") != "free")


def test_classes_have_no_order_and_matter_only_with_labels():
    model, groups = single("vgg")
    x = pictures(12)
    y = torch.arange(12) % 3
    other = y[torch.randperm(12, generator=torch.Generator().manual_seed(0))]
    generator = made(groups, labels=True)
    pi = generator(model, x, y=y)
    assert largest(generator(model, x, y=torch.tensor([2, 0, 1])[y]), pi) <= 1e-6
    assert largest(generator(model, x, y=10 * y), pi) <= 1e-6
    assert largest(generator(model, x, y=other), pi) > 1e-4
    with pytest.raises(InputError, match="give it the classes too, y="):
        generator(model, x)
    blind = made(groups)
    assert largest(blind(model, x, y=y), blind(model, x)) == 0


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ["resnet", "vit-hand", "densenet"])
def test_heads_are_given_what_enters_the_consumers(name):
    model, groups = single(name)
    x = pictures()
    for head in ("mlp", "clamp"):
        generator = made(groups, head=head, taught=range(2), model=model)
        logits = generator.logits(model, x)
        features = observe(model, groups, x)
        wanted = {key: generator.head.logits(key, features[key]) for key in features}
        assert largest(logits, wanted) <= 1e-6


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ["vgg", "resnet", "densenet", "vit-torch", "unet", "squeeze-excite"])
def test_in_sequence_later_groups_see_earlier_gates(name):
    model, groups = single(name)
    x = pictures()
    generator = made(groups, head="mlp", sequential=True)
    at_once = made(groups, head="mlp")
    at_once.load_state_dict(generator.state_dict())
    others = at_once.logits(model, x)
    cost = CostModel.macs(model, groups, x[:1])
    found = []
    for budget in (None, 0.2, 0.8):
        options = {} if budget is None else {"cost": cost, "budget": budget}
        # Whatever it was last asked for, or trained for, the budget is the one at hand.
        shift = 0.0 if budget is None else project(others, cost, budget)[1]
        logits = generator.logits(model, x, **options)
        gates = {key: torch.sigmoid(value.detach() - shift) for key, value in logits.items()}
        features = observe(model, groups, x, gate=lambda key, _, gates=gates: gates[key])
        assert largest(logits, {key: generator.head.logits(key, features[key]) for key in features}) <= 1e-5
        first, *rest = features
        assert torch.equal(logits[first], others[first])
        assert any(not torch.allclose(logits[key], others[key], atol=1e-3) for key in rest)
        found.append(logits)
    assert largest(found[1], found[2]) > 1e-3
    pi = generator(model, x, cost=cost, budget=0.2)
    assert largest(pi, project(found[1], cost, 0.2)[0]) <= 1e-6


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("settings", WAYS, ids=str)
def test_networks_in_other_precisions_are_read(settings):
    model, groups = single("vgg")
    generator = made(groups, **settings)
    pi = generator(model, pictures(), y=LABELS)
    double = generator(copy.deepcopy(model).double(), pictures().double(), y=LABELS)
    # Pseudo-instances are nearly alike at first, and what tells them apart has few digits.
    assert largest(double, pi) <= (1e-2 if settings.get("encoder") in ("attention", "pma") else 1e-4)
    half = generator(copy.deepcopy(model).bfloat16(), pictures().bfloat16(), y=LABELS)
    assert all(bool(value.isfinite().all()) for value in half.values())
    whole = copy.deepcopy(generator).double()(copy.deepcopy(model).double(), pictures().double(), y=LABELS)
    assert all(value.dtype == torch.float64 for value in whole.values())
    data = Examples(pictures(6).double(), torch.arange(6) % 3, tuple("abc"))
    for other in (model, copy.deepcopy(model).double()):
        assert all(bool(value.isfinite().all()) for value in generator.pi(other, data, sets=2).values())


def test_weights_are_read_as_they_are_now():
    model, groups = single("vgg")
    other, _ = single("vgg", seed=1)
    generator = made(groups, sensitivity=False)
    x = pictures()
    first, second = generator(model, x), generator(other, x)
    assert largest(first, second) > 1e-4
    assert largest(generator(model, x), first) == 0
    # As an exponential average of weights, or a loader, writes them: past autograd's count of versions. The weights of
    # the last convolution, half of them doubled in its consumer's place, leave all activations before it alone.
    fresh = made(groups, sensitivity=False)
    model[4].weight.data[:4] *= 2
    model[5].running_mean.data[:4] *= 2
    model[5].running_var.data[:4] *= 4
    model[4].bias.data[:4] *= 2
    model[5].eps = 0.0
    assert largest(generator(model, x), fresh(model, x)) == 0
    assert largest(generator(model, x), first) > 1e-4
    before = MaskGenerator(groups, head="mlp")
    assert largest(before(model, x), MaskGenerator(groups, head="mlp")(model, x)) == 0


def test_gradients_may_be_switched_off():
    model, groups = single("vgg")
    for settings in ({}, {"labels": True}, {"encoder": "attention"}):
        generator = made(groups, **settings)
        wanted = generator(model, pictures(), y=LABELS)
        for off in (torch.no_grad(), torch.inference_mode()):
            with off:
                found = generator(model, 1 * pictures(), y=1 * LABELS)
                assert largest(found, wanted) <= 1e-6
                assert not any(value.requires_grad for value in found.values())
                assert generator.pi(model, examples(), sets=1)


def test_the_seed_decides_the_parameters():
    _, groups = single("vgg")
    states = [MaskGenerator(groups, seed=seed).state_dict() for seed in (0, 0, 1)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert any(not torch.equal(states[0][key], states[2][key]) for key in states[0])


def test_a_budget_holds_for_a_set():
    for name in ("vgg", "mobilenet"):
        model, groups = single(name)
        cost = CostModel.macs(model, groups, pictures(1))
        pi = made(groups)(model, pictures(), cost=cost, budget=0.3)
        assert abs(float(cost.expected(pi).detach()) / cost.exact({}) - 0.3) <= 1e-6


# ---- sets


def test_pi_is_the_mean_over_sets():
    model, groups = single("vgg")
    data = examples(40)
    cost = CostModel.macs(model, groups, pictures(1))
    for settings in ({}, {"labels": True}, {"encoder": "subsample"}):
        generator = made(groups, **settings)
        found = generator.pi(
            model, data, sets=2, set_size=16, cost=cost, budget=0.4, generator=torch.Generator().manual_seed(3)
        )
        random = torch.Generator().manual_seed(3)
        each = []
        for _ in range(2):
            x, y = draw_set(data, 16, random)
            y = y if settings.get("labels") else None
            each.append(generator(model, x, y=y, cost=cost, budget=0.4, generator=random))
        wanted = {key: torch.stack([pi[key] for pi in each]).mean(0) for key in found}
        assert largest(found, wanted) <= 1e-6
        assert not any(value.requires_grad for value in found.values())
    found = generator.pi(model, data, sets=2)
    assert largest(generator.pi(model, data, sets=2), found) == 0
    assert largest(generator.pi(model, examples(40, offset=2.0), sets=2), found) > 1e-3


def count_sets(generator, monkeypatch, scripted=None):
    asked = []
    own = generator.logits

    def logits(*args, **kwargs):
        asked.append(1)
        return own(*args, **kwargs) if scripted is None else {"0": torch.full((6,), scripted(len(asked)))}

    monkeypatch.setattr(generator, "logits", logits)
    return asked


def test_as_many_sets_as_decisions_need(monkeypatch):
    model, groups = single("vgg")
    data = examples()
    steady = made(groups, head="free")
    asked = count_sets(steady, monkeypatch)
    pi = steady.pi(model, data, sets="auto")
    # One, and three more that change nothing.
    assert len(asked) == 4
    assert all(torch.allclose(value, torch.sigmoid(torch.ones(()))) for value in pi.values())
    # Set after set turns the mean over: at most 30.
    restless = made(groups)
    asked = count_sets(restless, monkeypatch, lambda k: 8.0 if k % 2 else -9.0)
    restless.pi(model, data, sets="auto")
    assert len(asked) == 30
    # The mean turns at the third set and stays: three more.
    late = made(groups)
    asked = count_sets(late, monkeypatch, lambda k: -1.0 if k < 2 else 1.0)
    pi = late.pi(model, data, sets="auto")
    assert len(asked) == 6
    wanted = np.mean([1 / (1 + np.exp(1.0))] + 5 * [1 / (1 + np.exp(-1.0))])
    assert torch.allclose(pi["0"], torch.full((6,), float(wanted)))


def test_sets_are_drawn_without_replacement_where_there_is_enough():
    data = Examples(torch.arange(20.0)[:, None], torch.arange(20) % 4, tuple("abcd"))
    counts = torch.zeros(20)
    random = torch.Generator().manual_seed(0)
    for _ in range(800):
        x, y = draw_set(data, 8, random)
        rows = x[:, 0].long()
        assert len(set(rows.tolist())) == 8
        assert torch.equal(y, rows % 4)
        counts[rows] += 1
    assert bool(((counts - 320).abs() <= 4.5 * (800 * 0.4 * 0.6) ** 0.5).all())
    few, _ = draw_set(data, 64, random)
    assert len(few) == 20
    assert set(few[:, 0].tolist()) <= set(map(float, range(20)))
    drawn = [draw_set(data, 64, random)[0].flatten().tolist() for _ in range(3)]
    assert all(a != b for a, b in pairwise(drawn))
    assert len(draw_set(data, 20, random)[0].unique()) == 20


def test_bytes_and_transforms_are_as_the_network_takes_them():
    data = Examples(
        torch.full((4, *SHAPE), 51, dtype=torch.uint8), torch.arange(4) % 2, ("a", "b"), transform=lambda x: x + 1
    )
    x, _ = draw_set(data, 4, torch.Generator())
    assert torch.allclose(x, torch.tensor(1.2))


def test_few_examples_are_enough():
    model, groups = single("vgg")
    generator = made(groups)
    pi = generator.pi(model, examples(5), sets=3)
    assert all(bool(value.isfinite().all()) for value in pi.values())


# ---- files


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("settings", WAYS, ids=str)
def test_saved_and_loaded_it_is_the_same(settings, tmp_path):
    model, groups = single("vit-torch")
    generator = made(groups, taught=range(3), model=model, seed=5, **settings)
    generator.save(tmp_path / "g")
    assert [path.name for path in tmp_path.iterdir()] == ["g"]
    loaded = MaskGenerator.load(tmp_path / "g", groups)
    assert loaded.settings == generator.settings
    assert loaded.groups.signature() == groups.signature()
    random = [torch.Generator().manual_seed(0) for _ in range(2)]
    first, second = (
        g(model, pictures(), y=LABELS, generator=r) for g, r in zip((generator, loaded), random, strict=True)
    )
    assert largest(first, second) == 0
    assert largest(copy.deepcopy(generator)(model, pictures(), y=LABELS), generator(model, pictures(), y=LABELS)) == 0


def refusal(path, groups):
    with pytest.raises(GeneratorError) as caught:
        MaskGenerator.load(path, groups)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert len(message) < 400
    return message


def test_files_of_other_things_are_refused_in_a_line(tmp_path):
    _, groups = single("vgg")
    whole = tmp_path / "g.safetensors"
    MaskGenerator(groups).save(whole)
    with safe_open(str(whole), "pt") as file:
        about = json.loads(file.metadata()["stamp.generator"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert "no such file" in refusal(tmp_path / "absent", groups)
    assert "is no generator" in refusal(tmp_path, groups)
    damaged = tmp_path / "damaged"
    for content in (b"", b"PK\x03\x04 not one of ours", whole.read_bytes()[:-100], whole.read_bytes()[:50]):
        damaged.write_bytes(content)
        assert "is no generator" in refusal(damaged, groups)
    foreign = tmp_path / "foreign"

    def written(header, tensors=tensors):
        save_file(tensors, foreign, None if header is None else {"stamp.generator": header})
        return refusal(foreign, groups)

    MaskGenerator.load(whole, groups)
    assert "holds tensors, but no generator" in written(None)
    assert "no generator of this version" in written(json.dumps(about | {"version": 999}))
    for header in ("{", "[]", "3", "null"):
        assert "damaged" in written(header) or "no generator" in written(header)
    for settings in ([], 3, None, {"encoder": "mean"}, {"unheard": 1}, {"pseudo": "many"}):
        assert "damaged" in written(json.dumps(about | {"settings": settings}))
    assert "damaged" in written(json.dumps({name: value for name, value in about.items() if name != "settings"}))
    first = next(iter(tensors))
    for changed in (
        {name: value for name, value in tensors.items() if name != first},
        tensors | {"more": torch.zeros(2)},
        tensors | {first: torch.zeros(2, 7)},
    ):
        assert "damaged" in written(json.dumps(about), changed)


def test_the_same_generator_makes_the_same_file(tmp_path):
    _, groups = single("vgg")
    contents = []
    for name in ("a", "b"):
        MaskGenerator(groups, seed=1).save(tmp_path / name)
        contents.append((tmp_path / name).read_bytes())
    assert contents[0] == contents[1]


def test_generators_for_other_networks_are_refused_in_a_line(tmp_path):
    _, groups = single("vgg")
    path = tmp_path / "g"
    for settings in ({}, {"head": "mlp"}, {"head": "clamp"}, {"head": "free"}):
        generator = made(groups, **settings)
        generator.save(path)
        wide = zoo.vgg(widths=(6, "M", 9, 8, "M")).eval()
        others = [
            (trace(wide, pictures(2)), r"group '4' has 8 channels in it and 9 here"),
            (single("vgg-gap")[1], r"group '12' has 12 channels in it and none here"),
            (single("resnet")[1], r"made for another network"),
            (trace(zoo.vgg(size=16).eval(), pictures(2, shape=(3, 16, 16))), r"places differ"),
        ]
        generator.check(groups)
        for other, words in others:
            assert "made for a network of other groups" in refusal(path, other)
            with pytest.raises(GeneratorError, match=words) as caught:
                generator.check(other)
            assert "\n" not in str(caught.value)


# ---- what is refused


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_read_is_refused():
    model, groups = single("vgg")
    generator = made(groups)
    for call in (generator, generator.logits):
        with pytest.raises(GeneratorError, match="a set has 1 instances; give at least 2"):
            call(model, pictures(1))
    data = examples()
    for sets in (0, -1):
        with pytest.raises(GeneratorError, match=f"sets: must be at least 1, got {sets}"):
            generator.pi(model, data, sets=sets)
    with pytest.raises(GeneratorError, match="a set of 1 of 40 examples"):
        generator.pi(model, data, set_size=1)
    with pytest.raises(GeneratorError, match="a set of 64 of 1 examples"):
        generator.pi(model, data.rows(slice(0, 1)))
    with pytest.raises(InputError, match="pseudo-instances of encoder 'attention' have no class"):
        MaskGenerator(groups, encoder="attention", input_shape=SHAPE, labels=True)
    with pytest.raises(InputError, match="only the head 'channel' reads them"):
        MaskGenerator(groups, head="mlp", labels=True)
    with pytest.raises(InputError, match="needs input_shape="):
        MaskGenerator(groups, encoder="pma")
    linear = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    with pytest.raises(InputError, match="no group of channels that can be pruned"):
        MaskGenerator(trace(linear, pictures(2)))
