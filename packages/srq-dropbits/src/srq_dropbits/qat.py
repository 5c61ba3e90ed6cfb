"""One call that quantizes a user's model, and what goes with it: calibration, parameter groups, BN statistics.

``prepare`` returns a copy of the model in which the weights of linear layers, convolutions and embeddings are read
through a quantizer (``torch.nn.utils.parametrize``) and the inputs of these layers pass one (a forward pre-hook). The
forward code of the model stays the user's own.
"""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import count as count_up
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from srq_dropbits.bits import BitController, Report, bit_penalty, report
from srq_dropbits.config import DropBits, Override, QuantConfig
from srq_dropbits.errors import CalibrationError, NothingToQuantizeError, OverrideError, SrqError
from srq_dropbits.grid import Grid
from srq_dropbits.layers import ResidualAdd, SplitAttention
from srq_dropbits.quantizers import InputQuantizer, WeightQuantizer
from srq_dropbits.structure import (
    LAYERS,
    device_of,
    float_weight,
    input_quantizer,
    quantized_layers,
    quantizers,
    weight_quantizer,
)

__all__ = [
    "QuantizedModel",
    "calibrate",
    "input_quantizer",
    "param_groups",
    "prepare",
    "quantized_layers",
    "reestimate_bn",
    "resample",
    "set_dropbits",
    "weight_quantizer",
    "with_add_modules",
]

_Model = TypeVar("_Model", bound=nn.Module)


class QuantizedModel(nn.Module):
    """What ``prepare`` adds to the class of the user's model."""

    quant_config: QuantConfig

    def bit_penalty(self) -> Tensor:
        """Return the penalty to add to the loss, a () tensor; 0 unless bits are learned or PACT clips."""
        return bit_penalty(self)

    def report(self) -> Report:
        """Return bits, bytes and multiplications, layer by layer."""
        return report(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedModel:
        """Copy as any module; without this a copy would take the way of a pickle."""
        made = self.__new__(type(self))
        memo[id(self)] = made
        made.__dict__ = copy.deepcopy(self.__dict__, memo)
        return made

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle as float model, configuration and state: parametrized modules have no pickle of their own."""
        del protocol
        switches = {
            "training": [module.training for module in self.modules()],
            "dropping": [part.dropping for part in quantizers(self)],
            "requires_grad": [parameter.requires_grad for parameter in self.parameters()],
        }
        return _rebuild, (_without_quantizers(self), self.quant_config, dict(self.state_dict()), switches)


def _without_quantizers(model: QuantizedModel) -> nn.Module:
    plain: nn.Module = copy.deepcopy(model)
    plain.__class__ = type(plain).__bases__[1]
    if hasattr(plain, "_untraced"):
        for name in cast("Any", plain)._found_adds:
            delattr(plain, name)
        plain.__class__ = cast("Any", plain)._untraced
    del plain.quant_config
    for module in list(plain.modules()):
        hooks = module._forward_pre_hooks  # pyright: ignore[reportPrivateUsage]
        for key in [key for key, hook in hooks.items() if hook in (_quantize_input, _advance)]:
            del hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)  # pyright: ignore[reportPrivateUsage]
        if weight_quantizer(module) is not None:
            _bare(module)
        if module._modules.get("input_quantizer") is not None:  # pyright: ignore[reportPrivateUsage]
            del module.input_quantizer
            if isinstance(module, ResidualAdd):
                module.register_module("input_quantizer", None)
    return plain


def _bare(module: nn.Module) -> None:
    # torch's own removal would take the property off a class that the original model shares.
    lists = cast("Any", module).parametrizations
    if set(lists) != {"weight"} or len(lists["weight"]) > 1:
        raise SrqError("layers with further parametrizations cannot be pickled; use srq_dropbits.save")
    weight: nn.Parameter = lists["weight"].original
    del module.parametrizations
    module.__class__ = type(module).__bases__[0]
    module.register_parameter("weight", weight)


def _rebuild(
    plain: nn.Module, config: QuantConfig, state: dict[str, Tensor], switches: dict[str, list[bool]]
) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: nn.Module = prepare(plain, config, inplace=True)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        # Quantizers start in float32, whatever the model has been cast to since.
        if name in state and value.dtype != state[name].dtype:
            value.data = value.data.to(state[name].dtype)
    model.load_state_dict(state)
    for module, mode in zip(model.modules(), switches["training"], strict=True):
        module.training = mode
    for part, dropping in zip(quantizers(model), switches["dropping"], strict=True):
        part.dropping = dropping
    for parameter, trained in zip(model.parameters(), switches["requires_grad"], strict=True):
        parameter.requires_grad_(trained)
    return model


def prepare(
    model: nn.Module,
    config: QuantConfig | None = None,
    example_input: Tensor | tuple[Any, ...] | None = None,
    *,
    inplace: bool = False,
) -> Any:
    """Make a copy of a model that trains and runs quantized.

    Quantized are ``Linear``, ``Conv1d`` to ``Conv3d``, their transposes, ``Embedding`` (weights only), the projections
    of ``MultiheadAttention`` and the sums of :class:`srq_dropbits.layers.ResidualAdd`. Biases and norms stay float.
    Call :func:`calibrate` next, unless activations stay float.

    Parameters
    ----------
    model : the user's model, trained or fresh
    config : how to quantize; None takes 4 bits and the defaults
    example_input : an input of the model, as (n, features); with it multiplications are counted at once, otherwise by
        the calibration
    inplace : change the model itself

    Returns
    -------
    The model, with the methods of ``QuantizedModel`` besides its own.

    Raises
    ------
    NothingToQuantizeError
        When no layer is left to quantize.
    OverrideError
        When a pattern of `include`, `exclude` or `overrides` matches no layer.
    InvalidBitsError, NonFiniteError
        For bit-widths that do not exist, and weights that are not numbers.

    Examples
    --------
    >>> qmodel = prepare(nn.Linear(4, 2), QuantConfig(weight_bits=2, act_bits=None))
    >>> sorted(set(qmodel.weight.detach().div(qmodel.weight.abs().max()).round().flatten().tolist()))[-1]
    1.0
    """
    config = config or QuantConfig()
    if isinstance(model, torch.jit.ScriptModule):
        raise SrqError("a scripted model has no layers to quantize; give the model it was scripted from")
    if isinstance(model, QuantizedModel):
        raise SrqError("the model is prepared already; prepare the float model anew")
    root = model if inplace else _copied(model)
    if config.quantize_adds:
        root = with_add_modules(root)
    root = _split_attentions(root, config)
    layers = {name: module for name, module in root.named_modules() if isinstance(module, LAYERS)}
    chosen = _choose(layers, config, root)
    shared: dict[int, WeightQuantizer] = {}
    owners = {id(module): name for name, module in root.named_modules()}
    home = device_of(root)
    for place, (name, (module, settings)) in enumerate(chosen.items()):
        if owners[id(module)] == name:
            device = next((parameter.device for parameter in module.parameters()), home)
            _quantize_layer(module, name or type(module).__name__, config, settings, shared, place, device)
    _adopt(root, config)
    if example_input is not None:
        _count_macs(root, example_input if isinstance(example_input, tuple) else (example_input,))
    return root


def _copied(model: _Model) -> _Model:
    try:
        return copy.deepcopy(model)
    except RuntimeError as error:
        # Such as weights made by an old-style weight norm, or tensors that a forward pass left behind.
        reason = str(error).split(". ")[0]
        raise SrqError(
            f"{type(model).__name__} cannot be copied ({reason}); use torch.nn.utils.parametrizations instead of"
            " old-style weight hooks, or inplace=True"
        ) from error


def _adopt(root: nn.Module, config: QuantConfig) -> None:
    cls = type(root)
    root.__class__ = type(f"Quantized{cls.__name__}", (QuantizedModel, cls), {"__module__": cls.__module__})
    root.quant_config = config  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    if config.learn_bits is not None and any(part.learns_bits for part in quantizers(root)):
        # Below a quantizer: a further child of the root would be run by a Sequential.
        first = next(part for part in quantizers(root) if part.learns_bits)
        controller = BitController(config.learn_bits).to(first.phi.device)
        first.add_module("bit_controller", controller)
        controller.check_budget(root)
    if any(part.gates for part in quantizers(root)):
        root.register_forward_pre_hook(_advance)


def _advance(root: nn.Module, args: tuple[Any, ...]) -> None:
    del args
    if root.training:
        resample(root)


def resample(model: nn.Module) -> None:
    """Draw new masks; the model's own forward does it, so only code that calls its parts one by one needs this.

    Parameters
    ----------
    model : a prepared model
    """
    for part in quantizers(model):
        part.resample()


# ---- which layers, and how


def _split_attentions(root: nn.Module, config: QuantConfig) -> nn.Module:
    if isinstance(root, nn.MultiheadAttention):
        return SplitAttention(root)
    made: dict[nn.Module, SplitAttention] = {}
    for name, module in list(root.named_modules()):
        if isinstance(module, nn.TransformerEncoder):
            # Nested tensors exist for the fused path only.
            module.use_nested_tensor = False
        for key, child in list(module._modules.items()):  # pyright: ignore[reportPrivateUsage]
            full = f"{name}.{key}" if name else key
            if isinstance(child, nn.MultiheadAttention) and (child in made or not _left_alone(full, config)):
                if child not in made:
                    made[child] = SplitAttention(child, full)
                setattr(module, key, made[child])
    return root


def _left_alone(name: str, config: QuantConfig) -> bool:
    if config.include and not any(_matches(name, pattern) for pattern in config.include):
        return not any(pattern.startswith(f"{name}.") for pattern in config.include)
    return any(_matches(name, pattern) for pattern in config.exclude) or any(
        value == "skip" and _matches(name, pattern) for pattern, value in config.overrides.items()
    )


def _matches(name: str, pattern: str) -> bool:
    """Say whether a pattern means this layer, or a module that holds it."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[: place + 1]), pattern) for place in range(len(parts)))


def _choose(
    layers: Mapping[str, nn.Module], config: QuantConfig, root: nn.Module
) -> dict[str, tuple[nn.Module, Override]]:
    if not layers:
        kinds = sorted({type(module).__name__ for module in root.modules() if not list(module.children())})
        raise NothingToQuantizeError(
            f"{type(root).__name__} has no layer to quantize, only: {', '.join(kinds)};"
            " linear layers, convolutions, embeddings and attention are"
        )
    names = [name for name, _ in root.named_modules() if name]
    for pattern in [*config.include, *config.exclude, *config.overrides]:
        if not any(_matches(name, pattern) for name in names):
            near = get_close_matches(pattern, names, 3, 0.4)
            hint = f"close: {', '.join(near)}" if near else f"layers: {', '.join(list(layers)[:8])}"
            raise OverrideError(f"pattern '{pattern}' matches no layer; {hint}")
    chosen: dict[str, tuple[nn.Module, Override]] = {}
    for name, module in layers.items():
        included = not config.include or any(_matches(name, pattern) for pattern in config.include)
        if not included or any(_matches(name, pattern) for pattern in config.exclude):
            continue
        settings: Override | None = Override()
        for pattern, value in config.overrides.items():
            if _matches(name, pattern):
                settings = None if value == "skip" else _merge(settings or Override(), value)
        if settings is not None:
            chosen[name] = (module, settings)
    if not any(not isinstance(module, ResidualAdd) for module, _ in chosen.values()):
        raise NothingToQuantizeError(f"include and exclude leave none of the layers {', '.join(layers)}")
    return chosen


def _merge(old: Override, new: Override) -> Override:
    changes = new.model_dump(exclude_none=True)
    return old.model_copy(update=changes)


def _quantize_layer(
    module: nn.Module,
    name: str,
    config: QuantConfig,
    settings: Override,
    shared: dict[int, WeightQuantizer],
    place: int,
    device: torch.device,
) -> None:
    estimator = settings.estimator or config.estimator
    options: dict[str, Any] = {
        "baseline": config.baseline,
        "learn_sigma": config.learn_sigma,
        "rho": config.rho,
        "temperature": config.temperature,
        "delta": config.delta,
        "name": name,
    }
    act_bits = config.act_bits if settings.act_bits is None else settings.act_bits
    if not isinstance(module, nn.Embedding) and act_bits:
        # The width is what counts: calibration makes the grid a signed one where the input is.
        drops = config.dropbits if config.dropbits and config.dropbits.activations else None
        quantizer = InputQuantizer(
            Grid.unsigned(act_bits), estimator, dropbits=drops, seed=-1 - config.seed * 1000 - place, **options
        )
        quantizer.pact_decay = config.pact_decay
        module.add_module("input_quantizer", quantizer.train(module.training).to(device))
        if not isinstance(module, ResidualAdd):
            module.register_forward_pre_hook(_quantize_input, with_kwargs=True)
    if isinstance(module, ResidualAdd):
        return
    weight = _weight_of(module, name)
    if id(weight) in shared:
        parametrize.register_parametrization(module, "weight", shared[id(weight)], unsafe=True)
        return
    learn = config.learn_bits if settings.weight_bits is None else None
    bits = settings.weight_bits or (learn.max_bits if learn else config.weight_bits)
    _check_gates(name, config, settings)
    grid = Grid.odd(bits) if estimator in {"ste-minmax", "pact"} else Grid.signed(bits, config.symmetric)
    per_channel = config.per_channel if settings.per_channel is None else settings.per_channel
    _warn_if_depthwise(module, name, bits, per_channel)
    quantizer = WeightQuantizer(
        grid,
        estimator,
        shape=_step_shape(module, name) if per_channel else (),
        dropbits=config.dropbits,
        learn_bits=learn,
        seed=config.seed * 1000 + place,
        **options,
    )
    quantizer.to(device)
    with torch.no_grad():
        known = quantizer.initialize(float_weight(module), config.init)
    if not known:
        warnings.warn(f"layer '{name}': all weights are zero; its step starts at 1", stacklevel=4)
    shared[id(weight)] = quantizer
    parametrize.register_parametrization(module, "weight", quantizer, unsafe=True)


def _check_gates(name: str, config: QuantConfig, settings: Override) -> None:
    if settings.estimator is None or (config.dropbits is None and config.learn_bits is None):
        return
    path = (config.dropbits or DropBits()).path(settings.estimator)
    if settings.estimator == "mcste" or (path == "value" and settings.estimator not in {"pact", "ste-minmax", "ptq"}):
        return
    raise OverrideError(f"layer '{name}': estimator '{settings.estimator}' cannot drop or learn bits as the model does")


def _weight_of(module: nn.Module, name: str) -> Tensor:
    if isinstance(module, LazyModuleMixin):
        raise SrqError(f"layer '{name}' is lazy: run the model once on an input, then prepare it")
    if parametrize.is_parametrized(module, "weight"):
        chain = cast("Any", module).parametrizations.weight
        return chain.original if chain.is_tensor else chain.original0
    weight = module._parameters.get("weight")  # pyright: ignore[reportPrivateUsage]
    if weight is None:
        raise OverrideError(
            f"layer '{name}': its weight is made by an old-style hook; use torch.nn.utils.parametrizations,"
            " or exclude it"
        )
    return weight


def _warn_if_depthwise(module: nn.Module, name: str, bits: int, per_channel: bool) -> None:
    groups = getattr(module, "groups", 1)
    if groups > 1 and groups == getattr(module, "in_channels", 0) and bits <= 3 and not per_channel:
        warnings.warn(
            f"layer '{name}': a depthwise convolution with one step at {bits} bits often collapses;"
            f" set per_channel=True, or overrides={{'{name}': {{'per_channel': True}}}}",
            stacklevel=5,
        )


def _step_shape(module: nn.Module, name: str) -> tuple[int, ...]:
    transposed = bool(getattr(module, "transposed", False))
    if transposed and getattr(module, "groups", 1) > 1:
        raise OverrideError(f"layer '{name}': steps per channel of grouped transposed convolutions are not supported")
    axis = int(transposed)
    return tuple(size if place == axis else 1 for place, size in enumerate(cast("Tensor", module.weight).shape))


def _quantize_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    quantizer = cast("Any", module).input_quantizer
    if args:
        return (quantizer(args[0]), *args[1:]), kwargs
    return args, kwargs | {"input": quantizer(kwargs["input"])}


def with_add_modules(root: nn.Module) -> nn.Module:
    """Replace every sum of two tensors in a model by a ``ResidualAdd``, with ``torch.fx``.

    Parameters
    ----------
    root : a model that can be traced

    Raises
    ------
    SrqError
        When ``torch.fx`` cannot trace the model, or would lose something: what the model does in one mode only, or a
        sum written into a tensor that is used again.
    """
    graph, other = _traced(root, root.training), _traced(root, not root.training)
    nodes = list(graph.nodes)
    for node in nodes:
        if "training" in node.kwargs:
            raise SrqError(
                f"quantize_adds: torch.fx would freeze the mode of '{node.name}', which has a 'training' argument;"
                " use its module, such as nn.Dropout, or srq_dropbits.ResidualAdd"
            )
    if graph.python_code("self").src != other.python_code("self").src:
        raise SrqError(
            f"quantize_adds: {type(root).__name__} computes something else in training than in evaluation, of which"
            " torch.fx would freeze one; use srq_dropbits.ResidualAdd in the model instead"
        )
    positions = {node: place for place, node in enumerate(nodes)}
    numbers: set[fx.Node] = set()
    found: list[str] = []
    for node in nodes:
        if _gives_number(node, numbers):
            numbers.add(node)
        elif _is_sum(node) and not numbers.intersection(node.args):
            written = node.args[0]
            if node.target in _WRITING and any(positions.get(user, -1) > positions[node] for user in written.users):
                raise SrqError(
                    f"quantize_adds: '{node.name}' adds to '{written.name}' in place, and that is used again later;"
                    " write a = a + b, or use srq_dropbits.ResidualAdd"
                )
            name = next(name for place in count_up() if not hasattr(root, name := f"residual_add_{place}"))
            found.append(name)
            root.add_module(name, ResidualAdd().train(root.training))
            with graph.inserting_after(node):
                new = graph.call_module(name, node.args)
            node.replace_all_uses_with(new)
            graph.erase_node(node)
    # The traced forward on the user's own class: a GraphModule loses hooks and attributes when it is copied.
    traced = type(fx.GraphModule(root, graph))
    cls = type(root)
    members = {"__module__": cls.__module__, "forward": traced.forward, "_untraced": cls, "_found_adds": found}
    root.__class__ = type(cls.__name__, (cls,), members)
    return root


_WRITING = {operator.iadd, "add_"}
_SUMS = {operator.add, torch.add, "add"} | _WRITING
_SIZES = {"size", "dim", "ndimension", "numel", "nelement", "item"}


def _is_sum(node: fx.Node) -> bool:
    called = node.op in {"call_function", "call_method"} and node.target in _SUMS
    return called and len(node.args) == 2 and not node.kwargs and all(isinstance(arg, fx.Node) for arg in node.args)


def _gives_number(node: fx.Node, numbers: set[fx.Node]) -> bool:
    """Say whether a node gives sizes, or what is computed from them, and no tensor."""
    if node.op == "call_method":
        return node.target in _SIZES
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] in {"shape", "ndim"}
    plain = getattr(node.target, "__module__", "") in {"_operator", "math"}
    return plain and bool(node.all_input_nodes) and numbers.issuperset(node.all_input_nodes)


def _traced(root: nn.Module, training: bool) -> fx.Graph:
    modes = [(module, module.training) for module in root.modules()]
    try:
        root.train(training)
        return _AddTracer().trace(root)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SrqError(
            f"quantize_adds: torch.fx cannot trace {type(root).__name__} ({reason});"
            " use srq_dropbits.ResidualAdd in the model instead"
        ) from error
    finally:
        for module, mode in modes:
            module.training = mode


class _AddTracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # A layer of a class of the user's own, too: its hooks, and with them its quantizers, run when it is called.
        return isinstance(m, LAYERS) or super().is_leaf_module(m, module_qualified_name)


# ---- calibration and statistics


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        named = cast("Mapping[str, Any]", batch)
        return model(**{key: value for key, value in named.items() if key not in {"labels", "label", "y", "target"}})
    if isinstance(batch, (list, tuple)):
        return model(cast("list[Any]", batch)[0])
    return model(batch)


@contextmanager
def _evaluating(model: nn.Module) -> Generator[None]:
    """Put the model into evaluation mode in the body; then every module back into its own."""
    was_training = {id(module): module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module in model.modules():
            module.training = was_training[id(module)]


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in cast("Mapping[str, Any]", batch).items()}
    if isinstance(batch, (list, tuple)):
        return [_moved(value, device) for value in cast("list[Any]", batch)]
    return batch


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Any], *, max_batches: int = 8) -> None:
    """Set the input quantizers' grids and steps from data, with weights and activations in floating point.

    An input without negative values gets the grid 0 .. 2^b-1. Layers that read the network's own input get
    `quantize_input` bits.

    Parameters
    ----------
    model : a prepared model
    batches : batches of inputs, (x, y) pairs, or mappings of keyword arguments, as a ``DataLoader`` gives
    max_batches : how many to look at

    Raises
    ------
    CalibrationError
        When there are no batches, or a layer is never reached.
    NonFiniteError
        When an input holds NaN or infinity.
    """
    if not isinstance(model, QuantizedModel):
        raise SrqError("calibrate needs a model that prepare returned")
    parts = [(module, part) for _, module in quantized_layers(model) if (part := input_quantizer(module)) is not None]
    weights = [part for part in quantizers(model) if isinstance(part, WeightQuantizer)]
    for _, part in parts:
        part.forget()
        part.observing = True
    for part in weights:
        part.enabled = False
    readers: set[int] = set()
    count = 0
    try:
        with _evaluating(model):
            for batch in batches:
                if count == max_batches:
                    break
                batch = _moved(batch, device_of(model))
                if count == 0:
                    readers = _observe_first(model, batch)
                else:
                    _call(model, batch)
                count += 1
    finally:
        for _, part in parts:
            part.observing = False
        for part in weights:
            part.enabled = True
    if count == 0:
        raise CalibrationError("no batch to calibrate with: the loader is empty")
    config = model.quant_config
    for module, part in parts:
        own = config.quantize_input if id(module) in readers else None
        if own == 0:
            part.switch_off()
        elif not part.conclude(own):
            warnings.warn(f"layer '{part.name}': its input is all zero; its step starts at 1", stacklevel=3)


def _observe_first(model: nn.Module, batch: Any) -> set[int]:
    """Run one batch; find the layers that read the network's input, and count multiplications."""
    inputs: set[int] = set()
    readers: set[int] = set()

    def note_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del module
        for value in [*args, *kwargs.values()]:
            if isinstance(value, Tensor):
                inputs.add(value.untyped_storage().data_ptr())

    def note_reader(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor) and args[0].untyped_storage().data_ptr() in inputs:
            readers.add(id(module))

    handles = [model.register_forward_pre_hook(note_input, prepend=True, with_kwargs=True)]
    layers = list(quantized_layers(model))
    for _, module in layers:
        if not isinstance(module, ResidualAdd) and module is not model:
            handles.append(module.register_forward_pre_hook(note_reader, prepend=True))
    try:
        with _counting(model):
            _call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return readers | {id(module) for _, module in layers if module is model}


@contextmanager
def _counting(model: nn.Module) -> Generator[None]:
    """Let every layer note its multiplications for one instance in the body."""
    seen: set[int] = set()

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        del args
        part = weight_quantizer(module)
        if part is None or not isinstance(output, Tensor):
            return
        fan_in = _fan_in(module)
        macs = output[:1].numel() * fan_in if output.dim() > 1 else output.numel() * fan_in
        # A quantizer shared by tied layers adds up.
        part.macs = macs + (part.macs if id(part) in seen else 0)
        seen.add(id(part))
        part.meta[7] = part.macs

    handles = [module.register_forward_hook(note) for _, module in quantized_layers(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _fan_in(module: nn.Module) -> int:
    if isinstance(module, nn.Linear):
        return module.in_features
    if isinstance(module, nn.Embedding):
        return 0
    conv = cast("nn.Conv2d", module)
    size = 1
    for part in conv.kernel_size:
        size *= part
    channels = conv.in_channels // conv.groups
    if getattr(conv, "transposed", False):
        # Every input entry meets the kernel once; per output entry that is its share of the stride.
        for part in conv.stride:
            size = max(size // part, 1)
    return channels * size


@torch.no_grad()
def _count_macs(model: nn.Module, example: tuple[Any, ...]) -> None:
    parts = [part for part in quantizers(model) if isinstance(part, InputQuantizer)]
    before = [part.enabled for part in parts]
    for part in parts:
        part.enabled = False
    try:
        with _evaluating(model), _counting(model):
            model(*_moved(list(example), device_of(model)))
    finally:
        for part, value in zip(parts, before, strict=True):
            part.enabled = value


@torch.no_grad()
def reestimate_bn(model: nn.Module, batches: Iterable[Any], *, max_batches: int = 100) -> int:
    """Estimate the running statistics of batch norms anew, with the quantizers as at test time (RQ, section 4.2).

    Parameters
    ----------
    model : a prepared model, or any other
    batches : batches of inputs, as :func:`calibrate` takes them
    max_batches : how many to average over

    Returns
    -------
    How many batch norms there are.
    """
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    norms = [module for module in model.modules() if isinstance(module, kinds)]
    norms = [module for module in norms if module.track_running_stats and module.running_mean is not None]
    if not norms:
        return 0
    momenta = [module.momentum for module in norms]
    count = 0
    try:
        with _evaluating(model):
            for module in norms:
                # None is a plain average over all batches.
                module.momentum = None
                module.train()
            for batch in batches:
                if count == max_batches:
                    break
                if count == 0:
                    for module in norms:
                        module.reset_running_stats()
                _call(model, _moved(batch, device_of(model)))
                count += 1
    finally:
        for module, momentum in zip(norms, momenta, strict=True):
            module.momentum = momentum
    if count == 0:
        raise CalibrationError("no batch to estimate batch norm statistics with: the loader is empty")
    return len(norms)


def set_dropbits(model: nn.Module, enabled: bool) -> None:
    """Switch the dropping of bits on or off; training ends without it, so that BN statistics fit the test network.

    Layers whose bits are being learned keep their gates.

    Parameters
    ----------
    model : a prepared model
    enabled : whether levels are dropped in training
    """
    for part in quantizers(model):
        if not part.learns_bits:
            part.dropping = enabled


def param_groups(
    model: nn.Module,
    lr: float = 1e-3,
    scale_lr: float | None = None,
    gate_lr: float | None = None,
    weight_decay: float = 1e-4,
) -> list[dict[str, Any]]:
    """Sort the parameters for an optimizer: weights with decay; biases and norms, steps and gates without.

    Parameters
    ----------
    model : a prepared model, or any other
    lr : of weights, biases and norms
    scale_lr : of steps and noise scales, which are learned as logarithms; None: as `lr`
    gate_lr : of the gates; None: fifty times `lr`, as they have to travel farther
    weight_decay : of weights with two dimensions or more

    Returns
    -------
    Groups as ``torch.optim`` takes them; empty ones are left out.

    Examples
    --------
    >>> groups = param_groups(prepare(nn.Linear(4, 2), QuantConfig(act_bits=None)))
    >>> [group["name"] for group in groups]
    ['weights', 'others', 'scales']
    """
    inside = {id(parameter) for part in quantizers(model) for parameter in part.parameters(recurse=False)}
    gates = {id(part.phi) for part in quantizers(model) if part.gates and isinstance(part.phi, nn.Parameter)}
    chosen: dict[str, list[Tensor]] = {"weights": [], "others": [], "scales": [], "gates": []}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in gates:
            kind = "gates"
        elif id(parameter) in inside:
            kind = "scales"
        else:
            kind = "weights" if parameter.dim() > 1 else "others"
        chosen[kind].append(parameter)
    rates = {"scales": lr if scale_lr is None else scale_lr, "gates": 50 * lr if gate_lr is None else gate_lr}
    return [
        {
            "params": parameters,
            "lr": rates.get(kind, lr),
            "weight_decay": weight_decay if kind == "weights" else 0.0,
            "name": kind,
        }
        for kind, parameters in chosen.items()
        if parameters
    ]
