"""Influence against leaving one out, products against explicit matrices, and solvers against direct ones."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from nap_cases import LENGTHS, R, T, masks, nap
from scipy.stats import pearsonr, spearmanr

from ial_nap.context import Context
from ial_nap.influence import (
    HeadInfluence,
    ModelInfluence,
    conjugate_gradients,
    gauss_newton_product,
    hessian_product,
    influence_on,
    logit_curvature,
    logit_slopes,
    sample_gradients,
    smallest_eigenvalue,
)
from ial_nap.series import make_series
from ial_nap.training import losses
from shared_core.errors import InputError

KINDS = [("binary", 1), ("multilabel", 2), ("multiclass", 3), ("regression", 1)]


def labels(kind, n=12, outputs=1):
    random = torch.Generator().manual_seed(7)
    if kind == "regression":
        return torch.randn(n, generator=random)
    if kind == "multiclass":
        return torch.randint(0, outputs, (n,), generator=random)
    shape = (n, outputs) if kind == "multilabel" else (n,)
    return torch.randint(0, 2, shape, generator=random).float()


@pytest.mark.parametrize(("kind", "c"), KINDS)
def test_slopes_and_curvature_are_autograds(kind, c):
    logits = torch.randn(12, c, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    y = labels(kind, outputs=c)
    (slope,) = torch.autograd.grad(losses(logits, y, kind).sum(), logits)
    torch.testing.assert_close(logit_slopes(logits, y, kind), slope)
    for k in (0, 5):
        found = torch.autograd.functional.hessian(lambda row, k=k: losses(row[None], y[k : k + 1], kind)[0], logits[k])
        torch.testing.assert_close(logit_curvature(logits, kind)[k], found)


# ---- leaving one out


def fitted(x, y, weights, l2):
    """Minimum of ``sum weights * loss + l2 / 2 ||w||^2`` of logistic regression with a free bias, by Newton steps."""
    shown = np.c_[x, np.ones(len(x))]
    penalty = l2 * np.diag([1.0] * x.shape[1] + [0.0])
    w = np.zeros(shown.shape[1])
    for _ in range(50):
        p = 1 / (1 + np.exp(-shown @ w))
        slope = shown.T @ (weights * (p - y)) + penalty @ w
        w = w - np.linalg.solve(shown.T @ (shown * (weights * p * (1 - p))[:, None]) + penalty, slope)
    return w


def logistic_case(n=60, d=4, l2=0.05):
    random = np.random.default_rng(0)
    x, other = random.normal(size=(n, d)), random.normal(size=(200, d))
    truth = random.normal(size=d)
    y, other_y = ((z @ truth + random.logistic(size=len(z)) > 0).astype(float) for z in (x, other))
    weights = np.full(n, 1 / n)
    w = fitted(x, y, weights, l2)

    def loss(w):
        score = np.c_[other, np.ones(200)] @ w
        return np.mean(np.logaddexp(0, score) - other_y * score)

    change = []
    for k in range(n):
        left = weights.copy()
        left[k] = 0
        change.append(loss(fitted(x, y, left, l2)) - loss(w))
    return x, y, other, other_y, w, np.array(change)


def head_of(x, y, w):
    phi = torch.from_numpy(x)
    return phi, (phi @ torch.from_numpy(w[:-1]) + w[-1]).unsqueeze(1), torch.from_numpy(y)


def test_influence_predicts_leaving_one_out():
    x, y, other, other_y, w, change = logistic_case()
    head = HeadInfluence.of(head_of(x, y, w), head_of(other, other_y, w), "binary", l2=0.05, damping=0.0)
    found = head.scores(*head_of(x, y, w)).numpy()
    assert pearsonr(found, change).statistic > 0.97
    assert spearmanr(found, change).statistic > 0.98
    assert 0.9 < np.polyfit(found, change, 1)[0] < 1.15


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_conjugate_gradients_on_the_network_give_what_the_direct_solve_gives(curvature):
    x, y, other, other_y, w, _ = logistic_case()
    layer = torch.nn.Linear(4, 1).double()
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(w[None, :-1]))
        layer.bias.fill_(w[-1])
    train, validation = (
        make_series(a[:, None], b, standardise=False).to(torch.float64) for a, b in ((x, y), (other, other_y))
    )
    whole = ModelInfluence(
        lambda s: layer(s.x[:, 0]),
        list(layer.parameters()),
        train,
        validation,
        l2=0.05,
        damping=0.0,
        curvature=curvature,
    )
    head = HeadInfluence.of(head_of(x, y, w), head_of(other, other_y, w), "binary", l2=0.05, damping=0.0)
    torch.testing.assert_close(whole.scores(train), head.scores(*head_of(x, y, w)), atol=1e-7, rtol=1e-3)


@pytest.mark.parametrize(("kind", "c"), KINDS)
def test_the_heads_hessian_is_autograds(kind, c):
    random = torch.Generator().manual_seed(1)
    phi = torch.randn(12, 3, generator=random, dtype=torch.float64)
    w, y = torch.randn(4, c, generator=random, dtype=torch.float64), labels(kind, outputs=c)
    shown = torch.cat([phi, torch.ones(12, 1, dtype=torch.float64)], 1)

    def loss(flat):
        parameters = flat.view(4, c)
        return losses(shown @ parameters, y, kind).mean() + 0.15 * parameters[:3].square().sum()

    head = HeadInfluence.of((phi, shown @ w, y), (phi, shown @ w, y), kind, l2=0.3)
    torch.testing.assert_close(head.hessian, torch.autograd.functional.hessian(loss, w.flatten()))


# ---- products and solvers


def network():
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=random, dtype=torch.float64))
    return net, torch.randn(15, 3, generator=random, dtype=torch.float64), torch.randint(0, 2, (15,), generator=random)


def explicit(net, value):
    names = [name for name, _ in net.named_parameters()]
    sizes = [p.numel() for p in net.parameters()]
    shapes = [p.shape for p in net.parameters()]

    def of(flat):
        parts = {n: v.view(s) for n, v, s in zip(names, flat.split(sizes), shapes, strict=True)}
        return value(lambda x: torch.func.functional_call(net, parts, (x,)))

    return of, torch.cat([p.detach().flatten() for p in net.parameters()])


def test_products_are_those_of_the_explicit_matrices():
    net, x, y = network()
    leaves = list(net.parameters())
    of, at = explicit(net, lambda f: losses(f(x), y, "multiclass").mean())
    matrix = torch.autograd.functional.hessian(of, at)
    product = hessian_product(lambda: losses(net(x), y, "multiclass").mean(), leaves)
    found = torch.stack([product(v) for v in torch.eye(len(at), dtype=torch.float64)])
    assert (found - matrix).abs().max() < 1e-6
    of, at = explicit(net, lambda f: f(x))
    jacobian = torch.autograd.functional.jacobian(of, at)
    expected = torch.einsum("ncp,ncd,ndq->pq", jacobian, logit_curvature(net(x).detach(), "multiclass"), jacobian) / 15
    product = gauss_newton_product(lambda: net(x), leaves, "multiclass")
    found = torch.stack([product(v) for v in torch.eye(len(at), dtype=torch.float64)])
    assert (found - expected).abs().max() < 1e-6
    assert torch.linalg.eigvalsh(found)[0] > -1e-9
    lowest = float(torch.linalg.eigvalsh(matrix)[0])
    found = smallest_eigenvalue(hessian_product(lambda: losses(net(x), y, "multiclass").mean(), leaves), len(at))
    assert found == pytest.approx(lowest, rel=0.02)


def test_conjugate_gradients_are_the_direct_solve_and_stop_at_negative_curvature():
    random = torch.Generator().manual_seed(0)
    root = torch.randn(8, 8, generator=random, dtype=torch.float64)
    matrix, b = root @ root.T + 0.1 * torch.eye(8), torch.randn(8, generator=random, dtype=torch.float64)
    found = conjugate_gradients(lambda v: matrix @ v, b, iterations=60, tolerance=1e-12)
    torch.testing.assert_close(found.x, torch.linalg.solve(matrix, b), atol=1e-6, rtol=1e-6)
    assert found.residual < 1e-10
    assert found.curvature > 0
    bad = torch.diag(torch.tensor([1.0, -1.0]).double())
    found = conjugate_gradients(lambda v: bad @ v, torch.tensor([0.1, 1.0]).double())
    assert found.curvature < 0
    assert found.x.isfinite().all()
    assert conjugate_gradients(lambda v: v, torch.zeros(3)).x.tolist() == [0, 0, 0]
    assert smallest_eigenvalue(lambda v: bad @ v, 2) == -1


def test_scores_are_those_of_gradients_one_by_one():
    series, model = small_series(), nap().double()
    leaves = [p for name, p in model.named_parameters() if "to_" in name]
    found = ModelInfluence(lambda s: model(s.x, s.lengths).logits, leaves, series, series)
    rows = sample_gradients(losses(model(series.x, series.lengths).logits, series.targets, "binary"), leaves)
    torch.testing.assert_close(found.scores(series), rows @ found.solved.x / len(series))


def small_series(n=24, seed=0):
    x = torch.randn(n, T, R, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return make_series(x, (x[:, -1, 0] > 0).long(), lengths=LENGTHS.repeat(n)[:n]).to(torch.float64)


def test_an_indefinite_hessian_is_said_and_solved_with_more_damping():
    """At the top of ``-w^4``-like bumps of a network that has not converged, there are directions downwards."""
    net, x, y = network()
    train = make_series(x[:, None], y, kind="multiclass", standardise=False).to(torch.float64)
    wrong = make_series(x[:, None], 1 - y, kind="multiclass", standardise=False).to(torch.float64)
    arguments = (lambda s: net(s.x[:, 0]), list(net.parameters()), train, wrong)
    with pytest.warns(RuntimeWarning, match="damping raised"):
        found = ModelInfluence(*arguments, curvature="hessian", l2=0.0, damping=1e-3)
    assert found.damping > 1e-3
    assert found.solved.curvature > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ModelInfluence(*arguments, l2=0.0, damping=1e-3).damping == 1e-3


@pytest.mark.parametrize("scope", ["head", "attention"])
def test_influence_on_the_model_is_of_its_present_context_and_leaves_it_as_it_is(scope):
    model, train, validation = nap(), small_series().to(torch.float32), small_series(seed=1).to(torch.float32)
    before = model(train.x, train.lengths).logits
    one = influence_on(model, train, validation, scope=scope, worst=10).of(train)
    assert one.shape == (24,)
    assert one.abs().max() > 0
    model.update(Context.of(masks()))
    assert not torch.allclose(influence_on(model, train, validation, scope=scope, worst=10).of(train), one)
    model.update(Context(T, R))
    assert torch.equal(model(train.x, train.lengths).logits, before)
    assert all(p.grad is None for p in model.parameters())


def test_wrong_arguments(unchecked):
    model, series = nap(), small_series().to(torch.float32)
    with pytest.raises(InputError, match="worst"):
        influence_on(model, series, series, worst=0)
    with pytest.raises(InputError, match="scope"):
        influence_on(model, series, series, scope="all")
    with pytest.raises(InputError, match="curvature"):
        ModelInfluence(lambda s: model(s.x, s.lengths).logits, [], series, series, curvature="none")
    zero = torch.zeros(4, 2)
    with pytest.raises(InputError, match="singular"):
        HeadInfluence.of(
            (zero, zero[:, :1], zero[:, 0]), (zero, zero[:, :1], zero[:, 0]), "binary", l2=0.0, damping=0.0
        )
