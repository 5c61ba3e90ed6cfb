"""What is measured inside, held against quadrature tables, Monte Carlo, and the learner's own adaptation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from meta_dropout import engine
from meta_dropout.backbones import conv4, mlp
from meta_dropout.diagnose import Trace, boundary_grid, gates, project, softplus_moments, trace
from meta_dropout.engine import Tasks
from meta_dropout.learner import MetaLearner
from meta_dropout.passes import Pass, running
from meta_dropout.toys import GaussianTasks, SineTasks
from shared_core.errors import InputError

TASKS = GaussianTasks(ways=3, shots=2, queries=4, signal=2, nuisance=2)
PLANE = GaussianTasks(ways=3, shots=2, queries=4, signal=1, nuisance=1)


def learner(method="meta-dropout", **options) -> MetaLearner:
    plain = {"inner_lr": 0.3, "inner_steps": 3, "test_samples": 2}
    return MetaLearner(mlp(inputs=4, outputs=3, hidden=(8,)), method, **{**plain, **options})


def images(method="meta-dropout", **options) -> MetaLearner:
    return MetaLearner(conv4(ways=3, size=8, filters=4, blocks=2), method, inner_steps=2, test_samples=2, **options)


def task(source=TASKS) -> Tasks:
    return source.batch(0, 1)


def traced(made: MetaLearner, **options) -> Trace:
    tasks = task()
    return trace(
        made,
        tasks.support[0],
        tasks.support_labels[0],
        tasks.query[0],
        **{"query_labels": tasks.query_labels[0], "noisy": 4, **options},
    )


# Specification, section 2.2.
@pytest.mark.parametrize(
    ("mean", "first", "sd", "relative"),
    [
        (-4.0, 0.029096, 0.035199, 1.2097),
        (-2.0, 0.182737, 0.177684, 0.9723),
        (0.0, 0.806059, 0.521071, 0.6464),
        (2.0, 2.182737, 0.848909, 0.3889),
        (4.0, 4.029096, 0.972127, 0.2413),
    ],
)
def test_moments_agree_with_the_table(mean, first, sd, relative):
    found = [float(v) for v in softplus_moments(torch.tensor(mean))]
    assert found == pytest.approx([first, sd], abs=1e-6)
    assert found[1] / found[0] == pytest.approx(relative, abs=5e-5)


@pytest.mark.parametrize("sd", [0.5, 1.0, 2.0])
def test_moments_agree_with_a_fine_sum_over_the_line(sd):
    """The trapezoid rule on 4001 points is exact to rounding for such a function."""
    mean = torch.linspace(-12, 12, 13, dtype=torch.float64)
    at = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    weight = torch.exp(-at.square() / 2)
    weight /= weight.sum()
    values = functional.softplus(mean[:, None] + sd * at, threshold=50)
    first = values @ weight
    spread = ((values - first[:, None]).square() @ weight).sqrt()
    found = softplus_moments(mean, sd)
    torch.testing.assert_close(found[0], first, rtol=0, atol=1e-8)
    torch.testing.assert_close(found[1], spread, rtol=0, atol=1e-8)


def test_extreme_means_have_their_limits():
    """Far below 0 the factor is log-normal, far above it is normal."""
    first, sd = softplus_moments(torch.tensor([-30.0, 500.0]))
    assert float(sd[0] / first[0]) == pytest.approx(math.sqrt(math.e - 1), rel=1e-6)
    assert [float(first[1]), float(sd[1])] == pytest.approx([500.0, 1.0], rel=1e-9)


@pytest.mark.parametrize("method", ["meta-dropout", "learned-variance", "independent", "fixed"])
def test_gates_are_the_moments_of_the_factor_that_layers_apply(method):
    """Monte Carlo through the layer itself: what comes out over what the main path gives."""
    made = learner(method)
    with torch.no_grad():
        for p in made.model.role("phi").values():
            p += 0.5 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    x = task().support[0]
    gate = gates(made, x)["0"]
    layer = made.model.module.get_submodule("0")
    draws = torch.randn((40_000, *gate.mean.shape), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        main = layer.main(x)
        with running(Pass(noise={"0": draws})):
            seen = (layer(x) / main).double().numpy()
        np.testing.assert_allclose(gate.plugin, (layer(x) / main).numpy(), rtol=1e-4)
    assert gate.kind == "factor"
    error = seen.std(0) / np.sqrt(len(draws))
    assert (np.abs(seen.mean(0) - gate.mean) < 5 * error + 1e-4).all()
    np.testing.assert_allclose(seen.std(0) / seen.mean(0), gate.relative_sd, rtol=0.05)


def test_gates_have_the_shape_of_the_layers_output_and_the_head_a_value_a_row():
    made, x = images(), torch.rand(5, 1, 8, 8)
    found = gates(made, x)
    assert {site: gate.mean.shape for site, gate in found.items()} == {
        "0": (5, 4, 8, 8),
        "4": (5, 4, 4, 4),
        "9": (5,),
    }
    assert [gate.kind for gate in found.values()] == ["factor", "factor", "added"]
    inputs: dict[str, torch.Tensor] = {}
    made.model.call(dict(made.model.named_parameters()), x, Pass(inputs=inputs))
    scale = functional.softplus(made.model.module.get_submodule("9").generator(inputs["9"]))[:, 0]
    np.testing.assert_allclose(found["9"].plugin, scale.detach().numpy(), rtol=1e-6)


def test_gates_of_a_task_see_its_own_features():
    made, tasks = learner(inner_lr=1.0), task()
    model = made.adapt(tasks.support[0], tasks.support_labels[0], spread=0)
    before = gates(made, tasks.support[0])
    after = gates(made, tasks.support[0], parameters=model.parameters_by_name())
    np.testing.assert_array_equal(before["0"].mean, after["0"].mean)
    assert not np.allclose(before["2"].mean, after["2"].mean)


@pytest.mark.parametrize(("method", "sites"), [("maml", 0), ("vib", 0), ("dropout", 0), ("deterministic", 1)])
def test_methods_without_noise_have_gates_without_spread_or_none(method, sites):
    found = gates(learner(method), task().support[0])
    assert len(found) == sites
    for gate in found.values():
        assert (gate.relative_sd == 0).all()
        np.testing.assert_array_equal(gate.mean, gate.plugin)


def test_additive_noise_is_told_apart_from_factors():
    assert [gate.kind for gate in gates(learner("additive"), task().support[0]).values()] == ["added", "added"]


@pytest.mark.parametrize("statistics", ["batch", "support"])
@pytest.mark.parametrize(
    "method", ["meta-dropout", "maml", "mixup", "manifold-mixup", "metasgd", "anil", "independent", "more-params"]
)
def test_a_trace_ends_where_the_learners_own_adaptation_does(method, statistics):
    made, tasks = learner(method, statistics=statistics), task()
    found = traced(made, seed=5)
    adapted = made.adapted(tasks, [5]).parameters
    values = {name: p.detach() for name, p in made.model.named_parameters()}
    values |= {name: value[0] for name, value in adapted.items()}
    inputs: dict[str, torch.Tensor] = {}
    made.model.call(values, tasks.query[0], Pass(inputs=inputs))
    np.testing.assert_array_equal(found.query[-1], inputs["2"].detach().double().numpy())
    logits = engine.query(
        made.model,
        {name: p.detach() for name, p in made.model.named_parameters()},
        engine.Adapted(adapted, torch.zeros(0, 1)),
        tasks.support,
        tasks.query,
        made.plan,
    )[0]
    np.testing.assert_allclose(found.query[-1] @ found.weight[-1].T + found.bias[-1], logits.detach(), atol=1e-5)
    assert found.support.shape == (4, 6, 8)
    noisy = method in {"meta-dropout", "independent"}
    assert found.noisy.shape == (4, 4 if noisy else 0, 6, 8)


@pytest.mark.parametrize("statistics", ["batch", "support"])
def test_queries_of_a_trace_are_normalised_as_the_plan_says(statistics):
    made = images(statistics=statistics)
    x, y, q = torch.rand(3, 1, 8, 8), torch.arange(3), torch.rand(6, 1, 8, 8)
    found = trace(made, x, y, q, noisy=2, seed=1)
    tasks = Tasks(x[None], y[None], q[None], torch.zeros(1, 6, dtype=torch.int64))
    logits = made.outputs(tasks, [1])[0]
    np.testing.assert_allclose(found.query[-1] @ found.weight[-1].T + found.bias[-1], logits, atol=1e-5)
    assert found.query_labels is None


def test_a_trace_starts_before_any_step_and_leaves_the_learner_alone():
    made = learner()
    before = {name: p.detach().clone() for name, p in made.parameters().items()}
    found = traced(made)
    head = made.model.module.get_submodule("2").main
    np.testing.assert_array_equal(found.weight[0], head.weight.detach().double().numpy())
    assert all(torch.equal(before[name], p) for name, p in made.parameters().items())
    assert not head._forward_pre_hooks
    again = traced(made)
    for name in ("support", "noisy", "query", "weight", "bias"):
        np.testing.assert_array_equal(getattr(found, name), getattr(again, name))
    assert not np.array_equal(traced(made, seed=1).noisy, found.noisy)


def test_noisy_passes_are_those_of_the_layers_and_differ():
    found = traced(learner(), noisy=30)
    # Factors are positive, so that ReLU passes the same units.
    np.testing.assert_array_equal(found.noisy[0] > 0, np.broadcast_to(found.support[0] > 0, found.noisy[0].shape))
    assert (found.noisy.std(1).max((1, 2)) > 0).all()


def test_a_head_of_another_width_is_traced_as_it_is_adapted():
    made, source = learner(), GaussianTasks(ways=5, queries=2, signal=2, nuisance=2)
    tasks = source.batch(0, 1)
    found = trace(made, tasks.support[0], tasks.support_labels[0], tasks.query[0], seed=2)
    logits = made.adapt(tasks.support[0], tasks.support_labels[0], spread=0, seed=2)(tasks.query[0]).detach()
    np.testing.assert_allclose(found.query[-1] @ found.weight[-1].T + found.bias[-1], logits, rtol=1e-5, atol=1e-5)


def test_a_head_without_noise_is_traced_too():
    made = MetaLearner(mlp(inputs=4, outputs=3, hidden=(8,)), inner_steps=1, test_samples=1, sites=["0"])
    assert traced(made).support.shape == (2, 6, 8)


def test_signed_distances_are_the_differences_of_logits():
    """``(w_a - w_b) . h + b_a - b_b = |w_a - w_b| x``."""
    found, a, b = traced(learner()), 2, 0
    panels = project(found, a, b)
    assert [panel.step for panel in panels] == [0, 1, 2, 3]
    for step, panel in enumerate(panels):
        across = found.weight[step, a] - found.weight[step, b]
        shift = found.bias[step, a] - found.bias[step, b]
        rows = np.isin(found.labels, (a, b))
        asked = np.isin(found.query_labels, (a, b))
        for points, features in (
            (panel.support, found.support[step][rows]),
            (panel.noisy, found.noisy[step][:, rows]),
            (panel.query, found.query[step][asked]),
        ):
            np.testing.assert_allclose(np.linalg.norm(across) * points[..., 0], features @ across + shift, atol=1e-10)
        assert panel.labels.tolist() == [0, 0, 2, 2]
        assert panel.query_labels.tolist() == [0] * 4 + [2] * 4


def test_the_other_axis_is_the_largest_variance_beside_the_normal():
    found = traced(learner())
    for step, panel in enumerate(project(found, 0, 1)):
        across = found.weight[step, 0] - found.weight[step, 1]
        normal = across / np.linalg.norm(across)
        rows, asked = np.isin(found.labels, (0, 1)), np.isin(found.query_labels, (0, 1))
        parts = (found.support[step][rows], found.noisy[step][:, rows], found.query[step][asked])
        whole = np.concatenate([part.reshape(-1, 8) for part in parts])
        rest = whole @ (np.eye(8) - np.outer(normal, normal))
        seen = np.concatenate([part[..., 1].ravel() for part in (panel.support, panel.noisy, panel.query)])
        assert seen.var() == pytest.approx(np.linalg.eigvalsh(np.cov(rest.T, bias=True))[-1])


def test_swapping_the_classes_mirrors_the_picture():
    found = traced(learner())
    for one, other in zip(project(found, 0, 1), project(found, 1, 0), strict=True):
        np.testing.assert_allclose(one.query[:, 0], -other.query[:, 0], atol=1e-12)


def test_all_queries_are_shown_where_their_classes_are_not_known():
    panel = project(traced(learner(), query_labels=None), 0, 1)[0]
    assert panel.query.shape == (12, 2)
    assert panel.query_labels is None


def test_a_grid_holds_what_the_adapted_model_says():
    made = MetaLearner(mlp(inputs=2, outputs=3, hidden=(8,)), inner_steps=2, test_samples=2)
    tasks = task(PLANE)
    x, y = tasks.support[0], tasks.support_labels[0]
    plane = boundary_grid(made, x, y, extent=(-1.0, 3.0, -2.0, 2.0), resolution=5, seed=3)
    assert plane.probability.shape == (3, 5, 5, 3)
    np.testing.assert_allclose(plane.probability.sum(-1), 1)
    for steps in (0, 2):
        model = made.adapt(x, y, spread=0, seed=3, steps=steps)
        point = torch.tensor([[plane.x[1], plane.y[3]]], dtype=torch.float32)
        np.testing.assert_allclose(plane.probability[steps, 3, 1], model.predict(point).probability[0], atol=1e-6)
    wide = boundary_grid(made, x, y, steps=0)
    assert len(wide.probability) == 1
    assert wide.x[0] < float(x[:, 0].min())
    assert wide.y[-1] > float(x[:, 1].max())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: project(traced(learner()), 0, 3), r"b: must be a class 0\.\.2, got 3"),
        (lambda: project(traced(learner()), 1, 1), "between two classes"),
        (lambda: traced(learner(), noisy=-1), "noisy: must be at least 0"),
        (lambda: traced(learner(), steps=-1), "steps: must be at least 0"),
        (lambda: traced(learner(), query_labels=torch.zeros(2, dtype=torch.int64)), "query_labels: need one"),
        (lambda: gates(learner(), torch.full((2, 4), torch.nan)), "x: holds NaN"),
        (lambda: boundary_grid(learner(), torch.zeros(3, 4), torch.arange(3)), "points in the plane"),
        (lambda: boundary_grid(learner(), torch.zeros(3, 2), torch.arange(3), resolution=1), "resolution"),
    ],
)
def test_what_cannot_be_done_is_said(call, words, unchecked):
    with pytest.raises(InputError, match=words):
        call()


def test_a_regression_has_no_boundary():
    made = MetaLearner(mlp(inputs=1, outputs=1), task="regression")
    tasks = SineTasks(shots=4).batch(0, 1)
    with pytest.raises(InputError, match="regression"):
        trace(made, tasks.support[0], torch.zeros(4, dtype=torch.int64), tasks.query[0])


def test_equal_weights_have_no_boundary():
    made = learner("maml", inner_steps=0)
    nn.init.zeros_(made.model.module.get_submodule("2").main.weight)
    with pytest.raises(InputError, match="no boundary"):
        project(traced(made), 0, 1)
