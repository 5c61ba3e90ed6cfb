"""Write a model adapted to one task to ONNX: images in, logits out."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor, nn

from meta_dropout.learner import TaskModel
from meta_dropout.passes import Pass, running
from shared_core.errors import not_installed
from shared_core.runs import atomic_path

__all__ = ["export_onnx"]


class _Plain(nn.Module):
    """The adapted network with fixed statistics: what is exported must not depend on what it is asked beside."""

    def __init__(self, task: TaskModel) -> None:
        super().__init__()
        import copy

        model = copy.deepcopy(task._model[0])  # pyright: ignore[reportPrivateUsage]
        named = dict(model.named_parameters())
        for name, value in task.parameters_by_name().items():
            named[name].data = value.detach().clone()
        self.model = model
        record: dict[str, tuple[Tensor, Tensor]] = {}
        support = task.support
        assert isinstance(support, Tensor)
        with torch.no_grad(), running(Pass(record=record)):
            self.model(support)
        self.statistics = {name: (mean.detach(), variance.detach()) for name, (mean, variance) in record.items()}

    def forward(self, x: Tensor) -> Tensor:
        with running(Pass(statistics=self.statistics)):
            return self.model(x)


def export_onnx(task: TaskModel, path: str | Path, *, example: Tensor, classes: Sequence[str] = ()) -> None:
    """Write an adapted model to an ONNX file.

    Normalisations keep the statistics of the support: a file that is asked one image at a time cannot take them from
    the batch. Under ``statistics="batch"`` its logits therefore differ from the model's own, under ``support`` not.

    Parameters
    ----------
    task : what :meth:`MetaLearner.adapt` gave
    path : to write
    example : ``(n, ...)`` any batch, for the shapes
    classes : names, kept in the file's metadata

    Raises
    ------
    InputError
        Without the package onnx.
    """
    try:
        import onnx
    except ImportError as error:
        raise not_installed("export", "onnx", "meta-dropout[onnx]") from error
    plain = _Plain(task).eval()
    batch = torch.export.Dim("batch", min=1)
    # It warns of operators of packages that are not installed, and of itself.
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    with atomic_path(path) as temporary, warnings.catch_warnings(), ExitStack() as stack:
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        stack.callback(logger.setLevel, before)
        torch.onnx.export(
            plain, (example[:2],), str(temporary), input_names=["images"], output_names=["logits"],
            dynamic_shapes=({0: batch},), dynamo=True, verbose=False, external_data=False,
        )  # fmt: skip
        model = onnx.load(str(temporary))
        entry = model.metadata_props.add()
        entry.key, entry.value = "classes", "\n".join(classes)
        onnx.save(model, str(temporary))
