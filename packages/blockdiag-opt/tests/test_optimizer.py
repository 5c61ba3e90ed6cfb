"""The exact oracles: limit cases, invariances, and loops written from the paper's equations with numpy and scipy."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg
from torch import nn

from blockdiag_opt import (
    AdaBlock,
    BlockAdaFom,
    BlockAdagrad,
    BlockAdam,
    BlockAdamW,
    BlockAMSGrad,
    BlockRMSprop,
    RandomizedBlockAdam,
    SpectrumClip,
    native,
)
from blockdiag_opt.layout import lay_out, partition

DOUBLE = torch.float64
SHAPES = [(7, 5), (4, 3, 3, 3), (6,), ()]


@pytest.fixture(params=["native", "torch"])
def engine(request):
    if request.param == "native" and native.load() is None:
        pytest.skip(f"no native engine: {native.reason()}")
    return request.param


def draw(seed, *shape, dtype=DOUBLE):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def parameters(shapes=SHAPES, seed=0):
    return [nn.Parameter(draw(seed + k, *shape)) for k, shape in enumerate(shapes)]


def gradients(steps, shapes=SHAPES, seed=100):
    return [[draw(seed + 31 * t + k, *shape) for k, shape in enumerate(shapes)] for t in range(steps)]


def train(make, grads, shapes=SHAPES, seed=0):
    """Parameters after each step, flattened."""
    params = parameters(shapes, seed)
    optimizer = make(params)
    path = []
    for grad in grads:
        for param, g in zip(params, grad, strict=True):
            param.grad = g.clone()
        optimizer.step()
        path.append(torch.cat([param.detach().reshape(-1) for param in params]))
    return torch.stack(path)


def same(a, b, tolerance=1e-12):
    return (a - b).abs().max().item() <= tolerance


def loop(index, x, grads, step_of, *, keep, add, beta1):
    """Blocks by hand: V, m and ``x -= response(V) m`` for each list of coordinates.

    ``step_of(t, eigenvalues)`` is what multiplies the first moment.
    """
    x, path = x.copy(), []
    V = [np.zeros((len(block), len(block))) for block in index]
    m = np.zeros_like(x)
    for t, g in enumerate(grads, 1):
        m = beta1 * m + (1 - beta1) * g
        for j, block in enumerate(index):
            V[j] = keep(t) * V[j] + add(t) * np.outer(g[block], g[block])
            values, Q = np.linalg.eigh(V[j])
            x[block] -= Q @ (step_of(t, np.maximum(values, 0)) * (Q.T @ m[block]))
        path.append(x.copy())
    return np.stack(path)


def adam(lr, beta1=0.9, beta2=0.999, eps=1e-8, floor=0.0):
    def step(t, values):
        values = np.maximum(values, floor * values.max())
        return lr / (1 - beta1**t) / (np.sqrt(values / (1 - beta2**t)) + eps)

    return step


def adam_loop(index, x, grads, lr, eps=1e-8, floor=0.0):
    return loop(index, x, grads, adam(lr, eps=eps, floor=floor), keep=lambda t: 0.999, add=lambda t: 0.001, beta1=0.9)


# 1: limits


@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        (BlockAdam, torch.optim.Adam, {"lr": 0.02}),
        (BlockAdam, torch.optim.Adam, {"lr": 0.02, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-3}),
        (BlockAdam, torch.optim.Adam, {"lr": 0.02, "weight_decay": 0.1, "maximize": True}),
        (BlockAdam, torch.optim.Adam, {"lr": 0.02, "betas": (0.0, 0.9)}),
        (BlockAdam, torch.optim.Adam, {"lr": torch.tensor(0.02, dtype=DOUBLE), "weight_decay": 0.01}),
        (BlockAdam, torch.optim.Adam, {"lr": 0.02, "amsgrad": True, "betas": (0.5, 0.6)}),
        (BlockAMSGrad, torch.optim.Adam, {"lr": 0.02, "weight_decay": 0.1, "maximize": True}),
        (BlockAdamW, torch.optim.AdamW, {"lr": 0.02}),
        (BlockAdamW, torch.optim.AdamW, {"lr": 0.02, "weight_decay": 0.3, "maximize": True}),
        (BlockAdamW, torch.optim.AdamW, {"lr": torch.tensor(0.02, dtype=DOUBLE), "amsgrad": True}),
        (BlockRMSprop, torch.optim.RMSprop, {"lr": 0.02}),
        (BlockRMSprop, torch.optim.RMSprop, {"lr": 0.02, "alpha": 0.9, "momentum": 0.7, "weight_decay": 0.1}),
        (BlockRMSprop, torch.optim.RMSprop, {"lr": 0.02, "momentum": 0.7, "maximize": True, "weight_decay": 0.1}),
        (BlockAdagrad, torch.optim.Adagrad, {"lr": 0.1}),
        (
            BlockAdagrad,
            torch.optim.Adagrad,
            {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.3, "weight_decay": 0.1, "maximize": True},
        ),
    ],
)
@pytest.mark.parametrize("how", [{"block_size": 1}, {"grouping": "diag"}])
def test_blocks_of_one_are_the_diagonal_method(engine, ours, theirs, options, how):
    # A block size leaves filters whole.
    shapes = [(7, 5), (6,), ()] if "block_size" in how else SHAPES
    grads = gradients(50, shapes)
    if ours is BlockAMSGrad:
        expected = train(lambda p: theirs(p, amsgrad=True, **options), grads, shapes)
    else:
        expected = train(lambda p: theirs(p, **options), grads, shapes)
    assert same(train(lambda p: ours(p, engine=engine, **how, **options), grads, shapes), expected)


def test_clipped_blocks_of_one_are_adabound(engine):
    lr, final, gamma, eps = 0.03, 0.2, 0.05, 1e-8
    x = draw(0, 4, 3).numpy().reshape(-1)
    grads = [draw(5 + t, 4, 3) * 3.0 for t in range(50)]
    m, v, expected = np.zeros(12), np.zeros(12), x.copy()
    clipped = 0
    for t, grad in enumerate(grads, 1):
        for i, g in enumerate(grad.reshape(-1).tolist()):
            m[i] = 0.9 * m[i] + 0.1 * g
            v[i] = 0.999 * v[i] + 0.001 * g * g
            size = lr * math.sqrt(1 - 0.999**t) / (1 - 0.9**t) / (math.sqrt(v[i]) + eps)
            low, high = final * (1 - 1 / (gamma * t + 1)), final * (1 + 1 / (gamma * t))
            clipped += not low <= size <= high
            expected[i] -= min(max(size, low), high) * m[i]
    param = nn.Parameter(torch.tensor(x).view(4, 3))
    optimizer = BlockAdam(
        [param], lr=lr, block_size=1, clip=SpectrumClip(final, gamma), damping_form="paper", engine=engine
    )
    for grad in grads:
        param.grad = grad
        optimizer.step()
    assert clipped > 100
    assert np.abs(param.detach().numpy().reshape(-1) - expected).max() < 1e-12


@pytest.mark.parametrize("form", ["torch", "paper"])
def test_the_full_matrix_equals_a_sqrtm_loop(engine, form):
    d, lr, eps = 30, 0.05, 1e-3
    x, V, m = draw(0, d).numpy().copy(), np.zeros((d, d)), np.zeros(d)
    param = nn.Parameter(torch.tensor(x.copy()).view(5, 6))
    optimizer = BlockAdam([param], lr=lr, eps=eps, grouping="full", damping_form=form, floor=0.0, engine=engine)
    for t in range(1, 51):
        g = draw(9 + t, d).numpy()
        m = 0.9 * m + 0.1 * g
        V = 0.999 * V + 0.001 * np.outer(g, g)
        values, Q = linalg.eigh(V)
        root = linalg.sqrtm(V).real if t > d + 5 else (Q * np.sqrt(np.maximum(values, 0))) @ Q.T
        if form == "torch":
            matrix = np.linalg.inv(root / math.sqrt(1 - 0.999**t) + eps * np.eye(d)) * lr / (1 - 0.9**t)
        else:
            matrix = np.linalg.inv(root + eps * np.eye(d)) * lr * math.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        x = x - matrix @ m
        param.grad = torch.tensor(g).view(5, 6)
        optimizer.step()
    assert np.abs(param.detach().numpy().reshape(-1) - x).max() < 1e-9


def test_block_adagrad_adafom_and_rmsprop_equal_loops(engine):
    shape, size = (3, 8), 4
    index = [list(range(4 * j, 4 * j + 4)) for j in range(6)]
    grads = gradients(30, [shape])
    x = parameters([shape])[0].detach().numpy().reshape(-1)
    flat = [g[0].numpy().reshape(-1) for g in grads]
    eps = 1e-2
    cases = [
        (
            lambda p: BlockAdagrad(p, lr=0.1, lr_decay=0.05, eps=eps, floor=0.0, block_size=size, engine=engine),
            loop(
                index, x, flat, lambda t, w: 0.1 / (1 + (t - 1) * 0.05) / (np.sqrt(w) + eps),
                keep=lambda t: 1.0, add=lambda t: 1.0, beta1=0.0,
            ),
        ),
        (
            lambda p: BlockAdaFom(p, lr=0.1, eps=eps, floor=0.0, block_size=size, engine=engine),
            loop(
                index, x, flat, lambda t, w: 0.1 / math.sqrt(t) / (np.sqrt(w) + eps),
                keep=lambda t: (t - 1) / t, add=lambda t: 1 / t, beta1=0.9,
            ),
        ),
        (
            lambda p: BlockRMSprop(p, lr=0.1, alpha=0.9, eps=eps, floor=0.0, block_size=size, engine=engine),
            loop(
                index, x, flat, lambda t, w: 0.1 / (np.sqrt(w) + eps),
                keep=lambda t: 0.9, add=lambda t: 0.1, beta1=0.0,
            ),
        ),
    ]  # fmt: skip
    for make, expected in cases:
        assert np.abs(train(make, grads, [shape]).numpy() - expected).max() < 1e-10


def test_adagrads_initial_value_is_a_multiple_of_the_identity(engine):
    param = nn.Parameter(torch.zeros(2, 3, dtype=DOUBLE))
    param.grad = draw(0, 2, 3)
    BlockAdagrad([param], lr=1.0, initial_accumulator_value=0.5, eps=0.0, floor=1e-12, engine=engine).step()
    for row, g in zip(param.detach().numpy(), param.grad.numpy(), strict=True):
        expected = -np.linalg.inv(linalg.sqrtm(0.5 * np.eye(3) + np.outer(g, g))) @ g
        assert np.abs(row - expected).max() < 1e-12


def test_the_authors_preset(engine):
    shape = (6, 2)
    index = [[0, 2, 4], [6, 8, 10], [1, 3, 5], [7, 9, 11]]
    grads = gradients(20, [shape])
    x = parameters([shape])[0].detach().numpy().reshape(-1)
    lr = 0.05

    def step(t, values):
        return lr * math.sqrt(1 - 0.999**t) / (1 - 0.9**t) / (np.sqrt(values + 1e-6) + 1e-4)

    expected = loop(
        index, x, [g[0].numpy().reshape(-1) for g in grads], step, keep=lambda t: 0.999, add=lambda t: 0.001, beta1=0.9
    )
    found = train(lambda p: AdaBlock(p, lr=lr, block_size=3, engine=engine, floor=0.0), grads, [shape])
    assert np.abs(found.numpy() - expected).max() < 1e-11


def test_decoupled_decay_shrinks_before_the_step(engine):
    param = nn.Parameter(torch.ones(2, 3, dtype=DOUBLE))
    param.grad = torch.zeros(2, 3, dtype=DOUBLE)
    BlockAdamW([param], lr=0.1, weight_decay=0.5, engine=engine).step()
    assert torch.allclose(param, torch.full_like(param, 0.95), atol=1e-15)


def test_rmsprop_momentum_of_blocks_equals_a_loop(engine):
    lr, eps, alpha, momentum = 0.05, 1e-2, 0.9, 0.8
    grads = gradients(15, [(3, 4)])
    x = parameters([(3, 4)])[0].detach().numpy().copy()
    V, buffer = np.zeros((3, 4, 4)), np.zeros((3, 4))
    for grad in grads:
        g = grad[0].numpy()
        for j in range(3):
            V[j] = alpha * V[j] + (1 - alpha) * np.outer(g[j], g[j])
            values, Q = np.linalg.eigh(V[j])
            buffer[j] = momentum * buffer[j] + Q @ ((Q.T @ g[j]) / (np.sqrt(np.maximum(values, 0)) + eps))
        x -= lr * buffer
    found = train(
        lambda p: BlockRMSprop(p, lr, alpha, eps, momentum=momentum, floor=0.0, engine=engine), grads, [(3, 4)]
    )
    assert np.abs(found[-1].numpy() - x.reshape(-1)).max() < 1e-10


# 2 and 4: first steps, constants, scale


@pytest.mark.parametrize("n", [2, 3, 10, 33])
def test_the_first_step_normalises_each_block_and_a_constant_gradient_repeats_it(engine, n):
    lr, eps = 0.1, 1e-2
    g = draw(1, 4, n)
    param = nn.Parameter(torch.zeros(4, n, dtype=DOUBLE))
    optimizer = BlockAdam([param], lr=lr, eps=eps, block_size=n, engine=engine)
    for t in range(1, 21):
        before = param.detach().clone()
        param.grad = g.clone()
        optimizer.step()
        expected = -lr * g / (g.norm(dim=1, keepdim=True) + eps)
        assert same(param.detach() - before, expected, 1e-9), t


def test_gradients_times_c_and_eps_times_c_change_nothing(engine):
    grads = gradients(20)
    for c in (1e-9, 1e3):
        a = train(lambda p: BlockAdam(p, lr=0.1, eps=1e-3, engine=engine), grads)
        b = train(lambda p, c=c: BlockAdam(p, lr=0.1, eps=c * 1e-3, engine=engine), [[c * g for g in t] for t in grads])
        assert same(a, b, 1e-9)


def test_sqrt_block_multiplies_the_rate_of_each_block_by_the_root_of_its_size(engine):
    grads = gradients(10)
    start = torch.cat([param.detach().reshape(-1) for param in parameters()])
    plain = train(lambda p: BlockAdam(p, lr=0.1, engine=engine), grads) - start
    scaled = train(lambda p: BlockAdam(p, lr=0.1, lr_scale="sqrt_block", engine=engine), grads) - start
    factor = torch.cat([torch.full((math.prod(shape),), math.sqrt(lay_out(shape).n), dtype=DOUBLE) for shape in SHAPES])
    assert same(scaled, plain * factor, 1e-12)


# 3: rotations


def block_rotation(seed, blocks, n):
    rng = np.random.default_rng(seed)
    return linalg.block_diag(*[np.linalg.qr(rng.normal(size=(n, n)))[0] for _ in range(blocks)])


def descend(make, R, steps=25):
    """Steps on a random quadratic in the coordinates y with x = R y; the path of x."""
    rng = np.random.default_rng(7)
    d = R.shape[0]
    A = rng.normal(size=(d, d))
    H, b = A @ A.T / d, rng.normal(size=d)
    param = nn.Parameter(torch.tensor(R.T @ np.linspace(-1, 1, d)).view(2, -1))
    optimizer = make([param])
    path = []
    for _ in range(steps):
        x = R @ param.detach().numpy().reshape(-1)
        param.grad = torch.tensor(R.T @ (H @ x - b)).view(2, -1)
        optimizer.step()
        path.append(R @ param.detach().numpy().reshape(-1))
    return np.stack(path)


@pytest.mark.parametrize("options", [{}, {"clip": SpectrumClip(0.05, 0.5)}, {"weight_decay": 0.1}, {"amsgrad": True}])
def test_rotations_within_blocks_turn_the_trajectory_with_them(engine, options):
    def blocks(params):
        return BlockAdam(params, lr=0.05, eps=1e-3, block_size=4, engine=engine, **options)

    def diagonal(params):
        return torch.optim.Adam(params, lr=0.05)

    R = block_rotation(0, 4, 4)
    mixing = linalg.block_diag(block_rotation(1, 1, 8), np.eye(8))
    plain = descend(blocks, np.eye(16))
    assert np.abs(descend(blocks, R) - plain).max() < 1e-7
    assert np.abs(descend(blocks, mixing) - plain).max() > 1e-3
    for turned in (R, mixing):
        assert np.abs(descend(diagonal, turned) - descend(diagonal, np.eye(16))).max() > 1e-3


# 5: groupings against each other


def test_input_wise_is_output_wise_on_the_transpose(engine):
    grads = [draw(t, 7, 5) for t in range(10)]
    W, U = nn.Parameter(draw(77, 7, 5)), nn.Parameter(draw(77, 7, 5).T.contiguous())
    a = BlockAdam([W], lr=0.1, grouping="input", block_size=3, engine=engine)
    b = BlockAdam([U], lr=0.1, grouping="output", block_size=3, engine=engine)
    for g in grads:
        W.grad, U.grad = g, g.T.contiguous()
        a.step()
        b.step()
    assert torch.equal(W.detach(), U.detach().T)


def test_permuting_blocks_and_splitting_a_tensor_change_nothing(engine):
    grads = [draw(t, 40, 6) for t in range(10)]
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    start = draw(77, 40, 6)
    whole, mixed = nn.Parameter(start.clone()), nn.Parameter(start[order].clone())
    top, bottom = nn.Parameter(start[:13].clone()), nn.Parameter(start[13:].clone())
    optimizers = [BlockAdam(p, lr=0.1, block_size=3, engine=engine) for p in ([whole], [mixed], [top, bottom])]
    for g in grads:
        whole.grad, mixed.grad, top.grad, bottom.grad = g, g[order], g[:13], g[13:]
        for optimizer in optimizers:
            optimizer.step()
    assert same(whole.detach()[order], mixed.detach(), 1e-13)
    assert same(whole.detach(), torch.cat([top, bottom]).detach(), 1e-13)


@pytest.mark.parametrize(
    ("length", "index"), [(7, [[0, 1, 2, 3], [4, 5, 6]]), (11, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]])]
)
def test_padding_equals_a_ragged_loop(engine, length, index):
    blocks = [[length * r + i for i in part] for r in range(3) for part in index]
    grads = gradients(30, [(3, length)])
    x = parameters([(3, length)])[0].detach().numpy().reshape(-1)
    expected = adam_loop(blocks, x, [g[0].numpy().reshape(-1) for g in grads], 0.1, eps=1e-3)
    found = train(
        lambda p: BlockAdam(p, lr=0.1, eps=1e-3, floor=0.0, block_size=4, engine=engine), grads, [(3, length)]
    )
    assert np.abs(found.numpy() - expected).max() < 1e-10


def test_filters_equal_an_explicit_partition(engine):
    shape = (5, 4, 3, 3)
    grads = gradients(8, [shape])
    blocks = torch.arange(180).view(20, 9)
    a = train(lambda p: BlockAdam(p, lr=0.1, engine=engine), grads, [shape])
    assert torch.equal(a, train(lambda p: BlockAdam(p, lr=0.1, blocks=blocks, engine=engine), grads, [shape]))


def test_an_explicit_partition_equals_a_loop(engine):
    blocks = torch.tensor([[11, 0, 5, -1], [1, -1, 2, 3], [4, 6, 10, 9], [-1, -1, 8, 7]])
    index = [[i for i in block if i >= 0] for block in blocks.tolist()]
    grads = gradients(20, [(3, 4)])
    x = parameters([(3, 4)])[0].detach().numpy().reshape(-1)
    expected = adam_loop(index, x, [g[0].numpy().reshape(-1) for g in grads], 0.1, eps=1e-3)
    found = train(lambda p: BlockAdam(p, lr=0.1, eps=1e-3, floor=0.0, blocks=blocks, engine=engine), grads, [(3, 4)])
    assert np.abs(found.numpy() - expected).max() < 1e-10


# 6: the exact facts behind larger blocks


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.integers(2, 30), st.floats(0.01, 5.0))
def test_pinching_chain_and_adagrad_lemma(seed, steps, spread):
    d = 12
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(d, d)) * np.exp(rng.normal(size=d) * spread / 3)
    grads = rng.normal(size=(steps, d)) @ mix
    traces = []
    for n in (1, 2, 4, 12):
        param = nn.Parameter(torch.zeros(d, dtype=DOUBLE).view(1, d))
        optimizer = BlockAdagrad([param], lr=1.0, eps=0.0, floor=1e-13, block_size=n, engine="torch")
        left = 0.0
        for g in grads:
            before = param.detach().clone()
            param.grad = torch.tensor(g).view(1, d)
            optimizer.step()
            left += float(((before - param.detach()) * param.grad).sum())
        A = grads.T @ grads
        trace = sum(np.sqrt(np.maximum(np.linalg.eigvalsh(A[k : k + n, k : k + n]), 0)).sum() for k in range(0, d, n))
        assert left <= 2 * trace * (1 + 1e-6)
        traces.append(trace)
    assert all(coarse <= fine * (1 + 1e-9) for fine, coarse in itertools.pairwise(traces))


# 7: the spectrum clip


def test_a_fast_clip_is_sgd_on_the_first_moment(engine):
    final = 0.3
    params = parameters()
    x = [param.detach().clone() for param in params]
    m = [torch.zeros_like(param) for param in x]
    optimizer = BlockAdam(params, lr=0.01, clip=SpectrumClip(final, 1e12), engine=engine)
    for grad in gradients(10):
        for k, g in enumerate(grad):
            params[k].grad = g.clone()
            m[k] = 0.9 * m[k] + 0.1 * g
            x[k] = x[k] - final * m[k]
        optimizer.step()
    for k, param in enumerate(params):
        assert same(param.detach(), x[k], 1e-9)


def applied_matrix(make, V, n):
    """Columns of the matrix that multiplies the first moment, from steps on basis vectors; V is the stored moments."""
    columns = []
    for i in range(n):
        param = nn.Parameter(torch.zeros(1, n, dtype=DOUBLE))
        optimizer = make([param])
        param.grad = torch.zeros(1, n, dtype=DOUBLE)
        optimizer.step()
        saved = optimizer.state_dict()
        rows, cols = np.tril_indices(n)
        saved["state"][0]["exp_avg_sq"] = torch.tensor(V[rows, cols][None])
        unit = torch.zeros(1, n, dtype=DOUBLE)
        unit[0, i] = 1.0
        saved["state"][0]["exp_avg"] = unit
        optimizer.load_state_dict(saved)
        before = param.detach().clone()
        optimizer.step()
        columns.append((before - param.detach()).numpy()[0] / 0.9)
    return np.stack(columns, axis=1)


@pytest.mark.parametrize("n", [2, 3, 10])
def test_eigenvalues_of_the_applied_matrix(engine, n):
    rng = np.random.default_rng(n)
    Q = np.linalg.qr(rng.normal(size=(n, n)))[0]
    spectrum = np.logspace(-4, 2, n)
    V = (Q * spectrum) @ Q.T
    lr, eps, final, gamma, t = 0.01, 1e-3, 0.02, 0.4, 2
    root = np.sqrt(0.999 * spectrum / (1 - 0.999**t))
    free = lr / (1 - 0.9**t) / (root + eps)
    plain = applied_matrix(lambda p: BlockAdam(p, lr=lr, eps=eps, block_size=n, engine=engine), V, n)
    assert np.allclose(plain, (Q * free) @ Q.T, rtol=1e-9, atol=1e-9 * free.max())
    clip = SpectrumClip(final, gamma)
    low, high = final * (1 - 1 / (gamma * t + 1)), final * (1 + 1 / (gamma * t))
    assert free.min() < low
    assert free.max() > high
    found = applied_matrix(lambda p: BlockAdam(p, lr=lr, eps=eps, block_size=n, clip=clip, engine=engine), V, n)
    values = np.linalg.eigvalsh(found)
    assert values.min() >= low * (1 - 1e-9)
    assert values.max() <= high * (1 + 1e-9)
    assert np.allclose(found, (Q * np.clip(free, low, high)) @ Q.T, atol=1e-10)


def test_wide_bounds_change_no_bit(engine):
    grads = gradients(15)
    a = train(lambda p: BlockAdam(p, lr=0.1, engine=engine), grads)
    # Lower bound 1e300 * 1e-310, upper bound 1e310: none is ever met.
    b = train(lambda p: BlockAdam(p, lr=0.1, clip=SpectrumClip(1e5, 1e-200), engine=engine), grads)
    assert torch.equal(a, b)


def test_the_bounds_follow_the_schedule(engine):
    param = nn.Parameter(torch.zeros(2, 3, dtype=DOUBLE))
    optimizer = BlockAdam([param], lr=0.1, clip=SpectrumClip(0.4, 1e12), engine=engine)
    optimizer.param_groups[0]["lr"] = 0.025
    param.grad = draw(0, 2, 3)
    optimizer.step()
    assert same(param.detach(), -0.25 * 0.4 * 0.1 * param.grad, 1e-12)


@pytest.mark.parametrize(
    "values", [{"final_lr": 0}, {"final_lr": -1.0}, {"gamma": 0}, {"gamma": math.inf}, {"final_lr": math.nan}]
)
def test_clips_that_are_none(values):
    with pytest.raises(ValueError, match=r"SpectrumClip: .* must be a positive number"):
        SpectrumClip(**values)


# 8: drawing layers

LAYERS = [(7, 5), (6, 4), (3, 2, 3, 3), (5, 5), (6,)]


def test_drawing_none_is_adam_and_drawing_all_is_block_adam(engine):
    grads = gradients(20, LAYERS)
    none = train(lambda p: RandomizedBlockAdam(p, lr=0.1, layers_per_step=0, engine=engine), grads, LAYERS)
    assert same(none, train(lambda p: torch.optim.Adam(p, lr=0.1), grads, LAYERS))
    every = train(lambda p: RandomizedBlockAdam(p, lr=0.1, layers_per_step=4, engine=engine), grads, LAYERS)
    assert torch.equal(every, train(lambda p: BlockAdam(p, lr=0.1, engine=engine), grads, LAYERS))


def which_are_drawn(optimizer, params, grads):
    """Tensors whose step was not the diagonal one."""
    drawn = []
    for grad in grads:
        for param, g in zip(params, grad, strict=True):
            param.grad = g.clone()
        copies = [nn.Parameter(param.detach().clone()) for param in params]
        saved = copy.deepcopy(optimizer.state_dict())
        diagonal = RandomizedBlockAdam(copies, lr=0.1, layers_per_step=0)
        saved["param_groups"][0]["layers_per_step"] = 0
        diagonal.load_state_dict(saved)
        for twin, param in zip(copies, params, strict=True):
            twin.grad = param.grad.clone()
        diagonal.step()
        optimizer.step()
        drawn.append([k for k, (a, b) in enumerate(zip(copies, params, strict=True)) if not same(a, b, 1e-13)])
    return drawn


def test_exactly_k_tensors_are_drawn_and_all_in_turn(engine):
    params = parameters(LAYERS)
    optimizer = RandomizedBlockAdam(params, lr=0.1, layers_per_step=2, seed=3, engine=engine)
    drawn = which_are_drawn(optimizer, params, gradients(24, LAYERS))
    assert all(len(each) == 2 for each in drawn)
    assert {k for each in drawn for k in each} == {0, 1, 2, 3}


def test_draws_come_from_the_seed_and_go_on_after_a_resume(engine):
    grads = gradients(12, LAYERS)

    def run(seed):
        return train(lambda p: RandomizedBlockAdam(p, lr=0.1, seed=seed, engine=engine), grads, LAYERS)

    state = torch.random.get_rng_state()
    assert torch.equal(run(5), run(5))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(run(5), run(6))
    params = parameters(LAYERS)
    optimizer = RandomizedBlockAdam(params, lr=0.1, seed=5, engine=engine)
    for t, grad in enumerate(grads):
        for param, g in zip(params, grad, strict=True):
            param.grad = g.clone()
        optimizer.step()
        if t == 4:
            fresh = [nn.Parameter(param.detach().clone()) for param in params]
            resumed = RandomizedBlockAdam(fresh, lr=0.1, seed=99, engine=engine)
            resumed.load_state_dict(optimizer.state_dict())
            params, optimizer = fresh, resumed
    assert torch.equal(torch.cat([param.detach().reshape(-1) for param in params]), run(5)[-1])


def test_layers_that_were_not_drawn_first_still_move_when_their_basis_is_tracked(engine):
    shapes = [(8, 4)] * 6
    params = parameters(shapes)
    try:
        optimizer = RandomizedBlockAdam(params, lr=0.1, update_interval=50, engine=engine)
    except ValueError:
        return
    for t, grad in enumerate(gradients(40, shapes)):
        if t == 1:
            # Far enough for the interval to be in force.
            for entry in optimizer.state.values():
                entry["step"] += 2000
        before = [param.detach().clone() for param in params]
        for param, g in zip(params, grad, strict=True):
            param.grad = g.clone()
        optimizer.step()
        assert not any(torch.equal(old, param) for old, param in zip(before, params, strict=True))


# 9: AMSGrad in the Loewner order


def full(packed, n):
    V = np.zeros((len(packed), n, n))
    rows, cols = np.tril_indices(n)
    V[:, rows, cols] = V[:, cols, rows] = packed.numpy()
    return V


def test_the_bound_dominates_every_moment_and_the_steps_spectrum_never_grows(engine):
    n = 4
    param = nn.Parameter(torch.zeros(3, n, dtype=DOUBLE))
    optimizer = BlockAMSGrad([param], lr=0.1, betas=(0.9, 0.7), engine=engine)
    moments, bounds = [], []
    for t in range(25):
        param.grad = draw(t, 3, n) * math.exp(2 * math.sin(t))
        optimizer.step()
        state = optimizer.state_dict()["state"][0]
        moments.append(full(state["exp_avg_sq"], n))
        bounds.append(full(state["max_exp_avg_sq"], n))
        for earlier in [*moments, *bounds]:
            assert np.linalg.eigvalsh(bounds[-1] - earlier).min() > -1e-12
    inverse = [np.linalg.eigvalsh(bound) ** -0.5 for bound in bounds[5:]]
    assert all((later <= earlier * (1 + 1e-9)).all() for earlier, later in itertools.pairwise(inverse))


def test_amsgrad_of_gradients_that_take_turns_is_torchs(engine):
    # One coordinate of a block at a time: every V is diagonal.
    grads = []
    for t in range(50):
        g = torch.zeros(3, 4, dtype=DOUBLE)
        g[:, t % 4] = draw(t, 3)
        grads.append([g])
    theirs = train(lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True, betas=(0.9, 0.8), eps=1e-3), grads, [(3, 4)])
    ours = train(
        lambda p: BlockAMSGrad(p, lr=0.1, betas=(0.9, 0.8), eps=1e-3, floor=0.0, engine=engine), grads, [(3, 4)]
    )
    assert same(ours, theirs, 1e-12)


def test_amsgrad_blocks_equal_a_loop(engine):
    n, lr, eps = 3, 0.1, 1e-3
    grads = gradients(25, [(2, n)])
    x = parameters([(2, n)])[0].detach().numpy().copy()
    V, bound, m = np.zeros((2, n, n)), np.zeros((2, n, n)), np.zeros((2, n))
    for t, grad in enumerate(grads, 1):
        g = grad[0].numpy()
        m = 0.9 * m + 0.1 * g
        for j in range(2):
            V[j] = 0.8 * V[j] + 0.2 * np.outer(g[j], g[j])
            values, Q = np.linalg.eigh(V[j] - bound[j])
            bound[j] = bound[j] + (Q * np.maximum(values, 0)) @ Q.T
            values, Q = np.linalg.eigh(bound[j])
            s = lr / (1 - 0.9**t) / (np.sqrt(np.maximum(values, 0) / (1 - 0.8**t)) + eps)
            x[j] -= Q @ (s * (Q.T @ m[j]))
    found = train(lambda p: BlockAMSGrad(p, lr, (0.9, 0.8), eps, floor=0.0, engine=engine), grads, [(2, n)])
    assert np.abs(found[-1].numpy() - x.reshape(-1)).max() < 1e-10


# the state that all of this rests on


def test_the_stored_moments_are_those_of_the_blocks(engine):
    params = parameters([(5, 7)])
    optimizer = BlockAdam(params, block_size=4, engine=engine)
    grads = gradients(6, [(5, 7)])
    layout = lay_out((5, 7), "output", 4)
    V = np.zeros((layout.blocks, 4, 4))
    for grad in grads:
        params[0].grad = grad[0].clone()
        optimizer.step()
        blocks = partition(grad[0], layout).numpy()
        V = 0.999 * V + 0.001 * np.einsum("bi,bk->bik", blocks, blocks)
    state = optimizer.state_dict()["state"][0]
    assert np.abs(full(state["exp_avg_sq"], 4) - V).max() < 1e-15
    assert state["exp_avg"].shape == (5, 7)
    assert float(state["step"]) == 6


@pytest.mark.parametrize("grouping", ["auto", "paper", "output", "input", "filter", "row", "diag", "full"])
def test_every_grouping_equals_a_loop_over_its_own_layout(engine, grouping):
    for shape in [(6, 5), (3, 2, 3, 3), (4,)]:
        layout = lay_out(shape, grouping, 4)
        numbers = partition(torch.arange(1, layout.numel + 1).view(shape), layout)
        index = [[int(i) - 1 for i in block if i > 0] for block in numbers.reshape(layout.blocks, -1)]
        grads = gradients(8, [shape])
        x = parameters([shape])[0].detach().numpy().reshape(-1)
        expected = adam_loop(index, x, [g[0].numpy().reshape(-1) for g in grads], 0.1, eps=1e-2)
        found = train(
            lambda p: BlockAdam(p, lr=0.1, eps=1e-2, floor=0.0, grouping=grouping, block_size=4, engine=engine),
            grads,
            [shape],
        )
        assert np.abs(found.numpy() - expected).max() < 1e-9
