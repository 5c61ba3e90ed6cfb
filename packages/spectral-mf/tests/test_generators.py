from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from shared_core.errors import InputError
from spectral_mf.generators import FAMILIES, generate, oracle_instance

pytestmark = pytest.mark.usefixtures("unchecked")

# n, c, f -> exact log Z, max energy, by enumeration.
ORACLE = [
    (5, 0.5, 0.3, 4.185036114, 2.615840),
    (6, 1.0, 0.5, 7.669915440, 6.566977),
    (8, 0.2, 0.2, 5.973667975, 2.574226),
    (8, 2.0, 0.5, 21.340687352, 21.043669),
    (10, 1.0, 0.0, 14.963220552, 12.929283),
    (10, 3.0, 1.0, 45.014902741, 44.994457),
]


def energies(A, b):
    states = np.array(list(itertools.product([-1.0, 1.0], repeat=len(b))))
    return 0.5 * ((states @ A) * states).sum(1) + states @ b


def max_energy(A, b):
    """Over all states, by two halves: e1_i + e2_j + x_i A12 y_j."""
    half = len(b) // 2
    x = np.array(list(itertools.product([-1.0, 1.0], repeat=half)), dtype=np.float32)
    y = np.array(list(itertools.product([-1.0, 1.0], repeat=len(b) - half)), dtype=np.float32)
    A, b = A.astype(np.float32), b.astype(np.float32)
    e1 = 0.5 * ((x @ A[:half, :half]) * x).sum(1) + x @ b[:half]
    e2 = 0.5 * ((y @ A[half:, half:]) * y).sum(1) + y @ b[half:]
    return float((e1[:, None] + e2 + x @ A[:half, half:] @ y.T).max())


@pytest.mark.parametrize(("n", "c", "f", "log_z", "top"), ORACLE)
def test_the_oracle_instances_have_the_answers_on_record(n, c, f, log_z, top):
    e = energies(*oracle_instance(n, c, f))
    assert np.logaddexp.reduce(e) == pytest.approx(log_z, abs=2e-9)
    assert e.max() == pytest.approx(top, abs=1e-6)


def test_the_chain_has_its_closed_form():
    A, b = generate("chain", 10, 0.8, seed=0)
    assert np.logaddexp.reduce(energies(A, b)) == pytest.approx(10 * math.log(2) + 9 * math.log(math.cosh(0.8)))


def test_the_papers_recipe_gives_the_mean_max_energy_on_record():
    """70.8 by the recipe and 71.98 in the authors' own data, at n = 20 and cw = 1."""
    found = np.array([max_energy(*generate("complete", 20, 1.0, seed)) for seed in range(40)])
    standard_error = found.std(ddof=1) / math.sqrt(len(found))
    assert abs(found.mean() - 70.8) < 3 * standard_error + 0.5
    assert standard_error < 1.5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("n", [2, 9, 12])
def test_every_family_is_symmetric_and_repeats_with_its_seed(family, n):
    A, b = generate(family, n, 0.7, seed=3)
    assert A.shape == (n, n)
    assert b.shape == (n,)
    assert A.dtype == b.dtype == np.float64
    np.testing.assert_array_equal(A, A.T)
    assert not np.diag(A).any()
    again = generate(family, n, 0.7, seed=np.random.default_rng(3))
    np.testing.assert_array_equal(A, again[0])
    np.testing.assert_array_equal(b, again[1])
    if family != "chain":
        assert any((generate(family, n, 0.7, seed)[0] != A).any() for seed in range(4, 12))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_global_random_state_is_left_alone(family):
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    generate(family, 8, 1.0, seed=0)
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # noqa: NPY002


def upper(A):
    return A[np.triu_indices(len(A), 1)]


def test_complete_graphs_are_uniform_within_twice_the_strength():
    A, b = generate("complete", 120, 1.5, seed=0)
    edges = upper(A)
    assert (edges != 0).all()
    assert 2.9 < np.abs(edges).max() <= 3.0
    assert edges.var() == pytest.approx(3.0, rel=0.05)
    assert 0.9 < np.abs(b).max() <= 1.0
    assert np.abs(generate("complete", 120, 1.5, seed=0, field=0.0)[1]).max() == 0


@pytest.mark.parametrize("p", [0.5, 0.2])
def test_random_graphs_have_their_density_and_scaled_edges(p):
    edges = upper(generate("er", 150, 1.0, seed=1, p=p)[0])
    used = edges[edges != 0]
    assert len(used) / len(edges) == pytest.approx(p, abs=0.02)
    assert 0.95 * 2 / p < np.abs(used).max() <= 2 / p


def test_grids_have_neighbours_only():
    A, b = generate("grid", 12, 0.6, seed=0, rows=3, cols=4, field=0.25)
    place = [(k // 4, k % 4) for k in range(12)]
    for i, j in itertools.product(range(12), repeat=2):
        apart = abs(place[i][0] - place[j][0]) + abs(place[i][1] - place[j][1])
        assert abs(A[i, j]) == (0.6 if apart == 1 else 0.0)
    assert set(np.abs(b)) == {0.25}
    assert len(set(upper(A))) == 3
    assert set(upper(generate("grid", 12, 0.6, 0, couplings="ferro")[0])) == {0.0, 0.6}
    uniform = upper(generate("grid", 400, 0.6, 0, couplings="uniform")[0])
    assert 0.55 < np.abs(uniform).max() <= 0.6


@pytest.mark.parametrize(
    ("n", "options", "edges"),
    [(12, {}, 17), (12, {"rows": 2}, 16), (12, {"cols": 12}, 11), (7, {}, 6), (16, {}, 24)],
)
def test_grids_find_their_missing_side(n, options, edges):
    assert np.count_nonzero(upper(generate("grid", n, 1.0, 0, **options)[0])) == edges


def test_spin_glass_couplings_have_variance_beta_squared_over_n():
    A, b = generate("sk", 200, 1.3, seed=0, field=0.2)
    assert upper(A).var() == pytest.approx(1.3**2 / 200, rel=0.05)
    assert set(b) == {0.2}


def test_hopfield_couplings_have_the_rank_of_their_patterns():
    A, b = generate("hopfield", 30, 1.2, seed=0, patterns=3)
    W = A + np.eye(30) * 1.2 * 3 / 30
    eigenvalues = np.linalg.eigvalsh(W)
    assert (np.abs(eigenvalues[:-3]) < 1e-12).all()
    assert eigenvalues[-3:].min() > 0.1
    assert not b.any()


def test_an_rbm_is_that_of_zero_one_units():
    A, b = generate("rbm", 7, 2.0, seed=5, hidden=3)
    assert not A[:4, :4].any()
    assert not A[4:, 4:].any()
    W = 4 * A[:4, 4:]
    units = np.array(list(itertools.product([0.0, 1.0], repeat=7)))
    log_z = np.logaddexp.reduce(((units[:, :4] @ W) * units[:, 4:]).sum(1))
    assert np.logaddexp.reduce(energies(A, b)) + W.sum() / 4 == pytest.approx(log_z, abs=1e-12)


def test_ferromagnets_only_attract():
    edges = upper(generate("ferromagnet", 60, 0.8, seed=0)[0])
    assert edges.min() >= 0
    assert 0.75 < edges.max() <= 0.8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cube", 4, 1.0, 0, {}), "no family 'cube'; there are complete, er, grid"),
        (("sk", 4, 1.0, 0, {"p": 0.5}), "family 'sk': no option 'p'; there are field"),
        (("sk", 0, 1.0, 0, {}), "n is 0"),
        (("sk", 4, math.nan, 0, {}), "strength is nan"),
        (("complete", 4, 1.0, 0, {"field": math.inf}), "field is inf"),
        (("sk", 4, 1.0, -1, {}), "seed is -1"),
        (("er", 4, 1.0, 0, {"p": 0.0}), "p is 0"),
        (("grid", 12, 1.0, 0, {"rows": 5}), "a grid of 5 x 2 has 10 spins, n is 12"),
        (("grid", 12, 1.0, 0, {"rows": 0}), "rows times cols must be n"),
        (("grid", 12, 1.0, 0, {"couplings": "x"}), "unknown couplings 'x'"),
        (("hopfield", 4, 1.0, 0, {"patterns": 0}), "patterns is 0"),
        (("rbm", 4, 1.0, 0, {"hidden": 4}), "4 of 4 units are hidden"),
        (("ferromagnet", 4, -1.0, 0, {}), "strength is -1"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    family, n, strength, seed, options = arguments
    with pytest.raises(InputError, match=message):
        generate(family, n, strength, seed, **options)


def test_an_oracle_has_at_least_one_spin():
    with pytest.raises(InputError, match="n is 0"):
        oracle_instance(0, 1.0, 1.0)
