"""A fitted model and what it takes to use it later: one folder for tables, one for ratings, told apart on loading."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
from jaxtyping import Float, Shaped

from shared_core.errors import InputError
from shared_core.runs import write_json
from sparsity_norm.recommend import AutoRecRecommender
from sparsity_norm.sklearn import SNClassifier, SNRegressor
from sparsity_norm.tables import TableSchema

__all__ = ["TableModel", "load_model"]

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
        """Write the model into `folder`: ``config.json``, ``weights.safetensors``, ``table.json``."""
        self.estimator.save(folder)
        write_json(Path(folder) / _SCHEMA, self.schema.to_json())


def load_model(folder: str | Path) -> TableModel | AutoRecRecommender:
    """Load a model from its folder, or from the run folder of the ``fit`` that made it.

    Raises
    ------
    InputError
        When there is no model, or its files are damaged.
    """
    folder = Path(folder)
    inside = folder / "model" if (folder / "model").is_dir() else folder
    if not folder.exists():
        raise InputError(f"{folder}: No such file or directory; give the folder that fit wrote")
    if not inside.is_dir() or not (inside / "config.json").is_file():
        raise InputError(f"{folder}: holds no fitted model; give the folder that fit wrote")
    if not (inside / _SCHEMA).is_file():
        return AutoRecRecommender.load(inside)
    try:
        schema = TableSchema.from_json(json.loads((inside / _SCHEMA).read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{inside / _SCHEMA}: is damaged ({error}); fit the model again") from error
    kind = SNRegressor if schema.classes is None else SNClassifier
    return TableModel(schema, kind.load(inside))
