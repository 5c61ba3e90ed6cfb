from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import torch
from nap_cases import shaken
from sklearn.metrics import roc_auc_score

from ial_nap.annotations import Annotation
from ial_nap.context import Context
from ial_nap.estimator import NAPClassifier
from ial_nap.metrics import measure
from ial_nap.nap import FeatureNAP, probabilities
from ial_nap.ranking import CER
from ial_nap.resampling import compare
from ial_nap.series import make_series
from ial_nap.web.model import ModelWorkbench, Resampled, serve
from shared_core.errors import InputError, UnknownKeyError

T, R, N = 4, 5, 30
FEATURES = ["LDL", "HDL", "age", "BMI", "ward"]
UNITS = ["mg/dL", "mg/dL", "years", "kg/m²", ""]


def series(kind="binary", n=N, seed=0, like=None, *, gaps=False):
    random = np.random.default_rng(seed)
    x = 50 + 9 * random.normal(size=(n, T, R))
    label = {
        "binary": lambda: np.arange(n) % 2,
        "multiclass": lambda: np.arange(n) % 3,
        "multilabel": lambda: np.stack([np.arange(n) % 2, np.arange(n) % 3 == 0, np.arange(n) % 5 < 2], 1) * 1,
        "regression": lambda: 100 + 7.5 * random.normal(size=n),
    }[kind]()
    if gaps:
        x[0, 1, 2] = np.nan
    lengths = [2, 1, *[T] * (n - 2)]
    ids = [f"pid-{k}" for k in range(n)]
    return make_series(x, label, kind=kind, lengths=lengths, missing="mask", features=FEATURES, ids=ids, like=like)


def bench(kind="binary", **options):
    pool = series(kind, gaps=True)
    held = series(kind, n=40, seed=1, like=pool)
    model = shaken(FeatureNAP.of(pool, hidden=7, latent=3))
    return ModelWorkbench(model, pool, held, **{"units": UNITS, "draws": 40, **options})


def says(instance, verdict, *, feature="LDL", steps=range(T), who="ann"):
    return [Annotation(instance, step, feature, verdict, annotator=who) for step in steps]


def state(one):
    """All that a person can see of the model, to the bit."""
    views = [one.view(f"pid-{k}") for k in range(6)]
    numbers = [getattr(view, name).tobytes() for view in views for name in ("contributions", "attention")]
    return numbers, [(view.prediction, view.low, view.high) for view in views], one.score().value, one.queue(5)


def test_a_view_is_what_the_model_says():
    one = bench()
    view, model, pool = one.view("pid-5"), one.model, one.pool
    x, lengths = pool.x[5:6], pool.lengths[5:6]
    predicted = model.predict(x, lengths, samples=30)
    assert view.prediction == pytest.approx(predicted.mean.item(), abs=1e-7)
    assert (view.low, view.high) == pytest.approx([edge.item() for edge in predicted.interval(0.95)], abs=1e-7)
    logit = model(x, lengths).logits.item()
    assert view.contributions.sum() + model.output.bias.item() == pytest.approx(logit, abs=1e-5)
    found = model(x, lengths)
    gate = model.gate(model.condition(), hard=True)[0]
    expected = found.alpha[0, :, None] * found.beta[0].abs() * gate
    np.testing.assert_allclose(view.attention, expected.detach().numpy(), atol=1e-7)
    np.testing.assert_allclose(view.values, pool.scaling.raw(x[0]).numpy(), rtol=1e-5)
    assert (view.label, view.output, view.chances, view.length) == (1.0, 0, (), T)
    variance = model.spread_of_contributions(x, lengths, samples=30)[1][0, :, :, 0]
    np.testing.assert_allclose(view.uncertainty**2, variance.numpy(), atol=1e-7)


def test_missing_and_padded_cells_have_no_value():
    view = bench().view("pid-0")
    assert (view.length, view.observed[2:].any(), view.observed[1, 2], view.observed[1, 1]) == (2, False, False, True)
    assert np.isnan(view.values[2:]).all()
    assert np.isnan(view.values[1, 2])
    assert not view.contributions[2:].any()
    assert not view.attention[2:].any()


def test_a_regression_is_in_the_targets_unit():
    one = bench("regression")
    view, scaling = one.view("pid-7"), one.pool.scaling
    mean = one.model.predict(one.pool.x[7:8], one.pool.lengths[7:8], samples=30).mean
    assert view.prediction == pytest.approx(float(scaling.raw_target(mean)), rel=1e-6)
    assert view.low < view.prediction < view.high
    assert view.label == pytest.approx(float(scaling.raw_target(one.pool.targets[7])), rel=1e-6)
    intercept = one.model.output.bias.item() * scaling.target_deviation + scaling.target_mean
    logits = one.model(one.pool.x[7:8], one.pool.lengths[7:8]).logits.detach()
    assert view.contributions.sum() + intercept == pytest.approx(float(scaling.raw_target(logits)), rel=1e-5)
    score = one.score()
    predicted = one.model(one.validation.x, one.validation.lengths).logits.detach().numpy()
    assert (score.metric, score.better) == ("MAE", "lower")
    assert score.value == pytest.approx(measure(one.validation, predicted)["mae"], rel=1e-6)


def test_of_several_classes_each_can_be_looked_at():
    one = bench("multiclass", outputs=["red", "green", "blue"])
    view, x, lengths = one.view("pid-8"), one.pool.x[8:9], one.pool.lengths[8:9]
    assert view.output == int(np.argmax(view.chances))
    assert sum(view.chances) == pytest.approx(1, abs=1e-6)
    cells = one.model.contributions(x, lengths).cells[0]
    for output, chance in enumerate(view.chances):
        other = one.view("pid-8", output)
        assert other.prediction == pytest.approx(chance, abs=1e-7)
        np.testing.assert_allclose(other.contributions, cells[:, :, output].detach().numpy(), atol=1e-7)
    assert one.outputs == ("red", "green", "blue")
    assert any(name in one.queue(1)[0].reason for name in one.outputs)
    assert bench("multiclass", output=2).view("pid-8").output == 2
    predicted = probabilities(one.model(one.validation.x, one.validation.lengths).logits, "multiclass")
    assert one.score().value == pytest.approx(measure(one.validation, predicted.detach().numpy())["accuracy"])


def test_a_label_of_several_is_its_own():
    one = bench("multilabel")
    assert [one.view("pid-6", k).label for k in range(3)] == [0.0, 1.0, 1.0]
    predicted = probabilities(one.model(one.validation.x, one.validation.lengths).logits, "multilabel")
    assert one.score().value == pytest.approx(measure(one.validation, predicted.detach().numpy())["auroc"])


@pytest.mark.parametrize("kind", ["binary", "multiclass", "regression"])
def test_what_if_is_a_forward_pass_without_the_cells(kind):
    one = bench(kind)
    view = one.view("pid-9")
    assert one.what_if("pid-9", []) == (view.prediction, view.low, view.high)
    x = one.pool.x[9:10].clone()
    x[0, 1, 3] = x[0, 2, 0] = 0
    mean = one.model.predict(x, one.pool.lengths[9:10], samples=30).mean[0, view.output]
    expected = float(one.pool.scaling.raw_target(mean)) if kind == "regression" else float(mean)
    assert one.what_if("pid-9", [(1, 3), (2, 0)])[0] == pytest.approx(expected, rel=1e-6)
    assert one.view("pid-9") is view


def test_an_update_obeys_what_stands_and_nothing_else():
    one = bench()
    one.update(says("pid-3", 0) + says("pid-4", 1, feature="age", who="bob"))
    twin = FeatureNAP(**one.model.config)
    twin.load_state_dict(one.model.state_dict())
    masks = torch.full((2, T, R), -1, dtype=torch.int8)
    masks[0, :, 0], masks[1, :, 2] = 0, 1
    twin.update(Context.of(masks, ids=["pid-3", "pid-4"], annotators=["ann", "bob"], kappa=1.0))
    x, lengths = one.pool.x, one.pool.lengths
    assert torch.equal(twin.predict(x, lengths).samples, one.model.predict(x, lengths).samples)
    assert not one.view("pid-9").contributions[:, 0].any()
    assert one.score().before == bench().score().value


def test_the_same_twice_any_order_and_all_taken_back():
    one = bench()
    untouched = state(one)
    said = says("pid-3", 0) + says("pid-4", 1, feature="age", who="bob") + says("pid-3", 0, who="bob", steps=[0])
    one.update(said)
    first = state(one)
    one.update(list(said))
    assert state(one) == first
    one.update(said[::-1])
    assert state(one) == first
    for k in range(len(said), -1, -1):
        one.update(said[:k])
    assert state(one) == untouched
    # In steps of one, by another way: the same end.
    for k in range(1, len(said) + 1):
        one.update(said[-k:])
    assert state(one) == first
    assert first != untouched


def test_undone_and_unknown_verdicts_say_nothing():
    one = bench()
    untouched = state(one)
    one.update(says("pid-3", -1))
    assert state(one) == untouched
    one.update([*says("pid-3", 0, steps=[1]), Annotation("pid-3", 1, "LDL", 0, annotator="ann", undo=True)])
    assert state(one) == untouched


def test_verdicts_of_before_stay_under_those_of_the_page():
    mask = torch.full((1, T, R), -1, dtype=torch.int8)
    mask[0, :, 4] = 0
    one = bench(base=Context.of(mask, ids=["elsewhere"], annotators=["eve"]))
    assert not one.view("pid-9").contributions[:, 4].any()
    untouched = state(one)
    one.update(says("pid-3", 0))
    assert not one.view("pid-9").contributions[:, [0, 4]].any()
    one.update([])
    assert state(one) == untouched


def test_an_instance_keeps_a_cell_to_attend_to():
    one = bench()
    untouched = state(one)
    # Two real steps, of ten cells, one of which has no value: nine verdicts are all there is.
    all_off = [verdict for feature in FEATURES for verdict in says("pid-0", 0, feature=feature, steps=[0, 1])]
    nine = [verdict for verdict in all_off if (verdict.step, verdict.feature) != (1, "age")]
    for said in (all_off, nine):
        with pytest.raises(InputError, match=re.escape("instance 'pid-0': all its 9 cells are ruled out by 'ann'")):
            one.update(said)
        assert state(one) == untouched
    one.update(nine[:-1])
    # What is beyond the end does not save it; two people who each leave something are free to.
    with pytest.raises(InputError, match="leave one"):
        one.update([*nine, *says("pid-0", 1, steps=[3])])
    one.update([*nine[:-1], *[Annotation(v.instance, v.step, v.feature, 0, annotator="bob") for v in nine[1:]]])


def test_what_is_not_there():
    one = bench()
    for call in (
        lambda: one.view("pid-99"),
        lambda: one.what_if("pid-99", []),
        lambda: one.update(says("pid-99", 0)),
        lambda: one.update(says("pid-9", 0, feature="LDH")),
    ):
        with pytest.raises(UnknownKeyError, match="did you mean"):
            call()
    with pytest.raises(InputError, match="there are 4 steps"):
        one.update(says("pid-9", 0, steps=[4]))
    pool = series()
    model = FeatureNAP.of(pool)
    with pytest.raises(InputError, match="validation: of 4 steps and 4 features"):
        ModelWorkbench(model, pool, pool.without(["ward"]))
    with pytest.raises(InputError, match="units: 1 for 5"):
        ModelWorkbench(model, pool, pool, units=["mg/dL"])
    with pytest.raises(InputError, match="output 1: there are 1"):
        ModelWorkbench(model, pool, pool, output=1)
    with pytest.raises(InputError, match="outputs: 2 names for 1"):
        ModelWorkbench(model, pool, pool, outputs=["no", "yes"])
    with pytest.raises(InputError, match="samples"):
        ModelWorkbench(model, pool, pool, samples=1)


@pytest.mark.parametrize("instance", ["uncertainty", "influence", "error", "entropy", "margin", "random"])
def test_the_queue_is_that_of_cer(instance):
    cer = CER(instance=instance, k=6, f=3, samples=8)
    one = bench(cer=cer)
    one.update(says("pid-3", 0))
    ranked = cer.rank(one.model, one.pool, one.validation)
    queue = one.queue(6)
    assert [(item.instance, item.features) for item in queue] == [(item.instance, item.features) for item in ranked]
    assert [item.score for item in queue] == pytest.approx([item.score for item in ranked], abs=1e-6)
    assert all(queue[0].features[0] in item.reason or item is not queue[0] for item in queue)
    # Those judged before come last; there are 30 in all.
    skip = {item.instance for item in queue[:2]}
    assert [item.instance for item in one.queue(4, skip)] == [item.instance for item in queue[2:]]
    assert len(one.queue(99, set(one.pool.ids))) == N


@pytest.mark.parametrize("feature", ["counterfactual", "uncertainty", "influence", "random"])
def test_the_features_of_the_queue_are_those_of_cer(feature):
    cer = CER(feature=feature, k=4, f=5, samples=8)
    one = bench(cer=cer)
    ranked = cer.rank(one.model, one.pool, one.validation)
    for _ in range(2):
        assert [item.features for item in one.queue(4)] == [item.features for item in ranked]


def test_of_a_large_pool_other_instances_are_ranked_after_every_change():
    one = bench(candidates=8)
    first = one.queue(8)
    assert len(first) == 8
    assert one.queue(8) == first
    one.update(says("pid-3", 0))
    second = one.queue(8)
    assert {item.instance for item in second} != {item.instance for item in first}
    one.update([])
    assert one.queue(8) == first


@pytest.mark.parametrize("kind", ["binary", "multilabel", "multiclass", "regression"])
def test_resampled_scores_are_those_of_each_resample(kind):
    held = series(kind, n=25, seed=3)
    random = np.random.default_rng(4)
    p = np.round(random.random((25, held.outputs)), 1)
    value, draws = Resampled(held, draws=30, seed=5)(p)
    main = {"multiclass": "accuracy", "regression": "mae"}.get(kind, "auroc")
    assert value == pytest.approx(measure(held, p)[main])
    resample = np.random.default_rng(5)
    for found in draws:
        at = resample.integers(0, 25, 25)
        part = held.part(torch.from_numpy(at))
        assert found == pytest.approx(measure(part, p[at])[main], nan_ok=True)
    assert roc_auc_score([0, 1], [0.2, 0.7]) == 1.0


def test_the_gain_of_a_round_is_measured_in_pairs():
    one = bench(draws=200)
    start = one.score()
    one.update(says("pid-3", 0))
    now = one.score()
    value, low, high = now.change(start)
    assert value == pytest.approx(now.value - start.value)
    held = one.validation
    after = probabilities(one.model(held.x, held.lengths).logits, "binary").detach().numpy()
    one.update([])
    before = probabilities(one.model(held.x, held.lengths).logits, "binary").detach().numpy()
    found = compare(held, before, after, draws=200)
    # The same resamples as there, drawn from the same seed.
    assert (low, high) == pytest.approx((found.low, found.high))
    assert high - low < now.high - now.low
    assert start.change(start) == (0.0, 0.0, 0.0)


def test_one_class_only_has_no_score_and_no_fault():
    pool = series()
    held = series(n=20, seed=2, like=pool)
    one = ModelWorkbench(FeatureNAP.of(pool), pool, held.part([k for k in range(20) if k % 2]), draws=5)
    assert np.isnan([one.score().value, one.score().low]).all()
    one.update(says("pid-3", 0))


# ---- for an estimator


@pytest.fixture(scope="module")
def fitted():
    random = np.random.default_rng(0)
    x = 50 + 9 * random.normal(size=(60, T, R))
    y = np.where(x[:, -1, 0] > 50, "ill", "well")
    model = NAPClassifier(hidden=5, latent=2, epochs=2, device="cpu")
    return model.fit(x, y, feature_names=FEATURES, units=UNITS, ids=[f"pid-{k}" for k in range(60)]), x, y


@pytest.fixture
def desk(monkeypatch):
    """The page, with people who say at once what is in the list, and then close it."""
    pytest.importorskip("fastapi", reason="needs ial-nap[web]")
    from ial_nap.web import app, model

    shown, to_say = {}, []

    def page(bench, store, annotators, *, announce, **options):
        shown.update(bench=bench, annotators=annotators, **options)
        announce({name: f"http://127.0.0.1/{name}" for name in annotators})
        for verdict in to_say:
            store.add([verdict])
            bench.update(store.standing())
        shown["views"] = [bench.view(name) for name in bench.pool.ids]
        raise KeyboardInterrupt

    monkeypatch.setattr(app, "serve", page)
    monkeypatch.setattr(model.webbrowser, "open", lambda link: shown.update(opened=link))
    return shown, to_say


def test_an_estimator_obeys_what_was_said_on_its_page(fitted, desk, tmp_path):
    model, x, y = fitted
    shown, to_say = desk
    told = model.annotations(who="eve")
    told.add("pid-2", 0, "BMI", 0)
    model.update(told)
    untouched = model.predict_proba(x)
    to_say += says("pid-3", 0) + says("pid-4", 1, feature="age", who="bob")
    options = {"ids": [f"pid-{k}" for k in range(60)], "store": tmp_path / "v.db", "annotators": ["ann", "bob"]}
    links = {}
    standing = serve(model, x, y, announce=links.update, **options)
    assert [(one.annotator, one.verdict) for one in standing] == [("ann", 0)] * 4 + [("bob", 1)] * 4
    assert (list(links), shown["opened"], shown["count"]) == (["ann", "bob"], "http://127.0.0.1/ann", 10)
    bench = shown["bench"]
    # Classes are in the order of the alphabet: the second one is predicted.
    assert (bench.outputs, bench.units, bench.validation) == (("Probability of well",), tuple(UNITS), model.validation_)
    predicted = model.predict_proba(x)
    np.testing.assert_allclose(predicted[:, 1], [view.prediction for view in shown["views"]], atol=1e-6)
    assert not np.array_equal(predicted, untouched)
    assert sorted(model.context_.keys) == [("pid-2", "eve"), ("pid-3", "ann"), ("pid-4", "bob")]
    # Another day: what stands goes on, what is taken back goes, what eve said stays.
    to_say[:] = says("pid-3", -1) + says("pid-4", -1, feature="age", who="bob")
    serve(model, x, y, announce=links.update, open_browser=False, **options)
    context = model.context_
    said_something = [key for key, mask in zip(context.keys, context.masks, strict=True) if (mask >= 0).any()]
    assert said_something == [("pid-2", "eve")]
    np.testing.assert_array_equal(model.predict_proba(x), untouched)
    model.undo()
    np.testing.assert_array_equal(model.predict_proba(x), predicted)


def test_a_page_needs_something_to_score_on(fitted, desk, tmp_path):
    model, x, y = fitted
    desk[1].clear()
    loaded = copy.copy(model)
    loaded.validation_ = None
    with pytest.raises(InputError, match=re.escape("give validation=(x, y)")):
        serve(loaded, x, y, store=tmp_path / "v.db")
    lengths = np.full(20, 3)
    serve(loaded, x, store=tmp_path / "v.db", validation=(x[:20], y[:20], lengths), announce=lambda _: None)
    assert desk[0]["bench"].validation.lengths.tolist() == [3] * 20
    assert desk[0]["views"][0].label is None
    with pytest.raises(InputError, match="other features"):
        serve(loaded, x, store=tmp_path / "v.db", validation=(x, y), units=["a"] * R)


def test_links_are_written_out(fitted, desk, tmp_path, capsys):
    model, x, y = fitted
    desk[1].clear()
    serve(model, x, y, store=tmp_path / "v.db", open_browser=False)
    assert capsys.readouterr().out == "you: http://127.0.0.1/you\n"
