from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_wine
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from shared_core.errors import InputError
from srq_dropbits.models import MLP
from srq_dropbits.packing import load_packed
from srq_dropbits.sklearn import QuantizedMLPClassifier
from srq_dropbits.training import predict_proba, quantize_and_train


def quick(**options):
    return QuantizedMLPClassifier(
        **{"hidden": (16,), "pretrain_epochs": 4, "epochs": 2, "learning_rate": 0.03, "random_state": 0, **options}
    )


# All checks that scikit-learn has for classifiers; none is left out.
@parametrize_with_checks([quick()])
def test_scikit_learn_checks(unchecked, estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def wine():
    X, y = load_wine(return_X_y=True)
    return train_test_split(X, y, stratify=y, random_state=0)


@pytest.fixture(scope="module")
def fitted(wine):
    X, _, y, _ = wine
    return quick(weight_bits=3, act_bits=4).fit(X, np.array(["a", "b", "c"])[y])


def test_learns_a_real_table():
    X, y = load_breast_cancer(return_X_y=True)
    X_train, X_test, y_train, y_test = train_test_split(X, y, stratify=y, random_state=0)
    model = QuantizedMLPClassifier((32,), weight_bits=2, pretrain_epochs=10, epochs=5, random_state=0)
    assert model.fit(X_train, y_train).score(X_test, y_test) >= 0.93


def test_labels_of_any_kind_come_back(fitted, wine):
    assert fitted.classes_.tolist() == ["a", "b", "c"]
    assert set(fitted.predict(wine[1])) <= {"a", "b", "c"}
    shares = fitted.predict_proba(wine[1])
    np.testing.assert_allclose(shares.sum(1), 1)
    assert (fitted.classes_[shares.argmax(1)] == fitted.predict(wine[1])).all()


def test_predicts_by_integers_what_it_trained(wine, monkeypatch):
    kept = []

    def keep(*args, **options):
        kept.append(quantize_and_train(*args, **options))
        return kept[-1]

    monkeypatch.setattr("srq_dropbits.sklearn.quantize_and_train", keep)
    model = quick().fit(wine[0], wine[2])
    expected = predict_proba(kept[0].model, model._scaled(wine[1]))
    np.testing.assert_allclose(model.predict_proba(wine[1]), expected, atol=1e-4)


def test_a_row_does_not_depend_on_its_company(fitted, wine):
    together = fitted.predict_proba(wine[1])
    alone = np.concatenate([fitted.predict_proba(row[None]) for row in wine[1]])
    np.testing.assert_allclose(alone, together, rtol=1e-7)


def test_report_counts_the_bits(fitted):
    assert fitted.report_.avg_bits == 3
    assert [row.weights for row in fitted.report_.rows] == [13 * 16, 16 * 3]


def test_export_is_small_and_predicts_the_same(fitted, wine, tmp_path):
    path = tmp_path / "wine.safetensors"
    fitted.export(path)
    # 3 bits a weight, and at most 4 KiB beside them.
    assert path.stat().st_size <= (13 * 16 + 16 * 3) * 3 / 8 + 4 * 19 + 4096
    loaded = load_packed(path, MLP((13,), 3, (16,)))
    with torch.no_grad():
        logits = loaded(fitted._scaled(wine[1]))
    np.testing.assert_allclose(logits.double().softmax(1).numpy(), fitted.predict_proba(wine[1]), rtol=1e-6)


def test_repeats_with_a_seed(wine):
    X, X_test, y, _ = wine
    first, second, other = (quick(epochs=1, random_state=seed).fit(X, y).predict_proba(X_test) for seed in (1, 1, 2))
    assert (first == second).all()
    assert not (first == other).all()


def test_survives_pickling_cloning_and_pipelines(fitted, wine):
    X, X_test, y, _ = wine
    again = pickle.loads(pickle.dumps(fitted))
    assert (again.predict_proba(X_test) == fitted.predict_proba(X_test)).all()
    assert clone(fitted).get_params() == fitted.get_params()
    pipeline = make_pipeline(MinMaxScaler(), quick(epochs=1)).fit(X, y)
    assert pipeline.predict(X_test).shape == (len(X_test),)


def test_learned_bits_are_reported(wine):
    X, _, y, _ = wine
    model = quick(method="srq+dropbits+bits", weight_bits=4).fit(X, y)
    assert all(2 <= row.weight_bits <= 4 for row in model.report_.rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "sqr"}, "sqr"),
        ({"weight_bits": 1}, "1"),
        ({"hidden": (0,)}, "at least one unit"),
        ({"epochs": -1}, "epochs is -1"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
    ],
)
def test_bad_parameters_are_one_line(wine, unchecked, options, message):
    with pytest.raises(InputError, match=message) as caught:
        quick(**options).fit(wine[0], wine[2])
    assert "\n" not in str(caught.value)


def test_single_class_and_no_fit(wine, tmp_path):
    with pytest.raises(InputError, match="at least 2 classes"):
        quick().fit(wine[0], np.zeros(len(wine[0])))
    with pytest.raises(NotFittedError):
        quick().export(tmp_path / "model.safetensors")
