"""Other ways to heed verdicts against their formulas."""

from __future__ import annotations

import pytest
import torch
from nap_cases import LENGTHS, R, T, batch, masks, nap

from ial_nap.attention import Retain
from ial_nap.baselines import Annotated, attention_supervision, heed, majority_off, masked_logits, right_reasons
from ial_nap.context import Context
from ial_nap.series import make_series
from shared_core.errors import InputError


def series(n=6):
    x = batch(n=n)
    return make_series(x, torch.arange(n) % 2, lengths=LENGTHS, ids=[f"p{k}" for k in range(n)])


def test_attention_supervision_is_the_formula():
    random = torch.Generator().manual_seed(0)
    beta, shown = torch.randn(3, T, R, generator=random), masks(3)
    total, count = 0.0, 0
    for b, m in zip(beta, shown, strict=True):
        size = b.abs() / b.abs().max()
        total += float((size[m == 0] ** 2).sum() + ((1 - size[m == 1]) ** 2).sum())
        count += int((m >= 0).sum())
    assert attention_supervision(beta, shown).item() == pytest.approx(total / count, rel=1e-5)
    assert attention_supervision(beta, torch.full((3, T, R), -1, dtype=torch.int8)) == 0


def test_right_reasons_of_a_linear_model_are_its_weights():
    weight, shown = torch.randn(T, R, generator=torch.Generator().manual_seed(0)), masks(6)
    found = right_reasons(lambda x: (x * weight).sum((1, 2)), batch(), shown)
    torch.testing.assert_close(found, (weight.square() * (shown == 0)).sum() / 6)


def test_masked_attention_leaves_out_what_is_marked():
    model, data = Retain(R, 1, hidden=6, keep=1.0), series()
    random = torch.Generator().manual_seed(0)
    seen = masked_logits(model, data, torch.ones(6, T, R, dtype=torch.int8), random)
    torch.testing.assert_close(seen, model(data.x, data.lengths).logits)
    nothing = masked_logits(model, data, torch.zeros(6, T, R, dtype=torch.int8), random)
    torch.testing.assert_close(nothing, model.output.bias.expand(6, 1))
    with pytest.raises(InputError, match="embed=None"):
        masked_logits(Retain(R, 1, embed=9), data, masks(6), random)


def test_features_that_a_majority_excludes():
    context = Context(1, 3)
    for who, verdict in (("x", 0), ("y", 0), ("z", 1)):
        context.mark("a", [(0, 0, verdict), (0, 1, 1 - verdict)], annotator=who)
    assert majority_off(context).tolist() == [True, False, False]


def test_masks_go_with_their_instances():
    data, context = series(), Context(T, R)
    context.mark("p4", [(0, 1, 0)])
    context.mark("p2", [(1, 1, 1)])
    seen = Annotated.of(data, context)
    assert seen.series.ids == ("p4", "p2")
    assert seen.masks[0, 0, 1] == 0
    with pytest.raises(InputError, match="nothing is annotated"):
        Annotated.of(data, Context(T, R))


def test_heeding_lowers_the_penalty():
    model, data, shown = nap(keep=1.0), series(), masks(6)

    def penalty(_):
        return attention_supervision(model.read(data.x, data.lengths, model.condition()).beta, shown)

    before = penalty(None).item()
    heed(model, penalty, data, lambda s, g: model.read(s.x, s.lengths, model.condition()).logits, steps=30, lr=1e-2)
    assert penalty(None).item() < before
    with pytest.raises(InputError, match="steps"):
        heed(model, penalty, None, lambda s, g: s.x, steps=0)
