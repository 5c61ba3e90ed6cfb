"""Optimizers by name: ``block-adam:b=25,K=5`` on a command line becomes an optimizer.

A spec is a name and, after a colon, options separated by commas. Names are ours, torch's (any class of ``torch.optim``,
whatever the case of its letters), or those of the optional package ``pytorch-optimizer``, which is imported only when
asked for. Options are the constructor's; ``b``, ``K``, ``clip`` and ``gamma`` are short forms for our own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from shared_core.errors import InputError, no_such

__all__ = ["Spec", "describe", "known_optimizers", "lr_centre", "make_optimizer", "parse_spec"]

Value: TypeAlias = "int | float | bool | str | tuple[int | float, ...]"
Origin = Literal["ours", "torch", "pytorch-optimizer"]

_OURS: Mapping[str, str] = MappingProxyType(
    {
        "block-adam": "BlockAdam",
        "block-adamw": "BlockAdamW",
        "block-adagrad": "BlockAdagrad",
        "block-rmsprop": "BlockRMSprop",
        "block-amsgrad": "BlockAMSGrad",
        "block-adafom": "BlockAdaFom",
        "adablock": "AdaBlock",
        "radablock": "RandomizedBlockAdam",
        "ggt": "GGT",
        "adabound": "AdaBound",
        "amsbound": "AMSBound",
    }
)
_BLOCKS = frozenset(_OURS) - {"ggt", "adabound", "amsbound"}
_SHORT: Mapping[str, str] = MappingProxyType({"b": "block_size", "K": "update_interval"})
# Neither follows the protocol of one gradient a step: one wants a closure, the other sparse gradients.
_NOT_COMPARABLE = frozenset({"Optimizer", "LBFGS", "SparseAdam"})
_DEFAULTS: Mapping[str, Mapping[str, Value]] = MappingProxyType({"sgd": {"momentum": 0.9}})
_PEER = "pytorch-optimizer"

# Where a grid of learning rates begins. It moves as long as the best is at its edge: this is about time, not results.
_CENTRES: Mapping[str, float] = MappingProxyType(
    {
        "sgd": 0.05,
        "asgd": 0.05,
        "adagrad": 0.05,
        "adadelta": 1.0,
        "rmsprop": 0.005,
        "lion": 0.001,
        "shampoo": 0.05,
        "scalableshampoo": 0.02,
        "soap": 0.02,
        "muon": 0.02,
        "ggt": 0.002,
        "block-adam": 0.02,
        "block-adamw": 0.02,
        "block-amsgrad": 0.02,
        "block-rmsprop": 0.02,
        "block-adagrad": 0.2,
        "block-adafom": 0.1,
        "adablock": 0.02,
    }
)


@dataclass(frozen=True)
class Spec:
    """An optimizer's name and options, as read from text.

    Parameters
    ----------
    text : what was given
    name : the optimizer's name in lower case
    origin : who provides it
    kind : its class
    options : keyword arguments of the class; defaults of this package included
    """

    text: str
    name: str
    origin: Origin
    kind: type[Optimizer]
    options: Mapping[str, Any]


def known_optimizers() -> tuple[str, ...]:
    """Return the names that work without an optional package: ours, then torch's.

    Examples
    --------
    >>> "block-adam" in known_optimizers(), "nadam" in known_optimizers(), "lbfgs" in known_optimizers()
    (True, True, False)
    """
    return (*_OURS, *sorted(_torch_classes()))


def _torch_classes() -> dict[str, type[Optimizer]]:
    found: dict[str, type[Optimizer]] = {}
    for name, value in vars(torch.optim).items():
        if isinstance(value, type) and issubclass(value, Optimizer) and name not in _NOT_COMPARABLE:
            found[name.lower()] = value
    return found


def parse_spec(spec: str) -> Spec:
    """Read a spec and check its name and the names of its options.

    Parameters
    ----------
    spec : ``name`` or ``name:option=value,option=value``; a tuple is written with slashes, ``betas=0.9/0.99``. Ours
        also take ``b`` (block_size), ``K`` (update_interval), ``clip`` (its final learning rate), and
        ``discover=true``: groups found by a probe.

    Raises
    ------
    InputError
        For an unknown name or option (with the nearest known ones), an option without a value or one given twice.

    Examples
    --------
    >>> found = parse_spec("SGD:momentum=0.95,nesterov=true")
    >>> found.name, found.origin, dict(found.options)
    ('sgd', 'torch', {'momentum': 0.95, 'nesterov': True})
    """
    name, _, tail = spec.strip().partition(":")
    name = name.strip().lower()
    origin, kind, name = _find(name, spec)
    given = _read_options(tail, spec)
    options: dict[str, Any] = dict(_DEFAULTS.get(name, {})) if origin == "torch" else {}
    if origin == "ours":
        given = _expand(given, spec)
    allowed = _allowed_options(kind, origin)
    if allowed is not None and name in _BLOCKS:
        allowed = (*allowed, "discover")
    if allowed is not None:
        for option in given:
            if option not in allowed:
                shown = [*allowed, *(_SHORT if name in _BLOCKS else ())]
                raise no_such("option", option, shown, where=f"optimizer '{spec}'")
    return Spec(spec, name, origin, kind, MappingProxyType(options | given))


def _find(name: str, spec: str) -> tuple[Origin, type[Optimizer], str]:
    if not name:
        raise InputError(f"optimizer '{spec}' has no name; give one such as block-adam or adam:weight_decay=0.01")
    if name in _OURS:
        # By name and late: the method's files stay unimported until one of them is asked for.
        return "ours", getattr(import_module("blockdiag_opt"), _OURS[name]), name
    torch_classes = _torch_classes()
    if name in torch_classes:
        return "torch", torch_classes[name], name
    if name.upper() in {excluded.upper() for excluded in _NOT_COMPARABLE}:
        raise InputError(f"optimizer '{spec}' does not take one dense gradient a step; choose another one")
    name = name.removeprefix("pytorch_optimizer.")
    try:
        peer: Any = import_module("pytorch_optimizer")
    except ModuleNotFoundError as error:
        raise InputError(
            f"{no_such('optimizer', name, known_optimizers())}; soap, shampoo, lion and many more come with"
            " pip install 'blockdiag-opt[peers]'"
        ) from error
    names = [str(known).lower() for known in peer.get_supported_optimizers()]
    if name not in names:
        raise no_such("optimizer", name, dict.fromkeys([*known_optimizers(), *names]))
    return _PEER, peer.load_optimizer(name), name


def _read_options(tail: str, spec: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for part in (piece.strip() for piece in tail.split(",")):
        if not part:
            continue
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not key or not value:
            raise InputError(f"optimizer '{spec}': option '{part}' is not name=value")
        if key in options:
            raise InputError(f"optimizer '{spec}': option '{key}' is given twice")
        if key in {"lr", "params"}:
            raise InputError(
                f"optimizer '{spec}': option '{key}' is set elsewhere; the learning rate is not part of it"
            )
        options[key] = _read_value(value)
    return options


def _read_value(text: str) -> Value | None:
    word = text.lower()
    if word in {"true", "false"}:
        return word == "true"
    if word == "none":
        return None
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    if "/" in text:
        parts = [_read_value(part) for part in text.split("/")]
        if all(isinstance(part, int | float) for part in parts):
            return tuple(part for part in parts if isinstance(part, int | float))
    return text


def _expand(given: Mapping[str, Any], spec: str) -> dict[str, Any]:
    """Write out the short forms, and make the clip of its numbers."""
    options: dict[str, Any] = {}
    for key, value in given.items():
        full = _SHORT.get(key, key)
        if full in options:
            raise InputError(f"optimizer '{spec}': option '{full}' is given twice")
        options[full] = value
    gives_clip = isinstance(options.get("clip"), int | float) and not isinstance(options.get("clip"), bool)
    if gives_clip:
        make_clip: Any = import_module("blockdiag_opt").SpectrumClip
        shape: dict[str, float] = {"gamma": float(options.pop("gamma"))} if "gamma" in options else {}
        try:
            options["clip"] = make_clip(final_lr=float(options["clip"]), **shape)
        except (TypeError, ValueError) as error:
            raise InputError(f"optimizer '{spec}': {error}") from error
    elif options.get("clip") is not None:
        raise InputError(f"optimizer '{spec}': option 'clip' is the final learning rate, a number such as clip=0.1")
    return options


def _allowed_options(kind: type[Optimizer], origin: Origin) -> tuple[str, ...] | None:
    """Names a constructor takes, or None where it takes any (and checks them itself)."""
    parameters = inspect.signature(kind).parameters.values()
    if origin == _PEER and any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    named = [p.name for p in parameters if p.kind in {p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY}]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        # What a subclass passes on is what its base takes.
        for base in kind.__mro__[1:]:
            if base not in {Optimizer, object}:
                named += [name for name in inspect.signature(base).parameters if name not in {*named, "args", "kwargs"}]
    return tuple(name for name in named if name not in {"params", "lr", "self"})


def make_optimizer(
    spec: str,
    params_or_model: nn.Module | Iterable[Tensor] | Iterable[dict[str, Any]],
    lr: float,
    probe: tuple[Iterable[Any], Callable[[Any, Any], Tensor]] | None = None,
) -> Optimizer:
    """Make the optimizer that a spec names.

    Parameters
    ----------
    spec : as :func:`parse_spec` reads it
    params_or_model : a module (ours then tell recurrent from dense weights by their layer), tensors, or param groups
    lr : learning rate
    probe : batches and loss for specs with ``discover=true``, as :func:`blockdiag_opt.discover_groups` takes them

    Raises
    ------
    InputError
        For an unknown name or option, a value the optimizer refuses, or parameters that it does not train.

    Examples
    --------
    >>> make_optimizer("adam:weight_decay=0.01", torch.nn.Linear(2, 1), 0.1).defaults["weight_decay"]
    0.01
    """
    found = parse_spec(spec)
    options = dict(found.options)
    kind: Any = found.kind
    try:
        params: Any = params_or_model
        if isinstance(params_or_model, nn.Module):
            params = _params_of(params_or_model, found, options, probe)
        if options.pop("discover", False):
            raise InputError(f"optimizer '{spec}': groups are discovered in a model's gradients; give a model and data")
        return kind(params, lr=lr, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        message = " ".join(str(error).split())
        raise InputError(f"optimizer '{spec}' with learning rate {lr:g}: {message}") from error


def _params_of(
    model: nn.Module,
    spec: Spec,
    options: dict[str, Any],
    probe: tuple[Iterable[Any], Callable[[Any, Any], Tensor]] | None,
) -> Any:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if spec.name not in _BLOCKS:
        return trained
    own: Any = import_module("blockdiag_opt")
    shape = {key: options[key] for key in ("block_size", "grouping") if key in options}
    if spec.name == "adablock":
        shape = {"grouping": "paper"} | shape
    if probe is not None and options.pop("discover", False):
        return own.discover_groups(model, *probe, **shape)
    return own.block_groups(model, **shape)


def describe(spec: str) -> str:
    """Say in one line which class a spec stands for and with which options.

    Examples
    --------
    >>> describe("sgd:nesterov=true")
    'SGD of torch (momentum=0.9, nesterov=True)'
    """
    found = parse_spec(spec)
    options = ", ".join(f"{key}={value}" for key, value in found.options.items())
    owner = {"ours": "blockdiag-opt"}.get(found.origin, found.origin)
    return f"{found.kind.__name__} of {owner}" + (f" ({options})" if options else "")


def lr_centre(spec: str) -> float:
    """Learning rate in the middle of the first grid for an optimizer; the grid moves on if the best is at its edge.

    Examples
    --------
    >>> lr_centre("adam"), lr_centre("sgd:nesterov=true")
    (0.005, 0.05)
    """
    name = spec.partition(":")[0].strip().lower().removeprefix("pytorch_optimizer.")
    return _CENTRES.get(name, 0.005)
