"""Each report against what is known: closed forms, recomputation from scratch, and models that are made to fail."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from nap_cases import hash_of
from nap_fitted import IDS, NAMES, OPTIONS, N, R, T, arrays, fitted, labels
from scipy.stats import spearmanr

from ial_nap.annotations import Annotation
from ial_nap.context import Context
from ial_nap.estimator import NAPClassifier
from ial_nap.reports import (
    certificate,
    certify,
    curves,
    faithfulness,
    stability,
    tax,
    value_of_information,
    who_moved,
)
from ial_nap.saving import load
from ial_nap.training import losses
from shared_core.errors import InputError

X, LENGTHS, _ = arrays()


@pytest.fixture(scope="module")
def all_kinds():
    return {kind: fitted(kind) for kind in ("binary", "multiclass", "multilabel", "regression")}


@pytest.fixture
def model(all_kinds):
    found = all_kinds["binary"]
    yield found
    found.replace([])
    found.context_.forget_past()


def ignore(name, instance="pid-0", who=""):
    return [Annotation(instance, t, name, 0, annotator=who) for t in range(T)]


# ---- faithfulness


def linear(n=7, seed=0):
    random = torch.Generator().manual_seed(seed)
    x, weights = torch.randn(n, T, R, generator=random), torch.randn(T, R, generator=random)
    inside = (torch.arange(T) < torch.tensor([3, 1, 2, 3, 3, 2, 1]).unsqueeze(1)).unsqueeze(2).expand(n, T, R)
    return x * inside, weights, inside


def test_curves_of_a_linear_model_are_sums_of_sorted_contributions():
    x, weights, inside = linear()
    shares = np.linspace(0, 1, 5)
    worth = x * weights
    deletion, insertion = curves(
        lambda values, at: (values * weights).sum((1, 2)) + 0.3, x, inside, worth, shares.tolist()
    )
    expected = np.zeros((2, 5))
    for k in range(len(x)):
        parts = np.sort(worth[k][inside[k]].double().numpy())[::-1]
        for column, share in enumerate(shares):
            first = parts[: int(np.round(share * len(parts)))].sum()
            expected[:, column] += np.array([parts.sum() - first, first]) / len(x) + 0.3 / len(x)
    np.testing.assert_allclose(deletion, expected[0], atol=1e-5)
    np.testing.assert_allclose(insertion, expected[1], atol=1e-5)


def test_no_order_is_better_than_that_of_a_linear_model_s_contributions():
    x, weights, inside = linear()

    def areas(worth):
        deletion, insertion = curves(
            lambda values, at: (values * weights).sum((1, 2)), x, inside, worth, np.linspace(0, 1, 13).tolist()
        )
        return deletion.sum(), -insertion.sum()

    best = areas(x * weights)
    random = torch.Generator().manual_seed(1)
    for _ in range(20):
        other = areas(torch.randn(x.shape, generator=random))
        assert (np.array(best) <= np.array(other) + 1e-5).all()


@pytest.mark.parametrize("kind", ["binary", "multiclass", "multilabel", "regression"])
def test_contributions_are_more_faithful_than_chance_and_their_opposite_less(all_kinds, kind):
    model = all_kinds[kind]
    found = faithfulness(model, X, lengths=LENGTHS, points=6, draws=2)
    assert found.deletion_gain > 0
    assert found.insertion_gain > 0
    # Both ends are the whole and nothing, in whichever order.
    for name in ("deletion", "insertion"):
        np.testing.assert_allclose(getattr(found, name)[[0, -1]], getattr(found, f"random_{name}")[[0, -1]], atol=1e-6)
    assert found.deletion[0] == pytest.approx(found.insertion[-1])
    if kind in {"binary", "regression"}:
        logits = model.model_(model.series(X, lengths=LENGTHS).x, torch.as_tensor(LENGTHS)).logits[:, 0]
        parts = model.model_.contributions(model.series(X, lengths=LENGTHS).x, torch.as_tensor(LENGTHS))
        sign = parts.cells.sum((1, 2, 3)).sign()
        assert found.deletion[0] == pytest.approx(float((logits * sign).mean().detach()), abs=1e-6)
        worst = faithfulness(
            model, X, lengths=LENGTHS, points=6, draws=2, worth=-(parts.cells[..., 0] * sign.view(-1, 1, 1)).detach()
        )
        assert worst.deletion_gain < 0 < found.deletion_gain
    assert found.deletion.tolist() == faithfulness(model, X, lengths=LENGTHS, points=6, draws=2).deletion.tolist()


def test_too_few_points_are_refused(model):
    for options in ({"points": 1}, {"draws": 0}):
        with pytest.raises(InputError, match="points must be 2 or more and draws 1 or more"):
            faithfulness(model, X, **options)


# ---- stability


def test_agreement_is_the_mean_rank_correlation(model):
    other = fitted(options={"seed": 5})
    found = stability([model, other, model], X, lengths=LENGTHS)
    sizes = [one.contributions(X, LENGTHS).cells[..., 0].abs().numpy() for one in (model, other)]
    each = [spearmanr(sizes[0][k, : LENGTHS[k]].ravel(), sizes[1][k, : LENGTHS[k]].ravel()).statistic for k in range(N)]
    assert found.agreement[0, 1] == pytest.approx(np.mean(each))
    assert found.agreement[0, 2] == pytest.approx(1)
    np.testing.assert_array_equal(found.agreement, found.agreement.T)
    assert found.low == pytest.approx(np.mean(each))
    assert found.mean == pytest.approx((2 * np.mean(each) + 1) / 3)
    with pytest.raises(InputError, match="two estimators or more, got 1"):
        stability([model], X)
    with pytest.raises(InputError, match=r"other sizes|trained on"):
        stability([model, NAPClassifier(**OPTIONS).fit(X[:, :, :2], labels("binary"))], X, lengths=LENGTHS)


# ---- certificates


def test_what_verdicts_exclude_is_certified(model):
    assert certificate(model).excluded.sum() == 0
    model.update(ignore("ward"))
    for given in ({}, {"x": X, "lengths": LENGTHS}):
        found = certificate(model, **given)
        assert found.holds
        assert (found.gradient, found.garbage) == (0, 0)
        assert found.excluded.sum() == T
        told = found.to_json()
        assert told["holds"] is True
        assert {cell["feature"] for cell in told["excluded"]} == {"ward"}
        assert told["context"] == model.context_hash
        assert told["instances"] == (N if given else 64)


def test_a_model_with_a_leak_gets_no_certificate(model):
    model.update(ignore("ward"))
    leaky = copy.deepcopy(model)
    closed = leaky.model_.excluded()
    leaky.model_.excluded = lambda: closed
    leaky.model_.hard = False
    found = certificate(leaky)
    assert not found.holds
    assert found.gradient > 0
    assert found.garbage > 0
    assert found.to_json()["holds"] is False


def test_each_check_finds_what_the_other_cannot():
    x, off = torch.randn(5, T, R, generator=torch.Generator().manual_seed(0)), torch.zeros(T, R, dtype=torch.bool)
    off[1, 2] = True
    # A step function has no slope; a slope that is cut off far out is no change of garbage of that size.
    slope, change = certify(lambda v: (v.sum(2) > 0).float() + 0 * v.sum(2), x, off)
    assert slope == 0 < change
    slope, change = certify(lambda v: torch.where(torch.isfinite(v), v, v)[:, :, 2] / 0.0, x, off)
    assert change == np.inf
    # Gating beta alone: the recurrent layer still reads the feature.
    layer = torch.nn.GRU(R, 3, batch_first=True)
    slope, change = certify(lambda v: (layer(v)[0].sum(2, keepdim=True) * torch.where(off, 0.0, v)).sum(1), x, off)
    assert slope > 0 < change


# ---- who moved


@pytest.mark.parametrize("kind", ["binary", "regression"])
@pytest.mark.parametrize("by", ["verdict", "mask", "annotator", "cell"])
def test_leaving_a_verdict_out_is_starting_anew_without_it(all_kinds, kind, by):
    model = all_kinds[kind]
    said = [
        *ignore("LDL", "pid-1", "a"),
        *ignore("LDL", "pid-2", "b"),
        Annotation("pid-1", 0, "age", 1, annotator="b"),
        Annotation("pid-2", 2, "HDL", 1, annotator="a"),
    ]
    model.replace(said)
    weights, digest, depth = hash_of(model.model_), model.context_hash, model.context_.depth
    now = model.predict_proba(X, LENGTHS) if kind == "binary" else model.predict(X, LENGTHS)
    found = who_moved(model, X, lengths=LENGTHS, by=by)
    assert (hash_of(model.model_), model.context_hash, model.context_.depth) == (weights, digest, depth)
    again = model.predict_proba(X, LENGTHS) if kind == "binary" else model.predict(X, LENGTHS)
    np.testing.assert_array_equal(again, now)
    assert len(found) == {"verdict": 8, "mask": 4, "annotator": 2, "cell": 5}[by]
    assert [one.size for one in found] == sorted((one.size for one in found), reverse=True)

    def predicted(annotations):
        anew = copy.deepcopy(model)
        anew.context_ = anew.context_.copy()
        anew.replace([])
        anew.update(annotations)
        logits = anew.logits(X, LENGTHS)
        return 1 / (1 + np.exp(-logits)) if kind == "binary" else logits

    for one in found:

        def is_in(a, one=one):
            told = {
                "verdict": (a.instance, a.annotator, a.step, a.feature),
                "mask": (a.instance, a.annotator, -1, ""),
                "annotator": ("", a.annotator, -1, ""),
                "cell": ("", "", a.step, a.feature),
            }[by]
            return told == (one.instance, one.annotator, one.step, one.feature)

        left = [a for a in said if not is_in(a)]
        assert len(said) - len(left) == one.verdicts
        np.testing.assert_allclose(one.change, predicted(said) - predicted(left), atol=1e-6, rtol=1e-4)
    model.replace([])


def test_without_verdicts_nobody_moved(unchecked, model):
    assert who_moved(model, X, lengths=LENGTHS) == []
    with pytest.raises(InputError, match="choose verdict, mask, annotator or cell"):
        who_moved(model, X, by="feature")


# ---- value of information


def realised(model, annotations):
    """Fall of the validation loss as verdicts are really given."""
    series = model.validation_

    def loss():
        with torch.no_grad():
            found = model.model_(series.x, series.lengths).logits
        return float(losses(found, series.targets, series.kind).double().mean())

    before = loss()
    model.update(annotations, allow_empty=True)
    after = loss()
    model.undo()
    return before - after


def test_the_value_of_a_verdict_is_what_giving_it_brings(model):
    model.update(ignore("HDL", "pid-9"))
    cells = [("pid-3", 0, "LDL"), ("pid-3", 2, "ward"), ("pid-9", 1, "age"), ("pid-9", 0, "HDL")]
    digest, depth = model.context_hash, model.context_.depth
    found = value_of_information(
        model, cells, off={"LDL": 0.25, "ward": 1.0, "age": 0.0, "HDL": 1.0}, seconds=dict.fromkeys(NAMES, 2.0)
    )
    assert (model.context_hash, model.context_.depth) == (digest, depth)
    assert sorted((one.instance, one.step, one.feature) for one in found) == sorted(cells)
    assert [one.per_second for one in found] == sorted((one.per_second for one in found), reverse=True)
    for one in found:
        falls = [realised(model, [Annotation(one.instance, one.step, one.feature, v)]) for v in (0, 1)]
        assert one.if_off == pytest.approx(falls[0], abs=1e-12)
        assert one.if_on == pytest.approx(falls[1], abs=1e-12)
        chance = {"LDL": 0.25, "ward": 1.0, "age": 0.0, "HDL": 1.0}[one.feature]
        assert one.gain == pytest.approx(chance * falls[0] + (1 - chance) * falls[1], abs=1e-12)
        assert one.per_second == pytest.approx(one.gain / 2)
    # What stands already brings nothing more.
    assert next(one for one in found if one.feature == "HDL").if_off == 0


def test_what_cannot_be_valued_is_refused(model, tmp_path):
    cell = [("pid-3", 0, "LDL")]
    for options, match in [
        ({"off": 1.5}, "off must be within 0 and 1"),
        ({"seconds": 0.0}, "seconds above 0"),
        ({"off": {"age": 1.0}}, "off has nothing of feature 'LDL'"),
    ]:
        with pytest.raises(InputError, match=match):
            value_of_information(model, cell, **options)
    with pytest.raises(InputError, match="unknown feature 'LDX'"):
        value_of_information(model, [("pid-3", 0, "LDX")])
    with pytest.raises(InputError, match="step 9"):
        value_of_information(model, [("pid-3", 9, "LDL")])
    model.save(tmp_path / "m.safetensors")
    loaded = load(tmp_path / "m.safetensors", device="cpu")
    with pytest.raises(InputError, match="give validation series"):
        value_of_information(loaded, cell)
    assert value_of_information(loaded, cell, model.validation_) == value_of_information(model, cell)
    with pytest.raises(InputError, match="RETAIN needs them"):
        tax(loaded, X, labels("binary"))


# ---- tax


def test_the_tax_compares_no_verdicts_with_retain(model):
    y = labels("binary")
    found = tax(model, X, y, lengths=LENGTHS, draws=20)
    model.update(ignore("LDL"))
    again = tax(model, X, y, lengths=LENGTHS, draws=20)
    assert found == again
    assert model.context_.verdicts == T
    model.replace([])
    report = model.score_report(X, y, lengths=LENGTHS)
    assert found.metric == "auroc"
    assert found.after == report.metrics["auroc"]
    assert found.low <= found.after - found.before <= found.high


def test_a_trial_leaves_no_trace_even_when_it_fails(model):
    model.update(ignore("age"))
    before, digest = model.logits(X, LENGTHS), model.context_hash

    def broken():
        with model.trial(Context(T, R)):
            assert model.context_hash != digest
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        broken()
    with pytest.raises(InputError, match="the context is of 4 steps"), model.trial(Context(T + 1, R)):
        pass
    assert model.context_hash == digest
    np.testing.assert_array_equal(model.logits(X, LENGTHS), before)
    assert IDS[0] in {instance for instance, _ in model.context_.keys}
