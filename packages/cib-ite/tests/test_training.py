"""The batched program: the same as training alone, as networks written by hand, and as going on after a stop."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cib_ite import losses
from cib_ite.closed_form import discriminator_gradients
from cib_ite.network import CIBStack, StackedMLP
from cib_ite.settings import PRESETS, Settings
from cib_ite.training import Member, Rows, Trainer, TrainingDiverged, _Adam
from shared_core.errors import InputError
from shared_core.testing import in_two_processes

SMALL = Settings(
    trunk=(8, 8), heads=(8,), discriminator=(8,), latent=3, samples=2, batch_size=20, steps=75, patience=50
)


def rows(seed: int = 0, n: int = 120, treated: float = 0.4, binary: bool = False) -> Rows:
    random = np.random.default_rng(seed)
    x = random.normal(size=(n, 4))
    t = (random.random(n) < treated).astype(np.int64)
    y = x[:, 0] + t * x[:, 1] + 0.3 * random.normal(size=n)
    return Rows(x, t, (y > 0).astype(np.float64) if binary else y, np.ones(n))


def member(data: Rows, place: int = 0, seed: int = 1, **more) -> Member:
    order = np.random.default_rng(seed).permutation(len(data.x))
    return Member(place, seed, np.sort(order[30:]), np.sort(order[:30]), **more)


def weights(stack: CIBStack) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in stack.named_parameters()}


def one(settings: Settings, seed: int = 1, *, dtype: torch.dtype = torch.float64, binary: bool = False, **more):
    data = rows(binary=binary)
    return Trainer([data], [member(data, seed=seed, **more)], settings, binary=binary, dtype=dtype)


# ---- networks


def test_a_stack_is_its_networks_one_by_one():
    stack = StackedMLP((3, 5, 2), seeds=(4, 9), last_gain=0.1)
    x = torch.randn(2, 7, 3)
    for k in range(2):
        w, b = [p[k] for p in stack.weights], [p[k, 0] for p in stack.biases]
        by_hand = nn.functional.elu(x[k] @ w[0] + b[0]) @ w[1] + b[1]
        assert torch.allclose(stack(x)[k], by_hand, atol=1e-6)
    alone = StackedMLP((3, 5, 2), seeds=(9,), last_gain=0.1)
    assert torch.equal(alone.weights[0][0], stack.weights[0][1])


def test_tarnet_preset_is_a_tarnet_written_by_hand():
    settings = Settings(trunk=(6, 5), heads=(4,), **{k: v for k, v in PRESETS["tarnet"].items() if k != "heads"})
    stack = CIBStack(3, settings, seeds=(2,))
    trunk = nn.Sequential(nn.Linear(3, 6), nn.ELU(), nn.Linear(6, 5), nn.ELU())
    heads = [nn.Sequential(nn.Linear(5, 4), nn.ELU(), nn.Linear(4, 1)) for _ in range(2)]
    with torch.no_grad():
        for layer, w, b in zip((trunk[0], trunk[2]), stack.encoder.weights, stack.encoder.biases, strict=True):
            layer.weight.copy_(w[0].T)
            layer.bias.copy_(b[0, 0])
        for arm, head in enumerate(heads):
            for layer, w, b in zip((head[0], head[2]), stack.heads.weights, stack.heads.biases, strict=True):
                layer.weight.copy_(w[arm].T)
                layer.bias.copy_(b[arm, 0])
    x = torch.randn(11, 3)
    h, scale = stack.encode(x.unsqueeze(0))
    assert scale is None
    ours = stack.outcomes(h.unsqueeze(2))[0, :, :, 0]
    assert torch.allclose(ours, torch.stack([head(trunk(x))[:, 0] for head in heads]), atol=1e-6)


def test_both_heads_see_the_same_z_and_arms_agree():
    stack = CIBStack(4, SMALL, seeds=(0, 1))
    z = torch.randn(2, 9, 5, 3)
    both = stack.raw_outcomes(z)
    for arm in (0, 1):
        assert torch.allclose(stack.arm_outcomes(arm, z), both[:, arm], atol=1e-6)


def test_representations_start_nearly_deterministic_and_unit_length_on_request():
    stack = CIBStack(4, SMALL, seeds=(0,))
    _, scale = stack.encode(torch.zeros(1, 2, 4))
    assert scale.mean().item() == pytest.approx(0.128, abs=2e-3)
    settings = replace(SMALL, deterministic=True, normalize=True, beta=0.0, lam=0.0)
    h, _ = CIBStack(4, settings, seeds=(0,)).encode(torch.randn(1, 6, 4))
    assert torch.allclose(h.norm(dim=2), torch.ones(1, 6))


# ---- the loss of a step


def step_terms(trainer: Trainer) -> tuple[dict[str, torch.Tensor], torch.Tensor, np.ndarray]:
    index, offsets, unlabeled = trainer._chunk()
    terms, _ = trainer._terms(trainer.stack, index[0], offsets[0], None if unlabeled is None else unlabeled[0])
    return terms, index[0], offsets[0]


@pytest.mark.parametrize("binary", [False, True])
def test_terms_of_a_step_against_plain_torch(binary):
    trainer = one(SMALL, binary=binary)
    terms, index, offsets = step_terms(trainer)
    data = trainer.data[0]
    chosen = index[0].numpy()
    x, t, y = (torch.as_tensor(v[chosen], dtype=torch.float64) for v in (data.x, data.treatment, data.y))
    noise = trainer._batch_noise(offsets[:, 0], 20, (2, 3))
    net = trainer.stack
    mean, scale = net.encode(x.unsqueeze(0))
    z = mean.unsqueeze(2) + scale.unsqueeze(2) * noise
    out = net.outcomes(z)[0]
    factual = torch.where(t[:, None] == 1, out[1], out[0])
    other = torch.where(t[:, None] == 1, out[0], out[1])
    u = data.treatment[trainer.members[0].train].mean()
    if binary:
        nll = nn.functional.binary_cross_entropy_with_logits(factual, y[:, None].expand_as(factual), reduction="none")
        other = torch.sigmoid(other)
    else:
        nll = 0.5 * (y[:, None] - factual) ** 2  # log sigma starts at 0
    weight = t / (2 * u) + (1 - t) / (2 * (1 - u))
    assert terms["prediction"].item() == pytest.approx((nll.mean(1) * weight).mean().item(), rel=1e-9)
    assert terms["rate"].item() == pytest.approx(losses.kl_diag(mean, scale).mean().item(), rel=1e-9)
    assert terms["variance"].item() == pytest.approx(other.var(1).mean().item(), rel=1e-9)
    logit = net.treatment_logit(z[:, :, 0])[0]
    assert terms["independence"].item() == pytest.approx(losses.confusion(logit, float(u)).item(), rel=1e-9)


def test_unlabelled_rows_enter_the_variance_of_both_arms():
    data = replace(rows(), unlabeled=np.random.default_rng(5).normal(size=(40, 4)))
    trainer = Trainer([data], [member(data)], SMALL, binary=False, dtype=torch.float64)
    index, offsets, unlabeled = trainer._chunk()
    terms, _ = trainer._terms(trainer.stack, index[0], offsets[0], unlabeled[0])
    x = torch.cat([trainer._x[index[0]], trainer._unlabeled[unlabeled[0]]], 1)
    mean, scale = trainer.stack.encode(x)
    z = mean.unsqueeze(2) + scale.unsqueeze(2) * trainer._batch_noise(offsets[0][:, 0], 40, (2, 3))
    variance = trainer.stack.outcomes(z)[0].var(2)
    t = torch.as_tensor(data.treatment[index[0][0].numpy()])
    labelled = torch.where(t == 1, variance[0, :20], variance[1, :20]).sum()
    expected = (labelled + variance[:, 20:].sum()) / (20 + 2 * 20)
    assert terms["variance"].item() == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize("kind", ["mmd-lin", "mmd-rbf", "wass", "mi-gauss", "adversarial"])
def test_every_independence_term_reaches_the_encoder_and_not_the_discriminator(kind):
    trainer = one(replace(SMALL, independence=kind, gamma=1.0))
    terms, _, _ = step_terms(trainer)
    terms["independence"].sum().backward()
    assert trainer.stack.encoder.weights[0].grad.abs().sum() > 0
    assert all(p.grad is None for p in trainer.stack.discriminator.parameters())


def test_discriminator_step_moves_the_discriminator_only():
    trainer = one(SMALL)
    before = weights(trainer.stack)
    _, z = trainer._terms(trainer.stack, *[trainer._chunk()[0][0], trainer._chunk()[1][0]], None)
    trainer._discriminate(trainer.stack, z, np.array([5]))
    moved = {name for name, value in weights(trainer.stack).items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if name.startswith("discriminator")}
    assert all(p.grad is None for p in trainer.stack.encoder.parameters())


def test_reduction_to_tarnet_and_cfr():
    """beta = gamma = lam = 0 and a deterministic z: only the prediction is left; with an imbalance measure, CFR."""
    base = PRESETS["tarnet"] | {"trunk": (8, 8), "heads": (8,), "batch_size": 20}
    tarnet = Trainer([rows()], [member(rows())], Settings(**base), binary=False, dtype=torch.float64)
    terms, _, _ = step_terms(tarnet)
    assert set(terms) == {"prediction"}
    cfr = Settings(**(base | {"independence": "wass", "gamma": 0.7, "balance_share": 0.5}))
    trainer = Trainer([rows()], [member(rows())], cfr, binary=False, dtype=torch.float64)
    terms, index, _ = step_terms(trainer)
    h, _ = trainer.stack.encode(trainer._x[index])
    t = torch.as_tensor(rows().treatment[index[0].numpy()], dtype=torch.float64)
    assert terms["independence"].item() == pytest.approx(losses.sinkhorn(h[0], t, 0.5).item(), rel=1e-9)
    total = trainer._total(terms, 1.0)
    assert total.item() == pytest.approx((terms["prediction"] + 0.7 * terms["independence"]).item(), rel=1e-12)


# ---- gradients written down


@pytest.mark.parametrize("independence", ["confusion", "adversarial", "none", "mmd-lin", "wass", "mi-gauss"])
@pytest.mark.parametrize("kind", ["gaussian", "mse", "binary"])
@pytest.mark.parametrize("z", ["drawn", "steady", "itself", "unit"])
def test_gradients_written_down_are_those_of_torch(independence, kind, z):
    """Members of two data sets of other shares of treated (so with padded slots), halfway through the warm-up."""
    binary = kind == "binary"
    first, second = rows(0, binary=binary), rows(1, n=90, treated=0.25, binary=binary)
    settings = replace(SMALL, independence=independence, gamma=0.7, lam=0.3, samples=3, trunk=(8, 7), heads=(8, 6))
    settings = replace(settings, likelihood="mse" if kind == "mse" else "gaussian", lam=0.0 if z == "steady" else 0.3)
    settings = replace(settings, deterministic=z in ("itself", "unit"), normalize=z == "unit")
    members = [member(first, 0, 1), member(second, 1, 2, hyper={"beta": 0.02, "lam": 0.0})]
    trainer = Trainer([first, second], members, settings, binary=binary, dtype=torch.float64)
    assert trainer._closed
    # Away from the start, where the noise scales are 0 and one of them is clamped.
    random = torch.Generator().manual_seed(0)
    for parameter in trainer.stack.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=random, dtype=torch.float64)
    trainer.stack.log_sigma.data[0, 1] = -3.5
    index, offsets, _ = trainer._chunk()
    taped = trainer._taped(trainer.stack, index[0], offsets[0], None, 0.5)
    # Joined gradients share their memory.
    by_torch = [flat.clone() for flat in taped[1]]
    for buffer in trainer._buffers[0]:
        buffer._joined.fill_(torch.nan)
    written = trainer._written_down(trainer.stack, index[0], offsets[0], 0.5)
    assert taped[0].keys() == written[0].keys()
    for name, value in taped[0].items():
        assert torch.allclose(written[0][name], value, atol=1e-12), name
    for buffer, ours, theirs in zip(trainer._buffers[0], written[1], by_torch, strict=True):
        for name, value in buffer.split(ours).items():
            assert torch.allclose(value, buffer.split(theirs)[name], atol=1e-10), name
    assert torch.allclose(written[2], taped[2])


def test_discriminator_gradients_written_down_are_those_of_torch():
    first, second = rows(0), rows(1, n=90, treated=0.25)
    members = [member(first, 0, 1), member(second, 1, 2)]
    trainer = Trainer([first, second], members, SMALL, binary=False, dtype=torch.float64)
    z = torch.randn(2, sum(trainer._slots), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logit = trainer.stack.treatment_logit(z)
    loss = trainer._over_rows(losses.bernoulli_nll(trainer._slot_treatment.expand(logit.shape), logit)).sum()
    named = {name: p for name, p in trainer.stack.named_parameters() if not trainer._is_model(name)}
    theirs = torch.autograd.grad(loss, list(named.values()))
    ours = discriminator_gradients(trainer.stack, z, trainer._slot_treatment, trainer._now_row_share)
    assert list(named) == trainer._buffers[1][0].names
    for name, value in zip(named, theirs, strict=True):
        assert torch.allclose(ours[name], value, atol=1e-12), name


# ---- stacks


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 1e-9) -> None:
    for name, value in a.items():
        assert torch.allclose(value, b[name], atol=tolerance), name


@pytest.mark.parametrize("independence", ["confusion", "wass", "mmd-rbf"])
def test_members_train_as_they_would_alone(independence):
    """Two data sets of other sizes and shares of treated, three members: each as if it were the only one."""
    first, second = rows(0), rows(1, n=90, treated=0.25)
    settings = replace(SMALL, independence=independence, gamma=0.5)
    members = [member(first, 0, 1), member(first, 0, 2, bootstrap=True), member(second, 1, 3, hyper={"beta": 0.02})]
    together = Trainer([first, second], members, settings, binary=False, dtype=torch.float64).run()
    for k, (data, own) in enumerate(zip((first, first, second), members, strict=True)):
        alone = Trainer([data], [replace(own, data=0)], settings, binary=False, dtype=torch.float64).run()
        close(weights(together.part(k, 1)), weights(alone.stack))
        assert together.loss[k] == pytest.approx(alone.loss[0], rel=1e-9)
        assert together.step[k] == alone.step[0]


def test_stopped_members_leave_and_the_others_do_not_notice():
    data = rows()
    settings = replace(SMALL, steps=500, patience=2, lr=0.02)
    members = [member(data, 0, seed) for seed in range(6)]
    together = Trainer([data], members, settings, binary=False, dtype=torch.float64).run()
    assert len(together.history[-1].members) < 6
    for k in (0, 5):
        alone = Trainer([data], [members[k]], settings, binary=False, dtype=torch.float64).run()
        close(weights(together.part(k, 1)), weights(alone.stack), 1e-7)


def test_best_weights_are_restored_not_the_last():
    trainer = one(replace(SMALL, steps=400, lr=0.05, patience=4))
    trained = trainer.run()
    assert trained.step[0] < trained.history[-1].step
    assert trained.loss[0] == min(check.validation[0] for check in trained.history)
    trainer.stack = trained.stack
    trainer._alive = np.array([0])
    trainer._focus()
    assert trainer._validate().item() == pytest.approx(trained.loss[0], rel=1e-9)


def test_validation_never_looks_at_the_adversary():
    loss = {kind: one(replace(SMALL, independence=kind, gamma=5.0))._validate().item()
            for kind in ("confusion", "adversarial", "none")}  # fmt: skip
    assert len(set(loss.values())) == 1


def test_weight_decay_is_half_the_squared_weights_of_heads_only():
    trainer = one(replace(SMALL, head_l2=0.3))
    buffers = trainer._buffers[0]
    gradients = [torch.zeros_like(buffer.values) for buffer in buffers]
    trainer._add_l2(gradients)
    found = {name: g for b, flat in zip(buffers, gradients, strict=True) for name, g in b.split(flat).items()}
    for name, parameter in trainer.stack.named_parameters():
        if trainer._is_model(name):
            expected = 0.3 * parameter if name.startswith("heads.weights") else torch.zeros_like(parameter)
            assert torch.allclose(found.pop(name), expected), name
    assert not found


def test_gradients_are_clipped_for_each_member_by_itself():
    data = rows()
    trainer = Trainer([data], [member(data, 0, s) for s in (1, 2)], SMALL, binary=False, dtype=torch.float64)
    gradients = [torch.ones_like(parameter) for parameter in trainer._optimizers[0].parameters]
    for gradient in gradients:
        gradient.view(2, -1)[1] *= 1e-3
    small = [gradient.view(2, -1)[1].clone() for gradient in gradients]
    trainer._clip(gradients, 2)
    norm = sum(gradient.view(2, -1)[0].square().sum() for gradient in gradients).sqrt()
    assert norm.item() == pytest.approx(SMALL.clip)
    assert all(torch.equal(g.view(2, -1)[1], s) for g, s in zip(gradients, small, strict=True))


def test_adam_is_torchs():
    start = [torch.randn(3, 4), torch.randn(5)]
    theirs = [nn.Parameter(p.clone()) for p in start]
    ours = _Adam([p.clone() for p in start], 0.01)
    reference = torch.optim.Adam(theirs, lr=0.01)
    for _ in range(20):
        gradients = [torch.randn_like(p) for p in start]
        for p, g in zip(theirs, gradients, strict=True):
            p.grad = g.clone()
        reference.step()
        ours.step(gradients)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours.parameters, theirs, strict=True))


def test_duplicated_rows_with_half_the_weight_give_the_same_validation_loss():
    data = rows()
    twice = Rows(*(np.concatenate([v, v]) for v in (data.x, data.treatment, data.y)), np.ones(240))
    own = member(data)
    doubled = replace(
        own,
        train=np.concatenate([own.train, own.train + 120]),
        validation=np.concatenate([own.validation, own.validation + 120]),
    )
    settings = replace(SMALL, deterministic=True, beta=0.0, lam=0.0, independence="none")
    a = Trainer([data], [own], settings, binary=False, dtype=torch.float64)._validate()
    b = Trainer([twice], [doubled], settings, binary=False, dtype=torch.float64)._validate()
    assert a.item() == pytest.approx(b.item(), rel=1e-12)


def test_rows_of_weight_zero_do_not_matter():
    data = rows()
    spoiled = replace(data, y=data.y.copy(), weight=np.ones(120))
    spoiled.y[:10] = 1e3
    spoiled.weight[:10] = 0
    clean = replace(data, weight=spoiled.weight)
    settings = replace(SMALL, steps=50)
    stacks = [Trainer([d], [member(data)], settings, binary=False, dtype=torch.float64).run() for d in (spoiled, clean)]
    close(weights(stacks[0].stack), weights(stacks[1].stack))


# ---- going on


@pytest.mark.parametrize("settings", [SMALL, replace(SMALL, patience=1, lr=0.02, steps=200)])
def test_resuming_is_the_same_as_never_stopping(settings):
    data = rows()
    members = [member(data, 0, seed) for seed in range(4)]
    states: list[dict] = []
    whole = Trainer([data], members, settings, binary=False)
    whole.on_check = lambda check: states.append(copy.deepcopy(whole.state()))
    done = whole.run()
    for state in states[:-1]:
        again = Trainer([data], members, settings, binary=False)
        again.load_state(state)
        finished = again.run()
        close(weights(finished.stack), weights(done.stack), 0)
        assert [c.step for c in finished.history] == [c.step for c in done.history]


SHARED = """
import copy
from dataclasses import replace

import torch
from test_training import SMALL, close, member, rows, weights

from cib_ite.training import Trainer, train_shared
from shared_core.device import process_group, resolve_device

data, settings = rows(), replace(SMALL, steps=400, patience=2, lr=0.02)
members = [member(data, 0, seed) for seed in range(5)]


def trainer(part):
    return Trainer([data], members[part], settings, binary=False, dtype=torch.float64, first=part.start)


with process_group(resolve_device("cpu")) as world:
    part, checks, states = world.shard(5), [], []
    keep = {"on_check": checks.append, "on_state": lambda state: states.append(copy.deepcopy(state)), "state_every": 1}
    found, one = train_shared(trainer(part), world, 5, **keep), trainer(slice(0, 5)).run()
    close(weights(found.stack), weights(one.stack), 1e-7)
    assert found.step.tolist() == one.step.tolist()
    assert [(c.step, c.members, c.alive) for c in found.history] == [(c.step, c.members, c.alive) for c in one.history]
    assert checks == found.history
    ends = [[len(own["alive"]) > 0 for own in state["parts"]] for state in states]
    # One of the two has nothing left to do while the other goes on.
    assert [True, False] in ends or [False, True] in ends
    for state in (states[1], states[-2]):
        again = trainer(part)
        again.load_state(state["parts"][world.rank])
        resumed = train_shared(again, world, 5, on_check=lambda check: None)
        close(weights(resumed.stack), weights(found.stack), 0)
        assert resumed.history == found.history
"""


def test_processes_that_share_the_members_train_what_one_does_and_go_on_after_an_interruption(tmp_path):
    in_two_processes(tmp_path, SHARED, path=Path(__file__).parent)


def test_a_member_that_diverges_is_trained_again_with_smaller_steps_or_named():
    data = rows()
    hopeless = replace(data, y=np.where(np.arange(120) == member(data).train[0], np.inf, data.y))
    with pytest.raises(TrainingDiverged, match=r"'prediction' is not finite at step .* lower lr"):
        Trainer([hopeless], [member(data)], SMALL, binary=False).run()
    wild = replace(SMALL, lr=1e12, clip=1e30, steps=50)
    trained = Trainer([data], [member(data)], replace(wild, lr=5e3), binary=False).run()
    assert np.isfinite(trained.loss).all()


def test_a_diverging_member_does_not_hurt_its_neighbours():
    good, bad = rows(0), rows(1)
    bad = replace(bad, y=np.where(np.arange(120) == member(bad).train[0], np.inf, bad.y))
    trainer = Trainer([good, bad], [member(good, 0), member(bad, 1)], SMALL, binary=False, dtype=torch.float64)
    with pytest.raises(TrainingDiverged, match="member 1"):
        trainer.run()
    alone = Trainer([good], [member(good)], SMALL, binary=False, dtype=torch.float64).run()
    assert trainer._best_loss[0] == pytest.approx(alone.loss[0], rel=1e-9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": -1.0}, "beta"),
        ({"lam": 0.1, "samples": 1}, "samples >= 2"),
        ({"independence": "nonsense"}, "nonsense"),
        ({"dropout_head": 0.5}, "deterministic"),
        ({"normalize": True}, "Gaussian prior"),
        ({"batch_size": 3}, "batch_size"),
        ({"trunk": ()}, "trunk"),
        ({"lr": 0.0}, "lr"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, message, unchecked):
    with pytest.raises(InputError, match=message):
        replace(SMALL, **changes)
