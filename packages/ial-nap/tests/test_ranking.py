"""Rankings against closed forms of linear models, doing things one at a time, and what they must not depend on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from nap_cases import LENGTHS, R, T, batch, hash_of, masks, nap

from ial_nap.context import Context
from ial_nap.influence import influence_on
from ial_nap.nap import Predicted
from ial_nap.ranking import (
    CER,
    counterfactual,
    entropy,
    feature_influence,
    feature_uncertainty,
    margin,
    prediction_error,
    uncertainty,
)
from ial_nap.series import make_series
from shared_core.errors import InputError


def series(n=12, seed=0, y=None):
    x = torch.randn(n, T, R, generator=torch.Generator().manual_seed(seed))
    return make_series(x, (x[:, -1, 0] > 0).long() if y is None else y, lengths=LENGTHS.repeat(n)[:n])


WEIGHTS = torch.tensor([0.5, -1.0, 0.3, 0.0, 2.0])


def linear(x, lengths):
    return (x @ WEIGHTS).sum(1, keepdim=True).sigmoid()


def test_of_a_linear_model_the_counterfactual_is_known():
    full = torch.full((6,), T)
    found = counterfactual(linear, batch(), full)
    logit = (batch() @ WEIGHTS).sum(1)
    for d in range(R):
        expected = (logit.sigmoid() - (logit - WEIGHTS[d] * batch()[:, :, d].sum(1)).sigmoid()).abs()
        torch.testing.assert_close(found[:, :, d], expected.unsqueeze(1).expand(-1, T), atol=1e-6, rtol=1e-5)
    cells = counterfactual(linear, batch(), full, cells=True)
    expected = (logit.sigmoid() - (logit - WEIGHTS[1] * batch()[:, 2, 1]).sigmoid()).abs()
    torch.testing.assert_close(cells[:, 2, 1], expected, atol=1e-6, rtol=1e-5)


def test_counterfactuals_do_not_depend_on_the_order_of_features():
    order = torch.tensor([3, 0, 4, 1, 2])

    def permuted(x, lengths):
        return linear(x[:, :, order.argsort()], lengths)

    found = counterfactual(permuted, batch()[:, :, order], LENGTHS)
    torch.testing.assert_close(found, counterfactual(linear, batch(), LENGTHS)[:, :, order], atol=1e-6, rtol=0)


def test_counterfactuals_are_those_of_one_forward_pass_each():
    model = nap(3, "multiclass")
    model.update(Context.of(masks()))

    def predict(x, lengths):
        return model(x, lengths).logits.softmax(1)

    found = counterfactual(predict, batch(), LENGTHS, groups=[(1, 3)])
    for group in ((0,), (1, 3), (2,), (4,)):
        x = batch()
        x[:, :, group] = 0
        expected = (predict(x, LENGTHS) - predict(batch(), LENGTHS)).abs().sum(1)
        for d in group:
            for k, length in enumerate(LENGTHS.tolist()):
                torch.testing.assert_close(found[k, :length, d], expected[k].expand(length), atol=1e-6, rtol=0)
                assert (found[k, length:, d] == 0).all()


def test_a_baseline_of_ones_own():
    model_value = counterfactual(linear, batch(), torch.full((6,), T), baseline=torch.ones(R))
    x = batch()
    x[:, :, 4] = 1
    full = torch.full((6,), T)
    torch.testing.assert_close(model_value[:, 0, 4], (linear(x, full) - linear(batch(), full)).abs()[:, 0])


def test_scores_of_predictions():
    sure, open_, odd = [0.99], [0.5], [0.7]
    found = Predicted(torch.tensor([[sure, open_, odd], [sure, open_, [0.3]]]), "binary")
    assert uncertainty(found).tolist() == pytest.approx([0, 0, 0.04])
    assert prediction_error(found, torch.tensor([0.0, 1.0, 1.0])).tolist() == pytest.approx([0.99, 0.5, 0.5])
    h = torch.special.entr(torch.tensor([0.99, 0.01])).sum().item()
    assert entropy(found).tolist() == pytest.approx([h, 0.6931472, 0.6931472])
    assert margin(found).tolist() == pytest.approx([0.02, 1, 1])
    classes = Predicted(torch.tensor([[[0.7, 0.2, 0.1]]]), "multiclass")
    assert margin(classes).item() == pytest.approx(0.5)
    assert prediction_error(classes, torch.tensor([1])).item() == pytest.approx(0.8)
    with pytest.raises(InputError, match="regression has none"):
        entropy(Predicted(torch.ones(1, 1, 1), "regression"))


def test_an_excluded_feature_is_neither_uncertain_nor_influential():
    model, data, context = nap(), series(), Context(T, R)
    context.mark("x", [(t, 2, 0) for t in range(T)])
    model.update(context)
    influence = influence_on(model, data, series(seed=1))
    shown = CER(feature="counterfactual").feature_scores(model, data)
    for found in (feature_uncertainty(model, data, samples=6), feature_influence(influence, data, draws=3), shown):
        assert (found[:, :, 2] == 0).all()
        assert (found[:, 0, [0, 1, 3, 4]].amax(0) > 0).all()


def test_feature_influence_is_that_of_one_altered_instance_after_the_other():
    model, data = nap(), series()
    influence = influence_on(model, data, series(seed=1))
    found = feature_influence(influence, data, draws=2, seed=5)
    values = (2 * torch.rand(2, 12, R, generator=torch.Generator().manual_seed(5)) - 1) * 2
    k, d = 3, 1
    length = int(data.lengths[k])
    changes = []
    for draw in range(2):
        x = data.x.clone()
        x[k, :length, d] = values[draw, k, d]
        changes.append((influence.of(replace(data, x=x)) - influence.of(data)).abs()[k])
    torch.testing.assert_close(found[k, 0, d], torch.stack(changes).mean().float())


def test_every_combination_ranks_and_changes_nothing():
    model, data, other = nap(), series(), series(seed=1)
    weights = hash_of(model)
    for instance in ("uncertainty", "influence", "error", "entropy", "margin", "random"):
        for feature in ("counterfactual", "uncertainty", "influence", "random"):
            cer = CER(instance, feature, k=4, f=3, samples=4)
            found = cer.rank(model, data, other, seed=2)
            if instance == "uncertainty" or feature == "random":
                assert found == cer.rank(model, data, other, seed=2)
            assert len({item.instance for item in found}) == 4
            assert all(len(set(item.features)) == 3 for item in found)
            scores = [item.score for item in found]
            assert scores == sorted(scores, reverse=True)
            assert all(list(item.feature_scores) == sorted(item.feature_scores, reverse=True) for item in found)
    assert hash_of(model) == weights


def test_harmful_ones_come_first():
    model, data, other = nap(), series(), series(seed=1)
    found = influence_on(model, data, other).of(data)
    harmful = CER("influence", k=3).rank(model, data, other)
    assert [item.index for item in harmful] == found.argsort()[:3].tolist()
    assert "lower without it" in harmful[0].reason
    most = CER("influence", k=3, order="abs").rank(model, data, other)
    assert [item.index for item in most] == found.abs().argsort(descending=True)[:3].tolist()


def test_only_those_that_may_be_chosen_are():
    model, data = nap(), series()
    found = CER(k=2, samples=4).rank(model, data, among=[7, 3, 9])
    assert {item.index for item in found} < {3, 7, 9}
    assert all(data.ids[item.index] == item.instance for item in found)
    with pytest.warns(UserWarning, match="k = 10 is more than the 3"):
        assert len(CER(samples=2).rank(model, data, among=[7, 3, 9])) == 3


def test_columns_of_a_category_are_judged_together():
    model, data = nap(), series()
    cer = CER(groups=(("f1", "f3"),), samples=2)
    found = cer.feature_scores(model, data)
    assert torch.equal(found[:, :, 1], found[:, :, 3])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"instance": "luck"}, "instance 'luck' is unknown"),
        ({"feature": "luck"}, "feature 'luck'"),
        ({"order": "up"}, "order"),
        ({"scope": "all"}, "scope"),
        ({"k": 0}, "must be 1"),
    ],
)
def test_wrong_choices(unchecked, options, match):
    with pytest.raises(InputError, match=match):
        CER(**options)


def test_wrong_arguments(unchecked):
    model, data = nap(), series()
    with pytest.raises(InputError, match="validation"):
        CER("influence").rank(model, data)
    with pytest.raises(InputError, match="no instance left"):
        CER().rank(model, data, among=[])
    with pytest.raises(InputError, match="groups"):
        counterfactual(linear, batch(), LENGTHS, groups=[(0, 1), (1, 2)])
    with pytest.raises(InputError, match="groups"):
        counterfactual(linear, batch(), LENGTHS, groups=[(0, 9)])
