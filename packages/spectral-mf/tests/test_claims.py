"""What the method claims, and what is true against it, on drawn models whose log Z is known exactly.

The experiments are 3, 4 and 6 of the specification (5 is beside the learner's tests). Thresholds follow it unless a
comment says otherwise. Means are asserted, not wins: mean field is either nearly right or far off.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest

from spectral_mf import exact_enumeration, exact_transfer, generate
from spectral_mf.experiments import run_method

pytestmark = pytest.mark.claims


@functools.cache
def drawn(family: str, n: int, strength: float, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    models = [generate(family, n, strength, seed) for seed in range(count)]
    A, b = np.stack([A for A, _ in models]), np.stack([b for _, b in models])
    return A, b, np.asarray(exact_enumeration(A, b).value)


@functools.cache
def off(method: str, family: str, n: int, strength: float, count: int) -> np.ndarray:
    A, b, truth = drawn(family, n, strength, count)
    return np.abs(np.asarray(run_method(method, A, b).value) - truth)


def mean_off(*args: object) -> float:
    return float(off(*args).mean())


# ---- 3: the paper's claim, and its limits


@pytest.mark.parametrize("family", ["complete", "er"])
@pytest.mark.parametrize("strength", [1, 2, 3, 5])
def test_3_spectral_beats_the_papers_baselines_where_coupling_is_strong(family, strength):
    ours = mean_off("spectral", family, 16, strength, 20)
    assert ours < 0.5 * mean_off("bp-200", family, 16, strength, 20)
    assert ours < mean_off("mean-field-1", family, 16, strength, 20)


@pytest.mark.parametrize("strength", [1, 3, 5])
def test_3_spectral_beats_mini_buckets_at_20_spins(strength):
    assert mean_off("spectral", "complete", 20, strength, 12) < mean_off("mini-bucket", "complete", 20, strength, 12)


@pytest.mark.parametrize("family", ["complete", "er"])
def test_3_against_it_belief_propagation_is_ten_times_better_at_weak_coupling(family):
    assert mean_off("bp-200", family, 16, 0.05, 20) < 0.1 * mean_off("spectral", family, 16, 0.05, 20)


@pytest.mark.parametrize("family", ["complete", "er"])
@pytest.mark.parametrize("strength", [1, 2, 3, 5])
def test_3_against_it_mean_field_from_20_starts_is_better_at_strong_coupling(family, strength):
    assert mean_off("mean-field-20", family, 16, strength, 20) < mean_off("spectral", family, 16, strength, 20)


def test_3_against_it_ferromagnets():
    assert mean_off("spectral", "ferromagnet", 16, 1.0, 10) > 3
    assert mean_off("modes", "ferromagnet", 16, 1.0, 10) < 0.1


def test_3_the_diagonal_of_the_sdp_is_the_essential_step():
    from spectral_mf import spectral_mean_field

    A, b, truth = drawn("complete", 16, 1, 20)
    errors = {
        name: float(np.abs(np.asarray(spectral_mean_field(A, b, diagonal=name).value) - truth).mean())
        for name in ("sdp", "none", "shift")
    }
    assert errors["sdp"] < 0.7 * errors["shift"]
    assert errors["shift"] < 0.5 * errors["none"]


# ---- 4: modes


@pytest.mark.parametrize("family", ["complete", "er"])
@pytest.mark.parametrize("strength", [0.05, 0.1, 0.25, 0.5, 1, 3, 5])
def test_4_modes(family, strength):
    error = mean_off("modes", family, 20, strength, 8)
    assert error < (0.6 if strength <= 3 else 1.0)
    if strength >= 1:
        others = min(mean_off(method, family, 20, strength, 8) for method in ("spectral", "bp-damped", "mini-bucket"))
        assert error < 0.25 * others


@pytest.mark.parametrize("strength", [0.25, 1, 5])
def test_4_annealing_from_the_modes_beats_annealing_from_the_uniform_law(strength):
    assert mean_off("ais-modes", "complete", 20, strength, 8) < 0.1
    if strength >= 1:
        assert mean_off("ais-modes", "complete", 20, strength, 8) < 0.5 * mean_off("ais", "complete", 20, strength, 8)


# ---- 6: grids, where belief propagation and sampling are at home and this method is not


def worst_on_grid(method: str, strength: float, field: float, couplings: str) -> float:
    models = [generate("grid", 100, strength, seed, field=field, couplings=couplings) for seed in range(3)]
    A, b = np.stack([A for A, _ in models]), np.stack([b for _, b in models])
    truth = np.asarray(exact_transfer(A, b, shape=(10, 10)).value)
    return float(np.abs(np.asarray(run_method(method, A, b).value) - truth).max())


@pytest.mark.parametrize("strength", [0.1, 0.25, 0.5, 1, 2])
def test_6_grids_of_one_sign_belong_to_belief_propagation(strength):
    assert worst_on_grid("bp-damped", strength, 0.1, "ferro") < 1.5
    assert worst_on_grid("spectral", strength, 0.1, "ferro") > 1.5


@pytest.mark.parametrize("field", [0.1, 1.0])
@pytest.mark.parametrize("strength", [0.1, 0.25, 0.5, 1])
def test_6_grids_with_either_sign_belong_to_sampling(strength, field):
    # Specification: belief propagation within 1.5 everywhere. Not so with couplings of both signs: from strength 1 on
    # it may not converge, and is then off by up to tens of nats.
    assert worst_on_grid("ais", strength, field, "pm") < 1.0
    assert worst_on_grid("spectral", strength, field, "pm") > 1.0
    if strength <= 0.5:
        assert worst_on_grid("bp-damped", strength, field, "pm") < 1.5


def test_6_modes_miss_some_on_frustrated_grids():
    assert 0.5 < worst_on_grid("modes", 2, 0.1, "pm") < 6
