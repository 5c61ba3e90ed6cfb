"""The exported file says what the adapted model says, and what it cannot."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bayes_taml.export import export_onnx
from bayes_taml.learner import MetaLearner
from bayes_taml.networks import conv_features


@pytest.mark.parametrize(
    ("method", "norm", "statistics"),
    [
        ("bayesian-taml", "batch", "support"),
        ("bayesian-taml", "film", "batch"),
        ("protonet", "group", "support"),
    ],
)
def test_onnx_says_what_the_inductive_model_says(method, norm, statistics, tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install 'bayes-taml[onnx]'")
    pytest.importorskip("onnxscript", reason="needs onnxscript: pip install 'bayes-taml[onnx]'")
    learner = MetaLearner(
        conv_features(size=16, filters=4, blocks=2, norm=norm, init="kaiming"), method, input_shape=(1, 16, 16),
        statistics=statistics, test_steps=2, samples=2, inner_lr=0.3,
    )  # fmt: skip
    x, y = torch.rand(7, 1, 16, 16), ["a", "b", "b", "c", "c", "c", "c"]
    task = learner.adapt(x, y)
    export_onnx(task, tmp_path / "m.onnx", support=x)
    session = runtime.InferenceSession(str(tmp_path / "m.onnx"))
    assert session.get_modelmeta().custom_metadata_map["classes"] == "a\nb\nc"
    inductive = MetaLearner(
        learner.model.backbone, method, input_shape=(1, 16, 16), statistics="support", test_steps=2, samples=2,
        inner_lr=0.3,
    ).adapt(x, y)  # fmt: skip
    for rows in (1, 5):
        asked = torch.rand(rows, 1, 16, 16)
        (found,) = session.run(None, {"images": asked.numpy()})
        np.testing.assert_allclose(np.exp(found).sum(1), 1, atol=1e-5)
        np.testing.assert_allclose(np.exp(found), inductive.predict_proba(asked), atol=1e-5)
    # What the model itself says of the support is what the file says, if statistics are those of the support.
    (found,) = session.run(None, {"images": x.numpy()})
    np.testing.assert_allclose(np.exp(found), task.predict_proba(x), atol=1e-5)
