"""Follow every channel through a traced network: what must go together, and what may not go at all.

Each entry of each tensor carries a label, the channel on which its existence depends. Reshapes, transpositions, splits
and concatenations act on the labels as on the values, so that nested concatenations, flattening and heads need
no rule of their own; every other operation ties labels to each other or freezes them. Labels that are alike along an
axis are stored once for it (a stride of zero).
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from stamp.axes import CONVS, NORMS, TRANSPOSED

__all__ = ["Axis", "Elements", "Labeller"]

AxisKey = tuple[str, str]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _modules(text: str) -> tuple[type[nn.Module], ...]:
    return tuple(getattr(nn, name) for name in text.split())


ELEMENTWISE = _names(
    """
    abs add addcmul alpha_dropout asin atan bfloat16 ceil celu clamp clip clone contiguous cos cpu cuda detach div
    double dropout dropout1d dropout2d dropout3d elu eq erf exp expm1 feature_alpha_dropout float floor floor_divide
    floordiv ge gelu gt half hardshrink hardsigmoid hardswish hardtanh heaviside iadd identity imul isub itruediv le
    leaky_relu lerp log log1p log2 logical_and logical_not logical_or logit logsigmoid lt masked_fill maximum
    minimum mish mod mul multiply nan_to_num ne neg negative ones_like pos pow relu relu6 remainder requires_grad_
    round rrelu rsqrt rsub selu sigmoid sign silu sin softplus softshrink softsign sqrt square sub subtract tanh
    tanhshrink threshold to true_divide truediv type type_as where xlogy zeros_like
    """
)
# Of these, floating-point numbers of one shape and type give such numbers again.
ALIKE = _names(
    """
    add dropout elu gelu hardsigmoid hardswish hardtanh iadd imul isub leaky_relu mish mul relu relu6 selu sigmoid silu
    softplus sub tanh
    """
)
RESHAPES = _names(
    """
    T channel_shuffle chunk expand expand_as flatten flip getitem mT movedim moveaxis narrow permute pixel_shuffle
    pixel_unshuffle repeat repeat_interleave reshape reshape_as roll select split split_with_sizes squeeze stack
    swapaxes swapdims t tensor_split tile transpose unbind unflatten unsqueeze view view_as
    """
)
SAFE_RESHAPES = _names(
    """
    T flatten mT movedim moveaxis permute squeeze swapaxes swapdims t transpose unsqueeze
    """
)
JOINS = _names(
    """
    cat concat concatenate
    """
)
SPATIAL = _names(
    """
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
    adaptive_max_pool3d avg_pool1d avg_pool2d avg_pool3d interpolate lp_pool1d lp_pool2d max_pool1d max_pool2d
    max_pool3d pad upsample max_pool1d_with_indices
    """
)
REDUCTIONS = _names(
    """
    amax amin mean std sum var prod logsumexp
    """
)
SOFTMAXES = _names(
    """
    softmax log_softmax normalize cumsum
    """
)
PRODUCTS = _names(
    """
    matmul bmm imatmul
    """
)

POINTWISE_MODULES = _modules(
    """
    Identity Dropout Dropout1d Dropout2d Dropout3d AlphaDropout FeatureAlphaDropout ReLU ReLU6 GELU SiLU Sigmoid
    Tanh Hardtanh Hardswish Hardsigmoid LeakyReLU ELU SELU CELU Mish Softplus Softsign Softshrink Hardshrink
    Tanhshrink RReLU LogSigmoid Threshold
    """
)
SPATIAL_MODULES = _modules(
    """
    MaxPool1d MaxPool2d MaxPool3d AvgPool1d AvgPool2d AvgPool3d LPPool1d LPPool2d AdaptiveAvgPool1d
    AdaptiveAvgPool2d AdaptiveAvgPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d Upsample ZeroPad1d
    ZeroPad2d ZeroPad3d ReflectionPad1d ReflectionPad2d ReplicationPad1d ReplicationPad2d ConstantPad1d
    ConstantPad2d CircularPad2d
    """
)
RESHAPE_MODULES = (nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle)


@dataclass
class Axis:
    """The labels along an axis of a module, and the part that it plays: producer, consumer or follower."""

    role: str
    labels: Int64[Tensor, " entries"]


class Elements:
    """Labels handed out, ties between them, and those that may not go."""

    def __init__(self) -> None:
        self.count = 0
        self._ties: list[Tensor] = []
        self._frozen: list[tuple[Tensor, str]] = []

    def fresh(self, count: int) -> Int64[Tensor, " count"]:
        """Return new labels."""
        self.count += count
        return torch.arange(self.count - count, self.count)

    def tie(self, a: Int64[Tensor, "*shape"], b: Int64[Tensor, "*shape"]) -> None:
        """Make entries of two tensors of labels of one shape share their fate."""
        pairs = torch.stack([torch.atleast_1d(a).flatten(), torch.atleast_1d(b).flatten()])
        pairs = pairs[:, pairs[0] != pairs[1]]
        if pairs.numel():
            numbers = (pairs[0] * self.count + pairs[1]).unique()
            self._ties.append(torch.stack([numbers // self.count, numbers % self.count]))

    def freeze(self, labels: Int64[Tensor, "..."], reason: str) -> None:
        """Forbid the removal of all these."""
        self._frozen.append((_core(labels).unique(), reason))

    def resolve(self) -> tuple[Int64[Tensor, " labels"], dict[int, list[str]]]:
        """Return the channel of each label, and why some channels are frozen."""
        ties = torch.cat([*self._ties, torch.zeros(2, 0, dtype=torch.int64)], 1).numpy()
        graph = coo_array((np.ones(ties.shape[1], np.int8), (ties[0], ties[1])), shape=(self.count, self.count))
        channel = torch.from_numpy(connected_components(graph, directed=False)[1].astype(np.int64))
        reasons: dict[int, list[str]] = {}
        for labels, reason in self._frozen:
            for c in channel[labels].unique().tolist():
                found = reasons.setdefault(c, [])
                if reason not in found:
                    found.append(reason)
        return channel, reasons


@dataclass
class Reshaped:
    """A reshape that may write sizes out: its labels, and the module whose forward pass holds it."""

    labels: Tensor
    operation: str
    owner: str


@dataclass
class Labeller(fx.Interpreter):
    """Run a traced network on an example, and follow the labels alongside; what layers compute is made up.

    After `run`, `axes` holds the labels of every axis of every module, `tensors` those of bare parameters and
    `reshapes` what has to be tried out.

    Parameters
    ----------
    graph_module : the traced network, in eval mode
    known : names of the parameters and buffers of the network itself
    """

    graph_module: fx.GraphModule
    known: frozenset[str]
    elements: Elements = field(default_factory=Elements)
    axes: dict[AxisKey, Axis] = field(default_factory=dict[AxisKey, Axis])
    tensors: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    reshapes: list[Reshaped] = field(default_factory=list[Reshaped])

    def __post_init__(self) -> None:
        super().__init__(self.graph_module)
        self._labels: dict[fx.Node, Any] = {}
        self._names = {id(module): name for name, module in self.graph_module.named_modules()}
        self._parameters: dict[int, str] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run a node and label what it returns."""
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        value = self._outline(n, args, kwargs)
        if value is None:
            value = super().run_node(n)
        self._labels[n] = self._label(n, value, args, kwargs)
        return value

    def _outline(self, n: fx.Node, args: Any, kwargs: Any) -> Tensor | None:
        """Return numbers of the shape that a node gives, where it is known without computing them.

        Nothing that is labelled depends on what layers compute, and the layers are what takes the time. Whatever does
        not fit is left to the real thing, which knows best what is wrong.
        """
        if not args or not isinstance(args[0], Tensor) or not args[0].is_floating_point():
            return None
        x = args[0]
        if n.op == "call_module":
            return _shaped(self.graph_module.get_submodule(str(n.target)), x) if len(args) == 1 and not kwargs else None
        if n.op.startswith("call_") and _called(n) in ALIKE:
            same = all(a.shape == x.shape and a.dtype == x.dtype for a in _tensors((args, list(kwargs.values()))))
            return x if same else None
        return None

    def _label(self, n: fx.Node, value: Any, args: Any, kwargs: Any) -> Any:
        inputs = [label for node in n.all_input_nodes for label in _tensors(self._labels[node])]
        match n.op:
            case "placeholder":
                return self._opaque(value, "is tied to the model's input")
            case "get_attr":
                return self._bare(str(n.target), value)
            case "output":
                for label in inputs:
                    self.elements.freeze(label, "reaches the model's output")
                return None
            case "call_module":
                return self._module(n, value, inputs)
            case _:
                if not list(_tensors(value)):
                    self._sized(n, value, inputs)
                    return None
                return self._function(n, value, inputs, args, kwargs)

    def _sized(self, n: fx.Node, value: Any, inputs: list[Tensor]) -> None:
        """Note that the forward pass asks for a size, on which anything may depend."""
        if isinstance(value, int | torch.Size):
            self.reshapes.extend(Reshaped(label, "size", _owner(n)) for label in inputs)

    def _module(self, n: fx.Node, value: Any, inputs: list[Tensor]) -> Any:
        module = self.graph_module.get_submodule(str(n.target))
        name = self._names[id(module)]
        kind = type(module).__name__
        if not type(module).__module__.startswith("torch.nn.modules"):
            return self._unknown(value, inputs, f"module {name!r} of type {kind} is not looked into")
        x = inputs[0] if inputs else torch.zeros(0, dtype=torch.int64)
        if isinstance(module, (nn.Linear, *CONVS, *NORMS, nn.Embedding, nn.MultiheadAttention, nn.LayerNorm)):
            odd = self._odd(module, name)
            if odd:
                return self._unknown(value, inputs, odd)
        match module:
            case nn.Linear():
                return self._mixing(name, x, x.dim() - 1, module.out_features, value)
            case nn.Module() if isinstance(module, CONVS):
                return self._conv(module, name, x, value)
            case nn.Module() if isinstance(module, (nn.GroupNorm, nn.PReLU, *NORMS)):
                return self._norm(module, name, x)
            case nn.LayerNorm() | nn.RMSNorm():
                axes = range(x.dim() - len(module.normalized_shape), x.dim())
                return self._mix(x, axes, f"{type(module).__name__} {name!r} normalises over all of it")
            case nn.Embedding() if module.max_norm is None:
                labels = self._register(name, "out", "producer", self.elements.fresh(module.embedding_dim))
                return labels.expand(value.shape)
            case nn.MultiheadAttention():
                return self._attention(module, name, n, value)
            case nn.Softmax() | nn.LogSoftmax():
                axes = [x.dim() - 1 if module.dim is None else module.dim]
                return self._mix(x, axes, f"{type(module).__name__} {name!r} mixes it")
            case nn.Softmax2d():
                return self._mix(x, [x.dim() - 3], f"Softmax2d {name!r} mixes it")
            case nn.GLU():
                return self._glu(x, module.dim)
            case nn.Module() if isinstance(module, POINTWISE_MODULES):
                return x
            case nn.Module() if isinstance(module, SPATIAL_MODULES):
                return self._spatial(x, value, f"{type(module).__name__} {name!r}")
            case nn.Module() if isinstance(module, RESHAPE_MODULES):
                if not isinstance(module, nn.Flatten):
                    self.reshapes.append(Reshaped(x, type(module).__name__, name.rpartition(".")[0]))
                return _compact(module(x))
            case _:
                return self._unknown(value, inputs, f"module {name!r} of type {kind} is not known")

    def _odd(self, module: nn.Module, name: str) -> str | None:
        """Why a module of a known type may not be cut: its weights are computed, or another module has them too."""
        for key, parameter in module.named_parameters():
            if ".parametrizations." in f".{key}":
                return f"the weights of {name!r} are parametrized"
            known = self._parameters.setdefault(id(parameter), f"{name}.{key}")
            if known != f"{name}.{key}":
                for axis_key, axis in self.axes.items():
                    if known.startswith(axis_key[0] + "."):
                        self.elements.freeze(axis.labels, f"{known!r} is shared with {name!r}")
                return f"{known!r} is shared with {name!r}"
        weight: Any = getattr(module, "weight", None)
        if weight is not None and "weight" not in dict(module.named_parameters(recurse=False)):
            return f"the weight of {name!r} is computed from other parameters"
        return None

    def _register(self, name: str, axis: str, role: str, labels: Tensor) -> Tensor:
        known = self.axes.setdefault((name, axis), Axis(role, labels))
        if known.labels is not labels:
            self.elements.tie(known.labels, labels)
        return known.labels

    def _along(self, x: Tensor, axis: int) -> Tensor:
        """Tie all that differs elsewhere, and return the labels along the axis."""
        x = self._tied(x, [k for k in range(x.dim()) if k != axis])
        return x[tuple(slice(None) if k == axis else 0 for k in range(x.dim()))]

    def _mixing(self, name: str, x: Tensor, axis: int, width: int, value: Tensor) -> Tensor:
        elsewhere = [k for k in _varying(x) if k != axis]
        if isinstance(self.graph_module.get_submodule(name), nn.Linear) and elsewhere:
            x = self._tied(x, [axis])
            labels = self._register(name, "out", "producer", self.elements.fresh(width))
            self.elements.freeze(labels, f"{name!r} mixes another axis than that of the channels")
            if len(elsewhere) == 1:
                self._register(name, f"rows{elsewhere[0]}", "follower", self._along(x, elsewhere[0]))
            else:
                self.elements.freeze(x, f"{name!r} has channels along two axes")
            return x.narrow(axis, 0, 1).expand(value.shape)
        self._register(name, "in", "consumer", self._along(x, axis))
        labels = self._register(name, "out", "producer", self.elements.fresh(width))
        return _at(labels, axis, value)

    def _conv(self, module: Any, name: str, x: Tensor, value: Tensor) -> Tensor:
        axis = x.dim() - 1 - len(module.kernel_size)
        if module.groups == 1:
            return self._mixing(name, x, axis, module.out_channels, value)
        blocks = self._along(x, axis).unflatten(0, (module.groups, -1))
        tied = self._tied(blocks, [1])
        self._register(name, "in", "follower", blocks.flatten())
        out = tied[:, :1].expand(-1, module.out_channels // module.groups).flatten()
        return _at(self._register(name, "out", "follower", out), axis, value)

    def _norm(self, module: nn.Module, name: str, x: Tensor) -> Tensor:
        if isinstance(module, nn.PReLU) and module.num_parameters == 1:
            return x
        axis = 1
        if type(module).__name__.startswith("InstanceNorm") and x.dim() == int(type(module).__name__[-2]) + 1:
            axis = 0
        labels = self._along(x, axis)
        if isinstance(module, nn.GroupNorm):
            reason = f"GroupNorm {name!r} normalises over all of it"
            labels = self._mix(labels.unflatten(0, (module.num_groups, -1)), [1], reason).flatten()
        return _at(self._register(name, "norm", "follower", labels), axis, x)

    def _attention(self, module: nn.MultiheadAttention, name: str, n: fx.Node, value: Any) -> Any:
        given = (
            dict(zip(("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask"), n.args, strict=False))
            | n.kwargs
        )
        sources: list[Any] = [given[part] for part in ("query", "key", "value")]
        query, key, val = (self._labels[node] for node in sources)
        vectors = [self._along(x, x.dim() - 1) for x in (query, key, val)]
        self._register(name, "in", "consumer", vectors[0])
        whole: Any = getattr(module, "_qkv_same_embed_dim", True)
        for axis, labels in zip(("key", "value"), vectors[1:], strict=True):
            self._register(name, "in" if whole else axis, "consumer", labels)
        heads = self.elements.fresh(module.num_heads)
        inner = heads.repeat_interleave(module.head_dim)
        if (name, "inner") not in self.axes:
            self._register(name, "inner", "producer", inner)
        labels = self.axes[name, "inner"].labels
        mask: Any = given.get("attn_mask")
        if isinstance(mask, fx.Node) and self._labels[mask].dim() == 3:
            self.elements.freeze(labels, f"{name!r} is given a mask for each head")
        if not name or module.bias_k is not None or module.add_zero_attn:
            self.elements.freeze(labels, f"{name!r} adds keys of its own")
        users = [user for user in n.users if not (user.target is operator.getitem and user.args[1] == 0)]
        if any(user.users for user in users):
            self.elements.freeze(labels, f"the attention weights of {name!r} are used")
        out = self._register(name, "out", "producer", self.elements.fresh(module.embed_dim))
        weights = None if value[1] is None else self._opaque(value[1], "are attention weights")
        return _at(out, value[0].dim() - 1, value[0]), weights

    def _function(self, n: fx.Node, value: Any, inputs: list[Tensor], args: Any, kwargs: Any) -> Any:
        name = _called(n)
        if name == "getattr":
            name = str(args[1])
        x = inputs[0] if inputs else None
        if x is None:
            return self._opaque(value, f"a constant of {name!r} has its size")
        if name in ELEMENTWISE:
            return self._elementwise(inputs, value)
        if name in JOINS:
            return self._joined(n, value)
        if name in RESHAPES:
            return self._reshaped(n, name, value)
        if name in SPATIAL:
            return self._spatial(x, value, f"{name!r}")
        if name in REDUCTIONS or name in SOFTMAXES:
            return self._reduced(name, x, value, args, kwargs)
        if name in PRODUCTS:
            return self._product(*inputs, value=value)
        if name == "scaled_dot_product_attention":
            return self._dot_product_attention(inputs, value)
        if name == "glu":
            return self._glu(x, kwargs.get("dim", args[1] if len(args) > 1 else -1))
        return self._unknown(value, inputs, f"the operation {name!r} is not known")

    def _elementwise(self, inputs: Sequence[Tensor], value: Tensor) -> Tensor:
        shape = value.shape
        result, thin = _broadcast(inputs[0], shape)
        for x in inputs[1:]:
            other, other_thin = _broadcast(x, shape)
            spread, other_spread = set(_varying(other)) & thin, set(_varying(result)) & other_thin
            if not spread and not other_spread:
                a, b = _cores(result, other)
                self.elements.tie(a, b)
            else:
                for small, large, stretched in ((result, other, spread), (other, result, other_spread)):
                    if stretched:
                        self.elements.freeze(small, "is spread over channels")
                        if set(_varying(large)) - stretched:
                            self.elements.freeze(large, "has channels of another tensor spread over it")
            if not _varying(result) or 0 < len(_varying(other)) < len(_varying(result)):
                result = other
            thin &= other_thin
        return result

    def _joined(self, n: fx.Node, value: Tensor) -> Tensor:
        first: Any = n.args[0] if n.args else n.kwargs["tensors"]
        axis: Any = n.args[1] if len(n.args) > 1 else n.kwargs.get("dim", n.kwargs.get("axis", 0))
        axis %= value.dim()
        labels: list[Tensor] = list(map_arg(first, self._labels.__getitem__))
        keep = {k for label in labels for k in _varying(label)} | {axis}
        slim = [label[tuple(slice(None) if k in keep else slice(0, 1) for k in range(value.dim()))] for label in labels]
        joined = _compact(torch.cat(slim, axis))
        # What is removed of a tensor is the same all along its other axes.
        if any(axis not in _varying(label) and _varying(label) for label in labels):
            joined = self._tied(joined, [axis])
        return joined.expand(value.shape)

    def _reshaped(self, n: fx.Node, name: str, value: Any) -> Any:
        args: Any = map_arg(n.args, self._labels_or_value)
        kwargs: Any = map_arg(n.kwargs, self._labels_or_value)
        if name == "getitem":
            args = (args[0], map_arg(n.args[1], self.env_of))
            if isinstance(args[0], tuple):
                return args[0][args[1]]
        source = next(label for node in n.all_input_nodes for label in _tensors(self._labels[node]))
        if name not in SAFE_RESHAPES:
            self.reshapes.append(Reshaped(source, name, _owner(n)))
        name = "reshape" if name == "view" else name
        if name in {"expand_as", "view_as", "reshape_as"}:
            return _compact(source.reshape(value.shape) if name != "expand_as" else source.expand(value.shape))
        if n.op == "call_method":
            moved = getattr(args[0], name)(*args[1:], **kwargs)
        else:
            function: Any = n.target
            moved = function(*args, **kwargs)
        return tuple(map(_compact, moved)) if isinstance(moved, tuple | list) else _compact(moved)

    def _labels_or_value(self, node: fx.Node) -> Any:
        return self._labels[node] if self._labels[node] is not None else self.env_of(node)

    def env_of(self, node: fx.Node) -> Any:
        """Return the value of a node that is still needed."""
        return self._kept[node]

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> Any:
        """Remember the values of a node's inputs, beside what the base class does."""
        self._kept = {node: self.env[node] for node in n.all_input_nodes}
        return super().fetch_args_kwargs_from_env(n)

    def _spatial(self, x: Tensor, value: Any, what: str) -> Any:
        if not isinstance(value, Tensor):
            return tuple(self._spatial(x, part, what) for part in value)
        free = [k for k in range(x.dim()) if x.shape[k] != value.shape[k] or k >= 2] if x.dim() > 2 else [x.dim() - 1]
        x = self._mix(x, free, f"{what} works along its channels")
        return x[tuple(slice(0, 1) if k in free else slice(None) for k in range(x.dim()))].expand(value.shape)

    def _reduced(self, name: str, x: Tensor, value: Any, args: Any, kwargs: Any) -> Any:
        dims = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else None))
        if name == "normalize":
            dims = kwargs.get("dim", args[2] if len(args) > 2 else 1)
        if not isinstance(value, Tensor):
            return self._unknown(value, [x], f"{name!r} returns several tensors")
        axes = list(range(x.dim())) if dims is None else [dims] if isinstance(dims, int) else list(dims)
        x = self._mix(x, axes, f"{name!r} mixes it")
        if name in SOFTMAXES:
            return x
        axes = sorted({axis % x.dim() for axis in axes}, reverse=True)
        for axis in axes:
            x = x.select(axis, 0)
        if value.dim() > x.dim():
            for axis in reversed(axes):
                x = x.unsqueeze(axis)
        return _compact(x)

    def _product(self, a: Tensor, b: Tensor, *, value: Tensor) -> Tensor:
        if a.dim() < 3 or b.dim() < 3:
            return self._unknown(value, [a, b], "a product of matrices mixes it")
        reason = "a product of matrices mixes it"
        a, b = (self._mix(x, [x.dim() - 2, x.dim() - 1], reason)[..., :1, :1] for x in (a, b))
        shape = (*value.shape[:-2], 1, 1)
        return self._elementwise([a, b], torch.empty(shape, device="meta")).expand(value.shape)

    def _dot_product_attention(self, inputs: Sequence[Tensor], value: Tensor) -> Tensor:
        if len({x.shape[:-2] for x in inputs[:3]}) != 1:
            return self._unknown(value, inputs, "attention with shared keys mixes it")
        like = torch.empty((*value.shape[:-2], 1, 1), device="meta")
        q, k, v = (self._mix(x, [x.dim() - 2, x.dim() - 1], "attention mixes it")[..., :1, :1] for x in inputs[:3])
        for mask in inputs[3:]:
            self.elements.freeze(mask, "is an attention mask")
        return self._elementwise([q, k, v], like).expand(value.shape)

    def _glu(self, x: Tensor, axis: int) -> Tensor:
        a, b = x.chunk(2, axis)
        self.elements.tie(*_cores(a, b))
        return _compact(a)

    def _mix(self, x: Tensor, axes: Iterable[int], reason: str) -> Tensor:
        """Let an operation mix entries along axes: tie them if labels differ elsewhere too, else freeze them."""
        axes = {axis % x.dim() for axis in axes}
        mixed = axes & set(_varying(x))
        if mixed and not set(_varying(x)) - axes:
            self.elements.freeze(x, reason)
            return x
        return self._tied(x, sorted(mixed))

    def _tied(self, x: Tensor, axes: Sequence[int]) -> Tensor:
        small = _core(x)
        for axis in axes:
            if small.shape[axis] > 1:
                first = small.narrow(axis, 0, 1)
                self.elements.tie(first.expand_as(small), small)
                small = first
        return small.expand(x.shape)

    def _bare(self, name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return None
        if name not in self.known:
            return self._opaque(value, "a constant made in the forward pass has its size")
        if name not in self.tensors:
            self.tensors[name] = self.elements.fresh(value.numel()).view(value.shape)
            if isinstance(value, nn.Parameter) and self._parameters.setdefault(id(value), name) != name:
                self.elements.freeze(self.tensors[name], f"{self._parameters[id(value)]!r} is used elsewhere too")
        return self.tensors[name]

    def _opaque(self, value: Any, reason: str) -> Any:
        if not isinstance(value, Tensor):
            return tuple(self._opaque(part, reason) for part in value) if isinstance(value, tuple | list) else None
        label = self.elements.fresh(1)
        self.elements.freeze(label, reason)
        return label.expand(value.shape) if value.dim() else label[0]

    def _unknown(self, value: Any, inputs: Iterable[Tensor], reason: str) -> Any:
        for label in inputs:
            self.elements.freeze(label, reason)
        return self._opaque(value, reason)


def _called(n: fx.Node) -> str:
    name = n.target if isinstance(n.target, str) else getattr(n.target, "__name__", str(n.target))
    return name.rstrip("_") if not name.endswith("__") else name.strip("_")


def _shaped(module: Any, x: Tensor) -> Tensor | None:
    kind = type(module)
    if module._forward_hooks or module._forward_pre_hooks:
        return None
    if kind in POINTWISE_MODULES:
        return x
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dtype != x.dtype:
        return None
    if kind is nn.Linear and x.shape[-1:] == (module.in_features,):
        return x.new_zeros(*x.shape[:-1], module.out_features)
    if kind in CONVS and x.dim() == 2 + len(module.kernel_size) and x.shape[1] == module.in_channels:
        places = _conv_places(module, x.shape[2:])
        return x.new_zeros(len(x), module.out_channels, *places) if min(places) > 0 else None
    dims: dict[Any, tuple[int, ...]] = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}
    if x.dim() in dims.get(kind, ()) and x.shape[1] == module.num_features and not module.training:
        return x
    return None


def _conv_places(conv: Any, shape: Sequence[int]) -> list[int]:
    places: list[int] = []
    for k, n in enumerate(shape):
        reach = conv.dilation[k] * (conv.kernel_size[k] - 1)
        padding = {"same": reach, "valid": 0}[conv.padding] if isinstance(conv.padding, str) else 2 * conv.padding[k]
        if isinstance(conv, TRANSPOSED):
            places.append((n - 1) * conv.stride[k] - padding + reach + conv.output_padding[k] + 1)
        else:
            places.append((n + padding - reach - 1) // conv.stride[k] + 1)
    return places


def _owner(n: fx.Node) -> str:
    stack: dict[str, Any] = n.meta.get("nn_module_stack", {})
    return str(list(stack.values())[-1][0]) if stack else ""


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)


def _varying(x: Tensor) -> list[int]:
    return [k for k in range(x.dim()) if x.stride(k) != 0 and x.shape[k] > 1]


def _core(x: Tensor) -> Tensor:
    return x[tuple(slice(None) if x.stride(k) != 0 else slice(0, 1) for k in range(x.dim()))] if x.dim() else x


def _cores(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return two tensors of one shape without the axes along which neither varies."""
    vary = {*_varying(a), *_varying(b)}
    at = tuple(slice(None) if k in vary else slice(0, 1) for k in range(a.dim()))
    return (a[at], b[at]) if a.dim() else (a, b)


def _compact(x: Tensor) -> Tensor:
    small = _core(x)
    for axis in range(x.dim()):
        first = small.narrow(axis, 0, 1)
        if small.shape[axis] > 1 and bool((small == first).all()):
            small = first
    return small.expand(x.shape)


def _broadcast(x: Tensor, shape: torch.Size) -> tuple[Tensor, set[int]]:
    missing = len(shape) - x.dim()
    thin = {k for k in range(len(shape)) if shape[k] > 1 and (k < missing or x.shape[k - missing] == 1)}
    return x.expand(shape), thin


def _at(labels: Tensor, axis: int, like: Tensor) -> Tensor:
    return labels.view([-1 if k == axis else 1 for k in range(like.dim())]).expand(like.shape)
