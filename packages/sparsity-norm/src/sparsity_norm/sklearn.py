"""scikit-learn estimators: Sparsity Normalization as a transformer, and networks for tables with missing values.

All take dense arrays or data frames in which NaN is missing. The method is that of Yi et al., ICLR 2020,
arXiv:1906.00150.
"""

from __future__ import annotations

import copy
import json
import logging
from abc import abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, OneToOneFeatureMixin, RegressorMixin, TransformerMixin
from sklearn.model_selection import train_test_split
from sklearn.utils import Tags, check_random_state, column_or_1d
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from shared_core.device import resolve_device, seeded
from shared_core.errors import DAMAGE, InputError
from shared_core.objects import one_line
from shared_core.runs import atomic_path, load_tree, write_json
from sparsity_norm._csr import tensor_of
from sparsity_norm.export import export_graph
from sparsity_norm.functional import Anything, Number, sparsity_normalize
from sparsity_norm.impute import METHODS, make_input, make_transformer
from sparsity_norm.nn import CenterMode, InputLayer, NaNInput, SparsityNorm, drop_observed

__all__ = ["SNClassifier", "SNRegressor", "SparsityNormalizer"]

_WEIGHTS, _CONFIG, _IMPUTER_TABLE = "model.safetensors", "model.json", "imputer_table"
_FORMAT = 1
_PREDICT_ROWS = 1 << 16
# Below so many operations a step, a second thread costs more than it saves: measured on two idle cores, and hundreds of
# times more where other processes keep the cores busy and the threads wait for each other.
_ONE_THREAD_BELOW = 5e7


class SparsityNormalizer(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):
    """Zero-impute and multiply each row by ``(K / max(s + tau, min_count)) ** power``; ``s`` is its observed count.

    Parameters
    ----------
    K : float, optional
        The constant; by default the mean observed count of the training rows, found by `fit`.
    power : float, default 1.0
        1 is the paper's; 0.5 preserves second moments, 0 is plain zero imputation.
    center : {"column", "global"}, optional
        Subtract means of observed training entries first (an extension).
    min_count : float, default 1.0
        Smallest divisor.
    tau : float, default 0.0
        Added to the count (an extension).
    mask : {"nan", "nonzero"}, default "nan"
        What is missing in a dense table: NaN, or zero. In a sparse matrix whatever is not stored is missing.
    groups : sequence of int, optional
        Group of each column; a group (a one-hot block) counts as one feature.
    count_empty : bool, default False
        Let rows with nothing observed count in K.
    add_mask : bool, default False
        Append the mask, as columns named ``<column>_observed``; dense tables only.

    Attributes
    ----------
    K_ : float
        The constant in use.
    center_ : ndarray of shape (features,) or None
        What is subtracted from each column.
    n_features_in_ : int
        Columns seen at fit.

    Raises
    ------
    ValueError
        Infinite entries, nothing observed at all, another number of columns than at fit.

    Examples
    --------
    >>> X = np.array([[1.0, np.nan, np.nan], [1.0, 2.0, 3.0]])
    >>> SparsityNormalizer().fit(X).transform([[np.nan, 2.0, np.nan]])
    array([[0., 4., 0.]])
    """

    def __init__(
        self,
        K: Number | None = None,
        *,
        power: Number = 1.0,
        center: CenterMode | None = None,
        min_count: Number = 1.0,
        tau: Number = 0.0,
        mask: Literal["nan", "nonzero"] = "nan",
        groups: Sequence[int] | None = None,
        count_empty: bool = False,
        add_mask: bool = False,
    ) -> None:
        self.K = K
        self.power = power
        self.center: CenterMode | None = center
        self.min_count = min_count
        self.tau = tau
        self.mask: Literal["nan", "nonzero"] = mask
        self.groups = groups
        self.count_empty = count_empty
        self.add_mask = add_mask

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.input_tags.sparse = True
        return tags

    def _table(self, X: Any, *, reset: bool) -> Any:
        return validate_data(
            self,
            X,
            reset=reset,
            accept_sparse="csr",
            dtype=(np.float64, np.float32),
            ensure_all_finite="allow-nan",
        )

    def fit(self, X: Any, y: Any = None) -> SparsityNormalizer:  # noqa: ARG002
        """Find K, and the centres where asked.

        Parameters
        ----------
        X : array, data frame or sparse matrix of shape (rows, features)
            NaN is missing; in a sparse matrix what is not stored is.
        y : ignored

        Returns
        -------
        SparsityNormalizer
        """
        table = self._table(X, reset=True)
        layer = SparsityNorm(
            self.K,
            self.power,
            self.center,
            self.min_count,
            mask=self.mask,
            tau=self.tau,
            groups=self.groups,
            count_empty=self.count_empty,
            concat_mask=self.add_mask,
        ).double()
        self.layer_ = layer.fit(_dense_or_sparse(table)).eval()
        self.K_ = float(layer.K)
        self.center_ = None if layer.center is None else np.broadcast_to(layer.center.numpy(), (table.shape[1],)).copy()
        return self

    def transform(self, X: Any) -> Any:
        """Normalize rows.

        Parameters
        ----------
        X : array, data frame or sparse matrix of shape (rows, features)
            As in `fit`.

        Returns
        -------
        ndarray or CSR matrix of shape (rows, features)
            Twice as many columns with ``add_mask``.
        """
        check_is_fitted(self)
        table = self._table(X, reset=False)
        layer = self.layer_
        if isinstance(table, np.ndarray):
            with torch.no_grad():
                return layer(_dense_or_sparse(table)).numpy()
        if self.add_mask:
            raise InputError("add_mask needs a dense table; give X.toarray() with NaN for what is missing")
        return sparsity_normalize(
            table,
            K=self.K_,
            power=self.power,
            center=layer.center,
            min_count=self.min_count,
            tau=self.tau,
            groups=layer.groups,
        )

    def get_feature_names_out(self, input_features: Any = None) -> NDArray[Any]:
        """Return a name for each output column.

        Parameters
        ----------
        input_features : array of str, optional
            Names of the columns.

        Returns
        -------
        ndarray of str
        """
        check_is_fitted(self)
        names = cast("NDArray[Any]", super().get_feature_names_out(input_features))
        if not self.add_mask:
            return names
        return np.concatenate([names, [f"{name}_observed" for name in names]]).astype(object)


def _dense_or_sparse(table: Any) -> Any:
    return tensor_of(table) if isinstance(table, np.ndarray) else table


class _Network(nn.Module):
    """An input layer and a multilayer perceptron with ReLU on top of it."""

    def __init__(
        self,
        layer: InputLayer,
        features: int,
        hidden: Sequence[int],
        outputs: int,
        *,
        dropout: Number,
        input_dropout: Number,
        first_bias: bool,
    ) -> None:
        super().__init__()
        self.input = layer
        self.input_dropout = input_dropout
        sizes = [layer.out_features(features), *hidden]
        body: list[nn.Module] = []
        for depth, (size, width) in enumerate(pairwise(sizes)):
            body += [nn.Linear(size, width, bias=first_bias or depth > 0), nn.ReLU()]
            body += [nn.Dropout(dropout)] if dropout else []
        body.append(nn.Linear(sizes[-1], outputs, bias=first_bias or len(sizes) > 1))
        self.body = nn.Sequential(*body)

    @property
    def static(self) -> bool:
        """Whether the input layer's output for a row is the same in every epoch."""
        return self.input.static and not self.input_dropout

    def forward(self, x: Anything, mask: Anything | None = None) -> Anything:
        """Compute outputs from (batch, features) input, NaN or ``mask`` saying what is missing."""
        if self.training and self.input_dropout:
            observed = ~torch.isnan(x) if mask is None else mask.bool()
            mask = drop_observed(observed, self.input_dropout)
        return self.body(self.input(x, mask))


class _Graph(nn.Module):
    """What is exported: (x, mask) in, what ``predict`` or ``predict_proba`` returns out."""

    def __init__(self, network: nn.Module, finish: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.network = network
        self.finish = finish

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.finish(self.network(x, mask))


@contextmanager
def _threads_for(network: nn.Module, batch_size: int, device: torch.device) -> Generator[None]:
    """Train a small network on one thread, and leave torch's setting as it was."""
    before = torch.get_num_threads()
    operations = 6 * batch_size * sum(parameter.numel() for parameter in network.parameters())
    if device.type == "cpu" and operations < _ONE_THREAD_BELOW:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _quiet(logger: str) -> Generator[None]:
    """Let only errors of a logger through: the exporter reports every optional package that is not installed."""
    log = logging.getLogger(logger)
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


_Estimator = TypeVar("_Estimator", bound="_SNEstimator")


class _SNEstimator(BaseEstimator):
    """What `SNClassifier` and `SNRegressor` share: everything but the loss and what an output means."""

    def __init__(
        self,
        hidden: Sequence[int] = (64, 64),
        *,
        input: str = "sn",  # noqa: A002
        power: Number | Literal["learn"] | None = None,
        input_options: Mapping[str, Any] | None = None,
        dropout: Number = 0.0,
        input_dropout: Number = 0.0,
        lr: Number = 2e-3,
        weight_decay: Number = 0.0,
        batch_size: int = 64,
        epochs: int = 100,
        early_stopping: bool = False,
        validation_fraction: Number = 0.1,
        patience: int = 10,
        device: str = "auto",
        random_state: Any = None,
    ) -> None:
        self.hidden = hidden
        self.input = input
        self.power = power
        self.input_options = input_options
        self.dropout = dropout
        self.input_dropout = input_dropout
        self.lr = lr
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.epochs = epochs
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.patience = patience
        self.device = device
        self.random_state = random_state

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        return tags

    n_features_in_: int
    feature_names_in_: NDArray[Any]
    _target_options: Mapping[str, Any]

    def __getstate__(self) -> dict[str, Any]:
        # A training under way belongs to the process it is in; `state` stores what can be stored of it.
        kept = cast("dict[str, Any]", super().__getstate__())
        return {name: value for name, value in kept.items() if name != "_progress"}

    @abstractmethod
    def _learn_targets(self, y: NDArray[Any]) -> None:
        """Refuse targets of the wrong kind and learn what outputs mean: classes, or a scale."""

    @abstractmethod
    def _encode(self, y: NDArray[Any]) -> Tensor:
        """Turn targets into what the loss takes."""

    @abstractmethod
    def _strata(self, y: NDArray[Any]) -> NDArray[Any] | None:
        """Return what the held-out rows are to be stratified by."""

    @abstractmethod
    def _loss(self, output: Tensor, target: Tensor) -> Tensor: ...

    @property
    @abstractmethod
    def _outputs(self) -> int: ...

    @abstractmethod
    def _finish(self) -> Callable[[Tensor], Tensor]:
        """Return what turns network outputs into probabilities, or into targets on their own scale."""

    @abstractmethod
    def _meaning(self) -> dict[str, Any]:
        """Return what, beside the weights, is needed to read the outputs; plain values."""

    @abstractmethod
    def _set_meaning(self, meaning: Mapping[str, Any]) -> None: ...

    def _check_options(self) -> None:
        if self.input not in METHODS:
            make_input(self.input)
        for name in ("dropout", "input_dropout"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise InputError(f"{name} is {value:g}; a probability of dropping must lie in [0, 1)")
        for name in ("lr", "batch_size", "epochs", "patience"):
            value = getattr(self, name)
            if not value > 0:
                raise InputError(f"{name} is {value:g}; it must be positive")
        if self.weight_decay < 0:
            raise InputError(f"weight_decay is {self.weight_decay:g}; it must be zero or positive")
        if any(width < 1 for width in self.hidden):
            raise InputError(f"hidden is {tuple(self.hidden)}; every layer needs at least one unit")
        if self.input_dropout and METHODS[self.input].imputer is not None:
            raise InputError(
                f"input_dropout needs a method that fills inside the network; {self.input!r} imputes before it"
            )

    def fit(
        self: _Estimator,
        X: Any,
        y: Any,
        *,
        validation: tuple[Any, Any] | None = None,
        on_epoch: Callable[[int, dict[str, float]], Any] | None = None,
        resume_from: Any = None,
    ) -> _Estimator:
        """Train the network.

        Parameters
        ----------
        X : array or data frame of shape (rows, features)
            NaN is missing.
        y : array of shape (rows,) or, for regression, (rows, outputs)
            Targets.
        validation : pair of arrays, optional
            ``(X, y)`` to watch, and to stop by with ``early_stopping``; by default a random part of the training
            rows where ``early_stopping`` asks for one.
        on_epoch : callable, optional
            Called as ``on_epoch(epoch, info)`` after each epoch, counted from 1; ``info`` holds ``train_loss`` and,
            where there are validation rows, ``validation_loss`` (both in the units of the loss). `state` may be called
            from it; a true result stops training.
        resume_from : dict or path, optional
            What `state` returned, or a file of it: go on after that epoch, with the same data and parameters. On a CPU
            the result is the same, bit for bit, as of training that was never interrupted.

        Returns
        -------
        estimator
            Itself.

        Raises
        ------
        ValueError
            Bad data; its message says where.
        """
        self._check_options()
        device = resolve_device(self.device)
        table, target = self._validated(X, y, reset=True)
        self._learn_targets(target)
        resumed = None if resume_from is None else self._read_state(resume_from, table.shape)
        seed = resumed["seed"] if resumed else int(check_random_state(self.random_state).randint(2**31 - 1))

        rows, held_out = np.arange(len(table)), None
        if validation is not None:
            held_out = self._validated(*validation, reset=False)
        elif self.early_stopping:
            rows, part = self._split_rows(target, seed)
            held_out = table[part], target[part]
        self._imputer_table = table[rows] if METHODS[self.input].imputer is not None else None
        self._fit_imputer()
        x, encoded = self._filled(table[rows]).to(device), self._encode(target[rows]).to(device)
        watched = None
        if held_out is not None:
            watched = self._filled(held_out[0]).to(device), self._encode(held_out[1]).to(device)

        with seeded((seed, 0), device):
            self.network_ = self._build(table.shape[1])
        self.network_.input.fit(x.cpu())
        self.network_.to(device)
        self._progress = _Progress(
            torch.optim.AdamW(
                self.network_.parameters(), self.lr, weight_decay=self.weight_decay, fused=device.type != "mps"
            ),
            seed,
            self._signature(table.shape),
        )
        if resumed:
            self.network_.load_state_dict(resumed["network"])
            self._progress.resume(resumed)
        with _threads_for(self.network_, self.batch_size, device):
            self._train(x, encoded, watched, on_epoch)
        return self

    def _validated(self, X: Any, y: Any, *, reset: bool) -> tuple[NDArray[Any], NDArray[Any]]:
        return cast(
            "tuple[NDArray[Any], NDArray[Any]]",
            validate_data(
                self,
                X,
                y,
                reset=reset,
                dtype=(np.float64, np.float32),
                ensure_all_finite="allow-nan",
                **self._target_options,
            ),
        )

    def _split_rows(self, target: NDArray[Any], seed: int) -> tuple[NDArray[Any], NDArray[Any]]:
        if not 0 < self.validation_fraction < 1:
            raise InputError(f"validation_fraction is {self.validation_fraction:g}; it must lie in (0, 1)")
        rows = np.arange(len(target))
        if len(rows) < 2:
            raise InputError("early_stopping needs rows to hold out, and there is only 1; give validation=(X, y)")
        split: Any = train_test_split(
            rows, test_size=self.validation_fraction, random_state=seed, stratify=self._strata(target)
        )
        return np.sort(split[0]), np.sort(split[1])

    def _fit_imputer(self) -> None:
        self.imputer_ = None
        if self._imputer_table is not None:
            self.imputer_ = make_transformer(self.input, **(self.input_options or {})).fit(self._imputer_table)

    def _filled(self, table: NDArray[Any], dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the table as a tensor, completed where the method completes whole tables."""
        x = torch.from_numpy(np.array(table if self.imputer_ is None else self.imputer_.transform(table))).to(dtype)
        if bool(torch.isinf(x).any()):
            row, column = (int(i) for i in torch.isinf(x).nonzero()[0])
            raise InputError(f"X is too large for {dtype} at row {row}, column {column}; rescale the column")
        return x

    def _build(self, features: int) -> _Network:
        method = METHODS[self.input]
        options = dict(self.input_options or {})
        if self.power is not None:
            options["power"] = self.power
        # Values were checked once, at fit; the layer need not look again at every batch.
        layer = NaNInput() if method.layer is None else make_input(self.input, validate=False, **options)
        return _Network(
            layer,
            features,
            self.hidden,
            self._outputs,
            dropout=self.dropout,
            input_dropout=self.input_dropout,
            first_bias=method.first_bias,
        )

    def _train(
        self,
        x: Tensor,
        target: Tensor,
        watched: tuple[Tensor, Tensor] | None,
        on_epoch: Callable[[int, dict[str, float]], Any] | None,
    ) -> None:
        network, progress = self.network_, self._progress
        # An input layer with nothing to learn is applied once, not in every epoch.
        model: nn.Module = network.body if network.static else network
        if network.static:
            with torch.no_grad():
                x = network.input(x)
                watched = None if watched is None else (network.input(watched[0]), watched[1])
        self.history_ = progress.history
        while len(progress.history) < self.epochs and not self._exhausted():
            epoch = len(progress.history) + 1
            network.train()
            # From seed and epoch alone: one that starts from stored weights is the same, whatever ran before it.
            with seeded((progress.seed, epoch), x.device) as generator:
                info = {"train_loss": self._epoch(model, x, target, generator)}
            network.eval()
            if watched is not None:
                with torch.no_grad():
                    info["validation_loss"] = float(self._loss(model(watched[0]), watched[1]))
            progress.record(info, network if self.early_stopping else None)
            if on_epoch is not None and on_epoch(epoch, dict(info)):
                break
        if progress.best is not None:
            network.load_state_dict(progress.best["network"])
        network.eval()
        self.n_epochs_ = len(progress.history)

    def _exhausted(self) -> bool:
        best = self._progress.best
        return best is not None and len(self._progress.history) - best["epoch"] >= self.patience

    def _epoch(self, model: nn.Module, x: Tensor, target: Tensor, generator: torch.Generator) -> float:
        optimizer = self._progress.optimizer
        total = torch.zeros((), device=x.device)
        for rows in torch.randperm(len(x), generator=generator).to(x.device).split(self.batch_size):
            loss = self._loss(model(x[rows]), target[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(rows)
        return float(total) / len(x)

    def _signature(self, shape: tuple[int, ...]) -> dict[str, Any]:
        free = {"epochs", "device", "random_state"}
        options = {name: value for name, value in self.get_params(deep=False).items() if name not in free}
        return {"estimator": type(self).__name__, "rows": shape[0], "features": shape[1], **_plain(options)}

    def state(self) -> dict[str, Any]:
        """Return everything that `fit` needs to go on after the last finished epoch.

        Returns
        -------
        dict
            Nested dicts and lists of tensors and plain values, as `shared_core.runs.save_tree` writes them.

        Raises
        ------
        sklearn.exceptions.NotFittedError
            Nothing was trained in this process.

        Examples
        --------
        >>> X, y = np.eye(4), np.arange(4.0)
        >>> half = SNRegressor(epochs=3, random_state=0).fit(X, y).state()
        >>> whole = SNRegressor(epochs=6, random_state=0).fit(X, y, resume_from=half)
        >>> bool((whole.predict(X) == SNRegressor(epochs=6, random_state=0).fit(X, y).predict(X)).all())
        True
        """
        check_is_fitted(self, "_progress", msg="this %(name)s holds no training state; call fit first")
        return self._progress.state(self._network_state())

    def _network_state(self) -> dict[str, Tensor]:
        last = self._progress.last_network
        return last if last is not None else _cloned(self.network_.state_dict())

    def _read_state(self, source: Any, shape: tuple[int, ...]) -> dict[str, Any]:
        state = source if isinstance(source, dict) else load_tree(source)
        where = "resume_from" if isinstance(source, dict) else str(source)
        if not isinstance(state, dict) or "signature" not in state:
            raise InputError(f"{where} is no training state; give what state() returned")
        stored = cast("dict[str, Any]", state)
        for name, value in self._signature(shape).items():
            if stored["signature"].get(name) != value:
                raise InputError(
                    f"{where} was made with {name}={stored['signature'].get(name)!r}, now it is {value!r}; "
                    "resume with the same data and parameters"
                )
        return stored

    def _raw(self, X: Any) -> Tensor:
        """Compute finished outputs, in float64 so that they do not depend on the rows that come along."""
        check_is_fitted(self)
        table = validate_data(self, X, reset=False, dtype=(np.float64, np.float32), ensure_all_finite="allow-nan")
        device = next(self.network_.parameters()).device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        network = copy.deepcopy(self.network_).to(dtype)
        finish = self._finish()
        x = self._filled(cast("NDArray[Any]", table), dtype)
        with torch.no_grad():
            return torch.cat([finish(network(part.to(device))).cpu() for part in x.split(_PREDICT_ROWS)])

    def save(self, folder: str | Path) -> None:
        """Write the fitted estimator: ``model.safetensors`` and ``model.json``, nothing pickled.

        A method that imputes whole tables (``knn``, ``iterative``, ``softimpute``) is stored as its training table,
        which is what it is made of, and fitted again by `load`.

        Parameters
        ----------
        folder : path
            Made where it does not exist.

        Raises
        ------
        InputError
            The folder cannot be written.
        """
        from safetensors.torch import save_file

        check_is_fitted(self)
        folder = Path(folder)
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.network_.state_dict().items()}
        if self._imputer_table is not None:
            tensors[_IMPUTER_TABLE] = torch.from_numpy(np.array(self._imputer_table))
        params = self.get_params(deep=False)
        if not isinstance(params["random_state"], int | None):
            params["random_state"] = None
        config = {
            "format": _FORMAT,
            "estimator": type(self).__name__,
            "params": _plain(params),
            "n_features_in": self.n_features_in_,
            "feature_names_in": _plain(getattr(self, "feature_names_in_", None)),
            "meaning": _plain(self._meaning()),
            "n_epochs": self.n_epochs_,
        }
        with atomic_path(folder / _WEIGHTS) as temporary:
            save_file(tensors, temporary)
        write_json(folder / _CONFIG, config)

    @classmethod
    def load(cls: type[_Estimator], folder: str | Path) -> _Estimator:
        """Read what `save` wrote.

        Parameters
        ----------
        folder : path
            Holding ``model.safetensors`` and ``model.json``.

        Returns
        -------
        estimator
            Fitted, on the CPU.

        Raises
        ------
        InputError
            A file is missing, damaged, or of another estimator.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder)
        try:
            config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
            if config["estimator"] != cls.__name__ or config["format"] != _FORMAT:
                raise InputError(
                    f"{folder / _CONFIG} is of {config['estimator']}, format {config['format']}; "
                    f"expected {cls.__name__}, format {_FORMAT}"
                )
            params: dict[str, Any] = {**config["params"], "hidden": tuple(config["params"]["hidden"])}
            estimator = cls(**params)
            estimator.n_features_in_ = config["n_features_in"]
            if config["feature_names_in"] is not None:
                estimator.feature_names_in_ = np.array(config["feature_names_in"], dtype=object)
            estimator._set_meaning(config["meaning"])
            estimator.n_epochs_ = config["n_epochs"]
            tensors = load_file(folder / _WEIGHTS)
            table = tensors.pop(_IMPUTER_TABLE, None)
            estimator._imputer_table = None if table is None else table.numpy()
            estimator._fit_imputer()
            estimator.network_ = estimator._build(estimator.n_features_in_)
            estimator.network_.load_state_dict(tensors)
        except OSError as error:
            raise InputError(f"cannot read {error.filename or folder}: {error.strerror or error}") from error
        except InputError:
            raise
        except (SafetensorError, *DAMAGE) as error:
            raise InputError(f"{folder} holds no saved {cls.__name__}, or a damaged one ({one_line(error)})") from error
        estimator.network_.eval()
        return estimator

    def graph(self) -> nn.Module:
        """Return the fitted network as a module of ``(x, mask)``, for export.

        Returns
        -------
        nn.Module
            On the CPU, float32, in evaluation mode; (batch, features) input and bool mask in, what `predict` or
            ``predict_proba`` returns out, (batch, outputs).

        Raises
        ------
        InputError
            The method imputes whole tables outside the network.
        """
        check_is_fitted(self)
        if self.imputer_ is not None:
            raise InputError(
                f"the method {self.input!r} imputes outside the network, which no graph can hold; choose another input"
            )
        return _Graph(copy.deepcopy(self.network_).cpu().float(), self._finish()).eval()

    def export_onnx(self, path: str | Path) -> None:
        """Write the network as ONNX: inputs ``x`` (float32) and ``mask`` (bool), (batch, features), any batch size.

        Parameters
        ----------
        path : path
            File to write; one file, weights included.

        Raises
        ------
        InputError
            The optional dependencies are missing, or the method imputes whole tables outside the network.
        """
        with _quiet("torch.onnx"):
            export_graph(self.graph(), int(self.n_features_in_), path)


class _Progress:
    """A training under way: what `_SNEstimator.state` stores beside the weights."""

    def __init__(self, optimizer: torch.optim.Optimizer, seed: int, signature: dict[str, Any]) -> None:
        self.optimizer = optimizer
        self.seed = seed
        self.signature = signature
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Any] | None = None
        # The weights after the last epoch, where early stopping went back to better ones.
        self.last_network: dict[str, Tensor] | None = None

    def record(self, info: dict[str, float], watched_network: nn.Module | None) -> None:
        self.history.append(info)
        if watched_network is None or "validation_loss" not in info:
            return
        loss = info["validation_loss"]
        self.last_network = _cloned(watched_network.state_dict())
        if self.best is None or loss < self.best["validation_loss"]:
            self.best = {"epoch": len(self.history), "validation_loss": loss, "network": self.last_network}

    def state(self, network: dict[str, Tensor]) -> dict[str, Any]:
        return copy.deepcopy(
            {
                "signature": self.signature,
                "seed": self.seed,
                "history": self.history,
                "network": network,
                "optimizer": self.optimizer.state_dict(),
                "best": self.best,
            }
        )

    def resume(self, state: Mapping[str, Any]) -> None:
        # Copied: training writes into what the optimizer holds.
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.history = [dict(info) for info in state["history"]]
        self.best = copy.deepcopy(state["best"])
        self.last_network = None if self.best is None else _cloned(state["network"])


def _cloned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _plain(value: Any) -> Any:
    """Return the value in types that JSON has."""
    if isinstance(value, np.generic | np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in cast("Sequence[Any]", value)]
    return value


class SNClassifier(ClassifierMixin, _SNEstimator):
    """A multilayer perceptron that classifies rows with missing values.

    Parameters
    ----------
    hidden : sequence of int, default (64, 64)
        Width of each hidden layer (ReLU); empty for a linear model.
    input : str, default "sn"
        How missing values are met: any name of `sparsity_norm.impute.METHODS`. All are trained by the same code.
    power : float or "learn", optional
        For the methods of Sparsity Normalization, in place of their own; 1 is the paper's.
    input_options : dict, optional
        Further options of the method's layer or imputer.
    dropout : float, default 0.0
        Of hidden units.
    input_dropout : float, default 0.0
        Probability of dropping an observed entry *from the mask* in training.
    lr, weight_decay, batch_size, epochs
        Of AdamW; ``epochs`` is the most.
    early_stopping : bool, default False
        Stop ``patience`` epochs after the lowest validation loss and go back to it.
    validation_fraction : float, default 0.1
        Share of the training rows held out for that, where `fit` is given no ``validation``.
    patience : int, default 10
        In epochs.
    device : str, default "auto"
        "auto", "cpu", "cuda", "cuda:1" or "mps".
    random_state : int, RandomState or None
        Weights, order of rows, dropout and the held-out part; the same number gives the same result on a CPU.

    Attributes
    ----------
    classes_ : ndarray
        Labels, in the order of the columns of `predict_proba`.
    network_ : nn.Module
    history_ : list of dict
        ``train_loss`` and ``validation_loss`` (cross-entropy, nats) of each epoch.
    n_features_in_, n_epochs_ : int

    Notes
    -----
    Sparsity Normalization is from Yi et al. (ICLR 2020, arXiv:1906.00150). Columns should be on comparable scales; do
    not standardise them to mean zero first unless you also want ``input="sn-center"``: with means of zero the drift
    that the method corrects is gone already.

    Examples
    --------
    >>> X = np.array([[0.0, np.nan], [1.0, 1.0], [np.nan, 0.0], [np.nan, 1.0]] * 8)
    >>> y = np.array(["low", "high", "low", "high"] * 8)
    >>> SNClassifier(random_state=0).fit(X, y).predict([[np.nan, 1.0]])
    array(['high'], dtype='<U4')
    """

    _target_options: Mapping[str, Any] = {}

    def _learn_targets(self, y: NDArray[Any]) -> None:
        check_classification_targets(y)
        self.classes_ = np.unique(y)

    def _encode(self, y: NDArray[Any]) -> Tensor:
        index = np.searchsorted(self.classes_, y).clip(max=len(self.classes_) - 1)
        if (self.classes_[index] != y).any():
            unknown = y[self.classes_[index] != y][0]
            raise InputError(f"validation holds the class {unknown!r}, which training has not")
        return torch.from_numpy(index)

    def _strata(self, y: NDArray[Any]) -> NDArray[Any] | None:
        counts = np.unique(y, return_counts=True)[1]
        held_out = int(len(y) * self.validation_fraction)
        return y if counts.min() >= 2 and held_out >= len(counts) else None

    def _loss(self, output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, target)

    @property
    def _outputs(self) -> int:
        return len(self.classes_)

    def _finish(self) -> Callable[[Tensor], Tensor]:
        return lambda output: output.softmax(-1)

    def _meaning(self) -> dict[str, Any]:
        return {"classes": self.classes_, "dtype": self.classes_.dtype.str}

    def _set_meaning(self, meaning: Mapping[str, Any]) -> None:
        self.classes_ = np.array(meaning["classes"], dtype=np.dtype(meaning["dtype"]))

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """Return the probability of each class.

        Parameters
        ----------
        X : array or data frame of shape (rows, features)
            NaN is missing.

        Returns
        -------
        ndarray of shape (rows, classes)
            Rows sum to 1.
        """
        return self._raw(X).double().numpy()

    def predict(self, X: Any) -> NDArray[Any]:
        """Return the most probable class.

        Parameters
        ----------
        X : array or data frame of shape (rows, features)
            NaN is missing.

        Returns
        -------
        ndarray of shape (rows,)
        """
        probability = self.predict_proba(X)
        return self.classes_[probability.argmax(axis=1)]


class SNRegressor(RegressorMixin, _SNEstimator):
    """A multilayer perceptron that predicts numbers from rows with missing values.

    Parameters are those of `SNClassifier`. Targets are standardised for training, by constants, and predictions come
    back on their scale; several targets (a 2-D ``y``) are allowed.

    Attributes
    ----------
    target_mean_, target_scale_ : ndarray of shape (outputs,)
    network_ : nn.Module
    history_ : list of dict
        ``train_loss`` and ``validation_loss`` (mean squared error of standardised targets) of each epoch.
    n_features_in_, n_epochs_ : int

    Notes
    -----
    Sparsity Normalization is from Yi et al. (ICLR 2020, arXiv:1906.00150); see `SNClassifier`.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> X = 3 + rng.normal(size=(400, 1)) + 0.1 * rng.normal(size=(400, 10))
    >>> y = X.mean(axis=1)
    >>> X[rng.random(X.shape) < 0.5] = np.nan
    >>> SNRegressor(hidden=(), lr=0.02, random_state=0).fit(X, y).score(X, y) > 0.95
    True
    """

    _target_options: Mapping[str, Any] = {"multi_output": True, "y_numeric": True}

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def _learn_targets(self, y: NDArray[Any]) -> None:
        if y.ndim == 2 and y.shape[1] == 1:
            # Warns as every estimator of scikit-learn does.
            y = column_or_1d(y, warn=True)
        self._one_target = y.ndim == 1
        targets = y.reshape(len(y), -1).astype(np.float64)
        self.target_mean_ = targets.mean(axis=0)
        spread = targets.std(axis=0)
        self.target_scale_ = np.where(spread > 0, spread, 1.0)

    def _encode(self, y: NDArray[Any]) -> Tensor:
        standard = (y.reshape(len(y), -1) - self.target_mean_) / self.target_scale_
        return torch.from_numpy(standard).float()

    def _strata(self, y: NDArray[Any]) -> NDArray[Any] | None:  # noqa: ARG002
        return None

    def _loss(self, output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.mse_loss(output, target)

    @property
    def _outputs(self) -> int:
        return len(self.target_mean_)

    def _finish(self) -> Callable[[Tensor], Tensor]:
        mean, scale = torch.from_numpy(self.target_mean_), torch.from_numpy(self.target_scale_)
        return lambda output: output * scale.to(output) + mean.to(output)

    def _meaning(self) -> dict[str, Any]:
        return {"mean": self.target_mean_, "scale": self.target_scale_, "one_target": self._one_target}

    def _set_meaning(self, meaning: Mapping[str, Any]) -> None:
        self.target_mean_, self.target_scale_ = np.array(meaning["mean"]), np.array(meaning["scale"])
        self._one_target = bool(meaning["one_target"])

    def predict(self, X: Any) -> NDArray[np.float64]:
        """Predict targets.

        Parameters
        ----------
        X : array or data frame of shape (rows, features)
            NaN is missing.

        Returns
        -------
        ndarray of shape (rows,) or (rows, outputs)
            As the targets at fit.
        """
        predicted = self._raw(X).double().numpy()
        return predicted[:, 0] if self._one_target else predicted
