"""Effects and their variance in parts: by enumeration, in closed form, and on the raw draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import elu, softplus

from cib_ite import inference
from cib_ite.inference import Posterior, draw_posterior, total_variance
from cib_ite.network import CIBStack
from cib_ite.settings import Settings

ROWS = np.random.default_rng(0).normal(size=(7, 3))
SMALL = {"trunk": (5,), "discriminator": (4,), "latent": 3}


def stack_of(members: int = 2, linear: bool = False, **changes) -> CIBStack:
    """A stack with wide z and heads that differ much, so that what is tested is far from 0."""
    settings = Settings(**{**SMALL, "heads": () if linear else (6,), **changes})
    made = CIBStack(3, settings, seeds=range(members)).to(torch.float64).requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for part in (made.heads, made.encoder, *([] if settings.deterministic else [made.projection])):
        for parameter in part.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    made.log_sigma.copy_(torch.tensor([[0.3, -0.7], [-0.2, 0.1]], dtype=torch.float64)[:members])
    return made


def heads_of(stack: CIBStack, member: int) -> tuple[np.ndarray, np.ndarray]:
    """Slopes (2, latent) and constants (2,) of a member's linear heads."""
    slopes = stack.heads.weights[0][2 * member : 2 * member + 2, :, 0].numpy()
    return slopes, stack.heads.biases[0][2 * member : 2 * member + 2, 0, 0].numpy()


def encoded(stack: CIBStack, rows: np.ndarray = ROWS) -> tuple[np.ndarray, np.ndarray]:
    mean, scale = stack.encode(torch.as_tensor(rows).expand(stack.size, *rows.shape))
    assert scale is not None
    return mean.numpy(), scale.numpy()


def drawn_noise(members: int, draws: int, width: int, seed: int) -> np.ndarray:
    """The draws as documented: half of them from the seed, then their mirror images; one lot for all rows."""
    half = torch.randn(
        (members, 1, -(-draws // 2), width), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return torch.cat([half, -half], 2)[:, 0, :draws].numpy()


# ---- the same z in both heads


def test_the_effects_variance_with_linear_heads_is_that_of_the_difference_of_slopes():
    """``sum((a1 - a0)^2 s^2)`` in closed form; with a z for each arm it would be ``sum((a1^2 + a0^2) s^2)``."""
    stack = stack_of(linear=True)
    for member in (0, 1):
        # Nearly equal slopes tell the two apart best.
        treated, control = stack.heads.weights[0][2 * member + 1], stack.heads.weights[0][2 * member]
        treated.copy_(control + 0.1 * treated)
    made = draw_posterior(stack, ROWS, binary=False, samples=20_000)
    _, scale = encoded(stack)
    for member in (0, 1):
        a, _ = heads_of(stack, member)
        paired = np.square(scale[member]) @ np.square(a[1] - a[0])
        apart = np.square(scale[member]) @ (np.square(a[0]) + np.square(a[1]))
        np.testing.assert_allclose(made.effect_variance[member], paired, rtol=0.05)
        assert (made.effect_variance[member] < 0.2 * apart).all()
        for arm in (0, 1):
            np.testing.assert_allclose(
                made.outcome_variance[member, arm], np.square(scale[member]) @ np.square(a[arm]), rtol=0.05
            )


def test_draws_that_are_listed_by_hand_give_the_same_means_and_variances():
    """Every mean and variance by enumerating the draws in numpy."""
    stack, draws = stack_of(linear=True), 5
    made = draw_posterior(stack, ROWS, binary=False, samples=draws, seed=11)
    mean, scale = encoded(stack)
    noise = drawn_noise(2, draws, 3, 11)
    for member in (0, 1):
        a, b = heads_of(stack, member)
        for row in range(len(ROWS)):
            z = mean[member, row] + scale[member, row] * noise[member]
            outcome = [[a[arm] @ one + b[arm] for one in z] for arm in (0, 1)]
            effect = np.subtract(outcome[1], outcome[0])
            assert made.effect[member, row] == pytest.approx(effect.mean(), abs=1e-10)
            assert made.effect_variance[member, row] == pytest.approx(effect.var(ddof=1), abs=1e-10)
            np.testing.assert_allclose(made.outcome[member, :, row], np.mean(outcome, axis=1), atol=1e-10)
            np.testing.assert_allclose(made.outcome_variance[member, :, row], np.var(outcome, axis=1, ddof=1))


def test_mirrored_draws_make_the_mean_of_linear_heads_exact():
    stack = stack_of(linear=True)
    mean, _ = encoded(stack)
    for draws in (2, 10, 64):
        made = draw_posterior(stack, ROWS, binary=False, samples=draws)
        for member in (0, 1):
            a, b = heads_of(stack, member)
            np.testing.assert_allclose(
                made.effect[member], mean[member] @ (a[1] - a[0]) + b[1] - b[0], rtol=0, atol=1e-12
            )
    odd = draw_posterior(stack, ROWS, binary=False, samples=3)
    assert np.abs(odd.effect[0] - made.effect[0]).max() > 1e-3


@pytest.mark.parametrize("binary", [False, True])
def test_all_of_it_equals_numpy_on_the_raw_draws(binary):
    """Networks with a hidden layer, evaluated draw by draw; the total variance is that of the mixture of members."""
    stack, draws = stack_of(), 8
    made = draw_posterior(stack, ROWS, binary=binary, samples=draws, seed=5)
    mean, scale = encoded(stack)
    noise = drawn_noise(2, draws, 3, 5)
    raw = np.zeros((2, 2, len(ROWS), draws))
    for member in (0, 1):
        z = torch.as_tensor(mean[member][:, None] + scale[member][:, None] * noise[member])
        for arm in (0, 1):
            k = 2 * member + arm
            hidden = elu(z @ stack.heads.weights[0][k] + stack.heads.biases[0][k])
            raw[member, arm] = (hidden @ stack.heads.weights[1][k] + stack.heads.biases[1][k])[..., 0].numpy()
    outcome = 1 / (1 + np.exp(-raw)) if binary else raw
    effect = outcome[:, 1] - outcome[:, 0]
    np.testing.assert_allclose(made.effect, effect.mean(-1), atol=1e-10)
    np.testing.assert_allclose(made.effect_variance, effect.var(-1, ddof=1), atol=1e-10)
    np.testing.assert_allclose(made.outcome, outcome.mean(-1), atol=1e-10)
    np.testing.assert_allclose(made.outcome_variance, outcome.var(-1, ddof=1), atol=1e-10)
    if binary:
        np.testing.assert_allclose(made.noise, np.sqrt(outcome.mean(-1) * (1 - outcome.mean(-1))), atol=1e-10)
    else:
        sigma = np.exp(stack.log_sigma.numpy())
        np.testing.assert_allclose(made.noise, np.broadcast_to(sigma[:, :, None], (2, 2, len(ROWS))))
    rate = 0.5 * (mean**2 + scale**2 - 1 - 2 * np.log(scale)).sum(-1)
    np.testing.assert_allclose(made.rate, rate, atol=1e-10)
    np.testing.assert_allclose(made.latent, mean, atol=1e-12)

    parts = total_variance(made.effect, made.effect_variance)
    np.testing.assert_allclose(parts.representation, effect.var(-1, ddof=1).mean(0), atol=1e-10)
    np.testing.assert_allclose(parts.model, effect.mean(-1).var(0, ddof=1), atol=1e-10)
    np.testing.assert_allclose(parts.total, parts.representation + parts.model)


def test_the_parts_add_up_to_the_variance_of_all_draws_pooled():
    """With the divisors that make both unbiased, K draws of M members have ``(M K - 1) / (M K)`` times this."""
    random = np.random.default_rng(3)
    members, draws = 40, 500
    raw = random.normal(size=(members, 1, 4)) + random.normal(0, 2, (members, draws, 4))
    parts = total_variance(raw.mean(1), raw.var(1, ddof=1))
    within = raw.var(1).mean(0)
    between = raw.mean(1).var(0)
    np.testing.assert_allclose(within + between, raw.reshape(-1, 4).var(0))
    np.testing.assert_allclose(parts.representation * (draws - 1) / draws, within)
    np.testing.assert_allclose(parts.model * (members - 1) / members, between)


def test_one_member_has_no_model_variance():
    parts = total_variance(np.ones((1, 3)), np.full((1, 3), 0.4))
    assert parts.model.tolist() == [0, 0, 0]
    assert parts.total.tolist() == [0.4] * 3


# ---- rows


def assert_same(one: Posterior, other: Posterior, rows: slice | list[int] = slice(None), **close) -> None:
    for name in ("effect", "effect_variance", "outcome", "outcome_variance", "noise", "rate"):
        np.testing.assert_allclose(getattr(one, name)[..., rows], getattr(other, name), err_msg=name, **close)
    np.testing.assert_allclose(one.latent[:, rows], other.latent, **close)


@pytest.mark.parametrize("likelihood", ["gaussian", "hetero"])
@pytest.mark.parametrize("cells", [1, 2 * 10 * 6 * 3, 2 * 10 * 6 * 5])
def test_chunks_do_not_change_any_row(monkeypatch, cells, likelihood):
    stack = stack_of(likelihood=likelihood)
    whole = draw_posterior(stack, ROWS, binary=False, samples=10)
    calls = []
    draw = inference._draw
    monkeypatch.setattr(inference, "_CELLS", cells)
    monkeypatch.setattr(inference, "_draw", lambda *args: calls.append(len(args[1])) or draw(*args))
    assert_same(draw_posterior(stack, ROWS, binary=False, samples=10), whole, rtol=1e-12)
    assert max(calls) == max(1, cells // 120)
    assert sum(calls) == len(ROWS)


def test_a_row_says_the_same_among_any_neighbours():
    stack = stack_of()
    whole = draw_posterior(stack, ROWS, binary=True, samples=12)
    for rows in ([3], [6, 3, 0], [2, 2, 2]):
        assert_same(whole, draw_posterior(stack, ROWS[rows], binary=True, samples=12), rows, rtol=1e-12)


def test_the_seed_decides_and_more_draws_settle():
    stack = stack_of()
    first = draw_posterior(stack, ROWS, binary=False, samples=20, seed=1)
    assert_same(first, draw_posterior(stack, ROWS, binary=False, samples=20, seed=1), rtol=0)
    other = draw_posterior(stack, ROWS, binary=False, samples=20, seed=2)
    assert not np.array_equal(first.effect_variance, other.effect_variance)
    many = [draw_posterior(stack, ROWS, binary=False, samples=8000, seed=seed).effect for seed in (1, 2)]
    assert np.abs(many[0] - many[1]).max() < np.abs(first.effect - other.effect).max() / 5


# ---- other kinds of network


def test_a_deterministic_z_has_no_representation_variance_and_no_rate():
    stack = stack_of(deterministic=True, lam=0.0)
    made = draw_posterior(stack, ROWS, binary=False, samples=50)
    assert not made.effect_variance.any()
    assert not made.outcome_variance.any()
    assert not made.rate.any()
    hidden, _ = stack.encode(torch.as_tensor(ROWS).expand(2, *ROWS.shape))
    outcome = stack.outcomes(hidden.unsqueeze(2))[..., 0].numpy()
    np.testing.assert_allclose(made.effect, outcome[:, 1] - outcome[:, 0])
    assert total_variance(made.effect, made.effect_variance).model.min() > 0


def test_noise_of_each_z_is_averaged_as_a_variance():
    """With a linear noise head put in by hand, the root of ``E[(softplus(c z + d) + 1e-3)^2]`` by quadrature."""
    stack = stack_of(members=1, linear=True, likelihood="hetero")
    made = draw_posterior(stack, ROWS, binary=False, samples=40_000)
    mean, scale = encoded(stack)
    points, weights = np.polynomial.hermite_e.hermegauss(40)
    for arm in (0, 1):
        slope = stack.heads.weights[0][arm, :, 1].numpy()
        centre = mean[0] @ slope + float(stack.heads.biases[0][arm, 0, 1])
        spread = np.sqrt(np.square(scale[0]) @ np.square(slope))
        sd = softplus(torch.as_tensor(centre[:, None] + spread[:, None] * points)).numpy() + 1e-3
        expected = np.sqrt(np.square(sd) @ weights / weights.sum())
        np.testing.assert_allclose(made.noise[0, arm], expected, rtol=0.02)
        assert np.ptp(expected) > 0.1


def test_dropout_passes_share_their_masks_across_rows_and_arms():
    stack = stack_of(deterministic=True, lam=0.0, dropout_trunk=0.4, dropout_head=0.5, trunk=(5, 5), heads=(6,))
    # One row three times: the same masks give the same draws, so the same variance.
    made = draw_posterior(stack, ROWS[[1, 1, 4]], binary=False, samples=30)
    assert made.effect_variance[0, 0] > 0
    np.testing.assert_allclose(made.effect_variance[:, 0], made.effect_variance[:, 1], rtol=1e-12)
    # The same heads in both arms: the same masks leave no effect in any pass.
    for parameter in stack.heads.parameters():
        parameter[1::2] = parameter[::2]
    same = draw_posterior(stack, ROWS, binary=False, samples=30)
    assert same.outcome_variance.min() > 0
    np.testing.assert_allclose(same.effect, 0, atol=1e-12)
    np.testing.assert_allclose(same.effect_variance, 0, atol=1e-20)


def test_dropout_passes_average_to_the_network_without_dropout_where_it_is_linear():
    stack = stack_of(deterministic=True, lam=0.0, dropout_head=0.3, heads=())
    many = draw_posterior(stack, ROWS, binary=False, samples=800)
    hidden, _ = stack.encode(torch.as_tensor(ROWS).expand(2, *ROWS.shape))
    outcome = stack.outcomes(hidden.unsqueeze(2))[..., 0].numpy()
    error = np.sqrt(many.outcome_variance / 800)
    assert (np.abs(many.outcome - outcome) < 5 * error).all()
    # A unit is dropped with probability 0.3: variance h^2 a^2 0.3 / 0.7 each.
    slopes = stack.heads.weights[0][:, :, 0].view(2, 2, -1).numpy()
    expected = np.einsum("mnd,mad->man", np.square(hidden.numpy()), np.square(slopes)) * 0.3 / 0.7
    np.testing.assert_allclose(many.outcome_variance, expected, rtol=0.25)


def test_a_single_draw_has_no_variance():
    made = draw_posterior(stack_of(), ROWS[:1], binary=False, samples=1)
    assert made.effect.shape == (2, 1)
    assert not made.effect_variance.any()
