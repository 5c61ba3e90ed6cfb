"""The inference network: symmetries, counts of parameters, and its pooling against numpy and scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from bayes_taml.encoder import (
    STATISTICS,
    ConvEmbedding,
    InferenceNetwork,
    PackedSupport,
    VectorEmbedding,
    pool_statistics,
    relative_count,
)
from shared_core.errors import InputError

VARIABLES = ("omega", "gamma", "z")


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def network(**options) -> InferenceNetwork:
    """One whose weights are large enough for differences to show."""
    made = InferenceNetwork(VectorEmbedding(3), **{"layers": 4, "modulated": 6, "max_shot": 10, **options})
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=random))
    return made


def packed(counts=((1, 4, 2), (3, 3, 5)), seed=0) -> PackedSupport:
    random = torch.Generator().manual_seed(seed)
    labels = [torch.arange(len(c)).repeat_interleave(torch.tensor(c)) for c in counts]
    task = torch.arange(len(counts)).repeat_interleave(torch.tensor([len(v) for v in labels]))
    rows = torch.randn(len(task), 3, generator=random)
    return PackedSupport(rows, torch.cat(labels), task, len(counts), len(counts[0]))


def same(a, b, *, names=VARIABLES, way=slice(None)) -> bool:
    def alike(x, y):
        return torch.allclose(x, y, atol=1e-10, rtol=1e-10)

    return all(
        alike(getattr(a, part)[name][:, way] if name == "omega" else getattr(a, part)[name], getattr(b, part)[name])
        for name in names
        for part in ("mean", "raw")
    )


def slow_pool(rows, segment, segments, size, names):
    found = np.zeros((segments, rows.shape[1], len(names)))
    for s in range(segments):
        own = rows[segment == s]
        for k, name in enumerate(names):
            found[s, :, k] = {
                "mean": lambda own: own.mean(0),
                "var": lambda own: own.var(0),
                "n": lambda own, s=s: size[s],
                "skew": lambda own: stats.skew(own, axis=0),
                "kurt": lambda own: stats.kurtosis(own, axis=0, fisher=False),
            }[name](own)
    return found


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(2, 7), min_size=1, max_size=5), st.permutations(STATISTICS), st.integers(1, 5))
def test_pooling_is_a_loop_over_sets(sizes, names, taken):
    names = tuple(names[:taken])
    random = np.random.default_rng(sum(sizes))
    segment = random.permutation(np.repeat(np.arange(len(sizes)), sizes))
    rows, size = random.normal(2, 3, (len(segment), 4)), random.random(len(sizes))
    found = pool_statistics(*map(torch.from_numpy, (rows, segment)), len(sizes), torch.from_numpy(size), names)
    np.testing.assert_allclose(found.numpy(), slow_pool(rows, segment, len(sizes), size, names), atol=1e-9)


def test_the_variance_is_by_two_passes():
    rows = torch.tensor([[1e9], [1e9 + 1], [1e9 + 2]])
    found = pool_statistics(rows, torch.zeros(3, dtype=torch.int64), 1, torch.zeros(1), ("var",))
    assert found.item() == pytest.approx(2 / 3)


def test_cardinality_is_relative_to_the_most_shots_of_training():
    counts = torch.tensor([[1, 50, 26, 99]])
    torch.testing.assert_close(relative_count(counts, 50), torch.tensor([[0.0, 1.0, 25 / 49, 2.0]]))
    assert torch.equal(relative_count(counts, 1), torch.zeros(1, 4))
    assert torch.equal(packed().counts(), torch.tensor([[1, 4, 2], [3, 3, 5]]))


@pytest.mark.parametrize(("side", "count"), [(32, 146_290), (84, 387_570)])
def test_it_has_as_many_parameters_as_the_authors(side, count):
    made = InferenceNetwork(ConvEmbedding(3, side, side), layers=5, modulated=256)
    assert sum(p.numel() for p in made.parameters()) == count


def test_it_starts_as_the_authors_does():
    made = InferenceNetwork(ConvEmbedding(3, 32, 32), layers=5, modulated=256, seed=3)
    for name, p in made.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif p.dim() == 4:
            assert p.abs().max() <= 0.04
        elif p.numel() > 1000:
            assert p.std().item() == pytest.approx(0.02, rel=0.1)
    again = InferenceNetwork(ConvEmbedding(3, 32, 32), layers=5, modulated=256, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), again.parameters(), strict=True))
    other = InferenceNetwork(ConvEmbedding(3, 32, 32), layers=5, modulated=256, seed=4)
    assert not torch.equal(made.embed.first.weight, other.embed.first.weight)


@pytest.mark.parametrize(("options", "wanted"), [({}, np.log(2)), ({"deviation": 0.05}, 0.05)])
def test_deviations_start_where_they_are_told_to(options, wanted):
    made = InferenceNetwork(VectorEmbedding(3), layers=4, modulated=6, **options)
    for name, value in made(packed()).deviation.items():
        np.testing.assert_allclose(value.detach(), wanted, rtol=0.02, err_msg=name)


def test_the_image_reader_is_the_papers():
    """ReLU, then pooling; written out."""
    made = ConvEmbedding(2, 9, 8)
    x = torch.randn(3, 2, 9, 8)
    h = x
    for layer in (made.first, made.second):
        h = nn.functional.max_pool2d(nn.functional.conv2d(h, layer.weight, layer.bias, padding=1).relu(), 2)
    torch.testing.assert_close(made(x), made.last(h.flatten(1)))
    with pytest.raises(InputError, match="at least 4 pixels, got 3 x 9"):
        ConvEmbedding(1, 3, 9)


def test_it_is_sets_of_sets_written_out_for_one_task():
    made, support = network(), packed(((2, 3),))
    with torch.no_grad():
        h = made.embed(support.rows)
        per_class = []
        for c, n in enumerate((2, 3)):
            own = h[support.labels == c]
            pooled = torch.stack([own.mean(0), own.var(0, correction=0), torch.full((64,), (n - 1) / 9)], 1)
            per_class.append(made.class_mix(pooled).relu().flatten())
        s = torch.stack(per_class)
        v = made.per_class(s)
        pooled = torch.stack([v.mean(0), v.var(0, correction=0), torch.full((32,), (1 / 9 + 2 / 9) / 2)], 1)
        whole = made.task_mix(pooled).relu().flatten()
        found = made(support)
        torch.testing.assert_close(found.mean["omega"][0], made.omega.mean(made.omega.hidden(s).relu()).squeeze(1))
        torch.testing.assert_close(found.raw["gamma"][0], made.gamma.raw(made.gamma.hidden(whole).relu()))
        torch.testing.assert_close(found.mean["z"][0], made.z.mean(made.z.hidden(whole).relu()))


@pytest.mark.parametrize("statistics", [("mean", "var", "n"), STATISTICS])
def test_the_order_of_instances_does_not_matter(statistics):
    made, support = network(statistics=statistics), packed()
    order = torch.randperm(len(support.task), generator=torch.Generator().manual_seed(1))
    mixed = PackedSupport(support.rows[order], support.labels[order], support.task[order], 2, 3)
    assert same(made(support), made(mixed))


def test_class_weights_follow_their_classes_and_the_rest_does_not_mind():
    made, support = network(), packed()
    new = torch.tensor([2, 0, 1])
    moved = PackedSupport(support.rows, new[support.labels], support.task, 2, 3)
    assert same(made(moved), made(support), way=new)
    assert not torch.allclose(made(moved).mean["omega"], made(support).mean["omega"])


def test_tasks_are_read_apart():
    made, support = network(), packed()
    alone = packed().task == 1
    single = PackedSupport(support.rows[alone], support.labels[alone], support.task[alone] - 1, 1, 3)
    both, one = made(support), made(single)
    for name in VARIABLES:
        torch.testing.assert_close(both.mean[name][1:], one.mean[name])
        assert not torch.allclose(both.mean[name][:1], one.mean[name])


def doubled(support: PackedSupport, only: int | None = None) -> PackedSupport:
    """Every row twice, or those of one class."""
    times = torch.ones_like(support.labels) + (1 if only is None else (support.labels == only).long())
    if only is None:
        times = torch.full_like(support.labels, 2)
    return PackedSupport(
        *(v.repeat_interleave(times, 0) for v in (support.rows, support.labels, support.task)), support.tasks, 3
    )


@pytest.mark.parametrize("only", [None, 1])
def test_only_the_cardinality_tells_a_set_from_its_copies(only):
    """Mean, variance, skewness and kurtosis of a set are those of the set taken twice."""
    support = packed()
    blind = network(statistics=("mean", "var", "skew", "kurt"))
    assert same(blind(support), blind(doubled(support, only)))
    seeing = network()
    for name in VARIABLES:
        gap = seeing(support).mean[name] - seeing(doubled(support, only)).mean[name]
        assert (gap.abs().amax(1) > 1e-3).all(), name


def test_cardinalities_can_be_changed_for_studies():
    made, support = network(), packed()
    assert same(made(support, lambda counts: counts), made(support))
    told = made(support, lambda counts: 2 * counts)
    assert same(told, made(doubled(support)))


@pytest.mark.parametrize("statistics", [("mean", "var", "n"), STATISTICS])
def test_one_example_of_a_class_gives_finite_values_and_gradients(statistics):
    made, support = network(statistics=statistics, max_shot=1), packed(((1, 1, 1), (1, 2, 1)))
    support.rows.requires_grad_()
    found = made(support)
    found.kl().sum().backward()
    assert torch.isfinite(found.kl()).all()
    assert torch.isfinite(support.rows.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in made.parameters())


@pytest.mark.parametrize("names", [("omega",), ("z", "gamma"), ("gamma",)])
def test_variables_that_are_off_cost_nothing(names):
    made = network(variables=names)
    found = made(packed())
    assert set(found.mean) == set(found.raw) == set(names)
    found.kl().sum().backward()
    assert all(p.grad is not None for p in made.parameters())
    assert (made.per_class is None) == (names == ("omega",))


def test_class_weights_can_be_read_straight_from_the_statistics():
    made = network(direct_omega=True)
    assert made.omega.hidden is None
    assert made.omega.mean.in_features == 256
    assert made(packed()).mean["omega"].shape == (2, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"statistics": ()}, "statistics: some of mean, var, n, skew, kurt"),
        ({"statistics": ("mean", "median")}, "got mean, median"),
        ({"statistics": ("mean", "mean")}, "each once"),
        ({"variables": ()}, "balance: some of omega, gamma, z; got none"),
        ({"variables": ("phi",)}, "got phi"),
        ({"deviation": 0.0}, "deviation: must be > 0, got 0.0"),
        ({"max_shot": 0}, "max_shot: must be at least 1, got 0"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        network(**options)
