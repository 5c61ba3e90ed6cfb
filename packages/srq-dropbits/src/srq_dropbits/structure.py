"""Finding the quantized layers of a prepared model, and their quantizers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from srq_dropbits.layers import ResidualAdd
from srq_dropbits.quantizers import InputQuantizer, WeightQuantizer

__all__ = [
    "LAYERS",
    "device_of",
    "float_weight",
    "input_quantizer",
    "quantized_layers",
    "quantizers",
    "weight_quantizer",
]

LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Embedding,
    ResidualAdd,
)
"""Types of layers that can be quantized."""


def weight_quantizer(module: nn.Module) -> WeightQuantizer | None:
    """Return a layer's weight quantizer, or None.

    Parameters
    ----------
    module : a layer of a prepared model
    """
    lists = cast("Any", module._modules.get("parametrizations"))  # pyright: ignore[reportPrivateUsage]
    if lists is None or "weight" not in lists:
        return None
    return next((part for part in lists["weight"] if isinstance(part, WeightQuantizer)), None)


def float_weight(module: nn.Module) -> Tensor:
    """Return a layer's weight as its quantizer gets it: behind any other parametrization, such as a weight norm.

    Parameters
    ----------
    module : a layer, prepared or not
    """
    lists = cast("Any", module._modules.get("parametrizations"))  # pyright: ignore[reportPrivateUsage]
    if lists is None or "weight" not in lists:
        return cast("Tensor", module.weight)
    chain = lists["weight"]
    before = [part for part in chain if not isinstance(part, WeightQuantizer)]
    if chain.is_tensor:
        value = chain.original
    else:
        value = before.pop(0)(*(getattr(chain, f"original{place}") for place in range(chain.ntensors)))
    for part in before:
        value = part(value)
    return value


def input_quantizer(module: nn.Module) -> InputQuantizer | None:
    """Return the quantizer of a layer's input, or None where the input stays as it is.

    Parameters
    ----------
    module : a layer of a prepared model
    """
    part = module._modules.get("input_quantizer")  # pyright: ignore[reportPrivateUsage]
    return part if isinstance(part, InputQuantizer) and not part.off else None


def device_of(model: nn.Module) -> torch.device:
    """Return where a model's parameters are; the CPU for one without any.

    Parameters
    ----------
    model : any module
    """
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Walk the layers that have a quantizer, in the order of ``named_modules``.

    Parameters
    ----------
    model : a prepared model
    """
    for name, module in model.named_modules():
        if weight_quantizer(module) is not None or input_quantizer(module) is not None:
            yield name, module


def quantizers(model: nn.Module) -> list[WeightQuantizer | InputQuantizer]:
    """List all quantizers, each once.

    Parameters
    ----------
    model : a prepared model
    """
    return [module for module in model.modules() if isinstance(module, (WeightQuantizer, InputQuantizer))]
