from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp

from shared_core.errors import InputError
from spectral_mf import gaussian, spectral_mean_field
from spectral_mf.sdp import augmented
from spectral_mf.spectral import holder_weights, log_det_bound, sdp_bounds, tap_diagonal

# For A_ij = c sin(1 + i + 2j + ij), b_i = f cos(1 + 3i):
# n, c, f, exact log Z, Σd, spectral mean field, Gaussian at the SDP's d.
ORACLE = [
    (5, 0.5, 0.3, 4.185036114, 5.231681, 4.358032, 4.494001),
    (6, 1.0, 0.5, 7.669915440, 14.034468, 7.671565, 8.145407),
    (8, 0.2, 0.2, 5.973667975, 5.668937, 6.272528, 6.367990),
    (8, 2.0, 0.5, 21.340687352, 46.323467, 21.806100, 22.105640),
    (10, 1.0, 0.0, 14.963220552, 29.228902, 15.603601, 16.033599),
    (10, 3.0, 1.0, 45.014902741, 96.730415, 44.402002, 45.501483),
]
EIGENVALUES = {
    (5, 0.5): [-2.251708, -1.678559, -0.782478, -0.471288, -0.047649, 0],
    (8, 2.0): [-11.521908, -10.098763, -8.450079, -7.341402, -5.303174, -1.936218, -1.671924, 0, 0],
}


def oracle(n, c, f):
    i, j = np.meshgrid(np.arange(n), np.arange(n), indexing="ij")
    A = np.triu(c * np.sin(1 + i + 2 * j + i * j), 1)
    return A + A.T, f * np.cos(1 + 3 * np.arange(n))


def random_model(seed, n, scale=1.0, density=1.0, field=1.0):
    rng = np.random.default_rng(seed)
    A = np.triu(scale * rng.normal(size=(n, n)) * (rng.random((n, n)) < density), 1)
    return A + A.T, field * rng.normal(size=n)


def brute(A, b):
    X = np.array(list(itertools.product([-1.0, 1.0], repeat=len(b))))
    return logsumexp(0.5 * np.einsum("si,ij,sj->s", X, A, X) + X @ b)


def by_definition(A, b, d):
    """Σ_j log Z_j - n (n + 1) log 2 - log 2 - ½ Σ λ_j, the published formula, each Z_j by enumeration."""
    n = len(b)
    B = np.block([[A, b[:, None]], [b[None], np.zeros((1, 1))]])
    lam, u = np.linalg.eigh(B - np.diag(d))
    X = np.array(list(itertools.product([-1.0, 1.0], repeat=n + 1)))
    log_z = logsumexp(0.5 * lam * (X @ u) ** 2, axis=0)
    return log_z.sum() - n * (n + 1) * math.log(2) - math.log(2) - 0.5 * lam.sum()


@pytest.mark.parametrize(("n", "c", "f", "exact", "total", "value", "normal"), ORACLE)
def test_oracle(n, c, f, exact, total, value, normal):
    A, b = oracle(n, c, f)
    assert brute(A, b) == pytest.approx(exact, abs=1e-9)
    assert spectral_mean_field(A, b).value == pytest.approx(value, abs=1e-4)
    # The estimate moves with d by far more than Σ d does: a small gap before digits are compared.
    found = spectral_mean_field(A, b, tol=1e-11)
    assert found.diagnostics["d"].sum() == pytest.approx(total, abs=1e-6)
    assert found.value == pytest.approx(value, abs=2e-6)
    assert found.value == pytest.approx(by_definition(A, b, found.diagnostics["d"]), abs=1e-9)
    assert gaussian(A, b).value == pytest.approx(normal, abs=5e-5)
    exact_d = torch.from_numpy(found.diagnostics["d"])[None]
    assert gaussian(A, b, diagonal=exact_d).value == pytest.approx(normal, abs=2e-6)
    assert n * math.log(2) - 1e-9 <= found.lower <= exact <= found.upper <= n * math.log(2) + total / 2 + 1e-6
    # Nothing of the paper's own engine is lost: its grid of 0.001.
    quantised = spectral_mean_field(A, b, engine="dp", q=0.001)
    assert quantised.value == pytest.approx(found.value, abs=4e-4)
    assert quantised.value != found.value
    if (n, c) in EIGENVALUES:
        assert sorted(found.diagnostics["eigenvalues"]) == pytest.approx(EIGENVALUES[n, c], abs=2e-5)


def test_closed_forms():
    triangle = spectral_mean_field(-(np.ones((3, 3)) - np.eye(3)))
    assert triangle.value == pytest.approx(2.797846121, abs=1e-6)
    assert triangle.diagnostics["d"].sum() == pytest.approx(3, abs=1e-6)
    chain = np.diag(np.full(9, 0.8), 1)
    assert spectral_mean_field(chain + chain.T).value == pytest.approx(10.159638, abs=1e-5)
    # Independent spins: the published method is not exact, the tilted one is.
    b = np.array([0.5, -1, 0.3, 2, -0.2])
    assert spectral_mean_field(np.zeros((5, 5)), b).value == pytest.approx(5.418624, abs=1e-5)
    assert spectral_mean_field(np.zeros((5, 5)), b, tilt=True).value == pytest.approx(5.408843, abs=1e-6)
    assert spectral_mean_field(np.zeros((5, 5))).value == pytest.approx(5 * math.log(2), abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 8),
    scale=st.sampled_from([0.01, 0.3, 1.0, 5.0]),
    density=st.sampled_from([0.4, 1.0]),
    field=st.sampled_from([0.0, 1.0, 30.0]),
)
def test_guarantees(seed, n, scale, density, field):
    A, b = random_model(seed, n, scale, density, field)
    truth = brute(A, b)
    found = spectral_mean_field(A, b)
    half = 0.5 * found.diagnostics["d"].sum()
    slack = 1e-9 * (1 + half)
    assert n * math.log(2) - slack <= found.value <= n * math.log(2) + half + slack
    assert found.lower <= truth <= found.upper <= n * math.log(2) + half + slack
    for tilt in (False, True):
        tilted = spectral_mean_field(A, b, tilt=tilt)
        assert tilted.lower <= truth <= tilted.upper
        low, high = sdp_bounds(A, b, tilt=tilt)
        assert float(low) <= truth <= float(high)
    assert truth <= float(log_det_bound(A, b))
    normal = gaussian(A, b)
    assert normal.lower <= truth <= normal.upper


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 8), tilt=st.booleans())
def test_permutation_and_gauge(seed, n, tilt):
    A, b = random_model(seed, n)
    rng = np.random.default_rng(seed)
    order, sign = rng.permutation(n), rng.choice([-1.0, 1.0], size=n)
    plain = spectral_mean_field(A, b, tilt=tilt)
    moved = spectral_mean_field(A[order][:, order], b[order], tilt=tilt)
    flipped = spectral_mean_field(sign[:, None] * A * sign, sign * b, tilt=tilt)
    for other in (moved, flipped):
        # As far as the SDP's d is determined.
        assert other.value == pytest.approx(plain.value, abs=2e-5)
        assert other.upper == pytest.approx(plain.upper, abs=2e-5)


def test_isolated_spin_adds_log_2():
    A, b = random_model(0, 6)
    wide = np.zeros((7, 7))
    wide[:6, :6] = A
    for tilt in (False, True):
        alone = spectral_mean_field(A, b, tilt=tilt).value
        assert spectral_mean_field(wide, [*b, 0.0], tilt=tilt).value == pytest.approx(alone + math.log(2), abs=1e-5)


def test_tilted_is_exact_where_fields_pin_the_spins():
    A, b = random_model(1, 6)
    b = 400 * np.sign(b)
    found = spectral_mean_field(A, b, tilt=True)
    assert found.value == pytest.approx(brute(A, b), abs=1e-6)


@pytest.mark.parametrize("diagonal", ["none", "shift", "tap"])
def test_other_diagonals_follow_the_formula(diagonal):
    A, b = random_model(2, 6, 0.5)
    found = spectral_mean_field(A, b, diagonal=diagonal)
    assert found.value == pytest.approx(by_definition(A, b, found.diagnostics["d"]), abs=1e-8)
    given_d = spectral_mean_field(A, b, diagonal=torch.from_numpy(found.diagnostics["d"])[None])
    assert given_d.value == pytest.approx(found.value, abs=1e-10)
    truth = brute(A, b)
    assert found.lower <= truth <= found.upper


def test_the_sdp_is_the_step_that_matters():
    errors = dict.fromkeys(("sdp", "none", "shift"), 0.0)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        A = np.triu(rng.uniform(-1, 1, (12, 12)), 1)
        A, b = A + A.T, rng.uniform(-0.1, 0.1, 12)
        for name in errors:
            errors[name] += abs(spectral_mean_field(A, b, diagonal=name).value - brute(A, b)) / 4
    assert errors["sdp"] < 2
    assert min(errors["none"], errors["shift"]) > 2 * errors["sdp"]


def test_tap_condition_and_value():
    for scale in (1e-6, 0.3, 3.0, 1e4):
        A, b = random_model(3, 7, scale)
        B = augmented(torch.from_numpy(A)[None], torch.from_numpy(b)[None])
        for target in (1.0, 4 / 3):
            d = tap_diagonal(B, target=target)
            inverse = torch.linalg.inv(torch.diag_embed(1 + d) - B)
            assert torch.allclose(inverse.diagonal(dim1=-2, dim2=-1), torch.full((1, 8), target).double(), atol=1e-7)
    A, b = random_model(3, 7, 0.3)
    found = gaussian(A, b, diagonal="tap")
    assert found.method == "tap"
    d = found.diagnostics["d"]
    B = np.block([[A, b[:, None]], [b[None], np.zeros((1, 1))]])
    by_hand = 7 * math.log(2) + 0.5 * d.sum() - 0.5 * np.linalg.slogdet(np.eye(8) + np.diag(d) - B)[1]
    assert found.value == pytest.approx(by_hand, abs=1e-10)
    # The minimum over d.
    assert found.value <= gaussian(A, b).value


def test_gradients_of_the_tap_estimate_are_exact():
    A, b = random_model(4, 4, 0.4)

    def value(upper, b):
        A = torch.zeros(4, 4, dtype=torch.float64)
        i, j = torch.triu_indices(4, 4, 1)
        A = A.index_put((i, j), upper)
        return gaussian(A + A.T, b, diagonal="tap").value

    upper = torch.from_numpy(A[np.triu_indices(4, 1)]).requires_grad_()
    assert torch.autograd.gradcheck(value, (upper, torch.from_numpy(b).requires_grad_()))


@pytest.mark.parametrize("seed", range(3))
def test_gradients_are_those_of_the_formula_with_d_held(seed):
    A, b = (torch.from_numpy(x) for x in random_model(seed, 5, 0.5))
    A, b = A.requires_grad_(), b.requires_grad_()
    found = spectral_mean_field(A, b)
    by_couplings, by_fields = torch.autograd.grad(found.value, (A, b))
    d, step = found.diagnostics["d"][None], 1e-5

    def moved(i, j, by):
        B = torch.zeros(6, 6, dtype=torch.float64)
        B[i, j] = B[j, i] = by
        return float(spectral_mean_field(A.detach() + B[:5, :5], b.detach() + B[5, :5], diagonal=d).value)

    for i, j in itertools.combinations(range(6), 2):
        slope = (moved(i, j, step) - moved(i, j, -step)) / (2 * step)
        ours = by_fields[i] if j == 5 else by_couplings[i, j] + by_couplings[j, i]
        assert float(ours) == pytest.approx(slope, abs=1e-6)


def test_batch_is_its_models():
    many = [random_model(seed, 6, scale) for seed, scale in enumerate((0.01, 0.5, 2.0, 10.0))] + [
        (np.zeros((6, 6)), np.zeros(6))
    ]
    A, b = np.stack([m[0] for m in many]), np.stack([m[1] for m in many])
    for tilt in (False, True):
        together = spectral_mean_field(A, b, tilt=tilt)
        assert together.value.shape == (5,)
        for k in range(5):
            alone = spectral_mean_field(A[k], b[k], tilt=tilt)
            assert together.value[k] == pytest.approx(alone.value, abs=1e-6)
            assert together.upper[k] == pytest.approx(alone.upper, abs=1e-6)
    # One A for many fields.
    shared = spectral_mean_field(A[1], b)
    assert shared.value[1] == pytest.approx(spectral_mean_field(A[1], b[1]).value, abs=1e-6)


def test_float32_is_its_own_rounding_away():
    A, b = random_model(6, 8)
    single = spectral_mean_field(torch.from_numpy(A).float(), torch.from_numpy(b).float())
    assert single.value.dtype == torch.float64
    rounded = spectral_mean_field(A.astype(np.float32), b.astype(np.float32))
    assert float(single.value) == pytest.approx(rounded.value, abs=1e-9)
    assert float(single.value) == pytest.approx(spectral_mean_field(A, b).value, abs=1e-5)


def test_the_users_diagonal_is_a_constant():
    A, b = random_model(7, 5)
    for method in (spectral_mean_field, gaussian):
        moved = method(A + np.diag([1.0, -2.0, 0.5, 3.0, 0.0]), b)
        assert moved.value == pytest.approx(method(A, b).value + 1.25, abs=1e-9)
        assert moved.lower <= brute(A, b) + 1.25 <= moved.upper
    shifted = A + 0.8 * np.eye(5)
    low, high = sdp_bounds(shifted, b)
    assert float(low) <= brute(A, b) + 2.0 <= min(float(high), float(log_det_bound(shifted, b)))


def test_log_det_bound_of_independent_spins():
    n = 10
    excess = float(log_det_bound(np.zeros((n, n)))) - n * math.log(2)
    # ⅔ Σ d - ½ Σ log d + ½ N log 2π - (N + 1) log 2 at d = ¾.
    size = n + 1
    by_hand = size * (0.5 - 0.5 * math.log(0.75) + 0.5 * math.log(2 * math.pi)) - (size + 1) * math.log(2)
    assert excess == pytest.approx(by_hand - n * math.log(2), abs=1e-9)
    assert 0 < excess < 0.2 * size


def test_holder_weights_are_the_best():
    lam = torch.tensor([[-3.0, -1.0, -0.2]], dtype=torch.float64)
    best = holder_weights(lam)

    def guide(w):
        return float((-0.5 * w * torch.log1p(lam.abs() / w)).sum())

    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        other = torch.rand(1, 3, generator=generator, dtype=torch.float64) + 1e-3
        assert guide(best) <= guide(other / other.sum()) + 1e-12


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e3, 1e5])
def test_one_and_two_spins_and_extreme_scales(scale):
    for n in (1, 2):
        A, b = random_model(8, n, scale, field=scale)
        for tilt in (False, True):
            found = spectral_mean_field(A, b, tilt=tilt)
            assert found.lower <= brute(A, b) <= found.upper
        assert brute(A, b) <= float(log_det_bound(A, b))


def test_refusals(unchecked):
    with pytest.raises(InputError, match="diagonal must be"):
        spectral_mean_field(np.zeros((3, 3)), diagonal=torch.zeros(1, 3))
    with pytest.raises(InputError, match="unknown diagonal"):
        spectral_mean_field(np.zeros((3, 3)), diagonal="best")
    with pytest.raises(InputError, match="not positive definite"):
        gaussian(3 * (np.ones((3, 3)) - np.eye(3)), diagonal="none")
