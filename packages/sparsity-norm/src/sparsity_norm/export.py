"""Fitted models as graphs of ``(x, mask)`` that run without this package: ONNX, or a ``torch.export`` program."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from shared_core.errors import InputError
from shared_core.runs import atomic_path
from sparsity_norm.recommend import AutoRecRecommender
from sparsity_norm.sklearn import SNClassifier, SNRegressor

__all__ = ["RatingGraph", "export_model", "graph_of"]

Exportable = SNClassifier | SNRegressor | AutoRecRecommender


class RatingGraph(nn.Module):
    """A fitted recommender as a function of the ratings of whole instances: users in user mode, items in item mode.

    Parameters
    ----------
    recommender : a fitted recommender without offsets outside the network

    Examples
    --------
    >>> rec = AutoRecRecommender(hidden=2, epochs=1, validation=0).fit((["a", "b"], ["x", "x"], [1, 3]))
    >>> RatingGraph(rec)(torch.tensor([[1.0, 0.0]]), torch.tensor([[True, False]])).shape
    torch.Size([1, 2])
    """

    def __init__(self, recommender: AutoRecRecommender) -> None:
        super().__init__()
        if recommender.biases:
            raise InputError(
                "a recommender with biases=True adds offsets outside the network; fit it without to export"
            )
        self.model = recommender.model_
        self.low, self.high = recommender.ratings_.scale

    def forward(
        self, x: Float[Tensor, "batch features"], mask: Bool[Tensor, "batch features"]
    ) -> Float[Tensor, "batch features"]:
        """Predict every rating of each instance, clipped to the scale; `x` does not matter where `mask` is 0."""
        return self.model(x, mask).clamp(self.low, self.high)


def graph_of(model: Exportable) -> tuple[nn.Module, int]:
    """Return a module of ``(x, mask)`` in evaluation mode on the CPU, and the number of features it takes.

    Raises
    ------
    InputError
        When part of the model works outside its network.
    """
    if isinstance(model, AutoRecRecommender):
        return RatingGraph(model).cpu().eval(), model.model_.features
    return model.graph(), model.n_features_in_


def export_model(model: Exportable, path: str | Path, *, kind: Literal["onnx", "pt2"] = "onnx") -> float | None:
    """Write a fitted model as one file and run it against the model it came from.

    Parameters
    ----------
    model : a fitted estimator or recommender
    path : file to write
    kind : ``onnx`` (needs the extra ``sparsity-norm[onnx]``) or ``pt2``, which ``torch.export.load`` reads

    Returns
    -------
    Largest absolute difference of the exported graph's output on 64 random instances, half of their entries known; None
    where onnxruntime is not installed to run it.

    Raises
    ------
    InputError
        When a package is missing or the model cannot be a graph.
    """
    graph, features = graph_of(model)
    example = (torch.zeros(2, features), torch.ones(2, features, dtype=torch.bool))
    dynamic: Any = {"x": {0: torch.export.Dim("batch")}, "mask": {0: torch.export.Dim("batch")}}
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(64, features, generator=draw)
    mask = torch.rand(64, features, generator=draw) < 0.5
    with torch.no_grad():
        expected = graph(x, mask)
    if kind == "pt2":
        program = torch.export.export(graph, example, dynamic_shapes=dynamic)
        with atomic_path(path) as temporary:
            torch.export.save(program, temporary)
        found = torch.export.load(path).module()(x, mask)
        return float((found - expected).abs().max())
    _write_onnx(graph, example, dynamic, Path(path))
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    output: Any = session.run(None, {"x": x.numpy(), "mask": mask.numpy()})[0]
    return float((torch.from_numpy(output) - expected).abs().max())


def _write_onnx(graph: nn.Module, example: tuple[Tensor, Tensor], dynamic: Any, path: Path) -> None:
    try:
        import onnx  # noqa: F401  # pyright: ignore[reportUnusedImport]
        import onnxscript  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise InputError(f"{error.name} is not installed; pip install 'sparsity-norm[onnx]'") from error
    with atomic_path(path) as temporary:
        torch.onnx.export(
            graph,
            example,
            str(temporary),
            dynamo=True,
            verbose=False,
            external_data=False,
            input_names=["x", "mask"],
            output_names=["prediction"],
            dynamic_shapes=dynamic,
        )
