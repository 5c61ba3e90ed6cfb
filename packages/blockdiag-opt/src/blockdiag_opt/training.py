"""Training a model on a user's table with any optimizer: what ``train`` runs, epoch by epoch, so that it can resume."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from blockdiag_opt.monitor import Monitor
from blockdiag_opt.optimizer import BlockDiagonal
from blockdiag_opt.registry import make_optimizer
from blockdiag_opt.userdata import Schema, Table, build_model, loss_of, metrics_of, read_table, split_rows
from shared_core.device import World
from shared_core.errors import InputError
from shared_core.runs import atomic_path, load_tree

__all__ = ["Trained", "export_run", "file_of_run", "fit", "load_trained", "write_predictions"]

_FORMAT = 1


@dataclass
class Trained:
    """A training under way or done.

    Attributes
    ----------
    model : on its device
    schema : what it expects of a table
    optimizer : that trains it
    options : how it was asked for
    history : a dict an epoch: epoch, loss, learning_rate
    records : what the monitor saw, by layer
    advice : what the monitor makes of it
    metrics : on the rows held out; filled at the end
    description : one line
    """

    model: nn.Module
    schema: Schema
    optimizer: Optimizer
    options: dict[str, Any]
    history: list[dict[str, float | int]]
    records: dict[str, list[dict[str, Any]]]
    advice: list[str]
    metrics: dict[str, float]
    description: str
    monitor: Monitor | None = None

    def state(self) -> dict[str, Any]:
        """Return what a resumed training needs, as ``shared_core.runs.save_tree`` takes it."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "monitor": None if self.monitor is None else self.monitor.state_dict(),
            "history": self.history,
            "options": self.options,
        }

    def saved(self) -> dict[str, Any]:
        """Return the model with what is needed to use it."""
        return {
            "format": _FORMAT,
            "weights": dict(self.model.state_dict()),
            "schema": self.schema.to_dict(),
            "options": self.options,
        }

    def optimizer_state(self) -> dict[str, Any]:
        """Return the optimizer's state with the parameters' names."""
        state = self.optimizer.state_dict()
        return {"state": state["state"], "param_groups": state["param_groups"]}


def _silent(trained: Trained) -> None:
    del trained


def fit(
    data: str | Path,
    *,
    target: str | None = None,
    model: str = "mlp:64,32",
    optimizer: str = "block-adam",
    lr: float | int = 1e-2,
    epochs: int = 50,
    batch_size: int = 64,
    warmup: float | int = 0.05,
    schedule: Literal["linear", "constant"] = "linear",
    clip_norm: float | int | None = None,
    holdout: float | int = 0.2,
    exclude: tuple[str, ...] = (),
    kind: Literal["regression", "classification", "reconstruction", "auto"] = "auto",
    scale: bool = True,
    seed: int = 0,
    monitor: bool = True,
    device: str = "cpu",
    resume: Mapping[str, Any] | None = None,
    after_epoch: Callable[[Trained], None] = _silent,
    world: World | None = None,
) -> Trained:
    """Train a model on a table.

    Parameters
    ----------
    data : CSV, TSV or NPZ file
    target : column to predict; None reconstructs the features
    model : as :func:`blockdiag_opt.userdata.build_model` takes it
    optimizer : as :func:`blockdiag_opt.registry.make_optimizer` takes it
    lr : learning rate at the top of the schedule
    epochs : passes through the training rows
    batch_size : rows in a step
    warmup : share of the steps over which the learning rate rises linearly
    schedule : after it: falling linearly to 0, or constant
    clip_norm : largest norm of the gradient, or None
    holdout : share of the rows kept for the metrics
    exclude, kind, scale : as :meth:`blockdiag_opt.userdata.Schema.learn` takes them
    seed : of weights, split and order of batches
    monitor : record what the blocks see; with our optimizers only
    device : where to train
    resume : state of an earlier :class:`Trained`
    after_epoch : called after every epoch
    world : processes that share each batch, from :func:`shared_core.device.process_group`; all end with the same model

    Returns
    -------
    The training, done.
    """
    world = world or World()
    if world.size > batch_size:
        raise InputError(f"{world.size} processes share batches of {batch_size}; use fewer, or a larger --batch-size")
    table = read_table(data)
    parts = split_rows(len(table.values), seed, validation=0.0, test=holdout)
    schema = Schema.learn(table, parts["train"], target, exclude=exclude, kind=kind, scale=scale)
    network = build_model(model, len(schema.features), schema.outputs, seed, schema.shape).to(device)
    x, y = schema.inputs(table).to(device), schema.targets(table).to(device)
    train, test = (torch.from_numpy(parts[name]).to(device) for name in ("train", "test"))

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        random = torch.Generator().manual_seed(seed)
        while True:
            rows = train[torch.randint(len(train), (batch_size,), generator=random).to(device)]
            yield x[rows], y[rows]

    def loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return loss_of(schema.kind, module(batch[0]).flatten(1), batch[1])

    # The warm-up starts at a share of `lr`, so that bounds that follow it are known.
    opt = make_optimizer(optimizer, network, lr, (batches(), loss))
    steps = -(-len(train) // batch_size)
    total = steps * epochs
    options = {"model": model, "optimizer": optimizer, "lr": lr, "epochs": epochs, "seed": seed, "target": target}
    text = (
        f"{model} by {optimizer}: {schema.kind}, {len(train):,} rows, {len(schema.features)} features, {total:,} steps"
    )
    watch = Monitor.attach(opt, every=max(1, total // 200)) if monitor and isinstance(opt, BlockDiagonal) else None
    trained = Trained(network, schema, opt, options, [], {}, [], {}, text, watch)
    if resume is not None:
        _restore(trained, resume)

    for epoch in range(len(trained.history), epochs):
        # The order depends on seed and epoch alone: a resumed training sees the same batches.
        random = torch.Generator().manual_seed(seed * 100_003 + epoch)
        order = train[torch.randperm(len(train), generator=random).to(device)]
        sum_of_losses = torch.zeros((), device=device)
        rate = lr
        for place, rows in enumerate(order.split(batch_size)):
            rate = lr * _factor(epoch * steps + place, total, warmup, schedule)
            for group in opt.param_groups:
                group["lr"] = rate
            sum_of_losses += _step(trained, x[rows], y[rows], clip_norm, world) * len(rows)
        # Running averages of batch norm are over each process's own rows.
        world.broadcast(network.buffers())
        trained.history.append({"epoch": epoch + 1, "loss": float(sum_of_losses) / len(train), "learning_rate": rate})
        after_epoch(trained)
    if len(test):
        trained.metrics = {f"test {k}": v for k, v in metrics_of(schema, network, x[test], y[test]).items()}
    else:
        trained.metrics = {f"train {k}": v for k, v in metrics_of(schema, network, x[train], y[train]).items()}
    if watch is not None:
        trained.records = watch.records
        trained.advice = watch.summary().splitlines()
    return trained


def _step(trained: Trained, x: Tensor, y: Tensor, clip_norm: float | int | None, world: World) -> Tensor:
    trained.optimizer.zero_grad()
    own = world.shard(len(x))
    count = own.stop - own.start
    # A process that a small last batch leaves without rows reads one that counts nothing.
    rows = own if count else slice(1)
    try:
        loss = count / len(x) * loss_of(trained.schema.kind, trained.model(x[rows]).flatten(1), y[rows])
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        detail = str(error).splitlines()[0]
        wanted = trained.schema.outputs
        raise InputError(
            f"model '{trained.options['model']}' does not map rows of {tuple(x.shape[1:])} to {wanted} outputs:"
            f" {detail}"
        ) from error
    loss.backward()
    world.sum_gradients(trained.model.parameters())
    loss = loss.detach()
    world.all_reduce([loss])
    if clip_norm is not None:
        nn.utils.clip_grad_norm_(trained.model.parameters(), clip_norm)
    try:
        trained.optimizer.step()
    except FloatingPointError as error:
        raise InputError(f"training diverged: {error}; or give a smaller --lr") from error
    if not bool(loss.isfinite()):
        raise InputError(f"training diverged: the loss is {loss.item()}; give a smaller --lr or --clip-norm")
    return loss


def _factor(step: int, total: int, warmup: float, schedule: str) -> float:
    rise = round(total * warmup)
    if step < rise:
        return (step + 1) / rise
    return 1.0 if schedule == "constant" else max((total - step) / max(total - rise, 1), 1e-8)


def _restore(trained: Trained, state: Mapping[str, Any]) -> None:
    if state["options"] != trained.options:
        raise InputError("the checkpoint is of another training; start anew with --overwrite")
    trained.model.load_state_dict(state["model"])
    trained.optimizer.load_state_dict(state["optimizer"])
    trained.history.extend(state["history"])
    if trained.monitor is not None and state["monitor"] is not None:
        trained.monitor.load_state_dict(state["monitor"])


def load_trained(path: str | Path) -> tuple[nn.Module, Schema, dict[str, Any]]:
    """Load what ``train`` saved.

    Parameters
    ----------
    path : its model.safetensors

    Returns
    -------
    The model in evaluation mode, its schema, and all that was saved.
    """
    saved = load_tree(path)
    if not isinstance(saved, dict) or saved.get("format") != _FORMAT or "schema" not in saved:
        raise InputError(f"{path} is not a model that 'blockdiag-opt train' saved")
    fields: dict[str, Any] = dict(saved["schema"])
    schema = Schema(**fields)
    options = saved["options"]
    model = build_model(options["model"], len(schema.features), schema.outputs, options["seed"], schema.shape)
    try:
        model.load_state_dict(saved["weights"])
    except RuntimeError as error:
        raise InputError(f"{path}: the weights do not fit model '{options['model']}' any more: {error}") from error
    return model.eval(), schema, saved


def write_predictions(path: str | Path, model: nn.Module, schema: Schema, table: Table) -> list[str]:
    """Write predictions for a table's rows as CSV.

    Parameters
    ----------
    path : file to write
    model, schema : as :func:`load_trained` returns them
    table : rows to predict

    Returns
    -------
    The first lines of the file.
    """
    x = schema.inputs(table)
    with torch.no_grad():
        out = torch.cat([model(part).flatten(1) for part in x.split(1024)]).double().numpy()
    if schema.kind == "classification":
        shares = np.exp(out - out.max(1, keepdims=True))
        shares /= shares.sum(1, keepdims=True)
        names = ["prediction", *(f"probability of {value:g}" for value in schema.classes)]
        rows = [[schema.classes[int(row.argmax())], *row.tolist()] for row in shares]
    elif schema.kind == "regression":
        names, rows = ["prediction"], (out / schema.target_factor + schema.target_offset).tolist()
    else:
        names = list(schema.features)
        rows = (out / np.asarray(schema.factor) + np.asarray(schema.offset)).tolist()
    with atomic_path(path) as temporary, Path(temporary).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(chain([names], rows))
    return [
        ",".join(f"{value:.6g}" if isinstance(value, float) else str(value) for value in row)
        for row in [names, *rows[:5]]
    ]


def file_of_run(run: Path, name: str) -> Path:
    """Return the file of that name in the folder of a finished ``train``; a file is taken for it itself.

    Parameters
    ----------
    run : folder, or file
    name : of what ``train`` leaves

    Raises
    ------
    InputError
        When the folder has no such file.
    """
    if run.is_dir() and not (run / name).is_file():
        raise InputError(f"{run}: has no {name}; give the run folder of 'blockdiag-opt train'")
    return run / name if run.is_dir() else run


def export_run(run: Path, kind: str, path: str | Path) -> str:
    """Write a trained model, or its optimizer's state, in a form that other programs read.

    Parameters
    ----------
    run : run folder of a train
    kind : ``weights`` and ``optimizer`` (plain safetensors: name -> tensor), or ``pt2``
    path : file to write

    Returns
    -------
    A line that says what was written.
    """
    from safetensors.torch import save_file

    if not run.is_dir():
        raise InputError(f"{run}: is no folder; give the run folder of 'blockdiag-opt train'")
    if kind == "optimizer":
        state = load_tree(file_of_run(run, "optimizer.safetensors"))
        flat: dict[str, Tensor] = {}
        for group in state["param_groups"]:
            names = group.get("param_names") or [str(key) for key in group["params"]]
            for key, name in zip(group["params"], names, strict=True):
                entries = state["state"].get(key, {})
                flat |= {
                    f"{name}.{part}": value.contiguous() for part, value in entries.items() if isinstance(value, Tensor)
                }
        if not flat:
            raise InputError(f"{run}: the optimizer has no state")
        with atomic_path(path) as temporary:
            save_file(flat, temporary)
        return f"{len(flat)} tensors of optimizer state"
    model, schema, _ = load_trained(file_of_run(run, "model.safetensors"))
    if kind == "weights":
        weights = {name: value.contiguous().clone() for name, value in model.state_dict().items()}
        with atomic_path(path) as temporary:
            save_file(weights, temporary)
        return f"{len(weights)} tensors; features enter as (x - offset) * factor, see the run's own model.safetensors"
    shape = schema.shape or (len(schema.features),)
    example = torch.zeros(2, *shape)
    program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    with atomic_path(path) as temporary:
        torch.export.save(program, temporary)
    probe = torch.randn(7, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = float((torch.export.load(path).module()(probe) - model(probe)).abs().max())
    return f"largest difference from the model on 7 random rows: {difference:.1e}"
