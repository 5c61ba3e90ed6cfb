"""A prepared model on disk, to train on or to convert later: one safetensors file (``srq-checkpoint``, version 1).

The file holds the ``state_dict``, tensors that several names share once, and in its header the ``QuantConfig`` and the
few switches that are not tensors. The architecture is the user's own code and is not stored: :func:`load` takes a fresh
float model, prepares it in the same way and fills it. Nothing is pickled.
"""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from shared_core.runs import atomic_path
from srq_dropbits.config import QuantConfig
from srq_dropbits.errors import PackedFormatError, SrqError
from srq_dropbits.qat import QuantizedModel, prepare
from srq_dropbits.quantizers import InputQuantizer, WeightQuantizer
from srq_dropbits.structure import quantizers

__all__ = ["FORMAT", "VERSION", "load", "read_config", "save"]

FORMAT = "srq-checkpoint"
VERSION = 1


def save(qmodel: nn.Module, path: str | Path) -> None:
    """Write a prepared model, at any point of its training, so that :func:`load` gives it back bit for bit.

    Parameters
    ----------
    qmodel : what ``prepare`` returned; of a wrapped model (DDP, ``torch.compile``) the model inside
    path : file to write, usually ``.safetensors``; it is replaced only when the new one is complete

    Raises
    ------
    SrqError
        For a model that was not prepared, or whose state is not made of tensors alone.
    """
    from safetensors.torch import save_file

    if not isinstance(qmodel, QuantizedModel):
        raise SrqError(
            f"save needs a model that prepare returned, got a {type(qmodel).__name__};"
            " of a wrapped model save the model inside, for others use torch's own way"
        )
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, value in cast("Mapping[str, Any]", qmodel.state_dict()).items():
        if not isinstance(value, Tensor):
            raise SrqError(f"'{name}' in the model's state is a {type(value).__name__}; only tensors can be saved")
        place = (value.device, value.data_ptr(), value.shape, value.stride())
        if value.numel() and place in first:
            aliases[name] = first[place]
            continue
        first[place] = name
        stored[name] = value.detach().to("cpu", copy=True).contiguous()
    about = {
        "format": FORMAT,
        "version": VERSION,
        "config": qmodel.quant_config.model_dump(mode="json"),
        "aliases": aliases,
        "training": qmodel.training,
        "dropping_off": [name for name, part in _named_quantizers(qmodel) if not part.dropping],
        "crc32": _checksum(stored),
    }
    with atomic_path(path) as temporary:
        # One entry: safetensors writes several in an order that changes from run to run.
        save_file(stored, temporary, metadata={FORMAT: json.dumps(about, separators=(",", ":"))})


def load(path: str | Path, model: nn.Module, example_input: Tensor | tuple[Any, ...] | None = None) -> Any:
    """Prepare a float model as the saved one was, and fill it with what was saved.

    Parameters
    ----------
    path : file that :func:`save` wrote
    model : the float architecture, with any weights; it is left as it is
    example_input : an input of the model, as (n, features), to count multiplications where the file lacks them

    Returns
    -------
    The prepared model, on the device of `model`, in the mode (training or evaluation) in which it was saved; its
    outputs are those of the saved one to the bit, and training goes on where it was.

    Raises
    ------
    PackedFormatError
        When the file is missing, damaged, or of another format or version.
    SrqError
        When the model is another one; the message names the first tensor that differs.

    Examples
    --------
    >>> import tempfile
    >>> qmodel = prepare(nn.Linear(4, 2), QuantConfig(weight_bits=2, act_bits=None))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(qmodel, f"{folder}/model.safetensors")
    ...     again = load(f"{folder}/model.safetensors", nn.Linear(4, 2))
    >>> torch.equal(again.weight, qmodel.weight)
    True
    """
    path = Path(path)
    stored, about = _read(path)
    state = stored | {name: stored[origin] for name, origin in about["aliases"].items()}
    config = _config(path, about)
    qmodel = _prepared(path, model, config, example_input)
    counted = {part: part.macs for part in quantizers(qmodel) if isinstance(part, WeightQuantizer)}
    _check_same(path, state, cast("Mapping[str, Any]", qmodel.state_dict()))
    qmodel.load_state_dict(state)
    off = set(about["dropping_off"])
    for name, part in _named_quantizers(qmodel):
        part.dropping = name not in off
        if isinstance(part, WeightQuantizer) and not part.macs:
            part.macs = counted[part]
            part.meta[7] = part.macs
    return qmodel.train(about["training"])


def read_config(path: str | Path) -> QuantConfig:
    """Read how a saved model is quantized, without its architecture.

    Parameters
    ----------
    path : file that :func:`save` wrote

    Raises
    ------
    PackedFormatError
        As :func:`load` does.
    """
    return _config(Path(path), _read(Path(path))[1])


def _config(path: Path, about: Mapping[str, Any]) -> QuantConfig:
    try:
        return QuantConfig(**about["config"])
    except SrqError as error:
        raise type(error)(f"{path} was saved by another release: {error}") from error


def _named_quantizers(model: nn.Module) -> list[tuple[str, WeightQuantizer | InputQuantizer]]:
    return [(name, part) for name, part in model.named_modules() if isinstance(part, (WeightQuantizer, InputQuantizer))]


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    found = 0
    for name in sorted(tensors):
        # A scalar cannot be seen as bytes before it has a dimension.
        found = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, found)
    return found


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = cast("dict[str, str]", file.metadata() or {})
            about = _about(path, metadata)
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise PackedFormatError(f"cannot read {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise PackedFormatError(
            f"{path}: damaged, or not a safetensors file ({error}); save the model again"
        ) from error
    if about["crc32"] != _checksum(tensors):
        raise PackedFormatError(f"{path}: damaged: the tensors do not match their checksum; save the model again")
    lost = next((origin for origin in about["aliases"].values() if origin not in tensors), None)
    if lost is not None:
        raise PackedFormatError(f"{path}: damaged: it lacks tensor '{lost}', which another name refers to")
    return tensors, about


_KINDS: dict[str, type] = {"config": dict, "aliases": dict, "training": bool, "dropping_off": list, "crc32": int}


def _about(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if FORMAT not in metadata:
        hint = "; it holds packed weights: use load_packed" if "srq-packed" in metadata else "; write it with save"
        found = ", ".join(sorted(metadata)) or "none"
        raise PackedFormatError(f"{path}: expected '{FORMAT}' in the header's metadata, found {found}{hint}")
    try:
        about = json.loads(metadata[FORMAT])
    except (ValueError, RecursionError) as error:
        raise PackedFormatError(f"{path}: damaged: the metadata's '{FORMAT}' is no JSON ({error})") from error
    for key, expected in (("format", FORMAT), ("version", VERSION)):
        found = about.get(key) if isinstance(about, dict) else None
        if found != expected:
            raise PackedFormatError(
                f"{path}: expected {key} {expected!r}, found {found!r}; this release reads no other"
            )
    for key, kind in _KINDS.items():
        if type(about.get(key)) is not kind:
            raise PackedFormatError(f"{path}: damaged: the metadata has no '{key}' of the right kind")
    return cast("dict[str, Any]", about)


def _prepared(
    path: Path, model: nn.Module, config: QuantConfig, example_input: Tensor | tuple[Any, ...] | None
) -> QuantizedModel:
    # Steps come from the file, so a search for them would be in vain.
    quick = config.model_copy(update={"init": "max"})
    try:
        with warnings.catch_warnings():
            # About the fresh weights, which are replaced.
            warnings.simplefilter("ignore")
            qmodel = cast("QuantizedModel", prepare(model, quick, example_input))
    except SrqError as error:
        raise type(error)(f"{path} cannot be loaded into this model: {error}") from error
    qmodel.quant_config = config
    return qmodel


def _check_same(path: Path, state: Mapping[str, Tensor], expected: Mapping[str, Any]) -> None:
    for name, wanted in expected.items():
        found = state.get(name)
        if found is None:
            raise SrqError(f"{path} lacks tensor '{name}', which the model has; give the architecture that was saved")
        if found.shape != wanted.shape:
            raise SrqError(
                f"{path}: tensor '{name}' has shape {tuple(found.shape)} and the model's has {tuple(wanted.shape)};"
                " give the architecture that was saved"
            )
        if found.dtype != wanted.dtype:
            raise SrqError(
                f"{path}: tensor '{name}' is {found.dtype} and the model's is {wanted.dtype}; convert the model first"
            )
    extra = next((name for name in state if name not in expected), None)
    if extra is not None:
        raise SrqError(f"{path} has tensor '{extra}', which the model lacks; give the architecture that was saved")
