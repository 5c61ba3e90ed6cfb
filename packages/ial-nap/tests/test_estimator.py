"""The estimators: what they promise about predictions, verdicts and interruptions, and what they refuse."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from nap_cases import hash_of
from nap_fitted import IDS, NAMES, OPTIONS, STEPS, UNITS, N, R, T, arrays, fitted, labels
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import cross_val_score

from ial_nap.annotations import Annotation
from ial_nap.context import Context
from ial_nap.estimator import Annotations, NAPClassifier, NAPRegressor, aligned
from ial_nap.ranking import CER
from ial_nap.series import make_series
from shared_core.errors import InputError, UnknownKeyError

KINDS = ("binary", "multiclass", "multilabel", "regression")
X, LENGTHS, _ = arrays()


@pytest.fixture(scope="module")
def all_kinds():
    return {kind: fitted(kind) for kind in KINDS}


@pytest.fixture
def model(all_kinds):
    """One whose verdicts are taken back afterwards."""
    found = all_kinds["binary"]
    yield found
    found.replace([])
    found.context_.forget_past()


def said(*cells, instance="pid-3", who=""):
    return [Annotation(instance, t, name, verdict, annotator=who) for t, name, verdict in cells]


def ignore(name, instance="pid-0", who=""):
    return said(*[(t, name, 0) for t in range(T)], instance=instance, who=who)


# ---- predictions


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_have_the_shapes_types_and_sums_that_they_should(all_kinds, kind):
    model = all_kinds[kind]
    y = labels(kind)
    assert model.kind_ == kind
    mean, std = model.predict_dist(X, LENGTHS)
    low, high = model.interval(X, 0.8, lengths=LENGTHS)
    assert mean.shape == std.shape == low.shape == high.shape
    assert (low <= mean + 1e-6).all()
    assert (mean <= high + 1e-6).all()
    assert (std > 0).all()
    assert np.isfinite(model.score(X, y, lengths=LENGTHS))
    if kind == "regression":
        assert mean.shape == (N,)
        np.testing.assert_array_equal(model.predict(X, LENGTHS), mean)
        assert 300 < mean.mean() < 700
        return
    proba, found = model.predict_proba(X, LENGTHS), model.predict(X, LENGTHS)
    if kind == "multilabel":
        assert proba.shape == found.shape == y.shape
        assert set(np.unique(found)) <= {0, 1}
        np.testing.assert_array_equal(found, proba > 0.5)
    else:
        assert model.classes_.tolist() == sorted(set(y.tolist()))
        np.testing.assert_allclose(proba.sum(1), 1, atol=1e-6)
        np.testing.assert_array_equal(found, model.classes_[proba.argmax(1)])
        assert model.score(X, y, lengths=LENGTHS) == pytest.approx((found == y).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_contributions_add_up_to_what_is_predicted_without_draws(all_kinds, kind):
    model = all_kinds[kind]
    for change in (lambda: None, lambda: model.update(ignore("age"))):
        change()
        parts = model.contributions(X, LENGTHS)
        total = parts.cells.sum((1, 2)) + parts.intercept
        found = model.logits(X, LENGTHS)
        scale = model.series_.scaling.target_deviation
        assert np.abs(total.numpy() - found).max() < 1e-5 * max(1, scale)
        if kind != "regression":
            np.testing.assert_array_equal(model.decision_function(X, LENGTHS).reshape(N, -1), found)
    assert (parts.cells[:, :, NAMES.index("age")] == 0).all()
    model.replace([])


def test_predictions_of_a_regression_are_in_the_unit_of_the_target():
    x, y = X[:, :, :2], labels("regression")
    one = NAPRegressor(**OPTIONS).fit(x, y)
    two = NAPRegressor(**OPTIONS).fit(x, 7 + 100 * y)
    for name in ("predict", "logits"):
        np.testing.assert_allclose(getattr(two, name)(x), 7 + 100 * getattr(one, name)(x), rtol=2e-4)
    np.testing.assert_allclose(two.predict_dist(x)[1], 100 * one.predict_dist(x)[1], rtol=1e-2)
    parts = [model.contributions(x).cells.numpy() for model in (one, two)]
    np.testing.assert_allclose(parts[1], 100 * parts[0], atol=1e-2 * np.abs(parts[1]).max())
    assert one.score_report(x, y).metrics["mae"] == pytest.approx(np.abs(one.predict(x) - y).mean(), rel=1e-4)


def test_what_is_beyond_the_length_of_an_instance_is_never_read(all_kinds):
    other = X.copy()
    for k, length in enumerate(LENGTHS):
        other[k, length:] = np.nan if k % 2 else 1e6
    np.testing.assert_array_equal(
        all_kinds["binary"].predict_proba(other, LENGTHS), all_kinds["binary"].predict_proba(X, LENGTHS)
    )
    again = NAPClassifier(**OPTIONS).fit(other, labels("binary"), lengths=LENGTHS, ids=IDS)
    assert hash_of(again.model_) == hash_of(all_kinds["binary"].model_)


def test_a_missing_value_reads_as_the_mean():
    holes = X.copy()
    holes[:7, 1, 2] = np.nan
    with pytest.raises(InputError, match=r"x\[0, 1, 2\] .*feature 'f2'.* is NaN: fill it, or give missing='mask'"):
        NAPClassifier(**OPTIONS).fit(holes, labels("binary"))
    model = NAPClassifier(**OPTIONS, missing="mask").fit(holes, labels("binary"))
    filled = holes.copy()
    filled[:7, 1, 2] = model.series_.scaling.mean[2].item()
    np.testing.assert_allclose(model.predict_proba(holes), model.predict_proba(filled), atol=1e-6)
    assert (model.contributions(holes).cells[:7, 1, 2] == 0).all()


def test_attention_adds_up_and_is_closed_where_verdicts_close_it(model):
    found = model.attention(X, LENGTHS)
    assert found.alpha.shape == found.alpha_std.shape == (N, T)
    assert found.beta.shape == found.beta_std.shape == (N, T, R)
    torch.testing.assert_close(found.alpha.sum(1), torch.ones(N))
    assert (found.beta_std > 0).any()
    model.update(ignore("ward"))
    assert (model.attention(X, LENGTHS).beta[:, :, 3] == 0).all()
    assert (model.attention(X, LENGTHS).beta_std[:, :, 3] == 0).all()


def test_a_thousand_rows_are_those_of_one_row_at_a_time(model, monkeypatch):
    whole = model.logits(X, LENGTHS), model.contributions(X, LENGTHS).cells
    monkeypatch.setattr("ial_nap.estimator._ROWS", 7)
    np.testing.assert_allclose(model.logits(X, LENGTHS), whole[0], atol=1e-6)
    torch.testing.assert_close(model.contributions(X, LENGTHS).cells, whole[1])


# ---- scikit-learn


def test_it_is_an_estimator_of_scikit_learn():
    model = NAPClassifier(**OPTIONS, protocol="paper", missing="mask")
    assert clone(model).get_params() == model.get_params()
    assert repr(model) == repr(clone(model))
    assert set(NAPRegressor().get_params()) == set(model.get_params())
    assert model.set_params(hidden=9).hidden == 9
    scores = cross_val_score(NAPClassifier(**{**OPTIONS, "epochs": 1}), X, labels("binary"), cv=2)
    assert scores.shape == (2,)
    assert np.isfinite(scores).all()
    for name in ("predict", "contributions", "update", "series"):
        with pytest.raises(NotFittedError, match="not fitted yet"):
            getattr(model, name)(X)


def test_a_fitted_estimator_can_be_copied_and_goes_its_own_way(model):
    other = copy.deepcopy(model)
    other.update(ignore("LDL"))
    assert len(model.context_) == 0
    assert not np.array_equal(other.predict_proba(X, LENGTHS), model.predict_proba(X, LENGTHS))
    other.undo()
    np.testing.assert_array_equal(other.predict_proba(X, LENGTHS), model.predict_proba(X, LENGTHS))


def test_fitting_again_forgets_all_verdicts():
    model = fitted(options={"epochs": 1})
    first = hash_of(model.model_)
    model.update(ignore("LDL"))
    model.fit(X, labels("binary"), lengths=LENGTHS)
    assert len(model.context_) == 0
    assert hash_of(model.model_) == first
    assert not model.model_.excluded().any()


def test_names_and_series_are_there_after_fitting(model):
    assert model.series_.features == NAMES
    assert model.series_.steps == STEPS
    assert model.units_ == UNITS
    assert len(model.series_) == 0
    assert model.n_features_in_ == R
    assert model.feature_names_in_.tolist() == list(NAMES)
    assert len(model.train_) + len(model.validation_) == N
    assert set(model.train_.ids) | set(model.validation_.ids) == set(IDS)
    assert len(model.history_) == OPTIONS["epochs"]
    # The scaling is that of what was trained on, and of nothing else.
    at = [IDS.index(name) for name in model.train_.ids]
    real = np.arange(T) < LENGTHS[at][:, None]
    np.testing.assert_allclose(model.series_.scaling.mean.numpy(), X[at][real].mean(0), rtol=1e-5)


# ---- what is held out


@pytest.mark.parametrize("kind", KINDS)
def test_a_fifth_is_held_out_from_every_class_by_the_seed(kind):
    one, two, three = (fitted(kind, options={"epochs": 1, "seed": seed}) for seed in (0, 0, 1))
    assert one.validation_.ids == two.validation_.ids != three.validation_.ids
    assert len(one.validation_) == N // 5
    y, part = one.train_.targets, one.validation_.targets
    if kind in {"binary", "multiclass"}:
        for value in y.unique():
            assert abs(float((part == value).float().mean() - (y == value).float().mean())) < 0.12
    elif kind == "regression":
        assert abs(float(part.mean() - y.mean())) < 0.2


def test_a_class_of_one_instance_is_trained_on():
    y = labels("binary").astype(object)
    y[4] = "rare"
    for seed in range(4):
        model = NAPClassifier(**{**OPTIONS, "epochs": 1, "seed": seed}).fit(X, y)
        assert model.classes_.tolist() == ["ill", "rare", "well"]
        assert "4" in model.train_.ids


def test_few_instances_are_all_trained_on():
    model = NAPClassifier(**{**OPTIONS, "epochs": 1}).fit(X[:4], [0, 1, 0, 1])
    assert model.validation_ is None
    assert len(model.train_) == 4


def test_validation_comes_as_arrays_or_as_series_of_any_scaling(unchecked):
    x, lengths, _ = arrays(seed=5, n=30)
    y = labels("binary", seed=5, n=30)
    one = fitted(validation=(x, y, lengths))
    codes = np.searchsorted(["ill", "well"], y)
    raw = make_series(x, codes, lengths=lengths, features=NAMES, steps=STEPS)
    two = fitted(validation=raw)
    torch.testing.assert_close(two.validation_.x, one.validation_.x, atol=1e-4, rtol=1e-4)
    assert len(one.train_) == N
    assert hash_of(one.model_) == hash_of(fitted(validation=(x, y, lengths)).model_)
    with pytest.raises(InputError, match=r"validation: x has 3 features, the model was trained on 4"):
        fitted(validation=(x[:, :, :3], y))
    with pytest.raises(InputError, match=r"\(x, y\), \(x, y, lengths\) or a Series"):
        fitted(validation=(x,))
    with pytest.raises(InputError, match=r"y\[0\] = 'dead' is not a class of the training: 'ill', 'well'"):
        fitted(validation=(x, np.full(30, "dead")))


def test_ready_series_give_the_same_model_as_their_arrays(model):
    ready = fitted(validation=model.validation_.part([0]), options={"epochs": 1})
    again = NAPClassifier(**{**OPTIONS, "epochs": 1}).fit(ready.train_, validation=ready.validation_)
    assert hash_of(again.model_) == hash_of(ready.model_)
    assert again.classes_.tolist() == [0, 1]
    assert NAPClassifier(**{**OPTIONS, "epochs": 1}).fit(ready.train_).validation_ is not None
    with pytest.raises(InputError, match="NAPRegressor cannot learn a binary task: use NAPClassifier"):
        NAPRegressor().fit(ready.train_)
    with pytest.raises(InputError, match="x is a Series: labels, lengths and names are in it"):
        NAPClassifier().fit(ready.train_, labels("binary"))


def test_series_in_another_scaling_are_brought_into_the_training_s(model):
    raw = make_series(X, None, kind="binary", lengths=LENGTHS, features=NAMES, steps=STEPS, standardise=False)
    np.testing.assert_allclose(model.predict_proba(raw), model.predict_proba(X, LENGTHS), atol=1e-5)
    target = make_series(X, labels("regression"), features=NAMES, steps=STEPS)
    other = make_series(X, 3 * labels("regression"), features=NAMES, steps=STEPS)
    back = aligned(other, target)
    scaling = target.scaling
    np.testing.assert_allclose(scaling.raw_target(back.targets).numpy(), 3 * labels("regression"), rtol=1e-5)
    with pytest.raises(InputError, match=r"other features than the training: 'HDL' where the training has 'LDL'"):
        aligned(make_series(X, labels("regression"), features=["HDL", "LDL", "age", "ward"], steps=STEPS), target)
    with pytest.raises(InputError, match=r"other steps than the training"):
        aligned(make_series(X, labels("regression"), features=NAMES), target)
    with pytest.raises(InputError, match=r"of a binary task, the model of a regression one"):
        aligned(make_series(X, np.arange(N) % 2, features=NAMES, steps=STEPS), target)


# ---- interruptions


class Stop(Exception):
    pass


def test_an_interrupted_training_goes_on_to_the_bit(tmp_path):
    file = tmp_path / "fit.safetensors"
    whole = fitted(options={"epochs": 6})
    epochs = []

    def stop(epoch):
        epochs.append(epoch.epoch)
        if epoch.epoch in {2, 3}:
            raise Stop

    for _ in range(2):
        with pytest.raises(Stop):
            fitted(options={"epochs": 6}, checkpoint=file, on_epoch=stop)
        assert file.exists()
    again = fitted(options={"epochs": 6}, checkpoint=file, on_epoch=stop)
    assert epochs == [1, 2, 3, 4, 5, 6]
    assert hash_of(again.model_) == hash_of(whole.model_)
    assert again.history_ == whole.history_
    np.testing.assert_array_equal(again.predict_proba(X, LENGTHS), whole.predict_proba(X, LENGTHS))
    assert not file.exists()


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    file = tmp_path / "fit.safetensors"

    def stop(_):
        raise Stop

    with pytest.raises(Stop):
        fitted(checkpoint=file, on_epoch=stop)
    before = file.read_bytes()
    for change in ({"options": {"lr": 1e-2}}, {"validation": (X, labels("binary"))}, {"kind": "multiclass"}):
        with pytest.raises(InputError, match="checkpoint of another training"):
            fitted(checkpoint=file, **change)
    assert file.read_bytes() == before
    file.write_bytes(before[: len(before) // 2])
    with pytest.raises(InputError, match=r"fit\.safetensors"):
        fitted(checkpoint=file)


# ---- verdicts


def test_verdicts_are_obeyed_without_a_gradient_and_taken_back_to_the_bit(model):
    weights, start = hash_of(model.model_), model.predict_proba(X, LENGTHS)
    nothing = model.context_hash
    with torch.inference_mode():
        shift = model.update(ignore("LDL", who="a"))
        assert shift.keys == (("pid-0", "a"),)
        assert shift.cells == ((0, 0), (1, 0), (2, 0))
        one = model.predict_proba(X, LENGTHS)
        model.update(said((0, "HDL", 1), (1, "age", 0), who="b"))
    assert hash_of(model.model_) == weights
    assert not np.array_equal(one, start)
    assert not np.array_equal(model.predict_proba(X, LENGTHS), one)
    model.undo()
    np.testing.assert_array_equal(model.predict_proba(X, LENGTHS), one)
    assert model.undo().verdicts == 3
    np.testing.assert_array_equal(model.predict_proba(X, LENGTHS), start)
    assert model.context_hash == nothing
    with pytest.raises(InputError, match="nothing to undo"):
        model.undo()


def test_what_is_excluded_has_a_gradient_of_exactly_zero(model):
    def slope():
        x = model.series(X, lengths=LENGTHS).x.requires_grad_()
        found = model.model_(x, torch.as_tensor(LENGTHS)).logits
        return torch.autograd.grad(found.sum(), x)[0].abs().amax((0, 1))

    assert (slope() > 0).all()
    for who in "abcde":
        model.update(ignore("ward", who=who))
    assert slope()[3] == 0
    assert (slope()[:3] > 0).all()
    changed = X.copy()
    changed[:, :, 3] = 1e4
    np.testing.assert_array_equal(model.predict_proba(changed, LENGTHS), model.predict_proba(X, LENGTHS))


def test_replacing_is_starting_anew_whatever_came_before(model):
    wanted = [*ignore("LDL", who="a"), *said((1, "HDL", 1), instance="pid-7", who="b")]
    model.replace(wanted)
    fresh, digest = model.predict_proba(X, LENGTHS), model.context_hash
    for before in ([], ignore("age"), [*said((1, "HDL", 0), instance="pid-7", who="b"), *ignore("ward", "pid-9")]):
        model.replace(before)
        shift = model.replace(wanted)
        assert model.context_hash == digest
        np.testing.assert_array_equal(model.predict_proba(X, LENGTHS), fresh)
        assert shift.verdicts <= len(before) + len(wanted)
    assert model.replace(wanted).verdicts == 0
    # In another order, the same bits.
    model.replace([])
    model.replace(wanted[::-1])
    np.testing.assert_array_equal(model.predict_proba(X, LENGTHS), fresh)
    assert model.replace([]).verdicts == len(wanted)
    assert len(model.context_) == 0


def test_the_last_verdict_counts_and_undoing_records_take_verdicts_back(model):
    log = [*said((0, "LDL", 1)), *said((0, "LDL", 0)), Annotation("pid-3", 0, "LDL", 0, undo=True)]
    model.update(log)
    assert model.context_.masks[0, 0, 0] == 1
    model.update(said((0, "LDL", -1)))
    assert len(model.context_) == 0
    assert model.update([]).verdicts == 0


def test_masks_and_contexts_are_as_good_as_records(model):
    model.update(ignore("HDL"))
    expected = model.predict_proba(X, LENGTHS)
    masks = np.full((1, T, R), -1)
    masks[0, :, 1] = 0
    for given in (masks, torch.from_numpy(masks), Context.of(masks, schema=model.series_.schema), Context.of(masks)):
        model.replace(given)
        np.testing.assert_array_equal(model.predict_proba(X, LENGTHS), expected)
    model.update(masks)
    assert len(model.context_) == 2
    model.update(masks)
    assert len(model.context_) == 3
    assert model.replace(Context(T, R)).verdicts == 9


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (said((0, "LDX", 1)), "no feature 'LDX'; did you mean 'LDL'.*another set of features"),
        (said((0, "LDL", 1), instance="pid-99"), "no instance 'pid-99'; did you mean 'pid-9'"),
        (said((3, "LDL", 1)), "step 3 of 'pid-3': there are 3 steps"),
        (np.zeros((T, R)), r"expected \(K, 3, 4\), \(K, T, r\)"),
        (np.zeros((1, T + 1, R)), r"shape \(1, 4, 4\): expected \(K, 3, 4\)"),
        (np.full((1, T, R), 2), "verdict is 1"),
        (np.zeros((1, T, R)), "every cell is marked 0"),
        (Context(T + 1, R), "expected|sizes|steps"),
        (Context.of(np.ones((2, T + 1, R))), r"expected \(K, 3, 4\)"),
        (Context.of(np.ones((2, T, R)), schema="0123456789abcdef"), "another set of features .*0123456789abcdef"),
        ([one for name in NAMES for one in ignore(name, "pid-1")], "instance 'pid-1': every cell is marked 0"),
    ],
)
def test_verdicts_that_cannot_be_obeyed_are_refused_and_change_nothing(unchecked, model, given, match):
    model.update(ignore("age"))
    before, digest = model.predict_proba(X, LENGTHS), model.context_hash
    for call in (model.update, model.replace):
        with pytest.raises(InputError, match=match):
            call(given)
        assert model.context_hash == digest
        assert model.context_.depth == 1
        np.testing.assert_array_equal(model.predict_proba(X, LENGTHS), before)


def test_an_instance_is_empty_when_all_its_real_cells_are_off(model):
    short = IDS[int(np.flatnonzero(LENGTHS == 1)[0])]
    first = said(*[(0, name, 0) for name in NAMES], instance=short)
    with pytest.raises(InputError, match=f"instance '{short}': every cell is marked 0.*allow_empty=True"):
        model.update(first)
    assert len(model.context_) == 0
    model.update(first[:-1])
    with pytest.raises(InputError, match="every cell"):
        model.update(first[-1:])
    assert model.update(first[-1:], allow_empty=True).verdicts == 1
    # Another annotator's mask stands for itself.
    model.update([Annotation("pid-0", 0, name, 0, annotator="x") for name in NAMES])


def test_before_and_after_differ_by_verdicts_alone(model):
    y = labels("binary")
    one = model.score_report(X, y, lengths=LENGTHS)
    same = model.compare(one, model.score_report(X, y, lengths=LENGTHS), draws=20)
    assert (same.before, same.low, same.high) == (same.after, 0, 0)
    model.update(ignore("LDL"))
    two = model.score_report(X, y, lengths=LENGTHS)
    assert two.context != one.context
    assert model.compare(one, two, metric="accuracy", draws=50).metric == "accuracy"
    with pytest.raises(InputError, match="other instances"):
        model.compare(one, model.score_report(X[1:], y[1:], lengths=LENGTHS[1:]))
    # The draws are those of before: where nothing is marked that matters, nothing moves.
    silent = fitted(options={"epochs": 1})
    with torch.no_grad():
        silent.model_.output.weight[:, 1] = 0
        for parameter in (silent.model_.rnn_alpha.weight_ih_l0, silent.model_.rnn_beta.weight_ih_l0):
            parameter[:, 1] = 0
        silent.model_.encoder.rnn.weight_ih_l0.zero_()
    silent.model_.refresh()
    before = silent.predict_proba(X, LENGTHS)
    silent.update(ignore("HDL"))
    np.testing.assert_array_equal(silent.predict_proba(X, LENGTHS), before)


def test_instances_that_are_known_can_be_annotated(model):
    x = arrays(seed=9, n=3)[0]
    with pytest.raises(InputError, match=r"no instance 'new-1'.*know\(series\)"):
        model.update(said((0, "LDL", 1), instance="new-1"))
    model.know(model.series(x, lengths=[1, 2, 3], ids=["new-0", "new-1", "new-2"]))
    model.update(said((0, "LDL", 1), instance="new-1"))
    with pytest.raises(InputError, match="instance 'new-0': every cell"):
        model.update(said(*[(0, name, 0) for name in NAMES], instance="new-0"))
    found = model.rank(x, ids=["r-0", "r-1", "r-2"], cer=CER(k=2, f=2))
    assert {one.instance for one in found} < {"r-0", "r-1", "r-2"}
    model.update(said((0, found[0].features[0], 0), instance=found[0].instance))


def test_ranking_chooses_from_the_training_unless_told_otherwise(model):
    found = model.rank(cer=CER(k=3, f=2))
    assert [one.instance for one in found] == [model.train_.ids[one.index] for one in found]
    assert len(found[0].features) == 2
    assert model.rank(cer=CER(k=3, f=2)) == found
    assert model.rank(cer=CER(k=2, f=2, instance="influence", feature="influence"))
    with pytest.warns(UserWarning, match="more than the 2 instances"):
        assert len(model.rank(X[:2], cer=CER(k=5))) == 2
    with pytest.raises(InputError, match="no instance left"):
        model.rank(among=[])


def test_finetuning_moves_what_makes_attention_and_nothing_else(model):
    other = copy.deepcopy(model)
    with pytest.raises(InputError, match="nothing is annotated"):
        other.finetune()
    other.update(ignore("LDL", model.train_.ids[0]))
    before = {name: p.clone() for name, p in other.model_.named_parameters()}
    assert len(other.finetune(3)) == 3
    moved = {name for name, p in other.model_.named_parameters() if not torch.equal(p, before[name])}
    assert {"output.weight", "output.bias"}.isdisjoint(moved)
    assert {"to_beta.weight", "rnn_beta.weight_hh_l0"} <= moved
    other.replace(ignore("LDL", model.validation_.ids[0]))
    with pytest.raises(InputError, match="no annotated instance is among"):
        other.finetune(3)
    assert other.finetune(1, series=model.validation_)


def test_the_paper_s_schedule_excludes_nothing_before_it_is_finetuned():
    model = fitted(options={"protocol": "paper"})
    for who in "abcde":
        model.update(ignore("LDL", model.train_.ids[0], who))
    assert not model.model_.excluded().any()
    assert (model.model_.gate(model.model_.condition(), hard=True) == 1).all()
    before = model.logits(X, LENGTHS)
    model.finetune(5)
    assert not np.array_equal(model.logits(X, LENGTHS), before)
    with pytest.raises(InputError, match="latent must be 1 or more"):
        fitted(options={"protocol": "paper", "latent": 0})


@pytest.mark.parametrize("context", ["full", "attentive"])
def test_a_context_of_instances_reads_whom_verdicts_are_on(context):
    model = fitted(options={"context": context, "hidden": 8})
    start = model.predict_proba(X, LENGTHS)
    model.update(said((0, "LDL", 1), instance="pid-1"))
    one = model.predict_proba(X, LENGTHS)
    model.replace(said((0, "LDL", 1), instance="pid-2"))
    assert not np.array_equal(model.predict_proba(X, LENGTHS), one)
    with pytest.raises(InputError, match="instance '#0' is annotated, and context='"):
        model.replace(np.ones((1, T, R)))
    model.undo()
    np.testing.assert_array_equal(model.predict_proba(X, LENGTHS), one)
    model.undo()
    np.testing.assert_array_equal(model.predict_proba(X, LENGTHS), start)


# ---- collecting verdicts


def test_annotations_are_checked_when_they_come_in(model):
    found = model.annotations(who="dr_a", round=2)
    one = found.add("pid-17", "2010", "LDL", 0, seconds=3.1, note="odd")
    expected = Annotation(
        "pid-17", 1, "LDL", 0, seconds=3.1, annotator="dr_a", round=2, model=model.context_hash, note="odd"
    )
    assert one == expected
    assert found.add("pid-17", 0, 3, -1, who="dr_b").annotator == "dr_b"
    assert [one.feature for one in found] == ["LDL", "ward"]
    assert len(found) == 2
    for wrong, match in [
        (("pid-177", 0, "LDL", 1), "did you mean 'pid-17'"),
        (("pid-1", "2008", "LDL", 1), "no step '2008'; did you mean '20"),
        (("pid-1", 3, "LDL", 1), "there are 3 steps"),
        (("pid-1", 0, "LDX", 1), "did you mean 'LDL'"),
        (("pid-1", 0, 4, 1), "there are 4 features"),
        (("pid-1", 0, "LDL", 2), "verdict: 1"),
    ]:
        with pytest.raises(InputError, match=match):
            found.add(*wrong)
    with pytest.raises(UnknownKeyError):
        found.extend([*found, *said((0, "LDX", 1))])
    with pytest.raises(InputError, match="there are 3 steps"):
        found.extend(said((7, "LDL", 1)))
    assert len(found) == 2
    model.update(found)
    assert model.context_.verdicts == 1


def test_annotations_need_no_more_than_names():
    found = Annotations(["a", "b"])
    assert found.add(17, "4", "a", 1).cell == ("17", 4, "a")
    assert Annotations(["a"], steps=2).add("p", "1", "a", 1).step == 1
    with pytest.raises(InputError, match="steps have no names here"):
        found.add(17, "spring", "a", 1)


# ---- wrong input


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"x": X[:, :, 0]}, r"three axes .* got shape \(60, 3\)"),
        ({"x": X[:0]}, "empty"),
        ({"x": np.full((N, T, R), "a")}, "numbers"),
        ({"x": np.where(X[2, 0, 1] == X, np.inf, X)}, r"x\[2, 0, 1\] .* is infinite"),
        ({"lengths": np.full(N, T + 1)}, r"lengths\[0\] = 4 is not in 1..3"),
        ({"lengths": np.zeros(N, int)}, r"lengths\[0\] = 0 is not in 1..3"),
        ({"lengths": [1, 2]}, "60 whole numbers"),
        ({"feature_names": ["a", "b", "a", "c"]}, "feature 'a' is there twice"),
        ({"feature_names": ["a", "b"]}, "2 feature names for 4"),
        ({"step_names": ["a", "b", "a"]}, "step 'a' is there twice"),
        ({"units": ["kg"]}, "1 units for 4 features"),
        ({"ids": ["p"] * N}, "instance id 'p' is there twice"),
        ({"y": np.zeros(N)}, "every label is 0.0: there is nothing to learn"),
        ({"y": ["ill"] * N}, "every label is 'ill'"),
        ({"y": None}, "y is missing"),
        ({"y": labels("binary")[:-1]}, r"y has shape \(59,\) for 60 instances"),
        ({"y": np.where(np.arange(N) == 7, np.nan, 1.0)}, r"y\[7\] is not finite"),
        ({"y": np.array([None, *range(N - 1)], dtype=object)}, r"y\[0\] = None: labels must be all text"),
        ({"y": labels("regression")}, "no classes: use NAPRegressor"),
        ({"y": labels("multilabel") * 2}, "0 or 1"),
        ({"y": np.zeros((N, 2, 2))}, "give .n,. or"),
    ],
)
def test_wrong_arrays_are_refused(unchecked, change, match):
    given = {"x": X, "y": labels("binary"), **change}
    with pytest.raises(InputError, match=match):
        NAPClassifier(**{**OPTIONS, "epochs": 1}).fit(given.pop("x"), given.pop("y"), **given)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"hidden": 0}, "hidden must be a whole number of 1 or more, got 0"),
        ({"hidden": 2.5}, "hidden must be a whole number"),
        ({"latent": -1}, "latent must be a whole number of 0 or more"),
        ({"epochs": 0}, "epochs must be"),
        ({"samples": True}, "samples must be"),
        ({"keep": 0.0}, "keep must be above 0"),
        ({"lr": 0.0}, "lr .* must be above 0"),
        ({"l2": -1.0}, "l2 must be 0 or more"),
        ({"kappa": 0.0}, "kappa must be above 0"),
        ({"protocol": "papers"}, "protocol 'papers' is unknown: choose episodic or paper"),
        ({"context": "mask"}, "context 'mask' is unknown"),
        ({"missing": "fill"}, "missing 'fill' is unknown"),
        ({"rnn": "cnn"}, "gru or lstm"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
        ({"context": "full", "latent": 0}, "latent must be 1 or more"),
    ],
)
def test_wrong_parameters_are_refused(unchecked, options, match):
    with pytest.raises(InputError, match=match):
        fitted(options=options)


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_labels_and_shapes_are_refused_after_fitting(unchecked, all_kinds, kind):
    model = all_kinds[kind]
    wrong = {
        "binary": (np.full(N, "dead"), "is not a class of the training: 'ill', 'well'"),
        "multiclass": (np.full(N, 5), r"y\[0\] = 5 is not a class of the training: 0, 10, 20"),
        "multilabel": (np.zeros((N, 2)), "2 labels, the model was trained on 3"),
        "regression": (np.full(N, "high"), "classes are for NAPClassifier"),
    }
    with pytest.raises(InputError, match=wrong[kind][1]):
        model.score(X, wrong[kind][0], lengths=LENGTHS)
    with pytest.raises(InputError, match="x has 2 steps, the model was trained on 3; pad x and give lengths"):
        model.predict(X[:, :2])
    with pytest.raises(InputError, match="x has 3 features, the model was trained on 4: LDL, HDL, age, ward"):
        model.predict(X[:, :, :3])
    with pytest.raises(InputError, match="no labels: give y"):
        model.score_report(X, lengths=LENGTHS)
    with pytest.raises(InputError, match="level must be within 0 and 1"):
        model.interval(X, 1.0)
    series = model.series(X, lengths=LENGTHS)
    with pytest.raises(InputError, match="x is a Series"):
        model.series(series, lengths=LENGTHS)


def test_the_device_is_where_the_network_is(model):
    assert model.device_.type == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="device 'cuda' is not on this machine"):
            fitted(options={"device": "cuda"})
