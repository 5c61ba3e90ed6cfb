from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from shared_core.runs import load_tree, save_tree
from stamp.examples import DataError, Examples
from stamp.training import (
    EpochEnd,
    HeadError,
    TrainingError,
    accuracy,
    class_mean_weights,
    finetune,
    head_name,
    penultimate,
    recalibrate_bn,
    with_head,
)


def seeded(build, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def net(classes=3):
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(64, 8),
            nn.BatchNorm1d(8, momentum=0.2), nn.ReLU(), nn.Linear(8, classes),
        )
    )  # fmt: skip


def blobs(n=60, classes=3, shape=(1, 6, 6), seed=0, spread=0.5):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    centres = torch.randn(classes, *shape, generator=torch.Generator().manual_seed(99))
    x = centres[y] + spread * torch.randn(n, *shape, generator=generator)
    return Examples(x, y, tuple("abcdefghij"[:classes]))


def same(first, second):
    a, b = first.state_dict(), second.state_dict()
    return all(torch.equal(a[name], b[name]) for name in a)


def test_the_head_is_the_last_linear_layer_and_not_one_inside_an_attention():
    assert head_name(net()) == "8"
    assert head_name(nn.Linear(2, 2)) == ""
    block = nn.ModuleDict({"head": nn.Linear(4, 2), "attention": nn.MultiheadAttention(4, 2)})
    assert head_name(block) == "head"
    with pytest.raises(HeadError, match=r"no nn\.Linear"):
        head_name(nn.Sequential(nn.Conv2d(1, 2, 1), nn.MultiheadAttention(4, 2)))


def test_penultimate_is_what_the_head_turns_into_logits():
    model, x = net().eval(), blobs().inputs()
    features = penultimate(model, x, "8")
    assert torch.equal(model[8](features), model(x))
    assert torch.equal(features, model[:8](x))
    assert not model[8]._forward_pre_hooks
    for head, words in (("9", "no module '9'"), ("0", "is a Conv2d")):
        with pytest.raises(HeadError, match=words):
            penultimate(model, x, head)
    with pytest.raises(HeadError, match="pool first"):
        penultimate(nn.Linear(6, 2), x, "")
    unused = nn.ModuleDict({"used": nn.Linear(6, 2), "unused": nn.Linear(6, 2)})
    unused.forward = lambda x: unused["used"](x)
    with pytest.raises(HeadError, match="does not run"):
        penultimate(unused, x, "unused")


def test_class_means_compare_by_the_cosine():
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(40, 7, generator=generator, dtype=torch.float64) + 0.1
    y = torch.arange(40) % 4
    weight, bias = class_mean_weights(features, y, 5, scale=7.0)
    norm = features.norm(dim=1).mean()
    for k in range(4):
        mean = features[y == k].mean(0)
        cosine = functional.cosine_similarity(features, mean[None])
        expected = 7 * cosine * features.norm(dim=1) / norm
        assert torch.allclose((features @ weight.T + bias)[:, k], expected, atol=1e-12)
    assert not weight[4].any()
    assert not bias.any()


@pytest.mark.parametrize("kind", ["class-mean", "fresh"])
def test_with_head_replaces_the_head_of_a_copy(kind):
    model, data = net(classes=10).eval(), blobs(classes=4)
    before = copy.deepcopy(model)
    new = with_head(model, data, kind=kind)
    assert same(model, before)
    assert new(data.inputs()).shape == (60, 4)
    assert all(torch.equal(a, b) for a, b in zip(new[:8].parameters(), model[:8].parameters(), strict=True))
    assert not new[8].training
    if kind == "class-mean":
        weight, bias = class_mean_weights(model[:8](data.inputs()), data.y, 4)
        assert torch.allclose(new[8].weight, weight, atol=1e-6)
        assert torch.allclose(new[8].bias, bias, atol=1e-6)
        assert accuracy(new, data) > 0.9
    else:
        assert same(new, with_head(model, 4, kind=kind))
        assert not same(new, with_head(model, 4, kind=kind, seed=1))
    assert with_head(model, data, kind=kind, inplace=True) is model
    assert same(model, new)


def test_with_head_on_a_linear_model_in_float64_and_in_training():
    model, data = nn.Linear(36, 9, dtype=torch.float64), blobs(shape=(36,))
    new = with_head(model, data)
    assert isinstance(new, nn.Linear)
    assert new.weight.dtype == torch.float64
    assert accuracy(new, data) > 0.9
    trained = net().train()
    statistics = trained[1].running_mean.clone()
    with_head(trained, blobs())
    assert trained.training
    assert torch.equal(trained[1].running_mean, statistics)


def test_heads_that_do_not_go_with_the_classes():
    with pytest.raises(HeadError, match="3 outputs for 4 classes"):
        with_head(net(), 4, kind="keep")
    assert same(with_head(net(), 3, kind="keep"), net())
    with pytest.raises(HeadError, match="needs examples"):
        with_head(net(), 4)
    with pytest.raises(HeadError, match=r"expected \(n, 4\)"):
        accuracy(net(), blobs(classes=4))
    with pytest.raises(HeadError, match=r"expected \(n, 4\)"):
        finetune(net(), blobs(classes=4))
    with pytest.raises(DataError, match="takes 1 channels"):
        with_head(net(), blobs(shape=(3, 6, 6)))


def test_recalibration_averages_the_statistics_of_batches():
    data = blobs(n=48)
    for batches, count in ((1, 1), (2, 2), (20, 3)):
        model = net().train()
        model[3].eval()
        recalibrate_bn(model, data, batches=batches, batch_size=16, seed=3)
        drawn = [x for x, _ in data.batches(16, generator=torch.Generator().manual_seed(3))][:count]
        first = [model[0](x) for x in drawn]
        means = [h.mean((0, 2, 3)) for h in first]
        assert torch.allclose(model[1].running_mean, torch.stack(means).mean(0), atol=1e-6)
        variances = [h.transpose(0, 1).flatten(1).var(1) for h in first]
        assert torch.allclose(model[1].running_var, torch.stack(variances).mean(0), atol=1e-5)
        # The deeper norm sees the first one's batch statistics, and no dropout.
        second = [
            model[5](functional.relu(functional.batch_norm(h, None, None, *model[1].parameters(), True)).flatten(1))
            for h in first
        ]
        assert torch.allclose(model[6].running_mean, torch.stack([h.mean(0) for h in second]).mean(0), atol=1e-5)
        assert model.training
        assert not model[3].training
        assert (model[1].momentum, model[6].momentum) == (0.1, 0.2)
        assert all(p.grad is None for p in model.parameters())


def test_recalibration_keeps_evaluation_mode_and_leaves_what_has_no_statistics():
    model = net().eval()
    assert recalibrate_bn(model, blobs(n=5)) is model
    assert not any(m.training for m in model.modules())
    plain = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False))
    recalibrate_bn(plain, blobs(shape=(2,)))
    with pytest.raises(DataError, match="at least 2"):
        recalibrate_bn(model, blobs().rows(slice(1)))


def test_accuracy_is_the_share_of_right_answers_whatever_the_batches():
    data = blobs(n=50, spread=2.0)
    model = with_head(net(), data).train()
    statistics = model[1].running_mean.clone()
    with torch.no_grad():
        logits = copy.deepcopy(model).eval()(data.inputs())
    expected = (logits.argmax(1) == data.y).double().mean().item()
    assert 0.3 < expected < 1
    for size in (1, 7, 256):
        assert accuracy(model, data, batch_size=size) == expected
    two = data.select([2, 0]).rows(slice(None))
    part = Examples(data.x[data.y != 1], data.y[data.y != 1], data.class_names)
    restricted = (logits[data.y != 1][:, [0, 2]].argmax(1) * 2 == part.y).double().mean().item()
    assert accuracy(model, part, classes=[2, 0]) == restricted
    assert len(two) == len(part)
    assert model.training
    assert torch.equal(model[1].running_mean, statistics)


def test_finetuning_is_sgd_along_a_cosine():
    data, x = blobs(n=20, shape=(5,)), blobs(n=20, shape=(5,)).inputs()
    model = seeded(lambda: nn.Linear(5, 3))
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    history = finetune(model, data, epochs=4, batch_size=20, lr=0.5, momentum=0.0, weight_decay=0.1)
    one_hot = functional.one_hot(data.y).float()
    losses = []
    for t in range(4):
        p = (x @ weight.T + bias).softmax(1)
        losses.append(-(p.log() * one_hot).sum(1).mean().item())
        error = (p - one_hot) / 20
        lr = 0.5 * (1 + math.cos(math.pi * t / 4)) / 2
        weight, bias = weight - lr * (error.T @ x + 0.1 * weight), bias - lr * (error.sum(0) + 0.1 * bias)
    assert torch.allclose(model.weight, weight, atol=1e-6)
    assert torch.allclose(model.bias, bias, atol=1e-6)
    assert [r.train_loss for r in history.records] == pytest.approx(losses, rel=1e-5)
    assert [r.lr for r in history.records] == pytest.approx([0.25 * (1 + math.cos(math.pi * t / 4)) for t in range(4)])
    assert history.steps == 4
    assert history.best is None


def test_an_interrupted_training_goes_on_bit_for_bit(tmp_path):
    train, val = blobs(n=45), blobs(n=30, seed=1)
    whole = net()
    expected = finetune(whole, train, val, epochs=4, batch_size=8, seed=5)
    for stop in (1, 3):
        model = net()

        def note(end: EpochEnd, stop=stop) -> None:
            if end.epoch == stop:
                save_tree(tmp_path / "state.safetensors", end.state())
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            finetune(model, train, val, epochs=4, batch_size=8, seed=5, on_epoch=note)
        fresh = seeded(net, 77)
        torch.rand(3)
        seen: list[EpochEnd] = []
        state = load_tree(tmp_path / "state.safetensors")
        history = finetune(fresh, train, val, epochs=4, batch_size=8, seed=5, state=state, on_epoch=seen.append)
        assert same(fresh, whole)
        assert [end.epoch for end in seen] == list(range(stop + 1, 5))
        assert [replace(r, seconds=0.0) for r in history.records] == [replace(r, seconds=0.0) for r in expected.records]
        assert history.best == expected.best


def test_a_state_is_a_copy():
    model, states = net(), []
    finetune(model, blobs(), epochs=2, batch_size=8, on_epoch=lambda end: states.append(end.state()))
    assert not torch.equal(states[0]["model"]["0.weight"], states[1]["model"]["0.weight"])
    assert not torch.equal(states[0]["momentum"][0], states[1]["momentum"][0])
    assert torch.equal(states[1]["model"]["0.weight"], model[0].weight)


def test_seeds_decide_everything_and_the_global_state_decides_nothing():
    runs = []
    for seed in (0, 0, 1):
        torch.rand(5)
        before = torch.get_rng_state()
        model = net()
        finetune(model, blobs(), epochs=2, batch_size=8, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        runs.append(model)
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


def test_finetuning_learns_and_stops_at_the_target_or_after_the_steps():
    train, val = blobs(n=90), blobs(n=60, seed=1)
    model = net()
    history = finetune(model, train, val, epochs=40, batch_size=16, lr=0.05, target=0.9)
    assert history.reached
    assert len(history.records) < 40
    assert accuracy(model, val) == history.records[-1].accuracy >= 0.9
    short = finetune(net(), train, val, steps=8, batch_size=16)
    assert [r.step for r in short.records] == [6, 8]
    untouched = net()
    assert finetune(untouched, train, steps=0).steps == 0
    assert same(untouched, net())


def test_one_example_left_over_is_left_out_of_the_epoch():
    assert finetune(net(), blobs(n=17), epochs=1, batch_size=8).steps == 2
    assert finetune(nn.Linear(4, 3), blobs(n=5, shape=(4,)), epochs=1, batch_size=1).steps == 5


def test_float64_frozen_parameters_and_flat_features():
    model = seeded(lambda: nn.Sequential(nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 3))).double()
    model[0].requires_grad_(False)
    before = copy.deepcopy(model)
    finetune(model, blobs(shape=(36,)), epochs=1)
    assert torch.equal(model[0].weight, before[0].weight)
    assert not torch.equal(model[2].weight, before[2].weight)
    with pytest.raises(TrainingError, match="nothing to train"):
        finetune(model.requires_grad_(False), blobs(shape=(36,)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"epochs": 0}, "epochs"), ({"steps": -1}, "steps"), ({"lr": 0.0}, "lr"), ({"lr": float("nan")}, "lr"),
        ({"batch_size": 0}, "batch_size"), ({"momentum": 1.0}, "momentum"), ({"weight_decay": -1.0}, "weight_decay"),
        ({"target": 0.5}, "give val"), ({"lr": 1e30}, "lower the learning rate"),
        ({"state": {"model": {}}}, "not that of a training"), ({"state": {"settings": {"lr": 0.3}}}, "with lr 0.3"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(options, words):
    with pytest.raises(TrainingError, match=words) as caught:
        finetune(net(), blobs(), **options)
    assert "\n" not in str(caught.value)
