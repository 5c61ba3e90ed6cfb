"""Spectra equal numpy's of the matrices spelled out; the monitor tells blocks that work from blocks that do not."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from torch import nn

from blockdiag_opt import (
    BlockAdagrad,
    BlockAdam,
    BlockAMSGrad,
    BlockRMSprop,
    Monitor,
    SpectrumClip,
    lay_out,
    spectrum,
)
from blockdiag_opt.monitor import effective_samples, independent_energy, spectrum_of_state
from blockdiag_opt.plots import plot_monitor
from blockdiag_opt.tasks import correlated
from shared_core.errors import InputError


def run(optimizer, grads, after=None):
    param = optimizer.param_groups[0]["params"][0]
    for grad in grads:
        param.grad = torch.from_numpy(np.asarray(grad)).to(param.dtype).reshape(param.shape)
        optimizer.step()
        if after is not None:
            after()


def moments(grads, beta2):
    """Second moments of each row of (steps, rows, n) gradients, spelled out."""
    _, rows, n = grads.shape
    found = np.zeros((rows, n, n))
    for grad in grads:
        found = beta2 * found + (1 - beta2) * np.einsum("ri,rj->rij", grad, grad)
    return found


def double(rows, n):
    return torch.zeros(rows, n, dtype=torch.float64, requires_grad=True)


def test_a_spectrum_is_that_of_the_matrices_spelled_out():
    grads = np.random.default_rng(0).normal(size=(12, 3, 4))
    optimizer = BlockAdam([("w", double(3, 4))], lr=0.01, betas=(0.9, 0.95), eps=1e-3, block_size=4)
    run(optimizer, grads)
    found = spectrum(optimizer)["w"]
    full = moments(grads, 0.95)
    values = np.linalg.eigvalsh(full)
    np.testing.assert_allclose(found.eigenvalues, values, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(found.condition, values[:, -1] / values[:, 0], rtol=1e-6)
    diagonal = np.stack([np.diag(np.diag(block)) for block in full])
    share = np.linalg.norm(full - diagonal, axis=(1, 2)) / np.linalg.norm(full, axis=(1, 2))
    np.testing.assert_allclose(found.off_diagonal, share, rtol=1e-9)
    rates = 0.01 / (1 - 0.9**12) / (np.sqrt(values / (1 - 0.95**12)) + 1e-3)
    assert (found.low, found.high) == pytest.approx((rates.min(), rates.max()), rel=1e-8)
    assert (found.n, found.step) == (4, 12)
    assert found.to_dict()["blocks"] == 3


def test_clipping_bounds_the_effective_rates():
    grads = np.random.default_rng(1).normal(size=(9, 3, 4)) * np.array([1, 1e-3, 1, 1e3])
    optimizer = BlockAdam([("w", double(3, 4))], lr=0.01, block_size=4, clip=SpectrumClip(0.1, 0.5))
    run(optimizer, grads)
    found = spectrum(optimizer)["w"]
    assert (found.low, found.high) == pytest.approx(SpectrumClip(0.1, 0.5).bounds(9))


def test_the_rates_are_those_of_the_step_taken():
    # Without first moment the step along an eigenvector is its rate times the gradient along it.
    grads = np.random.default_rng(2).normal(size=(6, 1, 4))
    param = double(1, 4)
    optimizer = BlockRMSprop([("w", param)], lr=0.05, alpha=0.8, block_size=4)
    run(optimizer, grads)
    before = param.detach().clone()
    _, vectors = np.linalg.eigh(0.8 * moments(grads, 0.8)[0])
    run(optimizer, [vectors[:, 0] * 1e-9])
    rate = float((before - param.detach()).norm()) / 1e-9
    assert spectrum(optimizer)["w"].high == pytest.approx(rate, rel=1e-5)


def test_diagonal_tensors_have_blocks_of_one():
    param = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimizer = BlockAdam([("bias", param)], lr=0.1, betas=(0.0, 0.5), eps=0.0)
    run(optimizer, [np.array([1.0, 2.0, 4.0, 0.0, 1.0])])
    found = spectrum(optimizer)["bias"]
    np.testing.assert_allclose(found.eigenvalues[:, 0], 0.5 * np.array([1, 4, 16, 0, 1.0]))
    # A coordinate without gradient does not move, whatever its rate.
    assert (found.low, found.high) == pytest.approx((0.1 / 4, 0.1))
    assert (found.excess, float(found.condition.max())) == (0.0, 1.0)


@pytest.mark.parametrize("kind", [BlockAdam, BlockAMSGrad, BlockRMSprop, BlockAdagrad])
@pytest.mark.parametrize("grouping", ["output", "input", "diag", "full"])
def test_a_saved_state_tells_what_the_live_optimizer_does(kind, grouping):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(7, 5), nn.Conv1d(1, 2, 3, padding=1))
    optimizer = kind(model.named_parameters(), lr=0.01, block_size=3, grouping=grouping)
    for step in range(4):
        optimizer.zero_grad()
        model(torch.linspace(-1, 1 + step, 14).view(2, 1, 7)).square().sum().backward()
        optimizer.step()
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    saved = spectrum_of_state(torch.load(buffer, weights_only=True))
    live = spectrum(optimizer)
    assert saved.keys() == live.keys() == dict(model.named_parameters()).keys()
    for name, found in live.items():
        torch.testing.assert_close(saved[name].eigenvalues, found.eigenvalues)
        assert (saved[name].n, saved[name].low, saved[name].high) == (found.n, found.low, found.high)


def test_explicit_blocks_and_names_survive_saving():
    param = double(2, 3)
    blocks = torch.tensor([[0, 5], [1, 3], [2, 4]])
    optimizer = BlockAdam([{"params": [param], "blocks": blocks}], lr=0.1)
    run(optimizer, np.random.default_rng(0).normal(size=(3, 2, 3)))
    saved = spectrum_of_state(optimizer.state_dict())
    assert saved["0.0"].n == 2
    torch.testing.assert_close(saved["0.0"].eigenvalues, spectrum(optimizer)["0.0"].eigenvalues)


@pytest.mark.parametrize("beta2", [0.9, 0.99])
def test_the_energy_of_independent_coordinates_is_what_chance_gives(beta2):
    random = np.random.default_rng(5)
    steps, blocks, n = 60, 4000, 6
    full = moments(random.normal(size=(steps, blocks, n)) * np.logspace(0, -1, n), beta2)
    off = full - np.stack([np.diag(np.diag(block)) for block in full])
    share = np.sqrt(np.mean(np.sum(off**2, (1, 2)) / np.sum(full**2, (1, 2))))
    expected = independent_energy(torch.from_numpy(full), effective_samples("adam", beta2, steps))
    assert float(expected.square().mean().sqrt()) == pytest.approx(share, rel=0.05)


def test_effective_samples_count_weights():
    for beta2, steps in ((0.9, 1), (0.9, 7), (0.999, 300)):
        weights = beta2 ** np.arange(steps)
        assert effective_samples("adam", beta2, steps) == pytest.approx(weights.sum() ** 2 / (weights**2).sum())
    assert effective_samples("adagrad", 0.0, 7) == 7


# ---- the monitor


def effective(grads, lr, betas, eps):
    """alpha_t (V^{1/2} + eps I)^{-1} of each row after all gradients."""
    steps = len(grads)
    values, vectors = np.linalg.eigh(moments(grads, betas[1]) / (1 - betas[1] ** steps))
    rates = lr / (1 - betas[0] ** steps) / (np.sqrt(values) + eps)
    return np.einsum("rij,rj,rkj->rik", vectors, rates, vectors)


def test_the_oscillation_is_the_norm_of_the_change_of_the_matrix_applied():
    grads = np.random.default_rng(7).normal(size=(20, 5, 4))
    optimizer = BlockAdam([("w", double(5, 4))], lr=0.02, betas=(0.9, 0.97), eps=1e-2, block_size=4)
    monitor = Monitor.attach(optimizer, every=8)
    run(optimizer, grads)
    records = monitor.records["w"]
    assert [record["step"] for record in records] == [1, 8, 16]
    one, two = (effective(grads[:steps], 0.02, (0.9, 0.97), 1e-2) for steps in (8, 16))
    expected = np.linalg.norm(two - one, ord=2, axis=(1, 2)).max()
    assert records[0]["oscillation"] is None
    assert records[2]["oscillation"] == pytest.approx(expected, rel=1e-6)
    live = effective(grads[:16], 0.02, (0.9, 0.97), 1e-2)
    values = np.linalg.eigvalsh(live)
    assert (records[2]["low"], records[2]["high"]) == pytest.approx((values.min(), values.max()), rel=1e-6)


@pytest.mark.parametrize("layout", ["output", "input", "blocks"])
def test_a_sample_of_blocks_meets_their_own_gradients(layout):
    # 160 blocks of 4 and 3: more than are sampled. Block j has gradients of size j + 1, nearly.
    options = {"grouping": layout, "block_size": 4}
    if layout == "blocks":
        options = {"blocks": torch.randperm(640, generator=torch.Generator().manual_seed(0)).view(160, 4)}
    param = torch.zeros((80, 8) if layout != "input" else (8, 80), dtype=torch.float64, requires_grad=True)
    optimizer = BlockAdam([{"params": [("w", param)], **options}], lr=0.1, betas=(0.9, 0.5))
    monitor = Monitor.attach(optimizer, every=1)
    random = np.random.default_rng(0)
    for _ in range(3):
        run(optimizer, [random.normal(size=param.shape)])
    assert len(monitor.state_dict()["before"]["w"]) == 64
    total, squares, _ = monitor.state_dict()["sizes"]["w"]
    # The trace of V is the decayed sum of squared gradients, in each sampled block.
    whole = spectrum(optimizer)["w"].eigenvalues.sum(1)
    places = torch.linspace(0, 159, 64).round().long()
    torch.testing.assert_close(0.5 * total, whole[places])
    assert bool((squares <= total.square()).all())


def test_bursts_lower_the_number_of_gradients_that_count():
    # A single burst outweighs all others: V is of rank one although coordinates are independent.
    random = np.random.default_rng(8)
    grads = random.normal(size=(200, 64, 6))
    grads[190] *= 1e3
    optimizer = BlockAdam([("w", double(64, 6))], lr=0.01, block_size=6)
    monitor = Monitor.attach(optimizer, every=200)
    run(optimizer, grads)
    last = monitor.records["w"][-1]
    assert last["off_diagonal"] > 0.8
    assert last["excess"] < 0.35
    # Without having seen the gradients it cannot know.
    assert spectrum(optimizer)["w"].excess > 0.7


def train(task, steps, lr):
    model = task.build(0)
    optimizer = BlockAdam(model.named_parameters(), lr=lr)
    monitor = Monitor.attach(optimizer, every=25)
    for batch in task.batches(1, steps):
        optimizer.zero_grad()
        task.loss(model, batch).backward()
        optimizer.step()
    return monitor


def test_it_tells_groups_that_are_correlated_from_groups_that_are_not(tmp_path):
    # Each with its best learning rate; at random, one pair in twenty still comes from one group.
    aligned, permuted = train(correlated(), 150, 0.1), train(correlated(permuted=True), 150, 0.6)
    assert "see correlations that Adam cannot" in aligned.summary()
    assert "blocks matter for 100%" in aligned.summary()
    assert "blocks of 10 do nothing Adam would not" in permuted.summary()
    assert "use block_size=1" in permuted.summary().splitlines()[-1]
    assert aligned.records["weight"][-1]["condition"] > 20 * permuted.records["weight"][-1]["condition"]
    plot_monitor(tmp_path / "m.png", aligned.records)
    assert (tmp_path / "m.png").stat().st_size > 1000


def test_independent_gradients_have_no_excess():
    random = np.random.default_rng(3)
    optimizer = BlockAdam([("w", double(40, 10))], lr=0.01)
    monitor = Monitor.attach(optimizer, every=50)
    run(optimizer, random.normal(size=(150, 40, 10)))
    for record in monitor.records["w"]:
        assert record["excess"] < 0.08
    assert monitor.records["w"][-1]["off_diagonal"] > 0.2


def test_it_says_when_there_is_nothing_to_see():
    flat = BlockAdam([("w", double(3, 4))], lr=0.01, block_size=1)
    monitor = Monitor.attach(flat)
    run(flat, np.ones((2, 3, 4)))
    assert monitor.records == {}
    assert "no tensor has blocks" in monitor.summary()
    fresh = Monitor(BlockAdam([("w", double(3, 4))], lr=0.01))
    assert "nothing recorded" in fresh.summary()
    closed = BlockAdam([("w", double(3, 4))], lr=0.01, clip=SpectrumClip(0.1, 1e6))
    monitor = Monitor.attach(closed, every=1)
    run(closed, np.random.default_rng(0).normal(size=(3, 3, 4)))
    assert "every step is SGD's" in monitor.summary()


def test_dead_blocks_do_not_count():
    grads = np.random.default_rng(0).normal(size=(6, 3, 4))
    grads[:, 1] = 0
    optimizer = BlockAdam([("w", double(3, 4))], lr=0.01, block_size=4)
    monitor = Monitor.attach(optimizer, every=2)
    run(optimizer, grads)
    last = monitor.records["w"][-1]
    assert last["high"] < 10
    assert all(math.isfinite(value) for value in last.values())
    dead = BlockAdam([("w", double(3, 4))], lr=0.01, block_size=4)
    silent = Monitor.attach(dead, every=2)
    run(dead, np.zeros((4, 3, 4)))
    assert silent.records["w"][-1]["condition"] is None
    assert "no gradient" in silent.summary()


def test_a_monitor_resumes_where_it_stopped():
    grads = np.random.default_rng(4).normal(size=(24, 4, 5))

    def fresh():
        optimizer = BlockAdam([("w", double(4, 5))], lr=0.01, block_size=5)
        return optimizer, Monitor.attach(optimizer, every=5)

    whole, expected = fresh()
    run(whole, grads)
    first, before = fresh()
    run(first, grads[:13])
    second, after = fresh()
    buffer = io.BytesIO()
    torch.save({"optimizer": first.state_dict(), "monitor": before.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    second.load_state_dict(saved["optimizer"])
    after.load_state_dict(saved["monitor"])
    run(second, grads[13:])
    assert after.records == expected.records


def test_detaching_ends_it():
    optimizer = BlockAdam([("w", double(2, 4))], lr=0.01)
    monitor = Monitor.attach(optimizer, every=1)
    run(optimizer, np.ones((2, 2, 4)))
    monitor.detach()
    run(optimizer, np.ones((2, 2, 4)))
    assert len(monitor.records["w"]) == 2


def test_watching_changes_nothing():
    runs = []
    for watched in (False, True):
        param = double(4, 6)
        optimizer = BlockAdam([("w", param)], lr=0.01, block_size=3)
        if watched:
            Monitor.attach(optimizer, every=1)
        run(optimizer, np.random.default_rng(0).normal(size=(7, 4, 6)))
        runs.append(param.detach())
    assert torch.equal(runs[0], runs[1])


def test_what_cannot_be_looked_at_is_refused(unchecked):
    optimizer = BlockAdam([("w", double(3, 4))], lr=0.01)
    with pytest.raises(InputError, match="at least one step"):
        spectrum(optimizer)
    other = torch.optim.Adam([double(3, 4)])
    with pytest.raises(InputError, match="Adam has no blocks"):
        spectrum(other)
    with pytest.raises(InputError, match="Adam has no blocks"):
        Monitor(other)
    with pytest.raises(InputError, match="another optimizer"):
        spectrum_of_state(other.state_dict())
    with pytest.raises(InputError, match="needs 'state'"):
        spectrum_of_state({})
    with pytest.raises(InputError, match="before the first step"):
        spectrum_of_state(optimizer.state_dict())
    with pytest.raises(InputError, match="every"):
        Monitor(optimizer, every=0)
    with pytest.raises(InputError, match="no 'before'"):
        Monitor(optimizer).load_state_dict({"every": 1, "calls": 0, "records": {}, "sizes": {}})
    run(optimizer, np.ones((1, 3, 4)))
    broken = optimizer.state_dict()
    broken["state"][0]["exp_avg_sq"] = torch.ones(3, 7)
    with pytest.raises(InputError, match=r"'w'.*\(3, 7\).*blocks of 4"):
        spectrum_of_state(broken)
    assert lay_out((3, 4), "auto", 10).n == 4
