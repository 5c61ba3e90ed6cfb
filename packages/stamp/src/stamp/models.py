"""Networks as a command line names them: a built-in or the user's own function, with weights, and what they expect."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from shared_core.errors import InputError
from stamp._files import read_weights
from stamp.networks import build
from stamp.training import HeadError, head_name, with_head

__all__ = ["WeightsError", "load_weights", "open_model"]


class WeightsError(InputError):
    """Weights that are not those of the network."""


def open_model(
    name: str,
    weights: str | Path | None = None,
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    width: float = 1.0,
    seed: int = 0,
) -> nn.Module:
    """Make a network in evaluation mode, with its weights.

    Parameters
    ----------
    name : a built-in, or ``package.module:function``; see `stamp.networks.factory`
    weights : safetensors file of its state. Default: those that it is made with
    num_classes, in_channels, width : given to the function where it takes them; left out where None. With weights, the
        head gets as many outputs as they have
    seed : of the weights that it is made with

    Raises
    ------
    InputError
        When there is no such function, or it fails.
    PlanError, WeightsError
        For a file that cannot be read, or is of another network.

    Examples
    --------
    >>> open_model("smallconv", num_classes=7, in_channels=1)[-1]
    Linear(in_features=64, out_features=7, bias=True)
    """
    options: dict[str, object] = {"width": width, "seed": seed}
    options |= {} if num_classes is None else {"num_classes": num_classes}
    options |= {} if in_channels is None else {"in_channels": in_channels}
    model = build(name, **options)
    if weights is not None:
        model = load_weights(model, read_weights(Path(weights)), str(weights))
    return model.eval()


def load_weights(model: nn.Module, state: Mapping[str, Tensor], place: str) -> nn.Module:
    """Load a state into a network, whose head is replaced first where the state has another number of outputs.

    Parameters
    ----------
    model : changed in place
    state : parameters and buffers by name
    place : what to call them in messages

    Returns
    -------
    The network; another one only where the network itself is the head.

    Raises
    ------
    WeightsError
        For names or shapes that are not the network's.
    """
    model = _with_outputs(model, state)
    own = model.state_dict()
    for name in {**own, **state}:
        if name not in own:
            raise WeightsError(
                f"{place}: has '{name}', and {type(model).__name__} has not; give weights of this network"
            )
        if name not in state:
            raise WeightsError(f"{place}: lacks '{name}' of {type(model).__name__}; give weights of this network")
        if state[name].shape != own[name].shape:
            raise WeightsError(
                f"{place}: '{name}' has shape {tuple(state[name].shape)}, and the network's is"
                f" {tuple(own[name].shape)}; give the width and channels that it was trained with"
            )
    model.load_state_dict(dict(state))
    return model


def _with_outputs(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    try:
        name = head_name(model)
    except HeadError:
        return model
    head = model.get_submodule(name)
    stored = state.get(f"{name}.weight" if name else "weight")
    if not isinstance(head, nn.Linear) or stored is None or stored.dim() != 2 or len(stored) == head.out_features:
        return model
    return with_head(model, len(stored), kind="fresh", head=name, inplace=True)
