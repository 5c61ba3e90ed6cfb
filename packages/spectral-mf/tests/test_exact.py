from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from scipy.special import logsumexp
from torch.autograd import gradcheck, gradgradcheck

from shared_core.errors import InputError
from spectral_mf._inputs import as_problem
from spectral_mf.baselines import exact
from spectral_mf.baselines._tables import least_width, min_fill
from spectral_mf.baselines.exact import (
    exact_elimination,
    exact_enumeration,
    exact_rbm,
    exact_sample,
    exact_transfer,
    max_energy,
    structure,
)


def states(n):
    return np.array(list(itertools.product([-1.0, 1.0], repeat=n)))


def energies(A, b):
    X = states(len(b))
    return 0.5 * np.einsum("si,ij,sj->s", X, A, X) + X @ b


def brute(A, b):
    return logsumexp(energies(A, b))


def symmetric(upper):
    upper = np.triu(upper, 1)
    return upper + upper.T


def complete(seed, n, scale=1.0, field=1.0):
    rng = np.random.default_rng(seed)
    return symmetric(scale * rng.normal(size=(n, n))), field * rng.normal(size=n)


def grid(seed, rows, cols, scale=1.0):
    rng = np.random.default_rng(seed)
    A = np.zeros((rows * cols,) * 2)
    for r, c in itertools.product(range(rows), range(cols)):
        at = r * cols + c
        if c + 1 < cols:
            A[at, at + 1] = scale * rng.normal()
        if r + 1 < rows:
            A[at, at + cols] = scale * rng.normal()
    return symmetric(A), rng.normal(size=rows * cols)


def bipartite(seed, left, right, scale=1.0, density=1.0):
    rng = np.random.default_rng(seed)
    n = left + right
    A = np.zeros((n, n))
    A[:left, left:] = scale * rng.normal(size=(left, right)) * (rng.random((left, right)) < density)
    shuffle = rng.permutation(n)
    return (A + A.T)[np.ix_(shuffle, shuffle)], rng.normal(size=n)


def curie_weiss(n, J, h):
    k = np.arange(n + 1)
    m = 2 * k - n
    counts = np.array([math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in k])
    return logsumexp(counts + J / 2 * (m**2 - n) + h * m)


# Enumeration


@pytest.mark.parametrize("n", range(1, 13))
@pytest.mark.parametrize("scale", [0.0, 0.3, 3.0, 500.0])
def test_enumeration_is_the_sum_over_all_states(n, scale):
    A, b = complete(n, n, scale, field=max(scale, 1.0))
    result = exact_enumeration(A, b)
    expected = brute(A, b)
    assert result.value == pytest.approx(expected, rel=1e-13, abs=1e-12)
    assert result.lower < result.value < result.upper
    assert result.lower <= expected <= result.upper


def test_enumeration_adds_up_in_blocks_what_would_underflow():
    # The best states of pairs of thirds contradict each other by far more than the 745 nats exp can hold.
    A, b = complete(3, 14, 500.0)
    thirds = exact._thirds(*(torch.tensor(part)[None] for part in (A, b)))
    rows, held = exact._rows_by_products(thirds)
    assert not held.any()
    assert rows.logsumexp(-1).item() != pytest.approx(brute(A, b), abs=1.0)
    assert exact_enumeration(A, b).value == pytest.approx(brute(A, b), rel=1e-13)


def test_only_the_models_that_underflow_take_the_slow_way():
    parts = [complete(seed, 12, scale) for seed, scale in enumerate([1.0, 500.0, 0.1, 400.0])]
    A, b = (np.stack(part) for part in zip(*parts, strict=True))
    np.testing.assert_allclose(exact_enumeration(A, b).value, [brute(*part) for part in parts], rtol=1e-13)


@pytest.mark.parametrize("block", [1, 64, 1 << 20])
def test_blocks_and_groups_do_not_change_the_value(monkeypatch, block):
    monkeypatch.setattr(exact, "_BLOCK", block)
    monkeypatch.setattr(exact, "_GROUP", block)
    parts = [bipartite(seed, 3, 6, scale) for seed, scale in enumerate([1.0, 300.0, 0.5])]
    # One graph for all, so that every method takes the batch.
    mask = parts[0][0] != 0
    A = np.stack([symmetric(np.where(mask, complete(k, 9, 1.0 + 300 * k)[0], 0.0)) for k in range(3)])
    b = np.stack([part[1] for part in parts])
    expected = [brute(A[k], b[k]) for k in range(3)]
    for method in (exact_enumeration, exact_rbm, exact_elimination):
        np.testing.assert_allclose(method(A, b).value, expected, rtol=1e-12)
    assert np.allclose(max_energy(A, b)[0], [energies(A[k], b[k]).max() for k in range(3)])


def test_enumeration_refuses_too_many_spins():
    with pytest.raises(InputError, match=r"n = 26 spins have 2\^26 = 6.71e\+07 states, above max_spins = 25") as error:
        exact_enumeration(np.zeros((26, 26)))
    assert "\n" not in str(error.value)
    assert "exact_elimination" in str(error.value)
    with pytest.raises(InputError, match=r"2\^1200 states"):
        exact_enumeration(np.zeros((1200, 1200)))
    assert exact_enumeration(np.zeros((26, 26)), max_spins=26).value == pytest.approx(26 * math.log(2))


# All methods


def chain(n):
    A = symmetric(np.diag([0.8] * (n - 1), 1))
    return A, np.zeros(n)


CLOSED_FORMS = {
    "chain": (*chain(10), 9.548253849),
    "antiferromagnetic triangle": (np.eye(3) - np.ones((3, 3)), np.zeros(3), math.log(2 * math.exp(-3) + 6 * math.e)),
    "pair": (symmetric(np.array([[0, 0.7], [0, 0]])), np.array([0.3, -0.4]), 1.666622590),
    "Curie-Weiss": (0.1 * (np.ones((10, 10)) - np.eye(10)), np.full(10, 0.2), 7.994567142),
}


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_closed_forms(name):
    A, b, expected = CLOSED_FORMS[name]
    assert exact_enumeration(A, b).value == pytest.approx(expected, abs=1e-9)
    assert exact_elimination(A, b).value == pytest.approx(expected, abs=1e-9)
    if name in ("chain", "pair"):
        assert exact_rbm(A, b).value == pytest.approx(expected, abs=1e-9)
        assert exact_transfer(A, b).value == pytest.approx(expected, abs=1e-9)


def test_elimination_of_a_large_complete_graph_meets_curie_weiss():
    A = 0.06 * (np.ones((18, 18)) - np.eye(18))
    expected = curie_weiss(18, 0.06, 0.05)
    assert exact_elimination(A, np.full(18, 0.05)).value == pytest.approx(expected, abs=1e-11)
    assert exact_enumeration(A, np.full(18, 0.05)).value == pytest.approx(expected, abs=1e-11)


@pytest.mark.parametrize(("n", "c", "f", "expected"), [(5, 0.5, 0.3, 4.185036114), (8, 2, 0.5, 21.340687352)])
def test_oracle_instances(n, c, f, expected):
    i = np.arange(n)
    A = symmetric(c * np.sin(1 + i[:, None] + 2 * i + i[:, None] * i))
    b = f * np.cos(1 + 3 * i)
    for method in (exact_enumeration, exact_elimination):
        assert method(A, b).value == pytest.approx(expected, abs=1e-9)
    best = {5: 2.615840, 8: 21.043669}[n]
    assert max_energy(A, b)[0] == pytest.approx(best, abs=1e-6)


METHODS = {
    "enumeration": (exact_enumeration, lambda seed, scale: complete(seed, 8, scale)),
    "elimination": (exact_elimination, lambda seed, scale: complete(seed, 8, scale)),
    "transfer": (exact_transfer, lambda seed, scale: grid(seed, 4, 3, scale)),
    "rbm": (exact_rbm, lambda seed, scale: bipartite(seed, 4, 6, scale)),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_form_of_input_gives_the_same(name):
    method, make = METHODS[name]
    A, b = make(0, 1.0)
    expected = brute(A, b)
    single = method(A, b)
    assert isinstance(single.value, float)
    assert single.value == pytest.approx(expected, abs=1e-12)
    assert method(sparse.csr_array(A), b).value == pytest.approx(expected, abs=1e-12)
    as_torch = method(torch.tensor(A), torch.tensor(b)).value
    assert as_torch.shape == ()
    assert as_torch.item() == pytest.approx(expected, abs=1e-12)
    fields = np.stack([b, -b, 0 * b])
    couplings = np.stack([A, 0.2 * A, 0 * A])
    many = method(couplings, fields)
    assert many.value.shape == (3,)
    np.testing.assert_allclose(many.value, [brute(couplings[k], fields[k]) for k in range(3)], atol=1e-12)
    np.testing.assert_allclose(method(A, fields).value, [brute(A, field) for field in fields], atol=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_a_diagonal_adds_half_its_trace(name):
    method, make = METHODS[name]
    A, b = make(1, 0.5)
    shifted = method(A + np.diag(np.arange(len(b))), b).value
    assert shifted == pytest.approx(brute(A, b) + 0.5 * np.arange(len(b)).sum(), abs=1e-11)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("n", [1, 2, 7])
def test_independent_spins(name, n):
    method, _ = METHODS[name]
    b = np.linspace(-2, 3, n)
    assert method(np.zeros((n, n)), b).value == pytest.approx(np.log(2 * np.cosh(b)).sum(), abs=1e-12)
    assert method(np.zeros((n, n))).value == pytest.approx(n * math.log(2), abs=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_huge_couplings_and_fields_do_not_overflow(name):
    method, make = METHODS[name]
    A, b = make(2, 500.0)
    assert method(A, 900.0 * b).value == pytest.approx(brute(A, 900.0 * b), rel=1e-13)
    tensors = [torch.tensor(A, requires_grad=True), torch.tensor(900.0 * b, requires_grad=True)]
    method(*tensors).value.backward()
    weights = np.exp(energies(A, 900.0 * b) - brute(A, 900.0 * b))
    np.testing.assert_allclose(tensors[1].grad, weights @ states(len(b)), atol=1e-9)
    assert tensors[0].grad.isfinite().all()


@pytest.mark.parametrize("name", METHODS)
def test_gradient_is_the_marginals_and_pair_moments(name):
    method, make = METHODS[name]
    A, b = make(3, 0.7)
    tensors = [torch.tensor(A, requires_grad=True), torch.tensor(b, requires_grad=True)]
    method(*tensors).value.backward()
    X = states(len(b))
    weights = np.exp(energies(A, b) - brute(A, b))
    np.testing.assert_allclose(tensors[1].grad, weights @ X, atol=1e-12)
    # Each of A_ij and A_ji carries half of the pair.
    moments = 0.5 * np.einsum("s,si,sj->ij", weights, X, X)
    used = A != 0
    np.testing.assert_allclose(tensors[0].grad[used], moments[used], atol=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_gradcheck(name):
    method, make = METHODS[name]
    A, b = make(4, 0.5)
    if name in ("enumeration", "elimination"):
        A, b = A[:4, :4], b[:4]
    used = torch.tensor(np.argwhere(np.triu(A))).T
    weights = torch.tensor(A[tuple(used)], requires_grad=True)
    fields = torch.tensor(b, requires_grad=True)

    def value(weights, fields):
        upper = torch.zeros(len(b), len(b), dtype=torch.float64).index_put(tuple(used), weights)
        return method(upper + upper.T, fields).value

    assert gradcheck(value, (weights, fields))
    assert gradgradcheck(value, (weights, fields))


def test_gradient_through_recomputed_blocks(monkeypatch):
    A, b = bipartite(5, 5, 6, 300.0)
    grads = []
    for block in (1 << 20, 100):
        monkeypatch.setattr(exact, "_BLOCK", block)
        for method in (exact_enumeration, exact_rbm):
            fields = torch.tensor(b, requires_grad=True)
            method(torch.tensor(A), fields).value.backward()
            grads.append(fields.grad)
    for grad in grads[1:]:
        torch.testing.assert_close(grad, grads[0], atol=1e-10, rtol=0)


@given(
    n=st.integers(1, 9),
    density=st.floats(0, 1),
    scale=st.sampled_from([0.1, 1.0, 20.0]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_elimination_of_random_graphs(n, density, scale, seed):
    rng = np.random.default_rng(seed)
    A = symmetric(scale * rng.normal(size=(n, n)) * (rng.random((n, n)) < density))
    b = rng.normal(size=n)
    assert exact_elimination(A, b).value == pytest.approx(brute(A, b), rel=1e-12, abs=1e-12)


@given(
    left=st.integers(1, 5),
    right=st.integers(1, 5),
    density=st.floats(0, 1),
    scale=st.sampled_from([0.1, 2.0, 100.0]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_bipartite_graphs_however_they_fall_apart(left, right, density, scale, seed):
    A, b = bipartite(seed, left, right, scale, density)
    assert exact_rbm(A, b).value == pytest.approx(brute(A, b), rel=1e-12, abs=1e-12)
    found = structure(as_problem(A, b))
    assert found.sides is not None
    assert found.sides[0] <= min(left, right)


# Sampling and the most probable state


def test_most_probable_state():
    for seed in range(5):
        A, b = complete(seed, 9)
        energy, spins = max_energy(A, b)
        all_energies = energies(A, b)
        assert energy == pytest.approx(all_energies.max(), abs=1e-12)
        np.testing.assert_array_equal(spins, states(9)[all_energies.argmax()])
    energy, spins = max_energy(np.diag([2.0, 4.0]), torch.tensor([1.0, -1.0]))
    assert energy.item() == 5.0
    assert spins.tolist() == [1.0, -1.0]


def test_samples_follow_the_law():
    A, b = complete(0, 4, 0.7)
    k = 20000
    samples = exact_sample(A, b, k, generator=torch.Generator().manual_seed(0))
    assert samples.shape == (k, 4)
    codes = ((samples > 0) @ (1 << np.arange(3, -1, -1))).astype(int)
    expected = np.exp(energies(A, b) - brute(A, b))
    observed = np.bincount(codes, minlength=16) / k
    # Pearson's statistic with 15 degrees of freedom exceeds 50 once in 10^5.
    assert k * ((observed - expected) ** 2 / expected).sum() < 50


def test_samples_are_reproducible_and_of_the_users_kind():
    A, b = complete(1, 7)
    batch = exact_sample(
        torch.tensor(np.stack([A, -A])), torch.tensor(b), 5, generator=torch.Generator().manual_seed(3)
    )
    again = exact_sample(
        torch.tensor(np.stack([A, -A])), torch.tensor(b), 5, generator=torch.Generator().manual_seed(3)
    )
    assert batch.shape == (2, 5, 7)
    assert torch.equal(batch, again)
    assert (batch.abs() == 1).all()
    strong = exact_sample(500 * A, b, 3, generator=torch.Generator().manual_seed(0))
    np.testing.assert_array_equal(strong, np.stack([max_energy(500 * A, b)[1]] * 3))
    with pytest.raises(InputError, match="k = 0"):
        exact_sample(A, b, 0, generator=torch.Generator())


# Grids


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (2, 2), (2, 5), (5, 2), (3, 4), (4, 3)])
@pytest.mark.parametrize("scale", [0.4, 200.0])
def test_grids(shape, scale):
    A, b = grid(0, *shape, scale)
    expected = brute(A, b)
    assert exact_transfer(A, b, shape=shape).value == pytest.approx(expected, rel=1e-12)
    assert exact_transfer(A, b).value == pytest.approx(expected, rel=1e-12)


def test_grid_against_elimination_and_sides():
    for shape in ((9, 5), (6, 8)):
        A, b = grid(1, *shape)
        expected = exact_transfer(A, b).value
        assert exact_elimination(A, b).value == pytest.approx(expected, abs=1e-11)
    A, b = grid(2, 3, 9)
    assert exact_rbm(A, b).value == pytest.approx(exact_transfer(A, b).value, abs=1e-11)


def test_grid_with_missing_couplings_keeps_its_shape():
    A, b = grid(3, 3, 4)
    A[0, 1] = A[1, 0] = A[5, 9] = A[9, 5] = 0.0
    result = exact_transfer(A, b)
    assert result.diagnostics["shape"] == (3, 4)
    assert result.value == pytest.approx(brute(A, b), abs=1e-12)


def edge(n, *pairs):
    A = np.zeros((n, n))
    for i, j in pairs:
        A[i, j] = A[j, i] = 1.0
    return A


@pytest.mark.parametrize(
    ("A", "shape", "message"),
    [
        (edge(12, (0, 1), (0, 4), (2, 7)), None, r"A\[2,7\] joins two spins that are not neighbours on a 3 x 4 grid"),
        (edge(12, (0, 4), (3, 4)), None, r"A\[3,4\] joins two spins that are not neighbours on a 3 x 4 grid"),
        (edge(12, (0, 4)), (2, 6), r"A\[0,4\] joins two spins that are not neighbours on a 2 x 6 grid"),
        (edge(10, (1, 4)), None, r"A\[1,4\] would make rows of 3 spins, which do not divide n = 10"),
        (edge(10), (3, 4), r"a 3 x 4 grid has 12 spins but n = 10"),
        (edge(10), (-2, -5), r"a -2 x -5 grid"),
        (grid(0, 21, 22)[0], None, r"narrower side of the 21 x 22 grid is 21, above max_width = 20: a table of 2\^21"),
    ],
)
def test_what_is_no_narrow_grid_is_refused(A, shape, message):
    with pytest.raises(InputError, match=message) as error:
        exact_transfer(A, shape=shape)
    assert "\n" not in str(error.value)


# Bipartite graphs and elimination: what is refused, and large sparse models


def test_odd_cycles_are_refused_by_name():
    with pytest.raises(InputError, match=r"not bipartite, A\[\d,\d\] closes an odd cycle"):
        exact_rbm(edge(6, (0, 1), (1, 2), (0, 2), (4, 5)))


def test_a_large_side_is_refused():
    A, b = bipartite(0, 21, 22)
    with pytest.raises(InputError, match=r"smaller side has 21 spins, 2\^21 = 2.1e\+06 states, above max_side = 20"):
        exact_rbm(A, b)


def test_components_do_not_multiply():
    parts = [bipartite(seed, 2, 4) for seed in range(30)]
    A = sparse.block_diag([part[0] for part in parts], format="csr")
    b = np.concatenate([part[1] for part in parts])
    expected = sum(brute(*part) for part in parts)
    assert exact_rbm(A, b).value == pytest.approx(expected, abs=1e-10)
    assert exact_elimination(A, b).value == pytest.approx(expected, abs=1e-10)


def test_a_wide_graph_is_refused_before_anything_is_allocated():
    A, b = complete(0, 60)
    with pytest.raises(InputError, match=r"is at least \d+, above max_width = 22: a table of 2\^\d+") as error:
        exact_elimination(A, b)
    assert "\n" not in str(error.value)
    A, b = grid(0, 40, 40)
    with pytest.raises(InputError, match="above max_width = 5"):
        exact_elimination(sparse.csr_array(A), b, max_width=5)


def test_width_limit_is_inclusive():
    A, b = complete(0, 8)
    assert exact_elimination(A, b, max_width=7).diagnostics["width"] == 7
    with pytest.raises(InputError, match=r"at least 7, above max_width = 6: a table of 2\^8 = 256 entries"):
        exact_elimination(A, b, max_width=6)


def test_thousands_of_spins():
    n = 3000
    couplings = np.random.default_rng(0).normal(size=n - 1)
    line = sparse.diags_array([couplings, couplings], offsets=[1, -1])
    expected = n * math.log(2) + np.log(np.cosh(couplings)).sum()
    assert exact_elimination(line).value == pytest.approx(expected, rel=1e-13)
    # A star: its hub has every other spin for a neighbour.
    hub = sparse.coo_array((couplings, (np.zeros(n - 1, int), np.arange(1, n))), shape=(n, n))
    assert exact_elimination(hub + hub.T).value == pytest.approx(expected, rel=1e-13)
    assert exact_rbm(hub + hub.T).value == pytest.approx(expected, rel=1e-13)
    assert structure(as_problem(hub + hub.T)).induced_width == 1


def width_of(neighbours, order):
    around = [set(row) for row in neighbours]
    width = 0
    for v in order:
        width = max(width, len(around[v]))
        for u in around[v]:
            around[u] |= around[v]
            around[u] -= {u, v}
    return width


@given(n=st.integers(1, 12), density=st.floats(0, 1), seed=st.integers(0, 2**16))
@settings(max_examples=60, deadline=None)
def test_min_fill_orders_all_and_predicts_its_width(n, density, seed):
    rng = np.random.default_rng(seed)
    problem = as_problem(symmetric(rng.random((n, n)) < density))
    found = min_fill(problem.neighbours, n)
    assert found.complete
    assert sorted(found.order) == list(range(n))
    assert found.width == width_of(problem.neighbours, found.order)
    assert least_width(n, len(problem.edges.i)) <= found.width
    if found.width:
        short = min_fill(problem.neighbours, found.width - 1)
        assert not short.complete
        assert found.width - 1 < short.width <= found.width


def test_min_fill_leaves_chordal_graphs_as_they_are():
    # A 2-tree: each new vertex sees both ends of an edge, so width 2 and no fill.
    rng = np.random.default_rng(0)
    pairs = [(0, 1)]
    for v in range(2, 40):
        i, j = pairs[rng.integers(len(pairs))]
        pairs += [(i, v), (j, v)]
    assert min_fill(as_problem(edge(40, *pairs)).neighbours, 39).width == 2


# Structure


def test_structure_of_known_graphs():
    found = structure(as_problem(complete(0, 300)[0]))
    assert (found.n, found.edges, found.is_forest) == (300, 44850, False)
    assert found.sides is found.grid is found.induced_width is found.elimination is found.rbm is None
    assert found.enumeration.size == 300
    found = structure(as_problem(grid(0, 6, 9)[0]))
    assert (found.grid, found.sides, found.is_forest) == ((6, 9), (27, 27), False)
    assert found.transfer.size == 6
    assert 6 <= found.induced_width <= 9
    assert found.elimination.bytes == 32 * 2 ** (found.induced_width + 1)
    found = structure(as_problem(bipartite(0, 5, 30)[0]))
    assert (found.sides, found.rbm.size, found.induced_width) == ((5, 30), 5, 5)
    assert found.rbm.operations == 2**5 * 30
    found = structure(as_problem(np.zeros((4, 4))))
    assert (found.sides, found.grid, found.is_forest, found.induced_width) == ((0, 4), (4, 1), True, 0)
    found = structure(as_problem(edge(4, (0, 1), (1, 2), (0, 2))))
    assert (found.sides, found.grid, found.is_forest, found.induced_width) == (None, None, False, 2)


def test_structure_of_a_batch_is_the_union():
    A = np.stack([edge(3, (0, 1)), edge(3, (1, 2)), edge(3, (0, 2))])
    assert structure(as_problem(A)).sides is None
    assert structure(as_problem(A)).edges == 3
    assert structure(as_problem(np.zeros((1200, 1200)))).enumeration.operations == math.inf
