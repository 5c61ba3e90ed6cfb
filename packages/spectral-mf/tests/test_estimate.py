"""The one call: it chooses rightly, is exact where it says so, bounds, predicts, and admits doubt."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import sparse

from shared_core.errors import InputError
from spectral_mf import METHODS, compare, generate, log_partition, marginals, plan


def brute(A: np.ndarray, b: np.ndarray) -> float:
    n = len(b)
    X = 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1) - 1
    return float(np.logaddexp.reduce(0.5 * ((X @ A) * X).sum(1) + X @ b))


def grid(rows: int, columns: int, J: float = 0.5) -> np.ndarray:
    A = np.zeros((rows * columns, rows * columns))
    for r in range(rows):
        for c in range(columns):
            if c + 1 < columns:
                A[r * columns + c, r * columns + c + 1] = J
            if r + 1 < rows:
                A[r * columns + c, (r + 1) * columns + c] = J
    return A + A.T


@pytest.mark.parametrize("n", [1, 2, 3, 7, 13, 20])
def test_auto_is_exact_up_to_20_spins(n):
    A, b = generate("complete", n, 1.0, seed=n)
    found = log_partition(A, b)
    assert found.value == pytest.approx(brute(A, b), abs=1e-9)
    assert found.lower <= brute(A, b) <= found.upper
    assert found.upper - found.lower < 1e-6
    assert found.std_error is None


def test_auto_chooses_by_structure():
    random = np.random.default_rng(0)
    W = random.normal(size=(200, 10))
    machine = np.block([[np.zeros((200, 200)), W], [W.T, np.zeros((10, 10))]])
    ring = np.roll(np.eye(60), 1, axis=1)
    hopfield, _ = generate("hopfield", 80, 1.2, 0, patterns=2)
    chosen = {
        "exact_enumeration": generate("complete", 24, 1.0, 0)[0],
        "exact_transfer": grid(12, 40),
        "exact_rbm": machine,
        "exact_elimination": ring + ring.T,
        "low_rank": hopfield,
        "auto": generate("complete", 40, 1.0, 0)[0],
    }
    for method, A in chosen.items():
        assert plan(A).method == method
        assert plan(A).exact == (method != "auto")


def test_exact_ways_agree_with_each_other():
    A = grid(4, 5, 0.7)
    b = np.linspace(-1, 1, 20)
    values = {name: log_partition(A, b, method=name).value for name in METHODS if name.startswith("exact")}
    assert len(values) == 4
    np.testing.assert_allclose(list(values.values()), brute(A, b), atol=1e-9)


def test_curie_weiss_of_a_hundred_thousand_spins_would_be_low_rank_but_200_are():
    n, J, h = 200, 0.01, 0.05
    A = J * (np.ones((n, n)) - np.eye(n))
    assert log_partition(A, np.full(n, h)).value == pytest.approx(212.614665865, abs=1e-6)


def test_beyond_exact_methods_the_estimate_is_near_and_the_bounds_hold():
    # 30 spins in two halves that do not interact: each is exact, so the truth is known.
    A1, b1 = generate("complete", 15, 0.5, 1)
    A2, b2 = generate("complete", 15, 0.5, 2)
    A = np.block([[A1, np.full((15, 15), 1e-13)], [np.full((15, 15), 1e-13), A2]])
    b = np.concatenate([b1, b2])
    truth = brute(A1, b1) + brute(A2, b2)
    found = log_partition(A, b, budget_s=4.0)
    assert found.method == "auto"
    assert abs(found.value - truth) < 5 * found.std_error + 0.02
    assert found.lower <= truth <= found.upper
    assert set(found.diagnostics["opinions"]) == {"modes", "ais from uniform", "ais from modes"}


def test_disagreement_is_said():
    A, b = generate("sk", 120, 1.0, 0)
    found = log_partition(A, b, budget_s=2.0, bounds=False)
    opinions = [float(value) for value in found.diagnostics["opinions"].values()]
    told = any("disagree" in text for text in found.warnings)
    assert told == (max(opinions) - min(opinions) > max(1.0, 3 * found.std_error))


def test_batches_of_every_method_equal_one_by_one():
    A, b = (np.stack(x) for x in zip(*(generate("complete", 8, s, 3) for s in (0.1, 0.5, 2.0)), strict=True))
    deterministic = [m for m in METHODS if m not in ("ais", "sdp_rounding", "modes", "exact_transfer", "exact_rbm")]
    for method in deterministic:
        batch = log_partition(A, b, method=method).value
        singles = [log_partition(A[k], b[k], method=method).value for k in range(3)]
        np.testing.assert_allclose(batch, singles, rtol=1e-6, atol=1e-6, err_msg=method)


@pytest.mark.parametrize("case", ["complete", "grid", "machine", "ring"])
def test_gradients_are_moments_also_where_there_is_no_coupling(case):
    if case == "complete":
        A, b = generate("complete", 7, 0.5, 0)
    else:
        A = {
            "grid": grid(3, 4),
            "machine": np.block([[np.zeros((9, 9)), np.ones((9, 2))], [np.ones((2, 9)), np.zeros((2, 2))]]) * 0.3,
            "ring": np.roll(np.eye(9), 1, 0) + np.roll(np.eye(9), -1, 0),
        }[case]
        b = np.linspace(-0.5, 0.7, len(A))
    method = {"complete": "auto", "grid": "exact_transfer", "machine": "exact_rbm", "ring": "exact_elimination"}[case]
    couplings = torch.tensor(A, requires_grad=True)
    fields = torch.tensor(b, requires_grad=True)
    value = log_partition(couplings, fields, method=method).value
    dA, db = torch.autograd.grad(value, [couplings, fields])
    n = len(b)
    X = 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1) - 1
    weight = np.exp(0.5 * ((X @ A) * X).sum(1) + X @ b - brute(A, b))
    np.testing.assert_allclose(db.numpy(), weight @ X, atol=1e-9)
    np.testing.assert_allclose(2 * dA.numpy(), (X.T * weight) @ X, atol=1e-9)


def test_auto_with_gradients_takes_a_differentiable_way():
    A, b = generate("complete", 30, 0.5, 0)
    fields = torch.tensor(b, requires_grad=True)
    value = log_partition(torch.tensor(A), fields).value
    (gradient,) = torch.autograd.grad(value, fields)
    assert bool(gradient.isfinite().all())
    assert float(gradient.abs().max()) <= 1 + 1e-6


def test_compare_runs_everything_and_says_what_does_not_apply():
    A, b = generate("complete", 9, 0.5, 0)
    found = compare(A, b)
    assert list(found) == list(METHODS)
    refused = {name for name, result in found.items() if isinstance(result, InputError)}
    assert refused == {"exact_transfer", "exact_rbm"}
    truth = brute(A, b)
    for name in set(found) - refused:
        assert found[name].lower <= truth + 1e-9, name
        assert found[name].upper >= truth - 1e-9, name
        assert math.isfinite(found[name].value)


def test_cost_is_predicted_before_anything_is_allocated():
    A = sparse.random_array((200_000, 200_000), density=1e-5, random_state=np.random.default_rng(0))
    A = A + A.T
    for method in ("spectral", "gaussian", "modes", "low_rank", "sdp_rounding"):
        with pytest.raises(InputError, match="GB, above max_bytes"):
            log_partition(A, method=method)
    with pytest.raises(InputError, match="GB"):
        log_partition(np.zeros((40, 40)) + 0.01 * (1 - np.eye(40)), method="ais", max_bytes=1e3)


def test_wrong_methods_and_options():
    A, b = generate("complete", 5, 0.5, 0)
    with pytest.raises(InputError, match="no method 'bethe'"):
        log_partition(A, b, method="bethe")
    with pytest.raises(InputError, match="mean_field: no option 'damping'; there are starts"):
        log_partition(A, b, method="mean_field", damping=0.5)
    with pytest.raises(InputError, match="no method"):
        compare(A, b, methods=["nothing"])
    big, fields = generate("complete", 30, 0.5, 0)
    with pytest.raises(InputError, match="name it with method="):
        log_partition(big, fields, starts=4)
    with pytest.raises(InputError, match="states"):
        log_partition(big, fields, method="exact_enumeration")


def test_same_seed_same_answer():
    A, b = generate("complete", 28, 1.0, 0)
    first, second = (
        log_partition(A, b, method="ais", generator=torch.Generator().manual_seed(5)).value for _ in range(2)
    )
    assert first == second
    assert first != log_partition(A, b, method="ais", generator=torch.Generator().manual_seed(6)).value


def test_a_result_prints_as_one_line():
    A, b = generate("complete", 6, 0.5, 0)
    text = str(log_partition(A, b))
    assert text.startswith("log Z = ")
    assert "by exact_enumeration, certain: " in text
    assert "±" in str(log_partition(A, b, method="ais"))
    assert str(log_partition(np.stack([A, A]), b)).startswith("log Z of 2 models by exact_enumeration")


def test_a_large_sparse_model_gets_an_estimate_a_second_opinion_and_bounds():
    A, b = generate("grid", 32 * 32, 0.2, 0)
    found = log_partition(sparse.csr_array(A), b, budget_s=1.0)
    assert set(found.diagnostics["opinions"]) == {"belief propagation", "ais from uniform"}
    assert found.lower < found.value < found.upper
    assert abs(found.value - found.diagnostics["opinions"]["belief propagation"]) < 1.0
    assert not found.warnings


def test_a_disconnected_model_is_solved_by_parts():
    blocks = [generate("complete", 24, 0.3, seed) for seed in range(3)]
    n = 24 * 3 + 2
    A, b = np.zeros((n, n)), np.zeros(n)
    for k, (couplings, fields) in enumerate(blocks):
        A[24 * k : 24 * k + 24, 24 * k : 24 * k + 24] = couplings
        b[24 * k : 24 * k + 24] = fields
    b[-1] = 0.7
    expected = sum(log_partition(*block).value for block in blocks) + np.log(2) + np.log(2 * np.cosh(0.7))
    order = np.random.default_rng(0).permutation(n)
    for given in (A, sparse.csr_array(A)):
        found = log_partition(given[order][:, order], b[order])
        assert found.value == pytest.approx(expected, abs=1e-8)
        assert found.upper - found.lower < 1e-6
        assert found.std_error is None
    means = np.zeros(n)
    means[order] = marginals(A[order][:, order], b[order])
    np.testing.assert_allclose(means[24:48], marginals(*blocks[1]), atol=1e-9)
    assert means[-1] == pytest.approx(np.tanh(0.7))
    batch = log_partition(np.stack([A, A]), np.stack([b, 0 * b])).value
    assert batch[0] == pytest.approx(expected, abs=1e-8)


def test_low_rank_couplings_too_strong_for_quadrature_are_estimated_after_all():
    V = np.random.default_rng(3).standard_normal((30, 2))
    gentle = V @ V.T
    assert plan(gentle).method == "low_rank"
    strong = 1e5 * gentle
    assert plan(strong).method == "auto"
    found = log_partition(strong, budget_s=1.0)
    assert found.lower <= found.value <= found.upper


def test_planning_is_quick_for_a_thousand_spins_of_low_rank():
    V = np.random.default_rng(0).standard_normal((1000, 2)) / np.sqrt(1000)
    chosen = plan(V @ V.T)
    assert chosen.method == "low_rank"
    assert "rank 2" in chosen.reason


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "told"),
    [({"budget_s": -1}, "positive"), ({"budget_s": "5"}, "positive"), ({"generator": 3}, "torch.Generator")],
)
def test_wrong_budgets_and_generators(options, told):
    with pytest.raises(InputError, match=told):
        log_partition(np.zeros((3, 3)), **options)
