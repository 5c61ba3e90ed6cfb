"""The model as an object: where it comes from, what it says, that it does not change."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from scipy import sparse

from shared_core.errors import InputError
from spectral_mf import Ising, generate


def states(n: int) -> np.ndarray:
    return 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1) - 1


def brute(A: np.ndarray, b: np.ndarray) -> float:
    X = states(len(b))
    return float(np.logaddexp.reduce(0.5 * ((X @ A) * X).sum(1) + X @ b))


def test_rbm_against_its_own_energy():
    random = np.random.default_rng(0)
    W, bv, bh = random.normal(size=(5, 3)), random.normal(size=5), random.normal(size=3)
    V, H = (states(5) + 1) / 2, (states(3) + 1) / 2
    exact = np.logaddexp.reduce((V @ W @ H.T + (V @ bv)[:, None] + H @ bh).ravel())
    for kind in (lambda x: x, torch.tensor):
        assert Ising.from_rbm(kind(W), kind(bv), kind(bh)).log_partition().value == pytest.approx(exact)
    with pytest.raises(InputError, match=r"(?i)transpose"):
        Ising.from_rbm(W.T, bv, bh)


def test_qubo_and_back():
    random = np.random.default_rng(1)
    Q = np.triu(random.normal(size=(6, 6)))
    c = random.normal(size=6)
    X = (states(6) + 1) / 2
    exact = np.logaddexp.reduce(((X @ Q) * X).sum(1) + X @ c)
    model = Ising.from_01(Q, c)
    assert model.log_partition().value == pytest.approx(exact)
    Q2, c2, const = model.to_01()
    assert np.logaddexp.reduce(((X @ Q2) * X).sum(1) + X @ c2) + const == pytest.approx(exact)


def test_edges_and_files(tmp_path):
    model = Ising.from_edges([2, 0], [0, 1], [0.5, -0.3], [0.1, 0.2, 0.3])
    assert sparse.issparse(model.A)
    A = np.array([[0, -0.3, 0.5], [-0.3, 0, 0], [0.5, 0, 0]])
    assert model.log_partition().value == pytest.approx(brute(A, model.b))
    for suffix in ("npz", "csv", "uai", "safetensors"):
        model.save(tmp_path / f"m.{suffix}")
        again = Ising.from_file(tmp_path / f"m.{suffix}")
        np.testing.assert_allclose(again.energy(states(3)), model.energy(states(3)), atol=1e-9, err_msg=suffix)
    assert Ising.from_uai(tmp_path / "m.uai").log_partition().value == pytest.approx(brute(A, model.b))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("i", "j", "w", "more", "told"),
    [
        ([0], [0], [1.0], {}, "itself"),
        ([0, 1], [1, 0], [1.0, 2.0], {}, "twice"),
        ([0], [5], [1.0], {"n": 3}, "spins are 0 to 2"),
        ([0], [-1], [1.0], {"n": 3}, "spins are 0 to 2"),
        ([0, 1], [1], [1.0], {}, "one length"),
        ([0.5], [1.0], [1.0], {}, "integers"),
    ],
)
def test_wrong_edges(i, j, w, more, told):
    with pytest.raises(InputError, match=told):
        Ising.from_edges(i, j, w, **more)


def test_energies_probabilities_and_conditioning():
    A, b = generate("complete", 7, 0.5, 0)
    model = Ising(A, b, const=3.0)
    X = states(7)
    np.testing.assert_allclose(model.energy(X), 0.5 * ((X @ A) * X).sum(1) + X @ b + 3.0)
    assert isinstance(model.energy(X[0]), float)
    assert np.exp(model.log_prob(X)).sum() == pytest.approx(1.0)
    assert model.log_partition().value == pytest.approx(brute(A, b) + 3.0)
    parts = [model.condition({2: s, 5: t}).log_partition().value for s in (-1, 1) for t in (-1, 1)]
    assert np.logaddexp.reduce(parts) == pytest.approx(brute(A, b) + 3.0)
    thin = Ising(sparse.csr_array(A), b, const=3.0)
    np.testing.assert_allclose(thin.energy(X), model.energy(X))
    np.testing.assert_allclose(thin.condition({0: 1}).energy(states(6)), model.condition({0: 1}).energy(states(6)))
    for wrong in ({9: 1}, {0: 0}):
        with pytest.raises(InputError, match="evidence"):
            model.condition(wrong)
    with pytest.raises(InputError, match="every spin is fixed"):
        model.condition(dict.fromkeys(range(7), 1))
    with pytest.raises(InputError, match="-1 or 1"):
        model.energy(np.zeros(7))
    with pytest.raises(InputError, match="n = 7"):
        model.energy(np.ones(6))


def test_map_bound_encloses_the_largest_energy():
    for seed in range(5):
        A, b = generate("complete", 10, 1.0, seed)
        model = Ising(A, b, const=1.0)
        low, high = model.map_bound()
        best = float(np.max(model.energy(states(10))))
        assert low <= best + 1e-9
        assert best <= high
        assert low == pytest.approx(best)


def test_batch_models():
    A, b = (np.stack(x) for x in zip(*(generate("complete", 5, 0.5, s) for s in range(3)), strict=True))
    model = Ising(A, b)
    assert repr(model) == "Ising(models=3, n=5, edges=10)"
    assert model.energy(np.broadcast_to(states(5), (3, 32, 5))).shape == (3, 32)
    np.testing.assert_allclose(model.log_partition().value, [brute(A[k], b[k]) for k in range(3)])
    for call in (lambda: model.to_01(), lambda: model.condition({0: 1}), lambda: model.log_prob(states(5))):
        with pytest.raises(InputError, match="one model"):
            call()


def test_it_does_not_change():
    model = Ising(np.zeros((2, 2)))
    with pytest.raises(AttributeError, match="immutable"):
        model.b = np.ones(2)
    with pytest.raises(InputError, match="finite"):
        Ising(np.zeros((2, 2)), const=float("nan"))


def test_bounds_and_plan():
    A, b = generate("complete", 12, 1.0, 0)
    model = Ising(A, b)
    loose, tight = model.bounds(), model.bounds(clamp=4)
    truth = brute(A, b)
    assert loose.lower <= tight.lower <= truth <= tight.upper <= loose.upper
    assert len(tight.clamped) == 4
    assert model.plan().exact
    with pytest.raises(InputError, match="clamp"):
        model.bounds(clamp=20)


def test_it_can_be_pickled_and_copied():
    A, b = generate("complete", 5, 0.5, 0)
    for model in (Ising(A, b), Ising(sparse.csr_array(A), b), Ising(torch.tensor(A), torch.tensor(b))):
        again = pickle.loads(pickle.dumps(model))
        assert float(again.log_partition().value) == pytest.approx(brute(A, b))
        assert copy.copy(model) is model
        assert copy.deepcopy(model) is model
    with pytest.raises(AttributeError, match="immutable"):
        del model._problem
