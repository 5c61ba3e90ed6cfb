from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.special import gammaln, logsumexp

from shared_core.errors import InputError
from spectral_mf.rank_one import log_cosh, log_expectation, quadrature_rounding, quantisation_step

QUADRATURE, DP, GAUSSIAN, EXACT, NOTHING = range(5)


def row(values):
    return torch.as_tensor(np.asarray(values, dtype=np.float64))[None]


def brute(v, lam, b):
    X = np.array(list(itertools.product([-1.0, 1.0], repeat=len(v))))
    return logsumexp(-np.logaddexp(0, -2 * X * b).sum(1) + 0.5 * lam * (X @ v) ** 2)


def pairs(count, seed=0, most=13):
    """Random (v, λ, b): unit vectors of up to `most` entries, λ in ±[.1, 50], every other one without fields."""
    rng = np.random.default_rng(seed)
    for k in range(count):
        n = int(rng.integers(1, most + 1))
        v = rng.normal(size=n)
        lam = rng.choice([-1, 1]) * rng.uniform(0.1, 50)
        yield v / np.linalg.norm(v), float(lam), rng.normal(size=n) * (k % 2)


def curie_weiss(n, lam):
    """log E exp(½ λ (Σ x)² / n) by counting the spins that are up."""
    k = np.arange(n + 1)
    log_count = gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1) - n * math.log(2)
    return logsumexp(log_count + 0.5 * lam * (2 * k - n) ** 2 / n)


@pytest.mark.parametrize("engine", ["auto", "exact", "quadrature"])
def test_engines_against_enumeration(engine):
    for v, lam, b in pairs(50):
        truth = brute(v, lam, b)
        # None and zero fields take different code.
        for field in (row(b),) if b.any() else (None, row(b)):
            found = log_expectation(row(v), row(lam).reshape(1), field, engine=engine)
            # Where quadrature cancels it says so in its error; auto must not rely on it.
            allowed = max(1e-10, float(found.error)) if engine == "quadrature" else 1e-8
            assert abs(float(found.value) - truth) <= allowed
            assert abs(float(found.value) - truth) <= float(found.error) + 1e-13 * (1 + abs(truth))


def test_dynamic_programme_within_its_bound_and_better_on_a_finer_grid():
    for v, lam, b in pairs(50, seed=1):
        truth = brute(v, lam, b)
        field = row(b) if b.any() else None
        by_tol = log_expectation(row(v), row(lam).reshape(1), field, engine="dp", tol=1e-3)
        assert abs(float(by_tol.value) - truth) <= float(by_tol.error) <= 1e-3 + 1e-12
        q = quantisation_step(lam, len(v), float(np.abs(v).sum()), 0.05)
        fine = log_expectation(row(v), row(lam).reshape(1), field, engine="dp", q=q / 10)
        assert abs(float(fine.value) - truth) < 0.05 / 10
        assert abs(float(fine.value) - truth) <= float(fine.error)


def test_quantisation_step_keeps_its_promise():
    for lam, length, reach, tol in [(-50.0, 20, 4.0, 1e-3), (1e-9, 3, 1.5, 1e-3), (1e6, 1000, 30.0, 1e-9)]:
        delta = length * quantisation_step(lam, length, reach, tol) / 4
        assert 0.5 * abs(lam) * delta * (2 * reach + delta) == pytest.approx(tol, rel=1e-9)


def test_engine_codes():
    v, one = row([0.6, 0.8]), torch.tensor([-1.0], dtype=torch.float64)
    names = {"quadrature": QUADRATURE, "dp": DP, "gaussian": GAUSSIAN, "exact": EXACT, "auto": QUADRATURE}
    for name, code in names.items():
        assert int(log_expectation(v, one, engine=name, tol=1e-3).engine) == code
    mixed = log_expectation(
        torch.cat([row([1.0, 0.0])] * 3), torch.tensor([0.0, -200.0, 0.5], dtype=torch.float64), engine="auto"
    )
    assert mixed.engine.tolist() == [NOTHING, EXACT, QUADRATURE]
    assert mixed.value.tolist() == pytest.approx([0.0, -100.0, 0.25], abs=1e-9)


@pytest.mark.parametrize("lam", [-40.0, -60.0, -80.0, -200.0, -1e6])
def test_auto_at_a_coordinate_vector_where_quadrature_cancels(lam):
    for n in (1, 3, 30):
        v = np.eye(n)[0]
        assert float(log_expectation(row(v), row(lam).reshape(1)).value) == pytest.approx(lam / 2, rel=1e-12)
    wrong = log_expectation(row([1.0]), row(lam).reshape(1), engine="quadrature")
    assert float(wrong.error) > 1e-8


@pytest.mark.parametrize("n", [2, 50, 500, 2000])
@pytest.mark.parametrize("lam", [-50.0, -0.5, 0.5, 1.0, 40.0])
def test_curie_weiss(n, lam):
    v = np.ones(n) / math.sqrt(n)
    assert float(log_expectation(row(v), row(lam).reshape(1)).value) == pytest.approx(curie_weiss(n, lam), abs=1e-10)
    if n == 50 and abs(lam) < 1:
        found = log_expectation(row(v), row(lam).reshape(1), engine="dp", tol=1e-2)
        assert abs(float(found.value) - curie_weiss(n, lam)) <= float(found.error) <= 0.011


@pytest.mark.parametrize("lam", [-150.0, -400.0])
def test_localised_vectors_of_forty_spins(lam):
    """One entry of 100 beside 39 of one: the quadrature cancels, the sum over how many are up does not."""
    whole = np.array([100.0, *[1.0] * 39])
    v = whole / np.linalg.norm(whole)
    k = np.arange(40)
    log_count = gammaln(40) - gammaln(k + 1) - gammaln(40 - k) - 40 * math.log(2)
    y = np.concatenate([100 + 2 * k - 39, -100 + 2 * k - 39]) / np.linalg.norm(whole)
    truth = logsumexp(np.tile(log_count, 2) + 0.5 * lam * y**2)
    assert truth < -25
    quadrature = log_expectation(row(v), row(lam).reshape(1), engine="quadrature")
    assert float(quadrature.error) > 1e-8
    auto = log_expectation(row(v), row(lam).reshape(1))
    assert int(auto.engine) == DP
    assert abs(float(auto.value) - truth) <= float(auto.error) < 0.1
    # On a grid that its steps are multiples of, the dynamic programme is exact, and knows it.
    on_grid = log_expectation(row(v), row(lam).reshape(1), engine="dp", q=2 / np.linalg.norm(whole))
    assert abs(float(on_grid.value) - truth) < 1e-10
    assert float(on_grid.error) < 1e-9


def test_random_localised_vectors_auto_against_a_fine_grid():
    rng = np.random.default_rng(5)
    for lam in (-60.0,):
        v = np.concatenate([[1.0], 2e-3 * rng.normal(size=39)])
        v /= np.linalg.norm(v)
        b = rng.normal(size=40)
        auto = log_expectation(row(v), row(lam).reshape(1), row(b))
        fine = log_expectation(row(v), row(lam).reshape(1), row(b), engine="dp", tol=1e-3)
        assert abs(float(auto.value - fine.value)) <= float(auto.error + fine.error)


def test_zero_steps_of_the_grid_keep_all_mass():
    v = row([1.0, *[1e-9] * 30])
    found = log_expectation(v, torch.tensor([-1e-12], dtype=torch.float64), engine="dp", q=0.01)
    # Each spin whose two branches did not both count would cost 0.69.
    assert abs(float(found.value)) < 1e-10
    in_logs = log_expectation(
        v, torch.tensor([-1e-12], dtype=torch.float64), 20 * torch.ones_like(v), engine="dp", q=1.0
    )
    assert abs(float(in_logs.value)) < 1e-10


@pytest.mark.parametrize("field", [5.0, 50.0, 800.0])
@pytest.mark.parametrize("lam", [-200.0, -3.0, 200.0])
def test_strong_fields(field, lam):
    v, b = np.array([0.6, 0.8, 0.0]), np.array([field, -field, field])
    for engine in ("auto", "exact", "dp"):
        found = log_expectation(row(v), row(lam).reshape(1), row(b), engine=engine, tol=1e-4)
        assert abs(float(found.value) - brute(v, lam, b)) <= float(found.error) < 1.1e-4


def test_stated_error_holds_for_huge_eigenvalues():
    """Rounding grows with λ, and so must the error that is stated."""
    whole = np.array([3, 8, 14, 20, 26, 32, 38, 44, 2, 6])
    # An odd sum and integers: y is at least 1 / norm, and its square is known but for one division.
    X = np.array(list(itertools.product([-1, 1], repeat=len(whole))))
    squares = ((X @ whole) ** 2).astype(float)
    norm = float((whole**2).sum())
    for lam in (-1e6, -1e9):
        truth = logsumexp(0.5 * lam * squares / norm) - len(whole) * math.log(2)
        for engine in ("auto", "exact"):
            found = log_expectation(row(whole / math.sqrt(norm)), row(lam).reshape(1), engine=engine)
            assert abs(float(found.value) - truth) <= float(found.error) + 1e-15 * abs(truth)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("with_fields", [False, True])
def test_gradients(sign, with_fields):
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(3, 4, generator=generator, dtype=torch.float64).requires_grad_()
    lam = (sign * torch.tensor([0.3, 1.0, 4.0], dtype=torch.float64)).requires_grad_()
    b = torch.randn(3, 4, generator=generator, dtype=torch.float64).requires_grad_()
    if with_fields:
        assert torch.autograd.gradcheck(lambda *x: log_expectation(*x, engine="quadrature").value, (v, lam, b))
    else:
        assert torch.autograd.gradcheck(lambda *x: log_expectation(*x, engine="quadrature").value, (v, lam))


def test_gaussian_engine_is_the_limit_of_many_small_entries():
    n = 1000
    v = np.ones(n) / math.sqrt(n)
    found = log_expectation(row(v), row(-3.0).reshape(1), engine="gaussian")
    assert float(found.value) == pytest.approx(-0.5 * math.log(4))
    assert float(found.error) == math.inf
    assert float(found.value) == pytest.approx(curie_weiss(n, -3.0), abs=1e-3)
    b = np.full(n, 1e-3)
    tilted = log_expectation(row(v), row(-3.0).reshape(1), row(b), engine="gaussian")
    assert float(tilted.value) == pytest.approx(
        float(log_expectation(row(v), row(-3.0).reshape(1), row(b)).value), abs=1e-3
    )


def test_batch_is_its_pairs():
    many = list(pairs(20, seed=3, most=1 + 8))
    n = 9
    v = torch.stack([torch.from_numpy(np.pad(x[0], (0, n - len(x[0])))) for x in many])
    lam = torch.tensor([x[1] for x in many], dtype=torch.float64)
    b = torch.stack([torch.from_numpy(np.pad(x[2], (0, n - len(x[2])))) for x in many])
    together = log_expectation(v, lam, b).value
    for k in range(len(many)):
        assert float(together[k]) == pytest.approx(
            float(log_expectation(v[k : k + 1], lam[k : k + 1], b[k : k + 1]).value), abs=1e-8
        )


def test_rounding_bound_is_not_exceeded():
    for v, lam, _ in pairs(30, seed=4):
        if lam > 0:
            continue
        found = log_expectation(row(v), row(lam).reshape(1), engine="quadrature").value
        off = abs(math.exp(float(found)) - math.exp(brute(v, lam, np.zeros(len(v)))))
        assert off <= float(quadrature_rounding(row(v), row(lam).reshape(1)))


def test_log_cosh_of_large_arguments():
    x = torch.tensor([-1e4, -1.0, 0.0, 1e-9, 2.0, 1e300], dtype=torch.float64)
    expected = [1e4 - math.log(2), math.log(math.cosh(1)), 0.0, 0.0, math.log(math.cosh(2)), 1e300]
    assert log_cosh(x).tolist() == pytest.approx(expected, abs=1e-15)


def test_refusals(unchecked):
    v = torch.ones(1, 30, dtype=torch.float64) / 30**0.5
    with pytest.raises(InputError, match=r"2\^30 terms"):
        log_expectation(v, torch.tensor([-1.0], dtype=torch.float64), engine="exact")
    with pytest.raises(InputError, match="max_states"):
        log_expectation(v, torch.tensor([-1.0], dtype=torch.float64), engine="dp", max_states=1000)
    with pytest.raises(InputError, match="below 1"):
        log_expectation(v, torch.tensor([1.5], dtype=torch.float64), engine="gaussian")
