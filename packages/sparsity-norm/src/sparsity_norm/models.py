"""A fitted model and what it takes to use it later: one folder for tables, one for ratings, told apart on loading."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from shared_core.errors import InputError
from shared_core.runs import write_json
from shared_core.tables import TableSchema
from sparsity_norm.recommend import AutoRecRecommender
from sparsity_norm.sklearn import SNClassifier, SNRegressor

__all__ = ["RatingGraph", "TableModel", "graph_of", "load_model"]

_SCHEMA = "table.json"


@dataclass(frozen=True)
class TableModel:
    """A network with the schema that turns a table into its input.

    Parameters
    ----------
    schema : how columns become inputs, learned from the training table
    estimator : the fitted network
    """

    schema: TableSchema
    estimator: SNClassifier | SNRegressor

    def predict(self, frame: pd.DataFrame, source: str = "table") -> pd.DataFrame:
        """Predict each row of a table.

        Parameters
        ----------
        frame : rows to predict; the target column may be absent
        source : what to call the table in messages

        Returns
        -------
        DataFrame with ``prediction``, the number of ``known`` columns and, for classification, each ``p(class)``.
        """
        x = self.schema.features(frame, source)
        known = self.known(x)
        if self.schema.classes is None:
            values = np.asarray(self.estimator.predict(x), dtype=np.float64).ravel()
            return pd.DataFrame({"prediction": values, "known": known})
        probability = self.probabilities(x)
        columns: dict[str, Any] = {"prediction": [self.schema.classes[code] for code in probability.argmax(axis=1)]}
        columns["known"] = known
        columns |= {f"p({name})": probability[:, code] for code, name in enumerate(self.schema.classes)}
        return pd.DataFrame(columns)

    def probabilities(self, x: Float[np.ndarray, "rows inputs"]) -> Float[np.ndarray, "rows classes"]:
        """Probability of each of the schema's classes for encoded rows."""
        classifier = cast("SNClassifier", self.estimator)
        full = np.zeros((len(x), len(self.schema.classes or ())))
        full[:, np.asarray(classifier.classes_, dtype=np.int64)] = classifier.predict_proba(x)
        return full

    def known(self, x: Float[np.ndarray, "rows inputs"]) -> Shaped[np.ndarray, " rows"]:
        """Known columns of each encoded row; the inputs of one category count once."""
        first = np.unique(self.schema.groups, return_index=True)[1]
        return (~np.isnan(x[:, first])).sum(axis=1)

    def save(self, folder: str | Path) -> None:
        """Write the model into `folder`: ``model.json``, ``model.safetensors``, ``table.json``."""
        self.estimator.save(folder)
        write_json(Path(folder) / _SCHEMA, self.schema.to_json())


class RatingGraph(nn.Module):
    """A fitted recommender as a function of the ratings of whole instances: users in user mode, items in item mode.

    Parameters
    ----------
    recommender : a fitted recommender without offsets outside the network

    Examples
    --------
    >>> rec = AutoRecRecommender(hidden=2, epochs=1, validation=0).fit((["a", "b"], ["x", "x"], [1, 3]))
    >>> import torch
    >>> RatingGraph(rec)(torch.tensor([[1.0, 0.0]]), torch.tensor([[True, False]])).shape
    torch.Size([1, 2])
    """

    def __init__(self, recommender: AutoRecRecommender) -> None:
        super().__init__()
        if recommender.biases:
            raise InputError(
                "a recommender with biases=True adds offsets outside the network; fit it without to export"
            )
        self.model = recommender.model_
        self.low, self.high = recommender.ratings_.scale

    def forward(
        self, x: Float[Tensor, "batch features"], mask: Bool[Tensor, "batch features"]
    ) -> Float[Tensor, "batch features"]:
        """Predict every rating of each instance, clipped to the scale; `x` does not matter where `mask` is 0."""
        return self.model(x, mask).clamp(self.low, self.high)


def graph_of(model: TableModel | AutoRecRecommender) -> tuple[nn.Module, int]:
    """Return a fitted model as a module of ``(x, mask)`` on the CPU, and the number of features it takes.

    A table's module takes encoded and scaled inputs, as :attr:`TableModel.schema` makes them.

    Raises
    ------
    InputError
        When part of the model works outside its network.
    """
    if isinstance(model, AutoRecRecommender):
        return RatingGraph(model).cpu().eval(), model.model_.features
    return model.estimator.graph(), model.estimator.n_features_in_


def load_model(folder: str | Path, *, device: str | None = None) -> TableModel | AutoRecRecommender:
    """Load a model from its folder, or from the run folder of the ``fit`` that made it.

    Parameters
    ----------
    folder : of the model or of the run
    device : where a recommender computes, instead of where it was fitted; networks of tables predict on the CPU

    Raises
    ------
    InputError
        When there is no model, or its files are damaged.
    """
    folder = Path(folder)
    inside = folder / "model" if (folder / "model").is_dir() else folder
    if not folder.exists():
        raise InputError(f"{folder}: No such file or directory; give the run folder of 'sparsity-norm fit'")
    if not inside.is_dir() or not (inside / "model.json").is_file():
        raise InputError(f"{folder}: has no model.json; give the run folder of 'sparsity-norm fit'")
    if not (inside / _SCHEMA).is_file():
        return AutoRecRecommender.load(inside, device=device)
    try:
        schema = TableSchema.from_json(json.loads((inside / _SCHEMA).read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{inside / _SCHEMA}: is damaged ({error}); fit the model again") from error
    kind = SNRegressor if schema.classes is None else SNClassifier
    return TableModel(schema, kind.load(inside))
