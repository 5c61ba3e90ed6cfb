"""The model against what it promises: it adds up, obeys without training, forgets, and lets nothing through."""

from __future__ import annotations

import copy

import pytest
import torch
from nap_cases import LENGTHS, R, T, batch, hash_of, masks, nap

from ial_nap.context import Context
from ial_nap.nap import Condition, FeatureNAP, Latent, probabilities
from ial_nap.series import make_series
from shared_core.errors import InputError


@pytest.mark.parametrize(("outputs", "kind"), [(1, "binary"), (3, "multiclass"), (1, "regression"), (4, "multilabel")])
def test_contributions_add_up_to_the_logits(outputs, kind):
    model = nap(outputs, kind)
    for context in (Context(T, R), Context.of(masks())):
        model.update(context)
        found, parts = model(batch(), LENGTHS), model.contributions(batch(), LENGTHS)
        assert (parts.cells.sum((1, 2)) + parts.intercept - found.logits).abs().max() < 1e-5
        for k, length in enumerate(LENGTHS.tolist()):
            assert (parts.cells[k, length:] == 0).all()


def test_order_of_the_context_does_not_matter():
    model, one = nap(), masks(6)
    model.update(Context.of(one))
    before = model(batch(), LENGTHS).logits
    model.update(Context.of(one[[3, 1, 5, 0, 4, 2]]))
    torch.testing.assert_close(model(batch(), LENGTHS).logits, before, atol=1e-6, rtol=0)


def test_an_empty_context_is_that_of_nothing_known():
    model = nap()
    start = model(batch(), LENGTHS).logits
    model.update(Context.of(masks()))
    assert not torch.equal(model(batch(), LENGTHS).logits, start)
    model.update(Context.of(torch.full((1, T, R), -1)))
    assert torch.equal(model(batch(), LENGTHS).logits, start)
    model.update(Context(T, R))
    assert torch.equal(model(batch(), LENGTHS).logits, start)


def test_an_update_changes_no_parameter_needs_no_gradient_and_is_undone_to_the_bit():
    model, context = nap(), Context(T, R)
    before, start = hash_of(model), model.predict(batch(), LENGTHS, samples=5).samples
    with torch.inference_mode():
        context.add(masks(), ids=["a", "b", "c"])
        context.mark("d", [(t, 1, 0) for t in range(T)])
        model.update(context)
        moved = model.predict(batch(), LENGTHS, samples=5).samples
    assert hash_of(model) == before
    assert not torch.equal(moved, start)
    context.undo()
    context.undo()
    model.update(context)
    assert torch.equal(model.predict(batch(), LENGTHS, samples=5).samples, start)
    # What was set in inference mode does not stand in the way of training.
    model(batch(), LENGTHS).logits.sum().backward()
    assert model.output.weight.grad is not None


@pytest.mark.parametrize("rnn", ["gru", "lstm"])
def test_padding_changes_nothing(rnn):
    model = nap(rnn=rnn)
    model.update(Context.of(masks()))
    x = batch()
    beyond = torch.arange(T) >= LENGTHS.unsqueeze(1)
    other = torch.where(beyond.unsqueeze(2), torch.full_like(x, 77.0), x)
    assert torch.equal(model(x, LENGTHS).logits, model(other, LENGTHS).logits)
    taller = FeatureNAP(T + 3, R, 1, hidden=7, latent=3, rnn=rnn)
    state = {name: value for name, value in model.state_dict().items() if name not in {"preference", "summary"}}
    taller.load_state_dict(state, strict=False)
    taller.update(Context.of(torch.cat([masks(), torch.full((3, 3, R), -1, dtype=torch.int8)], 1)))
    longer = torch.cat([x, torch.full((6, 3, R), 77.0)], 1)
    torch.testing.assert_close(taller(longer, LENGTHS).logits, model(x, LENGTHS).logits, atol=1e-6, rtol=0)


def leak(model, feature):
    x = batch().requires_grad_()
    found = model.predict.__wrapped__(model, x, LENGTHS, samples=4).mean
    (slope,) = torch.autograd.grad(found.sum(), x)
    return float(slope[:, :, feature].abs().max())


def test_what_is_marked_not_to_attend_has_no_effect_at_all():
    model, context = nap(), Context(T, R)
    assert leak(model, 2) > 1e-5
    for annotator in "abcde":
        context.mark("x", [(t, 2, 0) for t in range(T)], annotator=annotator)
    model.update(context)
    assert leak(model, 2) == 0
    assert leak(model, 1) > 1e-5
    assert model.excluded()[:, 2].all()
    assert not model.excluded()[:, [0, 1, 3, 4]].any()
    moved = batch()
    moved[:, :, 2] = 1e3
    assert torch.equal(model(moved, LENGTHS).logits, model(batch(), LENGTHS).logits)
    model.hard = False
    assert leak(model, 2) > 0


def test_gating_beta_alone_would_leak():
    """The recurrent layers still read the feature: what other features contribute moves with it."""
    model, x = nap(), batch()
    moved = x.clone()
    moved[:, :, 2] += 1
    others = [0, 1, 3, 4]
    one, two = (model.contributions(values, LENGTHS).cells[:, :, others] for values in (x, moved))
    assert (one - two).abs().max() > 1e-3


def test_the_gate_opens_and_closes_with_the_number_of_verdicts():
    model = FeatureNAP(1, 3, 1, latent=0)
    assert model.gate(model.condition(), hard=False)[0, 0, 0].item() == pytest.approx(
        torch.tensor(2.0).sigmoid().item()
    )
    before = None
    for times in (1, 2, 5, 20):
        model.update(Context.of(torch.tensor([[[1, 0, -1]]] * times)))
        now = model.gate(model.condition(), hard=False)[0, 0]
        u = times / (times + 1)
        expected = torch.tensor([2 + 3 * u, 2 - 6 * u, 2.0]).sigmoid()
        torch.testing.assert_close(now, expected)
        assert before is None or (now[0] > before[0] and now[1] < before[1])
        before = now
    assert model.gate(model.condition(), hard=True)[0, 0, 1] == 0


def test_draws_are_the_same_for_every_context_and_however_instances_are_grouped():
    model = nap()
    first = model.condition(3, seed=1).z
    model.update(Context.of(masks()))
    second = model.condition(3, seed=1).z
    one, two = model.condition(0).z, model.gaussian()
    model.update(Context(T, R))
    three, four = model.condition(0).z, model.gaussian()
    torch.testing.assert_close((second - one) / two.deviation, (first - three) / four.deviation, atol=1e-4, rtol=0)
    whole = model.predict(batch(), LENGTHS, samples=4).samples
    torch.testing.assert_close(model.predict(batch()[3:], LENGTHS[3:], samples=4).samples, whole[:, 3:])
    assert not torch.equal(model.predict(batch(), LENGTHS, samples=4, seed=9).samples, whole)


def test_dropout_is_on_when_asked_for_and_off_otherwise():
    model = nap(latent=0)
    quiet = model.predict(batch(), LENGTHS, samples=40, dropout=False)
    loud = model.predict(batch(), LENGTHS, samples=40)
    assert quiet.spread.max() == 0
    assert loud.spread.min() > 1e-3
    torch.testing.assert_close(quiet.mean, model(batch(), LENGTHS).logits.sigmoid())


def test_draws_agree_with_one_reading_after_the_other():
    model = nap(keep=1.0)
    model.update(Context.of(masks()))
    whole = model.predict(batch(), LENGTHS, samples=3, seed=4).samples
    condition = model.condition(3, seed=4)
    for k in range(3):
        found = model.read(batch(), LENGTHS, Condition(condition.preference, condition.z[k : k + 1]), hard=True)
        torch.testing.assert_close(whole[k], found.logits.sigmoid())
    mean, variance = model.spread_of_contributions(batch(), LENGTHS, samples=3, seed=4)
    assert mean.shape == variance.shape == (6, T, R, 1)
    assert float(variance.min()) >= 0
    assert (variance > 0).any()


def test_error_of_the_mean_falls_with_the_square_root_of_draws():
    model = nap()
    x, lengths = batch(n=2), LENGTHS[:2]
    best = model.predict(x, lengths, samples=20000, seed=99).mean
    errors = []
    for samples in (10, 160):
        found = [model.predict(x, lengths, samples=samples, seed=s).mean for s in range(2, 62)]
        errors.append(float((torch.stack(found) - best).square().mean().sqrt()))
    assert 3.2 < errors[0] / errors[1] < 4.9


def test_gradient_of_the_reparameterised_latent():
    model = nap(keep=1.0).double()
    noise = torch.randn(2, T, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shown = torch.stack([masks(seed=1), masks(seed=2)])
    x, lengths = batch(n=2).double(), LENGTHS[:2]

    def loss(bias, weight):
        with torch.nn.utils.parametrize.cached():
            mean, deviation = model.encoder.to_mean, model.encoder.to_deviation
            old = mean.bias, deviation.weight
            del mean.bias, deviation.weight
            mean.bias, deviation.weight = bias, weight
            try:
                condition, latent = model.condition_on(shown, noise)
                return model.read(x, lengths, condition).logits.sum() + 0.1 * latent.kl().sum()
            finally:
                del mean.bias, deviation.weight
                mean.bias, deviation.weight = old

    bias = model.encoder.to_mean.bias.detach().clone().requires_grad_()
    weight = model.encoder.to_deviation.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, (bias, weight))


def test_divergence_is_that_of_torch():
    one = Latent(torch.randn(2, 3, 4), torch.rand(2, 3, 4) + 0.1)
    two = Latent(torch.randn(2, 3, 4), torch.rand(2, 3, 4) + 0.1)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(one.mean, one.deviation), normal(two.mean, two.deviation))
    torch.testing.assert_close(one.kl(two), expected.sum((1, 2)))
    expected = torch.distributions.kl_divergence(normal(one.mean, one.deviation), normal(0.0, 1.0))
    torch.testing.assert_close(one.kl(), expected.sum((1, 2)))


def test_contexts_given_with_the_batch_are_those_that_are_set():
    model = nap()
    several = torch.stack([masks(seed=1), masks(seed=2)])
    condition, latent = model.condition_on(several)
    together = model.read(batch(n=2), LENGTHS[:2], condition, hard=True).logits
    for k in range(2):
        model.update(Context.of(several[k]))
        torch.testing.assert_close(model(batch(n=2), LENGTHS[:2]).logits[k], together[k], atol=1e-6, rtol=0)
        torch.testing.assert_close(model.gaussian().mean[0], latent.mean[k], atol=1e-6, rtol=0)


def test_of_more_masks_than_the_limit_some_are_read_and_all_are_counted():
    model = nap(limit=4)
    context = Context.of(masks(10))
    model.update(context)
    assert torch.equal(model.preference, context.preference)
    first = model.summary.clone()
    model.update(context)
    assert torch.equal(model.summary, first)


def test_both_parts_of_the_variance():
    model = nap()
    found = model.predict(batch(), LENGTHS, samples=50)
    mean = found.mean
    torch.testing.assert_close(found.noise.square() + found.spread.square(), mean * (1 - mean), atol=1e-5, rtol=0)
    low, high = found.interval(0.9)
    assert (low <= mean).all()
    assert (mean <= high).all()
    assert torch.equal(nap(kind="regression").predict(batch(), LENGTHS).noise, torch.zeros(6, 1))
    torch.testing.assert_close(probabilities(torch.randn(3, 4), "multiclass").sum(1), torch.ones(3))


def test_weights_come_from_the_seed_alone_and_states_can_be_loaded():
    state = torch.random.get_rng_state()
    one, two = FeatureNAP(T, R, 1, seed=3), FeatureNAP(T, R, 1, seed=3)
    assert torch.equal(state, torch.random.get_rng_state())
    assert hash_of(one) == hash_of(two) != hash_of(FeatureNAP(T, R, 1, seed=4))
    model, other = nap(), nap(seed=5)
    model.update(Context.of(masks()))
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(model(batch(), LENGTHS).logits, other(batch(), LENGTHS).logits)
    again = FeatureNAP(**nap(rnn="lstm", keep=0.7).config)
    assert again.config == nap(rnn="lstm", keep=0.7).config
    series = make_series(batch().numpy(), [0, 1, 2, 0, 1, 2])
    assert FeatureNAP.of(series)(series.x, series.lengths).logits.shape == (6, 3)


@pytest.mark.parametrize("options", [{"hidden": 0}, {"latent": -1}, {"keep": 0.0}])
def test_wrong_sizes(unchecked, options):
    with pytest.raises(InputError, match=r"sizes must|keep must"):
        FeatureNAP(T, R, 1, **options)


def test_wrong_contexts(unchecked):
    with pytest.raises(InputError, match="context is of 2 steps and 5 features, the model of 4 and 5"):
        nap().update(Context(2, R))
    one = make_series(batch().numpy(), [0, 1] * 3, features=list("abcde"))
    other = Context(T, R, schema=make_series(batch().numpy(), [0, 1] * 3, features=list("abced")).schema)
    with pytest.raises(InputError, match="another set of features"):
        FeatureNAP.of(one).update(other)
    FeatureNAP.of(one).update(Context(T, R, schema=one.schema))
    with pytest.raises(InputError, match="expected"):
        nap().condition_on(torch.zeros(1, 2, 2, 2, dtype=torch.int8))
    with pytest.raises(InputError, match="samples"):
        nap().predict(batch(), LENGTHS, samples=0)
