"""Training, adapting, evaluating, saving: what must hold whatever is learned."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from bayes_taml.engine import Compat
from bayes_taml.learner import (
    CheckpointError,
    ExtrapolationWarning,
    MetaLearner,
    RangeWarning,
    _seed,
)
from bayes_taml.methods import METHODS, Method
from bayes_taml.networks import BatchStatistics, conv_features, mlp_features
from bayes_taml.ragged import EmptyClassError, NeedTwoClassesError, Tasks
from shared_core.device import World
from shared_core.errors import InputError
from shared_core.runs import load_tree, save_tree

TRAINED = [name for name in METHODS if name != "scratch"]
NETWORK = {"kind": "mlp", "inputs": 4, "hidden": [6, 5]}


class Blobs:
    """Classes around points of their own, as many examples of each as there happen to be."""

    def __init__(self, ways=3, queries=4, most=5, seed=0, noise=0.5, shape=(4,), ragged_queries=False, signal=None):
        self.ways, self.queries, self.most, self.seed, self.signal = ways, queries, most, seed, signal
        self.noise, self.shape, self.ragged = noise, shape, ragged_queries

    def one(self, number):
        random = torch.Generator().manual_seed(1000 * self.seed + number)
        centre = torch.randn(self.ways, *self.shape, generator=random)
        if self.signal is not None:
            centre[:, self.signal :] = 0
        counts = torch.randint(1, self.most + 1, (self.ways,), generator=random)
        y = torch.arange(self.ways).repeat_interleave(counts)
        y = y[torch.randperm(len(y), generator=random)]
        yq = torch.arange(self.ways).repeat(self.queries + (number % 3 if self.ragged else 0))
        x, q = (centre[v] + self.noise * torch.randn(len(v), *self.shape, generator=random) for v in (y, yq))
        return x, y, q, yq

    def batch(self, number, count) -> Tasks:
        return Tasks.collate([self.one(number * count + k) for k in range(count)], self.ways)


TASKS = Blobs()


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def learner(method="bayesian-taml", backbone=None, **options) -> MetaLearner:
    plain = {"input_shape": (4,), "inner_lr": 0.1, "inner_steps": 2, "test_steps": 3, "samples": 3, "max_shot": 5}
    backbone = mlp_features(inputs=4, hidden=(6, 5)) if backbone is None else backbone
    return MetaLearner(backbone, method, **{**plain, **options})


def pictures(method="bayesian-taml", norm="batch", **options) -> MetaLearner:
    net = conv_features(size=8, filters=3, blocks=2, norm=norm, init="kaiming")
    return learner(method, net, input_shape=(1, 8, 8), **options)


def shaken(made: MetaLearner, size=0.7, seed=5) -> MetaLearner:
    """No parameter at a value where it would not show."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in made.parameters().items():
            if name.startswith("rate"):
                p.mul_(0.5 + torch.rand(p.shape, generator=random))
            else:
                p.add_(size * torch.randn(p.shape, generator=random) / max(1, p[:1].numel() if p.dim() else 1) ** 0.5)
    return made


def values(made: MetaLearner) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in made.parameters().items()}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- the objective


def smooth() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), BatchStatistics(5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh())


@pytest.mark.parametrize(
    ("method", "statistics"),
    [("bayesian-taml", "batch"), ("bayesian-taml", "support"), ("deterministic-taml", "batch"), ("gamma-rule", "batch"),
     ("metasgd-inverse", "support"), ("maml-oversampled", "batch"), ("protomaml", "batch"), ("protonet", "batch"),
     ("protonet", "support")],
)  # fmt: skip
def test_gradients_of_the_objective_are_finite_differences(method, statistics, double):
    """Mean over tasks of query cross-entropy and divergence over N + M, of everything that is learned."""
    made, tasks, seeds = shaken(learner(method, smooth(), statistics=statistics)), TASKS.batch(0, 3), [4, 5, 6]
    gradients, loss, right, kl = made.meta_step(tasks, seeds)
    assert gradients.keys() == made.parameters().keys()
    sampled = int(METHODS[method].bayes and bool(METHODS[method].balance))

    def objective():
        found, _, _ = made.probabilities(tasks, seeds, samples=sampled, steps=2)
        each = [functional.nll_loss(found[k].log(), tasks.query_labels[k]) for k in range(3)]
        cost = torch.zeros(3)
        if sampled:
            with torch.no_grad():
                cost = made.posterior(tasks).kl()
        number = tasks.support_mask.sum(1) + tasks.query_mask.sum(1)
        return torch.stack(each), cost, (torch.stack(each) + cost / number).mean().item(), found

    each, cost, _, found = objective()
    torch.testing.assert_close(loss, each, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(kl, cost, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(right, (found.argmax(2) == tasks.query_labels).double().mean(1))
    random, leaves = torch.Generator().manual_seed(0), made.parameters()
    groups = {"theta": list(made.model.theta), "norm": ["1.bias"], "rate": [], "inference": [], "log_kappa": []}
    for name in leaves:
        if (first := name.split(".")[0]) in groups:
            groups[first].append(name)
    tried = 0
    for group, members in groups.items():
        if not members:
            continue
        shift = {name: torch.randn(leaves[name].shape, generator=random) for name in members}
        slope = sum((gradients[name] * shift[name]).sum().item() for name in members)
        ends = []
        # Short enough to cross hardly any kink of the encoder's.
        for step in (1e-6, -2e-6):
            with torch.no_grad():
                for name in members:
                    leaves[name].add_(step * shift[name])
            ends.append(objective()[2])
        with torch.no_grad():
            for name in members:
                leaves[name].add_(1e-6 * shift[name])
        assert slope == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5, abs=1e-9), group
        assert abs(slope) > 1e-7
        tried += 1
    assert tried == {"gamma-rule": 4, "protomaml": 2, "protonet": 2, "maml-oversampled": 2, "metasgd-inverse": 3}.get(
        method, 4
    )


@pytest.mark.parametrize("padded_n", [False, True])
def test_the_divergence_is_shared_by_support_and_query_rows(padded_n, double):
    """Without inner steps nothing else reaches the inference network."""
    made = shaken(learner(inner_steps=0, compat=Compat(padded_n=padded_n)))
    tasks = Blobs(ragged_queries=True).batch(0, 3)
    gradients, loss, _, kl = made.meta_step(tasks, [1, 2, 3])
    assert torch.allclose(loss, torch.tensor(3.0).log())
    number = tasks.query_mask.sum(1) + (tasks.support.shape[1] if padded_n else tasks.support_mask.sum(1))
    own = made.posterior(tasks).kl()
    torch.testing.assert_close(kl, own.detach())
    leaves = dict(made.inference.named_parameters())
    wanted = torch.autograd.grad((own / number).mean(), list(leaves.values()))
    for name, gradient in zip(leaves, wanted, strict=True):
        torch.testing.assert_close(gradients[f"inference.{name}"], gradient)


def scattered(tasks: Tasks, extra=100) -> Tasks:
    """The real rows in their order, between rows of garbage."""
    random, parts = torch.Generator().manual_seed(1), {}
    garbage = torch.tensor([torch.nan, 1e30, -torch.inf, 0.0])
    for what, more in (("support", extra), ("query", 5)):
        x, labels, mask = (getattr(tasks, what + end) for end in ("", "_labels", "_mask"))
        count, length = len(x), x.shape[1] + more
        rows = garbage[torch.randint(4, (count, length, *x.shape[2:]), generator=random)].to(x.dtype)
        names, real = (
            torch.randint(-9, 9, (count, length), generator=random),
            torch.zeros(count, length, dtype=torch.bool),
        )
        for k in range(count):
            at = torch.randperm(length, generator=random)[: int(mask[k].sum())].sort().values
            rows[k, at], names[k, at], real[k, at] = x[k, mask[k]], labels[k, mask[k]], True
        parts |= {what: rows, f"{what}_labels": names, f"{what}_mask": real}
    return Tasks(**parts, ways=tasks.ways)


@pytest.mark.parametrize(
    ("method", "encoder"),
    [("bayesian-taml", "conv"), ("bayesian-taml", "mlp"), ("bayesian-taml", "features"), ("gamma-rule", "auto"),
     ("metasgd-inverse", "auto"), ("maml-oversampled", "auto"), ("protonet", "auto"), ("protomaml", "auto")],
)  # fmt: skip
def test_padding_changes_nothing(method, encoder, double):
    made = shaken(pictures(method, encoder=encoder))
    tasks = Blobs(shape=(1, 8, 8), ragged_queries=True).batch(0, 3)
    padded, seeds = scattered(tasks), [7, 8, 9]
    plain, found = made.meta_step(tasks, seeds), made.meta_step(padded, seeds)
    for name in plain[0]:
        torch.testing.assert_close(found[0][name], plain[0][name], atol=1e-9, rtol=1e-9, msg=name)
    for a, b in zip(found[1:], plain[1:], strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0)
    if made.inference is not None:
        a, b = made.posterior(padded), made.posterior(tasks)
        for name in ("omega", "gamma", "z"):
            torch.testing.assert_close(a.mean[name], b.mean[name], atol=1e-9, rtol=0)
            torch.testing.assert_close(a.raw[name], b.raw[name], atol=1e-9, rtol=0)
    wide, narrow = (made.probabilities(t, seeds, samples=2)[0] for t in (padded, tasks))
    for k in range(3):
        if method == "maml-oversampled":
            torch.testing.assert_close(wide[k], narrow[k], atol=1e-9, rtol=0)
        else:
            torch.testing.assert_close(wide[k, padded.query_mask[k]], narrow[k, tasks.query_mask[k]], atol=1e-9, rtol=0)


@pytest.mark.parametrize("backend", ["loop", "vmap", "auto"])
def test_a_batch_is_the_mean_of_its_tasks(backend, double):
    made, tasks, seeds = shaken(learner(backend=backend)), TASKS.batch(0, 4), [3, 4, 5, 6]
    whole = made.meta_step(tasks, seeds)
    each = [made.meta_step(tasks.part(k, 1), seeds[k : k + 1]) for k in range(4)]
    for name, gradient in whole[0].items():
        torch.testing.assert_close(gradient, sum(e[0][name] for e in each) / 4, atol=1e-12, rtol=1e-8)
    torch.testing.assert_close(whole[1], torch.cat([e[1] for e in each]))


def test_at_the_prior_it_is_meta_sgd(double):
    """An inference network that says nothing: the same answers, and the same gradients at the means."""
    plain, made = shaken(pictures("metasgd")), shaken(pictures("deterministic-taml"))
    with torch.no_grad():
        for p in made.inference.parameters():
            p.zero_()
        for name, p in plain.parameters().items():
            made.parameters()[name].copy_(p)
    tasks = Blobs(shape=(1, 8, 8)).batch(0, 3)
    a, b = made.meta_step(tasks, [1, 2, 3]), plain.meta_step(tasks, [1, 2, 3])
    for name, gradient in b[0].items():
        torch.testing.assert_close(a[0][name], gradient, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(made.probabilities(tasks, [1, 2, 3])[0], plain.probabilities(tasks, [1, 2, 3])[0])


@pytest.mark.parametrize("method", ["bayesian-taml", "metasgd-inverse", "gamma-rule", "protomaml", "protonet"])
def test_names_of_classes_do_not_matter(method, double):
    made, tasks, new = shaken(pictures(method)), Blobs(shape=(1, 8, 8)).batch(0, 3), torch.tensor([2, 0, 1])
    moved = replace(tasks, support_labels=new[tasks.support_labels], query_labels=new[tasks.query_labels])
    a, b = (made.probabilities(t, [1, 2, 3], samples=0)[0] for t in (tasks, moved))
    torch.testing.assert_close(b[..., new], a, atol=1e-9, rtol=0)
    assert (a - b).abs().max() > 1e-3


# ---- training


@pytest.mark.parametrize("method", TRAINED)
def test_every_method_trains_adapts_and_survives_the_disk(method, tmp_path):
    made = learner(method)
    before = values(made)
    history = made.fit(TASKS, steps=2, meta_batch=3)
    after = values(made)
    assert [s.step for s in history] == [1, 2]
    assert all(torch.isfinite(value).all() for value in after.values())
    # A bias may shift all classes alike, and deviations count only where they are sampled.
    still = {n for n in after if torch.equal(before[n], after[n])}
    assert all("bias" in n or (".raw." in n and not METHODS[method].bayes) for n in still)
    x, y, q, _ = TASKS.one(9)
    answer = made.adapt(x, y).predict_proba(q)
    np.testing.assert_allclose(answer.sum(1), 1, rtol=1e-5)
    spread = made.adapt(x, y).spread(q)
    assert (spread > 0).any() == bool(METHODS[method].balance and METHODS[method].bayes and not METHODS[method].naive)
    assert same(after, values(made))
    made.save(tmp_path / "m.safetensors", network=NETWORK)
    again = MetaLearner.load(tmp_path / "m.safetensors")
    assert again.method == made.method
    assert again.method_name == method
    assert same(after, values(again))
    assert again.range == made.range
    np.testing.assert_array_equal(again.adapt(x, y).predict_proba(q), answer)
    found = again.evaluate(TASKS, tasks=3, batch=2)
    np.testing.assert_array_equal(found.probability, made.evaluate(TASKS, tasks=3, batch=2).probability)


def test_training_learns_which_directions_tell_classes_apart():
    options = {"noise": 0.7, "shape": (8,), "signal": 2, "queries": 8}
    made = learner(backbone=mlp_features(inputs=8, hidden=(12,)), input_shape=(8,), inner_lr=0.3)
    test = Blobs(seed=77, **options)
    before = made.evaluate(test, tasks=40, samples=0).loss.mean()
    history = made.fit(Blobs(**options), steps=60, meta_batch=4, outer_lr=3e-2)
    assert made.evaluate(test, tasks=40, samples=0).loss.mean() < before - 0.04
    assert np.mean([s.loss for s in history[-10:]]) < np.mean([s.loss for s in history[:10]])


def test_a_network_from_scratch_is_not_trained_over_tasks():
    made = learner("scratch")
    before = values(made)
    assert made.fit(TASKS, steps=5) == []
    assert same(before, values(made))
    assert 0.3 < made.evaluate(TASKS, tasks=4, batch=4).mean <= 1
    x, y, _, _ = TASKS.one(0)
    with pytest.raises(InputError, match="'scratch' learns nothing over tasks"):
        made.adapt(x, y)


def trained(resume=None):
    made, states, seen = learner(), [], []
    made.fit(TASKS, steps=8, meta_batch=2, outer_lr=3e-2, validation=Blobs(seed=3), validate_every=2,
             validation_tasks=4, resume=resume, on_state=lambda s: states.append(copy.deepcopy(s)), state_every=3,
             on_validation=lambda step, found: seen.append((step, found)))  # fmt: skip
    return made, states, seen


@pytest.fixture(scope="module")
def uninterrupted():
    return trained()


def test_a_resumed_run_is_an_uninterrupted_one_bit_for_bit(tmp_path, uninterrupted):
    whole, states, seen = uninterrupted
    assert [s["step"] for s in states] == [3, 6, 8]
    assert [step for step, _ in seen] == [2, 4, 6, 8]
    for state in states[:2]:
        save_tree(tmp_path / "state.safetensors", state)
        resumed, _, later = trained(resume=load_tree(tmp_path / "state.safetensors"))
        assert same(values(whole), values(resumed))
        assert later == [pair for pair in seen if pair[0] > state["step"]]
        assert resumed.range == whole.range


def test_the_best_parameters_by_validation_are_kept(uninterrupted):
    whole, states, seen = uninterrupted
    best = max(found for _, found in seen)
    assert whole.evaluate(Blobs(seed=3), tasks=4, samples=0).mean == best
    assert states[-1]["best"][0] == best
    first = next(step for step, found in seen if found == best)
    made = learner()
    made.fit(TASKS, steps=first, meta_batch=2, outer_lr=3e-2)
    assert same(values(made), values(whole))


def test_an_interruption_keeps_a_state_to_go_on_from():
    states = []
    made = learner()

    def stop(line):
        if line.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made.fit(TASKS, steps=8, meta_batch=2, on_step=stop, on_state=lambda s: states.append(copy.deepcopy(s)))
    assert [s["step"] for s in states] == [5]
    whole, resumed = learner(), learner()
    whole.fit(TASKS, steps=8, meta_batch=2)
    resumed.fit(TASKS, steps=8, meta_batch=2, resume=states[0])
    assert same(values(whole), values(resumed))
    with pytest.raises(CheckpointError, match="of another learner: it differs in inference"):
        learner("metasgd").fit(TASKS, steps=8, resume=states[0])


def test_an_interruption_before_a_judgement_does_not_lose_it(uninterrupted):
    states = []
    whole, _, seen = uninterrupted
    made = learner()

    def stop(line):
        if line.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made.fit(TASKS, steps=8, meta_batch=2, outer_lr=3e-2, validation=Blobs(seed=3), validate_every=2,
                 validation_tasks=4, on_step=stop, on_state=lambda s: states.append(copy.deepcopy(s)))  # fmt: skip
    resumed, _, later = trained(resume=states[0])
    assert later == seen[1:]
    assert same(values(whole), values(resumed))


def test_gradients_are_cut_by_value_and_adam_steps(monkeypatch):
    made, seen = learner(), []
    step = torch.optim.Adam.step

    def spy(self, *arguments):
        seen.extend(p.grad.clone() for group in self.param_groups for p in group["params"])
        return step(self, *arguments)

    gradients, loss, right, kl = made.meta_step(TASKS.batch(0, 3), [made._task_seed(k) for k in range(3)])
    plain = {name: p.detach().clone().requires_grad_() for name, p in made.parameters().items()}
    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    (line,) = made.fit(TASKS, steps=1, meta_batch=3, clip=1e-3, outer_lr=0.02)
    for name, gradient in zip(made.parameters(), seen, strict=True):
        torch.testing.assert_close(gradient, gradients[name].clamp(-1e-3, 1e-3), atol=1e-7, rtol=1e-5)
        plain[name].grad = gradient
    assert (line.loss, line.accuracy, line.kl) == pytest.approx(
        (loss.mean().item(), right.mean().item(), kl.mean().item()), rel=1e-5
    )
    optimizer = torch.optim.Adam(list(plain.values()), lr=0.02)
    step(optimizer)
    for name, value in made.parameters().items():
        torch.testing.assert_close(value, plain[name])


class Pair(World):
    """Two processes as two threads."""

    gate = threading.Barrier(2)
    sent: list = []  # noqa: RUF012

    def all_reduce(self, tensors):
        tensors = list(tensors)
        self.gate.wait()
        self.sent.append([t.clone() for t in tensors])
        self.gate.wait()
        total = [sum(parts) for parts in zip(*self.sent, strict=True)]
        self.gate.wait()
        for tensor, value in zip(tensors, total, strict=True):
            tensor.copy_(value)
        self.sent.clear()


def test_two_processes_that_share_a_batch_are_one(double):
    whole = learner(inner_steps=1)
    history = whole.fit(TASKS, steps=3, meta_batch=3)
    pair, told = [learner(inner_steps=1), learner(inner_steps=1)], {}

    def run(rank):
        told[rank] = pair[rank].fit(TASKS, steps=3, meta_batch=3, world=Pair(rank, 2))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert same(values(pair[0]), values(pair[1]))
    for name, value in values(whole).items():
        torch.testing.assert_close(pair[0].parameters()[name].detach(), value, atol=1e-8, rtol=1e-6)
    for a, b in zip(history, told[1], strict=True):
        assert (a.loss, a.accuracy, a.kl) == pytest.approx((b.loss, b.accuracy, b.kl))
    with pytest.raises(InputError, match="3 processes share 2 tasks"):
        learner().fit(TASKS, steps=1, meta_batch=2, world=Pair(0, 3))


class Broken(Blobs):
    def batch(self, number, count):
        tasks = super().batch(number, count)
        if number >= 1:
            tasks.query[0, 0] = torch.nan
        return tasks


def test_steps_that_are_not_finite_are_skipped_and_too_many_end_the_run():
    made = learner("metasgd")
    history = made.fit(Broken(), steps=4, meta_batch=2)
    assert [s.skipped for s in history] == [0, 1, 2, 3]
    one = learner("metasgd")
    one.fit(TASKS, steps=1, meta_batch=2)
    assert same(values(one), values(made))
    with pytest.raises(ArithmeticError, match="21 meta-steps were not finite; lower inner_lr"):
        learner("metasgd").fit(Broken(), steps=30, meta_batch=1)


def test_frozen_layers_stay_as_they_are():
    net = mlp_features(inputs=4, hidden=(6, 5))
    net[0].requires_grad_(False)
    made = learner(backbone=net)
    before = net[0].weight.clone()
    assert "0.weight" not in made.parameters()
    made.fit(TASKS, steps=2, meta_batch=2)
    assert torch.equal(net[0].weight, before)
    x, y, q, _ = TASKS.one(0)
    assert made.adapt(x, y).predict_proba(q).shape == (12, 3)


# ---- one task


def test_a_classifier_answers_as_evaluation_does(double):
    for method in ("bayesian-taml", "metasgd", "maml-oversampled", "protonet", "protomaml"):
        for statistics in ("batch", "support"):
            made = shaken(pictures(method, statistics=statistics))
            x, y, q, yq = Blobs(shape=(1, 8, 8)).one(3)
            task, seed = Tasks.collate([(x, y, q, yq)], 3), 5 if method == "maml-oversampled" else _seed(0, 17, 5)
            for samples in (0, 4):
                wanted, _, _ = made.probabilities(task, [seed], samples=samples)
                found = made.adapt(x, y, samples=samples, seed=5)
                np.testing.assert_allclose(found.predict_proba(q), wanted[0].detach(), atol=1e-10)
                np.testing.assert_allclose(found.module(q).detach().exp(), wanted[0].detach(), atol=1e-10)
                assert found.score(q, yq) == (wanted[0].argmax(1) == yq).double().mean()


def test_probabilities_are_averaged_not_logits(double):
    made = shaken(pictures())
    x, y, q, _ = Blobs(shape=(1, 8, 8)).one(3)
    found = made.adapt(x, y, samples=5)
    each = found.module.each(q).detach()
    assert each.shape == (5, 12, 3)
    np.testing.assert_allclose(found.predict_proba(q), each.exp().mean(0), atol=1e-12)
    np.testing.assert_allclose(found.spread(q), each.exp().numpy().std(0), atol=1e-12)
    assert np.abs(found.predict_proba(q) - functional.softmax(each.mean(0), 1).numpy()).max() > 1e-3
    other = made.adapt(x, y, samples=5, seed=1)
    assert not np.allclose(other.predict_proba(q), found.predict_proba(q))


@pytest.mark.parametrize(("statistics", "apart"), [("support", True), ("batch", False)])
def test_rows_are_answered_apart_only_under_statistics_of_the_support(statistics, apart):
    made = shaken(pictures(statistics=statistics))
    x, y, q, _ = Blobs(shape=(1, 8, 8)).one(0)
    found = made.adapt(x, y, samples=2)
    whole = found.predict_proba(q)
    assert np.allclose(found.predict_proba(q[:1]), whole[:1], atol=1e-5) == apart
    assert np.allclose(found.predict_proba(torch.cat([q[:1], q[1:] + 5]))[:1], whole[:1], atol=1e-5) == apart
    np.testing.assert_allclose(found.predict_proba(q, batch=5), whole, atol=1e-5)


@pytest.mark.parametrize(
    "names",
    [["b", "d", "x"], [3, 11, 200], [-7, 0, 5], np.array([1, 2, 3], np.uint8), torch.tensor([-2, 4, 9]),
     [0.5, 1.0, 2.5], [False, True]],
)  # fmt: skip
def test_labels_are_whatever_can_be_sorted(names):
    made, (x, y, q, _) = learner(), Blobs(ways=len(names)).one(2)
    labels = names[y] if isinstance(names, torch.Tensor | np.ndarray) else [names[k] for k in y]
    found = made.adapt(x.numpy().astype(np.float64), labels)
    assert found.classes_.tolist() == np.asarray(names).tolist()
    assert found.counts_.tolist() == torch.bincount(y).tolist()
    np.testing.assert_allclose(found.predict_proba(q.numpy()), made.adapt(x, y).predict_proba(q), atol=1e-6)
    assert set(found.predict(q).tolist()) <= set(np.asarray(names).tolist())
    assert found.score(q, found.predict(q)) == 1


def test_another_number_of_classes_is_no_trouble():
    made = learner()
    made.fit(TASKS, steps=1, meta_batch=2)
    for ways in (2, 7):
        x, y, q, _ = Blobs(ways=ways).one(0)
        assert made.adapt(x, y).predict_proba(q).shape == (len(q), ways)


def test_what_is_no_data_set_is_refused(unchecked):
    made, x = learner(), np.random.default_rng(0).normal(size=(5, 4))
    y = np.array([0, 0, 1, 1, 1])
    bad = x.copy()
    bad[3, 1] = np.nan
    for rows, labels, kind, message in (
        (x, ["a"] * 5, NeedTwoClassesError, r"support: all labels are .*'a'.*; a task needs at least two classes"),
        (x[:0], [], EmptyClassError, "support: has no rows"),
        (bad, y, InputError, "support: row 3 holds NaN or infinity"),
        (x[:, :3], y, InputError, r"support: has shape \(5, 3\), expected \(n, 4\)"),
        (x[0], y, InputError, r"has shape \(4,\), expected \(n, 4\)"),
        (x, y[:4], InputError, r"5 rows and labels of shape \(4,\); give one label a row"),
        (x, y[:, None], InputError, r"labels of shape \(5, 1\)"),
        (x, [0.0, 1.0, np.nan, 1.0, 0.0], InputError, "label 2 is not finite"),
        (x.astype(object), y, InputError, "holds object, expected numbers"),
        (x.astype(str), y, InputError, "expected numbers"),
        ([[1, 2, 3, 4], [1, 2]], [0, 1], InputError, "support: "),
    ):
        with pytest.raises(kind, match=message) as caught:
            made.adapt(rows, labels)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"x: has shape \(5, 3\)"):
        made.adapt(x, y).predict_proba(x[:, :3])
    for weight, message in (
        ({"c": 1.0}, "no class 'c'"),
        ({0: -1.0}, "finite and > 0"),
        ({1: np.nan}, "finite and > 0"),
    ):
        with pytest.raises(InputError, match=message):
            made.adapt(x, y, class_weight=weight)


def test_no_rows_have_no_answers():
    made, (x, y, _, _) = learner(), TASKS.one(0)
    assert made.adapt(x, y).predict_proba(x[:0]).shape == (0, 3)


def test_values_of_another_range_are_told(recwarn):
    class Pixels(Blobs):
        def one(self, number):
            x, y, q, yq = super().one(number)
            return x.sigmoid(), y, q.sigmoid(), yq

    made, source = pictures(), Pixels(shape=(1, 8, 8))
    made.fit(source, steps=1, meta_batch=2)
    x, y, q, _ = source.one(0)
    made.adapt(x, y).predict_proba(q)
    assert not recwarn
    pixels = (x.numpy() * 255).astype(np.uint8)
    with pytest.warns(RangeWarning, match=r"support: values are \d+..2\d\d, training had 0.*; scale them alike"):
        found = made.adapt(pixels, y)
    with pytest.warns(RangeWarning, match=r"x: values are"):
        found.predict_proba(pixels)


def test_supports_far_beyond_training_are_told(recwarn):
    made, (x, _, _, _) = learner(), Blobs(most=9).one(0)
    x = x[:1].repeat(13, 1)
    made.adapt(x, [0] * 10 + [1] * 3)
    assert not recwarn
    with pytest.warns(ExtrapolationWarning, match="a class has 11 examples, training had at most 5"):
        made.adapt(x, [0] * 11 + [1] * 2)
    learner("metasgd").adapt(x, [0] * 11 + [1] * 2)
    assert not recwarn


def test_multipliers_out_of_bounds_are_held_told_once_and_counted(recwarn):
    bound, wild, free = learner(samples=2), learner(samples=2), learner(compat=Compat(padded_n=True))
    with torch.no_grad():
        for made, value in ((bound, np.log(100.0)), (wild, 30.0), (free, 30.0)):
            made.inference.gamma.mean.weight.zero_()
            made.inference.gamma.mean.bias.fill_(value)
            made.inference.gamma.mean.bias[-1] = -value
    x, y, q, _ = TASKS.one(0)
    with pytest.warns(ExtrapolationWarning, match="held within 1/100 and 100"):
        found = wild.adapt(x, y, samples=0).predict_proba(q)
    recwarn.clear()
    wild.adapt(x, y)
    assert not recwarn
    np.testing.assert_allclose(found, bound.adapt(x, y, samples=0).predict_proba(q), atol=1e-5)
    assert wild.evaluate(TASKS, tasks=4, batch=3, samples=0).held == 4 * 3
    assert wild.evaluate(TASKS, tasks=4, batch=3).held == 4 * 2 * 3
    assert learner().evaluate(TASKS, tasks=4, batch=3).held == 0
    assert free.evaluate(TASKS, tasks=4, batch=3, samples=0).held == 0


@pytest.mark.parametrize("method", ["maml", "metasgd", "bayesian-taml", "protomaml"])
def test_steps_that_go_too_far_leave_finite_probabilities_and_are_counted(method):
    made = learner(method, inner_lr=1e25)
    found = made.evaluate(TASKS, tasks=4, batch=2)
    assert np.isfinite(found.probability).all()
    np.testing.assert_allclose(found.probability.sum(2), 1, rtol=1e-5)
    assert 0 < found.diverged <= 4 * (3 if method == "bayesian-taml" else 1)
    assert learner(method).evaluate(TASKS, tasks=4, batch=2).diverged == 0
    x, y, q, _ = TASKS.one(0)
    assert np.isfinite(made.adapt(x, y).predict_proba(q)).all()


def test_factors_of_class_weights_are_class_weights():
    plain, inverse, made = shaken(learner("metasgd")), shaken(learner("metasgd-inverse")), shaken(learner())
    x, y, q, _ = TASKS.one(4)
    counts = torch.bincount(y).tolist()
    assert len(set(counts)) > 1
    found = plain.adapt(x, y, class_weight={k: 1 / n for k, n in enumerate(counts)}).predict_proba(q)
    np.testing.assert_allclose(found, inverse.adapt(x, y).predict_proba(q), atol=1e-5)
    base = made.adapt(x, y).predict_proba(q)
    np.testing.assert_allclose(
        made.adapt(x, y, class_weight=dict.fromkeys(range(3), 7.0)).predict_proba(q), base, atol=1e-5
    )
    for label in range(3):
        assert made.adapt(x, y, class_weight={label: 5.0}).predict_proba(q)[:, label].mean() > base[:, label].mean()


def test_adapting_and_evaluating_change_nothing():
    made = pictures()
    source = Blobs(shape=(1, 8, 8))
    before, buffers = values(made), copy.deepcopy(made.model.backbone.state_dict())
    x, y, q, _ = source.one(0)
    kept = x.clone()
    made.adapt(x, y).predict_proba(q)
    made.evaluate(source, tasks=3, batch=3)
    made.meta_step(source.batch(0, 2), [1, 2])
    assert same(before, values(made))
    assert same(buffers, made.model.backbone.state_dict())
    assert all(p.grad is None for p in made.parameters().values())
    assert torch.equal(x, kept)
    assert made.range is None


def test_a_classifier_keeps_what_it_was_given_when_training_goes_on():
    made, (x, y, q, _) = learner(), TASKS.one(0)
    found = made.adapt(x, y)
    before = found.predict_proba(q)
    made.fit(TASKS, steps=2, meta_batch=2, outer_lr=0.1)
    np.testing.assert_array_equal(found.predict_proba(q), before)


# ---- many tasks


def test_evaluation_is_a_loop_over_tasks():
    source = Blobs(ragged_queries=True)
    made = shaken(learner())
    found = made.evaluate(source, tasks=5, batch=2, samples=0)
    assert found.probability.shape == (5, 18, 3)
    for k in range(5):
        x, y, q, yq = source.one(k)
        one = made.adapt(x, y, samples=0)
        probability = one.predict_proba(q)
        np.testing.assert_allclose(found.probability[k, : len(q)], probability, atol=1e-5)
        assert found.accuracy[k] == pytest.approx(one.score(q, yq))
        assert found.loss[k] == pytest.approx(-np.log(probability[np.arange(len(q)), yq]).mean(), rel=1e-4)
        assert found.counts[k].tolist() == torch.bincount(y).tolist()
        assert found.mask[k].sum() == len(q)
    rows = found.rows()
    assert all(len(v) == found.mask.sum() for v in rows.values())
    at = int(found.mask[0].sum())
    _, y, _, yq = source.one(1)
    assert rows["class_size"][at : at + 3].tolist() == torch.bincount(y)[yq[:3]].tolist()
    assert (rows["task_size"][at : at + 3] == len(y)).all()
    assert rows["task"].tolist() == sorted(rows["task"].tolist())
    assert rows["right"].mean() == pytest.approx(found.right[found.mask].mean())
    assert found.mean == pytest.approx(found.accuracy.mean())
    assert found.half_width == pytest.approx(1.96 * found.accuracy.std() / np.sqrt(5), rel=0.2)
    assert found.protocol["samples"] == 0
    assert found.protocol["inner_steps"] == 3


def test_evaluation_does_not_depend_on_the_batch():
    made, told = shaken(learner()), []
    one, two = made.evaluate(TASKS, tasks=5, batch=5), made.evaluate(TASKS, tasks=5, batch=2, on_batch=told.append)
    np.testing.assert_allclose(one.probability, two.probability, atol=1e-5)
    assert told == [2, 4, 5]
    other = made.evaluate(TASKS, tasks=5, batch=5, seed=1)
    assert not np.allclose(one.probability, other.probability, atol=1e-4)
    with pytest.raises(InputError, match="tasks: must be at least 1"):
        made.evaluate(TASKS, tasks=0)


def test_padding_of_queries_may_hold_anything():
    class Filled(Blobs):
        def batch(self, number, count):
            return scattered(super().batch(number, count), 3)

    made = shaken(learner())
    plain = made.evaluate(Blobs(ragged_queries=True), tasks=4, batch=4)
    found = made.evaluate(Filled(ragged_queries=True), tasks=4, batch=4)
    np.testing.assert_allclose(found.loss, plain.loss, atol=1e-5)
    np.testing.assert_allclose(found.accuracy, plain.accuracy)
    assert found.nll == pytest.approx(plain.nll, rel=1e-4)
    assert found.rows()["class_size"].tolist() == plain.rows()["class_size"].tolist()


def test_cardinalities_can_be_shuffled_for_studies():
    made = shaken(learner(), 1.0)
    plain = made.evaluate(TASKS, tasks=4, batch=4, samples=0)
    same_counts = made.evaluate(TASKS, tasks=4, batch=4, samples=0, change_counts=lambda counts: counts)
    other = made.evaluate(TASKS, tasks=4, batch=4, samples=0, change_counts=lambda counts: counts.flip(1))
    np.testing.assert_array_equal(plain.probability, same_counts.probability)
    assert np.abs(plain.probability - other.probability).max() > 1e-4


# ---- files


def test_all_that_makes_a_learner_is_saved(tmp_path):
    options = {"inner_lr": 0.02, "inner_steps": 1, "test_steps": 2, "samples": 4, "max_shot": 7, "encoder": "features",
               "pooling": ("mean", "n"), "deviation": 0.1, "statistics": "support", "first_order": True, "seed": 3,
               "compat": Compat(padded_n=True), "groups": lambda name: "all"}  # fmt: skip
    made = pictures(norm="film", **options)
    made.save(tmp_path / "m.safetensors", network={"size": 8, "filters": 3, "blocks": 2, "norm": "film"})
    again = MetaLearner.load(tmp_path / "m.safetensors")
    assert again.plan == made.plan
    assert again.model.layers == ("all",)
    for name in ("inner_lr", "test_steps", "samples", "max_shot", "encoder_kind", "pooling", "deviation", "seed"):
        assert getattr(again, name) == getattr(made, name), name
    assert same(values(made), values(again))


class Reader(nn.Linear):
    def __init__(self):
        super().__init__(4, 64)


def test_networks_of_ones_own_are_passed_again(tmp_path):
    own = Method("of my own", ("omega",), bayes=False)
    made = shaken(learner(own, smooth(), encoder=Reader()))
    made.save(tmp_path / "own.safetensors")
    with pytest.raises(CheckpointError, match="the backbone was one of your own; pass it as well"):
        MetaLearner.load(tmp_path / "own.safetensors")
    with pytest.raises(CheckpointError, match="the encoder was one of your own; pass it as well"):
        MetaLearner.load(tmp_path / "own.safetensors", smooth())
    again = MetaLearner.load(tmp_path / "own.safetensors", smooth(), encoder=Reader())
    assert same(values(made), values(again))
    assert again.method == own
    assert again.method_name == "own"


def test_files_that_are_none_of_ours_are_refused(tmp_path):
    save_tree(tmp_path / "other.safetensors", {"a": 1})
    with pytest.raises(CheckpointError, match=r"other.safetensors: is no learner of bayes-taml"):
        MetaLearner.load(tmp_path / "other.safetensors")
    learner().save(tmp_path / "own.safetensors", network=NETWORK)
    deep, wide = mlp_features(inputs=4, hidden=(6, 6, 5)), mlp_features(inputs=4, hidden=(6, 9))
    with pytest.raises(CheckpointError, match=r"is of another network; it differs in .*4\.bias, 4\.weight"):
        MetaLearner.load(tmp_path / "own.safetensors", deep)
    with pytest.raises(CheckpointError, match=r"2\.\w+ has shape \(.*5.*\), the network's \(.*9.*\)"):
        MetaLearner.load(tmp_path / "own.safetensors", wide)
    tree = load_tree(tmp_path / "own.safetensors")
    del tree["options"]
    save_tree(tmp_path / "old.safetensors", tree)
    with pytest.raises(CheckpointError, match="written by another version of bayes-taml, or is damaged"):
        MetaLearner.load(tmp_path / "old.safetensors")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner_lr": 0.0}, "inner_lr: must be > 0"),
        ({"samples": 0}, "samples >= 1"),
        ({"test_steps": -1}, "test_steps >= 0"),
        ({"inner_steps": -1}, "steps: must be >= 0"),
        ({"max_shot": 0}, "max_shot: must be at least 1"),
        ({"encoder": "conv"}, r"'conv' reads images \(channels, height, width\), rows are \(4,\); use 'mlp'"),
        ({"pooling": ("median",)}, "statistics: some of mean"),
    ],
)
def test_learners_that_cannot_be_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        learner(**options)


def test_training_that_cannot_be_is_refused():
    for options, message in (
        ({"meta_batch": 0}, "meta_batch >= 1"),
        ({"steps": -1}, "steps >= 0"),
        ({"outer_lr": 0.0}, "outer_lr and clip must be > 0"),
        ({"clip": 0.0}, "outer_lr and clip must be > 0"),
    ):
        with pytest.raises(InputError, match=message):
            learner().fit(TASKS, **{"steps": 1, **options})
    with pytest.raises(InputError, match="'metasgd' infers nothing about a task"):
        learner("metasgd").posterior(TASKS.batch(0, 1))
