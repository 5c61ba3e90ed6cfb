from __future__ import annotations

import importlib
import itertools
import math

import numpy as np
import pytest
import torch
from scipy import sparse, stats
from scipy.special import logsumexp

from shared_core.errors import InputError
from spectral_mf import ais, sdp_rounding
from spectral_mf._inputs import as_problem
from spectral_mf.baselines.ais import Annealed, anneal, gibbs

BASES = ["uniform", "fields", "modes"]
sampler = importlib.import_module("spectral_mf.baselines.ais")


def states(n):
    return np.array(list(itertools.product([-1.0, 1.0], repeat=n)))


def energies(A, b):
    X = states(len(b))
    return 0.5 * np.einsum("si,ij,sj->s", X, A, X) + X @ b


def brute(A, b):
    return logsumexp(energies(A, b))


def exact_means(A, b):
    e = energies(A, b)
    return np.exp(e - logsumexp(e)) @ states(len(b))


def random_model(seed, n, scale=1.0, field=0.5):
    rng = np.random.default_rng(seed)
    A = np.triu(scale * rng.normal(size=(n, n)), 1)
    return A + A.T, field * rng.normal(size=n)


def grid(rows, columns, weight, seed=0):
    index = np.arange(rows * columns).reshape(rows, columns)
    A = np.zeros((index.size, index.size))
    A[index[:, :-1].ravel(), index[:, 1:].ravel()] = weight
    A[index[:-1].ravel(), index[1:].ravel()] = weight
    rng = np.random.default_rng(seed)
    A = A * rng.choice([-1.0, 1.0], size=A.shape)
    return A + A.T, rng.uniform(-0.5, 0.5, index.size)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def in_blocks(monkeypatch):
    """Sweep in blocks of spins also where few colours would do."""
    monkeypatch.setattr(sampler, "_is_thin", lambda _: False)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("field", [0.0, 0.8])
def test_weights_are_unbiased(base, field):
    A, b = random_model(0, 6, 0.8, field)
    z = brute(A, b)
    weights = np.concatenate(
        [
            np.exp(anneal(as_problem(A, b), levels=3, base=base, generator=seeded(k)).log_weight[0].numpy() - z)
            for k in range(25)
        ]
    )
    assert abs(weights.mean() - 1) < 4 * weights.std() / math.sqrt(len(weights))
    assert weights.std() / math.sqrt(len(weights)) < 0.05


@pytest.mark.parametrize("base", BASES)
def test_standard_error_is_calibrated(base):
    A, b = random_model(1, 6, 0.7)
    z = brute(A, b)
    scores = []
    for seed in range(40):
        found = ais(A, b, levels=6, chains=300, base=base, generator=seeded(seed))
        scores.append((found.value - z) / found.std_error)
    scores = np.array(scores)
    # Of 40 standard normals the mean square lies in here but once in ten thousand.
    assert 0.35 < (scores**2).mean() < 2.2
    assert abs(scores.mean()) < 0.65


def test_more_levels_make_the_error_smaller():
    A, b = random_model(2, 8)
    few, many = (ais(A, b, levels=levels, generator=seeded(0)) for levels in (3, 100))
    assert many.std_error < 0.5 * few.std_error
    assert many.value == pytest.approx(brute(A, b), abs=5 * many.std_error)
    assert many.marginals == pytest.approx(exact_means(A, b), abs=0.15)
    assert many.diagnostics["effective_chains"] > few.diagnostics["effective_chains"]
    assert many.diagnostics["lower_95"] == pytest.approx(many.value + math.log(0.05))


def histogram(X, n):
    """How often each state, in the order of `states`."""
    code = ((X > 0).to(torch.long) * (2 ** torch.arange(n - 1, -1, -1))[:, None]).sum(0)
    return torch.bincount(code, minlength=2**n).numpy()


def check_law(X, A, b):
    e = energies(A, b)
    expected = np.exp(e - logsumexp(e)) * X.shape[1]
    counts = histogram(X, len(b))
    # Rare states together: the statistic wants no tiny expectations.
    rare = expected < 8
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    keep = expected > 0
    statistic = ((observed[keep] - expected[keep]) ** 2 / expected[keep]).sum()
    assert statistic < stats.chi2.ppf(1 - 1e-5, keep.sum() - 1)


def exact_draws(A, b, count, seed):
    e = energies(A, b)
    at = np.random.default_rng(seed).choice(len(e), size=count, p=np.exp(e - logsumexp(e)))
    return torch.from_numpy(states(len(b))[at].T.copy())


@pytest.mark.parametrize("path", ["blocks", "colours", "sparse", "batch of blocks", "batch of colours"])
def test_gibbs_leaves_the_law_invariant(path, monkeypatch):
    if "blocks" in path:
        monkeypatch.setattr(sampler, "_is_thin", lambda _: False)
        # Two blocks, of four spins and of two.
        monkeypatch.setattr(sampler, "_BLOCK", 4)
    A, b = grid(2, 3, 0.7)
    begin = exact_draws(A, b, 12_000, 0)
    if path == "sparse":
        problem = as_problem(sparse.csr_array(A), b)
    elif "batch" in path:
        A2, b2 = random_model(3, 6, 0.1) if "colours" not in path else (-A, 0.5 * b)
        problem = as_problem(np.stack([A, A2]), np.stack([b, b2]))
    else:
        problem = as_problem(A, b)
    models = problem.models
    after = gibbs(problem, torch.stack([begin] * models), 3, seeded(1))
    check_law(after[0], A, b)
    # It did move.
    assert float((after[0] != begin).double().mean()) > 0.1
    # Far from the law, it comes to it.
    if "batch" in path:
        settled = gibbs(problem, torch.ones(2, 6, 12_000, dtype=torch.float64), 60, seeded(2))
        check_law(settled[1], A2, b2)


@pytest.mark.parametrize("base", BASES)
def test_last_states_follow_the_model(base):
    A, b = random_model(4, 5, 0.4)
    found = anneal(as_problem(A, b), levels=60, chains=4000, base=base, generator=seeded(0))
    means = found.means[0].numpy()
    error = 4 / math.sqrt(float(found.effective_size[0]))
    assert np.abs(means - exact_means(A, b)).max() < error


def test_sparse_and_dense_colours_take_the_same_steps():
    A, b = grid(4, 4, 0.6)
    dense = anneal(as_problem(A, b), levels=5, chains=20, generator=seeded(3))
    thin = anneal(as_problem(sparse.csr_array(A), b), levels=5, chains=20, generator=seeded(3))
    assert torch.equal(dense.states, thin.states)
    assert torch.allclose(dense.log_weight, thin.log_weight, atol=1e-11)


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_array])
@pytest.mark.parametrize("base", ["uniform", "fields"])
def test_colours_give_the_exact_value(form, base):
    A, b = grid(3, 4, 0.5)
    found = ais(form(A), b, levels=60, chains=1500, base=base, generator=seeded(0))
    assert abs(found.value - brute(A, b)) < 4 * found.std_error < 0.2
    assert found.marginals == pytest.approx(exact_means(A, b), abs=0.15)


@pytest.mark.parametrize("base", ["uniform", "fields"])
def test_blocks_of_a_hundred_spins(in_blocks, base):
    chain = np.diag(np.full(99, 0.5), 1)
    truth = 100 * math.log(2) + 99 * math.log(math.cosh(0.5))
    found = ais(chain + chain.T, levels=60, chains=400, base=base, generator=seeded(0))
    assert abs(found.value - truth) < 4 * found.std_error < 1.0


def test_blocks_with_fields_across_several_blocks(in_blocks, monkeypatch):
    monkeypatch.setattr(sampler, "_BLOCK", 4)
    A, b = random_model(5, 10, 0.4)
    one = ais(A, b, levels=50, chains=1000, generator=seeded(0))
    assert abs(one.value - brute(A, b)) < 4 * one.std_error < 0.2
    other = random_model(6, 10, 0.4)
    both = ais(np.stack([A, other[0]]), np.stack([b, other[1]]), levels=50, chains=1000, generator=seeded(0))
    for k, (couplings, fields) in enumerate([(A, b), other]):
        assert abs(both.value[k] - brute(couplings, fields)) < 4 * both.std_error[k]


def test_tracked_energies_are_the_states_energies(in_blocks, monkeypatch):
    """At one more level than none the weights are those of the first states, whatever the path that follows them."""
    A, b = random_model(7, 70, 0.2)
    for thin in (True, False):
        monkeypatch.setattr(sampler, "_is_thin", lambda _, thin=thin: thin)
        problem = as_problem(A, b)
        X = torch.ones(1, 70, 5, dtype=torch.float64)
        sweep = sampler._Sweeper(problem)
        before, fields_before = sweep.energy(X), problem.b @ X[0]
        noise = sampler._logistic((1, 70, 5), seeded(0), problem.b) + problem.b[:, :, None]
        change = sweep(X, noise, 0.7)
        assert torch.allclose(before + change[0], sweep.energy(X), atol=1e-10)
        assert torch.allclose(fields_before + change[1], problem.b @ X[0], atol=1e-10)


@pytest.mark.parametrize("base", BASES)
def test_models_of_a_batch_do_not_share_their_luck(base):
    A, b = random_model(8, 6)
    found = anneal(
        as_problem(np.stack([A, A]), np.stack([b, b])), levels=4, chains=2000, base=base, generator=seeded(0)
    )
    first, second = found.log_weight
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 4 / math.sqrt(2000)
    assert float((found.states[0] * found.states[1]).mean()) < 0.95


def test_a_seed_gives_one_answer_and_the_global_state_is_left_alone():
    A, b = random_model(9, 6)
    for base in BASES:
        torch.manual_seed(0)
        state = torch.get_rng_state()
        np.random.seed(0)  # noqa: NPY002
        kept = np.random.get_state()[1].copy()  # noqa: NPY002
        first, again, other = (ais(A, b, levels=5, chains=50, base=base, generator=seeded(k)).value for k in (0, 0, 1))
        assert first == again != other
        assert torch.equal(state, torch.get_rng_state())
        assert (kept == np.random.get_state()[1]).all()  # noqa: NPY002


@pytest.mark.parametrize("base", BASES)
def test_extreme_models(base):
    strong = 300.0 * (np.ones((4, 4)) - np.eye(4))
    truth = brute(strong, np.full(4, 200.0))
    # What no chain has met is not in the weights; here every chain meets the one state there is.
    found = ais(strong, np.full(4, 200.0), levels=20, base=base, generator=seeded(0))
    assert found.value == pytest.approx(truth, abs=2.0)
    single = ais([[0.0]], [0.7], base=base, levels=3, chains=400, generator=seeded(0))
    assert single.value == pytest.approx(math.log(2 * math.cosh(0.7)), abs=0.1)
    free = ais(np.zeros((3, 3)), base=base, levels=2, generator=seeded(0))
    assert free.value == pytest.approx(3 * math.log(2), abs=1e-9)


def test_fields_base_is_exact_for_independent_spins():
    b = np.array([0.5, -3.0, 20.0])
    found = ais(np.zeros((3, 3)), b, base="fields", levels=1, generator=seeded(0))
    assert found.value == pytest.approx(np.logaddexp(b, -b).sum(), abs=1e-12)
    assert found.std_error < 1e-8


def test_annealed_summaries():
    log_weight = torch.log(torch.tensor([[1.0, 3.0]], dtype=torch.float64))
    found = Annealed(log_weight, torch.tensor([[[1.0, -1.0]]], dtype=torch.float64), 1)
    assert float(found.log_z) == pytest.approx(math.log(2))
    assert float(found.effective_size) == pytest.approx(16 / 10)
    # Relative standard error of the mean of 1 and 3: √2 / √2 / 2.
    assert float(found.std_error) == pytest.approx(0.5)
    assert float(found.means) == pytest.approx(-0.5)


def test_progress_adds_up():
    A, b = random_model(0, 5)
    for base in BASES:
        told = []
        ais(A, b, levels=7, chains=10, base=base, advance=told.append)
        assert sum(told) == 7


def test_warns_when_few_chains_carry_the_estimate():
    A, b = random_model(0, 12, 4.0)
    assert "raise levels" in ais(A, b, levels=2, chains=20).warnings[0]


def test_refusals(unchecked):
    for options in ({"levels": 0}, {"chains": 1}):
        with pytest.raises(InputError, match="at least"):
            ais([[0.0]], **options)
    with pytest.raises(InputError, match="unknown base"):
        ais([[0.0]], base="nothing")
    with pytest.raises(InputError, match="roundings"):
        sdp_rounding([[0.0]], roundings=1)


@pytest.mark.parametrize("field", [0.0, 0.5])
def test_sdp_rounding_is_unbiased(field):
    A, b = random_model(10, 6, 0.5, field)
    z = brute(A, b)
    found = [sdp_rounding(A, b, roundings=8, generator=seeded(k)) for k in range(60)]
    ratios = np.exp(np.array([r.value for r in found]) - z)
    assert abs(ratios.mean() - 1) < 4 * ratios.std() / math.sqrt(len(ratios))
    assert ratios.std() > 0.01
    for r in found:
        assert r.lower <= z <= r.upper
        assert r.lower <= r.value
        assert 1 <= r.diagnostics["distinct"] <= 8


def test_sdp_rounding_finds_the_deepest_state_and_adds_the_constant():
    A, b = random_model(11, 8, 3.0)
    found = sdp_rounding(A + 2 * np.eye(8), b, generator=seeded(0))
    assert found.diagnostics["best_energy"] == pytest.approx(energies(A, b).max() + 8, abs=1e-9)
    assert found.value == pytest.approx(brute(A, b) + 8, abs=0.05)
    assert found.lower <= brute(A, b) + 8 <= found.upper
    batch = sdp_rounding(np.stack([A, 0 * A]), np.stack([b, 0 * b]), generator=seeded(0))
    assert batch.value == pytest.approx([brute(A, b), 8 * math.log(2)], abs=0.05)
    one = sdp_rounding([[0.0]], [0.3], generator=seeded(0))
    assert one.lower <= math.log(2 * math.cosh(0.3)) <= one.upper
