"""A scikit-learn classifier whose network has 2- to 8-bit weights and activations, for tables of numbers.

The method is that of Lee et al., arXiv:1911.12990 and arXiv:2109.02100: a float multilayer perceptron is trained first,
then quantized and trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from shared_core.device import one_thread, seeded
from shared_core.errors import InputError
from srq_dropbits.bits import Report
from srq_dropbits.config import QuantConfig
from srq_dropbits.models import MLP
from srq_dropbits.training import fit, quantize_and_train
from srq_dropbits.userdata import DataSplit, InputFormat

__all__ = ["QuantizedMLPClassifier"]


class QuantizedMLPClassifier(ClassifierMixin, BaseEstimator):
    """A multilayer perceptron on integers: predictions come from the converted network's integer products.

    Columns are standardised by the training rows. On a CPU a small network trains on one thread.

    Parameters
    ----------
    hidden : sequence of int, default (64, 32)
        Units of the hidden layers.
    weight_bits : int, default 3
        Width of a weight, 2..8; the most a weight may have where ``method`` learns widths.
    act_bits : int, default 4
        Width of an activation, 1..8; None keeps activations float.
    method : str, default "srq"
        As :meth:`srq_dropbits.config.QuantConfig.method` takes it.
    pretrain_epochs : int, default 30
        Passes through the rows before quantization.
    epochs : int, default 20
        Passes through the rows after it.
    learning_rate : float, default 5e-3
        Of the float network, at the start; quantized, it trains with half of it.
    batch_size : int, default 32
        Rows in a step.
    weight_decay : float, default 1e-4
        Of weights.
    distill : float, default 0.0
        Share of the loss that is the divergence from the float network.
    device : str, default "cpu"
        As :func:`shared_core.device.resolve_device` takes it.
    random_state : int, RandomState or None, default None
        Seed of everything random.

    Attributes
    ----------
    classes_ : ndarray of shape (classes,)
        Labels in the order of the probabilities.
    n_features_in_ : int
        Columns seen at fit.
    report_ : Report
        Bits and bytes, layer by layer.
    history_ : list of dict
        What training after quantization saw, an entry an epoch.
    integer_model_ : Module
        The network with integers in it, which predicts.
    inputs_ : InputFormat
        How rows are scaled.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> X, y = load_iris(return_X_y=True)
    >>> model = QuantizedMLPClassifier((16,), weight_bits=2, epochs=10, random_state=0).fit(X, y)
    >>> model.score(X, y) > 0.9
    True
    """

    n_features_in_: int

    def __init__(
        self,
        hidden: Sequence[int] = (64, 32),
        *,
        weight_bits: int = 3,
        act_bits: int | None = 4,
        method: str = "srq",
        pretrain_epochs: int = 30,
        epochs: int = 20,
        learning_rate: float | int = 5e-3,
        batch_size: int = 32,
        weight_decay: float | int = 1e-4,
        distill: float | int = 0.0,
        device: str = "cpu",
        random_state: Any = None,
    ) -> None:
        self.hidden = hidden
        self.weight_bits = weight_bits
        self.act_bits = act_bits
        self.method = method
        self.pretrain_epochs = pretrain_epochs
        self.epochs = epochs
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.weight_decay = weight_decay
        self.distill = distill
        self.device = device
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> QuantizedMLPClassifier:
        """Train the network, quantize it, and train it on.

        Parameters
        ----------
        X : array or data frame of shape (rows, features)
            Finite numbers.
        y : array of shape (rows,)
            Labels of any kind.

        Returns
        -------
        QuantizedMLPClassifier
            Itself.

        Raises
        ------
        ValueError
            For bad data or parameters; one line that says which.
        """
        from srq_dropbits.deploy import convert

        table, labels = cast(
            "tuple[NDArray[Any], NDArray[Any]]", validate_data(self, X, y, dtype=(np.float64, np.float32))
        )
        check_classification_targets(labels)
        self.classes_, codes = np.unique(labels, return_inverse=True)
        if len(self.classes_) < 2:
            raise InputError(f"y has 1 class, '{self.classes_[0]}'; a classifier needs at least 2 classes")
        data = self._data(table, codes.astype(np.int64))
        config = QuantConfig.method(self.method, self.weight_bits, self.act_bits)
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        with one_thread(data.x_train.device.type == "cpu"):
            with seeded(seed):
                network = MLP(data.shape, data.classes, tuple(self.hidden)).to(data.x_train.device)
            shared: dict[str, Any] = {
                "batch_size": self.batch_size,
                "weight_decay": self.weight_decay,
                "seed": seed,
            }
            fit(network, data, epochs=self.pretrain_epochs, lr=self.learning_rate, **shared)
            done = quantize_and_train(
                network, data, config, epochs=self.epochs, lr=self.learning_rate / 2, distill=self.distill, **shared
            )
            self.integer_model_ = convert(done.model, data.x_train[:1]).eval()
        self.report_: Report = done.report
        self.history_ = done.history
        return self

    def _data(self, table: NDArray[Any], codes: NDArray[np.int64]) -> DataSplit:
        from shared_core.device import resolve_device

        # In float64 until it is scaled: a large offset would eat the digits that tell rows apart.
        mean, std = table.mean(0, dtype=np.float64), table.std(0, dtype=np.float64)
        self.inputs_ = InputFormat(
            (table.shape[1],),
            tuple(mean.tolist()),
            tuple(np.where(std > 1e-12 * np.abs(mean), std, 1.0).tolist()),
            tuple(str(label) for label in self.classes_),
        )
        x, y = self._scaled(table), torch.from_numpy(codes)
        nothing = x[:0], y[:0]
        split = DataSplit("table", x, y, *nothing, *nothing, self.inputs_)
        return split.to(resolve_device(self.device))

    def _scaled(self, table: NDArray[Any]) -> Tensor:
        scaled = (table.astype(np.float64) - np.asarray(self.inputs_.mean)) / np.asarray(self.inputs_.std)
        return torch.from_numpy(scaled.astype(np.float32))

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """Return the probability of each class.

        Parameters
        ----------
        X : array or data frame of shape (rows, features)
            As in `fit`.

        Returns
        -------
        ndarray of shape (rows, classes)
            In the order of ``classes_``.
        """
        check_is_fitted(self)
        table = cast("NDArray[Any]", validate_data(self, X, reset=False, dtype=(np.float64, np.float32)))
        device = next((value.device for value in self.integer_model_.buffers()), torch.device("cpu"))
        with torch.no_grad():
            logits = self.integer_model_(self._scaled(table).to(device))
        return logits.double().softmax(1).cpu().numpy()

    def predict(self, X: Any) -> NDArray[Any]:
        """Return the most probable class of each row.

        Parameters
        ----------
        X : array or data frame of shape (rows, features)
            As in `fit`.

        Returns
        -------
        ndarray of shape (rows,)
            Labels.
        """
        chosen = self.predict_proba(X).argmax(1)
        return self.classes_[chosen]

    def export(self, path: str | Path) -> Any:
        """Write the integers of the network, packed to their bits.

        Parameters
        ----------
        path : str or Path
            File to write, ``.safetensors``; :func:`srq_dropbits.packing.load_packed` reads it. Rows enter it scaled:
            ``(x - inputs_.mean) / inputs_.std``.

        Returns
        -------
        SizeReport
            Bytes of each tensor.
        """
        from srq_dropbits.packing import save_packed

        check_is_fitted(self)
        return save_packed(self.integer_model_, path)
