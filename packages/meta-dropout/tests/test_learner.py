"""Training, adapting, evaluating, saving: what must hold whatever is learned."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from meta_dropout.backbones import conv4, mlp
from meta_dropout.data import ClassImages, TaskSource
from meta_dropout.engine import Tasks
from meta_dropout.learner import LabelError, MetaLearner, calibration_error
from meta_dropout.methods import METHODS
from meta_dropout.toys import GaussianTasks, SineTasks, oracle_accuracy
from shared_core.errors import InputError, UnknownKeyError
from shared_core.runs import load_tree, save_tree

TASKS = GaussianTasks(ways=3, queries=4, signal=2, nuisance=2)


def learner(method="meta-dropout", **options) -> MetaLearner:
    plain = {"inner_lr": 0.1, "inner_steps": 2, "test_samples": 3}
    return MetaLearner(mlp(inputs=4, outputs=3, hidden=(8,)), method, **{**plain, **options})


def values(made: MetaLearner) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in made.parameters().items()}


WITHOUT_TASKS = {"scratch", "pretrained"}


@pytest.mark.parametrize("method", [m for m in METHODS if not m.startswith("adversarial") and m not in WITHOUT_TASKS])
def test_every_method_trains_adapts_and_survives_the_disk(method, tmp_path):
    made = learner(method)
    before = values(made)
    made.fit(TASKS, steps=2, meta_batch=3)
    after = values(made)
    assert all(torch.isfinite(value).all() for value in after.values())
    assert any(not torch.equal(before[name], value) for name, value in after.items())
    tasks = TASKS.batch(9, 1)
    answer = made.adapt(tasks.support[0], tasks.support_labels[0], spread=2).predict(tasks.query[0])
    assert np.allclose(answer.probability.sum(1), 1)
    noisy = METHODS[method].noise not in {"none", "deterministic", "more-params"}
    assert (answer.spread > 0).any() == noisy
    assert all(torch.equal(after[name], value) for name, value in values(made).items())
    network = {"kind": "mlp", "inputs": 4, "outputs": 3, "hidden": [8]}
    made.save(tmp_path / "m.safetensors", network=network)
    again = MetaLearner.load(tmp_path / "m.safetensors")
    same = again.adapt(tasks.support[0], tasks.support_labels[0], spread=2).predict(tasks.query[0])
    np.testing.assert_array_equal(same.probability, answer.probability)
    np.testing.assert_array_equal(same.spread, answer.spread)


def test_a_learner_from_scratch_stays_as_it_was_drawn():
    made = learner("scratch")
    before = values(made)
    assert made.fit(TASKS, steps=5) == []
    assert all(torch.equal(before[name], value) for name, value in values(made).items())


def pictures(seed=0) -> TaskSource:
    """Six classes of bars at an angle of their own."""
    random = np.random.default_rng(seed)
    images = np.zeros((6, 8, 1, 8, 8), np.uint8)
    for k in range(6):
        images[k, :, 0, k + 1] = 200
    noisy = np.clip(images + random.integers(0, 50, images.shape), 0, 255).astype(np.uint8)
    data = ClassImages("bars", noisy.reshape(-1, 1, 8, 8), np.repeat(np.arange(6), 8), tuple("abcdef"))
    return TaskSource(data, ways=3, shots=1, queries=3, seed=seed)


def pretrained() -> MetaLearner:
    return MetaLearner(conv4(ways=3, size=8, filters=4, blocks=2, init="kaiming"), "pretrained", inner_steps=2)


def test_pretraining_follows_the_gradient_of_one_classifier_of_all_classes():
    made, source = pretrained(), pictures()
    made._widen(source)
    tasks, classes = source.batch(0, 2), source.classes(0, 2)
    assert classes.shape == (2, 3)
    found = made._classify(tasks, classes)
    plain = copy.deepcopy(made.model.module)
    wide = torch.nn.Linear(16, 6)
    with torch.no_grad():
        wide.weight.copy_(made._wide_head["wide.weight"])
        wide.bias.zero_()
    plain = torch.nn.Sequential(*list(plain.children())[:-1], wide)
    x = torch.cat([torch.cat([tasks.support[t], tasks.query[t]]) for t in range(2)])
    y = torch.cat([torch.cat([classes[t], classes[t].repeat_interleave(3)]) for t in range(2)])
    loss = functional.cross_entropy(plain(x), y)
    loss.backward()
    assert found.loss.mean().item() == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(found.gradients["wide.weight"], wide.weight.grad, rtol=1e-4, atol=1e-6)
    first = next(p for n, p in plain.named_parameters() if n == "0.main.weight")
    torch.testing.assert_close(found.gradients["module.0.main.weight"], first.grad, rtol=1e-4, atol=1e-6)


def test_pretraining_learns_resumes_and_leaves_no_wide_head_behind(tmp_path):
    source = pictures()
    whole, states = pretrained(), []
    history = whole.fit(source, steps=30, meta_batch=2, outer_lr=3e-2,
                        on_state=lambda s: states.append(copy.deepcopy(s)), state_every=10)  # fmt: skip
    assert history[-1].loss < 0.5 * history[0].loss
    assert history[-1].accuracy > 0.9
    resumed = pretrained()
    resumed.fit(source, steps=30, meta_batch=2, outer_lr=3e-2, resume=states[0])
    assert all(torch.equal(a, b) for a, b in zip(values(whole).values(), values(resumed).values(), strict=True))
    network = {"ways": 3, "size": 8, "filters": 4, "blocks": 2, "init": "kaiming"}
    whole.save(tmp_path / "m.safetensors", network=network)
    again = MetaLearner.load(tmp_path / "m.safetensors")
    assert not any("wide" in name for name in again.parameters())
    with pytest.raises(InputError, match="'pretrained' needs to know the classes"):
        learner("pretrained").fit(TASKS, steps=1)


def test_training_finds_what_tasks_have_in_common():
    """Clutter in most dimensions: a learner that adapts from scratch is far from the oracle, a trained one near it."""
    source = GaussianTasks(ways=3, queries=5, signal=2, nuisance=6, clutter=2.0, noise=0.3, spread=1.5)
    test = GaussianTasks(**{**source.__dict__, "seed": 99})
    made = MetaLearner(mlp(inputs=8, outputs=3, hidden=(16,)), "maml", inner_lr=0.3, inner_steps=2)
    untrained = made.evaluate(test, episodes=200, batch=50).mean
    history = made.fit(source, steps=300, meta_batch=8, outer_lr=3e-3)
    trained = made.evaluate(test, episodes=200, batch=50)
    assert trained.mean > untrained + 0.15
    assert trained.mean < oracle_accuracy(test) + 0.02
    assert np.mean([s.loss for s in history[-30:]]) < np.mean([s.loss for s in history[:30]])
    assert trained.half_width == pytest.approx(1.96 * trained.accuracy.std() / np.sqrt(200))


def test_sine_waves_are_learned_to_be_learned():
    made = MetaLearner(mlp(inputs=1, outputs=1), "maml", inner_lr=0.01, inner_steps=1, task="regression")
    before = made.evaluate(SineTasks(seed=5), episodes=100, batch=50).mean
    made.fit(SineTasks(), steps=300, meta_batch=10, outer_lr=3e-3)
    assert made.evaluate(SineTasks(seed=5), episodes=100, batch=50).mean < before / 1.5


def test_noise_with_several_samples_works_in_a_regression():
    made = MetaLearner(mlp(inputs=1, outputs=1), "meta-dropout", inner_lr=0.01, inner_steps=2, task="regression",
                       test_samples=4)  # fmt: skip
    made.fit(SineTasks(), steps=3, meta_batch=4)
    tasks = SineTasks(seed=5).batch(0, 3)
    found = made.evaluate(SineTasks(seed=5), episodes=3, batch=3)
    seeds = [made._task_seed((1 << 40) + k) for k in range(3)]
    answers = made.outputs(tasks, seeds)
    expected = [functional.mse_loss(answers[t], tasks.query_labels[t]).item() for t in range(3)]
    np.testing.assert_allclose(found.accuracy, expected, rtol=1e-5)
    task = made.adapt(tasks.support[0], tasks.support_labels[0], spread=3)
    answer = task.predict(tasks.query[0])
    np.testing.assert_allclose(answer.probability, task(tasks.query[0]).detach().numpy(), rtol=1e-6)
    assert (answer.spread > 0).all()


def test_an_interrupted_training_goes_on_to_the_same_parameters(tmp_path):
    whole = learner()
    states: list[dict] = []
    whole.fit(TASKS, steps=6, meta_batch=2, on_state=lambda s: states.append(copy.deepcopy(s)), state_every=2)
    save_tree(tmp_path / "s.safetensors", states[0])
    resumed = learner()
    steps = resumed.fit(TASKS, steps=6, meta_batch=2, resume=load_tree(tmp_path / "s.safetensors"))
    assert [s.step for s in steps] == [3, 4, 5, 6]
    assert all(torch.equal(a, b) for a, b in zip(values(whole).values(), values(resumed).values(), strict=True))


@pytest.mark.parametrize("at", ["between steps", "amid a step"])
def test_ctrl_c_keeps_every_whole_step(at, monkeypatch):
    whole = learner()
    whole.fit(TASKS, steps=6, meta_batch=2)
    states: list[dict] = []

    def stop(step):
        if step.step == 3:
            raise KeyboardInterrupt

    stopped = learner()
    with monkeypatch.context() as patch:
        if at == "amid a step":
            count = iter(range(9))
            original = torch.optim.Adam.step

            def half(self, *arguments):
                original(self, *arguments)
                if next(count) == 2:
                    raise KeyboardInterrupt

            patch.setattr(torch.optim.Adam, "step", half)
        with pytest.raises(KeyboardInterrupt):
            stopped.fit(TASKS, steps=6, meta_batch=2, on_step=stop if at == "between steps" else None,
                        on_state=lambda s: states.append(copy.deepcopy(s)), state_every=2)  # fmt: skip
    assert [s["step"] for s in states] == ([2, 3] if at == "between steps" else [2])
    resumed = learner()
    resumed.fit(TASKS, steps=6, meta_batch=2, resume=states[-1])
    assert all(torch.equal(a, b) for a, b in zip(values(whole).values(), values(resumed).values(), strict=True))


def test_chunks_of_tasks_change_nothing_but_memory():
    results = []
    for options in ({}, {"chunk": 1}, {"chunk": 2}, {"recompute": True}):
        made = learner(**options)
        made.fit(TASKS, steps=3, meta_batch=3)
        results.append(values(made))
    for other in results[1:]:
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(results[0].values(), other.values(), strict=True))


def test_noise_depends_on_its_seed_and_goes_away_when_switched_off():
    made = learner()
    tasks = TASKS.batch(0, 4)
    a, b, c = (made.outputs(tasks, seeds) for seeds in ([1, 2, 3, 4], [1, 2, 3, 4], [5, 6, 7, 8]))
    assert torch.equal(a, b)
    assert not torch.allclose(a, c)
    quiet = [made.outputs(tasks, seeds, sample=False) for seeds in ([1, 2, 3, 4], [5, 6, 7, 8])]
    assert torch.equal(*quiet)
    # A task's answer does not depend on the tasks beside it.
    alone = made.outputs(tasks.part(2, 1), [3])
    assert torch.allclose(alone[0], a[2], atol=1e-6)


def test_values_of_the_averaged_gradient_are_clipped_one_by_one(monkeypatch):
    made = learner("maml")
    seen: list[torch.Tensor] = []
    step = torch.optim.Adam.step

    def spy(self, *arguments):
        seen.extend(p.grad.clone() for group in self.param_groups for p in group["params"])
        return step(self, *arguments)

    found = made.meta_step(TASKS.batch(0, 3), [made._task_seed(k) for k in range(3)])
    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    made.fit(TASKS, steps=1, meta_batch=3, clip=1e-3)
    for name, gradient in zip(made.parameters(), seen, strict=True):
        assert torch.allclose(gradient, found.gradients[name].clamp(-1e-3, 1e-3), atol=1e-8)


def test_another_number_of_classes_starts_from_class_means():
    made = learner()
    made.fit(TASKS, steps=2, meta_batch=3)
    tasks = GaussianTasks(ways=5, queries=4, signal=2, nuisance=2).batch(0, 1)
    answer = made.adapt(tasks.support[0], tasks.support_labels[0], spread=2).predict(tasks.query[0])
    assert answer.probability.shape == (20, 5)
    still = made.adapt(tasks.support[0], tasks.support_labels[0], steps=0)
    h = functional.relu(made.model.module[0](tasks.support[0]))
    assert (still(tasks.query[0]).argmax(1) == torch.cdist(
        functional.relu(made.model.module[0](tasks.query[0])), h).argmin(1)).all()  # fmt: skip
    with pytest.raises(InputError, match="the head has 3 classes and the task 5"):
        learner("metasgd").adapt(tasks.support[0], tasks.support_labels[0])


def test_prototypes_are_class_means_of_embeddings():
    made = learner("protonet")
    tasks = TASKS.batch(0, 2)
    found = made.outputs(tasks, [0, 0])
    h, q = (functional.relu(made.model.module[0](x)) for x in (tasks.support[1], tasks.query[1]))
    assert torch.allclose(found[1], -torch.cdist(q, h).square(), atol=1e-4)


def test_steps_that_are_not_finite_are_skipped_and_counted():
    class Bad:
        def batch(self, number, count):
            tasks = TASKS.batch(number, count)
            if number == 1:
                tasks.support[0, 0, 0] = torch.nan
            return tasks

    made = learner("maml")
    history = made.fit(Bad(), steps=4, meta_batch=2)
    assert [s.skipped for s in history] == [0, 1, 1, 1]
    assert all(torch.isfinite(v).all() for v in values(made).values())


def test_wrong_input_is_told_in_a_line():
    made = learner()
    x = torch.randn(3, 4)
    for labels, message in (
        (torch.tensor([0.0, 1.0, 2.0]), "must be whole numbers"),
        (torch.tensor([0, 1]), "need one for each of 3 examples"),
        (torch.tensor([-1, 0, 1]), "found -1"),
        (torch.tensor([0, 0, 2]), r"class 1 of 0..2 has no example"),
    ):
        with pytest.raises(LabelError, match=message):
            made.adapt(x, labels)
    assert made.adapt(x, torch.tensor([0, 0, 2]), allow_missing=True)(x).shape == (3, 3)
    with pytest.raises(InputError, match="NaN or infinite"):
        made.adapt(x * torch.nan, torch.arange(3))
    with pytest.raises(UnknownKeyError, match="no method 'dropconnect'"):
        learner("dropconnect")
    with pytest.raises(InputError, match="outer_lr and clip must be > 0"):
        made.fit(TASKS, steps=1, outer_lr=0.0)
    first_order = METHODS["meta-dropout"].__class__("", "multiplicative", "fomaml")
    with pytest.raises(InputError, match="takes inner gradients for constants"):
        learner(first_order)
    with pytest.warns(UserWarning, match="learn from the query pass only"):
        learner(first_order, allow_first_order=True)


def test_files_that_are_none_of_ours_are_refused(tmp_path):
    save_tree(tmp_path / "other.safetensors", {"a": 1})
    with pytest.raises(InputError, match="no meta-learner of meta-dropout"):
        MetaLearner.load(tmp_path / "other.safetensors")
    made = learner()
    made.save(tmp_path / "own.safetensors")
    with pytest.raises(InputError, match="one of your own; pass the module"):
        MetaLearner.load(tmp_path / "own.safetensors")
    same = MetaLearner.load(tmp_path / "own.safetensors", mlp(inputs=4, outputs=3, hidden=(8,), seed=7))
    assert all(torch.equal(a, b) for a, b in zip(values(made).values(), values(same).values(), strict=True))
    with pytest.raises(InputError, match="cannot perturb '2', there is no such layer"):
        MetaLearner.load(tmp_path / "own.safetensors", nn.Sequential(nn.Linear(4, 3)))
    with pytest.raises(InputError, match="another version of meta-dropout, or it is damaged"):
        MetaLearner.load(tmp_path / "own.safetensors", mlp(inputs=4, outputs=3, hidden=(8, 8, 8)))


def test_adversarial_inner_training_attacks_the_support():
    made = MetaLearner(conv4(ways=3, size=16, filters=4, blocks=2), "adversarial-linf", inner_steps=1)
    x = torch.rand(2, 3, 1, 16, 16)
    y = torch.arange(3).expand(2, 3)
    tasks = Tasks(x, y, x, y)
    disturb = made._disturb()
    assert disturb is not None
    theta = made.model.role("theta")
    parameters = {
        name: p.detach().expand(2, *p.shape) if name in theta else p.detach()
        for name, p in made.model.named_parameters()
    }
    attacked = disturb(parameters, x, y)
    assert 0 < (attacked - x).abs().max() <= 0.1 * (1 + 1e-6)
    assert torch.isfinite(made.meta_step(tasks, [1, 2]).loss).all()


def test_calibration_error_is_the_weighted_gap_of_bins():
    confidence = np.array([0.95, 0.95, 0.55, 0.55])
    assert calibration_error(confidence, np.array([True, True, True, False])) == pytest.approx(
        (2 * 0.05 + 2 * 0.05) / 4
    )
