"""Training of float and of quantized networks, epoch by epoch, and the whole way from the one to the other.

:func:`fit` takes the steps (spec, section 2.7): task loss and bit penalty, one optimizer with groups of their own for
steps and gates, DropBits off at the end. :func:`quantize_and_train` is the recipe around it: prepare, calibrate, train,
freeze learned bits, train on, re-estimate batch norm. Lee et al., arXiv:1911.12990 and arXiv:2109.02100; Louizos
et al., arXiv:1810.01875, section 4.2 for the re-estimation.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn
from torch.optim import Optimizer

from shared_core.device import World, seeded
from shared_core.errors import InputError
from srq_dropbits.bits import Report, bit_penalty, freeze_bits, report, update_controller
from srq_dropbits.config import QuantConfig
from srq_dropbits.errors import NonFiniteError
from srq_dropbits.qat import calibrate, param_groups, prepare, reestimate_bn, set_dropbits
from srq_dropbits.structure import device_of, input_quantizer, quantized_layers, weight_quantizer
from srq_dropbits.userdata import DataSplit

__all__ = [
    "Quantized",
    "Training",
    "augment_images",
    "batches_of",
    "evaluate",
    "fit",
    "predict_proba",
    "quantize_and_train",
]

Augment = Literal["none", "crop", "crop+flip"]
Schedule = Literal["cosine", "linear", "constant"]
_Optimizer = Literal["adamw", "adam", "sgd"]
# A gate that keeps its level with probability 0.9 starts at a log-odds of 0.6 and closes below -2.4.
_GATE_TRAVEL = 6.0


@dataclass
class Training:
    """A training under way or done.

    Attributes
    ----------
    model : on its device
    optimizer : that trains it
    options : how it was asked for, as plain values
    history : a dict an epoch: epoch, loss, penalty, learning_rate, train_accuracy, validation_accuracy and
        validation_loss where there are rows for them; of a quantized model also avg_bits and ``layers``: name -> bits,
        alpha, rho, act_alpha
    """

    model: nn.Module
    optimizer: Optimizer
    options: dict[str, Any]
    history: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    def state(self) -> dict[str, Any]:
        """Return what :func:`fit` takes as ``resume``; ``shared_core.runs.save_tree`` can store it."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "options": self.options,
            "history": self.history,
        }


@dataclass
class Quantized:
    """What :func:`quantize_and_train` returns.

    Attributes
    ----------
    model : the quantized model in evaluation mode
    config : how it was quantized
    history : as of :class:`Training`
    metrics : ``validation accuracy``, ``test accuracy``, ``test loss``, ``float test accuracy`` and so on, for the
        parts that have rows; accuracies are 0..1
    report : bits and bytes, layer by layer
    """

    model: nn.Module
    config: QuantConfig
    history: list[dict[str, Any]]
    metrics: dict[str, float]
    report: Report


def _silent(training: Training) -> None:
    del training


def fit(
    model: nn.Module,
    data: DataSplit,
    *,
    epochs: int = 20,
    lr: float | int = 2e-3,
    batch_size: int = 64,
    scale_lr: float | int | None = None,
    gate_lr: float | int | None = None,
    weight_decay: float | int = 1e-4,
    optimizer: _Optimizer = "adamw",
    schedule: Schedule = "cosine",
    warmup: float | int = 0.0,
    label_smoothing: float | int = 0.0,
    teacher: nn.Module | None = None,
    distill: float | int = 0.0,
    temperature: float | int = 2.0,
    dropbits_off_frac: float | int = 0.1,
    freeze_at: float | int | None = None,
    augment: Augment = "none",
    clip_norm: float | int | None = None,
    seed: int = 0,
    world: World | None = None,
    resume: Mapping[str, Any] | None = None,
    after_epoch: Callable[[Training], None] = _silent,
) -> Training:
    """Train a float or a prepared model.

    What an epoch does depends on ``seed``, its number and the state it starts from alone, so a resumed training repeats
    an uninterrupted one; the global random state is left as it was.

    Parameters
    ----------
    model : on the device to train on; a prepared one must be calibrated
    data : rows to train on, and to watch
    epochs : passes through the training rows
    lr : learning rate at the top of the schedule
    batch_size : rows in a step, over all processes
    scale_lr, gate_lr : of steps and gates of a prepared model; None takes what ``param_groups`` does
    weight_decay : of weights; steps, gates, biases and batch norm have none
    optimizer : adamw, adam or sgd (with momentum 0.9)
    schedule : how the learning rate falls to 0 after the warm-up, or constant
    warmup : share of the steps over which it rises linearly
    label_smoothing : share of the target that is spread over all classes
    teacher : float model to learn from
    distill : share of the loss that is the divergence from the teacher, 0..1
    temperature : that both outputs are divided by in it
    dropbits_off_frac : share of the steps at the end that run without DropBits, so that batch norm sees what it will
        see in use (spec, section 2.5)
    freeze_at : share of the epochs after which learned bit-widths are frozen; None never does
    augment : move images by up to an eighth of their side (4 pixels of 32), and mirror half of them
    clip_norm : largest norm of the gradient, or None
    seed : of the order of batches and of all else that is random
    world : processes that train together, as ``shared_core.device.process_group`` gives it; gradients are summed over
        them
    resume : state of an earlier training with the same options
    after_epoch : called after every epoch

    Returns
    -------
    The training, done.

    Raises
    ------
    InputError
        When the model does not fit the data, an option is out of range, or the training diverges.

    Examples
    --------
    >>> from srq_dropbits.models import MLP
    >>> from srq_dropbits.userdata import load_images_or_table
    >>> data = load_images_or_table("wine").split()
    >>> done = fit(MLP(data.shape, data.classes, "8"), data, epochs=2)
    >>> [record["epoch"] for record in done.history]
    [1, 2]
    """
    _check_options(epochs=epochs, lr=lr, batch_size=batch_size, distill=distill, temperature=temperature, warmup=warmup)
    world = world or World()
    device = device_of(model)
    data = data.to(device)
    prepared = any(True for _ in quantized_layers(model))
    _check_fit(model, data)
    if augment != "none" and len(data.shape) != 3:
        raise InputError(f"augment={augment!r} needs images, and a row has shape {data.shape}; leave it out")
    if distill and teacher is None:
        raise InputError("distill needs a teacher: the float model")
    groups = (
        param_groups(model, lr, scale_lr=scale_lr, gate_lr=gate_lr, weight_decay=weight_decay)
        if prepared
        else _float_groups(model, lr, weight_decay)
    )
    # All that decides what a step does: a checkpoint is resumed only where these are the same.
    options: dict[str, Any] = {
        "epochs": epochs,
        "lr": lr,
        "batch_size": batch_size,
        "scale_lr": scale_lr,
        "gate_lr": gate_lr,
        "weight_decay": weight_decay,
        "optimizer": optimizer,
        "schedule": schedule,
        "warmup": warmup,
        "label_smoothing": label_smoothing,
        "distill": distill,
        "temperature": temperature,
        "dropbits_off_frac": dropbits_off_frac,
        "freeze_at": freeze_at,
        "augment": augment,
        "clip_norm": clip_norm,
        "seed": seed,
        "rows": len(data.y_train),
    }
    training = Training(model, _make_optimizer(optimizer, groups), options)
    frozen_from = epochs if freeze_at is None else round(epochs * freeze_at)
    if resume is not None:
        _restore(training, resume, frozen_from)
    world.broadcast([*model.parameters(), *model.buffers()])
    loss_of = _Loss(data, label_smoothing, teacher if distill else None, distill, temperature, augment)
    rates = [float(group["lr"]) for group in groups]
    bounds = _bounds(len(data.y_train), batch_size, world)
    total = len(bounds) * epochs
    free_from = round(total * (1 - dropbits_off_frac))
    for epoch in range(len(training.history), epochs):
        if prepared and epoch == frozen_from:
            freeze_bits(model)
        with seeded((seed, epoch), device) as generator:
            order = torch.randperm(len(data.y_train), generator=generator).to(device)
            model.train()
            sums = torch.zeros(3, device=device)
            factor = 1.0
            for place, (start, stop) in enumerate(bounds):
                step = epoch * len(bounds) + place
                if prepared:
                    set_dropbits(model, step < free_from)
                factor = _factor(step, total, warmup, schedule)
                for group, rate in zip(training.optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * factor
                sums += _step(training, loss_of, order[start:stop], generator, world, clip_norm, prepared)
        _average_batch_norm(model, world)
        world.all_reduce([sums[1:2]])
        training.history.append(_record(training, data, sums, rates[0] * factor, len(bounds), prepared))
        after_epoch(training)
    model.eval()
    return training


def _check_options(**values: float | int) -> None:
    for name in ("lr", "batch_size", "temperature"):
        if not values[name] > 0:
            raise InputError(f"{name} is {values[name]}; it must be above 0")
    for name in ("distill", "warmup"):
        if not 0 <= values[name] <= 1:
            raise InputError(f"{name} is {values[name]}; it is a share, 0..1")
    if values["epochs"] < 0:
        raise InputError(f"epochs is {values['epochs']}; it must be 0 or more")


def _check_fit(model: nn.Module, data: DataSplit) -> None:
    """Refuse a model that does not map the rows to a number for each class."""
    try:
        shape = tuple(_logits(model, data.x_train[:2]).shape)
    except InputError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        detail = " ".join(str(error).split())
        raise InputError(f"the model does not take rows of shape {data.shape}: {detail}") from error
    if shape != (len(data.x_train[:2]), data.classes):
        raise InputError(
            f"the model returns {shape[1:]} for a row, and the data have {data.classes} classes; give it"
            f" {data.classes} outputs"
        )


def _float_groups(model: nn.Module, lr: float | int, weight_decay: float | int) -> list[dict[str, Any]]:
    """Return parameter groups of a float model: matrices decay, biases and batch norm do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise InputError("the model has no parameters to train")
    return [
        {"params": [p for p in parameters if p.ndim > 1], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "lr": lr, "weight_decay": 0.0},
    ]


def _make_optimizer(name: _Optimizer, groups: list[dict[str, Any]]) -> Optimizer:
    if name == "sgd":
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    return (torch.optim.AdamW if name == "adamw" else torch.optim.Adam)(groups)


def _restore(training: Training, state: Mapping[str, Any], frozen_from: int) -> None:
    changed = [key for key, value in training.options.items() if state["options"].get(key) != value]
    if changed:
        raise InputError(
            f"the checkpoint is of a training with {changed[0]}={state['options'].get(changed[0])!r}, and"
            f" {training.options[changed[0]]!r} was asked for; start anew"
        )
    if len(state["history"]) > frozen_from:
        freeze_bits(training.model)
    training.model.load_state_dict(state["model"])
    # A copy: the optimizer keeps the tensors it is given, and would change the caller's.
    training.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
    training.history.extend(copy.deepcopy(state["history"]))


def _bounds(rows: int, batch_size: int, world: World) -> list[tuple[int, int]]:
    """Return where batches start and stop; a last one with less than two rows a process joins the one before it.

    Batch norm needs two rows to have a variance.
    """
    bounds = [(start, min(start + batch_size, rows)) for start in range(0, rows, batch_size)]
    if len(bounds) > 1 and bounds[-1][1] - bounds[-1][0] < 2 * world.size:
        bounds[-2:] = [(bounds[-2][0], bounds[-1][1])]
    if bounds[-1][1] - bounds[-1][0] < world.size:
        raise InputError(f"a batch of {bounds[-1][1] - bounds[-1][0]} rows cannot be shared by {world.size} processes")
    return bounds


def _factor(step: int, total: int, warmup: float | int, schedule: Schedule) -> float:
    """Return the learning rate's share of its top in a step."""
    rise = round(total * warmup)
    if step < rise:
        return (step + 1) / rise
    done = (step - rise) / max(total - rise, 1)
    if schedule == "constant":
        return 1.0
    return 1 - done if schedule == "linear" else (1 + math.cos(math.pi * done)) / 2


class _Loss:
    """The task loss of a batch: cross-entropy, mixed with the divergence from a teacher."""

    def __init__(
        self,
        data: DataSplit,
        label_smoothing: float | int,
        teacher: nn.Module | None,
        distill: float | int,
        temperature: float | int,
        augment: Augment,
    ) -> None:
        self.data = data
        self.label_smoothing = label_smoothing
        self.teacher = teacher
        self.distill = distill
        self.temperature = temperature
        self.augment: Augment = augment
        mean, std = torch.tensor(data.inputs.mean), torch.tensor(data.inputs.std)
        self.black = (-mean / std).to(data.x_train.device)
        # A teacher sees the same rows every epoch unless they are augmented.
        self.targets = None if teacher is None or augment != "none" else _logits(teacher, data.x_train)

    def __call__(
        self, model: nn.Module, rows: Int64[Tensor, " batch"], generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return the sum of the losses of rows, and the number of rows that are classified correctly."""
        x, y = self.data.x_train[rows], self.data.y_train[rows]
        if self.augment != "none":
            x = augment_images(x, generator, flip=self.augment == "crop+flip", fill=self.black)
        logits = model(x)
        loss = nn.functional.cross_entropy(logits, y, reduction="sum", label_smoothing=self.label_smoothing)
        if self.teacher is not None:
            wanted = self.targets[rows] if self.targets is not None else _logits(self.teacher, x)
            divergence = nn.functional.kl_div(
                nn.functional.log_softmax(logits / self.temperature, 1),
                nn.functional.log_softmax(wanted / self.temperature, 1),
                reduction="sum",
                log_target=True,
            )
            # Its gradient falls with the square of the temperature (Hinton et al., arXiv:1503.02531, section 2.1).
            loss = (1 - self.distill) * loss + self.distill * self.temperature**2 * divergence
        return loss, (logits.detach().argmax(1) == y).sum()


def _step(
    training: Training,
    loss_of: _Loss,
    rows: Int64[Tensor, " batch"],
    generator: torch.Generator,
    world: World,
    clip_norm: float | int | None,
    prepared: bool,
) -> Float[Tensor, "3"]:
    """Take one step; return mean loss of the batch, number of rows classified correctly here, and penalty."""
    model, optimizer = training.model, training.optimizer
    optimizer.zero_grad(set_to_none=True)
    loss, correct = loss_of(model, rows[world.shard(len(rows))], generator)
    loss = loss / len(rows)
    penalty = bit_penalty(model) if prepared else torch.zeros((), device=loss.device)
    value = loss.detach().clone()
    world.all_reduce([value])
    if not bool((value + penalty.detach()).isfinite()):
        raise NonFiniteError(
            f"training diverged in epoch {len(training.history) + 1}: the loss is {value.item()}; give a smaller"
            " learning rate, or clip_norm=1"
        )
    # Gradients are summed over processes, and the penalty is to count once.
    (loss + penalty / world.size).backward()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    world.sum_gradients(parameters)
    if clip_norm is not None:
        nn.utils.clip_grad_norm_(parameters, clip_norm)
    optimizer.step()
    if prepared:
        update_controller(model)
    return torch.stack([value, correct.to(value.dtype), penalty.detach().to(value.dtype)])


def _average_batch_norm(model: nn.Module, world: World) -> None:
    """Give every process the mean of the running statistics, which each has seen a part of."""
    if world.size == 1:
        return
    buffers = [
        buffer
        for module in model.modules()
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)
        for buffer in module.buffers()
        if buffer.is_floating_point()
    ]
    world.all_reduce(buffers)
    for buffer in buffers:
        buffer /= world.size


def _record(
    training: Training, data: DataSplit, sums: Float[Tensor, "3"], rate: float, steps: int, prepared: bool
) -> dict[str, Any]:
    loss, correct, penalty = (float(value) for value in sums)
    record: dict[str, Any] = {
        "epoch": len(training.history) + 1,
        "loss": loss / steps,
        "penalty": penalty / steps,
        "learning_rate": rate,
        "train_accuracy": correct / len(data.y_train),
    }
    if len(data.y_validation):
        found = evaluate(training.model, data.x_validation, data.y_validation)
        record |= {f"validation_{name}": value for name, value in found.items()}
    if prepared:
        record |= {"avg_bits": report(training.model).avg_bits, "layers": _layers(training.model)}
    return record


def _layers(model: nn.Module) -> dict[str, dict[str, float | None]]:
    """Return what a plot shows of each layer; a step per channel is given by its mean."""
    found: dict[str, dict[str, float | None]] = {}
    for name, module in quantized_layers(model):
        weight, inputs = weight_quantizer(module), input_quantizer(module)
        found[name] = {
            "bits": None if weight is None else float(weight.grid.bits),
            "alpha": None if weight is None else float(weight.alpha.detach().mean()),
            "rho": None if weight is None else _rho(weight),
            "act_alpha": None if inputs is None else float(inputs.alpha.detach().mean()),
        }
    return found


def _rho(quantizer: nn.Module) -> float | None:
    rho = getattr(quantizer, "rho", None)
    return float(rho.detach().mean()) if isinstance(rho, Tensor) else rho


def augment_images(
    x: Float32[Tensor, "n channels height width"],
    generator: torch.Generator,
    *,
    flip: bool = True,
    fill: Float32[Tensor, " channels"] | None = None,
) -> Float32[Tensor, "n channels height width"]:
    """Move each image by up to an eighth of its side (4 pixels of 32), and mirror half of them.

    Parameters
    ----------
    x : (n, c, h, w) images
    generator : on the CPU, decides what happens to which
    flip : mirror, which suits photographs and not digits
    fill : (c,) values outside the image; default 0

    Examples
    --------
    >>> image = torch.arange(4.0).view(1, 1, 2, 2)
    >>> augment_images(image, torch.Generator().manual_seed(0), flip=False).shape
    torch.Size([1, 1, 2, 2])
    """
    n, channels, height, width = x.shape
    reach = max(1, min(height, width) // 8)
    background = x.new_zeros(channels) if fill is None else fill
    padded = background.view(1, -1, 1, 1).expand(n, -1, height + 2 * reach, width + 2 * reach).clone()
    padded[:, :, reach : reach + height, reach : reach + width] = x
    top, left = torch.randint(0, 2 * reach + 1, (2, n), generator=generator).to(x.device)
    rows = top[:, None] + torch.arange(height, device=x.device)
    columns = left[:, None] + torch.arange(width, device=x.device)
    if flip:
        mirrored = (torch.rand(n, generator=generator) < 0.5).to(x.device)
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    image = torch.arange(n, device=x.device)[:, None, None, None]
    channel = torch.arange(channels, device=x.device)[None, :, None, None]
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def _logits(model: nn.Module, x: Float32[Tensor, "n ..."], batch_size: int = 512) -> Float[Tensor, "n classes"]:
    mode = model.training
    model.eval()
    try:
        # Not inference_mode: what a model caches in it could not take part in training later.
        with torch.no_grad():
            return torch.cat([model(part) for part in x.split(batch_size)])
    finally:
        model.train(mode)


def predict_proba(model: nn.Module, x: Float32[Tensor, "n ..."], batch_size: int = 512) -> Float32[Tensor, "n classes"]:
    """Return the probability of each class, in evaluation mode.

    Parameters
    ----------
    model : any classifier
    x : (n, ...) scaled rows
    batch_size : rows at once

    Examples
    --------
    >>> predict_proba(nn.Flatten(), torch.zeros(1, 2))
    tensor([[0.5000, 0.5000]])
    """
    return _logits(model, x.to(device_of(model)), batch_size).float().softmax(1)


def evaluate(
    model: nn.Module, x: Float32[Tensor, "n ..."], y: Int64[Tensor, " n"], batch_size: int = 512
) -> dict[str, float]:
    """Return ``accuracy`` (0..1) and mean cross-entropy ``loss`` (nats) in evaluation mode.

    Parameters
    ----------
    model : any classifier
    x : (n, ...) scaled rows
    y : (n,) class numbers
    batch_size : rows at once

    Examples
    --------
    >>> evaluate(nn.Flatten(), torch.tensor([[0.0, 9.0], [9.0, 0.0]]), torch.tensor([1, 1]))["accuracy"]
    0.5
    """
    if not len(y):
        raise InputError("there are no rows to evaluate on")
    logits = _logits(model, x.to(device_of(model)), batch_size).double()
    y = y.to(logits.device)
    return {
        "accuracy": float((logits.argmax(1) == y).double().mean()),
        "loss": float(nn.functional.cross_entropy(logits, y)),
    }


def batches_of(x: Float32[Tensor, "n ..."], batch_size: int, seed: int) -> Iterator[Float32[Tensor, "batch ..."]]:
    """Yield all rows once in a random order.

    Parameters
    ----------
    x : (n, ...) rows
    batch_size : rows at once; a last batch of one row is left out
    seed : of the order
    """
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device)
    for rows in order.split(batch_size):
        if len(rows) > 1 or len(x) == 1:
            yield x[rows]


def quantize_and_train(
    float_model: nn.Module,
    data: DataSplit,
    config: QuantConfig,
    *,
    epochs: int = 10,
    lr: float | int = 1e-3,
    batch_size: int = 64,
    distill: float | int = 0.0,
    freeze_at: float | int = 1 / 3,
    calibration_batches: int = 8,
    bn_batches: int = 100,
    seed: int = 0,
    world: World | None = None,
    resume: Mapping[str, Any] | None = None,
    after_epoch: Callable[[Training], None] = _silent,
    **options: Any,
) -> Quantized:
    """Quantize a trained float model and train it on: the whole recipe (spec, sections 2.7 and 2.8).

    Parameters
    ----------
    float_model : trained; it is left as it is, and is the teacher where ``distill`` asks for one
    data : as :meth:`srq_dropbits.userdata.LabelledData.split` makes it
    config : how to quantize; with ``ptq`` nothing is trained
    epochs : passes through the training rows after quantization; 0 only rounds and re-estimates batch norm
    lr, batch_size, distill, seed, world, resume, after_epoch : as :func:`fit` takes them
    freeze_at : share of the epochs after which learned bit-widths are frozen
    calibration_batches : batches that the steps of activations are set from
    bn_batches : batches that batch norm is re-estimated from
    **options : more of :func:`fit`; where bits are learned, ``gate_lr`` is by default such that a gate can close within
        the steps before it is frozen

    Returns
    -------
    The quantized model with what was measured.
    """
    float_model.eval()
    example = data.x_train[:1].to(device_of(float_model))
    model = prepare(float_model, config, example)
    rows = data.x_train.to(example.device)
    calibrate(model, batches_of(rows, batch_size, seed), max_batches=calibration_batches)
    learned = config.learn_bits is not None
    history: list[dict[str, Any]] = []
    if epochs and config.estimator != "ptq":
        if learned:
            # Gates are frozen before the end, and train until then: fast enough to close within the steps they have.
            options.setdefault("dropbits_off_frac", 0.0)
            steps = len(_bounds(len(rows), batch_size, world or World())) * round(epochs * freeze_at)
            options.setdefault("gate_lr", max(50 * lr, _GATE_TRAVEL / max(steps, 1)))
        training = fit(
            model,
            data,
            epochs=epochs,
            lr=lr,
            batch_size=batch_size,
            teacher=float_model if distill else None,
            distill=distill,
            freeze_at=freeze_at if learned else None,
            seed=seed,
            world=world,
            resume=resume,
            after_epoch=after_epoch,
            **options,
        )
        history = training.history
    if learned:
        freeze_bits(model)
    set_dropbits(model, False)
    reestimate_bn(model, batches_of(rows, batch_size, seed), max_batches=bn_batches)
    model.eval()
    metrics: dict[str, float] = {}
    parts: Sequence[tuple[str, Tensor, Tensor]] = (
        ("validation", data.x_validation, data.y_validation),
        ("test", data.x_test, data.y_test),
    )
    for part, x, y in parts:
        if len(y):
            metrics |= {f"{part} {name}": value for name, value in evaluate(model, x, y).items()}
            metrics[f"float {part} accuracy"] = evaluate(float_model, x, y)["accuracy"]
    return Quantized(model, config, history, metrics, report(model))
