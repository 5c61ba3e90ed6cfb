from __future__ import annotations

import copy
import io
import math

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from torch import nn

from blockdiag_opt.baselines import GGT, AdaBound, AMSBound
from blockdiag_opt.baselines.adabound import step_size_bounds
from blockdiag_opt.baselines.ggt import window_weights
from shared_core.errors import InputError

SHAPES = ((3, 4), (5,), ())


def make(seed=0, dtype=torch.float64, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def make_gradients(steps, seed=1, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes] for _ in range(steps)]


def give(params, gradients):
    for parameter, gradient in zip(params, gradients, strict=True):
        parameter.grad = None if gradient is None else gradient.to(parameter.dtype)


def flat(tensors):
    return np.concatenate([t.detach().double().numpy().ravel() for t in tensors])


def trajectory(optimizer, params, gradients):
    path = []
    for now in gradients:
        give(params, now)
        optimizer.step()
        path.append(flat(params))
    return np.stack(path)


def scalar_adabound(
    x, gradients, *, lrs, base_lr, betas, final_lr, gamma, eps, weight_decay, decoupled, amsbound, maximize
):
    """AdaBound of one weight, in floats, as the paper and its authors' code say it."""
    m = v = largest = 0.0
    path = []
    for t, (g, lr) in enumerate(zip(gradients, lrs, strict=True), start=1):
        g = -g if maximize else g
        if decoupled:
            x -= lr * weight_decay * x
        else:
            g += weight_decay * x
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        largest = max(largest, v)
        step = lr * math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t)
        rate = step / (math.sqrt(largest if amsbound else v) + eps)
        end = final_lr * lr / base_lr
        x -= min(max(rate, end * (1 - 1 / (gamma * t + 1))), end * (1 + 1 / (gamma * t))) * m
        path.append(x)
    return path


@pytest.mark.parametrize("amsbound", [False, True])
@pytest.mark.parametrize(("weight_decay", "decoupled"), [(0.0, False), (0.1, False), (0.1, True)])
@pytest.mark.parametrize(("maximize", "tensor_lr"), [(False, False), (True, True)])
def test_adabound_equals_a_loop_over_scalars(amsbound, weight_decay, decoupled, maximize, tensor_lr):
    # The lower bound binds for some weights and the upper for others.
    options = {"betas": (0.8, 0.95), "final_lr": 0.05, "gamma": 0.05, "eps": 1e-3, "weight_decay": weight_decay}
    gradients = make_gradients(40)
    for step, now in enumerate(gradients):
        now[0].mul_(0.1 * math.exp(-step / 10))
    lrs = [0.02 * (1 - step / 50) for step in range(40)]
    params = make()
    kind = AMSBound if amsbound else AdaBound
    lr = torch.tensor(lrs[0], dtype=torch.float64) if tensor_lr else lrs[0]
    optimizer = kind(params, lr=lr, decoupled_weight_decay=decoupled, maximize=maximize, **options)
    start, path = flat(params), []
    for lr, now in zip(lrs, gradients, strict=True):
        optimizer.param_groups[0]["lr"] = torch.tensor(lr, dtype=torch.float64) if tensor_lr else lr
        path.append(trajectory(optimizer, params, [now])[0])
    series = np.stack([flat(now) for now in gradients])
    expected = [
        scalar_adabound(
            start[i],
            series[:, i],
            lrs=lrs,
            base_lr=lrs[0],
            decoupled=decoupled,
            amsbound=amsbound,
            maximize=maximize,
            **options,
        )
        for i in range(len(start))
    ]
    np.testing.assert_allclose(np.stack(path), np.transpose(expected), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("amsbound", [False, True])
def test_wide_bounds_are_adam(amsbound):
    """Adam adds eps to the corrected root: with eps 0 both forms are one."""
    gradients = make_gradients(30)
    ours, theirs = make(), make()
    bounded = AdaBound(ours, lr=0.01, final_lr=1.0, gamma=1e-9, eps=0.0, amsbound=amsbound)
    adam = torch.optim.Adam(theirs, lr=0.01, eps=0.0, amsgrad=amsbound)
    if amsbound:
        # torch corrects the largest moment for the bias of the current step, as AMSBound does.
        for step, now in enumerate(gradients):
            for g in now:
                g.mul_(math.exp(-step / 10))
    np.testing.assert_allclose(
        trajectory(bounded, ours, gradients), trajectory(adam, theirs, gradients), rtol=1e-11, atol=1e-13
    )


def test_closed_bounds_are_sgd_with_a_mean_of_gradients():
    gradients = make_gradients(20)
    params = make()
    x, m = flat(params), 0.0
    path = trajectory(AdaBound(params, lr=0.01, final_lr=0.3, gamma=1e12), params, gradients)
    for now, reached in zip(gradients, path, strict=True):
        m = 0.9 * m + 0.1 * flat(now)
        x = x - 0.3 * m
        np.testing.assert_allclose(reached, x, atol=1e-11)


def test_bounds_meet_at_the_final_rate():
    assert step_size_bounds(1, final_lr=0.1, gamma=1.0) == (0.05, 0.2)
    lower, upper = zip(*(step_size_bounds(t, final_lr=0.1, gamma=0.01) for t in (1, 10, 1000, 10**9)), strict=True)
    assert list(lower) == sorted(lower)
    assert list(upper) == sorted(upper, reverse=True)
    assert lower[-1] == pytest.approx(0.1)
    assert upper[-1] == pytest.approx(0.1)


def test_warm_up_from_zero_uses_the_rate_that_the_group_was_made_with():
    params = make()
    optimizer = AdaBound(params, lr=0.02, final_lr=0.1, gamma=1e12)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(t / 4, 1.0))
    assert optimizer.param_groups[0]["lr"] == 0
    x, m = flat(params), 0.0
    for t, now in enumerate(make_gradients(8)):
        path = trajectory(optimizer, params, [now])
        scheduler.step()
        m = 0.9 * m + 0.1 * flat(now)
        x = x - 0.1 * min(t / 4, 1.0) * m
        np.testing.assert_allclose(path[0], x, atol=1e-11)


def test_a_group_made_with_rate_zero_takes_the_highest_rate_of_its_schedule():
    params = make()
    optimizer = AdaBound(params, lr=0.0)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.4, total_steps=10, cycle_momentum=False)
    trajectory(optimizer, params, make_gradients(1))
    assert optimizer.param_groups[0]["base_lr"] == 0.4
    given = AdaBound(make(), lr=0.0, base_lr=0.5)
    assert given.param_groups[0]["base_lr"] == 0.5


def test_an_unknown_base_rate_is_refused_when_it_matters():
    params = make()
    before = flat(params)
    optimizer = AdaBound(params, lr=0.0)
    np.testing.assert_array_equal(trajectory(optimizer, params, make_gradients(1))[0], before)
    optimizer.param_groups[0]["lr"] = 0.1
    with pytest.raises(InputError, match=r"group 0 was made with lr=0 and now has lr=0\.1.*pass base_lr"):
        optimizer.step()


def test_later_parameters_have_bounds_of_their_own_steps():
    late, gradients = make(), make_gradients(12)
    together = AdaBound(late, lr=0.02, gamma=0.3, final_lr=0.05)
    idle = [[now[0], None, None] if t < 5 else now for t, now in enumerate(gradients)]
    start = [p.detach().clone() for p in late]
    trajectory(together, late, idle[:5])
    for parameter, was in zip(late[1:], start[1:], strict=True):
        assert parameter not in together.state
        assert torch.equal(parameter, was)
    trajectory(together, late, idle[5:])
    apart = make()[1:]
    expected = trajectory(AdaBound(apart, lr=0.02, gamma=0.3, final_lr=0.05), apart, [g[1:] for g in gradients[5:]])
    np.testing.assert_allclose(flat(late[1:]), expected[-1], rtol=1e-13)


def explicit_ggt(x, gradients, *, window, eps, beta1, beta2, lr, sgd_scale, weight_decay=0.0, maximize=False):
    """Full d x d roots by SciPy; ``sgd_scale`` None by ((G G^T)^(1/2) + eps I)^-1 itself."""
    m, kept, path = np.zeros_like(x), [], []
    for g in gradients:
        g = (-g if maximize else g) + weight_decay * x
        # NaN says that there is no gradient.
        there = np.isfinite(g)
        m = np.where(there, beta1 * m + (1 - beta1) * g, m)
        v = np.where(there, m, 0)
        kept = [np.where(there, g, 0), *kept][:window]
        G = np.stack([beta2**age * past for age, past in enumerate(kept)], axis=1)
        if sgd_scale is None:
            root = np.real(scipy.linalg.sqrtm(G @ G.T + 0j))
            p = np.linalg.solve(root + eps * np.eye(len(x)), v)
        else:
            values, Q = scipy.linalg.eigh(G @ G.T)
            inside = values > 1e-10 * values.max()
            U, S = Q[:, inside], np.sqrt(values[inside])
            p = U @ ((U.T @ v) / (S + eps)) + sgd_scale * (v - U @ (U.T @ v))
        x = x - lr * np.where(there, p, 0)
        path.append(x)
    return np.stack(path)


@pytest.mark.parametrize("beta1", [0.0, 0.9])
@pytest.mark.parametrize("beta2", [0.7, 1.0])
@pytest.mark.parametrize("sgd_scale", [None, 0.0, 0.3])
def test_ggt_equals_explicit_roots(beta1, beta2, sgd_scale):
    # 18 weights, a window of 6, 15 steps: the window is written over twice.
    options = {"window": 6, "eps": 0.05, "beta1": beta1, "beta2": beta2, "lr": 0.02, "sgd_scale": sgd_scale}
    gradients = make_gradients(15)
    params = make()
    start = flat(params)
    path = trajectory(GGT(params, **options), params, gradients)
    # sqrtm of a singular matrix is good to about the root of the machine's precision.
    np.testing.assert_allclose(
        path, explicit_ggt(start, [flat(now) for now in gradients], **options), atol=1e-5 if sgd_scale is None else 1e-9
    )


def test_ggt_weight_decay_and_maximize():
    options = {"window": 30, "eps": 0.05, "beta1": 0.5, "beta2": 0.9, "lr": 0.02, "sgd_scale": 0.1}
    options |= {"weight_decay": 0.2, "maximize": True}
    gradients, params = make_gradients(25), make()
    start = flat(params)
    path = trajectory(GGT(params, **options), params, gradients)
    np.testing.assert_allclose(path, explicit_ggt(start, [flat(now) for now in gradients], **options), atol=1e-9)


def test_ggt_with_more_gradients_than_weights_is_full_matrix_adagrad():
    """The window's span is the whole space: sgd_scale has no say, and the root can be inverted as it is."""
    gradients, params = make_gradients(60, shapes=((5,),)), make(shapes=((5,),))
    x = flat(params)
    path = trajectory(GGT(params, lr=0.1, window=60, beta1=0.0, sgd_scale=7.0), params, gradients)
    total = np.zeros((5, 5))
    for t, (now, reached) in enumerate(zip(gradients, path, strict=True)):
        g = flat(now)
        total += np.outer(g, g)
        if t >= 10:
            values, Q = scipy.linalg.eigh(total)
            np.testing.assert_allclose(reached - x, -0.1 * Q @ ((Q.T @ g) / (np.sqrt(values) + 1e-4)), rtol=1e-7)
        x = reached


def test_ggt_without_sgd_stays_in_the_span_of_the_window():
    gradients, params = make_gradients(12), make()
    optimizer = GGT(params, lr=0.1, window=4, sgd_scale=0.0)
    before = flat(params)
    for t, reached in enumerate(trajectory(optimizer, params, gradients)):
        G = np.stack([flat(now) for now in gradients[max(0, t - 3) : t + 1]], axis=1)
        step = reached - before
        outside = step - G @ np.linalg.lstsq(G, step)[0]
        assert np.linalg.norm(outside) < 1e-10 * np.linalg.norm(step)
        before = reached


def test_ggt_is_rotation_equivariant():
    """Nothing is special about coordinates: rotated gradients give the rotated path, for all weights at once."""
    gradients, ours, turned = make_gradients(12), make(), make(shapes=((18,),))
    R = torch.from_numpy(scipy.stats.special_ortho_group.rvs(18, random_state=0))
    turned[0].data = R @ torch.from_numpy(flat(ours))
    path = trajectory(GGT(ours, window=5, lr=0.1), ours, gradients)
    rotated = [[R @ torch.from_numpy(flat(now))] for now in gradients]
    np.testing.assert_allclose(
        trajectory(GGT(turned, window=5, lr=0.1), turned, rotated), path @ R.numpy().T, atol=1e-7
    )


def test_ggt_repeated_gradients_in_single_precision():
    """A window of rank one: nothing is divided by a singular value that is only rounding."""
    params = make(dtype=torch.float32)
    gradient = [g.float() for g in make_gradients(1)[0]]
    start = flat(params)
    path = trajectory(GGT(params, lr=1.0, window=8, beta1=0.0, sgd_scale=1.0), params, [gradient] * 6)
    direction = flat(gradient)
    expected = np.cumsum([1 / (np.sqrt(t) * np.linalg.norm(direction) + 1e-4) for t in range(1, 7)])
    np.testing.assert_allclose(start - path, expected[:, None] * direction, rtol=2e-5, atol=2e-6)


def test_ggt_zero_gradients_do_not_move():
    params = make()
    start = flat(params)
    path = trajectory(GGT(params, lr=1.0, window=3), params, [[torch.zeros_like(p) for p in params]] * 4)
    np.testing.assert_array_equal(path, np.tile(start, (4, 1)))


def test_ggt_leaves_parameters_without_gradient_alone():
    gradients, params = make_gradients(9), make()
    optimizer = GGT(params, lr=0.05, window=4, beta2=0.9, sgd_scale=0.2)
    trajectory(optimizer, params, gradients[:3])
    frozen = params[1].detach().clone()
    mean = optimizer.state[params[0]]["exp_avg"].split([12, 5, 1])[1].clone()
    for now in gradients[3:6]:
        give(params, [now[0], None, now[2]])
        optimizer.step()
    assert torch.equal(params[1], frozen)
    assert torch.equal(optimizer.state[params[0]]["exp_avg"].split([12, 5, 1])[1], mean)
    assert optimizer.state[params[0]]["step"] == 6
    for parameter in params:
        parameter.grad = None
    optimizer.step()
    assert optimizer.state[params[0]]["step"] == 6


def test_ggt_counts_missing_gradients_as_zero_in_the_window():
    """Also where the row of the window still holds an older gradient, and the mean is not zero."""
    options = {"window": 4, "eps": 0.05, "beta1": 0.9, "beta2": 0.9, "lr": 0.05, "sgd_scale": 0.2}
    gradients, params = make_gradients(14), make()
    start, series = flat(params), [flat(now) for now in gradients]
    for t in (5, 6, 9):
        gradients[t][1] = None
        series[t][12:17] = np.nan
    path = trajectory(GGT(params, **options), params, gradients)
    np.testing.assert_allclose(path, explicit_ggt(start, series, **options), atol=1e-9)


def test_ggt_gram_matrix_stays_that_of_its_window():
    gradients, params = make_gradients(17, shapes=((70, 90),)), make(shapes=((70, 90),), dtype=torch.float32)
    optimizer = GGT(params, window=7)
    trajectory(optimizer, params, gradients)
    state = optimizer.state[params[0]]
    window = state["window"].double()
    torch.testing.assert_close(state["gram"], window @ window.T, rtol=1e-12, atol=1e-10)


def test_window_weights_drop_what_is_not_there():
    gram = torch.ones(3, 3)
    weights = window_weights(gram, torch.ones(3), eps=0.0, sgd_scale=0.0)
    # Three equal gradients of length 1: S = sqrt(3), and their sum with these weights has length 1 / S.
    assert float(weights.sum()) == pytest.approx(1 / math.sqrt(3))
    assert window_weights(torch.zeros(2, 2), torch.zeros(2), eps=0.1, sgd_scale=1.0).tolist() == [0, 0]


MAKERS = {
    "adabound": lambda params: AdaBound(params, lr=0.02, gamma=0.1, final_lr=0.05),
    "amsbound": lambda params: AMSBound(params, lr=0.02, gamma=0.1, final_lr=0.05),
    "ggt": lambda params: GGT(params, lr=0.02, window=5, beta2=0.9, sgd_scale=0.5),
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_resumed_equals_uninterrupted(name, dtype):
    gradients = make_gradients(16)
    params = make(dtype=dtype)
    optimizer = MAKERS[name](params)
    trajectory(optimizer, params, gradients[:8])
    stored = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "params": [p.detach() for p in params]}, stored)
    copied_optimizer = copy.deepcopy(optimizer)
    copied = copied_optimizer.param_groups[0]["params"]
    expected = trajectory(optimizer, params, gradients[8:])

    stored.seek(0)
    saved = torch.load(stored, weights_only=True)
    resumed = [nn.Parameter(p.clone()) for p in saved["params"]]
    fresh = MAKERS[name](resumed)
    fresh.load_state_dict(saved["optimizer"])
    np.testing.assert_array_equal(trajectory(fresh, resumed, gradients[8:]), expected)
    np.testing.assert_array_equal(trajectory(copied_optimizer, copied, gradients[8:]), expected)

    # What was loaded is not what is stepped on.
    again = [nn.Parameter(p.clone()) for p in saved["params"]]
    fresh = MAKERS[name](again)
    fresh.load_state_dict(saved["optimizer"])
    np.testing.assert_array_equal(trajectory(fresh, again, gradients[8:]), expected)


@pytest.mark.parametrize("name", MAKERS)
def test_half_precision_parameters_follow_full_precision(name):
    gradients = [[g.bfloat16().double() for g in now] for now in make_gradients(10)]
    half = make(dtype=torch.bfloat16)
    full = [nn.Parameter(p.detach().float()) for p in half]
    reached = trajectory(MAKERS[name](half), half, gradients)[-1]
    wanted = trajectory(MAKERS[name](full), full, gradients)[-1]
    # Each of ten steps rounds a weight of size about 1 to 8 bits.
    np.testing.assert_allclose(reached, wanted, atol=10 * 2**-8)


@pytest.mark.parametrize("name", MAKERS)
def test_closure_is_called_once_with_gradients_on(name):
    weight = nn.Parameter(torch.tensor([3.0, -4.0]))
    optimizer = MAKERS[name]([weight])
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        calls.append(float(loss.detach()))
        return loss

    assert float(optimizer.step(closure).detach()) == 25.0
    assert calls == [25.0]
    assert float(weight.detach().square().sum()) < 25


@pytest.mark.parametrize("name", MAKERS)
def test_groups_keep_their_own_options(name):
    params, alone, gradients = make(), make(), make_gradients(8)
    optimizer = MAKERS[name](params[:1])
    optimizer.add_param_group({"params": params[1:], "lr": 0.1})
    trajectory(optimizer, params, gradients)
    single = MAKERS[name](alone[1:])
    single.add_param_group({"params": alone[:1]})
    single.param_groups[0]["lr"] = 0.1
    if "base_lr" in single.param_groups[0]:
        single.param_groups[0]["base_lr"] = 0.1
    trajectory(single, alone, gradients)
    np.testing.assert_array_equal(flat(params), flat(alone))


@pytest.mark.parametrize("name", MAKERS)
def test_layout_in_memory_does_not_matter(name):
    gradients, plain = make_gradients(6, shapes=((4, 6),)), make(shapes=((4, 6),))
    turned = [nn.Parameter(plain[0].detach().T.contiguous().T)]
    assert not turned[0].is_contiguous()
    expected = trajectory(MAKERS[name](plain), plain, gradients)
    np.testing.assert_allclose(trajectory(MAKERS[name](turned), turned, gradients), expected, rtol=1e-12)


@pytest.mark.parametrize("name", MAKERS)
def test_sparse_gradients_and_complex_parameters_are_refused(name):
    with pytest.raises(InputError, match=r"parameter 0 of group 0: \w+ needs real floating-point parameters"):
        MAKERS[name]([nn.Parameter(torch.zeros(3, dtype=torch.complex64))])
    table = nn.Embedding(5, 2, sparse=True)
    optimizer = MAKERS[name](table.named_parameters())
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(InputError, match=r"parameter 'weight': \w+ cannot use a sparse gradient"):
        optimizer.step()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (AdaBound, {"lr": -1.0}, "lr must be a number >= 0, got -1.0"),
        (AdaBound, {"lr": torch.ones(2)}, "lr as a tensor must hold one number, got 2"),
        (AdaBound, {"betas": (0.9, 1.0)}, r"betas\[1\] must be in \[0, 1\), got 1.0"),
        (AdaBound, {"gamma": 0.0}, "gamma must be a number > 0, got 0.0"),
        (AMSBound, {"final_lr": 0.0}, "final_lr must be a number > 0, got 0.0"),
        (AMSBound, {"eps": float("nan")}, "eps must be a number >= 0, got nan"),
        (AMSBound, {"base_lr": 0.0}, "base_lr must be a number > 0, got 0.0"),
        (GGT, {"window": 0}, "window must be a whole number >= 1, got 0"),
        (GGT, {"eps": 0.0}, "eps must be a number > 0, got 0.0"),
        (GGT, {"beta1": 1.0}, r"beta1 must be in \[0, 1\), got 1.0"),
        (GGT, {"beta2": 0.0}, r"beta2 must be in \(0, 1\], got 0.0"),
        (GGT, {"sgd_scale": -1.0}, "sgd_scale must be None or a number >= 0, got -1.0"),
        (GGT, {"weight_decay": float("inf")}, "weight_decay must be a number >= 0, got inf"),
    ],
)
def test_options_out_of_range_are_refused(kind, options, message):
    with pytest.raises(InputError, match=f"^group 0: {message}$"):
        kind(make(), **options)
    optimizer = kind(make())
    with pytest.raises(InputError, match=f"^group 1: {message}$"):
        optimizer.add_param_group({"params": make(), **options})
    assert len(optimizer.param_groups) == 1


def test_ggt_refuses_gradients_that_are_not_finite_and_goes_on_after():
    gradients, params = make_gradients(12), make()
    expected = trajectory(GGT(params, window=4), params, gradients)
    params = make()
    optimizer = GGT([(f"layer{i}", p) for i, p in enumerate(params)], window=4)
    for t, now in enumerate(gradients):
        if t in (2, 9):
            give(params, [now[0], now[1] * math.inf, now[2]])
            with pytest.raises(InputError, match=r"^parameter 'layer1': its gradient is not finite"):
                optimizer.step()
        reached = trajectory(optimizer, params, [now])[0]
        np.testing.assert_array_equal(reached, expected[t])


def test_ggt_refuses_a_checkpoint_of_other_weights():
    params = make()
    optimizer = GGT(params, window=4)
    trajectory(optimizer, params, make_gradients(1))
    other = GGT(make(shapes=((3, 4), (5,), (2,))), window=4)
    with pytest.raises(InputError, match="group 0: the checkpoint's window is of 18 weights, this group has 19"):
        other.load_state_dict(optimizer.state_dict())
