from __future__ import annotations

import copy
import math
import multiprocessing
import traceback
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sklearn.metrics import accuracy_score, log_loss
from torch import nn

import srq_dropbits.training as training_module
from shared_core.device import World
from shared_core.errors import InputError
from shared_core.runs import load_tree, save_tree
from srq_dropbits.bits import report
from srq_dropbits.config import DropBits, LearnBits, QuantConfig
from srq_dropbits.errors import NonFiniteError
from srq_dropbits.models import build
from srq_dropbits.structure import input_quantizer, quantized_layers, weight_quantizer
from srq_dropbits.training import augment_images, batches_of, evaluate, fit, predict_proba, quantize_and_train
from srq_dropbits.userdata import DataSplit, InputFormat, load_images_or_table

ONE_STEP = {"epochs": 1, "batch_size": 1000, "optimizer": "sgd", "schedule": "constant", "weight_decay": 0.0}


@pytest.fixture(scope="module")
def wine():
    return load_images_or_table("wine").split(0)


@pytest.fixture(scope="module")
def digits():
    return load_images_or_table("digits").split(0)


@pytest.fixture(scope="module")
def float_digits(digits):
    model = build("digits-cnn", digits.shape, digits.classes, seed=0)
    fit(model, digits, epochs=6)
    return model


@pytest.fixture(scope="module")
def float_wine(wine):
    model = build("mlp:16,8", wine.shape, wine.classes, seed=0)
    fit(model, wine, epochs=15, lr=1e-2, batch_size=32)
    return model


def weights(model):
    return {
        name: value.detach().clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)
    }


def same(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def gradient_step(model, data, loss_of, lr):
    """What one step of gradient descent with Nesterov's momentum does to a copy: 1 + 0.9 times the gradient."""
    other = copy.deepcopy(model)
    loss_of(other(data.x_train)).backward()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter -= 1.9 * lr * parameter.grad
    return weights(other)


class TestStep:
    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    def test_is_gradient_descent_on_the_mean_cross_entropy(self, wine, smoothing):
        model = build("mlp:8", wine.shape, wine.classes, seed=0)
        loss = nn.CrossEntropyLoss(label_smoothing=smoothing)
        expected = gradient_step(model, wine, lambda out: loss(out, wine.y_train), lr=0.1)
        done = fit(model, wine, lr=0.1, label_smoothing=smoothing, **ONE_STEP)
        for name, value in weights(model).items():
            torch.testing.assert_close(value, expected[name])
        assert done.history[0]["penalty"] == 0

    def test_distillation_adds_the_scaled_divergence(self, wine):
        model, teacher = (build("mlp:8", wine.shape, wine.classes, seed) for seed in (0, 1))

        def loss(out):
            wanted = (teacher(wine.x_train) / 3).softmax(1).detach()
            own = (out / 3).log_softmax(1)
            divergence = (wanted * (wanted.log() - own)).sum(1).mean()
            return 0.75 * nn.functional.cross_entropy(out, wine.y_train) + 0.25 * 9 * divergence

        expected = gradient_step(model, wine, loss, lr=0.1)
        fit(model, wine, lr=0.1, teacher=teacher, distill=0.25, temperature=3.0, **ONE_STEP)
        for name, value in weights(model).items():
            torch.testing.assert_close(value, expected[name])

    def test_a_model_that_is_its_own_teacher_stays(self, wine):
        model = build("mlp:8", wine.shape, wine.classes, seed=0)
        before = weights(model)
        fit(model, wine, lr=0.1, teacher=copy.deepcopy(model), distill=1, **ONE_STEP)
        for name, value in weights(model).items():
            torch.testing.assert_close(value, before[name], atol=1e-7, rtol=0)

    def test_gradient_is_clipped(self, wine):
        model = build("mlp:8", wine.shape, wine.classes, seed=0)
        before = weights(model)
        fit(model, wine, lr=0.1, clip_norm=1e-3, **ONE_STEP)
        moved = sum(float((value - before[name]).square().sum()) for name, value in weights(model).items())
        assert math.sqrt(moved) == pytest.approx(1.9 * 0.1 * 1e-3, rel=1e-3)

    def test_weights_decay_and_biases_do_not(self, wine):
        model = build("mlp:8", wine.shape, wine.classes, seed=0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(1.0)
        kept = copy.deepcopy(model)
        options = {**ONE_STEP, "optimizer": "adamw"}
        fit(model, wine, lr=1e-3, **{**options, "weight_decay": 0.5})
        fit(kept, wine, lr=1e-3, **options)
        decayed, plain = weights(model), weights(kept)
        torch.testing.assert_close(decayed["0.weight"], plain["0.weight"] - 1e-3 * 0.5, atol=1e-6, rtol=0)
        assert torch.equal(decayed["0.bias"], plain["0.bias"])

    @pytest.mark.parametrize(
        ("schedule", "warmup", "expected"),
        [
            ("constant", 0.0, lambda t: 1.0),
            ("linear", 0.0, lambda t: 1 - t / 20),
            ("cosine", 0.0, lambda t: (1 + math.cos(math.pi * t / 20)) / 2),
            ("cosine", 0.2, lambda t: (t + 1) / 4 if t < 4 else (1 + math.cos(math.pi * (t - 4) / 16)) / 2),
        ],
    )
    def test_learning_rate(self, wine, schedule, warmup, expected):
        model = build("mlp:4", wine.shape, wine.classes, seed=0)
        done = fit(model, wine, epochs=5, lr=0.01, batch_size=32, schedule=schedule, warmup=warmup)
        # 125 rows make 4 steps an epoch; the rate of the last one is recorded.
        steps = [4 * epoch + 3 for epoch in range(5)]
        rates = [record["learning_rate"] for record in done.history]
        assert rates == pytest.approx([0.01 * expected(step) for step in steps])

    def test_a_last_row_of_its_own_joins_the_batch_before(self, digits):
        small = replace(digits, x_train=digits.x_train[:65], y_train=digits.y_train[:65])
        done = fit(build("digits-cnn:0.25", digits.shape, digits.classes), small, epochs=1, batch_size=64)
        assert math.isfinite(done.history[0]["loss"])


class TestEpochs:
    def test_digits_are_learned(self, digits):
        model = build("digits-cnn", digits.shape, digits.classes, seed=0)
        done = fit(model, digits, epochs=8)
        assert evaluate(model, digits.x_test, digits.y_test)["accuracy"] >= 0.975
        assert done.history[-1]["validation_accuracy"] >= 0.975
        assert not model.training

    def test_repeats_and_leaves_the_global_state(self, wine):
        before = torch.get_rng_state()
        models = [nn.Sequential(build("mlp:8", wine.shape, 8, seed=0), nn.Dropout(0.5), nn.Linear(8, 3)) for _ in "ab"]
        models[1].load_state_dict(models[0].state_dict())
        torch.set_rng_state(before)
        fit(models[0], wine, epochs=2)
        torch.rand(7)
        after = torch.get_rng_state()
        fit(models[1], wine, epochs=2)
        assert torch.equal(after, torch.get_rng_state())
        assert same(weights(models[0]), weights(models[1]))

    def test_seed_orders_the_batches(self, wine):
        models = [build("mlp:8", wine.shape, wine.classes, seed=0) for _ in range(2)]
        for seed, model in enumerate(models):
            fit(model, wine, epochs=1, batch_size=16, seed=seed)
        assert not same(weights(models[0]), weights(models[1]))

    def test_resumed_training_is_the_same(self, digits, tmp_path):
        small = replace(digits, x_train=digits.x_train[:200], y_train=digits.y_train[:200])
        kept = []

        def keep(training):
            if len(training.history) == 2:
                save_tree(tmp_path / "state.safetensors", training.state())
            kept.append(len(training.history))

        options = {"epochs": 4, "augment": "crop", "seed": 3}
        whole = build("digits-cnn:0.5", digits.shape, digits.classes, seed=0)
        first = fit(whole, small, after_epoch=keep, **options)
        resumed = build("digits-cnn:0.5", digits.shape, digits.classes, seed=9)
        second = fit(resumed, small, resume=load_tree(tmp_path / "state.safetensors"), after_epoch=keep, **options)
        assert kept == [1, 2, 3, 4, 3, 4]
        assert same(weights(whole), weights(resumed))
        assert first.history == second.history

    def test_a_checkpoint_of_another_training_is_refused(self, wine):
        model = build("mlp:4", wine.shape, wine.classes)
        state = fit(model, wine, epochs=1).state()
        with pytest.raises(InputError, match="a training with epochs=1, and 2 was asked for"):
            fit(model, wine, epochs=2, resume=state)

    def test_divergence_is_said(self, wine):
        with pytest.raises(NonFiniteError, match=r"diverged in epoch \d+: the loss is (nan|inf)"):
            fit(build("mlp:8", wine.shape, wine.classes), wine, lr=1e30, optimizer="sgd", schedule="constant")

    @pytest.mark.parametrize(
        ("model", "options", "message"),
        [
            (nn.Linear(5, 3), {}, r"does not take rows of shape \(13,\)"),
            (nn.Linear(13, 2), {}, r"returns \(2,\) for a row, and the data have 3 classes"),
            (nn.Linear(13, 3), {"augment": "crop"}, "needs images"),
            (nn.Linear(13, 3), {"distill": 0.5}, "needs a teacher"),
            (nn.Linear(13, 3), {"distill": 2}, "distill is 2; it is a share"),
            (nn.Linear(13, 3), {"lr": 0}, "lr is 0; it must be above 0"),
            (nn.Linear(13, 3), {"epochs": -1}, "epochs is -1"),
        ],
    )
    def test_bad_input(self, wine, model, options, message):
        with pytest.raises(InputError, match=message) as caught:
            fit(model, wine, **options)
        assert "\n" not in str(caught.value)


class TestMeasures:
    def test_against_scikit_learn(self, wine):
        model = build("mlp:8", wine.shape, wine.classes, seed=0).train()
        shares = predict_proba(model, wine.x_test, batch_size=7)
        found = evaluate(model, wine.x_test, wine.y_test)
        assert found["accuracy"] == pytest.approx(accuracy_score(wine.y_test, shares.argmax(1)))
        exact = shares.double().numpy()
        exact /= exact.sum(1, keepdims=True)
        assert found["loss"] == pytest.approx(log_loss(wine.y_test, exact, labels=[0, 1, 2]), rel=1e-5)
        assert model.training

    def test_without_rows(self, wine):
        with pytest.raises(InputError, match="no rows to evaluate"):
            evaluate(nn.Linear(13, 3), wine.x_test[:0], wine.y_test[:0])

    def test_batches_hold_every_row_once(self):
        x = torch.arange(20.0)[:, None]
        assert sorted(torch.cat(list(batches_of(x, 6, seed=0))).flatten().tolist()) == list(range(20))
        assert [len(part) for part in batches_of(torch.arange(13.0)[:, None], 6, seed=0)] == [6, 6]


class TestAugment:
    @pytest.mark.parametrize("flip", [False, True])
    @pytest.mark.parametrize(("height", "width", "reach"), [(8, 8, 1), (32, 32, 4), (16, 24, 2)])
    def test_each_image_is_a_moved_one(self, flip, height, width, reach):
        x = torch.rand(6, 2, height, width, generator=torch.Generator().manual_seed(1))
        fill = torch.tensor([-1.0, -2.0])
        out = augment_images(x, torch.Generator().manual_seed(2), flip=flip, fill=fill)
        mirrored = []
        for image, moved in zip(x, out, strict=True):
            padded = fill.view(2, 1, 1).expand(2, height + 2 * reach, width + 2 * reach).clone()
            padded[:, reach:-reach, reach:-reach] = image
            crops = padded.unfold(1, height, 1).unfold(2, width, 1).flatten(1, 2).unbind(1)
            found = [
                mirror
                for crop in crops
                for mirror in (False, True)
                if torch.equal(crop.flip(2) if mirror else crop, moved)
            ]
            assert len(found) == 1
            mirrored += found
        assert any(mirrored) == flip


METHODS = ["ste-minmax", "pact", "lsq", "rq-st", "srq", "srq+dropbits"]


class TestQuantized:
    @pytest.mark.parametrize("method", METHODS)
    def test_weights_are_on_the_grid_and_classes_are_learned(self, wine, float_wine, method):
        before = weights(float_wine)
        done = quantize_and_train(float_wine, wine, QuantConfig.method(method, 4, 4), epochs=5, batch_size=32)
        assert same(before, weights(float_wine))
        for _, module in quantized_layers(done.model):
            quantizer = weight_quantizer(module)
            codes = module.weight.detach() / quantizer.alpha.detach()
            torch.testing.assert_close(codes, codes.round(), atol=1e-4, rtol=0)
            assert quantizer.grid.n_lo <= codes.round().min() <= codes.round().max() <= quantizer.grid.n_hi
            assert input_quantizer(module).ready
        assert done.metrics["test accuracy"] >= 0.8
        assert done.metrics["float test accuracy"] == evaluate(float_wine, wine.x_test, wine.y_test)["accuracy"]
        assert [record["epoch"] for record in done.history] == list(range(1, 6))
        assert set(done.history[0]["layers"]) == {"0", "2", "4"}

    def test_ptq_trains_nothing(self, wine, float_wine):
        done = quantize_and_train(float_wine, wine, QuantConfig.method("ptq", 8, 8), epochs=3)
        assert done.history == []
        assert done.metrics["test accuracy"] == pytest.approx(done.metrics["float test accuracy"], abs=0.06)

    def test_digits_at_four_bits(self, digits, float_digits):
        done = quantize_and_train(float_digits, digits, QuantConfig.method("srq", 4, 4), epochs=3, batch_size=128)
        assert done.metrics["test accuracy"] >= 0.95
        assert done.report.avg_bits == 4

    def test_dropbits_is_off_at_the_end_and_in_the_result(self, wine, float_wine, monkeypatch):
        calls = []
        original = training_module.set_dropbits
        monkeypatch.setattr(
            training_module, "set_dropbits", lambda model, enabled: (calls.append(enabled), original(model, enabled))
        )
        quantize_and_train(
            float_wine, wine, QuantConfig.method("srq+dropbits", 3, 4), epochs=5, batch_size=32, dropbits_off_frac=0.2
        )
        assert calls == [True] * 16 + [False] * 5

    def test_bits_are_learned_then_frozen(self, wine, float_wine):
        config = QuantConfig(
            weight_bits=4, act_bits=None, dropbits=DropBits(learn=True), learn_bits=LearnBits(max_bits=4, penalty=3.0)
        )
        done = quantize_and_train(float_wine, wine, config, epochs=10, batch_size=32)
        bits = [record["avg_bits"] for record in done.history]
        assert bits[-1] < 4
        assert done.report.avg_bits == bits[-1]
        assert len({repr(record["layers"]["0"]["bits"]) for record in done.history[6:]}) == 1
        for _, module in quantized_layers(done.model):
            quantizer = weight_quantizer(module)
            assert int(quantizer.codes(module.parametrizations.weight.original).abs().max()) <= quantizer.grid.n_hi

    @pytest.mark.parametrize("method", ["srq+dropbits", "srq+dropbits+bits", "rq"])
    def test_resumed_training_is_the_same(self, wine, float_wine, method, tmp_path):
        # Bits are frozen after epoch 3: one stop is before, one after it.
        config = QuantConfig.method(method, 4, 4)

        def keep(training):
            if len(training.history) in stops:
                save_tree(tmp_path / f"{len(training.history)}.safetensors", training.state())

        stops = (1, 4)
        options = {"epochs": 5, "batch_size": 32, "seed": 4}
        whole = quantize_and_train(float_wine, wine, config, after_epoch=keep, **options)
        for stop in stops:
            state = load_tree(tmp_path / f"{stop}.safetensors")
            resumed = quantize_and_train(float_wine, wine, config, resume=state, **options)
            assert whole.history == resumed.history
            assert same(weights(whole.model), weights(resumed.model))
            assert whole.metrics == resumed.metrics
            assert whole.report.to_dict() == resumed.report.to_dict()

    def test_batch_norm_sees_the_rounded_network(self, digits, float_digits):
        done = quantize_and_train(float_digits, digits, QuantConfig.method("ptq", 2, None), epochs=0, bn_batches=100)
        first = next(module for module in done.model.modules() if isinstance(module, nn.BatchNorm2d))
        inputs = []
        handle = first.register_forward_hook(lambda module, args, out: inputs.append(args[0].detach()))
        with torch.no_grad():
            done.model(digits.x_train)
        handle.remove()
        torch.testing.assert_close(first.running_mean, inputs[0].mean((0, 2, 3)), atol=2e-2, rtol=2e-2)


def toy(rows=24):
    random = np.random.default_rng(0)
    x = torch.from_numpy(random.normal(size=(rows, 5)).astype(np.float32))
    y = (x[:, 0] > 0).long()
    inputs = InputFormat((5,), (0.0,) * 5, (1.0,) * 5, ("a", "b"))
    return DataSplit("toy", x, y, x[:6], y[:6], x[:6], y[:6], inputs)


def train_toy(world, quantized):
    model, data = build("mlp:6", (5,), 2, seed=0), toy()
    options = {"epochs": 2, "batch_size": 10, "lr": 0.01, "world": world}
    if not quantized:
        done = fit(model, data, **options)
        return [record["loss"] for record in done.history], torch.cat(
            [p.flatten() for p in model.parameters()]
        ).tolist()
    config = QuantConfig.method("srq+dropbits+bits", 3, None)
    done = quantize_and_train(model, data, config, **options)
    return [record["loss"] for record in done.history], report(done.model).to_dict()


def child(rank, folder, queue):
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
        queue.put((rank, [train_toy(World(rank, 2), quantized) for quantized in (False, True)]))
        dist.barrier()
        dist.destroy_process_group()
    except Exception:
        queue.put((rank, traceback.format_exc()))


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs torch.distributed with gloo")
def test_two_processes_train_as_one(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=child, args=(rank, tmp_path, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        results = dict(queue.get(timeout=120) for _ in processes)
    finally:
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
    assert not any(isinstance(result, str) for result in results.values()), results
    assert results[0] == results[1]
    for found, quantized in zip(results[0], (False, True), strict=True):
        losses, rest = train_toy(World(), quantized)
        assert found[0] == pytest.approx(losses, rel=1e-4)
        if not quantized:
            assert found[1] == pytest.approx(rest, abs=1e-5)
        else:
            assert found[1] == rest
