"""A network of one's own behind the gate: it obeys without training, and leaks nothing."""

from __future__ import annotations

import pytest
import torch
from nap_cases import LENGTHS, R, T, batch, hash_of, masks
from torch import nn

from ial_nap.context import Context
from ial_nap.gated import GatedModel, wrap
from ial_nap.toys import shift_mask, shift_task
from ial_nap.training import Episodic, Training, losses
from shared_core.errors import InputError


def convolutional(features, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            _Swap(), nn.Conv1d(features, 8, 2), nn.Tanh(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 1)
        )


class _Swap(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


def test_what_is_marked_has_no_effect_and_nothing_is_trained():
    model, context = GatedModel(convolutional(R), T, R), Context(T, R)
    weights, start = hash_of(model), model(batch(), LENGTHS)
    context.mark("x", [(t, 3, 0) for t in range(T)])
    model.update(context)
    x = batch().requires_grad_()
    (slope,) = torch.autograd.grad(model(x, LENGTHS).sum(), x)
    assert (slope[:, :, 3] == 0).all()
    assert (slope[:, :, 2] != 0).any()
    assert model.excluded().sum() == T
    context.undo()
    model.update(context)
    assert torch.equal(model(batch(), LENGTHS), start)
    assert hash_of(model) == weights


def test_padding_changes_nothing():
    model, x = GatedModel(convolutional(R), T, R), batch()
    beyond = (torch.arange(T) >= LENGTHS.unsqueeze(1)).unsqueeze(2)
    assert torch.equal(model(x, LENGTHS), model(torch.where(beyond, torch.nan, x), LENGTHS))


def test_contexts_given_with_the_batch_are_those_that_are_set():
    model = GatedModel(convolutional(R), T, R, hard=False)
    condition, latent = model.condition_on(masks().unsqueeze(0))
    assert latent is None
    together = model.logits_under(batch(), LENGTHS, condition)
    model.update(Context.of(masks()))
    torch.testing.assert_close(model(batch(), LENGTHS), together)


class Transformer(nn.Module):
    """A network of a user's own: attention over steps that leaves padding out."""

    def __init__(self, features, steps, width=8):
        super().__init__()
        self.embedding = nn.Linear(features, width)
        self.place = nn.Parameter(torch.zeros(steps, width))
        layer = nn.TransformerEncoderLayer(width, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.output = nn.Linear(width, 1)

    def forward(self, x, lengths):
        beyond = torch.arange(x.shape[1]) >= lengths.unsqueeze(1)
        read = self.encoder(self.embedding(x) + self.place, src_key_padding_mask=beyond)
        return self.output(read.masked_fill(beyond.unsqueeze(2), 0).sum(1) / lengths.unsqueeze(1))


def made(kind, train, seed=0):
    if kind == "convolution":
        return wrap(convolutional(len(train.features), seed), train)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return wrap(Transformer(len(train.features), len(train.steps)), train, takes_lengths=True)


@pytest.mark.parametrize("kind", ["convolution", "transformer"])
def test_after_training_on_episodes_verdicts_help(kind):
    train = shift_task(300, shift=2.0, seed=0)
    test = shift_task(500, shift=0.0, seed=1, like=train)
    model = made(kind, train)
    Training(model, Episodic(model), train, epochs=25, batch_size=100, lr=2e-2).run()

    def loss():
        return losses(model(test.x, test.lengths), test.targets, "binary").mean().item()

    before = loss()
    model.update(Context.of(shift_mask().unsqueeze(0)))
    assert loss() < before - 0.03


def test_a_transformer_obeys_and_leaks_nothing():
    model, context = wrap(Transformer(R, T), (T, R), takes_lengths=True).eval(), Context(T, R)
    x = batch()
    beyond = (torch.arange(T) >= LENGTHS.unsqueeze(1)).unsqueeze(2)
    torch.testing.assert_close(model(torch.where(beyond, 77.0, x), LENGTHS), model(x, LENGTHS))
    context.mark("x", [(t, 3, 0) for t in range(T)])
    model.update(context)
    moved = x.clone()
    moved[:, :, 3] = 50
    assert torch.equal(model(moved, LENGTHS), model(x, LENGTHS))
    moved[:, 0, 2] += 1
    assert not torch.equal(model(moved, LENGTHS), model(x, LENGTHS))


def test_wrong_sizes(unchecked):
    with pytest.raises(InputError, match="steps and features"):
        GatedModel(nn.Flatten(), 0, 2)
    with pytest.raises(InputError, match="the model of 4 and 5"):
        GatedModel(nn.Flatten(), T, R).update(Context(2, R))
