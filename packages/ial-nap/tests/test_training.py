"""Training: losses against torch's, the same bits after a stop, and obedience that was learned."""

from __future__ import annotations

import copy

import pytest
import torch
from nap_cases import LENGTHS, R, T, batch, hash_of, masks, nap

from ial_nap.attention import Retain
from ial_nap.context import Context
from ial_nap.nap import FeatureNAP
from ial_nap.series import make_series
from ial_nap.toys import CAUSAL, SHORTCUT, shift_mask, shift_task
from ial_nap.training import Episodic, Plain, Training, finetune, losses, weight_penalty
from shared_core.device import World
from shared_core.errors import InputError


def small(n=40, seed=0, **options):
    x = torch.randn(n, T, R, generator=torch.Generator().manual_seed(seed))
    return make_series(x, (x[:, -1, 0] > 0).long(), lengths=LENGTHS.repeat(n)[:n].clamp(min=2), **options)


def model(seed=0, **options):
    return FeatureNAP(T, R, 1, hidden=6, latent=2, seed=seed, **options)


def test_losses_are_torchs():
    random = torch.Generator().manual_seed(0)
    logits, many = torch.randn(7, 1, generator=random), torch.randn(7, 3, generator=random)
    bce, y = torch.nn.BCEWithLogitsLoss(), torch.tensor([0.0, 1, 1, 0, 1, 0, 0])
    torch.testing.assert_close(losses(logits, y, "binary").mean(), bce(logits[:, 0], y))
    labels = (many > 0.3).float()
    torch.testing.assert_close(losses(many, labels, "multilabel").mean(), bce(many, labels))
    classes = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    torch.testing.assert_close(losses(many, classes, "multiclass").mean(), torch.nn.CrossEntropyLoss()(many, classes))
    torch.testing.assert_close(losses(logits, y, "regression").mean(), torch.nn.MSELoss()(logits[:, 0], y))


def test_the_penalty_is_of_weights_only():
    layer = torch.nn.Linear(2, 2)
    assert weight_penalty(layer).item() == pytest.approx(0.5 * layer.weight.square().sum().item())
    assert weight_penalty(torch.nn.ReLU()) == 0


@pytest.mark.parametrize("bound", ["prior", "np"])
def test_a_training_that_stopped_goes_on_to_the_same_bits(bound):
    series = small()

    def training(seed=0):
        made = model()
        return Training(made, Episodic(made, bound=bound), series, small(seed=1), batch_size=20, epochs=4, seed=seed)

    whole = training()
    whole.run()
    part = training()
    part.run(2)
    state, history = part.state_dict(), list(part.history)
    part.run(1)
    rest = training(seed=9)
    rest.load_state_dict(state)
    assert rest.history == history
    rest.run()
    assert hash_of(rest.model) == hash_of(whole.model)
    assert rest.history == whole.history


def test_training_stops_when_validation_does_not_get_better_and_keeps_the_best():
    series, made = small(), model()
    training = Training(made, Episodic(made), series, small(seed=1), lr=0.05, batch_size=20, epochs=200, patience=3)
    seen = []
    history = training.run(on_epoch=seen.append)
    assert seen == history
    assert len(history) < 200
    best = min(history, key=lambda epoch: epoch.validation)
    assert best.is_best
    assert history[-1].epoch == best.epoch + 3
    with torch.no_grad():
        assert Episodic(made)(training.validation, None, 1.0).item() == pytest.approx(best.validation, abs=1e-6)


def test_training_leaves_the_global_generator_alone():
    state = torch.random.get_rng_state()
    made = model()
    Training(made, Episodic(made), small(), epochs=1).run()
    assert torch.equal(state, torch.random.get_rng_state())
    torch.testing.assert_close(made.summary, made.encoder.states(Context(T, R).masks).mean(0))


def test_every_parameter_learns():
    made = nap()
    loss = Episodic(made, bound="np")(small(), torch.Generator().manual_seed(0), 1.0)
    loss.backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("y", "kind"),
    [
        (torch.arange(40) % 3, "multiclass"),
        (torch.stack([torch.arange(40) % 2, torch.arange(40) % 4 // 2], 1), "multilabel"),
        (torch.arange(40) / 7, "regression"),
    ],
)
def test_other_kinds_of_task_are_learned_too(y, kind):
    x = batch(n=40)
    series = make_series(x, y, kind=kind)
    made = FeatureNAP.of(series, hidden=6, latent=0)
    history = Training(made, Episodic(made, gate=0.0), series, lr=0.02, epochs=30, batch_size=40).run()
    assert history[-1].loss < history[0].loss


def test_retain_learns_and_its_training_needs_no_context():
    series, made = small(200), Retain(R, 1, hidden=8)
    Training(made, Plain(made, l2=0.0), series, lr=0.02, epochs=25).run()
    found = made(series.x, series.lengths).logits[:, 0] > 0
    assert (found == series.targets.bool()).double().mean() > 0.6


def test_finetuning_moves_attention_alone():
    made, series = nap(), small()
    before = {name: value.clone() for name, value in made.named_parameters()}
    found = finetune(made, series, Context.of(masks()), steps=8, lr=1e-2)
    assert len(found) == 8
    for name, value in made.named_parameters():
        assert torch.equal(value, before[name]) == name.startswith("output."), name
    assert torch.equal(made.preference, Context.of(masks()).preference)


def test_verdicts_move_what_was_trained_to_obey():
    """The right prediction moves the right way, with weights as they are: a short training is enough for that."""
    train = shift_task(300, shift=2.0, seed=0)
    test = shift_task(500, shift=0.0, seed=1, like=train)
    made = FeatureNAP.of(train, hidden=8, latent=2)
    Training(made, Episodic(made, per_batch=4), train, epochs=20, batch_size=100, lr=2e-2).run()
    weights = hash_of(made)

    def loss(context):
        made.update(context)
        return losses(made(test.x, test.lengths).logits, test.targets, "binary").mean().item()

    none = loss(Context(4, 12))
    right = loss(Context.of(shift_mask().unsqueeze(0)))
    wrong = loss(Context.of(shift_mask(off=CAUSAL).unsqueeze(0)))
    assert right < none - 0.03
    assert wrong > right + 0.1
    assert hash_of(made) == weights


def test_the_shortcut_task_has_its_shortcut_in_training_only():
    train = shift_task(4000, shift=1.2, seed=0)
    test = shift_task(4000, shift=0.0, seed=1, like=train)
    for series, has in ((train, True), (test, False)):
        sign = 2 * series.targets - 1
        found = (series.x * sign[:, None, None]).mean((0, 1)) * series.scaling.deviation
        for d in SHORTCUT:
            assert found[d] > 1 if has else abs(float(found[d])) < 0.1
    assert shift_mask().sum() == 40
    with pytest.raises(InputError, match="10 features"):
        shift_task(10, shift=0.0, seed=0, features=5)


@pytest.mark.parametrize("options", [{"lr": 0.0}, {"batch_size": 0}, {"epochs": 0}, {"patience": 0}])
def test_wrong_numbers(unchecked, options):
    made = model()
    with pytest.raises(InputError, match="must be"):
        Training(made, Episodic(made), small(), **options)
    with pytest.raises(InputError, match="bound"):
        Episodic(made, bound="elbo")
    with pytest.raises(InputError, match="no labels"):
        Training(made, Episodic(made), make_series(batch(), kind="binary"))
    with pytest.raises(InputError, match="steps"):
        finetune(copy.deepcopy(made), small(), Context(T, R), steps=0)


def test_parts_of_a_batch_sum_to_its_loss_and_gradient():
    made, train = nap(), small()
    objective = Episodic(made)

    def found(*parts):
        made.zero_grad()
        loss = sum(objective.part(train, torch.Generator().manual_seed(3), 0.5, part) for part in parts)
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in made.parameters()]

    whole, gradient = found(slice(len(train)))
    assert objective(train, torch.Generator().manual_seed(3), 0.5) == whole
    for parts in ((slice(0, 7), slice(7, len(train))), (slice(0, 0), slice(0, len(train)))):
        sum_, gradients = found(*parts)
        torch.testing.assert_close(sum_, whole)
        for one, other in zip(gradients, gradient, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_processes_need_an_objective_that_can_be_shared_and_enough_instances():
    made, two = nap(), World(0, 2)
    with pytest.raises(InputError, match="2 processes cannot share"):
        Training(made, lambda *_: None, small(), world=two)
    with pytest.raises(InputError, match="2 processes share batches of 1"):
        Training(made, Episodic(made), small(), batch_size=1, world=two)
