"""Contributions add up, time runs the right way round, and padding is not there."""

from __future__ import annotations

import copy

import pytest
import torch

from ial_nap.attention import Retain, Uncertain, dropped, lstm_or_gru, masked_softmax, positive, reverse_by_length
from ial_nap.series import make_series
from ial_nap.training import Plain, Training
from shared_core.errors import InputError

LENGTHS = torch.tensor([5, 3, 1, 4])


def batch(seed=0, r=3):
    return torch.randn(4, 5, r, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("outputs", [1, 4])
@pytest.mark.parametrize("kind", [Retain, Uncertain])
@pytest.mark.parametrize("embed", [None, 7])
def test_contributions_add_up_to_the_logits(kind, outputs, embed):
    model = kind(3, outputs, hidden=6, embed=embed, seed=1)
    for seed in (None, 3):
        drawn = [None if seed is None else torch.Generator().manual_seed(seed) for _ in range(2)]
        found = model(batch(), LENGTHS, drawn[0])
        parts = model.contributions(batch(), LENGTHS, drawn[1])
        assert (parts.cells.sum((1, 2)) + parts.intercept - found.logits).abs().max() < 1e-5


def test_contributions_are_those_of_the_formula():
    model, x = Retain(3, 2, hidden=6, seed=1), batch()
    found, parts = model(x, LENGTHS), model.contributions(x, LENGTHS)
    w, v = model.output.weight, model.embedding.weight
    for b, t, d, c in ((0, 4, 2, 1), (1, 1, 0, 0), (3, 3, 1, 1)):
        expected = found.alpha[b, t] * (w[c] @ (found.beta[b, t] * v[:, d])) * x[b, t, d]
        torch.testing.assert_close(parts.cells[b, t, d, c], expected)


@pytest.mark.parametrize("rnn", ["gru", "lstm"])
def test_padding_changes_nothing(rnn):
    model = Retain(3, 1, hidden=6, rnn=rnn, seed=2)
    x = batch()
    longer = torch.cat([x, torch.full((4, 3, 3), 100.0)], 1)
    one, two = model(x, LENGTHS), model(longer, LENGTHS)
    torch.testing.assert_close(one.logits, two.logits, atol=1e-6, rtol=0)
    torch.testing.assert_close(one.alpha, two.alpha[:, :5], atol=1e-6, rtol=0)
    assert (two.alpha[:, 5:] == 0).all()
    alone = model(x[1:2, :3], LENGTHS[1:2])
    torch.testing.assert_close(alone.logits, one.logits[1:2], atol=1e-6, rtol=0)


def test_attention_is_that_of_its_own_step():
    """Attentions of step t are read off a state that has seen steps t and later, and no earlier one."""
    model, x = Retain(3, 1, hidden=6, seed=2), batch()
    changed = x.clone()
    changed[0, 1] += 1
    moved = (model(x, LENGTHS).beta - model(changed, LENGTHS).beta).abs().sum(2)
    assert (moved[0, 2:] == 0).all()
    assert (moved[0, :2] > 0).all()
    assert (moved[1:] == 0).all()


def test_reversing_by_length_undoes_itself():
    x = batch()
    back = reverse_by_length(x, LENGTHS)
    assert torch.equal(reverse_by_length(back, LENGTHS), x)
    assert torch.equal(back[1, :3], x[1, :3].flip(0))
    assert torch.equal(back[1, 3:], x[1, 3:])


def test_softmax_over_real_steps():
    scores = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    found = masked_softmax(scores, LENGTHS)
    torch.testing.assert_close(found.sum(1), torch.ones(4))
    for k, length in enumerate(LENGTHS.tolist()):
        torch.testing.assert_close(found[k, :length], scores[k, :length].softmax(0))
    with pytest.raises(InputError, match="length 0"):
        masked_softmax(scores, torch.tensor([1, 0, 1, 1]))


def test_gaussian_attention_is_drawn_from_the_generator_alone():
    state = torch.random.get_rng_state()
    model = Uncertain(3, 1, hidden=6, keep=1.0)
    one, two = (model(batch(), LENGTHS, torch.Generator().manual_seed(5)).logits for _ in range(2))
    other = model(batch(), LENGTHS, torch.Generator().manual_seed(6)).logits
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(
        Uncertain(3, 1, hidden=6, seed=4).to_beta.weight, Uncertain(3, 1, hidden=6, seed=4).to_beta.weight
    )


def test_gaussian_attention_without_spread_is_its_mean():
    model = Uncertain(3, 1, hidden=6, keep=1.0)
    tight = copy.deepcopy(model)
    with torch.no_grad():
        for layer in (tight.alpha_spread, tight.beta_spread):
            layer.weight.zero_()
            layer.bias.fill_(-50.0)
    found = tight(batch(), LENGTHS, torch.Generator().manual_seed(5)).logits
    torch.testing.assert_close(found, model(batch(), LENGTHS).logits, atol=1e-3, rtol=0)


def test_with_plus_the_logits_are_drawn_about_those_of_the_attention():
    model = Uncertain(3, 2, hidden=6, keep=1.0, plus=True, seed=1)
    bare = Uncertain(3, 2, hidden=6, keep=1.0, seed=1)
    assert torch.equal(model(batch(), LENGTHS).logits, bare(batch(), LENGTHS).logits)
    found, without = (kind(batch(), LENGTHS, torch.Generator().manual_seed(5)) for kind in (model, bare))
    assert torch.equal(found.alpha, without.alpha)
    many, lengths = batch().repeat(500, 1, 1), LENGTHS.repeat(500)
    with torch.no_grad():
        found, without = (kind(many, lengths, torch.Generator().manual_seed(6)) for kind in (model, bare))
        seen = torch.einsum("bt,btm,btm->bm", found.alpha, found.beta, model.embedding(many))
        drawn = (found.logits - without.logits) / positive(model.output_spread(seen))
    assert abs(float(drawn.mean())) < 0.06
    assert float(drawn.std()) == pytest.approx(1, abs=0.05)
    train = make_series(batch(), [0, 1, 2, 1], lengths=LENGTHS)
    model = Uncertain(3, 3, hidden=6, plus=True)
    before = Plain(model)(train, None, 1.0)
    Training(model, Plain(model), train, epochs=10, lr=5e-2).run()
    assert Plain(model)(train, None, 1.0) < before
    assert model.output_spread.weight.grad is not None


def test_dropping_keeps_the_mean_and_is_the_same_at_every_step():
    ones = torch.ones(2000, 3, 4)
    found = dropped(ones, 0.8, torch.Generator().manual_seed(0))
    assert abs(float(found.mean()) - 1) < 0.02
    assert torch.equal(found[:, 0], found[:, 2])
    assert dropped(ones, 0.8, None) is ones


def test_deviations_stay_within_bounds():
    found = positive(torch.tensor([-1e4, 0.0, 1e4]))
    assert float(found[0]) == pytest.approx(1e-4)
    assert float(found[2]) == 10


def test_an_unknown_layer(unchecked):
    with pytest.raises(InputError, match="choose gru or lstm"):
        lstm_or_gru("rnn", 1, 1)
