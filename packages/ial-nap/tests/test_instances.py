"""A context of instances, not of masks alone: what is said of some acts on those like them, and on no other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from nap_cases import LENGTHS, R, T, batch, hash_of, masks, shaken

from ial_nap.context import Context
from ial_nap.episodes import Episodes
from ial_nap.instances import Around, Likeness, Shown, labels_as_numbers, over_steps
from ial_nap.nap import Condition, FeatureNAP
from ial_nap.series import make_series
from ial_nap.training import Episodic, Training, finetune
from shared_core.errors import InputError

IDS = [f"p{k}" for k in range(6)]


def series(seed=0):
    return make_series(batch(seed), [0, 1, 1, 0, 1, 0], lengths=LENGTHS, ids=IDS)


def reading(context, **options):
    return shaken(FeatureNAP(T, R, 1, hidden=8, latent=3, context=context, **options))


def said(k=4, seed=0):
    return Context.of(masks(k, seed), ids=IDS[:k])


@pytest.mark.parametrize("context", ["full", "attentive"])
def test_order_does_not_matter_and_whom_masks_are_of_does(context):
    model, data = reading(context), series()
    model.update(said(), data)
    before = model(data.x, data.lengths).logits
    order = [2, 0, 3, 1]
    model.update(Context.of(masks(4)[order], ids=[IDS[k] for k in order]), data)
    torch.testing.assert_close(model(data.x, data.lengths).logits, before, atol=1e-6, rtol=0)
    model.update(Context.of(masks(4), ids=[IDS[k] for k in (1, 2, 3, 0)]), data)
    assert (model(data.x, data.lengths).logits - before).abs().max() > 1e-3
    model.update(said(), replace(data, y=1 - data.targets))
    assert (model(data.x, data.lengths).logits - before).abs().max() > 1e-4


@pytest.mark.parametrize("context", ["full", "attentive"])
def test_an_update_trains_nothing_and_is_taken_back_to_the_bit(context):
    model, data = reading(context), series()
    weights, start = hash_of(model), model.predict(data.x, data.lengths, samples=4).samples
    with torch.inference_mode():
        model.update(said(), data)
        moved = model.predict(data.x, data.lengths, samples=4).samples
    assert hash_of(model) == weights
    assert not torch.equal(moved, start)
    model.update(Context(T, R))
    assert torch.equal(model.predict(data.x, data.lengths, samples=4).samples, start)


@pytest.mark.parametrize("context", ["full", "attentive"])
def test_nothing_known_of_somebody_is_nothing_known(context):
    model, data = reading(context), series()
    unknown, around = torch.full((1, 2, T, R), -1, dtype=torch.int8), Around(data.x, data.lengths, LENGTHS * 0)
    shown = Shown.of(data, torch.tensor([[1, 4]]))
    one, two = (model.condition_on(unknown, shown=whom, around=around)[0] for whom in (shown, None))
    torch.testing.assert_close(one.z, two.z)
    torch.testing.assert_close(one.preference, two.preference)
    now = model.condition(x=data.x, lengths=data.lengths)
    torch.testing.assert_close(one.z, now.z)
    assert (now.preference == 0).all()


@pytest.mark.parametrize("context", ["full", "attentive"])
def test_contexts_given_with_the_batch_are_those_that_are_set(context):
    model, data = reading(context, hard=False), series()
    one, two = said(3, 1), said(3, 2)
    shown = Shown.of(data, torch.tensor([[0, 1, 2], [0, 1, 2]]))
    row = torch.arange(6) % 2
    around = Around(data.x, data.lengths, row)
    condition, latent = model.condition_on(torch.stack([one.masks, two.masks]), shown=shown, around=around)
    if context == "full":
        condition = Condition(condition.preference[row], condition.z[row])
    together = model.read(data.x, data.lengths, condition).logits
    for k, context_k in enumerate((one, two)):
        model.update(context_k, data)
        torch.testing.assert_close(model(data.x, data.lengths).logits[k::2], together[k::2], atol=1e-6, rtol=0)
    assert len(latent.mean) == (6 if context == "attentive" else 2)


def test_weights_are_those_of_the_formula_and_pool_each_head_by_itself():
    likeness, random = shaken(Likeness(R, 8)), torch.Generator().manual_seed(0)
    states, gated, keys = (torch.randn(shape, generator=random) for shape in ((6, T, 8), (6, T, R), (1, 3, 8)))
    found = likeness.weights(states, gated, LENGTHS, keys)
    torch.testing.assert_close(found.sum(2), torch.ones(6, 4))
    n = int(LENGTHS[1])
    query = likeness.to_query(torch.cat([states[1, :n].mean(0), gated[1, :n].mean(0)]))
    cosine = torch.nn.functional.cosine_similarity(query[2:4], keys[0, :, 2:4], dim=-1)
    torch.testing.assert_close(found[1, 1], (likeness.sharpness[1].exp() * cosine).softmax(0))
    values = torch.randn(1, 3, T, 8, generator=random)
    pooled = likeness.pooled(found, values)
    torch.testing.assert_close(pooled[1, :, 2:4], torch.einsum("k,ktd->td", found[1, 1], values[0, :, :, 2:4]))


def test_what_all_exclude_has_no_effect_even_on_who_is_like_whom():
    model, data = reading("attentive"), series()
    context = Context(T, R)
    for name in IDS[:3]:
        context.mark(name, [(t, 2, 0) for t in range(T)] + [(0, 1, 1)])
    x = data.x.clone().requires_grad_()
    model.update(context, data)
    (slope,) = torch.autograd.grad(model(x, data.lengths).logits.sum(), x)
    assert (slope[:, :, 2] == 0).all()
    assert (slope[:, :, 1] != 0).any()
    assert model.excluded()[:, 2].all()
    moved = data.x.clone()
    moved[:, :, 2] = 50
    assert torch.equal(model(moved, data.lengths).logits, model(data.x, data.lengths).logits)


def test_padding_changes_nothing_and_an_instance_does_not_depend_on_its_batch():
    model, data = reading("attentive"), series()
    model.update(said(), data)
    beyond = torch.arange(T) >= LENGTHS.unsqueeze(1)
    other = torch.where(beyond.unsqueeze(2), torch.full_like(data.x, 77.0), data.x)
    assert torch.equal(model(other, LENGTHS).logits, model(data.x, LENGTHS).logits)
    before = model.summary.clone()
    model.update(said(), replace(data, x=other))
    assert torch.equal(model.summary, before)
    whole = model.predict(data.x, LENGTHS, samples=4).samples
    torch.testing.assert_close(model.predict(data.x[2:3], LENGTHS[2:3], samples=4).samples, whole[:, 2:3])


def test_draws_agree_with_one_reading_after_the_other():
    model, data = reading("attentive", keep=1.0), series()
    model.update(said(), data)
    whole = model.predict(data.x, LENGTHS, samples=3, seed=4).samples
    condition = model.condition(3, 4, data.x, LENGTHS)
    for k in range(3):
        at = slice(6 * k, 6 * k + 6)
        found = model.read(data.x, LENGTHS, Condition(condition.preference[at], condition.z[at]), hard=True)
        torch.testing.assert_close(whole[k], found.logits.sigmoid())
    parts = model.contributions(data.x, LENGTHS)
    torch.testing.assert_close(parts.cells.sum((1, 2)) + parts.intercept, model(data.x, LENGTHS).logits)


def test_of_more_masks_than_the_limit_some_are_read():
    model, data = reading("attentive", limit=2), series()
    model.update(said(5), data)
    first = model(data.x, LENGTHS).logits
    model.update(said(5), data)
    assert torch.equal(model(data.x, LENGTHS).logits, first)


def test_no_instance_meets_its_own_label_among_those_annotated():
    data = series()
    objective = Episodic(reading("attentive"), rules=1.0)
    for seed in range(20):
        random = torch.Generator().manual_seed(seed)
        row = torch.arange(6) % 3
        drawn = Episodes(T, R).draw(3, random)
        off, shown, at = objective._of_instances(data, drawn, row, random)
        assert (row[at] != torch.arange(3).unsqueeze(1)).all()
        assert (off <= drawn.off[row]).all()
        assert torch.equal(shown >= 0, drawn.masks >= 0)
        changed = (shown != drawn.masks).any((2, 3))
        assert (shown != drawn.masks)[~drawn.off.unsqueeze(1).expand_as(shown)].sum() == 0
        assert not changed[drawn.off.flatten(1).sum(1) == 0].any()


GROUP, CAUSE, SHORTCUT = 5, 0, 1


def ruled(count, seed, *, everywhere, like=None):
    """A feature that gives the label away: in training to all, afterwards to one of two groups."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(count, 2, 6))
    group = random.integers(0, 2, count)
    y = (1.2 * x[:, :, CAUSE].mean(1) + 0.56 * random.logistic(size=count) > 0).astype(int)
    x[:, :, GROUP] = 2 * group[:, None] - 1 + 0.2 * random.normal(size=(count, 2))
    x[:, :, SHORTCUT] += (0.9 * (2 * y - 1) * (everywhere | (group == 0)))[:, None]
    return make_series(x, y, kind="binary", like=like), torch.from_numpy(group)


def test_a_rule_for_one_group_acts_on_that_group():
    train, group = ruled(300, 0, everywhere=True)
    test, other = ruled(300, 50, everywhere=False, like=train)
    context = Context(2, 6, schema=train.schema)
    for k in range(20):
        context.mark(train.ids[k], [(t, SHORTCUT, int(group[k] == 0)) for t in (0, 1)] + [(0, CAUSE, 1)])
    model = FeatureNAP.of(train, hidden=8, latent=4, context="attentive")
    episodes = Episodes(2, 6, most_masks=8)
    objective = Episodic(model, episodes=episodes, per_batch=4, by=[GROUP], rules=0.8)
    Training(model, objective, train, epochs=30, batch_size=100, lr=2e-2).run()
    model.update(context, train)

    def gates(of):
        with torch.no_grad():
            gate = of.gate(of.condition(x=test.x, lengths=test.lengths), hard=True).expand(len(test), -1, -1)
        return float(gate[other == 1, :, SHORTCUT].mean()), float(gate[other == 0, :, SHORTCUT].mean())

    ruled_out, allowed = gates(model)
    assert ruled_out < 0.5 < 0.8 < allowed
    # What is pooled over masks is the same for all.
    pooled = FeatureNAP.of(train, hidden=8, latent=4, context="full")
    pooled.update(context, train)
    assert gates(pooled)[0] == pytest.approx(gates(pooled)[1])


def test_fine_tuning_goes_on_from_the_instances():
    model, data = reading("attentive"), series()
    context = said()
    losses = finetune(model, data.part(range(4)), context, steps=5, lr=1e-2)
    assert losses[-1] < losses[0]
    after = model(data.x, LENGTHS).logits
    model.update(context, data)
    torch.testing.assert_close(model(data.x, LENGTHS).logits, after)


def test_labels_as_a_network_reads_them():
    x = batch()
    assert labels_as_numbers(make_series(x, [0, 1, 2, 0, 1, 2]))[4].tolist() == [0, 1, 0]
    assert labels_as_numbers(series())[:, 0].tolist() == [0, 1, 1, 0, 1, 0]
    assert labels_as_numbers(replace(series(), y=None)).tolist() == [[0.0]] * 6
    assert over_steps(torch.ones(2, 3, 1), torch.tensor([1, 3])).tolist() == [[1.0], [1.0]]


def test_wrong_arguments(unchecked):
    with pytest.raises(InputError, match=r"update\(context, series\) with series"):
        reading("full").update(said())
    with pytest.raises(InputError, match="annotated instance"):
        reading("full").update(Context.of(masks(1), ids=["nobody"]), series())
    with pytest.raises(InputError, match="context must be masks, full, attentive"):
        FeatureNAP(T, R, 1, context="labels")
    with pytest.raises(InputError, match="need a latent"):
        FeatureNAP(T, R, 1, latent=0, context="full")
    with pytest.raises(InputError, match="multiple of 4"):
        FeatureNAP(T, R, 1, hidden=6, context="attentive")
    with pytest.raises(InputError, match="use bound='prior'"):
        Episodic(reading("full"), bound="np")
    with pytest.raises(InputError, match="rules must be"):
        Episodic(reading("full"), by=[9])
    again = FeatureNAP(**reading("attentive").config)
    assert again.context == "attentive"
