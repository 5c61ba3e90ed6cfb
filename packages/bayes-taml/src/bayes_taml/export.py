"""Write a model adapted to one task to ONNX: images in, logarithms of probabilities out."""

from __future__ import annotations

import copy
import logging
import math
import warnings
from contextlib import ExitStack
from pathlib import Path

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional

from bayes_taml.engine import HEAD_BIAS, HEAD_WEIGHT
from bayes_taml.learner import TaskClassifier
from bayes_taml.networks import Pass, running
from shared_core.errors import not_installed
from shared_core.runs import atomic_path

__all__ = ["export_onnx"]


class _Plain(nn.Module):
    """One network a sample, with fixed statistics: what is exported must not depend on what it is asked beside."""

    def __init__(self, task: TaskClassifier, support: Shaped[Tensor, "n ..."]) -> None:
        super().__init__()
        module = task.module
        self.prototypes, self.samples = module.prototypes, module.samples
        self.bodies = nn.ModuleList()
        self.statistics: list[dict[str, tuple[Tensor, Tensor]]] = []
        for sample in range(module.samples):
            parameters, moments = module.under(sample)
            body = copy.deepcopy(module.model.backbone)
            named = dict(body.named_parameters())
            for name, value in parameters.items():
                if name in named:
                    named[name].data = value.detach().clone()
            self.bodies.append(body)
            self.register_buffer(f"weight{sample}", parameters[HEAD_WEIGHT].detach().clone())
            self.register_buffer(f"bias{sample}", parameters[HEAD_BIAS].detach().clone())
            if not moments:
                record: dict[str, tuple[Tensor, Tensor]] = {}
                with torch.no_grad(), running(Pass(record=record)):
                    body(support)
                moments = {name: (mean.detach(), variance.detach()) for name, (mean, variance) in record.items()}
            self.statistics.append(moments)

    def forward(self, x: Shaped[Tensor, "n ..."]) -> Float[Tensor, "n ways"]:
        """Logarithm of the probabilities, averaged over samples."""
        found: list[Tensor] = []
        for sample, body in enumerate(self.bodies):
            with running(Pass(statistics=self.statistics[sample])):
                h = body(x)
            weight, bias = getattr(self, f"weight{sample}"), getattr(self, f"bias{sample}")
            if self.prototypes:
                logits = -(h.unsqueeze(1) - weight).square().sum(-1)
            else:
                logits = functional.linear(h, weight, bias)
            found.append(functional.log_softmax(logits, -1))
        return torch.logsumexp(torch.stack(found), 0) - math.log(self.samples)


def export_onnx(task: TaskClassifier, path: str | Path, *, support: Shaped[Tensor, "n ..."]) -> None:
    """Write an adapted model to an ONNX file: ``images`` ``(batch, ...)`` to ``log_probabilities`` ``(batch, ways)``.

    Normalisations keep the statistics of the support under the adapted parameters: a file that is asked one image at a
    time cannot take them from the batch. Under ``statistics="batch"`` its answers therefore differ from the model's
    own, under ``support`` not. Names of the classes are in the file's metadata, a line each.

    Parameters
    ----------
    task : what :meth:`MetaLearner.adapt` gave
    path : to write
    support : ``(n, ...)`` rows that were adapted to

    Raises
    ------
    InputError
        Without the package onnx.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise not_installed("export", "onnxscript", "bayes-taml[onnx]") from error
    plain = _Plain(task, support).cpu().eval()
    plain.statistics = [{name: (m.cpu(), v.cpu()) for name, (m, v) in each.items()} for each in plain.statistics]
    batch = torch.export.Dim("batch", min=1)
    # It warns of operators of packages that are not installed, and of itself.
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    with atomic_path(path) as temporary, warnings.catch_warnings(), ExitStack() as stack:
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        stack.callback(logger.setLevel, before)
        torch.onnx.export(
            plain, (support[:2].cpu(),), str(temporary), input_names=["images"], output_names=["log_probabilities"],
            dynamic_shapes=({0: batch},), dynamo=True, verbose=False, external_data=False,
        )  # fmt: skip
        model = onnx.load(str(temporary))
        entry = model.metadata_props.add()
        entry.key, entry.value = "classes", "\n".join(str(name) for name in task.classes_.tolist())
        onnx.save(model, str(temporary))
