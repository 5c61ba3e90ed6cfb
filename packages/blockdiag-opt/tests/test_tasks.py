"""Tasks are what they say: seeds govern what they should and nothing else, risks are exact, test data stay apart."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from blockdiag_opt import tasks
from blockdiag_opt.tasks import TASKS, english_text, make_task
from shared_core.errors import InputError, UnknownKeyError

EMBEDDED = [name for name, entry in TASKS.items() if not entry.needs]


@pytest.fixture(scope="module", params=EMBEDDED)
def task(request):
    return make_task(request.param)


def weights(model: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def test_a_seed_gives_the_same_run_and_leaves_the_global_state_alone(task):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    models = [task.build(seed) for seed in (3, 3, 4)]
    streams = [list(task.batches(seed, 3)) for seed in (3, 3, 4)]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(weights(models[0]), weights(models[1]))
    for one, two in zip(streams[0], streams[1], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not all(torch.equal(a[0], b[0]) for a, b in zip(streams[0], streams[2], strict=True))
    # The linear problems start from zero, whatever the seed.
    assert torch.equal(weights(models[0]), weights(models[2])) == task.name.startswith("correlated")


def test_more_steps_do_not_change_the_first_batches(task):
    short, long = list(task.batches(0, 2)), list(task.batches(0, 5))
    assert len(long) == 5
    assert all(torch.equal(a[0], b[0]) for a, b in zip(short, long, strict=False))


def test_metrics_are_those_declared_and_gradients_reach_every_weight(task):
    model = task.build(0)
    batch = next(task.batches(0, 1))
    assert len(batch[0]) == task.batch_size
    task.loss(model, batch).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() and p.grad.any() for p in model.parameters())
    found = task.evaluate(model)
    assert list(found) == [metric.name for metric in task.metrics]
    assert all(math.isfinite(value) for value in found.values())


def test_an_untrained_model_is_at_chance():
    """Closed forms: zero weights have relative risk 1; logits near 0 give the loss of guessing."""
    for name in ("correlated", "correlated-permuted"):
        task = make_task(name)
        assert task.evaluate(task.build(0)) == pytest.approx({"relative excess risk": 1.0})
    task = make_task("digits")
    model = task.build(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    batch = next(task.batches(0, 1))
    assert float(task.loss(model, batch).detach()) == pytest.approx(math.log(10), rel=1e-6)
    found = task.evaluate(model)
    assert found["test loss"] == pytest.approx(math.log(10), rel=1e-6)
    # Of equal logits the first counts: the share of zeros, in percent.
    assert found["test accuracy"] == pytest.approx(10, abs=3)


def test_an_epoch_shows_every_example_once():
    rows = torch.arange(10)
    seen = [batch[0] for batch in tasks._shuffled([rows], 3, seed=0, steps=6)]
    for epoch in (seen[:3], seen[3:]):
        assert len(torch.cat(epoch).unique()) == 9
    whole = next(tasks._shuffled([rows], 64, seed=0, steps=1))[0]
    assert sorted(whole.tolist()) == list(range(10))


def test_excess_risk_is_the_expected_loss_less_the_noise():
    """Monte Carlo over many fresh batches against the closed form."""
    task = make_task("correlated")
    model = task.build(0)
    torch.nn.init.normal_(model.weight, std=0.3, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        loss = np.mean([float(task.loss(model, batch)) for batch in task.batches(1, 300)])
        zero = np.mean([float(task.loss(task.build(0), batch)) for batch in task.batches(1, 300)])
    noise = 0.5 * 10 * 0.1**2
    assert task.evaluate(model)["relative excess risk"] == pytest.approx((loss - noise) / (zero - noise), rel=0.02)


def test_features_are_correlated_within_groups_of_ten_only():
    plain = torch.cat([batch[0] for batch in make_task("correlated").batches(0, 400)]).double()
    covariance = plain.T @ plain / len(plain)
    inside = torch.block_diag(*[torch.ones(10, 10)] * 20).bool()
    assert covariance[~inside].abs().max() < 0.02
    blocks = torch.stack([covariance[i : i + 10, i : i + 10] for i in range(0, 200, 10)])
    condition = torch.linalg.cond(blocks)
    assert torch.allclose(condition, torch.full_like(condition, 1e3), rtol=0.2)


def test_the_negative_control_is_the_same_problem_with_features_in_another_order():
    """Adam does not see the order: with the permutation, its whole trajectory is the same."""
    from blockdiag_opt.experiments import train_once

    one, two = (
        train_once(make_task(name), "adam", 0.05, 0, steps=30) for name in ("correlated", "correlated-permuted")
    )
    np.testing.assert_allclose(one["loss"], two["loss"], rtol=1e-4)
    scattered = torch.cat([batch[0] for batch in make_task("correlated-permuted").batches(0, 100)]).double()
    covariance = (scattered.T @ scattered / len(scattered)).abs()
    covariance.fill_diagonal_(0)
    inside = torch.block_diag(*[torch.ones(10, 10)] * 20).bool()
    # A feature keeps about half of its nine partners' mass anywhere, nearly none of it in its own ten.
    assert covariance[inside].sum() < 0.15 * covariance[covariance > 0.03].sum()


def test_training_and_test_examples_do_not_overlap():
    images = tasks._digits()
    assert len(images.train) + len(images.test) == 1797
    joint = torch.cat([images.train, images.test]).flatten(1)
    from shared_core.data import load

    assert torch.equal(joint.sum(dim=0), torch.from_numpy(load("digits").images).float().sum(dim=0).flatten() / 16)
    assert len(tasks._digits(500).train) == 500
    assert torch.equal(tasks._digits(500).test, images.test)


def test_standardisation_knows_the_training_rows_only():
    task = make_task("breast-cancer")
    rows = {tuple(row.tolist()): row for batch in task.batches(0, 100) for row in batch[0]}
    train = torch.stack(list(rows.values()))
    assert len(train) == 456
    assert train.mean(dim=0).abs().max() < 1e-5
    assert torch.allclose(train.std(dim=0, correction=0), torch.ones(30), atol=1e-4)


def test_english_is_english():
    text = english_text()
    assert text.count(" the ") > 2_000
    assert len(text) > 300_000


def test_a_text_file_is_learned_from(tmp_path):
    file = tmp_path / "abab.txt"
    file.write_text("ab" * 20_000)
    task = make_task("char-lstm", text=file, steps=7)
    assert task.steps == 7
    assert "40,000 characters of abab.txt" in task.description
    x, y = next(task.batches(0, 1))
    assert x.shape == y.shape == (32, 50)
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert set(x.unique().tolist()) == {1, 2}
    model = task.build(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    # Uniform over the two letters and the code of rare ones.
    assert task.evaluate(model)["test bits per character"] == pytest.approx(math.log2(3), rel=1e-5)


def test_bad_tasks_say_what_to_do(tmp_path):
    with pytest.raises(UnknownKeyError, match="no task 'x'; there are correlated, correlated-permuted"):
        make_task("x")
    with pytest.raises(InputError, match="task 'digits' does not read a text; only char-lstm does"):
        make_task("digits", text=tmp_path / "a.txt")
    with pytest.raises(InputError, match=r"none\.txt: No such file or directory; give a text file"):
        make_task("char-lstm", text=tmp_path / "none.txt")
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(InputError, match=r"short\.txt: 9 characters are too few to learn from; give 20,000 or more"):
        make_task("char-lstm", text=tmp_path / "short.txt")
    with pytest.raises(InputError, match="task 'digits': steps = 0; give 1 or more"):
        make_task("digits", steps=0)


@pytest.mark.parametrize("name", ["autoencoder", "cnn", "mlp"])
def test_mnist_is_pooled_to_14_by_14(data_folder, name):
    task = make_task(name)
    images = next(task.batches(0, 1))[0]
    assert images.numel() == 128 * 196
    assert 0.05 < float(images.mean()) < 0.25
    assert float(images.max()) <= 1
    assert all(math.isfinite(value) for value in task.evaluate(task.build(0)).values())


def test_missing_mnist_is_said_so(tmp_path, monkeypatch):
    monkeypatch.setenv("SHARED_CORE_DATA", str(tmp_path))
    tasks._mnist.cache_clear()
    with pytest.raises(InputError, match="mnist"):
        make_task("mlp")
    tasks._mnist.cache_clear()
