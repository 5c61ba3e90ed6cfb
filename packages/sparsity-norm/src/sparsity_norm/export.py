"""Fitted models as graphs of ``(x, mask)`` that run without this package: ONNX, or a ``torch.export`` program."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shared_core.errors import not_installed
from shared_core.runs import atomic_path

__all__ = ["export_graph"]


def export_graph(
    graph: nn.Module, features: int, path: str | Path, *, kind: Literal["onnx", "pt2"] = "onnx"
) -> float | None:
    """Write a module of ``(x, mask)`` as one file and run the file against the module.

    Parameters
    ----------
    graph : maps (batch, features) float32 input and bool mask to its output; on the CPU, in evaluation mode
    features : size of an instance
    path : file to write
    kind : ``onnx`` (needs the extra ``sparsity-norm[onnx]``) or ``pt2``, which ``torch.export.load`` reads

    Returns
    -------
    Largest absolute difference of the exported graph's output on 64 random instances, half of their entries known; None
    where onnxruntime is not installed to run it.

    Raises
    ------
    InputError
        When a package is missing or the module cannot be exported.
    """
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
        with torch.no_grad():
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
        raise not_installed("export to ONNX", str(error.name), "sparsity-norm[onnx]") from error
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
