"""Write a network for other programs, and read it again to see that it says the same."""

from __future__ import annotations

import copy
import importlib
import logging
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from shared_core.errors import InputError, not_installed
from shared_core.objects import one_line
from shared_core.runs import atomic_path
from stamp._files import read_weights, save_weights

__all__ = ["ExportError", "to_onnx", "to_safetensors", "to_torchscript"]

_TOLERANCE = 1e-4


class ExportError(InputError):
    """A network that the format cannot express, or whose file says something else."""


def to_onnx(
    small: nn.Module, example: Shaped[Tensor, "n ..."], path: str | Path, *, class_names: Sequence[str] = ()
) -> float:
    """Write a network in evaluation mode to ONNX, in float32: ``input`` ``(batch, ...)`` to ``logits``.

    Parameters
    ----------
    small : that takes one tensor and gives one; it stays as it is
    example : a batch of inputs; files take batches of any size
    path : to write
    class_names : put into the file's metadata as ``classes``, a line each

    Returns
    -------
    The largest difference to the network, as ONNX Runtime computes the file, over batches of three sizes.

    Raises
    ------
    InputError
        Without the packages onnx, onnxscript and onnxruntime.
    ExportError
        When an operation cannot be written, or the file differs by more than ``1e-4 * (1 + max|f|)``.
    """
    onnx, runtime = _needed("onnx"), _needed("onnxruntime")
    _needed("onnxscript")
    plain = _plain(small).float()
    batches = _batches(example.detach().cpu().float())
    with atomic_path(path) as temporary:
        with _quiet():
            try:
                torch.onnx.export(
                    plain, (batches[0],), str(temporary), input_names=["input"], output_names=["logits"],
                    dynamic_shapes=({0: torch.export.Dim("batch", min=1)},), dynamo=True, verbose=False,
                    external_data=False,
                )  # fmt: skip
            except Exception as error:  # the exporter raises many kinds
                raise ExportError(f"ONNX cannot express this {type(small).__name__}: {_said(error)}") from error
        if class_names:
            written = onnx.load(str(temporary))
            entry = written.metadata_props.add()
            entry.key, entry.value = "classes", "\n".join(map(str, class_names))
            onnx.save(written, str(temporary))
        session = runtime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])

        def run(x: Tensor) -> Tensor:
            return torch.from_numpy(session.run(None, {"input": x.numpy()})[0])

        return _difference(plain, run, batches, "ONNX")


def to_torchscript(small: nn.Module, example: Shaped[Tensor, "n ..."], path: str | Path) -> float:
    """Write a network in evaluation mode as a TorchScript trace, for ``torch.jit.load`` in Python or C++.

    Parameters
    ----------
    small : that takes one tensor and gives one; it stays as it is. The file is for the CPU
    example : a batch of inputs
    path : to write

    Returns
    -------
    The largest difference of the file to the network, over batches of three sizes.

    Raises
    ------
    ExportError
        When it cannot be traced, or the file differs by more than ``1e-4 * (1 + max|f|)``.

    Examples
    --------
    >>> import tempfile
    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    >>> to_torchscript(net, torch.rand(2, 3, 8, 8), Path(tempfile.mkdtemp()) / "net.pt") < 1e-6
    True
    """
    plain = _plain(small)
    like = next(iter(plain.parameters()), torch.ones(()))
    batches = _batches(example.detach().to(like))
    with atomic_path(path) as temporary, _quiet(), torch.no_grad():
        try:
            traced = cast("Any", torch.jit.trace(plain, batches[0], check_trace=False))
            traced.save(str(temporary))
            run = cast("Callable[[Tensor], Tensor]", torch.jit.load(str(temporary)))
        except Exception as error:  # tracing runs the user's code
            raise ExportError(f"TorchScript cannot trace this {type(small).__name__}: {_said(error)}") from error
        return _difference(plain, run, batches, "TorchScript")


def to_safetensors(small: nn.Module, path: str | Path) -> float:
    """Write parameters and buffers of a network as safetensors.

    Parameters
    ----------
    small : the network
    path : to write

    Returns
    -------
    The largest difference of the file to the network: zero.

    Raises
    ------
    ExportError
        When the file holds something else.
    """
    save_weights(small, path)
    written = read_weights(Path(path))
    state = {name: value.detach().cpu() for name, value in small.state_dict().items()}
    if written.keys() != state.keys() or any(written[name].shape != state[name].shape for name in state):
        raise ExportError(f"{path}: does not hold the network's tensors; write it to another disk")
    apart = [
        float((written[name].double() - value.double()).abs().max()) for name, value in state.items() if value.numel()
    ]
    if any(difference > 0 for difference in apart):
        raise ExportError(f"{path}: differs by {max(apart):.3g} from what was written; write it to another disk")
    return max(apart, default=0.0)


def _needed(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise not_installed("writing ONNX", module, "stamp[onnx]") from None


def _plain(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).cpu().eval()


def _batches(example: Tensor) -> list[Tensor]:
    """Return the example, twice of it and one row: a file must not have learnt the size of the batch."""
    if example.dim() < 2 or not len(example):
        raise ExportError(f"example: has shape {tuple(example.shape)}; give a batch of inputs, (n, ...)")
    # Exporters take a size of 1 for a constant.
    example = example if len(example) > 1 else torch.cat([example, example])
    return [example, torch.cat([example, example]), example[:1].clone()]


def _difference(plain: nn.Module, run: Callable[[Tensor], Tensor], batches: Sequence[Tensor], kind: str) -> float:
    worst = 0.0
    for x in batches:
        with torch.no_grad():
            wanted = plain(x)
        try:
            found = run(x)
        except Exception as error:  # runtimes raise many kinds
            raise ExportError(f"{kind}: the file cannot run a batch of {len(x)}: {_said(error)}") from error
        if found.shape != wanted.shape:
            raise ExportError(f"{kind}: the file gives {tuple(found.shape)}, and the network {tuple(wanted.shape)}")
        difference = float((found - wanted).abs().max())
        if not difference <= _TOLERANCE * (1 + float(wanted.abs().max())):
            raise ExportError(
                f"{kind}: the file differs from the network by {difference:.3g} for a batch of {len(x)}; its forward"
                " pass may depend on values or on the batch"
            )
        worst = max(worst, difference)
    return worst


@contextmanager
def _quiet() -> Generator[None]:
    """Hide what exporters say of themselves and of operators that nobody uses."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def _said(error: BaseException) -> str:
    """Write an exporter's exception in one line, which can be very long."""
    return one_line(error)[:300]
