"""A recommender of explicit ratings: AutoRec with Sparsity Normalization, and new users without retraining.

Source: Yi et al., ICLR 2020, arXiv:1906.00150, applied to AutoRec (Sedhain et al., WWW 2015); the objective is in
:mod:`sparsity_norm.autorec`. Fold-in, offsets outside the autoencoder and dropout are additions of this package.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, SupportsFloat, cast

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor

from shared_core.device import resolve_device
from shared_core.errors import DAMAGE, InputError
from shared_core.objects import one_line
from sparsity_norm.autorec import AutoRec, AutoRecTrainer, EpochReport, SparseRows
from sparsity_norm.autorec import Path as TrainingPath
from sparsity_norm.factorization import rating_offsets
from sparsity_norm.ratings import Number, RatingMatrix, find_codes, split_ratings, unknown_id
from sparsity_norm.serving import Cold, Recommender, Unknown, check_choice, rank_rows

if TYPE_CHECKING:
    from sparsity_norm.ratings import Compressed

__all__ = ["AutoRecRecommender", "FitProgress", "FoldIn", "ridge_column"]

_FORMAT = "sparsity-norm AutoRecRecommender"
_FORMAT_VERSION = 1
_CELL_VALUES_AT_ONCE = 1 << 23


@dataclass(frozen=True)
class FitProgress:
    """Where ``fit`` stands after an epoch.

    Attributes
    ----------
    phase
        ``"search"`` while the number of epochs is being found on validation ratings, ``"final"`` in the training that
        is kept.
    epochs
        Epochs that this phase takes at most.
    report
        What the epoch did.
    state
        Call it for all that ``fit(..., resume=)`` needs to go on from here: nested dicts of tensors, numbers, strings.
    snapshot
        Call it for a fitted recommender of its own as training stands now, fitted on what this phase trains on.
    """

    phase: Literal["search", "final"]
    epochs: int
    report: EpochReport
    state: Callable[[], dict[str, Any]]
    snapshot: Callable[[], AutoRecRecommender]


def ridge_column(
    codes: Float[np.ndarray, "rated hidden"],
    targets: Float[np.ndarray, " rated"],
    *,
    prior_weight: Float[np.ndarray, " hidden"],
    prior_bias: Number,
    weight_reg: Number,
    bias_reg: Number = 0.0,
) -> tuple[Float[np.ndarray, " hidden"], float]:
    """Return the decoder column ``(w, b)`` of a new user or item in closed form.

    Minimises ``1/2 sum (codes w + b - targets)^2 + weight_reg/2 |w - prior_weight|^2 + bias_reg/2 (b - prior_bias)^2``.

    Parameters
    ----------
    codes
        Codes of the instances that the new column has ratings of.
    targets
        Those ratings (less whatever offsets are added outside).
    prior_weight, prior_bias
        What the column is without ratings.
    weight_reg, bias_reg
        How many unit-variance observations the prior is worth; ``weight_reg`` positive, ``bias_reg`` at least 0.

    Examples
    --------
    >>> codes = np.array([[1.0], [-1.0]])
    >>> ridge_column(codes, np.array([3.0, 1.0]), prior_weight=np.zeros(1), prior_bias=0.0, weight_reg=2.0)
    (array([0.5]), 2.0)
    """
    if not (weight_reg > 0 and bias_reg >= 0):
        raise InputError(f"weight_reg, bias_reg: ({weight_reg}, {bias_reg}) must be positive and at least 0")
    design = np.column_stack([codes.astype(np.float64), np.ones(len(codes))])
    prior = np.append(prior_weight.astype(np.float64), prior_bias)
    penalty = np.append(np.full(codes.shape[1], weight_reg), bias_reg)
    change = np.linalg.solve(design.T @ design + np.diag(penalty), design.T @ (targets - design @ prior))
    solution = prior + change
    return solution[:-1], float(solution[-1])


@dataclass(frozen=True)
class FoldIn:
    """A user (or an item) that was not there in training, with predictions for everything on the other side.

    Made by :meth:`AutoRecRecommender.fold_in` and :meth:`AutoRecRecommender.fold_in_item`; the model is left as it is.

    Attributes
    ----------
    ids
        Ids of the other side: items for a new user, users for a new item.
    scores
        Predicted rating of each, clipped to the scale; shape (others,).
    given
        Codes of those that ratings were given for, of shape (given,).
    others
        What the other side is.
    unknown_score
        Prediction for an id that was not there in training; None to refuse such an id.
    """

    ids: tuple[str, ...]
    scores: Float[np.ndarray, " others"]
    given: Integer[np.ndarray, " given"]
    others: Literal["item", "user"]
    unknown_score: float | None

    def predict(self, ids: Any) -> Float[np.ndarray, " ids"]:
        """Return the predicted ratings of one id or several.

        Raises
        ------
        UnknownKeyError
            For an id that was not there in training, unless the recommender has ``unknown="mean"``.
        """
        codes = find_codes(ids, self._index)
        if self.unknown_score is None and (codes < 0).any():
            asked = np.atleast_1d(np.asarray(ids, dtype=object))[int((codes < 0).argmax())]
            raise unknown_id(self.others, asked, self.ids)
        return np.append(self.scores, self.unknown_score or 0.0)[codes]

    @cached_property
    def _index(self) -> dict[str, int]:
        return {name: code for code, name in enumerate(self.ids)}

    def recommend(self, k: int = 10, *, exclude_seen: bool = True) -> list[tuple[str, float]]:
        """Return the ``k`` ids with the highest predictions, best first, by default without those given."""
        if k < 1:
            raise InputError(f"k: {k} must be at least 1")
        table = self.scores[None].copy()
        if exclude_seen:
            table[0, self.given] = -np.inf
        codes, values = rank_rows(table, min(k, table.shape[1]))
        return [
            (self.ids[code], float(value))
            for code, value in zip(codes[0].tolist(), values[0].tolist(), strict=True)
            if value > -np.inf
        ]


class AutoRecRecommender(Recommender):
    """AutoRec with Sparsity Normalization as an estimator: fit on ratings, predict, recommend, fold in, save.

    Parameters
    ----------
    mode
        ``"item"``: an instance is an item, the vector of its ratings by all users (the more accurate on MovieLens).
        ``"user"``: an instance is a user.
    hidden
        Hidden units.
    reg
        Penalty of the mini-batch objective, for ratings on a scale 4 wide (1 to 5); ratings on another scale are
        stretched to that inside. The best value differs with ``power``, so choose it for each.
    power, tau
        The input's scale is ``(K / (s + tau)) ** power``. ``power`` 1 and ``tau`` 0 are the paper's; ``power`` 0 is
        AutoRec on zero-imputed input; a ``tau`` of some tens helps new instances with very few ratings.
    lr, batch_size, epochs, schedule, dropout
        As in :class:`sparsity_norm.autorec.AutoRecTrainer`; ``epochs`` is the most there may be.
    validation
        Share of the ratings, in [0, 1), held out to find the number of epochs; 0 trains for ``epochs``.
    patience
        Epochs without a better validation error before the search stops; ``None`` never stops it early.
    refit
        Train once more on all ratings for the number of epochs found, instead of keeping the search's model.
    biases
        Put offsets ``mean + b_u + b_i`` outside: the autoencoder reads the ratings and predicts what the offsets leave.
    hidden_activation, output_activation
        ``f`` and ``g``.
    init_output_bias
        Start the output bias at the mean of the targets, or at 0. From the mean, fewer epochs are needed; from 0, the
        result was better on MovieLens 100k in both modes, and the effect of ``power`` is larger.
    cold
        Prediction where the user or the item has no training rating: ``"mean"`` (training mean), ``"default"``
        (middle of the scale) or ``"bias"`` (mean and the offset of the one that is known).
    unknown
        What to do with an id that was not there in training: ``"error"`` or ``"mean"`` (predict as for a cold cell).
    fold_in_reg
        How many ratings the prior of a folded-in column is worth; estimated from the fitted model when ``None``.
    path, device
        How and where to compute: ``"auto"``, ``"dense"``, ``"sparse"``; ``"auto"``, ``"cpu"``, ``"cuda"``, ``"mps"``.
    random_state
        Seed of everything random.

    Attributes
    ----------
    model_
        The fitted :class:`sparsity_norm.autorec.AutoRec`.
    codes_
        Codes of all instances.
    history_
        Reports of the epochs, of the search if there was one.
    n_epochs_
        Epochs that the model was trained for.

    Raises
    ------
    InputError
        From ``fit``, for an option out of its range.

    Notes
    -----
    The defaults are the paper's model, trained until it stops improving on validation ratings. The most accurate
    settings found on MovieLens 100k (by validation error) add what is not in the paper: ``biases=True, dropout=0.3,
    lr=4e-3, reg=10, power=0.5, schedule="cosine", epochs=60, validation=0``. With the offsets outside, scaling the
    input makes next to no difference there.

    Examples
    --------
    >>> users, items = ["ann", "ann", "bob", "bob", "cyd"], ["x", "y", "x", "z", "y"]
    >>> rec = AutoRecRecommender(hidden=4, epochs=20, validation=0).fit((users, items, [5, 3, 4, 1, 2]))
    >>> rec.recommend("cyd", k=1)[0][0]
    'x'
    >>> rec.fold_in({"x": 5}).predict(["y", "z"]).shape
    (2,)
    """

    model_: AutoRec
    codes_: Float[Tensor, "instances hidden"]
    history_: list[EpochReport]
    n_epochs_: int

    def __init__(
        self,
        mode: Literal["item", "user"] = "item",
        *,
        hidden: int = 200,
        reg: Number = 5.0,
        power: Number = 1.0,
        tau: Number = 0.0,
        lr: Number = 3e-3,
        batch_size: int = 256,
        epochs: int = 200,
        schedule: Literal["constant", "cosine"] = "constant",
        dropout: Number = 0.0,
        validation: Number = 0.05,
        patience: int | None = 10,
        refit: bool = True,
        biases: bool = False,
        hidden_activation: str = "sigmoid",
        output_activation: str = "identity",
        init_output_bias: Literal["mean", "zero"] = "zero",
        cold: Cold = "mean",
        unknown: Unknown = "error",
        fold_in_reg: Number | None = None,
        path: TrainingPath = "auto",
        device: str = "auto",
        random_state: int = 0,
    ) -> None:
        self.mode: Literal["item", "user"] = mode
        self.hidden = hidden
        self.reg = reg
        self.power = power
        self.tau = tau
        self.lr = lr
        self.batch_size = batch_size
        self.epochs = epochs
        self.schedule: Literal["constant", "cosine"] = schedule
        self.dropout = dropout
        self.validation = validation
        self.patience = patience
        self.refit = refit
        self.biases = biases
        self.hidden_activation = hidden_activation
        self.output_activation = output_activation
        self.init_output_bias: Literal["mean", "zero"] = init_output_bias
        self.cold: Cold = cold
        self.unknown: Unknown = unknown
        self.fold_in_reg = fold_in_reg
        self.path: TrainingPath = path
        self.device = device
        self.random_state = random_state

    def fit(
        self,
        ratings: Any,
        *,
        on_epoch: Callable[[FitProgress], None] | None = None,
        resume: Mapping[str, Any] | None = None,
    ) -> AutoRecRecommender:
        """Fit on ratings.

        Parameters
        ----------
        ratings
            Anything that :meth:`sparsity_norm.ratings.RatingMatrix.of` takes.
        on_epoch
            Called after each epoch. It may keep ``progress.state()`` and may stop the fit by raising.
        resume
            A kept state: training goes on from there, on a CPU to bit for bit the same model.

        Raises
        ------
        InputError
            For ratings that cannot be used, an option out of its range, or a state of another fit.
        """
        self._check_options()
        ratings = RatingMatrix.of(ratings)
        signature = self._signature(ratings)
        if resume is not None and (
            resume.get("signature") != signature or not {"phase", "n_epochs", "history", "trainer"} <= resume.keys()
        ):
            raise InputError("resume: the state is of a fit with other options or other ratings; start afresh")
        history = [] if resume is None else [EpochReport(**report) for report in resume["history"]]
        n_epochs = self.epochs if resume is None else int(resume["n_epochs"])
        # Too few ratings to hold any out: train for all epochs.
        validated = round(len(ratings) * self.validation) > 0
        common = _Fit(signature, history, on_epoch)
        if validated and (resume is None or resume["phase"] == "search"):
            train, held_out = split_ratings(ratings, test_fraction=self.validation, seed=self.random_state)
            trainer, offsets = self._trainer(train, held_out, n_epochs)
            self._run(common, trainer, train, offsets, "search", n_epochs, resume, record=True)
            n_epochs, resume = trainer.best_epoch, None
            if not self.refit:
                return self._serve(trainer.model, ratings, offsets, history, n_epochs)
        trainer, offsets = self._trainer(ratings, None, n_epochs)
        self._run(common, trainer, ratings, offsets, "final", n_epochs, resume, record=not validated)
        return self._serve(trainer.model, ratings, offsets, history, n_epochs)

    def _run(
        self,
        common: _Fit,
        trainer: AutoRecTrainer,
        train: RatingMatrix,
        offsets: _Offsets,
        phase: Literal["search", "final"],
        n_epochs: int,
        resume: Mapping[str, Any] | None,
        *,
        record: bool,
    ) -> None:
        """Train through one phase, from the start or from a state, and tell of the progress."""
        if resume is not None:
            trainer.load_state(resume["trainer"])

        def state() -> dict[str, Any]:
            return {
                "signature": common.signature,
                "phase": phase,
                "n_epochs": n_epochs,
                "history": [dict(vars(report)) for report in common.history],
                "trainer": trainer.state(),
            }

        def snapshot() -> AutoRecRecommender:
            twin = AutoRecRecommender(**self.get_params())
            return twin._serve(copy.deepcopy(trainer.model), train, offsets, list(common.history), trainer.epoch)

        def advance(report: EpochReport) -> None:
            if record:
                common.history.append(report)
            if common.on_epoch is not None:
                common.on_epoch(FitProgress(phase, n_epochs, report, state, snapshot))

        trainer.run(advance, stop_after=n_epochs)

    def _trainer(
        self, train: RatingMatrix, held_out: RatingMatrix | None, n_epochs: int
    ) -> tuple[AutoRecTrainer, _Offsets]:
        device = resolve_device(self.device)
        offsets = _Offsets.of(train)
        instances = self._rows(train, offsets, device)
        model = AutoRec(
            features=train.shape[0] if self.mode == "item" else train.shape[1],
            hidden=self.hidden,
            power=self.power,
            tau=self.tau,
            hidden_activation=self.hidden_activation,
            output_activation=self.output_activation,
            seed=self.random_state,
            device=device,
        )
        if self.init_output_bias == "mean":
            with torch.no_grad():
                model.decoder_bias.fill_(float(instances.wanted.double().mean()))
        validation = None if held_out is None else self._rows(held_out, offsets, device)
        low, high = (bound / _unit(train) for bound in train.scale)
        if validation is not None and validation.targets is not None:
            outside = validation.values - validation.targets
            low, high = low - outside, high - outside
        trainer = AutoRecTrainer(
            model,
            instances,
            validation=validation,
            reg=self.reg,
            lr=self.lr,
            batch_size=self.batch_size,
            epochs=n_epochs,
            schedule=self.schedule,
            patience=self.patience,
            dropout=self.dropout,
            path=self.path,
            clip=(low, high),
            seed=self.random_state,
        )
        return trainer, offsets

    def _side(self, ratings: RatingMatrix) -> Compressed:
        return ratings.by_item if self.mode == "item" else ratings.by_user

    def _rows(self, ratings: RatingMatrix, offsets: _Offsets, device: torch.device) -> SparseRows:
        """Return what the network reads and should predict, in its own units."""
        unit = _unit(ratings)
        indptr, indices, values = self._side(ratings)
        targets = None
        if self.biases:
            left = replace(ratings, values=ratings.values - offsets.cells(ratings.users, ratings.items))
            targets = self._side(left).values / unit
        return SparseRows.of(indptr, indices, values / unit, targets, device=device)

    def _serve(
        self, model: AutoRec, ratings: RatingMatrix, offsets: _Offsets, history: list[EpochReport], n_epochs: int
    ) -> AutoRecRecommender:
        self.model_ = model.eval().requires_grad_(False)
        self.ratings_ = ratings
        self.history_ = history
        self.n_epochs_ = n_epochs
        self._offsets = offsets
        instances = self._rows(ratings, offsets, model.decoder_bias.device)
        self.codes_ = model.encode_rows(instances)
        self._prior = self._column_prior(instances)
        return self

    def _column_prior(self, instances: SparseRows) -> _ColumnPrior:
        """Estimate how decoder columns are distributed, and how much a rating says about one."""
        rated = torch.bincount(instances.columns, minlength=self.model_.features) > 0
        weights = self.model_.decoder_weight[rated].double()
        biases = self.model_.decoder_bias[rated].double()
        error = self.model_.decode_cells(self.codes_, instances) - instances.wanted
        noise = float(error.double().square().mean())
        weight_variance, bias_variance = (
            float(x.var(dim=0, correction=0).mean().clamp(min=1e-12)) for x in (weights, biases)
        )
        weight_reg, bias_reg = noise / weight_variance, noise / bias_variance
        if self.fold_in_reg is not None:
            weight_reg, bias_reg = self.fold_in_reg, self.fold_in_reg
        return _ColumnPrior(
            weights.mean(0).cpu().numpy(), float(biases.mean()), max(weight_reg, 1e-9), max(bias_reg, 1e-9)
        )

    def score_cells(
        self, users: Integer[np.ndarray, " cells"], items: Integer[np.ndarray, " cells"]
    ) -> Float[np.ndarray, " cells"]:
        """Return predictions of cells given by codes, before clipping."""
        instances, features = (items, users) if self.mode == "item" else (users, items)
        model = self.model_
        scores = np.empty(len(users))
        step = max(_CELL_VALUES_AT_ONCE // model.hidden, 1)
        for start in range(0, len(users), step):
            chunk = slice(start, start + step)
            of_instance, of_feature = (
                torch.from_numpy(codes[chunk].astype(np.int64)) for codes in (instances, features)
            )
            of_instance, of_feature = of_instance.to(self.codes_.device), of_feature.to(self.codes_.device)
            product = torch.linalg.vecdot(self.codes_[of_instance], model.decoder_weight[of_feature])
            scores[chunk] = model.activate_output(product + model.decoder_bias[of_feature]).cpu().numpy()
        scores *= _unit(self.ratings_)
        return scores + self._offsets.cells(users, items) if self.biases else scores

    def score_users(self, users: Integer[np.ndarray, " users"]) -> Float[np.ndarray, "users items"]:
        """Return predictions of all items for users given by codes, before clipping."""
        model = self.model_
        chosen = torch.from_numpy(users.astype(np.int64)).to(self.codes_.device)
        if self.mode == "item":
            bias = model.decoder_bias[chosen][:, None]
            scores = model.activate_output(model.decoder_weight[chosen] @ self.codes_.t() + bias)
        else:
            scores = model.decode(self.codes_[chosen])
        table = scores.double().cpu().numpy() * _unit(self.ratings_)
        if self.biases:
            table += self._offsets.mean + self._offsets.users[users, None] + self._offsets.items
        return table

    def offsets(self) -> tuple[float, Float[np.ndarray, " users"], Float[np.ndarray, " items"]]:
        """Return mean, user offsets and item offsets, fitted by :func:`sparsity_norm.factorization.rating_offsets`."""
        return self._offsets.mean, self._offsets.users, self._offsets.items

    def fold_in(self, ratings: Mapping[Any, SupportsFloat]) -> FoldIn:
        """Take in a user who was not there in training, from ratings by item id; the model stays as it is.

        In user mode this is a forward pass; in item mode the new user's decoder column is solved for in closed form by
        :func:`ridge_column`, the mean column being its prior.

        Raises
        ------
        InputError
            For no ratings, or a rating that is not finite or off the scale.
        UnknownKeyError
            For an item that was not there in training.
        """
        return self._fold_in(ratings, "user")

    def fold_in_item(self, ratings: Mapping[Any, SupportsFloat]) -> FoldIn:
        """Take in an item that was not there in training, from ratings by user id; as :meth:`fold_in`."""
        return self._fold_in(ratings, "item")

    def _fold_in(self, given: Mapping[Any, SupportsFloat], kind: Literal["user", "item"]) -> FoldIn:
        ratings = self._fitted()
        if not given:
            raise InputError(f"ratings: give at least one rating of the new {kind}")
        other = "item" if kind == "user" else "user"
        find = ratings.item_code if kind == "user" else ratings.user_code
        codes = np.array([find(name) for name in given], dtype=np.int64)
        low, high = ratings.scale
        for name, value in given.items():
            if not low <= float(value) <= high:
                raise InputError(f"ratings[{name!r}]: {value} is not on the scale {low:g}..{high:g}; correct it")
        if len(np.unique(codes)) < len(codes):
            raise InputError(f"ratings: the same {other} is given twice; give one rating each")
        order = np.argsort(codes)
        codes, values = codes[order], np.array([float(value) for value in given.values()])[order]

        every = ratings.item_ids if kind == "user" else ratings.user_ids
        outside = self._new_offsets(codes, values, kind) if self.biases else np.zeros(len(every))
        unit = _unit(ratings)
        # In user mode a new user, and in item mode a new item, is a new instance; else it is a new output column.
        if kind == self.mode:
            scores = self._new_instance(codes, values / unit)
        else:
            scores = self._new_column(codes, (values - outside[codes]) / unit)
        scores = scores * unit + outside
        counts = ratings.item_counts if kind == "user" else ratings.user_counts
        cold = np.flatnonzero(counts == 0)
        new = np.full(len(cold), -1)
        scores[cold] = self.cold_scores(*((new, cold) if kind == "user" else (cold, new)))
        unknown_score = None
        if self.unknown == "mean":
            nobody = np.array([-1])
            unknown_score = min(max(float(self.cold_scores(nobody, nobody)[0]), low), high)
        return FoldIn(every, np.clip(scores, low, high), codes, other, unknown_score)

    def _new_offsets(self, codes: np.ndarray, values: np.ndarray, kind: Literal["user", "item"]) -> np.ndarray:
        """Return mean plus offsets of the other side, plus the offset that the new ratings give."""
        known = self._offsets.mean + (self._offsets.items if kind == "user" else self._offsets.users)
        doubt = _REG_USER if kind == "user" else _REG_ITEM
        return known + float((values - known[codes]).sum()) / (len(codes) + doubt)

    def _new_instance(self, codes: np.ndarray, values: np.ndarray) -> np.ndarray:
        weight = self.model_.encoder_weight
        row = SparseRows.of([0, len(codes)], codes, values, device=weight.device, dtype=weight.dtype)
        return self.model_.decode(self.model_.encode_rows(row))[0].double().cpu().numpy()

    def _new_column(self, codes: np.ndarray, targets: np.ndarray) -> np.ndarray:
        if self.output_activation != "identity":
            raise InputError("output_activation: a new column is solved for in closed form with 'identity' only")
        every_code = self.codes_.double().cpu().numpy()
        prior = self._prior
        weight, bias = ridge_column(
            every_code[codes],
            targets,
            prior_weight=prior.weight,
            prior_bias=prior.bias,
            weight_reg=prior.weight_reg,
            bias_reg=prior.bias_reg,
        )
        return every_code @ weight + bias

    def save(self, folder: str | Path) -> None:
        """Write the fitted recommender to a folder: ``model.safetensors``, ``model.json`` and ``ids.json``.

        Nothing is pickled. Each file replaces its predecessor in one step.

        Raises
        ------
        InputError
            If the folder cannot be written.
        """
        from safetensors.torch import save_file

        from shared_core.runs import atomic_path, write_json

        ratings = self._fitted()
        folder = Path(folder)
        tensors = {f"model.{name}": value.cpu().contiguous() for name, value in self.model_.state_dict().items()}
        tensors |= {
            "ratings.users": torch.from_numpy(ratings.users),
            "ratings.items": torch.from_numpy(ratings.items),
            "ratings.values": torch.from_numpy(ratings.values),
            "offsets.users": torch.from_numpy(self._offsets.users),
            "offsets.items": torch.from_numpy(self._offsets.items),
        }
        with atomic_path(folder / "model.safetensors") as temporary:
            save_file(tensors, temporary)
        write_json(folder / "ids.json", {"users": ratings.user_ids, "items": ratings.item_ids})
        config = {
            "format": _FORMAT,
            "format_version": _FORMAT_VERSION,
            "params": self.get_params(),
            "scale": ratings.scale,
            "mean": self._offsets.mean,
            "n_epochs": self.n_epochs_,
            "history": [
                {name: value for name, value in vars(report).items() if math.isfinite(value)}
                for report in self.history_
            ],
        }
        write_json(folder / "model.json", config)

    @classmethod
    def load(cls, folder: str | Path, *, device: str | None = None) -> AutoRecRecommender:
        """Read a recommender that :meth:`save` wrote; it predicts what the saved one predicted.

        Parameters
        ----------
        folder
            The folder.
        device
            Where to compute, instead of where it was told to when it was saved.

        Raises
        ------
        InputError
            If the folder or a file in it is missing, truncated, damaged or of another kind.
        """
        folder = Path(folder)
        config = _read_json(folder / "model.json")
        if config.get("format") != _FORMAT:
            raise InputError(f"{folder / 'model.json'}: it is not the configuration of a saved recommender")
        if config.get("format_version") != _FORMAT_VERSION:
            raise InputError(
                f"{folder / 'model.json'}: format version {config.get('format_version')} is not {_FORMAT_VERSION}; "
                "load it with the release that wrote it"
            )
        ids = _read_json(folder / "ids.json")
        tensors = _read_tensors(folder / "model.safetensors")
        try:
            recommender = cls(**config["params"])
            if device is not None:
                recommender.device = device
            recommender._check_options()
            low, high = config["scale"]
            ratings = RatingMatrix.from_codes(
                tensors["ratings.users"].numpy(),
                tensors["ratings.items"].numpy(),
                tensors["ratings.values"].numpy(),
                user_ids=ids["users"],
                item_ids=ids["items"],
                scale=(low, high),
            )
            offsets = _Offsets(
                float(config["mean"]), tensors["offsets.users"].numpy(), tensors["offsets.items"].numpy()
            )
            if (len(offsets.users), len(offsets.items)) != ratings.shape:
                raise InputError(f"offsets of shape {len(offsets.users), len(offsets.items)}, not {ratings.shape}")
            model = AutoRec(
                features=ratings.shape[0] if recommender.mode == "item" else ratings.shape[1],
                hidden=recommender.hidden,
                power=recommender.power,
                tau=recommender.tau,
                hidden_activation=recommender.hidden_activation,
                output_activation=recommender.output_activation,
            )
            weights = {name.removeprefix("model."): value for name, value in tensors.items() if "model." in name}
            model.load_state_dict(weights)
            if not all(bool(torch.isfinite(value).all()) for value in weights.values()):
                raise InputError("a weight is not finite")
            history = [
                EpochReport(**({"train_rmse": math.nan, "validation_rmse": math.nan} | report))
                for report in config["history"]
            ]
            n_epochs = int(config["n_epochs"])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise InputError(
                f"{folder}: it is not a saved recommender, or it is damaged ({one_line(error)})"
            ) from error
        return recommender._serve(model.to(resolve_device(recommender.device)), ratings, offsets, history, n_epochs)

    def _check_options(self) -> None:
        self._check_serving_options()
        check_choice("mode", self.mode, ("item", "user"))
        check_choice("init_output_bias", self.init_output_bias, ("mean", "zero"))
        if not 0 <= self.validation < 1:
            raise InputError(f"validation: {self.validation} must be at least 0 and below 1")
        if self.fold_in_reg is not None and not (math.isfinite(self.fold_in_reg) and self.fold_in_reg > 0):
            raise InputError(f"fold_in_reg: {self.fold_in_reg} must be a positive number, or None to estimate it")

    def _signature(self, ratings: RatingMatrix) -> dict[str, Any]:
        """Return what must be equal for a state to be gone on from: options that matter, and the ratings."""
        irrelevant = ("device", "path", "cold", "unknown", "fold_in_reg")
        options = {name: value for name, value in self.get_params().items() if name not in irrelevant}
        place = np.arange(1, len(ratings) + 1) % 9973
        cells = ratings.users.astype(np.int64) * ratings.shape[1] + ratings.items
        return {
            "options": options,
            "ratings": [*ratings.shape, len(ratings), int((cells * place).sum()), float(ratings.values @ place)],
        }


@dataclass(frozen=True)
class _Fit:
    """What the phases of one fit share."""

    signature: dict[str, Any]
    history: list[EpochReport]
    on_epoch: Callable[[FitProgress], None] | None


_REG_USER, _REG_ITEM = 15.0, 10.0


def _unit(ratings: RatingMatrix) -> float:
    """Return the network's unit of rating: it works on a scale 4 wide, so that ``reg`` means the same on any scale."""
    low, high = ratings.scale
    return (high - low) / 4 if high > low else 1.0


@dataclass(frozen=True)
class _Offsets:
    mean: float
    users: Float[np.ndarray, " users"]
    items: Float[np.ndarray, " items"]

    @classmethod
    def of(cls, ratings: RatingMatrix) -> _Offsets:
        return cls(*rating_offsets(ratings, reg_user=_REG_USER, reg_item=_REG_ITEM))

    def cells(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        return self.mean + self.users[users] + self.items[items]


@dataclass(frozen=True)
class _ColumnPrior:
    weight: Float[np.ndarray, " hidden"]
    bias: float
    weight_reg: float
    bias_reg: float


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give the folder that save() wrote") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: it is not JSON, or it is damaged ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return cast("dict[str, Any]", content)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (SafetensorError, *DAMAGE) as error:
        raise InputError(f"{path}: it is not a safetensors file, or it is damaged ({error})") from error
