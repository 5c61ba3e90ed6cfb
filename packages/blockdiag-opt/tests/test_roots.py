from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg

from blockdiag_opt import inverse_root, lay_out, positive_part
from blockdiag_opt.roots import decompose, tile, to_full, to_packed, untile


def orthogonal(rng, n):
    return np.linalg.qr(rng.normal(size=(n, n)))[0]


def covariance(rng, n, condition, scale=1.0):
    Q = orthogonal(rng, n)
    return scale * (Q * np.logspace(0, -np.log10(condition), n)) @ Q.T


@pytest.mark.parametrize("eps", [1e-8, 1e-4, 1.0])
@pytest.mark.parametrize("condition", [10.0**k for k in range(9)])
@pytest.mark.parametrize("n", [1, 2, 3, 10, 33])
def test_inverse_root_times_the_damped_root_is_one(n, condition, eps):
    rng = np.random.default_rng(n)
    V = torch.tensor(np.stack([covariance(rng, n, condition) for _ in range(3)]))
    P = inverse_root(V, eps=eps)
    for v, p in zip(V.numpy(), P.numpy(), strict=True):
        damped = linalg.sqrtm(v).real + eps * np.eye(n)
        assert np.abs(p @ damped - np.eye(n)).max() < 1e-8
        assert np.allclose(p, p.T, rtol=1e-12, atol=1e-12 * np.abs(p).max())


def test_the_damping_is_added_after_the_root():
    root = inverse_root(torch.tensor([[[4.0]]], dtype=torch.float64), eps=1.0)
    assert root.item() == pytest.approx(1 / 3, abs=1e-15)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_blocks(n, dtype):
    zero = torch.zeros(2, n, n, dtype=dtype)
    assert torch.equal(inverse_root(zero), zero)
    assert torch.allclose(inverse_root(zero, eps=0.5), 2 * torch.eye(n, dtype=dtype).expand(2, n, n))


@pytest.mark.parametrize("n", [2, 3, 10])
def test_rank_one_blocks_act_on_their_range_alone_as_division_by_the_norm(n):
    rng = np.random.default_rng(3)
    g = rng.normal(size=n)
    P = inverse_root(torch.tensor(np.outer(g, g)), eps=1e-3).numpy()
    assert np.isfinite(P).all()
    assert np.allclose(P @ g, g / (np.linalg.norm(g) + 1e-3), rtol=1e-10)


def test_repeated_eigenvalues_and_identity():
    rng = np.random.default_rng(0)
    Q = orthogonal(rng, 6)
    V = (Q * np.array([4.0, 4.0, 4.0, 9.0, 9.0, 1.0])) @ Q.T
    expected = (Q / np.array([2.0, 2.0, 2.0, 3.0, 3.0, 1.0])) @ Q.T
    assert np.allclose(inverse_root(torch.tensor(V)).numpy(), expected, atol=1e-12)
    assert torch.allclose(inverse_root(torch.eye(5, dtype=torch.float64)), torch.eye(5, dtype=torch.float64))


@pytest.mark.parametrize("n", [2, 3, 10, 32])
def test_single_precision_agrees_with_double_at_condition_1e4(n):
    rng = np.random.default_rng(n)
    V = torch.tensor(np.stack([covariance(rng, n, 1e4) for _ in range(5)]))
    exact = inverse_root(V, eps=1e-4)
    found = inverse_root(V.float(), eps=1e-4).double()
    assert ((found - exact).norm() / exact.norm()) < 1e-3


@settings(deadline=None, max_examples=120)
@given(st.integers(1, 12), st.integers(0, 12), st.floats(-60, 60), st.integers(0, 10**6), st.booleans())
def test_never_a_nan(n, rank, exponent, seed, double):
    rng = np.random.default_rng(seed)
    span = exponent if double else exponent / 4
    X = rng.normal(size=(n, min(rank, n))) * 10.0 ** (span / 2)
    V = torch.tensor(X @ X.T, dtype=torch.float64 if double else torch.float32)
    for eps in (0.0, 1e-8):
        assert bool(inverse_root(V[None], eps=eps).isfinite().all())


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("scale", [1e-200, 1e-100, 1e-30, 1e30, 1e100, 1e200, 1e290])
def test_the_root_scales(n, scale):
    rng = np.random.default_rng(1)
    V = torch.tensor(covariance(rng, n, 1e3))
    expected = inverse_root(V) / np.sqrt(scale)
    assert torch.allclose(inverse_root(V * scale), expected, rtol=1e-9, atol=0)


def test_the_floor_bounds_small_eigenvalues():
    V = torch.diag(torch.tensor([1.0, 1e-9, 0.0], dtype=torch.float64))
    assert torch.allclose(
        inverse_root(V, floor=1e-4).diagonal(), torch.tensor([1.0, 100.0, 100.0], dtype=torch.float64)
    )


def test_batches_of_any_shape():
    V = torch.tensor(np.stack([covariance(np.random.default_rng(k), 3, 10) for k in range(6)])).view(2, 3, 3, 3)
    P = inverse_root(V)
    assert P.shape == V.shape
    assert torch.equal(P[1, 2], inverse_root(V[1, 2]))
    assert inverse_root(V[:0]).shape == (0, 3, 3, 3)


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_decompose_puts_blocks_together_again(n):
    rng = np.random.default_rng(n)
    V = torch.tensor(np.stack([covariance(rng, n, 1e5, 10.0**k) for k in range(-8, 8)]))
    found = decompose(V)
    again = (found.vectors * found.values[:, None]) @ found.vectors.mT
    size = V.abs().amax((1, 2), keepdim=True)
    assert ((again - V).abs() / size).max() < 1e-13
    assert torch.allclose(found.vectors.mT @ found.vectors, torch.eye(n, dtype=torch.float64), atol=1e-13)
    assert not found.fallen.any()


def test_two_by_two_keeps_the_small_eigenvalue():
    small = 1e-12
    angle = 0.3
    Q = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    V = torch.tensor((Q * np.array([1.0, small])) @ Q.T)[None]
    assert decompose(V).values[0, 0].item() == pytest.approx(small, rel=1e-3)


def test_indefinite_rounding_errors_count_as_zero():
    values = decompose(torch.diag(torch.tensor([1.0, 1.0, -1e-9]))[None]).values
    assert values.min() == 0


def test_a_failing_decomposition_falls_back_to_the_diagonal_and_is_counted(monkeypatch):
    real = torch.linalg.eigh

    def fails(A, *args):
        if A.ndim == 2:
            raise RuntimeError("no convergence")
        values, vectors = real(A, *args)
        values[1] = torch.nan
        return values, vectors

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    V = torch.tensor(np.stack([covariance(np.random.default_rng(k), 3, 10) for k in range(3)]))
    found = decompose(V)
    assert found.fallen.tolist() == [False, True, False]
    assert torch.equal(found.values[1], V[1].diagonal())
    assert torch.equal(found.vectors[1], torch.eye(3, dtype=torch.float64))


def test_a_batch_that_fails_as_a_whole_is_tried_block_by_block(monkeypatch):
    real = torch.linalg.eigh

    def fails(A, *args):
        if A.ndim == 3:
            raise RuntimeError("no convergence")
        return real(A, *args)

    V = torch.tensor(np.stack([covariance(np.random.default_rng(k), 3, 10) for k in range(3)]))
    expected = inverse_root(V)
    monkeypatch.setattr(torch.linalg, "eigh", fails)
    assert not decompose(V).fallen.any()
    assert torch.allclose(inverse_root(V), expected, rtol=1e-12)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 8), st.integers(0, 10**6))
def test_positive_part_gives_the_least_change_upper_bound(n, seed):
    rng = np.random.default_rng(seed)
    A, B = (covariance(rng, n, 100, rng.uniform(0.1, 10)) for _ in range(2))
    bound = A + positive_part(torch.tensor(B - A)).numpy()
    for below in (A, B):
        assert np.linalg.eigvalsh(bound - below).min() > -1e-12
    part = positive_part(torch.tensor(B - A)).numpy()
    rest = (B - A) - part
    assert np.abs(part @ rest).max() < 1e-10
    assert np.linalg.eigvalsh(rest).max() < 1e-12


def test_positive_part_of_diagonals_is_elementwise():
    d = torch.tensor([1.0, -2.0, 0.0, 3.0], dtype=torch.float64)
    assert torch.allclose(positive_part(torch.diag(d)), torch.diag(d.clamp(min=0)), atol=1e-15)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_packing_goes_by_rows_of_the_lower_triangle(n):
    rng = np.random.default_rng(n)
    V = rng.normal(size=(4, n, n))
    V = V + V.transpose(0, 2, 1)
    packed = to_packed(torch.tensor(V))
    expected = [[V[b, i, k] for i in range(n) for k in range(i + 1)] for b in range(4)]
    assert packed.tolist() == expected
    assert torch.equal(to_full(packed, n), torch.tensor(V))


def test_packing_symmetrises():
    assert to_packed(torch.tensor([[[1.0, 2.0], [4.0, 5.0]]])).tolist() == [[1.0, 3.0, 5.0]]


@pytest.mark.parametrize("blocks", [1, 3, 16, 17, 40])
def test_tiles_go_back_to_rows(blocks):
    layout = lay_out((blocks, 3), "output", 3)
    rows = torch.arange(blocks * 6.0).view(blocks, 6)
    tiles = tile(rows, layout)
    assert tiles.shape == (layout.tiles, 6, layout.width)
    assert tiles.is_contiguous()
    assert torch.equal(untile(tiles, layout), rows)
    for j in range(blocks):
        assert torch.equal(tiles[j // layout.width, :, j % layout.width], rows[j])
