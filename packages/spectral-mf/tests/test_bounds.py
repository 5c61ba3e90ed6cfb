from __future__ import annotations

import importlib
import itertools
import math

import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.special import logsumexp

import spectral_mf
from shared_core.errors import InputError
from spectral_mf import bounds, log_partition, log_partition_bounds, map_bound

KINDS = ["dense", "sparse", "ferromagnet", "antiferromagnet", "all equal", "signs", "disconnected"]
FIELDS = ["zero", "small", "like couplings", "huge", "one huge"]


def energies(A, b):
    """(models, states) of a batch."""
    X = np.array(list(itertools.product([-1.0, 1.0], repeat=b.shape[1])))
    return 0.5 * np.einsum("si,mij,sj->ms", X, A, X, optimize=True) + b @ X.T


def random_models(rng, kind, fields, n, models, strength):
    A = strength * rng.normal(size=(models, n, n))
    match kind:
        case "sparse":
            A = A * (rng.random(A.shape) < 0.3)
        case "ferromagnet":
            A = np.abs(A)
        case "antiferromagnet":
            A = -np.abs(A)
        case "all equal":
            A = strength * np.ones_like(A) * rng.choice([-1.0, 1.0], size=(models, 1, 1))
        case "signs":
            A = strength * rng.choice([-1.0, 1.0], size=A.shape)
        case "disconnected":
            A[:, : n // 2, n // 2 :] = 0
    b = rng.normal(size=(models, n))
    b = b * {"zero": 0, "small": min(strength, 0.1), "like couplings": strength, "huge": 100, "one huge": 0}[fields]
    if fields == "one huge":
        b[:, 0] = 1000
    A = np.triu(A, 1)
    return A + A.transpose(0, 2, 1), b


def check(found, truth, what):
    assert (np.asarray(found.lower) <= truth).all(), what
    assert (truth <= np.asarray(found.upper)).all(), what


@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("kind", KINDS)
def test_never_violated(kind, fields):
    """Also of every single candidate, and of what each method says beside its estimate."""
    rng = np.random.default_rng(KINDS.index(kind) * 10 + FIELDS.index(fields))
    n = int(rng.integers(1, 9))
    strength = float(10 ** rng.uniform(-3, math.log10(20)))
    A, b = random_models(rng, kind, fields, n, 4, strength)
    all_energies = energies(A, b)
    truth, what = logsumexp(all_energies, axis=1), (kind, fields, n, strength)
    found = log_partition_bounds(A, b, starts=4, clamp=int(rng.integers(0, 3)))
    check(found, truth, what)
    for name, value in found.candidates.items():
        upper = name.endswith("(upper)")
        assert ((truth <= value) if upper else (value <= truth)).all(), (name, *what)
    low, high = map_bound(A, b)
    top = all_energies.max(1)
    assert (low <= top + 1e-12 * (1 + abs(top))).all()
    assert (top <= high).all()
    methods = ["spectral", "spectral-tilted", "gaussian", "sdp_rounding", "mini_bucket", "weighted_mini_bucket",
               "trw", "modes", "mean_field", "tap", "belief_propagation"]  # fmt: skip
    for name in rng.permutation(methods)[:3]:
        check(log_partition(A, b, method=str(name)), truth, (name, *what))
    # Its table grows with the couplings, up to a refusal.
    if strength < 1:
        check(log_partition(A, b, method="low_rank", rank=1, tol=1.0), truth, ("low_rank", *what))


@pytest.mark.filterwarnings("ignore:a coupling of")
@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e3, 1e6])
def test_extreme_scales(scale):
    rng = np.random.default_rng(0)
    for n in (1, 2, 7):
        A, b = random_models(rng, "dense", "like couplings", n, 3, scale)
        truth = logsumexp(energies(A, b), axis=1)
        check(log_partition_bounds(A, b, starts=3), truth, (n, scale))
        for name in ("spectral", "sdp_rounding", "mean_field", "modes"):
            check(log_partition(A, b, method=name), truth, (name, n, scale))


@pytest.mark.parametrize("forced", ["ais", "modes", "gaussian", "belief_propagation"])
def test_bounds_around_other_estimates(forced):
    rng = np.random.default_rng(1)
    A, b = random_models(rng, "dense", "small", 8, 3, 1.0)
    truth = logsumexp(energies(A, b), axis=1)
    found = log_partition(A, b, method=forced, bounds=True)
    check(found, truth, forced)
    assert (found.lower <= found.value).all()
    assert (found.value <= found.upper).all()


def test_auto_without_an_exact_method(monkeypatch):
    """The combination of samplers and modes, at a size where the truth is still known."""
    rng = np.random.default_rng(2)
    A, b = random_models(rng, "dense", "small", 9, 1, 1.0)
    truth = float(logsumexp(energies(A, b), axis=1)[0])
    estimate = importlib.import_module("spectral_mf.estimate")
    monkeypatch.setattr(estimate, "_choose", lambda *_: estimate.Plan("auto", "test", 1.0, 1.0, False))
    found = log_partition(A[0], b[0], budget_s=1.0)
    assert found.method == "auto"
    assert found.lower <= truth <= found.upper
    assert found.value == pytest.approx(truth, abs=max(0.1, 5 * found.std_error))


@pytest.mark.parametrize("clamp", [0, 1, 2, 5])
def test_clamping_tightens(clamp):
    rng = np.random.default_rng(3)
    A, b = random_models(rng, "dense", "small", 7, 2, 1.0)
    truth = logsumexp(energies(A, b), axis=1)
    found, plain = log_partition_bounds(A, b, clamp=clamp), log_partition_bounds(A, b)
    check(found, truth, clamp)
    assert len(found.clamped) == clamp
    assert (found.upper <= plain.upper + 1e-9).all()
    if clamp == 5:
        assert (found.upper - found.lower < 0.5 * (plain.upper - plain.lower)).all()


def test_clamping_all_but_one_spin_is_nearly_exact():
    rng = np.random.default_rng(4)
    A, b = random_models(rng, "dense", "like couplings", 4, 1, 1.0)
    found = log_partition_bounds(A[0], b[0], clamp=12)
    truth = float(logsumexp(energies(A, b), axis=1)[0])
    assert len(found.clamped) == 3
    assert found.lower <= truth <= found.upper
    # One spin alone: mean field and the tilted SDP are both exact.
    assert found.upper - found.lower < 1e-8


def test_independent_spins_leave_no_gap():
    b = np.array([0.3, -2.0, 40.0, 0.0])
    found = log_partition_bounds(np.zeros((4, 4)), b)
    truth = np.logaddexp(b, -b).sum()
    assert found.lower <= truth <= found.upper
    assert found.upper - found.lower < 1e-8


def test_forms_in_and_out():
    rng = np.random.default_rng(5)
    A, b = random_models(rng, "sparse", "small", 6, 2, 1.0)
    single = log_partition_bounds(A[0], b[0])
    assert isinstance(single.lower, float)
    assert isinstance(log_partition_bounds(torch.from_numpy(A[0]), torch.from_numpy(b[0])).upper, torch.Tensor)
    batch = log_partition_bounds(A, b)
    assert batch.lower.shape == (2,)
    assert batch.upper[0] == pytest.approx(single.upper, abs=1e-5)
    thin = log_partition_bounds(sparse.csr_array(A[0]), b[0], clamp=1)
    truth = float(logsumexp(energies(A[:1], b[:1]), axis=1)[0])
    assert thin.lower <= truth <= thin.upper
    assert single.lower_from in single.candidates
    assert single.upper_from in single.candidates
    shifted = log_partition_bounds(A[0] + np.eye(6), b[0])
    assert shifted.lower == pytest.approx(single.lower + 3, abs=1e-9)
    assert shifted.upper == pytest.approx(single.upper + 3, abs=1e-6)


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_array])
def test_beyond_what_is_made_dense(form, monkeypatch):
    """The path of thousands of spins, on a chain whose log Z is known, in fields far beyond what cosh holds."""
    monkeypatch.setattr(bounds, "_DENSE_LIMIT", 0)
    chain = np.diag(np.full(7, 0.4), 1)
    A = chain + chain.T
    for field in (0.0, 0.3, 1000.0):
        b = np.full(8, field)
        found = log_partition_bounds(form(A), b)
        truth = float(logsumexp(energies(A[None], b[None]), axis=1)[0])
        assert found.lower <= truth <= found.upper
        assert math.isfinite(found.candidates["sdp (upper)"])
        assert truth <= found.candidates["sdp (upper)"] <= truth + 6


def test_map_bound_of_frustrated_triangle_and_constant():
    triangle = -(np.ones((3, 3)) - np.eye(3))
    low, high = map_bound(triangle + 2 * np.eye(3))
    assert low == pytest.approx(1 + 3)
    assert high == pytest.approx(1.5 + 3, abs=1e-6)


def test_bounds_do_not_carry_gradients():
    A = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    found = log_partition_bounds(A, torch.zeros(3, dtype=torch.float64))
    assert not found.lower.requires_grad
    assert not found.upper.requires_grad


def test_a_seed_gives_one_answer():
    rng = np.random.default_rng(6)
    A, b = random_models(rng, "signs", "zero", 8, 1, 1.0)
    first, again = (log_partition_bounds(A[0], b[0], clamp=2) for _ in range(2))
    assert (first.lower, first.upper) == (again.lower, again.upper)


@pytest.mark.parametrize("clamp", [-1, 13])
def test_refuses_clamps_out_of_range(clamp):
    with pytest.raises(InputError, match="clamp must be 0 to 12"):
        spectral_mf.log_partition_bounds(np.zeros((3, 3)), clamp=clamp)
