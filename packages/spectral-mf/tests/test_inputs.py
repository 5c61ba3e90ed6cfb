"""Every form a model can come in, and every way it can be wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse

from shared_core.errors import InputError
from spectral_mf import Ising, log_partition
from spectral_mf._inputs import as_problem

pytestmark = pytest.mark.usefixtures("unchecked")


def random_model(n: int, seed: int = 0, scale: float = 0.7) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    A = np.triu(random.normal(scale=scale, size=(n, n)), 1)
    return A + A.T, random.normal(size=n)


def brute(A: np.ndarray, b: np.ndarray) -> float:
    n = len(b)
    X = 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1) - 1
    return float(np.logaddexp.reduce(0.5 * ((X @ A) * X).sum(1) + X @ b))


def test_all_kinds_give_the_same_number():
    A, b = random_model(9)
    expected = brute(A, b)
    given = [
        (A, b),
        (A.tolist(), b.tolist()),
        (torch.from_numpy(A), torch.from_numpy(b)),
        (torch.from_numpy(A), b),
        (A, torch.from_numpy(b)),
        (sparse.csr_matrix(A), b),
        (sparse.coo_array(A), b),
        (sparse.csc_array(A), torch.from_numpy(b)),
        (Ising(A, b), None),
        (np.asfortranarray(A), b[::1]),
    ]
    for couplings, fields in given:
        assert float(log_partition(couplings, fields).value) == pytest.approx(expected, abs=1e-10)


def test_what_comes_back_is_of_the_kind_that_went_in():
    A, b = random_model(5)
    assert isinstance(log_partition(A, b).value, float)
    single = log_partition(torch.from_numpy(A), b).value
    assert isinstance(single, torch.Tensor)
    assert single.shape == ()
    batch = log_partition(np.stack([A, A]), np.stack([b, b])).value
    assert isinstance(batch, np.ndarray)
    assert batch.shape == (2,)
    assert log_partition(torch.from_numpy(A).expand(3, 5, 5), torch.from_numpy(b)).value.shape == (3,)


def test_float32_is_computed_in_float64():
    pairs = [random_model(12, seed) for seed in range(4)]
    A = torch.tensor(np.stack([a for a, _ in pairs]), dtype=torch.float32)
    b = torch.tensor(np.stack([f for _, f in pairs]), dtype=torch.float32)
    value = log_partition(A, b).value
    assert value.dtype == torch.float64
    expected = [brute(a.double().numpy(), f.double().numpy()) for a, f in zip(A, b, strict=True)]
    np.testing.assert_allclose(value.numpy(), expected, atol=1e-10)
    integers = np.array([[0, 1], [1, 0]])
    assert log_partition(integers).value == pytest.approx(brute(integers.astype(float), np.zeros(2)))


def test_single_precision_may_be_asymmetric_by_its_own_rounding():
    random = np.random.default_rng(0)
    V = random.normal(size=(12, 40)).astype(np.float32)
    A = V @ V.T / 40
    A[0, 1] *= 1 + 3e-7
    assert A[0, 1] != A[1, 0]
    mean = 0.5 * (A.astype(float) + A.T.astype(float))
    expected = brute(mean - np.diag(np.diag(mean)), np.zeros(12)) + 0.5 * np.trace(mean)
    for given in (A, torch.from_numpy(A), sparse.csr_array(A)):
        assert float(log_partition(given).value) == pytest.approx(expected, abs=1e-9)
    with pytest.raises(InputError, match="symmetrize"):
        log_partition(A.astype(np.float64))


def test_one_b_for_many_A_and_many_b_for_one_A():
    A, b = random_model(6)
    other, fields = random_model(6, 1)
    two = log_partition(np.stack([A, other]), b).value
    np.testing.assert_allclose(two, [brute(A, b), brute(other, b)], atol=1e-10)
    two = log_partition(A, np.stack([b, fields])).value
    np.testing.assert_allclose(two, [brute(A, b), brute(A, fields)], atol=1e-10)


def test_conventions_and_the_diagonal():
    A, b = random_model(6)
    assert log_partition(A / 2, b, convention="full").value == pytest.approx(log_partition(A, b).value)
    shifted = A + np.diag(np.arange(6.0))
    assert log_partition(shifted, b).value == pytest.approx(brute(A, b) + 0.5 * 15)
    assert log_partition(sparse.csr_array(shifted), b).value == pytest.approx(brute(A, b) + 0.5 * 15)
    lopsided = np.triu(2 * A)
    assert log_partition(lopsided, b, symmetrize=True).value == pytest.approx(brute(A, b))
    assert log_partition(sparse.csr_array(lopsided), b, symmetrize=True).value == pytest.approx(brute(A, b))


def test_gradient_of_the_diagonal_is_one_half_once():
    A = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    for method in ("exact_enumeration", "modes", "tap", "low_rank"):
        (gradient,) = torch.autograd.grad(log_partition(A, method=method).value, A)
        np.testing.assert_allclose(gradient.diagonal().numpy(), 0.5, atol=1e-9, err_msg=method)


@pytest.mark.parametrize(
    ("A", "b", "told"),
    [
        ([[0, 0.5], [0.1, 0]], None, r"A\[0,1\]=0.5 but A\[1,0\]=0.1; pass symmetrize=True to average"),
        (sparse.csr_array([[0, 0.5], [0.1, 0]]), None, "pass symmetrize=True to average"),
        (np.zeros((2, 3)), None, r"\(2, 3\)"),
        (np.zeros((0, 0)), None, "at least one spin"),
        (np.zeros((0, 3, 3)), None, "batch is empty"),
        (np.zeros(4), None, r"\(4,\)"),
        ([[0, np.nan], [np.nan, 0]], None, r"A\[0,1\] is nan"),
        (sparse.csr_array([[0, np.inf], [np.inf, 0]]), None, r"A\[0,1\] is inf"),
        (np.zeros((2, 2)), [0, np.inf], r"b\[1\] is inf"),
        (np.zeros((2, 2)), [0, 1, 2], "length n = 2"),
        (np.zeros((2, 2, 2)), np.zeros((3, 2)), "holds 2 models, b holds 3"),
        ("no numbers", None, "A must be numbers"),
        ([[0, 1], [1]], None, "regular array"),
        (torch.zeros(2, 2, dtype=torch.complex64), None, "real"),
        (np.zeros((2, 2), dtype=complex), None, "real"),
        (sparse.csr_array(np.eye(2) * 1j), None, "real"),
        ([[0, 1e200], [1e200, 0]], None, "rescale"),
        (sparse.csr_array(np.zeros((2, 3))), None, r"\(2, 3\)"),
        (sparse.csr_array((2, 2)), np.zeros((2, 2)), "length n = 2"),
    ],
)
def test_wrong_models(A, b, told):
    with pytest.raises(InputError, match=told) as caught:
        as_problem(A, b)
    assert "\n" not in str(caught.value)


def test_a_wrong_entry_of_a_batch_names_its_model():
    A = np.zeros((3, 2, 2))
    A[1, 0, 1] = A[1, 1, 0] = np.nan
    with pytest.raises(InputError, match=r"A\[0,1\] of model 1 is nan"):
        as_problem(A)


def test_fields_twice_and_conventions():
    with pytest.raises(InputError, match="has its fields already"):
        log_partition(Ising(np.zeros((2, 2))), [1.0, 2.0])
    with pytest.raises(InputError, match="convention"):
        log_partition(np.zeros((2, 2)), convention="double")


def test_asymmetry_within_rounding_is_no_error():
    A, b = random_model(5)
    nearly = A + 1e-10 * np.triu(np.ones((5, 5)), 1)
    assert log_partition(nearly, b).value == pytest.approx(brute(A, b), abs=1e-7)


def test_huge_couplings_warn_and_do_not_overflow():
    A = np.array([[0, 2e6], [2e6, 0]])
    with pytest.warns(UserWarning, match="units"):
        assert log_partition(A).value == pytest.approx(2e6 + np.log(2))


def test_the_callers_arrays_are_left_alone():
    A, b = random_model(6)
    A[2, 2] = 1.0
    before = A.copy(), b.copy()
    matrix = sparse.csr_array(A)
    kept = matrix.copy()
    log_partition(A, b)
    log_partition(matrix, b)
    tensor = torch.from_numpy(A)
    log_partition(tensor, torch.from_numpy(b), method="modes")
    np.testing.assert_array_equal(A, before[0])
    np.testing.assert_array_equal(b, before[1])
    assert (matrix != kept).nnz == 0


def test_sparse_models_stay_sparse_where_promised():
    n = 30_000
    chain = sparse.diags_array([np.full(n - 1, 0.3), np.full(n - 1, 0.3)], offsets=[-1, 1])
    expected = n * np.log(2) + (n - 1) * np.log(np.cosh(0.3))
    assert log_partition(chain, method="belief_propagation").value == pytest.approx(expected, rel=1e-9)
    with pytest.raises(InputError, match="GB"):
        log_partition(chain, method="spectral")
