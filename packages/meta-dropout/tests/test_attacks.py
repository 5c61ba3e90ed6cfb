"""Attacks against linear programs, brute-force projections, and models whose worst perturbation is known."""

from __future__ import annotations

import jaxtyping
import numpy as np
import pytest
import torch
from scipy.optimize import brentq, linprog, minimize
from torch import nn
from torch.nn import functional

from meta_dropout.attacks import (
    KINDS,
    NORMS,
    Attack,
    RobustnessCurve,
    perturb_images,
    project_l1,
    project_l1_box,
    project_l2,
    project_linf,
    robustness_curve,
    transfer,
)
from shared_core.errors import InputError

ORDER = {"l1": 1, "l2": 2, "linf": float("inf")}


@pytest.fixture
def unchecked():
    """Switch run-time checks of annotations off: bad input must meet the function's own message."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def random_images(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Images with many pixels at 0 and at 1, as those of glyphs."""
    drawn = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return (2 * drawn - 0.5).clamp(0, 1)


def random_labels(tasks: int, m: int, ways: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(ways, (tasks, m), generator=torch.Generator().manual_seed(seed))


def mlps(tasks: int, d: int, ways: int, seed: int = 0, dtype: torch.dtype = torch.float32):
    """A network of its own for each task, all in one function."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn((tasks, d, 16), generator=generator, dtype=dtype) * 2 / d**0.5
    second = torch.randn((tasks, 16, ways), generator=generator, dtype=dtype)
    return [lambda x, a=first[t : t + 1], b=second[t : t + 1]: (x.flatten(2) @ a).relu() @ b for t in range(tasks)]


def together(models):
    return lambda x: torch.cat([model(x[t : t + 1]) for t, model in enumerate(models)])


def linear(w: torch.Tensor):
    """Two classes, the loss of class 0 growing with ``w . x``."""
    return lambda x: torch.stack([torch.zeros(x.shape[:2], dtype=x.dtype), x.flatten(2) @ w.to(x.dtype)], -1)


def losses(outputs, x, labels):
    return functional.cross_entropy(outputs(x).flatten(0, 1).double(), labels.flatten(), reduction="none")


# ---- projections


def nearest_by_bisection(v: np.ndarray, radius: float, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Soft thresholding at the level where the norm is the radius, found by root search."""

    def at(level: float) -> np.ndarray:
        return np.clip(np.sign(v) * np.maximum(np.abs(v) - level, 0), low, high)

    def excess(level: float) -> float:
        return np.abs(at(level)).sum() - radius

    return at(0) if excess(0) <= 0 else at(brentq(excess, 0, np.abs(v).max(), xtol=1e-14))


@pytest.mark.parametrize("radius", [1e-3, 0.5, 2.0, 50.0])
def test_l1_projections_equal_a_root_search_for_the_threshold(radius):
    random = np.random.default_rng(0)
    for d in (1, 2, 7, 60):
        v = random.standard_normal((9, d)) * random.exponential(size=(9, 1))
        v[0], v[1, : d // 2] = 0.7, 0
        low, high = -random.random((9, d)), random.random((9, d))
        high[2], low[3] = 0, 0
        endless = np.full(d, np.inf)
        found = project_l1(torch.tensor(v), radius).numpy()
        boxed = project_l1_box(torch.tensor(v), radius, torch.tensor(low), torch.tensor(high)).numpy()
        for row in range(9):
            expected = nearest_by_bisection(v[row], radius, -endless, endless)
            np.testing.assert_allclose(found[row], expected, atol=1e-12)
            expected = nearest_by_bisection(v[row], radius, low[row], high[row])
            np.testing.assert_allclose(boxed[row], expected, atol=1e-12)


def test_l1_projections_are_the_nearest_points_that_a_solver_finds():
    random = np.random.default_rng(1)
    for _ in range(4):
        v, high = random.standard_normal(4) * 2, random.random(4)
        low = -random.random(4)
        for bounds, found in (
            (None, project_l1(torch.tensor(v)[None], 1.0)),
            (
                list(zip(low, high, strict=True)),
                project_l1_box(torch.tensor(v)[None], 1.0, torch.tensor(low)[None], torch.tensor(high)[None]),
            ),
        ):
            # Positive and negative part, for a smooth problem.
            split = [(0, None)] * 8 if bounds is None else [(0, b) for _, b in bounds] + [(0, -a) for a, _ in bounds]
            solved = minimize(
                lambda p, v=v: ((p[:4] - p[4:] - v) ** 2).sum(),
                np.zeros(8),
                method="SLSQP",
                bounds=split,
                constraints={"type": "ineq", "fun": lambda p: 1 - p.sum()},
                options={"ftol": 1e-14, "maxiter": 500},
            )
            np.testing.assert_allclose(found[0].numpy(), solved.x[:4] - solved.x[4:], atol=1e-5)


@pytest.mark.parametrize("project", [project_l1, project_l2, project_linf])
def test_projections_keep_what_is_inside_and_end_on_the_sphere(project):
    order = ORDER[project.__name__.removeprefix("project_")]
    v = torch.randn(50, 300, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 2, 50)[:, None]
    length = torch.linalg.vector_norm(v.double(), order, dim=1)
    found = project(v, 3.0)
    assert found.dtype == v.dtype
    torch.testing.assert_close(torch.linalg.vector_norm(found.double(), order, dim=1), length.clamp(max=3.0))
    assert torch.equal(found[length <= 3], v[length <= 3])
    torch.testing.assert_close(project(found, 3.0), found)
    # The nearest point of a convex set: no other point of it is on the far side.
    other = project(torch.randn(50, 300, generator=torch.Generator().manual_seed(1)), 3.0)
    assert (((v - found) * (other - found)).sum(1) < 1e-3).all()
    assert not project(torch.zeros(2, 5), 1.0).any()


# ---- attacks: what holds for all


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_perturbations_stay_within_budget_and_box_and_never_lower_the_loss(kind, norm, dtype):
    x, labels = random_images(2, 5, 1, 12, 12, dtype=dtype), random_labels(2, 5, 4)
    outputs = together(mlps(2, 144, 4, dtype=dtype))
    clean = losses(outputs, x, labels)
    for eps in {"l1": (1e-3, 1.0, 20.0, 1e3), "l2": (1e-4, 0.3, 3.0, 1e2), "linf": (1e-5, 0.02, 0.3, 2.0)}[norm]:
        found = perturb_images(outputs, x, labels, Attack(kind, norm, eps, steps=5), seed=1)
        assert found.shape == x.shape
        assert found.dtype == dtype
        assert ((found >= 0) & (found <= 1)).all()
        moved = (found.double() - x.double()).flatten(0, 1).flatten(1)
        length = torch.linalg.vector_norm(moved, ORDER[norm], dim=1)
        assert (length <= eps * (1 + 1e-6)).all()
        assert (length > 0).any()
        assert (losses(outputs, found, labels) >= clean - 1e-6).all()
        assert not found.requires_grad


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_tasks_are_attacked_as_if_each_were_alone(kind, norm):
    x, labels, models = random_images(3, 4, 1, 5, 5), random_labels(3, 4, 3), mlps(3, 25, 3)
    attack = Attack(kind, norm, {"l1": 2.0, "l2": 0.5, "linf": 0.1}[norm], steps=4)
    found = perturb_images(together(models), x, labels, attack, seed=7)
    for t, model in enumerate(models):
        alone = perturb_images(model, x[t : t + 1], labels[t : t + 1], attack, seed=7 + t)
        torch.testing.assert_close(found[t], alone[0])


def test_seeds_decide_random_starts_and_nothing_else_does():
    x, labels, outputs = random_images(1, 6, 1, 5, 5), random_labels(1, 6, 3), mlps(1, 25, 3)[0]
    for norm in NORMS:
        attack = Attack("pgd", norm, 0.3, steps=2)
        first = perturb_images(outputs, x, labels, attack, seed=3)
        torch.manual_seed(5)
        before = torch.get_rng_state()
        assert torch.equal(first, perturb_images(outputs, x, labels, attack, seed=3))
        assert torch.equal(before, torch.get_rng_state())
        assert not torch.equal(first, perturb_images(outputs, x, labels, attack, seed=4))
        for fixed in (Attack("pgd", norm, 0.3, steps=2, random_start=False), Attack("fgsm", norm, 0.3)):
            one, other = (perturb_images(outputs, x, labels, fixed, seed=seed) for seed in (3, 4))
            assert torch.equal(one, other)


def test_random_starts_are_uniform_in_the_ball():
    """The norm's share of the radius has the distribution function ``u ** d``, and its mean is ``d / (d + 1)``."""
    x = torch.full((1, 4000, 1, 1, 3), 0.5, dtype=torch.float64)
    labels = torch.zeros(1, 4000, dtype=torch.int64)
    for norm in NORMS:
        seen = []

        def outputs(images, seen=seen):
            seen.append(images.detach())
            return images.flatten(2)

        perturb_images(outputs, x, labels, Attack("pgd", norm, 0.25, steps=1), seed=0)
        start = (seen[1] - x)[0].flatten(1)
        share = torch.linalg.vector_norm(start, ORDER[norm], dim=1) / 0.25
        assert share.max() <= 1
        assert float(share.mean()) == pytest.approx(3 / 4, abs=0.02)
        assert start.mean(0).abs().max() < 0.04 * 0.25


def test_training_state_and_inputs_are_left_alone():
    net = nn.Sequential(nn.Flatten(2), nn.Linear(25, 3))
    x, labels = random_images(1, 4, 1, 5, 5), random_labels(1, 4, 3)
    before = x.clone()
    with torch.no_grad():
        perturb_images(net, x, labels, Attack("pgd", "l2", 0.3, steps=2))
    assert torch.equal(x, before)
    assert all(p.grad is None for p in net.parameters())


# ---- attacks: strength


def best_for_a_linear_model(w: np.ndarray, x: np.ndarray, eps: float, norm: str) -> float:
    """Largest ``w . delta`` with ``x + delta`` in [0, 1]: a linear program for L1 and L-infinity."""
    d = len(w)
    if norm == "linf":
        bounds = [(max(-eps, -a), min(eps, 1 - a)) for a in x]
        return -linprog(-w, bounds=bounds).fun
    bounds = [(0, 1 - a) for a in x] + [(0, a) for a in x]
    return -linprog(np.concatenate([-w, w]), A_ub=np.ones((1, 2 * d)), b_ub=[eps], bounds=bounds).fun


@pytest.mark.parametrize("eps", [0.05, 0.4, 3.0, 100.0])
@pytest.mark.parametrize("norm", ["l1", "linf"])
def test_fgsm_on_a_linear_model_solves_the_linear_program_with_the_box(norm, eps):
    random = np.random.default_rng(2)
    w = random.standard_normal(12)
    w[3] = 0
    x = random_images(1, 8, 1, 3, 4, seed=3, dtype=torch.float64)
    labels = torch.zeros(1, 8, dtype=torch.int64)
    found = perturb_images(linear(torch.tensor(w)), x, labels, Attack("fgsm", norm, eps))
    gains = (found - x)[0].flatten(1).numpy() @ w
    expected = [best_for_a_linear_model(w, image.flatten().numpy(), eps, norm) for image in x[0]]
    np.testing.assert_allclose(gains, expected, atol=1e-9)


def test_fgsm_on_a_linear_model_gains_the_dual_norm_where_no_pixel_hits_the_box():
    w = torch.randn(16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = 0.5 + 0.2 * (random_images(1, 5, 1, 4, 4, dtype=torch.float64) - 0.5)
    labels = torch.zeros(1, 5, dtype=torch.int64)
    for norm, dual in (("l1", float("inf")), ("l2", 2), ("linf", 1)):
        found = perturb_images(linear(w), x, labels, Attack("fgsm", norm, 0.3))
        gains = (found - x)[0].flatten(1) @ w
        torch.testing.assert_close(gains, (0.3 * torch.linalg.vector_norm(w, dual)).expand(5))


@pytest.mark.parametrize(("norm", "eps"), [("l1", 2.0), ("l2", 0.8), ("linf", 0.1)])
def test_pgd_on_a_linear_model_reaches_the_optimum_with_the_box(norm, eps):
    """Also for L2, whose one step is cut off at the box: there the optimum is a root search over the step's length."""
    w = np.random.default_rng(4).standard_normal(30)
    x = random_images(1, 4, 1, 5, 6, seed=5, dtype=torch.float64)
    labels = torch.zeros(1, 4, dtype=torch.int64)
    attack = Attack("pgd", norm, eps, steps=300)
    gains = (perturb_images(linear(torch.tensor(w)), x, labels, attack) - x)[0].flatten(1).numpy() @ w
    for image, gain in zip(x[0].flatten(1).numpy(), gains, strict=True):
        if norm == "l2":

            def moved(length: float, image=image) -> np.ndarray:
                return np.clip(image + length * w, 0, 1) - image

            def excess(length: float, moved=moved) -> float:
                return float(np.linalg.norm(moved(length))) - eps

            best = float(w @ moved(brentq(excess, 0, 1e6)))
        else:
            best = best_for_a_linear_model(w, image, eps, norm)
        # L2 loses a little, going back to the ball and the box one after the other.
        assert (0.97 if norm == "l2" else 0.99) * best < gain < best * (1 + 1e-6)


@pytest.fixture(scope="module")
def digits():
    """Two tasks of digits and a network that was trained on others."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    weights = list(net.parameters())
    for _ in range(200):
        # Plain descent: `torch.optim` costs seconds to import.
        for weight, slope in zip(
            weights, torch.autograd.grad(functional.cross_entropy(net(x[:1000]), y[:1000]), weights), strict=True
        ):
            weight.data -= 0.5 * slope
    return lambda images: net(images.flatten(2)), x[1000:1120].reshape(2, 60, 1, 8, 8), y[1000:1120].reshape(2, 60)


@pytest.mark.parametrize(("norm", "eps"), [("l1", 2.0), ("l1", 8.0), ("l2", 0.6), ("linf", 0.1)])
def test_pgd_is_stronger_than_fgsm_on_a_network_and_more_steps_add_little(digits, norm, eps):
    outputs, x, labels = digits
    fgsm, pgd, long = (
        losses(outputs, perturb_images(outputs, x, labels, attack), labels)
        for attack in (Attack("fgsm", norm, eps), Attack("pgd", norm, eps), Attack("pgd", norm, eps, steps=120))
    )
    clean = losses(outputs, x, labels)
    assert pgd.mean() > fgsm.mean() > 2 * clean.mean()
    assert long.mean() < 1.1 * pgd.mean()


@pytest.mark.parametrize("norm", NORMS)
def test_confident_models_do_not_hide_their_gradients(norm):
    """In float32 the gradient of a loss below 1e-7 is zero, which must not look like robustness."""
    scale = 25 / 0.4
    x = torch.tensor([[[0.7, 0.3]]])
    labels = torch.zeros(1, 1, dtype=torch.int64)
    eps = {"l1": 0.5, "l2": 0.4, "linf": 0.3}[norm]
    for kind in KINDS:
        found = perturb_images(lambda v: scale * v, x, labels, Attack(kind, norm, eps, random_start=False))
        assert (scale * found).argmax() == 1


def test_images_without_gradient_stay_clean_and_wrong_ones_get_worse():
    """The second half of the images meets a dead unit; class 1 of the first half is wrong from the beginning."""
    x = torch.full((1, 4, 1, 1, 2), 0.5)
    labels = torch.tensor([[0, 1, 0, 1]])
    alive = torch.tensor([1.0, 1.0, 0.0, 0.0])[:, None]

    def outputs(images):
        rise = (images.flatten(2).sum(2, keepdim=True) - 2) * alive
        return torch.cat([torch.ones_like(rise), rise], 2)

    for norm in NORMS:
        for attack in (Attack("fgsm", norm, 0.1), Attack("pgd", norm, 0.1, steps=3)):
            found = perturb_images(outputs, x, labels, attack)
            assert torch.isfinite(found).all()
            assert torch.equal(found[:, 2:], x[:, 2:])
            assert (losses(outputs, found, labels) > losses(outputs, x, labels))[:2].all()


def test_a_loss_that_rises_nowhere_leaves_the_image_alone():
    """At the top of a hill the gradient is zero and every random start is lower."""
    x, labels = torch.full((1, 3, 1, 2, 2), 0.5), torch.zeros(1, 3, dtype=torch.int64)

    def outputs(images):
        height = -((images - 0.5) ** 2).flatten(2).sum(2)
        return torch.stack([torch.zeros_like(height), 10 * height], -1)

    for norm in NORMS:
        assert torch.equal(perturb_images(outputs, x, labels, Attack("pgd", norm, 0.2, steps=5)), x)


def test_transductive_batches_are_never_weaker_than_their_iterates():
    """Each image's logits depend on its batch's mean: the best of each image alone need not be good together."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn((25, 3), generator=generator) * 4
    seen = []

    def outputs(images):
        flat = images.flatten(2)
        seen.append(images.detach())
        return ((flat - flat.mean(1, keepdim=True)) * 3).sin() @ w

    x, labels = random_images(2, 6, 1, 5, 5), random_labels(2, 6, 3)
    for kind in KINDS:
        for norm, eps in (("l1", 3.0), ("l2", 0.8), ("linf", 0.2)):
            seen.clear()
            found = perturb_images(outputs, x, labels, Attack(kind, norm, eps, steps=6))
            reached = losses(outputs, found, labels).view(2, 6).sum(1)
            # All but the mixture at the end, which is only a candidate.
            for images in seen[: (8 if kind == "pgd" else 2)]:
                assert (reached >= losses(outputs, images, labels).view(2, 6).sum(1) - 1e-5).all()
            assert (reached > losses(outputs, x, labels).view(2, 6).sum(1)).all()


# ---- curves and transfer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", NORMS)
def test_accuracy_never_rises_with_the_radius(digits, kind, norm):
    outputs, x, labels = digits
    radii = [radius * {"l1": 1.0, "l2": 0.3, "linf": 0.05}[norm] for radius in (0.5, 1, 2, 8)]
    curve = robustness_curve(outputs, x, labels, norm, radii, steps=4, seed=1, kind=kind)
    assert curve.radii.tolist() == [0, *radii]
    assert (curve.per_task.diff(dim=0) <= 0).all()
    torch.testing.assert_close(curve.accuracy, curve.per_task.mean(1))
    clean = (outputs(x).argmax(-1) == labels).double().mean(1)
    torch.testing.assert_close(curve.per_task[0], clean)
    assert curve.accuracy[-1] < 0.5 < curve.accuracy[0]
    assert float(np.trapezoid(curve.accuracy, curve.radii)) / radii[-1] == pytest.approx(curve.auc)


def test_curves_of_a_linear_model_follow_its_margins():
    """Accuracy at a radius is the share of images whose margin, in the dual norm, is larger."""
    w = torch.randn(9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = 0.4 + 0.2 * torch.rand((2, 20, 1, 3, 3), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    bias = (x.flatten(2) @ w).median()
    labels = (x.flatten(2) @ w > bias).long()

    def outputs(images):
        rise = images.flatten(2) @ w - bias
        return torch.stack([torch.zeros_like(rise), rise], -1)

    for norm, dual in (("l1", float("inf")), ("l2", 2), ("linf", 1)):
        margins = (x.flatten(2) @ w - bias).abs() / torch.linalg.vector_norm(w, dual)
        radii = np.quantile(margins.numpy(), [0.21, 0.52, 0.78]).tolist()
        curve = robustness_curve(outputs, x, labels, norm, radii, kind="fgsm")
        expected = torch.stack([(margins > radius).double().mean(1) for radius in radii])
        torch.testing.assert_close(curve.per_task[1:], expected)


def test_fooled_at_a_smaller_radius_counts_at_larger_ones():
    """A narrow valley that the larger step jumps over."""
    x, labels = torch.full((1, 1, 1, 1, 1), 0.5), torch.zeros(1, 1, dtype=torch.int64)

    def outputs(images):
        moved = (images.flatten(2)[..., :1] - 0.5).abs()
        hill = 0.1 * (images.flatten(2)[..., :1] - 0.5) + torch.where((moved > 0.08) & (moved < 0.12), 5.0, -1.0)
        return torch.cat([torch.zeros_like(hill), hill], -1)

    curve = robustness_curve(outputs, x, labels, "linf", [0.05, 0.1, 0.3], kind="fgsm")
    assert curve.accuracy.tolist() == [1, 1, 0, 0]
    alone = perturb_images(outputs, x, labels, Attack("fgsm", "linf", 0.3))
    assert outputs(alone).argmax() == 0


def test_the_area_is_a_mean_accuracy():
    def area(radii: list[float], accuracy: list[float]) -> float:
        given = torch.tensor(accuracy, dtype=torch.float64)
        return RobustnessCurve("l2", torch.tensor(radii, dtype=torch.float64), given, given[:, None]).auc

    assert area([0, 1, 5], [0.7, 0.7, 0.7]) == pytest.approx(0.7)
    assert area([0, 1, 4], [1, 0.5, 0]) == pytest.approx((0.75 + 0.75) / 4)


def test_transfer_to_itself_is_the_attack_and_masked_gradients_show():
    """Rounding logits hides a model's gradient from its own attacks, not from those on the model beneath."""
    models = mlps(2, 25, 3)
    x = random_images(2, 10, 1, 5, 5)
    outputs = together(models)
    labels = outputs(x).argmax(-1)
    attack = Attack("pgd", "linf", 0.3, steps=10)
    fooled = outputs(perturb_images(outputs, x, labels, attack)).argmax(-1)
    expected = (fooled == labels).double().mean(1)
    torch.testing.assert_close(transfer(outputs, outputs, x, labels, attack), expected)

    def masked(images):
        logits = outputs(images)
        return logits.detach().mul(50).round() + 0 * logits

    assert robustness_curve(masked, x, labels, "linf", [0.3], steps=5).accuracy[-1] > 0.7
    assert transfer(outputs, masked, x, labels, attack).mean() < 0.3
    with torch.no_grad():
        other = together(mlps(2, 25, 3, seed=1))
    assert (transfer(other, outputs, x, labels, attack) >= expected).all()


# ---- bad input


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "cw"}, "kind: 'cw' is not one of fgsm, pgd"),
        ({"norm": "l0"}, "norm: 'l0' is not one of l1, l2, linf"),
        ({"eps": 0.0}, "eps: must be > 0 and finite, got 0.0"),
        ({"eps": float("nan")}, "eps: must be > 0 and finite, got nan"),
        ({"eps": float("inf")}, "eps: must be > 0 and finite, got inf"),
        ({"steps": 0}, "steps: must be at least 1, got 0"),
        ({"step_size": -0.1}, "step_size: must be > 0 and finite, or None .* got -0.1"),
    ],
)
def test_attacks_that_cannot_be_made_are_refused(given, message):
    with pytest.raises(InputError, match=message):
        Attack(**{"kind": "pgd", "norm": "l2", "eps": 1.0, **given})


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("x", "labels", "message"),
    [
        (
            torch.zeros(1, 2, 4).byte(),
            torch.zeros(1, 2).long(),
            "images: need float32 or float64 .* divide bytes by 255",
        ),
        (torch.full((1, 2, 4), 1.5), torch.zeros(1, 2).long(), r"images: must be in \[0, 1\], found 1.5 to 1.5"),
        (torch.full((1, 2, 4), -0.1), torch.zeros(1, 2).long(), r"images: must be in \[0, 1\], found -0.1 to -0.1"),
        (torch.full((1, 2, 4), float("nan")), torch.zeros(1, 2).long(), r"images: must be in \[0, 1\], found nan"),
        (torch.zeros(1, 0, 4), torch.zeros(1, 0).long(), r"images: need some, in shape .* got \(1, 0, 4\)"),
        (torch.zeros(2, 4), torch.zeros(2, 4).long(), r"images: need some, in shape .* got \(2, 4\)"),
        (
            torch.zeros(1, 2, 4),
            torch.zeros(1, 3).long(),
            r"labels: need one for each image, shape \(1, 2\), got .*\(1, 3\)",
        ),
        (
            torch.zeros(1, 2, 4),
            torch.full((1, 2), 4),
            r"labels: must be 0..3, as `outputs` has 4 classes, found 4 to 4",
        ),
        (torch.zeros(1, 2, 4), torch.full((1, 2), -1), r"labels: must be 0..3, .* found -1 to -1"),
    ],
)
def test_images_and_labels_that_cannot_be_attacked_are_refused(x, labels, message):
    def outputs(images):
        return images.flatten(2)

    for call in (
        lambda: perturb_images(outputs, x, labels, Attack("fgsm", "l2", 0.1)),
        lambda: robustness_curve(outputs, x, labels, "l2", [0.1]),
        lambda: transfer(outputs, outputs, x, labels, Attack("fgsm", "l2", 0.1)),
    ):
        with pytest.raises(InputError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (lambda x: x.flatten(1), r"outputs: must give logits of shape \(1, 2, ways\), gave \(1, 8\)"),
        (lambda x: x.transpose(0, 1), r"outputs: must give logits of shape \(1, 2, ways\), gave \(2, 1, 4\)"),
        (lambda x: x.log(), "outputs: gave logits that are not finite"),
        (lambda x: x.detach(), "outputs: its logits have no gradient with respect to the images"),
        (lambda x: torch.zeros(1, 2, 4, requires_grad=True) + 0, "outputs: its logits have no gradient"),
    ],
)
def test_models_that_cannot_be_attacked_are_refused(outputs, message):
    with pytest.raises(InputError, match=message):
        perturb_images(outputs, torch.zeros(1, 2, 4), torch.zeros(1, 2).long(), Attack("pgd", "linf", 0.1))


def test_a_gradient_that_is_not_a_number_is_not_taken_for_robustness():
    """The square root's slope at 0 is infinite, and 0 times infinity is not a number."""
    with pytest.raises(InputError, match=r"outputs: its gradient .* is not finite"):
        perturb_images(
            lambda x: 0 * x.sqrt(), torch.zeros(1, 2, 4), torch.zeros(1, 2).long(), Attack("fgsm", "linf", 0.1)
        )


@pytest.mark.parametrize("radii", [[], [0.0, 1.0], [-1.0], [2.0, 1.0], [1.0, 1.0], [1.0, float("nan")]])
def test_radii_that_do_not_ascend_are_refused(radii):
    with pytest.raises(InputError, match="radii: need some, > 0 and ascending"):
        robustness_curve(lambda x: x, torch.zeros(1, 2, 4), torch.zeros(1, 2).long(), "l1", radii)


@pytest.mark.parametrize("project", [project_l1, project_l2, project_linf])
def test_radii_of_projections_must_be_positive(project):
    with pytest.raises(InputError, match=r"radius: must be > 0, got 0.0"):
        project(torch.zeros(1, 2), 0.0)
