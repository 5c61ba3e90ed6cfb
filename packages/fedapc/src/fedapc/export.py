"""The plain network of a task as a file that other programs read."""

from __future__ import annotations

import logging
import warnings
from contextlib import ExitStack
from pathlib import Path

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from shared_core.errors import InputError, not_installed
from shared_core.runs import atomic_path

__all__ = ["export_network"]

_SUFFIXES = (".safetensors", ".onnx")
# Another program adds numbers up in another order.
_TOLERANCE = 1e-3


def export_network(
    net: nn.Module,
    path: str | Path,
    example: Shaped[Tensor, "batch ..."],
    expected: Float[Tensor, "batch classes"],
) -> float:
    """Write a network, read it back, and compare.

    Parameters
    ----------
    net : as `Federation.export` gives it
    path : ``.safetensors`` for the weights by their names in the user's network; ``.onnx`` for a graph that ONNX
        Runtime and others run, of any batch size
    example : some inputs, ``(batch, ...)``
    expected : the federation's logits of these, ``(batch, classes)``

    Returns
    -------
    The greatest difference of logits.

    Raises
    ------
    InputError
        For another suffix, or without the packages that ONNX needs.
    RuntimeError
        If what was written computes something else.
    """
    path = Path(path)
    if path.suffix not in _SUFFIXES:
        raise InputError(f"{path}: expected a name that ends in {' or '.join(_SUFFIXES)}")
    net = net.eval()
    found = _weights(net, path, example) if path.suffix == ".safetensors" else _graph(net, path, example)
    difference = float((found - expected).abs().max())
    if not difference <= _TOLERANCE * (1 + float(expected.abs().max())):
        raise RuntimeError(f"{path}: computes logits that differ by {difference}")
    return difference


def _weights(net: nn.Module, path: Path, example: Tensor) -> Tensor:
    from safetensors.torch import load_file, save_file

    with atomic_path(path) as temporary:
        save_file({name: value.contiguous().clone() for name, value in net.state_dict().items()}, temporary)
        net.load_state_dict(load_file(temporary))
    with torch.no_grad():
        return net(example)


def _graph(net: nn.Module, path: Path, example: Tensor) -> Tensor:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise not_installed("export to ONNX", error.name or "onnxruntime", "fedapc[onnx]") from error
    # It warns of operators of packages that are not installed, and of itself.
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    with atomic_path(path) as temporary, warnings.catch_warnings(), ExitStack() as stack:
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        stack.callback(logger.setLevel, before)
        torch.onnx.export(
            net, (example[:2],), str(temporary), input_names=["inputs"], output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},), dynamo=True, verbose=False, external_data=False,
        )  # fmt: skip
        session = onnxruntime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(None, {"inputs": example.numpy()})[0])
