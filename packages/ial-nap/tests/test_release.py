"""The released form: it adds up, reads its context, and is not moved by it when it was trained on one only."""

from __future__ import annotations

import pytest
import torch
from nap_cases import LENGTHS, R, T, batch, masks, shaken

from ial_nap.context import Context
from ial_nap.release import ReleaseNAP
from ial_nap.simulation import score
from ial_nap.toys import shift_mask, shift_task
from ial_nap.training import Plain, Training
from shared_core.errors import InputError


def released(**options):
    return shaken(ReleaseNAP(R, 2, steps=T, hidden=6, seed=1, **options))


@pytest.mark.parametrize("legacy", [False, True])
def test_contributions_add_up_and_order_of_masks_does_not_matter(legacy):
    model = released(legacy_time=legacy)
    start = model(batch(), LENGTHS).logits
    model.update(Context.of(masks(5)))
    found, parts = model(batch(), LENGTHS), model.contributions(batch(), LENGTHS)
    assert (parts.cells.sum((1, 2)) + parts.intercept - found.logits).abs().max() < 1e-5
    assert (found.logits - start).abs().max() > 1e-3
    model.update(Context.of(masks(5).flip(0)))
    torch.testing.assert_close(model(batch(), LENGTHS).logits, found.logits, atol=1e-6, rtol=0)
    model.update(Context.of(torch.full((1, T, R), -1)))
    assert torch.equal(model(batch(), LENGTHS).logits, start)


def test_the_latent_meets_the_states_of_its_own_step():
    """What is said of a later step alone does not reach an earlier one's z, the encoder reading forwards."""
    early = torch.full((1, T, R), -1)
    late = early.clone()
    late[0, T - 1] = 1
    full = torch.full((6,), T)
    for legacy, moved in ((False, T - 1), (True, 0)):
        model = released(legacy_time=legacy)
        found = []
        for shown in (early, late):
            model.update(Context.of(shown))
            found.append(model(batch(), full).beta)
        change = (found[0] - found[1]).abs().amax((0, 2))
        assert change[moved] > 1e-3
        assert change[[t for t in range(T) if t != moved]].max() < 1e-6


def test_a_draw_is_shared_by_the_batch():
    model = released(keep=1.0)
    model.update(Context.of(masks(60, seed=3)))
    whole = model(batch(), LENGTHS, torch.Generator().manual_seed(1)).logits
    part = model(batch()[2:4], LENGTHS[2:4], torch.Generator().manual_seed(1)).logits
    torch.testing.assert_close(whole[2:4], part)


def test_trained_on_one_context_it_learns_nothing_from_others():
    train = shift_task(200, shift=1.2, seed=0)
    test = shift_task(500, shift=0.0, seed=1, like=train)
    model = ReleaseNAP(12, 1, steps=4, hidden=8)
    Training(model, Plain(model), train, epochs=15, lr=1e-2).run()
    with torch.no_grad():
        before = score(model(test.x, test.lengths).logits.sigmoid(), test)
        model.update(Context.of(shift_mask().repeat(20, 1, 1)))
        after = score(model(test.x, test.lengths).logits.sigmoid(), test)
    assert abs(after - before) < 0.01
    assert {id(p) for p in model.generators()}.isdisjoint(id(p) for p in model.output.parameters())


def test_a_context_of_other_sizes(unchecked):
    with pytest.raises(InputError, match="the model of 4 and 5"):
        released().update(Context(2, R))
