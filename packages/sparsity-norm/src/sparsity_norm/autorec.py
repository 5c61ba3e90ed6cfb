"""AutoRec with Sparsity Normalization: a rating autoencoder trained on observed cells only.

Yi et al., "Why Not to Use Zero Imputation? Correcting Sparsity Bias in Training Neural Networks", ICLR 2020,
arXiv:1906.00150, applied to AutoRec (Sedhain et al., WWW 2015). An *instance* is one item (its ratings by all users) or
one user (the ratings of all items); ``r`` is its vector of ratings, of which ``s`` are observed::

    h    = f(V^T SN(r) + mu)        SN(r) = r * (K / max(s, 1)) ** power, 0 where not observed
    rhat = g(W^T h + b)

and a mini-batch of ``B`` instances is fitted by

    (1 / B) * [ 1/2 * sum over observed cells of (rhat - r)^2  +  reg / 2 * (||V||_F^2 + ||W||_F^2) ]

``K``, the mean observed count, is fitted on the training instances once and stored with the weights. Neither training
nor prediction on sparse rows ever forms a ``batch x features`` array: the encoder sums embedding rows, the decoder
computes observed cells only.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.adam import adam

from shared_core.errors import InputError
from shared_core.objects import one_line
from sparsity_norm.functional import Anything, masked_linear, sparsity_scale
from sparsity_norm.ratings import Number

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["AutoRec", "AutoRecTrainer", "BatchGradients", "EpochReport", "SparseRows", "batch_gradients", "choose_path"]

Path = Literal["auto", "dense", "sparse"]
AnyShape = Float[Tensor, "..."]

# On a CPU the paths take the same time at 30 to 50 % (benchmarks/race_sparse_dense.py --sweep); for CUDA it is a guess.
DENSE_FROM_DENSITY = {"cpu": 0.35, "cuda": 0.5}
DENSE_BYTES_AT_MOST = 2**30

_ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "identity": (lambda x: x, torch.ones_like),
    "sigmoid": (torch.sigmoid, lambda y: y * (1 - y)),
    "tanh": (torch.tanh, lambda y: 1 - y * y),
    "relu": (torch.relu, lambda y: (y > 0).to(y.dtype)),
}


@dataclass(frozen=True)
class SparseRows:
    """Rows of observed entries on one device: row ``r`` is the slice ``indptr[r]:indptr[r + 1]`` of the other fields.

    Attributes
    ----------
    indptr
        Shape ``(rows + 1,)``, integer.
    columns
        Shape ``(entries,)``, integer of the same type, ascending within a row.
    values
        Shape ``(entries,)``; an entry is observed whatever its value.
    targets
        What a model that reads ``values`` should predict at the same places; the values themselves when ``None``.

    Examples
    --------
    >>> rows = SparseRows.of([0, 2, 3], [0, 4, 1], [5.0, 3.0, 1.0])
    >>> rows.select(torch.tensor([1])).columns.tolist()
    [1]
    """

    indptr: Integer[Tensor, " rows_plus_one"]
    columns: Integer[Tensor, " entries"]
    values: Float[Tensor, " entries"]
    targets: Float[Tensor, " entries"] | None = None

    @classmethod
    def of(
        cls,
        indptr: Any,
        columns: Any,
        values: Any,
        targets: Any = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> SparseRows:
        """Copy arrays, tensors or sequences to ``device``; 32-bit indices are used where they suffice."""
        values = torch.as_tensor(values, dtype=dtype, device=device)
        index = torch.int32 if values.numel() < 2**31 else torch.int64
        return cls(
            torch.as_tensor(indptr, dtype=index, device=device),
            torch.as_tensor(columns, dtype=index, device=device),
            values,
            None if targets is None else torch.as_tensor(targets, dtype=dtype, device=device),
        )

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.indptr) - 1

    @property
    def counts(self) -> Integer[Tensor, " rows"]:
        """Observed entries of each row."""
        return self.indptr.diff()

    @property
    def wanted(self) -> Float[Tensor, " entries"]:
        """The targets, or else the values."""
        return self.values if self.targets is None else self.targets

    def select(self, rows: Integer[Tensor, " chosen"], entries: int | None = None) -> SparseRows:
        """Return the rows named by ``rows``, in that order, by index arithmetic on the device.

        ``entries``, their number of entries, saves a wait for the device where the caller knows it.
        """
        starts = self.indptr[rows]
        counts = self.indptr[rows + 1] - starts
        indptr = functional.pad(counts.cumsum(0, dtype=self.indptr.dtype), (1, 0))
        entries = int(indptr[-1]) if entries is None else entries
        places = torch.repeat_interleave(starts - indptr[:-1], counts, output_size=entries)
        places += torch.arange(entries, dtype=places.dtype, device=places.device)
        targets = None if self.targets is None else self.targets[places]
        return SparseRows(indptr, self.columns[places], self.values[places], targets)


class BatchGradients(NamedTuple):
    """Objective of one batch and its derivatives.

    Attributes
    ----------
    loss
        The mini-batch objective of the module's docstring, penalty included.
    squared_error
        Sum over observed cells of the squared error.
    gradients
        Derivative of ``loss`` by parameter name, in the parameter's shape: (features, hidden) for the two weights,
        (hidden,) and (features,) for the biases of encoder and decoder.
    """

    loss: Float[Tensor, ""]
    squared_error: Float[Tensor, ""]
    gradients: dict[str, AnyShape]


class AutoRec(nn.Module):
    """A one-hidden-layer autoencoder of rating vectors, with Sparsity Normalization of its input.

    Source: AutoRec (Sedhain et al., 2015), with the input scaled as arXiv:1906.00150 proposes; ``power=0`` is plain
    AutoRec on zero-imputed input. Where the paper's formulas write ``V`` and ``W``, see the properties of that name.

    Parameters
    ----------
    features
        Length ``D`` of an instance.
    hidden
        Number ``H`` of hidden units.
    power
        Exponent of ``K / (s + tau)``: 1 is the paper's, 0.5 keeps the second moment, 0 switches the scaling off.
    tau
        Added to the observed count: tames the scale of instances with fewer entries than any in training. The paper
        has 0.
    hidden_activation, output_activation
        ``"sigmoid"``, ``"tanh"``, ``"relu"`` or ``"identity"``.
    seed
        Seed, or generator, of the initial weights (Xavier uniform; biases begin at 0).
    device, dtype
        Where and in which precision the parameters live.

    Raises
    ------
    InputError
        For a size below 1, a negative power or an unknown activation.

    Examples
    --------
    >>> model = AutoRec(features=4, hidden=2).fit_counts(torch.tensor([1, 3]))
    >>> model(torch.tensor([[5.0, float("nan"), 1.0, 2.0]])).shape
    torch.Size([1, 4])
    """

    observed_mean: Tensor

    def __init__(
        self,
        features: int,
        hidden: int = 500,
        *,
        power: Number = 1.0,
        tau: Number = 0.0,
        hidden_activation: str = "sigmoid",
        output_activation: str = "identity",
        seed: int | torch.Generator = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        for name, size in (("features", features), ("hidden", hidden)):
            if size < 1:
                raise InputError(f"{name}: {size} is too small; it must be at least 1")
        if not (math.isfinite(power) and power >= 0):
            raise InputError(f"power: {power} must be a number of at least 0")
        if not (math.isfinite(tau) and tau >= 0):
            raise InputError(f"tau: {tau} must be a number of at least 0")
        for name, activation in (("hidden_activation", hidden_activation), ("output_activation", output_activation)):
            if activation not in _ACTIVATIONS:
                raise InputError(f"{name}: {activation!r} is none of {sorted(_ACTIVATIONS)}")
        self.power = float(power)
        self.tau = float(tau)
        self.hidden_activation = hidden_activation
        self.output_activation = output_activation
        generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
        # Drawn on the CPU, so that a seed gives the same start on every device.
        encoder, decoder = (
            nn.init.xavier_uniform_(torch.empty(features, hidden, dtype=dtype), generator=generator) for _ in range(2)
        )
        self.encoder_weight = nn.Parameter(encoder.to(device))
        self.decoder_weight = nn.Parameter(decoder.to(device))
        self.encoder_bias = nn.Parameter(torch.zeros(hidden, dtype=dtype, device=device))
        self.decoder_bias = nn.Parameter(torch.zeros(features, dtype=dtype, device=device))
        self.register_buffer("observed_mean", torch.full((), float("nan"), dtype=dtype, device=device))

    @property
    def features(self) -> int:
        """Length ``D`` of an instance."""
        return self.encoder_weight.shape[0]

    @property
    def hidden(self) -> int:
        """Number ``H`` of hidden units."""
        return self.encoder_weight.shape[1]

    @property
    def V(self) -> Float[Tensor, "features hidden"]:  # noqa: N802
        """The encoder's weights, ``(D, H)``: the parameter ``encoder_weight``."""
        return self.encoder_weight

    @property
    def W(self) -> Float[Tensor, "hidden features"]:  # noqa: N802
        """The decoder's weights, ``(H, D)``: the transposed parameter ``decoder_weight``."""
        return self.decoder_weight.t()

    def fit_counts(self, counts: Integer[Tensor, " instances"]) -> AutoRec:
        """Set ``K`` to the mean observed count of the training instances that have any; returns ``self``.

        Raises
        ------
        InputError
            If no instance has an observed entry.
        """
        counts = counts[counts > 0]
        if counts.numel() == 0:
            raise InputError("counts: no training instance has an observed entry, so K cannot be fitted")
        self.observed_mean.fill_(float(counts.double().mean()))
        return self

    def input_scale(self, counts: Integer[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return ``(K / max(s + tau, 1)) ** power`` for observed counts ``s``; NaN while ``K`` is not fitted."""
        return sparsity_scale(counts.to(self.observed_mean.dtype), self.observed_mean, power=self.power, tau=self.tau)

    def encode(self, x: Float[Tensor, "batch _"], mask: Anything | None = None) -> Float[Tensor, "batch hidden"]:
        """Return the codes ``h`` of instances.

        Parameters
        ----------
        x
            Instances. Dense: an entry is missing where it is NaN, or where ``mask`` is 0 (its value then does not
            matter). A sparse CSR tensor: the stored entries are the observed ones.
        mask
            Shape of ``x``; 1 where observed.

        Raises
        ------
        InputError
            For another number of features than the model's, a mask that does not fit, values that are not finite, or
            ``K`` not fitted.
        """
        preactivation = masked_linear(
            x, mask, self.V.t(), self.encoder_bias, self.observed_mean, power=self.power, tau=self.tau
        )
        return self.activate_hidden(preactivation)

    def encode_rows(self, rows: SparseRows) -> Float[Tensor, "batch hidden"]:
        """Return the codes of sparse rows; a row without entries is coded by the biases alone."""
        summed = sum_embeddings(rows, rows.values, self.encoder_weight)
        return self.activate_hidden(summed * self.input_scale(rows.counts)[:, None] + self.encoder_bias)

    def decode(self, codes: Float[Tensor, "batch hidden"]) -> Float[Tensor, "batch features"]:
        """Return the predictions of all features."""
        return _ACTIVATIONS[self.output_activation][0](functional.linear(codes, self.decoder_weight, self.decoder_bias))

    def decode_cells(self, codes: Float[Tensor, "batch hidden"], cells: SparseRows) -> Float[Tensor, " cells"]:
        """Return the predictions at the stored places of ``cells`` only, in their order; without gradient."""
        with torch.no_grad():
            return self.activate_output(_cell_products(cells, codes, self.decoder_weight, self.decoder_bias))

    def forward(self, x: Float[Tensor, "batch _"], mask: Anything | None = None) -> Float[Tensor, "batch features"]:
        """Return the predictions of all features of each instance; arguments as in :meth:`encode`."""
        return self.decode(self.encode(x, mask))

    def activate_output(self, preactivation: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Apply ``g``."""
        return _ACTIVATIONS[self.output_activation][0](preactivation)

    def activate_hidden(self, preactivation: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Apply ``f``."""
        return _ACTIVATIONS[self.hidden_activation][0](preactivation)


@dataclass(frozen=True)
class _DenseInstances:
    """The dense path's copy of the whole matrix, zero where nothing is observed, and where that is."""

    values: Float[Tensor, "instances features"]
    wanted: Float[Tensor, "instances features"]
    observed: Bool[Tensor, "instances features"]

    @classmethod
    def of(cls, rows: SparseRows, features: int) -> _DenseInstances:
        place = (torch.repeat_interleave(rows.counts), rows.columns.long())
        values = rows.values.new_zeros(len(rows), features)
        values[place] = rows.values
        wanted = values
        if rows.targets is not None:
            wanted = torch.zeros_like(values)
            wanted[place] = rows.targets
        observed = torch.zeros_like(values, dtype=torch.bool)
        observed[place] = True
        return cls(values, wanted, observed)

    def select(self, rows: Tensor) -> _DenseInstances:
        values = self.values[rows]
        wanted = values if self.wanted is self.values else self.wanted[rows]
        return _DenseInstances(values, wanted, self.observed[rows])


def batch_gradients(
    model: AutoRec, rows: SparseRows, *, reg: Number, path: Literal["dense", "sparse"] = "sparse"
) -> BatchGradients:
    """Return the mini-batch objective and its gradient in closed form, by either path.

    Both paths compute the same numbers; only their cost differs. The gradient is that of the module's docstring, and
    cells that are not observed have no part in it.

    Parameters
    ----------
    model
        The autoencoder, with ``K`` fitted.
    rows
        The instances of the batch; their entries are input and target.
    reg
        Penalty ``reg`` on the squared norms of the two weight matrices, at least 0.
    path
        ``"sparse"`` never forms a ``batch x features`` array.

    Examples
    --------
    >>> rows = SparseRows.of([0, 1], [2], [4.0])
    >>> model = AutoRec(features=3, hidden=2).fit_counts(rows.counts)
    >>> batch_gradients(model, rows, reg=0.0).gradients["decoder_bias"].count_nonzero()
    tensor(1)
    """
    with torch.no_grad():
        if path == "sparse":
            squared_error, gradients = _sparse_gradients(model, rows, len(rows), None)
        else:
            dense = _DenseInstances.of(rows, model.features)
            squared_error, gradients = _dense_gradients(model, dense, rows.counts, len(rows), None)
        penalty = squared_error.new_zeros(())
        for name in ("encoder_weight", "decoder_weight"):
            weight = getattr(model, name)
            gradients[name] = gradients[name].add(weight, alpha=reg / len(rows))
            penalty += weight.square().sum()
        return BatchGradients((0.5 * squared_error + 0.5 * reg * penalty) / len(rows), squared_error, gradients)


def _sparse_gradients(
    model: AutoRec, rows: SparseRows, batch: int, keep: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the squared error and the gradient of ``squared error / (2 batch)`` with no dense intermediate."""
    _, hidden_slope = _ACTIVATIONS[model.hidden_activation]
    activate_output, output_slope = _ACTIVATIONS[model.output_activation]
    scale = model.input_scale(rows.counts)[:, None]
    codes = model.activate_hidden(
        sum_embeddings(rows, rows.values, model.encoder_weight).mul_(scale).add_(model.encoder_bias)
    )
    kept = codes if keep is None else codes * keep
    predicted = activate_output(_cell_products(rows, kept, model.decoder_weight, model.decoder_bias))
    error = predicted - rows.wanted
    squared_error = error.dot(error)
    if model.output_activation != "identity":
        error *= output_slope(predicted)
    error /= batch
    delta = sum_embeddings(rows, error, model.decoder_weight)
    if keep is not None:
        delta *= keep
    delta *= hidden_slope(codes)

    by_column, order = _transpose(rows, model.features)
    return squared_error, {
        "encoder_weight": sum_embeddings(by_column, rows.values[order], delta * scale),
        "decoder_weight": sum_embeddings(by_column, error[order], kept),
        "encoder_bias": delta.sum(0),
        "decoder_bias": torch.zeros_like(model.decoder_bias).index_add_(0, rows.columns, error),
    }


def _dense_gradients(
    model: AutoRec, instances: _DenseInstances, counts: Tensor, batch: int, keep: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the same as :func:`_sparse_gradients` by dense matrix products."""
    _, hidden_slope = _ACTIVATIONS[model.hidden_activation]
    activate_output, output_slope = _ACTIVATIONS[model.output_activation]
    scale = model.input_scale(counts)[:, None]
    codes = model.activate_hidden((instances.values @ model.encoder_weight).mul_(scale).add_(model.encoder_bias))
    kept = codes if keep is None else codes * keep
    predicted = activate_output(functional.linear(kept, model.decoder_weight, model.decoder_bias))
    error = (predicted - instances.wanted).mul_(instances.observed)
    squared_error = error.square().sum()
    if model.output_activation != "identity":
        error *= output_slope(predicted)
    error /= batch
    delta = error @ model.decoder_weight
    if keep is not None:
        delta *= keep
    delta *= hidden_slope(codes)
    return squared_error, {
        "encoder_weight": instances.values.t() @ (delta * scale),
        "decoder_weight": error.t() @ kept,
        "encoder_bias": delta.sum(0),
        "decoder_bias": error.sum(0),
    }


def sum_embeddings(rows: SparseRows, weights: Tensor, table: Tensor) -> Tensor:
    """Return for each row the sum of ``weight * table[column]`` over its entries: a sparse-dense product."""
    return functional.embedding_bag(
        rows.columns, table, rows.indptr, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


def _cell_products(rows: SparseRows, codes: Tensor, table: Tensor, bias: Tensor) -> Tensor:
    """Return ``codes[row] . table[column] + bias[column]`` for each entry of ``rows``."""
    if codes.device.type not in ("cpu", "cuda") or rows.columns.numel() == 0:
        return _gathered_products(rows, codes, table, bias)
    _announce_sparse_csr()
    pattern = torch.sparse_csr_tensor(rows.indptr, rows.columns, bias[rows.columns], (len(rows), len(table)))
    return torch.sparse.sampled_addmm(pattern, codes, table.t()).values()


def _gathered_products(
    rows: SparseRows, codes: Tensor, table: Tensor, bias: Tensor, *, cells_at_once: int = 1 << 16
) -> Tensor:
    """Return the same by gathering rows of both sides, on devices without CSR kernels."""
    products = bias[rows.columns]
    of_row = torch.repeat_interleave(rows.counts)
    for start in range(0, len(products), cells_at_once):
        chunk = slice(start, start + cells_at_once)
        products[chunk] += torch.linalg.vecdot(codes[of_row[chunk]], table[rows.columns[chunk]])
    return products


@cache
def _announce_sparse_csr() -> None:
    """Use up the notice, given once a process, that sparse CSR tensors are in beta state."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([]), (1, 1))


def _transpose(rows: SparseRows, features: int) -> tuple[SparseRows, Tensor]:
    """Return the transposed pattern (its ``columns`` are row numbers) and the order that sorts entries into it."""
    if rows.columns.device.type != "cpu":
        return _transpose_by_sorting(rows, features)
    # SciPy's counting sort takes a tenth of the time of a sort.
    import scipy.sparse

    numbered = torch.arange(rows.columns.numel(), dtype=rows.columns.dtype)
    turned = scipy.sparse.csr_array(
        (numbered.numpy(), rows.columns.numpy(), rows.indptr.numpy()), shape=(len(rows), features)
    ).tocsc()
    indptr, columns, order = (torch.from_numpy(part) for part in (turned.indptr, turned.indices, turned.data))
    return SparseRows(indptr, columns, rows.values), order


def _transpose_by_sorting(rows: SparseRows, features: int) -> tuple[SparseRows, Tensor]:
    """Return the same on any device."""
    order = torch.argsort(rows.columns, stable=True)
    columns = torch.repeat_interleave(rows.counts, output_size=len(order)).to(rows.columns.dtype)[order]
    counts = torch.bincount(rows.columns, minlength=features)
    indptr = functional.pad(counts.cumsum(0), (1, 0)).to(rows.columns.dtype)
    return SparseRows(indptr, columns, rows.values), order


def choose_path(rows: int, features: int, entries: int, *, itemsize: int, device: torch.device | str) -> Path:
    """Return which training path is faster, ``"dense"`` or ``"sparse"``, by density and size.

    Parameters
    ----------
    rows, features, entries
        Size of the training matrix and its number of observed entries.
    itemsize
        Bytes of a value.
    device
        Where training runs.

    Notes
    -----
    The dense path keeps the whole matrix and its mask, so it is taken only up to 1 GiB.
    """
    density = entries / max(rows * features, 1)
    fits = rows * features * (itemsize + 1) <= DENSE_BYTES_AT_MOST
    return "dense" if fits and density >= DENSE_FROM_DENSITY.get(torch.device(device).type, 0.5) else "sparse"


@dataclass(frozen=True)
class EpochReport:
    """What one epoch did.

    Attributes
    ----------
    epoch
        Epochs done so far, 1 after the first.
    train_rmse
        Root mean squared error over the training cells, as met during the epoch.
    validation_rmse
        The same over the validation cells after the epoch, predictions clipped to the scale; NaN without any.
    best_epoch
        The epoch with the lowest validation error so far (the latest epoch without validation cells).
    """

    epoch: int
    train_rmse: float
    validation_rmse: float
    best_epoch: int


class AutoRecTrainer:
    """Mini-batch training of an :class:`AutoRec` on sparse rows that stay on the device as a whole.

    Each step cuts its rows out of the matrix by index arithmetic, computes the gradient of the objective in closed
    form, and takes one step of Adam, the penalty being part of the objective (not decoupled weight decay). Under
    ``torch.distributed`` the instances of each batch are shared out among the ranks and gradients are summed, so that
    any number of processes takes the same steps.

    Parameters
    ----------
    model
        The autoencoder to train in place; ``K`` is fitted on ``instances`` if it is not known yet.
    instances
        Training rows, on the model's device, with targets if these are not the values; rows without an entry take no
        part.
    validation
        Held-out cells: a row for each of ``instances``, columns as there, whose ``wanted`` are the targets; none when
        ``None``.
    reg
        Penalty of the objective; see the module's docstring.
    lr
        Step size of Adam at the start.
    batch_size
        Instances in a step. Note that the objective adds the penalty once a batch.
    epochs
        Passes over the instances that the schedule is laid out for.
    schedule
        ``"constant"``, or ``"cosine"``: from ``lr`` down to 0 at the last epoch.
    patience
        Stop after this many epochs without a better validation error.
    dropout
        Share of hidden units dropped at random in training.
    path
        ``"sparse"``, ``"dense"``, or the faster of both by :func:`choose_path`.
    clip
        Lowest and highest prediction, for validation; two numbers, or two tensors of shape (cells,).
    seed
        Seed of the order of instances and of dropout.

    Raises
    ------
    InputError
        For an option out of its range, rows that do not fit the model, or no observed entry.

    Examples
    --------
    >>> rows = SparseRows.of([0, 2, 3], [0, 2, 1], [5.0, 3.0, 1.0])
    >>> trainer = AutoRecTrainer(AutoRec(features=3, hidden=2), rows, reg=0.1, lr=0.01, batch_size=2, epochs=3)
    >>> [report.epoch for report in trainer.run()]
    [1, 2, 3]
    """

    def __init__(
        self,
        model: AutoRec,
        instances: SparseRows,
        *,
        validation: SparseRows | None = None,
        reg: Number = 5.0,
        lr: Number = 1e-3,
        batch_size: int = 256,
        epochs: int = 50,
        schedule: str = "constant",
        patience: int | None = None,
        dropout: Number = 0.0,
        path: Path = "auto",
        clip: tuple[Number | Tensor, Number | Tensor] = (-math.inf, math.inf),
        seed: int = 0,
    ) -> None:
        _check_options(reg, lr, batch_size, epochs, schedule, patience, dropout, path)
        self.model = model
        self.instances = instances
        self.validation = validation if validation is not None and validation.columns.numel() else None
        self.reg, self.lr, self.batch_size, self.epochs = reg, lr, batch_size, epochs
        self.schedule, self.patience, self.dropout = schedule, patience, dropout
        self._low, self._high = (torch.as_tensor(bound).to(instances.values) for bound in clip)
        if not bool(torch.isfinite(model.observed_mean)):
            model.fit_counts(instances.counts)
        if instances.columns.numel() and int(instances.columns.max()) >= model.features:
            raise InputError(
                f"instances: column {int(instances.columns.max())} does not exist; the model has {model.features}"
            )
        self._rated = instances.counts.nonzero()[:, 0]
        self._counts = instances.counts
        self.path = (
            path
            if path != "auto"
            else choose_path(
                len(instances),
                model.features,
                instances.columns.numel(),
                itemsize=instances.values.element_size(),
                device=instances.values.device,
            )
        )
        self._dense = _DenseInstances.of(instances, model.features) if self.path == "dense" else None
        self._adam = _Adam(dict(model.named_parameters()))
        self._generator = torch.Generator().manual_seed(seed)
        self._world = _world()
        self.epoch = 0
        self.best_epoch = 0
        self.best_rmse = math.inf
        self._best: dict[str, Tensor] = {}

    @property
    def finished(self) -> bool:
        """Whether all epochs are done or patience has run out."""
        out_of_patience = self.patience is not None and self.epoch - self.best_epoch >= self.patience
        return self.epoch >= self.epochs or (self.validation is not None and out_of_patience)

    def run(
        self, on_epoch: Callable[[EpochReport], None] | None = None, *, stop_after: int | None = None
    ) -> list[EpochReport]:
        """Train until :attr:`finished`, then put back the parameters of the best epoch.

        Parameters
        ----------
        on_epoch
            Called after each epoch; it may call :meth:`state`, and may stop training by raising.
        stop_after
            Do no more than so many of the epochs that the schedule is laid out for.
        """
        reports: list[EpochReport] = []
        while not self.finished and (stop_after is None or self.epoch < stop_after):
            reports.append(self.run_epoch())
            if on_epoch is not None:
                on_epoch(reports[-1])
        self.restore_best()
        return reports

    def run_epoch(self) -> EpochReport:
        """Make one pass over the training instances.

        Raises
        ------
        InputError
            If the error stops being finite: the step size is too large.
        """
        rank, world = self._world
        device = self.instances.values.device
        order = self._rated[torch.randperm(len(self._rated), generator=self._generator).to(device)]
        lr = self.lr
        if self.schedule == "cosine":
            lr *= 0.5 * (1 + math.cos(math.pi * self.epoch / self.epochs))
        squared_error = self.instances.values.new_zeros((), dtype=torch.float64)
        batches = order.split(self.batch_size)
        # One wait for the device an epoch instead of one a batch.
        sizes = [
            int(size) for size in torch.stack([self._counts[rows[rank::world]].sum() for rows in batches]).tolist()
        ]
        for rows, entries in zip(batches, sizes, strict=True):
            squared_error += self._step(rows[rank::world], int(entries), len(rows), lr)
        if world > 1:
            torch.distributed.all_reduce(squared_error)
        self.epoch += 1
        train_rmse = math.sqrt(float(squared_error) / self.instances.columns.numel())
        if not math.isfinite(train_rmse):
            raise InputError(f"lr: training diverged in epoch {self.epoch} at lr={self.lr:g}; lower it")
        validation_rmse = self._validate()
        if self.validation is None:
            self.best_epoch = self.epoch
        elif validation_rmse < self.best_rmse:
            self.best_epoch, self.best_rmse = self.epoch, validation_rmse
            self._best = {name: value.detach().clone() for name, value in self.model.named_parameters()}
        return EpochReport(self.epoch, train_rmse, validation_rmse, self.best_epoch)

    def restore_best(self) -> None:
        """Put back the parameters of the epoch with the lowest validation error."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name in self._best:
                    parameter.copy_(self._best[name])

    @torch.no_grad()
    def _step(self, rows: Tensor, entries: int, batch: int, lr: float) -> Tensor:
        model = self.model
        keep = None
        if self.dropout > 0:
            # Drawn for the batch of all ranks, so that their generators stay in step.
            kept = torch.empty(batch, model.hidden).bernoulli_(1 - self.dropout, generator=self._generator)
            rank, world = self._world
            keep = kept[rank::world].to(model.encoder_weight).div_(1 - self.dropout)
        if self._dense is None:
            squared_error, gradients = _sparse_gradients(model, self.instances.select(rows, entries), batch, keep)
        else:
            squared_error, gradients = _dense_gradients(
                model, self._dense.select(rows), self._counts[rows], batch, keep
            )
        if self._world[1] > 1:
            for gradient in gradients.values():
                torch.distributed.all_reduce(gradient)
        self._adam.step(gradients, lr=lr, decay=self.reg / batch)
        return squared_error

    @torch.no_grad()
    def _validate(self) -> float:
        if self.validation is None:
            return math.nan
        predicted = self.model.decode_cells(self.model.encode_rows(self.instances), self.validation).clamp(
            self._low, self._high
        )
        return float((predicted - self.validation.wanted).double().square().mean().sqrt())

    def state(self) -> dict[str, Any]:
        """Return all that training needs to go on from here, as nested dicts of tensors and numbers.

        Training on from it gives, on a CPU, bit for bit what training without a break gives.
        """
        return {
            "epoch": self.epoch,
            "best_epoch": self.best_epoch,
            "best_rmse": self.best_rmse,
            "generator": self._generator.get_state(),
            "model": _copies(self.model.state_dict()),
            "best": _copies(self._best),
            "adam": {kind: _copies(moments) for kind, moments in self._adam.moments.items()},
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` returned, in a trainer made with the same arguments.

        Raises
        ------
        InputError
            If the state is of another model or incomplete.
        """
        try:
            self.model.load_state_dict(state["model"])
            device = self.instances.values.device
            self._best = _copies(state["best"], device)
            self._adam.load({kind: _copies(moments, device) for kind, moments in state["adam"].items()})
            self._generator.set_state(state["generator"])
            self.epoch, self.best_epoch = int(state["epoch"]), int(state["best_epoch"])
            self.best_rmse = float(state["best_rmse"])
        except (KeyError, RuntimeError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"state: it does not fit this training run ({one_line(error)}); start afresh") from error


def _copies(tensors: Mapping[str, Tensor], device: torch.device | None = None) -> dict[str, Tensor]:
    return {name: value.detach().to(device or value.device, copy=True) for name, value in tensors.items()}


class _Adam:
    """Adam with its usual constants, by torch's functional form.

    ``torch.optim.Adam`` does the same, but making one imports the compiler, which takes longer than a whole fit.
    """

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self.moments = {
            "mean": {name: torch.zeros_like(value, requires_grad=False) for name, value in parameters.items()},
            "square": {name: torch.zeros_like(value, requires_grad=False) for name, value in parameters.items()},
            "step": {name: torch.zeros((), device=value.device) for name, value in parameters.items()},
        }

    def load(self, moments: dict[str, dict[str, Tensor]]) -> None:
        for kind, own in self.moments.items():
            if moments[kind].keys() != own.keys() or any(moments[kind][name].shape != own[name].shape for name in own):
                raise ValueError(f"moments {kind!r} are of other parameters")
        self.moments = moments

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], *, lr: float, decay: float) -> None:
        """Take a step; ``decay`` times a weight is added to its gradient, which is the gradient of the penalty."""
        for kind in ("_weight", "_bias"):
            names = [name for name in self.parameters if name.endswith(kind)]
            values = [self.parameters[name].detach() for name in names]
            adam(
                values,
                [gradients[name] for name in names],
                [self.moments["mean"][name] for name in names],
                [self.moments["square"][name] for name in names],
                [],
                [self.moments["step"][name] for name in names],
                fused=values[0].device.type in ("cpu", "cuda"),
                amsgrad=False,
                beta1=0.9,
                beta2=0.999,
                lr=lr,
                weight_decay=decay if kind == "_weight" else 0.0,
                eps=1e-8,
                maximize=False,
            )


def _world() -> tuple[int, int]:
    """Return this process's rank and the number of processes that train together."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _check_options(
    reg: Number,
    lr: Number,
    batch_size: int,
    epochs: int,
    schedule: str,
    patience: int | None,
    dropout: Number,
    path: str,
) -> None:
    if not (math.isfinite(reg) and reg >= 0):
        raise InputError(f"reg: {reg} must be a number of at least 0")
    if not (math.isfinite(lr) and lr > 0):
        raise InputError(f"lr: {lr} must be a positive number")
    if not 0 <= dropout < 1:
        raise InputError(f"dropout: {dropout} must be at least 0 and below 1")
    for name, value in (("batch_size", batch_size), ("epochs", epochs), ("patience", patience)):
        if value is not None and value < 1:
            raise InputError(f"{name}: {value} must be at least 1")
    if schedule not in ("constant", "cosine"):
        raise InputError(f"schedule: {schedule!r} is none of 'constant', 'cosine'")
    if path not in ("auto", "dense", "sparse"):
        raise InputError(f"path: {path!r} is none of 'auto', 'dense', 'sparse'")
