"""The exported file says what the adapted model says, and what it cannot."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from meta_dropout.backbones import conv4
from meta_dropout.export import export_onnx
from meta_dropout.learner import MetaLearner


@pytest.mark.parametrize("method", ["meta-dropout", "maml"])
def test_onnx_says_what_the_inductive_model_says(method, tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install 'meta-dropout[onnx]'")
    learner = MetaLearner(conv4(ways=3, size=16, filters=4, blocks=2), method, statistics="support", inner_steps=2)
    x = torch.rand(6, 1, 16, 16)
    task = learner.adapt(x, torch.arange(3).repeat(2), spread=0)
    export_onnx(task, tmp_path / "m.onnx", example=x, classes=("a", "b", "c"))
    session = runtime.InferenceSession(str(tmp_path / "m.onnx"))
    assert session.get_modelmeta().custom_metadata_map["classes"] == "a\nb\nc"
    for rows in (1, 5):
        asked = torch.rand(rows, 1, 16, 16)
        (found,) = session.run(None, {"images": asked.numpy()})
        np.testing.assert_allclose(found, task(asked).detach().numpy(), atol=1e-5)
