"""What ``train`` does, phase by phase so that it can resume, and how a finished run is read again."""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shared_core.device import World
from shared_core.errors import DAMAGE, InputError
from shared_core.runs import Run, atomic_path, write_json
from srq_dropbits.config import QuantConfig
from srq_dropbits.diagnose import WeightDiagnosis, weight_diagnosis
from srq_dropbits.models import build, load_weights
from srq_dropbits.qat import prepare, reestimate_bn
from srq_dropbits.saving import load, save
from srq_dropbits.training import (
    Augment,
    Quantized,
    Training,
    batches_of,
    evaluate,
    fit,
    predict_proba,
    quantize_and_train,
)
from srq_dropbits.userdata import DataSplit, InputFormat, load_images_or_table, read_rows

__all__ = [
    "Recipe",
    "TrainedRun",
    "diagnose_run",
    "evaluate_run",
    "export_run",
    "load_run",
    "train_run",
    "write_predictions",
]

_MODEL, _FLOAT, _ABOUT, _HISTORY = "model.safetensors", "float.safetensors", "model.json", "history.json"
_VERSION = 1


def _silent(note: str) -> None:
    del note


@dataclass(frozen=True)
class Recipe:
    """How to get from data to a quantized network.

    Parameters
    ----------
    data : as :func:`srq_dropbits.userdata.load_images_or_table` takes it
    arch : as :func:`srq_dropbits.models.build` takes it, or ``auto``: by the shape of a row
    weights : trained float weights; None trains the float network first
    target : label column of a table
    size : side that images are resized to
    limit : most training rows
    validation : share of the rows to choose by
    test : share of the rows to report on, where there is no official test part
    float_epochs : epochs of the float network
    float_lr : its learning rate
    epochs : epochs after quantization
    lr : learning rate of weights then
    scale_lr : of steps; None: as `lr`
    batch_size : rows in a step
    weight_decay : of weights
    distill : share of the loss that comes from the float network
    augment : of images
    seed : of everything random
    """

    data: str
    arch: str
    weights: str | None = None
    target: str | None = None
    size: int | None = None
    limit: int | None = None
    validation: float = 0.1
    test: float = 0.2
    float_epochs: int = 15
    float_lr: float = 3e-3
    epochs: int = 10
    lr: float = 1e-3
    scale_lr: float | None = None
    batch_size: int = 64
    weight_decay: float = 1e-4
    distill: float = 0.0
    augment: Augment = "none"
    seed: int = 0

    def split(self) -> DataSplit:
        """Read and divide the data."""
        data = load_images_or_table(self.data, target=self.target, size=self.size, limit=self.limit, seed=self.seed)
        return data.split(self.seed, validation=self.validation, test=self.test)


@dataclass(frozen=True)
class TrainedRun:
    """A finished run, ready to use.

    Parameters
    ----------
    model : the quantized network in evaluation mode
    recipe : how it was made
    config : how it is quantized
    inputs : what it expects of a row
    """

    model: nn.Module
    recipe: Recipe
    config: QuantConfig
    inputs: InputFormat

    def example(self, rows: int = 1) -> Tensor:
        """Make an input of the model, of shape (rows, ..)."""
        draw = torch.Generator().manual_seed(0)
        return torch.randn(rows, *self.inputs.shape, generator=draw)


def train_run(
    run: Run,
    recipe: Recipe,
    config: QuantConfig,
    *,
    device: torch.device,
    world: World | None = None,
    advance: Callable[[str], None] = _silent,
) -> tuple[Quantized, DataSplit]:
    """Train the float network unless weights are given, quantize it, train on, and save all in the run folder.

    Parameters
    ----------
    run : keeps the checkpoint of every epoch, so that an interrupted training goes on from there
    recipe : data, architecture and lengths
    config : how to quantize
    device : where to train
    world : processes that train together
    advance : called with a short note after every epoch

    Returns
    -------
    What was trained, and the data.
    """
    split = recipe.split()
    if recipe.arch == "auto":
        recipe = replace(recipe, arch=_usual_arch(split.shape))
    network = build(recipe.arch, split.shape, split.classes, recipe.seed).to(device)
    # A wrong pattern or budget is known before the float network has been trained for it.
    prepare(network, config, split.x_train[:1].to(device))
    state: Any = run.load_checkpoint()
    phase = state["phase"] if state else "float"
    common: dict[str, Any] = {"batch_size": recipe.batch_size, "augment": recipe.augment, "seed": recipe.seed}
    common |= {"weight_decay": recipe.weight_decay, "world": world}

    def keep(phase: str) -> Callable[[Training], None]:
        def after(training: Training) -> None:
            record = training.history[-1]
            run.log(phase=phase, **{key: value for key, value in record.items() if isinstance(value, (int, float))})
            kept: dict[str, Any] = {"phase": phase, "training": training.state()}
            if phase == "quantized":
                kept["float"] = network.state_dict()
            run.save_checkpoint(kept)
            advance(_note(phase, record))

        return after

    if recipe.weights is not None:
        load_weights(network, recipe.weights)
    elif phase == "float":
        resume = state["training"] if state else None
        fit(
            network,
            split,
            epochs=recipe.float_epochs,
            lr=recipe.float_lr,
            resume=resume,
            after_epoch=keep("float"),
            **common,
        )
        state = None
    if phase == "quantized" and recipe.weights is None:
        network.load_state_dict(state["float"])
    found = quantize_and_train(
        network,
        split,
        config,
        epochs=recipe.epochs,
        lr=recipe.lr,
        distill=recipe.distill,
        resume=state["training"] if state and phase == "quantized" else None,
        after_epoch=keep("quantized"),
        scale_lr=recipe.scale_lr,
        **common,
    )
    _store(run, recipe, found, network, split)
    return found, split


def _usual_arch(shape: Sequence[int]) -> str:
    if len(shape) != 3:
        return "mlp:64,32"
    return "digits-cnn" if min(shape[1:]) < 16 else "lenet5" if shape[0] == 1 else "vgg7:0.25"


def _note(phase: str, record: Mapping[str, Any]) -> str:
    text = f"{phase}, epoch {record['epoch']}: loss {record['loss']:.3f}"
    if "validation_accuracy" in record:
        text += f", validation {100 * record['validation_accuracy']:.1f} %"
    return text + (f", {record['avg_bits']:.2f} bits" if "avg_bits" in record else "")


def _store(run: Run, recipe: Recipe, found: Quantized, network: nn.Module, split: DataSplit) -> None:
    from safetensors.torch import save_file

    about = {
        "format": "srq-dropbits run",
        "version": _VERSION,
        "recipe": recipe.__dict__,
        "config": found.config.model_dump(mode="json"),
        "inputs": split.inputs.to_dict(),
    }
    # Everything is written through `artifact`, whose folder is scratch in all processes but the first.
    save(found.model.cpu(), run.artifact(_MODEL))
    with atomic_path(run.artifact(_FLOAT)) as temporary:
        save_file({name: value.cpu().clone() for name, value in network.state_dict().items()}, temporary)
    write_json(run.artifact(_ABOUT), about)
    write_json(run.artifact("report.json"), found.report.to_dict())
    write_json(run.artifact(_HISTORY), found.history)


def load_run(folder: str | Path) -> TrainedRun:
    """Read a finished run of ``train``.

    Parameters
    ----------
    folder : run folder
    """
    folder = Path(folder)
    path = folder / _ABOUT
    if folder.is_file() or (folder.exists() and not path.exists()):
        raise InputError(f"{folder}: has no {_ABOUT}; give the run folder of a finished 'srq-dropbits train'")
    try:
        about: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if about.get("version") != _VERSION:
            raise InputError(
                f"{path}: version {about.get('version')!r} is not one that this release reads ({_VERSION})"
            )
        recipe = Recipe(**about["recipe"])
        inputs = InputFormat.from_dict(about["inputs"])
        config = QuantConfig(**about["config"])
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}; give a run folder of 'train'") from error
    except InputError:
        raise
    except DAMAGE as error:
        raise InputError(f"{path} is damaged ({error}); train anew") from error
    plain = build(recipe.arch, inputs.shape, len(inputs.class_names), recipe.seed)
    model = load(folder / _MODEL, plain)
    return TrainedRun(model.eval(), recipe, config, inputs)


def read_history(folder: str | Path) -> list[dict[str, Any]]:
    """Read a run's history, a record an epoch; empty where nothing was trained.

    Parameters
    ----------
    folder : run folder
    """
    path = Path(folder) / _HISTORY
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        return [dict(record) for record in found]
    except DAMAGE as error:
        raise InputError(f"{path} is damaged ({error}); train anew") from error


Part = Literal["test", "validation", "all"]


def labelled_rows(trained: TrainedRun, data: str | None, target: str | None, part: Part) -> tuple[Tensor, Tensor]:
    """Read the rows to measure on: those kept from the training data, or all of another source.

    Parameters
    ----------
    trained : the run
    data : another source, or None for the data it was trained on
    target : label column of a table; None takes the training table's
    part : of the data it was trained on; of another source its test part, if it has one, else all rows
    """
    if data is None or data == trained.recipe.data:
        split = trained.recipe.split()
        x, y = {"test": (split.x_test, split.y_test), "validation": (split.x_validation, split.y_validation)}.get(
            part,
            (
                torch.cat([split.x_train, split.x_validation, split.x_test]),
                torch.cat([split.y_train, split.y_validation, split.y_test]),
            ),
        )
        if not len(y):
            raise InputError(f"the run kept no {part} rows; give other data, or --part")
        return x, y
    found = load_images_or_table(
        data, target=target or trained.recipe.target, size=trained.recipe.size, allow_gaps=True
    )
    known = {name: place for place, name in enumerate(trained.inputs.class_names)}
    if strange := [name for name in found.class_names if name not in known]:
        raise InputError(f"{data}: class '{strange[0]}' is not one the model knows: {', '.join(list(known)[:10])}")
    x, y = (found.x, found.y) if found.x_test is None or found.y_test is None else (found.x_test, found.y_test)
    places = torch.tensor([known[name] for name in found.class_names])
    return trained.inputs.apply(x), places[torch.from_numpy(y)]


def evaluate_run(trained: TrainedRun, x: Tensor, y: Tensor, *, integer: bool = False) -> dict[str, float]:
    """Measure a run on rows.

    Parameters
    ----------
    trained : the run
    x : rows, of shape (n, ..)
    y : class numbers, of shape (n,)
    integer : compute with integer codes, as a deployed network does

    Returns
    -------
    Accuracy (0..1) and mean cross-entropy.
    """
    return evaluate(_form(trained, integer), x, y)


def _form(trained: TrainedRun, integer: bool) -> nn.Module:
    if not integer:
        return trained.model
    from srq_dropbits.deploy import convert

    return convert(trained.model, trained.example(2))


def write_predictions(path: str | Path, trained: TrainedRun, data: str | Path, *, integer: bool = False) -> list[str]:
    """Write the class and the probabilities of each row as CSV.

    Parameters
    ----------
    path : file to write
    trained : the run
    data : rows without labels, as :func:`srq_dropbits.userdata.read_rows` takes them
    integer : compute with integer codes

    Returns
    -------
    The first lines of the file.
    """
    rows = read_rows(data, trained.inputs)
    shares = predict_proba(_form(trained, integer), rows)
    names = trained.inputs.class_names
    lines: list[list[str]] = [["prediction", *(f"probability of {name}" for name in names)]]
    lines += [
        [names[int(best)], *(f"{value:.6g}" for value in row)]
        for best, row in zip(shares.argmax(1), shares.tolist(), strict=True)
    ]
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(lines)
    return [",".join(line) for line in lines[:6]]


def truncated(trained: TrainedRun, bits: int) -> nn.Module:
    """Cut a run's network down to fewer bits, with batch norm estimated anew from its training data.

    Parameters
    ----------
    trained : the run; its model is changed
    bits : width that no layer exceeds afterwards
    """
    from srq_dropbits.bits import truncate

    truncate(trained.model, bits)
    split = trained.recipe.split()
    reestimate_bn(trained.model, batches_of(split.x_train, trained.recipe.batch_size, trained.recipe.seed))
    return trained.model.eval()


def diagnose_run(trained: TrainedRun, estimators: Sequence[str], *, batches: int = 8, seed: int = 0) -> WeightDiagnosis:
    """Look at what estimators would do to a run's weights, on the rows it was trained on.

    Parameters
    ----------
    trained : the run
    estimators : names from ``srq_dropbits.diagnose.LAB``
    batches : how many of the recipe's size
    seed : of the rows and of estimators that sample
    """
    split = trained.recipe.split()
    order = torch.randperm(len(split.y_train), generator=torch.Generator().manual_seed(seed))
    pairs = ((split.x_train[rows], split.y_train[rows]) for rows in order.split(trained.recipe.batch_size))
    return weight_diagnosis(trained.model, pairs, estimators=estimators, max_batches=batches, seed=seed)


def export_run(
    trained: TrainedRun, kind: Literal["packed", "onnx", "weights"], path: str | Path, *, weight_type: str = "auto"
) -> tuple[list[str], dict[str, float]]:
    """Write a run's network for use elsewhere, and check the file.

    Parameters
    ----------
    trained : the run
    kind : ``packed``: sub-byte codes in safetensors; ``onnx``: a QDQ graph; ``weights``: dequantized float tensors
        under the architecture's own names
    path : file to write
    weight_type : integer type in ONNX

    Returns
    -------
    Lines that say what was written, and figures: bytes, differences.
    """
    from srq_dropbits.deploy import convert
    from srq_dropbits.packing import load_packed, save_packed

    example = trained.example(64)
    imodel = convert(trained.model, example)
    with torch.no_grad():
        expected = imodel(example)
        trusted = trained.model(example)
    parity = float((expected - trusted).abs().max() / trusted.abs().max())
    figures = {
        "integer network: largest difference / largest output": parity,
        "integer network: same class": float((expected.argmax(1) == trusted.argmax(1)).double().mean()),
    }
    if kind == "onnx":
        from srq_dropbits.onnx_export import export_onnx

        report: Any = export_onnx(imodel, path, example, weight_type=weight_type)  # pyright: ignore[reportArgumentType]
        figures |= {
            "file": float(report.file_bytes),
            "onnxruntime: largest difference / largest output": report.max_difference / max(report.output_scale, 1e-30),
            "onnxruntime: same class": report.argmax_agreement,
        }
        return str(report).splitlines(), figures
    if kind == "packed":
        sizes = save_packed(imodel, path)
        plain = build(trained.recipe.arch, trained.inputs.shape, len(trained.inputs.class_names), trained.recipe.seed)
        with torch.no_grad():
            again: Tensor = load_packed(path, plain)(example)
        figures |= {
            "file": float(sizes.total),
            "share of float32": sizes.total / sizes.float_bytes,
            "read back: largest difference": float((again - expected).abs().max()),
        }
        return str(sizes).splitlines(), figures
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as scratch:
        save_packed(imodel, f"{scratch}/packed.safetensors")
        packed = load_packed(f"{scratch}/packed.safetensors")
    tensors = {name: value.contiguous().clone() for name, value in packed.items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary)
    figures["file"] = float(Path(path).stat().st_size)
    return [f"{len(tensors)} float32 tensors whose values lie on the grids; batch norms are folded"], figures
