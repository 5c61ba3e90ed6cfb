"""Exported files run without this package and say what the model says."""

from __future__ import annotations

import copy
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from cib_ite import overlap
from cib_ite.estimator import CIB
from cib_ite.export import EffectModule, export_model
from shared_core.errors import InputError

TINY = {
    "n_members": 2,
    "steps": 50,
    "trunk": (8,),
    "heads": (8,),
    "discriminator": (4,),
    "latent": 2,
    "predict_samples": 21,
    "random_state": 5,
    "device": "cpu",
}
NAMES = ("effect", "std", "mu0", "mu1", "rate")


def data(missing: bool, binary: bool):
    random = np.random.default_rng(0)
    X = random.normal([0, 50, 0], [1, 20, 1], (200, 3))
    X[:, 2] = X[:, 2] > 0
    t = random.integers(0, 2, 200)
    y = 10 + 3 * X[:, 0] + t * (1 + X[:, 2]) + random.normal(size=200)
    if missing:
        X[random.random((200, 3)) < [0.2, 0.0, 0.2]] = np.nan
    return X, t, (y > 10).astype(int) if binary else y


KINDS = {
    "plain": (False, False, {}),
    "missing": (True, False, {"allow_missing": True}),
    "binary": (True, True, {"allow_missing": True}),
    "deterministic": (False, False, {"deterministic": True, "normalize": True, "independence": "none", "gamma": 0.0}),
    "hetero, one member": (False, False, {"likelihood": "hetero", "n_members": 1}),
}


@pytest.fixture(scope="module", autouse=True)
def small_forests():
    """Leave large forests to the tests of overlap: they would take most of the time here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlap, "_TREES", 25)
        yield


@pytest.fixture(scope="module")
def fitted() -> dict[str, tuple[CIB, np.ndarray]]:
    made = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind, (missing, binary, changes) in KINDS.items():
            X, t, y = data(missing, binary)
            made[kind] = CIB(**{**TINY, **changes}).fit(X, t, y), X
    return made


def assert_says_what_the_model_says(run, model: CIB, X: np.ndarray) -> None:
    for rows in (X, X[:1], X[[5, 3]]):
        found = dict(zip(NAMES, run(rows.astype(np.float32)), strict=True))
        rounded = rows.astype(np.float32).astype(np.float64)
        outcome = model.predict_outcomes(rounded)
        close = {"rtol": 1e-4, "atol": 1e-4}
        np.testing.assert_allclose(found["effect"], model.effect(rounded), **close)
        np.testing.assert_allclose(found["std"], model.effect_std(rounded), **close)
        np.testing.assert_allclose(found["mu0"], outcome[:, 0], **close)
        np.testing.assert_allclose(found["mu1"], outcome[:, 1], **close)
        np.testing.assert_allclose(found["rate"], model.effect_inference(rounded).rate, **close)
        assert all(values.shape == (len(rows),) for values in found.values())


@pytest.mark.parametrize("kind", KINDS)
def test_torchscript_says_what_the_model_says(fitted, tmp_path, kind):
    model, X = fitted[kind]
    path = export_model(model, tmp_path / "m.pt", format="torchscript", samples=21)
    assert path == tmp_path / "m.pt"
    program = torch.jit.load(str(path))
    assert_says_what_the_model_says(lambda x: [v.numpy() for v in program(torch.as_tensor(x))], model, X)
    if kind == "deterministic":
        assert not program(torch.as_tensor(X, dtype=torch.float32))[4].any()


def test_onnx_says_what_the_model_says(fitted, tmp_path, capfd):
    """One file with everything in it; that other kinds are traced alike is tested above."""
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    runtime = pytest.importorskip("onnxruntime")
    model, X = fitted["binary"]
    path = export_model(model, tmp_path / "m.onnx", samples=21)
    printed = capfd.readouterr()
    assert printed.out + printed.err == ""
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [given.name for given in session.get_inputs()] == ["x"]
    assert [made.name for made in session.get_outputs()] == list(NAMES)
    assert_says_what_the_model_says(lambda x: session.run(None, {"x": x}), model, X)


def test_fewer_draws_make_a_smaller_file_near_the_same_effects(fitted, tmp_path):
    model, X = fitted["plain"]
    sizes = []
    for samples in (2, 2000):
        path = export_model(model, tmp_path / f"{samples}.pt", format="torchscript", samples=samples)
        sizes.append(path.stat().st_size)
        effect = torch.jit.load(str(path))(torch.as_tensor(X, dtype=torch.float32))[0].numpy()
        assert np.sqrt(np.mean((effect - model.effect(X)) ** 2)) < 0.2 * model.effect_std(X).mean()
    assert sizes[0] < sizes[1]


def test_exporting_leaves_the_model_as_it_was(fitted, tmp_path):
    model, X = fitted["plain"]
    before, weights = model.effect(X), copy.deepcopy(model.stack_.state_dict())
    assert EffectModule(model).stack is not model.stack_
    export_model(model, tmp_path / "m.pt", format="torchscript")
    np.testing.assert_array_equal(model.effect(X), before)
    for name, value in model.stack_.state_dict().items():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=0)


def test_models_that_predict_by_dropout_are_refused(fitted, tmp_path):
    X, t, y = data(False, False)
    model = CIB.from_preset("mc-dropout", **TINY).fit(X, t, y)
    with pytest.raises(InputError, match="predicts by dropout cannot be exported"):
        export_model(model, tmp_path / "m.pt", format="torchscript")
    assert not list(Path(tmp_path).iterdir())


def test_formats_and_absent_packages_are_named(fitted, tmp_path, monkeypatch, unchecked):
    model, _ = fitted["plain"]
    with pytest.raises(InputError, match="format: must be onnx or torchscript, got 'pickle'"):
        export_model(model, tmp_path / "m", format="pickle")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(InputError, match=r"pip install 'cib-ite\[onnx\]'"):
        export_model(model, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
