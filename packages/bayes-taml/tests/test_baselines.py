"""What is compared to, against scikit-learn, ``torch.optim`` and formulas written out."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestCentroid
from torch import nn
from torch.nn import functional

from bayes_taml.baselines import fine_tune, inverse_frequency, oversampled, pixel_means, prototype_logits, step_rule
from bayes_taml.engine import Plan, answer
from bayes_taml.methods import METHODS, find_method
from bayes_taml.networks import BatchStatistics, Modulated
from bayes_taml.posterior import Latents
from bayes_taml.ragged import Tasks
from shared_core.errors import UnknownKeyError

COUNTS = ((1, 4, 2), (3, 1, 1))


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def ragged(counts=COUNTS, seed=0):
    random = torch.Generator().manual_seed(seed)
    found = []
    for k, own in enumerate(counts):
        y = torch.arange(len(own)).repeat_interleave(torch.tensor(own))
        y = y[torch.randperm(len(y), generator=random)]
        asked = torch.arange(5 + k).remainder(len(own))
        found.append((torch.randn(len(y), 4, generator=random), y, torch.randn(len(asked), 4, generator=random), asked))
    return found


def padded() -> Tasks:
    """With garbage in the padding."""
    tasks = Tasks.collate(ragged(), 3)
    tasks.support[~tasks.support_mask] = torch.nan
    tasks.query[~tasks.query_mask] = torch.inf
    return tasks


def identity() -> Modulated:
    net = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.eye(4))
    return Modulated(net, (4,))


def normed() -> Modulated:
    torch.manual_seed(0)
    return Modulated(nn.Sequential(nn.Linear(4, 5), BatchStatistics(5), nn.Tanh(), nn.Linear(5, 3)), (4,))


def parameters_of(model):
    return dict(model.backbone.named_parameters())


def test_prototypes_are_nearest_centroids():
    model, tasks = identity(), padded()
    for statistics in ("batch", "support"):
        found = prototype_logits(model, parameters_of(model), tasks, Plan(statistics=statistics))
        for k, (x, y, q, _) in enumerate(ragged()):
            oracle = NearestCentroid().fit(x.numpy(), y.numpy())
            assert np.array_equal(found[k, : len(q)].argmax(1).numpy(), oracle.predict(q.numpy()))
            distance = torch.cdist(q, torch.from_numpy(oracle.centroids_))
            torch.testing.assert_close(found[k, : len(q)].detach(), -distance.square())
    torch.testing.assert_close(pixel_means(tasks)[0, :5], found[0, :5].detach())


@pytest.mark.parametrize("statistics", ["batch", "support"])
def test_prototypes_are_of_features_normalised_over_real_rows(statistics):
    model = normed()
    found = prototype_logits(model, parameters_of(model), padded(), Plan(statistics=statistics))
    first, norm, _, last = model.backbone
    for k, (x, y, q, _) in enumerate(ragged()):
        source = first(q if statistics == "batch" else x)

        def features(rows, by):
            h = (first(rows) - by.mean(0)) / (by.var(0, correction=0) + 1e-3).sqrt() + norm.bias
            return last(h.tanh())

        h = features(x, first(x))
        centre = torch.stack([h[y == c].mean(0) for c in range(3)])
        torch.testing.assert_close(found[k, : len(q)], -torch.cdist(features(q, source), centre).square())


def test_maml_from_prototypes_begins_as_the_prototypes_say():
    """2 c.h - |c|^2 is -|h - c|^2 but for what all classes share."""
    model, tasks = normed(), padded()
    logits, _ = answer(model, parameters_of(model), tasks, Latents(), 0.1, Plan(0, head="proto"))
    wanted = prototype_logits(model, parameters_of(model), tasks, Plan())
    for k, (_, _, q, _) in enumerate(ragged()):
        torch.testing.assert_close(
            functional.softmax(logits[k, 0, : len(q)], 1), functional.softmax(wanted[k, : len(q)], 1).detach()
        )


def test_inverse_frequency_is_one_over_n():
    weight = functional.softmax(inverse_frequency(padded(), torch.float64), 1)
    inverse = 1 / torch.tensor(COUNTS, dtype=torch.float64)
    torch.testing.assert_close(weight, inverse / inverse.sum(1, keepdim=True))
    assert inverse_frequency(padded()).dtype == torch.float32


def test_the_rule_for_steps_grows_with_n_to_one():
    log_kappa = torch.tensor(1.5, requires_grad=True)
    found = step_rule(padded(), log_kappa, 4)
    number = torch.tensor([7.0, 5.0])
    kappa = log_kappa.exp()
    torch.testing.assert_close(found, (number / (number + kappa)).log().unsqueeze(1).expand(2, 4))
    found.sum().backward()
    torch.testing.assert_close(log_kappa.grad, -4 * (kappa / (number + kappa)).sum().detach())


def test_small_classes_are_repeated_until_all_have_as_many():
    tasks = padded()
    found = oversampled(tasks, [3, 4])
    assert found.counts().tolist() == [[4, 4, 4], [3, 3, 3]]
    for k, (x, y, q, yq) in enumerate(ragged()):
        rows, labels = found.support[k, found.support_mask[k]], found.support_labels[k, found.support_mask[k]]
        for c in range(3):
            was = Counter(tuple(r) for r in x[y == c].tolist())
            now = Counter(tuple(r) for r in rows[labels == c].tolist())
            assert now.keys() == was.keys()
            assert all(now[r] >= was[r] for r in was)
        assert torch.equal(found.query[k, found.query_mask[k]], q)
        assert torch.equal(found.query_labels[k, found.query_mask[k]], yq)
    again, other = oversampled(tasks, [3, 4]), oversampled(tasks, [9, 4])
    assert torch.equal(again.support, found.support)
    assert torch.equal(other.support[1], found.support[1])
    assert any(not torch.equal(oversampled(tasks, [s, 4]).support[0], found.support[0]) for s in range(5))


def test_a_balanced_task_is_not_oversampled():
    tasks = Tasks.collate(ragged(((2, 2, 2),)), 3)
    found = oversampled(tasks, [1])
    assert sorted(map(tuple, found.support[0].tolist())) == sorted(map(tuple, tasks.support[0].tolist()))


@pytest.mark.parametrize("statistics", ["batch", "support"])
def test_fine_tuning_a_stack_of_tasks_is_adam_on_each(statistics):
    model, told = normed(), []
    before = [p.clone() for p in model.backbone.parameters()]
    found = fine_tune(model, parameters_of(model), padded(), Plan(statistics=statistics), steps=7, lr=0.05,
                      on_loss=told.append)  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(before, model.backbone.parameters(), strict=True))
    for k, (x, y, q, _) in enumerate(ragged()):
        first, norm, _, last = (m for m in normed().backbone)
        head = nn.Linear(3, 3)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)

        def logits(rows, by=None, first=first, norm=norm, last=last, head=head):
            h, own = first(rows), first(rows if by is None else by)
            h = (h - own.mean(0)) / (own.var(0, correction=0) + 1e-3).sqrt() + norm.bias.detach()
            return head(last(h.tanh()))

        optimizer = torch.optim.Adam([*first.parameters(), *last.parameters(), *head.parameters()], lr=0.05)
        for step in range(7):
            loss = functional.cross_entropy(logits(x), y)
            assert told[step][k].item() == pytest.approx(loss.item(), rel=1e-8)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        wanted = logits(q, x if statistics == "support" else None)
        torch.testing.assert_close(found[k, : len(q)], wanted.detach(), atol=1e-7, rtol=1e-7)


def test_fine_tuning_keeps_the_precision_of_the_network():
    model, tasks = normed(), padded()
    torch.set_default_dtype(torch.float32)
    assert fine_tune(model, parameters_of(model), tasks, Plan(), steps=2).dtype == torch.float64


def test_methods_are_what_their_names_say():
    assert METHODS["bayesian-taml"].balance == ("omega", "gamma", "z")
    assert not METHODS["metasgd"].balance
    assert find_method("maml").alpha == "scalar"
    with pytest.raises(UnknownKeyError, match="no method 'taml'; did you mean"):
        find_method("taml")
