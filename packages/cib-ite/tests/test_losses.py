"""The objective's terms against closed forms, quadrature, other implementations and their own gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import linear_sum_assignment
from scipy.special import expit
from scipy.stats import norm
from torch import nn

from cib_ite import losses
from cib_ite.nn import CIBModule
from shared_core.errors import InputError


def tensors(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- compression


def test_kl_against_monte_carlo():
    mean, scale = torch.tensor([0.5, -1.0, 0.2]), torch.tensor([0.3, 1.5, 0.8])
    z = mean + scale * torch.randn(1_000_000, 3, generator=torch.Generator().manual_seed(0))
    q = torch.distributions.Normal(mean, scale).log_prob(z).sum(1)
    r = torch.distributions.Normal(torch.zeros(3), torch.ones(3)).log_prob(z).sum(1)
    assert losses.kl_diag(mean, scale).item() == pytest.approx((q - r).mean().item(), rel=0.01)


def test_kl_is_zero_at_the_prior_only():
    assert losses.kl_diag(torch.zeros(4), torch.ones(4)).item() == 0
    mean, scale = tensors(1, 500, 4), tensors(2, 500, 4).exp()
    assert (losses.kl_diag(mean, scale) > 0).all()


@pytest.mark.parametrize(("beta", "information"), [(0.1, 0.5 * math.log(9)), (0.3, 0.5 * math.log(7 / 3)), (0.7, 0.0)])
def test_gaussian_information_bottleneck_has_its_phase_transition(beta, information):
    """X ~ N(0,1), Y = X + N(0,1): I(Z;X) = log(1 + u) / 2 with u = (r - beta) / (beta (1 - r)), r = 1/2."""
    r = 0.5
    u = max(0.0, (r - beta) / (beta * (1 - r)))
    assert information == pytest.approx(0.5 * math.log(1 + u))
    random = torch.Generator().manual_seed(0)
    x, e = torch.randn(2, 4000, 1, generator=random)
    # With the sample's own moments exact, what is left is the noise of z.
    x = (x - x.mean()) / x.std(correction=0)
    e = e - e.mean() - x * (x * e).mean()
    y = (x + e / e.std(correction=0))[:, 0]
    a, rho = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(0.0))
    slope, log_sigma = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(0.0))
    optimizer = torch.optim.Adam([a, rho, slope, log_sigma], lr=0.02)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.995)
    for _ in range(900):
        mean, scale = a * x, rho.exp().expand_as(x)
        z = mean + scale * torch.randn(x.shape, generator=random)
        loss = losses.gaussian_nll(y, slope * z[:, 0], log_sigma).mean() + beta * losses.kl_diag(mean, scale).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    found = 0.5 * math.log(1 + (a / rho.exp()).item() ** 2)
    assert found == pytest.approx(information, rel=0.05, abs=0.02)


# ---- prediction


def test_likelihoods_against_torch():
    y, mean, log_scale = tensors(0, 50), tensors(1, 50), tensors(2, 50)
    ours = losses.gaussian_nll(y, mean, log_scale) + 0.5 * math.log(2 * math.pi)
    assert torch.allclose(ours, -torch.distributions.Normal(mean, log_scale.exp()).log_prob(y))
    t = (y > 0).double()
    assert torch.allclose(losses.bernoulli_nll(t, mean), -torch.distributions.Bernoulli(logits=mean).log_prob(t))


def test_reweighting_gives_both_arms_the_same_total():
    t = torch.tensor([1.0] * 3 + [0.0] * 17)
    w = losses.reweight(t, 0.15)
    assert w[t == 1].sum().item() == pytest.approx(10) == w[t == 0].sum().item()


# ---- independence


def mutual_information(m: float, u: float, logit) -> float:
    """H(T) + E log d(t|z) for Z|T=+-1 ~ N(+-m, 1), by quadrature."""
    entropy = -(u * math.log(u) + (1 - u) * math.log(1 - u))

    def inner(z: float) -> float:
        p = expit(logit(z))
        return u * norm.pdf(z, m) * math.log(p) + (1 - u) * norm.pdf(z, -m) * math.log1p(-p)

    return entropy + quad(inner, -12, 12, limit=200)[0]


def exact_information(m: float, u: float) -> float:
    def inner(z: float) -> float:
        p1, p0 = norm.pdf(z, m), norm.pdf(z, -m)
        p = u * p1 + (1 - u) * p0
        return u * p1 * math.log(p1 / p) + (1 - u) * p0 * math.log(p0 / p)

    return quad(inner, -9, 9, limit=200)[0]


@pytest.mark.parametrize(("m", "u"), [(0.5, 0.5), (1.0, 0.2)])
def test_the_bound_is_tight_at_the_optimal_discriminator_only(m, u):
    exact = exact_information(m, u)
    assert mutual_information(m, u, lambda z: 2 * m * z + math.log(u / (1 - u))) == pytest.approx(exact, rel=1e-6)
    for slope, constant in ((1.5 * m, 0.0), (2 * m, 0.5), (0.0, math.log(u / (1 - u)))):
        assert mutual_information(m, u, lambda z, s=slope, c=constant: s * z + c) < exact


def test_the_adversarial_term_is_the_bound_without_the_entropy():
    m, u = 0.7, 0.3
    random = np.random.default_rng(0)
    t = (random.random(400_000) < u).astype(np.float64)
    z = random.normal((2 * t - 1) * m)
    logit = torch.from_numpy(2 * m * z + math.log(u / (1 - u)))
    entropy = -(u * math.log(u) + (1 - u) * math.log(1 - u))
    assert entropy + losses.adversarial(logit, torch.from_numpy(t)).item() == pytest.approx(
        exact_information(m, u), abs=2e-3
    )


def test_the_adversarial_term_is_clipped():
    assert losses.adversarial(torch.tensor([100.0, 100.0]), torch.tensor([0.0, 0.0])).item() == -5


def test_confusion_is_zero_at_the_base_rate_and_positive_elsewhere():
    for u in (0.1, 0.5, 0.8):
        base = math.log(u / (1 - u))
        assert losses.confusion(torch.full((7,), base, dtype=torch.float64), u).item() == pytest.approx(0, abs=1e-12)
        for off in (-1.0, 0.3, 2.0):
            assert losses.confusion(torch.full((7,), base + off, dtype=torch.float64), u).item() > 1e-3


def test_information_about_treatment_is_part_of_the_information_kept():
    """I(Z;X) = I(Z;T) + I(Z;X|T) where T - X - Z is a Markov chain: exact sums over a 2 x 3 x 4 table."""
    random = np.random.default_rng(0)
    p_tx = random.dirichlet(np.ones(6)).reshape(2, 3)
    q_zx = random.dirichlet(np.ones(4), size=3)
    joint = p_tx[:, :, None] * q_zx[None]

    def information(p: np.ndarray) -> float:
        return float((p * np.log(p / (p.sum(1, keepdims=True) * p.sum(0, keepdims=True)))).sum())

    given = sum(joint[t].sum() * information(joint[t] / joint[t].sum()) for t in range(2))
    assert information(joint.sum(0)) == pytest.approx(information(joint.sum(1)) + given, abs=1e-14)
    assert information(joint.sum(1)) <= information(joint.sum(0))


ARMS = torch.tensor([1.0] * 8 + [0.0] * 12, dtype=torch.float64)


def test_linear_mmd_of_identical_arms_is_zero():
    half = tensors(0, 10, 3)
    t = torch.tensor([1.0] * 10 + [0.0] * 10, dtype=torch.float64)
    assert losses.mmd_lin(torch.cat([half, half]), t, 0.5).item() == pytest.approx(0, abs=1e-20)


def test_rbf_mmd_against_the_formula_of_cfrnet():
    z, u, width = tensors(1, 20, 3), 0.5, 0.7
    x, y = z[8:], z[:8]

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.exp(-(torch.cdist(a, b) ** 2) / width**2)

    m, n = 12, 8
    expected = (1 - u) ** 2 / (m * (m - 1)) * (kernel(x, x).sum() - m)
    expected += u**2 / (n * (n - 1)) * (kernel(y, y).sum() - n)
    expected -= 2 * u * (1 - u) / (m * n) * kernel(x, y).sum()
    assert losses.mmd_rbf(z, ARMS, u, width).item() == pytest.approx(4 * expected.item(), rel=1e-10)


def test_rbf_mmd_is_unbiased_over_permutations():
    z, random = tensors(2, 20, 3), np.random.default_rng(0)
    values = [losses.mmd_rbf(z, ARMS[random.permutation(20)], 0.5, 1.0).item() for _ in range(800)]
    assert abs(np.mean(values)) < 4 * np.std(values) / math.sqrt(len(values))


def assignment_cost(z: torch.Tensor, t: torch.Tensor) -> float:
    cost = torch.cdist(z[t == 1], z[t == 0]).numpy()
    rows, columns = linear_sum_assignment(cost)
    return float(cost[rows, columns].mean())


def test_sinkhorn_reaches_the_optimal_assignment():
    z = tensors(3, 24, 2)
    t = torch.tensor([1.0, 0.0] * 12, dtype=torch.float64)
    found = losses.sinkhorn(z, t, sharpness=400.0, rounds=1000, slack=False)
    assert found.item() == pytest.approx(assignment_cost(z, t), rel=0.01)


def cfr_wasserstein(z: torch.Tensor, t: torch.Tensor, u: float, sharpness: float, rounds: int) -> float:
    """Written down from cfrnet's description, in plain (not logarithmic) numbers, for one batch."""
    treated, control = z[t == 1].numpy(), z[t == 0].numpy()
    n, m = len(treated), len(control)
    cost = np.sqrt(np.maximum(((treated[:, None] - control[None]) ** 2).sum(2), 1e-10))
    edge, rate = cost.max(), sharpness / cost.mean()
    full = np.full((n + 1, m + 1), edge)
    full[:n, :m], full[n, m] = cost, 0
    a = np.append(np.full(n, u / n), 1 - u)
    b = np.append(np.full(m, (1 - u) / m), u)
    kernel = np.exp(-rate * full) + 1e-6
    left = a.copy()
    for _ in range(rounds):
        left = a / (kernel @ (b / (kernel.T @ left)))
    right = b / (kernel.T @ left)
    return float(2 * (left[:, None] * kernel * right[None] * full).sum())


@pytest.mark.parametrize(("u", "sharpness", "rounds"), [(0.4, 10.0, 10), (0.5, 10.0, 10), (0.5, 60.0, 300)])
def test_sinkhorn_with_slack_against_cfrnet(u, sharpness, rounds):
    z = tensors(4, 20, 3)
    found = losses.sinkhorn(z, ARMS, u, sharpness=sharpness, rounds=rounds)
    assert found.item() == pytest.approx(cfr_wasserstein(z, ARMS, u, sharpness, rounds), rel=1e-8)


def test_gaussian_surrogate_is_zero_for_equal_arms_and_exact_for_far_ones():
    half, scale = tensors(5, 10, 2), torch.full((20, 2), 0.3, dtype=torch.float64)
    t = torch.tensor([1.0] * 10 + [0.0] * 10, dtype=torch.float64)
    assert losses.mi_gauss(torch.cat([half, half]), scale, t).item() == pytest.approx(0, abs=1e-12)
    # Two point masses convolved with N(0, s^2), matched by one Gaussian: log(1 + m^2 / s^2) / 2.
    mean = (2 * t - 1).unsqueeze(1) * 2.0
    expected = 0.5 * math.log(1 + 4 / 0.09)
    assert losses.mi_gauss(mean, scale[:, :1], t).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", ["mmd-lin", "mmd-rbf", "sinkhorn"])
def test_too_small_an_arm_gives_nothing(name):
    z, t = tensors(6, 10, 2), torch.zeros(10, dtype=torch.float64)
    t[0] = 1
    assert getattr(losses, name.replace("-", "_"))(z, t).item() == 0


@pytest.mark.parametrize("name", ["mmd-lin", "mmd-rbf", "sinkhorn", "mi-gauss"])
def test_stacks_are_batches_side_by_side(name):
    z = tensors(7, 3, 20, 4)
    t = ARMS.expand(3, -1)
    scale = torch.full_like(z, 0.5)
    call = (
        (lambda a, b, s: losses.mi_gauss(a, s, b))
        if name == "mi-gauss"
        else lambda a, b, s: getattr(losses, name.replace("-", "_"))(a, b)
    )
    whole = call(z, t, scale)
    assert torch.allclose(whole, torch.stack([call(z[k], t[k], scale[k]) for k in range(3)]))


# ---- the counterfactual variance


def test_paired_variance_of_linear_heads():
    """Both heads see the same z: with nearly equal heads the effect hardly varies, and independent draws would."""
    d, k = 4, 100_000
    a0 = tensors(8, d)
    a1 = a0 + 0.05 * tensors(9, d)
    s = tensors(10, d).abs() + 0.2
    z = s * torch.randn(k, d, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert losses.counterfactual_variance(z @ a0).item() == pytest.approx((a0**2 * s**2).sum().item(), rel=0.02)
    paired = ((a1 - a0) ** 2 * s**2).sum().item()
    assert losses.counterfactual_variance(z @ a1 - z @ a0).item() == pytest.approx(paired, rel=0.02)
    assert paired < 0.02 * ((a1**2 + a0**2) * s**2).sum().item()


def test_one_sample_has_no_variance():
    with pytest.raises(InputError, match="at least two samples"):
        losses.counterfactual_variance(torch.zeros(3, 1))


# ---- gradients


@pytest.mark.parametrize(
    "loss",
    [
        lambda z: losses.kl_diag(z, z.square() + 0.1),
        lambda z: losses.gaussian_nll(z[:, 0], z[:, 1], 0.3 * z[:, 0]),
        lambda z: losses.bernoulli_nll(ARMS, z[:, 0]),
        lambda z: losses.confusion(z[:, 0], 0.3),
        lambda z: losses.adversarial(z[:, 0], ARMS),
        lambda z: losses.mmd_lin(z, ARMS, 0.4),
        lambda z: losses.mmd_rbf(z, ARMS, 0.4, 1.0),
        lambda z: losses.mi_gauss(z, z.square() + 0.1, ARMS),
        lambda z: losses.counterfactual_variance(z),
    ],
)
def test_gradients(loss):
    assert torch.autograd.gradcheck(loss, tensors(11, 20, 3).requires_grad_())


@pytest.mark.parametrize("slack", [False, True])
def test_gradient_of_sinkhorn_through_the_plan(slack):
    """The scale of the kernel is held fixed (cfrnet stops gradients there), so finite differences need it fixed too."""
    z = tensors(12, 8, 2)
    t = torch.tensor([1.0, 0.0] * 4, dtype=torch.float64)
    fixed = torch.cat([z, torch.tensor([[50.0, 0.0], [-50.0, 0.0]], dtype=torch.float64)])
    arms = torch.cat([t, torch.tensor([1.0, 0.0], dtype=torch.float64)])
    weights = torch.cat([tensors(13, 8, 2), torch.zeros(2, 2, dtype=torch.float64)])
    point = fixed.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(losses.sinkhorn(point, arms, 0.5, slack=slack, sharpness=1e-5), point)
    assert torch.isfinite(gradient).all()
    step = 1e-4 * weights
    numeric = (losses.sinkhorn(fixed + step, arms, 0.5, slack=slack, sharpness=1e-5)
               - losses.sinkhorn(fixed - step, arms, 0.5, slack=slack, sharpness=1e-5)) / 2e-4  # fmt: skip
    assert (gradient * weights).sum().item() == pytest.approx(numeric.item(), rel=0.02, abs=1e-4)


# ---- the module for networks of one's own


def small_module() -> CIBModule:
    torch.manual_seed(0)
    return CIBModule(
        nn.Sequential(nn.Linear(5, 8), nn.ELU(), nn.Linear(8, 6)),
        nn.Linear(3, 1),
        nn.Linear(3, 1),
        nn.Linear(3, 1),
        share=0.4,
    )


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    x = torch.randn(40, 5, generator=random)
    return x, (torch.arange(40) % 2).float(), torch.randn(40, generator=random)


def test_discriminator_step_leaves_the_encoder_alone_and_the_model_step_the_discriminator():
    model = small_module()
    x, t, y = batch()
    model.discriminator_loss(x, t).backward()
    assert all(p.grad is None for p in model.encoder.parameters())
    assert all(p.grad is not None for p in model.discriminator.parameters())
    model.zero_grad(set_to_none=True)
    model.total(model.terms(x, t, y), beta=0.1, gamma=1.0, lam=0.1).backward()
    assert all(p.grad is None for p in model.discriminator.parameters())
    assert all(p.grad.abs().sum() > 0 for p in model.encoder.parameters())


def test_adversarial_gradient_is_minus_that_of_the_cross_entropy():
    logit = tensors(14, 20).requires_grad_()
    (ours,) = torch.autograd.grad(0.3 * losses.adversarial(logit, ARMS), logit)
    bce = torch.nn.functional.binary_cross_entropy_with_logits(logit, ARMS)
    (theirs,) = torch.autograd.grad(bce, logit)
    assert torch.allclose(ours, -0.3 * theirs)


def test_missing_terms_are_named():
    model = CIBModule(nn.Linear(5, 6), nn.Linear(3, 1), nn.Linear(3, 1), share=0.4)
    x, t, y = batch()
    terms = model.terms(x, t, y, samples=1)
    with pytest.raises(InputError, match="independence"):
        model.total(terms, beta=0.1, gamma=1.0)
    with pytest.raises(InputError, match="share"):
        CIBModule(nn.Linear(5, 6), nn.Linear(3, 1), nn.Linear(3, 1), share=1.0)
