"""A fitted model as one torch module on raw covariates, for TorchScript and ONNX."""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Generator
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cib_ite.estimator import CIB
from shared_core.errors import InputError, not_installed
from shared_core.runs import atomic_path

__all__ = ["EffectModule", "export_model"]


class EffectModule(nn.Module):
    """The model as a function of raw covariates, with the draws of z fixed.

    Parameters
    ----------
    model : fitted, without dropout
    samples : draws of z; fewer than the model's own make a smaller and faster file

    Examples
    --------
    >>> import numpy as np
    >>> random = np.random.default_rng(0)
    >>> X, t = random.normal(size=(120, 2)), random.integers(0, 2, 120)
    >>> fitted = CIB(n_members=1, steps=50, interval="conformal").fit(X, t, X[:, 0] + t + random.normal(size=120))
    >>> effect, std, mu0, mu1, rate = EffectModule(fitted)(torch.as_tensor(X, dtype=torch.float32))
    >>> bool(np.allclose(effect.numpy(), fitted.effect(X), atol=1e-4))
    True
    """

    def __init__(self, model: CIB, samples: int = 200) -> None:
        super().__init__()
        s = model.settings_
        if s.dropout_head or s.dropout_trunk:
            raise InputError("a model that predicts by dropout cannot be exported; use the bottleneck, or no dropout")
        # A copy: moving the model's own networks would take it off its device.
        stack, pre = copy.deepcopy(model.stack_).cpu(), model.preprocessor_
        self.binary = model.outcome_ == "binary"
        self.deterministic, self.normalize = s.deterministic, s.normalize
        self.y_mean, self.y_scale, self.inflation = model.y_mean_, model.y_scale_, model.calibration_.inflation
        self.offset: Tensor
        self.factor: Tensor
        self.fill: Tensor
        self.noise: Tensor
        self.indicators: Tensor
        self.register_buffer("offset", torch.as_tensor(pre.offset, dtype=torch.float32))
        self.register_buffer("factor", torch.as_tensor(pre.factor, dtype=torch.float32))
        self.register_buffer("fill", torch.as_tensor(pre.fill, dtype=torch.float32))
        self.register_buffer("indicators", torch.as_tensor(pre.indicators.nonzero()[0]))
        draws = 1 if s.deterministic else samples
        generator = torch.Generator().manual_seed(int(model.random_state))
        half = torch.randn((stack.size, 1, -(-draws // 2), s.latent), generator=generator)
        self.register_buffer("noise", torch.cat([half, -half], 2)[:, :, :draws])
        self.stack = stack

    def forward(self, x: Float[Tensor, "n p"]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Effect, its calibrated standard deviation, both outcomes, and the rate, ``(n,)`` each.

        Parameters
        ----------
        x : (n, p) covariates as ``fit`` took them, NaN where missing
        """
        missing = torch.isnan(x)
        scaled = (torch.where(missing, self.fill, x) - self.offset) * self.factor
        rows = torch.cat([scaled, missing[:, self.indicators].to(x.dtype)], 1)
        rows = rows.unsqueeze(0).expand(self.noise.shape[0], -1, -1)
        mean, scale = self.stack.encode(rows)
        z = mean.unsqueeze(2) if scale is None else mean.unsqueeze(2) + scale.unsqueeze(2) * self.noise
        outcome = self.stack.outcomes(z)
        if self.binary:
            outcome = torch.sigmoid(outcome)
        effect = outcome[:, 1] - outcome[:, 0]
        means = effect.mean(2)
        variance = _variance(effect, 2).mean(0) + _variance(means, 0)
        both = self.y_mean + self.y_scale * outcome.mean((0, 3))
        rate = (
            torch.zeros_like(x[:, 0])
            if scale is None
            else (0.5 * (mean.square() + scale.square() - 1 - 2 * scale.log()).sum(-1)).mean(0)
        )
        std = self.inflation * self.y_scale * variance.clamp(min=0).sqrt()
        return self.y_scale * means.mean(0), std, both[0], both[1], rate


def _variance(values: Tensor, dim: int) -> Tensor:
    if values.shape[dim] < 2:
        return values.sum(dim) * 0
    centred = values - values.mean(dim, keepdim=True)
    return centred.square().sum(dim) / (values.shape[dim] - 1)


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Let only errors through: both exporters report sizes that never vary, and packages that are not needed."""
    log = logging.getLogger("torch.onnx")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)


_NAMES = ["effect", "std", "mu0", "mu1", "rate"]


def export_model(
    model: CIB,
    path: str | Path,
    *,
    format: Literal["torchscript", "onnx"] = "onnx",  # noqa: A002
    samples: int = 200,
) -> Path:
    """Write a fitted model to a file that runs without this package.

    Parameters
    ----------
    model : fitted
    path : file to write
    format : ``onnx`` (needs the extra ``onnx``) or ``torchscript``
    samples : draws of z

    Returns
    -------
    The path. Input ``x`` (n, p) float32; outputs ``effect, std, mu0, mu1, rate``, (n,) each.
    """
    path = Path(path)
    module = EffectModule(model, samples).eval()
    example = torch.zeros(3, int(model.n_features_in_))
    with torch.no_grad(), _quiet(), atomic_path(path) as temporary:
        if format == "torchscript":
            traced: Any = torch.jit.trace(module, example, check_trace=False)  # pyright: ignore[reportPrivateImportUsage]
            traced.save(str(temporary))
        elif format == "onnx":
            try:
                import onnxscript  # noqa: F401  # pyright: ignore[reportUnusedImport, reportMissingImports]
            except ImportError as error:
                raise not_installed("export to ONNX", "onnxscript", "cib-ite[onnx]") from error
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                input_names=["x"],
                output_names=_NAMES,
                dynamic_shapes={"x": {0: torch.export.Dim("n", min=1)}},
                verbose=False,
            )
            assert program is not None
            program.save(str(temporary))
        else:
            raise InputError(f"format: must be onnx or torchscript, got {format!r}")
    return path
