"""A head for a new task, statistics for a cut network, and a fine-tuning that can be interrupted (spec 2.7.2, 2.8)."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from shared_core.device import World, seeded
from shared_core.errors import InputError
from stamp.attention import NarrowAttention
from stamp.drawing import drawn_linear
from stamp.examples import DataError, Examples, check_fits

__all__ = [
    "EpochEnd",
    "HeadError",
    "HeadKind",
    "History",
    "Record",
    "TrainingError",
    "accuracy",
    "class_mean_weights",
    "finetune",
    "head_name",
    "penultimate",
    "recalibrate_bn",
    "with_head",
]

HeadKind = Literal["class-mean", "fresh", "keep"]
State = dict[str, Any]

_SMALL = 5000
_MOVED = 1 << 31


class HeadError(InputError):
    """A network without a head, or a head that does not go with the classes."""


class TrainingError(InputError):
    """Settings that cannot train, or a loss that is no number."""


def head_name(model: nn.Module) -> str:
    """Return the qualified name of the last linear layer, in the order in which modules were registered.

    Parameters
    ----------
    model : a classifier

    Raises
    ------
    HeadError
        When it has no linear layer; those inside an attention do not count.

    Examples
    --------
    >>> head_name(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
    '2'
    """
    inner = {
        f"{name}.out_proj".removeprefix(".")
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention | NarrowAttention)
    }
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name not in inner]
    if not names:
        raise HeadError(f"{type(model).__name__} has no nn.Linear to be its head; end it in one")
    return names[-1]


def penultimate(model: nn.Module, x: Tensor, head: str) -> Float[Tensor, "n features"]:
    """Run the network and return what enters its head.

    Parameters
    ----------
    model : run in the modes that it is in
    x : a batch, on the model's device and of its type
    head : qualified name of the head; see `head_name`

    Raises
    ------
    HeadError
        When there is no such layer, it does not run, or it gets more than one vector an example.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    >>> penultimate(net, torch.ones(4, 3), "2").shape
    torch.Size([4, 5])
    """
    found: list[Tensor] = []
    handle = _head(model, head).register_forward_pre_hook(lambda _, args: found.append(args[0]))
    try:
        model(x)
    finally:
        handle.remove()
    if not found:
        raise HeadError(f"head: '{head}' does not run in the network's forward pass; name the layer that gives logits")
    features = found[-1]
    if features.shape[:-1] != x.shape[:1]:
        raise HeadError(
            f"head: '{head}' gets {tuple(features.shape)} for {len(x)} inputs; it must get (n, features), so pool first"
        )
    return features


def class_mean_weights(
    features: Float[Tensor, "n features"], y: Int64[Tensor, " n"], num_classes: int, scale: float = 10.0
) -> tuple[Float[Tensor, "classes features"], Float[Tensor, " classes"]]:
    """Return the weights of a head that compares with the mean of each class by the cosine (spec 2.7.2).

    Of a feature of average norm the logits are `scale` times the cosine; others scale with their norm, which changes
    no ranking.

    Parameters
    ----------
    features : what enters the head
    y : the class of each
    num_classes : classes; one without an example gets zeros
    scale : the logit of a feature that points to the class

    Returns
    -------
    Weights and a bias of zeros, for a linear layer.

    Examples
    --------
    >>> weight, bias = class_mean_weights(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 1]), 2)
    >>> (torch.tensor([[2.0, 0.0]]) @ weight.T + bias).tolist()
    [[10.0, 0.0]]
    """
    sums = features.new_zeros(num_classes, features.shape[1]).index_add_(0, y, features)
    means = sums / torch.bincount(y, minlength=num_classes).clamp_min(1).to(features)[:, None]
    lengths = means.norm(dim=1, keepdim=True) * features.norm(dim=1).mean()
    # Where all features are next to zero, e.g. gated off, there is no direction: no logits, and finite gradients.
    weight = scale * means / torch.where(lengths > torch.finfo(features.dtype).eps ** 2, lengths, 1.0)
    return weight, weight.new_zeros(num_classes)


def with_head(
    model: nn.Module,
    data: Examples | int,
    *,
    kind: HeadKind = "class-mean",
    head: str | None = None,
    inplace: bool = False,
    seed: int = 0,
) -> nn.Module:
    """Give a network a head for the classes of some data.

    Parameters
    ----------
    model : a classifier; its own head goes, but for ``keep``
    data : whose classes are meant; for ``fresh`` and ``keep`` their number is enough
    kind : ``class-mean`` compares with each class's mean by the cosine; ``fresh`` is random; ``keep`` only checks that
        the head has as many outputs
    head : qualified name of the head. Default: the last linear layer
    inplace : change the model itself instead of a copy
    seed : of the fresh head

    Raises
    ------
    HeadError
        For a model without such a head, or one that cannot be kept.
    DataError
        For inputs that do not fit the model.

    Examples
    --------
    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 100))
    >>> data = Examples(torch.rand(6, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1, 2]), ("a", "b", "c"))
    >>> with_head(net, data)[-1]
    Linear(in_features=8, out_features=3, bias=True)
    """
    model = model if inplace else copy.deepcopy(model)
    name = head_name(model) if head is None else head
    old = _head(model, name)
    classes = data if isinstance(data, int) else data.num_classes
    if classes < 1:
        raise HeadError(f"classes: must be at least 1, got {classes}")
    if kind == "keep":
        if old.out_features != classes:
            raise HeadError(f"head: '{name}' has {old.out_features} outputs for {classes} classes; take another kind")
        return model
    new = cast("nn.Linear", torch.nn.utils.skip_init(nn.Linear, old.in_features, classes).to(old.weight))
    with torch.no_grad():
        if kind == "fresh":
            drawn = drawn_linear(old.in_features, classes, torch.Generator().manual_seed(seed))
            new.load_state_dict(drawn.state_dict())
        elif isinstance(data, int):
            raise HeadError(f"head: '{kind}' needs examples, got only a number of classes; take kind='fresh'")
        else:
            features = _features(model, data, name)
            weight, bias = class_mean_weights(features, data.y.to(features.device), classes)
            new.weight.copy_(weight)
            new.bias.copy_(bias)
    new.train(old.training)
    if not name:
        return new
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, new)
    return model


def recalibrate_bn(
    model: nn.Module, data: Examples, *, batches: int = 20, batch_size: int = 64, seed: int = 0
) -> nn.Module:
    """Replace the running statistics of batch norms by the averages over batches of some data (spec 2.8).

    Everything but batch norms is as in evaluation: dropout is off.

    Parameters
    ----------
    model : changed in place; its modes and momenta stay
    data : drawn from without replacement
    batches : at most so many
    batch_size : examples of a batch; fewer data are one batch
    seed : of the draw

    Returns
    -------
    The model.

    Raises
    ------
    DataError
        For a single example, whose variance is unknown, or inputs that do not fit.

    Examples
    --------
    >>> norm = nn.BatchNorm1d(1)
    >>> data = Examples(torch.tensor([[1.0], [3.0]]), torch.tensor([0, 1]), ("a", "b"))
    >>> recalibrate_bn(nn.Sequential(norm), data)[0].running_mean
    tensor([2.])
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        return model
    if len(data) < 2:
        raise DataError(f"{data.name}: {len(data)} example; batch statistics need at least 2")
    if batches < 1:
        raise TrainingError(f"batches: must be at least 1, got {batches}")
    check_fits(model, data)
    generator = torch.Generator().manual_seed(seed)
    momenta = [norm.momentum for norm in norms]
    with _modes(model), torch.no_grad():
        model.eval()
        for norm in norms:
            _BatchNorm.reset_running_stats(norm)
            norm.momentum = None
            norm.training = True
        try:
            drawn = data.batches(batch_size, generator=generator, drop_last=len(data) >= batch_size)
            for _, (x, _y) in zip(range(batches), drawn, strict=False):
                model(_fed(model, x))
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    return model


def accuracy(model: nn.Module, data: Examples, *, batch_size: int = 256, classes: Sequence[int] | None = None) -> float:
    """Return the share of examples whose class has the highest logit, in evaluation mode.

    Parameters
    ----------
    model : gives ``(n, classes)`` logits; its modes stay
    data : to be classified
    batch_size : examples run at once
    classes : the only ones that compete; all others' logits are left out

    Returns
    -------
    In [0, 1].

    Raises
    ------
    HeadError
        When the model has fewer outputs than the data have classes.
    DataError
        For inputs that do not fit.
    """
    check_fits(model, data)
    allowed = None if classes is None else torch.tensor(list(classes), dtype=torch.int64)
    right = 0
    with _modes(model), torch.inference_mode():
        model.eval()
        for x, y in data.batches(batch_size):
            logits = _checked_logits(model(_fed(model, x)), data)
            if allowed is None:
                answer = logits.argmax(1)
            else:
                allowed = allowed.to(logits.device)
                answer = allowed[logits[:, allowed].argmax(1)]
            right += int((answer == y.to(answer.device)).sum())
    return right / len(data)


@dataclass(frozen=True)
class Record:
    """What happened in an epoch.

    Parameters
    ----------
    epoch : 1, 2, ...
    step : optimizer's steps so far
    train_loss : mean over the epoch's examples
    accuracy : on the validation examples, or None without any
    lr : learning rate of the last step
    seconds : of training so far, validation not included
    """

    epoch: int
    step: int
    train_loss: float
    accuracy: float | None
    lr: float
    seconds: float


@dataclass(frozen=True)
class EpochEnd(Record):
    """A record for `on_epoch`, with the state to go on from.

    Parameters
    ----------
    state : makes the state: nested dicts and lists of tensors, numbers and text, as `shared_core.runs.save_tree` takes
        them
    """

    state: Callable[[], State]


@dataclass(frozen=True)
class History:
    """What `finetune` did.

    Parameters
    ----------
    records : one an epoch
    steps : of the optimizer
    seconds : of training, validation not included
    reached : whether the target was
    """

    records: tuple[Record, ...] = ()
    steps: int = 0
    seconds: float = 0.0
    reached: bool = False

    @property
    def best(self) -> float | None:
        """Highest accuracy of an epoch; None when nothing was validated."""
        return max((record.accuracy for record in self.records if record.accuracy is not None), default=None)


@dataclass
class _Run:
    """A training in progress: what it was asked for, and how far it is."""

    model: nn.Module
    optimizer: torch.optim.SGD
    data: Examples
    settings: dict[str, int | float]
    world: World
    step: int = 0
    seconds: float = 0.0
    records: list[Record] = field(default_factory=list[Record])

    def state(self) -> State:
        """Copy everything that the next epoch depends on."""
        momentum = [
            None if (found := self.optimizer.state[p].get("momentum_buffer")) is None else found.detach().clone()
            for p in self._parameters()
        ]
        return {
            "model": {name: value.detach().clone() for name, value in self.model.state_dict().items()},
            "momentum": momentum,
            "step": self.step,
            "seconds": self.seconds,
            "records": [asdict(record) for record in self.records],
            "settings": dict(self.settings),
        }

    def resume(self, state: Mapping[str, Any]) -> None:
        try:
            before = dict(state["settings"])
            changed = [name for name in self.settings if before.get(name) != self.settings[name]]
            if changed:
                name = changed[0]
                raise TrainingError(
                    f"state: it is of a training with {name} {before.get(name)}, and this one has"
                    f" {self.settings[name]}; resume with the settings that it was started with"
                )
            self.model.load_state_dict(state["model"])
            for parameter, buffer in zip(self._parameters(), state["momentum"], strict=True):
                if buffer is not None:
                    self.optimizer.state[parameter]["momentum_buffer"] = buffer.detach().to(parameter).clone()
            self.step, self.seconds = int(state["step"]), float(state["seconds"])
            self.records = [Record(**record) for record in state["records"]]
        except InputError:
            raise
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise TrainingError(f"state: is not that of a training of this network ({reason})") from error

    def _parameters(self) -> list[nn.Parameter]:
        return self.optimizer.param_groups[0]["params"]

    def epoch(self, number: int, lr: Callable[[int], float], last: int) -> float:
        """Train one epoch, or up to the last step, and return the mean loss."""
        total: Tensor | None = None
        seen = 0
        self.model.train()
        for index in self._order(number)[: last - self.step]:
            self.optimizer.param_groups[0]["lr"] = lr(self.step)
            # A transform sees the whole batch, so that all processes draw one.
            x, y = self.data.inputs(index), self.data.y[index]
            own = self.world.shard(len(index))
            logits = _checked_logits(self.model(_fed(self.model, x[own])), self.data)
            loss = functional.cross_entropy(logits, y[own].to(logits.device)) * (len(y[own]) / len(y))
            self.optimizer.zero_grad(set_to_none=True)
            cast("Any", loss).backward()
            self.world.sum_gradients(self._parameters())
            self.optimizer.step()
            part = loss.detach() * len(y)
            total = part if total is None else total + part
            seen += len(y)
            self.step += 1
        self._average_statistics()
        if total is None:
            return float("nan")
        self.world.all_reduce([total])
        return float(total) / seen

    def _average_statistics(self) -> None:
        """Give every process the mean of the batch norms' running statistics, of which each has seen a part."""
        if self.world.size == 1:
            return
        norms = [module for module in self.model.modules() if isinstance(module, _BatchNorm)]
        buffers = [buffer for norm in norms for buffer in norm.buffers() if buffer.is_floating_point()]
        self.world.all_reduce(buffers)
        for buffer in buffers:
            buffer /= self.world.size

    def _order(self, number: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(int(self.settings["seed"]) * 1_000_003 + number)
        order = torch.randperm(len(self.data), generator=generator).to(self.data.x.device)
        chunks = list(order.split(int(self.settings["batch_size"])))
        # A batch norm cannot train on the one example that may be left to a process.
        few = len(chunks[-1]) < min(2 * self.world.size, len(chunks[0]))
        return chunks[:-1] if few else chunks


def finetune(
    model: nn.Module,
    train: Examples,
    val: Examples | None = None,
    *,
    epochs: int = 10,
    steps: int | None = None,
    lr: float | None = None,
    batch_size: int = 64,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    seed: int = 0,
    state: Mapping[str, Any] | None = None,
    on_epoch: Callable[[EpochEnd], None] | None = None,
    target: float | None = None,
    world: World | None = None,
) -> History:
    """Train a network in place by SGD, with a learning rate that falls to zero along a cosine (spec 2.8).

    The seed decides the order of examples and dropout; torch's global random state is left alone. On the CPU equal
    seeds give equal bits, also when a training goes on from the state of one of its epochs.

    Parameters
    ----------
    model : whose head has an output for each class; parameters that require no gradient stay
    train : to train on
    val : to validate on after each epoch
    epochs : passes over the examples
    steps : steps of the optimizer in all, instead of `epochs`; 0 does nothing
    lr : of the first step. Default: 0.05, below 5000 examples 0.01
    batch_size : examples of a step
    momentum, weight_decay : of SGD
    seed : of the order and of dropout
    state : what `EpochEnd.state` gave in a training with the same settings, to go on from
    on_epoch : called after each epoch
    target : stop as soon as the validation accuracy is at least this
    world : processes that share each batch, from `shared_core.device.process_group`; all end with the same network. Up
        to rounding it is that of one process, unless batch norms see only a share of a batch, or the last batch of an
        epoch is left out because there are fewer than two examples a process in it

    Returns
    -------
    A record an epoch, those before the state included. The network is that of the last epoch.

    Raises
    ------
    TrainingError
        For settings out of range, a state of another training, or a loss that is no number.
    HeadError, DataError
        When data and network do not go together.

    Examples
    --------
    >>> x = torch.linspace(-1, 1, 64)[:, None]
    >>> data = Examples(x, (x[:, 0] > 0).long(), ("low", "high"))
    >>> finetune(nn.Linear(1, 2), data, data, epochs=30, lr=1.0).best
    1.0
    """
    lr = (0.01 if len(train) < _SMALL else 0.05) if lr is None else lr
    _check_settings(epochs=epochs, steps=steps, lr=lr, batch_size=batch_size, momentum=momentum, decay=weight_decay)
    if target is not None and val is None:
        raise TrainingError(f"target: an accuracy of {target:g} needs validation examples; give val")
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise TrainingError("model: none of its parameters requires a gradient; there is nothing to train")
    for data in (train, val):
        if data is not None:
            check_fits(model, data)
    device = next(model.parameters()).device
    train, val = _placed(train, device), None if val is None else _placed(val, device)
    settings: dict[str, int | float] = {
        "lr": lr, "batch_size": batch_size, "momentum": momentum, "weight_decay": weight_decay, "seed": seed,
        "examples": len(train),
    }  # fmt: skip
    optimizer = torch.optim.SGD(trained, lr=lr, momentum=momentum, weight_decay=weight_decay)
    world = world or World()
    if (most := min(batch_size, len(train))) < world.size:
        raise TrainingError(f"batch_size: {most} examples of a step cannot be shared by {world.size} processes")
    run = _Run(model, optimizer, train, settings, world)
    of_epoch = len(run._order(0))  # pyright: ignore[reportPrivateUsage]
    last = epochs * of_epoch if steps is None else steps
    settings["steps"] = last
    if state is not None:
        run.resume(state)
    world.broadcast([*model.parameters(), *model.buffers()])

    def scheduled(step: int) -> float:
        return lr * (1 + math.cos(math.pi * step / last)) / 2

    def reached() -> bool:
        found = run.records[-1].accuracy if run.records else None
        return target is not None and found is not None and found >= target

    with _modes(model):
        while run.step < last and not reached():
            number = run.step // of_epoch + 1
            start = time.perf_counter()
            with seeded(seed * 1_000_003 + number, trained[0].device):
                loss = run.epoch(number, scheduled, last)
            run.seconds += time.perf_counter() - start
            if not math.isfinite(loss):
                raise TrainingError(f"the loss is {loss} in epoch {number}; lower the learning rate ({lr:g})")
            found = None if val is None else accuracy(model, val)
            run.records.append(Record(number, run.step, loss, found, scheduled(run.step - 1), run.seconds))
            if on_epoch is not None:
                on_epoch(EpochEnd(**asdict(run.records[-1]), state=run.state))
    return History(tuple(run.records), run.step, run.seconds, reached())


def _check_settings(
    *, epochs: int, steps: int | None, lr: float, batch_size: int, momentum: float, decay: float
) -> None:
    if epochs < 1 and steps is None:
        raise TrainingError(f"epochs: must be at least 1, got {epochs}")
    if steps is not None and steps < 0:
        raise TrainingError(f"steps: must be at least 0, got {steps}")
    if not 0 < lr < math.inf:
        raise TrainingError(f"lr: must be positive, got {lr:g}")
    if batch_size < 1:
        raise TrainingError(f"batch_size: must be at least 1, got {batch_size}")
    if not 0 <= momentum < 1:
        raise TrainingError(f"momentum: must be in [0, 1), got {momentum:g}")
    if not 0 <= decay < math.inf:
        raise TrainingError(f"weight_decay: must be at least 0, got {decay:g}")


@contextmanager
def _modes(model: nn.Module) -> Generator[None]:
    """Give every module its mode back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _head(model: nn.Module, name: str) -> nn.Linear:
    try:
        found = model.get_submodule(name)
    except AttributeError:
        raise HeadError(f"head: {type(model).__name__} has no module '{name}'") from None
    if not isinstance(found, nn.Linear):
        raise HeadError(f"head: '{name}' is a {type(found).__name__}; name an nn.Linear")
    return found


def _fed(model: nn.Module, x: Tensor) -> Tensor:
    """Return a batch on the device and in the type of the network."""
    like = next((tensor for tensor in model.parameters() if tensor.is_floating_point()), None)
    return x if like is None else x.to(like)


def _placed(data: Examples, device: torch.device) -> Examples:
    """Move data that fit to an accelerator once, rather than batch by batch."""
    if device.type == "cpu" or data.x.device == device or data.x.nbytes > _MOVED:
        return data
    return replace(data, x=data.x.to(device), y=data.y.to(device))


def _features(model: nn.Module, data: Examples, head: str) -> Tensor:
    check_fits(model, data)
    with _modes(model):
        model.eval()
        return torch.cat([penultimate(model, _fed(model, x), head) for x, _ in data.batches(256)])


def _checked_logits(logits: Tensor, data: Examples) -> Tensor:
    if logits.dim() != 2 or logits.shape[1] < data.num_classes:
        raise HeadError(
            f"{data.name}: the network gives {tuple(logits.shape)}, expected (n, {data.num_classes}), a logit a class;"
            " give it a head for these classes: with_head(model, data)"
        )
    return logits
